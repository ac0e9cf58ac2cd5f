package hub

import (
	"math"
	"runtime"
	"slices"
	"time"
)

// A turn is a woken client's claim to be served. It begins when a message wakes the client. It ends when the client has
// everything, or turns out not to read. Senders wait for open turns, never for slow clients.
type turn int8

const (
	turnNone   turn = iota // idle, or known to be slow
	turnQueued             // a flusher serves it, or will
	turnWriter             // its own writer serves it: its socket was full, or cannot write without waiting
)

// turns are a hub's flushers and the queue of clients that they serve. The hub's lock guards them. A flusher is a
// goroutine that serves one woken client after the other. It writes only as much as a connection takes without waiting;
// for the rest the client gets a writer of its own. So a few flushers serve thousands of clients, and no client holds a
// flusher up.
//
// Where an attempt to write is not exact, as above TLS, it may wait after all. Such a flusher is relieved: it goes on as
// the writer of that client alone, and another flusher serves the queue.
type turns struct {
	first, last *Client // the queue of clients with turnQueued, oldest first
	queued      int
	flushers    int
	open        int           // turns that have not ended
	allEnded    chan struct{} // if senders wait: closed when open is 0

	watch *watch // nil before the first attempt that is not exact
}

// A watch has the attempts that flushers make now and may have to wait for.
type watch struct {
	attempts []attempting
	timer    *time.Timer // calls relieveFlushers
	runs     bool        // timer runs
	distrust time.Time   // until then flushers attempt nothing that is not exact
}

// An attempting is an attempt of a flusher to write to a client whose connection is not exact.
type attempting struct {
	client *Client
	stood  bool // it was there when relieveFlushers looked last
}

// flusherPatience is how long an attempt may take before its flusher is relieved: once to twice as long. A TLS record takes
// 10 µs, and a relief for nothing costs a goroutine.
const flusherPatience = 5 * time.Millisecond

// distrustTime is how long a hub makes no attempts that are not exact after one had to wait. What made it wait may befall the next
// ones: many hostile clients, or a kernel without memory for sockets. So all of them together hold up a hub for 1 % of the time.
const distrustTime = time.Second

// clientsPerFlusher is how many queued clients make another flusher worth its start, as long as a processor is free for
// it. Writing to so many takes a few hundred microseconds.
const clientsPerFlusher = 64

// writerPatience is how often waiting senders check whether a client with its own writer is blocked. A sender that is
// far ahead loses up to twice that each time such a client gets stuck.
const writerPatience = 10 * time.Millisecond

// maxLooks bounds these checks, for a connection that is slow without being blocked: half a second in all.
const maxLooks = 50

// beginTurnLocked begins c's turn, or changes how it goes on.
func (b *Hub) beginTurnLocked(c *Client, t turn) {
	if c.turn == turnNone {
		b.turns.open++
	}
	c.turn, c.looked = t, math.MaxUint64
}

// queueLocked puts c at the end of the queue, and begins its turn if it has none.
func (b *Hub) queueLocked(c *Client) {
	b.beginTurnLocked(c, turnQueued)
	if b.turns.last == nil {
		b.turns.first = c
	} else {
		b.turns.last.nextTurn = c
	}
	b.turns.last = c
	b.turns.queued++
}

// dequeueLocked takes the first client out of the queue, or returns nil.
func (b *Hub) dequeueLocked() *Client {
	c := b.turns.first
	if c == nil {
		return nil
	}
	b.turns.first, c.nextTurn = c.nextTurn, nil
	if b.turns.first == nil {
		b.turns.last = nil
	}
	b.turns.queued--
	return c
}

// endTurnLocked ends c's turn, if it has one.
func (b *Hub) endTurnLocked(c *Client) {
	if c.turn == turnNone {
		return
	}
	c.turn = turnNone
	b.turns.open--
	if b.turns.open > 0 {
		return
	}
	for _, f := range b.feeds {
		f.CaughtUp()
	}
	if b.turns.allEnded != nil {
		close(b.turns.allEnded)
		b.turns.allEnded = nil
	}
}

