package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/term"

	"millrace/protocol"
	"millrace/protocol/client"
)

// chatLeave is how long a chat whose input has ended waits for answers; what is still open then is in the state
// file and goes out with the next start.
const chatLeave = 10 * time.Second

// chatConfig is what one terminal chat needs.
type chatConfig struct {
	URL       string
	User      string
	Device    string
	With      string // first peer; empty: /to names one
	Token     client.TokenSource
	StateFile string // empty: chat-USER-DEVICE.state in the user's state directory
	JSON      bool
}

// statePath is where a chat keeps its outbox and what it has shown.
func (c *chatConfig) statePath() (string, error) {
	if c.StateFile != "" {
		return c.StateFile, nil
	}
	dir := os.Getenv("XDG_STATE_HOME")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find the state directory (or give --state-file): %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	dir = filepath.Join(dir, "millrace")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make state directory: %w", err)
	}
	return filepath.Join(dir, fmt.Sprintf("chat-%s-%s.state", c.User, c.Device)), nil
}

// chat is one terminal conversation.
type chat struct {
	client *client.Client
	user   string

	mu    sync.Mutex // guards the following fields
	out   io.Writer
	peer  string
	texts map[string]string // number and peer of a send → its text, until it was delivered
}

// runChat talks until in ends, /quit, or ctx ends. On a terminal the line being typed survives what arrives.
func runChat(ctx context.Context, c chatConfig, in io.Reader, out io.Writer) error {
	path, err := c.statePath()
	if err != nil {
		return err
	}
	lines, out, restore, err := openTerminal(in, out)
	if err != nil {
		return err
	}
	defer restore()
	ch := &chat{user: c.User, out: out, peer: c.With, texts: make(map[string]string)}
	options := client.Options{URL: c.URL, Token: c.Token, User: c.User, Device: c.Device, StatePath: path,
		Background: true, OnEvent: ch.event}
	if c.JSON {
		options.Encoding = client.JSON
	}
	ch.client, err = client.Dial(ctx, options)
	if err != nil {
		return fmt.Errorf("start the client: %w", err)
	}
	defer ch.client.Close()
	ch.say("You are %s. Type a line to send it, /to USER to talk to somebody, /quit to leave.", c.User)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var receiving sync.WaitGroup
	receiving.Go(func() { ch.receive(ctx) })
	err = ch.read(ctx, lines)
	if err == nil {
		leave, done := context.WithTimeout(ctx, chatLeave)
		if ch.client.Drain(leave) != nil {
			ch.say("Some messages are not sent yet; they are kept in %s and go out with the next start.", path)
		}
		done()
	}
	cancel()
	receiving.Wait()
	return err
}

// lineReader gives one line of input at a time.
type lineReader func() (string, error)

// openTerminal prepares in and out: a line editor when both are a terminal, else plain lines.
func openTerminal(in io.Reader, out io.Writer) (lineReader, io.Writer, func(), error) {
	file, ok := in.(*os.File)
	if !ok || !isTerminal(in) || !isTerminal(out) {
		scanner := bufio.NewScanner(in)
		return func() (string, error) {
			if scanner.Scan() {
				return scanner.Text(), nil
			}
			if err := scanner.Err(); err != nil {
				return "", err
			}
			return "", io.EOF
		}, out, func() {}, nil
	}
	old, err := term.MakeRaw(int(file.Fd()))
	if err != nil {
		return nil, nil, nil, fmt.Errorf("prepare terminal: %w", err)
	}
	t := term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{in, out}, "> ")
	if width, height, err := term.GetSize(int(file.Fd())); err == nil {
		_ = t.SetSize(width, height) // a wrong width only wraps badly
	}
	return t.ReadLine, t, func() { _ = term.Restore(int(file.Fd()), old) }, nil
}

