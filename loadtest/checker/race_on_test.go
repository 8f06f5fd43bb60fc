//go:build race

package checker

// sizeMessages is small here: the race detector makes a report cost tenfold, and that test has one goroutine.
const sizeMessages = 100_000
