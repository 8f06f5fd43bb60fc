package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
	"millrace/protocol/token"
)

// walkPatience is how long one frame may take, with the race detector on a busy machine too. It is only ever waited out by a test
// that fails.
const walkPatience = time.Minute

// walkEncodings are the two subprotocols; what holds for one holds for the other.
var walkEncodings = []walkEncoding{
	{"binary", "millrace.v1", ws.OpBinary, protocol.AppendBinary, protocol.ParseBinary},
	{"json", "millrace.v1.json", ws.OpText, appendJSONLine, func(src []byte, f *protocol.Frame) ([]byte, *protocol.FrameError) {
		return protocol.ParseJSON(src, true, f)
	}},
}

type walkEncoding struct {
	name, subprotocol string
	op                ws.OpCode
	encode            func(dst []byte, f *protocol.Frame) []byte
	parse             func(src []byte, f *protocol.Frame) ([]byte, *protocol.FrameError)
}

// appendJSONLine ends each object with a newline, so that several may share a message.
func appendJSONLine(dst []byte, f *protocol.Frame) []byte {
	return append(protocol.AppendJSON(dst, f), '\n')
}

// walkServer is a whole server on free ports, and the directory it can be started on again.
type walkServer struct {
	*Millrace
	t   *testing.T
	cfg Config
}

