package client

import (
	"errors"
	"fmt"

	"millrace/protocol"
)

// Errors that end a client: it does not connect again by itself, and everything that waits returns one of them.
var (
	// ErrClosed says that Close was called. Sends that were not answered stay in the state file, if there is one.
	ErrClosed = errors.New("the client is closed")
	// ErrReplaced says that the same device of the same user connected elsewhere. Coming back would throw the other
	// one out, so that is for a human to decide.
	ErrReplaced = errors.New("the same device connected elsewhere")
	// ErrUnauthorized says that the server refused a token that the token source had just made.
	ErrUnauthorized = errors.New("the server refused the token")
	// ErrTooManyDevices says that the user has as many devices as the server allows.
	ErrTooManyDevices = errors.New("the user has too many devices")
	// ErrRejected says that the server closed the connection, or answered the upgrade, in a way that asks this client not to come back:
	// errors.As finds a *CloseError or a *StatusError that says why.
	ErrRejected = errors.New("the server refused this client")
	// ErrWrongUser says that the token names another user than the state file or Options.User.
	ErrWrongUser = errors.New("the token is for another user")
)

// Errors of a single send.
var (
	// ErrUnanswered says that a send got no answer for UnansweredAfter. It may have been delivered; it will not
	// be sent again.
	ErrUnanswered = errors.New("the send was not answered in 30 days")
	// ErrUndecided says that the context ended after the message had been written. It stays in the outbox and
	// its outcome is reported as an Answered event.
	ErrUndecided = errors.New("the message is on its way and its outcome is not known yet")
	// ErrOutboxFull says that Options.MaxOutbox sends are waiting.
	ErrOutboxFull = errors.New("the outbox is full")
)

// Errors of a state file.
var (
	// ErrStateLocked says that another client, perhaps in another process, uses the state file.
	ErrStateLocked = errors.New("the state file is in use by another client")
	// ErrStateCorrupt says that a part of the state file that was once safely stored cannot be read. A torn tail, which a power
	// cut may leave, is repaired without an error.
	ErrStateCorrupt = errors.New("the state file is damaged")
	// ErrStateMismatch says that the state file belongs to another user or device.
	ErrStateMismatch = errors.New("the state file belongs to another user or device")
)

// RefusedError is a final refusal of a send: it will not be delivered. The same text would be refused again, except after
// protocol.CodeMailboxFull, see Client.Send.
type RefusedError struct {
	Code protocol.Code
	Text string // the server's, for a developer
}

func (e *RefusedError) Error() string {
	if e.Text == "" {
		return "refused: " + e.Code.String()
	}
	return fmt.Sprintf("refused: %s: %s", e.Code, e.Text)
}

// CloseError is why a server closed a connection.
type CloseError struct {
	Code protocol.CloseCode
	Text string
}

func (e *CloseError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("the server closed the connection (%d)", e.Code)
	}
	return fmt.Sprintf("the server closed the connection (%d): %s", e.Code, e.Text)
}

// StatusError is an HTTP answer that is not an upgrade.
type StatusError struct {
	Status int
	Reason string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the server answered HTTP %d %s instead of a WebSocket", e.Status, e.Reason)
}
