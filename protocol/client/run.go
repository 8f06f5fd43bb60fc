package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"millrace/protocol"
)

// Limits of the client's goroutine.
const (
	maxTurn        = 256              // commands and connection events taken in one turn, so that they share one sync
	eventBacklog   = 16               // WebSocket messages between reader and client; beyond, TCP holds the server back
	goAwayPatience = 10 * time.Second // how long a server may take to close after go_away

	// pingPercent of the heartbeat without a byte make the client ask for one; the server's own ping comes at 100.
	pingPercent = 125
	deadPercent = 200
)

// runner is the client's goroutine: it owns everything below, turns commands and connection events into changes of
// the pure parts, and does what they ask: store first, answer, then write.
type runner struct {
	client  *Client
	options *Options
	life    context.Context // ends with Close
	state   *state
	outbox  *Outbox
	inbox   *inbox
	events  *eventQueue
	backoff backoff
	fromNet chan connEvent
	wg      sync.WaitGroup // of the goroutines of connections

	waiters  map[uint64]*Pending
	drainers []chan struct{}

	// Of this turn.
	replies []func() // run after the commit
	sync    bool     // what was noted must be on stable storage before the replies

	syncBy time.Time // when acknowledged ids must be on stable storage; zero: they are
	final  error     // no more connections

	conn       *conn // nil: waiting for retryAt
	live       bool  // connected has come
	retryAt    time.Time
	token      string
	freshToken bool // token was made for this attempt
	newToken   bool // ask for one before the next attempt
	renewing   bool // the token source has been asked on behalf of this connection
	begun      time.Time
	liveSince  time.Time
	heartbeat  time.Duration
	pinged     bool
	told       *serverFrame // the last error that was not about a send
	goAwayMs   uint32
	leaveAt    time.Time // zero, or when to stop waiting for the server to close

	wake time.Time // the earliest deadline found in this turn
}

func newRunner(life context.Context, c *Client, o *Options, st *state, items []Item, highest uint64) *runner {
	r := &runner{
		client: c, options: o, life: life, state: st,
		outbox:   NewOutbox(o.MaxOutbox),
		inbox:    newInbox(st.shown),
		events:   newEventQueue(o.OnEvent),
		backoff:  backoff{min: o.MinBackoff, max: o.MaxBackoff},
		fromNet:  make(chan connEvent, eventBacklog),
		waiters:  make(map[uint64]*Pending),
		newToken: true,
	}
	r.outbox.Restore(items, highest)
	return r
}

func (r *runner) run() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for r.life.Err() == nil {
		var offer chan<- Message
		var head Message
		if len(r.inbox.queue) > 0 && r.final == nil {
			offer, head = r.client.messages, r.inbox.queue[0]
		}
		select {
		case <-r.life.Done():
		case f := <-r.client.commands:
			f(r)
		case ev := <-r.fromNet:
			r.heard(ev)
		case offer <- head:
			r.inbox.taken()
		case <-timer.C:
		}
		r.more()
		r.turn(time.Now())
		if r.wake.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(r.wake))
		}
	}
	r.shutdown()
}

// more takes what else is ready.
func (r *runner) more() {
	for range maxTurn {
		select {
		case f := <-r.client.commands:
			f(r)
		case ev := <-r.fromNet:
			r.heard(ev)
		default:
			return
		}
	}
}

// turn does everything that is due: first what must be stored, then the replies, then the network.
func (r *runner) turn(now time.Time) {
	r.wake = time.Time{}
	for _, it := range r.outbox.Expire(now) {
		r.ended(it, Sent{}, ErrUnanswered)
	}
	r.wakeAt(r.outbox.NextExpiry())
	r.advance(now)
	var step Step
	acks := 0
	if r.live {
		step = r.outbox.Next(now)
		r.wakeAt(step.Wake)
		for _, it := range step.Number {
			r.state.numbered(it)
			r.sync = true
		}
		acks = r.dueAcks(now, len(step.Write) > 0)
	}
	r.settleReceipts()
	r.commit(now, acks > 0)
	r.reply()
	if r.live {
		r.write(step.Write, acks, now)
		r.obey(step, now)
	}
	if r.outbox.Len() == 0 {
		for _, empty := range r.drainers {
			close(empty)
		}
		r.drainers = nil
	}
	if err := r.state.compact(r.outbox); err != nil {
		r.end(err, now)
	}
}