func walkConfig(t *testing.T, dir string) Config {
	t.Helper()
	cfg := defaultConfig()
	cfg.Edge.Addr, cfg.Admin.Addr = "127.0.0.1:0", "127.0.0.1:0"
	cfg.Edge.MessageRate, cfg.Edge.UserLogins = 0, 0
	cfg.Data.Dir = dir
	if walkOverTLS != nil {
		cfg.Edge.TLSCert, cfg.Edge.TLSKey = walkOverTLS.cert, walkOverTLS.key
	}
	cfg.Data.MinFreeBytes = minFreeFloor // the figures of this machine's disk are no part of the test
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func startWalk(t *testing.T) *walkServer {
	t.Helper()
	s := &walkServer{t: t, cfg: walkConfig(t, t.TempDir())}
	s.start()
	t.Cleanup(func() {
		if s.Millrace != nil {
			s.stop()
		}
	})
	return s
}

func (s *walkServer) start() {
	s.t.Helper()
	m, err := start(context.Background(), s.cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	s.Millrace = m
}

func (s *walkServer) stop() {
	s.t.Helper()
	wantNoViolations(s.t, s.AdminAddr())
	if err := s.Close(); err != nil {
		s.t.Errorf("close: %v", err)
	}
	s.Millrace = nil
}

func (s *walkServer) token(user string) []byte {
	s.t.Helper()
	secret, err := readSecret(s.cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	signed, err := token.SignHS256(secret, user, time.Now(), time.Hour)
	if err != nil {
		s.t.Fatal(err)
	}
	return []byte(signed)
}

// walkClient is one WebSocket connection that shows every frame. It is used by one goroutine at a time.
type walkClient struct {
	t    *testing.T
	enc  walkEncoding
	conn net.Conn
	from *walkStream // conn, behind what came with the upgrade
	hand []*protocol.Frame

	connected *protocol.Frame
	next      uint64 // the number of the next new send
}

// walkStream reads what the dialer had buffered before the rest, and writes to the connection.
type walkStream struct {
	net.Conn
	early *bytes.Reader
}

func (s *walkStream) Read(p []byte) (int, error) {
	if s.early != nil && s.early.Len() > 0 {
		return s.early.Read(p)
	}
	return s.Conn.Read(p)
}

// dialWalk upgrades and does not connect yet. header is for a token in the upgrade, or nil.
func (s *walkServer) dialWalk(enc walkEncoding, query string, header http.Header) (*walkClient, error) {
	d := ws.Dialer{Protocols: []string{enc.subprotocol}, Timeout: walkPatience}
	if header != nil {
		d.Header = ws.HandshakeHeaderHTTP(header)
	}
	scheme := "ws://"
	if walkOverTLS != nil {
		scheme, d.TLSConfig = "wss://", walkOverTLS.config()
	}
	conn, br, hs, err := d.Dial(context.Background(), scheme+s.EdgeAddr()+"/ws"+query)
	if err != nil {
		return nil, err
	}
	c := &walkClient{t: s.t, enc: enc, conn: conn, from: &walkStream{Conn: conn}}
	if br != nil {
		early, _ := br.Peek(br.Buffered())
		c.from.early = bytes.NewReader(bytes.Clone(early))
	}
	if hs.Protocol != enc.subprotocol {
		conn.Close()
		return nil, fmt.Errorf("server chose subprotocol %q of %q", hs.Protocol, enc.subprotocol)
	}
	return c, nil
}

func (s *walkServer) dial(enc walkEncoding) *walkClient {
	s.t.Helper()
	c, err := s.dialWalk(enc, "", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.drop)
	return c
}

// connect logs a device in; after is receipts_after.
func (s *walkServer) connect(enc walkEncoding, user, device string, epoch uint64, after int64) *walkClient {
	s.t.Helper()
	c := s.dial(enc)
	c.write(&protocol.Frame{Kind: protocol.KindConnect, Token: s.token(user), Device: []byte(device), Epoch: epoch, ReceiptsAfter: after})
	c.welcome(user, device, epoch)
	return c
}

// welcome reads connected, which stands before everything else.
func (c *walkClient) welcome(user, device string, epoch uint64) {
	c.t.Helper()
	f := c.read()
	if f.Kind != protocol.KindConnected || string(f.User) != user || string(f.Device) != device ||
		f.Epoch == 0 || epoch != 0 && f.Epoch != epoch || f.HeartbeatSeconds != protocol.HeartbeatSeconds || f.Timestamp == 0 {
		c.t.Fatalf("connected of %s/%s: %s", user, device, describe(f))
	}
	c.connected, c.next = f, f.Seq
}

// tryWrite sends the frames as one WebSocket message.
func (c *walkClient) tryWrite(frames ...*protocol.Frame) error {
	var message []byte
	for _, f := range frames {
		message = c.enc.encode(message, f)
	}
	return c.writeRaw(message)
}

func (c *walkClient) writeRaw(message []byte) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(walkPatience)); err != nil {
		return err
	}
	return wsutil.WriteClientMessage(c.conn, c.enc.op, message)
}

func (c *walkClient) write(frames ...*protocol.Frame) {
	c.t.Helper()
	if err := c.tryWrite(frames...); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// tryRead is the next frame of the connection, whatever it is. A close is a walkClosed.
func (c *walkClient) tryRead() (*protocol.Frame, error) {
	for len(c.hand) == 0 {
		if err := c.conn.SetReadDeadline(time.Now().Add(walkPatience)); err != nil {
			return nil, err
		}
		message, err := c.readMessage()
		if err != nil {
			return nil, err
		}
		for len(message) > 0 {
			f := new(protocol.Frame) // points into message, which is its own
			rest, refused := c.enc.parse(message, f)
			if refused != nil {
				return nil, fmt.Errorf("frame of the server: %w", refused)
			}
			c.hand, message = append(c.hand, f), rest
		}
	}
	f := c.hand[0]
	c.hand = c.hand[1:]
	return f, nil
}

// walkClosed is the close code of the server.
type walkClosed ws.StatusCode

func (c walkClosed) Error() string { return fmt.Sprintf("closed with code %d", uint16(c)) }

// readMessage is the next message of data. A server does not fragment; its pings are answered.
func (c *walkClient) readMessage() ([]byte, error) {
	for {
		//lint:ignore SA1019 the other end is this test's own server
		f, err := ws.ReadFrame(c.from)
		if err != nil {
			return nil, err
		}
		switch h := f.Header; {
		case h.Masked || h.Rsv != 0 || !h.Fin:
			return nil, fmt.Errorf("frame header %+v", h)
		case h.OpCode == ws.OpClose:
			code, _ := ws.ParseCloseFrameData(f.Payload)
			return nil, walkClosed(code)
		case h.OpCode == ws.OpPing:
			if err := wsutil.WriteClientMessage(c.conn, ws.OpPong, f.Payload); err != nil {
				return nil, err
			}
		case h.OpCode == c.enc.op:
			return f.Payload, nil
		default:
			return nil, fmt.Errorf("opcode %#x on %s", h.OpCode, c.enc.name)
		}
	}
}

func (c *walkClient) read() *protocol.Frame {
	c.t.Helper()
	f, err := c.tryRead()
	if err != nil {
		c.t.Fatalf("read: %v", err)
	}
	return f
}

// want is the next frame of a kind; those before it stay for later, in their order.
func (c *walkClient) want(kind protocol.Kind) *protocol.Frame {
	c.t.Helper()
	var passed []*protocol.Frame
	for {
		f := c.read()
		if f.Kind == kind {
			c.hand = append(passed, c.hand...)
			return f
		}
		passed = append(passed, f)
	}
}

// wantClose reads until the connection is closed, with this code. It returns what came before.
func (c *walkClient) wantClose(code protocol.CloseCode) (before []*protocol.Frame) {
	c.t.Helper()
	for {
		f, err := c.tryRead()
		if err == nil {
			before = append(before, f)
			continue
		}
		if !errors.Is(err, walkClosed(code)) {
			c.t.Fatalf("%v, want a close with %d", err, code)
		}
		return before
	}
}

// drop cuts the connection without a word.
func (c *walkClient) drop() { c.conn.Close() }

func walkSend(seq uint64, receiver, content string) *protocol.Frame {
	return &protocol.Frame{Kind: protocol.KindSend, Seq: seq, Receiver: []byte(receiver), Content: []byte(content), Timestamp: 1}
}

// send sends a new message and waits for its answer.
func (c *walkClient) send(receiver, content string) (seq uint64, answer *protocol.Frame) {
	c.t.Helper()
	seq = c.next
	c.next++
	return seq, c.sendAs(seq, receiver, content)
}

func (c *walkClient) sendAs(seq uint64, receiver, content string) (answer *protocol.Frame) {
	c.t.Helper()
	c.write(walkSend(seq, receiver, content))
	answer = c.want(protocol.KindReceived)
	if answer.Seq != seq || answer.ID == (protocol.MessageID{}) || answer.Timestamp == 0 {
		c.t.Fatalf("answer to %d: %s", seq, describe(answer))
	}
	return answer
}

// sendMany sends n messages, "0" to "n-1", keeping the span of open numbers. It may run beside the test's goroutine.
func (c *walkClient) sendMany(receiver string, from, n int) error {
	for sent := 0; sent < n; {
		var batch []*protocol.Frame
		for len(batch) < protocol.MaxOpenSpan && sent < n {
			batch = append(batch, walkSend(c.next, receiver, fmt.Sprint(from+sent)))
			c.next++
			sent++
		}
		if err := c.tryWrite(batch...); err != nil {
			return err
		}
		for open := len(batch); open > 0; {
			f, err := c.tryRead()
			switch {
			case err != nil:
				return err
			case f.Kind == protocol.KindReceived && f.Seq == batch[len(batch)-open].Seq:
				open--
			case f.Kind != protocol.KindReceipt:
				return fmt.Errorf("while %d was open: %s", batch[len(batch)-open].Seq, describe(f))
			}
		}
	}
	return nil
}

// wantIncoming reads the next push and checks all of it.
func (c *walkClient) wantIncoming(id protocol.MessageID, sender, receiver, content string) *protocol.Frame {
	c.t.Helper()
	f := c.want(protocol.KindIncoming)
	if f.ID != id || string(f.Sender) != sender || string(f.Receiver) != receiver || string(f.Content) != content ||
		f.Position == 0 || f.Timestamp != protocol.PositionMillis(f.Position) {
		c.t.Fatalf("incoming: %s, want %v %s→%s %q", describe(f), id, sender, receiver, content)
	}
	return f
}

func (c *walkClient) acknowledge(ids ...protocol.MessageID) {
	c.t.Helper()
	c.write(&protocol.Frame{Kind: protocol.KindAcknowledge, IDs: ids, Timestamp: 1})
}

// wantReceipt reads receipts until one names the message.
func (c *walkClient) wantReceipt(id protocol.MessageID, seq uint64, receiver string, position uint64) protocol.Receipt {
	c.t.Helper()
	for {
		for _, r := range c.want(protocol.KindReceipt).Receipts {
			if r.ID != id {
				continue
			}
			if r.Seq != seq || string(r.Receiver) != receiver || r.Position != position || r.Timestamp == 0 {
				c.t.Fatalf("receipt: %+v, want number %d, receiver %s, position %d", r, seq, receiver, position)
			}
			return r
		}
	}
}

// wantError reads the next frame, which must be this error.
func (c *walkClient) wantError(code protocol.Code, seq uint64) {
	c.t.Helper()
	if f := c.want(protocol.KindError); f.Code != code || f.Seq != seq || len(f.Text) == 0 {
		c.t.Fatalf("error: %s, want %v about %d", describe(f), code, seq)
	}
}

// wantNothingMore says that no frame was passed over.
func (c *walkClient) wantNothingMore() {
	c.t.Helper()
	for _, f := range c.hand {
		c.t.Errorf("nobody waited for %s", describe(f))
	}
}

func describe(f *protocol.Frame) string {
	return fmt.Sprintf("kind %#x user %s device %s epoch %x %s→%s %q number %d id %v position %d time %d code %v from %d retry %d text %q receipts %d",
		f.Kind, f.User, f.Device, f.Epoch, f.Sender, f.Receiver, f.Content, f.Seq, f.ID, f.Position, f.Timestamp, f.Code, f.ResendFrom,
		f.RetryAfterMs, f.Text, len(f.Receipts))
}

// eachEncoding runs a test over both subprotocols at once, each with a server of its own.
func eachEncoding(t *testing.T, run func(t *testing.T, s *walkServer, enc walkEncoding)) {
	for _, enc := range walkEncodings {
		t.Run(enc.name, func(t *testing.T) {
			t.Parallel() // they mostly wait
			run(t, startWalk(t), enc)
		})
	}
}

// TestWalk follows messages from alice to bob: online, offline, sent again, and with receipts while alice is away.
func TestWalk(t *testing.T) {
	for _, a := range walkEncodings {
		for _, b := range walkEncodings {
			t.Run(a.name+" to "+b.name, func(t *testing.T) {
				t.Parallel()
				walk(t, startWalk(t), a, b)
			})
		}
	}
}

func walk(t *testing.T, s *walkServer, a, b walkEncoding) {
	const epoch = 0x0f1e2d3c4b5a6978
	alice := s.connect(a, "alice", "phone", epoch, 0)
	tablet := s.connect(a, "alice", "tablet", 0, 0)
	bob := s.connect(b, "bob", "phone", 0, 0)
	laptop := s.connect(b, "bob", "laptop", 0, 0)
	if alice.connected.Seq != 1 || tablet.connected.Seq != 1 {
		t.Fatalf("first numbers %d and %d", alice.connected.Seq, tablet.connected.Seq)
	}

	// Online: both devices of bob get it; both of alice get the receipt, only the sender's with the number.
	seq, online := alice.send("bob", "hi ✓ \x00\u202e")
	shown := bob.wantIncoming(online.ID, "alice", "bob", "hi ✓ \x00\u202e")
	if also := laptop.wantIncoming(online.ID, "alice", "bob", "hi ✓ \x00\u202e"); also.Position != shown.Position {
		t.Fatalf("positions %d and %d of one message", shown.Position, also.Position)
	}
	if online.Position != 0 && online.Position != shown.Position {
		t.Fatalf("answered with position %d, shown at %d", online.Position, shown.Position)
	}
	bob.acknowledge(online.ID)
	receipt := alice.wantReceipt(online.ID, seq, "bob", shown.Position)
	tablet.wantReceipt(online.ID, 0, "bob", shown.Position)
	laptop.acknowledge(online.ID)

	// Offline: bob's phone is away, the laptop never comes back; the message waits for the phone.
	bob.drop()
	laptop.drop()
	offSeq, offline := alice.send("bob", "later")

	// Receipts while away: bob acknowledges when alice's phone is gone; it hears of it on return.
	alice.drop()
	bob = s.connect(b, "bob", "phone", 0, 0)
	waited := bob.wantIncoming(offline.ID, "alice", "bob", "later")
	if waited.Position <= shown.Position {
		t.Fatalf("position %d after %d", waited.Position, shown.Position)
	}
	bob.acknowledge(offline.ID)
	tablet.wantReceipt(offline.ID, 0, "bob", waited.Position)
	alice = s.connect(a, "alice", "phone", epoch, receipt.Timestamp)
	if alice.connected.Seq != 1<<20|1 {
		t.Fatalf("second connection starts at %d", alice.connected.Seq)
	}
	if missed := alice.wantReceipt(offline.ID, offSeq, "bob", waited.Position); missed.Timestamp < receipt.Timestamp {
		t.Fatalf("receipt of %d after one of %d", missed.Timestamp, receipt.Timestamp)
	}

	// Sent again: the same id, no position, and nothing shown twice; other text under the number changes nothing.
	for _, again := range []struct {
		seq     uint64
		content string
		id      protocol.MessageID
	}{{seq, "hi ✓ \x00\u202e", online.ID}, {offSeq, "later", offline.ID}, {offSeq, "changed", offline.ID}} {
		if answer := alice.sendAs(again.seq, "bob", again.content); answer.ID != again.id || answer.Position != 0 {
			t.Fatalf("answer to a resend: %s, want %v", describe(answer), again.id)
		}
	}
	_, marker := alice.send("bob", "marker")
	bob.wantIncoming(marker.ID, "alice", "bob", "marker")
	bob.acknowledge(marker.ID)

	// The other direction, and to oneself: a message like any other.
	seq, reply := bob.send("alice", "yo")
	got := alice.wantIncoming(reply.ID, "bob", "alice", "yo")
	tablet.wantIncoming(reply.ID, "bob", "alice", "yo")
	tablet.acknowledge(reply.ID)
	bob.wantReceipt(reply.ID, seq, "alice", got.Position)
	seq, self := bob.send("bob", "note")
	note := bob.wantIncoming(self.ID, "bob", "bob", "note")
	bob.acknowledge(self.ID)
	bob.wantReceipt(self.ID, seq, "bob", note.Position)
	bob.wantNothingMore()
}

func TestWalkRestart(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		const epoch = 7
		s.connect(enc, "bob", "phone", 0, 0).drop()
		alice := s.connect(enc, "alice", "phone", epoch, 0)
		forBob, answered := alice.send("bob", "keep me")
		forCarol, early := alice.send("carol", "before any device")

		// A second server on the directory is refused before it listens, and the first one lives on.
		second := walkConfig(t, s.cfg.Data.Dir)
		if m, err := start(context.Background(), second, slog.New(slog.DiscardHandler)); err == nil {
			m.Close()
			t.Fatal("two servers on one data directory")
		} else if !strings.Contains(err.Error(), "open data directory") {
			t.Fatalf("second server: %v", err)
		}
		_, third := alice.send("bob", "still here")

		// Going away: told so, then 1012; and nobody new.
		ctx, cancel := context.WithTimeout(context.Background(), walkPatience)
		defer cancel()
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(ctx) }()
		if f := alice.want(protocol.KindGoAway); f.RetryAfterMs == 0 {
			t.Errorf("go_away: %s", describe(f))
		}
		alice.wantClose(protocol.CloseRestart)
		if err := <-drained; err != nil {
			t.Fatalf("drain: %v", err)
		}
		s.stop()
		s.start()

		alice = s.connect(enc, "alice", "phone", epoch, 0)
		if alice.connected.Seq != 1<<20|1 {
			t.Errorf("numbers start at %d after the restart", alice.connected.Seq)
		}
		if again := alice.sendAs(forBob, "bob", "keep me"); again.ID != answered.ID || again.Position != 0 {
			t.Errorf("resend after the restart: %s", describe(again))
		}
		if again := alice.sendAs(forCarol, "carol", "before any device"); again.ID != early.ID {
			t.Errorf("resend after the restart: %s", describe(again))
		}
		bob := s.connect(enc, "bob", "phone", 0, 0)
		bob.wantIncoming(answered.ID, "alice", "bob", "keep me")
		bob.wantIncoming(third.ID, "alice", "bob", "still here")
		_, marker := alice.send("bob", "marker")
		bob.acknowledge(answered.ID, third.ID)
		bob.wantIncoming(marker.ID, "alice", "bob", "marker")
		bob.wantNothingMore()

		// What carol was sent before she had a device is her first one's.
		heir := s.connect(enc, "carol", "first", 0, 0)
		heir.wantIncoming(early.ID, "alice", "carol", "before any device")
		other := s.connect(enc, "carol", "second", 0, 0)
		_, marker = alice.send("carol", "to both")
		other.wantIncoming(marker.ID, "alice", "carol", "to both")
		other.wantNothingMore()
		heir.wantIncoming(marker.ID, "alice", "carol", "to both")
		heir.wantNothingMore()
	})
}

