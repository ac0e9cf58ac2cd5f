package chatbroadcast

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// stormSite has one hub with presence for clients that stay, for a storm of them, and for those that vanish without a
// word.
const stormSite = `http://localhost {
	chat_broadcast /stay/* lobby {
		user {http.request.uri.query.name}
		presence join_leave
	}
	chat_broadcast /storm/* lobby {
		user {http.request.uri.query.name}
		presence join_leave
		ping off
	}
	chat_broadcast /vanish/* lobby {
		user {http.request.uri.query.name}
		presence join_leave
		ping 2s 1s
	}
}`

// A watcher stays, and records the presence changes that the server sends it.
type watcher struct {
	*eventsPeer
	roster  roster
	times   []time.Time // of each change
	clients int         // from the last change
}

// watch joins an empty hub.
func watch(t *testing.T, server *process) *watcher {
	t.Helper()
	w := &watcher{eventsPeer: server.joinEvents("/stay/?name=watcher")}
	w.skipTo("join") // its own
	w.roster = roster{"watcher": true}
	return w
}

// follow reads the next change. steady are the users that must not come or go any more.
func (w *watcher) follow(steady func(user string) bool) error {
	for {
		e, err := w.read()
		if err != nil {
			return err
		}
		gone := e.Left
		if e.Type == "leave" {
			gone = []string{*e.User}
		}
		for _, user := range gone {
			if steady(user) {
				return fmt.Errorf("got %.200s, but %s has never left", e.raw, user)
			}
		}
		came := e.Joined
		if e.Type == "join" {
			came = []string{*e.User}
		}
		for _, user := range came {
			if w.roster[user] {
				return fmt.Errorf("got %.200s, but %s was there", e.raw, user)
			}
		}
		if w.roster.apply(e) {
			w.clients = e.Clients
			w.times = append(w.times, time.Now())
			return nil
		}
	}
}

// wantOneASecond fails if more changes came than one a second. A frame may be late by a while: the machine is busy.
func (w *watcher) wantOneASecond(t *testing.T) {
	t.Helper()
	const late = 600 * time.Millisecond
	for i := range w.times {
		for j := i + 1; j < len(w.times); j++ {
			if took, want := w.times[j].Sub(w.times[i]), time.Duration(j-i)*time.Second-late; took < want {
				t.Fatalf("got %d frames of changes within %v, want at most one a second", j-i+1, took)
			}
		}
	}
}

// enterStorm joins the hub for a goroutine other than the test's, without reading more than the handshake's response: every
// other client is raw. The caller closes the connection.
func enterStorm(t *testing.T, server, path, user string, raw bool) (net.Conn, error) {
	conn, err := net.Dial("tcp", server)
	if err != nil {
		return nil, err
	}
	header := eventsHeader
	if raw {
		header = ""
	}
	p := newPeer(t, conn)
	if _, err := p.handshake(server, path+"?name="+user, header); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// each calls do for the numbers below n, in a few goroutines, and fails the test with the first error.
func each(t *testing.T, n int, do func(i int) error) {
	t.Helper()
	var next atomic.Int64
	var running sync.WaitGroup
	var once sync.Once
	for range 16 {
		running.Go(func() { // ends with the numbers
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					once.Do(func() { t.Errorf("number %d: %v", i, err) })
					next.Store(int64(n))
				}
			}
		})
	}
	running.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// TestPresence_StormOfTenThousand has 10,000 clients join and leave a hub as fast as they can, beside some that stay, some
