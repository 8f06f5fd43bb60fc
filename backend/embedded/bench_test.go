package embedded

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"millrace/backend"
	"millrace/protocol"
)

// Run the pair with
//
//	go test -run - -bench '256$' -benchtime 5s -count 3 ./backend/embedded
//
// and compare appends/s with the bare Pebble of the same run: the same options, batch shape, pipeline and number of callers.
const benchCallers = 256

var benchContent = []byte("a chat message of about the usual length, which is a sentence or two, as people write them to each other; 140 bytes or thereabouts, no more.")

func benchRecord(caller int) *backend.Record {
	from, to := fmt.Sprintf("user%d", caller), fmt.Sprintf("user%d", caller+1)
	r := &backend.Record{
		Message: protocol.Message{Conversation: protocol.ConversationHash(from, to), Sender: from, Receiver: to, Content: benchContent},
		Device:  "phone", Epoch: 1, Seq: 1, From: protocol.Session{Conn: uint64(caller)},
	}
	r.ID[0], r.ID[1] = byte(caller), byte(caller>>8)
	return r
}

// callers runs b.N operations in benchCallers goroutines; each waits on its own channel after it has asked.
func callers(b *testing.B, ask func(caller int), answered []chan struct{}) {
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ReportAllocs()
	b.ResetTimer()
	var wg sync.WaitGroup
	for caller := range benchCallers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				ask(caller)
				<-answered[caller]
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "appends/s")
}

func channels() []chan struct{} {
	list := make([]chan struct{}, benchCallers)
	for i := range list {
		list[i] = make(chan struct{}, 1)
	}
	return list
}

func BenchmarkAppend256(b *testing.B) { benchmarkAppend(b, false) }

// BenchmarkAppendAndFinish256 also commits, for every record, what a delivered message leaves: its window, its receipt, and the progress
// that lets the log be trimmed.
func BenchmarkAppendAndFinish256(b *testing.B) { benchmarkAppend(b, true) }

