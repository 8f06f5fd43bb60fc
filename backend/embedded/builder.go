package embedded

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// builder turns what is pending into one Pebble batch. It belongs to the committer. A batch is merged with what the database
// holds, and the database already shows every earlier batch; what the batch itself has changed so far is in the overlays.
type builder struct {
	state
	stateDirty bool // it has changed in this batch

	lows    []lowWater // per shard
	trimmed uint64     // the log holds nothing below

	trimmedAt  time.Time
	sinceTrim  int // records appended
	sinceFlush int // range tombstones written

	before undo

	// Of the batch being built.
	day           uint16
	key, value    []byte // scratch
	windows       overlay[windowRow]
	receipts      overlay[backend.ReceiptRow]
	rows          overlay[bool] // mailbox rows: there or not
	counts        overlay[mailboxCount]
	devices       overlay[userDevices]
	streams       overlay[streamRow]
	mailboxRowMax uint32
}

// mailboxCount is how many rows a mailbox has, before and in this batch, and where they begin.
type mailboxCount struct {
	user, device string
	before, now  uint32
	low          uint64 // no row lies below; meaningless without rows
	lowPut       uint64 // the lowest position put in this batch, 0 for none
	removed      uint32 // rows deleted since low was last found
	changed      bool   // also if now is before
}

// lowEvery is after how many deletions the first row of a mailbox is looked for again: a page begins at most that many
// deleted rows, and those of one batch, before it.
const lowEvery = 64

// undo is what build changes of the builder and a build that fails leaves as it was.
type undo struct {
	state      state
	lows       []lowWater
	trimmed    uint64
	trimmedAt  time.Time
	sinceTrim  int
	sinceFlush int
}

func (s *builder) remember() {
	u := &s.before
	u.state, u.trimmed, u.trimmedAt, u.sinceTrim, u.sinceFlush = s.state, s.trimmed, s.trimmedAt, s.sinceTrim, s.sinceFlush
	u.lows = append(u.lows[:0], s.lows...)
}

func (s *builder) undo() {
	u := &s.before
	s.state, s.trimmed, s.trimmedAt, s.sinceTrim, s.sinceFlush = u.state, u.trimmed, u.trimmedAt, u.sinceTrim, u.sinceFlush
	copy(s.lows, u.lows)
}

type userDevices struct {
	list    []backend.Device
	changed bool // in this batch
}

// overlay holds the rows that the batch being built has read or changed, by key.
type overlay[V any] map[string]*V

// overlayKeep is how many rows a map may have grown to and still be cleared rather than replaced: clearing a
// map costs its largest size ever.
const overlayKeep = 8_192

func (o *overlay[V]) reset() {
	if len(*o) > overlayKeep || *o == nil {
		*o = make(overlay[V])
		return
	}
	clear(*o)
}

// rows is how the rows of one range are read: mend makes what stands in for one that does not decode.
type rows[V any] struct {
	decode func(value []byte) (V, error)
	mend   func(s *builder, d *DB, key []byte) (V, error)
}

var (
	windowRows  = rows[windowRow]{decodeWindow, (*builder).mendWindow}
	receiptRows = rows[backend.ReceiptRow]{decodeReceipt, (*builder).mendReceipt}
	streamRows  = rows[streamRow]{decodeStreamRow, (*builder).mendStream}
	deviceRows  = rows[userDevices]{func(value []byte) (userDevices, error) {
		list, err := decodeDevices(value)
		return userDevices{list: list}, err
	}, (*builder).mendDevices}
	countRows = rows[mailboxCount]{func(value []byte) (mailboxCount, error) {
		r, err := decodeCount(value)
		return mailboxCount{before: r.rows, now: r.rows, low: r.low, removed: uint32(r.removed)}, err
	}, (*builder).mendCount}
	anyRows = rows[bool]{func([]byte) (bool, error) { return true, nil }, nil} // there or not
)

// row is the overlay's row for a key, read from the database by the first who asks. A missing row is the zero value. A damaged
// row is set aside, and the batch writes another in its place.
func row[V any](s *builder, d *DB, b *batch, o overlay[V], key []byte, kind rows[V]) (*V, error) {
	if v, ok := o[string(key)]; ok {
		return v, nil
	}
	v := new(V)
	var damaged []byte
	_, err := d.view(key, func(value []byte) (err error) {
		if *v, err = kind.decode(value); err != nil {
			damaged = bytes.Clone(value)
		}
		return err
	})
	if isDamage(err) {
		key = bytes.Clone(key) // it may be the builder's own
		if *v, err = kind.mend(s, d, key); err == nil {
			err = b.setAside(key, damaged)
		}
	}
	if err != nil {
		return nil, err
	}
	o[string(key)] = v
	return v, nil
}

