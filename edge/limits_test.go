package edge

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"millrace/protocol"
)

func TestAccounts(t *testing.T) {
	if n := unsafe.Sizeof(account{}); n != 32 {
		t.Errorf("an account takes %d bytes", n)
	}
	const key, other = 7, 7 + 16 // of one chain
	accounts := newAccounts(1000)
	q := &quota{connections: 3, arrivals: RateLimit{PerSecond: 10, Burst: 5}}
	enter := func(key uint64, nowMs int64, want admission, wantMs int64) uint32 {
		t.Helper()
		place, why, waitMs := accounts.enter(key, nowMs, q)
		if why != want || waitMs != wantMs {
			t.Fatalf("at %d ms: %d after %d ms, want %d after %d ms", nowMs, why, waitMs, want, wantMs)
		}
		return place
	}
	place := enter(key, 0, admitted, 0)
	enter(key, 0, admitted, 0)
	enter(key, 0, admitted, 0)
	enter(key, 0, tooManyOpen, 0)
	accounts.leave(place, 0)
	enter(key, 0, admitted, 0)
	accounts.leave(place, 0)
	enter(key, 0, admitted, 0) // the fifth
	accounts.leave(place, 0)
	enter(key, 1, tooFast, 99)
	apart := enter(other, 1, admitted, 0)
	if apart == place {
		t.Fatal("two keys share an account")
	}
	enter(key, 100, admitted, 0)
	for range 3 {
		accounts.leave(place, 100)
	}
	accounts.leave(apart, 150)
	// Without a connection it is remembered until its burst is whole again: six arrivals of 100 ms each.
	enter(key, 101, tooFast, 99)
	enter(other, 599, admitted, 0)
	if _, a := accounts.find(key); a == nil {
		t.Error("forgotten too early")
	}
	enter(other, 600, admitted, 0)
	if _, a := accounts.find(key); a != nil || accounts.live != 1 {
		t.Error("an account that says nothing is remembered")
	}
}

// TestAccountsAgainstAModel: whatever the order, an account decides like one that is never forgotten.
func TestAccountsAgainstAModel(t *testing.T) {
	type model struct {
		open     []uint32 // places
		arrivals tokenBucket
	}
	random := rand.New(rand.NewPCG(1, 2))
	accounts := newAccounts(1 << 16)
	q := &quota{connections: 4, arrivals: RateLimit{PerSecond: 20, Burst: 6}}
	models := map[uint64]*model{}
	var nowMs int64
	for step := range 300_000 {
		nowMs += random.Int64N(3)
		key := random.Uint64N(300)
		m := models[key]
		if m == nil {
			m = &model{}
			models[key] = m
		}
		if len(m.open) > 0 && random.IntN(2) == 0 {
			accounts.leave(m.open[0], nowMs)
			m.open = m.open[1:]
			continue
		}
		want, wantMs := admitted, int64(0)
		if len(m.open) >= q.connections {
			want = tooManyOpen
		} else if wantMs = m.arrivals.take(nowMs, &q.arrivals); wantMs > 0 {
			want = tooFast
		}
		place, why, waitMs := accounts.enter(key, nowMs, q)
		if why != want || waitMs != wantMs {
			t.Fatalf("step %d: %d after %d ms, want %d after %d ms", step, why, waitMs, want, wantMs)
		}
		if why == admitted {
			m.open = append(m.open, place)
		}
	}
	for _, m := range models {
		for _, place := range m.open {
			accounts.leave(place, nowMs)
		}
	}
	for range len(models) { // each call looks at two
		place, why, _ := accounts.enter(1<<40, nowMs+1000, q)
		if why == admitted {
			accounts.leave(place, nowMs+1000)
		}
		nowMs += 1000
	}
	if accounts.live > 1 || int(accounts.size) > len(models)+1 {
		t.Errorf("%d accounts are left, %d places were used", accounts.live, accounts.size)
	}
}

