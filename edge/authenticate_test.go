package edge

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
	"millrace/protocol/token"
)

// upgrading accepts a connection whose upgrade has a token, and further bytes.
func (b *bench) upgrading(sub, token, more string) *fakeSocket {
	b.t.Helper()
	s := b.accept()
	text := upgradeText(sub, "Authorization: Bearer "+token+"\r\n")
	s.receive(append([]byte(strings.Replace(text, "/ws", "/ws?device=desk", 1)), more...))
	return s
}

// connecting accepts a connection that has sent connect.
func (b *bench) connecting(sub, token string) *fakeSocket {
	b.t.Helper()
	s := b.accept()
	s.receive([]byte(upgradeText(sub, "")))
	s.out = nil
	s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(token), Device: []byte("phone"), Epoch: 77, ReceiptsAfter: 100_000})
	return s
}

func (s *fakeSocket) renew(token string) {
	s.bench.t.Helper()
	s.frame(&protocol.Frame{Kind: protocol.KindRenewToken, Token: []byte(token)})
}

// response takes an HTTP response from what was sent.
func (s *fakeSocket) response() string {
	s.bench.t.Helper()
	head, rest, ok := bytes.Cut(s.out, []byte("\r\n\r\n"))
	if !ok {
		s.bench.t.Fatalf("no HTTP response in %q", s.out)
	}
	s.out = rest
	return string(head)
}

func (s *fakeSocket) wantsStatus(status int, parts ...string) {
	s.bench.t.Helper()
	head := s.response()
	for _, part := range append(parts, fmt.Sprintf("HTTP/1.1 %d ", status)) {
		if !strings.Contains(head, part) {
			s.bench.t.Fatalf("%q is missing in %q", part, head)
		}
	}
}

// wantsAuthentications compares what was counted, by outcome.
func (b *bench) wantsAuthentications(want string) {
	b.t.Helper()
	var got []string
	for i, n := range b.l.m.authentications {
		if n > 0 {
			got = append(got, fmt.Sprintf("%s %d", authOutcomeNames[i], n))
		}
	}
	if s := strings.Join(got, ", "); s != want {
		b.t.Fatalf("counted %q, want %q", s, want)
	}
}

func TestSlowConnect(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		s := b.connecting(sub, "slow alice")
		s.wants("")
		s.receive(final(ws.OpPing, "p"))
		s.wants(`a "p"`)
		s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("bob")})
		s.wants("error already_connected")
		if len(b.asked) != 0 {
			t.Fatalf("registered before the token was verified: %+v", b.asked)
		}
		b.verify()
		if r := b.asked[0]; r.User != "alice" || r.Device != "phone" || r.Epoch != 77 || r.Session != b.l.session(s.conn) {
			t.Fatalf("registration %+v", r)
		}
		b.s.Registered(protocol.Registered{To: b.asked[0].Session})
		b.l.drainInbox()
		s.wants("connected 1")
		if b.replays[0].After.Millis != 40_000 {
			t.Fatalf("receipts from %d", b.replays[0].After.Millis)
		}
		b.wantsAuthentications("ok 1")
		b.live(s)
		b.pass(3 * time.Second)
		if s.conn.work != nil || s.conn.flags&^(flagJSON|flagRegistered) != 0 {
			t.Fatalf("left behind: work %+v, flags %b", s.conn.work, s.conn.flags)
		}
	})
}

// TestOtherFramesWhileVerifying: §3 of the protocol allows none before connected, and the token's answer then comes too late.
func TestOtherFramesWhileVerifying(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		for _, f := range []*protocol.Frame{
			sendFrame(1, "x"),
			{Kind: protocol.KindAcknowledge, IDs: []protocol.MessageID{testID(1)}},
			{Kind: protocol.KindRenewToken, Token: []byte("slow alice")},
		} {
			b := newBench(t, nil)
			s := b.connecting(sub, "slow alice")
			s.frame(f)
			s.wants("error not_connected; close 4502")
			b.verify()
			s.wants("")
			if len(b.asked) != 0 || s.conn.state != stateClosing {
				t.Fatalf("asked %+v, state %d", b.asked, s.conn.state)
			}
		}
	})
}

