package checker

import "encoding/binary"

// message is what is known of one message: 48 bytes without pointers.
type message struct {
	id       [16]byte // if identified
	position uint64   // 0: not known
	seq      uint64
	stream   StreamID
	receiver int32 // a user

	// Bitmaps of the receiver's devices.
	due   uint8 // were there when it was first sent
	shown uint8
	acked uint8

	flags uint8
}

const (
	identified = 1 << iota // id is known
	answered
	refused // for good
	early   // a receipt was found early
)

// messages keeps messages in the order of their first sends, in chunks that never move.
type messages struct {
	chunks []*[chunkMessages]message
	n      int
}

const chunkMessages = 1 << 12

func (s *messages) add(m message) uint32 {
	if s.n%chunkMessages == 0 {
		s.chunks = append(s.chunks, new([chunkMessages]message))
	}
	n := uint32(s.n)
	s.n++
	*s.at(n) = m
	return n
}

// at is valid for as long as the checker lives.
func (s *messages) at(n uint32) *message {
	return &s.chunks[n/chunkMessages][n%chunkMessages]
}

func (c *Checker) lookupSeq(from StreamID, seq uint64) (uint32, bool) {
	return c.bySeq.find(seqHash(from, seq), func(n uint32) bool {
		m := c.messages.at(n)
		return m.seq == seq && m.stream == from
	})
}

func (c *Checker) lookupID(id [16]byte) (uint32, bool) {
	return c.byID.find(idHash(id), func(n uint32) bool { return c.messages.at(n).id == id })
}

func (c *Checker) seqHashOf(n uint32) uint64 {
	m := c.messages.at(n)
	return seqHash(m.stream, m.seq)
}

func (c *Checker) idHashOf(n uint32) uint64 { return idHash(c.messages.at(n).id) }

func seqHash(from StreamID, seq uint64) uint64 { return mix(seq + mix(uint64(from))) }

func idHash(id [16]byte) uint64 {
	return mix(binary.LittleEndian.Uint64(id[:8]) + mix(binary.LittleEndian.Uint64(id[8:])))
}

// mix is the finalizer of splitmix64: every input bit changes half of the output bits.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
