package main

import (
	"fmt"
	"math"
	"syscall"
)

// reservedDescriptors are kept for what is not a client: 384 for the database, 33 for the admin server, those of reservedLoops event
// loops, 15 for standard streams, locks, the runtime and what a scrape reads. Running out of descriptors would stop the event loops
// (an accept that fails with EMFILE ends the engine). More loops get theirs besides.
const (
	reservedDescriptors = 512
	reservedLoops       = 16
	loopDescriptors     = 4 // epoll, eventfd, listener, and a connection over the cap, between accept and close
)

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

// connectionCap is how many client connections fit a descriptor limit, beside this many event loops.
func connectionCap(limit uint64, loops int) (int, error) {
	reserved := uint64(reservedDescriptors + loopDescriptors*max(0, loops-reservedLoops))
	if limit < reserved+minConnections {
		return 0, fmt.Errorf("this process may open only %d files, %d of which are kept for other uses: raise the limit (ulimit -n, LimitNOFILE=)",
			limit, reserved)
	}
	return int(min(limit-reserved, math.MaxInt32)), nil // the limit may be infinite
}
