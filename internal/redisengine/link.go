package redisengine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
)

const (
	// connectTimeout bounds how long a link takes to be made, once the connection is there.
	connectTimeout = 10 * time.Second

	// examineInterval is the time between two examinations of the server of a link.
	examineInterval = 5 * time.Second

	// masterInterval is the time between two looks at the server that the Sentinels name. They cost nothing.
	masterInterval = time.Second

	// mostInFlight is how many commands a link sends before their answers come. It is less than rueidis' ring has
	// places: when the ring is full, rueidis waits without regard to contexts.
	mostInFlight = 1<<ringScale - 24
)

// A link is a set of connections to one server process: one for commands and one for subscriptions. When the one for
// commands breaks, the link is over. It is never repaired, because the next connection may lead to another process.
type link struct {
	session *Session
	ctx     context.Context // done when the link is over; this closes the connections
	cancel  context.CancelCauseFunc
	address string // for messages
	primary string // the address that the client has

	client     rueidis.Client // makes the connections; nothing else uses it
	commands   rueidis.DedicatedClient
	subscriber *subscriber

	left    chan struct{} // has a value when hubs were left in which the node has users
	slots   chan struct{} // one value for each command in flight
	fencing chan struct{} // a lock for raiseFence
	scripts atomic.Pointer[loadedScripts]
	workers sync.WaitGroup
}

// errUnsent means that a command was certainly not sent.
var errUnsent = errors.New("not sent")

// connect makes a link. It returns when the server is examined, the node has its lease, and all open hubs are subscribed.
func (s *Session) connect() (*link, error) {
	l := &link{
		session: s,
		left:    make(chan struct{}, 1),
		slots:   make(chan struct{}, mostInFlight),
		fencing: make(chan struct{}, 1),
	}
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	defer context.AfterFunc(s.ctx, func() { l.end(errClosed) })()
	if err := l.open(); err != nil {
		l.close(err)
		return nil, s.describe(l.address, err)
	}
	return l, nil
}

func (l *link) open() error {
	options := l.session.currentOptions()
	l.address = options.String()
	client, err := rueidis.NewClient(options.clientOption(l.dial))
	l.client = client // rueidis returns it with some errors, too
	if err = explain(err); errors.Is(err, errClosedByServer) && !options.tls {
		return fmt.Errorf("%w."+expectsTLS, err)
	}
	if err != nil {
		return err
	}
	l.primary = l.currentPrimary()
	if options.master != "" {
		l.address = l.primary
	}
	l.commands, _ = client.Dedicate() // Close gives it back
	broken := l.commands.SetPubSubHooks(rueidis.PubSubHooks{OnSubscription: func(rueidis.PubSubSubscription) {}})
	l.workers.Go(func() { l.watch(broken) }) // ends with the link; close waits for it

	ctx, cancel := context.WithTimeout(l.ctx, connectTimeout)
	defer cancel()
	scripts, err := l.raiseFence(ctx)
	if err != nil {
		return l.cause(err)
	}
	l.scripts.Store(scripts)
	if err := l.session.register(ctx, l); err != nil {
		return l.cause(err)
	}
	l.subscriber = newSubscriber(l)
	if err := l.subscriber.connect(ctx); err != nil {
		return l.cause(err)
	}
	l.workers.Go(l.subscriber.run)                    // ends with the link; close waits for it
	l.workers.Go(func() { l.session.removeUsers(l) }) // ends with the link; close waits for it
	return nil
}

// dial makes a connection that the end of the link closes, so that nothing waits for a silent server.
func (l *link) dial(_ context.Context, address string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	network := l.session.network
	plain, err := dialer.DialContext(l.ctx, network, address)
	if err != nil {
		return nil, err
	}
	conn := &linkConn{Conn: plain, forget: context.AfterFunc(l.ctx, func() { _ = plain.Close() })}
	if config == nil {
		return conn, nil
	}
	host, _, _ := net.SplitHostPort(address)
	config = config.Clone()
	config.ServerName = host
	ctx, cancel := context.WithTimeout(l.ctx, dialer.Timeout)
	defer cancel()
	encrypted := tls.Client(conn, config)
	if err := encrypted.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("%w: %w", errHandshake, err)
	}
	return encrypted, nil
}

// A linkConn is a connection that the end of its link closes.
type linkConn struct {
	net.Conn
	forget func() bool
}

// Close implements net.Conn.
func (c *linkConn) Close() error {
	c.forget()
	return c.Conn.Close()
}

// currentPrimary returns the address of the server, which Sentinels may change.
func (l *link) currentPrimary() string {
	for address := range l.client.Nodes() {
		return address
	}
	return ""
}

// watch ends the link when the connection for commands breaks.
func (l *link) watch(broken <-chan error) {
	select {
	case err := <-broken:
		if err == nil {
			return // it was closed
		}
		l.end(fmt.Errorf("the connection was lost: %w", explain(err)))
	case <-l.ctx.Done():
	}
}

// supervise examines the server from time to time, until the link is over or ctx is done. It returns why the link is over.
func (l *link) supervise(ctx context.Context) error {
	examine := time.NewTicker(examineInterval)
	defer examine.Stop()
	look := time.NewTicker(masterInterval)
	defer look.Stop()
	for {
		select {
		case <-l.ctx.Done():
			return context.Cause(l.ctx)
		case <-ctx.Done():
			return errClosed
		case <-look.C:
			if primary := l.currentPrimary(); primary != l.primary {
				l.end(fmt.Errorf("the Sentinels now name %s as the primary", primary))
			}
		case <-examine.C:
			l.examineAgain(ctx)
		}
	}
}

