package chatbroadcast

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"go.uber.org/zap"
)

// A link is a session of an engine. Leases hold it, so it outlives configurations as hubs do. It begins when Caddy starts the
// configuration: one that Caddy only validates touches no server and no file. It implements engine.Monitor.
type link struct {
	registry *registry
	name     string // of the engine
	key      string
	since    time.Time

	started chan struct{} // closed by start, under registry.linking
	// What follows is there once started is closed.
	session engine.Session
	cluster engine.Cluster // session, if several nodes share the hubs; or nil
	control *controller    // if cluster is set

	// holders are the leases of the link and its hubs. Whoever holds it may add one. Only under registry.linking does it
	// become 0.
	holders atomic.Int64

	mu     sync.Mutex
	down   error // why the engine cannot be reached, or nil
	behind uint64

	heard chan struct{} // closed when the engine has said for the first time how it does

	wake chan struct{} // has an element when renew is to run at once
	done chan struct{} // closed when renewals have ended

	// ended is done when the link is given up; end makes it so.
	ended context.Context
	end   context.CancelFunc
}

// linkTo returns a link to an engine, which a link with the same key may already be, and holds it. The caller must
// release it. It returns nil for no engine: hubs then number their messages themselves.
func (r *registry) linkTo(name string, e engine.Engine) *link {
	if e == nil {
		return nil
	}
	r.linking.Lock()
	defer r.linking.Unlock()
	key := linkKey(name, e)
	l := r.links[key]
	if l == nil {
		l = &link{
			registry: r, name: name, key: key, since: time.Now(),
			started: make(chan struct{}), heard: make(chan struct{}), wake: make(chan struct{}, 1), done: make(chan struct{}),
		}
		r.links[key] = l
	}
	l.hold()
	return l
}

func linkKey(name string, e engine.Engine) string { return name + " " + e.Key() }

// startLink begins the session of the link to an engine, if anybody holds that link. A session that runs already gets what is new
// in the engine's configuration.
func (r *registry) startLink(name string, e engine.Engine) error {
	r.linking.Lock()
	defer r.linking.Unlock()
	l := r.links[linkKey(name, e)]
	if l == nil {
		return nil
	}
	if l.isStarted() {
		if e, ok := e.(engine.Reconfigurer); ok {
			e.Reconfigure(l.session)
		}
		return nil
	}
	session, err := e.Connect(l)
	if err != nil {
		return fmt.Errorf("engine %s: %w", name, err)
	}
	l.start(session)
	return nil
}

// start begins what the link does with its session.
func (l *link) start(session engine.Session) {
	l.session = session
	l.ended, l.end = context.WithCancel(context.Background())
	l.cluster, _ = session.(engine.Cluster)
	if l.cluster != nil {
		l.control = newController(l)
		go l.renewAlways() // ends with the link, and release waits for it
	} else {
		close(l.done)
	}
	close(l.started)
}

// isCluster reports whether the link has a session that several nodes share.
func (l *link) isCluster() bool { return l != nil && l.isStarted() && l.cluster != nil }

// isStarted reports whether the link has a session.
func (l *link) isStarted() bool { return isClosed(l.started) }

// hold adds a holder to a link, which has one.
func (l *link) hold() { l.holders.Add(1) }

// release gives a hold back. The last one ends the session.
func (l *link) release() {
	if l == nil {
		return
	}
	r := l.registry
	r.linking.Lock()
	defer r.linking.Unlock()
	if l.holders.Add(-1) > 0 {
		return
	}
	delete(r.links, l.key)
	if !l.isStarted() {
		return
	}
	l.end()
	<-l.done
	if l.control != nil {
		l.control.close()
	}
	if err := l.session.Close(); err != nil {
		processLogger().Error("closing the engine failed", zap.String("engine", l.name), zap.Error(err))
	}
}

// State implements engine.Monitor.
func (l *link) State(err error) {
	l.mu.Lock()
	was, first := l.down, !l.isHeard()
	l.down = err
	if first {
		close(l.heard)
	}
	l.mu.Unlock()
	switch {
	case err != nil && (was == nil || first):
		processLogger().Error("the engine is down: hubs publish nothing until it is back",
			zap.String("engine", l.name), zap.Error(err))
	case err == nil && was != nil && !first:
		processLogger().Info("the engine is back", zap.String("engine", l.name))
	}
	if err == nil {
		l.renewSoon()
	}
}

