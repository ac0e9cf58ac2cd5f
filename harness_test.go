package chatbroadcast

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddytest"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
)

// The addresses of the Caddy in this process, which choosePorts sets.
var adminAddr, httpAddr, httpsAddr string

// ported returns s with the ports that this run of the tests uses instead of those that the tests name: 9080 and 9081 for
// HTTP, 9443 for HTTPS and 2999 for the admin endpoint. The harness applies it to everything that it loads, dials and sends.
var ported = func(s string) string { return s } // in a process that choosePorts has not been called in

// portLock is an address on which one test binary at a time listens, for as long as it runs: the one that has the ports
// that the tests name.
const portLock = "127.0.0.1:2996"

// choosePorts sets the addresses. Test binaries that run beside each other have different ports.
func choosePorts() {
	named := []int{2999, 9080, 9443, 9081}
	err := errors.New("-short needs no ports")
	if !testing.Short() {
		_, err = net.Listen("tcp", portLock) // closed when the process ends
	}
	var addrs, pairs []string
	for _, port := range named {
		chosen := port
		if err != nil || !isFree(port) {
			chosen = freePort()
		}
		addrs = append(addrs, fmt.Sprint("localhost:", chosen))
		ownPorts = append(ownPorts, fmt.Sprintf(":%04X", chosen))
		pairs = append(pairs, fmt.Sprint(":", port), fmt.Sprint(":", chosen))
	}
	adminAddr, httpAddr, httpsAddr = addrs[0], addrs[1], addrs[2]
	ported = strings.NewReplacer(pairs...).Replace
}

// ownPorts are the ports of the Caddy in this process, as /proc/net/tcp has them.
var ownPorts []string

// freePort returns a port on which nobody listens, and does not return it again. It is below those that the system takes
// for outgoing connections, of which the tests make thousands.
func freePort() int {
	for {
		port := 10_000 + rand.IntN(20_000)
		if _, taken := takenPorts.LoadOrStore(port, true); !taken && isFree(port) {
			return port
		}
	}
}

var takenPorts sync.Map // by number

func isFree(port int) bool {
	listener, err := net.Listen("tcp", fmt.Sprint(":", port))
	if err != nil {
		return false
	}
	listener.Close()
	return true
}

// patience is how long a test waits for what must happen. Nothing takes that long on a machine that is not
// overloaded; what must not happen is never waited for.
const patience = time.Minute

// TestMain fails the run when a connection's goroutine outlives the tests.
func TestMain(m *testing.M) {
	becomeCaddy()
	becomeAttacker()
	flag.Parse()
	choosePorts()
	if !isSet("test.parallel") {
		// Parallel tests wait for other processes half of the time.
		_ = flag.Set("test.parallel", fmt.Sprint(2*runtime.GOMAXPROCS(0))) // is a number
	}
	var err error
	storage, err = os.MkdirTemp("", "chat-broadcast")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// Each load replaces the admin endpoint: a connection kept from the one before would fail.
	http.DefaultTransport.(*http.Transport).DisableKeepAlives = true
	code := m.Run()
	stopBrowser()
	if err := caddy.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, "stopping Caddy:", err)
		code = 1
	}
	if code == 0 {
		err := goleak.Find(
			// Caddy and its libraries keep these for the life of the process.
			goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2/cmd.cmdRun"),
			goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2.trapSignalsCrossPlatform.func1"),
			goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2.trapSignalsPosix.func1"),
			goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2.replaceLocalAdminServer.func2"),
			goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
			goleak.IgnoreAnyFunction("github.com/DeRuina/timberjack.(*Logger).millRun"),
		)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	_ = os.RemoveAll(storage) // a leftover in the temporary folder is no fault of the code under test
	os.Exit(code)
}

// portOf returns the port of an address.
func portOf(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

// isSet reports whether the command line has a flag.
func isSet(name string) bool {
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// findProgram returns the path of the first of the named programs that is installed. Without one the test is skipped,
// but not in CI, where nobody would notice.
func findProgram(t testing.TB, names ...string) string {
	t.Helper()
	skipShort(t)
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("none of %v is installed", names)
	}
	t.Skipf("none of %v is installed", names)
	return ""
}

// skipShort skips a test that needs Caddy or another program when the tests are to be quick.
func skipShort(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs Caddy or another program, which -short leaves out")
	}
}

