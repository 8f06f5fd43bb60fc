package edge

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"

	"millrace/protocol"
)

// proxyV2 makes a version 2 header; more is what follows the addresses.
func proxyV2(command, family byte, body string) string {
	return string(proxyV2Signature) + string([]byte{command, family, byte(len(body) >> 8), byte(len(body))}) + body
}

const (
	v4Body   = "\xc0\x00\x02\x01\xc6\x33\x64\x01\xdc\x04\x01\xbb"                                                                                                           // 192.0.2.1, 198.51.100.1
	v6Body   = "\x20\x01\x0d\xb8\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x05" + "\x20\x01\x0d\xb8\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x06" + "\xdc\x04\x01\xbb" // 2001:db8:0:1::5
	tlvALPN  = "\x01\x00\x08http/1.1"
	tlvNoop  = "\x04\x00\x03\x00\x00\x00"
	longName = "a.very.long.name.of.a.host.that.a.client.has.asked.for.example.org"
)

var proxyCases = []struct {
	name   string
	header string
	client string // "": none is named
	bad    bool
}{
	{"TCP4", "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", "192.0.2.1", false},
	{"TCP6", "PROXY TCP6 2001:db8:0:1::5 2001:db8:0:2::6 56324 443\r\n", "2001:db8:0:1::5", false},
	{"TCP6 mapped", "PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.1 56324 443\r\n", "192.0.2.1", false},
	{"longest TCP6", "PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
		"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", false},
	{"UNKNOWN", "PROXY UNKNOWN\r\n", "", false},
	{"longest UNKNOWN", "PROXY UNKNOWN" + strings.Repeat(" f", 46) + "\r\n", "", false},
	{"v4", proxyV2(0x21, 0x11, v4Body), "192.0.2.1", false},
	{"v6", proxyV2(0x21, 0x21, v6Body), "2001:db8:0:1::5", false},
	{"v6 mapped", proxyV2(0x21, 0x21, strings.Repeat("\x00", 10)+"\xff\xff\xc0\x00\x02\x01"+v6Body[16:]), "192.0.2.1", false},
	{"v4 with TLVs", proxyV2(0x21, 0x11, v4Body+tlvALPN+tlvNoop+"\x02\x00"+string(rune(len(longName)))+longName), "192.0.2.1", false},
	{"v4 with TLVs nobody reads", proxyV2(0x21, 0x11, v4Body+"\xff\xff\xff\xff"), "192.0.2.1", false},
	{"longest", proxyV2(0x21, 0x21, v6Body+strings.Repeat("t", maxProxyBytes-proxyV2Bytes-len(v6Body))), "2001:db8:0:1::5", false},
	{"UNIX", proxyV2(0x21, 0x31, strings.Repeat("/", 216)), "", false},
	{"UNSPEC", proxyV2(0x21, 0x00, ""), "", false},
	{"UNSPEC with TLVs", proxyV2(0x21, 0x00, tlvNoop), "", false},
	{"LOCAL", proxyV2(0x20, 0x00, ""), "", false},
	{"LOCAL with addresses", proxyV2(0x20, 0x11, v4Body), "", false},
	{"LOCAL with a family that nobody knows", proxyV2(0x20, 0xff, "?"), "", false},

	{name: "nothing of it", header: "GET / HTTP/1.1\r\n", bad: true},
	{name: "TLS", header: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bad: true},
	{name: "nearly a signature", header: "\r\n\r\n\x00\r\nQUIT\r", bad: true},
	{name: "nearly PROXY", header: "PROXYX", bad: true},
	{name: "lower case", header: "proxy TCP4 192.0.2.1 198.51.100.1 56324 443\r\n", bad: true},
	{name: "TCP4 of IPv6", header: "PROXY TCP4 2001:db8::1 2001:db8::2 56324 443\r\n", bad: true},
	{name: "TCP6 of IPv4", header: "PROXY TCP6 192.0.2.1 198.51.100.1 56324 443\r\n", bad: true},
	{name: "two families", header: "PROXY TCP6 2001:db8::1 198.51.100.1 56324 443\r\n", bad: true},
	{name: "UDP4", header: "PROXY UDP4 192.0.2.1 198.51.100.1 56324 443\r\n", bad: true},
	{name: "a zone", header: "PROXY TCP6 fe80::1%lo fe80::2 56324 443\r\n", bad: true},
	{name: "port", header: "PROXY TCP4 192.0.2.1 198.51.100.1 65536 443\r\n", bad: true},
	{name: "signed port", header: "PROXY TCP4 192.0.2.1 198.51.100.1 +1 443\r\n", bad: true},
	{name: "two spaces", header: "PROXY TCP4  192.0.2.1 198.51.100.1 56324 443\r\n", bad: true},
	{name: "too few fields", header: "PROXY TCP4 192.0.2.1 198.51.100.1 56324\r\n", bad: true},
	{name: "too many fields", header: "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443 1\r\n", bad: true},
	{name: "nothing named", header: "PROXY \r\n", bad: true},
	{name: "bare LF", header: "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\n", bad: true},
	{name: "leading zeros", header: "PROXY TCP4 192.0.02.01 198.51.100.1 56324 443\r\n", bad: true},
	{name: "a byte too long", header: "PROXY UNKNOWN" + strings.Repeat(" ", 93) + "\r\n", bad: true},
	{name: "without an end", header: "PROXY " + strings.Repeat("A", 200), bad: true},
	{name: "version 1 in binary", header: proxyV2(0x11, 0x11, v4Body), bad: true},
	{name: "version 3", header: proxyV2(0x31, 0x11, v4Body), bad: true},
	{name: "command", header: proxyV2(0x22, 0x11, v4Body), bad: true},
	{name: "datagram", header: proxyV2(0x21, 0x12, v4Body), bad: true},
	{name: "family", header: proxyV2(0x21, 0x41, v4Body), bad: true},
	{name: "short v4", header: proxyV2(0x21, 0x11, v4Body[:11]), bad: true},
	{name: "short v6", header: proxyV2(0x21, 0x21, v6Body[:35]), bad: true},
	{name: "short UNIX", header: proxyV2(0x21, 0x31, strings.Repeat("/", 215)), bad: true},
	{name: "too long", header: proxyV2(0x21, 0x11, v4Body+strings.Repeat("t", maxProxyBytes)), bad: true},
	{name: "far too long", header: string(proxyV2Signature) + "\x21\x11\xff\xff", bad: true},
}

