package edge

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

func TestConnectSendReceiveAcknowledge(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		c := login(t, s, sub, "alice", "phone")
		session := b.live(t, "alice/phone")

		c.sendMessage(1, "hi")
		if f := c.want(protocol.KindReceived); f.Seq != 1 || f.ID != testID(1) || f.Position != 1<<11 || f.Timestamp != 1 {
			t.Fatalf("received %+v", f)
		}
		if got := b.submission(t, 0); got.user != "alice" || got.device != "phone" || got.receiver != "bob" || got.content != "hi" ||
			got.Epoch == 0 || got.Resend || got.From.Edge != 3 {
			t.Fatalf("submitted %+v", got)
		}

		s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(5, "alice", "hello")}})
		if f := c.want(protocol.KindIncoming); string(f.Content) != "hello" || f.ID != testID(5) || string(f.Sender) != "alice" {
			t.Fatalf("incoming %+v", f)
		}
		c.acknowledge(testID(5))
		if o := b.outcome(t, 0); o.Kind != protocol.Acknowledged || o.ID != testID(5) || o.user != "alice" || o.device != "phone" ||
			o.Conversation != 7 || o.Position != 5 {
			t.Fatalf("outcome %+v", o)
		}
	})
}

func TestTwoDevicesOverSockets(t *testing.T) {
	s, b := serve(t, nil)
	phone, desk := login(t, s, protocol.SubprotocolBinary, "bob", "phone"), login(t, s, protocol.SubprotocolJSON, "bob", "desk")
	toPhone, toDesk := b.live(t, "bob/phone"), b.live(t, "bob/desk")
	m := testMessage(9, "bob", "κόσμε \"\x00\"")
	s.Push([]protocol.Push{{To: toPhone, Device: "phone", Message: m}, {To: toDesk, Device: "desk", Message: m}})
	for _, c := range []*client{phone, desk} {
		if f := c.want(protocol.KindIncoming); !bytes.Equal(f.Content, m.Content) || f.ID != m.ID || f.Position != 9 {
			t.Fatalf("incoming %+v", f)
		}
		c.acknowledge(m.ID)
	}
	b.outcome(t, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.outcomes[0].device == b.outcomes[1].device {
		t.Fatalf("outcomes %+v", b.outcomes)
	}
}

// TestOnlyTheAddresseeGetsIt is P5: many connections, each message for one, and no byte of it to another.
func TestOnlyTheAddresseeGetsIt(t *testing.T) {
	s, b := serve(t, nil)
	const users, rounds = 20, 30
	var clients []*client
	var sessions []protocol.Session
	for i := range users {
		sub := []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON}[i%2]
		name := fmt.Sprintf("user%d", i)
		clients = append(clients, login(t, s, sub, name, "phone"))
		sessions = append(sessions, b.live(t, name+"/phone"))
	}
	for n := range rounds {
		var batch []protocol.Push
		for i := range users {
			name := fmt.Sprintf("user%d", i)
			batch = append(batch, protocol.Push{To: sessions[i], Device: "phone", Message: testMessage(n*users+i+1, name, "for "+name)})
		}
		s.Push(batch)
	}
	for i, c := range clients {
		for n := range rounds {
			f := c.want(protocol.KindIncoming)
			if want := fmt.Sprintf("for user%d", i); string(f.Content) != want || f.Position != uint64(n*users+i+1) {
				t.Fatalf("user%d got %q at %d", i, f.Content, f.Position)
			}
		}
	}
}

func TestDrainMailboxInOrder(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		const rows = 1500
		b.fill(rows)
		b.mu.Lock()
		b.failPages = 1
		b.mu.Unlock()
		c := login(t, s, sub, "bob", "phone")
		for n := range rows {
			f := c.want(protocol.KindIncoming)
			if f.Position != uint64(n+1) {
				t.Fatalf("row %d is at %d", n, f.Position)
			}
			c.acknowledge(f.ID)
		}
		session := b.live(t, "bob/phone")
		b.wait(t, "the mailbox to be empty", func() bool { return len(b.mailbox) == 0 })
		s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(rows+1, "bob", "live")}})
		if f := c.want(protocol.KindIncoming); f.Position != rows+1 {
			t.Fatalf("live message at %d", f.Position)
		}
	})
}

