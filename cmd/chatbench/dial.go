package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha1" // RFC 6455 §1.3 prescribes it
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// connectTimeout is how long a client may take to connect. A server that has just started may still load its
// configuration; one that needs longer is not ready for a load.
const connectTimeout = 15 * time.Second

// perSourceAddress is how many clients connect from one loopback address. Each connection needs its own local port, and
// Linux offers some 28,000 for each address.
const perSourceAddress = 20000

// eventsProtocol is the subprotocol of clients that speak events.
const eventsProtocol = "chat-broadcast.v1"

// A target is the server that clients connect to.
type target struct {
	url      string // {hub} in it stands for the hub's number
	header   http.Header
	insecure bool             // do not verify the server's certificate
	control  func(fd uintptr) // sets options of a socket before it connects; may be nil
	tls      *tls.Config      // set by check; nil for ws
}

// check validates the URL and sets t.tls.
func (t *target) check(hubs int) error {
	u, err := url.Parse(strings.ReplaceAll(t.url, "{hub}", "0"))
	switch {
	case err != nil:
		return err
	case u.Scheme != "ws" && u.Scheme != "wss":
		return fmt.Errorf("-url %q: not ws:// or wss://", t.url)
	case hubs > 1 && !strings.Contains(t.url, "{hub}"):
		return fmt.Errorf("-url %q: several hubs need {hub} in the URL", t.url)
	}
	if u.Scheme == "wss" {
		t.tls = &tls.Config{InsecureSkipVerify: t.insecure, ServerName: u.Hostname()}
	}
	return nil
}

// dial connects client i to a hub, with or without the events protocol. It returns the connection and the bytes that the
// server has already sent after its 101.
func (t *target) dial(ctx context.Context, i, hub int, events bool) (conn net.Conn, rest []byte, err error) {
	defer func() {
		if err != nil && conn != nil {
			conn.Close()
		}
	}()
	u, err := url.Parse(strings.ReplaceAll(t.url, "{hub}", strconv.Itoa(hub)))
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	d := net.Dialer{KeepAlive: -1}
	if ip := net.ParseIP(u.Hostname()); i >= perSourceAddress && ip != nil && ip.To4() != nil && ip.IsLoopback() {
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i/perSourceAddress))}
	}
	if t.control != nil {
		d.Control = controlOf(t.control)
	}
	if conn, err = d.DialContext(ctx, "tcp", hostPort(u)); err != nil {
		return nil, nil, err
	}
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	if t.tls != nil {
		conn = tls.Client(&pipe{Conn: conn}, t.tls)
	}
	protocol := ""
	if events {
		protocol = eventsProtocol
	}
	rest, err = handshake(conn, u, t.header, protocol)
	conn.SetDeadline(time.Time{})
	return conn, rest, err
}

// hostPort returns the address of a WebSocket URL.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"ws": "80", "wss": "443"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// handshake performs the opening handshake (RFC 6455 §4.1) without extensions, offering the subprotocol unless it is
// empty. It returns the bytes that follow the server's 101.
func handshake(conn net.Conn, u *url.URL, header http.Header, protocol string) (rest []byte, err error) {
	var nonce [16]byte
	rand.Read(nonce[:])
	key := base64.StdEncoding.EncodeToString(nonce[:])
	var b strings.Builder
	fmt.Fprintf(&b, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n", u.RequestURI(), u.Host, key)
	if protocol != "" {
		fmt.Fprintf(&b, "Sec-WebSocket-Protocol: %s\r\n", protocol)
	}
	if err := header.Write(&b); err != nil {
		return nil, err
	}
	b.WriteString("\r\n")
	if _, err := io.WriteString(conn, b.String()); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(conn, 2048)
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, err
	}
	response.Body.Close()
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	switch {
	case response.StatusCode != http.StatusSwitchingProtocols:
		return nil, fmt.Errorf("%s answered %s", u, response.Status)
	case response.Header.Get("Sec-WebSocket-Accept") != base64.StdEncoding.EncodeToString(sum[:]):
		return nil, errors.New("the answer has a wrong Sec-WebSocket-Accept")
	case protocol != "" && response.Header.Get("Sec-WebSocket-Protocol") != protocol:
		return nil, fmt.Errorf("%s does not speak %s", u, protocol)
	}
	return r.Peek(r.Buffered())
}

// dialed is the result of one dial.
type dialed struct {
	hub    int
	events bool
	start  time.Time // of the dial
	conn   net.Conn
	rest   []byte
	err    error
}

// dialers is how many clients connect at a time: enough to connect a thousand a second to a server that is 50 ms away, too
// few to overflow the server's backlog of connections.
const dialers = 64

// dialAll connects the clients from first up to n, client i as place(i) says. It connects at most ramp clients a second,
// or as many as possible if ramp is 0. It closes the channel when all have connected or ctx has ended.
func (t *target) dialAll(ctx context.Context, first, n int, ramp float64, place func(i int) (hub int, events bool)) <-chan dialed {
	out := make(chan dialed, dialers)
	next := make(chan int)
	start := time.Now()
	go func() { // ends with the last client, or with ctx
		defer close(next)
		for i := first; i < n; i++ {
			if ramp > 0 {
				wait := time.Until(start.Add(time.Duration(float64(i-first) / ramp * 1e9)))
				select {
				case <-time.After(wait):
				case <-ctx.Done():
				}
			}
			select {
			case next <- i:
			case <-ctx.Done():
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for range min(dialers, n-first) {
		wg.Go(func() { // ends when next is closed
			for i := range next {
				hub, events := place(i)
				dialing := time.Now()
				conn, rest, err := t.dial(ctx, i, hub, events)
				select {
				case out <- dialed{hub, events, dialing, conn, rest, err}:
				case <-ctx.Done():
					if conn != nil {
						conn.Close()
					}
				}
			}
		})
	}
	go func() { // ends with the last dialer
		wg.Wait()
		close(out)
	}()
	return out
}
