package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"millrace/loadtest/checker"
	"millrace/protocol/client"
)

var kills = flag.Int("kills", 2*len(crashPoints), "how many times TestKill kills the server; every other time at a crash point")

const (
	killPatience   = 60 * time.Second       // for what must come; only a test that fails waits it out
	killSending    = 32                     // sends a client keeps on their way
	killSendPause  = 2 * time.Millisecond   // a steady rate rather than as fast as the disk
	killRandom     = "random"               // a kill that no crash point made
	killLogLines   = 40                     // of a server that failed
	killAway       = 300 * time.Millisecond // at most, for who comes and goes
	killReconnects = 200 * time.Millisecond // the longest backoff

	// Ports below those that the kernel gives to outgoing connections: else a client could be given the server's port while the
	// server is down, and talk to itself.
	killFirstPort = 10_000
	killPorts     = 20_000
)

// crashPoints are the places at which a binary with the tag crashpoints kills itself, each with the highest passing at
// which it is tried: one that a busy server soon reaches.
var crashPoints = []struct {
	name string
	most int
}{
	{"after_parse", 40}, {"before_append", 20}, {"after_append_before_sync", 20}, {"after_sync_before_answer", 20}, {"after_push", 20},
	{"before_mailbox_write", 20}, {"after_mailbox_write", 20}, {"before_finish", 20}, {"after_finish_before_trim", 20},
}

// TestKill is P1–P5, P7 and P8 of the real binary: it is killed again and again, at random and at each crash point, while clients send
// without a pause and one of them comes and goes, until every answered message has been shown exactly once on every device
// of its addressee and its sender has been told. -kills says how often; the crash points take turns, from a random one on.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	s := newVictim(t, dir, "crashpoints")
	t.Cleanup(s.kill)
	if early := s.start(""); early {
		t.Fatalf("the server did not start:\n%s", s.log())
	}
	check := checker.New(checker.Config{Acknowledgements: true, Receipts: true})
	people := []*person{
		{user: "alice", device: "phone"},
		{user: "alice", device: "laptop", encoding: client.JSON},
		{user: "bob", device: "phone", encoding: client.JSON},
		{user: "carol", device: "phone", forgetful: true},
		{user: "dave", device: "phone", encoding: client.JSON, restless: true},
		{user: "erin", device: "phone"},
	}
	for i, p := range people {
		p.t, p.check, p.server, p.dir = t, check, s, dir
		if err := p.join(uint64(i + 1)); err != nil {
			t.Fatalf("%s's %s: %v", p.user, p.device, err)
		}
		t.Cleanup(p.leave)
	}

	sending, stop := context.WithCancel(t.Context())
	var busy sync.WaitGroup
	defer func() { // also when the test gives up: what runs uses what is cleaned up
		stop()
		busy.Wait()
	}()
	for _, p := range people {
		busy.Go(func() { p.send(sending, people) })
		if p.restless {
			busy.Go(func() { p.comeAndGo(sending) })
		}
	}
	at := killAgainAndAgain(t, s, *kills)
	stop()
	busy.Wait()

	// The last server lives until everything has arrived.
	v := settle(t, check)
	for _, p := range people {
		if err := p.client.Err(); err != nil {
			t.Errorf("%s's %s: %v", p.user, p.device, err)
		}
		if waiting, err := p.client.Unsent(t.Context()); err != nil || len(waiting) > 0 {
			t.Errorf("%s's %s: %d sends without an answer, %v", p.user, p.device, len(waiting), err)
		}
	}
	for _, where := range slices.Sorted(maps.Keys(at)) {
		t.Logf("%3d kills: %s", at[where], where)
	}
	for _, point := range crashPoints {
		if *kills >= 2*len(crashPoints) && at[point.name] == 0 {
			t.Errorf("crash point %s was never tried", point.name)
		}
	}
	wantNoViolations(t, s.admin())
	t.Logf("%d kills in all; %d answered, %d shown; %s", *kills, v.Answered, v.Shown, v)
	if !v.OK() || v.Open > 0 || v.Answered == 0 {
		t.Errorf("%d sends are open; %s\nthe last server said:\n%s", v.Open, v, s.log())
	}
}

