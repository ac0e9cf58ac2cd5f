package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

// asProgram makes the test binary run as chatbench, because compare starts itself.
const asProgram = "CHATBENCH_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func custom(args ...string) ([]contender, error) {
	f := flag.NewFlagSet("compare", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	added := customFlags(f)
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	return added()
}

func TestCompare_StartsAnotherServer(t *testing.T) {
	if runtime.GOOS != "linux" {
		return // compare measures processes, which only Linux allows
	}
	t.Setenv(asProgram, "yes")
	_, l, closeIt, err := newLauncher("no Caddy")
	if err != nil {
		t.Fatal(err)
	}
	defer closeIt()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	added, err := custom(
		"-server", fmt.Sprintf("mine-tls='%s' serve-floor -listen %s -cert '%s' -key '%s'", l.self, address, l.cert(), l.key()),
		"-url", "wss://"+address+"/{hub}")
	if err != nil {
		t.Fatal(err)
	}
	rows, err := l.compare(t.Context(), plan{
		contenders: added, rounds: 1, duration: 100 * time.Millisecond,
		scenarios: []scenario{
			{name: "saturation-10", args: words("-clients 10 -rate 0 -warmup 0s"), floor: "floor-batched", tls: true},
			{name: "join-burst", command: "join", needs: "history", tls: true},
			{name: "large"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 1 || rows[0].Server != "mine-tls" || rows[0].Median.PerSecond == 0 || rows[0].Median.Faults > 0 {
		t.Errorf("got %+v, want deliveries of mine-tls in saturation-10 only", rows)
	}
	if _, server := basesOf(rows[0]); server != "floor-batched-tls" {
		t.Errorf("its ratios are against %s, want floor-batched-tls", server)
	}
}

func TestCompare_RefusesServersThatItCannotMeasure(t *testing.T) {
	for want, args := range map[string][]string{
		"no -server before it":  {"-url", "ws://localhost:1/{hub}"},
		"has no -url":           {"-server", "mine=true"},
		"not name=command":      {"-server", "mine"},
		"a server of this name": {"-server", "caddy=true", "-url", "ws://localhost:1/{hub}"},
		"must end in -tls":      {"-server", "mine=true", "-url", "wss://localhost:1/{hub}"},
		"need {hub}":            {"-server", "mine=true", "-url", "ws://localhost:1/"},
		"not ws:// or wss://":   {"-server", "mine=true", "-url", "http://localhost:1/{hub}"},
		"and only then":         {"-server", "mine-tls=true", "-url", "ws://localhost:1/{hub}"},
	} {
		if _, err := custom(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: got %v, want %q", args, err, want)
		}
	}
}
