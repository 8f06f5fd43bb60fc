package edge

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// overTLS is the certificate of test servers while tests run over TLS.
var overTLS CertificateSource

// testIdentity is a certificate for localhost that signs itself, and who trusts it.
type testIdentity struct {
	certificate tls.Certificate
	roots       *x509.CertPool
}

func newIdentity(key crypto.Signer, err error) *testIdentity {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, e := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	leaf, p := x509.ParseCertificate(der)
	if err := errors.Join(err, e, p); err != nil {
		panic(err)
	}
	id := &testIdentity{certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots: x509.NewCertPool()}
	id.roots.AddCert(leaf)
	return id
}

func newECDSA() *testIdentity {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return newIdentity(key, err)
}

func newRSA() *testIdentity {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	return newIdentity(key, err)
}

func (id *testIdentity) source(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return &id.certificate, nil
}

func (id *testIdentity) config() *tls.Config {
	return &tls.Config{RootCAs: id.roots, ServerName: "localhost", NextProtos: []string{"http/1.1"}}
}

// clientOf is the configuration of a client of one version.
func (id *testIdentity) clientOf(version uint16) *tls.Config {
	c := id.config()
	c.MinVersion, c.MaxVersion = version, version
	return c
}

var connectedOverTLS atomic.Int64

var identity = sync.OnceValue(newECDSA)

// secured makes a client's connection one of TLS.
func secured(t testing.TB, conn net.Conn) net.Conn {
	t.Helper()
	return handshakeWith(t, conn, identity().config())
}

func handshakeWith(t testing.TB, conn net.Conn, config *tls.Config) *tls.Conn {
	t.Helper()
	c := tls.Client(conn, config)
	if err := c.Handshake(); err != nil {
		t.Fatalf("TLS handshake: %v", err)
	}
	connectedOverTLS.Add(1)
	return c
}

// bothVersions runs a test with clients of TLS 1.2 and 1.3.
func bothVersions(t *testing.T, test func(t *testing.T, version uint16)) {
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(v), func(t *testing.T) { test(t, v) })
	}
}

// rawDial connects without TLS.
func rawDial(t testing.TB, s *Server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	return conn
}

func wantTLSHandshakes(t testing.TB, s *Server, result string, n float64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%v handshakes to be %q", n, result), func() bool {
		return metric(s, "tls_handshakes_total", "result", result) == n
	})
}

// serveTLS is serve with TLS.
func serveTLS(t testing.TB, change func(*Config)) (*Server, *stubBackend) {
	t.Helper()
	return serve(t, func(c *Config) {
		c.Certificate = identity().source
		if change != nil {
			change(c)
		}
	})
}

// TestSocketsOverTLS runs the tests of sockets again: what they say about plaintext holds for TLS.
func TestSocketsOverTLS(t *testing.T) {
	overTLS = identity().source
	before := connectedOverTLS.Load()
	t.Cleanup(func() { // after those that run in parallel
		overTLS = nil
		if n := connectedOverTLS.Load() - before; n < 60 && !t.Failed() {
			t.Errorf("the tests made only %d connections over TLS", n)
		}
	})
	for name, test := range map[string]func(*testing.T){
		"ConnectSendReceiveAcknowledge": TestConnectSendReceiveAcknowledge,
		"TwoDevices":                    TestTwoDevicesOverSockets,
		"OnlyTheAddresseeGetsIt":        TestOnlyTheAddresseeGetsIt,
		"DrainMailboxInOrder":           TestDrainMailboxInOrder,
		"DisconnectDuringDrain":         TestDisconnectDuringDrain,
		"Receipts":                      TestReceiptsOverSockets,
		"Replaced":                      TestReplacedOverSockets,
		"RenewAndExpiry":                TestRenewAndExpiryOverSockets,
		"AuthenticationDeadline":        TestAuthenticationDeadlineOverSockets,
		"Heartbeat":                     TestHeartbeatOverSockets,
		"Bearer":                        TestBearerOverSockets,
		"HTTP":                          TestHTTPOverSockets,
		"RateLimit":                     TestRateLimitOverSockets,
		"SlowReader":                    TestSlowReaderOverSockets,
		"DrainAndStop":                  TestDrainAndStop,
		"StopWithClients":               TestStopWithClients,
	} {
		t.Run(name, test)
	}
}

