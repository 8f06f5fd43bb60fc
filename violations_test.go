package main

import (
	"io"
	"maps"
	"net/http"
	"regexp"
	"testing"
)

var violationLine = regexp.MustCompile(`(?m)^millrace_invariant_violations_total\{promise="(P[0-9])"\} (\S+)$`)

// wantNoViolations reads what a server has counted since its start: nothing, for each promise that it can see broken.
func wantNoViolations(t testing.TB, adminAddr string) {
	t.Helper()
	r, err := http.Get("http://" + adminAddr + "/metrics")
	if err != nil {
		t.Errorf("scrape: %v", err)
		return
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Errorf("scrape: status %d, %v", r.StatusCode, err)
		return
	}
	counted := map[string]string{}
	for _, line := range violationLine.FindAllSubmatch(body, -1) {
		counted[string(line[1])] = string(line[2])
	}
	kept := map[string]string{"P1": "0", "P2": "0", "P3": "0", "P4": "0", "P5": "0", "P6": "0", "P7": "0"}
	if !maps.Equal(counted, kept) {
		t.Errorf("millrace_invariant_violations_total by promise: %v, want %v", counted, kept)
	}
}

// TestViolationsAreShownFromTheStart: what is alarmed at has to be there before it happens.
func TestViolationsAreShownFromTheStart(t *testing.T) {
	wantNoViolations(t, startWalk(t).AdminAddr())
}
