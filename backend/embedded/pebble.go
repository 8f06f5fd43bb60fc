package embedded

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// pebbleOptions tunes Pebble for one committer that syncs every batch. With the defaults (4 MiB memtable) the
// slowest percent of syncs wait 60 ms for flushes; with these, 6 to 18 ms.
func pebbleOptions(fs vfs.FS, log *slog.Logger, exit func(int), stalls *stallCounts) *pebble.Options {
	o := &pebble.Options{
		FS: fs,
		// Pinned, not FormatNewest: a newer library must not make the data unreadable for this version unasked.
		FormatMajorVersion:          pebble.FormatValueSeparation,
		MemTableSize:                memTableBytes,
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       24,
		LBaseMaxBytes:               memTableBytes,
		BytesPerSync:                1 << 20,
		CacheSize:                   cacheBytes,
		MaxOpenFiles:                maxOpenFiles,
		CompactionConcurrencyRange:  func() (int, int) { return 1, 2 },
		Logger:                      pebbleLogger{log, exit},
		EventListener: &pebble.EventListener{
			BackgroundError: func(err error) { log.Error("pebble: background error", "error", err) },
			DataCorruption:  func(i pebble.DataCorruptionInfo) { log.Error("pebble: data is corrupt", "details", i.String()) },
			DiskSlow: func(i pebble.DiskSlowInfo) {
				stalls.slow.Add(1)
				log.Warn("the disk is slow", "operation", i.OpType.String(), "duration", i.Duration)
			},
			WriteStallBegin: func(i pebble.WriteStallBeginInfo) {
				stalls.stalls.Add(1)
				log.Warn("pebble: writes stall", "reason", i.Reason)
			},
			WriteStallEnd: func() { log.Info("pebble: writes go on") },
		},
	}
	// Most existence checks (mailbox row, window, outstanding) are for keys that are not there: the filter, 10 bits a
	// key and 1 % false, answers them without a read.
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	return o
}

// stallCounts counts what slows the committer down.
type stallCounts struct {
	stalls atomic.Uint64 // writes stopped until a flush or a compaction was done
	slow   atomic.Uint64 // one disk operation took over 5 s
}

// pebbleLogger is Pebble's Logger. Its remarks on flushes and compactions are for debugging.
type pebbleLogger struct {
	log  *slog.Logger
	exit func(code int)
}

func (l pebbleLogger) Infof(format string, args ...any) {
	l.log.Debug("pebble: " + fmt.Sprintf(format, args...))
}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.log.Error("pebble: " + fmt.Sprintf(format, args...))
}

// Fatalf ends the process: after a failed write or sync of the WAL nobody knows what is on the disk, and going on would
// answer for it. A restart reads what really is there; clients send again what was not answered.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	l.log.Error("the store cannot go on; the process ends so that a restart reads what is really on the disk",
		"error", fmt.Sprintf(format, args...))
	l.exit(1)
}
