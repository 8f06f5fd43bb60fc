package backendtest

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// Run runs the suite. newStorage makes fresh storage for each test.
func Run(t *testing.T, newStorage func(t *testing.T) Storage) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s Storage)
	}{
		{"P1 every append is answered once, in order, with its position", testAnswers},
		{"P1 an answered record is readable at once and is the one appended", testReadAfterAnswer},
		{"P1 what is unfinished is read again after a restart", testReplay},
		{"P4 positions ascend over restarts and clock steps", testPositions},
		{"P2 nothing is lost or doubled when the number of shards changes", testShardsChange},
		{"P2 nothing is lost or doubled when Read falls behind", testReadBehind},
		{"P2 nothing is lost or doubled under concurrent appends and reads", testConcurrent},
		{"P6 overloaded while Read is too far behind", testOverloaded},
		{"P6 shutting_down after Close", testClosed},
		{"P8 finished records leave, unfinished ones stay", testLowWater},
		{"any content is read again as it was", testContent},
		{"commits are done in order", testCommitOrder},
		{"P3 windows are merged", testWindows},
		{"receipts are merged and listed", testReceipts},
		{"outstanding rows", testOutstanding},
		{"P2 mailbox pages are complete and in order", testMailboxPages},
		{"P3 mailbox rows are put once and deleted once", testMailboxIdempotent},
		{"P5 mailboxes do not mix", testMailboxesApart},
		{"a mailbox becomes full and not full again", testMailboxFull},
		{"P2 what waits expires after a year and not before", testMailboxExpiry},
		{"P3 windows expire a year after their last use, streams after two", testStreamExpiry},
		{"P3 a block that a window knows is never drawn again", testSilentStream},
		{"a full mailbox takes messages again when some expire", testExpiryMakesRoom},
		{"blocks of a stream", testBlocks},
		{"devices, heir, and the ninth device", testDevices},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, newStorage(t)) })
	}
}

// clock is a clock that the test moves.
type clock struct {
	mu sync.Mutex
	ms int64
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.UnixMilli(c.ms)
}

func (c *clock) step(ms int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ms += ms
}

const someMs = 1_692_841_226_860

// conversations makes n records in turn between several pairs of users, so that every shard has some.
func conversations(first, n int) []*backend.Record {
	records := make([]*backend.Record, n)
	for i := range records {
		k := first + i
		records[i] = record(fmt.Sprintf("user%d", k%7), fmt.Sprintf("user%d", k%5+1), k)
	}
	return records
}

func testAnswers(t *testing.T, s Storage) {
	c := &clock{ms: someMs}
	f := start(t, s, Options{Now: c.now})
	defer f.close()
	records := conversations(0, 100)
	records[41].Resend = true
	answers := f.append(records...)
	var last uint64
	for i, a := range answers {
		r := records[i]
		if a.To != r.From || a.Seq != r.Seq || a.ID != r.ID || a.Code != protocol.OK {
			t.Fatalf("answer %d is %+v, for %+v", i, a, r)
		}
		if a.Millis < someMs {
			t.Fatalf("answer %d carries the time %d, before it was sent", i, a.Millis)
		}
		if i == 41 {
			if a.Position != 0 {
				t.Fatalf("a resend was answered with position %d", a.Position)
			}
			continue
		}
		if a.Position <= last || a.Position > protocol.MaxPosition {
			t.Fatalf("answer %d has position %d after %d", i, a.Position, last)
		}
		last = a.Position
	}
	if first := answers[0].Position; first != someMs<<protocol.PositionShift {
		t.Fatalf("the first position is %d, want that of the clock", first)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.answers) != len(records) || f.wakes == 0 {
		t.Fatalf("%d answers for %d records, %d wakes", len(f.answers), len(records), f.wakes)
	}
}

func testReadAfterAnswer(t *testing.T, s Storage) {
	f := start(t, s, Options{Shards: 3})
	defer f.close()
	for round := range 5 {
		records := conversations(round*40, 40)
		f.append(records...)
		all := f.readAll(7)
		if len(all) != len(records) {
			t.Fatalf("%d records were read, %d appended", len(all), len(records))
		}
		for _, r := range records {
			f.same("read", all[r.Position], r)
		}
	}
}

