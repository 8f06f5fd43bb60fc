package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/loadtest/checker"
	"millrace/protocol/client"
)

var kills = flag.Int("kills", 6, "how many times TestKill kills the server")

// crashPoints are the places at which a binary with the tag crashpoints kills itself.
var crashPoints = []string{"after_parse", "before_append", "after_append_before_sync", "after_sync_before_answer", "after_push",
	"before_mailbox_write", "after_mailbox_write", "before_finish", "after_finish_before_trim"}

// TestKill is P1–P5 and P8 of the real binary: it is killed again and again, at random and at each crash point, while clients send
// without a pause, until every answered message has been shown exactly once on its addressee's device.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "millrace")
	build := exec.Command("go", "build", "-tags", "crashpoints", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	s := &victim{t: t, path: path, config: defaultConfig(), addr: "127.0.0.1:0"}
	s.config.Data.Dir = filepath.Join(dir, "data")
	s.start("")
	t.Cleanup(func() { s.kill() })

	check := checker.New(checker.Config{})
	users := []string{"alice", "bob", "carol", "dave"}
	var people []*person
	for i, user := range users {
		p := &person{check: check, user: user, others: users}
		p.id = check.Client(user, "phone")
		p.stream = check.Stream(p.id, 1)
		options := client.Options{URL: "ws://" + s.addr + "/ws", User: user, Device: "phone", Background: true,
			StatePath: filepath.Join(dir, user+".state"), MinBackoff: 20 * time.Millisecond, MaxBackoff: 200 * time.Millisecond,
			Token: func(context.Context) (string, error) { return signToken(s.config, user, time.Hour) }, OnEvent: p.event}
		if i%2 == 1 {
			options.Encoding = client.JSON
		}
		var err error
		if p.client, err = client.Dial(t.Context(), options); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.client.Close() })
		people = append(people, p)
	}
	sending, stop := context.WithCancel(t.Context())
	receiving, end := context.WithCancel(t.Context())
	var senders, receivers sync.WaitGroup
	for _, p := range people {
		senders.Go(func() { p.send(sending) })
		receivers.Go(func() { p.receive(receiving) })
	}
	at := map[string]int{}
	for n := range *kills {
		point := ""
		if n%2 == 1 {
			point = crashPoints[n/2%len(crashPoints)]
		}
		at[s.next(point)]++
	}
	stop()
	senders.Wait()
	deadline := time.Now().Add(60 * time.Second)
	for _, p := range people {
		ctx, cancel := context.WithDeadline(t.Context(), deadline)
		if err := p.client.Drain(ctx); err != nil {
			t.Errorf("%s: %d sends are still open: %v", p.user, p.open(), err)
		}
		cancel()
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	// An answer is reported after Drain may have returned.
	for (check.Verdict().Open > 0 || check.Outstanding() > 0) && time.Now().Before(deadline) {
		<-tick.C
	}
	end()
	receivers.Wait()
	v := check.Verdict()
	t.Logf("killed %v\n%s", at, v)
	if !v.OK() || v.Answered == 0 {
		t.Error(v)
	}
}

// person is one user with one device. What it sends names the send by the client's own number for it.
type person struct {
	check  *checker.Checker
	client *client.Client
	user   string
	others []string
	id     checker.ClientID
	stream checker.StreamID
}

func (p *person) open() int {
	list, _ := p.client.Unsent(context.Background())
	return len(list)
}

// send keeps at most 32 messages on their way. The number in the text is counted here: a stream's order is the order of Queue.
func (p *person) send(ctx context.Context) {
	slots := make(chan struct{}, 32)
	for n := uint64(1); ctx.Err() == nil; n++ {
		to := p.others[rand.IntN(len(p.others))]
		p.check.Sent(p.stream, n, to)
		pending, err := p.client.Queue(context.Background(), to, checker.Content(p.stream, n, 120))
		if err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		go func() {
			<-pending.Done()
			select {
			case <-slots:
			default:
			}
		}()
		select { // a steady rate rather than as fast as the disk
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

func (p *person) event(e client.Event) {
	if a, ok := e.(client.Answered); ok {
		stream, n, parsed := checker.ParseContent(a.Text)
		if !parsed || a.Err != nil {
			p.check.Refused(p.stream, n, fmt.Sprint(a.Err), true)
			return
		}
		p.check.Answered(stream, n, a.Sent.ID, a.Sent.Position)
	}
}

func (p *person) receive(ctx context.Context) {
	for {
		m, err := p.client.Receive(ctx)
		if err != nil {
			return
		}
		p.check.Shown(p.id, m.ID, m.Position, m.Sender, m.Text)
		if p.client.Acknowledge(ctx, m) != nil {
			return
		}
	}
}

// victim is the server that is killed. It keeps its address and its data.
type victim struct {
	t       *testing.T
	path    string
	config  Config
	addr    string
	process *exec.Cmd
	exited  chan struct{}
}

func (s *victim) start(crash string) {
	s.process = exec.Command(s.path, "serve", "--edge-addr", s.addr, "--admin-addr", "127.0.0.1:0", "--edge-message-rate", "0",
		"--data-dir", s.config.Data.Dir, "--log-format", "text")
	s.process.Env = append(os.Environ(), "MILLRACE_CRASH="+crash)
	out, err := s.process.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	var said []string
	serving := false
	for !serving && lines.Scan() {
		said = append(said, lines.Text())
		if _, rest, ok := strings.Cut(lines.Text(), "edge="); ok {
			s.addr, _, _ = strings.Cut(rest, " ")
			serving = true
		}
	}
	exited := make(chan struct{})
	s.exited = exited
	process := s.process
	go func() {
		for lines.Scan() { // a full pipe would stop the server
			continue
		}
		_ = process.Wait()
		close(exited)
	}()
	if !serving && crash == "" {
		s.t.Fatalf("the server did not start:\n%s", strings.Join(said, "\n"))
	}
}

func (s *victim) kill() {
	_ = s.process.Process.Kill()
	<-s.exited
}

// next lets the present server live for a while, kills it, and starts another: one that kills itself at point, or
// is killed at random. A point that is not reached in time ends at random too.
func (s *victim) next(point string) (where string) {
	where = "random"
	if point != "" {
		s.kill()
		s.start(fmt.Sprintf("%s:%d", point, 1+rand.IntN(40)))
		where = point
	}
	select {
	case <-s.exited:
	case <-time.After(time.Duration(100+rand.IntN(400)) * time.Millisecond):
		if point != "" {
			select {
			case <-s.exited:
			case <-time.After(3 * time.Second):
				where = "random, instead of " + point
			}
		}
	}
	s.kill()
	s.start("")
	return where
}
