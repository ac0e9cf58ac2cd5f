package hub

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestPresence_ChangesWhileTheOnlyListenerIsDeaf changes the roster when the writes to the only listener fail, and the server
// still reads from it.
func TestPresence_ChangesWhileTheOnlyListenerIsDeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		s.serve()
		time.Sleep(time.Minute)
		s.serve()
		s.breakOff(ada)
		bob := s.join("bob", defaults(), false, nil)
		time.Sleep(time.Minute)
		s.serve()
		s.publish(bob, "hello")
		if got := bob.frames(); len(got) != 1 || got[0] != "hello" {
			t.Errorf("got %q, want the message", got)
		}
		s.leave(ada)
		s.leave(bob)
	})
}

// TestPresence_NextListenerLearnsOfItself has the only listener leave before it has learned of the last change. A client stays
// that may ask for the roster but gets no changes.
func TestPresence_NextListenerLearnsOfItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		s.join("ada", presenceOf(false), true, nil)
		bob := s.join("bob", presenceOf(true), true, nil)
		s.leave(bob)
		time.Sleep(time.Minute)
		cid := s.join("cid", presenceOf(true), true, nil)
		time.Sleep(time.Minute)
		s.serve()
		if e := cid.events(); len(e) != 2 || e[1].Type != "join" || *e[1].User != "cid" {
			t.Errorf("got %+v, want hello and the join of cid", e)
		}
	})
}

// TestPresence_ClientThatIsNoListenerLearnsNothingBesideADeafOne has a deaf listener beside a client that gets no changes.
func TestPresence_ClientThatIsNoListenerLearnsNothingBesideADeafOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		bob := s.join("bob", presenceOf(false), true, nil)
		s.serve()
		time.Sleep(time.Minute)
		s.serve()
		s.breakOff(ada)
		s.join("cid", defaults(), false, nil)
		time.Sleep(time.Minute)
		s.serve()
		if e := bob.events(); len(e) != 1 {
			t.Errorf("got %+v, want hello alone", e)
		}
		s.leave(ada)
	})
}

// TestPresence_ShortVisitIsNoChange has a visitor come and leave within the second in which the server announces nothing.
func TestPresence_ShortVisitIsNoChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		s.serve()
		ada.events() // hello and her own join
		visitor := s.join("visitor", presenceOf(false), false, nil)
		s.serve()
		s.leave(visitor)
		time.Sleep(time.Minute)
		s.serve()
		for _, e := range ada.events() {
			if strings.Contains(e.raw, "visitor") {
				t.Errorf("got %s, want nothing about the visitor", e.raw)
			}
		}
	})
}

// TestPresence_OfAQuietHubTakesNoMemory is about a hub with history whose messages are all too old.
func TestPresence_OfAQuietHubTakesNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := presenceOf(true)
		settings.HistoryMessages, settings.HistoryAge = 10, time.Minute
		ada := s.join("ada", settings, true, nil)
		s.publish(ada, "x")
		time.Sleep(time.Hour)
		for i := range 100 {
			bob := s.join(fmt.Sprint("bob", i), settings, false, nil)
			time.Sleep(2 * time.Second)
			s.serve()
			s.leave(bob)
		}
		if n := eventsFeed(s.hub).Bytes(); n > 0 {
			t.Errorf("got %d bytes of frames kept that everybody has", n)
		}
	})
}

func TestPresence_DisplacesNoMessageOfTheHistory(t *testing.T) {
	for _, bufferBytes := range []int{testBufferBytes, 6000} {
		t.Run(fmt.Sprint(bufferBytes), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newManual(t)
				settings := presenceOf(true)
				settings.BufferMessages, settings.HistoryMessages, settings.HistoryAge = 10, 10, time.Hour
				settings.BufferBytes = bufferBytes
				ada := s.join("ada", settings, true, nil)
				var want []string
				come := func(i int) {
					bob := s.join(fmt.Sprint("bob", i), settings, false, nil)
					time.Sleep(2 * time.Second)
					s.serve()
					s.leave(bob)
				}
				for i := range 10 {
					s.publish(ada, fmt.Sprint(i))
					want = append(want, fmt.Sprint(i))
					come(i)
				}
				for i := range 100 {
					come(i)
				}
				cid := s.join("cid", settings, true, nil)
				s.serve()
				var got []string
				for _, e := range cid.events() {
					if e.Type == "message" {
						got = append(got, *e.Data)
						if e.Seq != len(got) {
							t.Errorf("got %s, want number %d", e.raw, len(got))
						}
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		})
	}
}

// TestPresence_DisplacesNoMessageOfTheHistoryByItsSize has many users with long names come and go.
func TestPresence_DisplacesNoMessageOfTheHistoryByItsSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := presenceOf(true)
		settings.HistoryMessages, settings.HistoryAge = 10, time.Hour
		ada := s.join("ada", settings, true, nil)
		for i := range 100 {
			if i%10 == 0 {
				s.publish(ada, fmt.Sprint(i/10))
			}
			var others []*manualClient
			for j := range 12 {
				others = append(others, s.join(fmt.Sprint(i, j, strings.Repeat("x", 1000)), settings, false, nil))
			}
			time.Sleep(4 * time.Second)
			s.serve()
			for _, other := range others {
				s.leave(other)
			}
		}
		ada.events()
		s.publish(ada, "10")
		if got := ada.events(); got[len(got)-1].Seq != 11 {
			t.Errorf("got %+v, want message 11", got)
		}
		bob := s.join("bob", settings, true, nil)
		s.serve()
		got := bob.events()
		if got[0].Replay != 10 {
			t.Fatalf("got %s, want 10 messages", got[0].raw)
		}
		for i, e := range got[1:11] {
			if e.Seq != 2+i || e.text() != fmt.Sprint(1+i) {
				t.Errorf("got %s, want message %d", e.raw, 2+i)
			}
		}
	})
}

