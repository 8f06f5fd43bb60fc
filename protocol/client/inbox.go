package client

import (
	"time"

	"millrace/protocol"
)

// Limits of the receiving side.
const (
	// MaxPending is how many messages may wait between the server's push and the application's Acknowledge. A
	// server has at most protocol.MaxUnacknowledged of them in flight on one connection; the rest is room
	// for what earlier connections left here.
	MaxPending = 4 * protocol.MaxUnacknowledged
	// AcknowledgeDelay is how long an acknowledgement waits for company or for another frame to travel with.
	AcknowledgeDelay = 100 * time.Millisecond
	// MaxAcknowledgements is how many travel in one frame; as many waiting leave at once.
	MaxAcknowledgements = 64
)

// inbox decides which pushed messages reach the application and which acknowledgements go back. Like Outbox it is
// a pure state machine.
type inbox struct {
	shown   *shownSet
	pending map[protocol.MessageID]struct{} // pushed and not acknowledged by the application
	queue   []Message                       // of these, not yet taken by Receive
	// dropped says that a push was not taken for want of room. The server counts it as in flight on this
	// connection, so only a new connection brings it again.
	dropped bool

	acks  []protocol.MessageID // for this connection, oldest first
	since time.Time            // when the oldest of them was added
}

func newInbox(shown *shownSet) *inbox {
	return &inbox{shown: shown, pending: make(map[protocol.MessageID]struct{})}
}

// pushed takes a message from the server. A known one is acknowledged again and not shown; one that the application
// has not acknowledged yet will be.
func (b *inbox) pushed(m Message, now time.Time) {
	if b.shown.has(m.ID) {
		b.addAck(m.ID, now)
		return
	}
	if _, waiting := b.pending[m.ID]; waiting {
		return
	}
	if len(b.pending) >= MaxPending {
		b.dropped = true
		return
	}
	b.pending[m.ID] = struct{}{}
	b.queue = append(b.queue, m)
}

// taken removes the head of the queue, which Receive has returned.
func (b *inbox) taken() {
	b.queue[0] = Message{}
	if b.queue = b.queue[1:]; len(b.queue) == 0 {
		b.queue = nil // let the array go
	}
}

// acknowledged notes that the application has stored or shown a message, and reports whether that is new.
func (b *inbox) acknowledged(e shownID, now time.Time) bool {
	delete(b.pending, e.id)
	fresh := b.shown.add(e)
	b.addAck(e.id, now)
	return fresh
}

func (b *inbox) addAck(id protocol.MessageID, now time.Time) {
	if len(b.acks) == 0 {
		b.since = now
	}
	b.acks = append(b.acks, id)
}

// due reports whether acknowledgements must leave now; company says that another frame leaves anyway.
func (b *inbox) due(now time.Time, company bool) bool {
	return len(b.acks) > 0 && (company || len(b.acks) >= MaxAcknowledgements || !now.Before(b.since.Add(AcknowledgeDelay)))
}

// disconnected forgets the acknowledgements that did not leave: the server takes them only on the connection
// that pushed, and pushes again.
func (b *inbox) disconnected() {
	b.acks = b.acks[:0]
	b.dropped = false
}

// wantsReconnect says that a dropped push can be asked for again.
func (b *inbox) wantsReconnect() bool { return b.dropped && len(b.pending) <= MaxPending/2 }