// killAgainAndAgain ends the lives of the server, by turns at random and at a crash point, and leaves one that runs. It counts the
// kills by where they hit.
func killAgainAndAgain(t *testing.T, s *victim, times int) map[string]int {
	t.Helper()
	at := map[string]int{}
	turn := rand.IntN(len(crashPoints))
	serving := true // the server that the clients have joined
	for n := range times {
		where, crash := killRandom, ""
		if n%2 == 1 {
			point := crashPoints[turn%len(crashPoints)]
			turn++
			where, crash = point.name, fmt.Sprintf("%s:%d", point.name, 1+rand.IntN(point.most))
		}
		early := false
		if !serving {
			early = s.start(crash)
		}
		serving = false
		switch {
		case early && crash == "":
			t.Fatalf("kill %d: the server did not start:\n%s", n, s.log())
		case early: // killed while it read what its predecessor left
		case crash == "":
			s.liveFor(time.Duration(50+rand.IntN(250)) * time.Millisecond)
			wantNoViolations(t, s.admin())
			s.kill()
		default:
			s.liveFor(killPatience)
			if s.running() {
				t.Errorf("kill %d: crash point %s was not reached", n, crash)
				s.kill()
			}
		}
		// A panic, a fatal error or an exit is no kill.
		if status := s.waitStatus(); !status.Signaled() || status.Signal() != syscall.SIGKILL {
			t.Fatalf("kill %d (%s): the server ended by itself: %v\n%s", n, where, s.process.ProcessState, s.log())
		}
		at[where]++
	}
	if !serving && s.start("") {
		t.Fatalf("the last server did not start:\n%s", s.log())
	}
	return at
}

// settle waits until nothing is left to be answered, shown or told, and returns the verdict of then.
func settle(t *testing.T, check *checker.Checker) *checker.Verdict {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	patience := time.NewTimer(killPatience)
	defer patience.Stop()
	for {
		v := check.Verdict()
		if v.OK() && v.Open == 0 && check.Outstanding() == 0 {
			return v
		}
		select {
		case <-tick.C:
		case <-patience.C:
			return v
		}
	}
}

// person is one device of a user, and the application on it.
type person struct {
	// Immutable after join.
	user, device string
	encoding     client.Encoding
	forgetful    bool // without a state file
	restless     bool // comes and goes
	t            *testing.T
	check        *checker.Checker
	server       *victim
	dir          string
	id           checker.ClientID
	stream       checker.StreamID

	// presence is held for reading while the client is used, for writing while it is replaced.
	presence sync.RWMutex
	client   *client.Client
	stopShow func() // ends the receiver, and waits for it
}

// join connects for the first time. From then on the device is owed what is sent to its user.
func (p *person) join(epoch uint64) error {
	p.id = p.check.Client(p.user, p.device)
	p.stream = p.check.Stream(p.id, epoch)
	ctx, cancel := context.WithTimeout(p.t.Context(), killPatience)
	defer cancel()
	return p.come(ctx, false)
}

func (p *person) come(ctx context.Context, background bool) error {
	options := client.Options{
		URL: "ws://" + p.server.addr + "/ws", User: p.user, Device: p.device, Encoding: p.encoding, Background: background,
		MinBackoff: killReconnects / 10, MaxBackoff: killReconnects, OnEvent: p.event,
		Token: func(context.Context) (string, error) { return signToken(p.server.config, p.user, time.Hour) },
	}
	if !p.forgetful {
		options.StatePath = filepath.Join(p.dir, p.user+"-"+p.device+".state")
	}
	c, err := client.Dial(ctx, options)
	if err != nil {
		return err
	}
	showing, cancel := context.WithCancel(context.Background())
	var shower sync.WaitGroup
	shower.Go(func() { p.show(showing, c) })
	p.client = c
	p.stopShow = func() { cancel(); shower.Wait() }
	return nil
}

