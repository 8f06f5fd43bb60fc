package edge

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/gobwas/ws"

	"millrace/protocol"
	"millrace/protocol/token"
)

// bench drives one loop without sockets and with a clock that stands still unless moved.
type bench struct {
	t       testing.TB
	s       *Server
	l       *loop
	now     time.Time
	wakes   int
	publish func(*protocol.Submission) protocol.Refusal
	settled []outcome
	fences  []protocol.Fence
	pages   []protocol.PageRequest
	replays []protocol.ReceiptsRequest
	stored  []protocol.ReceiptPush // what replays read, by Millis
	asked   []protocol.Registration
	states  []string
	gone    []string
}

func newBench(t testing.TB, change func(*Config)) *bench {
	b := &bench{t: t, now: time.Unix(1_700_000_000, 0)}
	cfg := testConfig(nil)
	cfg.Loops = 1
	cfg.Publisher, cfg.Acknowledger, cfg.Mailbox, cfg.Registrar = b, b, b, b
	cfg.now = func() time.Time { return b.now }
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.s, b.l = s, s.loops[0]
	b.l.driver = b
	s.verifiers.spawn = func() {} // see verify
	return b
}

func (b *bench) Publish(s *protocol.Submission) protocol.Refusal {
	if b.publish != nil {
		return b.publish(s)
	}
	return protocol.Refusal{}
}

func (b *bench) Settle(batch []protocol.Outcome) {
	for _, o := range batch {
		b.settled = append(b.settled, outcome{o, string(o.User), string(o.Device)})
	}
}

func (b *bench) Fence(f protocol.Fence)                  { b.fences = append(b.fences, f) }
func (b *bench) ReadPage(r protocol.PageRequest)         { b.pages = append(b.pages, r) }
func (b *bench) ReadReceipts(r protocol.ReceiptsRequest) { b.replays = append(b.replays, r) }
func (b *bench) Register(r protocol.Registration)        { b.asked = append(b.asked, r) }
func (b *bench) SetState(u, d []byte, s protocol.Session, live bool) {
	b.states = append(b.states, fmt.Sprintf("%s/%s %d %v", u, d, s.Generation, live))
}
func (b *bench) Unregister(u, d []byte, s protocol.Session) {
	b.gone = append(b.gone, fmt.Sprintf("%s/%s", u, d))
}

func (b *bench) wake() { b.wakes++ }

func (b *bench) closeSocket(s socket) { fakeOf(s).close() }

func (b *bench) closeWrite(s socket) { fakeOf(s).halfClosed = true }

// fakeOf says goodbye on a TLS connection, as the engine does.
func fakeOf(s socket) *fakeSocket {
	if t, ok := s.(*tlsSocket); ok {
		t.part()
		s = t.raw
	}
	return s.(*fakeSocket)
}

// fakeSocket takes everything at once, or buffers, or fails.
type fakeSocket struct {
	bench      *bench
	conn       *conn
	out        []byte
	writes     int
	buffered   int
	stalled    bool
	broken     bool
	closed     bool
	halfClosed bool
	panics     bool
}

func (s *fakeSocket) Write(b []byte) (int, error) {
	if s.closed {
		s.bench.t.Error("write to a closed socket")
	}
	if s.broken {
		s.close() // as gnet does: within Write
		return 0, errors.New("broken pipe")
	}
	s.writes++
	if s.stalled {
		s.buffered += len(b)
	}
	s.out = append(s.out, b...)
	return len(b), nil
}

func (s *fakeSocket) OutboundBuffered() int {
	if s.panics {
		panic("bug")
	}
	return s.buffered
}

func (s *fakeSocket) Fd() int { return -1 }

func (s *fakeSocket) close() {
	if !s.closed {
		s.closed = true
		s.bench.l.closed(s.conn)
	}
}

// accept opens a connection.
func (b *bench) accept() *fakeSocket {
	s := &fakeSocket{bench: b}
	b.s.connections.Add(1)
	s.conn = b.l.open(s)
	return s
}

// receive brings bytes from the client.
func (s *fakeSocket) receive(data []byte) {
	s.bench.t.Helper()
	if s.closed {
		s.bench.t.Fatal("the server has closed this connection")
	}
	if s.bench.l.traffic(s.conn, bytes.Clone(data)) {
		fakeOf(s.conn.sock).close()
	}
}

func (s *fakeSocket) frame(f *protocol.Frame) {
	s.bench.t.Helper()
	s.receive(encode(s.conn.text(), f))
}

func encode(text bool, list ...*protocol.Frame) []byte {
	var b []byte
	op := ws.OpBinary
	for _, f := range list {
		if text {
			op = ws.OpText
			b = append(protocol.AppendJSON(b, f), '\n')
		} else {
			b = protocol.AppendBinary(b, f)
		}
	}
	return clientFrame(op, true, b)
}

// open brings a connection to the state in which connected was sent.
func (b *bench) open(subprotocol, user, device string) *fakeSocket {
	b.t.Helper()
	s := b.accept()
	s.receive([]byte(upgradeText(subprotocol, "")))
	s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(user), Device: []byte(device)})
	b.s.Registered(protocol.Registered{To: b.asked[len(b.asked)-1].Session})
	b.l.drainInbox()
	if s.conn.state != stateOpen {
		b.t.Fatalf("state %d: %q", s.conn.state, s.out)
	}
	s.out, s.writes = nil, 0
	return s
}

// verify does what workers do, and lets the loop hear of it.
func (b *bench) verify() {
	b.t.Helper()
	b.s.verifiers.work()
	b.l.drainInbox()
}

// answerReplays answers the requests for receipts from stored.
func (b *bench) answerReplays() {
	for len(b.replays) > 0 {
		r := b.replays[0]
		b.replays = b.replays[1:]
		p := protocol.ReceiptsPage{To: r.Session, Next: r.After, End: true}
		for _, row := range b.stored {
			at := protocol.ReceiptCursor{Millis: row.Millis, Addressee: row.Receiver}
			if at.Millis < r.After.Millis || at.Millis == r.After.Millis && at.Addressee <= r.After.Addressee {
				continue
			}
			if len(p.Receipts) == r.Limit {
				p.End = false
				break
			}
			row.To = r.Session
			p.Receipts = append(p.Receipts, row)
			p.Next = at
		}
		b.s.ReceiptsPage(p)
		b.l.drainInbox()
	}
}

// live ends the drain of a connection with an empty page, and the replay of receipts.
func (b *bench) live(s *fakeSocket) protocol.Session {
	b.t.Helper()
	b.answerReplays()
	for !s.conn.down.Live() {
		r := b.pages[len(b.pages)-1]
		b.s.Page(protocol.Page{To: b.l.session(s.conn), After: r.After, End: true})
		b.l.drainInbox()
	}
	return b.l.session(s.conn)
}

// pass lets time go by, with sweeps; fences and replays of receipts are answered.
func (b *bench) pass(d time.Duration) {
	for ; d > 0; d -= 100 * time.Millisecond {
		b.now = b.now.Add(100 * time.Millisecond)
		b.l.sweep()
		b.answerReplays()
		if len(b.fences) > 0 {
			for _, f := range b.fences {
				b.s.Fenced(f)
			}
			b.fences = b.fences[:0]
			b.l.drainInbox()
		}
	}
}

// read takes what was sent to the client apart, one line per frame; WebSocket messages end with a semicolon.
func (s *fakeSocket) read() string {
	s.bench.t.Helper()
	var lines []string
	r := newReader(s.out)
	s.out = nil
	for r.Buffered() > 0 || func() bool { _, err := r.Peek(1); return err == nil }() {
		f, err := readServerFrame(r)
		if err != nil {
			s.bench.t.Fatal(err)
		}
		switch f.Header.OpCode {
		case ws.OpClose:
			lines = append(lines, fmt.Sprintf("close %d", binary.BigEndian.Uint16(f.Payload)))
		case ws.OpPing, ws.OpPong:
			lines = append(lines, fmt.Sprintf("%x %q", f.Header.OpCode, f.Payload))
		default:
			lines = append(lines, strings.Join(describe(s.bench.t, f.Header.OpCode == ws.OpText, f.Payload), " + "))
		}
	}
	return strings.Join(lines, "; ")
}

