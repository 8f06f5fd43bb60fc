package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"millrace/backend"
	"millrace/protocol"
)

// A record, in the log and in a mailbox (the key holds the position):
//
//	+---------+--------+--------+----------+---------+--------+-----------+-------------+---------+
//	| version | sender | receiver | device | id (16) | epoch  | seq (6)   | accepted    | content |
//	|   (1)   | 1 + n  |  1 + n   | 1 + n  |         |  (8)   |           | ms (6)      |  rest   |
//	+---------+--------+----------+--------+---------+--------+-----------+-------------+---------+
//
// The names stand first, so that a scan finds the shard of a record without decoding the rest.
const (
	rowVersion       = 1
	recordFixedBytes = 1 + 3 + 16 + 8 + 6 + 6
)

// errRow says that a stored value is not what this version writes: the disk or another program changed it.
var errRow = errors.New("row does not decode")

func recordSize(r *backend.Record) int {
	return recordFixedBytes + len(r.Sender) + len(r.Receiver) + len(r.Device) + len(r.Content)
}

// storable reports whether r fits the row format; the edge's own limits are far below.
func storable(r *backend.Record) bool {
	return len(r.Sender) <= protocol.MaxUserBytes && len(r.Receiver) <= protocol.MaxUserBytes &&
		len(r.Device) <= protocol.MaxDeviceBytes && len(r.Content) <= protocol.MaxContentBytes && r.Seq <= protocol.MaxSeq
}

func appendRecord(dst []byte, r *backend.Record) []byte {
	dst = append(dst, rowVersion)
	dst = appendShort(dst, r.Sender)
	dst = appendShort(dst, r.Receiver)
	dst = appendShort(dst, r.Device)
	dst = append(dst, r.ID[:]...)
	dst = binary.BigEndian.AppendUint64(dst, r.Epoch)
	dst = appendUint48(dst, r.Seq)
	dst = appendUint48(dst, uint64(r.AcceptedMs))
	return append(dst, r.Content...)
}

// decodeRecord makes a Record of its own: nothing in it points into value.
func decodeRecord(value []byte, position uint64) (*backend.Record, error) {
	d := decoder{rest: value}
	d.version()
	sender, receiver, device := d.short(), d.short(), d.short()
	r := &backend.Record{}
	copy(r.ID[:], d.take(len(r.ID)))
	r.Epoch = d.uint64()
	r.Seq = d.uint48()
	r.AcceptedMs = int64(d.uint48())
	if d.failed {
		return nil, fmt.Errorf("record at position %d: %w", position, errRow)
	}
	names := string(value[:3+1+len(sender)+len(receiver)+len(device)]) // one allocation for three names
	at := 2
	r.Sender = names[at : at+len(sender)]
	at += len(sender) + 1
	r.Receiver = names[at : at+len(receiver)]
	at += len(receiver) + 1
	r.Device = names[at : at+len(device)]
	r.Content = append([]byte(nil), d.rest...)
	r.Position = position
	r.Conversation = protocol.ConversationHash(r.Sender, r.Receiver)
	return r, nil
}

// recordRest is what follows the names but for the content: id, epoch, seq, accepted.
const recordRest = 16 + 8 + 6 + 6

// recordConversation is the conversation hash of a stored record, ok if decodeRecord takes it too.
func recordConversation(value []byte) (hash uint64, ok bool) {
	d := decoder{rest: value}
	d.version()
	sender, receiver := d.short(), d.short()
	d.short()
	d.take(recordRest)
	return protocol.ConversationHash(sender, receiver), !d.failed
}

// recordID is the id of a stored record, ok if decodeRecord takes it too.
func recordID(value []byte) (id protocol.MessageID, ok bool) {
	d := decoder{rest: value}
	d.version()
	d.short()
	d.short()
	d.short()
	copy(id[:], d.take(recordRest))
	return id, !d.failed
}

