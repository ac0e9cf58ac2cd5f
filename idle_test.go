package chatbroadcast

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
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
		if !strings.Contains(stack, "(*Client).listen(") {
			continue
		}
		all++
		if !strings.Contains(stack, "(*Client).read(") {
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

// waitsBetweenMessages sends messages and pongs of all kinds, and wants p's reader to wait after each: after two messages within a
// second in a read, until a pong comes.
func waitsBetweenMessages(t *testing.T, p *peer) {
	waits := func(after string) {
		t.Helper()
		eventually(t, "the reader to wait after "+after, func() bool {
			all, waiting := readers(t)
			return all == 1 && waiting == 1
		})
	}
	pong := clientFrame(finBit|websocket.PongMessage, []byte("life"))
	reads := func(after string) {
		t.Helper()
		eventually(t, "the reader to read after "+after, func() bool {
			all, waiting := readers(t)
			return all == 1 && waiting == 0
		})
		p.write(pong)
		waits(after + " and a pong")
	}
	defer func() {
		p.conn.Close()
		eventually(t, "the reader to be gone", func() bool {
			all, _ := readers(t)
			return all == 0
		})
	}()
	waits("joining")

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
	reads("a pong in pieces and a message")

	large := strings.Repeat("x", 3*readBuffer)
	p.text(large)
	p.wantText(large)
	reads("a message larger than a buffer")

	for i := range 200 { // faster than they are read, so that they are read together
		p.text(fmt.Sprint(i))
	}
	for i := range 200 {
		p.wantText(fmt.Sprint(i))
	}
	reads("a burst")
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
			ping 100ms 1s
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
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v: a ping waited for the timeout of the one before", took)
	}
}

// atRandom is a connection that sends in pieces of random sizes, with pauses.
type atRandom struct {
	net.Conn
	random *rand.Rand
}

func (c atRandom) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		size := 1 + c.random.IntN(len(p)-n)
		if c.random.IntN(3) == 0 {
			size = min(size, 4)
		}
		size, err = c.Conn.Write(p[n : n+size])
		n += size
		if c.random.IntN(8) == 0 {
			time.Sleep(time.Duration(c.random.IntN(300)) * time.Microsecond) // so that it arrives in pieces, too
		}
	}
	return n, err
}

// A talker sends messages in which pings and pongs may stand anywhere, and wants each of them back.
type talker struct {
	*peer
	random *rand.Rand
	out    []byte
	want   []string
}

func (p *talker) control() {
	for p.random.IntN(3) == 0 {
		opcode := []byte{websocket.PongMessage, websocket.PongMessage, websocket.PingMessage}[p.random.IntN(3)]
		p.out = append(p.out, clientFrame(finBit|opcode, make([]byte, p.random.IntN(126)))...)
	}
}

func (p *talker) message() {
	size := p.random.IntN(200)
	switch p.random.IntN(20) {
	case 0:
		size = readBuffer - 10 + p.random.IntN(20)
	case 1:
		size = p.random.IntN(60_000)
	}
	message := fmt.Sprintf("%0*d", size+1, p.random.Uint32())
	p.want = append(p.want, message)
	p.control()
	at := p.random.IntN(len(message))
	if p.random.IntN(3) == 0 {
		p.out = append(p.out, clientFrame(websocket.TextMessage, []byte(message[:at]))...)
		p.control()
		p.out = append(p.out, clientFrame(finBit, []byte(message[at:]))...)
	} else {
		p.out = append(p.out, clientFrame(finBit|websocket.TextMessage, []byte(message))...)
	}
	p.control()
}

// talk is run in a goroutine of its own: it returns what is wrong.
func (p *talker) talk(host string, rounds int) error {
	p.out = []byte(handshakeRequest(host, "/chat/"+fmt.Sprint(p.random.Uint64()), ""))
	if p.random.IntN(2) == 0 {
		p.message() // before the 101, which is a client's own risk, but not to be lost
	}
	if _, err := p.conn.Write(p.out); err != nil {
		return err
	}
	p.patient()
	resp, err := http.ReadResponse(p.r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("joining: %v, error %w", resp, err)
	}
	for range rounds {
		p.out = nil
		for range p.random.IntN(4) {
			p.message()
		}
		if _, err := p.conn.Write(p.out); err != nil {
			return err
		}
		for len(p.want) > 0 {
			p.patient()
			switch f, err := p.readFrame(); {
			case err != nil:
				return fmt.Errorf("%d messages are missing: %w", len(p.want), err)
			case f.opcode == websocket.CloseMessage:
				return fmt.Errorf("closed: %q", f.payload)
			case f.opcode == websocket.PingMessage:
				if _, err := p.conn.Write(clientFrame(finBit|websocket.PongMessage, []byte(f.payload))); err != nil {
					return err
				}
			case f.opcode == websocket.TextMessage && f.payload != p.want[0]:
				return fmt.Errorf("got %.30q, want %.30q", f.payload, p.want[0])
			case f.opcode == websocket.TextMessage:
				p.want = p.want[1:]
			}
		}
	}
	return nil
}

func TestClient_NothingStaysUnread(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	const directive = "chat_broadcast /chat/* {\n\tping 50ms 10s\n\tbuffer 100000 64MiB\n}\n"
	startCaddy(t, "http://localhost:9080, https://localhost:9443 {\n"+directive+"}\n"+
		"http:// {\n\tbind unix/"+socket+"\n"+directive+"}")
	dialTLS(t).Close() // there is a certificate
	var talkers sync.WaitGroup
	for i, network := range []string{"tcp", "tcp", "unix", "unix", "tls", "tls", "tls", "tls"} {
		random := rand.New(rand.NewPCG(uint64(i), uint64(time.Now().UnixNano())))
		address := map[string]string{"tcp": httpAddr, "unix": socket, "tls": httpsAddr}[network]
		dialed, err := net.Dial(strings.Replace(network, "tls", "tcp", 1), address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dialed.Close() })
		var conn net.Conn = atRandom{dialed, random}
		host := httpAddr
		if network == "tls" {
			host = httpsAddr
			conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"})
		}
		p := &talker{peer: &peer{t: t, conn: conn, r: bufio.NewReader(conn)}, random: random}
		talkers.Go(func() {
			if err := p.talk(host, 300); err != nil {
				t.Errorf("%s: %v", network, err)
			}
		})
	}
	talkers.Wait()
}
