package embedded

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// ErrLocked says that another DB, here or in another process, has the data directory open.
var ErrLocked = errors.New("the data directory is in use by another millrace")

// ErrFormat says that the data directory was written by a version that this one does not understand.
var ErrFormat = errors.New("the data directory has another format")

// ErrClosed is returned by reads after Close.
var ErrClosed = errors.New("embedded: closed")

// formatVersion is what FORMAT holds. It is raised when an older version must not open the directory. Format 2 has longer
// counts and states; rows of format 1 are read as they are, so a directory of format 1 is taken over.
const formatVersion = 2

const formatPrefix = "millrace data format "

// DB is an open data directory. Its methods may be called from any goroutine.
type DB struct {
	// Immutable after Open.
	cfg      Config
	log      *slog.Logger
	fs       vfs.FS // without the disk-full hook: for the ballast
	kv       *pebble.DB
	lock     io.Closer
	identity [32]byte
	shards   []*shard
	space    *space
	stalls   *stallCounts

	// Set once by Start, before the goroutines run.
	hooks backend.Hooks

	// Owned by the committer, see committer.go.
	builder builder

	// Owned by the syncer: the position of the last record that was synced.
	durable uint64

	// Owned by the sweeper's goroutine, see expiry.go.
	sweeper sweeper

	syncing chan *batch   // committer → syncer, unbuffered: at most one batch syncs while one is built
	free    chan *batch   // syncer → committer, for reuse
	kick    chan struct{} // wakes the committer; capacity 1
	closing chan struct{} // closed when Close begins
	stop    chan struct{} // closed when the committer and the syncer are done
	workers sync.WaitGroup

	mu      sync.Mutex // guards the following; held for moments, never over a read or write
	pending pending

	reads  sync.RWMutex // held shared by reads of kv, exclusively by Close
	closed bool         // guarded by reads

	count counters // atomic
}

