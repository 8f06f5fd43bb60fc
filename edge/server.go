package edge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"millrace/protocol"
	"millrace/protocol/token"
)

// spareDescriptors is what the rest of the process needs: database, log, admin, peers. A connection over the
// limit would make accept fail, and with it the whole engine.
const spareDescriptors = 512

// minConnections is the least that makes sense to serve.
const minConnections = 16

// maxDrain bounds how long Drain waits for connections to close, whatever its context says.
const maxDrain = 8 * time.Second

// TokenVerifier says who a token is from. The token is not kept. An error is token.ErrExpired for one that was valid once, and
// token.ErrUnavailable when nobody can tell for now.
type TokenVerifier interface {
	// VerifyFast is called on event loops. It returns token.ErrSlow for a token that takes more than a few microseconds.
	VerifyFast(t []byte, now time.Time) (token.Claims, error)
	// Verify is called for those by a few workers. It may compute, and must not wait.
	Verify(t []byte, now time.Time) (token.Claims, error)
}

// Config is what a Server is made of.
type Config struct {
	Addr           string    // host:port; an empty host is every address, port 0 any free port
	Loops          int       // event loops, at most 256; 0: GOMAXPROCS
	MaxConnections int       // 0: the descriptor limit − 512
	Origins        []string  // scheme://host[:port] that may connect besides same-origin
	Rate           RateLimit // of sends per user, over all connections; the zero value sets none
	User           UserLimit
	Address        AddressLimit   // of clients on other machines
	Loopback       AddressLimit   // of clients on this machine
	ProxyNetworks  []netip.Prefix // whose connections must begin with a PROXY protocol header
	EdgeID         uint32         // of sessions; not used twice within the life of a router

	// Seconds; 0 is the protocol's.
	HeartbeatSeconds    int
	AuthenticateSeconds int
	FrameSeconds        int
	RenewSeconds        int

	Token        TokenVerifier
	Publisher    Publisher
	Acknowledger Acknowledger
	Mailbox      Mailbox
	Registrar    Registrar

	Certificate CertificateSource // TLS is spoken; nil: it is not

	Logger     *slog.Logger      // nil: slog.Default
	CrashPoint func(name string) // called at "after_parse" and "after_push"; nil: nothing

	now           func() time.Time
	sweepSlices   uint32
	tlsHandshakes int // 0: maxTLSHandshakes
	proxies       networks
}

// validate fills defaults.
func (c *Config) validate() error {
	if _, _, err := net.SplitHostPort(c.Addr); err != nil {
		return fmt.Errorf("address: %w", err)
	}
	if c.Loops == 0 {
		c.Loops = min(runtime.GOMAXPROCS(0), 256)
	}
	if c.Loops < 1 || c.Loops > 256 {
		return fmt.Errorf("loops: %d is not within 1 and 256", c.Loops)
	}
	if err := c.validateConnections(); err != nil {
		return err
	}
	if err := c.validateLimits(); err != nil {
		return err
	}
	for _, s := range [...]struct {
		name    string
		seconds *int
		value   int
	}{
		{"heartbeat", &c.HeartbeatSeconds, protocol.HeartbeatSeconds},
		{"authenticate", &c.AuthenticateSeconds, protocol.AuthenticateSeconds},
		{"frame", &c.FrameSeconds, protocol.FrameSeconds},
		{"renew", &c.RenewSeconds, protocol.RenewSeconds},
	} {
		if *s.seconds = cmp.Or(*s.seconds, s.value); *s.seconds < 0 || *s.seconds > protocol.MaxHeartbeatSeconds {
			return fmt.Errorf("%s: %d seconds is not within 1 and %d", s.name, *s.seconds, protocol.MaxHeartbeatSeconds)
		}
	}
	if c.Token == nil || c.Publisher == nil || c.Acknowledger == nil || c.Mailbox == nil || c.Registrar == nil {
		return errors.New("a token verifier, publisher, acknowledger, mailbox and registrar are required")
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.now == nil {
		c.now = time.Now
	}
	c.sweepSlices = cmp.Or(c.sweepSlices, ticksPerSecond)
	c.tlsHandshakes = cmp.Or(c.tlsHandshakes, maxTLSHandshakes)
	return nil
}

func (c *Config) validateConnections() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the descriptor limit: %w", err)
	}
	// A limit can be "infinity": 2⁶⁴ − 1.
	room := int(min(limit.Cur, 1<<31)) - spareDescriptors
	switch {
	case room < minConnections:
		return fmt.Errorf("the descriptor limit %d leaves none for connections: raise it (ulimit -n) to %d or more",
			limit.Cur, spareDescriptors+minConnections)
	case c.MaxConnections < 0:
		return fmt.Errorf("connections: %d", c.MaxConnections)
	case c.MaxConnections == 0:
		c.MaxConnections = room
	case c.MaxConnections > room:
		return fmt.Errorf("%d connections need a descriptor limit (ulimit -n) of %d; it is %d",
			c.MaxConnections, c.MaxConnections+spareDescriptors, limit.Cur)
	}
	return nil
}

