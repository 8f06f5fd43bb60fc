package embedded

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// gate is a hook for slowFS that holds every sync of the log until it is opened.
type gate struct {
	entered chan struct{}
	open    chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, 1000), make(chan struct{})} }

func (g *gate) wait() error {
	g.entered <- struct{}{}
	<-g.open
	return nil
}

func smallRecord(n int) *backend.Record {
	r := &backend.Record{
		Message: protocol.Message{Conversation: protocol.ConversationHash("alice", "bob"), Sender: "alice", Receiver: "bob", Content: []byte("hello")},
		Device:  "phone", Epoch: 1, Seq: uint64(n + 1), From: protocol.Session{Conn: uint64(n)},
	}
	r.ID[15], r.ID[14] = byte(n), byte(n>>8)
	return r
}

// answers collects answers.
type answers struct {
	mu      sync.Mutex
	changed sync.Cond
	list    []protocol.Answer
}

func newAnswers() *answers {
	a := &answers{}
	a.changed.L = &a.mu
	return a
}

func (a *answers) take(batch []protocol.Answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, batch...)
	a.changed.Broadcast()
}

func (a *answers) wait(n int) []protocol.Answer {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(a.list) < n {
		a.changed.Wait()
	}
	return slices.Clone(a.list)
}

// TestWaitingIsBounded stops the disk: P7, sends beyond the limit are refused and nothing else happens; P8, when the disk goes
// on, they are taken again.
func TestWaitingIsBounded(t *testing.T) {
	const limit = 50
	size := recordMemory(smallRecord(0))
	for name, cfg := range map[string]Config{
		"sends": {MaxWaitingSends: limit},
		"bytes": {MaxWaitingBytes: limit * size},
	} {
		t.Run(name, func(t *testing.T) {
			fs := &slowFS{FS: vfs.NewMem()}
			cfg.FS, cfg.Shards = fs, 1
			d := open(t, cfg)
			g := newGate()
			fs.onSync(g.wait)
			a := newAnswers()
			d.Start(backend.Hooks{Answer: a.take})
			for n := range limit {
				if refusal := d.Append(smallRecord(n)); refusal.Code != protocol.OK {
					t.Fatalf("append %d refused: %v", n, refusal.Code)
				}
			}
			<-g.entered
			refusal := d.Append(smallRecord(limit))
			if refusal.Code != protocol.CodeOverloaded || refusal.RetryAfterMs == 0 {
				t.Fatalf("over the limit: %+v", refusal)
			}
			close(g.open)
			for n, answer := range a.wait(limit) {
				if answer.To.Conn != uint64(n) || answer.Code != protocol.OK {
					t.Fatalf("answer %d: %+v", n, answer)
				}
			}
			for d.Append(smallRecord(limit)).Code == protocol.CodeOverloaded {
				runtime.Gosched() // the answers come a moment before the room
			}
			a.wait(limit + 1)
		})
	}
}

// TestBatchesForm checks that what comes during a sync goes into one batch, up to 1 MiB.
func TestBatchesForm(t *testing.T) {
	fs := &slowFS{FS: vfs.NewMem()}
	d := open(t, Config{FS: fs, Shards: 1})
	g := newGate()
	fs.onSync(g.wait)
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	const sends = 3000
	big := make([]byte, 1000)
	for n := range sends {
		r := smallRecord(n)
		r.Content = big
		if refusal := d.Append(r); refusal.Code != protocol.OK {
			t.Fatalf("append refused: %v", refusal.Code)
		}
		if n == 0 {
			<-g.entered
		}
	}
	close(g.open)
	a.wait(sends)
	d.closeNow(t)
	// One that was first, at most two that were built while its sync stood, and 3 MiB in batches of 1 MiB.
	if n := d.count.batches.Load(); n < 4 || n > 7 {
		t.Errorf("%d sends in %d batches", sends, n)
	}
}