func testReplay(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	records := conversations(0, 50)
	f.append(records...)
	f.readAll(100)
	more := conversations(50, 20) // never read
	f.append(more...)
	f.close()

	f = start(t, s, Options{})
	defer f.close()
	f.wait("a wake for what is unfinished", func() bool { return f.wakes > 0 })
	newer := conversations(70, 5)
	f.append(newer...)
	all := f.readAll(9)
	records = append(append(records, more...), newer...)
	if len(all) != len(records) {
		t.Fatalf("%d records were read after a restart, want %d", len(all), len(records))
	}
	for _, r := range records {
		f.same("replayed", all[r.Position], r)
	}
}

func testPositions(t *testing.T, s Storage) {
	c := &clock{ms: someMs}
	var last uint64
	check := func(f *fixture, finish bool) {
		t.Helper()
		for _, a := range f.append(conversations(0, 3)...) {
			if a.Position <= last {
				t.Fatalf("position %d was given after %d", a.Position, last)
			}
			last = a.Position
		}
		if finish { // so that the log does not tell the last position
			f.readAll(100)
			for shard := range f.Shards() {
				f.commit(&backend.Commit{Shard: shard, LowWater: last + 1, Urgent: true})
			}
		}
	}
	for i, step := range []int64{0, 5_000, -3_600_000, 1, -1, 86_400_000, -86_400_000} {
		c.step(step)
		f := start(t, s, Options{Now: c.now})
		check(f, i%2 == 0)
		c.step(-60_000)
		check(f, i%3 == 0)
		f.close()
	}
}

func testShardsChange(t *testing.T, s Storage) {
	var records []*backend.Record
	for _, shards := range []int{1, 4, 3, 8, 2} {
		f := start(t, s, Options{Shards: shards})
		if f.Shards() != shards {
			t.Fatalf("%d shards, want %d", f.Shards(), shards)
		}
		more := conversations(len(records), 30)
		f.append(more...)
		records = append(records, more...)
		all := f.readAll(11)
		if len(all) != len(records) {
			t.Fatalf("%d shards: %d records were read, want %d", shards, len(all), len(records))
		}
		for _, r := range records {
			f.same("read", all[r.Position], r)
		}
		f.close()
	}
}

func testReadBehind(t *testing.T, s Storage) {
	f := start(t, s, Options{Shards: 2, Buffered: 8})
	defer f.close()
	read := make(map[uint64]*backend.Record)
	take := func(shard, max int) {
		batch, err := f.Read(shard, nil, max)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range batch {
			if read[r.Position] != nil {
				t.Fatalf("position %d was read twice", r.Position)
			}
			read[r.Position] = r
		}
	}
	var records []*backend.Record
	for round := range 40 {
		more := conversations(len(records), 1+round*7%23)
		f.append(more...)
		records = append(records, more...)
		take(round%2, 1+round%9)
	}
	for p, r := range f.readAll(5) {
		if read[p] != nil {
			t.Fatalf("position %d was read twice", p)
		}
		read[p] = r
	}
	if len(read) != len(records) {
		t.Fatalf("%d records were read, want %d", len(read), len(records))
	}
	for _, r := range records {
		f.same("read", read[r.Position], r)
	}
}

func testConcurrent(t *testing.T, s Storage) {
	const callers, each = 16, 200
	f := start(t, s, Options{Shards: 2, Buffered: 64})
	defer f.close()
	got := make([][]*backend.Record, f.Shards())
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for shard := range got {
		readers.Go(func() {
			for {
				last := false
				select {
				case <-stop:
					last = true
				default:
				}
				batch, err := f.Read(shard, nil, 33)
				if err != nil {
					t.Errorf("read: %v", err)
					return
				}
				got[shard] = append(got[shard], batch...)
				if last && len(batch) == 0 {
					return
				}
			}
		})
	}
	records := make([][]*backend.Record, callers)
	for caller := range callers {
		writers.Go(func() {
			for n := range each {
				r := record(fmt.Sprintf("caller%d", caller), "bob", n)
				records[caller] = append(records[caller], r)
				if refusal := f.Append(r); refusal.Code != protocol.OK {
					t.Errorf("append refused: %+v", refusal)
				}
			}
		})
	}
	writers.Wait()
	f.wait("every answer", func() bool { return len(f.answers) == callers*each })
	close(stop)
	readers.Wait()

	next := make(map[string]int)
	for shard := range got {
		for i, r := range got[shard] {
			if i > 0 && r.Position <= got[shard][i-1].Position {
				t.Fatalf("shard %d: position %d after %d", shard, r.Position, got[shard][i-1].Position)
			}
			var caller int
			if _, err := fmt.Sscanf(r.Sender, "caller%d", &caller); err != nil {
				t.Fatal(err)
			}
			n := next[r.Sender]
			next[r.Sender]++
			f.same("the next of its sender", r, records[caller][n])
		}
	}
	for caller := range callers {
		if n := next[fmt.Sprintf("caller%d", caller)]; n != each {
			t.Fatalf("%d records of caller %d were read, want %d", n, caller, each)
		}
	}
}

