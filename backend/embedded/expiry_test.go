package embedded

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// aged is a store whose time the test moves, and whose sweeper takes a step when the test says so.
type aged struct {
	*DB
	t    testing.TB
	wall *atomic.Int64 // ms

	mu   sync.Mutex
	full map[string]bool // what was reported
}

func openAged(t testing.TB, cfg Config, wall *atomic.Int64) *aged {
	t.Helper()
	cfg.Dir, cfg.Shards, cfg.stillSweeper = "/data", 1, true
	cfg.Now = func() time.Time { return time.UnixMilli(wall.Load()) }
	d, err := Open(cfg)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	a := &aged{DB: d, t: t, wall: wall, full: make(map[string]bool)}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("close: %v", err)
		}
	})
	d.Start(backend.Hooks{MailboxFull: func(user, device string, full bool) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.full[user+"/"+device] = full
	}})
	return a
}

// pass lets time go by as it does for a store that runs, and then the sweeper through the whole store.
func (a *aged) pass(age time.Duration) {
	a.t.Helper()
	a.wall.Add(age.Milliseconds())
	a.sweeper.walking, a.sweeper.passed = false, false // begin a new one
	for a.step(age); a.sweeper.walking; {
		a.step(0)
	}
}

func (a *aged) step(ran time.Duration) {
	a.t.Helper()
	rows := a.count.sweptRows.Load()
	if _, err := a.sweep(time.UnixMilli(a.wall.Load()), ran); err != nil {
		a.t.Fatalf("sweep: %v", err)
	}
	if n := a.count.sweptRows.Load() - rows; n > sweepRows {
		a.t.Fatalf("%d rows in one step, want at most %d", n, sweepRows)
	}
}

func (a *aged) commit(c *backend.Commit) {
	done := make(chan struct{})
	c.Urgent, c.Done = true, func() { close(done) }
	a.Commit(c)
	<-done
}

func (a *aged) draw(s backend.Stream) uint32 {
	drawn := make(chan uint32)
	a.Register(s, func(block uint32, _ bool, _ protocol.Refusal) { drawn <- block })
	return <-drawn
}

// agedRecord is message n of a sender of its own, accepted now.
func (a *aged) agedRecord(n int) *backend.Record {
	r := smallRecord(n)
	r.Sender = fmt.Sprintf("sender%d", n)
	r.Position = uint64(a.wall.Load())<<protocol.PositionShift + uint64(n)
	r.Conversation = protocol.ConversationHash(r.Sender, r.Receiver)
	return r
}

// leave writes what a message leaves that nobody acknowledges: rows in two mailboxes, an outstanding row and a window of a
// stream that has drawn a block.
func (a *aged) leave(n int) {
	a.t.Helper()
	r := a.agedRecord(n)
	a.draw(r.Stream())
	a.commit(leftBy(r))
}

func leftBy(r *backend.Record) *backend.Commit {
	conversation := backend.ConversationKey(r.Sender, r.Receiver)
	window := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: conversation, Stream: r.Stream()}}
	window.Finish(protocol.FirstSeq(0))
	return &backend.Commit{
		Mailbox: []backend.MailboxPut{
			{User: r.Receiver, Record: r, Position: r.Position},
			{User: r.Receiver, Device: r.Device, Record: r, Position: r.Position},
		},
		Outstanding: []backend.OutstandingRow{{Conversation: conversation, Addressee: r.Receiver, Mark: backend.Mark{Position: r.Position}}},
		Windows:     []backend.WindowRow{window},
	}
}

