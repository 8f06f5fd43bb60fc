package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// bubble runs a test against a fake server under a fake clock. The bubble itself fails when a goroutine outlives it.
func bubble(t *testing.T, f func(t *testing.T, s *fakeServer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newFakeServer(t)) })
}

func mustDial(t *testing.T, o Options) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := Dial(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

func mustSend(t *testing.T, c *Client, to, text string) Sent {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	sent, err := c.Send(ctx, to, text)
	if err != nil {
		t.Fatalf("send %q: %v", text, err)
	}
	return sent
}

func mustReceive(t *testing.T, c *Client) Message {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	m, err := c.Receive(ctx)
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	return m
}

func mustAcknowledge(t *testing.T, c *Client, messages ...Message) {
	t.Helper()
	if err := c.Acknowledge(t.Context(), messages...); err != nil {
		t.Fatalf("acknowledge: %v", err)
	}
}

// nothingMore checks that no message comes within a minute.
func nothingMore(t *testing.T, c *Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if m, err := c.Receive(ctx); err == nil {
		t.Fatalf("one more message: %q", m.Text)
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

// recorder collects events.
type recorder struct {
	mu   sync.Mutex
	list []Event
}

func (r *recorder) on(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, e)
}

func eventsOf[T Event](r *recorder) (list []T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.list {
		if x, ok := e.(T); ok {
			list = append(list, x)
		}
	}
	return list
}

func TestTwoPeopleTalk(t *testing.T) {
	for _, encoding := range []Encoding{Binary, JSON} {
		bubble(t, func(t *testing.T, s *fakeServer) {
			var events recorder
			o := s.options("alice")
			o.OnEvent, o.Encoding = events.on, encoding
			alice := mustDial(t, o)
			o = s.options("bob")
			o.Encoding = encoding
			bob := mustDial(t, o)
			text := "hello \x00 \u202e \"world\"\n"
			sent := mustSend(t, alice, "bob", text)
			m := mustReceive(t, bob)
			want := Message{ID: sent.ID, Position: sent.Position, Sender: "alice", Receiver: "bob", Text: text}
			if m != want || sent.Number != 1 || sent.Position == 0 {
				t.Fatalf("received %+v, sent %+v", m, sent)
			}
			mustAcknowledge(t, bob, m)
			time.Sleep(AcknowledgeDelay)
			synctest.Wait()
			receipts := eventsOf[Delivered](&events)
			if len(receipts) != 1 || receipts[0].ID != sent.ID || receipts[0].Receiver != "bob" {
				t.Fatalf("receipts %+v", receipts)
			}
			if answered := eventsOf[Answered](&events); len(answered) != 1 || answered[0].Sent != sent || answered[0].Text != text {
				t.Fatalf("answered %+v", answered)
			}
			if up := eventsOf[Connected](&events); len(up) != 1 || up[0] != (Connected{"alice", "default"}) || alice.User() != "alice" || !alice.Connected() {
				t.Fatalf("connected %+v", up)
			}
		})
	}
}

// TestP3SendsSurviveCuts cuts connections at random under load, with the client restarted in between: every send is
// accepted once, in order, and the fake server checks the rules of numbers all the while.
func TestP3SendsSurviveCuts(t *testing.T) {
	for seed := range uint64(3) {
		bubble(t, func(t *testing.T, s *fakeServer) {
			rng := rand.New(rand.NewPCG(seed, 2))
			s.onSend = func(c *fakeSession, f *protocol.Frame) bool {
				s.mu.Lock()
				n := rng.IntN(60)
				s.mu.Unlock()
				switch n {
				case 0: // cut before it is durable
					_ = c.nc.Close()
					c.cut = true
					return true
				case 1: // durable, and the answer lost
					_ = c.nc.SetWriteDeadline(time.Now())
					c.accept(f)
					_ = c.nc.Close()
					c.cut = true
					return true
				}
				return false
			}
			o := s.options("alice")
			o.StatePath = filepath.Join(t.TempDir(), "state")
			var events recorder
			o.OnEvent = events.on
			var want []string
			for life := range 4 {
				c := mustDial(t, o)
				for i := range 100 {
					text := fmt.Sprintf("%d/%d", life, i)
					if _, err := c.Queue(t.Context(), "bob", text); err != nil {
						t.Fatal(err)
					}
					want = append(want, text)
				}
				if life == 3 {
					if err := c.Drain(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if got := s.texts(); !slices.Equal(got, want) {
				t.Fatalf("accepted %d of %d: %v", len(got), len(want), got)
			}
			seen := map[uint64]bool{}
			for _, a := range eventsOf[Answered](&events) {
				if a.Err != nil || seen[a.Sent.Local] {
					t.Fatalf("answered %+v, again: %v", a, seen[a.Sent.Local])
				}
				seen[a.Sent.Local] = true
			}
			if len(seen) != len(want) {
				t.Fatalf("%d of %d sends were reported", len(seen), len(want))
			}
		})
	}
}

// TestNumberIsStoredBeforeItIsWritten: whoever is killed between the two finds the number when starting again, and
// the resend has the same bytes, which the fake server checks.
func TestNumberIsStoredBeforeItIsWritten(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		dir := t.TempDir()
		path, copied := filepath.Join(dir, "state"), filepath.Join(dir, "copy")
		s.onSend = func(c *fakeSession, f *protocol.Frame) bool {
			if c.n > 1 {
				return false
			}
			content, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(copied, content, 0o600)
			}
			if err != nil {
				t.Error(err)
			}
			return true // no answer
		}
		o := s.options("alice")
		o.StatePath = path
		c := mustDial(t, o)
		for i := range 3 {
			if _, err := c.Queue(t.Context(), "bob", fmt.Sprintf("text %d", i)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		st, items, highest, err := openState(osDisk{}, copied, "default", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, st)
		if len(items) != 3 || items[0].Seq != 1 || items[2].Seq != 3 || highest != 3 {
			t.Fatalf("when the server saw the last one, the file held %+v", items)
		}
		o.StatePath = copied
		c = mustDial(t, o)
		if err := c.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := s.texts(); !slices.Equal(got, []string{"text 0", "text 1", "text 2"}) {
			t.Fatalf("accepted %v", got)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.accepted) != 3 {
			t.Fatalf("%d numbers were used for 3 sends", len(s.accepted))
		}
	})
}

// TestP3ShownOnceAcrossRestarts: what was acknowledged is never received again, even when the server pushes it again.
func TestP3ShownOnceAcrossRestarts(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("bob")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		bob := mustDial(t, o)
		first := s.give("alice", "bob", "first")
		m := mustReceive(t, bob)
		mustAcknowledge(t, bob, m)
		s.mu.Lock()
		before := s.acked[first.ID]
		s.mailbox["bob"] = []protocol.Message{first} // the acknowledgement gets lost
		s.mu.Unlock()
		if err := bob.Close(); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		s.mailbox["bob"] = []protocol.Message{first}
		s.mu.Unlock()
		bob = mustDial(t, o)
		s.give("alice", "bob", "second")
		if m := mustReceive(t, bob); m.Text != "second" {
			t.Fatalf("received %q again", m.Text)
		}
		time.Sleep(AcknowledgeDelay)
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.acked[first.ID] <= before {
			t.Fatal("the repeated push was not acknowledged again")
		}
	})
}

// TestShownThoughTheClockWasWrong: the clock stands at 2000 when a message of 2025 is acknowledged, and is right when the client
// starts again.
func TestShownThoughTheClockWasWrong(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("bob")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		bob := mustDial(t, o)
		today := time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)
		s.position = uint64(today.UnixMilli()) << protocol.PositionShift
		s.give("alice", "bob", "hi")
		m := mustReceive(t, bob)
		mustAcknowledge(t, bob, m)
		if err := bob.Close(); err != nil {
			t.Fatal(err)
		}
		st, _, _, err := openState(osDisk{}, o.StatePath, "default", today.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		defer mustClose(t, st)
		if !st.shown.has(m.ID) {
			t.Fatal("the message would be shown again")
		}
	})
}

