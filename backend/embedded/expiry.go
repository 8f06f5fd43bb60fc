package embedded

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

// What expires, and when (DESIGN.md §1 and §4). Ages are those of ageClock.
const (
	expireRows    = 365 * 24 * time.Hour     // mailbox and outstanding rows after they were accepted, windows after their last use
	expireStreams = 2 * 365 * 24 * time.Hour // after the last login or send
)

// How the sweeper goes about it. 100 rows in a step and 10 steps a second are 86 million rows a day; young rows of
// a mailbox or a pair are passed over by one seek, so a large site is walked in about a day.
const (
	sweepRows      = 100
	sweepStep      = 100 * time.Millisecond
	sweepPass      = 24 * time.Hour  // from the start of one pass to the start of the next
	sweepLook      = time.Minute     // between two observations of the clock when no pass is under way, and before the first
	sweepClockSave = 1 * time.Hour   // the age clock is stored at least so often
	sweepRetry     = 5 * time.Minute // after a read that failed
)

// The kinds of rows that expire, in the order of a pass: windows before streams. A window that outlived the stream's row
// would know numbers that the stream draws again, and take new messages for old ones. Every window's day is at most that of
// its stream (see builder.useStream), so when a stream is old enough, its windows have been for a year; and they were walked
// in this pass, by the same date, before.
const (
	expireMailbox = iota
	expireOutstanding
	expireWindow
	expireStream
	expireKinds
)

var (
	expireNames  = [expireKinds]string{"mailbox", "outstanding", "window", "stream"}
	expireRanges = [expireKinds]byte{rangeMailbox, rangeOutstanding, rangeWindows, rangeStreams}
)

// sweeper walks the rows that expire, slowly and again and again. It belongs to one goroutine. It finds rows; the committer
// deletes them, in an ordinary batch, so that counts stay exact and full mailboxes are reported. Devices do not expire: a
// device stays registered, and an addressee, until its user says otherwise. Nor do receipts: there is one for each pair that
// ever wrote to each other.
//
// A pass that is cut short by a restart begins anew.
type sweeper struct {
	clock   ageClock
	savedMs int64 // clock.seenMs as stored

	sincePass time.Duration // run time since the start of the last pass; counts on without a pass
	passed    bool          // a pass has begun since the start
	walking   bool          // a pass is under way
	kind      int           // where it is
	cursor    []byte        // the next key to look at
	startMs   int64         // clock.seenMs at the start of the pass
	rowsMs    int64         // rows dated before are older than expireRows
	streamsMs int64
}

// expiry is what one step of the sweeper found, for the committer.
type expiry struct {
	mailbox     []backend.MailboxKey
	outstanding [][]byte // keys
	windows     []seenRow
	streams     []seenRow
	clock       []byte // the age clock, if it is to be stored
	done        func() // called when all of it is durable

	removed [expireKinds]int // set by the builder
}

// seenRow is a row that may have changed since it was looked at: then it is in use and stays.
type seenRow struct{ key, value []byte }

func (e *expiry) rows() int {
	return len(e.mailbox) + len(e.outstanding) + len(e.windows) + len(e.streams)
}

// load takes the age clock up where the last run left it.
func (s *sweeper) load(d *DB) error {
	_, err := d.view(keyAgeClock, func(value []byte) (err error) {
		s.clock, err = decodeAgeClock(value)
		return err
	})
	if isDamage(err) { // it has seen no time pass, so nothing is old
		d.log.Error("the stored age clock is damaged: ages are counted from now on", "error", err)
		s.clock, err = ageClock{}, nil
	}
	if err != nil {
		return fmt.Errorf("read age clock: %w", err)
	}
	s.savedMs = s.clock.seenMs
	return nil
}

// runSweeper takes steps until the DB closes. Time is measured by the monotonic clock; Config.Now is only what rows were dated by.
func (d *DB) runSweeper() {
	last := time.Now()
	timer := time.NewTimer(sweepLook)
	defer timer.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-timer.C:
		}
		now := time.Now()
		ran := now.Sub(last)
		last = now
		wait, err := d.sweep(d.cfg.Now(), ran)
		if err != nil {
			d.log.Error("expired rows are not removed", "error", err)
			wait = sweepRetry
		}
		timer.Reset(wait)
	}
}

// sweep takes one step: it looks at no more than sweepRows rows, waits until those of them that have expired are deleted, durably, and
// says when the next step is due. ran is the time since the step before, whatever the wall clock did.
func (d *DB) sweep(wall time.Time, ran time.Duration) (next time.Duration, err error) {
	s := &d.sweeper
	s.observe(wall, ran)
	d.count.sincePass.Store(int64(s.sincePass))
	e := &expiry{}
	if s.walking {
		if err := d.collect(e); err != nil {
			s.walking = false
			return 0, fmt.Errorf("look for expired rows: %w", err)
		}
	}
	if s.saveDue() {
		e.clock = appendAgeClock(nil, &s.clock)
	}
	if e.rows() > 0 || e.clock != nil {
		if !d.expire(e) {
			return sweepLook, nil // closing, or failed: nothing will be taken any more
		}
		if e.clock != nil {
			s.savedMs = s.clock.seenMs
		}
	}
	if s.walking {
		return sweepStep, nil
	}
	return sweepLook, nil
}

