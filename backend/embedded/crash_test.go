package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// This file crashes the store: while a workload runs, the file system is cloned at every crash point as a power cut would
// leave it, with 0, 50 and 100 % of what was not synced. Each clone is opened and compared with what the world had been told before.

// crashWorld is everything that the world was told, in the order of telling. Lists only grow, so the length of each is
// a snapshot of it.
type crashWorld struct {
	mu        sync.Mutex
	changed   *sync.Cond
	taken     map[protocol.MessageID]*backend.Record
	answered  []protocol.Answer
	committed []*backend.Commit // Done was called
	asked     []*backend.Commit // given to Commit
	drawn     []drawnBlock      // registrations answered
	positions map[uint64]protocol.MessageID
}

type drawnBlock struct {
	stream backend.Stream
	block  uint32
}

// told is a snapshot of what a crash must not take back.
type told struct {
	answered  []protocol.Answer
	committed []*backend.Commit
	drawn     []drawnBlock
}

func newCrashWorld() *crashWorld {
	w := &crashWorld{taken: make(map[protocol.MessageID]*backend.Record), positions: make(map[uint64]protocol.MessageID)}
	w.changed = sync.NewCond(&w.mu)
	return w
}

func (w *crashWorld) told() told {
	w.mu.Lock()
	defer w.mu.Unlock()
	return told{slices.Clip(w.answered), slices.Clip(w.committed), slices.Clip(w.drawn)}
}

func (w *crashWorld) hooks() backend.Hooks {
	return backend.Hooks{Answer: func(batch []protocol.Answer) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.answered = append(w.answered, batch...)
		w.changed.Broadcast()
	}}
}

// send appends record n: five users write to each other from one device each.
func (w *crashWorld) send(d *DB, n int) protocol.Refusal {
	from, to := fmt.Sprintf("user%d", n%5), fmt.Sprintf("user%d", n/5%4)
	r := &backend.Record{
		Message: protocol.Message{
			Conversation: protocol.ConversationHash(from, to), Sender: from, Receiver: to,
			Content: fmt.Appendf(nil, "message %d %s", n, string(make([]byte, n*37%900))),
		},
		Device: "phone", Epoch: 1, Seq: protocol.FirstSeq(uint32(n/50)) + uint64(n/5%10),
	}
	binary.BigEndian.PutUint64(r.ID[:], uint64(n+1))
	kept := *r
	w.mu.Lock()
	w.taken[r.ID] = &kept
	w.mu.Unlock()
	return d.Append(r)
}

func (w *crashWorld) wait(condition func() bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for !condition() {
		w.changed.Wait()
	}
}

// deliver is a delivery of one shard, without devices: it finishes what it reads, in order, a third as acknowledged and the rest
// through mailboxes, of which half are acknowledged later.
func (w *crashWorld) deliver(t *testing.T, d *DB, shard int, rng *rand.Rand, stop <-chan struct{}) {
	var late []backend.MailboxKey
	for {
		records, err := d.Read(shard, nil, 1+rng.IntN(20))
		if err != nil {
			t.Errorf("read: %v", err)
			return
		}
		if len(records) == 0 {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond):
			}
			continue
		}
		c := &backend.Commit{Shard: shard, LowWater: records[len(records)-1].Position + 1}
		for _, key := range late {
			c.Acknowledged = append(c.Acknowledged, key)
			c.Settled = append(c.Settled, backend.OutstandingKey{Conversation: "any", Addressee: key.User, Position: key.Position})
		}
		late = late[:0]
		for _, r := range records {
			key := w.finish(c, r)
			if key.Position%2 == 0 {
				late = append(late, key)
			}
		}
		w.commit(d, c)
	}
}

