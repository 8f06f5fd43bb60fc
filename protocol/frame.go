package protocol

// Kind is the first byte of a binary frame and tells which message it is. Bit 6 is set in what a server sends.
// Bit 7 marks a kind that a receiver which does not know it skips; any other unknown kind is answered
// with unknown_action. 0 is no kind.
type Kind uint8

const (
	KindConnect     Kind = 0x01 // → token, device, epoch, receipts_after
	KindSend        Kind = 0x02 // → client_seq, timestamp, receiver, content
	KindAcknowledge Kind = 0x03 // → timestamp, ids
	KindRenewToken  Kind = 0x04 // → token

	KindConnected Kind = 0x41 // ← user, device, epoch, first client_seq, heartbeat, timestamp
	KindReceived  Kind = 0x42 // ← client_seq, id, position, timestamp
	KindIncoming  Kind = 0x43 // ← id, position, sender, receiver, content
	KindReceipt   Kind = 0x44 // ← receipts
	KindError     Kind = 0x45 // ← code, client_seq, resend_from, retry_after, text
	KindRenew     Kind = 0x46 // ← expires_in
	KindRenewed   Kind = 0x47 // ←
	KindGoAway    Kind = 0x48 // ← retry_after

	KindFromServer Kind = 0x40 // bit 6: sent by the server
	KindIgnorable  Kind = 0x80 // bit 7: skipped by who does not know it
)

// FromServer reports whether only a server sends this kind. A server that gets one, and a client that gets one
// of the others, treats it as an unknown kind.
func (k Kind) FromServer() bool { return k&KindFromServer != 0 }

// Frame is one protocol message, either direction and either encoding. Which fields mean something
// depends on Kind (the comment of each says where); the others are zero. A parser fills a Frame that
// the caller reuses: byte slices point into the parser's input or scratch space and are valid until the next parse into
// the same Frame; IDs and Receipts keep their capacity.
type Frame struct {
	Kind Kind

	Token     []byte    // Connect, RenewToken
	User      []byte    // Connected
	Device    []byte    // Connect (empty: "default"), Connected
	Epoch     uint64    // Connect, Connected. 0 in Connect: the server makes one
	Sender    []byte    // Incoming
	Receiver  []byte    // Send, Incoming
	Content   []byte    // Send, Incoming
	Text      []byte    // Error
	Seq       uint64    // Send, Received, Error (0: not about a send); Connected: the first number of this connection
	ID        MessageID // Received, Incoming
	Position  uint64    // Received (0: not known), Incoming
	Timestamp int64     // Send, Acknowledge (informative), Connected, Received; ms since 1970. Incoming: PositionMillis(Position)

	ReceiptsAfter    int64  // Connect; ms since 1970, 0 for all
	HeartbeatSeconds uint32 // Connected
	Code             Code   // Error
	ResendFrom       uint64 // Error: the number to send again first, 0 when the refusal holds nothing back
	RetryAfterMs     uint32 // Error (0: trying again does not help), GoAway
	ExpiresInMs      int64  // Renew

	IDs      []MessageID // Acknowledge, at least one
	Receipts []Receipt   // Receipt, at least one

	// Arena is the parser's scratch space for unescaped JSON strings; it belongs to the Frame and keeps its capacity.
	Arena []byte
}

// Reset clears f for reuse and keeps the capacity of its lists.
func (f *Frame) Reset() {
	*f = Frame{IDs: f.IDs[:0], Receipts: f.Receipts[:0], Arena: f.Arena[:0]}
}

// Receipt tells a sender that its message, and every earlier one of its messages in the same
// conversation, has reached a device of the receiver.
type Receipt struct {
	ID        MessageID
	Position  uint64
	Seq       uint64 // 0 unless this connection's stream sent the message
	Timestamp int64  // when the receipt changed, ms since 1970
	Receiver  []byte
}

// FrameError says why bytes are not a frame. Code is what the peer is told; Close is set when the connection cannot
// go on, which no parser of this package demands: a bad frame gets an error frame and the connection lives. FrameErrors are
// shared and must not be changed.
type FrameError struct {
	Code  Code
	Close CloseCode // 0: the connection lives
	Text  string    // for a developer: says what is wrong, never repeats what the peer sent
}

func (e *FrameError) Error() string { return e.Code.String() + ": " + e.Text }
