package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

// A row that does not decode must not stop what has nothing to do with it. Whoever reads one goes on with what stands in for it
// and reports the key; the committer sets the row aside (see the key ranges in doc.go), where it waits for a person, and puts the
// substitute in its place. (A block whose checksum is wrong is another thing: Pebble reads none of it, and the store fails.)
//
//	log          nothing: the message is lost, which is counted
//	mailbox      nothing: so is the message, for that device
//	windows      what else shows to be finished, see rebuildWindow
//	streams      a next block that no login has drawn, see mendStream
//	devices      the devices of the user's streams, the first of them heir
//	outstanding  the position, which is in the key: receipts do not pass it
//	receipts     nothing delivered: a receipt says too little until the next acknowledgement
//	counts       the rows, counted

// maxSuspects limits the reported rows that wait for the committer. Who meets one beyond that again reports it again.
const maxSuspects = 1024

var damageRanges = [...]struct {
	prefix byte
	name   string
}{
	{rangeLog, "log"}, {rangeMailbox, "mailbox"}, {rangeWindows, "windows"}, {rangeStreams, "streams"}, {rangeDevices, "devices"},
	{rangeOutstanding, "outstanding"}, {rangeReceipts, "receipts"}, {rangeCounts, "counts"}, {rangeFull, "full"},
}

// suspect reports a row that does not decode. It copies the key.
func (d *DB) suspect(key []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := &d.pending
	if p.failed == nil && !p.stopped && len(p.suspects) < maxSuspects {
		p.suspects = append(p.suspects, bytes.Clone(key))
		d.wakeLocked()
	}
}

// countDamage reports what b has set aside, once that is durable, and what it has missed.
func (d *DB) countDamage(b *batch) {
	if b.gone > 0 {
		d.count.gone.Add(b.gone)
		d.log.Error("messages on their way to a mailbox are not in the log: they are lost", "messages", b.gone)
	}
	for _, key := range b.aside {
		for i, r := range damageRanges {
			if r.prefix != key[0] {
				continue
			}
			d.count.damaged[i].Add(1)
			d.log.Error("a stored row is damaged: it is set aside", "range", r.name, "key", fmt.Sprintf("%q", key))
		}
		if key[0] == rangeMailbox {
			d.count.gone.Add(1)
		}
	}
}

// setAside keeps a damaged row.
func (b *batch) setAside(key, value []byte) error {
	if slices.ContainsFunc(b.aside, func(k []byte) bool { return bytes.Equal(k, key) }) {
		return nil
	}
	b.aside = append(b.aside, bytes.Clone(key))
	return b.kv.Set(append([]byte{rangeDamaged}, key...), value, nil)
}

// mend sets a row aside that was reported, if it is damaged: it may have been mended since. It comes before the commits of the
// batch, so that what they say about the row holds.
func (s *builder) mend(d *DB, b *batch, key []byte) (err error) {
	switch key[0] {
	case rangeWindows:
		if k, ok := parseWindowKey(key); ok {
			return s.putWindow(d, b, &backend.WindowRow{WindowKey: k})
		}
	case rangeStreams:
		if _, ok := parseStream(key[1:]); ok {
			_, err = row(s, d, b, s.streams, key, streamRows)
			return err
		}
	case rangeDevices:
		_, err = row(s, d, b, s.devices, key, deviceRows)
		return err
	case rangeReceipts:
		_, err = row(s, d, b, s.receipts, key, receiptRows)
		return err
	case rangeCounts:
		if user, device, ok := bytes.Cut(key[1:], []byte{0}); ok {
			_, err = s.countMailbox(d, b, string(user), string(device), 0)
			return err
		}
	}
	value, err := d.get(key)
	if err != nil || value == nil || !damaged(key, value) {
		return err
	}
	if err := b.setAside(key, value); err != nil {
		return err
	}
	switch key[0] {
	case rangeMailbox:
		if k, ok := parseMailboxKey(key); ok {
			return s.deleteMailbox(d, b, &k)
		}
	case rangeOutstanding:
		if position, _, err := cutPosition(key, 0); err == nil {
			return b.kv.Set(key, appendOutstanding(nil, &backend.Mark{Position: position}), nil)
		}
	}
	return b.kv.Delete(key, nil)
}

