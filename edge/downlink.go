package edge

import (
	"github.com/gobwas/ws"
	"github.com/valyala/bytebufferpool"

	"millrace/protocol"
)

// This file brings messages out to connections and acknowledgements back. downlink_state.go decides.

const (
	outSoftBytes = 64 << 10  // outbound of a connection: beyond it messages wait in the mailbox
	outHardBytes = 256 << 10 // beyond it the connection is closed
	// answerBytes is what a client is answered in one turn. Frames that keep the rules ask for a small part of it. One that breaks them can
	// ask for ten times its own length, and with the longest message on top of this the answers still fit outHardBytes: so a client
	// that reads is told, and not cut off for a buffer that it had no time to empty.
	answerBytes = 128 << 10
	// messageBytes is at most what a message takes on the wire besides its content: two user ids, an id, and names of fields.
	messageBytes = 2*protocol.MaxUserBytes + 192
	// sealBytes ends a binary WebSocket message that holds many frames. With the largest frame behind it, it is under 64 KiB.
	sealBytes = 32 << 10
	// settleBatch is how many outcomes are settled at once at most.
	settleBatch = 1024
)

var outputs bytebufferpool.Pool

// output is what is queued for one connection within a turn.
type output struct {
	conn *conn // nil: it is gone
	buf  *bytebufferpool.ByteBuffer
	open int // where the header of an unfinished data message is, or -1
}

// output returns what is queued for c; the pointer is valid until the next call.
func (l *loop) output(c *conn) *output {
	if c.out == 0 {
		l.dirty = append(l.dirty, output{conn: c, buf: outputs.Get(), open: -1})
		c.out = uint32(len(l.dirty))
	}
	return &l.dirty[c.out-1]
}

// begin makes room for the header of a data message unless one is open.
func (o *output) begin() {
	if o.open < 0 {
		o.open = len(o.buf.B)
		o.buf.B = append(o.buf.B, make([]byte, dataHeaderBytes)...)
	}
}

// end closes a JSON message, which holds one object, and a long binary one.
func (o *output) end(text bool) {
	if text || len(o.buf.B)-o.open >= sealBytes {
		o.seal(text)
	}
}

func (o *output) seal(text bool) {
	if o.open >= 0 {
		o.buf.B = sealData(o.buf.B, o.open, text)
		o.open = -1
	}
}

// emit queues a frame for a client.
func (l *loop) emit(c *conn, f *protocol.Frame) {
	l.m.framesOut++
	o := l.output(c)
	o.begin()
	if c.text() {
		o.buf.B = protocol.AppendJSON(o.buf.B, f)
	} else {
		o.buf.B = protocol.AppendBinary(o.buf.B, f)
	}
	o.end(c.text())
}

// emitMessage queues a message. Devices of one user get it in one turn, one after the other: it is encoded once for them.
func (l *loop) emitMessage(c *conn, m *protocol.Message) {
	e := &l.encoded[0]
	if c.text() {
		e = &l.encoded[1]
	}
	if e.of != m {
		e.of = m
		if c.text() {
			e.bytes = protocol.AppendJSONMessage(e.bytes[:0], m)
		} else {
			e.bytes = protocol.AppendBinaryMessage(e.bytes[:0], m)
		}
	}
	l.m.framesOut++
	o := l.output(c)
	o.begin()
	o.buf.B = append(o.buf.B, e.bytes...)
	o.end(c.text())
}

func (l *loop) emitControl(c *conn, op ws.OpCode, payload []byte) {
	o := l.output(c)
	o.seal(c.text())
	o.buf.B = appendControl(o.buf.B, op, payload)
}

// buffered is how many bytes wait for c in this process.
func (l *loop) buffered(c *conn) int {
	n := 0
	if c.has(flagBacklog) {
		n = c.sock.OutboundBuffered()
	}
	return n + l.queued(c)
}

// queued is how many of these bytes are from this turn.
func (l *loop) queued(c *conn) int {
	if c.out == 0 {
		return 0
	}
	return len(l.dirty[c.out-1].buf.B)
}

// room reports whether the outbound budget takes n more bytes.
func (l *loop) room(c *conn, n int) bool { return l.buffered(c)+n <= outSoftBytes }

