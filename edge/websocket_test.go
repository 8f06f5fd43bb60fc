package edge

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// transcript feeds chunks to a reader and prints its events.
func transcript(chunks [][]byte, text bool, limit int) string {
	var r wsReader
	defer r.release()
	var out []string
	for _, chunk := range chunks {
		data := bytes.Clone(chunk) // unmasked in place
		for {
			ev, rest := r.next(data, text, limit, 0)
			switch ev.kind {
			case wsMessage:
				out = append(out, fmt.Sprintf("message %q", ev.payload))
			case wsPing:
				out = append(out, fmt.Sprintf("ping %q", ev.payload))
			case wsPong:
				out = append(out, fmt.Sprintf("pong %q", ev.payload))
			case wsClose:
				return strings.Join(append(out, fmt.Sprintf("close %d", ev.code)), ", ")
			case wsViolation:
				return strings.Join(append(out, fmt.Sprintf("violation %d", ev.code)), ", ")
			}
			if ev.kind == wsMore {
				break
			}
			data = rest
		}
	}
	if r.pending() {
		out = append(out, "more")
	}
	return strings.Join(out, ", ")
}

// everyCut checks that a stream means the same however it is cut: whole, cut once at every byte, and in single bytes.
func everyCut(t *testing.T, stream []byte, text bool, limit int, want string) {
	t.Helper()
	if got := transcript([][]byte{stream}, text, limit); got != want {
		t.Fatalf("whole: got %.300s\nwant %.300s", got, want)
	}
	step := max(1, len(stream)/300)
	for i := 1; i < len(stream); i += step {
		if got := transcript([][]byte{stream[:i], stream[i:]}, text, limit); got != want {
			t.Fatalf("cut at %d: got %.300s\nwant %.300s", i, got, want)
		}
	}
	var single [][]byte
	for i := range stream {
		single = append(single, stream[i:i+1])
	}
	if got := transcript(single, text, limit); got != want {
		t.Fatalf("single bytes: got %.300s\nwant %.300s", got, want)
	}
}

func frames(list ...[]byte) []byte { return bytes.Join(list, nil) }

func final(op ws.OpCode, payload string) []byte { return clientFrame(op, true, []byte(payload)) }

func part(op ws.OpCode, payload string) []byte { return clientFrame(op, false, []byte(payload)) }

func closingFrame(code uint16, reason string) []byte {
	return clientFrame(ws.OpClose, true, append(binary.BigEndian.AppendUint16(nil, code), reason...))
}

// header is a masked header with any bits and any form of length.
func header(b0 byte, form byte, length uint64) []byte {
	b := []byte{b0, 0x80 | form}
	switch form {
	case 126:
		b = binary.BigEndian.AppendUint16(b, uint16(length))
	case 127:
		b = binary.BigEndian.AppendUint64(b, length)
	default:
		b[1] = 0x80 | byte(length)
	}
	return append(b, 0, 0, 0, 0)
}

