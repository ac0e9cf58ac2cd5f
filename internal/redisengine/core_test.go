//go:build unix

package redisengine

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A ledger knows which text each position of a hub names, from everything that anybody has seen.
type ledger struct {
	t testing.TB

	mu    sync.Mutex
	texts map[string]map[engine.Position]string
}

func (l *ledger) note(hub string, position engine.Position, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.texts == nil {
		l.texts = map[string]map[engine.Position]string{}
	}
	if l.texts[hub] == nil {
		l.texts[hub] = map[engine.Position]string{}
	}
	if before, found := l.texts[hub][position]; found && before != text {
		l.t.Errorf("in %s %v names %q and %q", hub, position, before, text)
	}
	l.texts[hub][position] = text
}

// epochs returns how many epochs anybody has seen of a hub.
func (l *ledger) epochs(hub string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := map[string]bool{}
	for position := range l.texts[hub] {
		seen[position.Epoch] = true
	}
	return len(seen)
}

// A core uses one hub on one node, as the plugin does: it applies what is next, fetches what it has missed, and begins
// anew in a new epoch.
type core struct {
	node   *node
	hub    string
	ledger *ledger

	mu       sync.Mutex
	opening  bool
	behind   bool
	repairs  int // that run
	position engine.Position
	base     uint64
	log      []string // from base on
	version  uint64
	users    map[engine.NodeID]map[string]int
	resets   int
}

