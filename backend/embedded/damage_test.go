package embedded

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// damagedStore is a store whose rows a test spoils.
type damagedStore struct {
	*DB
	t  *testing.T
	fs *vfs.MemFS
	a  *answers
}

func openDamaged(t *testing.T) *damagedStore {
	s := &damagedStore{t: t, fs: vfs.NewMem()}
	s.start()
	return s
}

func (s *damagedStore) start() {
	s.t.Helper()
	s.DB = open(s.t, Config{FS: s.fs, Shards: 1, RingRecords: 2, MailboxRows: 4})
	s.a = newAnswers()
	s.Start(backend.Hooks{Answer: s.a.take})
}

func (s *damagedStore) restart() {
	s.t.Helper()
	s.closeNow(s.t)
	s.start()
}

// spoil overwrites a row that is there with what no version writes, or cuts it short by its last byte.
func (s *damagedStore) spoil(key []byte, cut bool) {
	s.t.Helper()
	value, err := s.get(key)
	if err != nil || value == nil {
		s.t.Fatalf("there is no row %q: %v", key, err)
	}
	spoiled := []byte{99}
	if cut {
		spoiled = value[:len(value)-1]
	}
	if err := s.kv.Set(key, spoiled, pebble.Sync); err != nil {
		s.t.Fatal(err)
	}
}

func (s *damagedStore) commit(c *backend.Commit) {
	done := make(chan struct{})
	c.Urgent, c.Done = true, func() { close(done) }
	s.Commit(c)
	<-done
}

func (s *damagedStore) register(stream backend.Stream) (block uint32, heir bool) {
	s.t.Helper()
	type result struct {
		block   uint32
		heir    bool
		refusal protocol.Refusal
	}
	drawn := make(chan result)
	s.Register(stream, func(block uint32, heir bool, refusal protocol.Refusal) { drawn <- result{block, heir, refusal} })
	r := <-drawn
	if r.refusal.Code != protocol.OK {
		s.t.Fatalf("refused: %+v", r.refusal)
	}
	return r.block, r.heir
}

// mended waits until what was reported is set aside, and checks that it is what was spoiled and nothing else, and that it counts.
func (s *damagedStore) mended(name string, keys ...[]byte) {
	s.t.Helper()
	s.commit(&backend.Commit{}) // behind greet
	s.commit(&backend.Commit{}) // behind what was reported
	var aside []string
	err := s.scan([]byte{rangeDamaged}, []byte{rangeDamaged + 1}, func(key, _ []byte) (bool, error) {
		aside = append(aside, string(key[1:]))
		return true, nil
	})
	var want []string
	for _, key := range keys {
		want = append(want, string(key))
	}
	slices.Sort(want)
	if err != nil || !slices.Equal(aside, want) {
		s.t.Fatalf("set aside: %q, %v; want %q", aside, err, want)
	}
	s.Metrics(func(metric, _ string, _ bool, value float64, labels ...string) {
		if metric == "millrace_embedded_damaged_rows_total" && labels[1] == name && value != float64(len(keys)) {
			s.t.Errorf("%v damaged rows in %s are counted, want %d", value, name, len(keys))
		}
	})
	if err := errors.Join(s.Healthy(), checkCounts(s.DB), checkStreams(s.DB)); err != nil {
		s.t.Error(err)
	}
}

func (s *damagedStore) lost(want float64) {
	s.t.Helper()
	if got := violationCount(s.t, s.DB, "P2"); got != want {
		s.t.Errorf("%v messages are counted as lost, want %v", got, want)
	}
}

func (s *damagedStore) send(n int) []protocol.Answer {
	s.t.Helper()
	for i := range n {
		if refusal := s.Append(smallRecord(i)); refusal.Code != protocol.OK {
			s.t.Fatal(refusal)
		}
	}
	return s.a.wait(n)
}

