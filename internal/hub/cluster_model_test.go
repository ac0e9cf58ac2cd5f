package hub

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// Flags for long runs.
var (
	modelSeeds = flag.Int("model.seeds", defaultSeeds(), "how many seeds the model of a cluster runs")
	modelFirst = flag.Uint64("model.first", 0, "the first of them")
)

// defaultSeeds returns how many seeds take some seconds, also with the race detector.
func defaultSeeds() int {
	info, _ := debug.ReadBuildInfo()
	if info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		return 20
	}
	return 200
}

// A clusterModel has nodes, and peers that chat on them, while the engine fails at random. A witness, whose session never
// fails, notes everything that was ever published. At the end the model compares what each peer has seen with that.
type clusterModel struct {
	t      *testing.T
	server *enginetest.Server
	large  bool          // with more peers, steps and messages
	stop   chan struct{} // closed when peers are to send nothing more
	over   chan struct{} // closed when peers are to end
	peers  sync.WaitGroup

	witness  *enginetest.Session
	observed map[string]*witnessHub // by hub; the witness's session writes them, and the model reads them at the end

	mu          sync.Mutex
	rand        *rand.Rand
	nodes       []*modelNode
	gone        []*modelNode
	down        bool
	wiped       bool
	logs        []*connLog
	sent        []sentNote
	published   []sentNote      // over HTTP
	unavailable map[string]bool // payloads that are certainly not published
	refused     map[string]bool // likewise, whether the sender has got the answer or not
	unanswered  map[string]bool // payloads whose senders wait
	doubtful    map[string]bool // payloads whose senders know no outcome, or waited when the engine forgot all receipts
	notes       []string

	earlier map[string]string // the messages that peers have seen from before an epoch, by epoch and number
}

// A sentNote is what the sender of a message was told.
type sentNote struct {
	hub, payload, epoch string
	seq                 uint64
}

// A witnessHub has everything that was published in a hub. It implements engine.Receiver.
type witnessHub struct{ epochs map[string]*witnessEpoch }

// A witnessEpoch has the messages of an epoch that were published in it.
type witnessEpoch struct {
	began, head uint64 // the number of the message before them, and of the last of them
	messages    map[uint64]feed.Message
	numbers     map[string]uint64 // by payload
	repeated    []string          // payloads that were published twice
}

func (w *witnessHub) Entries(epoch string, first uint64, entries []engine.Entry) {
	e := w.epochs[epoch]
	if e == nil {
		e = newWitnessEpoch(first - 1)
		w.epochs[epoch] = e
	}
	for _, entry := range entries {
		m, err := decodeEntry(entry.Data)
		if err != nil {
			panic(err)
		}
		e.head++
		e.messages[e.head] = m
		if _, ok := e.numbers[string(m.Payload)]; ok {
			e.repeated = append(e.repeated, string(m.Payload))
		}
		e.numbers[string(m.Payload)] = e.head
	}
}

func newWitnessEpoch(began uint64) *witnessEpoch {
	return &witnessEpoch{began: began, head: began, messages: map[uint64]feed.Message{}, numbers: map[string]uint64{}}
}

func (w *witnessHub) Users(uint64, engine.NodeID, []engine.UserCount) {}

// A modelNode is a process with hubs.
type modelNode struct {
	model   *clusterModel
	process *Process
	session *enginetest.Session
	ended   chan struct{} // closed when the node ends
	done    sync.WaitGroup

	mu   sync.Mutex
	hubs map[string]*Hub
	all  []*Hub // also those that are closed

	down bool // guarded by model.mu
	dead bool // guarded by model.mu
}

func (m *clusterModel) newNode() *modelNode {
	n := &modelNode{model: m, process: NewProcess(), session: m.server.Session(), ended: make(chan struct{}), hubs: map[string]*Hub{}}
	n.process.SetNode(n.session.Number())
	n.process.Reset = n.closeHub
	n.done.Go(n.renewAlways)
	return n
}

// renewAlways does what a process does for its cluster.
func (n *modelNode) renewAlways() {
	ticker := time.NewTicker(engine.RenewInterval)
	defer ticker.Stop()
	for {
		select {
		case <-n.ended:
			return
		case <-ticker.C:
			n.renew()
		}
	}
}

func (n *modelNode) renew() {
	n.mu.Lock()
	known := make([]engine.Known, 0, len(n.hubs))
	open := map[string]*Hub{}
	for name, b := range n.hubs {
		known = append(known, b.Known())
		open[name] = b
	}
	n.mu.Unlock()
	r, err := n.session.Renew(context.Background(), engine.Status{}, known)
	if err != nil {
		return
	}
	for _, k := range r.Changed {
		open[k.Hub].Renewed(k)
	}
	if r.Forgotten {
		for _, b := range open {
			b.AnnounceAgain()
		}
	}
}

