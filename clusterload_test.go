package chatbroadcast

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// clusterSites has hubs that all nodes name alike. Those below /big/ keep everything, those below /small/ little, so that clients
// miss messages there.
const clusterSites = `http://localhost {
	respond /static "static"
	chat_broadcast /big/* {
		hub {http.request.uri.path}
		history 1000000 1h
		buffer 100000 128MiB
		http_publish
	}
	chat_broadcast /small/* {
		hub {http.request.uri.path}
		history 20 1h
		buffer 10000 8MiB
		on_lag skip
		http_publish
	}
}`

// A clusterLoad is clients of both kinds on all nodes of a cluster, which send and receive. Clients that lose their connection, or
// give it up, come back to any node and resume.
type clusterLoad struct {
	t       testing.TB
	nodes   []place
	record  *record
	hubs    []string
	clients []*clusterClient

	sending atomic.Bool // clients send new messages
	healed  atomic.Bool // the fault is over
	calm    atomic.Bool // clients give up no connection
	ctx     context.Context
	stop    context.CancelFunc
	running sync.WaitGroup
	client  http.Client // makes POSTs
}

// A clusterClient is a client of one hub, with a connection at a time.
type clusterClient struct {
	load *clusterLoad
	name string
	hub  string
	pace time.Duration

	mu         sync.Mutex
	unanswered []*sending // oldest first
	sent       int
	marked     bool // the connection has got the marker

	// Owned by the goroutine that runs the client.
	epoch string
	seq   int
}

// A sending is a message on its way.
type sending struct {
	id, token, payload string
	epoch              string // of the connection on which it was sent first
	late               bool
	at                 time.Time // when it was sent, the last time
}

// marker begins the payload of the last message in each hub.
const marker = "the end"

func isMarker(payload string) bool { return strings.HasPrefix(payload, marker) }

// startLoad starts clients in new hubs, whose names contain the given one.
func startLoad(t testing.TB, nodes []place, name string) *clusterLoad {
	l := &clusterLoad{t: t, nodes: nodes, record: newRecord()}
	l.client.Timeout = 20 * time.Second
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.sending.Store(true)
	l.hubs = []string{"/big/" + name + "-1", "/big/" + name + "-2", "/small/" + name}
	for _, hub := range l.hubs {
		for i := range 4 {
			l.start(hub, fmt.Sprint("events", i), (*clusterClient).runEvents)
		}
		for i := range 2 {
			l.start(hub, fmt.Sprint("raw", i), (*clusterClient).runRaw)
		}
		l.start(hub, "post", (*clusterClient).runPost)
	}
	return l
}

// start starts a client, which ends with the load; end waits for it.
func (l *clusterLoad) start(hub, name string, run func(*clusterClient)) {
	c := &clusterClient{load: l, name: name, hub: hub, pace: time.Duration(20+rand.IntN(60)) * time.Millisecond}
	l.clients = append(l.clients, c)
	l.running.Go(func() { run(c) })
}

// end ends all clients.
func (l *clusterLoad) end() {
	l.stop()
	l.running.Wait()
	l.client.CloseIdleConnections()
}

// node returns any node.
func (l *clusterLoad) node() place { return l.nodes[rand.IntN(len(l.nodes))] }

// pause waits for up to most. It returns false at the end of the load.
func (l *clusterLoad) pause(most time.Duration) bool {
	select {
	case <-l.ctx.Done():
		return false
	case <-time.After(rand.N(most)):
		return true
	}
}

// settle ends the sending, and waits until every client has got the last message. It returns how long that took.
func (l *clusterLoad) settle(within time.Duration) (took time.Duration, err error) {
	began := time.Now()
	l.healed.Store(true)
	l.pause(time.Second)
	l.sending.Store(false)
	if err := l.await(began.Add(within), (*clusterClient).waits); err != nil {
		return 0, fmt.Errorf("unanswered: %w", err)
	}
	l.calm.Store(true)
	end := began.Add(within)
	marked := map[string]string{} // the epoch in which each hub has got its marker
	for round := 1; ; round++ {
		for _, hub := range l.hubs {
			if marked[hub], err = l.markAgain(hub, marked[hub], round, end); err != nil {
				return 0, fmt.Errorf("publishing the last message in %s: %w", hub, err)
			}
		}
		err = l.await(time.Now().Add(markPatience), (*clusterClient).lacksMarker)
		if err == nil {
			return time.Since(began), nil
		}
		if time.Now().After(end) {
			return 0, fmt.Errorf("without the last message: %w", err)
		}
	}
}

