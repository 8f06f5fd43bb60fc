package edge

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
	"millrace/protocol/token"
)

// patience is how long a test waits for what must happen.
const patience = 10 * time.Second

// stubBackend is everything behind the edge, in memory: sends become durable at once unless held back.
type stubBackend struct {
	mu         sync.Mutex
	cond       *sync.Cond
	server     *Server
	next       uint32
	hold       bool // Publish takes and does not answer
	refuse     protocol.Refusal
	register   func(protocol.Registration) (protocol.Registered, bool)
	submitted  []submitted
	outcomes   []outcome
	routes     map[string]route
	mailbox    []protocol.MailboxRow
	failPages  int
	pages      int
	receipts   []protocol.ReceiptPush
	since      []int64
	registered int
	gone       int // unregistered
}

type submitted struct {
	protocol.Submission
	user, device, receiver, content string
}

type outcome struct {
	protocol.Outcome
	user, device string
}

type route struct {
	session protocol.Session
	live    bool
}

func newStub() *stubBackend {
	b := &stubBackend{routes: map[string]route{}}
	b.cond = sync.NewCond(&b.mu)
	return b
}

func (b *stubBackend) Publish(s *protocol.Submission) protocol.Refusal {
	b.mu.Lock()
	if b.refuse.Code != 0 {
		r := b.refuse
		b.mu.Unlock()
		return r
	}
	b.submitted = append(b.submitted, submitted{*s, string(s.User), string(s.Device), string(s.Receiver), string(s.Content)})
	hold := b.hold
	b.cond.Broadcast()
	b.mu.Unlock()
	if !hold {
		b.server.Answer([]protocol.Answer{answerTo(s)})
	}
	return protocol.Refusal{}
}

func answerTo(s *protocol.Submission) protocol.Answer {
	return protocol.Answer{To: s.From, Seq: s.Seq, ID: testID(s.Seq), Position: s.Seq << 11, Millis: int64(s.Seq)}
}

func (b *stubBackend) Fence(f protocol.Fence) { b.server.Fenced(f) }

func (b *stubBackend) Settle(batch []protocol.Outcome) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range batch {
		b.outcomes = append(b.outcomes, outcome{o, string(o.User), string(o.Device)})
		if o.Kind == protocol.Acknowledged {
			for i := range b.mailbox {
				if b.mailbox[i].Message.ID == o.ID {
					b.mailbox = append(b.mailbox[:i:i], b.mailbox[i+1:]...)
					break
				}
			}
		}
	}
	b.cond.Broadcast()
}

func (b *stubBackend) ReadPage(r protocol.PageRequest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pages++
	p := protocol.Page{To: r.Session, After: r.After, End: true}
	if b.failPages > 0 {
		b.failPages--
		p.Refusal = protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 1}
	}
	for _, row := range b.mailbox {
		if p.Code != 0 || row.Message.Receiver != r.User || r.After.DeviceMailbox && row.Message.Position <= r.After.Position {
			continue
		}
		if len(p.Rows) == r.Limit {
			p.End = false
			break
		}
		p.Rows = append(p.Rows, row)
		p.Next = protocol.MailboxCursor{DeviceMailbox: true, Position: row.Message.Position, ID: row.Message.ID}
	}
	go b.server.Page(p)
}

func (b *stubBackend) ReadReceipts(r protocol.ReceiptsRequest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.since = append(b.since, r.After.Millis)
	list := append([]protocol.ReceiptPush(nil), b.receipts...)
	for i := range list {
		list[i].To = r.Session
	}
	go b.server.ReceiptsPage(protocol.ReceiptsPage{To: r.Session, Receipts: list, Next: r.After, End: true})
}

func (b *stubBackend) Register(r protocol.Registration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.registered++
	if b.register != nil {
		answer, now := b.register(r)
		answer.To = r.Session
		if now {
			go b.server.Registered(answer)
		}
		return
	}
	key := r.User + "/" + r.Device
	if old, ok := b.routes[key]; ok {
		go b.server.Replace(old.session)
	}
	b.routes[key] = route{session: r.Session}
	block := b.next
	b.next++
	go b.server.Registered(protocol.Registered{To: r.Session, Block: block})
}

