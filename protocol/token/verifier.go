package token

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxSources bounds the configuration, and with it how long Refresh can take.
const maxSources = 16

// Config is what a Verifier is made of.
type Config struct {
	// Sources are where keys come from: at least one.
	Sources []Source
	// RefreshEvery is how often the key set behind an address is fetched; 0: DefaultRefreshEvery. At least MinRefreshEvery.
	RefreshEvery time.Duration
	// CacheTokens is how many tokens are remembered that took long to verify; 0: DefaultCacheTokens; negative: none.
	CacheTokens int

	Logger *slog.Logger // nil: slog.Default
}

// Verifier verifies tokens. Any number of goroutines may use it, also while its keys change.
type Verifier struct {
	refreshEvery time.Duration
	cacheTokens  int
	log          *slog.Logger

	loading sync.Mutex // held by who reads sources, over the network too; never by who verifies
	sources []*source  // what changes in them is guarded by loading

	set    atomic.Pointer[keySet]
	counts [verdicts]atomic.Uint64
	hits   atomic.Uint64
}

// NewHS256 is a verifier for tokens signed with secret, which is copied. White space around the secret is ignored; less
// than MinSecretBytes is an error that says how to make one.
func NewHS256(secret []byte) (*Verifier, error) {
	return New(Config{Sources: []Source{{Secret: secret}}})
}

// New reads the files among the sources and fails if one of them is not as it must be. It does not use the network: the
// keys behind an address come with Refresh or Run, and tokens that need them are ErrUnavailable until then.
func New(cfg Config) (*Verifier, error) {
	v := &Verifier{refreshEvery: cfg.RefreshEvery, cacheTokens: cfg.CacheTokens, log: cfg.Logger}
	if v.refreshEvery == 0 {
		v.refreshEvery = DefaultRefreshEvery
	}
	if v.cacheTokens == 0 {
		v.cacheTokens = DefaultCacheTokens
	}
	if v.log == nil {
		v.log = slog.Default()
	}
	switch {
	case v.refreshEvery < MinRefreshEvery:
		return nil, fmt.Errorf("token keys every %v: at least %v", v.refreshEvery, MinRefreshEvery)
	case len(cfg.Sources) == 0 || len(cfg.Sources) > maxSources:
		return nil, fmt.Errorf("%d sources of token keys: from 1 to %d", len(cfg.Sources), maxSources)
	}
	for i := range cfg.Sources {
		s, err := newSource(&cfg.Sources[i])
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(v.sources, func(other *source) bool { return s.read != nil && other.name == s.name }) {
			return nil, fmt.Errorf("token keys %s: given twice", s.name)
		}
		v.sources = append(v.sources, s)
		if s.read == nil || s.remote {
			continue
		}
		if _, err := v.load(context.Background(), s); err != nil {
			return nil, err
		}
	}
	v.publish()
	return v, nil
}

// Verify checks a token's signature and claims at the time now. The error is ErrExpired, ErrUnavailable or wraps
// ErrInvalid, and never contains anything of the token. Token is not kept. It does not block, but it may compute for as
// long as MaxCandidates verifications with public keys take: that is for VerifyFast to know, and not for an event loop.
func (v *Verifier) Verify(token []byte, now time.Time) (Claims, error) {
	claims, result := v.verify(token, now, false)
	v.counts[result].Add(1)
	return claims, verdictErrors[result]
}

// VerifyFast is Verify where that takes a few microseconds: for HS256, for a token that is remembered, and for one that no
// key can be tried on. For others the error is ErrSlow, and nothing has been decided.
func (v *Verifier) VerifyFast(token []byte, now time.Time) (Claims, error) {
	claims, result := v.verify(token, now, true)
	if result != slow { // Verify will count it
		v.counts[result].Add(1)
	}
	return claims, verdictErrors[result]
}

// verify looks at nothing that the signature covers before it has been checked, but for the two header parameters that
// say how.
func (v *Verifier) verify(token []byte, now time.Time, fast bool) (Claims, verdict) {
	if len(token) > MaxBytes {
		return Claims{}, tooLong
	}
	buffer := scratches.Get().(*scratch)
	defer scratches.Put(buffer)
	buffer.used = 0
	set := v.set.Load()
	o, result := set.open(buffer, token)
	if result != accepted {
		return Claims{}, result
	}
	var sum digest
	remember := o.algorithm.slow() && set.cache != nil
	if remember {
		sum = sha256.Sum256(token)
		if r, result, found := set.cache.get(&sum, now); found {
			v.hits.Add(1)
			return r.claims(result)
		}
	}
	if fast && o.algorithm.slow() {
		return Claims{}, slow
	}
	said, result := set.authenticate(buffer, &o)
	if result != accepted {
		return Claims{}, result
	}
	if result = said.check(o.signer.trust, now); result != accepted {
		return Claims{}, result
	}
	r := remembered{user: string(said.user), exp: said.exp, nbf: said.nbf}
	if remember {
		set.cache.put(&sum, r)
	}
	return r.claims(accepted)
}

