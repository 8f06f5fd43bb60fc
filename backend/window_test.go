package backend

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"unsafe"

	"millrace/protocol"
)

// seqOf is the n-th number of a block.
func seqOf(block, n uint32) uint64 { return protocol.FirstSeq(block) + uint64(n) - 1 }

func windowOf(seqs ...uint64) (w Window) {
	for _, seq := range seqs {
		w.Finish(seq)
	}
	return w
}

func TestWindowSpan(t *testing.T) {
	w := windowOf(seqOf(3, 200))
	for _, c := range []struct {
		below uint32
		want  bool
	}{{0, true}, {1, false}, {62, false}, {63, false}, {64, true}, {65, true}, {199, true}} {
		if got := w.Finished(seqOf(3, 200-c.below)); got != c.want {
			t.Errorf("%d below the highest finished one: finished = %v, want %v", c.below, got, c.want)
		}
	}
	if w.Finished(seqOf(3, 201)) {
		t.Error("a number above the highest is not finished")
	}

	// Each number of the span has a bit of its own, whatever comes after it within the span.
	for _, distance := range []uint32{1, 62, 63, 64, 65, 1000} {
		w := windowOf(seqOf(0, 2000), seqOf(0, 2000+distance))
		for below := range uint32(100) {
			n := 2000 + distance - below
			want := n == 2000 || below == 0 || below >= protocol.MaxOpenSpan
			if got := w.Finished(seqOf(0, n)); got != want {
				t.Errorf("2000 and then %d above it: %d finished = %v, want %v", distance, n, got, want)
			}
		}
	}
}

// TestWindowFromBelow: a number that is finished after a higher one sets the same bit as before it.
func TestWindowFromBelow(t *testing.T) {
	for distance := range uint32(130) {
		up := windowOf(seqOf(1, 500), seqOf(1, 500+distance))
		down := windowOf(seqOf(1, 500+distance), seqOf(1, 500))
		if up != down {
			t.Errorf("at distance %d: %v upwards, %v downwards", distance, up, down)
		}
	}
}

func TestWindowBlocks(t *testing.T) {
	w := windowOf(seqOf(10, 7), seqOf(30, 7), seqOf(20, 7), seqOf(40, 7))
	for _, block := range []uint32{10, 20, 30, 40} {
		if !w.Finished(seqOf(block, 7)) || w.Finished(seqOf(block, 6)) || w.Finished(seqOf(block, 8)) {
			t.Errorf("block %d: %v", block, w)
		}
	}
	for block, want := range map[uint32]bool{0: true, 9: true, 11: false, 25: false, 39: false, 41: false} {
		if got := w.Finished(seqOf(block, 7)); got != want {
			t.Errorf("a number of block %d, of which nothing is known: finished = %v, want %v", block, got, want)
		}
	}

	// A block between the four pushes out the oldest, one below them changes nothing, one they hold stays.
	w.Finish(seqOf(25, 1))
	before := w
	w.Finish(seqOf(10, 9))
	w.Finish(seqOf(9, 1))
	if w != before {
		t.Errorf("an older block changed %v to %v", before, w)
	}
	for block, want := range map[uint32]bool{10: true, 19: true, 20: false, 25: false} {
		if got := w.Finished(seqOf(block, 100)); got != want {
			t.Errorf("after the fifth block, block %d: finished = %v, want %v", block, got, want)
		}
	}
	if got := [windowBlocks]uint32{w.Blocks[0].Block, w.Blocks[1].Block, w.Blocks[2].Block, w.Blocks[3].Block}; got != [windowBlocks]uint32{40, 30, 25, 20} {
		t.Errorf("blocks %v, want the newest first", got)
	}
}

// TestWindowFewBlocks: as long as fewer than four blocks are known, nothing is taken for too old.
func TestWindowFewBlocks(t *testing.T) {
	var w Window
	if w.Finished(seqOf(0, 1)) {
		t.Error("an empty window knows a number")
	}
	for block := uint32(100); block < 103; block++ {
		w.Finish(seqOf(block, 1))
		if w.Finished(seqOf(99, 1)) || w.Finished(seqOf(0, 1)) {
			t.Errorf("with blocks up to %d an older one is taken for finished", block)
		}
	}
}

func TestWindowEnds(t *testing.T) {
	first, last := seqOf(0, 1), uint64(protocol.MaxSeq)
	w := windowOf(last, first)
	if !w.Finished(first) || !w.Finished(last) || w.Finished(first+1) || w.Finished(last-1) || !w.Finished(last-protocol.MaxOpenSpan) {
		t.Errorf("%v", w)
	}
}

// randomWindow is made of few blocks and numbers, so that two of them overlap.
func randomWindow(rng *rand.Rand) (w Window) {
	for range rng.IntN(40) {
		w.Finish(seqOf(rng.Uint32N(7), 1+rng.Uint32N(150)))
	}
	return w
}

func merged(a, b Window) Window {
	a.Merge(&b)
	return a
}

