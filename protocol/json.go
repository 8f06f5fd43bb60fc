package protocol

import (
	"bytes"
	"math/bits"
	"strconv"
	"unicode/utf8"
)

// The JSON encoding: one flat object per message. This file says which keys a message has and what may
// be in them; jsonscan.go reads the objects.

// AppendJSON appends f as one JSON object, keys in the order of doc.go, without a newline after it. It allocates only
// when dst has to grow. JSON names one message per message_delivered, so a KindAcknowledge with several
// IDs becomes several objects with a newline between them, and a KindReceipt must hold exactly one receipt, because
// the server sends one object per WebSocket message. It panics when f is not a message: an unknown
// Kind, an empty list, several receipts.
//
// Left out are: an empty device, an epoch of 0, a position, message_id_by_client, resend_from or retry_after_ms of 0 (of
// go_away and connected: never). Bytes that are not UTF-8 are written as U+FFFD.
func AppendJSON(dst []byte, f *Frame) []byte {
	switch f.Kind {
	case KindConnect:
		dst = append(dst, `{"action":"connect","token":`...)
		dst = appendJSONString(dst, f.Token)
		if len(f.Device) > 0 {
			dst = append(dst, `,"device":`...)
			dst = appendJSONString(dst, f.Device)
		}
		if f.Epoch != 0 {
			dst = append(dst, `,"epoch":`...)
			dst = appendEpoch(dst, f.Epoch)
		}
		dst = appendJSONMillis(dst, `,"receipts_after":`, f.ReceiptsAfter)
	case KindSend:
		dst = append(dst, `{"action":"send_message","receiver_id":`...)
		dst = appendJSONString(dst, f.Receiver)
		dst = append(dst, `,"content":`...)
		dst = appendJSONString(dst, f.Content)
		dst = appendJSONNumber(dst, `,"message_id_by_client":`, f.Seq)
		dst = appendJSONMillis(dst, `,"timestamp":`, f.Timestamp)
	case KindAcknowledge:
		return appendJSONAcknowledgements(dst, f)
	case KindRenewToken:
		dst = append(dst, `{"action":"renew","token":`...)
		dst = appendJSONString(dst, f.Token)
	case KindConnected:
		dst = append(dst, `{"type":"connected","user_id":`...)
		dst = appendJSONString(dst, f.User)
		dst = append(dst, `,"device":`...)
		dst = appendJSONString(dst, f.Device)
		dst = append(dst, `,"epoch":`...)
		dst = appendEpoch(dst, f.Epoch)
		dst = appendJSONNumber(dst, `,"next_message_id_by_client":`, f.Seq)
		dst = appendJSONNumber(dst, `,"heartbeat_seconds":`, uint64(f.HeartbeatSeconds))
		dst = appendJSONMillis(dst, `,"timestamp":`, f.Timestamp)
	case KindReceived:
		dst = append(dst, `{"action":"message_received","message_id":`...)
		dst = appendJSONID(dst, f.ID)
		dst = appendJSONNumber(dst, `,"message_id_by_client":`, f.Seq)
		dst = appendJSONUnlessZero(dst, `,"position":`, f.Position)
		dst = appendJSONMillis(dst, `,"timestamp":`, f.Timestamp)
	case KindIncoming:
		return appendJSONIncoming(dst, f.ID, f.Position, f.Sender, f.Receiver, f.Content)
	case KindReceipt:
		dst = appendJSONReceipt(dst, f)
	case KindError:
		dst = append(dst, `{"type":"error","code":"`...)
		dst = append(dst, f.Code.String()...)
		dst = append(dst, `","text":`...)
		dst = appendJSONString(dst, errorText(f.Text))
		dst = appendJSONUnlessZero(dst, `,"message_id_by_client":`, f.Seq)
		dst = appendJSONUnlessZero(dst, `,"resend_from":`, f.ResendFrom)
		dst = appendJSONUnlessZero(dst, `,"retry_after_ms":`, uint64(f.RetryAfterMs))
	case KindRenew:
		dst = appendJSONNumber(dst, `{"type":"renew","expires_in_ms":`, uint64(max(f.ExpiresInMs, 0)))
	case KindRenewed:
		dst = append(dst, `{"type":"renewed"`...)
	case KindGoAway:
		dst = appendJSONNumber(dst, `{"type":"go_away","retry_after_ms":`, uint64(f.RetryAfterMs))
	default:
		panic("protocol: AppendJSON of an unknown kind")
	}
	return append(dst, '}')
}

