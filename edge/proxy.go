package edge

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strconv"
)

// This file reads the PROXY protocol, versions 1 and 2 (haproxy.org, proxy-protocol.txt): a proxy that passes bytes on says first
// whose they are. It is read from the networks of Config.ProxyNetworks, where it is required, and from nobody else: who could write
// one freely could choose an address.

const (
	maxProxyBytes   = 536 // of a version 2 header, with its TLVs, which are not read; what any TCP segment holds, as the specification wants
	maxProxyV1Bytes = 107 // with its CRLF
	proxyV2Bytes    = 16  // before the addresses
)

var (
	proxyV2Signature = []byte("\r\n\r\n\x00\r\nQUIT\n")
	proxyV1Signature = []byte("PROXY ")
)

// parseProxy reads the header at the start of b. end is its length, 0 while it is incomplete; ok is false when it is none. client is
// invalid when the proxy does not say whose connection it is: a check of its own (LOCAL), or a family that is not IP.
func parseProxy(b []byte) (client netip.Addr, end int, ok bool) {
	switch n := len(b); {
	case bytes.HasPrefix(b, proxyV2Signature):
		return parseProxyV2(b)
	case bytes.HasPrefix(b, proxyV1Signature):
		return parseProxyV1(b)
	default:
		return client, 0, n < len(proxyV2Signature) && bytes.HasPrefix(proxyV2Signature, b) ||
			n < len(proxyV1Signature) && bytes.HasPrefix(proxyV1Signature, b)
	}
}

func parseProxyV2(b []byte) (client netip.Addr, end int, ok bool) {
	const local, proxied = 0x20, 0x21 // version and command
	if len(b) > 12 && b[12] != local && b[12] != proxied {
		return client, 0, false
	}
	if len(b) < proxyV2Bytes {
		return client, 0, true
	}
	end = proxyV2Bytes + int(binary.BigEndian.Uint16(b[14:]))
	family, least := b[13], 0
	switch {
	case b[12] == local: // all of it is to be skipped
		family = proxyUnspecified
	case family == proxyTCP4:
		least = 4 + 4 + 2 + 2
	case family == proxyTCP6:
		least = 16 + 16 + 2 + 2
	case family == proxyUnix:
		least = 108 + 108
	case family != proxyUnspecified:
		return client, 0, false
	}
	if end > maxProxyBytes || end < proxyV2Bytes+least {
		return client, 0, false
	}
	if len(b) < end {
		return client, 0, true
	}
	switch addresses := b[proxyV2Bytes:]; family {
	case proxyTCP4:
		client = netip.AddrFrom4([4]byte(addresses))
	case proxyTCP6:
		client = netip.AddrFrom16([16]byte(addresses)).Unmap()
	}
	return client, end, true
}

// Families and protocols of version 2. A datagram cannot have come over TCP.
const (
	proxyUnspecified = 0x00
	proxyTCP4        = 0x11
	proxyTCP6        = 0x21
	proxyUnix        = 0x31
)

// parseProxyV1 reads "PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n".
func parseProxyV1(b []byte) (client netip.Addr, end int, ok bool) {
	lf := bytes.IndexByte(b[:min(len(b), maxProxyV1Bytes)], '\n')
	if lf < 0 {
		return client, 0, len(b) < maxProxyV1Bytes
	}
	line, ok := bytes.CutSuffix(b[:lf], []byte{'\r'})
	if !ok {
		return client, 0, false
	}
	fields := bytes.Split(line, []byte{' '})
	if string(fields[1]) == "UNKNOWN" { // whatever follows it
		return client, lf + 1, true
	}
	if len(fields) != 6 {
		return client, 0, false
	}
	from, err1 := netip.ParseAddr(string(fields[2]))
	to, err2 := netip.ParseAddr(string(fields[3]))
	_, err3 := strconv.ParseUint(string(fields[4]), 10, 16)
	_, err4 := strconv.ParseUint(string(fields[5]), 10, 16)
	family := string(fields[1])
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil || from.Zone() != "" || from.Is4() != (family == "TCP4") ||
		from.Is6() != (family == "TCP6") || from.Is4() != to.Is4() {
		return client, 0, false
	}
	return from.Unmap(), lf + 1, true
}

// MaxProxyNetworks is how many Config.ProxyNetworks there may be: each is compared with each connection.
const MaxProxyNetworks = 64

// networks are ranges of addresses.
type networks []netip.Prefix

func (n networks) contain(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	for _, p := range n {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// tryReadProxy reads the header that comes before everything else from a proxy, TLS too, and returns what follows it.
func (l *loop) tryReadProxy(c *conn, data []byte) (rest []byte) {
	defer l.recoverFrom(l.session(c).Conn)
	c.heard = l.tick
	rest = l.readProxy(c, data)
	l.m.bytesIn += uint64(len(data) - len(rest))
	return rest
}

func (l *loop) readProxy(c *conn, data []byte) (rest []byte) {
	b, kept := data, 0
	if c.work != nil {
		p := c.work.reader.partial
		kept = len(p.B)
		p.B = append(p.B, data[:min(len(data), maxProxyBytes-kept)]...)
		b = p.B
	}
	client, end, ok := parseProxy(b)
	if ok && end == 0 {
		if c.work == nil {
			w := l.borrow(c)
			w.reader.partial = inputs.Get()
			w.reader.partial.B = append(w.reader.partial.B, data...)
		}
		return nil
	}
	l.release(c)
	c.flags &^= flagProxy
	if !ok {
		l.refuseProxied(c, httpError{400, "a PROXY protocol header is required from this address"})
		return nil
	}
	var why admission
	if c.address, why = l.server.limits.enterAddress(client, l.nowMs); why != admitted {
		l.limited(limitOfAddress[why], client)
		l.refuseProxied(c, addressErrors[why])
		return nil
	}
	return data[end-kept:]
}

// refuseProxied refuses what has sent no request yet. Before a TLS handshake there are no words for it.
func (l *loop) refuseProxied(c *conn, e httpError) {
	if l.tls == nil {
		l.refuseUpgrade(c, e)
		return
	}
	l.m.handshakes[handshakeResult(e.status)]++
	c.reason = closeHandshake
	l.doom(c)
}
