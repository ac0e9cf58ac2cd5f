package chatbroadcast

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/gorilla/websocket"
)

func TestPool_AnAddressGetsAsMuchAsIsLeft(t *testing.T) {
	p := pool{most: 1000, taken: map[netip.Prefix]int64{}}
	first, second, third := testPrefix(1), testPrefix(2), testPrefix(3)
	takeAll := func(address netip.Prefix) (n int) {
		for p.take(address, 1) {
			n++
		}
		return n
	}
	if got := takeAll(first); got != 500 {
		t.Errorf("the first address: got %d, want 500", got)
	}
	if got := takeAll(second); got != 250 {
		t.Errorf("the second address: got %d, want 250", got)
	}
	if got := takeAll(third); got != 125 {
		t.Errorf("the third address: got %d, want 125", got)
	}
	p.give(first, 500)
	p.give(second, 250)
	p.give(third, 125)
	if p.used != 0 || len(p.taken) != 0 {
		t.Errorf("got %d used by %d addresses, want everything given back", p.used, len(p.taken))
	}
}

func TestOccasionalWarning_ComesOnceAMinuteWithTheCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w occasionalWarning
		var got []int
		warn := func(n int) { w.warn(n, func(n int) { got = append(got, n) }) }
		warn(0)
		warn(2)
		warn(3)
		warn(4)
		time.Sleep(warningInterval)
		warn(0)
		warn(1)
		if want := []int{2, 7}; !slices.Equal(got, want) {
			t.Errorf("got warnings of %v, want %v", got, want)
		}
	})
}

// joinedClient returns a client that has joined the named hub of the scope, with a history.
func joinedClient(t *testing.T, s *scope, name string, address netip.Prefix, limits limits) *client {
	t.Helper()
	c := &client{settings: historyOfTen(), scope: s, prefix: address}
	if err := hubs.join(c, name, limits); err != nil {
		t.Fatalf("joining %s: %v", name, err)
	}
	return c
}

// withScope runs a test in a bubble, on hubs of its own, with one hub value that is configured.
func withScope(t *testing.T, test func(t *testing.T, s *scope)) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
		test(t, l.scope)
		hubs.release(l)
		synctest.Wait()
	})
}

func TestRegistry_AddressOpensAsManyHubsAsAreLeft(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		eight := limits{maxHubs: 8}
		var clients []*client
		for i := range 4 {
			clients = append(clients, joinedClient(t, s, fmt.Sprint("1 ", i), testPrefix(1), eight))
		}
		next := &client{settings: defaults(), scope: s, prefix: testPrefix(1)}
		if err := hubs.join(next, "over", eight); !errors.Is(err, errMaxHubsPerIP) {
			t.Errorf("the fifth hub: got %v, want %v", err, errMaxHubsPerIP)
		}
		// It may join hubs that others have opened, and others still open some: 2, 1 and 1.
		clients = append(clients, joinedClient(t, s, "2 0", testPrefix(2), eight), joinedClient(t, s, "2 0", testPrefix(1), eight))
		clients = append(clients, joinedClient(t, s, "2 1", testPrefix(2), eight))
		clients = append(clients, joinedClient(t, s, "3 0", testPrefix(3), eight), joinedClient(t, s, "4 0", testPrefix(4), eight))
		if err := hubs.join(next, "full", eight); !errors.Is(err, errMaxHubs) {
			t.Errorf("when all are open: got %v, want %v", err, errMaxHubs)
		}
		for _, c := range clients {
			c.abandon()
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
			joinedClient(t, s, fmt.Sprint("honest ", i), testPrefix(i), ten).abandon()
			time.Sleep(time.Millisecond)
		}
		for i := range 50 {
			joinedClient(t, s, fmt.Sprint("flood ", i), testPrefix(9), ten).abandon()
		}
		for i := range 3 {
			if hubs.hub(fmt.Sprint("honest ", i)) == nil {
				t.Errorf("honest hub %d is gone", i)
			}
		}
		if got := len(hubs.hubs); got != 10 {
			t.Errorf("got %d hubs, want 10", got)
		}
		if hubs.hub("flood 49") == nil || hubs.hub("flood 42") != nil {
			t.Error("want the newest of the flood kept and the oldest gone")
		}
	})
}

