package edge

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"time"
)

// TLS is crypto/tls over the bytes of a loop. The handshake cannot be interrupted and taken up again, so it has a goroutine
// (tls_handshake.go); afterwards records are read and written on the loop like everything else: a read that finds half of a record
// fails with a temporary error, after which crypto/tls can be asked again. What comes out goes through loop.tryRead as if from the socket.
//
// crypto/tls writes by itself, too: alerts, and answers to key updates. So any call into it can find the socket closed afterwards.

const (
	tlsRecordBytes = 16 << 10 // plaintext of a record at most
	tlsRecordExtra = 64       // what a record adds to its plaintext at most, with the ciphers below
	// tlsHardBytes is outHardBytes as ciphertext. loop.write watches the one; the other stops what crypto/tls writes by itself.
	tlsHardBytes = outHardBytes + (outHardBytes/tlsRecordBytes+2)*tlsRecordExtra
	// tlsPlainBytes is how much is decrypted before it is handled: as much as a loop reads from a socket at once.
	tlsPlainBytes = 64 << 10
)

// CertificateSource gives the certificate for a handshake. It is called from many goroutines, must not block, and may give another
// one from one call to the next; what it gave must not change any more.
type CertificateSource func(*tls.ClientHelloInfo) (*tls.Certificate, error)

// tlsConfig says what is spoken. A server of crypto/tls never renegotiates, and refuses a client that fell back from a version that both
// speak (RFC 7507). In TLS 1.2 only ciphers with forward secrecy and authentication of what is sent are left. Session tickets are
// sealed with keys of this process that change every day.
func tlsConfig(source CertificateSource) *tls.Config {
	return &tls.Config{
		GetCertificate: source,
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"},
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		DynamicRecordSizingDisabled: true, // a flush is one record where it fits: frames are small and complete
	}
}

// tlsTurn is what the TLS connections of a loop share: each uses it within one call.
type tlsTurn struct {
	in        []byte // ciphertext that crypto/tls has not read yet
	plain     []byte // tlsPlainBytes
	gathering bool   // records go to gathered
	gathered  []byte // the records of one write
	buffers   tlsBuffers
}

func newTLSTurn() *tlsTurn {
	return &tlsTurn{plain: make([]byte, tlsPlainBytes), buffers: newTLSBuffers()}
}

// tlsSocket is a socket that encrypts. Its loop owns it, but for what the goroutine of the handshake uses until that is done.
type tlsSocket struct {
	raw       socket
	loop      *loop
	conn      *tls.Conn
	handshake *tlsHandshake // nil when it is done
	closed    bool          // raw is closed
	broken    bool          // TLS has failed: nothing is read or written any more
	parted    bool          // close_notify was sent
}

func newTLSSocket(l *loop, raw socket) *tlsSocket {
	t := &tlsSocket{raw: raw, loop: l}
	t.conn = tls.Server((*tlsWire)(t), l.server.tls.config)
	return t
}

var (
	errTLSAgain = &tlsAgain{} // one value: it is made for every read
	errTLSFull  = errors.New("over the limit of outbound bytes")
	errTLSPanic = errors.New("panic in TLS")
)

// tlsAgain says that there are no bytes for now. crypto/tls keeps what it has when an error is temporary, and only then.
type tlsAgain struct{}

func (*tlsAgain) Error() string   { return "no bytes for now" }
func (*tlsAgain) Timeout() bool   { return true }
func (*tlsAgain) Temporary() bool { return true }

// Write encrypts what a turn has to say and hands it over in one write.
func (t *tlsSocket) Write(b []byte) (int, error) {
	if t.closed {
		return 0, net.ErrClosed
	}
	n, err := t.encrypt(b)
	if err != nil && !t.closed {
		t.broken = true
		t.loop.driver.closeSocket(t)
	}
	return n, err
}

func (t *tlsSocket) encrypt(b []byte) (n int, err error) {
	if t.handshake != nil || t.broken {
		return 0, net.ErrClosed
	}
	turn := t.loop.tls
	turn.gathering = len(b) > tlsRecordBytes // else it is one record, and needs no copy
	turn.gathered = turn.gathered[:0]
	n, err = t.conn.Write(b)
	if err == nil && turn.gathering {
		err = t.send(turn.gathered)
	}
	turn.gathering = false
	if cap(turn.gathered) > keepScratch {
		turn.gathered = nil
	}
	return n, err
}

