package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/panjf2000/gnet/v2"
)

// This file is all that knows gnet. What gnet leaves to its users and is done here:
//
//   - An accept that fails for want of descriptors stops the engine, and Run returns nil. So there are fewer connections than
//     descriptors, and Run returning before stop was called is an error.
//   - A task given to a loop after the engine has stopped would write to a descriptor that is closed, or another's by then. So
//     nothing is given to a loop once OnShutdown was called, which is before anything is closed.
//   - OnTick runs on a goroutine of its own: it posts a sweep to each loop.
//   - With SO_REUSEPORT each loop accepts for itself, so that accept, OnOpen and close of a connection share a turn of its loop and
//     the limit in OnOpen is exact. But port 0 would give each loop another port, and a second server would share the port
//     in silence; see reserve.
//   - Outbound buffers are without limit (downlink.go counts), and inbound ones too if anything is left in them:
//     OnTraffic takes everything.

const (
	socketSendBytes = 64 << 10 // SO_SNDBUF: with the outbound budget, what a slow reader can hold
	ringBytes       = 8 << 10  // the largest pooled ring of outbound bytes; the rest is a list
	keepAlive       = 2 * time.Minute
)

// engine is the gnet event handler of a server.
type engine struct {
	gnet.BuiltinEventEngine
	server  *Server
	handle  gnet.Engine
	loops   []*gnetLoop
	started chan struct{} // closed when all loops listen
	exited  chan struct{} // closed when Run has returned
	runErr  error         // of Run; after exited
	ticking bool          // owned by OnTick

	mu    sync.RWMutex
	bound int // loops that have met their gnet.EventLoop

	stopping atomic.Bool
}

// gnetLoop is the driver of one loop.
type gnetLoop struct {
	loop *loop

	mu      sync.Mutex
	handle  gnet.EventLoop // nil until the first connection
	stopped bool
}

func (s *Server) listen() error {
	port, err := reserve(s.cfg.Addr)
	if err != nil {
		return err
	}
	defer port.release()
	s.addr = port.bound
	e := &engine{server: s, started: make(chan struct{}), exited: make(chan struct{})}
	for _, l := range s.loops {
		g := &gnetLoop{loop: l}
		l.driver = g
		e.loops = append(e.loops, g)
	}
	s.engine = e
	go e.run(port.network + "://" + port.addr)
	select {
	case <-e.started:
		return nil
	case <-e.exited:
		return fmt.Errorf("start event loops: %w", e.failure())
	}
}

func (e *engine) run(addr string) {
	e.runErr = gnet.Run(e, addr, engineOptions(len(e.loops), e.server.cfg.Logger)...)
	close(e.exited)
	if !e.stopping.Load() {
		select {
		case <-e.started:
			e.server.done <- fmt.Errorf("edge: event loops ended by themselves: %w", e.failure())
		default: // listen tells
		}
	}
}

func engineOptions(loops int, log *slog.Logger) []gnet.Option {
	return []gnet.Option{
		gnet.WithNumEventLoop(loops),
		gnet.WithReusePort(true),
		gnet.WithReuseAddr(true),
		gnet.WithTCPKeepAlive(keepAlive),
		gnet.WithSocketSendBuffer(socketSendBytes),
		gnet.WithWriteBufferCap(ringBytes),
		gnet.WithTicker(true),
		gnet.WithLogger(&gnetLogger{log: log}),
	}
}

// failure is what Run said. It says nothing when accept failed.
func (e *engine) failure() error {
	if e.runErr != nil {
		return e.runErr
	}
	return errors.New("a loop failed; the reason is in the log")
}

