package hub

import (
	"time"

	"golang.org/x/time/rate"
)

// Settings is what concerns one client, as configured when it joined. Clients share it, and nobody changes it.
type Settings struct {
	ReadOnly       bool // the client may only listen
	Echo           bool // it gets its own messages
	MaxMessageSize int  // bytes
	BufferMessages int  // how far it may fall behind, in messages
	BufferBytes    int  // and in bytes
	SkipLag        bool // it goes on when it has fallen behind further, instead of being closed
	PingInterval   time.Duration
	PingTimeout    time.Duration
	WriteTimeout   time.Duration
	MaxAge         time.Duration // 0: no limit
	Rate           Rate

	HistoryMessages int // 0: off
	HistoryAge      time.Duration
	Presence        bool // clients of the events protocol may ask who is in the hub
	JoinLeave       bool // and the hub tells them of changes
}

// A Rate is how fast somebody may send: a bucket of messages, refilled evenly within Window. The zero value is no limit.
type Rate struct {
	Messages int
	Window   time.Duration
}

// Limiter returns a full bucket, or nil for no limit.
func (r Rate) Limiter() *rate.Limiter {
	if r.Messages == 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(float64(r.Messages)/r.Window.Seconds()), r.Messages)
}
