package protocol

import (
	"unicode/utf16"
	"unicode/utf8"
)

// maxJSONDepth bounds nesting inside unknown fields, the object itself included. Known fields have none.
const maxJSONDepth = 32

// scanner reads RFC 8259 strictly and copies nothing but strings with escapes, which it unescapes into
// arena. Its functions stand in the order of an object: object, member, value, string, number, the rest.
type scanner struct {
	src   []byte
	pos   int    // after an error: where it was found
	arena []byte // cap is at least len(src) before the first string goes in, so that it never moves
}

// object reads one object into o. An error is one of syntax: where the object ends is then unknown. Values
// that are well formed but not what their key wants are marked in o.bad.
func (s *scanner) object(o *jsonObject) *FrameError {
	if !s.take('{') {
		return errJSONSyntax
	}
	s.skipSpace()
	if s.take('}') {
		return nil
	}
	for {
		if err := s.member(o); err != nil {
			return err
		}
		s.skipSpace()
		switch {
		case s.take(','):
			s.skipSpace()
		case s.take('}'):
			return nil
		default:
			return errJSONSyntax
		}
	}
}

// member reads one key and its value.
func (s *scanner) member(o *jsonObject) *FrameError {
	raw, plain, ok := s.string()
	if !ok {
		return errJSONSyntax
	}
	if !plain {
		// A key that is not Unicode is nobody's key.
		raw, _ = s.unescape(raw)
	}
	s.skipSpace()
	if !s.take(':') {
		return errJSONSyntax
	}
	s.skipSpace()
	k := lookupKey(raw)
	if k == keyUnknown {
		return s.skipValue(1)
	}
	if o.seen.has(k) {
		o.bad |= keys(k)
	}
	o.seen |= keys(k)
	return s.value(k, o)
}

// value reads the value of a known key. null is the same as leaving the key out.
func (s *scanner) value(k jsonKey, o *jsonObject) *FrameError {
	limit := jsonKeys[k].limit
	switch c := s.peek(); {
	case c == '"' && limit == 0:
		raw, plain, ok := s.string()
		if !ok {
			return errJSONSyntax
		}
		if !plain {
			raw, ok = s.unescape(raw)
		}
		if !ok || !utf8.Valid(raw) {
			o.bad |= keys(k)
			return nil
		}
		o.present |= keys(k)
		o.values[k].text = raw
	case (c == '-' || '0' <= c && c <= '9') && limit != 0:
		raw, integer, ok := s.number()
		if !ok {
			return errJSONSyntax
		}
		v, ok := parseInteger(raw, limit)
		if !integer || !ok {
			o.bad |= keys(k)
			return nil
		}
		o.present |= keys(k)
		o.values[k].number = v
	case c == 'n':
		return s.skipValue(1)
	default:
		o.bad |= keys(k)
		return s.skipValue(1)
	}
	return nil
}

// string reads a string and returns what stands between the quotation marks; plain is false when it has
// escapes, whose form is checked here and whose meaning in unescape.
func (s *scanner) string() (raw []byte, plain, ok bool) {
	if !s.take('"') {
		return nil, false, false
	}
	start := s.pos
	plain = true
	for s.pos < len(s.src) {
		switch c := s.src[s.pos]; {
		case c == '"':
			s.pos++
			return s.src[start : s.pos-1 : s.pos-1], plain, true
		case c == '\\':
			plain = false
			if !s.escape() {
				return nil, false, false
			}
		case c < 0x20:
			return nil, false, false
		default:
			s.pos++
		}
	}
	return nil, false, false
}

// escape passes over one well-formed escape.
func (s *scanner) escape() bool {
	if s.pos+1 >= len(s.src) {
		s.pos = len(s.src)
		return false
	}
	switch s.src[s.pos+1] {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.pos += 2
		return true
	case 'u':
		if s.pos+6 > len(s.src) {
			return false
		}
		if _, ok := parseHex(s.src[s.pos+2 : s.pos+6]); !ok {
			return false
		}
		s.pos += 6
		return true
	}
	return false
}

// unescape writes a string whose escapes are well formed into the arena. ok is false when a surrogate
// stands alone: such a string is not Unicode and has no UTF-8.
func (s *scanner) unescape(raw []byte) (text []byte, ok bool) {
	if cap(s.arena) < len(s.src) {
		// First use: nothing points into the old one. No escape is shorter than what it stands for, so
		// all strings of src together fit.
		s.arena = make([]byte, 0, len(s.src))
	}
	start := len(s.arena)
	for i := 0; i < len(raw); {
		if raw[i] != '\\' {
			s.arena = append(s.arena, raw[i])
			i++
			continue
		}
		if raw[i+1] != 'u' {
			s.arena = append(s.arena, simpleEscape(raw[i+1]))
			i += 2
			continue
		}
		r, size := unicodeEscape(raw[i:])
		if size == 0 {
			s.arena = s.arena[:start]
			return nil, false
		}
		s.arena = utf8.AppendRune(s.arena, r)
		i += size
	}
	return s.arena[start:len(s.arena):len(s.arena)], true
}

