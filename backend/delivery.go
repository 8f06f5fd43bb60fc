package backend

import (
	"errors"
	"fmt"
	"slices"

	"millrace/protocol"
)

// This file is the delivery core: what the one owner of a partition decides about each record. It is a
// state machine without sockets, clocks or goroutines. Functions stand in the order in which a
// message meets them: Take, Settle, Tick, Flush, Committed.
//
// The argument, in short. Each (message, device) goes from pushed to acknowledged or to the device's
// mailbox. When every device of a message is in one of the two, and so is every earlier message
// of its conversation, the message is finished by a commit that holds its mailbox rows, its receipt and its window bit. The
// log moves past what is finished, in position order. After a crash the log is replayed from the oldest
// unfinished record: what is finished is recognised by its window bit, the rest is delivered again, and the
// client's filter hides what it had.

// OwnerConfig is what an Owner needs.
type OwnerConfig struct {
	Shard   int
	Reader  Reader
	Locator Locator
	// AcknowledgeMillis is how long a push may stay unacknowledged before it goes to the mailbox. Default 10 s.
	AcknowledgeMillis int64
	// MaxInFlight is how many records are held until finished. At the limit the oldest unacknowledged go to
	// their mailboxes at once. Default 262 144 (DESIGN.md §8).
	MaxInFlight int
	// Replay says that the log may hold what an earlier owner took: until CaughtUp is called.
	Replay bool
	// MaxCommitRows is how many mailbox rows a commit gathers; then nothing more is taken, settled or given up until it is
	// given out. Default 2 048: 8 MiB of the longest texts.
	MaxCommitRows int
	// MaxIdleConversations bounds the cache of conversations with nothing in flight. Default 16 384.
	MaxIdleConversations int
}

func (c *OwnerConfig) validate() error {
	if c.Reader == nil || c.Locator == nil {
		return fmt.Errorf("delivery owner: Reader and Locator are required")
	}
	if c.AcknowledgeMillis == 0 {
		c.AcknowledgeMillis = protocol.AcknowledgeSeconds * 1000
	}
	if c.MaxInFlight == 0 {
		c.MaxInFlight = 262_144
	}
	if c.MaxCommitRows == 0 {
		c.MaxCommitRows = 2048
	}
	if c.MaxIdleConversations == 0 {
		c.MaxIdleConversations = 16_384
	}
	return nil
}

// OwnerStats counts what an owner did.
type OwnerStats struct {
	Taken        uint64 // records that were new
	Duplicates   uint64 // records whose send was finished or in flight
	Pushed       uint64
	Acknowledged uint64                 // first acknowledgements of a device
	Ignored      uint64                 // outcomes that matched nothing any more
	Mailboxed    [mailboxReasons]uint64 // by MailboxReason
	Notices      uint64
	Receipts     uint64
	Commits      uint64
	ReadErrors   uint64
	Violations   Violations
}

// MailboxReason is why a message went to a mailbox.
type MailboxReason uint8

// The reasons; String is the metric label.
const (
	MailboxNoDevice MailboxReason = iota // the receiver has never connected
	MailboxNoRoute                       // the device is not connected
	MailboxDraining                      // connected, but older messages come first
	MailboxRefused                       // the edge did not take the push
	MailboxLost                          // the connection ended
	MailboxTimeout                       // not acknowledged in time
	MailboxPressure                      // too many records in flight
	mailboxReasons
)

var mailboxReasonNames = [mailboxReasons]string{"no_device", "no_route", "draining", "refused", "lost", "timeout", "pressure"}

func (r MailboxReason) String() string { return mailboxReasonNames[r] }

// Actions are what the owner wants done, in this order: a notice goes before the pushes that came after the mailbox
// row it tells of. The slices are the owner's and valid until its next call.
type Actions struct {
	Notices  []protocol.Session
	Pushes   []protocol.Push
	Receipts []protocol.ReceiptPush
}

