package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxCertificateBytes is far more than any chain takes.
	maxCertificateBytes = 1 << 20
	// certificatePoll is how often the files are looked at; SIGHUP does not wait for it.
	certificatePoll = 10 * time.Second
)

// certificates is the pair of the edge. Files that are bad change nothing: the pair that was loaded last is served on.
type certificates struct {
	// Immutable.
	cert, key string
	log       *slog.Logger
	now       func() time.Time

	current  atomic.Pointer[tls.Certificate]
	loaded   atomic.Uint64 // pairs, the first one too
	failures atomic.Uint64

	mu   sync.Mutex
	seen fileStamps // of the last attempt
}

// fileStamps tells whether files are still what they were.
type fileStamps [2]os.FileInfo

func (c *certificates) stamps() (s fileStamps) {
	for i, path := range []string{c.cert, c.key} {
		s[i], _ = os.Stat(path) // nil until it is there again; reading it will tell
	}
	return s
}

func (s *fileStamps) equal(o *fileStamps) bool {
	for i := range s {
		a, b := s[i], o[i]
		if (a == nil) != (b == nil) ||
			a != nil && !(os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()) {
			return false
		}
	}
	return true
}

// openCertificates loads the pair, or returns nil when TLS is not configured. One that has expired is served, with a warning: it
// is the operator's, and there is no other.
func openCertificates(c Config, log *slog.Logger) (*certificates, error) {
	if c.Edge.TLSCert == "" {
		return nil, nil
	}
	s := &certificates{cert: c.Edge.TLSCert, key: c.Edge.TLSKey, log: log, now: time.Now}
	s.seen = s.stamps()
	pair, err := readCertificate(s.cert, s.key)
	if err != nil {
		return nil, err
	}
	if err := validAt(pair.Leaf, s.now()); err != nil {
		log.Warn("clients will refuse the TLS certificate", "file", s.cert, "error", err.Error())
	}
	s.take(pair)
	info, err := os.Stat(s.key)
	if err != nil {
		return nil, fmt.Errorf("look at the TLS key: %w", err)
	}
	if problem := exposure(info.Mode(), ownerOf(info), os.Geteuid()); problem != "" {
		log.Warn("the file with the private key of TLS "+problem, "file", s.key, "mode", octal(info))
	}
	return s, nil
}

// readCertificate reads a chain and its key.
func readCertificate(cert, key string) (*tls.Certificate, error) {
	chain, err := readLimited(cert, maxCertificateBytes)
	if err != nil {
		return nil, fmt.Errorf("read TLS certificate: %w", err)
	}
	private, err := readLimited(key, maxCertificateBytes)
	if err != nil {
		return nil, fmt.Errorf("read TLS key: %w", err)
	}
	pair, err := tls.X509KeyPair(chain, private)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate %s with key %s: %w", cert, key, err)
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return nil, fmt.Errorf("TLS certificate %s: %w", cert, err)
		}
	}
	return &pair, nil
}

func validAt(leaf *x509.Certificate, now time.Time) error {
	switch {
	case now.After(leaf.NotAfter):
		return fmt.Errorf("it has expired on %s", leaf.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("it is not valid before %s", leaf.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

func (s *certificates) take(pair *tls.Certificate) {
	s.current.Store(pair)
	s.loaded.Add(1)
}

// source is what the edge asks; nil means that it speaks no TLS.
func (s *certificates) source() func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s == nil {
		return nil
	}
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.current.Load(), nil }
}

// reload reads the pair again. When it is bad, or not valid now while the old one is, the old one stays.
func (s *certificates) reload() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = s.stamps() // before reading: what changes meanwhile is read once more
	return s.reloadLocked()
}

func (s *certificates) reloadLocked() error {
	pair, err := readCertificate(s.cert, s.key)
	old := s.current.Load()
	if err == nil && validAt(old.Leaf, s.now()) == nil {
		if invalid := validAt(pair.Leaf, s.now()); invalid != nil {
			err = fmt.Errorf("TLS certificate %s: %w", s.cert, invalid)
		}
	}
	if err != nil {
		s.failures.Add(1)
		return fmt.Errorf("the TLS certificate from before stays, valid until %s: %w", old.Leaf.NotAfter.UTC().Format(time.RFC3339), err)
	}
	if bytes.Equal(pair.Certificate[0], old.Certificate[0]) {
		return nil
	}
	s.take(pair)
	s.log.Info("new TLS certificate", "file", s.cert, "serial", pair.Leaf.SerialNumber.String(), "valid_until", pair.Leaf.NotAfter.UTC())
	return nil
}

// poll reloads when a file has changed since the last attempt.
func (s *certificates) poll() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.stamps()
	if now.equal(&s.seen) {
		return nil
	}
	s.seen = now
	return s.reloadLocked()
}

// run polls until ctx ends.
func (s *certificates) run(ctx context.Context) {
	if s == nil {
		return
	}
	ticker := time.NewTicker(certificatePoll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			if err := s.poll(); err != nil { // often one file of two has been replaced, and the next poll finds both
				s.log.Warn("TLS certificate", "error", err.Error())
			}
		}
	}
}

// metrics tells when clients will refuse the certificate.
func (s *certificates) metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	if s == nil {
		return
	}
	emit("millrace_tls_certificate_expires_seconds", "When the TLS certificate expires, in seconds since 1970.", false, float64(s.current.Load().Leaf.NotAfter.Unix()))
	emit("millrace_tls_certificate_loads_total", "TLS certificates taken into use, the first one too.", true, float64(s.loaded.Load()))
	emit("millrace_tls_certificate_failures_total", "Attempts to load a TLS certificate that failed: the one from before stayed.", true, float64(s.failures.Load()))
}

// checkCertificate says what is wrong with the files of TLS.
func checkCertificate(c Config) error {
	if c.Edge.TLSCert == "" {
		return nil
	}
	_, err := readCertificate(c.Edge.TLSCert, c.Edge.TLSKey)
	return err
}

// clientURL is the URL under which clients reach a listener. With TLS the host is one that the certificate is for.
func clientURL(c Config, addr string) string {
	if c.Edge.TLSCert == "" {
		return endpoint(addr)
	}
	host, port, err := net.SplitHostPort(reachable(addr))
	if err != nil {
		return "wss://" + addr + "/ws"
	}
	if name := nameIn(c.Edge.TLSCert); name != "" {
		host = name
	}
	return "wss://" + net.JoinHostPort(host, port) + "/ws"
}

// nameIn is the first host that a certificate is for, or "". A wildcard is none.
func nameIn(path string) string {
	data, err := readLimited(path, maxCertificateBytes)
	if err != nil {
		return ""
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return ""
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	for _, name := range leaf.DNSNames {
		if !strings.Contains(name, "*") {
			return name
		}
	}
	if len(leaf.IPAddresses) > 0 {
		return leaf.IPAddresses[0].String()
	}
	return ""
}
