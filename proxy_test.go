package chatbroadcast

import (
	"bytes"
	"net"
	"sync"
	"testing"
)

// A faultyProxy stands between a node and its Redis, and loses what the test says.
type faultyProxy struct {
	listener net.Listener

	mu      sync.Mutex
	changed *sync.Cond
	target  string
	conns   map[net.Conn]bool // both ends of each connection
	closed  bool

	loseReplies, losePushes, frozen bool
}

// startProxy starts a proxy that loses nothing.
func startProxy(t testing.TB, target string) *faultyProxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &faultyProxy{listener: listener, target: target, conns: map[net.Conn]bool{}}
	p.changed = sync.NewCond(&p.mu)
	var serving sync.WaitGroup
	serving.Go(func() { p.serve(&serving) }) // ends when the listener is closed
	t.Cleanup(func() {
		listener.Close()
		p.set(func() { p.closed = true })
		p.cut()
		serving.Wait()
	})
	return p
}

func (p *faultyProxy) address() string { return p.listener.Addr().String() }

// set changes what the proxy does.
func (p *faultyProxy) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	p.changed.Broadcast()
}

// cut closes all connections.
func (p *faultyProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		conn.Close()
	}
}

func (p *faultyProxy) serve(serving *sync.WaitGroup) {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		target := p.target
		p.mu.Unlock()
		server, err := net.Dial("tcp", target)
		if err != nil {
			client.Close()
			continue
		}
		p.mu.Lock()
		p.conns[client], p.conns[server] = true, true
		if p.closed {
			client.Close()
			server.Close()
		}
		p.mu.Unlock()
		c := &proxied{proxy: p, client: client, server: server}
		serving.Go(func() { c.copy(server, client, c.noteCommands) })    // ends with the connection
		serving.Go(func() { c.copy(client, server, c.passesFromRedis) }) // ends with the connection
	}
}

// A proxied is one connection through a proxy.
type proxied struct {
	proxy          *faultyProxy
	client, server net.Conn

	// The proxy's lock guards these.
	subscribes bool // the connection is for subscriptions
	lost       bool // something was lost, so the rest has no beginning
}

// copy copies what passes from one end to the other.
func (c *proxied) copy(to, from net.Conn, passes func([]byte) bool) {
	defer func() {
		c.client.Close()
		c.server.Close()
		c.proxy.mu.Lock()
		delete(c.proxy.conns, from)
		c.proxy.mu.Unlock()
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 && passes(buffer[:n]) {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// noteCommands notes whether the connection is for subscriptions. Commands are lost only while the proxy is frozen and is closed
// then.
func (c *proxied) noteCommands(data []byte) bool {
	p := c.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	if bytes.Contains(data, []byte("SUBSCRIBE")) {
		c.subscribes = true
	}
	return c.thawedLocked()
}

// passesFromRedis reports whether the client may get something. When something was lost, the rest of the connection is lost, too.
func (c *proxied) passesFromRedis([]byte) bool {
	p := c.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loseReplies && !c.subscribes || p.losePushes && c.subscribes {
		c.lost = true
	}
	return !c.lost && c.thawedLocked()
}

// thawedLocked waits while the proxy is frozen.
func (c *proxied) thawedLocked() bool {
	for c.proxy.frozen && !c.proxy.closed {
		c.proxy.changed.Wait()
	}
	return !c.proxy.closed
}
