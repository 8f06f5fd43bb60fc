package checker

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Verdict is what a run came to.
type Verdict struct {
	Messages uint64 // sent: numbers, not resends
	Resends  uint64
	Answered uint64
	Refused  uint64 // for good, and not answered
	Open     uint64 // neither
	Due      uint64 // times that an answered message had to be shown on a device
	Shown    uint64 // times that a message was shown, first times on right devices only
	Waiting  uint64 // answered, to a user who never had a device

	RefusedByCode map[string]uint64 // refusals seen, also those that were tried again

	counts     [kinds]uint64
	Violations []Violation // up to Config.Examples of each kind
}

// Count is how many violations of a kind there were.
func (v *Verdict) Count(k Kind) uint64 { return v.counts[k] }

// OK reports that nothing was wrong, and nothing was left unjudged.
func (v *Verdict) OK() bool { return v.counts == [kinds]uint64{} }

// String is one line for a run that is OK; else examples follow, one a line.
func (v *Verdict) String() string {
	var b strings.Builder
	word := "OK"
	if !v.OK() {
		word = "FAILED"
	}
	fmt.Fprintf(&b, "%s: %d messages, %d resends: %d answered, %d refused, %d open, %d waiting; shown %d times, %d due",
		word, v.Messages, v.Resends, v.Answered, v.Refused, v.Open, v.Waiting, v.Shown, v.Due)
	for k := range Kind(kinds) {
		// The first four are what people look for; they are named even when there are none.
		if n := v.counts[k]; n != 0 || k <= Misdelivered {
			fmt.Fprintf(&b, ", %d %s", n, k)
		}
	}
	separator := "; refusals: "
	for _, code := range sortedKeys(v.RefusedByCode) {
		fmt.Fprintf(&b, "%s%d %s", separator, v.RefusedByCode[code], code)
		separator = ", "
	}
	for _, violation := range v.Violations {
		b.WriteString("\n  ")
		b.WriteString(violation.String())
	}
	return b.String()
}

func sortedKeys(m map[string]uint64) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Verdict judges what was reported until now. It changes nothing and may be called again; calls that
// report wait meanwhile (a second or so for a million messages).
func (c *Checker) Verdict() *Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := &Verdict{Messages: uint64(c.messages.n), Resends: c.resends, RefusedByCode: c.refusalsByCode()}
	found := c.found.clone()
	found.counts[Unjudged] = c.unjudged
	for n := range uint32(c.messages.n) {
		c.judge(v, &found, c.messages.at(n))
	}
	c.judgeOrder(&found)
	v.counts = found.counts
	v.Violations = found.all()
	return v
}

// judge counts one message and finds where it was lost.
func (c *Checker) judge(v *Verdict, found *findings, m *message) {
	devices := c.users[m.receiver].devices
	for i := range devices {
		v.Shown += uint64(m.shown >> i & 1)
	}
	switch {
	case m.flags&answered != 0:
		v.Answered++
	case m.flags&refused != 0:
		v.Refused++
	default:
		v.Open++
	}
	switch {
	case m.flags&answered == 0:
	case len(devices) == 0:
		v.Waiting++
	case m.due == 0:
		v.Due++
		if m.shown == 0 {
			c.reportTo(found, Lost, m, noClient, func() string { return "answered, not shown on any device" })
		}
	default:
		for i, on := range devices {
			bit := uint8(1) << i
			v.Due += uint64(m.due >> i & 1)
			if m.due&^m.shown&bit != 0 {
				c.reportTo(found, Lost, m, on, func() string { return "answered, not shown" })
			}
		}
	}
	c.judgeReceipt(found, m)
}

func (c *Checker) judgeReceipt(found *findings, m *message) {
	if m.position == 0 {
		return
	}
	told := c.receipts[pair{c.sender(m), m.receiver}]
	switch {
	case c.proven(m):
		if c.config.Receipts && told < m.position {
			c.reportTo(found, ReceiptMissing, m, noClient, func() string { return "acknowledged, its sender was not told" })
		}
	case m.position <= told && m.flags&early == 0:
		c.reportTo(found, ReceiptEarly, m, noClient, func() string { return "covered by a receipt, but no device has it" })
	}
}

// judgeOrder looks at each conversation by itself. Messages are sorted by 32 bits of a hash of the conversation, which
// costs 8 B each; conversations with equal bits are told apart within a run.
func (c *Checker) judgeOrder(found *findings) {
	keys := make([]uint64, 0, c.messages.n)
	for n := range uint32(c.messages.n) {
		if m := c.messages.at(n); m.position != 0 {
			keys = append(keys, mix(c.conversation(m))&^0xffffffff|uint64(n))
		}
	}
	slices.Sort(keys)
	for len(keys) > 0 {
		end := 1
		for end < len(keys) && keys[end]>>32 == keys[0]>>32 {
			end++
		}
		c.judgePositions(found, keys[:end])
		c.judgeStreams(found, keys[:end])
		keys = keys[end:]
	}
}

// conversation is the pair of users, whoever sends.
func (c *Checker) conversation(m *message) uint64 {
	a, b := c.sender(m), m.receiver
	return uint64(min(a, b))<<32 | uint64(max(a, b))
}

// judgePositions finds two messages at one position.
func (c *Checker) judgePositions(found *findings, run []uint64) {
	slices.SortFunc(run, func(x, y uint64) int {
		a, b := c.messages.at(uint32(x)), c.messages.at(uint32(y))
		return cmp.Or(cmp.Compare(a.position, b.position), cmp.Compare(c.conversation(a), c.conversation(b)), cmp.Compare(a.stream, b.stream), cmp.Compare(a.seq, b.seq))
	})
	for i := 1; i < len(run); i++ {
		a, b := c.messages.at(uint32(run[i-1])), c.messages.at(uint32(run[i]))
		if a.position == b.position && c.conversation(a) == c.conversation(b) {
			c.reportTo(found, SharedPosition, b, noClient, func() string { return "also the position of " + c.describe(a) })
		}
	}
}

// judgeStreams finds positions that fall while the numbers of a stream rise. If any two messages are in the wrong order, two
// neighbours are.
func (c *Checker) judgeStreams(found *findings, run []uint64) {
	slices.SortFunc(run, func(x, y uint64) int {
		a, b := c.messages.at(uint32(x)), c.messages.at(uint32(y))
		return cmp.Or(cmp.Compare(a.stream, b.stream), cmp.Compare(a.receiver, b.receiver), cmp.Compare(a.seq, b.seq))
	})
	for i := 1; i < len(run); i++ {
		a, b := c.messages.at(uint32(run[i-1])), c.messages.at(uint32(run[i]))
		if a.stream == b.stream && a.receiver == b.receiver && a.position > b.position {
			c.reportTo(found, Disordered, b, noClient, func() string { return "before " + c.describe(a) })
		}
	}
}
