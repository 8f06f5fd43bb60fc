package router

import "slices"

// arena holds a shard's records in chunks without pointers. The space of a removed record is used again by one
// of the same length; when more is free than used, the shard moves what is left to a new arena.
type arena struct {
	chunks [][]byte // each chunkBytes long, but a lone one grows up to that
	fill   int      // bytes used of the last chunk

	free    [maxRecordBytes - minRecordBytes + 1]uint32 // by length: the first free record, 0 for none
	live    int                                         // bytes in records
	garbage int                                         // bytes in free records
}

const (
	// chunkBits: a shard wastes half a chunk on average, 4 KiB × 256 / 2 = 512 KiB in all. Smaller ones would
	// waste more at their ends (19 B) and on slice headers (24 B, up to twice that).
	chunkBits  = 12
	chunkBytes = 1 << chunkBits

	// firstChunkBytes is where the lone chunk starts, so that a small table is small: 40 KiB in all. It grows by
	// a quarter: copying a byte five times in all costs nothing beside what growing twofold would waste.
	firstChunkBytes = maxRecordBytes + 1

	// minGarbageBytes is not worth moving records for: at most 256 KiB in all.
	minGarbageBytes = 1 << 10

	// maxChunks is what a 32-bit offset reaches: 4 GiB a shard, 1 TiB in all.
	maxChunks = 1 << (32 - chunkBits)
)

// at is the record at an offset, and whatever follows it in its chunk. It is valid until the next alloc.
func (a *arena) at(off uint32) record {
	return record(a.chunks[off>>chunkBits][off&(chunkBytes-1):])
}

// alloc returns the offset, never 0, of n zeroed bytes.
func (a *arena) alloc(n int) uint32 {
	a.live += n
	if off := a.free[n-minRecordBytes]; off != 0 {
		r := a.at(off)
		a.free[n-minRecordBytes] = r.nextFree()
		a.garbage -= n
		clear(r[:n])
		return off
	}
	if len(a.chunks) == 0 || a.fill+n > len(a.chunks[len(a.chunks)-1]) {
		a.grow(n)
	}
	last := len(a.chunks) - 1
	off := uint32(last<<chunkBits | a.fill)
	a.fill += n
	return off
}

// grow makes room for a record of n bytes.
func (a *arena) grow(n int) {
	switch {
	case len(a.chunks) == 0:
		a.chunks = append(a.chunks, lone(firstChunkBytes))
		a.fill = 1 // offset 0 means none
	case len(a.chunks) == 1 && a.fill+n <= chunkBytes && len(a.chunks[0]) < chunkBytes:
		bigger := lone(a.fill + max(n, a.fill/4))
		copy(bigger, a.chunks[0])
		a.chunks[0] = bigger
	case len(a.chunks) == maxChunks:
		panic("router: a shard of the route table exceeds 4 GiB")
	default:
		a.chunks = append(a.chunks, make([]byte, chunkBytes))
		a.fill = 0
	}
}

// lone makes a chunk of at least n bytes: all that the allocator gives for them.
func lone(n int) []byte {
	b := slices.Grow([]byte(nil), n) // zeroed to its capacity
	return b[:min(cap(b), chunkBytes)]
}

// release gives the n bytes of a record back.
func (a *arena) release(off uint32, n int) {
	a.at(off).setNextFree(a.free[n-minRecordBytes])
	a.free[n-minRecordBytes] = off
	a.live -= n
	a.garbage += n
}

// wasteful reports that the records should move to a new arena.
func (a *arena) wasteful() bool { return a.garbage > a.live && a.garbage >= minGarbageBytes }

func (a *arena) bytes() int {
	n := 24 * cap(a.chunks)
	for _, c := range a.chunks {
		n += cap(c)
	}
	return n
}
