package token

import (
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"hash"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var (
	testSecret = []byte("0123456789abcdef0123456789abcdef")
	testNow    = time.Unix(1_700_000_000, 0)
)

const (
	testExp = 1_700_003_600 // an hour after testNow
	header  = `{"alg":"HS256","typ":"JWT"}`
)

func encode(part string) string { return base64.RawURLEncoding.EncodeToString([]byte(part)) }

// sign makes a token of any header and claims, with HMAC over any hash.
func sign(header, claims string, h func() hash.Hash, secret []byte) string {
	text := encode(header) + "." + encode(claims)
	mac := hmac.New(h, secret)
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func hmacToken(header, claims string) string { return sign(header, claims, sha256.New, testSecret) }

func mustVerifier(t testing.TB) *Verifier {
	t.Helper()
	v, err := NewHS256(testSecret)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestSignAndVerify(t *testing.T) {
	v := mustVerifier(t)
	for _, user := range []string{"alice", "a.b_c@d-e", "A", strings.Repeat("u", 64)} {
		signed, err := SignHS256(testSecret, user, testNow, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		claims, err := v.Verify([]byte(signed), testNow)
		if err != nil || claims.User != user || claims.ExpiresAt.Unix() != testExp {
			t.Errorf("%s: %+v, %v", user, claims, err)
		}
	}
}

func TestGoodTokens(t *testing.T) {
	v := mustVerifier(t)
	for name, claims := range map[string]string{
		"plain":                     `{"sub":"alice","exp":1700003600}`,
		"fraction of a second":      `{"sub":"alice","exp":1700003600.9}`,
		"exponent":                  `{"sub":"alice","exp":1.7000036e9}`,
		"other claims":              `{"iss":"x","aud":["a","b"],"iat":"not looked at","sub":"alice","exp":1700003600,"jti":5}`,
		"nbf now":                   `{"sub":"alice","exp":1700003600,"nbf":1700000000}`,
		"nbf within the skew":       `{"sub":"alice","exp":1700003600,"nbf":1700000060}`,
		"expired within the skew":   `{"sub":"alice","exp":1699999941}`,
		"exp at the end of 9999":    `{"sub":"alice","exp":253402300799}`,
		"white space":               " \t{ \"sub\" :\r\n\"alice\" , \"exp\": 1700003600 }\n",
		"escapes":                   `{"s\u0075b":"\u0061lice","exp":1700003600}`,
		"nested look-alikes":        `{"x":{"sub":"bob","exp":1},"y":["sub","}",{"sub":[]}],"z":"\",\"sub\":\"bob\"}","sub":"alice","exp":1700003600}`,
		"others given twice":        `{"x":1,"sub":"alice","x":2,"exp":1700003600}`,
		"claims in other case":      `{"SUB":"bob","Exp":1,"sub":"alice","exp":1700003600}`,
		"claims in other case last": `{"sub":"alice","exp":1700003600,"SUB":"bob","Exp":1}`,
	} {
		c, err := v.Verify([]byte(hmacToken(header, claims)), testNow)
		if err != nil || c.User != "alice" {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	for name, h := range map[string]string{
		"alg alone":               `{"alg":"HS256"}`,
		"kid, jku, x5u and a jwk": `{"alg":"HS256","kid":"../../etc","jku":"http://127.0.0.1:1/","x5u":"http://127.0.0.1:1/","jwk":{"kty":"oct","k":"AAAA"}}`,
		"another typ":             `{"alg":"HS256","typ":"at+jwt"}`,
		"alg in other case too":   `{"ALG":"none","alg":"HS256","Alg":"RS256"}`,
		"escapes":                 `{"\u0061lg":"\u0048S256"}`,
		"nested look-alikes":      `{"x":{"alg":"none","crit":1},"alg":"HS256","y":["crit"]}`,
		"kid is empty":            `{"alg":"HS256","kid":""}`,
	} {
		if _, err := v.Verify([]byte(hmacToken(h, `{"sub":"alice","exp":1700003600}`)), testNow); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadTokens(t *testing.T) {
	v := mustVerifier(t)
	const claims = `{"sub":"alice","exp":1700003600}`
	good := hmacToken(header, claims)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	rs256 := func() string {
		text := encode(`{"alg":"RS256"}`) + "." + encode(claims)
		digest := sha256.Sum256([]byte(text))
		sig, err := rsa.SignPKCS1v15(rand.Reader, rsaKey, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return text + "." + base64.RawURLEncoding.EncodeToString(sig)
	}()
	lastCharacter := func() string { // the 2 spare bits of the last character of a 32-byte signature
		const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		i := strings.IndexByte(alphabet, good[len(good)-1])
		return good[:len(good)-1] + alphabet[i^1:i^1+1]
	}()
	parts := strings.Split(good, ".")

	for _, c := range []struct{ name, token string }{
		{"empty", ""},
		{"garbage", "garbage"},
		{"dots", ".."},
		{"two parts", parts[0] + "." + parts[1]},
		{"four parts", good + ".x"},
		{"no signature", parts[0] + "." + parts[1] + "."},
		{"truncated signature", good[:len(good)-4]},
		{"spare bits of the signature", lastCharacter},
		{"padding", good + "="},
		{"white space", " " + good},
		{"newline", good + "\n"},
		{"newline in the signature", good[:len(good)-5] + "\r\n" + good[len(good)-5:]},
		{"not base64", parts[0] + ".!!!." + parts[2]},
		{"header is not JSON", hmacToken(`{"alg":"HS256"`, claims)},
		{"header is a list", hmacToken(`["HS256"]`, claims)},
		{"header is null", hmacToken(`null`, claims)},
		{"claims are not JSON", hmacToken(header, `{"sub":"alice"`)},
		{"claims are a list", hmacToken(header, `["alice"]`)},
		{"claims are null", hmacToken(header, `null`)},
		{"something after the claims", hmacToken(header, claims+"x")},
		{"other claims under the signature", parts[0] + "." + encode(`{"sub":"bob","exp":1700003600}`) + "." + parts[2]},
		{"other header over the signature", encode(`{"alg":"HS256"}`) + "." + parts[1] + "." + parts[2]},

		{"none, unsigned", encode(`{"alg":"none"}`) + "." + encode(claims) + "."},
		{"None, unsigned", encode(`{"alg":"None"}`) + "." + encode(claims) + "."},
		{"none, signed", hmacToken(`{"alg":"none"}`, claims)},
		{"no alg", hmacToken(`{"typ":"JWT"}`, claims)},
		{"empty alg", hmacToken(`{"alg":""}`, claims)},
		{"alg is a list", hmacToken(`{"alg":["HS256"]}`, claims)},
		{"alg in lower case", hmacToken(`{"alg":"hs256"}`, claims)},
		{"HS384", sign(`{"alg":"HS384"}`, claims, sha512.New384, testSecret)},
		{"HS512", sign(`{"alg":"HS512"}`, claims, sha512.New, testSecret)},
		{"RS256", rs256},
		{"RS256 over HMAC", hmacToken(`{"alg":"RS256"}`, claims)},
		{"ES256 over HMAC", hmacToken(`{"alg":"ES256"}`, claims)},
		{"EdDSA over HMAC", hmacToken(`{"alg":"EdDSA"}`, claims)},
		{"HMAC with a public key as the secret", sign(header, claims, sha256.New, publicPEM)},
		{"another secret", sign(header, claims, sha256.New, []byte("another secret, 32 bytes at least"))},
		{"empty secret", sign(header, claims, sha256.New, nil)},

		{"alg given twice", hmacToken(`{"alg":"HS256","alg":"HS256"}`, claims)},
		{"alg given twice, none last", hmacToken(`{"alg":"HS256","alg":"none"}`, claims)},
		{"alg given twice, none first", hmacToken(`{"alg":"none","alg":"HS256"}`, claims)},
		{"alg given twice, once in escapes", hmacToken(`{"\u0061lg":"none","alg":"HS256"}`, claims)},
		{"alg given twice, once empty", hmacToken(`{"alg":"","alg":"HS256"}`, claims)},
		{"kid given twice", hmacToken(`{"alg":"HS256","kid":"a","kid":"a"}`, claims)},
		{"kid is a number", hmacToken(`{"alg":"HS256","kid":1}`, claims)},
		{"kid is null", hmacToken(`{"alg":"HS256","kid":null}`, claims)},
		{"header is not UTF-8", hmacToken("{\"alg\":\"HS256\",\"x\":\"\xff\"}", claims)},
		{"a name that is not UTF-8", hmacToken("{\"alg\xff\":1,\"alg\":\"HS256\"}", claims)},
		{"alg with a space", hmacToken(`{"alg":"HS256 "}`, claims)},
		{"alg with NUL", hmacToken(`{"alg":"HS256\u0000"}`, claims)},
		{"alg in full width", hmacToken(`{"alg":"ＨＳ２５６"}`, claims)},
		{"nested", hmacToken(`{"alg":"HS256","cty":"JWT"}`, good)},
		{"encrypted (JWE)", encode(`{"alg":"dir","enc":"A128GCM"}`) + "." + strings.Repeat("."+encode("0123456789ab"), 3)},
		{"encrypted (JWE), HS256 in its header", encode(`{"alg":"HS256","enc":"A128GCM"}`) + "." + strings.Repeat("."+encode("0123456789ab"), 3)},
		{"encrypted (JWE) in three parts", hmacToken(`{"alg":"dir","enc":"A128GCM"}`, claims)},

		{"crit", hmacToken(`{"alg":"HS256","crit":["exp"],"exp":1}`, claims)},
		{"crit, empty", hmacToken(`{"alg":"HS256","crit":[]}`, claims)},
		{"crit, null", hmacToken(`{"alg":"HS256","crit":null}`, claims)},

		{"sub given twice", hmacToken(header, `{"sub":"alice","sub":"alice","exp":1700003600}`)},
		{"exp given twice", hmacToken(header, `{"sub":"alice","exp":1,"exp":1700003600}`)},
		{"exp given twice, once in escapes", hmacToken(header, `{"sub":"alice","exp":1700003600,"\u0065xp":1700003600}`)},
		{"nbf given twice", hmacToken(header, `{"sub":"alice","exp":1700003600,"nbf":1,"nbf":1}`)},
		{"aud given twice", hmacToken(header, `{"sub":"alice","exp":1700003600,"aud":"a","aud":"a"}`)},
		{"claims are not UTF-8", hmacToken(header, "{\"sub\":\"alice\",\"exp\":1700003600,\"x\":\"\xff\"}")},
		{"no sub", hmacToken(header, `{"exp":1700003600}`)},
		{"sub is empty", hmacToken(header, `{"sub":"","exp":1700003600}`)},
		{"sub is a number", hmacToken(header, `{"sub":5,"exp":1700003600}`)},
		{"sub is null", hmacToken(header, `{"sub":null,"exp":1700003600}`)},
		{"sub with a space", hmacToken(header, `{"sub":"al ice","exp":1700003600}`)},
		{"sub with a slash", hmacToken(header, `{"sub":"a/b","exp":1700003600}`)},
		{"sub with NUL", hmacToken(header, `{"sub":"alice\u0000","exp":1700003600}`)},
		{"sub not ASCII", hmacToken(header, `{"sub":"ålice","exp":1700003600}`)},
		{"sub of 65 bytes", hmacToken(header, `{"sub":"`+strings.Repeat("u", 65)+`","exp":1700003600}`)},
		{"sub in another case", hmacToken(header, `{"Sub":"alice","exp":1700003600}`)},

		{"no exp", hmacToken(header, `{"sub":"alice"}`)},
		{"exp is null", hmacToken(header, `{"sub":"alice","exp":null}`)},
		{"exp is a string", hmacToken(header, `{"sub":"alice","exp":"1700003600"}`)},
		{"exp is true", hmacToken(header, `{"sub":"alice","exp":true}`)},
		{"exp is negative", hmacToken(header, `{"sub":"alice","exp":-1}`)},
		{"exp in milliseconds", hmacToken(header, `{"sub":"alice","exp":1700003600000}`)},
		{"exp of 1e300", hmacToken(header, `{"sub":"alice","exp":1e300}`)},
		{"exp of 1e999", hmacToken(header, `{"sub":"alice","exp":1e999}`)},
		{"nbf after the skew", hmacToken(header, `{"sub":"alice","exp":1700003600,"nbf":1700000061}`)},
		{"nbf is a string", hmacToken(header, `{"sub":"alice","exp":1700003600,"nbf":"1"}`)},
		{"nbf is null", hmacToken(header, `{"sub":"alice","exp":1700003600,"nbf":null}`)},
		{"expired, but not for a user", hmacToken(header, `{"sub":"","exp":1}`)},
		{"expired, with a wrong signature", sign(header, `{"sub":"alice","exp":1}`, sha256.New, []byte("x"))},

		{"huge", hmacToken(header, `{"sub":"alice","exp":1700003600,"x":"`+strings.Repeat("x", 6<<10)+`"}`)},
		{"huge header", hmacToken(`{"alg":"HS256","x":"`+strings.Repeat("x", 6<<10)+`"}`, claims)},
		{"a million dots", strings.Repeat(".", 1_000_000)},
	} {
		got, err := v.Verify([]byte(c.token), testNow)
		if !errors.Is(err, ErrInvalid) || errors.Is(err, ErrExpired) || got != (Claims{}) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
			continue
		}
		demandSecrecy(t, c.token, err)
	}
}

// demandSecrecy: no error repeats a part of the token.
func demandSecrecy(t *testing.T, token string, err error) {
	t.Helper()
	for _, part := range append(strings.Split(token, "."), "alice", "1700003600") {
		if len(part) >= 4 && strings.Contains(err.Error(), part) {
			t.Errorf("the error %q contains %q", err, part)
		}
	}
}

func TestTimes(t *testing.T) {
	v := mustVerifier(t)
	tok := []byte(hmacToken(header, `{"sub":"alice","exp":1700003600,"nbf":1700000000}`))
	for _, c := range []struct {
		at   int64
		want error
	}{
		{1700000000 - 61, ErrInvalid}, {1700000000 - 60, nil}, {1700000000, nil}, {1700003599, nil}, {1700003600, nil},
		{1700003659, nil}, {1700003660, ErrExpired}, {1800000000, ErrExpired},
	} {
		if _, err := v.Verify(tok, time.Unix(c.at, 0)); !errors.Is(err, c.want) {
			t.Errorf("at %d: %v, want %v", c.at, err, c.want)
		}
	}
	if _, err := v.Verify(tok, time.Unix(1700003659, 999_999_999)); err != nil {
		t.Errorf("a nanosecond before the end: %v", err)
	}
}

// TestEveryBitCounts: no single changed character of a good token is accepted.
func TestEveryBitCounts(t *testing.T) {
	v := mustVerifier(t)
	good := []byte(hmacToken(header, `{"sub":"alice","exp":1700003600}`))
	for i := range good {
		for _, x := range []byte{1, 2, 0x20, 0x80} {
			bad := append([]byte(nil), good...)
			bad[i] ^= x
			if _, err := v.Verify(bad, testNow); err == nil {
				t.Errorf("byte %d changed from %q to %q is accepted", i, good[i], bad[i])
			}
		}
		if _, err := v.Verify(good[:i], testNow); err == nil {
			t.Errorf("the first %d bytes are accepted", i)
		}
	}
}

func TestSecrets(t *testing.T) {
	for _, secret := range []string{"", "short", strings.Repeat("x", 31), " \n" + strings.Repeat("x", 31) + "\n\t ", strings.Repeat(" ", 100)} {
		_, err := NewHS256([]byte(secret))
		if err == nil || !strings.Contains(err.Error(), "openssl rand -base64 48") {
			t.Errorf("%q: %v", secret, err)
		}
		if _, err := SignHS256([]byte(secret), "alice", testNow, time.Hour); err == nil {
			t.Errorf("signed with %q", secret)
		}
	}
	// White space around it does not count, and the caller may reuse its slice.
	secret := []byte("\r\n " + string(testSecret) + "\n")
	v, err := NewHS256(secret)
	if err != nil {
		t.Fatal(err)
	}
	clear(secret)
	if _, err := v.Verify([]byte(hmacToken(header, `{"sub":"alice","exp":1700003600}`)), testNow); err != nil {
		t.Error(err)
	}
}

func TestSignRefuses(t *testing.T) {
	for _, user := range []string{"", "a b", "é", strings.Repeat("u", 65)} {
		if _, err := SignHS256(testSecret, user, testNow, time.Hour); err == nil {
			t.Errorf("signed for %q", user)
		}
	}
	for _, ttl := range []time.Duration{0, -time.Hour, time.Second - 1} {
		if _, err := SignHS256(testSecret, "alice", testNow, ttl); err == nil {
			t.Errorf("signed for %v", ttl)
		}
	}
	if _, err := SignHS256(testSecret, "alice", time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC), 48*time.Hour); err == nil {
		t.Error("signed beyond 9999")
	}
}

// TestSignedForm: what we sign is what other libraries expect.
func TestSignedForm(t *testing.T) {
	signed, err := SignHS256(testSecret, "alice", testNow, 90*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	b, err := base64.RawURLEncoding.DecodeString(strings.Split(signed, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &claims); err != nil {
		t.Fatal(err)
	}
	if claims["sub"] != "alice" || claims["iat"] != 1.7e9 || claims["exp"] != 1.7e9+5400 || len(claims) != 3 {
		t.Errorf("%s", b)
	}
}

func TestVerifyIsConcurrent(t *testing.T) {
	v := mustVerifier(t)
	good, bad := []byte(hmacToken(header, `{"sub":"alice","exp":1700003600}`)), []byte(hmacToken(header, `{"sub":"bob","exp":1}`))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if c, err := v.Verify(good, testNow); err != nil || c.User != "alice" {
					t.Errorf("%+v, %v", c, err)
				}
				if _, err := v.Verify(bad, testNow); !errors.Is(err, ErrExpired) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestSecretFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if _, err := ReadSecretFile(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	made, err := CreateSecretFile(path)
	if err != nil {
		t.Fatal(err)
	}
	read, err := ReadSecretFile(path)
	if err != nil || string(read) != string(made) || len(made) != 64 {
		t.Errorf("made %d bytes, read %d: %v", len(made), len(read), err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := CreateSecretFile(path); !errors.Is(err, os.ErrExist) {
		t.Errorf("second time: %v", err)
	}
	if again, err := ReadSecretFile(path); err != nil || string(again) != string(made) {
		t.Errorf("the secret was replaced: %v", err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := CreateSecretFile(filepath.Join(filepath.Dir(path), "none", "secret")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
	signed, err := SignHS256(made, "alice", testNow, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewHS256(read)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify([]byte(signed), testNow); err != nil {
		t.Error(err)
	}
}

func TestSecretFilesDiffer(t *testing.T) {
	folder := t.TempDir()
	a, errA := CreateSecretFile(filepath.Join(folder, "a"))
	b, errB := CreateSecretFile(filepath.Join(folder, "b"))
	if errA != nil || errB != nil || string(a) == string(b) {
		t.Errorf("%v, %v, equal: %v", errA, errB, string(a) == string(b))
	}
}

// TestSecretFileRace: of several that create the same file one succeeds, and what it returned is what the file holds.
func TestSecretFileRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	results := make(chan []byte, 8)
	var wg sync.WaitGroup
	for range cap(results) {
		wg.Go(func() {
			if secret, err := CreateSecretFile(path); err == nil {
				results <- secret
			} else if !errors.Is(err, os.ErrExist) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(results) != 1 {
		t.Fatalf("%d made the file", len(results))
	}
	if read, err := ReadSecretFile(path); err != nil || string(read) != string(<-results) {
		t.Errorf("the file holds another secret: %v", err)
	}
}

func TestBadSecretFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	for _, c := range []struct{ name, content, want string }{
		{"empty", "", "openssl rand -base64 48"},
		{"short", strings.Repeat("x", 31) + "\n", "has 31 bytes and needs at least 32"},
		{"white space", strings.Repeat(" ", 64), "has 0 bytes"},
		{"a whole disk", strings.Repeat("x", 70_000), "longer than"},
	} {
		if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSecretFile(path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := ReadSecretFile(filepath.Dir(path)); err == nil {
		t.Error("a folder is no secret")
	}
}

// demandAgreement: what we accept the library's own parser accepts, with the same claims.
func demandAgreement(t *testing.T, token string, c Claims) {
	t.Helper()
	claims := jwt.MapClaims{}
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"HS256"}), jwt.WithStrictDecoding(), jwt.WithoutClaimsValidation())
	if _, err := parser.ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return testSecret, nil }); err != nil {
		t.Fatalf("%q accepted, and the library says %v", token, err)
	}
	exp, ok := claims["exp"].(float64)
	if claims["sub"] != c.User || !ok || int64(exp) != c.ExpiresAt.Unix() {
		t.Fatalf("%q accepted as %+v, and the library says %v", token, c, claims)
	}
}

func FuzzVerify(f *testing.F) {
	for _, claims := range []string{`{"sub":"alice","exp":1700003600}`, `{"sub":"alice","exp":1}`, `{"sub":5}`, `null`, `{"sub":"alice","exp":1e308,"nbf":-0.5}`} {
		for _, h := range []string{header, `{"alg":"none"}`, `{"alg":"HS256","crit":["x"]}`, `{"alg":"RS256"}`, `{"alg":"HS256","alg":"none"}`, `{"\u0061lg":"HS256","kid":"x"}`} {
			f.Add([]byte(hmacToken(h, claims)), h, claims)
		}
	}
	v := mustVerifier(f)
	f.Fuzz(func(t *testing.T, raw []byte, h, claims string) {
		// Bytes that the fuzzer made up, and a header and claims of its own under a good signature.
		for _, token := range []string{string(raw), hmacToken(h, claims)} {
			c, err := v.Verify([]byte(token), testNow)
			switch {
			case err == nil:
				if !validUser(c.User) || !testNow.Before(c.ExpiresAt.Add(Skew)) {
					t.Fatalf("%q accepted as %+v", token, c)
				}
				text := token[:strings.LastIndexByte(token, '.')]
				mac := hmac.New(sha256.New, testSecret)
				mac.Write([]byte(text))
				if token != text+"."+base64.RawURLEncoding.EncodeToString(mac.Sum(nil)) {
					t.Fatalf("%q accepted, and its signature is wrong", token)
				}
				demandAgreement(t, token, c)
			case c != Claims{} || errors.Is(err, ErrInvalid) == errors.Is(err, ErrExpired):
				t.Fatalf("%q: %+v, %v", token, c, err)
			case len(err.Error()) > 100:
				t.Fatalf("%q: %v", token, err)
			}
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	v := mustVerifier(b)
	tok := []byte(hmacToken(header, `{"sub":"alice","exp":1700003600}`))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Verify(tok, testNow); err != nil {
			b.Fatal(err)
		}
	}
}
