//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

const (
	abuseRate  = 20 // messages a second of a connection
	abuseBurst = 100
	// What the process may grow by besides what the edge has for each connection: the database, and what a busy heap keeps.
	abuseGrowth         = 128 << 20
	abuseConnGrowth     = 8 << 10 // a slot, and buffers while something is in them
	abuseMessageBytes   = 1 << 20
	abuseIDsAtOnce      = protocol.MaxIDsPerFrame
	abuseUnacknowledged = protocol.MaxUnacknowledged + 44 // sent to who acknowledges nothing
)

// TestFloodAbuse: clients that do what the protocol allows and nobody needs, or what it forbids, all at once: each is served, told, or
// closed by its rule, and nobody else's messages are lost by it.
func TestFloodAbuse(t *testing.T) {
	floodTest(t)
	honest := floodSize(10, 200)
	s := newFloodVictim(t)
	s.flags = []string{"--edge-message-rate", fmt.Sprint(abuseRate), "--edge-message-burst", fmt.Sprint(abuseBurst)}
	s.serve()
	c := newCrowd(s)
	people := c.join("honest", honest, 0)
	read(people)
	quiet := c.phase(time.Duration(floodSize(1, 10))*time.Second, func(ctx context.Context, talk *sync.WaitGroup) {
		talk.Go(func() { c.chat(ctx, people, people, 5*honest, 120, true) })
	})
	keepers := c.join("keeper", floodSize(1, 20), 0)
	generous := c.join("generous", 4*len(keepers), 0)
	for _, m := range keepers {
		m.rejoin = true
		m.mute.Store(true)
	}
	read(keepers)
	read(generous)

	g := s.watched()
	talking, stop := context.WithCancel(t.Context())
	defer stop()
	var talk, abuse sync.WaitGroup
	talk.Go(func() { c.chat(talking, people, people, 5*honest, 120, true) })
	pingers := floodSize(100, 5_000)
	said := make(chan string, 8)
	abuse.Go(func() { said <- s.pingers(pingers, time.Duration(floodSize(2, 20))*time.Second) })
	abuse.Go(func() { said <- s.senders(floodSize(3, 50)) })
	abuse.Go(func() { said <- s.endless(floodSize(5, 200)) })
	abuse.Go(func() { said <- c.keepAll(keepers, generous) })
	abuse.Wait()
	stop()
	talk.Wait()
	close(said)
	flooded := c.take()
	v := c.judge()
	g.stop()
	for line := range said {
		t.Log(line)
	}
	before, during := quantile(quiet, .99), quantile(flooded, .99)
	t.Logf("honest p99: %v alone (%d messages), %v with them (%d): ratio %.2f; %s",
		before, len(quiet), during, len(flooded), during.Seconds()/before.Seconds(), g)
	t.Log(v)
	if _, peak, _ := g.seen(); peak-g.first > abuseGrowth+int64(pingers)*abuseConnGrowth {
		t.Errorf("VmRSS grew by %.1f MiB", mib(peak-g.first))
	}
	s.wantConnections(honest + len(keepers) + len(generous))
	s.wantServing()
}

// pingers only ping, each as often as it is answered, and every answer is the one to its ping.
func (s *victim) pingers(n int, lasts time.Duration) string {
	var pings, until atomic.Int64
	var all, there sync.WaitGroup
	there.Add(n)
	all.Go(func() {
		there.Wait()
		until.Store(time.Now().Add(lasts).UnixNano())
	})
	dialing := make(chan struct{}, floodDialers)
	for i := range n {
		all.Go(func() {
			dialing <- struct{}{}
			conn, _, err := s.login(s.t.Context(), fmt.Sprintf("pinger-%05d", i), protocol.DefaultDevice, 0, floodSource(i%200), 0)
			<-dialing
			there.Done()
			if err != nil {
				s.t.Errorf("pinger: %v", err)
				return
			}
			defer conn.Close()
			there.Wait()
			payload := make([]byte, 16)
			for k := uint64(0); until.Load() == 0 || time.Now().UnixNano() < until.Load(); k++ {
				binary.BigEndian.PutUint64(payload, k)
				if err := wsutil.WriteClientMessage(conn, ws.OpPing, bytes.Clone(payload)); err != nil {
					s.t.Errorf("ping: %v", err)
					return
				}
				if err := conn.wantPong(payload); err != nil {
					s.t.Errorf("pong: %v", err)
					return
				}
				pings.Add(1)
			}
		})
	}
	all.Wait()
	return fmt.Sprintf("%d connections that only ping: %d pings in %v, %.0f a second, all answered", n, pings.Load(), lasts, float64(pings.Load())/lasts.Seconds())
}

