package chatbroadcast

import (
	"context"
	"net/http"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A nodesAnswer is the answer with the engine and the living nodes.
type nodesAnswer struct {
	Engine engineInfo `json:"engine"`
	Nodes  []nodeInfo `json:"nodes"`
}

// An engineInfo describes the engine in answers. Error says why it is not up. Cluster says whether several nodes can share its
// hubs.
type engineInfo struct {
	Name    string `json:"name"`
	Up      bool   `json:"up"`
	Error   string `json:"error,omitempty"`
	Cluster bool   `json:"cluster"`
}

// A nodeInfo describes a node in answers, as it was at Renewed. Self is the node that answers, as it is now.
type nodeInfo struct {
	Name    string    `json:"name"`
	Number  uint64    `json:"number"`
	Self    bool      `json:"self"`
	Since   time.Time `json:"since"`
	Renewed time.Time `json:"renewed,omitzero"`
	Hubs    int       `json:"hubs"`
	Clients int       `json:"clients"`
	Behind  uint64    `json:"behind"`
}

// listNodes answers with the engine and the nodes that share its hubs.
func (a *adminAPI) listNodes(w http.ResponseWriter, r adminRequest) error {
	l := a.registry.startedLink()
	self := a.registry.self(l)
	done := nodesAnswer{Engine: engineInfo{Name: "memory", Up: true}, Nodes: []nodeInfo{self}}
	if l == nil {
		return answerJSON(w, http.StatusOK, done)
	}
	done.Engine = engineInfo{Name: l.name, Cluster: l.cluster != nil}
	err := l.why()
	if err == nil && l.cluster != nil {
		done.Nodes, err = l.nodes(r.Context(), self)
	}
	if done.Engine.Up = err == nil; err != nil {
		done.Engine.Error = err.Error()
	}
	return answerJSON(w, http.StatusOK, done)
}

// nodes returns the living nodes of a cluster. On an error it returns this one alone.
func (l *link) nodes(ctx context.Context, self nodeInfo) ([]nodeInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, controlPatience)
	defer cancel()
	all, err := l.cluster.Nodes(ctx)
	if err != nil {
		return []nodeInfo{self}, err
	}
	infos := make([]nodeInfo, 0, len(all))
	for _, n := range all {
		info := nodeInfoOf(n)
		if n.Self {
			info, info.Renewed = self, n.Renewed
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func nodeInfoOf(n engine.Node) nodeInfo {
	return nodeInfo{
		Name: n.Name, Number: n.Number, Since: n.Since, Renewed: n.Renewed, Hubs: n.Hubs, Clients: n.Clients, Behind: n.Behind,
	}
}

// self describes this node. Where no other node can be, its number is 1.
func (r *registry) self(l *link) nodeInfo {
	info := nodeInfo{Name: hostname(), Number: 1, Self: true, Since: r.since}
	info.Clients, info.Hubs = r.count()
	if l == nil {
		return info
	}
	info.Since = l.since
	if l.cluster != nil {
		info.Number = l.cluster.Number()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	info.Behind = l.behind
	return info
}