// TestCommitsWaitForCompany: a commit that is not urgent waits until another thing is due, or 100 ms.
func TestCommitsWaitForCompany(t *testing.T) {
	var p pending
	before := time.Now()
	if yes, until := p.due(before); yes || !until.IsZero() {
		t.Fatal("nothing is pending, and something is due")
	}
	p.addCommit(&backend.Commit{})
	p.addCommit(&backend.Commit{})
	yes, until := p.due(before)
	if yes || until.Before(before.Add(maxCommitWait)) || !until.Equal(p.commitUntil) {
		t.Fatalf("two lone commits: due %v, until %v after the call", yes, until.Sub(before))
	}
	if yes, _ := p.due(until); !yes {
		t.Fatal("not due after the wait")
	}
	for name, add := range map[string]func(p *pending){
		"a send":           func(p *pending) { p.appends = append(p.appends, smallRecord(0)) },
		"a registration":   func(p *pending) { p.registers = append(p.registers, registration{}) },
		"an urgent commit": func(p *pending) { p.addCommit(&backend.Commit{Urgent: true}) },
		"a full batch": func(p *pending) {
			p.addCommit(&backend.Commit{Mailbox: make([]backend.MailboxPut, maxCommitBytes/512)})
		},
		"the end": func(p *pending) { p.closing = true },
	} {
		with := p
		with.commits = slices.Clone(p.commits)
		add(&with)
		if yes, _ := with.due(before); !yes {
			t.Errorf("%s does not start a batch", name)
		}
		b := &batch{}
		with.take(b)
		if len(b.commits) < 2 || len(with.commits) != 0 || with.urgent || with.commitBytes != 0 || !with.commitUntil.IsZero() {
			t.Errorf("%s: %d commits taken, %d left", name, len(b.commits), len(with.commits))
		}
	}
}

// TestBatchesAreBounded splits what is more than one batch, in order.
func TestBatchesAreBounded(t *testing.T) {
	var p pending
	const commits = 100
	rows := maxCommitBytes / 512 / 10 // ten such commits are a batch
	for n := range commits {
		p.addCommit(&backend.Commit{LowWater: uint64(n), Mailbox: make([]backend.MailboxPut, rows)})
	}
	b := &batch{}
	for next, batches := 0, 0; next < commits; batches++ {
		if yes, _ := p.due(time.Now()); !yes || batches > 10 {
			t.Fatalf("after %d batches %d of %d commits are taken", batches, next, commits)
		}
		p.take(b)
		for _, c := range b.commits {
			if c.LowWater != uint64(next) {
				t.Fatalf("commit %d was taken for %d", c.LowWater, next)
			}
			next++
		}
	}
	if p.commitBytes != 0 || p.urgent {
		t.Fatalf("an empty queue counts %d bytes", p.commitBytes)
	}
}

// TestLagIsBounded checks the refusal by time: 5 s behind, whatever the number.
func TestLagIsBounded(t *testing.T) {
	var now atomic.Int64
	now.Store(1_700_000_000_000)
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1, Now: func() time.Time { return time.UnixMilli(now.Load()) }})
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	send := func(n int, want protocol.Code) {
		t.Helper()
		if refusal := d.Append(smallRecord(n)); refusal.Code != want || (want != protocol.OK) != (refusal.RetryAfterMs != 0) {
			t.Fatalf("append: %+v, want %v", refusal, want)
		}
	}
	send(0, protocol.OK)
	a.wait(1)
	now.Add(5000)
	send(1, protocol.OK)
	a.wait(2)
	now.Add(1)
	send(2, protocol.CodeOverloaded)
	if records, err := d.Read(0, nil, 1); err != nil || len(records) != 1 {
		t.Fatal(records, err)
	}
	send(2, protocol.OK)
	a.wait(3)
}