func (r *runner) wakeAt(t time.Time) {
	if !t.IsZero() && (r.wake.IsZero() || t.Before(r.wake)) {
		r.wake = t
	}
}

// commit writes what this turn noted. Ids may leave as acknowledgements only when they are on stable storage, and are
// there within AcknowledgeDelay, connected or not.
func (r *runner) commit(now time.Time, acks bool) {
	sync := r.sync || acks || !r.syncBy.IsZero() && !now.Before(r.syncBy)
	r.sync = false
	if sync {
		r.syncBy = time.Time{}
	}
	r.wakeAt(r.syncBy)
	if err := r.state.commit(sync); err != nil {
		r.end(err, now)
	}
}

// after runs f when this turn's changes are written.
func (r *runner) after(f func()) { r.replies = append(r.replies, f) }

func (r *runner) reply() {
	for i, f := range r.replies {
		f()
		r.replies[i] = nil
	}
	r.replies = r.replies[:0]
}

// queue takes a send; it stands behind Client.Queue.
func (r *runner) queue(p *Pending, receiver, text string, reply func(error)) {
	if r.final != nil {
		reply(r.final)
		return
	}
	it := Item{Local: r.state.nextLocal, Receiver: receiver, Text: text, QueuedMs: time.Now().UnixMilli()}
	if !r.outbox.Add(it) {
		reply(ErrOutboxFull)
		return
	}
	r.state.nextLocal++
	p.Local = it.Local
	r.waiters[it.Local] = p
	r.state.queued(&it)
	r.sync = true
	r.after(func() { reply(r.state.err) })
}

// withdraw stands behind Client.Send. That a send was taken back is told when a power cut cannot bring it back.
func (r *runner) withdraw(local uint64, reply func(error)) {
	if !r.outbox.Withdraw(local) {
		reply(ErrUndecided)
		return
	}
	r.state.ended(local)
	r.sync = true
	r.after(func() {
		delete(r.waiters, local) // after a failed commit it has got the error already
		reply(r.state.err)
	})
}

func (r *runner) acknowledge(messages []Message, reply func(error)) {
	now := time.Now()
	for _, m := range messages {
		if e := shownOf(m, now); r.inbox.acknowledged(e, now) {
			r.state.showed(e)
			if r.syncBy.IsZero() {
				r.syncBy = now.Add(AcknowledgeDelay)
			}
		}
	}
	if !r.live {
		r.inbox.disconnected() // only the connection that pushed can take them
	}
	r.after(func() { reply(r.state.err) })
}

// advance makes connections come and go.
func (r *runner) advance(now time.Time) {
	switch {
	case r.final != nil:
	case r.conn == nil && !now.Before(r.retryAt):
		r.connect(now)
	case r.conn == nil:
		r.wakeAt(r.retryAt)
	case !r.live:
		r.deadline(now, r.begun.Add(ConnectTimeout+TokenTimeout), "the server did not answer in time")
	default:
		r.watch(now)
	}
}

// deadline leaves the connection at due.
func (r *runner) deadline(now, due time.Time, why string) {
	if now.Before(due) {
		r.wakeAt(due)
		return
	}
	r.leave(errors.New(why), now)
}