func testOverloaded(t *testing.T, s Storage) {
	const limit = 10
	f := start(t, s, Options{Shards: 1, MaxUnread: limit})
	defer f.close()
	f.append(conversations(0, limit)...)
	refusal := f.Append(record("alice", "bob", 1))
	if refusal.Code != protocol.CodeOverloaded || refusal.RetryAfterMs == 0 {
		t.Fatalf("refusal %+v, want overloaded with a time", refusal)
	}
	if all := f.readAll(100); len(all) != limit {
		t.Fatalf("%d records were read, want %d", len(all), limit)
	}
	f.append(record("alice", "bob", 2))
	if all := f.readAll(100); len(all) != 1 {
		t.Fatalf("%d records were read, want the one that was taken", len(all))
	}
}

func testClosed(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	records := conversations(0, 20)
	for _, r := range records {
		if refusal := f.Append(r); refusal.Code != protocol.OK {
			t.Fatalf("append refused: %+v", refusal)
		}
	}
	done := false
	f.Commit(&backend.Commit{LowWater: 1, Done: func() { done = true }})
	f.close()
	f.mu.Lock()
	if len(f.answers) != len(records) || !done {
		t.Fatalf("%d of %d records were answered by Close, commit done: %v", len(f.answers), len(records), done)
	}
	f.mu.Unlock()
	refusal := f.Append(record("alice", "bob", 1))
	if refusal.Code != protocol.CodeShuttingDown || refusal.RetryAfterMs == 0 {
		t.Fatalf("refusal %+v, want shutting_down with a time", refusal)
	}
	f = start(t, s, Options{})
	defer f.close()
	if all := f.readAll(100); len(all) != len(records) {
		t.Fatalf("%d records are there after Close, want %d", len(all), len(records))
	}
}

func testLowWater(t *testing.T, s Storage) {
	f := start(t, s, Options{Shards: 2})
	records := conversations(0, 60)
	f.append(records...)
	unfinished := make(map[uint64]*backend.Record)
	for shard := range f.Shards() {
		list := f.read(shard, 100)
		keep := len(list) / 3
		for _, r := range list[len(list)-keep:] {
			unfinished[r.Position] = r
		}
		f.commit(&backend.Commit{Shard: shard, LowWater: list[len(list)-keep].Position, Urgent: true})
	}
	f.close()
	f = start(t, s, Options{Shards: 2})
	defer f.close()
	all := f.readAll(100)
	for p, r := range unfinished {
		f.same("unfinished", all[p], r)
	}
	if len(all) == len(records) {
		t.Fatal("no finished record has left the log")
	}
}

func testContent(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	records := conversations(0, 10)
	records[3].Content = bytes.Repeat([]byte{0, 0xff, 'x'}, protocol.MaxContentBytes/3)
	f.append(records...)
	f.close()
	f = start(t, s, Options{})
	defer f.close()
	all := f.readAll(100)
	for _, r := range records {
		f.same("read again", all[r.Position], r)
	}
}

func testCommitOrder(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	defer f.close()
	commits := make([]*backend.Commit, 200)
	for i := range commits {
		commits[i] = &backend.Commit{Shard: 0, LowWater: uint64(i), Urgent: i%3 == 0}
		if i%2 == 0 {
			key := backend.WindowKey{Conversation: "a\x00b", Stream: backend.Stream{User: "a", Device: "d", Epoch: uint64(i)}}
			var w backend.Window
			w.Finish(protocol.FirstSeq(0))
			commits[i].Windows = []backend.WindowRow{{WindowKey: key, Window: w}}
		}
	}
	f.commit(commits...)                // checks the order
	f.commit(&backend.Commit{})         // nothing in it, not urgent
	f.commit(&backend.Commit{Shard: 0}) // and again
}

