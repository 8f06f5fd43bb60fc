package router

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"millrace/protocol"
)

func userID(n int) string { return fmt.Sprintf("user%08d", n) } // 12 bytes

func fill(table *Table, from, to int) {
	for n := from; n < to; n++ {
		table.Bind(userID(n), "default", session(1, uint64(n)), 1)
	}
}

func empty(table *Table, from, to int) {
	for n := from; n < to; n++ {
		table.Unbind([]byte(userID(n)), []byte("default"), session(1, uint64(n)))
	}
}

func liveHeap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestBytesPerUser measures the table as the heap sees it, and checks that it says the same of itself.
func TestBytesPerUser(t *testing.T) {
	const users = 200_000
	before := liveHeap()
	table := NewTable()
	fill(table, 0, users)
	heap := float64(liveHeap()-before) / users
	own := float64(table.total().bytes) / users
	runtime.KeepAlive(table)
	t.Logf("%.1f B per user by the heap, %.1f by the table", heap, own)
	if heap > 64 {
		t.Errorf("%.1f B of heap per user, want at most 64", heap)
	}
	// Size classes round up; what they add is not the table's to know.
	if own > heap || own < 0.85*heap {
		t.Errorf("the table says %.1f B per user, the heap %.1f", own, heap)
	}
}

// TestBytesPerUserAtTenMillion builds one shard as it is at ten million users, where DESIGN grants 48 B each.
func TestBytesPerUserAtTenMillion(t *testing.T) {
	const users = 10_000_000 / shardCount
	worst := 0.0
	table := NewTable()
	s := &table.shards[0]
	for n := range users * 5 / 4 {
		// The high half of a spread number: a hash for the index, none for the shard.
		s.insert(table.seed, uint64(n)*0x9e3779b97f4a7c15>>16, userID(n), "default", session(1, uint64(n)), 1, true)
		// From 4/5 to 5/4 of the load the index grows at least once: the worst moment is among them.
		if n > users*4/5 && n%64 == 0 {
			worst = max(worst, float64(s.index.bytes()+s.arena.bytes()+s.devices.bytes())/float64(n))
		}
	}
	t.Logf("at most %.1f B per user", worst)
	if worst > 48 {
		t.Errorf("%.1f B per user, want at most 48", worst)
	}
}

// TestChurnKeepsMemory lets whole populations come and go, of other names and lengths each time.
func TestChurnKeepsMemory(t *testing.T) {
	const users, cycles = churnUsers, 10
	table := NewTable()
	empties := table.total().bytes
	var first, peak uint64
	for cycle := range cycles {
		for n := range users {
			table.Bind(churnUser(cycle, n), churnDevice(cycle, n), session(1, uint64(n)), 1)
		}
		peak = table.total().bytes
		if cycle == 0 {
			first = peak
		}
		// Names grow by a byte a cycle, nothing else may: but a chunk per shard may begin, and garbage not worth moving
		// may be of lengths that no longer occur.
		if limit := first + uint64(cycle*users) + shardCount*(chunkBytes+minGarbageBytes); peak > limit {
			t.Fatalf("cycle %d: %d bytes, %d after the first", cycle, peak, first)
		}
		for n := range users {
			if !table.Unbind([]byte(churnUser(cycle, n)), []byte(churnDevice(cycle, n)), session(1, uint64(n))) {
				t.Fatalf("cycle %d: user %d is lost", cycle, n)
			}
		}
		c := table.total()
		if c.routes != 0 || c.users != 0 {
			t.Fatalf("cycle %d: %d routes of %d users left", cycle, c.routes, c.users)
		}
		// What a shard may keep: garbage not worth moving, a chunk, an index and the device names.
		if limit := empties + shardCount*(minGarbageBytes+chunkBytes); c.bytes > limit {
			t.Fatalf("cycle %d: an empty table holds %d bytes, more than %d", cycle, c.bytes, limit)
		}
	}
	checkTable(t, table)
}

func churnUser(cycle, n int) string {
	return fmt.Sprintf("%d-%s-%d", cycle, strings.Repeat("x", cycle), n)
}

func churnDevice(cycle, n int) string {
	if n%3 == 0 {
		return fmt.Sprintf("install-%d", n) // too many to be kept by name
	}
	return fmt.Sprintf("device-%d", cycle)
}

// TestSteadyChurnReusesSpace replaces single users in a table that stays full.
func TestSteadyChurnReusesSpace(t *testing.T) {
	const users = 20_000
	table := NewTable()
	fill(table, 0, users)
	before := table.total()
	for n := range 10 * users {
		empty(table, n, n+1)
		fill(table, n+users, n+users+1)
	}
	after := table.total()
	if after.routes != users || after.users != users {
		t.Fatalf("%d routes of %d users, want %d", after.routes, after.users, users)
	}
	// Shards trade users, so some hold a few more than at first.
	if after.bytes > before.bytes*3/2 {
		t.Fatalf("%d bytes before, %d after", before.bytes, after.bytes)
	}
	if garbage, used := totalGarbage(table), users*recordBytes(userID(0), "default", 0); garbage > used/2 {
		t.Fatalf("%d bytes of garbage beside %d in use", garbage, used)
	}
	checkTable(t, table)
}

func totalGarbage(table *Table) (sum int) {
	for i := range table.shards {
		sum += table.shards[i].arena.garbage
	}
	return sum
}