// watch keeps an eye on a living connection: heartbeats, a server that goes away and does not, room for dropped pushes.
func (r *runner) watch(now time.Time) {
	silence := r.conn.silence()
	ask, dead := r.heartbeat*pingPercent/100, r.heartbeat*deadPercent/100
	switch {
	case silence >= dead:
		r.leave(fmt.Errorf("nothing came from the server for %v", dead), now)
		return
	case silence < ask:
		r.pinged = false
		r.wakeAt(now.Add(ask - silence))
	default:
		if !r.pinged {
			r.pinged = true
			r.conn.ping()
		}
		r.wakeAt(now.Add(dead - silence))
	}
	if r.inbox.wantsReconnect() {
		r.leave(errors.New("messages that found no room must be sent again"), now)
		return
	}
	if !r.leaveAt.IsZero() {
		r.deadline(now, r.leaveAt, "the server said that it goes away and did not")
	}
}

// connect begins an attempt.
func (r *runner) connect(now time.Time) {
	r.conn = newConn(r.life, r.options, r.fromNet)
	r.begun, r.live, r.told, r.goAwayMs, r.leaveAt = now, false, nil, 0, time.Time{}
	r.freshToken, r.renewing = false, false
	r.events.connecting()
	source := r.options.Token
	if !r.newToken {
		source = nil
	}
	hello := protocol.Frame{
		Kind:          protocol.KindConnect,
		Device:        []byte(r.options.Device),
		Epoch:         r.state.epoch,
		ReceiptsAfter: r.state.receiptsAfter,
	}
	r.wakeAt(now.Add(ConnectTimeout + TokenTimeout))
	c, token := r.conn, r.token
	r.wg.Go(func() { c.run(source, token, hello, &r.wg) })
}

// heard takes an event of a connection; those of an older one are late.
func (r *runner) heard(ev connEvent) {
	if ev.conn != r.conn || r.conn == nil {
		return
	}
	now := time.Now()
	if ev.token != "" {
		r.gotToken(ev.token)
	}
	if ev.renewed {
		r.renewing = false
	}
	for i := range ev.frames {
		r.frame(&ev.frames[i], now)
		if ev.conn != r.conn {
			return // it was left
		}
	}
	if ev.end != nil {
		r.disconnected(*ev.end, now)
	}
}

func (r *runner) gotToken(token string) {
	r.token, r.newToken, r.freshToken = token, false, true
	if r.live {
		r.conn.send([]protocol.Frame{{Kind: protocol.KindRenewToken, Token: []byte(token)}})
	}
}

// frame takes one frame from the server.
func (r *runner) frame(f *serverFrame, now time.Time) {
	if !r.live && f.Kind != protocol.KindConnected && f.Kind != protocol.KindError && f.Kind != protocol.KindGoAway {
		r.leave(errors.New("the server broke the protocol: a frame before connected"), now)
		return
	}
	switch f.Kind {
	case protocol.KindConnected:
		r.connected(f, now)
	case protocol.KindReceived:
		if it := r.outbox.Received(f.Seq); it != nil {
			sent := Sent{ID: f.ID, Position: f.Position, At: time.UnixMilli(f.Timestamp)}
			r.ended(it, sent, nil)
		}
	case protocol.KindError:
		r.refused(f, now)
	case protocol.KindIncoming:
		r.inbox.pushed(Message{f.ID, f.Position, f.Sender, f.Receiver, f.Content}, now)
	case protocol.KindReceipt:
		for _, d := range f.Receipts {
			r.events.add(Delivered{d.id, d.position, d.seq, d.receiver, time.UnixMilli(d.timestamp)})
		}
	case protocol.KindRenew:
		r.renew()
	case protocol.KindGoAway:
		r.goAwayMs = f.RetryAfterMs
		r.leaveAt = now.Add(goAwayPatience)
		r.outbox.GoingAway()
		r.events.add(GoingAway{millis(f.RetryAfterMs)})
	}
}

