package hub

import (
	"context"
	"errors"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// arrivals are what a hub gets from its engine. The hub applies an entry only if its number is the next one. A lower
// number is one that it has. A higher number means that it has missed some, and it fetches them. The hub's lock guards
// it.
type arrivals struct {
	opening bool // the snapshot is not there yet
	early   []earlyEntries
	bytes   int    // of early
	users   uint64 // the newest version of the users that came early

	behind    bool          // the hub has missed something that only the engine has
	repairing bool          // a goroutine runs repair
	fetched   chan struct{} // if somebody waits: closed when repair has tried once more
	reset     bool          // the hub's epoch is over

	awaited uint64        // if arrived is set: the number of the message that it stands for
	arrived chan struct{} // if the outbox waits: closed when the hub has the awaited message
}

// earlyEntries came while the hub was opening.
type earlyEntries struct {
	epoch   string
	first   uint64
	entries []engine.Entry
}

const (
	// maxEarly bounds the entries that a hub keeps while it is opening, in bytes. It fetches those beyond that.
	maxEarly = 4 << 20

	// arrivalPatience is how long a published message may take to come back before the hub fetches it.
	arrivalPatience = 100 * time.Millisecond

	// readTimeout bounds one attempt to fetch what a hub has missed.
	readTimeout = 5 * time.Second
)

// Load returns a hub whose messages get their numbers from a session. It has the messages that the engine keeps, within
// the bounds of the given settings. Close ends the hub, and what it has open in the session.
func Load(ctx context.Context, p *Process, name string, session engine.Session, settings *Settings) (*Hub, error) {
	b := New(p, name)
	b.session = session
	if b.cluster, _ = session.(engine.Cluster); b.cluster != nil {
		b.node = b.cluster.ID() // here, because no lock may be held
	}
	b.arrivals.opening = true
	b.mu.Lock()
	b.growHistoryLocked(settings)
	bounds := b.boundsLocked()
	b.mu.Unlock()
	snapshot, err := session.Open(ctx, name, bounds, b)
	if err == nil && !isWhole(&snapshot) {
		err = errSnapshot
	}
	if err != nil {
		session.Leave(name, b)
		return nil, err
	}
	b.mu.Lock()
	b.loadLocked(&snapshot)
	b.mu.Unlock()
	return b, nil
}

// errSnapshot is a bug of an engine.
var errSnapshot = errors.New("the engine has answered with too few or too many messages")

func isWhole(s *engine.Snapshot) bool { return s.Base+uint64(len(s.Entries)) == s.Seq }

// loadLocked begins the hub with a snapshot, and with what has come since.
func (b *Hub) loadLocked(s *engine.Snapshot) {
	var w work // the hub has no clients
	b.epoch, b.began = s.Epoch, s.Before.Seq
	b.raw.Begin(s.Base)
	b.history.first = s.Base
	b.applyEntriesLocked(s.Base+1, s.Entries, &w)
	b.replaceUsersLocked(s, b.othersIn(s))
	b.arrivals.opening = false
	for _, e := range b.arrivals.early {
		b.arriveEntriesLocked(e.epoch, e.first, e.entries, &w)
	}
	b.arrivals.early, b.arrivals.bytes = nil, 0
	if b.arrivals.behind || b.arrivals.users > b.remote.version {
		b.fallBehindLocked()
	}
	b.restLocked()
}

// Entries implements engine.Receiver.
func (b *Hub) Entries(epoch string, first uint64, entries []engine.Entry) {
	var w work
	b.mu.Lock()
	if b.arrivals.opening {
		b.keepEarlyLocked(epoch, first, entries)
	} else {
		b.arriveEntriesLocked(epoch, first, entries, &w)
	}
	b.mu.Unlock()
	b.deliver(&w)
	b.process.Published()
}

// keepEarlyLocked keeps entries until the hub is open.
func (b *Hub) keepEarlyLocked(epoch string, first uint64, entries []engine.Entry) {
	a := &b.arrivals
	for _, e := range entries {
		a.bytes += len(e.Data)
	}
	if a.bytes > maxEarly && b.cluster != nil {
		a.early = nil
		a.behind = true
		return
	}
	a.early = append(a.early, earlyEntries{epoch, first, entries})
}

// arriveEntriesLocked applies the entries that are next, and has the hub fetch what is missing before them.
func (b *Hub) arriveEntriesLocked(epoch string, first uint64, entries []engine.Entry, w *work) {
	next := b.raw.Head() + 1
	switch {
	case b.closed || b.arrivals.reset:
	case epoch != b.epoch:
		b.fallBehindLocked()
	case first+uint64(len(entries)) <= next: // the hub has them
	case first > next:
		b.fallBehindLocked()
	case b.cluster != nil && (b.mustWaitLocked() || b.stepLocked(entries) < len(entries)):
		b.fallBehindLocked() // clients here need a moment, and repair can wait for them
	default:
		b.applyEntriesLocked(next, entries[next-first:], w)
	}
}

// stepLocked returns how many of some entries may be applied at once: at most a quarter of what clients may fall behind.
func (b *Hub) stepLocked(entries []engine.Entry) (n int) {
	messages, bytes := max(b.bufferMessages/4, 1), b.bufferBytes/4
	for _, e := range entries {
		bytes -= len(e.Data)
		if n == messages || n > 0 && bytes < 0 {
			break
		}
		n++
	}
	return n
}

// applyEntriesLocked applies entries, of which the first has the next number.
func (b *Hub) applyEntriesLocked(first uint64, entries []engine.Entry, w *work) {
	for i, e := range entries {
		m := Message{}
		var err error
		if m.Message, err = decodeEntry(e.Data); err != nil {
			b.skipToLocked(first + uint64(i)) // of a later version; it counts as missed
			continue
		}
		m.Seq, m.At = first+uint64(i), e.At
		b.appendLocked(&m)
	}
	if len(entries) > 0 {
		b.appendedLocked(w)
		w.taps = b.taps
	}
	if a := &b.arrivals; a.arrived != nil && a.awaited <= b.raw.Head() {
		close(a.arrived)
		a.arrived = nil
	}
}

// awaitArrival waits for a message that the engine has published. So a sender that has its answer finds the message in the
// hub of this node. If the message takes long the hub fetches it, and the sender waits no longer.
func (b *Hub) awaitArrival(p engine.Position) {
	b.mu.Lock()
	if b.closed || b.arrivals.reset || p.Epoch != b.epoch || p.Seq <= b.raw.Head() {
		b.mu.Unlock()
		return
	}
	arrived := make(chan struct{})
	b.arrivals.awaited, b.arrivals.arrived = p.Seq, arrived
	b.mu.Unlock()
	patience := time.NewTimer(arrivalPatience)
	defer patience.Stop()
	select {
	case <-arrived:
		return
	case <-patience.C:
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.arrivals.arrived = nil
	if p.Seq > b.raw.Head() {
		b.fallBehindLocked()
	}
}

// skipToLocked goes on behind the message with the given number, which the hub will never have. Clients that lack it have
// lagged.
func (b *Hub) skipToLocked(seq uint64) {
	missed := seq - b.raw.Head()
	for _, f := range b.feeds {
		f.Skip(missed)
	}
	h := &b.history
	h.first, h.records, h.users = b.raw.Head(), nil, 0
}

// fallBehindLocked has the hub fetch what it has missed.
func (b *Hub) fallBehindLocked() {
	b.arrivals.behind = true
	if b.arrivals.repairing || b.arrivals.opening {
		return
	}
	b.arrivals.repairing = true
	go b.repair() // ends when the hub has everything, or when the engine fails; nobody waits for it
}

// repair fetches what the hub has missed, until it has everything. If the engine fails, the next renewal or message
// starts it again. Where there is nothing to fetch from, the hub begins again.
func (b *Hub) repair() {
	for b.beginRepair() {
		if b.cluster == nil {
			b.end()
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
		snapshot, err := b.cluster.Read(ctx, b.name, b.position())
		cancel()
		ok := err == nil && isWhole(&snapshot)
		if ok {
			b.catchUp(&snapshot)
		}
		if !b.endRepair(ok) {
			return
		}
	}
}

// beginRepair reports whether there is something to fetch. If not, the goroutine of repair must end.
func (b *Hub) beginRepair() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	a := &b.arrivals
	a.repairing = a.behind && !a.reset && !b.closed
	a.behind = false
	if !a.repairing {
		b.releaseJoinsLocked()
	}
	return a.repairing
}

// endRepair ends one attempt. It returns false after a failure: then the goroutine of repair must end.
func (b *Hub) endRepair(ok bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ok {
		b.arrivals.behind, b.arrivals.repairing = true, false
	}
	b.releaseJoinsLocked()
	return ok
}

// releaseJoinsLocked wakes those that wait in awaitSince.
func (b *Hub) releaseJoinsLocked() {
	if b.arrivals.fetched != nil {
		close(b.arrivals.fetched)
		b.arrivals.fetched = nil
	}
}

// awaitSince fetches what the hub lacks if a client has already had more, on another node. Otherwise the client would get
// messages again. It tries twice, because the first attempt may have begun too early. It returns ErrUnavailable if the
// engine fails.
func (b *Hub) awaitSince(r *Resumption) error {
	for range 2 {
		b.mu.Lock()
		if !b.lacksLocked(r) {
			b.mu.Unlock()
			return nil
		}
		if b.arrivals.fetched == nil {
			b.arrivals.fetched = make(chan struct{})
		}
		fetched := b.arrivals.fetched
		b.fallBehindLocked()
		b.mu.Unlock()
		<-fetched
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.arrivals.behind && b.lacksLocked(r) {
		return ErrUnavailable
	}
	return nil
}

// lacksLocked reports whether the engine may have a message that a client has and the hub has not.
func (b *Hub) lacksLocked(r *Resumption) bool {
	return b.cluster != nil && !b.closed && !b.arrivals.reset && r != nil && r.Epoch == b.epoch && r.Seq > b.raw.Head()
}

// catchUp applies what the hub lacks of a snapshot, as fast as clients that do read can take it. If the hub's epoch is
// over, it ends the hub after what is still of that epoch.
func (b *Hub) catchUp(s *engine.Snapshot) {
	b.mu.Lock()
	same, last := s.Epoch == b.epoch, s.Seq
	if !same {
		last = 0 // where nobody knows, a number may name two messages
		if s.Before.Epoch == b.epoch {
			last = min(s.Before.Seq, s.Seq)
		}
	}
	b.mu.Unlock()
	if same {
		b.skipTo(s.Base)
	}
	for b.catchUpStep(s, last) {
	}
	if !same {
		b.end()
		return
	}
	now := b.othersIn(s)
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.Version > b.remote.version {
		b.replaceUsersLocked(s, now)
	}
}

// skipTo goes on behind the message with the given number, unless the hub has it. Clients that lack it have lagged.
func (b *Hub) skipTo(seq uint64) {
	var w work
	b.mu.Lock()
	if !b.closed && seq > b.raw.Head() {
		b.skipToLocked(seq)
		b.appendedLocked(&w) // wakes the clients
	}
	b.mu.Unlock()
	b.deliver(&w)
}

// catchUpStep applies the next messages of a snapshot, up to the given one, as stepLocked says. It returns false if there
// are none.
func (b *Hub) catchUpStep(s *engine.Snapshot, last uint64) bool {
	var w work
	b.lockInTurn()
	next := b.raw.Head() + 1
	if b.closed || next <= s.Base || next > last {
		b.mu.Unlock()
		return false
	}
	some := s.Entries[next-s.Base-1 : last-s.Base]
	some = some[:b.stepLocked(some)]
	b.applyEntriesLocked(next, some, &w)
	b.mu.Unlock()
	b.process.Counters.Repaired.Add(uint64(len(some)))
	b.deliver(&w)
	b.process.Published()
	return true
}

// end ends the hub because its epoch is over: clients must learn that the numbers which they know count no more.
func (b *Hub) end() {
	b.mu.Lock()
	first := !b.arrivals.reset && !b.closed
	b.arrivals.reset = true
	b.mu.Unlock()
	if first {
		b.process.Counters.Epochs.Add(1)
		b.process.Reset(b)
	}
}

// Renewed tells a hub what its engine has: it fetches what it lacks.
func (b *Hub) Renewed(k engine.Known) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k.Epoch != b.epoch || k.Seq > b.raw.Head() || k.Version > b.remote.version {
		b.fallBehindLocked()
	}
}

func (b *Hub) position() engine.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.positionLocked()
}

// Known returns what the hub has of its engine's.
func (b *Hub) Known() engine.Known {
	b.mu.Lock()
	defer b.mu.Unlock()
	return engine.Known{Hub: b.name, Position: b.positionLocked(), Version: b.remote.version, Bounds: b.boundsLocked()}
}

// IsOf reports whether the given session numbers the messages of the hub.
func (b *Hub) IsOf(s engine.Session) bool { return b.session == s }