func TestParseProxy(t *testing.T) {
	const behind = "GET /ws HTTP/1.1\r\n"
	for _, c := range proxyCases {
		t.Run(c.name, func(t *testing.T) {
			whole := []byte(c.header + behind)
			if c.bad {
				for n := range len(whole) + 1 {
					if _, end, ok := parseProxy(whole[:n]); !ok {
						return
					} else if end != 0 {
						t.Fatalf("taken with %d bytes", n)
					}
				}
				t.Fatal("never refused")
			}
			for n := range len(whole) + 1 {
				client, end, ok := parseProxy(whole[:n])
				switch complete := n >= len(c.header); {
				case !ok || complete != (end != 0):
					t.Fatalf("after %d of %d bytes: %v %d %v", n, len(c.header), client, end, ok)
				case !complete:
				case end != len(c.header) || c.client == "" && client.IsValid() || c.client != "" && client != netip.MustParseAddr(c.client):
					t.Fatalf("%v, %d bytes, want %s and %d", client, end, c.client, len(c.header))
				}
			}
		})
	}
}

var proxyNetworks = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}

// TestProxyHeaderInPieces: cut anywhere, the header is read and nothing that follows it is lost.
func TestProxyHeaderInPieces(t *testing.T) {
	for _, c := range proxyCases {
		request := upgradeText(protocol.SubprotocolBinary, "")
		connect := encode(false, &protocol.Frame{Kind: protocol.KindConnect, Token: []byte("alice"), Device: []byte("phone")})
		whole := c.header + request + string(connect)
		b := newBench(t, func(c *Config) {
			c.ProxyNetworks = proxyNetworks
			c.Address.Connections = 1
		})
		for cut := range len(whole) + 1 {
			s := b.from("192.0.2.77")
			deliver := func(part string) {
				if !s.closed && part != "" {
					s.receive([]byte(part))
				}
			}
			switch cut {
			case 0: // byte for byte
				for i := range len(whole) {
					deliver(whole[i : i+1])
				}
			default:
				deliver(whole[:cut])
				deliver(whole[cut:])
			}
			if c.bad {
				if !bytes.HasPrefix(s.out, []byte("HTTP/1.1 400 ")) || !bytes.Contains(s.out, []byte("PROXY")) {
					t.Fatalf("%s, cut at %d: %q", c.name, cut, s.out)
				}
			} else if s.conn.state != stateRegistering || (s.conn.address != 0) != (c.client != "") {
				t.Fatalf("%s, cut at %d: state %d, address %d: %q", c.name, cut, s.conn.state, s.conn.address, s.out)
			}
			s.close()
			for _, r := range b.asked {
				b.l.registered(&protocol.Registered{To: r.Session})
			}
			b.asked = b.asked[:0]
			if n := b.s.limits.addresses.size(); n != 0 {
				t.Fatalf("%d addresses are left", n)
			}
		}
		if b.l.m.panics != 0 {
			t.Fatalf("%s: %d panics", c.name, b.l.m.panics)
		}
	}
}

