package main

import (
	"fmt"
	"slices"
	"strings"

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
	unread   int // frames written and not read by the client
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

// simEdge holds sessions; a crash cuts them all and reports nothing.
type simEdge struct {
	sim      *sim
	id       uint32
	sessions map[uint64]*simSession
	linkAt   int64 // owners' frames arrive in order
}

type simSession struct {
	edge         *simEdge
	conn         *simConn
	user, device string
	epoch        uint64
	open         bool
	up           edge.Uplink
	down         edge.Downlink
}

var simRate = edge.RateLimit{PerSecond: 2, Burst: 3}

func (s *sim) rate() *edge.RateLimit {
	if s.opt.RateLimit {
		return &simRate
	}
	return &edge.RateLimit{}
}

func (s *sim) edgeOf(session protocol.Session) *simEdge { return s.edges[session.Edge-1] }

func (s *sim) toEdge(to protocol.Session, run func(*simSession), gone func()) {
	e := s.edgeOf(to)
	e.linkAt = max(e.linkAt, s.now+s.rng.Int64N(8))
	s.after(e.linkAt-s.now, func() {
		if session := e.sessions[to.Conn]; session != nil && session.open {
			run(session)
		} else if gone != nil {
			gone()
		}
	})
}

func (s *sim) answer(a protocol.Answer) {
	if session := s.edgeOf(a.To).sessions[a.To.Conn]; session != nil && session.open {
		session.answer(a)
	}
}

func (s *sim) refused(p protocol.Push) {
	m := p.Message
	s.outcome(m.Conversation, backend.Settlement{Kind: protocol.Refused, Position: m.Position, ID: m.ID, User: m.Receiver, Device: p.Device})
}

// outcome goes to whoever owns the conversation now.
func (s *sim) outcome(conversation uint64, out backend.Settlement) {
	o := s.owners[conversation%uint64(len(s.owners))]
	life := o.life
	s.after(s.rng.Int64N(10), func() {
		if o.life == life {
			o.settle(out)
		}
	})
}

func (e *simEdge) crash() {
	e.sim.logf("edge %d crashes", e.id)
	for _, id := range sortedKeys(e.sessions) {
		session := e.sessions[id]
		e.remove(session, false)
		session.conn.client.lost(session.conn, "edge crash")
	}
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
			s.effects(s.down.Sweep(uint32(e.sim.now/1000), s.buffered(), true, 0))
		}
	}
}

func (s *simSession) ref() protocol.Session {
	return protocol.Session{Edge: s.edge.id, Conn: s.conn.id, Generation: s.down.Generation()}
}

// buffered models the outbound buffer: what a reader that stalls has not read.
func (s *simSession) buffered() int { return max(0, s.conn.unread-6) }
func (s *simSession) room() bool    { return s.buffered() < 8 }

