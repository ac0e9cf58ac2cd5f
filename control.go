package chatbroadcast

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.uber.org/zap"
)

// controlHub is the hub in which the nodes of a cluster pass each other requests for their admin APIs. It begins with a
// control character, so no user has a hub of that name.
const controlHub = "\x01control"

// controlBounds are what the engine keeps of controlHub. Nobody reads an entry later.
var controlBounds = engine.Bounds{Messages: 1, Bytes: 1 << 20, Age: time.Minute}

const (
	// controlPatience is how long a node waits for the answers of others, all together.
	controlPatience = time.Second

	// maxServed is how many requests of other nodes a node serves at once. It drops more, and so it is silent about them.
	maxServed = 16

	// maxControlHead and maxControlBody bound the two parts of an entry, in bytes. Every node gets every entry, and parses
	// each head; so heads are short. A page of 1000 clients is a body of about 300 KB.
	maxControlHead = 64 << 10
	maxControlBody = 1 << 20
)

// A controlEntry is an entry of controlHub: a line of JSON, the head, and behind it the body as it is. It is a request if it
// has a method, a reply if it has a status, and otherwise, with done, the word that a request needs nothing more.
type controlEntry struct {
	ID   string        `json:"id"`
	From engine.NodeID `json:"from"`

	To          engine.NodeID `json:"to,omitempty"` // one node, or "" for all others
	Method      string        `json:"method,omitempty"`
	Path        string        `json:"path,omitempty"` // escaped
	Query       string        `json:"query,omitempty"`
	ContentType string        `json:"content_type,omitempty"`

	Status int `json:"status,omitempty"`

	Done bool `json:"done,omitempty"`

	body []byte
}

var errTooLong = errors.New("the request is too long for them")

// encode returns e as an entry's data. It returns errTooLong if the other nodes would not take it.
func (e *controlEntry) encode() ([]byte, error) {
	head, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	if len(head) > maxControlHead || len(e.body) > maxControlBody {
		return nil, errTooLong
	}
	return append(append(head, '\n'), e.body...), nil
}

// parseControl returns what encode has encoded. Whoever can write to the engine can write an entry, so it takes nothing for
// granted; ok is false for junk.
func parseControl(data []byte) (e controlEntry, ok bool) {
	head, _, found := bytes.Cut(data[:min(len(data), maxControlHead+1)], []byte{'\n'})
	if !found || json.Unmarshal(head, &e) != nil || e.ID == "" || e.From == "" {
		return controlEntry{}, false
	}
	e.body = data[len(head)+1:]
	return e, len(e.body) <= maxControlBody
}

// A controller passes requests for the admin API between this node and the others of its cluster. Requests and replies that
// are lost stay lost: the node that asks takes the other one for silent. It implements engine.Receiver for controlHub.
type controller struct {
	cluster engine.Cluster
	serving func() bool // whether the hubs of this node are those of the cluster
	api     *adminAPI

	// ended is done when close is called; end makes it so.
	ended context.Context
	end   context.CancelFunc

	mu      sync.Mutex
	open    bool
	failed  bool // opening has failed, and the log says so
	closed  bool
	last    engine.Position     // of the newest entry that came
	waiting map[string]*waiting // this node's requests, by id
	served  map[servedKey]*served
	running sync.WaitGroup // the goroutines of served
}

// A waiting is a request of this node that waits for replies.
type waiting struct {
	missing map[engine.NodeID]bool // the nodes that have not replied
	replies chan controlEntry      // has room for all
}

// A servedKey names a request of another node.
type servedKey struct {
	from engine.NodeID
	id   string
}

// A served is a request of another node that this node serves, and must not pass on.
type served struct {
	request controlEntry

	// pending is done when the other node says that the request needs nothing more, or when this node ends; finish makes it so.
	pending context.Context
	finish  context.CancelFunc

	// after, if the action sets it, runs when pending is done, and after afterPatience at the latest. Only the goroutine of
	// the request uses it.
	after func()
}

// afterPatience bounds how long served.after waits: longer than what the other node may need in between.
const afterPatience = 3 * controlPatience

