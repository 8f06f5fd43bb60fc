package embedded

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// open opens a directory and closes it when the test ends.
func open(t *testing.T, cfg Config) *DB {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = "/data"
	}
	d, err := Open(cfg)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("close: %v", err)
		}
	})
	return d
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	d := open(t, Config{Dir: dir, MinFreeBytes: 1})
	for _, name := range []string{dir, filepath.Join(dir, "..", filepath.Base(dir))} {
		_, err := Open(Config{Dir: name, MinFreeBytes: 1})
		if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) {
			t.Fatalf("second open: %v, want ErrLocked with the directory", err)
		}
	}
	d.Start(backend.Hooks{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, Config{Dir: dir, MinFreeBytes: 1})
}

// TestHoldDirectory is the other process of TestSecondProcessIsRefused.
func TestHoldDirectory(t *testing.T) {
	dir := os.Getenv("EMBEDDED_TEST_HOLD")
	if dir == "" {
		return // the ordinary run: there is no other process to play
	}
	open(t, Config{Dir: dir, MinFreeBytes: 1})
	fmt.Println("held")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
}

func TestSecondProcessIsRefused(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run", "^TestHoldDirectory$")
	cmd.Env = append(os.Environ(), "EMBEDDED_TEST_HOLD="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("the other process said %q, %v", line, err)
	}
	_, err = Open(Config{Dir: dir, MinFreeBytes: 1})
	if !errors.Is(err, ErrLocked) {
		t.Errorf("open while another process holds the directory: %v", err)
	}
	_ = in.Close()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the other process: %v", err)
	}
	open(t, Config{Dir: dir, MinFreeBytes: 1})
}

// TestNewDirectoriesSurviveAPowerCut: P1, the directories that Open makes are as durable as what is answered in them, also if
// a start before was killed between making some and syncing them.
func TestNewDirectoriesSurviveAPowerCut(t *testing.T) {
	const dir = "/var/lib/chat/millrace"
	for _, made := range []string{"", "/var", "/var/lib/chat"} {
		fs := vfs.NewCrashableMem()
		if made != "" {
			if err := makeDir(fs, fs.PathDir(made)); err != nil {
				t.Fatal(err)
			}
			if err := fs.MkdirAll(made, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		d := open(t, Config{Dir: dir, FS: fs, Shards: 1})
		a := newAnswers()
		d.Start(backend.Hooks{Answer: a.take})
		d.Append(smallRecord(0))
		a.wait(1)
		d = open(t, Config{Dir: dir, FS: fs.CrashClone(vfs.CrashCloneCfg{}), Shards: 1})
		if n := d.shards[0].unreadNow.Load(); n != 1 {
			t.Errorf("with %q there: %d answered records after a power cut, want 1", made, n)
		}
	}
}

// TestDirectoryInAnUnreadableOne: what lies around a directory that was there need not be readable.
func TestDirectoryInAnUnreadableOne(t *testing.T) {
	fs := &closedFS{FS: vfs.NewMem(), closed: "/"}
	if err := fs.MkdirAll("/srv", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/srv/chat/data", "/srv"} {
		open(t, Config{Dir: dir, FS: fs, Shards: 1})
	}
}

// closedFS has a directory that cannot be opened.
type closedFS struct {
	vfs.FS
	closed string
}

func (f *closedFS) OpenDir(name string) (vfs.File, error) {
	if name == f.closed {
		return nil, os.ErrPermission
	}
	return f.FS.OpenDir(name)
}

func (f *closedFS) Unwrap() vfs.FS { return f.FS }

func TestIdentityIsMadeOnce(t *testing.T) {
	fs := vfs.NewCrashableMem()
	d := open(t, Config{FS: fs})
	identity := d.Identity()
	if identity == [32]byte{} {
		t.Fatal("the identity secret is all zero")
	}
	crashed := fs.CrashClone(vfs.CrashCloneCfg{})
	if again := open(t, Config{FS: crashed}); again.Identity() != identity {
		t.Fatal("the identity secret was not durable when Open returned")
	}
	if other := open(t, Config{FS: vfs.NewMem()}); other.Identity() == identity {
		t.Fatal("two directories have the same identity secret")
	}
}

func TestOtherFormatIsRefused(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"millrace data format 3\n", "format 3"},
		{"millrace data format 0\n", "does not say"},
		{"something else", "does not say"},
		{"", "does not say"},
	} {
		fs := vfs.NewMem()
		open(t, Config{FS: fs}).closeNow(t)
		f, err := fs.Create("/data/FORMAT", vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write([]byte(c.text)); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
		_, err = Open(Config{Dir: "/data", FS: fs})
		if !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("FORMAT %q: %v, want ErrFormat with %q", c.text, err, c.want)
		}
		// The refusal left no lock behind.
		if _, err := Open(Config{Dir: "/data", FS: fs}); errors.Is(err, ErrLocked) {
			t.Errorf("FORMAT %q: %v", c.text, err)
		}
	}
}

