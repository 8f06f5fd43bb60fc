package client

import (
	"github.com/gobwas/ws"

	"millrace/protocol"
)

// Encoding is which of the two subprotocols a client speaks. They mean the same.
type Encoding uint8

const (
	Binary Encoding = iota // protocol.SubprotocolBinary: the fast one
	JSON                   // protocol.SubprotocolJSON
)

func (e Encoding) subprotocol() string {
	if e == JSON {
		return protocol.SubprotocolJSON
	}
	return protocol.SubprotocolBinary
}

func (e Encoding) opcode() ws.OpCode {
	if e == JSON {
		return ws.OpText
	}
	return ws.OpBinary
}

// maxMessage is how long a WebSocket message to the server may be.
func (e Encoding) maxMessage() int {
	if e == JSON {
		return protocol.MaxJSONFrameBytes
	}
	return protocol.MaxBinaryFrameBytes
}

func (e Encoding) append(dst []byte, f *protocol.Frame) []byte {
	if e == JSON {
		return protocol.AppendJSON(dst, f)
	}
	return protocol.AppendBinary(dst, f)
}

func (e Encoding) parse(src []byte, f *protocol.Frame) (rest []byte, err *protocol.FrameError) {
	if e == JSON {
		return protocol.ParseJSON(src, true, f)
	}
	return protocol.ParseBinary(src, f)
}
