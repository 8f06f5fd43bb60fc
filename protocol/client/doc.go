// Package client is the Go client of millrace (package protocol).
//
// Dial starts a Client, which stays connected until Close: it sends what was given to Send or Queue, in order and
// exactly once, and Receive returns what was sent to the user. The application gives each message that it has stored or
// shown to Acknowledge; until then the server counts it as not delivered and the client returns it again after
// a restart.
//
// With Options.StatePath the outbox and the ids of acknowledged messages survive the process: nothing is lost, and nothing
// is shown twice. Without it both are kept in memory, the last MaxShownInMemory ids.
//
// The client keeps the rules of the protocol: a send gets its number on a connection, just before it is first
// written, and the number is stored before the write; on a new connection everything open is resent first, under its
// old number and with the same bytes, and must end before the first new number.
package client
