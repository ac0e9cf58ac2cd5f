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

// presence has the users in a hub, for the clients of handlers with `presence`. While the hub has no such client it is
// empty. The hub's lock guards it.
type presence struct {
	watchers   int    // members that may ask for the roster
	listeners  int    // watchers that also receive changes
	generation uint64 // of the roster; see Client.counted

	roster []*rosterUser // ordered by name, byte by byte

	// The changes that listeners do not know yet.
	changed   []rosterChange // users that have come or gone: first those that did not fit into a frame, then the others, oldest first
	announced int            // the number of clients that listeners were last told; negative if they were told different numbers
	told      time.Time      // when the hub last sent a notice
	timer     *time.Timer    // runs announce at due
	due       time.Time      // when the next notice is due; zero: none is
}

// A rosterChange is a user that has come or gone, and the address of the client that caused it.
type rosterChange struct {
	*rosterUser
	from netip.Prefix
}

// A rosterUser is a user with a client in the hub, or one that listeners still take for present.
type rosterUser struct {
	name    string
	clients int
	shown   bool      // listeners take the user for present
	listed  bool      // some listener only knows it from a page of the roster
	queued  bool      // it is in presence.changed
	left    time.Time // when its last client left
}

const (
	// presenceInterval is the shortest time between two notices of changes.
	presenceInterval = time.Second

	// presenceGrace is how long a user may be without clients before listeners learn that it has left. It is longer
	// than reloading a page takes, or reconnecting after a connection broke: chat.js waits for a second at most before
	// its first attempt.
	presenceGrace = 3 * time.Second

	// maxChanges and maxNamesSize, in bytes, bound a frame that lists users. For 10,000 clients a full frame is 160 MB.
	maxChanges   = 250
	maxNamesSize = 16 << 10
)

// arriveLocked counts c, a new member, for presence.
func (b *Hub) arriveLocked(c *Client) {
	b.countUserLocked(c.user, 1)
	if c.watches() {
		b.presence.watchers++
		if b.presence.watchers == 1 {
			b.beginRosterLocked(c)
		}
		if c.settings.JoinLeave {
			b.presence.listeners++
			if b.presence.listeners == 1 {
				b.presence.announced = -1
			}
			b.countSentLocked() // in its hello
		}
	}
	if b.presence.watchers > 0 {
		b.countLocked(c)
		b.announceByLocked(time.Now())
	}
}

// countSentLocked notes that the hub has sent the number of clients to one listener alone. If the others know another
// number, the next notice goes to all, even if by then the number is the one that the others know.
func (b *Hub) countSentLocked() {
	if b.presence.announced != b.audienceLocked() {
		b.presence.announced = -1
	}
}

// watches reports whether c may ask for the roster.
func (c *Client) watches() bool { return c.settings.Presence && c.protocol.knowsPresence() }

// beginRosterLocked begins a new roster with all members except the newest.
func (b *Hub) beginRosterLocked(newest *Client) {
	b.presence.generation++
	members := slices.DeleteFunc(slices.Clone(b.clients), func(c *Client) bool { return c == newest || c.hasLeft() })
	slices.SortFunc(members, func(a, b *Client) int { return strings.Compare(a.user, b.user) })
	for _, c := range members { // in the roster's order, so that each is appended
		b.countLocked(c)
	}
	b.addAllToRosterLocked(new(others).changesTo(b.remote.others), time.Time{})
}

// countLocked adds c to the roster.
func (b *Hub) countLocked(c *Client) {
	c.counted = b.presence.generation
	b.addToRosterLocked(c.user, 1, c.address, time.Time{})
}

// addToRosterLocked notes that a user has more clients, or fewer since now. from is the address that has caused it; the zero
// prefix stands for all other nodes.
func (b *Hub) addToRosterLocked(user string, more int, from netip.Prefix, now time.Time) {
	i, known := b.findUserLocked(user)
	if !known {
		b.presence.roster = slices.Insert(b.presence.roster, i, &rosterUser{name: user})
	}
	u := b.presence.roster[i]
	b.addClientsLocked(u, more, from, now)
	if u.clients == 0 && !u.shown && !u.queued {
		b.presence.roster = slices.Delete(b.presence.roster, i, i+1)
	}
}

func (b *Hub) addClientsLocked(u *rosterUser, more int, from netip.Prefix, now time.Time) {
	u.clients += more
	if more < 0 {
		u.left = now
	}
	b.changeLocked(u, from)
}

func (b *Hub) findUserLocked(name string) (i int, known bool) {
	return slices.BinarySearchFunc(b.presence.roster, name, func(u *rosterUser, name string) int {
		return strings.Compare(u.name, name)
	})
}