func TestPresence_IsNotCountedAsMissed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		settings := presenceOf(true)
		settings.BufferMessages, settings.SkipLag = 10, true
		ada := s.join("ada", settings, true, nil)
		bob := s.join("bob", settings, true, nil)
		s.serve()
		time.Sleep(2 * time.Second)
		s.serve()
		ada.stuck = true
		s.publish(bob, "in the middle of a write")
		for i := range 10 {
			cid := s.join(fmt.Sprint("cid", i), settings, false, nil)
			time.Sleep(2 * time.Second)
			s.serve()
			s.leave(cid)
			s.publish(bob, fmt.Sprint(i))
		}
		for i := range 10 {
			s.publish(bob, fmt.Sprint(i))
		}
		ada.take()
		got := ada.events()
		i := slices.IndexFunc(got, func(e incoming) bool { return e.Type == "lagged" })
		if i < 0 || got[i].Missed == 0 || got[i].Next != 2+got[i].Missed || got[i+1].Seq != got[i].Next {
			t.Errorf("got %+v, want to be told the number of messages between", got)
		}
	})
}

// TestPresence_StaleListenersGetNewCount has one client of a user come and another one go at once. The number of clients is the
// same as before, but the client that has come was told another one.
func TestPresence_StaleListenersGetNewCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, test := range []struct {
			name   string
			change func(s *manual, ada *manualClient) (told *manualClient)
		}{
			{"by hello", func(s *manual, ada *manualClient) *manualClient {
				again := s.join("ada", presenceOf(true), true, nil)
				s.leave(ada)
				return again
			}},
			{"by an answer to who", func(s *manual, ada *manualClient) *manualClient {
				s.join("dan", defaults(), false, nil)
				s.serve() // all learn of this at once, and of the next change a second later
				raw := s.join("ada", defaults(), false, nil)
				s.hub.sendRoster(ada.Client, nil, maxPage)
				s.publish(nil, "has the answer sent, too")
				s.leave(raw)
				return ada
			}},
			{"before a client left that was broken when the roster began", func(s *manual, ada *manualClient) *manualClient {
				raw := s.join("bob", defaults(), false, nil)
				s.breakOff(raw)
				s.leave(ada)
				again := s.join("ada", presenceOf(true), true, nil)
				time.Sleep(time.Minute)
				s.leave(raw)
				return again
			}},
		} {
			s := newManual(t)
			s.join("cid", defaults(), false, nil)
			ada := s.join("ada", presenceOf(true), true, nil)
			time.Sleep(time.Minute)
			s.serve()
			told := test.change(s, ada)
			time.Sleep(time.Minute)
			s.serve()
			got := told.events()
			if last := got[len(got)-1]; last.Clients != s.hub.Size() {
				t.Errorf("%s: got %s last, want %d clients", test.name, last.raw, s.hub.Size())
			}
		}
	})
}

// tellingFrames returns how many frames of changes ada gets, one a second, until one of them has the user. It gives up after
// most frames, and returns most.
func tellingFrames(s *manual, ada *manualClient, user string, most int) int {
	for n := 1; n <= most; n++ {
		time.Sleep(presenceInterval)
		s.serve()
		for _, e := range ada.events() {
			if e.User != nil && *e.User == user || slices.Contains(e.Joined, user) || slices.Contains(e.Left, user) {
				return n
			}
		}
	}
	return most
}