// hub returns the named hub. It opens the hub if it must.
func (n *modelNode) hub(name string, s *Settings) (*Hub, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if b := n.hubs[name]; b != nil {
		return b, nil
	}
	b, err := Load(context.Background(), n.process, name, n.session, s)
	if err != nil {
		return nil, err
	}
	n.hubs[name], n.all = b, append(n.all, b)
	return b, nil
}

// closeHub ends a hub, as a process does when its epoch is over.
func (n *modelNode) closeHub(b *Hub) {
	n.mu.Lock()
	if n.hubs[b.Name()] == b {
		delete(n.hubs, b.Name())
	}
	n.mu.Unlock()
	b.Close()
	for _, c := range b.Clients() {
		c.Close(CloseHubReset)
	}
}

// kill ends the node as a process ends that is killed.
func (n *modelNode) kill() {
	close(n.ended)
	n.session.Kill()
	n.mu.Lock()
	hubs := n.all
	n.mu.Unlock()
	for _, b := range hubs {
		b.Close()
		for _, c := range b.Clients() {
			c.Cut(CloseGone)
		}
	}
	n.done.Wait()
}

// reachable reports whether the node reaches the engine.
func (n *modelNode) reachable() bool {
	n.model.mu.Lock()
	defer n.model.mu.Unlock()
	return !n.model.down && !n.down && !n.dead
}

// intN returns a random number; peers share the generator.
func (m *clusterModel) intN(n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rand.IntN(n)
}

func (m *clusterModel) chance(percent int) bool { return m.intN(100) < percent }

func (m *clusterModel) upTo(d time.Duration) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Duration(m.rand.Int64N(int64(d)))
}

func (m *clusterModel) node() *modelNode {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.nodes[m.rand.IntN(len(m.nodes))]
}

// living returns the nodes.
func (m *clusterModel) living() []*modelNode {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.nodes)
}

func (m *clusterModel) note(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.notes = append(m.notes, time.Now().Format("04:05.000 ")+fmt.Sprintf(format, args...))
}

// stopped reports whether peers send nothing more.
func (m *clusterModel) stopped() bool {
	select {
	case <-m.stop:
		return true
	default:
		return false
	}
}

// ---- peers ----

// The hubs of the model: one with a history, and one without.
const (
	hubWithHistory = "kept"
	hubWithout     = "bare"
)

// hubSettings returns what all peers of a hub have in common.
func hubSettings(name string) *Settings {
	s := unpinged(defaults())
	if name == hubWithHistory {
		s.HistoryMessages, s.HistoryAge = 30, 2*time.Minute
	}
	return s
}

// A modelPeer connects again and again, and sends and receives.
type modelPeer struct {
	*clusterModel
	id       int
	hub      string
	raw      bool
	slow     bool
	settings *Settings

	since       *Resumption // what it knows; only its own goroutine uses it
	connections int         // likewise

	mu      sync.Mutex
	count   int
	waiting []*modelMessage // unanswered
}

// A modelMessage is one that a peer has sent and that has no answer yet.
type modelMessage struct {
	payload, token string
	at             time.Time
}

// A connLog is what a peer has seen on one connection.
type connLog struct {
	peer   *modelPeer
	client feed.ClientID
	epoch  string
	since  *Resumption
	up     bool // the node reached the engine all the time while the peer joined
	hello  incoming
	start  uint64 // the number of the message before the first that it gets
	seen   []seenEvent
	isOpen bool
}

// A seenEvent is a message, or a gap before the one with that number.
type seenEvent struct {
	seq     uint64
	payload string
	lagged  bool
	missed  uint64
}

func (m *clusterModel) newPeer(id int) *modelPeer {
	p := &modelPeer{clusterModel: m, id: id, hub: hubWithHistory, raw: m.chance(35), slow: m.chance(25)}
	if m.chance(40) {
		p.hub = hubWithout
	}
	s := hubSettings(p.hub)
	s.Echo, s.SkipLag = m.chance(70), m.chance(50)
	s.BufferMessages = []int{1, 8, 64, 256}[m.intN(4)]
	s.Presence = m.chance(50)
	s.JoinLeave = s.Presence && m.chance(50)
	p.settings = s
	return p
}

