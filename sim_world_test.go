package main

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"millrace/backend"
	"millrace/protocol"
	"millrace/router"
)

// The simulation drives the real cores (edge.Uplink, edge.Downlink, backend.Owner, backend.Window, backend.Identity,
// router.Table) with one goroutine and one seed: a queue that redelivers and contains doubles, a store that
// crashes between any two writes, several edges, slow readers, reconnects, restored and cloned clients,
// first devices that register while messages arrive, late acknowledgements, clock steps. Time is the order
// of events. After a phase of faults everything heals, and P2–P5 and P8 are checked.

// simOptions are drawn from the seed; the shrinker switches them off one by one.
type simOptions struct {
	Users, Devices, Edges, Shards int
	Sends                         int
	Crashes                       bool // owner, edge, whole process
	Doubles                       bool // the queue contains records twice and redelivers
	QueueFails                    bool // outcome_unknown, overloaded
	Slow                          bool // readers that stop reading or acknowledging
	Disconnects                   bool
	Restores                      bool // a client is put back to an older state of its disk
	Clones                        bool // two installations with one identity
	NewDevices                    bool // devices that appear late
	ClockSteps                    bool
	RateLimit                     bool
}

func drawOptions(rng *rand.Rand) simOptions {
	yes := func() bool { return rng.IntN(3) > 0 }
	return simOptions{
		Users: 2 + rng.IntN(3), Devices: 1 + rng.IntN(2), Edges: 1 + rng.IntN(3), Shards: 1 + rng.IntN(2),
		Sends:   20 + rng.IntN(60),
		Crashes: yes(), Doubles: yes(), QueueFails: yes(), Slow: yes(), Disconnects: yes(), Restores: yes(), Clones: yes(),
		NewDevices: yes(), ClockSteps: yes(), RateLimit: rng.IntN(4) == 0,
	}
}

type simEvent struct {
	at  int64
	n   uint64
	run func()
}

type simEvents []simEvent

func (h simEvents) Len() int { return len(h) }
func (h simEvents) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].n < h[j].n
}
func (h simEvents) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *simEvents) Push(x any)   { *h = append(*h, x.(simEvent)) }
func (h *simEvents) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

type sim struct {
	rng *rand.Rand
	opt simOptions
	mut string // the rule that is broken on purpose, "" for none

	now       int64 // simulated monotonic milliseconds
	step      int64 // how far the wall clock is off
	receiptMs int64
	events    simEvents
	number    uint64
	healed    bool

	identity *backend.Identity
	table    *router.Table
	store    *simStore
	queue    *simQueue
	owners   []*simOwner
	edges    []*simEdge
	clients  []*simClient
	logins   uint64
	conns    uint64

	truth      *simTruth
	trace      []string
	violations []string
}

const simStart = 1_700_000_000_000

func newSim(seed uint64, opt *simOptions, mut string) *sim {
	rng := rand.New(rand.NewPCG(seed, 0x6d696c6c72616365))
	s := &sim{rng: rng, mut: mut, table: router.NewTable()}
	s.opt = drawOptions(rng)
	if opt != nil {
		s.opt = *opt
	}
	s.identity, _ = backend.NewIdentity(make([]byte, backend.SecretBytes))
	s.truth = &simTruth{sim: s, sends: map[string]*simTruthSend{}, ids: map[protocol.MessageID]*simTruthSend{}, acked: map[protocol.MessageID]bool{},
		receipts: map[[2]string]uint64{}}
	s.store = newSimStore(s)
	s.queue = newSimQueue(s)
	for n := range s.opt.Shards {
		o := &simOwner{sim: s, shard: n}
		o.start()
		s.owners = append(s.owners, o)
	}
	for n := range s.opt.Edges {
		s.edges = append(s.edges, &simEdge{sim: s, id: uint32(n + 1), sessions: map[uint64]*simSession{}})
	}
	for u := range s.opt.Users {
		for d := range s.opt.Devices {
			s.addClient(fmt.Sprintf("u%d", u), fmt.Sprintf("d%d", d))
		}
	}
	return s
}