// TestNotAcknowledgedComesAgain: a message that the application had in hand when it died is received again.
func TestNotAcknowledgedComesAgain(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("bob")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		bob := mustDial(t, o)
		s.give("alice", "bob", "hi")
		mustReceive(t, bob)
		if err := bob.Close(); err != nil {
			t.Fatal(err)
		}
		bob = mustDial(t, o)
		if m := mustReceive(t, bob); m.Text != "hi" {
			t.Fatalf("received %q", m.Text)
		}
	})
}

// TestRepeatedPushWhileInHand: a push repeated before the application has acknowledged is not a second message, and
// the acknowledgement reaches the connection that pushed last.
func TestRepeatedPushWhileInHand(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		bob := mustDial(t, s.options("bob"))
		given := s.give("alice", "bob", "hi")
		m := mustReceive(t, bob)
		s.dropAll()
		time.Sleep(time.Second)
		nothingMore(t, bob)
		mustAcknowledge(t, bob, m)
		time.Sleep(AcknowledgeDelay)
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.acked[given.ID] != 1 || len(s.mailbox["bob"]) != 0 {
			t.Fatalf("acknowledged %d times, %d wait", s.acked[given.ID], len(s.mailbox["bob"]))
		}
	})
}

func TestAcknowledgementsTravelTogether(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		bob := mustDial(t, s.options("bob"))
		var messages []Message
		for i := range 10 {
			s.give("alice", "bob", fmt.Sprint(i))
			messages = append(messages, mustReceive(t, bob))
		}
		acked := func() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.acked) }
		for _, m := range messages {
			mustAcknowledge(t, bob, m)
		}
		time.Sleep(AcknowledgeDelay / 2)
		synctest.Wait()
		if n := acked(); n != 0 {
			t.Fatalf("%d acknowledgements left before the delay", n)
		}
		mustSend(t, bob, "alice", "company")
		if n := acked(); n != 10 {
			t.Fatalf("%d acknowledgements travelled with a send, want 10", n)
		}
		messages = messages[:0]
		for i := range MaxAcknowledgements {
			s.give("alice", "bob", fmt.Sprint("more ", i))
			messages = append(messages, mustReceive(t, bob))
		}
		mustAcknowledge(t, bob, messages...)
		synctest.Wait()
		if n := acked(); n != 10+MaxAcknowledgements {
			t.Fatalf("%d acknowledgements without waiting, want %d", n, 10+MaxAcknowledgements)
		}
	})
}

func TestRefusals(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		refusals := 0
		s.onSend = func(c *fakeSession, f *protocol.Frame) bool {
			s.mu.Lock()
			refusals++
			n := refusals
			s.mu.Unlock()
			switch {
			case string(f.Content) == "full":
				c.refuse(f.Seq, protocol.CodeMailboxFull, 0, 0)
				return true
			case n <= 2:
				c.refuse(f.Seq, protocol.CodeOverloaded, 3000, f.Seq)
				return true
			}
			return false
		}
		c := mustDial(t, s.options("alice"))
		begun := time.Now()
		sent := mustSend(t, c, "bob", "patience")
		if waited := time.Since(begun); sent.Number != 1 || waited < 6*time.Second {
			t.Fatalf("number %d after %v, want 1 after two waits of 3 s", sent.Number, waited)
		}
		_, err := c.Send(t.Context(), "bob", "full")
		var refused *RefusedError
		if !errors.As(err, &refused) || refused.Code != protocol.CodeMailboxFull || refused.Text != "scripted" {
			t.Fatalf("a final refusal: %v", err)
		}
		mustSend(t, c, "bob", "goes on")
	})
}

func TestSendChecksBeforeItQueues(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		c := mustDial(t, s.options("alice"))
		for _, bad := range []struct {
			to, text string
			code     protocol.Code
		}{
			{"bo b", "x", protocol.CodeBadReceiver},
			{"", "x", protocol.CodeBadReceiver},
			{"bob", "", protocol.CodeEmptyContent},
			{"bob", strings.Repeat("x", 1001), protocol.CodeContentTooLong},
			{"bob", "\xff", protocol.CodeBadRequest},
		} {
			_, err := c.Send(t.Context(), bad.to, bad.text)
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Code != bad.code {
				t.Errorf("send to %q of %.10q: %v, want %v", bad.to, bad.text, err, bad.code)
			}
		}
		mustSend(t, c, "bob", strings.Repeat("𝄞", 1000))
	})
}

