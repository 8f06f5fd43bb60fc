package backend

import (
	"fmt"
	"testing"

	"millrace/protocol"
)

// TestReceiptsPassWhatExpired: a message that nobody acknowledged within a year leaves a hole that the owner remembers. When
// the store has let it expire, later receipts pass it, without a restart; as long as it is there, they do not.
func TestReceiptsPassWhatExpired(t *testing.T) {
	w := newTwin()
	w.devices["bob"] = []Device{{Name: "phone", Heir: true}}
	o, err := NewOwner(OwnerConfig{Reader: w, Locator: w})
	if err != nil {
		t.Fatal(err)
	}
	const day = 24 * 60 * 60 * 1000
	now := int64(1_700_000_000_000)
	key := ReceiptKey{Sender: "alice", Conversation: ConversationKey("alice", "bob"), Addressee: "bob"}
	n := 0
	send := func() *Record {
		n++
		r := &Record{Message: protocol.Message{Position: uint64(now)<<protocol.PositionShift + uint64(n), Sender: "alice", Receiver: "bob",
			Content: []byte("x")}, Device: "phone", Epoch: 1, Seq: uint64(n)}
		copy(r.ID[:], fmt.Sprint("message ", n))
		if taken, err := o.Take(now, []*Record{r}); taken != 1 || err != nil {
			t.Fatal(taken, err)
		}
		return r
	}
	commit := func() {
		if c := o.Flush(now); c != nil {
			w.apply(c)
			o.Committed()
		}
		o.ClearActions()
	}
	acknowledged := func() uint64 { // sends a message, acknowledges it, and tells how far the receipt is
		r := send()
		o.Settle([]Settlement{{Kind: protocol.Acknowledged, Position: r.Position, ID: r.ID, User: "bob", Device: "phone"}})
		commit()
		return w.receipts[key].Delivered.Position
	}
	w.bind("bob", "phone", true)
	first := acknowledged()
	if first == 0 {
		t.Fatal("the first message has no receipt")
	}
	w.unbind("bob", "phone")
	left := [2]*Record{send(), send()} // to the mailbox, for good
	commit()
	w.bind("bob", "phone", true)
	for _, days := range []int64{1, 300, 400, 10} {
		now += days * day
		if at := acknowledged(); at != first {
			t.Fatalf("after %d more days the receipt is at %d and passes the hole at %d", days, at, left[0].Position)
		}
	}
	delete(w.outstanding, OutstandingKey{key.Conversation, "bob", left[0].Position})
	if at := acknowledged(); at != first {
		t.Fatalf("the receipt is at %d and passes the second hole at %d", at, left[1].Position)
	}
	delete(w.outstanding, OutstandingKey{key.Conversation, "bob", left[1].Position})
	w.fail("outstanding", true)
	if at := acknowledged(); at != first { // that acknowledgement changes nothing, and is counted
		t.Fatalf("the receipt is at %d though the rows could not be read", at)
	}
	w.fail("outstanding", false)
	if at := acknowledged(); at <= left[1].Position {
		t.Fatalf("both holes have expired, and the receipt is still at %d", at)
	}
}
