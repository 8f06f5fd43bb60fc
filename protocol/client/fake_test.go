package client

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// fakeServer is a small server in memory that keeps the rules of the protocol and reports a client that
// does not. A token is the user's name, or the name, a colon and anything.
type fakeServer struct {
	t    testing.TB
	conn chan net.Conn // what dial has made
	wg   sync.WaitGroup
	stop context.CancelFunc
	life context.Context

	mu       sync.Mutex
	blocks   map[string]uint32             // stream → blocks given
	contents map[string]string             // stream and number → what was sent under it
	accepted map[string]protocol.Message   // stream and number → the message
	order    []protocol.Message            // in the order of acceptance
	mailbox  map[string][]protocol.Message // user → not acknowledged
	sessions map[string]*fakeSession       // user and device
	upgrades int
	connects int
	position uint64
	acked    map[protocol.MessageID]int

	// Scripts, set before the client starts; nil: none.
	onUpgrade     func(n int) (status int, header http.Header) // other than 0 refuses
	onConnect     func(s *fakeSession, n int) (handled bool)   // n counts from 1
	onSend        func(s *fakeSession, f *protocol.Frame) (handled bool)
	onAcknowledge func(id protocol.MessageID)
	first         func(stream string, block uint32) uint64 // the first number of a connection
	heartbeat     uint32
	mute          bool // no pings
}

type fakeSession struct {
	server   *fakeServer
	nc       net.Conn
	encoding Encoding
	user     string
	device   string
	stream   string
	n        int // of the connection
	first    uint64
	token    string
	cut      bool // by a script, from its own goroutine

	wmu sync.Mutex

	// What the client must keep.
	open     map[uint64]bool // written on this connection, neither answered nor refused
	ended    map[uint64]bool
	received []string
}

func newFakeServer(t testing.TB) *fakeServer {
	s := &fakeServer{
		t: t, conn: make(chan net.Conn),
		blocks: make(map[string]uint32), contents: make(map[string]string), accepted: make(map[string]protocol.Message),
		mailbox: make(map[string][]protocol.Message), sessions: make(map[string]*fakeSession), acked: make(map[protocol.MessageID]int),
		heartbeat: protocol.HeartbeatSeconds,
	}
	s.life, s.stop = context.WithCancel(context.Background())
	t.Cleanup(s.close)
	return s
}

func (s *fakeServer) close() {
	s.stop()
	s.dropAll()
	s.wg.Wait()
}

// dial is the client's NetDial: one end of a pipe, whose other end is served. Pipes, unlike sockets, work under a fake clock.
func (s *fakeServer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if s.life.Err() != nil {
		return nil, errors.New("connection refused")
	}
	near, far := net.Pipe()
	s.wg.Go(func() {
		stop := context.AfterFunc(s.life, func() { _ = far.Close() })
		defer stop()
		defer far.Close()
		s.serve(far)
	})
	return near, nil
}

func (s *fakeServer) options(user string) Options {
	return Options{URL: "ws://fake/ws", Token: StaticToken(user), NetDial: s.dial, MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond}
}

// dropAll cuts every connection.
func (s *fakeServer) dropAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, session := range s.sessions {
		_ = session.nc.Close()
	}
}

func (s *fakeServer) serve(nc net.Conn) {
	s.mu.Lock()
	s.upgrades++
	n := s.upgrades
	s.mu.Unlock()
	session := &fakeSession{server: s, nc: nc, open: make(map[uint64]bool), ended: make(map[uint64]bool)}
	u := ws.Upgrader{
		Protocol: func(b []byte) bool {
			switch string(b) {
			case protocol.SubprotocolBinary:
				session.encoding = Binary
			case protocol.SubprotocolJSON:
				session.encoding = JSON
			default:
				return false
			}
			return true
		},
		OnBeforeUpgrade: func() (ws.HandshakeHeader, error) {
			if s.onUpgrade == nil {
				return nil, nil
			}
			if status, header := s.onUpgrade(n); status != 0 {
				return nil, ws.RejectConnectionError(ws.RejectionStatus(status), ws.RejectionHeader(ws.HandshakeHeaderHTTP(header)))
			}
			return nil, nil
		},
	}
	if _, err := u.Upgrade(nc); err != nil {
		return
	}
	session.read()
	s.mu.Lock()
	if s.sessions[session.user+"/"+session.device] == session {
		delete(s.sessions, session.user+"/"+session.device)
	}
	s.mu.Unlock()
}