// lockInTurn locks the hub for a sender. It returns how long the sender had to wait. It waits while turns are open and
// more than a quarter of the buffer was appended since all turns had ended. Otherwise senders would run away from
// clients that do read and only had no turn yet. A blocked client has no turn, so it delays no sender.
func (b *Hub) lockInTurn() (waited time.Duration) {
	b.mu.Lock()
	if !b.mustWaitLocked() {
		return 0
	}
	began := time.Now()
	for looks := 1; b.mustWaitLocked(); {
		if b.turns.allEnded == nil {
			b.turns.allEnded = make(chan struct{})
		}
		allEnded := b.turns.allEnded
		b.mu.Unlock()
		patience := time.NewTimer(writerPatience)
		select {
		case <-allEnded:
		case <-patience.C:
			b.endBlockedTurns(looks >= maxLooks)
			looks++
		}
		patience.Stop()
		b.mu.Lock()
	}
	return time.Since(began)
}

// mustWaitLocked reports whether senders must wait for turns.
func (b *Hub) mustWaitLocked() bool {
	if b.turns.open == 0 {
		return false
	}
	for _, f := range b.feeds {
		if f.Ahead() {
			return true
		}
	}
	return false
}

// endBlockedTurns ends the turns of clients whose own writers are blocked and have not moved since the last call. With
// all it ends the turns of all clients with their own writers.
func (b *Hub) endBlockedTurns(all bool) {
	var blocked []*Client
	for _, c := range b.standingWriters(all) {
		if all || !c.Writable() {
			blocked = append(blocked, c)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range blocked {
		if c.turn == turnWriter {
			b.endTurnLocked(c)
		}
	}
}

// standingWriters returns the clients whose own writers have not moved since the last call, or with all every client
// that has its own writer.
func (b *Hub) standingWriters(all bool) (standing []*Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.clients[b.idle:] {
		if c.turn != turnWriter {
			continue
		}
		if all || c.looked == c.cursor {
			standing = append(standing, c)
		}
		c.looked = c.cursor
	}
	return standing
}

// moreFlushersLocked returns how many flushers the caller must start.
func (b *Hub) moreFlushersLocked() int {
	wanted := (b.turns.queued + clientsPerFlusher - 1) / clientsPerFlusher
	if wanted <= b.turns.flushers {
		return 0 // before GOMAXPROCS, which takes the scheduler's lock
	}
	more := min(wanted, runtime.GOMAXPROCS(0)) - b.turns.flushers
	if more < 0 {
		return 0
	}
	b.turns.flushers += more
	return more
}

// startFlushers starts n flushers. They end when the queue is empty; nobody waits for them but senders, for turns.
func (b *Hub) startFlushers(n int) {
	for range n {
		go b.flush()
	}
}

// flush serves the queue until it is empty.
func (b *Hub) flush() {
	var t Tally
	var served *Client // the last client, if it has taken everything
	for {
		if t.pending == tallySize {
			b.process.Counters.written.add(&t)
		}
		c, frames, n, p := b.serve(served)
		served = nil
		switch {
		case c == nil:
			b.process.Counters.written.add(&t)
			return
		case p == progressFrames && frames != nil:
			rest := c.attempt(&t, frames, n)
			if !c.exact && !b.attempted(c) {
				b.process.Counters.written.add(&t)
				c.restoreWriteDeadline()
				c.write(rest, n)
				return
			}
			if len(rest) > 0 {
				b.handOver(c)
				c.startWriter(rest, n)
			} else {
				served = c
			}
		case p == progressAlone:
			go c.finish() // it logs, and the other clients must not wait for that
		case p == progressLagged:
			c.departed()
			c.startWriter(nil, 0)
		default:
			c.startWriter(nil, 0)
		}
	}
}

// serve returns the next client with something to do, or nil if the queue is empty and the flusher must end. With
// progressFrames it returns the frames to write, or none if only a writer can send them. served is the client of the
// last call, or nil: serve first puts it at the end of the queue, or makes it idle if it has everything.
func (b *Hub) serve(served *Client) (c *Client, frames []byte, n int, p progress) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c = served
	if c != nil && b.turns.first != nil && c.cursor < c.feed.Head() {
		b.unpinLocked(c)
		b.writtenLocked(c)
		b.queueLocked(c)
		c = nil
	}
	for {
		if c == nil {
			c = b.dequeueLocked()
		}
		if c == nil {
			b.turns.flushers--
			b.endWatchLocked()
			return nil, nil, 0, progressIdle
		}
		frames, n, p = b.nextLocked(c)
		switch p {
		case progressFrames, progressReplay:
			if p == progressFrames && c.tryWriter != nil && !c.due.Load() && (c.exact || b.watchLocked(c)) {
				return c, frames, n, p
			}
			b.unpinLocked(c)
			c.cursor = c.written // its writer will ask for these frames again
			b.beginTurnLocked(c, turnWriter)
			return c, nil, 0, p
		case progressIdle:
			// A control frame that came while the flusher had the right to write has started no writer.
			if c.due.Load() && c.startWriting() {
				return c, nil, 0, p
			}
		case progressAlone, progressFlushed, progressLagged:
			return c, nil, 0, p
		}
		c = nil // idle
	}
}

// attempted ends a flusher's attempt to write to c. It returns false if the flusher was relieved meanwhile; then it must go
// on as c's writer.
func (b *Hub) attempted(c *Client) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	w := b.turns.watch
	at := slices.IndexFunc(w.attempts, func(a attempting) bool { return a.client == c })
	if at < 0 {
		return false
	}
	w.attempts = slices.Delete(w.attempts, at, at+1)
	return true
}