// A modelProtocol is the events protocol. It notes which messages the server refuses: their senders may not get the answer.
type modelProtocol struct{ *clusterModel }

func (modelProtocol) encoder() feed.Encoder                 { return eventsProtocol{}.encoder() }
func (modelProtocol) joined(c *Client, w welcome)           { eventsProtocol{}.joined(c, w) }
func (modelProtocol) lagged(c *Client, missed, next uint64) { eventsProtocol{}.lagged(c, missed, next) }
func (modelProtocol) mayBegin(c *Client) bool               { return eventsProtocol{}.mayBegin(c) }
func (modelProtocol) received(c *Client, opcode int, p []byte) bool {
	return eventsProtocol{}.received(c, opcode, p)
}
func (modelProtocol) knowsPresence() bool         { return true }
func (modelProtocol) goodbye(why ws.Close) []byte { return eventsProtocol{}.goodbye(why) }

func (p modelProtocol) answered(c *Client, key Key, r Receipt, err error) {
	if errors.Is(err, ErrUnavailable) {
		p.mu.Lock()
		p.refused[key.ID] = true
		p.mu.Unlock()
	}
	eventsProtocol{}.answered(c, key, r, err)
}

// run connects until the model is over.
func (p *modelPeer) run() {
	for {
		select {
		case <-p.over:
			return
		case <-time.After(10*time.Millisecond + p.upTo(500*time.Millisecond)):
		}
		p.connect()
	}
}

// connect is one connection.
func (p *modelPeer) connect() {
	n := p.node()
	p.connections++
	up := n.reachable()
	b, err := n.hub(p.hub, p.settings)
	if err != nil {
		return // 503
	}
	c := newTestClient(n.process, fmt.Sprint("user", p.id%5), testAddress(p.id), p.settings)
	shake(p.t, c)
	log := &connLog{peer: p}
	if !p.raw {
		log.since = p.since
		c.SpeakEvents(p.since)
		c.bundles = p.chance(50)
		c.protocol = modelProtocol{p.clusterModel}
	}
	if err := b.Join(c, 0); err != nil {
		return
	}
	up = up && n.reachable()
	log.client, log.epoch, log.up = c.id, b.epoch, up
	log.start = locked(b, func() uint64 { return c.feed.Seq(c.cursor) })
	room := 64 << 10
	if p.slow {
		room = 300
	}
	abilities := ability(p.intN(int(halfCloses) << 1))
	conn, server := newMemoryConn(abilities, room)
	c.Attach(server)
	end := conn.peer()
	c.Start()
	p.clusterModel.mu.Lock()
	p.logs = append(p.logs, log)
	dead := n.dead
	p.clusterModel.mu.Unlock()
	if dead { // it was killed meanwhile, before it knew the client
		c.Cut(CloseGone)
	}
	closed := make(chan struct{})
	var sender sync.WaitGroup
	hello := make(chan incoming, 1)
	sender.Go(func() { p.send(end, hello, closed) })
	sender.Go(func() { // ends with the connection
		select {
		case <-p.over:
			end.Close()
		case <-closed:
		}
	})
	if p.raw {
		hello <- incoming{}
	}
	p.read(bufio.NewReader(end), log, hello)
	close(closed)
	end.Close()
	sender.Wait()
}

// read reads until the connection ends.
func (p *modelPeer) read(r *bufio.Reader, log *connLog, hello chan<- incoming) {
	for {
		if p.slow && p.chance(30) && !p.stopped() {
			time.Sleep(p.upTo(time.Second))
		}
		f, err := readFrame(r)
		p.clusterModel.mu.Lock()
		log.isOpen = err == nil && f.opcode != ws.CloseMessage
		p.clusterModel.mu.Unlock()
		switch {
		case err != nil:
			return
		case f.opcode == ws.CloseMessage:
			return
		case p.raw:
			p.saw(log, seenEvent{payload: f.payload})
		default:
			for _, e := range parseEvent(p.t, f.payload).apart(p.t) {
				p.event(e, log, hello)
			}
		}
	}
}

func (p *modelPeer) saw(log *connLog, e seenEvent) {
	p.clusterModel.mu.Lock()
	defer p.clusterModel.mu.Unlock()
	log.seen = append(log.seen, e)
}

