package protocol

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestBinaryLayout compares every kind with bytes written by hand from the diagrams of doc.go. Unlike the golden vectors,
// nothing here comes out of AppendBinary.
func TestBinaryLayout(t *testing.T) {
	const id = "0102030405060708090a0b0c0d0e0f10"
	var messageID MessageID
	hex.Decode(messageID[:], []byte(id))
	b := func(s string) []byte { return []byte(s) }
	for _, c := range []struct {
		want string
		Frame
	}{
		{"01 18 | 03 746f6b | 05 70686f6e65 | 0f1e2d3c4b5a6978 | e3e4cca9a231",
			Frame{Kind: KindConnect, Token: b("tok"), Device: b("phone"), Epoch: 0x0f1e2d3c4b5a6978, ReceiptsAfter: 1692841226851}},
		{"02 0e | 01 | e3e4cca9a231 | 03 626f62 | 02 6869",
			Frame{Kind: KindSend, Seq: 1, Timestamp: 1692841226851, Receiver: b("bob"), Content: b("hi")}},
		{"03 22 | 05 | 02 | " + id + " | " + id, Frame{Kind: KindAcknowledge, Timestamp: 5, IDs: []MessageID{messageID, messageID}}},
		{"04 04 | 03 746f6b", Frame{Kind: KindRenewToken, Token: b("tok")}},
		{"41 1a | 05 616c696365 | 01 64 | 0000000000000001 | 818040 | 19 | e3e4cca9a231",
			Frame{Kind: KindConnected, User: b("alice"), Device: b("d"), Epoch: 1, Seq: 1048577, HeartbeatSeconds: 25, Timestamp: 1692841226851}},
		{"42 1f | 01 | " + id + " | 80c0cdcc99a59406 | e3e4cca9a231",
			Frame{Kind: KindReceived, Seq: 1, ID: messageID, Position: 3466938832609280, Timestamp: 1692841226851}},
		{"43 25 | " + id + " | 80c0cdcc99a59406 | 05 616c696365 | 03 626f62 | 02 6869",
			Frame{Kind: KindIncoming, ID: messageID, Position: 3466938832609280, Sender: b("alice"), Receiver: b("bob"), Content: b("hi")}},
		{"44 18 | 01 | " + id + " | 07 | 01 | 09 | 03 626f62",
			Frame{Kind: KindReceipt, Receipts: []Receipt{{messageID, 7, 1, 9, b("bob")}}}},
		{"45 08 | 20 | 0a | 09 | fa01 | 02 6e6f", Frame{Kind: KindError, Code: CodeRateLimited, Seq: 10, ResendFrom: 9, RetryAfterMs: 250, Text: b("no")}},
		{"46 03 | e0d403", Frame{Kind: KindRenew, ExpiresInMs: 60000}},
		{"47 00", Frame{Kind: KindRenewed}},
		{"48 02 | dc0b", Frame{Kind: KindGoAway, RetryAfterMs: 1500}},
	} {
		want := strings.NewReplacer(" ", "", "|", "").Replace(c.want)
		if got := hex.EncodeToString(AppendBinary(nil, &c.Frame)); got != want {
			t.Errorf("%s:\n got %s\nwant %s", kindNames[c.Kind], got, want)
		}
	}
}