func newController(l *link) *controller {
	c := &controller{
		cluster: l.cluster,
		serving: func() bool { return l.registry.current.Load() == l },
		api:     &adminAPI{registry: l.registry},
		waiting: map[string]*waiting{},
		served:  map[servedKey]*served{},
	}
	c.ended, c.end = context.WithCancel(context.Background())
	return c
}

// ensureOpen opens controlHub if it is not open yet.
func (c *controller) ensureOpen(ctx context.Context) {
	c.mu.Lock()
	open := c.open
	c.mu.Unlock()
	if open {
		return
	}
	_, err := c.cluster.Open(ctx, controlHub, controlBounds, c) // what was said before is nobody's business any more
	c.mu.Lock()
	report := err != nil && !c.failed
	c.open, c.failed = err == nil, err != nil
	c.mu.Unlock()
	if report {
		processLogger().Warn("this node does not answer admin requests of the other nodes yet", zap.Error(err))
	}
}

// close leaves controlHub, and waits until nothing is served any more.
func (c *controller) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.end()
	c.cluster.Leave(controlHub, c)
	c.running.Wait()
}

// publish publishes an entry in controlHub.
func (c *controller) publish(ctx context.Context, e controlEntry) error {
	e.From = c.cluster.ID()
	data, err := e.encode()
	if err != nil {
		return err
	}
	_, err = c.cluster.Publish(ctx, controlHub, engine.Batch{Bounds: controlBounds, Messages: []engine.Message{{Data: data}}})
	return err
}

// ask sends a request to the given nodes and returns their replies. It waits until all have replied or ctx is done. An error
// means that no node has got the request.
func (c *controller) ask(ctx context.Context, request controlEntry, nodes []engine.Node) (map[engine.NodeID]controlEntry, error) {
	w := &waiting{missing: map[engine.NodeID]bool{}, replies: make(chan controlEntry, len(nodes))}
	for _, n := range nodes {
		w.missing[n.ID] = true
	}
	c.mu.Lock()
	c.waiting[request.ID] = w
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, request.ID)
	}()
	if err := c.publish(ctx, request); errors.Is(err, engine.ErrUnavailable) || errors.Is(err, errTooLong) {
		return nil, err
	}
	// After any other error it may be on its way.
	replies := map[engine.NodeID]controlEntry{}
	for len(replies) < len(nodes) {
		select {
		case r := <-w.replies:
			replies[r.From] = r
		case <-ctx.Done():
			return replies, nil
		case <-c.ended.Done():
			return replies, nil
		}
	}
	return replies, nil
}

// finish tells the other nodes that a request of this one needs nothing more. If they do not learn it, they find out later
// by themselves.
func (c *controller) finish(ctx context.Context, id string) {
	_ = c.publish(ctx, controlEntry{ID: id, Done: true})
}

// Entries implements engine.Receiver.
func (c *controller) Entries(epoch string, first uint64, entries []engine.Entry) {
	for i, entry := range entries {
		if !c.isNext(engine.Position{Epoch: epoch, Seq: first + uint64(i)}) {
			continue
		}
		e, ok := parseControl(entry.Data)
		self := c.cluster.ID()
		switch {
		case !ok || e.From == self:
		case e.Method != "":
			if e.To == "" || e.To == self {
				c.begin(e)
			}
		case e.Status >= http.StatusOK && e.Status < 600:
			c.replied(e)
		case e.Done:
			c.finished(servedKey{e.From, e.ID})
		}
	}
}

// Users implements engine.Receiver. controlHub has no users.
func (c *controller) Users(uint64, engine.NodeID, []engine.UserCount) {}

// isNext reports whether an entry has not come before, so that no request is served twice.
func (c *controller) isNext(p engine.Position) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p.Epoch == c.last.Epoch && p.Seq <= c.last.Seq {
		return false
	}
	c.last = p
	return true
}

// begin serves a request of another node, unless too many are being served.
func (c *controller) begin(e controlEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := servedKey{e.From, e.ID}
	if c.closed || len(c.served) >= maxServed || c.served[key] != nil || !c.serving() {
		return
	}
	s := &served{request: e}
	s.pending, s.finish = context.WithCancel(c.ended)
	c.served[key] = s
	c.running.Add(1)
	go c.serve(key, s) // ends when the request is served, and close waits for it
}

