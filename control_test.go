package chatbroadcast

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"go.uber.org/zap"
)

// A clusterNode is one process of a cluster, in a test of several.
type clusterNode struct {
	*registry
	t       testing.TB
	api     *adminAPI
	lease   *lease
	session *enginetest.Session // or nil, if the engine wraps it
	members []*member
}

// newClusterNode returns a node of the cluster of an engine; nil is the engine memory. A bubble has all its goroutines.
func newClusterNode(t testing.TB, e engine.Engine) *clusterNode {
	t.Helper()
	n := newUnstartedNode(t, e)
	if l := n.lease.process.link; l != nil {
		if err := n.startLink("test", e); err != nil {
			t.Fatal(err)
		}
		n.session, _ = l.session.(*enginetest.Session)
	}
	return n
}

// newUnstartedNode returns a node whose engine is not started yet.
func newUnstartedNode(t testing.TB, e engine.Engine) *clusterNode {
	t.Helper()
	r := newRegistry()
	l := r.linkTo("test", e)
	n := &clusterNode{registry: r, t: t, api: &adminAPI{registry: r}}
	n.lease = r.lease("value", zap.NewNop(), emitter{}, processSettings{link: l}, time.Second)
	t.Cleanup(func() {
		for _, m := range n.members {
			m.abandon()
		}
		r.release(n.lease)
		r.awaitLinks(time.Now().Add(time.Minute))
		if len(r.links) > 0 {
			t.Error("the link is left behind")
		}
	})
	return n
}

// inCluster runs a test in a bubble, with as many nodes of one server.
func inCluster(t *testing.T, nodes int, test func(t *testing.T, server *enginetest.Server, nodes []*clusterNode)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		all := make([]*clusterNode, nodes)
		for i := range all {
			all[i] = newClusterNode(t, server)
		}
		synctest.Wait()
		test(t, server, all)
	})
}

// tryJoin joins a member without a connection to a hub.
func (n *clusterNode) tryJoin(ctx context.Context, name, user string, s *hub.Settings) (*member, error) {
	m := &member{scope: n.lease.scope}
	m.client.Init(n.process, m, user, netip.Prefix{}, s)
	return m, n.registry.join(ctx, m, name, limits{})
}

// enter is tryJoin for a member that must come in. It stays until the end of the test.
func (n *clusterNode) enter(name, user string, s *hub.Settings) *member {
	n.t.Helper()
	m, err := n.tryJoin(context.Background(), name, user, s)
	if err != nil {
		n.t.Fatalf("joining %s: %v", name, err)
	}
	n.members = append(n.members, m)
	return m
}

// number returns the number of the node.
func (n *clusterNode) number() uint64 { return n.lease.process.link.cluster.Number() }

// name returns how answers name the node.
func (n *clusterNode) name() string {
	return nodeName(engine.Node{Number: n.number(), Status: engine.Status{Name: hostname()}})
}

// call makes a request to the node's admin API. It decodes a good answer into answer, unless that is nil, and returns the text of
// an error.
func (n *clusterNode) call(method, path, body string, answer any) (status int, reason string) {
	n.t.Helper()
	return n.send(httptest.NewRequest(method, "/chat_broadcast"+path, strings.NewReader(body)), answer)
}

func (n *clusterNode) send(r *http.Request, answer any) (status int, reason string) {
	n.t.Helper()
	w := httptest.NewRecorder()
	r = r.WithContext(context.WithValue(r.Context(), http.ServerContextKey, new(http.Server)))
	if err := n.api.serve(w, r); err != nil {
		api, ok := errors.AsType[caddy.APIError](err)
		if !ok {
			n.t.Fatalf("%s %s: got %v, want an error with a status", r.Method, r.URL, err)
		}
		return api.HTTPStatus, api.Err.Error()
	}
	if answer != nil {
		if err := json.Unmarshal(w.Body.Bytes(), answer); err != nil {
			n.t.Fatalf("%s %s: %v: %s", r.Method, r.URL, err, w.Body)
		}
	}
	return w.Code, ""
}

// ask is call for a request that must succeed.
func (n *clusterNode) ask(method, path, body string, answer any) {
	n.t.Helper()
	if status, reason := n.call(method, path, body, answer); status != http.StatusOK {
		n.t.Fatalf("%s %s: got status %d, %s", method, path, status, reason)
	}
}

// wantCause fails unless a member has left for the given reason.
func wantCause(t testing.TB, m *member, want ws.Close) {
	t.Helper()
	if got := m.client.Cause(); got != want {
		t.Errorf("got a client that has left because of %q, want %q", got.Reason, want.Reason)
	}
}

