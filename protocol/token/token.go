package token

import (
	"errors"
	"fmt"
	"time"
)

const (
	// MaxBytes is the longest token that is looked at. It bounds the header too, and what decoding can cost.
	MaxBytes = 7 << 10
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
	// ErrUnavailable is a token that no key accepts while the keys of a configured address have never been
	// loaded: nobody can say yet whether it is good. The client keeps it and tries again.
	ErrUnavailable = errors.New("keys are not loaded yet")
	// ErrSlow is VerifyFast's answer for a token that takes public-key arithmetic: Verify will tell, elsewhere.
	ErrSlow = errors.New("token takes longer to verify")
)

// Claims is what a verified token says.
type Claims struct {
	User string // sub
	// ExpiresAt is exp. Verify accepts the token until Skew later.
	ExpiresAt time.Time
}

// verdict is the outcome of a verification. Outcomes are values and their errors exist once, so that a flood of bad
// tokens makes no garbage.
type verdict uint8

const (
	accepted verdict = iota
	expired
	unavailable
	slow
	tooLong
	malformed
	repeated
	critical
	otherAlgorithm
	unknownKey
	tooManyKeys
	wrongSignature
	badSubject
	badExpiry
	badNotBefore
	tooEarly
	wrongIssuer
	wrongAudience
	verdicts // how many
)

// verdictTexts holds the label of a verdict in metrics, and why a token is invalid, where it is.
var verdictTexts = [verdicts]struct{ label, why string }{
	accepted:       {label: "accepted"},
	expired:        {label: "expired"},
	unavailable:    {label: "unavailable"},
	slow:           {label: "slow"},
	tooLong:        {"too_long", fmt.Sprintf("longer than %d KiB", MaxBytes>>10)},
	malformed:      {"malformed", "malformed"},
	repeated:       {"repeated", "a header parameter or a claim is given twice"},
	critical:       {"critical", "the header has crit"},
	otherAlgorithm: {"algorithm", "no key for its algorithm"},
	unknownKey:     {"unknown_key", "no key with its kid"},
	tooManyKeys:    {"too_many_keys", fmt.Sprintf("more than %d keys would have to be tried; give them ids, and the token a kid", MaxCandidates)},
	wrongSignature: {"signature", "signature or algorithm does not match the key"},
	badSubject:     {"subject", "sub is missing or not a user id"},
	badExpiry:      {"expiry", "exp is missing or not a time"},
	badNotBefore:   {"not_before", "nbf is not a time"},
	tooEarly:       {"too_early", "not valid yet (nbf)"},
	wrongIssuer:    {"issuer", "iss is not the issuer of its key"},
	wrongAudience:  {"audience", "aud does not name us"},
}

var verdictErrors = func() (errs [verdicts]error) {
	errs[expired], errs[unavailable], errs[slow] = ErrExpired, ErrUnavailable, ErrSlow
	for v := tooLong; v < verdicts; v++ {
		errs[v] = fmt.Errorf("%w: %s", ErrInvalid, verdictTexts[v].why)
	}
	return errs
}()

// validUser is the user id of the protocol: 1–64 bytes of [A-Za-z0-9._@-].
func validUser[T []byte | string](user T) bool {
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
