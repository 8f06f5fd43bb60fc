package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestAdminRefusesForeignHosts(t *testing.T) {
	for host, want := range map[string]int{
		"127.0.0.1:8082": 200, "127.0.0.1": 200, "localhost": 200, "LocalHost:8082": 200, "127.9.9.9:1": 200, "[::1]:8082": 200, "[::1]": 200,
		"[::ffff:127.0.0.1]:1": 200, "": 200,
		"evil.example": 403, "evil.example:8082": 403, "localhost.evil.example": 403, "127.0.0.1.evil.example:8082": 403, "127.0.0.1@evil.example": 403,
		"0.0.0.0:8082": 403, "[::]:8082": 403, "192.168.0.1": 403, "2130706433": 403, "0x7f.1": 403, "localhost:80:80": 403,
	} {
		if got, body := guarded(t, "127.0.0.1", host, ""); got != want || got == 403 && !strings.Contains(body, "ask for http://127.0.0.1:8082/") {
			t.Errorf("Host %q: got %d %q, want %d", host, got, body, want)
		}
	}
	// Behind another address stands whatever name the operator has given it.
	if got, body := guarded(t, "192.0.2.1", "admin.example", ""); got != 200 {
		t.Errorf("an address that others reach too: %d %q", got, body)
	}
}

func TestAdminRefusesPagesOfOtherSites(t *testing.T) {
	for site, want := range map[string]int{"": 200, "none": 200, "same-origin": 200, "same-site": 200, "cross-site": 403} {
		for _, bound := range []string{"127.0.0.1", "192.0.2.1"} {
			if got, body := guarded(t, bound, bound, site); got != want {
				t.Errorf("Sec-Fetch-Site %q at %s: got %d %q, want %d", site, bound, got, body, want)
			}
		}
	}
}

// guarded asks what stands behind the guard of an address.
func guarded(t *testing.T, bound, host, site string) (status int, body string) {
	t.Helper()
	h := guard(&net.TCPAddr{IP: net.ParseIP(bound), Port: 8082}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, "ok\n")
	}))
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r.Host = host
	if site != "" {
		r.Header.Set("Sec-Fetch-Site", site)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// TestAdminIsGuarded: each path, as only a server shows it.
func TestAdminIsGuarded(t *testing.T) {
	a := openTestAdmin(t, &fakeSource{})
	for _, path := range []string{"/", "/metrics", "/livez", "/readyz", "/nowhere", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/trace?seconds=119"} {
		for name, change := range map[string]func(*http.Request){
			"rebinding":  func(r *http.Request) { r.Host = "evil.example" },
			"cross-site": func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
		} {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+a.Addr()+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			change(r)
			response, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode != http.StatusForbidden {
				t.Errorf("%s %s: status %d", name, path, response.StatusCode)
			}
		}
	}
}
