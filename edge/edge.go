package edge

import "millrace/protocol"

// Publisher makes sends durable.
type Publisher interface {
	// Publish takes one send. It never blocks. A non-zero result refuses the send inside the call and
	// nothing else will be heard of it; otherwise exactly one protocol.Answer comes to
	// Server.Answer, from any goroutine, before or after Publish returns. Answers of one session come in the order
	// of its Publish calls; when a send already taken fails, all later ones of the same stream taken before the failure was answered fail
	// with it. The slices in s are copied before Publish returns.
	Publish(s *protocol.Submission) protocol.Refusal
}

// Acknowledger tells owners what became of pushes.
type Acknowledger interface {
	// Settle never blocks and never fails; the slices in batch are copied before it returns.
	Settle(batch []protocol.Outcome)
	// Fence returns at once and is answered by exactly one Server.Fenced, from any goroutine, when what became of every
	// outcome settled before is durable. A page that is asked for after that holds no row that was acknowledged before.
	Fence(f protocol.Fence)
}

// Mailbox reads what waits for a device. Both calls return at once and answer later, from any goroutine.
type Mailbox interface {
	// ReadPage is answered by exactly one Server.Page.
	ReadPage(r protocol.PageRequest)
	// ReadReceipts is answered by exactly one Server.ReceiptsPage.
	ReadReceipts(r protocol.ReceiptsRequest)
}

// Registrar registers devices and keeps their routes.
type Registrar interface {
	// Register returns at once and is answered by exactly one Server.Registered, from any goroutine, after the
	// device row and the block are durable and the route is bound as draining. The older session of the same
	// device, if any, is told by Server.Replace (on its own edge).
	Register(r protocol.Registration)
	// SetState replaces generation and state of a bound route if it still belongs to s.Conn; else it does
	// nothing. Does not block. User and device are copied if kept.
	SetState(user, device []byte, s protocol.Session, live bool)
	// Unregister removes the route if it still belongs to s.Conn. Does not block.
	Unregister(user, device []byte, s protocol.Session)
}
