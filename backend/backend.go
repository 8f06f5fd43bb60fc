package backend

import "millrace/protocol"

// Stream is one installation of a client: the unit within which sends are numbered.
type Stream struct {
	User   string
	Device string
	Epoch  uint64
}

// Record is one durable send: a message, the stream that sent it and its number there.
type Record struct {
	protocol.Message
	Device     string // with Sender and Epoch: the stream
	Epoch      uint64
	Seq        uint64
	AcceptedMs int64 // stamped when the record was handed to the queue

	// From and Resend belong to the submission that waits for an answer; they are not stored.
	From   protocol.Session
	Resend bool
}

// Stream is the stream that sent r.
func (r *Record) Stream() Stream { return Stream{r.Sender, r.Device, r.Epoch} }

// ConversationKey names the conversation of two users: canonical order, joined by a zero byte, which no
// user id contains.
func ConversationKey(a, b string) string {
	if b < a {
		a, b = b, a
	}
	return a + "\x00" + b
}

// Queue makes records durable and hands them to the owner of their partition. The partition of a record
// is Conversation % Shards.
type Queue interface {
	// Shards is the number of partitions that this process owns, fixed while it runs.
	Shards() int
	// Append takes one record and never blocks. A non-zero result refuses it inside the call. Otherwise the queue
	// owns r (it fills Position) and answers it exactly once through Hooks.Answer: after the record is on stable storage, or
	// with outcome_unknown, after which it fails all later records of that stream taken before.
	Append(r *Record) protocol.Refusal
	// Read appends durable records of a shard that follow those already read, in position order,
	// until len(dst) reaches max; fewer when no more are there. It may read the disk. After a restart it starts at the oldest unfinished
	// record. One goroutine per shard calls it.
	Read(shard int, dst []*Record, max int) ([]*Record, error)
}

// Hooks are how a Queue and a Store report. They are called from the queue's own goroutines, must not
// block, and must copy what they keep.
type Hooks struct {
	Answer func(batch []protocol.Answer)
	// Wake says that Read(shard) has something to return.
	Wake func(shard int)
	// MailboxFull says that a mailbox (device "" is the user's own) has reached its row limit (true) or
	// fallen under it again (false). Called for every full mailbox once at start.
	MailboxFull func(user, device string, full bool)
}

// Device is one registered device of a user.
type Device struct {
	Name string
	Heir bool // its drains also read the user mailbox
}

// Mark names one message of a conversation in a receipt.
type Mark struct {
	Position uint64
	ID       protocol.MessageID
	Device   string // with the sender: the stream that sent it
	Epoch    uint64
	Seq      uint64
}

// ReceiptKey names a receipt row: whose messages (Sender), and how far they reached Addressee.
type ReceiptKey struct {
	Sender       string // who is told
	Conversation string
	Addressee    string
}

// ReceiptRow is how far a sender's messages have reached an addressee. Rows are merged by the larger
// Delivered.Position, then the larger Top.Position: a late writer cannot put one back.
type ReceiptRow struct {
	ReceiptKey
	Delivered Mark  // the largest message such that it and all earlier ones were acknowledged by a device of the addressee
	Top       Mark  // the largest message that was acknowledged at all
	ChangedMs int64 // when Delivered changed; never decreasing within a partition
}

// OutstandingRow is a finished message that no device of the addressee has acknowledged yet. Receipts do not pass it.
type OutstandingRow struct {
	Conversation string
	Addressee    string
	Mark
}

// WindowKey names a duplicate window.
type WindowKey struct {
	Conversation string
	Stream
}

// WindowRow is one duplicate window as the store keeps it.
type WindowRow struct {
	WindowKey
	Window
}

// MailboxPut adds a row to a mailbox; Device "" is the user's own mailbox. Putting the same row again changes nothing.
type MailboxPut struct {
	User   string
	Device string
	// Record may be nil: then the queue's record at Position is meant.
	Record   *Record
	Position uint64
}

// MailboxKey names a mailbox row.
type MailboxKey struct {
	User     string
	Device   string
	Position uint64
	ID       protocol.MessageID
}

// OutstandingKey names an outstanding row.
type OutstandingKey struct {
	Conversation string
	Addressee    string
	Position     uint64
}

// Commit is what one shard wants on stable storage. A store that is not atomic applies the
// fields in the order in which they stand here; a crash between any two of them loses and repeats nothing.
type Commit struct {
	Shard        int
	Mailbox      []MailboxPut
	Outstanding  []OutstandingRow
	Receipts     []ReceiptRow
	Settled      []OutstandingKey // outstanding rows to delete
	Acknowledged []MailboxKey     // mailbox rows to delete; those that do not exist are passed over
	Windows      []WindowRow      // merged, see Window.Merge
	LowWater     uint64           // every record of this shard at a smaller position is finished
	// Urgent asks for a sync at once (mailbox rows: a notice waits for it); otherwise the store may wait up to 100 ms for company.
	Urgent bool
	// Done is called once, in Commit order for a shard, when all of it is on stable storage. It must not block.
	Done func()
}

// Reader is what the delivery core reads while it decides. Calls may read the disk. Each sees every earlier
// write whose Done was called; it may also see later ones.
type Reader interface {
	Devices(user string) ([]Device, error)
	Window(k WindowKey) (Window, error)       // the zero Window when there is none
	Receipt(k ReceiptKey) (ReceiptRow, error) // zero marks when there is none
	// FirstOutstanding is the first outstanding row at a position ≥ from.
	FirstOutstanding(conversation, addressee string, from uint64) (row OutstandingRow, ok bool, err error)
	// MailboxRow is one row; ok is false when it is not there.
	MailboxRow(k MailboxKey) (r *Record, ok bool, err error)
}

// Store keeps what outlives a delivery, though not for ever: mailbox and outstanding rows at least until a year after
// the time in their position, windows a year after their last use, and streams two years after their last login or use of a
// window; a stream's row is there as long as one of its windows. What is older may go at any time, by itself, and
// MailboxFull is told as after any deletion. Receipts and devices stay.
type Store interface {
	Reader
	// Commit never blocks and takes ownership of c. Commits of a shard become durable in order, and never without the earlier ones.
	Commit(c *Commit)
	// Register makes the device row durable (the first device of a user becomes heir) and draws a new block for the stream;
	// done is called once from any goroutine. A ninth device is refused with too_many_devices.
	Register(s Stream, done func(block uint32, heir bool, refusal protocol.Refusal))
	// MailboxPage returns at most limit rows of one mailbox that follow (position, id), ascending. It may read the disk.
	MailboxPage(user, device string, position uint64, id protocol.MessageID, limit int) ([]*Record, error)
	// ReceiptsSince calls yield for each receipt row of a sender with ChangedMs ≥ since until it returns false.
	// It may read the disk.
	ReceiptsSince(sender string, since int64, yield func(ReceiptRow) bool) error
}

// Locator says where a user's devices are connected.
type Locator interface {
	// Locate appends the user's sessions to dst. In one process it reads a table; it does not block.
	Locate(dst []protocol.Route, user string) []protocol.Route
}

// Pusher carries messages to sessions. Its methods do not block and keep the order of calls per session; what it cannot
// take it reports as protocol.Refused to the owner. Slices belong to the caller again after the call.
type Pusher interface {
	Push(batch []protocol.Push)
	// Notify turns live sessions back to draining: something was written to their mailbox.
	Notify(batch []protocol.Session)
	Receipts(batch []protocol.ReceiptPush)
}