// read takes lines until the input ends; reading cannot be interrupted, so it runs beside ctx.
func (ch *chat) read(ctx context.Context, next lineReader) error {
	type line struct {
		text string
		err  error
	}
	lines := make(chan line)
	go func() {
		for {
			text, err := next()
			select {
			case lines <- line{text, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case l := <-lines:
			if errors.Is(l.err, io.EOF) {
				return nil
			}
			if l.err != nil {
				return fmt.Errorf("read input: %w", l.err)
			}
			if quit := ch.line(ctx, strings.TrimSpace(l.text)); quit {
				return nil
			}
			if err := ch.client.Err(); err != nil {
				return err
			}
		}
	}
}

func (ch *chat) line(ctx context.Context, text string) (quit bool) {
	command, argument, _ := strings.Cut(text, " ")
	switch {
	case text == "":
	case command == "/quit" || command == "/exit":
		return true
	case command == "/help":
		ch.say("/to USER  talk to somebody\n/quit     leave\nAnything else is sent. ✓ durable at the server, ✓✓ on a device of the peer.")
	case command == "/to":
		if !protocol.ValidUser(argument) {
			ch.say("%q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", argument, protocol.MaxUserBytes)
			break
		}
		ch.mu.Lock()
		ch.peer = argument
		ch.mu.Unlock()
		ch.say("Talking to %s.", argument)
	case strings.HasPrefix(command, "/"):
		ch.say("There is no %s; /help lists the commands.", printable(command))
	default:
		ch.send(ctx, text)
	}
	return false
}

func (ch *chat) send(ctx context.Context, text string) {
	ch.mu.Lock()
	peer := ch.peer
	ch.mu.Unlock()
	if peer == "" {
		ch.say("Nobody to talk to yet: /to USER.")
		return
	}
	if _, err := ch.client.Queue(ctx, peer, text); err != nil {
		ch.say("Not sent: %v", err)
		return
	}
	if !ch.client.Connected() {
		ch.say("  … %s (waiting for the server)", printable(text))
	}
}

// receive shows what arrives. It is acknowledged when it is on the screen.
func (ch *chat) receive(ctx context.Context) {
	for {
		m, err := ch.client.Receive(ctx)
		if err != nil {
			return
		}
		ch.say("%s %s: %s", m.Time().Format("15:04"), m.Sender, printable(m.Text))
		if err := ch.client.Acknowledge(ctx, m); err != nil && ctx.Err() == nil {
			ch.say("Not acknowledged: %v", err)
		}
	}
}

// event shows what happens besides messages.
func (ch *chat) event(e client.Event) {
	switch e := e.(type) {
	case client.Connected:
		ch.say("* connected")
	case client.Disconnected:
		if e.Final {
			ch.say("* disconnected: %v", e.Err)
			return
		}
		ch.say("* disconnected, retrying in %s", e.RetryIn.Round(100*time.Millisecond))
	case client.GoingAway:
		ch.say("* the server is going away, back in %s", e.RetryIn.Round(100*time.Millisecond))
	case client.Answered:
		if e.Err != nil {
			ch.say("  ✗ %s: %v", printable(e.Text), e.Err)
			return
		}
		ch.say("  ✓ %s", printable(e.Text))
		ch.remember(e)
	case client.Delivered:
		ch.delivered(e)
	}
}

// maxTicks bounds the texts kept for a second tick; the oldest sends simply get none.
const maxTicks = 1000

func sendKey(receiver string, number uint64) string { return fmt.Sprintf("%s %d", receiver, number) }

func (ch *chat) remember(e client.Answered) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if len(ch.texts) >= maxTicks {
		clear(ch.texts)
	}
	ch.texts[sendKey(e.Sent.Receiver, e.Sent.Number)] = e.Text
}

// delivered shows the second tick of the message that a receipt names; it covers the earlier ones too.
func (ch *chat) delivered(e client.Delivered) {
	ch.mu.Lock()
	text, known := ch.texts[sendKey(e.Receiver, e.Number)]
	if known {
		delete(ch.texts, sendKey(e.Receiver, e.Number))
	}
	ch.mu.Unlock()
	if known {
		ch.say("  ✓✓ %s", printable(text))
	}
}

func (ch *chat) say(format string, args ...any) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	fmt.Fprintf(ch.out, format+"\n", args...)
}

// printable makes foreign text harmless for a terminal: control and formatting characters are replaced.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) && r != '\u200d' {
			return '\ufffd'
		}
		return r
	}, text)
}
