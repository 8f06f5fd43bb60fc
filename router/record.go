package router

import (
	"encoding/binary"

	"millrace/protocol"
)

// record is one route in the arena, packed and little-endian:
//
//	+------------+------------+----------+----------------+----------+-----------+------+--------------+
//	| state (1B) | device(1B) | edge(4B) | generation(4B) | conn(8B) | login(8B) | user | own device   |
//	+------------+------------+----------+----------------+----------+-----------+------+--------------+
//
// state: bits 0–5 length of user − 1, bit 7 live. device: a number of the shard's device names, or deviceInRecord;
// then its length (1 B) and bytes follow the user. In a free record the first 4 bytes are the offset of the next.
type record []byte

const (
	atDevice     = 1
	atEdge       = 2
	atGeneration = 6
	atConn       = 10
	atLogin      = 18
	atUser       = 26

	stateLive    = 0x80
	stateUserLen = 0x3f

	minRecordBytes = atUser + 1
	maxRecordBytes = atUser + protocol.MaxUserBytes + 1 + protocol.MaxDeviceBytes
)

// The user's length less one must fit its six bits.
const _ = uint(stateUserLen - (protocol.MaxUserBytes - 1))

// recordBytes is the length of a record with these names.
func recordBytes(user, device string, code uint8) int {
	n := atUser + len(user)
	if code == deviceInRecord {
		n += 1 + len(device)
	}
	return n
}

// setNames fills a zeroed record.
func (r record) setNames(user, device string, code uint8) {
	r[0] = uint8(len(user) - 1)
	r[atDevice] = code
	n := atUser + copy(r[atUser:], user)
	if code == deviceInRecord {
		r[n] = uint8(len(device))
		copy(r[n+1:], device)
	}
}

func (r record) userEnd() int { return atUser + int(r[0]&stateUserLen) + 1 }

func (r record) user() []byte { return r[atUser:r.userEnd()] }

func (r record) device() uint8 { return r[atDevice] }

func (r record) ownDevice() []byte {
	n := r.userEnd()
	return r[n+1 : n+1+int(r[n])]
}

func (r record) bytes() int {
	n := r.userEnd()
	if r.device() == deviceInRecord {
		n += 1 + int(r[n])
	}
	return n
}

func (r record) session() protocol.Session {
	return protocol.Session{
		Edge:       binary.LittleEndian.Uint32(r[atEdge:]),
		Generation: binary.LittleEndian.Uint32(r[atGeneration:]),
		Conn:       binary.LittleEndian.Uint64(r[atConn:]),
	}
}

func (r record) setSession(s protocol.Session) {
	binary.LittleEndian.PutUint32(r[atEdge:], s.Edge)
	binary.LittleEndian.PutUint32(r[atGeneration:], s.Generation)
	binary.LittleEndian.PutUint64(r[atConn:], s.Conn)
}

func (r record) login() uint64 { return binary.LittleEndian.Uint64(r[atLogin:]) }

func (r record) setLogin(login uint64) { binary.LittleEndian.PutUint64(r[atLogin:], login) }

func (r record) live() bool { return r[0]&stateLive != 0 }

func (r record) setLive(live bool) {
	r[0] &^= stateLive
	if live {
		r[0] |= stateLive
	}
}

func (r record) nextFree() uint32 { return binary.LittleEndian.Uint32(r) }

func (r record) setNextFree(off uint32) { binary.LittleEndian.PutUint32(r, off) }
