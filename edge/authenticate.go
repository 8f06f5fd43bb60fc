package edge

import (
	"bytes"
	"errors"
	"math/rand/v2"

	"millrace/protocol"
	"millrace/protocol/token"
)

// This file finds out who a client is. A token that is quickly verified is verified on the loop. Public-key arithmetic, some 75 µs for
// each token, is for the workers of verifiers.go: the connection waits in stateUpgradeToken or stateConnectToken, or goes on with the
// token it has (flagRenewing), until the loop hears of the claim in verified. A connection that is gone by then is not found.

const (
	// renewTicks is the least time between two renewals of a connection that are looked at.
	renewTicks = ticksPerSecond
	// maxEarlyBytes is what a client may send behind an upgrade request whose token is being verified: one message.
	maxEarlyBytes = protocol.MaxJSONFrameBytes
	// A client whose token could not be verified comes again after authRetryMs, and a random part of authSpreadMs.
	authRetryMs  = 1000
	authSpreadMs = 4000
)

// authOutcome is what came of a token.
type authOutcome uint8

const (
	authOK authOutcome = iota
	authExpired
	authInvalid
	authUnavailable // there are no keys, so nobody can tell
	authOverloaded  // no worker has time for it
	authOutcomes

	authSlow // to be asked of a worker; none of the outcomes
)

var authOutcomeNames = [authOutcomes]string{"ok", "expired", "invalid", "unavailable", "overloaded"}

// authRefusals is what clients hear of an outcome.
var authRefusals = [authOutcomes]struct {
	code   protocol.Code
	close  protocol.CloseCode
	reason closeReason
	status int // of an upgrade
	text   string
}{
	authExpired:     {protocol.CodeTokenExpired, protocol.CloseTokenExpired, closeUnauthorized, 401, errorText(protocol.CodeTokenExpired)},
	authInvalid:     {protocol.CodeUnauthorized, protocol.CloseUnauthorized, closeUnauthorized, 401, errorText(protocol.CodeUnauthorized)},
	authUnavailable: {protocol.CodeInternal, protocol.CloseTryAgain, closeUnverified, 503, "the server has no keys to verify the token with: try again"},
	authOverloaded:  {protocol.CodeOverloaded, protocol.CloseTryAgain, closeUnverified, 503, "the server is behind with verifying tokens: try again"},
}

// outcomeOf reads what a TokenVerifier says.
func outcomeOf(claims token.Claims, err error) authOutcome {
	switch {
	case err == nil && protocol.ValidUser(claims.User):
		return authOK
	case errors.Is(err, token.ErrSlow):
		return authSlow
	case errors.Is(err, token.ErrExpired):
		return authExpired
	case errors.Is(err, token.ErrUnavailable):
		return authUnavailable
	}
	return authInvalid
}

// claim is a token on its way to a worker and back, with what is needed to go on then. It owns what it points to.
type claim struct {
	conn   uint64 // handle
	asked  int64  // ms since the start of the server
	token  []byte
	claims token.Claims // the answer
	result authOutcome  // the answer

	request upgradeRequest // in stateUpgradeToken

	device        []byte // in stateConnectToken
	epoch         uint64
	receiptsAfter int64
}

// tryVerify verifies a token if that is quick, else the outcome is authSlow.
func (l *loop) tryVerify(t []byte) (token.Claims, authOutcome) {
	claims, err := l.server.cfg.Token.VerifyFast(t, l.now)
	return claims, outcomeOf(claims, err)
}

// ask hands a token to the workers. It is false when as many wait as may.
func (l *loop) ask(c *conn, t []byte, q *claim) bool {
	q.conn = l.session(c).Conn
	q.asked = l.nowMs
	q.token = bytes.Clone(t)
	return l.server.verifiers.submit(l.index, q)
}

// verified goes on where authenticateUpgrade, connect or renew stopped.
func (l *loop) verified(q *claim) {
	c := l.slots.find(q.conn)
	switch {
	case c == nil:
	case c.state == stateUpgradeToken:
		l.verifiedUpgrade(c, q)
	case c.state == stateConnectToken:
		l.admit(c, q.claims, q.result, q.device, q.epoch, q.receiptsAfter)
	case c.state == stateOpen && c.has(flagRenewing):
		c.flags &^= flagRenewing
		l.renewed(c, q.claims, q.result)
	}
}

// authenticateUpgrade looks at the token of an upgrade. Before it is verified nothing is answered.
func (l *loop) authenticateUpgrade(c *conn, r *upgradeRequest) {
	claims, result := l.tryVerify(r.token)
	if result == authSlow {
		q := &claim{request: upgradeRequest{key: bytes.Clone(r.key), device: bytes.Clone(r.device), json: r.json, chosen: r.chosen}}
		if l.ask(c, r.token, q) {
			c.state = stateUpgradeToken
			return
		}
		result = authOverloaded
	}
	l.admitUpgrade(c, r, claims, result)
}

// keepEarly keeps what came behind an upgrade request until it is answered.
func (l *loop) keepEarly(c *conn, data []byte) {
	if len(data) == 0 {
		return
	}
	w := l.borrow(c)
	if w.early == nil {
		w.early = inputs.Get()
	}
	if len(w.early.B)+len(data) > maxEarlyBytes {
		l.refuseUpgrade(c, httpError{400, "wait for the answer to the upgrade before sending"})
		return
	}
	w.early.B = append(w.early.B, data...)
}

