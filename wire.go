package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync/atomic"
	"time"

	"millrace/backend"
	"millrace/backend/embedded"
	"millrace/edge"
	"millrace/protocol"
	"millrace/protocol/token"
	"millrace/router"
)

// drainSpread is the window over which clients that are told to go away come back.
const drainSpread = 10 * time.Second

// How long each may take to close, which together is less than what shutdownLimit leaves after a drain.
const (
	adminCloseLimit = 250 * time.Millisecond
	edgeCloseLimit  = time.Second
)

// edgeID names this process's edge in sessions. With one process there is one.
const edgeID = 1

// Millrace is the whole server in one process: the three islands, joined. The router is the table itself and the edge a
// function call away; a cluster replaces these two by their remote twins.
type Millrace struct {
	tokens   *token.Verifier
	tls      *certificates // nil: no TLS
	stopKeys context.CancelFunc
	store    *embedded.DB
	table    *router.Table
	owner    *backend.Server
	edge     *edge.Server
	admin    *adminServer
	log      *slog.Logger

	footprint footprint

	draining atomic.Bool
	done     chan error
	closing  atomic.Bool
}

// start opens the data directory, which locks it, and then serves. It returns when both listeners accept.
func start(ctx context.Context, cfg Config, log *slog.Logger) (m *Millrace, err error) {
	verifier, err := openVerifier(cfg, log)
	if err != nil {
		return nil, err
	}
	pair, err := openCertificates(cfg, log)
	if err != nil {
		return nil, err
	}
	if err := protectData(cfg.Data.Dir, log); err != nil {
		return nil, err
	}
	m = &Millrace{tokens: verifier, tls: pair, table: router.NewTable(), log: log, done: make(chan error, 1)}
	begun := m // m is nil where an error is returned
	defer func() {
		if err != nil {
			err = errors.Join(err, begun.Close())
		}
	}()
	m.store, err = embedded.Open(embedded.Config{Dir: cfg.Data.Dir, MinFreeBytes: uint64(cfg.Data.MinFreeBytes), Logger: log})
	if err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	identity := m.store.Identity()
	// The edge and the owners call each other; toEdge is set before either runs.
	toEdge := &edgeLink{}
	m.owner, err = backend.NewServer(backend.Config{Queue: m.store, Store: m.store, Locator: m.table, Pusher: toEdge,
		// Not method values: they would bind the edge that is not there yet.
		Answer:       func(batch []protocol.Answer) { toEdge.Answer(batch) },
		Page:         func(page protocol.Page) { toEdge.Page(page) },
		ReceiptsPage: func(page protocol.ReceiptsPage) { toEdge.ReceiptsPage(page) },
		Fenced:       func(f protocol.Fence) { toEdge.Fenced(f) }, Identity: identity[:], Logger: log,
		NotBeforeMs: m.store.LastMs()})
	if err != nil {
		return nil, err
	}
	remote, loopback := cfg.Edge.addressLimits()
	m.edge, err = edge.New(edge.Config{
		Addr: cfg.Edge.Addr, MaxConnections: cfg.Edge.MaxConnections, Origins: cfg.Edge.Origins,
		Rate:             edge.RateLimit{PerSecond: float64(cfg.Edge.MessageRate), Burst: cfg.Edge.MessageBurst},
		HeartbeatSeconds: cfg.Edge.HeartbeatSeconds,
		User:             cfg.Edge.userLimit(), Address: remote, Loopback: loopback, ProxyNetworks: cfg.Edge.ProxyNetworks,
		EdgeID: edgeID, Token: verifier, Publisher: m.owner, Acknowledger: m.owner, Mailbox: m.owner,
		Registrar: &registrar{store: m.store, table: m.table, edge: toEdge}, Logger: log, CrashPoint: backend.CrashPoint,
		Certificate: pair.source(),
	})
	if err != nil {
		return nil, err
	}
	toEdge.Server = m.edge
	m.store.Start(m.owner.Hooks())
	m.owner.Start()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := m.edge.Start(); err != nil {
		return nil, fmt.Errorf("serve clients: %w", err)
	}
	m.admin, err = openAdmin(cfg.Admin.Addr, m, log)
	if err != nil {
		return nil, err
	}
	keys, stop := context.WithCancel(context.Background())
	m.stopKeys = stop
	go m.tokens.Run(keys)
	go m.tls.run(keys)
	runtime.GC() // what starting has left behind is no headroom for what follows
	m.footprint.begin()
	go m.watch()
	return m, nil
}

// watch reports what ends the server without being asked to.
func (m *Millrace) watch() {
	var err error
	select {
	case err = <-m.edge.Done():
		if err == nil {
			err = errors.New("event loops stopped")
		}
	case err = <-m.admin.Done():
	}
	if !m.closing.Load() {
		m.done <- err
	}
}