func TestWalkBadFrames(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		c := s.connect(enc, "alice", "phone", 0, 0)
		bad := []struct {
			message []byte
			code    protocol.Code
		}{
			{[]byte(`{"action":"dance"}`), protocol.CodeUnknownAction},
			{[]byte(`{"action":`), protocol.CodeBadRequest},
			{[]byte(`{"action":"send_message","receiver_id":"bob","content":"\ud800"}`), protocol.CodeBadRequest},
		}
		if enc.op == ws.OpBinary {
			bad = bad[:0]
			bad = append(bad, []struct {
				message []byte
				code    protocol.Code
			}{
				{[]byte{0x3f, 0}, protocol.CodeUnknownAction},
				{[]byte{0x03, 0x80}, protocol.CodeBadRequest},
				{[]byte{0x03, 2, 0, 0}, protocol.CodeBadRequest},
			}...)
		}
		for _, b := range bad {
			if err := c.writeRaw(b.message); err != nil {
				t.Fatal(err)
			}
			c.wantError(b.code, 0)
		}
		c.write(&protocol.Frame{Kind: protocol.KindConnect, Token: s.token("alice")})
		c.wantError(protocol.CodeAlreadyConnected, 0)
		refused := []struct {
			seq     uint64
			to      string
			content string
			code    protocol.Code
		}{
			{1, "nobody here", "x", protocol.CodeBadReceiver},
			{2, "bob", "", protocol.CodeEmptyContent},
			{3, "bob", strings.Repeat("é", protocol.MaxContentRunes+1), protocol.CodeContentTooLong},
			{1<<20 | 1, "bob", "x", protocol.CodeBadRequest}, // above this connection's block
		}
		for _, r := range refused {
			c.write(walkSend(r.seq, r.to, r.content))
			c.wantError(r.code, r.seq)
		}
		c.acknowledge(protocol.MessageID{1}) // never pushed: ignored
		c.next = 10
		_, answer := c.send("alice", strings.Repeat("é", protocol.MaxContentRunes))
		c.wantIncoming(answer.ID, "alice", "alice", strings.Repeat("é", protocol.MaxContentRunes))
		c.wantNothingMore()

		// Before connected nothing is forgiven.
		c = s.dial(enc)
		c.write(walkSend(1, "bob", "x"))
		if before := c.wantClose(protocol.CloseNotConnected); len(before) != 1 || before[0].Code != protocol.CodeNotConnected {
			t.Errorf("%d frames before the close", len(before))
		}
		c = s.dial(enc)
		c.write(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("not.a.token")})
		if before := c.wantClose(protocol.CloseUnauthorized); len(before) != 1 || before[0].Code != protocol.CodeUnauthorized {
			t.Errorf("%d frames before the close", len(before))
		}
	})
}

