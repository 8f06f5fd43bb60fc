package token

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	// MaxBytes is the longest token that is looked at. It bounds the header too, and what decoding either
	// part can allocate.
	MaxBytes = 7 << 10
	// MinSecretBytes is the shortest HMAC secret: as long as the hash, RFC 7518 §3.2.
	MinSecretBytes = 32
	// Skew is how far the clocks of who signs and who verifies may differ, for exp and nbf.
	Skew = 60 * time.Second

	maxUserBytes = 64
	// maxUnixSeconds is the end of the year 9999: beyond it time.Time arithmetic and other languages differ.
	maxUnixSeconds = 253402300799
)

var (
	// ErrExpired is a token that was valid once: signed by a configured key and well formed, but past its exp. The client
	// should get a new one (token_expired).
	ErrExpired = errors.New("token is expired")
	// ErrInvalid is every other token that is not accepted (unauthorized). What is wrapped around it says why.
	ErrInvalid = errors.New("token is invalid")
)

// Claims is what a verified token says.
type Claims struct {
	User string // sub
	// ExpiresAt is exp. Verify accepts the token until Skew later.
	ExpiresAt time.Time
}

// key is a verification key and the one algorithm that it is for.
type key struct {
	algorithm string
	material  any // what the algorithm of the JWT library wants
}

// Verifier verifies tokens. It is immutable: any number of goroutines may use it.
type Verifier struct {
	keys   []key
	parser *jwt.Parser
}

// NewHS256 is a verifier for tokens signed with secret, which is copied. White space around the secret is ignored; less than MinSecretBytes is an
// error that says how to make one.
func NewHS256(secret []byte) (*Verifier, error) {
	secret, err := checkSecret(secret)
	if err != nil {
		return nil, err
	}
	return newVerifier(key{jwt.SigningMethodHS256.Alg(), bytes.Clone(secret)}), nil
}

func newVerifier(keys ...key) *Verifier {
	var algorithms []string
	for _, k := range keys {
		algorithms = append(algorithms, k.algorithm)
	}
	return &Verifier{
		keys: keys,
		parser: jwt.NewParser(
			jwt.WithValidMethods(algorithms),
			jwt.WithStrictDecoding(),      // one signature has one text
			jwt.WithoutClaimsValidation(), // check does it, with the caller's clock
		),
	}
}

// Verify checks a token's signature and claims at the time now. The error is ErrExpired or wraps ErrInvalid and
// never contains anything of the token. Token is not kept. It does not block; with HS256 it takes a few
// microseconds.
func (v *Verifier) Verify(token []byte, now time.Time) (Claims, error) {
	if len(token) > MaxBytes {
		return Claims{}, invalid("longer than 7 KiB")
	}
	if bytes.ContainsAny(token, "\r\n") {
		return Claims{}, invalid("malformed") // encoding/base64 would pass over them
	}
	claims := jwt.MapClaims{}
	t, err := v.parser.ParseWithClaims(string(token), claims, v.keysFor)
	if err != nil {
		return Claims{}, invalid(reason(err))
	}
	if _, ok := t.Header["crit"]; ok {
		return Claims{}, invalid("the header has crit")
	}
	return check(claims, now)
}

// keysFor gives the JWT library the keys of the algorithm that the token names.
func (v *Verifier) keysFor(t *jwt.Token) (any, error) {
	var set jwt.VerificationKeySet
	for _, k := range v.keys {
		if k.algorithm == t.Method.Alg() {
			set.Keys = append(set.Keys, k.material)
		}
	}
	return set, nil
}

// check reads the claims of a token whose signature is good. Expiry comes last: ErrExpired means that
// nothing else is wrong.
func check(claims jwt.MapClaims, now time.Time) (Claims, error) {
	user, ok := claims["sub"].(string)
	if !ok {
		return Claims{}, invalid("sub is missing or not a string")
	}
	if !validUser(user) {
		return Claims{}, invalid("sub is not a user id")
	}
	exp, ok := unixTime(claims["exp"])
	if !ok {
		return Claims{}, invalid("exp is missing or not a time")
	}
	if given, ok := claims["nbf"]; ok {
		nbf, ok := unixTime(given)
		if !ok {
			return Claims{}, invalid("nbf is not a time")
		}
		if now.Before(nbf.Add(-Skew)) {
			return Claims{}, invalid("not valid yet (nbf)")
		}
	}
	if !now.Before(exp.Add(Skew)) {
		return Claims{}, ErrExpired
	}
	return Claims{User: user, ExpiresAt: exp}, nil
}

// unixTime reads a NumericDate: seconds since 1970, perhaps with a fraction, which is dropped.
func unixTime(claim any) (t time.Time, ok bool) {
	seconds, ok := claim.(float64)
	if !ok || !(seconds >= 0 && seconds <= maxUnixSeconds) {
		return time.Time{}, false
	}
	return time.Unix(int64(math.Floor(seconds)), 0), true
}

// validUser is the user id of the protocol: 1–64 bytes of [A-Za-z0-9._@-].
func validUser(user string) bool {
	if len(user) == 0 || len(user) > maxUserBytes {
		return false
	}
	for i := range len(user) {
		switch c := user[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '@', c == '-':
		default:
			return false
		}
	}
	return true
}

func invalid(reason string) error { return fmt.Errorf("%w: %s", ErrInvalid, reason) }

// reason puts an error of the JWT library into words of our own: its texts quote pieces of the token.
func reason(err error) string {
	switch {
	case errors.Is(err, jwt.ErrTokenMalformed):
		return "malformed"
	case errors.Is(err, jwt.ErrTokenUnverifiable):
		return "no key for its algorithm"
	default:
		return "signature or algorithm does not match the key"
	}
}

// SignHS256 makes a token for user, valid from issued for ttl, with the times in whole seconds. Secret is treated as by NewHS256.
func SignHS256(secret []byte, user string, issued time.Time, ttl time.Duration) (string, error) {
	secret, err := checkSecret(secret)
	if err != nil {
		return "", err
	}
	if !validUser(user) {
		return "", fmt.Errorf("sign token: %q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", user, maxUserBytes)
	}
	expires := issued.Add(ttl)
	if ttl < time.Second || issued.Unix() < 0 || expires.Unix() > maxUnixSeconds {
		return "", fmt.Errorf("sign token: a lifetime of %v from %v is not possible", ttl, issued)
	}
	signed, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{
		"sub": user,
		"iat": issued.Unix(),
		"exp": expires.Unix(),
	}).SignedString(secret)
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return signed, nil
}