// TestFormat1IsTakenOver: what a directory of format 1 holds is there, goes on as it would have, and belongs to this format from then on.
func TestFormat1IsTakenOver(t *testing.T) {
	fs := vfs.NewMem()
	open(t, Config{FS: fs}).closeNow(t) // for Pebble's files
	o := pebbleOptions(fs, slog.New(slog.DiscardHandler), os.Exit, &stallCounts{})
	kv, err := pebble.Open("/data/db", o)
	if err != nil {
		t.Fatal(err)
	}
	const position = 1_692_841_226_860 << protocol.PositionShift
	r := smallRecord(0)
	r.AcceptedMs = protocol.PositionMillis(position)
	be := binary.BigEndian
	identity := bytes.Repeat([]byte{7}, 32)
	stream := r.Stream()
	for _, row := range []struct{ key, value []byte }{
		{keyIdentity, identity},
		{keyState, be.AppendUint64(be.AppendUint64([]byte{1}, position), 2)},
		{appendLogKey(nil, position), appendRecord(nil, r)},
		{appendMailboxKey(nil, "bob", "phone", 5, &r.ID), appendRecord(nil, r)},
		{appendMailboxKey(nil, "bob", "phone", 9, &r.ID), appendRecord(nil, r)},
		{appendMailboxName(nil, rangeCounts, "bob", "phone"), be.AppendUint32([]byte{1}, 2)},
		{appendStreamKey(nil, &stream), []byte{1, 0, 0, 0, 4, 0x4c, 0x8a}},
		{appendDevicesKey(nil, "alice"), append([]byte{1, 1, 5}, "phone"...)},
	} {
		if err := kv.Set(row.key, row.value, pebble.Sync); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(kv.Delete(keyFullLimit, pebble.Sync), kv.Close()); err != nil {
		t.Fatal(err)
	}
	f, err := fs.Create("/data/FORMAT", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write([]byte("millrace data format 1\n"))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}

	for again := range 2 {
		d := open(t, Config{FS: fs, Shards: 1, MailboxRows: 2})
		full := make(chan string, 1)
		d.Start(backend.Hooks{MailboxFull: func(user, device string, _ bool) { full <- user + "/" + device }})
		if got := <-full; got != "bob/phone" {
			t.Errorf("the full mailbox is %s", got)
		}
		if id := d.Identity(); !bytes.Equal(id[:], identity) {
			t.Error("the identity has changed")
		}
		if records, err := d.Read(0, nil, 10); err != nil || len(records) != 1 || records[0].Position != position {
			t.Errorf("the log: %v, %v", records, err)
		}
		if page, err := d.MailboxPage("bob", "phone", 5, protocol.MessageID{0: 0xff}, 10); err != nil || len(page) != 1 || page[0].Position != 9 {
			t.Errorf("the mailbox: %v, %v", page, err)
		}
		drawn := make(chan uint32)
		d.Register(stream, func(block uint32, heir bool, _ protocol.Refusal) { drawn <- block })
		if block := <-drawn; block != uint32(4+again) {
			t.Errorf("block %d was drawn, want %d", block, 4+again)
		}
		if err := checkCounts(d); err != nil {
			t.Error(err)
		}
		d.closeNow(t)
		if text, err := readFile(fs, "/data/FORMAT"); err != nil || string(text) != "millrace data format 2\n" {
			t.Errorf("FORMAT says %q, %v", text, err)
		}
	}
}

// TestLastMs: receipts may be dated long after the last message, and all of it may be gone from the log.
func TestLastMs(t *testing.T) {
	fs := vfs.NewMem()
	d := open(t, Config{FS: fs, Shards: 1})
	if d.LastMs() != 0 {
		t.Fatalf("an empty store has the time %d", d.LastMs())
	}
	a := newAnswers()
	d.Start(backend.Hooks{Answer: a.take})
	d.Append(smallRecord(0))
	position := a.wait(1)[0].Position
	d.closeNow(t)
	d = open(t, Config{FS: fs, Shards: 1})
	if d.builder.last != position || d.LastMs() != protocol.PositionMillis(position) {
		t.Fatalf("last position %d, time %d; want %d", d.builder.last, d.LastMs(), position)
	}
	changed := protocol.PositionMillis(position) + 3_600_000
	d.Start(backend.Hooks{})
	for _, ms := range []int64{changed, changed - 5} {
		d.Commit(&backend.Commit{Receipts: []backend.ReceiptRow{{
			ReceiptKey: backend.ReceiptKey{Sender: "a", Conversation: "c", Addressee: "b"}, ChangedMs: ms,
			Delivered: backend.Mark{Position: position},
		}}})
	}
	d.closeNow(t)
	if d = open(t, Config{FS: fs, Shards: 1}); d.LastMs() != changed {
		t.Fatalf("the last receipt was at %d, the time is %d", changed, d.LastMs())
	}
}

func (d *DB) closeNow(t *testing.T) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []Config{{}, {Dir: "x", Shards: -1}, {Dir: "x", Shards: maxShards + 1}, {Dir: "x", MaxUnread: -1}, {Dir: "x", MailboxRows: 1 << 33}} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v was taken", cfg)
		}
	}
	cfg := Config{Dir: "x"}
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	if cfg.Shards < 1 || cfg.Shards > maxDefaultShards || cfg.MaxWaitingSends != 65_536 || cfg.MaxWaitingBytes != 64<<20 || cfg.MaxUnread != 200_000 || cfg.MailboxRows != 100_000 {
		t.Errorf("defaults: %+v", cfg)
	}
}

