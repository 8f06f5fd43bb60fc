package protocol

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The golden vectors are written by this package and read by every implementation of the protocol:
//
//	go test ./protocol -run Vectors -update
//
// writes them anew from the tables in vectors_binary_test.go, vectors_json_test.go and vectors_values_test.go, which hold inputs and
// expectations. Without -update the tests demand that the files say what the tables say, and run what the files say.

var update = flag.Bool("update", false, "write the golden vectors anew")

// vectorFile is the form of testdata/binary.json and testdata/json.json.
type vectorFile struct {
	About   []string `json:"about"`
	Vectors []vector `json:"vectors"`
}

// vector is one WebSocket message and what reading it gives.
type vector struct {
	Name string `json:"name"`
	// From is who sends it: "client" or "server".
	From string `json:"from"`
	// Hex or Text is the message. JSON that is not UTF-8 is given as Hex.
	Hex  string `json:"hex,omitempty"`
	Text string `json:"text,omitempty"`
	// Encode says that writing the one message of Results gives exactly these bytes.
	Encode bool `json:"encode,omitempty"`
	// Results are the messages read and the errors met, in order.
	Results []map[string]any `json:"results"`
}

func (v *vector) bytes(t testing.TB) []byte {
	t.Helper()
	if v.Text != "" {
		return []byte(v.Text)
	}
	b, err := hex.DecodeString(v.Hex)
	if err != nil {
		t.Fatalf("%s: hex: %v", v.Name, err)
	}
	return b
}

var kindNames = map[Kind]string{
	KindConnect: "connect", KindSend: "send", KindAcknowledge: "acknowledge", KindRenewToken: "renew_token",
	KindConnected: "connected", KindReceived: "received", KindIncoming: "incoming", KindReceipt: "receipt",
	KindError: "error", KindRenew: "renew", KindRenewed: "renewed", KindGoAway: "go_away",
}

func allKinds() (list []Kind) {
	for k := range kindNames {
		list = append(list, k)
	}
	slices.Sort(list)
	return list
}

// describe puts every field that a message of f's kind has into the words of the vectors.
func describe(f *Frame) map[string]any {
	m := map[string]any{"kind": kindNames[f.Kind]}
	switch f.Kind {
	case KindConnect:
		m["token"], m["device"], m["epoch"] = string(f.Token), string(f.Device), fmt.Sprintf("%016x", f.Epoch)
		m["receipts_after"] = f.ReceiptsAfter
	case KindSend:
		m["message_id_by_client"], m["timestamp"] = f.Seq, f.Timestamp
		m["receiver_id"], m["content"] = string(f.Receiver), string(f.Content)
	case KindAcknowledge:
		ids := []any{}
		for _, id := range f.IDs {
			ids = append(ids, id.String())
		}
		m["message_ids"], m["timestamp"] = ids, f.Timestamp
	case KindRenewToken:
		m["token"] = string(f.Token)
	case KindConnected:
		m["user_id"], m["device"], m["epoch"] = string(f.User), string(f.Device), fmt.Sprintf("%016x", f.Epoch)
		m["next_message_id_by_client"], m["heartbeat_seconds"], m["timestamp"] = f.Seq, f.HeartbeatSeconds, f.Timestamp
	case KindReceived:
		m["message_id_by_client"], m["message_id"], m["position"], m["timestamp"] = f.Seq, f.ID.String(), f.Position, f.Timestamp
	case KindIncoming:
		m["message_id"], m["position"], m["timestamp"] = f.ID.String(), f.Position, f.Timestamp
		m["sender_id"], m["receiver_id"], m["content"] = string(f.Sender), string(f.Receiver), string(f.Content)
	case KindReceipt:
		list := []any{}
		for _, r := range f.Receipts {
			list = append(list, map[string]any{
				"message_id": r.ID.String(), "position": r.Position, "message_id_by_client": r.Seq,
				"timestamp": r.Timestamp, "receiver_id": string(r.Receiver),
			})
		}
		m["receipts"] = list
	case KindError:
		m["code"], m["code_number"], m["text"] = f.Code.String(), uint16(f.Code), string(f.Text)
		m["message_id_by_client"], m["resend_from"], m["retry_after_ms"] = f.Seq, f.ResendFrom, f.RetryAfterMs
	case KindRenew:
		m["expires_in_ms"] = f.ExpiresInMs
	case KindGoAway:
		m["retry_after_ms"] = f.RetryAfterMs
	}
	return m
}

// describeError is what an error frame about bad bytes would say.
func describeError(f *Frame, err *FrameError) map[string]any {
	m := map[string]any{"error": err.Code.String()}
	if f.Seq != 0 {
		m["message_id_by_client"] = f.Seq
	}
	return m
}

