package main

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"millrace/protocol/token"
)

// command runs one command line in a process without environment.
func command(args ...string) (code int, out, errors string) {
	return commandIn(nil, args...)
}

func commandIn(environ []string, args ...string) (code int, out, errors string) {
	var stdout, stderr bytes.Buffer
	code = run(args, &program{name: "millrace", in: strings.NewReader(""), out: &stdout, err: &stderr, environ: environ})
	return code, stdout.String(), stderr.String()
}

func TestCommandLineMistakes(t *testing.T) {
	for _, c := range []struct {
		args string
		want string // in the error
	}{
		{"srve", `did you mean "serve"?`},
		{"--edge-adr x", `unknown flag --edge-adr, did you mean "--edge-addr"?`},
		{"serve --edge-adr x", `did you mean "--edge-addr"?`},
		{"--edge-addr", "--edge-addr"},
		{"--edge-addr x", "flag --edge-addr: "},
		{"serve --edge-addr :8080", "development secret"},
		{"serve --auth-secret-file /nowhere/secret", "/nowhere/secret"},
		{"serve --config /nowhere/file", "/nowhere/file"},
		{"token", "<name>"},
		{"token alice --ttl 1x", "--ttl"},
		{"token alice --ttl 0s", "at least 1s"},
		{"token al/ice", "not a user id"},
		{"chat", "--as"},
		{"chat --as al/ice", "not a user id"},
		{"chat --as alice --edge-addr 127.0.0.1:0", "--url"},
		{"chat --as alice --protocol xml", "binary"},
		{"config", "check"},
		{"config sho", `did you mean "show"?`},
		{"edge disconect --user alice", `did you mean "disconnect"?`},
		{"help srve", `did you mean "serve"?`},
	} {
		code, out, errors := command(strings.Fields(c.args)...)
		if code != exitUsage || out != "" || !strings.Contains(errors, c.want) {
			t.Errorf("%s: code %d, output %q, error %q; want 2, none, %q", c.args, code, out, errors, c.want)
		}
	}
}

func TestHelpHasExamples(t *testing.T) {
	for _, name := range []string{"", "serve", "chat", "token", "config", "config check", "config show", "edge", "edge disconnect", "version", "help"} {
		words := strings.Fields(name)
		code, flag, errors := command(append(words, "--help")...)
		if code != exitOK || errors != "" || !strings.Contains(flag, "Examples:\n\n    ") {
			t.Errorf("%s --help: code %d, error %q\n%s", name, code, errors, flag)
		}
		code, help, errors := command(append([]string{"help"}, words...)...)
		if code != exitOK || errors != "" || help != flag {
			t.Errorf("help %s: code %d, error %q, differs from --help: %v", name, code, errors, help != flag)
		}
	}
	if _, help, _ := command("--help"); !strings.Contains(strings.Join(strings.Fields(help), " "), "Exit codes: 0 done; 1 failed while running; 2 wrong command line or configuration") {
		t.Errorf("exit codes are not documented in\n%s", help)
	}
}

func TestHelpNamesEverySetting(t *testing.T) {
	_, help, _ := command("serve", "--help")
	for i := range settings {
		s := &settings[i]
		if !strings.Contains(help, "--"+s.name()+"=") || !strings.Contains(help, s.variable()) {
			t.Errorf("%s is missing in\n%s", s.name(), help)
		}
	}
}

func TestTokenCommandSignsWithTheServersSecret(t *testing.T) {
	c := defaultConfig()
	c.Data.Dir = filepath.Join(t.TempDir(), "data")
	code, _, errors := command("token", "alice", "--data-dir", c.Data.Dir)
	if code != exitFailure || !strings.Contains(errors, "millrace serve") {
		t.Errorf("before the server: code %d, error %q", code, errors)
	}
	secret, err := openSecret(c)
	if err != nil {
		t.Fatal(err)
	}
	code, out, errors := commandIn([]string{"MILLRACE_DATA_DIR=" + c.Data.Dir}, "token", "alice", "--ttl", "2h")
	if code != exitOK || errors != "" {
		t.Fatalf("code %d, error %q", code, errors)
	}
	verifier, err := token.NewHS256(secret)
	if err != nil {
		t.Fatal(err)
	}
	claims, err := verifier.Verify([]byte(strings.TrimSuffix(out, "\n")), time.Now())
	if err != nil || claims.User != "alice" {
		t.Fatalf("claims %+v, error %v", claims, err)
	}
	if left := time.Until(claims.ExpiresAt); left > 2*time.Hour || left < time.Hour {
		t.Errorf("valid for %v, want 2h", left)
	}
}

func TestConfigCommands(t *testing.T) {
	secret := secretFile(t)
	file := writeFile(t, "m.toml", "[edge]\naddr = ':8443'\n[auth]\nsecret-file = '"+secret+"'\n")
	environ := []string{"MILLRACE_CONFIG=" + file, "MILLRACE_LOG_LEVLE=debug"}

	code, out, errors := commandIn(environ, "config", "check")
	if code != exitOK || out != "configuration is good\n" || !strings.Contains(errors, "did you mean MILLRACE_LOG_LEVEL?") {
		t.Errorf("check: code %d, output %q, error %q", code, out, errors)
	}
	code, out, _ = commandIn(environ, "config", "show", "--log-format", "json")
	for _, want := range []string{`addr = ":8443"`, "# " + file + ":2\n", "# flag --log-format\n", "# default\n"} {
		if code != exitOK || !strings.Contains(out, want) {
			t.Errorf("show: code %d, %q is missing in\n%s", code, want, out)
		}
	}
	if strings.Contains(out, strings.Repeat("s", 40)) {
		t.Errorf("show prints the secret:\n%s", out)
	}
	code, _, errors = command("config", "check", "--auth-secret-file", writeFile(t, "short", "abc"))
	if code != exitUsage || !strings.Contains(errors, "32") || strings.Contains(errors, "abc") {
		t.Errorf("short secret: code %d, error %q", code, errors)
	}
}

func TestVersionCommand(t *testing.T) {
	_, want, _ := command("version")
	code, out, _ := command("--version")
	if code != exitOK || out != want || !strings.HasPrefix(out, "millrace ") || !strings.Contains(out, "\ncommit ") || !strings.Contains(out, "\ngo1.") {
		t.Errorf("code %d, output %q", code, out)
	}
}
