package chatbroadcast

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

// startRecipe runs a recipe of the README on the test's addresses.
func startRecipe(t *testing.T, name string, replacements ...string) *server {
	t.Helper()
	return startRecipeBeside(t, "", name, replacements...)
}

// startRecipeBeside runs a recipe of the README on the test's addresses, and beside it other sites.
func startRecipeBeside(t *testing.T, sites, name string, replacements ...string) *server {
	t.Helper()
	recipe := readmeBlock(t, "recipe: "+name)
	recipe = strings.NewReplacer(append(replacements,
		"http://example.com:8080", "http://localhost:9080", "http://example.com", "http://localhost:9080",
		"example.com", "http://localhost:9080")...).Replace(recipe)
	options := ""
	if global, ok := strings.CutPrefix(recipe, "{\n"); ok { // the harness has its own
		options, recipe, _ = strings.Cut(global, "\n}\n")
	}
	s := startCaddy(t, "")
	s.loadWith(options, recipe+sites)
	return s
}

// readmeBlock returns the block of the README that stands below a comment.
func readmeBlock(t *testing.T, comment string) string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, found := strings.Cut(string(readme), "<!-- "+comment+" -->\n```\n")
	block, _, ended := strings.Cut(block, "```\n")
	if !found || !ended {
		t.Fatalf("the README has no block %q", comment)
	}
	return block
}

// postAsREADME sends the POST that a command line or a URL in the README stands for, after the shell has filled in its
// variables, with body where the line has none.
func postAsREADME(t *testing.T, name, body string) answer {
	t.Helper()
	line := readmeBlock(t, "request: "+name)
	url := regexp.MustCompile(`https://example\.com(\S*)`).FindStringSubmatch(line)
	if url == nil {
		t.Fatalf("the README's %s has no URL", name)
	}
	if data := regexp.MustCompile(`--data-binary (?:"([^"]*)"|'([^']*)')`).FindStringSubmatch(line); data != nil {
		body = os.ExpandEnv(data[1]) + data[2]
	}
	var header []string
	for _, h := range regexp.MustCompile(`--header "([^:]*): ([^"]*)"`).FindAllStringSubmatch(line, -1) {
		header = append(header, h[1], os.ExpandEnv(h[2]))
	}
	return publish(t, os.ExpandEnv(url[1]), body, header...)
}