func TestWalkTokenInUpgrade(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		c, err := s.dialWalk(enc, "?device=tab%6cet", http.Header{"Authorization": {"Bearer " + string(s.token("alice"))}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.drop)
		c.welcome("alice", "tablet", 0)
		c.write(&protocol.Frame{Kind: protocol.KindConnect, Token: s.token("alice")})
		c.wantError(protocol.CodeAlreadyConnected, 0)
		var status ws.StatusError
		if _, err := s.dialWalk(enc, "", http.Header{"Authorization": {"Bearer no"}}); !errors.As(err, &status) || status != http.StatusUnauthorized {
			t.Errorf("bad token in the upgrade: %v", err)
		}
	})
}

// TestWalkOneSessionPerDevice logs one device in twice, one after the other and at once.
func TestWalkOneSessionPerDevice(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		old := s.connect(enc, "alice", "phone", 5, 0)
		fresh := s.connect(enc, "alice", "phone", 6, 0)
		wantReplaced(t, old)
		_, answer := fresh.send("alice", "mine")
		fresh.wantIncoming(answer.ID, "alice", "alice", "mine")

		for round := range 5 {
			both := []*walkClient{s.dial(enc), s.dial(enc)}
			connect := &protocol.Frame{Kind: protocol.KindConnect, Token: s.token("bob"), Device: []byte("phone"), Epoch: 9}
			var writing sync.WaitGroup
			for _, c := range both {
				writing.Go(func() {
					if err := c.tryWrite(connect); err != nil {
						t.Error(err)
					}
				})
			}
			writing.Wait()
			// Exactly one ends, and the other one works.
			ended := make(chan *walkClient, 2)
			for _, c := range both {
				go func() {
					for {
						f, err := c.tryRead()
						if err != nil || f.Kind == protocol.KindError {
							if err == nil {
								c.hand = append([]*protocol.Frame{f}, c.hand...)
							}
							ended <- c
							return
						}
						if f.Kind == protocol.KindConnected {
							c.connected, c.next = f, f.Seq
						}
						if f.Kind == protocol.KindIncoming {
							c.hand = append([]*protocol.Frame{f}, c.hand...)
							ended <- c
							return
						}
					}
				}()
			}
			loser := <-ended
			wantReplaced(t, loser)
			content := fmt.Sprint("round ", round)
			sent, answer := fresh.send("bob", content)
			survivor := <-ended
			if survivor == loser {
				t.Fatal("one connection ended twice")
			}
			survivor.wantIncoming(answer.ID, "alice", "bob", content)
			survivor.acknowledge(answer.ID)
			for receipt := fresh.want(protocol.KindReceipt).Receipts; !slices.ContainsFunc(receipt, func(r protocol.Receipt) bool { return r.Seq == sent }); {
				receipt = fresh.want(protocol.KindReceipt).Receipts
			}
			survivor.drop()
		}
	})
}

