package edge

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"millrace/protocol"
)

// downlinkScript runs commands against a Downlink and prints what it asks for.
//
//	push N [GEN]      a live message at position N, of the present generation unless given
//	full N            the same without room in the outbound budget
//	notify
//	page A N,N… [end] the rows after cursor A: positions; "x5" is a row for which there is no room
//	fail
//	ack N
//	fence             one is asked for and answered
//	sweep S B L       at second S, B bytes buffered, L: whether any left
func downlinkScript(t *testing.T, d *Downlink, script string) string {
	t.Helper()
	cursor := func(n uint64) protocol.MailboxCursor {
		if n == 0 {
			return protocol.MailboxCursor{}
		}
		return protocol.MailboxCursor{DeviceMailbox: true, Position: n, ID: testID(n)}
	}
	pending := func(n uint64) Pending { return Pending{ID: testID(n), Position: n} }
	number := func(text string) (n uint64) {
		if _, err := fmt.Sscan(text, &n); err != nil {
			t.Fatal(text, err)
		}
		return n
	}
	fence := uint64(1)
	verdicts := map[PushVerdict]string{Write: "write", Skip: "skip", RefusePush: "refuse", StopPage: "stop"}
	var out []string
	for _, line := range strings.Split(strings.TrimSpace(script), "\n") {
		words := strings.Fields(line)
		var said []string
		var e Effects
		switch words[0] {
		case "push", "full":
			generation := d.Generation()
			if len(words) > 2 {
				generation = uint32(number(words[2]))
			}
			var v PushVerdict
			v, e = d.Push(generation, pending(number(words[1])), words[0] == "push")
			said = append(said, verdicts[v])
		case "notify":
			e = d.Notify()
		case "page":
			after := cursor(number(words[1]))
			ok, effects := d.BeginPage(after)
			if e = effects; !ok {
				said = append(said, "unwanted")
				break
			}
			last := uint64(0)
			for _, row := range strings.Split(words[2], ",") {
				if row == "-" {
					continue
				}
				text, stopped := strings.CutPrefix(row, "x")
				last = number(text)
				v := d.Row(pending(last), !stopped)
				said = append(said, verdicts[v])
				if v == StopPage {
					break
				}
			}
			e = d.EndPage(cursor(last), len(words) > 3)
		case "fail":
			d.PageFailed()
		case "ack":
			p, ok, effects := d.Acknowledge(testID(number(words[1])), true, fence, fence-1)
			said = append(said, fmt.Sprintf("%v mailbox=%v", ok, p.Mailbox))
			e = effects
		case "fence":
			fence++
		case "sweep":
			e = d.Sweep(uint32(number(words[1])), int(number(words[2])), words[3] == "true", fence-1)
		case "end":
			d.End(func(p Pending) { said = append(said, fmt.Sprintf("lost %d", p.Position)) })
		default:
			t.Fatal(line)
		}
		if e&StateChanged != 0 {
			said = append(said, fmt.Sprintf("generation %d live %v", d.Generation(), d.Live()))
		}
		if e&ReadPage != 0 {
			after, limit := d.Request(fence - 1)
			said = append(said, fmt.Sprintf("read %d after %d", limit, after.Position))
		}
		if e&CloseSlow != 0 {
			said = append(said, "slow")
		}
		out = append(out, line+": "+strings.Join(said, ", "))
	}
	return strings.Join(out, "\n")
}