func simpleEscape(c byte) byte {
	switch c {
	case 'b':
		return '\b'
	case 'f':
		return '\f'
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c
}

// unicodeEscape decodes the \u escape at the start of b, or the pair of them that makes one code point; size is 0
// for a lone surrogate.
func unicodeEscape(b []byte) (r rune, size int) {
	v, _ := parseHex(b[2:6])
	r = rune(v)
	if !utf16.IsSurrogate(r) {
		return r, 6
	}
	if len(b) < 12 || b[6] != '\\' || b[7] != 'u' {
		return 0, 0
	}
	low, _ := parseHex(b[8:12])
	if r = utf16.DecodeRune(r, rune(low)); r == utf8.RuneError {
		return 0, 0
	}
	return r, 12
}

// number reads a number; integer is false when it has a sign, a fraction or an exponent.
func (s *scanner) number() (raw []byte, integer, ok bool) {
	start := s.pos
	integer = !s.take('-')
	if !s.take('0') && !s.digits() {
		return nil, false, false
	}
	if s.take('.') {
		integer = false
		if !s.digits() {
			return nil, false, false
		}
	}
	if s.take('e') || s.take('E') {
		integer = false
		if !s.take('+') {
			s.take('-')
		}
		if !s.digits() {
			return nil, false, false
		}
	}
	return s.src[start:s.pos], integer, true
}

// digits passes over one or more digits.
func (s *scanner) digits() bool {
	start := s.pos
	for c := s.peek(); '0' <= c && c <= '9'; c = s.peek() {
		s.pos++
	}
	return s.pos > start
}

// parseInteger reads digits up to a limit, which is below 2^60, so that one more digit cannot overflow.
func parseInteger(digits []byte, limit uint64) (v uint64, ok bool) {
	for _, c := range digits {
		v = v*10 + uint64(c-'0')
		if c < '0' || c > '9' || v > limit {
			return 0, false
		}
	}
	return v, true
}

// skipValue passes over any value inside depth levels of nesting.
func (s *scanner) skipValue(depth int) *FrameError {
	ok := false
	switch c := s.peek(); c {
	case '{', '[':
		return s.skipNested(depth + 1)
	case '"':
		_, _, ok = s.string()
	case 't':
		ok = s.literal("true")
	case 'f':
		ok = s.literal("false")
	case 'n':
		ok = s.literal("null")
	default:
		_, _, ok = s.number()
	}
	if !ok {
		return errJSONSyntax
	}
	return nil
}

// skipNested passes over an object or array. Its recursion is bounded by maxJSONDepth.
func (s *scanner) skipNested(depth int) *FrameError {
	if depth > maxJSONDepth {
		return errJSONDepth
	}
	object, end := s.take('{'), byte('}')
	if !object {
		s.pos++
		end = ']'
	}
	s.skipSpace()
	if s.take(end) {
		return nil
	}
	for {
		if object {
			if _, _, ok := s.string(); !ok {
				return errJSONSyntax
			}
			s.skipSpace()
			if !s.take(':') {
				return errJSONSyntax
			}
			s.skipSpace()
		}
		if err := s.skipValue(depth); err != nil {
			return err
		}
		s.skipSpace()
		switch {
		case s.take(','):
			s.skipSpace()
		case s.take(end):
			return nil
		default:
			return errJSONSyntax
		}
	}
}

func (s *scanner) literal(word string) bool {
	if len(s.src)-s.pos < len(word) || string(s.src[s.pos:s.pos+len(word)]) != word {
		return false
	}
	s.pos += len(word)
	return true
}

// endOfLine passes over the newline that ends an object, or over nothing at the end of the message.
func (s *scanner) endOfLine() *FrameError {
	for c := s.peek(); c == ' ' || c == '\t' || c == '\r'; c = s.peek() {
		s.pos++
	}
	if s.pos < len(s.src) && !s.take('\n') {
		return errJSONTrailing
	}
	return nil
}

func (s *scanner) skipSpace() {
	for c := s.peek(); c == ' ' || c == '\t' || c == '\r' || c == '\n'; c = s.peek() {
		s.pos++
	}
}

// peek is the next byte, 0 at the end: no token begins with it.
func (s *scanner) peek() byte {
	if s.pos < len(s.src) {
		return s.src[s.pos]
	}
	return 0
}

func (s *scanner) take(c byte) bool {
	if s.pos < len(s.src) && s.src[s.pos] == c {
		s.pos++
		return true
	}
	return false
}
