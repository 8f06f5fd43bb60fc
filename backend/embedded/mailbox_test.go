package embedded

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"millrace/backend"
	"millrace/protocol"
)

// TestMailboxLow puts and deletes rows at random, mostly in order as a drain does, sometimes not, and compares every page with a model:
// what the count says about the first row must never hide one.
func TestMailboxLow(t *testing.T) {
	raised := 0
	for seed := range uint64(3) {
		rng := rand.New(rand.NewPCG(seed, 0))
		d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
		d.Start(backend.Hooks{})
		rows := make(map[uint64]*backend.Record)
		next, lastLow := uint64(10_000), uint64(0)
		for range 60 {
			c := &backend.Commit{Urgent: true}
			for range rng.IntN(80) {
				position := next
				if rng.IntN(50) == 0 { // given up late: older than what waits already
					position = 1 + rng.Uint64N(next)
				} else {
					next += 1 + rng.Uint64N(3)
				}
				if rows[position] == nil {
					r := smallRecord(int(position % 1000))
					r.Position = position
					rows[position] = r
					c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Record: r, Position: position})
				}
			}
			held := sortedPositions(rows)
			take := min(rng.IntN(100), len(held))
			if rng.IntN(20) == 0 {
				take = len(held)
			}
			from := 0
			if rng.IntN(4) == 0 {
				from = rng.IntN(len(held) - take + 1)
			}
			for _, position := range held[from : from+take] { // some of them put by this commit
				c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: "bob", Position: position, ID: rows[position].ID})
				delete(rows, position)
			}
			done := make(chan struct{})
			c.Done = func() { close(done) }
			d.Commit(c)
			<-done
			if err := checkCounts(d); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			held = sortedPositions(rows)
			after := rng.Uint64N(next)
			for _, position := range []uint64{0, after} {
				page, err := d.MailboxPage("bob", "", position, protocol.MessageID{0: 0xff}, 1_000_000)
				if err != nil {
					t.Fatal(err)
				}
				var got, want []uint64
				for _, r := range page {
					got = append(got, r.Position)
				}
				for _, p := range held {
					if p > position {
						want = append(want, p)
					}
				}
				if !slices.Equal(got, want) {
					t.Fatalf("seed %d: after %d\n got %v\nwant %v", seed, position, got, want)
				}
			}
			low, some, err := d.mailboxLowLocked("bob", "")
			if err != nil || some != (len(rows) > 0) {
				t.Fatalf("seed %d: a count is there: %v, %d rows, %v", seed, some, len(rows), err)
			}
			if low > lastLow && some {
				raised++
			}
			lastLow = low
		}
		d.closeNow(t)
	}
	if raised < 20 {
		t.Errorf("the first row was found anew %d times", raised)
	}
}

func sortedPositions(rows map[uint64]*backend.Record) []uint64 {
	var list []uint64
	for position := range rows {
		list = append(list, position)
	}
	slices.Sort(list)
	return list
}

// TestMailboxLowFollows: after a drain of half a mailbox a page begins near its first row, so that what was deleted is not
// walked over.
func TestMailboxLowFollows(t *testing.T) {
	d := open(t, Config{FS: vfs.NewMem(), Shards: 1})
	d.Start(backend.Hooks{})
	const rows, each = 2000, 10
	commit := func(c *backend.Commit) {
		done := make(chan struct{})
		c.Urgent, c.Done = true, func() { close(done) }
		d.Commit(c)
		<-done
	}
	c := &backend.Commit{}
	for n := range rows {
		r := smallRecord(n)
		r.Position = uint64(n + 1)
		c.Mailbox = append(c.Mailbox, backend.MailboxPut{User: "bob", Record: r, Position: r.Position})
	}
	commit(c)
	for first := 0; first < rows/2; first += each {
		c := &backend.Commit{}
		for n := first; n < first+each; n++ {
			c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: "bob", Position: uint64(n + 1), ID: smallRecord(n).ID})
		}
		commit(c)
	}
	if low, some, err := d.mailboxLowLocked("bob", ""); err != nil || !some || low > rows/2+1 || low+lowEvery+each < rows/2+1 {
		t.Errorf("the first row is at %d, the count says %d (%v, %v)", rows/2+1, low, some, err)
	}
	// Emptied, it begins anew with the next row.
	c = &backend.Commit{}
	for n := rows / 2; n < rows; n++ {
		c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: "bob", Position: uint64(n + 1), ID: smallRecord(n).ID})
	}
	r := smallRecord(0)
	r.Position = 3 * rows
	commit(c)
	commit(&backend.Commit{Mailbox: []backend.MailboxPut{{User: "bob", Record: r, Position: r.Position}}})
	if low, some, err := d.mailboxLowLocked("bob", ""); err != nil || !some || low != r.Position {
		t.Errorf("the only row is at %d, the count says %d (%v, %v)", r.Position, low, some, err)
	}
	if err := checkCounts(d); err != nil {
		t.Error(err)
	}
}
