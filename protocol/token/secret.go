package token

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// maxSecretFileBytes is far over any secret: it stops us from reading a disk when the path is a mistake.
const maxSecretFileBytes = 64 << 10

// newSecretBytes is the entropy of a secret that we make, as in openssl rand -base64 48.
const newSecretBytes = 48

// MinSecretBytes is the shortest HMAC secret: as long as the hash, RFC 7518 §3.2.
const MinSecretBytes = 32

// checkSecret trims the white space around a secret and refuses one that is too short, or that others may know.
func checkSecret(secret []byte) ([]byte, error) {
	secret = bytes.TrimSpace(secret)
	if bytes.HasPrefix(secret, []byte("-----BEGIN ")) {
		return nil, errors.New("the secret is a PEM file: a key for EdDSA, ES256 or RS256 is not a secret for HS256")
	}
	if len(secret) < MinSecretBytes {
		return nil, fmt.Errorf("the secret has %d bytes and needs at least %d; make one with: openssl rand -base64 %d",
			len(secret), MinSecretBytes, newSecretBytes)
	}
	return secret, nil
}

// ReadSecretFile reads the secret for HS256 from a file of at least MinSecretBytes, without the white space around it. A
// missing file is an error that is os.ErrNotExist.
func ReadSecretFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read secret file: %w", err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxSecretFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read secret file: %w", err)
	}
	if len(content) > maxSecretFileBytes {
		return nil, fmt.Errorf("read secret file %s: longer than %d bytes", path, maxSecretFileBytes)
	}
	secret, err := checkSecret(content)
	if err != nil {
		return nil, fmt.Errorf("read secret file %s: %w", path, err)
	}
	return secret, nil
}

// CreateSecretFile makes a random secret, readable by the owner alone, and returns what ReadSecretFile would. The file
// must not exist (the error is os.ErrExist) and its folder must. When it returns the file is on stable storage, and
// it appears under its name only when complete: after a crash there is a whole secret or none.
func CreateSecretFile(path string) ([]byte, error) {
	var random [newSecretBytes]byte
	rand.Read(random[:]) // never fails: crypto/rand ends the process instead
	secret := base64.StdEncoding.AppendEncode(nil, random[:])

	// A name of our own: of two processes that start at once one loses, and neither returns the other's secret.
	temporary, err := writeSynced(filepath.Dir(path), append(bytes.Clone(secret), '\n'))
	if err != nil {
		return nil, fmt.Errorf("create secret file: %w", err)
	}
	// A rename would replace a secret that exists; a link does not.
	err = os.Link(temporary, path)
	if removeErr := os.Remove(temporary); err == nil {
		err = removeErr
	}
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err != nil {
		return nil, fmt.Errorf("create secret file: %w", err)
	}
	return secret, nil
}

// writeSynced writes a new file, for the owner alone, and waits until it is on stable storage.
func writeSynced(folder string, content []byte) (path string, err error) {
	f, err := os.CreateTemp(folder, ".secret-*") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// syncFolder makes the names in a folder durable.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if closeErr := d.Close(); err == nil {
		err = closeErr
	}
	return err
}
