package main

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// adminListener never has more connections than most: a further one takes the place of the one that has waited longest. Thus idle
// connections can neither use up the descriptors of the process, which would end the event loops of the edge, nor keep a
// scrape or a probe out.
type adminListener struct {
	// Immutable.
	net.Listener
	most int

	mu      sync.Mutex
	open    map[net.Conn]adminConn // guarded by mu
	turns   uint64                 // guarded by mu: counts what happens to connections, to tell what was long ago
	evicted uint64                 // guarded by mu
}

// adminConn is what the listener knows of a connection.
type adminConn struct {
	since uint64 // the turn of its accept, or of its last request's beginning or end
	held  bool   // an answer is being made that takes long: not to be evicted
}

func newAdminListener(l net.Listener, most int) *adminListener {
	return &adminListener{Listener: l, most: most, open: make(map[net.Conn]adminConn, most)}
}

// Accept waits for the next connection and makes room for it.
func (l *adminListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if out := l.admit(c); out != nil {
		out.Close() // frees the descriptor before it returns; what it says of a dead connection is of no use
	}
	return c, nil
}

// admit takes c in and gives the connection that has to go for it, if one has to.
func (l *adminListener) admit(c net.Conn) (out net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) >= l.most {
		out = l.longestWaiting()
		delete(l.open, out)
		l.evicted++
	}
	l.turns++
	l.open[c] = adminConn{since: l.turns}
	return out
}

// longestWaiting is never nil: fewer connections can be held than there are, see gate.
func (l *adminListener) longestWaiting() (oldest net.Conn) {
	for c, state := range l.open {
		if !state.held && (oldest == nil || state.since < l.open[oldest].since) {
			oldest = c
		}
	}
	return oldest
}

// track is the http.Server's ConnState.
func (l *adminListener) track(c net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch state {
	case http.StateActive, http.StateIdle:
		if known, ok := l.open[c]; ok {
			l.turns++
			known.since = l.turns
			l.open[c] = known
		}
	case http.StateClosed, http.StateHijacked:
		delete(l.open, c)
	}
}

func (l *adminListener) hold(c net.Conn, held bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if known, ok := l.open[c]; ok {
		known.held = held
		l.open[c] = known
	}
}

// Evicted is how many connections had to make room.
func (l *adminListener) Evicted() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.evicted
}

// adminConnKey finds the connection of a request in its context.
type adminConnKey struct{}

// withConn is the http.Server's ConnContext.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, adminConnKey{}, c)
}

// gate lets at most that many requests to next run at once and holds their connections. Everything that takes long stands
// behind a gate, and all gates together let fewer through than there are connections.
func (l *adminListener) gate(most int, next http.Handler) http.Handler {
	running := make(chan struct{}, most)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case running <- struct{}{}:
			defer func() { <-running }()
		default:
			answer(w, http.StatusServiceUnavailable, "As many of these requests are running as may run at once.\n")
			return
		}
		if c, ok := r.Context().Value(adminConnKey{}).(net.Conn); ok {
			l.hold(c, true)
			defer l.hold(c, false)
		}
		next.ServeHTTP(w, r)
	})
}
