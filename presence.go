package chatbroadcast

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"
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
func (b *hub) arriveLocked(c *client) {
	if c.watches() {
		b.watchers++
		if b.watchers == 1 {
			b.callRollLocked(c)
		}
		if c.settings.joinLeave {
			b.listeners++
			if b.listeners == 1 {
				b.announced = -1
			}
			b.toldCountLocked() // in its hello
		}
	}
	if b.watchers > 0 {
		b.countLocked(c)
		b.announceByLocked(time.Now())
	}
}

// toldCountLocked notes that a listener was told alone how many clients there are. If the others know of another number
// all are told the next, even if by then it is again the one that the others know.
func (b *hub) toldCountLocked() {
	if b.announced != b.members {
		b.announced = -1
	}
}

// watches reports whether c may ask who is there.
func (c *client) watches() bool { return c.speaksEvents && c.settings.presence }

// callRollLocked begins a roster, with all members but the newest.
func (b *hub) callRollLocked(newest *client) {
	b.generation++
	members := slices.DeleteFunc(slices.Clone(b.clients), func(c *client) bool { return c == newest || c.left })
	slices.SortFunc(members, func(a, b *client) int { return strings.Compare(a.user, b.user) })
	for _, c := range members { // in the roster's order, so that none is inserted before others
		b.countLocked(c)
	}
}

// countLocked enters c in the roster.
func (b *hub) countLocked(c *client) {
	c.counted = b.generation
	i, known := b.findUserLocked(c.user)
	if !known {
		b.roster = slices.Insert(b.roster, i, &rosterUser{name: c.user})
	}
	u := b.roster[i]
	u.clients++
	b.changeLocked(u, c.prefix)
}

func (b *hub) findUserLocked(name string) (i int, known bool) {
	return slices.BinarySearchFunc(b.roster, name, func(u *rosterUser, name string) int {
		return strings.Compare(u.name, name)
	})
}

// changeLocked sees to it that the listeners are told of what a client from the given address has changed about u.
func (b *hub) changeLocked(u *rosterUser, from netip.Prefix) {
	if b.listeners == 0 {
		u.shown = u.clients > 0
		return
	}
	if u.shown != (u.clients > 0) && !u.queued {
		u.queued = true
		b.changed = append(b.changed, rosterChange{u, from})
	}
}

// departLocked notes that c is no member any more.
func (b *hub) departLocked(c *client) {
	if c.watches() {
		b.watchers--
		if c.settings.joinLeave {
			b.listeners--
		}
	}
	if b.watchers == 0 {
		if b.timer != nil {
			b.timer.Stop()
		}
		b.presence = presence{generation: b.generation, told: b.told}
		return
	}
	if b.listeners == 0 {
		b.due = time.Time{} // or the timer that finds nobody would be waited for
	}
	if b.listeners == 0 && len(b.changed) > 0 {
		for _, u := range b.changed {
			u.queued, u.shown = false, u.clients > 0
		}
		b.changed = nil
		b.strikeLocked()
	}
	now := time.Now()
	if c.counted == b.generation { // else it was broken when the roster was begun
		i, _ := b.findUserLocked(c.user)
		u := b.roster[i]
		u.clients--
		u.left = now
		b.changeLocked(u, c.prefix)
		if u.clients == 0 && !u.shown && !u.queued {
			b.roster = slices.Delete(b.roster, i, i+1)
		}
	}
	b.announceByLocked(now.Add(presenceGrace))
}

// strikeLocked takes those out of the roster who are neither there nor thought to be.
func (b *hub) strikeLocked() {
	b.roster = slices.DeleteFunc(b.roster, func(u *rosterUser) bool { return u.clients == 0 && !u.shown && !u.queued })
}

// announceByLocked has the listeners told by t, or as soon after it as presenceInterval allows.
func (b *hub) announceByLocked(t time.Time) {
	if b.listeners == 0 {
		return
	}
	if next := b.told.Add(presenceInterval); t.Before(next) {
		t = next
	}
	if !b.due.IsZero() && !t.Before(b.due) {
		return
	}
	b.due = t
	if b.timer == nil {
		b.timer = time.AfterFunc(time.Until(t), b.announce)
	} else {
		b.timer.Reset(time.Until(t))
	}
}

