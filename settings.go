package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"millrace/edge"
)

// setting is one line of the table below: how a field of Config is called, read, checked, shown and
// documented.
type setting struct {
	section  string
	key      string
	expects  string // placeholder in help, and what an error says was expected
	fallback string // the default, as text
	usage    string // one sentence, without its period
	value    func(c *Config) value
}

// settings is the only place where a setting is named. Flags, environment variables, the file, `config
// show`, the defaults and README's table all follow from it.
var settings = []setting{
	{"edge", "addr", "HOST:PORT", "127.0.0.1:8080", "address of the WebSocket listener; port 0 takes a free one",
		func(c *Config) value { return (*addressValue)(&c.Edge.Addr) }},
	{"edge", "origins", "ORIGIN,...", "", "web origins whose pages may connect, besides the server's own",
		func(c *Config) value { return (*originsValue)(&c.Edge.Origins) }},
	{"edge", "message-rate", "N", "20", "messages a second that one user may send, over all connections; 0 for no limit",
		func(c *Config) value { return countValue{&c.Edge.MessageRate, 0, maxMessageRate} }},
	{"edge", "message-burst", "N", "100", "messages that one user may send at once before the rate applies",
		func(c *Config) value { return countValue{&c.Edge.MessageBurst, 1, maxMessageBurst} }},
	{"edge", "address-connections", "N", "auto", "connections that one client address (IPv6: one /64) may have; 0 for no limit; auto is 1000, and no limit for this machine",
		func(c *Config) value { return limitValue{&c.Edge.AddressConnections} }},
	{"edge", "address-handshakes", "N", "auto", "connections a second that one client address may make, twice as many at once; 0 for no limit; auto is 100, and no limit for this machine",
		func(c *Config) value { return limitValue{&c.Edge.AddressHandshakes} }},
	{"edge", "user-connections", "N", "16", "connections that one user may have, all devices together; 0 for no limit",
		func(c *Config) value { return countValue{&c.Edge.UserConnections, 0, maxLimit} }},
	{"edge", "user-logins", "N", "2", "logins a second of one user, ten times as many at once; 0 for no limit",
		func(c *Config) value { return countValue{&c.Edge.UserLogins, 0, maxLimit} }},
	{"edge", "proxy-networks", "CIDR,...", "", "networks of proxies: connections from there must begin with a PROXY protocol header (version 1 or 2), which names the client",
		func(c *Config) value { return (*networksValue)(&c.Edge.ProxyNetworks) }},
	{"edge", "tls-cert", "FILE", "", "PEM file with the certificate of the server and what it is signed by: with it and tls-key TLS is spoken; a new one is taken without a restart",
		func(c *Config) value { return (*optionalValue)(&c.Edge.TLSCert) }},
	{"edge", "tls-key", "FILE", "", "PEM file with the private key of tls-cert",
		func(c *Config) value { return (*optionalValue)(&c.Edge.TLSKey) }},
	{"admin", "addr", "HOST:PORT", "127.0.0.1:8082", "address of /metrics, /livez, /readyz and pprof; keep it private",
		func(c *Config) value { return (*addressValue)(&c.Admin.Addr) }},
	{"data", "dir", "DIR", "data", "directory of the database, made if missing; one server at a time",
		func(c *Config) value { return (*pathValue)(&c.Data.Dir) }},
	{"data", "min-free", "SIZE", "auto", "disk space to keep free: below it new messages are refused; auto is the larger of 1 GiB and 5 %",
		func(c *Config) value { return (*sizeValue)(&c.Data.MinFreeBytes) }},
	{"auth", "secret-file", "FILE", "", "file with the secret of at least 32 bytes that signs tokens; without it and auth-keys one is generated in the data directory",
		func(c *Config) value { return (*optionalValue)(&c.Auth.SecretFile) }},
	{"auth", "keys", "FILE|URL,...", "", "public keys that verify tokens: PEM files, and key sets (JWKS) in files or behind https addresses",
		func(c *Config) value { return (*listValue)(&c.Auth.Keys) }},
	{"auth", "keys-ca-file", "FILE", "", "PEM certificates that vouch for the addresses in auth-keys, instead of the system's",
		func(c *Config) value { return (*optionalValue)(&c.Auth.KeysCAFile) }},
	{"auth", "issuer", "NAME", "", "what the iss of every token must be; without it any will do",
		func(c *Config) value { return (*optionalValue)(&c.Auth.Issuer) }},
	{"auth", "audience", "NAME,...", "", "names of which the aud of every token must have one; without them any will do",
		func(c *Config) value { return (*listValue)(&c.Auth.Audience) }},
	{"log", "level", "LEVEL", "info", "least severe line to log: debug, info, warn or error",
		func(c *Config) value {
			return choiceValue{&c.Log.Level, []string{"debug", "info", "warn", "error"}}
		}},
	{"log", "format", "FORMAT", "auto", "how lines look: auto (text on a terminal, json elsewhere), json or text",
		func(c *Config) value { return choiceValue{&c.Log.Format, []string{"auto", "json", "text"}} }},
}