func (p *modelPeer) event(e incoming, log *connLog, hello chan<- incoming) {
	switch e.Type {
	case "hello":
		log.hello = e
		p.since = &Resumption{e.Epoch, uint64(e.Head - e.Replay)}
		hello <- e
	case "message":
		p.saw(log, seenEvent{seq: uint64(e.Seq), payload: e.text()})
		p.since = &Resumption{p.since.Epoch, uint64(e.Seq)}
	case "lagged":
		p.saw(log, seenEvent{seq: uint64(e.Next), lagged: true, missed: uint64(e.Missed)})
		p.since = &Resumption{p.since.Epoch, uint64(e.Next - 1)}
	case "sent":
		epoch := e.Epoch
		if epoch == "" {
			epoch = log.epoch
		}
		if p.answered(*e.ID) {
			p.clusterModel.mu.Lock()
			p.sent = append(p.sent, sentNote{p.hub, *e.ID, epoch, uint64(e.Seq)})
			p.clusterModel.mu.Unlock()
		}
	case "error":
		if !p.answered(*e.ID) {
			p.t.Errorf("peer %d: got %s for a message that is answered", p.id, e.raw)
		}
		p.clusterModel.mu.Lock()
		if e.Code == errorUnavailable {
			p.unavailable[*e.ID] = true
		} else {
			p.doubtful[*e.ID] = true
		}
		p.clusterModel.mu.Unlock()
	}
}

// answered takes the first unanswered message, which must be the given one. It returns false if the message is not unanswered.
func (p *modelPeer) answered(payload string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, m := range p.waiting {
		if m.payload != payload {
			continue
		}
		if i > 0 {
			p.t.Errorf("peer %d: got the answer to %s before that to %s", p.id, payload, p.waiting[0].payload)
		}
		p.waiting = append(p.waiting[:i:i], p.waiting[i+1:]...)
		p.clusterModel.mu.Lock()
		delete(p.unanswered, payload)
		p.clusterModel.mu.Unlock()
		return true
	}
	return false
}

// send sends until the connection ends: first the unanswered messages again, then new ones.
func (p *modelPeer) send(end memoryPeer, hello <-chan incoming, closed <-chan struct{}) {
	write := func(text string) bool {
		_, err := end.Write(clientFrame(finBit|opText, []byte(text)))
		return err == nil
	}
	var token string
	select {
	case e := <-hello:
		token = e.Token
	case <-closed:
		return
	}
	for _, m := range p.repeatable(token) {
		if !write(sendEvent(m.payload, m.token, m.payload)) {
			return
		}
	}
	for {
		select {
		case <-closed:
			return
		case <-p.stop:
			return
		case <-time.After(p.upTo(2 * time.Second)):
		}
		burst := 10
		if p.large {
			burst = 100
		}
		for range 1 + p.intN([]int{1, 3, burst}[p.intN(3)]) {
			if p.stopped() {
				return
			}
			payload := p.next(token)
			text := payload
			if !p.raw {
				text = sendEvent(payload, "", payload)
			}
			if !write(text) {
				return
			}
		}
		if p.chance(3) {
			end.Close()
			return
		}
	}
}

// next returns the payload of a new message, which waits for its answer from now on.
func (p *modelPeer) next(token string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count++
	payload := fmt.Sprintf("p%d.%d-%d", p.id, p.connections, p.count)
	if !p.raw {
		p.waiting = append(p.waiting, &modelMessage{payload, token, time.Now()})
		p.clusterModel.mu.Lock()
		p.unanswered[payload] = true
		p.clusterModel.mu.Unlock()
	}
	return payload
}

// repeatable returns the unanswered messages that may be sent again. It gives up the others.
func (p *modelPeer) repeatable(token string) []modelMessage {
	p.mu.Lock()
	defer p.mu.Unlock()
	again := []modelMessage{}
	var kept []*modelMessage
	for _, m := range p.waiting {
		if token != "" && m.token != "" && time.Since(m.at) < p.settings.HistoryAge*8/10 {
			again, kept = append(again, *m), append(kept, m)
		}
	}
	p.waiting = kept
	return again
}

// publishAlways publishes over HTTP.
func (m *clusterModel) publishAlways(id int) {
	for i := 0; !m.stopped(); i++ {
		time.Sleep(m.upTo(2 * time.Second))
		name := []string{hubWithHistory, hubWithout}[m.intN(2)]
		b, err := m.node().hub(name, hubSettings(name))
		if err != nil {
			continue
		}
		ctx, cancel := context.Background(), context.CancelFunc(func() {})
		if m.chance(30) {
			ctx, cancel = context.WithTimeout(ctx, m.upTo(5*time.Second))
		}
		payload := fmt.Sprintf("h%d-%d", id, i)
		message := textMessage(payload)
		message.Address = testAddress(100 + id)
		r, err := b.Publish(ctx, message)
		cancel()
		m.mu.Lock()
		switch epoch := r.Epoch; {
		case err == nil && epoch == "":
			m.published = append(m.published, sentNote{name, payload, b.epoch, r.Seq})
		case err == nil:
			m.published = append(m.published, sentNote{name, payload, epoch, r.Seq})
		case !errors.Is(err, ErrUnknown):
			m.unavailable[payload] = true
		}
		m.mu.Unlock()
	}
}