func (s *builder) init(d *DB) {
	s.mailboxRowMax = uint32(d.cfg.MailboxRows)
	s.trimmedAt = time.Now()
	d.count.mailboxRows.Store(s.mailboxRows)
}

// build fills b.kv, b.answers and the outcomes of b.registers. When it fails it can be called again with the same batch.
func (s *builder) build(d *DB, b *batch) error {
	s.remember()
	err := s.fill(d, b)
	if err != nil {
		s.undo()
		b.clearBuilt()
	}
	return err
}

// fill does it. Its parts stand in the order of the batch.
func (s *builder) fill(d *DB, b *batch) error {
	s.stateDirty = false
	s.day = day(d.nowMs())
	s.windows.reset()
	s.receipts.reset()
	s.rows.reset()
	s.counts.reset()
	s.devices.reset()
	s.streams.reset()

	s.appendRecords(b)
	for _, key := range b.suspects {
		if err := s.mend(d, b, key); err != nil {
			return fmt.Errorf("mend a row: %w", err)
		}
	}
	if err := s.addCommits(d, b); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	for i := range b.registers {
		if err := s.register(d, b, &b.registers[i]); err != nil {
			return fmt.Errorf("register: %w", err)
		}
	}
	if b.expiry != nil {
		if err := s.addExpiry(d, b, b.expiry); err != nil {
			return fmt.Errorf("expire: %w", err)
		}
	}
	if err := s.writeOverlays(d, b); err != nil {
		return fmt.Errorf("build batch: %w", err)
	}
	if err := s.trim(d, b); err != nil {
		return fmt.Errorf("trim the log: %w", err)
	}
	if s.stateDirty {
		s.value = appendState(s.value[:0], &s.state)
		if err := b.kv.Set(keyState, s.value, nil); err != nil {
			return fmt.Errorf("write state: %w", err)
		}
	}
	d.count.mailboxRows.Store(s.mailboxRows)
	return nil
}

// appendRecords gives each record its position and writes it to the log.
func (s *builder) appendRecords(b *batch) {
	for _, r := range b.appends {
		s.last = protocol.NextPosition(s.last, r.AcceptedMs)
		r.Position = s.last
		op := b.kv.SetDeferred(logKeyBytes, recordSize(r))
		appendLogKey(op.Key[:0], r.Position)
		appendRecord(op.Value[:0], r)
		_ = op.Finish() // fails for an indexed batch only

		shard := r.Conversation % uint64(len(s.lows))
		s.lows[shard].appended(r.Position)
		b.perShard[shard] = append(b.perShard[shard], r)

		a := protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Position: r.Position, Millis: protocol.PositionMillis(r.Position)}
		if r.Resend {
			a.Position = 0 // the first copy's position counts, and it is not known here
		}
		b.answers = append(b.answers, a)
	}
	s.sinceTrim += len(b.appends)
	s.stateDirty = s.stateDirty || len(b.appends) > 0
}

// addCommits adds the rows of the commits, in order, until the batch is full, and leaves the rest in b.
func (s *builder) addCommits(d *DB, b *batch) error {
	before, rows := b.kv.Len(), 0
	for n, c := range b.commits {
		row, of := 0, commitRows(c)
		if n == 0 {
			row = b.firstRow
		}
		for ; row < of; row++ {
			if b.kv.Len()-before+rows*rowCost >= maxBatchBytes {
				b.complete, b.nextRow = n, row
				return nil
			}
			if err := s.addRow(d, b, c, row); err != nil {
				return err
			}
			rows++
		}
		b.finishes = b.finishes || c.LowWater > 0 || len(c.Windows) > 0
	}
	b.complete, b.nextRow = len(b.commits), 0
	return nil
}

// commitRows is the number of rows of a commit.
func commitRows(c *backend.Commit) int {
	return len(c.Mailbox) + len(c.Outstanding) + len(c.Receipts) + len(c.Settled) + len(c.Acknowledged) + len(c.Windows)
}