// EdgeAddr is what was bound for clients.
func (m *Millrace) EdgeAddr() string { return m.edge.Addr() }

// AdminAddr is what was bound for operators.
func (m *Millrace) AdminAddr() string { return m.admin.Addr() }

// Done receives the failure that ended the server, if it was not Close.
func (m *Millrace) Done() <-chan error { return m.done }

// Draining reports whether the server is going away.
func (m *Millrace) Draining() bool { return m.draining.Load() }

// Drain refuses new clients, tells the others to come back later, finishes what is in flight and flushes
// what the owners want stored.
func (m *Millrace) Drain(ctx context.Context) error {
	m.draining.Store(true)
	err := m.edge.Drain(ctx, drainSpread)
	if err != nil {
		err = fmt.Errorf("drain clients: %w", err)
	}
	return errors.Join(err, m.owner.Flush(ctx))
}

// Close stops everything, in the order in which work flows. What was answered is durable already.
func (m *Millrace) Close() error {
	m.closing.Store(true)
	if m.stopKeys != nil {
		m.stopKeys()
	}
	var errs []error
	if m.admin != nil {
		errs = append(errs, within(adminCloseLimit, m.admin.Close))
	}
	if m.edge != nil && m.edge.Addr() != "" {
		errs = append(errs, within(edgeCloseLimit, m.edge.Stop))
	}
	if m.owner != nil {
		m.owner.Close()
	}
	if m.store != nil {
		errs = append(errs, m.store.Close())
	}
	return errors.Join(errs...)
}

// within gives each step a time of its own: what is left by a slow one may be too little for the next.
func within(limit time.Duration, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return step(ctx)
}

// Reload reads again what may change while serving: the keys that verify tokens, and the certificate. What is wrong changes nothing.
func (m *Millrace) Reload(ctx context.Context) error {
	return errors.Join(m.tokens.Refresh(ctx), m.tls.reload())
}

// Disconnect ends the sessions of a user, on all devices, and tells how many there were. Who has a valid token can connect again.
func (m *Millrace) Disconnect(user string) int {
	routes := m.table.Locate(nil, user)
	for i := range routes {
		m.edge.Disconnect(routes[i].Session)
	}
	m.log.Info("sessions ended by an operator", "sessions", len(routes))
	return len(routes)
}

// Alive is an error when only a restart can help.
func (m *Millrace) Alive() error { return errors.Join(m.edge.Alive(), m.store.Alive()) }

// Ready lists what must hold for new clients to be sent here.
func (m *Millrace) Ready() []Check {
	checks := []Check{{Name: "store", Err: m.store.Healthy()}, {Name: "edge", Err: m.edge.Alive()}}
	var replay error
	if !m.owner.CaughtUp() {
		replay = errors.New("replaying what was unfinished before the restart")
	}
	return append(checks, Check{Name: "delivery", Err: replay}, Check{Name: "token keys", Err: m.tokens.Ready()})
}

// Metrics gives the figures of every island.
func (m *Millrace) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	m.edge.Metrics(emit)
	m.tokens.Metrics(emit)
	m.tls.metrics(emit)
	m.table.Metrics(emit)
	m.owner.Metrics(emit)
	m.store.Metrics(emit)
	m.footprint.metrics(emit, m.edge.Connections())
}

// edgeLink is the edge as the owners see it; in a cluster edge.Links takes its place.
type edgeLink struct{ *edge.Server }

// registrar joins the store's devices and the router's routes to what the edge calls a Registrar.
type registrar struct {
	store *embedded.DB
	table *router.Table
	edge  *edgeLink
}

// Register makes the device and the block durable, then binds the route as draining, then tells the edge.
func (r *registrar) Register(q protocol.Registration) {
	r.store.Register(backend.Stream{User: q.User, Device: q.Device, Epoch: q.Epoch},
		func(block uint32, heir bool, refusal protocol.Refusal) {
			if refusal.Code == protocol.OK {
				old, replaced, ok := r.table.Bind(q.User, q.Device, q.Session, q.Login)
				if !ok { // a connection accepted later was faster
					refusal = protocol.Refusal{Code: protocol.CodeSessionReplaced}
				}
				if replaced {
					r.edge.Replace(old)
				}
			}
			r.edge.Registered(protocol.Registered{To: q.Session, Block: block, Heir: heir, Refusal: refusal})
		})
}

// SetState passes the session's state on to the table.
func (r *registrar) SetState(user, device []byte, s protocol.Session, live bool) {
	r.table.SetState(user, device, s, live)
}

// Unregister removes the route, if it is still this session's.
func (r *registrar) Unregister(user, device []byte, s protocol.Session) {
	r.table.Unbind(user, device, s)
}
