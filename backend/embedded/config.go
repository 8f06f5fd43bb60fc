package embedded

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"runtime"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/protocol"
)

// Limits of the implementation. What a Config field of the same meaning can change is its default.
const (
	maxBatchBytes       = 1 << 20 // of the sends of a batch, about 3 500 records, and as much of progress: a few milliseconds of WAL each
	rowCost             = 256     // what each row of progress counts besides its bytes: it is read before it is written
	defaultWaitingBytes = 64 << 20
	defaultWaitingSends = 65_536
	defaultLag          = 5 * time.Second
	defaultUnread       = 200_000
	defaultRingBytes    = 8 << 20 // per shard
	defaultRingRecords  = 16_384  // per shard
	maxDefaultShards    = 4
	maxShards           = 256

	maxCommitWait  = 100 * time.Millisecond // for company, of a commit that is not urgent
	maxCommitBytes = maxBatchBytes          // pending commits that large do not wait
	trimInterval   = time.Second
	trimRecords    = 8_192
	trimsPerFlush  = 512 // range tombstones in a memtable slow its reads: flush after so many

	defaultMinFreeBytes   = 1 << 30
	defaultMinFreePercent = 5
	ballastBytes          = 64 << 20 // or 1/16 of the mark, if that is less

	readRetry    = time.Second // between two tries of a read that the store cannot go on without
	maxReadTries = 60

	retryOverloadedMs = 500
	retryStoreFullMs  = 5_000
	retryClosingMs    = 1_000
	retryInternalMs   = 5_000

	// Pebble. The memtable starts at 256 KiB and doubles up to this size as it is filled, so a small site does not pay for it.
	memTableBytes = 64 << 20
	cacheBytes    = 2*memTableBytes + 64<<20 // memtables, one filling and one being flushed, are taken out of it
	maxOpenFiles  = 384                      // of the 512 descriptors that the root keeps from clients; the rest is for sockets, event loops and logs
)

// Config says where the data lies and how much may wait. Only Dir is required.
type Config struct {
	// Dir is the data directory; it is created if missing and locked while open.
	Dir string
	// FS is the file system; nil is the disk.
	FS vfs.FS
	// Shards is the number of delivery shards, at most 256; 0 is min(GOMAXPROCS, 4). It may change from one start to the next.
	Shards int
	// MinFreeBytes is the free space below which sends are refused with store_full; 0 is max(1 GiB, 5 % of the file system).
	MinFreeBytes uint64
	// Now is the clock that stamps records, held between 1970 and 2100; nil is time.Now.
	Now func() time.Time
	// Logger receives what an operator should know; nil discards it. Pebble's own remarks come at level Debug.
	Logger *slog.Logger

	// MaxWaitingBytes and MaxWaitingSends limit what waits for fsync; 0 is 64 MiB and 65 536.
	MaxWaitingBytes int64
	MaxWaitingSends int
	// MaxLag and MaxUnread limit how far Read may stay behind in one shard before sends to it are refused;
	// 0 is 5 s and 200 000 records.
	MaxLag    time.Duration
	MaxUnread int
	// RingBytes and RingRecords limit the durable records of one shard kept in memory for Read; 0 is 8 MiB and 16 384.
	RingBytes   int64
	RingRecords int
	// MailboxRows is when a mailbox counts as full; 0 is protocol.MaxMailboxRows.
	MailboxRows int

	// Tests only.
	skipSyncWait bool              // answer before the fsync: what the crash tests must find
	atPoint      func(name string) // called at every crash point
	exit         func(code int)    // instead of os.Exit after a failed WAL
	stillSweeper bool              // Start does not run the sweeper: the test takes its steps
}

func (c *Config) validate() error {
	if c.Dir == "" {
		return errors.New("embedded: the data directory is not set")
	}
	if c.Shards < 0 || c.Shards > maxShards {
		return fmt.Errorf("embedded: %d shards, want 1 to %d", c.Shards, maxShards)
	}
	if c.MaxWaitingBytes < 0 || c.MaxWaitingSends < 0 || c.MaxLag < 0 || c.MaxUnread < 0 || c.RingBytes < 0 || c.RingRecords < 0 || c.MailboxRows < 0 {
		return errors.New("embedded: a limit is negative")
	}
	if c.MailboxRows > math.MaxUint32 {
		return errors.New("embedded: the mailbox limit is over 2^32 rows")
	}
	setDefault(&c.Shards, min(runtime.GOMAXPROCS(0), maxDefaultShards))
	setDefault(&c.MaxWaitingBytes, defaultWaitingBytes)
	setDefault(&c.MaxWaitingSends, defaultWaitingSends)
	setDefault(&c.MaxLag, defaultLag)
	setDefault(&c.MaxUnread, defaultUnread)
	setDefault(&c.RingBytes, defaultRingBytes)
	setDefault(&c.RingRecords, defaultRingRecords)
	setDefault(&c.MailboxRows, protocol.MaxMailboxRows)
	if c.Now == nil {
		c.Now = time.Now
	}
	c.Now = within(c.Now)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.exit == nil {
		c.exit = os.Exit
	}
	return nil
}

// earliest and latest are what the clock is held to. A position has room for the time until 2109; a clock that was there for a moment
// leaves the last position there for ever, and from then on each record takes the next one. Up to latest there is room for
// 6e14 of them, a million a second for 19 years.
var (
	earliest = time.UnixMilli(0)
	latest   = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
)

func within(clock func() time.Time) func() time.Time {
	return func() time.Time {
		now := clock()
		switch {
		case now.Before(earliest):
			return earliest
		case now.After(latest):
			return latest
		}
		return now
	}
}

func setDefault[T int | int64 | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}