func TestReadsAfterCloseFail(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem()})
	d.Start(backend.Hooks{})
	d.closeNow(t)
	if _, err := d.Devices("alice"); !errors.Is(err, ErrClosed) {
		t.Errorf("Devices: %v", err)
	}
	if _, err := d.MailboxPage("alice", "", 0, [16]byte{}, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("MailboxPage: %v", err)
	}
	if err := d.Healthy(); !errors.Is(err, ErrClosed) {
		t.Errorf("Healthy: %v", err)
	}
	if err := d.Close(); !errors.Is(err, ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	d.Metrics(func(string, string, bool, float64, ...string) {})
	d.Commit(&backend.Commit{Done: func() { t.Error("a commit after Close is done") }})
}

func TestMetricsAreWellFormed(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem()})
	d.Start(backend.Hooks{})
	seen := make(map[string]bool)
	d.Metrics(func(name, help string, counter bool, _ float64, labels ...string) {
		if !strings.HasPrefix(name, "millrace_embedded_") || help == "" || len(labels)%2 != 0 {
			t.Errorf("metric %q, help %q, labels %q", name, help, labels)
		}
		if strings.HasSuffix(name, "_total") != counter {
			t.Errorf("metric %s: counter is %v", name, counter)
		}
		key := name + strings.Join(labels, ",")
		if seen[key] {
			t.Errorf("metric %s %q comes twice", name, labels)
		}
		seen[key] = true
	})
	if len(seen) < 20 {
		t.Errorf("%d metrics", len(seen))
	}
}