// TestJSONText compares every message with the text that the specification shows.
func TestJSONText(t *testing.T) {
	id, err := ParseMessageID([]byte("01J4N3PK2XDSZR14D2PF2DBSQQ"))
	if err != nil {
		t.Fatal(err)
	}
	b := func(s string) []byte { return []byte(s) }
	for _, c := range []struct {
		want string
		Frame
	}{
		{`{"action":"connect","token":"t","device":"phone","epoch":"0f1e2d3c4b5a6978","receipts_after":0}`,
			Frame{Kind: KindConnect, Token: b("t"), Device: b("phone"), Epoch: 0x0f1e2d3c4b5a6978}},
		{`{"action":"connect","token":"t","receipts_after":0}`, Frame{Kind: KindConnect, Token: b("t")}},
		{`{"type":"connected","user_id":"alice","device":"phone","epoch":"0f1e2d3c4b5a6978","next_message_id_by_client":1,"heartbeat_seconds":25,"timestamp":1692841226851}`,
			Frame{Kind: KindConnected, User: b("alice"), Device: b("phone"), Epoch: 0x0f1e2d3c4b5a6978, Seq: 1, HeartbeatSeconds: 25, Timestamp: 1692841226851}},
		{`{"action":"send_message","receiver_id":"bob","content":"hi","message_id_by_client":1,"timestamp":1692841226851}`,
			Frame{Kind: KindSend, Seq: 1, Timestamp: 1692841226851, Receiver: b("bob"), Content: b("hi")}},
		{`{"action":"message_received","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","message_id_by_client":1,"position":3466938832609280,"timestamp":1692841226860}`,
			Frame{Kind: KindReceived, ID: id, Seq: 1, Position: 3466938832609280, Timestamp: 1692841226860}},
		{`{"action":"message_received","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","message_id_by_client":1,"timestamp":1692841226860}`,
			Frame{Kind: KindReceived, ID: id, Seq: 1, Timestamp: 1692841226860}},
		{`{"type":"incoming_message","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":3466938832609280,"sender_id":"alice","receiver_id":"bob","content":"hi","timestamp":1692841226860}`,
			Frame{Kind: KindIncoming, ID: id, Position: 3466938832609280, Sender: b("alice"), Receiver: b("bob"), Content: b("hi")}},
		{`{"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","timestamp":7}`,
			Frame{Kind: KindAcknowledge, IDs: []MessageID{id}, Timestamp: 7}},
		{`{"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","timestamp":7}` + "\n" + `{"type":"message_delivered","message_id":"00000000000000000000000000","timestamp":7}`,
			Frame{Kind: KindAcknowledge, IDs: []MessageID{id, {}}, Timestamp: 7}},
		{`{"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":3466938832609280,"message_id_by_client":1,"receiver_id":"bob","timestamp":9}`,
			Frame{Kind: KindReceipt, Receipts: []Receipt{{id, 3466938832609280, 1, 9, b("bob")}}}},
		{`{"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","receiver_id":"bob","timestamp":9}`,
			Frame{Kind: KindReceipt, Receipts: []Receipt{{id, 0, 0, 9, b("bob")}}}},
		{`{"type":"error","code":"rate_limited","text":"slow \"down\"","message_id_by_client":1,"retry_after_ms":250}`,
			Frame{Kind: KindError, Code: CodeRateLimited, Text: b(`slow "down"`), Seq: 1, RetryAfterMs: 250}},
		{`{"type":"error","code":"rate_limited","text":"","message_id_by_client":5,"resend_from":4,"retry_after_ms":250}`,
			Frame{Kind: KindError, Code: CodeRateLimited, Seq: 5, ResendFrom: 4, RetryAfterMs: 250}},
		{`{"type":"error","code":"not_connected","text":"connect first"}`, Frame{Kind: KindError, Code: CodeNotConnected, Text: b("connect first")}},
		{`{"type":"renew","expires_in_ms":60000}`, Frame{Kind: KindRenew, ExpiresInMs: 60000}},
		{`{"action":"renew","token":"t"}`, Frame{Kind: KindRenewToken, Token: b("t")}},
		{`{"type":"renewed"}`, Frame{Kind: KindRenewed}},
		{`{"type":"go_away","retry_after_ms":1500}`, Frame{Kind: KindGoAway, RetryAfterMs: 1500}},
	} {
		if got := string(AppendJSON(nil, &c.Frame)); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", kindNames[c.Kind], got, c.want)
		}
	}
}

