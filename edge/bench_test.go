package edge

import (
	"testing"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// BenchmarkSend is the edge's share of one message on its way in: bytes to Publish, and the answer out. No sockets.
func BenchmarkSend(b *testing.B) {
	for _, sub := range []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
		b.Run(sub, func(b *testing.B) {
			bench := newBench(b, nil)
			a := bench.open(sub, "alice", "phone")
			session := bench.l.session(a.conn)
			answers := make([]protocol.Answer, 1)
			var data []byte
			b.ReportAllocs()
			seq := uint64(0)
			for b.Loop() {
				if seq++; seq == protocol.MaxSend {
					a.conn.work.up.Start(0)
					seq = 1
				}
				data = appendSend(data[:0], a.conn.text(), seq)
				a.out = a.out[:0]
				bench.l.traffic(a.conn, data)
				answers[0] = protocol.Answer{To: session, Seq: seq, Position: 1, Millis: 1}
				bench.s.Answer(answers)
				bench.l.drainInbox()
			}
			if a.closed || bench.l.m.panics > 0 {
				b.Fatal("closed")
			}
		})
	}
}

// BenchmarkPush is the edge's share of one message on its way out: Push to the write, and the acknowledgement in.
func BenchmarkPush(b *testing.B) {
	for _, sub := range []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
		b.Run(sub, func(b *testing.B) {
			bench := newBench(b, nil)
			bench.s.cfg.Acknowledger = ignoreOutcomes{}
			a := bench.open(sub, "alice", "phone")
			m := testMessage(1, "alice", "hello, how are you?")
			pushes := []protocol.Push{{To: bench.live(a), Device: "phone", Message: m}}
			var data []byte
			b.ReportAllocs()
			n := uint64(0)
			for b.Loop() {
				n++
				m.ID = testID(n)
				a.out = a.out[:0]
				bench.s.Push(pushes)
				bench.l.drainInbox()
				data = appendAcknowledge(data[:0], a.conn.text(), m.ID)
				bench.l.traffic(a.conn, data)
			}
			if bench.l.m.acks != n {
				b.Fatalf("%d of %d acknowledged", bench.l.m.acks, n)
			}
		})
	}
}

type ignoreOutcomes struct{}

func (ignoreOutcomes) Settle([]protocol.Outcome) {}
func (ignoreOutcomes) Fence(protocol.Fence)      {}

var scratchFrame protocol.Frame
var scratchIDs [1]protocol.MessageID
var scratchPayload []byte

// appendSend and appendAcknowledge make a client's frames without allocating.
func appendSend(dst []byte, text bool, seq uint64) []byte {
	scratchFrame = protocol.Frame{Kind: protocol.KindSend, Seq: seq, Receiver: bobBytes, Content: helloBytes}
	return appendClient(dst, text)
}

var bobBytes, helloBytes = []byte("bob"), []byte("hello, how are you?")

func appendAcknowledge(dst []byte, text bool, id protocol.MessageID) []byte {
	scratchIDs[0] = id
	scratchFrame = protocol.Frame{Kind: protocol.KindAcknowledge, IDs: scratchIDs[:]}
	return appendClient(dst, text)
}

func appendClient(dst []byte, text bool) []byte {
	op := ws.OpBinary
	if text {
		op = ws.OpText
		scratchPayload = protocol.AppendJSON(scratchPayload[:0], &scratchFrame)
	} else {
		scratchPayload = protocol.AppendBinary(scratchPayload[:0], &scratchFrame)
	}
	dst = append(dst, 0x80|byte(op))
	if n := len(scratchPayload); n < 126 {
		dst = append(dst, 0x80|byte(n))
	} else {
		dst = append(dst, 0x80|126, byte(n>>8), byte(n))
	}
	return append(append(dst, 0, 0, 0, 0), scratchPayload...)
}