func TestTLSVersions(t *testing.T) {
	for name, id := range map[string]*testIdentity{"ECDSA": newECDSA(), "RSA": newRSA()} {
		t.Run(name, func(t *testing.T) {
			s, _ := serve(t, func(c *Config) { c.Certificate = id.source })
			bothVersions(t, func(t *testing.T, version uint16) {
				conn := handshakeWith(t, rawDial(t, s), id.clientOf(version))
				if got := conn.ConnectionState(); got.Version != version || got.NegotiatedProtocol != "http/1.1" || got.DidResume {
					t.Errorf("version %x, protocol %q, resumed %v", got.Version, got.NegotiatedProtocol, got.DidResume)
				}
				talk(t, conn, "alice")
			})
			wantTLSHandshakes(t, s, "1.2", 1)
			wantTLSHandshakes(t, s, "1.3", 1)
		})
	}
}

// talk upgrades a connection, sends a message, and leaves.
func talk(t testing.TB, conn net.Conn, user string) {
	t.Helper()
	c := upgradeOn(t, conn)
	c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte(user)})
	c.want(protocol.KindConnected)
	c.sendMessage(1, "hello")
	c.want(protocol.KindReceived)
	c.sendRaw(ws.OpClose, binary.BigEndian.AppendUint16(nil, 1000))
	c.wantClose(1000)
}

func TestTLSRefusesWhatIsOld(t *testing.T) {
	s, _ := serveTLS(t, nil)
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
		want   string
	}{
		{"TLS 1.1", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, "protocol version"},
		{"CBC", func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, "handshake failure"},
		{"no forward secrecy", func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_GCM_SHA256}
		}, "handshake failure"},
		{"HTTP/2 only", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, "no application protocol"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := identity().config()
			c.change(config)
			conn := rawDial(t, s)
			err := tls.Client(conn, config).Handshake()
			if err == nil || !strings.Contains(err.Error(), c.want) { // the alert came before the end
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Fatalf("after the alert: %d, %v", n, err)
			}
		})
	}
	wantTLSHandshakes(t, s, "failed", 4)
	eventually(t, "no handshake to be pending", func() bool { return s.tls.pending.Load() == 0 })
	if n := metric(s, "panics_total"); n != 0 {
		t.Errorf("%v panics", n)
	}
}

func TestTLSResumption(t *testing.T) {
	s, b := serveTLS(t, nil)
	bothVersions(t, func(t *testing.T, version uint16) {
		config := identity().clientOf(version)
		config.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		for i, resumed := range []bool{false, true, true} {
			conn := handshakeWith(t, rawDial(t, s), config)
			if conn.ConnectionState().DidResume != resumed {
				t.Fatalf("connection %d: resumed %v", i, !resumed)
			}
			talk(t, conn, "alice")
		}
	})
	wantTLSHandshakes(t, s, "1.2_resumed", 2)
	wantTLSHandshakes(t, s, "1.3_resumed", 2)
	b.wait(t, "all sends", func() bool { return len(b.submitted) == 6 })
}

// choppedConn writes what it is given in pieces, or gathers it.
type choppedConn struct {
	net.Conn
	piece int
	hold  bool
	held  []byte
}

func (c *choppedConn) Write(p []byte) (int, error) {
	c.held = append(c.held, p...)
	if c.hold {
		return len(p), nil
	}
	return len(p), c.release()
}

func (c *choppedConn) release() error {
	for len(c.held) > 0 {
		n := min(len(c.held), c.piece)
		if _, err := c.Conn.Write(c.held[:n]); err != nil {
			return err
		}
		c.held = c.held[n:]
	}
	return nil
}

