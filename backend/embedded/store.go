package embedded

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

var _ backend.Store = (*DB)(nil)

// Commit takes c into one of the next batches. It never blocks. After Close, or when the store has failed, Done is not called.
func (d *DB) Commit(c *backend.Commit) {
	d.mu.Lock()
	d.pending.addCommit(c)
	d.wakeLocked()
	d.mu.Unlock()
}

// Register takes s into the next batch. done is called from the DB's own goroutine, or inside the call after Close.
func (d *DB) Register(s backend.Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	if len(s.User) > protocol.MaxUserBytes || len(s.Device) > protocol.MaxDeviceBytes {
		done(0, false, protocol.Refusal{Code: protocol.CodeBadRequest})
		return
	}
	d.mu.Lock()
	if d.pending.stopped {
		d.mu.Unlock()
		done(0, false, protocol.Refusal{Code: protocol.CodeShuttingDown, RetryAfterMs: retryClosingMs})
		return
	}
	d.pending.registers = append(d.pending.registers, registration{stream: s, done: done})
	d.wakeLocked()
	d.mu.Unlock()
}

// Devices are the registered devices of a user, in the order in which they registered.
func (d *DB) Devices(user string) (devices []backend.Device, err error) {
	var scratch [128]byte
	key := appendDevicesKey(scratch[:0], user)
	_, err = d.view(key, func(value []byte) (err error) {
		devices, err = decodeDevices(value)
		return err
	})
	if isDamage(err) {
		d.suspect(key)
		devices, err = d.rebuildDevices(user)
	}
	if err != nil {
		return nil, fmt.Errorf("read devices: %w", err)
	}
	return devices, nil
}

// Window is one duplicate window.
func (d *DB) Window(k backend.WindowKey) (w backend.Window, err error) {
	var scratch [320]byte
	key := appendWindowKey(scratch[:0], &k)
	_, err = d.view(key, func(value []byte) error {
		row, err := decodeWindow(value)
		w = row.Window
		return err
	})
	if isDamage(err) {
		d.suspect(key)
		w, err = d.rebuildWindow(&k)
	}
	if err != nil {
		return w, fmt.Errorf("read window: %w", err)
	}
	return w, nil
}

// Receipt is one receipt row.
func (d *DB) Receipt(k backend.ReceiptKey) (row backend.ReceiptRow, err error) {
	var scratch [320]byte
	key := appendReceiptKey(scratch[:0], &k)
	_, err = d.view(key, func(value []byte) (err error) {
		row, err = decodeReceipt(value)
		return err
	})
	if isDamage(err) {
		d.suspect(key)
		row, err = backend.ReceiptRow{}, nil
	}
	if err != nil {
		return row, fmt.Errorf("read receipt: %w", err)
	}
	row.ReceiptKey = k
	return row, nil
}

// FirstOutstanding is the first outstanding row of a pair at a position ≥ from.
func (d *DB) FirstOutstanding(conversation, addressee string, from uint64) (row backend.OutstandingRow, ok bool, err error) {
	var lower, upper [320]byte
	prefix := appendOutstandingPrefix(upper[:0], conversation, addressee)
	low := binary.BigEndian.AppendUint64(append(lower[:0], prefix...), from)
	prefix[len(prefix)-1]++ // the zero that ends addressee: see appendAfter
	err = d.scan(low, prefix, func(key, value []byte) (bool, error) {
		position, _, err := cutPosition(key, 0)
		if err != nil {
			d.suspect(key)
			return true, nil
		}
		if row.Mark, err = decodeOutstanding(value); err != nil {
			d.suspect(key)
			row.Mark = backend.Mark{Position: position}
		}
		ok = true
		return false, nil
	})
	if err != nil {
		return row, false, fmt.Errorf("read outstanding: %w", err)
	}
	row.Conversation, row.Addressee = conversation, addressee
	return row, ok, nil
}

// MailboxRow is one row of a mailbox.
func (d *DB) MailboxRow(k backend.MailboxKey) (r *backend.Record, ok bool, err error) {
	var scratch [160]byte
	key := appendMailboxKey(scratch[:0], k.User, k.Device, k.Position, &k.ID)
	ok, err = d.view(key, func(value []byte) (err error) {
		r, err = decodeRecord(value, k.Position)
		return err
	})
	if isDamage(err) {
		d.suspect(key)
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read mailbox row: %w", err)
	}
	return r, ok, nil
}

// MailboxPage is at most limit rows of one mailbox after (position, id). An empty mailbox costs two point reads, and the rows
// that were deleted at the front of another cost nothing, see mailboxLowLocked.
func (d *DB) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) ([]*backend.Record, error) {
	if limit <= 0 {
		return nil, nil
	}
	prefix := appendMailboxPrefix(nil, user, device)
	var page []*backend.Record
	err := d.iterate(prefix, appendAfter(nil, prefix), func(it *pebble.Iterator) error {
		low, some, err := d.mailboxLowLocked(user, device)
		if err != nil || !some {
			return err
		}
		from := append(appendMailboxKey(nil, user, device, position, &id), 0) // just after that row
		if low > position {
			from = binary.BigEndian.AppendUint64(append(from[:0], prefix...), low)
		}
		for ok := it.SeekGE(from); ok && len(page) < limit; ok = it.Next() {
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			key := it.Key()
			var r *backend.Record
			if len(key) == len(prefix)+mailboxPlaceBytes {
				r, err = decodeRecord(value, binary.BigEndian.Uint64(key[len(prefix):]))
			}
			if r == nil || err != nil {
				d.suspect(key)
				continue
			}
			page = append(page, r)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read mailbox: %w", err)
	}
	return page, nil
}

// mailboxLowLocked is a position below which the mailbox has no row; some is false if it has none at all. A scan that began at the
// first key would pass over every row that was deleted and is not yet compacted away: 7 ms for 100 000. It is to be
// called when the iterator is there: a row that the iterator shows below low has been deleted since, and one that was put
// below low after the iterator was made lowers it, and is not for this page anyway.
func (d *DB) mailboxLowLocked(user, device string) (low uint64, some bool, err error) {
	var scratch [128]byte
	key := appendMailboxName(scratch[:0], rangeCounts, user, device)
	some, err = d.viewLocked(key, func(value []byte) error {
		c, err := decodeCount(value)
		low = c.low
		return err
	})
	if isDamage(err) {
		d.suspect(key)
		return 0, true, nil
	}
	return low, some, err
}

// ReceiptsSince calls yield for the receipt rows of a sender that changed at or after since, in no particular order.
func (d *DB) ReceiptsSince(sender string, since int64, yield func(backend.ReceiptRow) bool) error {
	prefix := appendReceiptsPrefix(nil, sender)
	err := d.scan(prefix, appendAfter(nil, prefix), func(key, value []byte) (bool, error) {
		row, err := decodeReceipt(value)
		if err != nil {
			d.suspect(key)
			return true, nil
		}
		if row.ChangedMs < since {
			return true, nil
		}
		addressee, conversation, ok := bytes.Cut(key[len(prefix):], []byte{0})
		if !ok {
			return true, nil // nothing can be said about it
		}
		row.ReceiptKey = backend.ReceiptKey{Sender: sender, Conversation: string(conversation), Addressee: string(addressee)}
		return yield(row), nil
	})
	if err != nil {
		return fmt.Errorf("read receipts: %w", err)
	}
	return nil
}

// rowsOf adds to a count of rows and keeps it in its 32 bits: a count that were wrong must not wrap around.
func rowsOf(rows uint32, change int64) uint32 {
	return uint32(min(max(int64(rows)+change, 0), math.MaxUint32))
}