// TestTokenOutcomes: what clients hear does not depend on where a token was verified.
func TestTokenOutcomes(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		for _, tt := range []struct{ token, connect, renew, counted string }{
			{"b@d user", "error unauthorized; close 4501", "error unauthorized", "invalid"},
			{"expired", "error token_expired; close 4401", "error token_expired", "expired"},
			{"unavailable", "error internal retry; close 1013", "error internal retry", "unavailable"},
		} {
			for _, how := range []string{"", "slow "} {
				b := newBench(t, nil)
				s := b.connecting(sub, how+tt.token)
				b.verify()
				s.wants(tt.connect)
				if len(b.asked) != 0 || s.closed || s.conn.reason == 0 {
					t.Fatalf("%s: asked %v, closed %v, reason %d", tt.token, b.asked, s.closed, s.conn.reason)
				}

				u := b.upgrading(sub, how+tt.token, "")
				b.verify()
				if tt.counted == "unavailable" {
					u.wantsStatus(503, "\r\nRetry-After: ")
				} else {
					u.wantsStatus(401, "\r\nWWW-Authenticate: Bearer")
				}

				a := b.open(sub, "alice", "phone")
				b.live(a)
				a.renew(how + tt.token)
				b.verify()
				a.wants(tt.renew)
				if a.conn.state != stateOpen {
					t.Fatalf("%s: a refused renewal ends the session", tt.token)
				}
				want := map[string]uint64{"ok": 1, tt.counted: 3}
				for i, n := range b.l.m.authentications {
					if name := authOutcomeNames[i]; n != want[name] {
						t.Fatalf("%s: %d counted as %s", how+tt.token, n, name)
					}
				}
			}
		}
	})
}

// TestGoneWhileVerifying: its slot is free at once, and the answer does not reach who has it next.
func TestGoneWhileVerifying(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		first := b.connecting(sub, "slow alice")
		first.close()
		second := b.upgrading(sub, "slow bob", "early")
		second.close()
		if b.s.connections.Load() != 0 {
			t.Fatalf("%d connections", b.s.connections.Load())
		}
		third := b.connecting(sub, "slow carol")
		if third.conn != first.conn {
			t.Fatal("the slot was not used again")
		}
		b.verify()
		if len(b.asked) != 1 || b.asked[0].User != "carol" || b.asked[0].Session != b.l.session(third.conn) {
			t.Fatalf("registered %+v", b.asked)
		}
		b.wantsAuthentications("ok 1")
	})
}