// markPatience is how long the clients may take to get the last message before it may be another one.
const markPatience = 5 * time.Second

// markAgain publishes a marker in a hub, unless the hub is still in the epoch of the marker before. Only a new epoch may lose a
// marker. It returns the epoch of the marker.
func (l *clusterLoad) markAgain(hub, epoch string, round int, end time.Time) (string, error) {
	for attempt := 1; ; attempt++ {
		now, err := l.mark(hub, epoch, fmt.Sprint(marker, " ", round, ".", attempt))
		if err == nil || time.Now().After(end) {
			return now, err
		}
		l.pause(100 * time.Millisecond)
	}
}

// mark publishes a marker as a client of any node, unless the hub is in the given epoch. It returns the epoch of the hub.
func (l *clusterLoad) mark(hub, unless, payload string) (string, error) {
	node := l.node()
	conn, err := dial(node.http)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	p, err := handshakeEvents(l.t, conn, node.http, hub)
	if err != nil || p.hello.Epoch == unless {
		return unless, err
	}
	frame := jsonOf(map[string]string{"type": "send", "id": payload, "data": payload})
	if _, err := conn.Write(clientFrame(finBit|opText, []byte(frame))); err != nil {
		return "", err
	}
	for {
		e, err := p.read()
		if err != nil {
			return "", err
		}
		switch {
		case e.ID == nil || *e.ID != payload:
		case e.Type == "sent":
			return p.hello.Epoch, nil
		default:
			return "", fmt.Errorf("got %.100s", e.raw)
		}
	}
}

// await waits until no client is in a condition. The error names those that are.
func (l *clusterLoad) await(end time.Time, is func(*clusterClient) bool) error {
	for {
		var names []string
		for _, c := range l.clients {
			if is(c) {
				names = append(names, c.name+" in "+c.hub)
			}
		}
		if len(names) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return errors.New(strings.Join(names, ", "))
		}
		time.Sleep(10 * time.Millisecond) // the pace of polling
	}
}

func (c *clusterClient) waits() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.unanswered) > 0
}

func (c *clusterClient) lacksMarker() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.marked
}

func (c *clusterClient) setMarked(marked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marked = marked
}

// mostBehind is how long a node may take to notice what it has missed, after everything works again.
const mostBehind = 15 * time.Second

// final reads the hubs that keep everything, as a new client of each node. All nodes must have the same.
func (l *clusterLoad) final() (map[string]finalLog, error) {
	logs := map[string]finalLog{}
	for _, hub := range l.hubs {
		for _, node := range l.nodes {
			log, err := l.readAll(node, hub)
			for end := time.Now().Add(mostBehind); err != nil && time.Now().Before(end); log, err = l.readAll(node, hub) {
				l.pause(100 * time.Millisecond) // no client of ours is there, so the node may lag or have just come back
			}
			if err != nil {
				return nil, fmt.Errorf("reading %s from %s: %w", hub, node.http, err)
			}
			if strings.HasPrefix(hub, "/big/") {
				logs[hub] = log
			}
		}
	}
	return logs, nil
}

// readAll returns what a new client of a node gets of a hub.
func (l *clusterLoad) readAll(node place, hub string) (finalLog, error) {
	conn, err := dial(node.http)
	if err != nil {
		return finalLog{}, err
	}
	defer conn.Close()
	p, err := handshakeEvents(l.t, conn, node.http, hub)
	if err != nil {
		return finalLog{}, err
	}
	log := finalLog{epoch: p.hello.Epoch, payloads: make(map[int]string, p.hello.Replay)}
	l.record.begun(hub, log.epoch)
	for seq := p.hello.Head - p.hello.Replay + 1; seq <= p.hello.Head; seq++ {
		e, err := p.read()
		if err != nil {
			return log, err
		}
		if e.Type != "message" || e.Seq != seq {
			return log, fmt.Errorf("got %.100s, want message %d", e.raw, seq)
		}
		l.record.saw("a new client", hub, log.epoch, seq, e.text())
		log.payloads[seq] = e.text()
	}
	// A message whose sender was answered "unknown" may still have been on its way, and come after the marker.
	for _, payload := range log.payloads {
		if isMarker(payload) {
			return log, nil
		}
	}
	return log, fmt.Errorf("the messages up to %d of epoch %s end with %.60q and lack the last one", p.hello.Head, log.epoch, log.payloads[p.hello.Head])
}

