package edge

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
	"millrace/protocol/token"
)

// What a handshake and a frame cost on real sockets, beside a base line that is measured in turns with it, so that whatever else the
// machine does falls on both. Client and servers are processes of their own; what counts is the CPU of the server.

const (
	costRounds = 5 // of each kind, in turns

	handshakeWorkers = 16
	handshakesRound  = 4000

	frameConns  = 128
	framesRound = 100_000
)

// child is a server in a process of its own, see childMode.
type child struct {
	tb   testing.TB
	addr string
	ask  io.WriteCloser
	said *bufio.Reader
}

func startChild(tb testing.TB, mode string) *child {
	tb.Helper()
	program, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	server := exec.Command(program)
	server.Env = append(os.Environ(), childMode+"="+mode)
	server.Stderr = os.Stderr
	c := &child{tb: tb}
	if c.ask, err = server.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := server.Start(); err != nil {
		tb.Fatal(err)
	}
	c.said = bufio.NewReader(out)
	tb.Cleanup(func() {
		c.ask.Close() // it ends with its input
		_ = server.Wait()
	})
	c.addr = c.line()
	return c
}

func (c *child) line() string {
	line, err := c.said.ReadString('\n')
	if err != nil {
		c.tb.Fatalf("a server child ended: %v", err)
	}
	return strings.TrimSpace(line)
}

// usage is what the server has used until now.
func (c *child) usage() (u childUsage) {
	if _, err := io.WriteString(c.ask, "\n"); err != nil {
		c.tb.Fatal(err)
	}
	if _, err := fmt.Sscan(c.line(), &u.cpu, &u.allocs); err != nil {
		c.tb.Fatal(err)
	}
	return u
}

// cost is what a server used for n of something.
type cost struct {
	n      int
	cpu    time.Duration
	wall   time.Duration
	allocs uint64
}

// spend adds what f costs the server.
func (c *child) spend(sum *cost, n int, f func()) {
	before, begun := c.usage(), time.Now()
	f()
	after := c.usage()
	sum.n += n
	sum.wall += time.Since(begun)
	sum.cpu += after.cpu - before.cpu
	sum.allocs += after.allocs - before.allocs
}

func (c *cost) nanos() float64 { return float64(c.cpu.Nanoseconds()) / float64(c.n) }
func (c *cost) rate() float64  { return float64(c.n) / c.wall.Seconds() }
func (c *cost) each() float64  { return float64(c.allocs) / float64(c.n) }