func describe(t testing.TB, text bool, payload []byte) (list []string) {
	t.Helper()
	var f protocol.Frame
	for len(payload) > 0 {
		var err *protocol.FrameError
		if text {
			payload, err = protocol.ParseJSON(payload, true, &f)
		} else {
			payload, err = protocol.ParseBinary(payload, &f)
		}
		if err != nil {
			t.Fatal(err)
		}
		switch f.Kind {
		case protocol.KindConnected:
			list = append(list, fmt.Sprintf("connected %d", f.Seq))
		case protocol.KindReceived:
			list = append(list, fmt.Sprintf("received %d", f.Seq))
		case protocol.KindIncoming:
			list = append(list, fmt.Sprintf("incoming %d", f.Position))
		case protocol.KindReceipt:
			for _, r := range f.Receipts {
				list = append(list, fmt.Sprintf("receipt %s %d %d", r.Receiver, r.Position, r.Seq))
			}
		case protocol.KindError:
			line := "error " + f.Code.String()
			if f.Seq != 0 {
				line += fmt.Sprintf(" %d", f.Seq)
			}
			if f.ResendFrom != 0 {
				line += fmt.Sprintf(" from %d", f.ResendFrom)
			}
			if f.RetryAfterMs != 0 {
				line += " retry"
			}
			list = append(list, line)
		case protocol.KindRenew:
			list = append(list, fmt.Sprintf("renew %d", f.ExpiresInMs))
		case protocol.KindRenewed:
			list = append(list, "renewed")
		case protocol.KindGoAway:
			list = append(list, "go_away")
		default:
			list = append(list, fmt.Sprintf("kind %#x", f.Kind))
		}
	}
	return list
}

func (s *fakeSocket) wants(want string) {
	s.bench.t.Helper()
	if got := s.read(); got != want {
		s.bench.t.Fatalf("sent to the client: %s\nwant: %s", got, want)
	}
}

func sendFrame(seq uint64, content string) *protocol.Frame {
	return &protocol.Frame{Kind: protocol.KindSend, Seq: seq, Receiver: []byte("bob"), Content: []byte(content)}
}

func TestSizes(t *testing.T) {
	if n := unsafe.Sizeof(conn{}); n > 128 {
		t.Errorf("a connection takes %d bytes, want at most 128", n)
	}
	if n := unsafe.Sizeof(Uplink{}); n > 88 {
		t.Errorf("an Uplink takes %d bytes", n)
	}
	if n := unsafe.Sizeof(Downlink{}); n > 24 {
		t.Errorf("a Downlink takes %d bytes", n)
	}
	t.Logf("conn %d, Uplink %d, Downlink %d, work %d, flight %d bytes", unsafe.Sizeof(conn{}), unsafe.Sizeof(Uplink{}),
		unsafe.Sizeof(Downlink{}), unsafe.Sizeof(work{}), unsafe.Sizeof(flight{}))
}

// TestIdleConnectionOwnsNothing: after a send, a push and a split frame, an idle connection is back to its slot.
func TestIdleConnectionOwnsNothing(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		a := b.open(sub, "alice", "phone")
		session := b.live(a)
		frame := encode(a.conn.text(), sendFrame(1, "hi"))
		a.receive(frame[:7])
		if a.conn.work == nil || !a.conn.work.reader.pending() {
			t.Fatal("half a frame is not kept")
		}
		a.receive(frame[7:])
		b.s.Answer([]protocol.Answer{{To: session, Seq: 1}})
		b.s.Push([]protocol.Push{{To: session, Message: testMessage(1, "alice", "x")}})
		b.l.drainInbox()
		a.frame(&protocol.Frame{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{testID(1)}})
		b.pass(3 * time.Second)
		if a.conn.work != nil || a.conn.down.flight != nil || a.conn.out != 0 {
			t.Fatalf("an idle connection holds %+v, %+v", a.conn.work, a.conn.down.flight)
		}
		// The highest number handed over is remembered all the same.
		b.publish = func(s *protocol.Submission) protocol.Refusal {
			if !s.Resend {
				t.Error("a number handed over before is a resend")
			}
			return protocol.Refusal{}
		}
		a.frame(sendFrame(1, "hi"))
	})
}

func TestConnStates(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		t.Run("connect", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.accept()
			s.receive([]byte(upgradeText(sub, "")))
			s.out = nil
			s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("phone"), Epoch: 77, ReceiptsAfter: 100_000})
			if r := b.asked[0]; r.User != "alice" || r.Device != "phone" || r.Epoch != 77 || r.Session != b.l.session(s.conn) {
				t.Fatalf("registration %+v", r)
			}
			s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
			s.wants("error already_connected")
			b.s.Registered(protocol.Registered{To: b.asked[0].Session, Block: 4, Heir: true})
			b.l.drainInbox()
			s.wants(fmt.Sprintf("connected %d", protocol.FirstSeq(4)))
			if len(b.pages) != 1 || !b.pages[0].Heir || b.pages[0].Limit < 1 || b.replays[0].After.Millis != 40_000 {
				t.Fatalf("pages %+v, receipts %v", b.pages, b.replays)
			}
			s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
			s.wants("error already_connected")
		})
		for _, tt := range []struct{ name, token, want string }{
			{"bad token", "no such user", "error unauthorized; close 4501"},
			{"expired token", "expired", "error token_expired; close 4401"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				b := newBench(t, nil)
				s := b.accept()
				s.receive([]byte(upgradeText(sub, "")))
				s.out = nil
				s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(tt.token)})
				s.wants(tt.want)
				if len(b.asked) != 0 || s.closed {
					t.Fatalf("asked %v, closed %v", b.asked, s.closed)
				}
				s.receive(closingFrame(4501, ""))
				if !s.closed || b.l.slots.free == 0 || b.s.connections.Load() != 0 {
					t.Fatal("the connection is still there")
				}
			})
		}
		t.Run("not connected", func(t *testing.T) {
			for _, f := range []*protocol.Frame{
				sendFrame(1, "x"),
				{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{testID(1)}},
				{Kind: protocol.KindRenewToken, Token: []byte("alice")},
			} {
				b := newBench(t, nil)
				s := b.accept()
				s.receive([]byte(upgradeText(sub, "")))
				s.out = nil
				s.frame(f)
				s.wants("error not_connected; close 4502")
			}
		})
		t.Run("refused registration", func(t *testing.T) {
			for _, tt := range []struct {
				refusal protocol.Refusal
				want    string
			}{
				{protocol.Refusal{Code: protocol.CodeTooManyDevices}, "error too_many_devices; close 4503"},
				{protocol.Refusal{Code: protocol.CodeSessionReplaced}, "error session_replaced; close 4500"},
				{protocol.Refusal{Code: protocol.CodeStoreFull, RetryAfterMs: 100}, "error store_full retry; close 1013"},
				{protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 100}, "error internal retry; close 1013"},
			} {
				b := newBench(t, nil)
				s := b.accept()
				s.receive([]byte(upgradeText(sub, "")))
				s.out = nil
				s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
				b.s.Registered(protocol.Registered{To: b.asked[0].Session, Refusal: tt.refusal})
				b.l.drainInbox()
				s.wants(tt.want)
				if len(b.gone) != 0 {
					t.Fatal("what was not registered was unregistered")
				}
			}
		})
		t.Run("closed while registering", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.accept()
			s.receive([]byte(upgradeText(sub, "")))
			s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("phone")})
			s.close()
			if s.conn.state != stateGone || b.s.connections.Load() != 1 {
				t.Fatalf("state %d", s.conn.state)
			}
			b.pass(time.Minute)
			b.s.Registered(protocol.Registered{To: b.asked[0].Session})
			b.l.drainInbox()
			if fmt.Sprint(b.gone) != "[alice/phone]" || s.conn.state != stateFree || b.s.connections.Load() != 0 {
				t.Fatalf("unregistered %v, state %d", b.gone, s.conn.state)
			}
		})
		t.Run("bad frames", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			bad := clientFrame(ws.OpBinary, true, []byte{0x05, 0x00, 0x85, 0x00, 0x41, 0x00})
			if s.conn.text() {
				bad = clientFrame(ws.OpText, true, []byte("{}\n{\"action\":\"dance\"}\n{\"action\":\"dance\",\"type\":\"connect\"}"))
			}
			s.receive(bad)
			if got := s.read(); !strings.Contains(got, "error unknown_action") || strings.Contains(got, "close") {
				t.Fatalf("got %s", got)
			}
			s.frame(sendFrame(1, "x"))
			if s.conn.work == nil || s.conn.work.up.Open() != 1 {
				t.Fatal("the connection does not live")
			}
		})
		t.Run("many bad frames", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			bad := clientFrame(ws.OpBinary, true, bytes.Repeat([]byte{0x05, 0x00}, 4000))
			if s.conn.text() {
				bad = clientFrame(ws.OpText, true, bytes.Repeat([]byte("x\n"), 8000))
			}
			s.receive(bad)
			if n := strings.Count(s.read(), "error"); n != maxBadFrames || s.closed {
				t.Fatalf("%d errors, closed %v", n, s.closed)
			}
		})
		t.Run("replaced", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			b.s.Push([]protocol.Push{{To: session, Message: testMessage(1, "alice", "x")}})
			b.l.drainInbox()
			s.out = nil
			b.s.Replace(session)
			b.l.drainInbox()
			s.wants("error session_replaced; close 4500")
			if len(b.settled) != 1 || b.settled[0].Kind != protocol.Lost || b.settled[0].user != "alice" || b.settled[0].device != "phone" {
				t.Fatalf("settled %+v", b.settled)
			}
			b.pass(3 * time.Second)
			if !s.closed {
				t.Fatal("a peer that does not close is not closed")
			}
		})
		t.Run("control frames", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			s.receive(frames(final(ws.OpPing, "a"), final(ws.OpPong, "b"), final(ws.OpPing, "c")))
			s.wants(`a "a"; a "c"`)
			s.receive(closingFrame(1001, "bye"))
			s.wants("close 1001")
			if !s.closed || fmt.Sprint(b.gone) != "[alice/phone]" {
				t.Fatalf("closed %v, unregistered %v", s.closed, b.gone)
			}
		})
		t.Run("violation", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			s.receive(header(0xf1, 0, 0))
			s.wants("close 1002")
			if !s.halfClosed || s.closed {
				t.Fatalf("half closed %v, closed %v", s.halfClosed, s.closed)
			}
			s.receive(header(0xf1, 0, 0))
			s.wants("")
			b.pass(3 * time.Second)
			if !s.closed {
				t.Fatal("not closed")
			}
		})
	})
}

