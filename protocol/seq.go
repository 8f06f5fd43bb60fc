package protocol

// A client sequence number (client_seq, on the wire message_id_by_client) has 48 bits: which
// connection of the stream drew it (28 bits of block) and its place there (20 bits of send).
//
//	 47            20 19           0
//	+----------------+--------------+
//	|     block      |     send     |   send 0 is never used: the first number of block 0 is 1
//	+----------------+--------------+
const (
	SendBits = 20
	SeqBits  = 48
	MaxSend  = 1<<SendBits - 1
	MaxBlock = 1<<(SeqBits-SendBits) - 1
	MaxSeq   = 1<<SeqBits - 1
)

// FirstSeq is the first number of a block, what connected carries as next_message_id_by_client.
func FirstSeq(block uint32) uint64 { return uint64(block)<<SendBits | 1 }

// SeqBlock is the block that a number was drawn from.
func SeqBlock(seq uint64) uint32 { return uint32(seq >> SendBits) }

// SeqSend is the place of a number in its block.
func SeqSend(seq uint64) uint32 { return uint32(seq & MaxSend) }

// ValidSeq reports whether seq can be a client sequence number at all.
func ValidSeq(seq uint64) bool { return seq <= MaxSeq && SeqSend(seq) != 0 }

// A position orders a conversation. It has 53 bits, so that a JSON number carries it exactly: 42 of
// milliseconds since 1970 and 11 that tell the messages of one millisecond apart.
const (
	PositionBits  = 53
	PositionShift = 11
	MaxPosition   = 1<<PositionBits - 1
)

// NextPosition is the position of the next record of a partition: it never falls behind the clock that
// stamped the record and never repeats.
func NextPosition(last uint64, acceptedMs int64) uint64 {
	return max(last+1, uint64(acceptedMs)<<PositionShift)
}

// PositionMillis is the timestamp that a position carries, in milliseconds since 1970.
func PositionMillis(position uint64) int64 { return int64(position >> PositionShift) }
