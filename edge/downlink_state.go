package edge

import (
	"bytes"
	"cmp"
	"slices"
	"sort"
	"sync"

	"millrace/protocol"
)

// Implementation limits of a downlink.
const (
	resumeBelow   = protocol.MaxUnacknowledged / 2 // a paused drain goes on when acknowledgements bring it here
	pageRows      = 128                            // rows asked for at once; a paused drain resumes with this much room
	maxUnfenced   = 8192                           // acknowledgements remembered; a fence takes 0.2 s: 40 000 a second
	slowSeconds   = 60                             // without progress at a limit, then closed
	flightKeepCap = 64                             // entries; larger lists are not kept in the pool
)

// Downlink is the pure state of what one connection is given: live or draining, the pass of a drain, and what is in
// flight until the device acknowledges it. It decides; the loop that owns it acts on the Effects.
//
// The owner pushes only to live sessions. Whatever it writes to the mailbox instead is followed by a
// notice, and a drain ends only with a whole pass that began after the last notice, so no message falls
// between the two: what was committed before the pass began it has read, and what was committed later is
// followed by a notice. Every turn from live to draining raises the generation:
// pushes that were already on their way carry the old one, are refused, and overtake nothing.
//
// Nothing is pushed twice on a connection. What is in flight is skipped by a drain, and so is what was acknowledged,
// until a page is asked for after a fence has said that its deletion is durable: such a page does not hold the row.
type Downlink struct {
	flight       *flight // nil while nothing was in flight for a second
	generation   uint32
	stalledSince uint32 // seconds; when the present lack of progress began

	live    bool
	heir    bool
	paused  bool // at a limit; resumed by acknowledgements or the sweep
	reading bool // a page was asked for and has not come
	noticed bool // since this pass began
	acked   bool // since the last sweep
	idle    bool // flight was empty at the last sweep
}

// Pending is one push that the device has not acknowledged.
type Pending struct {
	ID           protocol.MessageID
	Conversation uint64
	Position     uint64
	Mailbox      bool // the row is in a mailbox: losing the connection loses nothing
	UserMailbox  bool
}

// flight is what a connection needs only while something is in flight; pooled.
type flight struct {
	pending []Pending              // oldest first, at most protocol.MaxUnacknowledged
	acked   []ackedPush            // by place, at most maxUnfenced
	cursor  protocol.MailboxCursor // how far this pass has come
	last    protocol.MailboxCursor // the last row of the present page that was dealt with
	stopped bool                   // the present page hit a limit
	content int                    // bytes of a message in the last page, on average
}

// ackedPush is a push that was acknowledged and whose row may still be read.
type ackedPush struct {
	id       protocol.MessageID
	position uint64
	fence    uint64 // the first fence that covers it
}

func (a *ackedPush) compare(p *Pending) int {
	if c := cmp.Compare(a.position, p.Position); c != 0 {
		return c
	}
	return bytes.Compare(a.id[:], p.ID[:])
}

var flights = sync.Pool{New: func() any { return new(flight) }}

// Effects are what the loop must do after a step.
type Effects uint8

const (
	// ReadPage: ask the Mailbox for a page, see Request.
	ReadPage Effects = 1 << iota
	// StateChanged: tell the Registrar the new Generation and Live.
	StateChanged
	// CloseSlow: close the connection, code slow.
	CloseSlow
)

// PushVerdict is what a Downlink says to one message.
type PushVerdict uint8

const (
	// Write it; it is in flight now.
	Write PushVerdict = iota
	// Skip it: it was pushed on this connection.
	Skip
	// RefusePush: tell the owner; it goes to the mailbox.
	RefusePush
	// StopPage: no room; this row and those after it stay for later. Call EndPage.
	StopPage
)

// Start begins the first drain of a connection whose route was bound as draining, generation 0.
func (d *Downlink) Start(heir bool) Effects {
	*d = Downlink{heir: heir}
	return d.beginPass()
}

// Live reports whether the owner may push to this session.
func (d *Downlink) Live() bool { return d.live }

// Generation is the one that a push must name.
func (d *Downlink) Generation() uint32 { return d.generation }

// InFlight is how many pushes are not acknowledged.
func (d *Downlink) InFlight() int {
	if d.flight == nil {
		return 0
	}
	return len(d.flight.pending)
}

// Heir reports whether the drain reads the user mailbox too.
func (d *Downlink) Heir() bool { return d.heir }