// TestP8OfflineFirst: a client that starts without a server queues, and sends when there is one.
func TestP8OfflineFirst(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		var up atomic.Bool
		o := s.options("alice")
		o.Background = true
		o.MaxOutbox = 3
		o.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if !up.Load() {
				return nil, errors.New("connection refused")
			}
			return s.dial(ctx, network, addr)
		}
		var events recorder
		o.OnEvent = events.on
		c := mustDial(t, o)
		for i := range 3 {
			if _, err := c.Queue(t.Context(), "bob", fmt.Sprint(i)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Queue(t.Context(), "bob", "one too many"); !errors.Is(err, ErrOutboxFull) {
			t.Fatalf("over the limit: %v", err)
		}
		time.Sleep(time.Minute)
		unsent, err := c.Unsent(t.Context())
		if err != nil || len(unsent) != 3 || unsent[0].Number != 0 || unsent[2].Text != "2" {
			t.Fatalf("unsent %+v, %v", unsent, err)
		}
		if down := eventsOf[Disconnected](&events); len(down) < 10 || down[0].Final || !strings.Contains(down[0].Err.Error(), "connection refused") {
			t.Fatalf("%d disconnections, %+v", len(down), down[0])
		}
		up.Store(true)
		if err := c.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := s.texts(); !slices.Equal(got, []string{"0", "1", "2"}) {
			t.Fatalf("accepted %v", got)
		}
	})
}

func TestDialGivesUpWithItsContext(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		refused := errors.New("connection refused")
		o.NetDial = func(context.Context, string, string) (net.Conn, error) { return nil, refused }
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := Dial(ctx, o); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, refused) {
			t.Fatalf("dial: %v", err)
		}
	})
}

func TestCloseInterruptsEverything(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.Background = true
		o.NetDial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c := mustDial(t, o)
		results := make(chan error, 2)
		go func() { _, err := c.Send(t.Context(), "bob", "x"); results <- err }()
		go func() { _, err := c.Receive(t.Context()); results <- err }()
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := <-results; !errors.Is(err, ErrClosed) {
				t.Fatalf("got %v, want ErrClosed", err)
			}
		}
		if _, err := c.Queue(t.Context(), "bob", "x"); !errors.Is(err, ErrClosed) {
			t.Fatalf("queue after close: %v", err)
		}
	})
}

// TestCloseWaitsForACallbackThatCalls: while Close waits for OnEvent and the TokenSource, what they call returns.
func TestCloseWaitsForACallbackThatCalls(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		var c *Client
		called, closing := make(chan struct{}), make(chan struct{})
		results := make(chan error, 6)
		unsent := func() error { _, err := c.Unsent(context.Background()); return err }
		o := s.options("alice")
		var tokens atomic.Int64
		o.Token = func(ctx context.Context) (string, error) {
			if tokens.Add(1) > 1 { // of renew
				<-ctx.Done()
				<-closing
				results <- unsent()
			}
			return "alice", nil
		}
		o.OnEvent = func(e Event) {
			if _, ok := e.(Answered); !ok {
				return
			}
			close(called)
			<-closing
			_, err := c.Queue(context.Background(), "bob", "again")
			results <- err
			_, err = c.Send(context.Background(), "bob", "again")
			results <- err
			results <- c.Acknowledge(context.Background(), Message{ID: testID(1)})
			results <- unsent()
			results <- c.Drain(context.Background())
		}
		c = mustDial(t, o)
		s.mu.Lock()
		session := s.sessions["alice/default"]
		s.mu.Unlock()
		session.write(protocol.Frame{Kind: protocol.KindRenew, ExpiresInMs: 60_000})
		mustSend(t, c, "bob", "first")
		<-called
		closed := make(chan error, 1)
		go func() { closed <- c.Close() }()
		synctest.Wait()
		select {
		case err := <-closed:
			t.Fatalf("did not wait for OnEvent: %v", err)
		default:
		}
		close(closing)
		if err := <-closed; err != nil {
			t.Fatal(err)
		}
		for range cap(results) {
			if err := <-results; !errors.Is(err, ErrClosed) {
				t.Errorf("a call while closing: %v, want ErrClosed", err)
			}
		}
	})
}

// TestSendContext: a send that was never written is taken back; one that was written is not.
func TestSendContext(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		s.onSend = func(*fakeSession, *protocol.Frame) bool { return true }
		c := mustDial(t, s.options("alice"))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Send(ctx, "bob", "written"); !errors.Is(err, ErrUndecided) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("written: %v", err)
		}
		s.stop() // no server any more
		s.dropAll()
		synctest.Wait()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Send(ctx, "bob", "never written"); errors.Is(err, ErrUndecided) || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("never written: %v", err)
		}
		unsent, err := c.Unsent(t.Context())
		if err != nil || len(unsent) != 1 || unsent[0].Text != "written" {
			t.Fatalf("unsent %+v, %v", unsent, err)
		}
	})
}

func TestGoAwayIsHonoured(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		var events recorder
		o := s.options("alice")
		o.OnEvent = events.on
		var connected []time.Time
		s.onConnect = func(c *fakeSession, n int) bool {
			s.mu.Lock()
			connected = append(connected, time.Now())
			s.mu.Unlock()
			return false
		}
		c := mustDial(t, o)
		s.mu.Lock()
		session := s.sessions["alice/default"]
		s.mu.Unlock()
		session.write(protocol.Frame{Kind: protocol.KindGoAway, RetryAfterMs: 7000})
		synctest.Wait()
		p, err := c.Queue(t.Context(), "bob", "later")
		if err != nil {
			t.Fatal(err)
		}
		session.closeWith(protocol.CloseRestart, "restart")
		if sent, err := p.Wait(t.Context()); err != nil || sent.Number != protocol.FirstSeq(1) {
			t.Fatalf("sent %+v, %v: a number of the connection that was going away", sent, err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(connected) != 2 || connected[1].Sub(connected[0]) < 7*time.Second || connected[1].Sub(connected[0]) > 8*time.Second {
			t.Fatalf("connected at %v", connected)
		}
		if g := eventsOf[GoingAway](&events); len(g) != 1 || g[0].RetryIn != 7*time.Second {
			t.Fatalf("events %+v", g)
		}
	})
}

