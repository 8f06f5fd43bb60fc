package token

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"sync"

	"github.com/golang-jwt/jwt/v5"
)

const (
	// MaxCandidates is how many keys one token may make us try: those of its algorithm that its kid does not rule
	// out. A token that would need more is refused.
	MaxCandidates = 4
	// MinRSABits and MaxRSABits bound the modulus of an RSA key: below it can be factored, above one verification takes
	// most of a millisecond.
	MinRSABits = 2048
	MaxRSABits = 8192

	maxKeysPerSource = 64
	maxKeyIDBytes    = 256
)

// algorithm is one of those that we know. There is no value for "none".
type algorithm uint8

const (
	hs256 algorithm = iota
	eddsa
	es256
	rs256
	algorithms // how many
)

var algorithmNames = [algorithms]string{"HS256", "EdDSA", "ES256", "RS256"}

// methods do the public-key arithmetic.
var methods = [algorithms]jwt.SigningMethod{eddsa: jwt.SigningMethodEdDSA, es256: jwt.SigningMethodES256, rs256: jwt.SigningMethodRS256}

func algorithmNamed(name []byte) (a algorithm, ok bool) {
	if string(name) == "Ed25519" { // RFC 9864 calls the same so
		return eddsa, true
	}
	for a, n := range algorithmNames {
		if n == string(name) {
			return algorithm(a), true
		}
	}
	return 0, false
}

// slow is whether a verification takes tens of microseconds or more.
func (a algorithm) slow() bool { return a != hs256 }

// key is a verification key, the one algorithm that it is for, and what else its tokens must say. It is immutable.
type key struct {
	algorithm      algorithm
	signatureBytes int
	id             string     // "": a token's kid says nothing about this key
	public         any        // what the method of the algorithm wants
	macs           *sync.Pool // of *mac, for HS256
	trust          *trust
}

// mac is a state of HMAC and room for its result. They are kept: to begin with the secret anew costs as much as to hash
// a token, and 600 B.
type mac struct {
	state hash.Hash
	sum   [sha256.Size]byte
}

// newSecretKey is a key for HS256.
func newSecretKey(secret []byte) key {
	secret = bytes.Clone(secret)
	macs := &sync.Pool{New: func() any { return &mac{state: hmac.New(sha256.New, secret)} }}
	return key{algorithm: hs256, signatureBytes: sha256.Size, macs: macs}
}

// errOtherUse is a key that may be good, but for something that we do not do.
var errOtherUse = errors.New("not a key for EdDSA (Ed25519), ES256 (P-256) or RS256")

// newPublicKey is the key for the one algorithm that a public key is for.
func newPublicKey(public any) (key, error) {
	switch p := public.(type) {
	case ed25519.PublicKey:
		if len(p) != ed25519.PublicKeySize {
			return key{}, fmt.Errorf("an Ed25519 key of %d bytes", len(p))
		}
		return key{algorithm: eddsa, signatureBytes: ed25519.SignatureSize, public: p}, nil
	case *ecdsa.PublicKey:
		if p.Curve != elliptic.P256() {
			return key{}, errOtherUse
		}
		return key{algorithm: es256, signatureBytes: 2 * 32, public: p}, nil
	case *rsa.PublicKey:
		switch bits := p.N.BitLen(); {
		case bits < MinRSABits || bits > MaxRSABits:
			return key{}, fmt.Errorf("an RSA key of %d bits: from %d to %d are accepted", bits, MinRSABits, MaxRSABits)
		case p.N.Bit(0) == 0 || p.E < 3 || p.E%2 == 0:
			return key{}, errors.New("an RSA key with an even modulus or a bad exponent")
		}
		return key{algorithm: rs256, signatureBytes: p.Size(), public: p}, nil
	}
	return key{}, errOtherUse
}

// verifies is whether the signature over a text was made with this key.
func (k *key) verifies(signed, signature []byte) bool {
	if len(signature) != k.signatureBytes {
		return false
	}
	if k.algorithm != hs256 {
		return methods[k.algorithm].Verify(string(signed), signature, k.public) == nil
	}
	m := k.macs.Get().(*mac)
	defer k.macs.Put(m)
	m.state.Reset()
	m.state.Write(signed)
	return hmac.Equal(signature, m.state.Sum(m.sum[:0]))
}

// keySet is all keys at one time, and what has been verified with them. Other keys are another keySet, with an empty cache:
// nothing outlives the key that vouched for it.
type keySet struct {
	keys       [algorithms][]key
	incomplete bool // an address has never been loaded
	cache      *cache
}

// candidates are the keys that a token may have been signed with. A key without an id may have signed any token, and
// any key may have signed a token without an id.
func (s *keySet) candidates(a algorithm, id []byte) (found [MaxCandidates]*key, n int, v verdict) {
	for i := range s.keys[a] {
		k := &s.keys[a][i]
		if len(id) > 0 && k.id != "" && k.id != string(id) {
			continue
		}
		if n == len(found) {
			return found, 0, tooManyKeys
		}
		found[n] = k
		n++
	}
	switch {
	case n > 0:
		return found, n, accepted
	case s.incomplete && a.slow():
		return found, 0, unavailable
	case len(s.keys[a]) == 0:
		return found, 0, otherAlgorithm
	}
	return found, 0, unknownKey
}

// parsePEM reads the public keys of a file of PUBLIC KEY and CERTIFICATE blocks. Of a certificate only the key counts, not
// its names, dates or issuer. All must be good: a file that an operator wrote is no place for keys that do not work.
func parsePEM(content []byte) ([]key, error) {
	begun := bytes.Count(content, []byte("-----BEGIN "))
	var keys []key
	for rest := content; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		k, err := parseBlock(block)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", len(keys)+1, err)
		}
		keys = append(keys, k)
	}
	switch {
	case len(keys) != begun:
		return nil, fmt.Errorf("%d of %d PEM blocks are damaged", begun-len(keys), begun)
	case len(keys) == 0:
		return nil, errors.New("no PUBLIC KEY, no CERTIFICATE and no JSON key set in it")
	case len(keys) > maxKeysPerSource:
		return nil, fmt.Errorf("%d keys: at most %d", len(keys), maxKeysPerSource)
	}
	return keys, nil
}

func parseBlock(block *pem.Block) (key, error) {
	switch block.Type {
	case "PUBLIC KEY":
		public, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return key{}, err
		}
		return newPublicKey(public)
	case "CERTIFICATE":
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return key{}, err
		}
		return newPublicKey(certificate.PublicKey)
	case "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "OPENSSH PRIVATE KEY":
		return key{}, errors.New("a private key, which only who signs may have; make a public one of it with: openssl pkey -pubout")
	case "RSA PUBLIC KEY":
		return key{}, errors.New("an RSA PUBLIC KEY (PKCS #1); make it a PUBLIC KEY with: openssl rsa -RSAPublicKey_in -pubout")
	}
	return key{}, fmt.Errorf("a %q, where PUBLIC KEY or CERTIFICATE is expected", block.Type)
}
