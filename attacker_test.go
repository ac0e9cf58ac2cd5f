package chatbroadcast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// asAttacker is an environment variable with an attack in JSON. It makes the test binary attack a server until its standard
// input ends. Attackers have a process of their own, so that they do not delay the clients whose latency a test measures.
const asAttacker = "CHAT_BROADCAST_TEST_AS_ATTACKER"

// An attack says how many hostile connections come from one address, and how they behave.
type attack struct {
	Server string         // localhost and a port
	From   string         // the attackers' own address
	Room   string         // how the paths of their hubs begin
	Kinds  map[string]int // connections by kind: see behaviorOf
	Pause  time.Duration  // between two connections of one attacker
	Rush   bool           // start does not wait for the server's answers, which may take long
	Equal  bool           // the attackers get as much processor time as others: the test measures no latency
}

// An outcome counts what the attackers of one kind have achieved.
type outcome struct {
	Joined, Refused, Cut int64
	Sent                 int64 // bytes
}

// A counter is an outcome that many connections add to.
type counter struct{ joined, refused, cut, sent atomic.Int64 }

func (c *counter) outcome() outcome {
	return outcome{c.joined.Load(), c.refused.Load(), c.cut.Load(), c.sent.Load()}
}

// A behavior says how one hostile connection behaves.
type behavior struct {
	header  string        // added to the handshake; %d stands for the connection's number, here and in path
	path    string        // added to the path of the attack
	plain   bool          // there is no handshake: flood is a list of requests
	opening []byte        // sent once
	flood   []byte        // sent again and again
	every   time.Duration // between two floods
	reads   bool          // the connection reads
	hold    time.Duration // how long the connection lasts; 0 until the server ends it
}

// many repeats a frame up to about 16 KiB, so that one system call sends many frames.
func many(frame []byte) []byte { return bytes.Repeat(frame, max(1, 16<<10/len(frame))) }

// manyFields is an event of an unknown type with so many fields that it has the given size.
func manyFields(size int) []byte {
	var b bytes.Buffer
	b.WriteString(`{"type":"x"`)
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, `,"%d":0`, i)
	}
	b.WriteString("}")
	return b.Bytes()
}

