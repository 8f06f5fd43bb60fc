//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

// TestFloodConnects: many more connections come than there is room for, as fast as this machine makes them, while others talk. Accepting
// never runs out of descriptors, which would be the end of the server; who is connected is served on; and who comes afterwards is let in.
func TestFloodConnects(t *testing.T) {
	floodTest(t)
	const workers = 4
	room := floodSize(300, 4000)       // connections
	held := floodSize(200, 3000)       // by each worker: together more than there is room for
	lasts := floodSize(2, 10)          // seconds
	honest := floodSize(40, 500)       // connected before
	perSecond := floodSize(200, 1_000) // messages
	s := newFloodVictim(t)
	s.files = reservedDescriptors + room
	s.serve()
	c := newCrowd(s)
	people := c.join("old", honest, 0)
	read(people)
	g := s.watched()

	talking, stop := context.WithCancel(t.Context())
	defer stop()
	flooding, end := context.WithTimeout(talking, time.Duration(lasts)*time.Second)
	defer end()
	var busy sync.WaitGroup
	var sent int
	busy.Go(func() { sent = c.chat(talking, people, people, perSecond, 120, true) })
	var made, failed atomic.Int64
	begun := time.Now()
	var flood sync.WaitGroup
	for w := range workers {
		flood.Go(func() { floodConnects(flooding, t, s.addr, w, held, &made, &failed) })
	}
	flood.Wait()
	took := time.Since(begun)

	// What is left of the flood is on its way through the server: who comes now may be told once or twice that it is full.
	tries := 0
	for {
		tries++
		conn, _, err := s.login(t.Context(), "new", protocol.DefaultDevice, 0, netip.Addr{}, 0)
		if err == nil {
			defer conn.Close()
			break
		}
		if time.Since(begun)-took > floodPatience {
			t.Fatalf("nobody is let in after the flood: %v", err)
		}
		<-time.After(floodTick) // as a client would, but sooner
	}
	letIn := time.Since(begun) - took
	stop()
	busy.Wait()
	v := c.judge()
	s.wantConnections(honest + 1)
	g.stop()
	values := scrape(t, s.admin())
	full, madeRoom := values[`millrace_edge_handshakes_total{result="503"}`], values[`millrace_edge_closes_total{reason="no_room"}`]
	t.Logf("%d connects in %.1f s: %.0f a second (%d not made); room for %d: %.0f were told 503, %.0f made room; let in %v after the flood, try %d",
		made.Load(), took.Seconds(), float64(made.Load())/took.Seconds(), failed.Load(), room, full, madeRoom, letIn.Round(time.Millisecond), tries)
	ways := c.take()
	t.Logf("meanwhile %d messages of %d clients: p50 %v, p99 %v; %s", sent, honest, quantile(ways, .5), quantile(ways, .99), g)
	t.Log(v)
	if _, _, files := g.seen(); files >= s.files {
		t.Errorf("%d descriptors of %d", files, s.files)
	}
	if full+madeRoom == 0 || int(values["millrace_edge_connections_max"]) != room {
		t.Errorf("the flood was no flood: room for %v, %v refused, %v closed for others", values["millrace_edge_connections_max"], full, madeRoom)
	}
	s.wantServing()
}

// floodConnects opens connections without waiting for them and keeps the newest ones, until ctx ends. Who wants many a second makes
// system calls: the poller of Go would be busier than the server.
func floodConnects(ctx context.Context, t *testing.T, addr string, worker, held int, made, failed *atomic.Int64) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		t.Error(err)
		return
	}
	sa := &syscall.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	ring := make([]int, held)
	for i := range ring {
		ring[i] = -1
	}
	closeRing := func(i int) {
		if ring[i] < 0 {
			return
		}
		if _, err := syscall.Getpeername(ring[i]); err == nil {
			made.Add(1)
		} else if option, err := syscall.GetsockoptInt(ring[i], syscall.SOL_SOCKET, syscall.SO_ERROR); err == nil && option == 0 {
			failed.Add(1) // nothing has come back so far
		} else {
			made.Add(1) // and closed by the server since
		}
		syscall.Close(ring[i])
		ring[i] = -1
	}
	for n := 0; ctx.Err() == nil; n++ {
		i := n % held
		closeRing(i)
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Errorf("socket: %v", err)
			return
		}
		ring[i] = fd
		// Without TIME_WAIT there are ports enough for any rate.
		for _, err := range []error{
			syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1}),
			syscall.SetsockoptInt(fd, syscall.IPPROTO_IP, ipBindAddressNoPort, 1),
			syscall.Bind(fd, &syscall.SockaddrInet4{Addr: floodSource(1000 + worker*250 + n%250).As4()}),
		} {
			if err != nil {
				t.Errorf("prepare a socket: %v", err)
				return
			}
		}
		if err := syscall.Connect(fd, sa); err != nil && err != syscall.EINPROGRESS {
			failed.Add(1)
			syscall.Close(fd)
			ring[i] = -1
		}
	}
	for i := range ring {
		closeRing(i)
	}
}

