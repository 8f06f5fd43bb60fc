package checker

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// run is a small chat: alice on a phone sends to bob, who has two devices; carol is somebody else.
type run struct {
	*Checker
	alice, phone, laptop, carol ClientID
	stream                      StreamID
}

func newRun(config Config) *run {
	c := New(config)
	r := &run{Checker: c}
	r.alice = c.Client("alice", "phone")
	r.phone, r.laptop = c.Client("bob", "phone"), c.Client("bob", "laptop")
	r.carol = c.Client("carol", "phone")
	r.stream = c.Stream(r.alice, 1)
	return r
}

func idOf(n uint64) (id [16]byte) {
	binary.BigEndian.PutUint64(id[:], mix(n))
	binary.BigEndian.PutUint64(id[8:], n)
	return id
}

// positionOf leaves room between neighbours.
func positionOf(seq uint64) uint64 { return 1000 + 10*seq }

func (r *run) send(seq uint64) { r.Sent(r.stream, seq, "bob") }

func (r *run) answer(seq uint64) { r.Answered(r.stream, seq, idOf(seq), positionOf(seq)) }

func (r *run) show(on ClientID, seq uint64) {
	r.Shown(on, idOf(seq), positionOf(seq), "alice", Content(r.stream, seq, 40))
	if r.config.Acknowledgements {
		r.Acknowledged(on, idOf(seq))
	}
}

func (r *run) receipt(seq uint64) { r.Receipt(r.alice, idOf(seq), positionOf(seq)) }

// deliver is the whole life of a message, with a receipt if the run is about receipts.
func (r *run) deliver(seqs ...uint64) {
	for _, seq := range seqs {
		r.send(seq)
		r.answer(seq)
		r.show(r.phone, seq)
		r.show(r.laptop, seq)
		if r.config.Receipts {
			r.receipt(seq)
		}
	}
}

// wantOnly checks that exactly these violations were found, each with an example of its own, and that a
// verdict can be had again.
func wantOnly(t *testing.T, c *Checker, want map[Kind]uint64) {
	t.Helper()
	v := c.Verdict()
	for k := range Kind(kinds) {
		if v.Count(k) != want[k] {
			t.Errorf("%d %s, want %d\n%s", v.Count(k), k, want[k], v)
		}
		kept := 0
		for _, violation := range v.Violations {
			if violation.Kind == k {
				kept++
			}
		}
		if k != Unjudged && kept != min(int(want[k]), c.config.Examples) {
			t.Errorf("%d examples of %d %s", kept, want[k], k)
		}
	}
	if ok := len(want) == 0; v.OK() != ok || strings.HasPrefix(v.String(), "OK: ") != ok {
		t.Errorf("OK() = %v, want %v\n%s", v.OK(), ok, v)
	}
	if again := c.Verdict().String(); again != v.String() {
		t.Errorf("a second verdict differs:\n%s\n%s", v, again)
	}
}