func wantReplaced(t *testing.T, c *walkClient) {
	t.Helper()
	before := c.wantClose(protocol.CloseSessionReplaced)
	if !slices.ContainsFunc(before, func(f *protocol.Frame) bool {
		return f.Kind == protocol.KindError && f.Code == protocol.CodeSessionReplaced
	}) {
		t.Errorf("closed without session_replaced after %d frames", len(before))
	}
}

// TestWalkDevices lets devices of one user register at once: eight are taken, a ninth is not; and what waited is the
// first one's, whoever that is.
func TestWalkDevices(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		alice := s.connect(enc, "alice", "phone", 0, 0)
		const waiting = 20
		if err := alice.sendMany("bob", 0, waiting); err != nil {
			t.Fatal(err)
		}
		clients := make([]*walkClient, protocol.MaxDevicesPerUser+1)
		for i := range clients {
			clients[i] = s.dial(enc)
		}
		connect := &protocol.Frame{Kind: protocol.KindConnect, Token: s.token("bob")}
		var connecting sync.WaitGroup
		firsts := make([]*protocol.Frame, len(clients))
		for i, c := range clients {
			connecting.Go(func() {
				own := *connect
				own.Device = fmt.Append(nil, "device", i)
				if err := c.tryWrite(&own); err != nil {
					t.Error(err)
					return
				}
				f, err := c.tryRead()
				if err != nil {
					t.Error(err)
					return
				}
				firsts[i] = f
			})
		}
		connecting.Wait()
		if t.Failed() {
			return
		}
		refused, heirs := 0, 0
		_, marker := alice.send("bob", "marker")
		for i, c := range clients {
			if firsts[i].Kind == protocol.KindError {
				if firsts[i].Code != protocol.CodeTooManyDevices || firsts[i].RetryAfterMs != 0 {
					t.Errorf("refusal: %s", describe(firsts[i]))
				}
				c.wantClose(protocol.CloseTooManyDevices)
				refused++
				continue
			}
			// The marker is the last message of the conversation, so what comes before it is all there is.
			contents := map[string]int{}
			for {
				f := c.want(protocol.KindIncoming)
				if f.ID == marker.ID {
					break
				}
				contents[string(f.Content)]++
			}
			for content, times := range contents {
				if times != 1 {
					t.Errorf("device%d was shown %q %d times", i, content, times)
				}
			}
			if len(contents) == waiting {
				heirs++
			}
		}
		// A message still on its way while devices register may reach several of them; the first misses none.
		if refused != 1 || heirs < 1 {
			t.Errorf("%d devices refused, %d got all that waited", refused, heirs)
		}
	})
}