// TestRegistry_JoinCostsTheSameBesideThousandsThatLeave has a scope whose hubs are all taken by clients that have left
// and do not close their connections.
func TestRegistry_JoinCostsTheSameBesideThousandsThatLeave(t *testing.T) {
	process := hubs
	defer func() { hubs = process }()
	hubs = newRegistry()
	l := hubs.lease("value", testLogger(t), emitter{}, bounds{}, time.Duration(defaultDrain))
	const leaving, joins = 3000, 1000
	var clients []*client
	for i := range leaving {
		c := joinedClient(t, l.scope, strconv.Itoa(i), netip.Prefix{}, limits{})
		hubs.leave(c)
		clients = append(clients, c)
	}
	next := &client{settings: defaults(), scope: l.scope, prefix: testPrefix(1)}
	began := time.Now()
	for range joins {
		if err := hubs.join(next, "another", limits{maxHubs: leaving}); !errors.Is(err, errMaxHubs) {
			t.Fatalf("got %v, want %v", err, errMaxHubs)
		}
	}
	// It took more than a millisecond each, under the lock of all hubs.
	if took, most := time.Since(began), joins*200*time.Microsecond; took > most {
		t.Errorf("%d joins took %v, want at most %v", joins, took, most)
	}
	for _, c := range clients {
		c.abandon()
	}
	hubs.release(l)
}

func TestRegistry_HistoriesAreForgottenByAddress(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{history: 1}, time.Duration(defaultDrain))
		settings := historyOfTen()
		settings.bufferBytes = 64 << 10 // four of them: 256 KiB for all histories
		post := func(name string, address int) {
			t.Helper()
			m := message{opcode: websocket.TextMessage, payload: make([]byte, 15_000)}
			if _, found, err := hubs.publishOpening(name, m, testPrefix(address), "value", settings, limits{}); !found || err != nil {
				t.Fatalf("publishing in %s: %v, %v", name, found, err)
			}
		}
		for i := range 3 {
			post(fmt.Sprint("honest ", i), i)
			time.Sleep(time.Millisecond)
		}
		for i := range 100 {
			post(fmt.Sprint("flood ", i), 9)
			time.Sleep(time.Millisecond)
		}
		for i := range 3 {
			if hubs.hub(fmt.Sprint("honest ", i)) == nil {
				t.Errorf("the history of honest hub %d is gone", i)
			}
		}
		if used, most := hubs.memory.histories.used.Load(), hubs.memory.histories.bound(); used > most || used < most/2 {
			t.Errorf("got %d bytes of histories, want at most %d, and about that", used, most)
		}
		hubs.release(l)
	})
}

// stuckSite has a buffer as it is by default, and 8 MiB for all.
const stuckSite = "http://localhost:9080 {\n\tchat_broadcast /chat/*\n}"

// TestMemory_ClientsThatHoldBackTheMostAreCutFirst has clients of one address fill the buffers of a hub each and read
// nothing, beside a client of another address that reads nothing for a while, either.
func TestMemory_ClientsThatHoldBackTheMostAreCutFirst(t *testing.T) {
	s := startCaddy(t, stuckSite)
	const most = 8 << 20
	s.loadWith(fmt.Sprintf("chat_broadcast {\n\tmax_buffers %d\n}", most), stuckSite)
	hubs.cutWarning = occasionalWarning{}
	raised := hubs.memory.buffers.raised.Swap(0)
	defer func() { hubs.memory.buffers.raise(int(raised / 4)) }()

	// Two messages a write, or the slow client would not have anything held back for it: its socket takes some.
	slow, sender := joinFrom(t, "127.0.0.1", httpAddr, "/chat/slow"), joinFrom(t, "127.0.0.2", httpAddr, "/chat/slow")
	const sent = 20
	payload := strings.Repeat("s", 50_000)
	for range sent {
		sender.text(payload)
		sender.wantText(payload)
	}
	talk := newConversation(t, "/chat/honest")
	flood := bytes.Repeat(clientFrame(finBit|websocket.BinaryMessage, make([]byte, 65_000)), 26)
	var attackers []*peer
	var highest int64
	for i := range 100 { // 128 KiB each are too much, too
		p := joinFrom(t, "127.0.0.9", httpAddr, "/chat/"+strconv.Itoa(i))
		_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
		_, _ = p.conn.Write(flood) // fails once it is cut
		attackers = append(attackers, p)
		talk.exchange(5, "meanwhile")
		highest = max(highest, hubs.memory.buffers.used.Load())
	}
	eventually(t, "memory to be within its bound", func() bool { return hubs.memory.buffers.used.Load() <= most })
	// What comes in before the writers of clients that were cut have given theirs back: not much.
	if highest > 2*most {
		t.Errorf("got up to %d bytes for clients that are behind, want about %d", highest, most)
	}
	for range sent {
		slow.wantText(payload)
	}
	eventually(t, "attackers to be closed", func() bool {
		closed := 0
		for _, entry := range s.logged(moduleID, 1) {
			if entry["msg"] != "client closed" {
				continue
			}
			if entry["client_ip"] != "127.0.0.9" || entry["code"] != 1013.0 {
				t.Fatalf("closed: %v", entry)
			}
			closed++
		}
		return closed > 0
	})
	if log, _ := os.ReadFile(s.logFile); bytes.Count(log, []byte("clients cut")) > 1 {
		t.Error("got several warnings in the log, want one a minute at most")
	}
	for _, p := range attackers {
		p.conn.Close()
	}
}

