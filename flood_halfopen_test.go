//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

// floodPeersVariable makes this binary a process of clients for the address in it.
const floodPeersVariable = "FLOOD_PEERS"

// TestFloodHalfOpen: peers of which nothing is heard any more, not even the end, are found within two heartbeats, and what they held comes
// back: session, route, slot and descriptor. Some are processes that are stopped, whose kernel goes on acknowledging bytes; others, where this may
// be tried, are in a network from which nothing returns.
func TestFloodHalfOpen(t *testing.T) {
	floodTest(t)
	each := floodSize(20, 1_000)
	honest := floodSize(10, 100)
	heartbeat := time.Duration(floodSize(1, protocol.HeartbeatSeconds)) * time.Second
	s := halfOpenServer(t, heartbeat)
	filesBefore := openFiles(s.pid())
	c := newCrowd(s)
	people := c.join("honest", honest, 0)
	read(people)

	stopped := s.peers(t, "stopped", each, s.addr)
	silent, lost := 0, s.silentNetwork(t)
	if lost != nil {
		silent = each
		s.peers(t, "silent", each, lost.addr, "ip", "netns", "exec", lost.name)
	}
	s.wantConnections(honest + each + silent)
	filesFull := openFiles(s.pid())

	begun := time.Now()
	if err := stopped.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if lost != nil {
		lost.fallSilent(t)
	}
	const closed = `millrace_edge_closes_total{reason="heartbeat"}`
	talking, stop := context.WithTimeout(t.Context(), heartbeat/2)
	defer stop()
	c.chat(talking, people, people, 50, 120, true)
	scrapeUntil(t, s.admin(), "half-open sessions", func(v map[string]float64) bool { return v[metricSessions] == float64(honest) })
	found := time.Since(begun)
	values := scrapeUntil(t, s.admin(), "half-open connections", func(v map[string]float64) bool { return v[closed] == float64(each+silent) })
	s.wantConnections(honest)
	gone := time.Since(begun)
	v := c.judge()
	filesAfter := openFiles(s.pid())
	t.Logf("heartbeat %v: %d stopped and %d silenced peers: all sessions closed after %.1f s, all descriptors back after %.1f s (%d before, %d with them, %d after); closed for it: %.0f",
		heartbeat, each, silent, found.Seconds(), gone.Seconds(), filesBefore, filesFull, filesAfter, values[closed])
	t.Log(v)

	// The slots are good for others.
	again := c.join("again", each, 0)
	read(again)
	s.wantConnections(honest + each)
	talking, stop = context.WithTimeout(t.Context(), heartbeat/4)
	defer stop()
	c.chat(talking, again, again, 50, 120, true)
	c.judge()
	if s.process != nil {
		if filesAfter > filesFull-(each+silent)+churnFiles {
			t.Errorf("%d descriptors with the peers, %d without", filesFull, filesAfter)
		}
	}
	s.wantServing()
}

