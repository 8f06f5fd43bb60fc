package backend

import (
	"fmt"
	"testing"

	"millrace/protocol"
)

// TestWindowsOfAConversation: clients that make a stream for every start leave no window each in memory, and what the store
// knows of them is enough: a resend in an old stream is a duplicate still.
func TestWindowsOfAConversation(t *testing.T) {
	w := newTwin()
	o, err := NewOwner(OwnerConfig{Reader: w, Locator: w})
	if err != nil {
		t.Fatal(err)
	}
	position := uint64(0)
	take := func(epoch uint64) {
		position += 10
		r := &Record{Message: protocol.Message{Position: position, Sender: "alice", Receiver: "bob", Content: []byte("x")},
			Device: "phone", Epoch: epoch, Seq: 1}
		copy(r.ID[:], fmt.Sprint(epoch))
		if n, err := o.Take(0, []*Record{r}); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	commit := func() {
		if c := o.Flush(0); c != nil {
			w.apply(c)
			o.Committed()
		}
	}
	const epochs = 500
	most := 0
	for epoch := range uint64(epochs) {
		take(epoch + 1) // to a mailbox: finished by the commit
		if epoch%3 == 0 {
			commit()
		}
		most = max(most, len(o.convs[ConversationKey("alice", "bob")].windows))
	}
	commit()
	if most > maxWindowsKept+3 {
		t.Errorf("%d windows in memory", most)
	}
	before := *o.Stats()
	for epoch := range uint64(epochs) {
		take(epoch + 1)
		commit()
	}
	if after := o.Stats(); after.Taken != before.Taken || after.Duplicates != before.Duplicates+epochs {
		t.Errorf("of %d resends %d were taken", epochs, after.Taken-before.Taken)
	}
}
