package embedded

import (
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// slowFS is a file system whose syncs of the write-ahead log do what a test wants before they happen.
type slowFS struct {
	vfs.FS
	mu   sync.Mutex
	hook func() error // before a sync of a *.log file; an error fails it
}

func (f *slowFS) onSync(hook func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

func (f *slowFS) sync() error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook()
}

func (f *slowFS) wrap(name string, file vfs.File, err error) (vfs.File, error) {
	if err != nil || !strings.HasSuffix(name, ".log") {
		return file, err
	}
	return &slowFile{File: file, fs: f}, nil
}

func (f *slowFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	return f.wrap(name, file, err)
}

func (f *slowFS) ReuseForWrite(oldname, newname string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(oldname, newname, c)
	return f.wrap(newname, file, err)
}

func (f *slowFS) Unwrap() vfs.FS { return f.FS }

type slowFile struct {
	vfs.File
	fs *slowFS
}

func (f *slowFile) Sync() error {
	if err := f.fs.sync(); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *slowFile) SyncData() error {
	if err := f.fs.sync(); err != nil {
		return err
	}
	return f.File.SyncData()
}
