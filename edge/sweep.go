package edge

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// No connection has a timer. Each loop looks at a tenth of its slots every 100 ms, so at every connection once a second.

// stuckAfter is how long a posted sweep may wait before the loop counts as stuck.
const stuckAfter = 10 * time.Second

// heartbeat is how others see that a loop runs.
type heartbeat struct {
	posted atomic.Int64 // when the sweep that has not run yet was posted, ns of the server's clock; 0: none
}

// post notes that a sweep is about to be posted. It is false when the last one has not run.
func (b *heartbeat) post(now time.Time) bool { return b.posted.CompareAndSwap(0, now.UnixNano()) }

// alive is an error when the loop has not run for stuckAfter.
func (b *heartbeat) alive(index uint8, now time.Time) error {
	posted := b.posted.Load()
	if posted == 0 || now.UnixNano()-posted < int64(stuckAfter) {
		return nil
	}
	return fmt.Errorf("event loop %d has not run for %s", index, time.Duration(now.UnixNano()-posted).Round(time.Second))
}

// sweep runs on the loop every 100 ms.
func (l *loop) sweep() {
	l.beat.posted.Store(0)
	l.begin()
	l.tryFlushReceipts()
	slices := l.server.cfg.sweepSlices
	for chunk := l.sweepStep % slices; chunk < uint32(len(l.slots.chunks)); chunk += slices {
		for i := range l.slots.chunks[chunk] {
			if c := &l.slots.chunks[chunk][i]; c.state != stateFree && c.state != stateGone {
				l.trySweep(c)
			}
		}
	}
	l.sweepStep++
	l.end()
	l.requestFence()
	l.m.publish(&l.server.published[l.index], l.sessions)
}

func (l *loop) tryFlushReceipts() {
	defer l.recoverFrom(0)
	l.flushReceipts()
}

func (l *loop) trySweep(c *conn) {
	defer l.recoverFrom(l.session(c).Conn)
	late := int32(l.tick-c.deadline) >= 0
	switch c.state {
	case stateUpgrade:
		if late {
			l.m.handshakes[handshakeTimeout]++
			c.reason = closeAuthenticate
			l.doom(c)
		}
	case stateUpgradeToken, stateConnectToken:
		if late {
			l.tooLate(c)
		}
	case stateConnect:
		if late {
			l.fail(c, protocol.CodeTimeout, protocol.CloseTimeout, closeAuthenticate)
		} else {
			l.sweepFrame(c)
		}
	case stateRegistering:
		l.sweepSilence(c)
	case stateOpen:
		l.sweepOpen(c)
	case stateClosing:
		if late {
			l.doom(c)
		}
	}
}

// sweepFrame closes a connection whose frame or message stays incomplete.
func (l *loop) sweepFrame(c *conn) {
	if w := c.work; w != nil && w.reader.pending() && l.tick-w.reader.since >= l.server.frameTicks {
		l.fail(c, protocol.CodeTimeout, protocol.CloseTimeout, closeFrame)
		c.flags |= flagDeaf
	}
}

// sweepSilence pings a connection from which nothing was heard for a heartbeat, and closes it after two.
func (l *loop) sweepSilence(c *conn) {
	quiet := l.tick - c.heard
	switch {
	case quiet >= 2*l.server.heartbeatTicks:
		l.fail(c, protocol.CodeTimeout, protocol.CloseTimeout, closeHeartbeat)
	case quiet >= l.server.heartbeatTicks && !c.has(flagPinged):
		c.flags |= flagPinged
		l.emitControl(c, ws.OpPing, nil)
	}
}

func (l *loop) sweepOpen(c *conn) {
	if c.has(flagLeaving) && int32(l.tick-c.deadline) >= 0 {
		l.finish(c, c.closeCode, "going away", closeGoingAway)
		return
	}
	l.sweepSilence(c)
	if c.state != stateOpen {
		return
	}
	l.sweepFrame(c)
	l.sweepToken(c)
	l.sweepOutput(c)
	l.readReceipts(c)
	l.relax(c)
}

// sweepToken asks for a new token before the old one ends, and closes when it has.
func (l *loop) sweepToken(c *conn) {
	left := time.Unix(int64(c.expires), 0).Sub(l.now)
	switch {
	case c.state != stateOpen:
	case left <= 0:
		l.fail(c, protocol.CodeTokenExpired, protocol.CloseTokenExpired, closeTokenExpired)
	case left <= l.server.renewBefore && !c.has(flagRenewAsked) && l.renewWait(c) == 0:
		c.flags |= flagRenewAsked
		f := &l.reply
		f.Reset()
		f.Kind = protocol.KindRenew
		f.ExpiresInMs = max(1, left.Milliseconds())
		l.emit(c, f)
	}
}

// sweepOutput looks whether a slow reader moves.
func (l *loop) sweepOutput(c *conn) {
	if c.state != stateOpen || c.has(flagLeaving) {
		return
	}
	buffered, left := 0, false
	if c.has(flagBacklog) {
		buffered = c.sock.OutboundBuffered()
		w := l.borrow(c)
		left = w.buffered+w.written > buffered
		w.buffered, w.written = buffered, 0
		if buffered == 0 {
			c.flags &^= flagBacklog
		}
	}
	l.act(c, c.down.Sweep(uint32(l.nowMs/1000), buffered, left, l.fenced))
}