func (c *fakeSession) read() {
	br := bufio.NewReader(c.nc)
	var f protocol.Frame
	for {
		//lint:ignore SA1019 the other end is this test's own client
		frame, err := ws.ReadFrame(br)
		if err != nil {
			return
		}
		if !frame.Header.Masked {
			c.server.t.Error("an unmasked frame from the client")
		}
		frame = ws.UnmaskFrame(frame)
		switch frame.Header.OpCode {
		case ws.OpClose:
			c.frame(ws.OpClose, frame.Payload)
			return
		case ws.OpPing:
			if !c.server.mute {
				c.frame(ws.OpPong, frame.Payload)
			}
			continue
		case ws.OpPong:
			continue
		}
		if len(frame.Payload) > c.encoding.maxMessage() {
			c.server.t.Errorf("a message of %d bytes from the client", len(frame.Payload))
		}
		for rest := frame.Payload; len(rest) > 0; {
			var ferr *protocol.FrameError
			if c.encoding == JSON {
				rest, ferr = protocol.ParseJSON(rest, false, &f)
			} else {
				rest, ferr = protocol.ParseBinary(rest, &f)
			}
			if ferr != nil {
				c.server.t.Errorf("a bad frame from the client: %v", ferr)
				return
			}
			if !c.handle(&f) {
				return
			}
		}
	}
}

// handle reports whether the connection goes on.
func (c *fakeSession) handle(f *protocol.Frame) bool {
	switch f.Kind {
	case protocol.KindConnect:
		return c.connect(f)
	case protocol.KindSend:
		c.checkRules(f)
		if c.server.onSend != nil && c.server.onSend(c, f) {
			return !c.cut // what follows in the same message was never read
		}
		c.accept(f)
	case protocol.KindAcknowledge:
		for _, id := range f.IDs {
			c.acknowledge(id)
		}
	case protocol.KindRenewToken:
		c.server.mu.Lock()
		c.token = string(f.Token)
		c.server.mu.Unlock()
		c.write(protocol.Frame{Kind: protocol.KindRenewed})
	}
	return true
}

func (c *fakeSession) connect(f *protocol.Frame) bool {
	s := c.server
	c.token = string(f.Token)
	c.user, _, _ = strings.Cut(c.token, ":")
	c.device = string(f.Device)
	c.stream = fmt.Sprintf("%s/%s/%016x", c.user, c.device, f.Epoch)
	s.mu.Lock()
	s.connects++
	c.n = s.connects
	s.mu.Unlock()
	if s.onConnect != nil && s.onConnect(c, c.n) {
		return true
	}
	c.welcome(f.Epoch)
	return true
}

// welcome registers the session, throws the older one out, and pushes what waits.
func (c *fakeSession) welcome(epoch uint64) {
	s := c.server
	s.mu.Lock()
	block := s.blocks[c.stream]
	s.blocks[c.stream]++
	c.first = protocol.FirstSeq(block)
	if s.first != nil {
		c.first = s.first(c.stream, block)
	}
	older := s.sessions[c.user+"/"+c.device]
	s.sessions[c.user+"/"+c.device] = c
	waiting := append([]protocol.Message(nil), s.mailbox[c.user]...)
	s.mu.Unlock()
	if older != nil {
		older.write(protocol.Frame{Kind: protocol.KindError, Code: protocol.CodeSessionReplaced, Text: []byte("replaced")})
		older.closeWith(protocol.CloseSessionReplaced, "session_replaced")
	}
	c.write(protocol.Frame{Kind: protocol.KindConnected, User: []byte(c.user), Device: []byte(c.device), Epoch: epoch,
		Seq: c.first, HeartbeatSeconds: s.heartbeat, Timestamp: time.Now().UnixMilli()})
	for _, m := range waiting {
		c.push(m)
	}
}