// storage is where Caddy keeps its certificates during the tests.
var storage string

// A server is the Caddy under test, running in this process.
type server struct {
	t       testing.TB
	tester  *caddytest.Tester
	logFile string
	engine  string // the global option with the engine, or nothing
}

// engineFlag has the tests that start Caddy in this process run over another engine: "-engine file" or "-engine redis".
var engineFlag = flag.String("engine", "memory", "the engine of hubs in tests that name none")

// engineOption returns the global option with an engine of its own for a test.
func engineOption(t testing.TB) string {
	t.Helper()
	switch *engineFlag {
	case "file":
		return withEngine("file " + t.TempDir())
	case "redis":
		return withEngine(startRedis(t).engine())
	}
	return ""
}

// startCaddy runs Caddy with the sites of a Caddyfile, whose global options it adds. Its log goes to a file.
func startCaddy(t testing.TB, sites string) *server {
	t.Helper()
	skipShort(t)
	s := &server{t: t, tester: caddytest.NewTester(t), logFile: filepath.Join(t.TempDir(), "caddy.log"), engine: engineOption(t)}
	startAdmin(t)
	s.load(sites)
	t.Cleanup(func() {
		// The test's peers are closed by now. Their log lines belong to this test, not to the next.
		eventually(t, "the clients of the test to be gone", func() bool { return allClients() == 0 })
		forgetRefusals()
		s.unload()
		eventually(t, "the listeners of the test to be closed", onlyNewListeners)
		if t.Failed() {
			log, _ := os.ReadFile(s.logFile)
			t.Logf("Caddy's log:\n%s", log)
		}
	})
	return s
}

// startAdmin runs Caddy with an admin endpoint alone, if it does not run yet.
var startAdmin = func() func(t testing.TB) {
	start := sync.OnceValue(func() error { return caddy.Load([]byte(adminOnly()), false) })
	return func(t testing.TB) {
		t.Helper()
		if err := start(); err != nil {
			t.Fatalf("starting Caddy: %v", err)
		}
	}
}()

// adminOnly is a configuration with an admin endpoint and nothing else.
func adminOnly() string { return `{"admin":{"listen":"` + adminAddr + `"}}` }

// unload replaces the configuration by one without sites.
func (s *server) unload() {
	s.t.Helper()
	s.post("application/json", adminOnly())
}

// caddyfile adds the global options to sites. A log among options goes to the test's file, too.
func (s *server) caddyfile(options, sites string) string {
	logging := "log {\n\toutput file " + s.logFile + "\n\tformat json\n}"
	if before, own, found := strings.Cut(options, "log {\n"); found {
		options, logging = "", before+"log {\n\toutput file "+s.logFile+"\n"+own
	}
	if !strings.Contains(options, "chat_broadcast {") {
		options += "\n" + s.engine
	}
	return ported(fmt.Sprintf(`{
	admin localhost:2999
	http_port %s
	https_port %s
	skip_install_trust
	local_certs
	grace_period 1s
	persist_config off
	storage file_system %s
	%s
	%s
}
%s`, portOf(httpAddr), portOf(httpsAddr), storage, logging, options, sites))
}

// load replaces the configuration.
func (s *server) load(sites string) {
	s.t.Helper()
	s.loadWith("", sites)
}

// loadWith replaces the configuration by one with more global options.
func (s *server) loadWith(options, sites string) {
	s.t.Helper()
	if status, answer := s.post("text/caddyfile", s.caddyfile(options, sites)); status != http.StatusOK {
		s.t.Fatalf("loading a configuration: %d %s", status, answer)
	}
	eventually(s.t, "the listeners of the configuration before to be closed", onlyNewListeners)
}

