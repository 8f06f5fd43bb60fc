package edge

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/protocol"
	"millrace/protocol/token"
)

// These tests have the real verifier behind the edge, with keys of every kind.

const (
	testIssuer   = "https://id.example"
	testAudience = "chat"
	testSecret   = "a secret for HS256 of 32 bytes or more"
)

// signers are the private halves of what newVerifier is told.
type signers struct {
	ec       *ecdsa.PrivateKey // kid "ec"
	rsa      *rsa.PrivateKey   // kid "rsa"
	rsaPEM   []byte            // its public half
	verifier *token.Verifier
}

func publicPEM(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

func newSigners(t testing.TB) *signers {
	t.Helper()
	var s signers
	var err error
	if s.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if s.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	s.rsaPEM = publicPEM(t, &s.rsa.PublicKey)
	dir := t.TempDir()
	source := func(name string, content []byte) token.Source {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return token.Source{Location: path, KeyID: name, Issuer: testIssuer, Audiences: []string{testAudience}}
	}
	s.verifier, err = token.New(token.Config{
		Sources: []token.Source{
			source("ec", publicPEM(t, &s.ec.PublicKey)), source("rsa", s.rsaPEM),
			{Secret: []byte(testSecret), KeyID: "hs", Issuer: testIssuer, Audiences: []string{testAudience}},
		},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return &s
}

type claimSet map[string]any

func testClaims(user string) claimSet {
	return claimSet{"sub": user, "iss": testIssuer, "aud": testAudience, "exp": time.Now().Add(time.Hour).Unix()}
}

// tokenPart is a header or claims as they stand in a token.
func tokenPart(t testing.TB, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// sign makes a token; kid may be empty.
func sign(t testing.TB, alg string, key any, kid string, claims claimSet) string {
	t.Helper()
	head := map[string]string{"alg": alg}
	if kid != "" {
		head["kid"] = kid
	}
	signed := tokenPart(t, head) + "." + tokenPart(t, claims)
	sum, hash := sha256.Sum256([]byte(signed)), crypto.SHA256
	digest := sum[:]
	if alg == "RS384" {
		sum := sha512.Sum384([]byte(signed))
		digest, hash = sum[:], crypto.SHA384
	}
	var signature []byte
	var err error
	switch k := key.(type) {
	case []byte:
		mac := hmac.New(sha256.New, k)
		mac.Write([]byte(signed))
		signature = mac.Sum(nil)
	case *ecdsa.PrivateKey:
		r, s, signErr := ecdsa.Sign(rand.Reader, k, digest)
		if err = signErr; err == nil {
			signature = make([]byte, 64)
			r.FillBytes(signature[:32])
			s.FillBytes(signature[32:])
		}
	case *rsa.PrivateKey:
		if alg == "PS256" {
			signature, err = rsa.SignPSS(rand.Reader, k, hash, digest, nil)
		} else {
			signature, err = rsa.SignPKCS1v15(rand.Reader, k, hash, digest)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func (s *signers) es256(t testing.TB, user string) string {
	return sign(t, "ES256", s.ec, "ec", testClaims(user))
}

// outcomes reads what the verifier has counted: tokens looked at by outcome, and how many of them were remembered.
func (s *signers) outcomes() (accepted, remembered float64) {
	s.verifier.Metrics(func(name, _ string, _ bool, v float64, labels ...string) {
		switch {
		case name == "millrace_token_verified_total" && labels[1] == "accepted":
			accepted = v
		case name == "millrace_token_cache_hits_total":
			remembered = v
		}
	})
	return accepted, remembered
}

// TestPublicKeyTokensOverSockets: connect, upgrade with pipelined bytes, and renewal, with ES256 and its workers.
func TestPublicKeyTokensOverSockets(t *testing.T) {
	keys := newSigners(t)
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, func(c *Config) { c.Token = keys.verifier })
		c := dial(t, s, sub, "")
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(keys.es256(t, "alice")), Device: []byte("phone")})
		if f := c.want(protocol.KindConnected); string(f.User) != "alice" || string(f.Device) != "phone" {
			t.Fatalf("connected %+v", f)
		}
		b.live(t, "alice/phone")
		c.send(&protocol.Frame{Kind: protocol.KindRenewToken, Token: []byte(keys.es256(t, "alice"))})
		c.sendMessage(1, "meanwhile")
		for kinds := map[protocol.Kind]bool{}; !kinds[protocol.KindRenewed] || !kinds[protocol.KindReceived]; {
			f, err := c.next()
			if err != nil || f.Kind != protocol.KindRenewed && f.Kind != protocol.KindReceived {
				t.Fatalf("%+v, %v", f, err)
			}
			kinds[f.Kind] = true
		}

		u := &client{t: t, conn: dialTCP(t, s), json: sub == protocol.SubprotocolJSON}
		text := upgradeText(sub, "Authorization: Bearer "+keys.es256(t, "bob")+"\r\n")
		if _, err := u.conn.Write(append([]byte(text), final(0x9, "p")...)); err != nil {
			t.Fatal(err)
		}
		u.r = bufio.NewReader(u.conn)
		resp, err := http.ReadResponse(u.r, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatal(resp, err)
		}
		if f, err := u.next(); err != nil || string(f.Text) != "pong p" {
			t.Fatalf("%+v, %v", f, err)
		}
		if f := u.want(protocol.KindConnected); string(f.User) != "bob" || string(f.Device) != protocol.DefaultDevice {
			t.Fatalf("connected %+v", f)
		}
		eventually(t, "three good tokens to be counted", func() bool { return metric(s, "authentications_total", "outcome", "ok") == 3 })
		if n := metric(s, "tokens_waiting"); n != 0 {
			t.Errorf("%v tokens wait", n)
		}
	})
}

// TestBadTokensOverSockets: each is refused with 401 in an upgrade, and with 4501 or 4401 behind connect.
func TestBadTokensOverSockets(t *testing.T) {
	keys := newSigners(t)
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	with := func(name string, value any) claimSet {
		c := testClaims("alice")
		if c[name] = value; value == nil {
			delete(c, name)
		}
		return c
	}
	es := func(c claimSet) string { return sign(t, "ES256", keys.ec, "ec", c) }
	good := es(testClaims("alice"))
	head, _, _ := strings.Cut(good, ".")
	part := func(v any) string { return tokenPart(t, v) }
	s, b := serve(t, func(c *Config) { c.Token = keys.verifier })
	for _, tt := range []struct {
		name, token string
		expired     bool
	}{
		{name: "not a token", token: "alice"},
		{name: "alg none", token: part(map[string]string{"alg": "none"}) + "." + part(testClaims("alice")) + "."},
		{name: "alg none with a signature", token: part(map[string]string{"alg": "None"}) + "." + part(testClaims("alice")) + ".YQ"},
		{name: "HS256 with the public key of RS256", token: sign(t, "HS256", keys.rsaPEM, "rsa", testClaims("alice"))},
		{name: "HS256 with a public key and no kid", token: sign(t, "HS256", keys.rsaPEM, "", testClaims("alice"))},
		{name: "PS256", token: sign(t, "PS256", keys.rsa, "rsa", testClaims("alice"))},
		{name: "RS384", token: sign(t, "RS384", keys.rsa, "rsa", testClaims("alice"))},
		{name: "another's key", token: sign(t, "ES256", other, "ec", testClaims("alice"))},
		{name: "unknown kid", token: sign(t, "ES256", keys.ec, "ec2", testClaims("alice"))},
		{name: "the kid of another key", token: sign(t, "ES256", keys.ec, "rsa", testClaims("alice"))},
		{name: "other claims under the signature", token: head + "." + part(testClaims("bob")) + good[strings.LastIndex(good, "."):]},
		{name: "cut", token: good[:len(good)-5]},
		{name: "padding", token: good + "="},
		{name: "expired", token: es(with("exp", time.Now().Add(-2*time.Minute).Unix())), expired: true},
		{name: "not yet valid", token: es(with("nbf", time.Now().Add(2*time.Minute).Unix()))},
		{name: "no exp", token: es(with("exp", nil))},
		{name: "no sub", token: es(with("sub", nil))},
		{name: "sub is no user id", token: es(with("sub", "al ice"))},
		{name: "wrong aud", token: es(with("aud", []string{"mail", "calendar"}))},
		{name: "no aud", token: es(with("aud", nil))},
		{name: "wrong iss", token: es(with("iss", testIssuer+"/"))},
		{name: "huge", token: es(with("x", strings.Repeat("x", protocol.MaxTokenBytes*3/4)))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, closeCode := protocol.CodeUnauthorized, protocol.CloseUnauthorized
			if tt.expired {
				code, closeCode = protocol.CodeTokenExpired, protocol.CloseTokenExpired
			}
			for _, sub := range []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
				c := dial(t, s, sub, "")
				c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(tt.token), Device: []byte("phone")})
				c.wantError(code)
				c.wantClose(closeCode)
			}
			text := upgradeText("", "Authorization: Bearer "+tt.token+"\r\n")
			if len(text) > maxHeadBytes {
				t.Fatalf("an upgrade of %d bytes is refused as such", len(text))
			}
			resp, body, conn := request(t, s, text)
			if resp.StatusCode != 401 || !strings.HasPrefix(body, code.String()) || strings.Contains(body, tt.token) {
				t.Errorf("upgrade: %s %q", resp.Status, body)
			}
			conn.Close()
		})
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.registered != 0 {
		t.Errorf("%d were registered", b.registered)
	}
}

