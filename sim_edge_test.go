package main

import (
	"slices"

	"millrace/backend"
	"millrace/edge"
	"millrace/protocol"
)

// simConn is one WebSocket connection: two ordered pipes that can be cut.
type simConn struct {
	client   *simClient
	edge     *simEdge
	session  *simSession
	id       uint64
	cut      bool
	toEdgeAt int64 // when the last thing sent arrives; keeps each direction in order
	toClient int64
	unread   int                          // frames written and not read by the client
	wrote    map[protocol.MessageID]int64 // when each message was written first
}

func (c *simConn) up(run func(*simSession)) {
	s := c.edge.sim
	c.toEdgeAt = max(c.toEdgeAt, s.now+1+s.rng.Int64N(20))
	s.after(c.toEdgeAt-s.now, func() {
		if !c.cut && c.session != nil {
			run(c.session)
		}
	})
}

func (c *simConn) down(run func(*simClient)) {
	s := c.edge.sim
	c.toClient = max(c.toClient, s.now+1+s.rng.Int64N(20), c.client.stalledUntil)
	c.unread++
	s.after(c.toClient-s.now, func() {
		if c.cut || c.client.conn != c {
			return
		}
		c.unread--
		run(c.client)
	})
}

// simEdge holds sessions; a crash cuts them all and reports nothing. It has one event loop.
type simEdge struct {
	sim      *sim
	id       uint32
	life     uint8 // stands for the loop of a fence, so that an answer to an earlier life is told apart
	sessions map[uint64]*simSession

	unfenced bool     // something was acknowledged since the last fence
	fence    uint64   // the number of the next
	fenced   uint64   // the last that every owner answered
	answered []uint64 // by shard
	asking   bool     // a fence is asked for, or will be soon
}

func newSimEdge(s *sim, id uint32) *simEdge {
	e := &simEdge{sim: s, id: id, sessions: map[uint64]*simSession{}}
	e.begin()
	return e
}

func (e *simEdge) begin() {
	e.life++
	e.unfenced, e.asking, e.fence, e.fenced, e.answered = false, false, 1, 0, make([]uint64, len(e.sim.shards))
}

type simSession struct {
	edge         *simEdge
	conn         *simConn
	user, device string
	epoch        uint64
	open         bool
	up           edge.Uplink
	full         edge.FullReceivers
	down         edge.Downlink
	replay       edge.ReceiptReplay
	pageFrom     *simOwner // who was asked for a page
	receiptsFrom *simOwner // who was asked for a page of receipts
}

var simRate = edge.RateLimit{PerSecond: 2, Burst: 3}

func (s *sim) rate() *edge.RateLimit {
	if s.opt.RateLimit {
		return &simRate
	}
	return &edge.RateLimit{}
}

// session is the open session of that name, nil when it is gone.
func (s *sim) session(to protocol.Session) *simSession {
	if session := s.edges[to.Edge-1].sessions[to.Conn]; session != nil && session.open {
		return session
	}
	return nil
}

func (e *simEdge) crash() {
	e.sim.logf("edge %d crashes", e.id)
	e.sim.crashes++
	for _, id := range sortedKeys(e.sessions) {
		session := e.sessions[id]
		e.remove(session, false)
		session.conn.client.lost(session.conn, "edge crash")
	}
	e.begin()
}