// TestDamagedRecords: P2, of a damaged log the rest is delivered, whether it is read at the start, by a shard that lags, or
// for a mailbox row; what is lost is counted, and set aside.
func TestDamagedRecords(t *testing.T) {
	s := openDamaged(t)
	list := s.send(10)
	var spoiled [][]byte
	for i, n := range []int{3, 8} {
		key := appendLogKey(nil, list[n].Position)
		spoiled = append(spoiled, key)
		s.spoil(key, false)
		if i == 0 {
			record := smallRecord(0)
			if err := s.kv.Set(key, appendRecord(nil, record)[:recordSize(record)-len(record.Content)-1], pebble.Sync); err != nil {
				t.Fatal(err)
			}
		}
	}
	readAll := func(want int) {
		t.Helper()
		var records []*backend.Record
		for range 10 {
			var err error
			if records, err = s.Read(0, records, len(records)+3); err != nil {
				t.Fatal(err)
			}
		}
		if len(records) != want || s.shards[0].unreadNow.Load() != 0 {
			t.Fatalf("%d records were read, want %d; %d are unread", len(records), want, s.shards[0].unreadNow.Load())
		}
	}
	readAll(8)
	s.lost(2)
	s.mended("log", spoiled...)
	s.restart()
	readAll(8)
	s.lost(0)

	// At the start, before anything else happens.
	spoiled = append(spoiled, appendLogKey(nil, list[0].Position))
	s.spoil(spoiled[2], false)
	s.restart()
	s.lost(1)
	readAll(7)
	s.commit(&backend.Commit{})
	if value, err := s.get(spoiled[2]); value != nil || err != nil {
		t.Fatalf("the damaged record is where it was: %x, %v", value, err)
	}
	s.restart()
	s.lost(0)
	readAll(7)

	// For mailbox rows, two of one message: the others go on.
	spoiled = append(spoiled, appendLogKey(nil, list[5].Position))
	s.spoil(spoiled[3], false)
	c := &backend.Commit{LowWater: list[9].Position + 1}
	for _, a := range list[4:7] {
		for _, device := range []string{"", "phone"} {
			c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Device: device, Position: a.Position})
		}
	}
	s.commit(c)
	page, err := s.MailboxPage("bob", "phone", 0, protocol.MessageID{}, 10)
	if err != nil || len(page) != 2 || page[0].Position != list[4].Position || page[1].Position != list[6].Position {
		t.Fatalf("the mailbox has %d rows, %v", len(page), err)
	}
	s.lost(2)
	s.mended("other", spoiled...)
}

// TestDamagedMailbox: P2, the other rows of a mailbox are read, its count stays exact, and the lost one counts.
func TestDamagedMailbox(t *testing.T) {
	for _, way := range []string{"page", "row", "acknowledged"} {
		s := openDamaged(t)
		c := &backend.Commit{}
		var keys []backend.MailboxKey
		for n := range 4 {
			r := smallRecord(n)
			r.Position = uint64(n + 1)
			c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Device: "phone", Record: r, Position: r.Position})
			keys = append(keys, backend.MailboxKey{User: "bob", Device: "phone", Position: r.Position, ID: r.ID})
		}
		s.commit(c)
		key := appendMailboxKey(nil, "bob", "phone", 2, &keys[1].ID)
		s.spoil(key, false)
		if way == "page" {
			for _, after := range []uint64{0, 1, 2} {
				want := 3 - min(after, 1)
				page, err := s.MailboxPage("bob", "phone", after, protocol.MessageID{0: 0xff}, 10)
				if err != nil || uint64(len(page)) != want {
					t.Fatalf("a page has %d rows, %v; want %d", len(page), err, want)
				}
			}
		} else if r, ok, err := s.MailboxRow(keys[1]); r != nil || ok || err != nil {
			t.Fatalf("the damaged row is read: %v, %v, %v", r, ok, err)
		}
		if way == "acknowledged" { // maybe before it is set aside, maybe after
			s.commit(&backend.Commit{Acknowledged: keys[1:2]})
			s.commit(&backend.Commit{})
			if err := checkCounts(s.DB); err != nil {
				t.Fatal(err)
			}
			continue
		}
		s.mended("mailbox", key)
		s.lost(1)
		if page, err := s.MailboxPage("bob", "phone", 0, protocol.MessageID{}, 10); err != nil || len(page) != 3 {
			t.Fatalf("%d rows are left, %v", len(page), err)
		}
	}
}

