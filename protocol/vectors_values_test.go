package protocol

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// valuesFile is the form of testdata/values.json.
type valuesFile struct {
	About      []string         `json:"about"`
	MessageIDs []idVector       `json:"message_ids"`
	BadIDs     []string         `json:"bad_message_ids"`
	Integers   []integerVector  `json:"uvarints"`
	BadInts    []string         `json:"bad_uvarints_hex"`
	Seqs       []seqVector      `json:"message_id_by_client"`
	Blocks     []blockVector    `json:"blocks"`
	Positions  []positionVector `json:"positions"`
	Next       []nextVector     `json:"next_positions"`
	Users      []nameVector     `json:"user_ids"`
	Devices    []nameVector     `json:"device_ids"`
	Sends      []sendVector     `json:"sends"`
	Codes      []codeVector     `json:"codes"`
	Closes     []closeVector    `json:"close_codes"`
}

type (
	idVector struct {
		Hex  string `json:"hex"`
		Text string `json:"text"`
		// Written says that Hex is written as Text; else Text is only read.
		Written bool `json:"written"`
	}
	integerVector struct {
		Value string `json:"value"` // decimal: some exceed 2^53
		Hex   string `json:"hex"`
	}
	seqVector struct {
		Value uint64 `json:"value"`
		Block uint32 `json:"block"`
		Send  uint32 `json:"send"`
		Valid bool   `json:"valid"`
	}
	blockVector struct {
		Block uint32 `json:"block"`
		First uint64 `json:"first"`
	}
	positionVector struct {
		Position uint64 `json:"position"`
		Millis   int64  `json:"timestamp"`
	}
	nextVector struct {
		Last     uint64 `json:"last"`
		Accepted int64  `json:"accepted_ms"`
		Next     uint64 `json:"next"`
	}
	nameVector struct {
		Name  string `json:"name"`
		Valid bool   `json:"valid"`
	}
	sendVector struct {
		Name     string `json:"name"`
		Seq      uint64 `json:"message_id_by_client"`
		Receiver string `json:"receiver_id"`
		// The content is Unit, Count times.
		Unit  string `json:"unit"`
		Count int    `json:"count"`
		Code  string `json:"code"`
	}
	codeVector struct {
		Number uint16 `json:"number"`
		Name   string `json:"name"`
	}
	closeVector struct {
		Number    uint16 `json:"number"`
		Reconnect bool   `json:"reconnect"`
	}
)

var closeCodes = []CloseCode{
	CloseNormal, CloseGoingAway, CloseProtocolError, CloseUnsupported, CloseInvalidUTF8, CloseTooBig, CloseInternal, CloseRestart, CloseTryAgain,
	CloseTokenExpired, CloseTimeout, CloseSlow, CloseFlooding, CloseBlockUsed,
	CloseSessionReplaced, CloseUnauthorized, CloseNotConnected, CloseTooManyDevices,
}

