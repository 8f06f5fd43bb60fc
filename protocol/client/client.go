package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"millrace/protocol"
)

// Limits of the API.
const (
	// DefaultMaxOutbox is how many sends may wait for their answers if Options.MaxOutbox is 0: at most 40 MB of content.
	DefaultMaxOutbox = 10_000
	// LimitMaxOutbox is the largest MaxOutbox.
	LimitMaxOutbox = 20_000

	commandQueue = 64
)

// TokenSource returns an access token for the user (protocol/token). It is called before the first connection, when
// the server asks for a renewal, and when a token was refused or has expired, never twice at a time for one connection. It
// must return when ctx ends, which is after TokenTimeout at the latest. An error is retried with backoff.
type TokenSource func(ctx context.Context) (string, error)

// StaticToken is a TokenSource that always returns the same token.
func StaticToken(token string) TokenSource {
	return func(context.Context) (string, error) { return token, nil }
}

// Options configure Dial. URL and Token are required.
type Options struct {
	// URL is the server's WebSocket address, ws:// or wss://.
	URL string
	// Token gives the access tokens.
	Token TokenSource
	// User, if set, is whom the token must name. Without it a state file belongs to whoever connects first.
	User string
	// Device names this installation among the user's devices; empty is protocol.DefaultDevice. Two clients with
	// the same user and device throw each other out.
	Device string
	// Encoding is the subprotocol: Binary (the default) or JSON.
	Encoding Encoding

	// StatePath names the file that keeps the outbox and the ids of the messages that were acknowledged, so that a restart
	// neither loses nor repeats anything. Its folder must exist. A second file of the same name and ".lock" stands beside it.
	// Empty keeps all this in memory.
	StatePath string
	// Background lets Dial return before the first connection stands, for an application that works offline.
	Background bool
	// OnEvent, if set, is called for every Event, one at a time and in order, on a goroutine of the client. It may call every method but Close.
	OnEvent func(Event)
	// MaxOutbox is how many sends may wait for their answers; 0 is DefaultMaxOutbox.
	MaxOutbox int

	// MinBackoff and MaxBackoff bound the random wait before a new attempt; 0 are the defaults.
	MinBackoff time.Duration
	MaxBackoff time.Duration
	// Header is added to the HTTP request.
	Header http.Header
	// TLSConfig is for wss://; nil is the default configuration.
	TLSConfig *tls.Config
	// NetDial opens the network connection; nil is net.Dialer's DialContext.
	NetDial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Logger hears what a developer may want to know, never tokens or content; nil is silence.
	Logger *slog.Logger
}

func (o *Options) validate() error {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil:
		return fmt.Errorf("URL: %w", err)
	case u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "":
		return fmt.Errorf("URL %q: must be like ws://host:port/path or wss://host/path", o.URL)
	case o.Token == nil:
		return errors.New("option Token is missing")
	case o.User != "" && !protocol.ValidUser(o.User):
		return fmt.Errorf("option User %q: must be 1 to %d of letters, digits and ._@-", o.User, protocol.MaxUserBytes)
	case o.Encoding > JSON:
		return fmt.Errorf("Encoding %d is not one", o.Encoding)
	case o.MaxOutbox < 0 || o.MaxOutbox > LimitMaxOutbox:
		return fmt.Errorf("MaxOutbox %d: must be at most %d", o.MaxOutbox, LimitMaxOutbox)
	case o.MinBackoff < 0 || o.MaxBackoff < 0 || o.MinBackoff > LimitBackoff || o.MaxBackoff > LimitBackoff:
		return fmt.Errorf("a backoff must be between 0 and %v", LimitBackoff)
	}
	if u.Path == "" {
		u.Path = "/" // what the request line needs
		o.URL = u.String()
	}
	if o.Device == "" {
		o.Device = protocol.DefaultDevice
	}
	if !protocol.ValidDevice(o.Device) {
		return fmt.Errorf("option Device %q: must be 1 to %d of letters, digits and ._@-", o.Device, protocol.MaxDeviceBytes)
	}
	if o.MaxOutbox == 0 {
		o.MaxOutbox = DefaultMaxOutbox
	}
	if o.MinBackoff == 0 {
		o.MinBackoff = DefaultMinBackoff
	}
	if o.MaxBackoff == 0 {
		o.MaxBackoff = DefaultMaxBackoff
	}
	o.MaxBackoff = max(o.MaxBackoff, o.MinBackoff)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Message is one message that the server delivered.
type Message struct {
	ID       protocol.MessageID
	Position uint64 // orders the conversation, see ComparePositions
	Sender   string
	Receiver string // this user
	Text     string // as the sender wrote it: control characters and all
}

// Time is when the server accepted the message.
func (m Message) Time() time.Time { return time.UnixMilli(protocol.PositionMillis(m.Position)) }