// TestDamagedCount: a mailbox is counted anew, for a page, a put or a deletion.
func TestDamagedCount(t *testing.T) {
	for _, way := range []string{"page", "put", "delete", "empty"} {
		s := openDamaged(t)
		put := func(n int) backend.MailboxPut {
			r := smallRecord(n)
			r.Position = uint64(n + 1)
			return backend.MailboxPut{User: "bob", Device: "phone", Record: r, Position: r.Position}
		}
		s.commit(&backend.Commit{Mailbox: []backend.MailboxPut{put(5), put(6), put(8)}})
		key := appendMailboxName(nil, rangeCounts, "bob", "phone")
		s.spoil(key, true)
		want := 3
		switch way {
		case "put":
			s.commit(&backend.Commit{Mailbox: []backend.MailboxPut{put(5), put(7)}})
			want = 4
		case "delete":
			s.commit(&backend.Commit{Acknowledged: []backend.MailboxKey{{User: "bob", Device: "phone", Position: 6, ID: smallRecord(5).ID}}})
			want = 2
		case "empty":
			c := &backend.Commit{}
			for _, n := range []int{5, 6, 8} {
				c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: "bob", Device: "phone", Position: uint64(n + 1), ID: smallRecord(n).ID})
			}
			s.commit(c)
			want = 0
		}
		if page, err := s.MailboxPage("bob", "phone", 0, protocol.MessageID{}, 10); err != nil || len(page) != want {
			t.Fatalf("%s: %d rows, %v", way, len(page), err)
		}
		s.mended("counts", key)
	}
}

// TestDamagedWindow: P3, what an outstanding row or a receipt shows to be finished stays finished, with everything before it in
// the stream; P2, what nothing shows does not.
func TestDamagedWindow(t *testing.T) {
	const block = 9
	seq := func(b, send uint32) uint64 { return protocol.FirstSeq(b) + uint64(send) - 1 }
	stream := smallRecord(0).Stream()
	conversation := backend.ConversationKey("alice", "bob")
	mark := func(seq, position uint64, device string) backend.Mark {
		return backend.Mark{Position: position, Device: device, Epoch: stream.Epoch, Seq: seq}
	}
	key := backend.WindowKey{Conversation: conversation, Stream: stream}
	receipt := func(delivered, top backend.Mark) []backend.ReceiptRow {
		return []backend.ReceiptRow{{ReceiptKey: backend.ReceiptKey{Sender: "alice", Conversation: conversation, Addressee: "bob"}, Delivered: delivered, Top: top}}
	}
	outstanding := func(marks ...backend.Mark) (rows []backend.OutstandingRow) {
		for _, m := range marks {
			rows = append(rows, backend.OutstandingRow{Conversation: conversation, Addressee: "bob", Mark: m})
		}
		return rows
	}
	const inLog = protocol.MaxPosition
	for name, c := range map[string]struct {
		left backend.Commit
		last uint64 // finished, 0 for none
	}{
		"nothing":      {},
		"another":      {left: backend.Commit{Receipts: receipt(mark(seq(block, 5), 5, "tablet"), mark(seq(block, 6), 6, "tablet"))}},
		"receipt":      {left: backend.Commit{Receipts: receipt(mark(seq(block, 100), 5, "phone"), mark(seq(block, 99), 6, "tablet"))}, last: seq(block, 100)},
		"top":          {left: backend.Commit{Receipts: receipt(mark(seq(block, 1), 5, "phone"), mark(seq(block, 2), 6, "phone"))}, last: seq(block, 2)},
		"in the log":   {left: backend.Commit{Receipts: receipt(mark(seq(block, 1), 5, "phone"), mark(seq(block, 2), inLog, "phone"))}, last: seq(block, 1)},
		"outstanding":  {left: backend.Commit{Outstanding: outstanding(mark(seq(2, 7), 7, "phone"), mark(seq(block, 8), 8, "phone"), mark(seq(block, 9), 9, "tablet"))}, last: seq(block, 8)},
		"of first":     {left: backend.Commit{Outstanding: outstanding(mark(seq(0, 3), 7, "phone"))}, last: seq(0, 3)},
		"other direct": {left: backend.Commit{Outstanding: []backend.OutstandingRow{{Conversation: conversation, Addressee: "alice", Mark: mark(seq(0, 3), 7, "phone")}}}},
	} {
		for _, way := range []string{"read", "commit"} {
			t.Run(name+"/"+way, func(t *testing.T) {
				s := openDamaged(t)
				s.send(1) // in the log, later than every mark but one
				w := backend.WindowRow{WindowKey: key}
				w.Finish(seq(block, 1))
				left := c.left
				left.Windows = []backend.WindowRow{w}
				s.commit(&left)
				s.spoil(appendWindowKey(nil, &key), true)
				next := seq(block+2, 1) // newer than all
				if way == "commit" {
					w = backend.WindowRow{WindowKey: key}
					w.Finish(next)
					s.commit(&backend.Commit{Windows: []backend.WindowRow{w}})
				}
				check := func() {
					t.Helper()
					got, err := s.Window(key)
					if err != nil || got.Finished(next) != (way == "commit") {
						t.Fatalf("%+v, %v", got, err)
					}
					for _, n := range []uint64{seq(0, 1), seq(1, 500), seq(block-4, 7), seq(block-1, 1), seq(block, 1), seq(block, 2), seq(block, 8), seq(block, 9), seq(block, 100), seq(block, 101), seq(block+1, 1)} {
						if got.Finished(n) != (n <= c.last) {
							t.Errorf("number %d of block %d is finished: %v; finished is everything up to %d of block %d",
								protocol.SeqSend(n), protocol.SeqBlock(n), got.Finished(n), protocol.SeqSend(c.last), protocol.SeqBlock(c.last))
						}
					}
				}
				check()
				s.mended("windows", appendWindowKey(nil, &key))
				check()
				s.restart()
				check()
			})
		}
	}
}

