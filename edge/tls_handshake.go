package edge

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxTLSHandshakes is how many handshakes are under way at most; a connection beyond it is closed. It has a goroutine only from a
	// complete client hello on, so who says nothing or half of a hello takes no place. With what maxTLSHandshakeBytes lets one hold, all of
	// them take 250 MiB at worst, and 100 MiB with the hellos of browsers.
	maxTLSHandshakes = 2048
	// maxTLSHandshakeBytes is what is kept of what a client sends until its handshake is done: a hello, which takes 2 KiB, its last
	// word, and the first record of a request, which is answered, if only with 431. Who sends more before the answer is closed after it.
	maxTLSHandshakeBytes = tlsRecordBytes + 8<<10
	// maxTLSWorkers is how many handshakes compute at once; fewer where that is more than half of the cores: the loops need the rest.
	maxTLSWorkers = 16
)

// Results of a TLS handshake.
const (
	tlsDone12 = iota
	tlsDone13
	tlsResumed12
	tlsResumed13
	tlsFailed
	tlsNotTLS
	tlsRefused
	tlsUnfinished
	tlsResults
)

var tlsResultNames = [tlsResults]string{"1.2", "1.3", "1.2_resumed", "1.3_resumed", "failed", "not_tls", "overloaded", "unfinished"}

// tlsServer is what a server needs for TLS.
type tlsServer struct {
	config  *tls.Config
	most    int64         // pending ones at most
	compute chan struct{} // holds one for each handshake that computes
	pending atomic.Int64  // handshakes that have a goroutine
	panics  atomic.Uint64
	logged  atomic.Int64 // when a panic was logged last, seconds
}

func newTLSServer(cfg *Config) *tlsServer {
	return &tlsServer{
		config:  tlsConfig(cfg.Certificate),
		most:    int64(cfg.tlsHandshakes),
		compute: make(chan struct{}, min(max(1, runtime.GOMAXPROCS(0)/2), maxTLSWorkers)),
	}
}

// tlsHandshake is a handshake under way: what passes between its loop, which has the socket, and its goroutine.
type tlsHandshake struct {
	// Immutable.
	conn   uint64
	server *Server
	ready  chan struct{} // holds one when there is more in in
	gone   chan struct{} // closed when the socket is

	// Of the loop.
	started bool // there is a goroutine
	left    bool // gone is closed
	taken   int  // bytes
	cut     bool // there were more

	// Of the goroutine.
	computing bool

	mu   sync.Mutex
	in   []byte // ciphertext from the peer, not read yet
	out  []byte // ciphertext for the peer
	told bool   // the loop will look
	done bool
	err  error // of the handshake, once done
}

// startTLS makes a connection one that begins with a TLS handshake.
func (l *loop) startTLS(c *conn) {
	t := newTLSSocket(l, c.sock)
	t.handshake = &tlsHandshake{
		conn:   handle(l.index, c.slot, c.serial),
		server: l.server,
		ready:  make(chan struct{}, 1),
		gone:   make(chan struct{}),
	}
	c.sock = t
}

// feedHandshake passes on what came during the handshake.
func (l *loop) feedHandshake(c *conn, t *tlsSocket, data []byte) {
	defer l.recoverFrom(l.session(c).Conn)
	h := t.handshake
	if c.has(flagDeaf) {
		return
	}
	if room := maxTLSHandshakeBytes - h.taken; len(data) > room {
		data, h.cut = data[:room], true
	}
	h.taken += len(data)
	h.put(data)
	if h.started {
		return
	}
	switch looksLike(h.in) { // which nobody else knows yet
	case helloIncomplete:
	case helloComplete:
		if s := l.server.tls; s.pending.Add(1) > s.most {
			s.pending.Add(-1)
			l.failTLS(c, tlsRefused)
			return
		}
		h.started = true
		go h.run(t)
	case helloHTTP:
		_ = t.send(notHTTPS)
		l.failTLS(c, tlsNotTLS)
	default:
		l.failTLS(c, tlsNotTLS)
	}
}

var notHTTPS = appendRefused(nil, httpError{400, "this port speaks TLS: use wss:// or https://"}, 0)

// failTLS gives up a handshake, whose goroutine may be at work, and closes the connection, unless it is closed already.
func (l *loop) failTLS(c *conn, result int) {
	t, ok := c.sock.(*tlsSocket)
	if !ok {
		return
	}
	t.handshake.leave()
	t.broken = true
	l.m.tlsHandshakes[result]++
	c.reason = closeTLS
	l.doom(c)
}

// What the first bytes of a connection look like.
const (
	helloIncomplete = iota
	helloComplete
	helloHTTP
	helloNonsense
)