// values is the table of testdata/values.json. Everything that is not an input is written out, not computed.
func values() valuesFile {
	names := func(limit int) []nameVector {
		list := []nameVector{
			{"a", true}, {"Z9", true}, {"alice", true}, {"a.b_c@d-e", true}, {"-", true}, {".", true}, {"..", true},
			{strings.Repeat("x", limit), true}, {strings.Repeat("x", limit+1), false}, {"", false},
		}
		for _, c := range []string{" ", "/", ":", "+", "\x00", "\n", "é", "a b", " a", "a ", "a\x7f", "`", "[", "{", "ａ"} {
			list = append(list, nameVector{c, false})
		}
		return list
	}
	v := valuesFile{
		About: []string{
			"Golden vectors of the values inside frames; doc.go specifies them.",
			"message_ids: 16 bytes and their text; written: this text is what is written, else it is only read. bad_message_ids are refused.",
			"uvarints: decimal values and their only encoding; bad_uvarints_hex are refused, by themselves or as the end of a body.",
			"message_id_by_client: a number, its block and send part, and whether a send may carry it. blocks: a block's first number.",
			"positions: the timestamp that a position carries. next_positions: the position after last for a record accepted at accepted_ms.",
			"sends: content is unit repeated count times; code is the refusal, ok when there is none.",
		},
		MessageIDs: []idVector{
			{"00000000000000000000000000000000", "00000000000000000000000000", true},
			{"ffffffffffffffffffffffffffffffff", "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", true},
			{"00000000000000000000000000000001", "00000000000000000000000001", true},
			{"00000000000000000000000000000020", "00000000000000000000000010", true},
			{"80000000000000000000000000000000", "40000000000000000000000000", true},
			{"20000000000000000000000000000000", "10000000000000000000000000", true},
			{"01563e3ab5d3d6764c61efb99302bd5b", "01ARZ3NDEKTSV4RRFFQ69G5FAV", true},
			{"ffffffffffffffffffffffffffffffff", "7zzzzzzzzzzzzzzzzzzzzzzzzz", false},
			{"ffffffffffffffffffffffffffffffff", "7zZzZzZzZzZzZzZzZzZzZzZzZz", false},
		},
		BadIDs: []string{
			"", "0", "0000000000000000000000000", "000000000000000000000000000", "80000000000000000000000000", "ZZZZZZZZZZZZZZZZZZZZZZZZZZ",
			"0000000000000000000000000I", "0000000000000000000000000L", "0000000000000000000000000O", "0000000000000000000000000U",
			"0000000000000000000000000i", "0000000000000000000000000-", "0000000000000000000000000 ", " 0000000000000000000000000", "000000000000000000000000é",
		},
		Integers: []integerVector{
			{"0", "00"}, {"1", "01"}, {"127", "7f"}, {"128", "8001"}, {"129", "8101"}, {"300", "ac02"}, {"16383", "ff7f"}, {"16384", "808001"},
			{"1048577", "818040"}, {"1692841226851", "e3e4cca9a231"}, {"4398046511103", "ffffffffff7f"},
			{"281474976710655", "ffffffffffff3f"}, {"3466938832609280", "80c0cdcc99a59406"}, {"9007199254740991", "ffffffffffffff0f"},
			{"9223372036854775808", "80808080808080808001"}, {"18446744073709551615", "ffffffffffffffffff01"},
		},
		BadInts: []string{
			"", "80", "ff", "8000", "8100", "808000", "ffffffffffffffffff", "ffffffffffffffffff02", "ffffffffffffffffff7f",
			"8080808080808080808001", "80808080808080808000", "ffffffffffffffffffff01",
		},
		Seqs: []seqVector{
			{0, 0, 0, false}, {1, 0, 1, true}, {2, 0, 2, true}, {64, 0, 64, true}, {1048575, 0, 1048575, true},
			{1048576, 1, 0, false}, {1048577, 1, 1, true}, {3145729, 3, 1, true},
			{281474976710655, 268435455, 1048575, true}, {281474975662080, 268435455, 0, false}, {281474975662081, 268435455, 1, true},
		},
		Blocks: []blockVector{{0, 1}, {1, 1048577}, {2, 2097153}, {3, 3145729}, {268435455, 281474975662081}},
		Positions: []positionVector{
			{0, 0}, {1, 0}, {2047, 0}, {2048, 1}, {3466938832609280, 1692841226860}, {3466938832611327, 1692841226860},
			{3466938832611328, 1692841226861}, {9007199254740991, 4398046511103},
		},
		Next: []nextVector{
			{0, 1692841226860, 3466938832609280}, {3466938832609280, 1692841226860, 3466938832609281},
			{3466938832609280, 1692841226859, 3466938832609281}, {3466938832609280, 1692841226861, 3466938832611328},
			{3466938832611327, 1692841226861, 3466938832611328}, {5, 0, 6}, {0, 0, 1},
		},
		Users:   names(MaxUserBytes),
		Devices: names(MaxDeviceBytes),
		Sends: []sendVector{
			{"one character", 1, "bob", "a", 1, "ok"},
			{"white space is content", 1, "bob", " ", 1, "ok"},
			{"NUL is content", 1, "bob", "\x00", 1, "ok"},
			{"1000 of one byte", 1, "bob", "a", 1000, "ok"},
			{"1001 of one byte", 1, "bob", "a", 1001, "content_too_long"},
			{"1000 of two bytes", 1, "bob", "é", 1000, "ok"},
			{"1001 of two bytes", 1, "bob", "é", 1001, "content_too_long"},
			{"1000 of three bytes", 1, "bob", "€", 1000, "ok"},
			{"1001 of three bytes", 1, "bob", "€", 1001, "content_too_long"},
			{"1000 of four bytes, 4000 in all", 1, "bob", "😀", 1000, "ok"},
			{"1001 of four bytes", 1, "bob", "😀", 1001, "content_too_long"},
			{"code points are counted, not graphemes: 200 families of 5", 1, "bob", "👩‍👩‍👧", 200, "ok"},
			{"code points are counted, not graphemes: 201 families of 5", 1, "bob", "👩‍👩‍👧", 201, "content_too_long"},
			{"code points are counted, not UTF-16 units: 1000 pairs", 1, "bob", "😀", 1000, "ok"},
			{"4001 bytes of one each", 1, "bob", "a", 4001, "content_too_long"},
			{"empty", 1, "bob", "", 0, "empty_content"},
			{"number 0", 0, "bob", "a", 1, "bad_request"},
			{"send part 0", 1048576, "bob", "a", 1, "bad_request"},
			{"largest number", 281474976710655, "bob", "a", 1, "ok"},
			{"no receiver", 1, "", "a", 1, "bad_receiver"},
			{"receiver with a space", 1, "bob smith", "a", 1, "bad_receiver"},
			{"receiver not ASCII", 1, "bób", "a", 1, "bad_receiver"},
			{"longest receiver", 1, strings.Repeat("r", 64), "a", 1, "ok"},
			{"receiver too long", 1, strings.Repeat("r", 65), "a", 1, "bad_receiver"},
			{"number before receiver", 0, "", "", 0, "bad_request"},
			{"receiver before empty content", 1, "", "", 0, "bad_receiver"},
			{"receiver before long content", 1, "", "a", 4001, "bad_receiver"},
		},
	}
	for _, c := range Codes() {
		v.Codes = append(v.Codes, codeVector{uint16(c), c.String()})
	}
	for _, c := range closeCodes {
		v.Closes = append(v.Closes, closeVector{uint16(c), c.Reconnect()})
	}
	return v
}

