//go:build !race

package edge

// The race detector allocates, and its sync.Pool forgets at random.

import (
	"testing"
	"time"

	"millrace/protocol"
)

// TestNoAllocations walks one message in both directions in steady state.
func TestNoAllocations(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, func(c *Config) { c.Rate = RateLimit{PerSecond: 1e6, Burst: 1000} })
		a := b.open(sub, "alice", "phone")
		session := b.live(a)
		text := a.conn.text()

		seq := uint64(0)
		request := encode(text, sendFrame(1<<19, "hello, how are you?"))
		answers := make([]protocol.Answer, 1)
		data := make([]byte, len(request))
		template := make([]byte, 0, len(request))
		send := func() {
			seq++
			template = appendSend(template[:0], text, seq)
			data = append(data[:0], template...)
			a.out = a.out[:0]
			if b.l.traffic(a.conn, data) {
				t.Fatal("closed")
			}
			answers[0] = protocol.Answer{To: session, Seq: seq, ID: testID(seq), Position: 1, Millis: 1}
			b.s.Answer(answers)
			b.l.drainInbox()
		}
		if n := testing.AllocsPerRun(2000, send); n != 0 {
			t.Errorf("a send and its answer: %v allocations", n)
		}

		message := testMessage(1, "alice", "hello, how are you?")
		pushes := []protocol.Push{{To: session, Device: "phone", Message: message}}
		push := func() {
			seq++
			message.ID, message.Position = testID(seq), seq
			b.settled = b.settled[:0]
			a.out = a.out[:0]
			b.s.Push(pushes)
			b.l.drainInbox()
			data = appendAcknowledge(data[:0], text, message.ID)
			if b.l.traffic(a.conn, data) {
				t.Fatal("closed")
			}
			if seq%32 == 0 {
				b.l.requestFence()
				b.s.Fenced(protocol.Fence{Edge: session.Edge, Number: b.l.fence - 1})
			}
		}
		b.s.cfg.Acknowledger = ignoreOutcomes{}
		if n := testing.AllocsPerRun(2000, push); n != 0 {
			t.Errorf("a push and its acknowledgement: %v allocations", n)
		}

		receipts := []protocol.ReceiptPush{{To: session, Device: "phone", Epoch: a.conn.epoch, Receiver: "bob"}}
		receipt := func() {
			a.out = a.out[:0]
			a.conn.heard = b.l.tick
			for range 10 {
				b.s.Receipts(receipts)
			}
			b.l.drainInbox()
			b.pass(200 * time.Millisecond)
		}
		if n := testing.AllocsPerRun(500, receipt); n != 0 {
			t.Errorf("ten receipts: %v allocations", n)
		}
		if a.closed || b.l.m.panics > 0 {
			t.Fatal("the connection did not survive")
		}
	})
}
