package checker

import (
	"encoding/binary"
	"runtime"
	"strings"
	"testing"
)

// history is a small run: alice and bob with two devices each, twenty messages from alice's first to bob.
type history struct {
	c      *Checker
	stream StreamID
	bob    [2]ClientID
	carol  ClientID
	broken int // the message that a case treats differently
}

func idOf(n int) (id [16]byte) {
	binary.BigEndian.PutUint64(id[8:], uint64(n)+1)
	id[0] = byte(n*37 + 1)
	return id
}

func newHistory(config Config) *history {
	h := &history{c: New(config), broken: 7}
	alice := h.c.Client("alice", "phone")
	h.bob = [2]ClientID{h.c.Client("bob", "phone"), h.c.Client("bob", "laptop")}
	h.carol = h.c.Client("carol", "phone")
	h.stream = h.c.Stream(alice, 1)
	return h
}

func (h *history) send(n int) {
	h.c.Sent(h.stream, uint64(n+1), "bob")
	h.c.Answered(h.stream, uint64(n+1), idOf(n), position(n))
}

func (h *history) show(on ClientID, n int) {
	h.c.Shown(on, idOf(n), position(n), "alice", Content(h.stream, uint64(n+1), 40))
}

func position(n int) uint64 { return uint64(n+1) << 11 }

// play sends and shows twenty messages; wrong replaces what happens to the broken one.
func (h *history) play(wrong func()) *Verdict {
	for n := range 20 {
		if n == h.broken && wrong != nil {
			wrong()
			continue
		}
		h.send(n)
		h.show(h.bob[0], n)
		h.show(h.bob[1], n)
	}
	return h.c.Verdict()
}

func TestCleanHistory(t *testing.T) {
	h := newHistory(Config{})
	v := h.play(func() { // refused, sent again on another connection, answered twice with one id, the second time without a position
		n := h.broken
		h.c.Sent(h.stream, uint64(n+1), "bob")
		h.c.Refused(h.stream, uint64(n+1), "rate_limited", false)
		h.send(n)
		h.c.Sent(h.stream, uint64(n+1), "bob")
		h.c.Answered(h.stream, uint64(n+1), idOf(n), 0)
		h.show(h.bob[1], n)
		h.show(h.bob[0], n)
	})
	if !v.OK() || v.Answered != 20 || v.Shown != 40 || v.Resends != 2 {
		t.Fatalf("clean history: %s (resends %d)", v, v.Resends)
	}
	if h.c.Outstanding() != 0 {
		t.Fatalf("outstanding %d", h.c.Outstanding())
	}
}

func TestViolationsAreFound(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  Kind
		wrong func(h *history, n int)
	}{
		{"lost on one device", Lost, func(h *history, n int) { h.send(n); h.show(h.bob[0], n) }},
		{"shown twice", Doubled, func(h *history, n int) { h.send(n); h.show(h.bob[0], n); h.show(h.bob[0], n); h.show(h.bob[1], n) }},
		{"misdelivered", Misdelivered, func(h *history, n int) {
			h.send(n)
			h.show(h.bob[0], n)
			h.show(h.bob[1], n)
			h.show(h.carol, n)
		}},
		{"forged", Forged, func(h *history, n int) {
			h.c.Shown(h.bob[0], idOf(n), position(n), "alice", Content(h.stream, uint64(n+1), 40))
		}},
		{"changed id on a resend", ChangedID, func(h *history, n int) {
			h.send(n)
			h.show(h.bob[0], n)
			h.show(h.bob[1], n)
			h.c.Answered(h.stream, uint64(n+1), idOf(n+100), 0)
		}},
		{"one id for two", SharedID, func(h *history, n int) {
			h.c.Sent(h.stream, uint64(n+1), "bob")
			h.c.Answered(h.stream, uint64(n+1), idOf(n-1), position(n))
		}},
		{"swapped", Disordered, func(h *history, n int) {
			h.c.Sent(h.stream, uint64(n+1), "bob")
			h.c.Answered(h.stream, uint64(n+1), idOf(n), position(n-2)+1)
			for _, on := range h.bob {
				h.c.Shown(on, idOf(n), position(n-2)+1, "alice", Content(h.stream, uint64(n+1), 40))
			}
		}},
		{"one position for two", SharedPosition, func(h *history, n int) {
			h.c.Sent(h.stream, uint64(n+1), "bob")
			h.c.Answered(h.stream, uint64(n+1), idOf(n), position(n-1))
			for _, on := range h.bob {
				h.c.Shown(on, idOf(n), position(n-1), "alice", Content(h.stream, uint64(n+1), 40))
			}
		}},
		{"two positions for one", ChangedPosition, func(h *history, n int) {
			h.send(n)
			h.show(h.bob[0], n)
			h.c.Shown(h.bob[1], idOf(n), position(n)+1, "alice", Content(h.stream, uint64(n+1), 40))
		}},
		{"receipt too early", ReceiptEarly, func(h *history, n int) {
			h.send(n)
			h.c.Receipt(h.c.Client("alice", "phone"), idOf(n), position(n))
			h.show(h.bob[0], n)
			h.show(h.bob[1], n)
		}},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			h := newHistory(Config{})
			v := h.play(func() { c.wrong(h, h.broken) })
			if v.OK() || v.Count(c.kind) == 0 {
				t.Fatalf("want %s, got %s", c.kind, v)
			}
			if !strings.Contains(v.String(), "\n") {
				t.Fatalf("no example in %q", v)
			}
		})
	}
}

func TestContent(t *testing.T) {
	for _, pad := range []int{0, 30, 120} {
		text := Content(3, 1<<20|9, pad)
		from, seq, ok := ParseContent(text)
		if !ok || from != 3 || seq != 1<<20|9 || pad > 40 && len(text) != pad {
			t.Fatalf("%q: %d %d %v, %d bytes", text, from, seq, ok, len(text))
		}
		for i := range text {
			if _, _, ok := ParseContent(text[:i]); ok {
				t.Fatalf("%q was accepted", text[:i])
			}
		}
	}
}

// TestBytesPerMessage: 10 million messages must be judged in under 1 GiB, 107 bytes each.
func TestBytesPerMessage(t *testing.T) {
	const messages = 200_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	h := newHistory(Config{})
	text := []byte(nil)
	for n := range messages {
		h.send(n)
		text = AppendContent(text[:0], h.stream, uint64(n+1), 40)
		h.c.Shown(h.bob[0], idOf(n), position(n), "alice", string(text))
		h.c.Shown(h.bob[1], idOf(n), position(n), "alice", string(text))
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := float64(after.HeapAlloc-before.HeapAlloc) / messages
	t.Logf("%.1f bytes a message", each)
	if each > 107 {
		t.Errorf("%.1f bytes a message are too many", each)
	}
	if v := h.c.Verdict(); !v.OK() {
		t.Error(v)
	}
}
