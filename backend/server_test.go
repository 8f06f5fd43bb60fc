package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"millrace/protocol"
)

// patience is a limit for what hangs, not a measurement.
const patience = 20 * time.Second

// rig is a Server between a twin and an edge that writes down what it is told.
type rig struct {
	*twin
	*Server
	t     *testing.T
	hooks Hooks

	edge          sync.Mutex // guards the following
	changed       *sync.Cond
	calls         []string
	pushes        []protocol.Push
	receipts      []protocol.ReceiptPush
	answers       []protocol.Answer
	pages         []protocol.Page
	receiptsPages []protocol.ReceiptsPage
	fences        []protocol.Fence
	logged        bytes.Buffer
	now           time.Time
}

func newRig(t *testing.T, change func(c *Config)) *rig {
	t.Helper()
	return newRigOn(t, newTwin(), change)
}

func newRigOn(t *testing.T, w *twin, change func(c *Config)) *rig {
	t.Helper()
	r := &rig{t: t, twin: w, now: time.UnixMilli(5000)}
	r.changed = sync.NewCond(&r.edge)
	w.onCommit = func() { r.told(func() {}) }
	cfg := Config{Queue: w, Store: w, Locator: w, Pusher: r, Identity: identitySecret(),
		Answer:       func(batch []protocol.Answer) { r.told(func() { r.answers = append(r.answers, batch...) }) },
		Page:         func(page protocol.Page) { r.told(func() { r.pages = append(r.pages, page) }) },
		ReceiptsPage: func(page protocol.ReceiptsPage) { r.told(func() { r.receiptsPages = append(r.receiptsPages, page) }) },
		Fenced:       func(f protocol.Fence) { r.told(func() { r.fences = append(r.fences, f) }) },
		Now:          r.clock,
		Logger:       slog.New(slog.NewTextHandler(&lockedWriter{rig: r}, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.Server, err = NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	r.hooks = r.Server.Hooks()
	return r
}

func (r *rig) told(what func()) {
	r.edge.Lock()
	defer r.edge.Unlock()
	what()
	r.changed.Broadcast()
}

type lockedWriter struct{ rig *rig }

func (w *lockedWriter) Write(p []byte) (n int, err error) {
	w.rig.told(func() { n, err = w.rig.logged.Write(p) })
	return n, err
}

func (r *rig) clock() time.Time {
	r.edge.Lock()
	defer r.edge.Unlock()
	return r.now
}

func (r *rig) passes(d time.Duration) { r.told(func() { r.now = r.now.Add(d) }) }

func (r *rig) Push(batch []protocol.Push) {
	r.told(func() {
		r.pushes = append(r.pushes, batch...)
		for _, p := range batch {
			r.calls = append(r.calls, fmt.Sprintf("push %s to %s", p.Message.Content, r.names[p.To]))
		}
	})
}

func (r *rig) Notify(batch []protocol.Session) {
	r.told(func() {
		for _, s := range batch {
			r.calls = append(r.calls, "notice to "+r.names[s])
		}
	})
}

func (r *rig) Receipts(batch []protocol.ReceiptPush) {
	r.told(func() {
		r.receipts = append(r.receipts, batch...)
		for _, p := range batch {
			r.calls = append(r.calls, fmt.Sprintf("receipt %d to %s", p.Position, r.names[p.To]))
		}
	})
}

// await waits until condition, called with edge held, holds.
func (r *rig) await(what string, condition func() bool) {
	r.t.Helper()
	late := false
	timer := time.AfterFunc(patience, func() { r.told(func() { late = true }) })
	defer timer.Stop()
	r.edge.Lock()
	defer r.edge.Unlock()
	for !condition() && !late {
		r.changed.Wait()
	}
	if late {
		r.t.Fatalf("%s did not come within %v", what, patience)
	}
}

// publish hands in a send of alice's phone, whose content is its number.
func (r *rig) publish(to string, n uint32) protocol.Refusal {
	return r.Publish(&protocol.Submission{From: protocol.Session{Edge: 1, Conn: 99}, User: []byte("alice"), Device: []byte("phone"),
		Epoch: 1, Seq: seqOf(0, n), Receiver: []byte(to), Content: fmt.Append(nil, n)})
}

// settleDisk makes everything durable that was handed to the twin, and reports it.
func (r *rig) settleDisk() {
	if records := r.sync(); len(records) > 0 {
		answers := make([]protocol.Answer, len(records))
		for i, record := range records {
			answers[i] = protocol.Answer{To: record.From, Seq: record.Seq, ID: record.ID, Position: record.Position}
		}
		r.hooks.Answer(answers)
		r.hooks.Wake(0)
	}
	for r.durable() {
	}
}

func (r *rig) settle(kind protocol.OutcomeKind, user, device string, pushes ...protocol.Push) {
	var batch []protocol.Outcome
	for _, p := range pushes {
		batch = append(batch, protocol.Outcome{Kind: kind, UserMailbox: device == "", Conversation: p.Message.Conversation, Position: p.Message.Position,
			ID: p.Message.ID, User: []byte(user), Device: []byte(device)})
	}
	r.Settle(batch)
}

// steps runs rounds until one has nothing more to do.
func (r *rig) steps() {
	for r.Step(0) {
	}
}

func (r *rig) wantCalls(want ...string) {
	r.t.Helper()
	r.edge.Lock()
	defer r.edge.Unlock()
	if !slices.Equal(r.calls, want) {
		r.t.Fatalf("the edge was told\n  %s\nwant\n  %s", strings.Join(r.calls, "\n  "), strings.Join(want, "\n  "))
	}
	r.calls = nil
}

func (r *rig) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.commits)
}

func (r *rig) metric(name string, labels ...string) float64 {
	r.t.Helper()
	found, value := false, 0.0
	r.Metrics(func(n, _ string, _ bool, v float64, l ...string) {
		if n == "millrace_backend_"+name && slices.Equal(l, labels) {
			found, value = true, v
		}
	})
	if !found {
		r.t.Fatalf("no metric %s %v", name, labels)
	}
	return value
}

func (r *rig) lines(text string) int {
	r.edge.Lock()
	defer r.edge.Unlock()
	return strings.Count(r.logged.String(), text)
}

func TestServerStep(t *testing.T) {
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.bind("alice", "phone", true)
	content := []byte("hello")
	sub := &protocol.Submission{From: protocol.Session{Edge: 1, Conn: 2}, User: []byte("alice"), Device: []byte("phone"), Epoch: 1,
		Seq: seqOf(0, 1), Receiver: []byte("bob"), Content: content}
	if refusal := r.Publish(sub); refusal != (protocol.Refusal{}) {
		t.Fatalf("refused: %+v", refusal)
	}
	for _, b := range [][]byte{sub.User, sub.Device, sub.Receiver, content} {
		clear(b) // they are the caller's again
	}
	r.steps()
	r.wantCalls()
	r.settleDisk()
	want := r.identity.MessageID(Stream{"alice", "phone", 1}, ConversationKey("bob", "alice"), seqOf(0, 1))
	if len(r.answers) != 1 || r.answers[0].ID != want || r.answers[0].To != sub.From {
		t.Fatalf("answers %+v", r.answers)
	}
	r.steps()
	r.wantCalls("push hello to bob/phone:1")
	if m := r.pushes[0].Message; m.Sender != "alice" || m.Receiver != "bob" || m.ID != want || m.Conversation != protocol.ConversationHash("bob", "alice") {
		t.Fatalf("pushed %+v", m)
	}
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes...)
	r.steps()
	r.wantCalls()
	if r.waiting() != 1 {
		t.Fatalf("%d commits", r.waiting())
	}
	r.settleDisk()
	r.steps()
	r.wantCalls("receipt 10 to alice/phone:2")
	if got := r.metric("in_flight", "shard", "0"); got != 0 {
		t.Errorf("%v in flight", got)
	}
}