func TestSends(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		retry := protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: 50}
		t.Run("answers", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.l.session(s.conn)
			for seq := uint64(1); seq <= 3; seq++ {
				s.frame(sendFrame(seq, "x"))
			}
			s.frame(sendFrame(2, "x")) // its answer is on the way
			s.wants("")
			b.s.Answer([]protocol.Answer{{To: session, Seq: 1}, {To: session, Seq: 2}, {To: session, Seq: 3}, {To: session, Seq: 3}, {To: session, Seq: 9}})
			b.l.drainInbox()
			if sub == protocol.SubprotocolBinary {
				s.wants("received 1 + received 2 + received 3")
			} else {
				s.wants("received 1; received 2; received 3")
			}
			if s.writes != 1 || b.l.m.retries != 1 || b.l.m.drops[dropAnswerUnknown] != 2 {
				t.Fatalf("%d writes, %d retries, %d unknown", s.writes, b.l.m.retries, b.l.m.drops[dropAnswerUnknown])
			}
		})
		t.Run("final refusals", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			f := sendFrame(1, "x")
			f.Receiver = []byte("no/user")
			s.frame(f)
			s.wants("error bad_receiver 1")
			s.frame(sendFrame(2, ""))
			s.wants("error empty_content 2")
			s.frame(sendFrame(3, strings.Repeat("x", 1001)))
			s.wants("error content_too_long 3")
			s.frame(sendFrame(protocol.FirstSeq(1), "x"))
			s.wants(fmt.Sprintf("error bad_request %d", protocol.FirstSeq(1)))
			b.publish = func(*protocol.Submission) protocol.Refusal { return protocol.Refusal{Code: protocol.CodeMailboxFull} }
			s.frame(sendFrame(4, "x"))
			s.wants("error mailbox_full 4")
		})
		t.Run("mailbox_full stands until it has been read", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			var published []string
			full := true
			b.publish = func(p *protocol.Submission) (r protocol.Refusal) {
				if full && !p.Resend {
					r.Code = protocol.CodeMailboxFull
				}
				published = append(published, fmt.Sprintf("%d to %s %v", p.Seq, p.Receiver, r.Code))
				return r
			}
			to := func(seq uint64, receiver string) {
				f := sendFrame(seq, "x")
				f.Receiver = []byte(receiver)
				s.frame(f)
			}
			to(1, "bob")
			s.wants("error mailbox_full 1")
			full = false
			b.pass(5 * time.Second) // whatever else is forgotten while idle
			to(2, "bob")
			s.wants("error mailbox_full 2")
			to(3, "carol")
			b.s.Answer([]protocol.Answer{{To: b.l.session(s.conn), Seq: 3}})
			b.l.drainInbox()
			s.read()
			to(65, "bob")
			s.wants("error mailbox_full 65")
			to(128, "bob")
			s.wants("error mailbox_full 128")
			to(192, "bob")
			if got := strings.Join(published, ", "); got != "1 to bob mailbox_full, 3 to carol ok, 192 to bob ok" {
				t.Error(got)
			}
			b.pass(5 * time.Second)
			if w := s.conn.work; w == nil || len(w.full.list) != 1 {
				t.Error("a refusal that may be unread is forgotten")
			}
		})
		t.Run("hold and resend", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			b.publish = func(*protocol.Submission) protocol.Refusal { return retry }
			s.frame(sendFrame(1, "x"))
			s.wants("error overloaded 1 from 1 retry")
			b.publish = nil
			s.frame(sendFrame(2, "x"))
			s.wants("error overloaded 2 from 1 retry")
			s.frame(sendFrame(1, "x"))
			s.frame(sendFrame(2, "x"))
			s.wants("")
			session := b.l.session(s.conn)
			b.s.Answer([]protocol.Answer{{To: session, Seq: 1, Refusal: protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: 9}},
				{To: session, Seq: 2, Refusal: protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: 9}}})
			b.l.drainInbox()
			if got := strings.ReplaceAll(s.read(), " + ", "; "); got != "error outcome_unknown 1 from 1 retry; error outcome_unknown 2 from 1 retry" {
				t.Fatal(got)
			}
			resends := 0
			b.publish = func(p *protocol.Submission) protocol.Refusal {
				if p.Resend {
					resends++
				}
				return protocol.Refusal{}
			}
			s.frame(sendFrame(1, "x"))
			s.frame(sendFrame(2, "x"))
			s.frame(sendFrame(3, "x"))
			if resends != 2 {
				t.Fatalf("%d resends", resends)
			}
		})
		t.Run("window", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			for seq := uint64(1); seq <= 64; seq++ {
				s.frame(sendFrame(seq, "x"))
			}
			s.wants("")
			s.frame(sendFrame(65, "x"))
			s.wants("error window_exceeded 65")
			b.s.Answer([]protocol.Answer{{To: b.l.session(s.conn), Seq: 1}})
			b.l.drainInbox()
			s.frame(sendFrame(65, "x"))
			s.wants("received 1")
		})
		t.Run("rate", func(t *testing.T) {
			b := newBench(t, func(c *Config) { c.Rate = RateLimit{PerSecond: 10, Burst: 2} })
			s := b.open(sub, "alice", "phone")
			session := b.l.session(s.conn)
			for seq := uint64(1); seq <= 3; seq++ {
				s.frame(sendFrame(seq, "x"))
			}
			s.wants("error rate_limited 3 from 3 retry")
			s.frame(sendFrame(4, "x"))
			s.wants("error rate_limited 4 from 3 retry")
			b.pass(200 * time.Millisecond)
			s.frame(sendFrame(3, "x"))
			s.frame(sendFrame(4, "x"))
			s.wants("")
			for seq := uint64(1); seq <= 4; seq++ {
				b.s.Answer([]protocol.Answer{{To: session, Seq: seq}})
			}
			b.l.drainInbox()
			s.out = nil
			for range 1100 {
				if s.conn.state == stateOpen {
					s.frame(sendFrame(5, "x"))
				}
			}
			if got := s.read(); !strings.HasSuffix(got, "error flooding; close 4429") {
				t.Fatal(got[max(0, len(got)-100):])
			}
		})
		t.Run("block used", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			s.frame(sendFrame(protocol.MaxSend-1, "x"))
			s.frame(sendFrame(protocol.MaxSend, "x"))
			if got := strings.ReplaceAll(s.read(), " + ", "; "); got != "error shutting_down 1048575 from 1048575 retry; go_away" {
				t.Fatal(got)
			}
			b.s.Answer([]protocol.Answer{{To: b.l.session(s.conn), Seq: protocol.MaxSend - 1}})
			b.l.drainInbox()
			s.wants("received 1048574; close 4430")
		})
	})
}