// addRow adds one row of a commit, counted over all its fields in the order in which they may be applied.
func (s *builder) addRow(d *DB, b *batch, c *backend.Commit, i int) (err error) {
	if i < len(c.Mailbox) {
		if err = s.putMailbox(d, b, &c.Mailbox[i]); err != nil {
			err = fmt.Errorf("put mailbox row: %w", err)
		}
		return err
	}
	if i -= len(c.Mailbox); i < len(c.Outstanding) {
		o := &c.Outstanding[i]
		s.key = appendOutstandingKey(s.key[:0], o.Conversation, o.Addressee, o.Position)
		s.value = appendOutstanding(s.value[:0], &o.Mark)
		return b.kv.Set(s.key, s.value, nil)
	}
	if i -= len(c.Outstanding); i < len(c.Receipts) {
		return s.putReceipt(d, b, &c.Receipts[i])
	}
	if i -= len(c.Receipts); i < len(c.Settled) {
		o := &c.Settled[i]
		s.key = appendOutstandingKey(s.key[:0], o.Conversation, o.Addressee, o.Position)
		return b.kv.Delete(s.key, nil)
	}
	if i -= len(c.Settled); i < len(c.Acknowledged) {
		if err = s.deleteMailbox(d, b, &c.Acknowledged[i]); err != nil {
			err = fmt.Errorf("delete mailbox row: %w", err)
		}
		return err
	}
	return s.putWindow(d, b, &c.Windows[i-len(c.Acknowledged)])
}

func (s *builder) putReceipt(d *DB, b *batch, r *backend.ReceiptRow) error {
	s.key = appendReceiptKey(s.key[:0], &r.ReceiptKey)
	old, err := row(s, d, b, s.receipts, s.key, receiptRows)
	if err != nil {
		return err
	}
	mergeReceipt(old, r)
	if r.ChangedMs > s.receiptMs {
		s.receiptMs, s.stateDirty = r.ChangedMs, true
	}
	return nil
}

func (s *builder) putWindow(d *DB, b *batch, w *backend.WindowRow) error {
	s.key = appendWindowKey(s.key[:0], &w.WindowKey)
	old, err := row(s, d, b, s.windows, s.key, windowRows)
	if err != nil {
		return err
	}
	newest := old.Blocks[0].Block
	old.Merge(&w.Window)
	if old.day >= s.day && old.Blocks[0].Block <= newest {
		return nil
	}
	old.day = max(old.day, s.day)
	if err := s.useStream(d, b, &w.Stream, old.Blocks[0].Block); err != nil {
		return fmt.Errorf("date stream: %w", err)
	}
	return nil
}

// mergeReceipt takes the larger of each mark. ChangedMs belongs to Delivered.
func mergeReceipt(old, r *backend.ReceiptRow) {
	switch {
	case r.Delivered.Position > old.Delivered.Position:
		old.Delivered, old.ChangedMs = r.Delivered, max(old.ChangedMs, r.ChangedMs)
	case r.Delivered.Position == old.Delivered.Position:
		old.ChangedMs = max(old.ChangedMs, r.ChangedMs)
	}
	if r.Top.Position > old.Top.Position {
		old.Top = r.Top
	}
}

// putMailbox adds a row unless it is there: counts must stay exact, and the same put may come again after a restart.
func (s *builder) putMailbox(d *DB, b *batch, p *backend.MailboxPut) error {
	var id protocol.MessageID
	if p.Record != nil {
		s.value = appendRecord(s.value[:0], p.Record)
		id = p.Record.ID
	} else {
		var logKey [logKeyBytes]byte
		known := false
		found, err := d.view(appendLogKey(logKey[:0], p.Position), func(value []byte) error {
			s.value = append(s.value[:0], value...)
			id, known = recordID(value)
			return nil
		})
		if err != nil {
			return err
		}
		if !found || !known { // the message is lost: nothing else holds it
			b.gone++
			if found {
				return s.mend(d, b, logKey[:])
			}
			return nil
		}
	}
	s.key = appendMailboxKey(s.key[:0], p.User, p.Device, p.Position, &id)
	there, err := s.mailboxRow(d, b)
	if err != nil || *there {
		return err
	}
	*there = true
	if err := b.kv.Set(s.key, s.value, nil); err != nil {
		return err
	}
	b.puts = true
	c, err := s.countMailbox(d, b, p.User, p.Device, 1)
	if err != nil {
		return err
	}
	if c.now == 1 {
		c.low, c.removed = p.Position, 0
	}
	c.low = min(c.low, p.Position)
	if c.lowPut == 0 || p.Position < c.lowPut {
		c.lowPut = p.Position
	}
	return nil
}

