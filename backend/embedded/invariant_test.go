package embedded

import (
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
)

func violationCount(t *testing.T, d *DB, promise string) float64 {
	t.Helper()
	found, count := false, 0.0
	d.Metrics(func(name, _ string, _ bool, value float64, labels ...string) {
		if name == "millrace_embedded_invariant_violations_total" && slices.Equal(labels, []string{"promise", promise}) {
			found, count = true, value
		}
	})
	if !found {
		t.Fatalf("no counter for %s", promise)
	}
	return count
}

// TestAnsweredTooEarlyIsCounted: P1, an answer for what was not synced.
func TestAnsweredTooEarlyIsCounted(t *testing.T) {
	for _, skip := range []bool{false, true} {
		d := open(t, Config{FS: vfs.NewMem(), Shards: 1, skipSyncWait: skip})
		answered := newAnswers()
		d.Start(backend.Hooks{Answer: answered.take})
		d.Append(smallRecord(0))
		answered.wait(1)
		if early := violationCount(t, d, "P1") != 0; early != skip {
			t.Errorf("skip %v: counted %v", skip, early)
		}
	}
}

// TestLostRecordIsCounted: P2, the log no longer holds a record that was accepted and is not finished. It is missed by who
// reads the log, and by who writes a mailbox row from it.
func TestLostRecordIsCounted(t *testing.T) {
	const records = 10
	for _, lose := range []int{0, 1, 3} {
		d := open(t, Config{FS: vfs.NewMem(), Shards: 1, RingRecords: 2})
		answered := newAnswers()
		d.Start(backend.Hooks{Answer: answered.take})
		for n := range records {
			d.Append(smallRecord(n))
		}
		list := answered.wait(records)
		for n := range lose { // two in the ring, the others in the log alone
			if err := d.kv.Delete(appendLogKey(nil, list[4+2*n].Position), pebble.Sync); err != nil {
				t.Fatal(err)
			}
		}
		var read []*backend.Record
		for range 3 {
			var err error
			if read, err = d.Read(0, read, 7); err != nil {
				t.Fatal(err)
			}
			if read, err = d.Read(0, read, 100); err != nil {
				t.Fatal(err)
			}
		}
		if len(read) != records-lose {
			t.Fatalf("read %d records of %d, %d of them lost", len(read), records, lose)
		}
		if got := violationCount(t, d, "P2"); got != float64(lose) {
			t.Errorf("%d lost, %v counted", lose, got)
		}
		if unread := d.shards[0].unreadNow.Load(); unread != 0 {
			t.Errorf("%d lost: %d unread after everything was read", lose, unread)
		}

		if lose > 0 {
			done := make(chan struct{})
			d.Commit(&backend.Commit{Urgent: true, Mailbox: []backend.MailboxPut{{User: "bob", Device: "phone", Position: list[4].Position}},
				Done: func() { close(done) }})
			<-done
			if got := violationCount(t, d, "P2"); got != float64(lose)+1 {
				t.Errorf("%d lost: %v counted after one was missed by a mailbox row", lose, got)
			}
		}
	}
}
