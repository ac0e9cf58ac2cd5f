package redisengine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/redis/rueidis"
)

const (
	// hubsPerCall is how many hubs a script renews, and callsTogether how many such calls are sent together. A script
	// keeps the server busy for about a millisecond.
	hubsPerCall   = 64
	callsTogether = 4

	// removeInterval is the time between two looks for nodes that have ended. A claim holds for claimTime, and is renewed
	// when the work takes longer.
	removeInterval = 2 * time.Second
	claimTime      = 3 * time.Second

	// hubsTogether is how many hubs are asked for at once when the users of a node are removed.
	hubsTogether = 64
)

// ID implements engine.Cluster.
func (s *Session) ID() engine.NodeID { return s.node }

// Number implements engine.Cluster.
func (s *Session) Number() uint64 { return s.number.Load() }

// Announce implements engine.Cluster.
func (s *Session) Announce(ctx context.Context, hub string, users []engine.UserCount) error {
	if err := s.announce(ctx, hub, users); err != nil {
		return fmt.Errorf("announcing users: %w", err)
	}
	return nil
}

func (s *Session) announce(ctx context.Context, hub string, users []engine.UserCount) error {
	l, err := s.connectedFor(hub)
	if err != nil {
		return err
	}
	s.mu.Lock()
	sub := s.hubs[hub]
	if sub == nil || sub.opening {
		s.mu.Unlock()
		return unavailable(errNotOpen)
	}
	sub.announced = true
	known := sub.Position
	s.mu.Unlock()

	args := make([]string, 0, 7+2*len(users))
	args = append(args, string(s.node), engine.NewEpoch(), known.Epoch, strconv.FormatUint(known.Seq, 10),
		milliseconds(sub.bounds.Age), hub, s.keys.hubChannel(hub))
	for _, u := range users {
		args = append(args, u.User, strconv.Itoa(u.Clients))
	}
	keys := append(s.hubKeys(hub), s.keys.nodes, s.keys.hubs(s.node))
	return notNil(l.run(ctx, scriptAnnounce, keys, args...).Error())
}

// Renew implements engine.Cluster.
func (s *Session) Renew(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
	s.status.Store(&status)
	changed, err := s.renew(ctx, known)
	if err != nil {
		return engine.Renewal{}, fmt.Errorf("renewing the lease: %w", err)
	}
	return engine.Renewal{Changed: changed, Forgotten: s.forgotten.Swap(false)}, nil
}

func (s *Session) renew(ctx context.Context, known []engine.Known) ([]engine.Known, error) {
	l, err := s.connected()
	if err != nil {
		return nil, err
	}
	if err := s.register(ctx, l); err != nil {
		return nil, err
	}
	var changed []engine.Known
	for len(known) > 0 {
		some := known[:min(len(known), hubsPerCall*callsTogether)]
		known = known[len(some):]
		differ, err := s.renewHubs(ctx, l, some)
		if err != nil {
			return nil, err
		}
		changed = append(changed, differ...)
	}
	return changed, nil
}

// renewHubs renews some hubs in one round trip, and returns those that differ from what the node knows.
func (s *Session) renewHubs(ctx context.Context, l *link, known []engine.Known) ([]engine.Known, error) {
	var calls []call
	for rest := known; len(rest) > 0; {
		some := rest[:min(len(rest), hubsPerCall)]
		rest = rest[len(some):]
		keys := append(make([]string, 0, 1+keysPerHub*len(some)), s.keys.server)
		args := make([]string, 0, 5*len(some))
		for _, k := range some {
			keys = s.keys.hub(keys, k.Hub)
			args = append(args, engine.NewEpoch(), k.Epoch, strconv.FormatUint(k.Seq, 10),
				strconv.FormatUint(k.Version, 10), milliseconds(k.Bounds.Age))
		}
		calls = append(calls, call{keys: keys, args: args})
	}
	var changed []engine.Known
	for i, result := range l.runAll(ctx, scriptRenew, calls) {
		answers, err := result.ToArray()
		if err != nil {
			return nil, err
		}
		for _, answer := range answers {
			k, err := parseChanged(answer, known[i*hubsPerCall:])
			if err != nil {
				return nil, err
			}
			changed = append(changed, k)
		}
	}
	return changed, nil
}

// parseChanged parses one hub of an answer of renew.lua.
func parseChanged(answer rueidis.RedisMessage, known []engine.Known) (engine.Known, error) {
	fields, err := answer.ToArray()
	if err != nil || len(fields) != 4 {
		return engine.Known{}, errMalformed
	}
	i, err1 := fields[0].AsInt64()
	epoch, err2 := fields[1].ToString()
	seq, err3 := fields[2].AsUint64()
	version, err4 := fields[3].AsUint64()
	if errors.Join(err1, err2, err3, err4) != nil || i < 0 || i >= int64(len(known)) {
		return engine.Known{}, errMalformed
	}
	k := known[i]
	k.Position, k.Version = engine.Position{Epoch: epoch, Seq: seq}, version
	return k, nil
}