func (s *sim) addClient(user, device string) *simClient {
	c := &simClient{sim: s, number: len(s.clients), disk: &simDisk{user: user, device: device,
		epoch: s.rng.Uint64() | 1, shown: map[protocol.MessageID]uint64{}}}
	c.name = fmt.Sprintf("%s/%s#%d", user, device, c.number)
	s.clients = append(s.clients, c)
	return c
}

func (s *sim) wall() int64 { return simStart + s.now + s.step }

// receiptClock dates receipts: it never goes back within one process's data, whatever the clock does.
func (s *sim) receiptClock() int64 {
	s.receiptMs = max(s.receiptMs, s.wall())
	return s.receiptMs
}

func (s *sim) after(delay int64, run func()) {
	s.number++
	heap.Push(&s.events, simEvent{s.now + delay, s.number, run})
}

func (s *sim) chance(oneIn int) bool { return s.rng.IntN(oneIn) == 0 }

func (s *sim) logf(format string, args ...any) {
	s.trace = append(s.trace, fmt.Sprintf("%7d ms  ", s.now)+fmt.Sprintf(format, args...))
}

func (s *sim) violate(promise, format string, args ...any) {
	v := promise + ": " + fmt.Sprintf(format, args...)
	s.violations = append(s.violations, v)
	s.logf("VIOLATION %s", v)
}

// run plays the faults, heals, and judges.
func (s *sim) run() []string {
	const faultsMs, healMs = 60_000, 120_000
	for _, c := range s.clients {
		if s.opt.NewDevices && s.chance(3) {
			s.after(s.rng.Int64N(faultsMs/2), c.connect) // its first connection comes late
			continue
		}
		s.after(s.rng.Int64N(2000), c.connect)
	}
	for range s.opt.Sends {
		c := s.clients[s.rng.IntN(len(s.clients))]
		to := s.clients[s.rng.IntN(len(s.clients))].disk.user
		s.after(s.rng.Int64N(faultsMs), func() { c.send(to) })
	}
	s.scheduleFaults(faultsMs)
	for _, o := range s.owners {
		s.every(100, o.tick)
	}
	for _, e := range s.edges {
		s.every(1000, e.sweep)
	}
	s.playUntil(faultsMs)
	s.heal()
	s.playUntil(faultsMs + healMs/2)
	s.truth.judgeWaiting()
	for _, c := range s.clients { // whatever an acknowledgement lost in a crash left behind is drained by the next connection
		if c.active() {
			c.drop("heal")
			s.after(10, c.connect)
		}
	}
	s.playUntil(faultsMs + healMs)
	s.truth.judge()
	return s.violations
}

func (s *sim) every(ms int64, run func()) {
	var again func()
	again = func() {
		run()
		s.after(ms, again)
	}
	s.after(s.rng.Int64N(ms), again)
}

func (s *sim) playUntil(at int64) {
	for len(s.events) > 0 && s.events[0].at <= at {
		e := heap.Pop(&s.events).(simEvent)
		s.now = max(s.now, e.at)
		e.run()
	}
	s.now = at
}