// A window: version (1), day of last use (2), then 16 bytes for each used block, the newest first.
const windowBlockBytes = 4 + 4 + 8

type windowRow struct {
	backend.Window
	day uint16
}

func appendWindow(dst []byte, w *windowRow) []byte {
	dst = binary.BigEndian.AppendUint16(append(dst, rowVersion), w.day)
	for _, b := range w.Blocks {
		if b.Highest == 0 {
			break
		}
		dst = binary.BigEndian.AppendUint32(dst, b.Block)
		dst = binary.BigEndian.AppendUint32(dst, b.Highest)
		dst = binary.BigEndian.AppendUint64(dst, b.Bits)
	}
	return dst
}

func decodeWindow(value []byte) (w windowRow, err error) {
	d := decoder{rest: value}
	d.version()
	w.day = d.uint16()
	n := len(d.rest) / windowBlockBytes
	if n > len(w.Blocks) || len(d.rest) != n*windowBlockBytes {
		d.failed = true
		n = 0
	}
	for i := range n {
		w.Blocks[i] = backend.BlockWindow{Block: d.uint32(), Highest: d.uint32(), Bits: d.uint64()}
	}
	return w, d.err("window")
}

// A mark: position (8); unless that is 0: id (16), epoch (8), seq (6), device (1 + n).
func appendMark(dst []byte, m *backend.Mark) []byte {
	dst = binary.BigEndian.AppendUint64(dst, m.Position)
	if m.Position == 0 {
		return dst
	}
	dst = append(dst, m.ID[:]...)
	dst = binary.BigEndian.AppendUint64(dst, m.Epoch)
	dst = appendUint48(dst, m.Seq)
	return appendShort(dst, m.Device)
}

func (d *decoder) mark() (m backend.Mark) {
	if m.Position = d.uint64(); m.Position == 0 {
		return m
	}
	copy(m.ID[:], d.take(len(m.ID)))
	m.Epoch = d.uint64()
	m.Seq = d.uint48()
	m.Device = string(d.short())
	return m
}

func appendOutstanding(dst []byte, m *backend.Mark) []byte {
	return appendMark(append(dst, rowVersion), m)
}

func decodeOutstanding(value []byte) (backend.Mark, error) {
	d := decoder{rest: value}
	d.version()
	m := d.mark()
	return m, d.end("outstanding row")
}

// A receipt: version (1), delivered mark, top mark, time of change in ms (6).
func appendReceipt(dst []byte, r *backend.ReceiptRow) []byte {
	dst = appendMark(append(dst, rowVersion), &r.Delivered)
	dst = appendMark(dst, &r.Top)
	return appendUint48(dst, uint64(max(r.ChangedMs, 0)))
}

// decodeReceipt leaves the key fields empty.
func decodeReceipt(value []byte) (r backend.ReceiptRow, err error) {
	d := decoder{rest: value}
	d.version()
	r.Delivered, r.Top = d.mark(), d.mark()
	r.ChangedMs = int64(d.uint48())
	return r, d.end("receipt")
}

// The devices of a user: version (1), then for each: heir (1), name (1 + n).
func appendDevices(dst []byte, devices []backend.Device) []byte {
	dst = append(dst, rowVersion)
	for _, dev := range devices {
		heir := byte(0)
		if dev.Heir {
			heir = 1
		}
		dst = appendShort(append(dst, heir), dev.Name)
	}
	return dst
}

func decodeDevices(value []byte) (devices []backend.Device, err error) {
	d := decoder{rest: value}
	d.version()
	devices = make([]backend.Device, 0, 2)
	for len(d.rest) > 0 && !d.failed {
		heir := d.take(1)
		name := d.short()
		devices = append(devices, backend.Device{Name: string(name), Heir: len(heir) == 1 && heir[0] != 0})
	}
	return devices, d.err("devices")
}

// A stream: version (1), next block (4), day of last use (2).
type streamRow struct {
	next uint32
	day  uint16
}