func TestPushes(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		push := func(session protocol.Session, n int, content string) []protocol.Push {
			return []protocol.Push{{To: session, Device: "phone", Message: testMessage(n, "alice", content)}}
		}
		t.Run("one write", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			for n := 1; n <= 3; n++ {
				b.s.Push(push(session, n, "x"))
			}
			if b.wakes == 0 {
				t.Fatal("not woken")
			}
			wakes := b.wakes
			b.s.Push(push(session, 3, "x")) // twice
			if b.wakes != wakes {
				t.Fatal("woken again")
			}
			b.l.drainInbox()
			if got := strings.ReplaceAll(s.read(), " + ", "; "); got != "incoming 1; incoming 2; incoming 3" {
				t.Fatal(got)
			}
			if s.writes != 1 || b.l.m.drops[dropPushTwice] != 1 {
				t.Fatalf("%d writes, %d twice", s.writes, b.l.m.drops[dropPushTwice])
			}
		})
		t.Run("long content", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			for n := 1; n <= 14; n++ {
				b.s.Push(push(session, n, strings.Repeat("ä", 2000)))
			}
			b.l.drainInbox()
			if got := strings.Count(s.read(), "incoming"); got != 14 || s.writes != 1 {
				t.Fatalf("%d messages in %d writes", got, s.writes)
			}
		})
		t.Run("refused", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			draining := b.l.session(s.conn)
			b.s.Push(push(draining, 1, "x")) // not live yet
			b.l.drainInbox()
			session := b.live(s)
			old := session
			old.Generation++
			b.s.Push(push(old, 2, "x"))
			gone := session
			gone.Conn++
			b.s.Push(push(gone, 3, "x"))
			b.l.drainInbox()
			s.wants("")
			var got []string
			for _, o := range b.settled {
				got = append(got, fmt.Sprintf("%d %d %s/%s", o.Kind, o.Position, o.user, o.device))
			}
			if fmt.Sprint(got) != "[1 1 alice/phone 1 2 alice/phone 1 3 alice/phone]" {
				t.Fatal(got)
			}
		})
		t.Run("acknowledgements", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			b.s.Push(push(session, 1, "x"))
			b.s.Push(push(session, 2, "x"))
			b.l.drainInbox()
			s.receive(encode(s.conn.text(), &protocol.Frame{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{testID(2), testID(9), testID(1), testID(1)}}))
			if len(b.settled) != 2 || b.settled[0].Position != 2 || b.settled[1].Position != 1 || b.l.m.ignoredAcks != 2 {
				t.Fatalf("settled %+v, ignored %d", b.settled, b.l.m.ignoredAcks)
			}
		})
		t.Run("notice", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			pages := len(b.pages)
			b.s.Notify([]protocol.Session{session})
			b.l.drainInbox()
			if len(b.pages) != pages+1 || b.states[len(b.states)-1] != "alice/phone 1 false" {
				t.Fatalf("%d pages, states %v", len(b.pages)-pages, b.states)
			}
			b.s.Page(protocol.Page{To: session, Rows: []protocol.MailboxRow{{Message: testMessage(4, "alice", "x")}}, End: true})
			b.l.drainInbox()
			s.wants("incoming 4")
			b.live(s)
			if b.states[len(b.states)-1] != "alice/phone 1 true" {
				t.Fatalf("states %v", b.states)
			}
			s.close()
			if len(b.settled) != 0 {
				t.Fatalf("a drained message is lost: %+v", b.settled)
			}
		})
		t.Run("failed page", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			b.s.Page(protocol.Page{To: b.l.session(s.conn), Refusal: protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 1}})
			b.l.drainInbox()
			pages := len(b.pages)
			b.pass(time.Second)
			if len(b.pages) != pages+1 {
				t.Fatalf("read again %d times", len(b.pages)-pages)
			}
			b.live(s)
		})
		t.Run("slow reader", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			s.stalled = true
			for n := 1; n <= 40; n++ {
				b.s.Push(push(session, n, strings.Repeat("x", 1000)))
				for range 3 {
					n++
					b.s.Push(push(session, n, strings.Repeat("x", 1000)))
				}
				b.l.drainInbox()
			}
			for n := 41; n <= 80; n++ {
				b.s.Push(push(session, n, strings.Repeat("x", 1000)))
				b.l.drainInbox()
			}
			if s.buffered > outSoftBytes || s.buffered < outSoftBytes-4000 {
				t.Fatalf("%d bytes buffered", s.buffered)
			}
			refused := len(b.settled)
			if refused == 0 || b.settled[0].Kind != protocol.Refused || s.conn.down.Live() || s.conn.down.Generation() != 1 {
				t.Fatalf("%d refused, live %v", refused, s.conn.down.Live())
			}
			b.pass(30 * time.Second)
			s.receive(final(ws.OpPong, ""))
			b.pass(25 * time.Second)
			s.receive(final(ws.OpPong, ""))
			s.buffered -= 100 // a byte leaves: the patience starts again
			b.pass(45 * time.Second)
			s.receive(final(ws.OpPong, ""))
			b.pass(10 * time.Second)
			if s.conn.state != stateOpen {
				t.Fatalf("closed although bytes leave, reason %d", s.conn.reason)
			}
			s.receive(final(ws.OpPong, ""))
			s.buffered, s.out = 0, nil
			s.stalled = false
			pages := len(b.pages)
			b.pass(2 * time.Second)
			if len(b.pages) == pages {
				t.Fatal("the drain does not go on when the buffer is empty")
			}
			b.live(s)
		})
		t.Run("stuck reader", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			s.stalled = true
			b.s.Push(push(session, 1, "x"))
			b.l.drainInbox()
			s.out = nil
			for range 7 {
				if s.conn.state == stateOpen {
					s.receive(final(ws.OpPong, ""))
					b.pass(10 * time.Second)
				}
			}
			if got := s.read(); !strings.Contains(got, "error slow") || !strings.HasSuffix(got, "close 4413") {
				t.Fatal(got)
			}
			b.pass(3 * time.Second)
			if !s.closed || len(b.settled) != 1 || b.settled[0].Kind != protocol.Lost {
				t.Fatalf("closed %v, settled %+v", s.closed, b.settled)
			}
		})
		t.Run("256 in the first second", func(t *testing.T) {
			b := newBench(t, nil)
			b.pass(2 * time.Minute)
			s := b.open(sub, "alice", "phone")
			session := b.live(s)
			for n := 1; n <= protocol.MaxUnacknowledged; n++ {
				b.s.Push(push(session, n, "x"))
			}
			b.l.drainInbox()
			b.pass(5 * time.Second)
			if s.conn.state != stateOpen {
				t.Fatal("closed as slow at once")
			}
		})
		t.Run("hard limit", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			s.stalled = true
			for range 100_000 {
				if s.closed {
					break
				}
				s.receive(final(ws.OpPing, strings.Repeat("p", 125)))
			}
			if !s.closed || s.buffered > outHardBytes {
				t.Fatalf("closed %v with %d bytes", s.closed, s.buffered)
			}
			if b.l.m.closes[closeSlow] != 1 || b.l.m.drops[dropOutput] != 1 {
				t.Fatal("not counted")
			}
		})
	})
}

