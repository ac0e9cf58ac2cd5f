package enginetest

import (
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A Server is the reference implementation of an engine: it keeps the hubs of a cluster in memory. Each [Session] that
// it starts is a node. Faults can be provoked with the methods of both.
//
// It does exactly what package engine promises, and no more than it must: it forgets what is outside the bounds at once.
// It needs no I/O, so it works in a bubble of testing/synctest.
type Server struct {
	mu       sync.Mutex
	hubs     map[string]*hub
	sessions []*Session // that run
	nodes    map[engine.NodeID]*node
	numbers  uint64    // how many numbers of nodes were given away
	wiped    time.Time // when all data were lost, or zero

	// The faults.
	down         error // why no session reaches the server, or nil
	holds        []chan struct{}
	loseRequests int
	loseReplies  int
}

// A node is what the server knows of a node.
type node struct {
	engine.Node
	expires   time.Time
	forgotten bool // the node was taken for dead and has not called Renew since, but it has announced users
}

// NewServer returns a server without hubs.
func NewServer() *Server {
	return &Server{hubs: map[string]*hub{}, nodes: map[engine.NodeID]*node{}}
}

// Key implements [engine.Engine]. All servers have the same key.
func (s *Server) Key() string { return "enginetest" }

// Connect implements [engine.Engine]. The session that it returns is a *Session.
func (s *Server) Connect(monitor engine.Monitor) (engine.Session, error) {
	return s.start(monitor), nil
}

// Session starts the session of a node that has no monitor.
func (s *Server) Session() *Session { return s.start(nil) }

func (s *Server) start(monitor engine.Monitor) *Session {
	session := newSession(s, monitor)
	s.run(session)
	return session
}

func (s *Server) run(session *Session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions = append(s.sessions, session)
	session.tellStateLocked()
	// Close and Kill end it and wait for it.
	go session.deliver()
}

// hubLocked returns a hub within its bounds. The hub is new if the server does not have it any more.
func (s *Server) hubLocked(name string, now time.Time) *hub {
	h := s.hubs[name]
	if h == nil || !h.isKept(h.modified, now) && !s.isOpenLocked(name) {
		h = newHub(s.wiped)
		s.hubs[name] = h
	}
	h.trim(now)
	return h
}

// isOpenLocked reports whether any node has the hub open.
func (s *Server) isOpenLocked(hub string) bool {
	return slices.ContainsFunc(s.sessions, func(session *Session) bool { return session.open[hub] != nil })
}

// widestLocked returns the bounds that a node names for a hub, widened by those of the nodes that have it open.
func (s *Server) widestLocked(hub string, bounds engine.Bounds) engine.Bounds {
	for _, session := range s.sessions {
		o := session.open[hub]
		if o == nil {
			continue
		}
		bounds.Messages = max(bounds.Messages, o.bounds.Messages)
		bounds.Bytes = max(bounds.Bytes, o.bounds.Bytes)
		bounds.Age = max(bounds.Age, o.bounds.Age)
		bounds.Receipts = max(bounds.Receipts, o.bounds.Receipts)
	}
	return bounds
}

// pushLocked has all nodes that have the hub open call their receivers.
func (s *Server) pushLocked(hub string, call func(engine.Receiver)) {
	for _, session := range s.sessions {
		session.pushLocked(hub, call)
	}
}

// registerLocked gives a session a number and makes it a living node.
func (s *Server) registerLocked(session *Session, now time.Time) {
	s.numbers++
	session.number = s.numbers
	s.nodes[session.id] = &node{
		Node:    engine.Node{ID: session.id, Number: session.number},
		expires: now.Add(engine.Lease),
	}
}

// removeDeadLocked removes the nodes that have not called Renew in time.
func (s *Server) removeDeadLocked(now time.Time) {
	for id, node := range s.nodes {
		if !now.Before(node.expires) {
			s.removeNodeLocked(id)
		}
	}
}

// removeNodeLocked removes a node and its users.
func (s *Server) removeNodeLocked(id engine.NodeID) {
	delete(s.nodes, id)
	for _, name := range slices.Sorted(maps.Keys(s.hubs)) {
		s.takeBackLocked(name, id)
	}
}

// takeBackLocked takes back what a node has announced in a hub, and tells the others that its users are gone.
func (s *Server) takeBackLocked(name string, id engine.NodeID) {
	h := s.hubs[name]
	if h == nil || len(h.users[id]) == 0 {
		return
	}
	gone := h.usersOf(id)
	for i := range gone {
		gone[i].Clients = 0
	}
	s.announceLocked(name, h, id, gone)
}

// announceLocked notes how many clients users have on a node, and tells all nodes.
func (s *Server) announceLocked(name string, h *hub, id engine.NodeID, users []engine.UserCount) {
	h.announce(id, users)
	version := h.version
	s.pushLocked(name, func(to engine.Receiver) { to.Users(version, id, users) })
}

// Interface guards
var _ engine.Engine = (*Server)(nil)
