// Package protocol is what millrace and its clients say to each other, and this page is its specification: whoever
// keeps it can write a client without reading anything else. The package also holds both encodings in Go. Clients in
// Go use the package client, which keeps every rule of this page.
//
// millrace carries text messages between users. A message that the server has answered with message_received is on
// stable storage; every device of the receiver gets it, now or when it comes online; a client that keeps the rules
// below shows it exactly once, and everybody sees a conversation in the same order. "Must" marks what these promises
// depend on.
//
//	Contents    1 Terms                      9 Refusals
//	            2 Connecting                10 Receiving
//	            3 The life of a connection  11 Receipts
//	            4 WebSocket                 12 Tokens
//	            5 Messages                  13 Heartbeat, going away, connecting again
//	            6 JSON encoding             14 Limits
//	            7 Binary encoding           15 Error codes
//	            8 Sending                   16 Close codes
//	                                        17 Versions
//	                                        18 Golden vectors
//
// # 1 Terms
//
// A user has a user id of 1–64 bytes of A–Z a–z 0–9 . _ @ - compared byte by byte. The access token says who the
// user is.
//
// A device is one installation of a client of a user, named by a device id of 1–32 bytes of the same
// characters, "default" if the client names none. A user has at most 8 devices. A device is known to the server from its
// first connected on, and from then on every message to the user waits for it, whether it is online or not. What was
// sent to a user who had no device yet goes to the user's first one. There is one connection per device: a second one replaces
// the first.
//
// An epoch is a random 64-bit number, not 0, that stands for the memory of an installation. A client that has lost its
// stored state takes a new one.
//
// A stream is (user, device, epoch): the unit within which sends are numbered.
//
// A number, message_id_by_client, tells the sends of a stream apart. It has 48 bits, from two counters:
//
//	 47            20 19           0
//	+----------------+--------------+
//	|     block      |     send     |   number = block × 1 048 576 + send; send is 1 … 1 048 575, never 0
//	+----------------+--------------+
//
// Every connection of a stream gets a block of its own; connected carries the block's first number (1 for the first
// connection of a stream, then 1 048 577, 2 097 153 …, perhaps with blocks left out).
//
// A message id, message_id, is 16 bytes that name one message for ever and everywhere. It is opaque: only equality means
// anything. A resend of the same send has the same message id. Its text form is 26 characters of Crockford's base32,
// 0123456789ABCDEFGHJKMNPQRSTVWXYZ, most significant bits first; 26 × 5 = 130 bits, of which the first
// two are 0, so the first character is 0 … 7. It is written in upper case and read in either; the look-alikes I, L,
// O, U and hyphens are refused.
//
// A conversation is the unordered pair of its two users, sender_id and receiver_id; it may be one user twice. A message
// to oneself is a message like any other.
//
// A position is a number of 53 bits that orders the messages of a conversation: position = milliseconds × 2048 + n, where the
// milliseconds since 1970 are those at which the server accepted the message and n tells the messages
// of one millisecond apart. Positions of a conversation never repeat. An incoming message's timestamp is its position divided by 2048,
// rounded down.
//
// A timestamp is milliseconds since 1970-01-01 UTC, 42 bits. Those that a client sends are informative; the server uses
// none of them.
//
// # 2 Connecting
//
// The endpoint is the path /ws of the server's address, ws:// or wss://. The upgrade is RFC 6455, an HTTP/1.1 GET:
//
//	GET /ws?device=phone HTTP/1.1
//	Host: chat.example.org
//	Upgrade: websocket
//	Connection: Upgrade
//	Sec-WebSocket-Version: 13
//	Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
//	Sec-WebSocket-Protocol: millrace.v1
//	Authorization: Bearer eyJhbGciOi…            (optional)
//
// Subprotocol. Two are known, with the same messages and the same meaning:
//
//	millrace.v1         binary
//	millrace.v1.json    JSON
//
// Of those that the client offers the server takes the first one it knows, and names it in the response. If the client offers
// none the connection speaks JSON and the response names none. If it offers only unknown ones the answer is HTTP 400.
//
// Authentication is by the first message, connect (§3), or by Authorization: Bearer in the upgrade; browsers
// can only do the first. With the header the device is the query parameter device (percent-encoded, the first if there are several, "default" if
// absent or empty), the server makes an epoch, and all receipts are sent; a client that has an epoch to come
// back with must use connect. The upgrade is answered when the token has been verified; of what the client sends before, 16 KiB at most,
// nothing is lost. Without the header the query is not looked at. A token never goes into the URL.
//
// Origin. A request with an Origin header, which every browser sends, must come from the same host and port as its Host
// header, or from an origin on the server's list. A request without one is allowed: nothing here is authenticated by
// cookies.
//
// A refused upgrade is answered by HTTP and closed:
//
//	400  malformed request, malformed device, or only unknown subprotocols     do not repeat
//	401  the token of the Authorization header is not accepted                 get a new token, then try again
//	403  the Origin is not allowed                                             do not repeat
//	404  a path other than /ws           405  a method other than GET          do not repeat
//	     (405 goes before 404, 403 before 401; GET / is answered by a page for people)
//	426  not a WebSocket upgrade of version 13                                 do not repeat
//	429  the client's address has or makes too many connections (§14)          again after Retry-After (seconds)
//	431  over 8 KiB, 64 lines, or a request line over 4 KiB                    do not repeat
//	503  the server is going away, full, or cannot verify a token for now      again after Retry-After (seconds)
//
// The upgrade must be complete 5 s after the connection was accepted, and so must connect; else the server closes. Within the same
// 5 s the token is verified; when the server cannot, it is 503 or, behind connect, close 1013 with overloaded or internal.
//
// # 3 The life of a connection
//
//	client                                                    server
//	connect: token, device, epoch, receipts_after       →
//	                                                    ←     connected: the first new number
//	send_message (open ones again, §8)                  →
//	                                                    ←     message_received          per send
//	                                                    ←     incoming_message          what waited, then live
//	message_delivered (acknowledgement)                 →                               per incoming_message
//	                                                    ←     message_delivered (receipt)
//	                                                    ←     renew                     60 s before the token ends
//	renew: token                                        →
//	                                                    ←     renewed
//	                                                    ←     go_away, then close 1012
//
// The client's first message must be connect, alone, unless the upgrade had an Authorization header. Until connected arrives it
// must send nothing else: anything but one well-formed connect is answered with an error (not_connected, bad_request,
// unknown_action) and close 4502. (An empty message, and a kind or type that a later version may skip, means nothing here
// either.) A second connect, before or after connected, or after an upgrade with a token, gets already_connected
// and the connection lives.
//
// All fields of connect but the token may be left out: device is then "default", the server makes an epoch
// and tells it in connected, and receipts_after is 0. A client that stores nothing leaves the epoch out when it starts, and
// comes back with the one that it was told for as long as it runs; one that stores its state keeps it (or makes one
// itself, from 64 random bits) for ever.
//
// If the same device is connected already the new connection (the one that the server accepted later) wins, whatever its epoch; the older one gets the
// error session_replaced and close 4500, upon which it must not come back by itself: two clients with one device id would
// throw each other out for ever.
//
// After connected every message may come at any time, in any order, in both directions; incoming messages may stand before
// answers. A message that is not well formed gets an error frame and the connection lives. In one WebSocket message malformed
// parts that name no send are answered only among the first 16 malformed ones. What violates WebSocket or a size limit closes the connection (§16).
//
// # 4 WebSocket
//
// Binary subprotocol: every message is a binary WebSocket message and holds one or more frames (§7), in both directions.
// An empty message is allowed and means nothing. Text is refused with close 1003.
//
// JSON subprotocol: every message is a text WebSocket message. The server sends exactly one object in each. A
// client may send one object, or several separated by newlines (§6). Binary is refused with close 1003, invalid UTF-8
// with 1007.
//
// A WebSocket message from a client is at most 8 KiB (binary) or 16 KiB (JSON) and at most 128 fragments; more is closed with
// 1009. One from the server is at most 64 KiB and never fragmented. A message must be complete 30 s after its first
// byte; else the server closes with 4408. Frames from a client are masked, lengths are minimal, control frames have at most 125
// bytes, reserved bits are 0: else 1002.
//
// No extension is negotiated, compression least of all. One compressor over the text of several people tells
// one of them about the other by the lengths (CRIME, BREACH), a window of its own for every connection costs
// up to 32 KiB each, and without one small messages grow: a JSON message of 119 bytes got longer under stateless deflate.
// The binary subprotocol is the compact one.
//
// # 5 Messages
//
// Every field has one name, which is its JSON key, and the same meaning in both encodings. Those marked ? may be absent; in
// binary, absent is 0 or empty. Without one of the others a message is bad_request, to a client as to the server, but: without
// receiver_id a send is bad_receiver, without content empty_content, and a connect or renew without token is unauthorized.
//
// From the client:
//
//	connect            token, device?, epoch?, receipts_after?
//	                   receipts_after: the largest timestamp of a receipt that the client has applied, 0 for all (§11)
//	send_message       message_id_by_client, receiver_id, content, timestamp?
//	                   content: 1–1000 code points and at most 4000 bytes of UTF-8. NUL, controls, bidi
//	                   controls and unassigned code points pass untouched; surrogates are not Unicode text
//	message_delivered  message_id, timestamp?                          acknowledges one incoming_message, §10
//	                   in binary several ids
//	renew              token                                           §12
//
// From the server:
//
//	connected          user_id, device, epoch, next_message_id_by_client, heartbeat_seconds, timestamp
//	                   next_message_id_by_client: the first number for new sends on this connection
//	message_received   message_id_by_client, message_id, position?, timestamp
//	                   the send is on stable storage. position is absent where the server does not know
//	                   it yet, and always for a resend
//	incoming_message   message_id, position, sender_id, receiver_id, content, timestamp
//	                   the timestamp is position divided by 2048: binary leaves it out, and who reads JSON
//	                   takes it from the position too
//	message_delivered  message_id, position?, message_id_by_client?, receiver_id, timestamp
//	                   a receipt, §11; in binary several. message_id_by_client is there only if this stream
//	                   sent the message; timestamp is when the receipt changed
//	error              code, text, message_id_by_client?, resend_from?, retry_after_ms?      §9, §15
//	                   text is for developers: at most 256 bytes, and may change
//	renew              expires_in_ms                                   §12
//	renewed
//	go_away            retry_after_ms                                  §13
//
// # 6 JSON encoding
//
// One flat object per message (RFC 8259), its name under action or type. A client may use either key, and both
// if they agree; the server uses them as shown:
//
//	→ {"action":"connect","token":"…","device":"phone","epoch":"0f1e2d3c4b5a6978","receipts_after":0}
//	← {"type":"connected","user_id":"alice","device":"phone","epoch":"0f1e2d3c4b5a6978","next_message_id_by_client":1,"heartbeat_seconds":25,"timestamp":1692841226851}
//	→ {"action":"send_message","receiver_id":"bob","content":"hi","message_id_by_client":1,"timestamp":1692841226851}
//	← {"action":"message_received","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","message_id_by_client":1,"position":3466938832609280,"timestamp":1692841226860}
//	← {"type":"incoming_message","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":3466938832609280,"sender_id":"alice","receiver_id":"bob","content":"hi","timestamp":1692841226860}
//	→ {"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","timestamp":1692841226871}
//	← {"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":3466938832609280,"message_id_by_client":1,"receiver_id":"bob","timestamp":1692841226880}
//	← {"type":"error","code":"rate_limited","text":"…","message_id_by_client":5,"resend_from":4,"retry_after_ms":250}
//	← {"type":"renew","expires_in_ms":60000}
//	→ {"action":"renew","token":"…"}
//	← {"type":"renewed"}
//	← {"type":"go_away","retry_after_ms":1500}
//
// What is read:
//
//   - The order of keys and white space are free. Keys and names are case sensitive.
//   - Unknown keys, and keys of other messages, are ignored with any value; values may be nested 32 deep, the object included.
//   - A key of the message given twice is bad_request.
//   - null is the same as leaving the key out. An empty device is the default one; one that is no device id is bad_request.
//   - Numbers are JSON numbers without sign, fraction or exponent; a number in a string is bad_request. All fit 53
//     bits, so a double carries them exactly.
//   - An epoch is a string of exactly 16 hex digits, written in lower case and read in either. All zeros is absent.
//   - Strings may use every escape. A lone surrogate, escaped or not, in a field of the message is bad_request.
//   - A client ignores objects whose type it does not know, and treats an unknown error code by its retry_after_ms.
//
// Several objects in one message are separated by newlines (LF or CR LF; spaces and blank lines around them are
// fine). Each is handled as if it had come alone. An object behind which something else stands on its line is bad_request and not
// handled, nor is what follows it there. After one that is not well-formed JSON reading goes on behind the next newline after the place of
// the error; so a client that sends several puts each on one line (inside an object a newline is white space like any other). The error names
// message_id_by_client if action and number stood before that place. A message without any object means nothing.
//
// # 7 Binary encoding
//
// A frame is
//
//	+----------+------------------+----------------- … ------+
//	| kind 1 B | length of body v | body                     |
//	+----------+------------------+----------------- … ------+
//
//	v      unsigned integer in LEB128: 7 bits a byte, least significant first, bit 7 set in all bytes but the last.
//	       It must be minimal (a last byte of 0 is only right for 0 itself) and have at most 10 bytes and 64 bits
//	string v length in bytes, then the bytes
//	text   a string of valid UTF-8
//	name   a string that is a user id (or device id)
//	id     16 bytes
//	8 B    64 bits, big endian
//
//	bit 7 of kind  1: who does not know this kind skips it
//	bit 6 of kind  1: sent by the server, 0: sent by the client
//
// The bodies, field after field without anything between. Bytes after the last field belong to a later version and are ignored.
//
//	0x01 connect        token string | device string | epoch 8 B | receipts_after v
//	     →              device empty: "default", else a device id; epoch 0: the server makes one;
//	                    a token over its limit is unauthorized, not malformed
//
//	0x02 send           message_id_by_client v | timestamp v | receiver_id string | content text
//	     →              timestamp 0: none
//
//	0x03 acknowledge    timestamp v | count v | count × (message_id id)
//	     →              message_delivered of the client; count is 1 … 400 (§10 advises 64)
//
//	0x04 renew token    token string
//	     →
//
//	0x41 connected      user_id name | device name | epoch 8 B | next_message_id_by_client v |
//	     ←              heartbeat_seconds v | timestamp v
//
//	0x42 received       message_id_by_client v | message_id id | position v | timestamp v
//	     ←              position 0: not known
//
//	0x43 incoming       message_id id | position v | sender_id name | receiver_id name | content text
//	     ←
//
//	0x44 receipt        count v | count × (message_id id | position v | message_id_by_client v | timestamp v | receiver_id name)
//	     ←              message_delivered of the server; count is 1 … 64; position 0: not known;
//	                    message_id_by_client 0: another stream sent it
//
//	0x45 error          code v | message_id_by_client v | resend_from v | retry_after_ms v | text text
//	     ←              code: its number, §15; 0 for what is absent
//
//	0x46 renew          expires_in_ms v
//	     ←
//
//	0x47 renewed        (empty)
//	     ←
//
//	0x48 go_away        retry_after_ms v
//	     ←
//
// For example, the send and the connected of §6 (with " | " between fields):
//
//	02 0e | 01 | e3 e4 cc a9 a2 31 | 03 62 6f 62 | 02 68 69
//
//	41 1c | 05 61 6c 69 63 65 | 05 70 68 6f 6e 65 | 0f 1e 2d 3c 4b 5a 69 78 | 01 | 19 | e3 e4 cc a9 a2 31
//
// What is read:
//
//   - A frame whose body is wrong (a field runs past the end, an integer is not minimal or over its limit, a count is 0 or over its
//     limit, text is not UTF-8) is bad_request; the frames after it are read as if it were not there.
//   - A length that is malformed or runs past the end of the WebSocket message is bad_request, and what is left of
//     that message is dropped, since nothing tells where the next frame begins. The connection lives.
//   - An unknown kind with bit 7 is skipped without a word. Any other unknown kind, and a kind of the wrong direction whose body is
//     right, is unknown_action from a server; a client that meets one closes with 1002.
//
// # 8 Sending
//
// A number is open from the moment its send is first written until it ends: by message_received, or by a final
// refusal (§9). These rules make a resend recognisable for ever, on any server, after any crash, without the server remembering
// every send:
//
//	S1  A send gets its number only on a connection, after connected, just before it is first written. What is queued
//	    while offline has none.
//	S2  The client stores the number, with receiver_id, content and timestamp, before it writes the send, and forgets it
//	    only after it has ended. A client without storage keeps it in memory, with the epoch, for as long as it runs.
//	S3  New numbers of a connection start at its next_message_id_by_client and ascend; gaps are allowed. They stay
//	    inside the block: send part ≤ 1 048 574. Who comes near the end reconnects; who writes 1 048 575 gets
//	    shutting_down, go_away and close 4430, and sends it again on the next connection.
//	S4  On a new connection everything open is sent again first, ascending, each under its old number and with the same bytes.
//	    All of it must have ended before the first new number is given.
//	S5  The open numbers of a connection lie within a span of 64: highest − lowest < 64. A send that would break this gets
//	    window_exceeded.
//	S6  A number never stands for a second message. Not after a refusal, not to another receiver (where it would be a
//	    new message), not with other text.
//	S7  After mailbox_full the next new number is at least 64 above every number given before: so the server knows that
//	    the refusal was read. Until it sees such a number it refuses every send of this connection to that receiver with
//	    mailbox_full, also when there is room again. (A send accepted behind a refusal that is lost with the
//	    connection would be overtaken by it: the refused send, still open, comes again on the next connection and is accepted.)
//	S8  A send that has been unanswered for 30 days is given back to the application as failed and its number is not written
//	    again. The server forgets what it needs to recognise a resend a year after the last use.
//
// A resend, however old, is answered with the same message_id as the first time, and is shown once. If a
// client breaks S6 the first content under a number (for one receiver) stands and the second is answered as its resend.
//
// A client that cannot keep its state across restarts and still sends the old epoch, but counts on by itself, works as long as its
// numbers are new: the server takes numbers below next_message_id_by_client as resends and accepts those that it has not seen. Numbers above the
// connection's block are bad_request.
//
// Order. The server accepts the sends of a connection in the order in which they were written, and every receiver sees them in
// that order.
//
// The sender's own messages of a conversation stand in the order of their numbers, which is the order of their positions. One whose
// position is not known (from message_received, a receipt or history) stands right before the sender's next one that has a position, and after
// everything that has one if there is none.
//
// # 9 Refusals
//
// An error with message_id_by_client is about that send; one without is about the connection or a message that names no
// send. retry_after_ms decides:
//
//   - Without retry_after_ms the refusal is final: the number has ended, and the same bytes would be refused again. The exception is
//     window_exceeded: the number stays open (or was never taken); write it again when a lower number has ended.
//   - With retry_after_ms (rate_limited, overloaded, store_full, shutting_down, outcome_unknown, internal) the number stays open and the stream stops:
//     the server refuses every higher number of this connection with the same code, until each refused number has been sent
//     again, lowest first: resend_from moves on with them. The client must wait retry_after_ms, then write again, ascending, every open number from
//     resend_from on. (A send that is already on its way to storage when a lower one is refused fails with it; it too gets an error of its own.)
//     A client that gives a refused number up (S8) must leave the connection, which would wait for it.
//
// resend_from is the number to send again first, and is at most message_id_by_client. Several refusals in a row name the same
// resend_from: one wait, the longest, is enough (over the rate the waits grow, each with a place for the numbers before it). A refused send was not accepted in part or in silence, except after outcome_unknown,
// where it may be durable already: sending it again settles it.
//
// On one connection a send need not be written again while its answer is on the way; if it is, it is answered once.
//
// An error never leaves a client without anything to do: ended numbers are reported to the application, open ones are sent again.
//
// # 10 Receiving
//
//	R1  A client keeps the set of the message ids that it has shown, with its messages, for a year. Without storage it
//	    keeps the last 65 536.
//	R2  An incoming_message whose id is in the set is not shown, but it is acknowledged again.
//	R3  Any other is stored together with its id; then it is acknowledged, with message_delivered; it is shown once.
//	    Never acknowledge what is not stored: the server forgets it for this device.
//	R4  Messages of a conversation are shown in the order of position, whatever the order in which they arrive.
//
// A message is pushed on a connection at most once. If it is not acknowledged within 10 s, or before the connection ends, it waits in the device's
// mailbox and comes again on the next connection; a late acknowledgement counts as well. Acknowledging an id that was not pushed on this
// connection does nothing. The other devices of a sender do not get what it sends, only its receipts (§11).
//
// At most 256 pushes are unacknowledged on a connection, those older than 10 s included; further messages wait in the mailbox, which is no
// error. They go on when acknowledgements bring the number under 128, and after a second or so if there is any room. A client at 256 that acknowledges nothing for 60 s, or does not read for 60 s what
// was written to it, is closed with 4413. What waited while the device was offline comes first, then live messages, but the boundary is not marked.
//
// Acknowledgements may wait for the next outgoing frame or 100 ms, at most 64 at a time, and travel together: as one binary frame,
// or as several JSON objects in one WebSocket message. A message waits for at most a year.
//
// # 11 Receipts
//
// The server's message_delivered tells a sender how far its messages have come: the named message, and every earlier one of
// this user in the same conversation (with receiver_id), has reached a device of the receiver. Earlier means: with a smaller position,
// or, for messages of the own stream whose position is not known, with a smaller number than the receipt's message_id_by_client.
// So one receipt may stand for many, none comes for each message, and none passes a message that no device has acknowledged.
//
// Receipts go to every connected device of the sender and are not acknowledged. They are a state, not events: applying one
// twice, or an older one after a newer, must change nothing: keep the largest position for each receiver_id, and the largest number where a
// receipt has no position. The client stores the largest
// timestamp of all the receipts it has applied, and passes it as receipts_after when it connects: the server then
// sends again all that have changed since, and some that changed up to 60 s earlier. 0 asks for all. They come in the order in which they
// changed, and live ones only when that is done; so wherever a connection breaks off, the largest timestamp applied says what is missing.
//
// # 12 Tokens
//
// A token is a JSON Web Token with sub (the user id) and exp, signed for this server, at most 7 KiB; nbf is respected, and clocks
// may differ by 60 s. The package token has the details. A token ends at its exp; one that is accepted after it, within these 60 s,
// ends when they are over.
//
// About 60 s before the token ends (exp) the server sends renew. The client answers with renew and a new token of the same user and gets renewed.
// A token that is not accepted gets unauthorized or token_expired and ends nothing: the connection lives as
// long as the old token. If no new one comes the server closes with 4401 when the old one ends; the client then gets a new
// token and connects again. A client may send renew at any time. It should not connect with a token that is about to end.
//
// A renew that comes before the last one is answered, or within a second of it, is not looked at and gets rate_limited (of several
// in one WebSocket message only the first 16 are answered). One whose token the server cannot verify for now gets overloaded or internal; after
// their retry_after_ms the client sends it again, or waits for the server, which then asks again.
//
// Who runs the server can end the sessions of a user: each gets unauthorized and close 4501.
//
// # 13 Heartbeat, going away, connecting again
//
// The server sends a WebSocket ping on a connection from which nothing has come for heartbeat_seconds; a peer
// that is silent for twice that is closed with 4408. WebSocket libraries answer pings by themselves. A client may ping
// too, and the server answers; one from which the network has hidden the server's silence finds out by a ping of its own after
// two heartbeats without a byte.
//
// go_away announces that the server is about to close with 1012 (or 4430): the client stops giving new numbers, waits
// for the answers on their way until the close, and connects again after retry_after_ms, which is different for every
// client so that they do not all come at once. The server closes as soon as everything that it has read has been answered; what it
// has not read by then is sent again on the next connection like anything open.
//
// Connecting again, after any end of a connection for which §16 says so, and after a connection that could not be made:
//
//   - The wait is the largest retry_after_ms (or Retry-After) of go_away or of an error without message_id_by_client that came before
//     the end, if any, plus a random time: uniform between 0 and min(30 s, 0.5 s × 2^n) (full jitter), where n counts
//     the attempts since a connection last stood for 10 s.
//   - Close codes 4500–4999 mean: not by yourself; a person, or a new token, must change something first.
//
// # 14 Limits
//
//	content                              1000 code points and 4000 bytes of UTF-8, at least one
//	user id, device id                   64 and 32 bytes
//	devices of a user                    8
//	message_id_by_client                 1 … 281 474 976 710 655 (2^48 − 1)
//	position                             ≤ 9 007 199 254 740 991 (2^53 − 1)
//	timestamps, receipts_after           ≤ 4 398 046 511 103 (2^42 − 1)
//	retry_after_ms                       ≤ 2 147 483 648 (2^31)
//	expires_in_ms                        ≤ 1 099 511 627 776 (2^40)
//	heartbeat_seconds                    ≤ 65 536; 25 unless configured
//	token                                7168 bytes
//	text of an error                     256 bytes
//	WebSocket message from a client      8192 bytes (binary), 16 384 bytes (JSON), 128 fragments
//	WebSocket message from the server    65 536 bytes
//	ids in a binary acknowledge          400
//	receipts in a binary receipt         64
//	open numbers of a connection         span 64
//	unacknowledged pushes                256
//	nesting of ignored JSON              32
//	messages waiting for a device        100 000, for a year each
//	sends of a user                      20 a second, bursts of 100, unless configured
//	logins of a user                     2 a second, bursts of 20, unless configured
//	connections of a user                16, unless configured
//	connections of a client address      1000, and 100 more a second in bursts of 200, unless configured
//	renew                                one at a time, one a second
//	upgrade request                      8 KiB, 64 lines, request line 4 KiB
//	from accept to a valid connect       5 s
//	from first to last byte of a message 30 s
//	acknowledgement of a push            10 s, then the message waits in the mailbox
//
// What a user has counts on all devices and connections together, one after the other too: a new connection does not begin with a new burst. A login
// above these limits gets rate_limited, and close 1013. An address is one of IPv4 or a /64 of IPv6; connections above
// its limits are answered with 429, or just closed, before anything is read. In a cluster each edge counts for itself.
//
// When the server is nearly full it closes the connections that have been there the longest without authenticating.
//
// # 15 Error codes
//
// The name is used in JSON, the number in binary. "Ends" says whether an error about a send ends its number.
//
//	 1  bad_request        malformed, a field over its limit, or a number no send can have      ends
//	 2  unknown_action     a kind, action or type that this server does not know
//	 3  not_connected      something else before connected; close 4502
//	 4  already_connected  a second connect; nothing happens
//	 5  unauthorized       token missing, malformed, not valid yet, of another user (renew), or signed by
//	                       an unknown key; or an operator has ended the session. On connect and
//	                       then: close 4501
//	 6  token_expired      token past its exp: get a new one. On connect: close 4401
//	 7  bad_receiver       receiver_id is not a user id                                         ends
//	 8  empty_content      content has no character                                             ends
//	 9  content_too_long   over 1000 code points or 4000 bytes                                  ends
//	10  window_exceeded    64 or more away from an open number; write it again when a
//	                       lower one has ended                                                  stays open
//	11  mailbox_full       the receiver's mailbox holds about 100 000 messages; never given to  ends
//	                       a resend. A new attempt is a new send under a new number: see S7
//	12  too_many_devices   the user has 8 other devices; close 4503
//	13  session_replaced   the same device connected elsewhere; close 4500
//	14  slow               did not read or acknowledge for 60 s; close 4413
//	15  timeout            authentication, a message or a heartbeat took too long; close 4408
//	16  flooding           over 100 seconds' worth of sends were refused with rate_limited within
//	                       10 s, or what was sent at once asks for over 128 KiB of answers, which
//	                       only frames that break rules do; close 4429
//	17  frame_too_large    over a size limit; close 1009
//
// With retry_after_ms; about a send, its number stays open:
//
//	32  rate_limited       over the rate of sends, or a renew too soon after another (§12). On
//	                       connect: too many connections or logins of this user; close 1013
//	33  overloaded         the server is behind. On connect: close 1013
//	34  store_full         the server's disk is nearly full
//	35  shutting_down      the server, or this connection's block of numbers, is coming to its end
//	36  outcome_unknown    the server cannot tell whether the message is durable: send it again
//	37  internal           the server failed. On connect: close 1013
//
// When several things are wrong with a send, one is named, in this order: bad_request, bad_receiver, empty_content, content_too_long,
// window_exceeded. A code that a client does not know is final for a send if it carries no retry_after_ms, and retryable if it does.
//
// The errors that are followed by a close may be lost with the connection; the close code says the same.
//
// # 16 Close codes
//
// 4000–4499: connect again, after the wait of §13. 4500–4999: do not come back by yourself. An end without a close frame
// (1005, 1006) and every code not listed here below 4000: connect again.
//
//	1000  normal                                                     connect again if still wanted
//	1001  going away                                                 connect again
//	1002  the client violated WebSocket                              do not
//	1003  a text message on binary, or a binary one on JSON          do not
//	1007  a text message is not UTF-8                                do not
//	1009  a message or its fragments are over a limit                do not
//	1011  the server failed                                          connect again
//	1012  the server is restarting, after go_away                    connect again after its retry_after_ms
//	1013  the server cannot let the client in for now, after an error connect again after its retry_after_ms
//
//	4401  the token has expired                                      get a new token, then connect again
//	4408  authentication, a message or a heartbeat took too long     connect again
//	4413  did not read or acknowledge for 60 s                       connect again
//	4429  flooding                                                   connect again
//	4430  the numbers of this connection are used up, after go_away  connect again
//
//	4500  the same device connected elsewhere                        only when the user asks for it
//	4501  the token was refused, or an operator ended the session    only with a new token
//	4502  something else before connected                            do not: a defect of the client
//	4503  the user has 8 other devices                               do not
//
// 1002, 1003, 1007, 1009 and 4502 are mistakes of the client, which it would make again.
//
// # 17 Versions
//
// The subprotocol names the version; frames carry none. Within v1 the server may come to
//
//   - send new kinds with bit 7 set, and JSON objects of a new type: skip them;
//   - append fields to a binary body, and add keys to a JSON object: ignore them;
//   - use new error codes (go by retry_after_ms) and close codes (go by the ranges).
//
// Nothing else changes: a kind keeps its fields and a code its number. What an old client could not skip needs a millrace.v2; a
// client that knows both offers both, best first, and gets the first that the server knows.
//
// # 18 Golden vectors
//
// testdata holds vectors for implementations in any language, valid and invalid, with an explanation at the top of each
// file:
//
//	binary.json  binary WebSocket messages and what reading them gives
//	json.json    the same for JSON
//	values.json  message ids, uvarints, numbers and blocks, positions, user ids and device ids, checks of a send, codes
package protocol