// TestFaults tells, one by one, histories in which one thing goes wrong, between messages that are in order.
func TestFaults(t *testing.T) {
	all := Config{Acknowledgements: true, Receipts: true}
	for _, fault := range []struct {
		name    string
		config  Config
		history func(r *run)
		want    map[Kind]uint64
		text    string // in the verdict
	}{
		{"nothing", all, func(r *run) {}, nil, "OK: 4 messages"},
		{"loses a message", Config{}, func(r *run) { r.send(3); r.answer(3) },
			map[Kind]uint64{Lost: 2}, "lost: " + idText(idOf(3)) + " 3 of alice/phone#0 to bob at 1030 on bob/laptop: answered, not shown"},
		{"loses it on one device", all, func(r *run) { r.send(3); r.answer(3); r.show(r.phone, 3); r.receipt(3) },
			map[Kind]uint64{Lost: 1}, "on bob/laptop"},
		{"loses it before anybody saw its position", Config{}, func(r *run) { r.send(3); r.Answered(r.stream, 3, idOf(3), 0) },
			map[Kind]uint64{Lost: 2}, " to bob on bob/phone"},
		{"doubles", all, func(r *run) { r.deliver(3); r.show(r.phone, 3) },
			map[Kind]uint64{Doubled: 1}, "doubled: " + idText(idOf(3))},
		{"doubles an unanswered one", Config{}, func(r *run) { r.send(3); r.show(r.phone, 3); r.show(r.phone, 3) },
			map[Kind]uint64{Doubled: 1}, "on bob/phone: shown again"},
		{"makes a resend a second message", Config{}, func(r *run) {
			r.deliver(3)
			r.send(3)
			r.Answered(r.stream, 3, idOf(99), positionOf(3)+1)
			r.Shown(r.phone, idOf(99), positionOf(3)+1, "alice", Content(r.stream, 3, 40))
		}, map[Kind]uint64{ChangedID: 2, ChangedPosition: 2, Doubled: 1}, "now under " + idText(idOf(99))},
		{"answers a resend with another id", all, func(r *run) { r.deliver(3); r.send(3); r.Answered(r.stream, 3, idOf(99), 0) },
			map[Kind]uint64{ChangedID: 1}, "changed id: " + idText(idOf(3))},
		{"shows another id than it answered", Config{}, func(r *run) {
			r.send(3)
			r.answer(3)
			r.Shown(r.phone, idOf(99), positionOf(3), "alice", Content(r.stream, 3, 40))
			r.show(r.laptop, 3)
		}, map[Kind]uint64{ChangedID: 1}, "on bob/phone: now under"},
		{"answers two messages with one id", Config{}, func(r *run) {
			r.send(3)
			r.Answered(r.stream, 3, idOf(2), positionOf(3))
			r.Shown(r.phone, idOf(2), positionOf(3), "alice", Content(r.stream, 3, 40))
			r.Shown(r.laptop, idOf(2), positionOf(3), "alice", Content(r.stream, 3, 40))
		}, map[Kind]uint64{SharedID: 1}, "also the id of"},
		{"swaps two messages", Config{}, func(r *run) {
			for seq, position := range map[uint64]uint64{3: 1032, 4: 1031} {
				r.send(seq)
				r.Answered(r.stream, seq, idOf(seq), position)
				r.Shown(r.phone, idOf(seq), position, "alice", Content(r.stream, seq, 40))
				r.Shown(r.laptop, idOf(seq), position, "alice", Content(r.stream, seq, 40))
			}
		}, map[Kind]uint64{Disordered: 1}, "out of order: "},
		{"swaps two unanswered messages, seen apart", Config{}, func(r *run) {
			r.send(3)
			r.send(4)
			r.Shown(r.phone, idOf(3), 1032, "alice", Content(r.stream, 3, 40))
			r.Shown(r.laptop, idOf(4), 1031, "alice", Content(r.stream, 4, 40))
		}, map[Kind]uint64{Disordered: 1}, "before "},
		{"shows one message at two positions", Config{}, func(r *run) {
			r.send(3)
			r.answer(3)
			r.show(r.phone, 3)
			r.Shown(r.laptop, idOf(3), positionOf(3)+1, "alice", Content(r.stream, 3, 40))
		}, map[Kind]uint64{ChangedPosition: 1}, "on bob/laptop: now at position 1031"},
		{"answers another position than it shows", Config{}, func(r *run) {
			r.send(3)
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
			r.Answered(r.stream, 3, idOf(3), positionOf(3)-1)
		}, map[Kind]uint64{ChangedPosition: 1}, "now at position 1029"},
		{"shows a message without position", Config{}, func(r *run) {
			r.send(3)
			r.Shown(r.phone, idOf(3), 0, "alice", Content(r.stream, 3, 40))
		}, map[Kind]uint64{ChangedPosition: 1}, "now at position 0"},
		{"repeats a position", Config{}, func(r *run) {
			r.send(3)
			r.Answered(r.stream, 3, idOf(3), positionOf(2))
			r.Shown(r.phone, idOf(3), positionOf(2), "alice", Content(r.stream, 3, 40))
			r.Shown(r.laptop, idOf(3), positionOf(2), "alice", Content(r.stream, 3, 40))
		}, map[Kind]uint64{SharedPosition: 1}, "also the position of " + idText(idOf(2))},
		{"repeats a position for the other side", Config{}, func(r *run) {
			back := r.Stream(r.phone, 1)
			r.Sent(back, 1, "alice")
			r.Answered(back, 1, idOf(50), positionOf(2))
			r.Shown(r.alice, idOf(50), positionOf(2), "bob", Content(back, 1, 0))
		}, map[Kind]uint64{SharedPosition: 1}, "of bob/phone#1 to alice"},
		{"misdelivers", Config{}, func(r *run) { r.deliver(3); r.show(r.carol, 3) },
			map[Kind]uint64{Misdelivered: 1}, "misdelivered: " + idText(idOf(3)) + " 3 of alice/phone#0 to bob at 1030 on carol/phone"},
		{"shows the sender its own message", Config{}, func(r *run) { r.deliver(3); r.show(r.alice, 3) },
			map[Kind]uint64{Misdelivered: 1}, "on alice/phone"},
		{"delivers to the wrong one instead", Config{}, func(r *run) { r.send(3); r.answer(3); r.show(r.carol, 3) },
			map[Kind]uint64{Misdelivered: 1, Lost: 2}, "on carol/phone"},
		{"forges a message", Config{}, func(r *run) { r.show(r.phone, 7) },
			map[Kind]uint64{Forged: 1}, "shown, but never sent"},
		{"forges a text", Config{}, func(r *run) { r.Shown(r.phone, idOf(7), 1070, "alice", "buy\x00this") },
			map[Kind]uint64{Forged: 1}, `a text that nobody sent: "buy\x00this"`},
		{"forges a stream", Config{}, func(r *run) { r.Shown(r.phone, idOf(7), 1070, "alice", Content(77, 1, 0)) },
			map[Kind]uint64{Forged: 1}, `a text that nobody sent: "77:1:0:"`},
		{"mixes two texts", Config{}, func(r *run) {
			r.send(3)
			mixed := Content(r.stream, 3, 40)[:30] + Content(r.stream, 2, 40)[30:]
			r.Shown(r.phone, idOf(3), positionOf(3), "alice", mixed)
		}, map[Kind]uint64{Forged: 1}, "a text that nobody sent"},
		{"cuts a text", Config{}, func(r *run) {
			r.send(3)
			r.Shown(r.phone, idOf(3), positionOf(3), "alice", Content(r.stream, 3, 40)[:39])
		}, map[Kind]uint64{Forged: 1}, "a text that nobody sent"},
		{"names the wrong sender", Config{}, func(r *run) {
			r.send(3)
			r.Shown(r.phone, idOf(3), positionOf(3), "carol", Content(r.stream, 3, 40))
		}, map[Kind]uint64{Forged: 1}, `shown as sent by "carol"`},
		{"answers what was not sent", Config{}, func(r *run) { r.answer(7) },
			map[Kind]uint64{Forged: 1}, "answered, but never sent"},
		{"refuses what was not sent", Config{}, func(r *run) { r.Refused(r.stream, 7, "overloaded", false) },
			map[Kind]uint64{Forged: 1}, "refused, but never sent"},
		{"answers after a final refusal", Config{}, func(r *run) {
			r.send(3)
			r.Refused(r.stream, 3, "bad_receiver", true)
			r.answer(3)
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
		}, map[Kind]uint64{Contradicted: 1}, "answered after it was refused for good"},
		{"shows after a final refusal", Config{}, func(r *run) {
			r.send(3)
			r.Refused(r.stream, 3, "mailbox_full", true)
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
		}, map[Kind]uint64{Contradicted: 1}, "shown after it was refused for good"},
		{"refuses for good what it has answered", Config{}, func(r *run) { r.deliver(3); r.Refused(r.stream, 3, "mailbox_full", true) },
			map[Kind]uint64{Contradicted: 1}, "refused for good (mailbox_full) after it was accepted"},
		{"refuses for good what it has answered, twice", Config{}, func(r *run) {
			r.deliver(3)
			r.Refused(r.stream, 3, "mailbox_full", true)
			r.Refused(r.stream, 3, "mailbox_full", true)
		}, map[Kind]uint64{Contradicted: 1}, "after it was accepted"},
		{"sends a receipt before the message", Config{}, func(r *run) {
			r.send(3)
			r.answer(3)
			r.receipt(3)
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
		}, map[Kind]uint64{ReceiptEarly: 1}, "named by a receipt"},
		{"sends a receipt before the acknowledgement", all, func(r *run) {
			r.send(3)
			r.answer(3)
			for _, on := range []ClientID{r.phone, r.laptop} {
				r.Shown(on, idOf(3), positionOf(3), "alice", Content(r.stream, 3, 40))
			}
			r.receipt(3)
			r.Acknowledged(r.phone, idOf(3))
		}, map[Kind]uint64{ReceiptEarly: 1}, "named by a receipt"},
		{"sends a receipt past a message on its way", all, func(r *run) {
			r.send(3)
			r.send(4)
			r.answer(3)
			r.answer(4)
			r.show(r.phone, 4)
			r.show(r.laptop, 4)
			r.receipt(4)
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
		}, map[Kind]uint64{ReceiptEarly: 1}, "covered by a receipt before any device had it"},
		{"sends a receipt past a lost message", all, func(r *run) { r.send(3); r.answer(3); r.deliver(4) },
			map[Kind]uint64{ReceiptEarly: 1, Lost: 2}, "covered by a receipt, but no device has it"},
		{"sends no receipt", all, func(r *run) {
			const last = 1 << 21
			r.send(last)
			r.answer(last)
			r.show(r.phone, last)
			r.show(r.laptop, last)
		}, map[Kind]uint64{ReceiptMissing: 1}, "its sender was not told"},
		{"sends a receipt to somebody else", all, func(r *run) { r.deliver(3); r.Receipt(r.carol, idOf(3), positionOf(3)) },
			map[Kind]uint64{Misdelivered: 1}, "on carol/phone: its receipt"},
		{"sends a receipt for nothing", all, func(r *run) { r.Receipt(r.alice, idOf(77), 1070) },
			map[Kind]uint64{Forged: 1}, "a receipt for a message that was neither answered nor shown"},
		{"sends a receipt with a wrong position", all, func(r *run) { r.Receipt(r.alice, idOf(1), positionOf(1)+1) },
			map[Kind]uint64{ChangedPosition: 1}, "on alice/phone: now at position 1011"},
		{"is told nonsense: another receiver", Config{}, func(r *run) { r.Sent(r.stream, 1, "carol") },
			map[Kind]uint64{Misused: 1}, "sent again to carol"},
		{"is told nonsense: an acknowledgement of nothing", all, func(r *run) { r.Acknowledged(r.phone, idOf(77)) },
			map[Kind]uint64{Misused: 1}, "acknowledged, but never shown"},
		{"is told nonsense: an acknowledgement before showing", all, func(r *run) {
			r.send(3)
			r.Answered(r.stream, 3, idOf(3), 0)
			r.Acknowledged(r.phone, idOf(3))
			r.show(r.phone, 3)
			r.show(r.laptop, 3)
			r.receipt(3)
		},
			map[Kind]uint64{Misused: 1}, "acknowledged, but not shown"},
		{"is given too many", Config{MaxMessages: 4}, func(r *run) { r.deliver(3) },
			map[Kind]uint64{Unjudged: 1}, "1 unjudged"},
	} {
		t.Run(fault.name, func(t *testing.T) {
			r := newRun(fault.config)
			r.deliver(1, 2)
			fault.history(r)
			r.deliver(8, 1<<20|1) // the second on another connection
			wantOnly(t, r.Checker, fault.want)
			if got := r.Verdict().String(); !strings.Contains(got, fault.text) {
				t.Errorf("the verdict does not say %q:\n%s", fault.text, got)
			}
		})
	}
}