// observe takes the time and begins a pass when one is due. A pass goes by the dates of its start; if the clock
// is set back behind that, rows are being dated before it, and the pass ends.
func (s *sweeper) observe(wall time.Time, ran time.Duration) {
	s.clock.observe(wall.UnixMilli(), ran)
	s.sincePass += ran
	s.walking = s.walking && s.clock.seenMs >= s.startMs
	if s.walking || s.passed && s.sincePass < sweepPass {
		return
	}
	s.startMs = s.clock.seenMs
	s.rowsMs, s.streamsMs = s.clock.before(expireRows), s.clock.before(expireStreams)
	s.clock.forget(s.streamsMs)
	s.sincePass, s.passed = 0, true
	s.begin(expireMailbox)
}

// begin goes to the first row of a kind; after the last kind the pass has ended.
func (s *sweeper) begin(kind int) {
	if s.walking = kind < expireKinds; s.walking {
		s.kind, s.cursor = kind, append(s.cursor[:0], expireRanges[kind])
	}
}

func (s *sweeper) saveDue() bool {
	return s.clock.seenMs < s.savedMs || s.clock.seenMs-s.savedMs >= sweepClockSave.Milliseconds()
}

// collect looks at the next rows and adds those that have expired to e. It ends the pass after the last row.
func (d *DB) collect(e *expiry) error {
	s := &d.sweeper
	looks := 0
	defer func() { d.count.sweptRows.Add(uint64(looks)) }()
	for looks < sweepRows {
		end := false
		err := d.iterate(s.cursor, []byte{expireRanges[s.kind] + 1}, func(it *pebble.Iterator) error {
			ok := it.First()
			for ; ok && looks < sweepRows; looks++ {
				young, err := s.examine(it, e)
				switch {
				case isDamage(err):
					d.suspect(it.Key())
				case err != nil:
					return err
				}
				if young == 0 {
					ok = it.Next()
				} else {
					s.cursor = appendAfter(s.cursor[:0], it.Key()[:young])
					ok = it.SeekGE(s.cursor)
				}
			}
			if end = !ok; ok {
				s.cursor = append(s.cursor[:0], it.Key()...)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if !end {
			return nil
		}
		if s.begin(s.kind + 1); !s.walking {
			d.count.passes.Add(1)
			return nil
		}
	}
	return nil
}

// examine adds the row at it to e if it has expired. If it has not, and all rows that share the first young bytes of its
// key are younger, it returns that number.
func (s *sweeper) examine(it *pebble.Iterator, e *expiry) (young int, err error) {
	switch s.kind {
	case expireMailbox:
		return s.examineMailbox(it.Key(), e)
	case expireOutstanding:
		key := it.Key()
		position, prefix, err := cutPosition(key, 0)
		if err != nil || s.isYoung(position) {
			return prefix, err
		}
		e.outstanding = append(e.outstanding, bytes.Clone(key))
		return 0, nil
	}
	value, err := it.ValueAndErr()
	if err != nil {
		return 0, err
	}
	seen := func() seenRow { return seenRow{bytes.Clone(it.Key()), bytes.Clone(value)} }
	if s.kind == expireWindow {
		w, err := decodeWindow(value)
		if err == nil && w.day < day(s.rowsMs) { // that day had ended
			e.windows = append(e.windows, seen())
		}
		return 0, err
	}
	r, err := decodeStreamRow(value)
	if err == nil && r.day < day(s.streamsMs) {
		e.streams = append(e.streams, seen())
	}
	return 0, err
}

func (s *sweeper) examineMailbox(key []byte, e *expiry) (young int, err error) {
	const idBytes = mailboxPlaceBytes - 8
	position, prefix, err := cutPosition(key, idBytes)
	if err != nil || s.isYoung(position) {
		return prefix, err
	}
	user, device, ok := bytes.Cut(key[1:prefix-1], []byte{0})
	if !ok {
		return 0, fmt.Errorf("mailbox key: %w", errRow)
	}
	row := backend.MailboxKey{User: string(user), Device: string(device), Position: position}
	copy(row.ID[:], key[len(key)-idBytes:])
	e.mailbox = append(e.mailbox, row)
	return 0, nil
}

// cutPosition finds the position in a key that ends with it and tail more bytes. prefix is the length of what stands before, which
// ends with a zero byte.
func cutPosition(key []byte, tail int) (position uint64, prefix int, err error) {
	prefix = len(key) - tail - 8
	if prefix < 2 || key[prefix-1] != 0 {
		return 0, 0, fmt.Errorf("key of a dated row: %w", errRow)
	}
	return binary.BigEndian.Uint64(key[prefix:]), prefix, nil
}

func (s *sweeper) isYoung(position uint64) bool { return protocol.PositionMillis(position) >= s.rowsMs }

// expire gives e to the committer and waits until it is durable. It returns false if that will not be: the DB closes or has failed.
func (d *DB) expire(e *expiry) bool {
	done := make(chan struct{})
	e.done = func() { close(done) }
	d.mu.Lock()
	if d.pending.closing || d.pending.failed != nil {
		d.mu.Unlock()
		return false
	}
	d.pending.expiry = e
	d.wakeLocked()
	d.mu.Unlock()
	select {
	case <-done:
		return true
	case <-d.stop:
		return false
	}
}
