package backend

import (
	"cmp"
	"maps"
	"slices"

	"millrace/protocol"
)

// conversation is what the owner keeps of one conversation while it is in use, and for a while after.
type conversation struct {
	key      string
	queue    []*entry // not finished, by position
	writing  []writing
	commits  int  // commits with something of it that are not durable
	touched  bool // it has something in the commit being gathered
	behind   bool // a receipt waits for the end of the replay
	windows  []*window
	receipts []*receipt

	newer, older *conversation // neighbours in the idle list
	isIdle       bool
}

// writing is how many messages are on their way to a mailbox: deliveries in state mailbox.
type writing struct {
	mailboxName
	messages int
}

// mailboxName names a mailbox; device "" is the user's own.
type mailboxName struct{ user, device string }

// writes adds to the messages on their way to a mailbox. The list has a place for each mailbox of the two users that
// anything goes to, nine each at most.
func (c *conversation) writes(user, device string, change int) {
	name := mailboxName{user, device}
	for i := range c.writing {
		if w := &c.writing[i]; w.mailboxName == name {
			if w.messages += change; w.messages == 0 {
				c.writing = slices.Delete(c.writing, i, i+1)
			}
			return
		}
	}
	c.writing = append(c.writing, writing{name, change})
}

// writesTo reports whether a message is on its way to a mailbox that this device drains.
func (c *conversation) writesTo(user string, to *Device) bool {
	for i := range c.writing {
		if w := &c.writing[i]; w.user == user && (w.device == to.Name || w.device == "" && to.Heir) {
			return true
		}
	}
	return false
}

// conversation finds or makes the conversation; call rest when done with it.
func (o *Owner) conversation(key string) *conversation {
	conv := o.convs[key]
	if conv == nil {
		conv = &conversation{key: key}
		o.convs[key] = conv
	}
	o.idle.remove(conv)
	return conv
}

// rest puts a conversation that nothing needs any more into the idle list, from which the oldest are forgotten.
// Its rows are in the store then, and are read again when needed.
func (o *Owner) rest(conv *conversation) {
	if len(conv.queue) > 0 || conv.commits > 0 || conv.touched || conv.behind || conv.isIdle {
		return
	}
	o.idle.add(conv)
	for o.idle.size > o.cfg.MaxIdleConversations {
		oldest := o.idle.oldest
		o.idle.remove(oldest)
		delete(o.convs, oldest.key)
	}
}

// idleList is a doubly linked list of conversations in the order in which they came to rest.
type idleList struct {
	newest, oldest *conversation
	size           int
}

func (l *idleList) add(c *conversation) {
	c.isIdle, c.older, c.newer = true, l.newest, nil
	if l.newest != nil {
		l.newest.newer = c
	} else {
		l.oldest = c
	}
	l.newest = c
	l.size++
}

func (l *idleList) remove(c *conversation) {
	if !c.isIdle {
		return
	}
	if c.newer != nil {
		c.newer.older = c.older
	} else {
		l.newest = c.older
	}
	if c.older != nil {
		c.older.newer = c.newer
	} else {
		l.oldest = c.newer
	}
	c.isIdle, c.older, c.newer = false, nil, nil
	l.size--
}

// window is a duplicate window and the numbers that are in flight, seen but not finished.
type window struct {
	stream  Stream
	done    Window
	pending map[uint64]*entry // by number
	newest  uint64            // the last number that came as a new one, see Owner.entered
	dirty   bool
	commit  uint64 // the last that holds its row
}

// maxWindowsKept is how many windows of a conversation stay in memory though nothing needs them. Clients that keep no
// state make a stream for every start.
const maxWindowsKept = 16

// window finds the window of a stream, reading it when it is not here. durable is the number of the last durable commit.
func (c *conversation) window(r Reader, s Stream, durable uint64) (*window, error) {
	if w := c.loadedWindow(s); w != nil {
		return w, nil
	}
	done, err := r.Window(WindowKey{c.key, s})
	if err != nil {
		return nil, err
	}
	w := &window{stream: s, done: done}
	if len(c.windows) >= maxWindowsKept {
		c.windows = slices.DeleteFunc(c.windows, func(w *window) bool { return w.rests(durable) })
	}
	c.windows = append(c.windows, w)
	return w, nil
}