func TestWindowMergeLaws(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		a, b, c := randomWindow(rng), randomWindow(rng), randomWindow(rng)
		if ab, ba := merged(a, b), merged(b, a); ab != ba {
			t.Fatalf("not commutative:\n%v\n%v\ngive %v\nand  %v", a, b, ab, ba)
		}
		if left, right := merged(merged(a, b), c), merged(a, merged(b, c)); left != right {
			t.Fatalf("not associative:\n%v\n%v\n%v\ngive %v\nand  %v", a, b, c, left, right)
		}
		if again := merged(a, a); again != a {
			t.Fatalf("not idempotent: %v becomes %v", a, again)
		}
		if ab := merged(a, b); merged(ab, a) != ab || merged(ab, b) != ab {
			t.Fatalf("what was merged once changes %v", ab)
		}
		if same := merged(a, Window{}); same != a {
			t.Fatalf("the empty window changes %v to %v", a, same)
		}
	}
}

// TestWindowMergeLosesNothing: the union of two windows is the window of the union.
func TestWindowMergeLosesNothing(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 5000 {
		var a, b, both Window
		for range rng.IntN(60) {
			seq := seqOf(rng.Uint32N(6), 1+rng.Uint32N(150))
			if rng.IntN(2) == 0 {
				a.Finish(seq)
			} else {
				b.Finish(seq)
			}
			both.Finish(seq)
		}
		if got := merged(a, b); got != both {
			t.Fatalf("%v and %v give %v, want %v", a, b, got, both)
		}
	}
}

// streamModel plays one stream that keeps the rules of DESIGN.md §4 with everything around it that may go wrong: a client that
// reconnects and is put back to an older state of its disk, connections whose edges are late, a log that holds records more
// than once, an owner that finishes late, crashes, and replays. It knows by plain sets what is finished, and compares.
type streamModel struct {
	t   *testing.T
	rng *rand.Rand

	client modelClient
	saved  modelClient
	blocks uint32 // drawn so far
	lines  []*modelLine

	log      []modelSend
	taken    int   // records of the log that the owner has taken
	flight   []int // the unfinished among them
	windows  map[int]*Window
	stored   map[int]Window // what the store holds
	late     []modelRow     // rows written once, which a late owner writes again
	finished map[modelSend]bool
	durable  map[modelSend]bool // as of the last commit

	records, duplicates, evicted int
}

type modelSend struct {
	seq          uint64
	conversation int
}

type modelRow struct {
	conversation int
	window       Window
}

// modelClient is what a client has on its disk.
type modelClient struct {
	next uint64
	open []modelSend // ascending
}

// modelLine is a connection: its sends reach the log in order, or not at all from some point on.
type modelLine struct{ sends []modelSend }

const modelConversations = 2

func (m *streamModel) connect() {
	m.blocks += 1 + m.rng.Uint32N(2)
	m.client.next = protocol.FirstSeq(m.blocks)
	m.lines = append(m.lines, &modelLine{sends: append([]modelSend(nil), m.client.open...)})
	// A later login closes the earlier connections: two may be behind for a while.
	if len(m.lines) > 3 {
		m.lines = m.lines[1:]
	}
}

func (m *streamModel) send() {
	c := &m.client
	seq := c.next + m.rng.Uint64N(4)*m.rng.Uint64N(20)
	if len(c.open) > 0 && (protocol.SeqBlock(c.open[0].seq) != protocol.SeqBlock(seq) || seq-c.open[0].seq >= protocol.MaxOpenSpan) {
		return // what is open must end first
	}
	s := modelSend{seq, m.rng.IntN(modelConversations)}
	c.next = seq + 1
	c.open = append(c.open, s)
	line := m.lines[len(m.lines)-1]
	line.sends = append(line.sends, s)
}

// advance brings the next send of a connection into the log. A refusal that can be retried holds back everything behind
// it, so that it is no more than a delay.
func (m *streamModel) advance(line *modelLine) {
	if len(line.sends) == 0 {
		return
	}
	s := line.sends[0]
	refused := s.seq%13 == 0 // for good: that depends on the bytes alone
	if !refused {
		m.log = append(m.log, s)
		if m.rng.IntN(8) == 0 {
			return // the outcome is unknown: it comes again
		}
	}
	line.sends = line.sends[1:]
	if line != m.lines[len(m.lines)-1] {
		return // nobody hears the answer
	}
	for i, open := range m.client.open {
		if open == s {
			m.client.open = append(m.client.open[:i:i], m.client.open[i+1:]...)
			return
		}
	}
}

func (m *streamModel) window(conversation int) *Window {
	w := m.windows[conversation]
	if w == nil {
		row := m.stored[conversation]
		w = &row
		m.windows[conversation] = w
	}
	return w
}

