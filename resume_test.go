package chatbroadcast

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// resumeSite keeps so many messages. Its version makes one configuration differ from another.
func resumeSite(history, version int) string {
	return fmt.Sprintf(`http://localhost:9080 {
	header X-Version %d
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
		buffer %d 16MiB
		history %d
	}
}`, version, 8192+version, history)
}

// An interruption says how many reloads happen during a test. Without reloads the test does only a tenth of its work. That
// run shows whether a fault comes from reloads.
type interruption struct {
	name       string
	reloads    int
	part       int          // divides how often the test does what it does
	unanswered atomic.Int64 // handshakes
}

func interruptions() []*interruption {
	return []*interruption{{name: "undisturbed", part: 10}, {name: "while configurations are loaded", reloads: 5, part: 1}}
}

// excuses reports whether an error is one that a reload may cause before a client is there: a connection that waits for
// its turn when the listener of the old configuration closes is reset by the system, and a request that has just been
// read then is dropped by net/http.
func (i *interruption) excuses(err error) bool {
	const mostAtOnce = 32 // more than the clients that connect at once
	return errors.Is(err, errUnanswered) && i.unanswered.Add(1) <= int64(i.reloads*mostAtOnce)
}

// reload loads another resumeSite so many times, one of them after each of as many equal parts of what is done.
func (s *server) reload(history, times int, part func()) {
	s.t.Helper()
	for i := range times {
		part()
		if status, answer := s.post("text/caddyfile", s.caddyfile("", resumeSite(history, i+1))); status != http.StatusOK {
			s.t.Fatalf("loading a configuration: %d %s", status, answer)
		}
	}
}

// live has so many clients live so many lives each, one after the other, and returns how many there were. Each life of
// client i is a call of life(i). The server's reloads are spread over them.
func (i *interruption) live(s *server, history, clients, livesOfEach int, life func(i int) error) int64 {
	s.t.Helper()
	var lives atomic.Int64
	var running sync.WaitGroup
	for number := range clients {
		running.Go(func() {
			for range livesOfEach {
				if err := life(number); err != nil && !i.excuses(err) {
					s.t.Errorf("life %d of client %d: %v", lives.Load(), number, err)
					return
				}
				lives.Add(1)
			}
		})
	}
	all := int64(clients * livesOfEach)
	s.reload(history, i.reloads, func() {
		next := min(lives.Load()+all/int64(i.reloads+1), all)
		eventually(s.t, "the lives before a reload", func() bool { return lives.Load() >= next || s.t.Failed() })
	})
	running.Wait()
	return lives.Load()
}

// ---- joining ----

// A ticker publishes its own counter, from 1 on, at a steady rate. Nobody else publishes in its hub.
type ticker struct {
	peer      *peer
	sent      atomic.Int64 // the last number that may have been published
	published atomic.Int64 // the last number that has been
	stop      chan struct{}
	running   sync.WaitGroup
}

// startTicker publishes perSecond messages a second until the test calls halt.
func startTicker(t *testing.T, path string, perSecond int) *ticker {
	t.Helper()
	m := &ticker{peer: join(t, path), stop: make(chan struct{})}
	m.running.Go(func() { // ends with the connection
		for {
			m.peer.patient()
			f, err := m.peer.readFrame()
			if err != nil {
				select {
				case <-m.stop:
				default:
					t.Errorf("the ticker has lost its connection: %v", err)
				}
				return
			}
			if want := fmt.Sprint(m.published.Load() + 1); f.opcode == websocket.TextMessage && f.payload != want {
				t.Errorf("the ticker got %s, want %s", f.payload, want)
				return
			}
			if f.opcode == websocket.TextMessage {
				m.published.Add(1)
			}
		}
	})
	m.running.Go(func() { // ends with halt
		pace(m.stop, perSecond, func() bool {
			_, err := m.peer.conn.Write(clientFrame(finBit|websocket.TextMessage, fmt.Append(nil, m.sent.Add(1))))
			return err == nil
		})
		m.peer.conn.Close()
	})
	return m
}

func (m *ticker) halt() {
	close(m.stop)
	m.running.Wait()
}

// pace calls do perSecond times a second, until stop is closed or do returns false. It makes up for calls
// that are late.
func pace(stop <-chan struct{}, perSecond int, do func() bool) {
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	began, done := time.Now(), 0
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		for due := int(time.Since(began) * time.Duration(perSecond) / time.Second); done < due; done++ {
			if !do() {
				return
			}
		}
	}
}

// newer is how many messages from after its join each client of a test waits for.
const newer = 20

// joinRaw joins once as a raw client and returns an error unless it gets exactly the last messages, and then each.
func (m *ticker) joinRaw(t *testing.T, path string, history int) error {
	conn, err := dial(httpAddr)
	if err != nil {
		return err
	}
	defer abort(conn)
	p := newPeer(t, conn)
	before := int(m.published.Load())
	if _, err := p.handshake(httpAddr, path, ""); err != nil {
		return err
	}
	after := int(m.sent.Load())
	for first, got := 0, 0; got < after+newer; {
		p.patient()
		f, err := p.readFrame()
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(f.payload)
		if err != nil {
			return err
		}
		if first == 0 {
			first, got = n, n-1
			if first < before-history+1 || first > after-history+1 {
				return fmt.Errorf("joined between %d and %d: got %d first, want exactly the last %d", before, after, first, history)
			}
		}
		if n != got+1 {
			return fmt.Errorf("joined between %d and %d: got %d after %d", before, after, n, got)
		}
		got = n
	}
	return nil
}

