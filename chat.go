package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"millrace/protocol"
	"millrace/protocol/client"
)

// Limits of a terminal chat.
const (
	// chatLeave is how long a chat whose input was a pipe waits for answers after its end; chatLeaveTerminal the same
	// for somebody who waits for the prompt. What is open then is in the state file and goes out with the next start.
	chatLeave         = 30 * time.Second
	chatLeaveTerminal = 2 * time.Second
	maxChatLine       = 64 << 10 // bytes of one line of input; far over what a message may hold
	maxChatSends      = 1000     // sends kept for their second tick; the oldest simply get none
	chatBacklog       = 64       // events and messages between the client and the screen
)

// chatConfig is what one terminal chat needs.
type chatConfig struct {
	URL       string
	User      string
	Device    string
	With      string // first peer; empty: /to names one
	Token     client.TokenSource
	TokenFrom string // what the user called the token, for errors; empty: it is signed here
	TokenOnce bool   // asking Token again gives the same token
	StateFile string // empty: a file for this server, user and device in the user's state directory
	JSON      bool
}

// statePath is where a chat keeps its outbox and what it has shown. The name holds the server, lest messages that wait
// for one go to another, and joins user and device by a character that neither can contain.
func (c *chatConfig) statePath() (string, error) {
	if c.StateFile != "" {
		return c.StateFile, nil
	}
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) { // the XDG specification: a relative path is to be ignored
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find the state directory (or give --state-file): %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	server := "server"
	if u, err := url.Parse(c.URL); err == nil && u.Host != "" {
		server = strings.NewReplacer(":", "_", "[", "", "]", "", "%", "_").Replace(u.Host)
	}
	dir = filepath.Join(dir, "millrace", server)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the state directory (or give --state-file): %w", err)
	}
	return filepath.Join(dir, "chat-"+c.User+"+"+c.Device+".state"), nil
}

// chat is one terminal conversation. One goroutine owns it: everything that happens comes to it through channels.
type chat struct {
	config chatConfig
	path   string
	client *client.Client
	screen screen

	lines    chan chatLine
	events   chan client.Event
	messages chan client.Message

	peer    string
	sends   []*chatSend       // in the order in which they were given
	heldUp  string            // a line that found the outbox full
	typed   string            // the line of input being dealt with, as it stands on the screen
	refused int               // lines that were not sent
	offline bool              // the last thing said about the connection is that there is none
	state   lineID            // where that was said
	reached map[string]uint64 // peer → position up to which earlier chats' messages were reported as delivered
	ended   error             // the client's final error
}

// chatLine is one line of input. taken is closed when it has been dealt with: on a terminal the next prompt must
// not be drawn before.
type chatLine struct {
	text  string
	err   error
	taken chan struct{}
}

// chatSend is one message of ours on the screen.
type chatSend struct {
	local    uint64
	number   uint64
	position uint64
	receiver string
	text     string
	at       time.Time
	line     lineID
	mark     string
}

// The marks of a send. All have two columns, so that a line keeps its length.
const (
	markWaiting   = ".."
	markSent      = "✓ "
	markDelivered = "✓✓"
	markFailed    = "✗ "
	markNone      = "  "
)

// runChat talks until in ends, /quit, or ctx ends. On a terminal the line being typed survives what arrives, and the ticks of a
// message change in its line. It returns an error when lines of a pipe were refused, or stay unsent at its end.
func runChat(ctx context.Context, c chatConfig, in io.Reader, out io.Writer) error {
	path, err := c.statePath()
	if err != nil {
		return err
	}
	s, next, restore, err := openScreen(in, out)
	if err != nil {
		return err
	}
	defer restore()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch := &chat{
		config: c, path: path, screen: s, peer: c.With, reached: make(map[string]uint64),
		lines: make(chan chatLine), events: make(chan client.Event, chatBacklog), messages: make(chan client.Message),
	}
	o := client.Options{
		URL: c.URL, Token: c.Token, User: c.User, Device: c.Device, StatePath: path, Background: true,
		OnEvent: func(e client.Event) { ch.events <- e },
	}
	if c.JSON {
		o.Encoding = client.JSON
	}
	ch.client, err = client.Dial(ctx, o)
	if err != nil {
		return chatStartError(err, c, path)
	}
	go ch.read(ctx, next)
	received := make(chan struct{})
	go func() {
		defer close(received)
		ch.receive(ctx)
	}()
	err = ch.talk(ctx)
	cancel()
	<-received
	return errors.Join(err, ch.close())
}

