package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"millrace/protocol/token"
)

// openVerifier makes what verifies tokens: with a secret (the development secret is generated when it is not there yet), with public
// keys, or with both. It waits for no address.
func openVerifier(c Config, log *slog.Logger) (*token.Verifier, error) {
	var secret []byte
	if c.signs() {
		var err error
		if secret, err = openSecret(c); err != nil {
			return nil, err
		}
		if err := warnOfExposure(secretPath(c), log); err != nil {
			return nil, err
		}
	}
	v, err := newVerifier(c, secret, log)
	if err != nil {
		return nil, err
	}
	for _, path := range append(slices.Clone(c.Auth.Keys), c.Auth.KeysCAFile) {
		if path == "" || isAddress(path) {
			continue
		}
		if err := warnOfReplaceable(path, log); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// checkTokens says what is wrong with the files that tokens are verified with. It makes nothing, not even the development secret.
func checkTokens(c Config) error {
	var secret []byte
	if c.Auth.SecretFile != "" {
		var err error
		if secret, err = readSecret(c); err != nil {
			return err
		}
	}
	if c.Auth.KeysCAFile != "" && !slices.ContainsFunc(c.Auth.Keys, isAddress) {
		return errors.New("auth.keys-ca-file is for https addresses, and auth.keys has none")
	}
	if c.developmentSecret() {
		return nil
	}
	_, err := newVerifier(c, secret, slog.New(slog.DiscardHandler))
	return err
}

// newVerifier joins a secret (nil: none) and the public keys. Issuer and audiences hold for all of them.
func newVerifier(c Config, secret []byte, log *slog.Logger) (*token.Verifier, error) {
	var sources []token.Source
	if secret != nil {
		sources = append(sources, token.Source{Secret: secret})
	}
	for _, location := range c.Auth.Keys {
		source := token.Source{Location: location}
		if isAddress(location) {
			source.CAFile = c.Auth.KeysCAFile
		}
		sources = append(sources, source)
	}
	for i := range sources {
		sources[i].Issuer, sources[i].Audiences = c.Auth.Issuer, c.Auth.Audience
	}
	v, err := token.New(token.Config{Sources: sources, Logger: log})
	if err != nil {
		return nil, fmt.Errorf("verify tokens: %w", err)
	}
	return v, nil
}

func isAddress(location string) bool { return strings.Contains(location, "://") }
