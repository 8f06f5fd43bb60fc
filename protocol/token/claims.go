package token

import (
	"math"
	"slices"
	"strconv"
	"time"
)

// trust is what the tokens that a key has signed must say besides, for the key to be believed.
type trust struct {
	issuer    string   // "": not looked at
	audiences []string // one of them; none: not looked at
}

// statement is the claims that count, in seconds since 1970.
type statement struct {
	user      []byte
	exp, nbf  int64 // nbf is 0 without one: always past
	issuer    []byte
	audiences []byte // JSON text
}

// claimNames are the claims that are looked at. Giving one twice is refused, RFC 7519 §4; others are ignored.
var claimNames = [...]string{"sub", "exp", "nbf", "iss", "aud"}

// parseClaims reads the claims of a token whose signature is good.
func parseClaims(b []byte) (s statement, v verdict) {
	members, ok := object(b)
	if !ok {
		return s, malformed
	}
	var values [len(claimNames)][]byte
	for {
		name, value, ok := members.next()
		if !ok {
			break
		}
		for i, n := range claimNames {
			switch {
			case n != string(name):
			case values[i] != nil:
				return s, repeated
			default:
				values[i] = value
			}
		}
	}
	sub, exp, nbf, iss, aud := values[0], values[1], values[2], values[3], values[4]
	if sub != nil {
		s.user, _ = text(sub)
	}
	if !validUser(s.user) {
		return s, badSubject
	}
	if s.exp, ok = unixSeconds(exp); !ok {
		return s, badExpiry
	}
	if s.nbf, ok = unixSeconds(nbf); !ok && nbf != nil {
		return s, badNotBefore
	}
	if iss != nil {
		s.issuer, _ = text(iss)
	}
	s.audiences = aud
	return s, accepted
}

// unixSeconds reads a NumericDate: seconds since 1970, perhaps with a fraction, which is dropped.
func unixSeconds(value []byte) (seconds int64, ok bool) {
	if value == nil {
		return 0, false
	}
	f, err := strconv.ParseFloat(string(value), 64)
	if err != nil || !(f >= 0 && f <= maxUnixSeconds) {
		return 0, false
	}
	return int64(math.Floor(f)), true
}

// check is whether the key's owner is believed and the time is right. Expiry comes last: expired means that nothing else is
// wrong.
func (s *statement) check(t *trust, now time.Time) verdict {
	if t.issuer != "" && string(s.issuer) != t.issuer {
		return wrongIssuer
	}
	if len(t.audiences) > 0 && !t.named(s.audiences) {
		return wrongAudience
	}
	return checkTimes(s.exp, s.nbf, now)
}

// named is whether aud, a string or an array of strings, names one of ours. An array with anything else in it does not.
func (t *trust) named(aud []byte) bool {
	if aud == nil {
		return false
	}
	if one, ok := text(aud); ok {
		return slices.Contains(t.audiences, string(one))
	}
	elements, ok := array(aud)
	if !ok {
		return false
	}
	found := false
	for {
		element, ok := elements.element()
		if !ok {
			return found
		}
		one, ok := text(element)
		if !ok {
			return false
		}
		found = found || slices.Contains(t.audiences, string(one))
	}
}

// checkTimes widens exp and nbf by Skew.
func checkTimes(exp, nbf int64, now time.Time) verdict {
	switch {
	case now.Before(time.Unix(nbf, 0).Add(-Skew)):
		return tooEarly
	case !now.Before(time.Unix(exp, 0).Add(Skew)):
		return expired
	}
	return accepted
}
