package main

import (
	"net"
	"sync"
	"syscall"
	"time"
)

// A connEngine runs a goroutine for each connection. It serves systems without epoll. With it the tool takes several times
// the processor time of a good server.
type connEngine struct {
	load *load
	mu   sync.Mutex    // held by the caller of any method, and during callbacks
	wake chan struct{} // something was received
	wg   sync.WaitGroup
	all  []net.Conn
}

// newConnEngine returns an engine whose lock is held. Only poll releases it to the readers.
func newConnEngine(l *load) *connEngine {
	e := &connEngine{load: l, wake: make(chan struct{}, 1)}
	e.mu.Lock()
	return e
}

func (e *connEngine) add(c *client, conn net.Conn, rest []byte) error {
	c.conn.conn = conn
	e.all = append(e.all, conn)
	if err := e.load.received(c, rest, e.load.now()); err != nil {
		e.load.ended(c, err)
		conn.Close()
	}
	e.wg.Go(func() { e.read(c) }) // ends with the connection; close waits for it
	return nil
}

func (e *connEngine) read(c *client) {
	buf := make([]byte, 4096) // small, because there is one for each client
	for {
		n, err := c.conn.conn.Read(buf)
		now := e.load.now()
		e.mu.Lock()
		if err == nil {
			err = e.load.received(c, buf[:n], now)
		}
		if err != nil {
			e.load.ended(c, err)
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

func (e *connEngine) poll(until time.Duration, _ bool) {
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

// controlOf turns a function that sets socket options into a net.Dialer's Control.
func controlOf(set func(fd uintptr)) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error { return c.Control(set) }
}
