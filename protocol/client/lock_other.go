//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd || windows)

package client

import (
	"errors"
	"io"
)

// lockFile refuses: without a lock that ends with the process, two clients could share a state and give one
// number to two messages.
func lockFile(string) (io.Closer, error) {
	return nil, errors.New("state files are not supported on this system")
}

func syncDirectory(string) error { return nil }
