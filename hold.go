package chatbroadcast

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// Operators are no clients. Here are the two things that they do to a hub in their place: keep it open, and keep it shut.

// bar ends the named hub, and lets nobody into a hub of that name until lift: requests for it wait, as for a hub that opens.
// So whoever comes while an engine forgets the hub gets a hub of the new epoch. bar returns the hub, or nil if it was not
// open. Its clients are still in it: the caller must close them.
func (r *registry) bar(name string) (ended *hub.Hub, lift func()) {
	r.lock()
	defer r.mu.Unlock()
	n := r.named[name]
	if n == nil || n.bars == 0 {
		ended = r.endLocked(n)
		n = &namedHub{name: name, ready: make(chan struct{})}
		r.named[name] = n
	}
	n.bars++
	return ended, sync.OnceFunc(func() { r.lift(n) })
}

// endLocked takes n, which may be nil, out of the registry, and returns its hub. If n is about to open, the requests that wait
// for it begin again.
func (r *registry) endLocked(n *namedHub) *hub.Hub {
	switch {
	case n == nil:
		return nil
	case !n.isOpen():
		n.stale = true
		return nil
	}
	r.detachLocked(n)
	return n.hub
}

// lift gives back one bar. The last one lets the requests that wait open the hub.
func (r *registry) lift(n *namedHub) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n.bars--
	if n.bars > 0 {
		return
	}
	delete(r.named, n.name)
	n.err = hub.ErrClosed
	close(n.ready)
}

// repinPause is the pause between two attempts to pin a hub again.
const repinPause = time.Second

// pin keeps the named hub open until ctx is done, without a client, so that its taps see the messages of other nodes. If
// nobody has opened the hub, it opens with the given settings. When the hub ends meanwhile, pin opens the next one of that
// name. It returns an error if the hub cannot be opened now.
func (r *registry) pin(ctx context.Context, name string, s *hub.Settings) error {
	n, unpin, err := r.pinOnce(ctx, name, s)
	if err != nil {
		return err
	}
	// It ends with ctx, but opening a hub may first take openTimeout; nobody waits for it.
	go func() {
		for {
			select {
			case <-n.gone:
			case <-ctx.Done():
			}
			unpin()
			if n, unpin = r.pinAgain(ctx, name, s); n == nil {
				return
			}
		}
	}()
	return nil
}

// pinAgain is pinOnce, again and again until it succeeds. It returns nil when ctx is done.
func (r *registry) pinAgain(ctx context.Context, name string, s *hub.Settings) (n *namedHub, unpin func()) {
	for ctx.Err() == nil {
		if r.isClustered() { // a reload may have changed that
			if n, unpin, err := r.pinOnce(ctx, name, s); err == nil {
				return n, unpin
			}
		}
		select {
		case <-time.After(repinPause):
		case <-ctx.Done():
		}
	}
	return nil, nil
}

// pinOnce opens the named hub if nobody has, and keeps it open until unpin. The hub may end before that: then n.gone is
// closed.
func (r *registry) pinOnce(ctx context.Context, name string, s *hub.Settings) (n *namedHub, unpin func(), err error) {
	for {
		if err := r.checkUp(ctx); err != nil {
			return nil, nil, err
		}
		r.lock()
		n, first := r.findLocked(name, netip.Prefix{})
		n.joining++
		n.pins++
		if n.gone == nil {
			n.gone = make(chan struct{})
		}
		keeper := n.keeper
		if keeper != nil {
			n.unkeep()
		}
		r.mu.Unlock()
		if first {
			r.open(n, s)
		}
		_, err := n.await(ctx)
		if err == nil {
			return n, func() { r.unpin(n, keeper) }, nil
		}
		r.unpin(n, keeper)
		if !errors.Is(err, hub.ErrClosed) { // another hub of that name opens
			return nil, nil, err
		}
	}
}

// unpin ends what pinOnce began. s is the scope that kept the hub before, or nil.
func (r *registry) unpin(n *namedHub, s *scope) {
	r.lock()
	defer r.mu.Unlock()
	n.joining--
	n.pins--
	r.settleLocked(n, s)
}
