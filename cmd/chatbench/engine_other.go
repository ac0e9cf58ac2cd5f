//go:build !linux

package main

import "net"

// connection is what an engine knows of a client's connection.
type connection struct {
	conn net.Conn
}

// newEngine is the portable engine.
func newEngine(l *load, _ bool) (engine, error) { return newConnEngine(l), nil }

// pin does nothing here.
func pin([]int) (undo func(), err error) { return func() {}, nil }

// raiseFileLimit does nothing here: Go has raised the limit as far as it may.
func raiseFileLimit(int) error { return nil }

// likeEthernet does nothing here.
func likeEthernet(uintptr) {}