// randomFrame is a frame of a kind with any values that both encodings can carry.
func randomFrame(r *rand.Rand, kind Kind) *Frame {
	number := func(limit uint64) uint64 { return r.Uint64N(limit+1) >> r.UintN(50) }
	millis := func() int64 { return int64(number(MaxTimestampMillis)) }
	name := func(limit int) []byte {
		const alphabet = "abcXYZ019._@-"
		b := make([]byte, 1+r.IntN(limit))
		for i := range b {
			b[i] = alphabet[r.IntN(len(alphabet))]
		}
		return b
	}
	text := func(limit int) (b []byte) {
		for n := r.IntN(limit); n > 0; n-- {
			c := rune(r.Uint32N(utf8.MaxRune+1) >> r.UintN(22))
			if utf8.ValidRune(c) {
				b = utf8.AppendRune(b, c)
			}
		}
		return b
	}
	id := func() (id MessageID) {
		for i := range id {
			id[i] = byte(r.Uint32())
		}
		return id
	}
	f := &Frame{Kind: kind}
	switch kind {
	case KindConnect:
		f.Token, f.Epoch, f.ReceiptsAfter = text(100), r.Uint64()>>r.UintN(65), millis()
		if r.IntN(2) == 0 {
			f.Device = name(MaxDeviceBytes)
		}
	case KindSend:
		f.Seq, f.Timestamp, f.Receiver, f.Content = number(MaxSeq), millis(), text(70), text(1200)
	case KindAcknowledge:
		f.Timestamp = millis()
		for range 1 + r.IntN(MaxIDsPerFrame) {
			f.IDs = append(f.IDs, id())
		}
	case KindRenewToken:
		f.Token = text(2000)
	case KindConnected:
		f.User, f.Device, f.Epoch, f.Seq = name(MaxUserBytes), name(MaxDeviceBytes), r.Uint64(), number(MaxSeq)
		f.HeartbeatSeconds, f.Timestamp = uint32(number(MaxHeartbeatSeconds)), millis()
	case KindReceived:
		f.Seq, f.ID, f.Position, f.Timestamp = number(MaxSeq), id(), number(MaxPosition), millis()
	case KindIncoming:
		f.ID, f.Position, f.Sender, f.Receiver, f.Content = id(), number(MaxPosition), name(MaxUserBytes), name(MaxUserBytes), text(1000)
		f.Timestamp = PositionMillis(f.Position)
	case KindReceipt:
		for range 1 + r.IntN(MaxReceiptsPerFrame) {
			f.Receipts = append(f.Receipts, Receipt{id(), number(MaxPosition), number(MaxSeq), millis(), name(MaxUserBytes)})
		}
	case KindError:
		codes := Codes()
		f.Code, f.Seq, f.ResendFrom, f.RetryAfterMs = codes[r.IntN(len(codes))], number(MaxSeq), number(MaxSeq), uint32(number(MaxRetryAfterMillis))
		f.Text = errorText(text(300))
	case KindRenew:
		f.ExpiresInMs = int64(number(MaxExpiresInMillis))
	case KindGoAway:
		f.RetryAfterMs = uint32(number(MaxRetryAfterMillis))
	}
	return f
}

// TestRoundTrip sends random frames of every kind through binary and through JSON and back, into a Frame that is used
// again and again, and demands what went in.
func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var reused Frame
	var buf []byte
	for _, kind := range allKinds() {
		for range 300 {
			f := randomFrame(r, kind)
			want := resultText(t, []map[string]any{describe(f)})
			buf = AppendBinary(buf[:0], f)
			rest, err := ParseBinary(append(buf, 0xaa), &reused)
			if err != nil || string(rest) != "\xaa" {
				t.Fatalf("%s: %v, %d bytes left", want, err, len(rest))
			}
			if got := resultText(t, []map[string]any{describe(&reused)}); got != want {
				t.Fatalf("binary:\n got %s\nwant %s", got, want)
			}
			if got := roundTripJSON(t, f, &reused); got != want {
				t.Fatalf("JSON:\n got %s\nwant %s", got, want)
			}
		}
	}
}

// roundTripJSON sends f through JSON, a list as several objects, and gathers the list again.
func roundTripJSON(t *testing.T, f, reused *Frame) string {
	parse := jsonParser(f.Kind.FromServer())
	var src []byte
	if f.Kind == KindReceipt {
		for i := range f.Receipts {
			src = append(AppendJSON(src, &Frame{Kind: KindReceipt, Receipts: f.Receipts[i : i+1]}), '\n')
		}
	} else {
		src = AppendJSON(src, f)
	}
	if !utf8.Valid(src) {
		t.Fatalf("not UTF-8: %q", src)
	}
	var whole Frame
	for len(src) > 0 {
		if line, _, _ := bytes.Cut(src, []byte("\n")); !json.Valid(line) {
			t.Fatalf("not JSON: %q", line)
		}
		rest, err := parse(src, reused)
		if err != nil {
			t.Fatalf("%q: %v", src, err)
		}
		ids, receipts := append(whole.IDs, reused.IDs...), append(whole.Receipts, reused.Receipts...)
		whole = *reused
		whole.IDs, whole.Receipts = ids, receipts
		src = rest
	}
	return resultText(t, []map[string]any{describe(&whole)})
}

