package edge

import "millrace/protocol"

// ReceiptReplay is the pure state of how a connection reads receipts from the store, in the order in which they changed: when it
// connects, and when live ones were missed. Until it has come to the end every live one is missed, too: so
// whatever a client has applied, nothing older than the newest of it is still to come, but for the slack of
// protocol.ReceiptsSlackMillis.
type ReceiptReplay struct {
	active bool
	missed bool // a live receipt was not taken
	after  protocol.ReceiptCursor
	since  int64 // date of the earliest one missed
}

// Start begins with the receipts that changed at or after a time.
func (p *ReceiptReplay) Start(sinceMs int64) {
	*p = ReceiptReplay{active: true, after: protocol.ReceiptCursor{Millis: sinceMs}}
}

// Active reports whether pages are still to be read, and live receipts to be missed.
func (p *ReceiptReplay) Active() bool { return p.active }

// After is where the next page starts.
func (p *ReceiptReplay) After() protocol.ReceiptCursor { return p.after }

// Miss says that a live receipt was not taken.
func (p *ReceiptReplay) Miss(ms int64) {
	switch {
	case !p.active:
		p.Start(ms)
	case !p.missed:
		p.missed, p.since = true, ms
	default:
		p.since = min(p.since, ms)
	}
}

// Page says how far a page went. What was missed while it was read may have changed after that.
func (p *ReceiptReplay) Page(next protocol.ReceiptCursor, end bool) {
	p.after = next
	switch {
	case end && p.missed:
		p.Start(p.since)
	case end:
		p.active = false
	}
}
