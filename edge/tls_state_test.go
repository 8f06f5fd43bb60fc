package edge

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"reflect"
	"runtime"
	"sync"
	"testing"
	"time"

	"millrace/protocol"
)

// tlsBench is a bench whose connections speak TLS, with clients in memory.
type tlsBench struct {
	*bench
	woken chan struct{}
}

func newTLSBench(t testing.TB, change func(*Config)) *tlsBench {
	t.Helper()
	b := &tlsBench{woken: make(chan struct{}, 1)}
	b.bench = newBench(t, func(c *Config) {
		c.Certificate = identity().source
		if change != nil {
			change(c)
		}
	})
	b.l.driver = b
	return b
}

// wake is called by handshakes, on their goroutines.
func (b *tlsBench) wake() {
	select {
	case b.woken <- struct{}{}:
	default:
	}
}

// memoryWire is a connection whose other end is a fakeSocket. Reads wait during the handshake only.
type memoryWire struct {
	net.Conn
	mu          sync.Mutex
	cond        sync.Cond
	in          []byte
	out         chan []byte
	established bool
	ended       bool
}

func newMemoryWire() *memoryWire {
	w := &memoryWire{out: make(chan []byte, 16)}
	w.cond.L = &w.mu
	return w
}

func (w *memoryWire) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.in) == 0 && !w.established && !w.ended {
		w.cond.Wait()
	}
	n := copy(p, w.in)
	w.in = w.in[n:]
	switch {
	case n > 0:
		return n, nil
	case w.ended:
		return 0, io.EOF
	}
	return 0, errTLSAgain
}

func (w *memoryWire) Write(p []byte) (int, error) {
	w.out <- bytes.Clone(p)
	return len(p), nil
}

func (w *memoryWire) Close() error                     { return nil }
func (w *memoryWire) SetDeadline(time.Time) error      { return nil }
func (w *memoryWire) SetReadDeadline(time.Time) error  { return nil }
func (w *memoryWire) SetWriteDeadline(time.Time) error { return nil }

func (w *memoryWire) deliver(b []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.in = append(w.in, b...)
	w.cond.Broadcast()
}

// tlsClient is a client of a tlsBench.
type tlsClient struct {
	*tls.Conn
	bench  *tlsBench
	wire   *memoryWire
	socket *fakeSocket
}

// connect accepts a connection and has a client make the handshake.
func (b *tlsBench) connect(config *tls.Config) *tlsClient {
	b.t.Helper()
	c := &tlsClient{bench: b, wire: newMemoryWire(), socket: b.accept()}
	c.Conn = tls.Client(c.wire, config)
	shook := make(chan error, 1)
	go func() { shook <- c.Conn.Handshake() }()
	limit := time.After(patience)
	for client, server := false, false; !client || !server; {
		select {
		case data := <-c.wire.out:
			c.socket.receive(data)
		case <-b.woken:
			b.l.drainInbox()
		case err := <-shook:
			if err != nil {
				b.t.Fatal(err)
			}
			client = true
		case <-limit:
			b.t.Fatal("no handshake in time")
		}
		c.fetch()
		t, ok := c.socket.conn.sock.(*tlsSocket)
		server = ok && t.handshake == nil
	}
	c.wire.established = true
	return c
}

// fetch brings to the client what was written to the socket.
func (c *tlsClient) fetch() {
	c.wire.deliver(c.socket.out)
	c.socket.out = nil
}

// say encrypts and returns the ciphertext.
func (c *tlsClient) say(b []byte) (cipher []byte) {
	c.bench.t.Helper()
	if _, err := c.Write(b); err != nil {
		c.bench.t.Fatal(err)
	}
	for len(c.wire.out) > 0 {
		cipher = append(cipher, <-c.wire.out...)
	}
	return cipher
}

// hear decrypts everything that was sent.
func (c *tlsClient) hear() []byte {
	c.bench.t.Helper()
	c.fetch()
	all, err := io.ReadAll(c.Conn)
	if err != nil && !errors.Is(err, errTLSAgain) {
		c.bench.t.Fatal(err)
	}
	return all
}

// open brings a connection over TLS to the state in which connected was sent.
func (b *tlsBench) open(config *tls.Config, user string) *tlsClient {
	b.t.Helper()
	c := b.connect(config)
	c.socket.receive(c.say([]byte(upgradeText(protocol.SubprotocolBinary, ""))))
	c.socket.receive(c.say(encode(false, &protocol.Frame{Kind: protocol.KindConnect, Token: []byte(user), Device: []byte("phone")})))
	b.s.Registered(protocol.Registered{To: b.asked[len(b.asked)-1].Session})
	b.l.drainInbox()
	if c.socket.conn.state != stateOpen {
		b.t.Fatalf("state %d", c.socket.conn.state)
	}
	c.hear()
	return c
}

// heapBytes is what is alive.
func heapBytes() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // pools forget in two steps
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// idleTLSBytes is the goal of memory for an idle connection of TLS, besides that of the connection itself.
const idleTLSBytes = 4 << 10

