package main

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// maxServed is the longest message that these servers accept, in bytes.
const maxServed = 1 << 20

// serveCommand runs one of the servers that compare measures beside Caddy. The URL's path is the hub.
func serveCommand(name string, args []string) error {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	listen := f.String("listen", "127.0.0.1:8080", "address")
	batched := f.Bool("batched", false, "with serve-floor: send all queued messages in one write")
	history := f.Int("history", 0, "with serve-floor: `messages` of a hub that a client receives when it joins, in one write")
	cert := f.String("cert", "", "certificate `file`: serve TLS")
	key := f.String("key", "", "key `file`")
	if err := f.Parse(args); err != nil {
		return err
	}
	handler := http.Handler(&floor{batched: *batched, history: *history})
	if name == "serve-gorilla" {
		handler = &gorillaChat{}
	}
	server := &http.Server{
		Addr:              *listen,
		Handler:           handler,
		ReadHeaderTimeout: time.Minute,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/1.1 only
	}
	if *cert != "" {
		return server.ListenAndServeTLS(*cert, *key)
	}
	return server.ListenAndServe()
}

// upgrader has buffers of the size that gorilla's example has.
var upgrader = websocket.Upgrader{
	ReadBufferSize: 1024, WriteBufferSize: 1024,
	CheckOrigin: func(*http.Request) bool { return true },
}

// A floor is the least that a server in Go can do. Each client has a goroutine that reads frames and unmasks them. Each
// hub has one goroutine that takes a message, makes its frame once, and writes it to one client after the other. It
// has no checks, limits or pings, and a client that does not read stops its hub.
//
// If batched, it takes all messages that queued while it wrote, and writes their frames to each client in one Write. With a
// history it keeps the frames of the last messages of a hub, and writes them to a client that joins, in one Write.
type floor struct {
	batched bool
	history int
	mu      sync.Mutex
	hubs    map[string]*floorHub
}

type floorHub struct {
	messages chan []byte
	batched  bool
	history  int // how many frames it keeps

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	kept  []byte // the frames of the last messages
	sizes []int  // of these frames
}

func (s *floor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	h := s.hubs[r.URL.Path]
	if h == nil {
		if s.hubs == nil {
			s.hubs = map[string]*floorHub{}
		}
		h = &floorHub{messages: make(chan []byte, 256), batched: s.batched, history: s.history, conns: map[net.Conn]struct{}{}}
		s.hubs[r.URL.Path] = h
		go h.run() // ends with the process
	}
	s.mu.Unlock()
	// A client that has seen its 101 must receive every later message, so messages wait for the handshake.
	h.mu.Lock()
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		h.mu.Unlock()
		return
	}
	conn := ws.NetConn()
	if len(h.kept) > 0 {
		_, _ = conn.Write(h.kept) // the reader notices errors
	}
	h.conns[conn] = struct{}{}
	h.mu.Unlock()
	go func() { // ends with the connection; the handler returns, which frees its stack and its request
		defer conn.Close()
		br := bufio.NewReaderSize(conn, 1024)
		for {
			message, err := readMessage(br)
			if err != nil {
				break
			}
			h.messages <- message
		}
		h.mu.Lock()
		delete(h.conns, conn)
		h.mu.Unlock()
	}()
}

func (h *floorHub) run() {
	var frames []byte
	var sizes []int
	var conns []net.Conn
	for message := range h.messages {
		frames = appendFrame(frames[:0], opText, false, message)
		sizes = append(sizes[:0], len(frames))
		for h.batched && len(h.messages) > 0 {
			before := len(frames)
			frames = appendFrame(frames, opText, false, <-h.messages)
			sizes = append(sizes, len(frames)-before)
		}
		h.mu.Lock()
		h.keepLocked(frames, sizes)
		conns = conns[:0]
		for conn := range h.conns {
			conns = append(conns, conn)
		}
		h.mu.Unlock()
		for _, conn := range conns {
			_, _ = conn.Write(frames) // the reader notices errors
		}
	}
}

// keepLocked adds frames to the history, and forgets those before the last.
func (h *floorHub) keepLocked(frames []byte, sizes []int) {
	if h.history == 0 {
		return
	}
	h.kept, h.sizes = append(h.kept, frames...), append(h.sizes, sizes...)
	for len(h.sizes) > h.history {
		h.kept, h.sizes = h.kept[h.sizes[0]:], h.sizes[1:]
	}
}

var errClosed = errors.New("the client closed")

