package main

import (
	"fmt"
	"math"
	"syscall"
)

// reservedDescriptors are kept for what is not a client: database files, listeners, event loops, the admin
// server. Running out of descriptors would stop the event loops (an accept that fails with EMFILE ends the engine).
const reservedDescriptors = 512

// minConnections below which starting makes no sense: the limit is a mistake then.
const minConnections = 16

// descriptorLimit is how many files this process may have open. The Go runtime has raised the soft
// limit to the hard one before main runs; TestDescriptorLimitIsRaised keeps watch.
func descriptorLimit() (uint64, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("read descriptor limit: %w", err)
	}
	return limit.Cur, nil
}

// connectionCap is how many client connections fit a descriptor limit.
func connectionCap(limit uint64) (int, error) {
	if limit < reservedDescriptors+minConnections {
		return 0, fmt.Errorf("this process may open only %d files, %d of which are kept for other uses: raise the limit (ulimit -n, LimitNOFILE=)",
			limit, reservedDescriptors)
	}
	return int(min(limit-reservedDescriptors, math.MaxInt32)), nil // the limit may be infinite
}