// Server terminates client connections.
type Server struct {
	cfg     Config
	origins []origin
	started time.Time
	loops   []*loop

	// Ticks and durations of the configuration.
	heartbeatTicks, authenticateTicks, frameTicks uint32
	renewBefore                                   time.Duration

	verifiers   *verifiers
	tls         *tlsServer // nil: sockets are plain
	limits      *limits
	published   []published
	connections atomic.Int64
	late        atomic.Int64  // of these, accepted after Drain had begun: they get 503, or are silent
	accepted    atomic.Uint64 // connections so far: orders logins
	strays      atomic.Uint64
	draining    atomic.Bool
	spreadMs    atomic.Int64

	engine *engine // set by Start
	addr   string
	done   chan error
}

// New makes a server that does not listen yet.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("edge: %w", err)
	}
	origins, err := parseOrigins(cfg.Origins)
	if err != nil {
		return nil, fmt.Errorf("edge: %w", err)
	}
	s := &Server{
		cfg:               cfg,
		origins:           origins,
		started:           cfg.now(),
		heartbeatTicks:    uint32(cfg.HeartbeatSeconds) * ticksPerSecond,
		authenticateTicks: uint32(cfg.AuthenticateSeconds) * ticksPerSecond,
		frameTicks:        uint32(cfg.FrameSeconds) * ticksPerSecond,
		renewBefore:       time.Duration(cfg.RenewSeconds) * time.Second,
		published:         make([]published, cfg.Loops),
		done:              make(chan error, 1),
	}
	s.verifiers = newVerifiers(s)
	if cfg.Certificate != nil {
		s.tls = newTLSServer(&cfg)
		if _, err := usableTLSFields(); err != nil {
			cfg.Logger.Warn("TLS connections keep their input buffers: each takes some KiB more", "error", err.Error())
		}
	}
	s.limits = newLimits(&s.cfg)
	s.spreadMs.Store(1000)
	for i := range cfg.Loops {
		s.loops = append(s.loops, newLoop(s, i))
	}
	return s, nil
}

// Start listens and returns when connections are accepted. It is called once.
func (s *Server) Start() error {
	if err := s.listen(); err != nil {
		return fmt.Errorf("edge: listen on %s: %w", s.cfg.Addr, err)
	}
	return nil
}

// Addr is the address that was bound, with its port. Valid after Start.
func (s *Server) Addr() string { return s.addr }

// Connections is how many TCP connections are open, whatever their state.
func (s *Server) Connections() int { return int(s.connections.Load()) }

// Done receives one error if the server ends without Stop; all connections are closed then. It is never closed.
func (s *Server) Done() <-chan error { return s.done }

func (s *Server) crash(point string) {
	if s.cfg.CrashPoint != nil {
		s.cfg.CrashPoint(point)
	}
}

// The following methods bring what others have for connections. They may be called from any goroutine, also from within calls that a
// loop makes; they do not block and keep the order of calls per session. Lists belong to the caller again
// after the call; what they point to must not change any more.

// Answer brings answers of the Publisher.
func (s *Server) Answer(batch []protocol.Answer) {
	deliver(s, batch,
		func(a *protocol.Answer) protocol.Session { return a.To },
		func(l *loop, part []protocol.Answer) (bool, bool) {
			return l.inbox.put(func(b *inboxBatch) {
				b.answers = append(b.answers, part...)
				b.note(inboxAnswer, len(part))
			})
		})
}

// Push brings live messages. What cannot be written is told to the Acknowledger as protocol.Refused, unless
// the server has stopped.
func (s *Server) Push(batch []protocol.Push) {
	deliver(s, batch,
		func(p *protocol.Push) protocol.Session { return p.To },
		func(l *loop, part []protocol.Push) (bool, bool) {
			refused, wake, ok := l.inbox.putPushes(part)
			if len(refused) > 0 {
				s.refuse(refused)
			}
			return wake, ok
		})
}

// refuse tells the owners of pushes that did not get as far as a loop.
func (s *Server) refuse(list []protocol.Push) {
	outcomes := make([]protocol.Outcome, len(list))
	for i := range list {
		m := list[i].Message
		outcomes[i] = protocol.Outcome{Kind: protocol.Refused, Conversation: m.Conversation, Position: m.Position, ID: m.ID,
			User: []byte(m.Receiver), Device: []byte(list[i].Device)}
	}
	s.cfg.Acknowledger.Settle(outcomes)
}

// Notify says that the mailboxes of these sessions were written to.
func (s *Server) Notify(batch []protocol.Session) {
	deliver(s, batch,
		func(n *protocol.Session) protocol.Session { return *n },
		func(l *loop, part []protocol.Session) (bool, bool) { return l.inbox.putNotices(part) })
}

// Receipts brings live receipts. When the inbox of a loop is full they are read from the store later.
func (s *Server) Receipts(batch []protocol.ReceiptPush) {
	deliver(s, batch,
		func(r *protocol.ReceiptPush) protocol.Session { return r.To },
		func(l *loop, part []protocol.ReceiptPush) (bool, bool) { return l.inbox.putReceipts(part) })
}