// readMessage reads frames until a data frame, and returns its payload unmasked. Each of chatbench's messages is one frame.
func readMessage(r *bufio.Reader) ([]byte, error) {
	for {
		var header [14]byte // of a masked frame: 2, 4 or 10 bytes and the mask
		if _, err := io.ReadFull(r, header[:2]); err != nil {
			return nil, err
		}
		size, extended := uint64(header[1]&0x7F), header[2:2]
		switch size {
		case 126:
			extended = header[2:4]
		case 127:
			extended = header[2:10]
		}
		mask := header[10:14]
		if _, err := io.ReadFull(r, extended); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(r, mask); err != nil {
			return nil, err
		}
		switch len(extended) {
		case 2:
			size = uint64(binary.BigEndian.Uint16(extended))
		case 8:
			size = binary.BigEndian.Uint64(extended)
		}
		if size > maxServed {
			return nil, errClosed
		}
		payload := make([]byte, size)
		if _, err := io.ReadFull(r, payload); err != nil {
			return nil, err
		}
		for i := range payload {
			payload[i] ^= mask[i&3]
		}
		switch header[0] & 0xF {
		case opText, opBinary:
			return payload, nil
		case opClose:
			return nil, errClosed
		}
	}
}

// gorillaChat is the pattern of gorilla/websocket's chat example (examples/chat, v1.5.3). A hub is a goroutine that owns
// its clients, hands each message to each client's channel of 256, and closes a client whose channel is full. A client
// has a goroutine that reads and one that writes, with the example's deadlines and pings. Four things differ:
//
//   - Each path has its own hub.
//   - A client that has seen its 101 is registered before the next message.
//   - A message may be longer than 512 bytes and keeps its newlines.
//   - The example joins queued messages into one, with newlines between. Here each stays a frame of its own, and one Write
//     takes all frames, so a write has as many messages as in the example.
type gorillaChat struct {
	mu   sync.Mutex
	hubs map[string]*gorillaHub
}

type gorillaHub struct {
	broadcast            chan []byte
	register, unregister chan *gorillaClient
	joining              sync.RWMutex // held from a handshake to its registration, so that messages wait for it
}

type gorillaClient struct {
	hub  *gorillaHub
	conn *websocket.Conn
	send chan []byte
}

// The example's periods.
const (
	gorillaWriteWait  = 10 * time.Second
	gorillaPongWait   = 60 * time.Second
	gorillaPingPeriod = gorillaPongWait * 9 / 10
)

func (s *gorillaChat) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	h := s.hubs[r.URL.Path]
	if h == nil {
		if s.hubs == nil {
			s.hubs = map[string]*gorillaHub{}
		}
		h = &gorillaHub{broadcast: make(chan []byte), register: make(chan *gorillaClient), unregister: make(chan *gorillaClient)}
		s.hubs[r.URL.Path] = h
		go h.run() // ends with the process
	}
	s.mu.Unlock()
	h.joining.RLock()
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		h.joining.RUnlock()
		return
	}
	c := &gorillaClient{h, conn, make(chan []byte, 256)}
	h.register <- c
	h.joining.RUnlock()
	go c.writePump() // ends when send is closed or a write fails
	go c.readPump()  // ends with the connection
}

func (h *gorillaHub) run() {
	clients := map[*gorillaClient]bool{}
	for {
		select {
		case c := <-h.register:
			clients[c] = true
		case c := <-h.unregister:
			if clients[c] {
				delete(clients, c)
				close(c.send)
			}
		case message := <-h.broadcast:
			for c := range clients {
				select {
				case c.send <- message:
				default:
					close(c.send)
					delete(clients, c)
				}
			}
		}
	}
}

func (c *gorillaClient) readPump() {
	defer func() {
		c.hub.unregister <- c
		c.conn.Close()
	}()
	c.conn.SetReadLimit(maxServed)
	c.conn.SetReadDeadline(time.Now().Add(gorillaPongWait))
	c.conn.SetPongHandler(func(string) error { return c.conn.SetReadDeadline(time.Now().Add(gorillaPongWait)) })
	for {
		_, message, err := c.conn.ReadMessage()
		if err != nil {
			return
		}
		c.hub.joining.Lock()
		c.hub.broadcast <- message
		c.hub.joining.Unlock()
	}
}

func (c *gorillaClient) writePump() {
	ticker := time.NewTicker(gorillaPingPeriod)
	defer func() {
		ticker.Stop()
		c.conn.Close()
	}()
	var frames []byte
	for {
		select {
		case message, ok := <-c.send:
			c.conn.SetWriteDeadline(time.Now().Add(gorillaWriteWait))
			if !ok {
				_ = c.conn.WriteMessage(websocket.CloseMessage, nil)
				return
			}
			frames = appendFrame(frames[:0], opText, false, message)
			for range len(c.send) {
				frames = appendFrame(frames, opText, false, <-c.send)
			}
			conn := c.conn.NetConn()
			conn.SetWriteDeadline(time.Now().Add(gorillaWriteWait))
			if _, err := conn.Write(frames); err != nil {
				return
			}
		case <-ticker.C:
			c.conn.SetWriteDeadline(time.Now().Add(gorillaWriteWait))
			if c.conn.WriteMessage(websocket.PingMessage, nil) != nil {
				return
			}
		}
	}
}
