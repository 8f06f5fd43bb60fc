package main

import (
	"bytes"
	"os"
	"strconv"
	"sync/atomic"
)

// footprintLeast is from how many connections on their share of the memory is told: with fewer it says more about what the first of
// them bring than about the next.
const footprintLeast = 100

// footprint tells what a connection costs this process: what is resident beyond what was when the server began to serve. It is what
// an operator sizes a machine by, and a goal of the project.
type footprint struct {
	empty atomic.Int64 // resident bytes, as the server began to serve; 0: it has not yet, or this system does not tell
}

func (f *footprint) begin() { f.empty.Store(ownResidentBytes()) }

// perConnection is 0 where it cannot be told.
func (f *footprint) perConnection(connections int) float64 {
	empty := f.empty.Load()
	if connections < footprintLeast || empty == 0 {
		return 0
	}
	return float64(max(0, ownResidentBytes()-empty)) / float64(connections)
}

func (f *footprint) metrics(emit func(name, help string, counter bool, value float64, labels ...string), connections int) {
	emit("millrace_process_bytes_per_connection",
		"Resident memory beyond what the process had before the first client, divided by the open connections. 0 with less than 100.",
		false, f.perConnection(connections))
}

// ownResidentBytes is VmRSS of this process, or 0 where there is no /proc.
func ownResidentBytes() int64 {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := bytes.Fields(statm)
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
