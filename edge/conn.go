package edge

import (
	"crypto/rand"
	"encoding/binary"
	"sync"

	"github.com/valyala/bytebufferpool"

	"millrace/protocol"
	"millrace/protocol/token"
)

// socket is what a loop needs of a connection's transport. Only the loop calls it.
type socket interface {
	// Write takes all of b or fails; what the kernel does not take at once is buffered without limit. A failed Write
	// closes the connection inside the call, see loop.closed.
	Write(b []byte) (int, error)
	// OutboundBuffered is how many bytes are buffered in this process.
	OutboundBuffered() int
	// Fd is the file descriptor.
	Fd() int
}

// connState is how far a connection has come.
type connState uint8

const (
	stateFree         connState = iota // the slot is not used
	stateUpgrade                       // waits for the HTTP request
	stateUpgradeToken                  // the token of the request is being verified
	stateConnect                       // waits for connect
	stateConnectToken                  // the token of connect is being verified
	stateRegistering                   // authenticated; the Registrar is asked
	stateOpen                          // connected was sent
	stateClosing                       // a close frame or an HTTP response was sent; waits for the peer to close
	stateGone                          // the socket is closed; the Registrar's answer is still to come
)

type connFlags uint16

const (
	flagJSON       connFlags = 1 << iota // the subprotocol
	flagRegistered                       // the route is bound
	flagAsked                            // the Registrar was asked and has not answered
	flagPinged                           // and nothing was heard since
	flagRenewAsked                       // the client was told to renew its token
	flagBacklog                          // the socket buffers bytes in this process
	flagLeaving                          // go_away was sent; closes when what was handed over is answered
	flagDeaf                             // nothing more is read: what follows cannot be understood, or need not be
	flagReceipts                         // receipts wait, see loop.receiptsDue
	flagDoomed                           // will be closed when the turn ends
	flagLate                             // accepted after Drain had begun
	flagRenewing                         // the token of a renew is being verified
	flagEcho                             // of a test build, see echo.go
	flagProxy                            // from a proxy, whose header is still to come
)

// conn is one connection, in a slab of its loop and touched by nothing but that loop. An idle connection owns
// no heap object: what only an active one needs is in work.
type conn struct {
	sock  socket
	work  *work // nil while idle
	down  Downlink
	epoch uint64
	names nameRef

	slot     uint32
	serial   uint32
	nextFree uint32 // of the slab, while free; of strangers, until authenticated
	account  uint32 // of the user in limits.users, 0: none; of strangers, until authenticated
	address  uint32 // of the client in limits.addresses, 0: not limited
	block    uint32 // of numbers, drawn at registration
	top      uint32 // Uplink.Top, while there is no Uplink
	heard    uint32 // the tick of the last byte
	deadline uint32 // a tick; what happens then depends on state
	expires  uint32 // of the token, seconds since 1970
	renewAt  uint32 // a tick, before which no renew is looked at; 0: there was none
	out      uint32 // 1 + its place in loop.dirty; 0: nothing was queued this turn

	closeCode protocol.CloseCode // with flagLeaving
	flags     connFlags
	state     connState
	reason    closeReason // why it ended
	loop      uint8
}

func (c *conn) has(f connFlags) bool { return c.flags&f != 0 }

// active reports whether frames still mean something.
func (c *conn) active() bool {
	return c.state == stateConnect || c.state == stateConnectToken || c.state == stateRegistering || c.state == stateOpen
}

func (c *conn) text() bool { return c.has(flagJSON) }

// limit is the length of a WebSocket message from this client.
func (c *conn) limit() int {
	if c.echoes() {
		return maxEchoBytes
	}
	if c.text() {
		return protocol.MaxJSONFrameBytes
	}
	return protocol.MaxBinaryFrameBytes
}

// work is what a connection needs only while something is under way; pooled.
type work struct {
	reader   wsReader
	scan     headScan
	early    *bytebufferpool.ByteBuffer // what came behind the upgrade request, in stateUpgradeToken
	up       Uplink
	upActive bool     // up was started
	account  *account // of the user, with up
	full     FullReceivers

	receipts []protocol.ReceiptPush
	replay   ReceiptReplay
	reading  bool // a page of receipts was asked for and has not come

	buffered int // in the socket, at the last sweep
	written  int // to the socket, since then
}

