package embedded

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// unreadable is a file system whose tables, when failing, can be read left more times. Then a read fails with err, or if
// that is nil, reads zeros.
type unreadable struct {
	vfs.FS
	err     error
	failing atomic.Bool
	left    atomic.Int64
	failed  atomic.Int64
}

var errUnreadable = errors.New("input/output error")

func (f *unreadable) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	file, err := f.FS.Open(name, opts...)
	if err == nil && strings.HasSuffix(name, ".sst") {
		file = &unreadableFile{file, f}
	}
	return file, err
}

func (f *unreadable) Unwrap() vfs.FS { return f.FS }

type unreadableFile struct {
	vfs.File
	fs *unreadable
}

func (f *unreadableFile) ReadAt(b []byte, at int64) (int, error) {
	if f.fs.failing.Load() && f.fs.left.Add(-1) < 0 {
		f.fs.failed.Add(1)
		if f.fs.err != nil {
			return 0, f.fs.err
		}
		clear(b)
		return len(b), nil
	}
	return f.File.ReadAt(b, at)
}

func (f *unreadableFile) Prefetch(int64, int64) error { return nil }

const retryRows = 5000

func retryWindow(n int) backend.WindowRow {
	w := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: backend.Stream{User: "u", Device: "d", Epoch: uint64(n)}}}
	w.Finish(protocol.FirstSeq(0))
	return w
}

func retryPut(n int) backend.MailboxPut {
	r := smallRecord(n)
	r.Position = uint64(n + 1)
	return backend.MailboxPut{User: "bob", Device: "phone", Record: r, Position: r.Position}
}

func openRetry(t *testing.T, fs vfs.FS) *DB {
	t.Helper()
	d, err := Open(Config{Dir: "/data", FS: fs, Shards: 1, MaxLag: time.Hour, MinFreeBytes: 1, stillSweeper: true})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// tables is a file system with rows in a table, not in memory.
func tables(t *testing.T) *vfs.MemFS {
	t.Helper()
	fs := vfs.NewCrashableMem()
	d := openRetry(t, fs)
	d.Start(backend.Hooks{})
	done := make(chan struct{})
	c := &backend.Commit{Urgent: true, Done: func() { close(done) }}
	for n := range retryRows {
		c.Windows = append(c.Windows, retryWindow(n))
		c.Mailbox = append(c.Mailbox, retryPut(2*n))
	}
	d.Commit(c)
	<-done
	if err := d.kv.Flush(); err != nil {
		t.Fatal(err)
	}
	d.closeNow(t)
	return fs
}

// TestReadErrorPasses: P8, while reads fail everything waits and Healthy says why; when they succeed again everything is done, once,
// whichever read it was. Only a while without success makes a restart necessary.
func TestReadErrorPasses(t *testing.T) {
	stalls := 0
	disk := tables(t)
	for left := range int64(12) {
		synctest.Test(t, func(t *testing.T) {
			fs := &unreadable{FS: disk.CrashClone(vfs.CrashCloneCfg{}), err: errUnreadable}
			d := openRetry(t, fs)
			a := newAnswers()
			d.Start(backend.Hooks{Answer: a.take})
			synctest.Wait()

			fs.left.Store(left)
			fs.failing.Store(true)
			blocks, done := make(chan uint32, 1), make(chan struct{})
			c := &backend.Commit{Mailbox: []backend.MailboxPut{retryPut(1000), retryPut(1001)}, Done: func() { close(done) }}
			for n := range 5 { // in different blocks of the table
				c.Windows = append(c.Windows, retryWindow(n*1000))
			}
			d.mu.Lock() // into one batch
			d.pending.addCommit(c)
			d.pending.registers = append(d.pending.registers, registration{stream: retryWindow(0).Stream,
				done: func(block uint32, _ bool, _ protocol.Refusal) { blocks <- block }})
			d.pending.appends = append(d.pending.appends, smallRecord(0))
			d.pending.waitingSends++
			d.wakeLocked()
			d.mu.Unlock()
			time.Sleep(10 * readRetry)
			synctest.Wait()
			if stalled := fs.failed.Load() > 0; stalled {
				stalls++
				if err := d.Healthy(); !errors.Is(err, errUnreadable) || d.Alive() != nil {
					t.Errorf("healthy: %v, alive: %v", err, d.Alive())
				}
			}
			fs.failing.Store(false)
			if refusal := d.Append(smallRecord(1)); refusal.Code != protocol.OK {
				t.Errorf("append: %+v", refusal)
			}
			time.Sleep(readRetry)
			synctest.Wait()
			if err := d.Healthy(); err != nil {
				t.Errorf("healthy: %v", err)
			}
			<-done
			list := a.wait(2)
			records, err := d.Read(0, nil, 10)
			if len(list) != 2 || err != nil || len(records) != 2 || records[0].Position != list[0].Position || list[1].Position <= list[0].Position {
				t.Errorf("%d answers, %d records, %v", len(list), len(records), err)
			}
			if block := <-blocks; block != 1 { // 0 is in the windows
				t.Errorf("block %d was drawn", block)
			}
			if err := errors.Join(checkCounts(d), checkStreams(d)); err != nil {
				t.Error(err)
			}
			if n := d.count.mailboxRows.Load(); n != retryRows+1 {
				t.Errorf("%d mailbox rows are counted, want %d", n, retryRows+1)
			}
			d.closeNow(t)
		})
	}
	if stalls < 5 {
		t.Errorf("%d of the reads were made to fail", stalls)
	}
}

// TestReadErrorStays: after a minute of failures only a restart can help, and after Close begins nothing waits.
func TestReadErrorStays(t *testing.T) {
	disk := tables(t)
	for _, c := range []struct {
		name    string
		closing bool
		within  time.Duration
	}{{"stays", false, maxReadTries * readRetry}, {"closing", true, time.Second}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs := &unreadable{FS: disk.CrashClone(vfs.CrashCloneCfg{}), err: errUnreadable}
				d := openRetry(t, fs)
				a := newAnswers()
				d.Start(backend.Hooks{Answer: a.take})
				synctest.Wait()
				fs.failing.Store(true)
				d.Commit(&backend.Commit{Urgent: true, Windows: []backend.WindowRow{retryWindow(1)},
					Done: func() { t.Error("a commit that was not written is done") }})
				synctest.Wait()
				if refusal := d.Append(smallRecord(0)); refusal.Code != protocol.OK {
					t.Fatal(refusal)
				}
				if !c.closing {
					time.Sleep(c.within)
					if d.Alive() == nil {
						t.Error("still alive")
					}
				}
				begun := time.Now()
				_ = d.Close() // it may say that a table could not be read
				if took := time.Since(begun); took > c.within {
					t.Errorf("Close took %v", took)
				}
				if list := a.wait(1); len(list) != 1 || list[0].Code != protocol.CodeOutcomeUnknown {
					t.Errorf("answers: %+v", list)
				}
			})
		})
	}
}

// TestCorruptionDoesNotPass: what a checksum or a decoder refuses is not read again and again.
func TestCorruptionDoesNotPass(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
	for _, err := range []error{pebble.ErrCorruption, errRow, ErrClosed} {
		tries := 0
		if got := d.insist(func() error { tries++; return err }); got != err || tries != 1 {
			t.Errorf("%v: %d tries, then %v", err, tries, got)
		}
	}
}