// joinEvents joins once as a client that speaks the events protocol, as joinRaw does.
func (m *ticker) joinEvents(t *testing.T, path string, history int) error {
	conn, err := dial(httpAddr)
	if err != nil {
		return err
	}
	defer abort(conn)
	before := int(m.published.Load())
	p, err := handshakeEvents(t, conn, httpAddr, path)
	if err != nil {
		return err
	}
	after := int(m.sent.Load())
	if p.hello.Head < before || p.hello.Head > after || p.hello.Replay != history {
		return fmt.Errorf("joined between %d and %d: got %s, want a replay of %d", before, after, p.hello.raw, history)
	}
	for seq := p.hello.Head - history + 1; seq <= p.hello.Head+newer; seq++ {
		e, err := p.read()
		if err != nil {
			return err
		}
		if e.Type != "message" || e.Seq != seq || e.text() != fmt.Sprint(seq) {
			return fmt.Errorf("joined at %d: got %s, want message %d", p.hello.Head, e.raw, seq)
		}
	}
	return nil
}

func TestHistory_JoinUnderLoadGetsExactlyTheLastAndThenEverything(t *testing.T) {
	const (
		perSecond = 500
		history   = 100
		allJoins  = 1000
		atOnce    = 16
		path      = "/chat/a"
	)
	for _, tc := range interruptions() {
		t.Run(tc.name, func(t *testing.T) {
			s := startCaddy(t, resumeSite(history, 0))
			m := startTicker(t, path, perSecond)
			defer m.halt()
			eventually(t, "a full history", func() bool { return m.published.Load() >= history })
			joins := int64(allJoins / tc.part)
			began, published := time.Now(), m.published.Load()
			var turn, done atomic.Int64
			var clients sync.WaitGroup
			for range atOnce {
				clients.Go(func() {
					for {
						i := turn.Add(1)
						if i > joins || t.Failed() {
							return
						}
						joinOnce := m.joinRaw
						if i%2 == 0 {
							joinOnce = m.joinEvents
						}
						err := joinOnce(t, path, history)
						for tc.excuses(err) {
							err = joinOnce(t, path, history)
						}
						if err != nil {
							t.Errorf("join %d: %v", i, err)
						}
						done.Add(1)
					}
				})
			}
			s.reload(history, tc.reloads, func() {
				next := min(done.Load()+joins/int64(tc.reloads+1), joins)
				eventually(t, "the joins before a reload", func() bool { return done.Load() >= next || t.Failed() })
			})
			clients.Wait()
			took := time.Since(began)
			t.Logf("%d joins in %v, beside %.0f messages a second; %d handshakes unanswered", done.Load(), took,
				float64(m.published.Load()-published)/took.Seconds(), tc.unanswered.Load())
		})
	}
}

// ---- coming back ----

// A recorder is a client that stays all the time and keeps what it gets: message n stands at n-1.
type recorder struct {
	peer    *eventsPeer
	mu      sync.Mutex
	grown   sync.Cond
	texts   []string
	failure error
	done    chan struct{}
}

// startRecorder joins and reads until the connection ends, for which close is there.
func startRecorder(t *testing.T, path string) *recorder {
	t.Helper()
	c := &recorder{peer: joinEvents(t, path), done: make(chan struct{})}
	c.grown.L = &c.mu
	go func() { // ends with the connection, which close waits for
		defer close(c.done)
		for {
			e, err := c.peer.read()
			c.mu.Lock()
			if err == nil && e.Type == "message" && e.Seq == len(c.texts)+1 {
				c.texts = append(c.texts, e.text())
			} else {
				c.failure = fmt.Errorf("after message %d: got %s, error %w", len(c.texts), e.raw, err)
			}
			c.grown.Broadcast()
			failed := c.failure != nil
			c.mu.Unlock()
			if failed {
				return
			}
		}
	}()
	return c
}

// await waits until there are so many messages.
func (c *recorder) await(messages int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.texts) < messages {
		if c.failure != nil {
			return c.failure
		}
		c.grown.Wait() // ends with a message or with the read's patience
	}
	return nil
}

func (c *recorder) close() {
	c.peer.conn.Close()
	<-c.done
}