// TestDamage cuts every vector off at every byte, and puts every byte to other values, and demands that reading ends, stays
// inside its input and never panics. A message cut short is never taken for the whole one.
func TestDamage(t *testing.T) {
	for _, file := range []string{"binary.json", "json.json"} {
		for _, v := range readVectors(t, file) {
			parse := parser(ParseBinary)
			if file == "json.json" {
				parse = jsonParser(v.From == "server")
			}
			whole := v.bytes(t)
			if len(whole) > 256 {
				whole = whole[:256]
			}
			for n := range len(whole) {
				got := readAll(t, whole[:n:n], parse)
				if v.Encode && len(v.bytes(t)) == len(whole) && n > 0 && (len(got) != 1 || got[0]["error"] == nil) {
					t.Errorf("%s: %d of %d bytes read as %v", v.Name, n, len(whole), got)
				}
			}
			damaged := bytes.Clone(whole)
			for i := range damaged {
				for _, c := range []byte{0, 1, 0x7f, 0x80, 0xff, '"', '\\', '{', '\n', whole[i] ^ 1, whole[i] ^ 0x80} {
					damaged[i] = c
					readAll(t, damaged, parse)
				}
				damaged[i] = whole[i]
			}
		}
	}
}

// TestArenaDoesNotMove: what escapes stood for stays as it is until the frame is parsed into again.
func TestArenaDoesNotMove(t *testing.T) {
	var f Frame
	for _, n := range []int{1, 10, 1000} {
		src := `{"action":"send_message","message_id_by_client":1,"receiver_id":"\u0062ob","unknown\u0020key":1,"content":"` + strings.Repeat(`\u20ac`, n) + `"}`
		if _, err := ParseJSON([]byte(src), false, &f); err != nil {
			t.Fatal(err)
		}
		if string(f.Receiver) != "bob" || string(f.Content) != strings.Repeat("€", n) {
			t.Fatalf("%d: receiver %q, content %q", n, f.Receiver, f.Content)
		}
		// A caller that appends to one of them must not write into the other.
		_ = append(f.Receiver, "XXXXXXXX"...)
		if string(f.Content) != strings.Repeat("€", n) {
			t.Fatalf("%d: append to receiver changed the content", n)
		}
	}
}

func TestParseNothing(t *testing.T) {
	f := Frame{Kind: KindSend, Seq: 5}
	if rest, err := ParseBinary(nil, &f); len(rest) != 0 || err != nil || f.Kind != 0 || f.Seq != 0 {
		t.Errorf("binary: %v, %v, %+v", rest, err, f)
	}
	f = Frame{Kind: KindSend, Seq: 5}
	if rest, err := ParseJSON(nil, false, &f); len(rest) != 0 || err != nil || f.Kind != 0 || f.Seq != 0 {
		t.Errorf("JSON: %v, %v, %+v", rest, err, f)
	}
}

// TestErrorKeepsKind: an error frame can name the send that was bad.
func TestErrorKeepsKind(t *testing.T) {
	var f Frame
	ParseBinary(frameBytes(KindSend, uv(9), uv(0), str("bob"), str("\xff")), &f)
	if f.Kind != KindSend || f.Seq != 9 || f.Receiver != nil || f.Content != nil {
		t.Errorf("binary: %+v", f)
	}
	ParseJSON([]byte(`{"content":5,"action":"send_message","receiver_id":"bob","message_id_by_client":9}`), false, &f)
	if f.Kind != KindSend || f.Seq != 9 || f.Receiver != nil || f.Content != nil {
		t.Errorf("JSON: %+v", f)
	}
}

// TestErrorTextIsCut: an error's text never exceeds its limit and is not cut inside a character.
func TestErrorTextIsCut(t *testing.T) {
	for _, text := range []string{strings.Repeat("x", 300), strings.Repeat("€", 100), strings.Repeat("😀", 64) + "y", strings.Repeat("\x80", 300)} {
		cut := errorText([]byte(text))
		if len(cut) > MaxErrorTextBytes || utf8.ValidString(text) && (!utf8.Valid(cut) || len(cut) < MaxErrorTextBytes-3) {
			t.Errorf("%q… became %d bytes", text[:8], len(cut))
		}
	}
}