func TestValueVectors(t *testing.T) {
	checkGolden(t, "values.json", values())
	b, err := os.ReadFile("testdata/values.json")
	if err != nil {
		t.Fatal(err)
	}
	var v valuesFile
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range v.MessageIDs {
		id := MessageID(unhex(c.Hex))
		if got, err := ParseMessageID([]byte(c.Text)); got != id || err != nil {
			t.Errorf("ParseMessageID(%q) = %x, %v, want %s", c.Text, got, err, c.Hex)
		}
		if c.Written && id.String() != c.Text {
			t.Errorf("%s is written as %s, want %s", c.Hex, id, c.Text)
		}
	}
	for _, text := range v.BadIDs {
		if id, err := ParseMessageID([]byte(text)); err == nil {
			t.Errorf("ParseMessageID(%q) = %x, want an error", text, id)
		}
	}
	for _, c := range v.Integers {
		var want uint64
		if err := json.Unmarshal([]byte(c.Value), &want); err != nil {
			t.Fatal(err)
		}
		if got, size := uvarint(append(unhex(c.Hex), 0xff)); got != want || size != len(c.Hex)/2 {
			t.Errorf("uvarint(%s) = %d in %d bytes, want %s", c.Hex, got, size, c.Value)
		}
		if got := hex.EncodeToString(uv(want)); got != c.Hex {
			t.Errorf("%s is written as %s, want %s", c.Value, got, c.Hex)
		}
	}
	for _, text := range v.BadInts {
		if got, size := uvarint(unhex(text)); size != 0 {
			t.Errorf("uvarint(%s) = %d in %d bytes, want an error", text, got, size)
		}
	}
	for _, c := range v.Seqs {
		if SeqBlock(c.Value) != c.Block || SeqSend(c.Value) != c.Send || ValidSeq(c.Value) != c.Valid {
			t.Errorf("%d: block %d, send %d, valid %v, want %+v", c.Value, SeqBlock(c.Value), SeqSend(c.Value), ValidSeq(c.Value), c)
		}
	}
	for _, c := range v.Blocks {
		if got := FirstSeq(c.Block); got != c.First {
			t.Errorf("FirstSeq(%d) = %d, want %d", c.Block, got, c.First)
		}
	}
	for _, c := range v.Positions {
		if got := PositionMillis(c.Position); got != c.Millis {
			t.Errorf("PositionMillis(%d) = %d, want %d", c.Position, got, c.Millis)
		}
	}
	for _, c := range v.Next {
		if got := NextPosition(c.Last, c.Accepted); got != c.Next {
			t.Errorf("NextPosition(%d, %d) = %d, want %d", c.Last, c.Accepted, got, c.Next)
		}
	}
	for _, c := range v.Users {
		if ValidUser(c.Name) != c.Valid || ValidUser([]byte(c.Name)) != c.Valid {
			t.Errorf("ValidUser(%q) is not %v", c.Name, c.Valid)
		}
	}
	for _, c := range v.Devices {
		if ValidDevice(c.Name) != c.Valid {
			t.Errorf("ValidDevice(%q) is not %v", c.Name, c.Valid)
		}
	}
	for _, c := range v.Sends {
		f := Frame{Kind: KindSend, Seq: c.Seq, Receiver: []byte(c.Receiver), Content: []byte(strings.Repeat(c.Unit, c.Count))}
		if got := CheckSend(&f); got.Code.String() != c.Code || got.RetryAfterMs != 0 {
			t.Errorf("send, %s: %v, want %s", c.Name, got, c.Code)
		}
	}
}
