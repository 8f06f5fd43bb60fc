package edge

import "sync/atomic"

// What one address or one user has open, and what it has used of its rates, is remembered here until nothing is left to remember.
//
// Nothing can be evicted that matters. An account with an open connection stays, and of those there are no more than there may be
// connections. One without stays until its rates are unused again, which is what an unknown one has. The accounts that wait for that are
// bounded by maxIdleAccounts, the oldest is forgotten first: whoever wants to be forgotten needs that many arrivals under other names,
// which is more than any burst it would gain.

const (
	accountShardBits = 4
	accountShards    = 1 << accountShardBits
	accountChunk     = 64      // accounts: 2 KiB
	maxIdleAccounts  = 1 << 16 // without a connection, in all shards together
	maxIdleShard     = maxIdleAccounts / accountShards
	idleChecks       = 2 // accounts looked at in each call: one call adds one at most
)

// account is 32 bytes without a pointer.
type account struct {
	key      uint64
	arrivals tokenBucket  // connections from an address, logins of a user
	sends    atomic.Int64 // of a user, over all its connections: a tokenBucket that their loops share
	open     uint32       // connections; idleMark: it is in accounts.idle
	next     uint32       // 1 + the next one of its chain, or of the free list
}

const idleMark = 1 << 31

func (a *account) connections() uint32 { return a.open &^ idleMark }

// unused reports whether the account says nothing that a new one would not say.
func (a *account) unused(nowMs int64) bool {
	return a.connections() == 0 && a.arrivals.arrivalMicros <= nowMs*1000 && a.sends.Load() <= nowMs*1000
}

// accounts is a hash table of accounts whose keys are uniform already. Pointers to an account with open connections stay valid, and what
// leads to it is never written again: its sends may be used without the lock that guards the rest.
type accounts struct {
	heads  []uint32                 // 1 + the first account of a chain; a power of two
	chunks []*[accountChunk]account // of fixed length: the limit
	size   uint32                   // places ever used
	free   uint32                   // 1 + the place freed last
	live   int
	idle   []uint32 // places of accounts without connections, oldest first
}

func newAccounts(limit int) accounts {
	return accounts{chunks: make([]*[accountChunk]account, (limit+accountChunk-1)/accountChunk)}
}

// admission is what accounts say to an arrival.
type admission uint8

const (
	admitted admission = iota
	tooManyOpen
	tooFast
	noAccount // there are as many accounts as there may be
	admissions
)

// quota is what one account may do. 0 sets no limit.
type quota struct {
	connections int
	arrivals    RateLimit
}

func (q *quota) on() bool { return q.connections > 0 || q.arrivals.on() }

// enter counts one more connection of key, at the place that it returns, or says why not, and after how long it may be different.
func (t *accounts) enter(key uint64, nowMs int64, q *quota) (place uint32, why admission, waitMs int64) {
	t.expire(nowMs)
	place, a := t.find(key)
	if a == nil {
		if place, a = t.add(key); a == nil {
			return 0, noAccount, 0
		}
	}
	if q.connections > 0 && int64(a.connections()) >= int64(q.connections) {
		return 0, tooManyOpen, 0
	}
	if q.arrivals.on() {
		if waitMs = a.arrivals.take(nowMs, &q.arrivals); waitMs > 0 {
			return 0, tooFast, waitMs
		}
	}
	a.open++
	return place, admitted, 0
}

// leave takes back an enter.
func (t *accounts) leave(place uint32, nowMs int64) {
	a := t.at(place)
	a.open--
	switch {
	case a.open != 0: // others, or in idle already
	case a.unused(nowMs):
		t.remove(place)
	default:
		a.open = idleMark
		t.idle = append(t.idle, place)
	}
	t.expire(nowMs)
}

// expire removes accounts that were idle for long enough.
func (t *accounts) expire(nowMs int64) {
	n := 0
	for ; n < len(t.idle) && n < idleChecks; n++ {
		a := t.at(t.idle[n])
		if a.connections() == 0 && !a.unused(nowMs) && len(t.idle)-n <= maxIdleShard {
			break
		}
		a.open &^= idleMark
		if a.open == 0 {
			t.remove(t.idle[n])
		}
	}
	if n == 0 {
		return
	}
	if t.idle = t.idle[n:]; len(t.idle) == 0 {
		t.idle = nil
	}
}

func (t *accounts) at(place uint32) *account {
	return &t.chunks[place/accountChunk][place%accountChunk]
}

func (t *accounts) find(key uint64) (place uint32, a *account) {
	if len(t.heads) == 0 {
		return 0, nil
	}
	for next := *t.head(key); next != 0; next = a.next {
		if a = t.at(next - 1); a.key == key {
			return next - 1, a
		}
	}
	return 0, nil
}

func (t *accounts) head(key uint64) *uint32 { return &t.heads[key&uint64(len(t.heads)-1)] }

// add makes a new account, nil when there is no place for one.
func (t *accounts) add(key uint64) (place uint32, a *account) {
	switch {
	case t.free != 0:
		place = t.free - 1
		t.free = t.at(place).next
	case int(t.size) == len(t.chunks)*accountChunk:
		return 0, nil
	default:
		place = t.size
		if place%accountChunk == 0 {
			t.chunks[place/accountChunk] = new([accountChunk]account)
		}
		t.size++
	}
	if t.live++; t.live > len(t.heads) {
		t.grow()
	}
	a = t.at(place)
	a.key, a.arrivals, a.open = key, tokenBucket{}, 0
	a.sends.Store(0)
	head := t.head(key)
	a.next = *head
	*head = place + 1
	return place, a
}

// grow makes twice the chains.
func (t *accounts) grow() {
	old := t.heads
	t.heads = make([]uint32, max(2*len(old), 16))
	for _, next := range old {
		for next != 0 {
			a := t.at(next - 1)
			head := t.head(a.key)
			next, a.next, *head = a.next, *head, next
		}
	}
}

func (t *accounts) remove(place uint32) {
	a := t.at(place)
	link := t.head(a.key)
	for *link != place+1 {
		link = &t.at(*link - 1).next
	}
	*link = a.next
	a.next = t.free
	t.free = place + 1
	t.live--
}

// strangers are the connections of a loop that have not authenticated yet, in the order in which they came. The list goes through their
// slots: account is the next older one, nextFree the next newer one, each 1 + a slot, 0 at the ends.
type strangers struct {
	oldest, newest uint32
	n              int
}

func (s *strangers) add(slots *slab, c *conn) {
	c.account, c.nextFree = s.newest, 0
	if s.newest != 0 {
		slots.at(s.newest - 1).nextFree = c.slot + 1
	} else {
		s.oldest = c.slot + 1
	}
	s.newest = c.slot + 1
	s.n++
}

func (s *strangers) remove(slots *slab, c *conn) {
	if c.account != 0 {
		slots.at(c.account - 1).nextFree = c.nextFree
	} else {
		s.oldest = c.nextFree
	}
	if c.nextFree != 0 {
		slots.at(c.nextFree - 1).account = c.account
	} else {
		s.newest = c.account
	}
	c.account, c.nextFree = 0, 0
	s.n--
}

// stranger reports whether nobody knows yet whose connection this is.
func (c *conn) stranger() bool { return c.names.size() == 0 }
