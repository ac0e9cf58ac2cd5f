package chatbroadcast

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// hubs are the hubs of this process. They outlive configurations: what a configuration holds is a lease.
var hubs = newRegistry()

func newRegistry() *registry {
	r := &registry{memory: newMemory(), hubs: map[string]*hub{}, scopes: map[string]*scope{}, taps: map[string][]*tap{}}
	r.refusals.pauses = map[string]*refusalBatch{}
	r.work.began = time.Now()
	r.metrics = newMetrics(r)
	return r
}

// A registry holds hubs by name, and by hub value the scopes that keep them open to new clients.
type registry struct {
	metrics *metrics
	events  events
	memory  *memory
	work    workloads

	refusals refusalLog

	mu     sync.Mutex
	hubs   map[string]*hub
	scopes map[string]*scope
	leases []*lease          // of all scopes, oldest first
	taps   map[string][]*tap // by the name of the hub, which need not exist
	lastID clientID
	live   int           // clients that have joined and are not finished
	exited chan struct{} // once exiting: closed when live is 0
	exitBy time.Time     // once exiting: when waiting for that ends

	relieving      atomic.Bool // a goroutine runs relieve
	shedWarning    occasionalWarning
	cutWarning     occasionalWarning
	addressWarning occasionalWarning
}

// A scope is what directives with the same `hub` value, as written, share in this and the following
// configurations: the clients that came in through them and the limits on those. Its fields are guarded by
// registry.mu, except current.
type scope struct {
	key      string
	leases   []*lease // oldest first
	removals int      // how often the last lease was released
	// clients[:members] are members of their hubs; the others have left and are still being told so. They count for
	// the limits until they are finished, because until then they cost as much as a member.
	clients []*client
	members int
	perHub  map[string]*occupancy
	perIP   map[netip.Prefix]int
	// opened is how many of perHub each address has opened.
	opened map[netip.Prefix]int
	// kept are hubs without clients, kept for their history, by the addresses that opened them. A hub that clients
	// have left through this scope is not among them before their connections are closed: until then it is in perHub.
	kept fairQueue[*hub]
	// buckets end with the scope, which is not before the last client is finished.
	buckets buckets

	// current is the oldest of leases, or nil: that of the configuration that runs. A newer one may yet fail.
	current atomic.Pointer[lease]
}

// An occupancy is what a scope has in a hub.
type occupancy struct {
	clients int          // also those that have left, while their connections are not closed
	opener  netip.Prefix // the address that has opened it, or that of a client that was there when all of that address had gone
}

// A lease is a configuration's hold on a scope.
type lease struct {
	scope   *scope
	log     *zap.Logger
	emitter emitter
	bounds  bounds
	drain   time.Duration // how long an exit may take
}

// lease returns a hold on the scope of hub value key. While a reload provisions the new configuration before it
// cleans up the old one, a scope that both name goes from one lease to two to one, and its clients notice
// nothing. log is used for the clients' lines once the leases before it are released, emitter for events while its
// configuration is the one that runs.
func (r *registry) lease(key string, log *zap.Logger, emitter emitter, bounds bounds, drain time.Duration) *lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.scopes[key]
	if s == nil {
		s = &scope{key: key, perHub: map[string]*occupancy{}, perIP: map[netip.Prefix]int{}, opened: map[netip.Prefix]int{}}
		r.scopes[key] = s
	}
	l := &lease{scope: s, log: log, emitter: emitter, bounds: bounds, drain: drain}
	s.leases = append(s.leases, l)
	s.current.Store(s.leases[0])
	r.events.add(l)
	r.leases = append(r.leases, l)
	r.boundLocked()
	return l
}

// boundLocked lets the bounds of the oldest lease hold: a newer configuration may yet fail.
func (r *registry) boundLocked() {
	if len(r.leases) > 0 {
		r.memory.histories.most.Store(orDefault(r.leases[0].bounds.history, defaultMaxHistory))
		r.memory.buffers.most.Store(orDefault(r.leases[0].bounds.buffers, defaultMaxBuffers))
	}
}

// release gives the lease back. With a scope's last lease its clients are closed in the background, unless Caddy
// exits: then everybody is told, and release waits for that, for at most the drain of the leases. Releasing a lease
// again does nothing.
func (r *registry) release(l *lease) {
	if caddy.Exiting() {
		r.beginExit()
		r.awaitExit()
		r.refusals.flush()
	}
	r.releaseScope(l)
}