// TestMemory_HalfMessagesOfOneAddressLeaveRoomForOthers fills an address's share of the memory for messages that are
// being received.
func TestMemory_HalfMessagesOfOneAddressLeaveRoomForOthers(t *testing.T) {
	startCaddy(t, plainChat)
	lowerIncoming(t, 1<<20)
	frame := clientFrame(finBit|websocket.TextMessage, bytes.Repeat([]byte("x"), 60_000))
	var attackers []*peer
	for range 40 {
		p := joinFrom(t, "127.0.0.9", httpAddr, "/chat/halves")
		p.write(frame[:len(frame)-1])
		attackers = append(attackers, p)
	}
	eventually(t, "the share of the address to be taken", func() bool { return usedIncoming() > 1<<19-1<<16 })
	talk := newConversation(t, "/chat/honest")
	for range 10 {
		talk.exchange(1, strings.Repeat("y", 60_000))
	}
	if got := usedIncoming(); got > 1<<19+1<<16 { // with the last honest message
		t.Errorf("got %d bytes for messages that are being received, want at most half of 1 MiB", got)
	}
	// An attacker that had to wait is read again when others of its address are done.
	for _, p := range attackers[1:] {
		p.conn.Close()
	}
	attackers[0].write(frame[len(frame)-1:])
	attackers[0].wantText(strings.Repeat("x", 60_000))
	attackers[0].conn.Close()
	eventually(t, "all memory to be given back", func() bool { return usedIncoming() == 0 })
}