// Sent is a send that has ended. ID, Position and At are zero for one that failed.
type Sent struct {
	Local    uint64 // the same as Pending.Local
	Number   uint64 // message_id_by_client; 0 when it never got one
	Receiver string
	ID       protocol.MessageID
	Position uint64    // 0: not known yet; a Delivered event will tell
	At       time.Time // the server's clock when it answered
}

// Unsent is a send that waits in the outbox.
type Unsent struct {
	Local    uint64
	Number   uint64 // 0: never written to a connection
	Receiver string
	Text     string
	QueuedAt time.Time
}

// Client is one installation of a user's client: it stays connected, sends what was queued and receives what was
// sent to the user. It is safe for concurrent use. Dial makes one, Close ends it.
type Client struct {
	// Immutable.
	commands chan func(*runner)
	messages chan Message  // unbuffered: the runner offers the oldest message
	first    chan struct{} // closed when a connection stands for the first time
	final    chan struct{} // closed when err is set
	stopped  chan struct{} // closed when the last command has run and its reply is given
	done     chan struct{} // closed when everything has ended
	cancel   context.CancelFunc

	mu          sync.Mutex
	err         error // final
	closeErr    error
	user        string
	connected   bool
	lastFailure error
}

// Dial opens the state and starts a client. Unless o.Background is set it waits until a connection stands; it goes on trying
// until ctx ends, and returns at once what trying again cannot help (ErrUnauthorized and the like). The client does not end
// with ctx.
func Dial(ctx context.Context, o Options) (*Client, error) {
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("client options: %w", err)
	}
	return dial(ctx, &o, osDisk{})
}

func dial(ctx context.Context, o *Options, d disk) (*Client, error) {
	st, items, highest, err := openState(d, o.StatePath, o.Device, time.Now())
	if err != nil {
		return nil, err
	}
	if o.User != "" && st.user != "" && st.user != o.User {
		return nil, errors.Join(fmt.Errorf("open state %s: %w: user %q", o.StatePath, ErrStateMismatch, st.user), st.close())
	}
	if st.repaired > 0 {
		o.Logger.Warn("cut a torn tail off the state file", "path", o.StatePath, "bytes", st.repaired)
	}
	c := &Client{
		commands: make(chan func(*runner), commandQueue),
		messages: make(chan Message),
		first:    make(chan struct{}),
		final:    make(chan struct{}),
		stopped:  make(chan struct{}),
		done:     make(chan struct{}),
		user:     st.user,
	}
	life, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go newRunner(life, c, o, st, items, highest).run()
	if o.Background {
		return c, nil
	}
	return c.awaitFirst(ctx)
}

func (c *Client) awaitFirst(ctx context.Context) (*Client, error) {
	select {
	case <-c.first:
		return c, nil
	case <-c.final:
		err := c.Err()
		return nil, errors.Join(err, c.Close())
	case <-ctx.Done():
		c.mu.Lock()
		err := c.lastFailure
		c.mu.Unlock()
		if err == nil {
			err = errors.New("no answer yet")
		}
		return nil, errors.Join(fmt.Errorf("connect: %w (last attempt: %w)", context.Cause(ctx), err), c.Close())
	}
}

// checkSend refuses here what the server would refuse for ever.
func checkSend(receiver, text string) error {
	f := protocol.Frame{Seq: 1, Receiver: []byte(receiver), Content: []byte(text)}
	if !utf8.ValidString(text) {
		return &RefusedError{Code: protocol.CodeBadRequest, Text: "the text is not valid UTF-8"}
	}
	if refusal := protocol.CheckSend(&f); refusal.Code != protocol.OK {
		return &RefusedError{Code: refusal.Code}
	}
	return nil
}

// Send sends a text and returns when the server has made it durable. Several Sends may run at once; their order is that
// in which the calls began, as far as there is one.
//
// A *RefusedError is final: the message will not be delivered. With protocol.CodeMailboxFull so many messages wait for the receiver that
// there is no room for one more, and the sends to the same receiver that were on their way behind it are refused with it, so that none overtakes
// another. There may be room when the receiver has been online: the application may then send the text again, which is a new send.
//
// When ctx ends before the message was ever written it is withdrawn and the error is ctx's; once it has been
// written it cannot be taken back: the error is then ErrUndecided, and the client keeps trying. ErrClosed and the
// other final errors leave the message in the state file, if there is one.
func (c *Client) Send(ctx context.Context, receiver, text string) (Sent, error) {
	p, err := c.Queue(ctx, receiver, text)
	if err != nil {
		return Sent{}, err
	}
	select {
	case <-p.done:
		return p.sent, p.err
	case <-ctx.Done():
	}
	if c.withdraw(p) == nil {
		return Sent{}, ctx.Err()
	}
	select {
	case <-p.done:
		return p.sent, p.err
	default:
		return Sent{}, fmt.Errorf("%w: %w", ErrUndecided, ctx.Err())
	}
}