// ---- faults ----

// fault does something bad at random.
func (m *clusterModel) fault() {
	n := m.node()
	name := []string{hubWithHistory, hubWithout}[m.intN(2)]
	later := func(d time.Duration, what string, undo func()) {
		m.note("%s for %v", what, d)
		m.peers.Go(func() {
			time.Sleep(d)
			undo()
			m.note("%s ends", what)
		})
	}
	switch m.intN(20) {
	case 0:
		if m.setDown(&m.down, true) {
			m.server.Down(errDown)
			later(m.upTo(13*time.Second), "down", func() {
				m.server.Up()
				m.setDown(&m.down, false)
				for _, n := range m.living() {
					n.renew()
				}
			})
		}
	case 1, 2:
		if m.setDown(&n.down, true) {
			n.session.Down(errDown)
			later(m.upTo(20*time.Second), "one down", func() {
				n.session.Up()
				m.setDown(&n.down, false)
				n.renew()
			})
		}
	case 3, 4:
		m.note("loses requests")
		m.server.LoseRequests(m.intN(4))
	case 5, 6:
		m.note("loses replies")
		m.server.LoseReplies(m.intN(4))
	case 7:
		m.server.LoseReplies(1000)
		later(m.upTo(12*time.Second), "loses all replies", func() { m.server.LoseReplies(0) })
	case 8, 9, 10:
		lost := m.intN(30)
		m.note("loses %d pushes", lost)
		n.session.LosePushes(lost)
	case 11:
		n.session.LosePushes(100_000)
		later(m.upTo(15*time.Second), "loses all pushes", func() { n.session.LosePushes(0) })
	case 12, 13:
		later(m.upTo(3*time.Second), "holds pushes", n.session.HoldPushes())
	case 14:
		later(m.upTo(12*time.Second), "holds publishing", m.server.HoldPublish())
	case 15:
		m.note("new epoch of %s", name)
		m.server.NewEpoch(name)
	case 16:
		if m.chance(50) {
			seq := m.newest(name)
			seq -= min(seq, uint64(m.intN(20)))
			m.note("%s goes back to %d", name, seq)
			m.server.Rewind(name, seq)
		}
	case 17:
		if m.chance(30) {
			m.note("all is lost")
			m.mu.Lock()
			m.wiped = true
			m.mu.Unlock()
			m.server.Wipe()
		} else if m.chance(50) {
			m.forgetReceipts(name)
		}
	case 18:
		m.note("a node is killed")
		m.replace(n)
	case 19:
		n.mu.Lock()
		b := n.hubs[name]
		n.mu.Unlock()
		if b != nil {
			m.note("%s is closed on a node", name)
			n.closeHub(b)
		}
	}
}

// setDown sets a flag, and reports whether that changed it.
func (m *clusterModel) setDown(flag *bool, to bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if *flag == to {
		return false
	}
	*flag = to
	return true
}

// newest returns the number of the newest message of a hub.
func (m *clusterModel) newest(name string) uint64 {
	s, err := m.witness.Read(context.Background(), name, engine.Position{})
	if err != nil {
		return 0
	}
	return s.Seq
}

// forgetReceipts makes the engine forget the receipts of a hub. It cannot recognize a first attempt then, which waits on one
// node while the second one succeeded on another.
func (m *clusterModel) forgetReceipts(name string) {
	m.note("receipts of %s are lost", name)
	m.mu.Lock()
	for payload := range m.unanswered {
		m.doubtful[payload] = true
	}
	m.mu.Unlock()
	m.server.ForgetReceipts(name)
	m.mu.Lock()
	for _, s := range m.sent { // answered a moment ago, while another attempt may still wait
		m.doubtful[s.payload] = true
	}
	m.mu.Unlock()
}

// replace kills a node and starts another one.
func (m *clusterModel) replace(old *modelNode) {
	fresh := m.newNode()
	m.mu.Lock()
	if old.dead {
		m.mu.Unlock()
		panic("killed twice")
	}
	old.dead = true
	for i, n := range m.nodes {
		if n == old {
			m.nodes[i] = fresh
		}
	}
	m.gone = append(m.gone, old)
	m.mu.Unlock()
	old.kill()
}