// TestNobodyIsForgotten: neither an address with a connection nor one that has used up its rate is pushed out by others.
func TestNobodyIsForgotten(t *testing.T) {
	const slow = 1.0 / 3600
	accounts := newAccounts(3 * maxIdleShard)
	q := &quota{connections: 2, arrivals: RateLimit{PerSecond: slow, Burst: 2}}
	come := func(key uint64, want admission) uint32 {
		t.Helper()
		place, why, _ := accounts.enter(key, 0, q)
		if why != want {
			t.Fatalf("key %d: %d, want %d", key, why, want)
		}
		return place
	}
	holder := come(1, admitted)
	come(1, admitted)
	come(1, tooManyOpen)
	for range 2 {
		accounts.leave(come(2, admitted), 0)
	}
	come(2, tooFast)
	for key := range uint64(maxIdleShard - 1) {
		accounts.leave(come(100+key, admitted), 0)
	}
	come(2, tooFast)
	come(1, tooManyOpen)
	for key := range uint64(10 * maxIdleShard) {
		accounts.leave(come(1<<20+key, admitted), 0)
	}
	come(1, tooManyOpen)
	if accounts.live > maxIdleShard+2 || accounts.size > maxIdleShard+4 || cap(accounts.idle) > 4*maxIdleShard {
		t.Errorf("%d accounts in %d places, %d idle of %d", accounts.live, accounts.size, len(accounts.idle), cap(accounts.idle))
	}
	accounts.leave(holder, 0)
	come(1, tooFast) // it has used its burst of two
}

func TestAccountsFull(t *testing.T) {
	accounts := newAccounts(accountChunk)
	q := &quota{connections: 1}
	for key := range uint64(accountChunk) {
		if _, why, _ := accounts.enter(key, 0, q); why != admitted {
			t.Fatal(key, why)
		}
	}
	if _, why, _ := accounts.enter(1<<20, 0, q); why != noAccount {
		t.Fatal(why)
	}
	if _, why, _ := accounts.enter(5, 0, q); why != tooManyOpen {
		t.Fatal(why)
	}
	accounts.leave(9, 0)
	if _, why, _ := accounts.enter(1<<20, 0, q); why != admitted {
		t.Fatal(why)
	}
}

// TestLedgerIsShared is for the race detector: loops come and go, and use the sends of open accounts without the lock.
func TestLedgerIsShared(t *testing.T) {
	l := newLedger(10_000)
	q := &quota{connections: 3}
	var done sync.WaitGroup
	for g := range 4 {
		done.Go(func() {
			for i := range 5000 {
				number, why, _ := l.enter(fmt.Append(nil, "user", i%50), int64(i), q)
				if why != admitted {
					continue
				}
				l.at(number).sends.Add(int64(g))
				l.leave(number, int64(i))
				for key := range 3 {
					if n, why, _ := l.enter(fmt.Append(nil, g, i, key), int64(i), q); why == admitted {
						l.leave(n, int64(i))
					}
				}
			}
		})
	}
	done.Wait()
	for i := range l.shards {
		for _, head := range l.shards[i].accounts.heads {
			for head != 0 {
				a := l.shards[i].accounts.at(head - 1)
				if a.connections() != 0 {
					t.Fatalf("%d connections are left", a.connections())
				}
				head = a.next
			}
		}
	}
}

// TestAddressUnits: an IPv4 address counts as one in every spelling, an IPv6 address with its /64.
func TestAddressUnits(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"2001:db8:0:1::1", "2001:db8:0:1:ffff::9", true},
		{"2001:db8:0:1::1", "2001:db8:0:2::1", false},
		{"c000:201::", "192.0.2.1", false},
	} {
		cfg := testConfig(nil)
		cfg.Address.Connections = 1
		l := newLimits(&cfg)
		if _, why := l.enterAddress(netip.MustParseAddr(c.a), 0); why != admitted {
			t.Fatal(c.a, why)
		}
		if _, why := l.enterAddress(netip.MustParseAddr(c.b), 0); (why == tooManyOpen) != c.same {
			t.Errorf("%s and %s: %d", c.a, c.b, why)
		}
		for range 5 {
			for _, local := range []string{"127.0.0.1", "::1", "::ffff:127.0.0.9"} {
				if _, why := l.enterAddress(netip.MustParseAddr(local), 0); why != admitted {
					t.Error(local, "is limited")
				}
			}
			if _, why := l.enterAddress(netip.Addr{}, 0); why != admitted {
				t.Error("a connection without an address is limited")
			}
		}
	}
}