func (r *registry) releaseScope(l *lease) {
	s := l.scope
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.Index(s.leases, l)
	if i < 0 {
		return
	}
	s.leases = slices.Delete(s.leases, i, i+1)
	r.events.remove(l)
	r.leases = slices.DeleteFunc(r.leases, func(other *lease) bool { return other == l })
	r.boundLocked()
	if len(s.leases) > 0 {
		s.current.Store(s.leases[0])
		return
	}
	s.current.Store(nil)
	for _, b := range r.hubs {
		if b.keeper == s {
			r.closeKeptLocked(b)
		}
	}
	if len(s.clients) == 0 {
		delete(r.scopes, s.key)
		return
	}
	s.removals++
	if !caddy.Exiting() {
		// Ends within the spread, or when the scope is leased again. Nobody waits for it: a reload must not.
		go r.closeUnleased(s, s.removals)
	}
}

// beginExit closes every client: what was published is flushed, and then each is told. Nobody joins any more, because
// Caddy exits. Called again it does nothing.
func (r *registry) beginExit() {
	r.mu.Lock()
	if r.exited != nil {
		r.mu.Unlock()
		return
	}
	var clients []*client
	var drain time.Duration
	for _, s := range r.scopes {
		clients = append(clients, s.clients[:s.members]...)
		for _, l := range s.leases {
			drain = max(drain, l.drain)
		}
	}
	r.exited, r.exitBy = make(chan struct{}), time.Now().Add(drain)
	if r.live == 0 {
		close(r.exited)
	}
	r.mu.Unlock()
	for _, c := range clients {
		c.close(causeShuttingDown)
	}
}

// cutPatience is how long an exit waits for clients that it has cut, which takes a moment each, to be reported.
const cutPatience = 200 * time.Millisecond

// awaitExit waits, after beginExit, until all clients are finished. Those that are not at the end of the longest drain
// are cut, so that the log has a line of them, too.
func (r *registry) awaitExit() {
	r.mu.Lock()
	exited, exitBy := r.exited, r.exitBy
	r.mu.Unlock()
	select {
	case <-exited:
		return
	case <-time.After(time.Until(exitBy)):
	}
	var stuck []*client
	r.mu.Lock()
	for _, s := range r.scopes {
		stuck = append(stuck, s.clients...)
	}
	r.mu.Unlock()
	for _, c := range stuck {
		c.cut(causeShuttingDown)
	}
	select {
	case <-exited:
	case <-time.After(time.Until(exitBy.Add(cutPatience))):
	}
}

// finished notes the end of a client.
func (r *registry) finished(c *client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.load.leave()
	r.leaveLocked(c)
	s := c.scope
	last := len(s.clients) - 1
	s.swap(c.scopeIndex, last)
	s.clients[last] = nil
	s.clients = s.clients[:last]
	r.vacateLocked(c)
	decrement(s.perIP, c.prefix)
	if last == 0 && len(s.leases) == 0 && r.scopes[s.key] == s {
		delete(r.scopes, s.key)
	}
	r.live--
	if r.live == 0 && r.exited != nil {
		close(r.exited) // nobody joins an exiting server
	}
}

// vacateLocked notes that c is finished. With the last client of its scope in the hub the scope may keep the hub for its
// history, and close it to make room.
func (r *registry) vacateLocked(c *client) {
	s, name := c.scope, c.hub.name
	o := s.perHub[name]
	o.clients--
	if o.clients > 0 {
		if c.prefix == o.opener {
			r.passOnLocked(s, o, name)
		}
		return
	}
	delete(s.perHub, name)
	decrement(s.opened, o.opener)
	if b := r.hubs[name]; b != nil && b.keeper == s {
		b.place = s.kept.push(b.owner, b)
	}
}

// passOnLocked charges the named hub to the address of another client that is there, if the opener's clients have all gone.
func (r *registry) passOnLocked(s *scope, o *occupancy, name string) {
	if b := r.hubs[name]; b != nil {
		heir := b.heir(s, o.opener)
		decrement(s.opened, o.opener)
		o.opener = heir
		s.opened[heir]++
	}
}

// removalSpread is the time over which the clients of a removed hub value are closed, so that they do not all
// reconnect, wherever to, at the same moment; removalStep is how often some are.
const (
	removalSpread = 10 * time.Second
	removalStep   = 100 * time.Millisecond
)