// Request says which page to ask for: at most limit rows, never more than could be pushed, after a cursor. fenced is the last
// fence that was answered; what it covers need not be remembered any more.
func (d *Downlink) Request(fenced uint64) (after protocol.MailboxCursor, limit int) {
	f := d.borrow()
	f.forget(fenced)
	return f.cursor, max(1, min(pageRows, protocol.MaxUnacknowledged-len(f.pending)))
}

// Push judges a live push. room says whether the outbound budget takes it.
func (d *Downlink) Push(generation uint32, p Pending, room bool) (PushVerdict, Effects) {
	if !d.live || generation != d.generation {
		return RefusePush, 0
	}
	f := d.borrow()
	if f.knows(&p) {
		return Skip, 0
	}
	if !room || f.full() {
		return RefusePush, d.Overflow(generation)
	}
	f.pending = append(f.pending, p)
	return Write, 0
}

// Overflow says that a push of this generation was refused for want of room, here or on its way.
func (d *Downlink) Overflow(generation uint32) Effects {
	if !d.live || generation != d.generation {
		return 0
	}
	d.turnDraining()
	d.paused = true
	return StateChanged
}

// Notify says that something was written to the mailbox for this session.
func (d *Downlink) Notify() Effects {
	d.noticed = true
	if !d.live {
		return 0
	}
	d.turnDraining()
	return StateChanged | d.read()
}

// turnDraining leaves the next pass to its caller: at once, or after a pause.
func (d *Downlink) turnDraining() {
	d.live = false
	d.generation++
	d.rewind()
}

func (d *Downlink) beginPass() Effects {
	d.rewind()
	return d.read()
}

func (d *Downlink) rewind() {
	d.borrow().cursor = protocol.MailboxCursor{}
	d.noticed, d.paused = false, false
}

func (d *Downlink) read() Effects {
	if d.reading {
		return 0 // its answer will start the next one, see BeginPage
	}
	d.reading = true
	return ReadPage
}

// Fits is how many rows like those of the last page n bytes have room for, each with overhead bytes around its content; at least
// one. Pages with more would be read, and read again.
func (d *Downlink) Fits(n, overhead int) int {
	return max(1, n/(overhead+d.borrow().content))
}

// Measured says how many bytes of content the rows of a page have.
func (d *Downlink) Measured(rows, bytes int) {
	if rows > 0 {
		d.borrow().content = bytes / rows
	}
}

// BeginPage opens a page that was asked for with Cursor after. It is false when the page is no longer
// wanted; then effects may ask for another.
func (d *Downlink) BeginPage(after protocol.MailboxCursor) (ok bool, e Effects) {
	d.reading = false
	if d.live || d.paused {
		return false, 0
	}
	f := d.borrow()
	if after != f.cursor {
		return false, d.read()
	}
	f.last, f.stopped = after, false
	return true, 0
}

// Row judges the next row of the page.
func (d *Downlink) Row(p Pending, room bool) PushVerdict {
	f := d.borrow()
	at := protocol.MailboxCursor{DeviceMailbox: !p.UserMailbox, Position: p.Position, ID: p.ID}
	if f.knows(&p) {
		f.last = at
		return Skip
	}
	if !room || f.full() {
		f.stopped = true
		return StopPage
	}
	f.last = at
	p.Mailbox = true
	f.pending = append(f.pending, p)
	return Write
}

// EndPage closes the page. next is where the following page starts; end says that no row follows.
func (d *Downlink) EndPage(next protocol.MailboxCursor, end bool) Effects {
	f := d.borrow()
	switch {
	case f.stopped:
		f.cursor = f.last
		d.paused = true
		return 0
	case !end:
		f.cursor = next
		return d.read()
	case d.noticed:
		return d.beginPass()
	default:
		d.live = true
		return StateChanged
	}
}

// PageFailed says that the page could not be read. The sweep tries again.
func (d *Downlink) PageFailed() {
	d.reading = false
	d.paused = !d.live
}