func (s *sim) scheduleFaults(until int64) {
	at := func(n int, run func()) {
		for range n {
			s.after(s.rng.Int64N(until), run)
		}
	}
	pick := func() *simClient { return s.clients[s.rng.IntN(len(s.clients))] }
	if s.opt.Disconnects {
		at(4*len(s.clients), func() { pick().drop("network") })
	}
	if s.opt.Crashes {
		at(3, func() { s.owners[s.rng.IntN(len(s.owners))].crash() })
		at(2, func() { s.edges[s.rng.IntN(len(s.edges))].crash() })
		at(2, s.crashAll)
	}
	if s.opt.Slow {
		at(2*len(s.clients), func() { pick().stall(s.rng.Int64N(15_000)) })
		at(2*len(s.clients), func() { pick().mute(s.rng.Int64N(15_000)) })
	}
	if s.opt.Restores {
		for range 2 {
			c := pick()
			s.after(s.rng.Int64N(until/2), c.backup)
			s.after(until/2+s.rng.Int64N(until/2), c.restore)
		}
	}
	if s.opt.Clones {
		at(1, func() { pick().clone() })
	}
	if s.opt.ClockSteps {
		at(2, func() { s.step += s.rng.Int64N(7_200_000) - 3_600_000; s.logf("clock steps to %+d ms", s.step) })
	}
	if s.opt.QueueFails {
		at(4, func() { s.queue.failSoon = true })
	}
}

func (s *sim) heal() {
	s.logf("healed")
	s.healed = true
	for _, c := range s.clients {
		c.stalledUntil, c.mutedUntil = 0, 0
		if c.wantsConnection() {
			s.after(s.rng.Int64N(100), c.connect)
		}
	}
}

// crashAll is kill -9 of one process that holds everything.
func (s *sim) crashAll() {
	s.logf("whole process crashes")
	for _, e := range s.edges {
		e.crash()
	}
	s.queue.crash()
	for _, o := range s.owners {
		o.crash()
	}
	s.store.crashRegistrations()
}

// simStore applies the writes of commits one by one, in their order, and loses what was not applied in a crash.
type simStore struct {
	sim         *sim
	devices     map[string][]backend.Device
	blocks      map[backend.Stream]uint32
	windows     map[backend.WindowKey]backend.Window
	receipts    map[backend.ReceiptKey]backend.ReceiptRow
	outstanding []backend.OutstandingRow // sorted
	mailboxes   map[[2]string][]*backend.Record
	lowWater    []uint64
	pending     [][]func() // by shard
	registering uint64     // a crash raises it: registrations under way are lost
	cachedRows  map[string][]backend.Device
}

func newSimStore(s *sim) *simStore {
	return &simStore{sim: s, devices: map[string][]backend.Device{}, blocks: map[backend.Stream]uint32{},
		windows: map[backend.WindowKey]backend.Window{}, receipts: map[backend.ReceiptKey]backend.ReceiptRow{},
		mailboxes: map[[2]string][]*backend.Record{}, lowWater: make([]uint64, s.opt.Shards),
		pending: make([][]func(), s.opt.Shards), cachedRows: map[string][]backend.Device{}}
}

func (st *simStore) Devices(user string) ([]backend.Device, error) {
	if st.sim.mut == "devices from an older cache" {
		if rows, ok := st.cachedRows[user]; ok {
			return rows, nil
		}
		st.cachedRows[user] = slices.Clone(st.devices[user])
	}
	return st.devices[user], nil
}

func (st *simStore) Window(k backend.WindowKey) (backend.Window, error) { return st.windows[k], nil }

func (st *simStore) Receipt(k backend.ReceiptKey) (backend.ReceiptRow, error) {
	return st.receipts[k], nil
}

func compareOutstanding(a, b backend.OutstandingRow) int {
	if c := strings.Compare(a.Conversation, b.Conversation); c != 0 {
		return c
	}
	if c := strings.Compare(a.Addressee, b.Addressee); c != 0 {
		return c
	}
	switch {
	case a.Position < b.Position:
		return -1
	case a.Position > b.Position:
		return 1
	}
	return 0
}

func (st *simStore) FirstOutstanding(conversation, addressee string, from uint64) (backend.OutstandingRow, bool, error) {
	i, _ := slices.BinarySearchFunc(st.outstanding, backend.OutstandingRow{Conversation: conversation, Addressee: addressee,
		Mark: backend.Mark{Position: from}}, compareOutstanding)
	if i < len(st.outstanding) && st.outstanding[i].Conversation == conversation && st.outstanding[i].Addressee == addressee {
		return st.outstanding[i], true, nil
	}
	return backend.OutstandingRow{}, false, nil
}