// finish adds to c what finishes r and returns the mailbox row that it leaves; position 0 for none.
func (w *crashWorld) finish(c *backend.Commit, r *backend.Record) backend.MailboxKey {
	conversation := backend.ConversationKey(r.Sender, r.Receiver)
	row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: conversation, Stream: r.Stream()}}
	row.Finish(r.Seq)
	c.Windows = append(c.Windows, row)
	mark := backend.Mark{Position: r.Position, ID: r.ID, Device: r.Device, Epoch: r.Epoch, Seq: r.Seq}
	if r.ID[7]%3 == 0 {
		c.Receipts = append(c.Receipts, backend.ReceiptRow{
			ReceiptKey: backend.ReceiptKey{Sender: r.Sender, Conversation: conversation, Addressee: r.Receiver},
			Delivered:  mark, Top: mark, ChangedMs: r.AcceptedMs,
		})
		return backend.MailboxKey{}
	}
	put := backend.MailboxPut{User: r.Receiver, Device: "phone", Position: r.Position}
	if r.ID[7]%2 == 0 {
		put.Record = r
	}
	c.Mailbox = append(c.Mailbox, put)
	c.Outstanding = append(c.Outstanding, backend.OutstandingRow{Conversation: "any", Addressee: r.Receiver, Mark: mark})
	c.Urgent = true
	return backend.MailboxKey{User: r.Receiver, Device: "phone", Position: r.Position, ID: r.ID}
}

func (w *crashWorld) commit(d *DB, c *backend.Commit) {
	w.mu.Lock()
	w.asked = append(w.asked, c)
	w.mu.Unlock()
	c.Done = func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.committed = append(w.committed, c)
		w.changed.Broadcast()
	}
	d.Commit(c)
}

func (w *crashWorld) register(d *DB, s backend.Stream) {
	d.Register(s, func(block uint32, _ bool, refusal protocol.Refusal) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if refusal.Code == protocol.OK {
			w.drawn = append(w.drawn, drawnBlock{s, block})
		}
	})
}

// check opens what a crash left and says what of the promises it breaks.
func (w *crashWorld) check(fs vfs.FS, shards int, identity [32]byte, told told) error {
	d, err := Open(Config{Dir: "/data", FS: fs, Shards: shards})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	answer := make(chan protocol.Answer, 1)
	d.Start(backend.Hooks{Answer: func(batch []protocol.Answer) { answer <- batch[0] }})
	err = w.compare(d, told)
	if d.Identity() != identity {
		err = errors.Join(err, errors.New("the identity secret has changed"))
	}
	if err == nil {
		err = errors.Join(checkCounts(d), checkStreams(d))
	}
	if err == nil {
		err = w.checkNext(d, told, answer)
	}
	return errors.Join(err, d.Close())
}

func (w *crashWorld) compare(d *DB, told told) error {
	log, err := w.readLog(d)
	if err != nil {
		return err
	}
	given := make(map[uint64]protocol.MessageID)
	for _, a := range told.answered {
		if other, ok := given[a.Position]; ok {
			return fmt.Errorf("P4: position %d was given to %v and %v", a.Position, other, a.ID)
		}
		given[a.Position] = a.ID
		w.mu.Lock()
		want := w.taken[a.ID]
		w.mu.Unlock()
		if r := log[a.Position]; r != nil {
			if r.ID != a.ID || string(r.Content) != string(want.Content) || r.Sender != want.Sender || r.Seq != want.Seq {
				return fmt.Errorf("P4: at position %d is %v, answered was %v", a.Position, r.ID, a.ID)
			}
			continue
		}
		// Not in the log: only what is finished may leave it.
		win, err := d.Window(backend.WindowKey{Conversation: backend.ConversationKey(want.Sender, want.Receiver), Stream: want.Stream()})
		if err != nil {
			return err
		}
		if !win.Finished(want.Seq) {
			return fmt.Errorf("P1: the answered record %v at position %d is lost", a.ID, a.Position)
		}
	}
	return w.compareCommits(d, told)
}

// readLog reads everything that a restart reads again, per shard in order.
func (w *crashWorld) readLog(d *DB) (map[uint64]*backend.Record, error) {
	log := make(map[uint64]*backend.Record)
	for shard := range d.Shards() {
		last := uint64(0)
		for {
			records, err := d.Read(shard, nil, 64)
			if err != nil {
				return nil, err
			}
			if len(records) == 0 {
				break
			}
			for _, r := range records {
				if r.Position <= last {
					return nil, fmt.Errorf("P4: shard %d reads position %d after %d", shard, r.Position, last)
				}
				last = r.Position
				log[r.Position] = r
			}
		}
	}
	return log, nil
}