// TestFloodChurn: clients come and go, in every state and in every manner; goroutines, memory, routes and descriptors are afterwards
// what they were before.
func TestFloodChurn(t *testing.T) {
	floodTest(t)
	total := floodSize(2_000, 200_000)
	s := newFloodVictim(t)
	s.serve()
	s.churn(total / 10) // what the first ones need is kept: slabs, pools, a log of the database
	s.wantConnections(0)
	before := s.still()
	begun := time.Now()
	s.churn(total)
	took := time.Since(begun)
	s.wantConnections(0)
	after := s.still()
	values := scrape(t, s.admin())
	t.Logf("%d connects and disconnects in %.1f s: %.0f a second; %v sessions", total, took.Seconds(), float64(total)/took.Seconds(),
		values["millrace_edge_connects_total"])
	t.Logf("before: %v", before)
	t.Logf("after:  %v", after)
	if after.goroutines > before.goroutines+churnGoroutines {
		t.Errorf("%d goroutines more", after.goroutines-before.goroutines)
	}
	if after.files > before.files+churnFiles {
		t.Errorf("%d descriptors more", after.files-before.files)
	}
	if after.heap > before.heap+churnHeapBytes || after.objects > before.objects+churnObjects {
		t.Errorf("%.1f MiB and %d objects more", mib(after.heap-before.heap), after.objects-before.objects)
	}
	s.wantServing()
}

// What may remain after a churn: of the admin server's connection, of the database's files, and of its caches.
const (
	churnGoroutines = 8
	churnFiles      = 16
	churnHeapBytes  = 16 << 20
	churnObjects    = 8192
	churnUsers      = 200
	churnWorkers    = 16
)

// standing is what a process at rest holds.
type standing struct {
	goroutines, files int
	heap, objects     int64
	resident          int64
	routeBytes        int64
}

func (s standing) String() string {
	return fmt.Sprintf("%d goroutines, %d descriptors, heap %.1f MiB in %d objects, VmRSS %.1f MiB, route table %d B",
		s.goroutines, s.files, mib(s.heap), s.objects, mib(s.resident), s.routeBytes)
}

// still collects garbage, twice since pools keep what they hold for one collection, and looks.
func (s *victim) still() standing {
	s.t.Helper()
	for range 2 {
		response, err := http.Get("http://" + s.admin() + "/debug/pprof/heap?gc=1")
		if err != nil {
			s.t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, response.Body)
		if response.Body.Close(); err != nil || response.StatusCode != http.StatusOK {
			s.t.Fatalf("collect: %s, %v", response.Status, err)
		}
	}
	v := scrape(s.t, s.admin())
	return standing{
		goroutines: int(v["go_goroutines"]), files: openFiles(s.process.Process.Pid),
		heap: int64(v["go_memstats_heap_alloc_bytes"]), objects: int64(v["go_memstats_heap_objects"]),
		resident: residentBytes(s.t, s.process.Process.Pid), routeBytes: int64(v["millrace_router_bytes"]),
	}
}

// churn connects and disconnects n times.
func (s *victim) churn(n int) {
	s.t.Helper()
	tokens := make([][]byte, churnUsers)
	for i := range tokens {
		signed, err := signToken(s.config, fmt.Sprintf("churn-%03d", i), time.Hour)
		if err != nil {
			s.t.Fatal(err)
		}
		tokens[i] = []byte(signed)
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	for range churnWorkers {
		workers.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := s.comeAndGo(i, tokens[(i/12)%churnUsers]); err != nil {
					s.t.Errorf("connection %d: %v", i, err)
					return
				}
			}
		})
	}
	workers.Wait()
}

// comeAndGo gets as far as the number says, and leaves in the manner that it says.
func (s *victim) comeAndGo(n int, token []byte) error {
	conn, err := floodDial(s.t.Context(), s.addr, floodSource(n%1000), 0)
	if err != nil {
		return err
	}
	defer conn.Close()
	var c *floodConn
	switch stage := n % 4; stage {
	case 0: // nothing but TCP
	case 1: // half of an upgrade
		_, err = io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: localhost\r\n")
	default: // a session, or a token that is none
		if c, err = floodUpgrade(conn, protocol.SubprotocolBinary); err != nil {
			return err
		}
		f := protocol.Frame{Kind: protocol.KindConnect, Token: token}
		if stage == 3 && n%8 == 7 {
			f.Token = []byte(strings.Repeat("x", 100))
		}
		if err = wsutil.WriteClientBinary(c, protocol.AppendBinary(nil, &f)); err != nil {
			return err
		}
		_, err = c.read(c.pong) // connected or an error; or session_replaced, by the next one of the same user
		if _, closed := err.(walkClosed); closed {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	switch n / 4 % 3 {
	case 0:
		return conn.(*net.TCPConn).SetLinger(0) // a reset
	case 1: // FIN
		return nil
	default:
		if c != nil {
			// It may be closed by now, where the token was none.
			_ = wsutil.WriteClientMessage(c, ws.OpClose, ws.NewCloseFrameBody(ws.StatusNormalClosure, ""))
			_, _ = io.Copy(io.Discard, conn)
		}
		return nil
	}
}
