package main

import (
	"log/slog"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// simShard is one partition, or all of them where one server owns them: its owner, and perhaps an earlier one that does
// not know that it was replaced.
type simShard struct {
	sim     *sim
	number  int   // among those that have an owner
	parts   []int // the partitions
	owner   *simOwner
	late    *simOwner
	changed int64 // when the last owner came
	twoTill int64 // when the last late one ended; 0: there was none
}

// simOwner is one backend.Server. A crash ends it, and a new one replays the log.
type simOwner struct {
	shard     *simShard
	server    *backend.Server
	reader    *simReader
	dead      bool
	ready     int64           // when it begins
	scheduled []bool          // steps, by partition
	writes    [][]func() bool // by partition: commits that are not durable
	toEdge    []int64         // by edge: when the last thing on the link arrives
	toOwner   []int64
}

func (sh *simShard) start() {
	s := sh.sim
	o := &simOwner{shard: sh, ready: s.now, scheduled: make([]bool, len(sh.parts)), writes: make([][]func() bool, len(sh.parts)),
		toEdge: make([]int64, s.opt.Edges), toOwner: make([]int64, s.opt.Edges)}
	o.reader = newSimReader(o)
	process := s.process
	cfg := backend.Config{
		Queue: o.reader, Store: simView{s.store, o}, Locator: s.table, Pusher: o,
		Answer: func(batch []protocol.Answer) { panic("the queue answers by itself") },
		Page:   o.page, ReceiptsPage: o.receiptsPage, Fenced: o.fenced,
		Identity: make([]byte, backend.SecretBytes),
		Now: func() time.Time {
			return time.UnixMilli(process.wall + s.now - process.born)
		},
		// The clock of a process goes on when one of its owners is replaced.
		NotBeforeMs: process.notBeforeMs + s.now - process.born,
		Logger:      slog.New(slog.DiscardHandler),
	}
	if s.opt.SmallOwners {
		cfg.MaxInFlight, cfg.MaxIdleConversations = 12, 2
	}
	if s.mut == "no time-out" {
		cfg.AcknowledgeAfter = 1000 * time.Hour
	}
	server, err := backend.NewServer(cfg)
	if err != nil {
		panic(err)
	}
	o.server = server
	s.store.greet(server.Hooks())
	sh.owner, sh.changed = o, s.now
	if sh.changed > 0 {
		o.ready += s.rng.Int64N(3000)
	}
	o.wake()
}

func (sh *simShard) owners() []*simOwner {
	var list []*simOwner
	for _, o := range []*simOwner{sh.owner, sh.late} {
		if o != nil {
			list = append(list, o)
		}
	}
	return list
}

// either is who is taken for the owner: the one, or with a late one any of the two.
func (sh *simShard) either() *simOwner {
	if sh.late != nil && sh.sim.chance(2) {
		return sh.late
	}
	return sh.owner
}

func (sh *simShard) wake() {
	for _, o := range sh.owners() {
		o.wake()
	}
}

// tick is the ticker of every Server.
func (sh *simShard) tick() {
	for _, o := range sh.owners() {
		for part := range o.scheduled {
			if sh.sim.now >= o.ready && o.server.Step(part) {
				o.wake()
			}
		}
	}
}

func (sh *simShard) crash() {
	sh.sim.logf("owner %d crashes", sh.number)
	sh.sim.crashes++
	sh.end()
	sh.start()
}

func (sh *simShard) end() {
	sh.endLate()
	sh.owner.end()
	sh.owner = nil
}

// takeOver makes a new owner while the old one goes on for some time.
func (sh *simShard) takeOver() {
	s := sh.sim
	sh.endLate()
	late := sh.owner
	s.logf("owner %d is replaced and goes on", sh.number)
	sh.start()
	sh.late = late
	s.after(s.rng.Int64N(15_000), func() {
		if sh.late == late {
			sh.endLate()
		}
	})
}

func (sh *simShard) endLate() {
	if sh.late != nil {
		sh.sim.logf("the late owner %d ends", sh.number)
		sh.late.end()
		sh.late, sh.twoTill = nil, sh.sim.now
	}
}

// hadTwo reports whether two owners were at work at or after some time.
func (sh *simShard) hadTwo(since int64) bool {
	return sh.late != nil || sh.twoTill > 0 && sh.twoTill >= since
}

// audit: what the Server counts as a broken promise is one.
func (o *simOwner) audit() {
	o.server.Metrics(func(name, _ string, _ bool, value float64, labels ...string) {
		if name == "millrace_backend_invariant_violations_total" && value > 0 {
			o.shard.sim.violate("counter", "owner %d counts %v violations of %v", o.shard.number, value, labels)
		}
	})
}

// end loses what was not durable, and pages that were asked for.
func (o *simOwner) end() {
	o.audit()
	o.dead, o.writes = true, nil
	for _, e := range o.shard.sim.edges {
		for _, id := range sortedKeys(e.sessions) {
			if session := e.sessions[id]; session.pageFrom == o || session.receiptsFrom == o {
				o.shard.sim.after(o.shard.sim.rng.Int64N(50), func() { session.backendGone(o) })
			}
		}
	}
}

func (o *simOwner) wake() {
	for part := range o.scheduled {
		if o.dead || o.scheduled[part] {
			continue
		}
		o.scheduled[part] = true
		s := o.shard.sim
		s.after(max(0, o.ready-s.now)+s.rng.Int64N(10), func() { o.step(part) })
	}
}

func (o *simOwner) step(part int) {
	o.scheduled[part] = false
	if !o.dead && o.server.Step(part) {
		o.wake()
	}
}

// inFlight is what the Server says in its metrics.
func (o *simOwner) inFlight() (n int) {
	o.server.Metrics(func(name, _ string, _ bool, value float64, _ ...string) {
		if name == "millrace_backend_in_flight" {
			n += int(value)
		}
	})
	return n
}

// send runs something at an edge, in the order of the link.
func (o *simOwner) send(e *simEdge, run func()) {
	s, at := o.shard.sim, &o.toEdge[e.id-1]
	*at = max(*at, s.now+s.rng.Int64N(8))
	s.after(*at-s.now, run)
}

// receive runs something at the owner, in the order of the link; lost, if it is gone.
func (o *simOwner) receive(e *simEdge, run, lost func()) {
	s, at := o.shard.sim, &o.toOwner[e.id-1]
	*at = max(*at, s.now+s.rng.Int64N(10))
	s.after(*at-s.now, func() {
		if !o.dead {
			run()
		} else if lost != nil {
			lost()
		}
	})
}

// toSession finds the session when what is sent arrives.
func (o *simOwner) toSession(to protocol.Session, run func(*simSession), gone func(*simEdge)) {
	e := o.shard.sim.edges[to.Edge-1]
	o.send(e, func() {
		if session := o.shard.sim.session(to); session != nil {
			run(session)
		} else if gone != nil {
			gone(e)
		}
	})
}

// Push is a backend.Pusher's.
func (o *simOwner) Push(batch []protocol.Push) {
	for _, p := range batch {
		o.toSession(p.To, func(s *simSession) { s.push(p) }, func(e *simEdge) {
			m := p.Message
			e.settle(protocol.Outcome{Kind: protocol.Refused, Conversation: m.Conversation, Position: m.Position, ID: m.ID,
				User: []byte(m.Receiver), Device: []byte(p.Device)})
		})
	}
}

// Notify is a backend.Pusher's.
func (o *simOwner) Notify(batch []protocol.Session) {
	if o.shard.sim.mut == "no notice after a mailbox write" {
		return
	}
	for _, to := range batch {
		o.toSession(to, func(s *simSession) { s.effects(s.down.Notify()) }, nil)
	}
}

// Receipts is a backend.Pusher's.
func (o *simOwner) Receipts(batch []protocol.ReceiptPush) {
	for _, r := range batch {
		o.toSession(r.To, func(s *simSession) { s.receipt(r) }, nil)
	}
}

func (o *simOwner) page(p protocol.Page) {
	o.toSession(p.To, func(s *simSession) { s.page(p, o) }, nil)
}

func (o *simOwner) receiptsPage(p protocol.ReceiptsPage) {
	o.toSession(p.To, func(s *simSession) { s.receiptsPage(p, o) }, nil)
}

// read asks for a reading, which is done some time later.
func (o *simOwner) read(e *simEdge, ask func()) {
	o.receive(e, func() {
		ask()
		o.shard.sim.after(o.shard.sim.rng.Int64N(15), func() {
			if !o.dead {
				o.server.StepMailbox()
			}
		})
	}, nil)
}

func (o *simOwner) fenced(f protocol.Fence) {
	e := o.shard.sim.edges[f.Edge-1]
	o.send(e, func() {
		if e.life == f.Loop {
			e.fenceAnswered(o.shard.number, f.Number)
		}
	})
}
