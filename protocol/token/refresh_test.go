package token

import (
	"context"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// keyServer serves a key set and counts who asks.
type keyServer struct {
	*httptest.Server
	content atomic.Value // string
	asked   atomic.Int64
}

func newKeyServer(t *testing.T, content string, start func(*httptest.Server)) *keyServer {
	s := &keyServer{}
	s.content.Store(content)
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s.asked.Add(1)
		io.WriteString(w, s.content.Load().(string))
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	start(s.Server)
	t.Cleanup(s.Close)
	return s
}

// caFile holds the certificate of a TLS server.
func (s *keyServer) caFile(t *testing.T) string {
	return writeFile(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
}

// rest lets the next Refresh ask again.
func rest(v *Verifier) {
	v.loading.Lock()
	defer v.loading.Unlock()
	for _, s := range v.sources {
		s.tried = time.Time{}
	}
}

func mustRefresh(t *testing.T, v *Verifier) {
	t.Helper()
	if err := v.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func demandRefreshError(t *testing.T, v *Verifier, want string) {
	t.Helper()
	if err := v.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
}

// TestKeyAddress: fetched over TLS when asked to and not before, at a limited rate, never because of a token; the last
// good set stays.
func TestKeyAddress(t *testing.T) {
	old, next := newEd25519(), newEd25519()
	server := newKeyServer(t, jwks(old.jwk("old", "")), (*httptest.Server).StartTLS)
	v := verifierFrom(t, Source{Location: server.URL + "/jwks.json?secret", CAFile: server.caFile(t)}, Source{Secret: testSecret})
	hmacGood := []byte(hmacToken(header, goodClaims))
	demand(t, v, "before the first fetch", old.good("old"), ErrUnavailable)
	demand(t, v, "garbage before the first fetch", []byte("a.b.c"), ErrInvalid)
	demand(t, v, "wrong secret before the first fetch", []byte(sign(header, goodClaims, sha256.New, nil)), ErrInvalid)
	demand(t, v, "HS256 before the first fetch", hmacGood, nil)
	if n := server.asked.Load(); n != 0 {
		t.Fatalf("asked %d times", n)
	}

	mustRefresh(t, v)
	demand(t, v, "fetched", old.good("old"), nil)
	server.content.Store(jwks(next.jwk("next", "")))
	for range 100 {
		for _, token := range []string{
			string(next.good("next")), string(next.good("")),
			next.token(`{"alg":"EdDSA","kid":"next","jku":"`+server.URL+`"}`, goodClaims),
			next.token(`{"alg":"EdDSA","kid":"`+server.URL+`","x5u":"`+server.URL+`"}`, `{"sub":"alice","exp":1700003600,"iss":"`+server.URL+`"}`),
		} {
			demand(t, v, "not fetched yet", []byte(token), ErrInvalid)
		}
		mustRefresh(t, v) // does nothing within MinFetchGap
	}
	if n := server.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}

	rest(v)
	mustRefresh(t, v)
	demand(t, v, "rotated", next.good("next"), nil)
	demand(t, v, "rotated away", old.good("old"), ErrInvalid)
	for _, bad := range []string{"", "<html>", `{"keys":[]}`, `{"keys":[{"kty":"oct","k":"AAAA"}]}`, strings.Repeat(" ", maxContentBytes+1) + jwks(old.jwk("old", ""))} {
		server.content.Store(bad)
		rest(v)
		demandRefreshError(t, v, server.URL+"/jwks.json: ")
		demandRefreshError(t, v, server.URL+"/jwks.json: ") // the last outcome stands
		demand(t, v, "the last good set", next.good("next"), nil)
		demand(t, v, "not in the last good set", old.good("old"), ErrInvalid)
	}
	if n := server.asked.Load(); n != 7 {
		t.Errorf("asked %d times, want 7", n)
	}
	for _, s := range v.sources {
		if strings.Contains(s.name, "secret") && s.read != nil {
			t.Errorf("the name %q shows the query", s.name)
		}
	}
	server.content.Store(jwks(old.jwk("old", ""), `{"kty":"?"}`, next.jwk("next", "")))
	rest(v)
	mustRefresh(t, v)
	demand(t, v, "both, one", next.good("next"), nil)
	demand(t, v, "both, the other", old.good("old"), nil)
}

func TestKeyServersThatAreRefused(t *testing.T) {
	s := edSigner()
	good := jwks(s.jwk("", ""))
	target := newKeyServer(t, good, (*httptest.Server).Start)
	for _, c := range []struct {
		name, want string
		answer     http.HandlerFunc
	}{
		{"redirect", "redirects are not followed", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, target.URL, http.StatusFound) }},
		{"redirect with a good body", "redirects are not followed", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", target.URL)
			w.WriteHeader(http.StatusPermanentRedirect)
			io.WriteString(w, good)
		}},
		{"not found", "status 404", func(w http.ResponseWriter, r *http.Request) { http.Error(w, good, http.StatusNotFound) }},
		{"failed", "status 500", func(w http.ResponseWriter, r *http.Request) { http.Error(w, good, http.StatusInternalServerError) }},
		{"partial", "status 206", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, good)
		}},
		{"endless", "longer than 512 KiB", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 32<<10)); err != nil {
					return
				}
			}
		}},
		{"header without end", "server response headers exceeded", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 100<<10))
			io.WriteString(w, good)
		}},
		{"cut off", "unexpected EOF", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, good[:20])
		}},
	} {
		server := httptest.NewServer(c.answer)
		v := verifierFrom(t, Source{Location: server.URL})
		demandRefreshError(t, v, c.want)
		demand(t, v, c.name, s.good(""), ErrUnavailable)
		server.Close()
	}
	if n := target.asked.Load(); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
}