// BenchmarkHandshake is a connection from accept to close: with an HS256 token in the request, or in a connect frame behind it (which
// costs another read and write), beside the least that an upgrade can be.
func BenchmarkHandshake(b *testing.B) {
	plain := costRequest("")
	withToken := costRequest("Authorization: Bearer " + costToken(b) + "\r\n")
	for _, c := range []struct {
		name    string
		request []byte
		connect bool
	}{{"token in the request", withToken, false}, {"token in connect", plain, true}} {
		b.Run(c.name, func(b *testing.B) {
			ours, base := startChild(b, "edge"), startChild(b, "bare 1 1")
			connect := connectFrame(b)
			var oursCost, baseCost cost
			for round := range 1 + costRounds {
				if round == 1 { // the first is to warm up
					oursCost, baseCost = cost{}, cost{}
				}
				ours.spend(&oursCost, handshakesRound, func() {
					handshakes(b, ours.addr, func(conn net.Conn, r *bufio.Reader) error {
						if _, err := conn.Write(c.request); err != nil {
							return err
						}
						if err := readHead(r); err != nil {
							return err
						}
						if c.connect {
							if _, err := conn.Write(connect); err != nil {
								return err
							}
						}
						return readConnected(r)
					})
				})
				base.spend(&baseCost, handshakesRound, func() {
					handshakes(b, base.addr, func(conn net.Conn, r *bufio.Reader) error {
						if _, err := conn.Write(c.request); err != nil {
							return err
						}
						return readHead(r)
					})
				})
			}
			b.ReportMetric(oursCost.nanos()/1e3, "µs-cpu")
			b.ReportMetric(baseCost.nanos()/1e3, "µs-cpu-bare")
			b.ReportMetric(oursCost.nanos()/baseCost.nanos(), "ratio")
			b.ReportMetric(oursCost.each(), "allocs")
			b.ReportMetric(baseCost.each(), "allocs-bare")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func handshakes(b *testing.B, addr string, talk func(net.Conn, *bufio.Reader) error) {
	var workers sync.WaitGroup
	for range handshakeWorkers {
		workers.Go(func() {
			r := bufio.NewReader(nil)
			for range handshakesRound / handshakeWorkers {
				conn, err := net.Dial("tcp", addr)
				if err != nil {
					b.Error(err)
					return
				}
				r.Reset(conn)
				_ = conn.SetDeadline(time.Now().Add(patience))
				if err := talk(conn, r); err != nil {
					b.Error(err)
				}
				_ = conn.(*net.TCPConn).SetLinger(0) // no TIME_WAIT: ports would run out
				conn.Close()
			}
		})
	}
	workers.Wait()
	if b.Failed() {
		b.FailNow()
	}
}

// BenchmarkFrames is sends and their answers: decoded, given to a publisher that answers at once, and answered; beside an echo of the same
// sizes, without WebSocket and without a look at the bytes. Each connection has depth sends under way.
func BenchmarkFrames(b *testing.B) {
	for _, sub := range []string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
		for _, depth := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", sub, depth), func(b *testing.B) { compareFrames(b, sub, depth) })
		}
	}
}

func compareFrames(b *testing.B, sub string, depth int) {
	ours := startChild(b, "edge")
	talkers := make([]*talker, frameConns)
	for i := range talkers {
		talkers[i] = dialEdge(b, ours.addr, sub)
	}
	var oursCost, baseCost cost
	rounds := framesRound / frameConns / depth
	exchange := func() { eachTalker(b, talkers, func(t *talker) error { return t.exchange(rounds, depth) }) }
	exchange() // to warm up, and to learn the sizes
	in, out := talkers[0].sent/talkers[0].sends, (talkers[0].received+talkers[0].sends-1)/talkers[0].sends

	base := startChild(b, fmt.Sprintf("bare %d %d", in, out))
	echoers := make([]*talker, frameConns)
	for i := range echoers {
		echoers[i] = dialBare(b, base.addr)
	}
	echo := func() { eachTalker(b, echoers, func(t *talker) error { return t.echo(rounds, depth, in, out) }) }
	echo()
	n := rounds * depth * frameConns
	for range costRounds {
		ours.spend(&oursCost, n, exchange)
		base.spend(&baseCost, n, echo)
	}
	b.ReportMetric(oursCost.nanos()/1e3, "µs-cpu")
	b.ReportMetric(baseCost.nanos()/1e3, "µs-cpu-bare")
	b.ReportMetric(baseCost.nanos()/oursCost.nanos(), "ratio-per-cpu")
	b.ReportMetric(oursCost.rate(), "frames/s")
	b.ReportMetric(baseCost.rate(), "frames/s-bare")
	b.ReportMetric(oursCost.rate()/baseCost.rate(), "ratio-rate")
	b.ReportMetric(oursCost.each(), "allocs")
	b.ReportMetric(float64(in), "B-in")
	b.ReportMetric(float64(out), "B-out")
	b.ReportMetric(0, "ns/op")
}

func eachTalker(b *testing.B, talkers []*talker, f func(*talker) error) {
	var running sync.WaitGroup
	for _, t := range talkers {
		running.Go(func() {
			_ = t.conn.SetDeadline(time.Now().Add(6 * patience))
			if err := f(t); err != nil {
				b.Error(err)
			}
		})
	}
	running.Wait()
	if b.Failed() {
		b.FailNow()
	}
}

// talker is a client connection.
type talker struct {
	conn net.Conn
	r    *bufio.Reader
	json bool
	seq  uint64 // the last that was sent

	frame    protocol.Frame
	payload  []byte
	out      []byte
	sends    int
	sent     int // bytes
	received int
}

func dialEdge(b *testing.B, addr, sub string) *talker {
	t := dialTalker(b, addr, "Authorization: Bearer "+costToken(b)+"\r\n", sub)
	if err := readConnected(t.r); err != nil {
		b.Fatal(err)
	}
	t.seq = protocol.FirstSeq(1) - 1
	return t
}

func dialBare(b *testing.B, addr string) *talker {
	return dialTalker(b, addr, "", protocol.SubprotocolBinary)
}

func dialTalker(b *testing.B, addr, fields, sub string) *talker {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	t := &talker{conn: conn, r: bufio.NewReaderSize(conn, 64<<10), json: sub == protocol.SubprotocolJSON}
	request := bytes.Replace(costRequest(fields), []byte(protocol.SubprotocolBinary+"\r\n"), []byte(sub+"\r\n"), 1)
	if _, err := conn.Write(request); err != nil {
		b.Fatal(err)
	}
	if err := readHead(t.r); err != nil {
		b.Fatal(err)
	}
	return t
}

// exchange sends depth sends in one write and reads their answers, rounds times.
func (t *talker) exchange(rounds, depth int) error {
	for range rounds {
		t.out = t.out[:0]
		for range depth {
			t.seq++
			t.appendSend()
		}
		t.sends += depth
		t.sent += len(t.out)
		if _, err := t.conn.Write(t.out); err != nil {
			return err
		}
		for answered := 0; answered < depth; {
			n, err := t.readAnswers()
			if err != nil {
				return err
			}
			answered += n
		}
	}
	return nil
}

func (t *talker) appendSend() {
	op := byte(ws.OpBinary)
	t.frame = protocol.Frame{Kind: protocol.KindSend, Seq: t.seq, Receiver: bobBytes, Content: helloBytes}
	if t.json {
		op, t.payload = byte(ws.OpText), protocol.AppendJSON(t.payload[:0], &t.frame)
	} else {
		t.payload = protocol.AppendBinary(t.payload[:0], &t.frame)
	}
	t.out = append(t.out, 0x80|op)
	if n := len(t.payload); n < 126 {
		t.out = append(t.out, 0x80|byte(n))
	} else {
		t.out = append(t.out, 0x80|126, byte(n>>8), byte(n))
	}
	t.out = append(t.out, 0x5a, 0x17, 0xc3, 0x2e)
	mask := t.out[len(t.out)-4:]
	for i, c := range t.payload {
		t.out = append(t.out, c^mask[i%4])
	}
}

var errTalk = errors.New("not an answer to a send")

// readAnswers reads a WebSocket message and counts the frames in it.
func (t *talker) readAnswers() (n int, err error) {
	payload, wire, err := readMessage(t.r)
	if err != nil {
		return 0, err
	}
	t.received += wire
	for rest := payload; len(rest) > 0; n++ {
		var bad *protocol.FrameError
		if t.json {
			rest, bad = protocol.ParseJSON(rest, true, &t.frame)
		} else {
			rest, bad = protocol.ParseBinary(rest, &t.frame)
		}
		if bad != nil || t.frame.Kind != protocol.KindReceived {
			return n, fmt.Errorf("%w: kind %#x, %v", errTalk, t.frame.Kind, bad)
		}
	}
	_, err = t.r.Discard(len(payload))
	return n, err
}

// readMessage shows the next message without masks or fragments; the reader is to discard it. wire is its length with the head.
func readMessage(r *bufio.Reader) (payload []byte, wire int, err error) {
	head, err := r.Peek(2)
	if err != nil {
		return nil, 0, err
	}
	n, size := int(head[1]), 2
	if n == 126 {
		if head, err = r.Peek(4); err != nil {
			return nil, 0, err
		}
		n, size = int(head[2])<<8|int(head[3]), 4
	}
	if head[0] != 0x80|byte(ws.OpBinary) && head[0] != 0x80|byte(ws.OpText) || n == 127 {
		return nil, 0, fmt.Errorf("%w: %x", errTalk, head)
	}
	if _, err := r.Discard(size); err != nil {
		return nil, 0, err
	}
	payload, err = r.Peek(n)
	return payload, size + n, err
}

// echo is exchange with the base line.
func (t *talker) echo(rounds, depth, in, out int) error {
	t.out = append(t.out[:0], make([]byte, depth*in)...)
	for range rounds {
		if _, err := t.conn.Write(t.out); err != nil {
			return err
		}
		if _, err := t.r.Discard(depth * out); err != nil {
			return err
		}
	}
	return nil
}

func costRequest(fields string) []byte {
	return []byte(lines("GET /ws HTTP/1.1", "Host: chat.example", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
		fields+"Sec-WebSocket-Key: "+base64.StdEncoding.EncodeToString(make([]byte, 16)), "Sec-WebSocket-Protocol: "+protocol.SubprotocolBinary))
}

func costToken(tb testing.TB) string {
	signed, err := token.SignHS256For([]byte(testSecret), "alice", "", "", time.Now(), time.Hour)
	if err != nil {
		tb.Fatal(err)
	}
	return signed
}

func connectFrame(tb testing.TB) []byte {
	t := talker{}
	f := protocol.Frame{Kind: protocol.KindConnect, Token: []byte(costToken(tb)), Device: []byte("phone")}
	t.payload = protocol.AppendBinary(nil, &f)
	t.out = append(t.out, 0x80|byte(ws.OpBinary), 0x80|126, byte(len(t.payload)>>8), byte(len(t.payload)), 0, 0, 0, 0)
	return append(t.out, t.payload...)
}

func readHead(r *bufio.Reader) error {
	status, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if !strings.HasPrefix(status, "HTTP/1.1 101 ") {
		return fmt.Errorf("answer to an upgrade: %q", status)
	}
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			return nil
		}
	}
}

// readConnected reads the frame after the handshake.
func readConnected(r *bufio.Reader) error {
	payload, _, err := readMessage(r)
	if err != nil {
		return err
	}
	_, err = r.Discard(len(payload))
	return err
}
