package token

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// TestCacheKeepsTimes: what is remembered is good for as long as the token, by the clock of who asks.
func TestCacheKeepsTimes(t *testing.T) {
	s := edSigner()
	v := verifierOf(t, s.pem())
	token := []byte(s.token(s.header(""), `{"sub":"alice","exp":1700003600,"nbf":1700000000}`))
	if _, err := v.Verify(token, testNow); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at   int64
		want error
	}{
		{1700000000, nil}, {1700000000 - 60, nil}, {1700000000 - 61, ErrInvalid}, {1700003659, nil},
		{1700003660, ErrExpired}, {1700003661, ErrSlow}, // forgotten
	} {
		got, err := v.VerifyFast(token, time.Unix(c.at, 0))
		if !errors.Is(err, c.want) || (err == nil) != (got == Claims{"alice", time.Unix(testExp, 0)}) {
			t.Errorf("at %d: %+v, %v, want %v", c.at, got, err, c.want)
		}
	}
	if _, err := v.Verify(token, time.Unix(1700003661, 0)); !errors.Is(err, ErrExpired) {
		t.Errorf("forgotten and verified again: %v", err)
	}
}

// TestCacheHoldsOnlyWhatIsGood: and only what is slow.
func TestCacheHoldsOnlyWhatIsGood(t *testing.T) {
	s := edSigner()
	v := verifierFrom(t, Source{Location: writeFile(t, s.pem())}, Source{Secret: testSecret})
	good := s.good("")
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1
		for range 2 {
			if _, err := v.Verify(bad, testNow); err == nil {
				t.Fatalf("byte %d changed", i)
			}
		}
	}
	for _, claims := range []string{`{"sub":"alice","exp":1}`, `{"sub":"","exp":1700003600}`, `{"sub":"alice","exp":1700003600,"nbf":1800000000}`} {
		for range 2 {
			if _, err := v.Verify([]byte(s.token(s.header(""), claims)), testNow); err == nil {
				t.Fatal(claims)
			}
		}
	}
	demand(t, v, "HS256", []byte(hmacToken(header, goodClaims)), nil)
	if n := v.set.Load().cache.len(); n != 0 {
		t.Errorf("%d remembered", n)
	}
	demand(t, v, "good", good, nil)
	if n := v.set.Load().cache.len(); n != 1 {
		t.Errorf("%d remembered", n)
	}
	// With the cache full of it, a changed token is still looked at.
	good[len(good)-1] ^= 1
	demand(t, v, "changed", good, ErrInvalid)
}

func digestOf(i int) *digest {
	d := digest(sha256.Sum256(fmt.Append(nil, i)))
	return &d
}

// TestCacheIsBounded: what expires soon tends to give way.
func TestCacheIsBounded(t *testing.T) {
	const size, late = 1024, 2_000_000_000
	c := newCache(size)
	for i := range 20 * size {
		exp := int64(1_800_000_000)
		if i < size/4 {
			exp = late
		}
		c.put(digestOf(i), remembered{"u", exp, 0})
		c.put(digestOf(i), remembered{"u", exp, 0}) // twice is once
		if n := c.len(); n > size {
			t.Fatalf("%d tokens", n)
		}
	}
	if n := c.len(); n != size {
		t.Errorf("%d tokens after many", n)
	}
	if _, _, found := c.get(digestOf(20*size-1), testNow); !found {
		t.Error("the newest was not kept")
	}
	kept := 0
	for i := range size / 4 {
		if _, _, found := c.get(digestOf(i), testNow); found {
			kept++
		}
	}
	// Of 20 times as many as there is room for, about one in e²⁰ would have been kept by chance.
	if kept < size/4/4 {
		t.Errorf("%d of %d that live longest were kept", kept, size/4)
	}
}

func TestCacheIsConcurrent(t *testing.T) {
	c := newCache(64)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				user := fmt.Sprint(i % 200)
				d := digestOf(i % 200)
				if (i+g)%2 == 0 {
					c.put(d, remembered{user, int64(1_700_000_000 + i%3*1_000_000), 0})
				} else if r, _, found := c.get(d, testNow.Add(time.Hour)); found && r.user != user {
					t.Errorf("%s for %s", r.user, user)
				}
			}
		})
	}
	wg.Wait()
	if n := c.len(); n > 64 {
		t.Errorf("%d tokens", n)
	}
}

func TestWithoutCache(t *testing.T) {
	s := edSigner()
	v, err := New(Config{Sources: []Source{{Location: writeFile(t, s.pem())}}, CacheTokens: -1, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	demand(t, v, "first", s.good(""), nil)
	if _, err := v.VerifyFast(s.good(""), testNow); err != ErrSlow {
		t.Errorf("%v", err)
	}
}

// BenchmarkStorm is everybody coming back with a token that was verified before, or was not.
func BenchmarkStorm(b *testing.B) {
	for _, s := range signers() {
		for name, size := range map[string]int{"cache": 0, "no_cache": -1} {
			b.Run(s.algorithm+"/"+name, func(b *testing.B) {
				v, err := New(Config{Sources: []Source{{Location: writeFile(b, s.pem())}}, CacheTokens: size, Logger: quiet})
				if err != nil {
					b.Fatal(err)
				}
				tokens := make([][]byte, 500)
				for i := range tokens {
					tokens[i] = []byte(s.token(s.header(""), fmt.Sprintf(`{"sub":"user%d","exp":1700003600}`, i)))
					if _, err := v.Verify(tokens[i], testNow); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					if _, err := v.Verify(tokens[i%len(tokens)], testNow); err != nil {
						b.Fatal(err)
					}
					i++
				}
			})
		}
	}
}