// name is the setting as a flag without dashes: section-key.
func (s *setting) name() string { return s.section + "-" + s.key }

// variable is the setting in the environment.
func (s *setting) variable() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(s.name(), "-", "_"))
}

// findSetting returns nil when there is none of this name.
func findSetting(name string) *setting {
	for i := range settings {
		if settings[i].name() == name {
			return &settings[i]
		}
	}
	return nil
}

// value reads and writes one field of a Config as text.
type value interface {
	// set parses, checks and stores; the error says what was expected.
	set(text string) error
	text() string
	// toml is the value as it stands in a file.
	toml() string
	// accepts says which TOML types a file may use for it.
	accepts() []tomlType
}

type addressValue string

func (v *addressValue) set(text string) error {
	if err := checkAddr(text); err != nil {
		return err
	}
	*v = addressValue(text)
	return nil
}
func (v *addressValue) text() string        { return string(*v) }
func (v *addressValue) toml() string        { return tomlString(string(*v)) }
func (v *addressValue) accepts() []tomlType { return []tomlType{tomlText} }

type pathValue string

func (v *pathValue) set(text string) error {
	if text == "" {
		return fmt.Errorf("expected a path")
	}
	*v = pathValue(text)
	return nil
}
func (v *pathValue) text() string        { return string(*v) }
func (v *pathValue) toml() string        { return tomlString(string(*v)) }
func (v *pathValue) accepts() []tomlType { return []tomlType{tomlText} }

// optionalValue is a path or a name that may be left out.
type optionalValue string

func (v *optionalValue) set(text string) error {
	*v = optionalValue(text)
	return nil
}
func (v *optionalValue) text() string        { return string(*v) }
func (v *optionalValue) toml() string        { return tomlString(string(*v)) }
func (v *optionalValue) accepts() []tomlType { return []tomlType{tomlText} }

// listValue is a list; as text its entries are separated by commas, which therefore none can contain.
type listValue []string

func (v *listValue) set(text string) error {
	*v = nil
	for _, entry := range strings.Split(text, ",") {
		if entry = strings.TrimSpace(entry); entry != "" {
			*v = append(*v, entry)
		}
	}
	return nil
}
func (v *listValue) text() string { return strings.Join(*v, ",") }
func (v *listValue) toml() string {
	quoted := make([]string, len(*v))
	for i, entry := range *v {
		quoted[i] = tomlString(entry)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
func (v *listValue) accepts() []tomlType { return []tomlType{tomlList} }

// originsValue is a listValue of origins.
type originsValue []string

func (v *originsValue) set(text string) error {
	var list listValue
	if err := list.set(text); err != nil {
		return err
	}
	for i, origin := range list {
		if err := checkOrigin(origin); err != nil {
			return err
		}
		list[i] = strings.ToLower(origin) // scheme and host are, browsers send them so
	}
	*v = originsValue(list)
	return nil
}
func (v *originsValue) text() string        { return (*listValue)(v).text() }
func (v *originsValue) toml() string        { return (*listValue)(v).toml() }
func (v *originsValue) accepts() []tomlType { return (*listValue)(v).accepts() }

type countValue struct {
	field *int
	least int
	most  int
}

func (v countValue) set(text string) error {
	n, err := parseCount(text)
	if err != nil || n < v.least || n > v.most {
		return fmt.Errorf("%q is not a number from %d to %d", text, v.least, v.most)
	}
	*v.field = n
	return nil
}
func (v countValue) text() string      { return strconv.Itoa(*v.field) }
func (v countValue) toml() string      { return v.text() }
func (countValue) accepts() []tomlType { return []tomlType{tomlInteger} }

// limitValue is a count up to maxLimit; limitAuto is written auto.
type limitValue struct{ field *int }

func (v limitValue) set(text string) error {
	if text == "auto" {
		*v.field = limitAuto
		return nil
	}
	if err := (countValue{v.field, 0, maxLimit}).set(text); err != nil {
		return fmt.Errorf("%w, or auto", err)
	}
	return nil
}

func (v limitValue) text() string {
	if *v.field == limitAuto {
		return "auto"
	}
	return strconv.Itoa(*v.field)
}

func (v limitValue) toml() string {
	if *v.field == limitAuto {
		return tomlString("auto")
	}
	return v.text()
}
func (limitValue) accepts() []tomlType { return []tomlType{tomlInteger, tomlText} }

// networksValue is a listValue of networks.
type networksValue []netip.Prefix

func (v *networksValue) set(text string) error {
	var entries listValue
	if err := entries.set(text); err != nil {
		return err
	}
	if len(entries) > edge.MaxProxyNetworks {
		return fmt.Errorf("%d networks are more than %d", len(entries), edge.MaxProxyNetworks)
	}
	var list []netip.Prefix
	for _, entry := range entries {
		p, err := parseNetwork(entry)
		if err != nil {
			return err
		}
		list = append(list, p)
	}
	*v = list
	return nil
}

// parseNetwork reads a CIDR prefix, or an address, which is a network of one.
func parseNetwork(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		var a netip.Addr
		if a, err = netip.ParseAddr(text); err == nil && a.Zone() == "" {
			p, err = a.Prefix(a.BitLen())
		}
	}
	if err != nil || !p.IsValid() || p.Addr().Is4In6() {
		return p, fmt.Errorf("%q is not a network: expected one like 10.0.0.0/8 or 2001:db8::/32, or an address", text)
	}
	return p.Masked(), nil
}

func (v *networksValue) list() *listValue {
	var list listValue
	for _, p := range *v {
		list = append(list, p.String())
	}
	return &list
}
func (v *networksValue) text() string        { return v.list().text() }
func (v *networksValue) toml() string        { return v.list().toml() }
func (v *networksValue) accepts() []tomlType { return v.list().accepts() }

// sizeValue is bytes; 0 is written auto.
type sizeValue int64

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"B", 1},
}

