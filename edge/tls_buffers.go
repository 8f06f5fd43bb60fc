package edge

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"reflect"
	"sync"
	"time"
	"unsafe"
)

// A tls.Conn keeps its input buffers for ever, 4 to 20 KiB that an idle connection does not need (go.dev/issue/43563). So the connections
// of a loop share one: it is put into a connection before it reads and taken out afterwards, and what remains of a record that
// is not complete is kept in a buffer of its own size. The fields are not exported: before they are used, tlsFieldsWork sees whether they
// are what they were, and works through a conversation. Otherwise everything works without, and a connection takes more memory.

// keepTLSBuffer is the capacity of a buffer that is kept for the next connection: a record and what is read ahead.
const keepTLSBuffer = 2*tlsRecordBytes + 2<<10

// tlsFields is where the buffers are in a tls.Conn.
type tlsFields struct {
	rawInput uintptr // bytes.Buffer: records that are not decrypted yet
	hand     uintptr // bytes.Buffer: handshake messages
	input    uintptr // bytes.Reader: plaintext, in the memory of rawInput
}

func (f *tlsFields) of(c *tls.Conn) (rawInput, hand *bytes.Buffer, input *bytes.Reader) {
	p := unsafe.Pointer(c)
	return (*bytes.Buffer)(unsafe.Add(p, f.rawInput)), (*bytes.Buffer)(unsafe.Add(p, f.hand)), (*bytes.Reader)(unsafe.Add(p, f.input))
}

// findTLSFields looks for the fields in a tls.Conn. It is an error when crypto/tls is not what this was written for.
func findTLSFields(conn reflect.Type) (*tlsFields, error) {
	find := func(name string, want reflect.Type) (uintptr, error) {
		f, ok := conn.FieldByName(name)
		if !ok || f.Type != want || len(f.Index) != 1 {
			return 0, fmt.Errorf("tls.Conn has no field %s of type %s", name, want)
		}
		return f.Offset, nil
	}
	f := &tlsFields{}
	var errs [3]error
	f.rawInput, errs[0] = find("rawInput", reflect.TypeFor[bytes.Buffer]())
	f.hand, errs[1] = find("hand", reflect.TypeFor[bytes.Buffer]())
	f.input, errs[2] = find("input", reflect.TypeFor[bytes.Reader]())
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return f, nil
}

// usableTLSFields looks once in the life of a process.
var usableTLSFields = sync.OnceValues(func() (*tlsFields, error) {
	f, err := findTLSFields(reflect.TypeFor[tls.Conn]())
	if err == nil {
		err = tlsFieldsWork(f)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
})

// tlsBuffers is the buffer that the connections of a loop share.
type tlsBuffers struct {
	fields *tlsFields // nil: connections keep their own
	spare  bytes.Buffer
}

func newTLSBuffers() tlsBuffers {
	f, _ := usableTLSFields() // New has logged the error
	return tlsBuffers{fields: f}
}

// lend gives a connection with nothing incomplete the buffer to read into.
func (b *tlsBuffers) lend(c *tls.Conn) {
	if b.fields == nil {
		return
	}
	if raw, _, _ := b.fields.of(c); raw.Cap() == 0 {
		*raw, b.spare = b.spare, bytes.Buffer{}
	}
}

// reclaim takes it back. An incomplete record, and a buffer that a connection had already, stay until the record is complete.
func (b *tlsBuffers) reclaim(c *tls.Conn) {
	if b.fields == nil {
		return
	}
	raw, hand, input := b.fields.of(c)
	if input.Len() > 0 { // within raw
		return
	}
	if hand.Len() == 0 {
		*hand = bytes.Buffer{}
	}
	if raw.Len() > 0 && b.spare.Cap() > 0 { // its own
		return
	}
	rest := raw.Bytes()
	was := *raw
	*raw = bytes.Buffer{}
	if len(rest) > 0 {
		raw.Write(rest)
	}
	if was.Reset(); was.Cap() > b.spare.Cap() && was.Cap() <= keepTLSBuffer {
		b.spare = was
	}
}

// trim frees what the handshake has left.
func (b *tlsBuffers) trim(c *tls.Conn) {
	if b.fields == nil {
		return
	}
	raw, hand, input := b.fields.of(c)
	if input.Len() > 0 || raw.Len() > 0 || hand.Len() > 0 {
		return // reclaim will
	}
	*raw, *hand = bytes.Buffer{}, bytes.Buffer{}
}

// tlsFieldsWork has two connections share a buffer, with records that come in pieces, and looks whether they read what was written.
func tlsFieldsWork(f *tlsFields) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("self-test of TLS: panic: %v", p)
		}
	}()
	certificate, err := tlsTestCertificate()
	if err != nil {
		return fmt.Errorf("self-test of TLS: make a certificate: %w", err)
	}
	var pairs [2]tlsTestPair
	for i, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := pairs[i].connect(certificate, version); err != nil {
			return fmt.Errorf("self-test of TLS: handshake: %w", err)
		}
	}
	b := tlsBuffers{fields: f}
	for i := range pairs {
		b.trim(pairs[i].server)
	}
	for round := range 8 {
		for i := range pairs {
			text := bytes.Repeat([]byte{byte('a' + 2*round + i)}, 1+round*2500)
			if err := pairs[i].converse(&b, text); err != nil {
				return fmt.Errorf("self-test of TLS: %w", err)
			}
		}
	}
	for i := range pairs {
		if raw, hand, input := f.of(pairs[i].server); raw.Cap() != 0 || hand.Cap() != 0 || input.Len() != 0 {
			return errors.New("self-test of TLS: an idle connection keeps buffers")
		}
	}
	if b.spare.Cap() == 0 {
		return errors.New("self-test of TLS: the shared buffer is lost")
	}
	return nil
}

