package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"millrace/backend"
	"millrace/protocol"
)

// simStore applies the writes of commits one by one, in their order, and loses what was not applied in a crash.
type simStore struct {
	sim         *sim
	devices     map[string][]backend.Device
	blocks      map[backend.Stream]uint32
	windows     map[backend.WindowKey]backend.Window
	receipts    map[backend.ReceiptKey]backend.ReceiptRow
	outstanding []backend.OutstandingRow // sorted
	mailboxes   map[simMailbox][]*backend.Record
	lowWater    []uint64 // by shard
	registering uint64   // a crash raises it: registrations under way are lost
	cachedRows  map[string][]backend.Device
}

type simMailbox struct{ user, device string }

func newSimStore(s *sim) *simStore {
	return &simStore{sim: s, devices: map[string][]backend.Device{}, blocks: map[backend.Stream]uint32{},
		windows: map[backend.WindowKey]backend.Window{}, receipts: map[backend.ReceiptKey]backend.ReceiptRow{},
		mailboxes: map[simMailbox][]*backend.Record{}, lowWater: make([]uint64, s.opt.Shards),
		cachedRows: map[string][]backend.Device{}}
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
	return cmp.Or(strings.Compare(a.Conversation, b.Conversation), strings.Compare(a.Addressee, b.Addressee),
		cmp.Compare(a.Position, b.Position))
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
	for _, r := range st.mailboxes[simMailbox{k.User, k.Device}] {
		if r.Position == k.Position && r.ID == k.ID {
			return r, true, nil
		}
	}
	return nil, false, nil
}

