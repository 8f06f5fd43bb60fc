package embedded

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"millrace/backend"
	"millrace/protocol"
)

func fullRecord() *backend.Record {
	r := &backend.Record{
		Message: protocol.Message{
			ID: protocol.MessageID{1, 2, 3, 0xff}, Position: 1<<53 - 1,
			Sender: strings.Repeat("s", protocol.MaxUserBytes), Receiver: "r",
			Content: bytes.Repeat([]byte{0, 0xff}, protocol.MaxContentBytes/2),
		},
		Device: strings.Repeat("d", protocol.MaxDeviceBytes), Epoch: 1<<64 - 1, Seq: protocol.MaxSeq, AcceptedMs: protocol.MaxTimestampMillis,
	}
	r.Conversation = protocol.ConversationHash(r.Sender, r.Receiver)
	return r
}

func TestRecordsSurvive(t *testing.T) {
	small := &backend.Record{Message: protocol.Message{Sender: "a", Receiver: "b", Content: []byte("x"), Conversation: protocol.ConversationHash("a", "b")}, Device: "d", Seq: 1}
	for _, r := range []*backend.Record{fullRecord(), small} {
		value := appendRecord(nil, r)
		if len(value) != recordSize(r) {
			t.Errorf("%d bytes, recordSize says %d", len(value), recordSize(r))
		}
		got, err := decodeRecord(value, r.Position)
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("got %+v, %v\nwant %+v", got, err, r)
		}
		hash, ok := recordConversation(value)
		id, known := recordID(value)
		if !ok || !known || hash != r.Conversation || id != r.ID {
			t.Errorf("conversation %x %v, id %v %v", hash, ok, id, known)
		}
		// Nothing of the decoded record points into value, which Pebble takes back.
		for i := range value {
			value[i] ^= 0x55
		}
		if !reflect.DeepEqual(got, r) {
			t.Error("a decoded record changes with the buffer it came from")
		}
	}
}

// TestTruncatedRowsAreRefused cuts every kind of row at every byte.
func TestTruncatedRowsAreRefused(t *testing.T) {
	mark := backend.Mark{Position: 7, ID: protocol.MessageID{9}, Device: "phone", Epoch: 3, Seq: 4}
	var w backend.Window
	w.Finish(protocol.FirstSeq(3))
	rows := map[string]struct {
		value  []byte
		decode func([]byte) error
		whole  int // cuts from here on are valid rows too
	}{
		"record": {appendRecord(nil, fullRecord()), func(v []byte) error { _, err := decodeRecord(v, 1); return err },
			recordSize(fullRecord()) - protocol.MaxContentBytes},
		"window":      {appendWindow(nil, &windowRow{w, 1}), func(v []byte) error { _, err := decodeWindow(v); return err }, -1},
		"outstanding": {appendOutstanding(nil, &mark), func(v []byte) error { _, err := decodeOutstanding(v); return err }, -1},
		"receipt": {appendReceipt(nil, &backend.ReceiptRow{Delivered: mark, Top: mark, ChangedMs: 5}),
			func(v []byte) error { _, err := decodeReceipt(v); return err }, -1},
		"stream": {appendStreamRow(nil, streamRow{5, 1}), func(v []byte) error { _, err := decodeStreamRow(v); return err }, -1},
		"count":  {appendCount(nil, countRow{5, 6, 7}), func(v []byte) error { _, err := decodeCount(v); return err }, -1},
		"state":  {appendState(nil, &state{5, 6, 7}), func(v []byte) error { _, err := decodeState(v); return err }, -1},
		"age clock": {appendAgeClock(nil, &ageClock{99, []gap{{5, 9}, {12, 30}}}),
			func(v []byte) error { _, err := decodeAgeClock(v); return err }, -1},
	}
	for name, row := range rows {
		if err := row.decode(row.value); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for n := range row.value {
			// An empty window; a count or a state of format 1; a clock with fewer gaps.
			valid := row.whole >= 0 && n >= row.whole || name == "window" && n == 3 || name == "count" && n == 5 || name == "state" && n == 17 ||
				name == "age clock" && n >= 7 && (n-7)%12 == 0
			if err := row.decode(row.value[:n]); errors.Is(err, errRow) == valid {
				t.Errorf("%s cut to %d of %d bytes: %v", name, n, len(row.value), err)
			}
		}
		if name != "record" {
			if err := row.decode(append(bytes.Clone(row.value), 0)); !errors.Is(err, errRow) {
				t.Errorf("%s with a byte too many: %v", name, err)
			}
		}
		newer := bytes.Clone(row.value)
		newer[0] = rowVersion + 1
		if err := row.decode(newer); !errors.Is(err, errRow) {
			t.Errorf("%s of another version: %v", name, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add(appendRecord(nil, fullRecord()))
	f.Fuzz(func(t *testing.T, value []byte) {
		r, err := decodeRecord(value, 5)
		hash, ok := recordConversation(value)
		if err != nil {
			if r != nil || !errors.Is(err, errRow) {
				t.Fatalf("%+v, %v", r, err)
			}
			return
		}
		if !ok || hash != r.Conversation {
			t.Fatalf("a scan finds the conversation %x %v, decoding %x", hash, ok, r.Conversation)
		}
		if again := appendRecord(nil, r); !bytes.Equal(again, value) {
			t.Fatalf("decoded and encoded again\n got %x\nwant %x", again, value)
		}
	})
}

func FuzzRows(f *testing.F) {
	mark := backend.Mark{Position: 7, ID: protocol.MessageID{9}, Device: "phone", Epoch: 3, Seq: 4}
	f.Add(appendReceipt(nil, &backend.ReceiptRow{Delivered: mark, Top: mark, ChangedMs: 5}))
	f.Add(appendDevices(nil, []backend.Device{{Name: "phone", Heir: true}, {Name: "tablet"}}))
	f.Add(appendWindow(nil, &windowRow{backend.Window{Blocks: [4]backend.BlockWindow{{Block: 2, Highest: 3, Bits: 5}}}, 9}))
	f.Add(appendAgeClock(nil, &ageClock{99, []gap{{5, 9}, {12, 30}}}))
	f.Fuzz(func(t *testing.T, value []byte) {
		if m, err := decodeOutstanding(value); err == nil && !bytes.Equal(appendOutstanding(nil, &m), value) {
			t.Fatalf("outstanding %x", value)
		}
		if r, err := decodeReceipt(value); err == nil && !bytes.Equal(appendReceipt(nil, &r), value) {
			t.Fatalf("receipt %x", value)
		}
		if c, err := decodeAgeClock(value); err == nil && !bytes.Equal(appendAgeClock(nil, &c), value) {
			t.Fatalf("age clock %x", value)
		}
		// Only that they do not panic: a heir is any byte but 0, a window ends at its first unused block.
		_, _ = decodeDevices(value)
		_, _ = decodeWindow(value)
	})
}
