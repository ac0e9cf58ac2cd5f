package chatbroadcast

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/gorilla/websocket"
)

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

// keptHubs has the given number of hubs, named by number, opened and kept for a message of 1500 bytes each, one after the
// other, through one hub value.
func keptHubs(t *testing.T, n int, process processSettings, limits limits) {
	t.Helper()
	const value = "value"
	l := leaseOf(t, value, process)
	t.Cleanup(func() { tested.release(l) })
	settings := historyOfTen()
	settings.BufferBytes = 4 << 10
	for i := range n {
		time.Sleep(time.Millisecond) // of the bubble's time: each is younger than the one before
		m := textOf(strings.Repeat("x", 1500))
		m.Address = testPrefix(1)
		r, found, err := tested.publishOpening(t.Context(), strconv.Itoa(i), m, value, settings, limits)
		if err != nil || !found || r.Seq != 1 {
			t.Fatalf("hub %d: got %+v, %v, %v", i, r, found, err)
		}
	}
}

func TestMemory_HistoriesTogetherAreBounded(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		const n = 50 // with as little memory as the buffers allow: four of them
		keptHubs(t, n, processSettings{history: 1}, limits{})
		if used, most := tested.process.Memory.Histories.Used(), int64(4*4<<10); used > most || used < most/2 {
			t.Errorf("got %d bytes kept, want at most %d, and about that", used, most)
		}
		if tested.hub("0") != nil || tested.hub(strconv.Itoa(n-1)) == nil {
			t.Error("want the oldest forgotten, and not the newest")
		}
	})
}

func TestMemory_HistoriesAreForgottenByAddress(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := leaseOf(t, "value", processSettings{history: 1})
		settings := historyOfTen()
		settings.BufferBytes = 64 << 10 // four of them: 256 KiB for all histories
		post := func(name string, address int) {
			t.Helper()
			m := textOf(string(make([]byte, 15_000)))
			m.Address = testPrefix(address)
			if _, found, err := tested.publishOpening(t.Context(), name, m, "value", settings, limits{}); !found || err != nil {
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
			if tested.hub(fmt.Sprint("honest ", i)) == nil {
				t.Errorf("the history of honest hub %d is gone", i)
			}
		}
		budget := &tested.process.Memory.Histories
		if used, most := budget.Used(), budget.Bound(); used > most || used < most/2 {
			t.Errorf("got %d bytes of histories, want at most %d, and about that", used, most)
		}
		tested.release(l)
	})
}

// TestMemory_StuckClientsDoNotPushOutTheHistoriesOfOthers fills the memory for histories with messages that clients of one
// address have yet to read, and with receipts.
func TestMemory_StuckClientsDoNotPushOutTheHistoriesOfOthers(t *testing.T) {
	withRegistry(t, func(t *testing.T) {
		l := leaseOf(t, "value", processSettings{history: 1, buffers: 1})
		settings := historyOfTen()
		settings.BufferBytes = 64 << 10 // four of them: 256 KiB for all histories
		join := func(name string, address int) *member {
			t.Helper()
			return joinHub(t, l.scope, name, testPrefix(address), settings, limits{}) // it takes nothing
		}
		say := func(m *member, n, size int) {
			for i := range n {
				msg := textOf(string(make([]byte, size)))
				msg.Sender, msg.Joined, msg.Address = m.client.ID(), m.client.Began(), m.client.Address()
				msg.Key = hub.Key{Token: m.client.ID().String(), ID: strconv.Itoa(i)}
				publishIn(m.client.Hub(), msg)
			}
		}
		honest := join("honest", 1)
		say(honest, 5, 100)
		kept := join("kept", 2)
		say(kept, 5, 100)
		kept.abandon()
		var attackers []*member
		for i := range 40 {
			m := join(fmt.Sprint("attack ", i), 9)
			say(m, 10, 6000) // stays in the feed, for the client
			say(m, 100, 0)   // and receipts
			attackers = append(attackers, m)
		}
		b := honest.client.Hub()
		if _, newest := b.Remembered(); newest.IsZero() {
			t.Errorf("the honest hub: got its newest message forgotten")
		}
		if r, _ := publishIn(b, hub.Message{Key: hub.Key{Token: honest.client.ID().String(), ID: "0"}}); !r.Repeated || r.Seq != 1 {
			t.Errorf("the honest hub: got %+v for an id that was sent, want the receipt of message 1", r)
		}
		reader := newMember(l.scope, testPrefix(1), settings)
		reader.client.SpeakEvents(nil)
		if err := tested.join(t.Context(), reader, "honest", limits{}); err != nil {
			t.Fatal(err)
		}
		if lag := b.Lags([]*hub.Client{&reader.client})[0]; lag != 5 {
			t.Errorf("the honest hub: got %d messages left for a client that joins, want 5", lag)
		}
		if tested.hub("kept") == nil {
			t.Error("the kept hub of another address is gone")
		}
		for _, m := range append(attackers, honest, reader) {
			m.abandon()
		}
		tested.release(l)
		time.Sleep(2 * budgetPause) // a search for clients to cut looks once more
	})
}

// freshRegistry gives a test that starts Caddy hubs of its own, whose memory no other test has raised the bounds of.
func freshRegistry(t *testing.T) {
	t.Helper()
	before := hubs
	awaitHandlers(t)
	hubs = newRegistry()
	tested = hubs
	t.Cleanup(func() {
		awaitHandlers(t)
		hubs = before
	})
}

