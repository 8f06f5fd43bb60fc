package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"runtime"
	"strings"

	"millrace/edge"
)

// Config is everything that a user can set, one struct per section. The settings table
// (settings.go) says how each field is called as a flag, in the environment and in the file; nothing else reads them.
type Config struct {
	Edge  EdgeConfig
	Admin AdminConfig
	Data  DataConfig
	Auth  AuthConfig
	Log   LogConfig
}

// EdgeConfig is the section edge: the connections of clients.
type EdgeConfig struct {
	Addr         string   // host:port of the WebSocket listener; port 0 takes a free one
	Origins      []string // web origins allowed besides the server's own
	MessageRate  int      // messages a second that one user may send; 0: no limit
	MessageBurst int      // messages that one user may send at once

	AddressConnections int            // that one client address may have; 0: no limit, limitAuto: see autoAddressLimit
	AddressHandshakes  int            // that one client address may make in a second; the same
	UserConnections    int            // that one user may have; 0: no limit
	UserLogins         int            // that one user may make in a second; 0: no limit
	ProxyNetworks      []netip.Prefix // from where connections begin with a PROXY protocol header

	TLSCert string // file with a chain of certificates, in PEM; empty: no TLS
	TLSKey  string // file with its private key

	// MaxConnections is not a setting: it follows from the descriptor limit. 0 lets validate compute it.
	MaxConnections int
	// HeartbeatSeconds is not a setting either: it is the protocol's, which 0 means, but in tests that wait for it.
	HeartbeatSeconds int
}

// AdminConfig is the section admin: what operators and their tools read.
type AdminConfig struct {
	Addr string // host:port of the HTTP listener; port 0 takes a free one
}

// DataConfig is the section data: what is kept on disk.
type DataConfig struct {
	Dir string // the data directory; one server at a time
	// MinFreeBytes is how much of the file system must stay free: below it new sends are refused with
	// store_full. 0 means automatic: the larger of 1 GiB and 5 % of the file system.
	MinFreeBytes int64
}

// AuthConfig is the section auth: who may connect.
type AuthConfig struct {
	// SecretFile holds the secret that signs tokens. Empty means, without Keys, a secret generated once in the
	// data directory: good for trying things on one machine, refused with a public address.
	SecretFile string
	// Keys are where public keys that verify tokens come from: files of PEM blocks, or key sets (JWKS) in files or behind addresses.
	Keys       []string
	KeysCAFile string   // certificates that vouch for the addresses in Keys; empty: the system's
	Issuer     string   // iss of every token; empty: not looked at
	Audience   []string // of these one must be in the aud of every token; none: not looked at
}

// LogConfig is the section log.
type LogConfig struct {
	Level  string // debug, info, warn or error
	Format string // json, text, or auto: text on a terminal
}

// Bounds of the numeric settings. A rate above a million a second is no limit at all.
const (
	maxMessageRate  = 1_000_000
	maxMessageBurst = 1_000_000
	maxLimit        = 1_000_000
	minFreeFloor    = 1 << 20 // 1 MiB: less cannot hold even the batch being written
)

// limitAuto leaves a limit of an address to autoAddressLimit.
const limitAuto = -1

// autoAddressLimit is what an office behind one address needs, also when all of it comes back at once. This machine, where a proxy
// may be what connects, or a load test, is not limited unless somebody says so.
var autoAddressLimit = edge.AddressLimit{Connections: 1000, PerSecond: 100}

// loginBurstSeconds is for how many seconds' worth of logins a user can come at once: with the default all devices, twice.
const loginBurstSeconds = 10

// addressLimits are those of clients on other machines and on this one.
func (c *EdgeConfig) addressLimits() (remote, loopback edge.AddressLimit) {
	remote = autoAddressLimit
	if n := c.AddressConnections; n != limitAuto {
		remote.Connections, loopback.Connections = n, n
	}
	if n := c.AddressHandshakes; n != limitAuto {
		remote.PerSecond, loopback.PerSecond = n, n
	}
	return remote, loopback
}

func (c *EdgeConfig) userLimit() edge.UserLimit {
	return edge.UserLimit{
		Connections: c.UserConnections,
		Logins:      edge.RateLimit{PerSecond: float64(c.UserLogins), Burst: loginBurstSeconds * c.UserLogins},
	}
}

