package protocol

import (
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// These tests keep the specification true: its examples are run, and its tables are compared with the constants.

func readDoc(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestDocListsEveryCode(t *testing.T) {
	doc := readDoc(t)
	_, table, _ := strings.Cut(doc, "# 15 Error codes")
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^//\t([ \d]\d)  ([a-z0-9_]+) `).FindAllStringSubmatch(table, -1) {
		n, _ := strconv.Atoi(strings.TrimSpace(m[1]))
		if Code(n).String() != m[2] {
			t.Errorf("doc.go says that %d is %s, and it is %s", n, m[2], Code(n))
		}
		listed[m[2]] = true
	}
	for _, c := range Codes() {
		if c != OK && !listed[c.String()] {
			t.Errorf("doc.go does not list %d %s", c, c)
		}
	}
}

func TestDocListsEveryCloseCode(t *testing.T) {
	doc := readDoc(t)
	_, table, _ := strings.Cut(doc, "# 16 Close codes")
	listed := map[CloseCode]bool{}
	for _, m := range regexp.MustCompile(`(?m)^//\t(\d{4})  (.*)$`).FindAllStringSubmatch(table, -1) {
		n, _ := strconv.Atoi(m[1])
		c := CloseCode(n)
		listed[c] = true
		if again := strings.Contains(m[2], "connect again"); again != c.Reconnect() {
			t.Errorf("doc.go says of %d %q, and Reconnect says %v", c, m[2], c.Reconnect())
		}
	}
	for _, c := range closeCodes {
		if !listed[c] {
			t.Errorf("doc.go does not list %d", c)
		}
	}
	if len(listed) != len(closeCodes) {
		t.Errorf("doc.go lists %d close codes, we have %d", len(listed), len(closeCodes))
	}
}

func TestDocKinds(t *testing.T) {
	doc := readDoc(t)
	for k, name := range kindNames {
		line := fmt.Sprintf("//\t0x%02x %s ", k, strings.ReplaceAll(name, "_token", " token"))
		if !strings.Contains(doc, line) {
			t.Errorf("doc.go has no %q", line)
		}
		if k.FromServer() != (strings.Index(doc, "//	     ←") < strings.Index(doc, line)) && k != KindConnected {
			t.Errorf("%s stands on the wrong side", name)
		}
	}
}

func TestDocLimits(t *testing.T) {
	doc := readDoc(t)
	_, table, _ := strings.Cut(doc, "# 14 Limits")
	table, _, _ = strings.Cut(table, "# 15")
	table = strings.Join(strings.Fields(strings.ReplaceAll(table, "//", "")), " ")
	for what, n := range map[string]uint64{
		"content %d code points": MaxContentRunes, "and %d bytes of UTF-8": MaxContentBytes,
		"user id, device id %d and": MaxUserBytes, "and %d bytes devices": MaxDeviceBytes, "devices of a user %d": MaxDevicesPerUser,
		"1 … %d (2^48": MaxSeq, "position ≤ %d": MaxPosition, "receipts_after ≤ %d": MaxTimestampMillis,
		"retry_after_ms ≤ %d": MaxRetryAfterMillis, "expires_in_ms ≤ %d": MaxExpiresInMillis, "heartbeat_seconds ≤ %d": MaxHeartbeatSeconds,
		"; %d unless configured": HeartbeatSeconds, "token %d bytes": MaxTokenBytes, "text of an error %d": MaxErrorTextBytes,
		"from a client %d bytes": MaxBinaryFrameBytes, "(binary), %d bytes": MaxJSONFrameBytes, "%d fragments": MaxFragments,
		"from the server %d": MaxServerFrameBytes, "acknowledge %d": MaxIDsPerFrame, "binary receipt %d": MaxReceiptsPerFrame,
		"span %d": MaxOpenSpan, "unacknowledged pushes %d": MaxUnacknowledged, "ignored JSON %d": maxJSONDepth,
		"waiting for a device %d": MaxMailboxRows, "valid connect %d s": AuthenticateSeconds, "byte of a message %d s": FrameSeconds,
		"of a push %d s": AcknowledgeSeconds,
	} {
		// The table groups the digits of large numbers by spaces or not at all.
		plain := fmt.Sprintf(what, n)
		grouped := strings.ReplaceAll(what, "%d", group(n))
		if !strings.Contains(table, plain) && !strings.Contains(table, grouped) {
			t.Errorf("the limits of doc.go do not say %q", plain)
		}
	}
	if !strings.Contains(doc, fmt.Sprintf("some that changed up to %d s earlier", ReceiptsSlackMillis/1000)) ||
		!strings.Contains(doc, fmt.Sprintf("may differ by %d s", TokenSkewSeconds)) ||
		!strings.Contains(doc, fmt.Sprintf("About %d s before the token ends", RenewSeconds)) {
		t.Error("a number in the text of doc.go has changed")
	}
}

func group(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// TestDocExamples reads the JSON lines and the hex lines of doc.go and writes them back.
func TestDocExamples(t *testing.T) {
	doc := readDoc(t)
	var f Frame
	texts := map[Kind]string{}
	for _, m := range regexp.MustCompile(`(?m)^//\t(→|←) (\{.*\})$`).FindAllStringSubmatch(doc, -1) {
		rest, err := ParseJSON([]byte(m[2]), m[1] == "←", &f)
		if err != nil || len(rest) != 0 {
			t.Errorf("%s: %v", m[2], err)
			continue
		}
		texts[f.Kind] = m[2]
		if got := string(AppendJSON(nil, &f)); got != m[2] {
			t.Errorf("%s is written as %s", m[2], got)
		}
	}
	if len(texts) != len(kindNames) {
		t.Errorf("doc.go shows %d messages, there are %d", len(texts), len(kindNames))
	}
	hexLines := regexp.MustCompile(`(?m)^//\t((?:[0-9a-f]{2} )+\|.*)$`).FindAllStringSubmatch(doc, -1)
	if len(hexLines) != 2 {
		t.Fatalf("doc.go has %d frames in hex", len(hexLines))
	}
	for _, m := range hexLines {
		src, err := hex.DecodeString(strings.NewReplacer(" ", "", "|", "").Replace(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		if rest, err := ParseBinary(src, &f); err != nil || len(rest) != 0 {
			t.Errorf("%s: %v", m[1], err)
			continue
		}
		if got := string(AppendJSON(nil, &f)); got != texts[f.Kind] {
			t.Errorf("%s is %s, want %s", m[1], got, texts[f.Kind])
		}
	}
}