// left says what is there of message n, which was accepted at that time: one letter for each row.
func (a *aged) left(n int, atMs int64) (rows string) {
	a.t.Helper()
	r := smallRecord(n)
	r.Sender, r.Position = fmt.Sprintf("sender%d", n), uint64(atMs)<<protocol.PositionShift+uint64(n)
	conversation := backend.ConversationKey(r.Sender, r.Receiver)
	add := func(letter string, there bool, err error) {
		a.t.Helper()
		if err != nil {
			a.t.Fatalf("read: %v", err)
		}
		if there {
			rows += letter
		}
	}
	for _, device := range []string{"", r.Device} {
		_, ok, err := a.MailboxRow(backend.MailboxKey{User: r.Receiver, Device: device, Position: r.Position, ID: r.ID})
		add("m", ok, err)
	}
	_, ok, err := a.FirstOutstanding(conversation, r.Receiver, 0)
	add("o", ok, err)
	stream := r.Stream()
	w, err := a.Window(backend.WindowKey{Conversation: conversation, Stream: stream})
	add("w", w != backend.Window{}, err)
	value, err := a.get(appendStreamKey(nil, &stream))
	add("s", value != nil, err)
	return rows
}

func (a *aged) check(what string) {
	a.t.Helper()
	if err := errors.Join(checkCounts(a.DB), checkStreams(a.DB), a.Healthy()); err != nil {
		a.t.Fatalf("%s: %v", what, err)
	}
}

// TestExpiry: mailbox and outstanding rows and windows go after a year, streams after two, and nothing before.
func TestExpiry(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	fs := vfs.NewMem()
	a := openAged(t, Config{FS: fs}, &wall)
	a.pass(0) // the store begins to see time
	first := wall.Load()
	a.leave(0)
	a.pass(200 * testDay)
	second := wall.Load()
	a.leave(1)
	expect := func(oldest, younger string) {
		t.Helper()
		a.check("after a pass")
		if got := a.left(0, first) + " " + a.left(1, second); got != oldest+" "+younger {
			t.Fatalf("after %v there is %q, want %q", time.Duration(wall.Load()-testMs)*time.Millisecond, got, oldest+" "+younger)
		}
	}
	expect("mmows", "mmows")
	a.pass(165 * testDay) // a year to the millisecond
	expect("mmows", "mmows")
	a.pass(testDay)
	expect("s", "mmows")
	a.shut()
	a = openAged(t, Config{FS: fs}, &wall)
	expect("s", "mmows")
	a.pass(199 * testDay)
	expect("s", "mmows")
	a.pass(time.Millisecond)
	expect("s", "ws") // the day of last use had not ended a year ago
	a.pass(testDay)
	expect("s", "s")
	a.pass(164*testDay - time.Millisecond) // two years
	expect("s", "s")
	a.pass(testDay)
	expect("", "s")
	a.pass(200 * testDay)
	expect("", "")
	for kind, want := range [expireKinds]uint64{2, 1, 1, 2} { // since the restart
		if n := a.count.expired[kind].Load(); n != want {
			t.Errorf("%d rows of kind %s expired, want %d", n, expireNames[kind], want)
		}
	}
	if n := a.count.mailboxRows.Load(); n != 0 {
		t.Errorf("%d mailbox rows are counted", n)
	}
}

func (a *aged) shut() {
	a.t.Helper()
	if err := a.Close(); err != nil {
		a.t.Fatal(err)
	}
}

// TestExpiryMakesRoom: a full mailbox takes new messages when its oldest row expires, and the store says so.
func TestExpiryMakesRoom(t *testing.T) {
	const limit = 300 // three steps
	var wall atomic.Int64
	wall.Store(testMs)
	fs := vfs.NewMem()
	a := openAged(t, Config{FS: fs, MailboxRows: limit}, &wall)
	a.pass(0)
	fill := func(first, n int) {
		c := &backend.Commit{}
		for i := range n {
			r := a.agedRecord(first + i)
			c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Device: "phone", Record: r, Position: r.Position})
		}
		a.commit(c)
	}
	is := func(want bool) {
		t.Helper()
		a.check("mailbox")
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.full["bob/phone"] != want {
			t.Fatalf("full: %v, want %v", a.full["bob/phone"], want)
		}
	}
	fill(0, limit-1)
	a.pass(300 * testDay)
	is(false)
	fill(limit, 1)
	is(true)
	a.pass(66 * testDay)
	is(false)
	if page, err := a.MailboxPage("bob", "phone", 0, protocol.MessageID{}, limit); err != nil || len(page) != 1 {
		t.Fatalf("%d rows are left, %v", len(page), err)
	}
	if n := a.count.expired[expireMailbox].Load(); n != limit-1 {
		t.Fatalf("%d rows expired, want %d", n, limit-1)
	}
	fill(2*limit, limit-1)
	is(true)
	a.shut()
	a = openAged(t, Config{FS: fs, MailboxRows: limit}, &wall)
	a.pass(testYear + testDay)
	is(false)
	if n := a.count.mailboxRows.Load(); n != 0 {
		t.Fatalf("%d rows are counted", n)
	}
}

