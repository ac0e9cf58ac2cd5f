package chatbroadcast

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

func init() { caddy.RegisterModule(new(adminAPI)) }

// tapPatience is how long a shutdown waits for a tail whose client does not read.
const tapPatience = time.Second

// adminAPI shows and controls the hubs on Caddy's admin endpoint, in JSON. It checks no rights; the admin endpoint
// does. Caddy makes one adminAPI for each admin endpoint that it starts. In a cluster it covers all nodes: it asks the others,
// and each has an adminAPI for such requests.
type adminAPI struct {
	registry *registry // has the hubs of this node

	// shutdown is done when the endpoint shuts down. It ends the tails, because the endpoint would wait for them. The
	// first tail sets it.
	shutdown     context.Context
	shutdownOnce sync.Once
}

// CaddyModule implements caddy.Module.
func (*adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "admin.api.chat_broadcast", New: func() caddy.Module { return &adminAPI{registry: hubs} }}
}

// Routes implements caddy.AdminRouter. It has a single route, because the patterns of http.ServeMux cannot tell a hub
// named "/" from an empty name.
func (a *adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: adminPath, Handler: caddy.AdminHandlerFunc(a.serve)}}
}

// adminPath is the path of the API, and the pattern for everything below it.
const adminPath = "/chat_broadcast/"

// An adminRequest is a request for an action. name is the hub, the client's id or the user that its path names, or "". path is
// its path in canonical form, escaped.
type adminRequest struct {
	*http.Request
	name  string
	path  string
	query url.Values
}

// A resource has an action for each method that it allows.
type resource map[string]action

// An action answers a request. The query may have only the parameters in params, each at most once: if the API ignored
// a misspelled one, the action could reach more clients than was meant.
type action struct {
	do     func(http.ResponseWriter, adminRequest) error
	params []string
}

// resource returns the resource that a path names, or nil, and the name in the path. served says that another node has passed
// the request on.
func (a *adminAPI) resource(path []string, served bool) (res resource, name string) {
	switch {
	case len(path) == 1 && path[0] == "nodes" && !served:
		return resource{http.MethodGet: {a.listNodes, nil}}, ""
	case len(path) == 1 && path[0] == "hubs":
		return resource{http.MethodGet: {a.listHubs, []string{"prefix", "after", "limit"}}}, ""
	case len(path) < 2 || path[1] == "":
		return nil, ""
	case len(path) == 2 && path[0] == "hubs":
		return resource{http.MethodGet: {a.listClients, []string{"after", "limit"}}, http.MethodDelete: {a.kickHub, nil}}, path[1]
	case len(path) == 3 && path[0] == "hubs" && path[2] == "messages":
		res := resource{http.MethodPost: {a.publishBody, nil}}
		if !served { // it would never end
			res[http.MethodGet] = action{a.tail, nil}
		}
		return res, path[1]
	case len(path) == 3 && path[0] == "hubs" && path[2] == "bounds" && served:
		return resource{http.MethodGet: {a.showBounds, nil}}, path[1]
	case len(path) == 2 && path[0] == "clients":
		return resource{http.MethodDelete: {a.kickClient, nil}}, path[1]
	case len(path) == 2 && path[0] == "users":
		return resource{http.MethodDelete: {a.kickUser, nil}}, path[1]
	}
	return nil, ""
}

// serve finds the action for the request and runs it.
func (a *adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	path := pathSegments(r.URL)
	res, name := a.resource(path, servedIn(r.Context()) != nil)
	if res == nil {
		return adminError(http.StatusNotFound, fmt.Errorf("unknown path %s; a hub's name is one segment of the path: "+
			"slashes in it are written %%2F", printable(r.URL.Path)))
	}
	action, ok := res[r.Method]
	if !ok {
		allow := strings.Join(slices.Sorted(maps.Keys(res)), ", ")
		w.Header().Set("Allow", allow)
		return adminError(http.StatusMethodNotAllowed, fmt.Errorf("method: must be %s here", allow))
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return adminError(http.StatusBadRequest, fmt.Errorf("query: %w", err))
	}
	for name, values := range query {
		if !slices.Contains(action.params, name) {
			return adminError(http.StatusBadRequest, fmt.Errorf("%s: is not a parameter here; the parameters are %q", printable(name), action.params))
		}
		if len(values) > 1 {
			return adminError(http.StatusBadRequest, fmt.Errorf("%s: is given more than once", name))
		}
	}
	return action.do(w, adminRequest{r, name, pathOf(path), query})
}

