package checker

// index finds messages by hash. A slot is 4 bytes: the number of the message + 1, and 6 bits of the hash, so that a
// probe seldom reads a message in vain. It is split in parts that grow one at a time: with ten
// million messages each holds 39 000, and growing it halts a run for milliseconds.
type index struct {
	parts [indexParts]indexPart
}

type indexPart struct {
	slots []uint32 // 0: empty
	used  int
}

const (
	indexParts       = 256
	indexNumberBits  = 26
	indexNumberMask  = 1<<indexNumberBits - 1
	indexMaxMessages = indexNumberMask - 1
)

func (x *index) part(h uint64) *indexPart { return &x.parts[h>>56] }

// home scales the low 32 bits, so that any number of slots will do.
func (p *indexPart) home(h uint64) int { return int(uint64(uint32(h)) * uint64(len(p.slots)) >> 32) }

func (p *indexPart) after(i int) int {
	if i++; i < len(p.slots) {
		return i
	}
	return 0
}

// slotTag is bits 32–37 of the hash, which neither part nor home uses, in their place in a slot.
func slotTag(h uint64) uint32 { return uint32(h>>32) << indexNumberBits }

// find returns the message with this hash that match accepts.
func (x *index) find(h uint64, match func(n uint32) bool) (uint32, bool) {
	p := x.part(h)
	if p.used == 0 {
		return 0, false
	}
	tag := slotTag(h)
	for i := p.home(h); p.slots[i] != 0; i = p.after(i) {
		if slot := p.slots[i]; slot&^indexNumberMask == tag {
			if n := slot&indexNumberMask - 1; match(n) {
				return n, true
			}
		}
	}
	return 0, false
}

// insert adds a message that is not there; hashOf gives the hash of any other.
func (x *index) insert(h uint64, n uint32, hashOf func(n uint32) uint64) {
	p := x.part(h)
	if (p.used+1)*4 > len(p.slots)*3 {
		old := p.slots
		p.slots = make([]uint32, len(old)*3/2+8)
		for _, slot := range old {
			if slot != 0 {
				p.put(hashOf(slot&indexNumberMask-1), slot)
			}
		}
	}
	p.put(h, slotTag(h)|(n+1))
	p.used++
}

func (p *indexPart) put(h uint64, slot uint32) {
	i := p.home(h)
	for p.slots[i] != 0 {
		i = p.after(i)
	}
	p.slots[i] = slot
}
