package chatbroadcast

import (
	"sync"
	"syscall"
)

// An attempt writes to a connection without waiting. It is for one goroutine, which uses it for many connections.
type attempt struct {
	p    []byte
	sent int
	try  func(fd uintptr) bool // bound once: a closure for each write would be an allocation
}

// attempts keep them between uses.
var attempts = sync.Pool{New: func() any { return newAttempt() }}

func newAttempt() *attempt {
	a := new(attempt)
	a.try = func(fd uintptr) bool {
		a.sent = max(0, writeNonBlocking(fd, a.p))
		return true // do not wait
	}
	return a
}

// write returns how many bytes of p the connection took: fewer than all where it is full or broken, of which a write
// that may wait will learn.
func (a *attempt) write(conn syscall.RawConn, p []byte) int {
	a.p, a.sent = p, 0
	_ = conn.Write(a.try)
	a.p = nil
	return a.sent
}
