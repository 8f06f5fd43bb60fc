package edge

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// This file holds the cases of the Autobahn|Testsuite that ask something of a server without extensions: groups 1 to 7, 9.1 to 9.6 and
// 10, by their numbers. Each says what is sent and what comes back from a server that echoes; of the close codes that the suite
// accepts, the one that RFC 6455 asks for. Every case runs in several chop sizes against the wsReader and a chat connection here, and
// against the echo path, with sockets and without, where it is built (echo_test.go).

// autobahnGroups is how many cases the suite has. Of group 9, 9.7 and 9.8 measure time only.
var autobahnGroups = map[string]int{"1": 16, "2": 11, "3": 7, "4": 10, "5": 20, "6": 145, "7": 37, "9": 42, "10": 1}

// reply is what comes back: a message, a pong or a close frame.
type reply struct {
	kind    string
	payload string
	code    protocol.CloseCode // 0: the close frame has none
}

func (r reply) String() string {
	switch {
	case r.kind == "close":
		return fmt.Sprintf("close %d", r.code)
	case len(r.payload) > 64:
		return fmt.Sprintf("%s of %d bytes %08x", r.kind, len(r.payload), crc32.ChecksumIEEE([]byte(r.payload)))
	}
	return fmt.Sprintf("%s %q", r.kind, r.payload)
}

func replies(list []reply) string {
	var lines []string
	for _, r := range list {
		lines = append(lines, r.String())
	}
	return strings.Join(lines, ", ")
}

func pongs(payload string) reply { return reply{kind: "pong", payload: payload} }

func closes(code protocol.CloseCode) reply { return reply{kind: "close", code: code} }

// autobahnStep is what is sent, and what must have come back before the next step.
type autobahnStep struct {
	send []byte
	want []reply
}

// autobahnCase is a case of the suite. One that leaves the connection open ends with a close handshake.
type autobahnCase struct {
	id     string
	name   string // tells two forms of a case apart
	binary bool   // what its messages are
	steps  []autobahnStep
	chops  []int // 0: the whole step at once
}

func (c *autobahnCase) group() string {
	group, _, _ := strings.Cut(c.id, ".")
	return group
}

func (c *autobahnCase) closed() bool {
	want := c.steps[len(c.steps)-1].want
	return len(want) > 0 && want[len(want)-1].kind == "close"
}

// autobahnTable collects the cases for a server with a limit on messages.
type autobahnTable struct {
	limit int
	cases []autobahnCase
}

func autobahnCases(limit int) []autobahnCase {
	a := &autobahnTable{limit: limit}
	a.framing()
	a.pings()
	a.reservedBits()
	a.opcodes()
	a.fragmentation()
	a.utf8Fragments()
	a.utf8Sequences()
	a.closing()
	a.limits()
	return a.cases
}

func (a *autobahnTable) add(id string, steps ...autobahnStep) *autobahnCase {
	a.cases = append(a.cases, autobahnCase{id: id, steps: steps})
	c := &a.cases[len(a.cases)-1]
	if !c.closed() {
		c.steps = append(c.steps, autobahnStep{closingFrame(1000, ""), []reply{closes(protocol.CloseNormal)}})
	}
	longest := 0
	for _, s := range c.steps {
		longest = max(longest, len(s.send))
	}
	c.chops = []int{0, 1, 2, 7}
	if longest > 4096 {
		c.chops = []int{0, 997}
	}
	return c
}

// echoes is what becomes of a message.
func (a *autobahnTable) echoes(payload string) reply {
	if len(payload) > a.limit {
		return closes(protocol.CloseTooBig)
	}
	return reply{kind: "message", payload: payload}
}

func step(send []byte, want ...reply) autobahnStep { return autobahnStep{send, want} }

// reserved sets reserved bits of a frame, 4 being RSV1.
func reserved(frame []byte, bits byte) []byte {
	frame[0] |= bits << 4
	return frame
}

const (
	cont   = ws.OpContinuation
	greets = "good day"
)