// Owner decides about the records of one partition. One goroutine uses it.
type Owner struct {
	cfg OwnerConfig

	order    []*entry // records in flight by position; nil: finished and committed
	base     uint64   // number of order[0], see entry.number
	flying   map[uint64]*entry
	expire   uint64 // number of the next entry whose deadline is checked
	taken    uint64 // the last position taken
	passed   bool   // duplicates were dropped since the last commit
	replay   bool   // see CaughtUp
	behind   []*conversation
	clockMs  int64 // the last receipt time given out
	convs    map[string]*conversation
	idle     idleList
	next     *Commit    // being gathered
	nextDone inCommit   // what to do when next is durable
	number   uint64     // of next: 1, 2, 3 …
	waiting  []inCommit // given out, not durable, oldest first
	actions  Actions
	routes   []protocol.Route // scratch
	stats    OwnerStats
}

// inCommit is what to do when a commit is durable.
type inCommit struct {
	convs    []*conversation // with something in it
	mailbox  []mailboxWrite
	receipts []ReceiptRow // whose Delivered changed
	finished []*entry
}

type mailboxWrite struct {
	e      *entry
	device string
}

// entry is one record in flight. Its content stays in the log.
type entry struct {
	number     uint64 // place in Owner.order: order[number − base]
	position   uint64
	id         protocol.MessageID
	seq        uint64
	conv       *conversation
	window     *window
	receiver   string
	deadlineMs int64
	deliveries []delivery
	replayed   bool // an earlier owner may have written its mailbox rows, or left it outstanding
	acked      bool // by some device
	finished   bool // in a commit that was given out or is being gathered
}

// delivery is one (message, device).
type delivery struct {
	device string // "" is the user's mailbox
	state  deliveryState
}

type deliveryState uint8

const (
	pushed    deliveryState = iota
	mailbox                 // its row is in a commit that is not durable
	mailboxed               // its row is durable, or was
	delivered               // the device acknowledged it
)

// NewOwner makes an owner that has taken nothing yet.
func NewOwner(cfg OwnerConfig) (*Owner, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Owner{
		cfg:    cfg,
		flying: make(map[uint64]*entry),
		convs:  make(map[string]*conversation),
		next:   &Commit{Shard: cfg.Shard},
		number: 1,
		replay: cfg.Replay,
	}, nil
}

// CaughtUp says that everything that was in the log when the owner began has been taken. Until then the store knows more
// than the owner: a mailbox row or a receipt may be of a message that is still to be taken.
func (o *Owner) CaughtUp() {
	if !o.replay {
		return
	}
	o.replay = false
	for _, conv := range o.behind {
		conv.behind = false
		for _, rc := range conv.receipts {
			rc.dirty = rc.dirty || rc.loaded
		}
		o.touch(conv)
	}
	o.behind = nil
}

// Room is how many more records Take should be given.
func (o *Owner) Room() int { return o.cfg.MaxInFlight - len(o.flying) }

// InFlight is how many records are not finished and committed.
func (o *Owner) InFlight() int { return len(o.flying) }

// Taken is the position of the last record taken.
func (o *Owner) Taken() uint64 { return o.taken }

// Stats is what the owner counted so far.
func (o *Owner) Stats() *OwnerStats { return &o.stats }

// Actions returns what the steps since the last call want done.
func (o *Owner) Actions() *Actions { return &o.actions }

// ClearActions forgets the actions that were done.
func (o *Owner) ClearActions() {
	o.actions.Notices = o.actions.Notices[:0]
	clear(o.actions.Pushes)
	o.actions.Pushes = o.actions.Pushes[:0]
	clear(o.actions.Receipts)
	o.actions.Receipts = o.actions.Receipts[:0]
}

// Full reports whether the commit being gathered has as many mailbox rows as it should.
func (o *Owner) Full() bool { return len(o.next.Mailbox) >= o.cfg.MaxCommitRows }

// Take takes durable records in position order. It stops at the first that it cannot decide about because a read
// failed, and when the commit being gathered is Full; n is how many were taken.
func (o *Owner) Take(nowMs int64, records []*Record) (n int, err error) {
	for _, r := range records {
		if o.Full() {
			return n, nil
		}
		if err := o.take(nowMs, r); err != nil {
			o.stats.ReadErrors++
			return n, err
		}
		n++
	}
	return n, nil
}

