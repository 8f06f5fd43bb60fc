// Package checker judges the history of a chat run: every answered message is shown exactly once on each right
// device, in one order by position everywhere that never contradicts the order of a sender, across reconnects, resends and
// killed servers.
//
// # Use
//
// A run reports what its clients do and see, as it happens, from any goroutine; when everything has drained
// ([Checker.Outstanding] is 0, or time is up), [Checker.Verdict] says what was wrong:
//
//	c := checker.New(checker.Config{})
//	alice := c.Client("alice", "phone") // after the device's first connected
//	bob := c.Client("bob", "laptop")
//	stream := c.Stream(alice, epoch)
//
//	c.Sent(stream, seq, "bob")                    // before it is written, and again for each resend
//	write(checker.Content(stream, seq, 120))
//	c.Answered(stream, seq, id, position)         // on message_received
//	c.Refused(stream, seq, "rate_limited", false) // on an error
//	c.Shown(bob, id, position, "alice", content)  // when bob's application shows it: after the client's own filter
//	c.Acknowledged(bob, id)                       // before the acknowledgement is written
//	c.Receipt(alice, id, position)                // on the sender's message_delivered
//
//	if v := c.Verdict(); !v.OK() { fail(v.String()) }
//
// "Before it is written" matters: the other side may see the effect at once, on another goroutine.
//
// The text of a message names its stream and number ([Content]), so a message that was shown is tied to its
// send even when the answer never came. Users must be fresh in each run: what an earlier run left in a
// mailbox would be judged by this one.
//
// # What is checked
//
//   - Lost: an answered message that an addressee has not shown. Addressees are the receiver's devices known to
//     [Checker.Client] when the message was first sent; when there were none, one of those that came later.
//   - Doubled: shown twice on one device. A resend that became a second message is found here too, since its text is the same.
//   - Misdelivered: shown, or a receipt for it, on a device of somebody else.
//   - Forged: shown or answered, but never sent; or a text, sender or receipt that no client made.
//   - ChangedID: one message under two ids: a resend was answered with another, or shown under another than answered. SharedID: two
//     messages under one.
//   - ChangedPosition: one message at two positions. SharedPosition: two of one conversation at one.
//   - Disordered: positions within a conversation that contradict the numbers of a stream.
//   - Contradicted: refused for good, and yet answered or shown.
//   - ReceiptEarly: a receipt that names or covers a message which no device of the receiver had acknowledged
//     (had shown, without [Config.Acknowledgements]). ReceiptMissing, with [Config.Receipts]: an acknowledged message of
//     which its sender was never told.
//   - Misused: the run itself reported what cannot be. Unjudged: more messages than [Config.MaxMessages].
//
// A message that was sent and neither answered nor refused for good is open: it may be shown or not, at
// most once, and takes its place in the order if it is.
//
// # What is not checked
//
// The order in which messages arrive at a device (clients sort by position); order between conversations, and between the streams
// of a user; the real-time order of two senders; that an open message reaches all devices or none; times; whether
// a refusal was deserved; content other than that of [Content].
//
// # Memory
//
// 48 B a message and about 14 B in two indexes, 8 B more while a verdict is made: ten million messages in
// 0.7 GB. Besides, some 100 B for each user, device and stream, and 40 B for each pair with a receipt.
package checker