// TestDisconnectDuringDrain: whatever was written or acknowledged when the connection ends, nothing of the mailbox is lost and the next
// connection gets the rest.
func TestDisconnectDuringDrain(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		const rows = 300
		b.fill(rows)
		shown := map[protocol.MessageID]bool{}
		acknowledged := 0
		for step := 0; acknowledged < rows; step++ {
			c := login(t, s, sub, "bob", "phone")
			left := rows - acknowledged
			for range min(left, step*7%90) { // read some, acknowledge some of those, and go
				f := c.want(protocol.KindIncoming)
				shown[f.ID] = true
				if step%3 != 0 {
					id := f.ID
					c.acknowledge(id)
					acknowledged++
				}
			}
			b.wait(t, "the acknowledgements", func() bool { return len(b.mailbox) == rows-acknowledged })
			c.conn.Close()
		}
		if len(shown) != rows {
			t.Fatalf("%d of %d shown", len(shown), rows)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, o := range b.outcomes {
			if o.Kind != protocol.Acknowledged {
				t.Fatalf("a row of the mailbox became %+v", o)
			}
		}
	})
}

func TestReceiptsOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		b.mu.Lock()
		b.receipts = []protocol.ReceiptPush{{ID: testID(1), Position: 1, Seq: 9, Device: "phone", Epoch: 5, Receiver: "bob", Millis: 7},
			{ID: testID(2), Position: 2, Seq: 9, Device: "other", Epoch: 5, Receiver: "carol", Millis: 8}}
		b.mu.Unlock()
		c := dial(t, s, sub, "")
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("phone"), Epoch: 5, ReceiptsAfter: 61_000})
		if f := c.want(protocol.KindConnected); f.Epoch != 5 || f.HeartbeatSeconds != 25 || string(f.Device) != "phone" {
			t.Fatalf("connected %+v", f)
		}
		var got []string
		for len(got) < 2 {
			for _, r := range c.want(protocol.KindReceipt).Receipts {
				got = append(got, fmt.Sprintf("%s %d %d %d", r.Receiver, r.Position, r.Seq, r.Timestamp))
			}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if fmt.Sprint(got) != "[bob 1 9 7 carol 2 0 8]" || b.since[0] != 1000 {
			t.Fatalf("receipts %v since %v", got, b.since)
		}
	})
}

func TestReplacedOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		first := login(t, s, sub, "alice", "phone")
		second := login(t, s, sub, "alice", "phone")
		first.wantError(protocol.CodeSessionReplaced)
		first.wantClose(protocol.CloseSessionReplaced)
		b.live(t, "alice/phone")
		second.sendMessage(1, "still here")
		second.want(protocol.KindReceived)
	})
}

func TestRenewAndExpiryOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		t.Parallel()
		s, _ := serve(t, func(c *Config) { c.RenewSeconds = 2 })
		until := func(seconds int64) []byte {
			return fmt.Appendf(nil, "alice until %d", time.Now().Unix()+seconds)
		}
		c := dial(t, s, sub, "")
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: until(2)})
		c.want(protocol.KindConnected)
		if f := c.want(protocol.KindRenew); f.ExpiresInMs < 1 || f.ExpiresInMs > 2000 {
			t.Fatalf("renew %+v", f)
		}
		c.send(&protocol.Frame{Kind: protocol.KindRenewToken, Token: until(3)})
		c.want(protocol.KindRenewed)
		c.want(protocol.KindRenew)
		c.wantError(protocol.CodeTokenExpired)
		c.wantClose(protocol.CloseTokenExpired)
	})
}

