package backendtest

import (
	"cmp"
	"errors"
	"slices"
	"sort"
	"sync"
	"time"

	"millrace/backend"
	"millrace/protocol"
)

// Disk is what a Memory keeps from one Open to the next. The zero Disk is empty. Its Memories are opened one
// after the other.
type Disk struct {
	last        uint64
	log         []*backend.Record // by position
	windows     map[backend.WindowKey]backend.Window
	receipts    map[backend.ReceiptKey]backend.ReceiptRow
	outstanding map[backend.OutstandingKey]backend.OutstandingRow
	mailboxes   map[mailboxName][]*backend.Record // by position and id
	devices     map[string][]backend.Device
	blocks      map[backend.Stream]uint32   // the next
	windowUse   map[backend.WindowKey]int64 // when it was last used, in ms
	streamUse   map[backend.Stream]int64
}

// errNoRecord says that a record is finished, or never was.
var errNoRecord = errors.New("no record at this position")

type mailboxName struct{ user, device string }

// Memory implements backend.Queue and backend.Store without a disk. One goroutine does everything in the order in
// which it was asked, one thing at a time: what it has done is durable.
type Memory struct {
	o      Options
	hooks  backend.Hooks
	worker sync.WaitGroup

	mu      sync.Mutex // guards the following and disk
	work    *sync.Cond
	todo    []func() (report func()) // run with mu held; what they return, without
	closing bool
	disk    *Disk
	cursors []uint64 // per shard: the last position that Read took
	unread  []int    // per shard
}

var _ Instance = (*Memory)(nil)

// Open opens the disk; Close the Memory before it first.
func (k *Disk) Open(o Options) *Memory {
	if o.Shards == 0 {
		o.Shards = 2
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MailboxRows == 0 {
		o.MailboxRows = protocol.MaxMailboxRows
	}
	if o.MaxUnread == 0 {
		o.MaxUnread = 200_000
	}
	if k.windows == nil {
		k.windows = make(map[backend.WindowKey]backend.Window)
		k.receipts = make(map[backend.ReceiptKey]backend.ReceiptRow)
		k.outstanding = make(map[backend.OutstandingKey]backend.OutstandingRow)
		k.mailboxes = make(map[mailboxName][]*backend.Record)
		k.devices = make(map[string][]backend.Device)
		k.blocks = make(map[backend.Stream]uint32)
		k.windowUse = make(map[backend.WindowKey]int64)
		k.streamUse = make(map[backend.Stream]int64)
	}
	m := &Memory{o: o, disk: k, cursors: make([]uint64, o.Shards), unread: make([]int, o.Shards)}
	m.work = sync.NewCond(&m.mu)
	for _, r := range k.log {
		m.unread[m.shard(r)]++
	}
	return m
}

// Start implements Instance.
func (m *Memory) Start(h backend.Hooks) {
	m.hooks = h
	m.do(m.greet)
	m.worker.Go(m.run)
}

func (m *Memory) greet() func() {
	var full []mailboxName
	for name, rows := range m.disk.mailboxes {
		if len(rows) >= m.o.MailboxRows {
			full = append(full, name)
		}
	}
	return func() {
		for _, name := range full {
			m.hooks.MailboxFull(name.user, name.device, true)
		}
		for shard := range m.o.Shards {
			m.hooks.Wake(shard)
		}
	}
}

func (m *Memory) do(f func() (report func())) {
	m.mu.Lock()
	m.todo = append(m.todo, f)
	m.mu.Unlock()
	m.work.Signal()
}

func (m *Memory) run() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for {
		for len(m.todo) == 0 && !m.closing {
			m.work.Wait()
		}
		if len(m.todo) == 0 {
			return
		}
		f := m.todo[0]
		m.todo = m.todo[1:]
		report := f()
		m.mu.Unlock()
		report()
		m.mu.Lock()
	}
}

func (m *Memory) nowMs() int64 { return m.o.Now().UnixMilli() }

// Age implements Instance. Nothing expires but here.
func (m *Memory) Age(time.Duration) error {
	done := make(chan struct{})
	m.do(func() func() {
		report := m.expire(m.nowMs() - expireRows.Milliseconds())
		return func() {
			report()
			close(done)
		}
	})
	<-done
	return nil
}

const (
	expireRows    = 365 * 24 * time.Hour
	expireStreams = 2 * expireRows
)