// TestWalkMailbox drains 10 000 messages in order while new ones arrive: each is pushed once, whatever the pace of the
// acknowledgements, since none stays without one for 10 s.
func TestWalkMailbox(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		const waiting, arriving = 10_000, 1_000
		s.connect(enc, "bob", "phone", 0, 0).drop()
		alice := s.connect(enc, "alice", "phone", 0, 0)
		if err := alice.sendMany("bob", 0, waiting); err != nil {
			t.Fatal(err)
		}
		bob := s.connect(enc, "bob", "phone", 0, 0)
		sent := make(chan error, 1)
		go func() { sent <- alice.sendMany("bob", waiting, arriving) }()
		var position uint64
		var unacknowledged []protocol.MessageID
		for i := range waiting + arriving {
			f := bob.want(protocol.KindIncoming)
			if string(f.Content) != fmt.Sprint(i) || f.Position <= position {
				t.Fatalf("message %d: %s, after position %d", i, describe(f), position)
			}
			position = f.Position
			if unacknowledged = append(unacknowledged, f.ID); len(unacknowledged) == 32 {
				bob.acknowledge(unacknowledged...)
				unacknowledged = unacknowledged[:0]
			}
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if len(unacknowledged) > 0 {
			bob.acknowledge(unacknowledged...)
		}
		_, marker := alice.send("bob", "marker")
		bob.wantIncoming(marker.ID, "alice", "bob", "marker")
		bob.wantNothingMore()
	})
}