func benchmarkAppend(b *testing.B, finish bool) {
	d, err := Open(Config{Dir: b.TempDir(), Shards: 2, MinFreeBytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	answered := channels()
	wake := make([]chan struct{}, d.Shards())
	for i := range wake {
		wake[i] = make(chan struct{}, 1)
	}
	d.Start(backend.Hooks{
		Answer: func(batch []protocol.Answer) {
			for i := range batch {
				answered[batch[i].To.Conn] <- struct{}{}
			}
		},
		Wake: func(shard int) {
			select {
			case wake[shard] <- struct{}{}:
			default:
			}
		},
	})
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for shard := range d.Shards() {
		readers.Go(func() { benchDeliver(d, shard, finish, wake[shard], stop) })
	}
	records := make([]*backend.Record, benchCallers)
	for i := range records {
		records[i] = benchRecord(i)
	}
	callers(b, func(caller int) {
		// Delivery may still look at the record before; a copy is what a publisher makes anyway.
		r := *records[caller]
		if refusal := d.Append(&r); refusal.Code != protocol.OK {
			b.Errorf("append refused: %v", refusal.Code)
			answered[caller] <- struct{}{}
		}
	}, answered)
	batches := d.count.batches.Load()
	b.ReportMetric(float64(b.N)/float64(max(batches, 1)), "records/batch")
	close(stop)
	readers.Wait()
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

func benchDeliver(d *DB, shard int, finish bool, wake <-chan struct{}, stop <-chan struct{}) {
	var records []*backend.Record
	for {
		select {
		case <-wake:
		case <-stop:
			return
		}
		for {
			var err error
			if records, err = d.Read(shard, records[:0], 1024); err != nil {
				panic(err)
			}
			if len(records) == 0 {
				break
			}
			c := &backend.Commit{Shard: shard, LowWater: records[len(records)-1].Position + 1}
			for _, r := range records {
				if !finish {
					break
				}
				key := backend.ConversationKey(r.Sender, r.Receiver)
				row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: key, Stream: r.Stream()}}
				row.Finish(r.Seq)
				c.Windows = append(c.Windows, row)
				mark := backend.Mark{Position: r.Position, ID: r.ID, Device: r.Device, Epoch: r.Epoch, Seq: r.Seq}
				c.Receipts = append(c.Receipts, backend.ReceiptRow{
					ReceiptKey: backend.ReceiptKey{Sender: r.Sender, Conversation: key, Addressee: r.Receiver},
					Delivered:  mark, Top: mark, ChangedMs: r.AcceptedMs,
				})
			}
			d.Commit(c)
		}
	}
}

// BenchmarkBarePebble256 is the yardstick: one committer that gathers what is there into one batch of up to 1 MiB, keys in
// sequence, values of the same size, the next batch built while one syncs.
func BenchmarkBarePebble256(b *testing.B) {
	cfg := Config{Dir: b.TempDir()}
	if err := cfg.validate(); err != nil {
		b.Fatal(err)
	}
	o := pebbleOptions(nil, cfg.Logger, cfg.exit, &stallCounts{})
	o.WithFSDefaults()
	db, err := pebble.Open(cfg.Dir, o)
	if err != nil {
		b.Fatal(err)
	}
	answered := channels()
	value := appendRecord(nil, benchRecord(1))
	asked := make(chan int, benchCallers)
	type written struct {
		batch *pebble.Batch
		who   []int
	}
	syncing := make(chan written)
	var workers sync.WaitGroup
	workers.Go(func() { // committer
		defer close(syncing)
		position := uint64(0)
		var key [logKeyBytes]byte
		for caller := range asked {
			w := written{batch: db.NewBatchWithSize(128 << 10)}
			for more := true; more; {
				position++
				_ = w.batch.Set(appendLogKey(key[:0], position), value, nil)
				w.who = append(w.who, caller)
				more = w.batch.Len() < maxBatchBytes
				select {
				case c, ok := <-asked:
					caller, more = c, more && ok
				default:
					more = false
				}
			}
			if err := db.ApplyNoSyncWait(w.batch, pebble.Sync); err != nil {
				panic(err)
			}
			syncing <- w
		}
	})
	workers.Go(func() { // syncer
		for w := range syncing {
			if err := w.batch.SyncWait(); err != nil {
				panic(err)
			}
			for _, caller := range w.who {
				answered[caller] <- struct{}{}
			}
			_ = w.batch.Close()
		}
	})
	callers(b, func(caller int) { asked <- caller }, answered)
	close(asked)
	workers.Wait()
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkRestart400k opens a directory with 400 000 unfinished records and reads them all, as delivery does after a restart.
// DESIGN.md allows a restart 5 s for it.
func BenchmarkRestart400k(b *testing.B) {
	const unfinished = 400_000
	cfg := Config{Dir: b.TempDir(), Shards: 2, MinFreeBytes: 1 << 20}
	d, err := Open(cfg)
	if err != nil {
		b.Fatal(err)
	}
	answered := make(chan int, 1024)
	d.Start(backend.Hooks{Answer: func(batch []protocol.Answer) { answered <- len(batch) }})
	waiting := 0
	for n := range unfinished {
		if refusal := d.Append(benchRecord(n % 50_000)); refusal.Code != protocol.OK {
			b.Fatal(refusal)
		}
		if waiting++; waiting >= 20_000 || n == unfinished-1 {
			for waiting > 0 {
				waiting -= <-answered
			}
			readAll(b, d)
		}
	}
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		d, err := Open(cfg)
		if err != nil {
			b.Fatal(err)
		}
		d.Start(backend.Hooks{})
		if n := readAll(b, d); n != unfinished {
			b.Fatalf("%d records after a restart", n)
		}
		if err := d.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func readAll(b *testing.B, d *DB) int {
	n := 0
	var records []*backend.Record
	for shard := range d.Shards() {
		for {
			var err error
			if records, err = d.Read(shard, records[:0], 1024); err != nil {
				b.Fatal(err)
			}
			if len(records) == 0 {
				break
			}
			n += len(records)
		}
	}
	return n
}

// BenchmarkMailbox is 1 000 puts and 1 000 deletes of mailbox rows in two commits.
func BenchmarkMailbox(b *testing.B) {
	d, err := Open(Config{Dir: b.TempDir(), Shards: 1, MinFreeBytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{}, 1)
	d.Start(backend.Hooks{})
	const rows = 1000
	position := uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		put, del := &backend.Commit{Urgent: true}, &backend.Commit{Urgent: true}
		for i := range rows {
			r := benchRecord(i)
			position++
			r.Position = position
			put.Mailbox = append(put.Mailbox, backend.MailboxPut{User: r.Receiver, Device: "phone", Record: r, Position: position})
			del.Acknowledged = append(del.Acknowledged, backend.MailboxKey{User: r.Receiver, Device: "phone", Position: position, ID: r.ID})
		}
		put.Done = func() { done <- struct{}{} }
		del.Done = put.Done
		d.Commit(put)
		<-done
		d.Commit(del)
		<-done
	}
	b.ReportMetric(float64(b.N)*rows*2/b.Elapsed().Seconds(), "rows/s")
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkReads are the point reads that the owner makes for a message.
func BenchmarkReads(b *testing.B) {
	d, err := Open(Config{Dir: b.TempDir(), Shards: 1, MinFreeBytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	d.Start(backend.Hooks{})
	var registered sync.WaitGroup
	const users = 10_000
	for i := range users {
		registered.Add(1)
		d.Register(backend.Stream{User: fmt.Sprintf("user%d", i), Device: "phone", Epoch: 1}, func(uint32, bool, protocol.Refusal) { registered.Done() })
	}
	registered.Wait()
	c := &backend.Commit{Urgent: true, Done: registered.Done}
	for i := range users {
		c.Outstanding = append(c.Outstanding, backend.OutstandingRow{Conversation: fmt.Sprintf("a\x00user%d", i), Addressee: "a", Mark: backend.Mark{Position: 1}})
	}
	registered.Add(1)
	d.Commit(c)
	registered.Wait()
	if err := d.kv.Flush(); err != nil {
		b.Fatal(err)
	}
	b.Run("devices", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if devices, err := d.Devices(fmt.Sprintf("user%d", i*7919%users)); err != nil || len(devices) != 1 {
				b.Fatal(devices, err)
			}
		}
	})
	b.Run("outstanding/none", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, ok, err := d.FirstOutstanding(fmt.Sprintf("b\x00user%d", i*7919%users), "b", 0); ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	})
	b.Run("window/none", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			if _, err := d.Window(backend.WindowKey{Conversation: "b\x00c", Stream: backend.Stream{User: "b", Epoch: uint64(i)}}); err != nil {
				b.Fatal(err)
			}
		}
	})
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkMailboxPage reads the first page of mailboxes in which 100 000 rows were just put and deleted: one that has none left, which is
// what an heir's every drain reads; one that holds 64 new rows behind them; and one that was never used.
func BenchmarkMailboxPage(b *testing.B) {
	const deleted, waiting, each = 100_000, 64, 1000
	d, err := Open(Config{Dir: b.TempDir(), Shards: 1, MinFreeBytes: 1 << 20})
	if err != nil {
		b.Fatal(err)
	}
	d.Start(backend.Hooks{})
	commit := func(c *backend.Commit) {
		done := make(chan struct{})
		c.Urgent, c.Done = true, func() { close(done) }
		d.Commit(c)
		<-done
	}
	position := uint64(0)
	put := func(c *backend.Commit, user string) backend.MailboxKey {
		r := benchRecord(int(position) % benchCallers)
		position++
		r.Position = position
		c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: user, Record: r, Position: position})
		return backend.MailboxKey{User: user, Position: position, ID: r.ID}
	}
	for _, user := range []string{"emptied", "drained"} {
		var keys []backend.MailboxKey
		for range deleted / each {
			c := &backend.Commit{}
			for range each {
				keys = append(keys, put(c, user))
			}
			commit(c)
		}
		c := &backend.Commit{}
		for range waiting {
			if user == "drained" {
				put(c, user)
			}
		}
		commit(c)
		for first := 0; first < deleted; first += each {
			commit(&backend.Commit{Acknowledged: keys[first : first+each]})
		}
	}
	for _, c := range []struct {
		user string
		want int
	}{{"emptied", 0}, {"drained", waiting}, {"stranger", 0}} {
		b.Run(c.user, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if page, err := d.MailboxPage(c.user, "", 0, protocol.MessageID{}, waiting); err != nil || len(page) != c.want {
					b.Fatal(len(page), err)
				}
			}
		})
	}
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSweep is one step of the sweeper over rows that have not expired.
func BenchmarkSweep(b *testing.B) {
	d, err := Open(Config{Dir: b.TempDir(), Shards: 1, MinFreeBytes: 1 << 20, stillSweeper: true})
	if err != nil {
		b.Fatal(err)
	}
	d.Start(backend.Hooks{})
	for range 100 { // 100 000 mailboxes and windows
		c := &backend.Commit{Urgent: true}
		done := make(chan struct{})
		c.Done = func() { close(done) }
		for range 1000 {
			r := benchRecord(len(c.Mailbox))
			r.Position = uint64(time.Now().UnixMilli()) << protocol.PositionShift
			r.Receiver = fmt.Sprintf("user%d", rand.Uint32())
			c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: r.Receiver, Device: "phone", Record: r, Position: r.Position})
			row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: r.Receiver, Stream: r.Stream()}}
			row.Finish(1)
			c.Windows = append(c.Windows, row)
		}
		d.Commit(c)
		<-done
	}
	if err := d.kv.Flush(); err != nil {
		b.Fatal(err)
	}
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		d.sweeper.passed = d.sweeper.walking
		if _, err := d.sweep(now, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(d.count.sweptRows.Load())/float64(b.N), "rows/op")
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}
