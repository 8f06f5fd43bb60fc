package token

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"sync"
	"unicode/utf8"
)

// In the order of a token: its three parts, the base64 around each, the JSON in two of them.

// parts are the three parts of a token in the compact form, still in base64, and what the signature is over.
type parts struct {
	header, claims, signature []byte
	signed                    []byte
}

func split(token []byte) (p parts, ok bool) {
	first := bytes.IndexByte(token, '.')
	if first < 0 {
		return p, false
	}
	second := bytes.IndexByte(token[first+1:], '.')
	if second < 0 {
		return p, false
	}
	second += first + 1
	p = parts{header: token[:first], claims: token[first+1 : second], signature: token[second+1:], signed: token[:second]}
	return p, bytes.IndexByte(p.signature, '.') < 0 // five parts are a JWE
}

// strict refuses bits that do not count: one signature has one text.
var strict = base64.RawURLEncoding.Strict()

// scratch is memory that a verification decodes into. The parts of a token decode to less than the token.
type scratch struct {
	used int
	b    [MaxBytes]byte
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// decode returns a slice that is good until the scratch is reset.
func (s *scratch) decode(part []byte) (decoded []byte, ok bool) {
	if bytes.IndexByte(part, '\r') >= 0 || bytes.IndexByte(part, '\n') >= 0 {
		return nil, false // encoding/base64 would pass over them
	}
	b := s.b[s.used:]
	n, err := strict.Decode(b, part)
	if err != nil {
		return nil, false
	}
	s.used += n
	return b[:n:n], true
}

// heading is what counts in the header of a token. An empty id is as none.
type heading struct {
	algorithm []byte
	id        []byte
}

func parseHeader(b []byte) (h heading, v verdict) {
	members, ok := object(b)
	if !ok {
		return h, malformed
	}
	var seen struct{ alg, kid bool }
	for {
		name, value, ok := members.next()
		if !ok {
			return h, accepted
		}
		switch string(name) {
		case "alg":
			if seen.alg {
				return h, repeated
			}
			seen.alg = true
			h.algorithm, ok = text(value)
		case "kid":
			if seen.kid {
				return h, repeated
			}
			seen.kid = true
			h.id, ok = text(value)
		case "crit": // we understand no extension; RFC 7515 §4.1.11
			return h, critical
		}
		if !ok {
			return h, malformed
		}
	}
}

// cursor stands between two values in the text of a JSON object or array that is known to be valid. That is why it
// can be so simple: what encoding/json has checked needs only to be cut into pieces.
type cursor struct{ rest []byte }

// object starts at the members of a JSON object, if b is one in valid UTF-8 and with nothing after it.
func object(b []byte) (c cursor, ok bool) {
	if !json.Valid(b) || !utf8.Valid(b) {
		return c, false
	}
	b = skipBetween(b)
	return cursor{b[1:]}, b[0] == '{'
}

// array starts at the elements of a value of valid JSON, if that is an array.
func array(value []byte) (c cursor, ok bool) {
	return cursor{value[1:]}, value[0] == '['
}

// next is the next member of an object: its name without escapes, and the text of its value.
func (c *cursor) next() (name, value []byte, ok bool) {
	if name, ok = c.element(); !ok {
		return nil, nil, false
	}
	if name, ok = text(name); !ok {
		return nil, nil, false
	}
	value, ok = c.element()
	return name, value, ok
}

// element is the text of the next value.
func (c *cursor) element() (value []byte, ok bool) {
	c.rest = skipBetween(c.rest)
	if len(c.rest) == 0 || c.rest[0] == '}' || c.rest[0] == ']' {
		return nil, false
	}
	n := valueBytes(c.rest)
	value, c.rest = c.rest[:n:n], c.rest[n:]
	return value, true
}

// skipBetween skips what stands between two values.
func skipBetween(b []byte) []byte {
	for len(b) > 0 && isBetween(b[0]) {
		b = b[1:]
	}
	return b
}

func isBetween(c byte) bool {
	return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == ',' || c == ':'
}

// valueBytes is the length of the JSON value at the start of b.
func valueBytes(b []byte) int {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		default:
			// A number or a word ends before what cannot be in it.
			if depth == 0 && i+1 < len(b) && !isBetween(b[i+1]) && b[i+1] != '}' && b[i+1] != ']' {
				continue
			}
		}
		if depth == 0 {
			return i + 1
		}
	}
	return len(b)
}

// text is what a JSON string says; not ok for another kind of value.
func text(value []byte) (said []byte, ok bool) {
	if value[0] != '"' {
		return nil, false
	}
	said = value[1 : len(value)-1]
	if bytes.IndexByte(said, '\\') < 0 {
		return said, true
	}
	var s string
	if err := json.Unmarshal(value, &s); err != nil {
		return nil, false
	}
	return []byte(s), true
}