// TestClockOutOfRange: a client whose clock is wrong writes a frame that a server takes.
func TestClockOutOfRange(t *testing.T) {
	for ms, want := range map[int64]int64{-1: 0, -1 << 63: 0, 1 << 50: MaxTimestampMillis, 5: 5} {
		in := Frame{Kind: KindSend, Seq: 1, Timestamp: ms, Receiver: []byte("bob"), Content: []byte("x")}
		var f Frame
		if _, err := ParseBinary(AppendBinary(nil, &in), &f); err != nil || f.Timestamp != want {
			t.Errorf("binary: %d became %d, %v", ms, f.Timestamp, err)
		}
		if _, err := ParseJSON(AppendJSON(nil, &in), false, &f); err != nil || f.Timestamp != want {
			t.Errorf("JSON: %d became %d, %v", ms, f.Timestamp, err)
		}
	}
}

// TestInvalidUTF8IsReplaced: JSON output is valid whatever goes in.
func TestInvalidUTF8IsReplaced(t *testing.T) {
	for in, want := range map[string]string{"a\xffb": "a\ufffdb", "\xed\xa0\x80": "\ufffd\ufffd\ufffd", "é\xc3": "é\ufffd", "\ufffd": "\ufffd"} {
		src := AppendJSON(nil, &Frame{Kind: KindSend, Seq: 1, Receiver: []byte("bob"), Content: []byte(in)})
		var f Frame
		if _, err := ParseJSON(src, false, &f); err != nil || string(f.Content) != want || !json.Valid(src) || !utf8.Valid(src) {
			t.Errorf("%q became %q, %v", in, f.Content, err)
		}
	}
}

func TestAppendMessage(t *testing.T) {
	f := Frame{Kind: KindIncoming, ID: testID, Position: testPosition, Sender: []byte("alice"), Receiver: []byte("bob"), Content: []byte("h\"i")}
	m := Message{ID: testID, Position: testPosition, Sender: "alice", Receiver: "bob", Content: []byte("h\"i")}
	if got, want := AppendBinaryMessage(nil, &m), AppendBinary(nil, &f); !bytes.Equal(got, want) {
		t.Errorf("binary: %x, want %x", got, want)
	}
	if got, want := AppendJSONMessage(nil, &m), AppendJSON(nil, &f); !bytes.Equal(got, want) {
		t.Errorf("JSON: %s, want %s", got, want)
	}
}

func TestAppendPanics(t *testing.T) {
	for name, f := range map[string]*Frame{
		"no kind":         {},
		"unknown kind":    {Kind: 0x3f},
		"no id":           {Kind: KindAcknowledge},
		"too many ids":    {Kind: KindAcknowledge, IDs: make([]MessageID, MaxIDsPerFrame+1)},
		"no receipt":      {Kind: KindReceipt},
		"too many of all": {Kind: KindReceipt, Receipts: make([]Receipt, MaxReceiptsPerFrame+1)},
	} {
		for encoding, write := range map[string]func([]byte, *Frame) []byte{"binary": AppendBinary, "JSON": AppendJSON} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s, %s: no panic", encoding, name)
					}
				}()
				write(nil, f)
			}()
		}
	}
}