// announce tells the listeners what has changed. It runs in the timer's goroutine, which it ends.
func (b *hub) announce() {
	b.mu.Lock()
	now := time.Now()
	if b.listeners == 0 || b.due.IsZero() || now.Before(b.due) { // it has been overtaken
		b.mu.Unlock()
		return
	}
	b.due = time.Time{}
	event, again := b.changesLocked(now)
	if event != nil {
		b.told = now
	}
	if !again.IsZero() {
		b.announceByLocked(again)
	}
	if event == nil || b.events == nil { // nobody reads events when the last listener is broken and has yet to leave
		b.mu.Unlock()
		return
	}
	at := b.events.appendBetween(event)
	for _, c := range b.clients {
		if c.speaksEvents && !c.settings.joinLeave {
			c.skipOwnLocked(at, b.events.tail)
		}
	}
	work := b.appendedLocked()
	b.mu.Unlock()
	b.deliver(work)
}

// changesLocked returns what the listeners are to be told, nil for nothing, and when there is more, if there is.
func (b *hub) changesLocked(now time.Time) (event any, again time.Time) {
	ready := make([]rosterChange, 0, len(b.changed))
	size := 0
	b.changed = slices.DeleteFunc(b.changed, func(u rosterChange) bool {
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
			size += jsonSize(u.name)
		}
		return true
	})
	if len(ready) > maxChanges || size > maxNamesSize {
		frame, rest := fairShare(ready)
		ready, b.changed, again = frame, append(rest, b.changed...), now
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
	counted := b.announced == b.members
	b.announced = b.members
	switch {
	case len(joined) == 1 && len(left) == 0:
		return userEvent{"join", joined[0], b.members}, again
	case len(joined) == 0 && len(left) == 1:
		return userEvent{"leave", left[0], b.members}, again
	case len(joined) > 0 || len(left) > 0 || !counted:
		return changesEvent{"presence", b.members, joined, left}, again
	}
	return nil, again
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
			size += jsonSize(turns[next][0].name)
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
func (b *hub) who(c *client, after *string, limit int) int {
	var buf bytes.Buffer
	for {
		page, told := b.page(c, after, limit)
		if page == nil {
			return 0
		}
		// Without the lock, since it takes ten times as long as to make the page.
		buf.Reset()
		encodeEvent(&buf, page)
		if b.tellUnlessTold(c, buf.Bytes(), told) {
			return buf.Len()
		} // else again: that is once a second at most
	}
}

// tellUnlessTold tells c an event, unless the listeners have been told anything since the given time. It reports whether
// it has.
func (b *hub) tellUnlessTold(c *client, event []byte, since time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.told.Equal(since) {
		return false
	}
	c.tellEncoded(event)
	return true
}

// page returns a page of the roster, and when the listeners were told anything before it, or nil for a client that is
// closing. A listener's page has those who are thought to be there because they have not been away for long, with no
// clients, since it will not be told that they are back.
func (b *hub) page(c *client, after *string, limit int) (page *rosterEvent, told time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.counted != b.generation || c.left {
		return nil, told
	}
	page = &rosterEvent{Type: "presence", Clients: b.members, Users: []rosterEntry{}}
	if c.settings.joinLeave {
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
	for _, u := range b.roster[i:] {
		if u.clients == 0 && (!u.shown || !c.settings.joinLeave) {
			continue
		}
		n := len(page.Users)
		size += jsonSize(u.name) + len(`{"user":,"clients":1},`)
		if n == limit || n > 0 && size > maxNamesSize {
			page.Next = &page.Users[n-1].User
			break
		}
		page.Users = append(page.Users, rosterEntry{u.name, u.clients})
		u.listed = u.listed || !u.shown && c.settings.joinLeave
	}
	return page, b.told
}

// jsonSize returns about how many bytes s, which is UTF-8, takes as a JSON string.
func jsonSize(s string) int {
	n := len(s) + 3 // the quotes and a comma
	for i := range len(s) {
		switch {
		case s[i] < ' ':
			n += 5
		case s[i] == '"' || s[i] == '\\':
			n++
		}
	}
	return n
}
