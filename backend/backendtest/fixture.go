package backendtest

import (
	"encoding/binary"
	"fmt"
	"sync"
	"testing"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// patience is how long the suite waits for what must come. It is a limit for what hangs, not a measurement.
const patience = 20 * time.Second

// fixture is one opened instance and what its hooks have said.
type fixture struct {
	t *testing.T
	Instance

	mu      sync.Mutex // guards the following
	changed *sync.Cond
	answers []protocol.Answer
	wakes   int
	full    map[mailboxName]bool
	fullLog []string
}

func start(t *testing.T, s Storage, o Options) *fixture {
	t.Helper()
	f := &fixture{t: t, Instance: s(t, o), full: make(map[mailboxName]bool)}
	f.changed = sync.NewCond(&f.mu)
	f.Start(backend.Hooks{Answer: f.answer, Wake: f.wake, MailboxFull: f.mailboxFull})
	return f
}

func (f *fixture) answer(batch []protocol.Answer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers = append(f.answers, batch...)
	f.changed.Broadcast()
}

func (f *fixture) wake(int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wakes++
	f.changed.Broadcast()
}

func (f *fixture) mailboxFull(user, device string, full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full[mailboxName{user, device}] = full
	f.fullLog = append(f.fullLog, fmt.Sprintf("%s/%s %v", user, device, full))
	f.changed.Broadcast()
}

// wait waits until condition, called with mu held, holds.
func (f *fixture) wait(what string, condition func() bool) {
	f.t.Helper()
	late := false
	timer := time.AfterFunc(patience, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		late = true
		f.changed.Broadcast()
	})
	defer timer.Stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for !condition() && !late {
		f.changed.Wait()
	}
	if !condition() {
		f.t.Fatalf("%s did not come within %v", what, patience)
	}
}

func (f *fixture) close() {
	f.t.Helper()
	if err := f.Close(); err != nil {
		f.t.Fatalf("close: %v", err)
	}
}

// age moves the clock and lets the instance grow older with it.
func (f *fixture) age(c *clock, d time.Duration) {
	f.t.Helper()
	c.step(d.Milliseconds())
	if err := f.Age(d); err != nil {
		f.t.Fatalf("age by %v: %v", d, err)
	}
}

// record makes a record from one user to another. Number n tells its id, number and content.
func record(from, to string, n int) *backend.Record {
	r := &backend.Record{
		Message: protocol.Message{
			ID:           messageID(from, n),
			Conversation: protocol.ConversationHash(from, to),
			Sender:       from,
			Receiver:     to,
			Content:      fmt.Appendf(nil, "message %d from %s to %s", n, from, to),
		},
		Device: "phone",
		Epoch:  0xe0e1e2e3e4e5e6e7,
		Seq:    protocol.FirstSeq(1) + uint64(n),
		From:   protocol.Session{Edge: 1, Conn: uint64(n)},
	}
	return r
}

func messageID(from string, n int) (id protocol.MessageID) {
	copy(id[:8], from)
	binary.BigEndian.PutUint64(id[8:], uint64(n))
	return id
}

// append appends records, fails on a refusal, and returns the answers of these records in their order.
func (f *fixture) append(records ...*backend.Record) []protocol.Answer {
	f.t.Helper()
	f.mu.Lock()
	before := len(f.answers)
	f.mu.Unlock()
	for _, r := range records {
		if refusal := f.Append(r); refusal != (protocol.Refusal{}) {
			f.t.Fatalf("append refused: %+v", refusal)
		}
	}
	f.wait("an answer for every record", func() bool { return len(f.answers) >= before+len(records) })
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]protocol.Answer(nil), f.answers[before:]...)
}

// readAll reads every shard until nothing more comes, at most max at a time, and checks order and shard.
func (f *fixture) readAll(max int) map[uint64]*backend.Record {
	f.t.Helper()
	all := make(map[uint64]*backend.Record)
	for shard := range f.Shards() {
		for _, r := range f.read(shard, max) {
			if all[r.Position] != nil {
				f.t.Fatalf("position %d was read twice", r.Position)
			}
			all[r.Position] = r
		}
	}
	return all
}

func (f *fixture) read(shard, max int) []*backend.Record {
	f.t.Helper()
	var list []*backend.Record
	for {
		batch, err := f.Read(shard, nil, max)
		if err != nil {
			f.t.Fatalf("read shard %d: %v", shard, err)
		}
		if len(batch) > max {
			f.t.Fatalf("read returned %d records, at most %d were asked for", len(batch), max)
		}
		if len(batch) == 0 {
			break
		}
		list = append(list, batch...)
	}
	for i, r := range list {
		if i > 0 && r.Position <= list[i-1].Position {
			f.t.Fatalf("shard %d: position %d was read after %d", shard, r.Position, list[i-1].Position)
		}
		if got := int(r.Conversation % uint64(f.Shards())); got != shard {
			f.t.Fatalf("shard %d returned a record of shard %d", shard, got)
		}
	}
	return list
}

// commit commits and waits until it is durable.
func (f *fixture) commit(commits ...*backend.Commit) {
	f.t.Helper()
	done := 0
	for i, c := range commits {
		c.Done = func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if done != i {
				f.t.Errorf("commit %d was done when %d were", i, done)
			}
			done++
			f.changed.Broadcast()
		}
		f.Commit(c)
	}
	f.wait("Done of every commit", func() bool { return done == len(commits) })
}

// registered is the outcome of a registration.
type registered struct {
	Block   uint32
	Heir    bool
	Refusal protocol.Refusal
}

// register asks for all registrations at once and waits for their outcomes.
func (f *fixture) register(streams ...backend.Stream) []registered {
	f.t.Helper()
	results := make([]registered, len(streams))
	done := 0
	for i, s := range streams {
		f.Register(s, func(block uint32, heir bool, refusal protocol.Refusal) {
			f.mu.Lock()
			defer f.mu.Unlock()
			results[i] = registered{block, heir, refusal}
			done++
			f.changed.Broadcast()
		})
	}
	f.wait("the outcome of every registration", func() bool { return done == len(streams) })
	return results
}

// page reads a whole mailbox in pages.
func (f *fixture) page(user, device string, limit int) []*backend.Record {
	f.t.Helper()
	var all []*backend.Record
	var position uint64
	var id protocol.MessageID
	for {
		rows, err := f.MailboxPage(user, device, position, id, limit)
		if err != nil {
			f.t.Fatalf("mailbox page: %v", err)
		}
		if len(rows) > limit {
			f.t.Fatalf("a page of at most %d has %d rows", limit, len(rows))
		}
		all = append(all, rows...)
		if len(rows) < limit {
			return all
		}
		position, id = rows[len(rows)-1].Position, rows[len(rows)-1].ID
	}
}

// same compares what of a record must survive storage.
func (f *fixture) same(what string, got, want *backend.Record) {
	f.t.Helper()
	if got == nil {
		f.t.Fatalf("%s: not there", what)
	}
	g, w := *got, *want
	g.From, g.Resend, g.Content = protocol.Session{}, false, nil
	w.From, w.Resend, w.Content = protocol.Session{}, false, nil
	if fmt.Sprintf("%+v", g) != fmt.Sprintf("%+v", w) || string(got.Content) != string(want.Content) {
		f.t.Fatalf("%s:\n got %+v\nwant %+v", what, *got, *want)
	}
}