// rests reports whether the store has all that the window knows.
func (w *window) rests(durable uint64) bool {
	return len(w.pending) == 0 && !w.dirty && w.commit <= durable
}

// loadedWindow is the window of a stream if it is here, else nil.
func (c *conversation) loadedWindow(s Stream) *window {
	for _, w := range c.windows {
		if w.stream == s {
			return w
		}
	}
	return nil
}

func (w *window) inFlight(seq uint64) bool { return w.pending[seq] != nil }

func (w *window) enter(e *entry) {
	if w.pending == nil {
		w.pending = make(map[uint64]*entry)
	}
	w.pending[e.seq] = e
}

func (w *window) finish(seq uint64) {
	delete(w.pending, seq)
	w.done.Finish(seq)
	w.dirty = true
}

// maxAcksKept bounds the acknowledgements remembered beyond a hole. When it is not enough a receipt names an earlier
// message than it could, until the hole is filled.
const maxAcksKept = 64

// receipt is how far one sender's messages reached one addressee, and the holes that it must not pass: messages
// that no device of the addressee has acknowledged.
type receipt struct {
	row    ReceiptRow
	loaded bool
	dirty  bool
	hole   uint64 // the first outstanding position once loaded, 0: none
	acks   []Mark // acknowledged, beyond row.Delivered, ascending

	// What commits that are not durable do to the outstanding rows; the store may show it or not.
	left    []overlay         // written, ascending
	settled map[uint64]uint64 // deleted, position to commit; wins
}

type overlay struct {
	position uint64
	commit   uint64
}

// receipt finds the receipt of a sender's messages to an addressee; load it before use.
func (c *conversation) receipt(sender, addressee string) *receipt {
	for _, rc := range c.receipts {
		if rc.row.Sender == sender && rc.row.Addressee == addressee {
			return rc
		}
	}
	rc := &receipt{row: ReceiptRow{ReceiptKey: ReceiptKey{Sender: sender, Conversation: c.key, Addressee: addressee}}}
	c.receipts = append(c.receipts, rc)
	return rc
}

// firstUnacknowledged is the position of the first message in flight that no device acknowledged, 0: none.
func (c *conversation) firstUnacknowledged(rc *receipt) uint64 {
	for _, e := range c.queue {
		if !e.acked && e.receiver == rc.row.Addressee && e.sender() == rc.row.Sender {
			return e.position
		}
	}
	return 0
}

// expirySpan is how far, in positions, an acknowledgement lies beyond a hole that the store may have let expire.
const expirySpan = 365 * 24 * 60 * 60 * 1000 << protocol.PositionShift

// load reads the row and its first hole, once; a hole that may have expired since is looked for again.
func (rc *receipt) load(r Reader) error {
	if rc.loaded {
		if rc.hole == 0 || rc.row.Top.Position < rc.hole+expirySpan {
			return nil
		}
		hole, err := rc.nextHole(r, rc.hole)
		if err == nil {
			rc.hole = hole
		}
		return err
	}
	row, err := r.Receipt(rc.row.ReceiptKey)
	if err != nil {
		return err
	}
	// A message at or below Delivered was acknowledged, or Delivered would not have passed it. To begin behind it saves the store
	// the way over the rows that were deleted there: 6 ms for 100 000.
	hole, err := rc.nextHole(r, row.Delivered.Position+1)
	if err != nil {
		return err
	}
	row.ReceiptKey = rc.row.ReceiptKey
	rc.row, rc.hole, rc.loaded = row, hole, true
	return nil
}

// leave records that a message was finished without an acknowledgement.
func (rc *receipt) leave(position, commit uint64) {
	rc.left = append(rc.left, overlay{position, commit})
	if rc.loaded && (rc.hole == 0 || position < rc.hole) {
		rc.hole = position
	}
}

