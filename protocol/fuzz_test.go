package protocol

import (
	"bytes"
	"encoding/json"
	"testing"
	"unicode/utf8"
)

// FuzzParseBinary reads any WebSocket message. What is accepted must survive being written and read
// again, and written again it must give the same bytes.
func FuzzParseBinary(f *testing.F) {
	for _, v := range binaryVectors() {
		f.Add(v.bytes(f))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		var frame, again Frame
		for len(src) > 0 {
			rest, err := ParseBinary(src, &frame)
			if len(rest) >= len(src) || !bytes.HasSuffix(src, rest) {
				t.Fatalf("%d bytes left of %d", len(rest), len(src))
			}
			src = rest
			if err != nil {
				if err.Code != CodeBadRequest && err.Code != CodeUnknownAction || frame.Seq > MaxSeq || frame.Receiver != nil {
					t.Fatalf("%v, %+v", err, frame)
				}
				continue
			}
			if frame.Kind == 0 {
				if len(rest) != 0 {
					t.Fatal("nothing read, but something left")
				}
				return
			}
			frame.Text = errorText(frame.Text) // a writer cuts it
			b := AppendBinary(nil, &frame)
			if rest, err := ParseBinary(b, &again); err != nil || len(rest) != 0 {
				t.Fatalf("%x read again: %v, %d bytes left", b, err, len(rest))
			}
			if b2 := AppendBinary(nil, &again); !bytes.Equal(b, b2) {
				t.Fatalf("%x written again is %x", b, b2)
			}
			if frame.Kind == KindSend {
				CheckSend(&frame)
			}
		}
	})
}

// FuzzParseJSON reads any WebSocket message from either side and compares with encoding/json: what we accept, it accepts, with the same
// values; and what it takes for one flat enough object, we do not call broken JSON.
func FuzzParseJSON(f *testing.F) {
	for _, v := range jsonVectors() {
		f.Add(v.bytes(f), v.From == "server")
	}
	f.Fuzz(func(t *testing.T, src []byte, fromServer bool) {
		var frame, again Frame
		single := json.Valid(src) && bytes.HasPrefix(bytes.TrimLeft(src, " \t\r\n"), []byte("{"))
		for len(src) > 0 {
			rest, err := ParseJSON(src, fromServer, &frame)
			if len(rest) >= len(src) || !bytes.HasSuffix(src, rest) {
				t.Fatalf("%d bytes left of %d", len(rest), len(src))
			}
			object := src[:len(src)-len(rest)]
			src = rest
			if err != nil {
				if single && (err == errJSONSyntax || err == errJSONTrailing) {
					t.Fatalf("valid JSON called broken: %q: %v", object, err)
				}
				if err.Code != CodeBadRequest && err.Code != CodeUnknownAction || frame.Seq > MaxSeq || frame.Receiver != nil {
					t.Fatalf("%v, %+v", err, frame)
				}
				continue
			}
			if frame.Kind == 0 {
				if len(rest) != 0 {
					t.Fatal("nothing read, but something left")
				}
				return
			}
			compareWithStandard(t, object, &frame)
			frame.Text = errorText(frame.Text)
			b := AppendJSON(nil, &frame)
			if !json.Valid(b) || !utf8.Valid(b) {
				t.Fatalf("wrote %q", b)
			}
			if rest, err := ParseJSON(b, fromServer, &again); err != nil || len(rest) != 0 {
				t.Fatalf("%q read again: %v, %q left", b, err, rest)
			}
			if b2 := AppendJSON(nil, &again); !bytes.Equal(b, b2) {
				t.Fatalf("%q written again is %q", b, b2)
			}
		}
	})
}

// compareWithStandard demands that encoding/json reads the same strings and numbers from the last object of text (objects of unknown
// types may stand before it).
func compareWithStandard(t *testing.T, text []byte, f *Frame) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	var m map[string]any
	for dec.More() {
		m = nil
		if err := dec.Decode(&m); err != nil {
			t.Fatalf("%q accepted, but: %v", text, err)
		}
	}
	for key, got := range map[string][]byte{"token": f.Token, "receiver_id": f.Receiver, "sender_id": f.Sender, "content": f.Content, "user_id": f.User} {
		if want, _ := m[key].(string); got != nil && want != string(got) {
			t.Fatalf("%q: %s is %q, want %q", text, key, got, want)
		}
	}
	number := func(key string) uint64 {
		n, _ := m[key].(json.Number)
		v, _ := n.Int64()
		return uint64(v)
	}
	switch f.Kind {
	case KindSend:
		if number("message_id_by_client") != f.Seq || number("timestamp") != uint64(f.Timestamp) {
			t.Fatalf("%q: number %d, timestamp %d", text, f.Seq, f.Timestamp)
		}
	case KindReceived, KindIncoming:
		if number("position") != f.Position {
			t.Fatalf("%q: position %d", text, f.Position)
		}
	case KindConnected:
		if number("next_message_id_by_client") != f.Seq {
			t.Fatalf("%q: number %d", text, f.Seq)
		}
	}
}

// FuzzMessageID: a text that is read is written back but for its case.
func FuzzMessageID(f *testing.F) {
	v := values()
	for _, c := range v.MessageIDs {
		f.Add([]byte(c.Text))
	}
	for _, text := range v.BadIDs {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		id, err := ParseMessageID(text)
		if err != nil {
			if id != (MessageID{}) {
				t.Fatalf("%q: %v, but %x", text, err, id)
			}
			return
		}
		if got := id.AppendText(nil); !bytes.EqualFold(got, text) || len(got) != MessageIDTextBytes {
			t.Fatalf("%q is written as %q", text, got)
		}
	})
}

func FuzzMessageIDBytes(f *testing.F) {
	f.Add(testID[:])
	f.Add(maxID[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) != len(MessageID{}) {
			return
		}
		id := MessageID(b)
		if got, err := ParseMessageID([]byte(id.String())); got != id || err != nil {
			t.Fatalf("%x is read back as %x, %v", id, got, err)
		}
	})
}
