package backend

import (
	"bytes"
	"sync"
	"sync/atomic"

	"millrace/protocol"
)

// fullMailboxes is the set of mailboxes at their limit.
type fullMailboxes struct {
	users atomic.Int64 // with a full mailbox; usually 0, and then a send need not look

	mu   sync.RWMutex                   // guards the following field
	rows map[string]map[string]struct{} // user → devices
}

func (f *fullMailboxes) set(user, device string, full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() { f.users.Store(int64(len(f.rows))) }()
	if !full {
		delete(f.rows[user], device)
		if len(f.rows[user]) == 0 {
			delete(f.rows, user)
		}
		return
	}
	if f.rows == nil {
		f.rows = make(map[string]map[string]struct{})
	}
	if f.rows[user] == nil {
		f.rows[user] = make(map[string]struct{})
	}
	f.rows[user][device] = struct{}{}
}

func (f *fullMailboxes) has(user []byte) bool {
	if f.users.Load() == 0 {
		return false
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	return len(f.rows[string(user)]) > 0
}

// Publish makes one send durable; it implements edge.Publisher. It never blocks, copies what it keeps, and
// expects a submission that protocol.CheckSend accepts.
func (s *Server) Publish(sub *protocol.Submission) protocol.Refusal {
	// A resend may be of a message that was answered; only a new send can be refused for good.
	if !sub.Resend && s.full.has(sub.Receiver) {
		return protocol.Refusal{Code: protocol.CodeMailboxFull}
	}
	r := &Record{
		Message: protocol.Message{
			Conversation: protocol.ConversationHash(sub.User, sub.Receiver),
			Sender:       string(sub.User),
			Receiver:     string(sub.Receiver),
			Content:      bytes.Clone(sub.Content),
		},
		Device: string(sub.Device),
		Epoch:  sub.Epoch,
		Seq:    sub.Seq,
		From:   sub.From,
		Resend: sub.Resend,
	}
	r.ID = s.identity.MessageID(r.Stream(), ConversationKey(r.Sender, r.Receiver), r.Seq)
	refusal := s.cfg.Queue.Append(r)
	s.refused(refusal)
	return refusal
}

// answer passes on what the queue says to submissions.
func (s *Server) answer(batch []protocol.Answer) {
	for i := range batch {
		s.refused(batch[i].Refusal)
	}
	s.cfg.Answer(batch)
}