// AppendJSONMessage appends the incoming_message that delivers m. It is AppendJSON without turning the strings
// of a Message into byte slices first, which would allocate.
func AppendJSONMessage(dst []byte, m *Message) []byte {
	return appendJSONIncoming(dst, m.ID, m.Position, m.Sender, m.Receiver, m.Content)
}

func appendJSONIncoming[T string | []byte](dst []byte, id MessageID, position uint64, sender, receiver T, content []byte) []byte {
	dst = append(dst, `{"type":"incoming_message","message_id":`...)
	dst = appendJSONID(dst, id)
	dst = appendJSONNumber(dst, `,"position":`, position)
	dst = append(dst, `,"sender_id":`...)
	dst = appendJSONString(dst, sender)
	dst = append(dst, `,"receiver_id":`...)
	dst = appendJSONString(dst, receiver)
	dst = append(dst, `,"content":`...)
	dst = appendJSONString(dst, content)
	dst = appendJSONMillis(dst, `,"timestamp":`, PositionMillis(position))
	return append(dst, '}')
}

func appendJSONAcknowledgements(dst []byte, f *Frame) []byte {
	if len(f.IDs) == 0 || len(f.IDs) > MaxIDsPerFrame {
		panic("protocol: an acknowledgement names no id or too many")
	}
	for i := range f.IDs {
		if i > 0 {
			dst = append(dst, '\n')
		}
		dst = append(dst, `{"type":"message_delivered","message_id":`...)
		dst = appendJSONID(dst, f.IDs[i])
		dst = appendJSONMillis(dst, `,"timestamp":`, f.Timestamp)
		dst = append(dst, '}')
	}
	return dst
}

func appendJSONReceipt(dst []byte, f *Frame) []byte {
	if len(f.Receipts) != 1 {
		panic("protocol: a JSON receipt is exactly one")
	}
	r := &f.Receipts[0]
	dst = append(dst, `{"type":"message_delivered","message_id":`...)
	dst = appendJSONID(dst, r.ID)
	dst = appendJSONUnlessZero(dst, `,"position":`, r.Position)
	dst = appendJSONUnlessZero(dst, `,"message_id_by_client":`, r.Seq)
	dst = append(dst, `,"receiver_id":`...)
	dst = appendJSONString(dst, r.Receiver)
	return appendJSONMillis(dst, `,"timestamp":`, r.Timestamp)
}

func appendJSONNumber(dst []byte, key string, v uint64) []byte {
	dst = append(dst, key...)
	return strconv.AppendUint(dst, v, 10)
}

func appendJSONUnlessZero(dst []byte, key string, v uint64) []byte {
	if v == 0 {
		return dst
	}
	return appendJSONNumber(dst, key, v)
}

func appendJSONMillis(dst []byte, key string, ms int64) []byte {
	return appendJSONNumber(dst, key, uint64(clampMillis(ms)))
}

func appendJSONID(dst []byte, id MessageID) []byte {
	dst = append(dst, '"')
	dst = id.AppendText(dst)
	return append(dst, '"')
}

const hexDigits = "0123456789abcdef"

func appendEpoch(dst []byte, epoch uint64) []byte {
	dst = append(dst, '"')
	for shift := 60; shift >= 0; shift -= 4 {
		dst = append(dst, hexDigits[epoch>>shift&15])
	}
	return append(dst, '"')
}

