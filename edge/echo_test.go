//go:build echo

package edge

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

const echoRequest = "GET /echo HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// TestAutobahnEcho runs the cases against the echo path without sockets. What comes back is checked after every step.
func TestAutobahnEcho(t *testing.T) {
	b := newBench(t, nil)
	runAutobahn(t, autobahnCases(maxEchoBytes), func(t *testing.T, c *autobahnCase) func(autobahnStep, int) []reply {
		s := b.accept()
		s.receive([]byte(echoRequest))
		s.out = nil
		t.Cleanup(s.close)
		return func(st autobahnStep, chop int) []reply {
			s.send(st.send, chop)
			return s.replies()
		}
	})
	if b.l.m.panics != 0 || b.s.connections.Load() != 0 {
		t.Fatalf("%d panics, %d connections", b.l.m.panics, b.s.connections.Load())
	}
}

// TestAutobahnSockets runs the cases over real sockets: every chop is a write of its own.
func TestAutobahnSockets(t *testing.T) {
	s, _ := serve(t, nil)
	runAutobahn(t, autobahnCases(maxEchoBytes), func(t *testing.T, c *autobahnCase) func(autobahnStep, int) []reply {
		conn := dialTCP(t, s)
		if _, err := conn.Write([]byte(echoRequest)); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
			t.Fatalf("%v %v", resp, err)
		}
		return func(st autobahnStep, chop int) (got []reply) {
			sent := make(chan error, 1)
			go func() {
				var err error
				chopped(st.send, chop, func(piece []byte) bool {
					_, err = conn.Write(piece)
					return err == nil
				})
				sent <- err
			}()
			ends := false
			for range st.want {
				re, err := readReply(r)
				if err != nil {
					t.Fatalf("after %s: %v", replies(got), err)
				}
				got = append(got, re)
				ends = re.kind == "close"
			}
			if !ends {
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				return got
			}
			// Behind the close frame there is the end of the stream. A reset is one too: the server need not read what follows a close frame.
			if re, err := readReply(r); err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("after %s: %s %v", replies(got), re, err)
			}
			conn.Close()
			<-sent
			return got
		}
	})
	eventually(t, "every connection to be gone", func() bool { return s.connections.Load() == 0 })
	if n := metric(s, "panics_total"); n != 0 {
		t.Fatalf("%v panics", n)
	}
}

// TestAutobahnTLS runs the cases over TLS: every chop is a record of its own.
func TestAutobahnTLS(t *testing.T) {
	overTLS = identity().source
	defer func() { overTLS = nil }()
	before := connectedOverTLS.Load()
	TestAutobahnSockets(t)
	if n := connectedOverTLS.Load() - before; n < 1000 {
		t.Errorf("only %d connections over TLS", n)
	}
}

// TestEchoLimits: what holds for chat connections holds for the echo path, but that it takes 64 KiB and asks for no token.
func TestEchoLimits(t *testing.T) {
	b := newBench(t, nil)
	open := func() *fakeSocket {
		s := b.accept()
		s.receive([]byte(strings.Replace(echoRequest, "\r\n\r\n", "\r\nAuthorization: Bearer nonsense\r\n\r\n", 1)))
		if !bytes.HasPrefix(s.out, []byte("HTTP/1.1 101 ")) {
			t.Fatalf("%.100q", s.out)
		}
		s.out = nil
		return s
	}
	idle, half := open(), open()
	half.receive(part(ws.OpBinary, "half"))
	b.pass(protocol.FrameSeconds * time.Second)
	if got := replies(half.replies()); !strings.HasSuffix(got, "close 4408") {
		t.Errorf("half a message: %s", got)
	}
	b.pass(10 * protocol.FrameSeconds * time.Second)
	idle.receive(final(ws.OpText, "still here"))
	idle.receive(final(ws.OpBinary, "\xff"))
	idle.receive(frames(part(ws.OpText, "te"), final(ws.OpPing, ""), final(cont, "xt"), header(0x82, 127, maxEchoBytes+1)))
	if got, want := replies(idle.replies()), `message "still here", message "\xff", pong "", message "text", close 1009`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	if kind := fmt.Sprint(b.asked); kind != "[]" {
		t.Errorf("the Registrar was asked: %s", kind)
	}
}
