package edge

import (
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"

	"millrace/protocol"
)

// This file says how many connections there may be: in all, of an address, of a user. limits_state.go remembers.

// AddressLimit is what one client address may do: an IPv4 address, or the /64 network of an IPv6 address, which is what one customer of a
// provider has. 0 sets no limit.
type AddressLimit struct {
	Connections int // open at once
	PerSecond   int // connections accepted, in bursts of addressBurstSeconds as many
}

// addressBurstSeconds is for how many seconds' worth of connections an address can come at once, after a silence.
const addressBurstSeconds = 2

func (l AddressLimit) quota() quota {
	return quota{l.Connections, RateLimit{PerSecond: float64(l.PerSecond), Burst: addressBurstSeconds * l.PerSecond}}
}

// UserLimit is what one user may do, whatever the number of devices. 0 sets no limit.
type UserLimit struct {
	Connections int       // open at once, with those that are closing
	Logins      RateLimit // sessions begun; each costs a write to stable storage
}

func (c *Config) validateLimits() error {
	for _, r := range [...]struct {
		name string
		rate RateLimit
	}{{"rate", c.Rate}, {"logins of a user", c.User.Logins}} {
		if r.rate.PerSecond < 0 || r.rate.on() && r.rate.Burst < 1 {
			return fmt.Errorf("%s: %v a second in bursts of %d makes no sense", r.name, r.rate.PerSecond, r.rate.Burst)
		}
	}
	if n := min(c.User.Connections, c.Address.Connections, c.Address.PerSecond, c.Loopback.Connections, c.Loopback.PerSecond); n < 0 {
		return fmt.Errorf("limits: %d is below 0", n)
	}
	if len(c.ProxyNetworks) > MaxProxyNetworks {
		return fmt.Errorf("proxy networks: %d, more than %d", len(c.ProxyNetworks), MaxProxyNetworks)
	}
	c.proxies = nil
	for _, p := range c.ProxyNetworks {
		if !p.IsValid() || p.Addr().Is4In6() { // IPv4 addresses are compared as such
			return fmt.Errorf("proxy networks: %v is none", p)
		}
		c.proxies = append(c.proxies, p.Masked())
	}
	return nil
}

// What limits a connection or a login, as a label.
const (
	limitConnections = iota
	limitUnauthenticated
	limitAddressConnections
	limitAddressRate
	limitUserConnections
	limitUserLogins
	limitAccounts
	limitKinds
)

var limitNames = [limitKinds]string{
	"connections", "unauthenticated", "address_connections", "address_rate", "user_connections", "user_logins", "accounts",
}

var (
	addressErrors = [admissions]httpError{
		tooManyOpen: {429, "this address has as many connections as one may have"},
		tooFast:     {429, "this address connects too often"},
		noAccount:   {503, "the server has as many connections as it can"},
	}
	limitOfAddress = [admissions]int{tooManyOpen: limitAddressConnections, tooFast: limitAddressRate, noAccount: limitAccounts}
)

// refusedRetrySeconds is when a connection that was refused unread should be tried again.
const refusedRetrySeconds = 5

// refusedUnread are the responses to those.
var refusedUnread = func() (list [admissions][]byte) {
	for why, e := range addressErrors {
		list[why] = appendRefused(nil, e, refusedRetrySeconds)
	}
	return list
}()

// limits are shared by the loops. Nothing here is asked for a message.
type limits struct {
	addresses, users *ledger // nil: without limits
	remote, loopback quota   // of addresses
	user             quota

	// Of MaxConnections the last ones are a reserve: there, whoever has not authenticated makes room. See loop.makeRoom.
	reserveFrom int64
	share       int // of the reserve, for each loop

	lastLogMs atomic.Int64
}

// reserveShare is the part of the connections, 5 %, that is kept free of those who have not authenticated.
const reserveShare = 20

func newLimits(c *Config) *limits {
	reserve := max(1, c.MaxConnections/reserveShare)
	l := &limits{
		remote:      c.Address.quota(),
		loopback:    c.Loopback.quota(),
		user:        quota{c.User.Connections, c.User.Logins},
		reserveFrom: int64(c.MaxConnections - reserve),
		share:       max(1, reserve/c.Loops),
	}
	l.lastLogMs.Store(-1000) // nothing was logged yet
	if l.remote.on() || l.loopback.on() {
		l.addresses = newLedger(c.MaxConnections)
	}
	if l.user.on() || c.Rate.on() {
		l.users = newLedger(c.MaxConnections)
	}
	return l
}