func TestREADME_Static(t *testing.T) {
	site := t.TempDir()
	if err := os.WriteFile(filepath.Join(site, "index.html"), []byte("welcome"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := startRecipe(t, "static", "/srv", site)
	s.tester.AssertGetResponse("http://"+httpAddr+"/", 200, "welcome")
	a, b := join(t, "/chat/lobby"), join(t, "/chat/lobby")
	a.text("hello")
	b.wantText("hello")
	refused(t, 404, "/elsewhere")
}

func TestREADME_Rooms(t *testing.T) {
	startRecipe(t, "rooms")
	a, b := join(t, "/chat/a"), join(t, "/chat/b")
	a.text("in a")
	a.wantText("in a")
	b.text("in b")
	b.wantText("in b")
	player, other := join(t, "/game/1"), join(t, "/game/1")
	player.text("no echo")
	other.text("to the player")
	player.wantText("to the player")
	other.wantText("no echo")
	player.text(strings.Repeat("x", 1025))
	player.wantClose(websocket.CloseMessageTooBig, "too_big")
	for range 6 { // with a, b, other and player, who has not hung up, that makes ten
		join(t, "/chat/a")
	}
	refused(t, 429, "/chat/a")
}

func TestREADME_Names(t *testing.T) {
	startRecipe(t, "names", "www.example.com", "http://127.0.0.1:9080")
	a := join(t, "/chat/a")
	b := joinOn(t, a.dial(), "127.0.0.1:9080", "/chat/a")
	other := joinOn(t, a.dial(), "127.0.0.1:9080", "/chat/b")
	a.text("hello")
	b.wantText("hello")
	other.text("elsewhere")
	other.wantText("elsewhere")
}

func TestREADME_Members(t *testing.T) {
	s := startRecipe(t, "members")
	refused(t, 401, "/news/write")
	member, public := join(t, "/news/write", "Authorization: Basic YWRhOmxvdmVsYWNl\r\n"), join(t, "/news")
	member.text("news")
	public.wantText("news")
	public.text("me too")
	public.wantClose(websocket.ClosePolicyViolation, "read_only")
	public.conn.Close()
	s.logged(moduleID, 1)
	member.conn.Close()
	if got := s.logged(moduleID, 2)[1]["user"]; got != "ada" {
		t.Errorf("got user %v, want ada", got)
	}
}

func TestREADME_ForwardAuth(t *testing.T) {
	auth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Upgrade") != "" || r.Header.Get("Connection") != "":
			w.WriteHeader(http.StatusTeapot) // what a service does that takes it for a handshake
		case r.URL.Path == "/api/verify" && r.Header.Get("Cookie") == "session=ada":
			w.Header().Set("Remote-User", "ada")
		default:
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer auth.Close()
	s := startRecipe(t, "forward_auth", "localhost:9091", auth.Listener.Addr().String())
	refused(t, 401, "/chat/a")
	p := join(t, "/chat/a", "Cookie: session=ada\r\n", "Remote-User: mallory\r\n")
	p.text("hello")
	p.wantText("hello")
	p.conn.Close()
	if got := s.logged(moduleID, 1)[0]["user"]; got != "ada" {
		t.Errorf("got user %v, want ada", got)
	}
}

// proxySite forwards to upstream and adds the client's address to X-Forwarded-For, as nginx does with
// $proxy_add_x_forwarded_for.
func proxySite(upstream string) string {
	return `
http://localhost:9081 {
	reverse_proxy ` + upstream + ` {
		header_up X-Forwarded-For "{http.request.header.X-Forwarded-For}, {http.request.remote.host}"
	}
}`
}

// throughProxy makes a handshake from another address than the proxy's, and returns the status.
func throughProxy(t *testing.T, header string) int {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	conn, err := dialer.Dial("tcp", "127.0.0.1:9081")
	if err != nil {
		t.Fatal(err)
	}
	_, resp := handshakeOn(t, conn, handshakeRequest("localhost:9081", "/chat/a", header))
	return resp.StatusCode
}

// wantTenOfTwenty makes 20 handshakes through the proxy, each with another forged address.
func wantTenOfTwenty(t *testing.T) {
	t.Helper()
	statuses := map[int]int{}
	for i := range 20 {
		statuses[throughProxy(t, fmt.Sprintf("X-Forwarded-For: 198.51.100.%d\r\n", i))]++
	}
	if statuses[http.StatusSwitchingProtocols] != 10 || statuses[http.StatusTooManyRequests] != 10 {
		t.Errorf("got %v, want 10 of 101 and 10 of 429", statuses)
	}
}

func TestREADME_Proxy(t *testing.T) {
	s := startRecipe(t, "proxy")
	const client = "X-Forwarded-For: 203.0.113.7\r\n"
	for range 10 {
		join(t, "/chat/a", client)
	}
	refused(t, 429, "/chat/a", client)
	s.logged(moduleID, 1) // of the refusal

	p := join(t, "/chat/a", "X-Forwarded-For: 2001:db8::1\r\n", "Origin: https://localhost:9080\r\n") // somebody else
	p.conn.Close()
	if got := s.logged(moduleID, 2)[1]["client_ip"]; got != "2001:db8::1" {
		t.Errorf("got client_ip %v, want the address that the proxy forwarded", got)
	}
}

func TestREADME_ProxyClientsCannotForgeTheirAddress(t *testing.T) {
	startRecipeBeside(t, proxySite("127.0.0.1:9080"), "proxy", "127.0.0.0/8", "127.0.0.1") // the client is none of the proxies
	wantTenOfTwenty(t)
}

func TestREADME_ProxyOnAUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "chat.sock")
	startRecipeBeside(t, proxySite("unix/"+socket), "proxy_unix", "/run/caddy/chat.sock", socket)
	wantTenOfTwenty(t)
}

