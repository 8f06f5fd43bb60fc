package embedded

import (
	"fmt"
	"strings"
	"testing"

	"millrace/backend"
	"millrace/protocol"
)

func testShard(records int, bytes int64) *shard {
	s := newShard(&Config{RingRecords: records, RingBytes: bytes})
	s.replay(0, 0)
	return s
}

func publish(s *shard, positions ...uint64) {
	var list []*backend.Record
	for _, p := range positions {
		list = append(list, &backend.Record{Message: protocol.Message{Position: p}})
	}
	s.publish(list)
}

// next is what Read would do: "log from-until" or "ring positions".
func next(s *shard, max int) string {
	from, until := s.pending()
	if from != until {
		s.passed(until, int(until-from)) // as if every position in between had a record
		return fmt.Sprintf("log %d-%d", from+1, until)
	}
	var positions []string
	for _, r := range s.take(nil, max) {
		positions = append(positions, fmt.Sprint(r.Position))
	}
	return strings.TrimSpace("ring " + strings.Join(positions, " "))
}

// TestRingOverflow follows what Read is told to do, step by step.
func TestRingOverflow(t *testing.T) {
	s := testShard(3, 1<<20)
	expect := func(max int, want string) {
		t.Helper()
		if got := next(s, max); got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
	}
	expect(9, "ring")
	publish(s, 1, 2)
	expect(1, "ring 1")
	publish(s, 3, 4)
	publish(s, 5) // no room: from here on the log
	publish(s, 6, 7)
	expect(2, "ring 2 3")
	publish(s, 8) // there is room again, but 5 comes first
	expect(9, "ring 4")
	expect(9, "log 5-8")
	publish(s, 9)
	expect(9, "ring 9")
	publish(s, 10, 11, 12, 13)
	expect(9, "ring 10 11 12")
	publish(s, 14)
	from, until := s.pending() // a read of the log is under way
	publish(s, 15, 16)         // and the ring is in use meanwhile
	s.passed(until, int(until-from))
	if from != 12 || until != 14 {
		t.Fatalf("the log from %d to %d", from, until)
	}
	expect(1, "ring 15")
	expect(9, "ring 16")
	if n := s.unreadNow.Load(); n != 0 {
		t.Fatalf("%d unread", n)
	}
}

func TestRingIsBoundedByBytes(t *testing.T) {
	one := recordMemory(&backend.Record{})
	s := testShard(1000, 2*one)
	publish(s, 1, 2, 3)
	if got := next(s, 9); got != "ring 1 2" {
		t.Fatal(got)
	}
	if s.ringBytes != 0 {
		t.Fatalf("an empty ring counts %d bytes", s.ringBytes)
	}
	if got := next(s, 9); got != "log 3-3" {
		t.Fatal(got)
	}
}

func TestRingMemoryIsReused(t *testing.T) {
	s := testShard(8, 1<<20)
	for p := uint64(1); p < 10_000; p++ {
		publish(s, p, p+100_000-p) // two in
		s.take(nil, 2)
	}
	publish(s, 200_000)
	for p := uint64(200_001); p < 210_000; p++ { // never empty
		publish(s, p)
		s.take(nil, 1)
	}
	if cap(s.ring) > 32 {
		t.Fatalf("a ring of at most 8 has grown to %d", cap(s.ring))
	}
}

func TestLag(t *testing.T) {
	s := testShard(2, 1<<20)
	at := func(ms int64) uint64 { return uint64(ms) << protocol.PositionShift }
	if s.oldestMs.Load() != noneUnread {
		t.Fatal("an empty shard has something unread")
	}
	publish(s, at(1000), at(2000), at(3000))
	if got := s.oldestMs.Load(); got != 1000 {
		t.Fatalf("the oldest is of %d", got)
	}
	s.take(nil, 1)
	if got := s.oldestMs.Load(); got != 2000 {
		t.Fatalf("the oldest is of %d", got)
	}
	s.take(nil, 1) // 3000 is in the log: the last one taken stands for it
	if got := s.oldestMs.Load(); got != 2000 {
		t.Fatalf("the oldest is of %d", got)
	}
	s.passed(at(3000), 1)
	if got := s.oldestMs.Load(); got != noneUnread {
		t.Fatalf("nothing is unread, the oldest is of %d", got)
	}
	restarted := newShard(&Config{RingRecords: 2, RingBytes: 1 << 20})
	restarted.unread = 5
	restarted.replay(at(1000), 90_000)
	if got := restarted.oldestMs.Load(); got != 90_000 {
		t.Fatalf("after a restart the oldest counts from %d, want the start", got)
	}
}

func TestLowWater(t *testing.T) {
	var l lowWater
	keeps := func(want uint64, ok bool) {
		t.Helper()
		if p, some := l.keeps(); some != ok || ok && p != want {
			t.Fatalf("keeps %d, %v; want %d, %v", p, some, want, ok)
		}
	}
	keeps(0, false)
	l.appended(10)
	keeps(10, true)
	l.appended(11)
	keeps(10, true)
	l.low = 11
	keeps(11, true)
	l.low = 12 // all finished
	keeps(0, false)
	l.appended(500)
	keeps(500, true)
}
