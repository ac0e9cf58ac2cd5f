package enginetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A Session is a node of a [Server].
type Session struct {
	server  *Server
	monitor engine.Monitor // or nil
	id      engine.NodeID

	ended     chan struct{} // closed when the session ends
	delivered chan struct{} // closed when no receiver is called any more

	// Guarded by server.mu.
	number  uint64
	open    map[string]*opening
	due     []call     // of the receivers and of the monitor; short, because they return at once
	changed *sync.Cond // what deliver waits for
	told    bool       // whether the monitor knows the state
	isDown  bool       // the state that the monitor knows

	// The faults. Guarded by server.mu.
	down       error // why this session does not reach the server, or nil
	holds      int
	losePushes int
}

// An opening is what Open begins, and Leave or the next Open ends.
type opening struct {
	to     engine.Receiver
	bounds engine.Bounds // that the node has named last
}

// nameLocked notes the bounds that the node names for a hub, which may not be open.
func (s *Session) nameLocked(hub string, bounds engine.Bounds) {
	if o := s.open[hub]; o != nil {
		o.bounds = bounds
	}
}

// A call is one that the session has to make. It makes calls in order, one at a time.
type call struct {
	hub     string
	opening *opening // whose receiver it calls, or nil for the monitor
	make    func()
}

func newSession(server *Server, monitor engine.Monitor) *Session {
	return &Session{
		server:    server,
		monitor:   monitor,
		id:        engine.NodeID(engine.NewEpoch()),
		ended:     make(chan struct{}),
		delivered: make(chan struct{}),
		open:      map[string]*opening{},
		changed:   sync.NewCond(&server.mu),
	}
}

// Open implements [engine.Session].
func (s *Session) Open(ctx context.Context, name string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.hubReadyLocked(ctx, name); err != nil {
		return engine.Snapshot{}, err
	}
	now := time.Now()
	h := s.server.hubLocked(name, now)
	delete(s.open, name) // the receiver before gets nothing more
	h.bounds = s.server.widestLocked(name, bounds)
	h.trim(now)
	s.server.takeBackLocked(name, s.id)
	// The lock makes the snapshot and the beginning of what follows it one step.
	s.open[name] = &opening{to, bounds}
	return h.snapshot(engine.Position{}), nil
}

// Leave implements [engine.Session].
func (s *Session) Leave(name string, from engine.Receiver) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if o := s.open[name]; o == nil || o.to != from || s.hasEnded() {
		return
	}
	delete(s.open, name)
	if s.unreachableLocked() == nil { // otherwise connectLocked does it
		s.server.takeBackLocked(name, s.id)
	}
}

// Publish implements [engine.Session].
func (s *Session) Publish(ctx context.Context, name string, batch engine.Batch) ([]engine.Receipt, error) {
	if n := len(batch.Messages); n < 1 || n > 64 {
		return nil, fmt.Errorf("%w: a batch has 1 to 64 messages, this one has %d", engine.ErrUnavailable, n)
	}
	if err := s.awaitRelease(ctx); err != nil {
		return nil, err
	}

	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.hubReadyLocked(ctx, name); err != nil {
		return nil, err
	}
	if s.server.loseRequests > 0 {
		s.server.loseRequests--
		return nil, errRequestLost
	}
	receipts, err := s.publishLocked(name, batch)
	if err != nil {
		return nil, err
	}
	if s.server.loseReplies > 0 {
		s.server.loseReplies--
		return nil, errReplyLost
	}
	return receipts, nil
}

func (s *Session) publishLocked(name string, batch engine.Batch) ([]engine.Receipt, error) {
	now := time.Now()
	h := s.server.hubLocked(name, now)
	s.nameLocked(name, batch.Bounds)
	h.bounds = s.server.widestLocked(name, batch.Bounds)
	h.trim(now)
	if batch.Number != 0 {
		if receipts, err := h.batches[s.id].repeat(batch); receipts != nil || err != nil {
			return receipts, err
		}
	}

	epoch, first := h.epoch, h.seq+1
	receipts, published := h.publish(batch, now)
	h.trim(now)
	if batch.Number != 0 {
		h.batches[s.id] = numberedBatch{batch.Number, slices.Clone(batch.Messages), slices.Clone(receipts)}
	}
	if len(published) > 0 {
		s.server.pushLocked(name, func(to engine.Receiver) { to.Entries(epoch, first, published) })
	}
	return receipts, nil
}

