package backend

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"sync"

	"millrace/protocol"
)

// SecretBytes is the length of an identity secret.
const SecretBytes = 32

// Identity makes message ids:
//
//	message_id = AES-128(K_id, tag80 ‖ client_seq48)
//	tag80      = the first 80 bits of HMAC-SHA-256(K_tag, user, device, epoch, conversation), each length-prefixed
//
// So every resend of a send has the same id, from any edge and with no shared state; ids of different sends
// differ (AES is a permutation, and tags of 80 bits of different streams or conversations collide with
// probability n²/2⁸¹); and an id can be neither forged nor linked to others, and does not show how many
// messages somebody sends. Both keys come by HKDF (RFC 5869) from one secret, made once and kept with
// the data: it must never change, or a resend would get a second id. Safe for concurrent use.
type Identity struct {
	block cipher.Block
	macs  sync.Pool // of *tagger; HMAC keys are set up once for each
}

type tagger struct {
	mac hash.Hash
	buf []byte
	sum [sha256.Size]byte
}

// NewIdentity derives the keys from a secret of SecretBytes bytes.
func NewIdentity(secret []byte) (*Identity, error) {
	if len(secret) != SecretBytes {
		return nil, fmt.Errorf("identity secret has %d bytes, want %d", len(secret), SecretBytes)
	}
	idKey, err := hkdf.Key(sha256.New, secret, nil, "millrace message id v1", 16)
	if err != nil {
		return nil, fmt.Errorf("derive id key: %w", err)
	}
	tagKey, err := hkdf.Key(sha256.New, secret, nil, "millrace stream tag v1", 32)
	if err != nil {
		return nil, fmt.Errorf("derive tag key: %w", err)
	}
	block, err := aes.NewCipher(idKey)
	if err != nil {
		return nil, fmt.Errorf("id cipher: %w", err)
	}
	id := &Identity{block: block}
	id.macs.New = func() any { return &tagger{mac: hmac.New(sha256.New, tagKey)} }
	return id, nil
}

// MessageID is the id of the send with this number of this stream in this conversation.
func (i *Identity) MessageID(s Stream, conversation string, seq uint64) (id protocol.MessageID) {
	t := i.macs.Get().(*tagger)
	b := appendPrefixed(t.buf[:0], s.User)
	b = appendPrefixed(b, s.Device)
	b = binary.BigEndian.AppendUint64(b, s.Epoch)
	b = appendPrefixed(b, conversation)
	t.buf = b
	t.mac.Reset()
	t.mac.Write(b)
	out := t.mac.Sum(t.sum[:0])[:len(id)] // id itself would escape to the heap
	out[10], out[11] = byte(seq>>40), byte(seq>>32)
	binary.BigEndian.PutUint32(out[12:], uint32(seq))
	i.block.Encrypt(out, out)
	copy(id[:], out)
	i.macs.Put(t)
	return id
}

func appendPrefixed(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}
