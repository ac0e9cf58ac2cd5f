package main

import "testing"

// A checkedHub is a hub of three clients, the first two of which send, with a checker of their deliveries.
type checkedHub struct {
	checker
	hub hub
}

func newCheckedHub() *checkedHub {
	s := &checkedHub{}
	for range 3 {
		s.hub.clients = append(s.hub.clients, &client{hub: &s.hub, wants: make([]uint64, 2)})
	}
	s.hub.live = 3
	for i, c := range s.hub.clients[:2] {
		s.byNumber = append(s.byNumber, &sender{client: c, id: uint64(i), index: i})
	}
	s.hub.senders = s.byNumber
	return s
}

// receive delivers messages to a client, each given by sender and sequence number.
func (s *checkedHub) receive(client int, messages ...[2]uint64) {
	c := s.hub.clients[client]
	for _, m := range messages {
		putID(c.id[:], s.run+m[0], m[1])
		c.idN = idSize
		s.deliver(c)
	}
}

func TestChecker_FindsEachFault(t *testing.T) {
	type messages = [][2]uint64
	good := messages{{0, 0}, {0, 1}, {0, 2}, {1, 0}}
	for name, test := range map[string]struct {
		received messages // by the third client
		want     faults
	}{
		"nothing wrong":          {good, faults{}},
		"the last is lost":       {messages{{0, 0}, {0, 1}, {0, 2}}, faults{Lost: 1}},
		"the first is lost":      {messages{{0, 1}, {0, 2}, {1, 0}}, faults{Lost: 1}},
		"all are lost":           {nil, faults{Lost: 4}},
		"two in the middle":      {messages{{0, 0}, {1, 0}}, faults{Lost: 2}},
		"doubled":                {messages{{0, 0}, {0, 1}, {0, 1}, {0, 2}, {1, 0}}, faults{Doubled: 1}},
		"doubled later":          {messages{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {0, 0}}, faults{Doubled: 1}},
		"a sender's order":       {messages{{0, 0}, {0, 2}, {0, 1}, {1, 0}}, faults{Reordered: 1}},
		"reordered and doubled":  {messages{{0, 2}, {0, 0}, {0, 1}, {0, 0}, {1, 0}}, faults{Reordered: 2, Doubled: 1}},
		"the senders' order":     {messages{{0, 0}, {1, 0}, {0, 1}, {0, 2}}, faults{Misordered: 1}},
		"never sent by this run": {append(messages{{0, 7}, {9, 0}}, good...), faults{}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newCheckedHub()
			for _, m := range good {
				s.byNumber[m[0]].push(0, 3)
			}
			s.receive(0, good...)
			s.receive(1, good...)
			s.receive(2, test.received...)
			s.finish([]*hub{&s.hub})
			if s.faults != test.want {
				t.Errorf("got %+v, want %+v", s.faults, test.want)
			}
		})
	}
}

func TestChecker_FindsMessagesOfAnotherHub(t *testing.T) {
	s := newCheckedHub()
	s.byNumber[0].push(0, 3)
	s.hub.clients[2].hub = &hub{}
	s.receive(2, [2]uint64{0, 0})
	if s.Foreign != 1 {
		t.Errorf("got %d foreign messages, want 1", s.Foreign)
	}
}

func TestChecker_DisconnectedClientIsNotAwaited(t *testing.T) {
	s := newCheckedHub()
	first := s.byNumber[0]
	for range 100 {
		first.push(0, 3)
	}
	for seq := range uint64(100) {
		s.receive(0, [2]uint64{0, seq})
		s.receive(1, [2]uint64{0, seq})
	}
	if got, want := first.outstanding, 100; got != want {
		t.Errorf("%d messages are under way, want %d", got, want)
	}
	s.leave(s.hub.clients[2])
	s.leave(s.hub.clients[2])
	if first.outstanding != 0 || first.first != 100 || s.underWay() {
		t.Errorf("%d messages are under way, from %d on, want none", first.outstanding, first.first)
	}
	s.finish([]*hub{&s.hub})
	if want := (faults{Disconnected: 1}); s.faults != want {
		t.Errorf("got %+v, want %+v", s.faults, want)
	}
}

// TestChecker_MessageOfLeftSenderIsLostOnlyIfSomeClientHasIt: the server may never have received the others.
func TestChecker_MessageOfLeftSenderIsLostOnlyIfSomeClientHasIt(t *testing.T) {
	s := newCheckedHub()
	for range 5 {
		s.byNumber[0].push(0, 3)
	}
	s.leave(s.hub.clients[0])
	s.receive(1, [2]uint64{0, 0}, [2]uint64{0, 1})
	s.receive(2, [2]uint64{0, 0})
	s.finish([]*hub{&s.hub})
	if want := (faults{Disconnected: 1, Lost: 1}); s.faults != want {
		t.Errorf("got %+v, want %+v", s.faults, want)
	}
}