// openCore opens a hub.
func openCore(n *node, hub string, l *ledger) *core {
	n.t.Helper()
	c := &core{node: n, hub: hub, ledger: l, opening: true}
	ctx, cancel := n.context()
	defer cancel()
	snapshot, err := n.Open(ctx, hub, bounds, c)
	if err != nil {
		n.t.Fatalf("Open returned %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opening = false
	c.replaceLocked(snapshot)
	return c
}

// replaceLocked begins anew with a snapshot.
func (c *core) replaceLocked(s engine.Snapshot) {
	c.position, c.base, c.log = engine.Position{Epoch: s.Epoch, Seq: s.Base}, s.Base, nil
	c.appendLocked(s.Entries)
	c.setUsersLocked(s)
}

func (c *core) setUsersLocked(s engine.Snapshot) {
	c.version = s.Version
	c.users = map[engine.NodeID]map[string]int{}
	for node, users := range s.Users {
		c.applyUsersLocked(node, users)
	}
}

func (c *core) applyUsersLocked(node engine.NodeID, users []engine.UserCount) {
	if c.users[node] == nil {
		c.users[node] = map[string]int{}
	}
	for _, u := range users {
		if c.users[node][u.User] = u.Clients; u.Clients == 0 {
			delete(c.users[node], u.User)
		}
	}
	if len(c.users[node]) == 0 {
		delete(c.users, node)
	}
}

func (c *core) appendLocked(entries []engine.Entry) {
	for _, e := range entries {
		c.position.Seq++
		c.log = append(c.log, string(e.Data))
		c.ledger.note(c.hub, c.position, string(e.Data))
	}
}

// Entries implements engine.Receiver.
func (c *core) Entries(epoch string, first uint64, entries []engine.Entry) {
	for i, e := range entries {
		c.ledger.note(c.hub, engine.Position{Epoch: epoch, Seq: first + uint64(i)}, string(e.Data))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next := c.position.Seq + 1
	switch {
	case c.opening || epoch != c.position.Epoch || first > next:
		c.fallBehindLocked()
	case first+uint64(len(entries)) > next:
		c.appendLocked(entries[next-first:])
	}
}

// Users implements engine.Receiver.
func (c *core) Users(version uint64, node engine.NodeID, users []engine.UserCount) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.opening || version > c.version+1 {
		c.fallBehindLocked()
	} else if version == c.version+1 {
		c.version = version
		c.applyUsersLocked(node, users)
	}
}

// fallBehindLocked fetches what the core has missed.
func (c *core) fallBehindLocked() {
	if c.behind {
		return
	}
	c.behind = true
	c.repairs++
	go c.repair() // ends with one answer; awaitRepairs waits for it
}

// awaitRepairs waits until nothing is being fetched.
func (c *core) awaitRepairs() {
	c.node.t.Helper()
	poll(c.node.t, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.repairs > 0 {
			return errors.New("a repair still runs")
		}
		return nil
	})
}

func (c *core) repair() {
	c.mu.Lock()
	have := c.position
	c.behind = false
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.repairs--
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	s, err := c.node.Read(ctx, c.hub, have)
	if err != nil {
		return // the next renewal tries again
	}
	for i, e := range s.Entries {
		c.ledger.note(c.hub, engine.Position{Epoch: s.Epoch, Seq: s.Base + uint64(i) + 1}, string(e.Data))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.Epoch != c.position.Epoch {
		c.resets++
		c.replaceLocked(s)
		return
	}
	if s.Base > c.position.Seq {
		c.node.t.Errorf("%s has lost messages %d to %d", c.hub, c.position.Seq+1, s.Base)
		return
	}
	if s.Seq > c.position.Seq {
		c.appendLocked(s.Entries[c.position.Seq-s.Base:])
	}
	if s.Version > c.version {
		c.setUsersLocked(s)
	}
}

func (c *core) known() engine.Known {
	c.mu.Lock()
	defer c.mu.Unlock()
	return engine.Known{Hub: c.hub, Position: c.position, Version: c.version, Bounds: bounds}
}

// state returns the position, and a copy of the log after base.
func (c *core) state() (engine.Position, uint64, []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.position, c.base, slices.Clone(c.log)
}

// A sender publishes in one hub, as the plugin does: it repeats a batch until it knows its outcome.
type sender struct {
	core   *core
	name   string
	number uint64

	published []string // acknowledged
	unknown   []string // given up without knowing
}

// send publishes one batch. It gives up after a while, like the plugin.
func (s *sender) send(patience time.Duration) {
	s.number++
	known := s.core.known()
	batch := engine.Batch{Bounds: bounds, Known: known.Position, Number: s.number}
	for i := range 1 + rand.IntN(3) {
		m := engine.Message{Data: fmt.Appendf(nil, "%s-%d-%d", s.name, s.number, i)}
		if rand.IntN(2) == 0 {
			sum := sha256.Sum256(m.Data)
			copy(m.Key[:], sum[:])
		}
		batch.Messages = append(batch.Messages, m)
	}
	tried := false
	for deadline := time.Now().Add(patience); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		receipts, err := s.core.node.Publish(ctx, s.core.hub, batch)
		cancel()
		if err == nil {
			for i, r := range receipts {
				text := string(batch.Messages[i].Data)
				s.core.ledger.note(s.core.hub, r.Position, text)
				s.published = append(s.published, text)
			}
			return
		}
		tried = tried || !errors.Is(err, engine.ErrUnavailable)
		if time.Now().After(deadline) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if tried {
		for _, m := range batch.Messages {
			s.unknown = append(s.unknown, string(m.Data))
		}
	}
}

// A cluster is some nodes that use some hubs, with one sender for each of both, while something goes wrong.
type cluster struct {
	t       testing.TB
	nodes   []*node
	cores   [][]*core // by node and hub
	senders []*sender
	ledger  ledger
	renewer sync.WaitGroup
	stop    context.CancelFunc
}

const hubsOfCluster = 3

// startCluster connects a node with each URL. The nodes renew themselves often until the end of the test.
func startCluster(t testing.TB, urls ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, ledger: ledger{t: t}}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	for _, url := range urls {
		n := connect(t, url)
		c.nodes = append(c.nodes, n)
		var cores []*core
		for hub := range hubsOfCluster {
			core := openCore(n, fmt.Sprint("hub ", hub), &c.ledger)
			cores = append(cores, core)
			c.senders = append(c.senders, &sender{core: core, name: fmt.Sprintf("node %d hub %d", len(c.nodes), hub)})
		}
		c.cores = append(c.cores, cores)
		c.renewer.Go(func() { renewOften(ctx, n, cores) }) // ends with the test, and is waited for below
	}
	t.Cleanup(func() {
		stop()
		c.renewer.Wait()
		for _, cores := range c.cores {
			for _, core := range cores {
				core.awaitRepairs()
			}
		}
	})
	return c
}

func renewOften(ctx context.Context, n *node, cores []*core) {
	for ctx.Err() == nil {
		var known []engine.Known
		for _, c := range cores {
			known = append(known, c.known())
		}
		timeout, cancel := context.WithTimeout(ctx, 2*time.Second)
		renewal, err := n.Renew(timeout, engine.Status{Name: "machine"}, known)
		cancel()
		if err == nil {
			for _, changed := range renewal.Changed {
				i := slices.IndexFunc(cores, func(c *core) bool { return c.hub == changed.Hub })
				cores[i].mu.Lock()
				cores[i].fallBehindLocked()
				cores[i].mu.Unlock()
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// during lets all senders publish while f runs, and a little longer.
func (c *cluster) during(f func()) {
	c.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, s := range c.senders {
		wg.Go(func() {
			for ctx.Err() == nil {
				s.send(10 * time.Second)
				time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	f()
	time.Sleep(50 * time.Millisecond)
	stop()
	wg.Wait()
}

// settle waits until all nodes have the same, and checks that it is what it must be. lossless says that nothing may be
// lost or begun anew.
func (c *cluster) settle(lossless bool) {
	c.t.Helper()
	for _, n := range c.nodes {
		poll(c.t, n.wantUp)
	}
	for hub := range hubsOfCluster {
		c.settleHub(hub, lossless)
	}
}

func (c *cluster) settleHub(hub int, lossless bool) {
	c.t.Helper()
	name := c.cores[0][hub].hub
	last := c.senders[hub] // of the first node
	before := len(last.published)
	last.send(patience)
	if len(last.published) == before {
		c.t.Fatalf("nothing can be published in %s", name)
	}
	poll(c.t, func() error {
		position, base, log := c.cores[0][hub].state()
		if !slices.Contains(log, last.published[before]) {
			return fmt.Errorf("%s does not have the last message", name)
		}
		for _, cores := range c.cores[1:] {
			other, otherBase, otherLog := cores[hub].state()
			if other != position {
				return fmt.Errorf("two nodes are at %v and %v in %s", position, other, name)
			}
			common := max(base, otherBase)
			if !slices.Equal(log[common-base:], otherLog[common-otherBase:]) {
				return fmt.Errorf("two nodes have other messages in %s", name)
			}
		}
		return nil
	})
	for _, cores := range c.cores {
		cores[hub].awaitRepairs()
	}
	_, base, log := c.cores[0][hub].state()
	count := map[string]int{}
	for _, text := range log {
		count[text]++
	}
	for text, n := range count {
		if n > 1 && lossless {
			c.t.Errorf("%q is in %s %d times", text, name, n)
		}
	}
	if !lossless {
		return
	}
	if epochs := c.ledger.epochs(name); epochs != 1 || base != 0 {
		c.t.Errorf("%s had %d epochs, want 1", name, epochs)
	}
	for _, s := range c.senders {
		if s.core.hub != name {
			continue
		}
		for _, text := range s.published {
			if count[text] != 1 {
				c.t.Errorf("%q was acknowledged, and is in %s %d times", text, name, count[text])
			}
		}
		known := slices.Concat(s.published, s.unknown)
		for text := range count {
			if len(text) > len(s.name) && text[:len(s.name)+1] == s.name+"-" && !slices.Contains(known, text) {
				c.t.Errorf("%q was refused, and is in %s", text, name)
			}
		}
	}
}
