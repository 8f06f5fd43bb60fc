package checker

import (
	"fmt"
	"maps"
	"math/bits"
	"strings"
	"sync"
)

// Config says how a run is judged. The zero value will do.
type Config struct {
	// MaxMessages bounds memory: sends beyond it are not judged, and the verdict says so. Default
	// 16 777 216, at most 67 108 862.
	MaxMessages int
	// Examples is how many violations of each kind are kept; all are counted. Default 10.
	Examples int
	// Acknowledgements says that the run calls Acknowledged; receipts are then judged by it instead of by Shown.
	Acknowledgements bool
	// Receipts asks that at the end every sender has been told of each message that was acknowledged.
	Receipts bool
}

func (c *Config) validate() {
	if c.MaxMessages <= 0 {
		c.MaxMessages = 1 << 24
	}
	c.MaxMessages = min(c.MaxMessages, indexMaxMessages)
	if c.Examples <= 0 {
		c.Examples = 10
	}
}

// ClientID names a device of a user.
type ClientID int32

// StreamID names a stream: one installation on a device.
type StreamID int32

// maxDevices is the protocol's limit of devices per user, and the width of the bitmaps below.
const maxDevices = 8

type user struct {
	name    string
	devices []ClientID
	// unclaimed counts answered messages that were sent when the user had no device and that nobody has shown.
	unclaimed int
}

type client struct {
	user   int32
	device string
	bit    uint8 // among the user's devices
}

type stream struct {
	client ClientID
	epoch  uint64
}

// Checker collects one run. Make one with New; all methods may be called from any goroutine.
type Checker struct {
	// Immutable.
	config Config

	mu sync.Mutex

	// Guarded by mu.
	users       []user
	clients     []client
	streams     []stream
	userByName  map[string]int32
	clientByKey map[clientKey]ClientID
	streamByKey map[stream]StreamID

	messages messages
	bySeq    index
	byID     index

	receipts    map[pair]uint64 // the largest position that a sender was told of
	refusals    map[string]uint64
	resends     uint64
	unjudged    uint64
	outstanding int
	found       findings
}

type clientKey struct {
	user   int32
	device string
}

// pair is a sender and a receiver, as users.
type pair struct{ from, to int32 }

// New makes a checker for one run.
func New(config Config) *Checker {
	config.validate()
	return &Checker{
		config:      config,
		userByName:  map[string]int32{},
		clientByKey: map[clientKey]ClientID{},
		streamByKey: map[stream]StreamID{},
		receipts:    map[pair]uint64{},
		refusals:    map[string]uint64{},
		found:       findings{limit: config.Examples},
	}
}

// Client names a device of a user; the same names give the same id. Call it when the device's first
// connected has come: from then on it must show what is sent to the user. A ninth device of a user panics.
func (c *Checker) Client(name, device string) ClientID {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.user(name)
	key := clientKey{n, device}
	if id, ok := c.clientByKey[key]; ok {
		return id
	}
	u := &c.users[n]
	if len(u.devices) == maxDevices {
		panic(fmt.Sprintf("checker: %q is one device of %q too many", device, name))
	}
	key.device = strings.Clone(device)
	id := ClientID(len(c.clients))
	c.clients = append(c.clients, client{n, key.device, uint8(1) << len(u.devices)})
	c.clientByKey[key] = id
	if len(u.devices) == 0 {
		c.outstanding += u.unclaimed
	}
	u.devices = append(u.devices, id)
	return id
}

// user finds or adds a user.
func (c *Checker) user(name string) int32 {
	if n, ok := c.userByName[name]; ok {
		return n
	}
	name = strings.Clone(name)
	n := int32(len(c.users))
	c.users = append(c.users, user{name: name})
	c.userByName[name] = n
	return n
}

// Stream names an installation: a client that lost its state comes back with another epoch. The same
// arguments give the same id.
func (c *Checker) Stream(of ClientID, epoch uint64) StreamID {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := stream{of, epoch}
	if id, ok := c.streamByKey[key]; ok {
		return id
	}
	id := StreamID(len(c.streams))
	c.streams = append(c.streams, key)
	c.streamByKey[key] = id
	return id
}