// connect dials a node. The end of the load closes the connection.
func (c *clusterClient) connect(node place) (conn net.Conn, forget func(), err error) {
	conn, err = dial(node.http)
	if err != nil {
		return nil, nil, err
	}
	cancel := context.AfterFunc(c.load.ctx, func() { conn.Close() })
	return conn, func() { cancel(); conn.Close() }, nil
}

// always runs sessions, one after the other, until the load ends.
func (c *clusterClient) always(session func(place) error) {
	for c.load.ctx.Err() == nil {
		c.setMarked(false)
		err := session(c.load.node())
		if c.load.ctx.Err() == nil {
			c.load.record.ended(outcomeOf(err))
		}
		c.load.pause(100 * time.Millisecond)
	}
}

// outcomeOf returns a short name of how a connection has ended.
func outcomeOf(err error) string {
	text := err.Error()
	switch {
	case errors.Is(err, errGivenUp):
		return "given up"
	case errors.Is(err, errClosed):
		for _, known := range []string{"hub_reset", "unavailable", "shutting_down", "lagged", "hub_removed", "write_timeout", "busy", "internal"} {
			if strings.Contains(text, known) {
				return known
			}
		}
	case strings.Contains(text, "got status "):
		return text[strings.Index(text, "got status ")+len("got status "):][:3]
	case errors.Is(err, errUnanswered), errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded),
		strings.Contains(text, "connection reset"), strings.Contains(text, "broken pipe"):
		return "broken"
	}
	return text
}

// errGivenUp is that of a connection that the client has closed.
var errGivenUp = errors.New("given up")

// ---- clients that speak events ----

func (c *clusterClient) runEvents() { c.always(c.eventsSession) }

// eventsSession is one connection of a client that speaks events.
func (c *clusterClient) eventsSession(node place) error {
	conn, forget, err := c.connect(node)
	if err != nil {
		return err
	}
	defer forget()
	path := c.hub
	if c.epoch != "" {
		path += "?" + sinceQuery(c.epoch, c.seq)
	}
	p, err := handshakeEvents(c.load.t, conn, node.http, path)
	if err != nil {
		return err
	}
	c.begin(&p.hello)
	gone := make(chan struct{})
	var gaveUp atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() { // ends with the connection
		gaveUp.Store(c.sendEvents(conn, &p.hello, gone))
		if gaveUp.Load() {
			conn.Close()
		}
	})
	for err == nil {
		var e incoming
		if e, err = p.read(); err == nil {
			c.handle(&p.hello, &e)
		}
	}
	close(gone)
	conn.Close()
	writer.Wait()
	if gaveUp.Load() {
		return errGivenUp
	}
	if !errors.Is(err, errClosed) && outcomeOf(err) == err.Error() {
		c.load.record.contradict("%s in %s: %v", c.name, c.hub, err)
	}
	return err
}

// begin checks a hello against what the client has, and goes on from there.
func (c *clusterClient) begin(h *incoming) {
	r := c.load.record
	r.begun(c.hub, h.Epoch)
	base := h.Head - h.Replay
	bad := func(why string) {
		r.contradict("%s in %s has message %d of epoch %s and gets %s: %s", c.name, c.hub, c.seq, c.epoch, h.raw, why)
	}
	switch {
	case c.epoch == "":
	case *h.Resumed:
		if base != c.seq {
			bad("it resumes elsewhere")
		}
	case h.Epoch != c.epoch: // nobody knows how many are missed
	case c.seq > h.Head:
		bad("it is ahead")
	case h.Missed != base-c.seq:
		bad(fmt.Sprintf("it misses %d", base-c.seq))
	}
	c.epoch, c.seq = h.Epoch, base
}

