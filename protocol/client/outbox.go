package client

import (
	"time"

	"millrace/protocol"
)

// Limits of an Outbox.
const (
	// AnswerTimeout is how long a written send may stay unanswered on a living connection. Every write is answered,
	// so a longer silence means that the connection is not what it seems, and a new one is asked for.
	AnswerTimeout = 60 * time.Second
	// UnansweredAfter is the age at which a send is handed back to the application. A server forgets a
	// duplicate window a year after its last use; a send that old could be shown twice.
	UnansweredAfter = 30 * 24 * time.Hour

	// minRetryAfter keeps a server that says "in 1 ms" for ever from making a busy loop of both sides.
	minRetryAfter = 50 * time.Millisecond
	// windowRetryAfter is when a number that got window_exceeded is written again. A client that keeps the span never gets it.
	windowRetryAfter = 250 * time.Millisecond
)

// An Item is one send from the moment the application gave it until it is answered.
type Item struct {
	Local    uint64 // the client's own name for it, ascending in the order of sending
	Seq      uint64 // its number; 0 until just before it is first written
	Receiver string
	Text     string
	QueuedMs int64 // when the application gave it, ms since 1970; its timestamp on the wire, so a resend has the same bytes

	earlier  bool // numbered on an earlier connection
	inFlight bool // written on this connection and not answered since
	written  time.Time
}

// Outbox decides what a client writes and when, and keeps the rules that make a resend safe:
//
//   - a send gets its number on a connection, just before it is first written there;
//   - on a new connection everything open is written first, ascending, under its old number, and must end before
//     the first new number is given;
//   - the open numbers lie within protocol.MaxOpenSpan;
//   - a refusal that carries a delay leaves its number open and stops everything from that number on; after the
//     delay all of it is written again, ascending;
//   - a number ends with an answer or a final refusal, once;
//   - after mailbox_full the next new number is protocol.MaxOpenSpan above all given before: that tells the server that the
//     refusal was read.
//
// It is a pure state machine: no clock, socket, disk or goroutine. Events are method calls that carry the time; what
// is to be done comes from Next. It is exported so that a simulation can drive the very code that
// clients run; an application needs only Client. An Outbox is not safe for concurrent use.
type Outbox struct {
	limit   int     // of open and queued together
	open    []*Item // numbered, ascending
	queued  []*Item // not numbered, in the order of Add
	highest uint64  // highest number ever given under this epoch
	oldest  int64   // no item was given before, ms since 1970; 0: none is known

	// Of the connection; meaningless without one.
	connected bool
	paused    bool // the server is going away: no new numbers
	stale     bool // the server counts from below highest: it was restored from a backup
	lost      string
	next      uint64 // the next new number
	last      uint64 // the last of the connection's block
	hold      hold

	step Step // reused by Next
}

// A hold is a retryable refusal being waited out.
type hold struct {
	active bool
	from   uint64 // numbers from here on wait
	until  time.Time
}

// A Step is what Next wants done, in this order. The slices are valid until the following Next.
type Step struct {
	// Number holds items that have just got their Seq. It must be on stable storage before anything is written.
	Number []*Item
	// Write holds the items to be written now, ascending.
	Write []*Item
	// Reconnect, if not empty, says why this connection must be left for a new one.
	Reconnect string
	// NewEpoch says that the server counts from below numbers that were given before, so that a new number could mean a second
	// message. Nothing is open: make a new epoch, call ResetEpoch, and connect again.
	NewEpoch bool
	// Wake is when to call Next again if nothing happens; zero for never.
	Wake time.Time
}

// NewOutbox returns an empty Outbox that holds at most limit sends.
func NewOutbox(limit int) *Outbox { return &Outbox{limit: limit} }

// Restore fills a new Outbox from a state: items in the order in which they were given, numbered ones with their
// Seq, and the highest number ever given under the current epoch.
func (o *Outbox) Restore(items []Item, highest uint64) {
	o.highest = highest
	for i := range items {
		it := items[i]
		o.noteAge(&it)
		if it.Seq == 0 {
			o.queued = append(o.queued, &it)
			continue
		}
		it.earlier = true
		at := len(o.open)
		for at > 0 && o.open[at-1].Seq > it.Seq {
			at--
		}
		o.open = append(o.open, nil)
		copy(o.open[at+1:], o.open[at:])
		o.open[at] = &it
		o.highest = max(o.highest, it.Seq)
	}
}