func (st *simStore) MailboxRow(k backend.MailboxKey) (*backend.Record, bool, error) {
	for _, r := range st.mailboxes[[2]string{k.User, k.Device}] {
		if r.Position == k.Position && r.ID == k.ID {
			return r, true, nil
		}
	}
	return nil, false, nil
}

func (st *simStore) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) (rows []*backend.Record, err error) {
	for _, r := range st.mailboxes[[2]string{user, device}] {
		if len(rows) < limit && (r.Position > position || r.Position == position && string(r.ID[:]) > string(id[:])) {
			rows = append(rows, r)
		}
	}
	if st.sim.mut == "the mailbox is popped by reading" {
		for _, r := range rows {
			st.deleteRow(backend.MailboxKey{User: user, Device: device, Position: r.Position, ID: r.ID})
		}
	}
	return rows, nil
}

func (st *simStore) ReceiptsSince(sender string, since int64, yield func(backend.ReceiptRow) bool) error {
	var rows []backend.ReceiptRow
	for k, r := range st.receipts {
		if k.Sender == sender && r.ChangedMs >= since {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, func(a, b backend.ReceiptRow) int {
		return strings.Compare(a.Conversation+a.Addressee, b.Conversation+b.Addressee)
	})
	for _, r := range rows {
		if !yield(r) {
			break
		}
	}
	return nil
}

func (st *simStore) putRow(p backend.MailboxPut, shard int) {
	r := p.Record
	if r == nil {
		r = st.sim.queue.load(shard, p.Position)
		if r == nil {
			st.sim.violate("P2", "the log no longer holds position %d, which a mailbox row needs", p.Position)
			return
		}
	}
	k := [2]string{p.User, p.Device}
	rows := st.mailboxes[k]
	i, found := slices.BinarySearchFunc(rows, r.Position, func(r *backend.Record, p uint64) int {
		switch {
		case r.Position < p:
			return -1
		case r.Position > p:
			return 1
		}
		return 0
	})
	for found && i < len(rows) && rows[i].Position == r.Position {
		if rows[i].ID == r.ID {
			return
		}
		i++
	}
	st.mailboxes[k] = slices.Insert(rows, i, r)
}

func (st *simStore) deleteRow(k backend.MailboxKey) {
	box := [2]string{k.User, k.Device}
	st.mailboxes[box] = slices.DeleteFunc(slices.Clone(st.mailboxes[box]), func(r *backend.Record) bool {
		return r.Position == k.Position && r.ID == k.ID
	})
}

// Commit queues the writes; they are applied one by one at times that the seed chooses.
func (st *simStore) Commit(c *backend.Commit) {
	mut := st.sim.mut
	var puts, outs, receipts, settled, acked, windows []func()
	for _, p := range c.Mailbox {
		puts = append(puts, func() { st.putRow(p, c.Shard) })
	}
	for _, r := range c.Outstanding {
		outs = append(outs, func() {
			i, found := slices.BinarySearchFunc(st.outstanding, r, compareOutstanding)
			if !found {
				st.outstanding = slices.Insert(st.outstanding, i, r)
			}
		})
	}
	for _, r := range c.Receipts {
		receipts = append(receipts, func() {
			old := st.receipts[r.ReceiptKey]
			if r.Delivered.Position >= old.Delivered.Position {
				old.Delivered, old.ChangedMs = r.Delivered, max(old.ChangedMs, r.ChangedMs)
			}
			if r.Top.Position > old.Top.Position {
				old.Top = r.Top
			}
			old.ReceiptKey = r.ReceiptKey
			st.receipts[r.ReceiptKey] = old
		})
	}
	for _, k := range c.Settled {
		settled = append(settled, func() {
			i, found := slices.BinarySearchFunc(st.outstanding, backend.OutstandingRow{Conversation: k.Conversation,
				Addressee: k.Addressee, Mark: backend.Mark{Position: k.Position}}, compareOutstanding)
			if found {
				st.outstanding = slices.Delete(st.outstanding, i, i+1)
			}
		})
	}
	for _, k := range c.Acknowledged {
		acked = append(acked, func() { st.deleteRow(k) })
	}
	for _, w := range c.Windows {
		windows = append(windows, func() {
			old := st.windows[w.WindowKey]
			old.Merge(&w.Window)
			st.windows[w.WindowKey] = old
		})
	}
	lowWater := func() { st.lowWater[c.Shard] = max(st.lowWater[c.Shard], c.LowWater) }
	var writes []func()
	switch mut {
	case "window before mailbox":
		writes = slices.Concat(windows, []func(){lowWater}, puts, outs, receipts, settled, acked)
	case "receipts are announced and not stored":
		writes = slices.Concat(puts, outs, settled, acked, windows, []func(){lowWater})
	case "no outstanding rows":
		writes = slices.Concat(puts, receipts, settled, acked, windows, []func(){lowWater})
	case "no window rows":
		writes = slices.Concat(puts, outs, receipts, settled, acked, []func(){lowWater})
	case "mailbox rows not written":
		writes = slices.Concat(outs, receipts, settled, acked, windows, []func(){lowWater})
	default:
		writes = slices.Concat(puts, outs, receipts, settled, acked, windows, []func(){lowWater})
	}
	done := func() { c.Done() }
	if mut == "commit done before it is durable" {
		c.Done()
		done = func() {}
	}
	writes = append(writes, done)
	idle := len(st.pending[c.Shard]) == 0
	st.pending[c.Shard] = append(st.pending[c.Shard], writes...)
	if idle {
		st.sim.after(st.sim.rng.Int64N(20), func() { st.apply(c.Shard) })
	}
}

func (st *simStore) apply(shard int) {
	n := min(len(st.pending[shard]), 1+st.sim.rng.IntN(6))
	batch := st.pending[shard][:n]
	st.pending[shard] = st.pending[shard][n:]
	for _, w := range batch {
		w()
	}
	if len(st.pending[shard]) > 0 {
		st.sim.after(st.sim.rng.Int64N(10), func() { st.apply(shard) })
	}
}

func (st *simStore) crash(shard int) { st.pending[shard] = nil }

func (st *simStore) crashRegistrations() { st.registering++ }

func (st *simStore) Register(k backend.Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	life := st.registering
	st.sim.after(st.sim.rng.Int64N(40), func() {
		if st.registering != life {
			return
		}
		rows := st.devices[k.User]
		heir, found := len(rows) == 0, false
		for _, d := range rows {
			if d.Name == k.Device {
				heir, found = d.Heir, true
			}
		}
		if !found {
			if st.sim.mut == "the first device is no heir" {
				heir = false
			}
			st.devices[k.User] = append(slices.Clone(rows), backend.Device{Name: k.Device, Heir: heir})
			st.sim.truth.registered(k.User, k.Device)
		}
		block := st.blocks[k]
		if st.sim.mut != "the block counter is not raised" {
			st.blocks[k] = block + 1
		}
		done(block, heir, protocol.Refusal{})
	})
}

// simQueue is one log per shard. Appends become durable in order; it fails, loses what is not durable in a crash, doubles
// and redelivers.
type simQueue struct {
	sim       *sim
	pending   []*backend.Record
	logs      [][]*backend.Record
	last      []uint64
	life      uint64
	failSoon  bool
	answersAt int64                  // answers arrive in order
	failing   map[backend.Stream]int // answers outcome_unknown that have not arrived
}

func newSimQueue(s *sim) *simQueue {
	return &simQueue{sim: s, logs: make([][]*backend.Record, s.opt.Shards), last: make([]uint64, s.opt.Shards),
		failing: map[backend.Stream]int{}}
}

func (q *simQueue) shard(r *backend.Record) int {
	return int(r.Conversation % uint64(q.sim.opt.Shards))
}

func (q *simQueue) append(r *backend.Record) protocol.Refusal {
	if q.sim.opt.QueueFails && !q.sim.healed && q.sim.chance(20) {
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: uint32(1 + q.sim.rng.IntN(500))}
	}
	r.AcceptedMs = q.sim.wall()
	if q.failing[r.Stream()] > 0 && q.sim.mut != "later sends survive a failed one" {
		q.unknown(r)
		return protocol.Refusal{}
	}
	if q.sim.mut == "answered before it is durable" {
		q.sim.answer(protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Millis: q.sim.wall()})
	}
	defer func() {
		if q.failSoon && len(q.pending) > 1 && !q.sim.healed {
			q.failSoon = false
			q.fail()
		}
	}()
	if len(q.pending) == 0 {
		life := q.life
		q.sim.after(1+q.sim.rng.Int64N(15), func() { q.sync(life) })
	}
	q.pending = append(q.pending, r)
	return protocol.Refusal{}
}

