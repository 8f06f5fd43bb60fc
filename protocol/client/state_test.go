package client

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"millrace/protocol"
)

func mustOpenState(t *testing.T, path string) (*state, []Item, uint64) {
	t.Helper()
	st, items, highest, err := openState(osDisk{}, path, "phone", epochStart)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.close() })
	return st, items, highest
}

func mustCommit(t *testing.T, st *state, sync bool) {
	t.Helper()
	if err := st.commit(sync); err != nil {
		t.Fatal(err)
	}
}

func mustClose(t *testing.T, st *state) {
	t.Helper()
	if err := st.close(); err != nil {
		t.Fatal(err)
	}
}

func testID(n int) (id protocol.MessageID) {
	id[0], id[1], id[15] = byte(n), byte(n>>8), 7
	return id
}

// shownOn is an id of a message of that time.
func shownOn(id protocol.MessageID, at time.Time) shownID {
	return shownOf(Message{ID: id}, at)
}

// writeStory puts something of every kind into a state, one synced frame each.
func writeStory(t *testing.T, st *state) {
	t.Helper()
	st.setUser("alice")
	mustCommit(t, st, true)
	for i := range 4 {
		st.queued(&Item{Local: uint64(i + 1), Receiver: "bob", Text: fmt.Sprintf("text %d", i+1), QueuedMs: 1000 + int64(i)})
		mustCommit(t, st, true)
	}
	for i := range 2 {
		st.numbered(&Item{Local: uint64(i + 1), Seq: uint64(i + 1)})
		mustCommit(t, st, true)
	}
	st.ended(1)
	st.setReceiptsAfter(77)
	mustCommit(t, st, true)
	for i := range 3 {
		st.showed(shownOn(testID(i), epochStart))
		mustCommit(t, st, true)
	}
}

func TestStateSurvives(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, items, _ := mustOpenState(t, path)
	if len(items) != 0 || st.epoch == 0 {
		t.Fatalf("a new state has %d items and epoch %x", len(items), st.epoch)
	}
	writeStory(t, st)
	epoch := st.epoch
	mustClose(t, st)
	st, items, highest := mustOpenState(t, path)
	want := []Item{
		{Local: 2, Seq: 2, Receiver: "bob", Text: "text 2", QueuedMs: 1001},
		{Local: 3, Receiver: "bob", Text: "text 3", QueuedMs: 1002},
		{Local: 4, Receiver: "bob", Text: "text 4", QueuedMs: 1003},
	}
	if !reflect.DeepEqual(items, want) {
		t.Fatalf("items %+v", items)
	}
	if highest != 2 || st.epoch != epoch || st.user != "alice" || st.receiptsAfter != 77 || st.nextLocal != 5 || st.shown.len() != 3 {
		t.Fatalf("highest %d, epoch %x (want %x), user %q, receipts %d, next %d, shown %d", highest, st.epoch, epoch, st.user, st.receiptsAfter, st.nextLocal, st.shown.len())
	}
}

// TestStateTornAtEveryByte: whatever a power cut leaves of the appended part, the state opens with a prefix of what was
// written, and can be written on.
func TestStateTornAtEveryByte(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	st, _, _ := mustOpenState(t, path)
	snapshot := int(st.snapshot)
	writeStory(t, st)
	mustClose(t, st)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	shown := -1
	for n := 1; n <= len(whole); n++ {
		if n%4 != 0 && n != len(whole) { // the disk is slow, so that three of four are read in memory only
			st := &state{device: "phone", shown: newShownSet(10)}
			if _, _, err := st.replay(whole[:n]); (err == nil) != (n >= snapshot) {
				t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
			}
			continue
		}
		torn := filepath.Join(dir, "torn")
		if err := os.WriteFile(torn, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		st, _, _, err := openState(osDisk{}, torn, "phone", epochStart)
		if n < snapshot {
			// The snapshot was renamed into place whole: a shorter one is damage.
			if !errors.Is(err, ErrStateCorrupt) {
				t.Fatalf("%d bytes of a snapshot of %d: %v", n, snapshot, err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
		}
		if st.shown.len() < shown {
			t.Fatalf("%d bytes: %d ids, fewer than before", n, st.shown.len())
		}
		shown = st.shown.len()
		st.showed(shownOn(testID(99), epochStart))
		mustClose(t, st)
		st, _, _ = mustOpenState(t, torn)
		if !st.shown.has(testID(99)) || st.repaired != 0 {
			t.Fatalf("%d bytes: what was appended after the repair is lost", n)
		}
		mustClose(t, st)
	}
	if shown != 3 {
		t.Fatalf("the whole file has %d ids", shown)
	}
}

// TestStateTornTailDoesNotComeBack: a power cut tears one frame and leaves the next; what is appended after the repair
// ends where the left one began.
func TestStateTornTailDoesNotComeBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	first := st.size
	for i := range 2 {
		st.showed(shownOn(testID(i), epochStart))
		mustCommit(t, st, false)
	}
	mustClose(t, st)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	content[first+frameHeaderBytes] ^= 1
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	st, _, _ = mustOpenState(t, path)
	st.showed(shownOn(testID(2), epochStart)) // as long as the torn one
	mustClose(t, st)
	st, _, _ = mustOpenState(t, path)
	if !st.shown.has(testID(2)) || st.shown.len() != 1 {
		t.Fatalf("%d ids, want only the one after the repair", st.shown.len())
	}
}

// TestStateDamageIsNotATornTail flips every byte: what had been synced when a later frame was written is never dropped in silence.
func TestStateDamageIsNotATornTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	writeStory(t, st)
	lastSynced := int(st.size)
	st.showed(shownOn(testID(50), epochStart))
	mustClose(t, st)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		damaged := bytes.Clone(whole)
		damaged[i] ^= 0x40
		st := &state{device: "phone", shown: newShownSet(10)}
		_, _, err := st.replay(damaged)
		switch {
		case i < lastSynced && !errors.Is(err, ErrStateCorrupt) && !(err != nil && strings.Contains(err.Error(), "another version")):
			t.Fatalf("byte %d of %d: %v, want ErrStateCorrupt", i, len(whole), err)
		case i >= lastSynced && (err != nil || st.shown.has(testID(50))):
			t.Fatalf("byte %d of the last frame: %v", i, err)
		}
	}
}

func TestStateIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	if _, _, _, err := openState(osDisk{}, path, "phone", epochStart); !errors.Is(err, ErrStateLocked) {
		t.Fatalf("a second opening: %v, want ErrStateLocked", err)
	}
	mustClose(t, st)
	mustOpenState(t, path)
}

func TestStateBelongsToOneDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	mustClose(t, st)
	if _, _, _, err := openState(osDisk{}, path, "laptop", epochStart); !errors.Is(err, ErrStateMismatch) {
		t.Fatalf("opened for another device: %v", err)
	}
	mustOpenState(t, path) // the failure gave the lock back
}

func TestStateCompacts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	ob := NewOutbox(10)
	open := Item{Local: 1, Receiver: "bob", Text: "still open", QueuedMs: 5}
	ob.Add(open)
	ob.Connected(protocol.FirstSeq(3))
	st.queued(&open)
	st.numbered(ob.Next(epochStart).Number[0])
	text := strings.Repeat("x", 4000)
	largest := int64(0)
	for local := uint64(2); local < 1000; local++ {
		st.queued(&Item{Local: local, Receiver: "bob", Text: text, QueuedMs: 5})
		st.ended(local)
		st.nextLocal = local + 1
		st.showed(shownOn(testID(int(local)), epochStart))
		st.shown.add(shownOn(testID(int(local)), epochStart))
		mustCommit(t, st, false)
		largest = max(largest, st.size)
		if err := st.compact(ob); err != nil {
			t.Fatal(err)
		}
	}
	if largest > 2*minCompactBytes {
		t.Fatalf("4 MB of ended sends made a file of %d bytes", largest)
	}
	epoch := st.epoch
	mustClose(t, st)
	st, items, highest := mustOpenState(t, path)
	open.Seq = protocol.FirstSeq(3)
	if len(items) != 1 || items[0] != open || highest != open.Seq || st.nextLocal != 1000 || st.epoch != epoch || st.shown.len() != 998 {
		t.Fatalf("items %+v, highest %d, next %d, shown %d", items, highest, st.nextLocal, st.shown.len())
	}
	if _, err := os.Stat(path + temporarySuffix); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the temporary file is still there: %v", err)
	}
}

func TestStateNewEpochForgetsNumbers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	st, _, _ := mustOpenState(t, path)
	st.queued(&Item{Local: 1, Receiver: "bob", Text: "x"})
	st.numbered(&Item{Local: 1, Seq: 900})
	st.ended(1)
	st.setEpoch(42)
	mustClose(t, st)
	st, _, highest := mustOpenState(t, path)
	if st.epoch != 42 || highest != 0 {
		t.Fatalf("epoch %d, highest %d", st.epoch, highest)
	}
}

// failingFile fails once and then pretends that all is well, as a disk does after a lost write.
type failingFile struct {
	stateFile
	failSync, failWrite bool
	syncs               int
}

var errDisk = errors.New("input/output error")

func (f *failingFile) Write(p []byte) (int, error) {
	if f.failWrite {
		f.failWrite = false
		n, _ := f.stateFile.Write(p[:len(p)/2])
		return n, errDisk
	}
	return f.stateFile.Write(p)
}

func (f *failingFile) Sync() error {
	f.syncs++
	if f.failSync {
		f.failSync = false
		return errDisk
	}
	return f.stateFile.Sync()
}

