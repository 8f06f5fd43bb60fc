package main

import (
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"

	"millrace/protocol"
)

// TestWalkDisconnect: an operator ends the sessions of one user, on every device, and of nobody else.
func TestWalkDisconnect(t *testing.T) {
	eachEncoding(t, func(t *testing.T, s *walkServer, enc walkEncoding) {
		phone, tablet := s.connect(enc, "alice", "phone", 5, 0), s.connect(enc, "alice", "tablet", 0, 0)
		bob := s.connect(enc, "bob", "phone", 0, 0)

		code, out, problem := command("edge", "disconnect", "--user", "alice", "--admin-addr", s.AdminAddr())
		if code != exitOK || out != "ended 2 sessions of alice\n" || problem != "" {
			t.Fatalf("code %d, output %q, error %q", code, out, problem)
		}
		for _, c := range []*walkClient{phone, tablet} {
			before := c.wantClose(protocol.CloseUnauthorized)
			if len(before) != 1 || before[0].Kind != protocol.KindError || before[0].Code != protocol.CodeUnauthorized || before[0].RetryAfterMs != 0 {
				t.Fatalf("before the close: %v", before)
			}
			c.drop()
		}

		// Bob lives, what he sends waits, and nothing is forbidden: with a token that is still valid she is back.
		_, answer := bob.send("alice", "are you there?")
		again := s.connect(enc, "alice", "phone", 5, 0)
		again.wantIncoming(answer.ID, "bob", "alice", "are you there?")

		for user, want := range map[string]string{"bob": "ended the session of bob\n", "carol": "carol has no session\n"} {
			if code, out, problem := command("edge", "disconnect", "--user", user, "--admin-addr", s.AdminAddr()); code != exitOK || out != want {
				t.Errorf("%s: code %d, output %q, error %q", user, code, out, problem)
			}
		}
		bob.wantClose(protocol.CloseUnauthorized)
	})
}

// TestDisconnectIsNotForWebPages: it changes something, so a page of this machine may not ask for it either.
func TestDisconnectIsNotForWebPages(t *testing.T) {
	source := &fakeSource{}
	a := openTestAdmin(t, source)
	for _, c := range []struct {
		method, query, host string
		header              http.Header
		want                int
	}{
		{"POST", "?user=alice", "", nil, 200},
		{"POST", "?user=bob", "localhost", nil, 200},
		{"GET", "?user=no", "", nil, 405},
		{"PUT", "?user=no", "", nil, 405},
		{"POST", "", "", nil, 400},
		{"POST", "?user=al%2Fice", "", nil, 400},
		{"POST", "?user=" + strings.Repeat("x", protocol.MaxUserBytes+1), "", nil, 400},
		{"POST", "?user=no", "evil.example", nil, 403},
		{"POST", "?user=no", "", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403},
		{"POST", "?user=no", "", http.Header{"Sec-Fetch-Site": {"same-site"}}, 403},
		{"POST", "?user=no", "", http.Header{"Origin": {"http://localhost:3000"}}, 403},
		{"POST", "?user=no", "", http.Header{"Origin": {"null"}}, 403},
	} {
		r, err := http.NewRequestWithContext(t.Context(), c.method, "http://"+a.Addr()+disconnectPath+c.query, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = c.host
		if c.header != nil {
			r.Header = c.header
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != c.want {
			t.Errorf("%s %s, Host %q, %v: %s %q, %v", c.method, c.query, c.host, c.header, response.Status, body, err)
		}
	}
	if !slices.Equal(source.disconnected, []string{"alice", "bob"}) {
		t.Errorf("disconnected %v", source.disconnected)
	}
}

func TestDisconnectCommandSaysWhatIsWrong(t *testing.T) {
	gone, err := openAdmin("127.0.0.1:0", &fakeSource{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	addr := gone.Addr()
	if err := gone.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"", exitUsage, "--user"},
		{"--user al/ice", exitUsage, "not a user id"},
		{"--user alice --admin-addr 127.0.0.1:0", exitUsage, "--admin-addr"},
		{"--user alice --admin-addr " + addr, exitFailure, "ask the server"},
	} {
		code, out, problem := command(append([]string{"edge", "disconnect"}, strings.Fields(c.args)...)...)
		if code != c.code || out != "" || !strings.Contains(problem, c.want) {
			t.Errorf("%s: code %d, output %q, error %q", c.args, code, out, problem)
		}
	}
}
