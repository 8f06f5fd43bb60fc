package edge

import (
	"sync"

	"millrace/protocol"
)

const (
	// inboxBytes bounds what waits for a loop: beyond it pushes are refused and receipts dropped. Notices are one bit
	// a session, answers are bounded by the sends and pages by the requests: those are always taken.
	inboxBytes = 16 << 20
	// inboxKeep is the capacity, in entries, that an emptied list keeps.
	inboxKeep = 8192
	// pushBytes is what a push costs besides its content: itself, and the message it points to.
	pushBytes = 160
	// receiptBytes is what a receipt costs, names included.
	receiptBytes = 160
)

// inbox is how other goroutines reach a loop: values, not closures; one wake-up when it becomes non-empty. The order of
// arrival is kept.
type inbox struct {
	mu      sync.Mutex
	closed  bool
	filling inboxBatch
	bytes   int    // of the pushes and receipts in filling
	dropped uint64 // receipts

	draining inboxBatch // owned by the loop
}

// inboxBatch is what came between two turns. Entries of a kind stand together; runs say in which order they came.
type inboxBatch struct {
	runs       []run
	answers    []protocol.Answer
	pushes     []protocol.Push
	refused    []protocol.Push // over the budget: nothing is written, the owner is told
	notices    []protocol.Session
	receipts   []protocol.ReceiptPush
	pages      []protocol.Page
	registered []protocol.Registered
	replaced   []protocol.Session
	fences     []protocol.Fence
}

type inboxKind uint8

const (
	inboxAnswer inboxKind = iota
	inboxPush
	inboxRefused
	inboxNotice
	inboxReceipt
	inboxPage
	inboxRegistered
	inboxReplaced
	inboxFence
)

type run struct {
	kind inboxKind
	n    uint32
}

func (b *inboxBatch) note(kind inboxKind, n int) {
	if last := len(b.runs) - 1; last >= 0 && b.runs[last].kind == kind {
		b.runs[last].n += uint32(n)
		return
	}
	b.runs = append(b.runs, run{kind, uint32(n)})
}

// put runs fill with the lock held. wake is true when the loop must be woken; ok is false when the loop has ended.
func (in *inbox) put(fill func(b *inboxBatch)) (wake, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return false, false
	}
	wake = len(in.filling.runs) == 0
	fill(&in.filling)
	return wake, true
}

func (in *inbox) putPushes(list []protocol.Push) (wake, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return false, false
	}
	wake = len(in.filling.runs) == 0
	for i := range list {
		n := pushBytes + len(list[i].Message.Content)
		if in.bytes+n > inboxBytes {
			in.filling.refused = append(in.filling.refused, withoutContent(list[i]))
			in.filling.note(inboxRefused, 1)
			continue
		}
		in.bytes += n
		in.filling.pushes = append(in.filling.pushes, list[i])
		in.filling.note(inboxPush, 1)
	}
	return wake, true
}

// putReceipts drops what is over the budget. A receipt is state: a later one of the same conversation covers it, and
// the client asks for all that changed when it connects again.
func (in *inbox) putReceipts(list []protocol.ReceiptPush) (wake, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return false, false
	}
	taken := max(0, min(len(list), (inboxBytes-in.bytes)/receiptBytes))
	in.dropped += uint64(len(list) - taken)
	if taken == 0 {
		return false, true
	}
	wake = len(in.filling.runs) == 0
	in.bytes += taken * receiptBytes
	in.filling.receipts = append(in.filling.receipts, list[:taken]...)
	in.filling.note(inboxReceipt, taken)
	return wake, true
}

// withoutContent keeps of a refused push what its outcome needs, so that the refusal holds no content in memory.
func withoutContent(p protocol.Push) protocol.Push {
	m := *p.Message
	m.Content = nil
	p.Message = &m
	return p
}

// take hands everything to the loop; the batch is valid until done.
func (in *inbox) take() *inboxBatch {
	in.mu.Lock()
	in.filling, in.draining = in.draining, in.filling
	in.bytes = 0
	in.mu.Unlock()
	return &in.draining
}

// done lets go of what the batch held, so that an idle loop keeps no message alive.
func (in *inbox) done() { in.draining.clear() }

// size is how many bytes of pushes and receipts wait, and how many receipts were dropped since the start.
func (in *inbox) size() (bytes int, dropped uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.bytes, in.dropped
}

// close makes every later put fail.
func (in *inbox) close() {
	in.mu.Lock()
	in.closed = true
	in.filling = inboxBatch{}
	in.mu.Unlock()
}

func (b *inboxBatch) clear() {
	b.runs = emptied(b.runs)
	b.answers = emptied(b.answers)
	b.pushes = emptied(b.pushes)
	b.refused = emptied(b.refused)
	b.notices = emptied(b.notices)
	b.receipts = emptied(b.receipts)
	b.pages = emptied(b.pages)
	b.registered = emptied(b.registered)
	b.replaced = emptied(b.replaced)
	b.fences = emptied(b.fences)
}

// emptied clears what was used, so that nothing is kept alive, and keeps a bounded capacity.
func emptied[T any](list []T) []T {
	if cap(list) > inboxKeep {
		return nil
	}
	clear(list)
	return list[:0]
}
