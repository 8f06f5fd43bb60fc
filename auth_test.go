package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"millrace/protocol"
	"millrace/protocol/token"
)

// testKey is a key pair as an issuer of tokens has one.
type testKey struct {
	t       *testing.T
	private ed25519.PrivateKey
}

func newTestKey(t *testing.T) testKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return testKey{t, private}
}

func (k testKey) public() crypto.PublicKey { return k.private.Public() }

func (k testKey) pem() string {
	k.t.Helper()
	der, err := x509.MarshalPKIXPublicKey(k.public())
	if err != nil {
		k.t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// set is a JSON Web Key Set.
func (k testKey) set() string {
	return fmt.Sprintf(`{"keys":[{"kty":"OKP","crv":"Ed25519","alg":"EdDSA","kid":"k","x":%q}]}`,
		base64.RawURLEncoding.EncodeToString(k.private.Public().(ed25519.PublicKey)))
}

func (k testKey) token(user string, more map[string]any) []byte {
	k.t.Helper()
	claims := map[string]any{"sub": user, "exp": time.Now().Add(time.Hour).Unix()}
	maps.Copy(claims, more)
	payload, err := json.Marshal(claims)
	if err != nil {
		k.t.Fatal(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"EdDSA"}`)) + "." + encode(payload)
	return []byte(signed + "." + encode(ed25519.Sign(k.private, []byte(signed))))
}

// startWith is startWalk with settings of its own.
func startWith(t *testing.T, change func(*Config)) *walkServer {
	t.Helper()
	s := &walkServer{t: t, cfg: walkConfig(t, t.TempDir())}
	change(&s.cfg)
	if err := (&configuration{Config: s.cfg}).check(); err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(s.stop)
	return s
}

// wantLogin connects with a token; closeCode 0 means that it is accepted.
func (s *walkServer) wantLogin(what string, signed []byte, closeCode protocol.CloseCode) {
	s.t.Helper()
	c := s.dial(walkEncodings[0])
	defer c.drop()
	c.write(&protocol.Frame{Kind: protocol.KindConnect, Token: signed, Device: []byte("phone")})
	if closeCode == 0 {
		if f := c.read(); f.Kind != protocol.KindConnected {
			s.t.Fatalf("%s: %s", what, describe(f))
		}
		return
	}
	if before := c.wantClose(closeCode); len(before) != 1 || before[0].Kind != protocol.KindError {
		s.t.Fatalf("%s: %d frames before the close", what, len(before))
	}
}

// scrape is what /metrics shows.
func (s *walkServer) scrape() string {
	s.t.Helper()
	r, err := http.Get("http://" + s.AdminAddr() + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(body)
}

// TestOnlyPublicKeys: with public keys and no secret file, nothing that this program could sign is accepted.
func TestOnlyPublicKeys(t *testing.T) {
	key, stranger := newTestKey(t), newTestKey(t)
	file := writeFile(t, "keys.pem", key.pem())
	// The development secret of an earlier start lies in the data directory.
	earlier := walkConfig(t, t.TempDir())
	secret, err := openSecret(earlier)
	if err != nil {
		t.Fatal(err)
	}
	s := startWith(t, func(c *Config) { c.Data.Dir, c.Auth.Keys = earlier.Data.Dir, []string{file} })
	s.wantLogin("its key", key.token("alice", nil), 0)
	s.wantLogin("another key", stranger.token("alice", nil), protocol.CloseUnauthorized)
	development, err := token.SignHS256(secret, "alice", time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s.wantLogin("the development secret", []byte(development), protocol.CloseUnauthorized)
	forged, err := token.SignHS256([]byte(strings.ReplaceAll(key.pem(), "-----BEGIN", " ----BEGIN")), "alice", time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	s.wantLogin("HS256 with the public key", []byte(forged), protocol.CloseUnauthorized)

	for _, want := range []string{
		`millrace_token_verified_total{outcome="accepted"} 1`, `millrace_token_keys{algorithm="EdDSA"} 1`, `millrace_token_keys{algorithm="HS256"} 0`,
		`millrace_edge_tokens_waiting 0`, `millrace_edge_authentications_total{outcome="overloaded"}`,
	} {
		if got := s.scrape(); !strings.Contains(got, want) {
			t.Errorf("%s is missing in the metrics", want)
		}
	}

	code, out, problem := command("token", "alice", "--data-dir", earlier.Data.Dir)
	if code != exitOK || out == "" {
		t.Errorf("with the development secret: code %d, %q", code, problem)
	}
	environ := []string{"MILLRACE_AUTH_KEYS=" + file, "MILLRACE_DATA_DIR=" + earlier.Data.Dir}
	for _, line := range []string{"token alice", "chat --as alice"} {
		code, out, problem = commandIn(environ, strings.Fields(line)...)
		if code != exitFailure || out != "" || !strings.Contains(problem, "only public keys are configured") {
			t.Errorf("%s: code %d, output %q, error %q", line, code, out, problem)
		}
	}
}

// TestSecretAndKeysWithIssuer: issuer and audience hold for every key, and the token command keeps to them.
func TestSecretAndKeysWithIssuer(t *testing.T) {
	key := newTestKey(t)
	s := startWith(t, func(c *Config) {
		c.Auth = AuthConfig{SecretFile: secretFile(t), Keys: []string{writeFile(t, "keys.json", key.set())}, Issuer: "https://id.example", Audience: []string{"chat", "mail"}}
	})
	s.wantLogin("of the secret, without iss and aud", s.token("alice"), protocol.CloseUnauthorized)
	s.wantLogin("of the key, without iss and aud", key.token("alice", nil), protocol.CloseUnauthorized)
	s.wantLogin("another aud", key.token("alice", map[string]any{"iss": "https://id.example", "aud": "calendar"}), protocol.CloseUnauthorized)
	s.wantLogin("iss and aud", key.token("alice", map[string]any{"iss": "https://id.example", "aud": []string{"calendar", "mail"}}), 0)
	code, out, problem := command("token", "bob", "--auth-secret-file", s.cfg.Auth.SecretFile, "--auth-issuer", s.cfg.Auth.Issuer, "--auth-audience", "chat,mail")
	if code != exitOK {
		t.Fatalf("code %d, %q", code, problem)
	}
	s.wantLogin("of the token command", []byte(strings.TrimSpace(out)), 0)
	var hints bytes.Buffer
	c := newConfiguration()
	for name, text := range map[string]string{"auth-secret-file": "s", "auth-issuer": "https://id.example", "auth-audience": "chat,mail"} {
		if err := c.apply(findSetting(name), text, "flag"); err != nil {
			t.Fatal(err)
		}
	}
	if welcome(&hints, c, "127.0.0.1:8080", "127.0.0.1:8082", "millrace"); !strings.Contains(hints.String(),
		"millrace token alice --auth-secret-file s --auth-issuer https://id.example --auth-audience chat,mail\n") {
		t.Errorf("hints that do not work:\n%s", hints.String())
	}
}

// TestReloadReadsKeysAgain: a new key counts and the old one does not; a broken file changes nothing.
func TestReloadReadsKeysAgain(t *testing.T) {
	first, second := newTestKey(t), newTestKey(t)
	file := writeFile(t, "keys.pem", first.pem())
	s := startWith(t, func(c *Config) { c.Auth.Keys = []string{file} })
	s.wantLogin("the first key", first.token("alice", nil), 0)
	replace := func(content string) error {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return s.Reload(t.Context())
	}
	if err := replace(second.pem()); err != nil {
		t.Fatal(err)
	}
	s.wantLogin("the first key, taken away", first.token("alice", nil), protocol.CloseUnauthorized)
	s.wantLogin("the second key", second.token("alice", nil), 0)
	if err := replace("broken"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a broken file: %v", err)
	}
	s.wantLogin("the second key, beside a broken file", second.token("alice", nil), 0)
}

// TestKeysBehindAnAddress: over TLS with a CA of one's own. The server is ready when it has them, and asks for a second try before.
func TestKeysBehindAnAddress(t *testing.T) {
	key := newTestKey(t)
	asked, let := make(chan struct{}, 10), make(chan struct{})
	issuer := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-let:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, key.set()) // what the server makes of it is what is tested
	}))
	t.Cleanup(issuer.Close)
	authority := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw})
	s := startWith(t, func(c *Config) {
		c.Auth.Keys, c.Auth.KeysCAFile = []string{issuer.URL + "/keys"}, writeFile(t, "ca.pem", string(authority))
	})
	<-asked
	s.wantLogin("before the keys have come", key.token("alice", nil), protocol.CloseTryAgain)
	ready := func() error {
		for _, c := range s.Ready() {
			if c.Name == "token keys" {
				return c.Err
			}
		}
		return errors.New("no such check")
	}
	if err := ready(); !errors.Is(err, token.ErrUnavailable) {
		t.Errorf("ready without a key: %v", err)
	}
	close(let)
	awaitReady(t, "http://"+s.AdminAddr()+"/readyz?verbose")
	s.wantLogin("when the keys have come", key.token("alice", nil), 0)
}

func TestCheckTokens(t *testing.T) {
	key := newTestKey(t)
	good, secret := writeFile(t, "good.pem", key.pem()), secretFile(t)
	private, err := x509.MarshalPKCS8PrivateKey(key.private)
	if err != nil {
		t.Fatal(err)
	}
	privatePEM := writeFile(t, "private.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	list := writeFile(t, "m.toml", "[auth]\nkeys = ['"+good+"', 'a,b']\n")
	for _, c := range []struct{ args, want string }{ // want is part of the error; empty: good
		{"--auth-keys " + good + " --edge-addr :8080", ""},
		{"--auth-keys " + writeFile(t, "good.json", key.set()) + "," + good, ""},
		{"--auth-keys https://id.example/jwks.json --auth-issuer https://id.example --auth-audience chat", ""},
		{"--auth-keys https://id.example/jwks.json --auth-secret-file " + secret, ""},
		{"--auth-keys http://127.0.0.1:1/jwks.json", ""},
		{"--auth-issuer x --auth-audience y", ""},
		{"--auth-keys /nowhere/keys.pem", "/nowhere/keys.pem"},
		{"--auth-keys " + secret, "secret"},
		{"--auth-keys " + privatePEM, "private key"},
		{"--auth-keys " + good + "," + good, "given twice"},
		{"--auth-keys http://id.example/jwks.json", "must be https"},
		{"--auth-keys " + good + " --auth-keys-ca-file " + good, "auth.keys-ca-file"},
		{"--auth-keys-ca-file " + good, "auth.keys-ca-file"},
		{"--auth-keys https://id.example/jwks.json --auth-keys-ca-file " + secret, "no certificate"},
		{"--auth-secret-file " + good, "PEM"},
		{"--config " + list, "comma"},
	} {
		code, out, problem := command(append([]string{"config", "check"}, strings.Fields(c.args)...)...)
		if c.want == "" && (code != exitOK || problem != "") || c.want != "" && (code != exitUsage || out != "" || !strings.Contains(problem, c.want)) {
			t.Errorf("%s: code %d, output %q, error %q, want %q in it", c.args, code, out, problem, c.want)
		}
	}
	if _, err := os.Stat(filepath.Join("data", "auth.secret")); err == nil {
		t.Error("checking has made a secret")
	}
}

// TestKeysOthersCanReplaceAreNamed: everybody may read a public key, but not put another in its place.
func TestKeysOthersCanReplaceAreNamed(t *testing.T) {
	file := writeFile(t, "keys.pem", newTestKey(t).pem())
	c := defaultConfig()
	c.Auth.Keys = []string{file}
	for mode, warned := range map[os.FileMode]bool{0o644: false, 0o664: true, 0o666: true} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		if _, err := openVerifier(c, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(log.String(), "can be replaced") != warned {
			t.Errorf("mode %#o: %q", mode, log.String())
		}
	}
}

func TestWelcomeWithoutASecret(t *testing.T) {
	c := newConfiguration()
	c.Auth.Keys = []string{"keys.pem"}
	var out bytes.Buffer
	welcome(&out, c, "127.0.0.1:8080", "127.0.0.1:8082", "millrace")
	if text := out.String(); strings.Contains(text, "millrace token") || strings.Contains(text, "secret") || !strings.Contains(text, "ws://127.0.0.1:8080/ws") {
		t.Errorf("hints that do not work:\n%s", text)
	}
}

// TestHangupReloads: also when one fails, and not after the end.
func TestHangupReloads(t *testing.T) {
	signals, ended, returned := make(chan os.Signal), make(chan struct{}), make(chan struct{})
	var log bytes.Buffer
	reloads := 0
	go func() {
		reloadOn(signals, ended, func(ctx context.Context) error {
			if _, bounded := ctx.Deadline(); !bounded {
				t.Error("a reload may take forever")
			}
			if reloads++; reloads == 1 {
				return errors.New("keys are broken")
			}
			return nil
		}, slog.New(slog.NewTextHandler(&log, nil)))
		close(returned)
	}()
	signals <- syscall.SIGHUP
	signals <- syscall.SIGHUP
	close(ended)
	<-returned
	if text := log.String(); reloads != 2 || !strings.Contains(text, "keys are broken") || !strings.Contains(text, "msg=reloaded") {
		t.Errorf("%d reloads\n%s", reloads, text)
	}
}