// connected checks that the server talks about this installation before anything is sent under its name.
func (r *runner) connected(f *serverFrame, now time.Time) {
	var err error
	switch {
	case r.live:
		err = errors.New("connected twice")
	case r.options.User != "" && f.User != r.options.User, r.state.user != "" && f.User != r.state.user:
		r.leave(fmt.Errorf("%w: %s", ErrWrongUser, f.User), now)
		return
	case f.Device != r.options.Device || f.Epoch != r.state.epoch:
		err = errors.New("another device or epoch than asked for")
	case !protocol.ValidSeq(f.Seq):
		err = fmt.Errorf("a first number of %d", f.Seq)
	}
	if err != nil {
		r.leave(fmt.Errorf("the server broke the protocol: %w", err), now)
		return
	}
	if r.state.user == "" {
		r.state.setUser(f.User)
		r.sync = true
	}
	r.live, r.liveSince, r.pinged = true, now, false
	r.heartbeat = time.Duration(f.HeartbeatSeconds) * time.Second
	if r.heartbeat == 0 {
		r.heartbeat = protocol.HeartbeatSeconds * time.Second
	}
	r.outbox.Connected(f.Seq)
	c := r.client
	c.mu.Lock()
	c.user, c.connected = f.User, true
	c.mu.Unlock()
	select {
	case <-c.first:
	default:
		close(c.first)
	}
	r.options.Logger.Info("connected", "user", f.User, "device", f.Device)
	r.events.add(Connected{f.User, f.Device})
}

// refused takes an error frame: about a send, or about the connection.
func (r *runner) refused(f *serverFrame, now time.Time) {
	if f.Seq != 0 {
		if it := r.outbox.Refused(f.Seq, f.Code, f.RetryAfterMs, f.ResendFrom, now); it != nil {
			r.ended(it, Sent{}, &RefusedError{Code: f.Code, Text: f.Text})
		}
		return
	}
	r.options.Logger.Warn("the server reports an error", "code", f.Code.String(), "text", f.Text)
	if r.live && f.Code == protocol.CodeUnauthorized {
		f.Code = protocol.CodeTokenExpired // it is the renewal that was refused; the connection was good
	}
	r.told = f
}

// renew gets a token for a living connection, one at a time however often the server asks.
func (r *runner) renew() {
	if r.renewing {
		return
	}
	r.renewing = true
	c, source := r.conn, r.options.Token
	r.wg.Go(func() {
		token, err := fetchToken(c.told, source)
		if err != nil {
			// The server will close with 4401, and then there is a retry with backoff.
			r.options.Logger.Warn("no token for the renewal", "error", err)
		}
		c.tell(connEvent{token: token, renewed: true})
	})
}

// ended ends a send: the application hears of it when the end is written. That it will not be delivered must be on stable storage
// before: after a power cut the number would be sent again, and perhaps be accepted beside what the application
// sent in its place. That it was delivered may be told earlier, since a resend changes nothing.
func (r *runner) ended(it *Item, sent Sent, err error) {
	sent.Local, sent.Number, sent.Receiver = it.Local, it.Seq, it.Receiver
	r.state.ended(it.Local)
	r.sync = r.sync || err != nil
	p := r.waiters[it.Local]
	delete(r.waiters, it.Local)
	text := it.Text
	r.after(func() {
		unsure := err != nil && r.state.err != nil // the next process may find it open
		if unsure {
			err = r.state.err
		}
		if p != nil {
			p.sent, p.err = sent, err
			close(p.done)
		}
		if !unsure {
			r.events.add(Answered{sent, text, err})
		}
	})
}

// dueAcks is how many acknowledgements must leave now.
func (r *runner) dueAcks(now time.Time, company bool) int {
	if r.inbox.due(now, company) {
		return len(r.inbox.acks)
	}
	if len(r.inbox.acks) > 0 {
		r.wakeAt(r.inbox.since.Add(AcknowledgeDelay))
	}
	return 0
}

