package edge

import "encoding/binary"

// Connections and names live in slabs that belong to one loop: no heap object and no allocation per connection, and nothing in
// the names for the garbage collector to look at. Slabs do not shrink; what is free is used again, last freed first.

const (
	slotBits  = 24
	slotChunk = 256 // slots: 30 KiB
	maxSlots  = 1 << slotBits
)

// A handle names one connection of this edge for as long as the process lives:
//
//	 63     56 55        32 31         0
//	+---------+------------+------------+
//	|  loop   |    slot    |   serial   |   serial counts the connections of the slot, from 1
//	+---------+------------+------------+
//
// A slot whose serials are used up is not used again.
func handle(loop uint8, slot, serial uint32) uint64 {
	return uint64(loop)<<56 | uint64(slot)<<32 | uint64(serial)
}

func handleLoop(h uint64) uint8 { return uint8(h >> 56) }

// slab holds the connections of a loop. Pointers into it stay valid.
type slab struct {
	chunks []*[slotChunk]conn
	free   uint32 // 1 + the slot freed last, 0: none; the next one is in its nextFree
	size   uint32 // slots ever used
}

// take returns a zero connection with its slot and a serial never used before, or nil when there are 2²⁴.
func (s *slab) take() *conn {
	var c *conn
	switch {
	case s.free != 0:
		c = s.at(s.free - 1)
		s.free = c.nextFree
	case s.size == maxSlots:
		return nil
	default:
		if s.size%slotChunk == 0 {
			s.chunks = append(s.chunks, new([slotChunk]conn))
		}
		c = s.at(s.size)
		c.slot = s.size
		s.size++
	}
	c.nextFree = 0
	c.serial++
	return c
}

func (s *slab) at(slot uint32) *conn { return &s.chunks[slot/slotChunk][slot%slotChunk] }

// find returns the connection that h names if it still exists.
func (s *slab) find(h uint64) *conn {
	slot := uint32(h >> 32 & (maxSlots - 1))
	if slot >= s.size {
		return nil
	}
	if c := s.at(slot); c.state != stateFree && c.serial == uint32(h) {
		return c
	}
	return nil
}

// put frees a connection. What it pointed to must have been released.
func (s *slab) put(c *conn) {
	*c = conn{slot: c.slot, serial: c.serial}
	if c.serial == ^uint32(0) {
		return
	}
	c.nextFree = s.free
	s.free = c.slot + 1
}

// nameStep is the granularity of name blocks: user and device together take up to 96 bytes.
const (
	nameStep    = 16
	nameClasses = (64 + 32) / nameStep
	nameChunk   = 256 // blocks
)

// nameRef is where a connection's user and device are. The zero value is no name.
type nameRef struct {
	block  uint32
	user   uint8 // bytes
	device uint8 // bytes
}

func (r nameRef) size() int { return int(r.user) + int(r.device) }

func (r nameRef) class() int { return (r.size() - 1) / nameStep }

// nameArena keeps user and device side by side in blocks of the next multiple of 16 bytes.
type nameArena [nameClasses]nameBlocks

type nameBlocks struct {
	chunks [][]byte
	free   uint32 // 1 + the block freed last; the next one is in its first four bytes
	size   uint32
}

// add copies a name into the arena.
func (a *nameArena) add(user string, device []byte) nameRef {
	r := nameRef{user: uint8(len(user)), device: uint8(len(device))}
	class := &a[r.class()]
	width := uint32(r.class()+1) * nameStep
	if class.free != 0 {
		r.block = class.free - 1
		class.free = binary.NativeEndian.Uint32(class.at(r.block, width))
	} else {
		if class.size%nameChunk == 0 {
			class.chunks = append(class.chunks, make([]byte, nameChunk*width))
		}
		r.block = class.size
		class.size++
	}
	b := class.at(r.block, width)
	copy(b, user)
	copy(b[len(user):], device)
	return r
}

func (b *nameBlocks) at(block, width uint32) []byte {
	chunk := b.chunks[block/nameChunk]
	return chunk[block%nameChunk*width:][:width:width]
}

// get returns the names. They are valid until remove.
func (a *nameArena) get(r nameRef) (user, device []byte) {
	if r.size() == 0 {
		return nil, nil
	}
	b := a[r.class()].at(r.block, uint32(r.class()+1)*nameStep)
	user, device = b[:r.user:r.user], b[r.user:r.size():r.size()]
	return user, device
}

// remove frees a name.
func (a *nameArena) remove(r nameRef) {
	if r.size() == 0 {
		return
	}
	class := &a[r.class()]
	binary.NativeEndian.PutUint32(class.at(r.block, uint32(r.class()+1)*nameStep), class.free)
	class.free = r.block + 1
}