// looksLike tells when a goroutine is worth its while: when the first record is there.
func looksLike(b []byte) int {
	const header, handshakeRecord = 5, 22
	switch {
	case len(b) == 0:
		return helloIncomplete
	case b[0] != handshakeRecord:
		for _, method := range []string{"GET ", "HEAD ", "POST ", "PUT ", "OPTIONS ", "CONNECT "} {
			if bytes.HasPrefix(b, []byte(method)) {
				return helloHTTP
			}
			if len(b) < len(method) && method[:len(b)] == string(b) {
				return helloIncomplete
			}
		}
		return helloNonsense
	case len(b) < header:
		return helloIncomplete
	}
	if n := int(b[3])<<8 | int(b[4]); n <= tlsRecordBytes && len(b) < header+n {
		return helloIncomplete
	}
	return helloComplete // or so long that crypto/tls will say what is wrong with it
}

// put brings bytes of the peer to the goroutine.
func (h *tlsHandshake) put(data []byte) {
	h.mu.Lock()
	h.in = append(h.in, data...)
	h.mu.Unlock()
	select {
	case h.ready <- struct{}{}:
	default:
	}
}

// leave ends the goroutine, soon: it still uses the tlsSocket and this until then.
func (h *tlsHandshake) leave() {
	if !h.left {
		h.left = true
		close(h.gone)
	}
}

func (h *tlsHandshake) run(t *tlsSocket) {
	s := h.server.tls
	defer s.pending.Add(-1)
	defer h.rest()
	err := h.attempt(t)
	h.mu.Lock()
	h.done, h.err = true, err
	h.mu.Unlock()
	h.tell()
}

func (h *tlsHandshake) attempt(t *tlsSocket) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errTLSPanic
			s := h.server.tls
			s.panics.Add(1)
			if now, last := time.Now().Unix(), s.logged.Load(); now != last && s.logged.CompareAndSwap(last, now) {
				h.server.cfg.Logger.Error("panic in a TLS handshake; its connection is closed",
					slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
			}
		}
	}()
	if !h.work() {
		return net.ErrClosed
	}
	return t.conn.Handshake()
}

// work waits until this handshake may compute. It is false when its connection is gone.
func (h *tlsHandshake) work() bool {
	select {
	case <-h.gone:
		return false
	default:
	}
	select {
	case h.server.tls.compute <- struct{}{}:
		h.computing = true
		return true
	case <-h.gone:
		return false
	}
}

// rest lets another handshake compute.
func (h *tlsHandshake) rest() {
	if h.computing {
		h.computing = false
		<-h.server.tls.compute
	}
}

// read waits for bytes of the peer. While it does, others compute.
func (h *tlsHandshake) read(p []byte) (int, error) {
	for {
		h.mu.Lock()
		n := copy(p, h.in)
		h.in = h.in[n:]
		h.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		h.rest()
		select {
		case <-h.ready:
		case <-h.gone:
			return 0, net.ErrClosed
		}
		if !h.work() {
			return 0, net.ErrClosed
		}
	}
}

// write leaves bytes for the peer with the loop.
func (h *tlsHandshake) write(p []byte) (int, error) {
	h.mu.Lock()
	h.out = append(h.out, p...)
	h.mu.Unlock()
	h.tell()
	return len(p), nil
}

// tell makes the loop look.
func (h *tlsHandshake) tell() {
	h.mu.Lock()
	told := h.told
	h.told = true
	h.mu.Unlock()
	if !told {
		h.server.handshaken(h.conn)
	}
}

// collect is the loop looking.
func (h *tlsHandshake) collect() (out []byte, done bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told = false
	out, h.out = h.out, nil
	return out, h.done, h.err
}

// handshaken sends what a handshake has to say, and goes on with what the peer sent behind its end.
func (l *loop) handshaken(id uint64) {
	c := l.slots.find(id)
	if c == nil {
		return
	}
	t, ok := c.sock.(*tlsSocket)
	if !ok || t.handshake == nil || c.has(flagDeaf) {
		return
	}
	h := t.handshake
	out, done, err := h.collect()
	if len(out) > 0 && t.send(out) != nil {
		if !t.closed {
			l.failTLS(c, tlsFailed)
		}
		return
	}
	switch {
	case !done:
	case err != nil:
		l.refuseTLS(c, t)
	default:
		t.handshake = nil
		l.m.tlsHandshakes[tlsResult(t.conn.ConnectionState())]++
		l.tls.buffers.trim(t.conn)
		l.readTLS(c, t, h.in)
		if h.cut && !t.closed && !c.has(flagDeaf) { // what follows cannot be decrypted
			l.endTLS(c, t, net.ErrClosed)
		}
	}
}

func tlsResult(s tls.ConnectionState) int {
	switch {
	case s.Version == tls.VersionTLS12 && s.DidResume:
		return tlsResumed12
	case s.Version == tls.VersionTLS12:
		return tlsDone12
	case s.DidResume:
		return tlsResumed13
	}
	return tlsDone13
}

// refuseTLS ends a connection whose handshake has failed. The alert is sent: as in loop.write, the peer may close first.
func (l *loop) refuseTLS(c *conn, t *tlsSocket) {
	t.handshake, t.broken = nil, true
	l.m.tlsHandshakes[tlsFailed]++
	c.reason = closeTLS
	c.state = stateClosing
	c.flags |= flagDeaf
	c.deadline = l.tick + lingerTicks
	l.driver.closeWrite(t)
}