func TestNoAllocations(t *testing.T) {
	table := NewTable()
	long := strings.Repeat("u", protocol.MaxUserBytes)
	for _, user := range []string{"bob", long} {
		for _, device := range []string{"phone", "laptop", "default"} {
			mustBind(t, table, user, device, session(1, 7), 1)
		}
	}
	dst := make([]protocol.Route, 0, 8)
	bytesLong, phone := []byte(long), []byte("phone")
	for name, call := range map[string]func(){
		"Locate":         func() { dst = table.Locate(dst[:0], long) },
		"Locate, absent": func() { dst = table.Locate(dst[:0], "nobody") },
		"SetState":       func() { table.SetState(bytesLong, phone, session(1, 7), true) },
		"Bind":           func() { table.Bind(long, "phone", session(1, 7), 1) },
		"Unbind, stale":  func() { table.Unbind(bytesLong, phone, session(1, 8)) },
		"Unbind, Bind":   func() { table.Unbind(bytesLong, phone, session(1, 7)); table.Bind(long, "phone", session(1, 7), 1) },
	} {
		if got := testing.AllocsPerRun(100, call); got != 0 {
			t.Errorf("%s: %v allocations", name, got)
		}
	}
}

func TestDeviceNames(t *testing.T) {
	var d devices
	for n := range maxDeviceNames {
		if code := d.acquire(fmt.Sprint("d", n)); code != uint8(n) {
			t.Fatalf("name %d got number %d", n, code)
		}
	}
	if code := d.acquire("more"); code != deviceInRecord {
		t.Fatalf("a name too many got number %d", code)
	}
	if code := d.acquire("d5"); code != 5 || d.uses[5] != 2 {
		t.Fatalf("a known name got number %d, %d uses", code, d.uses[5])
	}
	d.release(deviceInRecord)
	d.release(5)
	if code := d.acquire("more"); code != deviceInRecord {
		t.Fatalf("a name took the place of one in use: %d", code)
	}
	old := d.names[5]
	d.release(5)
	if code := d.acquire("more"); code != 5 || d.names[5] != "more" || old != "d5" {
		t.Fatalf("the place of a name out of use was not taken: %d", code)
	}
}

var sinkRoutes []protocol.Route

// rivals are the plain ways to keep the same routes.
type rivals struct {
	bind   func(user string, conn uint64)
	locate func(user string)
	unbind func(user string, conn uint64)
}

func mutexMap() rivals {
	var mu sync.RWMutex
	m := map[string]map[string]protocol.Route{}
	return rivals{
		func(user string, conn uint64) {
			mu.Lock()
			if m[user] == nil {
				m[user] = map[string]protocol.Route{}
			}
			m[user]["default"] = protocol.Route{Device: "default", Session: session(1, conn)}
			mu.Unlock()
		},
		func(user string) {
			mu.RLock()
			sinkRoutes = sinkRoutes[:0]
			for _, r := range m[user] {
				sinkRoutes = append(sinkRoutes, r)
			}
			mu.RUnlock()
		},
		func(user string, conn uint64) {
			mu.Lock()
			if r, ok := m[user]["default"]; ok && r.Session.Conn == conn {
				if delete(m[user], "default"); len(m[user]) == 0 {
					delete(m, user)
				}
			}
			mu.Unlock()
		},
	}
}

func syncMap() rivals {
	type key struct{ user, device string }
	var m sync.Map
	return rivals{
		func(user string, conn uint64) {
			m.Store(key{user, "default"}, &protocol.Route{Device: "default", Session: session(1, conn)})
		},
		func(user string) {
			sinkRoutes = sinkRoutes[:0]
			if r, ok := m.Load(key{user, "default"}); ok {
				sinkRoutes = append(sinkRoutes, *r.(*protocol.Route))
			}
		},
		func(user string, conn uint64) {
			if r, ok := m.Load(key{user, "default"}); ok && r.(*protocol.Route).Session.Conn == conn {
				m.CompareAndDelete(key{user, "default"}, r)
			}
		},
	}
}

func ourTable() rivals {
	table := NewTable()
	device := []byte("default")
	return rivals{
		func(user string, conn uint64) { table.Bind(user, "default", session(1, conn), 1) },
		func(user string) { sinkRoutes = table.Locate(sinkRoutes[:0], user) },
		func(user string, conn uint64) { table.Unbind([]byte(user), device, session(1, conn)) },
	}
}

// BenchmarkTable compares the table with a map under a lock and a sync.Map at a million users:
//
//	go test -run - -bench Table -benchtime 2000000x ./router/
func BenchmarkTable(b *testing.B) {
	const users = 1 << 20
	names := make([]string, users)
	for n := range names {
		names[n] = userID(n)
	}
	for _, kind := range []struct {
		name string
		make func() rivals
	}{{"Table", ourTable}, {"MutexMap", mutexMap}, {"SyncMap", syncMap}} {
		before := liveHeap()
		r := kind.make()
		for n, name := range names {
			r.bind(strings.Clone(name), uint64(n))
		}
		perUser := float64(liveHeap()-before) / users
		// An odd step visits every user in an order that no cache foresees.
		at := func(i int) int { return i * 0x9e3779b1 & (users - 1) }
		b.Run("Locate/"+kind.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r.locate(names[at(i)])
			}
			b.ReportMetric(perUser, "B/user") // Loop would have cleared it
		})
		b.Run("Rebind/"+kind.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				n := at(i)
				r.unbind(names[n], uint64(n))
				r.bind(names[n], uint64(n))
			}
		})
	}
}
