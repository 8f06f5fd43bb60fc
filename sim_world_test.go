package main

import (
	"fmt"
	"math/rand/v2"

	"millrace/backend"
	"millrace/protocol"
	"millrace/router"
)

// The simulation drives the code that serves and the code that clients run, with one goroutine and one seed:
// backend.Server with its owners (Step, StepMailbox), edge.Uplink, edge.Downlink, edge.FullReceivers and edge.ReceiptReplay,
// router.Table, and client.Outbox. Around them stand a queue that redelivers and contains doubles, a store that crashes between any two
// writes and whose reads fail, owners that are replaced and go on for a while, several edges, slow readers, reconnects, restored
// and cloned and crashing clients, first devices that register while messages arrive, a ninth device, full mailboxes, late
// acknowledgements and clock steps. Time is the order of events. After a phase of faults everything heals, and P2–P6 and P8
// are checked. sim_truth_test.go judges; each other sim_*_test.go is one part of the world.

// simOptions are drawn from the seed; the shrinker switches them off one by one.
type simOptions struct {
	Users, Devices, Edges, Shards int
	Sends                         int
	OneServer                     bool // owns all shards; else each has its own, as in a cluster
	Crashes                       bool // owner, edge, whole process
	LateOwners                    bool // an owner is replaced and does not know it
	Doubles                       bool // the queue contains records twice and redelivers
	QueueFails                    bool // outcome_unknown, overloaded
	ReadErrors                    bool // of the store and of the log
	Slow                          bool // readers that stop reading or acknowledging
	Disconnects                   bool
	Restores                      bool // a client is put back to an older state of its disk
	Clones                        bool // two installations with one identity
	ClientCrashes                 bool // a client loses what it had not synced
	NewDevices                    bool // devices that appear late
	ManyDevices                   bool // one user has more than are allowed
	SmallMailboxes                bool // full at simMailboxRows
	SmallOwners                   bool // hold few messages, and remember few conversations
	ClockSteps                    bool
	RateLimit                     bool
}

const simMailboxRows = 8

func drawOptions(rng *rand.Rand) simOptions {
	yes := func() bool { return rng.IntN(3) > 0 }
	return simOptions{
		Users: 2 + rng.IntN(3), Devices: 1 + rng.IntN(2), Edges: 1 + rng.IntN(3), Shards: 1 + rng.IntN(2),
		Sends: 20 + rng.IntN(60), OneServer: rng.IntN(2) == 0,
		Crashes: yes(), LateOwners: rng.IntN(4) == 0, Doubles: yes(), QueueFails: yes(), ReadErrors: yes(),
		Slow: yes(), Disconnects: yes(), Restores: rng.IntN(2) == 0, Clones: rng.IntN(2) == 0, ClientCrashes: yes(),
		NewDevices: yes(), ManyDevices: rng.IntN(10) == 0, SmallMailboxes: yes(), SmallOwners: yes(), ClockSteps: yes(), RateLimit: rng.IntN(4) == 0,
	}
}

type simEvent struct {
	at  int64
	n   uint64
	run func()
}

// simEvents is a heap by time, then by the order in which they were asked for.
type simEvents []simEvent

func (h simEvents) less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].n < h[j].n
}

func (h *simEvents) push(e simEvent) {
	*h = append(*h, e)
	l := *h
	for i := len(l) - 1; i > 0 && l.less(i, (i-1)/2); i = (i - 1) / 2 {
		l[i], l[(i-1)/2] = l[(i-1)/2], l[i]
	}
}

func (h *simEvents) pop() simEvent {
	l := *h
	first, last := l[0], len(l)-1
	l[0], l[last] = l[last], simEvent{}
	l = l[:last]
	*h = l
	for i := 0; ; {
		least := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(l); child++ {
			if l.less(child, least) {
				least = child
			}
		}
		if least == i {
			return first
		}
		l[i], l[least] = l[least], l[i]
		i = least
	}
}

type sim struct {
	rng *rand.Rand
	opt simOptions
	mut string // the rule that is broken on purpose, "" for none

	now    int64 // simulated monotonic milliseconds
	step   int64 // how far the wall clock is off
	events simEvents
	number uint64
	healed bool

	process simProcess
	table   *router.Table
	store   *simStore
	queue   *simQueue
	shards  []*simShard
	edges   []*simEdge
	clients []*simClient
	logins  uint64
	conns   uint64

	truth      *simTruth
	tracing    bool
	trace      []string // when tracing
	violations []string
	broken     string // what was violated first, without its particulars
	crashes    int

	planned int          // sends and faults
	skip    map[int]bool // those left out by the shrinker
}

const simStart = 1_700_000_000_000

// simPlan is what is played.
type simPlan struct {
	seed    uint64
	mut     string
	opt     *simOptions       // nil: drawn from the seed
	world   func(*simOptions) // changes what was drawn
	skip    map[int]bool
	tracing bool
}

func newSim(p simPlan) *sim {
	rng := rand.New(rand.NewPCG(p.seed, 0x6d696c6c72616365))
	s := &sim{rng: rng, mut: p.mut, skip: p.skip, tracing: p.tracing, table: router.NewTable()}
	s.opt = drawOptions(rng)
	if p.opt != nil {
		s.opt = *p.opt
	} else if p.world != nil {
		p.world(&s.opt)
	}
	s.truth = newSimTruth(s)
	s.store = newSimStore(s)
	s.queue = newSimQueue(s)
	s.process.begin(s)
	for n := range s.opt.Shards {
		if s.opt.OneServer && n > 0 {
			s.shards[0].parts = append(s.shards[0].parts, n)
			continue
		}
		s.shards = append(s.shards, &simShard{sim: s, number: n, parts: []int{n}})
	}
	for _, sh := range s.shards {
		sh.start()
	}
	for n := range s.opt.Edges {
		s.edges = append(s.edges, newSimEdge(s, uint32(n+1)))
	}
	for u := range s.opt.Users {
		devices := s.opt.Devices
		if u == 0 && s.opt.ManyDevices {
			devices = protocol.MaxDevicesPerUser + 2
		}
		for d := range devices {
			s.addClient(fmt.Sprintf("u%d", u), fmt.Sprintf("d%d", d))
		}
	}
	return s
}

