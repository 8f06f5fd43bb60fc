//go:build !race

package checker

// sizeMessages is the run of TestBytesPerMessage.
const sizeMessages = 1_000_000
