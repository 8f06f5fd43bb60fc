package router

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"millrace/protocol"
)

func session(edge uint32, conn uint64) protocol.Session {
	return protocol.Session{Edge: edge, Conn: conn}
}

func mustBind(t *testing.T, table *Table, user, device string, s protocol.Session, login uint64) {
	t.Helper()
	if _, _, ok := table.Bind(user, device, s, login); !ok {
		t.Fatalf("Bind(%s, %s, login %d) was refused", user, device, login)
	}
}

func wantRoutes(t *testing.T, table *Table, user string, want ...protocol.Route) {
	t.Helper()
	if got := table.Locate(nil, user); !slices.Equal(got, want) {
		t.Fatalf("Locate(%s) = %v, want %v", user, got, want)
	}
}

func TestBindLocateUnbind(t *testing.T) {
	table := NewTable()
	wantRoutes(t, table, "bob")
	mustBind(t, table, "bob", "phone", session(1, 7), 1)
	mustBind(t, table, "bob", "laptop", session(2, 8), 1)
	mustBind(t, table, "alice", "phone", session(1, 9), 1)
	wantRoutes(t, table, "bob",
		protocol.Route{Device: "laptop", Session: session(2, 8)},
		protocol.Route{Device: "phone", Session: session(1, 7)})

	live := protocol.Session{Edge: 1, Conn: 7, Generation: 3}
	if !table.SetState([]byte("bob"), []byte("phone"), live, true) {
		t.Fatal("SetState of the bound session was refused")
	}
	kept := protocol.Route{Device: "kept"}
	got := table.Locate([]protocol.Route{kept}, "bob")
	if want := []protocol.Route{kept, {Device: "laptop", Session: session(2, 8)}, {Device: "phone", Session: live, Live: true}}; !slices.Equal(got, want) {
		t.Fatalf("Locate onto a used slice = %v, want %v", got, want)
	}
	if u, r := table.Users(), table.Routes(); u != 2 || r != 3 {
		t.Fatalf("users, routes = %d, %d, want 2, 3", u, r)
	}

	// Unbind names the connection; the generation has moved on meanwhile.
	if !table.Unbind([]byte("bob"), []byte("phone"), session(1, 7)) {
		t.Fatal("Unbind of the bound session was refused")
	}
	if !table.Unbind([]byte("bob"), []byte("laptop"), session(2, 8)) {
		t.Fatal("Unbind of the second device was refused")
	}
	wantRoutes(t, table, "bob")
	if u, r := table.Users(), table.Routes(); u != 1 || r != 1 {
		t.Fatalf("users, routes = %d, %d, want 1, 1", u, r)
	}
}

func TestBindLastLoginWins(t *testing.T) {
	table := NewTable()
	mustBind(t, table, "bob", "phone", session(1, 7), 10)
	table.SetState([]byte("bob"), []byte("phone"), session(1, 7), true)

	for _, step := range []struct {
		name     string
		s        protocol.Session
		login    uint64
		replaced protocol.Session
		was, ok  bool
		holder   protocol.Session
	}{
		{"an earlier login is refused", session(2, 1), 9, protocol.Session{}, false, false, session(1, 7)},
		{"an equal one replaces", session(2, 1), 10, session(1, 7), true, true, session(2, 1)},
		{"the same connection again replaces nobody", protocol.Session{Edge: 2, Conn: 1, Generation: 4}, 11, protocol.Session{}, false, true, protocol.Session{Edge: 2, Conn: 1, Generation: 4}},
		{"the same number on another edge is another connection", session(3, 1), 12, protocol.Session{Edge: 2, Conn: 1, Generation: 4}, true, true, session(3, 1)},
		{"the largest login", session(4, 1), 1<<64 - 1, session(3, 1), true, true, session(4, 1)},
		{"nothing follows it", session(5, 1), 1<<64 - 2, protocol.Session{}, false, false, session(4, 1)},
	} {
		replaced, was, ok := table.Bind("bob", "phone", step.s, step.login)
		if replaced != step.replaced || was != step.was || ok != step.ok {
			t.Fatalf("%s: Bind = %v, %v, %v, want %v, %v, %v", step.name, replaced, was, ok, step.replaced, step.was, step.ok)
		}
		route := protocol.Route{Device: "phone", Session: step.holder, Live: step.holder == session(1, 7)}
		wantRoutes(t, table, "bob", route)
	}
}

func TestBindStartsDraining(t *testing.T) {
	table := NewTable()
	mustBind(t, table, "bob", "phone", session(1, 7), 1)
	table.SetState([]byte("bob"), []byte("phone"), session(1, 7), true)
	mustBind(t, table, "bob", "phone", session(1, 8), 2)
	wantRoutes(t, table, "bob", protocol.Route{Device: "phone", Session: session(1, 8)})
}

