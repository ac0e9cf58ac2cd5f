package enginetest

import (
	"errors"
	"slices"
	"sync"
	"time"
)

// Errors of calls whose outcome the caller cannot know.
var (
	errRequestLost = errors.New("the connection broke before an answer came") // the server did nothing
	errReplyLost   = errors.New("the connection broke before an answer came") // the server did its work
)

// Down makes the server unreachable for all sessions, for the given reason, until [Server.Up]. Calls fail with
// [engine.ErrUnavailable]. What happens meanwhile never reaches the receivers.
func (s *Server) Down(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = reason
	for _, session := range s.sessions {
		session.tellStateLocked()
	}
}

// Up ends what [Server.Down] began.
func (s *Server) Up() { s.Down(nil) }

// HoldPublish makes all calls of Publish wait, before they do anything, until release. A call whose context is done
// meanwhile returns an error, and publishes nothing.
func (s *Server) HoldPublish() (release func()) {
	held := make(chan struct{})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holds = append(s.holds, held)
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.holds = slices.DeleteFunc(s.holds, func(c chan struct{}) bool { return c == held })
		close(held)
	})
}

// LoseRequests makes the next n calls of Publish do nothing and return an error that does not say so.
func (s *Server) LoseRequests(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loseRequests = n
}

// LoseReplies makes the next n calls of Publish do their work and return an error that does not say so.
func (s *Server) LoseReplies(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loseReplies = n
}

// NewEpoch begins a new epoch of a hub. Its entries stay, and its numbers go on. Nodes learn of it by what comes next,
// or when they renew.
func (s *Server) NewEpoch(hub string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hubLocked(hub, time.Now())
	h.begin(h.seq)
}

// Rewind makes a hub lose its entries after a number, as if the server had been restored from a copy. The hub begins a
// new epoch, which goes on from that number. Receipts stay, also those of the lost entries.
func (s *Server) Rewind(hub string, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.hubLocked(hub, time.Now())
	h.begin(min(seq, h.seq))
}

// ForgetReceipts makes a hub forget the receipts of all messages, before their age is over.
func (s *Server) ForgetReceipts(hub string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hubLocked(hub, time.Now()).forgetReceipts()
}

// Wipe makes the server lose all that it has. Hubs that are open stay so, and are new. Nodes get new numbers.
func (s *Server) Wipe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.wiped = now
	clear(s.hubs)
	clear(s.nodes)
	for _, session := range s.sessions {
		if session.number != 0 {
			s.numbers++
			session.number = s.numbers
		}
	}
}

// Down makes the server unreachable for this session only, for the given reason, until [Session.Up]. See [Server.Down].
func (s *Session) Down(reason error) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.down = reason
	s.tellStateLocked()
}

// Up ends what [Session.Down] began.
func (s *Session) Up() { s.Down(nil) }

// LosePushes loses the next n calls of this session's receivers, of Entries and Users.
func (s *Session) LosePushes(n int) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.losePushes = n
}

// HoldPushes makes all calls of this session's receivers and monitor wait until release.
func (s *Session) HoldPushes() (release func()) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.holds++
	return sync.OnceFunc(func() {
		s.server.mu.Lock()
		defer s.server.mu.Unlock()
		s.holds--
		s.changed.Signal()
	})
}

// Kill ends the session as a process ends that is killed: the other nodes learn of it when its lease is over.
func (s *Session) Kill() { s.end(false) }
