package chatbroadcast

import (
	"errors"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestHandshakers_OneAfterTheOtherNeedsOneGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hs, refusal := newHandshakers(), errors.New("refused")
		for range 100 {
			if err := hs.run(func() error { return refusal }); !errors.Is(err, refusal) {
				t.Fatalf("got the error %v, want %v", err, refusal)
			}
			synctest.Wait() // until it is idle
			if n := hs.running.Load(); n != 1 {
				t.Fatalf("got %d handshakers, want 1", n)
			}
		}
		time.Sleep(handshakerPatience)
		synctest.Wait()
		if n := hs.running.Load(); n != 0 {
			t.Errorf("got %d handshakers after their patience, want none", n)
		}
	})
}

// TestHandshakers_BusyOnesHoldUpNobody has handshakes wait, as for a hub that opens.
func TestHandshakers_BusyOnesHoldUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hs, opened := newHandshakers(), make(chan struct{})
		for range 2 * runtime.GOMAXPROCS(0) {
			go func() {
				_ = hs.run(func() error {
					<-opened
					return nil
				})
			}()
		}
		synctest.Wait()
		if n := hs.running.Load(); n != int64(runtime.GOMAXPROCS(0)) {
			t.Errorf("got %d handshakers, want as many as processors", n)
		}
		began := time.Now()
		if err := hs.run(func() error { return nil }); err != nil || time.Since(began) > 0 {
			t.Errorf("got %v after %v, want no error at once", err, time.Since(began))
		}
		close(opened)
		time.Sleep(handshakerPatience)
	})
}

func TestHandshakers_PanicReachesTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hs := newHandshakers()
		panicOf := func(v any) (got any) {
			defer func() { got = recover() }()
			synctest.Wait() // until the handshaker is idle
			_ = hs.run(func() error { panic(v) })
			return nil
		}
		if got, ok := panicOf("broken").(error); !ok || !strings.HasPrefix(got.Error(), "broken\n\n") || !strings.Contains(got.Error(), "handshakers_test.go") {
			t.Errorf("got the panic %v, want its value and its stack", got)
		}
		if got, _ := panicOf(http.ErrAbortHandler).(error); !errors.Is(got, http.ErrAbortHandler) {
			t.Errorf("got the panic %v, want http.ErrAbortHandler", got)
		}
		synctest.Wait()
		if err := hs.run(func() error { return nil }); err != nil || hs.running.Load() != 1 {
			t.Errorf("got %v and %d handshakers after panics, want the same one", err, hs.running.Load())
		}
		time.Sleep(handshakerPatience)
	})
}

func TestUpgrade_HandshakerMakesTheHandshake(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat\n}")
	eventually(t, "a handshaker", func() bool {
		join(t, "/chat")
		return hubs.handshakers.running.Load() > 0
	})
	eventually(t, "the handshakers to end", func() bool { return hubs.handshakers.running.Load() == 0 })
}
