package edge

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// TestTenThousandFrames: as many frames as a client likes arrive in one write, and each is answered, in order. Whoever shares the loop is
// served meanwhile.
func TestTenThousandFrames(t *testing.T) {
	const n = 10_000
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, func(c *Config) { c.Loops = 1 })
		bystander := login(t, s, sub, "carol", "phone")
		sends := 0
		served := func() {
			t.Helper()
			sends++
			bystander.sendMessage(uint64(sends), "meanwhile")
			bystander.want(protocol.KindReceived)
		}
		text := sub == protocol.SubprotocolJSON
		op := ws.OpBinary
		if text {
			op = ws.OpText
		}
		var pings []byte
		for i := range n {
			pings = append(pings, final(ws.OpPing, fmt.Sprint(i))...)
		}
		ping := final(ws.OpPing, "0")
		nothing := encode(text, &protocol.Frame{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{{1}}})
		for _, tt := range []struct {
			name   string
			stream []byte
			pongs  int
			closed bool // then, because of too many fragments
		}{
			{"pings", pings, n, false},
			{"acknowledgements of nothing", append(manyFrames(n, nothing), ping...), 1, false},
			{"empty messages", append(manyFrames(n, final(op, "")), ping...), 1, false},
			{"fragments", append(part(op, ""), manyFrames(n, part(cont, ""))...), 0, true},
		} {
			c := login(t, s, sub, "alice", "phone")
			written := make(chan error, 1)
			go func() {
				_, err := c.conn.Write(tt.stream)
				written <- err
			}()
			for i := range tt.pongs {
				if f, err := c.next(); err != nil || string(f.Text) != fmt.Sprint("pong ", i) {
					t.Fatalf("%s: answer %d: %+v %v", tt.name, i, f, err)
				}
				if i%1000 == 0 {
					served()
				}
			}
			if tt.closed {
				c.wantError(protocol.CodeFrameTooLarge)
				c.wantClose(protocol.CloseTooBig)
			}
			if err := <-written; err != nil && !tt.closed {
				t.Fatal(err)
			}
			served()
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.submitted) != sends {
			t.Fatalf("%d sends, want those of the bystander, %d", len(b.submitted), sends)
		}
	})
}

func manyFrames(n int, frame []byte) []byte { return []byte(strings.Repeat(string(frame), n)) }

// TestAnswersOfOneTurn: who asks for more answers at once than the outbound budget holds is told so, whatever he asks with: a reset would
// tell him nothing.
func TestAnswersOfOneTurn(t *testing.T) {
	fill := func(n int, frame func(i int) []byte) (b []byte) {
		for i := 1; len(b) < n; i++ {
			b = append(b, frame(i)...)
		}
		return b
	}
	longMessages := func(json bool, limit int, f *protocol.Frame) func(int) []byte {
		return func(i int) []byte {
			var list []*protocol.Frame
			size := len(encode(json, f)) // header and mask included: more than each takes
			for n := range limit / size {
				more := *f
				more.Seq = uint64(i*1000 + n)
				list = append(list, &more)
			}
			return encode(json, list...)
		}
	}
	bad := &protocol.Frame{Kind: protocol.KindSend, Seq: 1 << 19}
	for _, tt := range []struct {
		name, sub string
		frame     func(i int) []byte
		closed    bool
	}{
		{"sends out of the span", protocol.SubprotocolBinary, func(i int) []byte { return encode(false, sendFrame(uint64(1000+i), "x")) }, true},
		{"long messages of bad sends", protocol.SubprotocolBinary, longMessages(false, protocol.MaxBinaryFrameBytes, bad), true},
		{"long messages of bad sends", protocol.SubprotocolJSON, longMessages(true, protocol.MaxJSONFrameBytes, bad), false},
		{"no JSON", protocol.SubprotocolJSON, func(int) []byte { return final(ws.OpText, "x") }, true},
		{"long messages that are no JSON", protocol.SubprotocolJSON, func(int) []byte {
			return final(ws.OpText, strings.Repeat("x\n", protocol.MaxJSONFrameBytes/2))
		}, false},
		{"no frames", protocol.SubprotocolBinary, func(int) []byte { return final(ws.OpBinary, "\xff") }, true},
	} {
		t.Run(tt.sub+" "+tt.name, func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(tt.sub, "alice", "phone")
			s.receive(fill(64<<10, tt.frame))
			sent := len(s.out)
			if sent > outHardBytes {
				t.Fatalf("%d bytes of answers", sent)
			}
			told := s.read()
			t.Logf("64 KiB asked for %d bytes of answers", sent)
			if closed := strings.HasSuffix(told, "error flooding; close 4429"); closed != tt.closed || closed != (sent > answerBytes) {
				t.Fatalf("%d bytes of answers end with %s", sent, told[max(0, len(told)-200):])
			}
		})
	}
}