// TestFinalEndings: what must not be tried again is not, and says why.
func TestFinalEndings(t *testing.T) {
	for name, c := range map[string]struct {
		script func(s *fakeServer)
		want   error
	}{
		"replaced": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool {
				c.fail(protocol.CodeSessionReplaced, 0, protocol.CloseSessionReplaced)
				return true
			}
		}, ErrReplaced},
		"replaced, and the close frame lost": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool {
				c.write(protocol.Frame{Kind: protocol.KindError, Code: protocol.CodeSessionReplaced})
				_ = c.nc.Close()
				return true
			}
		}, ErrReplaced},
		"too many devices": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool {
				c.fail(protocol.CodeTooManyDevices, 0, protocol.CloseTooManyDevices)
				return true
			}
		}, ErrTooManyDevices},
		"unauthorized": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool {
				c.fail(protocol.CodeUnauthorized, 0, protocol.CloseUnauthorized)
				return true
			}
		}, ErrUnauthorized},
		"HTTP 401": {func(s *fakeServer) {
			s.onUpgrade = func(int) (int, http.Header) { return http.StatusUnauthorized, nil }
		}, ErrUnauthorized},
		"HTTP 403": {func(s *fakeServer) {
			s.onUpgrade = func(int) (int, http.Header) { return http.StatusForbidden, nil }
		}, ErrRejected},
		"unknown code in the range": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool { c.closeWith(4777, "no"); return true }
		}, ErrRejected},
		"another user": {func(s *fakeServer) {
			s.onConnect = func(c *fakeSession, n int) bool { c.user = "mallory"; return false }
		}, ErrWrongUser},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *fakeServer) {
				c.script(s)
				o := s.options("alice")
				o.User = "alice"
				var events recorder
				o.OnEvent = events.on
				_, err := Dial(t.Context(), o)
				if !errors.Is(err, c.want) {
					t.Fatalf("dial: %v, want %v", err, c.want)
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.upgrades != 1 {
					t.Fatalf("%d attempts, want 1", s.upgrades)
				}
				down := eventsOf[Disconnected](&events)
				if len(down) != 1 || !down[0].Final || !errors.Is(down[0].Err, c.want) {
					t.Fatalf("events %+v", down)
				}
			})
		})
	}
}

// TestReplacedByASecondClient: the older of two clients of one device ends, and only acknowledging still works.
func TestReplacedByASecondClient(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		older := mustDial(t, s.options("bob"))
		s.give("alice", "bob", "hi")
		m := mustReceive(t, older)
		newer := mustDial(t, s.options("bob"))
		synctest.Wait()
		if !errors.Is(older.Err(), ErrReplaced) {
			t.Fatalf("the older one: %v", older.Err())
		}
		if _, err := older.Send(t.Context(), "alice", "x"); !errors.Is(err, ErrReplaced) {
			t.Fatalf("send: %v", err)
		}
		if _, err := older.Receive(t.Context()); !errors.Is(err, ErrReplaced) {
			t.Fatalf("receive: %v", err)
		}
		mustAcknowledge(t, older, m)
		time.Sleep(time.Hour)
		if newer.Err() != nil || !newer.Connected() {
			t.Fatalf("the newer one: %v", newer.Err())
		}
	})
}

func TestTokens(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		var keysChanged atomic.Bool
		s.onConnect = func(c *fakeSession, n int) bool {
			if !keysChanged.Load() || c.token != "alice:5" {
				return false
			}
			c.fail(protocol.CodeUnauthorized, 0, protocol.CloseUnauthorized)
			return true
		}
		calls := 0
		o := s.options("alice")
		o.Token = func(context.Context) (string, error) {
			calls++
			if calls == 2 {
				return "", errors.New("the issuer is down")
			}
			return fmt.Sprintf("alice:%d", calls), nil
		}
		c := mustDial(t, o)
		session := func() *fakeSession {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.sessions["alice/default"]
		}
		settle := func() { time.Sleep(time.Second); synctest.Wait() }
		s.dropAll()
		settle()
		if calls != 1 || session().token != "alice:1" {
			t.Fatalf("a reconnect called the source: %d calls", calls)
		}
		session().fail(protocol.CodeTokenExpired, 0, protocol.CloseTokenExpired)
		settle()
		if calls != 3 || session().token != "alice:3" {
			t.Fatalf("after 4401: %d calls, want a failed and a good one", calls)
		}
		session().write(protocol.Frame{Kind: protocol.KindRenew, ExpiresInMs: 60_000})
		settle()
		if calls != 4 || session().token != "alice:4" {
			t.Fatalf("after renew: %d calls, token %s", calls, session().token)
		}
		// A refused renewal, and the connection breaks before 4401 comes: the connection was good, so a new token is.
		session().write(protocol.Frame{Kind: protocol.KindError, Code: protocol.CodeUnauthorized})
		s.dropAll()
		settle()
		if calls != 5 || c.Err() != nil || session().token != "alice:5" {
			t.Fatalf("after a refused renewal: %d calls, %v", calls, c.Err())
		}
		// A token that was good once and is refused now: keys change. One made for the attempt is the last word.
		keysChanged.Store(true)
		s.dropAll()
		settle()
		if calls != 6 || !c.Connected() || session().token != "alice:6" {
			t.Fatalf("after a refused old token: %d calls, %v", calls, c.Err())
		}
	})
}

// TestRenewOneAtATime: a server that asks again and again gets one call of the source after the other, and an error is not the last one.
func TestRenewOneAtATime(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		answers := make(chan error)
		var calls, running atomic.Int64
		o := s.options("alice")
		o.Token = func(ctx context.Context) (string, error) {
			if running.Add(1) > 1 {
				t.Error("called twice at a time")
			}
			defer running.Add(-1)
			if calls.Add(1) == 1 {
				return "alice", nil
			}
			select {
			case err := <-answers:
				return fmt.Sprint("alice:", calls.Load()), err
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		mustDial(t, o)
		connection := func() *fakeSession {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.sessions["alice/default"]
		}
		session := connection()
		for i, answer := range []error{errors.New("the issuer is down"), nil} {
			for range 100 {
				session.write(protocol.Frame{Kind: protocol.KindRenew, ExpiresInMs: 60_000})
			}
			synctest.Wait()
			if n := calls.Load(); n != int64(i+2) {
				t.Fatalf("%d calls after %d times 100 requests", n, i+1)
			}
			answers <- answer
			synctest.Wait()
		}
		s.mu.Lock()
		if session.token != "alice:3" || s.connects != 1 {
			t.Fatalf("token %q after %d connections", session.token, s.connects)
		}
		s.mu.Unlock()
		// A connection that breaks meanwhile does not keep the next one from renewing.
		session.write(protocol.Frame{Kind: protocol.KindRenew, ExpiresInMs: 60_000})
		synctest.Wait()
		s.dropAll()
		time.Sleep(time.Second)
		connection().write(protocol.Frame{Kind: protocol.KindRenew, ExpiresInMs: 60_000})
		synctest.Wait()
		if n := calls.Load(); n != 5 {
			t.Fatalf("%d calls, want one more after a new connection", n)
		}
	})
}

func TestServiceUnavailable(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		s.onUpgrade = func(n int) (int, http.Header) {
			if n == 1 {
				return http.StatusServiceUnavailable, http.Header{"Retry-After": {"40"}}
			}
			return 0, nil
		}
		begun := time.Now()
		mustDial(t, s.options("alice"))
		if waited := time.Since(begun); waited < 40*time.Second || waited > 41*time.Second {
			t.Fatalf("came back after %v, want 40 s", waited)
		}
	})
}