func TestSlowUpgrade(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		early := string(final(ws.OpPing, "a"))
		t.Run("accepted", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.upgrading(sub, "slow alice", early)
			for _, c := range final(ws.OpPing, "b") { // bytes that trickle in are kept, too
				s.receive([]byte{c})
			}
			if len(s.out) != 0 || len(b.asked) != 0 {
				t.Fatalf("answered %q before the token was verified, registered %v", s.out, b.asked)
			}
			b.verify()
			s.wantsStatus(101, "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: "+sub)
			s.wants(`a "a"; a "b"`)
			if r := b.asked[0]; r.User != "alice" || r.Device != "desk" || r.Epoch == 0 || b.l.m.handshakes[handshakeOK] != 1 {
				t.Fatalf("registration %+v", r)
			}
			s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
			s.wants("error already_connected")
			b.s.Registered(protocol.Registered{To: b.asked[0].Session})
			b.l.drainInbox()
			s.wants("connected 1")
		})
		t.Run("byte by byte", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.accept()
			for _, c := range []byte(upgradeText(sub, "Authorization: Bearer slow alice\r\n") + early) {
				s.receive([]byte{c})
			}
			b.verify()
			s.wantsStatus(101)
			s.wants(`a "a"`)
			if r := b.asked[0]; r.Device != protocol.DefaultDevice {
				t.Fatalf("registration %+v", r)
			}
		})
		t.Run("a frame that is not allowed", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.upgrading(sub, "slow alice", string(encode(sub == protocol.SubprotocolJSON, sendFrame(1, "x"))))
			b.verify()
			s.wantsStatus(101)
			s.wants("error not_connected; close 4502")
		})
		t.Run("refused", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.upgrading(sub, "slow b@d user", early)
			b.verify()
			s.wantsStatus(401, "Bearer")
			if len(b.asked) != 0 || s.conn.work == nil || s.conn.work.early != nil {
				t.Fatalf("registered %v, kept %+v", b.asked, s.conn.work)
			}
			b.pass(3 * time.Second)
			if !s.closed {
				t.Fatal("not closed")
			}
		})
		t.Run("too much before the answer", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.upgrading(sub, "slow alice", strings.Repeat("x", maxEarlyBytes))
			if len(s.out) != 0 {
				t.Fatalf("answered %q", s.out)
			}
			s.receive([]byte{'x'})
			s.wantsStatus(400)
			b.verify()
			s.receive([]byte("more"))
			if len(b.asked) != 0 || !strings.HasPrefix(string(s.out), "wait ") {
				t.Fatalf("registered %v, sent %q", b.asked, s.out)
			}
			s.close()
			if b.l.slots.at(0).work != nil || b.s.connections.Load() != 0 {
				t.Fatal("something is kept")
			}
		})
		t.Run("going away meanwhile", func(t *testing.T) {
			b := newBench(t, nil)
			s := b.upgrading(sub, "slow alice", early)
			b.s.draining.Store(true)
			b.l.drainInbox()
			if len(s.out) != 0 {
				t.Fatalf("answered %q", s.out)
			}
			b.verify()
			s.wantsStatus(503, "Retry-After: ")
			if len(b.asked) != 0 {
				t.Fatalf("registered %v", b.asked)
			}
		})
	})
}

func TestGoingAwayWhileConnectIsVerified(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		s := b.connecting(sub, "slow alice")
		b.s.draining.Store(true)
		b.l.drainInbox()
		s.wants("go_away; close 1012")
		b.verify()
		if len(b.asked) != 0 {
			t.Fatalf("registered %v", b.asked)
		}
	})
}

// TestVerifyDeadline: the time to authenticate covers the verification.
func TestVerifyDeadline(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		verified := 0
		b := newBench(t, func(c *Config) { c.Token = countingTokens{slow: &verified} })
		s := b.accept()
		s.receive([]byte(upgradeText(sub, "")))
		s.out = nil
		b.pass(3 * time.Second)
		s.frame(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("slow alice")})
		u := b.upgrading(sub, "slow alice", "")
		b.pass(1900 * time.Millisecond)
		s.wants("")
		b.pass(200 * time.Millisecond)
		s.wants("error overloaded retry; close 1013")
		b.pass(2800 * time.Millisecond)
		if len(u.out) != 0 {
			t.Fatalf("answered %q", u.out)
		}
		b.pass(200 * time.Millisecond)
		u.wantsStatus(503, "Retry-After: ")
		b.verify()
		if verified != 0 || len(b.asked) != 0 {
			t.Fatalf("%d tokens were verified for nobody", verified)
		}
		b.wantsAuthentications("overloaded 2")
		b.pass(3 * time.Second)
		if b.s.connections.Load() != 0 {
			t.Fatalf("%d connections", b.s.connections.Load())
		}
	})
}

// countingTokens counts what is verified.
type countingTokens struct {
	stubTokens
	fast, slow *int
}

func (c countingTokens) VerifyFast(t []byte, now time.Time) (token.Claims, error) {
	if c.fast != nil {
		*c.fast++
	}
	return c.stubTokens.VerifyFast(t, now)
}

func (c countingTokens) Verify(t []byte, now time.Time) (token.Claims, error) {
	*c.slow++
	return c.stubTokens.Verify(t, now)
}