// startSenders has four clients send, two of each kind, perSecond messages a second in all. Each message names its sender
// and counts. The returned function ends that, and returns how many each has sent once they have all been published.
func startSenders(t *testing.T, path string, perSecond int) (halt func() [4]int) {
	t.Helper()
	var sent, published [4]atomic.Int64
	var peers [4]*peer
	stop := make(chan struct{})
	var sending, reading sync.WaitGroup
	for i := range peers {
		frame := func(text string) string { return text }
		if i%2 == 0 {
			peers[i] = join(t, path+"?name=raw")
		} else {
			peers[i] = joinEvents(t, path+"?name=events").peer
			frame = func(text string) string { return jsonOf(map[string]string{"type": "send", "data": text}) }
		}
		p := peers[i]
		reading.Go(func() { // ends with the connection
			for {
				p.patient()
				f, err := p.readFrame()
				if err != nil {
					return
				}
				if strings.Contains(f.payload, fmt.Sprintf("%d-%d", i, published[i].Load()+1)) {
					published[i].Add(1)
				}
			}
		})
		sending.Go(func() { // ends with stop
			pace(stop, perSecond/4, func() bool {
				text := fmt.Sprintf("%d-%d", i, sent[i].Add(1))
				_, err := p.conn.Write(clientFrame(finBit|websocket.TextMessage, []byte(frame(text))))
				return err == nil
			})
		})
	}
	return func() (counts [4]int) {
		close(stop)
		sending.Wait()
		for i := range counts {
			eventually(t, "what was sent to be published", func() bool { return published[i].Load() >= sent[i].Load() })
			counts[i] = int(sent[i].Load())
			peers[i].conn.Close()
		}
		reading.Wait()
		return counts
	}
}

// A brittleConn ends when so many bytes were read from it: somewhere in the handshake or in a frame.
type brittleConn struct {
	net.Conn
	left int
	dead bool // reading has failed because it is time; so whatever the error is read as
}

var errDied = errors.New("died")

// Read fails when it is time.
func (m *brittleConn) Read(p []byte) (int, error) {
	if m.left <= 0 {
		m.dead = true
		return 0, errDied
	}
	n, err := m.Conn.Read(p[:min(len(p), m.left)])
	m.left -= n
	return n, err
}

// die ends the connection in one of the ways in which connections end.
func (m *brittleConn) die() {
	switch rand.N(3) {
	case 0: // a program that ends
		m.Close()
	case 1: // a reset
		abort(m.Conn)
	case 2: // half a frame, and a reset
		frame := clientFrame(finBit|websocket.TextMessage, []byte(`{"type":"send","data":"half a frame"}`))
		_, _ = m.Write(frame[:rand.N(len(frame))]) // whether it arrives is chance
		abort(m.Conn)
	}
}

// A returner is a client that comes back time and again.
type returner struct {
	path  string // with a query
	epoch string
	last  int      // the number of the last message that it has got
	texts []string // all of them, from the first on, where it could get them
}

// connect joins on conn and notes what hello says.
func (w *returner) connect(t *testing.T, conn net.Conn) (*eventsPeer, error) {
	path := w.path
	if w.epoch != "" {
		path += "&" + sinceQuery(w.epoch, w.last)
	}
	if !strings.Contains(path, bundles) && rand.IntN(2) == 0 {
		path += "&" + bundles
	}
	p, err := handshakeEvents(t, conn, httpAddr, path)
	if err != nil {
		return nil, err
	}
	if w.epoch != "" && (p.hello.Epoch != w.epoch || p.hello.Resumed == nil) {
		return nil, fmt.Errorf("got %s, want it resumed in epoch %s", p.hello.raw, w.epoch)
	}
	w.epoch = p.hello.Epoch
	return p, nil
}

// resume connects, and returns an error unless everything after the last message is to follow.
func (w *returner) resume(t *testing.T, conn net.Conn) (*eventsPeer, error) {
	p, err := w.connect(t, conn)
	if err != nil {
		return nil, err
	}
	if p.hello.Resumed != nil && !*p.hello.Resumed || p.hello.Replay != p.hello.Head-w.last {
		return nil, fmt.Errorf("after message %d: got %s, want all that came after it", w.last, p.hello.raw)
	}
	return p, nil
}

// take notes a message, and returns an error unless it is the one that follows.
func (w *returner) take(e incoming) error {
	if e.Type != "message" || e.Seq != w.last+1 {
		return fmt.Errorf("got %s after message %d", e.raw, w.last)
	}
	w.last = e.Seq
	w.texts = append(w.texts, e.text())
	return nil
}

// connectOnce connects and reads until so many bytes have come.
func (w *returner) connectOnce(t *testing.T, bytes int) error {
	conn, err := dial(httpAddr)
	if err != nil {
		return err
	}
	m := &brittleConn{Conn: conn, left: bytes}
	defer m.die()
	p, err := w.resume(t, m)
	for err == nil {
		var e incoming
		if e, err = p.read(); err == nil {
			err = w.take(e)
		}
	}
	if m.dead {
		return nil
	}
	return err
}

// catchUp comes back for good, until it has got so many messages in all.
func (w *returner) catchUp(t *testing.T, messages int) error {
	conn, err := dial(httpAddr)
	if err != nil {
		return err
	}
	defer conn.Close()
	p, err := w.resume(t, conn)
	for err == nil && w.last < messages {
		var e incoming
		if e, err = p.read(); err == nil {
			err = w.take(e)
		}
	}
	return err
}