// behaviorOf returns the behavior of a kind. host is the server's.
func behaviorOf(kind, host string) (behavior, error) {
	text := func(payload []byte) []byte { return clientFrame(finBit|websocket.TextMessage, payload) }
	event := func(frame []byte) behavior {
		return behavior{header: eventsHeader, path: "one", flood: many(text(frame)), reads: true}
	}
	ping := clientFrame(finBit|websocket.PingMessage, nil)
	goodbye := clientFrame(finBit|websocket.CloseMessage, []byte("\x03\xe8"))
	const size = 60_000 // of large frames: below the default max_message_size
	nested := bytes.Repeat([]byte("["), 9000)
	nested = append(nested, bytes.Repeat([]byte("]"), 9000)...)
	post := func(body, header string) []byte {
		return many(fmt.Appendf(nil, "POST /chat/posts HTTP/1.1\r\nHost: %s\r\n%sContent-Length: %d\r\n\r\n%s", host, header, len(body), body))
	}
	switch kind {
	case "rooms": // keeps a hub with a long name open
		return behavior{path: strings.Repeat("n", 180) + "-%d", flood: ping, every: 5 * time.Second}, nil
	case "stuck": // fills a hub of its own and does not read
		message := clientFrame(finBit|websocket.BinaryMessage, make([]byte, 65_000))
		return behavior{path: "stuck-%d", opening: bytes.Repeat(message, 26), flood: ping, every: time.Second}, nil
	case "stuck events": // the same, with the messages in a second encoding
		message := text(fmt.Appendf(nil, `{"type":"send","data":"%s"}`, strings.Repeat(`\u0001`, 10_000)))
		return behavior{header: eventsHeader, path: "stuck-%d", opening: bytes.Repeat(message, 26), flood: ping, every: time.Second}, nil
	case "half": // a message of 64 KiB but for its last byte
		whole := clientFrame(finBit|websocket.BinaryMessage, make([]byte, 64<<10))
		return behavior{path: "half", opening: whole[:len(whole)-1]}, nil
	case "slow half": // the same, in two pieces, so that it stays
		whole := clientFrame(finBit|websocket.BinaryMessage, make([]byte, 64<<10))
		return behavior{path: "half", opening: whole[:len(whole)-100], flood: []byte{0}, every: 5 * time.Second}, nil
	case "pings":
		return behavior{path: "one", flood: many(ping)}, nil
	case "pongs":
		return behavior{path: "one", flood: many(clientFrame(finBit|websocket.PongMessage, nil))}, nil
	case "fragments":
		return behavior{path: "one", opening: clientFrame(websocket.TextMessage, nil), flood: many(clientFrame(0, nil))}, nil
	case "leave": // says goodbye and keeps the connection
		return behavior{path: "leave-%d", opening: goodbye, hold: 4 * time.Second}, nil
	case "come and go": // opens a hub, sends a little, and leaves
		return behavior{path: "gone-%d", opening: append(text([]byte("x")), goodbye...), hold: time.Nanosecond}, nil
	case "flood": // small messages to itself
		return behavior{path: "flood-%d", flood: many(text([]byte("0123456789abcdef"))), reads: true}, nil
	case "large flood":
		return behavior{path: "flood-%d", flood: text(bytes.Repeat([]byte("x"), size)), reads: true}, nil
	case "publish": // 26 messages of 65 kB in each hub, which reads them, and then another hub
		return behavior{path: "published-%d", opening: bytes.Repeat(text(bytes.Repeat([]byte("x"), 65_000)), 26), reads: true, hold: time.Second}, nil
	case "fields":
		return event(manyFields(size)), nil
	case "nesting":
		return event(fmt.Appendf(nil, `{"type":"x","a":%s}`, nested)), nil
	case "crowd": // a user of its own in the hub for "who"
		return behavior{header: "X-User: " + strings.Repeat("u", 1000) + "%d\r\n", path: "crowd", flood: ping, every: 5 * time.Second}, nil
	case "who":
		who := event([]byte(`{"type":"who","limit":1000}`))
		who.path = "crowd"
		return who, nil
	case "malformed":
		return event([]byte(`{"type":"send","id":"m","data":1}`)), nil
	case "no object":
		return event([]byte(`[`)), nil
	case "padding":
		return event(fmt.Appendf(nil, `{"type":"send","data":"x"%s}`, strings.Repeat(" ", size))), nil
	case "sends":
		return event([]byte(`{"type":"send","id":"m1","data":"x"}`)), nil
	case "escapes":
		return event(fmt.Appendf(nil, `{"type":"send","data":"%s"}`, strings.Repeat(`\u0001`, size/6))), nil
	case "pings of events":
		return event([]byte(`{"type":"ping"}`)), nil
	case "checks", "refused checks":
		origin := ""
		if kind == "refused checks" {
			origin = "Origin: https://elsewhere.example\r\n"
		}
		request := fmt.Sprintf("GET /chat/one?%s HTTP/1.1\r\nHost: %s\r\n%s\r\n", checkParameter, host, origin)
		return behavior{plain: true, flood: many([]byte(request)), reads: true}, nil
	case "refused handshakes":
		request := handshakeRequest(host, "/chat/one", "Origin: https://elsewhere.example\r\n")
		return behavior{plain: true, flood: many([]byte(request)), reads: true}, nil
	case "refused posts":
		return behavior{plain: true, flood: post("\xff", ""), reads: true}, nil
	case "half posts":
		header := fmt.Appendf(nil, "POST /chat/posts HTTP/1.1\r\nHost: %s\r\nContent-Length: 65000\r\n\r\n", host)
		return behavior{plain: true, opening: append(header, make([]byte, 64_900)...), flood: []byte{0}, every: 5 * time.Second}, nil
	case "deaf": // causes answers and does not read them
		deaf := event([]byte(`{"type":"send","id":"m","data":1}`))
		deaf.reads = false
		return deaf, nil
	case "receipts": // has the server remember as many long ids as it does for a hub
		var sends []byte
		for i := range maxReceipts {
			sends = append(sends, text(fmt.Appendf(nil, `{"type":"send","id":"%064d","data":""}`, i))...)
		}
		header := eventsHeader + "X-User: " + strings.Repeat("u", 1000) + "%d\r\n"
		return behavior{header: header, path: "receipts-%d", opening: sends, flood: ping, every: 5 * time.Second, reads: true}, nil
	}
	return behavior{}, fmt.Errorf("no kind of attack: %s", kind)
}