func testWindows(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	key := backend.WindowKey{Conversation: "alice\x00bob", Stream: backend.Stream{User: "alice", Device: "phone", Epoch: 7}}
	other := key
	other.Epoch = 8
	var want backend.Window
	if w, err := f.Window(key); err != nil || w != want {
		t.Fatalf("a window that never was: %+v, %v", w, err)
	}
	var commits []*backend.Commit
	for i := range 30 {
		var w backend.Window
		w.Finish(protocol.FirstSeq(uint32(i%5)) + uint64(i*3%40))
		want.Merge(&w)
		rows := []backend.WindowRow{{WindowKey: key, Window: w}}
		if i%4 == 0 {
			rows = append(rows, rows[0])
		}
		commits = append(commits, &backend.Commit{Windows: rows, Urgent: i%7 == 0})
	}
	f.commit(commits...)
	for range 2 {
		if w, err := f.Window(key); err != nil || w != want {
			t.Fatalf("window\n got %+v, %v\nwant %+v", w, err, want)
		}
		if w, err := f.Window(other); err != nil || w != (backend.Window{}) {
			t.Fatalf("the window of another stream is %+v, %v", w, err)
		}
		f.close()
		f = start(t, s, Options{})
	}
	f.close()
}

func testReceipts(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	key := backend.ReceiptKey{Sender: "alice", Conversation: "alice\x00bob", Addressee: "bob"}
	mark := func(n int) backend.Mark {
		return backend.Mark{Position: uint64(n), ID: messageID("alice", n), Device: "phone", Epoch: 9, Seq: uint64(n)}
	}
	row := func(k backend.ReceiptKey, delivered, top int, changed int64) backend.ReceiptRow {
		r := backend.ReceiptRow{ReceiptKey: k, Top: mark(top), ChangedMs: changed}
		if delivered > 0 {
			r.Delivered = mark(delivered)
		}
		return r
	}
	check := func(want backend.ReceiptRow) {
		t.Helper()
		if got, err := f.Receipt(key); err != nil || got != want {
			t.Fatalf("receipt\n got %+v, %v\nwant %+v", got, err, want)
		}
	}
	check(backend.ReceiptRow{ReceiptKey: key})
	put := func(r backend.ReceiptRow) { f.commit(&backend.Commit{Receipts: []backend.ReceiptRow{r}, Urgent: true}) }
	put(row(key, 0, 5, 0))
	check(row(key, 0, 5, 0))
	put(row(key, 5, 7, 1000))
	check(row(key, 5, 7, 1000))
	put(row(key, 3, 4, 500)) // late
	check(row(key, 5, 7, 1000))
	put(row(key, 5, 9, 1000))
	check(row(key, 5, 9, 1000))
	f.commit(
		&backend.Commit{Receipts: []backend.ReceiptRow{row(key, 10, 10, 2000)}},
		&backend.Commit{Receipts: []backend.ReceiptRow{row(key, 9, 9, 1500)}, Urgent: true},
	)
	check(row(key, 10, 10, 2000))

	self := backend.ReceiptKey{Sender: "alice", Conversation: "alice\x00alice", Addressee: "alice"}
	stranger := backend.ReceiptKey{Sender: "alicea", Conversation: "alicea\x00bob", Addressee: "bob"}
	put(row(self, 4, 4, 3000))
	put(row(stranger, 4, 4, 9000))
	f.close()
	f = start(t, s, Options{})
	defer f.close()
	check(row(key, 10, 10, 2000))
	for _, c := range []struct {
		since int64
		want  int
	}{{0, 2}, {2000, 2}, {2001, 1}, {3000, 1}, {3001, 0}} {
		var rows []backend.ReceiptRow
		err := f.ReceiptsSince("alice", c.since, func(r backend.ReceiptRow) bool {
			rows = append(rows, r)
			return true
		})
		if err != nil || len(rows) != c.want {
			t.Fatalf("receipts since %d: %d rows, %v; want %d", c.since, len(rows), err, c.want)
		}
		for _, r := range rows {
			if r != row(key, 10, 10, 2000) && r != row(self, 4, 4, 3000) {
				t.Fatalf("receipts since %d: %+v", c.since, r)
			}
		}
	}
	n := 0
	if err := f.ReceiptsSince("alice", 0, func(backend.ReceiptRow) bool { n++; return false }); err != nil || n != 1 {
		t.Fatalf("yield was called %d times after it returned false, %v", n, err)
	}
}

