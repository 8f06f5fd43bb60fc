package token

import (
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// SignHS256 makes a token for user, valid from issued for ttl, with the times in whole seconds. Secret is treated as by NewHS256.
func SignHS256(secret []byte, user string, issued time.Time, ttl time.Duration) (string, error) {
	return SignHS256For(secret, user, "", "", issued, ttl)
}

// SignHS256For is SignHS256 with iss and aud in the token, where they are not empty.
func SignHS256For(secret []byte, user, issuer, audience string, issued time.Time, ttl time.Duration) (string, error) {
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
	claims := jwt.MapClaims{"sub": user, "iat": issued.Unix(), "exp": expires.Unix()}
	if issuer != "" {
		claims["iss"] = issuer
	}
	if audience != "" {
		claims["aud"] = audience
	}
	signed, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(secret)
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return signed, nil
}
