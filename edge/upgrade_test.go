package edge

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"millrace/protocol"
)

// judgeHead scans a request that comes in chunks and parses its head. The result is "more", a status with a text, or
// what the request asks for, and what follows the head.
func judgeHead(chunks [][]byte, origins []origin) (result string, rest []byte) {
	var s headScan
	var all []byte
	for _, chunk := range chunks {
		all = append(all, chunk...)
		end, status := s.scan(all)
		if status != 0 {
			return fmt.Sprint(status), nil
		}
		if end == 0 {
			continue
		}
		if end > maxHeadBytes {
			return "a head over the limit", nil
		}
		r, e := parseUpgrade(all[:end], origins)
		if e.status != 0 {
			return fmt.Sprint(e.status), nil
		}
		return fmt.Sprintf("101 %q json=%v device=%s token=%s", r.chosen, r.json, r.device, r.token), all[end:]
	}
	return "more", nil
}

const base = "GET /ws HTTP/1.1\r\nHost: chat.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

func TestUpgradeRequest(t *testing.T) {
	origins, err := parseOrigins([]string{"https://App.example", "http://dev.example:3000"})
	if err != nil {
		t.Fatal(err)
	}
	with := func(fields ...string) string {
		return base + strings.Join(append(fields, ""), "\r\n") + "\r\n"
	}
	without := func(field string, fields ...string) string {
		var kept string
		for _, line := range strings.SplitAfter(base, "\r\n") {
			if !strings.HasPrefix(line, field+":") {
				kept += line
			}
		}
		return kept + strings.Join(append(fields, ""), "\r\n") + "\r\n"
	}
	const ok = `101 "" json=true device= token=`
	for _, tt := range []struct{ name, request, want string }{
		{"plain", with(), ok},
		{"no subprotocol offered", with("X: y"), ok},
		{"binary", with("Sec-WebSocket-Protocol: millrace.v1"), `101 "millrace.v1" json=false device= token=`},
		{"JSON", with("Sec-WebSocket-Protocol: millrace.v1.json"), `101 "millrace.v1.json" json=true device= token=`},
		{"the client's order decides", with("Sec-WebSocket-Protocol: x, millrace.v1.json,millrace.v1"), `101 "millrace.v1.json" json=true device= token=`},
		{"in two fields", with("Sec-WebSocket-Protocol: x", "Sec-WebSocket-Protocol: millrace.v1"), `101 "millrace.v1" json=false device= token=`},
		{"only unknown", with("Sec-WebSocket-Protocol: millrace.v2, Millrace.v1"), "400"},
		{"lower case, odd spacing", "GET /ws HTTP/1.1\r\nhost:\tx \r\nUPGRADE: h2c, WebSocket\r\nconnection:keep-alive,  UPGRADE\r\n" +
			"sec-websocket-version:13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\t\r\n\r\n", ok},
		{"Connection in two fields", without("Connection", "Connection: keep-alive", "Connection: Upgrade"), ok},

		{"bearer", with("Authorization: Bearer abc.def"), `101 "" json=true device= token=abc.def`},
		{"bearer, case", with("authorization: bEARER  abc"), `101 "" json=true device= token=abc`},
		{"basic", with("Authorization: Basic abc"), "401"},
		{"bearer without a token", with("Authorization: Bearer "), "401"},
		{"two authorizations", with("Authorization: Bearer a", "Authorization: Bearer b"), "401"},
		{"device", strings.Replace(with("Authorization: Bearer t"), "/ws", "/ws?x=y&device=pho%6ee", 1), `101 "" json=true device=phone token=t`},
		{"device malformed", strings.Replace(with("Authorization: Bearer t"), "/ws", "/ws?device=a%2fb", 1), "400"},
		{"device cut off", strings.Replace(with("Authorization: Bearer t"), "/ws", "/ws?device=a%2", 1), "400"},
		{"device not hex", strings.Replace(with("Authorization: Bearer t"), "/ws", "/ws?device=%+f", 1), "400"},
		{"device empty", strings.Replace(with("Authorization: Bearer t"), "/ws", "/ws?device=", 1), `101 "" json=true device= token=t`},
		{"device without a token", strings.Replace(with(), "/ws", "/ws?device=a%2fb", 1), `101 "" json=true device= token=`},

		{"start page", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "200"},
		{"no upgrade", "GET /ws HTTP/1.1\r\nHost: x\r\n\r\n", "426"},
		{"not found", strings.Replace(with(), "/ws", "/ws/", 1), "404"},
		{"POST", strings.Replace(with(), "GET", "POST", 1), "405"},
		{"HTTP/1.0", strings.Replace(with(), "HTTP/1.1", "HTTP/1.0", 1), "400"},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"},
		{"absolute form", strings.Replace(with(), "/ws", "http://x/ws", 1), "400"},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00", "400"},
		{"lower-case method start", "get /ws HTTP/1.1\r\n", "400"},
		{"two spaces", strings.Replace(with(), "GET ", "GET  ", 1), "400"},
		{"control in the target", strings.Replace(with(), "/ws", "/ws\x01", 1), "400"},

		{"no Host", without("Host"), "400"},
		{"two Hosts", with("Host: chat.example"), "400"},
		{"version 8", without("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8"), "426"},
		{"no version", without("Sec-WebSocket-Version"), "426"},
		{"two versions", with("Sec-WebSocket-Version: 13"), "426"},
		{"no Upgrade", without("Upgrade"), "426"},
		{"no Connection", without("Connection"), "426"},
		{"no key", without("Sec-WebSocket-Key"), "400"},
		{"two keys", with("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), "400"},
		{"key of 15 bytes", without("Sec-WebSocket-Key", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j"), "400"},
		{"key of 17 bytes", without("Sec-WebSocket-Key", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSE="), "400"},
		{"key not base64", without("Sec-WebSocket-Key", "Sec-WebSocket-Key: !GhlIHNhbXBsZSBub25jZQ=="), "400"},
		{"Content-Length", with("Content-Length: 3"), "400"},
		{"Content-Length 0", with("Content-Length: 0"), ok},
		{"Transfer-Encoding", with("Transfer-Encoding: chunked"), "400"},

		{"obs-fold", with("X: a", " b"), "400"},
		{"space before the colon", with("X : a"), "400"},
		{"no colon", with("X"), "400"},
		{"empty name", with(": a"), "400"},
		{"NUL", with("X: \x00"), "400"},
		{"bare CR", with("X: a\rb"), "400"},
		{"bare LF", with("X: a\nY: b"), "400"},
		{"only LF", strings.ReplaceAll(with(), "\r\n", "\n"), "400"},
		{"control in a value", with("X: \x07"), "400"},
		{"DEL in a value", with("X: \x7f"), "400"},
		{"UTF-8 in a value", with("X: ä"), ok},
		{"empty line first", "\r\n" + with(), "400"},

		{"64 lines", with(manyFields(64 - 6)...), ok},
		{"65 lines", with(manyFields(65 - 6)...), "431"},
		{"request line of 4 KiB", strings.Replace(with(), "/ws", "/ws?"+strings.Repeat("x", 4096-17), 1), ok},
		{"request line over 4 KiB", strings.Replace(with(), "/ws", "/ws?"+strings.Repeat("x", 4096-16), 1), "431"},
		{"head of 8 KiB", with("X: " + strings.Repeat("x", 8192-len(base)-7)), ok},
		{"head over 8 KiB", with("X: " + strings.Repeat("x", 8193-len(base)-7)), "431"},
		{"endless request line", "GET /" + strings.Repeat("x", 9000), "431"},
		{"endless field", base + "X: " + strings.Repeat("x", 9000), "431"},
		{"incomplete", with()[:100], "more"},

		{"same origin", with("Origin: http://chat.example"), ok},
		{"same origin, TLS in front", with("Origin: https://chat.example"), ok},
		{"same origin, default port given", with("Origin: http://CHAT.example:80"), ok},
		{"same origin, other port", with("Origin: http://chat.example:8080"), "403"},
		{"same origin by port", strings.Replace(with("Origin: http://chat.example:8080"), "Host: chat.example", "Host: chat.example:8080", 1), ok},
		{"IPv6", strings.Replace(with("Origin: http://[::1]:8080"), "Host: chat.example", "Host: [::1]:8080", 1), ok},
		{"on the list", with("Origin: https://app.example"), ok},
		{"on the list with its port", with("Origin: http://dev.example:3000"), ok},
		{"listed, other scheme", with("Origin: http://app.example"), "403"},
		{"listed, other port", with("Origin: http://dev.example:3001"), "403"},
		{"suffix of a listed one", with("Origin: https://evil-app.example"), "403"},
		{"prefix of a listed one", with("Origin: https://app.example.evil"), "403"},
		{"user info", with("Origin: https://app.example@evil"), "403"},
		{"null", with("Origin: null"), "403"},
		{"empty origin", with("Origin: "), "403"},
		{"file", with("Origin: file://"), "403"},
		{"two origins", with("Origin: https://app.example", "Origin: https://app.example"), "400"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const follows = "\x81\x80\x00\x00\x00\x00"
			stream := []byte(tt.request)
			if tt.want == ok {
				stream = append(stream, follows...)
			}
			check := func(how string, chunks [][]byte) {
				t.Helper()
				got, rest := judgeHead(chunks, origins)
				if got != tt.want {
					t.Fatalf("%s: got %s, want %s", how, got, tt.want)
				}
				if tt.want == ok && how == "whole" && string(rest) != follows {
					t.Fatalf("%s: %q follows", how, rest)
				}
			}
			check("whole", [][]byte{bytes.Clone(stream)})
			for i := 1; i < len(stream); i += max(1, len(stream)/200) {
				check(fmt.Sprintf("cut at %d", i), [][]byte{bytes.Clone(stream[:i]), stream[i:]})
			}
			var single [][]byte
			for i := range stream {
				single = append(single, stream[i:i+1])
			}
			check("single bytes", single)
		})
	}
}

func manyFields(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = "X: y"
	}
	return list
}

func TestParseOrigins(t *testing.T) {
	for _, bad := range []string{"", "chat.example", "ftp://x", "https://", "https://x/", "https://x:port", "https://*", "https://*.example", "http://a b", "https://x:"} {
		if _, err := parseOrigins([]string{bad}); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if list, err := parseOrigins([]string{"HTTPS://Chat.Example"}); err != nil || list[0] != (origin{"https", "chat.example", "443"}) {
		t.Errorf("%v %v", list, err)
	}
}

func TestRefusedResponses(t *testing.T) {
	for _, tt := range []struct {
		status int
		header string
	}{
		{200, "Content-Type: text/html; charset=utf-8"}, {400, ""}, {401, "Www-Authenticate: Bearer"}, {403, ""}, {404, ""}, {405, "Allow: GET"},
		{426, "Sec-Websocket-Version: 13"}, {431, ""}, {503, "Retry-After: 7"},
	} {
		b := appendRefused(nil, httpError{tt.status, "why"}, 7)
		resp, err := http.ReadResponse(newReader(b), nil)
		if err != nil {
			t.Fatalf("%d: %v", tt.status, err)
		}
		if resp.StatusCode != tt.status || !strings.HasSuffix(resp.Status, http.StatusText(tt.status)) || !resp.Close {
			t.Errorf("%d: %q, close %v", tt.status, resp.Status, resp.Close)
		}
		if name, value, _ := strings.Cut(tt.header, ": "); name != "" && resp.Header.Get(name) != value {
			t.Errorf("%d: %v", tt.status, resp.Header)
		}
		if int(resp.ContentLength) != len(b)-bytes.Index(b, []byte("\r\n\r\n"))-4 {
			t.Errorf("%d: Content-Length %d", tt.status, resp.ContentLength)
		}
	}
}

func FuzzUpgrade(f *testing.F) {
	f.Add([]byte(base+"\r\n\x81\x80"), uint16(20))
	f.Add([]byte(base+"Origin: http://chat.example\r\nSec-WebSocket-Protocol: "+protocol.SubprotocolBinary+"\r\n\r\n"), uint16(1))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), uint16(9))
	f.Add([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), uint16(5))
	f.Fuzz(func(t *testing.T, stream []byte, at uint16) {
		whole, _ := judgeHead([][]byte{bytes.Clone(stream)}, nil)
		cut := int(at) % (len(stream) + 1)
		got, _ := judgeHead([][]byte{bytes.Clone(stream[:cut]), stream[cut:]}, nil)
		if got != whole {
			t.Fatalf("cut at %d: %s\nwhole: %s", cut, got, whole)
		}
		// What we upgrade, net/http reads as a request of the same kind.
		if strings.HasPrefix(whole, "101") {
			req, err := http.ReadRequest(newReader(stream))
			if err != nil {
				t.Fatalf("%s, but net/http: %v", whole, err)
			}
			if req.Method != "GET" || req.URL.Path != webSocketPath || req.ContentLength > 0 {
				t.Fatalf("%s, but net/http: %+v", whole, req)
			}
		}
	})
}
