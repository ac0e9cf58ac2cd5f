package chatbroadcast

import (
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"go.uber.org/zap"
)

// A scope belongs to all handlers with the same `hub` value, as written, in this and the following configurations. It
// has the clients that came in through them, and counts for their limits. registry.mu guards its fields, except
// current.
type scope struct {
	registry *registry
	key      string
	leases   []*lease // oldest first
	removals int      // how many times the scope has lost its last lease
	// members[:present] are members of their hubs. The others have left, and the server is still closing their
	// connections. They count for the limits until they are finished, because until then they cost as much as a member.
	members []*member
	present int
	joining int // members with a reservation that have not joined yet
	perHub  map[string]*occupancy
	perIP   map[netip.Prefix]int
	// opened is how many of the hubs in perHub each address has opened.
	opened map[netip.Prefix]int
	// kept has the hubs without clients that the scope keeps for their history, by the addresses that opened them. A
	// hub that clients have left through this scope comes in when their connections are closed. Until then it is in
	// perHub.
	kept fair.Queue[*namedHub]
	// buckets live as long as the scope, which lives at least until its last client is finished.
	buckets buckets

	// current is the oldest of leases, or nil. The oldest lease belongs to the running configuration; a newer
	// configuration may yet fail.
	current atomic.Pointer[lease]
}

// An occupancy describes the clients of one scope in one hub.
type occupancy struct {
	clients int          // with those that have left and whose connections are not closed yet
	opener  netip.Prefix // the address that opened it, or an heir once that address has no clients left
}

// A lease is a configuration's hold on a scope.
type lease struct {
	scope   *scope
	logger  *zap.Logger
	emitter emitter
	process processSettings
	drain   time.Duration // how long an exit may take
}

// lease returns a new lease on the scope with the given key, a hub value. A reload provisions the new configuration
// before it cleans up the old one. So a scope that both name goes from one lease to two to one, and its clients notice
// nothing. The registry logs with logger once the leases before it are released. It uses emitter while its
// configuration runs.
func (r *registry) lease(key string, logger *zap.Logger, emitter emitter, process processSettings, drain time.Duration) *lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.scopes[key]
	if s == nil {
		s = &scope{
			registry: r,
			key:      key,
			perHub:   map[string]*occupancy{},
			perIP:    map[netip.Prefix]int{},
			opened:   map[netip.Prefix]int{},
		}
		r.scopes[key] = s
	}
	l := &lease{scope: s, logger: logger, emitter: emitter, process: process, drain: drain}
	s.leases = append(s.leases, l)
	s.current.Store(s.leases[0])
	r.notifier.add(l)
	r.leases = append(r.leases, l)
	r.applyProcessSettingsLocked()
	return l
}

// applyProcessSettingsLocked applies what the oldest lease says about the process, because a newer configuration may yet
// fail.
func (r *registry) applyProcessSettingsLocked() {
	if len(r.leases) == 0 {
		r.current.Store(nil) // nobody opens hubs
		return
	}
	p := r.leases[0].process
	r.process.Memory.Histories.SetMost(orDefault(p.history, hub.DefaultMaxHistory))
	r.process.Memory.Buffers.SetMost(orDefault(p.buffers, hub.DefaultMaxBuffers))
	r.useLinkLocked(p.link)
}

// release gives the lease back. Without an exit, it starts to close the clients of a scope that has lost its last
// lease, in the background. When Caddy exits, it closes all clients and waits until they are finished, for the longest
// drain of all leases at most. Releasing a lease again does nothing.
func (r *registry) release(l *lease) {
	if caddy.Exiting() {
		r.beginExit()
		r.awaitExit()
		r.refusals.flush()
	}
	if !r.releaseScope(l) {
		return
	}
	l.process.link.release()
	if caddy.Exiting() {
		r.mu.Lock()
		last, exitBy := len(r.leases) == 0, r.exitBy
		r.mu.Unlock()
		if last {
			r.awaitLinks(exitBy.Add(exitPatience))
		}
	}
}

// exitPatience is how much longer than the drain of clients an exit may take to close an engine.
const exitPatience = 5 * time.Second

// releaseScope gives the lease back, and reports whether it has not been given back before.
func (r *registry) releaseScope(l *lease) bool {
	s := l.scope
	r.lock()
	defer r.mu.Unlock()
	i := slices.Index(s.leases, l)
	if i < 0 {
		return false
	}
	s.leases = slices.Delete(s.leases, i, i+1)
	r.notifier.remove(l)
	r.leases = slices.DeleteFunc(r.leases, func(other *lease) bool { return other == l })
	r.applyProcessSettingsLocked()
	if len(s.leases) > 0 {
		s.current.Store(s.leases[0])
		return true
	}
	s.current.Store(nil)
	for _, n := range r.named {
		if n.keeper == s {
			r.closeKeptLocked(n)
		}
	}
	if len(s.members)+s.joining == 0 {
		delete(r.scopes, s.key)
		return true
	}
	s.removals++
	if !caddy.Exiting() {
		// It ends within removalSpread, or when the scope has a lease again. Nobody waits for it, because a reload must
		// not.
		go r.closeUnleased(s, s.removals)
	}
	return true
}