// push handles one live message.
func (l *loop) push(p *protocol.Push) {
	m := p.Message
	c := l.slots.find(p.To.Conn)
	if c == nil || c.state != stateOpen || c.has(flagLeaving) {
		l.m.drops[dropPushGone]++
		l.refusedPush(p)
		return
	}
	if !l.isFor(c, m) {
		l.refusedPush(p)
		return
	}
	pending := pendingOf(m)
	verdict, effects := c.down.Push(p.To.Generation, pending, l.room(c, messageBytes+len(m.Content)))
	switch verdict {
	case Write:
		l.m.pushes++
		l.written(c, m)
	case Skip:
		l.m.drops[dropPushTwice]++
	default:
		l.m.drops[dropPushRefused]++
		l.outcome(c, protocol.Refused, &pending)
	}
	l.act(c, effects)
}

func (l *loop) written(c *conn, m *protocol.Message) {
	l.pushed = true
	l.emitMessage(c, m)
	if c.down.InFlight() > protocol.MaxUnacknowledged {
		l.m.overfull++
	}
}

// overflow says that a push to a session was refused before it came here.
func (l *loop) overflow(s *protocol.Session) {
	if c := l.slots.find(s.Conn); c != nil && c.state == stateOpen && !c.has(flagLeaving) {
		l.act(c, c.down.Overflow(s.Generation))
	}
}

// isFor checks promise P5 once more where it matters: no byte of a message reaches a connection that is not its addressee's.
func (l *loop) isFor(c *conn, m *protocol.Message) bool {
	if user, _ := l.names.get(c.names); string(user) == m.Receiver {
		return true
	}
	l.m.misaddressed++
	return false
}

func pendingOf(m *protocol.Message) Pending {
	return Pending{ID: m.ID, Conversation: m.Conversation, Position: m.Position}
}

// refusedPush tells the owner of a push for which there is no connection.
func (l *loop) refusedPush(p *protocol.Push) {
	l.outcomes = append(l.outcomes, protocol.Outcome{
		Kind:         protocol.Refused,
		Conversation: p.Message.Conversation,
		Position:     p.Message.Position,
		ID:           p.Message.ID,
		User:         l.copyName(p.Message.Receiver),
		Device:       l.copyName(p.Device),
	})
}

// copyName gives a string as bytes that are valid until the outcomes are settled.
func (l *loop) copyName(s string) []byte {
	at := len(l.outcomeNames)
	l.outcomeNames = append(l.outcomeNames, s...)
	return l.outcomeNames[at:len(l.outcomeNames):len(l.outcomeNames)]
}

// notify says that the mailbox of a session was written to.
func (l *loop) notify(s *protocol.Session) {
	if c := l.slots.find(s.Conn); c != nil && c.state == stateOpen && !c.has(flagLeaving) {
		l.m.notices++
		l.act(c, c.down.Notify())
	}
}

// page pushes the rows of a mailbox page.
func (l *loop) page(p *protocol.Page) {
	c := l.slots.find(p.To.Conn)
	if c == nil || c.state != stateOpen || c.has(flagLeaving) {
		return
	}
	if p.Code != protocol.OK {
		l.m.drops[dropPageFailed]++
		c.down.PageFailed()
		return
	}
	ok, effects := c.down.BeginPage(p.After)
	if !ok {
		l.act(c, effects)
		return
	}
	l.m.pages++
	content := 0
	for i := range p.Rows {
		content += len(p.Rows[i].Message.Content)
	}
	c.down.Measured(len(p.Rows), content)
rows:
	for i := range p.Rows {
		m := p.Rows[i].Message
		if !l.isFor(c, m) {
			continue
		}
		pending := pendingOf(m)
		pending.UserMailbox = p.Rows[i].UserMailbox
		switch c.down.Row(pending, l.room(c, messageBytes+len(m.Content))) {
		case Write:
			l.m.drained++
			l.written(c, m)
		case StopPage:
			break rows
		}
	}
	l.act(c, c.down.EndPage(p.Next, p.End))
}

