package main

import (
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"millrace/backend"
)

// TestAFailedStoreIsNotAlive: it refuses everything until a restart, which is what whoever watches /livez is to do.
func TestAFailedStoreIsNotAlive(t *testing.T) {
	m, err := start(t.Context(), freeConfig(t), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}()
	if status, body := fetch(t, unpooled(), m.admin, "/livez"); status != http.StatusOK {
		t.Fatalf("before: %d %s", status, body)
	}
	// No owner does this: a row of a mailbox that names a record which is not there.
	m.store.Commit(&backend.Commit{Urgent: true, Mailbox: []backend.MailboxPut{{User: "bob", Position: 1 << 40}}, Done: func() {
		t.Error("a commit that cannot be written is done")
	}})
	patience := time.NewTimer(walkPatience)
	defer patience.Stop()
	for {
		status, body := fetch(t, unpooled(), m.admin, "/livez")
		if status == http.StatusServiceUnavailable {
			if !strings.Contains(body, "the store has failed") {
				t.Errorf("livez: %s", body)
			}
			break
		}
		select {
		case <-patience.C:
			t.Fatalf("livez: %d %s", status, body)
		case <-time.After(10 * time.Millisecond):
		}
	}
	if status, body := fetch(t, unpooled(), m.admin, "/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(body, "[-]store failed") {
		t.Errorf("readyz: %d %s", status, body)
	}
	if _, body := fetch(t, unpooled(), m.admin, "/metrics"); !strings.Contains(body, `millrace_invariant_violations_total{promise="P2"} 1`) {
		t.Error("a record that is gone is not counted as a broken promise")
	}
}