// wantPong reads the next frame that is no ping of the server.
func (c *floodConn) wantPong(payload []byte) error {
	for {
		//lint:ignore SA1019 the other end is this test's own server
		f, err := ws.ReadFrame(c.in)
		switch {
		case err != nil:
			return err
		case f.Header.OpCode == ws.OpPing:
			if err := c.pong(f.Payload); err != nil {
				return err
			}
		case f.Header.OpCode != ws.OpPong || !bytes.Equal(f.Payload, payload):
			return fmt.Errorf("got opcode %#x %q, want a pong of %q", f.Header.OpCode, f.Payload, payload)
		default:
			return nil
		}
	}
}

// senders send far above their rate until they are closed for it. Every other one heeds no answer at all; the rest keep the span of open
// numbers and try what was refused again at once, so that only the rate is in their way.
func (s *victim) senders(n int) string {
	var answered, refused, longest atomic.Int64
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			conn, connected, err := s.login(s.t.Context(), fmt.Sprintf("sender-%05d", i), protocol.DefaultDevice, 0, netip.Addr{}, 0)
			if err != nil {
				s.t.Errorf("sender: %v", err)
				return
			}
			defer conn.Close()
			sender := &hasty{conn: conn, from: connected.Seq}
			begun := time.Now()
			if i%2 == 0 {
				err = sender.persist()
			} else {
				err = sender.pour()
			}
			took := time.Since(begun)
			answered.Add(sender.accepted)
			refused.Add(sender.refused)
			for {
				if now := longest.Load(); int64(took) <= now || longest.CompareAndSwap(now, int64(took)) {
					break
				}
			}
			if !errors.Is(err, walkClosed(protocol.CloseFlooding)) && !isReset(err) {
				s.t.Errorf("sender: %v", err)
			}
			if most := abuseBurst + int64(abuseRate*(took.Seconds()+1)); sender.accepted > most {
				s.t.Errorf("%d messages accepted in %v, at most %d should have been", sender.accepted, took, most)
			}
			if i%2 == 0 && sender.accepted < abuseBurst {
				s.t.Errorf("%d messages accepted, %d may come at once", sender.accepted, abuseBurst)
			}
		})
	}
	all.Wait()
	const closed = `millrace_edge_closes_total{reason="flooding"}`
	values := scrapeUntil(s.t, s.admin(), "senders", func(v map[string]float64) bool { return v[closed] >= float64(n) })
	return fmt.Sprintf("%d senders far above their rate: %d messages accepted, %d refusals read, %.0f closed as flooding within %.1f s",
		n, answered.Load(), refused.Load(), values[closed], time.Duration(longest.Load()).Seconds())
}

// hasty sends without regard for its rate.
type hasty struct {
	conn *floodConn
	from uint64 // the lowest number without an answer

	accepted, refused int64
}

// hastySends is how many sends a hasty client writes at once.
const hastySends = 32

func (h *hasty) write(from uint64) error {
	var batch []byte
	for n := range uint64(hastySends) {
		f := protocol.Frame{Kind: protocol.KindSend, Seq: from + n, Receiver: []byte("nobody"), Content: []byte("again and again"), Timestamp: 1}
		batch = protocol.AppendBinary(batch, &f)
	}
	return wsutil.WriteClientBinary(h.conn, batch)
}

// pour writes new numbers without waiting for anything.
func (h *hasty) pour() error {
	var writing sync.WaitGroup
	defer writing.Wait()
	defer h.conn.Close()
	first := h.from
	writing.Go(func() {
		for n := first; h.write(n) == nil; n += hastySends { // closed, which the reader judges
		}
	})
	for {
		if _, err := h.read(); err != nil {
			return err
		}
	}
}

// persist has a few open numbers, and sends them again as soon as all of them are answered or refused.
func (h *hasty) persist() error {
	for {
		if err := h.write(h.from); err != nil {
			if isReset(err) { // what was said before may be there to be read
				for err = nil; err == nil; {
					_, err = h.read()
				}
			}
			return err
		}
		for open := hastySends; open > 0; {
			n, err := h.read()
			if err != nil {
				return err
			}
			open -= n
		}
	}
}