func TestTooManyTokensWait(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		b.s.verifiers.share = 1
		a := b.open(sub, fmt.Sprintf("alice until %d", b.now.Unix()+20), "phone")
		b.live(a)
		b.pass(time.Second)
		a.wants("renew 19900")

		first := b.connecting(sub, "slow bob")
		first.wants("")
		b.connecting(sub, "slow carol").wants("error overloaded retry; close 1013")
		b.upgrading(sub, "slow carol", "").wantsStatus(503, "Retry-After: ")
		a.renew("slow alice")
		a.wants("error overloaded retry")
		b.wantsAuthentications("ok 1, overloaded 3")

		b.verify()
		if len(b.asked) != 2 || b.asked[1].User != "bob" {
			t.Fatalf("registered %+v", b.asked)
		}
		// The server asks again when it has told the client to come again.
		b.pass(900 * time.Millisecond)
		a.wants("")
		b.pass(5 * time.Second)
		if got := a.read(); !strings.HasPrefix(got, "renew ") || strings.Contains(got, ";") {
			t.Fatalf("got %q", got)
		}
		a.renew("slow alice")
		b.verify()
		a.wants("renewed")
		b.pass(13 * time.Second)
		if a.conn.state != stateOpen {
			t.Fatal("the old token still counts")
		}
	})
}

func TestSlowRenew(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		a := b.open(sub, fmt.Sprintf("alice until %d", b.now.Unix()+10), "phone")
		session := b.live(a)
		b.pass(time.Second)
		a.wants("renew 9900")
		a.renew("slow alice")
		// The session goes on meanwhile.
		a.frame(sendFrame(1, "hi"))
		b.s.Answer([]protocol.Answer{{To: session, Seq: 1}})
		b.l.drainInbox()
		a.wants("received 1")
		b.pass(2 * time.Second)
		a.renew("alice")
		a.wants("error rate_limited retry") // one at a time
		b.verify()
		a.wants("renewed")
		b.pass(20 * time.Second)
		if a.conn.state != stateOpen || a.conn.has(flagRenewing) {
			t.Fatalf("state %d, flags %b", a.conn.state, a.conn.flags)
		}
		a.read()

		a.renew("slow bob")
		b.verify()
		a.wants("error unauthorized") // another user's
		b.wantsAuthentications("ok 2, invalid 1")

		b.pass(time.Second)
		a.renew("slow alice")
		b.s.Replace(session)
		b.verify()
		a.wants("error session_replaced; close 4500")
		b.wantsAuthentications("ok 2, invalid 1")
	})
}

// TestExpiresWhileRenewing: a session does not outlive its token because another one is being verified.
func TestExpiresWhileRenewing(t *testing.T) {
	b := newBench(t, nil)
	a := b.open(protocol.SubprotocolBinary, fmt.Sprintf("alice until %d", b.now.Unix()+3), "phone")
	b.live(a)
	b.pass(time.Second)
	a.wants("renew 2900")
	a.renew("slow alice")
	b.pass(3 * time.Second)
	a.wants("error token_expired; close 4401")
	b.verify()
	a.wants("")
}

// TestRenewFlood: a message full of renewals costs one verification, and a bounded answer.
func TestRenewFlood(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		looked := 0
		b := newBench(t, func(c *Config) { c.Token = countingTokens{fast: &looked, slow: new(int)} })
		a := b.open(sub, "alice", "phone")
		b.live(a)
		a.read()
		looked = 0
		list := make([]*protocol.Frame, 200)
		for i := range list {
			list[i] = &protocol.Frame{Kind: protocol.KindRenewToken, Token: []byte("alice")}
		}
		for range 5 {
			a.receive(encode(a.conn.text(), list...))
			got := a.read()
			if strings.Count(got, "renewed") != 1 || strings.Count(got, "error rate_limited retry") != maxBadFrames {
				t.Fatalf("got %s", got)
			}
			b.pass(time.Second)
		}
		if looked != 5 || a.conn.state != stateOpen {
			t.Fatalf("%d verifications, state %d", looked, a.conn.state)
		}
		a.renew("alice")
		a.wants("renewed")
		b.pass(800 * time.Millisecond)
		a.renew("alice")
		a.wants("error rate_limited retry")
		b.pass(200 * time.Millisecond)
		a.renew("alice")
		a.wants("renewed")
	})
}

