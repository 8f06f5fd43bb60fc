package token

import (
	"crypto/sha256"
	"sync"
	"time"
)

// DefaultCacheTokens is how many verified tokens are remembered: with a user id of 16 bytes about 150 B each, 10 MB in all when
// it is full.
const DefaultCacheTokens = 1 << 16

// cacheShards keeps event loops out of each other's way.
const cacheShards = 16

// evictionSample is how many tokens of a full shard are looked at for the one that gives way.
const evictionSample = 4

// digest is SHA-256 of a whole token, with its signature: who can make another with the same can forge more than tokens.
type digest [sha256.Size]byte

// remembered is a token that was accepted once under the keys that the cache belongs to.
type remembered struct {
	user     string
	exp, nbf int64
}

// cache remembers tokens whose signature was good. It is for any number of goroutines.
type cache struct {
	maxPerShard int
	shards      [cacheShards]cacheShard
}

type cacheShard struct {
	mu     sync.Mutex
	tokens map[digest]remembered
	_      [48]byte // up to a cache line
}

// newCache remembers up to maxTokens, rounded up to a multiple of the shards. It takes memory only as it fills.
func newCache(maxTokens int) *cache {
	c := &cache{maxPerShard: (maxTokens + cacheShards - 1) / cacheShards}
	for i := range c.shards {
		c.shards[i].tokens = make(map[digest]remembered)
	}
	return c
}

// get forgets a token that has expired, and says so this last time.
func (c *cache) get(d *digest, now time.Time) (r remembered, v verdict, found bool) {
	s := &c.shards[d[0]%cacheShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	r, found = s.tokens[*d]
	if !found {
		return remembered{}, accepted, false
	}
	v = checkTimes(r.exp, r.nbf, now)
	if v == expired {
		delete(s.tokens, *d)
	}
	return r, v, true
}

// put makes room where there is none: of a few tokens the one that expires first goes.
func (c *cache) put(d *digest, r remembered) {
	s := &c.shards[d[0]%cacheShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, found := s.tokens[*d]; !found && len(s.tokens) >= c.maxPerShard {
		s.evict()
	}
	s.tokens[*d] = r
}

func (s *cacheShard) evict() {
	var victim digest
	looked, first := 0, int64(0)
	for d, r := range s.tokens { // begins anywhere
		if looked == 0 || r.exp < first {
			victim, first = d, r.exp
		}
		if looked++; looked == evictionSample {
			break
		}
	}
	delete(s.tokens, victim)
}

func (c *cache) len() (n int) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		n += len(s.tokens)
		s.mu.Unlock()
	}
	return n
}