// read tells how many sends the next message answers or refuses.
func (h *hasty) read() (sends int, err error) {
	data, err := h.conn.read(h.conn.pong)
	f := new(protocol.Frame)
	for len(data) > 0 && err == nil {
		rest, bad := protocol.ParseBinary(data, f)
		if bad != nil {
			return sends, fmt.Errorf("frame of the server: %w", bad)
		}
		data = rest
		switch {
		case f.Kind == protocol.KindReceived:
			h.accepted++
			h.from = f.Seq + 1 // answers come in order
			sends++
		case f.Kind == protocol.KindError && (f.Code == protocol.CodeRateLimited && f.RetryAfterMs > 0 || f.Code == protocol.CodeWindowExceeded):
			h.refused++
			sends++
		case f.Kind == protocol.KindError && f.Code == protocol.CodeFlooding:
		case f.Kind == protocol.KindReceipt:
		default:
			return sends, fmt.Errorf("unexpected: %s", describe(f))
		}
	}
	return sends, err
}

// endless sends a megabyte without a newline to the JSON subprotocol: as one message, as fragments, and as a message that is just short
// enough and says nothing.
func (s *victim) endless(n int) string {
	var cut, told atomic.Int64
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			conn, err := floodDial(s.t.Context(), s.addr, netip.Addr{}, 0)
			if err != nil {
				s.t.Errorf("endless: %v", err)
				return
			}
			c, err := floodUpgrade(conn, protocol.SubprotocolJSON)
			if err != nil {
				s.t.Errorf("endless: %v", err)
				return
			}
			defer c.Close()
			signed, err := signToken(s.config, fmt.Sprintf("endless-%05d", i), time.Hour)
			if err != nil {
				s.t.Error(err)
				return
			}
			connect := protocol.AppendJSON(nil, &protocol.Frame{Kind: protocol.KindConnect, Token: []byte(signed)})
			if err := wsutil.WriteClientText(c, connect); err != nil {
				s.t.Errorf("endless: %v", err)
				return
			}
			if _, err := c.read(c.pong); err != nil {
				s.t.Errorf("endless: %v", err)
				return
			}
			if i%3 == 0 {
				c.just(s.t, &told)
			}
			c.endless(i%2 == 0)
			code, err := c.closeCode()
			switch {
			case code == protocol.CloseTooBig, isReset(err): // as of senders
				cut.Add(1)
			default:
				s.t.Errorf("endless: code %d, %v", code, err)
			}
		})
	}
	all.Wait()
	const closed = `millrace_edge_closes_total{reason="too_big"}`
	values := scrapeUntil(s.t, s.admin(), "endless", func(v map[string]float64) bool { return v[closed] >= float64(n) })
	return fmt.Sprintf("%d × 1 MiB of JSON without a newline: %d cut off, %.0f closed as too big; %d × 16 KiB of it were told bad_request before",
		n, cut.Load(), values[closed], told.Load())
}

// just is the longest message that there may be. It says nothing, is refused, and the connection lives.
func (c *floodConn) just(t testing.TB, told *atomic.Int64) {
	if err := wsutil.WriteClientText(c, bytes.Repeat([]byte{'x'}, protocol.MaxJSONFrameBytes)); err != nil {
		t.Errorf("endless: %v", err)
		return
	}
	data, err := c.read(c.pong)
	f := new(protocol.Frame)
	if err == nil {
		if _, bad := protocol.ParseJSON(data, true, f); bad != nil {
			err = bad
		}
	}
	if err != nil || f.Kind != protocol.KindError || f.Code != protocol.CodeBadRequest {
		t.Errorf("16 KiB of nothing: %s, %v", describe(f), err)
		return
	}
	told.Add(1)
}

// endless writes as much as it can; a server that has closed does not read.
func (c *floodConn) endless(fragments bool) {
	part := bytes.Repeat([]byte{'x'}, 4<<10)
	for written := 0; written < abuseMessageBytes; written += len(part) {
		var err error
		switch {
		case fragments:
			op := ws.OpContinuation
			if written == 0 {
				op = ws.OpText
			}
			f := ws.MaskFrame(ws.NewFrame(op, false, part))
			err = ws.WriteFrame(c, f)
		case written == 0:
			if err = ws.WriteHeader(c, ws.Header{Fin: true, OpCode: ws.OpText, Masked: true, Length: abuseMessageBytes}); err == nil {
				_, err = c.Write(part)
			}
		default:
			_, err = c.Write(part)
		}
		if err != nil {
			return
		}
	}
}