func (q *simQueue) sync(life uint64) {
	if life != q.life {
		return
	}
	n := min(len(q.pending), 1+q.sim.rng.IntN(8))
	for _, r := range q.pending[:n] {
		q.durable(r)
		if q.sim.mut != "answered before it is durable" {
			a := protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Millis: q.sim.wall()}
			if !r.Resend {
				a.Position = r.Position
			}
			q.answersAt = max(q.answersAt, q.sim.now+q.sim.rng.Int64N(5))
			q.sim.after(q.answersAt-q.sim.now, func() { q.sim.answer(a) })
		}
		if q.sim.opt.Doubles && q.sim.chance(8) {
			double := *r
			q.durable(&double)
		}
	}
	q.pending = q.pending[n:]
	if len(q.pending) > 0 {
		q.sim.after(q.sim.rng.Int64N(10), func() { q.sync(life) })
	}
}

func (q *simQueue) durable(r *backend.Record) {
	k := q.shard(r)
	r.Position = protocol.NextPosition(q.last[k], r.AcceptedMs)
	if q.sim.mut == "positions follow the clock alone" {
		r.Position = uint64(r.AcceptedMs)<<protocol.PositionShift | uint64(q.sim.rng.IntN(2048))
	}
	q.last[k] = max(q.last[k], r.Position)
	q.logs[k] = append(q.logs[k], r)
	q.sim.truth.durable(r)
	q.sim.logf("durable %s at %d", r.Content, r.Position)
	q.sim.after(q.sim.rng.Int64N(10), q.sim.owners[k].wake)
}

