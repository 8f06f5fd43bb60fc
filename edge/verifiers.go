package edge

import (
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"millrace/protocol/token"
)

const (
	// maxVerifiers is how many tokens are verified at once at most; fewer where that is more than half of the cores: the loops need the rest.
	maxVerifiers = 4
	// maxWaitingTokens is how many tokens wait for a worker, and minWaitingTokens the least that a loop's share is. Two workers are
	// through with as many of ES256 (75 µs each) in 150 ms. At protocol.MaxTokenBytes each they take 28 MiB.
	maxWaitingTokens = 4096
	minWaitingTokens = 64
)

// verifiers verifies tokens away from the loops, on goroutines that exist only while there is something to do. Loops take turns: one
// with many new connections does not keep those of the others waiting.
type verifiers struct {
	// Immutable.
	token    TokenVerifier
	now      func() time.Time
	elapsed  func() int64 // ms since the start of the server
	answer   func(*claim) // called by workers, once for each that was submitted, unless closed
	spawn    func()       // runs work on a goroutine
	log      *slog.Logger
	most     int // workers
	share    int // claims of one loop that may wait
	patience int64

	mu      sync.Mutex
	queues  []claimQueue // by loop
	turn    int          // the loop whose turn it is
	waiting int
	running int
	panics  uint64
	logged  time.Time
	closed  bool
}

func newVerifiers(s *Server) *verifiers {
	v := &verifiers{
		token:    s.cfg.Token,
		now:      s.cfg.now,
		elapsed:  func() int64 { return s.cfg.now().Sub(s.started).Milliseconds() },
		answer:   s.verified,
		log:      s.cfg.Logger,
		most:     min(max(1, runtime.GOMAXPROCS(0)/2), maxVerifiers),
		share:    max(minWaitingTokens, maxWaitingTokens/s.cfg.Loops),
		patience: int64(s.cfg.AuthenticateSeconds) * 1000,
		queues:   make([]claimQueue, s.cfg.Loops),
	}
	v.spawn = func() { go v.work() }
	return v
}

// submit takes a claim, or is false when as many of this loop wait as may. It does not block.
func (v *verifiers) submit(loop uint8, q *claim) bool {
	v.mu.Lock()
	if v.closed || !v.queues[loop].push(q, v.share) {
		v.mu.Unlock()
		return false
	}
	v.waiting++
	idle := v.running < v.most
	if idle {
		v.running++
	}
	v.mu.Unlock()
	if idle {
		v.spawn()
	}
	return true
}

// work verifies until nothing waits.
func (v *verifiers) work() {
	for q := v.take(); q != nil; q = v.take() {
		v.verify(q)
		q.token = nil
		v.answer(q)
		runtime.Gosched() // else a loop that wants this core gets it after 10 ms
	}
}

// take returns the next claim, or nil, upon which the worker must end.
func (v *verifiers) take() *claim {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.waiting > 0 {
		q := v.queues[v.turn].pop()
		v.turn = (v.turn + 1) % len(v.queues)
		if q != nil {
			v.waiting--
			return q
		}
	}
	v.running--
	return nil
}

// verify answers a claim. One that has waited for longer than a client may take to authenticate is too late to be worth the time.
func (v *verifiers) verify(q *claim) {
	q.result = authOverloaded
	if v.elapsed()-q.asked >= v.patience {
		return
	}
	defer v.recover()
	var err error
	if q.claims, err = v.token.Verify(q.token, v.now()); err != nil {
		q.claims = token.Claims{}
	}
	if q.result = outcomeOf(q.claims, err); q.result >= authOutcomes {
		q.result = authInvalid // Verify has no right to say that it is slow
	}
}

// recover lets a bug cost one client a second attempt and nobody else anything.
func (v *verifiers) recover() {
	p := recover()
	if p == nil {
		return
	}
	now := time.Now()
	v.mu.Lock()
	v.panics++
	tell := now.Sub(v.logged) >= time.Second
	if tell {
		v.logged = now
	}
	v.mu.Unlock()
	if tell {
		v.log.Error("panic while a token was verified; its client is told to try again", slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
	}
}

// close drops what waits; workers end after the token that they have.
func (v *verifiers) close() {
	v.mu.Lock()
	v.closed = true
	v.waiting = 0
	clear(v.queues)
	v.mu.Unlock()
}

// size is how many tokens wait, and how often verifying one panicked.
func (v *verifiers) size() (waiting int, panics uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.waiting, v.panics
}

// claimQueue is a ring, made when the first claim comes.
type claimQueue struct {
	ring    []*claim
	head, n int
}

func (q *claimQueue) push(c *claim, limit int) bool {
	if q.n == limit {
		return false
	}
	if q.ring == nil {
		q.ring = make([]*claim, limit)
	}
	q.ring[(q.head+q.n)%limit] = c
	q.n++
	return true
}

func (q *claimQueue) pop() *claim {
	if q.n == 0 {
		return nil
	}
	c := q.ring[q.head]
	q.ring[q.head] = nil
	q.head = (q.head + 1) % len(q.ring)
	q.n--
	return c
}
