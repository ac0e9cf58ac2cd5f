package chatbroadcast

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

// startRecipe runs a recipe of the README on the test's addresses.
func startRecipe(t *testing.T, name string, replacements ...string) *server {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, recipe, found := strings.Cut(string(readme), "<!-- recipe: "+name+" -->\n```\n")
	recipe, _, ended := strings.Cut(recipe, "```\n")
	if !found || !ended {
		t.Fatalf("the README has no recipe %q", name)
	}
	options := ""
	if global, ok := strings.CutPrefix(recipe, "{\n"); ok { // the harness has its own
		options, recipe, _ = strings.Cut(global, "\n}\n")
	}
	s := startCaddy(t, "")
	recipe = strings.NewReplacer(append(replacements, "example.com", "http://localhost:9080")...).Replace(recipe)
	s.loadWith(options, recipe)
	return s
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
