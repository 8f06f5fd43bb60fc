package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

const (
	// gcHeadroomBytes bounds what the collector lets the heap grow over what is alive. Go's default is as
	// much again as is alive, which is right for small heaps; with a million connections it would double the memory that
	// each of them costs.
	gcHeadroomBytes = 64 << 20
	// gcCheapBytes is what may be marked in a second without thinking of the cost: 1 % of a core, which marks 2 GB/s.
	gcCheapBytes = 20 << 20
	// gcLeastPercent is the headroom of a server that allocates next to nothing. From there it goes in steps of as much, since each
	// change stops the world.
	gcLeastPercent = 10
	// gcInterval is how often the headroom of a server that does not collect is looked at.
	gcInterval = 10 * time.Second
)

// gcPercent is the GOGC value for a heap of live bytes: so that gcCheapBytes are marked in a second, at least gcLeastPercent, and at most
// min(100 %, gcHeadroomBytes); never 0, which would collect without pause. (Between two collections percent · live / 100 bytes are allocated, and then live bytes
// marked: live cancels out.) So a server to which many connect does not spread their objects among garbage, which
// would keep its pages for as long as they live, and a busy one has the headroom that it needs.
func gcPercent(live, allocatedPerSecond uint64) int {
	live = max(live, 1)
	most := uint64(100)
	if live > gcHeadroomBytes {
		most = max(1, gcHeadroomBytes*100/live)
	}
	wanted := allocatedPerSecond / (gcCheapBytes * gcLeastPercent / 100) * gcLeastPercent
	return int(min(most, max(gcLeastPercent, wanted)))
}

// tuneGC keeps GOGC at gcPercent of what each collection found alive, and of what is allocated, until stop is called. A GOGC in the
// environment is the user's choice and stays.
func tuneGC() (stop func()) {
	if os.Getenv("GOGC") != "" {
		return func() {}
	}
	t := &gcTuner{last: time.Now(), allocated: readHeap().allocated}
	afterEachGC(func() (again bool) { return t.tune(time.Now()) })
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(gcInterval)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				t.tune(time.Now())
			}
		}
	}()
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.stopped = true
		close(done)
	}
}

type gcTuner struct {
	mu        sync.Mutex
	stopped   bool
	last      time.Time
	allocated uint64 // until then
	percent   int    // in force; 0: not known
}

// tune sets GOGC by what was allocated since the last call. It is false when the tuner was stopped.
func (t *gcTuner) tune(now time.Time) (again bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return false
	}
	heap := readHeap()
	elapsed := max(now.Sub(t.last), time.Millisecond)
	rate := float64(heap.allocated-t.allocated) / elapsed.Seconds()
	t.last, t.allocated = now, heap.allocated
	if percent := gcPercent(heap.live, uint64(rate)); percent != t.percent { // setting it stops the world: only when it changes
		t.percent = percent
		debug.SetGCPercent(percent)
	}
	return true
}

// heapSize is, in bytes, what the last collection marked, and what was allocated since the process began.
type heapSize struct{ live, allocated uint64 }

func readHeap() heapSize {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(samples)
	return heapSize{samples[0].Value.Uint64(), samples[1].Value.Uint64()}
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
