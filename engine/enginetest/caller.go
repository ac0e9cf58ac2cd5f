package enginetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// roomy are bounds that no check exceeds unless it means to.
var roomy = engine.Bounds{Messages: 10_000, Bytes: 64 << 20, Age: time.Hour, Receipts: 10_000}

// A caller uses a session as a node does.
type caller struct {
	*suite
	engine.Session
	monitor *monitor

	mu        sync.Mutex
	followers []*follower
	ended     bool
}

// connect starts a session, and waits until it is connected.
func (s *suite) connect() *caller {
	s.Helper()
	c := s.begin()
	s.poll(c.monitor.wantUp)
	return c
}

// begin starts a session.
func (s *suite) begin() *caller {
	s.Helper()
	c := &caller{suite: s, monitor: &monitor{}}
	session, err := s.Connect(c.monitor)
	if err != nil {
		s.Fatalf("Connect returned %v", err)
	}
	c.Session = session
	s.Cleanup(func() {
		c.close()
		c.verify()
	})
	return c
}

// connectAll starts some sessions, if the engine is a cluster, and otherwise one.
func (s *suite) connectAll(n int) []*caller {
	s.Helper()
	callers := []*caller{s.connect()}
	if _, cluster := callers[0].Session.(engine.Cluster); !cluster {
		return callers
	}
	for range n - 1 {
		callers = append(callers, s.connect())
	}
	return callers
}

// cluster returns the session of an engine that is a cluster.
func (c *caller) cluster() engine.Cluster { return c.Session.(engine.Cluster) }

// close closes the session, unless it has ended.
func (c *caller) close() {
	c.Helper()
	if c.end() {
		return
	}
	if err := c.Close(); err != nil {
		c.Errorf("Close returned %v", err)
	}
	c.expectNothing()
}

// kill ends the session as if its process was killed.
func (c *caller) kill() {
	if !c.end() {
		c.Kill(c.Session)
	}
}

// end notes that the session ends, and returns whether it had ended.
func (c *caller) end() (ended bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ended, c.ended = c.ended, true
	return ended
}

// expectNothing makes each later call of a receiver or of the monitor an error.
func (c *caller) expectNothing() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.monitor.expectNothing()
	for _, f := range c.followers {
		f.expectNothing()
	}
}

// verify fails the test if a call of a receiver or of the monitor has broken a promise.
func (c *caller) verify() {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	errs := []error{c.monitor.broken()}
	for _, f := range c.followers {
		errs = append(errs, f.verify())
	}
	if err := errors.Join(errs...); err != nil {
		c.Error(err)
	}
}

// context returns a context for one call.
func (c *caller) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(c.Context(), patience)
}

// open opens a hub.
func (c *caller) open(hub string, bounds engine.Bounds) *follower {
	c.Helper()
	f, err := c.tryOpen(hub, bounds)
	if err != nil {
		c.Fatal(err)
	}
	return f
}

func (c *caller) tryOpen(hub string, bounds engine.Bounds) (*follower, error) {
	f := &follower{hub: hub}
	c.mu.Lock()
	c.followers = append(c.followers, f)
	c.mu.Unlock()
	ctx, cancel := c.context()
	defer cancel()
	snapshot, err := c.Open(ctx, hub, bounds, f)
	if err != nil {
		return nil, fmt.Errorf("Open of hub %q returned %w", hub, err)
	}
	f.begin(snapshot)
	return f, f.verify()
}

// publish publishes messages without a number.
func (c *caller) publish(hub string, messages ...engine.Message) []engine.Receipt {
	c.Helper()
	return c.publishBatch(hub, engine.Batch{Bounds: roomy, Messages: messages})
}

// publishBatch publishes a batch.
func (c *caller) publishBatch(hub string, batch engine.Batch) []engine.Receipt {
	c.Helper()
	receipts, err := c.tryPublish(hub, batch)
	if err != nil {
		c.Fatal(err)
	}
	return receipts
}

func (c *caller) tryPublish(hub string, batch engine.Batch) ([]engine.Receipt, error) {
	ctx, cancel := c.context()
	defer cancel()
	receipts, err := c.Publish(ctx, hub, batch)
	if err != nil {
		return nil, fmt.Errorf("Publish in hub %q returned %w", hub, err)
	}
	return receipts, checkReceipts(batch, receipts)
}

