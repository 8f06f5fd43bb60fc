package main

import (
	"bufio"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

const (
	// settleAfter is how long the server is left alone before its memory is read: the definition of DESIGN.md §8,
	// VmRSS less VmRSS with no connection, 60 s after the ramp, no forced release.
	settleAfter = 60 * time.Second
	// idleRampers connect at once.
	idleRampers = 16
	// markCycles is over how many collections the time of marking is averaged.
	markCycles = 10
)

var idleHeap = flag.String("idle.heap", "", "write a heap profile of the last idle server to this `file`; with GODEBUG=memprofilerate=1 every allocation is in it")

// idleBound is what TestIdleConnection lets each of idleConnections cost. The goal is 800 B, which is not met: 1 751 is the most that was measured
// 60 s after a ramp of as many, see loadtest/PERFORMANCE.md, and machines differ.
const (
	idleBound       = 2_400
	idleConnections = 5_000
)

// TestIdleConnection holds the real server to idleBound. It need not wait as long as the benchmark does: it is enough that the bound is
// met at some time.
func TestIdleConnection(t *testing.T) {
	server := startIdleServer(t, nil)
	before := readResident(t, server.pid)
	defer server.hold(t, idleConnections)()
	deadline := time.Now().Add(killPatience)
	for {
		each := (readResident(t, server.pid).all - before.all) / idleConnections
		if each <= idleBound {
			t.Logf("%d bytes a connection", each)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes a connection, want at most %d", each, idleBound)
		}
		time.Sleep(100 * time.Millisecond) // collections come by themselves
	}
	// The scrape itself brings the pages of what it is made with.
	if told := metricValue(t, server.get(t, "/metrics"), "millrace_process_bytes_per_connection"); told <= 0 || told > 2*idleBound {
		t.Errorf("the server tells of %.0f bytes a connection", told)
	}
}

// BenchmarkIdleConnection reports the process memory of one idle connection: of the real binary, authenticated and routed, its device
// new or known from an earlier connection; and of gnet with the same options and nothing else.
func BenchmarkIdleConnection(b *testing.B) {
	for _, n := range []int{1_000, 5_000, 15_000} {
		b.Run(fmt.Sprintf("%d/gnet", n), func(b *testing.B) { reportIdle(b, startBare(b), n) })
		b.Run(fmt.Sprintf("%d/new", n), func(b *testing.B) { reportIdle(b, startIdleServer(b, nil), n) })
		b.Run(fmt.Sprintf("%d/known", n), func(b *testing.B) {
			server := startIdleServer(b, nil)
			server.hold(b, n)()
			server.restart(b)
			reportIdle(b, server, n)
		})
	}
}

// BenchmarkIdleTLSConnection is the same over TLS, of new devices.
func BenchmarkIdleTLSConnection(b *testing.B) {
	const n = 5_000
	b.Run(strconv.Itoa(n), func(b *testing.B) {
		reportIdle(b, startIdleServer(b, newPair(b, b.TempDir(), nextDay())), n)
	})
}

func reportIdle(b *testing.B, server *idleServer, n int) {
	before := readResident(b, server.pid)
	release := server.hold(b, n)
	defer release()
	time.Sleep(settleAfter) // part of the definition: heartbeats and collections go on meanwhile
	after := readResident(b, server.pid)
	each := func(bytes int64) float64 { return float64(bytes) / float64(n) }
	b.ReportMetric(each(after.all-before.all), "B/connection")
	b.ReportMetric(each(after.file-before.file), "B/connection-program")
	b.ReportMetric(float64(before.all)/1e6, "MB-empty")
	b.ReportMetric(0, "ns/op")
	if server.victim == nil {
		return
	}
	scrape := server.get(b, "/metrics")
	b.ReportMetric(metricValue(b, scrape, "millrace_process_bytes_per_connection"), "B/connection-told")
	marked := markSeconds(b, scrape)
	var heap []byte
	for range markCycles {
		heap = server.get(b, "/debug/pprof/heap?gc=1")
	}
	b.ReportMetric((markSeconds(b, server.get(b, "/metrics"))-marked)*1e3/markCycles, "ms-mark/cycle")
	if *idleHeap != "" {
		if err := os.WriteFile(*idleHeap, heap, 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

// markSeconds is the CPU time of all marking until now, whoever did it.
func markSeconds(b testing.TB, scrape []byte) (sum float64) {
	for _, who := range []string{"assist", "dedicated", "idle"} {
		sum += metricValue(b, scrape, "go_cpu_classes_gc_mark_"+who+"_cpu_seconds_total")
	}
	return sum
}

// metricValue finds a metric without labels.
func metricValue(tb testing.TB, scrape []byte, name string) float64 {
	tb.Helper()
	for line := range strings.Lines(string(scrape)) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				tb.Fatal(err)
			}
			return value
		}
	}
	tb.Fatalf("%s is not told", name)
	return 0
}

// get reads from the server's admin address.
func (s *idleServer) get(tb testing.TB, path string) []byte {
	tb.Helper()
	r, err := http.Get("http://" + s.victim.admin() + path)
	if err != nil {
		tb.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		tb.Fatalf("%s: status %d, %v", path, r.StatusCode, err)
	}
	return body
}

// idleServer is a server in a process of its own.
type idleServer struct {
	addr   string
	pid    int
	victim *victim   // nil: bare gnet
	pair   *testPair // nil: no TLS
}

func startIdleServer(b testing.TB, pair *testPair) *idleServer {
	v := newVictim(b, b.TempDir(), "")
	if pair != nil {
		v.flags = []string{"--edge-tls-cert", pair.cert, "--edge-tls-key", pair.key}
	}
	b.Cleanup(v.kill)
	s := &idleServer{addr: v.addr, victim: v, pair: pair}
	s.restart(b)
	return s
}

func (s *idleServer) restart(b testing.TB) {
	s.victim.kill()
	if early := s.victim.start(""); early {
		b.Fatalf("the server did not start:\n%s", s.victim.log())
	}
	s.pid = s.victim.process.Process.Pid
}

// startBare starts the base line that the tests of edge have, the one package that knows gnet.
func startBare(b testing.TB) *idleServer {
	binary := filepath.Join(b.TempDir(), "edge.test")
	if out, err := exec.CommandContext(b.Context(), "go", "test", "-c", "-o", binary, "./edge").CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	server := exec.Command(binary)
	server.Env = append(os.Environ(), "MILLRACE_EDGE_CHILD=bare 1 1")
	server.Stderr = os.Stderr
	in, err := server.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := server.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close() // it ends with its input
		_ = server.Wait()
	})
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return &idleServer{addr: strings.TrimSpace(addr), pid: server.Process.Pid}
}

