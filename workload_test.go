package chatbroadcast

import (
	"runtime"
	"strings"
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

func TestWorkload_AddressThatIsAloneIsNotCharged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w workloads
		load := w.enter(testPrefix(1))
		if pause := load.charge(time.Hour); pause != 0 {
			t.Errorf("got a pause of %v, want none", pause)
		}
		load.leave()
		if len(w.byAddress) != 0 {
			t.Error("its workload is kept")
		}
	})
}

func TestWorkload_AddressGetsItsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		other, load := w.enter(testPrefix(1)), w.enter(testPrefix(2))
		began, worked := time.Now(), time.Duration(0)
		for time.Since(began) < 10*time.Second {
			worked += time.Millisecond
			time.Sleep(load.charge(time.Millisecond))
		}
		part := time.Duration(workPart * float64(runtime.GOMAXPROCS(0)) * float64(10*time.Second))
		if worked < part || worked > part+workBurst+10*time.Millisecond {
			t.Errorf("worked for %v in 10 s, want %v", worked, part)
		}
		if pause := other.charge(time.Millisecond); pause != 0 {
			t.Errorf("the other address: got a pause of %v, want none", pause)
		}
		other.leave()
		load.leave()
	})
}

// TestWorkload_LeavingDoesNotPay also is about what is kept of an address that has gone: nothing, once its work is paid.
func TestWorkload_LeavingDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := busyWorkloads()
		other := w.enter(testPrefix(1))
		for range 100 {
			load := w.enter(testPrefix(2))
			load.charge(10 * time.Millisecond)
			load.leave()
		}
		load := w.enter(testPrefix(2))
		if pause := load.charge(time.Millisecond); pause < 100*time.Millisecond {
			t.Errorf("got a pause of %v after work of a second, want a longer one", pause)
		}
		load.leave()
		time.Sleep(time.Minute)
		other.leave()
		if len(w.byAddress)+len(w.idle) != 0 {
			t.Errorf("got %d addresses and %d idle ones kept, want none", len(w.byAddress), len(w.idle))
		}
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
