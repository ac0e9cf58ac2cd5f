package hub

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// A hubModel says in the plainest way how a hub must behave. It has every message ever published and, for each client, the
// messages that it has got. It acts at random on a hub that it works by hand.
type hubModel struct {
	*manual
	*rand.Rand
	history   int // 0: off
	age       time.Duration
	published []time.Time     // message n at n-1
	senders   []*manualClient // message n's at n-1
	forgotten int             // messages up to this one are no more in the history
	members   map[*manualClient]*clientModel
	broken    []*manualClient
	notes     []string
}

// A clientModel says which messages a client has got, and what it knows.
type clientModel struct {
	head    int // when it joined
	next    int // the message that it needs next
	roster  roster
	lagged  bool
	lost    int // raw: at least so many
	changes int // frames of presence that it got
	clients int // in the hub, by the last count that it got
	joined  time.Time
}

func (m *hubModel) note(format string, args ...any) {
	m.notes = append(m.notes, fmt.Sprintf(format, args...))
}

func (m *hubModel) fail(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("%v\nafter %v", fmt.Sprintf(format, args...), m.notes[max(0, len(m.notes)-60):])
}

// floor returns the number of the message after which a client that joins now gets everything.
func (m *hubModel) floor() int {
	head := len(m.published)
	floor := max(m.forgotten, head-m.history)
	for floor < head && time.Since(m.published[floor]) >= m.age {
		floor++
	}
	return floor
}

func (m *hubModel) settings() *Settings {
	s := defaults()
	s.BufferMessages, s.BufferBytes = 1+m.IntN(20), 16<<20
	s.HistoryMessages, s.HistoryAge = m.IntN(m.history+1), 1+time.Duration(m.Int64N(int64(m.age)))
	if s.HistoryMessages == 0 {
		s.HistoryAge = 0
	}
	s.Echo, s.SkipLag = m.IntN(3) > 0, m.IntN(2) > 0
	s.Presence = m.IntN(3) > 0
	s.JoinLeave = s.Presence && m.IntN(2) > 0
	return s
}

// enter makes a client join. It must get the hello and the messages that the model says.
func (m *hubModel) enter(s *Settings) {
	var since *Resumption
	floor, head := m.floor(), len(m.published)
	missed, resumed := floor, false
	if events := m.IntN(2) > 0; !events {
		a := m.join(m.user(), s, false, nil)
		m.members[a] = &clientModel{head: head, next: floor + 1, joined: time.Now()}
		m.note("%d:raw%+v", a.id, *s)
		a.take()
		return
	}
	if m.IntN(2) > 0 {
		since = &Resumption{"epoch", uint64(m.IntN(head + 3))}
		if m.IntN(4) == 0 {
			since.Epoch = "another"
		}
	}
	if since != nil && since.Epoch == "epoch" && int(since.Seq) > head {
		missed = 0
	} else if since != nil && since.Epoch == "epoch" {
		missed = max(floor, int(since.Seq)) - int(since.Seq)
		resumed = missed == 0
		floor = max(floor, int(since.Seq))
	}
	m.bundles = m.IntN(2) > 0
	a := m.join(m.user(), s, true, since)
	m.note("%d:events%+v%+v", a.id, *s, since)
	x := &clientModel{head: head, next: floor + 1, roster: roster{}, joined: time.Now()}
	m.members[a] = x
	if s.Presence {
		m.hub.sendRoster(a.Client, nil, maxPage)
	}
	a.take()
	got := a.events()
	hello := got[0]
	x.clients = hello.Clients
	if hello.Type != "hello" || hello.Head != head || hello.Replay != head-floor || hello.Clients != len(m.members)+len(m.broken) {
		m.fail("got %s, want head %d, a replay of %d, and %d clients", hello.raw, head, head-floor, len(m.members))
	}
	if since != nil && (*hello.Resumed != resumed || !resumed && hello.Missed != missed) {
		m.fail("since %+v: got %s, want %d missed", *since, hello.raw, missed)
	}
	for _, e := range got[1:] {
		m.takeEvent(a, x, e)
	}
}

func (m *hubModel) user() string { return string(rune('a' + m.IntN(5))) }

