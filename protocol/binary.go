package protocol

import (
	"encoding/binary"
	"unicode/utf8"
)

// The binary encoding: kind, length of the body, body. doc.go draws every kind. The functions stand in the
// order in which a frame meets them: append (frame, fields), then parse (frame, fields).

// AppendBinary appends one binary frame to dst and returns the extended slice. It allocates only when dst has to
// grow. It panics when f is not a message: an unknown Kind, or a list that is empty or over its
// limit. Timestamps are clamped to 0…MaxTimestampMillis and an error's text is cut to MaxErrorTextBytes;
// everything else is written as it is, so content must be valid UTF-8.
func AppendBinary(dst []byte, f *Frame) []byte {
	dst, start := beginFrame(dst, f.Kind)
	switch f.Kind {
	case KindConnect:
		dst = appendBytes(dst, f.Token)
		dst = appendBytes(dst, f.Device)
		dst = binary.BigEndian.AppendUint64(dst, f.Epoch)
		dst = appendMillis(dst, f.ReceiptsAfter)
	case KindSend:
		dst = binary.AppendUvarint(dst, f.Seq)
		dst = appendMillis(dst, f.Timestamp)
		dst = appendBytes(dst, f.Receiver)
		dst = appendBytes(dst, f.Content)
	case KindAcknowledge:
		dst = appendMillis(dst, f.Timestamp)
		dst = appendIDs(dst, f.IDs)
	case KindRenewToken:
		dst = appendBytes(dst, f.Token)
	case KindConnected:
		dst = appendBytes(dst, f.User)
		dst = appendBytes(dst, f.Device)
		dst = binary.BigEndian.AppendUint64(dst, f.Epoch)
		dst = binary.AppendUvarint(dst, f.Seq)
		dst = binary.AppendUvarint(dst, uint64(f.HeartbeatSeconds))
		dst = appendMillis(dst, f.Timestamp)
	case KindReceived:
		dst = binary.AppendUvarint(dst, f.Seq)
		dst = append(dst, f.ID[:]...)
		dst = binary.AppendUvarint(dst, f.Position)
		dst = appendMillis(dst, f.Timestamp)
	case KindIncoming:
		dst = appendIncoming(dst, f.ID, f.Position, f.Sender, f.Receiver, f.Content)
	case KindReceipt:
		dst = appendReceipts(dst, f.Receipts)
	case KindError:
		dst = binary.AppendUvarint(dst, uint64(f.Code))
		dst = binary.AppendUvarint(dst, f.Seq)
		dst = binary.AppendUvarint(dst, f.ResendFrom)
		dst = binary.AppendUvarint(dst, uint64(f.RetryAfterMs))
		dst = appendBytes(dst, errorText(f.Text))
	case KindRenew:
		dst = binary.AppendUvarint(dst, uint64(max(f.ExpiresInMs, 0)))
	case KindRenewed:
	case KindGoAway:
		dst = binary.AppendUvarint(dst, uint64(f.RetryAfterMs))
	default:
		panic("protocol: AppendBinary of an unknown kind")
	}
	return endFrame(dst, start)
}

// AppendBinaryMessage appends the KindIncoming frame that delivers m. It is AppendBinary without
// turning the strings of a Message into byte slices first, which would allocate.
func AppendBinaryMessage(dst []byte, m *Message) []byte {
	dst, start := beginFrame(dst, KindIncoming)
	dst = appendIncoming(dst, m.ID, m.Position, m.Sender, m.Receiver, m.Content)
	return endFrame(dst, start)
}

// beginFrame writes the kind and one byte for the length of the body, enough for 127.
func beginFrame(dst []byte, kind Kind) ([]byte, int) {
	dst = append(dst, byte(kind), 0)
	return dst, len(dst)
}

// endFrame writes the length of the body that starts at start. A body over 127 bytes is moved to make
// room for the longer length: at most 64 KiB, and cheaper than a second function per kind that must agree
// with the first about every size.
func endFrame(dst []byte, start int) []byte {
	n := len(dst) - start
	if n < 0x80 {
		dst[start-1] = byte(n)
		return dst
	}
	var length [binary.MaxVarintLen64]byte
	k := binary.PutUvarint(length[:], uint64(n))
	dst = append(dst, length[1:k]...)
	copy(dst[start-1+k:], dst[start:start+n])
	copy(dst[start-1:], length[:k])
	return dst
}

func appendBytes[T string | []byte](dst []byte, b T) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(b)))
	return append(dst, b...)
}

func appendMillis(dst []byte, ms int64) []byte {
	return binary.AppendUvarint(dst, uint64(clampMillis(ms)))
}

// clampMillis keeps a client with a clock before 1970 or after 2109 able to talk: its timestamps
// are informative, and a frame is not worth refusing for one.
func clampMillis(ms int64) int64 { return min(max(ms, 0), MaxTimestampMillis) }