// TestServerOrderOfActions: a notice leaves before the pushes of the same round.
func TestServerOrderOfActions(t *testing.T) {
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.publish("bob", 1)
	r.settleDisk()
	r.steps()
	r.bind("bob", "phone", true)
	r.publish("bob", 2)
	r.settleDisk()
	r.steps()
	r.wantCalls("notice to bob/phone:1", "push 2 to bob/phone:1")
}

func TestServerFlush(t *testing.T) {
	r := newRig(t, nil)
	r.Start()
	defer r.Close()
	ended, end := context.WithCancel(context.Background())
	end()
	patient, stop := context.WithTimeout(context.Background(), patience)
	defer stop()
	if err := r.Flush(patient); err != nil {
		t.Fatalf("with nothing to do: %v", err)
	}
	r.publish("bob", 1) // who has no device
	r.sync()
	r.hooks.Wake(0)
	r.await("a commit", func() bool { return r.waiting() > 0 })
	// What it wants stored is not durable, however often one asks.
	for range 3 {
		if err := r.Flush(ended); !errors.Is(err, context.Canceled) {
			t.Fatalf("flushed with a commit under way: %v", err)
		}
	}
	r.durable()
	if err := r.Flush(patient); err != nil {
		t.Fatal(err)
	}
	if r.waiting() != 0 || len(r.mailboxes[mailboxName{"bob", ""}]) != 1 {
		t.Errorf("after the flush %d commits wait, the mailbox holds %d rows", r.waiting(), len(r.mailboxes[mailboxName{"bob", ""}]))
	}
}

