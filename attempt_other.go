//go:build !unix

package chatbroadcast

import (
	"net"
	"syscall"
	"time"
)

// rawConn returns nil: there are no attempts, and every client has a writer of its own.
func rawConn(net.Conn) syscall.RawConn { return nil }

func readable(uintptr) bool { return true }

// processorTime knows nothing: the processors count as busy.
func processorTime() (used time.Duration, known bool) { return 0, false }

func writeNonBlocking(uintptr, []byte) int { return 0 }

// writable returns false: who does not write for a moment counts as held up.
func writable(net.Conn) bool { return false }