// Len is how many sends have not ended.
func (o *Outbox) Len() int { return len(o.open) + len(o.queued) }

// Items calls yield for every send that has not ended, in the order in which they were given.
func (o *Outbox) Items(yield func(*Item) bool) {
	for _, list := range [][]*Item{o.open, o.queued} {
		for _, it := range list {
			if !yield(it) {
				return
			}
		}
	}
}

// Highest is the highest number ever given under the current epoch.
func (o *Outbox) Highest() uint64 { return o.highest }

// Add takes a send without a number. It reports false when the Outbox is full.
func (o *Outbox) Add(it Item) bool {
	if o.Len() >= o.limit {
		return false
	}
	it.Seq, it.earlier, it.inFlight = 0, false, false
	o.noteAge(&it)
	o.queued = append(o.queued, &it)
	return true
}

func (o *Outbox) noteAge(it *Item) {
	if o.oldest == 0 || it.QueuedMs < o.oldest {
		o.oldest = it.QueuedMs
	}
}

// Withdraw takes a send back if it has no number yet.
func (o *Outbox) Withdraw(local uint64) bool {
	for i, it := range o.queued {
		if it.Local == local {
			o.queued = remove(o.queued, i)
			return true
		}
	}
	return false
}

// Connected says that a connection stands and that its first number is first (protocol.ValidSeq).
func (o *Outbox) Connected(first uint64) {
	o.connected, o.paused, o.lost, o.hold = true, false, "", hold{}
	o.next, o.last = first, first|protocol.MaxSend
	o.stale = first <= o.highest
	for _, it := range o.open {
		it.earlier, it.inFlight = true, false
	}
}

// GoingAway says that the server is about to close: no new number is given on this connection.
func (o *Outbox) GoingAway() { o.paused = true }

// Disconnected says that the connection is gone.
func (o *Outbox) Disconnected() { o.connected = false }

// ResetEpoch says that the epoch is a new one, under which no number was ever given. Nothing may be open.
func (o *Outbox) ResetEpoch() {
	if len(o.open) > 0 {
		panic("client: a new epoch while numbers are open")
	}
	o.highest = 0
}

// Received ends the send that the server has made durable. It is nil when the number is not open: the answer to a resend that
// was answered already.
func (o *Outbox) Received(seq uint64) *Item { return o.end(seq) }

// Refused takes a refusal of a number. A final one ends the send and returns it; any other returns nil.
func (o *Outbox) Refused(seq uint64, code protocol.Code, retryAfterMs uint32, resendFrom uint64, now time.Time) *Item {
	if retryAfterMs == 0 && code != protocol.CodeWindowExceeded {
		if code == protocol.CodeMailboxFull {
			o.next = max(o.next, o.highest+protocol.MaxOpenSpan)
		}
		return o.end(seq)
	}
	at := o.find(seq)
	if at < 0 {
		return nil
	}
	o.open[at].inFlight = false
	delay := max(time.Duration(retryAfterMs)*time.Millisecond, minRetryAfter)
	from := seq
	if code == protocol.CodeWindowExceeded {
		delay = windowRetryAfter
	} else if resendFrom != 0 && resendFrom < seq {
		from = resendFrom
	}
	if o.find(from) < 0 {
		// The server waits for a number that has ended here: it would refuse everything for ever. A new
		// connection holds nothing back.
		o.lost = "the server waits for a send that has ended"
		return nil
	}
	until := now.Add(delay)
	if !o.hold.active {
		o.hold = hold{true, from, until}
		return nil
	}
	o.hold.from = min(o.hold.from, from)
	if until.After(o.hold.until) {
		o.hold.until = until
	}
	return nil
}

// Expire removes and returns the sends that were given UnansweredAfter ago or earlier.
func (o *Outbox) Expire(now time.Time) []*Item {
	cutoff := now.Add(-UnansweredAfter).UnixMilli()
	if o.oldest == 0 || o.oldest > cutoff {
		return nil
	}
	o.oldest = 0
	var expired []*Item
	for _, list := range []*[]*Item{&o.open, &o.queued} {
		kept := (*list)[:0]
		for _, it := range *list {
			if it.QueuedMs > cutoff {
				o.noteAge(it)
				kept = append(kept, it)
				continue
			}
			expired = append(expired, it)
			if o.connected && it.Seq != 0 {
				// The server may hold the stream back until this number comes again, which it never will.
				o.lost = "a send was given up"
			}
		}
		clear((*list)[len(kept):])
		*list = kept
	}
	return expired
}