// from accepts a connection from an address.
func (b *bench) from(address string) *fakeSocket {
	s := &fakeSocket{bench: b}
	var refusal []byte
	if s.conn, refusal = b.l.accept(s, netip.MustParseAddr(address)); s.conn == nil {
		s.out, s.closed = refusal, true
	}
	return s
}

func (b *bench) limited(kind int) uint64 { return b.l.m.limited[kind] }

func TestAddressLimits(t *testing.T) {
	var log bytes.Buffer
	b := newBench(t, func(c *Config) {
		c.Address = AddressLimit{Connections: 3, PerSecond: 4}
		c.Logger = slog.New(slog.NewTextHandler(&log, nil))
	})
	var open []*fakeSocket
	for range 3 {
		open = append(open, b.from("192.0.2.1"))
	}
	s := b.from("192.0.2.1")
	if !s.closed || !bytes.HasPrefix(s.out, []byte("HTTP/1.1 429 Too Many Requests\r\nRetry-After: 5\r\n")) || !bytes.Contains(s.out, []byte("as many connections")) {
		t.Fatalf("%q", s.out)
	}
	if b.from("192.0.2.2").closed || b.from("2001:db8::1").closed {
		t.Fatal("others are refused")
	}
	for range 10 {
		if b.from("127.0.0.1").closed {
			t.Fatal("this machine is refused")
		}
	}
	for range 5 { // in all 8 within the burst of two seconds
		open[0].close()
		open = append(open[1:], b.from("192.0.2.1"))
	}
	open[0].close()
	if s = b.from("192.0.2.1"); !s.closed || !bytes.Contains(s.out, []byte("connects too often")) {
		t.Fatalf("%q", s.out)
	}
	b.pass(250 * time.Millisecond)
	if b.from("192.0.2.1").closed {
		t.Fatal("refused after a quarter of a second at 4 a second")
	}
	if n, m := b.limited(limitAddressConnections), b.limited(limitAddressRate); n != 1 || m != 1 {
		t.Errorf("%d and %d were counted", n, m)
	}
	if b.l.m.handshakes[handshake429] != 2 || b.s.connections.Load() != int64(3+2+10) {
		t.Errorf("%d responses 429, %d connections", b.l.m.handshakes[handshake429], b.s.connections.Load())
	}
	for range 100 {
		b.from("192.0.2.1")
	}
	b.pass(2 * time.Second)
	for range 100 {
		b.from("192.0.2.1")
	}
	if n := strings.Count(log.String(), "over a limit"); n != 2 || !strings.Contains(log.String(), "address=192.0.2.1/32") ||
		!strings.Contains(log.String(), "limit=address_connections") {
		t.Errorf("%d lines:\n%s", n, &log)
	}
}

// TestManyAddresses: as many accounts as addresses with connections, and none when they are gone and their rates unused.
func TestManyAddresses(t *testing.T) {
	const n = 20_000
	b := newBench(t, func(c *Config) {
		c.MaxConnections = 1000
		c.Address = AddressLimit{Connections: 10, PerSecond: 10}
	})
	b.s.cfg.MaxConnections, b.s.limits.reserveFrom = n, n // more than this process has descriptors for
	b.s.limits.addresses = newLedger(n)
	var open []*fakeSocket
	for i := range n {
		s := b.from(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}).String())
		if s.closed {
			t.Fatalf("address %d: %s", i, s.out)
		}
		open = append(open, s)
	}
	if got := b.s.limits.addresses.size(); got != n {
		t.Errorf("%d accounts of %d addresses", got, n)
	}
	for _, s := range open {
		s.close()
	}
	// Whoever comes later clears two of those away in their shard.
	b.now = b.now.Add(time.Second)
	for i := range 2 * n {
		s := b.from(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}).String())
		b.now = b.now.Add(100 * time.Millisecond)
		s.close()
	}
	if got := b.s.limits.addresses.size(); got > accountShards {
		t.Errorf("%d accounts are left", got)
	}
}