// halfOpenServer is on every address, since the silent network is not this machine's loopback. With a heartbeat of its own it is in this
// process.
func halfOpenServer(t *testing.T, heartbeat time.Duration) *victim {
	t.Helper()
	secret := writeFile(t, "secret", strings.Repeat("s3cret-", 8))
	if heartbeat == protocol.HeartbeatSeconds*time.Second {
		s := newFloodVictim(t)
		_, port, _ := strings.Cut(s.addr, ":")
		s.config.Auth.SecretFile = secret
		s.flags = []string{"--edge-addr", "0.0.0.0:" + port, "--auth-secret-file", secret,
			"--edge-address-connections", "0", "--edge-address-handshakes", "0"} // the silent network has one address
		s.serve()
		return s
	}
	cfg := walkConfig(t, filepath.Join(t.TempDir(), "data"))
	cfg.Edge.Addr, cfg.Edge.HeartbeatSeconds, cfg.Auth.SecretFile = "0.0.0.0:0", int(heartbeat/time.Second), secret
	m, err := start(context.Background(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &victim{t: t, config: cfg, addr: reachable(m.EdgeAddr()), adminAddr: m.AdminAddr()}
}

// pid is the process of the server, which may be this one.
func (s *victim) pid() int {
	if s.process == nil {
		return os.Getpid()
	}
	return s.process.Process.Pid
}

// peers starts a process, by a command if there is one, of n clients of a server, and returns when all are connected.
func (s *victim) peers(t *testing.T, group string, n int, addr string, command ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command = append(command, self)
	process := exec.Command(command[0], command[1:]...)
	process.Env = append(os.Environ(), floodPeersVariable+"="+addr)
	process.Stderr = os.Stderr
	in, err := process.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill() // it may have ended
		_ = process.Wait()         // killed
	})
	for i := range n {
		signed, err := signToken(s.config, fmt.Sprintf("%s-%05d", group, i), time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintln(in, signed); err != nil {
			t.Fatalf("%s peers: %v", group, err)
		}
	}
	if _, err := fmt.Fprintln(in); err != nil {
		t.Fatalf("%s peers: %v", group, err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != fmt.Sprintln(n) {
		t.Fatalf("%s peers: %q, %v", group, line, err)
	}
	return process
}

// floodPeers is the process of clients: it reads their tokens, one a line, connects them, says how many they are, and answers pings until
// its input ends.
func floodPeers(addr string) int {
	tokens := bufio.NewScanner(os.Stdin)
	connected := 0
	for tokens.Scan() && tokens.Text() != "" {
		c, err := connectPeer(addr, tokens.Bytes())
		if err != nil {
			fmt.Fprintln(os.Stderr, "flood peers:", err)
			return 1
		}
		connected++
		go func() {
			for {
				if _, err := c.read(c.pong); err != nil {
					return
				}
			}
		}()
	}
	fmt.Println(connected)
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
	return 0
}

func connectPeer(addr string, token []byte) (*floodConn, error) {
	conn, err := floodDial(context.Background(), addr, netip.Addr{}, 0)
	if err != nil {
		return nil, err
	}
	c, err := floodUpgrade(conn, protocol.SubprotocolBinary)
	if err != nil {
		return nil, err
	}
	if err := wsutil.WriteClientBinary(c, protocol.AppendBinary(nil, &protocol.Frame{Kind: protocol.KindConnect, Token: token})); err != nil {
		return nil, err
	}
	_, err = c.welcome()
	return c, err
}

// silentNetwork is a network namespace that reaches the server until it falls silent.
type silentNetwork struct {
	name string
	addr string // of the server, seen from there
	host string
}

// silentNetworks tells those of this process apart.
var silentNetworks atomic.Int32

// silentNetwork is nil where this process may not make one, which takes root and ip(8).
func (s *victim) silentNetwork(t *testing.T) *silentNetwork {
	t.Helper()
	id := fmt.Sprintf("mrf%d-%d", os.Getpid()%100_000, silentNetworks.Add(1))
	if out, err := exec.Command("ip", "netns", "add", id).CombinedOutput(); err != nil {
		t.Logf("no network namespace here, so no silent network: %v %s", err, out)
		return nil
	}
	if out, err := exec.Command("ip", "link", "add", id, "type", "veth", "peer", "name", "eth0", "netns", id).CombinedOutput(); err != nil {
		t.Logf("no pair of network devices here, so no silent network: %v %s", err, out)
		_ = exec.Command("ip", "netns", "del", id).Run() // nothing is in it
		return nil
	}
	t.Cleanup(func() { // the link by itself: sockets of peers that were killed keep the namespace a while longer
		for _, arguments := range [][]string{{"link", "del", id}, {"netns", "del", id}} {
			if out, err := exec.Command("ip", arguments...).CombinedOutput(); err != nil {
				t.Errorf("ip %s: %v %s", strings.Join(arguments, " "), err, out)
			}
		}
	})
	subnet := os.Getpid() % (1 << 14) // /30s of 198.18.0.0/15, which is for tests of networks
	at := netip.AddrFrom4([4]byte{198, 18 + byte(subnet>>13), byte(subnet >> 6 & 0x7f), byte(subnet<<2) | 1})
	n := &silentNetwork{name: id, host: at.String()}
	for _, arguments := range [][]string{
		{"addr", "add", at.String() + "/30", "dev", id},
		{"link", "set", id, "up"},
		{"-n", id, "addr", "add", at.Next().String() + "/30", "dev", "eth0"},
		{"-n", id, "link", "set", "eth0", "up"},
	} {
		if out, err := exec.Command("ip", arguments...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v %s", strings.Join(arguments, " "), err, out)
		}
	}
	_, port, _ := strings.Cut(s.addr, ":")
	n.addr = n.host + ":" + port
	return n
}

// fallSilent lets nothing out any more: no byte, no acknowledgement, no reset.
func (n *silentNetwork) fallSilent(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("ip", "-n", n.name, "route", "add", "blackhole", n.host+"/32").CombinedOutput(); err != nil {
		t.Fatalf("fall silent: %v %s", err, out)
	}
}