// TestServerFlushUnsettled: an outcome that could not be settled is not stored.
func TestServerFlushUnsettled(t *testing.T) {
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.publish("bob", 1)
	r.settleDisk()
	r.steps()
	r.fail("receipt", true)
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes...)
	r.steps()
	if _, idle := r.shards[0].progress(); idle {
		t.Error("idle with an acknowledgement that was not settled")
	}
	r.fail("receipt", false)
	r.steps()
	r.settleDisk()
	r.steps()
	if _, idle := r.shards[0].progress(); !idle {
		t.Error("not idle with everything done")
	}
	if row := r.twin.receipts[ReceiptKey{"alice", ConversationKey("alice", "bob"), "bob"}]; row.Delivered.Position != 10 {
		t.Errorf("receipt %+v", row)
	}
}

func TestServerCaughtUp(t *testing.T) {
	w := newTwin()
	for n := range uint32(takeRecords + 1) {
		w.Append(&Record{Message: protocol.Message{Sender: "alice", Receiver: "bob", ID: protocol.MessageID{byte(n), byte(n >> 8)}},
			Device: "phone", Epoch: 1, Seq: seqOf(0, n+1)})
	}
	w.sync()
	r := newRigOn(t, w, nil)
	if r.CaughtUp() {
		t.Fatal("caught up before the first round")
	}
	if !r.Step(0) || r.CaughtUp() {
		t.Fatal("caught up with a record that was not read")
	}
	r.fail("log", true)
	if r.Step(0) || r.CaughtUp() {
		t.Fatal("caught up when the log could not be read")
	}
	r.fail("log", false)
	if r.Step(0) || !r.CaughtUp() {
		t.Fatal("not caught up at the end of the log")
	}
	if got := r.metric("records_taken_total", "shard", "0"); got != takeRecords+1 {
		t.Errorf("%v records taken", got)
	}
}

// TestServerReplayEnds: once the log was read to its end, what drains of rows from before the start acknowledge is settled, though no
// record of theirs will come.
func TestServerReplayEnds(t *testing.T) {
	r := newRig(t, nil)
	row := &Record{Message: protocol.Message{Conversation: protocol.ConversationHash("alice", "bob"), Position: 7000, Sender: "alice", Receiver: "bob"},
		Device: "phone", Epoch: 1, Seq: seqOf(0, 1)}
	r.mailboxes[mailboxName{"bob", "phone"}] = []*Record{row}
	r.fail("log", true)
	r.settle(protocol.Acknowledged, "bob", "phone", protocol.Push{Message: &row.Message})
	r.steps()
	if r.waiting() != 0 {
		t.Fatal("settled although the log may hold its record")
	}
	r.fail("log", false)
	r.steps() // reads to the end
	r.steps()
	r.settleDisk()
	if rows := r.mailboxes[mailboxName{"bob", "phone"}]; len(rows) != 0 {
		t.Errorf("%d rows are left in the mailbox", len(rows))
	}
}

// TestServerReadErrors: what cannot be read is tried again at each round, and logged once in a hundred.
func TestServerReadErrors(t *testing.T) {
	for _, read := range []string{"log", "window", "devices"} {
		t.Run(read, func(t *testing.T) {
			r := newRig(t, nil)
			r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
			r.bind("bob", "phone", true)
			r.publish("bob", 1)
			r.publish("bob", 2)
			r.settleDisk()
			r.fail(read, true)
			for range 250 {
				if r.Step(0) {
					t.Fatal("wants to go on at once")
				}
			}
			r.wantCalls()
			if _, idle := r.shards[0].progress(); idle && read != "log" {
				t.Error("idle with records that were not taken")
			}
			if got := r.lines("delivery waits"); got != 3 {
				t.Errorf("logged %d times, want 3:\n%s", got, r.logged.String())
			}
			r.fail(read, false)
			r.steps()
			r.wantCalls("push 1 to bob/phone:1", "push 2 to bob/phone:1")
			r.fail(read, true) // a new row of failures is logged at once
			r.publish("carol", 3)
			r.settleDisk()
			r.steps()
			if got := r.lines("delivery waits"); got != 4 {
				t.Errorf("logged %d times after it had healed, want 4", got)
			}
		})
	}
}

