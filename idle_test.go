package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			server := startBinary(b)
			defer server.stop()
			before := server.residentBytes(b)
			tokens := server.config
			for i := range n {
				server.hold(b, tokens, fmt.Sprintf("user-%06d", i))
			}
			time.Sleep(settleAfter) // part of the definition: heartbeats and collections go on meanwhile
			after := server.residentBytes(b)
			b.ReportMetric(float64(after-before)/float64(n), "B/connection")
			b.ReportMetric(float64(before)/1e6, "MB-empty")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// binary is the real server as a child process.
type binary struct {
	process *exec.Cmd
	edge    string
	config  Config
	conns   []net.Conn
}

func startBinary(tb testing.TB) *binary {
	dir := tb.TempDir()
	path := filepath.Join(dir, "millrace")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		tb.Fatalf("build: %v\n%s", err, out)
	}
	s := &binary{config: defaultConfig()}
	s.config.Data.Dir = filepath.Join(dir, "data")
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel) // kills the child whatever happens
	s.process = exec.CommandContext(ctx, path, "serve", "--edge-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0",
		"--data-dir", s.config.Data.Dir, "--log-format", "text")
	out, err := s.process.StderrPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := s.process.Start(); err != nil {
		tb.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for s.edge == "" && lines.Scan() {
		if _, rest, ok := strings.Cut(lines.Text(), "edge="); ok {
			s.edge, _, _ = strings.Cut(rest, " ")
		}
	}
	if s.edge == "" {
		tb.Fatal("the server did not say where it listens")
	}
	go func() {
		for lines.Scan() { // a full pipe would stop the server
			continue
		}
	}()
	return s
}

func (s *binary) stop() {
	for _, c := range s.conns {
		c.Close()
	}
	_ = s.process.Process.Kill()
	_ = s.process.Wait()
}

func (s *binary) residentBytes(tb testing.TB) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.process.Process.Pid))
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

// hold opens a connection, waits for connected, and answers pings until it is closed.
func (s *binary) hold(tb testing.TB, c Config, user string) {
	signed, err := signToken(c, user, time.Hour)
	if err != nil {
		tb.Fatal(err)
	}
	conn, reader, _, err := ws.Dialer{Protocols: []string{protocol.SubprotocolBinary}, Timeout: 10 * time.Second}.Dial(tb.Context(), "ws://"+s.edge+"/ws")
	if err != nil {
		tb.Fatal(err)
	}
	if reader != nil {
		ws.PutReader(reader)
	}
	s.conns = append(s.conns, conn)
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
