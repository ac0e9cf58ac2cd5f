package redisengine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
)

const (
	// probeInterval is the time between two probes, and probeTimeout is how long one may take to come back.
	probeInterval = 2 * time.Second
	probeTimeout  = 5 * time.Second

	// mostShortLives is how many connections in a row may live for less than shortestLife.
	mostShortLives = 3
	shortestLife   = time.Second

	// mostChannels is how many channels a SUBSCRIBE names.
	mostChannels = 200
)

// A subscriber is the part of a link that receives what scripts publish. When its connection breaks it makes another one
// to the same process. The link is over if it cannot.
type subscriber struct {
	link    *link
	session *Session
	wake    chan struct{} // has a value when hubs were opened or left

	// Owned by the goroutine that runs connect, then run, then close.
	ears     *ears
	began    time.Time       // of ears
	short    int             // how many before had a short life
	channels map[string]bool // those that ears subscribes to
}

// ears are one connection for subscriptions.
type ears struct {
	session *Session
	client  rueidis.DedicatedClient
	broken  <-chan error

	sent    uint64        // the newest probe
	sentAt  time.Time     // when it was sent
	arrived atomic.Uint64 // the newest probe that has come back

	mu   sync.Mutex // held while a receiver is called
	deaf bool       // no receiver is called any more
}

func newSubscriber(l *link) *subscriber {
	return &subscriber{link: l, session: l.session, wake: make(chan struct{}, 1)}
}

// connect makes a connection to the process of the link, and subscribes to all hubs of the session.
func (s *subscriber) connect(ctx context.Context) error {
	client, _ := s.link.client.Dedicate() // ears.close gives it back
	e := &ears{session: s.session, client: client}
	s.ears, s.began, s.channels = e, time.Now(), map[string]bool{}
	e.broken = client.SetPubSubHooks(rueidis.PubSubHooks{OnMessage: e.hear})
	text, err := client.Do(ctx, client.B().Info().Section("server").Build()).ToString()
	if err != nil {
		return err
	}
	if parseInfo(text).runID != s.link.scripts.Load().server.runID {
		return errTwoServers
	}
	if err := e.subscribe(ctx, []string{s.session.keys.nodeChannel(s.session.node)}); err != nil {
		return err
	}
	s.session.beginLife()
	return s.follow(ctx)
}

// run keeps the subscriptions until the link is over.
func (s *subscriber) run() {
	ctx := s.link.ctx
	probe := time.NewTicker(probeInterval)
	defer probe.Stop()
	for {
		var lost error
		select {
		case <-ctx.Done():
			return
		case err := <-s.ears.broken:
			if err == nil { // it was closed
				err = net.ErrClosed
			}
			lost = fmt.Errorf("the connection for subscriptions was lost: %w", explain(err))
		case <-s.wake:
			lost = s.follow(ctx)
		case <-probe.C:
			lost = s.probe(ctx)
		}
		if lost != nil && ctx.Err() == nil {
			s.replace(ctx, lost)
		}
	}
}

// replace makes another connection. The session has then missed what was published in between.
func (s *subscriber) replace(ctx context.Context, lost error) {
	if time.Since(s.began) > shortestLife {
		s.short = 0
	} else if s.short++; s.short > mostShortLives {
		s.link.end(lost) // the session then waits before it tries again
		return
	}
	s.session.endLife()
	s.ears.close()
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := s.connect(ctx); err != nil {
		s.link.end(errors.Join(lost, explain(err)))
		return
	}
	s.session.monitor.State(nil)
}

// close ends the subscriptions. No receiver is called after it has returned.
func (s *subscriber) close() {
	s.session.endLife()
	if s.ears != nil {
		s.ears.close()
	}
}

// follow subscribes to hubs that were opened, and then unsubscribes from those that were left. One goroutine does both, one
// command after the other, so what a hub was last is what counts.
func (s *subscriber) follow(ctx context.Context) error {
	var begin, end []string
	for channel, open := range s.session.takeChanges() {
		switch {
		case open && !s.channels[channel]:
			begin = append(begin, channel)
		case open:
			s.session.confirm(channel)
		case s.channels[channel]:
			end = append(end, channel)
		}
	}
	for len(begin) > 0 {
		some := begin[:min(len(begin), mostChannels)]
		begin = begin[len(some):]
		if err := s.ears.subscribe(ctx, some); err != nil {
			return err
		}
		for _, channel := range some {
			s.channels[channel] = true
			s.session.confirm(channel)
		}
	}
	for len(end) > 0 {
		some := end[:min(len(end), mostChannels)]
		end = end[len(some):]
		if err := s.ears.client.Do(ctx, s.ears.client.B().Unsubscribe().Channel(some...).Build()).Error(); err != nil {
			return err
		}
		for _, channel := range some {
			delete(s.channels, channel)
		}
	}
	return nil
}

// signal makes the subscriber look which hubs were opened or left.
func (s *subscriber) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// probe looks whether the last probe has come back, and sends the next one.
func (s *subscriber) probe(ctx context.Context) error {
	e := s.ears
	if e.sent > e.arrived.Load() {
		if time.Since(e.sentAt) < probeTimeout {
			return nil
		}
		return errors.New("the subscription is dead")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	b := s.link.commands.B()
	channel := s.session.keys.nodeChannel(s.session.node)
	message := strconv.FormatUint(e.sent+1, 10)
	e.sent++
	receivers, err := s.link.do(ctx, b.Publish().Channel(channel).Message(message).Build()).AsInt64()
	e.sentAt = time.Now()
	if err != nil {
		e.sent-- // the connection for commands has a problem
		return nil
	}
	if receivers == 0 {
		return errors.New("the server has ended the subscription")
	}
	return nil
}

// subscribe waits until the server has confirmed all channels: the answer to PING comes after that.
func (e *ears) subscribe(ctx context.Context, channels []string) error {
	b := e.client.B()
	for _, result := range e.client.DoMulti(ctx, b.Subscribe().Channel(channels...).Build(), b.Ping().Build()) {
		if err := result.Error(); err != nil {
			return err
		}
	}
	return nil
}

// hear takes a message. rueidis calls it for one at a time, from the goroutine that reads the connection.
func (e *ears) hear(m rueidis.PubSubMessage) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.deaf {
		return
	}
	if hub, ok := e.session.keys.hubOf(m.Channel); ok {
		e.session.deliver(hub, m.Message)
	} else if n, err := strconv.ParseUint(m.Message, 10, 64); err == nil {
		e.arrived.Store(n)
	}
}

// close closes the connection. hear calls no receiver after it has returned: it waits for one that is being called,
// which returns at once.
func (e *ears) close() {
	e.mu.Lock()
	e.deaf = true
	e.mu.Unlock()
	e.client.Close()
}
