package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"millrace/protocol"
)

// Implementation limits of a Server.
const (
	takeRecords       = 1024 // records read from the queue at once
	maxCommitsWaiting = 4    // per shard; more progress is gathered until one is durable
	maxInterned       = 65_536
	tickEvery         = 100 * time.Millisecond
	mailboxReaders    = 4
)

// Config is what a Server is built from.
type Config struct {
	Queue   Queue
	Store   Store
	Locator Locator
	Pusher  Pusher
	Answer  func(batch []protocol.Answer) // to the edges; must not block
	Page    func(page protocol.Page)      // to the edges; must not block
	// ReceiptsPage is Page for receipts.
	ReceiptsPage func(page protocol.ReceiptsPage)
	Fenced       func(fence protocol.Fence) // to the edges; must not block
	Identity     []byte                     // the secret, SecretBytes long
	Now          func() time.Time
	Logger       *slog.Logger
	// NotBeforeMs is a time, ms since 1970, before which no receipt may be dated: at or after every receipt dated
	// by an earlier process on the same data, whatever the clock did since.
	NotBeforeMs int64
	// AcknowledgeAfter is how long a push may stay unacknowledged; 0 is the default of OwnerConfig.
	AcknowledgeAfter time.Duration
	// MaxInFlight and MaxIdleConversations are of each shard; 0 is the default of OwnerConfig.
	MaxInFlight          int
	MaxIdleConversations int
}

func (c *Config) validate() error {
	if c.Queue == nil || c.Store == nil || c.Locator == nil || c.Pusher == nil || c.Answer == nil || c.Page == nil || c.ReceiptsPage == nil || c.Fenced == nil {
		return errors.New("backend: Queue, Store, Locator, Pusher, Answer, Page, ReceiptsPage and Fenced are required")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return nil
}

// Server runs the owners of this process's partitions, one goroutine each, and the readers of mailboxes.
// It implements edge.Publisher, edge.Acknowledger and edge.Mailbox.
type Server struct {
	cfg      Config
	identity *Identity
	started  time.Time // with a monotonic reading
	full     fullMailboxes
	shards   []*shard
	reads    readQueue
	dated    atomic.Int64  // ms since 1970: the latest date given out
	unsound  atomic.Uint64 // refusals, see Server.refused
	stop     chan struct{}
	done     sync.WaitGroup
}

// shard is the adapter around one Owner: it brings events in and carries actions out.
type shard struct {
	server *Server
	number int
	owner  *Owner // owned by run

	mu        sync.Mutex // guards the following fields
	outcomes  []Settlement
	fences    []*fence // behind outcomes
	committed int
	names     map[string]string

	wake chan struct{} // capacity 1

	// Owned by run.
	settling  []Settlement // swapped with outcomes
	records   []*Record    // read and not taken
	ended     bool         // the log was read to its end at least once
	asked     []*fence     // behind settling
	held      []heldFence  // by commit
	durable   uint64       // commits
	readFails int

	report   sync.Mutex // guards the following fields
	stats    OwnerStats // a copy, for Metrics
	inFlight int
	rounds   uint64 // steps done
	idle     bool   // the last step left nothing to take, to settle or to commit

	caughtUp atomic.Bool // everything up to the end of the log was taken at least once
}

// fence is one that waits for some shards.
type fence struct {
	protocol.Fence
	shards atomic.Int32 // that it waits for
}

// heldFence waits for a commit of one shard, counted from 1.
type heldFence struct {
	*fence
	commit uint64
}

// NewServer builds a Server; Start runs it.
func NewServer(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	identity, err := NewIdentity(cfg.Identity)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, identity: identity, started: cfg.Now(), stop: make(chan struct{})}
	s.reads.init()
	for n := range cfg.Queue.Shards() {
		owner, err := NewOwner(OwnerConfig{Shard: n, Reader: cfg.Store, Locator: cfg.Locator, Replay: true,
			AcknowledgeMillis: cfg.AcknowledgeAfter.Milliseconds(), MaxInFlight: cfg.MaxInFlight,
			MaxIdleConversations: cfg.MaxIdleConversations})
		if err != nil {
			return nil, err
		}
		s.shards = append(s.shards, &shard{server: s, number: n, owner: owner,
			names: make(map[string]string), wake: make(chan struct{}, 1)})
	}
	return s, nil
}

// Hooks are what the queue and the store must call.
func (s *Server) Hooks() Hooks {
	return Hooks{
		Answer:      s.answer,
		Wake:        func(shard int) { s.shards[shard].signal() },
		MailboxFull: s.full.set,
	}
}