// FuzzConnection feeds a loop whatever a client may send: as it is from the first byte on, behind an upgrade, and behind connected. Nothing
// panics, what comes back is bounded, and the connection beside it lives.
func FuzzConnection(f *testing.F) {
	f.Add([]byte(base+"\r\n"), uint16(3), uint8(0))
	f.Add([]byte(lines("GET / HTTP/1.1", "Host: x")), uint16(3), uint8(0))
	f.Add(encode(true, &protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")}), uint16(7), uint8(2))
	f.Add(frames(encode(false, sendFrame(1, "x"), sendFrame(2, "y")), final(ws.OpPing, "p"), closingFrame(1000, "")), uint16(30), uint8(3))
	f.Add(frames(part(ws.OpText, `{"action":"send_message","message_id`), final(cont, `_by_client":1,"receiver_id":"bob","content":"x"}`)), uint16(9), uint8(4))
	f.Add(encode(false, &protocol.Frame{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{{1}, {2}}}), uint16(1), uint8(3))
	f.Add(encode(true, &protocol.Frame{Kind: protocol.KindRenewToken, Token: []byte("alice")}), uint16(1), uint8(4))
	f.Add(bytes.Repeat(final(ws.OpText, "x"), 3000), uint16(1), uint8(4))
	f.Fuzz(func(t *testing.T, stream []byte, at uint16, stage uint8) {
		b := newBench(t, nil)
		bystander := b.open(protocol.SubprotocolBinary, "bystander", "phone")
		var s *fakeSocket
		switch stage % 5 {
		case 0:
			s = b.accept()
		case 1, 2:
			s = b.accept()
			s.receive([]byte(upgradeText([]string{protocol.SubprotocolBinary, protocol.SubprotocolJSON}[stage%5-1], "")))
		case 3, 4:
			s = b.open([]string{protocol.SubprotocolBinary, protocol.SubprotocolJSON}[stage%5-3], "alice", "phone")
		}
		s.out = nil
		asked := len(b.asked)
		stream = stream[:min(len(stream), 64<<10)] // what a loop reads at once
		cut := int(at) % (len(stream) + 1)
		for _, piece := range [][]byte{stream[:cut], stream[cut:]} {
			if s.out = nil; len(piece) > 0 && !s.closed {
				s.receive(piece)
			}
			if len(s.out) > outHardBytes {
				t.Fatalf("%d bytes of answers", len(s.out))
			}
		}
		b.verify()
		for _, r := range b.asked[asked:] {
			b.s.Registered(protocol.Registered{To: r.Session, Block: 1})
		}
		b.l.drainInbox()
		if !s.closed && s.conn.work != nil && s.conn.work.reader.partial != nil {
			if kept := len(s.conn.work.reader.partial.B); kept > max(maxHeadBytes, s.conn.limit()+14) {
				t.Fatalf("%d bytes are kept", kept)
			}
		}
		bystander.out = nil
		for range 3 * protocol.HeartbeatSeconds / 3 {
			b.now = b.now.Add(3 * time.Second)
			b.l.sweep()
			bystander.receive(final(ws.OpPing, "still here"))
			if got := replies(bystander.replies()); got != `pong "still here"` {
				t.Fatalf("the connection beside it got %s", got)
			}
		}
		if !s.closed {
			t.Fatalf("a silent connection lives in state %d", s.conn.state)
		}
		if b.l.m.panics != 0 {
			t.Fatalf("%d panics", b.l.m.panics)
		}
		if n := b.s.connections.Load(); n != 1 {
			t.Fatalf("%d connections", n)
		}
	})
}