// TestProxiedAddress: the limits are the client's, not the proxy's; only who is listed may say whose connection it is.
func TestProxiedAddress(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.ProxyNetworks = proxyNetworks
		c.Address.Connections = 2
	})
	proxied := func(client string) *fakeSocket {
		s := b.from("192.0.2.77")
		family := "TCP4"
		if strings.Contains(client, ":") {
			family = "TCP6"
		}
		to := map[string]string{"TCP4": "198.51.100.1", "TCP6": "2001:db8::9"}[family]
		s.receive([]byte(fmt.Sprintf("PROXY %s %s %s 1 2\r\n", family, client, to) + "GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
		return s
	}
	wants := func(s *fakeSocket, status string) {
		t.Helper()
		if !bytes.HasPrefix(s.out, []byte("HTTP/1.1 "+status+" ")) {
			t.Errorf("want %s, got %.40q", status, s.out)
		}
	}
	for range 2 {
		wants(proxied("203.0.113.1"), "200")
		wants(proxied("203.0.113.2"), "200")
		wants(proxied("2001:db8:5::1"), "200")
		wants(proxied("127.0.0.1"), "200")
	}
	wants(proxied("203.0.113.1"), "429")
	wants(proxied("2001:db8:5::2"), "429")
	wants(proxied("127.0.0.1"), "200")
	// The same address without a proxy.
	wants(b.from("203.0.113.1"), "429")

	for _, other := range []string{"192.0.3.1", "::1", "2001:db9::1"} {
		for _, header := range []string{proxyV2(0x21, 0x11, v4Body), "PROXY TCP4 203.0.113.9 198.51.100.1 1 2\r\n"} {
			s := b.from(other)
			s.receive([]byte(header + "GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
			wants(s, "400")
			s.close()
		}
	}
	s := b.from("::ffff:192.0.2.5")
	s.receive([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	wants(s, "400")
	s = b.from("2001:db8::1") // never says anything
	b.pass(protocol.AuthenticateSeconds * 1e9)
	if !s.closed {
		t.Error("a proxy need not say anything")
	}
	if b.limited(limitAddressConnections) != 3 || b.l.m.panics != 0 {
		t.Errorf("%d limited, %d panics", b.limited(limitAddressConnections), b.l.m.panics)
	}
}

func TestProxyOverSockets(t *testing.T) {
	s, _ := serve(t, func(c *Config) {
		c.ProxyNetworks = []netip.Prefix{netip.MustParsePrefix("127.0.0.8/29")}
		c.Address.Connections = 2
	})
	through := func(proxy, header string) *client {
		conn := dialFrom(t, s, proxy)
		if _, err := io.WriteString(conn, header+upgradeText(protocol.SubprotocolBinary, "Authorization: Bearer alice\r\n")); err != nil {
			t.Fatal(err)
		}
		return &client{t: t, conn: conn, r: bufio.NewReader(conn)}
	}
	for range 2 {
		c := through("127.0.0.9", proxyV2(0x21, 0x11, v4Body+tlvALPN))
		c.wantStatus(101)
		c.want(protocol.KindConnected)
	}
	through("127.0.0.10", "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n").wantStatus(429)
	through("127.0.0.10", "PROXY TCP4 192.0.2.2 198.51.100.1 1 2\r\n").wantStatus(101)
	through("127.0.0.15", proxyV2(0x20, 0, "")).wantStatus(101)
	through("127.0.0.15", "").wantStatus(400)
	through("127.0.0.16", "").wantStatus(101)
	through("127.0.0.16", "PROXY TCP4 192.0.2.2 198.51.100.1 1 2\r\n").wantStatus(400)
}

// TestProxyBeforeTLS: the header comes in clear before the handshake, of which it is no part; without it, or over a limit, there is none.
func TestProxyBeforeTLS(t *testing.T) {
	s, _ := serve(t, func(c *Config) {
		c.ProxyNetworks = []netip.Prefix{netip.MustParsePrefix("127.0.0.8/29")}
		c.Address.Connections = 2
		c.Certificate = identity().source
	})
	for _, header := range []string{proxyV2(0x21, 0x11, v4Body+tlvALPN), "PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n"} {
		conn := dialFrom(t, s, "127.0.0.9")
		for _, part := range []string{header[:7], header[7:]} {
			if _, err := io.WriteString(conn, part); err != nil {
				t.Fatal(err)
			}
		}
		conn = secured(t, conn)
		if _, err := io.WriteString(conn, upgradeText(protocol.SubprotocolBinary, "Authorization: Bearer alice\r\n")); err != nil {
			t.Fatal(err)
		}
		c := &client{t: t, conn: conn, r: bufio.NewReader(conn)}
		c.wantStatus(101)
		c.want(protocol.KindConnected)
	}
	for _, header := range []string{"PROXY TCP4 192.0.2.1 198.51.100.1 1 2\r\n", ""} {
		conn := dialFrom(t, s, "127.0.0.9")
		if _, err := io.WriteString(conn, header); err != nil {
			t.Fatal(err)
		}
		if err := tls.Client(conn, identity().config()).Handshake(); err == nil {
			t.Errorf("a handshake behind %q", header)
		}
	}
	secured(t, dialFrom(t, s, "127.0.0.16"))
	eventually(t, "what was refused", func() bool { return metric(s, "limited_total", "limit", "address_connections") == 1 })
}

func FuzzProxy(f *testing.F) {
	for _, c := range proxyCases {
		f.Add([]byte(c.header))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		client, end, ok := parseProxy(data)
		if end > min(len(data), maxProxyBytes) || !ok && (end != 0 || client.IsValid()) || end == 0 && client.IsValid() || client.Is4In6() {
			t.Fatal(client, end, ok)
		}
		if ok && end == 0 && len(data) >= maxProxyBytes {
			t.Fatal("waits for ever")
		}
		// What is decided stays decided, and is decided by the header alone.
		for n := range min(len(data), maxProxyBytes) {
			client2, end2, ok2 := parseProxy(data[:n])
			switch {
			case !ok2 && ok, ok2 && end2 != 0 && (end2 != end || client2 != client), end != 0 && n >= end && end2 != end:
				t.Fatalf("%d bytes: %v %d %v, all: %v %d %v", n, client2, end2, ok2, client, end, ok)
			}
		}
	})
}
