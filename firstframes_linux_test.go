package chatbroadcast

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// TestUpgrade_The101LeavesWithTheFirstFrames reads once after the handshake. Each segment would wake the reader up.
func TestUpgrade_The101LeavesWithTheFirstFrames(t *testing.T) {
	startCaddy(t, `
		http://localhost:9080, https://localhost:9443 {
			chat_broadcast /history/* {path} {
				history 10
			}
			chat_broadcast /none/* {path}
		}`)
	for _, dial := range []struct {
		name string
		dial func() net.Conn
	}{
		{"TCP", func() net.Conn {
			nc, err := net.Dial("tcp", httpAddr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { nc.Close() })
			return nc
		}},
		{"TLS", func() net.Conn { return dialTLS(t) }},
	} {
		for _, kind := range []struct{ name, path, header, want string }{
			{"a raw client, which gets a history", "/history/", "", "before"},
			{"a client of the events protocol, which gets hello", "/none/", "Sec-WebSocket-Protocol: " + hub.EventsProtocol + "\r\n", `"type":"hello"`},
			{"a raw client, which gets nothing", "/none/", "", "HTTP/1.1 101"},
		} {
			t.Run(dial.name+", "+kind.name, func(t *testing.T) {
				path := kind.path + dial.name
				sender := join(t, path)
				sender.text("before")
				sender.wantText("before")
				go func() { _, _ = io.Copy(io.Discard, sender.conn) }() // it ends with the sender
				fastest := time.Hour
				for range 10 {
					nc := dial.dial()
					began := time.Now()
					if _, err := nc.Write([]byte(handshakeRequest("localhost:9080", path, kind.header))); err != nil {
						t.Fatal(err)
					}
					got := make([]byte, 64<<10)
					_ = nc.SetReadDeadline(began.Add(patience))
					n, err := nc.Read(got)
					if dial.name == "TLS" && err == nil && !bytes.Contains(got[:n], []byte(kind.want)) {
						// It is a record of its own. If it came with the first it is there without a wait.
						_ = nc.SetReadDeadline(time.Now())
						var more int
						more, err = nc.Read(got[n:])
						n += more
					}
					if err != nil || !bytes.Contains(got[:n], []byte(kind.want)) {
						t.Fatalf("got %q and %v with the first read, want the 101 and %s", got[:n], err, kind.want)
					}
					sender.text("after")
					_ = nc.SetReadDeadline(began.Add(patience))
					for !bytes.Contains(got[:n], []byte("after")) {
						n, err = nc.Read(got)
						if err != nil {
							t.Fatal(err)
						}
					}
					fastest = min(fastest, time.Since(began))
					nc.Close()
				}
				// The kernel would keep back for 200 ms what nobody releases.
				if fastest > 150*time.Millisecond {
					t.Errorf("the fastest of 10 clients had a message after %v, want 150 ms at most", fastest)
				}
			})
		}
	}
}
