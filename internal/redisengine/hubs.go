package redisengine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

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
	confirmed chan struct{} // closed when the server has confirmed the subscription in this life of the session
	opening   bool          // Open has not returned: what arrives waits in pending
	pending   []push
	bytes     int  // of pending
	overflow  bool // some is missing in pending
	announced bool // the node may have users in the hub

	// What the receiver has, also guarded by Session.mu. Only the subscriber's connection changes it once the hub is open.
	engine.Position
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
		life := s.forgetPending(sub)
		snapshot, err := s.read(ctx, l, hub, reading{bounds: bounds, open: true})
		if err != nil {
			return engine.Snapshot{}, err
		}
		complete, err := s.complete(sub, &snapshot, life)
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

// forgetPending forgets what a hub that is being opened has got so far. It returns the life of the session.
func (s *Session) forgetPending(sub *subscription) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub.pending, sub.bytes, sub.overflow = nil, 0, false
	return s.lives
}

// complete adds to a snapshot what has arrived since it was begun in the given life. It reports whether that is all: the
// receiver then gets what follows.
func (s *Session) complete(sub *subscription, snapshot *engine.Snapshot, life uint64) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hubs[sub.hub] != sub {
		return false, errReplaced
	}
	if s.lives != life || sub.overflow {
		return false, nil
	}
	for _, p := range sub.pending {
		if !add(snapshot, p) {
			return false, nil
		}
	}
	sub.opening, sub.pending = false, nil
	sub.Position, sub.version = snapshot.Position, snapshot.Version
	return true, nil
}

// add adds to a snapshot what was published after it. It reports whether nothing is missing in between.
func add(to *engine.Snapshot, p push) bool {
	if p.epoch != to.Epoch {
		return false
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
	if sub == nil {
		return nil
	}
	if sub.opening {
		sub.keepLocked(*p, size)
		return nil
	}
	if p.epoch == sub.Epoch {
		if p.node != "" && p.version <= sub.version || p.node == "" && p.last() <= sub.Seq {
			return nil
		}
		if p.node == "" && p.first <= sub.Seq {
			p.entries = p.entries[sub.Seq+1-p.first:]
			p.first = sub.Seq + 1
		}
	}
	if p.node != "" {
		sub.version = p.version
	} else {
		sub.Epoch, sub.Seq = p.epoch, p.last()
	}
	return sub.to
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

// beginLife begins to subscribe to all hubs, on a new connection.
func (s *Session) beginLife() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lives++
	for hub := range s.hubs {
		s.changed[hub] = struct{}{}
	}
}

// endLife notes that the connection is lost.
func (s *Session) endLife() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lives++
	for _, sub := range s.hubs {
		select {
		case <-sub.confirmed:
			sub.confirmed = make(chan struct{})
		default:
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
	sub := s.hubs[hub]
	if sub == nil {
		return
	}
	select {
	case <-sub.confirmed:
	default:
		close(sub.confirmed)
	}
}

// Publish implements engine.Session.
func (s *Session) Publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	receipts, err := s.publish(ctx, hub, batch)
	if err != nil {
		return nil, fmt.Errorf("publishing: %w", err)
	}
	return receipts, nil
}

func (s *Session) publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	if n := len(batch.Messages); n < 1 || n > mostInBatch {
		return nil, unavailable(errBatchSize)
	}
	l, err := s.connectedFor(hub)
	if err != nil {
		return nil, err
	}
	hasKeys := slices.ContainsFunc(batch.Messages, func(m engine.Message) bool { return m.Key != engine.Key{} })
	args := make([]string, 0, 11+2*len(batch.Messages))
	args = append(args,
		string(s.node),
		fmt.Sprintf("%020d", batch.Number),
		engine.NewEpoch(),
		batch.Known.Epoch,
		strconv.FormatUint(batch.Known.Seq, 10),
		strconv.Itoa(batch.Bounds.Messages),
		strconv.Itoa(batch.Bounds.Bytes),
		milliseconds(batch.Bounds.Age),
		strconv.Itoa(batch.Bounds.Receipts),
		s.keys.hubChannel(hub),
		bit(hasKeys),
	)
	for _, m := range batch.Messages {
		if hasKeys {
			args = append(args, keyOf(m))
		}
		args = append(args, string(m.Data))
	}
	answer, err := l.run(ctx, scriptPublish, s.hubKeys(hub), args...).ToString()
	if err != nil {
		return nil, err
	}
	return parseReceipts(answer, len(batch.Messages))
}

