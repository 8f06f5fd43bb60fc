package backend

import "millrace/protocol"

// Promise is one of the promises P1–P8 of GUARANTEES.md, as far as somebody who sees one thing broken can count it. The
// tests prove the promises; the counters are for what no test has thought of, and cost a comparison.
type Promise uint8

// The promises, by number.
const (
	PromiseDurable   Promise = iota + 1 // P1
	PromiseDelivered                    // P2
	PromiseOnce                         // P3
	PromiseOrder                        // P4
	PromiseAddressee                    // P5
	PromiseRefusal                      // P6
	PromiseBounded                      // P7
	promises
)

// String is the metric label, P1 to P7.
func (p Promise) String() string { return "P" + string('0'+rune(p)) }

// Violations counts, by Promise, what has broken a promise or would have.
type Violations [promises]uint64

// redelivered looks at a record that is not above the last one taken. A queue may give a record again, which is in flight
// or finished. One that is neither was overtaken by a later one: it is in nobody's order and is not delivered.
// Only what is in memory is looked at.
func (o *Owner) redelivered(r *Record) {
	if e := o.flying[r.Position]; e != nil {
		if e.id != r.ID {
			o.stats.Violations[PromiseOrder]++ // two records at one position
		}
		return
	}
	conv := o.convs[ConversationKey(r.Sender, r.Receiver)]
	if conv == nil {
		return
	}
	if w := conv.loadedWindow(r.Stream()); w != nil && !w.done.Finished(r.Seq) && !w.inFlight(r.Seq) {
		o.stats.Violations[PromiseOrder]++
	}
}

// resent looks at a record whose send is in flight: every copy of a send has one id.
func (o *Owner) resent(w *window, r *Record) {
	if e := w.pending[r.Seq]; e != nil && e.id != r.ID {
		o.stats.Violations[PromiseOnce]++
	}
}

// entered looks at a record that was taken. Only the connection that a block was drawn for sends new numbers of it, ascending,
// and a queue keeps the order of a stream. That is known of a record that comes straight from its submission: what is read
// back from a log no longer says whether it was a resend.
func (o *Owner) entered(w *window, r *Record) {
	if len(o.flying) > o.cfg.MaxInFlight {
		o.stats.Violations[PromiseBounded]++
	}
	if r.Resend || r.From == (protocol.Session{}) {
		return
	}
	if protocol.SeqBlock(r.Seq) == protocol.SeqBlock(w.newest) && r.Seq < w.newest {
		o.stats.Violations[PromiseOrder]++
		return
	}
	w.newest = r.Seq
}

// refused looks at what a queue says to a submission: retry_after_ms stands with exactly the codes for which trying again
// can help.
func (s *Server) refused(r protocol.Refusal) {
	if (r.Code >= protocol.CodeRateLimited) != (r.RetryAfterMs != 0) {
		s.unsound.Add(1)
	}
}

// alarm logs what an owner has counted since the last step.
func (sh *shard) alarm(before, now *Violations) {
	for p := range now {
		if n := now[p] - before[p]; n > 0 {
			sh.server.cfg.Logger.Error("a promise is broken: this is a fault of the program",
				"promise", Promise(p).String(), "times", n, "shard", sh.number)
		}
	}
}
