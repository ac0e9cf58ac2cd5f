package chatbroadcast

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/gorilla/websocket"
)

// asCaddy makes the test binary a caddy command.
const asCaddy = "CHAT_BROADCAST_TEST_AS_CADDY"

// becomeCaddy runs the caddy command instead of the tests if this process was started for that.
func becomeCaddy() {
	if os.Getenv(asCaddy) != "" {
		caddycmd.Main()
		os.Exit(0) // a command other than run returns when it has done its work
	}
}

// caddyCommand returns a caddy command, of this very build: with the race detector, if the tests have it.
func caddyCommand(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), asCaddy+"=1", "HOME="+t.TempDir())
	return cmd
}

// A place is where a Caddy is that has its own ports.
type place struct {
	t     testing.TB
	admin string // the address of the admin endpoint
	http  string // where sites at http://localhost are
	https string // where those at https://localhost are
	url   string // of the site at http://localhost
}

// in returns the same place for a part of the test.
func (p place) in(t testing.TB) place {
	p.t = t
	return p
}

// A process is a Caddy in a process of its own.
type process struct {
	place
	cmd    *exec.Cmd
	dir    string
	stderr bytes.Buffer
	exited chan struct{} // closed when it is gone
}

// startProcess runs Caddy with the sites of a Caddyfile, which name no port.
func startProcess(t testing.TB, options, sites string) *process {
	t.Helper()
	skipShort(t) // before Caddy is built
	return startProcessOf(t, caddyCommand(t, "run"), options, sites)
}

// startProcessOf is startProcess for a given command "caddy run".
func startProcessOf(t testing.TB, cmd *exec.Cmd, options, sites string) *process {
	t.Helper()
	skipShort(t)
	localhost := func() string { return fmt.Sprint("localhost:", freePort()) }
	p := &process{place: place{t: t, admin: localhost(), http: localhost(), https: localhost()}, cmd: cmd, dir: t.TempDir(), exited: make(chan struct{})}
	p.url = "http://" + p.http + "/"
	p.start(options, sites)
	return p
}

// startAgain runs Caddy again, at the same addresses, after it has ended.
func (p *process) startAgain(options, sites string) *process {
	p.t.Helper()
	q := &process{place: p.place, cmd: caddyCommand(p.t, "run"), dir: p.dir, exited: make(chan struct{})}
	q.start(options, sites)
	return q
}

func (p *process) start(options, sites string) {
	p.t.Helper()
	p.cmd.Args = append(p.cmd.Args, "--config", p.write(options, sites))
	p.launch()
}