func TestResume_ClientThatDiesAThousandTimesGetsEverythingOnceInOrder(t *testing.T) {
	const (
		perSecond   = 400
		history     = 100_000
		clients     = 4
		livesOfEach = 250
		path        = "/chat/a"
	)
	for _, tc := range interruptions() {
		t.Run(tc.name, func(t *testing.T) {
			s := startCaddy(t, resumeSite(history, 0))
			control := startRecorder(t, path)
			defer control.close()
			halt := startSenders(t, path, perSecond)
			var returners [clients]returner
			for i := range returners {
				returners[i].path = path + "?name=returner"
			}
			lives := tc.live(s, history, clients, livesOfEach/tc.part, func(i int) error { return returners[i].connectOnce(t, rand.N(2500)) })
			sent := halt()
			if t.Failed() {
				return
			}
			total := sent[0] + sent[1] + sent[2] + sent[3]
			if err := control.await(total); err != nil {
				t.Fatal(err)
			}
			wantCounts(t, control.texts[:total], sent[:])
			for i := range returners {
				if err := returners[i].catchUp(t, total); err != nil {
					t.Fatalf("client %d: %v", i, err)
				}
				if !slices.Equal(returners[i].texts, control.texts[:total]) {
					t.Errorf("client %d did not get what the one got that stayed", i)
				}
			}
			t.Logf("%d lives, %d messages; %d handshakes unanswered", lives, total, tc.unanswered.Load())
		})
	}
}

// wantCounts fails unless texts has every text of each sender, in the order in which that sender sent them.
func wantCounts(t *testing.T, texts []string, sent []int) {
	t.Helper()
	got := make([]int, len(sent))
	for _, text := range texts {
		var sender, n int
		if _, err := fmt.Sscanf(text, "%d-%d", &sender, &n); err != nil || n != got[sender]+1 {
			t.Fatalf("got %q after message %d of this sender", text, got[sender])
		}
		got[sender]++
	}
	if !slices.Equal(got, sent) {
		t.Fatalf("got %v messages of the senders, want %v", got, sent)
	}
}

func TestResume_MissedMessagesAreCountedExactly(t *testing.T) {
	const (
		perSecond   = 800
		history     = 20
		clients     = 4
		timesOfEach = 50
		path        = "/chat/a"
	)
	for _, tc := range interruptions() {
		t.Run(tc.name, func(t *testing.T) {
			s := startCaddy(t, resumeSite(history, 0))
			control := startRecorder(t, path)
			defer control.close()
			halt := startSenders(t, path, perSecond)
			if err := control.await(history); err != nil {
				t.Fatal(err)
			}
			var times, lost atomic.Int64
			var running sync.WaitGroup
			for i := range clients {
				running.Go(func() {
					w := &returner{path: path + "?name=returner"}
					for range timesOfEach / tc.part {
						missed, err := w.absent(t, history, control)
						for tc.excuses(err) {
							missed, err = w.absent(t, history, control)
						}
						if err != nil {
							t.Errorf("client %d: %v", i, err)
							return
						}
						lost.Add(int64(missed))
						times.Add(1)
					}
				})
			}
			s.reload(history, tc.reloads, func() {
				all := int64(clients * timesOfEach / tc.part)
				next := min(times.Load()+all/int64(tc.reloads+1), all)
				eventually(t, "the absences before a reload", func() bool { return times.Load() >= next || t.Failed() })
			})
			running.Wait()
			halt()
			t.Logf("%d absences, %d messages lost", times.Load(), lost.Load())
			if lost.Load() == 0 && !t.Failed() {
				t.Error("nothing was lost: the test has tested nothing")
			}
		})
	}
}

// absent stays away for a while and comes back. It returns how many messages the server reports as missed, and an error
// unless these and the messages that it gets add up.
func (w *returner) absent(t *testing.T, history int, control *recorder) (missed int, err error) {
	if err := control.await(max(w.last, history) + rand.N(3*history)); err != nil {
		return 0, err
	}
	conn, err := dial(httpAddr)
	if err != nil {
		return 0, err
	}
	defer abort(conn)
	known := w.epoch != ""
	p, err := w.connect(t, conn)
	if err != nil {
		return 0, err
	}
	hello := p.hello
	first := hello.Head - history + 1
	if known {
		complete := hello.Head-w.last <= history
		if complete {
			first = w.last + 1
		}
		missed = hello.Missed
		if *hello.Resumed != complete || missed != first-w.last-1 || w.last+missed+hello.Replay != hello.Head {
			return 0, fmt.Errorf("after message %d: got %s, want it resumed %v and %d missed",
				w.last, hello.raw, complete, first-w.last-1)
		}
	}
	w.last = first - 1
	for range hello.Replay + newer {
		e, err := p.read()
		if err != nil {
			return 0, err
		}
		if err := w.take(e); err != nil {
			return 0, err
		}
		if err := control.await(e.Seq); err != nil {
			return 0, err
		}
		control.mu.Lock()
		want := control.texts[e.Seq-1]
		control.mu.Unlock()
		if e.text() != want {
			return 0, fmt.Errorf("got %s, which is %q to the client that stayed", e.raw, want)
		}
	}
	return missed, nil
}

// A persistentSender numbers what it sends, dies at any moment, and repeats what was not answered.
type persistentSender struct {
	returner
	name     int
	numbered int            // so far
	answered int            // all up to this one
	repeated int            // answered although published on an earlier connection
	tokens   map[int]string // of the connections on which the others were first sent
}

// batch is how many messages a persistentSender sends before it waits for the answers.
const batch = 10

// live connects once, repeats what was not answered, and goes on until it has written or read so many bytes.
func (s *persistentSender) live(t *testing.T, bytes int) error {
	return s.liveUntil(t, bytes, func() bool { return false })
}

