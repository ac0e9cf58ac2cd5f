package chatbroadcast

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// withRegistry runs a test in a bubble, on hubs of its own.
func withRegistry(t *testing.T, test func(t *testing.T)) {
	process := hubs
	defer func() { hubs = process }()
	hubs = newRegistry()
	synctest.Test(t, test)
}

func TestRegistry_ExitFlushesAndSaysGoodbyeToAll(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, a := connect(t, defaults())
		_, b := connect(t, defaults())
		go func() {
			for i := range 5 {
				b.text(fmt.Sprint(i))
			}
		}()
		go func() {
			for range 5 {
				b.next()
			}
			b.wantClose(websocket.CloseGoingAway, "shutting_down")
			b.send(websocket.CloseMessage, "")
		}()
		synctest.Wait()
		began := time.Now()
		exited := make(chan struct{})
		go func() {
			hubs.beginExit()
			hubs.awaitExit()
			close(exited)
		}()
		for i := range 5 {
			a.wantText(fmt.Sprint(i))
		}
		if got, want := a.next(), (frame{websocket.CloseMessage, string(websocket.FormatCloseMessage(1001, "shutting_down"))}); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.send(websocket.CloseMessage, "")
		<-exited
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v for clients that answer at once", took)
		}
	})
}

func TestRegistry_ExitWaitsForStuckClientsNoLongerThanDrain(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		hubs.beginExit()
		for range 2 { // as many as there are leases: for the second the time is up
			hubs.beginExit()
			hubs.awaitExit()
			if got, want := time.Since(began), time.Duration(defaultDrain); got != want {
				t.Errorf("waited %v, want %v", got, want)
			}
		}
		hubs.mu.Lock()
		if hubs.live != 0 {
			t.Error("the stuck client is not finished, and not logged")
		}
		hubs.mu.Unlock()
		stuck.conn.Close()
	})
}

func TestRegistry_LongestDrainOfOneValueCounts(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		long := hubs.lease(t.Name(), testLogger(t), emitter{}, bounds{}, 4*time.Second)
		short := hubs.lease(t.Name(), testLogger(t), emitter{}, bounds{}, time.Second)
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		hubs.beginExit()
		hubs.awaitExit()
		if got := time.Since(began); got != 4*time.Second {
			t.Errorf("waited %v, want 4s", got)
		}
		hubs.release(long)
		hubs.release(short)
		stuck.conn.Close()
	})
}

// TestRegistry_PublishesInTheHubThatIsThere has a hub close between finding it and publishing in it, and another one of
// that name open.
func TestRegistry_PublishesInTheHubThatIsThere(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		gone, p := connect(t, defaults())
		p.conn.Close()
		synctest.Wait()
		_, other := connect(t, defaults())
		synctest.Wait()
		if _, published := gone.hub.publish(message{opcode: websocket.TextMessage, payload: []byte("lost")}); published {
			t.Error("published in a hub without clients")
		}
		go hubs.publish(gone.hub.name, message{opcode: websocket.TextMessage, payload: []byte("hello")}) // ends with the read
		other.wantText("hello")
		other.conn.Close()
	})
}

func TestRegistry_LongestDrainCounts(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		l := hubs.lease("another", testLogger(t), emitter{}, bounds{}, time.Minute)
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		hubs.beginExit()
		hubs.awaitExit()
		// It ends before that by the patience with a closing client: once for the frames, once for the answer.
		if got := time.Since(began); got <= time.Duration(defaultDrain) || got > 2*closeTimeout {
			t.Errorf("waited %v, want longer than %v", got, time.Duration(defaultDrain))
		}
		hubs.release(l)
		stuck.conn.Close()
	})
}

