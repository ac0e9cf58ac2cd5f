//go:build !linux

package conn

import "net"

// Hold does nothing and returns nil: this system cannot keep bytes back for a moment.
func Hold(net.Conn) (release func()) { return nil }
