package enginetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.uber.org/goleak"
)

// A Harness is an engine to test. The engine has no hubs at first, and shares them with no other Harness.
type Harness struct {
	// Connect starts a session, as [engine.Engine] does. The suite closes it. Each session of an [engine.Cluster] is a
	// node of the same cluster. The suite has only one session at a time if the engine is not a cluster.
	Connect func(engine.Monitor) (engine.Session, error)

	// Persistent says that the hubs outlive the last session.
	Persistent bool

	// MaxMessageSize is the size of the largest message in the tests. The default is 1 MiB.
	MaxMessageSize int

	// Kill ends a session as if its process was killed. The suite does not close the session afterwards. Without Kill
	// the suite does not test this.
	Kill func(engine.Session)

	// Interrupt makes the engine unreachable until restore, without a loss of data: for all sessions, and for those that
	// start meanwhile. Without Interrupt the suite does not test this.
	Interrupt func() (restore func())

	// Wipe makes the engine lose all data, while sessions run. Without Wipe the suite does not test this.
	Wipe func()
}

// Run tests an engine. It runs one subtest for each promise of package engine, and calls start at the beginning of each.
// The subtests run in parallel. What start opens, it closes with t.Cleanup.
//
// The tests of an [engine.Cluster] take about 20 seconds, because one of them waits for the end of a lease.
func Run(t *testing.T, start func(t testing.TB) Harness) {
	t.Helper()
	checks := checksOf(inspect(t, start))
	before := goleak.IgnoreCurrent()
	t.Run("Session", func(t *testing.T) { // ends after the parallel tests in it
		for _, c := range checks {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.test(t, start)
			})
		}
	})
	t.Run("Close_LeavesNoGoroutines", func(t *testing.T) {
		if err := goleak.Find(before); err != nil {
			t.Errorf("all sessions are closed, but some of their goroutines run: %v", err)
		}
	})
}

// RunInBubble does what [Run] does, with each subtest in a bubble of testing/synctest, so that it never waits. It is for
// engines without I/O. A goroutine that outlives its session fails the subtest.
func RunInBubble(t *testing.T, start func(t testing.TB) Harness) {
	t.Helper()
	var a abilities
	synctest.Test(t, func(t *testing.T) { a = inspect(t, start) })
	t.Run("Session", func(t *testing.T) {
		for _, c := range checksOf(a) {
			t.Run(c.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { c.test(t, start) })
			})
		}
	})
}

// A check tests one promise.
type check struct {
	name string
	run  func(*suite)
}

func (c check) test(t testing.TB, start func(t testing.TB) Harness) {
	t.Helper()
	s := &suite{TB: t, Harness: start(t)}
	if s.MaxMessageSize == 0 {
		s.MaxMessageSize = 1 << 20
	}
	c.run(s)
}

// abilities say which checks an engine has to pass.
type abilities struct{ cluster, persistent, kill, interrupt, wipe bool }

// inspect finds out what an engine can do.
func inspect(t testing.TB, start func(t testing.TB) Harness) abilities {
	t.Helper()
	h := start(t)
	session, err := h.Connect(&monitor{})
	if err != nil {
		t.Fatalf("Connect returned %v", err)
	}
	_, cluster := session.(engine.Cluster)
	if err := session.Close(); err != nil {
		t.Fatalf("Close returned %v", err)
	}
	a := abilities{
		cluster:    cluster,
		persistent: h.Persistent,
		kill:       h.Kill != nil,
		interrupt:  h.Interrupt != nil,
		wipe:       h.Wipe != nil,
	}
	t.Logf("what the tests assume of the engine: %+v", a)
	return a
}

// checksOf returns what an engine with these abilities has to pass.
func checksOf(a abilities) []check {
	checks := append(sessionChecks(), boundsChecks()...)
	if a.cluster {
		checks = append(checks, clusterChecks()...)
	}
	if a.persistent {
		checks = append(checks, restartChecks()...)
	}
	if a.kill {
		checks = append(checks, killChecks(a)...)
	}
	if a.interrupt {
		checks = append(checks, interruptChecks()...)
	}
	if a.wipe {
		checks = append(checks, wipeChecks(a)...)
	}
	return checks
}

// patience is how long the suite waits for what must happen.
const patience = 10 * time.Second

// A suite is what a check works with.
type suite struct {
	testing.TB
	Harness

	count atomic.Int64 // of the texts and keys so far
}

// poll waits until the condition returns nil, and fails the test if it does not.
func (s *suite) poll(condition func() error) {
	s.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("after %v: %v", patience, err)
		}
		time.Sleep(time.Millisecond)
	}
}

// parallel runs functions at the same time, waits for all of them, and fails the test if one returns an error.
func (s *suite) parallel(functions ...func() error) {
	s.Helper()
	if err := runAll(functions); err != nil {
		s.Fatal(err)
	}
}

// runAll runs functions at the same time, waits for all of them, and returns their errors.
func runAll(functions []func() error) error {
	var wg sync.WaitGroup
	errs := make([]error, len(functions))
	for i, f := range functions {
		// The function ends it, and this one waits for it.
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// pause waits for less than a millisecond.
func (s *suite) pause() { time.Sleep(rand.N(time.Millisecond)) }

// text returns a text that the test has not had.
func (s *suite) text() string { return fmt.Sprint("message ", s.count.Add(1)) }

// key returns a key that the test has not had.
func (s *suite) key() (k engine.Key) {
	copy(k[:], fmt.Sprint("key ", s.count.Add(1)))
	return k
}

// messages returns n messages without a key.
func (s *suite) messages(n int) []engine.Message {
	messages := make([]engine.Message, n)
	for i := range messages {
		messages[i].Data = []byte(s.text())
	}
	return messages
}

// keyed returns n messages with a key.
func (s *suite) keyed(n int) []engine.Message {
	messages := s.messages(n)
	for i := range messages {
		messages[i].Key = s.key()
	}
	return messages
}

func texts(texts ...string) []engine.Message {
	messages := make([]engine.Message, len(texts))
	for i, text := range texts {
		messages[i].Data = []byte(text)
	}
	return messages
}