// handle checks what the client gets.
func (c *clusterClient) handle(h, e *incoming) {
	r := c.load.record
	switch e.Type {
	case "message":
		if e.Seq != c.seq+1 {
			r.contradict("%s in %s got message %d after %d of epoch %s", c.name, c.hub, e.Seq, c.seq, c.epoch)
		}
		c.seq = e.Seq
		r.saw(c.name, c.hub, c.epoch, e.Seq, e.text())
		if isMarker(e.text()) {
			c.setMarked(true)
		}
	case "lagged":
		if e.Next != c.seq+e.Missed+1 {
			r.contradict("%s in %s got %s after message %d", c.name, c.hub, e.raw, c.seq)
		}
		c.seq = e.Next - 1
		r.ended("lagged, skipped")
	case "sent":
		if s := c.take(*e.ID); s != nil {
			epoch := h.Epoch
			if e.Epoch != "" {
				epoch = e.Epoch
			}
			r.answer(c.hub, s.payload, publishedAs{e.Seq, epoch, s.late && s.epoch == h.Epoch})
		}
	case "error":
		c.handleError(e)
	default:
		r.contradict("%s in %s got %s", c.name, c.hub, e.raw)
	}
}

// handleError gives a message up that the server refuses.
func (c *clusterClient) handleError(e *incoming) {
	if e.ID == nil {
		c.load.record.contradict("%s in %s got %s", c.name, c.hub, e.raw)
		return
	}
	s := c.take(*e.ID)
	switch {
	case s == nil:
	case e.Code == "unavailable":
		c.load.record.refuse(c.hub, s.payload)
	case e.Code == "unknown":
		c.load.record.ended("unknown")
	default:
		c.load.record.contradict("%s in %s got %s", c.name, c.hub, e.raw)
	}
}

// take removes a message from those that have no answer, and returns it.
func (c *clusterClient) take(id string) *sending {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.unanswered, func(s *sending) bool { return s.id == id })
	if i < 0 {
		c.load.record.contradict("%s in %s got an answer to %s, which waits for none", c.name, c.hub, id)
		return nil
	}
	s := c.unanswered[i]
	c.unanswered = slices.Delete(c.unanswered, i, i+1)
	return s
}

const (
	// maxUnansweredHere is how many messages a client has on their way.
	maxUnansweredHere = 8

	// leastPatience is how long a client waits for an answer, before it tries another node.
	leastPatience = 4 * time.Second
)

// sendEvents sends the messages again that have no answer, and then new ones. It returns true when the client gives the
// connection up.
func (c *clusterClient) sendEvents(conn net.Conn, h *incoming, gone <-chan struct{}) bool {
	for _, s := range c.allUnanswered() {
		if c.write(conn, s, h.Token) != nil {
			return false
		}
	}
	patience := leastPatience + rand.N(3*leastPatience)
	ticker := time.NewTicker(c.pace)
	defer ticker.Stop()
	for {
		select {
		case <-gone:
			return false
		case <-ticker.C:
		}
		if !c.load.calm.Load() && rand.N(3*time.Second) < c.pace {
			return true // a page that is loaded again
		}
		s, impatient := c.nextSending(h, patience)
		if impatient {
			return true
		}
		if s != nil && c.write(conn, s, h.Token) != nil {
			return false
		}
	}
}

// allUnanswered returns the messages without an answer.
func (c *clusterClient) allUnanswered() []*sending {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.unanswered {
		s.at = time.Now()
	}
	return slices.Clone(c.unanswered)
}

// nextSending returns a new message, if it is time for one.
func (c *clusterClient) nextSending(h *incoming, patience time.Duration) (s *sending, impatient bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unanswered) > 0 && time.Since(c.unanswered[0].at) > patience {
		return nil, true
	}
	if !c.load.sending.Load() || len(c.unanswered) >= maxUnansweredHere {
		return nil, false
	}
	s = &sending{payload: c.payloadLocked(), token: h.Token, epoch: h.Epoch, late: c.load.healed.Load(), at: time.Now()}
	s.id = fmt.Sprint(c.sent)
	c.unanswered = append(c.unanswered, s)
	return s, false
}

// payloadLocked returns a payload that no other client sends.
func (c *clusterClient) payloadLocked() string {
	c.sent++
	return fmt.Sprintf("%s %d %s", c.name, c.sent, strings.Repeat("x", rand.IntN(200)))
}

// write sends a message. token is that of the connection.
func (c *clusterClient) write(conn net.Conn, s *sending, token string) error {
	frame := map[string]string{"type": "send", "id": s.id, "data": s.payload}
	if s.token != token {
		frame["token"] = s.token
	}
	_ = conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := conn.Write(clientFrame(finBit|opText, []byte(jsonOf(frame))))
	return err
}

