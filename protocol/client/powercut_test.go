package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"millrace/protocol"
)

// cutDisk is a disk in memory that knows what a power cut would leave: of a file what was synced, and of the rest any part;
// of the names those of the last sync of the directory, or those of now. After every change it calls changed.
type cutDisk struct {
	mu      sync.Mutex
	names   map[string]*cutInode
	durable map[string]*cutInode // of the last syncDirectory
	changed func()               // with mu held
}

type cutInode struct {
	content []byte
	synced  []byte
	pending []cutWrite // since the sync
}

// cutWrite is a write, or a truncation if data is nil.
type cutWrite struct {
	at   int64
	data []byte
}

func (w cutWrite) apply(content []byte) []byte {
	if w.data == nil {
		return append(content[:min(w.at, int64(len(content)))], make([]byte, max(0, w.at-int64(len(content))))...)
	}
	if end := w.at + int64(len(w.data)); end > int64(len(content)) {
		content = append(content, make([]byte, end-int64(len(content)))...)
	}
	copy(content[w.at:], w.data)
	return content
}

func newCutDisk() *cutDisk {
	return &cutDisk{names: map[string]*cutInode{}, durable: map[string]*cutInode{}, changed: func() {}}
}

func (d *cutDisk) lock(string) (io.Closer, error) { return io.NopCloser(nil), nil }

func (d *cutDisk) open(path string, flag int) (stateFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	inode := d.names[path]
	switch {
	case inode == nil && flag&os.O_CREATE == 0:
		return nil, fs.ErrNotExist
	case inode == nil:
		inode = &cutInode{}
		d.names[path] = inode
		d.changed()
	case flag&os.O_TRUNC != 0:
		inode.write(cutWrite{})
		d.changed()
	}
	return &cutHandle{disk: d, inode: inode}, nil
}

func (d *cutDisk) rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names[to] = d.names[from]
	delete(d.names, from)
	d.changed()
	return nil
}

func (d *cutDisk) syncDirectory(string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.durable = maps.Clone(d.names)
	d.changed()
	return nil
}

func (i *cutInode) write(w cutWrite) {
	i.content = w.apply(i.content)
	i.pending = append(i.pending, w)
}

type cutHandle struct {
	disk  *cutDisk
	inode *cutInode
	at    int64
}

func (h *cutHandle) Read(p []byte) (int, error) {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	n := copy(p, h.inode.content[min(h.at, int64(len(h.inode.content))):])
	h.at += int64(n)
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (h *cutHandle) Write(p []byte) (int, error) {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	h.inode.write(cutWrite{h.at, bytes.Clone(p)})
	h.at += int64(len(p))
	h.disk.changed()
	return len(p), nil
}

func (h *cutHandle) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekStart {
		return 0, errors.ErrUnsupported
	}
	h.at = offset
	return offset, nil
}

func (h *cutHandle) Truncate(size int64) error {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	h.inode.write(cutWrite{at: size})
	h.disk.changed()
	return nil
}

func (h *cutHandle) Sync() error {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	h.inode.synced, h.inode.pending = bytes.Clone(h.inode.content), nil
	h.disk.changed()
	return nil
}

func (h *cutHandle) Close() error { return nil }

// cutContents are the ways in which a power cut treats what was not synced.
var cutContents = map[string]func(i *cutInode) []cutWrite{
	"all lost":      func(*cutInode) []cutWrite { return nil },
	"all kept":      func(i *cutInode) []cutWrite { return i.pending },
	"only the last": func(i *cutInode) []cutWrite { return i.pending[max(0, len(i.pending)-1):] },
	"the last half": func(i *cutInode) []cutWrite {
		if len(i.pending) == 0 {
			return nil
		}
		torn := i.pending[len(i.pending)-1]
		if torn.data != nil {
			torn.data = torn.data[:len(torn.data)/2]
		}
		return append(slices.Clone(i.pending[:len(i.pending)-1]), torn)
	},
}

// cuts are the disks that a power cut may leave now; mu is held.
func (d *cutDisk) cuts(yield func(how string, after *cutDisk)) {
	for _, renamed := range []bool{false, true} {
		names := d.durable
		if renamed {
			names = d.names
		}
		for how, kept := range cutContents {
			after := newCutDisk()
			for name, inode := range names {
				content := bytes.Clone(inode.synced)
				for _, w := range kept(inode) {
					content = w.apply(content)
				}
				after.names[name] = &cutInode{content: content, synced: bytes.Clone(content)}
			}
			after.durable = maps.Clone(after.names)
			yield(fmt.Sprintf("unsynced: %s, new names: %v", how, renamed), after)
		}
	}
}

