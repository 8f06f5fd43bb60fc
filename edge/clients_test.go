package edge

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"millrace/protocol"
)

// lines writes a request.
func lines(list ...string) string { return strings.Join(append(list, "", ""), "\r\n") }

const wsFields = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="

// upgradeClients is what clients send, and what proxies make of it. The names of fields, their order, case and spacing are as on the wire.
var upgradeClients = []struct{ name, request string }{
	{"Chrome", lines("GET /ws HTTP/1.1",
		"Host: chat.example",
		"Connection: Upgrade",
		"Pragma: no-cache",
		"Cache-Control: no-cache",
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
		"Upgrade: websocket",
		"Origin: https://chat.example",
		"Sec-WebSocket-Version: 13",
		"Accept-Encoding: gzip, deflate, br, zstd",
		"Accept-Language: en-US,en;q=0.9,de;q=0.8",
		"Cookie: theme=dark; consent=%7B%22all%22%3Atrue%7D",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
		"Sec-WebSocket-Protocol: millrace.v1, millrace.v1.json")},
	{"Firefox", lines("GET /ws HTTP/1.1",
		"Host: chat.example",
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0",
		"Accept: */*",
		"Accept-Language: en-US,en;q=0.5",
		"Accept-Encoding: gzip, deflate, br, zstd",
		"Sec-WebSocket-Version: 13",
		"Origin: https://chat.example",
		"Sec-WebSocket-Protocol: millrace.v1.json",
		"Sec-WebSocket-Extensions: permessage-deflate",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Connection: keep-alive, Upgrade",
		"Sec-Fetch-Dest: empty",
		"Sec-Fetch-Mode: websocket",
		"Sec-Fetch-Site: same-origin",
		"Pragma: no-cache",
		"Cache-Control: no-cache",
		"Upgrade: websocket")},
	{"Safari", lines("GET /ws HTTP/1.1",
		"Upgrade: websocket",
		"Connection: Upgrade",
		"Host: chat.example",
		"Origin: http://chat.example",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Extensions: permessage-deflate",
		"Sec-Fetch-Mode: websocket",
		"User-Agent: Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Safari/605.1.15",
		"Pragma: no-cache",
		"Cache-Control: no-cache")},
	{"curl, fields by hand", lines("GET /ws HTTP/1.1",
		"Host: localhost:8080",
		"User-Agent: curl/7.88.1",
		"Accept: */*",
		"Connection: Upgrade",
		"Upgrade: websocket",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: SGVsbG8sIHdvcmxkIQAAAA==")},
	{"curl ws://", lines("GET /ws HTTP/1.1",
		"Host: localhost:8080",
		"User-Agent: curl/8.11.1",
		"Accept: */*",
		"Upgrade: websocket",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Connection: Upgrade")},
	{"websocat", lines("GET /ws HTTP/1.1",
		"Host: localhost:8080",
		"Connection: Upgrade",
		"Upgrade: websocket",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Protocol: millrace.v1.json")},
	{"Node", lines("GET /ws HTTP/1.1",
		"host: localhost:8080",
		"connection: upgrade",
		"upgrade: websocket",
		"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
		"sec-websocket-version: 13",
		"sec-websocket-extensions: permessage-deflate; client_max_window_bits",
		"sec-websocket-protocol: millrace.v1",
		"accept: */*",
		"accept-language: *",
		"sec-fetch-mode: websocket",
		"user-agent: undici",
		"pragma: no-cache",
		"cache-control: no-cache",
		"accept-encoding: gzip, deflate")},
	{"Go, with a token", lines("GET /ws?device=phone HTTP/1.1",
		"Host: chat.example",
		"User-Agent: Go-http-client/1.1",
		"Authorization: Bearer alice",
		"Connection: Upgrade",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Protocol: millrace.v1",
		"Sec-WebSocket-Version: 13",
		"Upgrade: websocket")},
	{"through HAProxy", lines("GET /ws HTTP/1.1",
		"host: chat.example",
		"user-agent: Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0",
		"sec-websocket-version: 13",
		"origin: https://chat.example",
		"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
		"sec-fetch-mode: websocket",
		"upgrade: websocket",
		"x-forwarded-for: 2001:db8::7",
		"x-forwarded-proto: https",
		"connection: upgrade")},
	{"through nginx", lines("GET /ws HTTP/1.1",
		"Upgrade: websocket",
		"Connection: upgrade",
		"Host: chat.example",
		"X-Real-IP: 203.0.113.9",
		"X-Forwarded-For: 203.0.113.9",
		"X-Forwarded-Proto: https",
		"User-Agent: Mozilla/5.0",
		"Origin: https://chat.example",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")},
	{"through Cloudflare", lines("GET /ws HTTP/1.1",
		"Host: chat.example",
		"CF-RAY: 98f0a1b2c3d4e5f6-FRA",
		"CF-Connecting-IP: 203.0.113.9",
		"CF-IPCountry: DE",
		`CF-Visitor: {"scheme":"https"}`,
		"CDN-Loop: cloudflare; loops=1",
		"X-Forwarded-For: 203.0.113.9",
		"X-Forwarded-Proto: https",
		"Accept-Encoding: gzip, br",
		"User-Agent: Mozilla/5.0",
		"Pragma: no-cache",
		"Cache-Control: no-cache",
		"Origin: https://chat.example",
		"Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
		"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
		"Upgrade: websocket",
		"Connection: Upgrade")},
	{"through an AWS load balancer", lines("GET /ws HTTP/1.1",
		"X-Forwarded-For: 203.0.113.9",
		"X-Forwarded-Proto: https",
		"X-Forwarded-Port: 443",
		"Host: chat.example",
		"X-Amzn-Trace-Id: Root=1-68d0f0a1-0123456789abcdef01234567",
		"upgrade: websocket",
		"connection: upgrade",
		"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
		"sec-websocket-version: 13",
		"origin: https://chat.example")},
	{"through Envoy", lines("GET /ws HTTP/1.1",
		"host: chat.example",
		"connection: Upgrade",
		"upgrade: websocket",
		"sec-websocket-version: 13",
		"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
		"x-forwarded-for: 203.0.113.9",
		"x-forwarded-proto: https",
		"x-request-id: 6f2c3b1a-8f0e-4c55-9d0e-0a3d3f7c1b2e",
		"x-envoy-expected-rq-timeout-ms: 15000")},
	{"with an empty X-Forwarded-For", lines("GET /ws HTTP/1.1", "Host: x", "X-Forwarded-For:", wsFields)},
	{"over 400 hops", lines("GET /ws HTTP/1.1", "Host: x", "X-Forwarded-For: "+strings.Repeat("203.0.113.9, ", 400)+"::1", wsFields)},
	{"Connection in two fields", lines("GET /ws HTTP/1.1", "Host: x", "Connection: keep-alive", wsFields)},
	{"with a body of no bytes", lines("GET /ws HTTP/1.1", "Host: x", "Content-Length: 0", wsFields)},
}

// TestUpgradeClients: what clients and proxies send is accepted, no extension is negotiated, and what follows the request in the same packet
// is kept, wherever the stream is cut.
func TestUpgradeClients(t *testing.T) {
	for n, tt := range upgradeClients {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, nil)
			stream := append([]byte(tt.request), frames(final(ws.OpPing, "first"), final(ws.OpPing, "second"))...)
			// At each byte where the request ends and the frames are, and of the rest at a third, another for each client.
			for cut := 0; cut < len(stream); cut++ {
				if cut > 0 && cut < len(tt.request)-8 && cut%3 != n%3 {
					continue
				}
				s := b.accept()
				if cut > 0 {
					s.receive(stream[:cut])
				}
				s.receive(stream[cut:])
				s.wantsUpgrade(tt.request)
				if got := replies(s.replies()); got != `pong "first", pong "second"` {
					t.Fatalf("cut at %d: %s", cut, got)
				}
				s.close()
			}
			s := b.accept()
			s.send(stream, 1)
			s.wantsUpgrade(tt.request)
			if got := replies(s.replies()); got != `pong "first", pong "second"` {
				t.Fatalf("single bytes: %s", got)
			}
		})
	}
}

// wantsUpgrade reads a 101 as net/http does.
func (s *fakeSocket) wantsUpgrade(request string) {
	s.bench.t.Helper()
	head := s.response() + "\r\n\r\n"
	req, err := http.ReadRequest(newReader([]byte(request)))
	if err != nil {
		s.bench.t.Fatal(err)
	}
	resp, err := http.ReadResponse(newReader([]byte(head)), req)
	if err != nil {
		s.bench.t.Fatal(err)
	}
	if resp.StatusCode != 101 || !strings.EqualFold(resp.Header.Get("Upgrade"), "websocket") ||
		!strings.EqualFold(resp.Header.Get("Connection"), "upgrade") || resp.Header.Get("Sec-WebSocket-Extensions") != "" {
		s.bench.t.Fatalf("%q", head)
	}
	offered, chosen := req.Header.Get("Sec-WebSocket-Protocol"), resp.Header.Get("Sec-WebSocket-Protocol")
	if first, _, _ := strings.Cut(offered, ","); chosen != first {
		s.bench.t.Fatalf("offered %q, chosen %q", offered, chosen)
	}
}

// TestRefusedRequests: what is no request for a WebSocket gets a status and a line that says why; then the connection ends, and nothing that
// follows is taken for a frame or for another request.
func TestRefusedRequests(t *testing.T) {
	upgrade := func(line string, fields ...string) string {
		return lines(append([]string{line, "Host: x", wsFields}, fields...)...)
	}
	const get = "GET /ws HTTP/1.1"
	version := func(v string) string {
		return lines(get, "Host: x", strings.Replace(wsFields, "Sec-WebSocket-Version: 13", v, 1))
	}
	for _, tt := range []struct {
		name, request string
		status        int
		text          string
	}{
		// Not HTTP/1.1.
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04", 400, "HTTP/1.1"},
		{"HTTP/2 upgrade", lines("GET / HTTP/2.0", "Host: x"), 400, "HTTP/1.1"},
		{"HTTP/1.0", upgrade("GET /ws HTTP/1.0"), 400, "HTTP/1.1"},
		{"HTTP/0.9", "GET /ws\r\n\r\n", 400, "HTTP/1.1"},
		{"HTTP/1.2", upgrade("GET /ws HTTP/1.2"), 400, "HTTP/1.1"},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "HTTP"},
		{"SOCKS 5", "\x05\x01\x00", 400, "HTTP"},
		{"PROXY protocol v2", "\r\n\r\n\x00\r\nQUIT\n", 400, "HTTP"},
		{"frames at once", string(final(ws.OpText, "hello")), 400, "HTTP"},
		{"absolute form", upgrade("GET http://x/ws HTTP/1.1"), 400, ""},
		{"authority form", upgrade("CONNECT x:443 HTTP/1.1"), 400, ""},
		{"asterisk form", upgrade("OPTIONS * HTTP/1.1"), 400, ""},

		// Smuggling.
		{"Transfer-Encoding", upgrade(get, "Transfer-Encoding: chunked"), 400, "body"},
		{"Transfer-Encoding, case", upgrade(get, "tRANSFER-eNCODING:chunked"), 400, "body"},
		{"Transfer-Encoding identity", upgrade(get, "Transfer-Encoding: identity"), 400, "body"},
		{"Transfer-Encoding with a control", upgrade(get, "Transfer-Encoding: \x0bchunked"), 400, "control"},
		{"Transfer-Encoding behind a space", upgrade(get, "Transfer-Encoding : chunked"), 400, "header"},
		{"Transfer-Encoding folded", upgrade(get, "Transfer-Encoding:\r\n chunked"), 400, "header"},
		{"both lengths", upgrade(get, "Content-Length: 4", "Transfer-Encoding: chunked"), 400, "body"},
		{"Content-Length", upgrade(get, "Content-Length: 4") + "GET ", 400, "body"},
		{"two Content-Lengths", upgrade(get, "Content-Length: 0", "Content-Length: 4"), 400, "body"},
		{"Content-Length list", upgrade(get, "Content-Length: 0, 0"), 400, "body"},
		{"Content-Length signed", upgrade(get, "Content-Length: +0"), 400, "body"},
		{"Content-Length of 2^64", upgrade(get, "Content-Length: 18446744073709551616"), 400, "body"},
		{"bare LF in front of a field", upgrade(get, "X: a\nTransfer-Encoding: chunked"), 400, "HTTP"},
		{"bare CR in front of a field", upgrade(get, "X: a\rTransfer-Encoding: chunked"), 400, "HTTP"},
		{"NUL", upgrade(get, "X: a\x00b"), 400, "HTTP"},
		{"CR CR LF", upgrade(get, "X: a\r"), 400, "HTTP"},
		{"no colon", upgrade(get, "Transfer-Encoding"), 400, "header"},
		{"two Hosts", upgrade(get, "Host: y"), 400, "Host"},
		{"no Host", lines(get, wsFields), 400, "Host"},
		{"two keys", upgrade(get, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400, "Key"},
		{"tab in the request line", upgrade("GET\t/ws HTTP/1.1"), 400, ""},
		{"space in the target", upgrade("GET /ws /x HTTP/1.1"), 400, ""},
		{"CR in the target", upgrade("GET /ws\r HTTP/1.1"), 400, ""},

		// Bombs.
		{"1 MB in a field", get + "\r\nX: " + strings.Repeat("x", 1<<20), 431, ""},
		{"10 000 lines", get + "\r\n" + strings.Repeat("X: y\r\n", 10_000), 431, ""},
		{"10 000 short lines", get + "\r\n" + strings.Repeat(":\r\n", 10_000), 431, ""},
		{"target of 64 KiB", "GET /ws?" + strings.Repeat("x", 64<<10) + " HTTP/1.1\r\n\r\n", 431, ""},
		{"method of 64 KiB", strings.Repeat("G", 64<<10), 431, ""},
		{"1000 hops", upgrade(get, "X-Forwarded-For: "+strings.Repeat("203.0.113.9, ", 1000)), 431, ""},
		{"1000 cookies", upgrade(get, strings.Split(strings.Repeat("Cookie: a=b,", 1000), ",")...), 431, ""},

		// HTTP, but no WebSocket.
		{"POST", lines("POST /ws HTTP/1.1", "Host: x"), 405, "GET"},
		{"POST with a body", lines("POST /ws HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 2") + "{}", 405, "GET"},
		{"PUT with chunks", lines("PUT / HTTP/1.1", "Host: x", "Transfer-Encoding: chunked") + "0\r\n\r\n", 405, "GET"},
		{"HEAD", lines("HEAD / HTTP/1.1", "Host: x"), 405, "GET"},
		{"OPTIONS", lines("OPTIONS /ws HTTP/1.1", "Host: x"), 405, "GET"},
		{"a method of one's own", lines("BREW /ws HTTP/1.1", "Host: x"), 405, "GET"},
		{"another path", upgrade("GET /chat HTTP/1.1"), 404, "/ws"},
		{"a path behind", upgrade("GET /ws/../ws HTTP/1.1"), 404, "/ws"},
		{"an escaped path", upgrade("GET /%77s HTTP/1.1"), 404, "/ws"},
		{"plain GET", lines(get, "Host: x"), 426, "WebSocket"},
		{"h2c", lines(get, "Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"), 426, "WebSocket"},
		{"no Connection: upgrade", lines(get, "Host: x", "Upgrade: websocket", "Connection: keep-alive"), 426, "WebSocket"},
		{"Connection: upgraded", lines(get, "Host: x", "Upgrade: websocket", "Connection: upgraded"), 426, "WebSocket"},
		{"version 7", version("Sec-WebSocket-Version: 7"), 426, "13"},
		{"version 8", version("Sec-WebSocket-Version: 8"), 426, "13"},
		{"version 14", version("Sec-WebSocket-Version: 14"), 426, "13"},
		{"versions 13, 8", version("Sec-WebSocket-Version: 13, 8"), 426, "13"},
		{"version 013", version("Sec-WebSocket-Version: 013"), 426, "13"},
		{"no version", version("X: y"), 426, "13"},
		{"Hixie-76", lines(get, "Host: x", "Upgrade: WebSocket", "Connection: Upgrade", "Sec-WebSocket-Key1: 3e6b263  4 17 80", "Sec-WebSocket-Key2: 17  9 G`ZD9"), 426, "13"},
		{"unknown subprotocols", upgrade(get, "Sec-WebSocket-Protocol: chat, superchat"), 400, protocol.SubprotocolJSON},
		{"another site", upgrade(get, "Origin: https://evil.example"), 403, "Origin"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBench(t, nil)
			for _, chop := range []int{0, 1, 1000} {
				s := b.accept()
				s.send([]byte(tt.request)[:min(len(tt.request), 2*maxHeadBytes)], chop)
				resp, err := http.ReadResponse(newReader(s.out), nil)
				if err != nil {
					t.Fatalf("chops of %d: %q: %v", chop, s.out, err)
				}
				head, body, _ := strings.Cut(string(s.out), "\r\n\r\n")
				switch {
				case resp.StatusCode != tt.status || !resp.Close || resp.ContentLength != int64(len(body)):
					t.Fatalf("chops of %d: %q", chop, head)
				case !strings.Contains(body, tt.text) || len(body) < 10 || len(body) > 200 || strings.Count(body, "\n") != 1:
					t.Fatalf("chops of %d: %q", chop, body)
				case tt.status == 426 && resp.Header.Get("Sec-WebSocket-Version") != "13":
					t.Fatalf("chops of %d: %q", chop, head)
				case tt.status == 405 && resp.Header.Get("Allow") != "GET":
					t.Fatalf("chops of %d: %q", chop, head)
				}
				// Nothing that follows is looked at.
				s.out = nil
				if !s.closed {
					s.receive([]byte(lines("GET / HTTP/1.1", "Host: x")))
					s.receive(final(ws.OpPing, ""))
				}
				if len(s.out) != 0 || !s.halfClosed || s.conn.state != stateClosing {
					t.Fatalf("chops of %d: half closed %v, %q", chop, s.halfClosed, s.out)
				}
				s.close()
			}
			if n := b.s.connections.Load(); n != 0 || b.l.m.panics != 0 {
				t.Fatalf("%d connections, %d panics", n, b.l.m.panics)
			}
		})
	}
}

// TestPipelinedRequest: behind a request that is upgraded there are frames, whatever they look like.
func TestPipelinedRequest(t *testing.T) {
	b := newBench(t, nil)
	s := b.accept()
	s.receive([]byte(upgradeText("", "") + lines("GET /admin HTTP/1.1", "Host: x")))
	s.wantsUpgrade(upgradeText("", ""))
	if got := replies(s.replies()); got != "close 1002" {
		t.Fatalf("got %s", got)
	}
}

// TestOrigins: same-origin, and a list that is compared by scheme, host and port.
func TestOrigins(t *testing.T) {
	list := []string{"https://app.example", "http://dev.example:3000", "https://[2001:db8::1]"}
	for _, tt := range []struct {
		host, origin string
		allowed      bool
	}{
		{"chat.example", "https://chat.example", true},
		{"chat.example", "http://chat.example", true},
		{"chat.example", "https://CHAT.example", true},
		{"CHAT.example", "https://chat.example", true},
		{"chat.example", "HTTPS://chat.example", true},
		{"chat.example", "https://chat.example:443", true},
		{"chat.example:443", "https://chat.example", true},
		{"chat.example:80", "http://chat.example", true},
		{"chat.example:80", "https://chat.example", false}, // port 443
		{"chat.example:443", "http://chat.example", false}, // port 80
		{"chat.example:8080", "http://chat.example:8080", true},
		{"chat.example:8080", "http://chat.example", false},
		{"chat.example:8080", "http://chat.example:8081", false},
		{"chat.example", "http://chat.example:", false},
		{"chat.example", "http://chat.example:080", false},
		{"[::1]:8080", "http://[::1]:8080", true},
		{"[::1]", "http://[::1]", true},
		{"127.0.0.1:8080", "http://127.0.0.1:8080", true},
		{"127.0.0.1:8080", "http://localhost:8080", false},

		// A name with a trailing dot is another name to a browser.
		{"chat.example", "https://chat.example.", false},
		{"chat.example.", "https://chat.example", false},
		{"chat.example.", "https://chat.example.", true},
		{"x", "https://app.example.", false},

		{"x", "https://app.example", true},
		{"x", "HTTPS://App.Example", true},
		{"x", "https://app.example:443", true},
		{"x", "http://app.example", false},
		{"x", "wss://app.example", false},
		{"x", "https://app.example:8443", false},
		{"x", "http://dev.example:3000", true},
		{"x", "https://dev.example:3000", false},
		{"x", "http://dev.example", false},
		{"x", "https://[2001:db8::1]", true},
		{"x", "https://[2001:DB8::1]:443", true},
		{"x", "https://[2001:db8::2]", false},

		// Nothing but equality: parts, and what other parsers read differently.
		{"x", "https://evil-app.example", false},
		{"x", "https://sub.app.example", false},
		{"x", "https://app.example.evil", false},
		{"x", "https://app.example@evil", false},
		{"x", "https://evil#app.example", false},
		{"x", "https://evil?app.example", false},
		{"x", "https://app.example/", false},
		{"x", `https://app.example\.evil`, false},
		{"x", "https://app.example https://evil", false},
		{"x", "https://*", false},
		{"*", "https://evil", false},
		{"x", "https://аpp.example", false}, // Cyrillic а
		{"x", "null", false},
		{"null", "null", false},
		{"x", "", false},
		{"", "", false},
		{"", "http://", false},
		{"x", "file://", false},
		{"x", "app.example", false},
		{"x", "//app.example", false},
		{"x", "https:app.example", false},
		{"x", "chrome-extension://app.example", false},
		{"x", "javascript://app.example", false},
	} {
		t.Run(fmt.Sprintf("%s from %s", tt.host, tt.origin), func(t *testing.T) {
			b := newBench(t, func(c *Config) { c.Origins = list })
			s := b.accept()
			s.receive([]byte(lines("GET /ws HTTP/1.1", "Host: "+tt.host, "Origin: "+tt.origin, wsFields)))
			status := map[bool]string{true: "HTTP/1.1 101 ", false: "HTTP/1.1 403 "}[tt.allowed]
			if !bytes.HasPrefix(s.out, []byte(status)) {
				t.Fatalf("got %.40q, want %s", s.out, status)
			}
		})
	}
	b := newBench(t, nil)
	s := b.accept()
	s.receive([]byte(lines("GET /ws HTTP/1.1", "Host: x", "Origin: https://app.example", wsFields)))
	s.wantsStatus(403)
	for _, bad := range []string{"null", "*", "https://*.example", "wss://app.example", "https://app.example/", "https://app.example:99999", "https://app.example:0"} {
		if err := CheckOrigin(bad); err == nil {
			t.Errorf("%q can be listed", bad)
		}
	}
}

// TestStartPage: whoever points a browser here reads what this is. It runs nothing, and loads nothing.
func TestStartPage(t *testing.T) {
	b := newBench(t, nil)
	for _, target := range []string{"/", "/?from=docs"} {
		s := b.accept()
		s.receive([]byte(lines("GET "+target+" HTTP/1.1", "Host: chat.example", "Connection: keep-alive", "Accept: text/html,*/*;q=0.8", "Upgrade-Insecure-Requests: 1")))
		page := string(s.out)
		s.wantsStatus(200, "Content-Type: text/html; charset=utf-8", "Content-Security-Policy: default-src 'none'", "X-Content-Type-Options: nosniff", "Connection: close")
		for _, part := range []string{"<!doctype html>", `<html lang="en">`, "viewport", "<title>", webSocketPath, protocol.SubprotocolBinary, protocol.SubprotocolJSON, "millrace chat"} {
			if !strings.Contains(page, part) {
				t.Errorf("%q is missing in\n%s", part, page)
			}
		}
		for _, active := range []string{"<script", "src=", "href=", "onload"} {
			if strings.Contains(page, active) {
				t.Errorf("%q in\n%s", active, page)
			}
		}
	}
}

// TestTokenIsNotReadFromTheAddress: addresses end in logs, so a token in one is nobody's token; and a subprotocol is none either.
func TestTokenIsNotReadFromTheAddress(t *testing.T) {
	for _, target := range []string{"/ws?token=alice", "/ws?access_token=alice", "/ws?authorization=Bearer%20alice&device=phone"} {
		b := newBench(t, nil)
		s := b.accept()
		s.receive([]byte(lines("GET "+target+" HTTP/1.1", "Host: x", wsFields)))
		s.wantsStatus(101)
		if s.conn.state != stateConnect || len(b.asked) != 0 {
			t.Errorf("%s: state %d", target, s.conn.state)
		}
	}
	b := newBench(t, nil)
	s := b.accept()
	s.receive([]byte(lines("GET /ws HTTP/1.1", "Host: x", wsFields, "Sec-WebSocket-Protocol: bearer.alice")))
	s.wantsStatus(400)
}

// TestHalfRequestThenEnd: a client that ends its side within a request, or behind an upgrade, is gone at once.
func TestHalfRequestThenEnd(t *testing.T) {
	s, _ := serve(t, nil)
	for _, sent := range []string{"", "GET /ws HT", upgradeText("", "")[:80], upgradeText("", ""), upgradeText("", "") + "\x81"} {
		conn := dialTCP(t, s).(*net.TCPConn)
		if _, err := conn.Write([]byte(sent)); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(conn); err != nil || len(answer) > 0 && !bytes.HasPrefix(answer, []byte("HTTP/1.1 101 ")) {
			t.Errorf("%.20q: %q %v", sent, answer, err)
		}
	}
	eventually(t, "every connection to be gone", func() bool { return s.connections.Load() == 0 })
}