// TestStaleUnbindLeavesNewerRoute is F14: the close of an old connection, handled after the new login.
func TestStaleUnbindLeavesNewerRoute(t *testing.T) {
	table := NewTable()
	user, device := []byte("bob"), []byte("phone")
	mustBind(t, table, "bob", "phone", session(1, 7), 1)
	mustBind(t, table, "bob", "phone", session(2, 7), 2)
	newer := protocol.Route{Device: "phone", Session: session(2, 7)}

	if table.Unbind(user, device, session(1, 7)) {
		t.Fatal("the unbind of the replaced session was taken")
	}
	wantRoutes(t, table, "bob", newer)
	if table.SetState(user, device, protocol.Session{Edge: 1, Conn: 7, Generation: 9}, true) {
		t.Fatal("the state of the replaced session was taken")
	}
	wantRoutes(t, table, "bob", newer)
	if table.Unbind(user, device, session(2, 8)) || table.Unbind(user, []byte("laptop"), session(2, 7)) || table.Unbind([]byte("bo"), device, session(2, 7)) {
		t.Fatal("an unbind of another connection, device or user was taken")
	}
	wantRoutes(t, table, "bob", newer)
	if !table.Unbind(user, device, session(2, 7)) {
		t.Fatal("the unbind of the newer session was refused")
	}
	if table.Unbind(user, device, session(2, 7)) || table.SetState(user, device, session(2, 7), true) {
		t.Fatal("a route that is gone was changed")
	}
	if got := table.total(); got.staleUnbinds != 5 || got.staleStates != 2 || got.unbinds != 1 {
		t.Fatalf("counted %d stale unbinds, %d stale states, %d unbinds; want 5, 2, 1", got.staleUnbinds, got.staleStates, got.unbinds)
	}
}

func TestNameLengths(t *testing.T) {
	table := NewTable()
	long, longDevice := strings.Repeat("u", protocol.MaxUserBytes), strings.Repeat("d", protocol.MaxDeviceBytes)
	for _, names := range [][2]string{{"u", "d"}, {long, "d"}, {"u", longDevice}, {long, longDevice}} {
		mustBind(t, table, names[0], names[1], session(1, 7), 1)
		if !table.SetState([]byte(names[0]), []byte(names[1]), session(1, 7), true) {
			t.Fatalf("%d and %d bytes: not found again", len(names[0]), len(names[1]))
		}
	}
	for _, names := range [][2]string{{"", "d"}, {"u", ""}, {long + "u", "d"}, {"u", longDevice + "d"}} {
		if _, _, ok := table.Bind(names[0], names[1], session(1, 7), 1); ok {
			t.Fatalf("names of %d and %d bytes were taken", len(names[0]), len(names[1]))
		}
	}
	if got := table.Routes(); got != 4 {
		t.Fatalf("%d routes, want 4", got)
	}
	checkTable(t, table)
}

// TestExactKeys binds users whose hash the shard, the index and the tag cannot tell apart.
func TestExactKeys(t *testing.T) {
	var sh shard
	seed := maphash.MakeSeed()
	const h = 0x1234567890abcdef
	names := []string{"a", "aa", "aaa", "b", "ab", strings.Repeat("a", 64)}
	for i, user := range names {
		sh.insert(seed, h, user, "phone", session(1, uint64(i)), 1, true)
	}
	for i, user := range names {
		if p := find(&sh, h, user, "phone"); !p.found || p.sibling || sh.arena.at(sh.index.refs[p.slot]).session().Conn != uint64(i) {
			t.Fatalf("find(%s) = %+v", user, p)
		}
		if got := sh.appendRoutes(nil, h, user); len(got) != 1 || got[0].Session.Conn != uint64(i) {
			t.Fatalf("routes of %s = %v", user, got)
		}
	}
	if p := find(&sh, h, "c", "phone"); p.found || p.sibling {
		t.Fatalf("find of an absent user = %+v", p)
	}
}

// bound is a route in the model.
type bound struct {
	protocol.Session
	login uint64
	live  bool
}

// TestAgainstModel drives a table and a map of maps with the same random calls.
func TestAgainstModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) { runModel(t, seed) })
	}
}

