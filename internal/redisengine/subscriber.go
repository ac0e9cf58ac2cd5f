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

	// mostShortLived is how many connections in a row may live for less than shortestLife.
	mostShortLived = 3
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
	conn       *listener
	channels   map[string]bool // those that conn subscribes to
	began      time.Time       // of conn
	shortLived int             // how many connections before conn were
}

// A listener is one connection for subscriptions.
type listener struct {
	session *Session
	client  rueidis.DedicatedClient
	broken  <-chan error

	probed   uint64        // the newest probe that was sent
	probedAt time.Time     // when
	heard    atomic.Uint64 // the newest probe that has come back

	mu     sync.Mutex // held while a receiver is called
	closed bool       // no receiver is called any more
}

func newSubscriber(l *link) *subscriber {
	return &subscriber{link: l, session: l.session, wake: make(chan struct{}, 1)}
}

// signal makes the subscriber look which hubs were opened or left.
func (s *subscriber) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// connect makes a connection to the process of the link, and subscribes to all hubs of the session.
func (s *subscriber) connect(ctx context.Context) error {
	client, _ := s.link.client.Dedicate() // listener.close gives it back
	conn := &listener{session: s.session, client: client}
	conn.broken = client.SetPubSubHooks(rueidis.PubSubHooks{OnMessage: conn.receive})
	s.conn, s.channels, s.began = conn, map[string]bool{}, time.Now()

	text, err := client.Do(ctx, client.B().Info().Section("server").Build()).ToString()
	if err != nil {
		return err
	}
	if parseInfo(text).runID != s.link.scripts.Load().server.runID {
		return errTwoServers
	}
	if err := conn.subscribe(ctx, []string{s.session.keys.nodeChannel(s.session.node)}); err != nil {
		return err
	}
	s.session.subscriberConnected()
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
		case err := <-s.conn.broken:
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
		s.shortLived = 0
	} else if s.shortLived++; s.shortLived > mostShortLived {
		s.link.end(lost) // the session then waits before it tries again
		return
	}
	s.session.subscriberLost()
	s.conn.close()
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := s.connect(ctx); err != nil {
		s.link.end(fmt.Errorf("%w, and again: %w", lost, explain(err)))
		return
	}
	s.session.monitor.State(nil)
}

// close ends the subscriptions. No receiver is called after it has returned.
func (s *subscriber) close() {
	s.session.subscriberLost()
	if s.conn != nil {
		s.conn.close()
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
		if err := s.conn.subscribe(ctx, some); err != nil {
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
		if err := s.conn.unsubscribe(ctx, some); err != nil {
			return err
		}
		for _, channel := range some {
			delete(s.channels, channel)
		}
	}
	return nil
}

// probe looks whether the last probe has come back, and sends the next one.
func (s *subscriber) probe(ctx context.Context) error {
	c := s.conn
	if c.probed > c.heard.Load() {
		if time.Since(c.probedAt) < probeTimeout {
			return nil
		}
		return errors.New("nothing comes over the connection for subscriptions")
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	publish := s.link.commands.B().Publish().Channel(s.session.keys.nodeChannel(s.session.node)).
		Message(strconv.FormatUint(c.probed+1, 10)).Build()
	c.probed++
	receivers, err := s.link.do(ctx, publish).AsInt64()
	c.probedAt = time.Now()
	if err != nil {
		c.probed-- // something is wrong with the connection for commands
		return nil
	}
	if receivers == 0 {
		return errors.New("the server has ended the subscriptions")
	}
	return nil
}

// subscribe waits until the server has confirmed all channels: the answer to PING comes after that.
func (c *listener) subscribe(ctx context.Context, channels []string) error {
	b := c.client.B()
	for _, result := range c.client.DoMulti(ctx, b.Subscribe().Channel(channels...).Build(), b.Ping().Build()) {
		if err := result.Error(); err != nil {
			return err
		}
	}
	return nil
}

func (c *listener) unsubscribe(ctx context.Context, channels []string) error {
	return c.client.Do(ctx, c.client.B().Unsubscribe().Channel(channels...).Build()).Error()
}

// receive takes a message. rueidis calls it for one at a time, from the goroutine that reads the connection.
func (c *listener) receive(m rueidis.PubSubMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	if hub, ok := c.session.keys.hubOf(m.Channel); ok {
		c.session.deliver(hub, m.Message)
	} else if n, err := strconv.ParseUint(m.Message, 10, 64); err == nil {
		c.heard.Store(n)
	}
}

// close closes the connection. No receiver is called after it has returned: it waits for a call that runs, which returns
// at once.
func (c *listener) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.client.Close()
}
