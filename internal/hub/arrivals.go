package hub

import (
	"context"
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

	behind    bool // the hub has missed something that only the engine has
	repairing bool // a goroutine runs repair
	reset     bool // the hub's epoch is over
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

	// readTimeout bounds one attempt to fetch what a hub has missed.
	readTimeout = 5 * time.Second
)

// Load returns a hub whose messages get their numbers from a session. It has the messages that the engine keeps, within
// the bounds of the given settings. Close ends the hub, and what it has open in the session.
func Load(ctx context.Context, p *Process, name string, session engine.Session, settings *Settings) (*Hub, error) {
	b := New(p, name)
	b.session = session
	b.cluster, _ = session.(engine.Cluster)
	b.arrivals.opening = true
	b.mu.Lock()
	b.growHistoryLocked(settings)
	bounds := b.boundsLocked()
	b.mu.Unlock()
	snapshot, err := session.Open(ctx, name, bounds, b)
	if err != nil {
		session.Leave(name, b)
		return nil, err
	}
	b.mu.Lock()
	b.loadLocked(&snapshot)
	b.mu.Unlock()
	return b, nil
}

// loadLocked begins the hub with a snapshot, and with what has come since.
func (b *Hub) loadLocked(s *engine.Snapshot) {
	var w work // the hub has no clients
	b.epoch = s.Epoch
	b.raw.Begin(s.Base)
	b.history.first = s.Base
	b.applyEntriesLocked(s.Base+1, s.Entries, &w)
	b.setUsersLocked(s)
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
	case epoch != b.epoch || first > next:
		b.fallBehindLocked()
	case b.cluster != nil && b.mustWaitLocked(): // clients here need a moment, and repair can wait for them
		b.fallBehindLocked()
	case first+uint64(len(entries)) > next:
		b.applyEntriesLocked(next, entries[next-first:], w)
	}
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
	if b.cluster == nil || b.arrivals.repairing || b.arrivals.opening {
		return
	}
	b.arrivals.repairing = true
	go b.repair() // ends when the hub has everything, or when the engine fails; nobody waits for it
}

// repair fetches what the hub has missed, until it has everything. If the engine fails, the next renewal or message
// starts it again.
func (b *Hub) repair() {
	for {
		b.mu.Lock()
		a := &b.arrivals
		if b.closed || a.reset || !a.behind {
			a.repairing = false
			b.mu.Unlock()
			return
		}
		a.behind = false
		have := b.positionLocked()
		b.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
		snapshot, err := b.cluster.Read(ctx, b.name, have)
		cancel()
		if err != nil {
			b.mu.Lock()
			a.behind, a.repairing = true, false
			b.mu.Unlock()
			return
		}
		b.catchUp(&snapshot)
	}
}

// catchUp applies what the hub lacks of a snapshot, as fast as clients that do read can take it. If the hub's epoch is
// over, it ends the hub: clients must learn that the numbers which they know count no more.
func (b *Hub) catchUp(s *engine.Snapshot) {
	b.mu.Lock()
	same := s.Epoch == b.epoch
	if missed := s.Base > b.raw.Head(); missed && same {
		var w work
		b.skipToLocked(s.Base)
		b.appendedLocked(&w) // wakes the clients, which have all lagged
		b.mu.Unlock()
		b.deliver(&w)
		b.mu.Lock()
	}
	continues := s.Base <= b.raw.Head() // otherwise the new epoch's numbers have nothing to do with the old
	b.mu.Unlock()
	for continues && b.catchUpStep(s) {
	}
	b.mu.Lock()
	reset := !same && !b.arrivals.reset
	if reset {
		b.arrivals.reset = true
	} else if same {
		b.replaceUsersLocked(s)
	}
	b.mu.Unlock()
	if reset {
		b.process.Counters.Epochs.Add(1)
		b.process.Reset(b)
	}
}

// catchUpStep applies the next messages of a snapshot: at most a quarter of what clients may fall behind. It returns false if
// there are none.
func (b *Hub) catchUpStep(s *engine.Snapshot) bool {
	var w work
	b.lockInTurn()
	next := b.raw.Head() + 1
	if b.closed || next > s.Seq {
		b.mu.Unlock()
		return false
	}
	some := s.Entries[next-s.Base-1:]
	n, size := 1, len(some[0].Data)
	for n < min(len(some), b.bufferMessages/4) && size+len(some[n].Data) <= b.bufferBytes/4 {
		size += len(some[n].Data)
		n++
	}
	b.applyEntriesLocked(next, some[:n], &w)
	b.mu.Unlock()
	b.deliver(&w)
	b.process.Published()
	b.process.Counters.Repaired.Add(uint64(n))
	return true
}

// Renewed tells a hub what its engine has: it fetches what it lacks.
func (b *Hub) Renewed(k engine.Known) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed && (k.Position != b.positionLocked() || k.Version != b.remote.version) {
		b.fallBehindLocked()
	}
}

// Known returns what the hub has of its engine's.
func (b *Hub) Known() engine.Known {
	b.mu.Lock()
	defer b.mu.Unlock()
	return engine.Known{Hub: b.name, Position: b.positionLocked(), Version: b.remote.version, Bounds: b.boundsLocked()}
}

// IsOf reports whether the given session numbers the messages of the hub.
func (b *Hub) IsOf(s engine.Session) bool { return b.session == s }