// TestJumpsExpireNothing: a wall clock that is set years ahead, while the store runs or between two runs, for a moment or for
// good, makes nothing old.
func TestJumpsExpireNothing(t *testing.T) {
	for _, back := range []bool{false, true} {
		t.Run(fmt.Sprintf("back=%v", back), func(t *testing.T) {
			var wall atomic.Int64
			wall.Store(0) // a board without a battery
			fs := vfs.NewMem()
			a := openAged(t, Config{FS: fs}, &wall)
			a.leave(0)
			a.step(sweepLook)
			stays := func(what string) {
				t.Helper()
				a.pass(time.Minute)
				if got := a.left(0, 0); got != "mmows" {
					t.Fatalf("%s: %q is left", what, got)
				}
			}
			for range 3 {
				before := wall.Load()
				wall.Add((10 * testYear).Milliseconds())
				stays("a jump while it runs")
				a.pass(30 * testDay)
				stays("a month later")
				a.shut()
				wall.Add((5 * testYear).Milliseconds())
				a = openAged(t, Config{FS: fs}, &wall)
				stays("a jump between two runs")
				if back {
					wall.Store(before)
					stays("set back")
				}
			}
			// What really passes counts.
			a.pass(2*testYear + 2*testDay)
			if got := a.left(0, 0); got != "" {
				t.Fatalf("after two years %q is left", got)
			}
		})
	}
}

// TestOldGapsCount: a gap is remembered until nothing that could expire is older.
func TestOldGapsCount(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	a := openAged(t, Config{FS: vfs.NewMem()}, &wall)
	a.pass(0)
	a.leave(0)
	a.pass(10 * testDay)
	wall.Add((10 * testYear).Milliseconds())
	a.pass(0)
	for range 7 { // 710 days
		a.pass(100 * testDay)
	}
	if got := a.left(0, testMs); got != "s" {
		t.Fatalf("%q is left, want the stream", got)
	}
	a.pass(30 * testDay)
	if got := a.left(0, testMs); got != "" {
		t.Fatalf("%q is left after two years", got)
	}
	a.pass(testYear)
	a.pass(2 * testYear)
	if n := len(a.sweeper.clock.gaps); n != 0 {
		t.Fatalf("%d gaps are kept", n)
	}
}

// TestPassEndsWhenTheClockIsSetBack: it goes by dates of its start, and rows are being dated before them.
func TestPassEndsWhenTheClockIsSetBack(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	a := openAged(t, Config{FS: vfs.NewMem()}, &wall)
	a.pass(0)
	c := &backend.Commit{}
	for n := range 3 * sweepRows {
		c.Windows = append(c.Windows, leftBy(a.agedRecord(n)).Windows...)
	}
	a.commit(c)
	wall.Add((3 * testYear).Milliseconds())
	a.step(3 * testYear)
	expired := a.count.expired[expireWindow].Load()
	if !a.sweeper.walking || expired == 0 {
		t.Fatalf("a pass is under way: %v; %d windows have expired", a.sweeper.walking, expired)
	}
	wall.Add(-(2 * testYear).Milliseconds())
	a.step(sweepStep)
	if n := a.count.expired[expireWindow].Load(); a.sweeper.walking || n != expired {
		t.Fatalf("the pass goes on: %v; %d more windows have expired", a.sweeper.walking, n-expired)
	}
}