// onlyNewListeners reports whether every listener that a reload has replaced is closed. A client that connects to a
// replaced listener gets no answer. Caddy closes it in the background, and on Linux it has the same address as the new one
// until then.
func onlyNewListeners() bool {
	const stateListen = "0A"
	listeners := map[string]bool{}
	for _, table := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		sockets, _ := os.ReadFile(table) // elsewhere a reload takes the listener over
		for line := range strings.Lines(string(sockets)) {
			f := strings.Fields(line)
			if f[3] != stateListen {
				continue
			}
			for _, port := range ownPorts {
				if strings.HasSuffix(f[1], port) && listeners[table+f[1]] {
					return false
				}
			}
			listeners[table+f[1]] = true
		}
	}
	return true
}

// post sends a configuration to the admin endpoint and returns the status and the answer.
func (s *server) post(contentType, config string) (int, string) {
	s.t.Helper()
	return postConfig(s.t, adminAddr, contentType, config)
}

// postConfig sends a configuration to an admin endpoint and returns the status and the answer. It tries again when the
// connection fails, since the endpoint may just be being replaced because of the load before.
func postConfig(t testing.TB, admin, contentType, config string) (status int, answer string) {
	t.Helper()
	eventually(t, "the admin endpoint to answer", func() bool {
		resp, err := http.Post("http://"+admin+"/load", contentType, strings.NewReader(config))
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		status, answer = resp.StatusCode, string(body)
		return err == nil
	})
	return status, answer
}

// An answer is the part of a response that tests look at.
type answer struct {
	status int
	body   string
	header http.Header
}

// request sends a request over plain HTTP. header are names and values.
func request(t testing.TB, method, url string, body io.Reader, header ...string) answer {
	t.Helper()
	return requestBy(t, http.DefaultTransport, method, url, body, header...)
}

func requestBy(t testing.TB, transport http.RoundTripper, method, url string, body io.Reader, header ...string) answer {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, ported(url), body)
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(header, 2) {
		r.Header.Add(pair[0], ported(pair[1]))
	}
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, string(got), resp.Header}
}

// logged returns the entries of one logger and those below it so far, once there are at least n.
func (s *server) logged(logger string, n int) []map[string]any {
	s.t.Helper()
	var entries []map[string]any
	eventually(s.t, fmt.Sprintf("%d entries of logger %s", n, logger), func() bool {
		entries = nil
		data, err := os.ReadFile(s.logFile)
		if err != nil {
			return false
		}
		for line := range bytes.Lines(data) {
			var entry map[string]any
			if json.Unmarshal(line, &entry) != nil {
				continue
			}
			if name, _ := entry["logger"].(string); name == logger || strings.HasPrefix(name, logger+".") {
				entries = append(entries, entry)
			}
		}
		return len(entries) >= n
	})
	return entries
}

// eventually waits until ok returns true.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond) // the pace of polling, not a wait for something
	}
}

// A peer is a WebSocket client that can do everything wrong.
type peer struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

// handshakeRequest is a correct one; header lines, each with its CRLF, are added to it.
func handshakeRequest(host, path, header string) string {
	return ported("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + header + "\r\n")
}

// join connects a peer to path over plain HTTP. header lines, each with its CRLF, are added to the request.
func join(t testing.TB, path string, header ...string) *peer {
	t.Helper()
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	return joinOn(t, conn, httpAddr, path, header...)
}

// dialFrom connects to server from the given address, which is another client address for each of 127.0.0.0/8.
func dialFrom(from, server string) (net.Conn, error) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	return dialer.Dial("tcp4", strings.Replace(ported(server), "localhost", "127.0.0.1", 1))
}

// joinFrom connects a peer to path from the given address.
func joinFrom(t testing.TB, from, server, path string) *peer {
	t.Helper()
	conn, err := dialFrom(from, server)
	if err != nil {
		t.Fatal(err)
	}
	return joinOn(t, conn, server, path)
}

// joinTLS connects a peer to path over TLS.
func joinTLS(t testing.TB, path string, header ...string) *peer {
	t.Helper()
	return joinOn(t, dialTLS(t), httpsAddr, path, header...)
}