// awaitHandlers waits until no request of an earlier test is in a handler, which might use hubs. It then takes the locks that
// handlers have used last, so that the race detector knows it, too.
func awaitHandlers(t *testing.T) {
	t.Helper()
	stacks := make([]byte, 16<<20)
	eventually(t, "the handlers to have returned", func() bool {
		return !bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("caddy-chat-broadcast.(*Handler).ServeHTTP"))
	})
	allClients()
	hubs.process.Incoming.Used()
	hubs.process.Processors.Enter(netip.Prefix{}).Leave()
}

// stuckSite has a buffer as it is by default.
const stuckSite = "http://localhost:9080 {\n\tchat_broadcast /chat/*\n}"

// TestMemory_ClientsThatHoldBackTheMostAreCutFirst has clients of one address fill the buffers of a hub each and read
// nothing, beside a client of another address that reads nothing for a while, either.
func TestMemory_ClientsThatHoldBackTheMostAreCutFirst(t *testing.T) {
	freshRegistry(t)
	s := startCaddy(t, stuckSite)
	const most = 8 << 20
	s.loadWith(fmt.Sprintf("chat_broadcast {\n\tmax_buffers %d\n}", most), stuckSite)

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
		highest = max(highest, tested.process.Memory.Buffers.Used())
	}
	eventually(t, "memory to be within its bound", func() bool { return tested.process.Memory.Buffers.Used() <= most })
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
	before := hubs.process.Incoming.SetMost(most)
	t.Cleanup(func() { hubs.process.Incoming.SetMost(before) })
}

func usedIncoming() int64 { return hubs.process.Incoming.Used() }

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
	freshRegistry(t)
	s := startCaddy(t, plainChat)
	want := func(history, buffers int64) {
		t.Helper()
		memory := &tested.process.Memory
		if h, b := memory.Histories.Bound(), memory.Buffers.Bound(); h != history || b != buffers {
			t.Errorf("got bounds of %d and %d bytes, want %d and %d", h, b, history, buffers)
		}
	}
	want(hub.DefaultMaxHistory, hub.DefaultMaxBuffers)
	s.loadWith("chat_broadcast {\n\tmax_history 10MiB\n\tmax_buffers 20MiB\n}", plainChat)
	want(10<<20, 20<<20)
	bad := s.caddyfile("chat_broadcast {\n\tmax_history 30MiB\n}", plainChat+"\nhttp://localhost:9080 {\n\tchat_broadcast /x {\n\t\torigins *\n\t}\n\treverse_proxy {\n\t\tto unix//nowhere\n\t\tlb_policy nonsense\n\t}\n}")
	if status, _ := s.post("text/caddyfile", bad); status == http.StatusOK {
		t.Fatal("a bad configuration was loaded")
	}
	want(10<<20, 20<<20)
	s.load(plainChat)
	want(hub.DefaultMaxHistory, hub.DefaultMaxBuffers)
}

// TestMemory_WarnsThatHistoriesAreForgotten also is about the bound through Caddy: of 6 MB, with a buffer of 1 MiB, 4 MiB may stay.
func TestMemory_WarnsThatHistoriesAreForgotten(t *testing.T) {
	freshRegistry(t)
	s := startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nhistory 10\nhttp_publish\n}\n}")
	tested.process.Memory.Histories.SetMost(0) // what is left is four times the largest buffer
	for i := range 100 {
		publish(t, "/chat/"+strconv.Itoa(i), strings.Repeat("x", 60_000))
	}
	if got := joinEvents(t, "/chat/0").hello.Replay; got != 0 {
		t.Errorf("got %d messages of the oldest hub, want them forgotten", got)
	}
	if got := joinEvents(t, "/chat/99").hello.Replay; got != 1 {
		t.Errorf("got %d messages of the newest hub, want 1", got)
	}
	log, err := os.ReadFile(s.logFile)
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Count(log, []byte("histories forgotten")); got != 1 {
		t.Errorf("got %d warnings in the log, want 1 a minute", got)
	}
}

// TestHistory_FramesCountForTheBytes fills half of the buffer with messages that, without their frames, would just fit.
func TestHistory_FramesCountForTheBytes(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast {
		history 100
		http_publish
	}
}`)
	const messages = 8 // of 64 KiB: 512 KiB
	for i := range messages {
		publish(t, "/", strconv.Itoa(i)+strings.Repeat("x", defaultMaxMessageSize-1)).wantPublished(t, 0, i+1)
	}
	p := join(t, "/")
	for i := 1; i < messages; i++ {
		if got := p.next().payload; got[0] != '0'+byte(i) {
			t.Fatalf("got message %c, want %d", got[0], i)
		}
	}
	publish(t, "/", "live").wantPublished(t, 1, messages+1)
	p.wantText("live")
}

func TestPresence_StrangersLongNamesHoldUpNoOthers(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast {
		hub hub
		user {header.X-User}
		presence join_leave
	}
}`)
	ada := joinEvents(t, "/", "X-User: ada\r\n")
	stranger := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for i := range 500 {
		conn, err := stranger.Dial("tcp", "127.0.0.1:9080")
		if err != nil {
			t.Fatal(err)
		}
		joinOn(t, conn, httpAddr, "/", fmt.Sprintf("X-User: %03d%s\r\n", i, strings.Repeat("x", 900)))
	}
	bob := join(t, "/", "X-User: bob\r\n")
	bob.text("here")
	frames := 0 // those after bob joined: one a second
	for came := false; ; {
		e, err := ada.read()
		if err != nil {
			t.Fatal(err)
		}
		came = came || e.Type == "message"
		if e.Type != "presence" {
			continue
		}
		if came {
			frames++
		}
		if slices.Contains(e.Joined, "bob") {
			break
		}
	}
	if frames > 2 {
		t.Errorf("got bob's join in frame %d, want one of the first 2", frames)
	}
}