// liveUntil is live, which ends when everything is answered and enough returns true.
func (s *persistentSender) liveUntil(t *testing.T, bytes int, enough func() bool) error {
	conn, err := dial(httpAddr)
	if err != nil {
		return err
	}
	m := &brittleConn{Conn: conn, left: bytes}
	defer m.die()
	p, err := s.resume(t, m)
	for err == nil {
		if s.answered == s.numbered {
			if enough() {
				return nil
			}
			s.numbered += batch
		}
		for n := s.answered + 1; n <= s.numbered; n++ {
			send := map[string]string{"type": "send", "id": fmt.Sprint(n), "data": fmt.Sprintf("%d-%d", s.name, n)}
			if token, again := s.tokens[n]; again {
				send["token"] = token
			} else {
				s.tokens[n] = p.hello.Token
			}
			frame := clientFrame(finBit|websocket.TextMessage, []byte(jsonOf(send)))
			written, err := m.Write(frame[:min(len(frame), m.left)])
			m.left -= written
			if err != nil {
				return err
			}
			if m.left <= 0 {
				return nil
			}
		}
		err = s.awaitAnswers(p)
	}
	if m.dead {
		return nil
	}
	return err
}

// awaitAnswers reads until everything is answered.
func (s *persistentSender) awaitAnswers(p *eventsPeer) error {
	for s.answered < s.numbered {
		e, err := p.read()
		if err != nil {
			return err
		}
		switch {
		case e.Type == "message":
			if err := s.take(e); err != nil {
				return err
			}
		case e.Type == "sent" && *e.ID == fmt.Sprint(s.answered+1):
			s.answered++
			delete(s.tokens, s.answered)
			if e.Seq <= p.hello.Head {
				s.repeated++
			}
		default:
			return fmt.Errorf("got %s, want the answer to %d", e.raw, s.answered+1)
		}
	}
	return nil
}

func TestResume_RepeatedSendsAreNeitherDoubledNorLost(t *testing.T) {
	const (
		history     = 100_000
		senders     = 4
		livesOfEach = 100
		path        = "/chat/a"
	)
	for _, tc := range interruptions() {
		t.Run(tc.name, func(t *testing.T) {
			s := startCaddy(t, resumeSite(history, 0))
			control := startRecorder(t, path)
			defer control.close()
			var all [senders]persistentSender
			for i := range all {
				all[i].name, all[i].path, all[i].tokens = i, path+"?name=sender", map[int]string{}
			}
			lives := tc.live(s, history, senders, livesOfEach/tc.part, func(i int) error { return all[i].live(t, rand.N(6000)) })
			total, repeated := 0, 0
			var sent []int
			for i := range all {
				if t.Failed() {
					return
				}
				if err := all[i].liveUntil(t, math.MaxInt, func() bool { return true }); err != nil {
					t.Fatalf("sender %d: %v", i, err)
				}
				total += all[i].numbered
				repeated += all[i].repeated
				sent = append(sent, all[i].numbered)
			}
			if err := control.await(total); err != nil {
				t.Fatal(err)
			}
			last := joinEvents(t, path)
			if last.hello.Head != total {
				t.Errorf("got %d messages, want %d", last.hello.Head, total)
			}
			wantCounts(t, control.texts[:total], sent)
			t.Logf("%d lives, %d messages, %d of them sent again in vain; %d handshakes unanswered",
				lives, total, repeated, tc.unanswered.Load())
			if repeated == 0 && tc.part == 1 {
				t.Error("nothing was repeated: the test has tested nothing")
			}
		})
	}
}

// ---- epochs ----

