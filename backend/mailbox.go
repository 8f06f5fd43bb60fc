package backend

import (
	"cmp"
	"slices"
	"strings"
	"sync"

	"millrace/protocol"
)

// readQueue holds what the mailbox readers have to do, in the order in which it was asked for. It needs no limit of its
// own: a session has at most one page of each kind under way.
type readQueue struct {
	mu     sync.Mutex
	more   *sync.Cond
	list   []reading
	closed bool
}

// reading is one of the two.
type reading struct {
	page     *protocol.PageRequest
	receipts *protocol.ReceiptsRequest
}

func (q *readQueue) init() { q.more = sync.NewCond(&q.mu) }

func (q *readQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.more.Broadcast()
}

func (q *readQueue) put(r reading) {
	q.mu.Lock()
	q.list = append(q.list, r)
	q.mu.Unlock()
	q.more.Signal()
}

// take is false when the queue is closed, or empty and not to wait for.
func (q *readQueue) take(wait bool) (r reading, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for wait && !q.closed && len(q.list) == 0 {
		q.more.Wait()
	}
	if q.closed || len(q.list) == 0 {
		return reading{}, false
	}
	r = q.list[0]
	q.list[0] = reading{}
	q.list = q.list[1:]
	return r, true
}

// ReadPage reads a page of a mailbox; the answer goes to Config.Page. It implements edge.Mailbox.
func (s *Server) ReadPage(r protocol.PageRequest) { s.reads.put(reading{page: &r}) }

// ReadReceipts reads a page of receipts; the answer goes to Config.ReceiptsPage. It implements edge.Mailbox.
func (s *Server) ReadReceipts(r protocol.ReceiptsRequest) { s.reads.put(reading{receipts: &r}) }

func (s *Server) readMailboxes() {
	for s.read(true) {
	}
}

// StepMailbox does one reading that ReadPage or ReadReceipts asked for, and reports whether there was one. It is for a caller
// that drives the Server itself instead of Start, see Step.
func (s *Server) StepMailbox() bool { return s.read(false) }

func (s *Server) read(wait bool) bool {
	r, ok := s.reads.take(wait)
	switch {
	case !ok:
		return false
	case r.page != nil:
		s.cfg.Page(s.page(r.page))
	default:
		s.cfg.ReceiptsPage(s.receiptsPage(r.receipts))
	}
	return true
}

func (s *Server) page(r *protocol.PageRequest) protocol.Page {
	p, err := ReadMailboxPage(s.cfg.Store, r)
	if err != nil {
		s.cfg.Logger.Error("mailbox page not read", "error", err)
	}
	return p
}

// ReadMailboxPage reads one page: for an heir first the user's mailbox, whose messages were accepted before any
// device existed, then the device's. On an error the page carries a refusal.
func ReadMailboxPage(store Store, r *protocol.PageRequest) (protocol.Page, error) {
	p := protocol.Page{To: r.Session, After: r.After, Next: r.After}
	fail := func(err error) (protocol.Page, error) {
		p.Rows = nil
		p.Refusal = protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 1000}
		return p, err
	}
	if r.Heir && !r.After.DeviceMailbox {
		if err := readRows(store, r, "", &p); err != nil {
			return fail(err)
		}
		if len(p.Rows) >= r.Limit {
			return p, nil
		}
		p.Next = protocol.MailboxCursor{DeviceMailbox: true}
	}
	p.Next.DeviceMailbox = true
	if err := readRows(store, r, r.Device, &p); err != nil {
		return fail(err)
	}
	p.End = len(p.Rows) < r.Limit
	return p, nil
}

func readRows(store Store, r *protocol.PageRequest, device string, p *protocol.Page) error {
	rows, err := store.MailboxPage(r.User, device, p.Next.Position, p.Next.ID, r.Limit-len(p.Rows))
	if err != nil {
		return err
	}
	for _, row := range rows {
		p.Rows = append(p.Rows, protocol.MailboxRow{Message: &row.Message, UserMailbox: device == ""})
		p.Next = protocol.MailboxCursor{DeviceMailbox: device != "", Position: row.Position, ID: row.ID}
	}
	return nil
}

func (s *Server) receiptsPage(r *protocol.ReceiptsRequest) protocol.ReceiptsPage {
	p, err := ReadReceiptsPage(s.cfg.Store, r)
	if err != nil {
		s.cfg.Logger.Error("page of receipts not read", "error", err)
	}
	return p
}

// ReadReceiptsPage reads the receipts of a user that follow a cursor in the order in which they changed. The store keeps them by
// conversation: each page looks at all that changed since, which is one page for all but those who were long
// away and have thousands of conversations. On an error the page carries a refusal.
func ReadReceiptsPage(store Store, r *protocol.ReceiptsRequest) (protocol.ReceiptsPage, error) {
	p := protocol.ReceiptsPage{To: r.Session, Next: r.After, End: true}
	var rows []ReceiptRow
	first := func() { // keeps the first Limit rows
		slices.SortFunc(rows, func(a, b ReceiptRow) int { return compareCursors(a.cursor(), b.cursor()) })
		if len(rows) > r.Limit {
			rows, p.End = rows[:r.Limit], false
		}
	}
	err := store.ReceiptsSince(r.User, r.After.Millis, func(row ReceiptRow) bool {
		if row.Delivered.Position != 0 && compareCursors(row.cursor(), r.After) > 0 { // at 0: acknowledged beyond a hole only
			if rows = append(rows, row); len(rows) >= 2*r.Limit {
				first()
			}
		}
		return true
	})
	if err != nil {
		p.Refusal = protocol.Refusal{Code: protocol.CodeInternal, RetryAfterMs: 1000}
		return p, err
	}
	first()
	for i := range rows {
		p.Receipts = append(p.Receipts, rows[i].push(r.Session))
		p.Next = rows[i].cursor()
	}
	return p, nil
}

func (r *ReceiptRow) cursor() protocol.ReceiptCursor {
	return protocol.ReceiptCursor{Millis: r.ChangedMs, Conversation: r.Conversation, Addressee: r.Addressee}
}

func compareCursors(a, b protocol.ReceiptCursor) int {
	return cmp.Or(cmp.Compare(a.Millis, b.Millis), strings.Compare(a.Conversation, b.Conversation), strings.Compare(a.Addressee, b.Addressee))
}