// TestDamagedStream: P3, no block is drawn again.
func TestDamagedStream(t *testing.T) {
	s := openDamaged(t)
	stream := smallRecord(0).Stream()
	for range 3 {
		s.register(stream)
	}
	key := appendStreamKey(nil, &stream)
	s.spoil(key, true)
	first, heir := s.register(stream)
	if !heir || first < 3 || first > protocol.MaxBlock/2 {
		t.Fatalf("block %d, heir %v", first, heir)
	}
	if next, _ := s.register(stream); next != first+1 {
		t.Fatalf("block %d after %d", next, first)
	}
	s.mended("streams", key)
}

// TestDamagedDevices: P2, every device stays an addressee, and one of them heir.
func TestDamagedDevices(t *testing.T) {
	for _, read := range []bool{true, false} {
		s := openDamaged(t)
		names := []string{"tablet", "phone", "laptop"}
		for _, name := range names {
			for epoch := range uint64(2) {
				s.register(backend.Stream{User: "bob", Device: name, Epoch: epoch})
			}
		}
		s.register(backend.Stream{User: "bo", Device: "other"})
		key := appendDevicesKey(nil, "bob")
		s.spoil(key, true)
		expect := func(want ...string) {
			t.Helper()
			devices, err := s.Devices("bob")
			heirs := 0
			var got []string
			for _, dev := range devices {
				got = append(got, dev.Name)
				if dev.Heir {
					heirs++
				}
			}
			slices.Sort(got)
			slices.Sort(want)
			if err != nil || heirs != 1 || !slices.Equal(got, want) {
				t.Fatalf("devices %v, %v; want %v and one heir", devices, err, want)
			}
		}
		if read {
			expect(names...)
		} else if _, heir := s.register(backend.Stream{User: "bob", Device: "watch"}); heir {
			t.Error("the fourth device is heir")
		}
		s.mended("devices", key)
		if !read {
			names = append(names, "watch")
		}
		expect(names...)
	}
}

// TestDamagedOutstanding: a receipt does not pass it, and an acknowledgement deletes it, also when both come together.
func TestDamagedOutstanding(t *testing.T) {
	s := openDamaged(t)
	row := backend.OutstandingRow{Conversation: "c", Addressee: "bob", Mark: backend.Mark{Position: 7, Seq: 3, Device: "phone"}}
	key := appendOutstandingKey(nil, "c", "bob", 7)
	first := func() uint64 {
		t.Helper()
		row, _, err := s.FirstOutstanding("c", "bob", 0)
		if err != nil {
			t.Fatal(err)
		}
		return row.Position
	}
	s.commit(&backend.Commit{Outstanding: []backend.OutstandingRow{row}})
	s.spoil(key, true)
	if first() != 7 {
		t.Fatal("the row does not count")
	}
	s.mended("outstanding", key)
	if first() != 7 {
		t.Fatal("the mended row does not count")
	}
	s.commit(&backend.Commit{Settled: []backend.OutstandingKey{{Conversation: "c", Addressee: "bob", Position: 7}}})
	if first() != 0 {
		t.Fatal("the row is still there")
	}
	// In one batch.
	s.commit(&backend.Commit{Outstanding: []backend.OutstandingRow{row}})
	s.spoil(key, true)
	b := s.newBatch()
	b.suspects = [][]byte{key}
	b.commits = append(b.commits, &backend.Commit{Settled: []backend.OutstandingKey{{Conversation: "c", Addressee: "bob", Position: 7}}})
	var other builder
	other.lows = make([]lowWater, 1)
	if err := errors.Join(other.build(s.DB, b), s.kv.Apply(b.kv, pebble.Sync)); err != nil {
		t.Fatal(err)
	}
	if first() != 0 {
		t.Fatal("a row that was settled while it was mended is there again")
	}
}

