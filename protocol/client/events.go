package client

import (
	"slices"
	"sync"
	"time"

	"millrace/protocol"
)

// MaxEvents is how many events may wait for Options.OnEvent. Beyond, the oldest leaves; a receipt that left is
// asked for again on the next connection.
const MaxEvents = 1024

// Event is what happens besides messages: Connected, Disconnected, GoingAway, Delivered or Answered.
type Event interface{ event() }

// Connected says that a connection stands.
type Connected struct {
	User   string // as the token names it
	Device string
}

// Disconnected says that a connection ended or an attempt failed.
type Disconnected struct {
	Err error // why
	// RetryIn is when the next attempt begins. It means nothing when Final.
	RetryIn time.Duration
	// Final says that the client does not come back by itself; Err is what Client.Err returns from now on, errors.Is(Err,
	// ErrReplaced) for a login of the same device elsewhere.
	Final bool
}

// GoingAway says that the server is about to close the connection and when to come back, which the client does.
type GoingAway struct {
	RetryIn time.Duration
}

// Delivered is a receipt: the named message and every earlier one from this user to Receiver have reached a
// device of Receiver. Receipts may repeat.
type Delivered struct {
	ID       protocol.MessageID
	Position uint64
	Number   uint64 // of the send, if this client sent it; else 0
	Receiver string
	At       time.Time
}

// Answered says how a send ended, also one that an earlier process left in the state file.
type Answered struct {
	Sent Sent
	Text string // what was sent
	Err  error  // nil: durable at the server. Else a *RefusedError, or ErrUnanswered
}

func (Connected) event()    {}
func (Disconnected) event() {}
func (GoingAway) event()    {}
func (Delivered) event()    {}
func (Answered) event()     {}

// eventQueue carries events to the application's callback, in order, on a goroutine of its own, so that a slow
// callback does not hold up the connection.
type eventQueue struct {
	callback func(Event)
	notify   chan struct{} // capacity 1
	stopped  chan struct{}

	mu      sync.Mutex
	list    []Event
	closed  bool  // nothing is added any more
	current int64 // date of the receipt that the callback has, ms since 1970; 0: it has something else
	lost    bool  // a receipt was dropped: applied stays where it is
	applied int64 // see settled
}

func newEventQueue(callback func(Event)) *eventQueue {
	q := &eventQueue{callback: callback, notify: make(chan struct{}, 1), stopped: make(chan struct{})}
	if callback == nil {
		close(q.stopped)
		return q
	}
	go q.run()
	return q
}

// add queues an event; it never blocks.
func (q *eventQueue) add(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	d, receipt := e.(Delivered)
	switch {
	case q.closed:
		return
	case q.callback == nil: // nobody wants receipts: they count as applied
		if receipt {
			q.applied = max(q.applied, d.At.UnixMilli())
		}
		return
	case receipt:
		q.supersede(d)
	}
	if len(q.list) >= MaxEvents {
		if _, receipt := q.list[0].(Delivered); receipt {
			q.lost = true
		}
		q.list = slices.Delete(q.list, 0, 1)
	}
	q.list = append(q.list, e)
	q.signal()
}

func (q *eventQueue) signal() {
	select {
	case q.notify <- struct{}{}:
	default:
	}
}

// supersede removes the receipts that d covers. d itself goes to the end, behind the Answered of the send that it names.
func (q *eventQueue) supersede(d Delivered) {
	q.list = slices.DeleteFunc(q.list, func(e Event) bool {
		old, ok := e.(Delivered)
		return ok && old.Receiver == d.Receiver && old.Position <= d.Position
	})
}

// connecting begins a connection, on which the server sends again what was lost; what waits from before may be
// newer than that.
func (q *eventQueue) connecting() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.lost = q.lost && (len(q.list) > 0 || q.current != 0)
}

// settled is up to when the application has all receipts, ms since 1970: the newest from which the callback has returned. They
// come in the order in which they changed, see protocol/doc.go §11.
func (q *eventQueue) settled() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.applied
}

func (q *eventQueue) run() {
	defer close(q.stopped)
	for range q.notify {
		for {
			e, closed := q.take()
			if closed {
				return
			}
			if e == nil {
				break
			}
			q.callback(e)
		}
	}
}

// take notes that the callback has returned and removes the next event. What was queued before close is still handed out.
func (q *eventQueue) take() (e Event, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.lost {
		q.applied = max(q.applied, q.current)
	}
	q.current = 0
	if len(q.list) == 0 {
		return nil, q.closed
	}
	e = q.list[0]
	q.list = slices.Delete(q.list, 0, 1)
	if d, ok := e.(Delivered); ok {
		q.current = d.At.UnixMilli()
	}
	return e, false
}

// close lets what is queued be handed out and waits for the callback to return.
func (q *eventQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.signal()
	q.mu.Unlock()
	<-q.stopped
}
