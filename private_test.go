package main

import (
	"bytes"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// startedLog starts and stops a server and gives what it said.
func startedLog(t *testing.T, c Config) string {
	t.Helper()
	var log bytes.Buffer
	m, err := start(t.Context(), c, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	return log.String()
}

func modeOf(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

// madeWithMode makes a directory whatever the umask is.
func madeWithMode(t *testing.T, path string, mode fs.FileMode) {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func TestTheDatabaseIsPrivate(t *testing.T) {
	for _, c := range []struct {
		name      string
		data, db  fs.FileMode // before; 0: not there
		afterData fs.FileMode
		afterDB   fs.FileMode
		warning   string // "": none
	}{
		{"new", 0, 0, 0o700, 0o700, ""},
		{"in a directory that was made before", 0o755, 0, 0o755, 0o700, ""},
		{"made when it was open", 0o755, 0o755, 0o755, 0o700, "other users of this machine could enter"},
		{"in a closed directory", 0o700, 0o755, 0o700, 0o700, ""},
		{"a group may read", 0o750, 0o750, 0o750, 0o750, ""},
		{"a group may write", 0o750, 0o770, 0o750, 0o700, "could enter"},
		{"in a directory that everybody may write to", 0o777, 0, 0o777, 0o700, "every user of this machine can replace"},
		{"in one like /tmp", 0o777 | fs.ModeSticky, 0, 0o777, 0o700, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := freeConfig(t)
			database := filepath.Join(cfg.Data.Dir, "db")
			if c.data != 0 {
				madeWithMode(t, cfg.Data.Dir, c.data)
			}
			if c.db != 0 {
				madeWithMode(t, database, c.db)
			}
			log := startedLog(t, cfg)
			if data, db := modeOf(t, cfg.Data.Dir), modeOf(t, database); data != c.afterData || db != c.afterDB {
				t.Errorf("data directory %#o, database %#o; want %#o and %#o", data, db, c.afterData, c.afterDB)
			}
			if got := strings.Contains(log, "level=WARN"); got != (c.warning != "") || !strings.Contains(log, c.warning) {
				t.Errorf("want the warning %q in\n%s", c.warning, log)
			}
			if log := startedLog(t, cfg); strings.Contains(log, "could enter") {
				t.Errorf("it is said again when it is mended:\n%s", log)
			}
		})
	}
}

func TestAnExposedSecretIsNamed(t *testing.T) {
	const secret = "0123456789abcdef0123456789abcdef"
	for mode, want := range map[fs.FileMode]string{
		0o600: "", 0o400: "",
		0o666: "can be replaced by every user", 0o622: "can be replaced by every user", 0o664: "can be replaced by its group",
		0o644: "can be read by every user", 0o640: "can be read by its group",
	} {
		for _, configured := range []bool{true, false} {
			cfg := freeConfig(t)
			madeWithMode(t, cfg.Data.Dir, 0o700)
			path := filepath.Join(cfg.Data.Dir, "auth.secret")
			if configured {
				path = filepath.Join(t.TempDir(), "secret")
				cfg.Auth.SecretFile = path
			}
			if err := os.WriteFile(path, []byte(secret), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			log := startedLog(t, cfg)
			if got := strings.Contains(log, "level=WARN"); got != (want != "") || !strings.Contains(log, want) || got && !strings.Contains(log, path) {
				t.Errorf("mode %#o, configured %v: want %q in\n%s", mode, configured, want, log)
			}
			if strings.Contains(log, secret) {
				t.Errorf("the secret is in the log:\n%s", log)
			}
		}
	}
}

func TestExposureDependsOnTheOwner(t *testing.T) {
	const root, service, stranger = 0, 100, 1000
	for _, c := range []struct {
		mode        fs.FileMode
		owner, self int
		want        string
	}{
		{0o640, root, service, ""},
		{0o600, service, service, ""},
		{0o640, root, root, "can be read by its group"},
		{0o600, stranger, root, "belongs to another user"},
		{0o600, stranger, service, "belongs to another user"},
		{0o660, root, service, "can be replaced by its group"},
		{0o644, root, service, "can be read by every user of this machine"},
	} {
		if got := exposure(c.mode, c.owner, c.self); got != c.want {
			t.Errorf("%#o of user %d, read by %d: got %q, want %q", c.mode, c.owner, c.self, got, c.want)
		}
	}
}
