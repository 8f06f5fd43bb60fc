//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws/wsutil"

	"millrace/protocol"
)

// lorisRequest is complete but for its end.
const lorisRequest = "GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"

// lorises are the places at which a client can keep a server waiting, and how long the server does.
var lorises = []struct {
	name     string
	deadline time.Duration
	long     bool // only in the long form
	begin    func(s *victim, conn net.Conn, user string) (*floodConn, error)
	trickle  string // one byte a second of it, again and again
	code     protocol.CloseCode
}{
	{"silent after accept", protocol.AuthenticateSeconds * time.Second, false, nil, "", 0},
	{"a byte a second of the upgrade", protocol.AuthenticateSeconds * time.Second, false, nil, lorisRequest, 0},
	{"silent in the upgrade", protocol.AuthenticateSeconds * time.Second, false, func(_ *victim, conn net.Conn, _ string) (*floodConn, error) {
		_, err := io.WriteString(conn, lorisRequest)
		return nil, err
	}, "", 0},
	{"silent before connect", protocol.AuthenticateSeconds * time.Second, false, func(_ *victim, conn net.Conn, _ string) (*floodConn, error) {
		return floodUpgrade(conn, protocol.SubprotocolBinary)
	}, "", protocol.CloseTimeout},
	{"half of connect", protocol.AuthenticateSeconds * time.Second, false, func(_ *victim, conn net.Conn, _ string) (*floodConn, error) {
		c, err := floodUpgrade(conn, protocol.SubprotocolBinary)
		if err == nil {
			_, err = conn.Write([]byte{0x82, 0x80 | 100, 0, 0, 0, 0, byte(protocol.KindConnect), 1, 2, 3})
		}
		return c, err
	}, "", protocol.CloseTimeout},
	{"a byte a second of a frame", protocol.FrameSeconds * time.Second, true, func(s *victim, conn net.Conn, user string) (*floodConn, error) {
		signed, err := signToken(s.config, user, time.Hour)
		if err != nil {
			return nil, err
		}
		c, err := floodUpgrade(conn, protocol.SubprotocolBinary)
		if err != nil {
			return nil, err
		}
		f := &protocol.Frame{Kind: protocol.KindConnect, Token: []byte(signed)}
		if err := wsutil.WriteClientBinary(c, protocol.AppendBinary(nil, f)); err != nil {
			return nil, err
		}
		if _, err := c.welcome(); err != nil {
			return nil, err
		}
		_, err = c.Write([]byte{0x82, 0x80 | 120, 0, 0, 0, 0})
		return c, err
	}, "\x00", protocol.CloseTimeout},
}

// TestFloodLoris: who keeps the server waiting is closed when the time is up that began with the connection, or with the frame, however
// he fills it; and the others do not notice.
func TestFloodLoris(t *testing.T) {
	floodTest(t)
	each := floodSize(30, 2_000)
	honest := floodSize(20, 200)
	perSecond := floodSize(100, 500)
	s := newFloodVictim(t)
	s.serve()
	c := newCrowd(s)
	people := c.join("honest", honest, 0)
	read(people)

	alone, enough := context.WithTimeout(t.Context(), time.Duration(floodSize(1, 10))*time.Second)
	defer enough()
	c.chat(alone, people, people, perSecond, 120, true)
	quiet := c.take()

	g := s.watched()
	talking, stop := context.WithCancel(t.Context())
	defer stop()
	var talk, arriving, waiting sync.WaitGroup
	talk.Go(func() { c.chat(talking, people, people, perSecond, 120, true) })
	stays := make([][]time.Duration, len(lorises))
	for i, l := range lorises {
		if l.long && !*floods {
			continue
		}
		stays[i] = make([]time.Duration, each)
		for n := range each {
			arriving.Add(1)
			waiting.Go(func() {
				var err error
				if stays[i][n], err = s.loris(i, n, sync.OnceFunc(arriving.Done)); err != nil {
					t.Errorf("%s: %v", l.name, err)
				}
			})
		}
	}
	arriving.Wait()
	storm := c.take() // while they come, the machine is busy with making them
	waiting.Wait()
	flooded := c.take()
	stop()
	talk.Wait()
	v := c.judge()
	s.wantConnections(honest)
	g.stop()
	for i, l := range lorises {
		if stays[i] == nil {
			continue
		}
		first, last := quantile(stays[i], 0), quantile(stays[i], 1)
		t.Logf("%5d × %-32s closed after %5.2f to %5.2f s", each, l.name+":", first.Seconds(), last.Seconds())
		if first < l.deadline-lorisGrain {
			t.Errorf("%s: closed after %v, before its time of %v", l.name, first, l.deadline)
		}
	}
	before, during := quantile(quiet, .99), quantile(flooded, .99)
	t.Logf("honest p99: %v alone (%d messages), %v with them (%d): ratio %.2f; while they came %v (%d); %s",
		before, len(quiet), during, len(flooded), during.Seconds()/before.Seconds(), quantile(storm, .99), len(storm), g)
	t.Log(v)
	s.wantServing()
}

// lorisGrain is how much sooner than its deadline a connection may be closed: two ticks of the sweep.
const lorisGrain = 200 * time.Millisecond

// loris keeps the server waiting, says when it begins to, and tells how long it did.
func (s *victim) loris(which, n int, waits func()) (time.Duration, error) {
	defer waits() // also where it could not begin
	l := &lorises[which]
	begun := time.Now() // before the server's own time begins
	conn, err := floodDial(s.t.Context(), s.addr, floodSource(n%1000), 0)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	var c *floodConn
	if l.begin != nil {
		if c, err = l.begin(s, conn, fmt.Sprintf("loris-%d-%d", which, n)); err != nil {
			return 0, err
		}
	}
	waits()
	if l.trickle != "" {
		ended := make(chan struct{})
		defer close(ended)
		go trickle(conn, l.trickle, ended)
	}
	if c == nil {
		if err := conn.SetReadDeadline(time.Now().Add(floodPatience)); err != nil {
			return 0, err
		}
		said, err := io.ReadAll(conn)
		if took := time.Since(begun); !isTimeout(err) {
			if strings.HasPrefix(string(said), "HTTP/1.1 101") {
				return took, errors.New("upgraded")
			}
			return took, nil // closed, or reset while a byte was on its way
		}
		return 0, fmt.Errorf("was not closed: %w", err)
	}
	code, err := c.closeCode()
	if err == nil && code != l.code {
		err = fmt.Errorf("close code %d, want %d", code, l.code)
	}
	return time.Since(begun), err
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func trickle(conn net.Conn, text string, ended <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 0; ; n++ {
		if _, err := io.WriteString(conn, text[n%len(text):n%len(text)+1]); err != nil {
			return // closed, which is what is waited for
		}
		select {
		case <-tick.C:
		case <-ended:
			return
		}
	}
}
