package feed

import (
	"strconv"
	"time"
)

// A ClientID identifies a client for as long as the process lives. No other client has the same id, before or after it,
// unless the clock is turned back. 0 is no client.
type ClientID uint64

// String returns the id as logs and APIs show it: lower-case letters and digits.
func (id ClientID) String() string { return string(id.Append(nil)) }

// Append appends what String returns.
func (id ClientID) Append(dst []byte) []byte { return strconv.AppendUint(dst, uint64(id), 36) }

// A Message is a message of a hub, as its feeds encode it.
type Message struct {
	Seq     uint64    // the message's number in the hub, from 1
	At      time.Time // when the hub got it
	Sender  ClientID  // 0 for none
	User    string    // the sender's user, in UTF-8; "" for anonymous
	Opcode  int       // ws.TextMessage or ws.BinaryMessage
	Payload []byte    // UTF-8 if the message is text; encoders do not change it, and feeds copy it
}

// A Notice tells clients, between two messages, which users have come and gone. It has no number.
type Notice struct {
	Clients int      // how many clients the hub has
	Joined  []string // users, in UTF-8
	Left    []string // users, in UTF-8
}

// A Range is the positions from First up to, but not including, End.
type Range struct{ First, End uint64 }