// appendJSONString escapes what RFC 8259 demands and nothing else: quotation mark, reverse solidus and controls.
func appendJSONString[T string | []byte](dst []byte, s T) []byte {
	valid := validUTF8(s)
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= 0x20 && c != '"' && c != '\\' && (valid || c < utf8.RuneSelf) {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			if r, size := decodeRune(s, i); r != utf8.RuneError || size > 1 {
				i += size
				continue
			}
		}
		dst = append(dst, s[start:i]...)
		dst = appendJSONEscape(dst, c)
		i++
		start = i
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}

func validUTF8[T string | []byte](s T) bool {
	switch s := any(s).(type) {
	case string:
		return utf8.ValidString(s)
	case []byte:
		return utf8.Valid(s)
	}
	return false
}

// decodeRune decodes the code point at s[i:] of either type without allocating.
func decodeRune[T string | []byte](s T, i int) (rune, int) {
	var b [utf8.UTFMax]byte
	return utf8.DecodeRune(b[:copy(b[:], s[i:])])
}

// appendJSONEscape writes the byte c that may not stand in a string; c ≥ 0x80 is not UTF-8.
func appendJSONEscape(dst []byte, c byte) []byte {
	switch {
	case c == '"' || c == '\\':
		return append(dst, '\\', c)
	case c == '\n':
		return append(dst, '\\', 'n')
	case c == '\r':
		return append(dst, '\\', 'r')
	case c == '\t':
		return append(dst, '\\', 't')
	case c < 0x20:
		return append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
	}
	return append(dst, `\ufffd`...)
}

// jsonKey is a key that some message knows.
type jsonKey uint8

const (
	keyAction jsonKey = iota
	keyType
	keyToken
	keyDevice
	keyEpoch
	keyReceiptsAfter
	keyUser
	keyNextSeq
	keyHeartbeat
	keyTimestamp
	keySender
	keyReceiver
	keyContent
	keyMessageID
	keySeq
	keyPosition
	keyCode
	keyText
	keyResendFrom
	keyRetryAfter
	keyExpiresIn
	keyCount
)

const keyUnknown = keyCount

// jsonKeys holds each key's name and, for a number, its limit; 0 means that the value is a string.
var jsonKeys = [keyCount]struct {
	name  string
	limit uint64
}{
	keyAction:        {"action", 0},
	keyType:          {"type", 0},
	keyToken:         {"token", 0},
	keyDevice:        {"device", 0},
	keyEpoch:         {"epoch", 0},
	keyReceiptsAfter: {"receipts_after", MaxReceiptsAfterMs},
	keyUser:          {"user_id", 0},
	keyNextSeq:       {"next_message_id_by_client", MaxSeq},
	keyHeartbeat:     {"heartbeat_seconds", MaxHeartbeatSeconds},
	keyTimestamp:     {"timestamp", MaxTimestampMillis},
	keySender:        {"sender_id", 0},
	keyReceiver:      {"receiver_id", 0},
	keyContent:       {"content", 0},
	keyMessageID:     {"message_id", 0},
	keySeq:           {"message_id_by_client", MaxSeq},
	keyPosition:      {"position", MaxPosition},
	keyCode:          {"code", 0},
	keyText:          {"text", 0},
	keyResendFrom:    {"resend_from", MaxSeq},
	keyRetryAfter:    {"retry_after_ms", MaxRetryAfterMillis},
	keyExpiresIn:     {"expires_in_ms", MaxExpiresInMillis},
}

func lookupKey(name []byte) jsonKey {
	switch string(name) {
	case "action":
		return keyAction
	case "type":
		return keyType
	case "token":
		return keyToken
	case "device":
		return keyDevice
	case "epoch":
		return keyEpoch
	case "receipts_after":
		return keyReceiptsAfter
	case "user_id":
		return keyUser
	case "next_message_id_by_client":
		return keyNextSeq
	case "heartbeat_seconds":
		return keyHeartbeat
	case "timestamp":
		return keyTimestamp
	case "sender_id":
		return keySender
	case "receiver_id":
		return keyReceiver
	case "content":
		return keyContent
	case "message_id":
		return keyMessageID
	case "message_id_by_client":
		return keySeq
	case "position":
		return keyPosition
	case "code":
		return keyCode
	case "text":
		return keyText
	case "resend_from":
		return keyResendFrom
	case "retry_after_ms":
		return keyRetryAfter
	case "expires_in_ms":
		return keyExpiresIn
	}
	return keyUnknown
}

