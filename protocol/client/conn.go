package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// Limits of one connection.
const (
	// ConnectTimeout bounds an attempt from dialing to connected.
	ConnectTimeout = 20 * time.Second
	// TokenTimeout bounds one call of a TokenSource.
	TokenTimeout = 30 * time.Second
	// WriteTimeout bounds one write to the network; a server that takes nothing for so long is gone.
	WriteTimeout = 10 * time.Second
	// CloseTimeout is how long a graceful close waits for what was written and for the server's close frame.
	CloseTimeout = time.Second

	// maxOutBytes bounds what waits for the network. 64 open sends and 320 acknowledgements are under 300 KiB; more
	// means a server that takes nothing and asks for ever more pongs.
	maxOutBytes = 1 << 20
	// maxHandshakeBytes bounds the HTTP answer, whose lines the parser would otherwise collect without end.
	maxHandshakeBytes = 16 << 10
	readBufferBytes   = 16 << 10
	pingBytes         = 8
)

// serverFrame is a protocol.Frame from the server that owns its strings.
type serverFrame struct {
	Kind             protocol.Kind
	User             string
	Device           string
	Epoch            uint64
	Sender           string
	Receiver         string
	Content          string
	Text             string
	Seq              uint64
	ID               protocol.MessageID
	Position         uint64
	Timestamp        int64
	HeartbeatSeconds uint32
	Code             protocol.Code
	ResendFrom       uint64
	RetryAfterMs     uint32
	Receipts         []receipt
}

type receipt struct {
	id        protocol.MessageID
	position  uint64
	seq       uint64
	timestamp int64
	receiver  string
}

// connEvent is what a connection tells the client's goroutine: its token, frames, or its end.
type connEvent struct {
	conn    *conn
	token   string // made for this connection
	renewed bool   // a renewal has ended, with a token or without
	frames  []serverFrame
	end     *ending
}

// conn is one attempt to connect and the connection that comes of it. One goroutine dials and reads, one writes.
type conn struct {
	// Immutable.
	encoding Encoding
	dialer   ws.Dialer
	url      string
	events   chan<- connEvent
	begun    time.Time

	// told is done when the client no longer listens; life is done when the socket must go.
	told     context.Context
	stopTell context.CancelFunc
	life     context.Context
	kill     context.CancelFunc

	lastRead atomic.Int64 // nanoseconds after begun

	mu        sync.Mutex
	out       []byte        // WebSocket frames that wait for the writer
	finishing bool          // the last frame is in out
	failure   error         // why this side killed the socket
	wake      chan struct{} // capacity 1

	flushed chan struct{} // closed by the writer when the last frame has left

	httpStatus StatusError   // of the dialing goroutine
	retryAfter time.Duration // of the dialing goroutine
}

func newConn(ctx context.Context, opts *Options, events chan<- connEvent) *conn {
	c := &conn{encoding: opts.Encoding, url: opts.URL, events: events, begun: time.Now(),
		wake: make(chan struct{}, 1), flushed: make(chan struct{})}
	c.told, c.stopTell = context.WithCancel(ctx)
	c.life, c.kill = context.WithCancel(context.Background())
	c.dialer = ws.Dialer{
		Protocols:     []string{c.encoding.subprotocol()},
		NetDial:       opts.NetDial,
		TLSConfig:     opts.TLSConfig,
		Header:        ws.HandshakeHeaderHTTP(opts.Header),
		OnStatusError: c.refusedUpgrade,
		WrapConn:      func(nc net.Conn) net.Conn { return &handshakeConn{Conn: nc, left: maxHandshakeBytes} },
	}
	return c
}

// run makes the attempt and reports its end. source is asked for a token first; without one, token is used.
func (c *conn) run(source TokenSource, token string, hello protocol.Frame, wg *sync.WaitGroup) {
	end := c.attempt(source, token, hello, wg)
	c.kill()
	c.tell(connEvent{end: &end})
}

// tell hands an event over unless the client has turned away.
func (c *conn) tell(ev connEvent) {
	ev.conn = c
	select {
	case c.events <- ev:
	case <-c.told.Done():
	}
}