// keyOf returns the key of a message as publish.lua expects it.
func keyOf(m engine.Message) string {
	if m.Key == (engine.Key{}) {
		return ""
	}
	return strconv.Itoa(int(m.Attempt)) + string(m.Key[:])
}

// Read implements engine.Cluster.
func (s *Session) Read(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
	bounds := engine.Bounds{Age: asBefore}
	if sub := s.lookup(hub); sub != nil {
		bounds = sub.bounds
	}
	l, err := s.connectedFor(hub)
	if err != nil {
		return engine.Snapshot{}, fmt.Errorf("reading the hub: %w", err)
	}
	snapshot, err := s.read(ctx, l, hub, reading{after: after, bounds: bounds})
	if err != nil {
		return engine.Snapshot{}, fmt.Errorf("reading the hub: %w", err)
	}
	return snapshot, nil
}

func (s *Session) lookup(hub string) *subscription {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hubs[hub]
}

// errRestless means that entries vanish while they are read.
var errRestless = errors.New("the hub forgets its entries faster than they can be read")

// A reading says what to read of a hub.
type reading struct {
	after  engine.Position
	bounds engine.Bounds
	open   bool // the node opens the hub
}

// read reads a hub page by page. It begins again when entries are forgotten meanwhile.
func (s *Session) read(ctx context.Context, l *link, hub string, r reading) (engine.Snapshot, error) {
	for range 5 {
		first, err := s.readPage(ctx, l, hub, r, true)
		if err != nil {
			return engine.Snapshot{}, err
		}
		snapshot, head := first.Snapshot, first.head
		for snapshot.Seq < head {
			r := r
			r.after = snapshot.Position
			p, err := s.readPage(ctx, l, hub, r, false)
			if err != nil {
				return engine.Snapshot{}, err
			}
			if p.Epoch != snapshot.Epoch || p.Base != snapshot.Seq {
				break
			}
			snapshot.Entries = append(snapshot.Entries, p.Entries...)
			snapshot.Seq, head = p.Seq, p.head
		}
		if snapshot.Seq == head {
			return snapshot, nil
		}
	}
	return engine.Snapshot{}, errRestless
}

func (s *Session) readPage(ctx context.Context, l *link, hub string, r reading, users bool) (page, error) {
	answer, err := l.run(ctx, scriptRead, s.hubKeys(hub), engine.NewEpoch(), r.after.Epoch,
		strconv.FormatUint(r.after.Seq, 10), milliseconds(r.bounds.Age), bit(users), bit(r.open)).ToArray()
	if err != nil {
		return page{}, err
	}
	return parsePage(answer)
}

// Forget implements engine.Session. Other nodes learn of it by the next message or renewal.
func (s *Session) Forget(ctx context.Context, hub string) error {
	l, err := s.connectedFor(hub)
	if err == nil {
		err = notNil(l.run(ctx, scriptForget, s.hubKeys(hub), engine.NewEpoch()).Error())
	}
	if err != nil {
		return fmt.Errorf("forgetting the entries of the hub: %w", err)
	}
	return nil
}

// hubKeys returns the keys of scripts that work with one hub.
func (s *Session) hubKeys(hub string) []string {
	return s.keys.hub(append(make([]string, 0, 4+keysPerHub), s.keys.server), hub)
}

// asBefore is an age that leaves the age of a hub as it is.
const asBefore time.Duration = -1

func milliseconds(d time.Duration) string {
	if d < 0 {
		return ""
	}
	return strconv.FormatInt(d.Milliseconds(), 10)
}

func bit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}