func testOutstanding(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	defer f.close()
	row := func(conversation, addressee string, position int) backend.OutstandingRow {
		return backend.OutstandingRow{Conversation: conversation, Addressee: addressee,
			Mark: backend.Mark{Position: uint64(position), ID: messageID("a", position), Device: "d", Epoch: 3, Seq: 4}}
	}
	first := func(conversation, addressee string, from, want int) {
		t.Helper()
		got, ok, err := f.FirstOutstanding(conversation, addressee, uint64(from))
		if err != nil || ok != (want != 0) || ok && got != row(conversation, addressee, want) {
			t.Fatalf("first outstanding of %q from %d: %+v, %v, %v; want position %d", addressee, from, got, ok, err, want)
		}
	}
	const ab, ac = "a\x00b", "a\x00c"
	first(ab, "b", 0, 0)
	f.commit(&backend.Commit{Urgent: true, Outstanding: []backend.OutstandingRow{
		row(ab, "b", 20), row(ab, "b", 10), row(ab, "a", 5), row(ac, "c", 1), row(ab, "bb", 2), row(ab, "b", 300),
	}})
	first(ab, "b", 0, 10)
	first(ab, "b", 10, 10)
	first(ab, "b", 11, 20)
	first(ab, "b", 21, 300)
	first(ab, "b", 301, 0)
	first(ab, "a", 0, 5)
	f.commit(
		&backend.Commit{Outstanding: []backend.OutstandingRow{row(ab, "b", 15), row(ab, "b", 10)},
			Settled: []backend.OutstandingKey{{Conversation: ab, Addressee: "b", Position: 10}, {Conversation: ab, Addressee: "b", Position: 11}}},
		&backend.Commit{Settled: []backend.OutstandingKey{{Conversation: ab, Addressee: "b", Position: 15}}, Urgent: true},
	)
	first(ab, "b", 0, 20)
	first(ab, "bb", 0, 2)
	first(ac, "c", 0, 1)
}

// mailbox puts records into one mailbox: some by value, some by their position in the log.
func (f *fixture) put(user, device string, records ...*backend.Record) {
	f.t.Helper()
	c := &backend.Commit{Urgent: true}
	for i, r := range records {
		p := backend.MailboxPut{User: user, Device: device, Position: r.Position}
		if i%2 == 0 {
			p.Record = r
		}
		c.Mailbox = append(c.Mailbox, p)
	}
	f.commit(c)
}

func (f *fixture) acknowledge(user, device string, records ...*backend.Record) {
	f.t.Helper()
	c := &backend.Commit{Urgent: true}
	for _, r := range records {
		c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: user, Device: device, Position: r.Position, ID: r.ID})
	}
	f.commit(c)
}

func (f *fixture) holds(user, device string, want []*backend.Record) {
	f.t.Helper()
	for _, limit := range []int{1, 3, 1000} {
		rows := f.page(user, device, limit)
		if len(rows) != len(want) {
			f.t.Fatalf("mailbox %s/%s has %d rows in pages of %d, want %d", user, device, len(rows), limit, len(want))
		}
		for i, r := range want {
			f.same("mailbox row", rows[i], r)
		}
	}
}

func testMailboxPages(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	records := make([]*backend.Record, 25)
	for i := range records {
		records[i] = record("alice", "bob", i)
	}
	f.append(records...)
	f.holds("bob", "phone", nil)
	f.put("bob", "phone", records[10:]...)
	f.put("bob", "phone", records[:10]...) // earlier ones later: pages sort by position
	f.holds("bob", "phone", records)
	f.acknowledge("bob", "phone", records[3], records[4], records[24])
	left := append(append([]*backend.Record(nil), records[:3]...), records[5:24]...)
	f.holds("bob", "phone", left)
	for i, r := range records {
		got, ok, err := f.MailboxRow(backend.MailboxKey{User: "bob", Device: "phone", Position: r.Position, ID: r.ID})
		if gone := i == 3 || i == 4 || i == 24; err != nil || ok == gone {
			t.Fatalf("row %d: there %v, %v", i, ok, err)
		}
		if ok {
			f.same("row", got, r)
		}
	}
	f.close()
	f = start(t, s, Options{})
	defer f.close()
	f.holds("bob", "phone", left)
}

