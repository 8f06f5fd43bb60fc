package embedded

import (
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

var _ backend.Queue = (*DB)(nil)

// Shards is the number of delivery shards.
func (d *DB) Shards() int { return len(d.shards) }

// Append takes r and answers it through Hooks.Answer when it is durable. It holds a mutex for a moment and allocates nothing.
// It refuses with store_full, overloaded (too much waits for fsync, or the shard's Read is behind),
// shutting_down, internal (the store failed; it says so in Healthy), and bad_request for what cannot be a record.
func (d *DB) Append(r *backend.Record) protocol.Refusal {
	if !storable(r) {
		d.count.refusedOther.Add(1)
		return protocol.Refusal{Code: protocol.CodeBadRequest}
	}
	if d.space.full.Load() {
		d.count.refusedFull.Add(1)
		return protocol.Refusal{Code: protocol.CodeStoreFull, RetryAfterMs: retryStoreFullMs}
	}
	now := d.nowMs()
	s := d.shards[r.Conversation%uint64(len(d.shards))]
	if s.unreadNow.Load() >= int64(d.cfg.MaxUnread) || now-s.oldestMs.Load() > d.cfg.MaxLag.Milliseconds() {
		d.count.refusedLag.Add(1)
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: retryOverloadedMs}
	}
	r.AcceptedMs = now
	size := recordMemory(r)

	d.mu.Lock()
	p := &d.pending
	switch {
	case p.closing:
		d.mu.Unlock()
		d.count.refusedOther.Add(1)
		return protocol.Refusal{Code: protocol.CodeShuttingDown, RetryAfterMs: retryClosingMs}
	case p.failed != nil:
		d.mu.Unlock()
		d.count.refusedOther.Add(1)
		return protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: retryInternalMs}
	case p.waitingSends >= d.cfg.MaxWaitingSends || p.waitingBytes+size > d.cfg.MaxWaitingBytes:
		d.mu.Unlock()
		d.count.refusedWaiting.Add(1)
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: retryOverloadedMs}
	}
	p.appends = append(p.appends, r)
	p.waitingSends++
	p.waitingBytes += size
	d.wakeLocked()
	d.mu.Unlock()
	return protocol.Refusal{}
}

// Read takes durable records from the shard's ring, or from the log if the ring had overflowed or after a restart.
func (d *DB) Read(shard int, dst []*backend.Record, max int) ([]*backend.Record, error) {
	s := d.shards[shard]
	for len(dst) < max {
		from, until := s.pending()
		if from == until {
			before := len(dst)
			if dst = s.take(dst, max); len(dst) == before {
				return dst, nil
			}
			continue
		}
		var err error
		if dst, err = d.readLog(shard, from, until, dst, max); err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// readLog reads the records of one shard in (from, until] from the log.
func (d *DB) readLog(shard int, from, until uint64, dst []*backend.Record, max int) ([]*backend.Record, error) {
	s := d.shards[shard]
	before := len(dst)
	err := d.scanLog(from+1, until+1, func(position uint64, value []byte) (bool, error) {
		hash, ok := recordConversation(value)
		if !ok {
			d.suspect(appendLogKey(nil, position))
			return true, nil
		}
		if int(hash%uint64(len(d.shards))) != shard {
			return true, nil
		}
		r, err := decodeRecord(value, position)
		if err != nil {
			return false, err
		}
		dst = append(dst, r)
		return len(dst) < max, nil
	})
	n := len(dst) - before
	d.count.diskReads.Add(uint64(n))
	reached := until
	if err != nil || len(dst) >= max {
		reached = from
		if n > 0 {
			reached = dst[len(dst)-1].Position
		}
	}
	s.passed(reached, n)
	if err != nil {
		return dst, fmt.Errorf("read the log: %w", err)
	}
	return dst, nil
}

// scanLog calls yield for the records in [from, until) until it returns false. The value is valid during the call.
func (d *DB) scanLog(from, until uint64, yield func(position uint64, value []byte) (bool, error)) error {
	var lower, upper [logKeyBytes]byte
	return d.scan(appendLogKey(lower[:0], from), appendLogKey(upper[:0], until), func(key, value []byte) (bool, error) {
		position, ok := logKeyPosition(key)
		if !ok {
			d.suspect(key)
			return true, nil
		}
		return yield(position, value)
	})
}

// scan calls yield for the rows in [lower, upper), ascending, until it returns false. Key and value are valid during
// the call. It fails with ErrClosed after Close.
func (d *DB) scan(lower, upper []byte, yield func(key, value []byte) (bool, error)) error {
	return d.iterate(lower, upper, func(it *pebble.Iterator) error {
		for ok := it.First(); ok; ok = ok && it.Next() {
			value, err := it.ValueAndErr()
			if err != nil {
				return err
			}
			if ok, err = yield(it.Key(), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// iterate calls use with an iterator over [lower, upper), not positioned, and closes it. An error of the iterator is returned
// too: use need only stop when it has no more. It fails with ErrClosed after Close.
func (d *DB) iterate(lower, upper []byte, use func(it *pebble.Iterator) error) error {
	d.reads.RLock()
	defer d.reads.RUnlock()
	if d.closed {
		return ErrClosed
	}
	it, err := d.kv.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
	if err != nil {
		return err
	}
	err = use(it)
	if closeErr := it.Close(); err == nil {
		err = closeErr
	}
	return err
}

// view calls use with the value of a key, valid during the call. It fails with ErrClosed after Close.
func (d *DB) view(key []byte, use func(value []byte) error) (found bool, err error) {
	d.reads.RLock()
	defer d.reads.RUnlock()
	if d.closed {
		return false, ErrClosed
	}
	return d.viewLocked(key, use)
}

// viewLocked is view inside iterate, which holds reads: taken twice, Close between the two would stop both.
func (d *DB) viewLocked(key []byte, use func(value []byte) error) (found bool, err error) {
	value, closer, err := d.kv.Get(key)
	if err == pebble.ErrNotFound {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, closeAfter(use(value), closer)
}

func closeAfter(err error, c io.Closer) error {
	if closeErr := c.Close(); err == nil {
		return closeErr
	}
	return err
}

// get is a copy of the value of a key, nil if there is none.
func (d *DB) get(key []byte) (value []byte, err error) {
	_, err = d.view(key, func(v []byte) error {
		value = append([]byte{}, v...)
		return nil
	})
	return value, err
}