// Page brings the answer to Mailbox.ReadPage.
func (s *Server) Page(p protocol.Page) {
	s.deliverOne(p.To, func(l *loop) (bool, bool) { return l.inbox.putPage(p) })
}

// ReceiptsPage brings the answer to Mailbox.ReadReceipts.
func (s *Server) ReceiptsPage(p protocol.ReceiptsPage) {
	s.deliverOne(p.To, func(l *loop) (bool, bool) { return l.inbox.putReceiptsPage(p) })
}

// Registered brings the answer to Registrar.Register.
func (s *Server) Registered(r protocol.Registered) {
	s.deliverOne(r.To, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.registered = append(b.registered, r)
			b.note(inboxRegistered, 1)
		})
	})
}

// Replace closes a session whose device has connected again.
func (s *Server) Replace(session protocol.Session) {
	s.deliverOne(session, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.replaced = append(b.replaced, session)
			b.note(inboxReplaced, 1)
		})
	})
}

// Disconnect ends a session because an operator wants it to: with unauthorized and 4501, upon which a client comes back with a new
// token only. That is all: whoever still has a valid token can connect again.
func (s *Server) Disconnect(session protocol.Session) {
	s.deliverOne(session, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.revoked = append(b.revoked, session)
			b.note(inboxRevoked, 1)
		})
	})
}

// verified brings the answer of a worker.
func (s *Server) verified(q *claim) {
	s.deliverOne(protocol.Session{Edge: s.cfg.EdgeID, Conn: q.conn}, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.verified = append(b.verified, q)
			b.note(inboxVerified, 1)
		})
	})
}

// handshaken makes a loop look at a TLS handshake.
func (s *Server) handshaken(conn uint64) {
	s.deliverOne(protocol.Session{Edge: s.cfg.EdgeID, Conn: conn}, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.handshaken = append(b.handshaken, conn)
			b.note(inboxHandshaken, 1)
		})
	})
}

// Fenced brings the answer to Acknowledger.Fence.
func (s *Server) Fenced(f protocol.Fence) {
	s.deliverOne(protocol.Session{Edge: f.Edge, Conn: handle(f.Loop, 0, 0)}, func(l *loop) (bool, bool) {
		return l.inbox.put(func(b *inboxBatch) {
			b.fences = append(b.fences, f)
			b.note(inboxFence, 1)
		})
	})
}

func (s *Server) deliverOne(to protocol.Session, put func(l *loop) (wake, ok bool)) {
	l := s.loopOf(to)
	if l == nil {
		s.strays.Add(1)
		return
	}
	wake, ok := put(l)
	if !ok {
		s.strays.Add(1)
	}
	if wake {
		l.driver.wake()
	}
}

// deliver puts each stretch of a list that is for one loop into its inbox.
func deliver[T any](s *Server, list []T, to func(*T) protocol.Session, put func(l *loop, part []T) (wake, ok bool)) {
	for len(list) > 0 {
		l := s.loopOf(to(&list[0]))
		n := 1
		for n < len(list) && s.loopOf(to(&list[n])) == l {
			n++
		}
		part := list[:n]
		list = list[n:]
		if l == nil {
			s.strays.Add(uint64(n))
			continue
		}
		wake, ok := put(l, part)
		if !ok {
			s.strays.Add(uint64(n))
		}
		if wake {
			l.driver.wake()
		}
	}
}

func (s *Server) loopOf(to protocol.Session) *loop {
	i := int(handleLoop(to.Conn))
	if to.Edge != s.cfg.EdgeID || i >= len(s.loops) || s.loops[i].driver == nil {
		return nil
	}
	return s.loops[i]
}

// Drain tells every client to go away and come back within spread, answers what they have sent, and closes them with 1012.
// New upgrades get 503 meanwhile. It returns when no connection from before is left, or an error when ctx ends or 8 s are over before.
func (s *Server) Drain(ctx context.Context, spread time.Duration) error {
	s.spreadMs.Store(max(1, spread.Milliseconds()))
	s.draining.Store(true)
	for _, l := range s.loops {
		if l.driver != nil {
			l.driver.wake()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, maxDrain)
	defer cancel()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for s.connections.Load() > s.late.Load() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("edge: drain: %d connections left: %w", s.connections.Load(), ctx.Err())
		case <-poll.C:
		}
	}
	return nil
}

// Stop closes every connection, without a word, and stops listening. Whoever can wait calls Drain first.
func (s *Server) Stop(ctx context.Context) error {
	if s.engine == nil {
		return nil
	}
	s.verifiers.close()
	if err := s.engine.stop(ctx); err != nil {
		return fmt.Errorf("edge: stop: %w", err)
	}
	return nil
}

// Alive is an error when an event loop is stuck.
func (s *Server) Alive() error {
	now := s.cfg.now()
	for _, l := range s.loops {
		if err := l.beat.alive(l.index, now); err != nil {
			return err
		}
	}
	return nil
}
