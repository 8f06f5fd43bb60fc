package edge

import (
	"math/bits"

	"millrace/protocol"
)

// Uplink is the pure state of what one connection sends: its open numbers, the refusal that holds a
// stream back, and the message rate. It decides; the loop that owns it acts. 88 bytes, no pointer.
//
// A number is open from its first Offer that was not finally refused until its answer. Open
// numbers lie within a span of 64, which is what makes the duplicate window exact (DESIGN.md §4).
type Uplink struct {
	first  uint64 // of this connection's block
	top    uint64 // the highest number handed over on this connection
	base   uint64 // bit 0 of handed; the lowest number handed over and not answered
	handed uint64 // bit i: base+i was handed to the Publisher and is not answered
	held   uint64 // a retryable refusal left this number open and holds back all above it; 0: none
	behind uint64 // bit i: held+i was refused and has not come again; bit 0 is held itself

	rate       tokenBucket
	floodCount uint32 // refusals for rate since floodFrom
	floodFrom  uint32 // seconds
	heldUntil  int64  // ms; when trying held again may help
	heldCode   protocol.Code
}

// Verdict is what an Uplink says to one send.
type Verdict uint8

const (
	// Publish: hand it to the Publisher, then call Handed or Refused.
	Publish Verdict = iota
	// Ignore: this number was handed over on this connection and its answer is on the way.
	Ignore
	// Refuse: tell the client; the number stays open unless the code is bad_request.
	Refuse
	// Flood: close the connection.
	Flood
	// BlockUsed: the block has no number after this one; refuse it, tell the client to go away and come back.
	BlockUsed
)

// Start gives the connection its block.
func (u *Uplink) Start(block uint32) { *u = Uplink{first: protocol.FirstSeq(block)} }

// Resume is Start for a connection whose Uplink was Idle and was not kept: top is what Top said.
func (u *Uplink) Resume(block, top uint32) {
	u.Start(block)
	if top != 0 {
		u.top = uint64(block)<<protocol.SendBits | uint64(top)
	}
}

// Top is the place in the connection's block of the highest number handed over, 0 when there is none.
func (u *Uplink) Top() uint32 {
	if u.top < u.first {
		return 0
	}
	return protocol.SeqSend(u.top)
}

// Idle reports whether the block and Top are all there is to know: nothing is open, the rate is unused, and
// no flood is being counted. Then the Uplink need not be kept.
func (u *Uplink) Idle(nowMs int64) bool {
	return u.handed == 0 && u.held == 0 && u.rate.arrivalMicros <= nowMs*1000 &&
		(u.floodCount == 0 || uint32(nowMs/1000)-u.floodFrom >= floodSeconds)
}

// First is the first number of the connection's block.
func (u *Uplink) First() uint64 { return u.first }

// Resend reports whether a send with this number may have been made before: its number is below the connection's
// first, or not above one that was handed over already (after outcome_unknown it comes again on the same
// connection). Then the record being appended may be a duplicate, whose position means nothing, and
// the number must not be refused for good.
func (u *Uplink) Resend(seq uint64) bool { return seq < u.first || seq <= u.top }

// Open is how many sends were handed over and not answered.
func (u *Uplink) Open() int { return bits.OnesCount64(u.handed) }