// TestUserConnections: as many as may be are open; one that ends makes place, whatever the devices are.
func TestUserConnections(t *testing.T) {
	b := newBench(t, func(c *Config) { c.User.Connections = 2 })
	a := b.open(protocol.SubprotocolBinary, "alice", "a")
	b.open(protocol.SubprotocolBinary, "alice", "b")
	b.open(protocol.SubprotocolBinary, "bob", "a")
	s := b.accept()
	s.receive([]byte(upgradeText(protocol.SubprotocolBinary, "")))
	s.out = nil
	s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("c")})
	if got := s.read(); !strings.Contains(got, "rate_limited") || !strings.Contains(got, "1013") {
		t.Fatal(got)
	}
	if len(b.asked) != 3 || b.limited(limitUserConnections) != 1 {
		t.Errorf("%d registrations, %d limited", len(b.asked), b.limited(limitUserConnections))
	}
	a.close()
	b.open(protocol.SubprotocolBinary, "alice", "c")
	s.close()
	if b.l.m.closes[closeLimited] != 1 || b.l.strangers != (strangers{}) {
		t.Errorf("%d closed, %+v", b.l.m.closes[closeLimited], b.l.strangers)
	}
}

// TestUserLogins: a token alone does not make the store write as often as its owner likes.
func TestUserLogins(t *testing.T) {
	b := newBench(t, func(c *Config) { c.User.Logins = RateLimit{PerSecond: 2, Burst: 5} })
	bearer := upgradeText(protocol.SubprotocolJSON, "Authorization: Bearer alice\r\n")
	logins := func() (n int) {
		before := len(b.asked)
		for range 100 {
			s := b.accept()
			s.receive([]byte(bearer))
			s.close()
		}
		return len(b.asked) - before
	}
	if n := logins(); n != 5 {
		t.Errorf("%d logins at once", n)
	}
	b.pass(time.Second)
	if n := logins(); n != 2 {
		t.Errorf("%d logins a second later", n)
	}
	s := b.accept()
	s.receive([]byte(bearer))
	_, s.out, _ = bytes.Cut(s.out, []byte("\r\n\r\n"))
	if got := s.read(); !strings.Contains(got, "rate_limited") || !strings.Contains(got, "1013") {
		t.Error(got)
	}
	b.open(protocol.SubprotocolBinary, "bob", "a")
	// Registrations that nobody has answered yet count as connections.
	for i := range b.asked {
		b.l.registered(&protocol.Registered{To: b.asked[i].Session})
	}
	b.pass(time.Hour)
	if n := logins(); n != 5 {
		t.Errorf("%d logins an hour later", n)
	}
}

// TestRateIsOfTheUser: neither a new connection nor a second device starts with a burst of its own.
func TestRateIsOfTheUser(t *testing.T) {
	const burst, perSecond = 10, 5
	b := newBench(t, func(c *Config) { c.Rate = RateLimit{PerSecond: perSecond, Burst: burst} })
	published := 0
	b.publish = func(*protocol.Submission) protocol.Refusal { published++; return protocol.Refusal{} }
	sendAll := func(s *fakeSocket, n int) int {
		before := published
		for i := range n {
			s.frame(sendFrame(uint64(i+1), "hello"))
		}
		return published - before
	}
	if n := sendAll(b.open(protocol.SubprotocolBinary, "alice", "a"), 20); n != burst {
		t.Errorf("%d sends at once", n)
	}
	s := b.open(protocol.SubprotocolBinary, "alice", "b")
	if n := sendAll(s, 20); n != 0 {
		t.Errorf("%d sends of a second device", n)
	}
	s.close()
	b.pass(time.Second)
	total := 0
	for range 50 {
		s := b.open(protocol.SubprotocolBinary, "alice", "b")
		total += sendAll(s, 20)
		s.close()
	}
	if total != perSecond {
		t.Errorf("%d sends of 50 connections, a second later", total)
	}
	if n := sendAll(b.open(protocol.SubprotocolBinary, "bob", "a"), 20); n != burst {
		t.Errorf("%d sends of somebody else", n)
	}
	b.pass(burst / perSecond * time.Second)
	if n := sendAll(b.open(protocol.SubprotocolBinary, "alice", "c"), 20); n != burst {
		t.Errorf("%d sends after a silence", n)
	}
}

