package token

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

const (
	// fetchTimeout is for all of a request: name, connection, TLS, answer.
	fetchTimeout           = 10 * time.Second
	maxResponseHeaderBytes = 64 << 10
)

func isAddress(location string) bool { return strings.Contains(location, "://") }

// newFetch makes the function that fetches a key set, and the name of the address for logs: without its query, in which
// some put a password.
func newFetch(location, caFile string) (name string, fetch func(context.Context) ([]byte, error), err error) {
	u, err := url.Parse(location)
	if err != nil {
		return "", nil, errors.New("token keys: the address is malformed") // the error would quote it all
	}
	name = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	switch {
	case u.Host == "" || u.User != nil || u.Fragment != "":
		return "", nil, fmt.Errorf("token keys %s: the address has no host, or a user or a fragment", name)
	case u.Scheme != "https" && !(u.Scheme == "http" && isLoopback(u.Hostname())):
		return "", nil, fmt.Errorf("token keys %s: the address must be https, or http on a loopback address", name)
	}
	roots, err := readRoots(caFile)
	if err != nil {
		return "", nil, fmt.Errorf("token keys %s: CA file: %w", name, err)
	}
	client := newClient(roots)
	return name, func(ctx context.Context) ([]byte, error) { return get(ctx, client, location) }, nil
}

// isLoopback does not resolve names: what they resolve to may change.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || host == "localhost"
}

// readRoots reads certificates to trust; nil are the system's.
func readRoots(caFile string) (*x509.CertPool, error) {
	if caFile == "" {
		return nil, nil
	}
	content, err := readFile(caFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(content) {
		return nil, fmt.Errorf("no certificate in %s", caFile)
	}
	return roots, nil
}

// newClient follows no redirect: the address that the operator has written is the one that is trusted, and a redirect could lead
// to an http one.
func newClient(roots *x509.CertPool) *http.Client {
	return &http.Client{
		Timeout: fetchTimeout,
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			DisableKeepAlives:      true, // the next request is minutes away
			MaxResponseHeaderBytes: maxResponseHeaderBytes,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func get(ctx context.Context, client *http.Client, address string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, errors.New("the address is malformed")
	}
	request.Header.Set("Accept", "application/jwk-set+json, application/json")
	response, err := client.Do(request)
	if err != nil {
		var whole *url.Error // repeats the address with its query
		if errors.As(err, &whole) {
			err = whole.Err
		}
		return nil, fmt.Errorf("fetch: %w", err)
	}
	defer response.Body.Close()
	switch code := response.StatusCode; {
	case 300 <= code && code < 400:
		return nil, fmt.Errorf("fetch: status %d: redirects are not followed, configure the final address", code)
	case code != http.StatusOK:
		return nil, fmt.Errorf("fetch: status %d", code)
	}
	content, err := readBounded(response.Body)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	return content, nil
}
