package hub

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// remote has the users of a hub that several nodes share: those that the other nodes have announced, and what this node
// has yet to announce. The hub's lock guards it. A hub of this process alone does not use it.
type remote struct {
	version uint64 // of the announcements that the hub has
	nodes   map[engine.NodeID]map[string]int
	users   map[string]int // the sum of nodes
	clients int            // the sum of users

	local       map[string]int      // this node's users
	unannounced map[string]struct{} // the users whose number of clients the other nodes do not know
	announcing  *time.Timer         // runs announceUsers, while users are unannounced
}

const (
	// announceInterval is the time between two announcements of a hub.
	announceInterval = time.Second

	// maxAnnounced bounds the users in one announcement.
	maxAnnounced = 1000
)

// audienceLocked returns how many clients the hub has on all nodes.
func (b *Hub) audienceLocked() int { return b.members + b.remote.clients }

// countUserLocked notes that a user has more or fewer clients on this node.
func (b *Hub) countUserLocked(user string, more int) {
	if b.cluster == nil {
		return
	}
	r := &b.remote
	if r.local == nil {
		r.local, r.unannounced = map[string]int{}, map[string]struct{}{}
	}
	r.local[user] += more
	if r.local[user] == 0 {
		delete(r.local, user)
	}
	r.unannounced[user] = struct{}{}
	b.announceUsersSoonLocked(0)
}

// announceUsersSoonLocked has the hub announce its users after a pause.
func (b *Hub) announceUsersSoonLocked(pause time.Duration) {
	if b.remote.announcing == nil && len(b.remote.unannounced) > 0 {
		b.remote.announcing = time.AfterFunc(pause, b.announceUsers)
	}
}

// announceUsers tells the other nodes about users of this node. It runs in the goroutine of a timer.
func (b *Hub) announceUsers() {
	b.mu.Lock()
	r := &b.remote
	var counts []engine.UserCount
	for user := range r.unannounced {
		if len(counts) == maxAnnounced {
			break
		}
		counts = append(counts, engine.UserCount{User: user, Clients: r.local[user]})
		delete(r.unannounced, user)
	}
	gone := b.closed
	b.mu.Unlock()
	if !gone {
		ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
		err := b.cluster.Announce(ctx, b.name, counts)
		cancel()
		if err != nil {
			b.mu.Lock()
			for _, c := range counts {
				r.unannounced[c.User] = struct{}{}
			}
			b.mu.Unlock()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r.announcing = nil
	if !b.closed {
		b.announceUsersSoonLocked(announceInterval)
	}
}

// AnnounceAgain announces all users of this node again, because the engine has forgotten them.
func (b *Hub) AnnounceAgain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for user := range b.remote.local {
		b.remote.unannounced[user] = struct{}{}
	}
	b.announceUsersSoonLocked(0)
}

// Users implements engine.Receiver.
func (b *Hub) Users(version uint64, node engine.NodeID, users []engine.UserCount) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &b.remote
	switch {
	case b.closed || b.arrivals.reset || version <= r.version:
		return
	case b.arrivals.opening:
		b.arrivals.users = max(b.arrivals.users, version)
		return
	case version > r.version+1:
		b.fallBehindLocked()
		return
	}
	r.version = version
	if node == b.cluster.ID() {
		return
	}
	for _, u := range users {
		b.setRemoteLocked(node, u.User, u.Clients)
	}
	b.announceByLocked(time.Now())
}

// setRemoteLocked notes how many clients a user has on another node.
func (b *Hub) setRemoteLocked(node engine.NodeID, user string, clients int) {
	r := &b.remote
	if r.nodes == nil {
		r.nodes, r.users = map[engine.NodeID]map[string]int{}, map[string]int{}
	}
	if r.nodes[node] == nil {
		r.nodes[node] = map[string]int{}
	}
	more := clients - r.nodes[node][user]
	if more == 0 {
		return
	}
	setOrDelete(r.nodes[node], user, clients)
	if len(r.nodes[node]) == 0 {
		delete(r.nodes, node)
	}
	setOrDelete(r.users, user, r.users[user]+more)
	r.clients += more
	if b.presence.watchers > 0 {
		b.addToRosterLocked(user, more, netip.Prefix{}, time.Now())
	}
}

// setOrDelete sets m[k] to v, or deletes it at zero.
func setOrDelete(m map[string]int, k string, v int) {
	if v == 0 {
		delete(m, k)
	} else {
		m[k] = v
	}
}

// replaceUsersLocked replaces what the hub knows of the users of other nodes with a snapshot, unless it knows more.
func (b *Hub) replaceUsersLocked(s *engine.Snapshot) {
	r := &b.remote
	if b.cluster == nil || s.Version <= r.version {
		return
	}
	b.setUsersLocked(s)
	b.announceByLocked(time.Now())
}

// setUsersLocked sets the users of other nodes to those of a snapshot.
func (b *Hub) setUsersLocked(s *engine.Snapshot) {
	if b.cluster == nil {
		return
	}
	r := &b.remote
	r.version = s.Version
	self := b.cluster.ID()
	now := map[engine.NodeID]map[string]int{}
	for node, users := range s.Users {
		if node == self {
			continue
		}
		now[node] = map[string]int{}
		for _, u := range users {
			now[node][u.User] = u.Clients
		}
	}
	for node, users := range r.nodes {
		for _, user := range slices.Collect(maps.Keys(users)) {
			if now[node][user] == 0 {
				b.setRemoteLocked(node, user, 0)
			}
		}
	}
	for node, users := range now {
		for user, clients := range users {
			b.setRemoteLocked(node, user, clients)
		}
	}
}
