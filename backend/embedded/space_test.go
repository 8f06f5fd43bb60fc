package embedded

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// outOfSpace is the real file system; once it is full, writes to the log of the database fail until the ballast is gone.
type outOfSpace struct {
	vfs.FS
	ballast string
	full    atomic.Bool
	failed  atomic.Int64
}

func (f *outOfSpace) Unwrap() vfs.FS { return f.FS }

func (f *outOfSpace) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: 1 << 40, TotalBytes: 1 << 41}, nil // as it was a moment ago
}

func (f *outOfSpace) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	if err != nil {
		return nil, err
	}
	return &outOfSpaceFile{file, f, strings.HasSuffix(name, ".log")}, nil
}

type outOfSpaceFile struct {
	vfs.File
	fs  *outOfSpace
	log bool
}

func (f *outOfSpaceFile) Preallocate(offset, length int64) error {
	if !f.log {
		return nil // the ballast: that it is there is enough
	}
	return f.File.Preallocate(offset, length)
}

func (f *outOfSpaceFile) Write(p []byte) (int, error) {
	if f.log && f.fs.full.Load() {
		if _, err := os.Stat(f.fs.ballast); err == nil {
			f.fs.failed.Add(1)
			return 0, &os.PathError{Op: "write", Path: "log", Err: syscall.ENOSPC}
		}
	}
	return f.File.Write(p)
}

// TestDiskFullCostsTheBallast: when the log of the database finds the disk full in spite of the mark, the ballast is given back, the
// write is tried again, and the send is answered; the process goes on.
func TestDiskFullCostsTheBallast(t *testing.T) {
	dir := t.TempDir()
	fs := &outOfSpace{FS: vfs.Default, ballast: filepath.Join(dir, "ballast")}
	d := open(t, Config{Dir: dir, FS: fs, Shards: 1, MinFreeBytes: 1 << 20, exit: func(int) { panic("the process ends") }})
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	if _, err := os.Stat(fs.ballast); err != nil {
		t.Fatalf("there is no ballast: %v", err)
	}
	fs.full.Store(true)
	for n := range 3 {
		if refusal := d.Append(smallRecord(n)); refusal.Code != protocol.OK {
			t.Fatalf("append refused: %+v", refusal)
		}
		if answer := a.wait(n + 1)[n]; answer.Code != protocol.OK {
			t.Fatalf("answered %+v", answer)
		}
	}
	if fs.failed.Load() == 0 {
		t.Error("no write failed")
	}
	if _, err := os.Stat(fs.ballast); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the ballast is still there: %v", err)
	}
	d.closeNow(t)
	fs.full.Store(false)
	d = open(t, Config{Dir: dir, FS: fs, Shards: 1, MinFreeBytes: 1 << 20})
	if n := d.shards[0].unreadNow.Load(); n != 3 {
		t.Errorf("%d records are there after a restart, 3 were answered", n)
	}
}

// TestSendsResumeByThemselves: P8, nobody but the watch looks at the space.
func TestSendsResumeByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		free := func(bytes uint64) { fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: bytes, TotalBytes: 100 << 30}) }
		free(50 << 30)
		d, err := Open(Config{Dir: "/data", FS: fs, Shards: 1})
		if err != nil {
			t.Fatal(err)
		}
		answered := make(chan protocol.Code, 1)
		d.Start(backend.Hooks{Answer: func(batch []protocol.Answer) { answered <- batch[0].Code }})
		for n, step := range []struct {
			free uint64
			want protocol.Code
		}{{50 << 30, protocol.OK}, {1 << 30, protocol.CodeStoreFull}, {50 << 30, protocol.OK}, {0, protocol.CodeStoreFull}, {6 << 30, protocol.OK}} {
			free(step.free)
			time.Sleep(2 * spaceInterval)
			if _, err := d.Read(0, nil, 10); err != nil {
				t.Fatal(err)
			}
			refusal := d.Append(smallRecord(n))
			if refusal.Code != step.want {
				t.Fatalf("with %d bytes free: %+v, want %v", step.free, refusal, step.want)
			}
			if refusal.Code == protocol.OK {
				if code := <-answered; code != protocol.OK {
					t.Fatalf("with %d bytes free a send is answered with %v", step.free, code)
				}
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
