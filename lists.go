package chatbroadcast

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// defaultPage and maxPage are how many hubs or clients one answer lists. 1000 of them are at most about 300 KB.
const (
	defaultPage = 100
	maxPage     = 1000
)

// A hubInfo describes a hub in answers. In a cluster it is what all nodes have of the hub: the sum of the clients, the largest
// of the other numbers, and the earliest time.
type hubInfo struct {
	Name             string    `json:"name"`
	Clients          int       `json:"clients"`
	Head             uint64    `json:"head"`
	RetainedMessages uint64    `json:"retained_messages"`
	RetainedBytes    int       `json:"retained_bytes"`
	Since            time.Time `json:"since"`
}

// check returns an error for numbers that no node has.
func (h hubInfo) check() error {
	if h.Clients < 0 || h.RetainedBytes < 0 {
		return errNegative
	}
	return nil
}

// add adds what another node has of the same hub.
func (h hubInfo) add(other hubInfo) hubInfo {
	h.Clients += other.Clients
	h.Head = max(h.Head, other.Head)
	h.RetainedMessages = max(h.RetainedMessages, other.RetainedMessages)
	h.RetainedBytes = max(h.RetainedBytes, other.RetainedBytes)
	if other.Since.Before(h.Since) {
		h.Since = other.Since
	}
	return h
}

