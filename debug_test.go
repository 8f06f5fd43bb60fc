package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
)

// fakeSource is a program as the admin server sees it.
type fakeSource struct {
	metrics  func(emit func(name, help string, counter bool, value float64, labels ...string))
	ready    []Check
	alive    error
	draining bool

	disconnected []string
}

func (s *fakeSource) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	if s.metrics != nil {
		s.metrics(emit)
	}
}
func (s *fakeSource) Ready() []Check { return s.ready }
func (s *fakeSource) Alive() error   { return s.alive }
func (s *fakeSource) Draining() bool { return s.draining }
func (s *fakeSource) Disconnect(user string) int {
	s.disconnected = append(s.disconnected, user)
	return len(user)
}

func admin(t *testing.T, s *fakeSource) (get func(path string) (status int, body string)) {
	t.Helper()
	a := openTestAdmin(t, s)
	return func(path string) (int, string) {
		t.Helper()
		return fetch(t, http.DefaultClient, a, path)
	}
}

func openTestAdmin(t *testing.T, s *fakeSource) *adminServer {
	t.Helper()
	a, err := openAdmin("127.0.0.1:0", s, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(context.Background()); err != nil {
			t.Error(err)
		}
		select {
		case err := <-a.Done():
			t.Errorf("closing is reported as a failure: %v", err)
		default:
		}
	})
	return a
}

func fetch(t *testing.T, c *http.Client, a *adminServer, path string) (status int, body string) {
	t.Helper()
	r, err := c.Get("http://" + a.Addr() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	read, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(read)
}

func TestProbes(t *testing.T) {
	broken := errors.New("disk\nfull")
	for _, c := range []struct {
		name   string
		source fakeSource
		path   string
		status int
		body   string
	}{
		{"alive", fakeSource{}, "/livez", 200, "ok\n"},
		{"dead", fakeSource{alive: broken}, "/livez", 503, "[-]process failed: disk; full\nlivez check failed\n"},
		{"ready", fakeSource{ready: []Check{{"store", nil}}}, "/readyz", 200, "ok\n"},
		{"ready, in words", fakeSource{ready: []Check{{"store", nil}}}, "/readyz?verbose", 200,
			"[+]process ok\n[+]store ok\n[+]shutdown ok\nreadyz check ok\n"},
		{"not ready", fakeSource{ready: []Check{{"edge", nil}, {"store", broken}}}, "/readyz", 503,
			"[+]process ok\n[+]edge ok\n[-]store failed: disk; full\n[+]shutdown ok\nreadyz check failed\n"},
		{"draining", fakeSource{draining: true}, "/readyz", 503, "[+]process ok\n[-]shutdown failed: draining\nreadyz check failed\n"},
		{"draining is alive", fakeSource{draining: true}, "/livez", 200, "ok\n"},
		{"index", fakeSource{}, "/", 200, adminIndex},
		{"nowhere", fakeSource{}, "/nowhere", 404, "404 page not found\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if status, body := admin(t, &c.source)(c.path); status != c.status || body != c.body {
				t.Errorf("got %d %q, want %d %q", status, body, c.status, c.body)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	get := admin(t, &fakeSource{metrics: func(emit func(name, help string, counter bool, value float64, labels ...string)) {
		emit("millrace_edge_connections", "Open connections.", false, 3)
		emit("millrace_edge_frames_total", "Frames.", true, 5, "direction", "in")
		emit("millrace_edge_frames_total", "Frames.", true, 7, "direction", "out")
		// Two islands may watch the same promise.
		emit("millrace_edge_invariant_violations_total", "At the edge.", true, 1, "promise", "P3")
		emit("millrace_backend_invariant_violations_total", "At the owner.", true, 2, "promise", "P3")
		emit("millrace_bad-name", "Not a name: costs one value, not the scrape.", false, 1)
	}})
	status, body := get("/metrics")
	if status != 200 {
		t.Fatalf("status %d: %s", status, body)
	}
	for _, want := range []string{
		"# TYPE millrace_edge_connections gauge\nmillrace_edge_connections 3\n",
		"# TYPE millrace_edge_frames_total counter\nmillrace_edge_frames_total{direction=\"in\"} 5\nmillrace_edge_frames_total{direction=\"out\"} 7\n",
		"millrace_invariant_violations_total{promise=\"P3\"} 3\n",
		"millrace_build_info{commit=",
		"\ngo_goroutines ",
		"\nprocess_open_fds ",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("%q is missing in\n%s", want, body)
		}
	}
	if strings.Contains(body, "edge_invariant") {
		t.Error("an island's violations have a name of their own")
	}
	if strings.Contains(body, "bad-name") {
		t.Error("an invalid metric was written")
	}
}

func TestProfilesAreServed(t *testing.T) {
	get := admin(t, &fakeSource{})
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline"} {
		if status, body := get(path); status != 200 || body == "" {
			t.Errorf("%s: status %d, %d bytes", path, status, len(body))
		}
	}
}

// TestProfilesEnd: net/http/pprof itself takes any number of seconds.
func TestProfilesEnd(t *testing.T) {
	get := admin(t, &fakeSource{})
	for _, path := range []string{"trace?seconds=120.1", "profile?seconds=86400", "heap?seconds=1000000", "trace?seconds=Inf", "trace?seconds=NaN",
		"trace?seconds=1&seconds=500"} {
		if status, body := get("/debug/pprof/" + path); status != 400 || body != "seconds: at most 120.\n" {
			t.Errorf("%s: status %d %.100q", path, status, body)
		}
	}
	for _, path := range []string{"trace?seconds=0.01", "goroutine?seconds=1"} {
		if status, body := get("/debug/pprof/" + path); status != 200 {
			t.Errorf("%s: status %d %.100q", path, status, body)
		}
	}
}

func TestAdminNamesATakenAddress(t *testing.T) {
	a, err := openAdmin("127.0.0.1:0", &fakeSource{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close(context.Background())
	if _, err := openAdmin(a.Addr(), &fakeSource{}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), a.Addr()) {
		t.Errorf("got %v", err)
	}
}
