package edge

import (
	"encoding/binary"
	"unicode/utf8"

	"github.com/gobwas/ws"
	"github.com/valyala/bytebufferpool"

	"millrace/protocol"
)

// keepBufferBytes is the largest buffer that goes back to a pool: a pool of buffers that once held a burst
// would hand 64 KiB to connections that need 100 bytes.
const keepBufferBytes = 16 << 10

var inputs bytebufferpool.Pool

func putBuffer(pool *bytebufferpool.Pool, b *bytebufferpool.ByteBuffer) {
	if cap(b.B) <= keepBufferBytes {
		pool.Put(b)
	}
}

// eventKind is what a wsReader found.
type eventKind uint8

const (
	wsMore      eventKind = iota // everything was consumed
	wsFragment                   // part of a message that goes on
	wsMessage                    // a complete data message
	wsPing                       // payload goes back in a pong
	wsPong                       //
	wsClose                      // code is the peer's, or 0 when it gave none
	wsViolation                  // close with code; nothing that follows can be read
)

type wsEvent struct {
	kind    eventKind
	code    protocol.CloseCode
	text    string // of a violation, for the close frame
	payload []byte // unmasked; valid until the next call
}

// wsReader takes a client's byte stream apart into messages and control frames (RFC 6455 §5). It is pure: bytes in, events out,
// however they are cut. Complete frames are unmasked in place and copied nowhere; only what is incomplete is kept, in pooled
// buffers, and its length was checked before the first byte of it was stored. The zero value is ready.
type wsReader struct {
	partial  *bytebufferpool.ByteBuffer // the start of one incomplete frame
	message  *bytebufferpool.ByteBuffer // the fragments so far of one message, unmasked
	spent    bool                       // what the last event pointed to can be released
	fragment uint8                      // frames of the present message so far; 0: none is open
	since    uint32                     // the tick of the first byte of what is incomplete
}

// pending reports whether something incomplete is kept.
func (r *wsReader) pending() bool { return r.partial != nil || r.message != nil }

// release gives the buffers back.
func (r *wsReader) release() {
	r.releasePartial()
	r.releaseMessage()
	*r = wsReader{}
}

func (r *wsReader) releasePartial() {
	if r.partial != nil {
		putBuffer(&inputs, r.partial)
		r.partial = nil
	}
}

func (r *wsReader) releaseMessage() {
	if r.message != nil {
		putBuffer(&inputs, r.message)
		r.message = nil
	}
	r.fragment = 0
}

// next returns the next event of data, and the bytes after it. text says which opcode data messages must have, limit how long they
// may be, tick the time. With wsMore, rest is empty.
func (r *wsReader) next(data []byte, text bool, limit int, tick uint32) (ev wsEvent, rest []byte) {
	r.releaseSpent()
	if len(data) > 0 && !r.pending() {
		r.since = tick
	}
	frame, h, rest, bad := r.frame(data, text, limit)
	switch {
	case bad != nil:
		return *bad, nil
	case frame == nil:
		return wsEvent{}, nil
	}
	payload := frame[h.size:]
	ws.Cipher(payload, h.mask, 0)
	if h.op.IsControl() {
		return control(h.op, payload), rest
	}
	return r.data(h, payload, text), rest
}

func (r *wsReader) releaseSpent() {
	if !r.spent {
		return
	}
	r.spent = false
	r.releasePartial()
	if r.fragment == 0 {
		r.releaseMessage()
	}
}

// frame returns the next complete frame, header included, of what was kept and of data. Without one it keeps
// all of data and returns nil.
func (r *wsReader) frame(data []byte, text bool, limit int) (frame []byte, h wsHeader, rest []byte, bad *wsEvent) {
	if r.partial == nil {
		if h, bad = r.header(data, text, limit); bad != nil {
			return nil, h, nil, bad
		}
		if h.size > 0 && len(data)-h.size >= h.length {
			n := h.size + h.length
			return data[:n:n], h, data[n:], nil
		}
		if len(data) > 0 {
			r.partial = inputs.Get()
			r.partial.B = append(r.partial.B, data...)
		}
		return nil, h, nil, nil
	}
	for {
		if h, bad = r.header(r.partial.B, text, limit); bad != nil {
			return nil, h, nil, bad
		}
		// Without a header at least one more byte is needed to know how many are.
		missing := 1
		if h.size > 0 {
			missing = h.size + h.length - len(r.partial.B)
		}
		if missing == 0 {
			r.spent = true
			return r.partial.B, h, data, nil
		}
		if len(data) == 0 {
			return nil, h, nil, nil
		}
		n := min(missing, len(data))
		r.partial.B = append(r.partial.B, data[:n]...)
		data = data[n:]
	}
}

// wsHeader is a frame header that was checked.
type wsHeader struct {
	op     ws.OpCode
	fin    bool
	mask   [4]byte
	size   int // of the header itself; 0: not all of it is there
	length int // of the payload
}

// header reads and judges the header at the start of b, each part as soon as it is there.
func (r *wsReader) header(b []byte, text bool, limit int) (h wsHeader, bad *wsEvent) {
	if len(b) < 2 {
		return h, nil
	}
	h.op, h.fin = ws.OpCode(b[0]&0x0f), b[0]&0x80 != 0
	if bad = r.judge(b[0], b[1], text); bad != nil {
		return h, bad
	}
	length, size := uint64(b[1]&0x7f), 2
	switch length {
	case 126:
		if size = 4; len(b) < size {
			return h, nil
		}
		if length = uint64(binary.BigEndian.Uint16(b[2:])); length < 126 {
			return h, refused(protocol.CloseProtocolError, "frame length is not minimal")
		}
	case 127:
		if size = 10; len(b) < size {
			return h, nil
		}
		length = binary.BigEndian.Uint64(b[2:])
		if length>>63 != 0 || length <= 0xffff {
			return h, refused(protocol.CloseProtocolError, "frame length is malformed or not minimal")
		}
	}
	if !h.op.IsControl() && length > uint64(limit-r.messageBytes()) {
		return h, refused(protocol.CloseTooBig, "message is too long")
	}
	if len(b) < size+4 {
		return h, nil
	}
	copy(h.mask[:], b[size:])
	h.size, h.length = size+4, int(length)
	return h, nil
}