// ---- the run ----

func (m *clusterModel) run() {
	m.server = enginetest.NewServer()
	m.witness = m.server.Session()
	for _, name := range []string{hubWithHistory, hubWithout} {
		w := &witnessHub{map[string]*witnessEpoch{}}
		m.observed[name] = w
		if _, err := m.witness.Open(context.Background(), name, engine.Bounds{Messages: 256, Bytes: 1 << 20, Age: time.Minute}, w); err != nil {
			m.t.Fatal(err)
		}
	}
	for range 2 + m.intN(2) {
		m.nodes = append(m.nodes, m.newNode())
	}
	peers, steps := 3+m.intN(4), 15
	if m.large {
		peers, steps = 10, 40
	}
	for i := range peers {
		p := m.newPeer(i)
		m.peers.Go(p.run)
	}
	var publishers sync.WaitGroup
	for i := range m.intN(3) {
		publishers.Go(func() { m.publishAlways(i) })
	}
	for range steps {
		time.Sleep(m.upTo(2 * time.Second))
		if m.chance(60) {
			m.fault()
		}
	}
	time.Sleep(25 * time.Second) // all faults are over
	m.server.LoseRequests(0)
	m.server.LoseReplies(0)
	for _, n := range m.nodes {
		n.session.LosePushes(0)
	}
	close(m.stop)
	publishers.Wait()
	time.Sleep(3 * engine.Lease) // nodes that were killed are dead, and the others have renewed
	synctest.Wait()
	m.check()
	close(m.over)
	m.peers.Wait()
	time.Sleep(3 * closeTimeout)
	for _, n := range m.nodes {
		close(n.ended)
		n.done.Wait()
		for _, b := range n.hubs {
			b.Close()
		}
	}
	time.Sleep(2 * engineTimeout)
	synctest.Wait()
	m.checkLeftovers()
	for _, n := range m.nodes {
		_ = n.session.Close()
	}
	_ = m.witness.Close()
	synctest.Wait()
}

// A modelTally counts what has happened in some runs, so that one can see whether they try everything.
type modelTally struct {
	connections, published, sent, unavailable, doubtful, resumed, missed, ahead, lagged, epochs, repaired int
}

func (m *clusterModel) addTo(t *modelTally) {
	t.sent += len(m.sent) + len(m.published)
	t.unavailable += len(m.unavailable)
	t.doubtful += len(m.doubtful)
	for _, log := range m.logs {
		t.connections++
		if log.since != nil && log.hello.Resumed != nil {
			switch {
			case *log.hello.Resumed:
				t.resumed++
			case log.since.Epoch == log.hello.Epoch && log.since.Seq > uint64(log.hello.Head):
				t.ahead++
			default:
				t.missed++
			}
		}
		for _, s := range log.seen {
			if s.missed > 0 {
				t.lagged++
			}
		}
	}
	for _, w := range m.observed {
		t.epochs += len(w.epochs)
		for _, e := range w.epochs {
			t.published += len(e.messages)
		}
	}
	for _, n := range append(m.nodes, m.gone...) {
		t.repaired += int(n.process.Counters.Repaired.Load())
	}
}

// ---- the checker ----

func (m *clusterModel) fail(format string, args ...any) {
	m.t.Helper()
	m.t.Errorf(format, args...)
}

func (m *clusterModel) check() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, log := range m.logs {
		if log.peer.raw {
			m.checkRaw(log)
		} else if log.hello.Type != "" {
			m.checkHello(log)
			m.checkEvents(log)
		}
	}
	m.checkOutcomes()
	m.checkSenders()
	m.checkUsers()
	open := 0
	for _, log := range m.logs {
		if log.isOpen {
			open++
			if n := len(log.peer.waiting); n > 0 {
				m.fail("peer %d waits for %d answers in %s, the first to %+v", log.peer.id, n, log.peer.hub, *log.peer.waiting[0])
			}
		}
	}
	if open == 0 {
		m.fail("no peer is connected at the end")
	}
}

// epochOf returns what the witness knows of an epoch.
func (m *clusterModel) epochOf(hub, epoch string) *witnessEpoch {
	if e := m.observed[hub].epochs[epoch]; e != nil {
		return e
	}
	return newWitnessEpoch(math.MaxUint64) // it has only what was there before
}

