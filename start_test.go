package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// freeConfig serves on free ports with a data directory of its own.
func freeConfig(t *testing.T) Config {
	t.Helper()
	c := defaultConfig()
	c.Edge.Addr, c.Admin.Addr, c.Data.Dir, c.Data.MinFreeBytes = "127.0.0.1:0", "127.0.0.1:0", filepath.Join(t.TempDir(), "data"), minFreeFloor
	if err := c.validate(); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStartRefusesWhatIsTaken(t *testing.T) {
	first := freeConfig(t)
	m, err := start(t.Context(), first, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"data directory", func(c *Config) { c.Data.Dir = first.Data.Dir }, "in use by another millrace"},
		// The directory is looked at before the port is: two servers would share a port in silence.
		{"data directory and port", func(c *Config) { c.Data.Dir, c.Edge.Addr = first.Data.Dir, m.EdgeAddr() }, "in use by another millrace"},
		{"edge address", func(c *Config) { c.Edge.Addr = m.EdgeAddr() }, m.EdgeAddr()},
		{"admin address", func(c *Config) { c.Admin.Addr = m.AdminAddr() }, m.AdminAddr()},
	} {
		t.Run(c.name, func(t *testing.T) {
			second := freeConfig(t)
			c.change(&second)
			if _, err := start(t.Context(), second, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if second.Data.Dir == first.Data.Dir {
				return
			}
			// What the failed start had opened is free again.
			second.Edge.Addr, second.Admin.Addr = "127.0.0.1:0", "127.0.0.1:0"
			again, err := start(t.Context(), second, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			if err := again.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestStartHeedsItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := start(ctx, freeConfig(t), slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "canceled") {
		t.Errorf("got %v", err)
	}
}

// TestCloseIsCleanWhileTheAdminAddressIsInUse: what an operator looks at must not make a stop a failure.
func TestCloseIsCleanWhileTheAdminAddressIsInUse(t *testing.T) {
	for name, request := range map[string]string{
		"no request":  "",
		"half a head": "GET /livez HTTP/1.1\r\n",
		"a trace":     "GET /debug/pprof/trace?seconds=100 HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"a profile":   "GET /debug/pprof/profile?seconds=100 HTTP/1.1\r\nHost: localhost\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			m, err := start(t.Context(), freeConfig(t), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			conns := occupy(t, m.admin, 3, request)
			if status, body := fetch(t, unpooled(), m.admin, "/livez"); status != http.StatusOK { // so the others have been accepted
				t.Errorf("livez: %d %s", status, body)
			}
			if strings.Contains(request, "seconds") {
				// The first of three gets its profile, which ends with the server; only one can be taken at a time.
				awaitHeld(t, m.admin)
			}
			if err := m.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			awaitClosed(t, conns, len(conns))
		})
	}
}

// awaitHeld waits until a request that takes long is being answered.
func awaitHeld(t *testing.T, a *adminServer) {
	t.Helper()
	for range 1000 {
		a.listener.mu.Lock()
		for _, c := range a.listener.open {
			if c.held {
				a.listener.mu.Unlock()
				return
			}
		}
		a.listener.mu.Unlock()
		<-time.After(5 * time.Millisecond)
	}
	t.Fatal("no request is being answered")
}

// TestServeCommand runs the program as a user does: no configuration but ports and a directory, hints on
// standard output, logs on standard error, SIGTERM, exit code 0.
func TestServeCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	hints, out := io.Pipe()
	var log bytes.Buffer
	exited := make(chan int, 1)
	go func() {
		exited <- run([]string{"--edge-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0", "--data-dir", dir, "--data-min-free", "1MiB"},
			&program{name: "millrace", in: strings.NewReader(""), out: out, err: &log})
		out.Close()
	}()
	// The pipe holds the program back until each hint is read, and signals are caught before the first.
	buffer := make([]byte, 16<<10)
	n, err := hints.Read(buffer)
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	go io.Copy(io.Discard, hints)

	admin := regexp.MustCompile(`http://(127\.0\.0\.1:[1-9][0-9]*) `).FindSubmatch(buffer[:n])
	if admin == nil {
		t.Fatalf("no admin address in\n%s", buffer[:n])
	}
	awaitReady(t, "http://"+string(admin[1])+"/readyz?verbose")
	if code, token, problem := command("token", "alice", "--data-dir", dir); code != exitOK || strings.Count(token, ".") != 2 {
		t.Errorf("token while serving: code %d, %q", code, problem)
	}
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGTERM} { // the first only reloads
		if err := syscall.Kill(os.Getpid(), sig); err != nil {
			t.Fatal(err)
		}
	}
	if code := <-exited; code != exitOK {
		t.Errorf("exit code %d", code)
	}
	for _, want := range []string{`"msg":"serving","edge":"127.0.0.1:`, `"msg":"draining"`, `"msg":"stopped"`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%s is missing in\n%s", want, log.String())
		}
	}
}

// awaitReady asks until the server is ready, as an orchestrator does.
func awaitReady(t *testing.T, url string) {
	t.Helper()
	var body []byte
	for range 500 {
		response, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, err = io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if response.StatusCode == http.StatusOK {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Fatalf("not ready:\n%s", body)
}