// settle records that an outstanding message was acknowledged.
func (rc *receipt) settle(r Reader, position, commit uint64) error {
	if rc.hole == position {
		hole, err := rc.nextHole(r, position+1)
		if err != nil {
			return err
		}
		rc.hole = hole
	}
	if rc.settled == nil {
		rc.settled = make(map[uint64]uint64)
	}
	rc.settled[position] = commit
	return nil
}

// nextHole is the first outstanding position ≥ from, 0: none.
func (rc *receipt) nextHole(r Reader, from uint64) (uint64, error) {
	var hole uint64
	at, _ := slices.BinarySearchFunc(rc.left, from, func(o overlay, p uint64) int { return cmp.Compare(o.position, p) })
	for ; at < len(rc.left) && hole == 0; at++ {
		if p := rc.left[at].position; !rc.isSettled(p) {
			hole = p
		}
	}
	for {
		row, ok, err := r.FirstOutstanding(rc.row.Conversation, rc.row.Addressee, from)
		switch {
		case err != nil:
			return 0, err
		case !ok || hole != 0 && row.Position >= hole:
			return hole, nil
		case !rc.isSettled(row.Position):
			return row.Position, nil
		}
		from = row.Position + 1
	}
}

// isOutstanding is asked of messages that are not in flight: what left is of those that are, until its commit is durable.
func (rc *receipt) isOutstanding(r Reader, position uint64) (bool, error) {
	if rc.isSettled(position) {
		return false, nil
	}
	row, ok, err := r.FirstOutstanding(rc.row.Conversation, rc.row.Addressee, position)
	return ok && row.Position == position, err
}

func (rc *receipt) isSettled(position uint64) bool {
	_, found := rc.settled[position]
	return found
}

// acknowledge records the first acknowledgement of a message.
func (rc *receipt) acknowledge(m Mark) {
	rc.dirty = true
	if m.Position > rc.row.Top.Position {
		rc.row.Top = m
	}
	i := len(rc.acks)
	for i > 0 && rc.acks[i-1].Position > m.Position {
		i--
	}
	rc.acks = append(rc.acks, Mark{})
	copy(rc.acks[i+1:], rc.acks[i:])
	rc.acks[i] = m
}

// advance moves Delivered up to, and never past, the first message that nobody acknowledged: an outstanding one, or
// unacknowledged in flight (0: none). It reports whether Delivered changed.
func (rc *receipt) advance(unacknowledged uint64, nowMs int64) bool {
	limit := uint64(protocol.MaxPosition) + 1
	if rc.hole != 0 {
		limit = rc.hole
	}
	if unacknowledged != 0 {
		limit = min(limit, unacknowledged)
	}
	best := rc.row.Delivered
	n := 0
	for ; n < len(rc.acks) && rc.acks[n].Position < limit; n++ {
		if rc.acks[n].Position > best.Position {
			best = rc.acks[n]
		}
	}
	if top := rc.row.Top; top.Position < limit && top.Position > best.Position {
		best = top
	}
	rc.acks = append(rc.acks[:0], rc.acks[n:]...)
	if len(rc.acks) > maxAcksKept {
		rc.acks = rc.acks[:maxAcksKept]
	}
	if best.Position == rc.row.Delivered.Position {
		return false
	}
	rc.row.Delivered = best
	rc.row.ChangedMs = max(rc.row.ChangedMs, nowMs)
	return true
}

func (rc *receipt) outstandingKey(position uint64) OutstandingKey {
	return OutstandingKey{Conversation: rc.row.Conversation, Addressee: rc.row.Addressee, Position: position}
}

// committed forgets what the commit with this number made durable: the store shows it now.
func (rc *receipt) committed(number uint64) {
	n := 0
	for n < len(rc.left) && rc.left[n].commit <= number {
		n++
	}
	rc.left = slices.Delete(rc.left, 0, n)
	maps.DeleteFunc(rc.settled, func(_, commit uint64) bool { return commit <= number })
}
