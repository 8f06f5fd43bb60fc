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

// receiptsMark is not for the application: when its turn comes, the callback has returned from every receipt up to this
// time, ms since 1970.
type receiptsMark int64

func (receiptsMark) event() {}

func isMark(e Event) bool {
	_, ok := e.(receiptsMark)
	return ok
}

// eventQueue carries events to the application's callback, in order, on a goroutine of its own, so that a slow
// callback does not hold up the connection.
type eventQueue struct {
	callback func(Event)
	notify   chan struct{} // capacity 1
	stopped  chan struct{}

	mu      sync.Mutex
	list    []Event
	closed  bool  // nothing is added any more
	newest  int64 // receipt, ms since 1970; 0: none
	lost    bool  // a receipt of this connection was dropped
	applied int64 // the last mark that was reached
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
	if receipt {
		q.newest = max(q.newest, d.At.UnixMilli())
	}
	if q.closed || q.callback == nil {
		return
	}
	if receipt {
		q.supersede(d)
	}
	if len(q.list) >= MaxEvents {
		if _, receipt := q.list[0].(Delivered); receipt {
			q.lost = true
			q.list = slices.DeleteFunc(q.list, isMark) // it vouched for this one
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

// connecting begins a connection, on which the server sends again what was lost.
func (q *eventQueue) connecting() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.lost = false
}

// mark says that every receipt up to the newest has come. They are settled when the callback has returned from all that are
// queued now, unless one was dropped. Without a callback nobody wants them.
func (q *eventQueue) mark() {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.lost || q.closed:
	case q.callback == nil:
		q.applied = max(q.applied, q.newest)
	case !slices.ContainsFunc(q.list, isMark):
		q.list = append(q.list, receiptsMark(q.newest))
		q.signal()
	}
}

// settled is up to when the application has all receipts, ms since 1970.
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

// take removes the next event. What was queued before close is still handed out.
func (q *eventQueue) take() (e Event, closed bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.list) > 0 {
		e = q.list[0]
		q.list = slices.Delete(q.list, 0, 1)
		if mark, ok := e.(receiptsMark); ok {
			q.applied = max(q.applied, int64(mark))
			continue
		}
		return e, false
	}
	return nil, q.closed
}

// close lets what is queued be handed out and waits for the callback to return.
func (q *eventQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.signal()
	q.mu.Unlock()
	<-q.stopped
}
