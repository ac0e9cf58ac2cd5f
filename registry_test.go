package chatbroadcast

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/gorilla/websocket"
	"go.uber.org/zap/zaptest"
)

// tested is the registry of the test that runs: not hubs, which Caddy's goroutines of an earlier test may still read.
var tested *registry

// withRegistry runs a test in a bubble, on hubs of its own.
func withRegistry(t *testing.T, test func(t *testing.T)) {
	tested = newRegistry()
	synctest.Test(t, test)
}

// withScope runs a test in a bubble, on hubs of its own, with one hub value that is configured.
func withScope(t *testing.T, test func(t *testing.T, s *scope)) {
	withRegistry(t, func(t *testing.T) {
		l := leaseOf(t, "value", processSettings{})
		test(t, l.scope)
		tested.release(l)
		synctest.Wait()
	})
}

// leaseOf returns a lease on the scope of a hub value.
func leaseOf(t *testing.T, key string, p processSettings) *lease {
	return tested.lease(key, zaptest.NewLogger(t), emitter{}, p, time.Duration(defaultDrain))
}

// historyOfTen returns settings with a history of ten messages, for a minute.
func historyOfTen() *hub.Settings {
	s := defaults()
	s.HistoryMessages, s.HistoryAge = 10, time.Minute
	return s
}

// testPrefix returns one of 256 addresses.
func testPrefix(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i)}), 32)
}

// textOf returns a message that no client has sent.
func textOf(payload string) hub.Message {
	m := message([]byte(payload))
	m.Source = hub.FromHTTP
	return m
}

// newMember returns a member that has not joined.
func newMember(s *scope, address netip.Prefix, settings *hub.Settings) *member {
	m := &member{scope: s}
	m.client.Init(tested.process, m, "", address, settings)
	return m
}

// joinHub joins a member without a connection to the named hub of the scope.
func joinHub(t *testing.T, s *scope, name string, address netip.Prefix, settings *hub.Settings, limits limits) *member {
	t.Helper()
	m := newMember(s, address, settings)
	if err := tested.join(t.Context(), m, name, limits); err != nil {
		t.Fatalf("joining %s: %v", name, err)
	}
	return m
}

// connect returns a member of the hub named after the test, on an in-memory connection without buffers, and its peer. In a
// bubble its time is the bubble's, and its goroutines must end there.
func connect(t *testing.T, settings *hub.Settings) (*member, *peer) {
	t.Helper()
	l := leaseOf(t, t.Name(), processSettings{})
	t.Cleanup(func() {
		synctest.Wait() // connections that the test has closed are gone first
		tested.release(l)
	})
	m := newMember(l.scope, netip.Prefix{}, settings)
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for _, line := range strings.Split(strings.TrimSpace(handshakeRequest("example.com", "/", "")), "\r\n")[1:] {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Set(name, value)
	}
	if _, err := (&Handler{settings: settings}).shake(&m.client, httptest.NewRecorder(), r); err != nil {
		t.Fatal(err)
	}
	if err := tested.join(t.Context(), m, t.Name(), limits{}); err != nil {
		t.Fatal(err)
	}
	local, remote := net.Pipe()
	m.client.Attach(conn.Wrap(local, nil))
	m.client.Start()
	t.Cleanup(func() { remote.Close() })
	return m, &peer{t: t, conn: remote, r: bufio.NewReader(remote)}
}

// inRegistry runs f with the lock of the registry.
func inRegistry[T any](f func() T) T {
	tested.mu.Lock()
	defer tested.mu.Unlock()
	return f()
}

func TestRegistry_ExitFlushesAndSaysGoodbyeToAll(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, a := connect(t, defaults())
		_, b := connect(t, defaults())
		go func() {
			for i := range 5 {
				b.text(fmt.Sprint(i))
			}
		}()
		go func() {
			for range 5 {
				b.next()
			}
			b.wantClose(websocket.CloseGoingAway, "shutting_down")
			b.send(websocket.CloseMessage, "")
		}()
		synctest.Wait()
		began := time.Now()
		exited := make(chan struct{})
		go func() {
			tested.beginExit()
			tested.awaitExit()
			close(exited)
		}()
		for i := range 5 {
			a.wantText(fmt.Sprint(i))
		}
		if got, want := a.next(), (frame{websocket.CloseMessage, string(websocket.FormatCloseMessage(1001, "shutting_down"))}); got != want {
			t.Errorf("got %v, want %v", got, want)
		}
		a.send(websocket.CloseMessage, "")
		<-exited
		if took := time.Since(began); took > 0 {
			t.Errorf("waited %v for clients that answer at once", took)
		}
	})
}