func (r *wsReader) messageBytes() int {
	if r.message == nil {
		return 0
	}
	return len(r.message.B)
}

// judge looks at the two bytes that every header has.
func (r *wsReader) judge(b0, b1 byte, text bool) *wsEvent {
	state := ws.StateServerSide
	if r.fragment > 0 {
		state = state.Set(ws.StateFragmented)
	}
	op := ws.OpCode(b0 & 0x0f)
	err := ws.CheckHeader(ws.Header{
		Fin:    b0&0x80 != 0,
		Rsv:    b0 >> 4 & 7,
		OpCode: op,
		Masked: b1&0x80 != 0,
		Length: int64(b1 & 0x7f), // 126 and 127 are over the limit of a control frame too
	}, state)
	switch {
	case err != nil:
		return refused(protocol.CloseProtocolError, err.Error())
	case op == ws.OpText && !text:
		return refused(protocol.CloseUnsupported, "this subprotocol takes binary messages only")
	case op == ws.OpBinary && text:
		return refused(protocol.CloseUnsupported, "this subprotocol takes text messages only")
	case !op.IsControl() && r.fragment >= protocol.MaxFragments:
		return refused(protocol.CloseTooBig, "message has too many fragments")
	}
	return nil
}

func violation(code protocol.CloseCode, text string) wsEvent {
	return wsEvent{kind: wsViolation, code: code, text: text}
}

// refused is violation for who finds none in most frames: an event is too large to be handed up through every call.
func refused(code protocol.CloseCode, text string) *wsEvent {
	ev := violation(code, text)
	return &ev
}

// data handles a frame of a data message.
func (r *wsReader) data(h wsHeader, payload []byte, text bool) wsEvent {
	if r.fragment > 0 || !h.fin {
		if r.message == nil {
			r.message = inputs.Get()
		}
		r.message.B = append(r.message.B, payload...)
		r.fragment++
		if !h.fin {
			return wsEvent{kind: wsFragment}
		}
		payload, r.fragment, r.spent = r.message.B, 0, true
	}
	// Code points may be cut by fragments, so validity is judged on the whole message.
	if text && !utf8.Valid(payload) {
		return violation(protocol.CloseInvalidUTF8, "text is not valid UTF-8")
	}
	return wsEvent{kind: wsMessage, payload: payload}
}

func control(op ws.OpCode, payload []byte) wsEvent {
	switch op {
	case ws.OpPing:
		return wsEvent{kind: wsPing, payload: payload}
	case ws.OpPong:
		return wsEvent{kind: wsPong, payload: payload}
	}
	switch {
	case len(payload) == 0:
		return wsEvent{kind: wsClose}
	case len(payload) == 1:
		return violation(protocol.CloseProtocolError, "close frame with one byte")
	case !validCloseCode(binary.BigEndian.Uint16(payload)):
		return violation(protocol.CloseProtocolError, "invalid close code")
	case !utf8.Valid(payload[2:]):
		return violation(protocol.CloseInvalidUTF8, "close reason is not valid UTF-8")
	}
	return wsEvent{kind: wsClose, code: protocol.CloseCode(binary.BigEndian.Uint16(payload))}
}

// validCloseCode reports whether a peer may send code: RFC 6455 §7.4 and the IANA registry. (ws.CheckCloseFrameData does not
// know 1012 to 1014.)
func validCloseCode(code uint16) bool {
	switch {
	case code >= 3000 && code <= 4999:
		return true
	case code >= 1000 && code <= 1014:
		return code != 1004 && code != 1005 && code != 1006
	}
	return false
}

// dataHeaderBytes is reserved in front of a data message whose length is not known yet: the form for 126 to 65 535 bytes.
const dataHeaderBytes = 4

// sealData writes the header of the message that fills b from at+dataHeaderBytes to its end. Header lengths must be
// minimal, so a message under 126 bytes is moved by two.
func sealData(b []byte, at int, text bool) []byte {
	op := ws.OpBinary
	if text {
		op = ws.OpText
	}
	b[at] = 0x80 | byte(op)
	n := len(b) - at - dataHeaderBytes
	if n < 126 {
		b[at+1] = byte(n)
		copy(b[at+2:], b[at+dataHeaderBytes:])
		return b[:len(b)-2]
	}
	b[at+1] = 126
	binary.BigEndian.PutUint16(b[at+2:], uint16(n))
	return b
}

// appendControl appends a control frame; payload is cut to 125 bytes.
func appendControl(dst []byte, op ws.OpCode, payload []byte) []byte {
	payload = payload[:min(len(payload), ws.MaxControlFramePayloadSize)]
	dst = append(dst, 0x80|byte(op), byte(len(payload)))
	return append(dst, payload...)
}

// appendClose appends a close frame. Code 0 sends none.
func appendClose(dst []byte, code protocol.CloseCode, text string) []byte {
	if code == 0 {
		return append(dst, 0x80|byte(ws.OpClose), 0)
	}
	text = text[:min(len(text), ws.MaxControlFramePayloadSize-2)]
	dst = append(dst, 0x80|byte(ws.OpClose), byte(2+len(text)))
	dst = binary.BigEndian.AppendUint16(dst, uint16(code))
	return append(dst, text...)
}