func runModel(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	table := NewTable()
	model := map[string]map[string]bound{}

	// Few users, so that calls meet; many device names in some runs, so that some stand in their records.
	users, devices := 20<<(seed*2), 3+int(seed%2)*5000
	user := func() string {
		n := rng.IntN(users)
		return fmt.Sprintf("u%0*d", 1+n%60, n)
	}
	device := func() string { return fmt.Sprintf("device-%d", rng.IntN(devices)) }
	// Sessions are few too: wrong ones must often be bound elsewhere.
	anySession := func() protocol.Session {
		return protocol.Session{Edge: rng.Uint32N(3), Generation: rng.Uint32(), Conn: rng.Uint64N(4)}
	}
	boundSession := func(u, d string) protocol.Session {
		if b, ok := model[u][d]; ok && rng.IntN(4) != 0 {
			return b.Session
		}
		return anySession()
	}
	pick := func() (string, string) {
		u, d := user(), device()
		if have := model[u]; len(have) > 0 && rng.IntN(4) != 0 {
			names := make([]string, 0, len(have))
			for name := range have {
				names = append(names, name)
			}
			slices.Sort(names)
			d = names[rng.IntN(len(names))]
		}
		return u, d
	}

	for step := range 20_000 {
		// Phases of growth and of decline, so that shards are compacted and emptied.
		grow := step/4000%2 == 0
		switch op := rng.IntN(10); {
		case op < 3 || op < 6 && grow:
			u, d := user(), device()
			if len(model[u]) >= protocol.MaxDevicesPerUser {
				u, d = pick()
			}
			s, login := anySession(), rng.Uint64N(8)
			old, had := model[u][d]
			replaced, was, ok := table.Bind(u, d, s, login)
			wantOK := !had || login >= old.login
			wantWas := wantOK && had && (old.Edge != s.Edge || old.Conn != s.Conn)
			if ok != wantOK || was != wantWas || was && replaced != old.Session {
				t.Fatalf("step %d: Bind = %v, %v, %v with %+v bound", step, replaced, was, ok, old)
			}
			if ok {
				if model[u] == nil {
					model[u] = map[string]bound{}
				}
				model[u][d] = bound{s, login, false}
			}
		case op < 8:
			u, d := pick()
			s := boundSession(u, d)
			old, had := model[u][d]
			want := had && old.Edge == s.Edge && old.Conn == s.Conn
			if got := table.Unbind([]byte(u), []byte(d), s); got != want {
				t.Fatalf("step %d: Unbind = %v, want %v", step, got, want)
			}
			if want {
				if delete(model[u], d); len(model[u]) == 0 {
					delete(model, u)
				}
			}
		case op < 9:
			u, d := pick()
			s, live := boundSession(u, d), rng.IntN(2) == 0
			s.Generation = rng.Uint32()
			old, had := model[u][d]
			want := had && old.Edge == s.Edge && old.Conn == s.Conn
			if got := table.SetState([]byte(u), []byte(d), s, live); got != want {
				t.Fatalf("step %d: SetState = %v, want %v", step, got, want)
			}
			if want {
				model[u][d] = bound{s, old.login, live}
			}
		default:
			u := user()
			wantRoutes(t, table, u, modelRoutes(model[u])...)
		}
		if step%2500 == 0 {
			checkTable(t, table)
		}
	}

	checkTable(t, table)
	routes := 0
	for u, have := range model {
		wantRoutes(t, table, u, modelRoutes(have)...)
		routes += len(have)
	}
	if u, r := table.Users(), table.Routes(); u != len(model) || r != routes {
		t.Fatalf("users, routes = %d, %d, want %d, %d", u, r, len(model), routes)
	}
}

func modelRoutes(have map[string]bound) []protocol.Route {
	var routes []protocol.Route
	for d, b := range have {
		routes = append(routes, protocol.Route{Device: d, Session: b.Session, Live: b.live})
	}
	slices.SortFunc(routes, func(a, b protocol.Route) int { return strings.Compare(a.Device, b.Device) })
	return routes
}

// checkTable verifies what the parts of a shard say of each other. Nothing may run meanwhile.
func checkTable(t *testing.T, table *Table) {
	t.Helper()
	for n := range table.shards {
		s := &table.shards[n]
		live, dead, bytes := 0, 0, 0
		users := map[string]bool{}
		uses := make([]uint32, len(s.devices.names))
		for i, tag := range s.index.tags {
			switch tag {
			case tagEmpty:
			case tagDead:
				dead++
			default:
				live++
				r := s.arena.at(s.index.refs[i])
				bytes += r.bytes()
				users[string(r.user())] = true
				if r.device() != deviceInRecord {
					uses[r.device()]++
				}
				h := maphash.Bytes(table.seed, r.user())
				if table.shard(h) != s || tagOf(h) != tag || !find(s, h, r.user(), s.deviceName(r)).found {
					t.Fatalf("shard %d: %s cannot be found", n, r.user())
				}
			}
		}
		if live != s.index.live || dead != s.index.dead || uint64(live) != s.counts.routes || uint64(len(users)) != s.counts.users {
			t.Fatalf("shard %d: counted %d live, %d dead, %d users; it says %d, %d, %d routes and %d users",
				n, live, dead, len(users), s.index.live, s.index.dead, s.counts.routes, s.counts.users)
		}
		if (live+dead)*16 > len(s.index.tags)*13 {
			t.Fatalf("shard %d: %d live and %d dead of %d slots", n, live, dead, len(s.index.tags))
		}
		if bytes != s.arena.live || s.arena.wasteful() || s.arena.garbage != freeBytes(&s.arena) {
			t.Fatalf("shard %d: %d bytes in records; the arena says %d, garbage %d of which %d can be used", n, bytes, s.arena.live, s.arena.garbage, freeBytes(&s.arena))
		}
		if !slices.Equal(uses, s.devices.uses) {
			t.Fatalf("shard %d: device names used %v, it says %v", n, uses, s.devices.uses)
		}
	}
}