func (m *clusterModel) checkHello(log *connLog) {
	h := log.hello
	floor := uint64(h.Head - h.Replay)
	e := m.epochOf(log.peer.hub, h.Epoch)
	began := min(e.began, uint64(h.Head))
	since := log.since
	var missed uint64
	switch {
	case since == nil:
		return
	case since.Epoch != h.Epoch:
		missed = max(floor, began) - began
	case since.Seq > uint64(h.Head):
		if log.up {
			m.fail("peer %d knows %v: got %s, although the node could have fetched it", log.peer.id, *since, h.raw)
		}
	case *h.Resumed:
		if floor != since.Seq {
			m.fail("peer %d knows %v: got %s", log.peer.id, *since, h.raw)
		}
		return
	default:
		missed = floor - since.Seq
		if missed == 0 {
			m.fail("peer %d knows %v: got %s, want resumed", log.peer.id, *since, h.raw)
		}
	}
	if *h.Resumed || uint64(h.Missed) != missed {
		m.fail("peer %d knows %v: got %s, want %d missed", log.peer.id, *since, h.raw, missed)
	}
}

// skipOwn returns the number of the next message from seq on that the peer gets.
func (log *connLog) skipOwn(e *witnessEpoch, seq uint64) uint64 {
	for !log.peer.settings.Echo && e.messages[seq].Sender == log.client {
		seq++
	}
	return seq
}

func (m *clusterModel) checkEvents(log *connLog) {
	p, h := log.peer, log.hello
	e := m.epochOf(p.hub, h.Epoch)
	next := uint64(h.Head-h.Replay) + 1
	if next != log.start+1 {
		m.fail("peer %d: got %s, but it begins after message %d", p.id, h.raw, log.start)
	}
	for _, s := range log.seen {
		own := log.skipOwn(e, next)
		if s.lagged {
			if lost := s.seq - s.missed; !p.settings.SkipLag || s.missed == 0 && !p.settings.JoinLeave || lost < next || lost > own {
				m.fail("peer %d, epoch %s: lagged to %d with %d missed, instead of message %d", p.id, h.Epoch, s.seq, s.missed, own)
			}
			next = s.seq
			continue
		}
		if want := m.nameOf(h.Epoch, s, e); s.seq != own || want != s.payload {
			m.fail("peer %d, epoch %s: got message %d %q, want %d %q", p.id, h.Epoch, s.seq, s.payload, own, want)
			return
		}
		next = s.seq + 1
	}
	if next = log.skipOwn(e, next); log.isOpen && e.head != math.MaxUint64 && next != e.head+1 {
		m.fail("peer %d, epoch %s, of %s: got everything before message %d, of %d", p.id, h.Epoch, p.hub, next, e.head)
	}
}

// nameOf returns which message has the number of one that a peer has seen. For messages from before an epoch that is what
// the first peer has seen.
func (m *clusterModel) nameOf(epoch string, s seenEvent, e *witnessEpoch) string {
	if s.seq > e.began {
		return string(e.messages[s.seq].Payload)
	}
	key := fmt.Sprint(epoch, " ", s.seq)
	if _, ok := m.earlier[key]; !ok {
		m.earlier[key] = s.payload
	}
	return m.earlier[key]
}

// whereIs says in which epochs a message was published, and with which number.
func (m *clusterModel) whereIs(payload string) (where string) {
	for name, w := range m.observed {
		for epoch, e := range w.epochs {
			if seq, ok := e.numbers[payload]; ok {
				where += fmt.Sprintf(" %s, epoch %s, %d: message %d;", name, epoch, e.began, seq)
			}
		}
	}
	return where
}

func (m *clusterModel) checkRaw(log *connLog) {
	p := log.peer
	e := m.epochOf(p.hub, log.epoch)
	next := log.start + 1
	for _, s := range log.seen {
		seq, ok := e.numbers[s.payload]
		if !ok && next <= e.began { // from before the epoch
			next++
			continue
		}
		own := log.skipOwn(e, next)
		if !ok || seq < own || seq > own && !p.settings.SkipLag {
			m.fail("raw peer %d, epoch %s: got %q, message %d, want %d; %s", p.id, log.epoch, s.payload, seq, own, m.whereIs(s.payload))
			return
		}
		next = seq + 1
	}
	exact := !p.settings.SkipLag || p.settings.Echo
	if next = log.skipOwn(e, next); log.isOpen && exact && e.head != math.MaxUint64 && next != e.head+1 {
		m.fail("raw peer %d, epoch %s, of %s: got everything before message %d, of %d", p.id, log.epoch, p.hub, next, e.head)
	}
}

