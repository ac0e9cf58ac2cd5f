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
	r := &registry{hubs: map[string]*hub{}, scopes: map[string]*scope{}, taps: map[string][]*tap{}}
	r.budget.most.Store(minBudget)
	r.metrics = newMetrics(r)
	return r
}

// A registry holds hubs by name, and by hub value the scopes that keep them open to new clients.
type registry struct {
	metrics *metrics
	events  events
	budget  budget // of histories

	mu     sync.Mutex
	hubs   map[string]*hub
	scopes map[string]*scope
	taps   map[string][]*tap // by the name of the hub, which need not exist
	lastID clientID
	live   int           // clients that have joined and are not finished
	exited chan struct{} // once exiting: closed when live is 0
	exitBy time.Time     // once exiting: when waiting for that ends

	shedding int       // histories forgotten since the last warning
	warned   time.Time // when that was
}

// shedWarnings is how often the log warns that histories are forgotten, at most.
const shedWarnings = time.Minute

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
	perHub  map[string]int
	perIP   map[netip.Prefix]int
	// kept are hubs without clients, kept for their history, in the order in which they lost them.
	kept []*hub
	// buckets end with the scope, which is not before the last client is finished.
	buckets buckets

	// current is the oldest of leases, or nil: that of the configuration that runs. A newer one may yet fail.
	current atomic.Pointer[lease]
}

// A lease is a configuration's hold on a scope.
type lease struct {
	scope   *scope
	log     *zap.Logger
	emitter emitter
	drain   time.Duration // how long an exit may take
}

// lease returns a hold on the scope of hub value key. While a reload provisions the new configuration before it
// cleans up the old one, a scope that both name goes from one lease to two to one, and its clients notice
// nothing. log is used for the clients' lines once the leases before it are released, emitter for events while its
// configuration is the one that runs.
func (r *registry) lease(key string, log *zap.Logger, emitter emitter, drain time.Duration) *lease {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.scopes[key]
	if s == nil {
		s = &scope{key: key, perHub: map[string]int{}, perIP: map[netip.Prefix]int{}}
		r.scopes[key] = s
	}
	l := &lease{scope: s, log: log, emitter: emitter, drain: drain}
	s.leases = append(s.leases, l)
	s.current.Store(s.leases[0])
	r.events.add(l)
	return l
}