func (o *Owner) take(nowMs int64, r *Record) error {
	if r.Position <= o.taken {
		o.stats.Duplicates++
		o.redelivered(r)
		return nil
	}
	conv := o.conversation(ConversationKey(r.Sender, r.Receiver))
	defer o.rest(conv)
	w, err := conv.window(o.cfg.Reader, r.Stream(), o.number-1-uint64(len(o.waiting)))
	if err != nil {
		return fmt.Errorf("read duplicate window: %w", err)
	}
	if w.done.Finished(r.Seq) || w.inFlight(r.Seq) {
		o.taken, o.passed = r.Position, true
		o.stats.Duplicates++
		o.resent(w, r)
		return nil
	}
	// Read now, after the record is durable, and never from a cache: a device that registered before
	// the record was accepted is an addressee.
	devices, err := o.cfg.Reader.Devices(r.Receiver)
	if err != nil {
		return fmt.Errorf("read devices: %w", err)
	}
	o.taken = r.Position
	o.stats.Taken++
	e := o.enter(nowMs, r, conv, w)
	o.entered(w, r)
	if len(devices) == 0 {
		e.deliveries = append(e.deliveries, delivery{device: "", state: mailbox})
		o.writeMailbox(e, 0, r, MailboxNoDevice)
		return nil
	}
	o.routes = o.cfg.Locator.Locate(o.routes[:0], r.Receiver)
	for i := range devices {
		o.deliver(e, &devices[i], r)
	}
	return nil
}

func (o *Owner) enter(nowMs int64, r *Record, conv *conversation, w *window) *entry {
	e := &entry{
		number: o.base + uint64(len(o.order)), position: r.Position, id: r.ID, seq: r.Seq,
		conv: conv, window: w, receiver: r.Receiver, deadlineMs: nowMs + o.cfg.AcknowledgeMillis,
		deliveries: make([]delivery, 0, 1), replayed: o.replay,
	}
	o.order = append(o.order, e)
	o.flying[e.position] = e
	conv.queue = append(conv.queue, e)
	w.enter(e)
	return e
}

// deliver pushes to a live session, or writes to the mailbox.
func (o *Owner) deliver(e *entry, to *Device, r *Record) {
	i := len(e.deliveries)
	e.deliveries = append(e.deliveries, delivery{device: to.Name})
	reason := MailboxNoRoute
	for _, route := range o.routes {
		if route.Device != to.Name {
			continue
		}
		// An earlier message of this conversation on its way to a mailbox that the session drains goes first: the notice
		// that follows its commit reaches the session before any later push.
		if route.Live && !e.conv.writesTo(e.receiver, to) {
			o.actions.Pushes = append(o.actions.Pushes, protocol.Push{To: route.Session, Device: route.Device, Message: &r.Message})
			o.stats.Pushed++
			return
		}
		reason = MailboxDraining
		break
	}
	o.writeMailbox(e, i, r, reason)
}

// writeMailbox puts a row of delivery i into the next commit. r may be nil: the row is then copied from the log.
func (o *Owner) writeMailbox(e *entry, i int, r *Record, reason MailboxReason) {
	d := &e.deliveries[i]
	d.state = mailbox
	e.conv.writes(e.receiver, d.device, 1)
	o.touch(e.conv)
	o.next.Mailbox = append(o.next.Mailbox, MailboxPut{User: e.receiver, Device: d.device, Record: r, Position: e.position})
	o.next.Urgent = true
	o.nextDone.mailbox = append(o.nextDone.mailbox, mailboxWrite{e, d.device})
	o.stats.Mailboxed[reason]++
}

// errNotTaken: the outcome is of a message that was drained and that the replay has not come to.
var errNotTaken = errors.New("not taken yet")

// errFull: the outcome needs a mailbox row, and the commit being gathered has enough of them.
var errFull = errors.New("the commit is full")

// Settle takes what became of pushes. Those for which a read failed, which the replay has not come to, or for which the commit
// being gathered has no room are moved to the front; give these to the next call again. The others are cleared.
func (o *Owner) Settle(outcomes []Settlement) (left int) {
	for i := range outcomes {
		if err := o.settle(&outcomes[i]); err != nil {
			if err != errNotTaken && err != errFull {
				o.stats.ReadErrors++
			}
			outcomes[left] = outcomes[i]
			left++
		}
	}
	clear(outcomes[left:])
	return left
}

// Settlement is a protocol.Outcome whose strings are its own. Device is "" for the user's mailbox.
type Settlement struct {
	Kind     protocol.OutcomeKind
	Position uint64
	ID       protocol.MessageID
	User     string
	Device   string
}