// Start begins taking records.
func (s *Server) Start() {
	for _, sh := range s.shards {
		s.done.Go(sh.run)
		sh.signal()
	}
	for range mailboxReaders {
		s.done.Go(s.readMailboxes)
	}
}

// Close stops the owners. What they had not committed is in the log and is delivered again after a
// restart. It waits until they stopped; the queue and the store must still be open.
func (s *Server) Close() {
	close(s.stop)
	s.reads.close()
	s.done.Wait()
}

// Flush waits until every durable record was taken and everything the owners want stored is durable,
// or ctx ends. Nothing may be published meanwhile. Records may still wait for acknowledgements.
func (s *Server) Flush(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for _, sh := range s.shards {
		// Two whole steps from now have seen everything that was there before the call.
		from, _ := sh.progress()
		for {
			sh.signal()
			if rounds, idle := sh.progress(); rounds >= from+2 && idle {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("flush deliveries: %w", ctx.Err())
			case <-tick.C:
			}
		}
	}
	return nil
}

func (sh *shard) progress() (rounds uint64, idle bool) {
	sh.report.Lock()
	defer sh.report.Unlock()
	return sh.rounds, sh.idle
}

// CaughtUp reports whether every owner has read the log to its end since the start: until then
// what was accepted before a restart may still be on its way to mailboxes.
func (s *Server) CaughtUp() bool {
	for _, sh := range s.shards {
		if !sh.caughtUp.Load() {
			return false
		}
	}
	return true
}

// Settle hands outcomes to the owners of their conversations.
func (s *Server) Settle(batch []protocol.Outcome) {
	for i := range batch {
		out := &batch[i]
		s.shards[out.Conversation%uint64(len(s.shards))].settle(out)
	}
}

// Fence asks for Config.Fenced when everything settled before is durable; it implements edge.Acknowledger.
func (s *Server) Fence(f protocol.Fence) {
	asked := &fence{Fence: f}
	asked.shards.Store(int32(len(s.shards)))
	for _, sh := range s.shards {
		sh.mu.Lock()
		sh.fences = append(sh.fences, asked)
		sh.mu.Unlock()
		sh.signal()
	}
}

func (sh *shard) settle(out *protocol.Outcome) {
	sh.mu.Lock()
	device := ""
	if !out.UserMailbox {
		device = sh.intern(out.Device)
	}
	sh.outcomes = append(sh.outcomes, Settlement{Kind: out.Kind, Position: out.Position, ID: out.ID,
		User: sh.intern(out.User), Device: device})
	sh.mu.Unlock()
	sh.signal()
}

// intern gives the string of a name without an allocation when it was seen lately.
func (sh *shard) intern(name []byte) string {
	if s, ok := sh.names[string(name)]; ok {
		return s
	}
	if len(sh.names) >= maxInterned {
		clear(sh.names)
	}
	s := string(name)
	sh.names[s] = s
	return s
}

func (sh *shard) signal() {
	select {
	case sh.wake <- struct{}{}:
	default:
	}
}

func (sh *shard) run() {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-sh.server.stop:
			return
		case <-sh.wake:
		case <-tick.C:
		}
		for sh.step() {
			select {
			case <-sh.server.stop:
				return
			default:
			}
		}
	}
}

// Step does one round of a shard and reports whether there may be more to do at once. It is for a caller that drives
// the shards itself, from one goroutine, instead of Start.
func (s *Server) Step(shard int) (more bool) { return s.shards[shard].step() }

// step does one round: outcomes in, records in, actions out. It reports whether there may be more to do at once.
func (sh *shard) step() (more bool) {
	now := sh.server.nowMs()
	committed := sh.swap()
	for range committed {
		sh.owner.Committed()
		sh.durable++
	}
	sh.settling = sh.settling[:sh.owner.Settle(sh.settling)]
	sh.holdFences()
	more = sh.take(now)
	sh.owner.Tick(now)
	full := sh.owner.Full()
	sh.commit(now)
	more = more || full && !sh.owner.Full() // there is room for what had to wait
	sh.act()
	sh.answerFences()
	sh.publish(more)
	return more
}

// nowMs is one clock for all shards that never goes back: time-outs must not wait for a wall clock that was
// set back, and receipts of different shards are compared by their dates.
func (s *Server) nowMs() int64 {
	return max(s.started.UnixMilli(), s.cfg.NotBeforeMs) + s.cfg.Now().Sub(s.started).Milliseconds()
}

