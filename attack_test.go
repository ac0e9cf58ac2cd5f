package chatbroadcast

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// attackTime is how long attacks last, at least.
var attackTime = flag.Duration("attack", 2*time.Second, "how long each attack of the tests TestAttack lasts")

// The addresses of clients that attack, of those whose latency is measured, and of those that come meanwhile.
const (
	attackerAddr = "127.0.0.66"
	honestAddr   = "127.0.0.2"
	newcomerAddr = "127.0.0.3"
)

// startPlainProcess is startProcess without the race detector, which multiplies memory and processor time.
func startPlainProcess(t testing.TB, options, sites string) *process {
	t.Helper()
	skipShort(t) // before Caddy is built
	binary := filepath.Join(storage, "caddy-without-race-detector")
	if _, err := os.Stat(binary); err != nil { // the first test builds it for all
		if out, err := exec.Command("go", "build", "-o", binary, "./cmd/caddy").CombinedOutput(); err != nil {
			t.Fatalf("building Caddy: %v: %s", err, out)
		}
	}
	cmd := exec.Command(binary, "run")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	return startProcessOf(t, cmd, options, sites)
}

// memory returns a field of /proc/PID/status in bytes: VmRSS, or VmHWM, which is the largest that VmRSS has been.
func (p *process) memory(field string) int64 {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, value, _ := strings.Cut(string(status), "\n"+field+":")
	kilobytes, _, _ := strings.Cut(value, " kB")
	n, err := strconv.ParseInt(strings.TrimSpace(kilobytes), 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return n << 10
}

// observers are honest clients whose latency is measured: some talk in one hub, and newcomers open hubs of their own.
type observers struct {
	*conversation
	server, room string
	pace         time.Duration // between messages, where the server has a rate
	newcomers    int
	joins        []time.Duration
}

// newObservers joins a number of clients, three where the server has no rate.
func newObservers(t testing.TB, server, room string, clients int, pace time.Duration) *observers {
	t.Helper()
	o := &observers{conversation: &conversation{t: t}, server: server, room: room, pace: pace}
	for range clients {
		o.peers = append(o.peers, joinFrom(t, honestAddr, server, room))
	}
	o.during(200 * time.Millisecond) // warm up
	return o
}

// say has one client say something, and the others hear it next. Unlike exchange it answers pings.
func (o *observers) say() {
	o.t.Helper()
	want := fmt.Sprintf("%d honest", o.turn)
	began := time.Now()
	o.peers[o.turn%len(o.peers)].text(want)
	for _, p := range o.peers {
		got := p.next()
		for ; got.opcode == websocket.PingMessage; got = p.next() {
			p.send(websocket.PongMessage, got.payload)
		}
		if got != (frame{websocket.TextMessage, want}) {
			o.t.Fatalf("an honest client: got frame %.80v, want %q", got, want)
		}
	}
	o.latency = append(o.latency, time.Since(began))
	o.turn++
}

// newcomer opens a hub, sends something there and leaves.
func (o *observers) newcomer() {
	o.t.Helper()
	o.newcomers++
	began := time.Now()
	p := joinFrom(o.t, newcomerAddr, o.server, fmt.Sprintf("%s-%d", o.room, o.newcomers))
	p.text("hello")
	p.wantText("hello")
	o.joins = append(o.joins, time.Since(began))
	p.conn.Close()
}

// A latency is how long honest clients waited.
type latency struct {
	exchange time.Duration // p99 of a message to all clients of the hub
	join     time.Duration // p90 of opening a hub and sending something there
}

func (l latency) String() string {
	return fmt.Sprintf("p99 of an exchange %v, p90 of a join %v", l.exchange, l.join)
}

// during measures for at least the given time and at least 100 exchanges, but not for much longer.
func (o *observers) during(d time.Duration) latency {
	o.t.Helper()
	o.joins, o.latency = nil, nil
	began := time.Now()
	for took := time.Duration(0); took < d || len(o.latency) < 100 && took < 5*time.Second; took = time.Since(began) {
		for range 5 {
			o.say()
			time.Sleep(o.pace) // the pace of a conversation
		}
		o.newcomer()
	}
	slices.Sort(o.joins)
	return latency{o.percentile(0.99), o.joins[len(o.joins)*9/10]}
}

// besideAttack measures alone and beside an attack, and again up to five times until the latter is within what allowed
// returns for the former: other programs use the machine, too. It does not try again where exchanges take seconds.
func (o *observers) besideAttack(a attack, d time.Duration, allowed func(alone latency) latency) map[string]outcome {
	o.t.Helper()
	for try := 1; ; try++ {
		alone := o.during(d / 4)
		attackers := a.start(o.t)
		beside := o.during(d)
		outcomes := attackers.stop()
		for _, kind := range slices.Sorted(maps.Keys(outcomes)) {
			o.t.Logf("%d connections, %s: %+v", a.Kinds[kind], kind, outcomes[kind])
		}
		o.t.Logf("alone: %v", alone)
		o.t.Logf("beside the attack: %v", beside)
		most := allowed(alone)
		if beside.exchange <= most.exchange && beside.join <= most.join {
			return outcomes
		}
		if try == 5 || beside.exchange > time.Second {
			o.t.Errorf("beside the attack: got %v, want at most %v", beside, most)
			return outcomes
		}
	}
}

// noticesLittle is the promise to honest clients: at most twice what it was, and two milliseconds for noise.
func noticesLittle(alone latency) latency {
	const noise = 2 * time.Millisecond
	return latency{2*alone.exchange + noise, 2*alone.join + noise}
}

// allAtOnce is 2,000 connections that do everything a client can do at a server's expense.
func allAtOnce() map[string]int {
	return map[string]int{
		"rooms": 500, "stuck": 450, "stuck events": 50, "slow half": 300, "half": 100, "leave": 300, "come and go": 50,
		"pings": 50, "pongs": 50, "fragments": 50, "flood": 30, "large flood": 10,
		"fields": 15, "nesting": 15, "malformed": 15, "padding": 15,
	}
}

// TestAttack_BareDirective has one address do its worst to a server with default limits. Run it with -attack 60s after
// changes to what bounds memory or processor time.
func TestAttack_BareDirective(t *testing.T) {
	const mostMemory = 400 << 20
	p := startPlainProcess(t, "", "http://localhost {\nchat_broadcast /chat/*\n}")
	o := newObservers(t, p.http, "/chat/honest", 3, 0)
	a := attack{Server: p.http, From: attackerAddr, Room: "/chat/", Kinds: allAtOnce(), Pause: time.Second}
	for kind, got := range o.besideAttack(a, *attackTime, noticesLittle) {
		if got.Joined == 0 {
			t.Errorf("%s: no attacker got in", kind)
		}
	}
	if got := p.memory("VmHWM"); got > mostMemory {
		t.Errorf("the server took up to %d MB, want at most %d", got>>20, mostMemory>>20)
	}
}

// TestAttack_HistoriesOfOthersStay has one address open more hubs than max_hubs and publish more than all histories
// together may take.
func TestAttack_HistoriesOfOthersStay(t *testing.T) {
	const rooms, bytes = 350, 100 << 20
	p := startPlainProcess(t, "", `http://localhost {
	chat_broadcast /chat/* {
		history 100
		presence join_leave
		http_publish
		max_hubs 300
	}
}`)
	talked := joinFrom(t, honestAddr, p.http, "/chat/talked")
	talked.text("said")
	talked.wantText("said")
	talked.conn.Close()
	request(t, "POST", "http://"+p.http+"/chat/posted", strings.NewReader("posted"))
	live := joinFrom(t, honestAddr, p.http, "/chat/live")
	live.text("said and stayed")
	live.wantText("said and stayed")

	attackers := attack{
		Server: p.http, From: attackerAddr, Room: "/chat/", Kinds: map[string]int{"come and go": 16, "publish": 16}, Equal: true,
	}.start(t)
	eventually(t, "the attackers to have opened enough rooms and published enough", func() bool {
		now := scrapeAt(t, p.admin)
		return value(now["joins_total"]) >= rooms && value(now["bytes_received_total"]) >= bytes
	})
	attackers.stop()
	for path, want := range map[string]string{"/chat/talked": "said", "/chat/posted": "posted", "/chat/live": "said and stayed"} {
		q := joinFrom(t, newcomerAddr, p.http, path)
		q.text("marker")
		if got := q.next().payload; got != want {
			t.Errorf("%s: got %q first, want its history, %q", path, got, want)
		}
	}
	t.Logf("the server took up to %d MB", p.memory("VmHWM")>>20)
}

// expensiveRequests are the kinds of attack that cost the server the most processor time for each byte.
func expensiveRequests() []string {
	return []string{
		"fields", "nesting", "who", "malformed", "no object", "padding", "escapes", "sends", "flood", "large flood",
		"pings", "pongs", "fragments", "pings of events", "come and go", "refused handshakes", "refused posts", "checks", "refused checks",
	}
}

// startForExpensiveRequests starts a server with presence and http_publish, and 2,000 users in the hub for "who".
func startForExpensiveRequests(t testing.TB) *process {
	p := startPlainProcess(t, "", `http://localhost {
	chat_broadcast /chat/* {
		user {header.X-User}
		presence
		http_publish
	}
}`)
	attack{Server: p.http, From: newcomerAddr, Room: "/chat/", Kinds: map[string]int{"crowd": 2000}}.start(t)
	return p
}

// TestAttack_ExpensiveRequestsCostOthersNothing has 20 clients flood a hub with the most expensive request of each
// kind, while others talk in another hub.
func TestAttack_ExpensiveRequestsCostOthersNothing(t *testing.T) {
	const clients = 20
	p := startForExpensiveRequests(t)
	o := newObservers(t, p.http, "/chat/honest", 3, 0)
	for _, kind := range expensiveRequests() {
		t.Run(kind, func(t *testing.T) {
			o.t = t
			for _, p := range o.peers {
				p.t = t
			}
			a := attack{Server: p.http, From: attackerAddr, Room: "/chat/", Kinds: map[string]int{kind: clients}}
			o.besideAttack(a, *attackTime/8, func(alone latency) latency {
				most := max(20*time.Millisecond, 2*alone.exchange) // on a machine that does other things
				return latency{most, max(3*most, 2*alone.join)}    // a join takes three round trips
			})
		})
	}
}

// BenchmarkAttack_CostPerByte measures how much one client of each kind costs the server: CPU time for a byte that it
// sends, and how much of a core it keeps busy. An iteration lasts a second.
func BenchmarkAttack_CostPerByte(b *testing.B) {
	p := startForExpensiveRequests(b)
	for _, kind := range expensiveRequests() {
		b.Run(kind, func(b *testing.B) {
			received := func() float64 { return value(scrapeAt(b, p.admin)["bytes_received_total"]) }
			attackers := attack{Server: p.http, From: attackerAddr, Room: "/chat/", Kinds: map[string]int{kind: 1}}.start(b)
			began, cpu, bytes := time.Now(), p.cpu(), received()
			for b.Loop() {
				time.Sleep(time.Second) // what is measured
			}
			took, cpu := time.Since(began), p.cpu()-cpu
			bytes = received() - bytes
			if sent := attackers.stop()[kind].Sent; strings.HasPrefix(kind, "refused") || kind == "checks" {
				bytes = float64(sent) // what no client has sent is not counted
			}
			b.ReportMetric(float64(cpu)/bytes, "ns/byte")
			b.ReportMetric(100*cpu.Seconds()/took.Seconds(), "%core")
			b.ReportMetric(bytes/took.Seconds(), "bytes/s")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// TestDocs_World attacks the recipe for a server that is open to the world with everything at once. Its honest clients
// keep to the recipe's limits.
func TestDocs_World(t *testing.T) {
	const perIP, mostMemory = 20, 170 << 20 // Caddy alone takes 60 MB
	recipe := docBlock(t, "recipe: world")
	p := startPlainProcess(t, "", strings.Replace(recipe, "example.com", "http://localhost", 1))
	o := newObservers(t, p.http, "/chat/honest", perIP-2, 30*time.Millisecond)
	connections := allAtOnce()
	for _, kind := range expensiveRequests() {
		connections[kind] = max(connections[kind], 15)
	}
	delete(connections, "refused posts") // without http_publish a POST does not reach the directive
	a := attack{Server: p.http, From: attackerAddr, Room: "/chat/", Kinds: connections, Pause: 2 * time.Second, Rush: true}
	o.besideAttack(a, *attackTime, noticesLittle)
	if got := p.memory("VmHWM"); got > mostMemory {
		t.Errorf("the server took up to %d MB, want at most %d", got>>20, mostMemory>>20)
	}
}
