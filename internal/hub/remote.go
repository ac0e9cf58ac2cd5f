package hub

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// remote has the users of a hub that several nodes share: those that the other nodes have announced, and what this node
// has yet to announce. The hub's lock guards it. A hub of this process alone does not use it.
type remote struct {
	others
	version uint64 // of the announcements that the hub has

	local       map[string]int      // this node's users
	unannounced map[string]struct{} // the users whose number of clients the other nodes do not know
	announcing  bool                // announceUsers runs, or is to run after the pause
	pause       *time.Timer         // runs announceUsers
}

// others are the users that the other nodes have announced.
type others struct {
	nodes   map[engine.NodeID]map[string]int
	users   map[string]int // the sum of nodes
	clients int            // the sum of users
}

const (
	// announceInterval is the time between two announcements of a hub.
	announceInterval = time.Second

	// maxAnnounced bounds the users in one announcement. After a full one the next comes sooner.
	maxAnnounced = 1000
)

// audienceLocked returns how many clients the hub has on all nodes.
func (b *Hub) audienceLocked() int { return b.members + b.remote.clients }

// ---- this node's users ----

// countUserLocked notes that a user has more or fewer clients on this node.
func (b *Hub) countUserLocked(user string, more int) {
	if b.cluster == nil {
		return
	}
	r := &b.remote
	if r.local == nil {
		r.local = map[string]int{}
	}
	setOrDelete(r.local, user, r.local[user]+more)
	b.announceLocked(user)
	b.announceUsersSoonLocked(0)
}

// announceLocked has the next announcement include a user.
func (b *Hub) announceLocked(user string) {
	if b.remote.unannounced == nil {
		b.remote.unannounced = map[string]struct{}{}
	}
	b.remote.unannounced[user] = struct{}{}
}

// announceUsersSoonLocked has the hub announce its users after a pause.
func (b *Hub) announceUsersSoonLocked(pause time.Duration) {
	if b.remote.announcing || len(b.remote.unannounced) == 0 {
		return
	}
	b.remote.announcing = true
	if pause == 0 {
		go b.announceUsers() // without a timer that is due: go.dev/issue/78156 makes those crash tests
	} else {
		b.remote.pause = time.AfterFunc(pause, b.announceUsers)
	}
}

// announceUsers tells the other nodes about users of this node. It runs in a goroutine of its own, which ends with the
// answer of the engine.
func (b *Hub) announceUsers() {
	counts, pause := b.takeUnannounced(), announceInterval
	if len(counts) == maxAnnounced {
		pause /= 10
	}
	var err error
	if len(counts) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
		err = b.cluster.Announce(ctx, b.name, counts)
		cancel()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remote.announcing = false
	if b.closed {
		return
	}
	if err != nil {
		for _, c := range counts {
			b.announceLocked(c.User)
		}
	}
	b.announceUsersSoonLocked(pause)
}

// takeUnannounced returns what the next announcement says: nothing if the hub is closed.
func (b *Hub) takeUnannounced() (counts []engine.UserCount) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &b.remote
	for user := range r.unannounced {
		if b.closed || len(counts) == maxAnnounced {
			break
		}
		counts = append(counts, engine.UserCount{User: user, Clients: r.local[user]})
		delete(r.unannounced, user)
	}
	return counts
}

// AnnounceAgain announces all users of this node again, because the engine has forgotten them.
func (b *Hub) AnnounceAgain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for user := range b.remote.local {
		b.announceLocked(user)
	}
	b.announceUsersSoonLocked(0)
}

// correctLocked announces users again of which the engine says something else than this node. An announcement may arrive
// late, even after the hub has opened again.
func (b *Hub) correctLocked(said []engine.UserCount) {
	for _, u := range said {
		if b.remote.local[u.User] != u.Clients {
			b.announceLocked(u.User)
		}
	}
	b.announceUsersSoonLocked(announceInterval)
}

// ---- the users of other nodes ----

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
	if node == b.node {
		b.correctLocked(users)
		return
	}
	changes := make([]userChange, 0, len(users))
	for _, u := range users {
		changes = append(changes, userChange{u.User, r.set(node, u.User, u.Clients)})
	}
	b.changeRosterLocked(changes)
}