// checkOutcomes compares what senders were told with what was published.
func (m *clusterModel) checkOutcomes() {
	for _, s := range append(m.sent, m.published...) {
		if got := m.epochOf(s.hub, s.epoch).messages[s.seq].Payload; string(got) != s.payload {
			m.fail("%s was sent as message %d of epoch %s, which is %q", s.payload, s.seq, s.epoch, got)
		}
	}
	for name, w := range m.observed {
		times := map[string]int{}
		for epoch, e := range w.epochs {
			for _, payload := range e.repeated {
				if !m.doubtful[payload] {
					m.fail("%s was published twice in epoch %s of %s", payload, epoch, name)
				}
			}
			for payload := range e.numbers {
				times[payload]++
				if m.unavailable[payload] {
					m.fail("%s was published in %s, although its sender knows that it was not", payload, name)
				}
				if times[payload] > 1 && !m.wiped && !m.doubtful[payload] {
					m.fail("%s was published in several epochs of %s", payload, name)
				}
			}
		}
	}
}

// checkSenders compares the order of the messages that each peer has first sent on one connection.
func (m *clusterModel) checkSenders() {
	for name, w := range m.observed {
		for epoch, e := range w.epochs {
			last := map[string]int{}
			for seq := e.began + 1; seq <= e.head; seq++ {
				var n int
				payload := string(e.messages[seq].Payload)
				sender, number, _ := strings.Cut(payload, "-")
				if _, err := fmt.Sscan(number, &n); err != nil {
					m.fail("%q: %v", payload, err)
				}
				if n <= last[sender] && !m.doubtful[payload] && !m.refused[payload] && sender[0] == 'p' {
					m.fail("%s: %s came after %s-%d in epoch %s", name, payload, sender, last[sender], epoch)
				}
				last[sender] = n
			}
		}
	}
}

// checkUsers compares the users that the nodes know with those that are there.
func (m *clusterModel) checkUsers() {
	for _, name := range []string{hubWithHistory, hubWithout} {
		want := 0
		local := map[string]int{}
		for _, n := range m.nodes {
			if b := n.hubs[name]; b != nil {
				want += b.Size()
				for _, c := range b.Clients() {
					if !c.hasLeft() {
						local[c.user]++
					}
				}
			}
		}
		for i, n := range m.nodes {
			b := n.hubs[name]
			if b == nil {
				continue
			}
			if got := locked(b, b.audienceLocked); got != want {
				m.fail("node %d knows of %d clients in %s, want %d", i, got, name, want)
			}
			b.mu.Lock()
			for user, clients := range local {
				if got := b.remote.users[user] + b.remote.local[user]; got != clients {
					m.fail("node %d knows of %d clients of %s in %s, want %d", i, got, user, name, clients)
				}
			}
			b.mu.Unlock()
		}
	}
}

// checkLeftovers looks for what ought to be gone when everything has ended.
func (m *clusterModel) checkLeftovers() {
	for _, n := range append(m.nodes, m.gone...) {
		for _, b := range n.all {
			b.mu.Lock()
			if o := &b.outbox; len(o.queue)+len(o.waiting)+o.room+len(o.shares) > 0 || o.sending || b.members > 0 {
				m.fail("got %d queued and %d waiting messages, %d bytes of room, shares %v, and %d members left",
					len(o.queue), len(o.waiting), o.room, o.shares, b.members)
			}
			b.mu.Unlock()
		}
		if used := n.process.Outgoing.Used(); used != 0 {
			m.fail("got %d bytes left that messages took while they waited", used)
		}
	}
}

// TestCluster_EveryPeerSeesWhatWasPublished has peers of all kinds chat on several nodes, while the engine fails in all ways.
func TestCluster_EveryPeerSeesWhatWasPublished(t *testing.T) {
	t.Parallel()
	var tally modelTally
	defer func() { t.Logf("%+v", tally) }()
	for seed := *modelFirst; seed < *modelFirst+uint64(*modelSeeds); seed++ {
		synctest.Test(t, func(t *testing.T) {
			m := &clusterModel{
				t: t, large: seed%20 == 19, rand: rand.New(rand.NewPCG(seed, 0)), stop: make(chan struct{}), over: make(chan struct{}),
				observed: map[string]*witnessHub{}, earlier: map[string]string{}, unavailable: map[string]bool{},
				unanswered: map[string]bool{}, refused: map[string]bool{}, doubtful: map[string]bool{},
			}
			m.run()
			m.addTo(&tally)
			if t.Failed() {
				t.Fatalf("seed %d, after\n%s", seed, strings.Join(m.notes, "\n"))
			}
		})
	}
}