// TestServerCommitsWaiting: while commits are under way only mailbox rows start another, and at four not even these.
func TestServerCommitsWaiting(t *testing.T) {
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	for n := range uint32(3) {
		r.publish("bob", n+1)
	}
	r.settleDisk()
	r.steps()
	for n := range 3 {
		r.settle(protocol.Acknowledged, "bob", "phone", r.pushes[n])
		r.steps()
		if r.waiting() != 1 {
			t.Fatalf("%d commits after acknowledgement %d, want one", r.waiting(), n+1)
		}
	}
	for n := range uint32(6) {
		r.publish(fmt.Sprint("nobody", n), 10+n)
		r.sync()
		r.steps()
		if want := min(2+int(n), maxCommitsWaiting); r.waiting() != want {
			t.Fatalf("%d commits after mailbox row %d, want %d", r.waiting(), n+1, want)
		}
	}
	r.durable()
	r.steps()
	if r.waiting() != maxCommitsWaiting {
		t.Fatalf("%d commits after one of four has ended", r.waiting())
	}
	// The one that ended was the acknowledgement of the first; what was gathered came with the others.
	for r.waiting() > 0 {
		r.durable()
		r.steps()
	}
	if got := r.metric("commits_total", "shard", "0"); got != 5 {
		t.Errorf("%v commits, want 5", got)
	}
	for n := range 6 {
		if rows := r.mailboxes[mailboxName{fmt.Sprint("nobody", n), ""}]; len(rows) != 1 {
			t.Errorf("nobody%d has %d rows", n, len(rows))
		}
	}
}

func TestServerFence(t *testing.T) {
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	fence := func(n uint64) protocol.Fence { return protocol.Fence{Edge: 1, Loop: 2, Number: n} }
	wantFences := func(want int) {
		t.Helper()
		if len(r.fences) != want || want > 0 && r.fences[want-1] != fence(uint64(want)) {
			t.Fatalf("fences %v, want %d of them", r.fences, want)
		}
	}
	r.Fence(fence(1)) // behind nothing
	r.steps()
	wantFences(1)

	r.publish("bob", 1)
	r.publish("bob", 2)
	r.settleDisk()
	r.steps()
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes[0])
	r.Fence(fence(2))
	r.steps()
	wantFences(1) // not durable
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes[1])
	r.Fence(fence(3))
	r.steps()
	r.durable()
	r.steps()
	wantFences(2)
	r.durable()
	r.steps()
	wantFences(3)

	// One that cannot be settled holds back those behind it.
	r.publish("bob", 3)
	r.settleDisk()
	r.steps()
	r.settle(protocol.Lost, "bob", "phone", r.pushes[2])
	r.steps()
	r.settleDisk()
	r.steps()
	r.fail("mailbox", true)
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes[2])
	r.Fence(fence(4))
	for range 3 {
		r.steps()
		r.settleDisk()
	}
	wantFences(3)
	r.fail("mailbox", false)
	r.steps()
	wantFences(3)
	r.settleDisk()
	r.steps()
	wantFences(4)
}