func TestControl_ListsHubsOfAllNodes(t *testing.T) {
	inCluster(t, 3, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b, c := nodes[0], nodes[1], nodes[2]
		began := time.Now()
		a.enter("only a", "", defaults())
		a.enter("shared", "", defaults())
		time.Sleep(time.Second)
		for range 2 {
			b.enter("shared", "", historyOfTen())
			c.enter("only c", "", defaults())
		}
		synctest.Wait()
		for range 3 {
			if _, _, err := a.publish(t.Context(), "shared", textOf("hello")); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for _, n := range nodes {
			var page hubsPage
			n.ask("GET", "/hubs", "", &page)
			var got []string
			for _, h := range page.Hubs {
				got = append(got, fmt.Sprint(h.Name, " ", h.Clients, " ", h.Head, " ", h.RetainedMessages))
			}
			if want := []string{"only a 1 0 0", "only c 2 0 0", "shared 3 3 3"}; !slices.Equal(got, want) || page.Next != "" || page.Silent != nil {
				t.Errorf("got %q, next %q, silent %q, want %q", got, page.Next, page.Silent, want)
			}
			if got := page.Hubs[2].Since; !got.Equal(began) {
				t.Errorf("got a hub since %v, want %v, when the first node opened it", got, began)
			}
		}
	})
}

func TestControl_ListsClientsOfAllNodes(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		var want []string
		for i := range 10 {
			n := nodes[i%2]
			want = append(want, fmt.Sprint(n.enter("räume/1", fmt.Sprint(i), defaults()).client.ID(), " ", i, " ", n.number()))
			time.Sleep(time.Millisecond)
		}
		for _, n := range nodes {
			for _, limit := range []int{1, 3, 10, 1000} {
				var got []string
				for after, more := "", true; more; {
					var page clientsPage
					n.ask("GET", fmt.Sprintf("/hubs/r%%C3%%A4ume%%2F1?limit=%d&after=%s", limit, after), "", &page)
					if page.Hub.Name != "räume/1" || page.Hub.Clients != 10 || page.Silent != nil {
						t.Errorf("got %+v, silent %q, want ten clients", page.Hub, page.Silent)
					}
					for _, c := range page.Clients {
						got = append(got, fmt.Sprint(c.ID, " ", c.User, " ", c.Node))
					}
					after, more = page.Next, page.Next != ""
				}
				if !slices.Equal(got, want) {
					t.Errorf("limit %d: got %q, want %q", limit, got, want)
				}
			}
			if status, reason := n.call("GET", "/hubs/nowhere", "", nil); status != 404 || reason != "hub nowhere is not open" {
				t.Errorf("got %d, %s, want 404", status, reason)
			}
		}
	})
}

// TestControl_PagesCoverWhatAFlatListHas has random hubs and clients on random nodes.
func TestControl_PagesCoverWhatAFlatListHas(t *testing.T) {
	for seed := range uint64(5) {
		rng := rand.New(rand.NewPCG(seed, 0))
		inCluster(t, 1+rng.IntN(3), func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
			clients, users := map[string]int{}, map[string]string{}
			for range 60 {
				n := nodes[rng.IntN(len(nodes))]
				name := string(rune('a'+rng.IntN(5))) + strings.Repeat("x", rng.IntN(4))
				clients[name]++
				m := n.enter(name, fmt.Sprint(rng.Uint32()), defaults())
				users[m.client.ID().String()] = m.client.User()
				time.Sleep(time.Microsecond)
			}
			synctest.Wait()
			asked := nodes[rng.IntN(len(nodes))]
			gotUsers := map[string]string{}
			for _, prefix := range []string{"", "b", "cx", "none"} {
				limit := 1 + rng.IntN(12)
				query := url.Values{"limit": {fmt.Sprint(limit)}, "prefix": {prefix}}
				got, last := map[string]int{}, ""
				for more := true; more; {
					var page hubsPage
					asked.ask("GET", "/hubs?"+query.Encode(), "", &page)
					if len(page.Hubs) > limit {
						t.Errorf("got %d hubs in a page of %d", len(page.Hubs), limit)
					}
					for _, h := range page.Hubs {
						if h.Name <= last {
							t.Errorf("got %q after %q", h.Name, last)
						}
						got[h.Name], last = h.Clients, h.Name
					}
					query.Set("after", page.Next)
					more = page.Next != ""
				}
				want := map[string]int{}
				for name, n := range clients {
					if strings.HasPrefix(name, prefix) {
						want[name] = n
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("prefix %q, limit %d: got %v, want %v", prefix, limit, got, want)
				}
			}
			for name := range clients {
				for after, more := "", true; more; {
					var page clientsPage
					asked.ask("GET", fmt.Sprintf("/hubs/%s?limit=%d&after=%s", name, 1+rng.IntN(12), after), "", &page)
					for _, c := range page.Clients {
						gotUsers[c.ID] = c.User
					}
					after, more = page.Next, page.Next != ""
				}
			}
			if fmt.Sprint(gotUsers) != fmt.Sprint(users) {
				t.Errorf("got clients %v, want %v", gotUsers, users)
			}
		})
	}
}

