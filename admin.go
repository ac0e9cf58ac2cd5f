package chatbroadcast

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

func init() { caddy.RegisterModule(new(adminAPI)) }

// defaultPage and maxPage are how many hubs or clients one answer lists. 1000 of them are at most about 300 KB.
const (
	defaultPage = 100
	maxPage     = 1000
)

// tapPatience is how long a shutdown waits for a tail whose client does not read.
const tapPatience = time.Second

// adminAPI shows and controls the hubs on Caddy's admin endpoint, in JSON. It checks no rights; the admin endpoint
// does. Caddy makes one adminAPI for each admin endpoint that it starts.
type adminAPI struct {
	// shutdown is done when the endpoint shuts down. It ends the tails, because the endpoint would wait for them. The
	// first tail sets it.
	shutdown     context.Context
	shutdownOnce sync.Once
}

// CaddyModule implements caddy.Module.
func (*adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "admin.api.chat_broadcast", New: func() caddy.Module { return new(adminAPI) }}
}

// Routes implements caddy.AdminRouter. It has a single route, because the patterns of http.ServeMux cannot tell a hub
// named "/" from an empty name.
func (a *adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: adminPath, Handler: caddy.AdminHandlerFunc(a.serve)}}
}

// adminPath is the path of the API, and the pattern for everything below it.
const adminPath = "/chat_broadcast/"

