package hub

import (
	"time"

	"golang.org/x/time/rate"
)

// Settings are the settings of a client, as configured when it joined. Clients share them, and nobody changes them.
type Settings struct {
	ReadOnly       bool // the client may only listen
	Echo           bool // it receives its own messages
	MaxMessageSize int  // bytes
	BufferMessages int  // how far it may fall behind, in messages
	BufferBytes    int  // and in bytes
	SkipLag        bool // when it falls further behind, it loses the gap instead of being closed
	PingInterval   time.Duration
	PingTimeout    time.Duration
	WriteTimeout   time.Duration
	MaxAge         time.Duration // 0: no limit
	Rate           Rate

	HistoryMessages int // 0: off
	HistoryAge      time.Duration
	Presence        bool // a client of the events protocol may ask for the roster
	JoinLeave       bool // and it receives changes of the roster
}

// A Rate is how fast a client or an address may send: a bucket of messages that refills evenly within Window. The zero
// value is no limit.
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
