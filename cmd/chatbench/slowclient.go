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

// slowClients are clients that hardly read. Each sends a pong a second, so that the server does not think it dead, and so
// that the client notices when it was closed. Then it reconnects.
type slowClients struct {
	rejoins atomic.Int64
	cancel  context.CancelFunc
	wg      sync.WaitGroup
}

// slowClients returns the number of slow clients.
func (o *options) slowClients() int { return int(float64(o.clients) * o.slow / 100) }

// startSlow starts the slow clients of a run. The caller must call close.
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

// readSlowly reads about rate bytes a second until the connection or ctx ends.
func readSlowly(ctx context.Context, conn net.Conn, rate int) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	pong := appendFrame(nil, opPong, true, nil)
	for ctx.Err() == nil {
		if rate > 0 {
			// Wait for at most a second.
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

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