// TestPanicInVerifier: who sent the token may try again, and the next one is verified.
func TestPanicInVerifier(t *testing.T) {
	var log bytes.Buffer
	b := newBench(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	s, other := b.connecting(protocol.SubprotocolBinary, "slow panic"), b.connecting(protocol.SubprotocolBinary, "slow bob")
	b.verify()
	s.wants("error overloaded retry; close 1013")
	if len(b.asked) != 1 || b.asked[0].Session != b.l.session(other.conn) {
		t.Fatalf("registered %+v", b.asked)
	}
	if _, panics := b.s.verifiers.size(); panics != 1 || strings.Count(log.String(), "panic") == 0 || strings.Contains(log.String(), "slow") {
		t.Fatalf("%d panics, log %q", panics, log.String())
	}
}

func TestDisconnectByOperator(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		b := newBench(t, nil)
		open := b.open(sub, "alice", "phone")
		session := b.live(open)
		b.s.Push([]protocol.Push{{To: session, Message: testMessage(1, "alice", "x")}})
		b.l.drainInbox()
		open.out = nil
		b.s.Disconnect(session)
		b.l.drainInbox()
		open.wants("error unauthorized; close 4501")
		if fmt.Sprint(b.gone) != "[alice/phone]" || len(b.settled) != 1 || b.settled[0].Kind != protocol.Lost || open.conn.reason != closeRevoked {
			t.Fatalf("unregistered %v, settled %+v, reason %d", b.gone, b.settled, open.conn.reason)
		}

		// One that is bound but has not heard of it.
		registering := b.connecting(sub, "alice")
		b.s.Disconnect(b.l.session(registering.conn))
		b.s.Registered(protocol.Registered{To: b.l.session(registering.conn)})
		b.l.drainInbox()
		registering.wants("error unauthorized; close 4501")
		if fmt.Sprint(b.gone) != "[alice/phone alice/phone]" {
			t.Fatalf("unregistered %v", b.gone)
		}
		b.pass(3 * time.Second)
		b.s.Disconnect(session) // is gone
		b.l.drainInbox()
		if b.s.connections.Load() != 0 || b.l.m.closes[closeRevoked] != 2 {
			t.Fatalf("%d connections, %d closed", b.s.connections.Load(), b.l.m.closes[closeRevoked])
		}
	})
}

// TestVerifiersTakeTurns: a loop full of new connections does not keep those of another waiting.
func TestVerifiersTakeTurns(t *testing.T) {
	b := newBench(t, func(c *Config) { c.Loops = 3 })
	v := b.s.verifiers
	var order []uint64
	v.answer = func(q *claim) { order = append(order, q.conn) }
	for i := range v.share + 1 {
		if took := v.submit(0, &claim{conn: uint64(i)}); took != (i < v.share) {
			t.Fatalf("claim %d of %d: %v", i, v.share, took)
		}
	}
	v.submit(2, &claim{conn: 1 << 20})
	v.submit(2, &claim{conn: 1 << 21})
	if n, _ := v.size(); n != v.share+2 {
		t.Fatalf("%d wait", n)
	}
	v.work()
	if len(order) != v.share+2 || fmt.Sprint(order[:5]) != "[0 1048576 1 2097152 2]" || order[len(order)-1] != uint64(v.share-1) {
		t.Fatalf("%d answered, first %v", len(order), order[:5])
	}
	for i := range 3 * v.share { // around the ring
		if !v.submit(1, &claim{conn: uint64(i)}) {
			t.Fatal("no room")
		}
		order = nil
		if v.work(); len(order) != 1 || order[0] != uint64(i) {
			t.Fatalf("answered %v, want %d", order, i)
		}
	}
	v.submit(0, &claim{})
	v.close()
	order = nil
	v.work()
	if n, _ := v.size(); n != 0 || len(order) != 0 || v.submit(0, &claim{}) {
		t.Fatal("a server that has stopped still verifies")
	}
}

// TestVerifiersAreFew: however many tokens come, the loops keep cores.
func TestVerifiersAreFew(t *testing.T) {
	b := newBench(t, nil)
	v := b.s.verifiers
	spawned := 0
	v.spawn = func() { spawned++ }
	for range minWaitingTokens {
		v.submit(0, &claim{})
	}
	if spawned != v.most || v.most < 1 || v.most > maxVerifiers {
		t.Fatalf("%d workers, of %d", spawned, v.most)
	}
}