func TestTLSInPieces(t *testing.T) {
	s, b := serveTLS(t, nil)
	bothVersions(t, func(t *testing.T, version uint16) {
		for _, piece := range []int{1, 3, 100, 1500} {
			t.Run(fmt.Sprint(piece), func(t *testing.T) {
				talk(t, handshakeWith(t, &choppedConn{Conn: rawDial(t, s), piece: piece}, identity().clientOf(version)), "alice")
			})
		}
	})
	b.wait(t, "all sends", func() bool { return len(b.submitted) == 8 })
}

// TestTLSRecords: records of one byte, of 16 KiB with a hundred frames, and all of them in one write to the socket.
func TestTLSRecords(t *testing.T) {
	s, b := serveTLS(t, nil)
	bothVersions(t, func(t *testing.T, version uint16) {
		chopped := &choppedConn{Conn: rawDial(t, s), piece: 1 << 20}
		config := identity().clientOf(version)
		config.DynamicRecordSizingDisabled = true
		conn := handshakeWith(t, chopped, config)
		c := upgradeOn(t, conn)
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
		c.want(protocol.KindConnected)
		b.mu.Lock()
		before := len(b.submitted)
		b.mu.Unlock()

		chopped.hold = true
		one := clientFrame(ws.OpText, true, protocol.AppendJSON(nil, sendFrame(1, "in bytes")))
		for i := range one {
			if _, err := conn.Write(one[i : i+1]); err != nil {
				t.Fatal(err)
			}
		}
		if err := chopped.release(); err != nil {
			t.Fatal(err)
		}
		c.want(protocol.KindReceived)

		var many []byte
		var ends []int
		const frames = 60
		for i := range frames {
			many = append(many, clientFrame(ws.OpText, true, protocol.AppendJSON(nil, sendFrame(uint64(i+2), strings.Repeat("x", 900))))...)
			ends = append(ends, len(many))
		}
		if _, err := conn.Write(many); err != nil {
			t.Fatal(err)
		}
		last := chopped.held[len(chopped.held)-1:]
		chopped.held = chopped.held[:len(chopped.held)-1]
		if err := chopped.release(); err != nil {
			t.Fatal(err)
		}
		full := len(many) / tlsRecordBytes * tlsRecordBytes // the last record wants its last byte
		for i := 0; ends[i] <= full; i++ {
			c.want(protocol.KindReceived)
		}
		if full < 3*tlsRecordBytes || full == len(many) {
			t.Fatalf("%d bytes are of no use", len(many))
		}
		chopped.held = append(chopped.held, last...)
		if err := chopped.release(); err != nil {
			t.Fatal(err)
		}
		b.wait(t, "all sends", func() bool { return len(b.submitted) == before+frames+1 })
		chopped.hold = false
		conn.Close()
	})
}

// recordTypes notes the types of the records that are read. In TLS 1.2 they are to be seen.
type recordTypes struct {
	net.Conn
	mu    sync.Mutex
	raw   []byte
	types []byte
}

func (c *recordTypes) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.raw = append(c.raw, p[:n]...)
	for len(c.raw) >= 5 && len(c.raw) >= 5+int(binary.BigEndian.Uint16(c.raw[3:])) {
		c.types = append(c.types, c.raw[0])
		c.raw = c.raw[5+int(binary.BigEndian.Uint16(c.raw[3:])):]
	}
	return n, err
}

func (c *recordTypes) last() byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.raw) > 0 || len(c.types) == 0 {
		return 0
	}
	return c.types[len(c.types)-1]
}

const alertRecord = 21

