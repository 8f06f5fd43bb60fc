package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
)

// gcHeadroomBytes bounds what the collector lets the heap grow over what is alive. Go's default is as
// much again as is alive, which is right for small heaps; with a million connections it would double the memory that
// each of them costs.
const gcHeadroomBytes = 64 << 20

// gcPercent is the GOGC value that gives a heap of live bytes a headroom of min(100 %, 64 MiB), at
// least 1 %: 0 would collect without pause.
func gcPercent(live uint64) int {
	if live <= gcHeadroomBytes {
		return 100
	}
	return int(max(1, gcHeadroomBytes*100/live))
}

// tuneGC keeps GOGC at gcPercent of what each collection found alive until stop is called. A GOGC in the
// environment is the user's choice and stays.
func tuneGC() (stop func()) {
	if os.Getenv("GOGC") != "" {
		return func() {}
	}
	var stopped atomic.Bool
	current := -1
	afterEachGC(func() (again bool) {
		if stopped.Load() {
			return false
		}
		if percent := gcPercent(liveHeap()); percent != current { // setting it stops the world: only when it changes
			current = percent
			debug.SetGCPercent(percent)
		}
		return true
	})
	return func() { stopped.Store(true) }
}

// liveHeap is what the last collection marked, in bytes.
func liveHeap() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// cycleSentinel is unreachable from the moment it is made, so that each collection queues its finalizer.
type cycleSentinel struct {
	// A pointer keeps it out of the allocator's batches of tiny objects, which die together.
	_ *byte
}

// afterEachGC calls f soon after every collection until it returns false, one call at a time, on the runtime's
// finalizer goroutine: f must be short. It costs nothing between collections.
func afterEachGC(f func() (again bool)) {
	runtime.SetFinalizer(&cycleSentinel{}, func(*cycleSentinel) {
		if f() {
			afterEachGC(f)
		}
	})
}
