package chatbroadcast

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A wrappedEngine has sessions that differ from those of the reference engine.
type wrappedEngine struct {
	*enginetest.Server
	wrap func(*enginetest.Session) engine.Session
}

// Connect implements engine.Engine.
func (e wrappedEngine) Connect(m engine.Monitor) (engine.Session, error) {
	s, err := e.Server.Connect(m)
	if err != nil {
		return nil, err
	}
	return e.wrap(s.(*enginetest.Session)), nil
}

// ofOneNode returns a session that no other node shares.
func ofOneNode(s *enginetest.Session) engine.Session { return struct{ engine.Session }{s} }

// A slowSession takes long to forget a hub: it waits for a gate before that.
type slowSession struct {
	*enginetest.Session
	gate chan struct{}
}

// Forget implements engine.Session.
func (s slowSession) Forget(ctx context.Context, hub string) error {
	<-s.gate
	return s.Session.Forget(ctx, hub)
}

// epoch returns the epoch of a hub that is open.
func (n *clusterNode) epoch(name string) string { return n.hub(name).Known().Epoch }

// kickInBackground kicks a hub, and returns a function that waits for the answer.
func (n *clusterNode) kickInBackground(name string) (await func() kicking) {
	done := make(chan kicking, 1)
	go func() { // ends with the answer
		var got kicking
		n.ask("DELETE", "/hubs/"+name, "", &got)
		done <- got
	}()
	return func() kicking { return <-done }
}

// TestKick_ClientsThatComeMeanwhileGetTheNewEpoch has clients join on all nodes while the engine is about to forget the hub.
func TestKick_ClientsThatComeMeanwhileGetTheNewEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, gate := enginetest.NewServer(), make(chan struct{})
		slow := wrappedEngine{server, func(s *enginetest.Session) engine.Session { return slowSession{s, gate} }}
		// The third node has not opened the hub.
		nodes := []*clusterNode{newClusterNode(t, slow), newClusterNode(t, server), newClusterNode(t, server)}
		synctest.Wait()
		var kicked []*member
		for _, n := range nodes[:2] {
			kicked = append(kicked, n.enter("x", "", historyOfTen()), n.enter("x", "", defaults()))
		}
		if _, _, err := nodes[0].publish(t.Context(), "x", textOf("regretted")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		old := nodes[0].epoch("x")

		await := nodes[0].kickInBackground("x")
		synctest.Wait()
		var joining sync.WaitGroup
		joined := make([]*member, len(nodes))
		for i, n := range nodes {
			joining.Go(func() { joined[i] = n.enter("x", "", historyOfTen()) })
		}
		time.Sleep(controlPatience / 2)
		for i, m := range joined {
			if m != nil {
				t.Errorf("a client has joined on node %d before the engine has forgotten the hub", i)
			}
		}
		for _, m := range kicked {
			wantCause(t, m, hub.CloseKicked)
		}
		close(gate)
		if got := await(); got.Kicked != 4 || got.Silent != nil {
			t.Errorf("got %+v, want four clients kicked", got)
		}
		began := time.Now()
		joining.Wait()
		if took := time.Since(began); took > 0 {
			t.Errorf("the clients that came meanwhile waited for %v more", took)
		}
		epoch := nodes[0].epoch("x")
		for i, n := range nodes {
			info, _ := n.hub("x").Info()
			if got := n.epoch("x"); got == old || got != epoch || info.Head != 0 {
				t.Errorf("node %d: got epoch %s with %d messages, want the same new one without messages", i, got, info.Head)
			}
			n.lease.process.link.renewSoon()
		}
		synctest.Wait()
		for _, m := range joined {
			wantCause(t, m, ws.Close{})
		}
	})
}

// TestKick_RacesWithJoins kicks a hub again and again from all nodes while clients come and messages are published.
func TestKick_RacesWithJoins(t *testing.T) {
	for seed := range uint64(6) {
		inCluster(t, 3, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
			var running sync.WaitGroup
			var mu sync.Mutex
			var all []*member
			done := make(chan struct{})
			for i, n := range nodes {
				for j := range 3 {
					rng := rand.New(rand.NewPCG(seed, uint64(10*i+j)))
					running.Go(func() {
						for {
							select {
							case <-done:
								return
							case <-time.After(time.Duration(1+rng.IntN(50)) * time.Millisecond):
							}
							settings := defaults()
							if rng.IntN(2) == 0 {
								settings = historyOfTen()
							}
							m, err := n.tryJoin(context.Background(), "x", "", settings)
							if err != nil {
								t.Errorf("joining: %v", err)
								return
							}
							mu.Lock()
							all = append(all, m)
							mu.Unlock()
							_, _, _ = n.publish(context.Background(), "x", textOf("hello")) // the hub may be gone
						}
					})
				}
				rng := rand.New(rand.NewPCG(seed, uint64(10*i+9)))
				running.Go(func() {
					for range 10 {
						time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
						if status, reason := n.call("DELETE", "/hubs/x", "", nil); status != 200 && status != 404 {
							t.Errorf("kicking: got %d, %s", status, reason)
						}
					}
				})
			}
			time.Sleep(2 * time.Second)
			close(done)
			running.Wait()
			for _, n := range nodes {
				n.lease.process.link.renewSoon() // hubs of an old epoch would be found out
			}
			synctest.Wait()
			for _, m := range all {
				if why := m.client.Cause(); why != (ws.Close{}) && why != hub.CloseKicked {
					t.Errorf("got a client closed with %q", why.Reason)
				}
			}
			for _, m := range all {
				m.abandon()
			}
		})
	}
}