// TestIdleTLSMemory weighs authenticated connections that have sent and received, after their clients are gone.
func TestIdleTLSMemory(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		bothVersions(t, func(t *testing.T, version uint16) {
			b := newTLSBench(t, nil)
			config := identity().clientOf(version)
			if resumed {
				config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			}
			const warm, weighed = 20, 200
			open := func(n int) {
				for range n {
					c := b.open(config, "alice")
					large := encode(false, &protocol.Frame{Kind: protocol.KindAcknowledge, Timestamp: 1, IDs: make([]protocol.MessageID, 64)})
					c.socket.receive(c.say(bytes.Repeat(large, 12)))
					c.hear()
					b.live(c.socket)
					b.l.relax(c.socket.conn)
					if c.socket.conn.work != nil {
						t.Fatal("the connection is not idle")
					}
					c.wire.in, c.socket.bench = nil, b.bench
				}
			}
			open(warm)
			before := heapBytes()
			open(weighed)
			each := (heapBytes() - before) / weighed
			t.Logf("resumed %v: %d B for an idle connection", resumed, each)
			if each > idleTLSBytes && b.l.tls.buffers.fields != nil {
				t.Errorf("an idle connection takes %d B, want at most %d", each, idleTLSBytes)
			}
			runtime.KeepAlive(b)
		})
	}
}

// TestTLSBuffersAreShared: connections with incomplete records keep theirs, the others nothing; and all read what was sent.
func TestTLSBuffersAreShared(t *testing.T) {
	if _, err := usableTLSFields(); err != nil {
		t.Fatalf("this Go keeps input buffers elsewhere, and TLS connections take more memory: %v", err)
	}
	b := newTLSBench(t, nil)
	var got []string
	b.publish = func(s *protocol.Submission) protocol.Refusal {
		got = append(got, string(s.Content))
		return protocol.Refusal{}
	}
	half, whole := b.open(identity().config(), "alice"), b.open(identity().config(), "carol")
	fields := b.l.tls.buffers.fields
	server := func(c *tlsClient) *tls.Conn { return c.socket.conn.sock.(*tlsSocket).conn }
	capacity := func(c *tlsClient) int {
		raw, hand, _ := fields.of(server(c))
		return raw.Cap() + hand.Cap()
	}

	record := half.say(encode(false, sendFrame(1, "in halves")))
	half.socket.receive(record[:20])
	if n := capacity(half); n < 20 || n > 128 {
		t.Errorf("20 bytes of a record are kept in %d", n)
	}
	for seq := range uint64(3) {
		whole.socket.receive(whole.say(encode(false, sendFrame(seq+1, "whole"))))
	}
	if n := capacity(whole); n != 0 {
		t.Errorf("a connection with nothing incomplete keeps %d bytes", n)
	}
	for i := 20; i < len(record); i++ {
		half.socket.receive(record[i : i+1])
	}
	if n := capacity(half); n != 0 {
		t.Errorf("after the record is complete %d bytes are kept", n)
	}
	if want := []string{"whole", "whole", "whole", "in halves"}; !equalStrings(got, want) {
		t.Errorf("submitted %q", got)
	}
}

func equalStrings(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// TestTLSWithoutSharedBuffers is the way back, when crypto/tls has changed.
func TestTLSWithoutSharedBuffers(t *testing.T) {
	b := newTLSBench(t, nil)
	b.l.tls.buffers.fields = nil
	bothVersions(t, func(t *testing.T, version uint16) {
		c := b.open(identity().clientOf(version), "alice")
		record := c.say(encode(false, sendFrame(1, "hello")))
		c.socket.receive(record[:9])
		c.socket.receive(record[9:])
		session := b.l.session(c.socket.conn)
		b.s.Answer([]protocol.Answer{{To: session, Seq: 1, Position: 1, Millis: 1}})
		b.l.drainInbox()
		if len(c.hear()) == 0 {
			t.Error("no answer")
		}
	})
}

func TestTLSFieldsOfAnotherGo(t *testing.T) {
	for _, conn := range []reflect.Type{
		reflect.TypeFor[struct{ hand bytes.Buffer }](),
		reflect.TypeFor[struct {
			rawInput, hand []byte
			input          bytes.Reader
		}](),
		reflect.TypeFor[struct {
			rawInput, hand bytes.Buffer
			input          *bytes.Reader
		}](),
	} {
		if f, err := findTLSFields(conn); err == nil || f != nil {
			t.Errorf("%v is taken for a tls.Conn", conn)
		}
	}
}

// TestTLSWritesOnce: what a turn has to say is one write, of as many records as it takes, and the limit counts ciphertext.
func TestTLSWritesOnce(t *testing.T) {
	b := newTLSBench(t, nil)
	c := b.open(identity().config(), "alice")
	session := b.live(c.socket)
	c.hear()
	c.socket.writes = 0
	var pushes []protocol.Push
	for i := range 40 {
		pushes = append(pushes, protocol.Push{To: session, Device: "phone", Message: testMessage(i+1, "alice", string(bytes.Repeat([]byte("y"), 900)))})
	}
	b.s.Push(pushes)
	b.l.drainInbox()
	if c.socket.writes != 1 {
		t.Errorf("%d writes", c.socket.writes)
	}
	sent := len(c.socket.out)
	if plain := len(c.hear()); plain < 40*900 || sent <= plain || sent > plain+4*tlsRecordExtra {
		t.Errorf("%d bytes of plaintext became %d", plain, sent)
	}
	c.socket.stalled = true
	b.s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(41, "alice", "more")}})
	b.l.drainInbox()
	if n := c.socket.conn.sock.OutboundBuffered(); n != len(c.socket.out) || n == 0 {
		t.Errorf("%d bytes are buffered, %d were written", n, len(c.socket.out))
	}
}