// TestRowsInUseStay: a window or stream that is used after the sweeper has looked at it, in the same batch or an earlier
// one, does not expire.
func TestRowsInUseStay(t *testing.T) {
	for _, together := range []bool{false, true} {
		t.Run(fmt.Sprintf("together=%v", together), func(t *testing.T) {
			var wall atomic.Int64
			wall.Store(testMs)
			fs := &slowFS{FS: vfs.NewMem()}
			a := openAged(t, Config{FS: fs}, &wall)
			a.pass(0)
			a.leave(0)
			r := a.agedRecord(0)
			wall.Add((3 * testYear).Milliseconds())
			s := &a.sweeper
			s.observe(time.UnixMilli(wall.Load()), 3*testYear)
			e := &expiry{}
			if err := a.collect(e); err != nil || e.rows() != 5 {
				t.Fatalf("%d rows have expired, %v; want all 5", e.rows(), err)
			}
			window := leftBy(r).Windows
			if !together {
				a.commit(&backend.Commit{Windows: window})
				a.draw(r.Stream())
				if !a.expire(e) {
					t.Fatal("not taken")
				}
			} else {
				g := newGate()
				fs.onSync(g.wait)
				a.Commit(&backend.Commit{Urgent: true}) // nothing in it, and so nothing to sync
				a.Commit(&backend.Commit{Urgent: true, Receipts: []backend.ReceiptRow{{}}})
				<-g.entered // this one syncs, and one more batch may be built meanwhile
				a.Commit(&backend.Commit{Urgent: true, Receipts: []backend.ReceiptRow{{}}})
				for taken := false; !taken; {
					a.DB.mu.Lock()
					taken = len(a.pending.commits) == 0
					a.DB.mu.Unlock()
				}
				drawn := make(chan uint32, 1)
				a.Commit(&backend.Commit{Windows: window})
				a.Register(r.Stream(), func(block uint32, _ bool, _ protocol.Refusal) { drawn <- block })
				expired := make(chan bool)
				go func() { expired <- a.expire(e) }()
				for there := false; !there; {
					a.DB.mu.Lock()
					there = a.pending.expiry != nil
					a.DB.mu.Unlock()
				}
				close(g.open)
				if !<-expired || <-drawn != 1 {
					t.Fatal("not taken, or another block was drawn")
				}
			}
			a.check("after the expiry")
			if w, s := a.count.expired[expireWindow].Load(), a.count.expired[expireStream].Load(); w+s != 0 {
				t.Fatalf("%d windows and %d streams are counted", w, s)
			}
			if got := a.left(0, testMs); got != "ws" {
				t.Fatalf("%q is left, want the window and the stream", got)
			}
			if block := a.draw(r.Stream()); block != 2 {
				t.Fatalf("block %d is drawn, want 2", block)
			}
		})
	}
}

// TestSilentConnection: a connection says nothing for more than two years, so its stream expires; then it sends. The next
// login must not draw the block of a window.
func TestSilentConnection(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	a := openAged(t, Config{FS: vfs.NewMem()}, &wall)
	a.pass(0)
	s := a.agedRecord(0).Stream()
	a.draw(s)
	a.draw(s)
	a.pass(2*testYear + 2*testDay)
	if value, err := a.get(appendStreamKey(nil, &s)); value != nil || err != nil {
		t.Fatalf("the stream is still there: %x, %v", value, err)
	}
	window := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: s}}
	window.Finish(protocol.FirstSeq(1))
	a.commit(&backend.Commit{Windows: []backend.WindowRow{window}})
	a.check("after the send")
	if block := a.draw(s); block != 2 {
		t.Fatalf("block %d is drawn, and the window knows block 1", block)
	}
	// Every use keeps the stream.
	for range 4 {
		a.pass(testYear - testDay)
		a.commit(&backend.Commit{Windows: []backend.WindowRow{window}})
		a.check("after a use")
	}
	if block := a.draw(s); block != 3 {
		t.Fatalf("block %d is drawn, want 3", block)
	}
}