// TestWrongClockLeavesRoom: P4, a clock that was centuries off for a moment, either way, leaves positions that are valid and ascend.
func TestWrongClockLeavesRoom(t *testing.T) {
	const sends = 3000 // a millisecond has 2 048 positions
	var now atomic.Int64
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1, Now: func() time.Time { return time.UnixMilli(now.Load()) }})
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	for n, ms := range []int64{-1 << 50, 1 << 50} {
		now.Store(ms)
		if refusal := d.Append(smallRecord(n)); refusal.Code != protocol.OK {
			t.Fatal(refusal)
		}
		a.wait(n + 1)
		if _, err := d.Read(0, nil, 1); err != nil { // nothing lags
			t.Fatal(err)
		}
	}
	now.Store(1_700_000_000_000)
	for n := 2; n < sends; n++ {
		if refusal := d.Append(smallRecord(n)); refusal.Code != protocol.OK {
			t.Fatal(refusal)
		}
	}
	last := uint64(0)
	for n, answer := range a.wait(sends) {
		if answer.Position <= last || answer.Position > protocol.MaxPosition {
			t.Fatalf("send %d is at position %d after %d", n, answer.Position, last)
		}
		last = answer.Position
	}
	if left := protocol.MaxPosition - last; left < 6e14 {
		t.Errorf("%d positions are left", left)
	}
}

func TestBadRecordsAreRefused(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem()})
	d.Start(backend.Hooks{})
	for i, spoil := range []func(r *backend.Record){
		func(r *backend.Record) { r.Sender = strings.Repeat("x", protocol.MaxUserBytes+1) },
		func(r *backend.Record) { r.Receiver = strings.Repeat("x", protocol.MaxUserBytes+1) },
		func(r *backend.Record) { r.Device = strings.Repeat("x", protocol.MaxDeviceBytes+1) },
		func(r *backend.Record) { r.Content = make([]byte, protocol.MaxContentBytes+1) },
		func(r *backend.Record) { r.Seq = protocol.MaxSeq + 1 },
	} {
		r := smallRecord(0)
		spoil(r)
		if refusal := d.Append(r); refusal != (protocol.Refusal{Code: protocol.CodeBadRequest}) {
			t.Errorf("record %d: %+v", i, refusal)
		}
	}
	refused := make(chan protocol.Refusal, 1)
	d.Register(backend.Stream{User: strings.Repeat("x", 65)}, func(_ uint32, _ bool, r protocol.Refusal) { refused <- r })
	if r := <-refused; r.Code != protocol.CodeBadRequest {
		t.Errorf("registration: %+v", r)
	}
}

// TestLogIsTrimmed checks that a shard without unfinished records does not hold the log, one with some does, and
// that nothing is trimmed beyond them.
func TestLogIsTrimmed(t *testing.T) {
	fs := vfs.NewMem()
	d := open(t, Config{FS: fs, Shards: 2})
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	pair := func(shard int) (from, to string) { // users whose conversation is of that shard
		for i := 0; ; i++ {
			from = fmt.Sprintf("user%d", i)
			if int(protocol.ConversationHash(from, "bob")%2) == shard {
				return from, "bob"
			}
		}
	}
	sent := 0
	send := func(shard int) {
		r := smallRecord(sent)
		r.Sender, r.Receiver = pair(shard)
		r.Conversation = protocol.ConversationHash(r.Sender, r.Receiver)
		if refusal := d.Append(r); refusal.Code != protocol.OK {
			t.Fatal(refusal)
		}
		sent++
		a.wait(sent)
	}
	finish := func(shard int, all bool) {
		t.Helper()
		records, err := d.Read(shard, nil, 1000)
		if err != nil || len(records) == 0 {
			t.Fatal(len(records), err)
		}
		low := records[len(records)-1].Position
		if all {
			low++
		}
		done := make(chan struct{})
		d.Commit(&backend.Commit{Shard: shard, LowWater: low, Urgent: true, Done: func() { close(done) }})
		<-done
	}
	rows := func() int { // after a restart
		t.Helper()
		d.closeNow(t)
		d = open(t, Config{FS: fs, Shards: 2})
		d.Start(backend.Hooks{Answer: a.take})
		return int(d.shards[0].unreadNow.Load() + d.shards[1].unreadNow.Load())
	}
	send(0)
	send(1)
	finish(1, true) // idle from here on
	for range 10 {
		send(0)
	}
	finish(0, true)
	if n := rows(); n != 0 {
		t.Fatalf("%d records are left of none unfinished", n)
	}
	for range 10 {
		send(0)
		send(1)
	}
	finish(0, true)
	if n := rows(); n < 10 { // shard 1 has said nothing
		t.Fatalf("%d records are left, 10 are unfinished", n)
	}
	finish(0, true)
	finish(1, false)
	if n := rows(); n != 1 {
		t.Fatalf("%d records are left, 1 is unfinished", n)
	}
}