// TestSendsOfSeveralLoops: loops that take from one bucket at the same time take no more than there is, but for a send each.
func TestSendsOfSeveralLoops(t *testing.T) {
	const loops, tries = 4, 20_000
	limit := RateLimit{PerSecond: 100, Burst: 1000}
	a := &account{}
	var taken [loops]int
	var done sync.WaitGroup
	for i := range loops {
		l := newLoop(&Server{cfg: Config{Rate: limit}}, i)
		done.Go(func() {
			w := &work{account: a, upActive: true}
			for seq := range uint64(tries) {
				w.up.Start(0)
				if v, _, _ := l.offerRated(w, seq+1); v == Publish {
					taken[i]++
				}
			}
		})
	}
	done.Wait()
	total := 0
	for _, n := range taken {
		total += n
	}
	if total < limit.Burst || total > limit.Burst+loops {
		t.Errorf("%d of a burst of %d", total, limit.Burst)
	}
}

// TestMakeRoom: at the limit the oldest connections that have not authenticated go, no others, and none before they must.
func TestMakeRoom(t *testing.T) {
	const most, reserve = 100, 5
	b := newBench(t, func(c *Config) { c.MaxConnections = most })
	var known []*fakeSocket
	know := func() {
		s := b.open(protocol.SubprotocolBinary, fmt.Sprint("user", len(known)), "a")
		known = append(known, s)
	}
	var silent []*fakeSocket
	for range most - reserve {
		silent = append(silent, b.from("192.0.2.1"))
	}
	if b.limited(limitUnauthenticated) != 0 {
		t.Fatal("room was made that was there")
	}
	for i := range 10 {
		silent = append(silent, b.from("192.0.2.1"))
		if !silent[i].closed || silent[i+1].closed {
			t.Fatalf("not the oldest was closed")
		}
	}
	if n := b.s.connections.Load(); n != most-reserve {
		t.Fatalf("%d connections", n)
	}
	for _, s := range silent {
		s.close()
	}
	if b.l.strangers != (strangers{}) || b.s.connections.Load() != 0 {
		t.Fatalf("%+v, %d connections", b.l.strangers, b.s.connections.Load())
	}
	for range most - 1 {
		know()
	}
	last := b.from("192.0.2.1")
	if last.closed {
		t.Fatal("refused below the limit")
	}
	next := b.from("192.0.2.1")
	if next.closed || !last.closed {
		t.Fatal("the limit is reached by one who has not authenticated")
	}
	next.close()
	know()
	if s := b.from("192.0.2.1"); !s.closed || !bytes.HasPrefix(s.out, []byte("HTTP/1.1 503 ")) {
		t.Fatalf("over the limit: %s", s.out)
	}
	for _, s := range known {
		if s.closed {
			t.Fatal("a session was closed to make room")
		}
	}
	if n := b.s.connections.Load(); n != most || b.limited(limitConnections) != 1 {
		t.Errorf("%d connections, %d refused", n, b.limited(limitConnections))
	}
	if b.l.m.closes[closeNoRoom] != 11 || b.limited(limitUnauthenticated) != 11 {
		t.Errorf("%d closed, %d counted", b.l.m.closes[closeNoRoom], b.limited(limitUnauthenticated))
	}
}

// TestStrangers plays random comings and goings against a list.
func TestStrangers(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var slots slab
	var list strangers
	var want []*conn
	for range 20_000 {
		if len(want) == 0 || random.IntN(2) == 0 && len(want) < 100 {
			c := slots.take()
			list.add(&slots, c)
			want = append(want, c)
		} else {
			i := random.IntN(len(want))
			list.remove(&slots, want[i])
			slots.put(want[i])
			want = slices.Delete(want, i, i+1)
		}
		var got []*conn
		for next := list.oldest; next != 0; next = got[len(got)-1].nextFree {
			got = append(got, slots.at(next-1))
		}
		if !slices.Equal(got, want) || list.n != len(want) {
			t.Fatalf("%d of %d", len(got), len(want))
		}
	}
}