func (o *Owner) settle(out *Settlement) error {
	e := o.flying[out.Position]
	switch {
	case e != nil && e.id == out.ID:
		return o.settleFlying(e, out)
	case out.Kind == protocol.Acknowledged && o.replay && out.Position > o.taken:
		return errNotTaken
	case out.Kind == protocol.Acknowledged:
		return o.settleStored(out)
	}
	o.stats.Ignored++
	return nil
}

func (o *Owner) settleFlying(e *entry, out *Settlement) error {
	if out.User != e.receiver {
		if out.Kind == protocol.Acknowledged {
			o.stats.Violations[PromiseAddressee]++ // somebody else has it
		}
		o.stats.Ignored++
		return nil
	}
	for i := range e.deliveries {
		d := &e.deliveries[i]
		if d.device != out.Device {
			continue
		}
		switch {
		case out.Kind == protocol.Acknowledged && d.state != delivered:
			return o.acknowledge(e, d)
		case out.Kind != protocol.Acknowledged && d.state == pushed && o.Full():
			return errFull
		case out.Kind != protocol.Acknowledged && d.state == pushed:
			reason := MailboxRefused
			if out.Kind == protocol.Lost {
				reason = MailboxLost
			}
			o.writeMailbox(e, i, nil, reason)
		default:
			o.stats.Ignored++
		}
		return nil
	}
	o.stats.Ignored++
	return nil
}

// acknowledge records that one device has the message, live, drained or late. When a read that it needs fails, nothing
// changes.
func (o *Owner) acknowledge(e *entry, d *delivery) error {
	if !e.acked {
		if err := o.firstAcknowledgement(e); err != nil {
			return err
		}
	}
	if d.state != pushed || e.replayed {
		o.next.Acknowledged = append(o.next.Acknowledged,
			MailboxKey{User: e.receiver, Device: d.device, Position: e.position, ID: e.id})
	}
	if d.state == mailbox {
		e.conv.writes(e.receiver, d.device, -1)
	}
	d.state = delivered
	o.stats.Acknowledged++
	o.touch(e.conv)
	return nil
}

func (o *Owner) firstAcknowledgement(e *entry) error {
	rc := e.conv.receipt(e.sender(), e.receiver)
	if err := rc.load(o.cfg.Reader); err != nil {
		return fmt.Errorf("read receipt: %w", err)
	}
	if e.finished || e.replayed { // it left an outstanding row, or an earlier owner did
		if err := o.settleOutstanding(rc, e.position); err != nil {
			return err
		}
	}
	e.acked = true
	rc.acknowledge(e.mark())
	return nil
}

// settleOutstanding deletes, in the commit being gathered, the row that a message left when it was finished without an
// acknowledgement.
func (o *Owner) settleOutstanding(rc *receipt, position uint64) error {
	if err := rc.settle(o.cfg.Reader, position, o.number); err != nil {
		return fmt.Errorf("read outstanding: %w", err)
	}
	o.next.Settled = append(o.next.Settled, rc.outstandingKey(position))
	return nil
}

func (e *entry) sender() string { return e.window.stream.User }

func (e *entry) mark() Mark {
	return Mark{Position: e.position, ID: e.id, Device: e.window.stream.Device, Epoch: e.window.stream.Epoch, Seq: e.seq}
}

// settleStored takes the acknowledgement of a message that is finished: drained or late.
func (o *Owner) settleStored(out *Settlement) error {
	key := MailboxKey{User: out.User, Device: out.Device, Position: out.Position, ID: out.ID}
	r, ok, err := o.cfg.Reader.MailboxRow(key)
	switch {
	case err != nil:
		return fmt.Errorf("read mailbox row: %w", err)
	case !ok:
		o.stats.Ignored++
		return nil
	}
	return o.acknowledgeStored(key, r)
}