// TestKick_MessageOnItsWayIsNotOfTheNewEpoch has a message wait for the engine when its hub is kicked.
func TestKick_MessageOnItsWayIsNotOfTheNewEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		n := newClusterNode(t, wrappedEngine{server, ofOneNode})
		n.enter("x", "", historyOfTen())
		release := server.HoldPublish()
		go func() { _, _, _ = n.publish(context.Background(), "x", textOf("spam")) }() // ends with the release
		synctest.Wait()
		await := n.kickInBackground("x")
		time.Sleep(outboxPatience / 2)
		release()
		if got := await(); got.Kicked != 1 {
			t.Errorf("got %+v, want one client kicked", got)
		}
		synctest.Wait()
		n.enter("x", "", historyOfTen())
		if info, _ := n.hub("x").Info(); info.Head != 0 {
			t.Errorf("got %d messages in the new epoch, want none of the old", info.Head)
		}
	})
}

// TestKick_LostWordLetsClientsInLater loses what tells a node that the engine has forgotten the hub.
func TestKick_LostWordLetsClientsInLater(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		a.enter("x", "", defaults())
		synctest.Wait()
		if got := a.kickInBackground("x")(); got.Kicked != 1 {
			t.Errorf("got %+v, want one client kicked", got)
		}
		synctest.Wait()
		a.session.Kill() // the next kick is of a node that dies meanwhile
		s := a.lease.process.link.cluster.ID()
		began := time.Now()
		b.lease.process.link.control.begin(controlEntry{ID: "1", From: s, Method: "DELETE", Path: hubPath("x")})
		synctest.Wait()
		b.enter("x", "", defaults())
		if took := time.Since(began); took != afterPatience {
			t.Errorf("the client waited for %v, want %v", took, afterPatience)
		}
	})
}

// TestKick_EngineOfOneNode kicks hubs of an engine that only this node uses.
func TestKick_EngineOfOneNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		n := newClusterNode(t, wrappedEngine{server, ofOneNode})
		synctest.Wait()
		m, without := n.enter("x", "", historyOfTen()), n.enter("without history", "", defaults())
		if _, _, err := n.publish(t.Context(), "x", textOf("regretted")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		old := n.epoch("x")
		var got kicking
		if n.ask("DELETE", "/hubs/x", "", &got); got.Kicked != 1 || got.Silent != nil {
			t.Errorf("got %+v, want one client kicked", got)
		}
		wantCause(t, m, hub.CloseKicked)
		if status, reason := n.call("GET", "/hubs/x", "", nil); status != 404 {
			t.Errorf("got %d, %s of a hub that was kicked", status, reason)
		}
		n.enter("x", "", historyOfTen())
		if info, _ := n.hub("x").Info(); n.epoch("x") == old || info.Head != 0 {
			t.Errorf("got epoch %s, which was %s, with %d messages, want a new one", n.epoch("x"), old, info.Head)
		}
		if _, found, err := n.publish(t.Context(), "x", textOf("again")); !found || err != nil {
			t.Errorf("got %v, %v, want the hub to go on", found, err)
		}
		synctest.Wait()
		if info, _ := n.hub("x").Info(); info.Head != 1 {
			t.Errorf("got message %d, want 1", info.Head)
		}
		if n.ask("DELETE", "/hubs/without%20history", "", &got); got.Kicked != 1 {
			t.Errorf("got %+v, want one client kicked", got)
		}
		wantCause(t, without, hub.CloseKicked)
	})
}

// TestKick_HubThatNobodyHasOpenIsForgotten kicks a hub that only the engine has.
func TestKick_HubThatNobodyHasOpenIsForgotten(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		bounds := engine.Bounds{Messages: 10, Bytes: 1 << 20, Age: time.Hour}
		other := server.Session()
		if _, err := other.Publish(t.Context(), "x", engine.Batch{Bounds: bounds, Messages: []engine.Message{{Data: []byte("\x01\x00\x00hello")}}}); err != nil {
			t.Fatal(err)
		}
		_ = other.Close() // otherwise it is a node that does not answer
		if status, reason := nodes[0].call("DELETE", "/hubs/x", "", nil); status != 404 || reason != "hub x is not open" {
			t.Errorf("got %d, %s, want 404", status, reason)
		}
		s, err := nodes[0].session.Read(t.Context(), "x", engine.Position{})
		if err != nil || len(s.Entries) != 0 {
			t.Errorf("got %d messages, %v, want them forgotten", len(s.Entries), err)
		}
	})
}