// keepReceipts is the capacity, in entries, that a work in the pool keeps.
const keepReceipts = protocol.MaxReceiptsPerFrame

var works = sync.Pool{New: func() any { return new(work) }}

func (l *loop) borrow(c *conn) *work {
	if c.work == nil {
		c.work = works.Get().(*work)
	}
	return c.work
}

func (l *loop) uplink(c *conn) *Uplink {
	w := l.borrow(c)
	if !w.upActive {
		w.up.Resume(c.block, c.top)
		w.account = l.account(c)
		w.upActive = true
	}
	return &w.up
}

// relax gives the work back when nothing in it is needed.
func (l *loop) relax(c *conn) {
	w := c.work
	if w == nil || c.state != stateConnect && c.state != stateOpen || w.reader.pending() || len(w.receipts) > 0 || w.replay.Active() || c.has(flagBacklog) ||
		w.written > 0 || w.upActive && !w.up.Idle(l.nowMs) || !w.full.Empty() {
		return
	}
	l.release(c)
}

func (l *loop) release(c *conn) {
	w := c.work
	if w == nil {
		return
	}
	c.work = nil
	if w.upActive {
		c.top = w.up.Top()
	}
	w.reader.release()
	if w.early != nil {
		putBuffer(&inputs, w.early)
	}
	clear(w.receipts)
	receipts := w.receipts[:0]
	if cap(receipts) > keepReceipts {
		receipts = nil
	}
	*w = work{receipts: receipts}
	works.Put(w)
}

func (l *loop) session(c *conn) protocol.Session {
	return protocol.Session{
		Edge:       l.server.cfg.EdgeID,
		Generation: c.down.Generation(),
		Conn:       handle(l.index, c.slot, c.serial),
	}
}

// handleFrame is what a connection may do: the one place that says which frame is allowed when.
func (l *loop) handleFrame(c *conn, f *protocol.Frame) {
	switch {
	case f.Kind.FromServer():
		l.badFrame(c, 0, protocol.CodeUnknownAction, "only a server sends this")
	case c.state == stateOpen && f.Kind == protocol.KindSend:
		l.send(c, f)
	case c.state == stateOpen && f.Kind == protocol.KindAcknowledge:
		l.acknowledge(c, f)
	case c.state == stateOpen && f.Kind == protocol.KindRenewToken:
		l.renew(c, f)
	case f.Kind == protocol.KindConnect && c.state == stateConnect:
		l.connect(c, f)
	case f.Kind == protocol.KindConnect:
		l.refuse(c, 0, protocol.Refusal{Code: protocol.CodeAlreadyConnected}, 0)
	default:
		l.fail(c, protocol.CodeNotConnected, protocol.CloseNotConnected, closeNotConnected)
	}
}

// badFrame answers a frame that says nothing. Before connected it ends the connection.
func (l *loop) badFrame(c *conn, seq uint64, code protocol.Code, text string) {
	if c.state != stateOpen {
		l.failText(c, code, text, protocol.CloseNotConnected, closeNotConnected)
		return
	}
	// A message of 16 KiB can hold thousands of malformed objects: what they are told is bounded.
	if seq != 0 && c.work != nil && c.work.upActive {
		c.work.up.Ended(seq)
	}
	if l.badFrames++; l.badFrames > maxBadFrames && seq == 0 {
		l.m.drops[dropBadFrame]++
		return
	}
	l.error(c, seq, protocol.Refusal{Code: code}, 0, text)
}

// maxBadFrames is how many malformed frames of one WebSocket message are answered.
const maxBadFrames = 16