func (s *builder) deleteMailbox(d *DB, b *batch, k *backend.MailboxKey) error {
	s.key = appendMailboxKey(s.key[:0], k.User, k.Device, k.Position, &k.ID)
	there, err := s.mailboxRow(d, b)
	if err != nil || !*there {
		return err
	}
	*there = false
	if err := b.kv.Delete(s.key, nil); err != nil {
		return err
	}
	c, err := s.countMailbox(d, b, k.User, k.Device, -1)
	if err != nil {
		return err
	}
	c.removed++
	return nil
}

// mailboxRow says whether the mailbox row at s.key is there.
func (s *builder) mailboxRow(d *DB, b *batch) (*bool, error) {
	return row(s, d, b, s.rows, s.key, anyRows)
}

func (s *builder) countMailbox(d *DB, b *batch, user, device string, change int64) (*mailboxCount, error) {
	s.key = appendMailboxName(s.key[:0], rangeCounts, user, device)
	c, err := row(s, d, b, s.counts, s.key, countRows)
	if err != nil {
		return nil, err
	}
	c.user, c.device = user, device
	c.now = rowsOf(c.now, change)
	s.mailboxRows = uint64(int64(s.mailboxRows) + change)
	s.stateDirty = true
	return c, nil
}

// findLow looks for the first row of a mailbox, in the database and in this batch.
func (s *builder) findLow(d *DB, c *mailboxCount) error {
	prefix := appendMailboxPrefix(nil, c.user, c.device)
	lower := binary.BigEndian.AppendUint64(bytes.Clone(prefix), c.low)
	first := c.lowPut
	err := d.scan(lower, appendAfter(nil, prefix), func(key, _ []byte) (bool, error) {
		if there := s.rows[string(key)]; there != nil && !*there {
			return true, nil // this batch deletes it
		}
		if len(key) != len(prefix)+mailboxPlaceBytes {
			return true, nil
		}
		if position := binary.BigEndian.Uint64(key[len(prefix):]); first == 0 || position < first {
			first = position
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("find the first row of a mailbox: %w", err)
	}
	c.low, c.removed = first, 0
	return nil
}

// useStream dates the row of a stream that has used a window. It keeps two things true: a stream's day is at least that of each
// of its windows, and its next block is above every block that they know. So no window outlives the row (see expireKinds), and
// if that has expired under a connection that was silent for two years, the next login does not draw its block again.
// It is called once a day and once a connection for each window.
func (s *builder) useStream(d *DB, b *batch, stream *backend.Stream, block uint32) error {
	s.key = appendStreamKey(s.key[:0], stream)
	r, err := row(s, d, b, s.streams, s.key, streamRows)
	if err != nil {
		return err
	}
	r.day, r.next = max(r.day, s.day), max(r.next, block+1)
	return nil
}

// register draws the next block of a stream and adds its device to the user's, in the overlays.
func (s *builder) register(d *DB, b *batch, r *registration) error {
	s.key = appendDevicesKey(s.key[:0], r.stream.User)
	devices, err := row(s, d, b, s.devices, s.key, deviceRows)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(devices.list, func(dev backend.Device) bool { return dev.Name == r.stream.Device })
	if at < 0 && len(devices.list) >= protocol.MaxDevicesPerUser {
		r.refusal = protocol.Refusal{Code: protocol.CodeTooManyDevices}
		return nil
	}
	s.key = appendStreamKey(s.key[:0], &r.stream)
	stream, err := row(s, d, b, s.streams, s.key, streamRows)
	if err != nil {
		return err
	}
	if stream.next > protocol.MaxBlock { // 268 million connections of one installation: it must begin a new stream
		r.refusal = protocol.Refusal{Code: protocol.CodeBadRequest}
		return nil
	}
	if at < 0 {
		at = len(devices.list)
		devices.list = append(devices.list, backend.Device{Name: r.stream.Device, Heir: at == 0})
		devices.changed = true
	}
	r.block, r.heir = stream.next, devices.list[at].Heir
	stream.next++
	stream.day = max(stream.day, s.day)
	return nil
}

// addExpiry deletes what has expired, but for rows that have changed since the sweeper looked, in this batch or before it: they
// are in use. It comes last, so that all of the batch is in the overlays.
func (s *builder) addExpiry(d *DB, b *batch, e *expiry) error {
	for i := range e.mailbox {
		before := s.mailboxRows
		if err := s.deleteMailbox(d, b, &e.mailbox[i]); err != nil {
			return err
		}
		e.removed[expireMailbox] += int(before - s.mailboxRows)
	}
	for _, key := range e.outstanding {
		if err := b.kv.Delete(key, nil); err != nil {
			return err
		}
		e.removed[expireOutstanding]++
	}
	for i := range e.windows {
		_, used := s.windows[string(e.windows[i].key)]
		if err := s.expireRow(d, b, e, expireWindow, &e.windows[i], used); err != nil {
			return err
		}
	}
	for i := range e.streams {
		_, used := s.streams[string(e.streams[i].key)]
		if err := s.expireRow(d, b, e, expireStream, &e.streams[i], used); err != nil {
			return err
		}
	}
	if e.clock != nil {
		return b.kv.Set(keyAgeClock, e.clock, nil)
	}
	return nil
}

func (s *builder) expireRow(d *DB, b *batch, e *expiry, kind int, seen *seenRow, used bool) error {
	if used {
		return nil
	}
	same := false
	_, err := d.view(seen.key, func(value []byte) error {
		same = bytes.Equal(value, seen.value)
		return nil
	})
	if err != nil || !same {
		return err
	}
	e.removed[kind]++
	return b.kv.Delete(seen.key, nil)
}

// writeOverlays writes the merged rows. Their order does not matter: the batch is atomic and their keys differ.
func (s *builder) writeOverlays(d *DB, b *batch) error {
	for key, w := range s.windows {
		if err := s.set(b, key, appendWindow(s.value[:0], w)); err != nil {
			return err
		}
	}
	for key, r := range s.receipts {
		if err := s.set(b, key, appendReceipt(s.value[:0], r)); err != nil {
			return err
		}
	}
	for key, devices := range s.devices {
		if !devices.changed {
			continue
		}
		if err := s.set(b, key, appendDevices(s.value[:0], devices.list)); err != nil {
			return err
		}
	}
	for key, stream := range s.streams {
		if err := s.set(b, key, appendStreamRow(s.value[:0], *stream)); err != nil {
			return err
		}
	}
	for key, c := range s.counts {
		if err := s.writeCount(d, b, key, c); err != nil {
			return err
		}
	}
	return nil
}

func (s *builder) set(b *batch, key string, value []byte) error {
	s.key, s.value = append(s.key[:0], key...), value
	return b.kv.Set(s.key, value, nil)
}

// writeCount writes a mailbox count, and the row that says that it is full, if that changed.
func (s *builder) writeCount(d *DB, b *batch, key string, c *mailboxCount) error {
	if c.now == c.before && c.lowPut == 0 && !c.changed {
		return nil
	}
	var err error
	if c.now == 0 {
		s.key = append(s.key[:0], key...)
		err = b.kv.Delete(s.key, nil)
	} else {
		if c.removed >= lowEvery {
			if err := s.findLow(d, c); err != nil {
				return err
			}
		}
		err = s.set(b, key, appendCount(s.value[:0], countRow{c.now, c.low, uint16(c.removed)}))
	}
	was, is := c.before >= s.mailboxRowMax, c.now >= s.mailboxRowMax
	if err != nil || was == is {
		return err
	}
	b.full = append(b.full, fullChange{c.user, c.device, is})
	s.key = appendMailboxName(s.key[:0], rangeFull, c.user, c.device)
	if is {
		return b.kv.Set(s.key, nil, nil)
	}
	return b.kv.Delete(s.key, nil)
}

// trim deletes the log behind the oldest unfinished record. It goes by what is durable: a low water that came with
// this batch counts for a later one.
func (s *builder) trim(d *DB, b *batch) error {
	now := time.Now()
	due := s.sinceTrim >= trimRecords || now.Sub(s.trimmedAt) >= trimInterval
	d.mu.Lock()
	due = due || d.pending.closing
	if due {
		d.pending.trimUntil = time.Time{}
	}
	d.mu.Unlock()
	if !due {
		return nil
	}
	until := s.last + 1
	for i := range s.lows {
		l := &s.lows[i]
		l.low = max(l.low, d.shards[i].lowWater.Load())
		if keep, ok := l.keeps(); ok {
			until = min(until, keep)
		}
	}
	s.trimmedAt, s.sinceTrim = now, 0
	if until <= s.trimmed {
		return nil
	}
	s.key = appendLogKey(s.key[:0], s.trimmed)
	s.value = appendLogKey(s.value[:0], until)
	if err := b.kv.DeleteRange(s.key, s.value, nil); err != nil {
		return err
	}
	s.trimmed = until
	d.count.trims.Add(1)
	if s.sinceFlush++; s.sinceFlush >= trimsPerFlush {
		s.sinceFlush = 0
		if _, err := d.kv.AsyncFlush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
	}
	return nil
}
