// Package embedded is the Queue and the Store of one machine: one Pebble database, one committer, nothing else
// to install. It makes a record durable before it answers it (P1), gives positions that only ascend, over restarts
// too (P4), and keeps what deliveries need to finish, all in one write-ahead log with one fsync for everything pending.
//
// # The way of a record
//
//	Append ──► pending ──► committer ──► Pebble (memtable + WAL) ──► syncer ──► Hooks.Answer
//	Commit ──►            batch k+1 is built while batch k syncs        │  ──► ring of the shard ──► Read
//	Register ►                                                          └──► Commit.Done, Register's done
//
// A batch is everything pending, up to 1 MiB of sends and 1 MiB of progress, and starts as soon as the one before it is in Pebble: under load
// the fsync sets the pace and batches grow by themselves; a lone send waits for nothing. Pebble shows a write before it is
// durable, so nothing is answered, put into a ring or reported done before SyncWait returned for its batch; batches
// pass the syncer in order.
//
// # Rings and the log
//
// Durable records go to Read from a bounded ring per shard. When a ring is full, the shard goes on from the
// log: the unread records of a shard are always, in this order, what lies in the log after the last one read up to a known
// position, then the ring, then (after an overflow) the rest of the log up to the last durable position. After a restart the first
// part is the whole log: everything that was not finished is read again.
//
// # Key ranges
//
// Keys are ordered bytewise. Integers are big-endian. 0 is a zero byte, which no user or device id contains;
// a conversation has a uvarint length before it, except where it ends the key.
//
//	range        key                                        value
//	meta         'M' name                                   identity (32 bytes); state: last position, mailbox rows, last receipt; age clock; mailbox limit
//	log          'l' position(8)                            record
//	windows      'w' conversation user 0 device 0 epoch(8)  day of last use, up to four blocks
//	streams      's' user 0 device 0 epoch(8)               next block, day of last use
//	devices      'd' user                                   up to eight device names, one of them heir
//	mailbox      'm' user 0 device 0 position(8) id(16)     record
//	counts       'c' user 0 device                          rows of that mailbox and where they begin; no row for none
//	full         'f' user 0 device                          nothing: the mailbox is at its limit
//	outstanding  'o' conversation addressee 0 position(8)   mark
//	damaged      'q' key of another row                     its value, which does not decode: set aside, see damage.go
//	receipts     'r' sender 0 addressee 0 conversation      delivered mark, top mark, time of change
//
// Every value begins with a version byte but for identity and full. The devices of a user are one row, because the
// owner reads them for every message: one point read. The conversation's hash is not stored: the number of shards may change
// from one start to the next. Checksums are Pebble's.
//
// Beside the database (db/) the data directory holds FORMAT (the version of all this, in plain text), LOCK, and
// ballast (space that is given back to Pebble when the disk is nearly full).
//
// # Trimming
//
// The log is trimmed by DeleteRange behind the oldest unfinished record of all shards, at most once a second or every
// 8 192 appended records, and only behind a low-water mark whose commit is already durable.
//
// # Expiry
//
// Mailbox and outstanding rows leave a year after they were accepted, windows a year after their last use, streams after
// two (expiry.go); devices and receipts stay. A sweeper walks these ranges about once a day, a hundred rows at a time, and
// hands what has expired to the committer, which deletes it in the next batch and corrects counts and full mailboxes as after
// an acknowledgement. Ages are not read off the wall clock: they count the time that the store was running, and time in
// which it was not, or that the clock jumped, for at most a day a time (age.go). So a wrong clock expires nothing, and a store
// that was away for a year keeps what it held for another.
package embedded