// Warn implements engine.Monitor.
func (l *link) Warn(text string) {
	processLogger().Warn("the engine warns", zap.String("engine", l.name), zap.String("warning", text))
}

// why returns why the engine is down, or nil. A cluster is down until it has said that it is up.
func (l *link) why() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cluster != nil && !l.isHeard() {
		return errConnecting
	}
	return l.down
}

// isHeard reports whether the engine has said how it does.
func (l *link) isHeard() bool { return isClosed(l.heard) }

// connectPatience is how long a request waits for an engine that has just been configured. After a start the first clients
// come before the engine is connected.
const connectPatience = 2 * time.Second

// awaitStarted waits until the link has a session, for connectPatience at most. It returns an error if it has none then.
func (l *link) awaitStarted(ctx context.Context) error {
	if l == nil || await(ctx, l.started) {
		return nil
	}
	return &refusal{fmt.Errorf("the engine is unavailable: %w", errConnecting), refusedUnavailable}
}

// awaitConnected waits until the engine has said how it does, for connectPatience at most.
func (l *link) awaitConnected(ctx context.Context) { await(ctx, l.heard) }

// await waits until done is closed, for connectPatience at most, and reports whether it is.
func await(ctx context.Context, done <-chan struct{}) bool {
	if isClosed(done) {
		return true
	}
	timer := time.NewTimer(connectPatience)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}

func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

func (l *link) renewSoon() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// renewAlways keeps this node alive in its cluster until the link is given up.
func (l *link) renewAlways() {
	defer close(l.done)
	ticker := time.NewTicker(engine.RenewInterval)
	defer ticker.Stop()
	for {
		select {
		case <-l.ended.Done():
			return
		case <-l.wake:
		case <-ticker.C:
		}
		l.renew()
	}
}

// renew tells the engine what this node has, and the hubs what they lack.
func (l *link) renew() {
	ctx, cancel := context.WithTimeout(l.ended, engine.RenewInterval)
	defer cancel()
	open := slices.DeleteFunc(l.registry.allHubs(), func(b *hub.Hub) bool { return !b.IsOf(l.session) })
	byName := make(map[string]*hub.Hub, len(open))
	known := make([]engine.Known, 0, len(open))
	for _, b := range open {
		byName[b.Name()] = b
		known = append(known, b.Known())
	}
	renewal, err := l.cluster.Renew(ctx, l.status(known), known)
	if err != nil {
		return // the engine tells the monitor
	}
	l.registry.process.SetNode(l.cluster.Number())
	l.control.ensureOpen(ctx)
	behind := uint64(0)
	for _, changed := range renewal.Changed {
		b := byName[changed.Hub]
		if have := b.Known(); changed.Epoch == have.Epoch && changed.Seq > have.Seq {
			behind += changed.Seq - have.Seq
		}
		b.Renewed(changed)
	}
	if renewal.Forgotten {
		for _, b := range open {
			b.AnnounceAgain()
		}
	}
	l.mu.Lock()
	l.behind = behind
	l.mu.Unlock()
}

// status describes this node to the others.
func (l *link) status(known []engine.Known) engine.Status {
	clients, _ := l.registry.count()
	l.mu.Lock()
	defer l.mu.Unlock()
	return engine.Status{Name: hostname(), Since: l.since, Hubs: len(known), Clients: clients, Behind: l.behind}
}

// takes reports whether the engine numbers the messages of hubs with the given settings. An engine for one node alone only
// has hubs with history: there is nothing of the others to keep.
func (l *link) takes(s *hub.Settings) bool {
	return l != nil && (l.cluster != nil || s.HistoryMessages > 0)
}

// openTimeout bounds how long opening a hub may take.
const openTimeout = 10 * time.Second

// open opens a hub with the given settings.
func (l *link) open(name string, s *hub.Settings) (*hub.Hub, error) {
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	b, err := hub.Load(ctx, l.registry.process, name, l.session, s)
	if err != nil {
		return nil, &refusal{fmt.Errorf("the hub cannot be opened: %w", err), refusedUnavailable}
	}
	if l.cluster != nil {
		l.registry.process.SetNode(l.cluster.Number())
	}
	return b, nil
}