// expire deletes what is dated before a time.
func (m *Memory) expire(ms int64) (report func()) {
	c := &backend.Commit{}
	for name, rows := range m.disk.mailboxes {
		for _, r := range rows {
			if protocol.PositionMillis(r.Position) < ms {
				c.Acknowledged = append(c.Acknowledged, backend.MailboxKey{User: name.user, Device: name.device, Position: r.Position, ID: r.ID})
			}
		}
	}
	for key := range m.disk.outstanding {
		if protocol.PositionMillis(key.Position) < ms {
			c.Settled = append(c.Settled, key)
		}
	}
	for key, used := range m.disk.windowUse {
		if used < ms {
			delete(m.disk.windows, key)
			delete(m.disk.windowUse, key)
		}
	}
	for stream, used := range m.disk.streamUse {
		if used < ms-(expireStreams-expireRows).Milliseconds() {
			delete(m.disk.blocks, stream)
			delete(m.disk.streamUse, stream)
		}
	}
	return m.commit(c)
}

// Close implements Instance.
func (m *Memory) Close() error {
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	m.work.Signal()
	m.worker.Wait()
	return nil
}

// Shards implements backend.Queue.
func (m *Memory) Shards() int { return m.o.Shards }

func (m *Memory) shard(r *backend.Record) int { return int(r.Conversation % uint64(m.o.Shards)) }

// Append implements backend.Queue.
func (m *Memory) Append(r *backend.Record) protocol.Refusal {
	r.AcceptedMs = m.o.Now().UnixMilli()
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closing:
		return protocol.Refusal{Code: protocol.CodeShuttingDown, RetryAfterMs: 1000}
	case m.unread[m.shard(r)] >= m.o.MaxUnread:
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: 500}
	}
	m.todo = append(m.todo, func() func() { return m.append(r) })
	m.work.Signal()
	return protocol.Refusal{}
}

func (m *Memory) append(r *backend.Record) func() {
	m.disk.last = protocol.NextPosition(m.disk.last, r.AcceptedMs)
	r.Position = m.disk.last
	stored := *r
	stored.From, stored.Resend = protocol.Session{}, false
	m.disk.log = append(m.disk.log, &stored)
	m.unread[m.shard(r)]++
	a := protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Position: r.Position, Millis: protocol.PositionMillis(r.Position)}
	if r.Resend {
		a.Position = 0
	}
	return func() {
		m.hooks.Answer([]protocol.Answer{a})
		m.hooks.Wake(m.shard(r))
	}
}

// Read implements backend.Queue.
func (m *Memory) Read(shard int, dst []*backend.Record, max int) ([]*backend.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.disk.log[m.find(m.cursors[shard]+1):] {
		if len(dst) >= max {
			break
		}
		if m.shard(r) == shard {
			dst = append(dst, r)
			m.unread[shard]--
			m.cursors[shard] = r.Position
		}
	}
	return dst, nil
}

// find is the index of the first record at a position ≥ position.
func (m *Memory) find(position uint64) int {
	return sort.Search(len(m.disk.log), func(i int) bool { return m.disk.log[i].Position >= position })
}

func (m *Memory) load(position uint64) (*backend.Record, error) {
	i := m.find(position)
	if i == len(m.disk.log) || m.disk.log[i].Position != position {
		return nil, errNoRecord
	}
	return m.disk.log[i], nil
}

// Commit implements backend.Store.
func (m *Memory) Commit(c *backend.Commit) { m.do(func() func() { return m.commit(c) }) }

func (m *Memory) commit(c *backend.Commit) func() {
	before := make(map[mailboxName]bool)
	note := func(name mailboxName) {
		if _, ok := before[name]; !ok {
			before[name] = len(m.disk.mailboxes[name]) >= m.o.MailboxRows
		}
	}
	for _, p := range c.Mailbox {
		name := mailboxName{p.User, p.Device}
		note(name)
		r := p.Record
		if r == nil {
			var err error
			if r, err = m.load(p.Position); err != nil {
				panic("commit puts a mailbox row of a record that is finished")
			}
		}
		m.put(name, r)
	}
	for _, o := range c.Outstanding {
		m.disk.outstanding[backend.OutstandingKey{Conversation: o.Conversation, Addressee: o.Addressee, Position: o.Position}] = o
	}
	for _, r := range c.Receipts {
		m.disk.receipts[r.ReceiptKey] = mergeReceipt(m.disk.receipts[r.ReceiptKey], r)
	}
	for _, o := range c.Settled {
		delete(m.disk.outstanding, o)
	}
	for _, key := range c.Acknowledged {
		name := mailboxName{key.User, key.Device}
		note(name)
		m.remove(name, key)
	}
	for i := range c.Windows {
		w := m.disk.windows[c.Windows[i].WindowKey]
		w.Merge(&c.Windows[i].Window)
		m.disk.windows[c.Windows[i].WindowKey] = w
		// A stream is kept as long as a window that knows its numbers, and never draws a block that one knows.
		stream := c.Windows[i].Stream
		m.disk.windowUse[c.Windows[i].WindowKey], m.disk.streamUse[stream] = m.nowMs(), m.nowMs()
		m.disk.blocks[stream] = max(m.disk.blocks[stream], w.Blocks[0].Block+1)
	}
	m.disk.log = slices.DeleteFunc(m.disk.log, func(r *backend.Record) bool {
		return m.shard(r) == c.Shard && r.Position < c.LowWater
	})
	return func() { m.committed(c, before) }
}