func TestTLSCloseNotify(t *testing.T) {
	begin := func(t *testing.T, s *Server) (*recordTypes, *client, *tls.Conn) {
		wire := &recordTypes{Conn: rawDial(t, s)}
		conn := handshakeWith(t, wire, identity().clientOf(tls.VersionTLS12))
		c := upgradeOn(t, conn)
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
		c.want(protocol.KindConnected)
		return wire, c, conn
	}
	wantNotified := func(t *testing.T, wire *recordTypes) {
		t.Helper()
		if last := wire.last(); last != alertRecord {
			t.Errorf("the last record is of type %d", last)
		}
	}
	t.Run("by the server", func(t *testing.T) {
		s, b := serveTLS(t, nil)
		wire, c, _ := begin(t, s)
		s.Disconnect(b.live(t, "alice/default"))
		c.wantError(protocol.CodeUnauthorized)
		c.wantClose(protocol.CloseUnauthorized)
		wantNotified(t, wire)
	})
	t.Run("by the server that refuses the upgrade", func(t *testing.T) {
		s, _ := serveTLS(t, nil)
		wire := &recordTypes{Conn: rawDial(t, s)}
		conn := handshakeWith(t, wire, identity().clientOf(tls.VersionTLS12))
		fmt.Fprintf(conn, "GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if all, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(all), "HTTP/1.1 404") {
			t.Fatalf("got %q, %v", all, err)
		}
		wantNotified(t, wire)
	})
	t.Run("by the client", func(t *testing.T) {
		s, b := serveTLS(t, nil)
		wire, c, conn := begin(t, s)
		c.sendMessage(1, "and goodbye")
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got := b.submission(t, 0); got.content != "and goodbye" {
			t.Errorf("submitted %q", got.content)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Errorf("reads end with %v", err)
		}
		wantNotified(t, wire)
		b.wait(t, "the session to end", func() bool { return b.gone == 1 })
		eventually(t, "the connection to be closed", func() bool { return s.connections.Load() == 0 })
	})
	t.Run("by nobody", func(t *testing.T) {
		s, b := serveTLS(t, nil)
		_, _, conn := begin(t, s)
		conn.NetConn().(*recordTypes).Conn.Close()
		b.wait(t, "the session to end", func() bool { return b.gone == 1 })
	})
}