// fragmented cuts a message into frames of n bytes.
func fragmented(op ws.OpCode, payload string, n int) []byte {
	var list [][]byte
	for ; len(payload) > n; op, payload = cont, payload[n:] {
		list = append(list, part(op, payload[:n]))
	}
	return frames(append(list, final(op, payload))...)
}

// framing is group 1: messages of every form of length.
func (a *autobahnTable) framing() {
	for kind, op := range []ws.OpCode{ws.OpText, ws.OpBinary} {
		fill := []string{"*", "\xfe"}[kind]
		for i, n := range []int{0, 125, 126, 127, 128, 65535, 65536, 65536} {
			payload := strings.Repeat(fill, n)
			c := a.add(fmt.Sprintf("1.%d.%d", kind+1, i+1), step(final(op, payload), a.echoes(payload)))
			c.binary = op == ws.OpBinary
		}
	}
}

func (a *autobahnTable) pings() {
	const octets = "\x00\xff\xfe\xfd\xfc\xfb\x00\xff"
	longest := strings.Repeat("\xfe", 125)
	var ten []byte
	var tenPongs []reply
	for i := range 10 {
		ten = append(ten, final(ws.OpPing, fmt.Sprint("ping ", i))...)
		tenPongs = append(tenPongs, pongs(fmt.Sprint("ping ", i)))
	}
	a.add("2.1", step(final(ws.OpPing, ""), pongs("")))
	a.add("2.2", step(final(ws.OpPing, greets), pongs(greets)))
	a.add("2.3", step(final(ws.OpPing, octets), pongs(octets)))
	a.add("2.4", step(final(ws.OpPing, longest), pongs(longest)))
	a.add("2.5", step(append(header(0x89, 126, 126), longest+"\xfe"...), closes(1002)))
	a.add("2.6", step(final(ws.OpPing, longest), pongs(longest)))
	a.add("2.7", step(final(ws.OpPong, "")))
	a.add("2.8", step(final(ws.OpPong, "nobody asked")))
	a.add("2.9", step(frames(final(ws.OpPong, "nobody asked"), final(ws.OpPing, "asked")), pongs("asked")))
	a.add("2.10", step(ten, tenPongs...))
	a.add("2.11", step(ten, tenPongs...))
}

// reservedBits is group 3. No extension gives them a meaning.
func (a *autobahnTable) reservedBits() {
	text, ping := final(ws.OpText, greets), final(ws.OpPing, "")
	good := a.echoes(greets)
	a.add("3.1", step(reserved(final(ws.OpText, greets), 1), closes(1002)))
	for bits := byte(2); bits <= 4; bits++ {
		a.add(fmt.Sprintf("3.%d", bits), step(frames(text, reserved(final(ws.OpText, greets), bits), ping), good, closes(1002)))
	}
	a.add("3.5", step(reserved(final(ws.OpBinary, greets), 5), closes(1002))).binary = true
	a.add("3.6", step(reserved(final(ws.OpBinary, greets), 6), closes(1002))).binary = true
	a.add("3.7", step(reserved(final(ws.OpClose, ""), 7), closes(1002)))
}

// opcodes is group 4: those that RFC 6455 reserves.
func (a *autobahnTable) opcodes() {
	text, ping := final(ws.OpText, greets), final(ws.OpPing, "")
	for kind, first := range []ws.OpCode{3, 11} {
		for i := range ws.OpCode(5) {
			id := fmt.Sprintf("4.%d.%d", kind+1, i+1)
			payload := ""
			if i%2 == 1 || i == 4 {
				payload = greets
			}
			if frame := final(first+i, payload); i < 2 {
				a.add(id, step(frame, closes(1002)))
			} else {
				a.add(id, step(frames(text, frame, ping), a.echoes(greets), closes(1002)))
			}
		}
	}
}