func (b *stubBackend) SetState(user, device []byte, s protocol.Session, live bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := string(user) + "/" + string(device)
	if old, ok := b.routes[key]; ok && old.session.Conn == s.Conn {
		b.routes[key] = route{s, live}
	}
	b.cond.Broadcast()
}

func (b *stubBackend) Unregister(user, device []byte, s protocol.Session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone++
	key := string(user) + "/" + string(device)
	if old, ok := b.routes[key]; ok && old.session.Conn == s.Conn {
		delete(b.routes, key)
	}
	b.cond.Broadcast()
}

// wait waits until ok says so; ok is called with the lock held.
func (b *stubBackend) wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	timer := time.AfterFunc(patience, func() { b.mu.Lock(); b.cond.Broadcast(); b.mu.Unlock() })
	defer timer.Stop()
	deadline := time.Now().Add(patience)
	b.mu.Lock()
	defer b.mu.Unlock()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		b.cond.Wait()
	}
}

// fill puts n messages for bob into the mailbox.
func (b *stubBackend) fill(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := range n {
		b.mailbox = append(b.mailbox, protocol.MailboxRow{Message: testMessage(i+1, "bob", "waited")})
	}
}

// live waits until the session of a device is live and returns it.
func (b *stubBackend) live(t testing.TB, key string) (s protocol.Session) {
	t.Helper()
	b.wait(t, key+" to be live", func() bool {
		r, ok := b.routes[key]
		s = r.session
		return ok && r.live
	})
	return s
}

func testID(n uint64) (id protocol.MessageID) {
	binary.BigEndian.PutUint64(id[8:], n)
	return id
}

func testMessage(n int, receiver, content string) *protocol.Message {
	return &protocol.Message{ID: testID(uint64(n)), Conversation: 7, Position: uint64(n), Sender: "alice", Receiver: receiver, Content: []byte(content)}
}

// stubTokens takes "NAME", "NAME until SECONDS", "expired", "unavailable" and, for a worker, any of them behind "slow ".
type stubTokens struct{}

func (s stubTokens) VerifyFast(t []byte, now time.Time) (token.Claims, error) {
	if bytes.HasPrefix(t, []byte("slow ")) {
		return token.Claims{}, token.ErrSlow
	}
	return s.Verify(t, now)
}

func (stubTokens) Verify(t []byte, now time.Time) (token.Claims, error) {
	name, until, ok := strings.Cut(strings.TrimPrefix(string(t), "slow "), " until ")
	at := now.Add(time.Hour)
	if ok {
		var seconds int64
		fmt.Sscan(until, &seconds)
		at = time.Unix(seconds, 0)
	}
	switch {
	case name == "expired":
		return token.Claims{}, token.ErrExpired
	case name == "unavailable":
		return token.Claims{}, token.ErrUnavailable
	case name == "panic":
		panic("bug")
	case !protocol.ValidUser(name):
		return token.Claims{}, token.ErrInvalid
	}
	return token.Claims{User: name, ExpiresAt: at}, nil
}

func testConfig(b *stubBackend) Config {
	return Config{
		Addr: "127.0.0.1:0", Loops: 2, MaxConnections: 1000, EdgeID: 3,
		Token: stubTokens{}, Publisher: b, Acknowledger: b, Mailbox: b, Registrar: b,
		Logger:      slog.New(slog.DiscardHandler),
		Certificate: overTLS,
		sweepSlices: 1,
	}
}

// serve runs a server on a free port for the length of a test.
func serve(t testing.TB, change func(*Config)) (*Server, *stubBackend) {
	t.Helper()
	b := newStub()
	cfg := testConfig(b)
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.server = s
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
		select {
		case err := <-s.Done():
			t.Errorf("Done after Stop: %v", err)
		default:
		}
	})
	return s, b
}

// client is a WebSocket client that a test drives step by step.
type client struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
	json bool
	rest []byte // frames of the last message that were not returned yet
	last protocol.Frame
}

