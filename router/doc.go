// Package router says which edges hold each user's connections.
//
// A [Table] maps (user, device) to one session: the edge, the connection there, the generation of its drain, and
// whether it is live or still draining. It promises:
//
//   - Exact keys. A route is found by comparing names, never by a hash alone.
//   - The last login wins. [Table.Bind] is refused when a later login of the same device is bound already, in whatever
//     order two binds arrive.
//   - Nothing stale does harm. [Table.SetState] and [Table.Unbind] compare edge and connection and do
//     nothing when the route belongs to another session, so the close of an old connection that is
//     handled after the new login leaves the new route alone.
//   - Every call is atomic, never blocks on anything but a shard's lock, and returns
//     copies: no result refers to memory that the table writes again.
//   - Memory follows the number of routes, down as well as up.
//
// It does not check names beyond their length, and it does not limit devices per user: who registers
// devices does. Routes of one user share a probe sequence, so a call costs time in proportion to them.
//
// # Memory
//
// At ten million users with ids of 12 bytes and one device each the table takes at most 46 B per user, in a few
// objects per shard that hold no pointers:
//
//	26 B  record: lengths and state 1, device 1, edge 4, generation 4, connection 8, login 8
//	12 B  the user id, behind the record's head
//	 7 B  index: (4 B offset of the record + 1 B of its hash) / 0.67…0.81 load
//
// The first few device names of a shard are kept once and are named by one byte; others stand in their records, and
// returning one of those costs an allocation. The hash is seeded per table, so nobody can choose user ids
// that collide.
package router