func (a *autobahnTable) fragmentation() {
	two := fragmented(ws.OpText, "onetwo", 3)
	whole := final(ws.OpText, greets)
	pinged := frames(part(ws.OpText, "one"), final(ws.OpPing, "p"), final(cont, "two"))
	a.add("5.1", step(frames(part(ws.OpPing, "one"), final(cont, "two")), closes(1002)))
	a.add("5.2", step(frames(part(ws.OpPong, "one"), final(cont, "two")), closes(1002)))
	for i := range 3 { // the suite's are one case in three chop sizes, as others below
		a.add(fmt.Sprint("5.", 3+i), step(two, a.echoes("onetwo")))
		a.add(fmt.Sprint("5.", 6+i), step(pinged, pongs("p"), a.echoes("onetwo")))
		a.add(fmt.Sprint("5.", 9+i), step(frames(final(cont, "of nothing"), whole), closes(1002)))
		a.add(fmt.Sprint("5.", 12+i), step(frames(part(cont, "of nothing"), whole), closes(1002)))
	}
	a.add("5.15", step(frames(two, part(cont, "of nothing"), whole), a.echoes("onetwo"), closes(1002)))
	a.add("5.16", step(frames(part(cont, "of nothing"), two, part(cont, "of nothing"), two), closes(1002)))
	a.add("5.17", step(frames(final(cont, "of nothing"), two, final(cont, "of nothing"), two), closes(1002)))
	a.add("5.18", step(frames(part(ws.OpText, "one"), final(ws.OpText, "two")), closes(1002)))
	for _, id := range []string{"5.19", "5.20"} {
		a.add(id,
			step(frames(part(ws.OpText, "1"), part(cont, "2"), final(ws.OpPing, "p1")), pongs("p1")),
			step(frames(part(cont, "3"), part(cont, "4"), final(ws.OpPing, "p2"), final(cont, "5")), pongs("p2"), a.echoes("12345")))
	}
}

const (
	greek      = "\u03ba\u1f79\u03c3\u03bc\u03b5" // 2, 3, 2, 2 and 2 bytes
	tooHigh    = "\xf4\x90\x80\x80"
	surrogate  = "\xed\xa0\x80"
	endsEdited = "edited"
)

// utf8Fragments is 6.1 to 6.4: where text is cut means nothing, and invalid text is refused. We do so at the end of a message (RFC 6455
// §8.1 leaves open when); the suite calls that "non-strict" in 6.4, and passes it.
func (a *autobahnTable) utf8Fragments() {
	const text = "Straße Ωδός €𐍈"
	a.add("6.1.1", step(final(ws.OpText, ""), a.echoes("")))
	a.add("6.1.2", step(frames(part(ws.OpText, ""), part(cont, ""), final(cont, "")), a.echoes("")))
	a.add("6.1.3", step(frames(part(ws.OpText, ""), part(cont, greets), final(cont, "")), a.echoes(greets)))
	a.add("6.2.1", step(final(ws.OpText, text), a.echoes(text)))
	a.add("6.2.2", step(frames(part(ws.OpText, text[:7]), final(cont, text[7:])), a.echoes(text)))
	a.add("6.2.3", step(fragmented(ws.OpText, text, 1), a.echoes(text)))
	a.add("6.2.4", step(fragmented(ws.OpText, greek, 1), a.echoes(greek)))
	a.add("6.3.1", step(final(ws.OpText, greek+surrogate+endsEdited), closes(1007)))
	a.add("6.3.2", step(fragmented(ws.OpText, greek+surrogate+endsEdited, 1), closes(1007)))

	bad := greek + tooHigh + endsEdited
	a.add("6.4.1", step(part(ws.OpText, greek)), step(part(cont, tooHigh)), step(final(cont, endsEdited), closes(1007)))
	a.add("6.4.2", step(part(ws.OpText, bad[:12])), step(part(cont, bad[12:13])), step(final(cont, bad[13:]), closes(1007)))
	frame := final(ws.OpText, bad)
	head := len(frame) - len(bad)
	a.add("6.4.3", step(frame[:head+11]), step(frame[head+11:head+15]), step(frame[head+15:], closes(1007)))
	a.add("6.4.4", step(frame[:head+12]), step(frame[head+12:head+13]), step(frame[head+13:], closes(1007)))
}

// utf8Text is a text and whether RFC 3629 has it.
type utf8Text struct {
	valid bool
	bytes string
}

