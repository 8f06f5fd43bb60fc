package main

import (
	"errors"

	"millrace/backend"
	"millrace/protocol"
)

var errSimRead = errors.New("the read failed")

// simQueue is one log per shard. Appends become durable in order; it fails, loses what is not durable in a crash, doubles
// and redelivers.
type simQueue struct {
	sim       *sim
	pending   []*backend.Record
	logs      [][]*backend.Record
	last      []uint64
	life      uint64
	failSoon  bool
	answersAt int64                  // answers arrive in order
	failing   map[backend.Stream]int // answers outcome_unknown that have not arrived
}

func newSimQueue(s *sim) *simQueue {
	return &simQueue{sim: s, logs: make([][]*backend.Record, s.opt.Shards), last: make([]uint64, s.opt.Shards),
		failing: map[backend.Stream]int{}}
}

func (q *simQueue) append(r *backend.Record) protocol.Refusal {
	if q.sim.opt.QueueFails && !q.sim.healed && q.sim.chance(20) {
		return protocol.Refusal{Code: protocol.CodeOverloaded, RetryAfterMs: uint32(1 + q.sim.rng.IntN(500))}
	}
	if q.sim.mut == "every send gets a new message id" {
		r.ID[0] ^= byte(q.sim.rng.IntN(256))
	}
	r.AcceptedMs = q.sim.wall()
	if q.failing[r.Stream()] > 0 && q.sim.mut != "later sends survive a failed one" {
		q.unknown(r)
		return protocol.Refusal{}
	}
	if q.sim.mut == "answered before it is durable" {
		q.answer(protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Millis: q.sim.wall()})
	}
	defer func() {
		if q.failSoon && len(q.pending) > 1 && !q.sim.healed {
			q.failSoon = false
			q.fail()
		}
	}()
	if len(q.pending) == 0 {
		life := q.life
		q.sim.after(1+q.sim.rng.Int64N(15), func() { q.sync(life) })
	}
	q.pending = append(q.pending, r)
	return protocol.Refusal{}
}

func (q *simQueue) answer(a protocol.Answer) {
	if session := q.sim.session(a.To); session != nil {
		session.answer(a)
	}
}

func (q *simQueue) sync(life uint64) {
	if life != q.life {
		return
	}
	n := min(len(q.pending), 1+q.sim.rng.IntN(8))
	for _, r := range q.pending[:n] {
		q.durable(r)
		if q.sim.mut != "answered before it is durable" {
			a := protocol.Answer{To: r.From, Seq: r.Seq, ID: r.ID, Millis: q.sim.wall()}
			if !r.Resend {
				a.Position = r.Position
			}
			q.inOrder(func() { q.answer(a) })
		}
		if q.sim.opt.Doubles && q.sim.chance(8) {
			double := *r
			q.durable(&double)
		}
	}
	q.pending = q.pending[n:]
	if len(q.pending) > 0 {
		q.sim.after(q.sim.rng.Int64N(10), func() { q.sync(life) })
	}
}

func (q *simQueue) inOrder(run func()) {
	q.answersAt = max(q.answersAt, q.sim.now+q.sim.rng.Int64N(5))
	q.sim.after(q.answersAt-q.sim.now, run)
}

func (q *simQueue) durable(r *backend.Record) {
	k := q.sim.partOf(r.Conversation)
	r.Position = protocol.NextPosition(q.last[k], r.AcceptedMs)
	if q.sim.mut == "positions follow the clock alone" {
		r.Position = uint64(r.AcceptedMs)<<protocol.PositionShift | uint64(q.sim.rng.IntN(2048))
	}
	q.last[k] = max(q.last[k], r.Position)
	q.logs[k] = append(q.logs[k], r)
	q.sim.truth.durable(r)
	q.sim.logf("durable %s at %d", r.Content, r.Position)
	q.sim.shardOf(r.Conversation).wake()
}