func testMailboxIdempotent(t *testing.T, s Storage) {
	f := start(t, s, Options{MailboxRows: 3})
	records := []*backend.Record{record("alice", "bob", 0), record("alice", "bob", 1), record("alice", "bob", 2)}
	f.append(records...)
	for range 3 {
		f.put("bob", "", records[0], records[1], records[0])
	}
	f.holds("bob", "", records[:2])
	f.acknowledge("bob", "", records[0], records[0], records[2])
	f.acknowledge("bob", "", records[0])
	f.holds("bob", "", records[1:2])
	put := func(r *backend.Record) backend.MailboxPut {
		return backend.MailboxPut{User: "bob", Record: r, Position: r.Position}
	}
	key := func(r *backend.Record) backend.MailboxKey {
		return backend.MailboxKey{User: "bob", Position: r.Position, ID: r.ID}
	}
	f.commit( // one after the other, in one batch or not
		&backend.Commit{Mailbox: []backend.MailboxPut{put(records[2])}},
		&backend.Commit{Acknowledged: []backend.MailboxKey{key(records[2])}},
		&backend.Commit{Mailbox: []backend.MailboxPut{put(records[0]), put(records[0])}, Acknowledged: []backend.MailboxKey{key(records[1])}},
		&backend.Commit{Acknowledged: []backend.MailboxKey{key(records[1])}, Urgent: true},
	)
	f.holds("bob", "", records[:1])
	f.close()
	// The count was kept: two more rows fill a mailbox of three, and not one.
	f = start(t, s, Options{MailboxRows: 3})
	defer f.close()
	f.put("bob", "", records[0], records[1])
	f.mu.Lock()
	if len(f.fullLog) != 0 {
		t.Fatalf("a mailbox of 2 rows is reported: %v", f.fullLog)
	}
	f.mu.Unlock()
	f.put("bob", "", records[2])
	f.wait("a full mailbox", func() bool { return f.full[mailboxName{"bob", ""}] })
}

func testMailboxesApart(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	defer f.close()
	names := []mailboxName{{"bob", ""}, {"bob", "phone"}, {"bob", "phone2"}, {"bobb", ""}, {"bo", "b"}, {"b", "obphone"}}
	records := make([]*backend.Record, len(names))
	for i, name := range names {
		records[i] = record("alice", name.user, i)
	}
	f.append(records...)
	for i, name := range names {
		f.put(name.user, name.device, records[i])
	}
	for i, name := range names {
		f.holds(name.user, name.device, records[i:i+1])
	}
	f.holds("bo", "", nil)
	f.acknowledge("bob", "phone", records[0]) // a row of another mailbox: nothing happens
	f.holds("bob", "", records[:1])
	f.holds("bob", "phone", records[1:2])
}

func testMailboxFull(t *testing.T, s Storage) {
	const limit = 5
	f := start(t, s, Options{MailboxRows: limit})
	records := make([]*backend.Record, 2*limit)
	for i := range records {
		records[i] = record("alice", "bob", i)
	}
	f.append(records...)
	name := mailboxName{"bob", "phone"}
	is := func(want bool, log ...string) {
		t.Helper()
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.full[name] != want || fmt.Sprint(f.fullLog) != fmt.Sprint(log) {
			t.Fatalf("full: %v, reports %v; want %v, %v", f.full[name], f.fullLog, want, log)
		}
	}
	f.put("bob", "phone", records[:limit-1]...)
	is(false)
	f.put("bob", "phone", records[0])
	is(false)
	f.put("bob", "phone", records[limit-1])
	is(true, "bob/phone true")
	f.put("bob", "phone", records[limit])
	is(true, "bob/phone true")
	f.acknowledge("bob", "phone", records[0])
	is(true, "bob/phone true")
	f.acknowledge("bob", "phone", records[1])
	is(false, "bob/phone true", "bob/phone false")
	f.put("bob", "phone", records[limit+1:]...)
	is(true, "bob/phone true", "bob/phone false", "bob/phone true")
	f.close()

	f = start(t, s, Options{MailboxRows: limit})
	f.wait("the report of a full mailbox at the start", func() bool { return f.full[name] })
	is(true, "bob/phone true")
	f.acknowledge("bob", "phone", f.page("bob", "phone", 100)...)
	is(false, "bob/phone true", "bob/phone false")
	f.close()

	f = start(t, s, Options{MailboxRows: limit})
	defer f.close()
	f.commit(&backend.Commit{Urgent: true}) // after what the start has to say
	is(false)
}

const (
	day  = 24 * time.Hour
	year = 365 * day
)