func (v *sizeValue) set(text string) error {
	if text == "auto" {
		*v = 0
		return nil
	}
	n, ok := parseSize(text)
	if !ok || n < minFreeFloor {
		return fmt.Errorf("%q is not a size of at least 1MiB: expected a number with a unit (MiB, GiB, TiB, MB, GB, TB), or auto", text)
	}
	*v = sizeValue(n)
	return nil
}

func (v *sizeValue) text() string {
	if *v == 0 {
		return "auto"
	}
	for _, u := range sizeUnits[:4] {
		if int64(*v)%u.bytes == 0 {
			return strconv.FormatInt(int64(*v)/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(*v), 10) + "B"
}
func (v *sizeValue) toml() string        { return tomlString(v.text()) }
func (v *sizeValue) accepts() []tomlType { return []tomlType{tomlText} }

type choiceValue struct {
	field *string
	of    []string
}

func (v choiceValue) set(text string) error {
	for _, c := range v.of {
		if text == c {
			*v.field = text
			return nil
		}
	}
	return fmt.Errorf("%q is not one of %s%s", text, strings.Join(v.of, ", "), didYouMean(text, v.of))
}
func (v choiceValue) text() string      { return *v.field }
func (v choiceValue) toml() string      { return tomlString(*v.field) }
func (choiceValue) accepts() []tomlType { return []tomlType{tomlText} }

// parseCount reads a decimal number without sign.
func parseCount(text string) (int, error) {
	n, err := strconv.ParseUint(text, 10, 31)
	return int(n), err
}

// parseSize reads a number with a unit; without one the unit is the byte.
func parseSize(text string) (bytes int64, ok bool) {
	unit := int64(1)
	for _, u := range sizeUnits {
		if number, found := strings.CutSuffix(text, u.suffix); found {
			text, unit = strings.TrimSpace(number), u.bytes
			break
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || !(n >= 0) || n*float64(unit) >= 1<<62 {
		return 0, false
	}
	return int64(n * float64(unit)), true
}

// tomlString quotes text as a TOML basic string.
func tomlString(text string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range text {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// didYouMean is a hint to append to an error: the nearest candidates, or nothing when none is near.
func didYouMean(word string, candidates []string) string {
	best, names := 3, []string(nil) // three edits apart is another word
	for _, c := range candidates {
		d := editDistance(word, c)
		if strings.HasPrefix(c, word) && len(word) > 1 {
			d = min(d, 2)
		}
		switch {
		case d < best && d < len(word):
			best, names = d, []string{c}
		case d == best && best < 3:
			names = append(names, c)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return ", did you mean " + strings.Join(names, " or ") + "?"
}

// editDistance is Levenshtein's, over bytes: names are ASCII.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