func appendIDs(dst []byte, ids []MessageID) []byte {
	if len(ids) == 0 || len(ids) > MaxIDsPerFrame {
		panic("protocol: an acknowledgement names no id or too many")
	}
	dst = binary.AppendUvarint(dst, uint64(len(ids)))
	for i := range ids {
		dst = append(dst, ids[i][:]...)
	}
	return dst
}

func appendIncoming[T string | []byte](dst []byte, id MessageID, position uint64, sender, receiver T, content []byte) []byte {
	dst = append(dst, id[:]...)
	dst = binary.AppendUvarint(dst, position)
	dst = appendBytes(dst, sender)
	dst = appendBytes(dst, receiver)
	return appendBytes(dst, content)
}

func appendReceipts(dst []byte, receipts []Receipt) []byte {
	if len(receipts) == 0 || len(receipts) > MaxReceiptsPerFrame {
		panic("protocol: a receipt frame has no receipt or too many")
	}
	dst = binary.AppendUvarint(dst, uint64(len(receipts)))
	for i := range receipts {
		r := &receipts[i]
		dst = append(dst, r.ID[:]...)
		dst = binary.AppendUvarint(dst, r.Position)
		dst = binary.AppendUvarint(dst, r.Seq)
		dst = appendMillis(dst, r.Timestamp)
		dst = appendBytes(dst, r.Receiver)
	}
	return dst
}