// both runs a test on both subprotocols.
func both(t *testing.T, test func(t *testing.T, subprotocol string)) {
	for _, name := range []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
		t.Run(name, func(t *testing.T) { test(t, name) })
	}
}

func upgradeText(subprotocol, more string) string {
	if subprotocol != "" {
		more += "Sec-WebSocket-Protocol: " + subprotocol + "\r\n"
	}
	return "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + more + "\r\n"
}

func dialTCP(t testing.TB, s *Server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	if s.tls != nil {
		return secured(t, conn)
	}
	return conn
}

// request sends raw bytes and reads the HTTP response.
func request(t testing.TB, s *Server, text string) (*http.Response, string, net.Conn) {
	t.Helper()
	conn := dialTCP(t, s)
	if _, err := conn.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body), conn
}

func dial(t testing.TB, s *Server, subprotocol, more string) *client {
	t.Helper()
	return upgrade(t, dialTCP(t, s), subprotocol, more)
}

// upgradeOn makes a connection one of JSON.
func upgradeOn(t testing.TB, conn net.Conn) *client {
	t.Helper()
	return upgrade(t, conn, protocol.SubprotocolJSON, "")
}

func upgrade(t testing.TB, conn net.Conn, subprotocol, more string) *client {
	t.Helper()
	c := &client{t: t, conn: conn, json: subprotocol != protocol.SubprotocolBinary}
	c.r = bufio.NewReader(c.conn)
	if _, err := c.conn.Write([]byte(upgradeText(subprotocol, more))); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" ||
		resp.Header.Get("Sec-WebSocket-Protocol") != subprotocol {
		t.Fatalf("upgrade: %s %v", resp.Status, resp.Header)
	}
	return c
}

// login dials and connects.
func login(t testing.TB, s *Server, subprotocol, user, device string) *client {
	t.Helper()
	c := dial(t, s, subprotocol, "")
	c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(user), Device: []byte(device)})
	if f := c.want(protocol.KindConnected); string(f.User) != user {
		t.Fatalf("connected as %q", f.User)
	}
	return c
}

func (c *client) send(frames ...*protocol.Frame) {
	c.t.Helper()
	var b []byte
	for _, f := range frames {
		if c.json {
			b = append(protocol.AppendJSON(b, f), '\n')
		} else {
			b = protocol.AppendBinary(b, f)
		}
	}
	c.sendRaw(c.opcode(), b)
}

func (c *client) opcode() ws.OpCode {
	if c.json {
		return ws.OpText
	}
	return ws.OpBinary
}

func (c *client) sendRaw(op ws.OpCode, payload []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(clientFrame(op, true, payload)); err != nil {
		c.t.Fatal(err)
	}
}

func clientFrame(op ws.OpCode, fin bool, payload []byte) []byte {
	f := ws.NewFrame(op, fin, bytes.Clone(payload))
	return ws.MustCompileFrame(ws.MaskFrameInPlaceWith(f, [4]byte{1, 2, 3, 4}))
}

func (c *client) sendMessage(seq uint64, content string) {
	c.t.Helper()
	c.send(&protocol.Frame{Kind: protocol.KindSend, Seq: seq, Receiver: []byte("bob"), Content: []byte(content)})
}

// closeError is a close frame.
type closeError struct {
	code protocol.CloseCode
	text string
}

func (e closeError) Error() string { return fmt.Sprintf("closed: %d %s", e.code, e.text) }

