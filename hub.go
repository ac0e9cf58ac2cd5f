package chatbroadcast

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// hubs are the named hubs of this process. They outlive configurations, which hold leases on them.
var hubs = newRegistry()

// newRegistry returns a registry without hubs.
func newRegistry() *registry {
	r := &registry{
		process: hub.NewProcess(),
		since:   time.Now(),
		named:   map[string]*namedHub{},
		scopes:  map[string]*scope{},
		taps:    map[string][]*hub.Tap{},
		links:   map[string]*link{},

		handshakers: newHandshakers(),
	}
	r.openHub = func(name string, s *hub.Settings, l *link) (*hub.Hub, error) {
		if l == nil {
			return hub.New(r.process, name), nil
		}
		return l.open(name, s)
	}
	r.refusals.pauses = map[refusalKind]*refusalBatch{}
	r.metrics = newMetrics(r)
	r.process.Delivered = r.metrics.delivered
	r.process.Published = r.limitMemory
	r.process.EnginePublished = r.metrics.enginePublished
	r.process.Reset = r.reset
	return r
}

// A registry holds hubs by name, and scopes by hub value. A scope keeps hubs open to new clients; see scope.go.
type registry struct {
	process  *hub.Process
	since    time.Time
	metrics  *metrics
	notifier notifier
	refusals refusalLog
	openHub  func(name string, s *hub.Settings, l *link) (*hub.Hub, error) // may take long; no lock is held

	linking sync.Mutex           // serializes connecting and giving up; taken before mu
	links   map[string]*link     // by key
	current atomic.Pointer[link] // the link of the running configuration, or nil

	mu     sync.Mutex
	heard  listeners // the notifications that Caddy's events app had handlers for, just before lock
	named  map[string]*namedHub
	scopes map[string]*scope
	leases []*lease              // of all scopes, oldest first
	taps   map[string][]*hub.Tap // by the name of a hub, which need not exist
	live   int                   // members that are joining or not finished
	exited chan struct{}         // once exiting: closed when live is 0
	exitBy time.Time             // once exiting: when the wait for exited ends

	handshakers handshakers

	relieving      atomic.Bool // a goroutine runs cutUntilRelieved
	shedWarning    occasionalWarning
	cutWarning     occasionalWarning
	addressWarning occasionalWarning
}

// lock locks the registry for a caller that may call notifyLocked. It first asks Caddy which notifications have
// handlers, because nothing may call Caddy under the lock.
func (r *registry) lock() {
	l := currentListeners()
	r.mu.Lock()
	r.heard = l
}

// notifyLocked queues a notification about the named hub, if a handler listens for that kind.
func (r *registry) notifyLocked(kind int, hubName string) {
	if r.heard[kind] {
		r.notifier.queue(notificationNames[kind], map[string]any{"hub": hubName})
	}
}

// A namedHub is a hub that the registry holds, or one that it is opening. The first request for the hub opens it,
// without a lock. Other requests wait; see await.
type namedHub struct {
	name  string
	ready chan struct{} // closed when hub or err is set
	hub   *hub.Hub      // nil while opening
	err   error         // why opening failed; then the registry no longer holds it
	link  *link         // of hub, or nil

	// Guarded by registry.mu.
	stale     bool                  // what it opens must be closed: another link is current now, or an operator has ended the hub
	joining   int                   // requests that are about to join or to publish; the hub stays open for them
	pins      int                   // among them, tails; see pin
	gone      chan struct{}         // if it was pinned: closed when the hub is closed
	bars      int                   // operators that let nobody in; see bar
	home      *scope                // the scope of the newest client with history
	owner     netip.Prefix          // the address that pays for the hub: the one that opened it, then an heir
	keeper    *scope                // the scope that keeps the hub without clients for its history, or nil
	place     *fair.Item[*namedHub] // in keeper.kept, or nil
	keptSince time.Time
	expiry    *time.Timer // while keeper is set: runs registry.expire
}

