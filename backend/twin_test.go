package backend

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"

	"millrace/protocol"
)

// twin is the least that can stand for a queue, a store and a route table in a test of this package: maps, and nothing
// happens that the test does not ask for. Only what durable was called for is in the maps. Safe for concurrent use.
type twin struct {
	mu sync.Mutex // guards all fields

	devices     map[string][]Device
	blocks      map[Stream]uint32
	windows     map[WindowKey]Window
	receipts    map[ReceiptKey]ReceiptRow
	outstanding map[OutstandingKey]OutstandingRow
	mailboxes   map[mailboxName][]*Record // by position

	log      []*Record // durable, by position
	read     int       // of log
	lowWater uint64
	commits  []*Commit // given, not durable
	appended []*Record // given, not durable
	last     uint64

	routes map[string][]protocol.Route
	conns  uint64
	names  map[protocol.Session]string // for messages

	failing  map[string]bool // what cannot be read
	onCommit func()          // told of each commit, if set
	refusal  protocol.Refusal
}

// twinGap lies between two positions, so that a transcript can put one in between.
const twinGap = 10

var errTwin = errors.New("the disk says no")

func newTwin() *twin {
	return &twin{devices: map[string][]Device{}, blocks: map[Stream]uint32{}, windows: map[WindowKey]Window{},
		receipts: map[ReceiptKey]ReceiptRow{}, outstanding: map[OutstandingKey]OutstandingRow{},
		mailboxes: map[mailboxName][]*Record{}, routes: map[string][]protocol.Route{}, names: map[protocol.Session]string{},
		failing: map[string]bool{}}
}

func (w *twin) fails(read string) error {
	if w.failing[read] {
		return errTwin
	}
	return nil
}

func (w *twin) fail(read string, yes bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failing[read] = yes
}

func (w *twin) Devices(user string) ([]Device, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.devices[user]), w.fails("devices")
}

func (w *twin) Window(k WindowKey) (Window, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.windows[k], w.fails("window")
}

func (w *twin) Receipt(k ReceiptKey) (ReceiptRow, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.receipts[k], w.fails("receipt")
}

func (w *twin) FirstOutstanding(conversation, addressee string, from uint64) (first OutstandingRow, ok bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for k, row := range w.outstanding {
		if k.Conversation == conversation && k.Addressee == addressee && k.Position >= from && (!ok || k.Position < first.Position) {
			first, ok = row, true
		}
	}
	return first, ok, w.fails("outstanding")
}

func (w *twin) MailboxRow(k MailboxKey) (*Record, bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fails("mailbox"); err != nil {
		return nil, false, err
	}
	i, ok := w.row(k)
	if !ok {
		return nil, false, nil
	}
	return w.mailboxes[mailboxName{k.User, k.Device}][i], true, nil
}

func (w *twin) row(k MailboxKey) (i int, ok bool) {
	return slices.BinarySearchFunc(w.mailboxes[mailboxName{k.User, k.Device}], k, func(r *Record, k MailboxKey) int {
		return cmp.Or(cmp.Compare(r.Position, k.Position), slices.Compare(r.ID[:], k.ID[:]))
	})
}

func (w *twin) MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) (page []*Record, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fails("mailbox"); err != nil {
		return nil, err
	}
	for _, r := range w.mailboxes[mailboxName{user, device}] {
		if len(page) < limit && (r.Position > position || r.Position == position && slices.Compare(r.ID[:], id[:]) > 0) {
			page = append(page, r)
		}
	}
	return page, nil
}

func (w *twin) ReceiptsSince(sender string, since int64, yield func(ReceiptRow) bool) error {
	w.mu.Lock()
	var rows []ReceiptRow
	for _, row := range w.receipts {
		if row.Sender == sender && row.ChangedMs >= since {
			rows = append(rows, row)
		}
	}
	err := w.fails("receipts")
	w.mu.Unlock()
	if err != nil {
		return err
	}
	slices.SortFunc(rows, func(a, b ReceiptRow) int { return cmp.Compare(a.Delivered.Position, b.Delivered.Position) })
	for _, row := range rows {
		if !yield(row) {
			break
		}
	}
	return nil
}