// TestWalkBrokenDrain disconnects at every step of a drain: before connect, before and after connected, and after each message, before and
// after its acknowledgement. The next connection is given what was not acknowledged, all of it and in order.
func TestWalkBrokenDrain(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		const waiting = 8
		s.connect(enc, "bob", "phone", 3, 0).drop()
		alice := s.connect(enc, "alice", "phone", 0, 0)
		connect := &protocol.Frame{Kind: protocol.KindConnect, Token: s.token("bob"), Device: []byte("phone"), Epoch: 3}
		from := 0 // of the messages that wait
		// try lets a mailbox fill, breaks a drain of it, and finishes it on another connection, with one more message in the end.
		try := func(name string, acknowledged int, broken func(c *walkClient)) {
			if err := alice.sendMany("bob", from, waiting); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			c := s.dial(enc)
			broken(c)
			c.drop()
			if err := alice.sendMany("bob", from+waiting, 1); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			next, last := s.connect(enc, "bob", "phone", 3, 0).wantMailbox(from, from+acknowledged, from+waiting+1)
			alice.wantReceiptAt(last)
			next.drop()
			from += waiting + 1
		}
		try("before connect", 0, func(*walkClient) {})
		try("before connected", 0, func(c *walkClient) { c.write(connect) })
		try("after connected", 0, func(c *walkClient) {
			c.write(connect)
			c.welcome("bob", "phone", 3)
		})
		for received := 1; received <= waiting; received++ {
			for _, acknowledged := range []int{received - 1, received} {
				try(fmt.Sprintf("%d received, %d acknowledged", received, acknowledged), acknowledged, func(c *walkClient) {
					c.write(connect)
					c.welcome("bob", "phone", 3)
					for i := range received {
						f := c.want(protocol.KindIncoming)
						if string(f.Content) != fmt.Sprint(from+i) {
							t.Fatalf("%d received: %s, want message %d", i, describe(f), from+i)
						}
						if i < acknowledged {
							c.acknowledge(f.ID)
						}
					}
				})
			}
		}
	})
}