// tlsTestCertificate is valid for nobody and never seen by anybody.
func tlsTestCertificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// tlsTestPair is a client and a server that are connected by memory.
type tlsTestPair struct {
	client, server *tls.Conn
	up             tlsTestWire // below the client
	down           tlsTestWire // below the server
}

// tlsTestWire is a pipe during the handshake, and afterwards bytes that come when the test says so.
type tlsTestWire struct {
	net.Conn
	established bool
	in, out     []byte
}

func (w *tlsTestWire) Read(p []byte) (int, error) {
	if !w.established {
		return w.Conn.Read(p)
	}
	n := copy(p, w.in)
	w.in = w.in[n:]
	if n == 0 {
		return 0, errTLSAgain
	}
	return n, nil
}

func (w *tlsTestWire) Write(p []byte) (int, error) {
	if !w.established {
		return w.Conn.Write(p)
	}
	w.out = append(w.out, p...)
	return len(p), nil
}

func (p *tlsTestPair) connect(certificate tls.Certificate, version uint16) error {
	p.up.Conn, p.down.Conn = net.Pipe()
	defer p.up.Conn.Close()
	defer p.down.Conn.Close()
	deadline := time.Now().Add(10 * time.Second)
	p.up.Conn.SetDeadline(deadline)
	p.down.Conn.SetDeadline(deadline)
	p.client = tls.Client(&p.up, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
	p.server = tls.Server(&p.down, &tls.Config{Certificates: []tls.Certificate{certificate}, SessionTicketsDisabled: true})
	failed := make(chan error, 1)
	go func() { failed <- p.client.Handshake() }()
	err := p.server.Handshake()
	if err != nil {
		p.down.Conn.Close()
	}
	err = errors.Join(err, <-failed)
	p.up.established, p.down.established = true, true
	return err
}

// converse has the client say something, which the server reads in pieces with a shared buffer.
func (p *tlsTestPair) converse(b *tlsBuffers, text []byte) error {
	if _, err := p.client.Write(text); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	cipher := p.up.out
	p.up.out = nil
	var got []byte
	plain := make([]byte, 4<<10)
	for len(cipher) > 0 {
		n := min(len(cipher), 1+len(cipher)/3)
		p.down.in, cipher = cipher[:n], cipher[n:]
		b.lend(p.server)
		for {
			n, err := p.server.Read(plain)
			got = append(got, plain[:n]...)
			if err == errTLSAgain {
				break
			}
			if err != nil {
				return fmt.Errorf("read: %w", err)
			}
		}
		b.reclaim(p.server)
	}
	if !bytes.Equal(got, text) {
		return io.ErrUnexpectedEOF
	}
	return nil
}
