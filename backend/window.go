package backend

import "millrace/protocol"

// windowBlocks is how many blocks of a stream a window remembers. A stream that resends everything open
// before it sends anything new has at most one block with open numbers, so an older block holds only finished ones.
const windowBlocks = 4

// windowSpan is protocol.MaxOpenSpan: open numbers lie within it, so a number this far below the
// highest finished one is finished too.
const windowSpan = protocol.MaxOpenSpan

// BlockWindow remembers the finished sends of one block: bit i of Bits is send Highest − i.
type BlockWindow struct {
	Block   uint32
	Highest uint32 // 0: unused, since sends start at 1
	Bits    uint64
}

// Window is the duplicate window of one stream in one conversation: the last four blocks used there, the newest
// first. It answers whether a send is finished, exactly, whatever edge, crash or delay is
// involved, as long as the client keeps the rules of protocol/doc.go. The zero Window is empty.
type Window struct {
	Blocks [windowBlocks]BlockWindow
}

// Finished reports whether the send with this number is finished, so that its record is a duplicate.
func (w *Window) Finished(seq uint64) bool {
	block, send := protocol.SeqBlock(seq), protocol.SeqSend(seq)
	used := 0
	for i := range w.Blocks {
		b := &w.Blocks[i]
		if b.Highest == 0 {
			break
		}
		used++
		if b.Block == block {
			return b.finished(send)
		}
	}
	return used == windowBlocks && block < w.Blocks[windowBlocks-1].Block
}

func (b *BlockWindow) finished(send uint32) bool {
	switch {
	case send > b.Highest:
		return false
	case b.Highest-send >= windowSpan:
		return true
	default:
		return b.Bits>>(b.Highest-send)&1 == 1
	}
}

// Finish records that the send with this number is finished.
func (w *Window) Finish(seq uint64) {
	w.merge(BlockWindow{protocol.SeqBlock(seq), protocol.SeqSend(seq), 1})
}

// Merge adds what o knows: the higher number, the union of bits, the newest blocks. It is commutative,
// associative and idempotent, so that rows written late or twice do no harm.
func (w *Window) Merge(o *Window) {
	for _, b := range o.Blocks {
		if b.Highest != 0 {
			w.merge(b)
		}
	}
}

func (w *Window) merge(n BlockWindow) {
	for i := range w.Blocks {
		b := &w.Blocks[i]
		switch {
		case b.Highest == 0:
			*b = n
			return
		case b.Block == n.Block:
			b.union(n)
			return
		case b.Block < n.Block:
			copy(w.Blocks[i+1:], w.Blocks[i:windowBlocks-1])
			*b = n
			return
		}
	}
	// Older than all four: it would be treated as finished anyway.
}

func (b *BlockWindow) union(n BlockWindow) {
	if n.Highest > b.Highest {
		*b, n = n, *b
	}
	// Bit i of n is send n.Highest − i, which is bit i + (b.Highest − n.Highest) here. What leaves the
	// word is 64 or more below the highest: finished by rule.
	b.Bits |= n.Bits << (b.Highest - n.Highest)
}
