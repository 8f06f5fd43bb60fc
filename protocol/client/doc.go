// Package client is the Go client of a millrace server: it keeps one installation of a user's client connected, sends
// what the application queues, and hands over what others sent, each message once.
//
//	c, err := client.Dial(ctx, client.Options{
//		URL:       "wss://chat.example.com/ws",
//		Token:     tokens,             // called when a token is needed
//		Device:    "phone",            // one client per user and device
//		StatePath: "/data/chat.state", // outbox and shown ids
//	})
//	sent, err := c.Send(ctx, "bob", "hello") // returns when it is durable at the server
//	m, err := c.Receive(ctx)                 // the next message
//	err = c.Acknowledge(ctx, m)              // it was shown or stored: do not deliver it again
//
// # What it guarantees
//
// With a StatePath, whatever is killed or cut off, and whenever:
//
//   - A message that Queue or Send took is sent until it is answered, by this process or the next one that opens the
//     state. It is shown to its receiver once, however often it had to be sent.
//   - The messages of this client to one receiver arrive in the order of the calls. A refusal that can be tried again
//     (the server is behind, a rate limit) holds the later ones back rather than letting them overtake.
//   - A send ends once: durable (Sent), refused for good (*RefusedError), or unanswered for 30 days (ErrUnanswered).
//     What will not be delivered is told when it is stored, and stays so; after a power cut, a durable one may be told again.
//   - A message is returned by Receive until it is acknowledged, and never again after Acknowledge has returned. After a power
//     cut, this holds for what was acknowledged more than AcknowledgeDelay before.
//
// Without a StatePath the same holds while the process lives; the last MaxShownInMemory ids are remembered.
//
// # What the application must do
//
//   - Give every message from Receive to Acknowledge, after it was shown or stored. The server keeps what is not
//     acknowledged, and stops pushing at protocol.MaxUnacknowledged of them. Between showing a message and Acknowledge a
//     crash repeats it; an application that stores messages by their ID turns that into nothing.
//   - Sort a conversation with CompareMessages or ComparePositions, not by arrival: after a reconnect, older messages
//     may follow newer ones.
//   - Show text with care. It is what the sender wrote: control characters, bidirectional overrides and all.
//   - Keep one client per user and device. A second one throws the first out (ErrReplaced), and the first does not come back.
//     The state file is locked, so that two processes cannot share it; a copy of it may be used instead of the original, as after a restore.
//
// # Connections
//
// A client reconnects by itself: after a wait between 0 and a ceiling that doubles up to MaxBackoff, plus what the server asked
// for (go_away, retry_after_ms, Retry-After). Close codes 4000 to 4499 mean "come back", 4500 to 4999 "do not". After the latter, an
// HTTP answer that would be the same again (400, 403, 404, 405, 426, 431), a refused new token or a failing disk, the client
// is final: Err says why, OnEvent gets a Disconnected that is Final, and every call returns the error, except Acknowledge, which works
// until Close.
// A server that says nothing for two heartbeats, or that does not answer a send within AnswerTimeout, is left for a new connection.
//
// # Events
//
// Options.OnEvent hears of connections, of the end of every send (also of one from an earlier process), and of
// receipts. A receipt (Delivered) names one message and covers all earlier ones to the same receiver; later receipts replace earlier
// ones that the application has not seen yet.
//
// # Inside
//
// outbox.go holds the rules of numbers and resends and inbox.go those of receiving, as pure state machines; state.go is the
// file; conn.go is one connection; run.go is the one goroutine that joins them: store first, then answer, then write.
package client
