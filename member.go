package chatbroadcast

import (
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"go.uber.org/zap"
)

// A member is a client and its place in the registry. It implements hub.Owner.
type member struct {
	client hub.Client
	ip     string // Caddy's client IP, which takes trusted proxies into account
	scope  *scope
	hub    *namedHub

	// Guarded by registry.mu.
	index int  // in scope.members
	added bool // it is in scope.members
	away  bool // it has left its hub

	unreported bool // its handshake failed after it had joined: the log has no line about its end
}

// addLocked adds m, which has joined its hub, to the members of s.
func (s *scope) addLocked(m *member) {
	m.added = true
	m.index = len(s.members)
	s.members = append(s.members, m)
	if !m.away {
		s.swap(m.index, s.present)
		s.present++
	}
}

func (s *scope) swap(i, j int) {
	s.members[i], s.members[j] = s.members[j], s.members[i]
	s.members[i].index, s.members[j].index = i, j
}

// abandon ends a member whose handshake failed after it had joined.
func (m *member) abandon() {
	m.unreported = true
	m.client.Abandon()
}

// Left implements hub.Owner. The hub closes with its last client, unless the registry keeps it for its history.
func (m *member) Left() {
	r := m.scope.registry
	r.lock()
	defer r.mu.Unlock()
	r.leftLocked(m)
}

// leftLocked notes that m has left its hub. It does nothing if m is away already, because Finished may have come first.
func (r *registry) leftLocked(m *member) {
	if m.away {
		return
	}
	m.away = true
	if m.added {
		m.scope.present--
		m.scope.swap(m.index, m.scope.present)
	}
	n := m.hub
	if m.client.Address() == n.owner && n.hub.Size() > 0 {
		n.owner = n.hub.Heir(n.owner, func(*hub.Client) bool { return true })
	}
	r.settleLocked(n, m.scope)
}

// Finished implements hub.Owner. It reports the end of the connection.
func (m *member) Finished() {
	r, why := m.scope.registry, m.client.Cause()
	r.metrics.closed(why)
	if !m.unreported {
		t := m.client.Traffic()
		m.scope.logger().Info("client closed",
			logName("hub", m.hub.name),
			zap.Stringer("client_id", m.client.ID()),
			logName("user", m.client.User()),
			zap.String("client_ip", m.ip),
			zap.Int("code", why.Code),
			zap.String("reason", why.Reason),
			zap.Duration("duration", time.Since(m.client.Began())),
			zap.Uint64("messages_in", t.MessagesIn),
			zap.Uint64("messages_out", t.MessagesOut),
			zap.Uint64("bytes_in", t.BytesIn),
			zap.Uint64("bytes_out", t.BytesOut),
		)
	}
	r.finished(m)
}

// Panicked implements hub.Owner.
func (m *member) Panicked(v any, stack []byte) {
	m.scope.logger().Error("panic in a connection", zap.Any("panic", v), zap.ByteString("stack", stack))
}

// finished takes m out of the registry.
func (r *registry) finished(m *member) {
	r.lock()
	defer r.mu.Unlock()
	r.leftLocked(m)
	s := m.scope
	last := len(s.members) - 1
	s.swap(m.index, last)
	s.members[last] = nil
	s.members = s.members[:last]
	r.vacateLocked(m)
}

// vacateLocked gives m's place back. When the last client of a scope in a hub is finished, that hub stops counting as
// occupied; if the scope keeps it for its history, the scope may from now on close it to make room. An exit ends with
// the last place.
func (r *registry) vacateLocked(m *member) {
	s, n, address := m.scope, m.hub, m.client.Address()
	o := s.perHub[n.name]
	o.clients--
	switch {
	case o.clients == 0:
		delete(s.perHub, n.name)
		decrement(s.opened, o.opener)
		if now := r.named[n.name]; now != nil && now.keeper == s {
			now.place = s.kept.Push(now.owner, now)
		}
	case address == o.opener:
		r.passOnLocked(s, o, n.name)
	}
	decrement(s.perIP, address)
	if len(s.members)+s.joining == 0 && len(s.leases) == 0 && r.scopes[s.key] == s {
		delete(r.scopes, s.key)
	}
	r.live--
	if r.live == 0 && r.exited != nil {
		close(r.exited) // live stays 0: nobody joins an exiting server
	}
}

// passOnLocked charges the named hub to the address of another client of s in it, if the opener has no client of s left
// in it.
func (r *registry) passOnLocked(s *scope, o *occupancy, name string) {
	n := r.named[name]
	if n == nil || !n.isOpen() {
		return
	}
	heir := n.hub.Heir(o.opener, func(c *hub.Client) bool { return c.Owner().(*member).scope == s })
	decrement(s.opened, o.opener)
	o.opener = heir
	s.opened[heir]++
}

// Interface guards
var _ hub.Owner = (*member)(nil)