// finished ends what a request of another node has begun.
func (c *controller) finished(key servedKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.served[key]; s != nil {
		s.finish()
	}
}

// replied passes a reply to the request that waits for it.
func (c *controller) replied(e controlEntry) {
	c.mu.Lock()
	w := c.waiting[e.ID]
	wanted := w != nil && w.missing[e.From]
	if wanted {
		delete(w.missing, e.From)
	}
	c.mu.Unlock()
	if wanted {
		w.replies <- e // has room, because each node replies once
	}
}

// serve serves a request of another node.
func (c *controller) serve(key servedKey, s *served) {
	defer c.running.Done()
	defer func() {
		s.finish()
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.served, key)
	}()
	ctx, cancel := context.WithTimeout(c.ended, controlPatience)
	defer cancel()
	reply := c.answer(ctx, s)
	if s.after != nil {
		defer s.after()
	}
	reply.ID = s.request.ID
	if err := c.publish(ctx, reply); err != nil {
		processLogger().Debug("answering an admin request of another node failed", zap.Error(err))
	}
	if s.after == nil {
		return
	}
	select {
	case <-s.pending.Done():
	case <-time.After(afterPatience):
	}
}

// answer returns the reply of this node's admin API to a request.
func (c *controller) answer(ctx context.Context, s *served) (reply controlEntry) {
	defer func() {
		// net/http would recover it for a request that comes over HTTP.
		if v := recover(); v != nil {
			processLogger().Error("panic in an admin request of another node", zap.Any("panic", v), zap.ByteString("stack", debug.Stack()))
			reply = controlEntry{Status: http.StatusInternalServerError}
		}
	}()
	e := &s.request
	if !strings.HasPrefix(e.Path, adminPath) {
		return errorReply(adminError(http.StatusBadRequest, errors.New("the path is none of the admin API")))
	}
	r, err := http.NewRequestWithContext(context.WithValue(ctx, servedContextKey{}, s), e.Method, e.Path+"?"+e.Query, bytes.NewReader(e.body))
	if err != nil {
		return errorReply(adminError(http.StatusBadRequest, err))
	}
	if e.ContentType != "" {
		r.Header.Set("Content-Type", e.ContentType)
	}
	w := &keptResponse{header: http.Header{}, status: http.StatusOK}
	if err := c.api.serve(w, r); err != nil {
		return errorReply(err)
	}
	if w.body.Len() > maxControlBody {
		return errorReply(adminError(http.StatusInsufficientStorage, errors.New("the answer is too long: ask for fewer with limit")))
	}
	return controlEntry{Status: w.status, body: w.body.Bytes()}
}

// servedContextKey is the key of the *served in the context of a request that comes from another node.
type servedContextKey struct{}

// servedIn returns the request of another node to which a context belongs, or nil.
func servedIn(ctx context.Context) *served {
	s, _ := ctx.Value(servedContextKey{}).(*served)
	return s
}

// A controlError is the body of a reply that is an error. Caddy answers errors in the same form.
type controlError struct {
	Error string `json:"error"`
}

// errorReply returns the reply for an error of the admin API.
func errorReply(err error) controlEntry {
	status := http.StatusInternalServerError
	if api, ok := errors.AsType[caddy.APIError](err); ok {
		status, err = api.HTTPStatus, api.Err
	}
	body, _ := json.Marshal(controlError{err.Error()}) // is a string
	return controlEntry{Status: status, body: body}
}

// A keptResponse is an http.ResponseWriter that keeps the response.
type keptResponse struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (r *keptResponse) Header() http.Header { return r.header }

// WriteHeader implements http.ResponseWriter.
func (r *keptResponse) WriteHeader(status int) { r.status = status }

// Write implements http.ResponseWriter.
func (r *keptResponse) Write(p []byte) (int, error) { return r.body.Write(p) }

// Interface guards
var (
	_ engine.Receiver     = (*controller)(nil)
	_ http.ResponseWriter = (*keptResponse)(nil)
)
