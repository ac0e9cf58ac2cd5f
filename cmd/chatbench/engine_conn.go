package main

import (
	"net"
	"sync"
	"syscall"
	"time"
)

// A connEngine has a goroutine for each connection. It is for TLS, and for systems without epoll: there the load
// tool takes several times the processor time of a good server.
type connEngine struct {
	load *load
	mu   sync.Mutex    // held by whoever calls the engine, and within its callbacks
	wake chan struct{} // something was received
	wg   sync.WaitGroup
	all  []net.Conn
}

// newConnEngine returns with its lock held: poll gives it to the readers.
func newConnEngine(l *load) *connEngine {
	e := &connEngine{load: l, wake: make(chan struct{}, 1)}
	e.mu.Lock()
	return e
}

func (e *connEngine) add(c *client, conn net.Conn) error {
	c.conn.conn = conn
	e.all = append(e.all, conn)
	e.wg.Go(func() { e.read(c) }) // ends with the connection; close waits for it
	return nil
}

func (e *connEngine) read(c *client) {
	buf := make([]byte, 4096) // there are many of them
	for {
		n, err := c.conn.conn.Read(buf)
		now := e.load.now()
		e.mu.Lock()
		if err == nil {
			err = e.load.received(c, buf[:n], now)
		}
		if err != nil {
			e.load.left(c, err)
			c.conn.conn.Close()
		}
		e.mu.Unlock()
		select {
		case e.wake <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

func (e *connEngine) flush(c *client) {
	if len(c.out) == 0 || c.writing || c.gone {
		return
	}
	c.writing = true
	e.wg.Go(func() { // ends when all is written, or with the connection; close waits for it
		e.mu.Lock()
		defer e.mu.Unlock()
		var out []byte
		for len(c.out) > 0 && !c.gone {
			out, c.out = c.out, out[:0]
			e.mu.Unlock()
			_, err := c.conn.conn.Write(out)
			e.mu.Lock()
			if err != nil {
				break // the reader finds out
			}
		}
		c.writing = false
	})
}

func (e *connEngine) poll(until time.Duration) {
	e.mu.Unlock()
	defer e.mu.Lock()
	select {
	case <-e.wake:
	case <-time.After(until - e.load.now()):
	}
}

func (e *connEngine) close() {
	for _, conn := range e.all {
		conn.Close()
	}
	e.mu.Unlock()
	e.wg.Wait()
}

// controlOf makes a net.Dialer's Control of a function that sets options.
func controlOf(set func(fd uintptr)) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error { return c.Control(set) }
}