func (s *simSession) outcome(kind protocol.OutcomeKind, p edge.Pending) {
	device := s.device
	if p.UserMailbox {
		device = ""
	}
	s.edge.sim.outcome(p.Conversation, backend.Settlement{Kind: kind, Position: p.Position, ID: p.ID, User: s.user, Device: device})
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

func (s *simSession) readPage() {
	sm := s.edge.sim
	after, limit := s.down.Request(0)
	r := protocol.PageRequest{Session: s.ref(), User: s.user, Device: s.device, Heir: s.down.Heir(), After: after, Limit: min(4, limit)}
	sm.after(sm.rng.Int64N(15), func() {
		page, err := backend.ReadMailboxPage(sm.store, &r)
		if err != nil {
			panic(err)
		}
		sm.after(sm.rng.Int64N(15), func() {
			if s.open {
				s.page(page)
			}
		})
	})
}

func (s *simSession) page(p protocol.Page) {
	ok, e := s.down.BeginPage(p.After)
	if !ok {
		s.effects(e)
		return
	}
	for _, row := range p.Rows {
		switch s.down.Row(pendingOf(row.Message, row.UserMailbox), s.room()) {
		case edge.Write:
			s.write(row.Message)
		case edge.StopPage:
			s.effects(s.down.EndPage(p.Next, p.End))
			return
		}
	}
	s.effects(s.down.EndPage(p.Next, p.End))
}

func pendingOf(m *protocol.Message, userMailbox bool) edge.Pending {
	return edge.Pending{ID: m.ID, Conversation: m.Conversation, Position: m.Position, UserMailbox: userMailbox}
}

func (s *simSession) notify() { s.effects(s.down.Notify()) }

func (s *simSession) push(p protocol.Push) {
	generation := p.To.Generation
	if s.edge.sim.mut == "the generation is not checked" {
		generation = s.down.Generation()
	}
	v, e := s.down.Push(generation, pendingOf(p.Message, false), s.room())
	s.effects(e)
	switch v {
	case edge.Write:
		s.write(p.Message)
	case edge.RefusePush:
		s.outcome(protocol.Refused, pendingOf(p.Message, false))
	}
}

func (s *simSession) write(m *protocol.Message) {
	if s.edge.sim.mut == "a push goes to any session of the edge" {
		for _, id := range sortedKeys(s.edge.sessions) {
			s = s.edge.sessions[id]
			break
		}
	}
	s.conn.down(func(c *simClient) { c.incoming(m) })
}

func (s *simSession) receipt(r protocol.ReceiptPush) {
	if r.Device != s.device || r.Epoch != s.epoch {
		r.Seq = 0
	}
	s.conn.down(func(c *simClient) { c.receipt(r) })
}

func (s *simSession) answer(a protocol.Answer) {
	resend, ok := s.up.Answer(a.Seq, a.Refusal, s.edge.sim.now)
	if ok {
		s.conn.down(func(c *simClient) { c.answered(a, resend) })
	}
}

// send is one send_message as it arrives at the edge.
func (s *simSession) send(seq uint64, to string, content string) {
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
		record := &backend.Record{
			Message: protocol.Message{Conversation: protocol.ConversationHash(s.user, to), Sender: s.user, Receiver: to, Content: []byte(content)},
			Device:  s.device, Epoch: s.epoch, Seq: seq, From: s.ref(), Resend: s.up.Resend(seq),
		}
		record.ID = sm.identity.MessageID(record.Stream(), backend.ConversationKey(s.user, to), seq)
		if sm.mut == "every send gets a new message id" {
			record.ID[0] ^= byte(sm.rng.IntN(256))
		}
		if r = sm.queue.append(record); r.Code == protocol.OK {
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

func (s *simSession) acknowledge(id protocol.MessageID) {
	p, ok, e := s.down.Acknowledge(id, s.room(), 1, 0)
	if ok {
		s.outcome(protocol.Acknowledged, p)
	}
	s.effects(e)
}

// simDisk is what an installation of a client keeps: the stream, what it wants to send, what it has shown.
type simDisk struct {
	user, device string
	epoch        uint64
	open         []simSend
	shown        map[protocol.MessageID]uint64
	receiptsAt   int64
	life         string // changes when the disk is restored or cloned: order is judged within one life
	orders       int
}

// simSend is one message of the app: without a number until a connection writes it.
type simSend struct {
	seq     uint64
	to      string
	content string
	order   int
}

func (d *simDisk) clone() *simDisk {
	c := *d
	c.open = slices.Clone(d.open)
	c.shown = map[protocol.MessageID]uint64{}
	for id, p := range d.shown {
		c.shown[id] = p
	}
	return &c
}

// simClient keeps the rules of protocol/doc.go.
type simClient struct {
	sim    *sim
	number int
	name   string
	disk   *simDisk
	saved  *simDisk
	gone   bool // replaced by another installation: does not come back
	born   bool

	conn         *simConn
	ready        bool
	first        uint64 // of this connection
	next         uint64
	written      map[uint64]bool // open numbers written on this connection and not refused
	heldFrom     uint64          // wait: this number goes first
	heldUntil    int64
	stalledUntil int64
	mutedUntil   int64
	lives        int
}

func (c *simClient) active() bool          { return c.conn != nil && !c.gone }
func (c *simClient) wantsConnection() bool { return c.conn == nil && !c.gone && c.born }

func (c *simClient) connect() {
	c.born = true
	if c.gone || c.conn != nil {
		return
	}
	s := c.sim
	e := s.edges[s.rng.IntN(len(s.edges))]
	s.conns++
	conn := &simConn{client: c, edge: e, id: s.conns}
	session := &simSession{edge: e, conn: conn, user: c.disk.user, device: c.disk.device, epoch: c.disk.epoch}
	conn.session = session
	c.conn, c.ready = conn, false
	e.sessions[conn.id] = session
	s.after(300, func() { // a registration lost in a crash
		if c.conn == conn && !c.ready {
			c.drop("no connected")
		}
	})
	since := max(0, c.disk.receiptsAt-protocol.ReceiptsSlackMillis)
	s.store.Register(backend.Stream{User: c.disk.user, Device: c.disk.device, Epoch: c.disk.epoch},
		func(block uint32, heir bool, refusal protocol.Refusal) {
			if conn.cut || e.sessions[conn.id] != session {
				return
			}
			if refusal.Code != protocol.OK {
				panic("refused: " + refusal.Code.String())
			}
			s.logins++
			session.open = true
			old, replaced, _ := s.table.Bind(c.disk.user, c.disk.device, session.ref(), s.logins)
			if replaced {
				s.toEdge(old, func(o *simSession) { o.replaced() }, nil)
			}
			session.up.Start(block)
			first := protocol.FirstSeq(block)
			conn.down(func(c *simClient) { c.connected(first) })
			session.effects(session.down.Start(heir))
			s.after(s.rng.Int64N(20), func() {
				if !session.open {
					return
				}
				_ = s.store.ReceiptsSince(c.disk.user, since, func(r backend.ReceiptRow) bool {
					if r.Delivered.Position != 0 {
						session.receipt(protocol.ReceiptPush{ID: r.Delivered.ID, Position: r.Delivered.Position, Seq: r.Delivered.Seq,
							Device: r.Delivered.Device, Epoch: r.Delivered.Epoch, Receiver: r.Addressee, Millis: r.ChangedMs})
					}
					return true
				})
			})
		})
}

func (s *simSession) replaced() {
	c := s.conn.client
	s.edge.remove(s, true)
	if c.conn == s.conn {
		c.sim.logf("%s replaced", c.name)
		c.conn, c.ready = nil, false
		c.gone = c.twin() // told not to come back; a clone obeys, a lone client that was faster than its old connection is the newer one
		if !c.gone {
			c.sim.after(10+c.sim.rng.Int64N(500), c.connect)
		}
	}
}

// twin reports whether another installation uses the same identity.
func (c *simClient) twin() bool {
	for _, o := range c.sim.clients {
		if o != c && o.disk.user == c.disk.user && o.disk.device == c.disk.device && !o.gone {
			return true
		}
	}
	return false
}

func (c *simClient) drop(why string) {
	if c.conn == nil {
		return
	}
	c.sim.logf("%s disconnects (%s)", c.name, why)
	conn := c.conn
	if session := conn.session; session != nil {
		conn.cut = true
		c.sim.after(c.sim.rng.Int64N(200), func() { conn.edge.remove(session, true) }) // the edge learns of it later
	}
	c.lost(conn, why)
}

func (c *simClient) lost(conn *simConn, why string) {
	conn.cut = true
	if c.conn != conn {
		return
	}
	c.conn, c.ready = nil, false
	if c.gone {
		return
	}
	delay := 10 + c.sim.rng.Int64N(4000)
	if c.sim.healed {
		delay = 10
	}
	c.sim.after(delay, c.connect)
}

func (c *simClient) stall(ms int64) {
	c.stalledUntil = c.sim.now + ms
	c.sim.logf("%s stops reading for %d ms", c.name, ms)
}
func (c *simClient) mute(ms int64) {
	c.mutedUntil = c.sim.now + ms
	c.sim.logf("%s acknowledges nothing for %d ms", c.name, ms)
}

func (c *simClient) backup() { c.saved = c.disk.clone() }

// restore puts the disk back to the backup: what happened since is forgotten by this client.
func (c *simClient) restore() {
	if c.saved == nil || c.gone || c.twin() {
		return
	}
	c.sim.logf("%s is restored from a backup", c.name)
	c.drop("restore")
	c.sim.truth.forget(c.disk, c.saved)
	c.lives++
	c.disk = c.saved
	c.branch(fmt.Sprintf("r%d", c.lives))
	c.saved = nil
}

// branch begins another life of the disk. What waited without a number may be sent by both lives, as two
// messages; what had a number is one message whoever resends it.
func (c *simClient) branch(life string) {
	c.disk.life = life
	for i := range c.disk.open {
		if s := &c.disk.open[i]; s.seq == 0 {
			s.content = fmt.Sprintf("%s%s:%d>%s", c.name, life, s.order, s.to)
			c.sim.truth.wanted(c, s.content, s.to)
		}
	}
}

// clone makes a second installation with the same identity, which takes over.
func (c *simClient) clone() {
	if c.gone || !c.born || c.twin() {
		return
	}
	twin := c.sim.addClient(c.disk.user, c.disk.device)
	twin.disk = c.disk.clone()
	twin.branch(fmt.Sprintf("c%d", twin.number))
	c.sim.truth.cloned(c, twin)
	c.sim.logf("%s is cloned from %s", twin.name, c.name)
	twin.connect()
}

// send is the app's wish; it gets no number before a connection writes it.
func (c *simClient) send(to string) {
	if c.gone || !c.born {
		return
	}
	c.disk.orders++
	content := fmt.Sprintf("%s%s:%d>%s", c.name, c.disk.life, c.disk.orders, to)
	c.sim.truth.wanted(c, content, to)
	c.disk.open = append(c.disk.open, simSend{to: to, content: content, order: c.disk.orders})
	if c.sim.mut == "a number is given before the connection" && c.next != 0 {
		c.disk.open[len(c.disk.open)-1].seq = c.next
		c.next++
	}
	c.pump()
}

func (c *simClient) connected(first uint64) {
	c.sim.logf("%s connected, numbers from %d", c.name, first)
	c.ready, c.first = true, first
	c.next = first
	if c.sim.mut == "a client counts on by itself from one" {
		c.next = 1
	}
	c.written, c.heldFrom = map[uint64]bool{}, 0
	c.pump()
}

// pump writes what may be written: old numbers first, ascending, and a new number only when they have ended.
func (c *simClient) pump() {
	if !c.ready || c.heldUntil > c.sim.now && c.heldFrom != 0 {
		return
	}
	old := false
	if c.sim.mut != mutNoSpan {
		for _, s := range c.disk.open {
			old = old || s.seq != 0 && s.seq < c.first
		}
	}
	for i := range c.disk.open {
		if c.sim.mut == mutNoSpan {
			i = len(c.disk.open) - 1 - i
		}
		s := &c.disk.open[i]
		if s.seq == 0 {
			if old || !c.within(c.next) && c.sim.mut != mutNoSpan {
				return
			}
			s.seq = c.next // stored before it is written
			c.next++
		}
		if c.written[s.seq] {
			continue
		}
		if c.sim.mut == "a resend gets a new number" && s.seq < c.first {
			s.seq = c.next
			c.next++
		}
		c.written[s.seq] = true
		seq, to, content := s.seq, s.to, s.content
		c.conn.up(func(session *simSession) { session.send(seq, to, content) })
	}
}

func (c *simClient) within(seq uint64) bool {
	for _, s := range c.disk.open {
		if s.seq != 0 && seq-s.seq >= 8 {
			return false
		}
	}
	return true
}

func (c *simClient) answered(a protocol.Answer, resend uint64) {
	i := slices.IndexFunc(c.disk.open, func(s simSend) bool { return s.seq == a.Seq })
	if i < 0 {
		return
	}
	send := c.disk.open[i]
	switch {
	case a.Code == protocol.OK:
		c.sim.logf("%s answered %s", c.name, send.content)
		c.sim.truth.answered(send.content, a)
		c.disk.open = slices.Delete(c.disk.open, i, i+1)
		c.pump()
	case a.RetryAfterMs != 0:
		c.sim.logf("%s refused %s: %s, resend from %d", c.name, send.content, a.Code, resend)
		delete(c.written, a.Seq)
		if c.sim.mut == "a refused send is given up and counted as sent" {
			c.sim.truth.answered(send.content, a)
			c.disk.open = slices.Delete(c.disk.open, i, i+1)
			return
		}
		c.heldFrom = resend
		c.heldUntil = max(c.heldUntil, c.sim.now+int64(a.RetryAfterMs))
		conn := c.conn
		c.sim.after(c.heldUntil-c.sim.now, func() {
			if c.conn == conn {
				c.pump()
			}
		})
	case a.Code == protocol.CodeWindowExceeded:
		delete(c.written, a.Seq)
		conn := c.conn
		c.sim.after(100, func() {
			if c.conn == conn {
				c.pump()
			}
		})
	default:
		c.sim.violate("P6", "%s: final refusal %s of %s", c.name, a.Code, send.content)
	}
}

func (c *simClient) incoming(m *protocol.Message) {
	_, known := c.disk.shown[m.ID]
	if c.sim.mut == "the client shows a known id again" {
		known = false
	}
	if !known {
		c.sim.logf("%s shows %s", c.name, m.Content)
		c.sim.truth.shown(c, m)
		c.disk.shown[m.ID] = m.Position
	}
	if c.sim.now < c.mutedUntil {
		if c.sim.chance(2) {
			id, conn := m.ID, c.conn
			c.sim.after(c.mutedUntil-c.sim.now, func() { c.acknowledge(conn, id) }) // late
		}
		return
	}
	c.acknowledge(c.conn, m.ID)
}

func (c *simClient) acknowledge(conn *simConn, id protocol.MessageID) {
	if c.conn != conn || conn == nil {
		return
	}
	if _, known := c.disk.shown[id]; !known {
		return // a restored disk: it is pushed again
	}
	c.sim.truth.acked[id] = true
	conn.up(func(s *simSession) { s.acknowledge(id) })
}

func (c *simClient) receipt(r protocol.ReceiptPush) {
	c.sim.truth.receipt(c, r)
	c.disk.receiptsAt = max(c.disk.receiptsAt, r.Millis)
}

// simTruthSend is what the checker knows of one send.
type simTruthSend struct {
	content   string
	client    string
	user, to  string
	life      string
	order     int
	answered  bool
	durable   bool
	id        protocol.MessageID
	position  uint64
	addressed []string // devices registered when it was accepted
}

type simTruth struct {
	sim      *sim
	sends    map[string]*simTruthSend
	order    []*simTruthSend
	ids      map[protocol.MessageID]*simTruthSend
	acked    map[protocol.MessageID]bool
	devices  [][2]string // user, device
	shownBy  []simShown
	excused  []simShown // acknowledged by an installation that forgot it, or shown by a clone's twin
	receipts map[[2]string]uint64
}

type simShown struct {
	client   *simClient
	disk     *simDisk
	content  string
	position uint64
}

func (t *simTruth) registered(user, device string) {
	t.devices = append(t.devices, [2]string{user, device})
}

func (t *simTruth) wanted(c *simClient, content, to string) {
	s := &simTruthSend{content: content, client: c.name, user: c.disk.user, to: to, life: c.disk.life, order: c.disk.orders}
	t.sends[content] = s
	t.order = append(t.order, s)
}

func (t *simTruth) durable(r *backend.Record) {
	s := t.sends[string(r.Content)]
	if s.durable {
		return
	}
	s.durable = true
	for _, d := range t.devices {
		if d[0] == s.to {
			s.addressed = append(s.addressed, d[1])
		}
	}
}

func (t *simTruth) answered(content string, a protocol.Answer) {
	s := t.sends[content]
	if !s.durable && a.Code == protocol.OK {
		t.sim.violate("P1", "%s was answered and is not durable", content)
	}
	if other := t.ids[a.ID]; other != nil && other != s {
		t.sim.violate("P3", "%s and %s have one id", content, other.content)
	}
	if s.answered && s.id != a.ID {
		t.sim.violate("P3", "%s was answered with two ids", content)
	}
	s.answered, s.id = true, a.ID
	t.ids[a.ID] = s
	if a.Position != 0 {
		t.position(s, a.Position)
	}
}

func (t *simTruth) position(s *simTruthSend, p uint64) {
	if s.position != 0 && s.position != p {
		t.sim.violate("P4", "%s has positions %d and %d", s.content, s.position, p)
	}
	s.position = p
}

func (t *simTruth) shown(c *simClient, m *protocol.Message) {
	s := t.sends[string(m.Content)]
	switch {
	case s == nil:
		t.sim.violate("P5", "%s shows %q, which nobody sent", c.name, m.Content)
		return
	case s.to != c.disk.user:
		t.sim.violate("P5", "%s shows %s", c.name, m.Content)
	}
	if s.answered && s.id != m.ID {
		t.sim.violate("P3", "%s is shown under another id than answered", s.content)
	}
	for _, sh := range t.shownBy {
		if sh.disk == c.disk && sh.content == s.content {
			t.sim.violate("P3", "%s shows %s twice", c.name, s.content)
		}
	}
	t.position(s, m.Position)
	t.shownBy = append(t.shownBy, simShown{c, c.disk, s.content, m.Position})
}

// forget: what the old disk showed after the backup is no longer on any screen, and will not come again if it
// was acknowledged.
func (t *simTruth) forget(old, saved *simDisk) {
	for _, sh := range t.shownBy {
		if sh.disk == old {
			t.excused = append(t.excused, sh)
		}
	}
	t.inherit(old, saved, nil)
}

func (t *simTruth) cloned(c, twin *simClient) { t.inherit(c.disk, twin.disk, twin) }

// inherit: a disk made from another one shows what its filter knows.
func (t *simTruth) inherit(old, made *simDisk, c *simClient) {
	for _, sh := range slices.Clone(t.shownBy) {
		if sh.disk != old {
			continue
		}
		if s := t.sends[sh.content]; s != nil {
			for id := range made.shown {
				if t.shownID(sh.content) == id {
					t.shownBy = append(t.shownBy, simShown{c, made, sh.content, sh.position})
				}
			}
		}
	}
}

func (t *simTruth) shownID(content string) protocol.MessageID {
	s := t.sends[content]
	if s.answered {
		return s.id
	}
	return protocol.MessageID{}
}

// receipt checks that a receipt covers nothing that no device of the addressee has acknowledged.
func (t *simTruth) receipt(c *simClient, r protocol.ReceiptPush) {
	key := [2]string{c.disk.user, r.Receiver}
	t.receipts[key] = max(t.receipts[key], r.Position)
	for _, s := range t.order {
		if s.user == c.disk.user && s.to == r.Receiver && s.position != 0 && s.position <= r.Position && s.answered && !t.acked[s.id] {
			t.sim.violate("receipts", "the receipt of %s at %d passes %s, which nobody acknowledged", r.Receiver, r.Position, s.content)
		}
	}
}

func (t *simTruth) judge() {
	t.judgeDelivered()
	t.judgeOrder()
	t.judgeDrained()
}

// judgeWaiting is P8 for live sessions: what waits in their mailboxes they have already, and only the
// acknowledgement was lost in a crash.
func (t *simTruth) judgeWaiting() {
	for _, c := range t.sim.clients {
		if !c.active() || !c.ready || c.conn.session == nil || !c.conn.session.down.Live() {
			continue
		}
		for _, r := range t.sim.store.mailboxes[[2]string{c.disk.user, c.disk.device}] {
			if _, known := c.disk.shown[r.ID]; !known {
				t.sim.violate("P8", "%s is live and %s waits in its mailbox", c.name, r.Content)
			}
		}
	}
}

// judgeDelivered is P2: what was answered is on a screen of each addressed device.
func (t *simTruth) judgeDelivered() {
	for _, s := range t.order {
		if !s.answered {
			continue
		}
		devices := s.addressed
		if len(devices) == 0 { // for the heir, if there ever was one
			for _, d := range t.devices {
				if d[0] == s.to {
					devices = []string{d[1]}
					break
				}
			}
		}
		for _, d := range devices {
			seen := slices.ContainsFunc(t.shownBy, func(sh simShown) bool {
				return sh.content == s.content && sh.disk.user == s.to && sh.disk.device == d
			})
			excused := slices.ContainsFunc(t.excused, func(sh simShown) bool { return sh.content == s.content && sh.disk.device == d })
			if !seen && !excused && t.reachable(s.to, d) {
				t.sim.violate("P2", "%s was answered and never shown on %s/%s", s.content, s.to, d)
			}
		}
	}
}

// reachable: somebody uses that device now.
func (t *simTruth) reachable(user, device string) bool {
	return slices.ContainsFunc(t.sim.clients, func(c *simClient) bool {
		return c.active() && c.disk.user == user && c.disk.device == device
	})
}

// judgeOrder is P4: positions follow the order in which one installation sent, and are unique in a conversation.
func (t *simTruth) judgeOrder() {
	last := map[string]*simTruthSend{}
	used := map[string]*simTruthSend{}
	for _, s := range t.order {
		if s.position == 0 {
			continue
		}
		conversation := backend.ConversationKey(s.user, s.to)
		stream := s.client + s.life + ">" + s.to
		if l := last[stream]; l != nil && l.position >= s.position {
			t.sim.violate("P4", "%s (%d) was sent after %s (%d)", s.content, s.position, l.content, l.position)
		}
		last[stream] = s
		at := fmt.Sprintf("%s %d", conversation, s.position)
		if o := used[at]; o != nil {
			t.sim.violate("P4", "%s and %s have one position", s.content, o.content)
		}
		used[at] = s
	}
}

// judgeDrained is P8: after healing nothing waits anywhere.
func (t *simTruth) judgeDrained() {
	for _, c := range t.sim.clients {
		if !c.active() {
			continue
		}
		if len(c.disk.open) > 0 {
			t.sim.violate("P8", "%s still has %d open sends, first %s", c.name, len(c.disk.open), c.disk.open[0].content)
		}
		if c.ready && !c.conn.session.down.Live() {
			t.sim.violate("P8", "%s is still draining", c.name)
		}
		boxes := []string{c.disk.device}
		if c.conn.session != nil && c.conn.session.down.Heir() {
			boxes = append(boxes, "")
		}
		for _, b := range boxes {
			if rows := t.sim.store.mailboxes[[2]string{c.disk.user, b}]; len(rows) > 0 {
				t.sim.violate("P8", "%d rows wait in mailbox %s/%s, first %s", len(rows), c.disk.user, b, rows[0].Content)
			}
		}
	}
	for _, o := range t.sim.owners {
		if n := o.owner.InFlight(); n > 0 {
			t.sim.violate("P8", "owner %d still has %d records in flight", o.shard, n)
		}
	}
	if len(t.excused) == 0 && !slices.ContainsFunc(t.sim.clients, func(c *simClient) bool { return c.gone || !c.active() }) {
		t.judgeReceipts()
	}
}

// judgeReceipts: with everything acknowledged each sender's receipts have come to its last message.
func (t *simTruth) judgeReceipts() {
	for _, s := range t.order {
		if s.position == 0 || !t.acked[s.id] {
			continue
		}
		if at := t.receipts[[2]string{s.user, s.to}]; at < s.position {
			t.sim.violate("P8", "the receipts of %s for %s stay at %d, before %s at %d", s.to, s.user, at, s.content, s.position)
		}
	}
}

func (t *simTruth) String() string {
	var b strings.Builder
	for _, s := range t.order {
		fmt.Fprintf(&b, "%s answered=%v position=%d\n", s.content, s.answered, s.position)
	}
	return b.String()
}