// TestServerClose: what was not committed is delivered again by the next Server on the same data.
func TestServerClose(t *testing.T) {
	w := newTwin()
	r := newRigOn(t, w, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.Start()
	r.publish("bob", 1)
	r.settleDisk()
	r.await("a push", func() bool { return len(r.pushes) == 1 })
	r.Close()

	w.commits, w.read = nil, 0
	r = newRigOn(t, w, nil)
	r.Start()
	r.await("the same push", func() bool { return len(r.pushes) == 1 })
	r.settle(protocol.Acknowledged, "bob", "phone", r.pushes...)
	r.await("a commit", func() bool { return r.waiting() > 0 })
	r.durable()
	r.Close()
	window := w.windows[WindowKey{ConversationKey("alice", "bob"), Stream{"alice", "phone", 1}}]
	if !window.Finished(seqOf(0, 1)) {
		t.Error("the message is not finished")
	}
}

// TestServerClock: no receipt is dated before NotBeforeMs, nor before an earlier one when the clock is set back.
func TestServerClock(t *testing.T) {
	r := newRig(t, func(c *Config) { c.NotBeforeMs = 1_000_000 })
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.bind("alice", "phone", true)
	var dates []int64
	for n, step := range []time.Duration{0, 300 * time.Millisecond, -200 * time.Millisecond, 250 * time.Millisecond} {
		r.passes(step)
		r.publish("bob", uint32(n)+1)
		r.settleDisk()
		r.steps()
		r.settle(protocol.Acknowledged, "bob", "phone", r.pushes[n])
		r.steps()
		r.settleDisk()
		r.steps()
		dates = append(dates, r.receipts[n].Millis)
	}
	if want := []int64{1_000_000, 1_000_300, 1_000_300, 1_000_350}; !slices.Equal(dates, want) {
		t.Errorf("receipts dated %v, want %v", dates, want)
	}
}

func TestServerAcknowledgeAfter(t *testing.T) {
	r := newRig(t, func(c *Config) { c.AcknowledgeAfter = 700 * time.Millisecond })
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.publish("bob", 1)
	r.settleDisk()
	r.steps()
	r.passes(699 * time.Millisecond)
	r.steps()
	if r.waiting() != 0 {
		t.Fatal("given up early")
	}
	r.passes(time.Millisecond)
	r.steps()
	r.settleDisk()
	r.steps()
	r.wantCalls("push 1 to bob/phone:1", "notice to bob/phone:1")
}

func TestServerMailboxFull(t *testing.T) {
	r := newRig(t, nil)
	full := protocol.Refusal{Code: protocol.CodeMailboxFull}
	r.hooks.MailboxFull("bob", "phone", true)
	r.hooks.MailboxFull("bob", "", true)
	if got := r.publish("bob", 1); got != full {
		t.Errorf("to a full mailbox: %+v", got)
	}
	if got := r.publish("carol", 2); got != (protocol.Refusal{}) {
		t.Errorf("to somebody else: %+v", got)
	}
	resend := &protocol.Submission{User: []byte("alice"), Device: []byte("phone"), Epoch: 1, Seq: seqOf(0, 1), Resend: true, Receiver: []byte("bob"), Content: []byte("x")}
	if got := r.Publish(resend); got != (protocol.Refusal{}) {
		t.Errorf("a resend to a full mailbox: %+v", got)
	}
	if got := r.metric("full_mailboxes"); got != 1 {
		t.Errorf("%v users with a full mailbox, want 1", got)
	}
	r.hooks.MailboxFull("bob", "", false)
	if got := r.publish("bob", 3); got != full {
		t.Errorf("with one of two mailboxes still full: %+v", got)
	}
	r.hooks.MailboxFull("bob", "phone", false)
	if got := r.publish("bob", 4); got != (protocol.Refusal{}) {
		t.Errorf("after it has been drained: %+v", got)
	}
	if got := r.metric("full_mailboxes"); got != 0 {
		t.Errorf("%v users with a full mailbox, want none", got)
	}
}

// TestReadMailboxPage: an heir reads the user mailbox first and then its own; each page goes on where the last ended.
func TestReadMailboxPage(t *testing.T) {
	w := newTwin()
	put := func(device string, positions ...uint64) {
		for _, position := range positions {
			w.mailboxes[mailboxName{"bob", device}] = append(w.mailboxes[mailboxName{"bob", device}],
				&Record{Message: protocol.Message{Position: position, ID: protocol.MessageID{byte(position)}, Receiver: "bob"}})
		}
	}
	put("", 1, 2, 3)
	put("phone", 2, 4)
	for _, c := range []struct {
		heir  bool
		limit int
		want  string // pages; u is a row of the user mailbox
	}{
		{true, 1, "u1|u2|u3|2|4|."},
		{true, 2, "u1 u2|u3 2|4."},
		{true, 3, "u1 u2 u3|2 4."},
		{true, 4, "u1 u2 u3 2|4."},
		{true, 5, "u1 u2 u3 2 4|."},
		{true, 6, "u1 u2 u3 2 4."},
		{false, 1, "2|4|."},
		{false, 2, "2 4|."},
		{false, 9, "2 4."},
	} {
		var pages []string
		var after protocol.MailboxCursor
		for {
			session := protocol.Session{Edge: 1, Conn: 5}
			p, err := ReadMailboxPage(w, &protocol.PageRequest{Session: session, User: "bob", Device: "phone", Heir: c.heir, After: after, Limit: c.limit})
			if err != nil || p.To != session || p.After != after || p.Refusal != (protocol.Refusal{}) {
				t.Fatalf("page %+v, %v", p, err)
			}
			var rows []string
			for _, row := range p.Rows {
				name := fmt.Sprint(row.Message.Position)
				if row.UserMailbox {
					name = "u" + name
				}
				rows = append(rows, name)
			}
			page := strings.Join(rows, " ")
			if p.End {
				pages = append(pages, page+".")
				break
			}
			pages, after = append(pages, page), p.Next
		}
		if got := strings.Join(pages, "|"); got != c.want {
			t.Errorf("heir %v, limit %d: pages %s, want %s", c.heir, c.limit, got, c.want)
		}
	}
}

// TestReadReceiptsPage: receipts come in the order in which they changed, whatever the order of the store, each once.
func TestReadReceiptsPage(t *testing.T) {
	w := newTwin()
	put := func(n int, ms int64, position uint64) {
		k := ReceiptKey{"alice", fmt.Sprintf("c%03d", n), "bob"}
		w.receipts[k] = ReceiptRow{ReceiptKey: k, Delivered: Mark{Position: position}, ChangedMs: ms}
	}
	const rows = 500
	for n := range rows {
		put(n, 100+int64(n*7919%97), uint64(n+1)) // many at one time
	}
	put(900, 99, 1)  // older
	put(901, 150, 0) // nothing but acknowledgements beyond a hole
	for _, limit := range []int{1, 3, 64, rows, rows + 1} {
		seen := map[uint64]bool{}
		last := protocol.ReceiptCursor{Millis: 100}
		for after := last; ; after = last {
			p, err := ReadReceiptsPage(w, &protocol.ReceiptsRequest{User: "alice", After: after, Limit: limit})
			if err != nil || len(p.Receipts) > limit {
				t.Fatalf("%d receipts, %v", len(p.Receipts), err)
			}
			for _, r := range p.Receipts {
				if r.Millis < last.Millis || seen[r.Position] {
					t.Fatalf("limit %d: position %d of %d ms comes after %d ms, seen %v", limit, r.Position, r.Millis, last.Millis, seen[r.Position])
				}
				seen[r.Position], last.Millis = true, r.Millis
			}
			if last = p.Next; p.End {
				break
			}
			if len(p.Receipts) != limit {
				t.Fatalf("a page of %d is not the last", len(p.Receipts))
			}
		}
		if len(seen) != rows {
			t.Fatalf("limit %d: %d of %d receipts", limit, len(seen), rows)
		}
	}
}

// TestServerMailbox: pages are read by the Server's readers; one that cannot be read says when to ask again.
func TestServerMailbox(t *testing.T) {
	r := newRig(t, nil)
	session := r.bind("alice", "phone", false)
	k := ReceiptKey{"alice", "c", "u"}
	r.twin.receipts[k] = ReceiptRow{ReceiptKey: k, Delivered: Mark{Position: 5}, ChangedMs: 100}
	r.mailboxes[mailboxName{"alice", "phone"}] = []*Record{{Message: protocol.Message{Position: 7, Receiver: "alice"}}}

	r.Start()
	defer r.Close()
	receipts := protocol.ReceiptsRequest{Session: session, User: "alice", After: protocol.ReceiptCursor{Millis: 100}, Limit: 10}
	r.ReadReceipts(receipts)
	r.await("receipts", func() bool { return len(r.receiptsPages) == 1 })
	if p := r.receiptsPages[0]; len(p.Receipts) != 1 || !p.End || p.Receipts[0].To != session || p.Receipts[0].Position != 5 {
		t.Errorf("page of receipts %+v", p)
	}
	r.ReadPage(protocol.PageRequest{Session: session, User: "alice", Device: "phone", Limit: 10})
	r.await("a page", func() bool { return len(r.pages) == 1 })
	if p := r.pages[0]; len(p.Rows) != 1 || !p.End || p.Code != protocol.OK {
		t.Errorf("page %+v", p)
	}
	r.fail("mailbox", true)
	r.ReadPage(protocol.PageRequest{Session: session, User: "alice", Device: "phone", Limit: 10})
	r.await("a failed page", func() bool { return len(r.pages) == 2 })
	if p := r.pages[1]; len(p.Rows) != 0 || p.Code != protocol.CodeInternal || p.RetryAfterMs == 0 {
		t.Errorf("page that cannot be read: %+v", p)
	}
	r.fail("receipts", true)
	r.ReadReceipts(receipts)
	r.await("a failed page of receipts", func() bool { return len(r.receiptsPages) == 2 })
	if p := r.receiptsPages[1]; len(p.Receipts) != 0 || p.Code != protocol.CodeInternal || p.RetryAfterMs == 0 {
		t.Errorf("page of receipts that cannot be read: %+v", p)
	}
	if r.lines("mailbox page not read") != 1 || r.lines("page of receipts not read") != 1 {
		t.Errorf("log: %s", r.logged.String())
	}
}

// TestServerNames: the names in outcomes are shared, and never more than the limit.
func TestServerNames(t *testing.T) {
	r := newRig(t, nil)
	out := func(n int) []protocol.Outcome {
		return []protocol.Outcome{{Kind: protocol.Lost, User: fmt.Append(nil, "user", n), Device: []byte("phone")}}
	}
	for n := range maxInterned + 10 {
		r.Settle(out(n))
		if names := len(r.shards[0].names); names > maxInterned {
			t.Fatalf("%d names after %d outcomes", names, n+1)
		}
	}
	if names := len(r.shards[0].names); names > 20 {
		t.Errorf("%d names after the limit was reached", names)
	}
	batch := out(1)
	r.Settle(batch)
	clear(batch[0].User) // it is the caller's again
	r.steps()
	if got := r.metric("outcomes_ignored_total", "shard", "0"); got != maxInterned+11 {
		t.Errorf("%v outcomes seen", got)
	}
}

func TestServerViolations(t *testing.T) {
	r := newRig(t, nil)
	want := map[string]float64{"P3": 0, "P4": 0, "P5": 0, "P6": 0, "P7": 0}
	wantCounts := func() {
		t.Helper()
		for promise, n := range want {
			if got := r.metric("invariant_violations_total", "promise", promise); got != n {
				t.Errorf("%s: %v, want %v", promise, got, n)
			}
		}
	}
	wantCounts()

	// P6: a code that helps to try again goes with a time, and no other does.
	for _, c := range []struct {
		protocol.Refusal
		broken bool
	}{
		{protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: 500}, false},
		{protocol.Refusal{Code: protocol.CodeBadRequest}, false},
		{protocol.Refusal{Code: protocol.CodeOverloaded}, true},
		{protocol.Refusal{Code: protocol.CodeBadRequest, RetryAfterMs: 500}, true},
	} {
		r.refusal = c.Refusal
		if got := r.publish("bob", 1); got != c.Refusal {
			t.Errorf("publish says %+v, the queue says %+v", got, c.Refusal)
		}
		r.hooks.Answer([]protocol.Answer{{Refusal: c.Refusal}, {}})
		if c.broken {
			want["P6"] += 2
		}
	}
	wantCounts()

	// The counts of an owner are published with its rounds, and each is logged.
	r.refusal = protocol.Refusal{}
	r.publish("bob", 5)
	r.settleDisk()
	r.steps()
	for n, position := range []uint64{4, 3} {
		r.log = append(r.log, &Record{Message: protocol.Message{Sender: "alice", Receiver: "bob", Position: position}, Device: "phone", Epoch: 1, Seq: seqOf(0, uint32(n)+1)})
	}
	r.steps()
	r.steps() // says nothing more
	want["P4"] = 2
	wantCounts()
	if got := r.lines("a promise is broken"); got != 1 || r.lines("promise=P4 times=2") != 1 {
		t.Errorf("logged %d times:\n%s", got, r.logged.String())
	}
}

