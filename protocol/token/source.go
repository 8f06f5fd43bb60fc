package token

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// DefaultRefreshEvery and MinRefreshEvery are of key sets behind an address. A key has to be in the set for as long
	// before tokens are signed with it, and a key that leaves the set is believed for as long after.
	DefaultRefreshEvery = 5 * time.Minute
	MinRefreshEvery     = 30 * time.Second
	// MinFetchGap is the least time between two requests to one address, whoever wants them.
	MinFetchGap = 5 * time.Second

	fileEvery = 10 * time.Second
	// maxContentBytes is far over any key set, with certificate chains in it too.
	maxContentBytes = 512 << 10
	// logAgainEvery bounds the lines about a failure that stays the same.
	logAgainEvery = 5 * time.Minute
)

// Source is one place that keys come from, and what tokens signed with them must say. Exactly one of Secret and
// Location is set.
type Source struct {
	// Secret is for HS256: at least MinSecretBytes, white space around it ignored. It is copied.
	Secret []byte
	// Location is a file of PEM blocks (PUBLIC KEY, CERTIFICATE), a file with a JSON Web Key Set, or the https address
	// of one. Http is for loopback addresses alone.
	Location string
	// KeyID is the kid of a Secret or of the one key in a PEM file. Without one, and for keys of a set that have none, a
	// token's kid is not compared.
	KeyID string
	// Issuer is what iss must be; empty: not looked at.
	Issuer string
	// Audiences are what aud may be, or one of them what it must contain; none: not looked at.
	Audiences []string
	// CAFile holds the PEM certificates of who may vouch for an https address; empty: the system's.
	CAFile string
}

// source is a Source at work.
type source struct {
	name   string // for logs and metrics
	id     string
	trust  *trust
	remote bool
	read   func(context.Context) ([]byte, error) // nil: a secret, which stays

	// Guarded by Verifier.loading.
	keys     []key  // empty until the first success, the last good ones ever after
	content  digest // that keys were made of
	tried    time.Time
	due      time.Time
	failures int // in a row
	err      error
	logged   time.Time

	loadedAt atomic.Int64 // seconds since 1970 of the last success
	failed   atomic.Uint64
}

func newSource(cfg *Source) (*source, error) {
	s := &source{id: cfg.KeyID, trust: &trust{issuer: cfg.Issuer, audiences: slices.Clone(cfg.Audiences)}}
	switch {
	case (cfg.Secret == nil) == (cfg.Location == ""):
		return nil, errors.New("token keys: a source is either a secret or a file or address")
	case len(cfg.KeyID) > maxKeyIDBytes:
		return nil, fmt.Errorf("token keys: a kid of %d bytes: at most %d", len(cfg.KeyID), maxKeyIDBytes)
	}
	if cfg.Secret != nil {
		secret, err := checkSecret(cfg.Secret)
		if err != nil {
			return nil, err
		}
		s.name = "secret"
		s.adopt([]key{newSecretKey(secret)})
		return s, nil
	}
	return s, s.locate(cfg)
}

// locate finds out where to read.
func (s *source) locate(cfg *Source) (err error) {
	switch remote := isAddress(cfg.Location); {
	case remote && cfg.KeyID != "":
		return fmt.Errorf("token keys %s: a kid is for a secret or a PEM file; a key set has its own", cfg.Location)
	case remote:
		s.remote = true
		s.name, s.read, err = newFetch(cfg.Location, cfg.CAFile)
		return err
	case cfg.CAFile != "":
		return fmt.Errorf("token keys %s: a CA file is for an https address", cfg.Location)
	}
	s.name = cfg.Location
	s.read = func(context.Context) ([]byte, error) { return readFile(cfg.Location) }
	return nil
}

// readFile reads a file of keys. It does not wait for a pipe, and not forever for a device.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f)
}

func readBounded(r io.Reader) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, maxContentBytes+1))
	if err == nil && len(content) > maxContentBytes {
		err = fmt.Errorf("longer than %d KiB", maxContentBytes>>10)
	}
	return content, err
}

func (s *source) mayLoad(now time.Time) bool {
	return !s.remote || s.tried.IsZero() || now.Sub(s.tried) >= MinFetchGap
}

// load reads a source. When that fails its last good keys stay.
func (v *Verifier) load(ctx context.Context, s *source) (changed bool, err error) {
	s.tried = time.Now()
	changed, skipped, err := s.load(ctx)
	if err != nil {
		s.err = fmt.Errorf("token keys %s: %w", s.name, err)
		s.failures++
		s.failed.Add(1)
	} else {
		s.err, s.failures, s.logged = nil, 0, time.Time{}
		s.loadedAt.Store(time.Now().Unix())
	}
	if changed {
		v.log.Info("token keys loaded", "source", s.name, "keys", len(s.keys))
	}
	for _, why := range skipped {
		v.log.Warn("token key not used", "source", s.name, "err", why)
	}
	s.due = time.Now().Add(s.wait(v.refreshEvery))
	return changed, s.err
}

func (s *source) load(ctx context.Context) (changed bool, skipped []error, err error) {
	content, err := s.read(ctx)
	if err != nil {
		return false, nil, err
	}
	sum := digest(sha256.Sum256(content))
	if len(s.keys) > 0 && sum == s.content {
		return false, nil, nil
	}
	var keys []key
	if s.remote || bytes.HasPrefix(bytes.TrimSpace(content), []byte("{")) {
		keys, skipped, err = parseJWKS(content)
	} else {
		keys, err = parsePEM(content)
	}
	switch {
	case err != nil:
		return false, nil, err
	case s.id != "" && len(keys) > 1:
		return false, nil, fmt.Errorf("one kid for %d keys", len(keys))
	}
	s.content = sum
	s.adopt(keys)
	return true, skipped, nil
}

// adopt makes keys those of the source. Each carries what its tokens must say: a kid or a key that two sources have in common
// lets neither speak for the other.
func (s *source) adopt(keys []key) {
	for i := range keys {
		keys[i].trust = s.trust
		if s.id != "" {
			keys[i].id = s.id
		}
	}
	s.keys = keys
}

// wait is how long the source rests. After failures it is MinFetchGap, twice that, and so on up to the usual; the tenth
// that is added or taken away keeps many servers from asking at once.
func (s *source) wait(refreshEvery time.Duration) time.Duration {
	if !s.remote {
		return fileEvery
	}
	d := refreshEvery
	if s.failures > 0 {
		d = min(d, MinFetchGap<<min(s.failures-1, 16))
	}
	return max(d-d/10+rand.N(d/5), MinFetchGap)
}

func (v *Verifier) logFailure(s *source, err error) {
	if now := time.Now(); s.logged.IsZero() || now.Sub(s.logged) >= logAgainEvery {
		s.logged = now
		v.log.Error("token keys could not be loaded", "err", err, "kept", len(s.keys), "failures", s.failures)
	}
}