// TestPresence_ManyLongNamesHoldUpNoOthers has hundreds of users with long names come, and then an honest user.
func TestPresence_ManyLongNamesHoldUpNoOthers(t *testing.T) {
	const elsewhere = "2001:db8::/64"
	for _, tc := range []struct {
		name string
		from []string // addresses of the many
	}{
		{"from another address", []string{"192.0.2.1/32"}},
		{"from the same address", []string{elsewhere}},
		{"from ten addresses", []string{
			"192.0.2.1/32", "192.0.2.2/32", "192.0.2.3/32", "192.0.2.4/32", "192.0.2.5/32",
			"192.0.2.6/32", "192.0.2.7/32", "192.0.2.8/32", "192.0.2.9/32", "192.0.2.10/32",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newManual(t)
				s.from = "198.51.100.7/32"
				ada := s.join("ada", presenceOf(true), true, nil)
				time.Sleep(time.Minute)
				s.serve()
				ada.events()
				var many []*manualClient
				for i := range 500 {
					s.from = tc.from[i%len(tc.from)]
					many = append(many, s.join(fmt.Sprintf("%03d%s", i, strings.Repeat("x", 900)), defaults(), false, nil))
				}
				time.Sleep(presenceInterval)
				s.from = elsewhere
				bob := s.join("bob", defaults(), false, nil)
				if n := tellingFrames(s, ada, "bob", 100); n > 2 {
					t.Errorf("got the coming told in frame %d, want one of the first 2", n)
				}
				for _, a := range many {
					s.leave(a)
				}
				s.leave(bob)
				time.Sleep(presenceGrace - presenceInterval)
				s.serve()
				if n := tellingFrames(s, ada, "bob", 100); n > 3 {
					t.Errorf("got the going told %d s after the grace, want 2 at most", n-1)
				}
			})
		})
	}
}

// TestPresence_ListenersKnowEverybodyInTheEnd has many users come and go, from many addresses, and compares the users that a
// listener knows then with those that are there.
func TestPresence_ListenersKnowEverybodyInTheEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newManual(t)
		ada := s.join("ada", presenceOf(true), true, nil)
		random := rand.New(rand.NewPCG(1, 2))
		there := map[string]*manualClient{}
		known := map[string]bool{}
		listen := func() {
			time.Sleep(presenceInterval)
			s.serve()
			for _, e := range ada.events() {
				switch e.Type {
				case "join":
					known[*e.User] = true
				case "leave":
					delete(known, *e.User)
				}
				if n := len(e.Joined) + len(e.Left); n > maxChanges {
					t.Errorf("got %d names in a frame", n)
				}
				for _, name := range e.Joined {
					known[name] = true
				}
				for _, name := range e.Left {
					delete(known, name)
				}
			}
		}
		for range 10 {
			for range 1000 {
				name := fmt.Sprint(strings.Repeat("x", random.IntN(900)), random.IntN(2000))
				s.from = fmt.Sprintf("192.0.2.%d/32", random.IntN(1+random.IntN(255)))
				if a := there[name]; a != nil {
					s.leave(a)
					delete(there, name)
				} else {
					there[name] = s.join(name, defaults(), false, nil)
				}
			}
			listen()
		}
		for range 1000 { // 16 KiB of names each
			listen()
		}
		there["ada"] = ada
		for name := range there {
			if !known[name] {
				t.Errorf("not told of %.20q", name)
			}
		}
		if len(known) != len(there) {
			t.Errorf("told of %d users, want %d", len(known), len(there))
		}
	})
}

// TestPresence_ManyAddressesTakeTurns has more addresses than fit into a frame bring several users each.
func TestPresence_ManyAddressesTakeTurns(t *testing.T) {
	var changes []rosterChange
	const addresses, each = maxChanges + 50, 4
	for i := range addresses * each {
		from := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(i / each / 256), byte(i / each)}), 32)
		changes = append(changes, rosterChange{&rosterUser{name: fmt.Sprint(i)}, from})
	}
	told := map[netip.Prefix]int{}
	for frame := 1; len(changes) > 0; frame++ {
		var now []rosterChange
		if now, changes = changes, nil; len(now) > maxChanges {
			now, changes = fairShare(now)
		}
		for _, c := range now {
			told[c.from]++
		}
		least, most := each, 0
		for _, n := range told {
			least, most = min(least, n), max(most, n)
		}
		if frame > 1 && most > least+1 {
			t.Errorf("after frame %d: got %d to %d users of an address told", frame, least, most)
		}
	}
}

// BenchmarkPresence_Changes measures one frame of changes while many more wait.
func BenchmarkPresence_Changes(b *testing.B) {
	for _, addresses := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("users=10000/addresses=%d", addresses), func(b *testing.B) {
			changes := make([]rosterChange, 10_000)
			for i := range changes {
				from := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, byte(i % addresses / 256), byte(i % addresses)}), 32)
				changes[i] = rosterChange{&rosterUser{name: fmt.Sprint("user", i*7919%10_000)}, from}
			}
			some := make([]rosterChange, len(changes))
			b.ReportAllocs()
			for b.Loop() {
				copy(some, changes)
				fairShare(some)
			}
		})
	}
}