// utf8Texts is 6.5 to 6.23, section by section, after Markus Kuhn's decoder stress test.
func utf8Texts() [][]utf8Text {
	good := func(list ...string) (texts []utf8Text) {
		for _, s := range list {
			texts = append(texts, utf8Text{true, s})
		}
		return texts
	}
	bad := func(list ...string) (texts []utf8Text) {
		for _, s := range list {
			texts = append(texts, utf8Text{false, s})
		}
		return texts
	}
	// each byte from first to last, with something behind it
	each := func(first, last byte, behind string) (s string) {
		for b := first; b <= last; b++ {
			s += string([]byte{b}) + behind
		}
		return s
	}
	var prefixes []utf8Text
	for n := 1; n <= len(greek); n++ {
		prefixes = append(prefixes, utf8Text{slices.Contains([]int{2, 5, 7, 9, 11}, n), greek[:n]})
	}
	cut := []string{"\xc0", "\xe0\x80", "\xf0\x80\x80", "\xf8\x80\x80\x80", "\xfc\x80\x80\x80\x80",
		"\xdf", "\xef\xbf", "\xf7\xbf\xbf", "\xfb\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf"}
	// U+FFFE and U+FFFF, and the last two of each of the sixteen planes above
	noncharacters := good("\xef\xbf\xbe", "\xef\xbf\xbf")
	for plane := rune(1); plane <= 16; plane++ {
		noncharacters = append(noncharacters, good(string(plane<<16|0xfffe), string(plane<<16|0xffff))...)
	}
	return [][]utf8Text{
		/*  5 of all lengths */ good("hello$world", "hello¢world", "hello€world", "hello\xf0\xa4\xad\xa2world", greek),
		/*  6 prefixes */ prefixes,
		/*  7 first of each length */ good("\x00", "\xc2\x80", "\xe0\xa0\x80", "\xf0\x90\x80\x80"),
		/*  8 */ bad("\xf8\x88\x80\x80\x80", "\xfc\x84\x80\x80\x80\x80"),
		/*  9 last of each length */ good("\x7f", "\xdf\xbf", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf"),
		/* 10 */ bad("\xf7\xbf\xbf\xbf", "\xfb\xbf\xbf\xbf\xbf", "\xfd\xbf\xbf\xbf\xbf\xbf"),
		/* 11 around the gaps */ append(good("\xed\x9f\xbf", "\xee\x80\x80", "\xef\xbf\xbd", "\xf4\x8f\xbf\xbf"), bad(tooHigh)...),
		/* 12 continuations alone */ bad("\x80", "\xbf", "\x80\xbf", "\x80\xbf\x80", "\x80\xbf\x80\xbf", "\x80\xbf\x80\xbf\x80",
			"\x80\xbf\x80\xbf\x80\xbf", each(0x80, 0xbe, "")),
		/* 13 starts alone */ bad(each(0xc0, 0xde, " "), each(0xe0, 0xee, " "), each(0xf0, 0xf6, " "), each(0xf8, 0xfa, " "), "\xfc "),
		/* 14 cut off */ bad(cut...),
		/* 15 cut off in a row */ bad(strings.Join(cut, "")),
		/* 16 no UTF-8 at all */ bad("\xfe", "\xff", "\xfe\xfe\xff\xff"),
		/* 17 overlong slash */ bad("\xc0\xaf", "\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xf8\x80\x80\x80\xaf", "\xfc\x80\x80\x80\x80\xaf"),
		/* 18 longest overlong */ bad("\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xf8\x87\xbf\xbf\xbf", "\xfc\x83\xbf\xbf\xbf\xbf"),
		/* 19 overlong NUL */ bad("\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xf8\x80\x80\x80\x80", "\xfc\x80\x80\x80\x80\x80"),
		/* 20 surrogates */ bad(surrogate, "\xed\xad\xbf", "\xed\xae\x80", "\xed\xaf\xbf", "\xed\xb0\x80", "\xed\xbe\x80", "\xed\xbf\xbf"),
		/* 21 pairs of them */ bad("\xed\xa0\x80\xed\xb0\x80", "\xed\xa0\x80\xed\xbf\xbf", "\xed\xad\xbf\xed\xb0\x80", "\xed\xad\xbf\xed\xbf\xbf",
			"\xed\xae\x80\xed\xb0\x80", "\xed\xae\x80\xed\xbf\xbf", "\xed\xaf\xbf\xed\xb0\x80", "\xed\xaf\xbf\xed\xbf\xbf"),
		/* 22 */ noncharacters,
		/* 23 specials */ good("\ufff9", "\ufffa", "\ufffb", "\ufffc", "\ufffd", "\ufffe", "\uffff"),
	}
}

func (a *autobahnTable) utf8Sequences() {
	for i, section := range utf8Texts() {
		for j, text := range section {
			want := closes(protocol.CloseInvalidUTF8)
			if text.valid {
				want = a.echoes(text.bytes)
			}
			a.add(fmt.Sprintf("6.%d.%d", i+5, j+1), step(final(ws.OpText, text.bytes), want))
		}
	}
}

// closing is group 7: the first close frame ends a connection, and its code comes back if it is one.
func (a *autobahnTable) closing() {
	text, ping, bye := final(ws.OpText, greets), final(ws.OpPing, ""), closingFrame(1000, "")
	a.add("7.1.1", step(frames(text, bye), a.echoes(greets), closes(1000)))
	a.add("7.1.2", step(frames(bye, final(ws.OpClose, "")), closes(1000)))
	a.add("7.1.3", step(frames(bye, ping), closes(1000)))
	a.add("7.1.4", step(frames(bye, text), closes(1000)))
	a.add("7.1.5", step(frames(part(ws.OpText, "one"), bye, final(cont, "two")), closes(1000)))
	a.add("7.1.6", step(frames(beginning(ws.OpText, 256<<10, 256<<10, 128<<10), text, bye, ping), closes(1009)))

	reason := strings.Repeat("*", 123)
	a.add("7.3.1", step(final(ws.OpClose, ""), closes(0)))
	a.add("7.3.2", step(final(ws.OpClose, "a"), closes(1002)))
	a.add("7.3.3", step(closingFrame(1000, ""), closes(1000)))
	a.add("7.3.4", step(closingFrame(1000, "done"), closes(1000)))
	a.add("7.3.5", step(closingFrame(1000, reason), closes(1000)))
	a.add("7.3.6", step(append(header(0x88, 126, 126), "\x03\xe8*"+reason...), closes(1002)))
	a.add("7.5.1", step(closingFrame(1000, greek+surrogate+endsEdited), closes(1007)))
	for i, code := range []uint16{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999} {
		a.add(fmt.Sprint("7.7.", i+1), step(closingFrame(code, ""), closes(protocol.CloseCode(code))))
	}
	for i, code := range []uint16{0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999} {
		a.add(fmt.Sprint("7.9.", i+1), step(closingFrame(code, ""), closes(1002)))
	}
	a.add("7.13.1", step(closingFrame(5000, ""), closes(1002)))
	a.add("7.13.2", step(closingFrame(65535, ""), closes(1002)))
}

// beginning is the start of a message of n bytes in frames of size bytes, cut off after atMost bytes: what follows a violation is never
// looked at.
func beginning(op ws.OpCode, n, size, atMost int) (b []byte) {
	for ; n > 0 && len(b) < atMost; op = cont {
		size = min(size, n)
		n -= size
		b0 := byte(op)
		if n == 0 {
			b0 |= 0x80
		}
		switch {
		case size < 126:
			b = append(b, header(b0, 0, uint64(size))...)
		case size <= 0xffff:
			b = append(b, header(b0, 126, uint64(size))...)
		default:
			b = append(b, header(b0, 127, uint64(size))...)
		}
		b = append(b, bytes.Repeat([]byte{'*'}, min(size, max(0, atMost-len(b))))...)
	}
	return b
}

// limits is 9.1 to 9.6, and 10. The suite sends up to 16 MiB: what is longer than the limit is refused with 1009, which is the form "as
// asked". The form "scaled" is the largest message of ours in as many fragments and chops; those of more than protocol.MaxFragments
// are refused too.
func (a *autobahnTable) limits() {
	const cutOff = 192 << 10
	for kind, op := range []ws.OpCode{ws.OpText, ws.OpBinary} {
		largest := strings.Repeat("*", a.limit)
		add := func(sub, i int, name string, send []byte, want reply) *autobahnCase {
			c := a.add(fmt.Sprintf("9.%d.%d", sub+kind, i+1), step(send, want))
			c.name, c.binary = name, op == ws.OpBinary
			return c
		}
		for i, n := range []int{64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20} {
			add(1, i, "as asked", beginning(op, n, n, cutOff), a.echoes(strings.Repeat("*", n)))
			scaled := largest[:a.limit>>(5-i)]
			add(1, i, "scaled", final(op, scaled), a.echoes(scaled))
		}
		for i := range 9 {
			size := 64 << (2 * i)
			add(3, i, "as asked", beginning(op, 4<<20, size, cutOff), closes(protocol.CloseTooBig))
			want := a.echoes(largest)
			if fragments := 4 << 20 / size; fragments > protocol.MaxFragments {
				want = closes(protocol.CloseTooBig)
			}
			add(3, i, "scaled", beginning(op, a.limit, max(1, a.limit/(4<<20/size)), cutOff), want)
		}
		for i := range 6 {
			chop := []int{64 << i}
			add(5, i, "as asked", beginning(op, 1<<20, 1<<20, cutOff), closes(protocol.CloseTooBig)).chops = chop
			add(5, i, "scaled", final(op, largest), a.echoes(largest)).chops = chop
		}
	}
	largest := strings.Repeat("*", a.limit)
	a.add("10.1.1", step(fragmented(ws.OpText, largest, 1300), a.echoes(largest)))
}

// chopped calls yield with pieces of b.
func chopped(b []byte, size int, yield func([]byte) bool) {
	if size == 0 {
		size = len(b)
	}
	for piece := range slices.Chunk(b, size) {
		if !yield(piece) {
			return
		}
	}
}

// runAutobahn runs every case in every chop size, and says how many there are. play sends what a step sends and returns what came
// back; once a close frame has come nothing more is sent.
func runAutobahn(t *testing.T, cases []autobahnCase, begin func(t *testing.T, c *autobahnCase) (play func(s autobahnStep, chop int) []reply)) {
	groups := map[string]map[string]bool{}
	runs := 0
	for i := range cases {
		c := &cases[i]
		group := groups[c.group()]
		if group == nil {
			group = map[string]bool{}
			groups[c.group()] = group
		}
		group[c.id] = true
		t.Run(strings.TrimSuffix(c.id+" "+c.name, " "), func(t *testing.T) {
			for _, chop := range c.chops {
				runs++
				play := begin(t, c)
				for n, s := range c.steps {
					if got, want := replies(play(s, chop)), replies(s.want); got != want {
						t.Fatalf("chops of %d, step %d: got %.400s\nwant %.400s", chop, n+1, got, want)
					}
				}
			}
		})
	}
	for _, name := range slices.SortedFunc(func(yield func(string) bool) {
		for name := range autobahnGroups {
			if !yield(name) {
				return
			}
		}
	}, func(x, y string) int { return cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y)) }) {
		t.Logf("group %s: %d cases", name, len(groups[name]))
		if len(groups[name]) != autobahnGroups[name] {
			t.Errorf("group %s has %d cases, want %d", name, len(groups[name]), autobahnGroups[name])
		}
	}
	t.Logf("%d runs", runs)
}