// dialFrom connects from an address of this machine.
func dialFrom(t testing.TB, s *Server, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	_, port, _ := net.SplitHostPort(s.Addr())
	to := "127.0.0.1"
	if strings.Contains(from, ":") {
		to = "::1"
	}
	conn, err := d.DialContext(context.Background(), "tcp", net.JoinHostPort(to, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	return conn
}

// status asks for the start page and returns the status.
func status(t testing.TB, conn net.Conn) int {
	t.Helper()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") // refused unread, this fails now and then
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode
}

// wantRefusedUnread wants the answer of a server that did not read a byte.
func wantRefusedUnread(t testing.TB, conn net.Conn, want int) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != want || resp.Header.Get("Retry-After") == "" {
		t.Fatal(resp, err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal(n, err)
	}
}

// TestAddressLimitsOverSockets: all loops count together, IPv4 and IPv6 clients of one listener.
func TestAddressLimitsOverSockets(t *testing.T) {
	s, _ := serve(t, func(c *Config) {
		c.Addr = ":0"
		c.Loopback.Connections = 5
	})
	clients := []string{"127.0.0.2", "127.0.0.3", "127.0.0.4", "::1"}
	open := map[string][]net.Conn{}
	for _, from := range clients {
		for range 5 {
			open[from] = append(open[from], dialFrom(t, s, from))
		}
	}
	eventually(t, "20 connections", func() bool { return metric(s, "connections") == 20 })
	for _, from := range clients {
		wantRefusedUnread(t, dialFrom(t, s, from), 429)
	}
	for from, list := range maps.All(open) {
		list[2].Close()
		eventually(t, "room", func() bool {
			conn := dialFrom(t, s, from)
			conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			_, err := conn.Read(make([]byte, 1))
			conn.SetReadDeadline(time.Now().Add(patience))
			return err != nil && err != io.EOF && status(t, conn) == 200 // silent until it is asked
		})
		if code := status(t, list[0]); code != 200 {
			t.Errorf("%s: an old connection got %d", from, code)
		}
	}
	eventually(t, "what was refused", func() bool {
		return metric(s, "limited_total", "limit", "address_connections") >= 4 && metric(s, "accounts", "of", "addresses") == 4
	})
}

func TestAddressRateOverSockets(t *testing.T) {
	s, _ := serve(t, func(c *Config) { c.Loopback.PerSecond = 1 })
	for _, from := range []string{"127.0.0.2", "127.0.0.3"} {
		for range addressBurstSeconds {
			if code := status(t, dialFrom(t, s, from)); code != 200 {
				t.Fatal(from, code)
			}
		}
		refused := 0
		for range 20 {
			resp, err := http.ReadResponse(bufio.NewReader(dialFrom(t, s, from)), nil)
			if err == nil && resp.StatusCode == 429 {
				refused++
				continue
			}
			break // a second has passed
		}
		if refused == 0 {
			t.Errorf("%s was never refused", from)
		}
	}
	eventually(t, "what was refused", func() bool { return metric(s, "limited_total", "limit", "address_rate") > 0 })
}

// TestSilentConnectionsKeepNobodyOut: half a request on each of as many connections as there may be, again and again, and
// everybody with a token comes in.
func TestSilentConnectionsKeepNobodyOut(t *testing.T) {
	const most, honest = 200, 60
	s, _ := serve(t, func(c *Config) { c.MaxConnections = most })
	stop := make(chan struct{})
	var attackers sync.WaitGroup
	for range 4 {
		attackers.Go(func() {
			var held []net.Conn
			defer func() {
				for _, conn := range held {
					conn.Close()
				}
			}()
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := net.Dial("tcp", s.Addr())
				if err != nil {
					continue
				}
				io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: ")
				if held = append(held, conn); len(held) > most {
					held[0].Close()
					held = held[1:]
				}
			}
		})
	}
	eventually(t, "the limit", func() bool { return metric(s, "limited_total", "limit", "unauthenticated") > most })
	var in []*client
	failures := 0
	for i := 0; i < honest; {
		// One may be the oldest when its turn comes late; it tries again, as clients do.
		if c := tryLogin(t, s, fmt.Sprint("user", i)); c != nil {
			in = append(in, c)
			i++
			continue
		}
		if failures++; failures > 10*honest {
			t.Fatalf("%d of %d came in", i, honest)
		}
	}
	if n := metric(s, "connections"); n > most {
		t.Errorf("%v connections", n)
	}
	for i, c := range in {
		c.sendMessage(1, "still here")
		if f, err := c.next(); err != nil {
			t.Fatalf("session %d was closed: %v %v", i, f, err)
		}
	}
	close(stop)
	attackers.Wait()
	t.Logf("%d logins, %d tries failed, %.0f silent connections closed", honest, failures, metric(s, "limited_total", "limit", "unauthenticated"))
}

// tryLogin is login for a server that may close the connection; nil when it did.
func tryLogin(t testing.TB, s *Server, user string) *client {
	t.Helper()
	conn := dialTCP(t, s)
	c := &client{t: t, conn: conn, r: bufio.NewReader(conn)}
	if _, err := io.WriteString(conn, upgradeText(protocol.SubprotocolBinary, "Authorization: Bearer "+user+"\r\n")); err != nil {
		return nil
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil || resp.StatusCode != 101 {
		return nil
	}
	if f, err := c.next(); err != nil || f.Kind != protocol.KindConnected {
		t.Fatalf("after the upgrade: %v %v", f, err)
	}
	return c
}

// TestReconnectingBuysNoMessages: one token, connections that send all they may and come again, on every loop.
func TestReconnectingBuysNoMessages(t *testing.T) {
	limit := RateLimit{PerSecond: 20, Burst: 100}
	s, b := serve(t, func(c *Config) { c.Rate = limit })
	begun := time.Now()
	for i := range 30 {
		c := login(t, s, protocol.SubprotocolBinary, "alice", fmt.Sprint("device", i%4))
		first := protocol.FirstSeq(uint32(i))
		var frames []*protocol.Frame
		for n := range uint64(60) {
			frames = append(frames, sendFrame(first+n, "spam"))
		}
		c.send(frames...)
		for range frames {
			if _, err := c.next(); err != nil {
				t.Fatal(err)
			}
		}
		c.conn.Close()
	}
	most := limit.Burst + int(time.Since(begun).Seconds()*limit.PerSecond) + 1
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.submitted); n < limit.Burst || n > most {
		t.Errorf("%d messages, at most %d are allowed", n, most)
	}
}

// TestUserLimitsOverSockets: one token on every loop.
func TestUserLimitsOverSockets(t *testing.T) {
	s, b := serve(t, func(c *Config) {
		c.User = UserLimit{Connections: 3, Logins: RateLimit{PerSecond: 0.001, Burst: 6}}
	})
	for i := range 3 {
		login(t, s, protocol.SubprotocolBinary, "alice", fmt.Sprint("device", i))
	}
	for range 3 {
		c := dial(t, s, protocol.SubprotocolJSON, "")
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("other")})
		if f := c.wantError(protocol.CodeRateLimited); f.RetryAfterMs == 0 {
			t.Error("no retry_after_ms")
		}
		c.wantClose(protocol.CloseTryAgain)
	}
	for range 3 {
		login(t, s, protocol.SubprotocolBinary, "bob", "device").conn.Close()
		eventually(t, "the end", func() bool { return metric(s, "accounts", "of", "users") == 2 && metric(s, "connections") == 3 })
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.registered != 3+3 {
		t.Errorf("%d registrations", b.registered)
	}
	eventually(t, "what was refused", func() bool { return metric(s, "limited_total", "limit", "user_connections") == 3 })
}

func TestLimitsConfig(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"negative connections": func(c *Config) { c.Address.Connections = -1 },
		"negative rate":        func(c *Config) { c.Loopback.PerSecond = -1 },
		"negative of users":    func(c *Config) { c.User.Connections = -1 },
		"logins without burst": func(c *Config) { c.User.Logins.PerSecond = 1 },
		"no network":           func(c *Config) { c.ProxyNetworks = make([]netip.Prefix, 1) },
		"a mapped network":     func(c *Config) { c.ProxyNetworks = []netip.Prefix{netip.MustParsePrefix("::ffff:10.0.0.0/104")} },
		"too many networks":    func(c *Config) { c.ProxyNetworks = make([]netip.Prefix, MaxProxyNetworks+1) },
	} {
		cfg := testConfig(newStub())
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func (c *client) wantStatus(status int) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil || resp.StatusCode != status {
		c.t.Fatalf("want status %d, got %v %v", status, resp, err)
	}
}