// changeLocked queues u for the next notice if listeners do not know its current state. from is the address of the
// client that has come or gone. Without listeners it marks u as known.
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

// departLocked takes c, which has left, out of presence.
func (b *Hub) departLocked(c *Client) {
	b.countUserLocked(c.user, -1)
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
		b.presence.due = time.Time{} // otherwise announceByLocked would wait for a timer that finds no listeners
	}
	if b.presence.listeners == 0 && len(b.presence.changed) > 0 {
		for _, u := range b.presence.changed {
			u.queued, u.shown = false, u.clients > 0
		}
		b.presence.changed = nil
		b.removeAbsentLocked()
	}
	now := time.Now()
	if c.counted == b.presence.generation { // otherwise it had left when the roster began
		b.addToRosterLocked(c.user, -1, c.address, now)
	}
	b.announceByLocked(now.Add(presenceGrace))
}

// removeAbsentLocked removes the users from the roster that have no clients and that no listener takes for present.
func (b *Hub) removeAbsentLocked() {
	b.presence.roster = slices.DeleteFunc(b.presence.roster, func(u *rosterUser) bool { return u.clients == 0 && !u.shown && !u.queued })
}

// announceByLocked schedules a notice for t, or for as soon after t as presenceInterval allows. It does nothing without
// listeners, or if a notice is due by then anyway.
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
	switch wait := time.Until(t); {
	case wait <= 0:
		go b.announce() // without a timer, as in announceUsersSoonLocked
	case b.presence.timer == nil:
		b.presence.timer = time.AfterFunc(wait, b.announce)
	default:
		b.presence.timer.Reset(wait)
	}
}

// announce sends the listeners a notice of the changes. It runs in a goroutine of its own.
func (b *Hub) announce() {
	b.mu.Lock()
	now := time.Now()
	if b.presence.listeners == 0 || b.presence.due.IsZero() || now.Before(b.presence.due) { // a later timer announces
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

// noticeLocked appends a notice to the feeds whose clients get notices. Clients of these feeds that are no listeners
// skip it.
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

// changesLocked returns the next notice for the listeners, or nil if nothing has changed. again is when there are
// further changes to announce, or zero.
func (b *Hub) changesLocked(now time.Time) (notice *feed.Notice, again time.Time) {
	ready := make([]rosterChange, 0, len(b.presence.changed))
	size := 0
	b.presence.changed = slices.DeleteFunc(b.presence.changed, func(u rosterChange) bool {
		here := u.clients > 0
		if here == u.shown && (here || !u.listed) { // the user came and went, or went and came
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
	b.removeAbsentLocked()
	clients := b.audienceLocked()
	counted := b.presence.announced == clients
	b.presence.announced = clients
	if len(joined)+len(left) == 0 && counted {
		return nil, again
	}
	return &feed.Notice{Clients: clients, Joined: joined, Left: left}, again
}

// fairShare divides changes that do not fit into one frame into those of the next frame and the rest. The frame takes
// one change of each address in turn, and of an address the user with the shortest name first. So an address that
// brings many users, or users with long names, delays its own changes, and of these hardly those with short names. The
// rest begins with the address whose turn is next. It reuses the memory of changes.
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

// sendRoster sends c a page of the roster: at most limit users, from the first one on, or from the one behind *after
// on. It returns the size of the page in bytes, or 0 if c is closing. c receives notices of later changes after the
// page.
func (b *Hub) sendRoster(c *Client, after *string, limit int) int {
	var buf []byte
	for {
		page, told := b.page(c, after, limit)
		if page == nil {
			return 0
		}
		// Encoding happens without the lock, because it takes ten times as long as making the page.
		buf = feed.AppendEvent(buf[:0], page)
		if b.sendUnlessTold(c, buf, told) {
			return len(buf)
		} // else a notice came between: try again, once a second at most
	}
}

// sendUnlessTold sends c an event, unless the hub has sent a notice since the given time. It reports whether it has
// sent the event.
func (b *Hub) sendUnlessTold(c *Client, event []byte, since time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.presence.told.Equal(since) {
		return false
	}
	c.tell(ws.TextMessage, event)
	return true
}

// page returns a page of the roster, and when the hub last sent a notice before it. page is nil for a client that is
// closing. A page for a listener includes users that have left within presenceGrace, with 0 clients, because no notice
// will say that they are back.
func (b *Hub) page(c *Client, after *string, limit int) (page *rosterEvent, told time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.counted != b.presence.generation || c.hasLeft() {
		return nil, told
	}
	page = &rosterEvent{Type: "presence", Clients: b.audienceLocked(), Users: []rosterEntry{}}
	if c.settings.JoinLeave {
		b.countSentLocked()
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