// TestFrames holds RFC 6455 §5, §7.4 and §8.1: after the cases of the Autobahn suite (1 to 7 and 10).
func TestFrames(t *testing.T) {
	const cont, text, binary_, closing, ping, pong = ws.OpContinuation, ws.OpText, ws.OpBinary, ws.OpClose, ws.OpPing, ws.OpPong
	long := strings.Repeat("a", 125)
	k := strings.Repeat("k", 1000)
	for _, tt := range []struct {
		name   string
		stream []byte
		want   string
	}{
		{"1 empty", final(text, ""), `message ""`},
		{"1 125 bytes", final(text, long), fmt.Sprintf("message %q", long)},
		{"1 126 bytes", final(text, long+"b"), fmt.Sprintf("message %q", long+"b")},
		{"1 1000 bytes", final(text, k), fmt.Sprintf("message %q", k)},
		{"1 two", frames(final(text, "a"), final(text, "b")), `message "a", message "b"`},
		{"2 ping", final(ping, ""), `ping ""`},
		{"2 ping with payload", final(ping, long), fmt.Sprintf("ping %q", long)},
		{"2 ping of 126", header(0x89, 126, 126), "violation 1002"},
		{"2 pong unasked", frames(final(pong, "x"), final(ping, "y")), `pong "x", ping "y"`},
		{"2 ten pings", bytes.Repeat(final(ping, "p"), 10), strings.TrimSuffix(strings.Repeat(`ping "p", `, 10), ", ")},
		{"3 RSV1", header(0xc1, 0, 1), "violation 1002"},
		{"3 RSV2", header(0xa1, 0, 1), "violation 1002"},
		{"3 RSV3", header(0x91, 0, 1), "violation 1002"},
		{"3 RSV on a control frame", header(0xc9, 0, 0), "violation 1002"},
		{"3 after a good one", frames(final(text, "a"), header(0xf1, 0, 0)), `message "a", violation 1002`},
		{"4 opcode 3", header(0x83, 0, 0), "violation 1002"},
		{"4 opcode 7", header(0x87, 0, 0), "violation 1002"},
		{"4 opcode 11", header(0x8b, 0, 0), "violation 1002"},
		{"4 opcode 15", header(0x8f, 0, 0), "violation 1002"},
		{"5 ping in fragments", part(ping, "a"), "violation 1002"},
		{"5 close in fragments", part(closing, ""), "violation 1002"},
		{"5 two fragments", frames(part(text, "he"), final(cont, "llo")), `message "hello"`},
		{"5 empty fragments", frames(part(text, ""), part(cont, ""), final(cont, "")), `message ""`},
		{"5 ping between fragments", frames(part(text, "he"), final(ping, "p"), final(cont, "llo")), `ping "p", message "hello"`},
		{"5 close between fragments", frames(part(text, "he"), closingFrame(1000, "")), "close 1000"},
		{"5 continuation of nothing", final(cont, "x"), "violation 1002"},
		{"5 unfinished continuation of nothing", part(cont, "x"), "violation 1002"},
		{"5 continuation after the end", frames(part(text, "a"), final(cont, "b"), final(cont, "c")), `message "ab", violation 1002`},
		{"5 text within a message", frames(part(text, "a"), final(text, "b")), "violation 1002"},
		{"5 128 fragments", frames(part(text, "a"), bytes.Repeat(part(cont, "b"), 126), final(cont, "c")),
			fmt.Sprintf("message %q", "a"+strings.Repeat("b", 126)+"c")},
		{"5 129 fragments", frames(part(text, "a"), bytes.Repeat(part(cont, "b"), 127), final(cont, "c")), "violation 1009"},
		{"5 two fragmented messages", frames(part(text, "a"), final(cont, "b"), part(text, "c"), final(cont, "d")), `message "ab", message "cd"`},
		{"6 UTF-8", final(text, "κόσμε €𐍈"), `message "κόσμε €𐍈"`},
		{"6 cut within a code point", frames(part(text, "\xce"), final(cont, "\xba")), `message "κ"`},
		{"6 four bytes cut in four", frames(part(text, "\xf0"), part(cont, "\x90"), part(cont, "\x8d"), final(cont, "\x88")), `message "𐍈"`},
		{"6 surrogate", final(text, "\xed\xa0\x80"), "violation 1007"},
		{"6 overlong", final(text, "\xc0\xaf"), "violation 1007"},
		{"6 over U+10FFFF", final(text, "\xf4\x90\x80\x80"), "violation 1007"},
		{"6 cut off", final(text, "\xce"), "violation 1007"},
		{"6 cut off in the last fragment", frames(part(text, "a"), final(cont, "\xce")), "violation 1007"},
		{"6 U+FFFF and U+0000", final(text, "\xef\xbf\xbf\x00"), `message "\uffff\x00"`},
		{"7 close", closingFrame(1000, ""), "close 1000"},
		{"7 nothing after close", frames(closingFrame(1000, "bye"), final(text, "x")), "close 1000"},
		{"7 close without a code", final(closing, ""), "close 0"},
		{"7 close of one byte", final(closing, "x"), "violation 1002"},
		{"7 longest reason", closingFrame(1000, strings.Repeat("r", 123)), "close 1000"},
		{"7 reason too long", header(0x88, 126, 126), "violation 1002"},
		{"7 reason not UTF-8", closingFrame(1000, "\xce\xba\xed\xa0\x80"), "violation 1007"},
		{"not masked", ws.MustCompileFrame(ws.NewTextFrame([]byte("x"))), "violation 1002"},
		{"not minimal in 2 bytes", header(0x81, 126, 125), "violation 1002"},
		{"not minimal in 8 bytes", header(0x81, 127, 65535), "violation 1002"},
		{"length with the top bit", header(0x81, 127, 1<<63), "violation 1002"},
		{"length of 2⁶⁴ − 1", header(0x81, 127, 1<<64-1), "violation 1002"},
		{"length of 2⁶³ − 1", header(0x81, 127, 1<<63-1), "violation 1009"},
		{"over the limit", header(0x81, 126, 2001), "violation 1009"},
		{"over the limit by fragments", frames(part(text, k), part(cont, k), final(cont, "x")), "violation 1009"},
		{"at the limit by fragments", frames(part(text, k), final(cont, k)), fmt.Sprintf("message %q", k+k)},
		{"binary where text is spoken", final(binary_, "x"), "violation 1003"},
		{"incomplete", final(text, "hello")[:8], "more"},
		{"incomplete message", part(text, "hello"), "more"},
	} {
		t.Run(tt.name, func(t *testing.T) { everyCut(t, tt.stream, true, 2000, tt.want) })
	}
}

func TestFramesBinary(t *testing.T) {
	everyCut(t, final(ws.OpBinary, "\xff\x00"), false, 100, `message "\xff\x00"`)
	everyCut(t, final(ws.OpText, "x"), false, 100, "violation 1003")
	everyCut(t, frames(part(ws.OpBinary, "\xff"), final(ws.OpContinuation, "\xfe")), false, 100, `message "\xff\xfe"`)
	everyCut(t, header(0x82, 126, protocol.MaxBinaryFrameBytes+1), false, protocol.MaxBinaryFrameBytes, "violation 1009")
}