// examineAgain raises the fence again if the server has become another one than it was: a replica, or less durable.
func (l *link) examineAgain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	scripts := l.scripts.Load()
	now, err := l.examine(ctx)
	if err != nil {
		return // the next time, unless the connection breaks
	}
	was := scripts.server
	if err := now.check(); err != nil {
		l.end(err)
	} else if now.promotion != was.promotion || was.keeps() && !now.keeps() {
		_ = l.refence(ctx, scripts) // it ends the link when it fails
	}
}

// refence raises the fence again, unless that has happened since the given scripts were loaded.
func (l *link) refence(ctx context.Context, stale *loadedScripts) error {
	select {
	case l.fencing <- struct{}{}:
		defer func() { <-l.fencing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if l.scripts.Load() != stale {
		return nil
	}
	scripts, err := l.raiseFence(ctx)
	if err != nil {
		if ctx.Err() == nil {
			l.end(explain(err))
		}
		return err
	}
	if scripts.server.runID != stale.server.runID {
		l.end(errTwoServers)
		return errTwoServers
	}
	l.scripts.Store(scripts)
	return nil
}

// A call is one of several of a script.
type call struct{ keys, args []string }

// run runs a script, once. An error that wraps engine.ErrUnavailable means that it has certainly not run.
func (l *link) run(ctx context.Context, name script, keys []string, args ...string) rueidis.RedisResult {
	return l.runAll(ctx, name, []call{{keys, args}})[0]
}

// runAll runs a script for each call, and sends all calls together. If the server has lost the script, or if the data
// belong to another generation, runAll loads it again.
func (l *link) runAll(ctx context.Context, name script, calls []call) []rueidis.RedisResult {
	results := make([]rueidis.RedisResult, len(calls))
	pending := make([]int, len(calls))
	for i := range pending {
		pending[i] = i
	}
	for range 3 {
		scripts := l.scripts.Load()
		commands := make([]rueidis.Completed, len(pending))
		for i, p := range pending {
			commands[i] = l.evalsha(scripts.sha[name], calls[p].keys, calls[p].args...)
		}
		var again []int
		for i, result := range l.doMulti(ctx, commands...) {
			p := pending[i]
			if c := code(result.Error()); c == "NOSCRIPT" || c == "STALE" {
				again = append(again, p)
			}
			results[p] = l.judge(result)
		}
		if len(again) == 0 || l.refence(ctx, scripts) != nil {
			return results
		}
		pending = again
	}
	return results
}

// judge returns the result of a script with an error that says whether the script has run.
func (l *link) judge(result rueidis.RedisResult) rueidis.RedisResult {
	err := result.Error()
	switch c := code(err); {
	case errors.Is(err, errUnsent):
		return rueidis.NewErrorResult(unavailable(err))
	case c == "READONLY" || c == "NOAUTH":
		l.end(explain(err))
	case c == "":
		return result
	}
	return rueidis.NewErrorResult(outcome(err))
}

// do sends a command and waits for the answer. An error that is errUnsent means that it was not sent.
func (l *link) do(ctx context.Context, command rueidis.Completed) rueidis.RedisResult {
	return l.doMulti(ctx, command)[0]
}

// doMulti sends commands together, and waits for all answers.
func (l *link) doMulti(ctx context.Context, commands ...rueidis.Completed) []rueidis.RedisResult {
	if err := l.acquire(ctx); err != nil {
		return repeat(rueidis.NewErrorResult(err), len(commands))
	}
	answers := make(chan []rueidis.RedisResult, 1)
	go func() { // ends with the answers or with the connection; close waits for it by the slot
		defer l.release()
		if len(commands) == 1 {
			answers <- []rueidis.RedisResult{l.commands.Do(context.WithoutCancel(ctx), commands[0])}
			return
		}
		answers <- l.commands.DoMulti(context.WithoutCancel(ctx), commands...)
	}()
	select {
	case all := <-answers:
		return all
	case <-ctx.Done():
		return repeat(rueidis.NewErrorResult(ctx.Err()), len(commands))
	}
}

func repeat(result rueidis.RedisResult, n int) []rueidis.RedisResult {
	all := make([]rueidis.RedisResult, n)
	for i := range all {
		all[i] = result
	}
	return all
}

// acquire waits for the right to send a command.
func (l *link) acquire(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errUnsent, ctx.Err())
	case <-l.ctx.Done():
		return fmt.Errorf("%w: %w", errUnsent, context.Cause(l.ctx))
	}
	if l.ctx.Err() != nil {
		l.release()
		return fmt.Errorf("%w: %w", errUnsent, context.Cause(l.ctx))
	}
	return nil
}

func (l *link) release() { <-l.slots }

// end ends the link for the given reason. It returns at once.
func (l *link) end(err error) { l.cancel(err) }

// cause returns why the link is over, if it is, and otherwise err.
func (l *link) cause(err error) error {
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	return err
}

// close ends the link and waits for everything that belongs to it.
func (l *link) close(err error) {
	l.end(err)
	l.workers.Wait()
	for range mostInFlight { // nobody gets a slot any more
		l.slots <- struct{}{}
	}
	if l.subscriber != nil {
		l.subscriber.close()
	}
	if l.commands != nil {
		l.commands.Close()
	}
	if l.client != nil {
		l.client.Close()
	}
}