func TestAuthenticationDeadlineOverSockets(t *testing.T) {
	t.Parallel()
	s, _ := serve(t, func(c *Config) { c.AuthenticateSeconds = 1 })
	c := dial(t, s, protocol.SubprotocolJSON, "")
	silent := dialTCP(t, s)
	c.wantError(protocol.CodeTimeout)
	c.wantClose(protocol.CloseTimeout)
	if n, err := silent.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Fatalf("read %d, %v", n, err)
	}
	eventually(t, "both to be counted", func() bool {
		return metric(s, "closes_total", "reason", "authentication_timeout") == 2 && metric(s, "connections") == 0
	})
}

func TestHeartbeatOverSockets(t *testing.T) {
	t.Parallel()
	s, b := serve(t, func(c *Config) { c.HeartbeatSeconds = 1 })
	answers := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	silent := login(t, s, protocol.SubprotocolBinary, "bob", "phone")
	session := b.live(t, "alice/phone")
	b.live(t, "bob/phone")
	done := make(chan error, 1)
	go func() {
		_, err := answers.next() // answers pings until a message comes
		done <- err
	}()
	b.wait(t, "the silent one to be gone", func() bool { _, ok := b.routes["bob/phone"]; return !ok })
	s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(1, "alice", "x")}})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if answers.last.Kind != protocol.KindIncoming {
		t.Fatalf("%+v", answers.last)
	}
	silent.wantError(protocol.CodeTimeout)
	silent.wantClose(protocol.CloseTimeout)
}

func TestBearerOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		conn := dialTCP(t, s)
		text := strings.Replace(upgradeText(sub, "Authorization: Bearer alice\r\n"), "/ws", "/ws?device=desk", 1)
		c := &client{t: t, conn: conn, r: bufio.NewReader(conn), json: sub == protocol.SubprotocolJSON}
		// Frames may follow the request at once.
		if _, err := conn.Write(append([]byte(text), final(ws.OpPing, "p")...)); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(c.r, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatal(resp, err)
		}
		if f, err := c.next(); err != nil || string(f.Text) != "pong p" {
			t.Fatalf("%+v %v", f, err)
		}
		if f := c.want(protocol.KindConnected); string(f.User) != "alice" || string(f.Device) != "desk" || f.Epoch == 0 {
			t.Fatalf("connected %+v", f)
		}
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
		c.wantError(protocol.CodeAlreadyConnected)
		b.live(t, "alice/desk")
		c.sendMessage(1, "x")
		c.want(protocol.KindReceived)
	})
}

func TestHTTPOverSockets(t *testing.T) {
	s, _ := serve(t, func(c *Config) { c.Origins = []string{"https://app.example"} })
	for _, tt := range []struct {
		request string
		status  int
		body    string
	}{
		{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 200, "<h1>millrace</h1>"},
		{"GET /favicon.ico HTTP/1.1\r\nHost: x\r\n\r\n", 404, "/ws"},
		{"POST /ws HTTP/1.1\r\nHost: x\r\n\r\n", 405, "GET"},
		{"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n", 426, "WebSocket"},
		{"GET /ws HTTP/1.1\r\n\r\n", 400, "Host"},
		{"\x16\x03\x01\x02\x00", 400, ""},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "HTTP/1.1"},
		{"GET /ws HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 100), 431, ""},
		{"GET /" + strings.Repeat("x", 60_000), 431, ""}, // more than is read: the answer arrives all the same
		{upgradeText("graphql-ws", ""), 400, "millrace.v1.json"},
		{upgradeText("", "Origin: https://evil.example\r\n"), 403, "Origin"},
		{upgradeText("", "Authorization: Bearer no such user\r\n"), 401, "unauthorized"},
		{upgradeText("", "Authorization: Bearer expired\r\n"), 401, "token_expired"},
	} {
		resp, body, conn := request(t, s, tt.request)
		if resp.StatusCode != tt.status || !strings.Contains(body, tt.body) || !resp.Close {
			t.Errorf("%.40q: %s %q", tt.request, resp.Status, body)
		}
		conn.Close()
	}
	if resp, _, _ := request(t, s, upgradeText("", "Origin: https://app.example\r\n")); resp.StatusCode != 101 {
		t.Errorf("a listed origin: %s", resp.Status)
	}
}

func TestRateLimitOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, func(c *Config) { c.Rate = RateLimit{PerSecond: 20, Burst: 5} })
		c := login(t, s, sub, "alice", "phone")
		const sends = 12
		for seq := uint64(1); seq <= sends; seq++ {
			c.sendMessage(seq, "x")
		}
		answered := map[uint64]bool{}
		outstanding := sends
		resend := uint64(0)
		for outstanding > 0 {
			f, err := c.next()
			if err != nil {
				t.Fatal(err)
			}
			outstanding--
			switch {
			case f.Kind == protocol.KindReceived:
				answered[f.Seq] = true
			case f.Kind == protocol.KindError && f.Code == protocol.CodeRateLimited && f.ResendFrom != 0 && f.RetryAfterMs > 0:
				resend = f.ResendFrom
			default:
				t.Fatalf("%+v", f)
			}
			// All have been answered or refused: again from the number that was named, as a client must.
			if outstanding == 0 && len(answered) < sends {
				time.Sleep(time.Duration(f.RetryAfterMs) * time.Millisecond)
				for seq := resend; seq <= sends; seq++ {
					c.sendMessage(seq, "x")
					outstanding++
				}
			}
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		for i := range b.submitted {
			if b.submitted[i].Seq != uint64(i+1) {
				t.Fatalf("submission %d has number %d: the order did not survive the refusals", i, b.submitted[i].Seq)
			}
		}
		if len(b.submitted) != sends {
			t.Fatalf("%d submitted", len(b.submitted))
		}
	})
}

// TestSlowReaderOverSockets: who does not read gets what is due from the mailbox, later; nobody else notices.
func TestSlowReaderOverSockets(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		c := login(t, s, sub, "bob", "phone")
		session := b.live(t, "bob/phone")
		const messages = 240
		for n := range messages {
			m := testMessage(n+1, "bob", strings.Repeat("x", 3900))
			s.Push([]protocol.Push{{To: session, Device: "phone", Message: m}})
		}
		b.wait(t, "a refusal", func() bool { return len(b.outcomes) > 0 })
		b.wait(t, "draining", func() bool { r := b.routes["bob/phone"]; return !r.live && r.session.Generation == 1 })
		other := login(t, s, sub, "alice", "phone")
		other.sendMessage(1, "x")
		other.want(protocol.KindReceived)
		// The owner writes to the mailbox what was refused; here in one go, as all refusals are in.
		b.wait(t, "every push to be decided", func() bool {
			return metric(s, "pushes_total", "source", "live")+float64(len(b.outcomes)) == messages
		})
		b.mu.Lock()
		for _, o := range b.outcomes {
			if o.Kind != protocol.Refused || o.user != "bob" || o.device != "phone" {
				t.Errorf("%+v", o)
			}
			b.mailbox = append(b.mailbox, protocol.MailboxRow{Message: testMessage(int(o.Position), "bob", strings.Repeat("x", 3900))})
		}
		b.mu.Unlock()
		s.Notify([]protocol.Session{session})
		for n := range messages {
			f := c.want(protocol.KindIncoming)
			if f.Position != uint64(n+1) || len(f.Content) != 3900 {
				t.Fatalf("message %d is at %d", n, f.Position)
			}
			c.acknowledge(f.ID)
		}
		b.live(t, "bob/phone")
	})
}

// TestConnectionLimitIsExact: whoever has authenticated keeps the place. Others make room, see TestSilentConnectionsKeepNobodyOut.
func TestConnectionLimitIsExact(t *testing.T) {
	s, _ := serve(t, func(c *Config) { c.MaxConnections = 16 })
	var kept []*client
	for i := range 16 {
		kept = append(kept, login(t, s, protocol.SubprotocolBinary, fmt.Sprint("user", i), "phone"))
	}
	if n := metric(s, "connections"); n != 16 {
		t.Fatalf("%v connections", n)
	}
	for range 5 {
		conn := dialTCP(t, s)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
			t.Fatal(resp, err)
		}
	}
	if n := metric(s, "connections"); n != 16 {
		t.Fatalf("%v connections", n)
	}
	kept[3].conn.Close()
	eventually(t, "a place", func() bool { return metric(s, "connections") == 15 })
	login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	eventually(t, "the refusals to be counted", func() bool { return metric(s, "limited_total", "limit", "connections") == 5 })
}