// TestAutobahn runs the cases against the wsReader.
func TestAutobahn(t *testing.T) {
	const limit = 64 << 10
	runAutobahn(t, autobahnCases(limit), func(t *testing.T, c *autobahnCase) func(autobahnStep, int) []reply {
		var r wsReader
		closed := false
		return func(s autobahnStep, chop int) (got []reply) {
			chopped(s.send, chop, func(piece []byte) bool {
				data := bytes.Clone(piece) // unmasked in place
				for !closed {
					ev, rest := r.next(data, !c.binary, limit, 0)
					data = rest
					switch ev.kind {
					case wsMore:
						return true
					case wsMessage:
						got = append(got, reply{kind: "message", payload: string(ev.payload)})
					case wsPing:
						got = append(got, pongs(string(ev.payload)))
					case wsClose, wsViolation:
						got = append(got, closes(ev.code))
						closed = true
					}
				}
				return false
			})
			if closed {
				r.release()
			}
			return got
		}
	})
}

// TestAutobahnChat runs the cases against chat connections, with the limits of these. Their messages are no chat messages, so each
// that is not empty is answered by an error instead of an echo.
func TestAutobahnChat(t *testing.T) {
	for _, binary := range []bool{false, true} {
		sub, limit := protocol.SubprotocolJSON, protocol.MaxJSONFrameBytes
		if binary {
			sub, limit = protocol.SubprotocolBinary, protocol.MaxBinaryFrameBytes
		}
		t.Run(sub, func(t *testing.T) {
			b := newBench(t, nil)
			bystander := b.open(sub, "bystander", "phone")
			begin := func(t *testing.T, c *autobahnCase) func(autobahnStep, int) []reply {
				if c.binary != binary {
					return func(s autobahnStep, _ int) []reply { return s.want } // runs on the other subprotocol
				}
				s := b.open(sub, "alice", "phone")
				return func(st autobahnStep, chop int) []reply {
					s.send(st.send, chop)
					got := s.replies()
					for i := range got {
						if i < len(st.want) && got[i].kind == "message" && st.want[i].kind == "message" {
							got[i].payload = st.want[i].payload
						}
					}
					// Nothing is said to an empty message, and a message that is too long is an error frame and a close.
					switch n := len(got); {
					case len(st.want) == 1 && st.want[0] == (reply{kind: "message"}) && n == 0:
						return st.want
					case n >= 2 && got[n-1].code == protocol.CloseTooBig && got[n-2].kind == "message":
						got = append(got[:n-2], got[n-1])
					}
					return got
				}
			}
			runAutobahn(t, autobahnCases(limit), begin)
			bystander.frame(sendFrame(1, "still here"))
			if bystander.closed || bystander.conn.state != stateOpen || b.l.m.sends != 1 || b.l.m.panics != 0 {
				t.Fatalf("closed %v, sends %d, panics %d", bystander.closed, b.l.m.sends, b.l.m.panics)
			}
		})
	}
}