// An adminRequest is a request for an action. name is the hub, the client's id or the user that its path names, or "".
type adminRequest struct {
	*http.Request
	name  string
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

// resource returns the resource that a path names, or nil, and the name in the path.
func (a *adminAPI) resource(path []string) (res resource, name string) {
	switch {
	case len(path) == 1 && path[0] == "hubs":
		return resource{http.MethodGet: {listHubs, []string{"prefix", "after", "limit"}}}, ""
	case len(path) < 2 || path[1] == "":
		return nil, ""
	case len(path) == 2 && path[0] == "hubs":
		return resource{http.MethodGet: {listClients, []string{"after", "limit"}}, http.MethodDelete: {kickHub, nil}}, path[1]
	case len(path) == 3 && path[0] == "hubs" && path[2] == "messages":
		return resource{http.MethodGet: {a.tail, nil}, http.MethodPost: {publishBody, nil}}, path[1]
	case len(path) == 2 && path[0] == "clients":
		return resource{http.MethodDelete: {kickClient, nil}}, path[1]
	case len(path) == 2 && path[0] == "users":
		return resource{http.MethodDelete: {kickUser, nil}}, path[1]
	}
	return nil, ""
}

// serve finds the action for the request and runs it.
func (a *adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	res, name := a.resource(pathSegments(r.URL))
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
	return action.do(w, adminRequest{r, name, query})
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

// hubsPath is the path above the hubs.
const hubsPath = adminPath + "hubs/"

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

// noHub returns the error for a hub that is not open. A hub is open while it has clients and, with history, for some
// time after that.
func noHub(name string) error {
	return adminError(http.StatusNotFound, fmt.Errorf("hub %s is not open", escapedName(name)))
}

// ---- lists ----

// A hubInfo describes a hub in answers.
type hubInfo struct {
	Name             string    `json:"name"`
	Clients          int       `json:"clients"`
	Head             uint64    `json:"head"`
	RetainedMessages uint64    `json:"retained_messages"`
	RetainedBytes    int       `json:"retained_bytes"`
	Since            time.Time `json:"since"`
}

// A clientInfo describes a client in answers. Lag is how many messages its writer has yet to take from the hub.
type clientInfo struct {
	ID          string    `json:"id"`
	User        string    `json:"user"`
	ClientIP    string    `json:"client_ip"`
	Since       time.Time `json:"since"`
	Lag         uint64    `json:"lag"`
	MessagesIn  uint64    `json:"messages_in"`
	MessagesOut uint64    `json:"messages_out"`
	BytesIn     uint64    `json:"bytes_in"`
	BytesOut    uint64    `json:"bytes_out"`
}

// A hubsPage is an answer with hubs, ordered by name. Next is the value of "after" for the next page; it is empty on
// the last page. A page before the last may be short.
type hubsPage struct {
	Hubs []hubInfo `json:"hubs"`
	Next string    `json:"next,omitempty"`
}

// A clientsPage is an answer with a hub's clients, in the order in which they joined. Next is as in hubsPage.
type clientsPage struct {
	Hub     hubInfo      `json:"hub"`
	Clients []clientInfo `json:"clients"`
	Next    string       `json:"next,omitempty"`
}

// listHubs answers with a page of all hubs.
func listHubs(w http.ResponseWriter, r adminRequest) error {
	limit, err := pageLimit(r.query)
	if err != nil {
		return err
	}
	after, prefix := r.query.Get("after"), r.query.Get("prefix")
	found, more := lowest(hubs.allHubs(), limit,
		func(b *hub.Hub) bool { return b.Name() > after && strings.HasPrefix(b.Name(), prefix) },
		func(a, b *hub.Hub) int { return cmp.Compare(a.Name(), b.Name()) })
	page := hubsPage{Hubs: []hubInfo{}}
	for _, b := range found {
		if info, open := b.Info(); open {
			page.Hubs = append(page.Hubs, hubInfoOf(b, info))
		}
	}
	if more {
		page.Next = found[len(found)-1].Name()
	}
	return answerJSON(w, http.StatusOK, page)
}

// listClients answers with a hub and a page of its clients.
func listClients(w http.ResponseWriter, r adminRequest) error {
	limit, err := pageLimit(r.query)
	if err != nil {
		return err
	}
	var after feed.ClientID
	if s := r.query.Get("after"); s != "" {
		if after, err = parseClientID("after", s); err != nil {
			return err
		}
	}
	b, err := findHub(r.name)
	if err != nil {
		return err
	}
	info, open := b.Info()
	if !open {
		return noHub(b.Name())
	}
	page := clientsPage{Hub: hubInfoOf(b, info), Clients: []clientInfo{}}
	found, more := lowest(b.Clients(), limit,
		func(c *hub.Client) bool { return c.ID() > after },
		func(a, b *hub.Client) int { return cmp.Compare(a.ID(), b.ID()) })
	lags := b.Lags(found)
	for i, c := range found {
		if lags[i] >= 0 {
			page.Clients = append(page.Clients, clientInfoOf(c, uint64(lags[i])))
		}
	}
	if more {
		page.Next = found[len(found)-1].ID().String()
	}
	return answerJSON(w, http.StatusOK, page)
}

func pageLimit(query url.Values) (int, error) {
	if !query.Has("limit") {
		return defaultPage, nil
	}
	limit, err := strconv.Atoi(query.Get("limit"))
	if err != nil || limit < 1 || limit > maxPage || strconv.Itoa(limit) != query.Get("limit") {
		return 0, adminError(http.StatusBadRequest, fmt.Errorf("limit: must be 1 to %d, got %q", maxPage, query.Get("limit")))
	}
	return limit, nil
}

func parseClientID(field, id string) (feed.ClientID, error) {
	n, err := strconv.ParseUint(id, 36, 64)
	if err != nil || feed.ClientID(n).String() != id {
		return 0, adminError(http.StatusBadRequest, fmt.Errorf("%s: %q is not the id of a client", field, id))
	}
	return feed.ClientID(n), nil
}

// findHub returns the named hub.
func findHub(name string) (*hub.Hub, error) {
	if err := named("hub", checkHubName(name)); err != nil {
		return nil, adminError(http.StatusBadRequest, err)
	}
	b := hubs.hub(name)
	if b == nil {
		return nil, noHub(name)
	}
	return b, nil
}

// lowest returns the lowest elements of all for which keep returns true, in order and at most limit of them, and
// whether there are more. It works in small steps and lets other goroutines run between them. With one processor,
// sorting 100,000 clients at once would hold up messages for much longer than a lock.
func lowest[T any](all []T, limit int, keep func(T) bool, compare func(a, b T) int) (found []T, more bool) {
	const step = 4096
	for some := range slices.Chunk(all, step) {
		enough := len(found) > limit
		for _, v := range some {
			if keep(v) && (!enough || compare(v, found[limit]) < 0) {
				found = append(found, v)
			}
		}
		slices.SortFunc(found, compare)
		found = found[:min(len(found), limit+1)] // one more than limit, to know whether there are more
		runtime.Gosched()
	}
	return found[:min(len(found), limit)], len(found) > limit
}

func hubInfoOf(b *hub.Hub, i hub.Info) hubInfo {
	return hubInfo{
		Name:             b.Name(),
		Clients:          i.Clients,
		Head:             i.Head,
		RetainedMessages: i.RetainedMessages,
		RetainedBytes:    i.RetainedBytes,
		Since:            i.Opened,
	}
}

func clientInfoOf(c *hub.Client, lag uint64) clientInfo {
	t := c.Traffic()
	return clientInfo{
		ID:          c.ID().String(),
		User:        c.User(),
		ClientIP:    c.Owner().(*member).ip,
		Since:       c.Began(),
		Lag:         lag,
		MessagesIn:  t.MessagesIn,
		MessagesOut: t.MessagesOut,
		BytesIn:     t.BytesIn,
		BytesOut:    t.BytesOut,
	}
}

// ---- publishing ----

// publishBody publishes the request's body, as text unless its type says that it is binary. The body may be as large as
// a message from the hub's clients.
func publishBody(w http.ResponseWriter, r adminRequest) error {
	body := &postBody{ReadCloser: r.Body}
	published, err := publishFrom(w, r, body)
	if err != nil {
		body.discard(w, r.Request)
		return err
	}
	return answerJSON(w, http.StatusOK, published)
}

// publishFrom publishes body, or returns an error with the status of the answer.
func publishFrom(w http.ResponseWriter, r adminRequest, body *postBody) (publication, error) {
	b, err := findHub(r.name)
	if err != nil {
		return publication{}, err
	}
	if err := checkEncoding(w.Header(), r.Header); err != nil {
		return publication{}, adminError(http.StatusUnsupportedMediaType, named("body", err))
	}
	limit := b.MessageLimit()
	payload, err := io.ReadAll(http.MaxBytesReader(nil, body, int64(limit)))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return publication{}, adminError(http.StatusRequestEntityTooLarge,
			fmt.Errorf("body: is larger than %d bytes, the largest max_message_size of the hub's clients", limit))
	}
	if err != nil {
		return publication{}, adminError(http.StatusBadRequest, fmt.Errorf("body: %w", err))
	}
	opcode, err := opcodeOf(payload, r.Header.Get("Content-Type"))
	if err != nil {
		return publication{}, adminError(http.StatusBadRequest, named("body", err))
	}
	m := hub.Message{Message: feed.Message{Opcode: opcode, Payload: payload}, Source: hub.FromAdmin}
	published, found, err := hubs.publish(r.Context(), b.Name(), m)
	if err != nil {
		return publication{}, adminError(http.StatusServiceUnavailable, err)
	}
	if !found {
		return publication{}, noHub(b.Name()) // it has closed meanwhile
	}
	return publication{published.Members, published.Seq}, nil
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
// client of the hub, so it neither opens a hub nor keeps one open.
func (a *adminAPI) tail(w http.ResponseWriter, r adminRequest) error {
	if err := named("hub", checkHubName(r.name)); err != nil {
		return adminError(http.StatusBadRequest, err)
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

	t, remove := hubs.tap(r.name)
	defer remove()
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

// ---- kicking ----

// A kicking is the answer to a kick: how many clients were closed.
type kicking struct {
	Kicked int `json:"kicked"`
}

// kickClient closes the client that the path names.
func kickClient(w http.ResponseWriter, r adminRequest) error {
	id, err := parseClientID("id", r.name)
	if err != nil {
		return err
	}
	members := slices.DeleteFunc(hubs.allMembers(), func(m *member) bool { return m.client.ID() != id })
	return answerKicked(w, kick(clientsOf(members)), fmt.Errorf("client %s is not connected", id))
}

// kickUser closes the clients of a user, in all hubs.
func kickUser(w http.ResponseWriter, r adminRequest) error {
	members := slices.DeleteFunc(hubs.allMembers(), func(m *member) bool { return m.client.User() != r.name })
	return answerKicked(w, kick(clientsOf(members)), fmt.Errorf("user %s has no clients", escapedName(r.name)))
}

// kickHub closes the clients of a hub and makes it forget its history. The hub closes unless a client joins meanwhile.
// So the next hub of its name has the history that is configured then.
func kickHub(w http.ResponseWriter, r adminRequest) error {
	b, err := findHub(r.name)
	if err != nil {
		return err
	}
	history := b.HasHistory()
	b.Forget()
	kicked := kick(b.Clients())
	hubs.closeIfKept(b)
	if kicked == 0 && !history {
		return noHub(b.Name())
	}
	return answerJSON(w, http.StatusOK, kicking{kicked})
}

func clientsOf(members []*member) []*hub.Client {
	clients := make([]*hub.Client, len(members))
	for i, m := range members {
		clients[i] = &m.client
	}
	return clients
}

// answerKicked answers with how many clients were kicked, or returns a 404 with the given error if none were.
func answerKicked(w http.ResponseWriter, kicked int, none error) error {
	if kicked == 0 {
		return adminError(http.StatusNotFound, none)
	}
	return answerJSON(w, http.StatusOK, kicking{kicked})
}

// kick closes clients and returns how many of them were not closing already.
func kick(clients []*hub.Client) (kicked int) {
	for _, c := range clients {
		if c.Close(hub.CloseKicked) {
			kicked++
		}
	}
	return kicked
}

// Interface guards
var (
	_ caddy.Module      = (*adminAPI)(nil)
	_ caddy.AdminRouter = (*adminAPI)(nil)
)
