package chatbroadcast

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// readers counts the goroutines that read for a client, and those of them that do nothing but wait: on a stack that has
// not grown, without a buffer.
func readers(t *testing.T) (all, waiting int) {
	t.Helper()
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 2); err != nil {
		t.Fatal(err)
	}
	for stack := range strings.SplitSeq(profile.String(), "\n\n") {
		if !strings.Contains(stack, "(*client).listen(") {
			continue
		}
		all++
		if !strings.Contains(stack, "(*client).read(") {
			waiting++
		}
	}
	return all, waiting
}

// inPieces is a connection that sends every byte by itself.
type inPieces struct{ net.Conn }

func (c inPieces) Write(p []byte) (int, error) {
	for i := range p {
		if _, err := c.Conn.Write(p[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

func TestClient_WaitsWithoutABufferBetweenMessages(t *testing.T) {
	startCaddy(t, `http://localhost:9080, https://localhost:9443 {
		chat_broadcast /chat/*
	}`)
	dialTLS(t).Close() // there is a certificate
	for name, connect := range map[string]func(t *testing.T) *peer{
		"TCP": func(t *testing.T) *peer { return join(t, "/chat/a") },
		"TLS": func(t *testing.T) *peer { return joinTLS(t, "/chat/a") },
		"TLS in pieces": func(t *testing.T) *peer {
			conn, err := net.Dial("tcp", httpsAddr)
			if err != nil {
				t.Fatal(err)
			}
			overTLS := tls.Client(inPieces{conn}, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"})
			return joinOn(t, overTLS, httpsAddr, "/chat/a")
		},
	} {
		t.Run(name, func(t *testing.T) { waitsBetweenMessages(t, connect(t)) })
	}
}

// waitsBetweenMessages sends messages and pongs of all kinds, and wants p's reader to wait after each.
func waitsBetweenMessages(t *testing.T, p *peer) {
	waits := func(after string) {
		t.Helper()
		eventually(t, "the reader to wait after "+after, func() bool {
			all, waiting := readers(t)
			return all == 1 && waiting == 1
		})
	}
	defer func() {
		p.conn.Close()
		eventually(t, "the reader to be gone", func() bool {
			all, _ := readers(t)
			return all == 0
		})
	}()
	waits("joining")

	pong := clientFrame(finBit|websocket.PongMessage, []byte("life"))
	p.text("one")
	p.wantText("one")
	waits("a message")
	p.write(pong)
	waits("a pong")

	p.write(append(append(append(pong, pong...), clientFrame(finBit|websocket.TextMessage, []byte("two"))...), pong...))
	p.wantText("two")
	waits("a message among pongs")

	for _, b := range pong { // each byte by itself
		p.write([]byte{b})
	}
	p.text("three")
	p.wantText("three")
	waits("a pong in pieces")

	large := strings.Repeat("x", 3*readBuffer)
	p.text(large)
	p.wantText(large)
	waits("a message larger than a buffer")

	for i := range 200 { // faster than they are read, so that they are read together
		p.text(fmt.Sprint(i))
	}
	for i := range 200 {
		p.wantText(fmt.Sprint(i))
	}
	waits("a burst")
}

func TestClient_MalformedPongsAreRefused(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
		chat_broadcast /chat/*
	}`)
	for name, frame := range map[string][]byte{
		"unmasked":      {finBit | websocket.PongMessage, 0},
		"fragmented":    {websocket.PongMessage, maskBit, 1, 2, 3, 4},
		"reserved bits": {finBit | 0x40 | websocket.PongMessage, maskBit, 1, 2, 3, 4},
		"too long":      append([]byte{finBit | websocket.PongMessage, maskBit | 126, 0, 126, 1, 2, 3, 4}, make([]byte, 126)...),
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, "/chat/a")
			p.write(frame)
			p.wantClose(websocket.CloseProtocolError, "")
		})
	}
}

func TestClient_IsPingedWhileItsReaderWaits(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080, https://localhost:9443 {
		chat_broadcast /chat/* {
			ping 100ms 2s
		}
	}`)
	dead := 0
	began := time.Now()
	for name, connect := range map[string]func(t testing.TB, path string, header ...string) *peer{"TCP": join, "TLS": joinTLS} {
		t.Run(name, func(t *testing.T) {
			p := connect(t, "/chat/a")
			for i := range 5 {
				if got := p.next(); got.opcode != websocket.PingMessage {
					t.Fatalf("got %v, want a ping", got)
				}
				p.send(websocket.PongMessage, "")
				if i == 2 {
					p.text("life")
					p.wantText("life")
				}
			}
			if got := p.next(); got.opcode != websocket.PingMessage {
				t.Fatalf("got %v, want a ping", got)
			}
			p.wantEOF()
			dead++
			if closed := s.logged(moduleID, dead)[dead-1]; closed["reason"] != "ping_timeout" {
				t.Errorf("got reason %v, want ping_timeout", closed["reason"])
			}
		})
	}
	if took := time.Since(began); took > patience/2 {
		t.Errorf("took %v: a ping waited for the timeout of the one before", took)
	}
}