// Offer judges the send with this number. With Refuse it returns what the client is told, and the number that it must send
// again first when the refusal holds the stream back. nowMs is any monotonic clock.
func (u *Uplink) Offer(seq uint64, nowMs int64, limit *RateLimit) (v Verdict, refusal protocol.Refusal, resendFrom uint64) {
	if !protocol.ValidSeq(seq) || protocol.SeqBlock(seq) > protocol.SeqBlock(u.first) {
		return Refuse, protocol.Refusal{Code: protocol.CodeBadRequest}, 0
	}
	if u.held != 0 && seq > u.held {
		if limit.on() && u.heldCode == protocol.CodeRateLimited && u.flooding(nowMs, limit) {
			return Flood, protocol.Refusal{}, 0
		}
		if seq-u.held >= protocol.MaxOpenSpan {
			return Refuse, protocol.Refusal{Code: protocol.CodeWindowExceeded}, 0
		}
		u.behind |= 1 << (seq - u.held)
		return Refuse, u.heldRefusal(seq, nowMs, limit), u.held
	}
	if u.handed != 0 && seq >= u.base && seq-u.base < 64 && u.handed>>(seq-u.base)&1 == 1 {
		return Ignore, protocol.Refusal{}, 0
	}
	if !u.withinSpan(seq) {
		return Refuse, protocol.Refusal{Code: protocol.CodeWindowExceeded}, 0
	}
	if limit.on() {
		if wait := u.rate.take(nowMs, limit); wait > 0 {
			if u.flooding(nowMs, limit) {
				return Flood, protocol.Refusal{}, 0
			}
			r := protocol.Refusal{Code: protocol.CodeRateLimited, RetryAfterMs: uint32(wait)}
			u.hold(seq, r, nowMs)
			return Refuse, r, u.held
		}
	}
	if protocol.SeqSend(seq) == protocol.MaxSend && protocol.SeqBlock(seq) == protocol.SeqBlock(u.first) {
		return BlockUsed, protocol.Refusal{}, 0
	}
	return Publish, protocol.Refusal{}, 0
}

// withinSpan reports whether the open numbers and seq lie within protocol.MaxOpenSpan.
func (u *Uplink) withinSpan(seq uint64) bool {
	low, high := seq, seq
	if u.handed != 0 {
		low = min(low, u.base)
		high = max(high, u.base+63-uint64(bits.LeadingZeros64(u.handed)))
	}
	if u.held != 0 {
		low = min(low, u.held)
		high = max(high, u.held+63-uint64(bits.LeadingZeros64(u.behind)))
	}
	return high-low < protocol.MaxOpenSpan
}

// Handed records that the Publisher took the send.
func (u *Uplink) Handed(seq uint64) {
	u.release(seq)
	switch {
	case u.handed == 0:
		u.base = seq
	case seq < u.base:
		u.handed <<= u.base - seq
		u.base = seq
	}
	u.handed |= 1 << (seq - u.base)
	u.top = max(u.top, seq)
}

// Refused records a refusal that the Publisher gave inside the call. A retryable one holds back every
// higher number until this one comes again, so that a stream's order survives it; a final one ends the number.
func (u *Uplink) Refused(seq uint64, r protocol.Refusal, nowMs int64) (resendFrom uint64) {
	if r.RetryAfterMs == 0 {
		u.Ended(seq)
		return 0
	}
	u.hold(seq, r, nowMs)
	return u.held
}

// Ended records that a final refusal ended the number.
func (u *Uplink) Ended(seq uint64) { u.release(seq) }

// Answer records the answer to a send that was handed over. ok is false when there was none.
func (u *Uplink) Answer(seq uint64, r protocol.Refusal, nowMs int64) (resendFrom uint64, ok bool) {
	if u.handed == 0 || seq < u.base || seq-u.base >= 64 || u.handed>>(seq-u.base)&1 == 0 {
		return 0, false
	}
	u.handed &^= 1 << (seq - u.base)
	if u.handed != 0 {
		skip := bits.TrailingZeros64(u.handed)
		u.handed >>= skip
		u.base += uint64(skip)
	}
	if r.RetryAfterMs != 0 {
		u.hold(seq, r, nowMs)
		return u.held, true
	}
	return 0, true
}

// FullReceivers are the receivers to whom sends of a connection were refused for good, with mailbox_full. Only a number
// 64 or more above the refused one shows that the client has read the refusal (open numbers lie within that span). Until then every
// later send to the same receiver must be refused too, whatever has become of the mailbox: if it were accepted, and the
// refusal lost with the connection, the refused send would come again on the next one and be accepted behind it.
type FullReceivers struct {
	list []fullReceiver // at most protocol.MaxOpenSpan, see Refused
}

type fullReceiver struct {
	user string
	seq  uint64 // the last number refused
}

// Refuses reports whether the send with this number must be refused with mailbox_full; then call Refused.
func (f *FullReceivers) Refuses(receiver []byte, seq uint64) bool {
	for i := range f.list {
		if f.list[i].user == string(receiver) {
			return seq < f.list[i].seq+protocol.MaxOpenSpan
		}
	}
	return false
}

