package token

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const goodClaims = `{"sub":"alice","exp":1700003600}`

// signer is a key pair of one algorithm.
type signer struct {
	algorithm string
	private   crypto.Signer
}

func (s signer) sign(text string) []byte {
	var signature []byte
	var err error
	digest := sha256.Sum256([]byte(text))
	switch private := s.private.(type) {
	case ed25519.PrivateKey:
		return ed25519.Sign(private, []byte(text))
	case *ecdsa.PrivateKey:
		var r, v *big.Int
		if r, v, err = ecdsa.Sign(rand.Reader, private, digest[:]); err == nil {
			signature = make([]byte, 64)
			r.FillBytes(signature[:32])
			v.FillBytes(signature[32:])
		}
	case *rsa.PrivateKey:
		signature, err = rsa.SignPKCS1v15(rand.Reader, private, crypto.SHA256, digest[:])
	}
	if err != nil {
		panic(err)
	}
	return signature
}

func (s signer) token(header, claims string) string {
	text := encode(header) + "." + encode(claims)
	return text + "." + base64.RawURLEncoding.EncodeToString(s.sign(text))
}

// good is a token of its algorithm with a kid, or none.
func (s signer) good(id string) []byte { return []byte(s.token(s.header(id), goodClaims)) }

func (s signer) header(id string) string {
	if id == "" {
		return `{"alg":"` + s.algorithm + `"}`
	}
	return `{"alg":"` + s.algorithm + `","kid":"` + id + `"}`
}

func (s signer) pem() string {
	der, err := x509.MarshalPKIXPublicKey(s.private.Public())
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func (s signer) certificate() string {
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: testNow}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.private.Public(), s.private)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// jwk is the public key as a JSON Web Key; more are further members, each with a comma before it.
func (s signer) jwk(id, more string) string {
	b64 := base64.RawURLEncoding.EncodeToString
	if id != "" {
		more += `,"kid":"` + id + `"`
	}
	switch public := s.private.Public().(type) {
	case ed25519.PublicKey:
		return fmt.Sprintf(`{"kty":"OKP","crv":"Ed25519","x":"%s"%s}`, b64(public), more)
	case *ecdsa.PublicKey:
		point, err := public.Bytes()
		if err != nil {
			panic(err)
		}
		n := len(point) / 2
		return fmt.Sprintf(`{"kty":"EC","crv":"%s","x":"%s","y":"%s"%s}`, public.Params().Name, b64(point[1:1+n]), b64(point[1+n:]), more)
	case *rsa.PublicKey:
		return fmt.Sprintf(`{"kty":"RSA","n":"%s","e":"%s"%s}`, b64(public.N.Bytes()), b64(big.NewInt(int64(public.E)).Bytes()), more)
	}
	panic("no such key")
}

func jwks(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }

func newEd25519() signer {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return signer{"EdDSA", private}
}

func newEC(curve elliptic.Curve) signer {
	private, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		panic(err)
	}
	return signer{"ES256", private}
}

func newRSA(bits int) signer {
	private, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		panic(err)
	}
	return signer{"RS256", private}
}

// Keys that every test may use; to make an RSA key takes long.
var (
	rsaSigner = sync.OnceValue(func() signer { return newRSA(2048) })
	ecSigner  = sync.OnceValue(func() signer { return newEC(elliptic.P256()) })
	edSigner  = sync.OnceValue(newEd25519)
)

