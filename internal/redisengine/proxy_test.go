//go:build unix

package redisengine

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// A proxy passes connections on to a Redis, and can break them. It reads the answers one by one, so that it can lose some.
type proxy struct {
	t        testing.TB
	listener net.Listener
	wg       sync.WaitGroup

	losePushes  atomic.Bool  // lose the messages of subscriptions
	loseAnswers atomic.Int64 // close the connection instead of passing on so many of the next answers to scripts

	mu    sync.Mutex
	to    string
	cut   bool // refuse connections
	conns map[net.Conn]bool
}

// startProxy starts a proxy in front of a server. The test closes it.
func startProxy(t testing.TB, to string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, to: to, listener: listener, conns: map[net.Conn]bool{}}
	p.wg.Go(p.accept) // ends when the listener is closed
	t.Cleanup(func() {
		listener.Close()
		p.interrupt()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url() string { return "redis://" + p.listener.Addr().String() }

// interrupt breaks all connections, and refuses others until restore.
func (p *proxy) interrupt() { p.setInterrupted(true) }

func (p *proxy) restore() { p.setInterrupted(false) }

func (p *proxy) setInterrupted(is bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = is
	if is {
		for c := range p.conns {
			c.Close()
		}
	}
}

func (p *proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c) }) // ends with the connection
	}
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	to, ok := p.add(client)
	if !ok {
		return
	}
	defer p.remove(client)
	server, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer server.Close()
	var scripts atomic.Bool // the connection runs scripts
	p.wg.Go(func() {        // ends with one of the connections
		defer server.Close()
		buffer := make([]byte, 64<<10)
		for {
			n, err := client.Read(buffer)
			if bytes.Contains(buffer[:n], []byte("EVALSHA")) {
				scripts.Store(true)
			}
			if err == nil {
				_, err = server.Write(buffer[:n])
			}
			if err != nil {
				return
			}
		}
	})
	answers := bufio.NewReader(server)
	for {
		answer, err := readAnswer(answers)
		if err != nil {
			return
		}
		if p.losePushes.Load() && bytes.HasPrefix(answer, []byte(">3\r\n$7\r\nmessage\r\n")) {
			continue
		}
		if scripts.Load() && p.loseAnswers.Add(-1) >= 0 {
			return
		}
		if _, err := client.Write(answer); err != nil {
			return
		}
	}
}

// add returns where the connection leads.
func (p *proxy) add(c net.Conn) (to string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cut {
		return "", false
	}
	p.conns[c] = true
	return p.to, true
}

// redirect breaks all connections, and lets others lead to another server.
func (p *proxy) redirect(to string) {
	p.interrupt()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.to, p.cut = to, false
}

func (p *proxy) remove(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// readAnswer reads one answer of RESP3 as it is.
func readAnswer(r *bufio.Reader) ([]byte, error) {
	answer, err := r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	n, _ := strconv.Atoi(string(bytes.TrimSpace(answer[1:])))
	switch answer[0] {
	case '$', '=', '!':
		if n >= 0 {
			rest := make([]byte, n+2)
			_, err = io.ReadFull(r, rest)
			answer = append(answer, rest...)
		}
		return answer, err
	case '%':
		n *= 2
	case '*', '>', '~':
	default:
		return answer, nil
	}
	for range n {
		element, err := readAnswer(r)
		if err != nil {
			return nil, err
		}
		answer = append(answer, element...)
	}
	return answer, nil
}
