//go:build linux

package main

import (
	"bufio"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The floods: what a public address has to stand, by real sockets over loopback against the real binary in a process of its own, whose
// memory and descriptors are watched. What is measured is printed; what has to hold is what clients can rely on, and limits. The short forms are
// for every day; `make test-flood` runs the long ones.
var floods = flag.Bool("floods", false, "run the floods in their long form, one after the other")

const (
	floodPatience = time.Minute // for what must come; only a test that fails waits it out
	floodWatch    = 100 * time.Millisecond
	floodTick     = 10 * time.Millisecond
)

// floodTest says which form runs. Short ones mostly wait, and may do so beside each other.
func floodTest(t *testing.T) (long bool) {
	t.Helper()
	if !*floods {
		t.Parallel()
	}
	return *floods
}

// floodSize is a figure of the short form, or of the long one.
func floodSize[T any](short, long T) T {
	if *floods {
		return long
	}
	return short
}

// floodBinary is the server, built once for all floods.
var floodBinary struct {
	once sync.Once
	path string
}

// newFloodVictim is a server that does not run yet, with a data directory of its own.
func newFloodVictim(t *testing.T) *victim {
	t.Helper()
	floodBinary.once.Do(func() {
		dir, err := os.MkdirTemp("", "millrace-flood-") // outlives the test that is first
		if err != nil {
			t.Fatal(err)
		}
		floodBinary.path = newVictim(t, dir, "").path
	})
	if floodBinary.path == "" {
		t.Fatal("the server was not built")
	}
	s := &victim{t: t, path: floodBinary.path, config: defaultConfig(), addr: freeFixedAddr(t)}
	s.config.Data.Dir = filepath.Join(t.TempDir(), "data")
	t.Cleanup(s.kill)
	return s
}

// TestMain removes the binary of the floods, and is the process of other peers where a test has asked for one.
func TestMain(m *testing.M) {
	if addr := os.Getenv(floodPeersVariable); addr != "" {
		os.Exit(floodPeers(addr))
	}
	code := m.Run()
	if floodBinary.path != "" {
		_ = os.RemoveAll(filepath.Dir(floodBinary.path)) // a directory of temporary files
	}
	os.Exit(code)
}

// serve starts the server.
func (s *victim) serve() {
	s.t.Helper()
	if s.start("") {
		s.t.Fatalf("the server did not start:\n%s", s.log())
	}
}

// wantServing says that the server has come through: it runs, is ready, has broken no promise and met no limit of the kernel.
func (s *victim) wantServing() {
	s.t.Helper()
	if !s.running() {
		s.t.Fatalf("the server has ended: %v\n%s", s.process.ProcessState, s.log())
	}
	wantNoViolations(s.t, s.admin())
	for _, path := range []string{"/livez", "/readyz?verbose"} {
		response, err := http.Get("http://" + s.admin() + path)
		if err != nil {
			s.t.Errorf("%s: %v", path, err)
			continue
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			s.t.Errorf("%s: %s", path, response.Status)
		}
	}
	if n := scrape(s.t, s.admin())["millrace_edge_panics_total"]; n != 0 {
		s.t.Errorf("%v panics\n%s", n, s.log())
	}
	if log := s.log(); strings.Contains(log, "too many open files") || strings.Contains(log, "level=ERROR") {
		s.t.Errorf("the server said:\n%s", log)
	}
}

// scrape reads the metrics, by name and labels as they are written.
func scrape(t testing.TB, adminAddr string) map[string]float64 {
	t.Helper()
	response, err := http.Get("http://" + adminAddr + "/metrics")
	if err != nil {
		t.Fatalf("scrape: %v", err)
	}
	defer response.Body.Close()
	values := map[string]float64{}
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		at := strings.LastIndexByte(lines.Text(), ' ')
		if at < 0 || lines.Text()[0] == '#' {
			continue
		}
		if v, err := strconv.ParseFloat(lines.Text()[at+1:], 64); err == nil {
			values[lines.Text()[:at]] = v
		}
	}
	if err := lines.Err(); err != nil || len(values) == 0 {
		t.Fatalf("scrape: %d values, %v", len(values), err)
	}
	return values
}

// scrapeUntil scrapes until the values are as wanted, and returns them.
func scrapeUntil(t testing.TB, adminAddr, what string, good func(map[string]float64) bool) map[string]float64 {
	t.Helper()
	tick := time.NewTicker(floodWatch)
	defer tick.Stop()
	patience := time.NewTimer(floodPatience)
	defer patience.Stop()
	for {
		values := scrape(t, adminAddr)
		if good(values) {
			return values
		}
		select {
		case <-tick.C:
		case <-patience.C:
			t.Fatalf("%s: %v connections, %v sessions, %v routes", what, values[metricConnections], values[metricSessions], values[metricRoutes])
		}
	}
}

const (
	metricConnections = "millrace_edge_connections"
	metricSessions    = "millrace_edge_sessions"
	metricRoutes      = "millrace_router_routes"
)

// wantConnections waits until so many are there, connected and routed.
func (s *victim) wantConnections(n int) {
	s.t.Helper()
	scrapeUntil(s.t, s.admin(), fmt.Sprintf("waiting for %d", n), func(v map[string]float64) bool {
		return v[metricConnections] == float64(n) && v[metricSessions] == float64(n) && v[metricRoutes] == float64(n)
	})
}

// watcher watches the memory and the descriptors of a process.
type watcher struct {
	// Immutable.
	stop  func() // and wait
	first int64  // resident bytes

	mu         sync.Mutex
	last, peak int64 // guarded by mu: resident bytes
	files      int   // guarded by mu: the most
}

func (s *victim) watched() *watcher {
	g := &watcher{first: residentBytes(s.t, s.process.Process.Pid)}
	pid := s.process.Process.Pid
	ended := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(floodWatch)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				g.look(s.t, pid)
			case <-ended:
				return
			}
		}
	})
	g.stop = sync.OnceFunc(func() { close(ended); watching.Wait() })
	s.t.Cleanup(g.stop)
	return g
}

func (g *watcher) look(t testing.TB, pid int) {
	resident, files := residentNow(pid), openFiles(pid)
	g.mu.Lock()
	defer g.mu.Unlock()
	if resident > 0 { // it may have ended, which others notice
		g.last, g.peak = resident, max(g.peak, resident)
	}
	g.files = max(g.files, files)
}

// seen is what was seen so far.
func (g *watcher) seen() (grown, peak int64, files int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last - g.first, g.peak, g.files
}

// now is the resident memory when it was last looked at.
func (g *watcher) now() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
}

func (g *watcher) String() string {
	grown, peak, files := g.seen()
	return fmt.Sprintf("VmRSS %+.1f MiB, at most %.1f MiB; at most %d descriptors", mib(grown), mib(peak), files)
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// residentNow is 0 for a process that has ended.
func residentNow(pid int) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

func openFiles(pid int) int {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // of a process that ends: those that there were
	return len(names)
}

// quantile sorts.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(len(d)-1, int(q*float64(len(d))))]
}
