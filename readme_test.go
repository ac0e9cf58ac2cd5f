package chatbroadcast

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
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
	recipe := readmeBlock(t, "recipe: "+name)
	recipe = strings.NewReplacer(append(replacements, "example.com", "http://localhost:9080")...).Replace(recipe)
	options := ""
	if global, ok := strings.CutPrefix(recipe, "{\n"); ok { // the harness has its own
		options, recipe, _ = strings.Cut(global, "\n}\n")
	}
	s := startCaddy(t, "")
	s.loadWith(options, recipe)
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

func TestREADME_Proxy(t *testing.T) {
	s := startRecipe(t, "proxy")
	const client = "X-Forwarded-For: 203.0.113.7\r\n"
	for range 10 {
		join(t, "/chat/a", client)
	}
	refused(t, 429, "/chat/a", client)
	p := join(t, "/chat/a", "X-Forwarded-For: 2001:db8::1\r\n") // somebody else
	p.conn.Close()
	if got := s.logged(moduleID, 1)[0]["client_ip"]; got != "2001:db8::1" {
		t.Errorf("got client_ip %v, want the address that the proxy forwarded", got)
	}
}

func TestREADME_Publish(t *testing.T) {
	t.Setenv("PUBLISH_TOKEN", "secret")
	t.Setenv("GITHUB_REF_NAME", "v1.0.0")
	s := startRecipe(t, "publish")
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
	p.text("me too")
	p.wantClose(websocket.ClosePolicyViolation, "read_only")
}

// TestREADME_PublishWithoutToken is about the recipe's expression. HTTP/2 keeps the space in an Authorization of
// "Bearer ", which is what the recipe's header line comes to where the variable is not set.
func TestREADME_PublishWithoutToken(t *testing.T) {
	t.Setenv("PUBLISH_TOKEN", "")
	const header = "\theader Authorization \"Bearer {env.PUBLISH_TOKEN}\"\n"
	for _, tc := range []struct {
		name, with string
		want       int
	}{
		{"the recipe", header, http.StatusForbidden},
		{"the recipe without its expression", header + "\t}\n\t@unused {\n", http.StatusAccepted},
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
	s := startRecipe(t, "webhook", "\tlog {", "\tdebug\n\tlog {") // so that every error is logged
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
	s.logged("http.log.access", 7) // the handshake, too
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
	got := func() string {
		t.Helper()
		resp, err := http.Get("http://" + httpAddr + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
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
