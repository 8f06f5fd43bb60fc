//go:build !race

package token

import (
	"crypto/sha256"
	"testing"
)

// TestGarbage: what a flood costs the collector. The one allocation of a good token is its user id.
func TestGarbage(t *testing.T) {
	s := edSigner()
	v := verifierFrom(t, Source{Location: writeFile(t, s.pem()), KeyID: "a"}, Source{Secret: testSecret})
	known := s.good("a")
	demand(t, v, "known", known, nil)
	for _, c := range []struct {
		name  string
		token []byte
		most  float64
	}{
		{"HS256", []byte(hmacToken(header, goodClaims)), 1},
		{"remembered", known, 0},
		{"wrong signature", []byte(sign(header, goodClaims, sha256.New, nil)), 0},
		{"unknown kid", s.good("b"), 0},
		{"none", []byte(encode(`{"alg":"none"}`) + "." + encode(goodClaims) + "."), 0},
	} {
		if n := testing.AllocsPerRun(200, func() { v.VerifyFast(c.token, testNow) }); n > c.most {
			t.Errorf("%s: %v allocations, at most %v", c.name, n, c.most)
		}
	}
}
