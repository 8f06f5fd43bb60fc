package embedded

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// A mailbox that is at its limit has a row that says so, for the owner that starts next: there are few, and many mailboxes. The
// builder writes or deletes it when the number of rows passes the limit, so the rows are those of one limit, which is kept
// beside them: version (1), rows (4).

func appendLimit(dst []byte, rows uint32) []byte {
	return binary.BigEndian.AppendUint32(append(dst, rowVersion), rows)
}

// applyLimit makes the rows of full mailboxes anew if the last run had another limit, or did not say which. A crash within is
// harmless: the limit is written last.
func (d *DB) applyLimit() error {
	limit := uint32(d.cfg.MailboxRows)
	want := appendLimit(nil, limit)
	switch is, err := d.get(keyFullLimit); {
	case err != nil:
		return err
	case bytes.Equal(is, want):
		return nil
	}
	b := d.kv.NewBatch()
	defer func() { _ = b.Close() }() // fails for what is in use by an iterator; this is not
	if err := b.DeleteRange([]byte{rangeFull}, []byte{rangeFull + 1}, nil); err != nil {
		return err
	}
	err := d.scan([]byte{rangeCounts}, []byte{rangeCounts + 1}, func(key, value []byte) (bool, error) {
		c, err := decodeCount(value)
		if isDamage(err) || c.rows < limit {
			return true, nil // what is damaged is counted anew when it is next used
		}
		if b.Len() >= maxBatchBytes {
			if err := b.Commit(pebble.NoSync); err != nil {
				return false, err
			}
			b.Reset()
		}
		return true, b.Set(append([]byte{rangeFull}, key[1:]...), nil, nil)
	})
	if err != nil {
		return err
	}
	if err := b.Set(keyFullLimit, want, nil); err != nil {
		return err
	}
	return b.Commit(pebble.Sync)
}

// fullMailboxes calls yield for every mailbox that is at its limit.
func (d *DB) fullMailboxes(yield func(user, device string)) error {
	err := d.scan([]byte{rangeFull}, []byte{rangeFull + 1}, func(key, _ []byte) (bool, error) {
		user, device, ok := bytes.Cut(key[1:], []byte{0})
		if !ok {
			d.suspect(key)
			return true, nil
		}
		yield(string(user), string(device))
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("read full mailboxes: %w", err)
	}
	return nil
}