// replaceUsersLocked replaces what the hub knows of the users of other nodes with what a snapshot says. now are the others
// in the snapshot.
func (b *Hub) replaceUsersLocked(s *engine.Snapshot, now others) {
	if b.cluster == nil {
		return
	}
	r := &b.remote
	r.version = s.Version
	b.correctLocked(s.Users[b.node])
	var changes []userChange
	if b.presence.watchers > 0 {
		changes = r.changesTo(now)
	}
	r.others = now
	b.changeRosterLocked(changes)
}

// othersIn returns the users in a snapshot, except those of this node.
func (b *Hub) othersIn(s *engine.Snapshot) (o others) {
	for node, users := range s.Users {
		if node == b.node {
			continue
		}
		for _, u := range users {
			o.set(node, u.User, u.Clients)
		}
	}
	return o
}

// set notes how many clients a user has on a node. It returns how many more these are than before.
func (o *others) set(node engine.NodeID, user string, clients int) (more int) {
	users := o.nodes[node]
	if more = clients - users[user]; more == 0 {
		return 0
	}
	if o.nodes == nil {
		o.nodes, o.users = map[engine.NodeID]map[string]int{}, map[string]int{}
	}
	if users == nil {
		users = map[string]int{}
		o.nodes[node] = users
	}
	setOrDelete(users, user, clients)
	if len(users) == 0 {
		delete(o.nodes, node)
	}
	setOrDelete(o.users, user, o.users[user]+more)
	o.clients += more
	return more
}

// setOrDelete sets m[k] to v, or deletes it at zero.
func setOrDelete(m map[string]int, k string, v int) {
	if v == 0 {
		delete(m, k)
	} else {
		m[k] = v
	}
}

// changesTo returns the difference between o and what is now.
func (o *others) changesTo(now others) (changes []userChange) {
	for user, n := range now.users {
		if more := n - o.users[user]; more != 0 {
			changes = append(changes, userChange{user, more})
		}
	}
	for user, n := range o.users {
		if now.users[user] == 0 {
			changes = append(changes, userChange{user, -n})
		}
	}
	return changes
}

// A userChange says how many more clients a user has on other nodes.
type userChange struct {
	user string
	more int
}

// changeRosterLocked enters changes of the users of other nodes in the roster, and schedules a notice of them.
func (b *Hub) changeRosterLocked(changes []userChange) {
	if b.presence.watchers == 0 || len(changes) == 0 {
		return
	}
	now := time.Now()
	b.addAllToRosterLocked(changes, now)
	b.announceByLocked(now)
}

// addAllToRosterLocked does what addToRosterLocked does, for many users of other nodes. It merges those that are new into
// the roster, because each insertion would move half of the roster.
func (b *Hub) addAllToRosterLocked(changes []userChange, now time.Time) {
	slices.SortFunc(changes, func(a, b userChange) int { return strings.Compare(a.user, b.user) })
	var fresh []*rosterUser
	absent := false
	for _, change := range changes {
		var u *rosterUser
		if i, known := b.findUserLocked(change.user); known {
			u = b.presence.roster[i]
		} else if n := len(fresh); n > 0 && fresh[n-1].name == change.user {
			u = fresh[n-1]
		} else {
			u = &rosterUser{name: change.user}
			fresh = append(fresh, u)
		}
		b.addClientsLocked(u, change.more, netip.Prefix{}, now)
		absent = absent || u.clients == 0
	}
	b.presence.roster = merge(b.presence.roster, fresh)
	if absent {
		b.removeAbsentLocked()
	}
}

// merge merges two rosters, of which both are in order. It may use the memory of the first.
func merge(roster, fresh []*rosterUser) []*rosterUser {
	i, j := len(roster), len(fresh)
	roster = append(roster, fresh...)
	for k := len(roster) - 1; j > 0; k-- {
		if i > 0 && roster[i-1].name > fresh[j-1].name {
			i--
			roster[k] = roster[i]
		} else {
			j--
			roster[k] = fresh[j]
		}
	}
	return roster
}