func (c *conn) attempt(source TokenSource, token string, hello protocol.Frame, wg *sync.WaitGroup) ending {
	if source != nil {
		var err error
		if token, err = fetchToken(c.told, source); err != nil {
			return ending{err: err, tokenErr: true}
		}
		c.tell(connEvent{token: token})
	}
	nc, br, end := c.dial()
	if end != nil {
		return *end
	}
	stop := context.AfterFunc(c.life, func() { _ = nc.Close() })
	defer func() {
		stop()
		_ = nc.Close() // a second close does no harm
	}()
	wg.Go(func() { c.writeLoop(nc) })
	hello.Token = []byte(token)
	c.send([]protocol.Frame{hello})
	return c.explain(c.readLoop(nc, br))
}

// explain puts the reason for which this side killed the socket in place of the reader's "closed connection".
func (c *conn) explain(end ending) ending {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil && end.closeCode == 0 {
		end.err = c.failure
	}
	return end
}

func fetchToken(ctx context.Context, source TokenSource) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, TokenTimeout)
	defer cancel()
	token, err := source(ctx)
	switch {
	case err != nil:
		return "", fmt.Errorf("get a token: %w", err)
	case len(token) == 0 || len(token) > protocol.MaxTokenBytes:
		return "", fmt.Errorf("get a token: %d bytes are not a token", len(token))
	}
	return token, nil
}

func (c *conn) dial() (net.Conn, *bufio.Reader, *ending) {
	ctx, cancel := context.WithTimeout(c.told, ConnectTimeout)
	defer cancel()
	nc, br, hs, err := c.dialer.Dial(ctx, c.url)
	if err != nil {
		if c.httpStatus.Status != 0 {
			status := c.httpStatus
			return nil, nil, &ending{err: &status, status: status.Status, retryAfter: c.retryAfter}
		}
		return nil, nil, &ending{err: fmt.Errorf("connect: %w", err)}
	}
	if hs.Protocol != c.encoding.subprotocol() && !(c.encoding == JSON && hs.Protocol == "") {
		return nil, nil, &ending{err: errors.Join(errors.New("connect: the server does not speak "+c.encoding.subprotocol()), nc.Close())}
	}
	if h, ok := nc.(*handshakeConn); ok {
		nc = h.Conn // the limit was for the handshake
	}
	return nc, br, nil
}

// refusedUpgrade notes an HTTP answer that is not an upgrade.
func (c *conn) refusedUpgrade(status int, reason []byte, resp io.Reader) {
	c.httpStatus = StatusError{Status: status, Reason: string(reason)}
	r, err := http.ReadResponse(bufio.NewReader(resp), nil)
	if err != nil {
		return
	}
	_ = r.Body.Close()
	if seconds, err := strconv.ParseUint(r.Header.Get("Retry-After"), 10, 31); err == nil {
		c.retryAfter = time.Duration(seconds) * time.Second
	}
}

// handshakeConn bounds what is read before the upgrade is complete.
type handshakeConn struct {
	net.Conn
	left int
}

var errHandshakeTooLong = errors.New("the answer to the upgrade is too long")

func (h *handshakeConn) Read(p []byte) (int, error) {
	if h.left <= 0 {
		return 0, errHandshakeTooLong
	}
	n, err := h.Conn.Read(p[:min(len(p), h.left)])
	h.left -= n
	return n, err
}

// send encodes protocol frames and queues them for the writer, as many in a WebSocket message as fit. It never blocks.
func (c *conn) send(frames []protocol.Frame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var message, one []byte
	for i := range frames {
		one = c.encoding.append(one[:0], &frames[i])
		if len(message) > 0 && len(message)+1+len(one) > c.encoding.maxMessage() {
			c.frame(c.encoding.opcode(), message)
			message = message[:0]
		}
		if len(message) > 0 && c.encoding == JSON {
			message = append(message, '\n')
		}
		message = append(message, one...)
	}
	if len(message) > 0 {
		c.frame(c.encoding.opcode(), message)
	}
}

// ping asks the server for a sign of life.
func (c *conn) ping() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frame(ws.OpPing, make([]byte, pingBytes))
}