// TestHonest tells histories that look odd and are right.
func TestHonest(t *testing.T) {
	for _, honest := range []struct {
		name    string
		config  Config
		history func(r *run)
	}{
		{"nothing at all", Config{}, func(r *run) {}},
		{"a resend answered alike, without position", Config{}, func(r *run) { r.deliver(1); r.send(1); r.Answered(r.stream, 1, idOf(1), 0) }},
		{"an open message that nobody saw", Config{}, func(r *run) { r.send(1) }},
		{"an open message that one device saw", Config{}, func(r *run) { r.send(1); r.show(r.phone, 1) }},
		{"shown before it is answered", Config{}, func(r *run) { r.send(1); r.show(r.phone, 1); r.show(r.laptop, 1); r.answer(1) }},
		{"refused, sent again, answered", Config{}, func(r *run) {
			r.send(1)
			r.Refused(r.stream, 1, "rate_limited", false)
			r.deliver(1)
		}},
		{"refused for good, twice", Config{}, func(r *run) {
			r.send(1)
			r.Refused(r.stream, 1, "bad_receiver", true)
			r.send(1)
			r.Refused(r.stream, 1, "bad_receiver", true)
			r.deliver(2)
		}},
		{"messages arrive in the wrong order", Config{}, func(r *run) {
			for seq := range uint64(9) {
				r.send(seq + 1)
				r.answer(seq + 1)
			}
			for seq := uint64(9); seq > 0; seq-- {
				r.show(r.phone, seq)
				r.show(r.laptop, seq)
			}
		}},
		{"two conversations share positions", Config{}, func(r *run) {
			r.deliver(1)
			r.Sent(r.stream, 2, "carol")
			r.Answered(r.stream, 2, idOf(2), positionOf(1))
			r.Shown(r.carol, idOf(2), positionOf(1), "alice", Content(r.stream, 2, 0))
		}},
		{"two streams of a device are not ordered", Config{}, func(r *run) {
			r.deliver(5)
			clone := r.Stream(r.alice, 2)
			r.Sent(clone, 9, "bob")
			r.Answered(clone, 9, idOf(9), 3)
			r.Shown(r.phone, idOf(9), 3, "alice", Content(clone, 9, 0))
			r.Shown(r.laptop, idOf(9), 3, "alice", Content(clone, 9, 0))
		}},
		{"a message to oneself", Config{Receipts: true}, func(r *run) {
			r.Sent(r.stream, 1, "alice")
			r.Shown(r.alice, idOf(1), 5, "alice", Content(r.stream, 1, 0))
			r.Answered(r.stream, 1, idOf(1), 5)
			r.Receipt(r.alice, idOf(1), 5)
		}},
		{"one receipt for many, older ones again", Config{Receipts: true, Acknowledgements: true}, func(r *run) {
			for seq := range uint64(5) {
				r.send(seq + 1)
				r.answer(seq + 1)
				r.show(r.phone, seq+1)
				r.show(r.laptop, seq+1)
			}
			r.receipt(5)
			r.receipt(2)
			r.receipt(5)
		}},
		{"an older receipt comes last", Config{Receipts: true}, func(r *run) {
			for seq := range uint64(5) {
				r.send(seq + 1)
				r.answer(seq + 1)
				r.show(r.phone, seq+1)
				r.show(r.laptop, seq+1)
			}
			r.receipt(5)
			r.receipt(2)
		}},
		{"a receipt at the first device", Config{Acknowledgements: true}, func(r *run) {
			r.send(1)
			r.answer(1)
			r.show(r.laptop, 1)
			r.receipt(1)
			r.show(r.phone, 1)
		}},
		{"a device that came later need not show it", Config{}, func(r *run) {
			r.deliver(1)
			r.send(2)
			tablet := r.Client("bob", "tablet")
			r.answer(2)
			r.show(r.phone, 2)
			r.show(r.laptop, 2)
			r.show(tablet, 2) // it was accepted after the tablet came
		}},
		{"names of devices and streams again", Config{}, func(r *run) {
			if r.Client("bob", "phone") != r.phone || r.Stream(r.alice, 1) != r.stream || r.Stream(r.alice, 2) == r.stream {
				r.misuse(r.phone, idOf(0), "another id")
			}
		}},
	} {
		t.Run(honest.name, func(t *testing.T) {
			r := newRun(honest.config)
			honest.history(r)
			wantOnly(t, r.Checker, nil)
		})
	}
}

