package backend

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"

	"millrace/protocol"
)

// TestOwner plays the transcripts in testdata/owner: what happens to an owner, and all that it wants done. After a change that
// is meant, write them anew and read the difference:
//
//	go test ./backend -run TestOwner -rewrite && git diff backend/testdata
//
// A message is written alice>bob#3@30: the third number of alice's block 0, at position 30; #2/3 is of block 2.
// A session is bob/phone:4, the fourth that was bound. Numbers and positions may be given as 3..6 and 30..60. The commands:
//
//	owner [acknowledge-ms=10000] [in-flight=N] [idle=N] [rows=N]
//	                                                      a new owner with limits; the first one need not be asked for
//	register USER DEVICE…                                 device rows become durable
//	bind USER DEVICE [draining] / unbind USER DEVICE      the route table
//	take FROM TO NUMBER… [at=N] [device=phone] [epoch=1] [resend] [read-back] [id=N]
//	                                                      records become durable at the next positions and are taken; read-back: from
//	                                                      the log, not straight from their submission; id: as if it were number N
//	again FROM TO NUMBER at=N                             a record is given again
//	retake                                                what could not be taken is tried again
//	ack|refuse|lost USER DEVICE POSITION… [other-id]      outcomes; device - is the user's mailbox
//	resettle                                              outcomes that could not be settled are tried again
//	tick MS                                               time passes, or goes back
//	flush                                                 a commit is given out
//	apply                                                 the oldest is in the store, and the owner does not know it
//	committed [N]                                         the oldest is durable
//	crash [behind=N]                                      what is not applied is lost; a new owner replays the log, but for the last N
//	catch-up                                              it replays the rest
//	fail|heal READ…                                       window, devices, receipt, outstanding or mailbox cannot be read
//	steal USER DEVICE POSITION by=USER                    a mailbox row turns up in another mailbox
//	rows / status                                         what is in the store / what the owner says of itself
func TestOwner(t *testing.T) {
	datadriven.Walk(t, "testdata/owner", func(t *testing.T, path string) {
		p := &play{twin: newTwin(), nowMs: 1000, byPosition: map[uint64]protocol.MessageID{}}
		p.start(OwnerConfig{})
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			p.out.Reset()
			p.command(t, d)
			p.actions()
			p.violations()
			return p.out.String()
		})
	})
}

// play is one transcript under way.
type play struct {
	*twin
	owner      *Owner
	cfg        OwnerConfig
	nowMs      int64
	byPosition map[uint64]protocol.MessageID
	given      []*Commit // not durable
	applied    int       // of given
	waiting    []*Record // read and not taken
	behind     []*Record // not read yet by a new owner
	unsettled  []Settlement
	out        strings.Builder
}

func (p *play) start(cfg OwnerConfig) {
	cfg.Reader, cfg.Locator = p.twin, p.twin
	p.cfg = cfg
	p.owner, _ = NewOwner(cfg)
}

func (p *play) printf(format string, args ...any) { fmt.Fprintf(&p.out, format+"\n", args...) }