// fail answers outcome_unknown to a stream's pending sends: a prefix of them became durable all the same.
func (q *simQueue) fail() {
	if len(q.pending) == 0 {
		return
	}
	stream := q.pending[q.sim.rng.IntN(len(q.pending))].Stream()
	lost := false
	kept := q.pending[:0:0]
	for _, r := range q.pending {
		if r.Stream() != stream {
			kept = append(kept, r)
			continue
		}
		lost = lost || q.sim.chance(2)
		if q.sim.mut == "later sends survive a failed one" {
			lost = q.sim.chance(2)
			if !lost {
				kept = append(kept, r)
				continue
			}
		}
		if !lost {
			q.durable(r)
		}
		q.unknown(r)
	}
	q.pending = kept
}

// unknown answers outcome_unknown. Until that has arrived what is handed over after it fails too.
func (q *simQueue) unknown(r *backend.Record) {
	stream := r.Stream()
	q.failing[stream]++
	a := protocol.Answer{To: r.From, Seq: r.Seq, Refusal: protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: uint32(1 + q.sim.rng.IntN(300))}}
	q.answersAt = max(q.answersAt, q.sim.now+q.sim.rng.Int64N(5))
	q.sim.after(q.answersAt-q.sim.now, func() {
		q.failing[stream]--
		q.sim.answer(a)
	})
}

