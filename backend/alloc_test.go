//go:build !race

package backend

// The race detector allocates, and its sync.Pool forgets at random.

import "testing"

func TestIdentityNoAllocations(t *testing.T) {
	identity := newIdentity(t, identitySecret())
	stream, key := Stream{"alice", "phone", 1}, ConversationKey("alice", "bob")
	seq := uint64(0)
	if n := testing.AllocsPerRun(2000, func() {
		seq++
		identity.MessageID(stream, key, seq)
	}); n != 0 {
		t.Errorf("%v allocations an id", n)
	}
}
