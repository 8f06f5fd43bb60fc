package main

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"millrace/edge"
)

var update = flag.Bool("update", false, "rewrite the generated parts of README.md")

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// secretFile is a configured secret, with which public addresses are allowed.
func secretFile(t *testing.T) string {
	return writeFile(t, "secret", strings.Repeat("s", 40)+"\n")
}

func TestDefaultsServeThisMachineOnly(t *testing.T) {
	c := defaultConfig()
	if err := c.validate(); err != nil {
		t.Fatal(err)
	}
	if c.Edge.Addr != "127.0.0.1:8080" || c.Admin.Addr != "127.0.0.1:8082" || c.Data.Dir != "data" || c.Edge.MessageRate != 20 ||
		c.Edge.MessageBurst != 100 || c.Data.MinFreeBytes != 0 || c.Log.Level != "info" || c.Log.Format != "auto" || len(c.Edge.Origins) != 0 {
		t.Errorf("defaults are %+v", c)
	}
	if c.Edge.MaxConnections < minConnections {
		t.Errorf("connection cap is %d", c.Edge.MaxConnections)
	}
}

func TestValidateFillsWhatIsEmpty(t *testing.T) {
	var c Config
	if err := c.validate(); err != nil {
		t.Fatal(err)
	}
	want := defaultConfig()
	// No limit is a choice, not a gap.
	want.Edge.MessageRate, want.Edge.AddressConnections, want.Edge.AddressHandshakes, want.Edge.UserConnections, want.Edge.UserLogins = 0, 0, 0, 0, 0
	want.Edge.MaxConnections = c.Edge.MaxConnections
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestValidateRefuses(t *testing.T) {
	secret := secretFile(t)
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   string // part of the error; empty: accepted
	}{
		{"all interfaces with the development secret", func(c *Config) { c.Edge.Addr = ":8080" }, "development secret"},
		{"a public address with the development secret", func(c *Config) { c.Edge.Addr = "192.0.2.1:8080" }, "--auth-secret-file"},
		{"a name with the development secret", func(c *Config) { c.Edge.Addr = "chat.example:8080" }, "development secret"},
		{"all interfaces of IPv6 with the development secret", func(c *Config) { c.Edge.Addr = "[::]:8080" }, "development secret"},
		{"localhost", func(c *Config) { c.Edge.Addr = "localhost:8080" }, ""},
		{"127.0.0.2", func(c *Config) { c.Edge.Addr = "127.0.0.2:8080" }, ""},
		{"::1", func(c *Config) { c.Edge.Addr = "[::1]:8080" }, ""},
		{"mapped loopback", func(c *Config) { c.Edge.Addr = "[::ffff:127.0.0.1]:8080" }, ""},
		{"all interfaces with a secret", func(c *Config) { c.Edge.Addr, c.Auth.SecretFile = ":8080", secret }, ""},
		{"one address twice", func(c *Config) { c.Admin.Addr = c.Edge.Addr }, "both 127.0.0.1:8080"},
		{"two free ports", func(c *Config) { c.Edge.Addr, c.Admin.Addr = "127.0.0.1:0", "127.0.0.1:0" }, ""},
		{"no port", func(c *Config) { c.Edge.Addr = "127.0.0.1" }, "expected host:port"},
		{"port out of range", func(c *Config) { c.Admin.Addr = "127.0.0.1:65536" }, "0 to 65535"},
		{"negative rate", func(c *Config) { c.Edge.MessageRate = -1 }, "0 to 1000000"},
		{"negative limit", func(c *Config) { c.Edge.AddressConnections = -2 }, "0 to 1000000, or auto"},
		{"negative logins", func(c *Config) { c.Edge.UserLogins = -1 }, "0 to 1000000"},
		{"proxies", func(c *Config) { c.Edge.ProxyNetworks = []netip.Prefix{netip.MustParsePrefix("10.1.2.3/8")} }, ""},
		{"a network that is none", func(c *Config) { c.Edge.ProxyNetworks = make([]netip.Prefix, 1) }, "not a network"},
		{"little free space", func(c *Config) { c.Data.MinFreeBytes = 1000 }, "at least 1MiB"},
		{"origin with a path", func(c *Config) { c.Edge.Origins = []string{"https://a.example/x"} }, "not a web origin"},
		{"unknown level", func(c *Config) { c.Log.Level = "warning" }, "not one of debug, info, warn, error"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := defaultConfig()
			c.change(&cfg)
			switch err := cfg.validate(); {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// TestOriginsAreCheckedAsTheEdgeDoes: what `config check` accepts must not be refused by serve, and none is accepted that no browser sends.
func TestOriginsAreCheckedAsTheEdgeDoes(t *testing.T) {
	for origin, good := range map[string]bool{
		"https://example.org": true, "http://x:81": true, "https://EXAMPLE.org:443": true, "https://[::1]": true, "http://[::1]:8080": true, "http://192.0.2.1": true,
		"https://*.example.org": false, "https://*": false, "http://x:": false, "http://x:99999": false, "http://x:http": false, "https://[::1": false, "http://::1": false,
		"https://a b": false, "https://a\tb": false, "https://a.example/": false, "https://a.example?q": false, "https://a.example#f": false, "https://u@a.example": false,
		"ws://a.example": false, "a.example": false, "null": false, "*": false, "https://": false, "https://:443": false, "https:a.example": false,
	} {
		err := checkOrigin(origin)
		if (err == nil) != good || err != nil && !strings.Contains(err.Error(), "not a web origin") {
			t.Errorf("%q: %v, want it accepted: %v", origin, err, good)
		}
		if good && edge.CheckOrigin(origin) != nil {
			t.Errorf("%q: the edge refuses it", origin)
		}
	}
}

func TestPrecedence(t *testing.T) {
	file := writeFile(t, "millrace.toml", "[edge]\naddr = '127.0.0.1:1'\nmessage-rate = 1\nmessage-burst = 1\n[data]\ndir = 'f'\n")
	environ := []string{"MILLRACE_EDGE_MESSAGE_RATE=2", "MILLRACE_EDGE_MESSAGE_BURST=2", "MILLRACE_DATA_DIR=", "MILLRACE_CONFIG=" + file, "HOME=/x"}
	c, err := loadConfig(map[string]string{"edge-message-burst": "3"}, "", environ)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []struct{ name, text, origin string }{
		{"edge-addr", "127.0.0.1:1", file + ":2"},
		{"edge-message-rate", "2", "environment MILLRACE_EDGE_MESSAGE_RATE"},
		{"edge-message-burst", "3", "flag --edge-message-burst"},
		{"data-dir", "f", file + ":6"}, // an empty variable is not set
		{"log-level", "info", "default"},
	} {
		if text := findSetting(w.name).value(&c.Config).text(); text != w.text || c.origins[w.name] != w.origin {
			t.Errorf("%s is %q from %q, want %q from %q", w.name, text, c.origins[w.name], w.text, w.origin)
		}
	}
	if len(c.warnings) != 0 {
		t.Errorf("warnings %q", c.warnings)
	}
}

func TestFileFlagWinsOverVariable(t *testing.T) {
	a, b := writeFile(t, "a.toml", "log.level='warn'"), writeFile(t, "b.toml", "log.level='error'")
	c, err := loadConfig(nil, b, []string{"MILLRACE_CONFIG=" + a})
	if err != nil || c.Log.Level != "error" {
		t.Errorf("level %q, error %v", c.Log.Level, err)
	}
}

func TestFileErrorsHaveLineAndColumn(t *testing.T) {
	for _, c := range []struct{ name, file, want string }{
		{"unknown key", "[edge]\n  adr = 'x'", "2:3: unknown key edge.adr, did you mean edge.addr?"},
		{"unknown section", "\n[egde]\naddr = 'x'", "2:2: unknown section [egde], did you mean edge?"},
		{"unknown subsection", "[edge.x]", "1:2: unknown section [edge.x]"},
		{"key without section", "addr = '127.0.0.1:1'", "1:1: unknown key addr"},
		{"flag's name in the file", "edge-addr = '127.0.0.1:1'", "1:1: unknown key edge-addr, did you mean edge.addr?"},
		{"quoted key", "[auth]\n\"secret-fil\" = ''", "2:1: unknown key auth.secret-fil, did you mean auth.secret-file?"},
		{"dotted key", "edge.adr = 'x'", "1:6: unknown key edge.adr, did you mean edge.addr?"},
		{"inline table", "edge = {addr = '127.0.0.1:1', adr = 1}", "1:31: unknown key edge.adr, did you mean edge.addr?"},
		{"nothing near", "[edge]\nzebra = 1", "2:1: unknown key edge.zebra"},
		{"string for a number", "[edge]\nmessage-rate = \"20\"", "2:16: edge.message-rate is a string: expected an integer (N)"},
		{"number for a string", "[data]\nmin-free = 1_000_000", "2:12: data.min-free is an integer: expected a string (SIZE)"},
		{"word for a limit", "[edge]\naddress-connections = \"many\"", `2:23: edge.address-connections: "many" is not a number from 0 to 1000000, or auto`},
		{"network", "[edge]\nproxy-networks = ['10.0.0.0/33']", `2:1: edge.proxy-networks: "10.0.0.0/33" is not a network`},
		{"boolean", "[log]\nlevel = true", "2:1: log.level is a boolean: expected a string (LEVEL)"},
		{"list of numbers", "[edge]\norigins = [1]", "2:1: edge.origins is a list of other things: expected a list of strings (ORIGIN,...)"},
		{"section as a value", "edge = 1", "1:1: unknown key edge"},
		{"list of sections", "[[edge]]\naddr = 'x'", "1:3: section [[edge]] is a list: expected [edge]"},
		{"unit", "[data]\nmin-free = '5 potatoes'", `2:12: data.min-free: "5 potatoes" is not a size`},
		{"choice", "[log]\nlevel = 'wran'", `2:9: log.level: "wran" is not one of debug, info, warn, error, did you mean warn?`},
		{"range", "[edge]\nmessage-burst = 0", `2:17: edge.message-burst: "0" is not a number from 1 to 1000000`},
		{"twice", "[edge]\naddr = '127.0.0.1:1'\naddr = '127.0.0.1:1'", "3:1: edge.addr is set already in line 2"},
		{"syntax", "[edge]\naddr = ", "2:"},
		{"escape", `log.level = "\q"`, "1:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := writeFile(t, "c.toml", c.file)
			_, err := loadConfig(nil, path, nil)
			if err == nil || !strings.HasPrefix(err.Error(), path+":"+c.want) {
				t.Errorf("got  %v\nwant %s:%s", err, path, c.want)
			}
		})
	}
}

func TestFileReportsEveryMistake(t *testing.T) {
	path := writeFile(t, "c.toml", "[edge]\na = 1\naddr = 5\n[log]\nlevel = 'info'\nb = 1\n")
	_, err := loadConfig(nil, path, nil)
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("got %v, want three lines", err)
	}
}

func TestFileIsBounded(t *testing.T) {
	path := writeFile(t, "c.toml", strings.Repeat("# filler\n", maxConfigBytes/8))
	if _, err := loadConfig(nil, path, nil); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("got %v", err)
	}
}

func FuzzConfigFile(f *testing.F) {
	f.Add("[edge]\naddr = '127.0.0.1:1'\norigins = ['https://a.example']\n")
	f.Add("edge = {message-rate = 1}\ndata.min-free = '2GiB'")
	f.Add("[[edge]]\n\"a\\u0062\" = 1979-05-27T07:32:00Z\n[x.y]")
	f.Fuzz(func(t *testing.T, text string) {
		c := newConfiguration()
		if c.applyTOML("c.toml", []byte(text)) != nil {
			return
		}
		// What was accepted can be shown and read again with the same meaning.
		again := newConfiguration()
		if err := again.applyTOML("c.toml", []byte(c.show())); err != nil {
			t.Fatalf("shown configuration is refused: %v\n%s", err, c.show())
		}
		if !reflect.DeepEqual(again.Config, c.Config) {
			t.Fatalf("read %+v, shown and read again %+v", c.Config, again.Config)
		}
	})
}

func TestUnknownVariablesAreWarnedAbout(t *testing.T) {
	c, err := loadConfig(nil, "", []string{"MILLRACE_EGDE_ADDR=x", "MILLRACE_CRASH=x:1"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"environment variable MILLRACE_EGDE_ADDR is not read by millrace, did you mean MILLRACE_EDGE_ADDR?"}
	if !reflect.DeepEqual(c.warnings, want) {
		t.Errorf("got %q, want %q", c.warnings, want)
	}
}

func TestWrongValuesNameTheirSource(t *testing.T) {
	_, err := loadConfig(map[string]string{"edge-addr": "x"}, "", []string{"MILLRACE_LOG_LEVEL=loud"})
	for _, want := range []string{"flag --edge-addr: ", "environment MILLRACE_LOG_LEVEL: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

func TestShowIsAFileThatSetsTheSame(t *testing.T) {
	given := map[string]string{"edge-addr": "127.0.0.1:0", "edge-origins": "https://A.example, http://b.example:81", "data-min-free": "1.5GiB",
		"data-dir": `a "quoted" \ dir`, "log-format": "json"}
	c, err := loadConfig(given, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	shown := c.show()
	again, err := loadConfig(nil, writeFile(t, "c.toml", shown), nil)
	if err != nil {
		t.Fatalf("%v in\n%s", err, shown)
	}
	if !reflect.DeepEqual(again.Config, c.Config) {
		t.Errorf("got %+v, want %+v", again.Config, c.Config)
	}
	if !strings.Contains(shown, "# flag --edge-addr\n") || !strings.Contains(shown, "# default\n") {
		t.Errorf("origins are missing in\n%s", shown)
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		text  string
		bytes int64
		shown string
	}{
		{"auto", 0, "auto"}, {"1MiB", 1 << 20, "1MiB"}, {"2 GiB", 2 << 30, "2GiB"}, {"1.5GiB", 3 << 29, "1536MiB"},
		{"3GB", 3e9, "2929687.5KiB"}, {"1048577", 1<<20 + 1, "1048577B"},
	} {
		var v sizeValue
		if err := v.set(c.text); err != nil || int64(v) != c.bytes {
			t.Errorf("%q is %d, %v; want %d", c.text, v, err, c.bytes)
		}
		if c.text != "3GB" && v.text() != c.shown {
			t.Errorf("%q is shown as %q, want %q", c.text, v.text(), c.shown)
		}
		var again sizeValue
		if err := again.set(v.text()); err != nil || again != v {
			t.Errorf("%q shown as %q reads as %d, %v", c.text, v.text(), again, err)
		}
	}
	for _, text := range []string{"", "GiB", "-1GiB", "1XiB", "NaN", "1e40GiB", "1KiB", "0"} {
		if err := new(sizeValue).set(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

func TestAddressLimits(t *testing.T) {
	auto, none := autoAddressLimit, edge.AddressLimit{}
	for _, c := range []struct {
		connections, handshakes string
		remote, loopback        edge.AddressLimit
	}{
		{"auto", "auto", auto, none},
		{"0", "auto", edge.AddressLimit{PerSecond: 100}, none},
		{"1000", "auto", auto, edge.AddressLimit{Connections: 1000}},
		{"7", "8", edge.AddressLimit{Connections: 7, PerSecond: 8}, edge.AddressLimit{Connections: 7, PerSecond: 8}},
		{"auto", "0", edge.AddressLimit{Connections: 1000}, none},
	} {
		cfg, err := loadConfig(map[string]string{"edge-address-connections": c.connections, "edge-address-handshakes": c.handshakes}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if remote, loopback := cfg.Edge.addressLimits(); remote != c.remote || loopback != c.loopback {
			t.Errorf("%s and %s: %+v, this machine %+v", c.connections, c.handshakes, remote, loopback)
		}
	}
}

func TestNetworks(t *testing.T) {
	var v networksValue
	if err := v.set(" 10.1.2.3/8, 192.0.2.1 ,2001:db8::1/32,::1"); err != nil || v.text() != "10.0.0.0/8,192.0.2.1/32,2001:db8::/32,::1/128" ||
		v.toml() != `["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32", "::1/128"]` {
		t.Error(v.text(), v.toml(), err)
	}
	for _, text := range []string{"10.0.0.0/33", "10.0.0/8", "fe80::1%eth0", "::ffff:10.0.0.0/104", "localhost", "10.0.0.1:80", "*",
		strings.Repeat("::1,", edge.MaxProxyNetworks+1)} {
		if err := v.set(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
	if v.text() != "10.0.0.0/8,192.0.2.1/32,2001:db8::/32,::1/128" {
		t.Error("a wrong value has changed it")
	}
	if err := v.set(""); err != nil || v != nil {
		t.Error(v, err)
	}
}

func TestDidYouMean(t *testing.T) {
	names := []string{"addr", "origins", "message-rate", "message-burst"}
	for word, want := range map[string]string{
		"adr": ", did you mean addr?", "orig": ", did you mean origins?", "mesage-rate": ", did you mean message-rate?", "zebra": "", "x": "", "": "",
	} {
		if got := didYouMean(word, names); got != want {
			t.Errorf("%q: got %q, want %q", word, got, want)
		}
	}
}

// TestReadmeSettings keeps README's table in step with the settings: go test -run TestReadmeSettings . -update
func TestReadmeSettings(t *testing.T) {
	const from, to = "<!-- settings: generated -->\n", "<!-- /settings -->\n"
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(readme), from)
	have, after, ok2 := strings.Cut(rest, to)
	if !ok || !ok2 {
		t.Fatalf("README.md has no %q … %q", from, to)
	}
	want := settingsTable()
	if *update {
		if err := os.WriteFile("README.md", []byte(before+from+want+to+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if have != want {
		t.Errorf("README's settings are out of date; run: go test -run TestReadmeSettings . -update\nwant\n%s", want)
	}
}

func settingsTable() string {
	var b strings.Builder
	b.WriteString("| flag | environment | file | default | meaning |\n|---|---|---|---|---|\n")
	for i := range settings {
		s := &settings[i]
		fallback := "`" + s.fallback + "`"
		if s.fallback == "" {
			fallback = ""
		}
		fmt.Fprintf(&b, "| `--%s` | `%s` | `%s` in `[%s]` | %s | %s |\n", s.name(), s.variable(), s.key, s.section, fallback, s.usage)
	}
	return b.String()
}
