package edge

import "millrace/protocol"

// This file brings receipts out to connections. A receipt is state: the last one of a conversation says everything. What a
// connection has no room for is not kept but read again from the store, in the order in which it changed, so that whatever
// prefix the client has applied, the largest timestamp in it says what is missing.

const (
	// receiptDelayTicks is how long a receipt waits for another frame to the same connection.
	receiptDelayTicks = 2
	// maxWaitingReceipts is how many receipts wait for a slow reader; with a page, receiptsPageRows more.
	maxWaitingReceipts = 1024
	receiptsPageRows   = 256
	// receiptsResume is when the next page is asked for.
	receiptsResume = protocol.MaxReceiptsPerFrame
)

// readReceipts asks for the next page of a replay when there is room for it.
func (l *loop) readReceipts(c *conn) {
	w := c.work
	if w == nil || !w.replay.Active() || w.reading || len(w.receipts) > receiptsResume || c.state != stateOpen || c.has(flagLeaving) {
		return
	}
	w.reading = true
	user, _ := l.names.get(c.names)
	l.server.cfg.Mailbox.ReadReceipts(protocol.ReceiptsRequest{
		Session: l.session(c),
		User:    string(user),
		After:   w.replay.After(),
		Limit:   receiptsPageRows,
	})
}

// receiptsPage takes a page of a replay. One that could not be read is asked for again by the sweep.
func (l *loop) receiptsPage(p *protocol.ReceiptsPage) {
	c := l.slots.find(p.To.Conn)
	if c == nil || c.state != stateOpen || c.has(flagLeaving) || c.work == nil {
		return
	}
	c.work.reading = false
	if p.Code != protocol.OK {
		l.m.drops[dropPageFailed]++
		return
	}
	for i := range p.Receipts {
		l.queueReceipt(c, &p.Receipts[i])
	}
	c.work.replay.Page(p.Next, p.End)
	l.readReceipts(c)
}

// receipt takes a live receipt.
func (l *loop) receipt(r *protocol.ReceiptPush) {
	c := l.slots.find(r.To.Conn)
	if c == nil || c.state != stateOpen || c.has(flagLeaving) {
		return
	}
	switch w := l.borrow(c); {
	case w.replay.Active():
		w.replay.Miss(r.Millis)
	case len(w.receipts) >= maxWaitingReceipts:
		l.m.drops[dropReceipts]++
		w.replay.Miss(r.Millis)
	default:
		l.queueReceipt(c, r)
	}
}

// missedReceipts says that live receipts of a session were not taken on their way.
func (l *loop) missedReceipts(m *missedReceipts) {
	if c := l.slots.find(m.to.Conn); c != nil && c.state == stateOpen && !c.has(flagLeaving) {
		l.borrow(c).replay.Miss(m.since)
		l.readReceipts(c)
	}
}

// queueReceipt queues a receipt. It waits for company, see receiptDelayTicks.
func (l *loop) queueReceipt(c *conn, r *protocol.ReceiptPush) {
	w := l.borrow(c)
	w.receipts = append(w.receipts, *r)
	if q := &w.receipts[len(w.receipts)-1]; !l.sentBy(c, q) {
		q.Seq = 0 // another stream sent it: its number means nothing here
	}
	if len(w.receipts) == protocol.MaxReceiptsPerFrame {
		l.output(c) // a full frame has no reason to wait
	}
	l.waitReceipts(c)
}

func (l *loop) sentBy(c *conn, r *protocol.ReceiptPush) bool {
	_, device := l.names.get(c.names)
	return r.Epoch == c.epoch && string(device) == r.Device
}

// dueReceipts is a connection whose receipts were to wait until due.
type dueReceipts struct {
	conn uint64
	due  uint32
}

func (l *loop) waitReceipts(c *conn) {
	if !c.has(flagReceipts) {
		c.flags |= flagReceipts
		l.receiptsDue = append(l.receiptsDue, dueReceipts{l.session(c).Conn, l.tick + receiptDelayTicks - 1})
	}
}

// flushReceipts sends the receipts that have waited long enough. All wait equally long: the list is in the order of due.
func (l *loop) flushReceipts() {
	n := 0
	for n < len(l.receiptsDue) && l.receiptsDue[n].due <= l.tick {
		if c := l.slots.find(l.receiptsDue[n].conn); c != nil && c.state == stateOpen && c.has(flagReceipts) {
			c.flags &^= flagReceipts
			if c.work != nil && len(c.work.receipts) > 0 {
				l.output(c)
			}
		}
		n++
	}
	l.receiptsDue = append(l.receiptsDue[:0], l.receiptsDue[n:]...)
}

// emitReceipts adds the receipts that wait for c to what is sent anyway.
func (l *loop) emitReceipts(c *conn) {
	w := c.work
	if w == nil || len(w.receipts) == 0 || c.state != stateOpen {
		return
	}
	sent := 0
	for sent < len(w.receipts) {
		batch := w.receipts[sent:min(len(w.receipts), sent+l.receiptsPerFrame(c))]
		if !l.room(c, len(batch)*messageBytes) {
			break
		}
		l.emitReceiptFrame(c, batch)
		sent += len(batch)
	}
	rest := copy(w.receipts, w.receipts[sent:])
	clear(w.receipts[rest:])
	w.receipts = w.receipts[:rest]
	if rest > 0 {
		l.waitReceipts(c)
	}
	l.readReceipts(c)
}

func (l *loop) receiptsPerFrame(c *conn) int {
	if c.text() {
		return 1
	}
	return protocol.MaxReceiptsPerFrame
}

func (l *loop) emitReceiptFrame(c *conn, batch []protocol.ReceiptPush) {
	f := &l.reply
	f.Reset()
	f.Kind = protocol.KindReceipt
	// Grown first: the receipts point into scratch.
	l.scratch = append(l.scratch[:0], make([]byte, len(batch)*protocol.MaxUserBytes)...)[:0]
	for i := range batch {
		r := &batch[i]
		at := len(l.scratch)
		l.scratch = append(l.scratch, r.Receiver...)
		f.Receipts = append(f.Receipts, protocol.Receipt{
			ID: r.ID, Position: r.Position, Seq: r.Seq, Timestamp: r.Millis, Receiver: l.scratch[at:],
		})
	}
	l.m.receipts += uint64(len(batch))
	l.emit(c, f)
}
