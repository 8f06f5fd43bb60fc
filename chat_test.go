package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/protocol/client"
	"millrace/protocol/token"
)

// chatPatience is how long one line may take; it is only ever waited out by a test that fails.
const chatPatience = 20 * time.Second

// testChat is a chat whose input is a pipe and whose output is read line by line.
type testChat struct {
	t      *testing.T
	config chatConfig
	cancel context.CancelFunc
	input  *io.PipeWriter
	ended  chan error

	mu    sync.Mutex
	cond  *sync.Cond
	lines []string
	read  int // lines that expect has passed
}

func chatConfigOf(s *walkServer, user string, dir string) chatConfig {
	return chatConfig{
		URL: endpoint(s.EdgeAddr()), User: user, Device: "terminal",
		Token:     client.StaticToken(string(s.token(user))),
		StateFile: filepath.Join(dir, user+".state"),
	}
}

func openChat(t *testing.T, config chatConfig) *testChat {
	t.Helper()
	c := &testChat{t: t, config: config, ended: make(chan error, 1)}
	c.cond = sync.NewCond(&c.mu)
	in, input := io.Pipe()
	out, output := io.Pipe()
	c.input = input
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go func() {
		err := runChat(ctx, config, in, output)
		_ = output.Close()
		c.ended <- err
	}()
	go func() {
		for r := bufio.NewScanner(out); r.Scan(); {
			c.mu.Lock()
			c.lines = append(c.lines, r.Text())
			c.cond.Broadcast()
			c.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		_ = input.Close()
	})
	return c
}

func (c *testChat) enter(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.input, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

var clock = regexp.MustCompile(`^\d\d:\d\d `)

// expect waits for a line that, without its time, has this prefix; lines before it are passed over.
func (c *testChat) expect(prefix string) string {
	c.t.Helper()
	timeout := time.AfterFunc(chatPatience, func() { c.cond.Broadcast() })
	defer timeout.Stop()
	deadline := time.Now().Add(chatPatience)
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		for c.read < len(c.lines) {
			line := clock.ReplaceAllString(c.lines[c.read], "")
			c.read++
			if strings.HasPrefix(line, prefix) {
				return line
			}
		}
		if !time.Now().Before(deadline) {
			c.t.Fatalf("%s never saw %q in\n%s", c.config.User, prefix, strings.Join(c.lines, "\n"))
		}
		c.cond.Wait()
	}
}