// copy is the same disk, which goes on by itself.
func (d *cutDisk) copy() *cutDisk {
	c := newCutDisk()
	inodes := map[*cutInode]*cutInode{}
	for _, names := range []map[string]*cutInode{d.names, d.durable} {
		for _, inode := range names {
			inodes[inode] = &cutInode{bytes.Clone(inode.content), bytes.Clone(inode.synced), slices.Clone(inode.pending)}
		}
	}
	for name, inode := range d.names {
		c.names[name] = inodes[inode]
	}
	for name, inode := range d.durable {
		c.durable[name] = inodes[inode]
	}
	return c
}

// ledger is what a client has led others to believe, by the text of a send. Whatever the power cut leaves must agree.
type ledger struct {
	t    *testing.T
	disk *cutDisk // its mu guards everything here
	cut  int      // points at which the power was cut

	taken   map[string]uint64 // Queue returned: the local name
	mayEnd  map[string]bool   // has been answered by the server, or is being withdrawn or given up
	gone    map[string]bool   // the application was told that it will not be delivered
	numbers map[string]uint64 // seen by the server
	stamps  map[string]int64
	stream  string                      // of these
	user    string                      // known
	read    map[protocol.MessageID]bool // acknowledged to the server, or to the application so long ago that it counts
}

func newLedger(t *testing.T) *ledger {
	l := &ledger{t: t, disk: newCutDisk(), taken: map[string]uint64{}, mayEnd: map[string]bool{}, gone: map[string]bool{},
		numbers: map[string]uint64{}, stamps: map[string]int64{}, read: map[protocol.MessageID]bool{}}
	l.disk.changed = l.check
	return l
}

// note records what somebody has come to believe, and cuts the power.
func (l *ledger) note(f func()) {
	l.disk.mu.Lock()
	defer l.disk.mu.Unlock()
	f()
	l.check()
}

// check cuts the power in every way; opening the state after that, a second cut comes after every step of the repair. And kill the process.
func (l *ledger) check() {
	l.cut++
	if l.t.Failed() {
		return // one point is enough to read
	}
	l.disk.cuts(func(how string, after *cutDisk) {
		opening := 0
		after.changed = func() {
			opening++
			after.cuts(func(again string, last *cutDisk) {
				l.open(last, fmt.Sprintf("%s; again at step %d of opening, %s", how, opening, again))
			})
		}
		l.open(after, how)
	})
	l.kill()
}

// kill ends the process: it has lost nothing, and what the next one reads and goes by is on stable storage.
func (l *ledger) kill() {
	next := l.disk.copy()
	l.open(next, "killed")
	read := func(d *cutDisk) (ids int, user string, items []Item, highest uint64) {
		st, items, highest, err := openState(d, cutPath, protocol.DefaultDevice, time.Now())
		if err != nil {
			l.t.Fatalf("killed at point %d: %v", l.cut, err)
		}
		return st.shown.len(), st.user, items, highest
	}
	ids, user, items, highest := read(next)
	next.cuts(func(how string, after *cutDisk) {
		ids2, user2, items2, highest2 := read(after)
		if ids2 != ids || user2 != user || !slices.Equal(items2, items) || highest2 != highest {
			l.t.Errorf("killed at point %d, and a power cut after the next opening (%s): %d ids, %+v, highest %d; read before: %d, %+v, %d",
				l.cut, how, ids2, items2, highest2, ids, items, highest)
		}
	})
}