// TestKeysOfAnAddressOverSockets: until the keys of an address are there clients are told to try again, and nobody's token is thrown away.
func TestKeysOfAnAddressOverSockets(t *testing.T) {
	keys := newSigners(t)
	set := fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","kid":"ec","x":%q,"y":%q}]}`, coordinates(t, keys.ec)...)
	idp := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, set) }))
	defer idp.Close()
	v, err := token.New(token.Config{Sources: []token.Source{{Location: idp.URL}}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	s, _ := serve(t, func(c *Config) { c.Token = v })
	good := keys.es256(t, "alice")
	c := dial(t, s, protocol.SubprotocolJSON, "")
	c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(good)})
	if f := c.wantError(protocol.CodeInternal); f.RetryAfterMs < authRetryMs || f.RetryAfterMs > authRetryMs+authSpreadMs {
		t.Fatalf("again after %d ms", f.RetryAfterMs)
	}
	c.wantClose(protocol.CloseTryAgain)
	if resp, _, _ := request(t, s, upgradeText("", "Authorization: Bearer "+good+"\r\n")); resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
		t.Fatalf("upgrade: %s, again after %q", resp.Status, resp.Header.Get("Retry-After"))
	}
	if err := v.Refresh(context.Background()); err != nil {
		t.Fatal(err)
	}
	c = dial(t, s, protocol.SubprotocolJSON, "")
	c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(good)})
	c.want(protocol.KindConnected)
	eventually(t, "the outcomes to be counted", func() bool {
		return metric(s, "authentications_total", "outcome", "unavailable") == 2 && metric(s, "authentications_total", "outcome", "ok") == 1 &&
			metric(s, "closes_total", "reason", "unverified") == 1
	})
}

