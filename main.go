// Command millrace is a chat edge server: WebSocket clients, messages that are durable before they are
// acknowledged, shown once, and kept for whoever is offline. Run `millrace help`, or read README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"millrace/protocol"
	"millrace/protocol/token"

	"github.com/alecthomas/kong"
)

// Exit codes, as `millrace help` tells them.
const (
	exitOK      = 0
	exitFailure = 1 // while running
	exitUsage   = 2 // command line or configuration
)

func main() {
	os.Exit(run(os.Args[1:], &program{
		name: os.Args[0], in: os.Stdin, out: os.Stdout, err: os.Stderr, environ: os.Environ(),
	}))
}

// program is what a command may touch of the process it runs in.
type program struct {
	name    string // how it was called, for commands to copy
	in      io.Reader
	out     io.Writer
	err     io.Writer
	environ []string
}

// run executes one command line and returns the exit code.
func run(args []string, p *program) int {
	helped := false
	parser := newParser(p, func(int) { helped = true })
	ctx, err := parser.Parse(withCommand(args))
	if helped {
		return exitOK
	}
	if err != nil {
		return p.fail(usageError{fmt.Errorf("%w\nSee `millrace help`, or --help after a command", err)})
	}
	return p.fail(ctx.Run(p))
}

// fail tells an error to the user and chooses the exit code for it.
func (p *program) fail(err error) int {
	var usage usageError
	var code exitCode
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &code):
		return int(code)
	case errors.As(err, &usage):
		fmt.Fprintf(p.err, "millrace: %v\n", err)
		return exitUsage
	default:
		fmt.Fprintf(p.err, "millrace: %v\n", err)
		return exitFailure
	}
}

// withCommand makes serve the command when none is given.
func withCommand(args []string) []string {
	switch {
	case len(args) == 0:
		return []string{"serve"}
	case args[0] == "--version":
		return []string{"version"}
	case args[0] == "-h" || args[0] == "--help" || !strings.HasPrefix(args[0], "-"):
		return args
	default:
		return append([]string{"serve"}, args...)
	}
}

// commandLine is the grammar.
type commandLine struct {
	Serve   serveCommand   `cmd:"" help:"Serve clients (the default command)."`
	Chat    chatCommand    `cmd:"" help:"Talk in the terminal."`
	Token   tokenCommand   `cmd:"" help:"Print an access token."`
	Config  configCommand  `cmd:"" help:"Check or show the configuration."`
	Edge    edgeCommand    `cmd:"" help:"Act on the connections of a running server."`
	Version versionCommand `cmd:"" help:"Print version, commit and Go version."`
	Explain helpCommand    `cmd:"" name:"help" help:"Explain a command."`
}

const description = `A chat edge server: messages are durable before they are acknowledged, shown once, and kept for whoever is offline.

Each setting can be given as a flag (--edge-addr), in the environment (MILLRACE_EDGE_ADDR) or in a TOML file (addr in section [edge], file named by --config or MILLRACE_CONFIG); the first of these wins.

Exit codes: 0 done; 1 failed while running; 2 wrong command line or configuration.`

// Help is the part of --help after the description.
func (commandLine) Help() string {
	return `Examples:

    millrace                                      serve on this machine
    millrace chat --as alice --with bob           talk, in another terminal
    millrace token alice                          a token for another client
    millrace config show                          every value and its origin
    millrace edge disconnect --user alice         end her sessions
    millrace help serve                           flags and examples of a command`
}

func newParser(p *program, exit func(int)) *kong.Kong {
	grammar := &commandLine{}
	grammar.Serve.configFlags = newConfigFlags(allSettings()...)
	grammar.Chat.configFlags = newConfigFlags("edge-addr", "data-dir", "auth-secret-file", "auth-issuer", "auth-audience")
	grammar.Token.configFlags = newConfigFlags("data-dir", "auth-secret-file", "auth-issuer", "auth-audience")
	grammar.Config.Check.configFlags = newConfigFlags(allSettings()...)
	grammar.Config.Show.configFlags = newConfigFlags(allSettings()...)
	grammar.Edge.Disconnect.configFlags = newConfigFlags("admin-addr")
	parser, err := kong.New(grammar,
		kong.Name("millrace"),
		kong.Description(description),
		kong.Writers(p.out, p.err),
		kong.Exit(exit),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true, WrapUpperBound: 110}),
	)
	if err != nil {
		panic(fmt.Sprintf("command line grammar: %v", err)) // a mistake in the structs above, found by any test
	}
	return parser
}

type serveCommand struct{ configFlags }

// Help is the part of --help after the summary.
func (serveCommand) Help() string {
	return `Serves with no configuration at all on 127.0.0.1:8080. SIGTERM or Ctrl-C drains and exits within 10 s; a second one exits at once. SIGHUP reads the keys of tokens and the certificate again.

Examples:

    millrace
    millrace serve --edge-addr 127.0.0.1:0 --log-level debug
    millrace serve --edge-addr :8080 --auth-secret-file /etc/millrace/secret
    millrace serve --edge-addr :443 --edge-tls-cert /etc/millrace/cert.pem --edge-tls-key /etc/millrace/key.pem --auth-secret-file /etc/millrace/secret
    millrace serve --edge-addr :8080 --auth-keys https://id.example.org/jwks.json --auth-issuer https://id.example.org --auth-audience chat
    MILLRACE_DATA_DIR=/var/lib/millrace millrace --config /etc/millrace.toml`
}