func (l *ledger) open(d *cutDisk, how string) {
	bad := func(format string, args ...any) {
		l.t.Errorf("power cut %d (%s): %s", l.cut, how, fmt.Sprintf(format, args...))
	}
	st, items, highest, err := openState(d, cutPath, protocol.DefaultDevice, time.Now())
	if err != nil {
		bad("%v", err)
		return
	}
	open := map[string]Item{}
	for _, it := range items {
		open[it.Text] = it
		switch seq, written := l.numbers[it.Text]; {
		case l.gone[it.Text]:
			bad("%q comes back, and the application was told that it will not be delivered", it.Text)
		case written && (it.Seq != seq || it.QueuedMs != l.stamps[it.Text]):
			bad("%q would be sent again as %d at %d, was %d at %d", it.Text, it.Seq, it.QueuedMs, seq, l.stamps[it.Text])
		}
	}
	for text, local := range l.taken {
		if _, ok := open[text]; !ok && !l.mayEnd[text] {
			bad("%q, which Queue took, is lost", text)
		}
		if local >= st.nextLocal {
			bad("the local name %d of %q would be given again", local, text)
		}
	}
	for text, seq := range l.numbers {
		if _, ok := open[text]; !ok && !l.mayEnd[text] {
			bad("%q has gone out and is lost", text)
		}
		if seq > highest {
			bad("number %d has gone out, %d is the highest known", seq, highest)
		}
	}
	if stream := fmt.Sprintf("alice/%s/%016x", protocol.DefaultDevice, st.epoch); l.stream != "" && stream != l.stream {
		bad("the stream is %s, was %s", stream, l.stream)
	}
	if l.user != "" && st.user != l.user {
		bad("the state is of user %q, was of %q", st.user, l.user)
	}
	for id := range l.read {
		if !st.shown.has(id) {
			bad("message %x would be shown again", id[:2])
		}
	}
}

const cutPath = "folder/state"

// cutClient is a client whose disk loses power at every step, and the server that sees what it sends.
type cutClient struct {
	*Client
	l *ledger
}

func (l *ledger) dial(s *fakeServer) cutClient {
	o := s.options("alice")
	o.StatePath = cutPath
	o.Background = true
	o.OnEvent = func(e Event) {
		if a, ok := e.(Answered); ok && a.Err != nil {
			l.note(func() { l.gone[a.Text] = true })
		}
	}
	if err := o.validate(); err != nil {
		l.t.Fatal(err)
	}
	c, err := dial(l.t.Context(), &o, l.disk)
	if err != nil {
		l.t.Fatal(err)
	}
	return cutClient{c, l}
}

func (c cutClient) queue(texts ...string) {
	for _, text := range texts {
		p, err := c.Queue(c.l.t.Context(), "bob", text)
		if err != nil {
			c.l.t.Fatal(err)
		}
		c.l.note(func() { c.l.taken[text] = p.Local })
	}
}

// inside runs f on the client's goroutine, in a turn of its own.
func (c cutClient) inside(f func(r *runner)) {
	err := c.do(c.l.t.Context(), func(r *runner, reply func(error)) { f(r); r.after(func() { reply(r.state.err) }) })
	if err != nil {
		c.l.t.Fatal(err)
	}
	synctest.Wait()
}

// cutServer answers by the text: "full" is refused for good, "slow" once for now, "mute" not at all. While down it refuses connections.
type cutServer struct {
	*fakeServer
	mu   sync.Mutex
	down bool
}

func (l *ledger) serve(s *fakeServer) *cutServer {
	cs := &cutServer{fakeServer: s}
	s.onUpgrade = func(int) (int, http.Header) {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		if cs.down {
			return http.StatusServiceUnavailable, http.Header{"Retry-After": {"600"}}
		}
		return 0, nil
	}
	slowed := false
	s.onSend = func(c *fakeSession, f *protocol.Frame) bool {
		text, seq := string(f.Content), f.Seq
		kind := text[:4]
		l.note(func() {
			l.numbers[text], l.stamps[text], l.stream = seq, f.Timestamp, c.stream
			if kind == "full" || kind == "text" {
				l.mayEnd[text] = true // the client will know before anybody here does
			}
		})
		switch {
		case kind == "full":
			c.refuse(seq, protocol.CodeMailboxFull, 0, 0)
		case kind == "slow" && !slowed:
			slowed = true
			c.refuse(seq, protocol.CodeOverloaded, 200, seq)
		case kind == "mute":
		default:
			l.note(func() { l.mayEnd[text] = true })
			return false
		}
		return true
	}
	s.onAcknowledge = func(id protocol.MessageID) { l.note(func() { l.read[id] = true }) }
	return cs
}

func (s *cutServer) setDown(down bool) {
	s.mu.Lock()
	s.down = down
	s.mu.Unlock()
	if down {
		s.dropAll()
	}
}

