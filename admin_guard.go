package main

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
)

// guard refuses what a web page makes a browser ask for: a browser reaches this machine's own addresses also for a stranger's page.
// Such a page sees the answer when its name resolves to a loopback address (DNS rebinding), and even unseen a trace costs.
func guard(bound net.Addr, next http.Handler) http.Handler {
	tcp, ok := bound.(*net.TCPAddr)
	local := ok && tcp.IP.IsLoopback()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case local && !loopbackHost(r.Host):
			answer(w, http.StatusForbidden, fmt.Sprintf("This address answers to localhost and to loopback IP addresses, not to %q: "+
				"ask for http://%s/, or let the proxy set the Host header to that.\n", r.Host, bound))
		case r.Header.Get("Sec-Fetch-Site") == "cross-site":
			answer(w, http.StatusForbidden, "A page of another site asks for this: type the address into the browser instead.\n")
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// loopbackHost reports whether a Host header can only mean this machine. An empty one does: HTTP/1.0 has none, but every browser
// sends one.
func loopbackHost(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	} else {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	if host == "" || strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