func (o *Owner) acknowledgeStored(key MailboxKey, r *Record) error {
	if r.Receiver != key.User {
		o.stats.Violations[PromiseAddressee]++ // a row in somebody else's mailbox
	}
	conv := o.conversation(ConversationKey(r.Sender, r.Receiver))
	defer o.rest(conv)
	rc := conv.receipt(r.Sender, r.Receiver)
	if err := rc.load(o.cfg.Reader); err != nil {
		return fmt.Errorf("read receipt: %w", err)
	}
	first, err := rc.isOutstanding(o.cfg.Reader, r.Position)
	if err != nil {
		return fmt.Errorf("read outstanding: %w", err)
	}
	if first {
		if err := o.settleOutstanding(rc, r.Position); err != nil {
			return err
		}
		rc.acknowledge(Mark{Position: r.Position, ID: r.ID, Device: r.Device, Epoch: r.Epoch, Seq: r.Seq})
	}
	o.touch(conv)
	o.next.Acknowledged = append(o.next.Acknowledged, key)
	o.stats.Acknowledged++
	return nil
}

// Tick sends what was not acknowledged in time to the mailboxes.
func (o *Owner) Tick(nowMs int64) {
	end := o.base + uint64(len(o.order))
	for ; o.expire < end; o.expire++ {
		e := o.order[o.expire-o.base]
		if e == nil {
			continue
		}
		switch {
		case o.Full():
			return
		case nowMs >= e.deadlineMs:
			o.giveUp(e, MailboxTimeout)
		case len(o.flying) >= o.cfg.MaxInFlight && end-o.expire > uint64(o.cfg.MaxInFlight)*3/4:
			o.giveUp(e, MailboxPressure) // what was given up before leaves with its commit
		default:
			return
		}
	}
}

func (o *Owner) giveUp(e *entry, reason MailboxReason) {
	for i := range e.deliveries {
		if e.deliveries[i].state == pushed {
			o.writeMailbox(e, i, nil, reason)
		}
	}
}

// Dirty reports whether Flush would return a commit. Duplicates that were dropped need one only when nothing is in flight: the
// commit that finishes what is takes the low water mark past them, too.
func (o *Owner) Dirty() bool { return len(o.nextDone.convs) > 0 || o.passed && len(o.flying) == 0 }

// Urgent reports whether the commit being gathered holds mailbox rows, for whose notice somebody waits.
func (o *Owner) Urgent() bool { return o.next.Urgent }

// Uncommitted is how many commits were given out and are not durable.
func (o *Owner) Uncommitted() int { return len(o.waiting) }

// Flush finishes what can be finished and gives out the commit that says so, or nil. Call Committed once
// for each, in order, when it is durable.
func (o *Owner) Flush(nowMs int64) *Commit {
	if !o.Dirty() {
		return nil
	}
	c, done := o.next, o.nextDone
	o.clockMs = max(o.clockMs, nowMs, protocol.PositionMillis(o.taken))
	for _, conv := range done.convs {
		done.finished = o.finish(conv, c, done.finished)
		for _, w := range conv.windows {
			if w.dirty {
				w.dirty, w.commit = false, o.number
				c.Windows = append(c.Windows, WindowRow{WindowKey{conv.key, w.stream}, w.done})
			}
		}
		for _, rc := range conv.receipts {
			if !rc.dirty {
				continue
			}
			rc.dirty = false
			if rc.advance(o.firstUnacknowledged(conv, rc), o.clockMs) {
				done.receipts = append(done.receipts, rc.row)
			}
			c.Receipts = append(c.Receipts, rc.row)
		}
		conv.touched = false
		conv.commits++
	}
	c.LowWater, o.passed = o.lowWater(), false
	o.waiting = append(o.waiting, done)
	o.next, o.nextDone = &Commit{Shard: o.cfg.Shard}, inCommit{}
	o.number++
	o.stats.Commits++
	return c
}

// firstUnacknowledged is the first position that a receipt must not come to because of what is in flight, 0: none. In a
// replay it is the first that was not taken, since what an earlier owner had in flight there nobody may have acknowledged.
func (o *Owner) firstUnacknowledged(conv *conversation, rc *receipt) uint64 {
	if p := conv.firstUnacknowledged(rc); p != 0 || !o.replay {
		return p
	}
	if !conv.behind {
		conv.behind = true
		o.behind = append(o.behind, conv)
	}
	return o.taken + 1
}

