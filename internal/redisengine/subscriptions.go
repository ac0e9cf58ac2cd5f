package redisengine

import (
	"context"
	"fmt"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

const (
	// mostPending and mostPendingBytes bound what a hub that is being opened holds back. If there is more, Open reads the
	// hub again.
	mostPending      = 1000
	mostPendingBytes = 4 << 20
)

// A subscription is a hub that is open, or being opened.
type subscription struct {
	hub    string
	bounds engine.Bounds
	to     engine.Receiver

	// Guarded by Session.mu.
	confirmed chan struct{} // closed when the server has confirmed it on the subscriber's present connection
	opening   bool          // Open has not returned: what arrives waits in pending
	pending   []push
	bytes     int  // of pending
	overflow  bool // some is missing in pending
	announced bool // the node may have users in the hub

	// What the receiver has, also guarded by Session.mu.
	engine.Position
	before  string // the epoch before
	version uint64
}

// Open implements engine.Session.
func (s *Session) Open(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
	snapshot, err := s.openHub(ctx, hub, bounds, to)
	if err != nil {
		s.Leave(hub, to)
		return engine.Snapshot{}, fmt.Errorf("opening the hub: %w", err)
	}
	return snapshot, nil
}

func (s *Session) openHub(
	ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver,
) (engine.Snapshot, error) {
	sub := s.replace(hub, &subscription{
		hub: hub, bounds: bounds, to: to, confirmed: make(chan struct{}), opening: true,
	})
	for {
		l, err := s.connectedFor(hub)
		if err != nil {
			return engine.Snapshot{}, err
		}
		if err := s.awaitReady(ctx, l, sub); err != nil {
			return engine.Snapshot{}, err
		}
		connection, ok := s.forgetPending(sub)
		if !ok {
			continue
		}
		snapshot, err := s.read(ctx, l, hub, reading{bounds: encodeBounds(bounds), open: true})
		if err != nil {
			return engine.Snapshot{}, err
		}
		complete, err := s.complete(sub, &snapshot, connection)
		if complete || err != nil {
			return snapshot, err
		}
	}
}

// replace makes sub the subscription of its hub. The receiver of the one before gets nothing more.
func (s *Session) replace(hub string, sub *subscription) *subscription {
	s.mu.Lock()
	s.endLocked(hub)
	s.hubs[hub] = sub
	s.mu.Unlock()
	s.signal()
	return sub
}

// endLocked ends the subscription of a hub. It notes that the users of this node must be removed.
func (s *Session) endLocked(hub string) {
	sub := s.hubs[hub]
	delete(s.hubs, hub)
	s.changed[hub] = struct{}{}
	if sub != nil && sub.announced && s.leaving[hub] == nil {
		s.leaving[hub] = make(chan struct{})
	}
}

// signal makes the goroutines of the link look what has changed.
func (s *Session) signal() {
	l := s.link.Load()
	if l == nil {
		return
	}
	l.subscriber.signal()
	select {
	case l.left <- struct{}{}:
	default:
	}
}

// awaitReady waits until the server has confirmed a subscription, and the users that this node had before are removed.
func (s *Session) awaitReady(ctx context.Context, l *link, sub *subscription) error {
	s.mu.Lock()
	confirmed, left := sub.confirmed, s.leaving[sub.hub]
	s.mu.Unlock()
	if left == nil {
		left = confirmed
	}
	for _, c := range []chan struct{}{confirmed, left} {
		select {
		case <-c:
		case <-ctx.Done():
			return ctx.Err()
		case <-l.ctx.Done():
			return unavailable(context.Cause(l.ctx))
		}
	}
	return nil
}

// forgetPending forgets what a hub that is being opened has got so far. It returns the number of the subscriber's
// connection, or false if the server has not confirmed the subscription on it.
func (s *Session) forgetPending(sub *subscription) (connection uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub.pending, sub.bytes, sub.overflow = nil, 0, false
	return s.connections, isClosed(sub.confirmed)
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// complete adds to a snapshot what has arrived since forgetPending. It reports whether that is all: the receiver then gets
// what follows.
func (s *Session) complete(sub *subscription, snapshot *engine.Snapshot, connection uint64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hubs[sub.hub] != sub {
		return false, errReplaced
	}
	if s.connections != connection || sub.overflow {
		return false, nil
	}
	for _, p := range sub.pending {
		if !add(snapshot, p) {
			return false, nil
		}
	}
	sub.opening, sub.pending = false, nil
	sub.Position, sub.before, sub.version = snapshot.Position, snapshot.Before.Epoch, snapshot.Version
	return true, nil
}

// add adds to a snapshot what was published after it. It reports whether nothing is missing in between.
func add(to *engine.Snapshot, p push) bool {
	if p.epoch != to.Epoch {
		return p.epoch == to.Before.Epoch
	}
	if p.node != "" {
		if p.version <= to.Version {
			return true
		}
		if p.version != to.Version+1 {
			return false
		}
		to.Version = p.version
		addUsers(to.Users, p.node, p.users)
		return true
	}
	if p.last() <= to.Seq {
		return true
	}
	if p.first > to.Seq+1 {
		return false
	}
	to.Entries = append(to.Entries, p.entries[to.Seq+1-p.first:]...)
	to.Seq = p.last()
	return true
}

func addUsers(to map[engine.NodeID][]engine.UserCount, node engine.NodeID, changed []engine.UserCount) {
	counts := map[string]int{}
	for _, u := range to[node] {
		counts[u.User] = u.Clients
	}
	for _, u := range changed {
		counts[u.User] = u.Clients
	}
	var users []engine.UserCount
	for user, clients := range counts {
		if clients > 0 {
			users = append(users, engine.UserCount{User: user, Clients: clients})
		}
	}
	if users == nil {
		delete(to, node)
		return
	}
	to[node] = users
}

// deliver passes what a script has published to the receiver of the hub. One goroutine at a time calls it.
func (s *Session) deliver(hub, message string) {
	p, ok := parsePush(message)
	if !ok {
		return // another program uses the channel
	}
	to := s.accept(hub, &p, len(message))
	switch {
	case to == nil:
	case p.node != "":
		to.Users(p.version, p.node, p.users)
	default:
		to.Entries(p.epoch, p.first, p.entries)
	}
}

// accept returns the receiver of the hub, if p has something that it does not have. It cuts what the receiver has off p.
// What a hub that is being opened gets waits for Open.
func (s *Session) accept(hub string, p *push, size int) engine.Receiver {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := s.hubs[hub]
	switch {
	case sub == nil || p.epoch == sub.before:
		return nil
	case sub.opening:
		sub.keepLocked(*p, size)
		return nil
	case p.epoch == sub.Epoch && !sub.cutLocked(p):
		return nil
	}
	if p.node != "" {
		sub.version = p.version
		return sub.to
	}
	if p.epoch != sub.Epoch {
		sub.before = sub.Epoch
	}
	sub.Epoch, sub.Seq = p.epoch, p.last()
	return sub.to
}

// cutLocked cuts off p what the receiver has of the epoch, and reports whether something is left. It is called with
// Session.mu.
func (sub *subscription) cutLocked(p *push) bool {
	if p.node != "" {
		return p.version > sub.version
	}
	if p.last() <= sub.Seq {
		return false
	}
	if p.first <= sub.Seq {
		p.entries = p.entries[sub.Seq+1-p.first:]
		p.first = sub.Seq + 1
	}
	return true
}

// keepLocked is called with Session.mu.
func (sub *subscription) keepLocked(p push, size int) {
	if len(sub.pending) == mostPending || sub.bytes+size > mostPendingBytes {
		sub.overflow = true
	}
	if sub.overflow {
		sub.pending, sub.bytes = nil, 0
		return
	}
	sub.pending = append(sub.pending, p)
	sub.bytes += size
}

// Leave implements engine.Session.
func (s *Session) Leave(hub string, from engine.Receiver) {
	s.mu.Lock()
	sub := s.hubs[hub]
	mine := sub != nil && sub.to == from
	if mine {
		s.endLocked(hub)
	}
	s.mu.Unlock()
	if mine {
		s.signal()
	}
}

// The subscriber calls these.

// subscriberConnected notes that the subscriber has a new connection, which subscribes to no hub yet.
func (s *Session) subscriberConnected() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.connections++
	for hub := range s.hubs {
		s.changed[hub] = struct{}{}
	}
}

// subscriberLost notes that the connection is lost, and with it all subscriptions.
func (s *Session) subscriberLost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.connections++
	for _, sub := range s.hubs {
		if isClosed(sub.confirmed) {
			sub.confirmed = make(chan struct{})
		}
	}
}

// takeChanges returns the channels of the hubs that were opened or left since it was last called, and whether they are
// open.
func (s *Session) takeChanges() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	changes := make(map[string]bool, len(s.changed))
	for hub := range s.changed {
		changes[s.keys.hubChannel(hub)] = s.hubs[hub] != nil
	}
	clear(s.changed)
	return changes
}

// confirm notes that the server has confirmed a subscription.
func (s *Session) confirm(channel string) {
	hub, _ := s.keys.hubOf(channel)
	s.mu.Lock()
	defer s.mu.Unlock()
	if sub := s.hubs[hub]; sub != nil && !isClosed(sub.confirmed) {
		close(sub.confirmed)
	}
}

func (s *Session) lookup(hub string) *subscription {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hubs[hub]
}