// Sent says that a send, or a resend, is about to be written. Its content must be Content(from, seq, …).
func (c *Checker) Sent(from StreamID, seq uint64, receiver string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	to := c.user(receiver)
	if n, ok := c.lookupSeq(from, seq); ok {
		c.resends++
		if m := c.messages.at(n); m.receiver != to {
			c.report(Misused, m, noClient, func() string { return "sent again to " + receiver })
		}
		return
	}
	if c.messages.n == c.config.MaxMessages {
		c.unjudged++
		return
	}
	m := message{seq: seq, stream: from, receiver: to, due: uint8(1<<len(c.users[to].devices) - 1)}
	c.bySeq.insert(seqHash(from, seq), c.messages.add(m), c.seqHashOf)
}

// Answered says that message_received came for a number. Position 0 means that the answer had none.
func (c *Checker) Answered(from StreamID, seq uint64, id [16]byte, position uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.lookupSeq(from, seq)
	if !ok {
		c.reportUnknown(from, seq, id, noClient, "answered, but never sent")
		return
	}
	m := c.messages.at(n)
	c.learnID(n, m, id, noClient)
	if position != 0 {
		c.learnPosition(m, position, noClient)
	}
	if m.flags&refused != 0 && m.flags&answered == 0 {
		c.report(Contradicted, m, noClient, func() string { return "answered after it was refused for good" })
	}
	before := c.owed(m)
	m.flags |= answered
	c.settle(m, before)
}

// Refused says that a send was refused with a code. Final means that trying again cannot help, so that
// the number has ended.
func (c *Checker) Refused(from StreamID, seq uint64, code string, final bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.countRefusal(code)
	n, ok := c.lookupSeq(from, seq)
	if !ok {
		c.reportUnknown(from, seq, [16]byte{}, noClient, "refused, but never sent")
		return
	}
	if !final {
		return
	}
	m := c.messages.at(n)
	if m.flags&refused == 0 && (m.flags&answered != 0 || m.shown != 0) {
		c.report(Contradicted, m, noClient, func() string { return "refused for good (" + code + ") after it was accepted" })
	}
	m.flags |= refused
}

// maxCodes bounds what a server that makes up codes can cost.
const maxCodes = 256

func (c *Checker) countRefusal(code string) {
	if _, ok := c.refusals[code]; !ok {
		if len(c.refusals) >= maxCodes {
			code = "other"
		}
		code = strings.Clone(code)
	}
	c.refusals[code]++
}

// Shown says that a device has shown a message to its user: it passed the client's own filter of known ids.
func (c *Checker) Shown(on ClientID, id [16]byte, position uint64, sender, content string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	from, seq, ok := ParseContent(content)
	if !ok || int(from) >= len(c.streams) {
		c.reportForged(on, id, "a text that nobody sent: "+excerpt(content))
		return
	}
	n, ok := c.lookupSeq(from, seq)
	if !ok {
		c.reportUnknown(from, seq, id, on, "shown, but never sent")
		return
	}
	m := c.messages.at(n)
	if name := c.users[c.sender(m)].name; sender != name {
		c.report(Forged, m, on, func() string { return "shown as sent by " + excerpt(sender) })
	}
	c.learnID(n, m, id, on)
	c.learnPosition(m, position, on)
	at := &c.clients[on]
	switch {
	case at.user != m.receiver:
		c.report(Misdelivered, m, on, func() string { return "shown" })
		return
	case m.flags&refused != 0 && m.shown == 0 && m.flags&answered == 0:
		c.report(Contradicted, m, on, func() string { return "shown after it was refused for good" })
	case m.shown&at.bit != 0:
		c.report(Doubled, m, on, func() string { return "shown again" })
		return
	}
	before, unproven := c.owed(m), !c.proven(m)
	m.shown |= at.bit
	c.settle(m, before)
	c.proved(m, unproven)
}

