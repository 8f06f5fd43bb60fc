package edge

import (
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"strconv"

	"millrace/protocol"
)

// Limits of an upgrade request.
const (
	maxHeadBytes        = 8 << 10 // request line and header fields, with the empty line that ends them
	maxHeadLines        = 64      // the request line among them
	maxRequestLineBytes = 4 << 10
)

// webSocketPath is the one path that upgrades.
const webSocketPath = "/ws"

// headScan finds the end of a request's head. It looks at every byte once, however the bytes are cut, and refuses
// what no valid head can become, so that nothing but a slow, well-formed start waits for the deadline.
type headScan struct {
	at        uint16 // bytes looked at
	lineStart uint16
	lines     uint8
	cr        bool // the last byte was a CR
}

// scan goes on where the last call stopped; b is everything since the start of the request. end is the length of the head once
// its empty line was found, else 0. status is the HTTP status to refuse with, else 0.
func (s *headScan) scan(b []byte) (end, status int) {
	for int(s.at) < len(b) {
		if s.at == maxHeadBytes {
			return 0, 431
		}
		c := b[s.at]
		switch {
		case s.at == 0 && (c < 'A' || c > 'Z'):
			return 0, 400 // no method starts like this: TLS, or another protocol
		case s.cr && c != '\n', !s.cr && c == '\n', c == 0:
			return 0, 400 // bare CR, bare LF, NUL
		case c == '\r':
			s.cr = true
		case c == '\n':
			s.cr = false
			length := s.at - 1 - s.lineStart
			if length == 0 {
				return int(s.at) + 1, 0
			}
			if s.lines++; s.lines > maxHeadLines {
				return 0, 431
			}
			s.lineStart = s.at + 1
		case s.lines == 0 && s.at >= maxRequestLineBytes:
			return 0, 431
		}
		s.at++
	}
	return 0, 0
}

// upgradeRequest is a parsed head. Its slices point into the head.
type upgradeRequest struct {
	key    []byte
	token  []byte // of Authorization: Bearer; nil when there is none
	device []byte // of the query, with a token; empty when there is none
	json   bool
	echo   bool   // never set but in a test build, see echo.go
	chosen string // the subprotocol to name in the response; "" when none was offered
}

// httpError is why a request is not upgraded. The zero value means that it is.
type httpError struct {
	status int
	text   string
}

// head is what parseHead collects before anything is judged.
type head struct {
	host, origin, key, version, authorization []byte

	hosts, origins, keys, versions, authorizations int

	upgrade, connection  bool
	protocols, known     int    // offered, and of those known
	chosen               string // the first known in the client's order
	bodyBytes, transfers bool
}

// parseUpgrade judges a complete head (as headScan delimits it).
func parseUpgrade(b []byte, origins []origin) (r upgradeRequest, e httpError) {
	line, b := cutLine(b)
	method, target, ok := requestLine(line)
	if !ok {
		return r, httpError{400, "malformed request line; this server speaks HTTP/1.1 and WebSocket"}
	}
	var h head
	if e = h.parse(b); e.status != 0 {
		return r, e
	}
	if h.hosts != 1 {
		return r, httpError{400, "exactly one Host is required"}
	}
	if string(method) != "GET" {
		return r, httpError{405, "only GET is allowed"}
	}
	if h.bodyBytes || h.transfers {
		return r, httpError{400, "a request with a body cannot be upgraded"}
	}
	path, query, _ := bytes.Cut(target, []byte{'?'})
	r.echo = isEchoPath(path)
	switch {
	case string(path) == webSocketPath || r.echo:
	case string(path) == "/":
		return r, httpError{status: 200}
	default:
		return r, httpError{404, "not found; WebSocket clients connect to " + webSocketPath}
	}
	if e = h.judge(origins); e.status != 0 {
		return r, e
	}
	if h.authorizations > 0 && !r.echo {
		if r.device, ok = queryDevice(query); !ok {
			return r, httpError{400, "device is not a device id: 1 to 32 of A-Z a-z 0-9 . _ @ -"}
		}
		if r.token, ok = bearer(h.authorization); !ok || h.authorizations > 1 {
			return r, httpError{401, "the Authorization header is not one Bearer token"}
		}
	}
	r.key, r.chosen = h.key, h.chosen
	r.json = h.chosen != protocol.SubprotocolBinary
	return r, httpError{}
}

func cutLine(b []byte) (line, rest []byte) {
	i := bytes.IndexByte(b, '\n')
	return b[:i-1], b[i+1:]
}

