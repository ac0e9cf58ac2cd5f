package hub

import (
	"context"
	"errors"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// An outbox has the messages of a hub that wait for its engine, in the order in which they came. While it has some, one
// goroutine passes them on, batch by batch, with one batch on its way at a time: so the messages of a sender keep their
// order, and the busier the hub, the more messages share a round trip. The hub's lock guards it.
type outbox struct {
	queue   []*submission
	bytes   int           // of the data in queue
	sending bool          // a goroutine runs drainOutbox
	batch   uint64        // the number of the last batch
	shorter chan struct{} // if somebody waits for room: closed when the queue gets shorter
}

// A submission is a message on its way to the engine.
type submission struct {
	message engine.Message
	source  Source
	from    *Client // the client that has sent it, or nil
	since   time.Time
	tried   bool // the engine may have published it

	// done gets the outcome, without a lock: a receipt, or one of the errors of Publish.
	done func(Receipt, error)
}

const (
	// maxOutbox and maxOutboxBytes bound what waits in an outbox. Beyond that the server does not read from senders.
	maxOutbox      = 256
	maxOutboxBytes = 1 << 20

	// maxUnanswered is how many messages of one client may wait for the engine. So the throughput of a client is not
	// bound by the time of a round trip, and one client does not fill the outbox.
	maxUnanswered = 64

	// maxBatch and maxBatchBytes bound a batch, as does a quarter of what clients may fall behind: no batch alone makes
	// a client lag. A batch has at least one message.
	maxBatch      = 64
	maxBatchBytes = 256 << 10

	// engineTimeout is how long a message waits for the engine before its sender learns of the failure.
	engineTimeout = 10 * time.Second

	// firstRetry and lastRetry are the shortest and the longest pause between two attempts.
	firstRetry = 20 * time.Millisecond
	lastRetry  = time.Second
)

// The errors of Publish, besides ErrClosed.
var (
	// ErrUnavailable: the engine has not published the message.
	ErrUnavailable = engine.ErrUnavailable

	// ErrUnknown: the engine did not answer, and may have published the message or may yet do so.
	ErrUnknown = errors.New("the engine did not answer: the message may have been published")
)

// Publish publishes m, which no client of this process has sent, and waits for the outcome; see publish. ctx bounds only
// the wait for an engine. The error is ErrClosed, ErrUnavailable or ErrUnknown.
func (b *Hub) Publish(ctx context.Context, m Message) (Receipt, error) {
	if b.session == nil {
		if r, ok := b.publish(nil, &m); ok {
			return r, nil
		}
		return Receipt{}, ErrClosed
	}
	type outcome struct {
		receipt Receipt
		err     error
	}
	done := make(chan outcome, 1)
	err := b.submit(nil, &m, func() bool { return ctx.Err() != nil }, func(r Receipt, err error) { done <- outcome{r, err} })
	if err != nil {
		return Receipt{}, err
	}
	select {
	case o := <-done:
		return o.receipt, o.err
	case <-ctx.Done():
		return Receipt{}, ErrUnknown
	}
}

// submit passes m to the engine. It waits while the outbox is full or from has too many messages in it, but no longer
// than engineTimeout, and not after ended returns true. done gets the outcome, unless submit returns an error: ErrClosed
// or ErrUnavailable.
func (b *Hub) submit(from *Client, m *Message, ended func() bool, done func(Receipt, error)) error {
	s := &submission{message: encodeMessage(m), source: m.Source, from: from, since: time.Now(), done: done}
	b.mu.Lock()
	for {
		if !b.acceptsLocked(from) {
			b.mu.Unlock()
			return ErrClosed
		}
		if b.hasRoomLocked(s) {
			break
		}
		if b.outbox.shorter == nil {
			b.outbox.shorter = make(chan struct{})
		}
		shorter := b.outbox.shorter
		b.mu.Unlock()
		if !awaitRoom(shorter, ended) || time.Since(s.since) >= engineTimeout {
			return ErrUnavailable
		}
		b.mu.Lock()
	}
	if m.Key.ID != "" && m.Again {
		s.message.Attempt = engine.Again
		if b.history.messages == 0 || !b.issued(m.Key.Token) {
			s.message.Attempt = engine.Lookup
		}
	}
	b.outbox.queue = append(b.outbox.queue, s)
	b.outbox.bytes += len(s.message.Data)
	if from != nil {
		from.unanswered++
	}
	if !b.outbox.sending {
		b.outbox.sending = true
		go b.drainOutbox() // ends when the outbox is empty; the owner of the session waits for IsDone
	}
	b.mu.Unlock()
	return nil
}

// awaitRoom waits until shorter is closed. It returns false when ended returns true before that.
func awaitRoom(shorter <-chan struct{}, ended func() bool) bool {
	poll := time.NewTicker(lastRetry / 10)
	defer poll.Stop()
	for began := time.Now(); !ended(); {
		select {
		case <-shorter:
			return true
		case <-poll.C:
			if time.Since(began) >= engineTimeout {
				return true
			}
		}
	}
	return false
}

// hasRoomLocked reports whether s may be queued now. An empty outbox takes a message of any size.
func (b *Hub) hasRoomLocked(s *submission) bool {
	o := &b.outbox
	switch {
	case len(o.queue) == 0:
		return true
	case len(o.queue) >= maxOutbox || o.bytes+len(s.message.Data) > maxOutboxBytes:
		return false
	}
	return s.from == nil || s.from.unanswered < maxUnanswered
}

// drainOutbox passes the messages of the outbox to the engine until none are left.
func (b *Hub) drainOutbox() {
	pause := firstRetry
	for {
		b.lockInTurn() // otherwise senders would run away from clients that do read
		expired, some, batch := b.nextBatchLocked()
		b.mu.Unlock()
		for _, s := range expired {
			s.done(Receipt{}, ErrUnavailable)
		}
		if len(some) == 0 {
			return
		}
		began := time.Now()
		ctx, cancel := context.WithDeadline(context.Background(), some[0].since.Add(engineTimeout))
		receipts, err := b.session.Publish(ctx, b.name, batch)
		cancel()
		if err == nil {
			b.process.EnginePublished(time.Since(began), nil)
			b.settleBatch(some, receipts)
			pause = firstRetry
			continue
		}
		b.process.EnginePublished(time.Since(began), err)
		if !errors.Is(err, engine.ErrUnavailable) {
			markTried(some)
		}
		if !b.mayRetry(some) {
			continue
		}
		time.Sleep(pause)
		pause = min(2*pause, lastRetry)
	}
}

// nextBatchLocked takes the next batch from the outbox, or the last one again. expired are messages that have waited too long
// and that the engine has never seen; they leave the outbox. With no batch the goroutine must end.
func (b *Hub) nextBatchLocked() (expired, some []*submission, batch engine.Batch) {
	o := &b.outbox
	for len(o.queue) > 0 && !o.queue[0].tried && time.Since(o.queue[0].since) >= engineTimeout {
		expired = append(expired, o.queue[0])
		b.shortenLocked(1)
	}
	if len(o.queue) == 0 {
		o.sending = false
		return expired, nil, engine.Batch{}
	}
	n, bytes := 0, 0
	repeated := o.queue[0].tried
	messages, most := min(maxBatch, max(b.bufferMessages/4, 1)), min(maxBatchBytes, b.bufferBytes/4)
	for _, s := range o.queue {
		// A repeated batch has the same messages: the tried ones, which stand first.
		if s.tried != repeated || !repeated && n > 0 && (n >= messages || bytes+len(s.message.Data) > most) {
			break
		}
		n++
		bytes += len(s.message.Data)
	}
	if !repeated {
		o.batch++
	}
	some = append(some, o.queue[:n]...)
	batch = engine.Batch{Bounds: b.boundsLocked(), Known: b.positionLocked(), Number: o.batch}
	for _, s := range some {
		batch.Messages = append(batch.Messages, s.message)
	}
	return expired, some, batch
}

// markTried notes that the engine may have published the messages of a batch.
func markTried(batch []*submission) {
	for _, s := range batch {
		s.tried = true // only drainOutbox reads and writes it
	}
}

// mayRetry reports whether a batch that has failed may be tried again. If not, its messages leave the outbox.
func (b *Hub) mayRetry(batch []*submission) bool {
	if !batch[0].tried || time.Since(batch[0].since) < engineTimeout {
		return true
	}
	b.mu.Lock()
	b.shortenLocked(len(batch))
	b.mu.Unlock()
	for _, s := range batch {
		s.done(Receipt{}, ErrUnknown)
	}
	return false
}

// settleBatch takes a published batch out of the outbox and passes its receipts on.
func (b *Hub) settleBatch(batch []*submission, receipts []engine.Receipt) {
	b.mu.Lock()
	b.shortenLocked(len(batch))
	members := b.audienceLocked()
	b.mu.Unlock()
	for i, s := range batch {
		r := receipts[i]
		if !r.Repeated && !r.Unknown {
			b.process.Counters.Published[s.source].Add(1)
		}
		s.done(Receipt{Seq: r.Seq, At: r.At, Members: members, Repeated: r.Repeated, Unknown: r.Unknown}, nil)
	}
}

// shortenLocked takes the first n messages out of the outbox.
func (b *Hub) shortenLocked(n int) {
	o := &b.outbox
	for i, s := range o.queue[:n] {
		o.bytes -= len(s.message.Data)
		if s.from != nil {
			s.from.unanswered--
		}
		o.queue[i] = nil
	}
	o.queue = o.queue[n:]
	if o.shorter != nil {
		close(o.shorter)
		o.shorter = nil
	}
}

// Waiting returns how many messages wait for the engine.
func (b *Hub) Waiting() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.outbox.queue)
}

// IsDone reports whether nothing more can come from the hub: it has no members, and its outbox is empty.
func (b *Hub) IsDone() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members == 0 && !b.outbox.sending
}

// submit passes a message of c to the engine. It returns false when c is closing. c learns of the outcome when it comes.
func (c *Client) submit(m *Message) bool {
	p, key := c.protocol, m.Key
	c.meter.End()
	err := c.hub.submit(c, m, c.hasLeft, func(r Receipt, err error) { p.answered(c, key, r, err) })
	c.meter.Begin(c.load)
	if errors.Is(err, ErrUnavailable) {
		p.answered(c, key, Receipt{}, err)
	}
	return !c.hasLeft()
}