func TestDownlink(t *testing.T) {
	for _, tt := range []struct{ name, script, want string }{
		{"an empty mailbox", `
page 0 - end
push 1
push 1
ack 1
ack 1
push 2 7`, `
page 0 - end: generation 0 live true
push 1: write
push 1: skip
ack 1: true mailbox=false
ack 1: false mailbox=false
push 2 7: refuse`},
		{"a drain ends with a whole pass", `
push 1
page 0 2,3
page 3 4 end
ack 2
push 5`, `
push 1: refuse
page 0 2,3: write, write, read 128 after 3
page 3 4 end: write, generation 0 live true
ack 2: true mailbox=true
push 5: write`},
		{"a deletion that is under way is not pushed again", `
page 0 1 end
ack 1
notify
page 0 1 end`, `
page 0 1 end: write, generation 0 live true
ack 1: true mailbox=true
notify: generation 1 live false, read 128 after 0
page 0 1 end: skip, generation 1 live true`},
		{"a page that was read before the fence was answered", `
page 0 1 end
ack 1
notify
fence
page 0 1 end
push 1`, `
page 0 1 end: write, generation 0 live true
ack 1: true mailbox=true
notify: generation 1 live false, read 128 after 0
fence: 
page 0 1 end: skip, generation 1 live true
push 1: skip`},
		{"what is fenced is forgotten with the next page", `
page 0 1,2,3
ack 2
fence
ack 1
page 3 - end
notify
page 0 1,3 end
fence
notify
page 0 1 end`, `
page 0 1,2,3: write, write, write, read 128 after 3
ack 2: true mailbox=true
fence: 
ack 1: true mailbox=true
page 3 - end: generation 0 live true
notify: generation 1 live false, read 128 after 0
page 0 1,3 end: skip, skip, generation 1 live true
fence: 
notify: generation 2 live false, read 128 after 0
page 0 1 end: write, generation 2 live true`},
		{"a notice during a pass makes another", `
notify
page 0 - end
page 0 - end`, `
notify: 
page 0 - end: read 128 after 0
page 0 - end: generation 0 live true`},
		{"a notice turns a live session back", `
page 0 - end
push 1
notify
push 2
push 3 0
page 0 2 end
push 4
push 5 0`, `
page 0 - end: generation 0 live true
push 1: write
notify: generation 1 live false, read 128 after 0
push 2: refuse
push 3 0: refuse
page 0 2 end: write, generation 1 live true
push 4: write
push 5 0: refuse`},
		{"over the budget: draining, and again when the buffer is empty", `
page 0 - end
full 1
push 2 0
push 2
sweep 1 100 true
sweep 2 0 true
page 0 1,2 end`, `
page 0 - end: generation 0 live true
full 1: refuse, generation 1 live false
push 2 0: refuse
push 2: refuse
sweep 1 100 true: 
sweep 2 0 true: read 128 after 0
page 0 1,2 end: write, write, generation 1 live true`},
		{"no room for a row: the pass goes on behind the last one written", `
page 0 1,2,x3,4
ack 1
page 2 3,4 end`, `
page 0 1,2,x3,4: write, write, stop
ack 1: true mailbox=true, read 128 after 2
page 2 3,4 end: write, write, generation 0 live true`},
		{"a page that could not be read", `
fail
page 0 - end
sweep 1 0 false
page 0 - end`, `
fail: 
page 0 - end: unwanted
sweep 1 0 false: read 128 after 0
page 0 - end: generation 0 live true`},
		{"what is lost", `
page 0 1 end
push 2
push 3
ack 2
end`, `
page 0 1 end: write, generation 0 live true
push 2: write
push 3: write
ack 2: true mailbox=false
end: lost 3`},
		{"a buffer from which nothing leaves", `
page 0 - end
push 1
sweep 100 10 false
sweep 159 10 false
sweep 160 10 false`, `
page 0 - end: generation 0 live true
push 1: write
sweep 100 10 false: 
sweep 159 10 false: 
sweep 160 10 false: slow`},
		{"a byte leaves now and then", `
page 0 - end
push 1
sweep 100 10 false
sweep 159 9 true
sweep 160 9 false
sweep 218 9 false
sweep 219 9 false`, `
page 0 - end: generation 0 live true
push 1: write
sweep 100 10 false: 
sweep 159 9 true: 
sweep 160 9 false: 
sweep 218 9 false: 
sweep 219 9 false: slow`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var d Downlink
			if e := d.Start(false); e != ReadPage {
				t.Fatalf("Start asks for %b", e)
			}
			if got := downlinkScript(t, &d, tt.script); got != strings.TrimPrefix(tt.want, "\n") {
				t.Errorf("got\n%s\nwant%s", got, tt.want)
			}
			d.End(func(Pending) {})
			if d.flight != nil {
				t.Error("End keeps something")
			}
		})
	}
}

