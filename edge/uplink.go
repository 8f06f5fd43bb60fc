package edge

import "millrace/protocol"

// This file hands sends over to the Publisher and takes its answers back. uplink_state.go decides.

// send handles one send_message of an open connection.
func (l *loop) send(c *conn, f *protocol.Frame) {
	l.m.sends++
	if f.Seq == 0 { // names no send
		l.badFrame(c, 0, protocol.CodeBadRequest, "message_id_by_client starts at 1")
		return
	}
	if r := protocol.CheckSend(f); r.Code != protocol.OK {
		if c.work != nil && c.work.upActive {
			c.work.up.Ended(f.Seq)
		}
		l.refuse(c, f.Seq, r, 0)
		return
	}
	up := l.uplink(c)
	switch verdict, r, resendFrom := l.offerRated(c.work, f.Seq); verdict {
	case Ignore:
		l.m.retries++
	case Refuse:
		l.refuse(c, f.Seq, r, resendFrom)
	case Flood:
		l.fail(c, protocol.CodeFlooding, protocol.CloseFlooding, closeFlooding)
	case BlockUsed:
		// The number stays open: the client sends it again on its next connection.
		r = protocol.Refusal{Code: protocol.CodeShuttingDown, RetryAfterMs: 1}
		l.refuse(c, f.Seq, r, up.Refused(f.Seq, r, l.nowMs))
		l.leave(c, protocol.CloseBlockUsed, 0)
	case Publish:
		l.publish(c, up, f)
	}
}

func (l *loop) publish(c *conn, up *Uplink, f *protocol.Frame) {
	if c.has(flagLeaving) {
		r := protocol.Refusal{Code: protocol.CodeShuttingDown, RetryAfterMs: max(1, l.goAwayMs())}
		l.refuse(c, f.Seq, r, up.Refused(f.Seq, r, l.nowMs))
		return
	}
	l.server.crash("after_parse")
	s := &l.submission
	s.From = l.session(c)
	s.User, s.Device = l.names.get(c.names)
	s.Epoch, s.Seq, s.Resend = c.epoch, f.Seq, up.Resend(f.Seq)
	s.Receiver, s.Content = f.Receiver, f.Content
	if s.Resend {
		l.m.resends++
	}
	r := l.offer(c, s)
	*s = protocol.Submission{}
	if r.Code != protocol.OK {
		l.refuse(c, f.Seq, r, up.Refused(f.Seq, r, l.nowMs))
		return
	}
	up.Handed(f.Seq)
}

// offer hands a send to the Publisher, unless an earlier one to the same receiver found the mailbox full.
func (l *loop) offer(c *conn, s *protocol.Submission) (r protocol.Refusal) {
	full := &c.work.full
	if !s.Resend && full.Refuses(s.Receiver, s.Seq) {
		r.Code = protocol.CodeMailboxFull
	} else {
		r = l.server.cfg.Publisher.Publish(s)
	}
	if r.Code == protocol.CodeMailboxFull {
		full.Refused(s.Receiver, s.Seq)
	}
	return r
}

// answer tells a client what became of a send.
func (l *loop) answer(a *protocol.Answer) {
	c := l.slots.find(a.To.Conn)
	if c == nil || c.state != stateOpen || c.work == nil || !c.work.upActive {
		l.m.drops[dropAnswerGone]++
		return
	}
	resendFrom, ok := c.work.up.Answer(a.Seq, a.Refusal, l.nowMs)
	if !ok {
		l.m.drops[dropAnswerUnknown]++
		return
	}
	if a.Code != protocol.OK {
		l.refuse(c, a.Seq, a.Refusal, resendFrom)
	} else {
		f := &l.reply
		f.Reset()
		f.Kind = protocol.KindReceived
		f.Seq, f.ID, f.Position, f.Timestamp = a.Seq, a.ID, a.Position, a.Millis
		l.emit(c, f)
	}
	l.leaveIfAnswered(c)
}