// NextExpiry is when to call Expire: not after the oldest send is due, perhaps before. It is zero when there is none.
func (o *Outbox) NextExpiry() time.Time {
	if o.Len() == 0 {
		o.oldest = 0
	}
	if o.oldest == 0 {
		return time.Time{}
	}
	return time.UnixMilli(o.oldest).Add(UnansweredAfter)
}

// Next says what to do now. Items in Step.Write count as written.
func (o *Outbox) Next(now time.Time) Step {
	o.step.Number, o.step.Write = o.step.Number[:0], o.step.Write[:0]
	o.step.Reconnect, o.step.NewEpoch, o.step.Wake = "", false, time.Time{}
	if !o.connected {
		return o.step
	}
	if o.lost != "" {
		o.step.Reconnect = o.lost
		return o.step
	}
	o.releaseHold(now)
	o.resend(now)
	o.number(now)
	o.deadlines(now)
	return o.step
}

// releaseHold lets the stream go on when the delay is over and every number that the refusal stopped has been answered. Without
// the second condition a refusal still on its way would be taken for an answer to the resend.
func (o *Outbox) releaseHold(now time.Time) {
	if !o.hold.active {
		return
	}
	if now.Before(o.hold.until) {
		o.step.Wake = o.hold.until
		return
	}
	for _, it := range o.open {
		if it.inFlight && it.Seq >= o.hold.from {
			return
		}
	}
	o.hold = hold{}
}

// resend writes what is open and not in flight: after connecting, and after a hold.
func (o *Outbox) resend(now time.Time) {
	for _, it := range o.open {
		if it.inFlight || o.hold.active && it.Seq >= o.hold.from {
			continue
		}
		o.write(it, now)
	}
}

// number gives new numbers, as long as nothing of an earlier connection is open and the span allows it.
func (o *Outbox) number(now time.Time) {
	// Numbers are given only when nothing earlier is open, so an earlier one is always the lowest.
	if o.hold.active || o.paused || len(o.open) > 0 && o.open[0].earlier {
		return
	}
	if o.stale {
		o.step.NewEpoch = len(o.open) == 0
		return
	}
	taken := 0
	for ; taken < len(o.queued) && o.next <= o.last; taken++ {
		if len(o.open) > 0 && o.next-o.open[0].Seq >= protocol.MaxOpenSpan {
			break
		}
		it := o.queued[taken]
		it.Seq = o.next
		o.highest = o.next
		o.next++
		o.open = append(o.open, it)
		o.step.Number = append(o.step.Number, it)
		o.write(it, now)
	}
	clear(o.queued[:taken])
	o.queued = o.queued[taken:]
	if o.next > o.last && len(o.queued) > 0 && len(o.open) == 0 {
		o.step.Reconnect = "the connection has used up its numbers"
	}
}

func (o *Outbox) write(it *Item, now time.Time) {
	it.inFlight, it.written = true, now
	o.step.Write = append(o.step.Write, it)
}

// deadlines asks for a new connection when a write was not answered in time.
func (o *Outbox) deadlines(now time.Time) {
	for _, it := range o.open {
		if !it.inFlight {
			continue
		}
		due := it.written.Add(AnswerTimeout)
		if !now.Before(due) {
			o.step.Reconnect = "a send was not answered in time"
			return
		}
		if o.step.Wake.IsZero() || due.Before(o.step.Wake) {
			o.step.Wake = due
		}
	}
}

func (o *Outbox) end(seq uint64) *Item {
	at := o.find(seq)
	if at < 0 {
		return nil
	}
	it := o.open[at]
	o.open = remove(o.open, at)
	if o.hold.active && o.hold.from == seq {
		o.holdLower(seq)
	}
	return it
}

// holdLower moves a hold whose first number has ended to the next open one; the hold ends when none is left.
func (o *Outbox) holdLower(seq uint64) {
	for _, it := range o.open {
		if it.Seq > seq {
			o.hold.from = it.Seq
			return
		}
	}
	o.hold = hold{}
}

// find is the place of an open number, −1 when it is not open. At most MaxOpenSpan are.
func (o *Outbox) find(seq uint64) int {
	for i, it := range o.open {
		if it.Seq == seq {
			return i
		}
	}
	return -1
}

func remove(list []*Item, i int) []*Item {
	copy(list[i:], list[i+1:])
	list[len(list)-1] = nil
	return list[:len(list)-1]
}