// assemble is the inverse of describe, for vectors read from a file.
func assemble(t testing.TB, m map[string]any) *Frame {
	t.Helper()
	f := &Frame{}
	for k, name := range kindNames {
		if name == m["kind"] {
			f.Kind = k
		}
	}
	text := func(key string) []byte { s, _ := m[key].(string); return []byte(s) }
	number := func(m map[string]any, key string) uint64 {
		n, _ := m[key].(json.Number)
		var v uint64
		fmt.Sscan(n.String(), &v)
		return v
	}
	id := func(v any) MessageID {
		id, err := ParseMessageID([]byte(v.(string)))
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	f.Token, f.User, f.Device = text("token"), text("user_id"), text("device")
	f.Sender, f.Receiver, f.Content, f.Text = text("sender_id"), text("receiver_id"), text("content"), text("text")
	fmt.Sscanf(string(text("epoch")), "%x", &f.Epoch)
	f.Seq = number(m, "message_id_by_client") + number(m, "next_message_id_by_client")
	f.Position, f.Timestamp = number(m, "position"), int64(number(m, "timestamp"))
	f.ReceiptsAfter, f.HeartbeatSeconds = int64(number(m, "receipts_after")), uint32(number(m, "heartbeat_seconds"))
	f.Code, f.ResendFrom = Code(number(m, "code_number")), number(m, "resend_from")
	f.RetryAfterMs, f.ExpiresInMs = uint32(number(m, "retry_after_ms")), int64(number(m, "expires_in_ms"))
	if v, ok := m["message_id"]; ok {
		f.ID = id(v)
	}
	if list, ok := m["message_ids"].([]any); ok {
		for _, v := range list {
			f.IDs = append(f.IDs, id(v))
		}
	}
	if list, ok := m["receipts"].([]any); ok {
		for _, v := range list {
			r := v.(map[string]any)
			f.Receipts = append(f.Receipts, Receipt{
				ID: id(r["message_id"]), Position: number(r, "position"), Seq: number(r, "message_id_by_client"),
				Timestamp: int64(number(r, "timestamp")), Receiver: []byte(r["receiver_id"].(string)),
			})
		}
	}
	return f
}

// text is a canonical form for comparing and showing results.
func resultText(t testing.TB, results []map[string]any) string {
	t.Helper()
	var out strings.Builder
	for _, r := range results {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
		out.WriteByte('\n')
	}
	return out.String()
}

// parser reads one message of a WebSocket message.
type parser func(src []byte, f *Frame) ([]byte, *FrameError)

func jsonParser(fromServer bool) parser {
	return func(src []byte, f *Frame) ([]byte, *FrameError) { return ParseJSON(src, fromServer, f) }
}

// readAll reads a whole WebSocket message.
func readAll(t testing.TB, src []byte, parse parser) (results []map[string]any) {
	t.Helper()
	var f Frame
	for len(src) > 0 {
		rest, err := parse(src, &f)
		if len(rest) >= len(src) {
			t.Fatalf("no progress: %d bytes left of %d", len(rest), len(src))
		}
		if err != nil {
			results = append(results, describeError(&f, err))
		} else if f.Kind != 0 {
			results = append(results, describe(&f))
		}
		src = rest
	}
	return results
}

// message is one entry of a table: what was read, or the error met.
type message struct {
	Frame
	err Code
}

func (m message) describe() map[string]any {
	if m.err != OK {
		return describeError(&m.Frame, &FrameError{Code: m.err})
	}
	return describe(&m.Frame)
}

func bad(code Code) message                 { return message{err: code} }
func badSend(code Code, seq uint64) message { return message{err: code, Frame: Frame{Seq: seq}} }
func good(f Frame) message                  { return message{Frame: f} }

func describeAll(list []message) []map[string]any {
	results := []map[string]any{}
	for _, m := range list {
		results = append(results, m.describe())
	}
	return results
}

// checkGolden demands that testdata/name holds value, or writes it there with -update.
func checkGolden(t *testing.T, name string, value any) {
	t.Helper()
	path := filepath.Join("testdata", name)
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	if err := enc.Encode(value); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(old, b.Bytes()) {
		t.Errorf("%s does not say what the table says; if the protocol has changed on purpose: go test ./protocol -run Vectors -update", path)
	}
}

func readVectors(t testing.TB, name string) []vector {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var file vectorFile
	if err := dec.Decode(&file); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if len(file.Vectors) < 60 {
		t.Fatalf("%s has only %d vectors", name, len(file.Vectors))
	}
	return file.Vectors
}

// runVectors reads every vector of a file, and writes those that say so.
func runVectors(t *testing.T, name string, parse func(fromServer bool) parser, write func([]byte, *Frame) []byte) {
	names := map[string]bool{}
	for _, v := range readVectors(t, name) {
		if names[v.Name] {
			t.Errorf("%q is there twice", v.Name)
		}
		names[v.Name] = true
		src := v.bytes(t)
		if v.From != "client" && v.From != "server" {
			t.Fatalf("%s: from %q", v.Name, v.From)
		}
		got := resultText(t, readAll(t, src, parse(v.From == "server")))
		if want := resultText(t, v.Results); got != want {
			t.Errorf("%s: read %q\n got %s\nwant %s", v.Name, src, got, want)
		}
		if !v.Encode {
			continue
		}
		if len(v.Results) != 1 {
			t.Fatalf("%s: %d results to write", v.Name, len(v.Results))
		}
		if b := write([]byte("before"), assemble(t, v.Results[0])); string(b) != "before"+string(src) {
			t.Errorf("%s: write\n got %q\nwant %q", v.Name, b, "before"+string(src))
		}
	}
}