// awaitRelease waits while HoldPublish holds calls.
func (s *Session) awaitRelease(ctx context.Context) error {
	for {
		s.server.mu.Lock()
		var held chan struct{}
		if len(s.server.holds) > 0 {
			held = s.server.holds[0]
		}
		s.server.mu.Unlock()
		if held == nil {
			return nil
		}
		select {
		case <-held:
		case <-s.ended:
			return errEnded
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Forget implements [engine.Session].
func (s *Session) Forget(ctx context.Context, name string) error {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.hubReadyLocked(ctx, name); err != nil {
		return err
	}
	s.server.hubLocked(name, time.Now()).forget()
	return nil
}

// Close implements [engine.Session]. The other nodes learn at once that the users of this one are gone.
func (s *Session) Close() error {
	s.end(true)
	return nil
}

// end ends the session, and waits for a call of a receiver that has begun. politely says that the server is to know.
func (s *Session) end(politely bool) {
	s.server.mu.Lock()
	if !s.hasEnded() {
		close(s.ended)
		s.changed.Signal()
		s.server.sessions = slices.DeleteFunc(s.server.sessions, func(other *Session) bool { return other == s })
		if politely && s.unreachableLocked() == nil {
			s.server.removeNodeLocked(s.id)
		}
	}
	s.server.mu.Unlock()
	<-s.delivered
}

func (s *Session) hasEnded() bool {
	select {
	case <-s.ended:
		return true
	default:
		return false
	}
}

// ID implements [engine.Cluster].
func (s *Session) ID() engine.NodeID { return s.id }

// Number implements [engine.Cluster].
func (s *Session) Number() uint64 {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return s.number
}

// Read implements [engine.Cluster].
func (s *Session) Read(ctx context.Context, name string, after engine.Position) (engine.Snapshot, error) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.hubReadyLocked(ctx, name); err != nil {
		return engine.Snapshot{}, err
	}
	return s.server.hubLocked(name, time.Now()).snapshot(after), nil
}

// Announce implements [engine.Cluster].
func (s *Session) Announce(ctx context.Context, name string, users []engine.UserCount) error {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.hubReadyLocked(ctx, name); err != nil {
		return err
	}
	if s.open[name] == nil {
		return fmt.Errorf("hub %q is not open: open it before announcing its users", name)
	}
	now := time.Now()
	if s.server.nodes[s.id] == nil {
		// Should the node end now, others must find it and remove these users.
		s.server.nodes[s.id] = &node{Node: engine.Node{ID: s.id, Number: s.number}, expires: now, forgotten: true}
	}
	s.server.announceLocked(name, s.server.hubLocked(name, now), s.id, slices.Clone(users))
	return nil
}

// Renew implements [engine.Cluster].
func (s *Session) Renew(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.readyLocked(ctx); err != nil {
		return engine.Renewal{}, err
	}
	now := time.Now()
	before := s.server.nodes[s.id]
	renewal := engine.Renewal{Forgotten: before == nil || before.forgotten}
	s.server.nodes[s.id] = &node{
		Node:    engine.Node{ID: s.id, Number: s.number, Status: status, Renewed: now},
		expires: now.Add(engine.Lease),
	}
	s.server.removeDeadLocked(now)

	for _, k := range known {
		h := s.server.hubLocked(k.Hub, now)
		s.nameLocked(k.Hub, k.Bounds)
		h.bounds = s.server.widestLocked(k.Hub, k.Bounds)
		h.trim(now)
		if h.position() != k.Position || h.version != k.Version {
			k.Position, k.Version = h.position(), h.version
			renewal.Changed = append(renewal.Changed, k)
		}
	}
	return renewal, nil
}

// Nodes implements [engine.Cluster].
func (s *Session) Nodes(ctx context.Context) ([]engine.Node, error) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	if err := s.readyLocked(ctx); err != nil {
		return nil, err
	}
	nodes := []engine.Node{}
	for _, node := range s.server.nodes {
		if time.Now().Before(node.expires) || node.ID == s.id {
			nodes = append(nodes, node.Node)
		}
	}
	// The others have taken this node for dead, but it asks.
	if s.server.nodes[s.id] == nil {
		nodes = append(nodes, engine.Node{ID: s.id, Number: s.number})
	}
	for i := range nodes {
		nodes[i].Self = nodes[i].ID == s.id
	}
	slices.SortFunc(nodes, func(a, b engine.Node) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Number, b.Number))
	})
	return nodes, nil
}