// isReset reports whether the connection ended without a close frame.
func isReset(err error) bool {
	return err != nil && !isTimeout(err) && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE))
}

// keepAll gives more messages to the keepers than may be unacknowledged. They acknowledge none and others acknowledge in their place; what
// they held comes again when they come again.
func (c *crowd) keepAll(keepers, generous []*member) string {
	ctx := c.t.Context()
	var sending sync.WaitGroup
	for i, m := range generous {
		sending.Go(func() {
			for range abuseUnacknowledged / 4 {
				if err := m.send(ctx, keepers[i/4].user, 200, false); err != nil {
					c.t.Errorf("%s: %v", m.user, err)
					return
				}
			}
		})
	}
	sending.Wait()
	// All of it is answered, and a little later what can be pushed has been.
	for _, m := range generous {
		for range cap(m.slots) {
			m.slots <- struct{}{}
		}
	}
	patience := time.Now().Add(floodPatience)
	for _, m := range keepers {
		for m.shown.Load() < protocol.MaxUnacknowledged && time.Now().Before(patience) {
			<-time.After(floodTick)
		}
	}
	ignored := c.falseAcks(generous)
	for _, m := range keepers {
		if n := m.shown.Load(); n != protocol.MaxUnacknowledged {
			c.t.Errorf("%s acknowledged nothing and got %d messages, want %d", m.user, n, protocol.MaxUnacknowledged)
		}
	}
	slow := 0.0
	if *floods { // after 60 s they are closed, and come again, without a change of mind
		const closed = `millrace_edge_closes_total{reason="slow"}`
		until := time.Now().Add(2 * floodPatience)
		for slow < float64(len(keepers)) && time.Now().Before(until) {
			<-time.After(floodWatch)
			slow = scrape(c.t, c.server.admin())[closed]
		}
		if slow < float64(len(keepers)) {
			c.t.Errorf("%.0f of %d who acknowledged nothing were closed", slow, len(keepers))
		}
	}
	for _, m := range keepers {
		m.mute.Store(false)
		m.mu.Lock()
		m.conn.Close()
		m.mu.Unlock()
	}
	for _, m := range keepers {
		for m.shown.Load() < abuseUnacknowledged && time.Now().Before(patience.Add(2*floodPatience)) {
			<-time.After(floodTick)
		}
	}
	return fmt.Sprintf("%d clients that acknowledged nothing: %d of %d messages each, closed as slow %.0f; %d acknowledgements of others and of nothing ignored; then all came, %d of them again",
		len(keepers), protocol.MaxUnacknowledged, abuseUnacknowledged, slow, ignored, c.repeated.Load())
}

// falseAcks acknowledges what the client never got: ids that there are not, and those of others. It is ignored, and counted.
func (c *crowd) falseAcks(generous []*member) (ignored int64) {
	const counted = "millrace_edge_ignored_acknowledgements_total"
	before := scrape(c.t, c.server.admin())[counted]
	conn, _ := c.server.mustLogin("mallory")
	sent := int64(0)
	for n := range floodSize(20, 1_000) {
		f := protocol.Frame{Kind: protocol.KindAcknowledge, Timestamp: 1}
		for range abuseIDsAtOnce {
			var id protocol.MessageID
			for i := range id {
				id[i] = byte(rand.Uint32())
			}
			f.IDs = append(f.IDs, id)
		}
		m := generous[n%len(generous)]
		m.mu.Lock()
		f.IDs[0] = m.lastID
		m.mu.Unlock()
		if err := wsutil.WriteClientBinary(conn, protocol.AppendBinary(nil, &f)); err != nil {
			c.t.Errorf("mallory: %v", err)
			return sent
		}
		sent += int64(len(f.IDs))
	}
	// The connection lives: what comes last is answered.
	if err := wsutil.WriteClientMessage(conn, ws.OpPing, []byte("alive?")); err != nil {
		c.t.Errorf("mallory: %v", err)
	}
	if err := conn.wantPong([]byte("alive?")); err != nil {
		c.t.Errorf("mallory: %v", err)
	}
	conn.Close()
	scrapeUntil(c.t, c.server.admin(), "false acknowledgements", func(v map[string]float64) bool { return v[counted] >= before+float64(sent) })
	return sent
}