// compareCommits checks that every commit reported done is complete. A row of it may be gone if a later commit, reported
// or not, deletes it.
func (w *crashWorld) compareCommits(d *DB, told told) error {
	w.mu.Lock()
	deleted := make(map[backend.MailboxKey]bool)
	settled := make(map[backend.OutstandingKey]bool)
	for _, c := range w.asked {
		for _, k := range c.Acknowledged {
			deleted[k] = true
		}
		for _, k := range c.Settled {
			settled[k] = true
		}
	}
	w.mu.Unlock()
	for n, c := range told.committed {
		if err := compareCommit(d, c, deleted, settled); err != nil {
			return fmt.Errorf("P2: commit %d of %d was done: %w", n, len(told.committed), err)
		}
	}
	for i, a := range told.drawn {
		devices, err := d.Devices(a.stream.User)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(devices, func(dev backend.Device) bool { return dev.Name == a.stream.Device }) {
			return fmt.Errorf("P2: registration %d: device %s is not there", i, a.stream.Device)
		}
	}
	return nil
}

func compareCommit(d *DB, c *backend.Commit, deleted map[backend.MailboxKey]bool, settled map[backend.OutstandingKey]bool) error {
	for _, row := range c.Windows {
		win, err := d.Window(row.WindowKey)
		if err != nil {
			return err
		}
		merged := win
		if merged.Merge(&row.Window); merged != win {
			return fmt.Errorf("window %+v has %+v, without %+v", row.WindowKey, win, row.Window)
		}
	}
	for _, row := range c.Receipts {
		got, err := d.Receipt(row.ReceiptKey)
		if err != nil {
			return err
		}
		if got.Delivered.Position < row.Delivered.Position || got.Top.Position < row.Top.Position {
			return fmt.Errorf("receipt %+v went back to %d", row, got.Delivered.Position)
		}
	}
	for _, o := range c.Outstanding {
		key := backend.OutstandingKey{Conversation: o.Conversation, Addressee: o.Addressee, Position: o.Position}
		got, ok, err := d.FirstOutstanding(o.Conversation, o.Addressee, o.Position)
		if err != nil {
			return err
		}
		if !settled[key] && (!ok || got.Mark != o.Mark) {
			return fmt.Errorf("outstanding row %+v is not there", key)
		}
	}
	for _, p := range c.Mailbox {
		if err := compareRow(d, p, deleted); err != nil {
			return err
		}
	}
	for _, k := range c.Acknowledged {
		if _, ok, err := d.MailboxRow(k); err != nil || ok {
			return fmt.Errorf("the deleted mailbox row %+v is there: %v, %v", k, ok, err)
		}
	}
	return nil
}

func compareRow(d *DB, p backend.MailboxPut, deleted map[backend.MailboxKey]bool) error {
	page, err := d.MailboxPage(p.User, p.Device, p.Position-1, protocol.MessageID{0: 0xff}, 1)
	if err != nil {
		return err
	}
	if len(page) == 1 && page[0].Position == p.Position {
		return nil
	}
	for k := range deleted {
		if k.User == p.User && k.Device == p.Device && k.Position == p.Position {
			return nil
		}
	}
	return fmt.Errorf("the mailbox row of %s at %d is not there", p.User, p.Position)
}

// checkNext checks that what is given from now on is above everything given before.
func (w *crashWorld) checkNext(d *DB, told told, answer <-chan protocol.Answer) error {
	r := &backend.Record{Message: protocol.Message{Conversation: protocol.ConversationHash("new", "newer"), Sender: "new", Receiver: "newer"}}
	if refusal := d.Append(r); refusal.Code != protocol.OK {
		return fmt.Errorf("append after the crash: %v", refusal.Code)
	}
	next := (<-answer).Position
	for _, a := range told.answered {
		if a.Position >= next {
			return fmt.Errorf("P4: position %d was given before the crash, %d after", a.Position, next)
		}
	}
	highest := make(map[backend.Stream]uint32)
	for _, b := range told.drawn {
		highest[b.stream] = max(highest[b.stream], b.block+1)
	}
	for s, least := range highest {
		drawn := make(chan uint32)
		d.Register(s, func(block uint32, _ bool, _ protocol.Refusal) { drawn <- block })
		if block := <-drawn; block < least {
			return fmt.Errorf("P3: block %d of %+v was drawn before, and again after the crash", block, s)
		}
	}
	return nil
}