func TestCloseCodes(t *testing.T) {
	for code := range 1 << 16 {
		want := fmt.Sprintf("close %d", code)
		switch c := code; {
		case c < 1000, c > 4999, c >= 1015 && c < 3000, c == 1004, c == 1005, c == 1006:
			want = "violation 1002"
		}
		if got := transcript([][]byte{closingFrame(uint16(code), "")}, true, 100); got != want {
			t.Fatalf("%d: got %s, want %s", code, got, want)
		}
	}
}

// TestLengthIsCheckedFirst: a header that promises too much is refused when it is there, and nothing is kept for it.
func TestLengthIsCheckedFirst(t *testing.T) {
	var r wsReader
	if ev, _ := r.next(header(0x82, 127, 1<<40), false, 8192, 0); ev.kind != wsViolation || ev.code != protocol.CloseTooBig {
		t.Fatalf("got %+v", ev)
	}
	if r.pending() {
		t.Fatal("something is kept")
	}
}

// TestReaderSince: the deadline of a frame runs from its own first byte, that of a fragmented message from the message's.
func TestReaderSince(t *testing.T) {
	var r wsReader
	feed := func(tick uint32, b []byte) {
		data := bytes.Clone(b)
		for {
			ev, rest := r.next(data, true, 1000, tick)
			if ev.kind == wsMore {
				return
			}
			data = rest
		}
	}
	feed(5, final(ws.OpText, "hello")[:3])
	feed(7, final(ws.OpText, "hello")[3:7])
	if !r.pending() || r.since != 5 {
		t.Fatalf("pending %v since %d, want 5", r.pending(), r.since)
	}
	feed(9, frames(final(ws.OpText, "hello")[7:], part(ws.OpText, "x")))
	if !r.pending() || r.since != 9 {
		t.Fatalf("pending %v since %d, want 9", r.pending(), r.since)
	}
	feed(20, frames(final(ws.OpPing, "p"), final(ws.OpContinuation, "y")[:2]))
	if r.since != 9 {
		t.Fatalf("since %d, want 9: the message is the same", r.since)
	}
	feed(21, final(ws.OpContinuation, "y")[2:])
	if r.pending() {
		t.Fatal("nothing is incomplete")
	}
}

func TestSealData(t *testing.T) {
	for _, n := range []int{0, 1, 125, 126, 127, 65535} {
		payload := bytes.Repeat([]byte{'x'}, n)
		b := append([]byte("before"), 0, 0, 0, 0)
		b = sealData(append(b, payload...), 6, n%2 == 0)
		f, err := readServerFrame(bytes.NewReader(b[6:]))
		if err != nil || !f.Header.Fin || f.Header.Masked || !bytes.Equal(f.Payload, payload) || ws.HeaderSize(f.Header)+n != len(b)-6 {
			t.Fatalf("%d bytes: %+v %v", n, f.Header, err)
		}
		if (f.Header.OpCode == ws.OpText) != (n%2 == 0) {
			t.Fatalf("%d bytes: opcode %x", n, f.Header.OpCode)
		}
	}
	if got := appendClose(nil, 1000, strings.Repeat("x", 200)); len(got) != 127 {
		t.Fatalf("close frame of %d bytes", len(got))
	}
}

func FuzzFrames(f *testing.F) {
	for _, seed := range [][]byte{
		final(ws.OpText, "hello"), final(ws.OpBinary, "\xff"), closingFrame(1000, "bye"), header(0x81, 127, 1<<63),
		frames(part(ws.OpText, "\xce"), final(ws.OpPing, "p"), final(ws.OpContinuation, "\xba")),
	} {
		f.Add(seed, uint16(3), true)
	}
	f.Fuzz(func(t *testing.T, stream []byte, at uint16, text bool) {
		const limit = 300
		whole := transcript([][]byte{stream}, text, limit)
		cut := int(at) % (len(stream) + 1)
		if got := transcript([][]byte{stream[:cut], stream[cut:]}, text, limit); got != whole {
			t.Fatalf("cut at %d: %s\nwhole: %s", cut, got, whole)
		}
		var single [][]byte
		for i := range stream {
			single = append(single, stream[i:i+1])
		}
		if got := transcript(single, text, limit); got != whole {
			t.Fatalf("single bytes: %s\nwhole: %s", got, whole)
		}
		var r wsReader
		for i := range stream {
			data := []byte{stream[i]}
			for {
				ev, rest := r.next(data, text, limit, 0)
				if len(ev.payload) > limit {
					t.Fatalf("payload of %d bytes", len(ev.payload))
				}
				if kept := r.messageBytes(); kept > limit || r.partial != nil && len(r.partial.B) > limit+14 {
					t.Fatal("more is kept than the limit allows")
				}
				if ev.kind == wsMore {
					break
				}
				if ev.kind == wsViolation || ev.kind == wsClose {
					r.release()
					return
				}
				data = rest
			}
		}
		r.release()
	})
}