// TestLogIsTrimmedWhenIdle checks that the log is trimmed after the last commit too, when nothing more comes.
func TestLogIsTrimmedWhenIdle(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	d.Append(smallRecord(0))
	position := a.wait(1)[0].Position
	done := make(chan struct{})
	d.Commit(&backend.Commit{LowWater: position + 1, Done: func() { close(done) }})
	<-done
	deadline := time.Now().Add(20 * time.Second)
	for {
		value, err := d.get(appendLogKey(nil, position))
		if err == nil && value == nil {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("the record is still there: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // the trim comes within a second
	}
	if n := d.count.trims.Load(); n != 1 {
		t.Errorf("%d trims", n)
	}
}

// TestMailboxLimitChanges: another limit holds for mailboxes as they are, in both directions; what a new owner is told agrees with it.
func TestMailboxLimitChanges(t *testing.T) {
	fs := vfs.NewMem()
	var mu sync.Mutex
	var full map[string]bool
	start := func(limit int) *DB {
		d := open(t, Config{FS: fs, Shards: 1, MailboxRows: limit})
		full = make(map[string]bool)
		d.Start(backend.Hooks{MailboxFull: func(user, device string, is bool) {
			mu.Lock()
			defer mu.Unlock()
			full[user+"/"+device] = is
		}})
		return d
	}
	key := func(n int) backend.MailboxKey {
		return backend.MailboxKey{User: "bob", Device: "phone", Position: uint64(n + 1), ID: smallRecord(n).ID}
	}
	commit := func(d *DB, first, rows int, put bool) {
		c := &backend.Commit{Urgent: true}
		for n := first; n < first+rows; n++ {
			if !put {
				c.Acknowledged = append(c.Acknowledged, key(n))
				continue
			}
			r := smallRecord(n)
			r.Position = key(n).Position
			c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Device: "phone", Record: r, Position: r.Position})
		}
		done := make(chan struct{})
		c.Done = func() { close(done) }
		d.Commit(c)
		<-done // after greet, which comes first
	}
	is := func(what string, want bool) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if full["bob/phone"] != want || full["alice/"] || len(full) > 1 {
			t.Fatalf("%s: full %v, want %v", what, full, want)
		}
	}
	d := start(5)
	commit(d, 0, 7, true)
	c := &backend.Commit{}
	r := smallRecord(0)
	c.Mailbox = []backend.MailboxPut{{User: "alice", Record: r, Position: 1}}
	d.Commit(c)
	is("7 of 5", true)
	d.closeNow(t)

	d = start(10)
	commit(d, 0, 0, true)
	is("7 of 10", false)
	commit(d, 7, 3, true)
	is("10 of 10", true)
	commit(d, 0, 3, false)
	is("7 of 10, drained", false)
	d.closeNow(t)

	d = start(7)
	commit(d, 0, 0, true)
	is("7 of 7", true)
	d.closeNow(t)
	d = start(7)
	commit(d, 0, 0, true)
	is("7 of 7 again", true)
	commit(d, 3, 7, false)
	is("empty", false)
	d.closeNow(t)
	d = start(7)
	commit(d, 0, 0, true)
	is("empty, started again", false)
}