func TestReceipts(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		s := b.open(sub, "alice", "phone")
		session := b.live(s)
		receipt := func(n int, epoch uint64) []protocol.ReceiptPush {
			return []protocol.ReceiptPush{{To: session, ID: testID(uint64(n)), Position: uint64(n), Seq: uint64(n), Device: "phone", Epoch: epoch, Receiver: "bob"}}
		}
		b.s.Receipts(receipt(1, s.conn.epoch))
		b.s.Receipts(receipt(2, s.conn.epoch+1)) // of another stream: its number means nothing here
		b.l.drainInbox()
		s.wants("")
		b.pass(200 * time.Millisecond)
		if got := strings.ReplaceAll(s.read(), "; ", " + "); got != "receipt bob 1 1 + receipt bob 2 0" || s.writes != 1 {
			t.Fatalf("%s in %d writes", got, s.writes)
		}
		// They do not wait when something else goes out.
		b.s.Receipts(receipt(3, s.conn.epoch))
		b.l.drainInbox()
		s.receive(final(ws.OpPing, ""))
		s.wants(`a ""; receipt bob 3 3`)
		b.pass(time.Second)
		s.wants("")
		// A full frame does not wait either.
		for n := range protocol.MaxReceiptsPerFrame {
			b.s.Receipts(receipt(n+1, s.conn.epoch))
		}
		b.l.drainInbox()
		if got := strings.Count(s.read(), "receipt"); got != protocol.MaxReceiptsPerFrame {
			t.Fatalf("%d receipts", got)
		}
	})
}

// TestReceiptsToASlowReader: it gets all of them when there is room, without being closed; what waits here is bounded, and
// the rest is read from the store in the order in which it changed.
func TestReceiptsToASlowReader(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		s := b.open(sub, "alice", "phone")
		session := b.live(s)
		s.stalled = true
		const many = 5000
		change := func(n int) protocol.ReceiptPush {
			r := protocol.ReceiptPush{To: session, ID: testID(uint64(n)), Position: uint64(n), Receiver: fmt.Sprintf("u%d", n), Millis: int64(n)}
			b.stored = append(b.stored, r)
			b.s.Receipts([]protocol.ReceiptPush{r})
			return r
		}
		for n := range many {
			change(n + 1)
		}
		b.l.drainInbox()
		if b.l.m.drops[dropReceipts] == 0 {
			t.Fatal("nothing is missed: the test is too small")
		}
		got, last := map[string]bool{}, 0
		take := func() {
			for _, line := range strings.Split(strings.ReplaceAll(s.read(), "; ", " + "), " + ") {
				var receiver string
				var position, seq int
				if n, _ := fmt.Sscanf(line, "receipt %s %d %d", &receiver, &position, &seq); n != 3 {
					continue
				}
				if position < last && !got[receiver] {
					t.Fatalf("%s came after the one of %d ms for the first time", receiver, last)
				}
				got[receiver], last = true, max(last, position)
			}
		}
		for n := 0; len(got) < many+20 && n < 1000; n++ {
			if n < 20 {
				change(many + 1 + n) // while a replay is under way
				b.l.drainInbox()
			}
			if w := s.conn.work; w != nil && len(w.receipts) > maxWaitingReceipts+receiptsPageRows {
				t.Fatalf("%d wait", len(w.receipts))
			}
			take()
			if s.buffered > outSoftBytes {
				t.Fatalf("%d bytes buffered", s.buffered)
			}
			s.buffered = 0
			b.pass(200 * time.Millisecond)
		}
		if len(got) != many+20 || s.closed {
			t.Fatalf("%d receipts came, closed %v", len(got), s.closed)
		}
		s.stalled = false
		b.pass(3 * time.Second)
		if s.conn.work != nil {
			t.Fatalf("kept: %+v", s.conn.work.replay)
		}
	})
}

// TestReceiptsMissedOnTheWay: what the inbox has no room for is read from the store, and so is what came while that was read.
func TestReceiptsMissedOnTheWay(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	session := b.live(s)
	receipt := func(n int) protocol.ReceiptPush {
		return protocol.ReceiptPush{To: session, Position: uint64(n), Receiver: fmt.Sprintf("u%d", n), Millis: int64(n)}
	}
	b.stored = []protocol.ReceiptPush{receipt(1), receipt(2), receipt(3)}
	b.l.inbox.bytes = inboxBytes
	b.s.Receipts([]protocol.ReceiptPush{receipt(3), receipt(2), receipt(2)})
	if f := &b.l.inbox.filling; len(f.missed) != 1 || f.missed[0].since != 2 {
		t.Fatalf("%+v", f.missed)
	}
	b.l.drainInbox()
	if len(b.replays) != 1 || b.replays[0].After.Millis != 2 {
		t.Fatalf("%+v", b.replays)
	}
	b.stored[0].Millis = 4 // changes again, and its page was read before
	late := b.replays[0]
	b.replays = nil
	b.s.Receipts([]protocol.ReceiptPush{b.stored[0]})
	b.s.ReceiptsPage(protocol.ReceiptsPage{To: session, Receipts: []protocol.ReceiptPush{receipt(2), receipt(3)}, Next: late.After, End: true})
	b.l.drainInbox()
	if len(b.replays) != 1 || b.replays[0].After.Millis != 4 {
		t.Fatalf("%+v", b.replays)
	}
	// One that could not be read is asked for again.
	b.s.ReceiptsPage(protocol.ReceiptsPage{To: session, Refusal: protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 1}})
	b.replays = nil
	b.l.drainInbox()
	b.stored = b.stored[:1]
	b.pass(2 * time.Second)
	if got := strings.ReplaceAll(s.read(), "; ", " + "); got != "receipt u2 2 0 + receipt u3 3 0 + receipt u1 1 0" || s.conn.work != nil {
		t.Fatalf("%s; %+v", got, s.conn.work)
	}
}

