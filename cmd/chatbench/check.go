package main

import "time"

// A hub is the clients that shall receive the same messages.
type hub struct {
	clients []*client
	senders []*sender
	live    int32 // clients that are connected
}

// A client is one connection. Its engine owns what is below "engine".
type client struct {
	parser
	hub    *hub
	wants  []uint64 // the next sequence number of each of the hub's senders
	digest uint64   // of what was received, in its order
	faulty bool     // something was lost, doubled or reordered: the digest says nothing
	gone   bool

	// engine
	conn    connection
	out     []byte // what is to be sent
	writing bool   // somebody is sending it, or waits until it can be
}

// A sender is a client that sends.
type sender struct {
	client   *client
	id       uint64        // run and number, as in its messages
	index    int           // in its hub
	interval time.Duration // between messages; 0 in a closed loop
	due      time.Duration // when to send the next

	seq         uint64 // of the next message
	first       uint64 // of the first that is under way
	outstanding int    // messages that not all clients have
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

// take says that one client has the message, or never will, and whether that was the last. A message that is not under
// way any more is nobody's loss.
func (s *sender) take(seq uint64) (at time.Duration, done bool) {
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

// Faults are what must not happen to a message.
type faults struct {
	Lost         int64 `json:"lost"`         // deliveries that never came, to clients that are connected
	Doubled      int64 `json:"doubled"`      // deliveries that came again
	Reordered    int64 `json:"reordered"`    // deliveries after a later message of the same sender
	Misordered   int   `json:"misordered"`   // clients that saw the hub's senders in another order than its first client
	Foreign      int64 `json:"foreign"`      // deliveries in another hub
	Disconnected int   `json:"disconnected"` // clients; what they miss is not counted as lost
}

func (f faults) any() bool { return f != faults{} }

// A checker knows what was sent, and checks what arrives.
type checker struct {
	faults
	run        uint64 // where the senders' ids begin
	byNumber   []*sender
	deliveries int64
	others     int64 // messages that are none of ours
	missing    map[missing]struct{}
}

// missing is a delivery that was overtaken.
type missing struct {
	c    *client
	s    *sender
	want uint64
}

// maxMissing bounds the memory of a run against a server that loses much. What is overtaken beyond it is taken for lost
// at once, and for doubled should it still come.
const maxMissing = 1 << 20

// deliver checks the message that c has just received. It says when the message was due, whether it was one of ours that
// was still wanted, and whose window may have opened by it.
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
		if _, late := k.missing[missing{c, s, seq}]; !late {
			k.Doubled++
			return 0, false, nil
		}
		delete(k.missing, missing{c, s, seq})
		k.Reordered++
		k.deliveries++
		return 0, false, nil
	}
	for ; want < seq; want++ {
		c.faulty = true
		k.overtaken(missing{c, s, want})
		if _, done := s.take(want); done {
			opened = s
		}
	}
	c.wants[s.index] = seq + 1
	c.digest = (c.digest ^ (number<<idBits | seq)) * 0x100000001b3 // FNV's prime
	k.deliveries++
	at, done := s.take(seq)
	if done {
		opened = s
	}
	return at, true, opened
}

func (k *checker) overtaken(m missing) {
	if len(k.missing) >= maxMissing {
		k.Lost++
		return
	}
	if k.missing == nil {
		k.missing = map[missing]struct{}{}
	}
	k.missing[m] = struct{}{}
}

// leave takes a client out that is not connected any more: nobody waits for it.
func (k *checker) leave(c *client) {
	if c.gone {
		return
	}
	c.gone = true
	c.hub.live--
	k.Disconnected++
	for _, s := range c.hub.senders {
		for q := c.wants[s.index]; q < s.seq; q++ {
			s.take(q)
		}
	}
}

// underWay reports whether a message of a connected sender is still expected.
func (k *checker) underWay() bool {
	for _, s := range k.byNumber {
		if !s.client.gone && s.outstanding > 0 {
			return true
		}
	}
	return false
}

// finish adds to the faults what can be known only when nothing is under way any more.
func (k *checker) finish(hubs []*hub) {
	for m := range k.missing {
		if !m.c.gone {
			k.Lost++
		}
	}
	for _, h := range hubs {
		for _, s := range h.senders {
			// What was sent and by a sender that is gone may never have been published, except what somebody has.
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
