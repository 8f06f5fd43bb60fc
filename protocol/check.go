package protocol

import "unicode/utf8"

// CheckSend says whether a parsed KindSend can be accepted, by its bytes alone. The zero Refusal means yes. All its
// refusals are final: the same bytes are refused again, on any connection. When several things are wrong the first
// of this order is named:
//
//  1. bad_request: message_id_by_client is not a number that a client can have (ValidSeq)
//  2. bad_receiver: receiver_id is not a user id (ValidUser)
//  3. empty_content: no character
//  4. content_too_long: over MaxContentBytes bytes or MaxContentRunes code points
//
// Content must be valid UTF-8, which both parsers have checked.
func CheckSend(f *Frame) Refusal {
	switch {
	case !ValidSeq(f.Seq):
		return Refusal{Code: CodeBadRequest}
	case !ValidUser(f.Receiver):
		return Refusal{Code: CodeBadReceiver}
	case len(f.Content) == 0:
		return Refusal{Code: CodeEmptyContent}
	case contentTooLong(f.Content):
		return Refusal{Code: CodeContentTooLong}
	}
	return Refusal{}
}

// contentTooLong counts code points only between the two limits: n bytes hold at most n of them. In valid UTF-8 they
// are the bytes that do not continue one; utf8.RuneCount would allocate a copy (Go 1.26, measured by TestAllocations).
func contentTooLong(content []byte) bool {
	switch {
	case len(content) <= MaxContentRunes:
		return false
	case len(content) > MaxContentBytes:
		return true
	}
	n := 0
	for _, c := range content {
		if utf8.RuneStart(c) {
			n++
		}
	}
	return n > MaxContentRunes
}
