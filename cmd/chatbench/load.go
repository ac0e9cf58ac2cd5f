package main

import (
	"container/heap"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"strconv"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// options describe a load.
type options struct {
	target
	clients  int // in all hubs
	hubs     int
	senders  int           // in a hub
	size     int           // bytes of a message
	rateLow  float64       // messages a second and hub; each hub has its own rate from here to rateHigh
	rateHigh float64       // 0 for a closed loop
	window   int           // messages of a hub that are under way, in a closed loop
	warmup   time.Duration // before the measurement
	duration time.Duration // of the measurement
	drain    time.Duration // how long messages under way at the end may take before they count as lost
	ramp     float64       // clients to connect a second; 0 for as many as possible
	events   float64       // percent of the clients that do not send which speak the events protocol
	slow     float64       // slow clients in addition, in percent of clients
	slowRate int           // bytes a second that a slow client reads
	spin     bool          // poll instead of sleeping once all clients are connected
	pid      int           // of the server to measure; 0 for none
	progress io.Writer     // receives a line of progress a second; may be nil
	stop     chan struct{} // closing it ends the measurement before duration; may be nil
	started  func()        // called when the measurement begins; may be nil
	asJSON   bool          // print JSON
}

// place returns the hub of client i, and whether the client speaks events. The first clients of each hub send and are
// raw. The clients that speak events are spread evenly over the others.
func (o *options) place(i int) (hub int, events bool) {
	n := float64(i/o.hubs - o.senders)
	return i % o.hubs, n >= 0 && int((n+1)*o.events/100) > int(n*o.events/100)
}

// maxOut is how many bytes may wait for a server that does not read. Beyond it the tool counts a due message as unsent.
const maxOut = 1 << 20

// tick is how often an idle phase checks whether it is over.
const tick = 50 * time.Millisecond

// An engine moves bytes. It calls load.received and load.ended within its methods.
type engine interface {
	// add takes over a connection, from which rest has already been read.
	add(c *client, conn net.Conn, rest []byte) error
	// flush sends as much of c.out as the connection takes, and the rest later.
	flush(c *client)
	// poll waits until it has received something, or until the given moment. With spin it does not sleep, if it can.
	poll(until time.Duration, spin bool)
	// close closes all connections and waits for the engine's goroutines.
	close()
}

// A load is one run. Its engine ensures that only one goroutine at a time uses it.
type load struct {
	options
	checker
	engine    engine
	start     time.Time
	hubs      []*hub
	live      int
	frame     []byte // a message as it goes on the wire, except its id
	idAt      int    // offset of the id in frame
	queue     dueQueue
	opened    []*sender // their window may have opened
	sending   bool
	latency   *hdrhistogram.Histogram
	sample    int64 // every sample-th delivery records its latency
	messages  int64
	unsent    int64
	delivered func(c *client, now time.Duration) // called for each message in order instead of recording its latency; may be nil
	spun      time.Duration                      // processor time that the engine spent spinning with nothing to do
	closes    map[string]int
	progressN int64 // deliveries at the last progress line
	progressT time.Duration
}

// newLoad prepares a run. The caller must close its engine.
func newLoad(o options) (*load, error) {
	if err := o.target.check(o.hubs); err != nil {
		return nil, err
	}
	l := &load{
		options: o,
		start:   time.Now(),
		closes:  map[string]int{},
		// Latencies from 1 µs to a minute, with 3 significant digits.
		latency: hdrhistogram.New(1, 60_000_000, 3),
		sample:  1,
	}
	if o.rateHigh == 0 {
		l.sample = 17 // a prime, so that it is not in step with clients or messages
	}
	var run [4]byte
	rand.Read(run[:])
	l.run = uint64(binary.LittleEndian.Uint32(run[:])) << senderBits & (1<<idBits - 1)
	payload := make([]byte, o.size)
	for i := range payload {
		payload[i] = 'x'
	}
	l.frame = appendFrame(nil, opText, true, payload)
	l.idAt = len(l.frame) - len(payload)
	for range o.hubs {
		l.hubs = append(l.hubs, &hub{})
	}
	var err error
	l.engine, err = newEngine(l)
	return l, err
}

func (l *load) now() time.Duration { return time.Since(l.start) }

// connect connects the clients from number first up to n, client i as place(i) says.
func (l *load) connect(ctx context.Context, first, n int, place func(i int) (hub int, events bool)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	connected := 0
	results := l.target.dialAll(ctx, first, n, l.ramp, place)
	for {
		select {
		case d, more := <-results:
			if !more {
				return ctx.Err()
			}
			if d.err != nil {
				return fmt.Errorf("connecting client %d of %d: %w", connected+1, n-first, d.err)
			}
			if err := l.join(d); err != nil {
				return err
			}
			connected++
		default:
			// Not spinning, which would keep the dialers from the processor.
			l.engine.poll(l.now()+time.Millisecond, false)
		}
		l.report("connecting", 0)
	}
}

func (l *load) join(d dialed) error {
	h := l.hubs[d.hub]
	c := &client{hub: h, wants: make([]uint64, l.senders), parser: parser{events: d.events}, dialed: d.start.Sub(l.start)}
	h.clients = append(h.clients, c)
	h.live++
	l.live++
	return l.engine.add(c, d.conn, d.rest)
}

// chooseSenders makes the first raw clients of each hub its senders. In an open loop they begin at random moments, so that
// hubs do not send in step.
func (l *load) chooseSenders() {
	seeded := mathrand.New(mathrand.NewPCG(1, 2)) // the same rates in each run
	for _, h := range l.hubs {
		rate := l.rateLow + (l.rateHigh-l.rateLow)*seeded.Float64()
		for _, c := range h.clients {
			if len(h.senders) == l.senders {
				break
			}
			if c.events {
				continue
			}
			s := &sender{client: c, id: l.run + uint64(len(l.byNumber)), index: len(h.senders)}
			if rate > 0 {
				s.interval = time.Duration(float64(l.senders) / rate * 1e9)
				s.due = l.now() + time.Duration(seeded.Float64()*float64(s.interval))
				heap.Push(&l.queue, s)
			} else {
				l.opened = append(l.opened, s)
			}
			h.senders = append(h.senders, s)
			l.byNumber = append(l.byNumber, s)
		}
	}
}

// runFor sends and receives for d, or until the condition holds or no client is left.
func (l *load) runFor(d time.Duration, phase string, until func() bool) {
	end := l.now() + d
	for now := l.now(); now < end && l.live > 0 && !until(); now = l.now() {
		next := min(end, now.Truncate(tick)+tick)
		if l.sending {
			next = min(next, l.send(now))
		}
		l.engine.poll(next, l.spin)
		l.report(phase, d)
	}
}

// send sends all due messages and returns when the next one is due.
func (l *load) send(now time.Duration) time.Duration {
	for _, s := range l.opened {
		for s.outstanding < max(1, l.window/l.senders) && !s.client.gone {
			l.publish(s, now)
		}
		l.engine.flush(s.client)
	}
	l.opened = l.opened[:0]
	for len(l.queue) > 0 && l.queue[0].due <= now {
		s := l.queue[0]
		if s.client.gone {
			heap.Pop(&l.queue)
			continue
		}
		if len(s.client.out) > maxOut+len(l.frame) {
			l.unsent++
		} else {
			l.publish(s, s.due)
			l.engine.flush(s.client)
		}
		s.due += s.interval
		heap.Fix(&l.queue, 0)
	}
	if len(l.queue) == 0 {
		return now + time.Hour
	}
	return l.queue[0].due
}

func (l *load) publish(s *sender, at time.Duration) {
	seq := s.push(at, s.client.hub.live)
	c := s.client
	c.out = append(c.out, l.frame...)
	putID(c.out[len(c.out)-len(l.frame)+l.idAt:], s.id, seq)
	l.messages++
}

// received handles the bytes that a client received at the moment now.
func (l *load) received(c *client, data []byte, now time.Duration) error {
	for {
		rest, found, err := c.next(data)
		if err != nil {
			return err
		}
		data = rest
		switch found {
		case foundNothing:
			return nil
		case foundMessage:
			at, ok, opened := l.deliver(c)
			if opened != nil && opened.interval == 0 {
				l.opened = append(l.opened, opened)
			}
			switch {
			case !ok:
			case l.delivered != nil:
				l.delivered(c, now)
			case l.deliveries%l.sample == 0:
				l.record(now - at)
			}
		case foundPing:
			c.out = appendFrame(c.out, opPong, true, c.controlData)
			l.engine.flush(c)
		case foundPong:
		case foundClose:
			return closeError(c.controlData)
		}
	}
}

// record adds a latency to the histogram.
func (l *load) record(latency time.Duration) {
	// This cannot fail: the value is within the histogram's range. More than a minute counts as a minute.
	_ = l.latency.RecordValue(min(latency.Microseconds(), 60_000_000))
}

// A closeError is the payload of the close frame that ended a connection.
type closeError []byte

func (e closeError) Error() string {
	if len(e) < 2 {
		return "1005"
	}
	return strconv.Itoa(int(binary.BigEndian.Uint16(e))) + " " + string(e[2:])
}

// ended handles the end of a connection. Without a close frame the code is 1006, abnormal (RFC 6455 §7.1.5).
func (l *load) ended(c *client, err error) {
	if c.gone {
		return
	}
	why := "1006"
	if e, ok := errors.AsType[closeError](err); ok {
		why = e.Error()
	} else if errors.Is(err, errProtocol) {
		why = err.Error()
	}
	l.closes[why]++
	l.live--
	l.leave(c)
}

// report writes a line of progress, at most once a second.
func (l *load) report(phase string, of time.Duration) {
	now := l.now()
	passed := now - l.progressT
	if passed < time.Second || l.progress == nil {
		return
	}
	if of > 0 {
		phase = fmt.Sprintf("%s (%v)", phase, of)
	}
	fmt.Fprintf(l.progress, "%4.0f s  %s: %d clients, %.0f deliveries/s, %d disconnected, %d doubled, %d overtaken\n",
		now.Seconds(), phase, l.live, float64(l.deliveries-l.progressN)/passed.Seconds(),
		l.Disconnected, l.Doubled, l.Reordered+int64(len(l.missing)))
	l.progressN, l.progressT = l.deliveries, now
}

// A dueQueue is a heap of senders. The one whose message is due next comes first.
type dueQueue []*sender

func (q dueQueue) Len() int           { return len(q) }
func (q dueQueue) Less(i, j int) bool { return q[i].due < q[j].due }
func (q dueQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }

// Push adds a sender.
func (q *dueQueue) Push(s any) { *q = append(*q, s.(*sender)) }

// Pop removes the last sender.
func (q *dueQueue) Pop() any {
	old := *q
	s := old[len(old)-1]
	*q = old[:len(old)-1]
	return s
}
