//go:build !unix

package conn

import "net"

// wrap returns a Conn that can neither try nor wait.
func wrap(s stream) Conn { return &s }

// writable returns false: this system does not tell.
func writable(net.Conn) bool { return false }