func chatStartError(err error, c chatConfig, path string) error {
	if errors.Is(err, client.ErrStateLocked) {
		return fmt.Errorf("another chat is running as %s on device %s (it uses %s); give this one another --device", c.User, c.Device, path)
	}
	if errors.Is(err, client.ErrStateCorrupt) {
		return fmt.Errorf("start the chat: %w\nMove the file away to start afresh: what waited in it is not sent then, and what was shown may be shown once more", err)
	}
	return fmt.Errorf("start the chat: %w", err)
}

// close ends the client and shows the events that come out while it does.
func (ch *chat) close() error {
	closed := make(chan error, 1)
	go func() { closed <- ch.client.Close() }()
	for {
		select {
		case e := <-ch.events:
			ch.event(e)
		case err := <-closed:
			for len(ch.events) > 0 {
				ch.event(<-ch.events)
			}
			if errors.Is(ch.ended, err) {
				return nil // it has been said
			}
			return err
		}
	}
}

// read takes lines until the input ends. Reading a terminal or a pipe cannot be interrupted: when the chat ends for
// another reason, this goroutine stays in its read until the program ends or the input does.
func (ch *chat) read(ctx context.Context, next lineReader) {
	for {
		text, err := next()
		l := chatLine{text, err, make(chan struct{})}
		select {
		case ch.lines <- l:
		case <-ctx.Done():
			return
		}
		select {
		case <-l.taken:
		case <-ctx.Done():
			return
		}
		if err != nil && !errors.Is(err, errChatLine) {
			return
		}
	}
}

// receive hands messages to the screen.
func (ch *chat) receive(ctx context.Context) {
	for {
		m, err := ch.client.Receive(ctx)
		if err != nil {
			return
		}
		select {
		case ch.messages <- m:
		case <-ctx.Done():
			return // not shown and not acknowledged: it comes again
		}
	}
}

// talk is the loop of a chat.
func (ch *chat) talk(ctx context.Context) error {
	ch.welcome(ctx)
	for ch.ended == nil {
		lines := ch.lines
		if ch.heldUp != "" {
			lines = nil // a pipe waits until the outbox has room
		}
		select {
		case <-ctx.Done():
			return nil
		case e := <-ch.events:
			ch.event(e)
			if ch.heldUp != "" {
				ch.send(ctx, ch.heldUp)
			}
		case m := <-ch.messages:
			ch.show(ctx, m)
		case l := <-lines:
			if errors.Is(l.err, io.EOF) {
				return ch.leave(ctx)
			}
			if l.err != nil && !errors.Is(l.err, errChatLine) {
				return fmt.Errorf("read input: %w", l.err)
			}
			quit := ch.line(ctx, l)
			close(l.taken)
			if quit {
				return ch.leave(ctx)
			}
		}
	}
	return ch.finalError()
}

func (ch *chat) welcome(ctx context.Context) {
	if ch.screen.terminal() {
		whom := "/to USER chooses whom to talk to"
		if ch.peer != "" {
			whom = "what you type goes to " + ch.peer
		}
		ch.note("You are %s; %s, /help explains.", ch.config.User, whom)
	}
	ch.screen.prompt(ch.peer)
	unsent, err := ch.client.Unsent(ctx)
	if err == nil && len(unsent) > 0 {
		ch.note("%s from last time will be sent first.", countMessages(len(unsent)))
	}
}

