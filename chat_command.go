package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"millrace/protocol"
)

type chatCommand struct {
	As        string `name:"as" required:"" placeholder:"USER" help:"Who you are."`
	With      string `name:"with" placeholder:"USER" help:"Whom to talk to; /to USER changes it."`
	URL       string `name:"url" placeholder:"URL" help:"The server (default: this machine's, from --edge-addr)."`
	Device    string `name:"device" default:"terminal" placeholder:"NAME" help:"Name of this device (default ${default})."`
	StateFile string `name:"state-file" placeholder:"FILE" help:"Keeps the outbox and what was shown (default: in the user's state directory)."`
	TokenFile string `name:"token-file" placeholder:"FILE" help:"File with an access token (default: signed with the secret of --data-dir)."`
	Protocol  string `name:"protocol" enum:"binary,json" default:"binary" placeholder:"binary|json" help:"Subprotocol (default ${default})."`
	configFlags
}

// Help is the part of --help after the summary.
func (chatCommand) Help() string {
	return `Lines go to the peer: ✓ is durable at the server, ✓✓ has reached a device of the peer. What could not be sent is kept and sent later, also by the next start.

Examples:

    millrace chat --as alice --with bob
    millrace chat --as bob --url ws://127.0.0.1:9000/ws --token-file bob.token
    echo hello | millrace chat --as alice --with bob`
}

// Run talks until the end of input, /quit or Ctrl-C.
func (c *chatCommand) Run(p *program) error {
	for flag, name := range map[string]string{"--as": c.As, "--with": c.With} {
		if name != "" && !protocol.ValidUser(name) {
			return usageError{fmt.Errorf("%s: %q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", flag, name, protocol.MaxUserBytes)}
		}
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
		chat.URL = endpoint(cfg.Edge.Addr)
	}
	chat.Token = func(context.Context) (string, error) {
		if c.TokenFile == "" {
			return signToken(cfg.Config, c.As, time.Hour)
		}
		text, err := os.ReadFile(c.TokenFile)
		return strings.TrimSpace(string(text)), err
	}
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