// TestMergeParts_EqualsTheFlatList cuts the lists of some nodes in pages, in which items may be missing that have just gone.
func TestMergeParts_EqualsTheFlatList(t *testing.T) {
	type item struct{ key, count int }
	key := func(i item) int { return i.key }
	add := func(a, b item) item { return item{a.key, a.count + b.count} }
	for range 2000 {
		lists, want := make([][]item, 1+rand.IntN(4)), map[int]int{}
		gone := map[[2]int]bool{}
		for i := range lists {
			for k := range 30 {
				switch rand.IntN(4) {
				case 0, 1:
				case 2:
					lists[i] = append(lists[i], item{k, 1})
					want[k]++
				case 3:
					lists[i] = append(lists[i], item{k, 1})
					gone[[2]int{i, k}] = true
				}
			}
		}
		limit, after, got := 1+rand.IntN(10), -1, map[int]int{}
		for pages := 0; ; pages++ {
			var parts []part[int, item]
			for i, list := range lists {
				some, more := lowest(list, limit, func(v item) bool { return v.key > after }, func(a, b item) int { return cmp.Compare(a.key, b.key) })
				p := part[int, item]{cut: more}
				if more {
					p.next = some[len(some)-1].key
				}
				p.items = slices.DeleteFunc(slices.Clone(some), func(v item) bool { return gone[[2]int{i, v.key}] })
				if err := p.check(key, after); err != nil {
					t.Fatalf("%+v after %d: %v", p, after, err)
				}
				parts = append(parts, p)
			}
			whole := mergeParts(parts, limit, key, add)
			if err := whole.check(key, after); err != nil || len(whole.items) > limit || pages > 30*len(lists) {
				t.Fatalf("%+v after %d: got %+v, %v", parts, after, whole, err)
			}
			for _, v := range whole.items {
				got[v.key] += v.count
			}
			if !whole.cut {
				break
			}
			after = whole.next
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("limit %d: got %v, want %v", limit, got, want)
		}
	}
}

func TestControl_KicksOnAllNodes(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		here, there := a.enter("x", "ada", defaults()), b.enter("x", "ada", defaults())
		other, elsewhere := a.enter("x", "bob", defaults()), b.enter("y", "ada", defaults())
		single := b.enter("x", "eve", defaults())

		var got kicking
		a.ask("DELETE", "/users/ada", "", &got)
		if got.Kicked != 3 || got.Silent != nil {
			t.Errorf("got %+v, want three clients kicked", got)
		}
		for _, m := range []*member{here, there, elsewhere} {
			wantCause(t, m, hub.CloseKicked)
		}
		if status, reason := a.call("DELETE", "/users/ada", "", nil); status != 404 || reason != "user ada has no clients" {
			t.Errorf("got %d, %s, want 404", status, reason)
		}

		a.ask("DELETE", "/clients/"+single.client.ID().String(), "", &got)
		if got.Kicked != 1 {
			t.Errorf("got %+v, want one client kicked", got)
		}
		wantCause(t, single, hub.CloseKicked)
		if status, _ := a.call("DELETE", "/clients/"+single.client.ID().String(), "", nil); status != 404 {
			t.Errorf("got %d, want 404", status)
		}
		wantCause(t, other, ws.Close{})
	})
}

// TestControl_SilentNodeIsNamed has a node that gets nothing, and then one that is killed.
func TestControl_SilentNodeIsNamed(t *testing.T) {
	inCluster(t, 3, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b, c := nodes[0], nodes[1], nodes[2]
		a.enter("x", "ada", defaults())
		b.enter("x", "ada", defaults())
		c.enter("x", "ada", defaults())
		b.enter("b", "bob", defaults())
		synctest.Wait()
		release := b.session.HoldPushes()
		began := time.Now()

		var list hubsPage
		a.ask("GET", "/hubs", "", &list)
		if len(list.Hubs) != 1 || list.Hubs[0].Clients != 2 || !slices.Equal(list.Silent, []string{b.name()}) {
			t.Errorf("got %+v, want two clients, and %s silent", list, b.name())
		}
		if took := time.Since(began); took != controlPatience {
			t.Errorf("took %v, want %v", took, controlPatience)
		}
		var clients clientsPage
		a.ask("GET", "/hubs/x", "", &clients)
		if clients.Hub.Clients != 2 || len(clients.Clients) != 2 || !slices.Equal(clients.Silent, []string{b.name()}) {
			t.Errorf("got %+v, want two clients, and %s silent", clients, b.name())
		}
		var kicked kicking
		a.ask("DELETE", "/users/ada", "", &kicked)
		if kicked.Kicked != 2 || !slices.Equal(kicked.Silent, []string{b.name()}) {
			t.Errorf("got %+v, want two clients kicked, and %s silent", kicked, b.name())
		}
		for _, tc := range []struct{ method, path, want string }{
			{"GET", "/hubs/b", "hub b is not open on the nodes that answered; these did not: " + b.name()},
			{"DELETE", "/hubs/b", "hub b is not open on the nodes that answered; these did not: " + b.name()},
			{"DELETE", "/users/bob", "user bob has no clients on the nodes that answered; these did not: " + b.name()},
			{"DELETE", "/clients/abc", "client abc is not connected on the nodes that answered; these did not: " + b.name()},
			{"POST", "/hubs/b/messages", "hub b is not open on the nodes that answered; these did not: " + b.name()},
		} {
			if status, reason := a.call(tc.method, tc.path, "", nil); status != 503 || reason != tc.want {
				t.Errorf("%s %s: got %d, %s, want 503, %s", tc.method, tc.path, status, reason, tc.want)
			}
		}
		release()
		synctest.Wait()
		list = hubsPage{}
		if a.ask("GET", "/hubs", "", &list); list.Silent != nil {
			t.Errorf("got %q silent when it gets everything again", list.Silent)
		}

		b.session.Kill()
		list = hubsPage{}
		if a.ask("GET", "/hubs", "", &list); !slices.Equal(list.Silent, []string{b.name()}) {
			t.Errorf("got %q silent, want the node that was killed", list.Silent)
		}
		time.Sleep(engine.Lease + engine.RenewInterval)
		list = hubsPage{}
		if a.ask("GET", "/hubs", "", &list); list.Silent != nil {
			t.Errorf("got %q silent, want the dead node forgotten", list.Silent)
		}
	})
}