// checkCounts compares the counts of rows with the rows, and where they are said to begin.
func checkCounts(d *DB) error {
	rows := make(map[string]uint32)
	first := make(map[string]uint64)
	total := uint64(0)
	err := d.scan([]byte{rangeMailbox}, []byte{rangeMailbox + 1}, func(key, _ []byte) (bool, error) {
		name := string(key[1 : len(key)-mailboxPlaceBytes-1]) // user 0 device
		if rows[name]++; rows[name] == 1 {
			first[name] = binary.BigEndian.Uint64(key[len(key)-mailboxPlaceBytes:])
		}
		total++
		return true, nil
	})
	if err != nil {
		return err
	}
	err = d.scan([]byte{rangeCounts}, []byte{rangeCounts + 1}, func(key, value []byte) (bool, error) {
		c, err := decodeCount(value)
		name := string(key[1:])
		if err == nil && c.rows != rows[name] {
			err = fmt.Errorf("mailbox %q has %d rows, its count says %d", name, rows[name], c.rows)
		}
		if err == nil && c.low > first[name] {
			err = fmt.Errorf("mailbox %q begins at %d, its count says %d", name, first[name], c.low)
		}
		delete(rows, name)
		return true, err
	})
	if err != nil {
		return err
	}
	if len(rows) != 0 {
		return fmt.Errorf("%d mailboxes have rows and no count", len(rows))
	}
	if n := d.count.mailboxRows.Load(); n != total {
		return fmt.Errorf("there are %d mailbox rows, the state says %d", total, n)
	}
	return nil
}

// checkStreams checks that every window will be outlived by the row of its stream, and that the stream draws no block
// that the window knows.
func checkStreams(d *DB) error {
	return d.scan([]byte{rangeWindows}, []byte{rangeWindows + 1}, func(key, value []byte) (bool, error) {
		w, err := decodeWindow(value)
		if err != nil {
			return false, err
		}
		n, size := binary.Uvarint(key[1:])
		stream, err := d.get(append([]byte{rangeStreams}, key[1+size+int(n):]...))
		if err != nil {
			return false, err
		}
		if stream == nil {
			return false, fmt.Errorf("P3: the window %q has no stream", key)
		}
		row, err := decodeStreamRow(stream)
		if err == nil && (row.day < w.day || row.next <= w.Blocks[0].Block) {
			err = fmt.Errorf("P3: the window %q of day %d knows block %d, its stream of day %d draws %d next",
				key, w.day, w.Blocks[0].Block, row.day, row.next)
		}
		return true, err
	})
}

// crash is one moment at which the power went: what was told, and the disk with different parts of what was not synced.
type crash struct {
	point string
	told  told
	disks map[int]*vfs.MemFS // by percent of unsynced data kept
}

func takeCrash(w *crashWorld, fs *vfs.MemFS, point string, seed uint64) crash {
	// What was told before the clone must be in it; what is told during it may be.
	c := crash{point: point, told: w.told(), disks: make(map[int]*vfs.MemFS)}
	for _, percent := range []int{0, 50, 100} {
		c.disks[percent] = fs.CrashClone(vfs.CrashCloneCfg{
			UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(seed, uint64(percent))),
		})
	}
	return c
}

// crashPoints are the points in this package.
var crashPoints = []string{
	"before_append", "after_append_before_sync", "after_sync_before_answer",
	"before_mailbox_write", "after_mailbox_write", "before_finish", "after_finish_before_trim",
}

func TestCrashesLoseNothingAnswered(t *testing.T) {
	crashes := 0
	for seed := range uint64(2) {
		crashes += crashRun(t, seed)
	}
	t.Logf("%d crashes at %d points opened with 0, 50 and 100 %% of the unsynced data", crashes, len(crashPoints))
}