func TestKeyServerCertificates(t *testing.T) {
	s := edSigner()
	server := newKeyServer(t, jwks(s.jwk("", "")), (*httptest.Server).StartTLS)
	unknown := verifierFrom(t, Source{Location: server.URL})
	demandRefreshError(t, unknown, "certificate")
	wrongName := verifierFrom(t, Source{Location: strings.Replace(server.URL, "127.0.0.1", "localhost", 1), CAFile: server.caFile(t)})
	demandRefreshError(t, wrongName, "certificate")
	plain := verifierFrom(t, Source{Location: strings.Replace(server.URL, "https", "http", 1)})
	demandRefreshError(t, plain, "status 400")
	if n := server.asked.Load(); n != 0 {
		t.Errorf("asked %d times", n)
	}
}

// TestVerifyDoesNotWait: a server that does not answer holds up nobody who verifies, and no shutdown.
func TestVerifyDoesNotWait(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-release
	}))
	defer server.Close()
	defer close(release)
	s := edSigner()
	v := verifierFrom(t, Source{Location: server.URL}, Source{Location: writeFile(t, s.pem())})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- v.Refresh(ctx) }()
	<-arrived
	demand(t, v, "while a server is slow", s.good(""), nil)
	if _, err := v.VerifyFast(s.good(""), testNow); err != nil && err != ErrSlow {
		t.Error(err)
	}
	v.Metrics(func(string, string, bool, float64, ...string) {})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestFetchTimeout: the whole request is bounded, its body too.