// Open opens or creates the data directory and locks it until Close. It fails with ErrLocked if it is in use and
// with ErrFormat if a newer version wrote it. It reads the log once; nothing else runs before Start.
func Open(cfg Config) (*DB, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	fs := cfg.FS
	if fs == nil {
		fs = vfs.Default
		dir, err := filepath.Abs(cfg.Dir)
		if err != nil {
			return nil, fmt.Errorf("data directory: %w", err)
		}
		cfg.Dir = dir
	}
	if err := makeDir(fs, cfg.Dir); err != nil {
		return nil, fmt.Errorf("create data directory: %w", err)
	}
	lock, err := lockDir(fs, cfg.Dir)
	if err != nil {
		return nil, err
	}
	d := &DB{
		cfg:     cfg,
		log:     cfg.Logger,
		fs:      fs,
		lock:    lock,
		stalls:  &stallCounts{},
		syncing: make(chan *batch),
		free:    make(chan *batch, batchesInFlight),
		kick:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		stop:    make(chan struct{}),
	}
	if err := d.open(); err != nil {
		if d.kv != nil {
			err = errors.Join(err, d.kv.Close())
		}
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

func (d *DB) open() (err error) {
	if err := checkFormat(d.fs, d.cfg.Dir); err != nil {
		return err
	}
	if d.space, err = newSpace(d.fs, d.cfg.Dir, d.cfg.MinFreeBytes, d.log); err != nil {
		return err
	}
	d.space.check() // a disk that is already full needs the ballast back before Pebble writes

	fs := vfs.OnDiskFull(d.fs, d.space.release)
	o := pebbleOptions(fs, d.log, d.cfg.exit, d.stalls)
	if d.space.disk {
		o.WithFSDefaults() // watches for slow operations
	}
	if d.kv, err = pebble.Open(d.fs.PathJoin(d.cfg.Dir, "db"), o); err != nil {
		return fmt.Errorf("open database: %w", err)
	}
	if err := syncDir(d.fs, d.cfg.Dir); err != nil {
		return fmt.Errorf("sync data directory: %w", err)
	}
	if err := d.loadIdentity(); err != nil {
		return err
	}
	if err := d.recover(); err != nil {
		return err
	}
	if err := d.applyLimit(); err != nil {
		return fmt.Errorf("apply the mailbox limit: %w", err)
	}
	return nil
}

// makeDir creates dir and those above it that are missing, readable by their owner only, and makes their entries durable. It
// goes from the top: no directory is made before the entry of the one around it is durable, so after a power cut or a
// kill at any moment only the lowest one that is there can have an entry that is not.
func makeDir(fs vfs.FS, dir string) error {
	var missing []string // the lowest first
	there := dir
	for there != fs.PathDir(there) {
		_, err := fs.Stat(there)
		if err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		missing = append(missing, there)
		there = fs.PathDir(there)
	}
	// Where we may not look we have not made anything.
	if err := syncDir(fs, fs.PathDir(there)); err != nil && !errors.Is(err, os.ErrPermission) {
		return err
	}
	for _, name := range slices.Backward(missing) {
		if err := fs.MkdirAll(name, 0o700); err != nil {
			return err
		}
		if err := syncDir(fs, fs.PathDir(name)); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(fs vfs.FS, dir string) error {
	f, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func lockDir(fs vfs.FS, dir string) (io.Closer, error) {
	lock, err := fs.Lock(fs.PathJoin(dir, "LOCK"))
	if err == nil {
		return lock, nil
	}
	// Another process: EAGAIN or EACCES from fcntl. This process: vfs has no sentinel for it.
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) || strings.Contains(err.Error(), "held by current process") {
		return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
	}
	return nil, fmt.Errorf("lock data directory: %w", err)
}

// checkFormat reads FORMAT, or writes it into a new directory before anything else is there. It stands outside the
// database, so that a directory of a newer version is refused with a word about versions.
func checkFormat(fs vfs.FS, dir string) error {
	name := fs.PathJoin(dir, "FORMAT")
	text, err := readFile(fs, name)
	if errors.Is(err, os.ErrNotExist) {
		return writeFormat(fs, dir, name)
	}
	if err != nil {
		return fmt.Errorf("read format: %w", err)
	}
	version, found := strings.CutPrefix(strings.TrimSpace(string(text)), formatPrefix)
	n, err := strconv.Atoi(version)
	if !found || err != nil || n < 1 {
		return fmt.Errorf("%w: %s does not say %q and a number", ErrFormat, name, formatPrefix)
	}
	switch {
	case n > formatVersion:
		return fmt.Errorf("%w: %s has format %d, this version reads formats up to %d; use the millrace that wrote it, or a newer one",
			ErrFormat, dir, n, formatVersion)
	case n < formatVersion: // before the first row that an older version would take for damaged
		return writeFormat(fs, dir, name)
	}
	return nil
}

func writeFormat(fs vfs.FS, dir, name string) error {
	temporary := name + ".new"
	f, err := fs.Create(temporary, vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("create format: %w", err)
	}
	_, err = fmt.Fprintf(f, "%s%d\n", formatPrefix, formatVersion)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write format: %w", err)
	}
	if err := errors.Join(fs.Rename(temporary, name), syncDir(fs, dir)); err != nil {
		return fmt.Errorf("write format: %w", err)
	}
	return nil
}

func readFile(fs vfs.FS, name string) ([]byte, error) {
	f, err := fs.Open(name)
	if err != nil {
		return nil, err
	}
	const enough = 1 << 10
	text, err := io.ReadAll(io.LimitReader(f, enough))
	return text, errors.Join(err, f.Close())
}

// loadIdentity reads the identity secret, or makes it: once, and durable before anyone can have used it.
func (d *DB) loadIdentity() error {
	value, err := d.get(keyIdentity)
	if err != nil {
		return fmt.Errorf("read identity: %w", err)
	}
	if value != nil {
		if len(value) != len(d.identity) {
			return fmt.Errorf("identity: %w", errRow)
		}
		copy(d.identity[:], value)
		return nil
	}
	rand.Read(d.identity[:]) // never fails: it ends the process instead
	if err := d.kv.Set(keyIdentity, d.identity[:], pebble.Sync); err != nil {
		return fmt.Errorf("write identity: %w", err)
	}
	return nil
}

// recover reads where the log stands: what is unread per shard (all of it), and the last position ever given. The log
// alone does not tell the latter, since it is trimmed.
func (d *DB) recover() error {
	value, err := d.get(keyState)
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	b := &d.builder
	if value != nil {
		if b.state, err = decodeState(value); err != nil {
			return err
		}
	}
	d.shards = make([]*shard, d.cfg.Shards)
	for i := range d.shards {
		d.shards[i] = newShard(&d.cfg)
	}
	b.lows = make([]lowWater, len(d.shards))
	if err := d.sweeper.load(d); err != nil {
		return err
	}

	b.trimmed = b.last + 1
	first := true
	err = d.scanLog(0, 1<<63, func(position uint64, value []byte) (bool, error) {
		if first {
			b.trimmed, first = position, false
		}
		b.last = max(b.last, position)
		hash, ok := recordConversation(value)
		if !ok {
			d.suspect(appendLogKey(nil, position))
			d.count.gone.Add(1)
			return true, nil
		}
		i := hash % uint64(len(d.shards))
		d.shards[i].unread++
		b.lows[i].appended(position)
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("read the log: %w", err)
	}
	now := d.nowMs()
	for _, s := range d.shards {
		s.replay(b.last, now)
	}
	b.init(d)
	return nil
}

// Identity is the secret that message ids are derived from: made once, kept with the data, never shown.
func (d *DB) Identity() [32]byte { return d.identity }

// LastMs is the latest time, in ms since 1970, that a position or a receipt had when the DB was opened: a new owner
// whose clock was set back must not date anything before it. Call it before Start.
func (d *DB) LastMs() int64 {
	return max(protocol.PositionMillis(d.builder.last), d.builder.receiptMs)
}

// Start begins the work and must be called exactly once, before the first Append, Commit or Register. The hooks are
// called from the DB's own goroutines. It wakes the shards that have something to read and reports
// every full mailbox.
func (d *DB) Start(h backend.Hooks) {
	d.mu.Lock()
	if d.pending.started {
		d.mu.Unlock()
		panic("embedded: Start called twice")
	}
	d.pending.started = true
	d.mu.Unlock()
	d.hooks = fillHooks(h)
	d.workers.Go(d.runCommitter)
	d.workers.Go(d.runSyncer)
	d.workers.Go(d.watchSpace)
	if !d.cfg.stillSweeper {
		d.workers.Go(d.runSweeper)
	}
}

func fillHooks(h backend.Hooks) backend.Hooks {
	if h.Answer == nil {
		h.Answer = func([]protocol.Answer) {}
	}
	if h.Wake == nil {
		h.Wake = func(int) {}
	}
	if h.MailboxFull == nil {
		h.MailboxFull = func(string, string, bool) {}
	}
	return h
}

// Close refuses new sends, makes everything pending durable, answers it, and closes the database. Commits and
// registrations made by the last callbacks are still taken; after Close they are not. Not to be called from a hook.
func (d *DB) Close() error {
	d.mu.Lock()
	if d.pending.closing {
		d.mu.Unlock()
		return ErrClosed
	}
	d.pending.closing = true
	close(d.closing)
	started := d.pending.started
	d.wakeLocked()
	d.mu.Unlock()
	if started {
		d.workers.Wait()
	}

	d.reads.Lock()
	defer d.reads.Unlock()
	d.closed = true
	err := d.kv.Close()
	if err != nil {
		err = fmt.Errorf("close database: %w", err)
	}
	return errors.Join(err, d.lock.Close())
}

func (d *DB) nowMs() int64 { return d.cfg.Now().UnixMilli() }

// counters are what Metrics shows, all monotonic.
type counters struct {
	appends   atomic.Uint64
	commits   atomic.Uint64
	registers atomic.Uint64
	batches   atomic.Uint64
	bytes     atomic.Uint64
	syncNanos atomic.Uint64
	trims     atomic.Uint64
	diskReads atomic.Uint64 // records that Read took from the log
	gone      atomic.Uint64 // unfinished records that were not in the log, and mailbox rows, lost
	early     atomic.Uint64 // batches of answers before their sync

	readRetries atomic.Uint64
	damaged     [len(damageRanges)]atomic.Uint64

	refusedWaiting atomic.Uint64
	refusedLag     atomic.Uint64
	refusedFull    atomic.Uint64
	refusedOther   atomic.Uint64

	expired   [expireKinds]atomic.Uint64
	sweptRows atomic.Uint64
	passes    atomic.Uint64
	sincePass atomic.Int64 // nanoseconds of run time since the last pass began

	mailboxRows atomic.Uint64
	lastSync    atomic.Int64 // UnixNano of the start of the sync under way, 0 when none is
}

// stuckSync is when a sync under way makes the store unhealthy.
const stuckSync = 10 * time.Second