// coordinates are the x and y of a key in a key set.
func coordinates(t testing.TB, key *ecdsa.PrivateKey) []any {
	t.Helper()
	point, err := key.PublicKey.Bytes() // 4, x, y
	if err != nil {
		t.Fatal(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	return []any{encode(point[1:33]), encode(point[33:])}
}

// TestReconnectStorm: 2 000 clients come back at once. All get in, and who brings a token that was seen before costs no verification.
func TestReconnectStorm(t *testing.T) {
	const users, devices = 250, 8 // 2 000 connections, over a token for each user
	keys := newSigners(t)
	tokens := make([]string, users)
	for i := range tokens {
		tokens[i] = sign(t, "RS256", keys.rsa, "rsa", testClaims(fmt.Sprintf("user%d", i)))
	}
	s, _ := serve(t, func(c *Config) { c.Token, c.MaxConnections = keys.verifier, 2*users*devices })
	storm := func() {
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range users {
			wg.Go(func() {
				for d := range devices {
					c := dial(t, s, protocol.SubprotocolBinary, "")
					c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(tokens[i]), Device: fmt.Appendf(nil, "d%d", d)})
					if f, err := c.next(); err != nil || f.Kind != protocol.KindConnected {
						t.Errorf("%d: %+v, %v", i, f, err)
						return
					}
					c.conn.Close()
				}
			})
		}
	}
	storm()
	first, before := keys.outcomes()
	storm()
	second, after := keys.outcomes()
	t.Logf("%d verified and %d remembered at first, %d and %d when they came back", int(first-before), int(before), int(second-first-(after-before)), int(after-before))
	if first != users*devices || second != 2*users*devices {
		t.Errorf("%v accepted, then %v", first, second)
	}
	if after-before != users*devices {
		t.Errorf("%v of %d came back without costing a verification", after-before, users*devices)
	}
	if waiting, panics := s.verifiers.size(); waiting != 0 || panics != 0 {
		t.Errorf("%d wait, %d panics", waiting, panics)
	}
}