func testMailboxExpiry(t *testing.T, s Storage) {
	c := &clock{ms: someMs}
	f := start(t, s, Options{Now: c.now})
	f.age(c, 0)
	const conversation = "alice\x00bob"
	leave := func(first, n int) []*backend.Record {
		records := make([]*backend.Record, n)
		for i := range records {
			records[i] = record("alice", "bob", first+i)
		}
		f.append(records...)
		f.readAll(100)
		f.put("bob", "", records...)
		f.put("bob", "phone", records...)
		for _, r := range records {
			f.commit(&backend.Commit{Urgent: true, Outstanding: []backend.OutstandingRow{{Conversation: conversation, Addressee: "bob",
				Mark: backend.Mark{Position: r.Position, ID: r.ID, Device: "phone", Epoch: r.Epoch, Seq: r.Seq}}}})
		}
		return records
	}
	holds := func(want []*backend.Record) {
		t.Helper()
		f.holds("bob", "", want)
		f.holds("bob", "phone", want)
		row, ok, err := f.FirstOutstanding(conversation, "bob", 0)
		if err != nil || ok != (len(want) > 0) || ok && row.Position != want[0].Position {
			t.Fatalf("the first outstanding row is %+v, %v, %v", row, ok, err)
		}
	}
	old := leave(0, 150)
	f.age(c, 200*day)
	young := leave(150, 20)
	f.age(c, 164*day)
	holds(append(old[:len(old):len(old)], young...))
	f.age(c, 3*day)
	holds(young)
	f.acknowledge("bob", "phone", old[0], young[0]) // late: the first is gone, and nothing happens
	f.holds("bob", "phone", young[1:])
	f.close()
	f = start(t, s, Options{Now: c.now})
	defer f.close()
	f.age(c, 0)
	f.holds("bob", "", young)
	f.age(c, 196*day)
	f.holds("bob", "", young)
	f.age(c, 4*day)
	holds(nil)
}

func testStreamExpiry(t *testing.T, s Storage) {
	c := &clock{ms: someMs}
	f := start(t, s, Options{Now: c.now})
	defer f.close()
	f.age(c, 0)
	used := backend.Stream{User: "alice", Device: "phone", Epoch: 1}
	idle := backend.Stream{User: "alice", Device: "phone", Epoch: 2}
	var want backend.Window
	use := func(s backend.Stream, seq uint64) {
		row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: s}}
		row.Finish(seq)
		want.Finish(seq)
		f.commit(&backend.Commit{Windows: []backend.WindowRow{row}, Urgent: true})
	}
	is := func(s backend.Stream, want backend.Window) {
		t.Helper()
		if w, err := f.Window(backend.WindowKey{Conversation: "c", Stream: s}); err != nil || w != want {
			t.Fatalf("window of %+v\n got %+v, %v\nwant %+v", s, w, err, want)
		}
	}
	f.register(used, idle)
	use(idle, protocol.FirstSeq(0))
	want = backend.Window{}
	for n := range 4 { // every use counts
		use(used, protocol.FirstSeq(0)+uint64(n))
		f.age(c, 300*day)
		is(used, want)
	}
	is(idle, backend.Window{})
	if got := f.register(used, idle); got[0].Block != 1 || got[1].Block != 0 {
		t.Fatalf("blocks %d and %d after more than three years, want the next of one that was used and the first of one that was not", got[0].Block, got[1].Block)
	}
	f.age(c, 67*day)
	is(used, backend.Window{})
	f.age(c, 660*day)
	if got := f.register(used, idle); got[0].Block != 2 || got[1].Block != 1 {
		t.Fatalf("blocks %d and %d within two years of the last login, want 2 and 1", got[0].Block, got[1].Block)
	}
	f.age(c, 2*year+2*day)
	if got := f.register(used); got[0].Block != 0 {
		t.Fatalf("block %d after two years, want the first", got[0].Block)
	}
	if devices, err := f.Devices("alice"); err != nil || len(devices) != 1 {
		t.Fatalf("devices %v, %v: they do not expire", devices, err)
	}
}

// testSilentStream: a connection that says nothing for longer than its stream is kept, and then sends.
func testSilentStream(t *testing.T, s Storage) {
	c := &clock{ms: someMs}
	f := start(t, s, Options{Now: c.now})
	defer f.close()
	f.age(c, 0)
	stream := backend.Stream{User: "alice", Device: "phone", Epoch: 1}
	f.register(stream, stream, stream)
	f.age(c, 2*year+2*day)
	row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: stream}}
	row.Finish(protocol.FirstSeq(2))
	f.commit(&backend.Commit{Windows: []backend.WindowRow{row}, Urgent: true})
	if got := f.register(stream); got[0].Block != 3 {
		t.Fatalf("block %d is drawn, want one above that of the window", got[0].Block)
	}
}

