package router

// index finds records by hash: open addressing with linear probing in two parallel arrays without
// pointers. A probe reads tags, 64 to a cache line, and touches a record only when 8 bits of the hash agree.
//
// All routes of a user are on the probe sequence of the user's hash, so there are no chains. A sequence
// ends at an empty slot; there always is one, because at most 13/16 of the slots are in use.
type index struct {
	tags []uint8
	refs []uint32 // offset of the record in the arena; meaningless unless the tag is ≥ tagFirst
	live int
	dead int // slots with tagDead
}

const (
	tagEmpty = 0 // ends a probe sequence
	tagDead  = 1 // was removed; the sequence goes on
	tagFirst = 2 // this and above: bits of the hash
)

func newIndex(slots int) index {
	return index{tags: make([]uint8, slots), refs: make([]uint32, slots)}
}

// slotsFor makes room for n routes at a load of 2/3, and with it 22 % more before the next time: the
// arrays are copied 4.6 times per insertion, and waste at most a third.
func slotsFor(n int) int { return max(8, n*3/2+1) }

// full reports that one more route might leave too few empty slots.
func (x *index) full() bool { return (x.live+x.dead+1)*16 > len(x.tags)*13 }

// home is where the probe sequence of h starts: the low 32 bits, scaled, so that any number of
// slots will do.
func (x *index) home(h uint64) int { return int(uint64(uint32(h)) * uint64(len(x.tags)) >> 32) }

func (x *index) after(i int) int {
	if i++; i < len(x.tags) {
		return i
	}
	return 0
}

func (x *index) before(i int) int {
	if i > 0 {
		return i - 1
	}
	return len(x.tags) - 1
}

// tagOf takes bits that neither the shard (top 8) nor home (low 32) uses.
func tagOf(h uint64) uint8 { return max(tagFirst, uint8(h>>32)) }

// insert adds a record. The index must not be full.
func (x *index) insert(h uint64, off uint32) {
	i := x.home(h)
	for x.tags[i] >= tagFirst {
		i = x.after(i)
	}
	if x.tags[i] == tagDead {
		x.dead--
	}
	x.tags[i], x.refs[i] = tagOf(h), off
	x.live++
}

// remove frees a slot. Where it would be the last of its run it becomes empty, and so do the dead ones before it.
func (x *index) remove(i int) {
	x.live--
	x.tags[i] = tagDead
	x.dead++
	if x.tags[x.after(i)] != tagEmpty {
		return
	}
	for ; x.tags[i] == tagDead; i = x.before(i) {
		x.tags[i] = tagEmpty
		x.dead--
	}
}

func (x *index) bytes() int { return cap(x.tags) + 4*cap(x.refs) }
