package chatbroadcast

import (
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
			hubs.exit()
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
		hubs.exit()
		hubs.exit() // of the next lease: the time is up
		if got := time.Since(began); got != drain {
			t.Errorf("waited %v, want %v", got, drain)
		}
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
		setLeases := func(n int) (before int) {
			hubs.mu.Lock()
			defer hubs.mu.Unlock()
			before, scope.leases = scope.leases, n
			return before
		}
		leases := setLeases(0)
		go hubs.closeUnleased(scope)
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
