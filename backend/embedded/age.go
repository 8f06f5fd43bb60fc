package embedded

import (
	"fmt"
	"slices"
	"time"

	"millrace/protocol"
)

// Limits of the age clock.
const (
	// maxSkip is how much of a jump of the wall clock, or of the time between two runs, is taken for time that passed.
	maxSkip = 24 * time.Hour
	// maxGaps bounds the row. A site that stops for days every week reaches it in a year; then ages begin to be underestimated.
	maxGaps = 64
)

// ageClock tells how long ago a date was, counting only time that this store saw pass. Rows are dated by the wall clock,
// and wall clocks jump: a virtual machine wakes up years ahead, a board without a battery starts in 1970 and then asks for the
// time. Neither may expire what was stored a minute ago. So every advance of more than maxSkip beyond the time
// that was measured is remembered as a gap, and gaps do not count.
//
// A row is never taken for older than it is, but for maxSkip a jump. Let it be dated t: the wall clock then, or later. Let x be
// an instant between t and now that lies in no gap. The wall clock has passed x since the row was written. The last time it did,
// it ran through x, which took time: had it jumped over x, a gap with x would have been noted, which only a clock set back
// below x takes away, and then that was not the last time. So all instants that count were lived through, each at a time of
// its own. A row may well be older than it is taken for, since the promise is that it waits at least so long.
//
// An ageClock is a pure value; the zero one has seen nothing, and all before its first observation is a gap.
type ageClock struct {
	seenMs int64 // the wall clock when it was last observed
	gaps   []gap // ascending, apart, all before seenMs
}

// gap is a part of the wall clock's time that nobody lived through.
type gap struct{ fromMs, toMs int64 }

// observe takes the wall clock. ran is the time measured since the last observation, by a clock that does not jump; 0 if there
// was none in this process. Dates beyond protocol.MaxTimestampMillis cannot be stored, so the clock stops there.
func (c *ageClock) observe(wallMs int64, ran time.Duration) {
	wallMs = min(max(wallMs, 0), protocol.MaxTimestampMillis)
	if wallMs < c.seenMs { // set back: what lies ahead is still to be lived through
		for n := len(c.gaps); n > 0 && c.gaps[n-1].toMs > wallMs; n-- {
			if c.gaps[n-1].toMs = wallMs; c.gaps[n-1].fromMs >= wallMs {
				c.gaps = c.gaps[:n-1]
			}
		}
	}
	if passed := c.seenMs + (ran + maxSkip).Milliseconds(); wallMs > passed {
		c.gaps = append(c.gaps, gap{passed, wallMs})
	}
	c.seenMs = wallMs
	for len(c.gaps) > maxGaps {
		c.join()
	}
}

// join makes one gap of the two that are nearest to each other: the least time is forgotten.
func (c *ageClock) join() {
	best := 1
	for i := range c.gaps {
		if i > 0 && c.gaps[i].fromMs-c.gaps[i-1].toMs < c.gaps[best].fromMs-c.gaps[best-1].toMs {
			best = i
		}
	}
	c.gaps[best-1].toMs = c.gaps[best].toMs
	c.gaps = slices.Delete(c.gaps, best, best+1)
}

// before is the date, in ms since 1970, from which on rows are younger than age; 0 if none can be that old.
func (c *ageClock) before(age time.Duration) int64 {
	left, end := age.Milliseconds(), c.seenMs
	for i := len(c.gaps) - 1; i >= 0; i-- {
		lived := end - c.gaps[i].toMs
		if lived >= left {
			break
		}
		left -= lived
		end = c.gaps[i].fromMs
	}
	return max(end-left, 0)
}

// forget drops the gaps before a date that no question goes back to.
func (c *ageClock) forget(ms int64) {
	n := 0
	for n < len(c.gaps) && c.gaps[n].toMs <= ms {
		n++
	}
	c.gaps = slices.Delete(c.gaps, 0, n)
}

// An age clock, stored: version (1), time last seen in ms (6), then from (6) and to (6) of each gap.
func appendAgeClock(dst []byte, c *ageClock) []byte {
	dst = appendUint48(append(dst, rowVersion), uint64(c.seenMs))
	for _, g := range c.gaps {
		dst = appendUint48(appendUint48(dst, uint64(g.fromMs)), uint64(g.toMs))
	}
	return dst
}

func decodeAgeClock(value []byte) (c ageClock, err error) {
	d := decoder{rest: value}
	d.version()
	c.seenMs = int64(d.uint48())
	for last := int64(0); len(d.rest) > 0 && !d.failed; {
		g := gap{int64(d.uint48()), int64(d.uint48())}
		if g.fromMs < last || g.toMs <= g.fromMs || g.toMs > c.seenMs {
			return c, fmt.Errorf("age clock: %w", errRow)
		}
		last = g.toMs
		c.gaps = append(c.gaps, g)
	}
	return c, d.err("age clock")
}