func crashRun(t *testing.T, seed uint64) int {
	const perPoint = 4
	rng := rand.New(rand.NewPCG(seed, 1))
	mem := vfs.NewCrashableMem()
	fs := &slowFS{FS: mem}
	w := newCrashWorld()
	var mu sync.Mutex
	var crashes []crash
	passed := make(map[string]int)
	at := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		passed[name]++
		// The first, and then ever rarer ones.
		if n := passed[name]; n > 3 && (n&(n-1) != 0 || len(crashes) >= perPoint*len(crashPoints)) {
			return
		}
		crashes = append(crashes, takeCrash(w, mem, name, seed))
	}
	d, err := Open(Config{Dir: "/data", FS: fs, Shards: 2, MailboxRows: 20, RingRecords: 16, atPoint: at})
	if err != nil {
		t.Fatal(err)
	}
	var syncs sync.Mutex
	fs.onSync(func() error { // a disk takes its time: batches form, and crashes find something not synced
		syncs.Lock()
		pause := time.Duration(rng.IntN(400)) * time.Microsecond
		syncs.Unlock()
		time.Sleep(pause)
		return nil
	})
	d.Start(w.hooks())
	stop := make(chan struct{})
	var deliveries sync.WaitGroup
	for shard := range d.Shards() {
		deliveries.Go(func() { w.deliver(t, d, shard, rand.New(rand.NewPCG(seed, uint64(shard)+2)), stop) })
	}
	const sends = 300
	for n := range sends {
		if refusal := w.send(d, n); refusal.Code != protocol.OK {
			t.Fatalf("append refused: %v", refusal.Code)
		}
		if n%50 == 0 {
			w.register(d, backend.Stream{User: fmt.Sprintf("user%d", n%3), Device: fmt.Sprintf("device%d", n/50%5), Epoch: uint64(n % 2)})
		}
		if n%25 == 24 { // some at a time
			w.wait(func() bool { return len(w.answered) > n-5 })
		}
	}
	w.wait(func() bool { return len(w.answered) == sends })
	close(stop)
	deliveries.Wait()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	crashes = append(crashes, takeCrash(w, mem, "after close", seed))

	for _, name := range crashPoints {
		if passed[name] == 0 {
			t.Errorf("seed %d: nothing passed the crash point %s", seed, name)
		}
	}
	for i, c := range crashes {
		for percent, disk := range c.disks {
			if err := w.check(disk, 1+i%4, d.Identity(), c.told); err != nil {
				t.Errorf("seed %d: crash %d at %s with %d %% of the unsynced data, after %d answers: %v",
					seed, i, c.point, percent, len(c.told.answered), err)
			}
		}
	}
	return len(crashes) * 3
}

// TestSkippedSyncIsFound removes the wait for the sync and expects the crash check to find the loss; with the
// wait, the same moments lose nothing. The disk stands still, so neither depends on luck.
func TestSkippedSyncIsFound(t *testing.T) {
	for _, skip := range []bool{false, true} {
		t.Run(fmt.Sprintf("skip=%v", skip), func(t *testing.T) {
			mem := vfs.NewCrashableMem()
			fs := &slowFS{FS: mem}
			w := newCrashWorld()
			d, err := Open(Config{Dir: "/data", FS: fs, Shards: 1, skipSyncWait: skip})
			if err != nil {
				t.Fatal(err)
			}
			gate := make(chan struct{})
			entered := make(chan struct{}, 100)
			fs.onSync(func() error {
				entered <- struct{}{}
				<-gate
				return nil
			})
			d.Start(w.hooks())
			if refusal := w.send(d, 0); refusal.Code != protocol.OK {
				t.Fatal(refusal)
			}
			<-entered // the batch is written, and its sync has begun
			if skip {
				w.wait(func() bool { return len(w.answered) == 1 })
			}
			c := takeCrash(w, mem, "during the sync", 0)
			if !skip && len(c.told.answered) != 0 {
				t.Fatal("answered before the sync was done")
			}
			err = w.check(c.disks[0], 1, d.Identity(), c.told)
			if skip != (err != nil) {
				t.Errorf("the check found: %v", err)
			}
			close(gate)
			w.wait(func() bool { return len(w.answered) == 1 })
			if !skip {
				c = takeCrash(w, mem, "after the sync", 0)
				if err := w.check(c.disks[0], 1, d.Identity(), c.told); err != nil || len(c.told.answered) != 1 {
					t.Errorf("after the sync, %d answers: %v", len(c.told.answered), err)
				}
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