func TestTLSBrokenRecord(t *testing.T) {
	s, b := serveTLS(t, nil)
	bothVersions(t, func(t *testing.T, version uint16) {
		chopped := &choppedConn{Conn: rawDial(t, s), piece: 1 << 20}
		conn := handshakeWith(t, chopped, identity().clientOf(version))
		c := upgradeOn(t, conn)
		c.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice")})
		c.want(protocol.KindConnected)
		chopped.hold = true
		c.sendMessage(1, "forged")
		chopped.held[len(chopped.held)-1] ^= 1
		if err := chopped.release(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err == nil || !strings.Contains(err.Error(), "bad record MAC") {
			t.Errorf("got %v", err)
		}
	})
	b.wait(t, "both sessions to end", func() bool { return b.gone == 2 })
	eventually(t, "the reason", func() bool { return metric(s, "closes_total", "reason", "tls") == 2 })
	if len(b.submitted) != 0 {
		t.Error("a forged record was read")
	}
}

func TestNotTLS(t *testing.T) {
	s, _ := serveTLS(t, nil)
	for _, c := range []struct{ name, sent, want string }{
		{"HTTP", "GET /ws HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP/1.1 400"},
		{"SSH", "SSH-2.0-OpenSSH_9.6\r\n", ""},
		{"SSL 2", "\x80\x2e\x01\x00\x02", ""},
		{"an alert", "\x15\x03\x01\x00\x02\x02\x28", ""},
		{"a record that is too long", "\x16\x03\x01\xff\xff" + strings.Repeat("x", 100), "\x15\x03"},
		{"no client hello", "\x16\x03\x01\x00\x04\x02\x00\x00\x00", "\x15\x03"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := rawDial(t, s)
			io.WriteString(conn, c.sent)
			got, err := io.ReadAll(conn)
			if err != nil && !errors.Is(err, io.EOF) || !strings.HasPrefix(string(got), c.want) || c.want == "" && len(got) > 0 {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	eventually(t, "all connections to be closed", func() bool { return s.connections.Load() == 0 && s.tls.pending.Load() == 0 })
	talk(t, secured(t, rawDial(t, s)), "alice")
}

// TestTLSBehindTheProxyProtocol: a proxy that passes TLS on says first, in plain text, whose it is.
func TestTLSBehindTheProxyProtocol(t *testing.T) {
	s, _ := serveTLS(t, func(c *Config) { c.ProxyNetworks = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	const header = "PROXY TCP4 192.0.2.1 192.0.2.2 4000 443\r\n"
	for _, piece := range []int{1, 30, 1 << 20} {
		chopped := &choppedConn{Conn: rawDial(t, s), piece: piece, held: []byte(header)} // in one packet with the hello
		talk(t, handshakeWith(t, chopped, identity().config()), "alice")
	}
	conn := rawDial(t, s)
	conn.Write(clientHello(t, tls.VersionTLS13)) // without the header
	if got, err := io.ReadAll(conn); len(got) > 0 || err != nil && !isReset(err) {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestTLSTooMuchBeforeTheHandshake: what a client may send before it has made itself known is bounded.
func TestTLSTooMuchBeforeTheHandshake(t *testing.T) {
	s, _ := serveTLS(t, nil)
	conn := rawDial(t, s)
	hello := clientHello(t, tls.VersionTLS13)
	conn.Write(hello)
	conn.Write(bytes.Repeat([]byte{23, 3, 3, 0, 0}, maxTLSHandshakeBytes/5))
	if _, err := io.Copy(io.Discard, conn); err != nil && !isReset(err) {
		t.Fatal(err)
	}
	wantTLSHandshakes(t, s, "failed", 1)
	eventually(t, "nothing to be left", func() bool { return s.connections.Load() == 0 && s.tls.pending.Load() == 0 })
}

func isReset(err error) bool {
	return strings.Contains(err.Error(), "reset") || strings.Contains(err.Error(), "broken pipe")
}

// clientHello is the first flight of a client.
func clientHello(t testing.TB, version uint16) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer far.Close()
	go tls.Client(near, identity().clientOf(version)).Handshake()
	defer near.Close()
	b := make([]byte, 16<<10)
	n, err := far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	for n < 5+int(binary.BigEndian.Uint16(b[3:])) {
		m, err := far.Read(b[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	return b[:n]
}

// TestTLSHandshakeDeadline: silent, one byte a tick, half a hello, and a hello with nothing behind it: none lives longer than the time
// to authenticate, counted from accept, and none leaves anything behind.
func TestTLSHandshakeDeadline(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	s, _ := serveTLS(t, func(c *Config) { c.AuthenticateSeconds = 2 })
	hello := clientHello(t, tls.VersionTLS13)
	var slow atomic.Int64
	var wg sync.WaitGroup
	for i, first := range [][]byte{nil, hello[:1], hello[:len(hello)/2], hello, hello} {
		conn := rawDial(t, s)
		if _, err := conn.Write(first); err != nil {
			t.Fatal(err)
		}
		if i == 4 { // and then a record that never becomes whole, a byte at a time
			wg.Go(func() {
				for _, err := conn.Write([]byte{23}); err == nil; _, err = conn.Write([]byte{3}) {
					slow.Add(1)
					time.Sleep(100 * time.Millisecond) // the client's pace
				}
			})
		}
		wg.Go(func() {
			if _, err := io.Copy(io.Discard, conn); err != nil && !isReset(err) {
				t.Errorf("client %d: %v", i, err)
			}
			conn.Close()
		})
	}
	wg.Wait()
	if slow.Load() == 0 {
		t.Error("the slow client wrote nothing")
	}
	eventually(t, "the reasons", func() bool {
		return metric(s, "handshakes_total", "result", "timeout") == 5 && metric(s, "tls_handshakes_total", "result", "unfinished") == 5
	})
	eventually(t, "nothing to be left", func() bool { return s.connections.Load() == 0 && s.tls.pending.Load() == 0 })
	if n := runtime.NumGoroutine(); n > goroutines+50 {
		t.Errorf("%d goroutines, before the server %d", n, goroutines)
	}
}

// TestTLSHandshakeFlood: hellos without an end, far more than there may be. Handshakes, goroutines and memory stay within
// bounds, sessions go on, and afterwards everybody gets in again.
func TestTLSHandshakeFlood(t *testing.T) {
	const most, flood = 60, 400
	s, b := serveTLS(t, func(c *Config) { c.AuthenticateSeconds, c.tlsHandshakes = 30, most })
	old := login(t, s, protocol.SubprotocolBinary, "alice", "phone")
	hello := clientHello(t, tls.VersionTLS13)
	var before, during runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	goroutines := runtime.NumGoroutine()

	var conns []net.Conn
	for range flood {
		conn := rawDial(t, s)
		conn.Write(hello)
		conns = append(conns, conn)
	}
	wantTLSHandshakes(t, s, "overloaded", flood-most)
	if n := s.tls.pending.Load(); n != most {
		t.Errorf("%d handshakes are pending, want %d", n, most)
	}
	if n := runtime.NumGoroutine(); n > goroutines+most+10 {
		t.Errorf("%d goroutines more", n-goroutines)
	}
	runtime.GC()
	runtime.ReadMemStats(&during)
	t.Logf("%d pending handshakes: %d B of heap and %d B of stacks each", most,
		(int64(during.HeapAlloc)-int64(before.HeapAlloc))/most, (int64(during.StackInuse)-int64(before.StackInuse))/most)

	old.sendMessage(1, "meanwhile")
	old.want(protocol.KindReceived)
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "the flood to be gone", func() bool { return s.tls.pending.Load() == 0 && s.connections.Load() == 1 })
	talk(t, secured(t, rawDial(t, s)), "carol")
	b.submission(t, 1)
}

// TestTLSStopDuringHandshakes: goroutines end with the server.
func TestTLSStopDuringHandshakes(t *testing.T) {
	b := newStub()
	cfg := testConfig(b)
	cfg.Certificate = identity().source
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.server = s
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	hello := clientHello(t, tls.VersionTLS12)
	for range 20 {
		rawDial(t, s).Write(hello)
	}
	eventually(t, "handshakes", func() bool { return s.tls.pending.Load() == 20 })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "goroutines to end", func() bool { return s.tls.pending.Load() == 0 })
}

// TestTLSCertificateChanges: each handshake asks for the certificate, and who is connected stays.
func TestTLSCertificateChanges(t *testing.T) {
	first, second := newECDSA(), newECDSA()
	var now atomic.Pointer[testIdentity]
	now.Store(first)
	s, _ := serve(t, func(c *Config) {
		c.Certificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { return now.Load().source(h) }
	})
	config := first.config()
	config.RootCAs.AddCert(second.certificate.Leaf)
	old := upgradeOn(t, handshakeWith(t, rawDial(t, s), config))
	old.send(&protocol.Frame{Kind: protocol.KindConnect, Token: []byte("old")})
	old.want(protocol.KindConnected)

	var saw [2]atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				conn, err := tls.Dial("tcp", s.Addr(), config)
				if err != nil {
					t.Error(err)
					return
				}
				i := 0
				if conn.ConnectionState().PeerCertificates[0].Equal(second.certificate.Leaf) {
					i = 1
				}
				if saw[i].Add(1) == 10 && i == 0 {
					now.Store(second)
				}
				conn.Close()
			}
		})
	}
	wg.Wait()
	if saw[0].Load() < 10 || saw[1].Load() < 10 {
		t.Errorf("%d handshakes with the first certificate, %d with the second", saw[0].Load(), saw[1].Load())
	}
	old.sendMessage(1, "still here")
	old.want(protocol.KindReceived)
}

// tool finds a program that some tests drive. Where MILLRACE_TEST_TOOLS is set it must be there.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	switch {
	case err == nil:
	case os.Getenv("MILLRACE_TEST_TOOLS") != "" && name == "openssl":
		t.Fatalf("%s is not installed: %v", name, err)
	default:
		t.Skipf("NOT TESTED: %s is not installed", name)
	}
	return path
}

// TestOpenSSL drives `openssl s_client`: another implementation, and what Go's client cannot do.
func TestOpenSSL(t *testing.T) {
	openssl := tool(t, "openssl")
	s, _ := serveTLS(t, nil)
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	writeCertificate(t, ca)
	type step struct{ say, until string }
	run := func(t *testing.T, steps []step, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, openssl, append([]string{"s_client", "-connect", s.Addr(), "-servername", "localhost", "-CAfile", ca}, args...)...)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		var out lockedBuffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for _, step := range steps {
			io.WriteString(stdin, step.say)
			eventually(t, "openssl to print "+step.until, func() bool { return strings.Contains(out.String(), step.until) })
		}
		stdin.Close()
		_ = cmd.Wait() // its exit code says little
		return out.String()
	}
	get := []step{{"GET / HTTP/1.1\nHost: localhost\n\n", "HTTP/1.1 "}}
	wants := func(t *testing.T, out string, list ...string) {
		t.Helper()
		for _, want := range list {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
		}
	}
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		t.Run("request"+version, func(t *testing.T) {
			out := run(t, get, version, "-alpn", "http/1.1", "-crlf", "-ign_eof", "-verify_return_error")
			wants(t, out, "HTTP/1.1 ", "Verify return code: 0 (ok)", "ALPN protocol: http/1.1", "closed")
		})
		t.Run("resume"+version, func(t *testing.T) {
			session := filepath.Join(dir, "session"+version)
			run(t, get, version, "-crlf", "-ign_eof", "-sess_out", session)
			wants(t, run(t, get, version, "-crlf", "-ign_eof", "-sess_in", session), "Reused, TLSv")
		})
	}
	t.Run("renegotiation", func(t *testing.T) {
		wants(t, run(t, []step{{"", "SSL handshake has read"}, {"R\n", "alert unexpected message"}}, "-tls1_2"), "RENEGOTIATING")
	})
	t.Run("key update", func(t *testing.T) { // K asks the server for new keys, too
		steps := append([]step{{"", "SSL handshake has read"}, {"K\n", "KEYUPDATE"}}, get...)
		wants(t, run(t, steps, "-tls1_3", "-crlf"), "HTTP/1.1 ")
	})
	t.Run("fallback", func(t *testing.T) {
		wants(t, run(t, nil, "-fallback_scsv", "-no_tls1_3"), "inappropriate fallback")
	})
	t.Run("old version", func(t *testing.T) {
		wants(t, run(t, nil, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"), "alert protocol version")
	})
	eventually(t, "nothing to be left", func() bool { return s.connections.Load() == 0 && s.tls.pending.Load() == 0 })
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func writeCertificate(t testing.TB, path string) {
	t.Helper()
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: identity().certificate.Certificate[0]})
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestNode connects with the WebSocket of Node, which is that of browsers in what it demands of a server.
func TestNode(t *testing.T) {
	node := tool(t, "node")
	s, b := serveTLS(t, nil)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	writeCertificate(t, ca)
	_, port, err := net.SplitHostPort(s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, node, "--experimental-websocket", "--dns-result-order=ipv4first", "-e", `
const socket = new WebSocket(process.argv[1], "millrace.v1.json");
socket.onopen = () => socket.send(JSON.stringify({action: "connect", token: "alice"}));
socket.onmessage = (e) => {
  const frame = JSON.parse(e.data);
  console.log(frame.type || frame.action);
  if (frame.type === "connected") {
    socket.send(JSON.stringify({action: "send_message", receiver_id: "bob", content: "from node", message_id_by_client: 1}));
  } else if (frame.action === "message_received") {
    socket.close(1000);
  }
};
socket.onerror = (e) => { console.log("error", e.message || e.error); process.exitCode = 1; };
socket.onclose = (e) => console.log("closed", e.code);
`, "wss://localhost:"+port+"/ws")
	cmd.Env = append(os.Environ(), "NODE_EXTRA_CA_CERTS="+ca)
	out, err := cmd.CombinedOutput()
	if want := "connected\nmessage_received\nclosed 1000"; err != nil || !strings.Contains(string(out), want) {
		t.Fatalf("%v\n%s", err, out)
	}
	if got := b.submission(t, 0); got.content != "from node" {
		t.Errorf("submitted %q", got.content)
	}
}
