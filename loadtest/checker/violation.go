package checker

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Kind is a way to break the promise.
type Kind uint8

const (
	Lost            Kind = iota // answered, not shown by an addressee
	Doubled                     // shown twice on one device
	Disordered                  // positions contradict the numbers of a stream
	Misdelivered                // shown, or its receipt, on a device of somebody else
	Forged                      // shown, answered or told of, but never sent like that
	ChangedID                   // one message, two ids
	SharedID                    // two messages, one id
	ChangedPosition             // one message, two positions
	SharedPosition              // two messages of a conversation, one position
	Contradicted                // refused for good, and accepted
	ReceiptEarly                // a receipt before a device of the receiver had the message
	ReceiptMissing              // no receipt for a message that a device has acknowledged
	Misused                     // the run reported what cannot be
	Unjudged                    // a send beyond MaxMessages
	kinds           = iota
)

var kindNames = [kinds]string{
	"lost", "doubled", "out of order", "misdelivered", "forged", "changed id", "shared id", "changed position", "shared position",
	"contradicted", "receipt early", "receipt missing", "misused", "unjudged",
}

// String is what verdicts print.
func (k Kind) String() string { return kindNames[k] }

// Violation is one example of what went wrong.
type Violation struct {
	Kind   Kind
	Stream StreamID // −1: not known
	Seq    uint64
	ID     [16]byte // zero: not known
	Client ClientID // where it was noticed; −1: nowhere in particular
	Text   string   // names, ids and positions, for people
}

// String is the kind and the text.
func (v Violation) String() string { return v.Kind.String() + ": " + v.Text }

const (
	noClient ClientID = -1
	noStream StreamID = -1
)

// findings counts violations and keeps the first few of each kind in the order of compare, so
// that it does not matter which came first.
type findings struct {
	limit    int
	counts   [kinds]uint64
	examples [kinds][]Violation
}

// add counts v and keeps it if it is among the first; text is called only then.
func (f *findings) add(v Violation, text func() string) {
	f.counts[v.Kind]++
	list := f.examples[v.Kind]
	at, _ := slices.BinarySearchFunc(list, v, compare)
	if at == f.limit {
		return
	}
	v.Text = text()
	if len(list) == f.limit {
		list = list[:f.limit-1]
	}
	f.examples[v.Kind] = slices.Insert(list, at, v)
}

func compare(a, b Violation) int {
	return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.Client, b.Client), slices.Compare(a.ID[:], b.ID[:]))
}

func (f *findings) clone() findings {
	c := *f
	for k := range c.examples {
		c.examples[k] = slices.Clone(c.examples[k])
	}
	return c
}

func (f *findings) all() (list []Violation) {
	for _, examples := range f.examples {
		list = append(list, examples...)
	}
	return list
}

// report adds a violation about a known message to the run.
func (c *Checker) report(k Kind, m *message, on ClientID, detail func() string) {
	c.reportTo(&c.found, k, m, on, detail)
}

func (c *Checker) reportTo(f *findings, k Kind, m *message, on ClientID, detail func() string) {
	f.add(Violation{Kind: k, Stream: m.stream, Seq: m.seq, ID: m.id, Client: on}, func() string {
		return c.describe(m) + c.where(on) + ": " + detail()
	})
}

// reportUnknown is about a number that was never sent, or not judged.
func (c *Checker) reportUnknown(from StreamID, seq uint64, id [16]byte, on ClientID, detail string) {
	if c.unjudged != 0 {
		return
	}
	c.found.add(Violation{Kind: Forged, Stream: from, Seq: seq, ID: id, Client: on}, func() string {
		return fmt.Sprintf("%s %d of %s%s: %s", idText(id), seq, c.streamName(from), c.where(on), detail)
	})
}

func (c *Checker) reportForged(on ClientID, id [16]byte, detail string) {
	c.found.add(Violation{Kind: Forged, Stream: noStream, ID: id, Client: on}, func() string {
		return idText(id) + c.where(on) + ": " + detail
	})
}

func (c *Checker) misuse(on ClientID, id [16]byte, detail string) {
	if c.unjudged != 0 {
		return
	}
	c.found.add(Violation{Kind: Misused, Stream: noStream, ID: id, Client: on}, func() string {
		return idText(id) + c.where(on) + ": " + detail
	})
}

// describe names a message: "0A…Z 1048577 of alice/phone#0 to bob at 3466938832609280".
func (c *Checker) describe(m *message) string {
	id := "(no id)"
	if m.flags&identified != 0 {
		id = idText(m.id)
	}
	text := fmt.Sprintf("%s %d of %s to %s", id, m.seq, c.streamName(m.stream), c.users[m.receiver].name)
	if m.position != 0 {
		text += " at " + strconv.FormatUint(m.position, 10)
	}
	return text
}

func (c *Checker) streamName(s StreamID) string {
	return fmt.Sprintf("%s#%d", c.clientName(c.streams[s].client), s)
}

func (c *Checker) clientName(n ClientID) string {
	return c.users[c.clients[n].user].name + "/" + c.clients[n].device
}

func (c *Checker) where(on ClientID) string {
	if on == noClient {
		return ""
	}
	return " on " + c.clientName(on)
}

// idText is the text form of a message id: 26 characters of Crockford base32, the first of them three bits.
func idText(id [16]byte) string {
	const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
	var text [26]byte
	value, have, next := uint32(0), 0, len(id)-1
	for i := len(text) - 1; i >= 0; i-- {
		if have < 5 && next >= 0 {
			value |= uint32(id[next]) << have
			have += 8
			next--
		}
		text[i] = alphabet[value&31]
		value >>= 5
		have -= 5
	}
	return string(text[:])
}

// excerpt bounds and quotes a text of unknown origin.
func excerpt(text string) string {
	const limit = 60
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "…"
	}
	return strconv.Quote(text)
}