// TestFirstDevice: what was sent before the receiver had any device waits for the first.
func TestFirstDevice(t *testing.T) {
	r := newRun(Config{})
	send := func(seq uint64) {
		r.Sent(r.stream, seq, "dave")
		r.answer(seq)
	}
	send(1)
	send(2)
	if v := r.Verdict(); !v.OK() || v.Waiting != 2 || v.Due != 0 || r.Outstanding() != 0 {
		t.Fatalf("before dave comes, outstanding %d: %s", r.Outstanding(), v)
	}
	phone := r.Client("dave", "phone")
	laptop := r.Client("dave", "laptop")
	if got := r.Outstanding(); got != 2 {
		t.Fatalf("outstanding %d, want 2", got)
	}
	send(3)
	if got := r.Outstanding(); got != 4 {
		t.Fatalf("outstanding %d, want 4", got)
	}
	wantOnly(t, r.Checker, map[Kind]uint64{Lost: 4})
	r.show(phone, 1)
	r.show(phone, 2)
	r.show(phone, 3)
	r.show(laptop, 3)
	if got := r.Outstanding(); got != 0 {
		t.Fatalf("outstanding %d, want 0", got)
	}
	wantOnly(t, r.Checker, nil)
}

// TestHashesCollide: conversations whose hashes have equal bits are judged in one run, and yet each by itself.
func TestHashesCollide(t *testing.T) {
	r := newRun(Config{})
	for n, to := range []string{"bob", "carol", "bob", "carol"} {
		seq := uint64(n) + 1
		r.Sent(r.stream, seq, to)
		r.Answered(r.stream, seq, idOf(seq), []uint64{20, 10, 30, 20}[n])
	}
	found := r.found.clone()
	run := []uint64{0, 1, 2, 3} // of equal bits; the lower ones number the messages
	r.judgePositions(&found, slices.Clone(run))
	r.judgeStreams(&found, slices.Clone(run))
	if found.counts != [kinds]uint64{} {
		t.Errorf("two conversations are taken for one: %v", found.all())
	}
}

