package chatbroadcast

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// BenchmarkListening prints what 10,000 clients cost that only listen: where the server pings them, and where they ask with ping
// themselves, every 20 s. It wants the machine for itself.
func BenchmarkListening(b *testing.B) {
	for name, asks := range map[string]bool{"pinged by the server": false, "asking": true} {
		b.Run(name, func(b *testing.B) {
			const clients, interval, long = 10_000, 20 * time.Second, 25 * time.Second
			node := startProcess(b, "", "http://localhost {\n\tchat_broadcast /chat/*\n}")
			conns := listen(b, node.http, clients)
			before, began := processTime(b, node.cmd.Process.Pid), time.Now()
			ticker := time.NewTicker(interval / clients)
			defer ticker.Stop()
			for i := 0; time.Since(began) < long; i++ {
				<-ticker.C
				if !asks {
					continue
				}
				if err := conns[i%clients].WriteMessage(websocket.TextMessage, []byte(`{"type":"ping"}`)); err != nil {
					b.Fatal(err)
				}
			}
			used := processTime(b, node.cmd.Process.Pid) - before
			b.ReportMetric(percent(used, time.Since(began)), "%core")
		})
	}
}

// listen connects clients that read until the end of the benchmark.
func listen(b *testing.B, address string, clients int) []*websocket.Conn {
	b.Helper()
	dialer := websocket.Dialer{Subprotocols: []string{"chat-broadcast.v1"}, ReadBufferSize: 512, WriteBufferSize: 512}
	conns := make([]*websocket.Conn, clients)
	var reading sync.WaitGroup
	b.Cleanup(reading.Wait)
	for i := range conns {
		conn, _, err := dialer.Dial("ws://"+strings.Replace(address, "127.0.0.1", "localhost", 1)+"/chat/lobby", nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		conns[i] = conn
		reading.Go(func() { // ends with the connection
			for {
				if _, _, err := conn.ReadMessage(); err != nil {
					return
				}
			}
		})
	}
	return conns
}