// await waits until n is open and returns its hub. It returns an error if n cannot be opened, or when ctx is done before that.
// Where nothing is to wait for ctx does not count: a message that has arrived is published even if its sender is gone.
func (n *namedHub) await(ctx context.Context) (*hub.Hub, error) {
	select {
	case <-n.ready:
		return n.hub, n.err
	default:
	}
	select {
	case <-n.ready:
		return n.hub, n.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// isOpen reports whether n has a hub. It needs registry.mu.
func (n *namedHub) isOpen() bool { return n.hub != nil }

// limits are the limits that join enforces. Zero is no limit.
type limits struct {
	maxClients, maxClientsPerHub, maxClientsPerIP, maxHubs int
}

func reached(n, limit int) bool { return limit > 0 && n >= limit }

// join makes m, which came in through m.scope, a member of the named hub. It opens the hub if nobody has. It returns a
// refusal if a limit is reached, and an error when ctx is done.
func (r *registry) join(ctx context.Context, m *member, name string, limits limits) error {
	err := hub.ErrClosed
	for errors.Is(err, hub.ErrClosed) { // the hub may be detached meanwhile, and then another one opens
		var n *namedHub
		if n, err = r.reserve(ctx, m, name, limits); err == nil {
			err = r.enter(ctx, m, n, limits)
		}
	}
	why, ok := errors.AsType[*refusal](err)
	if ok && why != errShuttingDown && why != errHubRemoved && currentListeners()[clientRefused] {
		r.notifier.queue(notificationNames[clientRefused],
			map[string]any{"hub": name, "user": m.client.User(), "client_ip": m.ip, "reason": why.reason})
	}
	return err
}

// reserve takes a place for m within the limits and returns its hub. If m is the first to ask for the hub, reserve
// opens it.
func (r *registry) reserve(ctx context.Context, m *member, name string, limits limits) (*namedHub, error) {
	if err := r.checkUp(ctx); err != nil {
		return nil, err
	}
	address := m.client.Address()
	r.lock()
	s, err := r.openScopeLocked(m.scope.key)
	if err == nil {
		err = r.checkLimitsLocked(s, name, address, limits)
	}
	if err == nil && s.perHub[name] == nil {
		err = r.makeRoomLocked(s, r.named[name], address, limits.maxHubs)
	}
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	m.scope = s
	if s.perHub[name] == nil {
		s.perHub[name] = &occupancy{opener: address}
		s.opened[address]++
	}
	s.perHub[name].clients++
	s.perIP[address]++
	s.joining++
	r.live++
	r.detachUnfitLocked(name, m.client.Settings())
	n, first := r.findLocked(name, address)
	n.joining++
	if n.keeper != nil {
		n.unkeep()
	}
	m.hub = n
	r.mu.Unlock()
	if first {
		r.open(n, m.client.Settings())
	}
	return n, nil
}

// checkJoin returns the refusal with which join would answer a client from the given address now, or nil. It changes
// nothing: it reserves no place, and opens and closes no hub.
func (r *registry) checkJoin(ctx context.Context, key, name string, address netip.Prefix, limits limits) error {
	if err := r.checkUp(ctx); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.openScopeLocked(key)
	if err != nil {
		return err
	}
	return r.checkLimitsLocked(s, name, address, limits)
}

// checkLimitsLocked returns a refusal if a client from the given address must not join the named hub through s.
func (r *registry) checkLimitsLocked(s *scope, name string, address netip.Prefix, limits limits) error {
	n := r.named[name]
	switch {
	case reached(len(s.members)+s.joining, limits.maxClients):
		return errMaxClients
	case n != nil && n.isOpen() && reached(n.hub.Size(), limits.maxClientsPerHub):
		return errMaxClientsPerHub
	case reached(s.perIP[address], limits.maxClientsPerIP):
		return errMaxClientsPerIP
	case s.perHub[name] == nil:
		return s.checkRoomLocked(address, limits.maxHubs)
	}
	return nil
}

// enter waits until n is open and makes m a member of it. On failure it gives the reservation back and returns the
// reason.
func (r *registry) enter(ctx context.Context, m *member, n *namedHub, limits limits) error {
	b, err := n.await(ctx)
	if err == nil {
		err = b.Join(&m.client, limits.maxClientsPerHub)
		switch {
		case errors.Is(err, hub.ErrFull):
			err = errMaxClientsPerHub
		case errors.Is(err, hub.ErrUnavailable):
			err = &refusal{fmt.Errorf("the hub lacks messages that the client has: %w", err), refusedUnavailable}
		}
	}
	closed := r.entered(m, n, err == nil)
	if err == nil && closed != nil {
		m.abandon()
		err = closed
	}
	return err
}

// entered ends the reservation of m, which has joined n or has failed to. It returns a refusal if m's scope was closed
// meanwhile.
func (r *registry) entered(m *member, n *namedHub, joined bool) (closed error) {
	r.lock()
	defer r.mu.Unlock()
	m.scope.joining--
	n.joining--
	if !joined {
		r.vacateLocked(m)
		r.settleLocked(n, m.scope)
		return nil
	}
	m.scope.addLocked(m)
	if m.client.Settings().HistoryMessages > 0 {
		n.home = m.scope
	}
	r.settleLocked(n, m.scope) // m may have been closed already
	r.metrics.joins.Inc()
	_, closed = r.openScopeLocked(m.scope.key)
	return closed
}

// findLocked returns the named hub. If the registry has none, it returns a new one for owner's request, and the caller
// must open it.
func (r *registry) findLocked(name string, owner netip.Prefix) (n *namedHub, mustOpen bool) {
	if n := r.named[name]; n != nil {
		return n, false
	}
	n = &namedHub{name: name, owner: owner, ready: make(chan struct{})}
	r.named[name] = n
	return n, true
}

// open opens n with the bounds of the given settings. That may take long; only requests for n wait.
func (r *registry) open(n *namedHub, s *hub.Settings) {
	l := r.current.Load()
	if !l.takes(s) {
		l = nil
	}
	b, err := r.openHub(n.name, s, l)
	if err == nil {
		b.Grow(s)
	}
	r.lock()
	defer r.mu.Unlock()
	if err == nil && n.stale {
		b.Close()
		err = hub.ErrClosed
	}
	if err != nil {
		n.err = err
		if r.named[n.name] == n { // otherwise it is barred
			delete(r.named, n.name)
		}
	} else {
		n.hub = b
		if l != nil {
			n.link = l
			l.hold()
		}
		b.SetTaps(r.taps[n.name])
		r.notifyLocked(hubOpened, n.name)
	}
	close(n.ready)
}

// detachUnfitLocked ends the named hub if a request with the given settings needs another one: because the hub numbers its
// messages itself where an engine must do so, or because it was opened without history, and the engine may have one. The
// latter hub goes on while it has clients.
func (r *registry) detachUnfitLocked(name string, s *hub.Settings) {
	n := r.named[name]
	if n == nil || !n.isOpen() {
		return
	}
	unlinked := n.link == nil && r.current.Load().takes(s)
	bare := n.link != nil && s.HistoryMessages > 0 && !n.hub.HasHistory() && n.joining == n.pins && n.hub.Size() == 0
	if !unlinked && !bare {
		return
	}
	r.detachLocked(n)
	go r.closeDetached([]*hub.Hub{n.hub}) // ends within removalSpread; nobody waits for it
}

// settleLocked keeps or closes n if it has no clients and none are about to join. s is the scope of the last client, or nil.
func (r *registry) settleLocked(n *namedHub, s *scope) {
	if r.isDesertedLocked(n) && (n.hub.KeptFor() == 0 || !r.keepLocked(n, s)) {
		r.closeLocked(n)
	}
}

// isDesertedLocked reports whether n has no clients, none are about to join, and nothing is decided about it yet.
func (r *registry) isDesertedLocked(n *namedHub) bool {
	return n.isOpen() && n.joining == 0 && n.keeper == nil && r.named[n.name] == n && n.hub.Size() == 0
}

// keepLocked keeps n, which has no clients, for as long as its history lasts. It returns false if no configured handler
// could join clients to it again.
func (r *registry) keepLocked(n *namedHub, s *scope) bool {
	if n.home != nil && len(n.home.leases) > 0 {
		s = n.home
	}
	if s == nil || len(s.leases) == 0 || r.scopes[s.key] != s || caddy.Exiting() {
		return false
	}
	now := time.Now()
	n.keeper, n.keptSince = s, now
	if s.perHub[n.name] == nil {
		n.place = s.kept.Push(n.owner, n)
	}
	n.expiry = time.AfterFunc(n.hub.KeptFor(), func() { r.expire(n, now) })
	return true
}

// unkeep takes n out of the hubs that its keeper keeps. It needs registry.mu.
func (n *namedHub) unkeep() {
	if n.place != nil {
		n.keeper.kept.Remove(n.place)
	}
	n.keeper, n.place = nil, nil
	n.expiry.Stop()
}

// expire closes n if it has been kept since the given time. If something was published meanwhile, it waits until that
// message is too old.
func (r *registry) expire(n *namedHub, since time.Time) {
	r.lock()
	defer r.mu.Unlock()
	if n.keeper == nil || !n.keptSince.Equal(since) {
		return
	}
	if wait := n.hub.CloseIfAged(); wait > 0 {
		n.expiry.Reset(wait)
		return
	}
	r.closeKeptLocked(n)
}

// closeIfKept closes b if the registry keeps it only for its history.
func (r *registry) closeIfKept(b *hub.Hub) {
	r.lock()
	defer r.mu.Unlock()
	if n := r.named[b.Name()]; n != nil && n.hub == b && n.keeper != nil {
		r.closeKeptLocked(n)
	}
}

// closeKeptLocked closes a hub that the registry keeps only for its history.
func (r *registry) closeKeptLocked(n *namedHub) {
	n.unkeep()
	r.closeLocked(n)
}

// closeLocked closes n, which has no clients.
func (r *registry) closeLocked(n *namedHub) {
	n.hub.Close()
	if n.link != nil {
		go r.letGo(n.hub, n.link) // ends when the clients of the hub are gone; awaitLinks waits for it
	}
	if n.gone != nil {
		close(n.gone)
	}
	delete(r.named, n.name)
	r.notifyLocked(hubClosed, n.name)
}

// checkRoomLocked returns a refusal if an address must not open another hub through s.
//
// An address may have opened at most as many hubs as are left for others. So an address that is alone gets half of
// maxHubs, and a new address always finds room for a first hub, however many addresses there are.
func (s *scope) checkRoomLocked(address netip.Prefix, maxHubs int) error {
	left := maxHubs - len(s.perHub)
	switch {
	case maxHubs == 0:
		return nil
	case left <= 0:
		return errMaxHubs
	case s.opened[address] >= left:
		return errMaxHubsPerIP
	}
	return nil
}

// makeRoomLocked makes room in s for a hub, or returns a refusal. n is the hub if it exists, or nil. Hubs that are only
// kept make room: the address with most of them loses the one that has been empty for longest.
func (r *registry) makeRoomLocked(s *scope, n *namedHub, address netip.Prefix, maxHubs int) error {
	if err := s.checkRoomLocked(address, maxHubs); err != nil || maxHubs == 0 {
		return err
	}
	if n != nil && n.place != nil && n.keeper == s {
		return nil // n already counts
	}
	for len(s.perHub)+s.kept.Len() >= maxHubs { // several after a reload that lowers maxHubs
		_, oldest := s.kept.Largest()
		r.closeKeptLocked(oldest.Value)
	}
	return nil
}

// publish publishes m, which no client has sent, in the named hub; see hub.Hub.Publish. found is false if there is no
// such hub.
func (r *registry) publish(ctx context.Context, name string, m hub.Message) (published hub.Receipt, found bool, err error) {
	for !found {
		r.mu.Lock()
		n := r.named[name]
		r.mu.Unlock()
		if n == nil {
			return hub.Receipt{}, false, nil
		}
		b, err := n.await(ctx)
		if err == nil {
			published, err = b.Publish(ctx, m)
		}
		// While Publish waits the hub may close, and another hub of that name may open.
		if errors.Is(err, hub.ErrClosed) {
			if r.holds(n) {
				return hub.Receipt{}, false, nil // its last client has just left
			}
			continue
		}
		if err != nil {
			return hub.Receipt{}, false, err
		}
		found = true
	}
	return published, true, nil
}

// holds reports whether the registry still has n.
func (r *registry) holds(n *namedHub) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.named[n.name] == n
}

// publishOpening is publish for a message that comes through the scope with the given key. If there is no such hub, but its
// message may reach somebody, it opens one within the limits.
func (r *registry) publishOpening(
	ctx context.Context, name string, m hub.Message, key string, s *hub.Settings, limits limits,
) (hub.Receipt, bool, error) {
	if err := r.current.Load().awaitStarted(ctx); err != nil {
		return hub.Receipt{}, false, err
	}
	for {
		published, found, err := r.publish(ctx, name, m)
		opens := s.HistoryMessages > 0 || r.isClustered() // other nodes may have clients in it
		if found || err != nil || !opens {
			return published, found, err
		}
		if err := r.openKept(ctx, name, m.Address, key, s, limits); err != nil {
			return hub.Receipt{}, false, err
		}
	}
}

// openKept opens a hub without clients for a request from the given address. It does nothing if the hub exists.
func (r *registry) openKept(
	ctx context.Context, name string, address netip.Prefix, key string, settings *hub.Settings, limits limits,
) error {
	if err := r.checkUp(ctx); err != nil {
		return err
	}
	r.lock()
	s, err := r.openScopeLocked(key)
	if err != nil {
		r.mu.Unlock()
		return err
	}
	r.detachUnfitLocked(name, settings)
	if n := r.named[name]; n != nil {
		if n.isOpen() && n.hub.Size() == 0 { // its last client has just left: keep it for its history instead
			n.hub.Grow(settings)
			n.home = s
		}
		r.mu.Unlock()
		return nil
	}
	if err := r.makeRoomLocked(s, nil, address, limits.maxHubs); err != nil {
		r.mu.Unlock()
		return err
	}
	n, _ := r.findLocked(name, address)
	n.joining++
	n.home = s
	r.mu.Unlock()

	r.open(n, settings)
	_, err = n.await(ctx)
	r.lock()
	defer r.mu.Unlock()
	n.joining--
	if r.isDesertedLocked(n) && s.perHub[name] == nil {
		// Others may have taken the room meanwhile.
		if full := r.makeRoomLocked(s, nil, address, limits.maxHubs); full != nil {
			r.closeLocked(n)
			return full
		}
	}
	r.settleLocked(n, s)
	return err
}

// hub returns the named hub, or nil if it is not open.
func (r *registry) hub(name string) *hub.Hub {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.named[name]; n != nil {
		return n.hub
	}
	return nil
}

// allHubs returns the open hubs, in no order.
func (r *registry) allHubs() []*hub.Hub {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*hub.Hub, 0, len(r.named))
	for _, n := range r.named {
		if n.isOpen() {
			all = append(all, n.hub)
		}
	}
	return all
}

// count returns how many clients are members of hubs, and how many hubs are open.
func (r *registry) count() (clients, hubs int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.scopes {
		clients += s.present
	}
	for _, n := range r.named {
		if n.isOpen() {
			hubs++
		}
	}
	return clients, hubs
}

// tap returns a tap on hubs of the given name, and a function that removes it. The hub need not exist: the tap sees
// each hub of that name, one after the other.
func (r *registry) tap(name string) (t *hub.Tap, remove func()) {
	t = hub.NewTap()
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
func (r *registry) setTapsLocked(name string, taps []*hub.Tap) {
	if len(taps) == 0 {
		delete(r.taps, name)
	} else {
		r.taps[name] = taps
	}
	if n := r.named[name]; n != nil && n.isOpen() {
		n.hub.SetTaps(taps)
	}
}