func (e *engine) stop(ctx context.Context) error {
	e.stopping.Store(true)
	stopped := make(chan error, 1)
	go func() { stopped <- e.handle.Stop(ctx) }()
	select {
	case <-e.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// OnBoot is called before any loop runs.
func (e *engine) OnBoot(g gnet.Engine) gnet.Action {
	e.handle = g
	return gnet.None
}

// OnShutdown is called before connections and loops are closed.
func (e *engine) OnShutdown(gnet.Engine) {
	for _, g := range e.loops {
		g.mu.Lock()
		g.stopped = true
		g.mu.Unlock()
		g.loop.inbox.close()
	}
}

// OnTick is called once all loops listen, and then every 100 ms.
func (e *engine) OnTick() (time.Duration, gnet.Action) {
	if !e.ticking {
		e.ticking = true
		close(e.started)
	}
	now := e.server.cfg.now()
	for _, g := range e.loops {
		if g.running() && g.loop.beat.post(now) {
			g.execute((*sweepTask)(g.loop))
		}
	}
	return tickMillis * time.Millisecond, gnet.None
}

// OnOpen takes in a connection, or refuses it when a limit says so.
func (e *engine) OnOpen(c gnet.Conn) (out []byte, action gnet.Action) {
	opened, refusal := e.loopOf(c.EventLoop()).accept(c, remote(c))
	if opened == nil {
		return refusal, gnet.Close
	}
	c.SetContext(opened)
	return nil, gnet.None
}

// remote is the peer's address, invalid when it is none of IP.
func remote(c gnet.Conn) netip.Addr {
	a, _ := c.RemoteAddr().(*net.TCPAddr)
	return a.AddrPort().Addr() // of nil, too
}

// loopOf finds the loop of a gnet loop. They meet at the first connection: gnet shows its loops nowhere else.
func (e *engine) loopOf(handle gnet.EventLoop) *loop {
	e.mu.RLock()
	for _, g := range e.loops[:e.bound] {
		if g.handle == handle {
			e.mu.RUnlock()
			return g.loop
		}
	}
	e.mu.RUnlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	g := e.loops[e.bound]
	e.bound++
	g.mu.Lock()
	g.handle = handle
	g.mu.Unlock()
	return g.loop
}

// OnTraffic is called when bytes have arrived.
func (e *engine) OnTraffic(c gnet.Conn) gnet.Action {
	data, err := c.Next(-1)
	cn, ok := c.Context().(*conn)
	if err != nil || !ok {
		return gnet.Close
	}
	if e.server.loops[cn.loop].traffic(cn, data) {
		parted(cn.sock)
		return gnet.Close
	}
	return gnet.None
}

// parted says goodbye on a TLS connection and returns the gnet connection, or nil when it is closed by then.
func parted(s socket) gnet.Conn {
	t, ok := s.(*tlsSocket)
	if !ok {
		return s.(gnet.Conn)
	}
	if t.part(); t.closed {
		return nil
	}
	return t.raw.(gnet.Conn)
}

// OnClose is called before the descriptor is closed, also from within Write.
func (e *engine) OnClose(c gnet.Conn, _ error) gnet.Action {
	if cn, ok := c.Context().(*conn); ok {
		c.SetContext(nil)
		e.server.loops[cn.loop].closed(cn)
	}
	return gnet.None
}

func (g *gnetLoop) running() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.handle != nil && !g.stopped
}

func (g *gnetLoop) wake() { g.execute((*drainTask)(g.loop)) }

// execute runs a task on the loop. It fails only while the engine stops, and then nothing is lost by it. The lock is held meanwhile:
// once OnShutdown has set stopped, no task is on its way to a closed descriptor.
func (g *gnetLoop) execute(task gnet.Runnable) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.handle != nil && !g.stopped {
		if err := g.handle.Execute(context.Background(), task); err != nil {
			g.loop.server.cfg.Logger.Debug("wake an event loop", "error", err.Error())
		}
	}
}

func (g *gnetLoop) closeSocket(s socket) {
	c := parted(s)
	if c == nil {
		return
	}
	if err := c.EventLoop().Close(c); err != nil {
		g.loop.server.cfg.Logger.Debug("close a connection", "error", err.Error())
	}
}

func (g *gnetLoop) closeWrite(s socket) {
	if parted(s) == nil || s.OutboundBuffered() > 0 { // the peer has the word of TLS then, and closes
		return
	}
	// The peer may be gone already, which its close event will tell.
	_ = syscall.Shutdown(s.Fd(), syscall.SHUT_WR)
}

type drainTask loop

func (t *drainTask) Run(context.Context) error {
	(*loop)(t).drainInbox()
	return nil
}

type sweepTask loop

func (t *sweepTask) Run(context.Context) error {
	(*loop)(t).sweep()
	return nil
}