// watchLocked watches a flusher's attempt to write to c. It returns false if there must be none, because a flusher had to wait
// for c, or less than a second ago for any client.
func (b *Hub) watchLocked(c *Client) bool {
	if c.stalled {
		return false
	}
	if b.turns.watch == nil {
		b.turns.watch = new(watch)
	}
	w := b.turns.watch
	if !w.distrust.IsZero() {
		if time.Now().Before(w.distrust) {
			return false
		}
		w.distrust = time.Time{} // and no more look at the clock
	}
	w.attempts = append(w.attempts, attempting{client: c})
	switch {
	case w.timer == nil:
		w.timer = time.AfterFunc(flusherPatience, b.relieveFlushers)
	case !w.runs:
		w.timer.Reset(flusherPatience)
	}
	w.runs = true
	return true
}

// endWatchLocked stops the timer when no flusher runs. Between two attempts of a flusher it goes on, because to stop it and to
// start it again would cost more.
func (b *Hub) endWatchLocked() {
	w := b.turns.watch
	if w != nil && w.runs && b.turns.flushers == 0 {
		w.runs = false
		w.timer.Stop() // a call that has begun finds no attempt
	}
}

// relieveFlushers relieves the flushers whose attempts have stood since the last call. Such an attempt has the deadline of
// a write from then on.
func (b *Hub) relieveFlushers() {
	b.mu.Lock()
	w := b.turns.watch
	w.attempts = slices.DeleteFunc(w.attempts, func(a attempting) bool {
		if a.stood {
			a.client.stalled = true
			w.distrust = time.Now().Add(distrustTime)
			b.beginTurnLocked(a.client, turnWriter)
			a.client.setWriteDeadline(time.Now().Add(a.client.settings.WriteTimeout))
			b.turns.flushers--
		}
		return a.stood
	})
	for i := range w.attempts {
		w.attempts[i].stood = true
	}
	more := b.moreFlushersLocked()
	w.runs = w.runs && b.turns.flushers > 0
	if w.runs {
		w.timer.Reset(flusherPatience)
	}
	b.mu.Unlock()
	b.startFlushers(more)
}

// handOver leaves c's turn to its own writer.
func (b *Hub) handOver(c *Client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.beginTurnLocked(c, turnWriter)
}