func numberKey(stream string, seq uint64) string { return fmt.Sprintf("%s %d", stream, seq) }

// checkRules reports a client that breaks what makes a resend safe.
func (c *fakeSession) checkRules(f *protocol.Frame) {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	content := string(f.Receiver) + "\x00" + string(f.Content) + "\x00" + fmt.Sprint(f.Timestamp)
	key := numberKey(c.stream, f.Seq)
	if was, ok := s.contents[key]; ok && was != content {
		s.t.Errorf("number %d has two contents: %q and %q", f.Seq, was, content)
	}
	s.contents[key] = content
	if refusal := protocol.CheckSend(f); refusal.Code != 0 {
		s.t.Errorf("a send that must be refused: %v", refusal.Code)
	}
	resend := f.Seq < c.first
	if !resend {
		for seq := range c.open {
			if seq < c.first {
				s.t.Errorf("new number %d while %d of an earlier connection is open", f.Seq, seq)
			}
		}
	}
	c.open[f.Seq] = true
	low, high := f.Seq, f.Seq
	for seq := range c.open {
		low, high = min(low, seq), max(high, seq)
	}
	if high-low >= protocol.MaxOpenSpan {
		s.t.Errorf("open numbers from %d to %d", low, high)
	}
	c.received = append(c.received, fmt.Sprintf("%d", f.Seq))
}

// accept makes a send durable, as far as a fake does.
func (c *fakeSession) accept(f *protocol.Frame) {
	s := c.server
	s.mu.Lock()
	delete(c.open, f.Seq)
	key := numberKey(c.stream, f.Seq)
	m, again := s.accepted[key]
	if !again {
		sum := sha256.Sum256([]byte(key))
		s.position = protocol.NextPosition(s.position, time.Now().UnixMilli())
		m = protocol.Message{Position: s.position, Sender: c.user, Receiver: string(f.Receiver), Content: append([]byte(nil), f.Content...)}
		copy(m.ID[:], sum[:])
		s.accepted[key] = m
		s.order = append(s.order, m)
		s.mailbox[m.Receiver] = append(s.mailbox[m.Receiver], m)
	}
	to := s.sessionsOf(m.Receiver)
	s.mu.Unlock()
	answer := protocol.Frame{Kind: protocol.KindReceived, Seq: f.Seq, ID: m.ID, Position: m.Position, Timestamp: time.Now().UnixMilli()}
	if f.Seq < c.first {
		answer.Position = 0
	}
	c.write(answer)
	if !again {
		for _, session := range to {
			session.push(m)
		}
	}
}

func (s *fakeServer) sessionsOf(user string) (list []*fakeSession) {
	for _, session := range s.sessions {
		if session.user == user {
			list = append(list, session)
		}
	}
	return list
}

func (c *fakeSession) push(m protocol.Message) {
	c.write(protocol.Frame{Kind: protocol.KindIncoming, ID: m.ID, Position: m.Position, Sender: []byte(m.Sender), Receiver: []byte(m.Receiver), Content: m.Content})
}

