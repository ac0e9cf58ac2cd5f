package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// slowClients are clients that hardly read. Each sends a pong a second, which keeps a server from taking it for dead,
// and which is how it finds out that it was closed; it then joins again.
type slowClients struct {
	rejoins atomic.Int64
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// slowClients is how many there are.
func (o *options) slowClients() int { return int(float64(o.clients) * o.slow / 100) }

// startSlow starts the slow clients of a run. Whoever calls it calls close.
func startSlow(o options) *slowClients {
	ctx, cancel := context.WithCancel(context.Background())
	s := &slowClients{cancel: cancel}
	t := o.target
	t.control = likeEthernet
	for i := range o.slowClients() {
		s.wg.Go(func() { // ends with ctx; close waits for it
			for ctx.Err() == nil {
				if conn, _, err := t.dial(ctx, i, i%o.hubs, false); err == nil {
					readSlowly(ctx, conn, o.slowRate)
				} else {
					pause(ctx, time.Second)
				}
				if ctx.Err() == nil {
					s.rejoins.Add(1)
				}
			}
		})
	}
	return s
}

func (s *slowClients) close() {
	s.cancel()
	s.wg.Wait()
}

// readSlowly reads about so many bytes a second until the connection ends or ctx is done.
func readSlowly(ctx context.Context, conn net.Conn, rate int) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	pong := appendFrame(nil, opPong, true, nil)
	for ctx.Err() == nil {
		if rate > 0 {
			// What is not there within the second is not waited for.
			conn.SetReadDeadline(time.Now().Add(time.Second))
			_, err := io.CopyN(io.Discard, conn, int64(rate))
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
		}
		pause(ctx, time.Second)
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write(pong); err != nil {
			return
		}
	}
}

// pause waits, but not longer than ctx.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