// ledger is accounts that several loops use. Each account belongs to one of the shards by its key; a key is a hash with a secret seed, so
// that nobody can choose to share a shard or a chain with others. 0 is no account.
type ledger struct {
	seed   maphash.Seed
	shards [accountShards]struct {
		mu       sync.Mutex
		accounts accounts
	}
}

func newLedger(connections int) *ledger {
	l := &ledger{seed: maphash.MakeSeed()}
	// Shards fill alike, but not equally.
	limit := (connections+maxIdleAccounts)/accountShards*5/4 + accountChunk
	for i := range l.shards {
		l.shards[i].accounts = newAccounts(limit)
	}
	return l
}

func (l *ledger) enter(name []byte, nowMs int64, q *quota) (number uint32, why admission, waitMs int64) {
	key := maphash.Bytes(l.seed, name)
	shard := uint32(key >> (64 - accountShardBits))
	s := &l.shards[shard]
	s.mu.Lock()
	place, why, waitMs := s.accounts.enter(key, nowMs, q)
	s.mu.Unlock()
	if why != admitted {
		return 0, why, waitMs
	}
	return 1 + (place<<accountShardBits | shard), admitted, 0
}

func (l *ledger) leave(number uint32, nowMs int64) {
	number--
	s := &l.shards[number%accountShards]
	s.mu.Lock()
	s.accounts.leave(number>>accountShardBits, nowMs)
	s.mu.Unlock()
}

// at is the account of a connection, of which sends may be used until the connection leaves. It takes no lock: enter has returned the
// number to the loop that asks, and what leads to an open account does not change.
func (l *ledger) at(number uint32) *account {
	number--
	return l.shards[number%accountShards].accounts.at(number >> accountShardBits)
}

// size is how many accounts there are.
func (l *ledger) size() (n int) {
	if l == nil {
		return 0
	}
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		n += s.accounts.live
		s.mu.Unlock()
	}
	return n
}

// unit is what is limited as one address.
func unit(from netip.Addr) netip.Prefix {
	bits := 64
	if from.Is4() {
		bits = 32
	}
	p, _ := from.Prefix(bits)
	return p
}

// enterAddress counts a connection from a client's address. number is 0 when it is not limited.
func (l *limits) enterAddress(from netip.Addr, nowMs int64) (number uint32, why admission) {
	from = from.Unmap()
	q := &l.remote
	if from.IsLoopback() {
		q = &l.loopback
	}
	if !from.IsValid() || !q.on() {
		return 0, admitted
	}
	var name [9]byte // 4 and the address, or 6 and half of it
	if from.Is4() {
		a := from.As4()
		name[0] = 4
		copy(name[1:], a[:])
	} else {
		a := from.As16()
		name[0] = 6
		copy(name[1:], a[:8])
	}
	number, why, _ = l.addresses.enter(name[:], nowMs, q)
	return number, why
}

// limited counts what a limit has stopped, and logs one a second at most.
func (l *loop) limited(kind int, from netip.Addr) {
	l.m.limited[kind]++
	last := l.server.limits.lastLogMs.Load()
	if l.nowMs-last < 1000 || !l.server.limits.lastLogMs.CompareAndSwap(last, l.nowMs) {
		return
	}
	args := []any{"limit", limitNames[kind], "connections", l.server.connections.Load()}
	if from.IsValid() {
		args = append(args, "address", unit(from.Unmap()).String())
	}
	l.server.cfg.Logger.Warn("over a limit; one such line a second at most", args...)
}

// accept takes in a connection from this address, or returns what to write before it is closed. It is not called within a turn.
func (l *loop) accept(s socket, from netip.Addr) (c *conn, refusal []byte) {
	l.begin()
	l.turning = false
	server := l.server
	proxy := server.cfg.proxies.contain(from)
	var address uint32
	if !proxy {
		var why admission
		if address, why = server.limits.enterAddress(from, l.nowMs); why != admitted {
			return nil, l.refuseUnread(limitOfAddress[why], why, from)
		}
	}
	if c = l.takeIn(s); c == nil {
		if address != 0 {
			server.limits.addresses.leave(address, l.nowMs)
		}
		return nil, l.refuseUnread(limitConnections, noAccount, from)
	}
	c.address = address
	if proxy {
		c.flags |= flagProxy
	}
	return c, nil
}