func TestControl_EngineDown(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		ada := a.enter("x", "ada", defaults())
		b.enter("x", "bob", defaults())
		eve := a.enter("y", "eve", historyOfTen())
		synctest.Wait()
		server.Down(errors.New("no route"))
		synctest.Wait()
		silent := []string{"all other nodes: no route"}

		var list hubsPage
		a.ask("GET", "/hubs", "", &list)
		if len(list.Hubs) != 2 || list.Hubs[0].Clients != 1 || !slices.Equal(list.Silent, silent) {
			t.Errorf("got %+v, want what the node has, and %q", list, silent)
		}
		var clients clientsPage
		a.ask("GET", "/hubs/x", "", &clients)
		if len(clients.Clients) != 1 || clients.Clients[0].Node != a.number() || !slices.Equal(clients.Silent, silent) {
			t.Errorf("got %+v, want what the node has, and %q", clients, silent)
		}
		var kicked kicking
		a.ask("DELETE", "/users/ada", "", &kicked)
		if kicked.Kicked != 1 || !slices.Equal(kicked.Silent, silent) {
			t.Errorf("got %+v, want one client kicked, and %q", kicked, silent)
		}
		wantCause(t, ada, hub.CloseKicked)
		if status, reason := a.call("DELETE", "/users/bob", "", nil); status != 503 || !strings.Contains(reason, "no route") {
			t.Errorf("got %d, %s, want 503 and the reason", status, reason)
		}
		status, reason := a.call("DELETE", "/hubs/y", "", nil)
		if want := "1 client kicked, but the engine has not forgotten the hub's messages: "; status != 503 || !strings.HasPrefix(reason, want) {
			t.Errorf("got %d, %s, want 503, %s", status, reason, want)
		}
		wantCause(t, eve, hub.CloseKicked)
		if status, reason := a.call("POST", "/hubs/elsewhere/messages", "hello", nil); status != 503 || !strings.Contains(reason, "no route") {
			t.Errorf("got %d, %s, want 503 and the reason", status, reason)
		}
		if status, reason := a.call("GET", "/hubs/x/messages", "", nil); status != 503 || !strings.Contains(reason, "no route") {
			t.Errorf("a tail: got %d, %s, want 503 and the reason", status, reason)
		}
		if took := time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)); took > 2*controlPatience {
			t.Errorf("all that took %v, though the node knows at once", took)
		}
		server.Up()
		synctest.Wait()
		list = hubsPage{}
		if a.ask("GET", "/hubs/x", "", &clients); clients.Hub.Clients != 1 || list.Silent != nil {
			t.Errorf("got %+v when the engine is back", clients)
		}
	})
}

