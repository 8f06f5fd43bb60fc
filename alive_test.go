package main

import (
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// TestAFailedStoreIsNotAlive: it refuses everything until a restart, which is what whoever watches /livez is to do.
func TestAFailedStoreIsNotAlive(t *testing.T) {
	config := freeConfig(t)
	begin := func() *Millrace {
		t.Helper()
		m, err := start(t.Context(), config, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	const windows = 5000
	commit := func(done func()) *backend.Commit {
		c := &backend.Commit{Urgent: true, Done: done}
		for n := range windows {
			row := backend.WindowRow{WindowKey: backend.WindowKey{Conversation: "c", Stream: backend.Stream{User: "u", Device: "d", Epoch: uint64(n)}}}
			row.Finish(protocol.FirstSeq(0))
			c.Windows = append(c.Windows, row)
		}
		return c
	}
	m := begin()
	written := make(chan struct{})
	m.store.Commit(commit(func() { close(written) }))
	<-written
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = begin()                      // what was in the log of the database is in a table now
	defer func() { _ = m.Close() }() // it may say what is wrong with the table
	if status, body := fetch(t, unpooled(), m.admin, "/livez"); status != http.StatusOK {
		t.Fatalf("before: %d %s", status, body)
	}
	damageTables(t, filepath.Join(config.Data.Dir, "db"))
	m.store.Commit(commit(func() { t.Error("a commit that cannot be written is done") }))
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
}

// damageTables overwrites the middle of every table of a database, so that checksums do not fit.
func damageTables(t *testing.T, dir string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil || len(names) == 0 {
		t.Fatalf("tables: %v, %v", names, err)
	}
	for _, name := range names {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		if err == nil {
			_, err = f.WriteAt(make([]byte, info.Size()/2), info.Size()/4)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
