package protocol

// Specification limits. A peer may rely on them; changing one changes the protocol.
const (
	MaxContentRunes = 1000 // code points in one message
	MaxContentBytes = 4000 // bytes of UTF-8 in one message

	MaxUserBytes   = 64 // of [A-Za-z0-9._@-]
	MaxDeviceBytes = 32 // of [A-Za-z0-9._@-]

	MaxBinaryFrameBytes = 8 << 10  // one WebSocket message from a client, binary subprotocol
	MaxJSONFrameBytes   = 16 << 10 // one WebSocket message from a client, JSON subprotocol
	MaxFragments        = 128      // WebSocket fragments in one message

	MaxOpenSpan         = 64  // open numbers of a connection lie within this span
	MaxUnacknowledged   = 256 // pushes in flight to one connection
	MaxDevicesPerUser   = 8
	MaxIDsPerFrame      = 400 // ids in one binary message_delivered from a client: 400 × 16 B < 8 KiB
	MaxReceiptsPerFrame = 64  // entries in one binary message_delivered from the server
	MaxMailboxRows      = 100_000
	HeartbeatSeconds    = 25 // the server pings a connection idle for this long; silent for two means gone
	AuthenticateSeconds = 5  // from accept to a valid connect
	AcknowledgeSeconds  = 10 // an unacknowledged push goes to the mailbox after this long
	FrameSeconds        = 30 // an incomplete frame or message must be complete within this long of its first byte
	TokenSkewSeconds    = 60 // tolerated clock difference for exp and nbf
	RenewSeconds        = 60 // the server asks for a new token this long before the old one ends
	ReceiptsSlackMillis = 60_000
	MaxTimestampMillis  = 1<<42 - 1 // position is 53 bits, 11 of them below the millisecond
	MaxTokenBytes       = 7 << 10   // fits a binary frame with room to spare
	SubprotocolBinary   = "millrace.v1"
	SubprotocolJSON     = "millrace.v1.json"
	DefaultDevice       = "default"
	MaxReceiptsAfterMs  = MaxTimestampMillis
	MaxRetryAfterMillis = 1 << 31
	MaxErrorTextBytes   = 256
	MaxExpiresInMillis  = 1 << 40
	MaxHeartbeatSeconds = 1 << 16
	MaxServerFrameBytes = 64 << 10 // a client may refuse a longer frame from a server
)