// ---- raw clients ----

func (c *clusterClient) runRaw() { c.always(c.rawSession) }

// rawSession is one connection of a raw client. It sends messages, and does not learn what becomes of them.
func (c *clusterClient) rawSession(node place) error {
	conn, forget, err := c.connect(node)
	if err != nil {
		return err
	}
	defer forget()
	p := newPeer(c.load.t, conn)
	if _, err := p.handshake(node.http, c.hub, ""); err != nil {
		return err
	}
	gone := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() { c.sendRaw(conn, gone) }) // ends with the connection
	var got []string
	err = c.readRaw(p, &got)
	close(gone)
	conn.Close()
	writer.Wait()
	if strings.HasPrefix(c.hub, "/big/") { // elsewhere a raw client may lag without a word
		c.load.record.rawEnded(c.hub, got)
	}
	return err
}

func (c *clusterClient) readRaw(p *peer, got *[]string) error {
	for {
		p.patient()
		f, err := p.readFrame()
		if err != nil {
			return err
		}
		switch f.opcode {
		case websocket.TextMessage:
			*got = append(*got, f.payload)
			if isMarker(f.payload) {
				c.setMarked(true)
			}
		case websocket.CloseMessage:
			return fmt.Errorf("%w: %q", errClosed, f.payload)
		case websocket.PingMessage:
			if _, err := p.conn.Write(clientFrame(finBit|websocket.PongMessage, []byte(f.payload))); err != nil {
				return err
			}
		}
	}
}

// sendRaw sends messages until the connection is gone.
func (c *clusterClient) sendRaw(conn net.Conn, gone <-chan struct{}) {
	ticker := time.NewTicker(3 * c.pace)
	defer ticker.Stop()
	for {
		select {
		case <-gone:
			return
		case <-ticker.C:
		}
		if !c.load.sending.Load() {
			continue
		}
		c.mu.Lock()
		payload := c.payloadLocked()
		c.mu.Unlock()
		_ = conn.SetWriteDeadline(time.Now().Add(patience))
		if _, err := conn.Write(clientFrame(finBit|opText, []byte(payload))); err != nil {
			return
		}
	}
}

// ---- POSTs ----

// runPost publishes by POST, one message after the other, each with an Idempotency-Key, until it has an answer.
func (c *clusterClient) runPost() {
	c.setMarked(true) // it receives nothing
	for c.load.pause(2 * c.pace) {
		if !c.load.sending.Load() {
			continue
		}
		c.mu.Lock()
		s := &sending{payload: c.payloadLocked(), id: fmt.Sprint(c.sent), late: c.load.healed.Load()}
		c.unanswered = append(c.unanswered, s)
		c.mu.Unlock()
		for !c.tryPost(s) {
			if !c.load.pause(200 * time.Millisecond) {
				return
			}
		}
		c.take(s.id)
	}
}

// tryPost makes one POST. It returns true when the message needs no other.
func (c *clusterClient) tryPost(s *sending) bool {
	status, seq, _ := c.load.post(c.hub, s.id, s.payload)
	r := c.load.record
	switch status {
	case http.StatusAccepted:
		r.answer(c.hub, s.payload, publishedAs{seq: seq, late: false})
		return true
	case http.StatusServiceUnavailable:
		r.ended("POST 503")
		if s.token == "" && rand.IntN(2) == 0 { // it has been unknown never before
			r.refuse(c.hub, s.payload)
			return true
		}
	case 0:
		s.token = "unknown"
	default:
		s.token = "unknown"
		r.ended(fmt.Sprint("POST ", status))
	}
	return false
}

// post makes a POST to any node. The status is 0 if nothing was answered.
func (l *clusterLoad) post(hub, key, payload string) (status, seq int, err error) {
	request, err := http.NewRequestWithContext(l.ctx, http.MethodPost, "http://"+l.node().http+hub, strings.NewReader(payload))
	if err != nil {
		return 0, 0, err
	}
	request.Header.Set("Idempotency-Key", key)
	resp, err := l.client.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	var published publication
	if resp.StatusCode == http.StatusAccepted {
		err = json.NewDecoder(resp.Body).Decode(&published)
	}
	return resp.StatusCode, int(published.Seq), err
}