// A clientInfo describes a client in answers. Lag is how many messages its writer has yet to take from the hub. Node is the
// number of its node in a cluster.
type clientInfo struct {
	ID          string    `json:"id"`
	Node        uint64    `json:"node,omitempty"`
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
// the last page. A page before the last may be short. Silent are the nodes that did not answer.
type hubsPage struct {
	Hubs   []hubInfo `json:"hubs"`
	Next   string    `json:"next,omitempty"`
	Silent []string  `json:"silent,omitempty"`
}

// A clientsPage is an answer with a hub's clients, in the order in which they joined. Next and Silent are as in hubsPage.
type clientsPage struct {
	Hub     hubInfo      `json:"hub"`
	Clients []clientInfo `json:"clients"`
	Next    string       `json:"next,omitempty"`
	Silent  []string     `json:"silent,omitempty"`
}

// listHubs answers with a page of all hubs.
func (a *adminAPI) listHubs(w http.ResponseWriter, r adminRequest) error {
	limit, err := pageLimit(r.query)
	if err != nil {
		return err
	}
	after := r.query.Get("after")
	parts := []part[string, hubInfo]{hubsOf(a.registry, r.query.Get("prefix"), after, limit)}
	pages, silent := gather(r.Context(), a.others(r), r.forOthers(), func(p *hubsPage) error {
		for _, h := range p.Hubs {
			if err := h.check(); err != nil {
				return err
			}
		}
		return hubsPart(p).check(hubName, after)
	})
	for _, p := range pages {
		parts = append(parts, hubsPart(&p.body))
	}
	all := mergeParts(parts, limit, hubName, hubInfo.add)
	return answerJSON(w, http.StatusOK, hubsPage{Hubs: all.items, Next: all.next, Silent: silent})
}

// hubsOf returns the hubs of this node.
func hubsOf(r *registry, prefix, after string, limit int) part[string, hubInfo] {
	found, more := lowest(r.allHubs(), limit,
		func(b *hub.Hub) bool { return b.Name() > after && strings.HasPrefix(b.Name(), prefix) },
		func(a, b *hub.Hub) int { return cmp.Compare(a.Name(), b.Name()) })
	p := part[string, hubInfo]{items: []hubInfo{}, cut: more}
	for _, b := range found {
		if info, open := b.Info(); open {
			p.items = append(p.items, hubInfoOf(b, info))
		}
	}
	if more {
		p.next = found[len(found)-1].Name()
	}
	return p
}

func hubsPart(p *hubsPage) part[string, hubInfo] {
	return part[string, hubInfo]{items: p.Hubs, cut: p.Next != "", next: p.Next}
}

func hubName(h hubInfo) string { return h.Name }

// listClients answers with a hub and a page of its clients.
func (a *adminAPI) listClients(w http.ResponseWriter, r adminRequest) error {
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
	if err := checkHubOf(r); err != nil {
		return err
	}
	l := a.others(r)
	var infos []hubInfo
	var parts []part[feed.ClientID, clientInfo]
	if info, clients, open := clientsOfHub(a.registry, r.name, after, limit); open {
		if l != nil {
			setNode(clients.items, l.cluster.Number())
		}
		infos, parts = append(infos, info), append(parts, clients)
	}
	pages, silent := gather(r.Context(), l, r.forOthers(), func(p *clientsPage) error {
		clients, err := clientsPart(p)
		return cmp.Or(err, p.Hub.check(), clients.check(clientID, after))
	})
	for _, p := range pages {
		clients, _ := clientsPart(&p.body) // checked
		setNode(clients.items, p.node.Number)
		infos, parts = append(infos, p.body.Hub), append(parts, clients)
	}
	if len(infos) == 0 {
		return notFound(errNotOpen(r.name), silent)
	}
	page := clientsPage{Hub: infos[0], Silent: silent}
	for _, info := range infos[1:] {
		page.Hub = page.Hub.add(info)
	}
	page.Hub.Name = r.name
	all := mergeParts(parts, limit, clientID, nil)
	page.Clients = all.items
	if all.cut {
		page.Next = all.next.String()
	}
	return answerJSON(w, http.StatusOK, page)
}

// clientsOfHub returns what this node has of a hub, and whether the hub is open here.
func clientsOfHub(r *registry, name string, after feed.ClientID, limit int) (info hubInfo, clients part[feed.ClientID, clientInfo], open bool) {
	b := r.hub(name)
	if b == nil {
		return info, clients, false
	}
	i, open := b.Info()
	if !open {
		return info, clients, false
	}
	found, more := lowest(b.Clients(), limit,
		func(c *hub.Client) bool { return c.ID() > after },
		func(a, b *hub.Client) int { return cmp.Compare(a.ID(), b.ID()) })
	clients.items, clients.cut = []clientInfo{}, more
	lags := b.Lags(found)
	for i, c := range found {
		if lags[i] >= 0 {
			clients.items = append(clients.items, clientInfoOf(c, uint64(lags[i])))
		}
	}
	if more {
		clients.next = found[len(found)-1].ID()
	}
	return hubInfoOf(b, i), clients, true
}

// clientsPart returns the clients of another node's page, or an error if an id in it is none.
func clientsPart(p *clientsPage) (clients part[feed.ClientID, clientInfo], err error) {
	clients.items = p.Clients
	for _, c := range p.Clients {
		if _, err := parseClientID("id", c.ID); err != nil {
			return clients, err
		}
	}
	if p.Next == "" {
		return clients, nil
	}
	clients.cut = true
	clients.next, err = parseClientID("next", p.Next)
	return clients, err
}

// clientID returns the id of a client in an answer, which has been checked.
func clientID(c clientInfo) feed.ClientID {
	id, _ := parseClientID("id", c.ID)
	return id
}

func setNode(clients []clientInfo, number uint64) {
	for i := range clients {
		clients[i].Node = number
	}
}

// ---- parts of lists ----

// A part is what one node has of a list, in order, from where a request says. If it is cut, the list goes on behind next.
type part[K cmp.Ordered, T any] struct {
	items []T
	cut   bool
	next  K
}

// The errors in what another node has answered.
var (
	errNegative = errors.New("its answer has negative numbers")
	errDisorder = errors.New("its answer is not in order")
)

// check returns an error unless p is in order, begins after the given key, and gets ahead: otherwise whoever asks for page after
// page would never come to an end.
func (p part[K, T]) check(key func(T) K, after K) error {
	for _, item := range p.items {
		if key(item) <= after {
			return errDisorder
		}
		after = key(item)
	}
	if p.cut && (p.next < after || len(p.items) == 0 && p.next == after) {
		return errDisorder
	}
	return nil
}

// mergeParts merges what nodes have of a list, at most limit items. Items with the same key become one by add; nil keeps
// both. A part that is cut does not say what comes behind its next, so the whole ends at the lowest next.
func mergeParts[K cmp.Ordered, T any](parts []part[K, T], limit int, key func(T) K, add func(a, b T) T) part[K, T] {
	whole := part[K, T]{items: []T{}}
	for _, p := range parts {
		if p.cut && (!whole.cut || p.next < whole.next) {
			whole.cut, whole.next = true, p.next
		}
	}
	var all []T
	for _, p := range parts {
		for _, item := range p.items {
			if !whole.cut || key(item) <= whole.next {
				all = append(all, item)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b T) int { return cmp.Compare(key(a), key(b)) })
	for _, item := range all {
		last := len(whole.items) - 1
		switch {
		case add != nil && last >= 0 && key(whole.items[last]) == key(item):
			whole.items[last] = add(whole.items[last], item)
		case last+1 == limit:
			whole.cut, whole.next = true, key(whole.items[last])
			return whole
		default:
			whole.items = append(whole.items, item)
		}
	}
	return whole
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

// ---- elements of lists ----

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
