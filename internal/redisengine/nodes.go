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
		encodeBounds(sub.bounds), hub, s.keys.hubChannel(hub))
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
				strconv.FormatUint(k.Version, 10), encodeBounds(k.Bounds))
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
