package client

import (
	"time"

	"millrace/protocol"
)

// Limits of what a client remembers of the messages it has acknowledged.
const (
	// MaxShownInMemory is how many ids a client without a state file remembers.
	MaxShownInMemory = 65_536
	// MaxShownOnDisk is how many a state file keeps: about 20 MB of file and 50 MB of memory when full.
	MaxShownOnDisk = 1 << 20

	// shownDays is how long a state file keeps an id: a mailbox row lives no longer than a year, and one day
	// covers the hour at which it goes.
	shownDays = 366

	millisPerDay = 24 * 60 * 60 * 1000
)

// shownSet is the set of message ids that the application has acknowledged: the filter that makes a second push
// of a message invisible. The oldest ids leave when it is full or, if they carry a day, after a year.
type shownSet struct {
	limit int
	known map[protocol.MessageID]struct{}
	order []shownID // a ring once it has grown to limit, oldest at head
	head  int
}

type shownID struct {
	id  protocol.MessageID
	day uint32 // of the message, days since 1970
}

// shownOf dates an id by the server's clock, which ends the life of a mailbox row. This machine's may be wrong by decades. It
// counts only for a message that the application has put together from an ID alone.
func shownOf(m Message, now time.Time) shownID {
	ms := now.UnixMilli()
	if m.Position != 0 {
		ms = m.Time().UnixMilli()
	}
	return shownID{m.ID, uint32(max(0, ms) / millisPerDay)}
}

func newShownSet(limit int) *shownSet {
	return &shownSet{limit: limit, known: make(map[protocol.MessageID]struct{})}
}

func (s *shownSet) has(id protocol.MessageID) bool {
	_, ok := s.known[id]
	return ok
}

func (s *shownSet) len() int { return len(s.known) }

// add remembers an id and reports whether it is new.
func (s *shownSet) add(e shownID) bool {
	if s.has(e.id) {
		return false
	}
	s.known[e.id] = struct{}{}
	if len(s.order) < s.limit {
		s.order = append(s.order, e)
		return true
	}
	delete(s.known, s.order[s.head].id)
	s.order[s.head] = e
	s.head = (s.head + 1) % s.limit
	return true
}

// forget drops the ids that are older than shownDays now, and as much older than the newest: a clock that is far ahead must not
// make a client show everything again.
func (s *shownSet) forget(now time.Time) {
	newest := uint32(0)
	s.each(func(e shownID) { newest = max(newest, e.day) })
	today := min(int64(newest), now.UnixMilli()/millisPerDay)
	kept := make([]shownID, 0, len(s.order))
	s.each(func(e shownID) {
		if int64(e.day) < today-shownDays {
			delete(s.known, e.id)
			return
		}
		kept = append(kept, e)
	})
	s.order, s.head = kept, 0
}

// each calls yield for every id, the oldest first.
func (s *shownSet) each(yield func(shownID)) {
	for i := range s.order {
		yield(s.order[(s.head+i)%len(s.order)])
	}
}
