package hub

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A suddenlyFull is a socket that fills up once, when TLS is about to write.
type suddenlyFull struct {
	*net.TCPConn
	once sync.Once
	fill func(*net.TCPConn)
}

func (s *suddenlyFull) Write(p []byte) (int, error) {
	if s.fill != nil {
		s.once.Do(func() { s.fill(s.TCPConn) })
	}
	return s.TCPConn.Write(p)
}

// TestTurns_SocketThatFillsBehindTheLookHoldsUpNobody shrinks and fills the socket of a TLS client when its flusher has seen that
// there is room.
func TestTurns_SocketThatFillsBehindTheLookHoldsUpNobody(t *testing.T) {
	var full *suddenlyFull
	peers := newSocketsOver(t, 3, func(server net.Conn, i int) net.Conn {
		s := &suddenlyFull{TCPConn: server.(*net.TCPConn)}
		if i == 1 {
			full = s
		}
		return s
	})
	filled := false
	full.fill = func(c *net.TCPConn) {
		_ = c.SetWriteBuffer(1) // the least that the kernel allows
		raw, err := c.SyscallConn()
		if err != nil {
			t.Error(err)
			return
		}
		junk := make([]byte, 64<<10)
		_ = raw.Write(func(fd uintptr) bool {
			for err = nil; err == nil; {
				_, err = syscall.Write(int(fd), junk)
			}
			return true
		})
		filled = errors.Is(err, syscall.EAGAIN)
	}
	for i := range 20 {
		text := fmt.Sprint("message ", i)
		if _, err := peers[0].Write(clientFrame(finBit|opText, []byte(text))); err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{0, 2} {
			_ = peers[at].SetDeadline(time.Now().Add(patience))
			f, err := readFrame(bufio.NewReader(peers[at]))
			if err != nil || f.payload != text {
				t.Fatalf("client %d: got %q, error %v, want %q", at, f.payload, err, text)
			}
		}
	}
	if !filled {
		t.Error("the socket did not fill between the look and the write")
	}
}