func (q *simQueue) crash() {
	q.pending = nil
	q.life++
}

func (q *simQueue) load(shard int, position uint64) *backend.Record {
	if position < q.sim.store.lowWater[shard] {
		return nil // trimmed
	}
	for _, r := range q.logs[shard] {
		if r.Position == position {
			return r
		}
	}
	return nil
}

// simOwner is one owner with its place in the log; a crash makes a new one that replays.
type simOwner struct {
	sim   *sim
	shard int
	owner *backend.Owner
	next  int // index in the log
	life  uint64
}

func (o *simOwner) start() {
	o.life++
	o.owner, _ = backend.NewOwner(backend.OwnerConfig{Shard: o.shard, Reader: o.sim.store, Locator: o.sim.table, MaxIdleConversations: 2})
	o.next = 0
	if o.sim.mut == "the log is replayed from its end" {
		o.next = len(o.sim.queue.logs[o.shard])
		return
	}
	for o.next < len(o.sim.queue.logs[o.shard]) && o.sim.queue.logs[o.shard][o.next].Position < o.sim.store.lowWater[o.shard] {
		o.next++
	}
	if o.sim.opt.Doubles {
		o.next = max(0, o.next-o.sim.rng.IntN(4)) // a queue may redeliver what was acknowledged
	}
	if o.sim.queue.logs[o.shard] != nil {
		o.sim.after(o.sim.rng.Int64N(3000), o.wake)
	}
}

func (o *simOwner) crash() {
	o.sim.logf("owner %d crashes", o.shard)
	o.sim.store.crash(o.shard)
	o.start()
}

func (o *simOwner) wake() {
	log := o.sim.queue.logs[o.shard]
	for o.next < len(log) {
		n := min(len(log)-o.next, 1+o.sim.rng.IntN(4))
		batch := log[o.next : o.next+n]
		o.next += n
		if _, err := o.owner.Take(o.sim.now, batch); err != nil {
			panic(err)
		}
		if o.sim.mut == "a bit means seen" {
			for _, r := range batch {
				k := backend.WindowKey{Conversation: backend.ConversationKey(r.Sender, r.Receiver), Stream: r.Stream()}
				w := o.sim.store.windows[k]
				w.Finish(r.Seq)
				o.sim.store.windows[k] = w
			}
		}
		o.act()
	}
}

func (o *simOwner) tick() {
	o.wake()
	if o.sim.mut != "no time-out" {
		o.owner.Tick(o.sim.now)
	}
	o.act()
}

func (o *simOwner) settle(out backend.Settlement) {
	o.owner.Settle([]backend.Settlement{out})
	o.act()
}

func (o *simOwner) act() {
	a := o.owner.Actions()
	if o.sim.mut != "no notice after a mailbox write" {
		for _, n := range a.Notices {
			o.sim.toEdge(n, func(s *simSession) { s.notify() }, nil)
		}
	}
	for _, p := range a.Pushes {
		o.sim.toEdge(p.To, func(s *simSession) { s.push(p) }, func() { o.sim.refused(p) })
	}
	for _, r := range a.Receipts {
		o.sim.toEdge(r.To, func(s *simSession) { s.receipt(r) }, nil)
	}
	o.owner.ClearActions()
	if o.owner.Dirty() && o.owner.Uncommitted() < 3 && o.sim.rng.IntN(3) > 0 {
		c := o.owner.Flush(o.sim.receiptClock())
		life := o.life
		if o.sim.mut == "the log is trimmed by what was taken" {
			c.LowWater = protocol.MaxPosition
			for i := o.next - 1; i >= 0; i = -1 {
				c.LowWater = o.sim.queue.logs[o.shard][i].Position + 1
			}
		}
		c.Done = func() {
			if o.life == life {
				o.owner.Committed()
				o.sim.after(0, o.act)
			}
		}
		o.sim.store.Commit(c)
	}
}
