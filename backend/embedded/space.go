package embedded

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const spaceInterval = time.Second

// space watches the free space of the data directory's file system. Pebble ends the process when a write of its WAL
// fails, so sends are refused well before: below mark. Deletions and progress still go on, they are what makes space. The ballast is a
// file that only takes up space; it is given back when even these could fail, and made again later.
type space struct {
	// Immutable.
	fs      vfs.FS
	dir     string
	log     *slog.Logger
	disk    bool   // fs is a real file system
	known   bool   // fs can tell its free space
	mark    uint64 // sends are refused below this
	resume  uint64 // and taken again from this on: mark and 1/16, so that it does not flap
	low     uint64 // the ballast is given back below this: a quarter of mark
	ballast uint64 // its size; 0 for none

	full atomic.Bool
	free atomic.Uint64 // bytes, as last seen

	mu      sync.Mutex // guards the ballast file
	present bool       // it is there, to be given back
	whole   bool       // this run has made it; what an earlier one left may be cut short by a crash, or of another size
	broken  bool       // it could not be made: not tried again
}

// newSpace fails only if the file system can tell its free space and refuses to.
func newSpace(fs vfs.FS, dir string, minFree uint64, log *slog.Logger) (*space, error) {
	s := &space{fs: fs, dir: dir, log: log, disk: vfs.Root(fs) == vfs.Default}
	usage, err := fs.GetDiskUsage(dir)
	switch {
	case errors.Is(err, vfs.ErrUnsupported):
		return s, nil
	case err != nil:
		return nil, fmt.Errorf("read free space: %w", err)
	}
	s.known = true
	s.mark = minFree
	if s.mark == 0 {
		s.mark = max(defaultMinFreeBytes, usage.TotalBytes/100*defaultMinFreePercent)
	}
	s.resume, s.low = s.mark+s.mark/16, s.mark/4
	if s.disk {
		s.ballast = min(ballastBytes, s.mark/16)
		_, err := fs.Stat(s.ballastName())
		s.present = err == nil
	}
	return s, nil
}

func (s *space) ballastName() string { return s.fs.PathJoin(s.dir, "ballast") }

// check looks at the free space and acts on it. It reports whether sends have just begun to be refused.
func (s *space) check() (began bool) {
	if !s.known {
		return false
	}
	usage, err := s.fs.GetDiskUsage(s.dir)
	if err != nil {
		s.log.Warn("cannot read the free space", "directory", s.dir, "error", err)
		return false
	}
	free := usage.AvailBytes
	s.free.Store(free)
	switch full := s.full.Load(); {
	case !full && free < s.mark:
		s.full.Store(true)
		began = true
		s.log.Error("the disk is nearly full: new messages are refused until there is space again",
			"directory", s.dir, "free_bytes", free, "mark_bytes", s.mark)
	case full && free >= s.resume:
		s.full.Store(false)
		s.log.Info("the disk has space again: new messages are taken", "free_bytes", free)
	}
	switch {
	case free < s.low:
		s.release()
	case free >= s.resume+s.ballast:
		s.reserve()
	}
	return began
}

// release gives the ballast back. It is also what Pebble calls when a write finds the disk full, before it tries
// that write once more.
func (s *space) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.present {
		return
	}
	if err := s.fs.Remove(s.ballastName()); err != nil {
		s.log.Error("cannot give back the ballast", "error", err)
		return
	}
	s.present, s.whole = false, false
	s.log.Warn("the disk is full: the ballast is given back", "bytes", s.ballast)
}

// reserve makes the ballast, anew once in every run. A file system that cannot reserve space goes without.
func (s *space) reserve() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.whole || s.broken || s.ballast == 0 {
		return
	}
	f, err := s.fs.Create(s.ballastName(), vfs.WriteCategoryUnspecified)
	if err == nil {
		err = errors.Join(f.Preallocate(0, int64(s.ballast)), f.Sync(), f.Close())
	}
	if err != nil {
		s.present, s.broken = false, true
		err = errors.Join(err, s.fs.Remove(s.ballastName()))
		s.log.Warn("no ballast: the file system does not reserve space", "error", err)
		return
	}
	s.present, s.whole = true, true
}

// watchSpace checks once a second until the DB closes.
func (d *DB) watchSpace() {
	ticker := time.NewTicker(spaceInterval)
	defer ticker.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-ticker.C:
			d.checkSpace()
		}
	}
}

// checkSpace also flushes when space runs out: what was trimmed and deleted frees nothing before that.
func (d *DB) checkSpace() {
	if !d.space.check() {
		return
	}
	if _, err := d.kv.AsyncFlush(); err != nil {
		d.log.Error("cannot flush", "error", err)
	}
}
