package main

import (
	"net/http/httptest"
	"runtime"
	"testing"
	"time"
)

func TestRun_SpinningIsNotTheToolsWork(t *testing.T) {
	server := httptest.NewServer(&floor{})
	defer server.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l, err := newLoad(shortRun(server.URL))
	if err != nil {
		t.Fatal(err)
	}
	defer l.engine.close()
	if err := l.connect(t.Context(), 0, l.clients, l.place); err != nil {
		t.Fatal(err)
	}
	l.spin = true
	start := threadTime()
	l.runFor(300*time.Millisecond, "", func() bool { return false })
	if all := threadTime() - start; l.spun < all/2 || l.spun > all {
		t.Errorf("an idle load span for %v of %v", l.spun, all)
	}
}