// TestStateFailureIsFinal: after a failed sync the next one would say yes to pages that are gone.
func TestStateFailureIsFinal(t *testing.T) {
	for _, c := range []failingFile{{failSync: true}, {failWrite: true}} {
		st, _, _ := mustOpenState(t, filepath.Join(t.TempDir(), "state"))
		c.stateFile = st.file
		st.file = &c
		st.showed(shownOn(testID(1), epochStart))
		if err := st.commit(true); !errors.Is(err, errDisk) {
			t.Fatalf("commit: %v", err)
		}
		st.showed(shownOn(testID(2), epochStart))
		syncs := c.syncs
		if err := st.commit(true); !errors.Is(err, errDisk) || c.syncs != syncs {
			t.Fatalf("the next commit: %v, %d more syncs", err, c.syncs-syncs)
		}
	}
}

func TestShownSetForgetsTheOldest(t *testing.T) {
	s := newShownSet(3)
	for i := range 5 {
		if !s.add(shownID{testID(i), uint32(i)}) || s.add(shownID{testID(i), uint32(i)}) {
			t.Fatalf("id %d is new once", i)
		}
	}
	if s.has(testID(1)) || !s.has(testID(2)) || s.len() != 3 {
		t.Fatal("not the last three are known")
	}
	s.add(shownID{testID(9), 9})
	var order []protocol.MessageID
	s.each(func(e shownID) { order = append(order, e.id) })
	if !reflect.DeepEqual(order, []protocol.MessageID{testID(3), testID(4), testID(9)}) {
		t.Fatalf("order %v", order)
	}
}

// TestStateForgetsIdsAfterAYear: a year by the clocks of the server and of this machine; one of them wrong forgets nothing.
func TestStateForgetsIdsAfterAYear(t *testing.T) {
	day := func(n int) time.Time { return epochStart.Add(time.Duration(n) * 24 * time.Hour) }
	message := func(n int, sent time.Time) Message {
		return Message{ID: testID(n), Position: uint64(sent.UnixMilli()) << protocol.PositionShift}
	}
	for name, c := range map[string]struct {
		acknowledged time.Time // all of them, by this machine
		opened       time.Time
		forgotten    bool // the first of three, which is more than a year older than the last
	}{
		"right":                        {day(1), day(shownDays + 40), true},
		"in 1970 when acknowledging":   {time.UnixMilli(5), day(shownDays + 40), true},
		"in 1970 when opening":         {day(1), time.UnixMilli(5), false},
		"before 1970":                  {time.UnixMilli(-5), time.UnixMilli(-5), false},
		"far ahead when acknowledging": {day(40_000), day(shownDays - 1), false},
		"far ahead":                    {day(40_000), day(40_000), true},
	} {
		path := filepath.Join(t.TempDir(), "state")
		st, _, _ := mustOpenState(t, path)
		for i, sent := range []time.Time{day(0), day(30), day(shownDays + 1)} {
			st.showed(shownOf(message(i, sent), c.acknowledged))
		}
		mustClose(t, st)
		st, _, _, err := openState(osDisk{}, path, "phone", c.opened)
		if err != nil {
			t.Fatal(err)
		}
		if st.shown.has(testID(0)) == c.forgotten || !st.shown.has(testID(1)) || !st.shown.has(testID(2)) {
			t.Errorf("the clock is %s: %d ids are left", name, st.shown.len())
		}
		mustClose(t, st)
	}
}

// FuzzStateRecords: whatever stands in a frame whose checksum is right, reading it ends with a state or an error.
func FuzzStateRecords(f *testing.F) {
	it := &Item{Local: 3, Seq: 9, Receiver: "bob", Text: "x", QueuedMs: 5}
	b := appendIdentity(nil, "phone", "alice")
	b = appendQueued(b, it)
	b = appendRecord(b, recNumbered, it.Local, it.Seq)
	b = appendShown(b, shownID{testID(1), 7})
	b = appendRecord(b, recReceiptsAfter, 77)
	b = appendRecord(b, recCounters, 4, 9)
	f.Add(b)
	f.Add(appendRecord(b, recEnded, it.Local))
	f.Add(b[:len(b)-1])
	f.Fuzz(func(t *testing.T, records []byte) {
		st := &state{device: "phone", shown: newShownSet(10)}
		r := replayer{st: st, open: make(map[uint64]*Item)}
		err := r.apply(records)
		if st.shown.len() > 10 || len(r.items()) > len(records) || err == nil && len(records) > 0 && records[0] > recCounters {
			t.Fatalf("%x: %v, %d ids, %d items", records, err, st.shown.len(), len(r.items()))
		}
	})
}

// FuzzStateFile: no file makes opening panic or hang.
func FuzzStateFile(f *testing.F) {
	st := &state{path: "x", device: "phone", nextLocal: 1, epoch: 9, shown: newShownSet(10)}
	whole := st.snapshotBytes(nil, 0)
	f.Add(whole)
	f.Add(whole[:len(whole)-3])
	f.Add(append(whole, 1, 2, 3))
	f.Fuzz(func(t *testing.T, content []byte) {
		st := &state{device: "phone", shown: newShownSet(10)}
		_, _, err := st.replay(content)
		if err == nil && (st.size < int64(stateHeaderBytes) || st.size+st.repaired != int64(len(content))) {
			t.Fatalf("size %d, repaired %d of %d", st.size, st.repaired, len(content))
		}
	})
}
