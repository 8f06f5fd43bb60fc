package backend

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"millrace/protocol"
)

// identitySecret is the bytes 0, 1, 2 …
func identitySecret() []byte {
	secret := make([]byte, SecretBytes)
	for i := range secret {
		secret[i] = byte(i)
	}
	return secret
}

func newIdentity(t testing.TB, secret []byte) *Identity {
	t.Helper()
	identity, err := NewIdentity(secret)
	if err != nil {
		t.Fatal(err)
	}
	return identity
}

// TestIdentityGolden: the ids of data that exists must never change. The values were made by another program
// from the formula in the comment of Identity (Python's hmac and the cryptography package).
func TestIdentityGolden(t *testing.T) {
	identity := newIdentity(t, identitySecret())
	long := strings.Repeat("u", protocol.MaxUserBytes)
	alice := Stream{"alice", "phone", 0x0f1e2d3c4b5a6978}
	for _, c := range []struct {
		stream       Stream
		conversation string
		seq          uint64
		want         string
	}{
		{alice, ConversationKey("alice", "bob"), 1, "2CDP75V67CNYH4M851JA48598H"},
		{alice, ConversationKey("bob", "alice"), 2, "4FTGWKEZ7NN0VT1BESW5B9GZA4"},
		{alice, ConversationKey("alice", "bob"), protocol.MaxSeq, "4RC025FDDHFCM7PGYSVB4GQ19W"},
		{Stream{"bob", protocol.DefaultDevice, 0}, ConversationKey("alice", "bob"), 1<<20 | 1, "6YX8VADCPAANDM4SNV57VP5D6W"},
		{Stream{long, strings.Repeat("d", protocol.MaxDeviceBytes), 1<<64 - 1}, ConversationKey(long, strings.Repeat("v", protocol.MaxUserBytes)),
			1<<20 | 1, "2EE8KV3S553M09JZH3EGCC5EZY"},
	} {
		if got := identity.MessageID(c.stream, c.conversation, c.seq).String(); got != c.want {
			t.Errorf("%v %d: id %s, want %s", c.stream, c.seq, got, c.want)
		}
	}
}

func TestIdentitySecret(t *testing.T) {
	for _, n := range []int{0, 16, SecretBytes - 1, SecretBytes + 1} {
		if _, err := NewIdentity(make([]byte, n)); err == nil {
			t.Errorf("a secret of %d bytes is taken", n)
		}
	}
	stream := Stream{"alice", "phone", 1}
	a := newIdentity(t, identitySecret()).MessageID(stream, "c", 1)
	if b := newIdentity(t, make([]byte, SecretBytes)).MessageID(stream, "c", 1); a == b {
		t.Error("two secrets make one id")
	}
}

// TestIdentityDistinct: P3 rests on one id for every resend, P2 on no id for two sends.
func TestIdentityDistinct(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	identity, other := newIdentity(t, identitySecret()), newIdentity(t, identitySecret())
	seen := make(map[protocol.MessageID]string)
	// Names that run into each other when they are only joined.
	names := []string{"a", "b", "ab", "ba", "aa", "a.b", "1", "11", strings.Repeat("a", 63), strings.Repeat("a", 64)}
	name := func() string { return names[rng.IntN(len(names))] }
	for range 30_000 {
		stream := Stream{name(), name(), rng.Uint64N(3) << (8 * rng.Uint64N(8))}
		conversation := ConversationKey(stream.User, name())
		seq := protocol.FirstSeq(rng.Uint32N(4)) + rng.Uint64N(70)
		what := fmt.Sprintf("%+v %q %d", stream, conversation, seq)
		id := identity.MessageID(stream, conversation, seq)
		if again := other.MessageID(stream, conversation, seq); again != id {
			t.Fatalf("%s: the resend has id %s, the first had %s", what, again, id)
		}
		if was, ok := seen[id]; ok && was != what {
			t.Fatalf("%s and %s have the id %s", was, what, id)
		}
		seen[id] = what
	}
	if len(seen) < 20_000 {
		t.Fatalf("only %d different sends were tried", len(seen))
	}
}

// TestIdentityHidesNumbers: neighbouring ids of one stream have no more in common than random ones.
func TestIdentityHidesNumbers(t *testing.T) {
	identity := newIdentity(t, identitySecret())
	stream := Stream{"alice", "phone", 1}
	equal, last := 0, identity.MessageID(stream, "c", 1)
	const ids = 2000
	for seq := uint64(2); seq <= ids; seq++ {
		id := identity.MessageID(stream, "c", seq)
		for i := range id {
			if id[i] == last[i] {
				equal++
			}
		}
		last = id
	}
	// 16 bytes, each equal by chance one time in 256: 125 of 2000 pairs, with a deviation of 11.
	if equal > 250 {
		t.Errorf("%d equal bytes in %d pairs of neighbours", equal, ids)
	}
}

func TestIdentityConcurrent(t *testing.T) {
	const workers, sends = 8, 500
	identity := newIdentity(t, identitySecret())
	id := func(worker, n int) protocol.MessageID {
		user := strings.Repeat("u", 1+worker)
		return identity.MessageID(Stream{user, "phone", uint64(worker)}, ConversationKey(user, "bob"), uint64(n+1))
	}
	var want [workers][sends]protocol.MessageID
	for w := range workers {
		for n := range sends {
			want[w][n] = id(w, n)
		}
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for n := range sends {
				if got := id(w, n); got != want[w][n] {
					t.Errorf("worker %d, send %d: id %s, alone it was %s", w, n, got, want[w][n])
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestConversationKey(t *testing.T) {
	if a, b := ConversationKey("alice", "bob"), ConversationKey("bob", "alice"); a != b || a != "alice\x00bob" {
		t.Errorf("%q and %q", a, b)
	}
	if ConversationKey("a", "bc") == ConversationKey("ab", "c") {
		t.Error("two conversations have one key")
	}
	if got := ConversationKey("a", "a"); got != "a\x00a" {
		t.Errorf("with oneself: %q", got)
	}
}

// BenchmarkMessageID is what an id costs a publisher.
func BenchmarkMessageID(b *testing.B) {
	identity := newIdentity(b, identitySecret())
	stream, key := Stream{"alice", "phone", 1}, ConversationKey("alice", "bob")
	b.ReportAllocs()
	for n := range b.N {
		identity.MessageID(stream, key, uint64(n))
	}
}