// closeUnleased closes the clients of s, spread over removalSpread, for as long as s has no lease since the given
// removal.
func (r *registry) closeUnleased(s *scope, removal int) {
	for steps := int(removalSpread / removalStep); steps > 0; steps-- {
		r.mu.Lock()
		if len(s.leases) > 0 || s.removals != removal || s.members == 0 {
			r.mu.Unlock()
			return
		}
		n := (s.members + steps - 1) / steps
		turn := slices.Clone(s.clients[s.members-n : s.members])
		r.mu.Unlock()
		for _, c := range turn {
			c.close(causeHubRemoved)
		}
		time.Sleep(removalStep)
	}
}

// logger returns the logger of the configuration that runs, if it has a lease on s, or Caddy's own.
func (s *scope) logger() *zap.Logger {
	if l := s.current.Load(); l != nil {
		return l.log
	}
	return processLogger()
}

// The refusals of join and admit.
var (
	errMaxClients       = &refusal{errors.New("the directive's max_clients is reached"), refusedMaxClients}
	errMaxClientsPerHub = &refusal{errors.New("the directive's max_clients_per_hub is reached"), refusedMaxClientsPerHub}
	errMaxClientsPerIP  = &refusal{errors.New("the directive's max_clients_per_ip is reached"), refusedMaxClientsPerIP}
	errMaxHubs          = &refusal{errors.New("the directive's max_hubs is reached"), refusedMaxHubs}
	errMaxHubsPerIP     = &refusal{errors.New("the address has as many of the directive's max_hubs as are left for others"), refusedMaxHubsPerIP}
	errBusy             = &refusal{errors.New("too many large messages are being received, or too many from this address"), refusedBusy}
	errShuttingDown     = &refusal{errors.New("the server is shutting down"), refusedShuttingDown}
	errHubRemoved       = &refusal{errors.New("the directive's hub value is no longer configured"), refusedShuttingDown}
	errRate             = &refusal{errors.New("the directive's rate is exceeded from this address"), refusedRate}
)

// limits are what join enforces; zero is no limit.
type limits struct {
	maxClients, maxClientsPerHub, maxClientsPerIP, maxHubs int
}

// join makes c, which came in through s, a member of the named hub, and creates it if need be. It returns
// one of the refusals if a limit is reached.
func (r *registry) join(c *client, name string, limits limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.joinLocked(c, name, limits)
	if why, ok := errors.AsType[*refusal](err); ok && why != errShuttingDown && why != errHubRemoved {
		r.events.emit(eventClientRefused,
			map[string]any{"hub": name, "user": c.user, "client_ip": c.ip, "reason": why.reason})
	}
	return err
}

func (r *registry) joinLocked(c *client, name string, limits limits) error {
	s, err := r.openLocked(c.scope.key)
	if err != nil {
		return err
	}
	b := r.hubs[name]
	switch {
	case reached(len(s.clients), limits.maxClients):
		return errMaxClients
	case b != nil && reached(b.size(), limits.maxClientsPerHub):
		return errMaxClientsPerHub
	case reached(s.perIP[c.prefix], limits.maxClientsPerIP):
		return errMaxClientsPerIP
	}
	if s.perHub[name] == nil {
		if err := r.makeRoomLocked(s, b, c.prefix, limits.maxHubs); err != nil {
			return err
		}
		s.perHub[name] = &occupancy{opener: c.prefix}
		s.opened[c.prefix]++
	}
	if b == nil {
		b = r.openHubLocked(name, c.prefix)
	}
	r.live++
	c.load = r.work.enter(c.prefix)
	c.id = r.nextIDLocked()
	c.hub, c.scope = b, s
	if b.keeper != nil {
		unkeep(b)
	}
	if c.settings.historyMessages > 0 {
		b.home = s
	}
	b.join(c)
	c.scopeIndex = len(s.clients)
	s.clients = append(s.clients, c)
	s.swap(c.scopeIndex, s.members)
	s.members++
	s.perHub[name].clients++
	s.perIP[c.prefix]++
	r.metrics.joins.Inc()
	return nil
}

// nextIDLocked returns an id that no client or hub has had, nor, unless the clock is turned back, in another process.
func (r *registry) nextIDLocked() clientID {
	r.lastID = max(r.lastID+1, clientID(time.Now().UnixNano()))
	return r.lastID
}