// TestTLSWriteFails: the connection is closed within the write, and counted once.
func TestTLSWriteFails(t *testing.T) {
	for name, spoil := range map[string]func(*fakeSocket){
		"socket": func(s *fakeSocket) { s.broken = true },
		"limit":  func(s *fakeSocket) { s.buffered = tlsHardBytes },
	} {
		t.Run(name, func(t *testing.T) {
			b := newTLSBench(t, nil)
			c := b.open(identity().config(), "alice")
			session := b.live(c.socket)
			spoil(c.socket)
			b.s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(1, "alice", "x")}})
			b.l.drainInbox()
			if !c.socket.closed || b.s.connections.Load() != 0 || b.l.m.panics != 0 {
				t.Errorf("closed %v, %d connections, %d panics", c.socket.closed, b.s.connections.Load(), b.l.m.panics)
			}
			if len(b.settled) != 1 || b.settled[0].Kind != protocol.Lost {
				t.Errorf("settled %+v", b.settled)
			}
		})
	}
}

// TestTLSGoneDuringHandshake: the goroutine ends whenever the socket is closed, and what it says then is for nobody.
func TestTLSGoneDuringHandshake(t *testing.T) {
	b := newTLSBench(t, nil)
	hello := clientHello(t, tls.VersionTLS13)
	first := b.accept()
	first.receive(hello)
	first.close()
	second := b.accept() // in the same slot
	second.receive(hello[:10])
	eventually(t, "the goroutine to end", func() bool { return b.s.tls.pending.Load() == 0 })
	b.l.drainInbox()
	if len(second.out) != 0 || second.closed {
		t.Error("the next connection of the slot got what was for the first")
	}
	if b.l.m.tlsHandshakes[tlsUnfinished] != 1 || b.s.connections.Load() != 1 {
		t.Errorf("%v, %d connections", b.l.m.tlsHandshakes, b.s.connections.Load())
	}
}

// TestTLSPanic: a certificate source that panics costs the connection.
func TestTLSPanic(t *testing.T) {
	s, _ := serve(t, func(c *Config) {
		c.Certificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if h.ServerName != "localhost" {
				panic("bug")
			}
			return identity().source(h)
		}
	})
	config := identity().config()
	config.ServerName = "elsewhere"
	if err := tls.Client(rawDial(t, s), config).Handshake(); err == nil {
		t.Error("a handshake without a certificate")
	}
	wantTLSHandshakes(t, s, "failed", 1)
	if n := metric(s, "panics_total"); n != 1 {
		t.Errorf("%v panics", n)
	}
	talk(t, secured(t, rawDial(t, s)), "alice")
}

// BenchmarkTLSSend is BenchmarkSend with a record of TLS in each direction.
func BenchmarkTLSSend(b *testing.B) {
	bench := newTLSBench(b, nil)
	c := bench.open(identity().config(), "alice")
	session := bench.l.session(c.socket.conn)
	answers := make([]protocol.Answer, 1)
	var data []byte
	b.ReportAllocs()
	seq := uint64(0)
	for b.Loop() {
		b.StopTimer()
		seq++
		data = appendSend(data[:0], false, seq)
		record := c.say(data)
		c.socket.out = c.socket.out[:0]
		b.StartTimer()
		bench.l.traffic(c.socket.conn, record)
		answers[0] = protocol.Answer{To: session, Seq: seq, Position: 1, Millis: 1}
		bench.s.Answer(answers)
		bench.l.drainInbox()
	}
	if c.socket.closed || bench.l.m.panics > 0 {
		b.Fatal("closed")
	}
}

// BenchmarkTLSHandshake is what a handshake costs both sides, of which this loop and its goroutine are one.
func BenchmarkTLSHandshake(b *testing.B) {
	for _, resumed := range []bool{false, true} {
		b.Run(map[bool]string{false: "full", true: "resumed"}[resumed], func(b *testing.B) {
			bench := newTLSBench(b, nil)
			config := identity().config()
			if resumed {
				config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			}
			for b.Loop() {
				c := bench.connect(config)
				if resumed {
					c.hear() // the ticket
				}
				c.socket.close()
			}
			if m := &bench.l.m.tlsHandshakes; resumed != (m[tlsResumed13] > m[tlsDone13]) && b.N > 2 {
				b.Errorf("%d full, %d resumed", m[tlsDone13], m[tlsResumed13])
			}
		})
	}
}