// becomeAttacker attacks, instead of running the tests, if asAttacker is set.
func becomeAttacker() {
	config := os.Getenv(asAttacker)
	if config == "" {
		return
	}
	var a attack
	if err := json.Unmarshal([]byte(config), &a); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := a.run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run attacks until stop ends. It writes a line when every attacker has tried to connect, and the outcomes at the end.
func (a attack) run(stop io.Reader, report io.Writer) error {
	var begun sync.WaitGroup
	var number, stopped atomic.Int64
	counters := map[string]*counter{}
	for kind, connections := range a.Kinds {
		does, err := behaviorOf(kind, a.Server)
		if err != nil {
			return err
		}
		t := &counter{}
		counters[kind] = t
		for range connections {
			begun.Add(1)
			go func() { // ends with the process
				first := sync.OnceFunc(begun.Done)
				for {
					a.connect(does, t, &number, &stopped, first)
					first()
					time.Sleep(a.Pause) // the pace of the attack
				}
			}()
		}
	}
	begun.Wait()
	fmt.Fprintln(report)
	_, _ = io.Copy(io.Discard, stop)
	stopped.Store(1)
	outcomes := map[string]outcome{}
	for kind, c := range counters {
		outcomes[kind] = c.outcome()
	}
	return json.NewEncoder(report).Encode(outcomes)
}

// connect makes one connection and does what it is for. It calls begun once the server has let it in.
func (a attack) connect(does behavior, t *counter, number, stopped *atomic.Int64, begun func()) {
	conn, err := dialFrom(a.From, a.Server)
	if err != nil {
		return
	}
	defer conn.Close()
	tcp := conn.(*net.TCPConn)
	_ = tcp.SetLinger(0) // the ports are free at once
	if !does.reads {
		_ = tcp.SetReadBuffer(4 << 10)
	}
	write := func(b []byte) bool {
		n, err := conn.Write(b)
		t.sent.Add(int64(n))
		if err != nil && stopped.Load() == 0 {
			t.cut.Add(1)
		}
		return err == nil
	}
	if !does.plain {
		request := handshakeRequest(a.Server, a.Room+does.path, does.header)
		if !write([]byte(strings.ReplaceAll(request, "%d", fmt.Sprint(number.Add(1))))) {
			return
		}
		if a.Rush {
			begun()
		}
		answer, err := http.ReadResponse(bufio.NewReaderSize(conn, 256), nil)
		if err != nil || answer.StatusCode != http.StatusSwitchingProtocols {
			t.refused.Add(1)
			return
		}
	}
	t.joined.Add(1)
	begun()
	if does.reads {
		go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection
	}
	if !write(does.opening) {
		return
	}
	for does.flood != nil {
		if !write(does.flood) {
			return
		}
		time.Sleep(does.every) // the pace of the attack
	}
	if does.hold > 0 {
		time.Sleep(does.hold)
	} else if _, err := io.Copy(io.Discard, conn); err == nil && stopped.Load() == 0 {
		t.cut.Add(1)
	}
}

// attackers are a running attack.
type attackers struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout *bufio.Reader
}

// start attacks from another process. It returns when every attacker is connected.
func (a attack) start(t testing.TB) *attackers {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	// Real attackers have their own machines. Here they get only the CPU time that nobody else wants.
	b := &attackers{t: t, cmd: exec.Command("nice", "-n", "19", binary)}
	if a.Equal {
		b.cmd = exec.Command(binary)
	}
	b.cmd.Env = append(os.Environ(), asAttacker+"="+string(config))
	b.cmd.Stderr = os.Stderr
	stdin, err := b.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := b.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	b.stdin, b.stdout = stdin, bufio.NewReader(stdout)
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = b.cmd.Process.Kill() // fails if it has ended
		_ = b.cmd.Wait()
	})
	tooLong := time.AfterFunc(patience, func() { _ = b.cmd.Process.Kill() })
	defer tooLong.Stop()
	if _, err := b.stdout.ReadString('\n'); err != nil {
		t.Fatalf("the attackers did not all get an answer within %v: %v", patience, err)
	}
	return b
}

// stop ends the attack and returns what each kind has achieved.
func (b *attackers) stop() map[string]outcome {
	b.t.Helper()
	b.stdin.Close()
	var outcomes map[string]outcome
	if err := json.NewDecoder(b.stdout).Decode(&outcomes); err != nil {
		b.t.Fatalf("the attackers' report: %v", err)
	}
	_ = b.cmd.Wait() // it has reported
	return outcomes
}