// keySet is a set of keys, one bit each.
type keySet uint32

func keys(list ...jsonKey) (s keySet) {
	for _, k := range list {
		s |= 1 << k
	}
	return s
}

func (s keySet) has(k jsonKey) bool { return s>>k&1 == 1 }
func (s keySet) first() jsonKey     { return jsonKey(bits.TrailingZeros32(uint32(s))) }

// jsonMessage is one message: its name, and the keys that it must and may have. Every other key
// is unknown to it and ignored, whatever its value.
type jsonMessage struct {
	name  string
	kind  Kind
	needs keySet
	takes keySet // besides needs
}

// A send may lack its receiver or its content: CheckSend says so with a code of its own. A connect
// may lack its token: that is unauthorized, not malformed.
var fromClientJSON = []jsonMessage{
	{"send_message", KindSend, keys(keySeq), keys(keyReceiver, keyContent, keyTimestamp)},
	{"message_delivered", KindAcknowledge, keys(keyMessageID), keys(keyTimestamp)},
	{"connect", KindConnect, 0, keys(keyToken, keyDevice, keyEpoch, keyReceiptsAfter)},
	{"renew", KindRenewToken, 0, keys(keyToken)},
}

var fromServerJSON = []jsonMessage{
	{"incoming_message", KindIncoming, keys(keyMessageID, keyPosition, keySender, keyReceiver, keyContent), 0},
	{"message_received", KindReceived, keys(keyMessageID, keySeq), keys(keyPosition, keyTimestamp)},
	{"message_delivered", KindReceipt, keys(keyMessageID, keyReceiver), keys(keyPosition, keySeq, keyTimestamp)},
	{"error", KindError, keys(keyCode), keys(keyText, keySeq, keyResendFrom, keyRetryAfter)},
	{"connected", KindConnected, keys(keyUser, keyDevice, keyEpoch, keyNextSeq), keys(keyHeartbeat, keyTimestamp)},
	{"renew", KindRenew, keys(keyExpiresIn), 0},
	{"renewed", KindRenewed, 0, 0},
	{"go_away", KindGoAway, 0, keys(keyRetryAfter)},
}

func lookupMessage(name []byte, fromServer bool) *jsonMessage {
	list := fromClientJSON
	if fromServer {
		list = fromServerJSON
	}
	for i := range list {
		if string(name) == list[i].name {
			return &list[i]
		}
	}
	return nil
}

// What can be wrong with a JSON object as a whole.
var (
	errJSONSyntax     = &FrameError{Code: CodeBadRequest, Text: "not a JSON object"}
	errJSONDepth      = &FrameError{Code: CodeBadRequest, Text: "JSON is nested too deeply"}
	errJSONTrailing   = &FrameError{Code: CodeBadRequest, Text: "an object must be followed by a newline or by nothing"}
	errJSONNoAction   = &FrameError{Code: CodeBadRequest, Text: "neither action nor type"}
	errJSONTwoActions = &FrameError{Code: CodeBadRequest, Text: "action and type do not agree"}
	errUnknownAction  = &FrameError{Code: CodeUnknownAction, Text: "unknown action"}
)

// errBadKey and errNoKey are made once for every key, so that a refusal names the key and allocates nothing.
var errBadKey, errNoKey = func() (bad, none [keyCount]*FrameError) {
	for k := range jsonKeys {
		name := jsonKeys[k].name
		bad[k] = &FrameError{Code: CodeBadRequest, Text: name + " is malformed, over its limit or given twice"}
		none[k] = &FrameError{Code: CodeBadRequest, Text: name + " is missing"}
	}
	return bad, none
}()