// leave ends the client in an orderly way: what was shown is acknowledged in its state, so it is not shown again.
func (p *person) leave() {
	p.stopShow()
	if err := p.client.Close(); err != nil {
		p.t.Errorf("%s's %s: close: %v", p.user, p.device, err)
	}
}

// comeAndGo is offline now and then, for so long that messages wait in the mailbox.
func (p *person) comeAndGo(ctx context.Context) {
	for pause(ctx, killAway+rand.N(killAway)) {
		p.presence.Lock()
		p.leave()
		pause(ctx, rand.N(killAway))
		err := p.come(context.Background(), true)
		p.presence.Unlock()
		if err != nil {
			p.t.Errorf("%s's %s: come back: %v", p.user, p.device, err)
			return
		}
	}
}

// pause reports whether ctx lasted.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// send gives texts to the outbox, to a random one of the users each. Their numbers are counted here rather than by the client: the
// order of a client is that of its calls of Queue.
func (p *person) send(ctx context.Context, people []*person) {
	slots := make(chan struct{}, killSending)
	for n := uint64(1); ; n++ {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		to := people[rand.IntN(len(people))].user
		p.presence.RLock()
		p.check.Sent(p.stream, n, to)
		pending, err := p.client.Queue(context.Background(), to, checker.Content(p.stream, n, 120))
		p.presence.RUnlock()
		if err != nil {
			p.t.Errorf("%s's %s: queue message %d: %v", p.user, p.device, n, err)
			return
		}
		go func() {
			<-pending.Done() // also when the client is closed, which leaves the send to the next one
			<-slots
		}()
		if !pause(ctx, killSendPause) {
			return
		}
	}
}

// event reports answers and receipts. The next client on a state file reports what the one before left.
func (p *person) event(e client.Event) {
	switch e := e.(type) {
	case client.Answered:
		stream, n, ok := checker.ParseContent(e.Text)
		var refused *client.RefusedError
		switch {
		case !ok || stream != p.stream:
			p.t.Errorf("%s's %s: an answer to %q, which it never sent", p.user, p.device, e.Text)
		case errors.As(e.Err, &refused):
			p.check.Refused(stream, n, refused.Code.String(), true)
			p.t.Errorf("%s's %s: message %d: %v", p.user, p.device, n, e.Err)
		case e.Err == nil:
			p.check.Answered(stream, n, e.Sent.ID, e.Sent.Position)
		}
	case client.Delivered:
		p.check.Receipt(p.id, e.ID, e.Position)
	}
}

// show shows and acknowledges what arrives. It ends between two messages, never between the two calls.
func (p *person) show(ctx context.Context, c *client.Client) {
	for {
		m, err := c.Receive(ctx)
		if err != nil {
			if ctx.Err() == nil {
				p.t.Errorf("%s's %s: receive: %v", p.user, p.device, err)
			}
			return
		}
		p.check.Shown(p.id, m.ID, m.Position, m.Sender, m.Text)
		p.check.Acknowledged(p.id, m.ID)
		if err := c.Acknowledge(context.Background(), m); err != nil {
			p.t.Errorf("%s's %s: acknowledge: %v", p.user, p.device, err)
			return
		}
	}
}

// victim is the real server as a child process, which may be killed and started again. It keeps its address and its data.
type victim struct {
	// Immutable.
	t      testing.TB
	path   string
	config Config
	addr   string
	flags  []string // for serve, besides those of start and after them
	files  int      // descriptors it may have open; 0: as many as this process

	// Of the present life.
	process *exec.Cmd
	exited  chan struct{} // closed when the process has been waited for

	mu        sync.Mutex
	lines     []string // guarded by mu: the last that it said
	adminAddr string   // guarded by mu
}