// finish moves a conversation past every message at its head whose devices are all in a final state.
func (o *Owner) finish(conv *conversation, c *Commit, finished []*entry) []*entry {
	n := 0
	for _, e := range conv.queue {
		if !e.settled() {
			break
		}
		n++
		e.finished = true
		e.window.finish(e.seq)
		finished = append(finished, e)
		if !e.acked {
			c.Outstanding = append(c.Outstanding, OutstandingRow{Conversation: conv.key, Addressee: e.receiver, Mark: e.mark()})
			conv.receipt(e.sender(), e.receiver).leave(e.position, o.number)
		}
	}
	rest := copy(conv.queue, conv.queue[n:])
	clear(conv.queue[rest:])
	conv.queue = conv.queue[:rest]
	return finished
}

func (e *entry) settled() bool {
	for i := range e.deliveries {
		if e.deliveries[i].state == pushed {
			return false
		}
	}
	return true
}

// lowWater is above every record at the head of the log that is finished by this commit or an earlier one.
func (o *Owner) lowWater() uint64 {
	for _, e := range o.order {
		if e != nil && !e.finished {
			return e.position
		}
	}
	return o.taken + 1
}

// Committed says that the oldest commit given out is on stable storage.
func (o *Owner) Committed() {
	done := o.waiting[0]
	number := o.number - uint64(len(o.waiting))
	o.waiting = append(o.waiting[:0], o.waiting[1:]...)
	for _, w := range done.mailbox {
		o.mailboxed(w)
	}
	for i := range done.receipts {
		o.announce(&done.receipts[i])
	}
	for _, e := range done.finished {
		delete(o.flying, e.position)
		o.order[e.number-o.base] = nil
	}
	o.trim()
	for _, conv := range done.convs {
		conv.commits--
		for _, rc := range conv.receipts {
			rc.committed(number)
		}
		o.rest(conv)
	}
}

// mailboxed sends a notice to whatever session the device has now: the row is durable, and a session
// that turned live meanwhile must drain again.
func (o *Owner) mailboxed(w mailboxWrite) {
	for i := range w.e.deliveries {
		d := &w.e.deliveries[i]
		if d.device == w.device && d.state == mailbox {
			d.state = mailboxed
			w.e.conv.writes(w.e.receiver, d.device, -1)
		}
	}
	o.routes = o.cfg.Locator.Locate(o.routes[:0], w.e.receiver)
	for _, route := range o.routes {
		if w.device == "" || route.Device == w.device {
			o.notify(route.Session)
		}
	}
}

func (o *Owner) notify(s protocol.Session) {
	// Rows of one commit often go to the same few sessions, those of one user: one notice each covers them.
	recent := o.actions.Notices[max(0, len(o.actions.Notices)-protocol.MaxDevicesPerUser):]
	if slices.Contains(recent, s) {
		return
	}
	o.actions.Notices = append(o.actions.Notices, s)
	o.stats.Notices++
}

// announce tells every connected device of the sender how far its messages have come.
func (o *Owner) announce(row *ReceiptRow) {
	o.routes = o.cfg.Locator.Locate(o.routes[:0], row.Sender)
	for _, route := range o.routes {
		o.actions.Receipts = append(o.actions.Receipts, row.push(route.Session))
		o.stats.Receipts++
	}
}

// push is the row as it is sent to one session of the sender.
func (r *ReceiptRow) push(to protocol.Session) protocol.ReceiptPush {
	return protocol.ReceiptPush{To: to, ID: r.Delivered.ID, Position: r.Delivered.Position, Seq: r.Delivered.Seq,
		Device: r.Delivered.Device, Epoch: r.Delivered.Epoch, Receiver: r.Addressee, Millis: r.ChangedMs}
}

// trim drops the finished and committed head of order, in bulk so that it costs O(1) a record.
func (o *Owner) trim() {
	n := 0
	for n < len(o.order) && o.order[n] == nil {
		n++
	}
	if n < len(o.order) && n <= len(o.order)/2 {
		return
	}
	rest := copy(o.order, o.order[n:])
	clear(o.order[rest:])
	o.order = o.order[:rest]
	o.base += uint64(n)
	o.expire = max(o.expire, o.base)
}

// touch puts a conversation into the commit being gathered.
func (o *Owner) touch(conv *conversation) {
	if !conv.touched {
		conv.touched = true
		o.nextDone.convs = append(o.nextDone.convs, conv)
	}
}