// dialTLS connects, once Caddy has made itself a certificate.
func dialTLS(t testing.TB, protocols ...string) net.Conn {
	t.Helper()
	return dialTLSAt(t, httpsAddr, protocols...)
}

func dialTLSAt(t testing.TB, addr string, protocols ...string) net.Conn {
	t.Helper()
	var conn net.Conn
	eventually(t, "a TLS connection", func() (ok bool) {
		var err error
		conn, err = tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", NextProtos: protocols})
		return err == nil
	})
	t.Cleanup(func() { conn.Close() })
	return conn
}

func joinOn(t testing.TB, conn net.Conn, host, path string, header ...string) *peer {
	t.Helper()
	p, resp := handshakeOn(t, conn, handshakeRequest(host, path, strings.Join(header, "")))
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("joining %s: got status %s, want 101", path, resp.Status)
	}
	return p
}

// refused makes a handshake that must fail with the given status, and returns the response.
func refused(t testing.TB, status int, path string, header ...string) *http.Response {
	t.Helper()
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		t.Fatal(err)
	}
	_, resp := handshakeOn(t, conn, handshakeRequest(httpAddr, path, strings.Join(header, "")))
	if resp.StatusCode != status {
		t.Fatalf("joining %s: got status %s, want %d", path, resp.Status, status)
	}
	return resp
}

// handshakeOn sends a request and reads the response's header.
func handshakeOn(t testing.TB, conn net.Conn, request string) (*peer, *http.Response) {
	t.Helper()
	p := &peer{t: t, conn: conn, r: bufio.NewReader(conn)}
	t.Cleanup(func() { conn.Close() })
	p.write([]byte(request))
	p.patient()
	resp, err := http.ReadResponse(p.r, nil)
	if err != nil {
		t.Fatalf("reading the handshake's response: %v", err)
	}
	return p, resp
}

func (p *peer) patient() { _ = p.conn.SetReadDeadline(time.Now().Add(patience)) }

// write sends raw bytes.
func (p *peer) write(b []byte) {
	p.t.Helper()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.conn.Write(b); err != nil {
		p.t.Fatalf("writing: %v", err)
	}
}

// clientFrame returns a frame as a client sends it; first is the byte with FIN, RSV and opcode.
func clientFrame(first byte, payload []byte) []byte {
	frame := []byte{first}
	switch n := len(payload); {
	case n <= 125:
		frame = append(frame, 0x80|byte(n))
	case n <= 0xffff:
		frame = binary.BigEndian.AppendUint16(append(frame, 0x80|126), uint16(n))
	default:
		frame = binary.BigEndian.AppendUint64(append(frame, 0x80|127), uint64(n))
	}
	if len(payload) > 4096 { // masked with zeros: quicker, and the same to the server
		return append(append(frame, 0, 0, 0, 0), payload...)
	}
	mask := [4]byte{0x12, 0x34, 0x56, 0x78}
	frame = append(frame, mask[:]...)
	for i, b := range payload {
		frame = append(frame, b^mask[i%4])
	}
	return frame
}

// send sends a message in one frame.
func (p *peer) send(opcode int, payload string) {
	p.t.Helper()
	p.write(clientFrame(finBit|byte(opcode), []byte(payload)))
}

func (p *peer) text(payload string) {
	p.t.Helper()
	p.send(websocket.TextMessage, payload)
}

// A frame is one that the server sent.
type frame struct {
	opcode  int
	payload string
}

// readFrame reads one frame. An error is the connection's.
func (p *peer) readFrame() (frame, error) {
	var head [2]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return frame{}, err
	}
	if head[0]&0xf0 != finBit || head[1]&0x80 != 0 {
		return frame{}, fmt.Errorf("a server's frame is final, without RSV bits and unmasked, got % x", head)
	}
	length := uint64(head[1])
	switch length {
	case 126:
		var b [2]byte
		if _, err := io.ReadFull(p.r, b[:]); err != nil {
			return frame{}, err
		}
		length = uint64(binary.BigEndian.Uint16(b[:]))
	case 127:
		var b [8]byte
		if _, err := io.ReadFull(p.r, b[:]); err != nil {
			return frame{}, err
		}
		length = binary.BigEndian.Uint64(b[:])
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(p.r, payload); err != nil {
		return frame{}, err
	}
	return frame{int(head[0] & 0x0f), string(payload)}, nil
}

