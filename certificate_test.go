package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"millrace/protocol/client"
)

// walkOverTLS is the certificate of walk servers while walks run over TLS.
var walkOverTLS *testPair

// testPair is a certificate of its own making in files, and who trusts it.
type testPair struct {
	cert, key string // files
	roots     *x509.CertPool
	serial    *big.Int
}

func (p *testPair) config() *tls.Config {
	return &tls.Config{RootCAs: p.roots.Clone(), ServerName: "localhost"}
}

func newPair(t testing.TB, dir string, expires time.Time) *testPair {
	t.Helper()
	p := &testPair{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem"), roots: x509.NewCertPool()}
	p.renew(t, expires)
	return p
}

// renew replaces the files, as programs that renew certificates do.
func (p *testPair) renew(t testing.TB, expires time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if p.serial, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: p.serial, DNSNames: []string{"*.example.org", "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: expires, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p.roots.AddCert(leaf)
	replace(t, p.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	replace(t, p.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func replace(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func nextDay() time.Time { return time.Now().Add(24 * time.Hour) }

// TestWalksOverTLS takes the walks again: nothing of what they see depends on TLS.
func TestWalksOverTLS(t *testing.T) {
	walkOverTLS = newPair(t, t.TempDir(), nextDay())
	t.Cleanup(func() { walkOverTLS = nil })
	t.Run("Walk", TestWalk)
	t.Run("Restart", TestWalkRestart)
	t.Run("TokenInUpgrade", TestWalkTokenInUpgrade)
	t.Run("Devices", TestWalkDevices)
	t.Run("Mailbox", TestWalkMailbox)
	t.Run("BrokenDrain", TestWalkBrokenDrain)
}

// startWithTLS starts a server with a certificate.
func startWithTLS(t *testing.T, p *testPair, log *slog.Logger) *walkServer {
	t.Helper()
	s := &walkServer{t: t, cfg: walkConfig(t, t.TempDir())}
	s.cfg.Edge.TLSCert, s.cfg.Edge.TLSKey = p.cert, p.key
	m, err := start(context.Background(), s.cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	s.Millrace = m
	t.Cleanup(s.stop)
	return s
}

// served is the serial of the certificate that a new connection gets.
func (s *walkServer) served(p *testPair) *big.Int {
	s.t.Helper()
	conn, err := tls.Dial("tcp", s.EdgeAddr(), p.config())
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber
}

// TestCertificateRenewal: good pairs are taken while clients come and go and talk, bad ones change nothing, and nobody is disconnected.
func TestCertificateRenewal(t *testing.T) {
	p := newPair(t, t.TempDir(), nextDay())
	var logged lockedLog
	s := startWithTLS(t, p, slog.New(slog.NewTextHandler(&logged, nil)))
	first := p.serial
	if s.served(p).Cmp(first) != 0 {
		t.Fatal("another certificate is served")
	}
	stay := talker(t, s, p, "alice")

	var renewals, handshakes atomic.Int64
	ended := make(chan struct{})
	var wg sync.WaitGroup
	config := p.config() // with a pool that renew does not change meanwhile
	config.InsecureSkipVerify = true
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				conn, err := tls.Dial("tcp", s.EdgeAddr(), config)
				if err != nil {
					t.Error(err)
					return
				}
				handshakes.Add(1)
				conn.Close()
			}
		})
	}
	for range 10 {
		p.renew(t, nextDay())
		if err := s.Reload(context.Background()); err != nil {
			t.Fatal(err)
		}
		renewals.Add(1)
		if s.served(p).Cmp(p.serial) != 0 {
			t.Fatal("the certificate from before is served")
		}
		stay(t)
	}
	close(ended)
	wg.Wait()
	t.Logf("%d handshakes during %d renewals", handshakes.Load(), renewals.Load())
	if handshakes.Load() < 10 {
		t.Error("that was no load")
	}

	good, current := p.serial, func() {
		t.Helper()
		if s.served(p).Cmp(p.serial) != 0 {
			t.Error("another certificate is served")
		}
		stay(t)
	}
	was := readAll(t, p.cert)
	for _, c := range []struct {
		name, want string
		spoil      func()
	}{
		{"an expired certificate", "expired", func() { p.renew(t, time.Now().Add(-time.Hour)) }},
		{"no key for it", "private key does not match", func() { replace(t, p.cert, was) }},
		{"nonsense", "PEM", func() { replace(t, p.cert, []byte("nonsense")) }},
		{"no file", "no such file", func() { os.Remove(p.cert) }},
		{"a file that is too long", "longer than", func() { replace(t, p.cert, bytes.Repeat([]byte("x"), maxCertificateBytes+1)) }},
	} {
		c.spoil()
		p.serial = good
		err := s.Reload(context.Background())
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "stays") {
			t.Errorf("%s: %v", c.name, err)
		}
		current()
	}

	p.renew(t, nextDay()) // what the poll finds
	if err := s.tls.poll(); err != nil {
		t.Fatal(err)
	}
	current()
	loads := s.tls.loaded.Load()
	if err := s.tls.poll(); err != nil || s.tls.loaded.Load() != loads {
		t.Errorf("files that have not changed are loaded: %v", err)
	}
	if text := logged.String(); strings.Count(text, "new TLS certificate") != 11 || strings.Contains(text, "PRIVATE") {
		t.Errorf("logged\n%s", text)
	}
	var expires, failures float64
	s.Metrics(func(name, _ string, _ bool, v float64, _ ...string) {
		switch name {
		case "millrace_tls_certificate_expires_seconds":
			expires = v
		case "millrace_tls_certificate_failures_total":
			failures = v
		}
	})
	if d := time.Until(time.Unix(int64(expires), 0)); d < 23*time.Hour || d > 24*time.Hour || failures != 5 {
		t.Errorf("expires in %s, %v failures", d, failures)
	}
}

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

type lockedLog struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// talker connects the client library over wss, and returns what sends a message to oneself and waits for it, all on one connection.
func talker(t *testing.T, s *walkServer, p *testPair, user string) func(*testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), walkPatience)
	t.Cleanup(cancel)
	var lost atomic.Int64
	c, err := client.Dial(ctx, client.Options{
		URL: clientURL(s.cfg, s.EdgeAddr()), Token: client.StaticToken(string(s.token(user))), TLSConfig: p.config(),
		OnEvent: func(e client.Event) {
			if _, ok := e.(client.Disconnected); ok {
				lost.Add(1)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := lost.Load(); n > 0 {
			t.Errorf("the client lost its connection %d times", n)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return func(t *testing.T) {
		t.Helper()
		if _, err := c.Send(ctx, user, "note to self"); err != nil {
			t.Fatal(err)
		}
		m, err := c.Receive(ctx)
		if err != nil || m.Text != "note to self" {
			t.Fatalf("got %+v, %v", m, err)
		}
		if err := c.Acknowledge(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCertificateSettings(t *testing.T) {
	p := newPair(t, t.TempDir(), nextDay())
	load := func(flags map[string]string) *configuration {
		t.Helper()
		c, err := loadConfig(flags, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		c.Data.Dir = t.TempDir()
		return c
	}
	for _, c := range []struct {
		name, want string
		flags      map[string]string
	}{
		{"both", "", map[string]string{"edge-tls-cert": p.cert, "edge-tls-key": p.key}},
		{"no key", "belong together", map[string]string{"edge-tls-cert": p.cert}},
		{"no certificate", "belong together", map[string]string{"edge-tls-key": p.key}},
		{"exchanged", p.cert, map[string]string{"edge-tls-cert": p.key, "edge-tls-key": p.cert}},
		{"missing", "no such file", map[string]string{"edge-tls-cert": p.cert + "x", "edge-tls-key": p.key}},
	} {
		err := load(c.flags).check()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	c := load(map[string]string{"edge-tls-cert": p.cert, "edge-tls-key": p.key, "edge-addr": ":8443"})
	var out bytes.Buffer
	welcome(&out, c, "0.0.0.0:8443", "127.0.0.1:8082", "millrace")
	for _, want := range []string{"clients  wss://localhost:8443/ws\n", "--url wss://localhost:8443/ws\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

// TestExposedTLSKeyIsTold: at the start, and an expired certificate too.
func TestExposedTLSKeyIsTold(t *testing.T) {
	p := newPair(t, t.TempDir(), time.Now().Add(-time.Hour))
	if err := os.Chmod(p.key, 0o644); err != nil {
		t.Fatal(err)
	}
	var logged lockedLog
	c := defaultConfig()
	c.Edge.TLSCert, c.Edge.TLSKey = p.cert, p.key
	s, err := openCertificates(c, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil || s.current.Load() == nil {
		t.Fatal(err)
	}
	for _, want := range []string{"clients will refuse the TLS certificate", "can be read by every user"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("%q is missing in\n%s", want, logged.String())
		}
	}
}
