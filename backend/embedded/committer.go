package embedded

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

// batchesInFlight is how many batches exist: one that syncs, and one that is being built or waits for its turn.
const batchesInFlight = 2

// pending is what callers handed in and no batch has taken yet, guarded by DB.mu.
type pending struct {
	started bool
	closing bool  // no new sends
	stopped bool  // the committer has gone: nothing is taken any more
	failed  error // the store cannot go on; only refusals from here on
	stalled error // a read that fails and is tried again, nil if none does

	appends   []*backend.Record
	commits   []*backend.Commit
	firstRow  int // of commits[0]: those before went with an earlier batch
	registers []registration
	expiry    *expiry  // at most one: the sweeper waits for it
	suspects  [][]byte // keys of rows that do not decode

	commitBytes int
	commitUntil time.Time // when the oldest commit has waited for company long enough; zero: none waits
	urgent      bool
	trimUntil   time.Time // when the log is to be trimmed; zero: nothing to trim

	// From Append until answered.
	waitingSends int
	waitingBytes int64

	inFlight int  // batches taken and not yet reported
	sleeping bool // the committer waits for kick
}

type registration struct {
	stream backend.Stream
	done   func(block uint32, heir bool, refusal protocol.Refusal)

	// The outcome, set when its batch is built.
	block   uint32
	heir    bool
	refusal protocol.Refusal
}

func (p *pending) addCommit(c *backend.Commit) {
	if p.stopped {
		return
	}
	if len(p.commits) == 0 {
		p.commitUntil = time.Now().Add(maxCommitWait)
	}
	p.commits = append(p.commits, c)
	p.commitBytes += commitSize(c)
	p.urgent = p.urgent || c.Urgent
}

// commitSize estimates what a commit adds to a batch.
func commitSize(c *backend.Commit) int {
	const row, record = 160, 512 // typical; a record named by its position is not read for this
	n := row * (1 + len(c.Outstanding) + len(c.Receipts) + len(c.Settled) + len(c.Acknowledged) + len(c.Windows))
	return n + record*len(c.Mailbox)
}

// due reports whether a batch is to be built now; if not, until is when it will be, zero for never.
func (p *pending) due(now time.Time) (yes bool, until time.Time) {
	switch {
	case len(p.appends) > 0, len(p.registers) > 0, p.urgent, p.expiry != nil, len(p.suspects) > 0, p.commitBytes >= maxCommitBytes:
		return true, until
	case p.closing && (len(p.commits) > 0 || !p.trimUntil.IsZero()):
		return true, until
	}
	for _, t := range [...]time.Time{p.commitUntil, p.trimUntil} {
		if !t.IsZero() && !now.Before(t) {
			return true, until
		}
		if until.IsZero() || !t.IsZero() && t.Before(until) {
			until = t
		}
	}
	return false, until
}

// take moves what fits one batch to b, in order.
func (p *pending) take(b *batch) {
	n := 0
	for size := 0; n < len(p.appends) && (n == 0 || size < maxBatchBytes); n++ {
		size += recordSize(p.appends[n])
		b.memory += recordMemory(p.appends[n])
	}
	if n == len(p.appends) {
		b.appends, p.appends = p.appends, b.appends[:0]
	} else {
		b.appends = append(b.appends[:0], p.appends[:n]...)
		p.appends = dropFirst(p.appends, n)
	}

	b.firstRow, p.firstRow = p.firstRow, 0
	n, size := 0, 0
	for ; n < len(p.commits) && (n == 0 || size < maxCommitBytes); n++ {
		size += commitSize(p.commits[n])
	}
	if n == len(p.commits) {
		b.commits, p.commits = p.commits, b.commits[:0]
		p.commitBytes, p.commitUntil, p.urgent = 0, time.Time{}, false
	} else { // what is left has waited behind a full batch: it goes with the next one
		b.commits = append(b.commits[:0], p.commits[:n]...)
		p.commits = dropFirst(p.commits, n)
		p.commitBytes -= size
		p.urgent = true
	}

	n = min(len(p.registers), maxBatchBytes/256)
	b.registers = append(b.registers[:0], p.registers[:n]...)
	p.registers = dropFirst(p.registers, n)

	b.expiry, p.expiry = p.expiry, nil
	b.suspects, p.suspects = p.suspects, nil
}