// reservation holds a port until gnet listens on it.
type reservation struct {
	fd      int
	network string // of gnet
	addr    string // of gnet: without a host for every address of both families
	bound   string // for people
}

// reserve binds a socket to addr without SO_REUSEPORT and does not listen. It fails if anyone listens on the
// port, which gnet's own sockets, sharing it by SO_REUSEPORT, would not notice. Port 0 becomes a port. As long as the socket is
// bound no one else gets that port, and since it does not listen and both have SO_REUSEADDR, gnet does.
func reserve(addr string) (r reservation, err error) {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return r, err
	}
	var family int
	var sa syscall.Sockaddr
	switch ip4 := a.IP.To4(); {
	case ip4 != nil:
		r.network, family = "tcp4", syscall.AF_INET
		sa = &syscall.SockaddrInet4{Port: a.Port, Addr: [4]byte(ip4)}
	case a.IP != nil:
		r.network, family = "tcp6", syscall.AF_INET6
		sa6 := &syscall.SockaddrInet6{Port: a.Port, Addr: [16]byte(a.IP.To16())}
		if a.Zone != "" {
			nic, err := net.InterfaceByName(a.Zone)
			if err != nil {
				return r, err
			}
			sa6.ZoneId = uint32(nic.Index)
		}
		sa = sa6
	default: // every address; without IPv6, those of IPv4
		r.network, family = "tcp", syscall.AF_INET6
		sa = &syscall.SockaddrInet6{Port: a.Port}
	}
	if r.fd, err = bindSocket(family, sa, r.network == "tcp6"); err != nil && r.network == "tcp" {
		if r.fd, err = bindSocket(syscall.AF_INET, &syscall.SockaddrInet4{Port: a.Port}, false); err == nil {
			r.network = "tcp4"
		}
	}
	if err != nil {
		return r, err
	}
	bound, err := syscall.Getsockname(r.fd)
	if err != nil {
		r.release()
		return r, os.NewSyscallError("getsockname", err)
	}
	switch b := bound.(type) {
	case *syscall.SockaddrInet4:
		a.Port = b.Port
	case *syscall.SockaddrInet6:
		a.Port = b.Port
	}
	r.addr = a.String()
	if a.IP == nil {
		a.IP = net.IPv6unspecified
		if r.network == "tcp4" {
			a.IP = net.IPv4zero
		}
	}
	r.bound = a.String()
	return r, nil
}

func bindSocket(family int, sa syscall.Sockaddr, only6 bool) (fd int, err error) {
	syscall.ForkLock.RLock()
	fd, err = syscall.Socket(family, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err == nil && family == syscall.AF_INET6 {
		v := 0
		if only6 {
			v = 1
		}
		err = syscall.SetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY, v)
	}
	if err != nil {
		_ = syscall.Close(fd)
		return -1, os.NewSyscallError("setsockopt", err)
	}
	if err = syscall.Bind(fd, sa); err != nil {
		_ = syscall.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

func (r *reservation) release() { _ = syscall.Close(r.fd) }

// gnetLogger brings gnet's lines into ours. What it tells as information is of interest to who debugs gnet; of its warnings,
// which come in floods when many connections close at once, one a second is logged.
type gnetLogger struct {
	log      *slog.Logger
	lastWarn atomic.Int64
}

func (g *gnetLogger) Debugf(format string, args ...any) { g.at(slog.LevelDebug, format, args) }
func (g *gnetLogger) Infof(format string, args ...any)  { g.at(slog.LevelDebug, format, args) }
func (g *gnetLogger) Errorf(format string, args ...any) { g.at(slog.LevelError, format, args) }

func (g *gnetLogger) Warnf(format string, args ...any) {
	now, last := time.Now().Unix(), g.lastWarn.Load()
	if now != last && g.lastWarn.CompareAndSwap(last, now) {
		g.at(slog.LevelWarn, format, args)
	}
}

// Fatalf does not end the process: gnet calls it for nothing that Run does not also return.
func (g *gnetLogger) Fatalf(format string, args ...any) { g.at(slog.LevelError, format, args) }

func (g *gnetLogger) at(level slog.Level, format string, args []any) {
	if g.log.Enabled(context.Background(), level) {
		g.log.Log(context.Background(), level, "gnet", "line", fmt.Sprintf(format, args...))
	}
}
