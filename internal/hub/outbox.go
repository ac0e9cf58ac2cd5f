package hub

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// An outbox has the messages of a hub that wait for its engine. While it has some, one goroutine passes them on, batch by
// batch, with one batch on its way at a time: so the messages of a sender keep their order, and the busier the hub, the
// more messages share a round trip. The hub's lock guards it. admission.go decides when a message gets into it.
type outbox struct {
	queue   []*submission        // oldest first
	room    int                  // that queue takes
	shares  map[netip.Prefix]int // of room, by address
	waiting []*submission        // have no room yet, oldest first; their senders wait
	sending bool                 // a goroutine runs drainOutbox
}

// A submission is a message on its way to the engine.
type submission struct {
	message engine.Message
	source  Source
	from    *Client      // the client that has sent it, or nil
	address netip.Prefix // the address whose room it takes
	pooled  bool         // it takes room in Process.Outgoing
	again   bool         // the sender may have sent it before
	since   time.Time    // when the sender submitted it

	// admitted is there if the sender waits, and has room for the one value that it gets: nil when the message is in the
	// queue, or ErrClosed.
	admitted chan error

	// done gets the outcome, without a lock: a receipt, or one of the errors of Publish.
	done func(Receipt, error)
}

const (
	// maxBatch and maxBatchBytes bound a batch, as does a quarter of what clients may fall behind: no batch alone makes
	// a client lag. A batch has at least one message.
	maxBatch      = 64
	maxBatchBytes = 256 << 10

	// engineTimeout is how long a message waits for the engine before its sender learns of the failure.
	engineTimeout = 10 * time.Second

	// leastAttempt is how long an attempt may take, even if that is longer than engineTimeout allows: an attempt that
	// fails for lack of time has an unknown outcome.
	leastAttempt = time.Second

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
	outcomes := make(chan outcome, 1)
	_, err := b.submit(nil, &m, ctx.Done(), func(r Receipt, err error) { outcomes <- outcome{r, err} })
	if err != nil {
		return Receipt{}, err
	}
	select {
	case o := <-outcomes:
		return o.receipt, o.err
	case <-ctx.Done():
		return Receipt{}, ErrUnknown
	}
}

// A dispatch is the state of the goroutine that drains an outbox.
type dispatch struct {
	tried  int           // the engine may have published so many messages at the front of the queue, as one batch
	number uint64        // of that batch
	pause  time.Duration // before the next attempt
}

// drainOutbox passes the messages of the outbox to the engine until none are left.
func (b *Hub) drainOutbox() {
	d := dispatch{pause: firstRetry}
	for {
		b.lockInTurn() // otherwise senders would run away from clients that do read
		lost, expired := b.takeOverdueLocked(&d)
		b.admitLocked()
		some, batch := b.nextBatchLocked(&d)
		ends := len(lost)+len(expired)+len(some) == 0
		b.outbox.sending = !ends
		b.mu.Unlock()
		if ends {
			return
		}
		fail(lost, ErrUnknown)
		fail(expired, ErrUnavailable)
		if len(some) > 0 {
			b.attempt(&d, some, batch)
		}
	}
}

// takeOverdueLocked takes the messages out of the queue that have waited too long: lost are those that the engine may have
// published, which is one batch, and expired those that it has never seen. What their senders have sent after them must
// not be published if they will send them again.
func (b *Hub) takeOverdueLocked(d *dispatch) (lost, expired []*submission) {
	o, limit := &b.outbox, time.Now().Add(-engineTimeout)
	overdue := func(s *submission) bool { return !s.since.After(limit) }
	if slices.ContainsFunc(o.queue[:d.tried], overdue) {
		lost = b.takeLocked(d.tried)
		d.tried = 0
		for _, s := range lost {
			s.breakOffLocked()
		}
	}
	kept := o.queue[:d.tried]
	for _, s := range o.queue[d.tried:] {
		if !overdue(s) && (s.from == nil || !s.from.brokenOff) {
			kept = append(kept, s)
			continue
		}
		b.giveRoomLocked(s)
		expired = append(expired, s)
		if s.again || s.from != nil && s.from.hasLeft() {
			s.breakOffLocked()
		}
	}
	clear(o.queue[len(kept):])
	o.queue = kept
	return lost, expired
}

// breakOffLocked notes that s has failed, and that the client that has sent it does not know that it is not published.
func (s *submission) breakOffLocked() {
	if s.from != nil {
		s.from.brokenOff = true
	}
}

// nextBatchLocked returns the next batch, or again the one that the engine may have published. It stays in the queue.
func (b *Hub) nextBatchLocked(d *dispatch) (some []*submission, batch engine.Batch) {
	n, number := d.tried, d.number
	if n == 0 {
		n, number = b.batchSizeLocked(), b.process.nextBatch()
	}
	some = slices.Clone(b.outbox.queue[:n])
	batch = engine.Batch{Bounds: b.boundsLocked(), Number: number, Messages: make([]engine.Message, 0, n)}
	if !b.closed {
		batch.Known = b.positionLocked()
	}
	for _, s := range some {
		batch.Messages = append(batch.Messages, s.message)
	}
	return some, batch
}