// send hands ciphertext to the kernel. Afterwards the socket may be closed.
func (t *tlsSocket) send(b []byte) error {
	if t.closed {
		return net.ErrClosed
	}
	if t.raw.OutboundBuffered()+len(b) > tlsHardBytes {
		return errTLSFull
	}
	_, err := t.raw.Write(b)
	return err
}

// OutboundBuffered counts ciphertext.
func (t *tlsSocket) OutboundBuffered() int { return t.raw.OutboundBuffered() }

func (t *tlsSocket) Fd() int { return t.raw.Fd() }

// part tells the peer that nothing more will be sent: close_notify, without which it cannot know that nothing was cut off.
func (t *tlsSocket) part() {
	if t.handshake == nil && !t.broken && !t.closed && !t.parted {
		t.parted = true
		_ = t.conn.CloseWrite() // where it fails the peer is gone
	}
}

// end says that the socket is closed.
func (t *tlsSocket) end() {
	t.closed = true
	if t.handshake == nil {
		return
	}
	if !t.broken {
		t.loop.m.tlsHandshakes[tlsUnfinished]++
	}
	t.handshake.leave()
}

// tlsWire is the connection below crypto/tls: ciphertext.
type tlsWire tlsSocket

func (w *tlsWire) Read(p []byte) (int, error) {
	t := (*tlsSocket)(w)
	if t.handshake != nil {
		return t.handshake.read(p)
	}
	turn := t.loop.tls
	n := copy(p, turn.in)
	turn.in = turn.in[n:]
	if n == 0 {
		return 0, errTLSAgain
	}
	return n, nil
}

func (w *tlsWire) Write(p []byte) (int, error) {
	t := (*tlsSocket)(w)
	if t.handshake != nil {
		return t.handshake.write(p)
	}
	if turn := t.loop.tls; turn.gathering {
		turn.gathered = append(turn.gathered, p...)
		return len(p), nil
	}
	if err := t.send(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// crypto/tls asks for nothing else: deadlines are the sweep's, closing is the loop's.

func (*tlsWire) Close() error                     { return nil }
func (*tlsWire) LocalAddr() net.Addr              { return nil }
func (*tlsWire) RemoteAddr() net.Addr             { return nil }
func (*tlsWire) SetDeadline(time.Time) error      { return nil }
func (*tlsWire) SetReadDeadline(time.Time) error  { return nil }
func (*tlsWire) SetWriteDeadline(time.Time) error { return nil }

// receive takes what came from a socket: ciphertext of a TLS connection, plaintext of the others.
func (l *loop) receive(c *conn, data []byte) {
	t, ok := c.sock.(*tlsSocket)
	switch {
	case !ok:
		l.tryRead(c, data)
	case t.handshake != nil:
		l.feedHandshake(c, t, data)
	default:
		l.readTLS(c, t, data)
	}
}

// readTLS reads all records that are complete. Afterwards the connection may be gone.
func (l *loop) readTLS(c *conn, t *tlsSocket, data []byte) {
	defer l.recoverFrom(l.session(c).Conn)
	turn := l.tls
	turn.in = data
	turn.buffers.lend(t.conn)
	n := 0
	for !c.has(flagDeaf) && !t.broken {
		m, err := t.conn.Read(turn.plain[n:])
		if t.closed {
			break
		}
		if n += m; err == nil && n < len(turn.plain) {
			continue
		}
		if n > 0 {
			l.tryRead(c, turn.plain[:n])
			n = 0
		}
		if err == errTLSAgain {
			break
		}
		if err != nil {
			l.endTLS(c, t, err)
		}
	}
	turn.in = nil
	turn.buffers.reclaim(t.conn)
}

// endTLS ends a connection whose peer has parted, which is io.EOF, or does not keep to TLS; an alert was sent then.
func (l *loop) endTLS(c *conn, t *tlsSocket, err error) {
	if err != io.EOF {
		t.broken = true
		if c.reason == 0 {
			c.reason = closeTLS
		}
	}
	l.doom(c)
}