// TestSetBackForAWhile: what is written while the clock is years behind is not old when the clock is right again, and nor is
// what was written before.
func TestSetBackForAWhile(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	a := openAged(t, Config{FS: vfs.NewMem()}, &wall)
	a.pass(0)
	a.leave(0)
	a.pass(10 * testDay)
	right := wall.Load()
	wall.Add(-(3 * testYear).Milliseconds())
	a.pass(0)
	behind := wall.Load()
	a.leave(1)
	a.commit(&backend.Commit{Windows: leftBy(a.agedRecord(0)).Windows}) // and a window that has a later date
	a.pass(20 * testDay)
	wall.Store(right + (20 * testDay).Milliseconds())
	for range 3 {
		a.pass(10 * testDay)
		a.check("clock set right")
		if got := a.left(0, testMs) + " " + a.left(1, behind); got != "mmows mmows" {
			t.Fatalf("%q is left", got)
		}
	}
	a.pass(testYear)
	if got := a.left(0, testMs) + " " + a.left(1, behind); got != "s s" {
		t.Fatalf("a year later %q is left, want the streams", got)
	}
}

// TestSweepIsSlowAndComplete: a step looks at few rows, young rows of a mailbox or a pair cost one look, and a pass finds every row
// whatever changes meanwhile.
func TestSweepIsSlowAndComplete(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	a := openAged(t, Config{FS: vfs.NewMem()}, &wall)
	a.pass(0)
	const many = 350
	old := &backend.Commit{}
	for n := range many { // a pair, a window and a stream each, and all in two mailboxes
		left := leftBy(a.agedRecord(n))
		old.Mailbox = append(old.Mailbox, left.Mailbox...)
		old.Outstanding = append(old.Outstanding, left.Outstanding...)
		old.Windows = append(old.Windows, left.Windows...)
	}
	a.commit(old)
	// Young ones before, between and behind, and damage that must not stop the pass.
	a.pass(300 * testDay)
	for _, user := range []string{"aaron", "bob", "zoe"} {
		young := &backend.Commit{}
		for n := range many {
			r := a.agedRecord(many + n)
			young.Mailbox = append(young.Mailbox, backend.MailboxPut{User: user, Device: "phone", Record: r, Position: r.Position})
			young.Outstanding = append(young.Outstanding, backend.OutstandingRow{Conversation: user, Addressee: user, Mark: backend.Mark{Position: r.Position}})
		}
		a.commit(young)
	}
	for _, key := range []string{"m", "m\x00", "mbob", "o\x00\x00\x00", "wx", "w\x01", "sx", "s\xff"} {
		if err := a.kv.Set([]byte(key), []byte{99}, pebble.NoSync); err != nil {
			t.Fatal(err)
		}
	}
	wall.Add((100 * testDay).Milliseconds())
	a.step(100 * testDay) // begins a pass: the last began long ago
	swept := a.count.sweptRows.Load() - sweepRows
	steps := 1
	for ; a.sweeper.walking; steps++ {
		r := a.agedRecord(10_000 + steps)
		a.commit(leftBy(r)) // something new, before or behind the cursor
		a.step(0)
	}
	swept = a.count.sweptRows.Load() - swept
	for kind, want := range [expireKinds]uint64{2 * many, many, many, 0} {
		if n := a.count.expired[kind].Load(); n != want {
			t.Errorf("%d rows of kind %s expired, want %d", n, expireNames[kind], want)
		}
	}
	// All that expired, the streams, the damaged, one young row for each mailbox and pair, and what came meanwhile.
	if most := uint64(5*many + 8 + 8 + 5*steps); swept > most || steps < 5*many/sweepRows {
		t.Errorf("%d rows were looked at in %d steps, want at most %d", swept, steps, most)
	}
	for _, user := range []string{"aaron", "bob", "zoe"} {
		page, err := a.MailboxPage(user, "phone", 0, protocol.MessageID{}, 2*many)
		if err != nil || len(page) < many || len(page) > many+steps {
			t.Errorf("%d rows of %s are left, %v", len(page), user, err)
		}
	}
	if n := a.count.passes.Load(); n != 3 {
		t.Errorf("%d passes", n)
	}
}