// ParseJSON reads the first object of src, which is one WebSocket message or what is left of it, into f, and returns the
// bytes that follow it. Objects are separated by newlines; blank lines are passed over. When only white space is left,
// f.Kind is 0, rest is empty and err is nil. fromServer says whose messages src holds; an object from a server
// with a type of a later version is passed over too.
//
// On an error the connection lives and f holds nothing but Kind, where the object could be read far enough to know
// it, and for a send Seq, where its number could be. rest is what follows the object if its end could be found, else
// what follows the next newline.
//
// What a user can get wrong in a send (its number, receiver and content) is not checked here but by CheckSend. f's
// slices point into src, or into f.Arena where a string had escapes. Nothing is allocated once f has grown to the
// size of the input.
func ParseJSON(src []byte, fromServer bool, f *Frame) (rest []byte, err *FrameError) {
	for {
		f.Reset()
		s := scanner{src: src, arena: f.Arena}
		s.skipSpace()
		if s.pos == len(src) {
			return nil, nil
		}
		var o jsonObject
		err = s.object(&o)
		f.Arena = s.arena
		if err == nil {
			err = s.endOfLine()
		}
		if err != nil {
			o.identify(fromServer, f)
			return afterLine(src[s.pos:]), err
		}
		src = src[s.pos:]
		err = o.message(fromServer, f)
		if err != nil || f.Kind != 0 {
			return src, err
		}
	}
}

// afterLine is what follows the next newline.
func afterLine(b []byte) []byte {
	i := bytes.IndexByte(b, '\n')
	if i < 0 {
		return nil
	}
	return b[i+1:]
}

// jsonObject is what the scanner found under the keys it knows.
type jsonObject struct {
	seen    keySet // given, null included
	present keySet // given and not null
	bad     keySet // wrong type, over the limit, not Unicode, or given twice
	values  [keyCount]jsonValue
}

type jsonValue struct {
	text   []byte
	number uint64
}

// action finds which message the object is. m is nil without an error for a type of a later server.
func (o *jsonObject) action(fromServer bool) (m *jsonMessage, err *FrameError) {
	both := o.present & keys(keyAction, keyType)
	switch {
	case o.bad&keys(keyAction, keyType) != 0:
		return nil, errBadKey[(o.bad & keys(keyAction, keyType)).first()]
	case both == 0:
		return nil, errJSONNoAction
	case both == keys(keyAction, keyType) && !bytes.Equal(o.values[keyAction].text, o.values[keyType].text):
		return nil, errJSONTwoActions
	}
	m = lookupMessage(o.values[both.first()].text, fromServer)
	if m == nil && !fromServer {
		return nil, errUnknownAction
	}
	return m, nil
}

// identify sets what an error frame about a broken object can name.
func (o *jsonObject) identify(fromServer bool, f *Frame) {
	f.Reset()
	m, _ := o.action(fromServer)
	if m == nil {
		return
	}
	f.Kind = m.kind
	if m.kind == KindSend && !o.bad.has(keySeq) {
		f.Seq = o.values[keySeq].number
	}
}

// message fills f. It leaves f.Kind 0 without an error when the object is of a type that a client skips.
func (o *jsonObject) message(fromServer bool, f *Frame) *FrameError {
	m, err := o.action(fromServer)
	if m == nil {
		return err
	}
	if bad := o.bad & (m.needs | m.takes); bad != 0 {
		err = errBadKey[bad.first()]
	} else if missing := m.needs &^ o.present; missing != 0 {
		err = errNoKey[missing.first()]
	} else {
		f.Kind = m.kind
		err = o.fill(f)
	}
	if err != nil {
		o.identify(fromServer, f)
	}
	return err
}

func (o *jsonObject) text(k jsonKey) []byte   { return o.values[k].text }
func (o *jsonObject) number(k jsonKey) uint64 { return o.values[k].number }
func (o *jsonObject) millis(k jsonKey) int64  { return int64(o.values[k].number) }

