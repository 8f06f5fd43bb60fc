//go:build echo

package edge

import (
	"encoding/binary"

	"github.com/gobwas/ws"
)

// This file is for tests of conformance, and in no build but one with the tag "echo": a path without authentication that sends every
// message back as it came, text as text and binary as binary. Everything else is what clients of webSocketPath meet: the upgrade, the
// wsReader with its limits on fragments and time, and the close handshake; only messages may be longer. There is no heartbeat.

const (
	echoPath     = "/echo"
	maxEchoBytes = 64 << 10 // one message
	// echoTicks is for how long an echo connection need not authenticate: half of what a tick can count.
	echoTicks = 1 << 30
)

func isEchoPath(path []byte) bool { return string(path) == echoPath }

func (c *conn) echoes() bool { return c.has(flagEcho) }

// openEcho makes a connection that was upgraded one that echoes. It stays in stateConnect, where nothing but frames happens to it.
func (l *loop) openEcho(c *conn) {
	c.flags |= flagEcho
	c.deadline = l.tick + echoTicks
}

// beginEcho looks at the first byte of the frame that r reads next. On an echo connection flagJSON says of which kind the present
// message is, since its frames may come in many turns.
func (l *loop) beginEcho(c *conn, r *wsReader, data []byte) {
	if r.partial != nil && !r.spent {
		data = r.partial.B
	}
	if len(data) == 0 || r.fragment > 0 {
		return
	}
	switch ws.OpCode(data[0] & 0x0f) {
	case ws.OpText:
		c.flags |= flagJSON
	case ws.OpBinary:
		c.flags &^= flagJSON
	}
}

// echo sends a message back in one frame.
func (l *loop) echo(c *conn, payload []byte) {
	l.m.framesIn++
	l.m.framesOut++
	op := ws.OpBinary
	if c.text() {
		op = ws.OpText
	}
	o := l.output(c)
	b := append(o.buf.B, 0x80|byte(op))
	switch n := len(payload); {
	case n < 126:
		b = append(b, byte(n))
	case n <= 0xffff:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	o.buf.B = append(b, payload...)
}