// that come back at once, and some that vanish.
func TestPresence_StormOfTenThousand(t *testing.T) {
	const (
		all       = 10_000
		vanishing = 300 // users v...
		staying   = 100 // users s..., of which the first half comes back again and again
		storming  = all - vanishing - staying
		maxCPU    = 40 * time.Second // with the race detector, which makes everything several times as expensive
	)
	server := startProcess(t, "", stormSite)
	w := watch(t, server)
	var steadyNow atomic.Bool // all that stay have joined, and got the changes
	steady := func(user string) bool {
		return steadyNow.Load() && (user == "watcher" || strings.HasPrefix(user, "s"))
	}
	var residents [staying]net.Conn
	name := func(kind string, i int) string { return fmt.Sprintf("%s%05d", kind, i) }
	each(t, staying, func(i int) (err error) {
		residents[i], err = enterStorm(t, server.http, "/storm/", name("s", i), i%2 == 1)
		return err
	})
	for len(w.roster) < staying+1 {
		if err := w.follow(steady); err != nil {
			t.Fatal(err)
		}
	}
	steadyNow.Store(true)

	// The watcher reads in the background while the storm is on.
	var watching sync.WaitGroup
	done := errors.New("done")
	var over atomic.Bool
	watching.Go(func() { // ends with the last change
		settled := func() bool { return over.Load() && len(w.roster) == staying+1 && w.clients == staying+1 }
		for err := error(nil); !errors.Is(err, done); {
			if err = w.follow(steady); err != nil {
				t.Errorf("the watcher: %v", err)
				return
			}
			if settled() {
				err = done
			}
		}
	})

	began := time.Now()
	storm := make([]net.Conn, storming+vanishing)
	var coming sync.Mutex
	comeBack := func(i int) (err error) {
		coming.Lock()
		defer coming.Unlock()
		residents[i].Close()
		residents[i], err = enterStorm(t, server.http, "/storm/", name("s", i), i%2 == 1)
		return err
	}
	each(t, len(storm), func(i int) (err error) {
		if i%20 == 0 {
			if err := comeBack(i / 20 % (staying / 2)); err != nil {
				return err
			}
		}
		if i < vanishing {
			storm[i], err = enterStorm(t, server.http, "/vanish/", name("v", i), i%2 == 1)
			return err
		}
		storm[i], err = enterStorm(t, server.http, "/storm/", name("u", i), i%2 == 1)
		if i%4 == 0 && err == nil { // some leave at once
			abort(storm[i])
		}
		return err
	})
	joined := time.Since(began)
	rand.Shuffle(storming, func(i, j int) { storm[vanishing+i], storm[vanishing+j] = storm[vanishing+j], storm[vanishing+i] })
	each(t, storming, func(i int) error {
		if i%2 == 0 {
			abort(storm[vanishing+i])
			return nil
		}
		return ignoreClosed(storm[vanishing+i].Close())
	})
	took := time.Since(began)
	over.Store(true)
	watching.Wait()
	settled := time.Since(began)
	if t.Failed() {
		t.FailNow()
	}

	w.wantOneASecond(t)
	want := roster{"watcher": true}
	for i := range staying {
		want[name("s", i)] = true
	}
	if !maps.Equal(w.roster, want) {
		t.Errorf("got the roster %q by following, want %q", slices.Sorted(maps.Keys(w.roster)), slices.Sorted(maps.Keys(want)))
	}
	if got := w.everybody(); !maps.Equal(got, want) {
		t.Errorf("got the roster %q by asking, want %q", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	cpu := server.cpu()
	t.Logf("%d clients had joined after %v and left after %v; the last change arrived after %v, in %d frames; CPU time of the server %v",
		all, joined, took, settled, len(w.times), cpu)
	if cpu > maxCPU {
		t.Errorf("the server took %v of CPU time, want at most %v", cpu, maxCPU)
	}
	for _, conn := range append(storm, residents[:]...) {
		conn.Close()
	}
	w.conn.Close()
	server.terminate()
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// everybody asks for the whole roster, page by page.
func (w *watcher) everybody() roster {
	all, question := roster{}, map[string]any{"limit": 30}
	for {
		page := w.ask(maps.Clone(question))
		maps.Copy(all, newRoster(page))
		if page.After == nil {
			return all
		}
		question["after"] = *page.After
	}
}

// cpu returns how much CPU time the process has taken so far.
func (p *process) cpu() time.Duration {
	p.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		p.t.Skipf("no CPU time here: %v", err)
	}
	_, numbers, _ := strings.Cut(string(stat), ") ") // after the name, proc(5)
	fields := strings.Fields(numbers)
	ticks := 0
	for _, field := range fields[11:13] { // utime, stime
		n, err := strconv.Atoi(field)
		if err != nil {
			p.t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // Linux counts in hundredths, whatever its clock
}