func (m *Memory) committed(c *backend.Commit, before map[mailboxName]bool) {
	for name, was := range before {
		m.mu.Lock()
		is := len(m.disk.mailboxes[name]) >= m.o.MailboxRows
		m.mu.Unlock()
		if is != was {
			m.hooks.MailboxFull(name.user, name.device, is)
		}
	}
	if c.Done != nil {
		c.Done()
	}
}

func mergeReceipt(old, r backend.ReceiptRow) backend.ReceiptRow {
	old.ReceiptKey = r.ReceiptKey
	if r.Delivered.Position >= old.Delivered.Position {
		old.Delivered = r.Delivered
		old.ChangedMs = max(old.ChangedMs, r.ChangedMs)
	}
	if r.Top.Position > old.Top.Position {
		old.Top = r.Top
	}
	return old
}

func compareRows(r *backend.Record, k backend.MailboxKey) int {
	return cmp.Or(cmp.Compare(r.Position, k.Position), slices.Compare(r.ID[:], k.ID[:]))
}

func (m *Memory) put(name mailboxName, r *backend.Record) {
	rows := m.disk.mailboxes[name]
	i, found := slices.BinarySearchFunc(rows, backend.MailboxKey{Position: r.Position, ID: r.ID}, compareRows)
	if !found {
		m.disk.mailboxes[name] = slices.Insert(rows, i, r)
	}
}

func (m *Memory) remove(name mailboxName, k backend.MailboxKey) {
	rows := m.disk.mailboxes[name]
	if i, found := slices.BinarySearchFunc(rows, k, compareRows); found {
		m.disk.mailboxes[name] = slices.Delete(rows, i, i+1)
	}
}

// Register implements backend.Store.
func (m *Memory) Register(s backend.Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	m.do(func() func() {
		devices := m.disk.devices[s.User]
		i := slices.IndexFunc(devices, func(d backend.Device) bool { return d.Name == s.Device })
		if i < 0 {
			if len(devices) >= protocol.MaxDevicesPerUser {
				return func() { done(0, false, protocol.Refusal{Code: protocol.CodeTooManyDevices}) }
			}
			i = len(devices)
			m.disk.devices[s.User] = append(devices, backend.Device{Name: s.Device, Heir: i == 0})
		}
		block, heir := m.disk.blocks[s], m.disk.devices[s.User][i].Heir
		m.disk.blocks[s]++
		m.disk.streamUse[s] = m.nowMs()
		return func() { done(block, heir, protocol.Refusal{}) }
	})
}

// Devices implements backend.Reader.
func (m *Memory) Devices(user string) ([]backend.Device, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.disk.devices[user]), nil
}

// Window implements backend.Reader.
func (m *Memory) Window(k backend.WindowKey) (backend.Window, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.disk.windows[k], nil
}

// Receipt implements backend.Reader.
func (m *Memory) Receipt(k backend.ReceiptKey) (backend.ReceiptRow, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	row := m.disk.receipts[k]
	row.ReceiptKey = k
	return row, nil
}

// FirstOutstanding implements backend.Reader.
func (m *Memory) FirstOutstanding(conversation, addressee string, from uint64) (row backend.OutstandingRow, ok bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, o := range m.disk.outstanding {
		if k.Conversation == conversation && k.Addressee == addressee && k.Position >= from && (!ok || k.Position < row.Position) {
			row, ok = o, true
		}
	}
	return row, ok, nil
}

// MailboxRow implements backend.Reader.
func (m *Memory) MailboxRow(k backend.MailboxKey) (*backend.Record, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rows := m.disk.mailboxes[mailboxName{k.User, k.Device}]
	if i, found := slices.BinarySearchFunc(rows, k, compareRows); found {
		return rows[i], true, nil
	}
	return nil, false, nil
}

// MailboxPage implements backend.Store.
func (m *Memory) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) ([]*backend.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rows := m.disk.mailboxes[mailboxName{user, device}]
	i, found := slices.BinarySearchFunc(rows, backend.MailboxKey{Position: position, ID: id}, compareRows)
	if found {
		i++
	}
	return slices.Clone(rows[i:min(len(rows), i+limit)]), nil
}

// ReceiptsSince implements backend.Store.
func (m *Memory) ReceiptsSince(sender string, since int64, yield func(backend.ReceiptRow) bool) error {
	m.mu.Lock()
	var rows []backend.ReceiptRow
	for k, row := range m.disk.receipts {
		if k.Sender == sender && row.ChangedMs >= since {
			rows = append(rows, row)
		}
	}
	m.mu.Unlock()
	for _, row := range rows {
		if !yield(row) {
			break
		}
	}
	return nil
}