// own reports whether message n is one that a does not get, because a has sent it.
func (m *hubModel) own(a *manualClient, x *clientModel, n int) bool {
	return !a.settings.Echo && n > x.head && n <= len(m.senders) && m.senders[n-1] == a
}

// skipOwn goes on to the next message that a must get.
func (m *hubModel) skipOwn(a *manualClient, x *clientModel) {
	for m.own(a, x, x.next) {
		x.next++
	}
}

// takeEvent enters an event that a has got.
func (m *hubModel) takeEvent(a *manualClient, x *clientModel, e incoming) {
	m.t.Helper()
	switch {
	case e.Type == "message":
		m.skipOwn(a, x)
		if e.Seq != x.next || e.text() != strconv.Itoa(e.Seq) {
			m.fail("client %d: got %s, want message %d", a.id, e.raw, x.next)
		}
		x.next++
	case e.Type == "lagged":
		first := x.next // its own messages count when something before them is lost, too
		m.skipOwn(a, x)
		if lost := e.Next - e.Missed; !a.settings.SkipLag || lost < first || lost > x.next {
			m.fail("client %d: got %s instead of message %d", a.id, e.raw, x.next)
		}
		x.next, x.lagged = e.Next, true
	case e.Type == "presence" && e.Users != nil:
		x.roster, x.clients = newRoster(e), e.Clients
	case x.roster.apply(e):
		x.changes++
		x.clients = e.Clients
		if !a.settings.JoinLeave {
			m.fail("client %d is told %s", a.id, e.raw)
		}
	default:
		m.fail("client %d: got %s", a.id, e.raw)
	}
}

// look compares the messages that clients have got with those that they should have.
func (m *hubModel) look() {
	m.t.Helper()
	for a, x := range m.members {
		if a.speaksEvents() {
			for _, e := range a.events() {
				m.takeEvent(a, x, e)
			}
		} else {
			for _, text := range a.frames() {
				n, _ := strconv.Atoi(text)
				m.skipOwn(a, x)
				if n < x.next || n > x.next && !a.settings.SkipLag {
					m.fail("client %d: got %q, want message %d", a.id, text, x.next)
				}
				x.lost += n - x.next
				for before := n; before > x.next && m.own(a, x, before-1); before-- {
					x.lost--
				}
				x.next = n + 1
			}
		}
		if !a.stuck {
			m.skipOwn(a, x)
			if head := len(m.published); !a.speaksEvents() && a.missed > 0 && m.own(a, x, head) {
				x.next = head + 1 // no later message has shown the gap yet
			}
			if x.next != len(m.published)+1 {
				m.fail("client %d: got everything before message %d, of %d", a.id, x.next, len(m.published))
			}
			if !a.speaksEvents() && int(a.missed) < x.lost {
				m.fail("client %d: counts %d missed, want at least %d", a.id, a.missed, x.lost)
			}
		}
		if most := int(time.Since(x.joined)/presenceInterval) + 1; x.changes > most {
			m.fail("client %d: was told %d changes in %v", a.id, x.changes, time.Since(x.joined))
		}
	}
}

func (m *hubModel) someone() *manualClient {
	if len(m.clients) == 0 {
		return nil
	}
	return m.clients[m.IntN(len(m.clients))]
}

// step does one thing at random.
func (m *hubModel) step() {
	m.t.Helper()
	a := m.someone()
	switch m.IntN(15) {
	case 14:
		m.note("trimmed")
		m.hub.Trim()
	case 0, 1:
		m.enter(m.settings())
	case 2:
		if a != nil && len(m.clients) > 1 {
			m.note("%d:leaves", a.id)
			m.leaveOf(a)
		}
	case 3:
		if a != nil && len(m.clients) > 1 {
			m.note("%d:breaks", a.id)
			m.breakOff(a)
			delete(m.members, a)
			m.broken = append(m.broken, a)
		}
	case 4:
		if len(m.broken) > 0 {
			m.note("%d:is gone", m.broken[0].id)
			m.hub.leave(m.broken[0].Client, Cut, CloseGone)
			m.broken = m.broken[1:]
		}
	case 5, 6, 7, 8:
		for range 1 + m.IntN(8) {
			sender := m.someone()
			if sender != nil && m.IntN(8) == 0 {
				sender = nil
			}
			m.say(sender)
		}
	case 9:
		if a != nil {
			m.note("%d:stuck", a.id)
			a.stuck = true
		}
	case 10, 11:
		if a != nil && a.stuck {
			m.note("%d:takes", a.id)
			m.unstick(a)
		}
	case 12:
		d := time.Duration(m.Int64N(int64(3 * time.Second)))
		m.note("%v", d)
		time.Sleep(d)
		m.serve()
	case 13:
		if m.IntN(4) == 0 && m.history > 0 {
			m.hub.Forget()
			m.note("forget")
			m.forgotten = len(m.published)
		}
	}
	m.look()
}

func (m *hubModel) leaveOf(a *manualClient) {
	m.leave(a)
	delete(m.members, a)
}

// unstick makes a take everything, or leave if it has lagged and must.
func (m *hubModel) unstick(a *manualClient) {
	m.t.Helper()
	if !a.settings.SkipLag && a.cursor < a.feed.Tail() {
		m.leaveOf(a)
		return
	}
	if c := a.Client; !a.settings.SkipLag {
		limit := c.feed.Head()
		if c.skipLocked(limit); c.cursor < c.feed.Tail() {
			if behind := int(c.feed.Head() - c.cursor); behind <= c.settings.BufferMessages {
				m.fail("client %d lags at %d frames, with %d to %d there", c.id, behind, c.feed.Tail(), c.feed.Head())
			}
			m.leaveOf(a)
			return
		}
	}
	a.take()
}

func (m *hubModel) say(from *manualClient) {
	m.t.Helper()
	if from != nil {
		m.note("%d:says %d", from.id, len(m.senders)+1)
	} else {
		m.note("post %d", len(m.published)+1)
	}
	m.senders = append(m.senders, from)
	m.published = append(m.published, m.publish(from, strconv.Itoa(len(m.senders))))
}

// end makes every client take everything, compares the users that they know with those that are there, and closes the hub.
func (m *hubModel) end() {
	m.t.Helper()
	for _, a := range slices.Clone(m.clients) {
		if a.stuck {
			m.unstick(a)
		}
	}
	for _, a := range m.broken {
		m.hub.leave(a.Client, Cut, CloseGone)
	}
	m.broken = nil
	for range 10 {
		time.Sleep(time.Second)
		m.serve()
	}
	m.look()
	want := map[string]bool{}
	for a := range m.members {
		want[a.user] = true
	}
	for a, x := range m.members {
		if a.settings.JoinLeave && a.speaksEvents() && !x.lagged && !maps.Equal(x.roster, want) {
			m.fail("client %d knows of %v, want %v", a.id, x.roster, want)
		}
		if a.settings.JoinLeave && a.speaksEvents() && !x.lagged && x.clients != len(m.members) {
			m.fail("client %d knows of %d clients, want %d", a.id, x.clients, len(m.members))
		}
	}
	for a := range m.members {
		m.leaveOf(a)
	}
	m.hub.Close()
	b := m.hub
	if len(b.feeds) > 1 || b.raw.Memory() > 0 || b.turns.open > 0 || b.sample.owed > 0 || b.sample.leaving > 0 || len(b.quiet) > 0 {
		m.fail("something is left: %+v", b)
	}
	if used := b.process.Memory.Histories.Used(); used != 0 {
		m.fail("got %d bytes of a closed hub's history counted", used)
	}
	if used := b.process.Memory.Buffers.Used(); used != 0 {
		m.fail("got %d bytes of a closed hub's buffers counted", used)
	}
}

// TestHub_DoesWhatItsModelDoes has clients of all kinds come, send, get stuck, break and go at random, in hubs with and without
// history.
func TestHub_DoesWhatItsModelDoes(t *testing.T) {
	t.Parallel()
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) {
			m := &hubModel{manual: newManual(t), Rand: rand.New(rand.NewPCG(seed, 0)), members: map[*manualClient]*clientModel{}}
			m.history, m.age = m.IntN(2)*m.IntN(30), 1+time.Duration(m.Int64N(int64(10*time.Second)))
			first := m.settings()
			first.HistoryMessages, first.HistoryAge = m.history, m.age
			m.enter(first)
			for range 200 {
				if m.hub.closed || m.hub.empty && m.history == 0 { // the last client has left
					break
				}
				m.step()
			}
			m.end()
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