// damaged says whether a row that stands alone is none of ours.
func damaged(key, value []byte) bool {
	switch key[0] {
	case rangeLog:
		position, ok := logKeyPosition(key)
		_, err := decodeRecord(value, position)
		return !ok || err != nil
	case rangeMailbox:
		_, ok := parseMailboxKey(key)
		_, err := decodeRecord(value, 0)
		return !ok || err != nil
	case rangeOutstanding:
		_, _, keyErr := cutPosition(key, 0)
		_, err := decodeOutstanding(value)
		return keyErr != nil || err != nil
	case rangeFull:
		return bytes.IndexByte(key, 0) < 0
	}
	return true // its key does not parse
}

// parseMailboxKey is the inverse of appendMailboxKey.
func parseMailboxKey(key []byte) (k backend.MailboxKey, ok bool) {
	name := len(key) - mailboxPlaceBytes
	if name < 3 || key[name-1] != 0 {
		return k, false
	}
	user, device, ok := bytes.Cut(key[1:name-1], []byte{0})
	k = backend.MailboxKey{User: string(user), Device: string(device), Position: binary.BigEndian.Uint64(key[name:])}
	copy(k.ID[:], key[name+8:])
	return k, ok
}

// parseWindowKey is the inverse of appendWindowKey.
func parseWindowKey(key []byte) (k backend.WindowKey, ok bool) {
	n, size := binary.Uvarint(key[1:])
	if size <= 0 || n > uint64(len(key)-1-size) {
		return k, false
	}
	k.Conversation = string(key[1+size : 1+size+int(n)])
	k.Stream, ok = parseStream(key[1+size+int(n):])
	return k, ok
}

// parseStream is the inverse of appendStream.
func parseStream(key []byte) (stream backend.Stream, ok bool) {
	user, rest, ok := bytes.Cut(key, []byte{0})
	device, epoch, ended := bytes.Cut(rest, []byte{0})
	if !ok || !ended || len(epoch) != 8 {
		return stream, false
	}
	return backend.Stream{User: string(user), Device: string(device), Epoch: binary.BigEndian.Uint64(epoch)}, true
}

// rebuildWindow finds what is finished of a stream whose window is damaged. "Nothing" would deliver again whatever the stream
// sends again, "everything" would lose what it sends. A message finishes only with all earlier ones of its conversation, so the
// last that is finished decides: an outstanding row is written when its message finishes, and a mark of a receipt is of a message that
// is finished if it lies before the log. What the stream sent after that is delivered again under the same id, by which
// the receiver's filter knows it.
func (d *DB) rebuildWindow(k *backend.WindowKey) (w backend.Window, err error) {
	a, b, ok := bytes.Cut([]byte(k.Conversation), []byte{0})
	if !ok {
		return w, nil
	}
	addressee := string(a)
	if addressee == k.User {
		addressee = string(b)
	}
	receipt, err := d.Receipt(backend.ReceiptKey{Sender: k.User, Conversation: k.Conversation, Addressee: addressee})
	if err != nil {
		return w, err
	}
	begin, err := d.logBegin()
	if err != nil {
		return w, err
	}
	last := uint64(0)
	ours := func(m *backend.Mark) bool {
		return m.Position != 0 && backend.Stream{User: k.User, Device: m.Device, Epoch: m.Epoch} == k.Stream
	}
	for _, m := range []backend.Mark{receipt.Delivered, receipt.Top} {
		if m.Position < begin && ours(&m) {
			last = max(last, m.Seq)
		}
	}
	prefix := appendOutstandingPrefix(nil, k.Conversation, addressee)
	err = d.iterate(prefix, appendAfter(nil, prefix), func(it *pebble.Iterator) error {
		for ok := it.Last(); ok; ok = it.Prev() {
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			if m, err := decodeOutstanding(value); err == nil && ours(&m) {
				last = max(last, m.Seq)
				break
			}
		}
		return nil
	})
	if err != nil {
		return w, err
	}
	if last != 0 {
		w = finishedUntil(last)
	}
	return w, nil
}