func TestRegistry_ExitWaitsForStuckClientsNoLongerThanDrain(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		tested.beginExit()
		for range 2 { // as many as there are leases: for the second the time is up
			tested.beginExit()
			tested.awaitExit()
			if got, want := time.Since(began), time.Duration(defaultDrain); got != want {
				t.Errorf("waited %v, want %v", got, want)
			}
		}
		if inRegistry(func() int { return tested.live }) != 0 {
			t.Error("the stuck client is not finished, and not logged")
		}
		stuck.conn.Close()
	})
}

func TestRegistry_LongestDrainOfOneValueCounts(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		long := tested.lease(t.Name(), zaptest.NewLogger(t), emitter{}, processSettings{}, 4*time.Second)
		short := tested.lease(t.Name(), zaptest.NewLogger(t), emitter{}, processSettings{}, time.Second)
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		tested.beginExit()
		tested.awaitExit()
		if got := time.Since(began); got != 4*time.Second {
			t.Errorf("waited %v, want 4s", got)
		}
		tested.release(long)
		tested.release(short)
		stuck.conn.Close()
	})
}

// TestRegistry_PublishesInTheHubThatIsThere closes a hub between finding it and publishing in it, and opens another one of that
// name.
func TestRegistry_PublishesInTheHubThatIsThere(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		gone, p := connect(t, defaults())
		p.conn.Close()
		synctest.Wait()
		_, other := connect(t, defaults())
		synctest.Wait()
		if _, published := publishIn(gone.client.Hub(), textOf("lost")); published {
			t.Error("published in a hub without clients")
		}
		go func() { _, _, _ = tested.publish(t.Context(), gone.hub.name, textOf("hello")) }() // ends with the read
		other.wantText("hello")
		other.conn.Close()
		synctest.Wait()
	})
}

func TestRegistry_LongestDrainCounts(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		_, stuck := connect(t, defaults())
		l := tested.lease("another", zaptest.NewLogger(t), emitter{}, processSettings{}, time.Minute)
		stuck.text("never read back")
		synctest.Wait()
		began := time.Now()
		tested.beginExit()
		tested.awaitExit()
		// It ends before that by the patience with a closing client: once for the frames, once for the answer.
		if got := time.Since(began); got <= time.Duration(defaultDrain) || got > 2*closeTimeout {
			t.Errorf("waited %v, want longer than %v", got, time.Duration(defaultDrain))
		}
		tested.release(l)
		stuck.conn.Close()
	})
}

func TestRegistry_RemovedClientsAreClosedSpreadOut(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		const clients = 200
		var all []*member
		for range clients {
			m, p := connect(t, defaults())
			all = append(all, m)
			go p.drain()
		}
		scope := all[0].scope
		setLeases := func(l []*lease) (before []*lease) {
			tested.mu.Lock()
			defer tested.mu.Unlock()
			before, scope.leases = scope.leases, l
			return before
		}
		leases := setLeases(nil)
		go tested.closeUnleased(scope, scope.removals)
		closed := func() (n int) {
			synctest.Wait()
			for _, m := range all {
				if m.client.Cause() == hub.CloseHubRemoved {
					n++
				}
			}
			return n
		}
		time.Sleep(removalSpread/2 - removalStep/2)
		if got := closed(); got < clients/3 || got > clients*2/3 {
			t.Errorf("at half time: got %d of %d closed", got, clients)
		}
		time.Sleep(removalSpread / 2)
		if got := closed(); got != clients {
			t.Errorf("at the end: got %d of %d closed", got, clients)
		}
		time.Sleep(removalStep)
		setLeases(leases) // for connect to release
	})
}

func TestRegistry_LastReleaseOfSeveralKeepsTheSpread(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		var all []*member
		for range 100 {
			m, p := connect(t, defaults())
			all = append(all, m)
			go p.drain()
		}
		scope := all[0].scope
		leases := scope.leases
		scope.leases = nil
		for range 20 { // a value that comes and goes
			leaseOf(t, scope.key, processSettings{})
			tested.mu.Lock()
			scope.leases = nil
			scope.removals++
			removal := scope.removals
			tested.mu.Unlock()
			go tested.closeUnleased(scope, removal)
		}
		time.Sleep(removalSpread / 4)
		synctest.Wait()
		tested.mu.Lock()
		if got := scope.present; got < 60 {
			t.Errorf("got %d of %d clients left after a quarter of the time", got, len(all))
		}
		scope.leases = leases // for connect to release
		tested.mu.Unlock()
		time.Sleep(removalStep)
	})
}

