package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"
)

// How long going away may take, from the signal to the exit. Service managers wait at least 10 s
// before they kill.
const (
	shutdownLimit = 9500 * time.Millisecond
	drainLimit    = 8 * time.Second // the rest is for flushing and closing the database

	// reloadLimit is for all that SIGHUP reads again.
	reloadLimit = 30 * time.Second
)

// exitCode ends the program with this code; what had to be said is already logged.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// server is what supervise needs of a Millrace.
type server interface {
	// Drain stops taking clients and work and finishes what is in flight, or returns an error when ctx ends before.
	Drain(ctx context.Context) error
	// Close frees everything; what was answered is already durable.
	Close() error
	// Done receives the failure that ended the server, if it was not Close.
	Done() <-chan error
}

// supervise runs a server from start to its end: the first signal drains it and returns nil, a second one returns at once.
// Every other result is an exitCode; the reason is logged. The context given to start lives as long as the server.
func supervise[S server](start func(context.Context) (S, error), started func(S), signals <-chan os.Signal, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	type result struct {
		server S
		err    error
	}
	starting := make(chan result, 1)
	go func() {
		s, err := start(ctx)
		starting <- result{s, err}
	}()

	var r result
	select {
	case r = <-starting:
	case sig := <-signals: // opening the database can take a while after a crash
		log.Info("interrupted while starting", "signal", sig.String())
		cancel()
		select {
		case r = <-starting:
		case <-signals:
			return secondSignal(log)
		}
		if r.err != nil {
			return nil
		}
		return stop(r.server, signals, log)
	}
	if r.err != nil {
		log.Error("cannot start", "error", r.err.Error())
		return exitCode(1)
	}
	started(r.server)
	select {
	case sig := <-signals:
		log.Info("draining", "signal", sig.String(), "limit", drainLimit.String())
		return stop(r.server, signals, log)
	case err := <-r.server.Done():
		if err == nil {
			err = errors.New("the server stopped by itself")
		}
		log.Error("fatal", "error", err.Error())
		if err := r.server.Close(); err != nil {
			log.Error("close", "error", err.Error())
		}
		return exitCode(1)
	}
}

// stop drains and closes within shutdownLimit. A drain that does not finish in time loses nothing, since
// everything answered is durable and everything unanswered is resent: it is a warning.
func stop(s server, signals <-chan os.Signal, log *slog.Logger) error {
	begun := time.Now()
	closed := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
		defer cancel()
		if err := s.Drain(ctx); err != nil {
			log.Warn("drain ended early", "error", err.Error())
		}
		closed <- s.Close()
	}()
	limit := time.NewTimer(shutdownLimit)
	defer limit.Stop()
	select {
	case err := <-closed:
		if err != nil {
			log.Error("close", "error", err.Error())
			return exitCode(1)
		}
		log.Info("stopped", "took", time.Since(begun).Round(time.Millisecond).String())
		return nil
	case <-signals:
		return secondSignal(log)
	case <-limit.C:
		log.Error("did not stop in time, exiting", "limit", shutdownLimit.String())
		return exitCode(1)
	}
}

// reloadOn calls reload for each signal, until ended is closed.
func reloadOn(signals <-chan os.Signal, ended <-chan struct{}, reload func(context.Context) error, log *slog.Logger) {
	for {
		select {
		case <-signals:
			ctx, cancel := context.WithTimeout(context.Background(), reloadLimit)
			if err := reload(ctx); err != nil {
				log.Error("reload", "error", err.Error())
			} else {
				log.Info("reloaded")
			}
			cancel()
		case <-ended:
			return
		}
	}
}

func secondSignal(log *slog.Logger) error {
	log.Warn("second signal, exiting at once")
	return exitCode(1)
}

// welcome says what a running server offers and what to type next. command is how this program was called.
func welcome(w io.Writer, c *configuration, edgeAddr, adminAddr, command string) {
	fmt.Fprintf(w, `millrace is serving
  clients  %s
  admin    http://%s  (/metrics /livez /readyz?verbose /debug/pprof/)
  data     %s
`, clientURL(c.Config, edgeAddr), adminAddr, c.Data.Dir)
	if c.signs() {
		fmt.Fprintf(w, `
Talk to yourself, in two terminals:
  %[1]s chat --as alice --with bob%[2]s
  %[1]s chat --as bob --with alice%[2]s

A token for any other client:
  %[1]s token alice%[3]s
`, command, chatFlags(c, edgeAddr), secretFlags(c))
	}
	if c.developmentSecret() {
		fmt.Fprintf(w, `
Tokens are signed with the development secret in %s,
so only this machine may connect. For others:
%s
`, secretPath(c.Config), indent(realSecretAdvice, "  "))
	}
	fmt.Fprintln(w)
}

// endpoint is the URL under which a client on this machine reaches a listener.
func endpoint(addr string) string { return "ws://" + reachable(addr) + "/ws" }

// reachable is the host:port under which this machine reaches a listener.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	switch host {
	case "", "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}

// secretFlags are the flags that `token` and `chat` need to find the same secret.
func secretFlags(c *configuration) string {
	var b strings.Builder
	for _, name := range []string{"data-dir", "auth-secret-file", "auth-issuer", "auth-audience"} {
		if c.origins[name] != "default" {
			fmt.Fprintf(&b, " --%s %s", name, shellWord(findSetting(name).value(&c.Config).text()))
		}
	}
	return b.String()
}

func chatFlags(c *configuration, edgeAddr string) string {
	flags := secretFlags(c)
	if url := clientURL(c.Config, edgeAddr); url != endpoint(findSetting("edge-addr").fallback) {
		flags += " --url " + url
	}
	return flags
}

// shellWord quotes what a shell would take apart.
func shellWord(text string) string {
	if text != "" && strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-") == "" {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

func indent(text, by string) string { return by + strings.ReplaceAll(text, "\n", "\n"+by) }
