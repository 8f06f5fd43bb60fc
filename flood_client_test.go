//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/loadtest/checker"
	"millrace/protocol"
)

// floodOpen is how many sends a client keeps on their way: their numbers lie within protocol.MaxOpenSpan.
const floodOpen = protocol.MaxOpenSpan / 2

// floodURL is what upgrades ask for.
var floodURL = &url.URL{Scheme: "ws", Host: "localhost", Path: "/ws"}

// floodConn is a WebSocket connection with as little as possible about it: there may be thousands.
type floodConn struct {
	net.Conn
	in *bufio.Reader
	op ws.OpCode
}

// ipBindAddressNoPort leaves the port to connect, which needs it to be free towards one address only.
const ipBindAddressNoPort = 24

// floodSource is the nth address of this machine to come from.
func floodSource(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, 7, byte(n / 250), byte(1 + n%250)})
}

// floodDial opens a TCP connection from an address, with a receive buffer of so many bytes if that is not 0.
func floodDial(ctx context.Context, addr string, from netip.Addr, receive int) (net.Conn, error) {
	d := net.Dialer{Timeout: floodPatience, KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, ipBindAddressNoPort, 1)
			if receive > 0 {
				failed = errors.Join(failed, syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, receive))
			}
		})
		return errors.Join(err, failed)
	}}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	return d.DialContext(ctx, "tcp4", addr)
}

// floodUpgrade makes a TCP connection a WebSocket.
func floodUpgrade(conn net.Conn, subprotocol string) (*floodConn, error) {
	d := ws.Dialer{Protocols: []string{subprotocol}, Timeout: floodPatience,
		NetDial: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	early, _, err := d.Upgrade(conn, floodURL)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("upgrade: %w", err)
	}
	c := &floodConn{Conn: conn, in: early, op: ws.OpBinary}
	if early == nil {
		c.in = bufio.NewReaderSize(conn, 512)
	}
	if subprotocol == protocol.SubprotocolJSON {
		c.op = ws.OpText
	}
	return c, nil
}

// read is the next message of data; or nil for a pong. Pings are answered.
func (c *floodConn) read(pong func(payload []byte) error) ([]byte, error) {
	for {
		//lint:ignore SA1019 the other end is this test's own server
		f, err := ws.ReadFrame(c.in)
		if err != nil {
			return nil, err
		}
		switch f.Header.OpCode {
		case ws.OpClose:
			code, _ := ws.ParseCloseFrameData(f.Payload)
			return nil, walkClosed(code)
		case ws.OpPing:
			if err := pong(f.Payload); err != nil {
				return nil, err
			}
		case ws.OpPong:
			return nil, nil
		default:
			return f.Payload, nil
		}
	}
}

func (c *floodConn) pong(payload []byte) error {
	return wsutil.WriteClientMessage(c, ws.OpPong, payload)
}

// closeCode reads until the server closes, which has to come with a code.
func (c *floodConn) closeCode() (protocol.CloseCode, error) {
	if err := c.SetReadDeadline(time.Now().Add(floodPatience)); err != nil {
		return 0, err
	}
	for {
		_, err := c.read(c.pong)
		var closed walkClosed
		switch {
		case errors.As(err, &closed):
			return protocol.CloseCode(closed), nil
		case err != nil:
			return 0, err
		}
	}
}

// login opens a session on a new connection.
func (s *victim) login(ctx context.Context, user, device string, epoch uint64, from netip.Addr, receive int) (*floodConn, *protocol.Frame, error) {
	signed, err := signToken(s.config, user, time.Hour)
	if err != nil {
		return nil, nil, err
	}
	conn, err := floodDial(ctx, s.addr, from, receive)
	if err != nil {
		return nil, nil, err
	}
	c, err := floodUpgrade(conn, protocol.SubprotocolBinary)
	if err != nil {
		return nil, nil, err
	}
	f := &protocol.Frame{Kind: protocol.KindConnect, Token: []byte(signed), Device: []byte(device), Epoch: epoch}
	if err = wsutil.WriteClientBinary(c, protocol.AppendBinary(nil, f)); err == nil {
		f, err = c.welcome()
	}
	if err != nil {
		c.Close()
		return nil, nil, fmt.Errorf("connect as %s: %w", user, err)
	}
	return c, f, nil
}