func TestDownlinkAtItsLimit(t *testing.T) {
	var d Downlink
	d.Start(true)
	if !d.Heir() {
		t.Fatal("not heir")
	}
	downlinkScript(t, &d, "page 0 - end")
	for n := range uint64(protocol.MaxUnacknowledged) {
		if v, _ := d.Push(0, Pending{ID: testID(n), Position: n}, true); v != Write {
			t.Fatal(n, v)
		}
	}
	if v, e := d.Push(0, Pending{ID: testID(1000)}, true); v != RefusePush || e != StateChanged || d.Generation() != 1 || d.InFlight() != protocol.MaxUnacknowledged {
		t.Fatal(v, e)
	}
	// With acknowledgements now and then it is not closed, however long it takes; with none for a minute it is.
	seconds := uint32(1000)
	for n := range uint64(100) {
		seconds += 50
		if e := d.Sweep(seconds, 0, false, 0); e != 0 {
			t.Fatalf("after %d acknowledgements: %b", n, e)
		}
		if _, ok, e := d.Acknowledge(testID(n), true, 1, 0); !ok || e != 0 {
			t.Fatal(n, ok, e)
		}
		if e := d.Sweep(seconds+1, 0, false, 0); e != ReadPage { // room for one: the drain goes on
			t.Fatalf("%b", e)
		}
		after, _ := d.Request(0)
		if ok, _ := d.BeginPage(after); !ok {
			t.Fatal("unwanted")
		}
		p := Pending{ID: testID(2000 + n), Position: 2000 + n}
		if v := d.Row(p, true); v != Write {
			t.Fatal(v)
		}
		if v := d.Row(Pending{ID: testID(9000)}, true); v != StopPage {
			t.Fatal(v)
		}
		d.EndPage(protocol.MailboxCursor{}, false)
	}
	// Acknowledgements bring it under 128: the drain goes on at once.
	for n := uint64(100); d.InFlight() > resumeBelow; n++ {
		if _, ok, e := d.Acknowledge(testID(n), true, 1, 0); !ok || e != 0 {
			t.Fatal(n, ok, e)
		}
	}
	if _, ok, e := d.Acknowledge(testID(2000), true, 1, 0); !ok || e != ReadPage {
		t.Fatal(ok, e)
	}
	// Of what is left, the 100 rows of the mailbox (less the one acknowledged) are there still; the live ones are lost.
	left, lost := d.InFlight(), 0
	d.End(func(Pending) { lost++ })
	if lost != left-99 {
		t.Fatalf("%d of %d lost", lost, left)
	}
}

// TestDownlinkRandom: whatever the order of events, a message is never written twice, there are never more than 256 in flight, and an owner that
// pushes only to what it was told is live, writes the rest and sends a notice, has everything shown in the end.
func TestDownlinkRandom(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 9))
		var d Downlink
		var mailbox []uint64  // positions, ascending
		var deleting []uint64 // acknowledged; their rows are still there
		covered := 0          // of deleting, by the fence that was asked for
		fence, fenced := uint64(1), uint64(0)
		inFlight, shown := map[uint64]bool{}, map[uint64]bool{}
		var request *protocol.MailboxCursor
		var snapshot []uint64 // of the mailbox, read after the request
		seconds, position := uint32(0), uint64(0)
		act := func(e Effects) {
			if e&ReadPage != 0 {
				if request != nil {
					t.Fatalf("seed %d: two pages are asked for at once", seed)
				}
				c, _ := d.Request(fenced)
				request, snapshot = &c, nil
			}
			if e&CloseSlow != 0 {
				t.Fatalf("seed %d: closed", seed)
			}
		}
		write := func(n uint64) {
			if shown[n] {
				t.Fatalf("seed %d: %d is written twice", seed, n)
			}
			if inFlight[n], shown[n] = true, true; len(inFlight) > protocol.MaxUnacknowledged || len(inFlight) != d.InFlight() {
				t.Fatalf("seed %d: %d in flight, InFlight %d", seed, len(inFlight), d.InFlight())
			}
		}
		store := func(n uint64) {
			mailbox = append(mailbox, n)
			act(d.Notify())
		}
		readRows := func() {
			if request != nil && snapshot == nil {
				snapshot = append([]uint64{}, mailbox...)
			}
		}
		page := func(room func() bool) {
			if request == nil {
				return
			}
			readRows()
			after := *request
			request = nil
			if r.IntN(10) == 0 {
				d.PageFailed()
				return
			}
			ok, e := d.BeginPage(after)
			if !ok {
				act(e)
				return
			}
			limit, end, next := 1+r.IntN(20), true, after
			for _, n := range snapshot {
				if n <= after.Position {
					continue
				}
				if limit--; limit < 0 {
					end = false
					break
				}
				v := d.Row(Pending{ID: testID(n), Position: n}, room())
				if v == StopPage {
					break
				}
				if v == Write {
					write(n)
				}
				next = protocol.MailboxCursor{DeviceMailbox: true, Position: n, ID: testID(n)}
			}
			act(d.EndPage(next, end))
		}
		askFence := func() {
			if fenced+1 == fence {
				fence++
				covered = len(deleting)
			}
		}
		answerFence := func() {
			if fenced+1 == fence {
				return
			}
			mailbox = slices.DeleteFunc(mailbox, func(n uint64) bool { return slices.Contains(deleting[:covered], n) })
			deleting, fenced = deleting[covered:], fence-1
		}
		acknowledge := func() {
			for n := range inFlight {
				p, ok, e := d.Acknowledge(testID(n), true, fence, fenced)
				if !ok || p.Position != n {
					t.Fatalf("seed %d: %d is not in flight", seed, n)
				}
				delete(inFlight, n)
				deleting = append(deleting, n)
				act(e)
				return
			}
		}
		act(d.Start(false))
		for range 1500 {
			switch r.IntN(11) {
			case 0, 1, 2:
				position++
				if !d.Live() {
					store(position)
					break
				}
				generation := d.Generation()
				if r.IntN(8) == 0 {
					generation-- // on its way for a while
				}
				switch v, e := d.Push(generation, Pending{ID: testID(position), Position: position}, r.IntN(9) > 0); v {
				case Write:
					write(position)
					act(e)
				default:
					act(e)
					store(position)
				}
			case 3, 4:
				acknowledge()
			case 5, 6:
				page(func() bool { return r.IntN(20) > 0 })
			case 7:
				readRows()
			case 8:
				askFence()
			case 9:
				answerFence()
			default:
				seconds++
				act(d.Sweep(seconds, r.IntN(2)*10, true, fenced))
			}
		}
		for range 10_000 { // and now it heals
			if d.Live() && len(mailbox) == 0 && d.InFlight() == 0 {
				break
			}
			page(func() bool { return true })
			acknowledge()
			askFence()
			answerFence()
			seconds++
			act(d.Sweep(seconds, 0, true, fenced))
		}
		if uint64(len(shown)) != position || !d.Live() || len(mailbox) != 0 || d.InFlight() != 0 {
			t.Fatalf("seed %d: %d of %d shown, live %v, %d rows, %d in flight", seed, len(shown), position, d.Live(), len(mailbox), d.InFlight())
		}
		askFence()
		answerFence()
		d.Sweep(seconds+1, 0, true, fenced)
		d.Sweep(seconds+2, 0, true, fenced)
		if d.flight != nil {
			t.Fatalf("seed %d: an idle session keeps its flight", seed)
		}
	}
}