func TestDeadlines(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		t.Run("request", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.accept()
			for _, c := range []byte("GET /ws HTTP/1.1\r\nHost: x\r\n") {
				b.pass(100 * time.Millisecond) // bytes that trickle do not help
				if !s.closed {
					s.receive([]byte{c})
				}
			}
			b.pass(3 * time.Second)
			if !s.closed || b.l.m.handshakes[handshakeTimeout] != 1 || b.l.slots.at(0).work != nil {
				t.Fatal("not closed")
			}
		})
		t.Run("authentication", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.accept()
			s.receive([]byte(upgradeText(sub, "")))
			s.out = nil
			b.pass(4900 * time.Millisecond)
			s.wants("")
			b.pass(200 * time.Millisecond)
			s.wants("error timeout; close 4408")
		})
		t.Run("frame", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			frame := encode(s.conn.text(), sendFrame(1, strings.Repeat("x", 100)))
			for i := range 35 {
				if s.conn.state == stateOpen {
					s.receive(frame[i : i+1])
				}
				b.pass(time.Second)
			}
			s.wants("error timeout; close 4408")
		})
		t.Run("heartbeat", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, "alice", "phone")
			b.pass(24900 * time.Millisecond)
			s.wants("")
			b.pass(200 * time.Millisecond)
			s.wants(`9 ""`)
			b.pass(20 * time.Second)
			s.wants("")
			s.receive(final(ws.OpPong, ""))
			b.pass(25 * time.Second)
			s.wants(`9 ""`)
			b.pass(24900 * time.Millisecond)
			s.wants("")
			b.pass(200 * time.Millisecond)
			s.wants("error timeout; close 4408")
		})
		t.Run("token", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, fmt.Sprintf("alice until %d", b.now.Unix()+100), "phone")
			alive := func(d time.Duration) {
				for ; d > 0; d -= 10 * time.Second {
					s.receive(final(ws.OpPong, ""))
					b.pass(min(d, 10*time.Second))
				}
			}
			alive(39 * time.Second)
			s.wants("")
			alive(2 * time.Second)
			s.wants("renew 60000")
			renew := func(token string) { s.frame(&protocol.Frame{Kind: protocol.KindRenewToken, Token: []byte(token)}) }
			renew("bob")
			s.wants("error unauthorized")
			b.pass(time.Second)
			renew("expired")
			s.wants("error token_expired")
			b.pass(time.Second)
			renew(fmt.Sprintf("alice until %d", b.now.Unix()+80))
			s.wants("renewed")
			alive(25 * time.Second)
			s.wants("renew 60000")
			alive(60 * time.Second)
			s.wants("error token_expired; close 4401")
		})
		t.Run("token past its end", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.open(sub, fmt.Sprintf("alice until %d", b.now.Unix()-10), "phone")
			b.pass(10 * time.Second)
			if s.conn.state != stateOpen {
				t.Fatal("a token within the skew is taken and then closed")
			}
			if token.Skew != 60*time.Second {
				t.Fatal("skew")
			}
		})
	})
}

func TestGoingAway(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		idle, busy := b.open(sub, "alice", "phone"), b.open(sub, "bob", "phone")
		silent, asking, fresh := b.open(sub, "carol", "phone"), b.accept(), b.accept()
		asking.receive([]byte(upgradeText(sub, ""))[:50])
		busy.frame(sendFrame(1, "x"))
		silent.frame(sendFrame(1, "x"))
		b.s.draining.Store(true)
		b.s.spreadMs.Store(5000)
		b.l.drainInbox()
		idle.wants("go_away; close 1012")
		busy.wants("go_away")
		silent.wants("go_away")
		if !fresh.closed {
			t.Fatal("a connection that asked for nothing stays")
		}
		asking.receive([]byte(upgradeText(sub, ""))[50:])
		if got := string(asking.out); !strings.HasPrefix(got, "HTTP/1.1 503 ") || !strings.Contains(got, "\r\nRetry-After: ") || !strings.Contains(got, "\r\nConnection: close\r\n") {
			t.Fatal(got)
		}
		busy.frame(sendFrame(2, "x"))
		busy.wants("error shutting_down 2 from 2 retry")
		session := b.l.session(busy.conn)
		b.s.Push([]protocol.Push{{To: session, Message: testMessage(1, "bob", "x")}})
		b.s.Notify([]protocol.Session{session})
		b.s.Answer([]protocol.Answer{{To: session, Seq: 1}})
		b.l.drainInbox()
		busy.wants("received 1; close 1012")
		if len(b.settled) != 1 || b.settled[0].Kind != protocol.Refused {
			t.Fatalf("settled %+v", b.settled)
		}
		b.pass(8 * time.Second)
		silent.wants("close 1012")
		b.pass(3 * time.Second)
		if n := b.s.connections.Load(); n != 0 {
			t.Fatalf("%d connections left", n)
		}
	})
}

// TestGoingAwayWhileRegistering: whoever is registered during a drain is sent away, and its route is taken back.
func TestGoingAwayWhileRegistering(t *testing.T) {
	b := newBench(t, nil)
	s := b.accept()
	s.receive([]byte(upgradeText("", "")))
	s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
	b.s.draining.Store(true)
	b.l.drainInbox()
	b.s.Registered(protocol.Registered{To: b.asked[0].Session})
	b.l.drainInbox()
	s.close()
	if fmt.Sprint(b.gone) != "[alice/default]" || s.conn.state != stateFree {
		t.Fatalf("unregistered %v, state %d", b.gone, s.conn.state)
	}
}

// TestWriteFailsWithinTheTurn: gnet closes within Write, and the turn goes on for the others.
func TestWriteFailsWithinTheTurn(t *testing.T) {
	b := newBench(t, nil)
	var sockets []*fakeSocket
	var pushes []protocol.Push
	for i := range 5 {
		s := b.open(protocol.SubprotocolBinary, fmt.Sprintf("user%d", i), "phone")
		pushes = append(pushes, protocol.Push{To: b.live(s), Message: testMessage(i+1, fmt.Sprintf("user%d", i), "x")})
		sockets = append(sockets, s)
	}
	sockets[1].broken, sockets[3].broken = true, true
	b.s.Push(pushes)
	b.l.drainInbox()
	for i, s := range sockets {
		if want := i == 1 || i == 3; s.closed != want {
			t.Errorf("%d: closed %v", i, s.closed)
		}
	}
	sockets[0].wants("incoming 1")
	sockets[4].wants("incoming 5")
	var lost []string
	for _, o := range b.settled {
		lost = append(lost, fmt.Sprintf("%d %s/%s", o.Kind, o.user, o.device))
	}
	if fmt.Sprint(lost) != "[2 user1/phone 2 user3/phone]" {
		t.Error(lost)
	}
	if b.s.connections.Load() != 3 || b.l.turning || len(b.l.dirty) != 0 {
		t.Errorf("%d connections", b.s.connections.Load())
	}
	// The slots are used again, under other handles.
	again := b.open(protocol.SubprotocolBinary, "dave", "phone")
	for _, p := range pushes {
		if p.To.Conn == b.l.session(again.conn).Conn {
			t.Error("a handle came twice")
		}
	}
	b.s.Push(pushes[3:4])
	b.l.drainInbox()
	again.wants("")
	// And when the answer to what was just read cannot be written.
	sockets[0].broken = true
	sockets[0].receive(final(ws.OpPing, "x"))
	if !sockets[0].closed {
		t.Error("not closed")
	}
}

// TestPanicCostsOneConnection: what is behind the item that panics is handled all the same.
func TestPanicCostsOneConnection(t *testing.T) {
	b := newBench(t, nil)
	a, c := b.open(protocol.SubprotocolBinary, "alice", "phone"), b.open(protocol.SubprotocolBinary, "carol", "phone")
	a.frame(sendFrame(1, "x"))
	c.frame(sendFrame(1, "x"))
	toA, toC := b.live(a), b.live(c)
	broken := &protocol.Message{ID: testID(1), Position: 1}
	b.s.Push([]protocol.Push{{To: toA, Message: broken}})
	b.s.Answer([]protocol.Answer{{To: toC, Seq: 1}})
	b.l.inbox.filling.pushes[0].Message = nil // as a bug would
	b.l.drainInbox()
	if !a.closed || b.l.m.panics != 1 {
		t.Fatalf("closed %v, %d panics", a.closed, b.l.m.panics)
	}
	c.wants("received 1")

	b.publish = func(*protocol.Submission) protocol.Refusal { panic("bug") }
	c.frame(sendFrame(2, "x"))
	if !c.closed || b.l.m.panics != 2 || b.l.m.closes[closePanic] != 2 || b.s.connections.Load() != 0 {
		t.Fatalf("closed %v, %d panics", c.closed, b.l.m.panics)
	}
}

