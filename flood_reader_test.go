//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	stoppedReceiveBytes = 4 << 10 // SO_RCVBUF of who does not read: the kernel of the reader holds little
	// What the kernel may hold of a connection that is not read: edge's SO_SNDBUF of 64 KiB, which Linux doubles for its own
	// bookkeeping, and the segment that goes over it.
	stoppedKernelBytes = 2*64<<10 + 64<<10
	// What the memory of the process may grow by in the second half of the time: a table of the database that fills up takes 64 MiB, and
	// the rest is for the garbage of a busy heap. What 5 000 connections hold has its own bounds, which have been reached by then.
	stoppedGrowth = 64<<20 + gcHeadroomBytes/2
)

// TestFloodReaders: thousands stop reading while messages flow to them and to others. The process does not grow with what they do not
// take, the kernel holds no more than it was told to, the others do not notice, and when they read again everything comes, once and in order.
func TestFloodReaders(t *testing.T) {
	floodTest(t)
	stopped := floodSize(60, 5_000)
	favourites := floodSize(2, 50) // of these: half of what goes to those who do not read, so that each meets the limits of a connection
	honest := floodSize(20, 500)
	perSecond := floodSize(800, 2_000)
	size := floodSize(1_000, 250) // bytes of a message: in the long form a favourite gets over 64 KiB of those, too
	alone := time.Duration(floodSize(1, 10)) * time.Second
	lasts := time.Duration(floodSize(3, 40)) * time.Second
	s := newFloodVictim(t)
	s.serve()
	c := newCrowd(s)
	people := c.join("honest", honest, 0)
	read(people)
	deaf := c.join("deaf", stopped, stoppedReceiveBytes)

	// As many messages a second as later, so that the same disk is used.
	quiet := c.phase(alone, func(ctx context.Context, talk *sync.WaitGroup) {
		talk.Go(func() { c.chat(ctx, people[:honest/2], people, perSecond, size, true) })
	})
	g := s.watched()
	var middle int64
	var kernel kernelQueues
	var towards int
	flooded := c.phase(lasts, func(ctx context.Context, talk *sync.WaitGroup) {
		talk.Go(func() { c.chat(ctx, people[:honest/2], people, perSecond/2, size, true) })
		talk.Go(func() { towards = c.chat(ctx, people[honest/2:honest*3/4], deaf, perSecond/4, size, false) })
		talk.Go(func() { c.chat(ctx, people[honest*3/4:], deaf[:favourites], perSecond/4, size, false) })
		talk.Go(func() {
			half := time.NewTimer(lasts / 2)
			defer half.Stop()
			select {
			case <-half.C:
				middle = g.now()
			case <-ctx.Done():
			}
		})
	})
	end := g.now()
	kernel = s.kernelQueues()
	values := scrape(t, s.admin())
	waiting := c.check.Outstanding()

	begun := time.Now()
	for _, m := range deaf {
		m.rejoin = true
	}
	read(deaf)
	v := c.judge()
	took := time.Since(begun)
	g.stop()
	before, during := quantile(quiet, .99), quantile(flooded, .99)
	t.Logf("%d stopped reading for %v, %d messages to each of them and as many to %d of them: %d waited", stopped, lasts, towards/stopped, favourites, waiting)
	t.Logf("VmRSS %.1f MiB before, %.1f in the middle, %.1f at the end, %.1f when they had read; %s", mib(g.first), mib(middle), mib(end), mib(residentNow(s.pid())), g)
	t.Logf("of these at the end %.1f MiB for tables and cache of the database, so %.1f for all else; kernel: %s",
		mib(database(values)), mib(end-database(values)), kernel)
	t.Logf("honest p99: %v alone (%d messages), %v with them (%d): ratio %.2f", before, len(quiet), during, len(flooded), during.Seconds()/before.Seconds())
	t.Logf("read again: all there in %.1f s; %d came twice and were known; refused pushes %.0f, closed as slow %.0f, for silence %.0f",
		took.Seconds(), c.repeated.Load(), values[`millrace_edge_drops_total{reason="push_refused"}`],
		values[`millrace_edge_closes_total{reason="slow"}`], values[`millrace_edge_closes_total{reason="heartbeat"}`])
	t.Log(v)
	if waiting == 0 {
		t.Error("they have read all the time")
	}
	if end-middle > stoppedGrowth {
		t.Errorf("VmRSS grew by %.1f MiB in the second half", mib(end-middle))
	}
	if kernel.largest > stoppedKernelBytes {
		t.Errorf("the kernel holds %d B for one connection", kernel.largest)
	}
	s.wantServing()
}

// database is what the database says that it keeps in memory.
func database(values map[string]float64) int64 {
	return int64(values["millrace_embedded_memtable_bytes"] + values["millrace_embedded_cache_bytes"])
}

// phase lets talk for a while and returns how long messages took.
func (c *crowd) phase(lasts time.Duration, begin func(ctx context.Context, talk *sync.WaitGroup)) []time.Duration {
	ctx, stop := context.WithTimeout(c.t.Context(), lasts)
	defer stop()
	var talk sync.WaitGroup
	begin(ctx, &talk)
	talk.Wait()
	return c.take()
}

// kernelQueues is what the kernel holds for those who do not read.
type kernelQueues struct {
	connections, largest, total int64
}

func (k kernelQueues) String() string {
	return fmt.Sprintf("%d connections with bytes that were not acknowledged, at most %d B, together %.1f MiB", k.connections, k.largest, mib(k.total))
}

// kernelQueues reads the send queues of the server's connections.
func (s *victim) kernelQueues() (k kernelQueues) {
	s.t.Helper()
	table, err := os.Open("/proc/net/tcp")
	if err != nil {
		s.t.Fatal(err)
	}
	defer table.Close()
	local := fmt.Sprintf(":%04X", netip.MustParseAddrPort(s.addr).Port())
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		fields := strings.Fields(lines.Text()) // sl, local, remote, state, tx:rx
		if len(fields) < 5 || !strings.HasSuffix(fields[1], local) || fields[3] != "01" {
			continue
		}
		queue, _, _ := strings.Cut(fields[4], ":")
		n, err := strconv.ParseInt(queue, 16, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		if n > 0 {
			k.connections++
			k.largest = max(k.largest, n)
			k.total += n
		}
	}
	if err := lines.Err(); err != nil {
		s.t.Fatal(err)
	}
	return k
}
