package hub

import (
	"slices"
	"sync/atomic"
)

// A State says where a client is in its life. It moves only along these arrows:
//
//	          ┌─────▶ deaf ─────┐
//	joining ─▶ open ─▶ closing ─┼─▶ cut ──────┐
//	   └────────┴────────┘└─▶ goodbye ────────┴─▶ finished
//
// A client is a member of its hub until it is closing or cut. See transitions for the whole table.
type State uint32

// The states of a client.
const (
	// Joining: a member whose handshake is not over. Messages wait for it in the hub.
	Joining State = iota
	// Open: messages go both ways.
	Open
	// Deaf: a write has failed. The server writes nothing more, and reads what the client sent before.
	Deaf
	// Closing: the cause is decided, and the client has left. Its writer flushes the messages from before that.
	Closing
	// Goodbye: the close frame is out. The reader waits for the client's.
	Goodbye
	// Cut: the cause is decided, the client has left, and the server writes nothing more.
	Cut
	// Finished: no goroutine works for the client, and its end is reported.
	Finished
)

// transitions has the states that may follow each state.
var transitions = [...][]State{
	Joining: {Open, Closing, Cut},
	Open:    {Deaf, Closing, Cut},
	Deaf:    {Cut},
	Closing: {Goodbye, Cut},
	Goodbye: {Cut, Finished},
	Cut:     {Finished},
}

// A life is the state of one client. Only code that has the hub's lock changes it; anybody may read it.
type life struct{ state atomic.Uint32 }

func (l *life) now() State { return State(l.state.Load()) }

// to moves to the given state and reports whether that is allowed.
func (l *life) to(next State) bool {
	if !allowed(l.now(), next) {
		return false
	}
	l.state.Store(uint32(next))
	return true
}

func allowed(from, to State) bool {
	return int(from) < len(transitions) && slices.Contains(transitions[from], to)
}

// isMember reports whether a client in this state is a member of its hub.
func (s State) isMember() bool { return s < Closing }

// takesMore reports whether the server may send a client in this state anything but a close frame.
func (s State) takesMore() bool { return s == Joining || s == Open }

// isMute reports whether the server writes nothing more to a client in this state.
func (s State) isMute() bool { return s == Deaf || s >= Cut }