func (w *twin) Register(s Stream, done func(block uint32, heir bool, refusal protocol.Refusal)) {
	w.mu.Lock()
	devices := w.devices[s.User]
	i := slices.IndexFunc(devices, func(d Device) bool { return d.Name == s.Device })
	if i < 0 {
		i = len(devices)
		devices = append(devices, Device{Name: s.Device, Heir: i == 0})
		w.devices[s.User] = devices
	}
	block := w.blocks[s]
	w.blocks[s]++
	w.mu.Unlock()
	done(block, devices[i].Heir, protocol.Refusal{})
}

// Append keeps r until sync; it refuses with w.refusal.
func (w *twin) Append(r *Record) protocol.Refusal {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refusal.Code == protocol.OK {
		w.appended = append(w.appended, r)
	}
	return w.refusal
}

// sync makes what was appended durable and returns it.
func (w *twin) sync() []*Record {
	w.mu.Lock()
	defer w.mu.Unlock()
	records := w.appended
	w.appended = nil
	for _, r := range records {
		w.last += twinGap
		r.Position = w.last
		w.log = append(w.log, r)
	}
	return records
}

func (w *twin) Shards() int { return 1 }

func (w *twin) Read(_ int, dst []*Record, max int) ([]*Record, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.fails("log"); err != nil {
		return dst, err
	}
	n := min(max-len(dst), len(w.log)-w.read)
	dst = append(dst, w.log[w.read:w.read+n]...)
	w.read += n
	return dst, nil
}

func (w *twin) load(position uint64) (*Record, error) {
	for _, r := range w.log {
		if r.Position == position && position >= w.lowWater {
			return r, nil
		}
	}
	return nil, errTwin
}

func (w *twin) Commit(c *Commit) {
	w.mu.Lock()
	w.commits = append(w.commits, c)
	w.mu.Unlock()
	if w.onCommit != nil {
		w.onCommit()
	}
}

// durable applies the oldest commit and calls its Done. It reports false if there is none.
func (w *twin) durable() bool {
	w.mu.Lock()
	if len(w.commits) == 0 {
		w.mu.Unlock()
		return false
	}
	c := w.commits[0]
	w.commits = w.commits[1:]
	w.apply(c)
	w.mu.Unlock()
	if c.Done != nil {
		c.Done()
	}
	return true
}

func (w *twin) apply(c *Commit) {
	for _, p := range c.Mailbox {
		r := p.Record
		if r == nil {
			var err error
			if r, err = w.load(p.Position); err != nil {
				panic("a mailbox row of a record that is not in the log any more")
			}
		}
		if i, ok := w.row(MailboxKey{p.User, p.Device, r.Position, r.ID}); !ok {
			name := mailboxName{p.User, p.Device}
			w.mailboxes[name] = slices.Insert(w.mailboxes[name], i, r)
		}
	}
	for _, row := range c.Outstanding {
		w.outstanding[OutstandingKey{row.Conversation, row.Addressee, row.Position}] = row
	}
	for _, row := range c.Receipts {
		old := w.receipts[row.ReceiptKey]
		if row.Delivered.Position < old.Delivered.Position {
			row.Delivered, row.ChangedMs = old.Delivered, old.ChangedMs
		}
		if row.Top.Position < old.Top.Position {
			row.Top = old.Top
		}
		w.receipts[row.ReceiptKey] = row
	}
	for _, k := range c.Settled {
		delete(w.outstanding, k)
	}
	for _, k := range c.Acknowledged {
		if i, ok := w.row(k); ok {
			name := mailboxName{k.User, k.Device}
			w.mailboxes[name] = slices.Delete(w.mailboxes[name], i, i+1)
		}
	}
	for _, row := range c.Windows {
		old := w.windows[row.WindowKey]
		old.Merge(&row.Window)
		w.windows[row.WindowKey] = old
	}
	w.lowWater = max(w.lowWater, c.LowWater)
}

// bind puts a session of a device into the route table and returns it.
func (w *twin) bind(user, device string, live bool) protocol.Session {
	w.unbind(user, device)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns++
	s := protocol.Session{Edge: 1, Conn: w.conns}
	w.names[s] = fmt.Sprintf("%s/%s:%d", user, device, w.conns)
	w.routes[user] = append(w.routes[user], protocol.Route{Device: device, Session: s, Live: live})
	return s
}

func (w *twin) unbind(user, device string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.routes[user] = slices.DeleteFunc(w.routes[user], func(r protocol.Route) bool { return r.Device == device })
}

func (w *twin) Locate(dst []protocol.Route, user string) []protocol.Route {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append(dst, w.routes[user]...)
}