func TestInboxBudget(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	session := b.live(s)
	big := testMessage(1, "alice", strings.Repeat("x", 4000))
	n := inboxBytes/(pushBytes+4000) + 5
	list := make([]protocol.Push, n)
	for i := range list {
		m := *big
		m.ID, m.Position = testID(uint64(i)), uint64(i)
		list[i] = protocol.Push{To: session, Device: "phone", Message: &m}
	}
	b.s.Push(list)
	size, drops := b.l.inbox.size()
	if size > inboxBytes || drops.pushes != 5 {
		t.Fatalf("%d bytes wait, %d pushes refused", size, drops.pushes)
	}
	last := b.settled[len(b.settled)-1] // at once: the owner does not wait for the loop
	if last.Kind != protocol.Refused || last.Position != uint64(n-1) || last.user != "alice" || last.device != "phone" {
		t.Fatalf("%+v", last)
	}
	// What is behind a refused push must not overtake it, however small it is.
	b.s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(n, "alice", "x")}})
	for range 1000 {
		b.s.Notify([]protocol.Session{session}) // always taken, and bounded all the same
		b.s.Push(list[n-1:])
	}
	if f := &b.l.inbox.filling; len(f.notices) != 1 || len(f.refused) != 1 {
		t.Fatalf("%d notices, %d refusals wait for one session", len(f.notices), len(f.refused))
	}
	b.s.Page(protocol.Page{To: session, Rows: []protocol.MailboxRow{{Message: list[0].Message}}})
	if p := b.l.inbox.filling.pages[0]; p.Code != protocol.CodeOverloaded || p.Rows != nil {
		t.Fatalf("a page over the budget: %+v", p)
	}
	b.l.drainInbox()
	if b.l.m.notices != 1 || s.conn.down.Live() {
		t.Fatalf("%d notices, live %v", b.l.m.notices, s.conn.down.Live())
	}
	if strings.Contains(s.read(), fmt.Sprintf("incoming %d", n)) {
		t.Fatal("a push overtook one that was refused")
	}
	b.s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(n+1, "alice", "x")}})
	b.l.drainInbox()
	s.wants("") // of the old generation
	if size, _ := b.l.inbox.size(); size != 0 || cap(b.l.inbox.draining.pushes) > inboxKeep {
		t.Fatal("the inbox keeps what it held")
	}
}

// TestMisaddressed is P5: a push or a row that is for another user is not written, wherever the mistake was made.
func TestMisaddressed(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	session := b.l.session(s.conn)
	b.s.Page(protocol.Page{To: session, Rows: []protocol.MailboxRow{{Message: testMessage(1, "bob", "x")}, {Message: testMessage(2, "alice", "x")}}, End: true})
	b.l.drainInbox()
	s.wants("incoming 2")
	b.live(s)
	b.s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(3, "alicex", "x")}})
	b.l.drainInbox()
	s.wants("")
	if b.l.m.misaddressed != 2 || len(b.settled) != 1 || b.settled[0].Kind != protocol.Refused || b.settled[0].user != "alicex" {
		t.Fatalf("%d counted, settled %+v", b.l.m.misaddressed, b.settled)
	}
}

func TestReceiptBudget(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	list := make([]protocol.ReceiptPush, inboxBytes/receiptBytes+7)
	for i := range list {
		list[i] = protocol.ReceiptPush{To: b.l.session(s.conn), Receiver: "bob"}
	}
	b.s.Receipts(list)
	b.s.Receipts(list[:3])
	if size, drops := b.l.inbox.size(); size > inboxBytes || drops.receipts != 10 {
		t.Fatalf("%d bytes wait, %d dropped", size, drops.receipts)
	}
}

// TestSweepSlices: with the usual ten slices, every connection is looked at once a second.
func TestSweepSlices(t *testing.T) {
	b := newBench(t, func(c *Config) { c.sweepSlices = 0; c.MaxConnections = 10_000 })
	var sockets []*fakeSocket
	for range 12*slotChunk + 5 {
		sockets = append(sockets, b.accept())
	}
	b.pass(5 * time.Second)
	b.pass(time.Second)
	for i, s := range sockets {
		if !s.closed {
			t.Fatalf("connection %d is past its deadline by a second", i)
		}
	}
}

// TestInboxOrder: kinds do not overtake each other.
func TestInboxOrder(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	session := b.live(s)
	s.frame(sendFrame(1, "x"))
	b.s.Push([]protocol.Push{{To: session, Message: testMessage(1, "alice", "x")}})
	b.s.Answer([]protocol.Answer{{To: session, Seq: 1}})
	b.s.Push([]protocol.Push{{To: session, Message: testMessage(2, "alice", "x")}})
	b.s.Notify([]protocol.Session{session})
	b.s.Push([]protocol.Push{{To: session, Message: testMessage(3, "alice", "x")}})
	b.l.drainInbox()
	s.wants("incoming 1 + received 1 + incoming 2")
	if len(b.settled) != 1 || b.settled[0].Position != 3 {
		t.Fatalf("settled %+v: what comes after a notice is refused", b.settled)
	}
	other := session
	other.Edge++
	b.s.Push([]protocol.Push{{To: other, Message: testMessage(4, "alice", "x")}, {To: protocol.Session{Edge: 3, Conn: 9 << 56}, Message: testMessage(5, "alice", "x")}})
	if b.s.strays.Load() != 2 || len(b.l.inbox.filling.runs) != 0 {
		t.Fatal("a stray push was taken")
	}
	b.l.inbox.close()
	b.s.Answer([]protocol.Answer{{To: session, Seq: 1}})
	b.s.Push([]protocol.Push{{To: session, Message: testMessage(4, "alice", "x")}})
	b.s.Replace(session)
	if b.s.strays.Load() != 5 {
		t.Fatal("a closed inbox took something")
	}
}

func TestSlab(t *testing.T) {
	var s slab
	seen := map[uint64]bool{}
	var open []*conn
	for round := range 3 * slotChunk {
		c := s.take()
		if c.serial == 0 || c.work != nil {
			t.Fatalf("%+v", c)
		}
		c.state = stateOpen
		h := handle(7, c.slot, c.serial)
		if seen[h] || s.find(h) != c || handleLoop(h) != 7 {
			t.Fatalf("handle %x", h)
		}
		seen[h] = true
		if open = append(open, c); round%3 == 2 {
			gone := open[0]
			open = open[1:]
			h := handle(7, gone.slot, gone.serial)
			s.put(gone)
			if s.find(h) != nil {
				t.Fatal("a freed connection was found")
			}
		}
	}
	if s.find(handle(0, maxSlots-1, 1)) != nil || s.find(0) != nil {
		t.Fatal("found what never was")
	}
	last := open[0]
	last.serial = ^uint32(0)
	s.put(last)
	if c := s.take(); c == last {
		t.Fatal("a slot whose serials are used up was used again")
	}
}

func TestNameArena(t *testing.T) {
	var a nameArena
	type kept struct {
		ref          nameRef
		user, device string
	}
	var list []kept
	for i := range 2000 {
		user, device := strings.Repeat("u", i%64+1), strings.Repeat("d", i*7%32+1)
		list = append(list, kept{a.add(user, []byte(device)), user, device})
		if i%3 == 0 {
			j := i * 31 % len(list)
			a.remove(list[j].ref)
			list = slices.Delete(list, j, j+1)
		}
	}
	for _, k := range list {
		if user, device := a.get(k.ref); string(user) != k.user || string(device) != k.device {
			t.Fatalf("got %s %s, want %s %s", user, device, k.user, k.device)
		}
	}
	used := a[0].size
	for range 100 {
		a.remove(a.add("a", []byte("b")))
	}
	if a[0].size > used+1 {
		t.Fatal("freed blocks are not used again")
	}
	if u, d := a.get(nameRef{}); u != nil || d != nil {
		t.Fatal("no name is a name")
	}
	a.remove(nameRef{})
}