func testExpiryMakesRoom(t *testing.T, s Storage) {
	const limit = 3
	c := &clock{ms: someMs}
	f := start(t, s, Options{Now: c.now, MailboxRows: limit})
	f.age(c, 0)
	put := func(n int) {
		r := record("alice", "bob", n)
		f.append(r)
		f.readAll(100) // what is not read would lag by months
		f.put("bob", "phone", r)
	}
	is := func(want bool) {
		t.Helper()
		f.mu.Lock()
		defer f.mu.Unlock()
		if full := f.full[mailboxName{"bob", "phone"}]; full != want {
			t.Fatalf("full: %v, want %v", full, want)
		}
	}
	put(0)
	f.age(c, 100*day)
	put(1)
	put(2)
	is(true)
	f.age(c, 267*day)
	is(false)
	put(3)
	is(true)
	f.close()
	f = start(t, s, Options{Now: c.now, MailboxRows: limit})
	defer f.close()
	f.wait("the report of a full mailbox", func() bool { return f.full[mailboxName{"bob", "phone"}] })
	f.readAll(100)
	f.age(c, 0)
	is(true)
	f.age(c, 100*day)
	is(false)
	put(4)
	is(false)
	put(5)
	is(true)
}

func testBlocks(t *testing.T, s Storage) {
	stream := func(device string, epoch uint64) backend.Stream {
		return backend.Stream{User: "alice", Device: device, Epoch: epoch}
	}
	f := start(t, s, Options{})
	got := f.register(stream("phone", 1), stream("phone", 1), stream("phone", 2), stream("tablet", 1), stream("phone", 1))
	blocks := fmt.Sprint(got[0].Block, got[1].Block, got[2].Block, got[3].Block, got[4].Block)
	if blocks != "0 1 0 0 2" {
		t.Fatalf("blocks %s, want 0 1 0 0 2", blocks)
	}
	f.close()
	f = start(t, s, Options{})
	defer f.close()
	for i, want := range []uint32{3, 4, 5} {
		if r := f.register(stream("phone", 1))[0]; r.Block != want || r.Refusal.Code != protocol.OK {
			t.Fatalf("registration %d after a restart: %+v, want block %d", i, r, want)
		}
	}
	if r := f.register(stream("phone", 3))[0]; r.Block != 0 {
		t.Fatalf("the first block of a stream is %d", r.Block)
	}
}

func testDevices(t *testing.T, s Storage) {
	f := start(t, s, Options{})
	if devices, err := f.Devices("alice"); err != nil || len(devices) != 0 {
		t.Fatalf("devices of a stranger: %v, %v", devices, err)
	}
	streams := make([]backend.Stream, protocol.MaxDevicesPerUser+2)
	for i := range streams {
		streams[i] = backend.Stream{User: "alice", Device: fmt.Sprintf("device%d", i), Epoch: 1}
	}
	for i, r := range f.register(streams...) { // together: they must see each other
		refused := i >= protocol.MaxDevicesPerUser
		want := registered{Heir: i == 0}
		if refused {
			want = registered{Refusal: protocol.Refusal{Code: protocol.CodeTooManyDevices}}
		}
		if r != want {
			t.Fatalf("device %d: %+v, want %+v", i, r, want)
		}
	}
	check := func() {
		t.Helper()
		devices, err := f.Devices("alice")
		if err != nil || len(devices) != protocol.MaxDevicesPerUser {
			t.Fatalf("%d devices, %v", len(devices), err)
		}
		for i, d := range devices {
			if d.Name != streams[i].Device || d.Heir != (i == 0) {
				t.Fatalf("device %d is %+v", i, d)
			}
		}
	}
	check()
	f.close()
	f = start(t, s, Options{})
	defer f.close()
	check()
	again := f.register(streams[0], streams[8], streams[1], backend.Stream{User: "bob", Device: "device0", Epoch: 1})
	want := []registered{
		{Block: 1, Heir: true},
		{Refusal: protocol.Refusal{Code: protocol.CodeTooManyDevices}},
		{Block: 1},
		{Heir: true},
	}
	if fmt.Sprint(again) != fmt.Sprint(want) {
		t.Fatalf("after a restart: %+v, want %+v", again, want)
	}
	check()
}
