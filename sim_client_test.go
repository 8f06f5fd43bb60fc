package main

import (
	"fmt"
	"slices"
	"time"

	"millrace/protocol"
	"millrace/protocol/client"
)

// simDisk is what an installation of a client keeps: the stream, what it wants to send, what it has shown.
type simDisk struct {
	user, device string
	epoch        uint64
	items        []client.Item // not ended, in the order in which they were given
	highest      uint64        // the highest number given under the epoch
	ended        []client.Item // since the last sync: a crash may bring them back
	shown        map[protocol.MessageID]uint64
	receiptsAt   int64
	locals       uint64
	life         string // changes when the disk is restored or cloned: order is judged within one life

	wire map[uint64]uint64 // of mutations: what a number is called on the wire
}

func newSimDisk(user, device string, epoch uint64) *simDisk {
	return &simDisk{user: user, device: device, epoch: epoch, shown: map[protocol.MessageID]uint64{}, wire: map[uint64]uint64{}}
}

func (d *simDisk) clone() *simDisk {
	c := *d
	c.items, c.ended = slices.Clone(d.items), nil
	c.shown, c.wire = map[protocol.MessageID]uint64{}, map[uint64]uint64{}
	for id, p := range d.shown {
		c.shown[id] = p
	}
	for seq, w := range d.wire {
		c.wire[seq] = w
	}
	return &c
}

// number stores a number before it is written. It syncs, and with it what ended before.
func (d *simDisk) number(it *client.Item) {
	for i := range d.items {
		if d.items[i].Local == it.Local {
			d.items[i].Seq = it.Seq
		}
	}
	d.highest = max(d.highest, it.Seq)
	d.ended = nil
}

func (d *simDisk) end(it *client.Item) {
	i := slices.IndexFunc(d.items, func(o client.Item) bool { return o.Local == it.Local })
	d.ended = append(d.ended, d.items[i])
	d.items = slices.Delete(d.items, i, i+1)
}

// simClient is the application and the network of a client; client.Outbox decides what it sends.
type simClient struct {
	sim    *sim
	number int
	name   string
	disk   *simDisk
	saved  *simDisk
	gone   bool // replaced by another installation, or turned away: does not come back
	born   bool

	outbox       *client.Outbox
	conn         *simConn
	ready        bool
	first        uint64 // of this connection
	wakesAt      int64  // the next turn that is scheduled; 0: none
	stalledUntil int64
	mutedUntil   int64
	lives        int

	count uint64         // of mutations: the next number on the wire
	aside []*client.Item // of mutations: what waits behind new numbers
}

const simOutbox = 1000

func (s *sim) addClient(user, device string) *simClient {
	c := &simClient{sim: s, number: len(s.clients), disk: newSimDisk(user, device, s.rng.Uint64()|1)}
	c.name = fmt.Sprintf("%s/%s#%d", user, device, c.number)
	c.open()
	s.clients = append(s.clients, c)
	return c
}

// open starts the client from its disk.
func (c *simClient) open() {
	c.outbox = client.NewOutbox(simOutbox)
	c.outbox.Restore(c.disk.items, c.disk.highest)
}

func (c *simClient) clock() time.Time { return time.UnixMilli(simStart + c.sim.now) }

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
	conn := &simConn{client: c, edge: e, id: s.conns, wrote: map[protocol.MessageID]int64{}}
	session := &simSession{edge: e, conn: conn, user: c.disk.user, device: c.disk.device, epoch: c.disk.epoch}
	conn.session = session
	c.conn, c.ready = conn, false
	e.sessions[conn.id] = session
	s.after(300, func() { // a registration lost in a crash
		if c.conn == conn && !c.ready {
			c.drop("no connected")
		}
	})
	session.register(c.disk.receiptsAt)
}

// replaced is session_replaced: a clone obeys and does not come back; a lone client that was faster than its old
// connection is the newer one.
func (c *simClient) replaced(conn *simConn) {
	if c.conn != conn {
		return
	}
	c.sim.logf("%s replaced", c.name)
	c.disconnected()
	c.gone = c.twin()
	if !c.gone {
		c.sim.after(10+c.sim.rng.Int64N(500), c.connect)
	}
}

// turnedAway is too_many_devices.
func (c *simClient) turnedAway(conn *simConn, r protocol.Refusal) {
	c.sim.logf("%s turned away: %s", c.name, r.Code)
	c.sim.truth.turnedAway(c, r)
	if c.conn == conn {
		c.disconnected()
		c.gone = true
	}
}

func (c *simClient) disconnected() {
	c.conn, c.ready = nil, false
	c.outbox.Disconnected()
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
	conn.cut = true
	c.sim.after(c.sim.rng.Int64N(200), func() { conn.edge.remove(conn.session, true) }) // the edge learns of it later
	c.lost(conn, why)
}

