package embedded

import (
	"sync"
	"sync/atomic"

	"millrace/backend"
	"millrace/protocol"
)

// recordOverhead is what a Record costs in memory besides its bytes, for the limits.
const recordOverhead = 160

func recordMemory(r *backend.Record) int64 { return int64(recordSize(r)) + recordOverhead }

// shard holds the durable records of one partition that Read has not taken yet. In order they are:
//
//	log (cursor, diskUntil]   │ ring │   log (last of the ring, durable], if overflow
//
// Each part may be empty. Publishing adds to the ring until it is full and from then on only
// notes the overflow; when Read has emptied the first two parts, the third becomes the first and the ring is used again. So
// nothing is left out or read twice, and memory stays bounded however far Read is behind.
type shard struct {
	// Immutable.
	maxBytes   int64
	maxRecords int
	startedMs  int64 // nothing is late by more than the time since the start

	mu        sync.Mutex // guards the following
	cursor    uint64     // position of the last record that Read took or passed over
	diskUntil uint64
	ring      []*backend.Record
	head      int // ring[:head] is taken
	ringBytes int64
	overflow  bool
	durable   uint64 // the last position that was published here
	unread    int64

	// Copies for Append, so that it takes no lock of the shard.
	unreadNow atomic.Int64
	oldestMs  atomic.Int64 // when the oldest unread record was accepted; noneUnread for none

	gone atomic.Uint64 // records that Read did not find

	// lowWater is the largest LowWater whose commit is durable.
	lowWater atomic.Uint64
}

const noneUnread = int64(1) << 62

func newShard(cfg *Config) *shard {
	return &shard{maxBytes: cfg.RingBytes, maxRecords: cfg.RingRecords}
}

// replay makes the whole log, up to the last position given before, unread. unread was counted by the caller.
func (s *shard) replay(last uint64, nowMs int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startedMs = nowMs
	s.durable = last
	if s.unread > 0 {
		s.diskUntil = last
	} else {
		s.cursor, s.diskUntil = last, last
	}
	s.tell()
}

// publish adds durable records, in position order.
func (s *shard) publish(records []*backend.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range records {
		size := recordMemory(r)
		if !s.overflow && (len(s.ring)-s.head >= s.maxRecords || s.ringBytes+size > s.maxBytes) {
			s.overflow = true
		}
		if !s.overflow {
			s.ring = append(s.ring, r)
			s.ringBytes += size
		}
		s.durable = r.Position
	}
	s.unread += int64(len(records))
	s.tell()
}

// pending says what Read does next: read the log in (from, until], or take from the ring if from == until.
func (s *shard) pending() (from, until uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cursor >= s.diskUntil && s.head == len(s.ring) && s.overflow {
		s.diskUntil, s.overflow = s.durable, false
	}
	if s.cursor >= s.diskUntil {
		if s.head == len(s.ring) && s.unread != 0 {
			s.miscounted()
		}
		return s.cursor, s.cursor
	}
	return s.cursor, s.diskUntil
}

// miscounted corrects the count of unread records when everything was read. What was published, or counted in the log at the
// start, and did not turn up is lost.
func (s *shard) miscounted() {
	if s.unread > 0 {
		s.gone.Add(uint64(s.unread))
	}
	s.unread = 0
	s.tell()
}

// take moves records from the ring to dst until its length is max.
func (s *shard) take(dst []*backend.Record, max int) []*backend.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(max-len(dst), len(s.ring)-s.head)
	if n <= 0 {
		return dst
	}
	for _, r := range s.ring[s.head : s.head+n] {
		s.ringBytes -= recordMemory(r)
	}
	dst = append(dst, s.ring[s.head:s.head+n]...)
	clear(s.ring[s.head : s.head+n])
	s.head += n
	s.cursor = dst[len(dst)-1].Position
	s.unread -= int64(n)
	switch {
	case s.head == len(s.ring):
		s.ring, s.head = s.ring[:0], 0
	case s.head > len(s.ring)/2: // move down what is left: at most as much as was taken since the last move
		left := copy(s.ring, s.ring[s.head:])
		clear(s.ring[left:])
		s.ring, s.head = s.ring[:left], 0
	}
	s.tell()
	return dst
}

// passed records that Read took n records from the log and is done with it up to position.
func (s *shard) passed(position uint64, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cursor = max(s.cursor, position)
	s.unread -= int64(n)
	s.tell()
}

// tell renews what Append looks at. In the log, the record after the cursor is not known without reading: it
// is at least as new as the cursor, so its lag is over- and never underestimated.
func (s *shard) tell() {
	s.unreadNow.Store(s.unread)
	oldest := noneUnread
	switch {
	case s.unread <= 0:
	case s.cursor >= s.diskUntil && s.head < len(s.ring):
		oldest = max(protocol.PositionMillis(s.ring[s.head].Position), s.startedMs)
	default:
		oldest = max(protocol.PositionMillis(s.cursor), s.startedMs)
	}
	s.oldestMs.Store(oldest)
}

// lowWater follows, in the committer, up to where the records of one shard are finished.
type lowWater struct {
	low  uint64 // every record at a smaller position is finished
	last uint64 // the last record in the log
}

// appended notes a new last record. A shard without an unfinished record says nothing new while others go on:
// its low water rises with its next record instead.
func (l *lowWater) appended(position uint64) {
	if l.low > l.last || l.last == 0 {
		l.low = position
	}
	l.last = position
}

// keeps is the first position that must stay in the log for this shard; ok is false if none must.
func (l *lowWater) keeps() (position uint64, ok bool) { return l.low, l.low <= l.last && l.last != 0 }