// giveBack takes the commits back that did not fit b, the first of them from b.nextRow on.
func (p *pending) giveBack(b *batch) {
	rest := b.commits[b.complete:]
	p.commits = slices.Insert(p.commits, 0, rest...)
	for _, c := range rest {
		p.commitBytes += commitSize(c)
	}
	p.firstRow, p.urgent = b.nextRow, true // they have waited
	clear(rest)
	b.commits = b.commits[:b.complete]
}

func dropFirst[T any](list []T, n int) []T {
	left := copy(list, list[n:])
	clear(list[left:])
	return list[:left]
}

// wakeLocked wakes the committer if it sleeps. d.mu is held.
func (d *DB) wakeLocked() {
	if d.pending.sleeping {
		d.pending.sleeping = false
		select {
		case d.kick <- struct{}{}:
		default:
		}
	}
}

// batch is one write of Pebble and what is to be reported once it is durable. It is owned by the committer, then by
// the syncer, then free.
type batch struct {
	kv        *pebble.Batch
	appends   []*backend.Record
	perShard  [][]*backend.Record // the same records
	answers   []protocol.Answer
	commits   []*backend.Commit
	firstRow  int // of commits[0]
	complete  int // set by build: so many commits end in b, and
	nextRow   int // of the next one the rows from here on do not fit
	registers []registration
	expiry    *expiry
	suspects  [][]byte
	aside     [][]byte // keys of damaged rows that were set aside
	gone      uint64   // messages to be stored that were not in the log
	full      []fullChange
	memory    int64 // what its records hold of MaxWaitingBytes
	puts      bool  // it has mailbox rows
	finishes  bool  // it ends a commit that raises a low water
	err       error // nothing of it was written

	bytes     int       // written to the log of Pebble, 0 if there was nothing to write
	writtenAt time.Time // when its sync was asked for
}

// fullChange is a mailbox that has reached its limit or fallen under it.
type fullChange struct {
	user, device string
	full         bool
}

func (d *DB) newBatch() *batch {
	return &batch{kv: d.newWrite(), perShard: make([][]*backend.Record, len(d.shards))}
}

// newWrite keeps the room of a full batch with its keys, so that in the long run neither building nor reuse allocates.
func (d *DB) newWrite() *pebble.Batch {
	return d.kv.NewBatch(pebble.WithInitialSizeBytes(64<<10), pebble.WithMaxRetainedSizeBytes(4*maxBatchBytes))
}

// recycle drops every reference before b waits for its next use.
func (b *batch) recycle() {
	b.clearBuilt()
	clear(b.appends)
	b.appends = b.appends[:0]
	clear(b.commits)
	b.commits = b.commits[:0]
	clear(b.registers)
	b.registers = b.registers[:0]
	b.expiry, b.suspects, b.firstRow, b.memory, b.err, b.bytes = nil, nil, 0, 0, nil, 0
}

// clearBuilt takes back what build has made of what b took.
func (b *batch) clearBuilt() {
	b.kv.Reset()
	for i := range b.perShard {
		clear(b.perShard[i])
		b.perShard[i] = b.perShard[i][:0]
	}
	clear(b.answers)
	b.answers = b.answers[:0]
	clear(b.full)
	b.full = b.full[:0]
	b.aside, b.gone = nil, 0
	b.complete, b.nextRow, b.puts, b.finishes = 0, 0, false, false
	for i := range b.registers {
		r := &b.registers[i]
		r.block, r.heir, r.refusal = 0, false, protocol.Refusal{}
	}
	if b.expiry != nil {
		b.expiry.removed = [expireKinds]int{}
	}
}

// runCommitter builds one batch after the other and hands them to the syncer. The channel is unbuffered: while
// batch k syncs, batch k+1 is built and given to Pebble, whose log writer takes it up when k's sync ends, and everything that
// comes meanwhile gathers for k+2.
func (d *DB) runCommitter() {
	defer close(d.syncing)
	for range batchesInFlight {
		d.free <- d.newBatch()
	}
	for {
		b := <-d.free
		if !d.next(b) {
			return
		}
		d.write(b)
		d.syncing <- b
	}
}

