package backend

import "strconv"

// Metrics gives the present figures. It may be called from any goroutine.
func (s *Server) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	violations := Violations{PromiseRefusal: s.unsound.Load()}
	for _, sh := range s.shards {
		sh.report.Lock()
		st, inFlight := sh.stats, sh.inFlight
		sh.report.Unlock()
		for p, n := range st.Violations {
			violations[p] += n
		}
		shard := strconv.Itoa(sh.number)
		count := func(name, help string, n uint64, labels ...string) {
			emit("millrace_backend_"+name, help, true, float64(n), append(labels, "shard", shard)...)
		}
		count("records_taken_total", "New records that an owner took.", st.Taken)
		count("records_duplicate_total", "Records dropped because their send was finished or in flight.", st.Duplicates)
		count("pushes_total", "Messages pushed to live sessions.", st.Pushed)
		count("acknowledgements_total", "Messages that a device acknowledged.", st.Acknowledged)
		count("outcomes_ignored_total", "Outcomes that matched no delivery any more.", st.Ignored)
		count("notices_total", "Notices sent to sessions after a mailbox write.", st.Notices)
		count("receipts_total", "Receipts pushed to senders.", st.Receipts)
		count("commits_total", "Commits of delivery progress.", st.Commits)
		count("read_errors_total", "Reads of the store that failed.", st.ReadErrors)
		for r, n := range st.Mailboxed {
			count("mailbox_writes_total", "Messages that went to a mailbox, by reason.", n, "reason", MailboxReason(r).String())
		}
		emit("millrace_backend_in_flight", "Records that are not finished and committed.", false, float64(inFlight), "shard", shard)
	}
	for p := PromiseOnce; p < promises; p++ {
		emit("millrace_backend_invariant_violations_total", "Must be 0: what has broken a promise or would have.", true,
			float64(violations[p]), "promise", p.String())
	}
	emit("millrace_backend_full_mailboxes", "Users with a mailbox at its limit.", false, float64(s.full.users.Load()))
}