func TestNinthDevicePanics(t *testing.T) {
	c := New(Config{})
	for n := range maxDevices {
		c.Client("bob", fmt.Sprint(n))
	}
	defer func() {
		if recover() == nil {
			t.Error("a ninth device was taken")
		}
	}()
	c.Client("bob", "ninth")
}

func TestVerdictCounts(t *testing.T) {
	r := newRun(Config{})
	r.deliver(1, 2)
	r.send(2)
	r.answer(2)
	r.send(3)
	r.Refused(r.stream, 3, "bad_receiver", true)
	r.send(4)
	r.Refused(r.stream, 4, "overloaded", false)
	r.Refused(r.stream, 4, "overloaded", false)
	r.Sent(r.stream, 5, "nobody")
	r.answer(5)
	v := r.Verdict()
	want := "OK: 5 messages, 1 resends: 3 answered, 1 refused, 1 open, 1 waiting; shown 4 times, 4 due, " +
		"0 lost, 0 doubled, 0 out of order, 0 misdelivered; refusals: 1 bad_receiver, 2 overloaded"
	if got := v.String(); got != want {
		t.Errorf("verdict\n%s, want\n%s", got, want)
	}
}

func TestRefusalCodesAreBounded(t *testing.T) {
	r := newRun(Config{})
	r.send(1)
	for n := range 10 * maxCodes {
		r.Refused(r.stream, 1, fmt.Sprint("code", n), false)
	}
	codes := r.Verdict().RefusedByCode
	if len(codes) != maxCodes+1 || codes["other"] != 9*maxCodes {
		t.Errorf("%d codes, %d of them other", len(codes), codes["other"])
	}
}

