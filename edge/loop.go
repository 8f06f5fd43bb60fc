package edge

import (
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// A tick is the resolution of a connection's times: 100 ms, counted from the start of the server.
const (
	tickMillis     = 100
	ticksPerSecond = 1000 / tickMillis
	lingerTicks    = 2 * ticksPerSecond // for the peer to close, after a close frame
	leaveTicks     = 8 * ticksPerSecond // for answers to come, after go_away
	drainSlice     = 2048               // connections told to go away in one turn
	keepScratch    = 64 << 10           // bytes
	keepOutcomes   = 4 * settleBatch
)

// driver is what moves a loop: gnet, or a test.
type driver interface {
	// wake makes drainInbox be called on the loop, soon. From any goroutine.
	wake()
	// closeSocket closes a connection's socket and calls loop.closed before it returns. On the loop only.
	closeSocket(s socket)
	// closeWrite tells the peer that nothing more will be sent. On the loop only.
	closeWrite(s socket)
}

// loop is one event loop and all its connections. Everything in it but the inbox is touched by that loop alone.
//
// A turn is one call of traffic, drainInbox, sweep or closed. What is to be sent is gathered during the turn and
// written at its end, with one write per connection; outcomes are settled at its end, too. A write can fail, and then the
// connection is closed inside the call: so connections are freed at any time, but slots are taken only in open, which
// is never called within a turn. Whoever holds a *conn across a write looks at its state again.
type loop struct {
	server *Server
	driver driver
	index  uint8

	slots     slab
	names     nameArena
	sessions  int // open ones
	strangers strangers
	tls       *tlsTurn // nil: sockets are plain

	// This turn.
	turning bool
	now     time.Time
	nowMs   int64 // since the start of the server; never goes back
	tick    uint32
	current *conn // whose bytes are read; closed by the caller of traffic
	hangUp  bool  // current is to be closed
	serving uint64
	pushed  bool // a message was queued
	dirty   []output
	doomed  []*conn

	outcomes     []protocol.Outcome
	outcomeNames []byte
	unfenced     bool   // something was acknowledged since the last fence was asked for
	fence        uint64 // the number of the next fence
	fenced       uint64 // the last that was answered

	receiptsDue []dueReceipts
	draining    bool
	drainAt     uint32
	sweepStep   uint32

	// Scratch, valid within one function.
	reader     wsReader // of a connection with nothing incomplete
	frame      protocol.Frame
	reply      protocol.Frame
	submission protocol.Submission
	scratch    []byte
	badFrames  int
	cursor     inboxCursor
	encoded    [2]encodedMessage // binary, JSON

	lastPanicLog time.Time
	m            counters

	inbox inbox
	beat  heartbeat
}

// encodedMessage is the message encoded last in this turn.
type encodedMessage struct {
	of    *protocol.Message
	bytes []byte
}

func newLoop(s *Server, index int) *loop {
	l := &loop{server: s, index: uint8(index), fence: 1}
	if s.tls != nil {
		l.tls = newTLSTurn()
	}
	return l
}

func (l *loop) begin() {
	l.turning = true
	l.now = l.server.cfg.now()
	l.nowMs = max(l.nowMs, l.now.Sub(l.server.started).Milliseconds())
	l.tick = uint32(l.nowMs / tickMillis)
}

// end does what the turn has gathered: write, then settle, then close.
func (l *loop) end() {
	l.flush()
	if l.pushed {
		l.pushed = false
		l.server.crash("after_push")
	}
	l.trySettle()
	for i := 0; i < len(l.doomed); i++ {
		c := l.doomed[i]
		l.doomed[i] = nil
		switch {
		case !c.has(flagDoomed): // closed in between
		case c == l.current:
			l.hangUp = true
		default:
			l.driver.closeSocket(c.sock)
		}
	}
	l.doomed = l.doomed[:0]
	l.trySettle()
	l.encoded[0].of, l.encoded[1].of = nil, nil
	if cap(l.scratch) > keepScratch {
		l.scratch = nil
	}
	if cap(l.outcomes) > keepOutcomes {
		l.outcomes, l.outcomeNames = nil, nil
	}
	l.turning = false
}

func (l *loop) trySettle() {
	defer l.recoverFrom(0)
	l.settle()
}

// recoverFrom is deferred around everything that handles what a peer sent. A bug costs the connection that met it, not the
// process with a million others.
func (l *loop) recoverFrom(conn uint64) {
	if p := recover(); p != nil {
		l.panicked(p, conn)
	}
}

// recoverServing is recoverFrom for whoever is served when the panic comes.
func (l *loop) recoverServing() {
	if p := recover(); p != nil {
		l.panicked(p, l.serving)
	}
}

func (l *loop) panicked(p any, conn uint64) {
	l.m.panics++
	if now := time.Now(); now.Sub(l.lastPanicLog) >= time.Second {
		l.lastPanicLog = now
		l.server.cfg.Logger.Error("panic on an event loop; its connection is closed",
			slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
	}
	if c := l.slots.find(conn); c != nil && c.state != stateGone {
		if c.reason == 0 {
			c.reason = closePanic
		}
		l.doom(c)
	}
}

// open takes in an accepted connection. nil means that it must be closed.
func (l *loop) open(s socket) *conn {
	c := l.slots.take()
	if c == nil {
		return nil
	}
	l.begin()
	c.sock, c.loop, c.state = s, l.index, stateUpgrade
	c.epoch = l.server.accepted.Add(1) // until it is registered; see register
	c.heard = l.tick
	c.deadline = l.tick + l.server.authenticateTicks
	l.strangers.add(&l.slots, c)
	if l.server.draining.Load() {
		c.flags |= flagLate
		l.server.late.Add(1)
	}
	if l.tls != nil {
		l.startTLS(c)
	}
	l.turning = false
	return c
}

// traffic takes what a connection received; data is the loop's own until it returns and may be changed. hangUp asks
// the caller to close the socket.
func (l *loop) traffic(c *conn, data []byte) (hangUp bool) {
	l.begin()
	l.current, l.hangUp = c, false
	if c.has(flagProxy) {
		data = l.tryReadProxy(c, data)
	}
	if len(data) > 0 {
		l.receive(c, data)
	}
	l.end()
	if !l.hangUp && c.state != stateFree && c.state != stateGone {
		l.relax(c)
	}
	l.current = nil
	return l.hangUp
}

func (l *loop) tryRead(c *conn, data []byte) {
	defer l.recoverFrom(l.session(c).Conn)
	c.heard = l.tick
	c.flags &^= flagPinged
	l.m.bytesIn += uint64(len(data))
	if c.state == stateUpgrade {
		data = l.readUpgrade(c, data)
	}
	switch {
	case c.has(flagDeaf) || c.state == stateUpgrade:
	case c.state == stateUpgradeToken:
		l.keepEarly(c, data)
	default:
		l.readFrames(c, data)
	}
}

// readUpgrade reads the HTTP request and returns what follows it.
func (l *loop) readUpgrade(c *conn, data []byte) (rest []byte) {
	if c.work == nil {
		var scan headScan
		end, status := scan.scan(data)
		if end > 0 || status != 0 {
			l.upgrade(c, data[:end], status)
			return data[end:]
		}
		w := l.borrow(c)
		w.scan = scan
		w.reader.partial = inputs.Get()
		w.reader.partial.B = append(w.reader.partial.B, data...)
		return nil
	}
	w := c.work
	kept := len(w.reader.partial.B)
	// One byte more than a head can have is enough to refuse it.
	w.reader.partial.B = append(w.reader.partial.B, data[:min(len(data), maxHeadBytes+1-kept)]...)
	end, status := w.scan.scan(w.reader.partial.B)
	if end == 0 && status == 0 {
		return nil
	}
	l.upgrade(c, w.reader.partial.B[:end], status)
	w.reader.releasePartial()
	return data[max(0, end-kept):]
}

var goingAway = httpError{503, "the server is going away; try again"}

// upgrade answers a complete request, or one that cannot become one.
func (l *loop) upgrade(c *conn, head []byte, status int) {
	var r upgradeRequest
	e := httpError{status, "malformed or oversized HTTP request"}
	if status == 0 {
		r, e = parseUpgrade(head, l.server.origins)
	}
	if e.status == 0 && l.server.draining.Load() {
		e = goingAway
	}
	if e.status != 0 {
		l.refuseUpgrade(c, e)
		return
	}
	if r.token == nil {
		l.upgraded(c, &r)
		return
	}
	l.authenticateUpgrade(c, &r)
}

func (l *loop) upgraded(c *conn, r *upgradeRequest) {
	l.m.handshakes[handshakeOK]++
	if r.json {
		c.flags |= flagJSON
	}
	o := l.output(c)
	o.buf.B = appendUpgraded(o.buf.B, r)
	c.state = stateConnect
	if r.echo {
		l.openEcho(c)
	}
}

func (l *loop) refuseUpgrade(c *conn, e httpError) {
	l.m.handshakes[handshakeResult(e.status)]++
	o := l.output(c)
	o.buf.B = appendRefused(o.buf.B, e, int(l.goAwayMs()/1000)+1)
	c.reason = closeHandshake
	c.state = stateClosing
	c.flags |= flagDeaf
	c.deadline = l.tick + lingerTicks
}

// readFrames reads WebSocket frames.
func (l *loop) readFrames(c *conn, data []byte) {
	r := &l.reader
	if c.work != nil {
		r = &c.work.reader
	}
	for !c.has(flagDeaf) {
		if c.echoes() {
			l.beginEcho(c, r, data)
		}
		ev, rest := r.next(data, c.text(), c.limit(), l.tick)
		if ev.kind == wsMore {
			break
		}
		l.event(c, &ev)
		data = rest
		if c.active() && l.queued(c) > answerBytes {
			l.fail(c, protocol.CodeFlooding, protocol.CloseFlooding, closeFlooding)
			c.flags |= flagDeaf
		}
	}
	if r != &l.reader {
		return
	}
	if r.pending() && !c.has(flagDeaf) {
		l.borrow(c).reader = *r
		*r = wsReader{}
		return
	}
	r.release()
}

func (l *loop) event(c *conn, ev *wsEvent) {
	if !c.active() { // our close frame is sent: only the peer's is of interest
		if ev.kind == wsClose || ev.kind == wsViolation {
			l.doom(c)
		}
		return
	}
	switch ev.kind {
	case wsMessage:
		if c.echoes() {
			l.echo(c, ev.payload)
			return
		}
		l.message(c, ev.payload)
	case wsPing:
		l.m.pings++
		l.emitControl(c, ws.OpPong, ev.payload)
	case wsClose:
		// RFC 6455 §5.5.1: the code is sent back, and the server closes the connection.
		l.finish(c, ev.code, "", closeByClient)
		l.doom(c)
	case wsViolation:
		if ev.code == protocol.CloseTooBig && c.state == stateOpen {
			l.refuse(c, 0, protocol.Refusal{Code: protocol.CodeFrameTooLarge}, 0)
		}
		l.finish(c, ev.code, ev.text, violationReason(ev.code))
		c.flags |= flagDeaf
	}
}

// message takes a WebSocket message apart into frames.
func (l *loop) message(c *conn, payload []byte) {
	l.badFrames = 0
	f := &l.frame
	for len(payload) > 0 && c.active() {
		var err *protocol.FrameError
		if c.text() {
			payload, err = protocol.ParseJSON(payload, false, f)
		} else {
			payload, err = protocol.ParseBinary(payload, f)
		}
		switch {
		case err != nil:
			l.badFrame(c, f.Seq, err.Code, err.Text)
		case f.Kind != 0:
			l.m.framesIn++
			l.handleFrame(c, f)
		}
	}
}

// closed says that the socket of c is closed, by whomever. It may be called within a turn.
func (l *loop) closed(c *conn) {
	top := !l.turning
	if top {
		l.begin()
	}
	if t, ok := c.sock.(*tlsSocket); ok {
		t.end()
	}
	l.tryEndSession(c)
	l.forget(c)
	if top {
		l.end()
	}
}

func (l *loop) tryEndSession(c *conn) {
	defer l.recoverFrom(0)
	l.endSession(c, closeDisconnected)
}

// forget frees what a closed connection holds here.
func (l *loop) forget(c *conn) {
	l.m.closes[c.reason]++
	if c.out != 0 {
		l.dirty[c.out-1].conn = nil
		c.out = 0
	}
	c.flags &^= flagDoomed | flagBacklog
	l.release(c)
	c.sock = nil
	if c.has(flagAsked) {
		c.state = stateGone
		return
	}
	l.free(c)
}

// free gives slot and names back. Outcomes point into the names. Only then is there room for another connection: clients
// that come and go while registrations wait for the disk do not make more of them than there may be connections.
func (l *loop) free(c *conn) {
	l.server.connections.Add(-1)
	if c.has(flagLate) {
		l.server.late.Add(-1)
	}
	l.leaveLimits(c)
	l.trySettle()
	l.names.remove(c.names)
	l.slots.put(c)
}

// drainInbox handles what came from other goroutines.
func (l *loop) drainInbox() {
	l.begin()
	b := l.inbox.take()
	l.m.turns++
	l.cursor = inboxCursor{}
	for !l.tryItems(b) {
	}
	l.inbox.done()
	if l.server.draining.Load() {
		l.tryGoAway()
	}
	l.end()
}

// inboxCursor is how far a batch was handled.
type inboxCursor struct {
	run, n                                                                                                  int
	answers, pushes, refused, notices, receipts, pages, receiptsPages, missed, registered, replaced, fences int
	verified, revoked, handshaken                                                                           int
}

// following is the item at a place, which moves on before the item is handled.
func following[T any](list []T, at *int) *T {
	*at++
	return &list[*at-1]
}

// tryItems handles the rest of a batch. It is false when an item panicked: the ones behind it are still to be handled.
func (l *loop) tryItems(b *inboxBatch) (done bool) {
	defer l.recoverServing()
	k := &l.cursor
	for ; k.run < len(b.runs); k.run, k.n = k.run+1, 0 {
		for r := b.runs[k.run]; k.n < int(r.n); {
			k.n++ // before the item: it is not tried twice
			l.m.items++
			switch r.kind {
			case inboxAnswer:
				a := following(b.answers, &k.answers)
				l.serving = a.To.Conn
				l.answer(a)
			case inboxPush:
				p := following(b.pushes, &k.pushes)
				l.serving = p.To.Conn
				l.push(p)
			case inboxRefused:
				s := following(b.refused, &k.refused)
				l.serving = s.Conn
				l.overflow(s)
			case inboxNotice:
				s := following(b.notices, &k.notices)
				l.serving = s.Conn
				l.notify(s)
			case inboxReceipt:
				rc := following(b.receipts, &k.receipts)
				l.serving = rc.To.Conn
				l.receipt(rc)
			case inboxPage:
				p := following(b.pages, &k.pages)
				l.serving = p.To.Conn
				l.page(p)
			case inboxReceiptsPage:
				p := following(b.receiptsPages, &k.receiptsPages)
				l.serving = p.To.Conn
				l.receiptsPage(p)
			case inboxMissed:
				m := following(b.missed, &k.missed)
				l.serving = m.to.Conn
				l.missedReceipts(m)
			case inboxRegistered:
				rg := following(b.registered, &k.registered)
				l.serving = rg.To.Conn
				l.registered(rg)
			case inboxReplaced:
				s := following(b.replaced, &k.replaced)
				l.serving = s.Conn
				l.replaced(s)
			case inboxVerified:
				q := *following(b.verified, &k.verified)
				l.serving = q.conn
				l.verified(q)
			case inboxRevoked:
				s := following(b.revoked, &k.revoked)
				l.serving = s.Conn
				l.revoked(s)
			case inboxHandshaken:
				id := *following(b.handshaken, &k.handshaken)
				l.serving = id
				l.handshaken(id)
			case inboxFence:
				l.fenced = max(l.fenced, following(b.fences, &k.fences).Number)
			}
		}
	}
	return true
}

// replaced says that the device of s connected again, and that the newer session wins.
func (l *loop) replaced(s *protocol.Session) {
	if c := l.slots.find(s.Conn); c != nil && c.active() {
		l.fail(c, protocol.CodeSessionReplaced, protocol.CloseSessionReplaced, closeReplaced)
	}
}

// tryGoAway tells the next drainSlice slots to go away.
func (l *loop) tryGoAway() {
	defer l.recoverServing()
	l.draining = true
	for n := 0; n < drainSlice && l.drainAt < l.slots.size; n++ {
		c := l.slots.at(l.drainAt)
		l.drainAt++
		l.serving = handle(l.index, c.slot, c.serial)
		switch {
		case c.active():
			l.leave(c, protocol.CloseRestart, l.goAwayMs())
		case c.state == stateUpgrade && c.work == nil && (l.tls == nil || !c.has(flagLate)):
			// It has not sent a byte of its request; one that has gets 503. So does one of TLS that came late: a handshake is no silence.
			c.reason = closeGoingAway
			l.doom(c)
		}
	}
	if l.drainAt < l.slots.size {
		l.driver.wake()
	}
}

// goAwayMs is when a client may come back: spread out, so that a million do not come at once.
func (l *loop) goAwayMs() uint32 {
	spread := l.server.spreadMs.Load()
	return uint32(1 + rand.Int64N(max(1, spread)))
}
