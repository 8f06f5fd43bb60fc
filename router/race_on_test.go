//go:build race

package router

// churnUsers is small here: the race detector makes a probe cost tenfold, and this test has one goroutine.
const churnUsers = 10_000
