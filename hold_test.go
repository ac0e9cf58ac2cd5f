package chatbroadcast

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
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
)

// A tailing is the answer to a request that follows a hub.
type tailing struct {
	header http.Header
	stop   func() // ends the request, and waits for that

	mu     sync.Mutex
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (f *tailing) Header() http.Header { return f.header }

// WriteHeader implements http.ResponseWriter.
func (f *tailing) WriteHeader(status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status = status
}

// Write implements http.ResponseWriter.
func (f *tailing) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.body.Write(p)
}

// FlushError is what http.ResponseController looks for.
func (f *tailing) FlushError() error { return nil }

// texts returns the messages that were shown, and forgets them.
func (f *tailing) texts() string {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	var texts []string
	for line := range strings.Lines(f.body.String()) {
		_, text, _ := strings.Cut(line, `"data":"`)
		texts = append(texts, strings.TrimSuffix(text, "\"}\n"))
	}
	f.body.Reset()
	return strings.Join(texts, " ")
}

// tail follows a hub until stop, which the test must call.
func (n *clusterNode) tail(name string) *tailing {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), http.ServerContextKey, new(http.Server)))
	f, ended := &tailing{header: http.Header{}}, make(chan struct{})
	f.stop = func() {
		cancel()
		<-ended
		synctest.Wait()
	}
	r := httptest.NewRequest("GET", "/chat_broadcast/hubs/"+name+"/messages", nil).WithContext(ctx)
	go func() { // ends with stop
		defer close(ended)
		if api, ok := errors.AsType[caddy.APIError](n.api.serve(f, r)); ok {
			f.WriteHeader(api.HTTPStatus)
		}
	}()
	synctest.Wait()
	return f
}

// publishText publishes a message, which must work.
func (n *clusterNode) publishText(name, text string) {
	n.t.Helper()
	if _, found, err := n.publish(context.Background(), name, textOf(text)); !found || err != nil {
		n.t.Fatalf("publishing in %s: found %v, %v", name, found, err)
	}
}

// TestTail_ShowsMessagesOfOtherNodes follows a hub that only another node has.
func TestTail_ShowsMessagesOfOtherNodes(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		b.enter("x", "", historyOfTen())
		b.publishText("x", "before")
		f, second := a.tail("x"), a.tail("x")
		b.publishText("x", "one")
		b.publishText("x", "two")
		if got := f.texts(); got != "one two" {
			t.Errorf("got %q, want the two messages from now on", got)
		}
		if info, _ := a.hub("x").Info(); info.Clients != 0 {
			t.Errorf("got %d clients, want a tail to be none", info.Clients)
		}
		time.Sleep(2 * time.Minute) // longer than hubs without clients are kept
		f.stop()
		b.publishText("x", "three")
		if got := second.texts(); got != "one two three" {
			t.Errorf("got %q, want the other tail to go on", got)
		}
		second.stop()
		if a.hub("x") != nil {
			t.Error("the hub is open though nobody follows it")
		}
	})
}

// TestTail_DoesNotShortenTheHistory follows a hub with a long history.
func TestTail_DoesNotShortenTheHistory(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		const messages = 600 // more than the engine keeps of a hub without history
		long := defaults()
		long.HistoryMessages, long.HistoryAge, long.BufferBytes = 1000, time.Hour, 8<<20
		a, b := nodes[0], nodes[1]
		b.enter("x", "", long)
		for i := range messages {
			b.publishText("x", fmt.Sprint(i))
		}
		synctest.Wait()
		time.Sleep(10 * time.Minute) // longer than it keeps them
		f := a.tail("x")
		defer f.stop()
		time.Sleep(2 * engine.RenewInterval)
		s, err := a.session.Read(t.Context(), "x", engine.Position{})
		if err != nil || len(s.Entries) != messages {
			t.Errorf("got %d messages, %v, want %d", len(s.Entries), err, messages)
		}
		if got, want := a.hub("x").Known().Bounds, b.hub("x").Known().Bounds; got != want {
			t.Errorf("got bounds %+v, want %+v", got, want)
		}
	})
}

// TestTail_ClientWithHistoryGetsIt has a client join a hub that a tail has opened without history.
func TestTail_ClientWithHistoryGetsIt(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		f := a.tail("x")
		b.enter("x", "", historyOfTen())
		b.publishText("x", "one")
		synctest.Wait()
		m := a.enter("x", "", historyOfTen())
		if got := a.hub("x").Lags([]*hub.Client{&m.client})[0]; got != 1 {
			t.Errorf("got %d messages for the client, want the one of the history", got)
		}
		synctest.Wait()
		b.publishText("x", "two")
		if got := f.texts(); got != "one two" {
			t.Errorf("got %q, want the tail to go on in the new hub", got)
		}
		m.abandon()
		a.members = nil
		f.stop()
		if a.hub("x") == nil {
			t.Error("the hub is gone, though it is kept for its history")
		}
	})
}