// TestDeadServer: a server whose machine vanished says nothing, not even goodbye.
func TestDeadServer(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		s.mute, s.heartbeat = true, 10
		var events recorder
		o := s.options("alice")
		o.OnEvent = events.on
		mustDial(t, o)
		time.Sleep(20*time.Second - time.Millisecond)
		synctest.Wait()
		if down := eventsOf[Disconnected](&events); len(down) != 0 {
			t.Fatalf("gave up early: %+v", down)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if down := eventsOf[Disconnected](&events); len(down) != 1 || len(eventsOf[Connected](&events)) != 2 {
			t.Fatalf("after two heartbeats of silence: %+v", down)
		}
	})
}

func TestPingKeepsAQuietConnection(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		s.heartbeat = 10
		mustDial(t, s.options("alice"))
		time.Sleep(time.Hour)
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.connects != 1 {
			t.Fatalf("%d connections in a quiet hour", s.connects)
		}
	})
}

func TestUnansweredOnALivingConnection(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		s.onSend = func(c *fakeSession, f *protocol.Frame) bool { return c.n == 1 }
		c := mustDial(t, s.options("alice"))
		begun := time.Now()
		if sent := mustSend(t, c, "bob", "x"); sent.Number != 1 || sent.Position != 0 {
			t.Fatalf("sent %+v", sent)
		}
		if waited := time.Since(begun); waited < AnswerTimeout || waited > AnswerTimeout+5*time.Second {
			t.Fatalf("answered after %v", waited)
		}
	})
}

func TestThirtyDays(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.Background = true
		o.MinBackoff, o.MaxBackoff = 48*time.Hour, 48*time.Hour
		o.NetDial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no network") }
		c := mustDial(t, o)
		begun := time.Now()
		_, err := c.Send(t.Context(), "bob", "x")
		if !errors.Is(err, ErrUnanswered) {
			t.Fatalf("got %v", err)
		}
		if days := time.Since(begun).Hours() / 24; days < 30 || days > 30.1 {
			t.Fatalf("handed back after %.2f days", days)
		}
	})
}

func TestServerRestoredFromBackupGetsANewEpoch(t *testing.T) {
	t.Run("while the client runs", func(t *testing.T) { testServerRestored(t, false) })
	t.Run("while it does not", func(t *testing.T) { testServerRestored(t, true) })
}

func testServerRestored(t *testing.T, restarted bool) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		c := mustDial(t, o)
		mustSend(t, c, "bob", "one")
		mustSend(t, c, "bob", "two")
		s.mu.Lock()
		clear(s.blocks) // the backup is older than the client
		s.mu.Unlock()
		if restarted {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			c = mustDial(t, o)
		} else {
			s.dropAll()
			time.Sleep(time.Second)
		}
		if sent := mustSend(t, c, "bob", "three"); sent.Number != 1 {
			t.Fatalf("sent %+v, want number 1 of a new epoch", sent)
		}
		if got := s.texts(); !slices.Equal(got, []string{"one", "two", "three"}) {
			t.Fatalf("accepted %v", got)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.blocks) != 2 {
			t.Fatalf("streams %v, want the old and the new", s.blocks)
		}
	})
}

// receiptsAfter is what the next process would ask for.
func receiptsAfter(t *testing.T, path string) int64 {
	t.Helper()
	st, _, _, err := openState(osDisk{}, path, "default", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, st)
	return st.receiptsAfter
}

// TestReceiptsAfter: the next process asks for what changed after the newest receipt that the application has.
func TestReceiptsAfter(t *testing.T) {
	for _, silent := range []bool{false, true} {
		bubble(t, func(t *testing.T, s *fakeServer) {
			o := s.options("alice")
			o.StatePath = filepath.Join(t.TempDir(), "state")
			if !silent {
				o.OnEvent = func(Event) {}
			}
			client := mustDial(t, o)
			s.mu.Lock()
			session := s.sessions["alice/default"]
			s.mu.Unlock()
			for _, ms := range []int64{100, 300, 200} {
				session.write(protocol.Frame{Kind: protocol.KindReceipt, Receipts: []protocol.Receipt{{
					Timestamp: ms, Position: uint64(ms), Receiver: fmt.Append(nil, "user", ms)}}})
			}
			synctest.Wait()
			if err := client.Close(); err != nil {
				t.Fatal(err)
			}
			if got := receiptsAfter(t, o.StatePath); got != 300 {
				t.Fatalf("silent %v: asks after %d", silent, got)
			}
		})
	}
}

// TestReceiptsAfterWaitsForTheApplication: a receipt that OnEvent has not returned from is asked for again.
func TestReceiptsAfterWaitsForTheApplication(t *testing.T) {
	block := make(chan struct{})
	q := newEventQueue(func(Event) { <-block })
	add := func(ms int64, receiver string) {
		q.add(Delivered{Position: uint64(ms), Receiver: receiver, At: time.UnixMilli(ms)})
	}
	q.connecting()
	add(100, "bob")
	add(200, "carol")
	if ms := q.settled(); ms != 0 {
		t.Fatalf("settled %d, which the application does not have", ms)
	}
	block <- struct{}{}
	block <- struct{}{} // taken up with the second: it has come back from the first
	if ms := q.settled(); ms != 100 {
		t.Fatalf("settled %d, want 100", ms)
	}
	q.close()
	if ms := q.settled(); ms != 200 {
		t.Fatalf("settled %d, want 200", ms)
	}
}

func TestReceiptsOfOneConversationAreMerged(t *testing.T) {
	block := make(chan struct{})
	var got recorder
	q := newEventQueue(func(e Event) { <-block; got.on(e) })
	q.add(GoingAway{}) // occupies the callback
	for i := range 3000 {
		q.add(Delivered{Position: uint64(i + 1), Receiver: fmt.Sprint("user", i%10), At: time.UnixMilli(int64(i))})
		q.add(Connected{User: "alice"})
	}
	if n := len(q.list); n > MaxEvents {
		t.Fatalf("%d events wait", n)
	}
	close(block)
	q.close()
	last := map[string]uint64{}
	for _, d := range eventsOf[Delivered](&got) {
		last[d.Receiver] = d.Position
	}
	if len(last) != 10 || last["user9"] != 3000 || last["user0"] != 2991 {
		t.Fatalf("last receipts %v", last)
	}
}

