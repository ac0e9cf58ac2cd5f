//go:build !linux

package main

import "net"

// A connection is an engine's part of a client.
type connection struct {
	conn net.Conn
}

// newEngine returns the portable engine.
func newEngine(l *load, _ bool) (engine, error) { return newConnEngine(l), nil }

// pin does nothing here.
func pin([]int) (undo func(), err error) { return func() {}, nil }

// raiseFileLimit does nothing here: Go raises the limit by itself.
func raiseFileLimit(int) error { return nil }

// likeEthernet does nothing here.
func likeEthernet(uintptr) {}