// openHubLocked returns a new hub, which a request from the given address opens.
func (r *registry) openHubLocked(name string, owner netip.Prefix) *hub {
	b := &hub{
		name:    name,
		epoch:   r.nextIDLocked().String(),
		opened:  time.Now(),
		metrics: r.metrics,
		memory:  r.memory,
		taps:    r.taps[name],
	}
	b.owner = owner
	r.hubs[name] = b
	r.events.emit(eventHubOpened, map[string]any{"hub": name})
	return b
}

// makeRoomLocked lets s have its first client in b, or for nil in a new hub, or returns a refusal. An address may have
// opened at most as many hubs as are left for others: so one alone gets half of maxHubs, and however many addresses there
// are, another one finds room for a first hub. Hubs that are only kept make room: one of the address that has most of them,
// the one that has been without clients for the longest time first.
func (r *registry) makeRoomLocked(s *scope, b *hub, address netip.Prefix, maxHubs int) error {
	if maxHubs == 0 {
		return nil
	}
	left := maxHubs - len(s.perHub)
	switch {
	case left <= 0:
		return errMaxHubs
	case s.opened[address] >= left:
		return errMaxHubsPerIP
	case b != nil && b.place != nil && b.keeper == s:
		return nil // it has a place
	}
	for len(s.perHub)+s.kept.len() >= maxHubs { // several after a reload that lowers it
		_, oldest := s.kept.largest()
		r.closeKeptLocked(oldest.value)
	}
	return nil
}

// keepLocked keeps b, which has no clients, for its history and as long as that lasts. It does nothing where no directive
// is configured that would have clients in it again.
func (r *registry) keepLocked(b *hub, s *scope) bool {
	if b.home != nil && len(b.home.leases) > 0 {
		s = b.home
	}
	if len(s.leases) == 0 || r.scopes[s.key] != s || caddy.Exiting() {
		return false
	}
	now := time.Now()
	b.keeper, b.keptSince = s, now
	if s.perHub[b.name] == nil {
		b.place = s.kept.push(b.owner, b)
	}
	b.expiry = time.AfterFunc(b.historyAge(), func() { r.expire(b, now) })
	return true
}

// unkeep takes b out of those that its keeper keeps. It needs registry.mu.
func unkeep(b *hub) {
	if b.place != nil {
		b.keeper.kept.remove(b.place)
	}
	b.keeper, b.place = nil, nil
	b.expiry.Stop()
}

// expire closes b if it has been kept since the given time, unless something was published meanwhile: that has its age
// to come.
func (r *registry) expire(b *hub, since time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.keeper == nil || !b.keptSince.Equal(since) {
		return
	}
	if wait := b.closeIfAged(); wait > 0 {
		b.expiry.Reset(wait)
		return
	}
	r.closeKeptLocked(b)
}

// closeIfKept closes b if it is only kept for its history.
func (r *registry) closeIfKept(b *hub) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.keeper != nil {
		r.closeKeptLocked(b)
	}
}

// closeKeptLocked closes a hub that is only kept for its history.
func (r *registry) closeKeptLocked(b *hub) {
	unkeep(b)
	b.close()
	r.hubClosedLocked(b)
}

func (r *registry) hubClosedLocked(b *hub) {
	delete(r.hubs, b.name)
	r.events.emit(eventHubClosed, map[string]any{"hub": b.name})
}

// count returns how many clients are members of hubs, and how many hubs there are.
func (r *registry) count() (clients, hubs int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.scopes {
		clients += s.members
	}
	return clients, len(r.hubs)
}

// openLocked returns the scope of a hub value, unless that is closed to new requests. The request may come from a
// configuration that has been replaced meanwhile: what counts is whether its hub value is still configured, in the
// scope that there is now.
func (r *registry) openLocked(key string) (*scope, error) {
	s := r.scopes[key]
	switch {
	case caddy.Exiting():
		return nil, errShuttingDown
	case s == nil || len(s.leases) == 0:
		return nil, errHubRemoved
	}
	return s, nil
}

// open returns a refusal if the scope of a hub value is closed to new requests.
func (r *registry) open(key string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.openLocked(key)
	return err
}

