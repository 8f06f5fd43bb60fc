package protocol

import (
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
)

var aboutBinary = []string{
	"Golden vectors of the subprotocol millrace.v1 (binary); doc.go specifies it. Each is one WebSocket message.",
	"hex is the message; from says who sends it; results are the frames that a reader gets out of it and the errors it meets, in order.",
	"A frame has kind and every field of that kind under its JSON name, zero when absent; message_ids and receipts are lists.",
	"An error has the code of the error frame that a server answers and, where the reader knows it, message_id_by_client.",
	"encode: writing the one frame of results gives exactly hex. Frames that are skipped leave no trace in results.",
	"What a server refuses later, by rules about a user's input, is not here but in values.json, sends.",
}

// Test data shared by the tables.
const (
	testMillis   = 1692841226851
	testPosition = 3466938832609280 // 1692841226860 << 11
	testToken    = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2ln"
)

var (
	testID    = MessageID{0x01, 0x91, 0x2a, 0x3b, 0x4c, 0x5d, 0x6e, 0x7f, 0x80, 0x91, 0xa2, 0xb3, 0xc4, 0xd5, 0xe6, 0xf7}
	testOther = MessageID{0xff, 0xfe, 0xfd, 0xfc, 0xfb, 0xfa, 0xf9, 0xf8, 0xf7, 0xf6, 0xf5, 0xf4, 0xf3, 0xf2, 0xf1, 0xf0}
	maxID     = MessageID{255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255}
)

// validFrames are frames of every kind that both encodings can write.
func validFrames() []struct {
	name string
	Frame
} {
	b := func(s string) []byte { return []byte(s) }
	many := func(n int) (ids []MessageID) {
		for i := range n {
			ids = append(ids, MessageID{byte(i >> 8), byte(i), 0xaa})
		}
		return ids
	}
	return []struct {
		name string
		Frame
	}{
		{"connect, token only", Frame{Kind: KindConnect, Token: b(testToken)}},
		{"connect, every field", Frame{Kind: KindConnect, Token: b(testToken), Device: b("phone"), Epoch: 0x0f1e2d3c4b5a6978, ReceiptsAfter: testMillis}},
		{"connect, longest device and largest numbers", Frame{Kind: KindConnect, Token: b("t"), Device: b(strings.Repeat("d", 32)), Epoch: 1<<64 - 1, ReceiptsAfter: MaxTimestampMillis}},
		{"connect, without a token", Frame{Kind: KindConnect}},
		{"send, first of a new stream", Frame{Kind: KindSend, Seq: 1, Timestamp: testMillis, Receiver: b("bob"), Content: b("hi")}},
		{"send, block 1", Frame{Kind: KindSend, Seq: FirstSeq(1), Timestamp: testMillis, Receiver: b("bob"), Content: b("hi")}},
		{"send, largest number", Frame{Kind: KindSend, Seq: MaxSeq, Timestamp: MaxTimestampMillis, Receiver: b("bob"), Content: b("hi")}},
		{"send, no timestamp", Frame{Kind: KindSend, Seq: 2, Receiver: b("a.b_c@d-e"), Content: b("x")}},
		{"send, NUL, bidi and line separators in the content", Frame{Kind: KindSend, Seq: 3, Timestamp: testMillis, Receiver: b("bob"), Content: b("a\x00b\u202ec\u2028d\r\n\t\"\\/\x7f")}},
		{"send, every control character", Frame{Kind: KindSend, Seq: 4, Receiver: b("bob"), Content: b("\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f")}},
		{"send, all lengths of UTF-8", Frame{Kind: KindSend, Seq: 5, Receiver: b("bob"), Content: b("aé€😀\U0010ffff\ufffd\ufffe")}},
		{"send, body of 127 bytes", Frame{Kind: KindSend, Seq: 6, Receiver: b("bob"), Content: b(strings.Repeat("x", 120))}},
		{"send, body of 128 bytes", Frame{Kind: KindSend, Seq: 6, Receiver: b("bob"), Content: b(strings.Repeat("x", 121))}},
		{"send, 1000 code points of 4 bytes", Frame{Kind: KindSend, Seq: 7, Receiver: b("bob"), Content: b(strings.Repeat("😀", 1000))}},
		{"send, longest receiver", Frame{Kind: KindSend, Seq: 8, Receiver: b(strings.Repeat("r", 64)), Content: b("x")}},
		{"acknowledge, one id", Frame{Kind: KindAcknowledge, Timestamp: testMillis, IDs: []MessageID{testID}}},
		{"renew_token", Frame{Kind: KindRenewToken, Token: b(testToken)}},
		{"connected, new stream", Frame{Kind: KindConnected, User: b("alice"), Device: b("phone"), Epoch: 0x0f1e2d3c4b5a6978, Seq: 1, HeartbeatSeconds: 25, Timestamp: testMillis}},
		{"connected, block 3", Frame{Kind: KindConnected, User: b("alice"), Device: b("default"), Epoch: 1, Seq: FirstSeq(3), HeartbeatSeconds: 25, Timestamp: testMillis}},
		{"received, position known", Frame{Kind: KindReceived, Seq: 1, ID: testID, Position: testPosition, Timestamp: testMillis}},
		{"received, resend", Frame{Kind: KindReceived, Seq: 1, ID: testID, Timestamp: testMillis}},
		{"incoming", Frame{Kind: KindIncoming, ID: testID, Position: testPosition, Timestamp: PositionMillis(testPosition), Sender: b("alice"), Receiver: b("bob"), Content: b("hi")}},
		{"incoming, largest position", Frame{Kind: KindIncoming, ID: maxID, Position: MaxPosition, Timestamp: MaxTimestampMillis, Sender: b("alice"), Receiver: b("alice"), Content: b("héllo")}},
		{"incoming, smallest", Frame{Kind: KindIncoming, Sender: b("a"), Receiver: b("b"), Content: b("c")}},
		{"receipt, of this stream", Frame{Kind: KindReceipt, Receipts: []Receipt{{testID, testPosition, 1, testMillis, b("bob")}}}},
		{"receipt, of another stream", Frame{Kind: KindReceipt, Receipts: []Receipt{{testID, testPosition, 0, testMillis, b("bob")}}}},
		{"error, about nothing", Frame{Kind: KindError, Code: CodeNotConnected, Text: b("connect first")}},
		{"error, final refusal of a send", Frame{Kind: KindError, Code: CodeContentTooLong, Seq: 9, Text: b("over 1000 characters")}},
		{"error, retryable refusal of a send", Frame{Kind: KindError, Code: CodeRateLimited, Seq: 10, ResendFrom: 9, RetryAfterMs: 250, Text: b("too fast")}},
		{"error, without a text", Frame{Kind: KindError, Code: CodeInternal, RetryAfterMs: 1000}},
		{"renew", Frame{Kind: KindRenew, ExpiresInMs: 60000}},
		{"renewed", Frame{Kind: KindRenewed}},
		{"go_away", Frame{Kind: KindGoAway, RetryAfterMs: 1500}},
		{"go_away, at once", Frame{Kind: KindGoAway}},
		// Lists: binary only.
		{"acknowledge, three ids", Frame{Kind: KindAcknowledge, Timestamp: testMillis, IDs: []MessageID{testID, testOther, maxID}}},
		{"acknowledge, 400 ids", Frame{Kind: KindAcknowledge, Timestamp: testMillis, IDs: many(MaxIDsPerFrame)}},
		{"receipt, two", Frame{Kind: KindReceipt, Receipts: []Receipt{{testID, testPosition, 1, testMillis, b("bob")}, {testOther, testPosition + 1, 0, testMillis, b("carol")}}}},
	}
}

