package redisengine

import (
	"context"
	"errors"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

const (
	// removeInterval is the time between two looks for nodes that have ended. A claim holds for claimTime, and is renewed
	// when the work takes longer.
	removeInterval = 2 * time.Second
	claimTime      = 3 * time.Second

	// hubsTogether is how many hubs are asked for at once when the users of a node are removed.
	hubsTogether = 64
)

// removeUsers removes the users of this node from hubs that it leaves, and those of nodes that have ended from all hubs,
// until the link is over.
func (s *Session) removeUsers(l *link) {
	look := time.NewTicker(removeInterval)
	defer look.Stop()
	s.removeLeft(l) // what the link before has not done
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-l.left:
			s.removeLeft(l)
		case <-look.C:
			s.removeLeft(l) // what has failed before
			s.removeEnded(l)
		}
	}
}

// removeLeft removes the users of this node from the hubs that it has left.
func (s *Session) removeLeft(l *link) {
	s.mu.Lock()
	left := make([]string, 0, len(s.leaving))
	for hub := range s.leaving {
		left = append(left, hub)
	}
	s.mu.Unlock()
	for len(left) > 0 && l.ctx.Err() == nil {
		some := left[:min(len(left), hubsTogether)]
		left = left[len(some):]
		if err := s.removeFrom(l.ctx, l, s.node, some, false); err != nil {
			continue
		}
		s.mu.Lock()
		for _, hub := range some {
			close(s.leaving[hub])
			delete(s.leaving, hub)
		}
		s.mu.Unlock()
	}
}

// removeEnded removes the users of nodes whose leases have expired. If it fails, it or another node continues.
func (s *Session) removeEnded(l *link) {
	for l.ctx.Err() == nil {
		ended, err := l.run(l.ctx, scriptFindEnded,
			[]string{s.keys.server, s.keys.nodes, s.keys.statuses, s.keys.claims},
			string(s.node), milliseconds(claimTime)).ToString()
		if err != nil { // there is none, or the next look finds it
			return
		}
		if err := s.removeNode(l.ctx, l, engine.NodeID(ended)); err != nil {
			return
		}
	}
}

// errAlive means that a node has renewed its lease after all.
var errAlive = errors.New("the node lives")

// removeNode removes the users of a node whose lease has expired, and last the lease.
func (s *Session) removeNode(ctx context.Context, l *link, node engine.NodeID) error {
	err := s.removeAll(ctx, l, node, true)
	if errors.Is(err, errAlive) {
		return nil
	}
	if err != nil {
		return err
	}
	return notNil(l.run(ctx, scriptRemoveNode, []string{s.keys.server, s.keys.nodes, s.keys.claims, s.keys.hubs(node)},
		string(node)).Error())
}

// removeAll removes the users of a node from all hubs.
func (s *Session) removeAll(ctx context.Context, l *link, node engine.NodeID, ended bool) error {
	b := l.commands.B()
	for {
		hubs, err := l.do(ctx, b.Srandmember().Key(s.keys.hubs(node)).Count(hubsTogether).Build()).AsStrSlice()
		if err != nil {
			return err
		}
		if len(hubs) == 0 {
			return nil
		}
		if err := s.removeFrom(ctx, l, node, hubs, ended); err != nil {
			return err
		}
	}
}

// removeFrom removes the users of a node from some hubs. With ended it does so only while the node's lease has expired.
func (s *Session) removeFrom(ctx context.Context, l *link, node engine.NodeID, hubs []string, ended bool) error {
	cursors := map[string]string{}
	for _, hub := range hubs {
		cursors[hub] = "0"
	}
	for len(cursors) > 0 {
		some := make([]string, 0, len(cursors))
		calls := make([]call, 0, len(cursors))
		for hub, cursor := range cursors {
			some = append(some, hub)
			calls = append(calls, call{
				keys: append(s.hubKeys(hub), s.keys.nodes, s.keys.hubs(node), s.keys.claims),
				args: []string{
					string(node), hub, s.keys.hubChannel(hub), cursor, engine.NewEpoch(), bit(ended), string(s.node),
					milliseconds(claimTime),
				},
			})
		}
		for i, result := range l.runAll(ctx, scriptRemoveUsers, calls) {
			cursor, err := result.ToString()
			switch {
			case rueidis.IsRedisNil(err):
				return errAlive
			case err != nil:
				return err
			case cursor == "0":
				delete(cursors, some[i])
			default:
				cursors[some[i]] = cursor
			}
		}
	}
	return nil
}

// endLease ends the lease of the node, and removes its users as far as there is time.
func (s *Session) endLease(l *link) {
	ctx, cancel := context.WithTimeout(l.ctx, closeTimeout)
	defer cancel()
	err := notNil(l.run(ctx, scriptEndLease, []string{s.keys.server, s.keys.nodes, s.keys.statuses}, string(s.node)).Error())
	if err == nil {
		_ = s.removeNode(ctx, l, s.node) // the others do what is left
	}
}