// Acknowledged says that a device is about to acknowledge a message that it has shown.
func (c *Checker) Acknowledged(on ClientID, id [16]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.lookupID(id)
	if !ok {
		c.misuse(on, id, "acknowledged, but never shown")
		return
	}
	m := c.messages.at(n)
	at := &c.clients[on]
	if at.user != m.receiver || m.shown&at.bit == 0 {
		c.report(Misused, m, on, func() string { return "acknowledged, but not shown" })
		return
	}
	unproven := !c.proven(m)
	m.acked |= at.bit
	c.proved(m, unproven)
}

// Receipt says that a device of the sender was told, by a message_delivered, that this message and all its earlier ones in the
// conversation have reached the receiver.
func (c *Checker) Receipt(on ClientID, id [16]byte, position uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, ok := c.lookupID(id)
	if !ok {
		if c.unjudged == 0 {
			c.reportForged(on, id, "a receipt for a message that was neither answered nor shown")
		}
		return
	}
	m := c.messages.at(n)
	if c.sender(m) != c.clients[on].user {
		c.report(Misdelivered, m, on, func() string { return "its receipt" })
		return
	}
	c.learnPosition(m, position, on)
	if !c.proven(m) && m.flags&early == 0 {
		m.flags |= early
		c.report(ReceiptEarly, m, on, func() string { return "named by a receipt before any device had it" })
	}
	p := pair{c.sender(m), m.receiver}
	c.receipts[p] = max(c.receipts[p], m.position)
}

// Outstanding is how many times an answered message has still to be shown on a device. It is cheap.
// Messages to users who have no device are not counted.
func (c *Checker) Outstanding() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.outstanding
}

// owed is how many devices have still to show a message. One sent when the receiver had no device is owed once: to
// the first device that drains the user's mailbox, or to all of them if it was accepted later than it was sent.
func (c *Checker) owed(m *message) int {
	switch {
	case m.flags&answered == 0:
		return 0
	case m.due != 0:
		return bits.OnesCount8(m.due &^ m.shown)
	case m.shown == 0:
		return 1
	default:
		return 0
	}
}

// settle books what a change of m did to what is owed.
func (c *Checker) settle(m *message, before int) {
	change := c.owed(m) - before
	u := &c.users[m.receiver]
	if m.due == 0 {
		u.unclaimed += change
	}
	if len(u.devices) != 0 {
		c.outstanding += change
	}
}

// learnID ties an id to a message, or finds that it had another.
func (c *Checker) learnID(n uint32, m *message, id [16]byte, on ClientID) {
	if m.flags&identified != 0 {
		if m.id != id {
			c.report(ChangedID, m, on, func() string { return "now under " + idText(id) })
		}
		return
	}
	m.id = id
	m.flags |= identified
	if other, ok := c.lookupID(id); ok {
		o := c.messages.at(other)
		c.report(SharedID, m, on, func() string { return "also the id of " + c.describe(o) })
		return
	}
	c.byID.insert(idHash(id), n, c.idHashOf)
}

// learnPosition gives a message its position, or finds that it had another.
func (c *Checker) learnPosition(m *message, position uint64, on ClientID) {
	switch {
	case m.position == 0 && position != 0:
		m.position = position
	case m.position != position || position == 0:
		c.report(ChangedPosition, m, on, func() string { return fmt.Sprintf("now at position %d", position) })
	}
}

// proven reports that a receipt may cover m.
func (c *Checker) proven(m *message) bool {
	if c.config.Acknowledgements {
		return m.acked != 0
	}
	return m.shown != 0
}

// proved looks, when a receipt may cover m for the first time, whether one has done so already.
func (c *Checker) proved(m *message, unproven bool) {
	if unproven && c.proven(m) && m.flags&early == 0 && m.position != 0 && m.position <= c.receipts[pair{c.sender(m), m.receiver}] {
		m.flags |= early
		c.report(ReceiptEarly, m, noClient, func() string { return "covered by a receipt before any device had it" })
	}
}

// sender is the user who sent m.
func (c *Checker) sender(m *message) int32 { return c.clients[c.streams[m.stream].client].user }

// refusalsByCode is a copy.
func (c *Checker) refusalsByCode() map[string]uint64 { return maps.Clone(c.refusals) }