// TestStoreFull moves the free space: sends are refused under the mark, commits are not, and sends resume by themselves.
func TestStoreFull(t *testing.T) {
	fs := vfs.NewMem()
	free := func(bytes uint64) { fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: bytes, TotalBytes: 100 << 30}) }
	free(50 << 30)
	d := open(t, Config{FS: fs, Shards: 1})
	if d.space.mark != 5<<30 {
		t.Fatalf("the mark is %d, want 5 %% of 100 GiB", d.space.mark)
	}
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	expect := func(want protocol.Code) {
		t.Helper()
		d.checkSpace() // what the watch does every second
		refusal := d.Append(smallRecord(0))
		if refusal.Code != want || (want == protocol.CodeStoreFull) != (refusal.RetryAfterMs != 0) {
			t.Fatalf("append: %+v, want %v", refusal, want)
		}
		if err := d.Healthy(); (err != nil) != (want != protocol.OK) {
			t.Fatalf("healthy: %v", err)
		}
	}
	expect(protocol.OK)
	free(5<<30 - 1)
	expect(protocol.CodeStoreFull)
	done := make(chan struct{})
	d.Commit(&backend.Commit{Urgent: true, Done: func() { close(done) },
		Outstanding: []backend.OutstandingRow{{Conversation: "c", Addressee: "a", Mark: backend.Mark{Position: 1}}}})
	<-done
	free(5<<30 + 1)
	expect(protocol.CodeStoreFull) // not before 1/16 more
	free(6 << 30)
	expect(protocol.OK)
}

// fullDisk is the real file system with a free space that the test sets.
type fullDisk struct {
	vfs.FS
	avail atomic.Uint64
}

func (f *fullDisk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: f.avail.Load(), TotalBytes: 1 << 40}, nil
}

func (f *fullDisk) Unwrap() vfs.FS { return f.FS }

func TestBallast(t *testing.T) {
	const mark = 1 << 20
	fs := &fullDisk{FS: vfs.Default}
	fs.avail.Store(1 << 30)
	dir := t.TempDir()
	s, err := newSpace(fs, dir, mark, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	there := func() bool {
		t.Helper()
		s.check()
		_, err := os.Stat(filepath.Join(dir, "ballast"))
		return err == nil
	}
	if !there() {
		if s.broken { // a file system without fallocate: nothing may be left, and the store goes without
			return
		}
		t.Fatal("there is space, and no ballast")
	}
	for _, step := range []struct {
		avail uint64
		want  bool
	}{{mark / 2, true}, {mark/4 - 1, false}, {mark / 2, false}, {mark, false}, {2 * mark, true}, {0, false}} {
		fs.avail.Store(step.avail)
		if there() != step.want {
			t.Errorf("with %d bytes free the ballast is there: %v", step.avail, !step.want)
		}
	}
	// A new start finds it.
	fs.avail.Store(2 * mark)
	s.check()
	again, err := newSpace(fs, dir, mark, slog.New(slog.DiscardHandler))
	if err != nil || !again.present {
		t.Fatalf("the ballast of the last run is not seen: %v", err)
	}
	again.release() // as Pebble does when a write finds the disk full
	if _, err := os.Stat(filepath.Join(dir, "ballast")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the ballast is still there: %v", err)
	}
}

// reserving notes how much was reserved in a file; reserve may fail.
type reserving struct {
	fullDisk
	sizes   map[string]int64
	reserve error
}

func (f *reserving) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	f.sizes[name] = 0
	return &reservingFile{file, name, f}, err
}

type reservingFile struct {
	vfs.File
	name string
	fs   *reserving
}

func (f *reservingFile) Preallocate(_, length int64) error {
	if f.fs.reserve == nil {
		f.fs.sizes[f.name] += length
	}
	return f.fs.reserve
}

// TestBallastIsWhole: what a crash left of a ballast, or a start with another mark, is made anew, and an empty file does not count.
func TestBallastIsWhole(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "ballast")
	fs := &reserving{fullDisk: fullDisk{FS: vfs.Default}, sizes: make(map[string]int64)}
	fs.avail.Store(1 << 30)
	start := func(mark uint64) *space {
		t.Helper()
		s, err := newSpace(fs, dir, mark, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		s.check()
		s.check()
		return s
	}
	if err := os.WriteFile(name, nil, 0o600); err != nil { // a crash after its creation
		t.Fatal(err)
	}
	for _, mark := range []uint64{1 << 20, 1 << 24} {
		if start(mark); fs.sizes[name] != int64(mark/16) {
			t.Errorf("the ballast of mark %d reserves %d bytes", mark, fs.sizes[name])
		}
	}
	fs.reserve = errors.New("not supported")
	if s := start(1 << 20); s.present || !s.broken {
		t.Errorf("a ballast that cannot be made: present %v, broken %v", s.present, s.broken)
	}
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty ballast is left: %v", err)
	}
}

