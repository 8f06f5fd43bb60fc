// Package edge terminates client connections: WebSocket on gnet event loops, one goroutine for each loop and none for a
// connection. It decides what a connection may do and how much of it; whether a message is durable, whom it is for, and
// what waits in a mailbox is decided behind the four interfaces of edge.go.
//
// The files stand in the order in which a message meets them:
//
//	server.go            configuration, start and end, and the calls that come from other goroutines
//	engine.go            gnet, and nothing else knows it
//	tls.go               TLS on the loop; tls_handshake.go before it, tls_buffers.go for what idle connections need not keep
//	limits.go            how many connections, of whom; limits_state.go remembers
//	loop.go              bytes arrive; a turn of the loop
//	proxy.go             the PROXY protocol header, from proxies
//	upgrade.go origin.go the HTTP request that starts a WebSocket
//	websocket.go         bytes to messages (RFC 6455)
//	conn.go              what a connection may do when
//	authenticate.go      who a client is: tokens of upgrades, connects and renewals
//	verifiers.go         tokens that take long are verified away from the loops
//	uplink.go            sends go to the Publisher, answers come back; uplink_state.go decides
//	inbox.go             how other goroutines reach a loop
//	downlink.go          messages go out, acknowledgements come back; downlink_state.go decides
//	receipts.go          receipts go out; receipts_state.go decides
//	sweep.go             everything that is due by time
//	slab.go              where connections live
//	metrics.go           what is counted
//	echo.go              a path for tests of conformance, in builds with the tag "echo" only
//
// # What is bounded, and by what
//
//	connections               MaxConnections, exactly, in OnOpen; of the last 5 % none by those who do not authenticate
//	connections of a client   Config.Address, Loopback; of a user: Config.User
//	sends of a user           Config.Rate, over all connections
//	accounts of both          MaxConnections + maxIdleAccounts, and a margin
//	a TLS handshake           maxTLSHandshakeBytes, AuthenticateSeconds
//	all of them               maxTLSHandshakes, maxTLSWorkers
//	a PROXY protocol header   maxProxyBytes, AuthenticateSeconds; MaxProxyNetworks
//	an upgrade request        maxHeadBytes, maxHeadLines, AuthenticateSeconds
//	tokens to be verified     maxWaitingTokens, a share for each loop, one for each connection; AuthenticateSeconds
//	renewals                  renewTicks
//	behind an upgrade         maxEarlyBytes, until its token is verified
//	a WebSocket message       protocol.MaxBinaryFrameBytes, MaxJSONFrameBytes, MaxFragments, FrameSeconds
//	sends not answered        protocol.MaxOpenSpan
//	messages in flight        protocol.MaxUnacknowledged
//	outbound bytes            outSoftBytes: messages wait in the mailbox; outHardBytes: closed
//	receipts that wait        maxWaitingReceipts
//	pushes to a loop          inboxBytes
//	time                      every wait has a deadline that a sweep looks at
//
// A token whose verification takes public-key arithmetic never holds a loop up: at most maxVerifiers workers, and at most half of the
// cores, verify those, in turns between the loops. Tokens that were verified before, and HS256, are verified on the loop.
//
// TLS is spoken where Config.Certificate is set: crypto/tls over the bytes of the loop. A handshake has a goroutine of its own, from a
// complete client hello to its end, and half of the cores; then records are read and written on the loop, the records of a turn with one
// write. The limits above count ciphertext for what is buffered and plaintext for what is in a frame; a handshake is part of the time to
// authenticate. An idle TLS connection keeps its keys, 3.5 to 3.9 KB, and no buffer.
//
// A plain idle connection owns no heap object: its state is a slot of a slab, its names a block of an arena, and what only an active one
// needs (an incomplete frame, open sends, messages in flight) is borrowed from pools.
package edge