func (st *simStore) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) (rows []*backend.Record, err error) {
	for _, r := range st.mailboxes[simMailbox{user, device}] {
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

// lastMs is the latest time that a position or a receipt has.
func (st *simStore) lastMs() (ms int64) {
	for _, r := range st.receipts {
		ms = max(ms, r.ChangedMs)
	}
	for _, last := range st.sim.queue.last {
		ms = max(ms, protocol.PositionMillis(last))
	}
	return ms
}

// put adds a row. It is false when the record could not be read: then it is tried again.
func (st *simStore) put(p backend.MailboxPut, o *simOwner, part int) bool {
	r := p.Record
	if r == nil {
		var err error
		if r, err = o.reader.load(part, p.Position); err != nil {
			return false
		}
	}
	if r == nil {
		// Another owner has finished the record: it stored what every device needs.
		if gone := st.sim.queue.find(o.shard.parts[part], p.Position); gone == nil || !st.finished(gone) {
			st.sim.violate("P2", "the log no longer holds position %d, which a mailbox row needs", p.Position)
		}
		return true
	}
	box := simMailbox{p.User, p.Device}
	rows := st.mailboxes[box]
	i, found := slices.BinarySearchFunc(rows, r, func(a, b *backend.Record) int {
		return cmp.Or(cmp.Compare(a.Position, b.Position), slices.Compare(a.ID[:], b.ID[:]))
	})
	if !found {
		st.sim.logf("mailbox %s/%s gets %s at %d", box.user, box.device, r.Content, r.Position)
		st.mailboxes[box] = slices.Insert(slices.Clone(rows), i, r)
		st.report(box, len(rows))
	}
	return true
}

func (st *simStore) finished(r *backend.Record) bool {
	w := st.windows[backend.WindowKey{Conversation: conversationOf(r), Stream: r.Stream()}]
	return w.Finished(r.Seq)
}

func (st *simStore) deleteRow(k backend.MailboxKey) {
	box := simMailbox{k.User, k.Device}
	rows := st.mailboxes[box]
	st.sim.logf("mailbox %s/%s loses %d", k.User, k.Device, k.Position)
	st.mailboxes[box] = slices.DeleteFunc(slices.Clone(rows), func(r *backend.Record) bool {
		return r.Position == k.Position && r.ID == k.ID
	})
	st.report(box, len(rows))
}

// report tells every publisher when a mailbox becomes full, or is it no longer.
func (st *simStore) report(box simMailbox, before int) {
	was, is := before >= simMailboxRows, len(st.mailboxes[box]) >= simMailboxRows
	if was == is || !st.sim.opt.SmallMailboxes {
		return
	}
	for _, sh := range st.sim.shards {
		for _, o := range sh.owners() {
			o.server.Hooks().MailboxFull(box.user, box.device, is)
		}
	}
}

// greet tells a new publisher which mailboxes are full.
func (st *simStore) greet(h backend.Hooks) {
	for box, rows := range st.mailboxes {
		if st.sim.opt.SmallMailboxes && len(rows) >= simMailboxRows {
			h.MailboxFull(box.user, box.device, true)
		}
	}
}

// commit queues the writes; they are applied one by one at times that the seed chooses.
func (st *simStore) commit(c *backend.Commit, o *simOwner) {
	var puts, outs, receipts, settled, acked, windows []func() bool
	for _, p := range c.Mailbox {
		puts = append(puts, func() bool { return st.put(p, o, c.Shard) })
	}
	always := func(write func()) func() bool {
		return func() bool { write(); return true }
	}
	for _, r := range c.Outstanding {
		outs = append(outs, always(func() {
			if i, found := slices.BinarySearchFunc(st.outstanding, r, compareOutstanding); !found {
				st.sim.logf("%s for %s is outstanding", simConversation(r.Conversation, r.Position), r.Addressee)
				st.outstanding = slices.Insert(st.outstanding, i, r)
			}
		}))
	}
	for _, r := range c.Receipts {
		receipts = append(receipts, always(func() {
			st.sim.logf("receipt of %s for %s: all up to %d, some up to %d, dated %d", r.Addressee, r.Sender, r.Delivered.Position, r.Top.Position, r.ChangedMs)
			st.receipts[r.ReceiptKey] = st.mergeReceipt(st.receipts[r.ReceiptKey], r)
		}))
	}
	for _, k := range c.Settled {
		settled = append(settled, always(func() {
			i, found := slices.BinarySearchFunc(st.outstanding, backend.OutstandingRow{Conversation: k.Conversation,
				Addressee: k.Addressee, Mark: backend.Mark{Position: k.Position}}, compareOutstanding)
			if found {
				st.sim.logf("%s for %s is outstanding no more", simConversation(k.Conversation, k.Position), k.Addressee)
				st.outstanding = slices.Delete(st.outstanding, i, i+1)
			}
		}))
	}
	for _, k := range c.Acknowledged {
		acked = append(acked, always(func() { st.deleteRow(k) }))
	}
	for _, w := range c.Windows {
		windows = append(windows, always(func() {
			merged := st.windows[w.WindowKey]
			merged.Merge(&w.Window)
			if st.sim.mut == "a late owner's windows replace newer ones" {
				merged = w.Window
			}
			st.windows[w.WindowKey] = merged
		}))
	}
	part := o.shard.parts[c.Shard]
	low := []func() bool{always(func() { st.lowWater[part] = max(st.lowWater[part], c.LowWater) })}
	var writes []func() bool
	switch st.sim.mut {
	case "window before mailbox":
		writes = slices.Concat(windows, low, puts, outs, receipts, settled, acked)
	case "receipts are announced and not stored":
		writes = slices.Concat(puts, outs, settled, acked, windows, low)
	case "no outstanding rows":
		writes = slices.Concat(puts, receipts, settled, acked, windows, low)
	case "no window rows":
		writes = slices.Concat(puts, outs, receipts, settled, acked, low)
	case "mailbox rows not written":
		writes = slices.Concat(outs, receipts, settled, acked, windows, low)
	default:
		writes = slices.Concat(puts, outs, receipts, settled, acked, windows, low)
	}
	done := always(func() {
		c.Done()
		o.wake()
	})
	if st.sim.mut == "commit done before it is durable" {
		done()
	} else {
		writes = append(writes, done)
	}
	idle := len(o.writes[c.Shard]) == 0
	o.writes[c.Shard] = append(o.writes[c.Shard], writes...)
	if idle {
		st.sim.after(st.sim.rng.Int64N(20), func() { st.apply(o, c.Shard) })
	}
}

func simConversation(key string, position uint64) string {
	return fmt.Sprintf("%s@%d", strings.ReplaceAll(key, "\x00", "+"), position)
}

func (st *simStore) mergeReceipt(old, r backend.ReceiptRow) backend.ReceiptRow {
	if r.Delivered.Position >= old.Delivered.Position {
		old.Delivered, old.ChangedMs = r.Delivered, max(old.ChangedMs, r.ChangedMs)
	}
	if r.Top.Position > old.Top.Position {
		old.Top = r.Top
	}
	old.ReceiptKey = r.ReceiptKey
	return old
}

func (st *simStore) apply(o *simOwner, part int) {
	for range 1 + st.sim.rng.IntN(6) {
		if o.dead || len(o.writes[part]) == 0 {
			return
		}
		if !o.writes[part][0]() {
			break
		}
		o.writes[part] = o.writes[part][1:]
	}
	if len(o.writes[part]) > 0 {
		st.sim.after(st.sim.rng.Int64N(10), func() { st.apply(o, part) })
	}
}

func (st *simStore) crashRegistrations() { st.registering++ }

func (st *simStore) register(k backend.Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	life := st.registering
	st.sim.after(st.sim.rng.Int64N(40), func() {
		if st.registering != life {
			return
		}
		rows := st.devices[k.User]
		i := slices.IndexFunc(rows, func(d backend.Device) bool { return d.Name == k.Device })
		if i < 0 {
			if len(rows) >= protocol.MaxDevicesPerUser && st.sim.mut != "a ninth device is registered" {
				done(0, false, protocol.Refusal{Code: protocol.CodeTooManyDevices})
				return
			}
			i = len(rows)
			heir := i == 0 && st.sim.mut != "the first device is no heir"
			st.devices[k.User] = append(slices.Clone(rows), backend.Device{Name: k.Device, Heir: heir})
			st.sim.truth.registered(k.User, k.Device)
		}
		block := st.blocks[k]
		if st.sim.mut != "the block counter is not raised" {
			st.blocks[k] = block + 1
		}
		done(block, st.devices[k.User][i].Heir, protocol.Refusal{})
	})
}

// simView is the store as one owner sees it: reads fail, and commits end with the owner.
type simView struct {
	*simStore
	owner *simOwner
}

func (v simView) Devices(user string) ([]backend.Device, error) {
	if v.sim.readFails() {
		return nil, errSimRead
	}
	return v.simStore.Devices(user)
}

func (v simView) Window(k backend.WindowKey) (backend.Window, error) {
	if v.sim.readFails() {
		return backend.Window{}, errSimRead
	}
	return v.simStore.Window(k)
}

func (v simView) Receipt(k backend.ReceiptKey) (backend.ReceiptRow, error) {
	if v.sim.readFails() {
		return backend.ReceiptRow{}, errSimRead
	}
	return v.simStore.Receipt(k)
}

func (v simView) FirstOutstanding(conversation, addressee string, from uint64) (backend.OutstandingRow, bool, error) {
	if v.sim.readFails() {
		return backend.OutstandingRow{}, false, errSimRead
	}
	return v.simStore.FirstOutstanding(conversation, addressee, from)
}

func (v simView) MailboxRow(k backend.MailboxKey) (*backend.Record, bool, error) {
	if v.sim.readFails() {
		return nil, false, errSimRead
	}
	return v.simStore.MailboxRow(k)
}

func (v simView) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) ([]*backend.Record, error) {
	if v.sim.readFails() {
		return nil, errSimRead
	}
	return v.simStore.MailboxPage(user, device, position, id, limit)
}

func (v simView) ReceiptsSince(sender string, since int64, yield func(backend.ReceiptRow) bool) error {
	if v.sim.readFails() {
		return errSimRead
	}
	return v.simStore.ReceiptsSince(sender, since, yield)
}

func (v simView) Commit(c *backend.Commit) {
	if v.sim.mut == "the log is trimmed by what was taken" {
		c.LowWater = v.owner.reader.taken(c.Shard) + 1
	}
	v.commit(c, v.owner)
}

func (v simView) Register(k backend.Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	v.register(k, done)
}
