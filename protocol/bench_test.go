package protocol

import (
	"strings"
	"testing"
)

// Benchmarks of one message in each encoding and direction: go test ./protocol -run XXX -bench .

var benchFrames = []struct {
	name string
	Frame
}{
	{"send-30B", Frame{Kind: KindSend, Seq: FirstSeq(1), Timestamp: testMillis, Receiver: []byte("bob"), Content: []byte("shall we meet at the station?!")}},
	{"send-200B", Frame{Kind: KindSend, Seq: FirstSeq(1), Timestamp: testMillis, Receiver: []byte("bob"), Content: []byte(strings.Repeat("0123456789", 20))}},
	{"send-4000B", Frame{Kind: KindSend, Seq: FirstSeq(1), Timestamp: testMillis, Receiver: []byte("bob"), Content: []byte(strings.Repeat("😀", 1000))}},
	{"incoming-30B", Frame{Kind: KindIncoming, ID: testID, Position: testPosition, Sender: []byte("alice"), Receiver: []byte("bob"), Content: []byte("shall we meet at the station?!")}},
	{"acknowledge", Frame{Kind: KindAcknowledge, Timestamp: testMillis, IDs: []MessageID{testID}}},
	{"received", Frame{Kind: KindReceived, Seq: FirstSeq(1), ID: testID, Position: testPosition, Timestamp: testMillis}},
}

func benchmarkAppend(b *testing.B, write func([]byte, *Frame) []byte) {
	for _, c := range benchFrames {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			var dst []byte
			for b.Loop() {
				dst = write(dst[:0], &c.Frame)
			}
			b.SetBytes(int64(len(dst)))
		})
	}
}

func BenchmarkAppendBinary(b *testing.B) { benchmarkAppend(b, AppendBinary) }
func BenchmarkAppendJSON(b *testing.B)   { benchmarkAppend(b, AppendJSON) }

func benchmarkParse(b *testing.B, write func([]byte, *Frame) []byte, parse func(fromServer bool) parser) {
	for _, c := range benchFrames {
		b.Run(c.name, func(b *testing.B) {
			src := write(nil, &c.Frame)
			read := parse(c.Kind.FromServer())
			var f Frame
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := read(src, &f); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkParseBinary(b *testing.B) {
	benchmarkParse(b, AppendBinary, func(bool) parser { return ParseBinary })
}
func BenchmarkParseJSON(b *testing.B) { benchmarkParse(b, AppendJSON, jsonParser) }

func BenchmarkCheckSend(b *testing.B) {
	f := benchFrames[2].Frame
	for b.Loop() {
		CheckSend(&f)
	}
}

func BenchmarkMessageIDText(b *testing.B) {
	var dst []byte
	for b.Loop() {
		dst = testID.AppendText(dst[:0])
	}
}

func BenchmarkParseMessageID(b *testing.B) {
	text := testID.AppendText(nil)
	for b.Loop() {
		ParseMessageID(text)
	}
}