// TestWalkBrokenPages disconnects around the ends of the pages of a drain, and where the window of unacknowledged messages is full.
func TestWalkBrokenPages(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		const waiting = protocol.MaxUnacknowledged + 10
		s.connect(enc, "bob", "phone", 3, 0).drop()
		alice := s.connect(enc, "alice", "phone", 0, 0)
		if err := alice.sendMany("bob", 0, waiting); err != nil {
			t.Fatal(err)
		}
		for _, received := range []int{
			1, protocol.MaxUnacknowledged/2 - 1, protocol.MaxUnacknowledged / 2, protocol.MaxUnacknowledged/2 + 1,
			protocol.MaxUnacknowledged - 1, protocol.MaxUnacknowledged,
		} {
			c := s.connect(enc, "bob", "phone", 3, 0)
			for i := range received {
				if f := c.want(protocol.KindIncoming); string(f.Content) != fmt.Sprint(i) {
					t.Fatalf("%d received: %s", i, describe(f))
				}
			}
			c.drop()
		}
		_, last := s.connect(enc, "bob", "phone", 3, 0).wantMailbox(0, 0, waiting)
		alice.wantReceiptAt(last)
	})
}

// wantMailbox reads the messages up to before to, in order, acknowledges them and returns the position of the last. The first
// is from or, where acknowledgements were lost with the connection, one between from and upto.
func (c *walkClient) wantMailbox(from, upto, to int) (_ *walkClient, last uint64) {
	c.t.Helper()
	for i := -1; i < to-1; {
		f := c.want(protocol.KindIncoming)
		n, err := strconv.Atoi(string(f.Content))
		if err != nil || i < 0 && (n < from || n > upto) || i >= 0 && n != i+1 || f.Position <= last {
			c.t.Fatalf("drain of %d to %d, %d at most acknowledged, after %d: %s", from, to, upto-from, i, describe(f))
		}
		i, last = n, f.Position
		c.acknowledge(f.ID)
	}
	return c, last
}

// wantReceiptAt reads receipts until one covers a position.
func (c *walkClient) wantReceiptAt(position uint64) {
	c.t.Helper()
	for !slices.ContainsFunc(c.want(protocol.KindReceipt).Receipts, func(r protocol.Receipt) bool { return r.Position >= position }) {
	}
}
