package fair

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func never() bool { return false }

func TestPool_AddressGetsAsMuchAsIsLeft(t *testing.T) {
	p := NewPool(1000)
	first, second, third := testAddress(1), testAddress(2), testAddress(3)
	takeAll := func(address netip.Prefix) (n int) {
		for p.Take(address, 1) {
			n++
		}
		return n
	}
	if got := takeAll(first); got != 500 {
		t.Errorf("the first address: got %d, want 500", got)
	}
	if got := takeAll(second); got != 250 {
		t.Errorf("the second address: got %d, want 250", got)
	}
	if got := takeAll(third); got != 125 {
		t.Errorf("the third address: got %d, want 125", got)
	}
	if got := p.Used(); got != 875 {
		t.Errorf("got %d used, want 875", got)
	}
	p.Give(first, 500)
	p.Give(second, 250)
	p.Give(third, 125)
	if p.Used() != 0 || len(p.taken) != 0 {
		t.Errorf("got %d used by %d addresses, want everything given back", p.Used(), len(p.taken))
	}
}

func TestPool_RaiseMakesRoomForFourMessages(t *testing.T) {
	p := NewPool(1000)
	p.Raise(200) // smaller than the pool is
	if p.Take(testAddress(1), 501) {
		t.Error("an address took more than half of 1000 bytes")
	}
	p.Raise(1000)
	if !p.Take(testAddress(1), 2000) || p.Take(testAddress(1), 1) {
		t.Error("an address did not get half of four messages of 1000 bytes")
	}
}

func TestPool_SetMostLeavesAddressesWhatTheyHave(t *testing.T) {
	p := NewPool(1000)
	p.Take(testAddress(1), 400)
	if before := p.SetMost(500); before != 1000 {
		t.Errorf("got a size of %d before, want 1000", before)
	}
	if p.Take(testAddress(1), 1) || p.Used() != 400 {
		t.Errorf("got %d used, want the 400 from before", p.Used())
	}
	if !p.Take(testAddress(2), 50) {
		t.Error("another address did not get half of the 100 bytes that are left")
	}
}

func TestPool_LargerThan32BitsWorks(t *testing.T) {
	p := NewPool(1 << 34)
	for range 8 {
		if !p.Take(testAddress(1), 1<<30) {
			t.Fatalf("got %d bytes, want half of 16 GiB", p.Used())
		}
	}
	if p.Used() != 1<<33 || p.Take(testAddress(1), 1) {
		t.Errorf("got %d bytes used, want half of 16 GiB", p.Used())
	}
}

func TestPool_AwaitTakesAsSoonAsThereIsEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPool(1000)
		p.Take(testAddress(1), 500)
		time.AfterFunc(500*time.Millisecond, func() { p.Give(testAddress(1), 500) })
		began := time.Now()
		if !p.Await(testAddress(1), 300, never) {
			t.Error("got nothing, want what was given back")
		}
		if took := time.Since(began); took < 500*time.Millisecond || took > 500*time.Millisecond+poolPause {
			t.Errorf("waited %v, want 500 ms", took)
		}
		if p.Used() != 300 {
			t.Errorf("got %d used, want 300", p.Used())
		}
	})
}

func TestPool_AwaitGivesUpWithinThreeSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewPool(1000)
		for range 20 {
			began := time.Now()
			if p.Await(testAddress(1), 501, never) {
				t.Error("got more than half")
			}
			if took := time.Since(began); took < time.Second || took > 3*time.Second+poolPause {
				t.Errorf("gave up after %v, want 1 s to 3 s", took)
			}
		}
		if p.Used() != 0 {
			t.Errorf("got %d used, want nothing", p.Used())
		}
	})
}

func TestPool_AwaitEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, began := NewPool(1000), time.Now()
		if p.Await(testAddress(1), 501, func() bool { return time.Since(began) >= 100*time.Millisecond }) {
			t.Error("got more than half")
		}
		if took := time.Since(began); took != 100*time.Millisecond {
			t.Errorf("waited %v, want 100 ms", took)
		}
	})
}