// next fills b with what is pending, and waits until there is something. It returns false when the DB closes, nothing is
// pending, and nothing under way can still bring something.
func (d *DB) next(b *batch) bool {
	var timer <-chan time.Time
	for {
		d.mu.Lock()
		p := &d.pending
		now := time.Now()
		yes, until := p.due(now)
		if yes {
			p.take(b)
			p.inFlight++
			b.err = p.failed
			d.mu.Unlock()
			return true
		}
		if p.closing && p.inFlight == 0 {
			p.stopped = true
			d.mu.Unlock()
			return false
		}
		p.sleeping = true
		d.mu.Unlock()

		timer = nil
		if !until.IsZero() {
			timer = time.After(until.Sub(now))
		}
		select {
		case <-d.kick:
		case <-timer:
		}
		d.mu.Lock()
		d.pending.sleeping = false
		d.mu.Unlock()
	}
}

// write builds b and gives it to Pebble. An error here means that a row could not be read, for good: nothing of b is written,
// and the store stops taking anything, for a batch left out would break the order of those behind it.
func (d *DB) write(b *batch) {
	if b.err == nil {
		b.err = d.insist(func() error { return d.builder.build(d, b) })
	}
	if b.err == nil && b.complete < len(b.commits) {
		d.mu.Lock()
		d.pending.giveBack(b)
		d.mu.Unlock()
	}
	if b.err == nil {
		if len(b.appends) > 0 {
			d.at("before_append")
		}
		if b.puts {
			d.at("before_mailbox_write")
		}
		if b.finishes {
			d.at("before_finish")
		}
		if b.expiry != nil {
			d.at("before_expiry")
		}
		b.writtenAt = time.Now()
		if !b.kv.Empty() {
			b.bytes = b.kv.Len() // now: Pebble keeps the contents of a very large batch
			b.err = d.kv.ApplyNoSyncWait(b.kv, pebble.Sync)
		}
	}
	if b.err != nil {
		d.fail(b.err)
		return
	}
	if len(b.appends) > 0 {
		d.at("after_append_before_sync")
	}
}

// insist reads until a read succeeds that failed for a reason that may pass: too many open files, a disk or a network that
// does not answer for a moment. Meanwhile sends gather until they are refused as overloaded. It gives up when the DB closes, and after
// maxReadTries: then only a restart can help.
func (d *DB) insist(read func() error) error {
	for try := 1; ; try++ {
		err := read()
		if err == nil || !mayPass(err) || try >= maxReadTries {
			if try > 1 {
				d.stall(nil)
			}
			return err
		}
		d.count.readRetries.Add(1)
		if try == 1 {
			d.log.Error("the store waits: a read failed and is tried again", "error", err, "every", readRetry)
			d.stall(err)
		}
		select {
		case <-time.After(readRetry):
		case <-d.closing:
			try = maxReadTries - 1
		}
	}
}

func mayPass(err error) bool {
	return !errors.Is(err, errRow) && !errors.Is(err, ErrClosed) && !pebble.IsCorruptionError(err)
}

func (d *DB) stall(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending.stalled = err
}

// fail stops the store for good. The process goes on, so that an operator can see why.
func (d *DB) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.pending.failed == nil {
		d.pending.failed = fmt.Errorf("the store has failed: %w", err)
		d.pending.trimUntil = time.Time{} // the log is left as it is
		d.log.Error("the store has failed and refuses everything until a restart", "error", err)
	}
}

// runSyncer waits for each batch to be durable and reports it.
func (d *DB) runSyncer() {
	defer close(d.stop)
	d.greet()
	for b := range d.syncing {
		if b.err == nil {
			d.sync(b)
			d.report(b)
		} else {
			d.refuse(b)
		}
		d.settle(b)
		b.recycle()
		d.free <- b
	}
}