func freeBytes(a *arena) int {
	sum := 0
	for i := range a.free {
		for off := a.free[i]; off != 0; off = a.at(off).nextFree() {
			sum += i + minRecordBytes
		}
	}
	return sum
}

// TestRaces lets sessions of a few devices come and go from several goroutines. Each goroutine owns its
// connections, so it knows what must hold whatever the others do.
func TestRaces(t *testing.T) {
	const workers, steps, users = 4, 8000, 16
	table := NewTable()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 2))
			var dst []protocol.Route
			for n := range steps {
				user, device := fmt.Sprintf("user%d", rng.IntN(users)), fmt.Sprintf("device%d", rng.IntN(2))
				s := session(uint32(w), uint64(n))
				if _, _, ok := table.Bind(user, device, s, uint64(n)); ok {
					table.SetState([]byte(user), []byte(device), s, true)
				}
				dst = table.Locate(dst[:0], user)
				if len(dst) > 2 || len(dst) == 2 && dst[0].Device >= dst[1].Device {
					t.Errorf("Locate(%s) = %v", user, dst)
				}
				table.Unbind([]byte(user), []byte(device), s)
				for _, r := range table.Locate(dst[:0], user) {
					if r.Device == device && same(r.Session, s) {
						t.Errorf("%s/%s still has %v after its unbind", user, device, s)
					}
				}
				if n%1000 == 0 {
					table.Metrics(func(string, string, bool, float64, ...string) {})
				}
			}
		})
	}
	wg.Wait()
	if u, r := table.Users(), table.Routes(); u != 0 || r != 0 {
		t.Fatalf("users, routes = %d, %d after everybody left", u, r)
	}
	checkTable(t, table)
	c := table.total()
	if c.binds+c.staleBinds != workers*steps || c.unbinds+c.staleUnbinds != workers*steps {
		t.Fatalf("counted %+v for %d calls of each kind", c, workers*steps)
	}
}

// TestConcurrentLogins: of many logins of one device the greatest holds the route, in whatever order they come.
func TestConcurrentLogins(t *testing.T) {
	for round := range 50 {
		table := NewTable()
		const logins = 16
		var wg sync.WaitGroup
		for n := range uint64(logins) {
			wg.Go(func() {
				table.Bind("bob", "phone", session(1, n), n)
				if n < logins-1 {
					table.Unbind([]byte("bob"), []byte("phone"), session(1, n))
				}
			})
		}
		wg.Wait()
		wantRoutes(t, table, "bob", protocol.Route{Device: "phone", Session: session(1, logins-1)})
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
}

func TestMetrics(t *testing.T) {
	table := NewTable()
	mustBind(t, table, "bob", "phone", session(1, 7), 2)
	mustBind(t, table, "bob", "phone", session(1, 8), 2)
	mustBind(t, table, "alice", "phone", session(1, 9), 1)
	table.Bind("bob", "phone", session(1, 9), 1)
	table.Unbind([]byte("alice"), []byte("phone"), session(1, 9))

	got := map[string]float64{}
	table.Metrics(func(name, help string, counter bool, value float64, labels ...string) {
		if !strings.HasPrefix(name, "millrace_router_") || strings.HasSuffix(name, "_total") != counter || help == "" || len(labels) != 0 {
			t.Errorf("emitted %s %q counter=%v labels=%v", name, help, counter, labels)
		}
		if _, twice := got[name]; twice {
			t.Errorf("emitted %s twice", name)
		}
		got[name] = value
	})
	for name, want := range map[string]float64{
		"millrace_router_users": 1, "millrace_router_routes": 1, "millrace_router_binds_total": 3, "millrace_router_stale_binds_total": 1,
		"millrace_router_replaced_total": 1, "millrace_router_unbinds_total": 1, "millrace_router_stale_unbinds_total": 0,
	} {
		if got[name] != want {
			t.Errorf("%s = %v, want %v", name, got[name], want)
		}
	}
	if got["millrace_router_bytes"] < 100<<10 {
		t.Errorf("millrace_router_bytes = %v, less than an empty table", got["millrace_router_bytes"])
	}
}