func (c *simClient) lost(conn *simConn, why string) {
	conn.cut = true
	if c.conn != conn {
		return
	}
	c.disconnected()
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

// crash is a power cut: ends of sends that were not synced are forgotten.
func (c *simClient) crash() {
	if c.gone || !c.born {
		return
	}
	c.sim.logf("%s crashes", c.name)
	c.sim.crashes++
	c.drop("crash")
	d := c.disk
	if n := len(d.ended); n > 0 {
		for _, it := range d.ended[c.sim.rng.IntN(n+1):] {
			c.sim.truth.forgetRefusal(it.Text)
			d.items = append(d.items, it)
		}
		slices.SortFunc(d.items, func(a, b client.Item) int { return int(a.Local) - int(b.Local) })
		d.ended = nil
	}
	c.open()
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
	for i := range c.disk.items {
		it := &c.disk.items[i]
		if it.Seq != 0 {
			c.sim.truth.forgetRefusal(it.Text)
			continue
		}
		it.Text = c.content(it.Local, it.Receiver)
		c.sim.truth.wanted(c, it)
	}
	c.open()
}

func (c *simClient) content(local uint64, to string) string {
	return fmt.Sprintf("%s%s:%d>%s", c.name, c.disk.life, local, to)
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

// send is the app's wish.
func (c *simClient) send(to string) {
	if c.gone || !c.born {
		return
	}
	c.disk.locals++
	it := client.Item{Local: c.disk.locals, Receiver: to, Text: c.content(c.disk.locals, to), QueuedMs: c.clock().UnixMilli()}
	if !c.outbox.Add(it) {
		panic("the outbox is full")
	}
	c.sim.truth.wanted(c, &it)
	c.disk.items = append(c.disk.items, it)
	c.disk.ended = nil
	c.pump()
}

func (c *simClient) connected(first uint64) {
	c.sim.logf("%s connected, numbers from %d", c.name, first)
	c.ready, c.first = true, first
	c.breakRules(first)
	c.outbox.Connected(first + c.taken())
	c.pump()
}

// pump does what the Outbox says.
func (c *simClient) pump() {
	if !c.ready {
		return
	}
	step := c.outbox.Next(c.clock())
	for _, it := range step.Number {
		c.disk.number(it)
	}
	for _, it := range step.Write {
		c.write(it)
	}
	c.writeAside(len(step.Write) > 0)
	switch {
	case step.NewEpoch:
		c.sim.logf("%s begins a new epoch", c.name)
		c.outbox.ResetEpoch()
		c.disk.epoch, c.disk.highest = c.sim.rng.Uint64()|1, 0
		c.drop("new epoch")
	case step.Reconnect != "":
		c.drop(step.Reconnect)
	case !step.Wake.IsZero():
		c.wake(step.Wake.UnixMilli() - simStart)
	}
}

func (c *simClient) wake(at int64) {
	if c.wakesAt > c.sim.now && c.wakesAt <= at {
		return
	}
	c.wakesAt = at
	c.sim.after(max(0, at-c.sim.now), func() {
		if c.wakesAt == at {
			c.wakesAt = 0
			c.pump()
		}
	})
}

func (c *simClient) write(it *client.Item) {
	seq, to, content := c.wireOf(it), it.Receiver, it.Text
	c.conn.up(func(session *simSession) { session.send(seq, to, content) })
}

func (c *simClient) answered(a protocol.Answer, resend uint64) {
	seq := c.numberOf(a.Seq)
	if c.answeredAside(seq, a) {
		return
	}
	if a.Code != protocol.OK && a.RetryAfterMs != 0 && c.sim.mut == "a refused send is given up and counted as sent" {
		a.Refusal = protocol.Refusal{}
	}
	if a.Code == protocol.OK {
		if it := c.outbox.Received(seq); it != nil {
			c.sim.logf("%s answered %s", c.name, it.Text)
			c.disk.end(it)
			c.sim.truth.answered(it.Text, a)
		}
		c.pump()
		return
	}
	c.sim.logf("%s refused %d: %s, resend from %d", c.name, a.Seq, a.Code, resend)
	if resend != 0 {
		resend = c.numberOf(resend)
	}
	if it := c.outbox.Refused(seq, a.Code, a.RetryAfterMs, resend, c.clock()); it != nil {
		c.disk.end(it)
		c.sim.truth.refused(c, it, a.Code)
	}
	c.pump()
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

// receipt applies one. They come in the order in which they changed, but for the slack, so the newest says at any time what
// the next connection must ask for.
func (c *simClient) receipt(r protocol.ReceiptPush) {
	c.sim.logf("%s gets the receipt of %s at %d, dated %d", c.name, r.Receiver, r.Position, r.Millis)
	c.sim.truth.receipt(c, r)
	c.disk.receiptsAt = max(c.disk.receiptsAt, r.Millis)
}
