package fair

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestMeter_WaitingIsNoWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := idleProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		var m Meter
		for range 10 {
			m.Begin(load)
			time.Sleep(time.Microsecond) // stands for work
			m.End()
			m.End()                // does nothing
			m.Exclude(time.Second) // nor does this
			time.Sleep(time.Second)
		}
		if got := m.Owed(); got != 10*time.Microsecond {
			t.Errorf("got %v of work, want 10 µs", got)
		}
		other.Leave()
		load.Leave()
	})
}

func TestMeter_ExcludedWaitIsNoWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := idleProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		var m Meter
		m.Begin(load)
		time.Sleep(time.Microsecond) // stands for work
		time.Sleep(time.Second)
		m.Exclude(time.Second)
		time.Sleep(time.Microsecond) // stands for work
		m.End()
		if got := m.Owed(); got != 2*time.Microsecond {
			t.Errorf("got %v of work, want 2 µs", got)
		}
		other.Leave()
		load.Leave()
	})
}

func TestMeter_DeliveriesAreWork(t *testing.T) {
	p := idleProcessors()
	other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
	var m Meter
	m.Delivered(1000) // before Begin it does nothing
	m.Begin(load)
	m.started = 0 // or the time until now would count
	m.Delivered(1000)
	if got := m.Owed(); got != 1000*DeliveryWork {
		t.Errorf("got %v of work, want %v", got, 1000*DeliveryWork)
	}
	other.Leave()
	load.Leave()
}

func TestMeter_MeasuresNothingWhileAnAddressIsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		load := p.Enter(testAddress(1))
		var m Meter
		m.Begin(load)
		time.Sleep(time.Second)
		m.Delivered(1000)
		m.Pay(never)
		if m.Owed() != 0 || m.started != 0 {
			t.Errorf("got %v of work, want none", m.Owed())
		}
		load.Leave()
	})
}

func TestMeter_MeasuresNothingWithoutALoad(t *testing.T) {
	var m Meter
	m.Begin(nil)
	m.Delivered(1000)
	m.Pay(never)
	if m.Owed() != 0 {
		t.Errorf("got %v of work, want none", m.Owed())
	}
}

func TestMeter_PaysFromAUnitOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		var m Meter
		m.Begin(load)
		time.Sleep(WorkUnit - 1)
		m.Pay(never)
		if got := m.Owed(); got != WorkUnit-1 {
			t.Errorf("a little less than a unit: got %v owed, want all", got)
		}
		full := load.limiter.Tokens()
		m.Begin(load)
		time.Sleep(time.Nanosecond)
		m.Pay(never)
		if got, charged := m.Owed(), full-load.limiter.Tokens(); got != 0 || charged < 99 || charged > 100 {
			t.Errorf("a unit: got %v owed and %.1f µs charged, want nothing owed and 100 µs charged", got, charged)
		}
		other.Leave()
		load.Leave()
	})
}

func TestMeter_WhoeverEndsDoesNotPay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := busyProcessors()
		other, load := p.Enter(testAddress(1)), p.Enter(testAddress(2))
		load.turn <- struct{}{} // somebody pays, for ever
		var m Meter
		m.Begin(load)
		m.Delivered(1e6)
		full, began := load.limiter.Tokens(), time.Now()
		m.Pay(func() bool { return true })
		if took := time.Since(began); took != 0 || m.Owed() != 0 || load.limiter.Tokens() != full {
			t.Errorf("waited %v, owes %v, want no wait and nothing charged", took, m.Owed())
		}
		<-load.turn
		other.Leave()
		load.Leave()
	})
}