func hasList(f *Frame) bool { return len(f.IDs) > 1 || len(f.Receipts) > 1 }

func from(k Kind) string {
	if k.FromServer() {
		return "server"
	}
	return "client"
}

// frameBytes is a frame of any kind with any body.
func frameBytes(kind Kind, body ...[]byte) []byte {
	var all []byte
	for _, b := range body {
		all = append(all, b...)
	}
	b := binary.AppendUvarint([]byte{byte(kind)}, uint64(len(all)))
	return append(b, all...)
}

func uv(n uint64) []byte  { return binary.AppendUvarint(nil, n) }
func str(s string) []byte { return append(uv(uint64(len(s))), s...) }
func join(list ...[]byte) (all []byte) {
	for _, b := range list {
		all = append(all, b...)
	}
	return all
}

// binaryVectors is the table of testdata/binary.json.
func binaryVectors() (list []vector) {
	add := func(name, from string, b []byte, encode bool, results ...message) {
		list = append(list, vector{Name: name, From: from, Hex: hex.EncodeToString(b), Encode: encode, Results: describeAll(results)})
	}
	for _, v := range validFrames() {
		add(v.name, from(v.Kind), AppendBinary(nil, &v.Frame), true, good(v.Frame))
	}

	hi := Frame{Kind: KindSend, Seq: 1, Timestamp: testMillis, Receiver: []byte("bob"), Content: []byte("hi")}
	ack := Frame{Kind: KindAcknowledge, Timestamp: 5, IDs: []MessageID{testID}}
	renewed := Frame{Kind: KindRenewed}
	hiBytes, ackBytes := AppendBinary(nil, &hi), AppendBinary(nil, &ack)

	// Several frames, skipping, what a later version may add.
	add("two frames", "client", join(hiBytes, ackBytes), false, good(hi), good(ack))
	add("an ignorable kind alone", "client", []byte{0x81, 2, 0xff, 0xff}, false)
	add("ignorable kinds between frames", "client", join([]byte{0xbf, 0}, hiBytes, []byte{0x80, 1, 0}, ackBytes, []byte{0xff, 0}), false, good(hi), good(ack))
	add("an unknown kind between frames", "client", join(hiBytes, []byte{0x3f, 2, 1, 2}, ackBytes), false, good(hi), bad(CodeUnknownAction), good(ack))
	add("kind 0", "client", []byte{0, 0}, false, bad(CodeUnknownAction))
	add("an unknown kind from the server", "server", []byte{0x7f, 0}, false, bad(CodeUnknownAction))
	add("bytes after the fields of a send", "client", frameBytes(KindSend, uv(1), uv(testMillis), str("bob"), str("hi"), []byte("later")), false, good(hi))
	add("bytes after the fields of renewed", "server", frameBytes(KindRenewed, []byte{1, 2, 3}), false, good(renewed))
	add("error with the code of a later version", "server", frameBytes(KindError, uv(999), uv(0), uv(0), uv(250), str("new")), true,
		good(Frame{Kind: KindError, Code: 999, RetryAfterMs: 250, Text: []byte("new")}))

	// Framing: what follows cannot be found any more.
	add("kind without a length", "client", []byte{0x02}, false, bad(CodeBadRequest))
	add("length over the end", "client", []byte{0x02, 5, 1, 2, 3, 4}, false, bad(CodeBadRequest))
	add("length over the end after a good frame", "client", join(hiBytes, []byte{0x02, 0x7f, 1}), false, good(hi), bad(CodeBadRequest))
	add("length cut off", "client", []byte{0x02, 0x80}, false, bad(CodeBadRequest))
	add("length not minimal", "client", []byte{0x04, 0x81, 0x00, 0x00}, false, bad(CodeBadRequest))
	add("length of 2^64-1", "client", []byte{0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0}, false, bad(CodeBadRequest))
	add("length of 2^63", "client", []byte{0x02, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01, 0}, false, bad(CodeBadRequest))
	add("length over 64 bits", "client", []byte{0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0}, false, bad(CodeBadRequest))
	add("length of 11 bytes", "client", []byte{0x02, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01, 0}, false, bad(CodeBadRequest))
	add("an ignorable kind with a length over the end", "client", []byte{0x81, 9, 0}, false, bad(CodeBadRequest))

	// Bodies: the frame is bad, the next one is read.
	broken := func(name, from string, b []byte, m message) {
		add(name, from, join(b, ackBytes), false, m, good(ack))
	}
	broken("send, empty body", "client", frameBytes(KindSend), bad(CodeBadRequest))
	broken("send, number only", "client", frameBytes(KindSend, uv(77)), badSend(CodeBadRequest, 77))
	broken("send, number not minimal", "client", frameBytes(KindSend, []byte{0x81, 0x00}, uv(0), str("bob"), str("hi")), bad(CodeBadRequest))
	broken("send, number cut off", "client", frameBytes(KindSend, []byte{0x81}), bad(CodeBadRequest))
	broken("send, number over 48 bits", "client", frameBytes(KindSend, uv(MaxSeq+1), uv(0), str("bob"), str("hi")), bad(CodeBadRequest))
	broken("send, number over 64 bits", "client", frameBytes(KindSend, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, uv(0), str("bob"), str("hi")), bad(CodeBadRequest))
	broken("send, timestamp over 42 bits", "client", frameBytes(KindSend, uv(1), uv(MaxTimestampMillis+1), str("bob"), str("hi")), badSend(CodeBadRequest, 1))
	broken("send, receiver runs past the end", "client", frameBytes(KindSend, uv(1), uv(0), []byte{9}, []byte("bob")), badSend(CodeBadRequest, 1))
	broken("send, receiver of 2^64-1 bytes", "client", frameBytes(KindSend, uv(1), uv(0), uv(1<<64-1), []byte("bob")), badSend(CodeBadRequest, 1))
	broken("send, no content field", "client", frameBytes(KindSend, uv(1), uv(0), str("bob")), badSend(CodeBadRequest, 1))
	broken("send, content runs past the end", "client", frameBytes(KindSend, uv(1), uv(0), str("bob"), []byte{3}, []byte("hi")), badSend(CodeBadRequest, 1))
	for _, c := range []struct{ name, content string }{
		{"a lone continuation byte", "a\x80b"}, {"an overlong form", "\xc0\x80"}, {"a surrogate", "\xed\xa0\x80"},
		{"a code point over U+10FFFF", "\xf4\x90\x80\x80"}, {"a character cut off", "\xe2\x82"}, {"byte FF", "\xff"},
	} {
		broken("send, "+c.name+" in the content", "client", frameBytes(KindSend, uv(1), uv(0), str("bob"), str(c.content)), badSend(CodeBadRequest, 1))
	}
	broken("connect, empty body", "client", frameBytes(KindConnect), bad(CodeBadRequest))
	broken("connect, device over 32 bytes", "client", frameBytes(KindConnect, str("t"), str(strings.Repeat("d", 33)), make([]byte, 8), uv(0)), bad(CodeBadRequest))
	broken("connect, device with a space", "client", frameBytes(KindConnect, str("t"), str("my phone"), make([]byte, 8), uv(0)), bad(CodeBadRequest))
	broken("connect, epoch of 7 bytes", "client", frameBytes(KindConnect, str("t"), str("d"), make([]byte, 7)), bad(CodeBadRequest))
	broken("connect, receipts_after over 42 bits", "client", frameBytes(KindConnect, str("t"), str("d"), make([]byte, 8), uv(MaxTimestampMillis+1)), bad(CodeBadRequest))
	broken("acknowledge, no id", "client", frameBytes(KindAcknowledge, uv(0), uv(0)), bad(CodeBadRequest))
	broken("acknowledge, half an id", "client", frameBytes(KindAcknowledge, uv(0), uv(1), make([]byte, 8)), bad(CodeBadRequest))
	broken("acknowledge, fewer ids than counted", "client", frameBytes(KindAcknowledge, uv(0), uv(2), testID[:]), bad(CodeBadRequest))
	broken("acknowledge, 401 ids", "client", frameBytes(KindAcknowledge, uv(0), uv(401), make([]byte, 401*16)), bad(CodeBadRequest))
	broken("acknowledge, 2^60 ids", "client", frameBytes(KindAcknowledge, uv(0), uv(1<<60)), bad(CodeBadRequest))
	broken("renew_token, token runs past the end", "client", frameBytes(KindRenewToken, []byte{5}, []byte("abc")), bad(CodeBadRequest))

	fromServer := func(name string, b []byte) {
		add(name, "server", join(b, []byte{0x47, 0}), false, bad(CodeBadRequest), good(renewed))
	}
	fromServer("connected, empty user", frameBytes(KindConnected, str(""), str("d"), make([]byte, 8), uv(1), uv(25), uv(0)))
	fromServer("connected, heartbeat over its limit", frameBytes(KindConnected, str("u"), str("d"), make([]byte, 8), uv(1), uv(MaxHeartbeatSeconds+1), uv(0)))
	fromServer("received, id cut off", frameBytes(KindReceived, uv(1), make([]byte, 15)))
	fromServer("received, position over 53 bits", frameBytes(KindReceived, uv(1), testID[:], uv(MaxPosition+1), uv(0)))
	fromServer("incoming, sender with a slash", frameBytes(KindIncoming, testID[:], uv(1), str("a/b"), str("bob"), str("hi")))
	fromServer("incoming, content is not UTF-8", frameBytes(KindIncoming, testID[:], uv(1), str("a"), str("bob"), str("\xff")))
	fromServer("receipt, none", frameBytes(KindReceipt, uv(0)))
	fromServer("receipt, 65", frameBytes(KindReceipt, uv(65), make([]byte, 65*21)))
	fromServer("receipt, second cut off", frameBytes(KindReceipt, uv(2), testID[:], uv(1), uv(1), uv(1), str("bob"), testID[:]))
	fromServer("error, code over 16 bits", frameBytes(KindError, uv(1<<16), uv(0), uv(0), uv(0), str("")))
	fromServer("error, text is not UTF-8", frameBytes(KindError, uv(1), uv(0), uv(0), uv(0), str("\xc3")))
	fromServer("go_away, delay over its limit", frameBytes(KindGoAway, uv(MaxRetryAfterMillis+1)))
	fromServer("renew, empty body", frameBytes(KindRenew))
	return list
}

func TestBinaryVectors(t *testing.T) {
	checkGolden(t, "binary.json", vectorFile{aboutBinary, binaryVectors()})
	runVectors(t, "binary.json", func(bool) parser { return ParseBinary }, AppendBinary)
}
