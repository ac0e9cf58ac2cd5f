package hub

import (
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/fair"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/gorilla/websocket"
)

// A countingOwner counts what a hub tells the owner of a client.
type countingOwner struct{ left, finished, panicked atomic.Int32 }

func (o *countingOwner) Left()                { o.left.Add(1) }
func (o *countingOwner) Finished()            { o.finished.Add(1) }
func (o *countingOwner) Panicked(any, []byte) { o.panicked.Add(1) }

// raceSettings returns settings of a client that nobody pings.
func raceSettings() *Settings {
	return &Settings{
		Echo: true, MaxMessageSize: 1 << 10, BufferMessages: 16, BufferBytes: 16 << 10, WriteTimeout: 10 * time.Second,
	}
}

// joinPiped returns a client that has joined b from the given address, attached to the server's end of a pipe, and the
// client's end.
func joinPiped(t *testing.T, b *Hub, address string, s *Settings, wrap func(conn.Conn) conn.Conn) (*Client, *countingOwner, net.Conn) {
	t.Helper()
	c, o := new(Client), new(countingOwner)
	c.Init(b.process, o, "", netip.MustParsePrefix(address), s)
	shakeHands(t, c)
	if err := b.Join(c, 0); err != nil {
		t.Fatal(err)
	}
	server, peer := net.Pipe()
	cn := conn.Wrap(server, nil)
	if wrap != nil {
		cn = wrap(cn)
	}
	c.Attach(cn)
	return c, o, peer
}

// shakeHands makes c's WebSocket handshake.
func shakeHands(t *testing.T, c *Client) {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header = http.Header{
		"Connection": {"Upgrade"}, "Upgrade": {"websocket"},
		"Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="},
	}
	type hijacker struct {
		http.ResponseWriter
		*ws.Reader
	}
	upgrader := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
	cn, err := upgrader.Upgrade(hijacker{httptest.NewRecorder(), c.Reader()}, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.Reader().TakeResponse()
	c.Reader().Open(cn, c.settings.MaxMessageSize, c.Pong)
}

// A slowCloser is a connection whose Close waits, as that of TLS may.
type slowCloser struct {
	conn.Conn
	release chan struct{}
}

func (c *slowCloser) Close() error {
	<-c.release
	return c.Conn.Close()
}

// TestClient_SlowCloseHoldsUpNoHub has a client say goodbye on a connection that cannot be half closed. The server closes it
// then, which may take long.
func TestClient_SlowCloseHoldsUpNoHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(NewProcess(), "hub")
		sc := &slowCloser{release: make(chan struct{})}
		c, o, peer := joinPiped(t, b, "192.0.2.1/32", raceSettings(), func(cn conn.Conn) conn.Conn {
			sc.Conn = cn
			return sc
		})
		// As after the client's close frame, which the reader finds first.
		c.mu.Lock()
		c.saidGoodbye = true
		c.mu.Unlock()
		c.Close(ws.Close{Code: ws.CloseNormalClosure})
		c.hub.open(c)
		go c.write(nil, 0)
		frame := make([]byte, 4)
		if _, err := peer.Read(frame); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the writer closes the connection
		if !b.mu.TryLock() {
			t.Error("the hub waits for a connection that closes slowly")
		} else {
			b.mu.Unlock()
		}
		close(sc.release)
		synctest.Wait()
		c.end()
		if o.left.Load() != 1 || o.finished.Load() != 1 {
			t.Errorf("got %d left, %d finished, want 1 each", o.left.Load(), o.finished.Load())
		}
		_ = peer.Close()
	})
}

// TestClient_HandshakeIsWorkOfItsAddress lets clients of one address connect again and again, and say nothing.
func TestClient_HandshakeIsWorkOfItsAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := NewProcess()
		p.Processors.Used = func() (time.Duration, bool) { return 0, false } // they count as busy
		b := New(p, "hub")
		other, _, otherPeer := joinPiped(t, b, "192.0.2.1/32", raceSettings(), nil)
		other.Start()
		load := p.Processors.Enter(netip.MustParsePrefix("192.0.2.2/32"))
		defer load.Leave()
		// Each is little work. Together they are more than an address may cause at once.
		for range 100 {
			c, _, peer := joinPiped(t, b, "192.0.2.2/32", raceSettings(), nil)
			c.Start()
			synctest.Wait()
			_ = peer.Close()
			synctest.Wait()
		}
		began := time.Now()
		load.Pay(fair.RequestWork, func() bool { return false })
		if time.Since(began) == 0 {
			t.Error("the next request of the address waits for nothing, want the handshakes before it to count")
		}
		_ = otherPeer.Close()
		synctest.Wait()
		time.Sleep(time.Minute)
	})
}

// TestHub_MessageAtTheLastMomentKeepsTheHub publishes between the end of a hub's age and its close. Whoever asks first whether
// the hub is too old and closes it afterwards would lose a message that was published with success.
func TestHub_MessageAtTheLastMomentKeepsTheHub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(NewProcess(), "hub")
		s := raceSettings()
		s.HistoryMessages, s.HistoryAge = 10, time.Minute
		b.Grow(s)
		for range 2 {
			if _, ok := publishIn(b, textMessage("")); !ok {
				t.Fatal("the hub is closed, want it open for as long as a message is not too old")
			}
			time.Sleep(45 * time.Second)
			if got := b.CloseIfAged(); got != 15*time.Second {
				t.Errorf("got %v until the hub closes, want 15s", got)
			}
		}
		time.Sleep(15 * time.Second)
		if got := b.CloseIfAged(); got > 0 {
			t.Errorf("got %v until the hub closes, want it closed", got)
		}
		if _, ok := publishIn(b, textMessage("")); ok {
			t.Error("a message was published in a closed hub")
		}
	})
}

// TestHub_NoMessageIsLostWhenAHubAges publishes all the time in a hub that closes as soon as its newest message is too old.
func TestHub_NoMessageIsLostWhenAHubAges(t *testing.T) {
	for range 200 {
		b := New(NewProcess(), "hub")
		s := raceSettings()
		s.HistoryMessages, s.HistoryAge = 10, 100*time.Microsecond
		b.Grow(s)
		closed := make(chan time.Time)
		go func() {
			for b.CloseIfAged() > 0 {
			}
			closed <- time.Now()
		}()
		var last time.Time
		for {
			r, ok := publishIn(b, textMessage(""))
			if !ok {
				break
			}
			last = r.At
		}
		if at := <-closed; !last.IsZero() && at.Sub(last) < s.HistoryAge {
			t.Fatalf("the hub closed %v after its last message, want %v at least", at.Sub(last), s.HistoryAge)
		}
	}
}
