// Package backend makes messages durable and delivers them.
//
// A Server publishes sends to a Queue and runs one Owner for each partition of it. The Owner is the delivery core, a
// state machine: it takes durable records in position order, drops duplicates by their window, pushes to live
// sessions, writes mailboxes for the others, and finishes a message in the commit that holds its mailbox rows, its
// receipt and its window bit. GUARANTEES.md lists what that promises and the tests that check it.
//
// The interfaces (Queue, Store, Locator, Pusher) are in backend.go; backend/embedded implements the first two on
// one Pebble database, and backend/backendtest is the suite that every implementation must pass.
package backend
