package edge

import (
	"sync"

	"millrace/protocol"
)

const (
	// inboxBytes bounds what waits for a loop: beyond it pushes and pages are refused, and receipts are missed. Notices, refusals and
	// what was missed are one a session, and answers are bounded by the sends: those are always taken.
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
	bytes   int // of the pushes, pages and receipts in filling
	drops   inboxDrops

	draining inboxBatch // owned by the loop
}

// inboxBatch is what came between two turns. Entries of a kind stand together; runs say in which order they came.
type inboxBatch struct {
	runs       []run
	answers    []protocol.Answer
	pushes     []protocol.Push
	refused    []protocol.Session // a push was over the budget: what follows it must not overtake
	notices    []protocol.Session
	receipts   []protocol.ReceiptPush
	missed     []missedReceipts
	pages      []protocol.Page
	registered []protocol.Registered
	replaced   []protocol.Session
	fences     []protocol.Fence
	verified   []*claim
	revoked    []protocol.Session
	handshaken []uint64 // by Session.Conn: TLS handshakes that have something to say

	receiptsPages []protocol.ReceiptsPage

	// By Session.Conn: one entry is enough.
	inRefused, inNotices map[uint64]struct{}
	inMissed             map[uint64]int // places in missed
}

// missedReceipts says that receipts of a session were over the budget.
type missedReceipts struct {
	to    protocol.Session
	since int64 // date of the earliest
}

// inboxDrops counts what was over the budget since the start.
type inboxDrops struct {
	pushes, pages, receipts uint64
}

type inboxKind uint8

const (
	inboxAnswer inboxKind = iota
	inboxPush
	inboxRefused
	inboxNotice
	inboxReceipt
	inboxMissed
	inboxPage
	inboxReceiptsPage
	inboxRegistered
	inboxReplaced
	inboxFence
	inboxVerified
	inboxRevoked
	inboxHandshaken
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

// putPushes returns those that are over the budget, or behind one to the same session that was. The loop learns only that
// the session must drain; the owner is told by the caller.
func (in *inbox) putPushes(list []protocol.Push) (refused []protocol.Push, wake, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil, false, false
	}
	b := &in.filling
	wake = len(b.runs) == 0
	for i := range list {
		n := pushBytes + len(list[i].Message.Content)
		if _, behind := b.inRefused[list[i].To.Conn]; behind || in.bytes+n > inboxBytes {
			if once(&b.inRefused, list[i].To.Conn) {
				b.refused = append(b.refused, list[i].To)
				b.note(inboxRefused, 1)
			}
			refused = append(refused, list[i])
			continue
		}
		in.bytes += n
		b.pushes = append(b.pushes, list[i])
		b.note(inboxPush, 1)
	}
	in.drops.pushes += uint64(len(refused))
	return refused, wake, true
}

// putNotices keeps one for each session: the pass that the first one begins sees what the others tell of.
func (in *inbox) putNotices(list []protocol.Session) (wake, ok bool) {
	return in.put(func(b *inboxBatch) {
		for i := range list {
			if once(&b.inNotices, list[i].Conn) {
				b.notices = append(b.notices, list[i])
				b.note(inboxNotice, 1)
			}
		}
	})
}

// once is true the first time that a batch meets a connection.
func once(seen *map[uint64]struct{}, conn uint64) bool {
	if _, found := (*seen)[conn]; found {
		return false
	}
	if *seen == nil {
		*seen = make(map[uint64]struct{})
	}
	(*seen)[conn] = struct{}{}
	return true
}

// pageRefusal stands for a page that is over the budget; the sweep asks again.
var pageRefusal = protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: 1000}

// reserve takes n bytes of the budget for a page, or counts one that is refused. With the lock held.
func (in *inbox) reserve(n int) bool {
	if in.bytes+n > inboxBytes {
		in.drops.pages++
		return false
	}
	in.bytes += n
	return true
}

// putPage takes a page. One over the budget becomes a refusal, upon which the sweep asks again.
func (in *inbox) putPage(p protocol.Page) (wake, ok bool) {
	n := 0
	for i := range p.Rows {
		n += pushBytes + len(p.Rows[i].Message.Content)
	}
	return in.put(func(b *inboxBatch) {
		if !in.reserve(n) {
			p.Rows, p.Refusal = nil, pageRefusal
		}
		b.pages = append(b.pages, p)
		b.note(inboxPage, 1)
	})
}

// putReceipts keeps of what is over the budget only since when each session must read its receipts again.
func (in *inbox) putReceipts(list []protocol.ReceiptPush) (wake, ok bool) {
	return in.put(func(b *inboxBatch) {
		taken := max(0, min(len(list), (inboxBytes-in.bytes)/receiptBytes))
		if taken > 0 {
			in.bytes += taken * receiptBytes
			b.receipts = append(b.receipts, list[:taken]...)
			b.note(inboxReceipt, taken)
		}
		in.drops.receipts += uint64(len(list) - taken)
		for i := taken; i < len(list); i++ {
			b.miss(&list[i])
		}
	})
}

func (b *inboxBatch) miss(r *protocol.ReceiptPush) {
	if at, found := b.inMissed[r.To.Conn]; found {
		b.missed[at].since = min(b.missed[at].since, r.Millis)
		return
	}
	if b.inMissed == nil {
		b.inMissed = make(map[uint64]int)
	}
	b.inMissed[r.To.Conn] = len(b.missed)
	b.missed = append(b.missed, missedReceipts{r.To, r.Millis})
	b.note(inboxMissed, 1)
}

// putReceiptsPage takes a page of receipts. One over the budget becomes a refusal, upon which the sweep asks again.
func (in *inbox) putReceiptsPage(p protocol.ReceiptsPage) (wake, ok bool) {
	return in.put(func(b *inboxBatch) {
		if !in.reserve(len(p.Receipts) * receiptBytes) {
			p.Receipts, p.Refusal = nil, pageRefusal
		}
		b.receiptsPages = append(b.receiptsPages, p)
		b.note(inboxReceiptsPage, 1)
	})
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

// size is how many bytes of pushes, pages and receipts wait, and what was over the budget since the start.
func (in *inbox) size() (bytes int, drops inboxDrops) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.bytes, in.drops
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
	b.missed = emptied(b.missed)
	b.pages = emptied(b.pages)
	b.receiptsPages = emptied(b.receiptsPages)
	b.registered = emptied(b.registered)
	b.replaced = emptied(b.replaced)
	b.fences = emptied(b.fences)
	b.verified = emptied(b.verified)
	b.revoked = emptied(b.revoked)
	b.handshaken = emptied(b.handshaken)
	b.inRefused = emptiedSet(b.inRefused)
	b.inNotices = emptiedSet(b.inNotices)
	b.inMissed = emptiedSet(b.inMissed)
}

// emptied clears what was used, so that nothing is kept alive, and keeps a bounded capacity.
func emptied[T any](list []T) []T {
	if cap(list) > inboxKeep {
		return nil
	}
	clear(list)
	return list[:0]
}

func emptiedSet[V any](set map[uint64]V) map[uint64]V {
	if len(set) > inboxKeep {
		return nil
	}
	clear(set)
	return set
}
