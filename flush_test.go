package chatbroadcast

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// TestFlush_BurstDoesNotLagThoseWhoRead sends many times the buffer as fast as the connection takes it, to clients that
// read as fast as they can. What separates them is only who gets the processor when.
//
// A client whose socket is full for writerPatience counts as slow, and that may befall a reader of this process when others
// keep the processors busy. So a reader that is cut must have had much to read, and not have read it, for about as long;
// then the burst is sent again. Once, all readers must get all of it.
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
	chat_broadcast
}`)
			var burst []byte
			for j := range tc.messages {
				burst = append(burst, clientFrame(0x81, fmt.Appendf(nil, "%*d", tc.size, j))...)
			}
			// gets reports whether the burst, sent by the first of peers, reaches all of them.
			gets := func(peers []*peer) bool {
				var readers sync.WaitGroup
				var failed sync.Once
				all := true
				for i, p := range peers {
					late := newLateness(p)
					readers.Go(func() {
						p.patient()
						for j := range tc.messages {
							f, err := p.readFrame()
							if err == nil && strings.TrimLeft(f.payload, " ") == fmt.Sprint(j) {
								continue
							}
							failed.Do(func() {
								all = false
								lagged := f == frame{opClose, string(websocket.FormatCloseMessage(1013, "lagged"))}
								if !lagged || late.longest < writerPatience {
									t.Errorf("client %d: got %.60q, error %v, want message %d; it was late by %v at most",
										i, strings.TrimLeft(f.payload, " "), err, j, late.longest)
								}
								for _, p := range peers { // the others may wait in vain: this may be the sender
									p.conn.Close()
								}
							})
							return
						}
					})
				}
				_ = peers[0].conn.SetWriteDeadline(time.Now().Add(patience))
				_, _ = peers[0].conn.Write(burst) // the readers notice what is not sent
				readers.Wait()
				for _, p := range peers {
					p.conn.Close()
				}
				return all
			}
			for i := range 20 {
				var peers []*peer
				for range tc.clients {
					peers = append(peers, tc.connect(t, fmt.Sprint("/", i)))
				}
				if gets(peers) || t.Failed() {
					return
				}
				t.Log("a reader was starved of the processor: once more")
			}
			t.Error("some reader was starved of the processor each time")
		})
	}
}

// A lateness reads from a connection, and notes how late it was to read what had come.
type lateness struct {
	net.Conn
	last    time.Time     // when it had read before, or began
	longest time.Duration // after that, that it came back and found much to read
}

// muchToRead is what only comes together while nobody reads: more than the server sends in one write. Below TLS a read
// returns less: there nobody is late.
const muchToRead = 2 * maxWrite

func newLateness(p *peer) *lateness {
	if t, ok := p.conn.(*net.TCPConn); ok {
		_ = t.SetReadBuffer(2 * muchToRead) // or so much would not fit at first
	}
	l := &lateness{Conn: p.conn, last: time.Now()}
	p.r = bufio.NewReaderSize(io.MultiReader(bytes.NewReader(buffered(p.r)), l), muchToRead)
	return l
}

func buffered(r *bufio.Reader) []byte {
	b, _ := r.Peek(r.Buffered()) // cannot fail: it is buffered
	return b
}

func (l *lateness) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	now := time.Now()
	if n >= muchToRead {
		l.longest = max(l.longest, now.Sub(l.last))
	}
	l.last = now
	return n, err
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