// launch starts the command and waits until Caddy listens.
func (p *process) launch() {
	t := p.t
	t.Helper()
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		_ = p.cmd.Wait() // its status is in ProcessState
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // fails if it is gone
		<-p.exited
		if t.Failed() {
			t.Logf("Caddy's log:\n%s", &p.stderr)
		}
	})
	eventually(t, "Caddy in a process of its own", func() bool {
		conn, err := net.Dial("tcp", p.http)
		if err != nil {
			conn, err = net.Dial("tcp", p.https)
		}
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// write writes a Caddyfile and returns its name.
func (p *process) write(options, sites string) string {
	p.t.Helper()
	config := fmt.Sprintf(`{
	admin %s
	http_port %s
	https_port %s
	skip_install_trust
	local_certs
	persist_config off
	storage file_system %s
	%s
}
%s`, p.admin, portOf(p.http), portOf(p.https), filepath.Join(p.dir, "storage"), options, sites)
	name := filepath.Join(p.dir, "Caddyfile")
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return name
}

// reload runs "caddy reload", and returns what it says if it fails.
func (p *process) reload(options, sites string) error {
	p.t.Helper()
	out, err := caddyCommand(p.t, "reload", "--config", p.write(options, sites)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// post sends a configuration to /load, and returns the answer if it is refused.
func (p *process) post(options, sites string) error {
	p.t.Helper()
	config, err := os.ReadFile(p.write(options, sites))
	if err != nil {
		p.t.Fatal(err)
	}
	if status, answer := postConfig(p.t, p.admin, "text/caddyfile", string(config)); status != http.StatusOK {
		return fmt.Errorf("status %d: %s", status, answer)
	}
	return nil
}

// load replaces the sites.
func (p *process) load(sites string) {
	p.t.Helper()
	if err := p.post("", sites); err != nil {
		p.t.Fatalf("loading a configuration: %v", err)
	}
}

// unload leaves no sites.
func (p *process) unload() {
	p.t.Helper()
	p.load("")
}

// terminate sends SIGTERM and returns how long the process took to exit with status 0.
func (p *process) terminate() time.Duration {
	p.t.Helper()
	began := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.t.Fatalf("still running %v after SIGTERM", patience)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("got exit status %d, want 0", code)
	}
	return time.Since(began)
}

// dial connects over plain HTTP.
func (p place) dial() net.Conn {
	p.t.Helper()
	conn, err := net.Dial("tcp", p.http)
	if err != nil {
		p.t.Fatal(err)
	}
	return conn
}

// join connects a peer to path over plain HTTP.
func (p place) join(path string) *peer {
	p.t.Helper()
	return joinOn(p.t, p.dial(), p.http, path)
}

// refused makes a handshake that must fail with the given status.
func (p place) refused(status int, path string, header ...string) {
	p.t.Helper()
	_, resp := handshakeOn(p.t, p.dial(), handshakeRequest(p.http, path, strings.Join(header, "")))
	if resp.StatusCode != status {
		p.t.Fatalf("joining %s: got status %s, want %d", path, resp.Status, status)
	}
}

// joinTLS connects a peer to path over TLS.
func (p place) joinTLS(path string) *peer {
	p.t.Helper()
	return joinOn(p.t, dialTLSAt(p.t, p.https), p.https, path)
}

// joinEvents connects a peer to path that speaks the events protocol.
func (p place) joinEvents(path string) *eventsPeer {
	p.t.Helper()
	return joinEventsOn(p.t, p.dial(), p.http, path)
}

// publish sends a POST to path.
func (p place) publish(path, body string) answer {
	p.t.Helper()
	return request(p.t, http.MethodPost, "http://"+p.http+path, strings.NewReader(body))
}

// count reads messages that are to be numbered from 0, one after the other, until a close frame or the end of the
// connection. It keeps how many there were so far in got.
func (p *peer) count(got *atomic.Int64) (closed string, err error) {
	for {
		p.patient()
		f, err := p.readFrame()
		if err != nil {
			return "", err
		}
		switch f.opcode {
		case websocket.TextMessage:
			if want := fmt.Sprint(got.Load()); f.payload != want {
				return "", fmt.Errorf("got message %s, want %s", f.payload, want)
			}
			got.Add(1)
		case websocket.CloseMessage:
			return f.payload, nil
		case websocket.PingMessage:
		default:
			return "", fmt.Errorf("got frame %v", f)
		}
	}
}

func TestProcess_TwentyReloadsUnderLoad(t *testing.T) {
	t.Parallel()
	const (
		clients, hubCount = 50, 5
		reloads           = 20
		interval          = 10 * time.Millisecond // a hub: together 500 messages a second
	)
	// What differs from one reload to the next: headers, routes, other sites, logs, and the settings of TLS.
	variants := []struct{ options, sites string }{
		{"", "chat_broadcast /chat/* {path} {\nping off\n}"}, // the peers, which join with this, answer none
		{"", "header X-Config other\nchat_broadcast /chat/* {path} {\nrate 1000000 1s\n}"},
		{"", "handle /chat/* {\nchat_broadcast {path}\n}\nhandle {\nrespond other\n}"},
		{"log {\noutput file " + filepath.Join(t.TempDir(), "caddy.log") + "\n}", "log\nchat_broadcast /chat/* {path}"},
		{"metrics", "chat_broadcast /chat/* {path}\ntls internal {\nprotocols tls1.3\n}"},
		{"servers {\ntimeouts {\nread_header 5s\n}\n}", "chat_broadcast /chat/* {path}"},
	}
	sites := func(i int) (string, string) {
		v := variants[i%len(variants)]
		plain := v.sites
		if before, _, found := strings.Cut(plain, "\ntls"); found {
			plain = before
		}
		return v.options, fmt.Sprintf("http://localhost {\n%s\n}\nhttps://localhost {\n%s\n}\nhttp://other%d.localhost {\nrespond %d\n}",
			plain, v.sites, i, i)
	}
	options, first := sites(0)
	p := startProcess(t, options, first)

	var peers []*peer
	var got [clients]atomic.Int64
	var sent [hubCount]atomic.Int64
	for i := range clients {
		join := p.join
		if i < 10 {
			join = p.joinTLS
		}
		peers = append(peers, join(fmt.Sprintf("/chat/%d", i%hubCount)))
	}
	var readers, senders sync.WaitGroup
	ended := make(chan error, clients)
	for i, p := range peers {
		readers.Go(func() {
			closed, err := p.count(&got[i])
			ended <- fmt.Errorf("client %d ended after %d messages: closed %q, error %w", i, got[i].Load(), closed, err)
		})
	}
	stop := make(chan struct{})
	for hub := range hubCount {
		senders.Go(func() {
			ticker := time.NewTicker(interval)
			defer ticker.Stop()
			for {
				select {
				case <-stop:
					return
				case <-ticker.C:
				}
				message := clientFrame(finBit|websocket.TextMessage, fmt.Append(nil, sent[hub].Load()))
				if _, err := peers[hub].conn.Write(message); err != nil {
					return // its reader says so
				}
				sent[hub].Add(1)
			}
		})
	}
	gauges := func(when string) {
		t.Helper()
		now := scrapeAt(t, p.admin)
		if c, h := value(now["clients"]), value(now["hubs"]); c != clients || h != hubCount {
			t.Errorf("%s: got gauges of %v clients and %v hubs, want %d and %d", when, c, h, clients, hubCount)
		}
	}
	gauges("before")
	for i := 1; i <= reloads; i++ {
		options, sites := sites(i)
		load := p.post
		if i%2 == 0 {
			load = p.reload
		}
		if err := load(options, sites); err != nil {
			t.Fatalf("reload %d: %v", i, err)
		}
		gauges(fmt.Sprintf("after reload %d", i))
		if i == reloads/2 {
			before := sent[0].Load()
			if err := load(options, sites+"\nhttp://bad.localhost {\nchat_broadcast {\nbuffer 0\n}\n}"); err == nil {
				t.Error("got a bad configuration accepted")
			}
			eventually(t, "messages after a bad configuration", func() bool { return got[0].Load() > before })
			gauges("after a bad configuration")
		}
	}
	close(stop)
	senders.Wait()
	eventually(t, "every message to arrive", func() bool {
		for i := range clients {
			if got[i].Load() != sent[i%hubCount].Load() {
				return false
			}
		}
		return true
	})
	select {
	case err := <-ended:
		t.Error(err)
	default:
	}
	for _, p := range peers {
		p.conn.Close()
	}
	readers.Wait()
	p.terminate()
}

func TestProcess_RemovalOfFiveThousandClients(t *testing.T) {
	t.Parallel()
	const clients = 5000
	p := startProcess(t, "", "http://localhost {\nchat_broadcast /chat/* {\nping off\n}\n}")
	var peers []*peer
	for i := range clients {
		peers = append(peers, p.join(fmt.Sprintf("/chat/%d", i%100)))
	}
	began := time.Now()
	if err := p.reload("", "http://localhost {\nrespond gone\n}"); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the reload took %v, want less than 5 s", took)
	}
	for _, p := range peers {
		p.wantClose(websocket.CloseServiceRestart, "hub_removed")
		p.send(websocket.CloseMessage, "\x03\xf4")
		p.conn.Close()
	}
	if took := time.Since(began); took > 25*time.Second {
		t.Errorf("the last client got its close frame after %v, want less than 25 s", took)
	}
	p.terminate()
}

func TestProcess_SIGTERM(t *testing.T) {
	const clients = 200
	p := startProcess(t, "", "http://localhost {\nchat_broadcast /chat/* {\nbuffer 10000 16MiB\n}\n}")
	stuck := p.join("/chat/a")
	_ = stuck.conn.(*net.TCPConn).SetReadBuffer(4096)
	var peers []*peer
	for range clients {
		peers = append(peers, p.join("/chat/a"))
	}
	var readers, senders sync.WaitGroup
	var got [clients]atomic.Int64
	for i, p := range peers {
		readers.Go(func() {
			closed, err := p.count(&got[i])
			if want := string(websocket.FormatCloseMessage(1001, "shutting_down")); closed != want {
				t.Errorf("client %d: after %d messages got closed %q, error %v, want 1001 shutting_down", i, got[i].Load(), closed, err)
			}
			_, _ = p.conn.Write(clientFrame(finBit|websocket.CloseMessage, []byte(closed)))
		})
	}
	senders.Go(func() {
		for i := 0; ; i++ { // until the connection closes
			if _, err := peers[0].conn.Write(clientFrame(finBit|websocket.TextMessage, fmt.Append(nil, i))); err != nil {
				return
			}
		}
	})
	eventually(t, "a busy hub", func() bool { return got[0].Load() > 1000 })
	if took := p.terminate(); took > 6*time.Second {
		t.Errorf("got exit after %v, want less than 6 s", took)
	}
	readers.Wait()
	for _, p := range peers {
		p.conn.Close()
	}
	senders.Wait()
	for i := range got {
		if n, want := got[i].Load(), got[0].Load(); n != want {
			t.Errorf("client %d got %d messages, client 0 %d", i, n, want)
		}
	}
}

// TestProcess_SIGTERMBesideALongRequest checks that clients get their close frames while a long
// request delays the shutdown of the server.
func TestProcess_SIGTERMBesideALongRequest(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "grace_period 4s", "http://localhost {\nchat_broadcast /chat/* {\nhttp_publish\n}\n}")
	peer := p.join("/chat/a")
	long := p.dial()
	defer long.Close()
	if _, err := io.WriteString(long, "POST /chat/a HTTP/1.1\r\nHost: "+p.http+"\r\nContent-Length: 10\r\n\r\nhalf"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var told time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		var got atomic.Int64
		closed, err := peer.count(&got)
		told = time.Since(began)
		if closed != string(websocket.FormatCloseMessage(1001, "shutting_down")) {
			t.Errorf("got closed %q, error %v, want 1001 shutting_down", closed, err)
		}
	})
	took := p.terminate()
	wg.Wait()
	if told > took/2 {
		t.Errorf("got 1001 after %v of %v, want it before the request is over", told, took)
	}
}