// pathSegments returns the decoded segments of the path below adminPath. It splits the path as the client sent it, even
// if that has characters that should have been encoded.
func pathSegments(u *url.URL) []string {
	raw := u.RawPath
	if raw == "" { // the default encoding is the one that the client sent
		raw = u.EscapedPath()
	}
	segments := strings.Split(strings.TrimPrefix(raw, adminPath), "/")
	for i, s := range segments {
		segments[i], _ = url.PathUnescape(s) // cannot fail: net/http has decoded it
	}
	return segments
}

// pathOf returns the path of which pathSegments returns the segments, in canonical form.
func pathOf(segments []string) string {
	encoded := make([]string, len(segments))
	for i, s := range segments {
		encoded[i] = escaped(s)
	}
	return adminPath + strings.Join(encoded, "/")
}

// nodesPath is the path of the nodes, and hubsPath the one above the hubs.
const (
	nodesPath = adminPath + "nodes"
	hubsPath  = adminPath + "hubs/"
)

// hubPath returns the path of a hub.
func hubPath(name string) string { return hubsPath + escaped(name) }

// escaped returns name as one segment of a path.
func escaped(name string) string {
	if name == "." || name == ".." { // names of users; without encoding they would lead elsewhere
		return strings.ReplaceAll(name, ".", "%2E")
	}
	return url.PathEscape(name)
}

// adminError returns an error that Caddy answers as JSON. If a field of the request is wrong, the text of err begins
// with the name of the field.
func adminError(status int, err error) error {
	return caddy.APIError{HTTPStatus: status, Err: err}
}

// errNotOpen returns the error for a hub that is not open. A hub is open while it has clients and, with history, for some
// time after that.
func errNotOpen(name string) error { return fmt.Errorf("hub %s is not open", escapedName(name)) }

// checkHubOf returns an error if the path of r names no hub.
func checkHubOf(r adminRequest) error {
	if err := named("hub", checkHubName(r.name)); err != nil {
		return adminError(http.StatusBadRequest, err)
	}
	return nil
}

// ---- publishing ----

// publishBody publishes the request's body, as text unless its type says that it is binary. The body may be as large as
// a message from the hub's clients. If the hub has clients on other nodes only, one of these nodes publishes it.
func (a *adminAPI) publishBody(w http.ResponseWriter, r adminRequest) error {
	body := &postBody{ReadCloser: r.Body}
	published, err := a.publishFrom(w, r, body)
	if err != nil {
		body.discard(w, r.Request)
		return err
	}
	return answerJSON(w, http.StatusOK, published)
}

// publishFrom publishes body, or returns an error with the status of the answer.
func (a *adminAPI) publishFrom(w http.ResponseWriter, r adminRequest, body *postBody) (publication, error) {
	if err := checkHubOf(r); err != nil {
		return publication{}, err
	}
	b, l := a.registry.hub(r.name), a.others(r)
	var elsewhere *engine.Node
	var silent []string
	if b == nil || b.Size() == 0 {
		elsewhere, silent = findElsewhere(r, l, b != nil)
	}
	if b == nil && elsewhere == nil {
		return publication{}, notFound(errNotOpen(r.name), silent)
	}
	if err := checkEncoding(w.Header(), r.Header); err != nil {
		return publication{}, adminError(http.StatusUnsupportedMediaType, named("body", err))
	}
	if elsewhere != nil {
		return publishElsewhere(r, l, body, *elsewhere)
	}
	return a.publishIn(b, r, body)
}

