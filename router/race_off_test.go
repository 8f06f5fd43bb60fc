//go:build !race

package router

// churnUsers is the population that comes and goes in TestChurnKeepsMemory.
const churnUsers = 100_000