func TestServerMetrics(t *testing.T) {
	r := newRig(t, nil)
	seen := map[string]bool{}
	r.Metrics(func(name, help string, counter bool, value float64, labels ...string) {
		id := name + strings.Join(labels, ",")
		if seen[id] || help == "" || len(labels)%2 != 0 || !strings.HasPrefix(name, "millrace_backend_") || counter != strings.HasSuffix(name, "_total") {
			t.Errorf("metric %s %v, counter %v, %q", name, labels, counter, help)
		}
		seen[id] = true
	})
	for reason := range mailboxReasons {
		if r.metric("mailbox_writes_total", "reason", reason.String(), "shard", "0") != 0 {
			t.Error("a new server has written to mailboxes")
		}
	}
}

func TestConfigValidate(t *testing.T) {
	w := newTwin()
	whole := Config{Queue: w, Store: w, Locator: w, Pusher: &rig{}, Identity: identitySecret(), Answer: func([]protocol.Answer) {},
		Page: func(protocol.Page) {}, ReceiptsPage: func(protocol.ReceiptsPage) {}, Fenced: func(protocol.Fence) {}}
	if _, err := NewServer(whole); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(c *Config){
		"Queue": func(c *Config) { c.Queue = nil }, "Store": func(c *Config) { c.Store = nil }, "Locator": func(c *Config) { c.Locator = nil },
		"Pusher": func(c *Config) { c.Pusher = nil }, "Answer": func(c *Config) { c.Answer = nil }, "Page": func(c *Config) { c.Page = nil },
		"ReceiptsPage": func(c *Config) { c.ReceiptsPage = nil },
		"Fenced":       func(c *Config) { c.Fenced = nil }, "Identity": func(c *Config) { c.Identity = nil },
	} {
		broken := whole
		change(&broken)
		if _, err := NewServer(broken); err == nil {
			t.Errorf("a Server without %s", name)
		}
	}
	if _, err := NewOwner(OwnerConfig{Locator: w}); err == nil {
		t.Error("an Owner without Reader")
	}
	if _, err := NewOwner(OwnerConfig{Reader: w}); err == nil {
		t.Error("an Owner without Locator")
	}
}