func signers() []signer { return []signer{edSigner(), ecSigner(), rsaSigner()} }

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func writeFile(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// verifierOf takes its keys from a file with this content.
func verifierOf(t testing.TB, content string) *Verifier {
	t.Helper()
	return verifierFrom(t, Source{Location: writeFile(t, content)})
}

func verifierFrom(t testing.TB, sources ...Source) *Verifier {
	t.Helper()
	v, err := New(Config{Sources: sources, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func demand(t *testing.T, v *Verifier, name string, token []byte, want error) {
	t.Helper()
	c, err := v.Verify(token, testNow)
	if !errors.Is(err, want) || (err == nil) != (c.User == "alice") || err != nil && c != (Claims{}) {
		t.Errorf("%s: %+v, %v, want %v", name, c, err, want)
	}
}

func TestPublicKeys(t *testing.T) {
	for _, s := range signers() {
		for form, content := range map[string]string{
			"PUBLIC KEY":            s.pem(),
			"CERTIFICATE":           "subject: x\n" + s.certificate(),
			"key set":               jwks(s.jwk("", "")),
			"key set, all members":  "\n " + jwks(s.jwk("a", `,"use":"sig","key_ops":["verify"],"alg":"`+s.algorithm+`","x5t":"x","x5u":"http://127.0.0.1:1/"`)),
			"key set with the rest": `{"issuer":5,"keys":[` + s.jwk("a", "") + `],"x":{}}`,
		} {
			name := s.algorithm + ", " + form
			v := verifierOf(t, content)
			demand(t, v, name, s.good(""), nil)
			demand(t, v, name+", kid", s.good("a"), nil)
			if c, err := v.VerifyFast([]byte(s.token(s.header("")+" ", goodClaims)), testNow); err != ErrSlow || c != (Claims{}) {
				t.Errorf("%s: verified on the spot: %+v, %v", name, c, err)
			}
			if c, err := v.VerifyFast([]byte(s.token(s.header("x"), goodClaims)), testNow); strings.Contains(content, `"kid"`) && !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: %+v, %v for an unknown kid", name, c, err)
			}
		}
	}
}

// TestEd25519Name: RFC 9864 gives the algorithm a name of its own.
func TestEd25519Name(t *testing.T) {
	s := edSigner()
	demand(t, verifierOf(t, jwks(s.jwk("a", `,"alg":"Ed25519"`))), "Ed25519", []byte(s.token(`{"alg":"Ed25519","kid":"a"}`, goodClaims)), nil)
}

func TestBadPublicTokens(t *testing.T) {
	ed, ec, rs := edSigner(), ecSigner(), rsaSigner()
	v := verifierFrom(t, Source{Location: writeFile(t, jwks(ed.jwk("ed", ""), ec.jwk("ec", ""), rs.jwk("rs", "")))},
		Source{Secret: testSecret, KeyID: "hs"})
	secretOf := func(header, claims string, secret string) []byte {
		return []byte(sign(header, claims, sha256.New, []byte(secret)))
	}
	swapped := func(a, b signer) []byte { // what a has signed, said to be b's
		return []byte(a.token(b.header(""), goodClaims))
	}
	otherEC := newEC(elliptic.P256())
	longClaims := `{"sub":"alice","exp":1700003600,"x":"` + strings.Repeat("x", 6<<10) + `"}`
	for _, c := range []struct {
		name  string
		token []byte
	}{
		{"HS256 with the RSA public key as PEM", secretOf(`{"alg":"HS256"}`, goodClaims, rs.pem())},
		{"HS256 with the RSA public key as PEM, and its kid", secretOf(`{"alg":"HS256","kid":"rs"}`, goodClaims, rs.pem())},
		{"HS256 with the RSA public key, trimmed", secretOf(`{"alg":"HS256","kid":"rs"}`, goodClaims, strings.TrimSpace(rs.pem()))},
		{"HS256 with the Ed25519 public key", secretOf(`{"alg":"HS256","kid":"ed"}`, goodClaims, string(ed.private.Public().(ed25519.PublicKey)))},
		{"none", []byte(encode(`{"alg":"none","kid":"rs"}`) + "." + encode(goodClaims) + ".")},
		{"the signature left out", rs.good("rs")[:bytes.LastIndexByte(rs.good("rs"), '.')+1]},

		{"unknown kid", rs.good("unknown")},
		{"kid of another algorithm", rs.good("ec")},
		{"kid of the secret", rs.good("hs")},
		{"kid in other case", rs.good("RS")},
		{"kid with a space", rs.good("rs ")},
		{"kid with NUL", []byte(rs.token(`{"alg":"RS256","kid":"rs\u0000"}`, goodClaims))},
		{"kid is a path", rs.good("../../../../dev/null")},
		{"kid is SQL", rs.good("' UNION SELECT 'x")},
		{"kid is an address", rs.good("https://127.0.0.1:1/jwks.json")},
		{"secret's kid is a path", secretOf(`{"alg":"HS256","kid":"/dev/null"}`, goodClaims, "")},

		{"RS256 under ES256", swapped(rs, ec)},
		{"ES256 under RS256", swapped(ec, rs)},
		{"ES256 under EdDSA", swapped(ec, ed)},
		{"EdDSA under ES256", swapped(ed, ec)},
		{"another key of the algorithm", otherEC.good("ec")},
		{"another key of the algorithm, its own in the header",
			[]byte(otherEC.token(`{"alg":"ES256","kid":"ec","jwk":`+otherEC.jwk("ec", "")+`}`, goodClaims))},
		{"PS256", []byte(rs.token(`{"alg":"PS256","kid":"rs"}`, goodClaims))},
		{"RS384", []byte(rs.token(`{"alg":"RS384","kid":"rs"}`, goodClaims))},
		{"RS512", []byte(rs.token(`{"alg":"RS512","kid":"rs"}`, goodClaims))},
		{"ES384", []byte(ec.token(`{"alg":"ES384","kid":"ec"}`, goodClaims))},
		{"ES256K", []byte(ec.token(`{"alg":"ES256K","kid":"ec"}`, goodClaims))},
		{"rs256", []byte(rs.token(`{"alg":"rs256","kid":"rs"}`, goodClaims))},
		{"Rs256", []byte(rs.token(`{"alg":"Rs256","kid":"rs"}`, goodClaims))},
		{"EDDSA", []byte(ed.token(`{"alg":"EDDSA","kid":"ed"}`, goodClaims))},
		{"Ed448", []byte(ed.token(`{"alg":"Ed448","kid":"ed"}`, goodClaims))},
		{"alg given twice", []byte(rs.token(`{"alg":"RS256","kid":"rs","alg":"RS256"}`, goodClaims))},
		{"kid given twice", []byte(rs.token(`{"alg":"RS256","kid":"ec","kid":"rs"}`, goodClaims))},
		{"crit", []byte(rs.token(`{"alg":"RS256","kid":"rs","crit":["b64"],"b64":false}`, goodClaims))},
		{"nested", []byte(rs.token(`{"alg":"RS256","kid":"rs","cty":"JWT"}`, string(rs.good("rs"))))},
		{"huge", []byte(rs.token(rs.header("rs"), longClaims))},
		{"huge header", []byte(rs.token(`{"alg":"RS256","x":"`+strings.Repeat("x", 6<<10)+`"}`, goodClaims))},
		{"no sub", []byte(rs.token(rs.header("rs"), `{"exp":1700003600}`))},
		{"not valid yet", []byte(rs.token(rs.header("rs"), `{"sub":"alice","exp":1700003600,"nbf":1700000061}`))},
	} {
		c1, err1 := v.Verify(c.token, testNow)
		c2, err2 := v.Verify(c.token, testNow) // a refusal is not remembered as anything else
		if !errors.Is(err1, ErrInvalid) || !errors.Is(err2, ErrInvalid) || c1 != (Claims{}) || c2 != (Claims{}) {
			t.Errorf("%s: %+v, %v, then %+v, %v", c.name, c1, err1, c2, err2)
			continue
		}
		demandSecrecy(t, string(c.token), err1)
	}
	demand(t, v, "expired", []byte(rs.token(rs.header("rs"), `{"sub":"alice","exp":1699999940}`)), ErrExpired)
	for i, s := range signers() {
		demand(t, v, "good "+s.algorithm, s.good([]string{"ed", "ec", "rs"}[i]), nil)
		demand(t, v, "good "+s.algorithm+" without a kid", s.good(""), nil)
	}
	if n := v.set.Load().cache.len(); n != 6 {
		t.Errorf("%d tokens remembered, and 6 were good", n)
	}
}

// TestES256Signatures: RFC 7518 §3.4 wants 64 bytes, r and s in 32 each. It wants no low s, and many who sign do not make
// one; so both texts of a signature are good, and nobody here takes a token for the only one with its claims.
func TestES256Signatures(t *testing.T) {
	s := ecSigner()
	v := verifierOf(t, s.pem())
	text := encode(s.header("")) + "." + encode(goodClaims)
	good := s.sign(text)
	r, low := new(big.Int).SetBytes(good[:32]), new(big.Int).SetBytes(good[32:])
	order := elliptic.P256().Params().N
	der, err := asn1.Marshal(struct{ R, S *big.Int }{r, low})
	if err != nil {
		t.Fatal(err)
	}
	pair := func(r, s *big.Int) []byte {
		b := make([]byte, 64)
		r.FillBytes(b[:32])
		s.FillBytes(b[32:])
		return b
	}
	zero, all := new(big.Int), new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 256), big.NewInt(1))
	for _, c := range []struct {
		name      string
		signature []byte
		want      error
	}{
		{"good", good, nil},
		{"the other s", pair(r, new(big.Int).Sub(order, low)), nil},
		{"empty", nil, ErrInvalid},
		{"short", good[:63], ErrInvalid},
		{"half", good[:32], ErrInvalid},
		{"long", append(bytes.Clone(good), 0), ErrInvalid},
		{"zero before it", append([]byte{0}, good...), ErrInvalid},
		{"DER", der, ErrInvalid},
		{"swapped", pair(low, r), ErrInvalid},
		{"all zero", make([]byte, 64), ErrInvalid},
		{"r is zero", pair(zero, low), ErrInvalid},
		{"s is zero", pair(r, zero), ErrInvalid},
		{"s is the order", pair(r, order), ErrInvalid},
		{"r is the order", pair(order, low), ErrInvalid},
		{"s + order", pair(r, new(big.Int).Mod(new(big.Int).Add(low, order), new(big.Int).Lsh(big.NewInt(1), 256))), ErrInvalid},
		{"all ones", pair(all, all), ErrInvalid},
	} {
		// s + order fits into 32 bytes only for a tiny s; taken modulo 2²⁵⁶ it is just another number.
		demand(t, v, c.name, []byte(text+"."+base64.RawURLEncoding.EncodeToString(c.signature)), c.want)
	}
}

func TestIssuersAndAudiences(t *testing.T) {
	s := edSigner()
	path := writeFile(t, s.pem())
	v := verifierFrom(t, Source{Location: path, Issuer: "https://id.example", Audiences: []string{"chat", "chat.example"}})
	const start = `{"sub":"alice","exp":1700003600`
	for _, c := range []struct {
		claims string
		want   error
	}{
		{`,"iss":"https://id.example","aud":"chat"}`, nil},
		{`,"iss":"https://id.example","aud":"chat.example"}`, nil},
		{`,"iss":"https://id.example","aud":["chat"]}`, nil},
		{`,"iss":"https://id.example","aud":[ "other" , "chat" ]}`, nil},
		{`,"iss":"https:\/\/id.example","aud":["c\u0068at"]}`, nil},

		{`,"aud":"chat"}`, ErrInvalid},
		{`,"iss":null,"aud":"chat"}`, ErrInvalid},
		{`,"iss":"","aud":"chat"}`, ErrInvalid},
		{`,"iss":["https://id.example"],"aud":"chat"}`, ErrInvalid},
		{`,"iss":"https://id.example/","aud":"chat"}`, ErrInvalid},
		{`,"iss":"https://ID.example","aud":"chat"}`, ErrInvalid},
		{`,"iss":"https://evil.example","aud":"chat"}`, ErrInvalid},

		{`,"iss":"https://id.example"}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":null}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":""}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":[]}`, ErrInvalid}, // CVE-2020-26160
		{`,"iss":"https://id.example","aud":[""]}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":"Chat"}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":"chat "}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":"chat,other"}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":["other"]}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":[["chat"]]}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":["chat",1]}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":{"chat":"chat"}}`, ErrInvalid},
		{`,"iss":"https://id.example","aud":true}`, ErrInvalid},
	} {
		token := []byte(s.token(s.header(""), start+c.claims))
		demand(t, v, c.claims, token, c.want)
		demand(t, v, c.claims+" again", token, c.want)
	}
	// What is wrong besides weighs more than that it is over.
	demand(t, v, "expired, of another", []byte(s.token(s.header(""), `{"sub":"alice","exp":1,"iss":"x","aud":"chat"}`)), ErrInvalid)
	demand(t, verifierFrom(t, Source{Location: path}), "nothing configured", []byte(s.token(s.header(""), start+`,"iss":5,"aud":[5]}`)), nil)
}

// TestIssuersDoNotSpeakForEachOther: a kid that two issuers use, as in CVE-2026-49998, and a key that two trust.
func TestIssuersDoNotSpeakForEachOther(t *testing.T) {
	a, b := newEd25519(), newEd25519()
	v := verifierFrom(t, Source{Location: writeFile(t, jwks(a.jwk("1", ""))), Issuer: "a"},
		Source{Location: writeFile(t, jwks(b.jwk("1", ""))), Issuer: "b"},
		Source{Secret: testSecret, Issuer: "c", KeyID: "1"})
	claims := func(issuer string) string { return `{"sub":"alice","exp":1700003600,"iss":"` + issuer + `"}` }
	for _, s := range []struct {
		signer
		issuer string
	}{{a, "a"}, {b, "b"}} {
		for _, issuer := range []string{"a", "b", "c", ""} {
			var want error
			if issuer != s.issuer {
				want = ErrInvalid
			}
			for _, id := range []string{"1", ""} {
				demand(t, v, s.issuer+" for "+issuer, []byte(s.token(s.header(id), claims(issuer))), want)
			}
		}
	}
	for _, issuer := range []string{"a", "b"} {
		demand(t, v, "secret for "+issuer, []byte(hmacToken(`{"alg":"HS256","kid":"1"}`, claims(issuer))), ErrInvalid)
	}
	demand(t, v, "secret", []byte(hmacToken(`{"alg":"HS256","kid":"1"}`, claims("c"))), nil)
}

// TestSecretRotation: two secrets, with ids and without.
func TestSecretRotation(t *testing.T) {
	old, other := []byte("another secret, 32 bytes at least"), []byte("a third secret of 32 bytes or so ")
	v := verifierFrom(t, Source{Secret: testSecret, KeyID: "new"}, Source{Secret: old, KeyID: "old"}, Source{Secret: other})
	for _, c := range []struct {
		id     string
		secret []byte
		want   error
	}{
		{"new", testSecret, nil}, {"old", old, nil}, {"", testSecret, nil}, {"", old, nil},
		{"new", old, ErrInvalid}, {"old", testSecret, ErrInvalid}, {"x", testSecret, ErrInvalid},
		{"", other, nil}, {"x", other, nil}, {"new", other, nil}, // its id is not known
	} {
		token := sign(`{"alg":"HS256","kid":"`+c.id+`"}`, goodClaims, sha256.New, c.secret[:len(bytes.TrimSpace(c.secret))])
		demand(t, v, fmt.Sprintf("%q with %.10s", c.id, c.secret), []byte(token), c.want)
	}
}

// TestCandidates: a token makes us try four keys at most.
func TestCandidates(t *testing.T) {
	var all []signer
	var set []string
	for i := range 6 {
		s := newEC(elliptic.P256())
		all, set = append(all, s), append(set, s.jwk(fmt.Sprint(i), ""))
	}
	six, four := verifierOf(t, jwks(set...)), verifierOf(t, jwks(set[:4]...))
	for i, s := range all {
		demand(t, six, "with its kid", s.good(fmt.Sprint(i)), nil)
		if _, err := six.Verify(s.good(""), testNow); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "more than 4 keys") {
			t.Errorf("without a kid among six: %v", err)
		}
		var want error
		if i >= 4 {
			want = ErrInvalid
		}
		demand(t, four, "without a kid among four", s.good(""), want)
	}
	// One kid for several keys: each may be it.
	twice := verifierOf(t, jwks(all[0].jwk("a", ""), all[1].jwk("a", ""), all[2].jwk("b", "")))
	demand(t, twice, "first with the kid", all[0].good("a"), nil)
	demand(t, twice, "second with the kid", all[1].good("a"), nil)
	demand(t, twice, "third with the kid of the others", all[2].good("a"), ErrInvalid)
}