func (c *floodConn) welcome() (*protocol.Frame, error) {
	if err := c.SetReadDeadline(time.Now().Add(floodPatience)); err != nil {
		return nil, err
	}
	data, err := c.read(c.pong)
	if err != nil {
		return nil, err
	}
	f := new(protocol.Frame)
	if _, bad := protocol.ParseBinary(data, f); bad != nil || f.Kind != protocol.KindConnected {
		return nil, fmt.Errorf("got %s (%w), want connected", describe(f), bad)
	}
	return f, c.SetReadDeadline(time.Time{})
}

// mustLogin is a session whose connection the test closes.
func (s *victim) mustLogin(user string) (*floodConn, *protocol.Frame) {
	s.t.Helper()
	c, connected, err := s.login(s.t.Context(), user, protocol.DefaultDevice, 0, netip.Addr{}, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c, connected
}

// crowd is honest clients whose messages are judged, and how long they took.
type crowd struct {
	// Immutable.
	t      *testing.T
	server *victim
	check  *checker.Checker
	people []*member

	repeated atomic.Int64 // pushed again, which the client's filter stopped

	mu        sync.Mutex
	byStream  map[checker.StreamID]*member // guarded by mu
	latencies []time.Duration              // guarded by mu: from before the write to the show, since take
}

// member is a client of a crowd. It shows and acknowledges what comes while it reads.
type member struct {
	// Immutable after join.
	crowd  *crowd
	user   string
	id     checker.ClientID
	stream checker.StreamID
	from   netip.Addr
	epoch  uint64
	slots  chan struct{} // floodOpen
	rejoin bool          // when the server closes, which it may to who does not read

	reading sync.WaitGroup
	leaving atomic.Bool
	mute    atomic.Bool  // does not acknowledge
	shown   atomic.Int64 // messages

	mu    sync.Mutex
	conn  *floodConn           // guarded by mu
	next  uint64               // guarded by mu
	begun map[uint64]time.Time // guarded by mu: by number

	lastID protocol.MessageID // guarded by mu: of what it sent

	known map[protocol.MessageID]struct{} // owned by the reader
}

func newCrowd(s *victim) *crowd {
	c := &crowd{t: s.t.(*testing.T), server: s, check: checker.New(checker.Config{Acknowledgements: true, Receipts: true}),
		byStream: map[checker.StreamID]*member{}}
	c.t.Cleanup(c.leave)
	return c
}

// join adds n members named after their group; receive is the size of their receive buffers, or 0. They do not read yet.
func (c *crowd) join(group string, n, receive int) []*member {
	c.t.Helper()
	joined := make([]*member, n)
	errs := make(chan error, floodDialers)
	var dialing sync.WaitGroup
	var next atomic.Int64
	for range floodDialers {
		dialing.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				m := &member{crowd: c, user: fmt.Sprintf("%s-%05d", group, i), from: floodSource(int(i % 200)), epoch: uint64(i + 1),
					slots: make(chan struct{}, floodOpen), begun: map[uint64]time.Time{}, known: map[protocol.MessageID]struct{}{}}
				joined[i] = m
				if err := m.come(receive); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	dialing.Wait()
	close(errs)
	for err := range errs {
		c.t.Fatal(err)
	}
	for _, m := range joined {
		m.id = c.check.Client(m.user, protocol.DefaultDevice)
		m.stream = c.check.Stream(m.id, m.epoch)
		c.mu.Lock()
		c.byStream[m.stream] = m
		c.mu.Unlock()
	}
	c.people = append(c.people, joined...)
	return joined
}

// floodDialers is how many handshakes of a crowd are under way at once.
const floodDialers = 16

func (m *member) come(receive int) error {
	conn, connected, err := m.crowd.server.login(context.Background(), m.user, protocol.DefaultDevice, m.epoch, m.from, receive)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.conn, m.next = conn, connected.Seq
	m.mu.Unlock()
	return nil
}

func read(members []*member) {
	for _, m := range members {
		m.reading.Go(m.read)
	}
}

// read shows, acknowledges, and books answers and receipts, until the connection ends.
func (m *member) read() {
	for {
		m.mu.Lock()
		conn := m.conn
		m.mu.Unlock()
		err := m.readConn(conn)
		conn.Close()
		if m.leaving.Load() {
			return
		}
		if !m.rejoin {
			m.crowd.t.Errorf("%s: %v", m.user, err)
			return
		}
		if err := m.come(0); err != nil {
			m.crowd.t.Errorf("%s comes again after %v: %v", m.user, err, err)
			return
		}
	}
}

func (m *member) readConn(conn *floodConn) error {
	pong := func(payload []byte) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		return conn.pong(payload)
	}
	f, acks := new(protocol.Frame), new(protocol.Frame)
	for {
		data, err := conn.read(pong)
		if err != nil {
			return err
		}
		acks.Reset()
		acks.Kind, acks.Timestamp = protocol.KindAcknowledge, 1
		for len(data) > 0 {
			rest, bad := protocol.ParseBinary(data, f)
			if bad != nil {
				return fmt.Errorf("frame of the server: %w", bad)
			}
			data = rest
			if err := m.handle(f, acks); err != nil {
				return err
			}
		}
		if len(acks.IDs) > 0 {
			m.mu.Lock()
			err := wsutil.WriteClientBinary(conn, protocol.AppendBinary(nil, acks))
			m.mu.Unlock()
			if err != nil {
				return err
			}
		}
	}
}

func (m *member) handle(f, acks *protocol.Frame) error {
	check := m.crowd.check
	switch f.Kind {
	case protocol.KindReceived:
		check.Answered(m.stream, f.Seq, f.ID, f.Position)
		m.mu.Lock()
		m.lastID = f.ID
		m.mu.Unlock()
		<-m.slots
	case protocol.KindIncoming:
		if _, known := m.known[f.ID]; known {
			m.crowd.repeated.Add(1)
		} else {
			m.known[f.ID] = struct{}{}
			m.shown.Add(1)
			m.crowd.arrived(f.Content)
			check.Shown(m.id, f.ID, f.Position, string(f.Sender), string(f.Content))
		}
		if !m.mute.Load() {
			acks.IDs = append(acks.IDs, f.ID)
			check.Acknowledged(m.id, f.ID)
		}
	case protocol.KindReceipt:
		for _, r := range f.Receipts {
			check.Receipt(m.id, r.ID, r.Position)
		}
	case protocol.KindGoAway, protocol.KindRenew:
	default:
		return fmt.Errorf("unexpected: %s", describe(f))
	}
	return nil
}

// arrived books how long a message took.
func (c *crowd) arrived(content []byte) {
	now := time.Now()
	from, n, ok := checker.ParseContent(string(content))
	if !ok {
		return // the checker says so
	}
	c.mu.Lock()
	m := c.byStream[from]
	c.mu.Unlock()
	if m == nil {
		return // as well
	}
	m.mu.Lock()
	begun, timed := m.begun[n]
	delete(m.begun, n)
	m.mu.Unlock()
	if timed {
		c.mu.Lock()
		c.latencies = append(c.latencies, now.Sub(begun))
		c.mu.Unlock()
	}
}

// take returns how long messages took since the last call.
func (c *crowd) take() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.latencies
	c.latencies = nil
	return d
}