// TestDamagedReceipt: it begins anew and says too little, not too much.
func TestDamagedReceipt(t *testing.T) {
	s := openDamaged(t)
	row := func(addressee string, position uint64) backend.ReceiptRow {
		return backend.ReceiptRow{ReceiptKey: backend.ReceiptKey{Sender: "alice", Conversation: "c", Addressee: addressee},
			Delivered: backend.Mark{Position: position}, ChangedMs: 5}
	}
	s.commit(&backend.Commit{Receipts: []backend.ReceiptRow{row("bob", 7), row("carol", 8), row("dave", 9)}})
	var keys [][]byte
	for _, name := range []string{"bob", "carol"} {
		k := row(name, 0).ReceiptKey
		keys = append(keys, appendReceiptKey(nil, &k))
		s.spoil(keys[len(keys)-1], true)
	}
	if got, err := s.Receipt(row("bob", 0).ReceiptKey); err != nil || got.Delivered.Position != 0 || got.Addressee != "bob" {
		t.Fatalf("%+v, %v", got, err)
	}
	var listed []string
	err := s.ReceiptsSince("alice", 1, func(r backend.ReceiptRow) bool {
		listed = append(listed, fmt.Sprint(r.Addressee, r.Delivered.Position))
		return true
	})
	if err != nil || strings.Join(listed, " ") != "dave9" {
		t.Fatalf("listed %v, %v", listed, err)
	}
	s.commit(&backend.Commit{Receipts: []backend.ReceiptRow{row("bob", 10), row("carol", 11)}})
	s.mended("receipts", keys...)
	if got, err := s.Receipt(row("carol", 0).ReceiptKey); err != nil || got.Delivered.Position != 11 {
		t.Fatalf("%+v, %v", got, err)
	}
}

// TestDamagedKeys: keys that nobody wrote stop neither the start nor a read.
func TestDamagedKeys(t *testing.T) {
	s := openDamaged(t)
	r := smallRecord(0)
	s.commit(&backend.Commit{Mailbox: []backend.MailboxPut{{User: "bob", Record: r, Position: 1}}})
	s.send(1)
	keys := [][]byte{[]byte("f"), []byte("fbob"), append(appendLogKey(nil, 5), 0),
		append(appendMailboxPrefix(nil, "bob", ""), 1), append(appendOutstandingPrefix(nil, "c", "bob"), 1)}
	for _, key := range keys {
		if err := s.kv.Set(key, nil, pebble.Sync); err != nil {
			t.Fatal(err)
		}
	}
	s.restart()
	if records, err := s.Read(0, nil, 10); err != nil || len(records) != 1 {
		t.Fatalf("%d records, %v", len(records), err)
	}
	if page, err := s.MailboxPage("bob", "", 0, protocol.MessageID{}, 10); err != nil || len(page) != 1 {
		t.Fatalf("%d mailbox rows, %v", len(page), err)
	}
	if _, ok, err := s.FirstOutstanding("c", "bob", 0); ok || err != nil {
		t.Fatalf("an outstanding row: %v, %v", ok, err)
	}
	s.mended("other", keys...)
}

// TestDamagedMeta: a start does not guess which positions were given; it does without the ages of rows.
func TestDamagedMeta(t *testing.T) {
	s := openDamaged(t)
	s.send(1)
	if err := s.kv.Set(keyAgeClock, []byte{99}, pebble.Sync); err != nil {
		t.Fatal(err)
	}
	s.restart()
	s.spoil(keyState, true)
	s.closeNow(t)
	if _, err := Open(Config{Dir: "/data", FS: s.fs}); !errors.Is(err, errRow) || !strings.Contains(err.Error(), "state") {
		t.Fatalf("open: %v", err)
	}
}