// newVictim builds the binary, with build tags if tags is not empty; without it there is nothing to test.
func newVictim(t testing.TB, dir, tags string) *victim {
	t.Helper()
	s := &victim{t: t, path: filepath.Join(dir, "millrace"), config: defaultConfig(), addr: freeFixedAddr(t)}
	s.config.Data.Dir = filepath.Join(dir, "data")
	build := exec.CommandContext(t.Context(), "go", "build", "-tags", tags, "-buildvcs=false", "-o", s.path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build with tags %q: %v\n%s", tags, err, out)
	}
	return s
}

// freeFixedAddr is an address that no outgoing connection is given while no server listens on it.
func freeFixedAddr(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", killFirstPort+rand.IntN(killPorts))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatalf("no free port: %v", err)
	return ""
}

// start starts a server that kills itself at crash, if that is not empty. It returns when the server accepts clients, or
// reports that it ended before. One that does neither is killed.
func (s *victim) start(crash string) (early bool) {
	s.t.Helper()
	arguments := append([]string{s.path, "serve", "--edge-addr", s.addr, "--admin-addr", "127.0.0.1:0", "--edge-message-rate", "0",
		"--edge-user-logins", "0", "--data-dir", s.config.Data.Dir, "--log-format", "text"}, s.flags...)
	if s.files > 0 {
		arguments = append([]string{"sh", "-c", `ulimit -n "$0" && exec "$@"`, strconv.Itoa(s.files)}, arguments...)
	}
	s.process = exec.Command(arguments[0], arguments[1:]...)
	s.process.Env = append(os.Environ(), "MILLRACE_CRASH="+crash)
	said, err := s.process.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.exited = make(chan struct{})
	s.mu.Lock()
	s.lines = nil
	s.mu.Unlock()
	serving := make(chan struct{})
	go s.watch(s.process, bufio.NewScanner(said), serving, s.exited)
	patience := time.NewTimer(killPatience)
	defer patience.Stop()
	select {
	case <-serving:
		return false
	case <-s.exited:
		return true
	case <-patience.C:
		s.kill()
		s.t.Fatalf("the server neither serves nor ends:\n%s", s.log())
		return true
	}
}

// watch reads what a server says, as a full pipe would stop it, and waits for its end.
func (s *victim) watch(process *exec.Cmd, said *bufio.Scanner, serving, exited chan struct{}) {
	for said.Scan() {
		line := said.Text()
		s.mu.Lock()
		if s.lines = append(s.lines, line); len(s.lines) > killLogLines {
			s.lines = slices.Delete(s.lines, 0, 1)
		}
		s.mu.Unlock()
		if serving != nil && strings.Contains(line, "msg=serving") {
			_, rest, _ := strings.Cut(line, " admin=")
			addr, _, _ := strings.Cut(rest, " ")
			s.mu.Lock()
			s.adminAddr = addr
			s.mu.Unlock()
			close(serving)
			serving = nil
		}
	}
	_ = process.Wait() // its status is looked at by who waits for exited
	close(exited)
}

// liveFor waits for the server to end, for d at most.
func (s *victim) liveFor(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-s.exited:
	case <-timer.C:
	}
}

func (s *victim) running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

// kill kills the server, if it runs, and waits for its end.
func (s *victim) kill() {
	if s.exited == nil {
		return
	}
	_ = s.process.Process.Kill() // it may have ended meanwhile
	<-s.exited
}

// waitStatus is how the server ended.
func (s *victim) waitStatus() syscall.WaitStatus {
	<-s.exited
	status, _ := s.process.ProcessState.Sys().(syscall.WaitStatus)
	return status
}

// admin is the admin address of the server that was last heard to serve.
func (s *victim) admin() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.adminAddr
}

func (s *victim) log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.lines, "\n")
}