func (c *testChat) count(part string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, line := range c.lines {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}

// end closes the input and waits for the chat to leave.
func (c *testChat) end() error {
	c.t.Helper()
	_ = c.input.Close()
	select {
	case err := <-c.ended:
		return err
	case <-time.After(chatLeave + chatPatience):
		c.t.Fatal("the chat did not leave")
		return nil
	}
}

func TestChatOfTwoPeople(t *testing.T) {
	s := startWalk(t)
	dir := t.TempDir()
	alice, bob := openChat(t, chatConfigOf(s, "alice", dir)), openChat(t, chatConfigOf(s, "bob", dir))
	alice.expect("* connected")
	bob.expect("* connected")
	alice.enter("hi")
	alice.expect("* Not sent: nobody to talk to yet")
	alice.enter("/to bo b")
	alice.expect(`* "bo b" is not a user id`)
	alice.enter("/to bob")
	alice.expect("* Talking to bob")
	alice.enter("  hello ")
	bob.expect("   alice: hello")
	alice.expect("✓  to bob: hello")
	alice.expect("✓✓ to bob: hello")
	bob.expect("* Talking to alice") // chosen by her message
	bob.enter("//slash \x1b[31mred\u202e")
	alice.expect(`   bob: /slash \x1b[31mred\u202e`)
	bob.expect("✓✓ to alice")
	bob.enter(strings.Repeat("x", 1001))
	bob.expect("* Not sent: the message is too long (1001 characters, 1001 bytes; at most 1000 and 4000).")
	bob.enter(strings.Repeat("x", maxChatLine+1))
	bob.expect("* Not sent: the line is too long.")
	bob.enter("\xff")
	bob.expect("* Not sent: the message is not valid UTF-8.")
	bob.enter("/nonsense")
	bob.expect("* There is no /nonsense")
	bob.enter("/help")
	bob.expect("* /to USER")
	bob.enter("/quit")
	if err := bob.end(); err == nil || err.Error() != "not sent: 3 of the lines" {
		t.Fatalf("bob's chat ended with %v", err)
	}
	if err := alice.end(); err == nil || err.Error() != "not sent: 1 of the lines" {
		t.Fatalf("alice's chat ended with %v", err)
	}
}

func TestChatSurvivesARestartOfTheServer(t *testing.T) {
	s := startWalk(t)
	dir := t.TempDir()
	config := chatConfigOf(s, "alice", dir)
	config.With = "bob"
	alice, bob := openChat(t, config), openChat(t, chatConfigOf(s, "bob", dir))
	alice.expect("* connected")
	bob.expect("* connected")
	alice.enter("before")
	alice.expect("✓✓ to bob: before")
	addr := s.EdgeAddr()
	s.stop()
	alice.expect("* disconnected")
	alice.enter("while it is away")
	bob.expect("* disconnected")
	s.cfg.Edge.Addr = addr
	s.start()
	alice.expect("* connected")
	bob.expect("   alice: while it is away")
	alice.expect("✓✓ to bob: while it is away")
	if n := bob.count("alice: before"); n != 1 {
		t.Fatalf("bob saw the first message %d times", n)
	}
}

// TestChatKeepsWhatIsUnsent: a pipe that ends without a server leaves its lines to the next chat.
func TestChatKeepsWhatIsUnsent(t *testing.T) {
	s := startWalk(t)
	dir := t.TempDir()
	config := chatConfigOf(s, "alice", dir)
	config.With = "bob"
	addr := s.EdgeAddr()
	s.stop()
	alice := openChat(t, config)
	alice.expect("* disconnected (no server answers there), retrying in ")
	alice.enter("one")
	alice.enter("two")
	alice.enter("") // read: the two before are in the outbox
	alice.cancel()  // Ctrl-C
	if err := alice.end(); err != nil {
		t.Fatalf("ctrl-c: %v", err)
	}
	s.cfg.Edge.Addr = addr
	s.start()
	alice = openChat(t, config)
	alice.expect("* 2 messages from last time will be sent first.")
	alice.expect("✓  to bob: one")
	alice.expect("✓  to bob: two")
	if err := alice.end(); err != nil {
		t.Fatal(err)
	}
	bob := openChat(t, chatConfigOf(s, "bob", dir))
	bob.expect("   alice: one")
	bob.expect("   alice: two")
	if err := bob.end(); err != nil {
		t.Fatal(err)
	}
	alice = openChat(t, config)
	alice.expect("* bob has received what you had sent by ")
}

func TestChatOfAPipeWaitsForItsAnswers(t *testing.T) {
	s := startWalk(t)
	config := chatConfigOf(s, "alice", t.TempDir())
	config.With, config.JSON = "bob", true
	var in, out strings.Builder
	const n = 300
	for i := range n {
		fmt.Fprintf(&in, "line %d\n", i)
	}
	if err := runChat(t.Context(), config, strings.NewReader(strings.TrimSuffix(in.String(), "\n")), &out); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if !strings.Contains(out.String(), fmt.Sprintf("✓  to bob: line %d\n", i)) {
			t.Fatalf("line %d has no tick in\n%s", i, out.String())
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Fatal("colours in a pipe")
	}
}

func TestChatErrorsSayWhatToDo(t *testing.T) {
	s := startWalk(t)
	dir := t.TempDir()
	config := chatConfigOf(s, "alice", dir)
	first := openChat(t, config)
	first.expect("* connected")
	if err := runChat(t.Context(), config, strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), "another chat is running as alice") {
		t.Fatalf("the same state twice: %v", err)
	}
	config.StateFile = filepath.Join(dir, "other.state")
	second := openChat(t, config)
	second.expect("* connected")
	select {
	case err := <-first.ended:
		if err == nil || !strings.Contains(err.Error(), "give each its own --device") {
			t.Fatalf("replaced: %v", err)
		}
	case <-time.After(chatPatience):
		t.Fatal("the older chat did not end")
	}
	config.StateFile = filepath.Join(dir, "damaged.state")
	if err := os.WriteFile(config.StateFile, []byte("this was never the state of a chat"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := runChat(t.Context(), config, strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), "Move the file away") {
		t.Fatalf("a damaged state: %v", err)
	}
}

// TestChatTokens: a token that can never become good ends the chat, and the error names where it came from and not the token.
func TestChatTokens(t *testing.T) {
	s := startWalk(t)
	dir := t.TempDir()
	secret, err := readSecret(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	expired, err := token.SignHS256(secret, "alice", time.Now().Add(-2*time.Hour), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct{ token, from, want string }{
		{"nonsense", "", "refused the token of alice"},
		{"nonsense", "--token", "refused the token in --token: "},
		{string(s.token("bob")), tokenVariable, "the token in MILLRACE_TOKEN does not say alice: "},
		{expired, tokenVariable, "the token in MILLRACE_TOKEN has expired"},
	} {
		config := chatConfigOf(s, "alice", dir)
		config.StateFile = filepath.Join(dir, fmt.Sprint(i))
		config.Token, config.TokenFrom, config.TokenOnce, config.With = client.StaticToken(c.token), c.from, true, "bob"
		chat := openChat(t, config)
		select {
		case err := <-chat.ended:
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), c.token) {
				t.Errorf("%v, want %q", err, c.want)
			}
		case <-time.After(chatPatience):
			t.Errorf("the chat goes on; want %q", c.want)
		}
	}
}

// TestChatCommandTokens runs the command with each source of a token, in a directory that holds no secret, and looks where the token
// must not be.
func TestChatCommandTokens(t *testing.T) {
	s := startWalk(t)
	good := string(s.token("alice"))
	file := writeFile(t, "alice.token", good+"\n")
	for i, c := range []struct {
		environ []string
		args    []string
		code    int
		want    string // in the error
	}{
		{nil, []string{"--token", good}, exitOK, ""},
		{nil, []string{"--token-file", file}, exitOK, ""},
		{[]string{"MILLRACE_TOKEN=" + good}, nil, exitOK, ""},
		{[]string{"MILLRACE_TOKEN=" + string(s.token("bob"))}, []string{"--token", good}, exitOK, ""},
		{[]string{"MILLRACE_TOKEN=" + string(s.token("bob"))}, []string{"--token-file", file}, exitOK, ""},
		{[]string{"MILLRACE_TOKEN=" + string(s.token("bob"))}, nil, exitFailure, "the token in MILLRACE_TOKEN does not say alice"},
		{[]string{"MILLRACE_TOKEN="}, nil, exitFailure, "get a token: no secret at"},
		{nil, []string{"--token", good, "--token-file", file}, exitUsage, "can't be used together"},
		{nil, []string{"--token-file", "/nowhere/token"}, exitFailure, "/nowhere/token"},
		{nil, []string{"--token", good, "--url", "http://127.0.0.1/ws"}, exitUsage, "--url"},
		{nil, []string{"--token", good, "--device", "a b"}, exitUsage, "--device"},
	} {
		state := filepath.Join(t.TempDir(), "state")
		args := append([]string{"chat", "--as", "alice", "--with", "bob", "--data-dir", t.TempDir(), "--state-file", state}, c.args...)
		if !slices.Contains(args, "--url") {
			args = append(args, "--url", endpoint(s.EdgeAddr()))
		}
		var stdout, stderr bytes.Buffer
		code := run(args, &program{name: "millrace", in: strings.NewReader("hello\n"), out: &stdout, err: &stderr, environ: c.environ})
		if code != c.code || !strings.Contains(stderr.String(), c.want) || code == exitOK && !strings.Contains(stdout.String(), "✓  to bob: hello") {
			t.Errorf("case %d: code %d, output %q, error %q; want %d, %q", i, code, stdout.String(), stderr.String(), c.code, c.want)
		}
		kept, _ := os.ReadFile(state) // some cases end before there is one
		if said := stdout.String() + stderr.String() + string(kept); strings.Contains(said, good) {
			t.Errorf("case %d: the token is in %q", i, said)
		}
	}
	for _, args := range [][]string{{"chat", "--help"}, {"config", "show"}, {"help"}} {
		if code, out, problem := commandIn([]string{"MILLRACE_TOKEN=" + good}, args...); code != exitOK || problem != "" || strings.Contains(out, good) {
			t.Errorf("%v: code %d, error %q, output\n%s", args, code, problem, out)
		}
	}
}

func TestChatStatePath(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_STATE_HOME", dir)
	paths := map[string]bool{}
	for _, c := range []chatConfig{
		{URL: "ws://127.0.0.1:8080/ws", User: "alice", Device: "terminal"},
		{URL: "ws://127.0.0.1:9090/ws", User: "alice", Device: "terminal"},
		{URL: "ws://[::1]:8080/ws", User: "alice", Device: "terminal"},
		{URL: "ws://127.0.0.1:8080/ws", User: "a-b", Device: "c"},
		{URL: "ws://127.0.0.1:8080/ws", User: "a", Device: "b-c"},
	} {
		path, err := c.statePath()
		if err != nil {
			t.Fatal(err)
		}
		if paths[path] || !strings.HasPrefix(path, dir) || strings.ContainsAny(filepath.Base(filepath.Dir(path)), ":[]") {
			t.Errorf("%+v: %s", c, path)
		}
		paths[path] = true
		if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("folder of %s: %v, %v", path, info, err)
		}
	}
	t.Setenv("XDG_STATE_HOME", "relative")
	t.Setenv("HOME", dir)
	c := chatConfig{URL: "ws://x/ws", User: "a", Device: "b"}
	if path, err := c.statePath(); err != nil || path != filepath.Join(dir, ".local", "state", "millrace", "x", "chat-a+b.state") {
		t.Errorf("%s, %v", path, err)
	}
}