// batchSizeLocked returns how many messages the next batch has.
func (b *Hub) batchSizeLocked() (n int) {
	messages, bytes := min(maxBatch, max(b.bufferMessages/4, 1)), min(maxBatchBytes, b.bufferBytes/4)
	for _, s := range b.outbox.queue {
		bytes -= len(s.message.Data)
		if n == messages || n > 0 && bytes < 0 {
			break
		}
		n++
	}
	return n
}

// errReceipts is a bug of an engine.
var errReceipts = errors.New("the engine has answered with too few or too many receipts")

// attempt has the engine publish a batch. If that fails it pauses before the next attempt.
func (b *Hub) attempt(d *dispatch, some []*submission, batch engine.Batch) {
	began := time.Now()
	ctx, cancel := context.WithDeadline(context.Background(), deadlineOf(some, began))
	receipts, err := b.session.Publish(ctx, b.name, batch)
	cancel()
	if err == nil && len(receipts) != len(some) {
		err = errReceipts
	}
	b.process.EnginePublished(time.Since(began), err)
	switch {
	case err == nil:
		b.awaitArrival(newest(receipts))
		b.settle(some, receipts)
		*d = dispatch{pause: firstRetry}
		return
	case d.tried > 0 && errors.Is(err, engine.ErrOldBatch):
		// This hub is over, and its successor has published: nobody will know.
		b.mu.Lock()
		b.takeLocked(len(some))
		b.mu.Unlock()
		fail(some, ErrUnknown)
		*d = dispatch{pause: firstRetry}
		return
	case !errors.Is(err, ErrUnavailable):
		d.tried, d.number = len(some), batch.Number
	}
	time.Sleep(d.pause)
	d.pause = min(2*d.pause, lastRetry)
}

// deadlineOf returns until when an attempt may take that begins now.
func deadlineOf(batch []*submission, now time.Time) time.Time {
	oldest := slices.MinFunc(batch, func(a, b *submission) int { return a.since.Compare(b.since) })
	if t := oldest.since.Add(engineTimeout); t.After(now.Add(leastAttempt)) {
		return t
	}
	return now.Add(leastAttempt)
}

// newest returns the position of the newest message that was published with a batch, or the zero position.
func newest(receipts []engine.Receipt) (p engine.Position) {
	for _, r := range receipts {
		if !r.Repeated && !r.Unknown {
			p = r.Position
		}
	}
	return p
}

// settle takes a published batch out of the outbox and passes its receipts on. Clients have their answers before the hub
// finds out that its epoch is over, unless a push of the engine has told it already.
func (b *Hub) settle(batch []*submission, receipts []engine.Receipt) {
	b.mu.Lock()
	b.takeLocked(len(batch))
	members := b.audienceLocked()
	b.mu.Unlock()
	for i, s := range batch {
		r := receipts[i]
		if !r.Repeated && !r.Unknown {
			b.process.Counters.Published[s.source].Add(1)
		}
		receipt := Receipt{Seq: r.Seq, At: r.At, Members: members, Repeated: r.Repeated, Unknown: r.Unknown}
		if r.Epoch != b.epoch {
			receipt.Epoch = r.Epoch
		}
		s.done(receipt, nil)
	}
	over := func(r engine.Receipt) bool { return r.Epoch != b.epoch && !r.Repeated && !r.Unknown }
	if slices.ContainsFunc(receipts, over) {
		b.mu.Lock()
		b.fallBehindLocked()
		b.mu.Unlock()
	}
}

// fail passes an error on to the senders of messages.
func fail(some []*submission, err error) {
	for _, s := range some {
		s.done(Receipt{}, s.failure(err))
	}
}

// failure returns what err means for s. Nobody can know that a message was never published if it was sent before.
func (s *submission) failure(err error) error {
	if s.again && errors.Is(err, ErrUnavailable) {
		return ErrUnknown
	}
	return err
}

// takeLocked takes the first n messages out of the queue.
func (b *Hub) takeLocked(n int) (taken []*submission) {
	o := &b.outbox
	taken = slices.Clone(o.queue[:n])
	for _, s := range taken {
		b.giveRoomLocked(s)
	}
	clear(o.queue[:n])
	o.queue = o.queue[n:]
	return taken
}

// Waiting returns how many messages wait for the engine.
func (b *Hub) Waiting() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.outbox.queue) + len(b.outbox.waiting)
}

// IsDone reports whether nothing more can come from the hub: it has no members, and its outbox is empty.
func (b *Hub) IsDone() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.members == 0 && !b.outbox.sending
}
