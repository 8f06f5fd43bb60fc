package edge

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"millrace/protocol"
)

// uplinkScript runs commands against an Uplink and prints what it said. Times are milliseconds.
//
//	offer N      a send comes; when it may be published, the Publisher takes it
//	offer N !C   and the Publisher refuses it with code C, retryable after 100 ms
//	offer N .C   and the Publisher refuses it for good
//	answer N     durable
//	answer N !C  failed, retryable
//	ended N      refused for good before it was offered
//	pass MS      time goes by
func uplinkScript(t *testing.T, u *Uplink, limit RateLimit, script string) string {
	t.Helper()
	var out []string
	now := int64(1000)
	for _, line := range strings.Split(strings.TrimSpace(script), "\n") {
		words := strings.Fields(line)
		var n uint64
		if _, err := fmt.Sscan(words[1], &n); err != nil {
			t.Fatal(line, err)
		}
		var r protocol.Refusal
		if len(words) > 2 {
			code, ok := protocol.CodeByName([]byte(words[2][1:]))
			if !ok {
				t.Fatal(line)
			}
			r.Code = code
			if words[2][0] == '!' {
				r.RetryAfterMs = 100
			}
		}
		result := ""
		switch words[0] {
		case "pass":
			now += int64(n)
			continue
		case "ended":
			u.Ended(n)
			continue
		case "answer":
			from, ok := u.Answer(n, r, now)
			result = fmt.Sprintf("%v from %d", ok, from)
		case "offer":
			verdict, refusal, from := u.Offer(n, now, &limit)
			switch verdict {
			case Publish:
				if r.Code == 0 {
					u.Handed(n)
					result = "published"
				} else {
					result = fmt.Sprintf("%s from %d", r.Code, u.Refused(n, r, now))
				}
			case Ignore:
				result = "ignored"
			case Refuse:
				result = fmt.Sprintf("%s from %d after %d", refusal.Code, from, refusal.RetryAfterMs)
			case Flood:
				result = "flood"
			case BlockUsed:
				result = "block used"
			}
		default:
			t.Fatal(line)
		}
		out = append(out, fmt.Sprintf("%s: %s", line, result))
	}
	return strings.Join(out, "\n")
}