func (l *loop) verifiedUpgrade(c *conn, q *claim) {
	w := l.borrow(c)
	early := w.early
	w.early = nil
	if l.server.draining.Load() {
		l.refuseUpgrade(c, goingAway)
	} else {
		l.admitUpgrade(c, &q.request, q.claims, q.result)
	}
	if early == nil {
		return
	}
	if !c.has(flagDeaf) {
		l.readFrames(c, early.B)
	}
	putBuffer(&inputs, early)
}

func (l *loop) admitUpgrade(c *conn, r *upgradeRequest, claims token.Claims, result authOutcome) {
	l.m.authentications[result]++
	if result != authOK {
		refusal := &authRefusals[result]
		l.refuseUpgrade(c, httpError{refusal.status, refusal.code.String() + ": " + refusal.text})
		return
	}
	l.upgraded(c, r)
	l.register(c, claims, r.device, 0, 0)
}

// connect authenticates a connection by its first frame.
func (l *loop) connect(c *conn, f *protocol.Frame) {
	claims, result := l.tryVerify(f.Token)
	if result == authSlow {
		q := &claim{device: bytes.Clone(f.Device), epoch: f.Epoch, receiptsAfter: f.ReceiptsAfter}
		if l.ask(c, f.Token, q) {
			c.state = stateConnectToken
			return
		}
		result = authOverloaded
	}
	l.admit(c, claims, result, f.Device, f.Epoch, f.ReceiptsAfter)
}

func (l *loop) admit(c *conn, claims token.Claims, result authOutcome, device []byte, epoch uint64, receiptsAfter int64) {
	l.m.authentications[result]++
	if result != authOK {
		l.turnAway(c, result)
		return
	}
	l.register(c, claims, device, epoch, receiptsAfter)
}

// turnAway ends a connection because of its token.
func (l *loop) turnAway(c *conn, result authOutcome) {
	refusal := &authRefusals[result]
	l.error(c, 0, refusalOf(result), 0, refusal.text)
	l.finish(c, refusal.close, refusal.code.String(), refusal.reason)
}

// refusalOf spreads out those who may come again.
func refusalOf(result authOutcome) protocol.Refusal {
	r := protocol.Refusal{Code: authRefusals[result].code}
	if result == authUnavailable || result == authOverloaded {
		r.RetryAfterMs = authRetryMs + rand.Uint32N(authSpreadMs)
	}
	return r
}

// tooLate says that the time to authenticate is over while a worker still has the token: the server is what was slow.
func (l *loop) tooLate(c *conn) {
	l.m.authentications[authOverloaded]++
	if c.state == stateConnectToken {
		l.turnAway(c, authOverloaded)
		return
	}
	l.refuseUpgrade(c, httpError{503, authRefusals[authOverloaded].text})
}

// renew takes a new token for a session that goes on. A token that is not accepted ends nothing: the old one still holds. Since each
// costs a verification, there is one at a time, and one a second.
func (l *loop) renew(c *conn, f *protocol.Frame) {
	if wait := l.renewWait(c); wait > 0 {
		// A message can hold thousands of them: what they are told is bounded.
		if l.badFrames++; l.badFrames > maxBadFrames {
			l.m.drops[dropBadFrame]++
			return
		}
		l.error(c, 0, protocol.Refusal{Code: protocol.CodeRateLimited, RetryAfterMs: wait}, 0, "one renew at a time, and one a second")
		return
	}
	c.renewAt = l.tick + renewTicks
	claims, result := l.tryVerify(f.Token)
	if result == authSlow {
		if l.ask(c, f.Token, &claim{}) {
			c.flags |= flagRenewing
			return
		}
		result = authOverloaded
	}
	l.renewed(c, claims, result)
}

// renewWait is for how many ms no renew is looked at, or 0.
func (l *loop) renewWait(c *conn) uint32 {
	if ticks := int32(c.renewAt - l.tick); c.renewAt != 0 && ticks > 0 {
		return uint32(ticks) * tickMillis
	}
	if c.has(flagRenewing) {
		return renewTicks * tickMillis
	}
	return 0
}

func (l *loop) renewed(c *conn, claims token.Claims, result authOutcome) {
	if user, _ := l.names.get(c.names); result == authOK && claims.User != string(user) {
		result = authInvalid
	}
	l.m.authentications[result]++
	if result != authOK {
		r := refusalOf(result)
		if r.RetryAfterMs > 0 { // the next sweep after that asks again
			c.renewAt = l.tick + 1 + r.RetryAfterMs/tickMillis
			c.flags &^= flagRenewAsked
		}
		l.error(c, 0, r, 0, authRefusals[result].text)
		return
	}
	if expires := l.expiry(claims); expires > c.expires {
		c.expires = expires
		c.flags &^= flagRenewAsked // one that ends no later is not asked for again
	}
	reply := &l.reply
	reply.Reset()
	reply.Kind = protocol.KindRenewed
	l.emit(c, reply)
}

// revoked ends a session because an operator wants it to.
func (l *loop) revoked(s *protocol.Session) {
	if c := l.slots.find(s.Conn); c != nil && c.active() {
		l.failText(c, protocol.CodeUnauthorized, "an operator has ended this session: only with a new token", protocol.CloseUnauthorized, closeRevoked)
	}
}
