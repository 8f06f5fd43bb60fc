package main

import (
	"bytes"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestGCPercent(t *testing.T) {
	for _, c := range []struct {
		live, allocated uint64 // a second
		want            int
	}{
		// busy
		{0, 1 << 30, 100}, {4 << 20, 1 << 30, 100}, {64 << 20, 1 << 30, 100}, {65 << 20, 1 << 30, 98}, {128 << 20, 1 << 30, 50},
		{640 << 20, 1 << 40, 10}, {6400 << 20, 1 << 40, 1}, {100 << 30, 1 << 40, 1},
		// idle
		{0, 0, 10}, {4 << 20, 0, 10}, {64 << 20, 1 << 20, 10}, {640 << 20, 0, 10}, {6400 << 20, 0, 1},
		// between
		{8 << 20, 3 << 20, 10}, {8 << 20, 4 << 20, 20}, {64 << 20, 4 << 20, 20}, {8 << 20, 11 << 20, 50}, {8 << 20, 20 << 20, 100},
	} {
		got := gcPercent(c.live, c.allocated)
		if got != c.want {
			t.Errorf("%d MiB alive, %d MiB/s allocated: got %d, want %d", c.live>>20, c.allocated>>20, got, c.want)
		}
		if headroom := c.live * uint64(got) / 100; c.live <= 6400<<20 && headroom > gcHeadroomBytes {
			t.Errorf("%d MiB alive: headroom %d MiB", c.live>>20, headroom>>20)
		}
	}
}

func TestAfterEachGCFollowsCollections(t *testing.T) {
	live := make(chan uint64, 3)
	calls := 0
	afterEachGC(func() bool {
		live <- readHeap().live
		calls++
		return calls < cap(live)
	})
	for range cap(live) {
		if collectUntil(t, live) == 0 {
			t.Error("no live heap after a collection")
		}
	}
}

// collectUntil collects until a hook has sent something: it is called soon after a collection, not in it.
func collectUntil[T any](t *testing.T, sent <-chan T) (value T) {
	t.Helper()
	for range 1000 {
		runtime.GC()
		select {
		case value = <-sent:
			return value
		default:
		}
	}
	t.Fatal("the hook was not called in 1000 collections")
	return value
}

// TestTuneGCOfAnIdleHeap: who allocates nothing keeps little headroom.
func TestTuneGCOfAnIdleHeap(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	begun := time.Now()
	tuner := &gcTuner{last: begun, allocated: readHeap().allocated}
	if !tuner.tune(begun.Add(100*gcInterval)) || gogc() != gcLeastPercent {
		t.Errorf("GOGC is %d", gogc())
	}
	tuner.stopped = true
	if tuner.tune(begun.Add(101 * gcInterval)) {
		t.Error("a stopped tuner goes on")
	}
}

// gogc is the setting in force, read without changing it.
func gogc() int {
	sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(sample)
	return int(sample[0].Value.Uint64())
}

func TestTuneGCFollowsTheLiveHeap(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	held := make([]byte, 4*gcHeadroomBytes)
	runtime.GC()
	tuner := &gcTuner{last: time.Now()} // everything since the start was allocated just now: it is busy
	// What other tests have left alive makes it less.
	if !tuner.tune(tuner.last.Add(time.Millisecond)) || gogc() > 25 {
		t.Errorf("GOGC is %d with %d MiB alive", gogc(), readHeap().live>>20)
	}
	runtime.KeepAlive(held)
}

// TestTuneGCFollowsCollections: the hook and the setting are joined.
func TestTuneGCFollowsCollections(t *testing.T) {
	t.Setenv("GOGC", "")
	defer debug.SetGCPercent(debug.SetGCPercent(37))
	defer tuneGC()()
	hooked := make(chan bool, 1)
	afterEachGC(func() bool { hooked <- true; return false })
	collectUntil(t, hooked)
	for range 1000 { // the hooks of one collection run in any order
		if gogc() != 37 {
			return
		}
		runtime.GC()
	}
	t.Error("GOGC is what it was before")
}

func TestGOGCOfTheUserStays(t *testing.T) {
	t.Setenv("GOGC", "37")
	defer debug.SetGCPercent(debug.SetGCPercent(37))
	defer tuneGC()()
	hooked := make(chan bool, 1)
	afterEachGC(func() bool { hooked <- true; return false })
	collectUntil(t, hooked)
	if now := gogc(); now != 37 {
		t.Errorf("GOGC became %d", now)
	}
}

func TestConnectionCap(t *testing.T) {
	for _, c := range []struct {
		limit uint64
		loops int
		want  int // 0: refused
	}{
		{1024, 1, 512}, {1024, 16, 512}, {1_100_000, 2, 1_099_488}, {527, 1, 0}, {0, 1, 0}, {1<<64 - 1, 256, 1<<31 - 1},
		{1024, 17, 508}, {1024, 64, 320}, {1024, 256, 0}, {4096, 256, 2624},
	} {
		if got, err := connectionCap(c.limit, c.loops); got != c.want || (err == nil) != (c.want > 0) {
			t.Errorf("limit %d, %d loops: got %d, %v; want %d", c.limit, c.loops, got, err, c.want)
		}
	}
}

// TestDescriptorLimitIsRaised holds the runtime to its word: it raises the soft limit to the hard one.
func TestDescriptorLimitIsRaised(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if got, err := descriptorLimit(); err != nil || got != limit.Max {
		t.Errorf("got %d, %v; the hard limit is %d", got, err, limit.Max)
	}
}

func TestLogRedactsSecrets(t *testing.T) {
	for _, format := range []string{"json", "text"} {
		var out bytes.Buffer
		log := newLogger(&out, LogConfig{Level: "debug", Format: format})
		log.Debug("x", "token", "t0p", "user", "alice\x1b[31m", slog.Group("g", slog.String("content", "hush"), slog.String("secret", "s3cr3t")))
		line := out.String()
		for _, leak := range []string{"t0p", "hush", "s3cr3t", "\x1b"} {
			if strings.Contains(line, leak) {
				t.Errorf("%s: %q in %s", format, leak, line)
			}
		}
		if !strings.Contains(line, "alice") || strings.Count(line, "[redacted]") != 3 {
			t.Errorf("%s: %s", format, line)
		}
	}
}

func TestLogLevelAndFormat(t *testing.T) {
	var out bytes.Buffer
	log := newLogger(&out, LogConfig{Level: "warn", Format: "auto"}) // a buffer is no terminal
	log.Info("quiet")
	log.Warn("loud")
	if line := out.String(); strings.Contains(line, "quiet") || !strings.HasPrefix(line, "{") || !strings.Contains(line, `"msg":"loud"`) {
		t.Errorf("got %s", line)
	}
}

func TestDevelopmentSecretIsMadeOnce(t *testing.T) {
	c := defaultConfig()
	c.Data.Dir = filepath.Join(t.TempDir(), "new", "data")
	if _, err := readSecret(c); err == nil || !strings.Contains(err.Error(), "start `millrace serve` once") {
		t.Errorf("reading a secret that is not there: %v", err)
	}
	made, err := openSecret(c)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(c.Data.Dir, "auth.secret"))
	if err != nil || info.Mode() != fs.FileMode(0o600) {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for name, read := range map[string]func(Config) ([]byte, error){"open": openSecret, "read": readSecret} {
		if again, err := read(c); err != nil || !bytes.Equal(again, made) {
			t.Errorf("%s gives another secret, error %v", name, err)
		}
	}
}

func TestConfiguredSecretIsNeverMade(t *testing.T) {
	c := defaultConfig()
	c.Data.Dir = t.TempDir()
	c.Auth.SecretFile = filepath.Join(t.TempDir(), "missing")
	if _, err := openSecret(c); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(c.Auth.SecretFile); err == nil {
		t.Error("a secret was made")
	}
	c.Auth.SecretFile = writeFile(t, "short", "short")
	if _, err := openSecret(c); err == nil {
		t.Error("a short secret is accepted")
	}
}

func TestVersion(t *testing.T) {
	info := &debug.BuildInfo{GoVersion: "go1.26.8"}
	if v := versionOf(info); v != (buildVersion{"devel", "unknown", "go1.26.8"}) {
		t.Errorf("got %+v", v)
	}
	info.Main.Version = "v1.2.3"
	info.Settings = []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}, {Key: "vcs.modified", Value: "true"}}
	if v := versionOf(info); v != (buildVersion{"v1.2.3", "abc-dirty", "go1.26.8"}) {
		t.Errorf("got %+v", v)
	}
}