// fill copies the values of f.Kind's keys into f and checks those that are more than a string or a number.
func (o *jsonObject) fill(f *Frame) *FrameError {
	switch f.Kind {
	case KindConnect:
		f.Token = o.text(keyToken)
		f.Device = o.text(keyDevice)
		f.ReceiptsAfter = o.millis(keyReceiptsAfter)
		if len(f.Device) > 0 && !ValidDevice(f.Device) {
			return errBadKey[keyDevice]
		}
		return o.epoch(f)
	case KindSend:
		f.Receiver = o.text(keyReceiver)
		f.Content = o.text(keyContent)
		f.Seq = o.number(keySeq)
		f.Timestamp = o.millis(keyTimestamp)
	case KindAcknowledge:
		f.Timestamp = o.millis(keyTimestamp)
		id, err := o.messageID()
		f.IDs = append(f.IDs, id)
		return err
	case KindRenewToken:
		f.Token = o.text(keyToken)
	case KindConnected:
		f.User = o.text(keyUser)
		f.Device = o.text(keyDevice)
		f.Seq = o.number(keyNextSeq)
		f.HeartbeatSeconds = uint32(o.number(keyHeartbeat))
		f.Timestamp = o.millis(keyTimestamp)
		if !ValidDevice(f.Device) {
			return errBadKey[keyDevice]
		}
		return firstError(o.user(keyUser), o.epoch(f))
	case KindReceived:
		f.Seq = o.number(keySeq)
		f.Position = o.number(keyPosition)
		f.Timestamp = o.millis(keyTimestamp)
		return o.setID(f)
	case KindIncoming:
		f.Position = o.number(keyPosition)
		f.Timestamp = PositionMillis(f.Position)
		f.Sender = o.text(keySender)
		f.Receiver = o.text(keyReceiver)
		f.Content = o.text(keyContent)
		return firstError(o.user(keySender), o.user(keyReceiver), o.setID(f))
	case KindReceipt:
		id, err := o.messageID()
		f.Receipts = append(f.Receipts, Receipt{
			ID:        id,
			Position:  o.number(keyPosition),
			Seq:       o.number(keySeq),
			Timestamp: o.millis(keyTimestamp),
			Receiver:  o.text(keyReceiver),
		})
		return firstError(err, o.user(keyReceiver))
	case KindError:
		f.Code = CodeUnknown
		if code, ok := CodeByName(o.text(keyCode)); ok {
			f.Code = code
		}
		f.Text = o.text(keyText)
		f.Seq = o.number(keySeq)
		f.ResendFrom = o.number(keyResendFrom)
		f.RetryAfterMs = uint32(o.number(keyRetryAfter))
	case KindRenew:
		f.ExpiresInMs = o.millis(keyExpiresIn)
	case KindGoAway:
		f.RetryAfterMs = uint32(o.number(keyRetryAfter))
	}
	return nil
}

// firstError is the first error of several.
func firstError(errs ...*FrameError) *FrameError {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (o *jsonObject) user(k jsonKey) *FrameError {
	if !ValidUser(o.text(k)) {
		return errBadKey[k]
	}
	return nil
}

func (o *jsonObject) setID(f *Frame) (err *FrameError) {
	f.ID, err = o.messageID()
	return err
}

func (o *jsonObject) messageID() (MessageID, *FrameError) {
	id, err := ParseMessageID(o.text(keyMessageID))
	if err != nil {
		return id, errBadKey[keyMessageID]
	}
	return id, nil
}

// epoch reads 16 hex digits. Left out it is 0, for which the server makes one.
func (o *jsonObject) epoch(f *Frame) *FrameError {
	if !o.present.has(keyEpoch) {
		return nil
	}
	text := o.text(keyEpoch)
	if len(text) != 16 {
		return errBadKey[keyEpoch]
	}
	v, ok := parseHex(text)
	if !ok {
		return errBadKey[keyEpoch]
	}
	f.Epoch = v
	return nil
}

// parseHex reads up to 16 hex digits of either case.
func parseHex(text []byte) (v uint64, ok bool) {
	for _, c := range text {
		switch {
		case '0' <= c && c <= '9':
			v = v<<4 | uint64(c-'0')
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			v = v<<4 | uint64(c|0x20-'a'+10)
		default:
			return 0, false
		}
	}
	return v, true
}
