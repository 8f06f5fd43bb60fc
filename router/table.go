package router

import (
	"hash/maphash"
	"slices"
	"strings"

	"millrace/protocol"
)

// shardBits: 256 locks are far more than cores, and at 10 M users the longest pause under one (an index
// of 39 000 records built anew) is a few milliseconds.
const (
	shardBits  = 8
	shardCount = 1 << shardBits
)

// Table is the route table of one process. Make one with [NewTable]; all methods may be called from any
// goroutine.
type Table struct {
	// Immutable.
	seed maphash.Seed

	// Each guards itself.
	shards [shardCount]shard
}

// NewTable makes an empty table of about 150 KiB.
func NewTable() *Table {
	return &Table{seed: maphash.MakeSeed()}
}

// Bind makes s the session of (user, device), draining. It is refused (ok false, nothing changes) when
// the route was bound with a greater login, or when a name is empty or longer than the protocol allows. When another
// connection held the route, wasReplaced is true and replaced is its session. The strings
// are copied.
func (t *Table) Bind(user, device string, s protocol.Session, login uint64) (replaced protocol.Session, wasReplaced, ok bool) {
	if !boundedNames(user, device) {
		return protocol.Session{}, false, false
	}
	h := maphash.String(t.seed, user)
	sh := t.shard(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()

	p := find(sh, h, user, device)
	if !p.found {
		sh.insert(t.seed, h, user, device, s, login, !p.sibling)
		sh.counts.binds++
		return protocol.Session{}, false, true
	}
	r := sh.arena.at(sh.index.refs[p.slot])
	if login < r.login() {
		sh.counts.staleBinds++
		return protocol.Session{}, false, false
	}
	if old := r.session(); !same(old, s) {
		replaced, wasReplaced = old, true
		sh.counts.replaced++
	}
	r.setSession(s)
	r.setLive(false)
	r.setLogin(login)
	sh.counts.binds++
	return replaced, wasReplaced, true
}

// SetState replaces generation and state of a route that belongs to s (same edge, same connection). It
// reports false, and does nothing, when it belongs to another session or does not exist. The slices
// are not kept.
func (t *Table) SetState(user, device []byte, s protocol.Session, live bool) bool {
	h := maphash.Bytes(t.seed, user)
	sh := t.shard(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()

	p := find(sh, h, user, device)
	if !p.found {
		sh.counts.staleStates++
		return false
	}
	r := sh.arena.at(sh.index.refs[p.slot])
	if !same(r.session(), s) {
		sh.counts.staleStates++
		return false
	}
	r.setSession(s)
	r.setLive(live)
	return true
}

// Unbind removes a route that belongs to s (same edge, same connection, whatever its generation). It
// reports false, and does nothing, when it belongs to another session or does not exist. The slices
// are not kept.
func (t *Table) Unbind(user, device []byte, s protocol.Session) bool {
	h := maphash.Bytes(t.seed, user)
	sh := t.shard(h)
	sh.mu.Lock()
	defer sh.mu.Unlock()

	p := find(sh, h, user, device)
	if !p.found || !same(sh.arena.at(sh.index.refs[p.slot]).session(), s) {
		sh.counts.staleUnbinds++
		return false
	}
	sh.remove(t.seed, p.slot, !p.sibling)
	sh.counts.unbinds++
	return true
}

// Locate appends the user's routes to dst, ordered by device. It allocates only when dst has no room or a device has
// a rare name.
func (t *Table) Locate(dst []protocol.Route, user string) []protocol.Route {
	h := maphash.String(t.seed, user)
	sh := t.shard(h)
	first := len(dst)
	sh.mu.RLock()
	dst = sh.appendRoutes(dst, h, user)
	sh.mu.RUnlock()
	if len(dst)-first > 1 {
		slices.SortFunc(dst[first:], func(a, b protocol.Route) int { return strings.Compare(a.Device, b.Device) })
	}
	return dst
}

// Users is the number of users with a route. It visits every shard: microseconds, not for every message.
func (t *Table) Users() int { return int(t.total().users) }

// Routes is the number of routes. It visits every shard: microseconds, not for every message.
func (t *Table) Routes() int { return int(t.total().routes) }

// shard takes the top bits of the hash; index and tag take others.
func (t *Table) shard(h uint64) *shard { return &t.shards[h>>(64-shardBits)] }

// same compares what names a connection. The generation changes during its life.
func same(a, b protocol.Session) bool { return a.Edge == b.Edge && a.Conn == b.Conn }

func boundedNames(user, device string) bool {
	return len(user) > 0 && len(user) <= protocol.MaxUserBytes && len(device) > 0 && len(device) <= protocol.MaxDeviceBytes
}