// fail answers outcome_unknown to a stream's pending sends: a prefix of them became durable all the same.
func (q *simQueue) fail() {
	if len(q.pending) == 0 {
		return
	}
	stream := q.pending[q.sim.rng.IntN(len(q.pending))].Stream()
	lost := false
	kept := q.pending[:0:0]
	for _, r := range q.pending {
		if r.Stream() != stream {
			kept = append(kept, r)
			continue
		}
		lost = lost || q.sim.chance(2)
		if q.sim.mut == "later sends survive a failed one" {
			lost = q.sim.chance(2)
			if !lost {
				kept = append(kept, r)
				continue
			}
		}
		if !lost {
			q.durable(r)
		}
		q.unknown(r)
	}
	q.pending = kept
}

// unknown answers outcome_unknown. Until that has arrived what is handed over after it fails too.
func (q *simQueue) unknown(r *backend.Record) {
	stream := r.Stream()
	q.failing[stream]++
	a := protocol.Answer{To: r.From, Seq: r.Seq, Refusal: protocol.Refusal{Code: protocol.CodeOutcomeUnknown, RetryAfterMs: uint32(1 + q.sim.rng.IntN(300))}}
	q.inOrder(func() {
		q.failing[stream]--
		q.answer(a)
	})
}

func (q *simQueue) crash() {
	q.pending = nil
	q.life++
}

// load is nil for what was trimmed.
func (q *simQueue) load(part int, position uint64) *backend.Record {
	r := q.find(part, position)
	if position < q.sim.store.lowWater[part] {
		return nil
	}
	return r
}

func (q *simQueue) find(part int, position uint64) *backend.Record {
	for _, r := range q.logs[part] {
		if r.Position == position {
			return r
		}
	}
	return nil
}

// simReader is the queue as one owner sees it: its partitions, and how far each is read.
type simReader struct {
	owner *simOwner
	next  []int // index in the log
}

func newSimReader(o *simOwner) *simReader {
	r := &simReader{owner: o}
	s := o.shard.sim
	for part := range o.shard.parts {
		log, next := r.log(part), 0
		if s.mut == "the log is replayed from its end" {
			next = len(log)
		}
		for next < len(log) && log[next].Position < s.store.lowWater[o.shard.parts[part]] {
			next++
		}
		if s.opt.Doubles && s.mut != "the log is replayed from its end" {
			next = max(0, next-s.rng.IntN(4)) // a queue may redeliver what was acknowledged
		}
		r.next = append(r.next, next)
	}
	return r
}

func (r *simReader) log(part int) []*backend.Record {
	return r.owner.shard.sim.queue.logs[r.owner.shard.parts[part]]
}

func (r *simReader) Shards() int { return len(r.owner.shard.parts) }

func (r *simReader) Append(rec *backend.Record) protocol.Refusal {
	return r.owner.shard.sim.queue.append(rec)
}

func (r *simReader) Read(part int, dst []*backend.Record, max int) ([]*backend.Record, error) {
	s, log := r.owner.shard.sim, r.log(part)
	if s.readFails() {
		return dst, errSimRead
	}
	n := min(len(log)-r.next[part], max-len(dst))
	dst = append(dst, log[r.next[part]:r.next[part]+n]...)
	r.next[part] += n
	if s.mut == "a bit means seen" {
		for _, rec := range dst {
			k := backend.WindowKey{Conversation: conversationOf(rec), Stream: rec.Stream()}
			w := s.store.windows[k]
			w.Finish(rec.Seq)
			s.store.windows[k] = w
		}
	}
	return dst, nil
}

// load is what a store reads to write a mailbox row.
func (r *simReader) load(part int, position uint64) (*backend.Record, error) {
	s := r.owner.shard.sim
	if s.readFails() {
		return nil, errSimRead
	}
	return s.queue.load(r.owner.shard.parts[part], position), nil
}

// taken is the position up to which the owner was given records.
func (r *simReader) taken(part int) uint64 {
	if r.next[part] == 0 {
		return 0
	}
	return r.log(part)[r.next[part]-1].Position
}