func TestUplink(t *testing.T) {
	for _, tt := range []struct {
		name   string
		block  uint32
		limit  RateLimit
		script string
		want   string
	}{
		{"answers in order", 0, RateLimit{}, `
offer 1
offer 2
offer 1
answer 1
answer 1
answer 2
offer 5`, `
offer 1: published
offer 2: published
offer 1: ignored
answer 1: true from 0
answer 1: false from 0
answer 2: true from 0
offer 5: published`},
		{"a retryable refusal holds what is above", 0, RateLimit{}, `
offer 1
offer 2 !overloaded
offer 3
pass 40
offer 4
offer 1
offer 2
offer 3
answer 1
answer 2
answer 3`, `
offer 1: published
offer 2 !overloaded: overloaded from 2
offer 3: overloaded from 2 after 100
offer 4: overloaded from 2 after 60
offer 1: ignored
offer 2: published
offer 3: published
answer 1: true from 0
answer 2: true from 0
answer 3: true from 0`},
		{"a failed send fails the later ones", 0, RateLimit{}, `
offer 1
offer 2
offer 3
answer 1 !outcome_unknown
answer 2 !outcome_unknown
answer 3 !outcome_unknown
offer 3
offer 1
offer 2
offer 3`, `
offer 1: published
offer 2: published
offer 3: published
answer 1 !outcome_unknown: true from 1
answer 2 !outcome_unknown: true from 1
answer 3 !outcome_unknown: true from 1
offer 3: outcome_unknown from 1 after 100
offer 1: published
offer 2: published
offer 3: published`},
		{"the lowest is sent again first", 0, RateLimit{}, `
offer 5 !overloaded
offer 3 !store_full
offer 4
offer 3
offer 4
offer 5`, `
offer 5 !overloaded: overloaded from 5
offer 3 !store_full: store_full from 3
offer 4: store_full from 3 after 100
offer 3: published
offer 4: published
offer 5: published`},
		{"a final refusal ends the number", 0, RateLimit{}, `
offer 1 !overloaded
offer 1 .mailbox_full
offer 2
offer 3 !overloaded
ended 3
offer 4`, `
offer 1 !overloaded: overloaded from 1
offer 1 .mailbox_full: mailbox_full from 0
offer 2: published
offer 3 !overloaded: overloaded from 3
offer 4: published`},
		{"the span is 64", 1, RateLimit{}, `
offer 1048577
offer 1048640
offer 1048641
offer 1048576
offer 1048575
answer 1048577
offer 1048641
answer 1048640
answer 1048641
offer 1048575
offer 1048577`, `
offer 1048577: published
offer 1048640: published
offer 1048641: window_exceeded from 0 after 0
offer 1048576: bad_request from 0 after 0
offer 1048575: window_exceeded from 0 after 0
answer 1048577: true from 0
offer 1048641: published
answer 1048640: true from 0
answer 1048641: true from 0
offer 1048575: published
offer 1048577: published`},
		{"a held number keeps the span", 0, RateLimit{}, `
offer 100 !overloaded
offer 36
offer 37`, `
offer 100 !overloaded: overloaded from 100
offer 36: window_exceeded from 0 after 0
offer 37: published`},
		{"numbers that are none", 1, RateLimit{}, `
offer 0
offer 1048576
offer 2097153
offer 281474976710657
offer 1`, `
offer 0: bad_request from 0 after 0
offer 1048576: bad_request from 0 after 0
offer 2097153: bad_request from 0 after 0
offer 281474976710657: bad_request from 0 after 0
offer 1: published`},
		{"the last number of a block", 0, RateLimit{}, `
offer 1048574
offer 1048575
answer 1048574`, `
offer 1048574: published
offer 1048575: block used
answer 1048574: true from 0`},
		{"the last number of an older block is one like any other", 1, RateLimit{}, `
offer 1048575`, `
offer 1048575: published`},
		{"rate", 0, RateLimit{PerSecond: 10, Burst: 2}, `
offer 1
offer 2
offer 3
offer 4
pass 100
offer 3
offer 4
pass 1000
offer 4
offer 5
offer 6`, `
offer 1: published
offer 2: published
offer 3: rate_limited from 3 after 100
offer 4: rate_limited from 3 after 200
offer 3: published
offer 4: rate_limited from 4 after 100
offer 4: published
offer 5: published
offer 6: rate_limited from 6 after 100`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var u Uplink
			u.Start(tt.block)
			if got := uplinkScript(t, &u, tt.limit, tt.script); got != strings.TrimSpace(tt.want) {
				t.Errorf("got\n%s", got)
			}
		})
	}
}

func TestUplinkFlood(t *testing.T) {
	limit := RateLimit{PerSecond: 20, Burst: 100}
	var u Uplink
	u.Start(0)
	offer := func(seq uint64, now int64) Verdict {
		v, _, _ := u.Offer(seq, now, &limit)
		if v == Publish {
			u.Handed(seq)
			u.Answer(seq, protocol.Refusal{}, now)
		}
		return v
	}
	// At ten times the rate for a minute: refused, but not closed.
	seq := uint64(1)
	for now := int64(0); now < 60_000; now += 5 {
		switch offer(seq, now) {
		case Publish:
			seq++
		case Flood:
			t.Fatalf("closed after %d ms at ten times the rate", now)
		}
	}
	// At twenty times the rate.
	for now := int64(60_000); ; now += 2 {
		if v := offer(seq, now); v == Flood {
			break
		} else if v == Publish {
			seq++
		}
		if now > 72_000 {
			t.Fatal("not closed at twenty-five times the rate")
		}
	}
}

// TestUplinkRate: over a long time the rate is what was set, whatever the pattern.
func TestUplinkRate(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, limit := range []RateLimit{{PerSecond: 20, Burst: 100}, {PerSecond: 0.5, Burst: 1}, {PerSecond: 3000, Burst: 7}} {
		var bucket tokenBucket
		taken, now := 0, int64(0)
		for now < 100_000 {
			now += r.Int64N(50)
			for range r.IntN(200) {
				if wait := bucket.take(now, &limit); wait == 0 {
					taken++
				} else if limit.PerSecond < 1000 && bucket.take(now+wait-1, &limit) == 0 {
					t.Fatalf("%+v: said %d ms, but there was one before", limit, wait)
				}
			}
		}
		if most := int(limit.PerSecond*float64(now)/1000) + limit.Burst + 1; taken > most || limit.PerSecond == 20 && taken < most*9/10 {
			t.Errorf("%+v: %d taken, want about %d", limit, taken, most)
		}
	}
}