// release gives the lease back. With a scope's last lease its clients are closed in the background, unless Caddy
// exits: then everybody is told, and release waits for that, for at most the drain of the leases. Releasing a lease
// again does nothing.
func (r *registry) release(l *lease) {
	if caddy.Exiting() {
		r.beginExit()
		r.awaitExit()
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
	if len(s.leases) > 0 {
		s.current.Store(s.leases[0])
		return
	}
	s.current.Store(nil)
	for len(s.kept) > 0 {
		r.closeKeptLocked(s.kept[0])
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
	r.leaveLocked(c)
	s := c.scope
	last := len(s.clients) - 1
	s.swap(c.scopeIndex, last)
	s.clients[last] = nil
	s.clients = s.clients[:last]
	decrement(s.perHub, c.hub.name)
	decrement(s.perIP, c.prefix)
	if last == 0 && len(s.leases) == 0 && r.scopes[s.key] == s {
		delete(r.scopes, s.key)
	}
	r.live--
	if r.live == 0 && r.exited != nil {
		close(r.exited) // nobody joins an exiting server
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
	errShuttingDown     = &refusal{errors.New("the server is shutting down"), refusedShuttingDown}
	errHubRemoved       = &refusal{errors.New("the directive's hub value is no longer configured"), refusedShuttingDown}
	errRate             = errors.New("the directive's rate is exceeded from this address")
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
	case s.perHub[name] == 0 && !r.roomLocked(s, b, limits.maxHubs):
		return errMaxHubs
	}
	if b == nil {
		b = r.openHubLocked(name)
	}
	r.live++
	c.id = r.nextIDLocked()
	c.hub, c.scope = b, s
	if b.keeper != nil {
		b.keeper.unkeep(b)
	}
	if c.settings.historyMessages > 0 {
		b.home = s
	}
	b.join(c)
	c.scopeIndex = len(s.clients)
	s.clients = append(s.clients, c)
	s.swap(c.scopeIndex, s.members)
	s.members++
	s.perHub[name]++
	s.perIP[c.prefix]++
	r.metrics.joins.Inc()
	return nil
}

// nextIDLocked returns an id that no client or hub has had, nor, unless the clock is turned back, in another process.
func (r *registry) nextIDLocked() clientID {
	r.lastID = max(r.lastID+1, clientID(time.Now().UnixNano()))
	return r.lastID
}

// openHubLocked returns a new hub.
func (r *registry) openHubLocked(name string) *hub {
	b := &hub{
		name:    name,
		epoch:   r.nextIDLocked().String(),
		opened:  time.Now(),
		metrics: r.metrics,
		budget:  &r.budget,
		taps:    r.taps[name],
	}
	r.hubs[name] = b
	r.events.emit(eventHubOpened, map[string]any{"hub": name})
	return b
}

// roomLocked reports whether s may have a client in b, or for nil in a new hub, in which it has none. Those that are only
// kept make room, the one that has been without clients for the longest time first.
func (r *registry) roomLocked(s *scope, b *hub, maxHubs int) bool {
	if b != nil && b.keeper == s {
		return true
	}
	if reached(len(s.perHub), maxHubs) {
		return false
	}
	if !reached(len(s.perHub)+len(s.kept), maxHubs) {
		return true
	}
	emptying := r.emptyingLocked(s)
	for reached(len(s.perHub)+len(s.kept)-emptying, maxHubs) { // several after a reload that lowers it
		i := slices.IndexFunc(s.kept, func(b *hub) bool { return s.perHub[b.name] == 0 })
		r.closeKeptLocked(s.kept[i])
	}
	return true
}

// emptyingLocked returns how many of the hubs that s keeps are among its perHub, because the connection of somebody who
// has left them is not closed yet. To close these would make no room.
func (r *registry) emptyingLocked(s *scope) int {
	names := map[string]bool{}
	for _, c := range s.clients[s.members:] {
		if b := r.hubs[c.hub.name]; b != nil && b.keeper == s {
			names[b.name] = true
		}
	}
	return len(names)
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
	s.kept = append(s.kept, b)
	b.expiry = time.AfterFunc(b.historyAge(), func() { r.expire(b, now) })
	return true
}

// unkeep takes b out of those that s keeps.
func (s *scope) unkeep(b *hub) {
	i := slices.Index(s.kept, b)
	s.kept = slices.Delete(s.kept, i, i+1)
	b.keeper = nil
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
	b.keeper.unkeep(b)
	b.close()
	r.hubClosedLocked(b)
}

func (r *registry) hubClosedLocked(b *hub) {
	delete(r.hubs, b.name)
	r.events.emit(eventHubClosed, map[string]any{"hub": b.name})
}

// shed forgets histories when all of them together take too much: at first those of hubs without clients, the one that
// has been without for the longest time first, and then those of the hubs in which nothing was published for the longest
// time, as far as their clients have got everything. It warns of that, but not each time.
func (r *registry) shed() {
	if !r.budget.exceeded() {
		return
	}
	r.mu.Lock()
	r.shedding += r.shedLocked()
	n := r.shedding
	if n == 0 || time.Since(r.warned) < shedWarnings {
		r.mu.Unlock()
		return
	}
	r.shedding, r.warned = 0, time.Now()
	r.mu.Unlock()
	processLogger().Warn("histories forgotten: all of them together took too much memory",
		zap.Int("hubs", n), zap.Int64("max_bytes", r.budget.most.Load()))
}

// shedLocked returns how many histories it has forgotten.
func (r *registry) shedLocked() (n int) {
	enough := func() bool { return r.budget.used.Load() <= r.budget.most.Load()/8*7 }
	var kept, others []*hub
	for _, b := range r.hubs {
		if b.keeper != nil {
			kept = append(kept, b)
		} else {
			others = append(others, b)
		}
	}
	slices.SortFunc(kept, func(a, b *hub) int { return a.keptSince.Compare(b.keptSince) })
	for _, b := range kept {
		if enough() {
			return n
		}
		r.closeKeptLocked(b)
		n++
	}
	last := map[*hub]time.Time{}
	for _, b := range others {
		last[b] = b.lastPublished()
	}
	slices.SortFunc(others, func(a, b *hub) int { return last[a].Compare(last[b]) })
	for _, b := range others {
		if enough() {
			return n
		}
		if b.forget() {
			n++
		}
	}
	if !enough() {
		r.budget.pause.Store(time.Now().Add(budgetPause).UnixNano())
	}
	return n
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
func (r *registry) publishOpening(name string, m message, key string, s *settings, limits limits) (receipt, bool, error) {
	for {
		published, found := r.publish(name, m)
		if found || s.historyMessages == 0 {
			return published, found, nil
		}
		if err := r.openKept(name, key, s, limits); err != nil {
			return receipt{}, false, err
		}
	}
}

// openKept opens a hub without clients, unless it is there.
func (r *registry) openKept(name, key string, settings *settings, limits limits) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.openLocked(key)
	switch {
	case err != nil:
		return err
	case r.hubs[name] != nil:
		return nil
	case !r.roomLocked(s, nil, limits.maxHubs):
		return errMaxHubs
	}
	b := r.openHubLocked(name)
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
	if b := c.hub; b.leave(c) == 0 && (!b.hasHistory() || !r.keepLocked(b, c.scope)) {
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