// TestServerConcurrent: several publishers, a disk and an edge with goroutines of their own; every message is pushed once and finished.
func TestServerConcurrent(t *testing.T) {
	const senders, each = 4, 200
	r := newRig(t, nil)
	r.Register(Stream{"bob", "phone", 1}, func(uint32, bool, protocol.Refusal) {})
	r.bind("bob", "phone", true)
	r.Start()
	stop := make(chan struct{})
	var helpers, publishers sync.WaitGroup
	helpers.Go(func() { // the disk
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				r.settleDisk()
			}
		}
	})
	helpers.Go(func() { // the edge
		for done := 0; done < senders*each; {
			r.await("pushes", func() bool { return len(r.pushes) > done })
			r.edge.Lock()
			batch := slices.Clone(r.pushes[done:])
			r.edge.Unlock()
			r.settle(protocol.Acknowledged, "bob", "phone", batch...)
			r.Fence(protocol.Fence{Number: uint64(done)})
			done += len(batch)
		}
	})
	for sender := range senders {
		publishers.Go(func() {
			user := fmt.Append(nil, "sender", sender)
			for n := range uint32(each) {
				r.Publish(&protocol.Submission{User: user, Device: []byte("phone"), Epoch: 1, Seq: seqOf(0, n+1), Receiver: []byte("bob"), Content: []byte("x")})
				if n%50 == 0 {
					r.metric("in_flight", "shard", "0")
					r.CaughtUp()
				}
			}
		})
	}
	publishers.Wait()
	r.await("every push", func() bool { return len(r.pushes) >= senders*each })
	r.await("every fence", func() bool { return len(r.fences) > 0 && r.fences[len(r.fences)-1].Number+uint64(1) <= senders*each })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		if err := r.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		if r.metric("acknowledgements_total", "shard", "0") == senders*each {
			break
		}
	}
	close(stop)
	helpers.Wait()
	r.Close()
	seen := map[protocol.MessageID]bool{}
	for _, p := range r.pushes {
		if seen[p.Message.ID] {
			t.Fatalf("message %s was pushed twice", p.Message.ID)
		}
		seen[p.Message.ID] = true
	}
	for sender := range senders {
		user := fmt.Sprint("sender", sender)
		w := r.windows[WindowKey{ConversationKey(user, "bob"), Stream{user, "phone", 1}}]
		for n := range uint32(each) {
			if !w.Finished(seqOf(0, n+1)) {
				t.Fatalf("number %d of %s is not finished", n+1, user)
			}
		}
	}
	for promise := PromiseOnce; promise < promises; promise++ {
		if n := r.metric("invariant_violations_total", "promise", promise.String()); n != 0 {
			t.Errorf("%v violations of %s", n, promise)
		}
	}
}
