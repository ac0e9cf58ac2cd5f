package chatbroadcast

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A nodeAnswer is what another node has answered to a request.
type nodeAnswer[T any] struct {
	node engine.Node
	body T
}

// others returns the link to the other nodes that r concerns, too. It returns nil if r concerns this node alone: because there is
// no cluster, or because another node has passed r on.
func (a *adminAPI) others(r adminRequest) *link {
	l := a.registry.current.Load()
	if !l.isCluster() || servedIn(r.Context()) != nil {
		return nil
	}
	return l
}

// forOthers returns r as the other nodes get it, without its body.
func (r adminRequest) forOthers() controlEntry {
	return controlEntry{ID: engine.NewEpoch(), Method: r.Method, Path: r.path, Query: r.query.Encode()}
}

// gather passes a request on to the other nodes of l. It returns the answers of those that have what the request is about, and
// names those of which it cannot say. Without a cluster it returns nothing.
func gather[T any](ctx context.Context, l *link, request controlEntry, check func(*T) error) (answers []nodeAnswer[T], silent []string) {
	if !l.isCluster() {
		return nil, nil
	}
	nodes, replies, err := l.ask(ctx, request)
	if err != nil {
		return nil, []string{fmt.Sprintf("all other nodes: %v", err)}
	}
	for _, n := range nodes {
		reply, replied := replies[n.ID]
		if !replied {
			silent = append(silent, nodeName(n))
			continue
		}
		if reply.Status == http.StatusNotFound {
			continue
		}
		a := nodeAnswer[T]{node: n}
		if err := decodeReply(reply, &a.body, check); err != nil {
			silent = append(silent, fmt.Sprintf("%s: %.200v", nodeName(n), err))
			continue
		}
		answers = append(answers, a)
	}
	return answers, silent
}

// ask passes a request on to all other living nodes, and returns these nodes and the replies of those that have replied in time.
func (l *link) ask(ctx context.Context, request controlEntry) (nodes []engine.Node, replies map[engine.NodeID]controlEntry, err error) {
	ctx, cancel := context.WithTimeout(ctx, controlPatience)
	defer cancel()
	if err := l.why(); err != nil {
		return nil, nil, err
	}
	nodes, err = l.cluster.Nodes(ctx)
	if err != nil {
		return nil, nil, err
	}
	nodes = slices.DeleteFunc(nodes, func(n engine.Node) bool { return n.Self })
	if len(nodes) == 0 {
		return nil, nil, nil
	}
	replies, err = l.control.ask(ctx, request, nodes)
	return nodes, replies, err
}

// decodeReply decodes the body of a reply, unless that is an error or makes no sense.
func decodeReply[T any](reply controlEntry, body *T, check func(*T) error) error {
	if reply.Status != http.StatusOK {
		return reply.err()
	}
	if err := json.Unmarshal(reply.body, body); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	return check(body)
}

// err returns the error in a reply.
func (e *controlEntry) err() error {
	var said controlError
	if json.Unmarshal(e.body, &said) != nil || said.Error == "" {
		return fmt.Errorf("status %d", e.Status)
	}
	return errors.New(said.Error)
}

// nodeName returns how answers name a node.
func nodeName(n engine.Node) string { return fmt.Sprintf("%s (%d)", n.Name, n.Number) }

// notFound returns the error for something that no node has: 404. If some nodes did not answer, nobody knows: 503.
func notFound(none error, silent []string) error {
	if len(silent) == 0 {
		return adminError(http.StatusNotFound, none)
	}
	return adminError(http.StatusServiceUnavailable,
		fmt.Errorf("%w on the nodes that answered; these did not: %s", none, strings.Join(silent, ", ")))
}