// requestLine takes a line apart. Only the origin form of a target is accepted.
func requestLine(line []byte) (method, target []byte, ok bool) {
	method, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok || !isToken(method) {
		return nil, nil, false
	}
	target, version, ok := bytes.Cut(rest, []byte{' '})
	if !ok || string(version) != "HTTP/1.1" || len(target) == 0 || target[0] != '/' {
		return nil, nil, false
	}
	for _, c := range target {
		if c <= ' ' || c >= 0x7f {
			return nil, nil, false
		}
	}
	return method, target, true
}

// parse reads the header fields up to the empty line.
func (h *head) parse(b []byte) httpError {
	for {
		var line []byte
		if line, b = cutLine(b); len(line) == 0 {
			return httpError{}
		}
		name, value, ok := bytes.Cut(line, []byte{':'})
		// A line that starts with white space continues the one before (obs-fold), and a name followed by
		// white space is how requests are smuggled: neither is a token.
		if !ok || !isToken(name) {
			return httpError{400, "malformed header field"}
		}
		if value = trimSpace(value); !isFieldValue(value) {
			return httpError{400, "a header field contains a control character"}
		}
		h.field(name, value)
	}
}

func (h *head) field(name, value []byte) {
	is := func(s string) bool { return len(name) == len(s) && equalFold(name, s) }
	switch {
	case is("host"):
		h.host = value
		h.hosts++
	case is("origin"):
		h.origin = value
		h.origins++
	case is("upgrade"):
		eachElement(value, func(v []byte) { h.upgrade = h.upgrade || equalFold(v, "websocket") })
	case is("connection"):
		eachElement(value, func(v []byte) { h.connection = h.connection || equalFold(v, "upgrade") })
	case is("sec-websocket-key"):
		h.key = value
		h.keys++
	case is("sec-websocket-version"):
		h.version = value
		h.versions++
	case is("sec-websocket-protocol"):
		eachElement(value, h.offer)
	case is("authorization"):
		h.authorization = value
		h.authorizations++
	case is("content-length"):
		h.bodyBytes = h.bodyBytes || string(value) != "0"
	case is("transfer-encoding"):
		h.transfers = true
	}
}

func (h *head) offer(name []byte) {
	h.protocols++
	for _, known := range [...]string{protocol.SubprotocolBinary, protocol.SubprotocolJSON} {
		if string(name) == known {
			if h.known++; h.known == 1 {
				h.chosen = known
			}
		}
	}
}

// judge checks what RFC 6455 §4.2.1 asks of a WebSocket handshake, and the origin.
func (h *head) judge(origins []origin) httpError {
	switch {
	case !h.upgrade || !h.connection:
		return httpError{426, "this is a WebSocket endpoint: Upgrade: websocket and Connection: Upgrade are required"}
	case h.versions != 1 || string(h.version) != "13":
		return httpError{426, "Sec-WebSocket-Version 13 is required"}
	case h.keys != 1 || !validKey(h.key):
		return httpError{400, "exactly one Sec-WebSocket-Key of 16 bytes in base64 is required"}
	case h.origins > 1:
		return httpError{400, "more than one Origin"}
	case h.origins == 1 && !allowedOrigin(h.origin, h.host, origins):
		return httpError{403, "this Origin is not allowed"}
	case h.protocols > 0 && h.known == 0:
		return httpError{400, "no offered subprotocol is known; this server speaks " +
			protocol.SubprotocolBinary + " and " + protocol.SubprotocolJSON}
	}
	return httpError{}
}

func validKey(key []byte) bool {
	var b [18]byte
	if len(key) != 24 {
		return false
	}
	n, err := base64.StdEncoding.Strict().Decode(b[:], key)
	return err == nil && n == 16
}

// bearer takes the token out of an Authorization value (RFC 6750 §2.1).
func bearer(value []byte) (token []byte, ok bool) {
	scheme, token, ok := bytes.Cut(value, []byte{' '})
	token = trimSpace(token)
	return token, ok && equalFold(scheme, "bearer") && len(token) > 0
}

// queryDevice finds the device parameter of a query. ok is false when there is one and it is not a device id.
func queryDevice(query []byte) (device []byte, ok bool) {
	for len(query) > 0 {
		var pair []byte
		pair, query, _ = bytes.Cut(query, []byte{'&'})
		if name, value, _ := bytes.Cut(pair, []byte{'='}); string(name) == "device" {
			device, ok = unescape(value)
			return device, ok && (len(device) == 0 || protocol.ValidDevice(device))
		}
	}
	return nil, true
}