// publishIn publishes body in a hub that is open here.
func (a *adminAPI) publishIn(b *hub.Hub, r adminRequest, body *postBody) (publication, error) {
	payload, err := readBody(body, b.MessageLimit(), "the largest max_message_size of the hub's clients")
	if err != nil {
		return publication{}, err
	}
	opcode, err := opcodeOf(payload, r.Header.Get("Content-Type"))
	if err != nil {
		return publication{}, adminError(http.StatusBadRequest, named("body", err))
	}
	m := hub.Message{Message: feed.Message{Opcode: opcode, Payload: payload}, Source: hub.FromAdmin}
	published, found, err := a.registry.publish(r.Context(), b.Name(), m)
	switch {
	case errors.Is(err, hub.ErrUnknown):
		return publication{}, adminError(http.StatusGatewayTimeout, err)
	case err != nil:
		return publication{}, adminError(http.StatusServiceUnavailable, err)
	case !found:
		return publication{}, adminError(http.StatusNotFound, errNotOpen(b.Name())) // it has closed meanwhile
	}
	return publication{published.Members, published.Seq}, nil
}

// readBody reads the body of a message of at most limit bytes. what says where the limit comes from.
func readBody(body io.ReadCloser, limit int, what string) ([]byte, error) {
	payload, err := io.ReadAll(http.MaxBytesReader(nil, body, int64(limit)))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, adminError(http.StatusRequestEntityTooLarge, fmt.Errorf("body: is larger than %d bytes, %s", limit, what))
	}
	if err != nil {
		return nil, adminError(http.StatusBadRequest, fmt.Errorf("body: %w", err))
	}
	return payload, nil
}

// findElsewhere returns the other node on which the hub of r has the most clients, or nil. open says that the hub is open here,
// too: then only a node with clients counts. silent names the nodes that did not answer.
func findElsewhere(r adminRequest, l *link, open bool) (best *engine.Node, silent []string) {
	request := controlEntry{ID: engine.NewEpoch(), Method: http.MethodGet, Path: hubPath(r.name), Query: "limit=1"}
	pages, silent := gather(r.Context(), l, request, func(p *clientsPage) error { return p.Hub.check() })
	least := 0
	if open {
		least = 1
	}
	for _, p := range pages {
		if p.body.Hub.Clients >= least {
			best, least = &p.node, p.body.Hub.Clients+1
		}
	}
	return best, silent
}

// publishElsewhere has another node publish body.
func publishElsewhere(r adminRequest, l *link, body *postBody, node engine.Node) (publication, error) {
	payload, err := readBody(body, maxControlBody, "which is as much as nodes pass each other")
	if err != nil {
		return publication{}, err
	}
	request := r.forOthers()
	request.To, request.ContentType, request.body = node.ID, r.Header.Get("Content-Type"), payload
	ctx, cancel := context.WithTimeout(r.Context(), controlPatience)
	defer cancel()
	replies, err := l.control.ask(ctx, request, []engine.Node{node})
	if err != nil {
		return publication{}, adminError(http.StatusServiceUnavailable, err)
	}
	reply, replied := replies[node.ID]
	switch {
	case !replied:
		return publication{}, adminError(http.StatusGatewayTimeout,
			fmt.Errorf("node %s did not answer: it may have published the message", nodeName(node)))
	case reply.Status >= http.StatusBadRequest:
		return publication{}, adminError(reply.Status, reply.err())
	}
	var done publication
	if err := decodeReply(reply, &done, (*publication).check); err != nil {
		return publication{}, adminError(http.StatusBadGateway, fmt.Errorf("node %s: %w", nodeName(node), err))
	}
	return done, nil
}

// ---- tails ----

// A tailLine is one line of a tail: a message, or the note that Lagged messages were omitted at that place. A text
// message has Data, and a binary one has Data64.
type tailLine struct {
	Seq    uint64  `json:"seq,omitempty"`
	Client string  `json:"client,omitempty"`
	Type   string  `json:"type,omitempty"`
	Data   *string `json:"data,omitempty"`
	Data64 *[]byte `json:"data64,omitempty"`
	Lagged uint64  `json:"lagged,omitempty"`
}