// TestControl_PublishesInAHubElsewhere has a hub on other nodes only.
func TestControl_PublishesInAHubElsewhere(t *testing.T) {
	inCluster(t, 3, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b, c := nodes[0], nodes[1], nodes[2]
		b.enter("x", "", defaults())
		large := defaults()
		large.MaxMessageSize = 10
		c.enter("small", "", large)
		for range 2 {
			c.enter("x", "", defaults())
		}
		time.Sleep(2 * time.Second) // the nodes have told each other how many clients they have
		tap, remove := c.tap("x")
		defer remove()
		for i, contentType := range []string{"", "application/octet-stream"} {
			r := httptest.NewRequest("POST", "/chat_broadcast/hubs/x/messages", strings.NewReader("hello"))
			r.Header.Set("Content-Type", contentType)
			var got publication
			if status, reason := a.send(r, &got); status != 200 {
				t.Fatalf("got %d, %s", status, reason)
			}
			if want := (publication{Clients: 3, Seq: uint64(i + 1)}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		}
		synctest.Wait()
		messages, _ := tap.Take()
		if len(messages) != 2 || messages[0].Binary || !messages[1].Binary || string(messages[0].Payload) != "hello" {
			t.Errorf("got %+v, want each message once, a text and a binary one", messages)
		}
		if a.hub("x") != nil {
			t.Error("the hub has been opened where nobody needs it")
		}
		for _, tc := range []struct {
			path, body string
			status     int
			want       string
		}{
			{"/hubs/nowhere/messages", "hello", 404, "hub nowhere is not open"},
			{"/hubs/x/messages", "bad \xff", 400, "body: the message is not valid UTF-8"},
			{"/hubs/small/messages", strings.Repeat("x", 11), 413, "body: is larger than 10 bytes, the largest max_message_size"},
			{"/hubs/x/messages", strings.Repeat("x", maxControlBody+1), 413, "body: is larger than 1048576 bytes, which is as much as nodes pass"},
			{"/hubs/x/messages", strings.Repeat("x", maxControlBody), 413, "body: is larger than 65536 bytes, the largest max_message_size"},
		} {
			if status, reason := a.call("POST", tc.path, tc.body, nil); status != tc.status || !strings.HasPrefix(reason, tc.want) {
				t.Errorf("%s: got %d, %s, want %d, %s", tc.path, status, reason, tc.status, tc.want)
			}
		}
		r := httptest.NewRequest("POST", "/chat_broadcast/hubs/x/messages", strings.NewReader("hello"))
		r.Header.Set("Content-Encoding", "gzip")
		if status, reason := a.send(r, nil); status != 415 {
			t.Errorf("got %d, %s, want 415", status, reason)
		}
	})
}

// A stranger is a session of the cluster that is no node with an admin API: it hears what the nodes say, and says anything.
type stranger struct {
	*enginetest.Session
	answer func(e controlEntry) // or nil

	mu    sync.Mutex
	heard []controlEntry
}

// newStranger returns a stranger that answers the requests of nodes with answer.
func newStranger(t *testing.T, server *enginetest.Server, answer func(s *stranger, e controlEntry)) *stranger {
	t.Helper()
	s := &stranger{Session: server.Session()}
	if answer != nil {
		s.answer = func(e controlEntry) { answer(s, e) }
	}
	if _, err := s.Open(t.Context(), controlHub, controlBounds, s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// Entries implements engine.Receiver.
func (s *stranger) Entries(_ string, _ uint64, entries []engine.Entry) {
	for _, entry := range entries {
		e, ok := parseControl(entry.Data)
		if !ok || e.From == s.ID() {
			continue
		}
		s.mu.Lock()
		s.heard = append(s.heard, e)
		s.mu.Unlock()
		if s.answer != nil && e.Method != "" && (e.To == "" || e.To == s.ID()) {
			s.answer(e)
		}
	}
}

// Users implements engine.Receiver.
func (s *stranger) Users(uint64, engine.NodeID, []engine.UserCount) {}

// say publishes an entry, as its own unless it says otherwise.
func (s *stranger) say(e controlEntry) {
	e.From = cmp.Or(e.From, s.ID())
	data, err := e.encode()
	if err == nil {
		s.sayRaw(data)
	}
}

func (s *stranger) sayRaw(data []byte) {
	_, _ = s.Publish(context.Background(), controlHub, engine.Batch{Bounds: controlBounds, Messages: []engine.Message{{Data: data}}})
}

// reply answers a request.
func (s *stranger) reply(e controlEntry, status int, body string) {
	s.say(controlEntry{ID: e.ID, Status: status, body: []byte(body)})
}

// TestControl_NodeThatDoesNotPublish has a node say that it has a hub, and then do nothing, or nonsense.
func TestControl_NodeThatDoesNotPublish(t *testing.T) {
	for _, tc := range []struct {
		name   string
		post   func(s *stranger, e controlEntry)
		status int
		want   string
	}{
		{"silent", func(*stranger, controlEntry) {}, 504, "node  (2) did not answer: it may have published the message"},
		{"nonsense", func(s *stranger, e controlEntry) { s.reply(e, 200, "{") }, 502, "node  (2): its answer: "},
		{"negative", func(s *stranger, e controlEntry) { s.reply(e, 200, `{"clients":-1}`) }, 502, "node  (2): its answer has negative numbers"},
		{"no text", func(s *stranger, e controlEntry) { s.reply(e, 418, `{`) }, 418, "status 418"},
		{"gone", func(s *stranger, e controlEntry) { s.reply(e, 404, `{"error":"hub x is not open"}`) }, 404, "hub x is not open"},
		{"redirect", func(s *stranger, e controlEntry) { s.reply(e, 302, ``) }, 502, "node  (2): status 302"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inCluster(t, 1, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
				newStranger(t, server, func(s *stranger, e controlEntry) {
					if e.Method == http.MethodPost {
						tc.post(s, e)
						return
					}
					s.reply(e, 200, `{"hub":{"clients":1}}`)
				})
				status, reason := nodes[0].call("POST", "/hubs/x/messages", "hello", nil)
				if status != tc.status || !strings.HasPrefix(reason, tc.want) {
					t.Errorf("got %d, %s, want %d, %s", status, reason, tc.status, tc.want)
				}
			})
		})
	}
}