// TestUplinkIdle: an Uplink that says Idle behaves after Resume as if it had been kept.
func TestUplinkIdle(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	limit := RateLimit{PerSecond: 10, Burst: 3}
	for range 200 {
		var kept, fresh Uplink
		kept.Start(1)
		fresh.Start(1)
		now := int64(0)
		resumed := 0
		for range 300 {
			now += r.Int64N(2000)
			if fresh.Idle(now) {
				top := fresh.Top()
				fresh = Uplink{}
				fresh.Resume(1, top)
				resumed++
			}
			seq := protocol.FirstSeq(1) - 3 + r.Uint64N(20)
			answer := protocol.Refusal{}
			if r.IntN(4) == 0 {
				answer = protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: 10}
			}
			if kept.Resend(seq) != fresh.Resend(seq) {
				t.Fatalf("resend of %d: %+v and %+v", seq, kept, fresh)
			}
			v1, r1, f1 := kept.Offer(seq, now, &limit)
			v2, r2, f2 := fresh.Offer(seq, now, &limit)
			if v1 != v2 || r1 != r2 || f1 != f2 {
				t.Fatalf("offer %d: %v %v %d and %v %v %d", seq, v1, r1, f1, v2, r2, f2)
			}
			if v1 == Publish {
				kept.Handed(seq)
				fresh.Handed(seq)
			}
			if r.IntN(3) > 0 {
				kept.Answer(seq, answer, now)
				fresh.Answer(seq, answer, now)
			}
		}
		if resumed == 0 {
			t.Fatal("never idle")
		}
	}
}

// TestUplinkSpan: whatever comes, open numbers lie within 64 and Open counts them.
func TestUplinkSpan(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	var u Uplink
	u.Start(0)
	open := map[uint64]bool{}
	for range 200_000 {
		seq := 1 + r.Uint64N(300)
		if r.IntN(2) == 0 {
			v, _, _ := u.Offer(seq, 0, &RateLimit{})
			if (v == Ignore) != (open[seq]) {
				t.Fatalf("%d is open: %v, verdict %d", seq, open[seq], v)
			}
			if v == Publish {
				u.Handed(seq)
				open[seq] = true
			}
		} else if _, ok := u.Answer(seq, protocol.Refusal{}, 0); ok != open[seq] {
			t.Fatalf("answer to %d: %v", seq, ok)
		} else {
			delete(open, seq)
		}
		low, high := uint64(1<<60), uint64(0)
		for n := range open {
			low, high = min(low, n), max(high, n)
		}
		if len(open) > 0 && high-low >= protocol.MaxOpenSpan || u.Open() != len(open) {
			t.Fatalf("%d open from %d to %d, Open says %d", len(open), low, high, u.Open())
		}
	}
}

func TestUplinkAllocations(t *testing.T) {
	var u Uplink
	u.Start(0)
	limit := RateLimit{PerSecond: 1e6, Burst: 10}
	seq := uint64(0)
	if n := testing.AllocsPerRun(1000, func() {
		seq++
		if v, _, _ := u.Offer(seq, int64(seq), &limit); v != Publish {
			t.Fatal(v)
		}
		u.Handed(seq)
		u.Answer(seq, protocol.Refusal{}, int64(seq))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestFullReceivers: a refusal stands for its receiver until a number shows that it was read, and what is remembered is bounded.
func TestFullReceivers(t *testing.T) {
	var f FullReceivers
	bob, carol := []byte("bob"), []byte("carol")
	if f.Refuses(bob, 1) || !f.Empty() {
		t.Fatal("refuses at first")
	}
	f.Refused(bob, 10)
	for seq, want := range map[uint64]bool{9: true, 11: true, 73: true, 74: false} {
		if f.Refuses(bob, seq) != want || f.Refuses(carol, seq) {
			t.Errorf("%d: refused to bob %v, to carol %v", seq, f.Refuses(bob, seq), f.Refuses(carol, seq))
		}
	}
	f.Refused(bob, 73)
	if !f.Refuses(bob, 136) || f.Refuses(bob, 137) {
		t.Error("a refusal does not extend the one before")
	}
	for seq := uint64(200); seq < 1000; seq++ {
		f.Refused(fmt.Appendf(nil, "u%d", seq), seq)
		if len(f.list) > protocol.MaxOpenSpan {
			t.Fatalf("%d receivers are remembered", len(f.list))
		}
	}
}