// TestExamples: however many violations there are and in whatever order they come, the same few are kept.
func TestExamples(t *testing.T) {
	order := rand.New(rand.NewPCG(1, 1)).Perm(1000)
	r := newRun(Config{Examples: 3})
	for _, n := range order {
		r.show(r.phone, uint64(n)+1)
	}
	v := r.Verdict()
	var seqs []uint64
	for _, violation := range v.Violations {
		seqs = append(seqs, violation.Seq)
	}
	if v.Count(Forged) != 1000 || !slices.Equal(seqs, []uint64{1, 2, 3}) {
		t.Errorf("%d forged, examples %v", v.Count(Forged), seqs)
	}
	// A verdict adds to a copy of what was found.
	wantOnly(t, r.Checker, map[Kind]uint64{Forged: 1000})
}

// server is the least that keeps the promise, for random runs: it remembers ids by stream and number.
type server struct {
	rng       *rand.Rand
	positions map[string]uint64
	accepted  map[string]*delivery
	mailbox   []*delivery
}

type delivery struct {
	id       [16]byte
	position uint64
	sender   string
	content  string
	to       []ClientID
}

// TestRandomRuns plays honest runs with resends, lost answers, refusals and late deliveries, and then
// the same runs with one fault, which must be found.
func TestRandomRuns(t *testing.T) {
	faults := []struct {
		name string
		kind Kind
		make func(c *Checker, d, other *delivery) // harms d; other is one of the same conversation
	}{
		{"lose", Lost, func(c *Checker, d, other *delivery) { d.to = d.to[1:] }},
		{"double", Doubled, func(c *Checker, d, other *delivery) { d.to = append(d.to, d.to[0]) }},
		{"swap", Disordered, func(c *Checker, d, other *delivery) { d.position, other.position = other.position, d.position }},
		{"misdeliver", Misdelivered, func(c *Checker, d, other *delivery) { d.to = append(d.to, c.Client("eve", "phone")) }},
		{"forge", Forged, func(c *Checker, d, other *delivery) { d.content = strings.Replace(d.content, ":", ":9", 1) }},
		{"change an id", ChangedID, func(c *Checker, d, other *delivery) { d.id[3] ^= 1 }},
		{"repeat a position", SharedPosition, func(c *Checker, d, other *delivery) { d.position = other.position }},
	}
	for seed := range uint64(20) {
		if v := randomRun(seed, nil).Verdict(); !v.OK() {
			t.Fatalf("seed %d, honest: %s", seed, v)
		}
		for _, fault := range faults {
			if v := randomRun(seed, fault.make).Verdict(); v.Count(fault.kind) == 0 {
				t.Errorf("seed %d: %s is not found: %s", seed, fault.name, v)
			}
		}
	}
}