// TestLostReceiptStopsReceiptsAfter: when receipts had to be dropped, the next connection asks for them again.
func TestLostReceiptStopsReceiptsAfter(t *testing.T) {
	block := make(chan struct{})
	q := newEventQueue(func(Event) { <-block })
	add := func(i int) {
		q.add(Delivered{Position: 1, Receiver: fmt.Sprint("user", i), At: time.UnixMilli(int64(1000 + i))})
	}
	q.connecting()
	for i := range MaxEvents {
		add(i)
	}
	for i := range 10 {
		add(MaxEvents + i)
	}
	q.connecting() // does not bring back what was dropped at once
	close(block)
	q.close()
	if ms := q.settled(); ms != 0 {
		t.Fatalf("settled %d though receipts were lost", ms)
	}
	q = newEventQueue(func(Event) {})
	q.connecting()
	q.lost = true
	q.connecting()
	add(5)
	q.close()
	if ms := q.settled(); ms != 1005 {
		t.Fatalf("the next connection settled %d", ms)
	}
}

// TestBrokenServers: whatever a server sends, the client closes or goes on, keeps its memory small, and comes back.
func TestBrokenServers(t *testing.T) {
	header := func(h ws.Header) []byte {
		var b strings.Builder
		if err := ws.WriteHeader(&b, h); err != nil {
			t.Fatal(err)
		}
		return []byte(b.String())
	}
	incoming := protocol.AppendBinary(nil, &protocol.Frame{Kind: protocol.KindIncoming, Sender: []byte("a"), Receiver: []byte("b"), Content: []byte("x"), Position: 1})
	for name, raw := range map[string][]byte{
		"reserved opcode":         header(ws.Header{Fin: true, OpCode: 3}),
		"text on binary":          header(ws.Header{Fin: true, OpCode: ws.OpText}),
		"masked":                  header(ws.Header{Fin: true, OpCode: ws.OpBinary, Masked: true}),
		"rsv":                     header(ws.Header{Fin: true, Rsv: 4, OpCode: ws.OpBinary}),
		"continuation first":      header(ws.Header{Fin: true, OpCode: ws.OpContinuation}),
		"too long":                header(ws.Header{Fin: true, OpCode: ws.OpBinary, Length: protocol.MaxServerFrameBytes + 1}),
		"2^62 bytes":              header(ws.Header{Fin: true, OpCode: ws.OpBinary, Length: 1 << 62}),
		"long ping":               header(ws.Header{Fin: true, OpCode: ws.OpPing, Length: 126}),
		"fragmented ping":         header(ws.Header{OpCode: ws.OpPing}),
		"too many fragments":      append(header(ws.Header{OpCode: ws.OpBinary}), repeat(header(ws.Header{OpCode: ws.OpContinuation}), protocol.MaxFragments)...),
		"fragments too long":      append(append(header(ws.Header{OpCode: ws.OpBinary, Length: protocol.MaxServerFrameBytes}), make([]byte, protocol.MaxServerFrameBytes)...), header(ws.Header{OpCode: ws.OpContinuation, Length: 1})...),
		"a frame in two messages": append(header(ws.Header{Fin: true, OpCode: ws.OpBinary, Length: 1}), byte(protocol.KindIncoming)),
		"before connected":        append(header(ws.Header{Fin: true, OpCode: ws.OpBinary, Length: int64(len(incoming))}), incoming...),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *fakeServer) {
				s.onConnect = func(c *fakeSession, n int) bool {
					if n > 1 {
						return false
					}
					_, _ = c.nc.Write(raw) // the client may close before it has read everything
					return true
				}
				var events recorder
				o := s.options("alice")
				o.OnEvent = events.on
				c := mustDial(t, o)
				mustSend(t, c, "bob", "still works")
				down := eventsOf[Disconnected](&events)
				if len(down) != 1 || !strings.Contains(down[0].Err.Error(), "broke the protocol") {
					t.Fatalf("events %+v", down)
				}
			})
		})
	}
}

func repeat(b []byte, n int) (out []byte) {
	for range n {
		out = append(out, b...)
	}
	return out
}

// TestUnknownFramesAreSkipped: a later server may say more.
func TestUnknownFramesAreSkipped(t *testing.T) {
	for encoding, raw := range map[Encoding]string{Binary: "\x8f\x03abc\x7f\x01z", JSON: `{"type":"weather","sun":true}`} {
		bubble(t, func(t *testing.T, s *fakeServer) {
			o := s.options("bob")
			o.Encoding = encoding
			bob := mustDial(t, o)
			s.mu.Lock()
			session := s.sessions["bob/default"]
			s.mu.Unlock()
			session.frame(encoding.opcode(), []byte(raw))
			s.give("alice", "bob", "hi")
			if m := mustReceive(t, bob); m.Text != "hi" {
				t.Fatalf("received %q", m.Text)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.connects != 1 {
				t.Fatalf("%d connections", s.connects)
			}
		})
	}
}

func TestEndlessHandshake(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.Background = true
		var events recorder
		o.OnEvent = events.on
		var written atomic.Int64
		o.NetDial = func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				_, _ = far.Read(make([]byte, 4096))
				_, _ = far.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nX: "))
				for {
					n, err := far.Write(make([]byte, 1024))
					written.Add(int64(n))
					if err != nil {
						return
					}
				}
			}()
			return near, nil
		}
		o.MinBackoff, o.MaxBackoff = time.Hour, time.Hour
		c := mustDial(t, o)
		synctest.Wait()
		if down := eventsOf[Disconnected](&events); len(down) != 1 || !errors.Is(down[0].Err, errHandshakeTooLong) {
			t.Fatalf("events %+v", down)
		}
		if n := written.Load(); n > maxHandshakeBytes+4096 {
			t.Fatalf("%d bytes of a header were read", n)
		}
		_ = c
	})
}

// TestPingFlood: a server that asks for pongs and does not read them does not fill the client's memory.
func TestPingFlood(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		var events recorder
		o := s.options("alice")
		o.OnEvent = events.on
		flooded := make(chan struct{})
		s.onConnect = func(c *fakeSession, n int) bool {
			if n == 1 {
				defer close(flooded)
				for {
					c.wmu.Lock()
					err := ws.WriteFrame(c.nc, ws.NewPingFrame(make([]byte, 125)))
					c.wmu.Unlock()
					if err != nil {
						return true
					}
				}
			}
			return false
		}
		c := mustDial(t, o)
		<-flooded
		mustSend(t, c, "bob", "still works")
		if down := eventsOf[Disconnected](&events); len(down) != 1 || !errors.Is(down[0].Err, errServerStuck) {
			t.Fatalf("events %+v", down)
		}
	})
}

