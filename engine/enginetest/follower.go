package enginetest

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A follower is the receiver of one hub. It notes what it gets, and which promise a call breaks.
type follower struct {
	hub    string
	called atomic.Bool // a call runs

	mu       sync.Mutex
	gaps     bool // calls may be lost, because the test provokes it
	opened   bool
	snapshot engine.Snapshot
	passed   []passedEntry
	users    []announcement
	closed   bool  // no call may come
	err      error // the first broken promise
}

// A passedEntry is an entry with its position.
type passedEntry struct {
	engine.Position
	engine.Entry
}

// An announcement is what a call of Receiver.Users has passed.
type announcement struct {
	version uint64
	node    engine.NodeID
	users   []engine.UserCount
}

// Entries implements [engine.Receiver].
func (f *follower) Entries(epoch string, first uint64, entries []engine.Entry) {
	defer f.enter()()
	f.checkEntriesLocked(epoch, first, entries)
	for i, entry := range entries {
		f.passed = append(f.passed, passedEntry{engine.Position{Epoch: epoch, Seq: first + uint64(i)}, entry})
	}
}

func (f *follower) checkEntriesLocked(epoch string, first uint64, entries []engine.Entry) {
	if err := checkEpoch(epoch); err != nil {
		f.breakLocked("a call of Entries: %w", err)
	}
	if len(entries) == 0 || first == 0 {
		f.breakLocked("a call of Entries has %d entries from number %d", len(entries), first)
	}
	last := len(f.passed) - 1
	switch {
	case last < 0:
	case f.passed[last].Epoch == epoch:
		next := f.passed[last].Seq + 1
		if first < next || first > next && !f.gaps {
			f.breakLocked("Entries passed number %d where %d is next", first, next)
		}
	case slices.ContainsFunc(f.passed, func(e passedEntry) bool { return e.Epoch == epoch }):
		f.breakLocked("Entries returned to epoch %s", epoch)
	}
}

// Users implements [engine.Receiver].
func (f *follower) Users(version uint64, node engine.NodeID, users []engine.UserCount) {
	defer f.enter()()
	if last := len(f.users) - 1; last >= 0 && version != 1 { // 1 is the first announcement of an epoch
		next := f.users[last].version + 1
		if version < next || version > next && !f.gaps {
			f.breakLocked("Users passed version %d where %d is next", version, next)
		}
	}
	f.users = append(f.users, announcement{version, node, users})
}

// enter begins a call, and returns what ends it.
func (f *follower) enter() (leave func()) {
	alone := f.called.CompareAndSwap(false, true)
	runtime.Gosched() // so that a second call is likely to be noticed
	f.mu.Lock()
	if !alone {
		f.breakLocked("the session called the receiver twice at the same time")
	}
	if f.closed {
		f.breakLocked("the session called the receiver after Close")
	}
	return func() {
		f.mu.Unlock()
		f.called.Store(false)
	}
}

func (f *follower) breakLocked(format string, args ...any) {
	if f.err == nil {
		f.err = fmt.Errorf("hub %q: "+format, append([]any{f.hub}, args...)...)
	}
}

// begin notes what Open has returned.
func (f *follower) begin(snapshot engine.Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened, f.snapshot = true, snapshot
	if err := checkSnapshot(snapshot); err != nil {
		f.breakLocked("the snapshot of Open: %w", err)
	}
}

// allowGaps says that the test provokes lost calls.
func (f *follower) allowGaps() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gaps = true
}

func (f *follower) expectNothing() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

// verify returns an error if a promise has been broken.
func (f *follower) verify() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil || !f.opened {
		return f.err
	}
	return errors.Join(f.checkTransitionLocked(), f.checkVersionsLocked())
}

// checkTransitionLocked checks that what the receiver got goes on where the snapshot ends.
func (f *follower) checkTransitionLocked() error {
	for i, e := range f.passedInLocked(f.snapshot.Epoch) {
		if i == 0 && e.Seq > f.snapshot.Seq+1 && !f.gaps {
			return fmt.Errorf("hub %q: the snapshot ends with number %d, and the first entry that came later has number %d",
				f.hub, f.snapshot.Seq, e.Seq)
		}
		if e.Seq <= f.snapshot.Base || e.Seq > f.snapshot.Seq {
			continue
		}
		if same := f.snapshot.Entries[e.Seq-f.snapshot.Base-1]; !bytes.Equal(same.Data, e.Data) {
			return fmt.Errorf("hub %q: entry %d is %s in the snapshot and %s in a call", f.hub, e.Seq, quote(same.Data), quote(e.Data))
		}
	}
	return nil
}

func (f *follower) checkVersionsLocked() error {
	if len(f.users) == 0 || f.gaps {
		return nil
	}
	if first := f.users[0].version; first > f.snapshot.Version+1 {
		return fmt.Errorf("hub %q: the snapshot has version %d, and the first announcement that came later has version %d",
			f.hub, f.snapshot.Version, first)
	}
	return nil
}

func (f *follower) passedInLocked(epoch string) []passedEntry {
	var entries []passedEntry
	for _, e := range f.passed {
		if e.Epoch == epoch {
			entries = append(entries, e)
		}
	}
	return entries
}

// log returns everything that the follower has, each entry once: those of the snapshot, and those after it.
func (f *follower) log() []passedEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	log := make([]passedEntry, 0, len(f.snapshot.Entries)+len(f.passed))
	log = append(log, numbered(f.snapshot)...)
	for _, e := range f.passed {
		if e.Epoch != f.snapshot.Epoch || e.Seq > f.snapshot.Seq {
			log = append(log, e)
		}
	}
	return log
}