// checkUp returns a refusal if the engine of the running configuration cannot be reached. It may wait a moment. A hub that
// is open keeps its clients, but a new client might miss messages.
func (r *registry) checkUp(ctx context.Context) error {
	l := r.current.Load()
	if err := l.awaitStarted(ctx); err != nil {
		return err
	}
	if l == nil || l.cluster == nil {
		return nil
	}
	l.awaitConnected(ctx)
	if err := l.why(); err != nil {
		return &refusal{fmt.Errorf("the engine is unavailable: %w", err), refusedUnavailable}
	}
	return nil
}

// startedLink returns the link of the running configuration, or nil if that has no engine or the engine has not started yet.
func (r *registry) startedLink() *link {
	l := r.current.Load()
	if l == nil || !l.isStarted() {
		return nil
	}
	return l
}

// isClustered reports whether other nodes share the hubs.
func (r *registry) isClustered() bool {
	return r.current.Load().isCluster()
}

// useLinkLocked makes l the link of hubs that open from now on, or nil for none. It detaches the hubs that would have another
// one, and has their clients closed.
func (r *registry) useLinkLocked(l *link) {
	if r.current.Swap(l) == l {
		return
	}
	var detached []*hub.Hub
	for _, n := range r.named {
		stays := n.isOpen() && (n.link == l || n.link == nil && !l.isCluster() && !n.hub.HasHistory())
		if stays {
			continue
		}
		if b := r.endLocked(n); b != nil {
			detached = append(detached, b)
		}
	}
	if len(detached) > 0 {
		go r.closeDetached(detached) // ends within removalSpread; nobody waits for it, because a reload must not
	}
}

// detachLocked takes an open hub out of the registry, so that the next request for its name opens another one. Its clients
// stay in it until they are closed.
func (r *registry) detachLocked(n *namedHub) {
	if n.keeper != nil {
		n.unkeep()
	}
	r.closeLocked(n)
}

// closeDetached closes the clients of detached hubs, spread over removalSpread.
func (r *registry) closeDetached(detached []*hub.Hub) {
	var clients []*hub.Client
	for _, b := range detached {
		clients = append(clients, b.Clients()...)
	}
	for steps := int(removalSpread / removalStep); len(clients) > 0; steps-- {
		n := (len(clients) + steps - 1) / steps
		for _, c := range clients[:n] {
			c.Close(hub.CloseHubReset)
		}
		clients = clients[n:]
		time.Sleep(removalStep)
	}
}

// letGo gives back the hold of a closed hub on its link, once nothing of the hub's can be on its way to the engine any more: when
// its clients are gone and its outbox is empty.
func (r *registry) letGo(b *hub.Hub, l *link) {
	for !b.IsDone() {
		time.Sleep(removalStep / 10)
	}
	l.release()
}

// awaitLinks waits until all links are given up, at the end of the process.
func (r *registry) awaitLinks(end time.Time) {
	for time.Now().Before(end) {
		r.linking.Lock()
		n := len(r.links)
		r.linking.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(removalStep / 10)
	}
}

// reset ends a hub whose epoch is over. Its clients learn that they must join again: another hub of that name begins.
func (r *registry) reset(b *hub.Hub) {
	r.lock()
	if n := r.named[b.Name()]; n != nil && n.hub == b {
		r.detachLocked(n)
	}
	r.mu.Unlock()
	for _, c := range b.Clients() {
		c.Close(hub.CloseHubReset)
	}
}

// engineUp returns 1 if the engine can be reached, and 0 if not.
func (r *registry) engineUp() float64 {
	if l := r.current.Load(); l != nil && (!l.isStarted() || l.why() != nil) {
		return 0
	}
	return 1
}

// engineQueue returns how many messages wait for the engine.
func (r *registry) engineQueue() (n float64) {
	for _, b := range r.allHubs() {
		n += float64(b.Waiting())
	}
	return n
}

// engineBehind returns how many messages this node lacked at the last renewal.
func (r *registry) engineBehind() float64 {
	l := r.startedLink()
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return float64(l.behind)
}

// Interface guards
var _ engine.Monitor = (*link)(nil)