func TestResume_NewHubHasAnotherEpochAndReportsMissedMessages(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/*\n}")
	old := joinEvents(t, "/chat/a")
	old.text(`{"type":"send","data":"in the old one"}`)
	old.wantMessages(1, "in the old one")
	old.leave()
	awaitNoHubs(t)
	other := joinEvents(t, "/chat/a")
	for i := range 5 {
		other.sendText(fmt.Sprint("m", i), fmt.Sprint(i))
	}
	p := joinEvents(t, "/chat/a?"+sinceQuery(old.hello.Epoch, 1))
	if h := p.hello; h.Epoch == old.hello.Epoch || h.Epoch != other.hello.Epoch ||
		h.Resumed == nil || *h.Resumed || h.Head != 5 || h.Missed != 5 || h.Replay != 0 {
		t.Errorf("got %s, want another epoch with all 5 messages missed", h.raw)
	}
}

func TestResume_NewHubReplaysItsHistory(t *testing.T) {
	startCaddy(t, resumeSite(3, 0))
	other := joinEvents(t, "/chat/a")
	for i := range 5 {
		other.sendText(fmt.Sprint("m", i), fmt.Sprint(i))
	}
	p := joinEvents(t, "/chat/a?"+sinceQuery("anotherepoch", 4))
	if h := p.hello; h.Resumed == nil || *h.Resumed || h.Head != 5 || h.Missed != 2 || h.Replay != 3 {
		t.Errorf("got %s, want 3 messages again and 2 missed", h.raw)
	}
	p.wantMessages(3, "2", "3", "4")
}

// TestResume_RestartedServerHasAnotherEpoch runs two processes, one after the other.
func TestResume_RestartedServerHasAnotherEpoch(t *testing.T) {
	t.Parallel()
	const site = "http://localhost {\nchat_broadcast /chat/* {\nhistory 10\n}\n}"
	var epochs []string
	for range 2 {
		process := startProcess(t, "", site)
		path := "/chat/a"
		if len(epochs) > 0 {
			path += "?" + sinceQuery(epochs[0], 1)
		}
		p := process.joinEvents(path)
		epochs = append(epochs, p.hello.Epoch)
		if h := p.hello; len(epochs) > 1 && (h.Resumed == nil || *h.Resumed || h.Missed != 0 || h.Head != 0) {
			t.Errorf("got %s, want it not resumed", h.raw)
		}
		p.sendText("m1", "hello")
		p.conn.Close()
		process.terminate()
	}
	if epochs[0] == epochs[1] {
		t.Errorf("both have the epoch %s", epochs[0])
	}
}

func TestResume_ReloadKeepsTheEpoch(t *testing.T) {
	s := startCaddy(t, resumeSite(10, 0))
	p := joinEvents(t, "/chat/a")
	p.sendText("m1", "before")
	p.leave() // nobody is there during the reload
	s.load(resumeSite(10, 1))
	back := joinEvents(t, "/chat/a?"+sinceQuery(p.hello.Epoch, 0))
	if h := back.hello; h.Epoch != p.hello.Epoch || !*h.Resumed || h.Replay != 1 {
		t.Errorf("got %s, want it resumed in epoch %s", h.raw, p.hello.Epoch)
	}
	back.wantMessages(1, "before")
}

// ---- resuming, one thing at a time ----

func TestResume_SinceZeroIsEverything(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a := joinEvents(t, "/chat/a")
	a.sendText("m1", "one")
	a.sendText("m2", "two")
	p := joinEvents(t, "/chat/a?"+sinceQuery(a.hello.Epoch, 0))
	if h := p.hello; !*h.Resumed || h.Replay != 2 {
		t.Errorf("got %s, want 2 messages again", h.raw)
	}
	p.wantMessages(1, "one", "two")
}

func TestResume_NothingMissed(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a := joinEvents(t, "/chat/a")
	a.sendText("m1", "one")
	p := joinEvents(t, "/chat/a?"+sinceQuery(a.hello.Epoch, 1))
	if h := p.hello; !*h.Resumed || h.Replay != 0 {
		t.Errorf("got %s, want nothing again", h.raw)
	}
	a.sendText("m2", "two")
	p.wantMessages(2, "two")
}

// TestResume_ClientAheadOfTheHubGetsTheHistory is about a number that the hub has not reached, which an honest client
// cannot have.
func TestResume_ClientAheadOfTheHubGetsTheHistory(t *testing.T) {
	startCaddy(t, resumeSite(2, 0))
	a := joinEvents(t, "/chat/a")
	for i := range 3 {
		a.sendText(fmt.Sprint("m", i), fmt.Sprint(i))
	}
	for _, seq := range []int{4, maxSeq} {
		p := joinEvents(t, "/chat/a?"+sinceQuery(a.hello.Epoch, seq))
		if h := p.hello; h.Resumed == nil || *h.Resumed || h.Missed != 0 || h.Head != 3 || h.Replay != 2 {
			t.Errorf("got %s, want the history and nothing missed", h.raw)
		}
		p.wantMessages(2, "1", "2")
	}
}

func TestResume_ReportsMissedMessagesWithoutHistory(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/*\n}")
	stays, goes := joinEvents(t, "/chat/a"), joinEvents(t, "/chat/a")
	stays.sendText("m1", "one")
	goes.wantMessages(1, "one")
	goes.leave()
	stays.sendText("m2", "two")
	stays.sendText("m3", "three")
	back := joinEvents(t, "/chat/a?"+sinceQuery(goes.hello.Epoch, 1))
	if h := back.hello; *h.Resumed || h.Missed != 2 || h.Replay != 0 {
		t.Errorf("got %s, want 2 missed", h.raw)
	}
}

func TestResume_HelloWithoutSinceHasNoResumed(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	if h := joinEvents(t, "/chat/a").hello; h.Resumed != nil {
		t.Errorf("got %s, want no resumed", h.raw)
	}
}

func TestResume_MalformedParameterIsRefusedWith400(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	for _, value := range []string{
		"", "epoch", ":1", "epoch:", "epoch:-1", "epoch:%2B1", "epoch:x", "epoch:1.5", "epoch:1e2", "epoch:007", "epoch:00", "epoch:0x1",
		"epoch:1_0", "epoch:9007199254740992", "epoch:99999999999999999999", "1:2:3", "epoch:%201", "epoch:1%00", "%00:1", "%20:1",
		"Epoch:1", "ep-och:1", "%C3%A4:1", "abcdefghijklmnopq:1", "epoch:1&chat_broadcast_since=epoch:1",
	} {
		t.Run(value, func(t *testing.T) {
			refused(t, http.StatusBadRequest, "/chat/a?chat_broadcast_since="+value, eventsHeader)
		})
	}
}

func TestResume_LongestParameterIsTaken(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	for _, value := range []string{"epoch:0", "0123456789abcdef:9007199254740991"} {
		if h := joinEvents(t, "/chat/a?chat_broadcast_since="+value).hello; h.Resumed == nil || *h.Resumed {
			t.Errorf("%s: got %s, want resumed false", value, h.raw)
		}
	}
}

// TestResume_OtherParametersAreTheApplications has those that an earlier server took for its own.
func TestResume_OtherParametersAreTheApplications(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	joinEvents(t, "/chat/a").sendText("m1", "one")
	p := joinEvents(t, "/chat/a?since=2026-11-01&token=eyJhbGciOiJIUzI1NiJ9.e30.x&token=%00")
	if h := p.hello; h.Resumed != nil || h.Replay != 1 {
		t.Errorf("got %s, want what a new client gets", h.raw)
	}
	join(t, "/chat/a?chat_broadcast_since=what").wantText("one") // a raw client
}

// ---- sending once, one thing at a time ----

func TestSendingOnce_RepeatIsAnsweredWithTheFirst(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	control := joinEvents(t, "/chat/a")
	a := joinEvents(t, "/chat/a?name=ada")
	first := a.sendText("m1", "hello")
	again := a.sendText("m1", "hello")
	a.leave()
	back := joinEvents(t, "/chat/a?name=ada")
	if back.hello.Token == a.hello.Token {
		t.Errorf("got %s, want a token of its own", back.hello.raw)
	}
	later := back.sendAgain(a.hello.Token, "m1", "hello")
	if again.raw != first.raw || later.raw != first.raw {
		t.Errorf("got %s and %s, want both %s", again.raw, later.raw, first.raw)
	}
	if sent := back.sendAgain(a.hello.Token, "m2", "was lost"); sent.Type != "sent" || sent.Seq != 2 {
		t.Errorf("got %s, want the message published that was not", sent.raw)
	}
	last := joinEvents(t, "/chat/a?name=ada")
	if sent := last.sendAgain(a.hello.Token, "m2", "was lost"); sent.Type != "sent" || sent.Seq != 2 {
		t.Errorf("got %s, want the same answer on a third connection", sent.raw)
	}
	back.sendText("m2", "end") // of another token
	control.wantMessages(1, "hello", "was lost", "end")
}

// TestSendingOnce_OneAddressCannotMakeTheHubForgetAnothers sends as many ids as a hub remembers between a message and its
// repetition.
func TestSendingOnce_OneAddressCannotMakeTheHubForgetAnothers(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	ada := joinEventsFrom(t, "127.0.0.2", "/chat/a?name=ada")
	first := ada.sendText("m1", "hello")
	ada.conn.Close()
	eve := joinEventsFrom(t, "127.0.0.3", "/chat/a?name=eve")
	floodIDs(t, eve, maxReceipts+10)
	back := joinEventsFrom(t, "127.0.0.2", "/chat/a?name=ada")
	if again := back.sendAgain(ada.hello.Token, "m1", "hello"); again.raw != first.raw {
		t.Errorf("got %s, want %s", again.raw, first.raw)
	}
	if sent := back.sendAgain(ada.hello.Token, "m2", "new"); sent.Type != "sent" {
		t.Errorf("got %s, want the other message published", sent.raw)
	}
	if sent := back.sendText("m3", "fresh"); sent.Seq == 0 {
		t.Errorf("got %s, want it published", sent.raw)
	}
	// The oldest of eve's own are gone, and she learns of it.
	eve.conn.Close()
	back = joinEventsFrom(t, "127.0.0.3", "/chat/a?name=eve")
	if e := back.sendAgain(eve.hello.Token, "0", ""); e.Type != "error" || e.Code != "unknown" {
		t.Errorf("got %s, want unknown", e.raw)
	}
	if e := back.sendAgain(eve.hello.Token, fmt.Sprint(maxReceipts), ""); e.Type != "sent" || e.Seq != 1+maxReceipts+1 {
		t.Errorf("got %s, want the first answer", e.raw)
	}
}

// floodIDs publishes n messages with the ids from 0 on, and reads the answers.
func floodIDs(t *testing.T, p *eventsPeer, n int) {
	t.Helper()
	var frames []byte
	for i := range n {
		frames = append(frames, clientFrame(finBit|websocket.TextMessage, fmt.Appendf(nil, `{"type":"send","id":"%d","data":""}`, i))...)
	}
	written := make(chan error, 1)
	go func() { // ends with the frames or the connection
		_, err := p.conn.Write(frames)
		written <- err
	}()
	for range n {
		p.skipTo("sent")
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

// TestSendingOnce_ForgottenReceiptOfTheSameAddressIsUnknown has two users at one address.
func TestSendingOnce_ForgottenReceiptOfTheSameAddressIsUnknown(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	ada := joinEvents(t, "/chat/a?name=ada")
	ada.sendText("m1", "hello")
	ada.conn.Close()
	floodIDs(t, joinEvents(t, "/chat/a?name=eve"), maxReceipts)
	back := joinEvents(t, "/chat/a?name=ada")
	if e := back.sendAgain(ada.hello.Token, "m1", "hello"); e.Type != "error" || e.Code != "unknown" {
		t.Errorf("got %s, want unknown", e.raw)
	}
	if sent := back.sendText("m1", "hello"); sent.Seq != maxReceipts+2 {
		t.Errorf("got %s, want a new message published", sent.raw)
	}
}

// TestSendingOnce_ForgottenMessagesKeepTheirIDs fills the memory for histories in other hubs, between a message and its
// repetition.
func TestSendingOnce_ForgottenMessagesKeepTheirIDs(t *testing.T) {
	startCaddy(t, resumeSite(1000, 0))
	joinEvents(t, "/chat/victim") // the hub stays open
	ada := joinEvents(t, "/chat/victim?name=ada")
	first := ada.sendText("m1", "hello")
	ada.conn.Close()
	large := clientFrame(finBit|websocket.BinaryMessage, make([]byte, 60_000))
	for hub := 0; ; hub++ { // each keeps 8 MiB
		if joined := joinEvents(t, "/chat/victim"); joined.hello.Replay == 0 {
			break
		}
		if hub == 30 {
			t.Fatal("the history of the first hub is still there")
		}
		p := join(t, fmt.Sprint("/chat/", hub))
		for range 150 {
			p.write(large)
			p.next()
		}
	}
	back := joinEvents(t, "/chat/victim?name=ada")
	if again := back.sendAgain(ada.hello.Token, "m1", "hello"); again.raw != first.raw {
		t.Errorf("got %s, want %s", again.raw, first.raw)
	}
}

func TestSendingOnce_UnknownWhereTheServerCannotKnow(t *testing.T) {
	s := startCaddy(t, resumeSite(10, 0))
	b := joinEvents(t, "/chat/b")
	p := joinEvents(t, "/chat/a")
	// Of another hub, of no hub, an epoch alone, and an epoch that is longer.
	for _, token := range []string{b.hello.Token, "another", p.hello.Epoch, p.hello.Epoch + "x-another"} {
		if e := p.sendAgain(token, "m1", "x"); e.Type != "error" || e.Code != "unknown" {
			t.Errorf("token %s: got %s, want unknown", token, e.raw)
		}
	}
	p.leave()
	s.unload() // the hub ends
	awaitNoHubs(t)
	s.load(resumeSite(10, 1))
	back := joinEvents(t, "/chat/a")
	if e := back.sendAgain(p.hello.Token, "m1", "in the new hub"); e.Type != "error" || e.Code != "unknown" {
		t.Errorf("got %s, want unknown", e.raw)
	}
	if got := back.sendText("m2", "the first").Seq; got != 1 {
		t.Errorf("got number %d, want nothing published before", got)
	}
}

func TestSendingOnce_HelloSaysForHowLong(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nhistory 10 90s\n}\nchat_broadcast /none/*\n}")
	if h := joinEvents(t, "/chat/a").hello; h.Age != 90_000 {
		t.Errorf("got %s, want an age of 90 seconds", h.raw)
	}
	if h := joinEvents(t, "/none/a").hello; h.Age != 0 {
		t.Errorf("got %s, want no age without history", h.raw)
	}
}

func TestSendingOnce_MalformedTokenIsMalformed(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	p := joinEvents(t, "/chat/a")
	for _, token := range []string{"", "a b", "a.b", "ä", strings.Repeat("x", 65)} {
		if e := p.sendAgain(token, "m1", "x"); e.Code != "malformed" {
			t.Errorf("token %q: got %s", token, e.raw)
		}
	}
	p.say(map[string]string{"type": "send", "token": p.hello.Token, "data": "x"})
	p.wantError("malformed", "")
}

func TestSendingOnce_AnothersIDsAreTheirOwn(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a := joinEvents(t, "/chat/a?name=ada")
	a.sendText("m1", "from ada")
	for _, tc := range []struct{ name, query, token string }{
		{"another user with the same token", "name=eve", a.hello.Token},
		{"the same user with another token", "name=ada", a.hello.Epoch + "-another"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := joinEvents(t, "/chat/a?"+tc.query)
			if sent := p.sendAgain(tc.token, "m1", tc.name); sent.Type != "sent" || sent.Seq <= p.hello.Head {
				t.Errorf("got %s, want a new number after %d", sent.raw, p.hello.Head)
			}
		})
	}
}

func TestSendingOnce_WithoutHistoryARepetitionIsUnknown(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/*\n}")
	keeper := joinEvents(t, "/chat/a")
	a := joinEvents(t, "/chat/a")
	if a.hello.Token != "" {
		t.Errorf("got %s, want no token that is good for nothing", a.hello.raw)
	}
	a.sendText("m1", "hello")
	if e := a.sendAgain(a.hello.Epoch+"-mine", "m1", "hello"); e.Code != "unknown" {
		t.Errorf("got %s, want unknown", e.raw)
	}
	a.sendText("m1", "hello") // nobody says that it is the same
	keeper.wantMessages(1, "hello", "hello")
}

func TestSendingOnce_WithoutIDNothingIsRememberedOrAnswered(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a := joinEvents(t, "/chat/a")
	a.text(`{"type":"send","data":"hello"}`)
	a.text(`{"type":"send","data":"hello"}`)
	a.wantMessages(1, "hello", "hello")
}

func TestSendingOnce_OtherHubsIDsAreTheirOwn(t *testing.T) {
	startCaddy(t, resumeSite(10, 0))
	a := joinEvents(t, "/chat/a")
	a.sendText("m1", "hello")
	a.sendText("m2", "hello")
	b := joinEvents(t, "/chat/b")
	if sent := b.sendText("m2", "hello"); sent.Seq != 1 {
		t.Errorf("got %s, want it published", sent.raw)
	}
}