// TestInboxOverflow: pushes that find no room are asked for again when there is some.
func TestInboxOverflow(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		bob := mustDial(t, s.options("bob"))
		const n = MaxPending + 50
		for i := range n {
			s.give("alice", "bob", fmt.Sprint(i))
		}
		got := map[string]int{}
		for range n {
			m := mustReceive(t, bob)
			got[m.Text]++
			mustAcknowledge(t, bob, m)
		}
		if len(got) != n {
			t.Fatalf("%d different messages, want %d", len(got), n)
		}
		nothingMore(t, bob)
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.mailbox["bob"]) != 0 || s.connects != 2 {
			t.Fatalf("%d wait, %d connections", len(s.mailbox["bob"]), s.connects)
		}
	})
}

// TestDiskFailureEndsTheClient: a number that could not be stored is not written.
func TestDiskFailureEndsTheClient(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		c, err := Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		mustSend(t, c, "bob", "good")
		breakDisk(t, c)
		if _, err := c.Send(t.Context(), "bob", "lost"); !errors.Is(err, errDisk) {
			t.Fatalf("send: %v", err)
		}
		synctest.Wait()
		if !errors.Is(c.Err(), errDisk) || !slices.Equal(s.texts(), []string{"good"}) {
			t.Fatalf("client: %v, accepted %v", c.Err(), s.texts())
		}
		if err := c.Close(); !errors.Is(err, errDisk) {
			t.Fatalf("close: %v", err)
		}
	})
}

// TestAcknowledgedOnlyWhenStored: an id that is not on stable storage is not acknowledged, or a power cut
// would let the message be lost here and shown nowhere.
func TestAcknowledgedOnlyWhenStored(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("bob")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		bob, err := Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		var messages []Message
		for i := range MaxAcknowledgements {
			s.give("alice", "bob", fmt.Sprint(i))
			messages = append(messages, mustReceive(t, bob))
		}
		breakDisk(t, bob)
		if err := bob.Acknowledge(t.Context(), messages...); !errors.Is(err, errDisk) {
			t.Fatalf("acknowledge: %v", err)
		}
		if err := bob.Close(); !errors.Is(err, errDisk) {
			t.Fatalf("close: %v", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.acked) != 0 {
			t.Fatalf("%d messages were acknowledged", len(s.acked))
		}
	})
}

func TestInboxOfABrokenConnection(t *testing.T) {
	b := newInbox(newShownSet(10))
	b.pushed(Message{ID: testID(1)}, epochStart)
	b.pushed(Message{ID: testID(1)}, epochStart)
	if len(b.queue) != 1 {
		t.Fatalf("%d messages wait, want 1", len(b.queue))
	}
	b.taken()
	if !b.acknowledged(shownID{id: testID(1)}, epochStart) || b.acknowledged(shownID{id: testID(1)}, epochStart) {
		t.Fatal("an acknowledgement is new once")
	}
	if b.due(epochStart, false) || !b.due(epochStart, true) || !b.due(epochStart.Add(AcknowledgeDelay), false) {
		t.Fatal("acknowledgements wait for the delay or for company")
	}
	b.disconnected()
	if b.due(epochStart.Add(time.Hour), true) {
		t.Fatal("acknowledgements outlive the connection that pushed")
	}
	b.pushed(Message{ID: testID(1)}, epochStart)
	if len(b.queue) != 0 || !b.due(epochStart, true) {
		t.Fatal("a known message is shown again or not acknowledged again")
	}
}

func TestOptions(t *testing.T) {
	token := StaticToken("alice")
	for _, o := range []Options{
		{}, {URL: "ws://x"}, {URL: "http://x", Token: token}, {URL: "ws://", Token: token}, {URL: "ws://x\x7f", Token: token},
		{URL: "ws://x", Token: token, Device: "a b"}, {URL: "ws://x", Token: token, User: "a/b"},
		{URL: "ws://x", Token: token, MaxOutbox: -1}, {URL: "ws://x", Token: token, MaxOutbox: LimitMaxOutbox + 1},
		{URL: "ws://x", Token: token, Encoding: 7}, {URL: "ws://x", Token: token, MinBackoff: -1},
	} {
		if c, err := Dial(t.Context(), o); err == nil {
			t.Errorf("%+v was accepted", o)
			_ = c.Close()
		}
	}
}

