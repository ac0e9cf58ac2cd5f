package chatbroadcast

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/dustin/go-humanize/english"
)

// A kicking is the answer to a kick: how many clients were closed, and which nodes did not answer.
type kicking struct {
	Kicked int      `json:"kicked"`
	Silent []string `json:"silent,omitempty"`
}

// check returns an error for a number that no node has kicked.
func (k *kicking) check() error {
	if k.Kicked < 0 {
		return errNegative
	}
	return nil
}

// kickClient closes the client that the path names.
func (a *adminAPI) kickClient(w http.ResponseWriter, r adminRequest) error {
	id, err := parseClientID("id", r.name)
	if err != nil {
		return err
	}
	return a.kickMembers(w, r, func(m *member) bool { return m.client.ID() == id }, fmt.Errorf("client %s is not connected", id))
}

// kickUser closes the clients of a user, in all hubs.
func (a *adminAPI) kickUser(w http.ResponseWriter, r adminRequest) error {
	none := fmt.Errorf("user %s has no clients", escapedName(r.name))
	return a.kickMembers(w, r, func(m *member) bool { return m.client.User() == r.name }, none)
}

// kickMembers closes the members of all nodes that a request is about. It answers 404 with the given error if there are none.
func (a *adminAPI) kickMembers(w http.ResponseWriter, r adminRequest, concerned func(*member) bool, none error) error {
	members := slices.DeleteFunc(a.registry.allMembers(), func(m *member) bool { return !concerned(m) })
	done := kicking{Kicked: kick(clientsOf(members))}
	answers, silent := gather(r.Context(), a.others(r), r.forOthers(), (*kicking).check)
	for _, o := range answers {
		done.Kicked += o.body.Kicked
	}
	if done.Kicked == 0 {
		return notFound(none, silent)
	}
	done.Silent = silent
	return answerJSON(w, http.StatusOK, done)
}

// kickHub closes the clients of a hub and makes it forget its history. So the next hub of its name has the history that is
// configured then.
func (a *adminAPI) kickHub(w http.ResponseWriter, r adminRequest) error {
	if err := checkHubOf(r); err != nil {
		return err
	}
	l := a.registry.startedLink()
	if l == nil {
		return a.kickUnlinkedHub(w, r)
	}
	if s := servedIn(r.Context()); s != nil {
		return a.kickHubForOther(w, r, s)
	}
	return a.kickLinkedHub(w, r, l)
}

// kickUnlinkedHub kicks a hub that numbers its messages itself. It closes unless a client joins meanwhile.
func (a *adminAPI) kickUnlinkedHub(w http.ResponseWriter, r adminRequest) error {
	b := a.registry.hub(r.name)
	if b == nil {
		return adminError(http.StatusNotFound, errNotOpen(r.name))
	}
	history := b.HasHistory()
	b.Forget()
	kicked := kick(b.Clients())
	a.registry.closeIfKept(b)
	if kicked == 0 && !history {
		return adminError(http.StatusNotFound, errNotOpen(r.name))
	}
	return answerJSON(w, http.StatusOK, kicking{Kicked: kicked})
}

// kickLinkedHub kicks a hub whose messages an engine keeps.
//
// When the engine forgets the hub, a new epoch begins, and clients that are still in a hub of the old one are closed with
// hub_reset. So first all nodes kick their clients, and let nobody in meanwhile; then the engine forgets; then all nodes let
// clients in again.
func (a *adminAPI) kickLinkedHub(w http.ResponseWriter, r adminRequest, l *link) error {
	kicked, open, lift := a.kickAndBar(r)
	defer lift()
	request := r.forOthers()
	answers, silent := gather(r.Context(), l, request, (*kicking).check)
	for _, o := range answers {
		kicked += o.body.Kicked
		open = true
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), controlPatience) // what was begun ends, whoever goes
	defer cancel()
	err := l.session.Forget(ctx, r.name)
	if l.control != nil {
		l.control.finish(ctx, request.ID)
	}
	switch {
	case err != nil:
		return adminError(http.StatusServiceUnavailable,
			fmt.Errorf("%s kicked, but the engine has not forgotten the hub's messages: %w", english.Plural(kicked, "client", ""), err))
	case !open:
		return notFound(errNotOpen(r.name), silent)
	}
	return answerJSON(w, http.StatusOK, kicking{kicked, silent})
}

// kickHubForOther does the part of this node when another one kicks a hub.
func (a *adminAPI) kickHubForOther(w http.ResponseWriter, r adminRequest, s *served) error {
	kicked, open, lift := a.kickAndBar(r)
	s.after = lift
	if !open {
		return adminError(http.StatusNotFound, errNotOpen(r.name))
	}
	return answerJSON(w, http.StatusOK, kicking{Kicked: kicked})
}

// outboxPatience is how long a kick waits for messages that are on their way to the engine.
const outboxPatience = controlPatience / 2

// kickAndBar kicks the clients of a hub on this node, and lets nobody into a hub of that name until lift. It waits until
// nothing that the clients have sent is on its way to the engine any more: otherwise it would be the first message of the
// new epoch.
func (a *adminAPI) kickAndBar(r adminRequest) (kicked int, open bool, lift func()) {
	b, lift := a.registry.bar(r.name)
	if b == nil {
		return 0, false, lift
	}
	kicked = kick(b.Clients())
	for began := time.Now(); !b.IsDone() && time.Since(began) < outboxPatience; {
		time.Sleep(removalStep / 10)
	}
	return kicked, true, lift
}

func clientsOf(members []*member) []*hub.Client {
	clients := make([]*hub.Client, len(members))
	for i, m := range members {
		clients[i] = &m.client
	}
	return clients
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