// TestControl_AnswersThatMakeNoSense has a node answer lists with nonsense.
func TestControl_AnswersThatMakeNoSense(t *testing.T) {
	for _, tc := range []struct{ path, reply, want string }{
		{"/hubs", `{`, "its answer: unexpected end of JSON input"},
		{"/hubs", `{"hubs":[{"name":"b"},{"name":"a"}]}`, "its answer is not in order"},
		{"/hubs", `{"hubs":[{"name":"a"},{"name":"a"}]}`, "its answer is not in order"},
		{"/hubs", `{"hubs":[{"name":""}]}`, "its answer is not in order"},
		{"/hubs", `{"hubs":[{"name":"b"}],"next":"a"}`, "its answer is not in order"},
		{"/hubs?after=m", `{"hubs":[],"next":"m"}`, "its answer is not in order"},
		{"/hubs?after=m", `{"hubs":[],"next":"a"}`, "its answer is not in order"},
		{"/hubs", `{"hubs":[{"name":"a","clients":-1}]}`, "its answer has negative numbers"},
		{"/hubs", `{"hubs":[{"name":"a","head":-1}]}`, "its answer: "},
		{"/hubs/x", `{"hub":{"clients":1},"clients":[{"id":"A"}]}`, `id: "A" is not the id of a client`},
		{"/hubs/x", `{"hub":{"clients":1},"clients":[{"id":"2"},{"id":"1"}]}`, "its answer is not in order"},
		{"/hubs/x", `{"hub":{"clients":1},"clients":[],"next":"?"}`, `next: "?" is not the id of a client`},
		{"/hubs/x", `{"hub":{"clients":-1}}`, "its answer has negative numbers"},
	} {
		inCluster(t, 1, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
			nodes[0].enter("x", "", defaults())
			newStranger(t, server, func(s *stranger, e controlEntry) { s.reply(e, 200, tc.reply) })
			var got struct {
				Hubs    []hubInfo
				Hub     hubInfo
				Silent  []string
				Clients []clientInfo
			}
			nodes[0].ask("GET", tc.path, "", &got)
			if len(got.Silent) != 1 || !strings.HasPrefix(got.Silent[0], " (2): "+tc.want) {
				t.Errorf("%s: got %q silent, want %q", tc.reply, got.Silent, tc.want)
			}
			if n := len(got.Hubs) + len(got.Clients); n != 1 {
				t.Errorf("%s: got %d hubs and clients, want the node's own", tc.reply, n)
			}
		})
	}
}

// TestControl_SurvivesJunk has somebody who can write to the engine say all sorts of things.
func TestControl_SurvivesJunk(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		m := a.enter("x", "ada", defaults())
		s := newStranger(t, server, nil)
		rng := rand.New(rand.NewPCG(1, 2))
		good := controlEntry{ID: "1", From: s.ID(), Method: "GET", Path: hubPath("x"), Query: "limit=1"}
		data, err := good.encode()
		if err != nil {
			t.Fatal(err)
		}
		for range 2000 {
			bad := slices.Clone(data)
			for range 1 + rng.IntN(5) {
				bad[rng.IntN(len(bad))] = byte(rng.Uint32())
			}
			s.sayRaw(bad[:rng.IntN(len(bad)+1)])
		}
		for _, raw := range []string{
			"", "\n", "{}\n", "null\n", "[]\n", `{"id":1}` + "\n", `{"id":"1","from":"2","status":1e9}` + "\n", "{" + strings.Repeat(`"a":{`, 10_000) + "\n",
			strings.Repeat("x", 3<<20), strings.Repeat("\n", 3<<20),
		} {
			s.sayRaw([]byte(raw))
		}
		for i, e := range []controlEntry{
			{Method: "GET", Path: "/config/"},
			{Method: "GET", Path: "//evil/chat_broadcast/hubs"},
			{Method: "GET", Path: "/chat_broadcast/hubs/%zz"},
			{Method: "GET", Path: "/chat_broadcast/hubs/\x00"},
			{Method: "GET", Path: "/chat_broadcast/hubs", Query: "limit=%zz;"},
			{Method: "G T", Path: "/chat_broadcast/hubs"},
			{Method: "GET", Path: hubPath("x") + "/messages"},
			{Method: "GET", Path: nodesPath},
			{Method: "POST", Path: hubPath("x") + "/messages", body: []byte{0xff}},
			{Method: "DELETE", Path: "/chat_broadcast/clients/?"},
			{Method: "DELETE", Path: "/chat_broadcast/../hubs/x"},
			{Status: 200, body: []byte("{")},
			{Status: -1},
			{Done: true},
			{From: b.session.ID(), Status: 200, body: []byte("{")},
			{From: a.session.ID(), Method: "DELETE", Path: hubPath("x")},
		} {
			e.ID = fmt.Sprint(i)
			s.say(e)
			synctest.Wait()
		}
		// It may have kicked the client, because whoever can write to the engine may: but not by chance.
		wantCause(t, m, ws.Close{})
		s.mu.Lock()
		replies := map[string]int{}
		for _, e := range s.heard {
			if e.From == a.session.ID() {
				replies[e.ID] = e.Status
			}
		}
		s.mu.Unlock()
		for id, want := range map[string]int{"0": 400, "1": 400, "2": 400, "3": 400, "4": 400, "5": 400, "6": 405, "7": 404, "8": 400, "9": 404, "10": 404} {
			if got := replies[id]; got != want {
				t.Errorf("request %s: got status %d, want %d", id, got, want)
			}
		}
		_ = s.Close()
		synctest.Wait()
		var page hubsPage
		if b.ask("GET", "/hubs", "", &page); len(page.Hubs) != 1 || page.Silent != nil {
			t.Errorf("got %+v after all that", page)
		}
	})
}