func TestStateOfAnotherUser(t *testing.T) {
	bubble(t, func(t *testing.T, s *fakeServer) {
		o := s.options("alice")
		o.StatePath = filepath.Join(t.TempDir(), "state")
		c := mustDial(t, o)
		if _, err := Dial(t.Context(), o); !errors.Is(err, ErrStateLocked) {
			t.Fatalf("a second client on the state: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		o.Token = StaticToken("bob")
		if _, err := Dial(t.Context(), o); !errors.Is(err, ErrWrongUser) {
			t.Fatalf("bob with alice's state: %v", err)
		}
		o.User = "bob"
		if _, err := Dial(t.Context(), o); !errors.Is(err, ErrStateMismatch) {
			t.Fatalf("bob, who says so, with alice's state: %v", err)
		}
	})
}

// TestJudge has a row for everything that §2 and §16 of the protocol say about coming back.
func TestJudge(t *testing.T) {
	why := errors.New("why")
	closed := func(code protocol.CloseCode) ending { return ending{err: why, closeCode: code} }
	status := func(n int) ending { return ending{err: why, status: n} }
	told := func(code protocol.Code, retryAfterMs uint32) *serverFrame {
		return &serverFrame{Code: code, RetryAfterMs: retryAfterMs}
	}
	for name, c := range map[string]struct {
		end      ending
		told     *serverFrame
		goAwayMs uint32
		fresh    bool
		final    error
		newToken bool
		floor    time.Duration
	}{
		"broken":                      {end: ending{err: why}},
		"normal":                      {end: closed(protocol.CloseNormal)},
		"after go_away":               {end: closed(protocol.CloseRestart), goAwayMs: 1500, floor: 1500 * time.Millisecond},
		"after an error and go_away":  {end: closed(protocol.CloseTryAgain), told: told(protocol.CodeOverloaded, 900), goAwayMs: 700, floor: 900 * time.Millisecond},
		"violated WebSocket":          {end: closed(protocol.CloseProtocolError), final: ErrRejected},
		"in the range to come back":   {end: closed(4499)},
		"in the range not to":         {end: closed(4500 + 77), final: ErrRejected},
		"replaced":                    {end: closed(protocol.CloseSessionReplaced), final: ErrReplaced},
		"too many devices":            {end: closed(protocol.CloseTooManyDevices), final: ErrTooManyDevices},
		"expired":                     {end: closed(protocol.CloseTokenExpired), fresh: true, newToken: true},
		"old token refused":           {end: closed(protocol.CloseUnauthorized), newToken: true},
		"new token refused":           {end: closed(protocol.CloseUnauthorized), fresh: true, final: ErrUnauthorized},
		"told, and broken":            {end: ending{err: why}, told: told(protocol.CodeSessionReplaced, 0), final: ErrReplaced},
		"told, and closed as normal":  {end: closed(protocol.CloseNormal), told: told(protocol.CodeTooManyDevices, 0), final: ErrTooManyDevices},
		"told, and closed as restart": {end: closed(protocol.CloseRestart), told: told(protocol.CodeSessionReplaced, 0)},
		"told what ends nothing":      {end: ending{err: why}, told: told(protocol.CodeUnknownAction, 0)},
		"no token":                    {end: ending{err: why, tokenErr: true}, newToken: true},
		"another user":                {end: ending{err: ErrWrongUser}, final: ErrWrongUser},
		"HTTP 400":                    {end: status(400), final: ErrRejected},
		"HTTP 401 for an old token":   {end: status(401), newToken: true},
		"HTTP 401 for a new token":    {end: status(401), fresh: true, final: ErrUnauthorized},
		"HTTP 403":                    {end: status(403), final: ErrRejected},
		"HTTP 404":                    {end: status(404), final: ErrRejected},
		"HTTP 405":                    {end: status(405), final: ErrRejected},
		"HTTP 426":                    {end: status(426), final: ErrRejected},
		"HTTP 431":                    {end: status(431), final: ErrRejected},
		"HTTP 429 of a proxy":         {end: status(429)},
		"HTTP 502 of a proxy":         {end: status(502)},
		"HTTP 503":                    {end: ending{err: why, status: 503, retryAfter: 7 * time.Second}, floor: 7 * time.Second},
		"HTTP 503 without a time":     {end: status(503), fresh: true},
	} {
		v := judge(c.end, c.told, c.goAwayMs, c.fresh)
		if !errors.Is(v.final, c.final) || v.newToken != c.newToken || v.floor != c.floor {
			t.Errorf("%s: %+v", name, v)
		}
		if v.final != nil && !errors.Is(v.final, c.end.err) {
			t.Errorf("%s: %v does not say why", name, v.final)
		}
	}
}

// TestBackoffStartsOver: only a connection that stood for a while ends the doubling; a server that accepts and drops is not hammered.
func TestBackoffStartsOver(t *testing.T) {
	for stood, startsOver := range map[time.Duration]bool{10*time.Second - time.Millisecond: false, 10 * time.Second: true} {
		bubble(t, func(t *testing.T, s *fakeServer) {
			c := mustDial(t, s.options("alice"))
			err := c.do(t.Context(), func(r *runner, reply func(error)) { r.backoff.failures = 7; reply(nil) })
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(stood)
			s.dropAll()
			synctest.Wait()
			err = c.do(t.Context(), func(r *runner, reply func(error)) {
				if want := map[bool]int{false: 8, true: 1}[startsOver]; r.backoff.failures != want {
					t.Errorf("after a connection of %v the backoff counts %d failures, want %d", stood, r.backoff.failures, want)
				}
				reply(nil)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestBackoffBounds(t *testing.T) {
	b := backoff{min: time.Second, max: 30 * time.Second}
	for n := range 100 {
		ceiling := min(time.Second<<min(n, 10), 30*time.Second)
		if d := b.next(5 * time.Second); d < 5*time.Second || d > 5*time.Second+ceiling {
			t.Fatalf("wait %d is %v", n, d)
		}
	}
	if d := b.next(100 * time.Hour); d > MaxServerDelay+30*time.Second {
		t.Fatalf("a server can ask for %v", d)
	}
}

func TestPositions(t *testing.T) {
	list := []Message{{Position: 0, Text: "mine"}, {Position: 9}, {Position: protocol.MaxPosition}, {Position: 3}}
	slices.SortFunc(list, CompareMessages)
	if list[0].Position != 3 || list[1].Position != 9 || list[3].Text != "mine" {
		t.Fatalf("sorted %+v", list)
	}
	if m := (Message{Position: 1692841226851 << protocol.PositionShift}); m.Time().UnixMilli() != 1692841226851 {
		t.Fatalf("time %v", m.Time())
	}
}

func TestTLS(t *testing.T) {
	certified := httptest.NewTLSServer(nil)
	roots := x509.NewCertPool()
	roots.AddCert(certified.Certificate())
	config := &tls.Config{Certificates: certified.TLS.Certificates}
	certified.Close()
	s := newFakeServer(t)
	o := s.options("alice")
	o.URL = "wss://example.com/ws"
	o.TLSConfig = &tls.Config{RootCAs: roots}
	plain := o.NetDial
	o.NetDial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if addr != "example.com:443" {
			t.Errorf("dials %s", addr)
		}
		near, far := net.Pipe()
		s.wg.Go(func() { defer far.Close(); s.serve(tls.Server(far, config)) })
		return near, nil
	}
	c := mustDial(t, o)
	mustSend(t, c, "bob", "secret")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	o.TLSConfig, o.NetDial = nil, plain // a server that does not even speak TLS
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, o); err == nil {
		t.Fatal("connected without TLS")
	}
}

// TestRealSockets runs over TCP with many goroutines, and nothing is left afterwards.
func TestRealSockets(t *testing.T) {
	before := runtime.NumGoroutine()
	func() {
		s := newFakeServer(t)
		url, listener := s.listen()
		defer s.close()
		defer listener.Close()
		dial := func(user string) *Client {
			o := s.options(user)
			o.NetDial, o.URL = nil, url
			o.StatePath = filepath.Join(t.TempDir(), user)
			c, err := Dial(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		alice, bob := dial("alice"), dial("bob")
		defer alice.Close()
		defer bob.Close()
		const senders, each = 8, 25
		var all sync.WaitGroup
		for g := range senders {
			all.Go(func() {
				for i := range each {
					if _, err := alice.Send(t.Context(), "bob", fmt.Sprint(g, "/", i)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		var mu sync.Mutex
		got := map[string]int{}
		var received atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for range 3 {
			all.Go(func() {
				for {
					m, err := bob.Receive(ctx)
					if err != nil {
						return
					}
					mu.Lock()
					got[m.Text]++
					mu.Unlock()
					if err := bob.Acknowledge(ctx, m); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					if received.Add(1) == senders*each {
						cancel()
					}
				}
			})
		}
		all.Wait()
		if len(got) != senders*each {
			t.Fatalf("%d different messages, want %d", len(got), senders*each)
		}
	}()
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
		runtime.Gosched()
	}
}