func sortedKeys(m map[uint64]*simSession) []uint64 {
	var keys []uint64
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// remove ends a session. An edge that crashed answers nothing; its routes end with its lease.
func (e *simEdge) remove(s *simSession, orderly bool) {
	if e.sessions[s.conn.id] != s {
		return
	}
	delete(e.sessions, s.conn.id)
	s.conn.cut = true
	if s.open {
		if orderly {
			s.down.End(func(p edge.Pending) { s.outcome(protocol.Lost, p) })
		}
		e.sim.table.Unbind([]byte(s.user), []byte(s.device), s.ref())
	}
	s.open = false
}

func (e *simEdge) sweep() {
	for _, id := range sortedKeys(e.sessions) {
		if s := e.sessions[id]; s != nil && s.open {
			s.effects(s.down.Sweep(uint32(e.sim.now/1000), s.buffered(), true, e.doneFence()))
			if s.open && s.room() {
				s.readReceipts()
			}
		}
	}
}

var simOutcomes = map[protocol.OutcomeKind]string{protocol.Acknowledged: "acknowledged", protocol.Refused: "refused", protocol.Lost: "lost"}

// settle gives an outcome to whoever is taken for the owner.
func (e *simEdge) settle(out protocol.Outcome) {
	o := e.sim.shardOf(out.Conversation).either()
	o.receive(e, func() {
		e.sim.logf("owner %d hears that %s/%s has %s %d", o.shard.number, out.User, out.Device, simOutcomes[out.Kind], out.Position)
		o.server.Settle([]protocol.Outcome{out})
		o.wake()
	}, nil)
}

// wantFence asks for a fence soon, when none is under way.
func (e *simEdge) wantFence() {
	if e.asking || !e.unfenced {
		return
	}
	e.asking = true
	life := e.life
	e.sim.after(e.sim.rng.Int64N(100), func() {
		if e.life == life {
			e.requestFence()
		}
	})
}

// requestFence asks every owner. One that crashes meanwhile never answers, so it asks again after a second.
func (e *simEdge) requestFence() {
	const patience = 1000
	f := protocol.Fence{Edge: e.id, Loop: e.life, Number: e.fence}
	e.fence++
	e.unfenced = false
	e.sim.logf("edge %d asks for fence %d", e.id, f.Number)
	for _, sh := range e.sim.shards {
		o := sh.owner
		o.receive(e, func() {
			o.server.Fence(f)
			o.wake()
		}, nil)
	}
	e.sim.after(patience, func() {
		if e.life == f.Loop && e.fenced < f.Number && e.fence == f.Number+1 {
			e.requestFence()
		}
	})
}

func (e *simEdge) fenceAnswered(shard int, number uint64) {
	e.sim.logf("edge %d: owner %d answers fence %d", e.id, shard, number)
	e.answered[shard] = max(e.answered[shard], number)
	e.fenced = slices.Min(e.answered)
	if e.fenced+1 == e.fence {
		e.asking = false
		e.wantFence()
	}
}

// doneFence is what the downlinks are told.
func (e *simEdge) doneFence() uint64 {
	if e.sim.mut == "acknowledgements are forgotten at once" {
		return 1 << 60
	}
	return e.fenced
}

func (s *simSession) ref() protocol.Session {
	return protocol.Session{Edge: s.edge.id, Conn: s.conn.id, Generation: s.down.Generation()}
}

// buffered models the outbound buffer: what a reader that stalls has not read.
func (s *simSession) buffered() int { return max(0, s.conn.unread-6) }
func (s *simSession) room() bool    { return s.buffered() < 8 }

// begin opens the session when its device is registered.
func (s *simSession) begin(block uint32, heir bool, receiptsAfter int64) {
	sm := s.edge.sim
	sm.logins++
	s.open = true
	old, replaced, _ := sm.table.Bind(s.user, s.device, s.ref(), sm.logins)
	if replaced {
		sm.after(sm.rng.Int64N(8), func() {
			if o := sm.session(old); o != nil {
				o.replaced()
			}
		})
	}
	s.up.Start(block)
	first := protocol.FirstSeq(block)
	s.conn.down(func(c *simClient) { c.connected(first) })
	s.effects(s.down.Start(heir))
	s.replay.Start(max(0, receiptsAfter-protocol.ReceiptsSlackMillis))
	s.readReceipts()
}

func (s *simSession) replaced() {
	c := s.conn.client
	s.edge.remove(s, true)
	c.replaced(s.conn)
}

func (s *simSession) outcome(kind protocol.OutcomeKind, p edge.Pending) {
	s.edge.settle(protocol.Outcome{Kind: kind, UserMailbox: p.UserMailbox, Conversation: p.Conversation, Position: p.Position,
		ID: p.ID, User: []byte(s.user), Device: []byte(s.device)})
}

func (s *simSession) effects(e edge.Effects) {
	sm := s.edge.sim
	if e&edge.CloseSlow != 0 {
		client := s.conn.client
		s.edge.remove(s, true)
		client.lost(s.conn, "slow")
		return
	}
	if e&edge.StateChanged != 0 {
		sm.table.SetState([]byte(s.user), []byte(s.device), s.ref(), s.down.Live())
	}
	if e&edge.ReadPage != 0 {
		s.readPage()
	}
}

// readPage asks any backend: they have one store.
func (s *simSession) readPage() {
	sm := s.edge.sim
	after, limit := s.down.Request(s.edge.doneFence())
	r := protocol.PageRequest{Session: s.ref(), User: s.user, Device: s.device, Heir: s.down.Heir(), After: after, Limit: min(4, limit)}
	o := sm.anyOwner()
	s.pageFrom = o
	o.read(s.edge, func() { o.server.ReadPage(r) })
}

func (s *sim) anyOwner() *simOwner { return s.shards[s.rng.IntN(len(s.shards))].owner }

// backendGone is what an edge makes of that.
func (s *simSession) backendGone(o *simOwner) {
	if s.pageFrom == o && s.open {
		s.pageFrom = nil
		s.down.PageFailed()
	}
	if s.receiptsFrom == o {
		s.receiptsFrom = nil
	}
}

func (s *simSession) page(p protocol.Page, from *simOwner) {
	if s.pageFrom != from {
		return
	}
	s.pageFrom = nil
	if p.Code != protocol.OK {
		s.down.PageFailed()
		return
	}
	ok, e := s.down.BeginPage(p.After)
	if !ok {
		s.effects(e)
		return
	}
rows:
	for _, row := range p.Rows {
		switch s.down.Row(pendingOf(row.Message, row.UserMailbox), s.room()) {
		case edge.Write:
			s.write(row.Message)
		case edge.StopPage:
			break rows
		}
	}
	s.effects(s.down.EndPage(p.Next, p.End))
}

// readReceipts asks any backend for the next page of the replay.
func (s *simSession) readReceipts() {
	sm := s.edge.sim
	if !s.replay.Active() || s.receiptsFrom != nil {
		return
	}
	r := protocol.ReceiptsRequest{Session: s.ref(), User: s.user, After: s.replay.After(), Limit: 1 + sm.rng.IntN(3)}
	o := sm.anyOwner()
	s.receiptsFrom = o
	o.read(s.edge, func() { o.server.ReadReceipts(r) })
}

// receiptsPage takes a page. One that could not be read is asked for again by the sweep.
func (s *simSession) receiptsPage(p protocol.ReceiptsPage, from *simOwner) {
	if s.receiptsFrom != from {
		return
	}
	s.receiptsFrom = nil
	if p.Code != protocol.OK {
		return
	}
	for _, r := range p.Receipts {
		s.writeReceipt(r)
	}
	s.replay.Page(p.Next, p.End)
	s.readReceipts()
}

// receipt takes a live receipt: not while a replay is under way, and not when a slow reader has no room for it.
func (s *simSession) receipt(r protocol.ReceiptPush) {
	if s.replay.Active() || !s.room() {
		s.replay.Miss(r.Millis)
		return
	}
	s.writeReceipt(r)
}

func (s *simSession) writeReceipt(r protocol.ReceiptPush) {
	if r.Device != s.device || r.Epoch != s.epoch {
		r.Seq = 0
	}
	s.conn.down(func(c *simClient) { c.receipt(r) })
}

func pendingOf(m *protocol.Message, userMailbox bool) edge.Pending {
	return edge.Pending{ID: m.ID, Conversation: m.Conversation, Position: m.Position, UserMailbox: userMailbox}
}

func (s *simSession) push(p protocol.Push) {
	pending := pendingOf(p.Message, false)
	v, e := s.down.Push(p.To.Generation, pending, s.room())
	s.effects(e)
	switch v {
	case edge.Write:
		s.write(p.Message)
	case edge.RefusePush:
		s.outcome(protocol.Refused, pending)
	}
}

func (s *simSession) write(m *protocol.Message) {
	if s.edge.sim.mut == "a push goes to any session of the edge" {
		s = s.edge.sessions[sortedKeys(s.edge.sessions)[0]]
	}
	s.edge.sim.logf("edge %d writes %s to %s", s.edge.id, m.Content, s.conn.client.name)
	s.edge.sim.truth.written(s.conn, m)
	s.conn.down(func(c *simClient) { c.incoming(m) })
}

func (s *simSession) answer(a protocol.Answer) {
	resend, ok := s.up.Answer(a.Seq, a.Refusal, s.edge.sim.now)
	if ok {
		s.conn.down(func(c *simClient) { c.answered(a, resend) })
	}
}

// send is one send_message as it arrives at the edge.
func (s *simSession) send(seq uint64, to, content string) {
	sm := s.edge.sim
	v, r, resend := s.up.Offer(seq, sm.now, sm.rate())
	if sm.mut == mutNoSpan {
		v = edge.Publish
		s.up.Start(protocol.SeqBlock(s.up.First()))
	}
	switch v {
	case edge.Ignore:
		return
	case edge.Publish:
		if r = s.publish(seq, to, content); r.Code == protocol.OK {
			s.up.Handed(seq)
			return
		}
		resend = s.up.Refused(seq, r, sm.now)
		if sm.mut == "a refusal does not hold the stream back" {
			s.up.Ended(seq)
		}
	case edge.Flood, edge.BlockUsed:
		panic("not reached by the simulation")
	}
	a := protocol.Answer{Seq: seq, Refusal: r}
	s.conn.down(func(c *simClient) { c.answered(a, resend) })
}

func (s *simSession) publish(seq uint64, to, content string) (r protocol.Refusal) {
	sub := protocol.Submission{From: s.ref(), User: []byte(s.user), Device: []byte(s.device), Epoch: s.epoch, Seq: seq,
		Resend: s.up.Resend(seq), Receiver: []byte(to), Content: []byte(content)}
	sm := s.edge.sim
	if !sub.Resend && s.full.Refuses(sub.Receiver, seq) && sm.mut != "mailbox_full does not stick" {
		r.Code = protocol.CodeMailboxFull
	} else {
		r = sm.shardOf(protocol.ConversationHash(s.user, to)).owner.server.Publish(&sub)
	}
	if r.Code == protocol.CodeMailboxFull {
		s.full.Refused(sub.Receiver, seq)
	}
	return r
}

func (s *simSession) acknowledge(id protocol.MessageID) {
	p, ok, e := s.down.Acknowledge(id, s.room(), s.edge.fence, s.edge.doneFence())
	if ok {
		s.outcome(protocol.Acknowledged, p)
		s.edge.unfenced = true
		s.edge.wantFence()
	}
	s.effects(e)
}

// register is what the root's registrar does.
func (s *simSession) register(receiptsAfter int64) {
	s.edge.sim.store.register(backend.Stream{User: s.user, Device: s.device, Epoch: s.epoch},
		func(block uint32, heir bool, refusal protocol.Refusal) {
			switch {
			case s.conn.cut || s.edge.sessions[s.conn.id] != s:
			case refusal.Code != protocol.OK:
				conn := s.conn
				s.edge.remove(s, true)
				conn.client.turnedAway(conn, refusal)
			default:
				s.begin(block, heir, receiptsAfter)
			}
		})
}
