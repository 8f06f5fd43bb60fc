package token

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// webKey is what counts in a JSON Web Key, RFC 7517, of the kinds of RFC 7518 §6 and RFC 8037. What makes it private or
// secret is only looked for. Certificates and addresses in it (x5c, x5u) are not looked at.
type webKey struct {
	Type       string   `json:"kty"`
	ID         string   `json:"kid"`
	Use        string   `json:"use"`
	Operations []string `json:"key_ops"`
	Algorithm  string   `json:"alg"`
	Curve      string   `json:"crv"`
	X          string   `json:"x"`
	Y          string   `json:"y"`
	N          string   `json:"n"`
	E          string   `json:"e"`

	D json.RawMessage `json:"d"`
	P json.RawMessage `json:"p"`
	K json.RawMessage `json:"k"`
}

var errPublished = errors.New("it holds a private or secret key: who can read the set can sign, so it is not believed")

// parseJWKS reads a JSON Web Key Set. A key that we cannot or must not use does not spoil the others: skipped says why for
// each. A set without one key that can be used is an error.
func parseJWKS(content []byte) (keys []key, skipped []error, err error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(content, &set); err != nil {
		return nil, nil, fmt.Errorf("parse key set: %w", err)
	}
	if len(set.Keys) > maxKeysPerSource {
		return nil, nil, fmt.Errorf("parse key set: %d keys: at most %d", len(set.Keys), maxKeysPerSource)
	}
	for i, content := range set.Keys {
		k, err := parseWebKey(content)
		if err != nil {
			skipped = append(skipped, fmt.Errorf("key %d: %w", i+1, err))
			continue
		}
		keys = append(keys, k)
	}
	switch {
	case len(set.Keys) == 0:
		return nil, nil, errors.New("parse key set: it has no keys")
	case len(keys) == 0:
		return nil, nil, fmt.Errorf("parse key set: none of its %d keys can be used, %w", len(set.Keys), skipped[0])
	}
	return keys, skipped, nil
}

func parseWebKey(content []byte) (key, error) {
	var w webKey
	if err := json.Unmarshal(content, &w); err != nil {
		return key{}, errors.New("not a JSON Web Key") // the error would quote it
	}
	switch {
	case w.D != nil || w.P != nil || w.K != nil:
		return key{}, errPublished
	case w.Use != "" && w.Use != "sig", len(w.Operations) > 0 && !slices.Contains(w.Operations, "verify"):
		return key{}, errOtherUse
	case len(w.ID) > maxKeyIDBytes:
		return key{}, fmt.Errorf("a kid of %d bytes: at most %d", len(w.ID), maxKeyIDBytes)
	}
	public, err := w.public()
	if err != nil {
		return key{}, err
	}
	k, err := newPublicKey(public)
	if err != nil {
		return key{}, err
	}
	if w.Algorithm != "" {
		if a, ok := algorithmNamed([]byte(w.Algorithm)); !ok || a != k.algorithm {
			return key{}, errOtherUse
		}
	}
	k.id = w.ID
	return k, nil
}

// public is the public key. Numbers are checked where they could do harm; newPublicKey checks the rest.
func (w *webKey) public() (any, error) {
	switch {
	case w.Type == "OKP" && w.Curve == "Ed25519":
		x, err := decodeParameter("x", w.X)
		return ed25519.PublicKey(x), err
	case w.Type == "EC" && w.Curve == "P-256":
		x, errX := decodeParameter("x", w.X)
		y, errY := decodeParameter("y", w.Y)
		if err := errors.Join(errX, errY); err != nil {
			return nil, err
		}
		if len(x) != 32 || len(y) != 32 { // RFC 7518 §6.2.1.2: leading zeros are not left out
			return nil, errors.New("a coordinate that is not 32 bytes")
		}
		return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
	case w.Type == "RSA":
		n, errN := decodeParameter("n", w.N)
		e, errE := decodeParameter("e", w.E)
		if err := errors.Join(errN, errE); err != nil {
			return nil, err
		}
		e = bytes.TrimLeft(e, "\x00")
		if len(n) > MaxRSABits/8+1 || len(e) > 4 || len(e) == 4 && e[0] > 0x7f {
			return nil, errors.New("an RSA key with a modulus or an exponent that is too large")
		}
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}, nil
	}
	return nil, errOtherUse
}

func decodeParameter(name, value string) ([]byte, error) {
	b, err := base64.RawURLEncoding.DecodeString(value)
	if err != nil || len(b) == 0 {
		return nil, fmt.Errorf("%s is missing or not base64url", name)
	}
	return b, nil
}