func TestDrainAndStop(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		// Whoever waited for a connection that says nothing would wait longer than Drain may take.
		s, b := serve(t, func(c *Config) { c.AuthenticateSeconds = 60 })
		idle := login(t, s, sub, "alice", "phone")
		b.mu.Lock()
		b.hold = true
		b.mu.Unlock()
		busy := login(t, s, sub, "bob", "phone")
		busy.sendMessage(1, "x")
		held := b.submission(t, 0)
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(context.Background(), 3*time.Second) }()
		if f := idle.want(protocol.KindGoAway); f.RetryAfterMs < 1 || f.RetryAfterMs > 3000 {
			t.Errorf("go_away %+v", f)
		}
		idle.wantClose(protocol.CloseRestart)
		busy.want(protocol.KindGoAway)
		resp, _, conn := request(t, s, upgradeText(sub, ""))
		conn.Close()
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !resp.Close {
			t.Errorf("during a drain: %s", resp.Status)
		}
		for range 4 {
			dialTCP(t, s) // says nothing; most of them come after their loop told everybody to go
		}
		busy.sendMessage(2, "x")
		if f := busy.wantError(protocol.CodeShuttingDown); f.Seq != 2 || f.ResendFrom != 2 || f.RetryAfterMs == 0 {
			t.Errorf("%+v", f)
		}
		select {
		case err := <-drained:
			t.Fatalf("drained before the answer: %v", err)
		default:
		}
		s.Answer([]protocol.Answer{answerTo(&held.Submission)})
		busy.want(protocol.KindReceived)
		busy.wantClose(protocol.CloseRestart)
		if err := <-drained; err != nil {
			t.Error(err)
		}
		b.wait(t, "the routes to be gone", func() bool { return len(b.routes) == 0 })
	})
}

func TestStopWithClients(t *testing.T) {
	s, b := serve(t, nil)
	c := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	session := b.live(t, "alice/phone")
	s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(1, "alice", "x")}})
	c.want(protocol.KindIncoming)
	ctx, cancel := context.WithTimeout(context.Background(), time.Nanosecond)
	defer cancel()
	if err := s.Drain(ctx, time.Second); err == nil {
		t.Error("a drain without time says it is done")
	}
	ctx, cancel = context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if o := b.outcome(t, 0); o.Kind != protocol.Lost || o.device != "phone" {
		t.Fatalf("%+v", o)
	}
	s.Push([]protocol.Push{{To: session, Message: testMessage(2, "alice", "x")}}) // into the void, without harm
	s.Answer([]protocol.Answer{{To: session}})
	if _, err := net.Dial("tcp", s.Addr()); err == nil {
		t.Error("it still listens")
	}
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func TestPort(t *testing.T) {
	s, _ := serve(t, func(c *Config) { c.Loops = 4 })
	host, port, err := net.SplitHostPort(s.Addr())
	if err != nil || host != "127.0.0.1" || port == "0" {
		t.Fatal(s.Addr(), err)
	}
	// All loops listen on the one port: over many connections more than one takes some.
	for range 64 {
		dialTCP(t, s)
	}
	eventually(t, "64 connections", func() bool { return metric(s, "connections") == 64 })
	s.engine.mu.RLock()
	loops := s.engine.bound
	s.engine.mu.RUnlock()
	if loops < 2 {
		t.Errorf("%d loops have connections", loops)
	}
	second := func(addr string) error {
		b := newStub()
		cfg := testConfig(b)
		cfg.Addr = addr
		other, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return other.Start()
	}
	if err := second(s.Addr()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second server on the port: %v", err)
	}
	foreign, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	if err := second(foreign.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("another program on the port: %v", err)
	}
	if err := second("192.0.2.1:0"); err == nil {
		t.Error("an address that is not ours was bound")
	}
	if err := second("no.such.host.invalid:80"); err == nil {
		t.Error("no such host, and it listens")
	}
}