// TestFailedSyncEndsTheProcess: after a failed fsync nothing is answered, and nobody tries it again.
func TestFailedSyncEndsTheProcess(t *testing.T) {
	fs := &slowFS{FS: vfs.NewMem()}
	ended := make(chan int)
	d, err := Open(Config{Dir: "/data", FS: fs, Shards: 1, exit: func(code int) {
		ended <- code
		select {} // as a process that has ended
	}})
	if err != nil {
		t.Fatal(err)
	}
	fs.onSync(func() error { return errors.New("input/output error") })
	d.Start(backend.Hooks{Answer: func([]protocol.Answer) { t.Error("answered after a failed sync") }})
	d.Append(smallRecord(0))
	if code := <-ended; code == 0 {
		t.Error("the process ended with code 0")
	}
}

// TestCorruptTableStopsTheStore: what a checksum refuses must not be overwritten or passed over, for nobody knows which rows it is.
// Everything from there on is refused, and Healthy says why.
func TestCorruptTableStopsTheStore(t *testing.T) {
	disk := &unreadable{FS: tables(t)}
	d := open(t, Config{FS: disk, Shards: 1})
	disk.failing.Store(true)
	fs := newAnswers()
	d.Start(backend.Hooks{Answer: fs.take})
	if err := d.Healthy(); err != nil {
		t.Fatal(err)
	}
	// The commit and the send may share a batch or not: the send is answered either way, and the store is stopped.
	d.Commit(&backend.Commit{Urgent: true, Windows: []backend.WindowRow{retryWindow(0)},
		Done: func() { t.Error("a commit that was not written is done") }})
	for n := 0; ; n++ {
		refusal := d.Append(smallRecord(n))
		if refusal.Code == protocol.CodeInternal && refusal.RetryAfterMs != 0 {
			list := fs.wait(n)
			unknown := false
			for i, a := range list {
				if a.To.Conn != uint64(i) {
					t.Fatalf("answer %d is for send %d", i, a.To.Conn)
				}
				if unknown = unknown || a.Code == protocol.CodeOutcomeUnknown; unknown != (a.Code == protocol.CodeOutcomeUnknown) {
					t.Fatalf("answer %d is %v after an unknown outcome", i, a.Code)
				}
			}
			break
		}
		if refusal.Code == protocol.CodeOverloaded { // this loop is faster than the disk
			n--
			runtime.Gosched()
			continue
		}
		if refusal.Code != protocol.OK {
			t.Fatalf("append: %+v", refusal)
		}
	}
	if err := d.Healthy(); !pebble.IsCorruptionError(err) || d.count.readRetries.Load() != 0 {
		t.Fatalf("healthy: %v, after %d more tries", err, d.count.readRetries.Load())
	}
	disk.failing.Store(false)
	refused := make(chan protocol.Refusal, 1)
	d.Register(backend.Stream{User: "u", Device: "d"}, func(_ uint32, _ bool, r protocol.Refusal) { refused <- r })
	if r := <-refused; r.Code != protocol.CodeInternal {
		t.Errorf("registration: %+v", r)
	}
}