// hold opens n connections, of users of their own. They answer pings until release is called.
func (s *idleServer) hold(b testing.TB, n int) (release func()) {
	tokens := make([]string, n)
	for i := range tokens {
		if s.victim != nil {
			var err error
			if tokens[i], err = signToken(s.victim.config, fmt.Sprintf("user-%06d", i), time.Hour); err != nil {
				b.Fatal(err)
			}
		}
	}
	conns := make([]io.Closer, n)
	var ramp sync.WaitGroup
	for r := range idleRampers {
		ramp.Go(func() {
			for i := r; i < n; i += idleRampers {
				var err error
				if conns[i], err = s.connect(b, i, tokens[i]); err != nil {
					b.Errorf("connection %d: %v", i, err)
					return
				}
			}
		})
	}
	ramp.Wait()
	if b.Failed() {
		b.FailNow()
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
	}
}

// connect opens a connection and, with a token, waits for connected.
func (s *idleServer) connect(b testing.TB, i int, token string) (io.Closer, error) {
	dialer := ws.Dialer{Protocols: []string{protocol.SubprotocolBinary}, Timeout: 10 * time.Second}
	url := "ws://" + s.addr + "/ws"
	if s.pair != nil {
		url = "wss://" + s.addr + "/ws"
		dialer.TLSConfig = &tls.Config{RootCAs: s.pair.roots, ServerName: "localhost"}
	}
	conn, reader, _, err := dialer.Dial(b.Context(), url)
	if err != nil {
		return nil, err
	}
	if reader != nil {
		ws.PutReader(reader)
	}
	if token != "" {
		f := protocol.Frame{Kind: protocol.KindConnect, Token: []byte(token), Device: []byte(protocol.DefaultDevice), Epoch: uint64(1 + i)}
		if err := wsutil.WriteClientBinary(conn, protocol.AppendBinary(nil, &f)); err != nil {
			return nil, err
		}
		data, err := wsutil.ReadServerBinary(conn)
		if err != nil {
			return nil, err
		}
		if _, bad := protocol.ParseBinary(data, &f); bad != nil || f.Kind != protocol.KindConnected {
			return nil, fmt.Errorf("got kind %#x (%v), want connected", f.Kind, bad)
		}
	}
	go func() {
		for {
			if _, err := wsutil.ReadServerBinary(conn); err != nil { // answers pings as well
				return
			}
		}
	}()
	return conn, nil
}

// resident is what a process has in memory, in bytes.
type resident struct {
	all  int64
	file int64 // of these, pages of the program itself
}

func readResident(tb testing.TB, pid int) (r resident) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "RssFile" {
			continue
		}
		kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		if name == "VmRSS" {
			r.all = kib << 10
		} else {
			r.file = kib << 10
		}
	}
	if r.all == 0 {
		tb.Fatal("no VmRSS")
	}
	return r
}

// residentBytes is VmRSS of a process.
func residentBytes(tb testing.TB, pid int) int64 { return readResident(tb, pid).all }
