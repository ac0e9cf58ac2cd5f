package conn

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

func TestHold_WritesLeaveTogetherOnRelease(t *testing.T) {
	server, client := tcp(t)
	release := Hold(server)
	if release == nil {
		t.Fatal("a TCP socket was not held")
	}
	for _, part := range []string{"101", "hello"} {
		if _, err := server.Write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, 100)
	_ = client.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := client.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q and %v before the release, want nothing", got[:n], err)
	}
	release()
	_ = client.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := client.Read(got); err != nil || string(got[:n]) != "101hello" {
		t.Errorf("got %q and %v, want both at once", got[:n], err)
	}
}

func TestHold_OnlyOpenTCPSocketsAreHeld(t *testing.T) {
	piped, other := net.Pipe()
	defer other.Close()
	closed, _ := tcp(t)
	_ = closed.Close()
	local, _ := unixSocket(t)
	for _, nc := range []net.Conn{piped, local, closed, new(net.TCPConn)} {
		if Hold(nc) != nil {
			t.Errorf("%T %v was held", nc, nc.LocalAddr())
		}
	}
}