// A storedStatus is a status as it is in Redis.
type storedStatus struct {
	Name    string `json:"name"`
	Since   int64  `json:"since"` // ms
	Hubs    int    `json:"hubs"`
	Clients int    `json:"clients"`
	Behind  uint64 `json:"behind"`
}

// register renews the lease of the node. If the server does not know the node, or if it may have lost what the node has
// announced, register removes what is left of it: the node announces its users again when Renew tells it to.
func (s *Session) register(ctx context.Context, l *link) error {
	status := s.status.Load()
	text, err := json.Marshal(storedStatus{
		Name: status.Name, Since: status.Since.UnixMilli(), Hubs: status.Hubs, Clients: status.Clients, Behind: status.Behind,
	})
	if err != nil {
		return err
	}
	had := s.number.Load()
	answer, err := l.run(ctx, scriptLease,
		[]string{s.keys.server, s.keys.nodes, s.keys.statuses, s.keys.number, s.keys.hubs(s.node)},
		string(s.node), milliseconds(engine.Lease), strconv.FormatUint(had, 10), string(text)).AsIntSlice()
	if err != nil {
		return err
	}
	if len(answer) != 2 || answer[0] < 1 {
		return errMalformed
	}
	s.number.Store(uint64(answer[0]))
	if answer[1] == 1 && had > 0 {
		s.uncertain.Store(true)
	}
	if !s.uncertain.Load() {
		return nil
	}
	if err := s.removeAll(ctx, l, s.node, false); err != nil {
		return err
	}
	s.uncertain.Store(false)
	s.forgotten.Store(true)
	return nil
}

// Nodes implements engine.Cluster.
func (s *Session) Nodes(ctx context.Context) ([]engine.Node, error) {
	l, err := s.connected()
	if err != nil {
		return nil, fmt.Errorf("listing the nodes: %w", err)
	}
	answer, err := l.run(ctx, scriptNodes, []string{s.keys.server, s.keys.nodes, s.keys.statuses}).AsStrSlice()
	if err != nil {
		return nil, fmt.Errorf("listing the nodes: %w", err)
	}
	var nodes []engine.Node
	for i := 0; i+1 < len(answer); i += 2 {
		n, err := parseNode(answer[i], answer[i+1])
		if err != nil {
			return nil, fmt.Errorf("listing the nodes: %w", err)
		}
		n.Self = n.ID == s.node
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b engine.Node) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Number, b.Number))
	})
	return nodes, nil
}

// parseNode parses what lease.lua has stored.
func parseNode(id, stored string) (engine.Node, error) {
	words := strings.SplitN(stored, " ", 4)
	if len(words) != 4 {
		return engine.Node{}, errMalformed
	}
	number, err1 := strconv.ParseUint(words[1], 10, 64)
	renewed, err2 := strconv.ParseInt(words[2], 10, 64)
	var status storedStatus
	err3 := json.Unmarshal([]byte(words[3]), &status)
	if errors.Join(err1, err2, err3) != nil {
		return engine.Node{}, errMalformed
	}
	return engine.Node{
		ID: engine.NodeID(id), Number: number, Renewed: time.UnixMilli(renewed),
		Status: engine.Status{
			Name: status.Name, Since: time.UnixMilli(status.Since), Hubs: status.Hubs, Clients: status.Clients,
			Behind: status.Behind,
		},
	}, nil
}

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
		ended, err := l.run(l.ctx, scriptExpired,
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
	return notNil(l.run(ctx, scriptBury, []string{s.keys.server, s.keys.nodes, s.keys.claims, s.keys.hubs(node)},
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
		for i, result := range l.runAll(ctx, scriptRemove, calls) {
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

// retire ends the lease of the node, and removes its users as far as there is time.
func (s *Session) retire(l *link) {
	ctx, cancel := context.WithTimeout(l.ctx, closeTimeout)
	defer cancel()
	err := notNil(l.run(ctx, scriptRetire, []string{s.keys.server, s.keys.nodes, s.keys.statuses}, string(s.node)).Error())
	if err == nil {
		_ = s.removeNode(ctx, l, s.node) // the others do what is left
	}
}

// notNil returns err unless it only means that a script has answered nothing.
func notNil(err error) error {
	if rueidis.IsRedisNil(err) {
		return nil
	}
	return err
}