// simProcess is the clock that all owners share, as in one process: it steps only when everything restarts.
type simProcess struct {
	wall        int64 // when it began
	born        int64 // the same in simulated milliseconds
	notBeforeMs int64
}

func (p *simProcess) begin(s *sim) {
	*p = simProcess{wall: s.wall(), born: s.now, notBeforeMs: s.store.lastMs()}
	if s.mut == "receipts are dated by the clock alone" {
		p.notBeforeMs = 0
	}
}

func (s *sim) wall() int64 { return simStart + s.now + s.step }

func (s *sim) after(delay int64, run func()) {
	s.number++
	s.events.push(simEvent{s.now + delay, s.number, run})
}

// plan is after for what a smaller world can do without.
func (s *sim) plan(delay int64, run func()) {
	if !s.skip[s.planned] {
		s.after(delay, run)
	}
	s.planned++
}

func (s *sim) chance(oneIn int) bool { return s.rng.IntN(oneIn) == 0 }

func (s *sim) logf(format string, args ...any) {
	if !s.tracing {
		return
	}
	s.trace = append(s.trace, fmt.Sprintf("%7d ms  ", s.now)+fmt.Sprintf(format, args...))
}

func (s *sim) violate(promise, format string, args ...any) {
	if s.broken == "" {
		s.broken = promise + ": " + format
	}
	v := promise + ": " + fmt.Sprintf(format, args...)
	s.violations = append(s.violations, v)
	s.logf("VIOLATION %s", v)
}

// partOf is the partition of a conversation.
func (s *sim) partOf(conversation uint64) int { return int(conversation % uint64(s.opt.Shards)) }

func (s *sim) shardOf(conversation uint64) *simShard {
	if s.opt.OneServer {
		return s.shards[0]
	}
	return s.shards[s.partOf(conversation)]
}

// run plays the faults, heals, and judges.
func (s *sim) run() {
	const faultsMs, healMs = 60_000, 70_000
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
		s.plan(s.rng.Int64N(faultsMs), func() { c.send(to) })
	}
	s.scheduleFaults(faultsMs)
	for _, sh := range s.shards {
		s.every(200, sh.tick)
	}
	for _, e := range s.edges {
		s.every(1000, e.sweep)
	}
	s.playUntil(faultsMs)
	s.heal()
	s.playUntil(faultsMs + healMs - 20_000)
	s.truth.judgeWaiting()
	for _, c := range s.clients { // whatever an acknowledgement lost in a crash left behind is drained by the next connection
		if c.active() {
			c.drop("heal")
			s.after(10, c.connect)
		}
	}
	s.playUntil(faultsMs + healMs)
	s.truth.judge()
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
		e := s.events.pop()
		s.now = max(s.now, e.at)
		e.run()
	}
	s.now = at
}

func (s *sim) scheduleFaults(until int64) {
	at := func(n int, run func()) {
		for range n {
			s.plan(s.rng.Int64N(until), run)
		}
	}
	pick := func() *simClient { return s.clients[s.rng.IntN(len(s.clients))] }
	shard := func() *simShard { return s.shards[s.rng.IntN(len(s.shards))] }
	if s.opt.Disconnects {
		at(4*len(s.clients), func() { pick().drop("network") })
	}
	if s.opt.Crashes {
		at(3, func() { shard().crash() })
		at(2, func() { s.edges[s.rng.IntN(len(s.edges))].crash() })
		at(2, s.crashAll)
	}
	if s.opt.LateOwners {
		at(3, func() { shard().takeOver() })
	}
	if s.opt.Slow {
		at(2*len(s.clients), func() { pick().stall(s.rng.Int64N(15_000)) })
		at(2*len(s.clients), func() { pick().mute(s.rng.Int64N(15_000)) })
	}
	if s.opt.Restores {
		for range 2 {
			c := pick()
			s.plan(s.rng.Int64N(until/2), c.backup)
			s.plan(until/2+s.rng.Int64N(until/2), c.restore)
		}
	}
	if s.opt.Clones {
		at(1, func() { pick().clone() })
	}
	if s.opt.ClientCrashes {
		at(2, func() { pick().crash() })
	}
	if s.opt.ClockSteps {
		most := int64(3_600_000)
		if !s.opt.OneServer {
			most = protocol.ReceiptsSlackMillis / 3 // the clocks of a cluster do not differ by more than that allows
		}
		at(2, func() { s.step += s.rng.Int64N(2*most) - most; s.logf("clock steps to %+d ms", s.step) })
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
	s.logf("the whole process crashes")
	s.crashes++
	for _, e := range s.edges {
		e.crash()
	}
	s.queue.crash()
	s.store.crashRegistrations()
	for _, sh := range s.shards {
		sh.end()
	}
	s.process.begin(s)
	for _, sh := range s.shards {
		sh.start()
	}
}

// readFails is whether a read of the log or of the store fails now.
func (s *sim) readFails() bool { return s.opt.ReadErrors && !s.healed && s.chance(15) }

func conversationOf(r *backend.Record) string { return backend.ConversationKey(r.Sender, r.Receiver) }