// unescape undoes percent-encoding; in place, since the result is never longer.
func unescape(b []byte) ([]byte, bool) {
	n := 0
	for i := 0; i < len(b); i++ {
		c := b[i]
		if c == '%' {
			if i+2 >= len(b) {
				return nil, false
			}
			v, err := strconv.ParseUint(string(b[i+1:i+3]), 16, 8)
			if err != nil {
				return nil, false
			}
			c = byte(v)
			i += 2
		}
		b[n] = c
		n++
	}
	return b[:n], true
}

// eachElement calls yield for each non-empty element of a comma-separated list.
func eachElement(list []byte, yield func([]byte)) {
	for len(list) > 0 {
		var element []byte
		element, list, _ = bytes.Cut(list, []byte{','})
		if element = trimSpace(element); len(element) > 0 {
			yield(element)
		}
	}
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// isToken reports whether b is a token of RFC 9110 §5.6.2.
func isToken(b []byte) bool {
	for _, c := range b {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) >= 0:
		default:
			return false
		}
	}
	return len(b) > 0
}

func isFieldValue(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// equalFold compares ASCII without regard to case; lower must be lower case.
func equalFold(b []byte, lower string) bool {
	if len(b) != len(lower) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}

// appendUpgraded appends the 101 response (RFC 6455 §4.2.2).
func appendUpgraded(dst []byte, r *upgradeRequest) []byte {
	var seed [24 + len(acceptGUID)]byte
	sum := sha1.Sum(append(append(seed[:0], r.key...), acceptGUID...))
	dst = append(dst, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "...)
	dst = base64.StdEncoding.AppendEncode(dst, sum[:])
	if r.chosen != "" {
		dst = append(dst, "\r\nSec-WebSocket-Protocol: "...)
		dst = append(dst, r.chosen...)
	}
	return append(dst, "\r\n\r\n"...)
}

const acceptGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

// appendRefused appends the response to a request that is not upgraded. The connection ends with it.
func appendRefused(dst []byte, e httpError, retryAfterSeconds int) []byte {
	body, kind := e.text, "text/plain; charset=utf-8"
	if e.status == 200 {
		body, kind = startPage, "text/html; charset=utf-8"
	} else {
		body += "\n"
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(e.status), 10)
	dst = append(dst, ' ')
	dst = append(dst, statusText(e.status)...)
	switch e.status {
	case 200:
		dst = append(dst, "\r\nContent-Security-Policy: default-src 'none'; style-src 'unsafe-inline'"...)
	case 401:
		dst = append(dst, "\r\nWWW-Authenticate: Bearer"...)
	case 405:
		dst = append(dst, "\r\nAllow: GET"...)
	case 426:
		dst = append(dst, "\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13"...)
	case 429, 503:
		dst = append(dst, "\r\nRetry-After: "...)
		dst = strconv.AppendInt(dst, int64(retryAfterSeconds), 10)
	}
	dst = append(dst, "\r\nContent-Type: "...)
	dst = append(dst, kind...)
	dst = append(dst, "\r\nContent-Length: "...)
	dst = strconv.AppendInt(dst, int64(len(body)), 10)
	dst = append(dst, "\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"...)
	return append(dst, body...)
}

func statusText(status int) string {
	switch status {
	case 200:
		return "OK"
	case 401:
		return "Unauthorized"
	case 403:
		return "Forbidden"
	case 404:
		return "Not Found"
	case 405:
		return "Method Not Allowed"
	case 426:
		return "Upgrade Required"
	case 429:
		return "Too Many Requests"
	case 431:
		return "Request Header Fields Too Large"
	case 503:
		return "Service Unavailable"
	}
	return "Bad Request"
}

// startPage is what a browser sees that is pointed at the server.
const startPage = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>millrace</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:3em auto;padding:0 1em}pre{overflow-x:auto}</style>
<h1>millrace</h1>
<p>This is a chat server, and it runs. It has no pages to show: clients connect by WebSocket.
<p>The path is <code>` + webSocketPath + `</code>, the subprotocol <code>` + protocol.SubprotocolJSON + `</code>
or <code>` + protocol.SubprotocolBinary + `</code>.
<p>From a terminal on this machine:
<pre>millrace chat --as alice --with bob</pre>
<p>From a browser's console, with an access token:
<pre>ws = new WebSocket(location.origin.replace("http", "ws") + "` + webSocketPath + `", "` + protocol.SubprotocolJSON + `")
ws.onmessage = e => console.log(e.data)
ws.onopen = () => ws.send(JSON.stringify({action: "connect", token: "…"}))</pre>
`
