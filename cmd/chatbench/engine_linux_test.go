package main

import (
	"net/http/httptest"
	"os"
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
		t.Errorf("an idle load spun for %v of %v", l.spun, all)
	}
}

func TestUsage_CountsLessThanATick(t *testing.T) {
	before, err := readUsage(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	after, err := readUsage(os.Getpid())
	if used := after.cpu - before.cpu; err != nil || used <= 0 || after.resident <= 0 || after.peak < after.resident {
		t.Errorf("reading the usage took %v, and it is %+v, %v", used, after, err)
	}
	if _, err := readUsage(1 << 30); err == nil {
		t.Error("a process that does not exist has a usage")
	}
}