// Pending is a send on its way.
type Pending struct {
	Local uint64 // the client's own name for the send, ascending, also across restarts of a state file

	done chan struct{}
	sent Sent // valid once done is closed
	err  error
}

// Done is closed when the send has ended.
func (p *Pending) Done() <-chan struct{} { return p.done }

// Wait returns how the send ended, or ctx's error while it goes on.
func (p *Pending) Wait(ctx context.Context) (Sent, error) {
	select {
	case <-p.done:
		return p.sent, p.err
	default:
	}
	select {
	case <-p.done:
		return p.sent, p.err
	case <-ctx.Done():
		return Sent{}, ctx.Err()
	}
}

// Queue gives a text to the outbox and returns when it is there: on stable storage, if there is a state file. Connected or not, it is
// sent as soon as possible, in the order of the calls. ErrOutboxFull says that too many wait already; after a failure of the
// state file it is not known whether the next process will find the text there.
func (c *Client) Queue(ctx context.Context, receiver, text string) (*Pending, error) {
	if err := checkSend(receiver, text); err != nil {
		return nil, err
	}
	p := &Pending{done: make(chan struct{})}
	err := c.do(ctx, func(r *runner, reply func(error)) { r.queue(p, receiver, text, reply) })
	if err != nil {
		return nil, err
	}
	return p, nil
}

// withdraw takes a send back that was never written. After an error it goes on, or has ended.
func (c *Client) withdraw(p *Pending) error {
	return c.do(context.Background(), func(r *runner, reply func(error)) { r.withdraw(p.Local, reply) })
}

// Receive returns the next message that was not acknowledged before, in the order in which they arrive; sort by
// CompareMessages to show a conversation. It waits for one. Every message that it returns must be given to
// Acknowledge; until then the server counts it as not delivered.
func (c *Client) Receive(ctx context.Context) (Message, error) {
	select {
	case <-c.final:
		return Message{}, c.Err()
	default:
	}
	select {
	case m := <-c.messages:
		return m, nil
	case <-c.final:
		return Message{}, c.Err()
	case <-ctx.Done():
		return Message{}, ctx.Err()
	}
}

// Acknowledge says that the application has stored or shown the messages: none of them is returned by Receive again, and the
// server is told. When it returns, that holds even if this process is killed; within AcknowledgeDelay it holds
// for a power cut too. It works offline, and after a final error until Close.
func (c *Client) Acknowledge(ctx context.Context, messages ...Message) error {
	messages = slices.Clone(messages) // the caller may go on with it when ctx ends
	return c.do(ctx, func(r *runner, reply func(error)) { r.acknowledge(messages, reply) })
}

// Unsent lists the sends that have not ended, in the order in which they were given.
func (c *Client) Unsent(ctx context.Context) ([]Unsent, error) {
	var list []Unsent
	err := c.do(ctx, func(r *runner, reply func(error)) {
		r.outbox.Items(func(it *Item) bool {
			list = append(list, Unsent{it.Local, it.Seq, it.Receiver, it.Text, time.UnixMilli(it.QueuedMs)})
			return true
		})
		reply(nil)
	})
	return list, err
}

// Drain waits until every send has ended.
func (c *Client) Drain(ctx context.Context) error {
	empty := make(chan struct{})
	err := c.do(ctx, func(r *runner, reply func(error)) {
		r.drainers = append(r.drainers, empty)
		reply(nil)
	})
	if err != nil {
		return err
	}
	select {
	case <-empty:
		return nil
	case <-c.final:
		return c.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// do runs f on the client's goroutine and waits for its reply, which comes soon: at most a write to the disk is between.
// ctx counts until f is accepted, so that a caller always knows whether it ran. A closing client waits for OnEvent and the
// TokenSource, which may be in here: they must not wait for it in turn.
func (c *Client) do(ctx context.Context, f func(r *runner, reply func(error))) error {
	answer := make(chan error, 1)
	command := func(r *runner) { f(r, func(err error) { answer <- err }) }
	select {
	case <-c.stopped:
		return c.Err()
	default:
	}
	select {
	case c.commands <- command:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.stopped:
		return c.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-c.stopped:
	}
	select {
	case err := <-answer: // both were ready
		return err
	default:
		return c.Err()
	}
}

// Connected reports whether a connection stands.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.connected
}

// User is whom the token names; empty before anybody has connected with this state.
func (c *Client) User() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.user
}

// Err is nil while the client works, else why it ended: ErrClosed, ErrReplaced, ErrUnauthorized, ErrTooManyDevices,
// ErrRejected, ErrWrongUser, or a failure of the state file.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close sends the acknowledgements that wait, closes the connection and the state file, and returns when every
// goroutine of the client has ended, after CloseTimeout at the latest if OnEvent and the TokenSource return. Sends that were
// not answered fail with ErrClosed and stay in the state file. The error is that of the state file.
func (c *Client) Close() error {
	c.cancel()
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closeErr
}