// TestTail_GoesOnAfterAKick follows a hub that is kicked.
func TestTail_GoesOnAfterAKick(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		f := a.tail("x")
		defer f.stop()
		b.enter("x", "", historyOfTen())
		b.publishText("x", "one")
		var got kicking
		if b.ask("DELETE", "/hubs/x", "", &got); got.Kicked != 1 || got.Silent != nil {
			t.Errorf("got %+v, want one client kicked", got)
		}
		time.Sleep(time.Second)
		b.enter("x", "", historyOfTen())
		b.publishText("x", "two")
		if got := f.texts(); got != "one two" {
			t.Errorf("got %q, want one two", got)
		}
		server.NewEpoch("x") // the engine has lost something
		b.lease.process.link.renewSoon()
		a.lease.process.link.renewSoon()
		time.Sleep(time.Second)
		b.enter("x", "", historyOfTen())
		b.publishText("x", "three")
		if got := f.texts(); got != "three" {
			t.Errorf("got %q, want three", got)
		}
	})
}

// TestTail_GoesOnAfterTheEngineWasDown has the engine be down while a tail has to open its hub again.
func TestTail_GoesOnAfterTheEngineWasDown(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		f := a.tail("x")
		defer f.stop()
		server.Down(fmt.Errorf("no route"))
		synctest.Wait()
		if refused := a.tail("y"); refused.status != http.StatusServiceUnavailable {
			t.Errorf("got %d, want 503", refused.status)
		}
		a.reset(a.hub("x"))
		time.Sleep(time.Minute)
		server.Up()
		time.Sleep(2 * repinPause)
		b.enter("x", "", defaults())
		b.publishText("x", "one")
		if got := f.texts(); got != "one" {
			t.Errorf("got %q, want one", got)
		}
	})
}

// TestTail_OfAnEngineOfOneNodeOpensNothing follows a hub where no other node can have it.
func TestTail_OfAnEngineOfOneNodeOpensNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newClusterNode(t, wrappedEngine{enginetest.NewServer(), ofOneNode})
		f := n.tail("x")
		defer f.stop()
		if n.registry.named["x"] != nil {
			t.Error("the tail has opened the hub")
		}
		n.enter("x", "", historyOfTen())
		n.publishText("x", "one")
		if got := f.texts(); got != "one" {
			t.Errorf("got %q, want one", got)
		}
	})
}

// TestRegistry_HubWithoutHistoryGivesWayToOneWithHistory has clients of two directives come to a hub, one with history, on a node
// where the hub stays open without clients for a while.
func TestRegistry_HubWithoutHistoryGivesWayToOneWithHistory(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		b.enter("x", "", historyOfTen())
		first := a.enter("x", "", defaults())
		b.publishText("x", "one")
		synctest.Wait()
		second := a.enter("x", "", historyOfTen())
		if a.hub("x") != first.client.Hub() {
			t.Error("another hub has opened beside one with clients")
		}
		wantCause(t, first, ws.Close{})
		first.abandon()
		second.abandon()
		a.members = nil

		a.enter("y", "", defaults()).abandon()
		a.members = nil
		if a.hub("y") == nil {
			t.Fatal("the hub is not kept")
		}
		b.enter("y", "", historyOfTen())
		b.publishText("y", "one")
		synctest.Wait()
		m := a.enter("y", "", historyOfTen())
		if got := a.hub("y").Lags([]*hub.Client{&m.client})[0]; got != 1 {
			t.Errorf("got %d messages for the client, want the one of the history", got)
		}
	})
}

// TestRegistry_HubThatSomebodyIsAboutToJoinStays has a client with history come between the two steps in which another one joins.
func TestRegistry_HubThatSomebodyIsAboutToJoinStays(t *testing.T) {
	inCluster(t, 1, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		n := nodes[0]
		n.enter("x", "", defaults()).abandon() // it is kept
		n.members = nil
		slow := &member{scope: n.lease.scope}
		slow.client.Init(n.process, slow, "", netip.Prefix{}, defaults())
		reserved, err := n.reserve(t.Context(), slow, "x", limits{})
		if err != nil {
			t.Fatal(err)
		}
		n.enter("x", "", historyOfTen())
		if err := n.registry.enter(t.Context(), slow, reserved, limits{}); err != nil {
			t.Errorf("got %v, want the client to join", err)
		}
		if slow.client.Hub() != n.hub("x") {
			t.Error("the client is in a hub that is over")
		}
		slow.abandon()
	})
}