// greet tells what a new owner must know: which mailboxes are full, which shards have something to read.
func (d *DB) greet() {
	err := d.insist(func() error {
		return d.fullMailboxes(func(user, device string) { d.hooks.MailboxFull(user, device, true) })
	})
	if err != nil {
		d.fail(err)
	}
	for i, s := range d.shards {
		if s.unreadNow.Load() > 0 {
			d.hooks.Wake(i)
		}
	}
}

// sync waits until b is on stable storage. Pebble reports a failed WAL here too (its Fatalf is for writes that it waits for
// itself): the same end, for the same reason.
func (d *DB) sync(b *batch) {
	if b.bytes == 0 {
		return
	}
	d.count.lastSync.Store(b.writtenAt.UnixNano())
	if d.cfg.skipSyncWait {
		b.kv = d.newWrite() // the other is still being synced
	} else if err := b.kv.SyncWait(); err != nil {
		pebbleLogger{d.log, d.cfg.exit}.Fatalf("sync of the log failed: %v", err)
	} else if n := len(b.appends); n > 0 {
		d.durable = b.appends[n-1].Position
	}
	d.count.lastSync.Store(0)
	d.count.syncNanos.Add(uint64(time.Since(b.writtenAt)))
	d.count.batches.Add(1)
	d.count.bytes.Add(uint64(b.bytes))
}

// report tells everyone whose work b carried that it is durable: senders, shards, committers, registrars.
func (d *DB) report(b *batch) {
	if n := len(b.appends); n > 0 {
		if b.appends[n-1].Position > d.durable {
			d.count.early.Add(1)
		}
		d.at("after_sync_before_answer")
		for i, records := range b.perShard {
			if len(records) > 0 {
				d.shards[i].publish(records)
			}
		}
		d.hooks.Answer(b.answers)
		d.count.appends.Add(uint64(len(b.answers)))
		for i, records := range b.perShard {
			if len(records) > 0 {
				d.hooks.Wake(i)
			}
		}
	}
	if b.puts {
		d.at("after_mailbox_write")
	}
	d.countDamage(b)
	for _, c := range b.full {
		d.hooks.MailboxFull(c.user, c.device, c.full)
	}
	for _, c := range b.commits {
		if low := &d.shards[c.Shard].lowWater; c.LowWater > low.Load() {
			low.Store(c.LowWater)
		}
	}
	if b.finishes {
		d.at("after_finish_before_trim")
	}
	for _, c := range b.commits {
		if c.Done != nil {
			c.Done()
		}
	}
	d.count.commits.Add(uint64(len(b.commits)))
	for i := range b.registers {
		r := &b.registers[i]
		r.done(r.block, r.heir, r.refusal)
	}
	d.count.registers.Add(uint64(len(b.registers)))
	if b.expiry != nil {
		d.at("after_expiry")
		for kind, n := range b.expiry.removed {
			d.count.expired[kind].Add(uint64(n))
		}
		b.expiry.done()
	}
}

// refuse answers a batch that was not written. Every later one is refused too, so all later records of a
// stream fail with the first. Done of its commits is never called: nothing may be built on them.
func (d *DB) refuse(b *batch) {
	b.answers = b.answers[:0]
	now := d.nowMs()
	for _, r := range b.appends {
		b.answers = append(b.answers, protocol.Answer{
			To: r.From, Seq: r.Seq, ID: r.ID, Millis: now,
			Refusal: protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: retryInternalMs},
		})
	}
	if len(b.answers) > 0 {
		d.hooks.Answer(b.answers)
	}
	for _, r := range b.registers {
		r.done(0, false, protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: retryInternalMs})
	}
}

// settle gives back what b's sends held of the limits. Their records belong to delivery by now.
func (d *DB) settle(b *batch) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := &d.pending
	p.waitingSends -= len(b.appends)
	p.waitingBytes -= b.memory
	p.inFlight--
	if b.finishes && p.trimUntil.IsZero() && p.failed == nil {
		p.trimUntil = time.Now().Add(trimInterval)
		d.wakeLocked()
	}
	if p.closing {
		d.wakeLocked()
	}
}

// at is a crash point.
func (d *DB) at(name string) {
	if d.cfg.atPoint != nil {
		d.cfg.atPoint(name)
	}
	backend.CrashPoint(name)
}