// leave waits, bounded, until everything is answered, and says what is not.
func (ch *chat) leave(ctx context.Context) error {
	patience := chatLeave
	if ch.screen.terminal() {
		patience = chatLeaveTerminal
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	drained := make(chan error, 1)
	go func() { drained <- ch.client.Drain(ctx) }()
	for {
		select {
		case e := <-ch.events:
			if ch.event(e); ch.ended != nil {
				return ch.finalError()
			}
		case m := <-ch.messages:
			ch.show(ctx, m)
		case err := <-drained:
			return ch.left(err)
		}
	}
}

func (ch *chat) left(err error) error {
	var kept []client.Unsent
	if err != nil {
		if ch.ended = ch.client.Err(); ch.ended != nil {
			return ch.finalError()
		}
		if kept, err = ch.client.Unsent(context.Background()); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("not sent yet: %s, kept for the next start in %s", countMessages(len(kept)), ch.path)
	switch {
	case ch.screen.terminal() && len(kept) > 0:
		ch.note("%s", text)
		return nil
	case ch.screen.terminal():
		return nil
	case ch.refused > 0 && len(kept) > 0:
		return fmt.Errorf("not sent: %d of the lines; %s", ch.refused, text)
	case ch.refused > 0:
		return fmt.Errorf("not sent: %d of the lines", ch.refused)
	case len(kept) > 0:
		return errors.New(text)
	}
	return nil
}

func countMessages(n int) string {
	if n == 1 {
		return "1 message"
	}
	return fmt.Sprintf("%d messages", n)
}

// finalError says what a human can do about the end of the client.
func (ch *chat) finalError() error {
	token := "token of " + ch.config.User
	if ch.config.TokenFrom != "" {
		token = "token in " + ch.config.TokenFrom
	}
	var closed *client.CloseError
	switch {
	case errors.Is(ch.ended, client.ErrReplaced):
		return fmt.Errorf("%s connected as device %s elsewhere, which ends this chat; give each its own --device", ch.config.User, ch.config.Device)
	case errors.Is(ch.ended, client.ErrUnauthorized):
		return fmt.Errorf("the server refused the %s: it must be signed with the server's secret (see millrace token --help)", token)
	case errors.Is(ch.ended, client.ErrWrongUser):
		return fmt.Errorf("the %s does not say %s: %s", token, ch.config.User, printable(ch.ended.Error()))
	case errors.As(ch.ended, &closed) && closed.Code == protocol.CloseTokenExpired:
		return fmt.Errorf("the %s has expired; what is not sent yet is kept for the next start", token)
	case errors.Is(ch.ended, client.ErrTooManyDevices):
		return fmt.Errorf("%s has %d devices already; use the name of one of them with --device", ch.config.User, protocol.MaxDevicesPerUser)
	}
	return fmt.Errorf("the chat has ended: %s", printable(ch.ended.Error()))
}

// line does what a line of input says.
func (ch *chat) line(ctx context.Context, l chatLine) (quit bool) {
	ch.typed = l.text
	text := strings.TrimSpace(l.text)
	command, argument, _ := strings.Cut(text, " ")
	argument = strings.TrimSpace(argument)
	switch {
	case l.err != nil:
		ch.notSent(l.err.Error())
	case text == "":
		ch.screen.eraseInput(ch.typed)
	case strings.HasPrefix(text, "//"):
		ch.send(ctx, text[1:])
	case command == "/quit" || command == "/exit":
		return true
	case command == "/help":
		ch.help()
	case command == "/to":
		ch.to(argument)
	case strings.HasPrefix(command, "/"):
		ch.note("There is no %s; /help lists the commands. A message that begins with / is written with //.", printable(command))
	default:
		ch.send(ctx, text)
	}
	return false
}

func (ch *chat) help() {
	for _, text := range []string{
		"/to USER   choose whom you talk to",
		"/quit      leave (also Ctrl-C or Ctrl-D)",
		"//text     send a message that begins with /",
		"Anything else is sent. .. waits for the server, ✓ is safe there, ✓✓ has reached a device of the receiver, ✗ was refused.",
	} {
		ch.note("%s", text)
	}
}

func (ch *chat) to(user string) {
	if !protocol.ValidUser(user) {
		ch.note("%q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", printable(user), protocol.MaxUserBytes)
		return
	}
	ch.peer = user
	ch.screen.prompt(user)
	ch.note("Talking to %s.", user)
}

// send gives a line to the outbox and shows it.
func (ch *chat) send(ctx context.Context, text string) {
	ch.heldUp = ""
	if ch.peer == "" {
		ch.notSent("nobody to talk to yet; /to USER chooses somebody")
		return
	}
	p, err := ch.client.Queue(ctx, ch.peer, text)
	switch {
	case errors.Is(err, client.ErrOutboxFull) && !ch.screen.terminal():
		ch.heldUp = text
		return
	case err != nil:
		ch.notSent(sendError(err, text))
		return
	}
	s := ch.remember(&chatSend{local: p.Local, receiver: ch.peer, text: text, at: time.Now(), mark: markWaiting})
	if ch.screen.terminal() {
		ch.screen.eraseInput(ch.typed)
		s.line = ch.screen.print(s.show())
	}
}

func (ch *chat) notSent(why string) {
	ch.refused++
	ch.note("Not sent: %s.", why)
}

// sendError says why a message was refused, in words.
func sendError(err error, text string) string {
	var refused *client.RefusedError
	if !errors.As(err, &refused) {
		return printable(err.Error())
	}
	switch refused.Code {
	case protocol.CodeContentTooLong:
		return fmt.Sprintf("the message is too long (%d characters, %d bytes; at most %d and %d)",
			utf8.RuneCountInString(text), len(text), protocol.MaxContentRunes, protocol.MaxContentBytes)
	case protocol.CodeMailboxFull:
		return "the receiver's mailbox is full"
	case protocol.CodeBadRequest:
		if !utf8.ValidString(text) {
			return "the message is not valid UTF-8"
		}
	}
	return printable(err.Error())
}

func (ch *chat) remember(s *chatSend) *chatSend {
	if len(ch.sends) >= maxChatSends {
		ch.sends = append(ch.sends[:0], ch.sends[len(ch.sends)-maxChatSends/2:]...)
	}
	ch.sends = append(ch.sends, s)
	return s
}

// show is the line of a send.
func (s *chatSend) show() line {
	return line{at: s.at, mark: s.mark, who: "to " + s.receiver, text: printable(s.text)}
}

// marked changes the mark of a send: in its line if that is still in reach, else with a line of its own.
func (ch *chat) marked(s *chatSend, mark string) {
	if s.mark == mark {
		return
	}
	s.mark = mark
	if s.line == 0 || !ch.screen.change(s.line, s.show()) {
		s.line = ch.screen.print(s.show())
	}
}

// show prints a message and acknowledges it: in this order, so that a crash between them repeats it rather than hiding it.
func (ch *chat) show(ctx context.Context, m client.Message) {
	ch.screen.print(line{at: m.Time(), mark: markNone, who: printable(m.Sender), text: printable(m.Text), foreign: true})
	if ch.peer == "" && m.Sender != ch.config.User {
		ch.to(m.Sender)
	}
	if err := ch.client.Acknowledge(ctx, m); err != nil && ctx.Err() == nil {
		ch.note("It could not be noted as shown and may come again: %s", printable(err.Error()))
	}
}

// event shows what happens besides messages.
func (ch *chat) event(e client.Event) {
	switch e := e.(type) {
	case client.Connected:
		ch.connection("connected", true)
	case client.Disconnected:
		var closed *client.CloseError
		if e.Final || ch.config.TokenOnce && errors.As(e.Err, &closed) && closed.Code == protocol.CloseTokenExpired {
			ch.ended = e.Err
			return
		}
		ch.connection(fmt.Sprintf("disconnected (%s), retrying in %s", connectionError(e.Err), roundWait(e.RetryIn)), false)
	case client.GoingAway:
		ch.note("the server is going away, back in %s", roundWait(e.RetryIn))
	case client.Answered:
		ch.answered(e)
	case client.Delivered:
		ch.delivered(e)
	}
}

// connection shows the state of the connection. While there is none, one line tells of all attempts; where it cannot
// be changed, it tells of the first.
func (ch *chat) connection(text string, up bool) {
	l := line{text: "* " + text}
	if !ch.offline || !ch.screen.change(ch.state, l) && up {
		ch.state = ch.screen.print(l)
	}
	ch.offline = !up
}

func roundWait(d time.Duration) time.Duration {
	if d < time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(100 * time.Millisecond)
}

// connectionError is the part of an error that a human needs.
func connectionError(err error) string {
	var dns *net.DNSError
	var closed *client.CloseError
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "no server answers there"
	case errors.As(err, &dns):
		return "the server's name is not known"
	case errors.As(err, &closed) && closed.Code == protocol.CloseTokenExpired:
		return "the token has expired"
	case errors.As(err, &closed) && closed.Text != "":
		return printable(strings.ReplaceAll(closed.Text, "_", " "))
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return "the connection was cut"
	}
	return printable(err.Error())
}

// answered shows the first tick, or why there will be none.
func (ch *chat) answered(e client.Answered) {
	s := ch.find(e.Sent.Local)
	if s == nil { // a send of an earlier chat
		s = ch.remember(&chatSend{local: e.Sent.Local, receiver: e.Sent.Receiver, text: e.Text, at: time.Now(), mark: markWaiting})
	}
	if e.Err != nil {
		ch.marked(s, markFailed)
		ch.notSent(sendError(e.Err, e.Text))
		return
	}
	s.number, s.position = e.Sent.Number, e.Sent.Position
	ch.marked(s, markSent)
}

func (ch *chat) find(local uint64) *chatSend {
	for i := len(ch.sends) - 1; i >= 0; i-- {
		if ch.sends[i].local == local {
			return ch.sends[i]
		}
	}
	return nil
}

// delivered shows the second tick of everything that a receipt covers: what was sent to that receiver under
// a number or at a position no higher than that of the message it names.
func (ch *chat) delivered(e client.Delivered) {
	covered := false
	for _, s := range ch.sends {
		byNumber := e.Number != 0 && s.number != 0 && s.number <= e.Number
		byPosition := e.Position != 0 && s.position != 0 && s.position <= e.Position
		if s.receiver != e.Receiver || !byNumber && !byPosition {
			continue
		}
		covered = true
		if s.mark == markSent {
			ch.marked(s, markDelivered)
		}
	}
	if !covered && e.Position > ch.reached[e.Receiver] {
		sent := clockTime(time.UnixMilli(protocol.PositionMillis(e.Position)), time.Now())
		ch.note("%s has received what you had sent by %s", printable(e.Receiver), sent)
	}
	ch.reached[e.Receiver] = max(ch.reached[e.Receiver], e.Position)
}

// note prints a line of the program's own.
func (ch *chat) note(format string, args ...any) {
	ch.screen.print(line{text: "* " + fmt.Sprintf(format, args...)})
}

// lineReader gives one line of input at a time. An error that is errChatLine concerns that line only.
type lineReader func() (string, error)

var errChatLine = errors.New("the line is too long")

// pipeLines reads lines from what is not a terminal.
func pipeLines(in io.Reader) lineReader {
	r := bufio.NewReaderSize(in, maxChatLine)
	return func() (string, error) {
		text, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			return "", errChatLine
		case errors.Is(err, io.EOF) && len(text) > 0:
			err = nil // the last line needs no newline
		}
		return string(bytes.TrimRight(text, "\r\n")), err
	}
}
