package fileengine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.uber.org/goleak"
)

// TestMain runs the tests, or in a child process what a test wants of it.
func TestMain(m *testing.M) {
	if role := os.Getenv("FILEENGINE_CHILD"); role != "" {
		runChild(role)
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

// testBounds are bounds that no test exceeds unless it wants to.
var testBounds = engine.Bounds{Messages: 1000, Bytes: 1 << 20, Age: time.Hour, Receipts: 1000}

// A monitor records what a session reports.
type monitor struct {
	mu     sync.Mutex
	states []error
	warned []string
}

func (m *monitor) State(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.states = append(m.states, err)
}

func (m *monitor) Warn(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.warned = append(m.warned, text)
}

func (m *monitor) reported() []error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.states)
}

func (m *monitor) warnings() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.warned)
}

// A receiver records the entries that it gets.
type receiver struct {
	mu      sync.Mutex
	epochs  []string
	numbers []uint64
	data    []string
}

func (r *receiver) Entries(epoch string, first uint64, entries []engine.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, e := range entries {
		r.epochs = append(r.epochs, epoch)
		r.numbers = append(r.numbers, first+uint64(i))
		r.data = append(r.data, string(e.Data))
	}
}

func (r *receiver) Users(uint64, engine.NodeID, []engine.UserCount) {}

func (r *receiver) received() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.data)
}

// A clock is the time of a session under test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.UnixMilli(1_700_000_000_000)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// open opens a session, which ends with the test.
func open(t testing.TB, folder string) *Session {
	t.Helper()
	return openAt(t, folder, time.Now)
}

// openAt is open with a clock.
func openAt(t testing.TB, folder string, now func() time.Time) *Session {
	t.Helper()
	return startOn(t, openTestFile(t, folder), &monitor{}, now)
}

func openTestFile(t testing.TB, folder string) *file {
	t.Helper()
	f, err := openFile(folder)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func startOn(t testing.TB, f *file, m *monitor, now func() time.Time) *Session {
	t.Helper()
	s := start(f, m, now)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing the session: %v", err)
		}
	})
	return s
}

// closeSession ends a session before the test ends.
func closeSession(t testing.TB, s *Session) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// messages returns messages without keys.
func messages(data ...string) []engine.Message {
	var messages []engine.Message
	for _, d := range data {
		messages = append(messages, engine.Message{Data: []byte(d)})
	}
	return messages
}

// publish publishes messages without keys.
func publish(t testing.TB, s *Session, hub string, data ...string) []engine.Receipt {
	t.Helper()
	return publishBatch(t, s, hub, engine.Batch{Bounds: testBounds, Messages: messages(data...)})
}

func publishBatch(t testing.TB, s *Session, hub string, batch engine.Batch) []engine.Receipt {
	t.Helper()
	receipts, err := s.Publish(t.Context(), hub, batch)
	if err != nil {
		t.Fatalf("publishing in %s: %v", hub, err)
	}
	return receipts
}

// publishKeyed publishes one message with a key.
func publishKeyed(t testing.TB, s *Session, hub string, bounds engine.Bounds, key byte, attempt engine.Attempt) engine.Receipt {
	t.Helper()
	m := engine.Message{Data: fmt.Appendf(nil, "keyed %d", key), Key: engine.Key{key}, Attempt: attempt}
	return publishBatch(t, s, hub, engine.Batch{Bounds: bounds, Messages: []engine.Message{m}})[0]
}

// openHub opens a hub that nothing is to be received of.
func openHub(t testing.TB, s *Session, hub string) engine.Snapshot {
	t.Helper()
	return openHubWith(t, s, hub, testBounds, &receiver{})
}

func openHubWith(t testing.TB, s *Session, hub string, bounds engine.Bounds, to engine.Receiver) engine.Snapshot {
	t.Helper()
	snapshot, err := s.Open(t.Context(), hub, bounds, to)
	if err != nil {
		t.Fatalf("opening %s: %v", hub, err)
	}
	return snapshot
}

// look opens a hub and leaves it.
func look(t testing.TB, s *Session, hub string) engine.Snapshot {
	t.Helper()
	return lookWith(t, s, hub, testBounds)
}

func lookWith(t testing.TB, s *Session, hub string, bounds engine.Bounds) engine.Snapshot {
	t.Helper()
	to := &receiver{}
	defer s.Leave(hub, to)
	return openHubWith(t, s, hub, bounds, to)
}

// dataOf returns the data of a snapshot.
func dataOf(snapshot engine.Snapshot) []string {
	var data []string
	for _, e := range snapshot.Entries {
		data = append(data, string(e.Data))
	}
	return data
}

// dbPath returns the path of the file in a folder.
func dbPath(folder string) string { return filepath.Join(folder, fileName) }

// inCommitter runs fn in the committer.
func inCommitter(t testing.TB, s *Session, fn func()) {
	t.Helper()
	if err := s.call(context.Background(), fn); err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// mustBeUnavailable checks that an error says that nothing was published.
func mustBeUnavailable(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("got error %v, want one that wraps %q", err, engine.ErrUnavailable)
	}
}

// mustBeUnknown checks that an error leaves open whether anything was published.
func mustBeUnknown(t testing.TB, err error) {
	t.Helper()
	if err == nil || errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("got error %v, want one that leaves open whether anything was published", err)
	}
}