// TestFailedStoreRests: a store that has failed with a log to be trimmed waits for nothing but Close.
func TestFailedStoreRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := Open(Config{Dir: "/data", FS: vfs.NewMem(), Shards: 1, MinFreeBytes: 1, stillSweeper: true})
		if err != nil {
			t.Fatal(err)
		}
		a := newAnswers()
		d.Start(backend.Hooks{Answer: a.take})
		d.Append(smallRecord(0))
		synctest.Wait()
		done := false
		d.Commit(&backend.Commit{Urgent: true, LowWater: a.wait(1)[0].Position + 1, Done: func() { done = true }})
		synctest.Wait()
		d.fail(errors.New("a row"))
		d.Commit(&backend.Commit{Urgent: true, LowWater: 1, Done: func() { t.Error("done after the failure") }})
		synctest.Wait()
		d.mu.Lock()
		yes, until := d.pending.due(time.Now().Add(time.Hour))
		d.mu.Unlock()
		if !done || yes || !until.IsZero() {
			t.Errorf("first commit done: %v; with nothing pending a batch is due: %v, or at %v", done, yes, until)
		}
		time.Sleep(time.Hour) // returns only if the bubble comes to rest
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// largeCommit has n rows of every kind; those of mailboxes are the largest possible, copied with the commit or, if there are
// records, named by their positions in the log.
func largeCommit(n int, records []*backend.Record) *backend.Commit {
	c := &backend.Commit{Urgent: true, LowWater: 1}
	for i := range n {
		r, position := (*backend.Record)(nil), uint64(0)
		if len(records) > 0 {
			position = records[i%len(records)].Position
		} else {
			position = uint64(i + 1)
			r = smallRecord(i)
			r.Position, r.Content = position, make([]byte, protocol.MaxContentBytes)
		}
		user := fmt.Sprintf("user%d", i)
		c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: user, Record: r, Position: position})
		c.Outstanding = append(c.Outstanding, backend.OutstandingRow{Conversation: "c", Addressee: user, Mark: backend.Mark{Position: position}})
		c.Receipts = append(c.Receipts, backend.ReceiptRow{ReceiptKey: backend.ReceiptKey{Sender: "s", Conversation: "c", Addressee: user}, ChangedMs: 1})
		c.Settled = append(c.Settled, backend.OutstandingKey{Conversation: "c", Addressee: user, Position: position + 1})
		c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: user, Position: position + 1})
		w := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: backend.Stream{User: user}}}
		w.Finish(protocol.FirstSeq(0))
		c.Windows = append(c.Windows, w)
	}
	return c
}