func appendStreamRow(dst []byte, r streamRow) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, rowVersion), r.next)
	return binary.BigEndian.AppendUint16(dst, r.day)
}

func decodeStreamRow(value []byte) (r streamRow, err error) {
	d := decoder{rest: value}
	d.version()
	r.next = d.uint32()
	r.day = d.uint16()
	return r, d.end("stream")
}

// A count: version (1), rows (4), low (8), removed (2).
type countRow struct {
	rows    uint32
	low     uint64 // no row of the mailbox lies below
	removed uint16 // rows deleted since low was last found
}

func appendCount(dst []byte, c countRow) []byte {
	dst = binary.BigEndian.AppendUint32(append(dst, rowVersion), c.rows)
	dst = binary.BigEndian.AppendUint64(dst, c.low)
	return binary.BigEndian.AppendUint16(dst, c.removed)
}

// decodeCount also takes the rows of format 1, which end with the number of rows.
func decodeCount(value []byte) (c countRow, err error) {
	d := decoder{rest: value}
	d.version()
	c.rows = d.uint32()
	if len(d.rest) > 0 {
		c.low, c.removed = d.uint64(), d.uint16()
	}
	return c, d.end("mailbox count")
}

// state is what a restart must know of the whole and cannot find in the rows: they are deleted in time. Stored as
// version (1), last position (8), mailbox rows (8), last receipt in ms (6), which the first states of format 1 lack.
type state struct {
	last        uint64 // the last position given, ever
	mailboxRows uint64 // in all mailboxes
	receiptMs   int64  // the latest ChangedMs of a receipt, ever
}

func appendState(dst []byte, s *state) []byte {
	dst = binary.BigEndian.AppendUint64(append(dst, rowVersion), s.last)
	dst = binary.BigEndian.AppendUint64(dst, s.mailboxRows)
	return appendUint48(dst, uint64(max(s.receiptMs, 0)))
}

func decodeState(value []byte) (s state, err error) {
	d := decoder{rest: value}
	d.version()
	s.last, s.mailboxRows = d.uint64(), d.uint64()
	if len(d.rest) > 0 {
		s.receiptMs = int64(d.uint48())
	}
	return s, d.end("state")
}

const dayMs = 24 * 60 * 60 * 1000

// day counts days since 1970 in 16 bits: enough until 2149, and to expire rows by.
func day(ms int64) uint16 { return uint16(min(max(ms/dayMs, 0), math.MaxUint16)) }

func appendShort(dst []byte, s string) []byte { return append(append(dst, byte(len(s))), s...) }

func appendUint48(dst []byte, v uint64) []byte {
	return append(dst, byte(v>>40), byte(v>>32), byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

// decoder takes a value apart. After the first failure it returns zero values; the caller asks once.
type decoder struct {
	rest   []byte
	failed bool
}

func (d *decoder) take(n int) []byte {
	if len(d.rest) < n {
		d.failed = true
		d.rest = nil
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) version() {
	if b := d.take(1); len(b) == 1 && b[0] != rowVersion {
		d.failed = true
	}
}

func (d *decoder) short() []byte {
	b := d.take(1)
	if len(b) == 0 {
		return nil
	}
	return d.take(int(b[0]))
}

func (d *decoder) uint16() uint16 {
	if b := d.take(2); len(b) == 2 {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) uint32() uint32 {
	if b := d.take(4); len(b) == 4 {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) uint64() uint64 {
	if b := d.take(8); len(b) == 8 {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) uint48() uint64 {
	if b := d.take(6); len(b) == 6 {
		return uint64(b[0])<<40 | uint64(b[1])<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
	}
	return 0
}

func (d *decoder) err(what string) error {
	if d.failed {
		return fmt.Errorf("%s: %w", what, errRow)
	}
	return nil
}

// end is err for a row that has no open end: nothing may follow.
func (d *decoder) end(what string) error {
	if len(d.rest) != 0 {
		d.failed = true
	}
	return d.err(what)
}