func TestKeySets(t *testing.T) {
	ed, ec, rs := edSigner(), ecSigner(), rsaSigner()
	weak, huge, p384 := newRSA(1024), strings.Repeat("A", 16<<10), newEC(elliptic.P384())
	const offCurve = `{"kty":"EC","crv":"P-256","x":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE","y":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"}`
	n := base64.RawURLEncoding.EncodeToString(rs.private.Public().(*rsa.PublicKey).N.Bytes())
	for _, c := range []struct{ name, key, why string }{
		{"not an object", `5`, "not a JSON Web Key"},
		{"a list", `[]`, "not a JSON Web Key"},
		{"null", `null`, "not a key for"},
		{"empty", `{}`, "not a key for"},
		{"kty of another type", `{"kty":5}`, "not a JSON Web Key"},
		{"kid of another type", `{"kty":"OKP","crv":"Ed25519","kid":1}`, "not a JSON Web Key"},
		{"unknown kty", `{"kty":"AKP","alg":"ML-DSA-44","pub":"AAAA"}`, "not a key for"},
		{"secret", `{"kty":"oct","k":"AAAA"}`, "private or secret"},
		{"secret for HS256", `{"kty":"oct","alg":"HS256","k":"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY"}`, "private or secret"},
		{"private Ed25519", ed.jwk("x", `,"d":"AAAA"`), "private or secret"},
		{"private RSA", rs.jwk("x", `,"d":"AAAA","p":"AAAA"`), "private or secret"},
		{"private RSA, only a prime", rs.jwk("x", `,"p":"AAAA"`), "private or secret"},
		{"private in other case", ed.jwk("x", `,"D":"AAAA"`), "private or secret"},
		{"for encryption", rs.jwk("x", `,"use":"enc"`), "not a key for"},
		{"for signing only", rs.jwk("x", `,"key_ops":["sign"]`), "not a key for"},
		{"for PS256", rs.jwk("x", `,"alg":"PS256"`), "not a key for"},
		{"for HS256", rs.jwk("x", `,"alg":"HS256"`), "not a key for"},
		{"for none", rs.jwk("x", `,"alg":"none"`), "not a key for"},
		{"RSA for ES256", rs.jwk("x", `,"alg":"ES256"`), "not a key for"},
		{"P-384", p384.jwk("x", ""), "not a key for"},
		{"P-384 said to be P-256", strings.Replace(p384.jwk("x", ""), "P-384", "P-256", 1), "not 32 bytes"},
		{"X25519", `{"kty":"OKP","crv":"X25519","x":"AAAA"}`, "not a key for"},
		{"Ed25519 short", `{"kty":"OKP","crv":"Ed25519","x":"AAAA"}`, "an Ed25519 key of 3 bytes"},
		{"Ed25519 without x", `{"kty":"OKP","crv":"Ed25519"}`, "x is missing"},
		{"Ed25519 in other base64", `{"kty":"OKP","crv":"Ed25519","x":"++//"}`, "not base64url"},
		{"EC not on the curve", offCurve, "not on"},
		{"EC without y", `{"kty":"EC","crv":"P-256","x":"AAAA"}`, "y is missing"},
		{"RSA of 1024 bits", weak.jwk("x", ""), "an RSA key of 1024 bits"},
		{"RSA, huge", `{"kty":"RSA","n":"` + huge + `","e":"AQAB"}`, "too large"},
		{"RSA, even", `{"kty":"RSA","n":"` + n[:len(n)-2] + `AA","e":"AQAB"}`, "even modulus"},
		{"RSA, exponent 1", `{"kty":"RSA","n":"` + n + `","e":"AQ"}`, "bad exponent"},
		{"RSA, exponent 2", `{"kty":"RSA","n":"` + n + `","e":"Ag"}`, "bad exponent"},
		{"RSA, exponent 0", `{"kty":"RSA","n":"` + n + `","e":"AA"}`, "bad exponent"},
		{"RSA, exponent of 2^32+1", `{"kty":"RSA","n":"` + n + `","e":"AQAAAAE"}`, "too large"},
		{"RSA, exponent of 2^31+1", `{"kty":"RSA","n":"` + n + `","e":"gAAAAQ"}`, "too large"},
		{"RSA without e", `{"kty":"RSA","n":"` + n + `"}`, "e is missing"},
		{"kid too long", ed.jwk(strings.Repeat("k", 257), ""), "a kid of 257 bytes"},
	} {
		keys, skipped, err := parseJWKS([]byte(jwks(ec.jwk("ec", ""), c.key, rs.jwk("rs", ""))))
		if err != nil || len(keys) != 2 || len(skipped) != 1 || !strings.Contains(skipped[0].Error(), c.why) || !strings.HasPrefix(skipped[0].Error(), "key 2: ") {
			t.Errorf("%s: %d keys, %v, %v", c.name, len(keys), skipped, err)
		}
		// Alone it leaves no set at all.
		if _, _, err := parseJWKS([]byte(jwks(c.key))); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s alone: %v", c.name, err)
		}
	}
	for _, c := range []struct{ name, content, why string }{
		{"empty", ``, "parse key set"},
		{"not JSON", `<html>`, "parse key set"},
		{"cut off", jwks(ed.jwk("", ""))[:40], "parse key set"},
		{"a list", `[` + ed.jwk("", "") + `]`, "parse key set"},
		{"one key", ed.jwk("", ""), "it has no keys"},
		{"no keys", `{"keys":[]}`, "it has no keys"},
		{"keys are null", `{"keys":null}`, "it has no keys"},
		{"keys are an object", `{"keys":{}}`, "parse key set"},
		{"more than 64", jwks(strings.Split(strings.Repeat(ed.jwk("", "")+"\n", 65), "\n")[:65]...), "65 keys: at most 64"},
	} {
		if keys, _, err := parseJWKS([]byte(c.content)); err == nil || keys != nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %d keys, %v", c.name, len(keys), err)
		}
	}
}