var errEnded = fmt.Errorf("%w: the session is closed", engine.ErrUnavailable)

// hubReadyLocked returns why a call for a hub cannot be made, or nil.
func (s *Session) hubReadyLocked(ctx context.Context, name string) error {
	if name == "" || len(name) > 255 || !utf8.ValidString(name) {
		return fmt.Errorf("%w: a hub cannot have the name %q: use 1 to 255 bytes of UTF-8", engine.ErrUnavailable, name)
	}
	return s.readyLocked(ctx)
}

// readyLocked returns why a call cannot be made, or nil.
func (s *Session) readyLocked(ctx context.Context) error {
	if s.hasEnded() {
		return errEnded
	}
	if err := errors.Join(context.Cause(ctx), s.unreachableLocked()); err != nil {
		return fmt.Errorf("%w: %w", engine.ErrUnavailable, err)
	}
	return nil
}

// unreachableLocked returns why the session does not reach the server, or nil.
func (s *Session) unreachableLocked() error {
	if s.server.down != nil {
		return s.server.down
	}
	return s.down
}

// tellStateLocked tells the monitor whether the session reaches the server, if the monitor does not know it.
func (s *Session) tellStateLocked() {
	reason := s.unreachableLocked()
	if s.told && s.isDown == (reason != nil) {
		return
	}
	s.told, s.isDown = true, reason != nil
	if reason == nil {
		s.connectLocked()
	}
	if s.monitor != nil {
		s.callLocked(call{make: func() { s.monitor.State(reason) }})
	}
}

// connectLocked does what the session could not do while it did not reach the server.
func (s *Session) connectLocked() {
	if s.number == 0 {
		s.server.registerLocked(s, time.Now())
	}
	for _, name := range slices.Sorted(maps.Keys(s.server.hubs)) {
		if s.open[name] == nil {
			s.server.takeBackLocked(name, s.id)
		}
	}
}

// pushLocked has the session call its receiver of a hub, if it has one.
func (s *Session) pushLocked(name string, f func(engine.Receiver)) {
	o := s.open[name]
	if o == nil || s.unreachableLocked() != nil {
		return
	}
	if s.losePushes > 0 {
		s.losePushes--
		return
	}
	s.callLocked(call{name, o, func() { f(o.to) }})
}

func (s *Session) callLocked(c call) {
	s.due = append(s.due, c)
	s.changed.Signal()
}

// deliver makes all calls of receivers and of the monitor, so that they are in order and one at a time.
func (s *Session) deliver() {
	defer close(s.delivered)
	for {
		c, ok := s.next()
		if !ok {
			return
		}
		c.make()
	}
}

// next waits for the next call that is due. It returns false when the session has ended.
func (s *Session) next() (call, bool) {
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	for !s.hasEnded() {
		if len(s.due) == 0 || s.holds > 0 {
			s.changed.Wait()
			continue
		}
		c := s.due[0]
		s.due = s.due[1:]
		// A receiver that has left or was replaced gets nothing more.
		if c.opening == nil || s.open[c.hub] == c.opening {
			return c, true
		}
	}
	return call{}, false
}

// Interface guards
var _ engine.Cluster = (*Session)(nil)