// publishPersistently repeats a batch until its outcome is known. It returns no receipts if nothing was published. Each
// attempt but the later ones has a timeout.
func (c *caller) publishPersistently(hub string, batch engine.Batch, timeout func() time.Duration) ([]engine.Receipt, error) {
	deadline := time.Now().Add(patience)
	tried := false // an attempt may have published the messages
	for attempt := 1; ; attempt++ {
		limit := time.Second
		if attempt <= 3 {
			limit = timeout()
		}
		ctx, cancel := context.WithTimeout(c.Context(), limit)
		receipts, err := c.Publish(ctx, hub, batch)
		cancel()
		switch {
		case err == nil:
			return receipts, checkReceipts(batch, receipts)
		case !errors.Is(err, engine.ErrUnavailable):
			tried = true
		case !tried:
			return nil, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("Publish in hub %q returned errors for %v, at last: %w", hub, patience, err)
		}
		c.pause()
	}
}

// checkReceipts returns an error if receipts cannot be those of the batch.
func checkReceipts(batch engine.Batch, receipts []engine.Receipt) error {
	if len(receipts) != len(batch.Messages) {
		return fmt.Errorf("Publish returned %d receipts for %d messages", len(receipts), len(batch.Messages))
	}
	for i, r := range receipts {
		if r.Unknown {
			if batch.Messages[i].Attempt == engine.First || r.Repeated {
				return fmt.Errorf("the receipt of message %d with %v is %+v", i, batch.Messages[i].Attempt, r)
			}
			continue
		}
		if err := errors.Join(checkEpoch(r.Epoch), checkTime(r.At)); err != nil {
			return fmt.Errorf("the receipt of message %d: %w", i, err)
		}
		if r.Seq == 0 {
			return fmt.Errorf("the receipt of message %d has number 0", i)
		}
	}
	return nil
}

// forget makes a hub forget its entries.
func (c *caller) forget(hub string) {
	c.Helper()
	ctx, cancel := c.context()
	defer cancel()
	if err := c.Forget(ctx, hub); err != nil {
		c.Fatalf("Forget of hub %q returned %v", hub, err)
	}
}

// read reads what a cluster has of a hub.
func (c *caller) read(hub string, after engine.Position) engine.Snapshot {
	c.Helper()
	ctx, cancel := c.context()
	defer cancel()
	snapshot, err := c.cluster().Read(ctx, hub, after)
	if err == nil {
		err = checkSnapshot(snapshot)
	}
	if err != nil {
		c.Fatalf("Read of hub %q: %v", hub, err)
	}
	return snapshot
}

// announce announces users of a hub on this node.
func (c *caller) announce(hub string, users ...engine.UserCount) {
	c.Helper()
	ctx, cancel := c.context()
	defer cancel()
	if err := c.cluster().Announce(ctx, hub, users); err != nil {
		c.Fatalf("Announce in hub %q returned %v", hub, err)
	}
}

// renew keeps this node alive.
func (c *caller) renew(status engine.Status, known ...engine.Known) engine.Renewal {
	c.Helper()
	ctx, cancel := c.context()
	defer cancel()
	renewal, err := c.cluster().Renew(ctx, status, known)
	if err != nil {
		c.Fatalf("Renew returned %v", err)
	}
	return renewal
}

// nodes returns the nodes of the cluster.
func (c *caller) nodes() []engine.Node {
	c.Helper()
	ctx, cancel := c.context()
	defer cancel()
	nodes, err := c.cluster().Nodes(ctx)
	if err != nil {
		c.Fatalf("Nodes returned %v", err)
	}
	return nodes
}

// A monitor notes how a session does.
type monitor struct {
	mu     sync.Mutex
	told   bool
	reason error // why the session is down
	downs  int   // how often it went down
	closed bool
	err    error // a call after Close
}

// State implements [engine.Monitor].
func (m *monitor) State(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		m.err = errors.New("the session called Monitor.State after Close")
	}
	m.told, m.reason = true, err
	if err != nil {
		m.downs++
	}
}

// Warn implements [engine.Monitor].
func (m *monitor) Warn(string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		m.err = errors.New("the session called Monitor.Warn after Close")
	}
}

func (m *monitor) expectNothing() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
}

func (m *monitor) broken() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// wantUp returns an error unless the session is connected.
func (m *monitor) wantUp() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.told {
		return errors.New("the session has not told the monitor whether it is connected")
	}
	if m.reason != nil {
		return fmt.Errorf("the session is not connected: %w", m.reason)
	}
	return nil
}

// wantDown returns an error unless the session has been down more often than before.
func (m *monitor) wantDown(before int) error {
	if m.countDowns() <= before {
		return errors.New("the session has not told the monitor that the engine cannot be reached")
	}
	return nil
}

func (m *monitor) countDowns() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.downs
}