func TestRegistry_RemovedClientsAreClosedSpreadOut(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		const clients = 200
		var all []*client
		for range clients {
			c, p := connect(t, defaults())
			all = append(all, c)
			go p.drain()
		}
		scope := all[0].scope
		setLeases := func(l []*lease) (before []*lease) {
			hubs.mu.Lock()
			defer hubs.mu.Unlock()
			before, scope.leases = scope.leases, l
			return before
		}
		leases := setLeases(nil)
		go hubs.closeUnleased(scope, scope.removals)
		closed := func() (n int) {
			synctest.Wait()
			for _, c := range all {
				if causeOf(c) == causeHubRemoved {
					n++
				}
			}
			return n
		}
		time.Sleep(removalSpread/2 - removalStep/2)
		if got := closed(); got < clients/3 || got > clients*2/3 {
			t.Errorf("at half time: got %d of %d closed", got, clients)
		}
		time.Sleep(removalSpread / 2)
		if got := closed(); got != clients {
			t.Errorf("at the end: got %d of %d closed", got, clients)
		}
		time.Sleep(removalStep)
		setLeases(leases) // for connect to release
	})
}

func TestRegistry_LastReleaseOfSeveralKeepsTheSpread(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		var all []*client
		for range 100 {
			c, p := connect(t, defaults())
			all = append(all, c)
			go p.drain()
		}
		scope := all[0].scope
		leases := scope.leases
		scope.leases = nil
		for range 20 { // a value that comes and goes
			hubs.lease(scope.key, testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
			hubs.mu.Lock()
			scope.leases = nil
			scope.removals++
			removal := scope.removals
			hubs.mu.Unlock()
			go hubs.closeUnleased(scope, removal)
		}
		time.Sleep(removalSpread / 4)
		synctest.Wait()
		hubs.mu.Lock()
		if got := scope.members; got < 60 {
			t.Errorf("got %d of %d clients left after a quarter of the time", got, len(all))
		}
		scope.leases = leases // for connect to release
		hubs.mu.Unlock()
		time.Sleep(removalStep)
	})
}

func TestRegistry_LeaseIsReleasedOnce(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		a, b := hubs.lease("hub", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain)), hubs.lease("hub", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		hubs.release(a)
		hubs.release(a)
		if got := len(b.scope.leases); got != 1 {
			t.Errorf("got %d leases, want the other one", got)
		}
		hubs.release(b)
		if got := len(hubs.scopes); got != 0 {
			t.Errorf("got %d scopes, want none", got)
		}
	})
}

// TestRegistry_JoinThroughAReplacedConfiguration joins with what a request holds that began before a reload.
func TestRegistry_JoinThroughAReplacedConfiguration(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		old := hubs.lease("hub", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		stale := func() *client { return &client{settings: defaults(), scope: old.scope} }
		hubs.release(old)
		if err := hubs.join(stale(), "name", limits{}); !errors.Is(err, errHubRemoved) {
			t.Errorf("value gone: got %v, want %v", err, errHubRemoved)
		}
		current := hubs.lease("hub", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		c := stale()
		if err := hubs.join(c, "name", limits{maxClients: 1}); err != nil {
			t.Fatalf("value back: got %v", err)
		}
		if c.scope != current.scope {
			t.Error("the client is not in the current scope")
		}
		c.abandon()
		if got := len(current.scope.clients) + len(current.scope.perHub) + len(current.scope.perIP) + len(hubs.hubs); got != 0 {
			t.Errorf("got %d things left behind", got)
		}
		hubs.release(current)
	})
}

func TestRegistry_FinishBeforeLeave(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		c, p := connect(t, defaults())
		_, other := connect(t, defaults())
		c.decide(causeShuttingDown) // somebody closes it, and is held up before it leaves
		p.conn.Close()
		time.Sleep(closeTimeout)
		synctest.Wait()
		hubs.leave(c)
		hubs.mu.Lock()
		if got := c.scope.members; got != 1 || len(c.scope.clients) != 1 || hubs.live != 1 {
			t.Errorf("got %d members, %d clients, %d live, want the other one", got, len(c.scope.clients), hubs.live)
		}
		hubs.mu.Unlock()
		other.conn.Close()
	})
}