func (m *streamModel) take() {
	if m.taken == len(m.log) {
		return
	}
	s := m.log[m.taken]
	inFlight := false
	for _, i := range m.flight {
		inFlight = inFlight || m.log[i] == s
	}
	w := m.window(s.conversation)
	if got := w.Finished(s.seq); got != m.finished[s] && !inFlight {
		m.t.Fatalf("record %d, number %x in conversation %d: finished = %v, and it is %v\n%v", m.taken, s.seq, s.conversation, got, m.finished[s], *w)
	}
	m.records++
	if m.finished[s] || inFlight {
		m.duplicates++
		if oldest := w.Blocks[windowBlocks-1]; oldest.Highest != 0 && protocol.SeqBlock(s.seq) < oldest.Block {
			m.evicted++
		}
	} else {
		m.flight = append(m.flight, m.taken)
	}
	m.taken++
}

// finish finishes the first unfinished record of a conversation.
func (m *streamModel) finish(conversation int) {
	for i, n := range m.flight {
		if s := m.log[n]; s.conversation == conversation {
			m.window(conversation).Finish(s.seq)
			m.finished[s] = true
			m.flight = append(m.flight[:i:i], m.flight[i+1:]...)
			return
		}
	}
}

func (m *streamModel) commit() {
	for conversation, w := range m.windows {
		row := m.stored[conversation]
		row.Merge(w)
		if row != *w {
			m.t.Fatalf("the merged row %v is not the owner's window %v", row, *w)
		}
		m.stored[conversation] = row
		m.late = append(m.late, modelRow{conversation, row})
		if m.rng.IntN(4) == 0 {
			delete(m.windows, conversation) // at rest: it is read again
		}
	}
	for s := range m.finished {
		m.durable[s] = true
	}
}

// repeat writes a row again, as an owner does that does not know that it is none any more.
func (m *streamModel) repeat() {
	if len(m.late) == 0 {
		return
	}
	r := m.late[m.rng.IntN(len(m.late))]
	row := m.stored[r.conversation]
	row.Merge(&r.window)
	if row != m.stored[r.conversation] {
		m.t.Fatalf("a row written late changes %v to %v", m.stored[r.conversation], row)
	}
}

// crash forgets what was not committed and replays from the oldest unfinished record.
func (m *streamModel) crash() {
	m.windows = map[int]*Window{}
	m.finished = map[modelSend]bool{}
	for s := range m.durable {
		m.finished[s] = true
	}
	m.flight, m.taken = nil, 0
	for m.taken < len(m.log) && m.finished[m.log[m.taken]] {
		m.taken++
	}
	m.taken = max(0, m.taken-m.rng.IntN(10)) // a queue may repeat what was acknowledged
}

func (m *streamModel) step() {
	switch n := m.rng.IntN(1000); {
	case n < 350:
		m.send()
	case n < 600:
		m.advance(m.lines[len(m.lines)-1])
	case n < 640:
		m.advance(m.lines[m.rng.IntN(len(m.lines))])
	case n < 800:
		m.take()
	case n < 950:
		m.finish(m.rng.IntN(modelConversations))
	case n < 970:
		m.commit()
	case n < 980:
		m.repeat()
	case n < 985:
		m.connect()
	case n < 988 && len(m.log) > 0:
		m.log = append(m.log, m.log[m.rng.IntN(len(m.log))]) // a double, however late
	case n < 991:
		m.crash()
	case n < 994:
		m.saved = modelClient{open: append([]modelSend(nil), m.client.open...)}
	case n < 996:
		m.client = modelClient{open: append([]modelSend(nil), m.saved.open...)}
		m.connect()
	}
}

func TestWindowIsExact(t *testing.T) {
	records, duplicates, evicted := 0, 0, 0
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m := &streamModel{t: t, rng: rand.New(rand.NewPCG(seed, 5)), windows: map[int]*Window{}, stored: map[int]Window{},
				finished: map[modelSend]bool{}, durable: map[modelSend]bool{}}
			m.connect()
			for range 6000 {
				m.step()
			}
			records, duplicates, evicted = records+m.records, duplicates+m.duplicates, evicted+m.evicted
		})
	}
	t.Logf("%d records, %d of them duplicates, %d of these of a block older than the four", records, duplicates, evicted)
	if duplicates < records/50 || duplicates > records*9/10 || evicted == 0 {
		t.Errorf("the model does not try what it is for: %d records, %d duplicates, %d of old blocks", records, duplicates, evicted)
	}
}

// TestWindowSize: an owner keeps one for each stream of each conversation in use, and a store one row.
func TestWindowSize(t *testing.T) {
	if got := unsafe.Sizeof(Window{}); got != 64 {
		t.Errorf("a Window takes %d bytes, want 64", got)
	}
	w, other := windowOf(seqOf(1, 5)), windowOf(seqOf(2, 9), seqOf(1, 3))
	seq := seqOf(3, 1)
	if n := testing.AllocsPerRun(100, func() {
		seq++
		if w.Finished(seq) {
			t.Fatal("a new number is finished")
		}
		w.Finish(seq)
		w.Merge(&other)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
