package edge

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/panjf2000/gnet/v2"

	"millrace/protocol"
	"millrace/protocol/token"
)

// The base lines of what a connection costs, and the processes in which they are measured: the test binary becomes a server when
// childMode is set. Its kinds:
//
//	bare IN OUT  gnet with the options of the edge and nothing more: the least that a WebSocket upgrade can be, and then OUT bytes for
//	             each IN bytes that arrive
//	edge         a Server with stubs behind it, that answer at once
//
// A child writes its address in a line, and for each line that it reads one with its childUsage. It ends with its input.
const childMode = "MILLRACE_EDGE_CHILD"

func TestMain(m *testing.M) {
	if mode := os.Getenv(childMode); mode != "" {
		if err := runChild(strings.Fields(mode)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func runChild(mode []string) error {
	var addr string
	var err error
	switch {
	case len(mode) == 3 && mode[0] == "bare":
		addr, err = serveBare(mode[1], mode[2])
	case len(mode) == 1 && mode[0] == "edge":
		addr, err = serveStubbed()
	default:
		err = fmt.Errorf("%s: %q", childMode, mode)
	}
	if err != nil {
		return err
	}
	fmt.Println(addr)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(readUsage())
	}
	return nil
}

// childUsage is what a process has used since it began.
type childUsage struct {
	cpu    time.Duration // user and system
	allocs uint64        // objects
}

func readUsage() string {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		panic(err) // there is no other error than a wrong pointer
	}
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}, {Name: "/gc/heap/tiny/allocs:objects"}}
	metrics.Read(sample)
	return fmt.Sprint(r.Utime.Nano()+r.Stime.Nano(), sample[0].Value.Uint64()+sample[1].Value.Uint64())
}

// bare is the base line.
type bare struct {
	gnet.BuiltinEventEngine
	booted chan struct{}
	in     int
	out    int
	answer []byte // many of out
}

type bareConn struct{ surplus int } // bytes of an incomplete frame

func serveBare(in, out string) (addr string, err error) {
	b := &bare{booted: make(chan struct{})}
	if b.in, err = strconv.Atoi(in); err != nil {
		return "", err
	}
	if b.out, err = strconv.Atoi(out); err != nil {
		return "", err
	}
	b.answer = make([]byte, 4096*b.out)
	port, err := reserve("127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer port.release()
	failed := make(chan error, 1)
	go func() {
		failed <- gnet.Run(b, port.network+"://"+port.addr, engineOptions(runtime.GOMAXPROCS(0), slog.Default())...)
	}()
	select {
	case <-b.booted:
		return port.bound, nil
	case err := <-failed:
		return "", fmt.Errorf("gnet: %w", err)
	}
}

// OnTick is called once all loops listen.
func (b *bare) OnTick() (time.Duration, gnet.Action) {
	select {
	case <-b.booted:
	default:
		close(b.booted)
	}
	return tickMillis * time.Millisecond, gnet.None
}

var bareKey = []byte("Sec-WebSocket-Key: ")

func (b *bare) OnTraffic(c gnet.Conn) gnet.Action {
	data, err := c.Next(-1)
	if err != nil {
		return gnet.Close
	}
	state, upgraded := c.Context().(*bareConn)
	if !upgraded {
		at := bytes.Index(data, bareKey)
		if at < 0 || !bytes.HasSuffix(data, []byte("\r\n\r\n")) || len(data) < at+len(bareKey)+24 {
			return gnet.Close
		}
		c.SetContext(&bareConn{})
		key := data[at+len(bareKey):][:24]
		var seed [24 + len(acceptGUID)]byte
		sum := sha1.Sum(append(append(seed[:0], key...), acceptGUID...))
		var head [256]byte
		out := append(head[:0], "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "...)
		out = base64.StdEncoding.AppendEncode(out, sum[:])
		out = append(out, "\r\nSec-WebSocket-Protocol: "+protocol.SubprotocolBinary+"\r\n\r\n"...)
		if _, err := c.Write(out); err != nil {
			return gnet.Close
		}
		return gnet.None
	}
	state.surplus += len(data)
	n := state.surplus / b.in
	state.surplus %= b.in
	if n > 0 {
		if _, err := c.Write(b.answer[:n*b.out]); err != nil {
			return gnet.Close
		}
	}
	return gnet.None
}

// stubs is what is behind the edge of a child: everything succeeds at once and nothing is kept.
type stubs struct {
	server  *Server
	answers [][1]protocol.Answer // by loop, which is who publishes
}

func serveStubbed() (addr string, err error) {
	verifier, err := token.NewHS256([]byte(testSecret))
	if err != nil {
		return "", err
	}
	b := &stubs{answers: make([][1]protocol.Answer, runtime.GOMAXPROCS(0))}
	b.server, err = New(Config{Addr: "127.0.0.1:0", EdgeID: 1, Token: verifier, Publisher: b, Acknowledger: ignoreOutcomes{}, Mailbox: b, Registrar: b})
	if err != nil {
		return "", err
	}
	if err := b.server.Start(); err != nil {
		return "", err
	}
	return b.server.Addr(), nil
}

func (b *stubs) Publish(s *protocol.Submission) protocol.Refusal {
	answer := &b.answers[handleLoop(s.From.Conn)]
	answer[0] = answerTo(s)
	b.server.Answer(answer[:])
	return protocol.Refusal{}
}

func (b *stubs) ReadPage(r protocol.PageRequest) {
	b.server.Page(protocol.Page{To: r.Session, After: r.After, End: true})
}

func (b *stubs) ReadReceipts(r protocol.ReceiptsRequest) {
	b.server.ReceiptsPage(protocol.ReceiptsPage{To: r.Session, End: true})
}

func (b *stubs) Register(r protocol.Registration) {
	b.server.Registered(protocol.Registered{To: r.Session, Block: 1})
}

func (b *stubs) SetState(user, device []byte, s protocol.Session, live bool) {}
func (b *stubs) Unregister(user, device []byte, s protocol.Session)          {}