func TestRegistry_LeaseIsReleasedOnce(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		a, b := leaseOf(t, "hub", processSettings{}), leaseOf(t, "hub", processSettings{})
		tested.release(a)
		tested.release(a)
		if got := len(b.scope.leases); got != 1 {
			t.Errorf("got %d leases, want the other one", got)
		}
		tested.release(b)
		if got := len(tested.scopes); got != 0 {
			t.Errorf("got %d scopes, want none", got)
		}
	})
}

// TestRegistry_JoinThroughAReplacedConfiguration joins with the scope that a request holds which began before a reload.
func TestRegistry_JoinThroughAReplacedConfiguration(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		old := leaseOf(t, "hub", processSettings{})
		stale := func() *member { return newMember(old.scope, netip.Prefix{}, defaults()) }
		tested.release(old)
		if err := tested.join(t.Context(), stale(), "name", limits{}); !errors.Is(err, errHubRemoved) {
			t.Errorf("value gone: got %v, want %v", err, errHubRemoved)
		}
		if err := tested.checkJoin(t.Context(), "hub", "name", netip.Prefix{}, limits{}); !errors.Is(err, errHubRemoved) {
			t.Errorf("checked, value gone: got %v, want %v", err, errHubRemoved)
		}
		current := leaseOf(t, "hub", processSettings{})
		m := stale()
		if err := tested.join(t.Context(), m, "name", limits{maxClients: 1}); err != nil {
			t.Fatalf("value back: got %v", err)
		}
		if m.scope != current.scope {
			t.Error("the client is not in the current scope")
		}
		m.abandon()
		if got := len(current.scope.members) + len(current.scope.perHub) + len(current.scope.perIP) + len(tested.named); got != 0 {
			t.Errorf("got %d things left behind", got)
		}
		tested.release(current)
	})
}

// TestRegistry_FinishedBeforeLeft has a client finish before the registry learns that it has left the hub. This happens if
// the goroutine that closes the client is held up between the two steps.
func TestRegistry_FinishedBeforeLeft(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		m := joinHub(t, s, "hub", testPrefix(1), defaults(), limits{})
		other := joinHub(t, s, "hub", testPrefix(1), defaults(), limits{})
		m.Finished()
		m.Left()
		tested.mu.Lock()
		if s.present != 1 || len(s.members) != 1 || tested.live != 1 {
			t.Errorf("got %d members, %d clients, %d live, want the other one", s.present, len(s.members), tested.live)
		}
		tested.mu.Unlock()
		m.client.Hub().Close() // nobody else knows that it has not left
		other.abandon()
	})
}

func TestRegistry_AddressOpensAsManyHubsAsAreLeft(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		eight := limits{maxHubs: 8}
		var members []*member
		join := func(name string, address int) {
			t.Helper()
			members = append(members, joinHub(t, s, name, testPrefix(address), historyOfTen(), eight))
		}
		for i := range 4 {
			join(fmt.Sprint("1 ", i), 1)
		}
		next := newMember(s, testPrefix(1), defaults())
		if err := tested.join(t.Context(), next, "over", eight); !errors.Is(err, errMaxHubsPerIP) {
			t.Errorf("the fifth hub: got %v, want %v", err, errMaxHubsPerIP)
		}
		// It may join hubs that others have opened, and others still open some: 2, 1 and 1.
		join("2 0", 2)
		join("2 0", 1)
		join("2 1", 2)
		join("3 0", 3)
		join("4 0", 4)
		if err := tested.join(t.Context(), next, "full", eight); !errors.Is(err, errMaxHubs) {
			t.Errorf("when all are open: got %v, want %v", err, errMaxHubs)
		}
		for _, m := range members {
			m.abandon()
		}
		if len(s.opened) != 0 || len(s.perHub) != 0 {
			t.Errorf("got %d addresses and %d hubs counted when all have left", len(s.opened), len(s.perHub))
		}
	})
}