// Acknowledge takes a push out of flight. ok is false when no such push is in flight; the
// acknowledgement is then counted and ignored. room is whether the outbound budget takes more, fence the number of the
// next fence, fenced the last that was answered.
func (d *Downlink) Acknowledge(id protocol.MessageID, room bool, fence, fenced uint64) (p Pending, ok bool, e Effects) {
	f := d.flight
	if f == nil {
		return p, false, 0
	}
	i := f.find(id)
	if i < 0 {
		return p, false, 0
	}
	p = f.pending[i]
	f.pending = append(f.pending[:i], f.pending[i+1:]...)
	if len(f.acked) == cap(f.acked) && !d.reading {
		f.forget(fenced) // rather than grow
	}
	f.remember(&p, fence)
	d.acked = true
	if d.paused && room && len(f.pending) < resumeBelow {
		e = d.resume()
	}
	return p, true, e
}

func (d *Downlink) resume() Effects {
	d.paused = false
	return d.read()
}

// Sweep is called once a second. buffered is how many outbound bytes wait in this process, left
// whether any left since the last sweep, fenced the last fence that was answered.
func (d *Downlink) Sweep(nowSeconds uint32, buffered int, left bool, fenced uint64) (e Effects) {
	full := d.InFlight() >= protocol.MaxUnacknowledged
	if full && !d.acked || buffered > 0 && !left {
		if d.stalledSince == 0 { // no sweep yet: a drain can fill the flight in the first second
			d.stalledSince = nowSeconds
		}
		if nowSeconds-d.stalledSince >= slowSeconds {
			return CloseSlow
		}
	} else {
		d.stalledSince = nowSeconds
	}
	d.acked = false
	if d.paused && buffered == 0 && !full {
		e = d.resume()
	}
	d.release(fenced)
	return e
}

// End gives back what was in flight when the connection ended: lost is called for each push whose only copy outside the
// log was this connection's. Rows of a mailbox stay there.
func (d *Downlink) End(lost func(Pending)) {
	f := d.flight
	if f == nil {
		return
	}
	for _, p := range f.pending {
		if !p.Mailbox {
			lost(p)
		}
	}
	d.put()
}

func (d *Downlink) borrow() *flight {
	if d.flight == nil {
		d.flight = flights.Get().(*flight)
	}
	d.idle = false
	return d.flight
}

// release returns the flight of a live session in which nothing happened for a whole sweep. No page is
// under way then, so what is fenced can be forgotten.
func (d *Downlink) release(fenced uint64) {
	f := d.flight
	if f == nil || !d.live {
		d.idle = false
		return
	}
	f.forget(fenced)
	if len(f.pending) > 0 || len(f.acked) > 0 {
		d.idle = false
		return
	}
	if !d.idle {
		d.idle = true
		return
	}
	d.put()
}

func (d *Downlink) put() {
	f := d.flight
	d.flight = nil
	if cap(f.pending) > flightKeepCap {
		f.pending = nil
	}
	if cap(f.acked) > flightKeepCap {
		f.acked = nil
	}
	*f = flight{pending: f.pending[:0], acked: f.acked[:0]}
	flights.Put(f)
}

// full reports whether nothing more can be pushed before something is acknowledged, or a fence is answered.
func (f *flight) full() bool {
	return len(f.pending) >= protocol.MaxUnacknowledged || len(f.pending)+len(f.acked) >= maxUnfenced
}

// knows reports whether p was pushed on this connection.
func (f *flight) knows(p *Pending) bool {
	if f.find(p.ID) >= 0 {
		return true
	}
	_, found := f.acknowledged(p)
	return found
}

// find is a scan: acknowledgements come in the order of the pushes, so the first entry is the usual hit.
func (f *flight) find(id protocol.MessageID) int {
	for i := range f.pending {
		if f.pending[i].ID == id {
			return i
		}
	}
	return -1
}

func (f *flight) acknowledged(p *Pending) (at int, found bool) {
	at = sort.Search(len(f.acked), func(i int) bool { return f.acked[i].compare(p) >= 0 })
	return at, at < len(f.acked) && f.acked[at].compare(p) == 0
}

// remember keeps the order of place. Most acknowledgements come in that order, and are appended.
func (f *flight) remember(p *Pending, fence uint64) {
	a := ackedPush{id: p.ID, position: p.Position, fence: fence}
	if n := len(f.acked); n == 0 || f.acked[n-1].compare(p) < 0 {
		f.acked = append(f.acked, a)
		return
	}
	at, _ := f.acknowledged(p)
	f.acked = slices.Insert(f.acked, at, a)
}

// forget drops what the fence covers. Only while no page is under way: one that was read before may hold its rows.
func (f *flight) forget(fenced uint64) {
	f.acked = slices.DeleteFunc(f.acked, func(a ackedPush) bool { return a.fence <= fenced })
}
