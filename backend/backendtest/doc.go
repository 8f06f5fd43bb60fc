// Package backendtest holds the promises of backend.Queue and backend.Store as one suite that every implementation
// must pass (Run), and Memory, a twin of both that keeps everything in maps: the shortest statement of what the
// interfaces mean, and a store for tests that need no disk.
package backendtest

import (
	"testing"
	"time"

	"millrace/backend"
)

// Instance is one opened Queue and Store.
type Instance interface {
	backend.Queue
	backend.Store
	// Start begins the work; it is called once, before the first Append, Commit or Register.
	Start(backend.Hooks)
	// Age lets d pass as if the instance had run that long, and returns when what has become too old is gone (see
	// backend.Store). The clock of Options.Now has been moved by d just before. It is called once with 0, right after Start,
	// by a test that is going to let time pass.
	Age(d time.Duration) error
	// Close makes durable and answers what is pending. No call is under way and none follows.
	Close() error
}

// Options are what the suite sets. An implementation must honour those that are not zero.
type Options struct {
	Shards      int              // 0: whatever is usual
	Now         func() time.Time // nil: time.Now
	MailboxRows int              // when a mailbox is full; 0: protocol.MaxMailboxRows
	MaxUnread   int              // records that a shard's Read may be behind; 0: the usual
	Buffered    int              // durable records of a shard kept in memory; 0: the usual. May be ignored
}

// Storage opens the same storage again and again: empty the first time, and after that, with whatever
// options, what the instance before it had made durable. The suite closes an instance before it opens the next.
type Storage func(t *testing.T, o Options) Instance
