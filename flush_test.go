package chatbroadcast

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestFlush_BurstDoesNotLagThoseWhoRead sends many times the buffer as fast as the connection takes it, to clients that
// read as fast as they can. What separates them is only who gets the processor when.
func TestFlush_BurstDoesNotLagThoseWhoRead(t *testing.T) {
	for _, tc := range []struct {
		name                    string
		connect                 func(testing.TB, string, ...string) *peer
		clients, messages, size int
	}{
		{"plain", join, 60, 5000, 0},
		{"TLS", joinTLS, 60, 5000, 0},
		{"plain, more than sockets hold", join, 4, 400, 20_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			startCaddy(t, `http://localhost:9080, https://localhost:9443 {
	chat_broadcast hub
}`)
			var readers sync.WaitGroup
			sender := tc.connect(t, "/")
			for i := range tc.clients {
				p := sender
				if i > 0 {
					p = tc.connect(t, "/")
				}
				readers.Go(func() {
					p.patient()
					for j := range tc.messages {
						f, err := p.readFrame()
						if want := fmt.Sprint(j); err != nil || strings.TrimLeft(f.payload, " ") != want {
							t.Errorf("client %d: got %.40q, error %v, want message %s", i, f.payload, err, want)
							return
						}
					}
				})
			}
			var burst []byte
			for j := range tc.messages {
				burst = append(burst, clientFrame(0x81, fmt.Appendf(nil, "%*d", tc.size, j))...)
			}
			sender.write(burst)
			readers.Wait()
		})
	}
}

// TestFlush_StuckClientDelaysNobody measures how fast messages go round beside clients that take nothing, some of which
// get stuck again and again.
func TestFlush_StuckClientDelaysNobody(t *testing.T) {
	startCaddy(t, `http://localhost:9080, https://localhost:9443 {
	chat_broadcast * {
		hub hub
		on_lag skip
	}
}`)
	c := newConversation(t, "/")
	for range 20 {
		join(t, "/")
		joinTLS(t, "/")
	}
	payload := strings.Repeat("x", 60_000)
	began := time.Now()
	c.exchange(400, payload) // 24 MB: more than the kernel buffers of any
	if took := time.Since(began); took > patience {
		t.Errorf("400 messages took %v", took)
	}
}

func TestAttempt_TakesWhatTheSocketTakes(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	raw := rawConn(conn)
	if raw == nil {
		t.Fatal("a TCP connection has no file descriptor")
	}
	a := newAttempt()
	if got := a.write(raw, []byte("hello")); got != 5 {
		t.Errorf("an empty socket: got %d bytes taken, want 5", got)
	}
	large := make([]byte, 64<<20)
	if got := a.write(raw, large); got <= 0 || got == len(large) {
		t.Errorf("64 MiB: got %d bytes taken, want some", got)
	}
	eventually(t, "the socket to be full", func() bool { return a.write(raw, large) == 0 })
	conn.Close()
	if got := a.write(raw, []byte("hello")); got != 0 {
		t.Errorf("a closed connection: got %d bytes taken", got)
	}
}