// errorText is text cut to its limit, between code points.
func errorText(text []byte) []byte {
	if len(text) <= MaxErrorTextBytes {
		return text
	}
	n := MaxErrorTextBytes
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

// What can be wrong with a binary frame. The values are shared: a FrameError is never changed.
var (
	errFraming     = &FrameError{Code: CodeBadRequest, Text: "frame length is malformed or runs past the end of the WebSocket message"}
	errUnknownKind = &FrameError{Code: CodeUnknownAction, Text: "unknown frame kind"}
	errShort       = &FrameError{Code: CodeBadRequest, Text: "a field runs past the end of its frame"}
	errVarint      = &FrameError{Code: CodeBadRequest, Text: "an integer is not a minimal uvarint"}
	errRange       = &FrameError{Code: CodeBadRequest, Text: "an integer is over its limit"}
	errCount       = &FrameError{Code: CodeBadRequest, Text: "a list is empty or over its limit"}
	errUTF8        = &FrameError{Code: CodeBadRequest, Text: "text is not valid UTF-8"}
	errName        = &FrameError{Code: CodeBadRequest, Text: "a user or device id is malformed"}
)

// ParseBinary reads the first frame of src, which is one WebSocket message or what is left of it, into
// f, and returns the bytes that follow. Frames of unknown ignorable kinds are passed over; when nothing else is in
// src, f.Kind is 0, rest is empty and err is nil. Both directions are read: it is the caller who
// refuses a kind that its peer may not send (Kind.FromServer).
//
// On an error the connection lives and f holds nothing but Kind and, for a send whose number could be read, Seq. When
// the frame's length was sound, rest are the frames that follow; when it was not, rest is empty,
// since nothing tells where the next frame begins.
//
// What a user can get wrong in a send (its number, receiver and content) is not checked here but by CheckSend. f's slices
// point into src. Nothing is allocated once f's lists have grown.
func ParseBinary(src []byte, f *Frame) (rest []byte, err *FrameError) {
	for len(src) > 0 {
		f.Reset()
		kind := Kind(src[0])
		n, size := uvarint(src[1:])
		if size == 0 || n > uint64(len(src)-1-size) {
			f.Kind = kind
			return nil, errFraming
		}
		body := src[1+size:][:n:n]
		src = src[1+size+int(n):]
		known, err := parseBody(kind, body, f)
		switch {
		case err != nil:
			seq := f.Seq
			f.Reset()
			f.Kind = kind
			if kind == KindSend {
				f.Seq = seq
			}
			return src, err
		case known:
			f.Kind = kind
			return src, nil
		case kind&KindIgnorable == 0:
			f.Kind = kind
			return src, errUnknownKind
		}
	}
	f.Reset()
	return nil, nil
}

// parseBody reads the fields of one kind. Bytes that follow them belong to a later version and are ignored.
func parseBody(kind Kind, body []byte, f *Frame) (known bool, err *FrameError) {
	r := fieldReader{b: body}
	switch kind {
	case KindConnect:
		f.Token = r.bytes()
		if f.Device = r.bytes(); len(f.Device) > 0 && !ValidDevice(f.Device) {
			r.fail(errName)
		}
		f.Epoch = r.fixed64()
		f.ReceiptsAfter = int64(r.uvarint(MaxReceiptsAfterMs))
	case KindSend:
		f.Seq = r.uvarint(MaxSeq)
		f.Timestamp = int64(r.uvarint(MaxTimestampMillis))
		f.Receiver = r.bytes()
		f.Content = r.text()
	case KindAcknowledge:
		f.Timestamp = int64(r.uvarint(MaxTimestampMillis))
		for range r.count(MaxIDsPerFrame) {
			f.IDs = append(f.IDs, r.id())
		}
	case KindRenewToken:
		f.Token = r.bytes()
	case KindConnected:
		f.User = r.user()
		if f.Device = r.bytes(); !ValidDevice(f.Device) {
			r.fail(errName)
		}
		f.Epoch = r.fixed64()
		f.Seq = r.uvarint(MaxSeq)
		f.HeartbeatSeconds = uint32(r.uvarint(MaxHeartbeatSeconds))
		f.Timestamp = int64(r.uvarint(MaxTimestampMillis))
	case KindReceived:
		f.Seq = r.uvarint(MaxSeq)
		f.ID = r.id()
		f.Position = r.uvarint(MaxPosition)
		f.Timestamp = int64(r.uvarint(MaxTimestampMillis))
	case KindIncoming:
		f.ID = r.id()
		f.Position = r.uvarint(MaxPosition)
		f.Timestamp = PositionMillis(f.Position)
		f.Sender = r.user()
		f.Receiver = r.user()
		f.Content = r.text()
	case KindReceipt:
		for range r.count(MaxReceiptsPerFrame) {
			f.Receipts = append(f.Receipts, Receipt{
				ID:        r.id(),
				Position:  r.uvarint(MaxPosition),
				Seq:       r.uvarint(MaxSeq),
				Timestamp: int64(r.uvarint(MaxTimestampMillis)),
				Receiver:  r.user(),
			})
		}
	case KindError:
		f.Code = Code(r.uvarint(uint64(CodeUnknown)))
		f.Seq = r.uvarint(MaxSeq)
		f.ResendFrom = r.uvarint(MaxSeq)
		f.RetryAfterMs = uint32(r.uvarint(MaxRetryAfterMillis))
		f.Text = r.text()
	case KindRenew:
		f.ExpiresInMs = int64(r.uvarint(MaxExpiresInMillis))
	case KindRenewed:
	case KindGoAway:
		f.RetryAfterMs = uint32(r.uvarint(MaxRetryAfterMillis))
	default:
		return false, nil
	}
	return true, r.err
}

// fieldReader reads the fields of a body in turn. After its first error it returns zeros.
type fieldReader struct {
	b   []byte
	err *FrameError
}

func (r *fieldReader) fail(err *FrameError) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

func (r *fieldReader) uvarint(limit uint64) uint64 {
	v, size := uvarint(r.b)
	switch {
	case len(r.b) == 0:
		r.fail(errShort)
		return 0
	case size == 0:
		r.fail(errVarint)
		return 0
	case v > limit:
		r.fail(errRange)
		return 0
	}
	r.b = r.b[size:]
	return v
}

func (r *fieldReader) fixed64() uint64 {
	if len(r.b) < 8 {
		r.fail(errShort)
		return 0
	}
	v := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

func (r *fieldReader) id() (id MessageID) {
	if len(r.b) < len(id) {
		r.fail(errShort)
		return id
	}
	r.b = r.b[copy(id[:], r.b):]
	return id
}

func (r *fieldReader) bytes() []byte {
	n := r.uvarint(1<<64 - 1)
	if n > uint64(len(r.b)) {
		r.fail(errShort)
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *fieldReader) text() []byte {
	b := r.bytes()
	if !utf8.Valid(b) {
		r.fail(errUTF8)
		return nil
	}
	return b
}

func (r *fieldReader) user() []byte {
	b := r.bytes()
	if !ValidUser(b) {
		r.fail(errName)
		return nil
	}
	return b
}

// count is the number of entries of a list. Each entry is at least an id, so a count that promises
// more than the body holds is refused before anything is stored.
func (r *fieldReader) count(limit uint64) uint64 {
	n := r.uvarint(1<<64 - 1)
	switch {
	case r.err != nil:
		return 0
	case n == 0 || n > limit:
		r.fail(errCount)
		return 0
	case n*uint64(len(MessageID{})) > uint64(len(r.b)):
		r.fail(errShort)
		return 0
	}
	return n
}

// uvarint reads a LEB128 integer: 7 bits a byte, least significant first, bit 7 set on all but the last. size is 0 when it is cut
// off, over 64 bits, or not minimal (a last byte of 0 adds nothing): one integer has one form, so that equal
// frames are equal bytes.
func uvarint(b []byte) (v uint64, size int) {
	if len(b) > 0 && b[0] < 0x80 {
		return uint64(b[0]), 1
	}
	v, size = binary.Uvarint(b)
	if size <= 0 || b[size-1] == 0 {
		return 0, 0
	}
	return v, size
}