func TestFetchTimeout(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"keys":[`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	defer server.Close()
	client := newClient(nil)
	if client.Timeout != fetchTimeout {
		t.Errorf("timeout %v", client.Timeout)
	}
	client.Timeout = 50 * time.Millisecond
	content, err := get(t.Context(), client, server.URL)
	var timeout interface{ Timeout() bool }
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%q, %v", content, err)
	}
}

// TestRun: how often an address is asked while it answers, while it does not, and after that.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := edSigner()
		var lines strings.Builder
		v, err := New(Config{Sources: []Source{{Location: "https://id.example/jwks"}, {Secret: testSecret}},
			RefreshEvery: 10 * time.Minute, Logger: slog.New(slog.NewTextHandler(&lines, nil))})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var mu sync.Mutex
		var times []time.Duration
		failing := true
		asked := func() []time.Duration {
			mu.Lock()
			defer mu.Unlock()
			return times
		}
		fail := func(now bool) {
			mu.Lock()
			defer mu.Unlock()
			failing = now
		}
		v.sources[0].read = func(context.Context) ([]byte, error) {
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Since(began))
			if failing {
				return nil, errors.New("no answer")
			}
			return []byte(jwks(s.jwk("", ""))), nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			v.Run(ctx)
			close(done)
		}()
		synctest.Wait()
		if at := asked(); len(at) != 1 || at[0] != 0 {
			t.Fatalf("at first asked at %v", at)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		// 5 s, 10 s, 20 s … 320 s, then every 10 min, each up to a tenth sooner or later.
		at := asked()
		if len(at) < 12 || len(at) > 15 {
			t.Fatalf("asked %d times in an hour of failures: %v", len(at), at)
		}
		for i, want := range []time.Duration{5, 10, 20, 40, 80, 160, 320, 600, 600} {
			want *= time.Second
			if gap := at[i+1] - at[i]; gap < want*9/10 || gap > want*11/10 || gap < MinFetchGap {
				t.Errorf("failure %d: waited %v, want about %v", i+1, gap, want)
			}
		}
		if n := strings.Count(lines.String(), "could not be loaded"); n < 5 || n > 12 {
			t.Errorf("%d lines in an hour", n)
		}
		demand(t, v, "never loaded", s.good(""), ErrUnavailable)

		fail(false)
		time.Sleep(11 * time.Minute)
		synctest.Wait()
		demand(t, v, "loaded at last", s.good(""), nil)
		before, set := len(asked()), v.set.Load()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if n := len(asked()) - before; n < 24*6*9/10 || n > 24*6*11/10 {
			t.Errorf("asked %d times in a day", n)
		}
		if v.set.Load() != set {
			t.Error("the same keys took the place of themselves, and the cache is gone")
		}

		fail(true)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		demand(t, v, "a day without an answer", s.good(""), nil)
		cancel()
		<-done
	})
}

// TestRunWithSecretsAlone: there is nothing to do.
func TestRunWithSecretsAlone(t *testing.T) {
	mustVerifier(t).Run(t.Context())
}

// TestFilesAreReadAgain: also when the new content is bad, and good again.
func TestFilesAreReadAgain(t *testing.T) {
	old, next := newEd25519(), newEd25519()
	path := writeFile(t, old.pem())
	v := verifierFrom(t, Source{Location: path, KeyID: "a"})
	for _, c := range []struct {
		content            string
		wantOld, wantNext  error
		refreshErrContains string
	}{
		{old.pem(), nil, ErrInvalid, ""},
		{"", nil, ErrInvalid, "no PUBLIC KEY"},
		{old.pem() + next.pem(), nil, ErrInvalid, "one kid for 2 keys"},
		{next.pem(), ErrInvalid, nil, ""},
		{jwks(old.jwk("a", "")), nil, ErrInvalid, ""},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if c.refreshErrContains == "" {
			mustRefresh(t, v)
		} else {
			demandRefreshError(t, v, c.refreshErrContains)
		}
		demand(t, v, "old", old.good("a"), c.wantOld)
		demand(t, v, "next", next.good("a"), c.wantNext)
		demand(t, v, "another kid", next.good("b"), ErrInvalid)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	demandRefreshError(t, v, path)
	demand(t, v, "without the file", old.good("a"), nil)
}

// TestRotationWhileVerifying: whoever verifies while keys change gets the answer of the old keys or the new ones, and after
// the change no one the answer of the old, cached or not.
func TestRotationWhileVerifying(t *testing.T) {
	signers := []signer{newEd25519(), newEd25519()}
	always := ecSigner()
	content := func(i int) []byte { return []byte(jwks(signers[i].jwk(fmt.Sprint(i), ""), always.jwk("always", ""))) }
	path := writeFile(t, string(content(0)))
	v := verifierFrom(t, Source{Location: path})
	tokens := [][]byte{signers[0].good("0"), signers[1].good("1")}
	steady := always.good("always")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, token := range append(tokens, steady) {
					c, err := v.Verify(token, testNow)
					if !(err == nil && c.User == "alice") && !(errors.Is(err, ErrInvalid) && c == Claims{} && &token[0] != &steady[0]) {
						t.Errorf("%+v, %v", c, err)
						return
					}
					if _, err := v.VerifyFast(token, testNow); err != nil && err != ErrSlow && !errors.Is(err, ErrInvalid) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for i := range 50 {
		now := (i + 1) % 2
		if err := os.WriteFile(path, content(now), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRefresh(t, v)
		demand(t, v, "in use now", tokens[now], nil)
		demand(t, v, "not in use any more", tokens[1-now], ErrInvalid)
		demand(t, v, "in use now, again", tokens[now], nil)
	}
	close(stop)
	wg.Wait()
}

func TestMetrics(t *testing.T) {
	s := edSigner()
	path := writeFile(t, s.pem())
	v := verifierFrom(t, Source{Location: path}, Source{Secret: testSecret})
	good := s.good("")
	for _, token := range []string{string(good), string(good), hmacToken(header, goodClaims), "x", hmacToken(header, `{"sub":"alice","exp":1}`)} {
		v.VerifyFast([]byte(token), testNow)
		v.Verify([]byte(token), testNow)
	}
	got := make(map[string]float64)
	v.Metrics(func(name, help string, counter bool, value float64, labels ...string) {
		if help == "" || !strings.HasPrefix(name, "millrace_token_") || counter != strings.HasSuffix(name, "_total") || len(labels)%2 != 0 {
			t.Errorf("%s %q %v %v", name, help, counter, labels)
		}
		name += fmt.Sprint(labels)
		if _, twice := got[name]; twice {
			t.Errorf("%s twice", name)
		}
		got[name] = value
	})
	for name, want := range map[string]float64{
		"millrace_token_verified_total[outcome accepted]":            5, // 3 of EdDSA, once slow; 2 of HS256
		"millrace_token_verified_total[outcome malformed]":           2,
		"millrace_token_verified_total[outcome expired]":             2,
		"millrace_token_verified_total[outcome signature]":           0,
		"millrace_token_keys[algorithm EdDSA]":                       1,
		"millrace_token_keys[algorithm HS256]":                       1,
		"millrace_token_keys[algorithm RS256]":                       0,
		"millrace_token_cache_tokens[]":                              1,
		"millrace_token_cache_hits_total[]":                          2,
		"millrace_token_refresh_failures_total[source " + path + "]": 0,
	} {
		if value, ok := got[name]; !ok || value != want {
			t.Errorf("%s is %v, %v, want %v", name, value, ok, want)
		}
	}
	if age, ok := got["millrace_token_keys_age_seconds[source "+path+"]"]; !ok || age < 0 {
		t.Errorf("age %v, %v", age, ok)
	}
}