// TestControl_RepliesOfOthersDoNotCount has a stranger reply in the name of nodes that are not asked, and twice.
func TestControl_RepliesOfOthersDoNotCount(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		nodes[1].enter("x", "", defaults())
		newStranger(t, server, func(s *stranger, e controlEntry) {
			for range 100 {
				s.say(controlEntry{ID: e.ID, From: "nobody", Status: 200, body: []byte(`{"kicked":1}`)})
				s.say(controlEntry{ID: e.ID, From: e.From, Status: 200, body: []byte(`{"kicked":1}`)})
				s.say(controlEntry{ID: e.ID + "?", Status: 200, body: []byte(`{"kicked":1}`)})
				s.reply(e, 404, "")
			}
		})
		var got kicking
		nodes[0].ask("DELETE", "/hubs/x", "", &got)
		if got.Kicked != 1 || got.Silent != nil {
			t.Errorf("got %+v, want the one client of the other node kicked", got)
		}
	})
}

// TestControl_ServesAFewAtOnce has a node get more requests than it serves, while it cannot reply.
func TestControl_ServesAFewAtOnce(t *testing.T) {
	inCluster(t, 1, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a := nodes[0]
		s := newStranger(t, server, nil)
		release := a.session.HoldPushes()
		for i := range 5 * maxServed {
			s.say(controlEntry{ID: fmt.Sprint(i), Method: "DELETE", Path: hubPath("x")})
		}
		held := server.HoldPublish()
		release()
		synctest.Wait()
		c := a.lease.process.link.control
		serving := func() int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.served)
		}
		if got := serving(); got != maxServed {
			t.Errorf("got %d requests served at once, want %d", got, maxServed)
		}
		held()
		time.Sleep(afterPatience + controlPatience)
		if got := serving(); got != 0 {
			t.Errorf("got %d requests that are left", got)
		}
		if a.registry.named["x"] != nil {
			t.Error("the hub is still barred")
		}
	})
}

// TestControl_ServesARequestOnce has the engine pass a request on twice.
func TestControl_ServesARequestOnce(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		a.enter("x", "", historyOfTen())
		request := controlEntry{
			ID: "1", From: b.session.ID(), To: a.session.ID(), Method: "POST", Path: hubPath("x") + "/messages", body: []byte("hello"),
		}
		data, err := request.encode()
		if err != nil {
			t.Fatal(err)
		}
		c := a.lease.process.link.control
		now, err := b.session.Read(t.Context(), controlHub, engine.Position{})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			c.Entries(now.Epoch, now.Seq+10, []engine.Entry{{Data: data}})
			synctest.Wait()
		}
		if info, _ := a.hub("x").Info(); info.Head != 1 {
			t.Errorf("got %d messages, want one", info.Head)
		}
	})
}

// TestControl_NodeOfAnotherClusterIsSilent has a node that has moved to another engine, and still has a session of this one.
func TestControl_NodeOfAnotherClusterIsSilent(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		m := b.enter("x", "ada", defaults())
		l := b.current.Swap(nil)
		if status, reason := a.call("DELETE", "/users/ada", "", nil); status != 503 || !strings.Contains(reason, b.name()) {
			t.Errorf("got %d, %s, want 503 and the node", status, reason)
		}
		wantCause(t, m, ws.Close{})
		b.current.Store(l)
	})
}

// TestControl_PanicEndsNothing has an action panic for another node.
func TestControl_PanicEndsNothing(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		b.lease.process.link.control.api = &adminAPI{} // without a registry every action panics
		var page hubsPage
		a.ask("GET", "/hubs", "", &page)
		if want := []string{b.name() + ": status 500"}; !slices.Equal(page.Silent, want) {
			t.Errorf("got %q silent, want %q", page.Silent, want)
		}
		if b.enter("x", "", defaults()); b.hub("x") == nil {
			t.Error("the node does not go on")
		}
	})
}