func (p *play) command(t *testing.T, d *datadriven.TestData) {
	var words []string
	for _, arg := range d.CmdArgs {
		if len(arg.Vals) == 0 {
			words = append(words, arg.Key)
		}
	}
	option := func(key string, otherwise int) int {
		d.MaybeScanArgs(t, key, &otherwise)
		return otherwise
	}
	switch d.Cmd {
	case "owner":
		p.start(OwnerConfig{AcknowledgeMillis: int64(option("acknowledge-ms", 0)), MaxInFlight: option("in-flight", 0),
			MaxIdleConversations: option("idle", 0), MaxCommitRows: option("rows", 0)})
	case "register":
		for _, device := range words[1:] {
			p.Register(Stream{words[0], device, 1}, func(_ uint32, heir bool, _ protocol.Refusal) {
				if heir {
					p.printf("%s is the heir", device)
				}
			})
		}
	case "bind":
		p.bind(words[0], words[1], len(words) == 2)
	case "unbind":
		p.unbind(words[0], words[1])
	case "take":
		p.take(t, d, words)
	case "again":
		p.again(t, words, uint64(option("at", 0)))
	case "retake":
		p.retake()
	case "ack":
		p.settle(t, protocol.Acknowledged, words)
	case "refuse":
		p.settle(t, protocol.Refused, words)
	case "lost":
		p.settle(t, protocol.Lost, words)
	case "resettle":
		p.resettle()
	case "tick":
		p.nowMs += milliseconds(t, words[0])
		p.owner.Tick(p.nowMs)
	case "flush":
		p.flush()
	case "apply":
		p.twin.apply(p.given[p.applied])
		p.applied++
	case "committed":
		for range number(t, append(words, "1")[0]) {
			p.committed()
		}
	case "crash":
		p.crash(option("behind", 0))
	case "catch-up":
		p.waiting, p.behind = p.behind, nil
		p.retake()
		p.owner.CaughtUp()
	case "fail", "heal":
		for _, read := range words {
			p.twin.fail(read, d.Cmd == "fail")
		}
	case "steal":
		from, to := mailboxName{words[0], words[1]}, mailboxName{"", words[1]}
		d.ScanArgs(t, "by", &to.user)
		i, _ := p.row(MailboxKey{from.user, from.device, number(t, words[2]), p.byPosition[number(t, words[2])]})
		p.mailboxes[to] = append(p.mailboxes[to], p.mailboxes[from][i])
	case "rows":
		p.rows()
	case "status":
		p.status()
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
}

func number(t *testing.T, word string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func milliseconds(t *testing.T, word string) int64 {
	t.Helper()
	ms, err := strconv.ParseInt(word, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return ms
}

// expand writes 3..6 as 3 4 5 6, and 30..60 as 30 40 50 60 when step is 10.
func expand(t *testing.T, words []string, step uint64) (all []string) {
	t.Helper()
	for _, word := range words {
		from, to, ok := strings.Cut(word, "..")
		if !ok {
			all = append(all, word)
			continue
		}
		for n := number(t, from); n <= number(t, to); n += step {
			all = append(all, strconv.FormatUint(n, 10))
		}
	}
	return all
}

// parseSeq reads 3 or 2/3.
func parseSeq(t *testing.T, word string) uint64 {
	t.Helper()
	block, n, ok := strings.Cut(word, "/")
	if !ok {
		block, n = "0", word
	}
	return seqOf(uint32(number(t, block)), uint32(number(t, n)))
}

func seqText(seq uint64) string {
	if block := protocol.SeqBlock(seq); block != 0 {
		return fmt.Sprintf("%d/%d", block, protocol.SeqSend(seq))
	}
	return fmt.Sprint(seq)
}

// idFor is an id as an Identity makes it: a function of the stream, the conversation and the number.
func idFor(r *Record) (id protocol.MessageID) {
	copy(id[:], r.Sender+r.Receiver+r.Device)
	binary.BigEndian.PutUint64(id[8:], r.Seq^r.Epoch<<56)
	return id
}

func text(m *protocol.Message) string { return string(m.Content) }

func (p *play) take(t *testing.T, d *datadriven.TestData, words []string) {
	at := p.last
	d.MaybeScanArgs(t, "at", &at)
	if at != p.last {
		at -= twinGap
	}
	device, epoch := "phone", uint64(1)
	d.MaybeScanArgs(t, "device", &device)
	d.MaybeScanArgs(t, "epoch", &epoch)
	resend, readBack := d.HasArg("resend"), d.HasArg("read-back")
	for _, word := range expand(t, words[2:], 1) {
		if word == "resend" || word == "read-back" {
			continue
		}
		at += twinGap
		r := &Record{Message: protocol.Message{Conversation: protocol.ConversationHash(words[0], words[1]), Position: at,
			Sender: words[0], Receiver: words[1]}, Device: device, Epoch: epoch, Seq: parseSeq(t, word), Resend: resend}
		if !readBack {
			r.From = protocol.Session{Edge: 1, Conn: 1}
		}
		r.ID = idFor(r)
		if d.HasArg("id") {
			other := *r
			d.ScanArgs(t, "id", &other.Seq)
			r.ID = idFor(&other)
		}
		r.Content = fmt.Appendf(nil, "%s>%s#%s@%d", r.Sender, r.Receiver, seqText(r.Seq), at)
		p.byPosition[at] = r.ID
		p.log = append(p.log, r)
		p.waiting = append(p.waiting, r)
	}
	p.last = max(p.last, at)
	p.retake()
}

func (p *play) again(t *testing.T, words []string, at uint64) {
	seq := parseSeq(t, words[2])
	for _, r := range p.log {
		if r.Sender == words[0] && r.Receiver == words[1] && r.Seq == seq {
			double := *r
			if at != 0 {
				double.Position = at
			}
			p.waiting = append(p.waiting, &double)
			break
		}
	}
	p.retake()
}

func (p *play) retake() {
	before := *p.owner.Stats()
	n, err := p.owner.Take(p.nowMs, p.waiting)
	if err != nil {
		p.printf("took %d of %d: %v", n, len(p.waiting), err)
	}
	p.waiting = p.waiting[n:]
	if doubles := p.owner.Stats().Duplicates - before.Duplicates; doubles > 0 {
		p.printf("%d new, %d known", p.owner.Stats().Taken-before.Taken, doubles)
	}
}

func (p *play) settle(t *testing.T, kind protocol.OutcomeKind, words []string) {
	other := words[len(words)-1] == "other-id"
	if other {
		words = words[:len(words)-1]
	}
	for _, word := range expand(t, words[2:], twinGap) {
		s := Settlement{Kind: kind, User: words[0], Position: number(t, word)}
		if words[1] != "-" {
			s.Device = words[1]
		}
		s.ID = p.byPosition[s.Position]
		if other {
			s.ID[15] ^= 1
		}
		p.unsettled = append(p.unsettled, s)
	}
	p.resettle()
}

func (p *play) resettle() {
	before := p.owner.Stats().Ignored
	p.unsettled = p.unsettled[:p.owner.Settle(p.unsettled)]
	if n := len(p.unsettled); n > 0 {
		p.printf("%d not settled", n)
	}
	if n := p.owner.Stats().Ignored - before; n > 0 {
		p.printf("%d ignored", n)
	}
}

// actions prints what the owner wants done, and forgets it.
func (p *play) actions() {
	a := p.owner.Actions()
	for _, s := range a.Notices {
		p.printf("notice to %s", p.names[s])
	}
	for _, push := range a.Pushes {
		p.printf("push %s to %s", text(push.Message), p.names[push.To])
		if _, device, _ := strings.Cut(p.names[push.To], "/"); !strings.HasPrefix(device, push.Device+":") {
			p.printf("  of device %s?", push.Device)
		}
	}
	for _, r := range a.Receipts {
		p.printf("receipt to %s: %s has all up to #%s@%d of %s, since %d ms", p.names[r.To], r.Receiver, seqText(r.Seq), r.Position, r.Device, r.Millis)
	}
	p.owner.ClearActions()
}

func (p *play) violations() {
	for promise, n := range p.owner.Stats().Violations {
		if n > 0 {
			p.printf("BROKEN %s: %d", Promise(promise), n)
		}
	}
}

func (p *play) flush() {
	if !p.owner.Dirty() {
		if p.owner.Flush(p.nowMs) != nil {
			p.printf("a commit although it is not dirty")
		}
		p.printf("nothing")
		return
	}
	c := p.owner.Flush(p.nowMs)
	p.given = append(p.given, c)
	urgent := ""
	if c.Urgent {
		urgent = " at once"
	}
	p.printf("commit%s, low water %d", urgent, c.LowWater)
	for _, row := range c.Mailbox {
		from := "given"
		if row.Record == nil {
			from = "from the log"
		}
		p.printf("  mailbox %s/%s: @%d, %s", row.User, dash(row.Device), row.Position, from)
	}
	for _, row := range c.Outstanding {
		p.printf("  outstanding in %s for %s: #%s@%d", key(row.Conversation), row.Addressee, seqText(row.Seq), row.Position)
	}
	for _, row := range c.Receipts {
		p.printf("  receipt %s", receiptText(&row))
	}
	for _, row := range c.Settled {
		p.printf("  settled in %s for %s: @%d", key(row.Conversation), row.Addressee, row.Position)
	}
	for _, row := range c.Acknowledged {
		p.printf("  delete %s/%s: @%d", row.User, dash(row.Device), row.Position)
	}
	for _, row := range c.Windows {
		p.printf("  window %s", windowText(&row))
	}
}

func dash(device string) string {
	if device == "" {
		return "-"
	}
	return device
}

func key(conversation string) string { return strings.ReplaceAll(conversation, "\x00", "+") }

func receiptText(row *ReceiptRow) string {
	return fmt.Sprintf("%s to %s: all up to @%d, some up to @%d, since %d ms", row.Sender, row.Addressee, row.Delivered.Position, row.Top.Position, row.ChangedMs)
}

// windowText lists the numbers that are finished.
func windowText(row *WindowRow) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%s", row.User, row.Device)
	if row.Epoch != 1 {
		fmt.Fprintf(&b, ", epoch %d,", row.Epoch)
	}
	fmt.Fprintf(&b, " in %s:", key(row.Conversation))
	for _, block := range row.Blocks {
		for i := windowSpan - 1; i >= 0; i-- {
			if block.Highest > uint32(i) && block.Bits>>i&1 == 1 {
				fmt.Fprintf(&b, " #%s", seqText(seqOf(block.Block, block.Highest-uint32(i))))
			}
		}
	}
	return b.String()
}

func (p *play) committed() {
	if len(p.given) == 0 {
		p.printf("none is under way")
		return
	}
	if p.applied > 0 {
		p.applied--
	} else {
		p.twin.apply(p.given[0])
	}
	p.given = p.given[1:]
	p.owner.Committed()
}

func (p *play) crash(behind int) {
	p.given, p.applied, p.unsettled = nil, 0, nil
	p.cfg.Replay = behind > 0
	p.start(p.cfg)
	p.waiting = nil
	for _, r := range p.log {
		if r.Position >= p.lowWater {
			back := *r
			back.From, back.Resend = protocol.Session{}, false
			p.waiting = append(p.waiting, &back)
		}
	}
	p.printf("%d records to replay", len(p.waiting))
	p.behind = slices.Clone(p.waiting[len(p.waiting)-behind:])
	p.waiting = p.waiting[:len(p.waiting)-behind]
	p.retake()
}

func (p *play) rows() {
	var lines []string
	for name, rows := range p.mailboxes {
		for _, r := range rows {
			lines = append(lines, fmt.Sprintf("mailbox %s/%s: %s", name.user, dash(name.device), text(&r.Message)))
		}
	}
	for _, row := range p.outstanding {
		lines = append(lines, fmt.Sprintf("outstanding in %s for %s: #%s@%d", key(row.Conversation), row.Addressee, seqText(row.Seq), row.Position))
	}
	for _, row := range p.receipts {
		lines = append(lines, "receipt "+receiptText(&row))
	}
	for k, row := range p.windows {
		lines = append(lines, "window "+windowText(&WindowRow{k, row}))
	}
	slices.Sort(lines)
	for _, line := range append(lines, fmt.Sprintf("low water %d", p.lowWater)) {
		p.printf("%s", line)
	}
}

func (p *play) status() {
	st := p.owner.Stats()
	p.printf("in flight %d, room %d, uncommitted %d, dirty %v, urgent %v, %d conversations in memory",
		p.owner.InFlight(), p.owner.Room(), p.owner.Uncommitted(), p.owner.Dirty(), p.owner.Urgent(), len(p.owner.convs))
	p.printf("taken %d, known %d, pushed %d, acknowledged %d, ignored %d, notices %d, receipts %d, commits %d, failed reads %d",
		st.Taken, st.Duplicates, st.Pushed, st.Acknowledged, st.Ignored, st.Notices, st.Receipts, st.Commits, st.ReadErrors)
	overlays := 0 // what the store may not show yet
	for _, conv := range p.owner.convs {
		for _, rc := range conv.receipts {
			overlays += len(rc.left) + len(rc.settled)
		}
	}
	if overlays > 0 {
		p.printf("outstanding rows under way %d", overlays)
	}
	var reasons []string
	for r, n := range st.Mailboxed {
		if n > 0 {
			reasons = append(reasons, fmt.Sprintf("%s %d", MailboxReason(r), n))
		}
	}
	p.printf("to mailboxes: %s", strings.Join(reasons, ", "))
}