func randomRun(seed uint64, fault func(c *Checker, d, other *delivery)) *Checker {
	const users, numbers = 4, 60
	c := New(Config{})
	s := server{rng: rand.New(rand.NewPCG(seed, 3)), positions: map[string]uint64{}, accepted: map[string]*delivery{}}
	name := func(n int) string { return fmt.Sprint("user", n) }
	devices := map[string][]ClientID{}
	var streams []StreamID
	for n := range users {
		for d := range 1 + n%2 {
			client := c.Client(name(n), fmt.Sprint("device", d))
			devices[name(n)] = append(devices[name(n)], client)
			streams = append(streams, c.Stream(client, seed))
		}
	}
	senderOf := func(from StreamID) string { return c.users[c.clients[c.streams[from].client].user].name }

	type send struct {
		from StreamID
		seq  uint64
		to   string
	}
	var answeredNow []*delivery
	accept := func(m send) *delivery {
		key := fmt.Sprint(m.from, m.seq)
		if d := s.accepted[key]; d != nil {
			return d
		}
		a, b := senderOf(m.from), m.to
		conversation := min(a, b) + " " + max(a, b)
		s.positions[conversation] += 1 + s.rng.Uint64N(3)
		d := &delivery{idOf(uint64(m.from)<<40 | m.seq), s.positions[conversation], a, Content(m.from, m.seq, s.rng.IntN(80)), slices.Clone(devices[m.to])}
		s.accepted[key] = d
		s.mailbox = append(s.mailbox, d)
		return d
	}
	for seq := uint64(1); seq <= numbers; seq++ {
		for _, from := range streams {
			m := send{from, seq/20<<20 + seq, name(s.rng.IntN(users))} // 20 numbers a connection
			for attempt := 0; ; attempt++ {
				c.Sent(m.from, m.seq, m.to)
				switch outcome := s.rng.IntN(8); {
				case outcome == 0 && attempt < 3: // lost on its way
					continue
				case outcome == 1 && attempt < 3: // its answer is lost
					accept(m)
					continue
				case outcome == 2 && s.accepted[fmt.Sprint(m.from, m.seq)] == nil:
					c.Refused(m.from, m.seq, "rate_limited", false)
					continue
				}
				d := accept(m)
				position := d.position
				if attempt > 0 {
					position = 0
				}
				if fault == nil || s.rng.IntN(2) == 0 {
					c.Answered(m.from, m.seq, d.id, position)
				} else {
					// Without the answer's position a fault in what is shown stands alone.
					c.Answered(m.from, m.seq, d.id, 0)
				}
				answeredNow = append(answeredNow, d)
				break
			}
		}
	}
	if fault != nil {
		harm(c, s, answeredNow, fault)
	}
	s.rng.Shuffle(len(s.mailbox), func(i, j int) { s.mailbox[i], s.mailbox[j] = s.mailbox[j], s.mailbox[i] })
	for _, d := range s.mailbox {
		for _, on := range d.to {
			c.Shown(on, d.id, d.position, d.sender, d.content)
		}
	}
	return c
}