// blockedTokens has workers wait until they are let, and gives them away.
type blockedTokens struct {
	stubTokens
	busy chan struct{}
	let  chan struct{}
}

func (b *blockedTokens) Verify(t []byte, now time.Time) (token.Claims, error) {
	b.busy <- struct{}{}
	<-b.let
	return b.stubTokens.Verify(t, now)
}

// TestLoopsGoOnWhileTokensAreVerified: all workers are busy, and who is connected notices nothing.
func TestLoopsGoOnWhileTokensAreVerified(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		v := &blockedTokens{busy: make(chan struct{}, 100), let: make(chan struct{})}
		s, _ := serve(t, func(c *Config) { c.Token = v; c.AuthenticateSeconds = 60 })
		a := login(t, s, sub, "alice", "phone")
		const waiting = 10
		list := make([]*client, waiting)
		for i := range list {
			list[i] = dial(t, s, sub, "")
			list[i].send(&protocol.Frame{Kind: protocol.KindConnect, Token: fmt.Appendf(nil, "slow user%d", i)})
		}
		for range s.verifiers.most {
			<-v.busy
		}
		eventually(t, "the rest to wait", func() bool { return metric(s, "tokens_waiting") == float64(waiting-s.verifiers.most) })
		for seq := range uint64(20) {
			a.sendMessage(seq+1, "x")
			a.want(protocol.KindReceived)
		}
		list[0].conn.Close() // gone meanwhile
		close(v.let)
		for i, c := range list[1:] {
			if f := c.want(protocol.KindConnected); string(f.User) != fmt.Sprintf("user%d", i+1) {
				t.Fatalf("connected %+v", f)
			}
		}
	})
}

// TestStopWhileTokensAreVerified: the answers find nobody, and do no harm.
func TestStopWhileTokensAreVerified(t *testing.T) {
	v := &blockedTokens{busy: make(chan struct{}, 100), let: make(chan struct{})}
	b := newStub()
	cfg := testConfig(b)
	cfg.Token = v
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.server = s
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		c := dial(t, s, protocol.SubprotocolJSON, "")
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("slow alice")})
	}
	<-v.busy
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	close(v.let)
	eventually(t, "the workers to end", func() bool {
		s.verifiers.mu.Lock()
		defer s.verifiers.mu.Unlock()
		return s.verifiers.running == 0
	})
	if s.strays.Load() == 0 {
		t.Error("the answer of a token that was being verified is not counted as a stray")
	}
}