// send waits for a free place and sends. timed says that its way is measured.
func (m *member) send(ctx context.Context, receiver string, size int, timed bool) error {
	select {
	case m.slots <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.next
	m.next++
	content := checker.AppendContent(nil, m.stream, n, size)
	m.crowd.check.Sent(m.stream, n, receiver)
	if timed {
		m.begun[n] = time.Now()
	}
	f := protocol.Frame{Kind: protocol.KindSend, Seq: n, Receiver: []byte(receiver), Content: content, Timestamp: 1}
	return wsutil.WriteClientBinary(m.conn, protocol.AppendBinary(nil, &f))
}

// chat lets the senders send, by turns, this many a second in all, to receivers by turns, until ctx ends. It tells how many.
func (c *crowd) chat(ctx context.Context, senders, receivers []*member, perSecond, size int, timed bool) (sent int) {
	begun := time.Now()
	tick := time.NewTicker(floodTick)
	defer tick.Stop()
	for {
		for due := int(time.Since(begun).Seconds() * float64(perSecond)); sent < due && ctx.Err() == nil; sent++ {
			from, to := senders[sent%len(senders)], receivers[(sent+sent/len(senders)+1)%len(receivers)]
			if err := from.send(ctx, to.user, size, timed); err != nil {
				c.t.Errorf("%s sends: %v", from.user, err)
				return sent
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return sent
		}
	}
}

// judge waits until everything has been answered, shown and told, and wants it to be so once and in order.
func (c *crowd) judge() *checker.Verdict {
	c.t.Helper()
	v := settle(c.t, c.check)
	if !v.OK() || v.Open > 0 {
		c.t.Errorf("%d outstanding: %s\nthe server said:\n%s", c.check.Outstanding(), v, c.server.log())
	}
	return v
}

func (c *crowd) leave() {
	for _, m := range c.people {
		m.leaving.Store(true)
		m.mu.Lock()
		m.conn.Close()
		m.mu.Unlock()
	}
	for _, m := range c.people {
		m.reading.Wait()
	}
}
