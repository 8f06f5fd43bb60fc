package protocol

// Code says why something was refused. Its number travels in binary frames, its name in JSON, metrics
// and logs. Numbers are never reused.
type Code uint16

const (
	OK Code = 0

	// What the client sent is wrong: the same bytes will be refused again.
	CodeBadRequest       Code = 1  // malformed frame or field
	CodeUnknownAction    Code = 2  // a kind or action this server does not know
	CodeNotConnected     Code = 3  // something else before connected
	CodeAlreadyConnected Code = 4  // a second connect on a connection
	CodeUnauthorized     Code = 5  // token missing, malformed, or not signed by a configured key
	CodeTokenExpired     Code = 6  // token past its exp
	CodeBadReceiver      Code = 7  // receiver_id is not a user id
	CodeEmptyContent     Code = 8  // content has no character
	CodeContentTooLong   Code = 9  // over 1 000 code points or 4 000 bytes
	CodeWindowExceeded   Code = 10 // the number is 64 or more away from an open one; the number stays open
	CodeMailboxFull      Code = 11 // the receiver's mailbox holds 100 000 messages
	CodeTooManyDevices   Code = 12 // a ninth device
	CodeSessionReplaced  Code = 13 // the same device connected elsewhere
	CodeSlow             Code = 14 // the client did not read or acknowledge for 60 s
	CodeTimeout          Code = 15 // authentication, a frame or a heartbeat took too long
	CodeFlooding         Code = 16 // went on sending at over ten times the rate for 10 s, or sent much at once that is refused
	CodeFrameTooLarge    Code = 17 // over a size limit

	// Trying the same bytes again after retry_after_ms can succeed.
	CodeRateLimited    Code = 32 // over the message rate, or a renew too soon
	CodeOverloaded     Code = 33 // the server is behind
	CodeStoreFull      Code = 34 // the server's disk is nearly full
	CodeShuttingDown   Code = 35 // the server is going away
	CodeOutcomeUnknown Code = 36 // the server cannot tell whether the message is durable; send it again
	CodeInternal       Code = 37 // the server failed; connect again

	// CodeUnknown stands for a JSON code name of a later version. It is never sent.
	CodeUnknown Code = 1<<16 - 1
)

var codeNames = map[Code]string{
	OK:                   "ok",
	CodeBadRequest:       "bad_request",
	CodeUnknownAction:    "unknown_action",
	CodeNotConnected:     "not_connected",
	CodeAlreadyConnected: "already_connected",
	CodeUnauthorized:     "unauthorized",
	CodeTokenExpired:     "token_expired",
	CodeBadReceiver:      "bad_receiver",
	CodeEmptyContent:     "empty_content",
	CodeContentTooLong:   "content_too_long",
	CodeWindowExceeded:   "window_exceeded",
	CodeMailboxFull:      "mailbox_full",
	CodeTooManyDevices:   "too_many_devices",
	CodeSessionReplaced:  "session_replaced",
	CodeSlow:             "slow",
	CodeTimeout:          "timeout",
	CodeFlooding:         "flooding",
	CodeFrameTooLarge:    "frame_too_large",
	CodeRateLimited:      "rate_limited",
	CodeOverloaded:       "overloaded",
	CodeStoreFull:        "store_full",
	CodeShuttingDown:     "shutting_down",
	CodeOutcomeUnknown:   "outcome_unknown",
	CodeInternal:         "internal",
}

var codesByName = func() map[string]Code {
	m := make(map[string]Code, len(codeNames))
	for c, name := range codeNames {
		m[name] = c
	}
	return m
}()

// String is the name used in JSON, metrics and logs.
func (c Code) String() string {
	if name, ok := codeNames[c]; ok {
		return name
	}
	return "unknown"
}

// CodeByName finds a code by its JSON name. A name this version does not know gives ok == false: treat
// it as its retry_after_ms says.
func CodeByName(name []byte) (c Code, ok bool) {
	c, ok = codesByName[string(name)]
	return c, ok
}

// Codes lists every code in ascending order, for documents and tests.
func Codes() []Code {
	var list []Code
	for n := range 64 {
		if _, ok := codeNames[Code(n)]; ok {
			list = append(list, Code(n))
		}
	}
	return list
}

// CloseCode is a WebSocket close code. 4000–4499 mean: connect again (after the delay of the error
// frame or a backoff of one's own). 4500–4999 mean: do not come back by yourself.
type CloseCode uint16

const (
	CloseNormal        CloseCode = 1000
	CloseGoingAway     CloseCode = 1001
	CloseProtocolError CloseCode = 1002
	CloseUnsupported   CloseCode = 1003
	CloseInvalidUTF8   CloseCode = 1007
	CloseTooBig        CloseCode = 1009
	CloseInternal      CloseCode = 1011
	CloseRestart       CloseCode = 1012 // after go_away: connect again after its delay
	CloseTryAgain      CloseCode = 1013 // the token could not be verified, or the device not be registered, now: connect again after the error's delay

	CloseTokenExpired CloseCode = 4401 // get a new token, then connect
	CloseTimeout      CloseCode = 4408 // authentication, a frame or a heartbeat took too long
	CloseSlow         CloseCode = 4413 // the client did not read or acknowledge for 60 s
	CloseFlooding     CloseCode = 4429 // over ten times the rate for 10 s, or much at once that is refused
	CloseBlockUsed    CloseCode = 4430 // the connection has used up its numbers: connect for new ones

	CloseSessionReplaced CloseCode = 4500 // the same device connected elsewhere
	CloseUnauthorized    CloseCode = 4501 // the token was refused, or an operator ended the session
	CloseNotConnected    CloseCode = 4502 // something else before connected
	CloseTooManyDevices  CloseCode = 4503 // a ninth device
)

// Reconnect reports whether a client should connect again by itself after this close code.
func (c CloseCode) Reconnect() bool {
	switch {
	case c >= 4000 && c <= 4499:
		return true
	case c >= 4500 && c <= 4999:
		return false
	case c == CloseProtocolError, c == CloseUnsupported, c == CloseInvalidUTF8, c == CloseTooBig:
		return false // this client's own mistake: it would make it again
	default:
		return true
	}
}
