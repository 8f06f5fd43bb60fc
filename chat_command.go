package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"millrace/protocol"
	"millrace/protocol/client"
)

type chatCommand struct {
	As        string `name:"as" required:"" placeholder:"USER" help:"Who you are."`
	With      string `name:"with" placeholder:"USER" help:"Whom to talk to; /to USER changes it."`
	URL       string `name:"url" placeholder:"URL" help:"The server (default: this machine's, from --edge-addr)."`
	Device    string `name:"device" default:"terminal" placeholder:"NAME" help:"Name of this device (default ${default})."`
	StateFile string `name:"state-file" placeholder:"FILE" help:"Keeps the outbox and what was shown (default: in the user's state directory)."`
	Token     string `name:"token" xor:"token" placeholder:"TOKEN" help:"Access token (MILLRACE_TOKEN, which unlike a flag is not in the list of processes; default: signed here with the server's secret)."`
	TokenFile string `name:"token-file" xor:"token" placeholder:"FILE" help:"File with an access token; it is read again when the token expires."`
	Protocol  string `name:"protocol" enum:"binary,json" default:"binary" placeholder:"binary|json" help:"Subprotocol (default ${default})."`
	configFlags
}

// Help is the part of --help after the summary.
func (chatCommand) Help() string {
	return `Lines go to the peer: ✓ is durable at the server, ✓✓ has reached a device of the peer. What could not be sent is kept and sent later, also by the next start.

Beside the server, chat signs its own tokens. Elsewhere it needs one that the server's operator made with millrace token.

Examples:

    millrace chat --as alice --with bob
    millrace chat --as bob --url wss://chat.example.org/ws --token-file bob.token
    MILLRACE_TOKEN=eyJhb… millrace chat --as bob --url wss://chat.example.org/ws
    echo hello | millrace chat --as alice --with bob`
}

// Run talks until the end of input, /quit or Ctrl-C.
func (c *chatCommand) Run(p *program) error {
	if err := c.validate(); err != nil {
		return usageError{err}
	}
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	chat := chatConfig{URL: c.URL, User: c.As, Device: c.Device, With: c.With, StateFile: c.StateFile, JSON: c.Protocol == "json"}
	if chat.URL == "" {
		if strings.HasSuffix(cfg.Edge.Addr, ":0") {
			return usageError{errors.New("the server takes a free port: give its address with --url, as the server printed it")}
		}
		chat.URL = clientURL(cfg.Config, cfg.Edge.Addr)
	}
	c.chooseToken(cfg, &chat)
	if _, err := chat.Token(context.Background()); err != nil {
		return fmt.Errorf("get a token: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := runChat(ctx, chat, p.in, p.out); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (c *chatCommand) validate() error {
	for flag, name := range map[string]string{"--as": c.As, "--with": c.With} {
		if name != "" && !protocol.ValidUser(name) {
			return fmt.Errorf("%s: %q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", flag, name, protocol.MaxUserBytes)
		}
	}
	if !protocol.ValidDevice(c.Device) {
		return fmt.Errorf("--device: %q is not a device id: 1 to %d of A-Z a-z 0-9 . _ @ -", c.Device, protocol.MaxDeviceBytes)
	}
	if u, err := url.Parse(c.URL); c.URL != "" && (err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "") {
		return fmt.Errorf("--url: %q is not the address of a server: expected one like ws://127.0.0.1:8080/ws or wss://host/ws", c.URL)
	}
	return nil
}

// chooseToken says where tokens come from: what the command line names wins over the environment, and without either the chat
// signs its own.
func (c *chatCommand) chooseToken(cfg *configuration, chat *chatConfig) {
	given, from := c.Token, "--token"
	if given == "" && c.TokenFile == "" {
		given, from = cfg.token, tokenVariable
	}
	switch {
	case c.TokenFile != "":
		chat.TokenFrom = c.TokenFile
		chat.Token = func(context.Context) (string, error) {
			text, err := readLimited(c.TokenFile, protocol.MaxTokenBytes+1) // a newline may follow
			return strings.TrimSpace(string(text)), err
		}
	case given != "":
		chat.TokenFrom, chat.TokenOnce = from, true
		chat.Token = client.StaticToken(strings.TrimSpace(given))
	default:
		chat.Token = func(context.Context) (string, error) { return signToken(cfg.Config, c.As, time.Hour) }
	}
}