// TestControl_HugeAnswerIsAnError has a node whose page is larger than what nodes pass each other.
func TestControl_HugeAnswerIsAnError(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		for i := range 600 {
			b.enter("x", fmt.Sprint(i, strings.Repeat("\u202e", 330)), defaults())
		}
		var page clientsPage
		if status, reason := a.call("GET", "/hubs/x?limit=1000", "", nil); status != 503 || !strings.Contains(reason, "ask for fewer with limit") {
			t.Errorf("got %d, %s, want 503 and what to do", status, reason)
		}
		if a.ask("GET", "/hubs/x?limit=100", "", &page); len(page.Clients) != 100 || page.Silent != nil {
			t.Errorf("got %d clients, silent %q, want a page", len(page.Clients), page.Silent)
		}
	})
}

// TestControl_RequestThatIsTooLong asks for hubs with a prefix that no hub can have.
func TestControl_RequestThatIsTooLong(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		var page hubsPage
		nodes[0].ask("GET", "/hubs?prefix="+strings.Repeat("x", maxControlHead), "", &page)
		if want := []string{"all other nodes: the request is too long for them"}; !slices.Equal(page.Silent, want) {
			t.Errorf("got %q silent, want %q", page.Silent, want)
		}
	})
}

// TestControl_LeavesWithTheLink ends a node politely while others ask it.
func TestControl_LeavesWithTheLink(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		third := newClusterNode(t, server)
		synctest.Wait()
		third.enter("x", "", defaults())
		synctest.Wait()
		l := third.lease.process.link
		s := newStranger(t, server, nil)
		s.say(controlEntry{ID: "1", Method: "DELETE", Path: hubPath("x")}) // holds its bar until it is told
		synctest.Wait()
		if third.registry.named["x"] == nil {
			t.Fatal("the hub is not barred")
		}
		_ = s.Close()
		for _, m := range third.members {
			m.abandon()
		}
		third.members = nil
		third.release(third.lease)
		third.awaitLinks(time.Now().Add(time.Second))
		select {
		case <-l.control.ended.Done():
		default:
			t.Fatal("the controller has not ended")
		}
		if third.registry.named["x"] != nil {
			t.Error("the hub is still barred")
		}
		var page hubsPage
		if nodes[0].ask("GET", "/hubs", "", &page); page.Silent != nil {
			t.Errorf("got %q silent, want the node gone", page.Silent)
		}
	})
}

// FuzzParseControl checks that entries come through, and that junk does no harm.
func FuzzParseControl(f *testing.F) {
	e := controlEntry{ID: "1", From: "2", Method: "GET", Path: hubPath("x"), body: []byte("body\n")}
	data, err := e.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, ok := parseControl(data)
		if !ok {
			return
		}
		again, err := e.encode()
		if err != nil {
			return // JSON has more bytes in the canonical form
		}
		got, ok := parseControl(again)
		if !ok || !bytes.Equal(got.body, e.body) {
			t.Fatalf("%q: got %+v, want %+v", data, got, e)
		}
	})
}

// TestControl_OverRedis has two Caddys, each in a process of its own, share hubs.
func TestControl_OverRedis(t *testing.T) {
	redis := startRedis(t)
	site := "http://localhost {\n\tchat_broadcast {\n\t\thub {header.X-Hub}\n\t\tuser {header.X-User}\n\t\thistory 10\n\t}\n}"
	a, b := startProcess(t, withEngine(redis.engine()), site), startProcess(t, withEngine(redis.engine()), site)
	run := func(p *process, args ...string) string {
		t.Helper()
		return chat(t, "", append(args, "--address", p.admin)...)
	}
	enter := func(p *process, hub, user string) *peer {
		t.Helper()
		conn, err := net.Dial("tcp", p.http)
		if err != nil {
			t.Fatal(err)
		}
		return joinOn(t, conn, "localhost", "/", "X-Hub: "+hub+"\r\n", "X-User: "+user+"\r\n")
	}
	ada, bob, eve := enter(a, "lobby", "ada"), enter(b, "lobby", "bob"), enter(b, "attic", "eve")
	eventually(t, "both nodes", func() bool { return len(columns(run(a, "nodes"))) == 5 })

	for _, p := range []*process{a, b} {
		rows := columns(run(p, "clients", "lobby"))
		if len(rows) != 3 || rows[1][1] != "ada" || rows[2][1] != "bob" || rows[1][len(rows[1])-1] == rows[2][len(rows[2])-1] {
			t.Errorf("got %q, want a client of each node", rows)
		}
	}
	run(a, "send", "attic", "hello")
	eve.wantText("hello")
	if got := run(a, "kick", "--user", "eve"); got != "kicked 1 client\n" {
		t.Errorf("got %q", got)
	}
	eve.wantClose(1008, "kicked")
	run(b, "send", "lobby", "regretted")
	ada.wantText("regretted")
	bob.wantText("regretted")
	if got := run(b, "kick", "--hub", "lobby"); got != "kicked 2 clients\n" {
		t.Errorf("got %q", got)
	}
	ada.wantClose(1008, "kicked")
	bob.wantClose(1008, "kicked")
	for _, p := range []*process{a, b} {
		again := enter(p, "lobby", "ada") // has no history to get
		run(a, "send", "lobby", "new")
		again.wantText("new")
		again.conn.Close()
		run(a, "kick", "--hub", "lobby")
	}
}
