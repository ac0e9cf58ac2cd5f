package main

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// Opcodes (RFC 6455 §5.2).
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA
)

// A parser splits a server's bytes into frames (RFC 6455 §5.2), however they arrive. It keeps the first bytes of each
// message and the payload of each control frame, and skips the rest. With events, a message is the text of an event, and
// the parser skips events without text.
type parser struct {
	events      bool
	header      [10]byte // of the frame that is being parsed
	headerN     uint8
	inPayload   bool
	inMessage   bool   // a message has begun, so that only continuations are legal data frames
	idN         uint8  // bytes in id
	left        uint64 // bytes of the payload that are missing
	id          [idSize]byte
	controlData []byte // payload of the control frame, valid until the next
	textAt      int    // where the text of the last event began; less than len(textKey) if it had no text
	envelope    []byte // the beginning of an event that arrives in pieces, until id is complete
}

// A finding is the kind of thing that a parser has found.
type finding uint8

// The findings.
const (
	foundNothing finding = iota // all data is consumed
	foundMessage                // a message is complete and begins with id[:idN]; in an event JSON may follow a shorter text
	foundPing                   // its payload is controlData
	foundPong
	foundClose // its payload is controlData
)

var errProtocol = errors.New("the server broke the WebSocket protocol")

// next consumes data up to the next finding and returns the rest.
func (p *parser) next(data []byte) (rest []byte, found finding, err error) {
	for {
		if !p.inPayload {
			for need := p.headerSize(); p.headerN < need; need = p.headerSize() {
				if len(data) == 0 {
					return nil, foundNothing, nil
				}
				n := copy(p.header[p.headerN:need], data)
				p.headerN += uint8(n)
				data = data[n:]
			}
			if err := p.begin(); err != nil {
				return nil, foundNothing, err
			}
		}
		n := min(p.left, uint64(len(data)))
		if opcode := p.header[0] & 0xF; opcode >= opClose {
			p.controlData = append(p.controlData, data[:n]...)
		} else if p.idN < idSize {
			p.look(data[:n])
		}
		data = data[n:]
		p.left -= n
		if p.left > 0 {
			return nil, foundNothing, nil
		}
		p.inPayload, p.headerN = false, 0
		if found := p.end(); found != foundNothing {
			return data, found, nil
		}
	}
}

// textKey precedes the text of a message. Inside a JSON string its quotes would be escaped, so every occurrence is the
// key.
var textKey = []byte(`"data":"`)

// maxEnvelope bounds the kept bytes of an event without text. Everything before a text is shorter.
const maxEnvelope = 4096

// look searches the next bytes of a message for its id. It does not parse events, because the tool must read a million a
// second. JSON does not escape an id; see putID.
func (p *parser) look(data []byte) {
	if !p.events {
		p.idN += uint8(copy(p.id[p.idN:], data))
		return
	}
	if len(p.envelope) > 0 {
		p.envelope = append(p.envelope, data[:min(len(data), maxEnvelope-len(p.envelope))]...)
		data = p.envelope
	}
	// The text mostly begins where it began in the last event.
	if len(data) < p.textAt || !bytes.HasSuffix(data[:p.textAt], textKey) {
		p.textAt = bytes.Index(data, textKey) + len(textKey)
	}
	if p.textAt >= len(textKey) {
		p.idN = uint8(copy(p.id[:], data[p.textAt:]))
	}
	if p.idN < idSize && len(p.envelope) == 0 {
		p.envelope = append(p.envelope, data[:min(len(data), maxEnvelope)]...)
	}
}

// headerSize returns the size of the frame's header, as far as the bytes so far tell.
func (p *parser) headerSize() uint8 {
	switch {
	case p.headerN < 2:
		return 2
	case p.header[1] == 126:
		return 4
	case p.header[1] == 127:
		return 10
	default:
		return 2
	}
}

// begin checks a complete header and prepares for the payload. A masked frame is an error: a server masks nothing
// (RFC 6455 §5.1).
func (p *parser) begin() error {
	fin, opcode := p.header[0]&0x80 != 0, p.header[0]&0xF
	switch p.header[1] {
	case 126:
		p.left = uint64(binary.BigEndian.Uint16(p.header[2:]))
	case 127:
		p.left = binary.BigEndian.Uint64(p.header[2:])
	default:
		p.left = uint64(p.header[1])
	}
	p.inPayload = true
	bad := p.header[0]&0x70 != 0 || p.header[1]&0x80 != 0 || p.left>>63 != 0
	switch opcode {
	case opText, opBinary:
		bad = bad || p.inMessage
		p.inMessage, p.idN, p.envelope = true, 0, p.envelope[:0]
	case opContinuation:
		bad = bad || !p.inMessage
	case opClose, opPing, opPong:
		bad = bad || !fin || p.left > 125
		p.controlData = p.controlData[:0]
	default:
		bad = true
	}
	if bad {
		return errProtocol
	}
	return nil
}

// end returns the finding that a complete frame makes.
func (p *parser) end() finding {
	switch p.header[0] & 0xF {
	case opClose:
		return foundClose
	case opPing:
		return foundPing
	case opPong:
		return foundPong
	}
	if p.header[0]&0x80 == 0 {
		return foundNothing
	}
	p.inMessage = false
	if p.events && p.idN == 0 {
		return foundNothing
	}
	return foundMessage
}

// appendFrame appends a whole frame to dst: a client's if masked, a server's otherwise. The masking key is zero, which is
// legal, costs the server the same work, and leaves the payload as it is.
func appendFrame(dst []byte, opcode byte, masked bool, payload []byte) []byte {
	var mask byte
	if masked {
		mask = 0x80
	}
	dst = append(dst, 0x80|opcode)
	switch n := len(payload); {
	case n <= 125:
		dst = append(dst, mask|byte(n))
	case n <= 65535:
		dst = append(dst, mask|126)
		dst = binary.BigEndian.AppendUint16(dst, uint16(n))
	default:
		dst = append(dst, mask|127)
		dst = binary.BigEndian.AppendUint64(dst, uint64(n))
	}
	if masked {
		dst = append(dst, 0, 0, 0, 0)
	}
	return append(dst, payload...)
}

// A message begins with its id: the run and the sender in 4 characters each, and the sender's sequence number in 8. Each
// character has 5 bits, from ']' up, so an id is printable text of a fixed size that JSON does not escape. The run
// distinguishes these messages from those of an earlier run in a hub's history.
const (
	idSize     = 16
	idBits     = 5 * idSize / 2 // in each half
	senderBits = idBits / 2
)

// putID writes the id of a message to the first idSize bytes of b.
func putID(b []byte, runAndSender, seq uint64) {
	for i := range 8 {
		b[i] = ']' + byte(runAndSender>>(35-5*i)&31)
		b[8+i] = ']' + byte(seq>>(35-5*i)&31)
	}
}

// parseID reads an id that putID wrote. ok is false for any other text.
func parseID(b *[idSize]byte) (runAndSender, seq uint64, ok bool) {
	var bad byte
	for i := range 8 {
		x, y := b[i]-']', b[8+i]-']'
		bad |= x | y
		runAndSender = runAndSender<<5 | uint64(x)
		seq = seq<<5 | uint64(y)
	}
	return runAndSender, seq, bad < 32
}
