package main

import "time"

// A hub is a group of clients that must all receive the same messages.
type hub struct {
	clients []*client
	senders []*sender
	live    int32 // clients that are connected
}

// A client is one connection. Its engine owns the fields below "engine".
type client struct {
	parser
	hub    *hub
	wants  []uint64 // the next sequence number of each of the hub's senders
	digest uint64   // of the received messages, in their order
	faulty bool     // something was lost, doubled or reordered, so the digest is useless
	gone   bool
	dialed time.Duration // when it began to connect

	// engine
	conn    connection
	out     []byte // bytes to send
	writing bool   // the engine is sending out, or waits until it can
}

// A sender is a client that sends.
type sender struct {
	client   *client
	id       uint64        // run and number, as in its messages
	index    int           // in its hub
	interval time.Duration // between messages; 0 in a closed loop
	due      time.Duration // when to send the next message

	seq         uint64 // of the next message
	first       uint64 // of the oldest message that is under way
	outstanding int    // messages that some client does not have yet
	slots       []slot // the messages from first to seq, at seq % len(slots), which is a power of two
}

// A slot is a message that is under way.
type slot struct {
	at        time.Duration // when it was due, or sent in a closed loop
	remaining int32         // clients that do not have it yet
}

// push takes a new message and returns its sequence number.
func (s *sender) push(at time.Duration, clients int32) uint64 {
	if n := uint64(len(s.slots)); s.seq-s.first == n {
		grown := make([]slot, max(64, 2*n))
		for q := s.first; q < s.seq; q++ {
			grown[q%uint64(len(grown))] = s.slots[q%n]
		}
		s.slots = grown
	}
	s.slots[s.seq&uint64(len(s.slots)-1)] = slot{at, clients}
	s.outstanding++
	s.seq++
	return s.seq - 1
}

// ack notes that one more client has the message, or will never have it. It returns when the message was due, and
// whether no other client is left. It ignores messages that are no longer under way.
func (s *sender) ack(seq uint64) (at time.Duration, done bool) {
	if seq < s.first || seq >= s.seq {
		return 0, false
	}
	mask := uint64(len(s.slots) - 1)
	m := &s.slots[seq&mask]
	m.remaining--
	if m.remaining != 0 {
		return m.at, false
	}
	at = m.at
	s.outstanding--
	for s.first < s.seq && s.slots[s.first&mask].remaining <= 0 {
		s.first++
	}
	return at, true
}

// faults count the errors of a server.
type faults struct {
	Lost         int64 `json:"lost"`         // deliveries that never came to a connected client
	Doubled      int64 `json:"doubled"`      // deliveries that came again
	Reordered    int64 `json:"reordered"`    // deliveries after a later message of the same sender
	Misordered   int   `json:"misordered"`   // clients that saw the hub's senders in another order than its first client
	Foreign      int64 `json:"foreign"`      // deliveries in another hub
	Disconnected int   `json:"disconnected"` // clients; their missing deliveries do not count as lost
}

func (f faults) any() bool { return f != faults{} }

// A checker knows all sent messages and checks every delivery.
type checker struct {
	faults
	run        uint64 // where the senders' ids begin
	byNumber   []*sender
	deliveries int64
	others     int64 // messages of other programs
	missing    map[delivery]struct{}
}

// A delivery is one message to one client. The checker keeps those that a later message overtook.
type delivery struct {
	c    *client
	s    *sender
	want uint64
}

// maxMissing bounds the memory of a run against a server that loses many messages. Beyond it the checker counts an
// overtaken delivery as lost at once, and as doubled if it still comes.
const maxMissing = 1 << 20

// deliver checks the message that c has just received. It returns when the message was due, whether c still waited for
// it, and the sender whose window may have opened, or nil.
func (k *checker) deliver(c *client) (at time.Duration, ok bool, opened *sender) {
	id, seq, ok := parseID(&c.id)
	number := id - k.run
	if !ok || c.idN < idSize || number >= uint64(len(k.byNumber)) || seq >= k.byNumber[number].seq {
		k.others++
		return 0, false, nil
	}
	s := k.byNumber[number]
	if s.client.hub != c.hub {
		k.Foreign++
		return 0, false, nil
	}
	want := c.wants[s.index]
	if seq < want {
		c.faulty = true
		if _, late := k.missing[delivery{c, s, seq}]; !late {
			k.Doubled++
			return 0, false, nil
		}
		delete(k.missing, delivery{c, s, seq})
		k.Reordered++
		k.deliveries++
		return 0, false, nil
	}
	for ; want < seq; want++ {
		c.faulty = true
		k.overtaken(delivery{c, s, want})
		if _, done := s.ack(want); done {
			opened = s
		}
	}
	c.wants[s.index] = seq + 1
	c.digest = (c.digest ^ (number<<idBits | seq)) * 0x100000001b3 // FNV's prime
	k.deliveries++
	at, done := s.ack(seq)
	if done {
		opened = s
	}
	return at, true, opened
}

func (k *checker) overtaken(m delivery) {
	if len(k.missing) >= maxMissing {
		k.Lost++
		return
	}
	if k.missing == nil {
		k.missing = map[delivery]struct{}{}
	}
	k.missing[m] = struct{}{}
}

// leave removes a client that has disconnected, so that no message waits for it.
func (k *checker) leave(c *client) {
	if c.gone {
		return
	}
	c.gone = true
	c.hub.live--
	k.Disconnected++
	for _, s := range c.hub.senders {
		for q := c.wants[s.index]; q < s.seq; q++ {
			s.ack(q)
		}
	}
}

// underWay reports whether a message of a connected sender has not reached all clients yet.
func (k *checker) underWay() bool {
	for _, s := range k.byNumber {
		if !s.client.gone && s.outstanding > 0 {
			return true
		}
	}
	return false
}

// finish adds the faults that show only when no message is under way.
func (k *checker) finish(hubs []*hub) {
	for m := range k.missing {
		if !m.c.gone {
			k.Lost++
		}
	}
	for _, h := range hubs {
		for _, s := range h.senders {
			// The server may never have published the last messages of a sender that is gone, except those that some
			// client has.
			published := s.seq
			if s.client.gone {
				published = 0
				for _, c := range h.clients {
					published = max(published, c.wants[s.index])
				}
			}
			for _, c := range h.clients {
				if want := c.wants[s.index]; !c.gone && want < published {
					k.Lost += int64(published - want)
					c.faulty = true
				}
			}
		}
		var first *client
		for _, c := range h.clients {
			switch {
			case c.gone || c.faulty:
			case first == nil:
				first = c
			case c.digest != first.digest:
				k.Misordered++
			}
		}
	}
}