// TestCrashInASweep crashes at every step of a sweep: what was not old is there, what had expired is gone or not, counts are right, and
// another sweep finds the rest.
func TestCrashInASweep(t *testing.T) {
	var wall atomic.Int64
	wall.Store(testMs)
	mem := vfs.NewCrashableMem()
	var crashes []map[int]*vfs.MemFS
	var mu sync.Mutex
	sweeping := false
	at := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		if !sweeping || name != "before_expiry" && name != "after_expiry" {
			return
		}
		disks := make(map[int]*vfs.MemFS)
		for _, percent := range []int{0, 50, 100} {
			disks[percent] = mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(uint64(len(crashes)), uint64(percent)))})
		}
		crashes = append(crashes, disks)
	}
	const many = 50
	a := openAged(t, Config{FS: mem, MailboxRows: many, atPoint: at}, &wall)
	a.pass(0)
	first := wall.Load()
	for n := range many {
		a.leave(n)
	}
	a.pass(200 * testDay)
	second := wall.Load()
	for n := range many {
		a.leave(many + n)
	}
	a.pass(165 * testDay) // a year to the millisecond: the age clock is stored, and nothing has expired
	mu.Lock()
	sweeping = true
	mu.Unlock()
	a.pass(23 * time.Hour)
	a.shut()
	if len(crashes) < 6 {
		t.Fatalf("%d crashes", len(crashes))
	}
	partly := 0
	for i, disks := range crashes {
		for percent, disk := range disks {
			b := openAged(t, Config{FS: disk, MailboxRows: many}, &wall)
			what := fmt.Sprintf("crash %d with %d %%", i, percent)
			b.check(what)
			whole, gone := 0, 0
			for n := range many {
				switch got := b.left(n, first); {
				case got == "" || got[len(got)-1] != 's':
					t.Fatalf("%s: of an old message %q is left, its stream is a year too young", what, got)
				case got == "mmows":
					whole++
				case got == "s":
					gone++
				}
				if got := b.left(many+n, second); got != "mmows" {
					t.Fatalf("%s: of a young message %q is left", what, got)
				}
			}
			if whole < many && gone < many {
				partly++
			}
			b.pass(0)
			b.check(what + ", swept again")
			for n := range many {
				if got := b.left(n, first); got != "s" {
					t.Fatalf("%s: after another sweep %q is left of an old message", what, got)
				}
				if got := b.left(many+n, second); got != "mmows" {
					t.Fatalf("%s: after another sweep %q is left of a young message", what, got)
				}
			}
			b.shut()
		}
	}
	if partly == 0 {
		t.Error("no crash was in the middle of a sweep")
	}
}

// TestSweeperRuns lets a bubble's time go by: the sweeper looks at the clock after a minute, stores it, begins and ends a pass, and Close
// stops it at once.
func TestSweeperRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		d, err := Open(Config{Dir: "/data", FS: fs, Shards: 1, MinFreeBytes: 1})
		if err != nil {
			t.Fatal(err)
		}
		d.Start(backend.Hooks{})
		time.Sleep(sweepLook + sweepStep)
		if n := d.count.passes.Load(); n != 1 {
			t.Errorf("%d passes after a minute, want 1", n)
		}
		time.Sleep(sweepPass + sweepLook)
		if n := d.count.passes.Load(); n != 2 {
			t.Errorf("%d passes after a day, want 2", n)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		var again sweeper
		if d, err = Open(Config{Dir: "/data", FS: fs, Shards: 1}); err != nil {
			t.Fatal(err)
		}
		again.clock = d.sweeper.clock
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if late := time.Now().UnixMilli() - again.clock.seenMs; late < 0 || late > (sweepClockSave+sweepLook).Milliseconds() {
			t.Errorf("the stored clock is %d ms behind", late)
		}
	})
}
