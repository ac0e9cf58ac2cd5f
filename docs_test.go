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

// startRecipe runs a recipe of the documents on the test's addresses.
func startRecipe(t *testing.T, name string, replacements ...string) *server {
	t.Helper()
	return startRecipeBeside(t, "", name, replacements...)
}

// startRecipeBeside runs a recipe of the documents on the test's addresses, and beside it other sites.
func startRecipeBeside(t *testing.T, sites, name string, replacements ...string) *server {
	t.Helper()
	recipe := docBlock(t, "recipe: "+name)
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

// documents returns the text of every document, by its path.
func documents(t testing.TB) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, pattern := range []string{"*.md", "client/*.md", "docs/*.md", "docs/*/*.md"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			texts[filepath.ToSlash(path)] = readDocument(t, path)
		}
	}
	return texts
}

func readDocument(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// docBlock returns the fenced block below a comment of the documents. Where several documents have that block, they must
// have the same.
func docBlock(t testing.TB, comment string) string {
	t.Helper()
	fenced := regexp.MustCompile("(?s)<!-- " + regexp.QuoteMeta(comment) + " -->\n```[a-z]*\n(.*?)```\n")
	block := ""
	for path, text := range documents(t) {
		for _, match := range fenced.FindAllStringSubmatch(text, -1) {
			if block != "" && match[1] != block {
				t.Fatalf("%s has another block %q than another document", path, comment)
			}
			block = match[1]
		}
	}
	if block == "" {
		t.Fatalf("no document has a block %q", comment)
	}
	return block
}

// tableRows returns the rows of the table of a document that has the given header, without the line below the header.
func tableRows(t testing.TB, path, header string) []string {
	t.Helper()
	_, table, found := strings.Cut(readDocument(t, path), header+"\n")
	if !found {
		t.Fatalf("%s has no table %q", path, header)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	rows := strings.Split(table, "\n")
	return rows[1:]
}

// postAsDocumented sends the POST that a command line or a URL in the documents stands for, after the shell has filled in its
// variables, with body where the line has none.
func postAsDocumented(t *testing.T, name, body string) answer {
	t.Helper()
	line := docBlock(t, "request: "+name)
	url := regexp.MustCompile(`https://example\.com(\S*)`).FindStringSubmatch(line)
	if url == nil {
		t.Fatalf("the documents' %s has no URL", name)
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

func TestDocs_Static(t *testing.T) {
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

func TestDocs_History(t *testing.T) {
	startRecipe(t, "history")
	first := join(t, "/chat/lobby")
	for i := range 110 {
		first.text(fmt.Sprint(i))
		first.wantText(fmt.Sprint(i))
	}
	second := joinEvents(t, "/chat/lobby")
	if second.hello.Replay != 100 || second.hello.Head != 110 {
		t.Errorf("got %s, want the last 100 of 110 messages", second.hello.raw)
	}
	for i := 10; i < 110; i++ {
		if e := second.want("message"); e.text() != fmt.Sprint(i) {
			t.Fatalf("got %s, want message %d", e.raw, i)
		}
	}
	if e := second.want("presence"); e.Clients != 2 {
		t.Errorf("got %s, want that 2 clients are here", e.raw)
	}
}

func TestDocs_HandlePath(t *testing.T) {
	startRecipe(t, "handle_path")
	a, b := join(t, "/v1/lobby"), join(t, "/v2/lobby")
	a.text("hello")
	b.wantText("hello")
}

func TestDocs_KindsOfHubs(t *testing.T) {
	startRecipe(t, "kinds")
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
	for range 6 { // ten with a, b, other and player, whose connection is still open
		join(t, "/chat/a")
	}
	refused(t, 429, "/chat/a")
}

func TestDocs_Names(t *testing.T) {
	startRecipe(t, "names", "www.example.com", "http://127.0.0.1:9080")
	a := join(t, "/chat/a")
	b := joinOn(t, a.dial(), "127.0.0.1:9080", "/chat/a")
	other := joinOn(t, a.dial(), "127.0.0.1:9080", "/chat/b")
	a.text("hello")
	b.wantText("hello")
	other.text("elsewhere")
	other.wantText("elsewhere")
}

func TestDocs_Members(t *testing.T) {
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

func TestDocs_ForwardAuth(t *testing.T) {
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

func TestDocs_Proxy(t *testing.T) {
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

func TestDocs_ProxyClientsCannotForgeTheirAddress(t *testing.T) {
	startRecipeBeside(t, proxySite("127.0.0.1:9080"), "proxy", "127.0.0.0/8", "127.0.0.1") // the client is none of the proxies
	wantTenOfTwenty(t)
}

func TestDocs_ProxyOnAUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "chat.sock")
	startRecipeBeside(t, proxySite("unix/"+socket), "proxy_unix", "/run/caddy/chat.sock", socket)
	wantTenOfTwenty(t)
}

func TestDocs_ProxyOnAUnixSocketWithoutTrustLogsAWarning(t *testing.T) {
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

// tokenFile returns the path of a file in which token stands as a line. The path is the one in the document, for a replacement.
func tokenFile(t *testing.T, name, token string) (documented, path string) {
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

func TestDocs_Publish(t *testing.T) {
	t.Setenv("PUBLISH_TOKEN", "secret")
	t.Setenv("GITHUB_REF_NAME", "v1.0.0")
	documented, file := tokenFile(t, "publish-token", "secret")
	s := startRecipe(t, "publish", documented, file)
	p := join(t, "/news")
	postAsDocumented(t, "curl", "").wantPublished(t, 1, 1)
	p.wantText(`{"title": "We are live"}`)
	postAsDocumented(t, "ci", "").wantPublished(t, 1, 2)
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

func TestDocs_PublishFromPython(t *testing.T) {
	python := findProgram(t, "python3")
	documented, file := tokenFile(t, "publish-token", "secret")
	startRecipe(t, "publish", documented, file)
	p := join(t, "/news")
	for _, tc := range []struct{ token, want string }{
		{"secret", `{"clients":1,"seq":1}`},
		{"wrong", "HTTPError: HTTP Error 403"},
	} {
		cmd := exec.Command(python, "-")
		cmd.Stdin = strings.NewReader(strings.ReplaceAll(docBlock(t, "python: publish"), "https://example.com", "http://"+httpAddr))
		cmd.Env = append(os.Environ(), "PUBLISH_TOKEN="+tc.token)
		if got, _ := cmd.CombinedOutput(); !strings.Contains(string(got), tc.want) {
			t.Errorf("with the token %s: got %s, want %s", tc.token, got, tc.want)
		}
	}
	p.wantText("The backup is done")
}

// TestDocs_PublishWithoutToken is about the recipe's header_regexp. HTTP/2 keeps the space in an Authorization of
// "Bearer ". The recipe's header line becomes just that where the file is missing or empty.
func TestDocs_PublishWithoutToken(t *testing.T) {
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

func TestDocs_Webhook(t *testing.T) {
	t.Setenv("HOOK_TOKEN", "topsecret")
	documented, file := tokenFile(t, "hook-token", "topsecret")
	s := startRecipe(t, "webhook", documented, file, "\tlog {", "\tdebug\n\tlog {", // so that every error is logged
		"\trespond @stranger 403\n", "\trespond @stranger 403\n\thandle_errors {\n\t\trespond {err.message}\n\t}\n")
	p := join(t, "/builds")
	const payload = `{"status": "passed"}`
	postAsDocumented(t, "webhook", payload).wantPublished(t, 1, 1)
	p.wantText(payload)
	for _, path := range []string{"/builds", "/builds?token=", "/builds?token=wrong", "/builds?token=*"} {
		if got := publish(t, path, payload); got.status != http.StatusForbidden {
			t.Errorf("%s: got %d, want 403", path, got.status)
		}
	}
	if got := postAsDocumented(t, "webhook", "\xff"); got.status != http.StatusBadRequest {
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

func TestDocs_Metrics(t *testing.T) {
	got := func() string { return request(t, http.MethodGet, "http://"+httpAddr+"/metrics", nil).body }
	s := startRecipe(t, "metrics", "192.0.2.7", "127.0.0.1 ::1")
	if body := got(); !strings.Contains(body, "\ncaddy_chat_broadcast_clients 0\n") {
		t.Errorf("got %.200q for Prometheus, want the metrics", body)
	}
	recipe := docBlock(t, "recipe: metrics")
	s.load(strings.ReplaceAll(recipe, "example.com", "http://localhost:9080"))
	if body := got(); body != "" {
		t.Errorf("got %.200q for somebody else, want nothing", body)
	}
}

// TestDocs_MetricsMatchTheEndpoint compares the list of metrics with the endpoint.
func TestDocs_MetricsMatchTheEndpoint(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\n\tchat_broadcast /chat/*\n}")
	_, list, found := strings.Cut(readDocument(t, "docs/operating.md"), "All names begin with `caddy_chat_broadcast_`.")
	list, _, ended := strings.Cut(list, "\n#")
	if !found || !ended {
		t.Fatal("docs/operating.md has no list of metrics")
	}
	documented := map[string]bool{}
	exposed := scrape(t)
	item := regexp.MustCompile("(?s)^`([a-z_]+)` \\(([a-z]+)((?:, `[a-z_]+`)*)\\): (.*)$")
	quoted := regexp.MustCompile("`([a-z_]+)`")
	words := func(text string) (words []string) {
		for _, match := range quoted.FindAllStringSubmatch(text, -1) {
			words = append(words, match[1])
		}
		slices.Sort(words)
		return words
	}
	for _, text := range strings.Split(list, "\n- ")[1:] {
		parts := item.FindStringSubmatch(text)
		if parts == nil {
			t.Fatalf("%q is not an item of the list of metrics", text)
		}
		name, kind, labeled, meaning := parts[1], parts[2], parts[3], parts[4]
		documented[name] = true
		if exposed[name] == nil {
			t.Errorf("%s is documented, but not exposed", name)
			continue
		}
		if got, want := kind, strings.ToLower(exposed[name].GetType().String()); got != want {
			t.Errorf("%s: got type %s in the document, want %s", name, got, want)
		}
		labels, values := map[string]bool{}, map[string]bool{}
		for _, m := range exposed[name].GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = true
				values[l.GetValue()] = true
			}
		}
		if got, want := words(labeled), slices.Sorted(maps.Keys(labels)); !slices.Equal(got, want) {
			t.Errorf("%s: got labels %v in the document, want %v", name, got, want)
		}
		if name == "closes_total" {
			continue // its values are in another table, which TestDocs_CloseCodes compares
		}
		for value := range values {
			if !slices.Contains(words(meaning), value) {
				t.Errorf("%s: its meaning in the document does not name the label's value %s", name, value)
			}
		}
	}
	for name := range exposed {
		if !documented[name] {
			t.Errorf("%s is exposed, but not documented", name)
		}
	}
}

// TestDocs_AdminCommands runs every line of the two recipes in a shell, with clients that make it succeed.
func TestDocs_AdminCommands(t *testing.T) {
	const lobby = "http://localhost:9080/chat/lobby"
	documented := strings.NewReplacer(
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
		for line := range strings.Lines(docBlock(t, "recipe: "+recipe)) {
			line = strings.TrimSpace(line)
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			ran++
			t.Run(line, func(t *testing.T) {
				p, other := join(t, "/chat/lobby", "X-User: ada\r\n"), join(t, "/chat/other")
				var page clientsPage
				s.ask("GET", strings.TrimPrefix(hubPath(lobby), "/chat_broadcast"), "", "", &page)
				line := strings.ReplaceAll(documented.Replace(line), "dq3e5qf4t0xs", page.Clients[0].ID)
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
				case strings.Contains(line, "nodes"):
					if !strings.Contains(out.String(), "memory") {
						t.Errorf("got %s", out.String())
					}
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