// TestDownlinkRemembersBounded: what is acknowledged faster than fences are answered stops a drain, which the sweep
// resumes when they are.
func TestDownlinkRemembersBounded(t *testing.T) {
	var d Downlink
	d.Start(false)
	downlinkScript(t, &d, "page 0 - end")
	n := uint64(0)
	for ; n < maxUnfenced; n++ {
		if v, _ := d.Push(0, Pending{ID: testID(n), Position: n}, true); v != Write {
			t.Fatal(n, v)
		}
		d.Acknowledge(testID(n), true, 1, 0)
	}
	if v, e := d.Push(0, Pending{ID: testID(n), Position: n}, true); v != RefusePush || e != StateChanged {
		t.Fatal(v, e)
	}
	if e := d.Sweep(1, 0, false, 0); e != ReadPage {
		t.Fatal(e)
	}
	after, _ := d.Request(0)
	if ok, _ := d.BeginPage(after); !ok {
		t.Fatal("unwanted")
	}
	if v := d.Row(Pending{ID: testID(n), Position: n}, true); v != StopPage {
		t.Fatal(v)
	}
	d.EndPage(after, false)
	if e := d.Sweep(2, 0, false, 1); e != ReadPage {
		t.Fatal(e)
	}
	after, _ = d.Request(1)
	if ok, _ := d.BeginPage(after); !ok {
		t.Fatal("unwanted")
	}
	if v := d.Row(Pending{ID: testID(n), Position: n}, true); v != Write {
		t.Fatal(v)
	}
}

// TestFlightsAreGivenBack: what comes out of the pool is clean and not large.
func TestFlightsAreGivenBack(t *testing.T) {
	var d Downlink
	d.Start(false)
	downlinkScript(t, &d, "page 0 - end")
	for n := range uint64(200) {
		d.Push(0, Pending{ID: testID(n)}, true)
		d.Acknowledge(testID(n), true, 1, 0)
	}
	f := d.flight
	d.Sweep(1, 0, false, 0)
	d.Sweep(2, 0, false, 0)
	if d.flight == nil {
		t.Fatal("given back before the fence was answered")
	}
	d.Sweep(3, 0, false, 1)
	d.Sweep(4, 0, false, 1)
	if d.flight != nil {
		t.Fatal("kept")
	}
	if len(f.pending) != 0 || len(f.acked) != 0 || cap(f.acked) > flightKeepCap || f.cursor != (protocol.MailboxCursor{}) {
		t.Fatalf("%d pending, %d acked", len(f.pending), cap(f.acked))
	}
}
