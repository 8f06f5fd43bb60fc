package edge

import (
	"testing"

	"millrace/protocol"
)

func TestConnectSendReceiveAcknowledge(t *testing.T) {
	both(t, func(t *testing.T, sub string) {
		s, b := serve(t, nil)
		c := login(t, s, sub, "alice", "phone")
		session := b.live(t, "alice/phone")

		c.sendMessage(1, "hi")
		if f := c.want(protocol.KindReceived); f.Seq != 1 || f.ID != testID(1) || f.Position != 1<<11 || f.Timestamp != 1 {
			t.Fatalf("received %+v", f)
		}
		if got := b.submission(t, 0); got.user != "alice" || got.device != "phone" || got.receiver != "bob" || got.content != "hi" ||
			got.Epoch == 0 || got.Resend || got.From.Edge != 3 {
			t.Fatalf("submitted %+v", got)
		}

		s.Push([]protocol.Push{{To: session, Device: "phone", Message: testMessage(5, "alice", "hello")}})
		if f := c.want(protocol.KindIncoming); string(f.Content) != "hello" || f.ID != testID(5) || string(f.Sender) != "alice" {
			t.Fatalf("incoming %+v", f)
		}
		c.acknowledge(testID(5))
		if o := b.outcome(t, 0); o.Kind != protocol.Acknowledged || o.ID != testID(5) || o.user != "alice" || o.device != "phone" ||
			o.Conversation != 7 || o.Position != 5 {
			t.Fatalf("outcome %+v", o)
		}
	})
}