// next returns the next frame.
func (p *peer) next() frame {
	p.t.Helper()
	p.patient()
	f, err := p.readFrame()
	if err != nil {
		p.t.Fatalf("reading a frame: %v", err)
	}
	return f
}

// wantText fails unless the next frame is a text message with the given payload.
func (p *peer) wantText(payload string) {
	p.t.Helper()
	if got, want := p.next(), (frame{websocket.TextMessage, payload}); got != want {
		p.t.Fatalf("got frame %.80v, want %.80v", got, want)
	}
}

// wantClose fails unless the next frame, but for messages, is a close frame with the given code and reason.
func (p *peer) wantClose(code int, reason string) {
	p.t.Helper()
	for {
		f := p.next()
		if f.opcode == websocket.TextMessage || f.opcode == websocket.BinaryMessage {
			continue
		}
		want := frame{websocket.CloseMessage, string(websocket.FormatCloseMessage(code, reason))}
		if f != want {
			p.t.Fatalf("got frame %.80v, want %.80v", f, want)
		}
		return
	}
}

// wantEOF fails unless the server has ended the connection, with or without a reset.
func (p *peer) wantEOF() {
	p.t.Helper()
	p.patient()
	for {
		_, err := p.readFrame()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.t.Fatal("the connection is still open")
		}
		if err != nil {
			return
		}
	}
}

// dial opens another connection to the server, without a handshake.
func (p *peer) dial() net.Conn {
	p.t.Helper()
	conn, err := net.Dial("tcp", httpAddr)
	if err != nil {
		p.t.Fatal(err)
	}
	return conn
}

// ---- what tests through Caddy look at from the inside ----

// allClients returns how many clients there are in all configurations, until their connections have ended.
func allClients() int {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	n := 0
	for _, scope := range hubs.scopes {
		n += len(scope.members)
	}
	return n
}

// openHubs returns how many hubs are open, also those that are only kept for their history.
func openHubs() int {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	return len(hubs.named)
}

// awaitNoHubs waits until every hub is gone.
func awaitNoHubs(t testing.TB) {
	t.Helper()
	eventually(t, "the hubs to be gone", func() bool { return openHubs() == 0 })
}

// forgetRefusals leaves nothing for the log of the next test.
func forgetRefusals() {
	l := &hubs.refusals
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pauses {
		*p = refusalBatch{}
	}
	clear(l.pauses)
}

// members returns how many clients of the running configuration with default limits are members of a hub.
func members() int {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	return hubs.scopes[defaultHub].present
}

// hubMembers returns how many members an open hub has.
func hubMembers(name string) int { return hubs.hub(name).Size() }

// historyAge returns for how long an open hub keeps its messages.
func historyAge(name string) time.Duration { return hubs.hub(name).KeptFor() }

// allScopes returns how many scopes there are: one for each value of each running configuration.
func allScopes() int {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	return len(hubs.scopes)
}

// waitingNotices returns how many notices wait for the handlers of Caddy's events app, and whether somebody works on them.
func waitingNotices() (n int, running bool) {
	hubs.notifier.mu.Lock()
	defer hubs.notifier.mu.Unlock()
	return len(hubs.notifier.waiting), hubs.notifier.running
}

// tapsOn returns the taps on a hub.
func tapsOn(name string) []*hub.Tap {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	return hubs.taps[name]
}

// taps returns how many taps there are on all hubs.
func taps() int {
	hubs.mu.Lock()
	defer hubs.mu.Unlock()
	n := 0
	for _, taps := range hubs.taps {
		n += len(taps)
	}
	return n
}

// publishIn publishes m in a hub, and reports whether the hub took it.
func publishIn(b *hub.Hub, m hub.Message) (hub.Receipt, bool) {
	r, err := b.Publish(context.Background(), m)
	return r, err == nil
}
