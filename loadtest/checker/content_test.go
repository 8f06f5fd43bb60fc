package checker

import (
	"strings"
	"testing"
)

func TestContentRoundTrip(t *testing.T) {
	for _, from := range []StreamID{0, 9, 1<<31 - 1} {
		for _, seq := range []uint64{0, 1, 1<<20 + 1, 1<<48 - 1, 1<<64 - 1} {
			bare := len(Content(from, seq, 0))
			for pad := range 1100 {
				text := Content(from, seq, pad)
				// A count that takes a digit more can leave one byte over.
				if len(text) != max(bare, pad) && (pad <= bare || len(text) != pad-1) {
					t.Fatalf("Content(%d, %d, %d) has %d bytes", from, seq, pad, len(text))
				}
				gotFrom, gotSeq, ok := ParseContent(text)
				if !ok || gotFrom != from || gotSeq != seq {
					t.Fatalf("ParseContent(%q) = %d, %d, %v", text, gotFrom, gotSeq, ok)
				}
			}
		}
	}
}

func TestParseContentRefuses(t *testing.T) {
	good := Content(17, 1<<20|1, 40)
	for i := range good {
		for _, bad := range []string{good[:i], good[:i] + good[i+1:], good[:i] + "k" + good[i:], good[:i] + "\x00" + good[i+1:]} {
			if _, _, ok := ParseContent(bad); ok && bad != good {
				t.Errorf("ParseContent took %q for %q", bad, good)
			}
		}
	}
	for _, bad := range []string{
		"", ":", "::", ":::", "1:2:", "1:2:0", "1:2:0:x", "1:2:1:", "+1:2:0:", "-1:2:0:", "01:2:0:", "1:02:0:", "1:2:00:", " 1:2:0:",
		"2147483648:2:0:", "1:18446744073709551616:0:", "1:2:99999999999999999999:", strings.Repeat("9", 100) + ":1:0:",
	} {
		if _, _, ok := ParseContent(bad); ok {
			t.Errorf("ParseContent took %q", bad)
		}
	}
	if _, _, ok := ParseContent("1:2:0:"); !ok {
		t.Error(`ParseContent refused "1:2:0:"`)
	}
}

// FuzzParseContent: whatever is accepted is exactly what Content makes.
func FuzzParseContent(f *testing.F) {
	f.Add(Content(17, 1<<20|1, 40))
	f.Add("1:2:0:")
	f.Add("0:18446744073709551615:1:x")
	f.Fuzz(func(t *testing.T, text string) {
		from, seq, ok := ParseContent(text)
		if !ok {
			return
		}
		// The length asked for is that of the text, so the letters are as many.
		if again := Content(from, seq, len(text)); again != text {
			t.Errorf("ParseContent took %q, Content makes %q", text, again)
		}
	})
}
