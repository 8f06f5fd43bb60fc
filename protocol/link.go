package protocol

// This file holds what edges, router and owners say to each other. It is not part of the client
// protocol. In one process these values cross by function call; between processes they travel in batches.

// Session names one authenticated connection, exactly: Conn is never reused while the edge's
// boot epoch lives.
type Session struct {
	Edge       uint32
	Generation uint32 // of the drain: raised whenever the session turns from live to draining, see Push
	Conn       uint64 // the edge's own handle: loop, slot and serial number
}

// Route is one session of a user as the router knows it.
type Route struct {
	Device  string
	Session Session
	Live    bool // false: draining; the owner writes to the mailbox and sends a notice
}

// Message is what an addressee gets, and what a mailbox row carries. Immutable once made.
type Message struct {
	ID           MessageID
	Conversation uint64 // ConversationHash of the conversation: routes an outcome to its owner
	Position     uint64
	Sender       string
	Receiver     string
	Content      []byte
}

// Submission is one send on its way from an edge to the publisher.
type Submission struct {
	From     Session
	User     []byte // slices are valid during the call only
	Device   []byte
	Epoch    uint64
	Seq      uint64
	Resend   bool // the send may have been made before: no position is answered, and no final refusal for a full mailbox
	Receiver []byte
	Content  []byte
}

// Refusal is why something was not taken. The zero value means that it was taken.
type Refusal struct {
	Code         Code
	RetryAfterMs uint32 // not 0 exactly when trying again can help
}

// Answer is what became of one Submission: durable (Code OK), or refused.
type Answer struct {
	To       Session
	Seq      uint64
	ID       MessageID
	Position uint64 // 0: not known here, or a resend
	Millis   int64  // the server's clock, ms since 1970
	Refusal
}

// Push is one message on its way to one session. The edge refuses it unless Generation is the session's
// current one, the session is live and its budgets allow it.
type Push struct {
	To      Session
	Device  string // of the session; the outcome of a push to a connection that is gone names it
	Message *Message
}

// ReceiptPush is one receipt on its way to one session of the sender. The edge sends Seq only
// if the session's stream (Device, Epoch) is the one that sent.
type ReceiptPush struct {
	To       Session
	ID       MessageID
	Position uint64
	Seq      uint64
	Device   string
	Epoch    uint64
	Receiver string
	Millis   int64
}

// OutcomeKind is what became of one push.
type OutcomeKind uint8

const (
	Acknowledged OutcomeKind = iota // the device has it
	Refused                         // the edge did not write it: wrong generation, draining, over a budget, gone
	Lost                            // written, but the connection ended before it was acknowledged
)

// Outcome is what became of one push, live or drained, on its way back to the owner.
type Outcome struct {
	Kind         OutcomeKind
	UserMailbox  bool // the push came from the user's mailbox, not the device's
	Conversation uint64
	Position     uint64
	ID           MessageID
	User         []byte // slices are valid during the call only
	Device       []byte
}

// Fence asks an Acknowledger to say when everything settled before it is durable. An edge numbers the fences of each of
// its event loops 1, 2, 3 …
type Fence struct {
	Edge   uint32
	Loop   uint8
	Number uint64
}

// Registration asks for a device to be registered, a block of numbers for its stream, and the route to be bound as draining.
type Registration struct {
	Session Session
	User    string
	Device  string
	Epoch   uint64 // the stream; made by the edge when the client brought none
	// Login is larger for a connection that was accepted later. The later one wins, also when the bytes of a
	// connection that its client has left already are read after those of the next one.
	Login uint64
}

// Registered answers a Registration. Refusal is zero when the device row and the block are durable and the route is bound.
type Registered struct {
	To    Session
	Block uint32 // the connection's block; its first number is FirstSeq(Block)
	Heir  bool   // drains of this device also read the user mailbox
	Refusal
}

// MailboxCursor is a place in a drain: user mailbox first (for an heir), then the device's, each by
// (position, id). The zero value is before the first row.
type MailboxCursor struct {
	DeviceMailbox bool // false: still in the user mailbox
	Position      uint64
	ID            MessageID
}

// PageRequest asks for the rows of a mailbox that follow a cursor.
type PageRequest struct {
	Session Session
	User    string
	Device  string
	Heir    bool
	After   MailboxCursor
	Limit   int
}

// MailboxRow is one row of a page.
type MailboxRow struct {
	Message     *Message
	UserMailbox bool
}

// Page answers a PageRequest. Rows are in cursor order. A non-zero Refusal means that nothing was read.
type Page struct {
	To    Session
	After MailboxCursor // of the request
	Rows  []MailboxRow
	Next  MailboxCursor // where the following page starts; meaningless when End
	End   bool          // no row follows
	Refusal
}

// ReceiptCursor is a place among the receipts of a user's messages, which are read in the order in which they changed.
// {Millis: ms} is before everything that changed at ms.
type ReceiptCursor struct {
	Millis       int64
	Conversation string
	Addressee    string
}

// ReceiptsRequest asks for the receipts of a user's messages that follow a cursor.
type ReceiptsRequest struct {
	Session Session
	User    string
	After   ReceiptCursor
	Limit   int
}

// ReceiptsPage answers a ReceiptsRequest. Receipts are in cursor order. A non-zero Refusal means that nothing was read.
type ReceiptsPage struct {
	To       Session
	Receipts []ReceiptPush
	Next     ReceiptCursor // where the following page starts
	End      bool          // nothing followed
	Refusal
}

// ConversationHash is a 64-bit FNV-1a over both user ids in canonical order. Equal conversations have
// equal hashes; unequal ones may too, so it chooses a partition and never proves identity.
func ConversationHash[A, B string | []byte](a A, b B) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	mix := func(h uint64, c byte) uint64 { return (h ^ uint64(c)) * prime }
	if lessBytes(b, a) {
		for i := 0; i < len(b); i++ {
			h = mix(h, b[i])
		}
		h = mix(h, 0)
		for i := 0; i < len(a); i++ {
			h = mix(h, a[i])
		}
		return h
	}
	for i := 0; i < len(a); i++ {
		h = mix(h, a[i])
	}
	h = mix(h, 0)
	for i := 0; i < len(b); i++ {
		h = mix(h, b[i])
	}
	return h
}

func lessBytes[A, B string | []byte](a A, b B) bool {
	for i := 0; i < len(a) && i < len(b); i++ {
		if a[i] != b[i] {
			return a[i] < b[i]
		}
	}
	return len(a) < len(b)
}
