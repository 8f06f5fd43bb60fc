package main

import (
	"fmt"
	"slices"
	"strings"

	"millrace/backend"
	"millrace/protocol"
	"millrace/protocol/client"
)

// simTruthSend is what the checker knows of one send.
type simTruthSend struct {
	content   string
	client    string
	user, to  string
	life      string
	answered  bool
	refused   bool // for good, and the client knows it
	rejected  bool // refused for good in one life of the client; another may send it again
	durable   bool
	durableAt int64
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
	twice    int // writes of a message to a connection that had it, after its owner changed
	full     int // mailbox_full
}

type simShown struct {
	client   *simClient
	disk     *simDisk
	content  string
	position uint64
}

func newSimTruth(s *sim) *simTruth {
	return &simTruth{sim: s, sends: map[string]*simTruthSend{}, ids: map[protocol.MessageID]*simTruthSend{},
		acked: map[protocol.MessageID]bool{}, receipts: map[[2]string]uint64{}}
}

func (t *simTruth) registered(user, device string) {
	t.devices = append(t.devices, [2]string{user, device})
	if n := t.countDevices(user, ""); n > protocol.MaxDevicesPerUser {
		t.sim.violate("P7", "%s has %d devices", user, n)
	}
}

// countDevices counts the devices of a user but for one.
func (t *simTruth) countDevices(user, besides string) (n int) {
	for _, d := range t.devices {
		if d[0] == user && d[1] != besides {
			n++
		}
	}
	return n
}

func (t *simTruth) turnedAway(c *simClient, r protocol.Refusal) {
	if r.Code != protocol.CodeTooManyDevices || t.countDevices(c.disk.user, c.disk.device) < protocol.MaxDevicesPerUser {
		t.sim.violate("P6", "%s was turned away: %s", c.name, r.Code)
	}
}

func (t *simTruth) wanted(c *simClient, it *client.Item) {
	s := &simTruthSend{content: it.Text, client: c.name, user: c.disk.user, to: it.Receiver, life: c.disk.life}
	t.sends[it.Text] = s
	t.order = append(t.order, s)
}

func (t *simTruth) durable(r *backend.Record) {
	s := t.sends[string(r.Content)]
	if s.refused {
		t.sim.violate("P6", "%s was refused for good and then accepted", s.content)
	}
	if s.durable {
		return
	}
	s.durable, s.durableAt = true, t.sim.now
	for _, d := range t.devices {
		if d[0] == s.to {
			s.addressed = append(s.addressed, d[1])
		}
	}
}

func (t *simTruth) answered(content string, a protocol.Answer) {
	s := t.sends[content]
	if !s.durable {
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

// refused takes a final refusal that the client has read.
func (t *simTruth) refused(c *simClient, it *client.Item, code protocol.Code) {
	s := t.sends[it.Text]
	s.rejected = s.rejected || t.branched(c)
	switch {
	case code != protocol.CodeMailboxFull:
		t.sim.violate("P6", "%s: final refusal %s of %s", c.name, code, it.Text)
	case it.Seq < c.first:
		t.sim.violate("P6", "%s: mailbox_full for the resend %s", c.name, it.Text)
	case s.durable && !t.branched(c):
		t.sim.violate("P6", "%s is durable and was refused for good", it.Text)
	case !t.branched(c):
		s.refused = true
	}
	t.full++
}

// branched reports whether the client's identity had other lives, which may have sent what this one was refused.
func (t *simTruth) branched(c *simClient) bool {
	return c.disk.life != "" || c.saved != nil || slices.ContainsFunc(t.sim.clients, func(o *simClient) bool {
		return o != c && o.disk.user == c.disk.user && o.disk.device == c.disk.device
	})
}

// forgetRefusal: the send is open again, by another life or after a crash.
func (t *simTruth) forgetRefusal(content string) { t.sends[content].refused = false }

func (t *simTruth) position(s *simTruthSend, p uint64) {
	if s.position != 0 && s.position != p {
		t.sim.violate("P4", "%s has positions %d and %d", s.content, s.position, p)
	}
	s.position = p
}

// written: a message is pushed on a connection at most once, as long as one owner lives as long as the connection (always
// so in one process). A new owner does not know what the old one was told and had not stored, and delivers again; and of
// two owners each puts into the mailbox what the other was told of.
func (t *simTruth) written(c *simConn, m *protocol.Message) {
	at, twice := c.wrote[m.ID]
	switch sh := t.sim.shardOf(m.Conversation); {
	case !twice:
		c.wrote[m.ID] = t.sim.now
	case sh.changed < at && !sh.hadTwo(t.sends[string(m.Content)].durableAt):
		t.sim.violate("P3/once per connection", "%s is written to %s twice", m.Content, c.client.name)
	default:
		t.twice++
	}
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
		if s := t.sends[sh.content]; sh.disk != old || !s.answered {
			continue
		}
		if _, known := made.shown[t.sends[sh.content].id]; known {
			t.shownBy = append(t.shownBy, simShown{c, made, sh.content, sh.position})
		}
	}
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
// acknowledgement was lost in a crash, or went to another owner.
func (t *simTruth) judgeWaiting() {
	for _, c := range t.sim.clients {
		if !c.active() || !c.ready || !c.conn.session.down.Live() {
			continue
		}
		for _, r := range t.sim.store.mailboxes[simMailbox{c.disk.user, c.disk.device}] {
			_, known := c.disk.shown[r.ID]
			if !known && !(t.acked[r.ID] && t.sim.shardOf(r.Conversation).hadTwo(0)) {
				t.sim.violate("P8", "%s is live and %s waits in its mailbox", c.name, r.Content)
			}
		}
	}
}

// judgeDelivered is P2: what was answered is on a screen of each addressed device. Not what was refused for good in another
// life of the client, since a number that was left behind by 64 counts as finished.
func (t *simTruth) judgeDelivered() {
	for _, s := range t.order {
		if !s.answered || s.rejected {
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
		if s.position == 0 || s.rejected {
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
		if len(c.disk.items) > 0 {
			t.sim.violate("P8", "%s still has %d open sends, first %s", c.name, len(c.disk.items), c.disk.items[0].Text)
		}
		if !c.ready || !c.conn.session.down.Live() {
			t.sim.violate("P8", "%s is not live", c.name)
		}
		boxes := []string{c.disk.device}
		if c.conn.session.down.Heir() {
			boxes = append(boxes, "")
		}
		for _, b := range boxes {
			if rows := t.sim.store.mailboxes[simMailbox{c.disk.user, b}]; len(rows) > 0 {
				t.sim.violate("P8", "%d rows wait in mailbox %s/%s, first %s", len(rows), c.disk.user, b, rows[0].Content)
			}
		}
	}
	for _, sh := range t.sim.shards {
		sh.owner.audit()
		if n := sh.owner.inFlight(); n > 0 {
			t.sim.violate("P8", "owner %d still has %d records in flight", sh.number, n)
		}
	}
	if len(t.excused) == 0 && !slices.ContainsFunc(t.sim.clients, func(c *simClient) bool { return c.gone || !c.active() }) {
		t.judgeReceipts()
	}
}

// judgeReceipts: with everything acknowledged each sender's receipts have come to its last message. Not so after two owners
// at once: what one was told of the other may hold for outstanding, and no receipt passes that.
func (t *simTruth) judgeReceipts() {
	for _, s := range t.order {
		if s.position == 0 || !t.acked[s.id] || t.sim.shardOf(protocol.ConversationHash(s.user, s.to)).hadTwo(0) {
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