// date is what receipts are dated now: not before any that another shard has dated, nor, since clients compare both, before any record
// that another shard has taken. Records follow the wall clock, which may be set forward.
func (s *Server) date(ms int64) int64 {
	for {
		dated := s.dated.Load()
		if ms <= dated {
			return dated
		}
		if s.dated.CompareAndSwap(dated, ms) {
			return ms
		}
	}
}

// swap takes what came since the last step. Outcomes that could not be settled, because a read failed, go first.
func (sh *shard) swap() (committed int) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if len(sh.settling) == 0 {
		sh.settling, sh.outcomes = sh.outcomes, sh.settling
	} else {
		sh.settling = append(sh.settling, sh.outcomes...)
		clear(sh.outcomes)
		sh.outcomes = sh.outcomes[:0]
	}
	sh.asked = append(sh.asked, sh.fences...)
	sh.fences = sh.fences[:0]
	committed, sh.committed = sh.committed, 0
	return committed
}

// holdFences gives each fence the commit that it waits for: the one that is being gathered, if it holds anything, else the
// last one given out. Outcomes that could not be settled hold all back.
func (sh *shard) holdFences() {
	if len(sh.settling) > 0 {
		return
	}
	commit := sh.owner.Stats().Commits
	if sh.owner.Dirty() {
		commit++
	}
	for _, f := range sh.asked {
		sh.held = append(sh.held, heldFence{f, commit})
	}
	sh.asked = sh.asked[:0]
}

// answerFences answers those whose commit is durable.
func (sh *shard) answerFences() {
	n := 0
	for ; n < len(sh.held) && sh.held[n].commit <= sh.durable; n++ {
		if f := sh.held[n].fence; f.shards.Add(-1) == 0 {
			sh.server.cfg.Fenced(f.Fence)
		}
	}
	sh.held = slices.Delete(sh.held, 0, n)
}

// take reads the next records and gives them to the owner. What the owner could not decide about, because a
// read failed, is tried again at the next tick.
func (sh *shard) take(now int64) (more bool) {
	if len(sh.records) == 0 {
		room := min(takeRecords, sh.owner.Room())
		if room <= 0 {
			return false
		}
		var err error
		sh.records, err = sh.server.cfg.Queue.Read(sh.number, sh.records[:0], room)
		if err != nil {
			sh.failed("read log", err)
			return false
		}
		more = len(sh.records) == room
		sh.ended = sh.ended || !more
	}
	n, err := sh.owner.Take(now, sh.records)
	rest := copy(sh.records, sh.records[n:])
	clear(sh.records[rest:])
	sh.records = sh.records[:rest]
	if err != nil {
		sh.failed("take records", err)
		return false
	}
	sh.readFails = 0
	if sh.ended && len(sh.records) == 0 {
		sh.owner.CaughtUp()
		sh.caughtUp.Store(true)
	}
	return more
}

// failed logs the first of a row of failures, and then every hundredth: one in ten seconds.
func (sh *shard) failed(step string, err error) {
	if sh.readFails%100 == 0 {
		sh.server.cfg.Logger.Error("delivery waits", "shard", sh.number, "step", step, "error", err, "times", sh.readFails+1)
	}
	sh.readFails++
}

// commit gives the owner's progress to the store. While commits are on their way only mailbox rows,
// for whose notice a session waits, start another.
func (sh *shard) commit(now int64) {
	waiting := sh.owner.Uncommitted()
	if !sh.owner.Dirty() || waiting >= maxCommitsWaiting || waiting > 0 && !sh.owner.Urgent() {
		return
	}
	c := sh.owner.Flush(sh.server.date(max(now, protocol.PositionMillis(sh.owner.Taken()))))
	c.Done = func() {
		sh.mu.Lock()
		sh.committed++
		sh.mu.Unlock()
		sh.signal()
	}
	sh.server.cfg.Store.Commit(c)
}

func (sh *shard) act() {
	a := sh.owner.Actions()
	p := sh.server.cfg.Pusher
	if len(a.Notices) > 0 {
		p.Notify(a.Notices)
	}
	if len(a.Pushes) > 0 {
		p.Push(a.Pushes)
		CrashPoint("after_push")
	}
	if len(a.Receipts) > 0 {
		p.Receipts(a.Receipts)
	}
	sh.owner.ClearActions()
}

func (sh *shard) publish(more bool) {
	sh.report.Lock()
	defer sh.report.Unlock()
	sh.alarm(&sh.stats.Violations, &sh.owner.Stats().Violations)
	sh.stats = *sh.owner.Stats()
	sh.inFlight = sh.owner.InFlight()
	sh.rounds++
	sh.idle = !more && len(sh.records) == 0 && len(sh.settling) == 0 && !sh.owner.Dirty() && sh.owner.Uncommitted() == 0
}