// finishedUntil is the window of a stream that has finished seq and everything before it.
func finishedUntil(seq uint64) (w backend.Window) {
	block, send := protocol.SeqBlock(seq), protocol.SeqSend(seq)
	for i := range w.Blocks {
		w.Blocks[i] = backend.BlockWindow{Block: block, Highest: send, Bits: ^uint64(0)}
		if block == 0 {
			break
		}
		block, send = block-1, protocol.MaxSend
	}
	return w
}

// logBegin is the position of the first record in the log, beyond all if there is none. All before it is finished.
func (d *DB) logBegin() (position uint64, err error) {
	position = protocol.MaxPosition + 1
	err = d.scanLog(0, 1<<63, func(first uint64, _ []byte) (bool, error) {
		position = first
		return false, nil
	})
	return position, err
}

// rebuildDevices lists the devices of a user by their streams. Their order of registration is not known.
func (d *DB) rebuildDevices(user string) (devices []backend.Device, err error) {
	prefix := appendName([]byte{rangeStreams}, user)
	err = d.iterate(prefix, appendAfter(nil, prefix), func(it *pebble.Iterator) error {
		for ok := it.First(); ok && len(devices) < protocol.MaxDevicesPerUser; {
			name, _, ended := bytes.Cut(it.Key()[len(prefix):], []byte{0})
			if !ended {
				ok = it.Next()
				continue
			}
			devices = append(devices, backend.Device{Name: string(name), Heir: len(devices) == 0})
			ok = it.SeekGE(appendAfter(nil, it.Key()[:len(prefix)+len(name)+1]))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find the devices of a user: %w", err)
	}
	return devices, nil
}

func (s *builder) mendWindow(d *DB, key []byte) (w windowRow, err error) {
	k, _ := parseWindowKey(key)
	w.Window, err = d.rebuildWindow(&k)
	return w, err // without a day: its use dates it, and its stream
}

// mendStream makes a next block that is above every one drawn before: one a login, and no installation has logged in every
// minute since 1970. That leaves 240 million.
func (s *builder) mendStream(d *DB, _ []byte) (streamRow, error) {
	return streamRow{next: uint32(max(d.nowMs(), protocol.PositionMillis(s.last)) / 60_000), day: s.day}, nil
}

func (s *builder) mendDevices(d *DB, key []byte) (u userDevices, err error) {
	u.list, err = d.rebuildDevices(string(key[1:]))
	u.changed = true
	return u, err
}

func (s *builder) mendReceipt(*DB, []byte) (r backend.ReceiptRow, err error) { return r, nil }

// mendCount counts the rows of a mailbox as they were before this batch.
func (s *builder) mendCount(d *DB, key []byte) (c mailboxCount, err error) {
	prefix := append(append([]byte{rangeMailbox}, key[1:]...), 0)
	err = d.scan(prefix, appendAfter(nil, prefix), func(key, _ []byte) (bool, error) {
		if len(key) != len(prefix)+mailboxPlaceBytes {
			return true, nil
		}
		if c.before++; c.before == 1 {
			c.low = binary.BigEndian.Uint64(key[len(prefix):])
		}
		return true, nil
	})
	c.now, c.changed = c.before, true
	return c, err
}

// isDamage reports whether err is about a row, not about the disk.
func isDamage(err error) bool { return errors.Is(err, errRow) }