// TestProcess_PageOutlivesTheServer has a browser look on while Caddy is stopped, or dies, and is started again.
func TestProcess_PageOutlivesTheServer(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for _, tc := range []struct {
		name string
		end  func(*process)
	}{
		{"stopped", func(p *process) { p.terminate() }},
		{"killed", func(p *process) {
			_ = p.cmd.Process.Kill() // fails if it is gone
			<-p.exited
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			site := exampleSite(t)
			p := startProcess(t, "", site)
			page := openTab(t, browser, "http://"+p.http)
			page.waitState("open")
			page.send("before")
			page.waitFor(`inside().querySelectorAll(".message:not(.pending)").length === 1`)

			tc.end(p)
			page.waitState("waiting", "connecting")
			page.send("meanwhile")
			page.waitFor(`inside().querySelector(".pending .text")?.textContent === "meanwhile"`)
			page.do(typeInto("#text", "a draft"))

			p = p.startAgain("", site)
			page.waitState("open")
			page.waitFor(`!inside().querySelector(".pending")`)
			page.waitFor(`inside().querySelector(".missed")`) // the server remembers nothing, and the page says so
			if got := len(page.messages()); got != 2 || page.draft() != "a draft" {
				t.Errorf("got %d messages and the draft %q, want 2 and what was typed", got, page.draft())
			}
			raw := p.join("/chat/lobby")
			if got := raw.next().payload; !strings.Contains(got, "meanwhile") {
				t.Errorf("got %q from the new server's history, want what was sent meanwhile", got)
			}
			raw.conn.Close()
		})
	}
}
