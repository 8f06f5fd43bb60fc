package embedded

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

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
