package edge

import (
	"strconv"
	"sync"

	"millrace/protocol"
)

// counters are a loop's own: plain integers that only it touches. Each sweep publishes a copy, which is what a scrape reads: at
// most 100 ms old.
type counters struct {
	bytesIn, bytesOut   uint64
	framesIn, framesOut uint64
	writes              uint64
	turns, items        uint64 // of the inbox
	connects            uint64
	sends               uint64
	retries             uint64 // a send whose answer is on the way
	resends             uint64
	pushes              uint64 // live
	drained             uint64 // from a mailbox
	pages               uint64
	notices             uint64
	acks, ignoredAcks   uint64
	receipts            uint64
	pings               uint64 // from clients
	panics              uint64
	misaddressed        uint64 // refused: P5
	unsound             uint64 // refusals: P6
	overfull            uint64 // flights: P7
	handshakes          [handshakeResults]uint64
	authentications     [authOutcomes]uint64
	refusals            [refusalCodes]uint64
	closes              [closeReasons]uint64
	drops               [dropReasons]uint64
	tlsHandshakes       [tlsResults]uint64
	limited             [limitKinds]uint64
}

// published is where a loop leaves its counters for others.
type published struct {
	mu       sync.Mutex
	counters counters
	sessions int
}

func (m *counters) publish(p *published, sessions int) {
	p.mu.Lock()
	p.counters, p.sessions = *m, sessions
	p.mu.Unlock()
}

// refusalCodes is one more than the largest code.
const refusalCodes = int(protocol.CodeInternal) + 1

func refusalIndex(c protocol.Code) int {
	if int(c) < refusalCodes {
		return int(c)
	}
	return int(protocol.CodeInternal)
}

// closeReason is why a connection ended.
type closeReason uint8

const (
	closeUnknown      closeReason = iota
	closeDisconnected             // the peer closed the socket, or the network did
	closeByClient                 // with a close frame
	closeHandshake                // the upgrade was refused
	closeAuthenticate             // not authenticated in time
	closeUnauthorized
	closeNotConnected
	closeTooManyDevices
	closeRegistration // the Registrar could not
	closeReplaced
	closeTokenExpired
	closeProtocol // RFC 6455
	closeUnsupported
	closeInvalidUTF8
	closeTooBig
	closeFrame // an incomplete frame
	closeHeartbeat
	closeSlow
	closeFlooding
	closeGoingAway
	closeUnverified // nobody could tell whether the token is good
	closeRevoked    // an operator wanted it
	closeTLS        // the peer did not keep to it, or to a limit of it
	closeLimited    // the user has too many connections, or logs in too often
	closeNoRoom     // had not authenticated when room was needed
	closePanic
	closeReasons
)

var closeReasonNames = [closeReasons]string{
	"unknown", "disconnected", "client", "handshake", "authentication_timeout", "unauthorized", "not_connected", "too_many_devices",
	"registration", "session_replaced", "token_expired", "protocol_error", "unsupported", "invalid_utf8", "too_big",
	"frame_timeout", "heartbeat", "slow", "flooding", "going_away",
	"unverified", "revoked", "tls", "limited", "no_room", "internal",
}

func violationReason(code protocol.CloseCode) closeReason {
	switch code {
	case protocol.CloseUnsupported:
		return closeUnsupported
	case protocol.CloseInvalidUTF8:
		return closeInvalidUTF8
	case protocol.CloseTooBig:
		return closeTooBig
	}
	return closeProtocol
}

// dropReason is why something was not passed on.
type dropReason uint8

const (
	dropInbox         dropReason = iota // push: the inbox of the loop is full
	dropPushGone                        // push: no such connection
	dropPushRefused                     // push: draining, another generation, or over a budget
	dropPushTwice                       // push: in flight already
	dropAnswerGone                      // answer: no such connection
	dropAnswerUnknown                   // answer: no such send
	dropPageFailed                      // page: could not be read
	dropReceipts                        // receipt: too many wait for this connection; read again later
	dropReceiptInbox                    // receipt: the inbox of the loop is full; read again later
	dropPageInbox                       // page: the inbox of the loop is full; it is asked for again
	dropOutput                          // everything: over the hard outbound limit
	dropBadFrame                        // error frame: one message held too many malformed frames
	dropReasons
)

var dropReasonNames = [dropReasons]string{
	"inbox_full", "connection_gone", "push_refused", "push_twice", "answer_connection_gone", "answer_unknown", "page_failed",
	"receipts_waiting", "receipts_inbox_full", "page_inbox_full", "outbound_full", "bad_frames",
}

// Results of a handshake.
const (
	handshakeOK = iota
	handshakePage
	handshake400
	handshake401
	handshake403
	handshake404
	handshake405
	handshake426
	handshake429
	handshake431
	handshake503
	handshakeTimeout
	handshakeResults
)

var handshakeNames = [handshakeResults]string{
	"101", "200", "400", "401", "403", "404", "405", "426", "429", "431", "503", "timeout",
}

func handshakeResult(status int) int {
	for i, name := range handshakeNames {
		if name == strconv.Itoa(status) {
			return i
		}
	}
	return handshake400
}

