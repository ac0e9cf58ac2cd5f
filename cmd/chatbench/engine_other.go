//go:build !linux

package main

import (
	"errors"
	"net"
	"time"
)

// A connection is an engine's part of a client.
type connection struct {
	conn net.Conn
}

// newEngine returns the portable engine, which cannot spin.
func newEngine(l *load) (engine, error) {
	if l.spin {
		return nil, errors.New("-spin needs epoll, which only Linux has")
	}
	return newConnEngine(l), nil
}

// processTime fails here.
func processTime(int) (time.Duration, error) {
	return 0, errors.New("only Linux tells the processor time of another process")
}

// pin does nothing here.
func pin([]int) (undo func(), err error) { return func() {}, nil }

// raiseFileLimit does nothing here: Go raises the limit by itself.
func raiseFileLimit(int) error { return nil }

// likeEthernet does nothing here.
func likeEthernet(uintptr) {}