// acknowledge takes a message out of the mailbox and tells the sender.
func (c *fakeSession) acknowledge(id protocol.MessageID) {
	s := c.server
	if s.onAcknowledge != nil {
		s.onAcknowledge(id)
	}
	s.mu.Lock()
	s.acked[id]++
	var found *protocol.Message
	box := s.mailbox[c.user]
	for i := range box {
		if box[i].ID == id {
			m := box[i]
			found = &m
			s.mailbox[c.user] = append(box[:i:i], box[i+1:]...)
			break
		}
	}
	var to []*fakeSession
	if found != nil {
		to = s.sessionsOf(found.Sender)
	}
	s.mu.Unlock()
	for _, session := range to {
		session.write(protocol.Frame{Kind: protocol.KindReceipt, Receipts: []protocol.Receipt{{
			ID: found.ID, Position: found.Position, Timestamp: time.Now().UnixMilli(), Receiver: []byte(found.Receiver)}}})
	}
}

// refuse answers a send with an error.
func (c *fakeSession) refuse(seq uint64, code protocol.Code, retryAfterMs uint32, resendFrom uint64) {
	c.server.mu.Lock()
	if retryAfterMs == 0 && code != protocol.CodeWindowExceeded {
		delete(c.open, seq)
	}
	c.server.mu.Unlock()
	c.write(protocol.Frame{Kind: protocol.KindError, Code: code, Seq: seq, RetryAfterMs: retryAfterMs, ResendFrom: resendFrom, Text: []byte("scripted")})
}

func (c *fakeSession) write(f protocol.Frame) {
	op := ws.OpBinary
	payload := []byte(nil)
	if c.encoding == JSON {
		op, payload = ws.OpText, protocol.AppendJSON(nil, &f)
	} else {
		payload = protocol.AppendBinary(nil, &f)
	}
	c.frame(op, payload)
}

func (c *fakeSession) frame(op ws.OpCode, payload []byte) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_ = ws.WriteFrame(c.nc, ws.NewFrame(op, true, payload)) // a client that is gone is what many tests want
}

func (c *fakeSession) closeWith(code protocol.CloseCode, text string) {
	payload := binary.BigEndian.AppendUint16(nil, uint16(code))
	c.frame(ws.OpClose, append(payload, text...))
}

func (c *fakeSession) fail(code protocol.Code, retryAfterMs uint32, closeCode protocol.CloseCode) {
	c.write(protocol.Frame{Kind: protocol.KindError, Code: code, RetryAfterMs: retryAfterMs, Text: []byte("scripted")})
	c.closeWith(closeCode, code.String())
}

// texts is what the server has accepted, in order.
func (s *fakeServer) texts() (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.order {
		list = append(list, string(m.Content))
	}
	return list
}

// give puts a message into a mailbox and pushes it.
func (s *fakeServer) give(from, to, text string) protocol.Message {
	s.mu.Lock()
	s.position = protocol.NextPosition(s.position, time.Now().UnixMilli())
	m := protocol.Message{Position: s.position, Sender: from, Receiver: to, Content: []byte(text)}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", text, s.position))
	copy(m.ID[:], sum[:])
	s.mailbox[to] = append(s.mailbox[to], m)
	sessions := s.sessionsOf(to)
	s.mu.Unlock()
	for _, session := range sessions {
		session.push(m)
	}
	return m
}

// listen serves the fake over TCP.
func (s *fakeServer) listen() (url string, listener net.Listener) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	s.wg.Go(func() {
		for {
			nc, err := listener.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() { defer nc.Close(); s.serve(nc) })
		}
	})
	return "ws://" + listener.Addr().String() + "/ws", listener
}

// exampleTB lets the examples, which have no testing.T, use the fake.
type exampleTB struct{ testing.TB }

func (exampleTB) Cleanup(func())               {}
func (exampleTB) Error(args ...any)            { panic(fmt.Sprint(args...)) }
func (exampleTB) Errorf(f string, args ...any) { panic(fmt.Sprintf(f, args...)) }
func (exampleTB) Fatal(args ...any)            { panic(fmt.Sprint(args...)) }

// StartServer is what the examples talk to: a token is the user's name.
func StartServer() (url string, stop func()) {
	s := newFakeServer(exampleTB{})
	url, listener := s.listen()
	return url, func() {
		_ = listener.Close()
		s.close()
	}
}