// beginExit closes every client: each writer flushes the published messages and sends the close frame. Nobody joins any
// more, because Caddy exits. A second call does nothing.
func (r *registry) beginExit() {
	r.mu.Lock()
	if r.exited != nil {
		r.mu.Unlock()
		return
	}
	var members []*member
	var drain time.Duration
	for _, s := range r.scopes {
		members = append(members, s.members[:s.present]...)
		for _, l := range s.leases {
			drain = max(drain, l.drain)
		}
	}
	r.exited, r.exitBy = make(chan struct{}), time.Now().Add(drain)
	if r.live == 0 {
		close(r.exited)
	}
	r.mu.Unlock()
	for _, m := range members {
		m.client.Close(hub.CloseShuttingDown)
	}
}

// cutPatience is how long an exit waits for the clients that it has cut. Each needs a moment to finish and log its
// line.
const cutPatience = 200 * time.Millisecond

// awaitExit waits, after beginExit, until all clients are finished. When the longest drain is over it cuts the rest, so
// that the log has a line about each of them, too.
func (r *registry) awaitExit() {
	r.mu.Lock()
	exited, exitBy := r.exited, r.exitBy
	r.mu.Unlock()
	select {
	case <-exited:
		return
	case <-time.After(time.Until(exitBy)):
	}
	var stuck []*member
	r.mu.Lock()
	for _, s := range r.scopes {
		stuck = append(stuck, s.members...)
	}
	r.mu.Unlock()
	for _, m := range stuck {
		m.client.Cut(hub.CloseShuttingDown)
	}
	select {
	case <-exited:
	case <-time.After(time.Until(exitBy.Add(cutPatience))):
	}
}

// removalSpread is the time over which the server closes the clients of a removed hub value. So they do not all
// reconnect at the same moment, to whichever server. removalStep is the time between two steps.
const (
	removalSpread = 10 * time.Second
	removalStep   = 100 * time.Millisecond
)

// closeUnleased closes the clients of s, spread over removalSpread. It stops if s has a lease again, or has lost one
// again since the given removal.
func (r *registry) closeUnleased(s *scope, removal int) {
	for steps := int(removalSpread / removalStep); steps > 0; steps-- {
		r.mu.Lock()
		if len(s.leases) > 0 || s.removals != removal || s.present == 0 {
			r.mu.Unlock()
			return
		}
		n := (s.present + steps - 1) / steps
		some := slices.Clone(s.members[s.present-n : s.present])
		r.mu.Unlock()
		for _, m := range some {
			m.client.Close(hub.CloseHubRemoved)
		}
		time.Sleep(removalStep)
	}
}

// logger returns the logger of the configuration that runs, if it has a lease on s, or Caddy's own.
func (s *scope) logger() *zap.Logger {
	if l := s.current.Load(); l != nil {
		return l.logger
	}
	return processLogger()
}

// The refusals of join and admit.
var (
	errMaxClients       = &refusal{errors.New("the directive's max_clients is reached"), refusedMaxClients}
	errMaxClientsPerHub = &refusal{errors.New("the directive's max_clients_per_hub is reached"), refusedMaxClientsPerHub}
	errMaxClientsPerIP  = &refusal{errors.New("the directive's max_clients_per_ip is reached"), refusedMaxClientsPerIP}
	errMaxHubs          = &refusal{errors.New("the directive's max_hubs is reached"), refusedMaxHubs}
	errMaxHubsPerIP     = &refusal{errors.New("the address has opened as many hubs of the directive's max_hubs as are left for others"), refusedMaxHubsPerIP}
	errBusy             = &refusal{errors.New("too many large messages are being received, or too many from this address"), refusedBusy}
	errShuttingDown     = &refusal{errors.New("the server is shutting down"), refusedShuttingDown}
	errHubRemoved       = &refusal{errors.New("the directive's hub value is no longer configured"), refusedShuttingDown}
	errConnecting       = errors.New("it is not connected yet")
	errRate             = &refusal{errors.New("the directive's rate is exceeded from this address"), refusedRate}
)

// openScopeLocked returns the scope with the given key, a hub value. It returns a refusal if the hub value is not
// configured any more, or if Caddy exits. The request may come from a configuration that was replaced meanwhile, so the
// current scope of that hub value counts.
func (r *registry) openScopeLocked(key string) (*scope, error) {
	s := r.scopes[key]
	switch {
	case caddy.Exiting():
		return nil, errShuttingDown
	case s == nil || len(s.leases) == 0:
		return nil, errHubRemoved
	}
	return s, nil
}

// checkOpen returns a refusal if the scope with the given key takes no new requests.
func (r *registry) checkOpen(key string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.openScopeLocked(key)
	return err
}

// admit takes one message over HTTP from the rate of an address, in the scope with the given key. It returns a refusal
// if the scope is closed, or if the rate is exceeded; wait is then how long that lasts. A zero rate is no limit.
func (r *registry) admit(key string, address netip.Prefix, rate hub.Rate) (wait time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.openScopeLocked(key)
	if err != nil || rate == (hub.Rate{}) {
		return 0, err
	}
	if wait, ok := s.buckets.take(time.Now(), address, rate); !ok {
		return wait, errRate
	}
	return 0, nil
}

// allMembers returns the members of all hubs, in no order.
func (r *registry) allMembers() []*member {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*member, 0, r.live)
	for _, s := range r.scopes {
		all = append(all, s.members[:s.present]...)
	}
	return all
}

// decrement counts m[k] down. It deletes k at zero, so that keys which are not in use take no memory.
func decrement[K comparable](m map[K]int, k K) {
	m[k]--
	if m[k] == 0 {
		delete(m, k)
	}
}