// takeIn opens a connection if there may be one more. The number of connections is exact: each is counted before it is looked at.
func (l *loop) takeIn(s socket) (c *conn) {
	server := l.server
	n := server.connections.Add(1)
	if n > server.limits.reserveFrom && l.makeRoom(n > int64(server.cfg.MaxConnections)) {
		n--
	}
	if n <= int64(server.cfg.MaxConnections) {
		c = l.open(s)
	}
	if c == nil {
		server.connections.Add(-1)
	}
	return c
}

// refuseUnread counts a refusal and returns the response, which is for reading only. Over TLS there is none: it would take a handshake.
func (l *loop) refuseUnread(kind int, why admission, from netip.Addr) []byte {
	l.limited(kind, from)
	l.m.handshakes[handshakeResult(addressErrors[why].status)]++
	if l.tls != nil {
		return nil
	}
	return refusedUnread[why]
}

// makeRoom closes the connection of this loop that has been the longest without authenticating, if the loop has more of those than its
// share of the reserve, or any when it must. So silent connections, which cost their owner nothing, keep nobody out for long, and there
// is always some room to authenticate in.
func (l *loop) makeRoom(must bool) bool {
	if l.strangers.n == 0 || !must && l.strangers.n <= l.server.limits.share {
		return false
	}
	c := l.slots.at(l.strangers.oldest - 1)
	if c.reason == 0 {
		c.reason = closeNoRoom
	}
	l.limited(limitUnauthenticated, netip.Addr{})
	l.driver.closeSocket(c.sock)
	return c.state == stateFree
}

// enterUser counts a login before it is registered, or ends the connection.
func (l *loop) enterUser(c *conn, user string) bool {
	limits := l.server.limits
	if limits.users == nil {
		l.strangers.remove(&l.slots, c)
		return true
	}
	var name [protocol.MaxUserBytes]byte
	number, why, waitMs := limits.users.enter(name[:copy(name[:], user)], l.nowMs, &limits.user)
	if why == admitted {
		l.strangers.remove(&l.slots, c)
		c.account = number
		return true
	}
	r := protocol.Refusal{Code: protocol.CodeRateLimited, RetryAfterMs: userRetryMs}
	var text string
	switch why {
	case tooManyOpen:
		l.limited(limitUserConnections, netip.Addr{})
		text = "this user has as many connections as one may have"
	case tooFast:
		l.limited(limitUserLogins, netip.Addr{})
		r.RetryAfterMs, text = uint32(waitMs), "this user connects too often"
	case noAccount:
		l.limited(limitAccounts, netip.Addr{})
		r.Code, text = protocol.CodeOverloaded, errorText(protocol.CodeOverloaded)
	}
	l.error(c, 0, r, 0, text)
	l.finish(c, protocol.CloseTryAgain, r.Code.String(), closeLimited)
	return false
}

// userRetryMs is when a user with too many connections may come again: those that are closing are gone by then.
const userRetryMs = lingerTicks * tickMillis

// leaveLimits takes a connection out of every account.
func (l *loop) leaveLimits(c *conn) {
	switch {
	case c.stranger():
		l.strangers.remove(&l.slots, c)
	case c.account != 0:
		l.server.limits.users.leave(c.account, l.nowMs)
		c.account = 0
	}
	if c.address != 0 {
		l.server.limits.addresses.leave(c.address, l.nowMs)
		c.address = 0
	}
}

// account is that of the user of an open connection, or nil.
func (l *loop) account(c *conn) *account {
	if c.stranger() || c.account == 0 {
		return nil
	}
	return l.server.limits.users.at(c.account)
}

// offerRated is Uplink.Offer with the rate of the user instead of that of the connection: whoever connects again, or has
// several devices, does not get another burst. Loops may do it at the same time.
func (l *loop) offerRated(w *work, seq uint64) (Verdict, protocol.Refusal, uint64) {
	limit, up := &l.server.cfg.Rate, &w.up
	if w.account == nil {
		return up.Offer(seq, l.nowMs, limit)
	}
	before := w.account.sends.Load()
	up.rate.arrivalMicros = before
	v, r, resendFrom := up.Offer(seq, l.nowMs, limit)
	// When another loop was faster, this send comes on top of its.
	if after := up.rate.arrivalMicros; after != before && !w.account.sends.CompareAndSwap(before, after) {
		w.account.sends.Add(limit.intervalMicros())
	}
	return v, r, resendFrom
}

// intervalMicros is the time between two sends at the rate.
func (l *RateLimit) intervalMicros() int64 { return int64(1e6 / l.PerSecond) }