// largeCommitPart says how far a commit of largeCommit is on the disk: how many rows of each kind, in the order of Commit.
func largeCommitPart(t *testing.T, d *DB) (rows [4]int) {
	t.Helper()
	for i, prefix := range []byte{rangeMailbox, rangeOutstanding, rangeReceipts, rangeWindows} {
		err := d.scan([]byte{prefix}, []byte{prefix + 1}, func(_, _ []byte) (bool, error) {
			rows[i]++
			return true, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return rows
}

// TestLargeCommitIsSplit: P7, no commit makes a batch larger than its limit, whether its records come with it or lie in the log, and
// each row goes into one batch, in order.
func TestLargeCommitIsSplit(t *testing.T) {
	for _, logged := range []bool{false, true} {
		t.Run(fmt.Sprintf("logged=%v", logged), func(t *testing.T) {
			d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
			b := d.newBatch()
			var records []*backend.Record
			if logged {
				records = []*backend.Record{smallRecord(0), smallRecord(1)}
				for _, r := range records {
					r.Content = make([]byte, protocol.MaxContentBytes)
				}
				b.appends = append(b.appends, records...)
				if err := errors.Join(d.builder.build(d, b), d.kv.Apply(b.kv, pebble.Sync)); err != nil {
					t.Fatal(err)
				}
				b.recycle()
			}
			const rows = 3000
			commits := []*backend.Commit{{LowWater: 1}, largeCommit(rows, records), largeCommit(1, records), {LowWater: 2}}
			var p pending
			for _, c := range commits {
				p.addCommit(c)
			}
			var complete []*backend.Commit
			batches, before := 0, [4]int{}
			for ; len(p.commits) > 0; batches++ {
				if yes, _ := p.due(time.Now()); !yes {
					t.Fatalf("after %d batches nothing is due", batches)
				}
				p.take(b)
				if err := d.builder.build(d, b); err != nil {
					t.Fatal(err)
				}
				if b.complete < len(b.commits) {
					p.giveBack(b)
				}
				if n := b.kv.Len(); n > maxBatchBytes+maxBatchBytes/4 {
					t.Fatalf("batch %d has %d bytes", batches, n)
				}
				if err := d.kv.Apply(b.kv, pebble.Sync); err != nil {
					t.Fatal(err)
				}
				part := largeCommitPart(t, d)
				for i := range part {
					if part[i] < before[i] || i > 0 && part[i] > 0 && part[i-1] < rows {
						t.Fatalf("after batch %d the rows are %v", batches, part)
					}
				}
				complete = append(complete, b.commits...)
				before = part
				b.recycle()
			}
			if want := [4]int{rows, rows, rows, rows}; before != want || !slices.Equal(complete, commits) {
				t.Fatalf("rows %v, want %v; %d of %d commits are complete", before, want, len(complete), len(commits))
			}
			if least := rows * protocol.MaxContentBytes / maxBatchBytes; batches < least || batches > 2*least {
				t.Errorf("%d batches, want about %d", batches, least)
			}
			if p.commitBytes != 0 || p.firstRow != 0 {
				t.Errorf("nothing is pending, of %d bytes, from row %d on", p.commitBytes, p.firstRow)
			}
			if err := errors.Join(checkCounts(d), checkStreams(d)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSendPassesALargeCommit: P7, a send does not wait for the end of somebody else's large commit.
func TestSendPassesALargeCommit(t *testing.T) {
	fs := &slowFS{FS: vfs.NewMem()}
	d := open(t, Config{FS: fs, Shards: 1})
	g := newGate()
	fs.onSync(g.wait)
	var finished atomic.Bool
	early := make(chan bool, 1)
	d.Start(backend.Hooks{Answer: func([]protocol.Answer) { early <- !finished.Load() }})
	c := largeCommit(3000, nil)
	done := make(chan struct{})
	c.Done = func() { finished.Store(true); close(done) }
	d.Commit(c)
	<-g.entered
	if refusal := d.Append(smallRecord(0)); refusal.Code != protocol.OK {
		t.Fatal(refusal)
	}
	close(g.open)
	if !<-early {
		t.Error("the send was answered after the commit")
	}
	<-done
}

// TestCrashInALargeCommit: what a power cut leaves of a commit is a part of it in order, with exact counts, and the same commit
// again makes it whole.
func TestCrashInALargeCommit(t *testing.T) {
	const rows = 1000
	mem := vfs.NewCrashableMem()
	var disks []*vfs.MemFS
	done := false
	d := open(t, Config{FS: mem, Shards: 1, atPoint: func(name string) {
		if name == "after_mailbox_write" && !done { // called by the syncer, as Done
			disks = append(disks, mem.CrashClone(vfs.CrashCloneCfg{}))
		}
	}})
	d.Start(backend.Hooks{})
	commit := func(d *DB) {
		ended := make(chan struct{})
		c := largeCommit(rows, nil)
		c.Done = func() { done = true; close(ended) }
		d.Commit(c)
		<-ended
	}
	commit(d)
	want := largeCommitPart(t, d)
	parts := 0
	for i, disk := range disks {
		d := open(t, Config{FS: disk, Shards: 1})
		d.Start(backend.Hooks{})
		part := largeCommitPart(t, d)
		if part[0] == 0 || part[0] < rows && part[1] > 0 {
			t.Fatalf("crash %d left %v", i, part)
		}
		if part[0] < rows {
			parts++
		}
		if err := checkCounts(d); err != nil {
			t.Fatalf("crash %d: %v", i, err)
		}
		commit(d)
		if again := largeCommitPart(t, d); again != want {
			t.Fatalf("crash %d: the commit again made %v, want %v", i, again, want)
		}
		if err := errors.Join(checkCounts(d), checkStreams(d)); err != nil {
			t.Fatalf("crash %d: %v", i, err)
		}
	}
	if parts < 2 {
		t.Errorf("%d crashes were in the middle of the mailbox rows", parts)
	}
}

// TestAppendAllocatesNothing goes the whole way from Append to the answer and the ring, in a steady state.
func TestAppendAllocatesNothing(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
	answered := make(chan struct{}, 1)
	d.Start(backend.Hooks{Answer: func([]protocol.Answer) { answered <- struct{}{} }})
	r := smallRecord(0)
	read := make([]*backend.Record, 0, 1)
	average := testing.AllocsPerRun(2000, func() {
		d.Append(r)
		<-answered
		read, _ = d.Read(0, read[:0], 1)
	})
	// The rest is the in-memory file system's growing files and Pebble's growing memtable.
	if average >= 1 {
		t.Errorf("%.2f allocations per append", average)
	}
}
