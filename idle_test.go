package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

// settleAfter is how long the server is left alone before its memory is read: the definition of DESIGN.md §8,
// VmRSS less VmRSS with no connection, 60 s after the ramp, no forced release.
const settleAfter = 60 * time.Second

// BenchmarkIdleConnection reports the process memory of one idle connection that is authenticated and routed.
// The server is the real binary in a process of its own; heartbeats go on.
func BenchmarkIdleConnection(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) { weighIdle(b, n, nil) })
	}
}

// BenchmarkIdleTLSConnection is the same over TLS.
func BenchmarkIdleTLSConnection(b *testing.B) {
	const n = 5_000
	b.Run(strconv.Itoa(n), func(b *testing.B) { weighIdle(b, n, newPair(b, b.TempDir(), nextDay())) })
}

func weighIdle(b *testing.B, n int, pair *testPair) {
	server := newVictim(b, b.TempDir(), "")
	if pair != nil {
		server.flags = []string{"--edge-tls-cert", pair.cert, "--edge-tls-key", pair.key}
	}
	b.Cleanup(server.kill)
	if early := server.start(""); early {
		b.Fatalf("the server did not start:\n%s", server.log())
	}
	before := residentBytes(b, server.process.Process.Pid)
	for i := range n {
		hold(b, server, pair, fmt.Sprintf("user-%06d", i))
	}
	time.Sleep(settleAfter) // part of the definition: heartbeats and collections go on meanwhile
	after := residentBytes(b, server.process.Process.Pid)
	b.ReportMetric(float64(after-before)/float64(n), "B/connection")
	b.ReportMetric(float64(before)/1e6, "MB-empty")
	b.ReportMetric(0, "ns/op")
}

func residentBytes(tb testing.TB, pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if kib, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.Fields(kib)[0], 10, 64)
			if err != nil {
				tb.Fatal(err)
			}
			return n << 10
		}
	}
	tb.Fatal("no VmRSS")
	return 0
}

// hold opens a connection, waits for connected, and answers pings until the benchmark ends.
func hold(tb testing.TB, s *victim, pair *testPair, user string) {
	signed, err := signToken(s.config, user, time.Hour)
	if err != nil {
		tb.Fatal(err)
	}
	d, url := ws.Dialer{Protocols: []string{protocol.SubprotocolBinary}, Timeout: 10 * time.Second}, "ws://"+s.addr+"/ws"
	if pair != nil {
		url = "wss://" + s.addr + "/ws"
		d.TLSConfig = &tls.Config{RootCAs: pair.roots, ServerName: "localhost"}
	}
	conn, reader, _, err := d.Dial(tb.Context(), url)
	if err != nil {
		tb.Fatal(err)
	}
	if reader != nil {
		ws.PutReader(reader)
	}
	tb.Cleanup(func() { conn.Close() })
	f := protocol.Frame{Kind: protocol.KindConnect, Token: []byte(signed), Device: []byte(protocol.DefaultDevice)}
	if err := wsutil.WriteClientBinary(conn, protocol.AppendBinary(nil, &f)); err != nil {
		tb.Fatal(err)
	}
	data, err := wsutil.ReadServerBinary(conn)
	if err != nil {
		tb.Fatal(err)
	}
	if _, bad := protocol.ParseBinary(data, &f); bad != nil || f.Kind != protocol.KindConnected {
		tb.Fatalf("got kind %#x (%v), want connected", f.Kind, bad)
	}
	go func() {
		for {
			if _, err := wsutil.ReadServerBinary(conn); err != nil { // answers pings as well
				return
			}
		}
	}()
}