// TestPowerCuts cuts the power after every step that a client makes on its disk, and whenever it has told somebody something: what
// was told stays true.
func TestPowerCuts(t *testing.T) {
	bubble(t, func(t *testing.T, fake *fakeServer) {
		l := newLedger(t)
		s := l.serve(fake)
		settle := func() { time.Sleep(time.Second); synctest.Wait() }
		compact := func(c cutClient) { c.inside(func(r *runner) { r.state.compactAt = 0 }) }

		c := l.dial(fake)
		settle()
		l.note(func() { l.user = c.User() })
		c.queue("text 1", "full 1", "slow 1", "text 2")
		settle()
		compact(c) // nothing is open: only the counters know what was given

		// Queued offline, one withdrawn, and numbered later without anything else to store.
		s.setDown(true)
		settle()
		c.queue("text 3")
		l.note(func() { l.mayEnd["back 1"] = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if _, err := c.Send(ctx, "bob", "back 1"); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUndecided) {
			t.Fatalf("withdrawn: %v", err)
		}
		cancel()
		l.note(func() { l.gone["back 1"] = true })
		c.queue("full 2")
		s.setDown(false)
		time.Sleep(11 * time.Minute)
		synctest.Wait()

		// Messages come, the last one's acknowledgement travels with a send.
		for i := range 3 {
			fake.give("bob", "alice", fmt.Sprint(i))
			m := mustReceive(t, c.Client)
			mustAcknowledge(t, c.Client, m)
			if i == 2 {
				c.queue("text 4")
			}
			time.Sleep(2 * AcknowledgeDelay)
			synctest.Wait()
			l.note(func() { l.read[m.ID] = true })
		}
		c.queue("mute 1", "mute 2")
		settle()
		compact(c) // with open ones
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}

		// The next process gives up after 30 days what nobody answers.
		s.setDown(true)
		c = l.dial(fake)
		c.queue("text 5")
		l.note(func() {
			for _, text := range []string{"mute 1", "mute 2", "text 5"} {
				l.mayEnd[text] = true
			}
		})
		time.Sleep(UnansweredAfter + time.Hour)
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}

		l.disk.mu.Lock()
		defer l.disk.mu.Unlock()
		for _, text := range []string{"full 1", "full 2", "back 1", "mute 1", "mute 2", "text 5"} {
			if !l.gone[text] {
				t.Errorf("%q has not ended", text)
			}
		}
		if len(l.numbers) != 9 || len(l.read) != 3 || l.cut < 100 {
			t.Fatalf("%d numbers went out, %d messages were read, the power was cut at %d points", len(l.numbers), len(l.read), l.cut)
		}
	})
}

// TestEndsThatCouldNotBeStored: when the disk fails, nobody is told that a message will not be delivered; the next process may deliver it.
func TestEndsThatCouldNotBeStored(t *testing.T) {
	for name, send := range map[string]func(t *testing.T, s *fakeServer, c *Client) error{
		"refused": func(t *testing.T, s *fakeServer, c *Client) error {
			s.onSend = func(f *fakeSession, send *protocol.Frame) bool {
				breakDisk(t, c)
				f.refuse(send.Seq, protocol.CodeMailboxFull, 0, 0)
				return true
			}
			_, err := c.Send(t.Context(), "bob", "x")
			return err
		},
		"withdrawn": func(t *testing.T, s *fakeServer, c *Client) error {
			s.onUpgrade = func(int) (int, http.Header) { return http.StatusServiceUnavailable, nil }
			s.dropAll()
			synctest.Wait()
			p, err := c.Queue(t.Context(), "bob", "x")
			if err != nil {
				return err
			}
			breakDisk(t, c)
			if err := c.withdraw(p); !errors.Is(err, errDisk) {
				t.Errorf("withdraw: %v", err)
			}
			_, err = p.Wait(t.Context())
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *fakeServer) {
				var events recorder
				o := s.options("alice")
				o.OnEvent, o.StatePath = events.on, cutPath
				if err := o.validate(); err != nil {
					t.Fatal(err)
				}
				d := newCutDisk()
				c, err := dial(t.Context(), &o, d)
				if err != nil {
					t.Fatal(err)
				}
				if err := send(t, s, c); !errors.Is(err, errDisk) {
					t.Errorf("the send ended with %v, want the failure of the disk", err)
				}
				if err := c.Close(); !errors.Is(err, errDisk) {
					t.Errorf("close: %v", err)
				}
				if told := eventsOf[Answered](&events); len(told) != 0 {
					t.Errorf("events %+v", told)
				}
			})
		})
	}
}

// breakDisk lets the next sync of a client's state fail.
func breakDisk(t *testing.T, c *Client) {
	err := c.do(t.Context(), func(r *runner, reply func(error)) {
		r.state.file = &failingFile{stateFile: r.state.file, failSync: true}
		reply(nil)
	})
	if err != nil {
		t.Error(err)
	}
}
