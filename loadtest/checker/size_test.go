package checker

import (
	"fmt"
	"runtime"
	"testing"
)

func liveHeap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// fill plays an honest run of n messages between users who come in pairs.
func fill(c *Checker, users, n int) {
	clients := make([]ClientID, users)
	streams := make([]StreamID, users)
	names := make([]string, users)
	for u := range users {
		names[u] = fmt.Sprintf("user%08d", u)
		clients[u] = c.Client(names[u], "phone")
		streams[u] = c.Stream(clients[u], 1)
	}
	for i := range n {
		from := i % users
		to := from ^ 1
		seq := uint64(i/users) + 1
		id, position := idOf(uint64(i)), uint64(i)+1
		c.Sent(streams[from], seq, names[to])
		c.Answered(streams[from], seq, id, position)
		c.Shown(clients[to], id, position, names[from], Content(streams[from], seq, 32))
		c.Acknowledged(clients[to], id)
		c.Receipt(clients[from], id, position)
	}
}

// TestBytesPerMessage: ten million messages are to be judged in a gibibyte, so a message may take 107 B, with
// its share of everything.
func TestBytesPerMessage(t *testing.T) {
	before := liveHeap()
	c := New(Config{Acknowledgements: true, Receipts: true})
	fill(c, 1000, sizeMessages)
	perMessage := float64(liveHeap()-before) / sizeMessages
	v := c.Verdict()
	if !v.OK() || v.Shown != sizeMessages {
		t.Fatalf("an honest run: %s", v)
	}
	// The indexes are between half and three quarters full; at half they take 4 B a message more than on average.
	const verdict, worst = 8, 4
	t.Logf("%.1f B a message, at most %.0f MB for ten million", perMessage, (perMessage+verdict+worst)*10)
	if perMessage+verdict+worst > 100 {
		t.Errorf("%.1f B a message, want at most 100 with %d for the verdict", perMessage, verdict)
	}
}

// BenchmarkMessage is the cost of a message's five reports, with its share of the verdict:
//
//	go test -run - -bench Message -benchtime 10000000x ./loadtest/checker/
func BenchmarkMessage(b *testing.B) {
	b.ReportAllocs()
	before := liveHeap()
	c := New(Config{Acknowledgements: true, Receipts: true})
	b.ResetTimer()
	fill(c, 10_000, b.N)
	if v := c.Verdict(); !v.OK() {
		b.Fatal(v)
	}
	b.StopTimer()
	b.ReportMetric(float64(liveHeap()-before)/float64(b.N), "B/message")
	runtime.KeepAlive(c)
}
