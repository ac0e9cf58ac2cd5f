package chatbroadcast

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

func TestNodes_WithoutACluster(t *testing.T) {
	for _, tc := range []struct {
		name string
		e    engine.Engine
		want engineInfo
	}{
		{"memory", nil, engineInfo{Name: "memory", Up: true}},
		{"an engine of one node", wrappedEngine{enginetest.NewServer(), ofOneNode}, engineInfo{Name: "test", Up: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newClusterNode(t, tc.e)
				n.enter("x", "", historyOfTen())
				n.enter("x", "", historyOfTen())
				var got nodesAnswer
				n.ask("GET", "/nodes", "", &got)
				if got.Engine != tc.want || len(got.Nodes) != 1 {
					t.Fatalf("got %+v, want %+v and one node", got, tc.want)
				}
				want := nodeInfo{Name: hostname(), Number: 1, Self: true, Since: got.Nodes[0].Since, Hubs: 1, Clients: 2}
				if got.Nodes[0] != want || want.Since.IsZero() {
					t.Errorf("got %+v, want %+v", got.Nodes[0], want)
				}
			})
		})
	}
}

func TestNodes_OfACluster(t *testing.T) {
	inCluster(t, 2, func(t *testing.T, server *enginetest.Server, nodes []*clusterNode) {
		a, b := nodes[0], nodes[1]
		began := time.Now()
		time.Sleep(time.Second)
		a.enter("x", "", defaults())
		b.enter("x", "", defaults())
		b.enter("y", "", defaults())
		time.Sleep(engine.RenewInterval)
		var got nodesAnswer
		a.ask("GET", "/nodes", "", &got)
		if want := (engineInfo{Name: "test", Up: true, Cluster: true}); got.Engine != want || len(got.Nodes) != 2 {
			t.Fatalf("got %+v, want %+v and two nodes", got, want)
		}
		renewed := began.Add(engine.RenewInterval)
		for i, want := range []nodeInfo{
			{Name: hostname(), Number: a.number(), Self: true, Since: began, Renewed: renewed, Hubs: 1, Clients: 1},
			{Name: hostname(), Number: b.number(), Since: began, Renewed: renewed, Hubs: 2, Clients: 2},
		} {
			g := got.Nodes[i]
			if !g.Since.Equal(want.Since) || !g.Renewed.Equal(want.Renewed) {
				t.Errorf("got since %v, renewed %v, want %v, %v", g.Since, g.Renewed, want.Since, want.Renewed)
			}
			g.Since, g.Renewed = want.Since, want.Renewed
			if g != want {
				t.Errorf("got %+v, want %+v", g, want)
			}
		}

		server.Down(errors.New("no route"))
		synctest.Wait()
		got = nodesAnswer{}
		a.ask("GET", "/nodes", "", &got)
		if want := (engineInfo{Name: "test", Error: "no route", Cluster: true}); got.Engine != want || len(got.Nodes) != 1 || !got.Nodes[0].Self {
			t.Errorf("got %+v, want %+v and the node itself", got, want)
		}
	})
}
