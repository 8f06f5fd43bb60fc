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
	busy    bool // the callback runs, with current
	current Event
	closed  bool  // nothing is added any more
	applied int64 // the newest receipt that the callback has returned from, ms since 1970
	lost    bool  // a receipt was dropped since the connection began
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
	switch {
	case q.closed:
		return
	case q.callback == nil:
		q.apply(e) // nobody wants receipts: they count as applied
		return
	}
	if d, ok := e.(Delivered); ok {
		q.supersede(d)
	}
	if len(q.list) >= MaxEvents {
		_, receipt := q.list[0].(Delivered)
		q.lost = q.lost || receipt
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

// apply notes that the application has an event; mu is held.
func (q *eventQueue) apply(e Event) {
	if d, ok := e.(Delivered); ok {
		q.applied = max(q.applied, d.At.UnixMilli())
	}
}

// connecting begins a connection that asks for the receipts after a time.
func (q *eventQueue) connecting(receiptsAfter int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.applied, q.lost = receiptsAfter, false
}

// settled is the newest receipt applied, when none waits and none was lost. The server sends the receipts of a connect
// in no order, so the caller asks only when none has come for a while.
func (q *eventQueue) settled() (receiptsAfter int64, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.applied, len(q.list) == 0 && !q.busy && !q.lost
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

// take notes that the last event was applied and removes the next. What was queued before close is still handed out.
func (q *eventQueue) take() (e Event, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.busy {
		q.apply(q.current)
	}
	q.busy, q.current = len(q.list) > 0, nil
	if !q.busy {
		return nil, q.closed
	}
	q.current = q.list[0]
	q.list = slices.Delete(q.list, 0, 1)
	return q.current, false
}

// close lets what is queued be handed out and waits for the callback to return.
func (q *eventQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.signal()
	q.mu.Unlock()
	<-q.stopped
}