// register asks for the device's row, a block of numbers, and the route. An empty device is the default one.
func (l *loop) register(c *conn, claims token.Claims, device []byte, epoch uint64, receiptsAfter int64) {
	if len(device) == 0 {
		device = append(l.scratch[:0], protocol.DefaultDevice...)
	}
	if !l.enterUser(c, claims.User) {
		return
	}
	c.names = l.names.add(claims.User, device)
	c.expires = l.expiry(claims)
	for epoch == 0 {
		var b [8]byte
		rand.Read(b[:]) // does not fail, crypto/rand
		epoch = binary.BigEndian.Uint64(b[:])
	}
	login := c.epoch
	c.epoch = epoch
	c.state = stateRegistering
	c.flags |= flagAsked
	l.borrow(c).replay.Start(max(0, receiptsAfter-protocol.ReceiptsSlackMillis)) // read once the session is open
	l.server.cfg.Registrar.Register(protocol.Registration{
		Session: l.session(c),
		User:    claims.User,
		Device:  string(device),
		Epoch:   epoch,
		Login:   login,
	})
}

// expiry is when the session of a token ends, in seconds since 1970. A token that is past its exp and was accepted
// because clocks differ lasts for as long as clocks may differ.
func (l *loop) expiry(claims token.Claims) uint32 {
	at := claims.ExpiresAt
	if !at.After(l.now) {
		at = at.Add(token.Skew)
	}
	return uint32(min(max(at.Unix(), 1), 1<<32-1))
}

// registered goes on where register stopped.
func (l *loop) registered(r *protocol.Registered) {
	c := l.slots.find(r.To.Conn)
	if c == nil || !c.has(flagAsked) {
		return
	}
	c.flags &^= flagAsked
	if r.Code == protocol.OK {
		c.flags |= flagRegistered
	}
	switch {
	case c.state == stateGone:
		l.unregister(c)
		l.free(c)
	case c.state != stateRegistering:
		l.unregister(c)
	case r.Code == protocol.CodeTooManyDevices:
		l.fail(c, r.Code, protocol.CloseTooManyDevices, closeTooManyDevices)
	case r.Code == protocol.CodeSessionReplaced: // a login that came later was registered first
		l.fail(c, r.Code, protocol.CloseSessionReplaced, closeReplaced)
	case r.Code != protocol.OK:
		l.refuse(c, 0, r.Refusal, 0)
		l.finish(c, protocol.CloseTryAgain, r.Code.String(), closeRegistration)
	default:
		l.connected(c, r)
	}
}

func (l *loop) connected(c *conn, r *protocol.Registered) {
	c.state = stateOpen
	c.block = r.Block
	l.sessions++
	l.m.connects++
	user, device := l.names.get(c.names)
	f := &l.reply
	f.Reset()
	f.Kind = protocol.KindConnected
	f.User, f.Device, f.Epoch = user, device, c.epoch
	f.Seq = protocol.FirstSeq(r.Block)
	f.HeartbeatSeconds = uint32(l.server.cfg.HeartbeatSeconds)
	f.Timestamp = l.now.UnixMilli()
	l.emit(c, f)
	if l.draining {
		l.leave(c, protocol.CloseRestart, l.goAwayMs())
		return
	}
	l.act(c, c.down.Start(r.Heir))
	l.readReceipts(c)
}

// refuse sends an error frame. seq is the number it is about, or 0.
func (l *loop) refuse(c *conn, seq uint64, r protocol.Refusal, resendFrom uint64) {
	l.error(c, seq, r, resendFrom, errorText(r.Code))
}

func (l *loop) error(c *conn, seq uint64, r protocol.Refusal, resendFrom uint64, text string) {
	l.m.refusals[refusalIndex(r.Code)]++
	if seq != 0 && (r.Code >= protocol.CodeRateLimited) != (r.RetryAfterMs != 0) {
		l.m.unsound++ // a refusal can be retried exactly when it says when
	}
	f := &l.reply
	f.Reset()
	f.Kind = protocol.KindError
	f.Code, f.Seq, f.ResendFrom, f.RetryAfterMs = r.Code, seq, resendFrom, r.RetryAfterMs
	l.scratch = append(l.scratch[:0], text...)
	f.Text = l.scratch
	l.emit(c, f)
}

// fail sends an error frame and closes.
func (l *loop) fail(c *conn, code protocol.Code, closeCode protocol.CloseCode, reason closeReason) {
	l.failText(c, code, errorText(code), closeCode, reason)
}

func (l *loop) failText(c *conn, code protocol.Code, text string, closeCode protocol.CloseCode, reason closeReason) {
	l.error(c, 0, protocol.Refusal{Code: code}, 0, text)
	l.finish(c, closeCode, code.String(), reason)
}

