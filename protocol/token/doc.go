// Package token makes and verifies the access tokens with which a client says who it is: JSON Web Tokens
// (RFC 7519) in the compact form, signed (RFC 7515).
//
// What a token must be:
//
//	header   alg  HS256, the algorithm of the configured secret; nothing else is accepted, "none" least of all
//	         crit absent: we understand no critical extension
//	         kid, jku, x5u … are not looked at, and nothing is ever fetched
//	claims   sub  the user id: 1–64 bytes of [A-Za-z0-9._@-]          required
//	         exp  seconds since 1970, from which it is not valid any more    required
//	         nbf  seconds since 1970, before which it is not valid yet       optional
//	         all others, iat, aud and iss among them, are ignored
//	whole    at most 7 KiB
//
// Clocks differ, so exp and nbf are each widened by 60 s (Skew).
//
// A key belongs to one algorithm, and a token names an algorithm before anything in it is trusted: so the verifier
// takes the keys of the named algorithm and knows none for any other. That is what makes it safe to add public keys
// later (EdDSA, ES256, RS256, a key set): a public key is never tried as an HMAC secret.
//
// The secret is the content of a file, at least 32 bytes, white space around it ignored; it is used as it stands and
// not decoded. One way to make one:
//
//	openssl rand -base64 48 > secret
//
// Errors and logs never contain a token or a part of one.
package token
