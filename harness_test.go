package chatbroadcast

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddytest"
	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
)

// The addresses of the Caddy under test.
const (
	adminAddr = "localhost:2999"
	httpAddr  = "localhost:9080"
	httpsAddr = "localhost:9443"
)

// patience is how long a test waits for what must happen. Nothing takes that long on a machine that is not
// overloaded; what must not happen is never waited for.
const patience = 20 * time.Second

// TestMain fails the run when a connection's goroutine outlives the tests.
func TestMain(m *testing.M) {
	becomeCaddy()
	becomeAttacker()
	var err error
	storage, err = os.MkdirTemp("", "chat-broadcast")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// Each load replaces the admin endpoint: a connection kept from the one before would fail.
	http.DefaultTransport.(*http.Transport).DisableKeepAlives = true
	code := m.Run()
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

// findProgram returns the path of the first of the named programs that is installed. Without one the test is skipped,
// but not in CI, where nobody would notice.
func findProgram(t testing.TB, names ...string) string {
	t.Helper()
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

// storage is where Caddy keeps its certificates during the tests.
var storage string

// A server is the Caddy under test, running in this process.
type server struct {
	t       testing.TB
	tester  *caddytest.Tester
	logFile string
}

// startCaddy runs Caddy with the sites of a Caddyfile, whose global options it adds. Its log goes to a file.
func startCaddy(t testing.TB, sites string) *server {
	t.Helper()
	s := &server{t: t, tester: caddytest.NewTester(t), logFile: filepath.Join(t.TempDir(), "caddy.log")}
	s.load(sites)
	t.Cleanup(func() {
		// The test's peers are closed by now. Their log lines belong to this test, not to the next.
		eventually(t, "the clients of the test to be gone", func() bool {
			hubs.mu.Lock()
			defer hubs.mu.Unlock()
			for _, scope := range hubs.scopes {
				if len(scope.members) > 0 {
					return false
				}
			}
			return true
		})
		hubs.refusals.forget()
		s.post("application/json", `{"admin":{"listen":"`+adminAddr+`"}}`)
		eventually(t, "the listeners of the test to be closed", onlyNewListeners)
		if t.Failed() {
			log, _ := os.ReadFile(s.logFile)
			t.Logf("Caddy's log:\n%s", log)
		}
	})
	return s
}

// forget leaves nothing for the log of the next test.
func (l *refusalLog) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.pauses {
		*p = refusalBatch{}
	}
	clear(l.pauses)
}

// caddyfile adds the global options to sites. A log among options goes to the test's file, too.
func (s *server) caddyfile(options, sites string) string {
	logging := "log {\n\toutput file " + s.logFile + "\n\tformat json\n}"
	if before, own, found := strings.Cut(options, "log {\n"); found {
		options, logging = "", before+"log {\n\toutput file "+s.logFile+"\n"+own
	}
	return fmt.Sprintf(`{
	admin %s
	http_port 9080
	https_port 9443
	skip_install_trust
	local_certs
	grace_period 1s
	persist_config off
	storage file_system %s
	%s
	%s
}
%s`, adminAddr, storage, logging, options, sites)
}

// load replaces the configuration.
func (s *server) load(sites string) {
	s.t.Helper()
	s.loadWith("", sites)
}

// loadWith replaces the configuration by one with more global options.
func (s *server) loadWith(options, sites string) {
	s.t.Helper()
	s.tester.InitServer(s.caddyfile(options, sites), "caddyfile")
	if s.t.Failed() {
		s.t.FailNow()
	}
	eventually(s.t, "the listeners of the configuration before to be closed", onlyNewListeners)
}

// onlyNewListeners reports whether nobody can connect any more to a listener that a reload has replaced: who does gets no
// answer. Caddy closes it in the background, and on Linux it has the same address as the new one until then.
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
			for _, port := range []string{":2378", ":24E3", ":0BB7"} { // 9080, 9443, 2999
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
	r, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for pair := range slices.Chunk(header, 2) {
		r.Header.Add(pair[0], pair[1])
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
	return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\n" +
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + header + "\r\n"
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
	return dialer.Dial("tcp4", strings.Replace(server, "localhost", "127.0.0.1", 1))
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
