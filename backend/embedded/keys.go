package embedded

import (
	"encoding/binary"

	"millrace/backend"
	"millrace/protocol"
)

// The first byte of a key names its range; see the table in doc.go.
const (
	rangeMeta        = 'M'
	rangeCounts      = 'c'
	rangeDevices     = 'd'
	rangeFull        = 'f'
	rangeLog         = 'l'
	rangeMailbox     = 'm'
	rangeOutstanding = 'o'
	rangeDamaged     = 'q'
	rangeReceipts    = 'r'
	rangeStreams     = 's'
	rangeWindows     = 'w'
)

const logKeyBytes = 1 + 8

var (
	keyIdentity = []byte{rangeMeta, 'i'}
	keyState    = []byte{rangeMeta, 's'}
	keyAgeClock = []byte{rangeMeta, 'a'}
	// keyFullLimit is the row limit that the rows of full mailboxes go by.
	keyFullLimit = []byte{rangeMeta, 'f'}
)

// The functions below append a key to dst, which the caller reuses: Pebble copies keys.

func appendLogKey(dst []byte, position uint64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, rangeLog), position)
}

func logKeyPosition(key []byte) (position uint64, ok bool) {
	if len(key) != logKeyBytes || key[0] != rangeLog {
		return 0, false
	}
	return binary.BigEndian.Uint64(key[1:]), true
}

func appendConversation(dst []byte, conversation string) []byte {
	return append(binary.AppendUvarint(dst, uint64(len(conversation))), conversation...)
}

// appendName appends an id and the zero byte that ends it.
func appendName(dst []byte, name string) []byte { return append(append(dst, name...), 0) }

func appendWindowKey(dst []byte, k *backend.WindowKey) []byte {
	dst = appendConversation(append(dst, rangeWindows), k.Conversation)
	return appendStream(dst, &k.Stream)
}

func appendStreamKey(dst []byte, s *backend.Stream) []byte {
	return appendStream(append(dst, rangeStreams), s)
}

func appendStream(dst []byte, s *backend.Stream) []byte {
	dst = appendName(appendName(dst, s.User), s.Device)
	return binary.BigEndian.AppendUint64(dst, s.Epoch)
}

func appendDevicesKey(dst []byte, user string) []byte {
	return append(append(dst, rangeDevices), user...)
}

func appendMailboxPrefix(dst []byte, user, device string) []byte {
	return appendName(appendName(append(dst, rangeMailbox), user), device)
}

func appendMailboxKey(dst []byte, user, device string, position uint64, id *protocol.MessageID) []byte {
	dst = binary.BigEndian.AppendUint64(appendMailboxPrefix(dst, user, device), position)
	return append(dst, id[:]...)
}

// mailboxPlaceBytes ends a mailbox key: position and id.
const mailboxPlaceBytes = 8 + 16

// mailboxName is the part of a key that names one mailbox, in counts and full.
func appendMailboxName(dst []byte, prefix byte, user, device string) []byte {
	return append(appendName(append(dst, prefix), user), device...)
}

func appendOutstandingPrefix(dst []byte, conversation, addressee string) []byte {
	return appendName(appendConversation(append(dst, rangeOutstanding), conversation), addressee)
}

func appendOutstandingKey(dst []byte, conversation, addressee string, position uint64) []byte {
	return binary.BigEndian.AppendUint64(appendOutstandingPrefix(dst, conversation, addressee), position)
}

func appendReceiptsPrefix(dst []byte, sender string) []byte {
	return appendName(append(dst, rangeReceipts), sender)
}

func appendReceiptKey(dst []byte, k *backend.ReceiptKey) []byte {
	dst = appendName(appendReceiptsPrefix(dst, k.Sender), k.Addressee)
	return append(dst, k.Conversation...)
}

// appendAfter appends the first key that follows every key with this prefix. The last byte of a prefix
// here is never 0xff: it is a range or the end of a name.
func appendAfter(dst, prefix []byte) []byte {
	dst = append(dst, prefix...)
	dst[len(dst)-1]++
	return dst
}
