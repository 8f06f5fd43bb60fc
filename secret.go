package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"millrace/protocol/token"
)

// realSecretAdvice says how to leave the development secret behind.
const realSecretAdvice = `Make a secret of your own, keep it readable for this user only, and say where it is:
  (umask 077; head -c 32 /dev/urandom | base64 > millrace.secret)
  millrace serve --auth-secret-file millrace.secret --edge-addr :8080`

// secretPath is the file of the secret that signs tokens.
func secretPath(c Config) string {
	if c.developmentSecret() {
		return filepath.Join(c.Data.Dir, "auth.secret")
	}
	return c.Auth.SecretFile
}

// openSecret reads the secret for a server. The development secret is generated (readable by this user only) when
// it is not there yet; a configured file must exist.
func openSecret(c Config) ([]byte, error) {
	path := secretPath(c)
	if c.developmentSecret() {
		if err := os.MkdirAll(c.Data.Dir, 0o700); err != nil {
			return nil, fmt.Errorf("make data directory: %w", err)
		}
		switch _, err := os.Lstat(path); {
		case errors.Is(err, fs.ErrNotExist):
			secret, err := token.CreateSecretFile(path)
			if err == nil {
				return secret, nil
			}
			if !errors.Is(err, fs.ErrExist) { // else another process was faster; its secret is as good
				return nil, fmt.Errorf("generate development secret: %w", err)
			}
		case err != nil:
			return nil, fmt.Errorf("look for development secret: %w", err)
		}
	}
	secret, err := token.ReadSecretFile(path)
	if err != nil {
		return nil, fmt.Errorf("read auth secret: %w", err)
	}
	return secret, nil
}

// readSecret reads the secret of a server that was started before, to sign a token. It makes none: a token signed with a
// secret in the wrong directory would be refused with no hint at the reason.
func readSecret(c Config) ([]byte, error) {
	if !c.signs() {
		return nil, errors.New("only public keys are configured (auth-keys), with which nobody can sign: get the token from who has the private " +
			"key, or name a secret with --auth-secret-file")
	}
	secret, err := token.ReadSecretFile(secretPath(c))
	if errors.Is(err, fs.ErrNotExist) && c.developmentSecret() {
		return nil, fmt.Errorf("no secret at %s: start `millrace serve` once in this directory, or name the server's "+
			"with --data-dir or --auth-secret-file", secretPath(c))
	}
	if err != nil {
		return nil, fmt.Errorf("read auth secret: %w", err)
	}
	return secret, nil
}