// frame appends one masked WebSocket frame; mu is held.
func (c *conn) frame(op ws.OpCode, payload []byte) {
	if c.finishing || c.failure != nil {
		return
	}
	if len(c.out)+len(payload) > maxOutBytes {
		c.failLocked(errServerStuck)
		return
	}
	h := ws.Header{Fin: true, OpCode: op, Masked: true, Length: int64(len(payload))}
	_, _ = rand.Read(h.Mask[:]) // never fails
	buf := bytes.NewBuffer(c.out)
	if err := ws.WriteHeader(buf, h); err != nil {
		panic(err) // a length that fits an int64, into memory
	}
	c.out = append(buf.Bytes(), payload...)
	ws.Cipher(c.out[len(c.out)-len(payload):], h.Mask, 0)
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

var errServerStuck = errors.New("the server does not read what is sent to it")

// fail kills the socket; the reader then reports err.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(err)
}

func (c *conn) failLocked(err error) {
	if c.failure == nil {
		c.failure = err
	}
	c.kill()
}

// finish closes gracefully: what was sent and a close frame leave, the server answers, the socket is closed; all within CloseTimeout.
// The client hears nothing more of this connection.
func (c *conn) finish(code protocol.CloseCode) {
	c.stopTell()
	c.closeWith(code)
	time.AfterFunc(CloseTimeout, c.kill)
}

// closeWith queues a close frame as the last one.
func (c *conn) closeWith(code protocol.CloseCode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frame(ws.OpClose, binary.BigEndian.AppendUint16(nil, uint16(code)))
	c.finishing = true
}

// killUnlessFinishing closes at once what is not being closed gracefully.
func (c *conn) killUnlessFinishing() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.finishing {
		c.kill()
	}
}

// writeLoop writes what send queued: everything that has gathered since the last write in one.
func (c *conn) writeLoop(nc net.Conn) {
	var writing []byte
	for {
		select {
		case <-c.wake:
		case <-c.life.Done():
			return
		}
		c.mu.Lock()
		writing, c.out = c.out, writing[:0]
		last := c.finishing
		c.mu.Unlock()
		err := nc.SetWriteDeadline(time.Now().Add(WriteTimeout))
		if err == nil {
			_, err = nc.Write(writing)
		}
		if err != nil {
			c.fail(fmt.Errorf("write: %w", err))
			return
		}
		if last {
			close(c.flushed)
			return
		}
	}
}

// silence is how long nothing has come from the server.
func (c *conn) silence() time.Duration {
	return time.Since(c.begun) - time.Duration(c.lastRead.Load())
}

// timedReader notes when bytes came.
type timedReader struct {
	io.Reader
	c *conn
}

func (r timedReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.c.lastRead.Store(int64(time.Since(r.c.begun)))
	}
	return n, err
}

// readLoop reads until the connection ends. buffered (may be nil) holds what came with the HTTP answer.
func (c *conn) readLoop(nc net.Conn, buffered *bufio.Reader) ending {
	var r io.Reader = timedReader{nc, c}
	if buffered != nil {
		rest, _ := buffered.Peek(buffered.Buffered())
		r = io.MultiReader(bytes.NewReader(bytes.Clone(rest)), r)
		ws.PutReader(buffered)
	}
	m := messageReader{conn: c, r: bufio.NewReaderSize(r, readBufferBytes)}
	var frame protocol.Frame
	for {
		payload, end := m.next()
		if end != nil {
			return *end
		}
		frames, err := c.parse(payload, &frame)
		if len(frames) > 0 {
			c.tell(connEvent{frames: frames})
		}
		if err != nil {
			return c.violation(protocol.CloseProtocolError, err)
		}
	}
}

// violation ends a connection on which the server broke the protocol.
func (c *conn) violation(code protocol.CloseCode, err error) ending {
	c.closeWith(code)
	c.flush()
	return ending{err: fmt.Errorf("the server broke the protocol: %w", err)}
}

// flush waits, bounded, until the writer has sent the close frame.
func (c *conn) flush() {
	timeout := time.NewTimer(CloseTimeout)
	defer timeout.Stop()
	select {
	case <-c.flushed:
	case <-timeout.C:
	case <-c.life.Done():
	}
}

// messageReader joins WebSocket frames to messages and answers control frames.
type messageReader struct {
	conn    *conn
	r       *bufio.Reader
	message []byte
}

