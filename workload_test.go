package chatbroadcast

import (
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
)

// busyWorkloads returns workloads of processors that are busy for an hour.
func busyWorkloads() *workloads {
	w := new(workloads)
	keepBusy(w)
	return w
}

func keepBusy(w *workloads) {
	w.processors.until = time.Now().Add(time.Hour)
	w.processors.state.Store(w.processors.until.UnixNano())
}

func never() bool { return false }

func TestWorkload_AddressThatIsAloneDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		load, began := w.enter(testPrefix(1)), time.Now()
		load.pay(time.Hour, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v, want no wait", took)
		}
		load.leave()
		if len(w.byAddress) != 0 {
			t.Error("its workload is kept")
		}
	})
}

func TestWorkload_NobodyPaysWhileProcessorsAreIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w workloads
		w.processors.last = time.Now()
		w.processors.used = time.Hour // more than the process has used, so that it seems idle
		other, load, began := w.enter(testPrefix(1)), w.enter(testPrefix(2)), time.Now()
		load.pay(time.Hour, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v, want no wait", took)
		}
		other.leave()
		load.leave()
	})
}

// TestWorkload_AddressGetsItsPart has many clients of an address work as much as they can.
func TestWorkload_AddressGetsItsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		const lasts = 10 * time.Second
		other, load := w.enter(testPrefix(1)), w.enter(testPrefix(2))
		var worked atomic.Int64
		var clients sync.WaitGroup
		began := time.Now()
		for range 100 {
			clients.Go(func() {
				for time.Since(began) < lasts {
					worked.Add(int64(time.Millisecond))
					load.pay(time.Millisecond, never)
				}
			})
		}
		clients.Wait()
		part := time.Duration(workPart * float64(runtime.GOMAXPROCS(0)) * float64(lasts))
		if got := time.Duration(worked.Load()); got < part || got > part+workBurst+200*time.Millisecond {
			t.Errorf("worked for %v in %v, want %v", got, lasts, part)
		}
		if took := time.Since(began); took > lasts+time.Second {
			t.Errorf("the last client waited for %v", took-lasts)
		}
		began = time.Now()
		other.pay(time.Millisecond, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("the other address: waited %v, want no wait", took)
		}
		other.leave()
		load.leave()
	})
}

// TestWorkload_LeavingDoesNotPay also is about what is kept of an address that has gone: nothing, once its work is paid.
func TestWorkload_LeavingDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		other, began := w.enter(testPrefix(1)), time.Now()
		for range 100 {
			load := w.enter(testPrefix(2))
			load.pay(10*time.Millisecond, never)
			load.leave()
		}
		work := time.Second - workBurst
		if took, least := time.Since(began), time.Duration(float64(work)/workPart/float64(runtime.GOMAXPROCS(0))); took < least {
			t.Errorf("work of a second took %v, want at least %v", took, least)
		}
		time.Sleep(time.Minute)
		other.leave()
		if len(w.byAddress)+len(w.idle) != 0 {
			t.Errorf("got %d addresses and %d idle ones kept, want none", len(w.byAddress), len(w.idle))
		}
	})
}

func TestWorkload_WhoeverEndsWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		other, load := w.enter(testPrefix(1)), w.enter(testPrefix(2))
		load.turn <- struct{}{} // somebody pays, for ever
		load.reserve(time.Hour, time.Hour/2)
		began := time.Now()
		load.pay(time.Second, func() bool { return time.Since(began) > 3*time.Second })
		if took := time.Since(began); took > 3*time.Second+turnLook {
			t.Errorf("waited %v, want no longer than until it ended", took)
		}
		<-load.turn
		other.leave()
		load.leave()
	})
}

// TestWorkload_WaitingIsNoWork has a client wait for a message of a minute's length.
func TestWorkload_WaitingIsNoWork(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		other := hubs.work.enter(testPrefix(1))
		keepBusy(&hubs.work)
		settings := defaults()
		settings.pingInterval = 0
		c, p := connect(t, settings)
		frame := clientFrame(finBit|websocket.TextMessage, []byte(strings.Repeat("x", 100)))
		for i := range frame {
			p.write(frame[i : i+1])
			time.Sleep(time.Second / 2)
		}
		p.wantText(strings.Repeat("x", 100))
		p.conn.Close()
		synctest.Wait()
		if c.worked > time.Millisecond {
			t.Errorf("got %v of work, want next to nothing", c.worked)
		}
		other.leave()
	})
}