func TestRegistry_AddressEvictsItsOwnKeptHubs(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		ten := limits{maxHubs: 10}
		for i := range 3 {
			joinHub(t, s, fmt.Sprint("honest ", i), testPrefix(i), historyOfTen(), ten).abandon()
			time.Sleep(time.Millisecond)
		}
		for i := range 50 {
			joinHub(t, s, fmt.Sprint("flood ", i), testPrefix(9), historyOfTen(), ten).abandon()
		}
		for i := range 3 {
			if tested.hub(fmt.Sprint("honest ", i)) == nil {
				t.Errorf("honest hub %d is gone", i)
			}
		}
		if got := len(tested.named); got != 10 {
			t.Errorf("got %d hubs, want 10", got)
		}
		if tested.hub("flood 49") == nil || tested.hub("flood 42") != nil {
			t.Error("want the newest of the flood kept and the oldest gone")
		}
	})
}

// leave makes a member leave its hub and stay unfinished, as a client does that does not close its connection.
func (m *member) leave() { m.client.Close(hub.CloseKicked) }

// TestRegistry_JoinCostsTheSameBesideThousandsThatLeave has a scope whose hubs are all taken by clients that have left and do
// not close their connections.
func TestRegistry_JoinCostsTheSameBesideThousandsThatLeave(t *testing.T) {
	tested = newRegistry()
	l := leaseOf(t, "value", processSettings{})
	const leaving, joins = 3000, 1000
	var members []*member
	for i := range leaving {
		m := joinHub(t, l.scope, strconv.Itoa(i), netip.Prefix{}, historyOfTen(), limits{})
		m.leave()
		members = append(members, m)
	}
	next := newMember(l.scope, testPrefix(1), defaults())
	began := time.Now()
	for range joins {
		if err := tested.join(t.Context(), next, "another", limits{maxHubs: leaving}); !errors.Is(err, errMaxHubs) {
			t.Fatalf("got %v, want %v", err, errMaxHubs)
		}
	}
	// It took more than a millisecond each, under the lock of all tested.
	if took, most := time.Since(began), joins*200*time.Microsecond; took > most {
		t.Errorf("%d joins took %v, want at most %v", joins, took, most)
	}
	for _, m := range members {
		m.abandon()
	}
	tested.release(l)
}

// TestRegistry_HubIsChargedToARemainingAddress has an address join the hubs that others open and leave.
func TestRegistry_HubIsChargedToARemainingAddress(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		eight := limits{maxHubs: 8}
		var members []*member
		for i := range 3 {
			name := fmt.Sprint("hub ", i)
			opener := joinHub(t, s, name, testPrefix(i+1), historyOfTen(), eight)
			members = append(members, joinHub(t, s, name, testPrefix(9), historyOfTen(), eight))
			opener.abandon()
		}
		if got := s.opened[testPrefix(9)]; got != 3 || len(s.opened) != 1 {
			t.Errorf("got %d hubs charged to the address that is left, and %d addresses, want 3 and 1", got, len(s.opened))
		}
		for _, m := range members {
			m.abandon()
		}
		if len(s.opened) != 0 {
			t.Errorf("got %v charged when all have left", s.opened)
		}
	})
}

func TestRegistry_KeptHubsMakeRoomUnderMaxHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, processSettings{}, limits{maxHubs: 3})
		for i := range 5 {
			if got, want := tested.hub(strconv.Itoa(i)) != nil, i >= 2; got != want {
				t.Errorf("hub %d: got it kept: %v, want %v", i, got, want)
			}
		}
	})
}

func TestRegistry_KeptHubOutlivesItsLastMessageByItsAge(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 1, processSettings{}, limits{})
		time.Sleep(59 * time.Second)
		if _, found, err := tested.publish(t.Context(), "0", textOf("late")); !found || err != nil {
			t.Fatalf("the hub is gone before its time: %v", err)
		}
		time.Sleep(59 * time.Second)
		if tested.hub("0") == nil {
			t.Error("the hub is gone, and with it a message that is not old")
		}
		time.Sleep(2 * time.Second)
		if tested.hub("0") != nil {
			t.Error("the hub is there, with a message that is too old")
		}
	})
}

func TestRegistry_KeptHubsCloseAfterTheirAge(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, processSettings{}, limits{})
		time.Sleep(time.Minute)
		synctest.Wait()
		if n, used := len(tested.allHubs()), tested.process.Memory.Histories.Used(); n != 0 || used != 0 {
			t.Errorf("got %d hubs and %d bytes left, want none", n, used)
		}
	})
}

