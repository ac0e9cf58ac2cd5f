package redisengine

import (
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

const (
	// shortestWait and longestWait bound the time between two attempts to connect.
	shortestWait = 50 * time.Millisecond
	longestWait  = 2 * time.Second

	// closeTimeout bounds how long Close takes to remove the users of the node. After that other nodes do it.
	closeTimeout = 2 * time.Second

	nodeIDLength = 16

	longestName = 255 // of a hub, in bytes
	mostInBatch = 64  // messages
)

// A Session is a connection to Redis that is made again whenever it breaks. It implements engine.Cluster.
type Session struct {
	// Set once.
	network string
	keys    keys
	node    engine.NodeID
	monitor engine.Monitor
	ctx     context.Context // done when Close is called
	cancel  context.CancelFunc
	done    chan struct{} // closed when run has ended
	retry   chan struct{} // has a value when the options have changed

	options    atomic.Pointer[Options]
	link       atomic.Pointer[link]   // nil when the server cannot be reached
	down       atomic.Pointer[error]  // why it cannot
	generation atomic.Pointer[string] // of the data that the session has seen last
	number     atomic.Uint64          // of the node, 0 at first
	uncertain  atomic.Bool            // what the node has announced may be there in part
	forgotten  atomic.Bool            // what the node has announced is gone; Renew has yet to tell
	status     atomic.Pointer[engine.Status]

	// Owned by run.
	told   string // what monitor.State was told last; "" is nil
	warned string // what monitor.Warn was told last, and about which run

	mu   sync.Mutex
	hubs map[string]*subscription // open and opening
	// leaving has the hubs whose users must still be removed, with channels that are closed when they are.
	leaving map[string]chan struct{}
	// changed has the hubs that were opened or left since the subscriber has last looked.
	changed map[string]struct{}
	// connections counts how often the subscriber has got a connection or lost it.
	connections uint64
}

// Interface guards
var _ engine.Cluster = (*Session)(nil)

// Connect starts a session. It returns at once, and connects in the background. All keys and channels begin with the
// prefix. The name is that of the node, as engine.Status has it.
func Connect(o Options, prefix, name string, monitor engine.Monitor) *Session {
	s := &Session{
		network: o.network,
		keys:    newKeys(prefix, o.db),
		node:    engine.NodeID(rand.Text()[:nodeIDLength]),
		monitor: monitor,
		done:    make(chan struct{}),
		retry:   make(chan struct{}, 1),
		hubs:    map[string]*subscription{},
		leaving: map[string]chan struct{}{},
		changed: map[string]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.options.Store(&o)
	s.status.Store(&engine.Status{Name: name, Since: time.Now()})
	s.down.Store(&errNotConnected)
	go s.run() // ends when Close is called; Close waits for it
	return s
}

// SetCredentials makes the session use the user and the password of o from its next connection on. Everything else in o
// must be as in the options of Connect.
func (s *Session) SetCredentials(o Options) {
	changed := *s.options.Load()
	changed.credentials = o.credentials
	s.options.Store(&changed)
	select {
	case s.retry <- struct{}{}:
	default:
	}
}

func (s *Session) currentOptions() Options { return *s.options.Load() }

// run keeps the session connected.
func (s *Session) run() {
	defer close(s.done)
	wait := shortestWait
	for s.ctx.Err() == nil {
		l, err := s.connect()
		if err == nil {
			began := time.Now()
			err = s.use(l)
			if time.Since(began) > longestWait {
				wait = shortestWait
			}
		}
		if s.ctx.Err() != nil {
			return
		}
		s.tellDown(err)
		select {
		case <-s.ctx.Done():
		case <-s.retry:
		case <-time.After(wait/2 + mathrand.N(wait/2)):
		}
		wait = min(2*wait, longestWait)
	}
}

// use lets the session work with a link until the link is over, and returns why it is.
func (s *Session) use(l *link) error {
	s.warn(l)
	s.link.Store(l)
	s.signal() // hubs may have been opened or left before the link could be seen
	s.tellUp()
	err := l.supervise(s.ctx)
	if s.ctx.Err() != nil {
		s.endLease(l)
	}
	err = s.describe(l.address, err)
	s.down.Store(&err)
	s.link.Store(nil)
	l.close(err)
	return err
}

// describe returns err for the operator.
func (s *Session) describe(address string, err error) error {
	return fmt.Errorf("redis at %s: %w", address, explain(err))
}

// tellUp tells the monitor that the server can be reached, and that something may have been missed.
func (s *Session) tellUp() {
	s.told = ""
	s.monitor.State(nil)
}

// tellDown tells the monitor that the server cannot be reached, unless it has said the same.
func (s *Session) tellDown(err error) {
	s.down.Store(&err)
	if text := err.Error(); text != s.told {
		s.told = text
		s.monitor.State(err)
	}
}

// warn tells the monitor what endangers messages on the server of a link, unless it has said the same.
func (s *Session) warn(l *link) {
	server := l.scripts.Load().server
	warnings := server.warnings()
	text := server.runID + strings.Join(warnings, "\n")
	if text == s.warned {
		return
	}
	s.warned = text
	for _, w := range warnings {
		s.monitor.Warn(w)
	}
}

// connected returns the link, or an error that wraps engine.ErrUnavailable.
func (s *Session) connected() (*link, error) {
	if s.ctx.Err() != nil {
		return nil, unavailable(errClosed)
	}
	l := s.link.Load()
	if l == nil {
		return nil, unavailable(*s.down.Load())
	}
	return l, nil
}

// connectedFor returns the link for a call about a hub.
func (s *Session) connectedFor(hub string) (*link, error) {
	if hub == "" || len(hub) > longestName || !utf8.ValidString(hub) {
		return nil, unavailable(errHubName)
	}
	return s.connected()
}

// Close implements engine.Session. It removes the users of this node, so that the others need not wait for its lease to
// expire.
func (s *Session) Close() error {
	s.cancel()
	<-s.done
	return nil
}