// TestMemory_UploadsThatWaitForEachOtherEnd has large messages arrive in step, so that each has a part of the memory and none
// gets the rest: some give up, and the memory is there again.
func TestMemory_UploadsThatWaitForEachOtherEnd(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\n\tchat_broadcast /chat/* {\n\t\tmax_message_size 1MiB\n\t}\n}")
	lowerIncoming(t, 1<<20)
	const payload, begun = 500_000, 100_000
	message := clientFrame(finBit|websocket.BinaryMessage, make([]byte, payload))
	var peers []*peer
	for i := range 4 {
		p := joinFrom(t, fmt.Sprintf("127.0.0.%d", 10+i), httpAddr, fmt.Sprintf("/chat/%d", i))
		p.write(message[:begun])
		peers = append(peers, p)
	}
	eventually(t, "all to have begun", func() bool { return usedIncoming() >= 4*begun })
	var senders sync.WaitGroup
	for _, p := range peers {
		senders.Go(func() { _, _ = p.conn.Write(message[begun:]) }) // fails once the client is closed
	}
	closed := 0
	for _, p := range peers {
		switch f := p.next(); {
		case f.opcode == websocket.CloseMessage && f.payload == string(websocket.FormatCloseMessage(1013, "busy")):
			closed++
		case f.opcode != websocket.BinaryMessage || len(f.payload) != payload:
			t.Errorf("got frame %.80v, want the message back, or a close with 1013 busy", f)
		}
		p.conn.Close()
	}
	senders.Wait()
	if closed == 0 {
		t.Error("no client was closed")
	}
	eventually(t, "all memory to be given back", func() bool { return usedIncoming() == 0 })
}

// TestRegistry_HubIsChargedToWhoeverIsLeft has an address join the hubs that others open and leave.
func TestRegistry_HubIsChargedToWhoeverIsLeft(t *testing.T) {
	withScope(t, func(t *testing.T, s *scope) {
		eight := limits{maxHubs: 8}
		var clients []*client
		for i := range 3 {
			name := fmt.Sprint("hub ", i)
			opener := joinedClient(t, s, name, testPrefix(i+1), eight)
			clients = append(clients, joinedClient(t, s, name, testPrefix(9), eight))
			opener.abandon()
		}
		if got := s.opened[testPrefix(9)]; got != 3 || len(s.opened) != 1 {
			t.Errorf("got %d hubs charged to the address that is left, and %d addresses, want 3 and 1", got, len(s.opened))
		}
		for _, c := range clients {
			c.abandon()
		}
		if len(s.opened) != 0 {
			t.Errorf("got %v charged when all have left", s.opened)
		}
	})
}

// TestRegistry_StuckClientsDoNotPushOutTheHistoriesOfOthers fills the memory for histories with messages that clients of one
// address have yet to read, and with receipts.
func TestRegistry_StuckClientsDoNotPushOutTheHistoriesOfOthers(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := hubs.lease("value", testLogger(t), emitter{}, bounds{history: 1, buffers: 1}, time.Duration(defaultDrain))
		settings := historyOfTen()
		settings.bufferBytes = 64 << 10 // four of them: 256 KiB for all histories
		join := func(name string, address int) *client {
			t.Helper()
			c := &client{settings: settings, scope: l.scope, prefix: testPrefix(address), joined: time.Now()}
			c.state.Store(stateWriting) // it takes nothing
			if err := hubs.join(c, name, limits{}); err != nil {
				t.Fatal(err)
			}
			return c
		}
		say := func(c *client, n, size int) {
			for i := range n {
				key := sendKey{user: c.user, token: c.id.String(), id: strconv.Itoa(i)}
				c.hub.publish(message{from: c, sender: c.id, opcode: websocket.TextMessage, payload: make([]byte, size), key: key})
				hubs.shed()
			}
		}
		honest := join("honest", 1)
		say(honest, 5, 100)
		kept := join("kept", 2)
		say(kept, 5, 100)
		kept.abandon()
		var attackers []*client
		for i := range 40 {
			c := join(fmt.Sprint("attack ", i), 9)
			say(c, 10, 6000) // stays in the log, for the client
			say(c, 100, 0)   // and receipts
			attackers = append(attackers, c)
		}
		honest.hub.mu.Lock()
		if n, receipts := len(honest.hub.records), honest.hub.receipts.size(); n != 5 || receipts == 0 {
			t.Errorf("the honest hub: got %d messages and %d bytes of receipts left, want 5 and some", n, receipts)
		}
		honest.hub.mu.Unlock()
		if hubs.hub("kept") == nil {
			t.Error("the kept hub of another address is gone")
		}
		for _, c := range append(attackers, honest) {
			c.abandon()
		}
		hubs.release(l)
	})
}

// TestMemory_HalfBodiesOfOneAddressLeaveRoomForOthers does the same with POSTs.
func TestMemory_HalfBodiesOfOneAddressLeaveRoomForOthers(t *testing.T) {
	startCaddy(t, pushSite)
	lowerIncoming(t, 1<<20)
	body := strings.Repeat("x", 60_000)
	var attackers []net.Conn
	for range 40 {
		conn, err := dialFrom("127.0.0.9", httpAddr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetWriteDeadline(time.Now().Add(patience))
		if _, err := fmt.Fprintf(conn, "POST /feed/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60001\r\n\r\n%s", body); err != nil {
			t.Fatal(err)
		}
		attackers = append(attackers, conn)
	}
	eventually(t, "the share of the address to be taken", func() bool { return usedIncoming() > 1<<19-1<<17 })
	publish(t, "/feed/b", strings.Repeat("y", 64<<10)).wantPublished(t, 0, 0)
	if got := usedIncoming(); got > 1<<19 {
		t.Errorf("got %d bytes for bodies, want at most half of 1 MiB", got)
	}
	for _, conn := range attackers {
		conn.Close()
	}
	eventually(t, "all memory to be given back", func() bool { return usedIncoming() == 0 })
}

// lowerIncoming bounds the memory for messages that are being received, until the test ends.
func lowerIncoming(t *testing.T, most int64) {
	t.Helper()
	set := func(most int64) (before int64) {
		hubs.memory.incoming.mu.Lock()
		defer hubs.memory.incoming.mu.Unlock()
		before, hubs.memory.incoming.most = hubs.memory.incoming.most, most
		return before
	}
	before := set(most)
	t.Cleanup(func() { set(before) })
}

func usedIncoming() int64 {
	hubs.memory.incoming.mu.Lock()
	defer hubs.memory.incoming.mu.Unlock()
	return hubs.memory.incoming.used
}

func TestHandler_AddressCannotTakeAllHubs(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\n\tchat_broadcast /chat/* {\n\t\tmax_hubs 6\n\t}\n}")
	for i := range 3 {
		joinFrom(t, "127.0.0.9", httpAddr, "/chat/"+strconv.Itoa(i))
	}
	conn, err := dialFrom("127.0.0.9", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	_, resp := handshakeOn(t, conn, handshakeRequest(httpAddr, "/chat/more", ""))
	if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" {
		t.Errorf("the fourth hub: got %s with Retry-After %q, want 429 with one", resp.Status, resp.Header.Get("Retry-After"))
	}
	joinFrom(t, "127.0.0.9", httpAddr, "/chat/1") // a hub that it has opened
	joinFrom(t, "127.0.0.2", httpAddr, "/chat/more")
	counted := request(t, http.MethodGet, "http://"+adminAddr+"/metrics", nil).body
	if !strings.Contains(counted, `caddy_chat_broadcast_refusals_total{reason="max_hubs_per_ip"}`) {
		t.Error("the reason is not among those of the metric")
	}
}

func TestGlobalOption_Errors(t *testing.T) {
	for _, tc := range []struct{ name, body, want string }{
		{"unknown", "max_everything 1MiB", `unrecognized subdirective "max_everything"`},
		{"misspelled", "max_buffer 1MiB", `unrecognized subdirective "max_buffer": did you mean max_buffers?`},
		{"no size", "max_history", "max_history: missing <size>"},
		{"no number", "max_buffers lots", `max_buffers: <size> must be a size such as 64KiB, got "lots"`},
		{"zero", "max_buffers 0", "max_buffers: <size>: must be 1 to 1099511627776, got 0"},
		{"too large", "max_history 2TiB", "max_history: <size>: must be 1 to 1099511627776, got 2199023255552"},
		{"twice", "max_history 1MiB\nmax_history 2MiB", "max_history: given more than once"},
		{"two sizes", "max_history 1MiB 2MiB", `max_history: unexpected argument "2MiB"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := caddyfile.NewTestDispenser("chat_broadcast {\n" + tc.body + "\n}")
			_, err := parseGlobalOption(d, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "Testfile:") {
				t.Errorf("got %v, want an error that names the line and has %q", err, tc.want)
			}
		})
	}
	if err := (&App{MaxHistory: -1}).Validate(); err == nil || !strings.Contains(err.Error(), "max_history: must be 1 to") {
		t.Errorf("a negative size in JSON: got %v, want an error", err)
	}
}

// TestGlobalOption_HoldsFromAReloadOn also is about a configuration that fails, which changes nothing.
func TestGlobalOption_HoldsFromAReloadOn(t *testing.T) {
	s := startCaddy(t, plainChat)
	want := func(history, buffers int64) {
		t.Helper()
		if h, b := hubs.memory.histories.most.Load(), hubs.memory.buffers.most.Load(); h != history || b != buffers {
			t.Errorf("got bounds of %d and %d bytes, want %d and %d", h, b, history, buffers)
		}
	}
	want(defaultMaxHistory, defaultMaxBuffers)
	s.loadWith("chat_broadcast {\n\tmax_history 10MiB\n\tmax_buffers 20MiB\n}", plainChat)
	want(10<<20, 20<<20)
	bad := s.caddyfile("chat_broadcast {\n\tmax_history 30MiB\n}", plainChat+"\nhttp://localhost:9080 {\n\tchat_broadcast /x {\n\t\torigins *\n\t}\n\treverse_proxy {\n\t\tto unix//nowhere\n\t\tlb_policy nonsense\n\t}\n}")
	if status, _ := s.post("text/caddyfile", bad); status == http.StatusOK {
		t.Fatal("a bad configuration was loaded")
	}
	want(10<<20, 20<<20)
	s.load(plainChat)
	want(defaultMaxHistory, defaultMaxBuffers)
}