// admit lets somebody publish one message over HTTP through the scope of a hub value. It returns a refusal if the scope
// is closed, or if the rate of the address is exceeded, and for how long it is; a nil rate is no limit.
func (r *registry) admit(key string, prefix netip.Prefix, rate *Rate) (wait time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.openLocked(key)
	if err != nil || rate == nil {
		return 0, err
	}
	if wait, ok := s.buckets.take(time.Now(), prefix, *rate); !ok {
		return wait, errRate
	}
	return 0, nil
}

func reached(n, limit int) bool { return limit > 0 && n >= limit }

// publish publishes a message that comes from no client, in the named hub: see hub.publish. It reports whether there
// is such a hub.
func (r *registry) publish(name string, m message) (published receipt, found bool) {
	defer r.relieve()
	defer r.shed()
	for !found {
		b := r.hub(name)
		if b == nil {
			return receipt{}, false
		}
		// While it waits for turns the hub may be closed, and there may be another one of that name.
		published, found = b.publish(m)
	}
	return published, found
}

// publishOpening is publish for a message that comes through the scope of a hub value. With history in its settings, a
// hub that is not there is opened for it, within the limits.
func (r *registry) publishOpening(
	name string, m message, address netip.Prefix, key string, s *settings, limits limits,
) (receipt, bool, error) {
	for {
		published, found := r.publish(name, m)
		if found || s.historyMessages == 0 {
			return published, found, nil
		}
		if err := r.openKept(name, address, key, s, limits); err != nil {
			return receipt{}, false, err
		}
	}
}

// openKept opens a hub without clients for a request from the given address, unless it is there.
func (r *registry) openKept(name string, address netip.Prefix, key string, settings *settings, limits limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.openLocked(key)
	switch {
	case err != nil:
		return err
	case r.hubs[name] != nil:
		return nil
	}
	if err := r.makeRoomLocked(s, nil, address, limits.maxHubs); err != nil {
		return err
	}
	b := r.openHubLocked(name, address)
	b.home = s
	b.growHistory(settings)
	r.keepLocked(b, s)
	return nil
}

// hub returns the named hub, or nil.
func (r *registry) hub(name string) *hub {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hubs[name]
}

// allHubs returns the hubs that there are now, in no order.
func (r *registry) allHubs() []*hub {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*hub, 0, len(r.hubs))
	for _, b := range r.hubs {
		all = append(all, b)
	}
	return all
}

// allMembers returns the members of all hubs that there are now, in no order.
func (r *registry) allMembers() []*client {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*client, 0, r.live)
	for _, s := range r.scopes {
		all = append(all, s.clients[:s.members]...)
	}
	return all
}

// tap returns a tap on the hub of the given name, be it there already or not, and what removes it.
func (r *registry) tap(name string) (t *tap, remove func()) {
	t = newTap()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.setTapsLocked(name, append(slices.Clone(r.taps[name]), t))
	return t, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		taps := slices.Clone(r.taps[name])
		i := slices.Index(taps, t)
		r.setTapsLocked(name, slices.Delete(taps, i, i+1))
	}
}

// setTapsLocked replaces the taps on a hub.
func (r *registry) setTapsLocked(name string, taps []*tap) {
	if len(taps) == 0 {
		delete(r.taps, name)
	} else {
		r.taps[name] = taps
	}
	if b := r.hubs[name]; b != nil {
		b.setTaps(taps)
	}
}

// leave ends c's membership. The hub goes with its last member, unless it is kept for its history.
func (r *registry) leave(c *client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leaveLocked(c)
}

// leaveLocked does nothing for who has left: between deciding to close a client and this it may even have finished.
func (r *registry) leaveLocked(c *client) {
	if c.away {
		return
	}
	c.away = true
	b := c.hub
	if b.leave(c) > 0 {
		if c.prefix == b.owner {
			b.owner = b.heir(nil, b.owner)
		}
	} else if !b.hasHistory() || !r.keepLocked(b, c.scope) {
		b.close()
		r.hubClosedLocked(b)
	}
	c.scope.members--
	c.scope.swap(c.scopeIndex, c.scope.members)
}

func (s *scope) swap(i, j int) {
	s.clients[i], s.clients[j] = s.clients[j], s.clients[i]
	s.clients[i].scopeIndex, s.clients[j].scopeIndex = i, j
}

// decrement counts m[k] down and forgets it at zero, so that what is gone costs nothing.
func decrement[K comparable](m map[K]int, k K) {
	m[k]--
	if m[k] == 0 {
		delete(m, k)
	}
}