// opened is a token that has been taken apart but not been verified.
type opened struct {
	parts
	algorithm  algorithm
	candidates [MaxCandidates]*key
	n          int
	decoded    []byte // signature
	signer     *key   // set by authenticate
}

// open finds the keys to try and refuses what no key can make good.
func (s *keySet) open(buffer *scratch, token []byte) (o opened, v verdict) {
	var ok bool
	if o.parts, ok = split(token); !ok {
		return o, malformed
	}
	b, ok := buffer.decode(o.header)
	if !ok {
		return o, malformed
	}
	h, v := parseHeader(b)
	if v != accepted {
		return o, v
	}
	if o.algorithm, ok = algorithmNamed(h.algorithm); !ok {
		return o, otherAlgorithm
	}
	if o.candidates, o.n, v = s.candidates(o.algorithm, h.id); v != accepted {
		return o, v
	}
	if o.decoded, ok = buffer.decode(o.signature); !ok {
		return o, malformed
	}
	return o, accepted
}

// authenticate finds the key that has signed a token, and only then reads its claims.
func (s *keySet) authenticate(buffer *scratch, o *opened) (c statement, v verdict) {
	for _, k := range o.candidates[:o.n] {
		if k.verifies(o.signed, o.decoded) {
			o.signer = k
			break
		}
	}
	switch {
	case o.signer == nil && s.incomplete && o.algorithm.slow():
		return c, unavailable // its key may be among those that we do not have yet
	case o.signer == nil:
		return c, wrongSignature
	}
	b, ok := buffer.decode(o.claims)
	if !ok {
		return c, malformed
	}
	return parseClaims(b)
}

func (r *remembered) claims(v verdict) (Claims, verdict) {
	if v != accepted {
		return Claims{}, v
	}
	return Claims{User: r.user, ExpiresAt: time.Unix(r.exp, 0)}, accepted
}

// publish makes the keys of all sources the ones to verify with.
func (v *Verifier) publish() {
	set := &keySet{}
	for _, s := range v.sources {
		for _, k := range s.keys {
			set.keys[k.algorithm] = append(set.keys[k.algorithm], k)
		}
		set.incomplete = set.incomplete || len(s.keys) == 0
	}
	if v.cacheTokens > 0 {
		set.cache = newCache(v.cacheTokens)
	}
	v.set.Store(set)
}

// Refresh reads every file and fetches every key set again, but for an address that was asked within the last
// MinFetchGap, whose last outcome stands. It blocks, for up to 10 s for each address that does not answer. The error says
// which sources failed; their last good keys, if there are any, stay in use.
func (v *Verifier) Refresh(ctx context.Context) error {
	return v.loadSome(ctx, func(s *source, now time.Time) bool { return s.mayLoad(now) })
}

// Run refreshes keys when they are due, until ctx ends: a file every 10 s, an address every RefreshEvery, sooner after a
// failure. It returns at once when all keys are secrets. Failures are logged.
func (v *Verifier) Run(ctx context.Context) {
	for {
		due, some := v.nextDue()
		if !some {
			return
		}
		timer := time.NewTimer(time.Until(due))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		// The error has been logged, and the source will be due again.
		_ = v.loadSome(ctx, func(s *source, now time.Time) bool { return !now.Before(s.due) && s.mayLoad(now) })
	}
}

// Ready is ErrUnavailable while there is not one key: those of every configured address are still to come, and every token
// is ErrUnavailable.
func (v *Verifier) Ready() error {
	for _, keys := range v.set.Load().keys {
		if len(keys) > 0 {
			return nil
		}
	}
	return ErrUnavailable
}

func (v *Verifier) nextDue() (due time.Time, some bool) {
	v.loading.Lock()
	defer v.loading.Unlock()
	for _, s := range v.sources {
		if s.read != nil && (!some || s.due.Before(due)) {
			due, some = s.due, true
		}
	}
	return due, some
}

func (v *Verifier) loadSome(ctx context.Context, which func(*source, time.Time) bool) error {
	v.loading.Lock()
	defer v.loading.Unlock()
	var failed []error
	for _, s := range v.sources {
		if s.read == nil {
			continue
		}
		if which(s, time.Now()) {
			changed, err := v.load(ctx, s)
			if changed {
				v.publish()
			}
			if err != nil && ctx.Err() == nil {
				v.logFailure(s, err)
			}
		}
		failed = append(failed, s.err)
	}
	return errors.Join(failed...)
}