// TestHardLimitEndsOneSession: a connection over the hard limit is counted out once.
func TestHardLimitEndsOneSession(t *testing.T) {
	b := newBench(t, nil)
	a := b.open(protocol.SubprotocolBinary, "alice", "phone")
	b.open(protocol.SubprotocolBinary, "bob", "phone")
	a.stalled = true
	for range 100 {
		var data []byte
		for range 100 {
			data = append(data, clientFrame(9, true, make([]byte, 125))...)
		}
		if a.closed {
			break
		}
		a.receive(data)
	}
	if !a.closed || b.l.sessions != 1 {
		t.Fatalf("closed %v, %d sessions", a.closed, b.l.sessions)
	}
}

// TestNothingFollowsTheClose: a connection that is silent in the middle of a frame gets one close.
func TestNothingFollowsTheClose(t *testing.T) {
	b := newBench(t, func(c *Config) { c.HeartbeatSeconds = 15 })
	a := b.open(protocol.SubprotocolBinary, "alice", "phone")
	b.live(a)
	a.receive([]byte{0x82, 0x85}) // half a header
	a.out = nil
	b.pass(32 * time.Second)
	if got := a.read(); got != `9 ""; error timeout; close 4408` {
		t.Fatal(got)
	}
}

// TestPanicInFlush: a bug that panics while output is written costs the connection that met it.
func TestPanicInFlush(t *testing.T) {
	b := newBench(t, nil)
	a := b.open(protocol.SubprotocolBinary, "alice", "phone")
	s := b.live(a)
	list := make([]protocol.ReceiptPush, protocol.MaxReceiptsPerFrame)
	for i := range list {
		list[i] = protocol.ReceiptPush{To: s, Receiver: "bob", Position: 1}
	}
	b.s.Receipts(list)
	a.conn.flags |= flagBacklog
	a.panics = true
	b.l.drainInbox()
	if !a.closed || b.l.m.panics != 1 {
		t.Fatalf("closed %v after %d panics", a.closed, b.l.m.panics)
	}
}

// TestFrameOfTheServerEndsNoNumber: a client that sends a server's frame gets an error and changes nothing.
func TestFrameOfTheServerEndsNoNumber(t *testing.T) {
	b := newBench(t, nil)
	b.publish = func(*protocol.Submission) protocol.Refusal {
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: 9}
	}
	a := b.open(protocol.SubprotocolBinary, "alice", "phone")
	a.frame(sendFrame(1, "a"))
	a.read()
	a.frame(&protocol.Frame{Kind: protocol.KindReceived, Seq: 1})
	a.wants("error unknown_action")
	a.frame(sendFrame(2, "b"))
	a.wants("error overloaded 2 from 1 retry")
}

// TestSendsWithoutANumber: of those in one message 16 are answered.
func TestSendsWithoutANumber(t *testing.T) {
	b := newBench(t, nil)
	a := b.open(protocol.SubprotocolBinary, "alice", "phone")
	a.read()
	var data []byte
	for range 40 {
		data = protocol.AppendBinary(data, sendFrame(0, "x"))
	}
	a.receive(clientFrame(2, true, data))
	if got := strings.Count(a.read(), "error bad_request"); got != maxBadFrames || b.l.m.drops[dropBadFrame] != 40-maxBadFrames {
		t.Fatalf("%d answered, %d dropped", got, b.l.m.drops[dropBadFrame])
	}
}

// TestRenewWithATokenThatEndsNoLater: it is accepted, and not asked for again every second.
func TestRenewWithATokenThatEndsNoLater(t *testing.T) {
	b := newBench(t, nil)
	a := b.accept()
	a.receive([]byte(upgradeText(protocol.SubprotocolBinary, "")))
	a.out = nil
	token := fmt.Appendf(nil, "alice until %d", b.now.Unix()+90)
	a.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: token, Device: []byte("phone")})
	b.s.Registered(protocol.Registered{To: b.asked[0].Session})
	b.l.drainInbox()
	a.read()
	asked := 0
	for range 900 {
		b.pass(100 * time.Millisecond)
		if len(a.out) > 0 && strings.HasPrefix(a.read(), "renew ") {
			asked++
			a.frame(&protocol.Frame{Kind: protocol.KindRenewToken, Token: token})
			a.read()
		}
	}
	if asked != 1 {
		t.Fatalf("asked %d times", asked)
	}
}

// TestTooLargeIsSaid: a message over a limit is refused by its code before the close.
func TestTooLargeIsSaid(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		s := b.open(sub, "alice", "phone")
		op := ws.OpBinary
		if s.conn.text() {
			op = ws.OpText
		}
		s.receive(clientFrame(op, true, make([]byte, s.conn.limit()+1)))
		s.wants("error frame_too_large; close 1009")
	})
}

// TestBrokenPromisesAreCounted: a refusal that says nothing of trying again, and a flight over its limit, as only a bug makes them.
func TestBrokenPromisesAreCounted(t *testing.T) {
	b := newBench(t, nil)
	s := b.open(protocol.SubprotocolBinary, "alice", "phone")
	b.live(s)
	b.publish = func(*protocol.Submission) protocol.Refusal { return protocol.Refusal{Code: protocol.CodeOverloaded} }
	s.frame(sendFrame(1, "x"))
	s.conn.down.flight.pending = make([]Pending, protocol.MaxUnacknowledged+1)
	b.l.begin()
	b.l.written(s.conn, testMessage(1, "alice", "x"))
	b.l.end()
	b.pass(100 * time.Millisecond) // publishes the counters
	got := map[string]float64{}
	b.s.Metrics(func(name, _ string, _ bool, value float64, labels ...string) {
		if name == "millrace_edge_invariant_violations_total" {
			got[labels[1]] = value
		}
	})
	if fmt.Sprint(got) != "map[P5:0 P6:1 P7:1]" {
		t.Fatal(got)
	}
}

// TestPagesOfLongMessages: a page holds about what there is room for, so that a reader of long messages, slow or fast, does not
// have its mailbox read many times over.
func TestPagesOfLongMessages(t *testing.T) {
	for _, slow := range []bool{true, false} {
		b := newBench(t, nil)
		s := b.open(protocol.SubprotocolBinary, "alice", "phone")
		s.stalled = true
		const total = 300
		var box []*protocol.Message
		for n := range total {
			box = append(box, testMessage(n+1, "alice", strings.Repeat("x", 4000)))
		}
		rows, answered, written, acknowledged := 0, 0, 0, 0
		for range 5000 {
			for ; answered < len(b.pages); answered++ {
				r := b.pages[answered]
				p := protocol.Page{To: r.Session, After: r.After, End: true}
				for _, m := range box[acknowledged:] {
					if r.After.DeviceMailbox && m.Position <= r.After.Position {
						continue
					}
					if len(p.Rows) == r.Limit {
						p.End = false
						break
					}
					p.Rows = append(p.Rows, protocol.MailboxRow{Message: m})
					p.Next = protocol.MailboxCursor{DeviceMailbox: true, Position: m.Position, ID: m.ID}
				}
				rows += len(p.Rows)
				b.s.Page(p)
				b.l.drainInbox()
				written = int(b.l.m.drained)
			}
			if acknowledged == written {
				if written == total {
					break
				}
				s.buffered = 0
				b.pass(time.Second)
				continue
			}
			if acknowledged++; slow {
				s.buffered = max(0, s.buffered-4100)
			} else {
				s.buffered = 0
			}
			s.frame(&protocol.Frame{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{testID(uint64(acknowledged))}})
		}
		if written != total || rows > 4*total {
			t.Errorf("slow %v: %d of %d written, %d rows read", slow, written, total, rows)
		}
		t.Logf("slow %v: %d pages, %d rows", slow, len(b.pages), rows)
	}
}