// harm picks two messages of one stream to one receiver whose positions only devices will tell.
func harm(c *Checker, s server, sent []*delivery, fault func(c *Checker, d, other *delivery)) {
	for _, i := range s.rng.Perm(len(sent)) {
		d := sent[i]
		for _, other := range sent[:i] {
			a, b := c.known(d), c.known(other)
			if a.stream == b.stream && a.receiver == b.receiver && a.position == 0 && b.position == 0 {
				fault(c, d, other)
				return
			}
		}
	}
	panic("no two messages to harm")
}

func (c *Checker) known(d *delivery) *message {
	n, ok := c.lookupID(d.id)
	if !ok {
		panic("an answered message has no id")
	}
	return c.messages.at(n)
}

// TestConcurrent: goroutines that report at the same time come to the verdict that one would.
func TestConcurrent(t *testing.T) {
	const workers, each = 8, 500
	c := New(Config{Acknowledgements: true, Receipts: true})
	bob := c.Client("bob", "phone")
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			name := fmt.Sprint("sender", w)
			client := c.Client(name, "phone")
			stream := c.Stream(client, 1)
			for seq := uint64(1); seq <= each; seq++ {
				id := idOf(uint64(w)<<32 | seq)
				c.Sent(stream, seq, "bob")
				wg.Go(func() {
					c.Shown(bob, id, seq, name, Content(stream, seq, 40))
					c.Acknowledged(bob, id)
				})
				c.Answered(stream, seq, id, seq)
				if seq%100 == 0 {
					c.Outstanding()
					c.Verdict()
				}
			}
		})
	}
	wg.Wait()
	if got := c.Outstanding(); got != 0 {
		t.Errorf("outstanding %d, want 0", got)
	}
	if v := c.Verdict(); v.Count(ReceiptMissing) != workers*each || v.Shown != workers*each {
		t.Errorf("without any receipt: %s", v)
	}
	for w := range workers {
		c.Receipt(c.Client(fmt.Sprint("sender", w), "phone"), idOf(uint64(w)<<32|each), each)
	}
	wantOnly(t, c, nil)
}

func TestIDText(t *testing.T) {
	for want, id := range map[string][16]byte{
		"00000000000000000000000000": {},
		"00000000000000000000000001": {15: 1},
		"7ZZZZZZZZZZZZZZZZZZZZZZZZZ": {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255},
		"400000000000000000000000G0": {0: 0x80, 14: 2},
	} {
		if got := idText(id); got != want {
			t.Errorf("idText(%x) = %s, want %s", id, got, want)
		}
	}
}