// act does what a step of the downlink asks for.
func (l *loop) act(c *conn, e Effects) {
	if e == 0 || c.state != stateOpen {
		return
	}
	if e&StateChanged != 0 {
		user, device := l.names.get(c.names)
		l.server.cfg.Registrar.SetState(user, device, l.session(c), c.down.Live())
	}
	if e&ReadPage != 0 && !c.has(flagLeaving) {
		user, device := l.names.get(c.names)
		after, limit := c.down.Request(l.fenced)
		l.server.cfg.Mailbox.ReadPage(protocol.PageRequest{
			Session: l.session(c),
			User:    string(user),
			Device:  string(device),
			Heir:    c.down.Heir(),
			After:   after,
			Limit:   min(limit, c.down.Fits(outSoftBytes-l.buffered(c), messageBytes)),
		})
	}
	if e&CloseSlow != 0 {
		l.fail(c, protocol.CodeSlow, protocol.CloseSlow, closeSlow)
	}
}

// acknowledge takes messages out of flight and tells their owners.
func (l *loop) acknowledge(c *conn, f *protocol.Frame) {
	for _, id := range f.IDs {
		// A page is read when half of the budget is free: not for every message that leaves.
		p, ok, effects := c.down.Acknowledge(id, l.room(c, outSoftBytes/2), l.fence, l.fenced)
		if !ok {
			l.m.ignoredAcks++
			continue
		}
		l.m.acks++
		l.unfenced = true
		l.outcome(c, protocol.Acknowledged, &p)
		l.act(c, effects)
	}
}

// outcome notes what became of a push; it is settled when the turn ends.
func (l *loop) outcome(c *conn, kind protocol.OutcomeKind, p *Pending) {
	user, device := l.names.get(c.names)
	l.outcomes = append(l.outcomes, protocol.Outcome{
		Kind:         kind,
		UserMailbox:  p.UserMailbox,
		Conversation: p.Conversation,
		Position:     p.Position,
		ID:           p.ID,
		User:         user,
		Device:       device,
	})
	if len(l.outcomes) >= settleBatch {
		l.settle()
	}
}

func (l *loop) settle() {
	if len(l.outcomes) > 0 {
		l.server.cfg.Acknowledger.Settle(l.outcomes)
		clear(l.outcomes)
		l.outcomes = l.outcomes[:0]
		l.outcomeNames = l.outcomeNames[:0]
	}
}

// requestFence asks when what was settled is durable, one fence at a time. It follows end, which settles.
func (l *loop) requestFence() {
	if l.unfenced && l.fenced+1 == l.fence {
		l.unfenced = false
		l.fence++
		l.server.cfg.Acknowledger.Fence(protocol.Fence{Edge: l.server.cfg.EdgeID, Loop: l.index, Number: l.fence - 1})
	}
}

// flush writes what was queued in this turn: one write per connection.
func (l *loop) flush() {
	for i := 0; i < len(l.dirty); i++ {
		l.flushOne(&l.dirty[i])
	}
	clear(l.dirty)
	l.dirty = l.dirty[:0]
}

func (l *loop) flushOne(o *output) {
	c := o.conn
	if c != nil {
		defer l.recoverFrom(l.session(c).Conn)
		defer l.endOutput(o)
		l.emitReceipts(c)
		o.seal(c.text())
		l.endOutput(o)
		l.write(c, o.buf.B)
	}
	putBuffer(&outputs, o.buf)
}

// endOutput parts a connection from what was queued for it, before the write, and after a panic too.
func (l *loop) endOutput(o *output) {
	if o.conn != nil {
		o.conn.out = 0
		o.conn = nil
	}
}

// write hands bytes to the socket. Afterwards the connection may be gone.
func (l *loop) write(c *conn, b []byte) {
	if len(b) == 0 {
		return
	}
	if l.buffered(c)+len(b) > outHardBytes {
		l.m.drops[dropOutput]++
		l.endSession(c, closeSlow)
		c.state = stateClosing
		l.doom(c)
		return
	}
	l.m.bytesOut += uint64(len(b))
	l.m.writes++
	serial := c.serial
	if _, err := c.sock.Write(b); err != nil || c.serial != serial || c.state == stateFree || c.state == stateGone {
		return // closed was called inside Write
	}
	backlog := c.sock.OutboundBuffered() > 0
	if c.state == stateClosing && c.has(flagDeaf) && !backlog && !c.has(flagDoomed) {
		// The peer sees the end and closes. Until then its bytes are read and dropped: closing with unread input
		// would reset the connection, and the peer might lose what it was told.
		l.driver.closeWrite(c.sock)
	}
	if !backlog && !c.has(flagBacklog) {
		return
	}
	c.flags |= flagBacklog
	l.borrow(c).written += len(b)
}
