package embedded

import (
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend/backendtest"
)

// storage opens the same directory again and again.
func storage(fs vfs.FS, dir string) backendtest.Storage {
	return func(t *testing.T, o backendtest.Options) backendtest.Instance {
		t.Helper()
		db, err := Open(Config{Dir: dir, FS: fs, Shards: o.Shards, Now: o.Now, MailboxRows: o.MailboxRows,
			MaxUnread: o.MaxUnread, RingRecords: o.Buffered, MinFreeBytes: 1, stillSweeper: true})
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		return suiteDB{db}
	}
}

// suiteDB takes the sweeper's steps when the suite lets time pass.
type suiteDB struct{ *DB }

func (d suiteDB) Age(age time.Duration) error {
	d.sweeper.walking, d.sweeper.passed = false, false // begin a new pass
	_, err := d.sweep(d.cfg.Now(), age)
	for err == nil && d.sweeper.walking {
		_, err = d.sweep(d.cfg.Now(), 0)
	}
	return err
}

func TestSuiteInMemory(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backendtest.Storage { return storage(vfs.NewMem(), "/data") })
}

func TestSuiteOnDisk(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backendtest.Storage { return storage(nil, t.TempDir()) })
}