func tailLineOf(m hub.Tapped) tailLine {
	line := tailLine{Seq: m.Seq}
	if m.Sender != 0 {
		line.Client = m.Sender.String()
	}
	if m.Binary {
		line.Type, line.Data64 = "binary", &m.Payload
		return line
	}
	text := string(m.Payload)
	line.Type, line.Data = "text", &text
	return line
}

// tail answers with a line of JSON for each message that is published in the hub from now on. It ends when the client
// of the API goes or when the endpoint shuts down, which it also does at a reload. The hub need not exist: a tail is no
// client of the hub, so it neither opens a hub nor keeps one open. In a cluster it does both, because otherwise the messages of
// other nodes would not come here.
func (a *adminAPI) tail(w http.ResponseWriter, r adminRequest) error {
	if err := checkHubOf(r); err != nil {
		return err
	}
	a.shutdownOnce.Do(func() {
		shutdown, done := context.WithCancel(context.Background())
		r.Context().Value(http.ServerContextKey).(*http.Server).RegisterOnShutdown(done)
		a.shutdown = shutdown
	})
	conn := http.NewResponseController(w)
	// The endpoint has a read timeout for requests. If it expired, net/http would take the client of the API for gone.
	_ = conn.SetReadDeadline(time.Time{})
	defer context.AfterFunc(a.shutdown, func() { _ = conn.SetWriteDeadline(time.Now().Add(tapPatience)) })()

	t, remove := a.registry.tap(r.name)
	defer remove()
	if l := a.others(r); l != nil {
		pinned, unpin := context.WithCancel(r.Context())
		defer unpin()
		if err := a.registry.pin(pinned, r.name, tailSettings(r, l)); err != nil {
			return adminError(http.StatusServiceUnavailable, err)
		}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.WriteHeader(http.StatusOK)
	for conn.Flush() == nil { // first the header: a client that has seen it misses nothing from then on
		select {
		case <-t.News():
		case <-r.Context().Done():
			return nil
		case <-a.shutdown.Done():
			return nil
		}
		messages, missed := t.Take()
		for _, m := range messages {
			if encodeJSON(w, tailLineOf(m)) != nil {
				return nil
			}
		}
		if missed > 0 && encodeJSON(w, tailLine{Lagged: missed}) != nil {
			return nil
		}
	}
	return nil
}

// tailSettings returns the settings with which this node opens a hub for a tail. An engine keeps as much of a hub as the newest
// bounds say, so these must not be lower than those of the other nodes.
func tailSettings(r adminRequest, l *link) *hub.Settings {
	s := new(Handler).newSettings()
	request := controlEntry{ID: engine.NewEpoch(), Method: http.MethodGet, Path: hubPath(r.name) + "/bounds"}
	answers, _ := gather(r.Context(), l, request, checkBounds)
	for _, o := range answers {
		if o.body.Receipts == 0 {
			continue // a hub without history
		}
		s.HistoryMessages = max(s.HistoryMessages, o.body.Messages)
		s.HistoryAge = max(s.HistoryAge, o.body.Age)
		s.BufferBytes = max(s.BufferBytes, 2*o.body.Bytes) // the history takes half of it
	}
	return s
}

// checkBounds returns an error for bounds that no hub has.
func checkBounds(b *engine.Bounds) error {
	return errors.Join(
		checkRange("messages", b.Messages, 1, maxCount),
		checkRange("bytes", b.Bytes, 1, maxBufferSize/2),
		checkDuration("age", caddy.Duration(b.Age), 1, maxDuration),
	)
}

// showBounds answers with what the engine is to keep of a hub that is open here.
func (a *adminAPI) showBounds(w http.ResponseWriter, r adminRequest) error {
	b := a.registry.hub(r.name)
	if b == nil {
		return adminError(http.StatusNotFound, errNotOpen(r.name))
	}
	return answerJSON(w, http.StatusOK, b.Known().Bounds)
}

// Interface guards
var (
	_ caddy.Module      = (*adminAPI)(nil)
	_ caddy.AdminRouter = (*adminAPI)(nil)
)
