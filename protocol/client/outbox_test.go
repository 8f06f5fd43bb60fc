package client

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"millrace/protocol"
)

// TestOutboxKeepsItsRules drives an Outbox against a model of a server that loses connections, refuses and
// holds streams back, and checks after every write what makes a resend safe.
func TestOutboxKeepsItsRules(t *testing.T) {
	for seed := range uint64(60) {
		w := newOutboxWorld(t, seed)
		w.run()
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// outboxWorld is the Outbox, a server, two pipes between them, and what was seen.
type outboxWorld struct {
	t   *testing.T
	rng *rand.Rand
	now time.Time
	box *Outbox

	local     uint64
	texts     map[uint64]string // local → text
	outcomes  map[uint64]int    // local → how often it ended
	contents  map[uint64]string // number → text
	durable   map[uint64]bool   // number → accepted by the server
	arrived   []uint64          // locals in the order of first acceptance
	localOf   map[uint64]uint64 // number → local
	block     uint32
	connected bool
	first     uint64
	open      map[uint64]bool // written on this connection, not ended
	toServer  []uint64
	toClient  []outboxAnswer
	held      bool
	heldFrom  uint64
	healed    bool
}

type outboxAnswer struct {
	seq, resendFrom uint64
	code            protocol.Code
	retryMs         uint32
}

func newOutboxWorld(t *testing.T, seed uint64) *outboxWorld {
	return &outboxWorld{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), now: time.UnixMilli(1_700_000_000_000), box: NewOutbox(500),
		texts: map[uint64]string{}, outcomes: map[uint64]int{}, contents: map[uint64]string{},
		durable: map[uint64]bool{}, localOf: map[uint64]uint64{}, open: map[uint64]bool{},
	}
}

func (w *outboxWorld) run() {
	for range 600 {
		w.step()
	}
	w.healed = true
	for i := 0; w.box.Len() > 0; i++ {
		if i > 20_000 {
			w.t.Errorf("%d sends never ended after healing", w.box.Len())
			return
		}
		w.step()
	}
	for local := uint64(1); local <= w.local; local++ {
		if w.outcomes[local] != 1 {
			w.t.Errorf("send %d ended %d times", local, w.outcomes[local])
		}
	}
	if !slices.IsSorted(w.arrived) {
		w.t.Errorf("accepted in the order %v", w.arrived)
	}
	if len(slices.Compact(slices.Clone(w.arrived))) != len(w.arrived) {
		w.t.Errorf("accepted twice: %v", w.arrived)
	}
}

func (w *outboxWorld) step() {
	w.now = w.now.Add(time.Duration(w.rng.IntN(40)) * time.Millisecond)
	switch n := w.rng.IntN(100); {
	case n < 30 && !w.healed:
		for range 1 + w.rng.IntN(20) {
			w.add()
		}
	case n < 33 && !w.healed:
		w.disconnect()
	case n < 36 && !w.healed:
		w.restart()
	case n < 50 && !w.connected:
		w.connect()
	case n < 52 && !w.healed && w.local > 0:
		w.withdraw(1 + w.rng.Uint64N(w.local))
	case n < 75:
		w.serve()
	default:
		w.answer()
	}
	w.pump()
}

func (w *outboxWorld) add() {
	w.local++
	text := fmt.Sprintf("text %d", w.local)
	if !w.box.Add(Item{Local: w.local, Receiver: "bob", Text: text, QueuedMs: w.now.UnixMilli()}) {
		w.local--
		return
	}
	w.texts[w.local] = text
}

func (w *outboxWorld) withdraw(local uint64) {
	if w.box.Withdraw(local) {
		w.outcomes[local]++
		if w.outcomes[local] > 1 {
			w.t.Errorf("send %d was withdrawn after its end", local)
		}
	}
}

func (w *outboxWorld) connect() {
	w.first = protocol.FirstSeq(w.block)
	w.block++
	w.connected, w.held = true, false
	clear(w.open)
	w.box.Connected(w.first)
}

func (w *outboxWorld) disconnect() {
	if !w.connected {
		return
	}
	// What is in the pipe may still be taken by the server; its answers are lost.
	for len(w.toServer) > 0 && w.rng.IntN(2) == 0 {
		w.serve()
	}
	w.connected, w.toServer, w.toClient = false, nil, nil
	w.box.Disconnected()
}

// restart is a client that starts again from what it has stored.
func (w *outboxWorld) restart() {
	w.disconnect()
	var items []Item
	w.box.Items(func(it *Item) bool { items = append(items, *it); return true })
	highest := w.box.Highest()
	w.box = NewOutbox(500)
	w.box.Restore(items, highest)
}

func (w *outboxWorld) pump() {
	step := w.box.Next(w.now)
	if step.NewEpoch {
		w.t.Error("asks for a new epoch though the server never went back")
	}
	if !slices.IsSorted(seqs(step.Write)) {
		w.t.Errorf("written in the order %v", seqs(step.Write))
	}
	for _, it := range step.Write {
		w.written(it)
	}
	if step.Reconnect != "" {
		w.disconnect()
	}
}

func (w *outboxWorld) written(it *Item) {
	if was, ok := w.contents[it.Seq]; ok && was != it.Text {
		w.t.Errorf("number %d for %q and %q", it.Seq, was, it.Text)
	}
	w.contents[it.Seq], w.localOf[it.Seq] = it.Text, it.Local
	if it.Seq >= w.first {
		for seq := range w.open {
			if seq < w.first {
				w.t.Errorf("new number %d while the earlier %d is open", it.Seq, seq)
			}
		}
	}
	w.open[it.Seq] = true
	for seq := range w.open {
		if max(seq, it.Seq)-min(seq, it.Seq) >= protocol.MaxOpenSpan {
			w.t.Errorf("%d and %d are open together", seq, it.Seq)
		}
	}
	w.toServer = append(w.toServer, it.Seq)
}

// serve lets the server take one send.
func (w *outboxWorld) serve() {
	if len(w.toServer) == 0 {
		return
	}
	seq := w.toServer[0]
	w.toServer = w.toServer[1:]
	if w.held && seq > w.heldFrom {
		w.toClient = append(w.toClient, outboxAnswer{seq, w.heldFrom, protocol.CodeRateLimited, 20})
		return
	}
	w.held = false
	switch n := w.rng.IntN(20); {
	case n == 0 && !w.healed:
		w.held, w.heldFrom = true, seq
		w.toClient = append(w.toClient, outboxAnswer{seq, seq, protocol.CodeOverloaded, 1 + uint32(w.rng.IntN(200))})
	case w.localOf[seq]%17 == 0: // a final refusal depends on the bytes alone
		w.toClient = append(w.toClient, outboxAnswer{seq, 0, protocol.CodeContentTooLong, 0})
	default:
		if !w.durable[seq] {
			w.durable[seq] = true
			w.arrived = append(w.arrived, w.localOf[seq])
		}
		w.toClient = append(w.toClient, outboxAnswer{seq: seq})
	}
}

// answer lets the client take one answer.
func (w *outboxWorld) answer() {
	if len(w.toClient) == 0 {
		return
	}
	a := w.toClient[0]
	w.toClient = w.toClient[1:]
	var it *Item
	if a.code == 0 {
		it = w.box.Received(a.seq)
	} else {
		it = w.box.Refused(a.seq, a.code, a.retryMs, a.resendFrom, w.now)
	}
	if it == nil {
		return
	}
	delete(w.open, a.seq)
	if it.Seq != a.seq || it.Text != w.texts[it.Local] {
		w.t.Errorf("the answer to %d ended %+v", a.seq, it)
	}
	w.outcomes[it.Local]++
	if w.outcomes[it.Local] > 1 {
		w.t.Errorf("send %d ended twice", it.Local)
	}
}

func seqs(items []*Item) (list []uint64) {
	for _, it := range items {
		list = append(list, it.Seq)
	}
	return list
}

func wantSeqs(t *testing.T, what string, items []*Item, want ...uint64) {
	t.Helper()
	if !slices.Equal(seqs(items), want) {
		t.Fatalf("%s: %v, want %v", what, seqs(items), want)
	}
}

var epochStart = time.UnixMilli(1_700_000_000_000)

func outboxWith(n int) *Outbox {
	o := NewOutbox(1000)
	for i := range n {
		o.Add(Item{Local: uint64(i + 1), Receiver: "bob", Text: "x", QueuedMs: epochStart.UnixMilli()})
	}
	return o
}

func TestOutboxNumbersOnlyOnAConnection(t *testing.T) {
	o := outboxWith(2)
	if step := o.Next(epochStart); len(step.Number)+len(step.Write) != 0 {
		t.Fatalf("offline: %+v", step)
	}
	o.Connected(1)
	step := o.Next(epochStart)
	wantSeqs(t, "numbered", step.Number, 1, 2)
	wantSeqs(t, "written", step.Write, 1, 2)
	if o.Next(epochStart).Write != nil && len(o.Next(epochStart).Write) != 0 {
		t.Fatal("written twice on one connection")
	}
	o.Disconnected()
	o.Add(Item{Local: 3, QueuedMs: epochStart.UnixMilli()})
	o.Connected(protocol.FirstSeq(1))
	step = o.Next(epochStart)
	wantSeqs(t, "numbered with earlier open", step.Number)
	wantSeqs(t, "resent", step.Write, 1, 2)
	o.Received(1)
	wantSeqs(t, "one still open", o.Next(epochStart).Write)
	o.Received(2)
	wantSeqs(t, "new ones at last", o.Next(epochStart).Write, protocol.FirstSeq(1))
}

// TestOutboxEarlierNumbersEndFirst: at the seam of two blocks the span alone would let a new number through.
func TestOutboxEarlierNumbersEndFirst(t *testing.T) {
	o := outboxWith(1)
	o.Connected(1)
	o.next = protocol.MaxSend
	wantSeqs(t, "the last of the block", o.Next(epochStart).Write, protocol.MaxSend)
	o.Disconnected()
	o.Add(Item{Local: 2, QueuedMs: epochStart.UnixMilli()})
	o.Connected(protocol.FirstSeq(1))
	wantSeqs(t, "the resend alone", o.Next(epochStart).Write, protocol.MaxSend)
	o.Received(protocol.MaxSend)
	wantSeqs(t, "then the new one", o.Next(epochStart).Write, protocol.FirstSeq(1))
}

func TestOutboxSpan(t *testing.T) {
	o := outboxWith(200)
	o.Connected(1)
	if n := len(o.Next(epochStart).Write); n != protocol.MaxOpenSpan {
		t.Fatalf("%d written, want %d", n, protocol.MaxOpenSpan)
	}
	for seq := uint64(2); seq <= protocol.MaxOpenSpan; seq++ {
		o.Received(seq)
	}
	wantSeqs(t, "the lowest is open", o.Next(epochStart).Write)
	o.Received(1)
	if n := len(o.Next(epochStart).Write); n != protocol.MaxOpenSpan {
		t.Fatalf("%d written after the lowest ended, want %d", n, protocol.MaxOpenSpan)
	}
}

func TestOutboxRetryableRefusalStopsTheStream(t *testing.T) {
	o := outboxWith(4)
	o.Connected(1)
	o.Next(epochStart)
	o.Received(1)
	if o.Refused(2, protocol.CodeRateLimited, 250, 2, epochStart) != nil {
		t.Fatal("a retryable refusal ended the send")
	}
	o.Add(Item{Local: 5, QueuedMs: epochStart.UnixMilli()})
	late := epochStart.Add(time.Second)
	wantSeqs(t, "refusals of 3 and 4 are still on their way", o.Next(late).Write)
	o.Refused(3, protocol.CodeRateLimited, 250, 2, late)
	o.Refused(4, protocol.CodeRateLimited, 250, 2, late)
	step := o.Next(late)
	wantSeqs(t, "before the delay", step.Write)
	if want := late.Add(250 * time.Millisecond); !step.Wake.Equal(want) {
		t.Fatalf("wakes at %v, want %v", step.Wake, want)
	}
	wantSeqs(t, "after the delay", o.Next(late.Add(250*time.Millisecond)).Write, 2, 3, 4, 5)
}

func TestOutboxWindowExceededEndsNothing(t *testing.T) {
	o := outboxWith(2)
	o.Connected(1)
	o.Next(epochStart)
	if o.Refused(2, protocol.CodeWindowExceeded, 0, 0, epochStart) != nil {
		t.Fatal("window_exceeded ended the send")
	}
	wantSeqs(t, "later", o.Next(epochStart.Add(windowRetryAfter)).Write, 2)
}

func TestOutboxFinalRefusalEndsOne(t *testing.T) {
	o := outboxWith(3)
	o.Connected(1)
	o.Next(epochStart)
	it := o.Refused(2, protocol.CodeMailboxFull, 0, 0, epochStart)
	if it == nil || it.Local != 2 {
		t.Fatalf("ended %+v, want send 2", it)
	}
	if o.Refused(2, protocol.CodeMailboxFull, 0, 0, epochStart) != nil {
		t.Fatal("ended twice")
	}
	if o.Len() != 2 {
		t.Fatalf("%d open, want 2", o.Len())
	}
}

// TestOutboxMailboxFullIsRead: the first new number after mailbox_full shows that it was read.
func TestOutboxMailboxFullIsRead(t *testing.T) {
	o := outboxWith(3)
	o.Connected(1)
	o.Next(epochStart)
	o.Add(Item{Local: 4})
	o.Refused(1, protocol.CodeMailboxFull, 0, 0, epochStart)
	if step := o.Next(epochStart); len(step.Write) != 0 {
		t.Fatalf("%d is written while 2 and 3 are open", step.Write[0].Seq)
	}
	o.Refused(2, protocol.CodeMailboxFull, 0, 0, epochStart)
	o.Received(3)
	wantSeqs(t, "after both refusals", o.Next(epochStart).Write, 3+protocol.MaxOpenSpan)
	o.Received(3 + protocol.MaxOpenSpan)
	o.Add(Item{Local: 5})
	wantSeqs(t, "then", o.Next(epochStart).Write, 4+protocol.MaxOpenSpan)
}

// TestOutboxServerWaitsForAnEndedNumber: the server refuses everything until a number comes that never will.
func TestOutboxServerWaitsForAnEndedNumber(t *testing.T) {
	o := outboxWith(2)
	o.Connected(1)
	o.Next(epochStart)
	o.Received(1)
	o.Refused(2, protocol.CodeOverloaded, 100, 1, epochStart)
	if o.Next(epochStart).Reconnect == "" {
		t.Fatal("waits for ever")
	}
}

func TestOutboxAnswerTimeout(t *testing.T) {
	o := outboxWith(1)
	o.Connected(1)
	step := o.Next(epochStart)
	if want := epochStart.Add(AnswerTimeout); !step.Wake.Equal(want) {
		t.Fatalf("wakes at %v, want %v", step.Wake, want)
	}
	if step = o.Next(step.Wake); step.Reconnect == "" {
		t.Fatal("an unanswered send does not ask for a new connection")
	}
}

func TestOutboxBlockUsedUp(t *testing.T) {
	o := outboxWith(3)
	o.Connected(protocol.FirstSeq(0))
	o.next = protocol.MaxSend // the last of the block
	wantSeqs(t, "the last number", o.Next(epochStart).Write, protocol.MaxSend)
	if step := o.Next(epochStart); step.Reconnect != "" || len(step.Write) != 0 {
		t.Fatalf("with an open number: %+v", step)
	}
	o.Received(protocol.MaxSend)
	if o.Next(epochStart).Reconnect == "" {
		t.Fatal("goes on without numbers")
	}
}

func TestOutboxGoingAwayStopsNewNumbers(t *testing.T) {
	o := outboxWith(1)
	o.Connected(1)
	o.Next(epochStart)
	o.GoingAway()
	o.Add(Item{Local: 2, QueuedMs: epochStart.UnixMilli()})
	wantSeqs(t, "going away", o.Next(epochStart).Write)
	o.Received(1)
	o.Disconnected()
	o.Connected(protocol.FirstSeq(1))
	wantSeqs(t, "back", o.Next(epochStart).Write, protocol.FirstSeq(1))
}

// TestOutboxServerRestoredFromBackup: a server that counts from below used numbers gets no new number under this epoch.
func TestOutboxServerRestoredFromBackup(t *testing.T) {
	o := outboxWith(3)
	o.Connected(protocol.FirstSeq(5))
	o.Next(epochStart)
	o.Received(protocol.FirstSeq(5))
	o.Disconnected()
	o.Add(Item{Local: 4, QueuedMs: epochStart.UnixMilli()})
	o.Connected(protocol.FirstSeq(2))
	step := o.Next(epochStart)
	wantSeqs(t, "what is open", step.Write, protocol.FirstSeq(5)+1, protocol.FirstSeq(5)+2)
	o.Received(protocol.FirstSeq(5) + 1)
	if o.Next(epochStart).NewEpoch {
		t.Fatal("asks for a new epoch while a number is open")
	}
	o.Received(protocol.FirstSeq(5) + 2)
	step = o.Next(epochStart)
	if !step.NewEpoch || len(step.Write) != 0 {
		t.Fatalf("got %+v, want a new epoch and no number", step)
	}
	o.ResetEpoch()
	o.Disconnected()
	o.Connected(1)
	wantSeqs(t, "under the new epoch", o.Next(epochStart).Write, 1)
}

func TestOutboxHandsBackAfterThirtyDays(t *testing.T) {
	o := outboxWith(2)
	o.Connected(1)
	o.Next(epochStart)
	o.Add(Item{Local: 3, QueuedMs: epochStart.Add(time.Hour).UnixMilli()})
	due := epochStart.Add(UnansweredAfter)
	if !o.NextExpiry().Equal(due) {
		t.Fatalf("next expiry %v, want %v", o.NextExpiry(), due)
	}
	if got := o.Expire(due.Add(-time.Millisecond)); len(got) != 0 {
		t.Fatalf("expired early: %v", seqs(got))
	}
	wantSeqs(t, "expired", o.Expire(due), 1, 2)
	if o.Len() != 1 || o.Next(due).Reconnect == "" {
		t.Fatal("the connection on which the numbers were given must be left: the server may wait for them")
	}
}

func TestOutboxIsBounded(t *testing.T) {
	o := NewOutbox(2)
	for i := range 2 {
		if !o.Add(Item{Local: uint64(i)}) {
			t.Fatal("refused below the limit")
		}
	}
	if o.Add(Item{Local: 3}) {
		t.Fatal("took one over the limit")
	}
}
