package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// occupy opens n connections to the admin address that send this much of a request and then nothing.
func occupy(t *testing.T, a *adminServer, n int, sent string) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := net.Dial("tcp", a.Addr())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := io.WriteString(c, sent); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
		conns[i] = c
	}
	return conns
}

// awaitClosed waits until the server has closed at least n of the connections, before it would for their silence.
func awaitClosed(t *testing.T, conns []net.Conn, n int) {
	t.Helper()
	ends := make(chan error, len(conns))
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(adminHeaderTimeout * 3 / 4)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := io.Copy(io.Discard, c)
			ends <- err
		}()
	}
	for closed := 0; closed < n; closed++ {
		if err := <-ends; errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the server closed %d connections of %d, at least %d have to go", closed, len(conns), n)
		}
	}
}

// unpooled asks with a connection of its own each time.
func unpooled() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
}

// TestAdminConnectionsAreBounded is about the descriptors of the process, and that who takes all connections keeps nobody out.
func TestAdminConnectionsAreBounded(t *testing.T) {
	for name, sent := range map[string]string{
		"silent":           "",
		"half a head":      "GET /metrics HTTP/1.1\r\nHost: loc",
		"between requests": "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"no HTTP":          "\x16\x03\x01\x00\xff\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			a := openTestAdmin(t, &fakeSource{})
			conns := occupy(t, a, 5*adminConnections, sent)
			status, body := fetch(t, unpooled(), a, "/metrics")
			if status != http.StatusOK || !strings.Contains(body, "millrace_admin_evicted_connections_total") {
				t.Errorf("a scrape gets %d %q", status, body)
			}
			awaitClosed(t, conns, len(conns)-adminConnections+1) // one place was the scrape's
		})
	}
}

func TestAdminConnectionsGiveTheirPlaceBack(t *testing.T) {
	a := openTestAdmin(t, &fakeSource{})
	occupy(t, a, 1, "")
	for range 3 * adminConnections {
		answer, err := io.ReadAll(occupy(t, a, 1, "GET /livez HTTP/1.0\r\n\r\n")[0])
		if err != nil || !strings.Contains(string(answer), "200 OK") {
			t.Fatalf("%q, %v", answer, err)
		}
	}
	if n := a.listener.Evicted(); n != 0 {
		t.Errorf("%d connections were evicted for others that had been closed", n)
	}
}

// blockingSource is asked for metrics and does not answer before it is let.
func blockingSource() (s *fakeSource, asked, answer chan struct{}) {
	asked, answer = make(chan struct{}, 1000), make(chan struct{})
	return &fakeSource{metrics: func(func(name, help string, counter bool, value float64, labels ...string)) {
		asked <- struct{}{}
		<-answer
	}}, asked, answer
}

func TestAdminConnectionIsKeptWhileItsAnswerIsMade(t *testing.T) {
	source, asked, answer := blockingSource()
	a := openTestAdmin(t, source)
	status := make(chan int, 1)
	go func() {
		r, err := unpooled().Get("http://" + a.Addr() + "/metrics")
		if err != nil {
			status <- 0
			return
		}
		_, _ = io.Copy(io.Discard, r.Body) // the status is what is looked at
		r.Body.Close()
		status <- r.StatusCode
	}()
	<-asked
	occupy(t, a, 3*adminConnections, "")
	if got, _ := fetch(t, unpooled(), a, "/livez"); got != http.StatusOK {
		t.Errorf("probe: status %d", got)
	}
	close(answer)
	if got := <-status; got != http.StatusOK {
		t.Errorf("the scrape under way was cut off: status %d", got)
	}
}

func TestAdminScrapesAtOnceAreBounded(t *testing.T) {
	source, asked, answer := blockingSource()
	a := openTestAdmin(t, source)
	occupy(t, a, adminScrapes, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
	for range adminScrapes {
		<-asked
	}
	if status, body := fetch(t, unpooled(), a, "/metrics"); status != http.StatusServiceUnavailable {
		t.Errorf("one scrape more: %d %s", status, body)
	}
	if status, _ := fetch(t, unpooled(), a, "/debug/pprof/cmdline"); status != http.StatusOK {
		t.Errorf("a profile is kept out by scrapes: status %d", status)
	}
	close(answer)
}

// TestAdminGatesLeaveConnectionsFree holds longestWaiting to its word.
func TestAdminGatesLeaveConnectionsFree(t *testing.T) {
	if adminScrapes+adminProfiles >= adminConnections {
		t.Errorf("%d connections can be held at once, of %d", adminScrapes+adminProfiles, adminConnections)
	}
}