// defaultConfig is what a server without any configuration runs with.
func defaultConfig() Config {
	var c Config
	for i := range settings {
		s := &settings[i]
		if err := s.value(&c).set(s.fallback); err != nil {
			panic(fmt.Sprintf("default of %s: %v", s.name(), err)) // a mistake in the table, found by any test
		}
	}
	return c
}

// validate fills what is empty with its default and says everything that is wrong at once. A rate or
// limit of 0 is a choice (no limit) and stays.
func (c *Config) validate() error {
	c.fillDefaults()
	var problems []error
	refuse := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	for i := range settings {
		s := &settings[i]
		v := s.value(c)
		if err := v.set(v.text()); err != nil {
			refuse("%s.%s: %w", s.section, s.key, err)
		}
	}
	if c.Edge.Addr == c.Admin.Addr && !strings.HasSuffix(c.Edge.Addr, ":0") {
		refuse("edge.addr and admin.addr are both %s: choose another port for one of them", c.Edge.Addr)
	}
	if (c.Edge.TLSCert == "") != (c.Edge.TLSKey == "") {
		refuse("edge.tls-cert and edge.tls-key belong together: one of them is missing")
	}
	if c.developmentSecret() && !loopback(c.Edge.Addr) {
		refuse("edge.addr %s is reachable from other machines, but tokens are signed with the development secret of %s.\n%s",
			c.Edge.Addr, secretPath(*c), realSecretAdvice)
	}
	if c.Edge.MaxConnections == 0 {
		limit, err := descriptorLimit()
		if err != nil {
			refuse("%w", err)
		} else if c.Edge.MaxConnections, err = connectionCap(limit, runtime.GOMAXPROCS(0)); err != nil {
			refuse("%w", err)
		}
	}
	return errors.Join(problems...)
}

func (c *Config) fillDefaults() {
	d := defaultConfig()
	fill := func(field *string, fallback string) {
		if *field == "" {
			*field = fallback
		}
	}
	fill(&c.Edge.Addr, d.Edge.Addr)
	fill(&c.Admin.Addr, d.Admin.Addr)
	fill(&c.Data.Dir, d.Data.Dir)
	fill(&c.Log.Level, d.Log.Level)
	fill(&c.Log.Format, d.Log.Format)
	if c.Edge.MessageBurst == 0 {
		c.Edge.MessageBurst = d.Edge.MessageBurst
	}
}

// developmentSecret reports whether tokens are signed with the secret that was generated in the data
// directory. Whoever has configured anything else to trust does not trust that.
func (c *Config) developmentSecret() bool { return c.Auth.SecretFile == "" && len(c.Auth.Keys) == 0 }

// signs reports whether this program has a secret to sign tokens with, and not just public keys.
func (c *Config) signs() bool { return c.Auth.SecretFile != "" || c.developmentSecret() }

// loopback reports whether only this machine can reach a host:port. Names other than localhost count
// as reachable: what they resolve to can change.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// checkAddr says what is wrong with a host:port to listen on.
func checkAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not an address: expected host:port like 127.0.0.1:8080, or :8080 for all interfaces", addr)
	}
	if n, err := parseCount(port); err != nil || n > 65535 {
		return fmt.Errorf("%q has no valid port: expected a number from 0 to 65535", addr)
	}
	if strings.ContainsAny(host, " \t/") {
		return fmt.Errorf("%q has no valid host: expected an IP address or a name", addr)
	}
	return nil
}

// checkOrigin says what is wrong with a web origin. Browsers send scheme, host and port, never a path. What is good here is good for
// the edge, which compares text: what no browser can send is refused here.
func checkOrigin(origin string) error {
	if err := edge.CheckOrigin(origin); err != nil {
		return err
	}
	u, err := url.Parse(origin)
	if err != nil {
		return fmt.Errorf("%q is not a web origin: %w", origin, err)
	}
	if port := u.Port(); port != "" {
		if n, err := parseCount(port); err != nil || n > 65535 {
			return fmt.Errorf("%q is not a web origin: no port is above 65535", origin)
		}
	}
	return nil
}