// next returns the next protocol frame; pings are answered.
func (c *client) next() (*protocol.Frame, error) {
	for {
		if len(c.rest) > 0 {
			var err *protocol.FrameError
			if c.json {
				c.rest, err = protocol.ParseJSON(c.rest, true, &c.last)
			} else {
				c.rest, err = protocol.ParseBinary(c.rest, &c.last)
			}
			if err != nil {
				return nil, err
			}
			if c.last.Kind != 0 {
				return &c.last, nil
			}
			continue
		}
		f, err := readServerFrame(c.r)
		switch {
		case err != nil:
			return nil, err
		case f.Header.Masked || !f.Header.Fin || f.Header.Rsv != 0:
			return nil, fmt.Errorf("bad frame header %+v", f.Header)
		case f.Header.OpCode == ws.OpClose:
			if len(f.Payload) < 2 {
				return nil, closeError{}
			}
			return nil, closeError{protocol.CloseCode(binary.BigEndian.Uint16(f.Payload)), string(f.Payload[2:])}
		case f.Header.OpCode == ws.OpPing:
			c.conn.Write(clientFrame(ws.OpPong, true, f.Payload))
		case f.Header.OpCode == ws.OpPong:
			return &protocol.Frame{Text: append([]byte("pong "), f.Payload...)}, nil
		case f.Header.OpCode == c.opcode():
			c.rest = f.Payload
		default:
			return nil, fmt.Errorf("opcode %x", f.Header.OpCode)
		}
	}
}

func (c *client) want(kind protocol.Kind) *protocol.Frame {
	c.t.Helper()
	f, err := c.next()
	if err != nil {
		c.t.Fatalf("want kind %#x: %v", kind, err)
	}
	if f.Kind != kind {
		c.t.Fatalf("want kind %#x, got %+v", kind, f)
	}
	return f
}

func (c *client) wantError(code protocol.Code) *protocol.Frame {
	c.t.Helper()
	f := c.want(protocol.KindError)
	if f.Code != code || len(f.Text) == 0 {
		c.t.Fatalf("want error %s, got %s %q", code, f.Code, f.Text)
	}
	return f
}

// wantClose reads up to a close frame, answers it, and wants the server to close the socket.
func (c *client) wantClose(code protocol.CloseCode) {
	c.t.Helper()
	_, err := c.next()
	var closed closeError
	if !errors.As(err, &closed) || closed.code != code {
		c.t.Fatalf("want close %d, got %v", code, err)
	}
	c.conn.Write(clientFrame(ws.OpClose, true, binary.BigEndian.AppendUint16(nil, uint16(code))))
	if _, err := c.r.ReadByte(); err != io.EOF {
		c.t.Fatalf("after the close handshake: %v", err)
	}
}

func (c *client) acknowledge(ids ...protocol.MessageID) {
	c.t.Helper()
	c.send(&protocol.Frame{Kind: protocol.KindAcknowledge, Timestamp: 1, IDs: ids})
}

// metric reads one metric, after the loops had time to publish it.
func metric(s *Server, name string, labels ...string) (value float64) {
	s.Metrics(func(n, _ string, _ bool, v float64, l ...string) {
		if n == "millrace_edge_"+name && fmt.Sprint(l) == fmt.Sprint(labels) {
			value = v
		}
	})
	return value
}

// eventually waits until ok says so.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// submission waits for the nth send and returns it.
func (b *stubBackend) submission(t testing.TB, n int) (s submitted) {
	t.Helper()
	b.wait(t, fmt.Sprintf("send %d", n), func() bool {
		if len(b.submitted) > n {
			s = b.submitted[n]
		}
		return len(b.submitted) > n
	})
	return s
}

// outcome waits for the nth outcome and returns it.
func (b *stubBackend) outcome(t testing.TB, n int) (o outcome) {
	t.Helper()
	b.wait(t, fmt.Sprintf("outcome %d", n), func() bool {
		if len(b.outcomes) > n {
			o = b.outcomes[n]
		}
		return len(b.outcomes) > n
	})
	return o
}

func newReader(b []byte) *bufio.Reader { return bufio.NewReader(bytes.NewReader(b)) }

// readServerFrame reads one WebSocket frame, of which a server's may be no longer than the protocol says.
func readServerFrame(r io.Reader) (f ws.Frame, err error) {
	if f.Header, err = ws.ReadHeader(r); err != nil {
		return f, err
	}
	if f.Header.Length > protocol.MaxServerFrameBytes {
		return f, fmt.Errorf("frame of %d bytes", f.Header.Length)
	}
	f.Payload = make([]byte, f.Header.Length)
	_, err = io.ReadFull(r, f.Payload)
	return f, err
}
