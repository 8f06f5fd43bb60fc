package embedded

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"millrace/backend"
)

// errStoreFull is what Healthy says while sends are refused for want of disk space.
var errStoreFull = errors.New("the disk is nearly full: new messages are refused")

// Alive is an error when only a restart can help: the store has failed and refuses everything.
func (d *DB) Alive() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.pending.failed
}

// Healthy says why the store does not take sends, nil if it does: the disk is nearly full, a sync takes over 10 s, a read
// fails, the store has failed, or it closes.
func (d *DB) Healthy() error {
	d.mu.Lock()
	failed, stalled, closing := d.pending.failed, d.pending.stalled, d.pending.closing
	d.mu.Unlock()
	switch started := d.count.lastSync.Load(); {
	case failed != nil:
		return failed
	case closing:
		return ErrClosed
	case stalled != nil:
		return fmt.Errorf("a read of the store fails and is tried again: %w", stalled)
	case d.space.full.Load():
		return fmt.Errorf("%w (%d bytes free, %d needed)", errStoreFull, d.space.free.Load(), d.space.resume)
	case started != 0 && time.Since(time.Unix(0, started)) > stuckSync:
		return fmt.Errorf("the disk does not answer: a sync has been under way for over %v", stuckSync)
	}
	return nil
}

// Metrics emits the counters and gauges of the store. It may be called at any time from any goroutine.
func (d *DB) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	const p = "millrace_embedded_"
	c := &d.count
	emit(p+"appends_total", "Records made durable.", true, float64(c.appends.Load()))
	emit(p+"commits_total", "Commits of delivery progress made durable.", true, float64(c.commits.Load()))
	emit(p+"registrations_total", "Registrations answered.", true, float64(c.registers.Load()))
	emit(p+"batches_total", "Batches synced; appends, commits and registrations per batch follow from it.", true, float64(c.batches.Load()))
	emit(p+"batch_bytes_total", "Bytes of all synced batches.", true, float64(c.bytes.Load()))
	emit(p+"sync_seconds_total", "Time from handing a batch to the log until it was durable, over all batches.", true, float64(c.syncNanos.Load())/1e9)
	emit(p+"trims_total", "Times the log was trimmed.", true, float64(c.trims.Load()))
	emit(p+"log_reads_total", "Records read back from the log, after a restart or by a shard that lagged.", true, float64(c.diskReads.Load()))

	for i, r := range damageRanges {
		emit(p+"damaged_rows_total", "Rows that could not be decoded and were set aside, by key range.", true, float64(c.damaged[i].Load()), "range", r.name)
	}
	emit(p+"read_retries_total", "Reads that failed and that everything waited for.", true, float64(c.readRetries.Load()))

	const refused, refusedHelp = p + "refused_total", "Records refused, by reason."
	emit(refused, refusedHelp, true, float64(c.refusedWaiting.Load()), "reason", "waiting_for_sync")
	emit(refused, refusedHelp, true, float64(c.refusedLag.Load()), "reason", "delivery_lag")
	emit(refused, refusedHelp, true, float64(c.refusedFull.Load()), "reason", "store_full")
	emit(refused, refusedHelp, true, float64(c.refusedOther.Load()), "reason", "other")

	d.mu.Lock()
	sends, bytes := d.pending.waitingSends, d.pending.waitingBytes
	commits := len(d.pending.commits)
	d.mu.Unlock()
	emit(p+"waiting_sends", "Records waiting for fsync.", false, float64(sends))
	emit(p+"waiting_bytes", "Memory of the records waiting for fsync.", false, float64(bytes))
	emit(p+"waiting_commits", "Commits waiting for a batch.", false, float64(commits))
	gone := c.gone.Load()
	for i, s := range d.shards {
		gone += s.gone.Load()
		emit(p+"unread_records", "Durable records that delivery has not taken yet.", false, float64(s.unreadNow.Load()), "shard", strconv.Itoa(i))
	}
	for kind, name := range expireNames {
		emit(p+"expired_rows_total", "Rows deleted because of their age, by kind.", true, float64(c.expired[kind].Load()), "kind", name)
	}
	emit(p+"swept_rows_total", "Rows that the search for expired ones looked at.", true, float64(c.sweptRows.Load()))
	emit(p+"sweep_passes_total", "Passes of that search over the whole database.", true, float64(c.passes.Load()))
	emit(p+"sweep_pass_age_seconds", "Time since the last of these passes began, or since the start; one is due every day.", false, time.Duration(c.sincePass.Load()).Seconds())
	const broken, brokenHelp = p + "invariant_violations_total", "Must be 0: what has broken a promise."
	emit(broken, brokenHelp, true, float64(c.early.Load()), "promise", backend.PromiseDurable.String())
	emit(broken, brokenHelp, true, float64(gone), "promise", backend.PromiseDelivered.String())
	emit(p+"mailbox_rows", "Rows in all mailboxes.", false, float64(c.mailboxRows.Load()))

	emit(p+"store_full", "1 while sends are refused for want of disk space.", false, oneIf(d.space.full.Load()))
	if d.space.known {
		emit(p+"free_bytes", "Free space of the data directory's file system.", false, float64(d.space.free.Load()))
	}
	emit(p+"write_stalls_total", "Times that writes waited for a flush or compaction.", true, float64(d.stalls.stalls.Load()))
	emit(p+"slow_disk_total", "Disk operations that took over 5 s.", true, float64(d.stalls.slow.Load()))
	d.databaseMetrics(p, emit)
}

func (d *DB) databaseMetrics(p string, emit func(name, help string, counter bool, value float64, labels ...string)) {
	d.reads.RLock()
	defer d.reads.RUnlock()
	if d.closed {
		return
	}
	m := d.kv.Metrics()
	emit(p+"disk_bytes", "Disk space used by the database.", false, float64(m.DiskSpaceUsage()))
	emit(p+"compaction_debt_bytes", "Estimate of what is to be compacted until the database is in its stable shape.", false, float64(m.Compact.EstimatedDebt))
	emit(p+"compactions_total", "Compactions.", true, float64(m.Compact.Count))
	emit(p+"flushes_total", "Flushes of memtables.", true, float64(m.Flush.Count))
	emit(p+"memtable_bytes", "Memory of memtables.", false, float64(m.MemTable.Size))
	emit(p+"cache_bytes", "Memory of cached blocks.", false, float64(m.BlockCache.Size))
	emit(p+"read_amplification", "Sorted runs that a read may have to look at.", false, float64(m.ReadAmp()))
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