// TestAllocations: nothing is allocated per frame in the steady state, in either encoding and direction, good or bad.
func TestAllocations(t *testing.T) {
	var f Frame
	dst := make([]byte, 0, MaxServerFrameBytes)
	demandNone := func(name string, run func()) {
		t.Helper()
		run() // lists and arena grow once
		if n := testing.AllocsPerRun(100, run); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	for _, v := range validFrames() {
		src := AppendBinary(nil, &v.Frame)
		demandNone("append binary, "+v.name, func() { dst = AppendBinary(dst[:0], &v.Frame) })
		demandNone("parse binary, "+v.name, func() { ParseBinary(src, &f) })
		if hasList(&v.Frame) {
			continue
		}
		text, fromServer := AppendJSON(nil, &v.Frame), v.Kind.FromServer()
		demandNone("append JSON, "+v.name, func() { dst = AppendJSON(dst[:0], &v.Frame) })
		demandNone("parse JSON, "+v.name, func() { ParseJSON(text, fromServer, &f) })
		if v.Kind == KindSend {
			ParseBinary(src, &f)
			demandNone("check, "+v.name, func() { CheckSend(&f) })
		}
	}
	for _, file := range []string{"binary.json", "json.json"} {
		for _, v := range readVectors(t, file) {
			src, fromServer := v.bytes(t), v.From == "server"
			demandNone("read, "+v.Name, func() {
				for b := src; len(b) > 0; {
					if file == "binary.json" {
						b, _ = ParseBinary(b, &f)
					} else {
						b, _ = ParseJSON(b, fromServer, &f)
					}
				}
			})
		}
	}
	m := Message{ID: testID, Position: testPosition, Sender: "alice", Receiver: "bob", Content: []byte(strings.Repeat("é", 500))}
	demandNone("append binary message", func() { dst = AppendBinaryMessage(dst[:0], &m) })
	demandNone("append JSON message", func() { dst = AppendJSONMessage(dst[:0], &m) })
}

func TestFrameErrorText(t *testing.T) {
	_, err := ParseJSON([]byte("{"), false, &Frame{})
	if err.Error() != "bad_request: not a JSON object" || err.Close != 0 {
		t.Errorf("%v, close %d", err, err.Close)
	}
}

func TestReset(t *testing.T) {
	f := Frame{Kind: KindSend, Token: []byte("t"), IDs: make([]MessageID, 3), Receipts: make([]Receipt, 4), Arena: make([]byte, 5), Seq: 9}
	f.Reset()
	if cap(f.IDs) != 3 || cap(f.Receipts) != 4 || cap(f.Arena) != 5 || len(f.IDs)+len(f.Receipts)+len(f.Arena) != 0 {
		t.Errorf("lists: %d, %d, %d", cap(f.IDs), cap(f.Receipts), cap(f.Arena))
	}
	f.IDs, f.Receipts, f.Arena = nil, nil, nil
	if !reflect.DeepEqual(f, Frame{}) {
		t.Errorf("left: %+v", f)
	}
}

func TestCodes(t *testing.T) {
	list := Codes()
	if len(list) != len(codeNames) {
		t.Errorf("Codes lists %d of %d", len(list), len(codeNames))
	}
	for _, c := range list {
		if got, ok := CodeByName([]byte(c.String())); !ok || got != c {
			t.Errorf("CodeByName(%s) = %d, %v", c, got, ok)
		}
	}
	if _, ok := CodeByName([]byte("too_early")); ok || CodeUnknown.String() != "unknown" || Code(999).String() != "unknown" {
		t.Error("an unknown code is known")
	}
	if n := testing.AllocsPerRun(10, func() { CodeByName([]byte("rate_limited")); _ = CodeSlow.String() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestReconnect(t *testing.T) {
	for c := CloseCode(4000); c < 5000; c++ {
		if c.Reconnect() != (c < 4500) {
			t.Errorf("%d: %v", c, c.Reconnect())
		}
	}
	for c, want := range map[CloseCode]bool{1000: true, 1001: true, 1002: false, 1003: false, 1005: true, 1006: true, 1007: false, 1009: false, 1011: true, 1012: true} {
		if c.Reconnect() != want {
			t.Errorf("%d: %v", c, c.Reconnect())
		}
	}
}

func TestConversationHash(t *testing.T) {
	if ConversationHash("alice", "bob") != ConversationHash([]byte("bob"), "alice") {
		t.Error("the order of the users matters")
	}
	seen := map[uint64]string{}
	for _, pair := range [][2]string{{"a", "bc"}, {"ab", "c"}, {"a", "b"}, {"a", "a"}, {"aa", "b"}, {"b", "b"}, {"alice", "alice"}} {
		h := ConversationHash(pair[0], pair[1])
		if old, ok := seen[h]; ok {
			t.Errorf("%v and %s have the same hash", pair, old)
		}
		seen[h] = pair[0] + " " + pair[1]
	}
	// FNV-1a of "alice\x00bob": the partition of a conversation must not change between versions.
	if got := ConversationHash("bob", "alice"); got != fnv1a("alice\x00bob") {
		t.Errorf("hash is %#x", got)
	}
}

func fnv1a(s string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for _, c := range []byte(s) {
		h = (h ^ uint64(c)) * 0x100000001b3
	}
	return h
}