// next returns the next data message, valid until the following call.
func (m *messageReader) next() ([]byte, *ending) {
	state := ws.StateClientSide
	m.message = m.message[:0]
	fragments := 0
	for {
		h, err := ws.ReadHeader(m.r)
		if err != nil {
			return nil, &ending{err: fmt.Errorf("read: %w", err)}
		}
		if err := ws.CheckHeader(h, state); err != nil {
			return nil, m.violation(protocol.CloseProtocolError, err)
		}
		if h.OpCode.IsControl() {
			if end := m.control(h); end != nil {
				return nil, end
			}
			continue
		}
		if h.OpCode != ws.OpContinuation && h.OpCode != m.conn.encoding.opcode() {
			return nil, m.violation(protocol.CloseUnsupported, errors.New("a message of the wrong type"))
		}
		if fragments++; fragments > protocol.MaxFragments || h.Length > protocol.MaxServerFrameBytes-int64(len(m.message)) {
			return nil, m.violation(protocol.CloseTooBig, errors.New("a message over its limit"))
		}
		if m.message, err = readPayload(m.r, m.message, int(h.Length)); err != nil {
			return nil, &ending{err: fmt.Errorf("read: %w", err)}
		}
		if !h.Fin {
			state = state.Set(ws.StateFragmented)
			continue
		}
		if m.conn.encoding == JSON && !utf8.Valid(m.message) {
			return nil, m.violation(protocol.CloseInvalidUTF8, errors.New("text that is not UTF-8"))
		}
		return m.message, nil
	}
}

func (m *messageReader) violation(code protocol.CloseCode, err error) *ending {
	end := m.conn.violation(code, err)
	return &end
}

// readPayload appends n bytes; the caller has checked n against the limit.
func readPayload(r io.Reader, dst []byte, n int) ([]byte, error) {
	at := len(dst)
	dst = append(dst, make([]byte, n)...)
	_, err := io.ReadFull(r, dst[at:])
	return dst, err
}

func (m *messageReader) control(h ws.Header) *ending {
	payload, err := readPayload(m.r, nil, int(h.Length))
	if err != nil {
		return &ending{err: fmt.Errorf("read: %w", err)}
	}
	switch h.OpCode {
	case ws.OpPing:
		m.conn.mu.Lock()
		m.conn.frame(ws.OpPong, payload)
		m.conn.mu.Unlock()
	case ws.OpClose:
		return m.closed(payload)
	}
	return nil
}

// closed answers a close frame and says why the server sent it.
func (m *messageReader) closed(payload []byte) *ending {
	code, text := ws.ParseCloseFrameData(payload) // 1005 when there is none
	m.conn.closeWith(protocol.CloseNormal)
	m.conn.flush()
	closeCode := protocol.CloseCode(code)
	return &ending{err: &CloseError{Code: closeCode, Text: text}, closeCode: closeCode}
}

// parse reads the protocol frames of one message. Frames of kinds this version does not know are skipped.
func (c *conn) parse(payload []byte, f *protocol.Frame) ([]serverFrame, error) {
	var frames []serverFrame
	for {
		rest, err := c.encoding.parse(payload, f)
		switch {
		case err != nil && err.Code == protocol.CodeUnknownAction && err.Close == 0:
		case err != nil:
			return frames, err
		case f.Kind == 0:
			return frames, nil
		case f.Kind.FromServer():
			frames = append(frames, own(f))
		}
		if payload = rest; len(payload) == 0 {
			return frames, nil
		}
	}
}

// own copies what a Frame only borrows.
func own(f *protocol.Frame) serverFrame {
	s := serverFrame{
		Kind: f.Kind, User: string(f.User), Device: string(f.Device), Epoch: f.Epoch,
		Sender: string(f.Sender), Receiver: string(f.Receiver), Content: string(f.Content), Text: string(f.Text),
		Seq: f.Seq, ID: f.ID, Position: f.Position, Timestamp: f.Timestamp, HeartbeatSeconds: f.HeartbeatSeconds,
		Code: f.Code, ResendFrom: f.ResendFrom, RetryAfterMs: f.RetryAfterMs,
	}
	for i := range f.Receipts {
		r := &f.Receipts[i]
		s.Receipts = append(s.Receipts, receipt{r.ID, r.Position, r.Seq, r.Timestamp, string(r.Receiver)})
	}
	return s
}
