//go:build !unix

package chatbroadcast

import (
	"net"
	"syscall"
)

// rawConn returns nil: there are no attempts, and every client has a writer of its own.
func rawConn(net.Conn) syscall.RawConn { return nil }

func readable(uintptr) bool { return true }

func writeNonBlocking(uintptr, []byte) int { return 0 }

// writable returns false: who does not write for a moment counts as held up.
func writable(net.Conn) bool { return false }
