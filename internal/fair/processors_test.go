package fair

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// busyProcessors returns processors that always count as busy.
func busyProcessors() *Processors {
	p := NewProcessors()
	p.Used = func() (time.Duration, bool) { return 0, false }
	return p
}

// idleProcessors returns processors of a process that does nothing.
func idleProcessors() *Processors {
	p := NewProcessors()
	p.Used = func() (time.Duration, bool) { return time.Minute, true }
	return p
}

func TestProcessors_AddressThatIsAloneDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		load, began := p.Enter(testAddress(1)), time.Now()
		if p.Shared() {
			t.Error("one address counts as several")
		}
		load.Pay(time.Hour, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v, want no wait", took)
		}
		load.Leave()
		if len(p.byAddress) != 0 {
			t.Error("its load is kept")
		}
	})
}

func TestProcessors_ClientsOfOneAddressDoNotShare(t *testing.T) {
	p := NewProcessors()
	first, second := p.Enter(testAddress(1)), p.Enter(testAddress(1))
	if first != second || p.Shared() {
		t.Error("two clients of an address count as two addresses")
	}
	other := p.Enter(testAddress(2))
	if !p.Shared() {
		t.Error("two addresses count as one")
	}
	first.Leave()
	if !p.Shared() {
		t.Error("an address with a client left counts as gone")
	}
	second.Leave()
	if p.Shared() {
		t.Error("an address without clients counts")
	}
	other.Leave()
}

func TestProcessors_NobodyPaysWhileTheyAreIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := idleProcessors()
		other, load, began := p.Enter(testAddress(1)), p.Enter(testAddress(2)), time.Now()
		load.Pay(time.Hour, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v, want no wait", took)
		}
		other.Leave()
		load.Leave()
	})
}

// TestProcessors_AreBusyForAWhileAfterHalfWasUsed has a process use one part of its processors and then another.
func TestProcessors_AreBusyForAWhileAfterHalfWasUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProcessors()
		var used time.Duration
		p.Used = func() (time.Duration, bool) { return used, true }
		all := func(d time.Duration) time.Duration { return d * time.Duration(runtime.GOMAXPROCS(0)) }
		step := func(name string, pause, more time.Duration, want bool) {
			time.Sleep(pause)
			used += more
			if got := p.busy(); got != want {
				t.Errorf("%s: got busy %t, want %t", name, got, want)
			}
		}
		step("the first look, however much was used before it", time.Second, all(time.Second), false)
		step("a little less than half", busyLook, all(busyLook)/2-1, false)
		step("too soon for another look", busyLook-1, all(busyLook), false)
		step("the next look", 1, 0, true)
		step("idle from then on", busyHold-1, 0, true)
		step("idle for long", 1, 0, false)
		step("a time too long to tell", busyGap, all(busyGap), false)
		step("a little more than half", busyLook, all(busyLook)/2+1, true)
	})
}

func TestProcessors_BusyDoesNotWaitForWhoeverLooks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		p.looking.Lock()
		if p.busy() {
			t.Error("they count as busy before the first look")
		}
		p.looking.Unlock()
		p.busy()
		p.looking.Lock()
		if !p.busy() {
			t.Error("the last look is forgotten")
		}
		p.looking.Unlock()
	})
}

func TestProcessors_NowIsNeverZero(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProcessors()
		if got := p.Now(); got <= 0 {
			t.Errorf("at once: got %v, want a time that differs from none", got)
		}
		before := p.Now()
		time.Sleep(time.Hour)
		if got := p.Now() - before; got != time.Hour {
			t.Errorf("after an hour: got %v", got)
		}
	})
}

// TestProcessors_AddressGetsItsPart has many clients of an address work as much as they can.
func TestProcessors_AddressGetsItsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		const lasts = 10 * time.Second
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		var worked atomic.Int64
		var clients sync.WaitGroup
		began := time.Now()
		for range 100 {
			clients.Go(func() {
				for time.Since(began) < lasts {
					worked.Add(int64(time.Millisecond))
					load.Pay(time.Millisecond, never)
				}
			})
		}
		clients.Wait()
		part := time.Duration(workPart * float64(runtime.GOMAXPROCS(0)) * float64(lasts))
		if got := time.Duration(worked.Load()); got < part-200*time.Millisecond || got > part+workBurst+200*time.Millisecond {
			t.Errorf("worked for %v in %v, want %v", got, lasts, part)
		}
		if took := time.Since(began); took > lasts+time.Second {
			t.Errorf("the last client waited for %v", took-lasts)
		}
		began = time.Now()
		other.Pay(time.Millisecond, never)
		if took := time.Since(began); took > 0 {
			t.Errorf("the other address: waited %v, want no wait", took)
		}
		other.Leave()
		load.Leave()
	})
}

func TestProcessors_LargeWorkIsPaidWithinAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, load, began := p.Enter(testAddress(1)), p.Enter(testAddress(2)), time.Now()
		load.Pay(time.Hour, never)
		if took := time.Since(began); took > maxWorkPause {
			t.Errorf("waited %v, want %v at most", took, maxWorkPause)
		}
		other.Leave()
		load.Leave()
	})
}

// TestProcessors_LeavingDoesNotPay has an address leave after each piece of work. Its load is forgotten only when it is paid.
func TestProcessors_LeavingDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, began := p.Enter(testAddress(1)), time.Now()
		for range 100 {
			load := p.Enter(testAddress(2))
			load.Pay(10*time.Millisecond, never)
			load.Leave()
		}
		work := time.Second - workBurst
		if took, least := time.Since(began), time.Duration(float64(work)/workPart/float64(runtime.GOMAXPROCS(0))); took < least {
			t.Errorf("work of a second took %v, want at least %v", took, least)
		}
		time.Sleep(time.Minute)
		other.Leave()
		if len(p.byAddress)+len(p.idle) != 0 {
			t.Errorf("got %d addresses and %d idle ones kept, want none", len(p.byAddress), len(p.idle))
		}
	})
}

func TestProcessors_WhoeverEndsWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		load.turn <- struct{}{} // somebody pays, for ever
		load.reserve(time.Hour, time.Hour/2)
		began := time.Now()
		load.Pay(time.Second, func() bool { return time.Since(began) > 3*time.Second })
		if took := time.Since(began); took > 3*time.Second+turnLook {
			t.Errorf("waited %v, want no longer than until it ended", took)
		}
		<-load.turn
		other.Leave()
		load.Leave()
	})
}

// TestProcessors_RequestsOfAnAddressAreAnsweredInTurn tries several times: a limiter whose reservations are canceled while others
// are made is not exact.
func TestProcessors_RequestsOfAnAddressAreAnsweredInTurn(t *testing.T) {
	const requests, tries = 200, 5
	work := requests*RequestWork - workBurst
	want := time.Duration(float64(work) / workPart / float64(runtime.GOMAXPROCS(0)))
	var took [tries]time.Duration
	for i := range took {
		synctest.Test(t, func(t *testing.T) {
			p := busyProcessors()
			other, began := p.Enter(testAddress(1)), time.Now()
			var answered sync.WaitGroup
			for range requests {
				answered.Go(func() { p.PayRequest(t.Context(), testAddress(2), RequestWork) })
			}
			answered.Wait()
			took[i] = time.Since(began)
			other.Leave()
		})
	}
	slices.Sort(took[:])
	if median := took[tries/2]; median < want-want/10 || median > want+want/4 {
		t.Errorf("%d requests took %v, want %v", requests, took, want)
	}
}

func TestProcessors_RequestThatIsCanceledWaitsNoLonger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		load.turn <- struct{}{} // somebody pays, for ever
		load.reserve(time.Hour, time.Hour/2)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began := time.Now()
		p.PayRequest(ctx, testAddress(2), time.Second)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("waited %v, want at most 2 s more than the request lasted", took)
		}
		<-load.turn
		other.Leave()
		load.Leave()
		if p.Shared() {
			t.Error("a request that is answered still counts")
		}
	})
}

func TestProcessorTime_Grows(t *testing.T) {
	before, known := ProcessorTime()
	if !known {
		t.Skip("the system does not tell")
	}
	for until := time.Now().Add(10 * time.Second); ; {
		if used, _ := ProcessorTime(); used > before {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("got no more than %v after 10 s of work", before)
		}
	}
}