func TestPEMFiles(t *testing.T) {
	ed, ec, rs := edSigner(), ecSigner(), rsaSigner()
	v := verifierOf(t, "three keys\n"+ed.pem()+"\n"+ec.certificate()+rs.pem()+"and nothing after")
	for _, s := range signers() {
		demand(t, v, s.algorithm, s.good("anything"), nil)
	}
	private, err := x509.MarshalPKCS8PrivateKey(ed.private)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	for _, c := range []struct{ name, content, why string }{
		{"empty", "", "no PUBLIC KEY"},
		{"text", "hello", "no PUBLIC KEY"},
		{"private key", block("PRIVATE KEY", private), "openssl pkey -pubout"},
		{"private key beside a good one", ed.pem() + block("PRIVATE KEY", private), "PEM block 2: a private key"},
		{"PKCS #1", block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(rs.private.Public().(*rsa.PublicKey))), "openssl rsa -RSAPublicKey_in"},
		{"certificate request", block("CERTIFICATE REQUEST", nil), "where PUBLIC KEY or CERTIFICATE is expected"},
		{"garbage in a PUBLIC KEY", block("PUBLIC KEY", []byte("garbage")), "PEM block 1"},
		{"garbage in a CERTIFICATE", block("CERTIFICATE", []byte("garbage")), "PEM block 1"},
		{"1024 bits", newRSA(1024).pem(), "an RSA key of 1024 bits"},
		{"P-384", newEC(elliptic.P384()).pem(), "not a key for"},
		{"damaged", ed.pem() + strings.Replace(ec.pem(), "-----END", "-----EN", 1), "1 of 2 PEM blocks are damaged"},
		{"not base64", strings.Replace(ed.pem(), "MC", "!!", 1), "1 of 1 PEM blocks are damaged"},
		{"65 keys", strings.Repeat(ed.pem(), 65), "65 keys: at most 64"},
		{"huge", strings.Repeat(" ", maxContentBytes) + ed.pem(), "longer than 512 KiB"},
	} {
		path := writeFile(t, c.content)
		if _, err := New(Config{Sources: []Source{{Location: path}}, Logger: quiet}); err == nil ||
			!strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestBadConfigs(t *testing.T) {
	ed := edSigner()
	one, two := writeFile(t, ed.pem()), writeFile(t, ed.pem()+ecSigner().pem())
	source := func(s Source) Config { return Config{Sources: []Source{s}} }
	for _, c := range []struct {
		name string
		cfg  Config
		why  string
	}{
		{"nothing", Config{}, "0 sources"},
		{"17 sources", Config{Sources: make([]Source, 17)}, "17 sources"},
		{"empty source", source(Source{}), "either a secret or a file or address"},
		{"both", source(Source{Secret: testSecret, Location: one}), "either a secret or a file or address"},
		{"short secret", source(Source{Secret: []byte("short")}), "openssl rand"},
		{"public key as a secret", source(Source{Secret: []byte("\n" + rsaSigner().pem())}), "PEM file"},
		{"twice", Config{Sources: []Source{{Location: one}, {Location: one, Issuer: "x"}}}, "given twice"},
		{"no such file", source(Source{Location: one + "x"}), "no such file"},
		{"folder", source(Source{Location: filepath.Dir(one)}), "is not a file"},
		{"device", source(Source{Location: os.DevNull}), "is not a file"},
		{"one kid, two keys", source(Source{Location: two, KeyID: "a"}), "one kid for 2 keys"},
		{"long kid", source(Source{Location: one, KeyID: strings.Repeat("k", 257)}), "a kid of 257 bytes"},
		{"kid for an address", source(Source{Location: "https://id.example/", KeyID: "a"}), "a key set has its own"},
		{"CA for a file", source(Source{Location: one, CAFile: one}), "CA file is for"},
		{"no such CA file", source(Source{Location: "https://id.example/", CAFile: one + "x"}), "CA file"},
		{"CA file without certificates", source(Source{Location: "https://id.example/", CAFile: one}), "no certificate"},
		{"http", source(Source{Location: "http://id.example/jwks?secret"}), "must be https"},
		{"http on a private address", source(Source{Location: "http://10.0.0.1/jwks?secret"}), "must be https"},
		{"http on a name that begins as loopback", source(Source{Location: "http://127.0.0.1.example/?secret"}), "must be https"},
		{"file address", source(Source{Location: "file://" + one}), "the address has no host"},
		{"ftp", source(Source{Location: "ftp://127.0.0.1/?secret"}), "must be https"},
		{"user in the address", source(Source{Location: "https://user:secret@id.example/"}), "or a user"},
		{"no host", source(Source{Location: "https:///jwks"}), "no host"},
		{"malformed", source(Source{Location: "https://id.example:secret/"}), "malformed"},
		{"too often", Config{Sources: []Source{{Secret: testSecret}}, RefreshEvery: time.Second}, "at least 30s"},
	} {
		c.cfg.Logger = quiet
		v, err := New(c.cfg)
		if err == nil || v != nil || !strings.Contains(err.Error(), c.why) || strings.Contains(err.Error(), "secret@") || strings.Contains(err.Error(), "?secret") || strings.Contains(err.Error(), ":secret") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// Public keys of RFC 7515 A.2 and A.3 and RFC 8037 A.2.
const (
	rfcRSA     = `{"kty":"RSA","n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ","e":"AQAB"}`
	rfcEC      = `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
	rfcEd25519 = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
)

// TestGoldenVectors: the examples of the RFCs. Their claims name no user; that is found only after the signature.
func TestGoldenVectors(t *testing.T) {
	const claims = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
	secret, err := base64.RawURLEncoding.DecodeString("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		source Source
		token  string
		want   verdict
	}{
		{"RFC 7515 A.1 and RFC 7519 3.1, HS256", Source{Secret: secret},
			"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9." + claims + ".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", badSubject},
		{"RFC 7515 A.2, RS256", Source{Location: writeFile(t, jwks(rfcRSA))},
			"eyJhbGciOiJSUzI1NiJ9." + claims + ".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw", badSubject},
		{"RFC 7515 A.3, ES256", Source{Location: writeFile(t, jwks(rfcEC))},
			"eyJhbGciOiJFUzI1NiJ9." + claims + ".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q", badSubject},
		{"RFC 8037 A.4, EdDSA", Source{Location: writeFile(t, jwks(rfcEd25519))},
			"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg", malformed},
	} {
		v := verifierFrom(t, c.source)
		if _, got := v.verify([]byte(c.token), testNow, false); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, verdictTexts[got].label, verdictTexts[c.want].label)
		}
		i := strings.LastIndexByte(c.token, '.') + 1 // its first character
		changed := c.token[:i] + string(c.token[i]^1) + c.token[i+1:]
		if _, got := v.verify([]byte(changed), testNow, false); got != wrongSignature && got != malformed {
			t.Errorf("%s, changed: %s", c.name, verdictTexts[got].label)
		}
	}
	// RFC 7519 §6.1 is not signed at all.
	none := "eyJhbGciOiJub25lIn0." + claims + "."
	if _, got := mustVerifier(t).verify([]byte(none), testNow, false); got != otherAlgorithm {
		t.Errorf("RFC 7519 6.1: %s", verdictTexts[got].label)
	}
}

func TestJSONCursor(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{}`, ``}, {` { } `, ``},
		{`{"a":1}`, `a=1;`},
		{`{"a" : -1.5e3 , "b":"x\"},","c":[1,{"d":"]"}],"d":{"e":{}} , "e":true,"f":null}`, `a=-1.5e3;b="x\"},";c=[1,{"d":"]"}];d={"e":{}};e=true;f=null;`},
		{`{"":"\\","\u0061\n":[]}`, `="\\";a` + "\n" + `=[];`},
	} {
		members, ok := object([]byte(c.text))
		got := ""
		for ok {
			var name, value []byte
			if name, value, ok = members.next(); ok {
				got += string(name) + "=" + string(value) + ";"
			}
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.text, got, c.want)
		}
	}
	for _, bad := range []string{``, ` `, `[]`, `"a"`, `5`, `null`, `{`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{}{}`, `{"a":01}`, "{\"\xff\":1}", strings.Repeat(`{"a":`, 20_000) + "1" + strings.Repeat("}", 20_000)} {
		if _, ok := object([]byte(bad)); ok {
			t.Errorf("%.20q is an object", bad)
		}
	}
}

// FuzzObject: the members that we see are those that encoding/json sees.
func FuzzObject(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":1,"b":[{"c":"}"}],"a":"\u0061\\"}`, `{ "x" : -0.1e+5 , "y" : null }`, `[1]`, `{"a":{"b":{"c":[[[]]]}}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		members, ok := object(b)
		var want map[string]json.RawMessage
		err := json.Unmarshal(b, &want)
		if ok && (err != nil || want == nil) {
			t.Fatalf("an object for us: %v", err)
		}
		got := make(map[string][]byte)
		for ok {
			var name, value []byte
			if name, value, ok = members.next(); ok {
				got[string(name)] = value
			}
		}
		for name, value := range got {
			if !bytes.Equal(want[name], value) {
				t.Fatalf("%q is %q, want %q", name, value, want[name])
			}
		}
		if _, ok := object(b); ok && len(got) != len(want) {
			t.Fatalf("%d members, want %d", len(got), len(want))
		}
	})
}

// FuzzKeySet: whatever a server sends, what comes out is keys of the right kinds and sizes.
func FuzzKeySet(f *testing.F) {
	f.Add([]byte(jwks(rfcRSA, rfcEC, rfcEd25519)))
	f.Add([]byte(jwks(strings.Replace(rfcEC, "{", `{"use":"sig","key_ops":["verify"],"kid":"a","alg":"ES256",`, 1))))
	f.Add([]byte(signer{"EdDSA", ed25519.NewKeyFromSeed(make([]byte, 32))}.pem()))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AAAA"},{"kty":"RSA","n":"AA","e":"AQAB"},null]}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		set, _, errSet := parseJWKS(content)
		file, errFile := parsePEM(content)
		if (errSet == nil) != (len(set) > 0) || (errFile == nil) != (len(file) > 0) {
			t.Fatalf("%d and %d keys: %v, %v", len(set), len(file), errSet, errFile)
		}
		signature := make([]byte, MaxRSABits/8)
		for _, k := range append(set, file...) {
			if k.algorithm == hs256 || k.public == nil || len(k.id) > maxKeyIDBytes {
				t.Fatalf("%+v", k)
			}
			if k.verifies([]byte("text"), signature[:k.signatureBytes]) && k.algorithm != eddsa { // a point of small order accepts zeros
				t.Fatalf("%+v accepts zeros", k)
			}
		}
	})
}