func TestREADME_ProxyOnAUnixSocketWithoutTrustIsWarnedOf(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "chat.sock")
	hubs.addressWarning = occasionalWarning{} // tests before may have had it
	s := startRecipeBeside(t, proxySite("unix/"+socket), "proxy_unix",
		"/run/caddy/chat.sock", socket, "trusted_proxies_unix", "trusted_proxies_strict", "trusted_proxies_strict", "")
	wantTenOfTwenty(t)
	var warnings int
	for _, entry := range s.logged(moduleID, 1) {
		if message := entry["msg"].(string); entry["level"] == "warn" && strings.Contains(message, "trusted_proxies_unix") {
			warnings++
		}
	}
	if warnings != 1 {
		t.Errorf("got %d warnings of 20 clients without an address, want 1", warnings)
	}
}

// tokenFile returns the path of a file in which token stands as a line. The path is the one in the README, for a replacement.
func tokenFile(t *testing.T, name, token string) (inREADME, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), name)
	writeToken(t, path, token)
	return "/etc/caddy/" + name, path
}

func writeToken(t *testing.T, path, token string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestREADME_Publish(t *testing.T) {
	t.Setenv("PUBLISH_TOKEN", "secret")
	t.Setenv("GITHUB_REF_NAME", "v1.0.0")
	inREADME, file := tokenFile(t, "publish-token", "secret")
	s := startRecipe(t, "publish", inREADME, file)
	p := join(t, "/news")
	postAsREADME(t, "curl", "").wantPublished(t, 1, 1)
	p.wantText(`{"title": "We are live"}`)
	postAsREADME(t, "ci", "").wantPublished(t, 1, 2)
	p.wantText("v1.0.0 is out")
	for _, authorization := range []string{"", "Bearer ", "Bearer wrong", "Bearer secret2", "bearer secret", "Basic secret"} {
		if got := publish(t, "/news", "x", "Authorization", authorization); got.status != http.StatusForbidden {
			t.Errorf("%q: got %d, want 403", authorization, got.status)
		}
	}
	if got := publish(t, "/elsewhere", "x", "Authorization", "Bearer secret"); got.status == http.StatusAccepted {
		t.Error("the token is good for other URLs")
	}
	s.tester.AssertGetResponse("http://"+httpAddr+"/news", 200, "")
	writeToken(t, file, "secret2") // without a reload
	for token, want := range map[string]int{"secret": http.StatusForbidden, "secret2": http.StatusAccepted} {
		if got := publish(t, "/news", token, "Authorization", "Bearer "+token); got.status != want {
			t.Errorf("token %s after the change: got %d, want %d", token, got.status, want)
		}
	}
	p.wantText("secret2")
	p.text("me too")
	p.wantClose(websocket.ClosePolicyViolation, "read_only")
}

// TestREADME_PublishWithoutToken is about the recipe's header_regexp. HTTP/2 keeps the space in an Authorization of
// "Bearer ", which is what the recipe's header line comes to where the file is missing or empty.
func TestREADME_PublishWithoutToken(t *testing.T) {
	const header = "\theader Authorization \"Bearer {file./etc/caddy/publish-token}\"\n"
	empty := filepath.Join(t.TempDir(), "empty")
	writeToken(t, empty, "")
	missing := filepath.Join(t.TempDir(), "missing")
	forFile := func(path string) string { return strings.ReplaceAll(header, "/etc/caddy/publish-token", path) }
	for _, tc := range []struct {
		name, with string
		want       int
	}{
		{"empty file", forFile(empty), http.StatusForbidden},
		{"missing file", forFile(missing), http.StatusForbidden},
		{"empty file, without the header_regexp", forFile(empty) + "\t}\n\t@unused {\n", http.StatusAccepted},
	} {
		t.Run(tc.name, func(t *testing.T) {
			startRecipe(t, "publish", "example.com", "localhost:9443", header, tc.with)
			dialTLS(t).Close() // there is a certificate
			got := requestBy(t, transportTLS(), http.MethodPost, "https://"+httpsAddr+"/news", strings.NewReader("x"),
				"Authorization", "Bearer ")
			if got.status != tc.want {
				t.Errorf("got %d, want %d", got.status, tc.want)
			}
		})
	}
}

func TestREADME_Webhook(t *testing.T) {
	t.Setenv("HOOK_TOKEN", "topsecret")
	inREADME, file := tokenFile(t, "hook-token", "topsecret")
	s := startRecipe(t, "webhook", inREADME, file, "\tlog {", "\tdebug\n\tlog {", // so that every error is logged
		"\trespond @stranger 403\n", "\trespond @stranger 403\n\thandle_errors {\n\t\trespond {err.message}\n\t}\n")
	p := join(t, "/builds")
	const payload = `{"status": "passed"}`
	postAsREADME(t, "webhook", payload).wantPublished(t, 1, 1)
	p.wantText(payload)
	for _, path := range []string{"/builds", "/builds?token=", "/builds?token=wrong", "/builds?token=*"} {
		if got := publish(t, path, payload); got.status != http.StatusForbidden {
			t.Errorf("%s: got %d, want 403", path, got.status)
		}
	}
	if got := postAsREADME(t, "webhook", "\xff"); got.status != http.StatusBadRequest {
		t.Errorf("got %d, want 400", got.status)
	}
	writeToken(t, file, "")
	if got := publish(t, "/builds?token=", payload); got.status != http.StatusForbidden {
		t.Errorf("an empty file and an empty token: got %d, want 403", got.status)
	}
	s.logged("http.log.access", 8) // the handshake, too
	s.logged("http.log.error", 1)
	log, err := os.ReadFile(s.logFile)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(log, []byte("topsecret")) || bytes.Count(log, []byte("/builds?token=REDACTED")) < 3 {
		t.Error("the token is in Caddy's log")
	}
}

func TestREADME_Metrics(t *testing.T) {
	got := func() string { return request(t, http.MethodGet, "http://"+httpAddr+"/metrics", nil).body }
	s := startRecipe(t, "metrics", "192.0.2.7", "127.0.0.1 ::1")
	if body := got(); !strings.Contains(body, "\ncaddy_chat_broadcast_clients 0\n") {
		t.Errorf("got %.200q for Prometheus, want the metrics", body)
	}
	recipe := readmeBlock(t, "recipe: metrics")
	s.load(strings.ReplaceAll(recipe, "example.com", "http://localhost:9080"))
	if body := got(); body != "" {
		t.Errorf("got %.200q for somebody else, want nothing", body)
	}
}

// TestREADME_MetricsTable compares the table in the README with what is exposed.
func TestREADME_MetricsTable(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\n\tchat_broadcast /chat/*\n}")
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "| metric | type | labels | meaning |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	documented := map[string]bool{}
	exposed := scrape(t)
	quoted := regexp.MustCompile("`([a-z_]+)`")
	for _, row := range strings.Split(table, "\n")[1:] {
		cells := strings.Split(row, "|")
		if len(cells) != 6 || !quoted.MatchString(cells[1]) {
			t.Fatalf("%q is no row of the table", row)
		}
		name := quoted.FindStringSubmatch(cells[1])[1]
		documented[name] = true
		if exposed[name] == nil {
			t.Errorf("%s is documented, but not exposed", name)
			continue
		}
		if got, want := strings.TrimSpace(cells[2]), strings.ToLower(exposed[name].GetType().String()); got != want {
			t.Errorf("%s: got type %s in the README, want %s", name, got, want)
		}
		labels, values := map[string]bool{}, map[string]bool{}
		for _, m := range exposed[name].GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
				values[l.GetValue()] = true
			}
		}
		words := func(cell string) (words []string) {
			for _, match := range quoted.FindAllStringSubmatch(cell, -1) {
				words = append(words, match[1])
			}
			slices.Sort(words)
			return words
		}
		if got, want := words(cells[3]), slices.Sorted(maps.Keys(labels)); !slices.Equal(got, want) {
			t.Errorf("%s: got labels %v in the README, want %v", name, got, want)
		}
		if name == "closes_total" {
			continue // its values are in another table, which TestREADME_CloseCodes compares
		}
		for value := range values {
			if !slices.Contains(words(cells[4]), value) {
				t.Errorf("%s: its meaning in the README does not name the label's value %s", name, value)
			}
		}
	}
	for name := range exposed {
		if !documented[name] {
			t.Errorf("%s is exposed, but not documented", name)
		}
	}
}

// TestREADME_WatchAndSteer runs every line of the two recipes in a shell, with clients that make it succeed.
func TestREADME_WatchAndSteer(t *testing.T) {
	const lobby = "http://localhost:9080/chat/lobby"
	inREADME := strings.NewReplacer(
		"localhost:2019", adminAddr, "https://example.com/", "http://localhost:9080/",
		"https:%2F%2Fexample.com%2F", "http:%2F%2Flocalhost:9080%2F")
	findProgram(t, "curl")
	findProgram(t, "sh")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := startCaddy(t, "http://localhost:9080 {\nchat_broadcast {\nuser {header.X-User}\n}\n}")
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "state.bin"), []byte{0, 0xff}, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(program, filepath.Join(folder, "caddy")); err != nil {
		t.Fatal(err)
	}
	for _, recipe := range []string{"admin", "command"} {
		ran := 0
		for line := range strings.Lines(readmeBlock(t, "recipe: "+recipe)) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			ran++
			t.Run(line, func(t *testing.T) {
				p, other := join(t, "/chat/lobby", "X-User: ada\r\n"), join(t, "/chat/other")
				var page clientsPage
				s.ask("GET", strings.TrimPrefix(hubPath(lobby), "/chat_broadcast"), "", "", &page)
				line := strings.ReplaceAll(inREADME.Replace(line), "dq3e5qf4t0xs", page.Clients[0].ID)
				follows := strings.Contains(line, "curl -N") || strings.Contains(line, " tail ")

				cmd := exec.Command("sh", "-c", "exec "+line)
				if strings.Contains(line, "|") { // which exec knows nothing of
					cmd = exec.Command("sh", "-c", line)
				}
				cmd.Dir = folder
				cmd.Env = append(os.Environ(), asCaddy+"=1", "CADDY_ADMIN="+adminAddr, "PATH="+folder+":"+os.Getenv("PATH"))
				var out, stderr output
				cmd.Stdout, cmd.Stderr = &out, &stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				if follows {
					eventually(t, "somebody to follow the hub", func() bool { return taps() == 1 })
					p.text("hello")
					eventually(t, "the message to be shown", func() bool { return strings.Contains(out.String(), "hello") })
					_ = cmd.Process.Kill()
					_ = cmd.Wait() // killed
					eventually(t, "nobody to follow the hub", func() bool { return taps() == 0 })
				} else if err := cmd.Wait(); err != nil || strings.Contains(out.String(), "error") {
					t.Fatalf("got %v, %s%s", err, out.String(), stderr.String())
				}

				switch {
				case strings.Contains(line, "Maintenance"):
					p.wantText("Maintenance at noon")
				case strings.Contains(line, "state.bin"):
					if got, want := p.next(), (frame{websocket.BinaryMessage, "\x00\xff"}); got != want {
						t.Errorf("got %v, want %v", got, want)
					}
				case strings.Contains(line, "from a pipe"):
					p.wantText("from a pipe")
				case strings.Contains(line, "DELETE"), strings.Contains(line, "kick"):
					p.wantClose(websocket.ClosePolicyViolation, "kicked")
				case strings.Contains(line, "after="):
					if !strings.Contains(out.String(), "http://localhost:9080/chat/other") || strings.Contains(out.String(), lobby) {
						t.Errorf("got %s", out.String())
					}
				case !follows:
					if !strings.Contains(out.String(), lobby) && !strings.Contains(out.String(), "ada") {
						t.Errorf("got %s", out.String())
					}
				}
				p.conn.Close()
				other.conn.Close()
				eventually(t, "the hubs to be gone", func() bool { return len(hubs.allHubs()) == 0 })
			})
		}
		if ran < 8 {
			t.Errorf("the recipe %s has %d lines", recipe, ran)
		}
	}
}