// numbered returns the entries of a snapshot with their positions.
func numbered(snapshot engine.Snapshot) []passedEntry {
	entries := make([]passedEntry, len(snapshot.Entries))
	for i, entry := range snapshot.Entries {
		entries[i] = passedEntry{engine.Position{Epoch: snapshot.Epoch, Seq: snapshot.Base + uint64(i) + 1}, entry}
	}
	return entries
}

// position returns the position of the newest message that the follower knows of.
func (f *follower) position() engine.Position {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range slices.Backward(f.passed) {
		if e.Epoch != f.snapshot.Epoch || e.Seq > f.snapshot.Seq {
			return e.Position
		}
		break
	}
	return f.snapshot.Position
}

// announcements returns what Users has passed.
func (f *follower) announcements() []announcement {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.users)
}

// await waits until the follower has a position.
func (s *suite) await(f *follower, position engine.Position) {
	s.Helper()
	s.poll(func() error {
		if err := f.verify(); err != nil {
			s.Fatal(err)
		}
		if got := f.position(); got.Epoch != position.Epoch || got.Seq < position.Seq {
			return fmt.Errorf("the receiver of hub %q is at %v, want %v", f.hub, got, position)
		}
		return nil
	})
}

// awaitReceipts waits until the follower has messages that were published.
func (s *suite) awaitReceipts(f *follower, receipts []engine.Receipt) {
	s.Helper()
	for _, r := range receipts {
		s.await(f, r.Position)
	}
}

// wantTexts fails the test if the follower's log is another than the given texts.
func (s *suite) wantTexts(f *follower, want ...string) {
	s.Helper()
	var got []string
	for _, e := range f.log() {
		got = append(got, string(e.Data))
	}
	if !slices.Equal(got, want) {
		s.Errorf("the receiver of hub %q has %q, want %q", f.hub, got, want)
	}
}

var epochs = regexp.MustCompile(`^[a-z0-9]{1,16}$`)

func checkEpoch(epoch string) error {
	if !epochs.MatchString(epoch) {
		return fmt.Errorf("epoch %q is not 1 to 16 lower-case letters and digits", epoch)
	}
	return nil
}

// checkTime returns an error unless a message that was published in this test can have that time. The clock of a server
// may differ.
func checkTime(at time.Time) error {
	if !at.Equal(at.Truncate(time.Millisecond)) {
		return fmt.Errorf("the time %v has more than milliseconds", at)
	}
	if age := time.Since(at); age.Abs() > time.Minute {
		return fmt.Errorf("the time %v of a new message differs from this clock by %v", at, age)
	}
	return nil
}

func checkSnapshot(snapshot engine.Snapshot) error {
	errs := []error{checkEpoch(snapshot.Epoch)}
	if snapshot.Seq != snapshot.Base+uint64(len(snapshot.Entries)) {
		errs = append(errs, fmt.Errorf("a snapshot with Base %d and %d entries has Seq %d",
			snapshot.Base, len(snapshot.Entries), snapshot.Seq))
	}
	for _, entry := range snapshot.Entries {
		errs = append(errs, checkTime(entry.At))
	}
	for node, users := range snapshot.Users {
		for _, u := range users {
			if u.Clients <= 0 {
				errs = append(errs, fmt.Errorf("user %q of node %s has %d clients", u.User, node, u.Clients))
			}
		}
	}
	return errors.Join(errs...)
}

// quote returns data for a message of the test, cut if it is long.
func quote(data []byte) string {
	if len(data) > 40 {
		return fmt.Sprintf("%q… (%d bytes)", data[:40], len(data))
	}
	return fmt.Sprintf("%q", data)
}

// A ledger knows which message each position of a hub names.
type ledger struct {
	mu       sync.Mutex
	messages map[engine.Position]engine.Entry
}

// note returns an error if a position names two messages.
func (l *ledger) note(position engine.Position, entry engine.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	before, known := l.messages[position]
	if !known {
		if l.messages == nil {
			l.messages = map[engine.Position]engine.Entry{}
		}
		l.messages[position] = entry
		return nil
	}
	if !bytes.Equal(before.Data, entry.Data) || !before.At.Equal(entry.At) {
		return fmt.Errorf("position %v names %s of %v and %s of %v",
			position, quote(before.Data), before.At, quote(entry.Data), entry.At)
	}
	return nil
}

// noteReceipts notes what receipts say about messages that were published now.
func (l *ledger) noteReceipts(messages []engine.Message, receipts []engine.Receipt) error {
	var errs []error
	for i, r := range receipts {
		if !r.Repeated && !r.Unknown {
			errs = append(errs, l.note(r.Position, engine.Entry{At: r.At, Data: messages[i].Data}))
		}
	}
	return errors.Join(errs...)
}

// noteEntries notes entries that a follower has got.
func (l *ledger) noteEntries(entries []passedEntry) error {
	var errs []error
	for _, e := range entries {
		errs = append(errs, l.note(e.Position, e.Entry))
	}
	return errors.Join(errs...)
}

// len returns how many messages the ledger knows.
func (l *ledger) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.messages)
}

// wantDense returns an error unless the ledger knows the messages of the epoch from 1 to last, and no others.
func (l *ledger) wantDense(epoch string, last uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for seq := uint64(1); seq <= last; seq++ {
		if _, known := l.messages[engine.Position{Epoch: epoch, Seq: seq}]; !known {
			return fmt.Errorf("number %d of %d was never given to a message", seq, last)
		}
	}
	if len(l.messages) != int(last) {
		return fmt.Errorf("%d messages have numbers up to %d", len(l.messages), last)
	}
	return nil
}