// leave tells a client to come back later, and closes when the sends it has handed over are answered.
func (l *loop) leave(c *conn, closeCode protocol.CloseCode, retryAfterMs uint32) {
	if c.has(flagLeaving) {
		return
	}
	f := &l.reply
	f.Reset()
	f.Kind = protocol.KindGoAway
	f.RetryAfterMs = retryAfterMs
	l.emit(c, f)
	c.flags |= flagLeaving
	c.closeCode = closeCode
	c.deadline = l.tick + leaveTicks
	l.leaveIfAnswered(c)
}

func (l *loop) leaveIfAnswered(c *conn) {
	if c.has(flagLeaving) && (c.work == nil || c.work.up.Open() == 0) {
		l.finish(c, c.closeCode, "going away", closeGoingAway)
	}
}

// finish ends the session and sends a close frame. The peer has lingerTicks to close its side, so that
// what was sent reaches it: closing with unread input would make the kernel throw it away.
func (l *loop) finish(c *conn, code protocol.CloseCode, text string, reason closeReason) {
	if !c.active() {
		return
	}
	o := l.output(c)
	o.seal(c.text())
	o.buf.B = appendClose(o.buf.B, code, text)
	l.endSession(c, reason)
	c.state = stateClosing
	c.deadline = l.tick + lingerTicks
}

// endSession gives back what the session holds elsewhere. The socket may still be open.
func (l *loop) endSession(c *conn, reason closeReason) {
	if c.reason == 0 {
		c.reason = reason
	}
	l.unregister(c)
	if c.state != stateOpen {
		return
	}
	l.sessions--
	c.down.End(func(p Pending) { l.outcome(c, protocol.Lost, &p) })
}

func (l *loop) unregister(c *conn) {
	if !c.has(flagRegistered) {
		return
	}
	c.flags &^= flagRegistered
	user, device := l.names.get(c.names)
	l.server.cfg.Registrar.Unregister(user, device, l.session(c))
}

// doom closes the socket when the turn ends, after what was queued is written.
func (l *loop) doom(c *conn) {
	if !c.has(flagDoomed) {
		c.flags |= flagDoomed | flagDeaf
		l.doomed = append(l.doomed, c)
	}
}

// errorTexts says for a developer what the codes mean. A client goes by the code.
var errorTexts = [refusalCodes]string{
	protocol.CodeBadRequest:       "malformed frame or field",
	protocol.CodeUnknownAction:    "this server does not know the action",
	protocol.CodeNotConnected:     "connect first",
	protocol.CodeAlreadyConnected: "this connection is connected",
	protocol.CodeUnauthorized:     "the token is not accepted",
	protocol.CodeTokenExpired:     "the token has expired: get a new one",
	protocol.CodeBadReceiver:      "receiver_id is not a user id",
	protocol.CodeEmptyContent:     "content is empty",
	protocol.CodeContentTooLong:   "content is over 1000 characters or 4000 bytes",
	protocol.CodeWindowExceeded:   "64 or more away from a number that is still open: wait for its answer",
	protocol.CodeMailboxFull:      "the receiver's mailbox is full",
	protocol.CodeTooManyDevices:   "this user has 8 devices",
	protocol.CodeSessionReplaced:  "the same device connected elsewhere",
	protocol.CodeSlow:             "nothing was read or acknowledged for 60 s",
	protocol.CodeTimeout:          "authentication, a frame or a heartbeat took too long",
	protocol.CodeFlooding:         "went on sending against rate_limited, or against the rules",
	protocol.CodeFrameTooLarge:    "frame is over its size limit",
	protocol.CodeRateLimited:      "over the message rate",
	protocol.CodeOverloaded:       "the server is behind",
	protocol.CodeStoreFull:        "the server's disk is nearly full",
	protocol.CodeShuttingDown:     "the server is going away",
	protocol.CodeOutcomeUnknown:   "it is not known whether the message is stored: send it again",
	protocol.CodeInternal:         "the server failed: connect again",
}

func errorText(code protocol.Code) string { return errorTexts[refusalIndex(code)] }