func (m *counters) add(o *counters) {
	m.bytesIn += o.bytesIn
	m.bytesOut += o.bytesOut
	m.framesIn += o.framesIn
	m.framesOut += o.framesOut
	m.writes += o.writes
	m.turns += o.turns
	m.items += o.items
	m.connects += o.connects
	m.sends += o.sends
	m.retries += o.retries
	m.resends += o.resends
	m.pushes += o.pushes
	m.drained += o.drained
	m.pages += o.pages
	m.notices += o.notices
	m.acks += o.acks
	m.ignoredAcks += o.ignoredAcks
	m.receipts += o.receipts
	m.pings += o.pings
	m.panics += o.panics
	m.misaddressed += o.misaddressed
	m.unsound += o.unsound
	m.overfull += o.overfull
	addAll(m.handshakes[:], o.handshakes[:])
	addAll(m.authentications[:], o.authentications[:])
	addAll(m.refusals[:], o.refusals[:])
	addAll(m.closes[:], o.closes[:])
	addAll(m.drops[:], o.drops[:])
	addAll(m.tlsHandshakes[:], o.tlsHandshakes[:])
	addAll(m.limited[:], o.limited[:])
}

func addAll(to, from []uint64) {
	for i, v := range from {
		to[i] += v
	}
}

// Metrics reports what the edge has counted since it started. From any goroutine; values are at most 100 ms old.
func (s *Server) Metrics(emit func(name, help string, counter bool, value float64, labels ...string)) {
	var m counters
	var sessions, inboxBytes int
	for i := range s.loops {
		p := &s.published[i]
		p.mu.Lock()
		m.add(&p.counters)
		sessions += p.sessions
		p.mu.Unlock()
		bytes, drops := s.loops[i].inbox.size()
		inboxBytes += bytes
		m.drops[dropInbox] += drops.pushes
		m.drops[dropPageInbox] += drops.pages
		m.drops[dropReceiptInbox] += drops.receipts
	}
	gauge := func(name, help string, v int, labels ...string) {
		emit("millrace_edge_"+name, help, false, float64(v), labels...)
	}
	gauge("connections", "Open TCP connections.", int(s.connections.Load()))
	gauge("connections_max", "Connections that are accepted at most.", s.cfg.MaxConnections)
	gauge("sessions", "Connections to which connected was sent.", sessions)
	waiting, panics := s.verifiers.size()
	m.panics += panics
	gauge("tokens_waiting", "Tokens that wait to be verified away from the event loops.", waiting)
	gauge("inbox_bytes", "Pushes, mailbox pages and receipts that wait for an event loop.", inboxBytes)

	count := func(name, help string, v uint64, labels ...string) {
		emit("millrace_edge_"+name+"_total", help, true, float64(v), labels...)
	}
	for i, v := range m.handshakes {
		count("handshakes", "Upgrade requests by HTTP status.", v, "result", handshakeNames[i])
	}
	for i, v := range m.authentications {
		count("authentications", "Tokens of upgrades, connects and renewals, by outcome.", v, "outcome", authOutcomeNames[i])
	}
	if s.tls != nil {
		m.panics += s.tls.panics.Load()
		gauge("tls_handshakes_pending", "TLS handshakes under way.", int(s.tls.pending.Load()))
		for i, v := range m.tlsHandshakes {
			count("tls_handshakes", "TLS handshakes, by version or by what became of them.", v, "result", tlsResultNames[i])
		}
	}
	count("connects", "Sessions opened.", m.connects)
	count("received_bytes", "Bytes from clients.", m.bytesIn)
	count("sent_bytes", "Bytes to clients.", m.bytesOut)
	count("frames", "Protocol frames.", m.framesIn, "direction", "in")
	count("frames", "Protocol frames.", m.framesOut, "direction", "out")
	count("writes", "Writes to sockets: frames to one connection within a turn share one.", m.writes)
	count("inbox_turns", "Turns in which a loop emptied its inbox.", m.turns)
	count("inbox_items", "Answers, pushes, notices and the like that were handled in them.", m.items)
	count("sends", "send_message frames.", m.sends)
	count("resends", "Sends that may have been made before.", m.resends)
	count("retries", "Sends ignored because their answer was on the way.", m.retries)
	count("pushes", "Messages written to connections.", m.pushes, "source", "live")
	count("pushes", "Messages written to connections.", m.drained, "source", "mailbox")
	count("pages", "Mailbox pages handled.", m.pages)
	count("notices", "Notices that turned or kept a session draining.", m.notices)
	count("acknowledgements", "Messages acknowledged by clients.", m.acks)
	count("ignored_acknowledgements", "Acknowledgements of messages that were not in flight on the connection.", m.ignoredAcks)
	count("receipts", "Receipts written to connections.", m.receipts)
	count("client_pings", "Pings from clients.", m.pings)
	count("panics", "Panics on event loops and while verifying tokens; each cost one connection.", m.panics)
	const violations = "Must be 0: what has broken a promise, or would have and was stopped."
	count("invariant_violations", violations, m.misaddressed, "promise", "P5")
	count("invariant_violations", violations, m.unsound, "promise", "P6")
	count("invariant_violations", violations, m.overfull, "promise", "P7")
	for _, code := range protocol.Codes() {
		if code != protocol.OK {
			count("refusals", "Error frames by code.", m.refusals[refusalIndex(code)], "code", code.String())
		}
	}
	for i, v := range m.closes {
		count("closes", "Connections ended, by reason.", v, "reason", closeReasonNames[i])
	}
	for i, v := range m.drops {
		count("drops", "What was not passed on, by reason.", v, "reason", dropReasonNames[i])
	}
	for i, v := range m.limited {
		count("limited", "Connections and logins refused, and connections closed, because of a limit.", v, "limit", limitNames[i])
	}
	gauge("accounts", "Addresses and users whose connections and rates are remembered.", s.limits.addresses.size(), "of", "addresses")
	gauge("accounts", "Addresses and users whose connections and rates are remembered.", s.limits.users.size(), "of", "users")
	count("strays", "Items for another edge, or for a loop that has ended.", s.strays.Load())
}
