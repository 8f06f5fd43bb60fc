package edge

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// origin is a web origin (RFC 6454) in lower case, its port always given.
type origin struct{ scheme, host, port string }

// parseOrigins reads a configured list.
func parseOrigins(list []string) ([]origin, error) {
	var all []origin
	for _, text := range list {
		if err := CheckOrigin(text); err != nil {
			return nil, err
		}
		o, _ := parseOrigin([]byte(text))
		all = append(all, o)
	}
	return all, nil
}

// CheckOrigin is an error if Config.Origins cannot have this entry, which names it: each is scheme://host or scheme://host:port,
// nothing else.
func CheckOrigin(text string) error {
	o, ok := parseOrigin([]byte(text))
	// A port that a browser would write otherwise, or never, would be listed in vain.
	if port, err := strconv.ParseUint(o.port, 10, 16); !ok || err != nil || port == 0 || o.port[0] == '0' {
		return fmt.Errorf("%q is not a web origin: expected https://host, http://host, or either with :port, and no wildcard", text)
	}
	return nil
}

func parseOrigin(b []byte) (o origin, ok bool) {
	scheme, rest, ok := bytes.Cut(b, []byte("://"))
	if !ok {
		return o, false
	}
	o.scheme = strings.ToLower(string(scheme))
	if defaultPort(o.scheme) == "" {
		return o, false
	}
	o.host, o.port, ok = splitHostPort(string(rest), defaultPort(o.scheme))
	return o, ok
}

func defaultPort(scheme string) string {
	switch scheme {
	case "http":
		return "80"
	case "https":
		return "443"
	}
	return ""
}

// splitHostPort takes host[:port] apart, in lower case. An IPv6 host stands in brackets and keeps them.
func splitHostPort(s, port string) (host, _ string, ok bool) {
	host = strings.ToLower(s)
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host, port = host[:i], host[i+1:]
	}
	if host == "" || port == "" || strings.ContainsAny(host, "/?#@*\\ ") || strings.Trim(port, "0123456789") != "" {
		return "", "", false
	}
	if host[0] != '[' && strings.Contains(host, ":") {
		return "", "", false
	}
	return host, port, true
}

// allowedOrigin reports whether a request with this Origin may be upgraded: its host and port are those of Host, or it is
// on the list. Behind a proxy that ends TLS the scheme cannot be compared, so same-origin leaves it out; a Host without a port has
// the default port of the origin's scheme.
func allowedOrigin(given, host []byte, list []origin) bool {
	o, ok := parseOrigin(given)
	if !ok {
		return false // "null" too
	}
	for _, allowed := range list {
		if o == allowed {
			return true
		}
	}
	h, port, ok := splitHostPort(string(host), defaultPort(o.scheme))
	return ok && h == o.host && port == o.port
}
