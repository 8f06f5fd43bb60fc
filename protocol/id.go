package protocol

import (
	"errors"
)

// MessageID names one message for ever and everywhere. It is opaque: equal bytes are the same message,
// nothing else can be read from it, and knowing one gives no right to anything.
type MessageID [16]byte

// ErrMessageID says that a text is not 26 characters of Crockford base32 for 128 bits.
var ErrMessageID = errors.New("message id is not 26 characters of Crockford base32")

// crockford is the alphabet of https://www.crockford.com/base32.html: no I, L, O, U.
const crockford = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

// MessageIDTextBytes is the length of the text form: ⌈128 / 5⌉.
const MessageIDTextBytes = 26

var crockfordValue = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i := 0; i < len(crockford); i++ {
		c := crockford[i]
		t[c] = byte(i)
		if c >= 'A' {
			t[c|0x20] = byte(i)
		}
	}
	return t
}()

// AppendText appends the text form, upper case, most significant bits first; the first character
// carries 3 bits.
func (id MessageID) AppendText(dst []byte) []byte {
	var out [MessageIDTextBytes]byte
	// 26 characters are 130 bits: two leading zero bits, then the id.
	var acc uint32
	bits := 2
	n := 0
	for _, b := range id {
		acc = acc<<8 | uint32(b)
		bits += 8
		for bits >= 5 {
			bits -= 5
			out[n] = crockford[acc>>bits&31]
			n++
		}
	}
	return append(dst, out[:]...)
}

// String is the text form.
func (id MessageID) String() string { return string(id.AppendText(nil)) }

// ParseMessageID reads the text form, upper or lower case. It accepts neither the look-alikes
// of Crockford's alphabet nor hyphens: one id has one text but for its case.
func ParseMessageID(text []byte) (id MessageID, err error) {
	if len(text) != MessageIDTextBytes {
		return id, ErrMessageID
	}
	var acc uint32
	bits := -2
	n := 0
	for i, c := range text {
		v := crockfordValue[c]
		if v == 0xff || i == 0 && v > 7 {
			return MessageID{}, ErrMessageID
		}
		acc = acc<<5 | uint32(v)
		bits += 5
		if bits >= 8 {
			bits -= 8
			id[n] = byte(acc >> bits)
			n++
		}
	}
	return id, nil
}

// ValidUser reports whether name can be a user id: 1–64 bytes of [A-Za-z0-9._@-].
func ValidUser[T string | []byte](name T) bool { return validName(name, MaxUserBytes) }

// ValidDevice reports whether name can be a device id: 1–32 bytes of [A-Za-z0-9._@-].
func ValidDevice[T string | []byte](name T) bool { return validName(name, MaxDeviceBytes) }

func validName[T string | []byte](name T, limit int) bool {
	if len(name) == 0 || len(name) > limit {
		return false
	}
	for i := 0; i < len(name); i++ {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '@', c == '-':
		default:
			return false
		}
	}
	return true
}