// TestKick_HubThatOpensGetsTheNewEpoch kicks a hub that is about to open.
func TestKick_HubThatOpensGetsTheNewEpoch(t *testing.T) {
	inCluster(t, 1, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		n := nodes[0]
		open, openHub := make(chan struct{}), n.openHub
		opened := 0
		n.openHub = func(name string, s *hub.Settings, l *link) (*hub.Hub, error) {
			b, err := openHub(name, s, l)
			if opened++; opened == 1 {
				<-open // it has the old epoch
			}
			return b, err
		}
		joined := make(chan *member, 1)
		go func() { joined <- n.enter("x", "", defaults()) }()
		synctest.Wait()
		if status, reason := n.call("DELETE", "/hubs/x", "", nil); status != 404 {
			t.Errorf("got %d, %s, want 404: nobody is in the hub", status, reason)
		}
		close(open)
		m := <-joined
		n.lease.process.link.renewSoon()
		synctest.Wait()
		wantCause(t, m, ws.Close{})
		if opened != 2 {
			t.Errorf("got %d hubs opened, want another one", opened)
		}
	})
}

// TestKick_EngineThatFailsToForget has the engine be down only for the kick.
func TestKick_EngineThatFailsToForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := enginetest.NewServer()
		broken := errors.New("read-only")
		n := newClusterNode(t, wrappedEngine{server, func(s *enginetest.Session) engine.Session { return brokenSession{s, broken} }})
		synctest.Wait()
		m := n.enter("x", "", historyOfTen())
		status, reason := n.call("DELETE", "/hubs/x", "", nil)
		if want := "1 client kicked, but the engine has not forgotten the hub's messages: read-only"; status != 503 || reason != want {
			t.Errorf("got %d, %s, want 503, %s", status, reason, want)
		}
		wantCause(t, m, hub.CloseKicked)
		n.enter("x", "", historyOfTen())
	})
}

// A brokenSession forgets nothing.
type brokenSession struct {
	*enginetest.Session
	err error
}

// Forget implements engine.Session.
func (s brokenSession) Forget(context.Context, string) error { return s.err }

// TestKick_ThePostsThatWaitArePublishedInTheNewHub has a POST come while a hub is kicked.
func TestKick_PostThatComesMeanwhileIsPublishedAfterwards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		n := newClusterNode(t, wrappedEngine{enginetest.NewServer(), func(s *enginetest.Session) engine.Session { return slowSession{s, gate} }})
		synctest.Wait()
		n.enter("x", "", historyOfTen())
		old := n.epoch("x")
		await := n.kickInBackground("x")
		synctest.Wait()
		posted := make(chan error, 1)
		go func() { // ends when the hub may open again
			r, found, err := n.publishOpening(t.Context(), "x", textOf("hello"), "value", historyOfTen(), limits{})
			if err == nil && (!found || r.Seq != 1) {
				err = fmt.Errorf("message %d, found %v", r.Seq, found)
			}
			posted <- err
		}()
		synctest.Wait()
		close(gate)
		await()
		if err := <-posted; err != nil {
			t.Errorf("got %v, want message 1", err)
		}
		if n.epoch("x") == old {
			t.Error("the message is in the old epoch")
		}
	})
}

// TestKick_ManyAtOnceEndInOneEpoch kicks one hub from all nodes at the same moment.
func TestKick_ManyAtOnceEndInOneEpoch(t *testing.T) {
	inCluster(t, 3, func(t *testing.T, _ *enginetest.Server, nodes []*clusterNode) {
		for _, n := range nodes {
			n.enter("x", "", historyOfTen())
		}
		synctest.Wait()
		var kicking sync.WaitGroup
		for range 3 {
			for _, n := range nodes {
				kicking.Go(func() { n.call("DELETE", "/hubs/x", "", nil) })
			}
		}
		kicking.Wait()
		synctest.Wait()
		var epochs []string
		for _, n := range nodes {
			if n.registry.named["x"] != nil {
				t.Error("the hub is still barred")
			}
			n.enter("x", "", historyOfTen())
			epochs = append(epochs, n.epoch("x"))
		}
		if slices.Sort(epochs); epochs[0] != epochs[2] {
			t.Errorf("got the epochs %s, want one", strings.Join(epochs, ", "))
		}
	})
}