// write sends acknowledgements and sends, which the commit has made safe.
func (r *runner) write(items []*Item, acks int, now time.Time) {
	frames := make([]protocol.Frame, 0, len(items)+1)
	for ids := range slices.Chunk(r.inbox.acks[:acks], MaxAcknowledgements) {
		frames = append(frames, protocol.Frame{Kind: protocol.KindAcknowledge, IDs: ids, Timestamp: now.UnixMilli()})
	}
	for _, it := range items {
		frames = append(frames, protocol.Frame{
			Kind:      protocol.KindSend,
			Seq:       it.Seq,
			Timestamp: it.QueuedMs,
			Receiver:  []byte(it.Receiver),
			Content:   []byte(it.Text),
		})
	}
	if len(frames) > 0 {
		r.conn.send(frames)
	}
	r.inbox.acks = r.inbox.acks[:copy(r.inbox.acks, r.inbox.acks[acks:])]
}

// obey does what a step asks beyond writing.
func (r *runner) obey(step Step, now time.Time) {
	switch {
	case step.NewEpoch:
		r.outbox.ResetEpoch()
		r.state.setEpoch(newEpoch())
		r.sync = true
		r.leave(errors.New("the server counts from below numbers that were used: starting a new epoch"), now)
	case step.Reconnect != "":
		r.leave(errors.New(step.Reconnect), now)
	}
}

// settleReceipts moves the time after which the next connect asks for receipts.
func (r *runner) settleReceipts() {
	if ms := r.events.settled(); ms > r.state.receiptsAfter {
		r.state.setReceiptsAfter(ms)
	}
}

// leave closes the connection from this side and comes back.
func (r *runner) leave(why error, now time.Time) {
	r.conn.finish(protocol.CloseNormal)
	r.disconnected(ending{err: why}, now)
}

// disconnected takes the end of a connection or an attempt and decides what follows.
func (r *runner) disconnected(end ending, now time.Time) {
	if r.live && now.Sub(r.liveSince) >= stableAfter {
		r.backoff.reset()
	}
	v := judge(end, r.told, r.goAwayMs, r.freshToken)
	r.detach()
	if v.final != nil {
		r.end(v.final, now)
		return
	}
	r.newToken = r.newToken || v.newToken
	delay := r.backoff.next(v.floor)
	r.retryAt = now.Add(delay)
	r.wakeAt(r.retryAt)
	r.client.mu.Lock()
	r.client.lastFailure = end.err
	r.client.mu.Unlock()
	r.options.Logger.Info("disconnected", "error", end.err, "retry_in", delay)
	r.events.add(Disconnected{Err: end.err, RetryIn: delay})
}

// detach forgets the connection; whatever it still does is not heard.
func (r *runner) detach() {
	if r.conn == nil {
		return
	}
	r.conn.stopTell()
	r.conn.killUnlessFinishing()
	r.conn, r.live = nil, false
	r.outbox.Disconnected()
	r.inbox.disconnected()
	r.client.mu.Lock()
	r.client.connected = false
	r.client.mu.Unlock()
}

// end makes the client final: nothing is sent or received any more. What was received can still be acknowledged.
func (r *runner) end(err error, now time.Time) {
	if r.final != nil {
		return
	}
	r.final = err
	r.detach()
	r.client.finish(err)
	for local, p := range r.waiters {
		p.err = err
		close(p.done)
		delete(r.waiters, local)
	}
	if !errors.Is(err, ErrClosed) {
		r.options.Logger.Error("the client has ended", "error", err)
		r.events.add(Disconnected{Err: err, Final: true})
	}
}

// finish publishes the final error.
func (c *Client) finish(err error) {
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	close(c.final)
}

// shutdown is the way out of run.
func (r *runner) shutdown() {
	r.more()
	now := time.Now()
	acks := len(r.inbox.acks)
	r.settleReceipts()
	err := r.state.commit(true)
	r.reply()
	if r.live && err == nil {
		r.write(nil, acks, now)
		r.conn.finish(protocol.CloseNormal)
	}
	r.end(ErrClosed, now)
	close(r.client.stopped)
	r.wg.Wait()
	err = r.state.close()
	r.events.close()
	r.client.mu.Lock()
	r.client.closeErr = err
	r.client.mu.Unlock()
	close(r.client.done)
}
