package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"millrace/protocol"
)

// This file ends the sessions of a user on an operator's word: the path on the admin address, and the command that asks for it.

const (
	disconnectPath = "/edge/disconnect"

	disconnectTimeout = 10 * time.Second
	// maxAdminAnswer is more than any answer to a command.
	maxAdminAnswer = 4 << 10
)

// disconnectHandler changes something, so no web page may ask for it, not even one of this machine.
func disconnectHandler(src source) http.Handler {
	return http.NewCrossOriginProtection().Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user := r.URL.Query().Get("user")
		if !protocol.ValidUser(user) {
			answer(w, http.StatusBadRequest, notUser(user)+"\n")
			return
		}
		switch n := src.Disconnect(user); n {
		case 0:
			answer(w, http.StatusOK, user+" has no session\n")
		case 1:
			answer(w, http.StatusOK, "ended the session of "+user+"\n")
		default:
			answer(w, http.StatusOK, fmt.Sprintf("ended %d sessions of %s\n", n, user))
		}
	}))
}

func notUser(name string) string {
	return fmt.Sprintf("%q is not a user id: 1 to %d of A-Z a-z 0-9 . _ @ -", name, protocol.MaxUserBytes)
}

type edgeCommand struct {
	Disconnect disconnectCommand `cmd:"" help:"End the sessions of a user."`
}

// Help is the part of --help after the summary.
func (edgeCommand) Help() string {
	return `Examples:

    millrace edge disconnect --user alice`
}

type disconnectCommand struct {
	User string `name:"user" required:"" placeholder:"NAME" help:"Whose sessions to end."`
	configFlags
}

// Help is the part of --help after the summary.
func (disconnectCommand) Help() string {
	return `Ends the sessions of a user on all devices, by the admin address of the server. Clients come back with a new token only. That is all: a token that has been given out stays valid until it expires, so have whatever signs tokens refuse the user first, and keep tokens short-lived.

Examples:

    millrace edge disconnect --user alice
    millrace edge disconnect --user alice --admin-addr 127.0.0.1:9082`
}

// Run asks a running server.
func (c *disconnectCommand) Run(p *program) error {
	if !protocol.ValidUser(c.User) {
		return usageError{errors.New("--user: " + notUser(c.User))}
	}
	cfg, err := c.load(p.environ)
	if err != nil {
		return err
	}
	if strings.HasSuffix(cfg.Admin.Addr, ":0") {
		return usageError{errors.New("the server takes a free port: give its admin address with --admin-addr, as the server printed it")}
	}
	said, err := postAdmin(cfg.Admin.Addr, disconnectPath, url.Values{"user": {c.User}})
	if err != nil {
		return err
	}
	_, err = io.WriteString(p.out, said)
	return err
}

// postAdmin asks a server to do something and returns what it says.
func postAdmin(addr, path string, query url.Values) (said string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), disconnectTimeout)
	defer cancel()
	target := url.URL{Scheme: "http", Host: reachable(addr), Path: path, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), nil)
	if err != nil {
		return "", fmt.Errorf("ask the server: %w", err)
	}
	// A proxy of the environment has no business between us and our own server.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return "", fmt.Errorf("ask the server: %w", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAdminAnswer))
	if err != nil {
		return "", fmt.Errorf("read the server's answer: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the server at %s refuses: %s: %s", addr, response.Status, strings.TrimSpace(string(body)))
	}
	return string(body), nil
}
