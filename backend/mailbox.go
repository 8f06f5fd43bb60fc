package backend

import (
	"sync"

	"millrace/protocol"
)

// receiptsBatch is how many receipts are handed to the edge at once when a client comes back.
const receiptsBatch = 64

// pageQueue holds what the mailbox readers have to do. It needs no limit of its own: a session has at
// most one page and one reading of receipts under way.
type pageQueue struct {
	mu       sync.Mutex
	more     *sync.Cond
	pages    []protocol.PageRequest
	receipts []protocol.ReceiptsRequest
	closed   bool
}

func (q *pageQueue) init() { q.more = sync.NewCond(&q.mu) }

func (q *pageQueue) close() {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	q.more.Broadcast()
}

// ReadPage reads a page of a mailbox; the answer goes to Config.Page. It implements edge.Mailbox.
func (s *Server) ReadPage(r protocol.PageRequest) {
	s.pages.mu.Lock()
	s.pages.pages = append(s.pages.pages, r)
	s.pages.mu.Unlock()
	s.pages.more.Signal()
}

// ReadReceipts reads the receipts that changed at or after a time and pushes them. It implements edge.Mailbox.
func (s *Server) ReadReceipts(r protocol.ReceiptsRequest) {
	s.pages.mu.Lock()
	s.pages.receipts = append(s.pages.receipts, r)
	s.pages.mu.Unlock()
	s.pages.more.Signal()
}

// next takes the next work; at most one of the results is set, none when the queue is closed, or empty and not to wait.
func (q *pageQueue) next(wait bool) (page *protocol.PageRequest, receipts *protocol.ReceiptsRequest) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for wait && !q.closed && len(q.pages) == 0 && len(q.receipts) == 0 {
		q.more.Wait()
	}
	switch {
	case q.closed:
		return nil, nil
	case len(q.receipts) > 0:
		r := q.receipts[0]
		q.receipts = q.receipts[1:]
		return nil, &r
	case len(q.pages) > 0:
		r := q.pages[0]
		q.pages = q.pages[1:]
		return &r, nil
	}
	return nil, nil
}

func (s *Server) readMailboxes() {
	for s.readMailbox(true) {
	}
}

// StepMailbox does one reading that ReadPage or ReadReceipts asked for, and reports whether there was one. It is for a caller
// that drives the Server itself instead of Start, see Step.
func (s *Server) StepMailbox() bool { return s.readMailbox(false) }

func (s *Server) readMailbox(wait bool) bool {
	page, receipts := s.pages.next(wait)
	switch {
	case page != nil:
		s.cfg.Page(s.page(page))
	case receipts != nil:
		s.pushReceipts(receipts)
	default:
		return false
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

func (s *Server) pushReceipts(r *protocol.ReceiptsRequest) {
	var batch []protocol.ReceiptPush
	err := s.cfg.Store.ReceiptsSince(r.User, r.SinceMillis, func(row ReceiptRow) bool {
		if row.Delivered.Position == 0 {
			return true // acknowledged beyond a hole only
		}
		batch = append(batch, row.push(r.Session))
		if len(batch) == receiptsBatch {
			s.cfg.Pusher.Receipts(batch)
			batch = batch[:0]
		}
		return true
	})
	if err != nil {
		// The client asks again from the same time when it next connects.
		s.cfg.Logger.Error("receipts not read", "error", err)
	}
	if len(batch) > 0 {
		s.cfg.Pusher.Receipts(batch)
	}
}
