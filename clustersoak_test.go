package chatbroadcast

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// soak is how long TestCluster_ChurnLeavesNothing runs. Use "-soak 10m" for a long one.
var soak = flag.Duration("soak", 8*time.Second, "how long hubs and clients come and go in a cluster")

// soakSites has hubs that are soon forgotten.
const soakSites = `http://localhost {
	chat_broadcast /soak/* {
		hub {http.request.uri.path}
		history 20 2s
		presence
		http_publish
	}
}`

// TestCluster_ChurnLeavesNothing has clients come and go in hundreds of hubs, while nodes are reloaded and Redis restarts. In the end the
// nodes have no more goroutines and little more memory than before, and everything in Redis expires.
func TestCluster_ChurnLeavesNothing(t *testing.T) {
	t.Parallel()
	const hubCount, visitors = 300, 20
	r := startRedis(t)
	options := withEngine(r.engine())
	nodes := []*process{startProcess(t, options, soakSites), startProcess(t, options, soakSites)}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var visits atomic.Int64
	var running sync.WaitGroup
	for range visitors {
		running.Go(func() { // ends with ctx
			for ctx.Err() == nil {
				node := nodes[rand.IntN(len(nodes))].place
				if err := visitHub(ctx, t, node, fmt.Sprint("/soak/", rand.IntN(hubCount))); err == nil {
					visits.Add(1)
				} else {
					pauseFor(ctx, 100*time.Millisecond)
				}
			}
		})
	}
	var early, late []usage
	began := time.Now()
	restart := time.Now().Add(min(30*time.Second, *soak/2))
	for i := 0; time.Since(began) < *soak; i++ {
		pauseFor(ctx, time.Second)
		node := nodes[i%len(nodes)]
		if err := node.post(options, strings.Replace(soakSites, "{", fmt.Sprintf("{\n\theader X-Reload %d", i), 1)); err != nil {
			t.Error(err)
		}
		if time.Now().After(restart) {
			r.kill()
			r.start()
			restart = time.Now().Add(30 * time.Second)
		}
		if early == nil && time.Since(began) > *soak/4 {
			early = usages(t, nodes)
		}
		if keys, most := r.keys(t), 5*hubCount+20; len(keys) > most {
			t.Errorf("got %d keys for %d hubs, want at most %d", len(keys), hubCount, most)
		}
	}
	late = usages(t, nodes)
	stop()
	running.Wait()
	for _, node := range nodes {
		eventually(t, "the hubs to be gone", func() bool {
			return strings.Contains(request(t, http.MethodGet, "http://"+node.admin+"/chat_broadcast/hubs", nil).body, `"hubs":[]`)
		})
	}
	last := usages(t, nodes)
	t.Logf("%d visits; a quarter into it %v, at the end %v, without clients %v; %d keys", visits.Load(), early, late, last, len(r.keys(t)))
	for i := range nodes {
		if last[i].goroutines > 60 {
			t.Errorf("node %d has %d goroutines without clients, want few", i, last[i].goroutines)
		}
		if late[i].heap > early[i].heap*2+8<<20 {
			t.Errorf("the heap of node %d has grown from %d to %d bytes", i, early[i].heap, late[i].heap)
		}
	}
	for _, key := range r.keys(t) {
		if strings.Contains(key, "{") && r.command(t, "PTTL "+key) == "-1\n" {
			t.Errorf("%s never expires", key)
		}
	}
	if *soak < time.Minute {
		return
	}
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end) && len(r.keys(t)) > 20; {
		time.Sleep(time.Second) // keys live for some minutes
	}
	if keys := r.keys(t); len(keys) > 20 {
		t.Errorf("got %d keys, such as %s, long after the last hub has closed", len(keys), keys[0])
	}
}

// visitHub joins a hub, sends some messages, and leaves, with or without a word.
func visitHub(ctx context.Context, t *testing.T, node place, hub string) error {
	conn, err := dial(node.http)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	p, err := handshakeEvents(t, conn, node.http, hub)
	if err != nil {
		return err
	}
	for i := range 1 + rand.IntN(5) {
		frame := fmt.Sprintf(`{"type":"send","id":"%d","data":"%s"}`, i, strings.Repeat("x", rand.IntN(1000)))
		if _, err := conn.Write(clientFrame(finBit|opText, []byte(frame))); err != nil {
			return err
		}
		for {
			e, err := p.read()
			if err != nil {
				return err
			}
			if e.Type == "sent" || e.Type == "error" {
				break
			}
		}
	}
	if rand.IntN(2) == 0 {
		abort(conn)
	}
	return nil
}

// pauseFor waits, but not longer than ctx lasts.
func pauseFor(ctx context.Context, long time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
}

// A usage is what a node uses: goroutines, and bytes of its heap after a collection.
type usage struct{ goroutines, heap int }

// usages returns what nodes use.
func usages(t *testing.T, nodes []*process) []usage {
	t.Helper()
	all := make([]usage, len(nodes))
	for i, node := range nodes {
		all[i].goroutines = profileNumber(t, node.admin, "goroutine?debug=1", "goroutine profile: total ")
		all[i].heap = profileNumber(t, node.admin, "heap?gc=1&debug=1", "# HeapAlloc = ")
	}
	return all
}

// profileNumber returns the number behind a text in a profile of a node. It tries again while the admin endpoint is being replaced.
func profileNumber(t *testing.T, admin, profile, text string) (n int) {
	t.Helper()
	eventually(t, "a profile", func() bool {
		resp, err := http.Get("http://" + admin + "/debug/pprof/" + profile)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		_, after, found := strings.Cut(string(body), text)
		_, _ = fmt.Sscan(after, &n)
		return err == nil && found
	})
	return n
}

// keys returns the names of all keys.
func (r *redisServer) keys(t testing.TB) (keys []string) {
	t.Helper()
	for line := range strings.Lines(r.command(t, "KEYS *")) {
		keys = append(keys, strings.TrimSpace(line))
	}
	return keys
}