// Run serves until a signal or a failure.
func (c *serveCommand) Run(p *program) error {
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	if err := cfg.check(); err != nil {
		return err
	}
	log := newLogger(p.err, cfg.Log)
	for _, warning := range cfg.warnings {
		log.Warn(warning)
	}
	if !loopback(cfg.Admin.Addr) {
		log.Warn("the admin address shows metrics and profiles to everyone who reaches it", "addr", cfg.Admin.Addr)
	}
	defer tuneGC()()
	signals, hangups := make(chan os.Signal, 2), make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	if isTerminal(p.out) { // whoever closes the terminal wants the server to end
		signal.Notify(signals, syscall.SIGHUP)
	} else {
		signal.Notify(hangups, syscall.SIGHUP)
		defer signal.Stop(hangups)
	}
	ended := make(chan struct{})
	defer close(ended)
	return supervise(
		func(ctx context.Context) (*Millrace, error) { return start(ctx, cfg.Config, log) },
		func(m *Millrace) {
			log.Info("serving", "edge", m.EdgeAddr(), "admin", m.AdminAddr(), "data", cfg.Data.Dir,
				"version", readBuildVersion().version, "max_connections", cfg.Edge.MaxConnections)
			go reloadOn(hangups, ended, m.Reload, log)
			// In production the log is the only output; the hints are for who tries things.
			if cfg.developmentSecret() || isTerminal(p.out) {
				welcome(p.out, cfg, m.EdgeAddr(), m.AdminAddr(), p.name)
			}
		}, signals, log)
}

type tokenCommand struct {
	Name string        `arg:"" help:"User id: 1 to 64 of A-Z a-z 0-9 . _ @ -"`
	TTL  time.Duration `name:"ttl" default:"24h" placeholder:"DURATION" help:"How long it is valid, like 90m or 720h (default ${default})."`
	configFlags
}

// Help is the part of --help after the summary.
func (tokenCommand) Help() string {
	return `Signs a token with the server's secret; the server may be running. The token goes to standard output.

Examples:

    millrace token alice
    millrace token alice --ttl 1h --auth-secret-file /etc/millrace/secret`
}

// Run prints a token.
func (c *tokenCommand) Run(p *program) error {
	if !protocol.ValidUser(c.Name) {
		return usageError{fmt.Errorf("%q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", c.Name, protocol.MaxUserBytes)}
	}
	if c.TTL < time.Second {
		return usageError{fmt.Errorf("--ttl %s: expected at least 1s", c.TTL)}
	}
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	signed, err := signToken(cfg.Config, c.Name, c.TTL)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, signed)
	return err
}

func signToken(c Config, user string, ttl time.Duration) (string, error) {
	secret, err := readSecret(c)
	if err != nil {
		return "", err
	}
	audience := ""
	if len(c.Auth.Audience) > 0 {
		audience = c.Auth.Audience[0]
	}
	return token.SignHS256For(secret, user, c.Auth.Issuer, audience, time.Now(), ttl)
}

type configCommand struct {
	Check checkCommand `cmd:"" help:"Say everything that is wrong with the configuration, and start nothing."`
	Show  showCommand  `cmd:"" help:"Print every value and where it comes from."`
}

// Help is the part of --help after the summary.
func (configCommand) Help() string {
	return `Examples:

    millrace config check --config /etc/millrace.toml
    millrace config show > millrace.toml`
}

type checkCommand struct{ configFlags }

// Help is the part of --help after the summary.
func (checkCommand) Help() string {
	return `Exits with 0 when a server would accept the configuration and with 2 when not.

Examples:

    millrace config check --config /etc/millrace.toml
    millrace config check --edge-addr :8080`
}

// Run checks what serve checks before it starts.
func (c *checkCommand) Run(p *program) error {
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	cfg.warn(p)
	if err := cfg.check(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.out, "configuration is good")
	return err
}

type showCommand struct{ configFlags }

// Help is the part of --help after the summary.
func (showCommand) Help() string {
	return `Prints a configuration file with the values in use; a comment says where each comes from: a flag, an environment variable, a line of the file, or the default. Secrets are never printed, only the paths of their files.

Examples:

    millrace config show
    MILLRACE_LOG_LEVEL=debug millrace config show --config /etc/millrace.toml`
}

// Run prints the configuration, also one that serve would refuse.
func (c *showCommand) Run(p *program) error {
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	cfg.warn(p)
	_, err = io.WriteString(p.out, cfg.show())
	return err
}

func (c *configuration) warn(p *program) {
	for _, warning := range c.warnings {
		fmt.Fprintf(p.err, "millrace: warning: %s\n", warning)
	}
}

type versionCommand struct{}

// Help is the part of --help after the summary.
func (versionCommand) Help() string {
	return `Examples:

    millrace version`
}

// Run prints the version.
func (versionCommand) Run(p *program) error {
	_, err := fmt.Fprintln(p.out, readBuildVersion())
	return err
}

type helpCommand struct {
	Command []string `arg:"" optional:"" help:"Command to explain."`
}

// Help is the part of --help after the summary.
func (helpCommand) Help() string {
	return `Examples:

    millrace help
    millrace help chat
    millrace help config show`
}

// Run is --help as a command.
func (c *helpCommand) Run(p *program) error {
	return exitCode(run(append(c.Command, "--help"), p))
}