// send brings bytes from the client in chops, until the server closes the connection.
func (s *fakeSocket) send(b []byte, chop int) {
	chopped(b, chop, func(piece []byte) bool {
		if !s.closed {
			s.receive(piece)
		}
		return !s.closed
	})
}

// replies takes what was sent to the client apart.
func (s *fakeSocket) replies() (list []reply) {
	s.bench.t.Helper()
	r := newReader(s.out)
	s.out = nil
	for {
		got, err := readReply(r)
		if err == io.EOF {
			return list
		}
		if err != nil {
			s.bench.t.Fatal(err)
		}
		list = append(list, got)
	}
}

// readReply reads a frame of the server. Only io.EOF is the end between two frames.
func readReply(r io.Reader) (got reply, err error) {
	f, err := readServerFrame(r)
	if err != nil {
		return got, err
	}
	if f.Header.Masked || !f.Header.Fin || f.Header.Rsv != 0 {
		return got, fmt.Errorf("frame of the server: %+v", f.Header)
	}
	switch f.Header.OpCode {
	case ws.OpText, ws.OpBinary:
		return reply{kind: "message", payload: string(f.Payload)}, nil
	case ws.OpPong:
		return pongs(string(f.Payload)), nil
	case ws.OpClose:
		if len(f.Payload) < 2 {
			return closes(0), nil
		}
		return closes(protocol.CloseCode(binary.BigEndian.Uint16(f.Payload))), nil
	}
	return got, errors.New("not a frame that a server sends")
}
