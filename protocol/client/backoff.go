package client

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"millrace/protocol"
)

// Limits of reconnecting.
const (
	// DefaultMinBackoff and DefaultMaxBackoff bound the random part of the wait before a new attempt.
	DefaultMinBackoff = 500 * time.Millisecond
	DefaultMaxBackoff = 30 * time.Second
	// LimitBackoff is the largest MinBackoff and MaxBackoff.
	LimitBackoff = 30 * 24 * time.Hour
	// MaxServerDelay bounds what a server can ask for.
	MaxServerDelay = time.Hour
	// stableAfter is how long a connection must have stood for the backoff to start over. A server that accepts and drops
	// would otherwise be hammered.
	stableAfter = 10 * time.Second
)

// backoff is exponential with full jitter: each wait is uniform between 0 and a ceiling that doubles. Clients that lost the
// same server at the same moment come back evenly spread.
type backoff struct {
	min, max time.Duration
	failures int
}

// next is the wait before the following attempt, floor the least that the server asked for.
func (b *backoff) next(floor time.Duration) time.Duration {
	ceiling := b.min
	for i := 0; i < b.failures && ceiling < b.max; i++ {
		ceiling *= 2
	}
	ceiling = min(ceiling, b.max)
	b.failures++
	return min(floor, MaxServerDelay) + rand.N(ceiling+1)
}

func (b *backoff) reset() { b.failures = 0 }

// An ending is everything known about how an attempt or a connection ended.
type ending struct {
	err        error              // what happened, for people
	closeCode  protocol.CloseCode // 0: no close frame
	status     int                // HTTP, 0: none
	retryAfter time.Duration      // Retry-After of an HTTP answer
	tokenErr   bool               // err is the token source's
}

// A verdict is what follows from an ending.
type verdict struct {
	final    error         // not nil: do not come back
	newToken bool          // ask the token source before the next attempt
	floor    time.Duration // the least wait
}

// judge decides what follows. told is the last error frame that was not about a send (nil: none), goAwayMs the delay of
// a go_away, freshToken says that the token had been made for this very attempt.
func judge(end ending, told *serverFrame, goAwayMs uint32, freshToken bool) verdict {
	v := verdict{floor: end.retryAfter}
	code := end.closeCode
	if told != nil {
		v.floor = max(v.floor, millis(told.RetryAfterMs))
		if code == 0 || code == protocol.CloseNormal {
			code = closeCodeOf(told.Code) // the connection broke before the close frame came
		}
	}
	v.floor = max(v.floor, millis(goAwayMs))
	refusedToken := code == protocol.CloseUnauthorized || end.status == http.StatusUnauthorized
	switch {
	case end.tokenErr:
		v.newToken = true
	case errors.Is(end.err, ErrWrongUser), errors.Is(end.err, ErrStateMismatch):
		v.final = end.err
	case code == protocol.CloseTokenExpired:
		v.newToken = true
	case refusedToken && !freshToken:
		v.newToken = true // the token was good once: keys change
	case refusedToken:
		v.final = fmt.Errorf("%w: %w", ErrUnauthorized, end.err)
	case code != 0 && !code.Reconnect(), finalStatus(end.status):
		v.final = finalError(code, end.err)
	}
	return v
}

// finalStatus says that a request would be answered by the same HTTP status again: something is wrong with the URL or a header. After any
// other status, of a proxy perhaps, the client comes back.
func finalStatus(status int) bool {
	switch status {
	case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed,
		http.StatusUpgradeRequired, http.StatusRequestHeaderFieldsTooLarge:
		return true
	}
	return false
}

// finalError names what a close code that forbids coming back means.
func finalError(code protocol.CloseCode, err error) error {
	switch code {
	case protocol.CloseSessionReplaced:
		return fmt.Errorf("%w: %w", ErrReplaced, err)
	case protocol.CloseTooManyDevices:
		return fmt.Errorf("%w: %w", ErrTooManyDevices, err)
	}
	return fmt.Errorf("%w: %w", ErrRejected, err)
}

// closeCodeOf is the close code that follows an error frame which ends a connection; 0 for any other.
func closeCodeOf(code protocol.Code) protocol.CloseCode {
	switch code {
	case protocol.CodeSessionReplaced:
		return protocol.CloseSessionReplaced
	case protocol.CodeUnauthorized:
		return protocol.CloseUnauthorized
	case protocol.CodeTokenExpired:
		return protocol.CloseTokenExpired
	case protocol.CodeTooManyDevices:
		return protocol.CloseTooManyDevices
	case protocol.CodeNotConnected:
		return protocol.CloseNotConnected
	}
	return 0
}

func millis(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }
