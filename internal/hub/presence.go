package hub

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// presence is who is in a hub, by user, for the clients of directives with `presence`. While there are none of these
// nothing is kept. It needs the hub's lock.
type presence struct {
	watchers   int    // members that may ask who is there
	listeners  int    // and of these those that are told of changes
	generation uint64 // of the roster: who was counted in another one is not in this

	roster []*rosterUser // in the order of their names, by bytes

	// What the listeners do not know yet.
	changed   []rosterChange // users that have come or gone: those that did not fit into a frame, then the oldest first
	announced int            // how many clients the listeners were last told of; negative: not all of the same number
	told      time.Time      // when they were told anything
	timer     *time.Timer    // runs announce when they are due
	due       time.Time      // zero: never
}

// A rosterChange is a user that has come or gone, and the address of the client with which it did.
type rosterChange struct {
	*rosterUser
	from netip.Prefix
}

// A rosterUser is a user with a client in the hub, or one that listeners take for that.
type rosterUser struct {
	name    string
	clients int
	shown   bool // listeners know that the user is there
	listed  bool // some listener knows it from an answer to who
	queued  bool // is in changed
	left    time.Time
}

const (
	// presenceInterval is how often listeners are told of changes, at most.
	presenceInterval = time.Second

	// presenceGrace is how long a user may be away without having left: longer than it takes to reload a page, or
	// to come back after a connection broke. chat.js waits for a second at most before its first attempt.
	presenceGrace = 3 * time.Second

	// maxChanges and maxNamesSize bound a frame that lists users. To 10,000 clients a full one is 160 MB.
	maxChanges   = 250
	maxNamesSize = 16 << 10
)

// arriveLocked notes that c has become a member.
func (b *Hub) arriveLocked(c *Client) {
	if c.watches() {
		b.presence.watchers++
		if b.presence.watchers == 1 {
			b.callRollLocked(c)
		}
		if c.settings.JoinLeave {
			b.presence.listeners++
			if b.presence.listeners == 1 {
				b.presence.announced = -1
			}
			b.toldCountLocked() // in its hello
		}
	}
	if b.presence.watchers > 0 {
		b.countLocked(c)
		b.announceByLocked(time.Now())
	}
}

// toldCountLocked notes that a listener was told alone how many clients there are. If the others know of another number
// all are told the next, even if by then it is again the one that the others know.
func (b *Hub) toldCountLocked() {
	if b.presence.announced != b.members {
		b.presence.announced = -1
	}
}

// watches reports whether c may ask who is in the hub.
func (c *Client) watches() bool { return c.settings.Presence && c.protocol.knowsPresence() }

// callRollLocked begins a roster, with all members but the newest.
func (b *Hub) callRollLocked(newest *Client) {
	b.presence.generation++
	members := slices.DeleteFunc(slices.Clone(b.clients), func(c *Client) bool { return c == newest || c.hasLeft() })
	slices.SortFunc(members, func(a, b *Client) int { return strings.Compare(a.user, b.user) })
	for _, c := range members { // in the roster's order, so that none is inserted before others
		b.countLocked(c)
	}
}

// countLocked enters c in the roster.
func (b *Hub) countLocked(c *Client) {
	c.counted = b.presence.generation
	i, known := b.findUserLocked(c.user)
	if !known {
		b.presence.roster = slices.Insert(b.presence.roster, i, &rosterUser{name: c.user})
	}
	u := b.presence.roster[i]
	u.clients++
	b.changeLocked(u, c.address)
}

func (b *Hub) findUserLocked(name string) (i int, known bool) {
	return slices.BinarySearchFunc(b.presence.roster, name, func(u *rosterUser, name string) int {
		return strings.Compare(u.name, name)
	})
}

// changeLocked sees to it that the listeners are told of what a client from the given address has changed about u.
func (b *Hub) changeLocked(u *rosterUser, from netip.Prefix) {
	if b.presence.listeners == 0 {
		u.shown = u.clients > 0
		return
	}
	if u.shown != (u.clients > 0) && !u.queued {
		u.queued = true
		b.presence.changed = append(b.presence.changed, rosterChange{u, from})
	}
}

// departLocked notes that c is no member any more.
func (b *Hub) departLocked(c *Client) {
	if c.watches() {
		b.presence.watchers--
		if c.settings.JoinLeave {
			b.presence.listeners--
		}
	}
	if b.presence.watchers == 0 {
		if b.presence.timer != nil {
			b.presence.timer.Stop()
		}
		b.presence = presence{generation: b.presence.generation, told: b.presence.told}
		return
	}
	if b.presence.listeners == 0 {
		b.presence.due = time.Time{} // or the timer that finds nobody would be waited for
	}
	if b.presence.listeners == 0 && len(b.presence.changed) > 0 {
		for _, u := range b.presence.changed {
			u.queued, u.shown = false, u.clients > 0
		}
		b.presence.changed = nil
		b.strikeLocked()
	}
	now := time.Now()
	if c.counted == b.presence.generation { // else it was broken when the roster was begun
		i, _ := b.findUserLocked(c.user)
		u := b.presence.roster[i]
		u.clients--
		u.left = now
		b.changeLocked(u, c.address)
		if u.clients == 0 && !u.shown && !u.queued {
			b.presence.roster = slices.Delete(b.presence.roster, i, i+1)
		}
	}
	b.announceByLocked(now.Add(presenceGrace))
}

// strikeLocked takes those out of the roster who are neither there nor thought to be.
func (b *Hub) strikeLocked() {
	b.presence.roster = slices.DeleteFunc(b.presence.roster, func(u *rosterUser) bool { return u.clients == 0 && !u.shown && !u.queued })
}

// announceByLocked has the listeners told by t, or as soon after it as presenceInterval allows.
func (b *Hub) announceByLocked(t time.Time) {
	if b.presence.listeners == 0 {
		return
	}
	if next := b.presence.told.Add(presenceInterval); t.Before(next) {
		t = next
	}
	if !b.presence.due.IsZero() && !t.Before(b.presence.due) {
		return
	}
	b.presence.due = t
	if b.presence.timer == nil {
		b.presence.timer = time.AfterFunc(time.Until(t), b.announce)
	} else {
		b.presence.timer.Reset(time.Until(t))
	}
}

// announce tells the listeners what has changed. It runs in the timer's goroutine, which it ends.
func (b *Hub) announce() {
	b.mu.Lock()
	now := time.Now()
	if b.presence.listeners == 0 || b.presence.due.IsZero() || now.Before(b.presence.due) { // it has been overtaken
		b.mu.Unlock()
		return
	}
	b.presence.due = time.Time{}
	notice, again := b.changesLocked(now)
	if notice != nil {
		b.presence.told = now
	}
	if !again.IsZero() {
		b.announceByLocked(again)
	}
	if notice == nil {
		b.mu.Unlock()
		return
	}
	b.noticeLocked(notice)
	var w work
	b.appendedLocked(&w)
	b.mu.Unlock()
	b.deliver(&w)
}

// noticeLocked appends a notice to the feeds whose clients get notices. Those of them that are no listeners skip it.
func (b *Hub) noticeLocked(n *feed.Notice) {
	for _, f := range b.feeds {
		at, ok := f.AppendNotice(n)
		if !ok {
			continue
		}
		for _, c := range b.clients {
			if c.feed == f && !c.settings.JoinLeave {
				c.skipFrameLocked(at)
			}
		}
	}
}

// changesLocked returns what the listeners are to learn, nil for nothing, and when there is more, if there is.
func (b *Hub) changesLocked(now time.Time) (notice *feed.Notice, again time.Time) {
	ready := make([]rosterChange, 0, len(b.presence.changed))
	size := 0
	b.presence.changed = slices.DeleteFunc(b.presence.changed, func(u rosterChange) bool {
		here := u.clients > 0
		if here == u.shown && (here || !u.listed) { // it came and went, or the other way round
			u.queued = false
			return true
		}
		if t := u.left.Add(presenceGrace); !here && t.After(now) {
			if again.IsZero() || t.Before(again) {
				again = t
			}
			return false
		}
		ready = append(ready, u)
		if size <= maxNamesSize {
			size += feed.JSONSize(u.name)
		}
		return true
	})
	if len(ready) > maxChanges || size > maxNamesSize {
		frame, rest := fairShare(ready)
		ready, b.presence.changed, again = frame, append(rest, b.presence.changed...), now
	}
	var joined, left []string
	for _, u := range ready {
		u.shown, u.listed, u.queued = u.clients > 0, false, false
		if u.shown {
			joined = append(joined, u.name)
		} else {
			left = append(left, u.name)
		}
	}
	b.strikeLocked()
	counted := b.presence.announced == b.members
	b.presence.announced = b.members
	if len(joined)+len(left) == 0 && counted {
		return nil, again
	}
	return &feed.Notice{Clients: b.members, Joined: joined, Left: left}, again
}

// fairShare divides changes that one frame cannot hold into those of the next frame and the rest. The frame gets one
// change of each address in turn, and of an address the user with the shortest name first. So an address that brings many
// users, or users with long names, holds up itself, and of its own users hardly those with short names. The rest begins
// with the address whose turn is next, and reuses changes.
func fairShare(changes []rosterChange) (frame, rest []rosterChange) {
	addresses := make(map[netip.Prefix]int) // in the order of their first changes
	var counts []int
	address := make([]int, len(changes))
	for i, c := range changes {
		a, known := addresses[c.from]
		if !known {
			a = len(counts)
			addresses[c.from] = a
			counts = append(counts, 0)
		}
		address[i] = a
		counts[a]++
	}
	turns, room := make([][]rosterChange, len(counts)), make([]rosterChange, len(changes))
	for a, n := range counts {
		turns[a], room = room[:0:n], room[n:]
	}
	for i, c := range changes {
		turns[address[i]] = append(turns[address[i]], c)
	}
	for _, turn := range turns {
		slices.SortStableFunc(turn, func(a, b rosterChange) int { return cmp.Compare(len(a.name), len(b.name)) })
	}
	size, next := 0, 0
	for len(frame) < min(maxChanges, len(changes)) {
		if len(turns[next]) > 0 {
			size += feed.JSONSize(turns[next][0].name)
			if size > maxNamesSize && len(frame) > 0 {
				break
			}
			frame = append(frame, turns[next][0])
			turns[next] = turns[next][1:]
		}
		next = (next + 1) % len(turns)
	}
	rest = changes[:0]
	for i := range turns {
		rest = append(rest, turns[(next+i)%len(turns)]...)
	}
	return frame, rest
}

// who tells c a page of the roster: at most limit users, those after the given one if it is not nil. It returns the
// size of that. What is told of changes after the page was made is told after it.
func (b *Hub) who(c *Client, after *string, limit int) int {
	var buf []byte
	for {
		page, told := b.page(c, after, limit)
		if page == nil {
			return 0
		}
		// Without the lock, because it takes ten times as long as making the page.
		buf = feed.AppendEvent(buf[:0], page)
		if b.tellUnlessTold(c, buf, told) {
			return len(buf)
		} // else again: that is once a second at most
	}
}

// tellUnlessTold tells c an event, unless the listeners have been told anything since the given time. It reports whether
// it has.
func (b *Hub) tellUnlessTold(c *Client, event []byte, since time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.presence.told.Equal(since) {
		return false
	}
	c.tell(ws.TextMessage, event)
	return true
}

// page returns a page of the roster, and when the listeners were told anything before it, or nil for a client that is
// closing. A listener's page has those who are thought to be there because they have not been away for long, with no
// clients, since it will not be told that they are back.
func (b *Hub) page(c *Client, after *string, limit int) (page *rosterEvent, told time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.counted != b.presence.generation || c.hasLeft() {
		return nil, told
	}
	page = &rosterEvent{Type: "presence", Clients: b.members, Users: []rosterEntry{}}
	if c.settings.JoinLeave {
		b.toldCountLocked()
	}
	i := 0
	if after != nil {
		var known bool
		if i, known = b.findUserLocked(*after); known {
			i++
		}
	}
	size := 0
	for _, u := range b.presence.roster[i:] {
		if u.clients == 0 && (!u.shown || !c.settings.JoinLeave) {
			continue
		}
		n := len(page.Users)
		size += feed.JSONSize(u.name) + len(`{"user":,"clients":1},`)
		if n == limit || n > 0 && size > maxNamesSize {
			page.Next = &page.Users[n-1].User
			break
		}
		page.Users = append(page.Users, rosterEntry{u.name, u.clients})
		u.listed = u.listed || !u.shown && c.settings.JoinLeave
	}
	return page, b.presence.told
}
