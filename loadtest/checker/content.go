package checker

import "strconv"

// Content is the text of a test message: its stream, its number, and letters that both determine, so
// that bytes of another message are noticed.
//
//	17:1048577:6:qjxwma      stream : seq : letters : the letters
//
// It has padTo bytes of ASCII; or one less, where a letter more would take two bytes, as the count goes from 9 to 10;
// or as many as it needs without letters if that is more (at most 34).
func Content(from StreamID, seq uint64, padTo int) string {
	return string(AppendContent(nil, from, seq, padTo))
}

// AppendContent appends what Content returns.
func AppendContent(dst []byte, from StreamID, seq uint64, padTo int) []byte {
	first := len(dst)
	dst = strconv.AppendInt(dst, int64(from), 10)
	dst = append(dst, ':')
	dst = strconv.AppendUint(dst, seq, 10)
	dst = append(dst, ':')
	letters := lettersFor(padTo - (len(dst) - first) - 1)
	dst = strconv.AppendInt(dst, int64(letters), 10)
	dst = append(dst, ':')
	key := seqHash(from, seq)
	for i := range letters {
		dst = append(dst, letter(key, i))
	}
	return dst
}

// lettersFor is the largest number that fits room together with as many letters.
func lettersFor(room int) int {
	n := max(0, room)
	for n > 0 && n+len(strconv.Itoa(n)) > room {
		n--
	}
	return n
}

func letter(key uint64, i int) byte { return 'a' + byte(mix(key+uint64(i))%26) }

// ParseContent reads a text that Content made, and accepts no other: not a shortened one, nor one with
// letters of another message.
func ParseContent(content string) (from StreamID, seq uint64, ok bool) {
	rest := content
	stream, rest, ok1 := cutNumber(rest, 1<<31-1)
	seq, rest, ok2 := cutNumber(rest, 1<<64-1)
	letters, rest, ok3 := cutNumber(rest, 1<<31-1)
	if !ok1 || !ok2 || !ok3 || int(letters) != len(rest) {
		return 0, 0, false
	}
	from = StreamID(stream)
	key := seqHash(from, seq)
	for i := range len(rest) {
		if rest[i] != letter(key, i) {
			return 0, 0, false
		}
	}
	return from, seq, true
}

// cutNumber cuts a decimal number and its colon. One number has one text.
func cutNumber(s string, limit uint64) (n uint64, rest string, ok bool) {
	for i := range len(s) {
		switch c := s[i]; {
		case c == ':':
			return n, s[i+1:], i > 0 && (i == 1 || s[0] != '0')
		case c < '0' || c > '9', n > (limit-uint64(c-'0'))/10:
			return 0, s, false
		default:
			n = n*10 + uint64(c-'0')
		}
	}
	return 0, s, false
}