// Refused records that the send with this number got mailbox_full.
func (f *FullReceivers) Refused(receiver []byte, seq uint64) {
	n := 0
	for _, r := range f.list {
		if seq < r.seq+protocol.MaxOpenSpan && r.user != string(receiver) {
			f.list[n] = r
			n++
		}
	}
	clear(f.list[n:])
	f.list = append(f.list[:n], fullReceiver{string(receiver), seq})
}

// Empty reports whether nothing need be remembered.
func (f *FullReceivers) Empty() bool { return len(f.list) == 0 }

// hold makes a refused number the one that must come again first, if it is the lowest.
func (u *Uplink) hold(seq uint64, r protocol.Refusal, nowMs int64) {
	switch {
	case u.held == 0:
		u.held, u.behind = seq, 1
	case seq < u.held:
		u.behind = u.behind<<(u.held-seq) | 1
		u.held = seq
	default:
		u.behind |= 1 << (seq - u.held)
		if seq > u.held {
			return
		}
	}
	u.heldCode, u.heldUntil = r.Code, nowMs+int64(r.RetryAfterMs)
}

// release takes a number out of those that were refused. When it was the one held, the next higher refused one takes
// its place: a send that the client wrote before it had read the refusals must not overtake them.
func (u *Uplink) release(seq uint64) {
	if u.held == 0 || seq < u.held || seq-u.held >= 64 {
		return
	}
	u.behind &^= 1 << (seq - u.held)
	if u.behind == 0 {
		u.held = 0
		return
	}
	skip := bits.TrailingZeros64(u.behind)
	u.behind >>= skip
	u.held += uint64(skip)
}

// heldRefusal is what a number behind a hold is told. Over the rate, each waits for those before it as well: who waits the
// longest of the times has a token for each of them, up to the burst, and does not write most of them in vain.
func (u *Uplink) heldRefusal(seq uint64, nowMs int64, limit *RateLimit) protocol.Refusal {
	wait := max(1, u.heldUntil-nowMs)
	if limit.on() && u.heldCode == protocol.CodeRateLimited {
		before := bits.OnesCount64(u.behind & (1<<(seq-u.held) - 1))
		wait += int64(float64(before) * 1000 / limit.PerSecond)
	}
	return protocol.Refusal{Code: u.heldCode, RetryAfterMs: uint32(min(wait, protocol.MaxRetryAfterMillis))}
}

// flooding counts one refusal for rate and reports whether the client went on at over ten
// times the rate for ten seconds: 100 seconds' worth of messages refused within ten.
func (u *Uplink) flooding(nowMs int64, limit *RateLimit) bool {
	now := uint32(nowMs / 1000)
	if now-u.floodFrom >= floodSeconds {
		u.floodFrom, u.floodCount = now, 0
	}
	u.floodCount++
	return float64(u.floodCount) > limit.PerSecond*floodFactor*floodSeconds
}

// Who goes on sending against rate_limited at over floodFactor times the rate for floodSeconds is closed.
const (
	floodSeconds = 10
	floodFactor  = 10
)

// RateLimit is how often something may be done: PerSecond in the long run, after a silence Burst at once. The zero value sets no limit.
type RateLimit struct {
	PerSecond float64
	Burst     int // at least 1
}

func (l *RateLimit) on() bool { return l.PerSecond > 0 }

// tokenBucket is the generic cell rate algorithm (ITU-T I.371) in 8 bytes: the theoretical arrival
// time of the next cell, in microseconds of the caller's clock.
type tokenBucket struct{ arrivalMicros int64 }

// take takes one token, or returns after how many milliseconds (≥ 1) there will be one.
func (b *tokenBucket) take(nowMs int64, l *RateLimit) (waitMs int64) {
	now := nowMs * 1000
	interval := l.intervalMicros()
	arrival := max(b.arrivalMicros, now)
	if early := arrival - now - interval*int64(l.Burst-1); early > 0 {
		return (early + 999) / 1000
	}
	b.arrivalMicros = arrival + interval
	return 0
}