// TestRestartOnThePort: connections in TIME_WAIT do not keep the next server from its port.
func TestRestartOnThePort(t *testing.T) {
	addr := "127.0.0.1:0"
	for range 3 {
		b := newStub()
		cfg := testConfig(b)
		cfg.Addr = addr
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		b.server = s
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		addr = s.Addr()
		c := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
		b.live(t, "alice/phone")
		if err := s.Alive(); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := s.Stop(ctx); err != nil { // the server closes first
			t.Fatal(err)
		}
		cancel()
		if _, err := c.next(); err == nil {
			t.Error("the connection lives on")
		}
	}
}

func TestAlive(t *testing.T) {
	block, blocked := make(chan struct{}), make(chan struct{}, 1)
	s, b := serve(t, func(c *Config) {
		c.Loops = 1
		c.CrashPoint = func(name string) {
			if name == "after_parse" {
				blocked <- struct{}{}
				<-block
			}
		}
	})
	c := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	b.live(t, "alice/phone")
	c.sendMessage(1, "x")
	<-blocked
	eventually(t, "a sweep to wait", func() bool { return s.loops[0].beat.posted.Load() != 0 })
	if err := s.loops[0].beat.alive(0, time.Now().Add(stuckAfter+time.Second)); err == nil {
		t.Error("a stuck loop counts as alive")
	}
	close(block)
	c.want(protocol.KindReceived)
	eventually(t, "the loop to run", func() bool { return s.loops[0].beat.posted.Load() == 0 })
	if err := s.Alive(); err != nil {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"address":     func(c *Config) { c.Addr = "nowhere" },
		"loops":       func(c *Config) { c.Loops = 257 },
		"connections": func(c *Config) { c.MaxConnections = 1 << 30 },
		"negative":    func(c *Config) { c.MaxConnections = -1 },
		"rate":        func(c *Config) { c.Rate.PerSecond = 1 },
		"heartbeat":   func(c *Config) { c.HeartbeatSeconds = -1 },
		"origin":      func(c *Config) { c.Origins = []string{"app.example"} },
		"publisher":   func(c *Config) { c.Publisher = nil },
		"token":       func(c *Config) { c.Token = nil },
	} {
		cfg := testConfig(newStub())
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.HasPrefix(err.Error(), "edge: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	cfg := testConfig(newStub())
	cfg.Loops, cfg.MaxConnections, cfg.Logger = 0, 0, nil
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s.cfg.Loops < 1 || s.cfg.MaxConnections < minConnections || s.cfg.HeartbeatSeconds != protocol.HeartbeatSeconds || s.cfg.Logger == nil {
		t.Errorf("%+v", s.cfg)
	}
}

// TestMetrics: names and labels are well formed, none comes twice, and what happened is counted.
func TestMetrics(t *testing.T) {
	s, b := serve(t, nil)
	c := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	b.live(t, "alice/phone")
	c.sendMessage(1, "x")
	c.want(protocol.KindReceived)
	eventually(t, "the counters to be published", func() bool { return metric(s, "sends_total") == 1 })
	seen := map[string]bool{}
	s.Metrics(func(name, help string, counter bool, value float64, labels ...string) {
		key := name + fmt.Sprint(labels)
		if seen[key] || help == "" || len(labels)%2 != 0 || counter != strings.HasSuffix(name, "_total") || !strings.HasPrefix(name, "millrace_edge_") {
			t.Errorf("%s %q counter=%v", key, help, counter)
		}
		seen[key] = true
		for _, l := range labels {
			if l == "" {
				t.Errorf("%s has an empty label", key)
			}
		}
	})
	for _, want := range []struct {
		name   string
		labels []string
	}{
		{"connects_total", nil}, {"sessions", nil}, {"handshakes_total", []string{"result", "101"}}, {"frames_total", []string{"direction", "in"}},
	} {
		if metric(s, want.name, want.labels...) < 1 {
			t.Errorf("%s %v is 0", want.name, want.labels)
		}
	}
}
