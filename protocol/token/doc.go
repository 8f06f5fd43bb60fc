// Package token makes and verifies the access tokens with which a client says who it is: JSON Web Tokens
// (RFC 7519) in the compact form, signed (RFC 7515). For who signs tokens, and for who configures keys.
//
// # What a token must be
//
//	header   alg  one of the algorithms below, spelled so; "none" is no algorithm here       required
//	         kid  the id of the key, where keys have ids                                     see below
//	         crit absent: we understand no critical extension
//	         typ, cty, jku, x5u, jwk, x5c … are not looked at, and nothing is ever fetched for a token
//	claims   sub  the user id: 1–64 bytes of [A-Za-z0-9._@-]                                 required
//	         exp  seconds since 1970, from which it is not valid any more                    required
//	         nbf  seconds since 1970, before which it is not valid yet                       optional
//	         iss  the issuer of the key's source, byte for byte                              where one is configured
//	         aud  a string or an array of strings, of which one is an audience of the source where one is configured
//	         all others, iat among them, are ignored
//	whole    at most 7 KiB, header included; strict base64url without padding
//
// Clocks differ, so exp and nbf are each widened by 60 s (Skew).
//
// A name that is looked at (alg, kid, crit, sub, exp, nbf, iss, aud) may be there once. Two of them are refused, where most
// parsers would take the last and some the first: nobody else can read another token than we do. Names are compared as they are,
// case and all, after JSON escapes. An array in aud with anything but strings in it names nobody, and one with nothing in it
// neither. A token in a token (cty JWT) and an encrypted one (JWE) are refused.
//
// # Algorithms and keys
//
//	alg                  key                                  where from
//	HS256                a secret of 32 bytes or more         Source.Secret
//	EdDSA (or Ed25519)   Ed25519                              PEM or key set
//	ES256                EC on P-256                          PEM or key set
//	RS256                RSA of 2048 to 8192 bits             PEM or key set
//
// A key is for one algorithm, by what it is; a token names an algorithm before anything in it is trusted, and gets the
// keys of that algorithm and no others. So a public key is never tried as an HMAC secret, and a secret in a key set is
// not a key. Claims are read only after the signature has been found good.
//
// Which of those keys: the ones whose id is the token's kid, and those that have no id, a bare PEM file for example. A
// token without kid can mean any. If these are more than four (MaxCandidates) the token is refused: use ids. The kid is
// compared with the configured ids and serves for nothing else.
//
// A key carries the issuer and audiences of its source. Two sources may use the same kid, or even publish the same
// key: neither can sign for the issuer of the other. With several sources configure an issuer for each.
//
// ES256 signatures are 64 bytes, not DER. Both s and its negative are accepted, since RFC 7518 does not say which and signers
// make either; so there can be two texts of one token, and the text is not its name.
//
// # Secrets
//
// The secret is the content of a file, at least 32 bytes, white space around it ignored; it is used as it stands and
// not decoded. A PEM file is refused as a secret: it is what makes HS256 with a public key possible. One way to make a secret:
//
//	openssl rand -base64 48 > secret
//
// To change it, configure both with ids, sign with the new one, and take the old one away when its tokens have expired.
//
// # PEM files
//
// Any number of PUBLIC KEY and CERTIFICATE blocks, up to 64. All must be good. Of a certificate only the key counts: not its
// dates, names or issuer. A private key is refused.
//
//	openssl genpkey -algorithm ed25519 -out sign.pem && openssl pkey -in sign.pem -pubout -out verify.pem
//
// # Key sets
//
// A JSON Web Key Set (RFC 7517), up to 64 keys in 512 KiB, in a file or behind an address. In a set one bad key does not
// spoil the others; it is logged and not used. Not used are also keys for encryption, for other algorithms, and any that
// have their private part in the set: who can read the set could sign. Two keys may have the same kid. A set without one usable key
// is an error, not a wish to refuse everybody.
//
// The address is https, or http on a loopback address (127.0.0.0/8, ::1, localhost) for a helper on the same machine. A
// redirect is an error: configure where it leads. The certificate is checked against the system's roots or Source.CAFile. The proxy
// of the environment is used (HTTPS_PROXY). A request, with all that belongs to it, may take 10 s.
//
// A file is read again every 10 s, an address asked every five minutes (Config.RefreshEvery), give or take a tenth; after a failure
// after 5 s, 10 s, 20 s and so on. Never twice within 5 s, whoever asks, and never because of what is in a token: an unknown kid is
// refused. What cannot be read or is not good changes nothing: the last good keys stay, for as long as it takes, and
// millrace_token_keys_age_seconds says how old they are. They are kept in memory alone; until an address has answered for the first time
// a token that only its keys could verify is ErrUnavailable and not ErrInvalid, so that nobody throws a good token away.
//
// To rotate: publish the new key beside the old, wait for longer than RefreshEvery, sign with the new one, and take the old one
// away when its tokens have expired. A key that has leaked is believed until the next refresh; Refresh makes it now.
//
// # Cost
//
// Processor time of one verification with one key to try, on a core of an AMD EPYC:
//
//	HS256                1.1 µs, one allocation (the user id)
//	remembered           1.1 µs, none
//	RS256, 2048 bits      42 µs; 4096 bits about 4 times, 8192 bits about 20 times as much
//	EdDSA                 61 µs
//	ES256                 74 µs
//
// VerifyFast does what takes microseconds and answers ErrSlow for the rest: an event loop calls it, and has Verify called by a worker
// where the answer is ErrSlow. Neither waits for the network or for who loads keys.
//
// Tokens that took long to verify and were good are remembered by SHA-256 of the whole token, up to
// Config.CacheTokens (65 536) of them: when everybody comes back after a restart of the network, only who has a new token
// costs a verification. Their times are checked each time; a full cache lets go of what expires soon; and it belongs to the
// set of keys: when keys change it is a new and empty one. HS256 is not remembered: it costs what looking it up costs.
//
// Errors and logs never contain a token or a part of one, a secret, or the query of an address.
package token