// TestRegistry_LeavingClientsHubIsNotEvictable has a client that has left its hub, and whose connection is not closed yet.
func TestRegistry_LeavingClientsHubIsNotEvictable(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		one := limits{maxHubs: 1}
		leaving := joinHub(t, s, "a", netip.Prefix{}, historyOfTen(), one)
		leaving.leave()
		next := newMember(s, netip.Prefix{}, historyOfTen())
		if err := tested.join(t.Context(), next, "b", one); !errors.Is(err, errMaxHubs) {
			t.Errorf("got %v, want %v", err, errMaxHubs)
		}
		if tested.hub("a") == nil {
			t.Error("the history of the other hub is gone, for nothing")
		}
		leaving.abandon()
		if err := tested.join(t.Context(), next, "b", one); err != nil {
			t.Errorf("got %v when it has left", err)
		}
		next.abandon()
	})
}

// TestRegistry_LeavingClientsHubCountsOnce has room for one more hub than the one that is kept while its last client's
// connection is being closed, and then for none.
func TestRegistry_LeavingClientsHubCountsOnce(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		addresses := 0
		join := func(name string) *member {
			t.Helper()
			addresses++
			return joinHub(t, s, name, testPrefix(addresses), historyOfTen(), limits{maxHubs: 2})
		}
		leaving := join("leaving")
		leaving.leave()
		join("kept").abandon()
		if tested.hub("leaving") == nil || tested.hub("kept") == nil {
			t.Error("got a hub evicted without need")
		}
		other := join("other")
		if tested.hub("leaving") == nil || tested.hub("kept") != nil {
			t.Error("want the kept hub evicted, and the leaving client's hub not")
		}
		other.abandon()
		leaving.abandon()
	})
}

func TestRegistry_LowerMaxHubsHoldsForKeptHubs(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		keptHubs(t, 5, processSettings{}, limits{})
		m := joinHub(t, tested.scopes["value"], "another", netip.Prefix{}, defaults(), limits{maxHubs: 2})
		if got := len(tested.allHubs()); got != 2 {
			t.Errorf("got %d hubs, want 2", got)
		}
		m.abandon()
	})
}

// TestRegistry_HubIsKeptByTheDirectiveWithHistory has the last client come through another directive, with the same hub.
func TestRegistry_HubIsKeptByTheDirectiveWithHistory(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		with, without := leaseOf(t, "with", processSettings{}), leaseOf(t, "without", processSettings{})
		first := joinHub(t, with.scope, "hub", netip.Prefix{}, historyOfTen(), limits{})
		last := joinHub(t, without.scope, "hub", netip.Prefix{}, defaults(), limits{})
		first.abandon()
		last.abandon()
		tested.release(without)
		if tested.hub("hub") == nil {
			t.Error("the hub is gone with the other directive")
		}
		tested.release(with)
		if tested.hub("hub") != nil {
			t.Error("the hub outlives its directives")
		}
	})
}

func TestRegistry_HubIsNotKeptWithoutADirective(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := leaseOf(t, "value", processSettings{})
		m := joinHub(t, l.scope, "hub", netip.Prefix{}, historyOfTen(), limits{})
		tested.release(l)
		m.abandon()
		if n := len(tested.allHubs()) + len(tested.scopes); n != 0 {
			t.Errorf("got %d hubs and scopes left", n)
		}
		time.Sleep(removalSpread) // the goroutine that closes the value's clients looks once more
	})
}

// TestRegistry_TapSeesOneHubAfterTheOther follows a name whose hub opens, closes and opens again.
func TestRegistry_TapSeesOneHubAfterTheOther(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		tap, remove := tested.tap("hub")
		for i := range 2 {
			m := joinHub(t, s, "hub", testPrefix(1), defaults(), limits{})
			if _, found, err := tested.publish(t.Context(), "hub", textOf(fmt.Sprint(i))); !found || err != nil {
				t.Errorf("got found %v, %v", found, err)
			}
			if got, missed := tap.Take(); len(got) != 1 || missed != 0 || string(got[0].Payload) != fmt.Sprint(i) {
				t.Errorf("got %+v and %d missed, want message %d", got, missed, i)
			}
			m.abandon()
		}
		remove()
		if tested.taps["hub"] != nil {
			t.Errorf("got %d taps that are left", len(tested.taps["hub"]))
		}
		m := joinHub(t, s, "hub", testPrefix(1), defaults(), limits{})
		publishIn(m.client.Hub(), textOf("unseen"))
		if got, _ := tap.Take(); len(got) > 0 {
			t.Errorf("got %+v through a tap that is removed", got)
		}
		m.abandon()
	})
}
