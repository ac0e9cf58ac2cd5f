package chatbroadcast

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// A visit is a handshake, as far as it matters for the hub.
type visit struct {
	addr string // as in "127.0.0.1:9080"
	host string // the Host header
	path string
}

// dial connects to the visit's address, over TLS on the port for that.
func (v visit) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", ported(v.addr))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(v.addr, ":9443") {
		return conn
	}
	return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"})
}

func TestSite_DefaultHubsOfTwoSitesAreApart(t *testing.T) {
	const (
		addr  = "127.0.0.1:9080"
		other = "127.0.0.1:9081"
		chat  = "\tchat_broadcast {\n\t\thistory 10\n\t}\n"
	)
	for _, tc := range []struct {
		name, sites string
		hubs        map[string][]visit // by the name of the hub that they join
		refused     []visit            // with 400
	}{
		{
			name:  "two ports",
			sites: "http://localhost:9080 {\n" + chat + "}\nhttp://:9081 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://localhost:9080/staff/secret":   {{addr, "localhost", "/staff/secret"}, {addr, "LOCALHOST:1", "/staff/secret"}},
				"http://*:9081/localhost/staff/secret": {{other, "localhost", "/staff/secret"}, {other, "localhost:9080", "/staff/secret"}, {other, "LocalHost.", "/staff/secret"}},
			},
		},
		{
			name:  "http and https",
			sites: "http://localhost:9080 {\n" + chat + "}\nhttps://localhost:9443 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://localhost:9080/a":  {{addr, "localhost:9443", "/a"}},
				"https://localhost:9443/a": {{"127.0.0.1:9443", "localhost:9080", "/a"}},
			},
		},
		{
			name:  "a catch-all beside a named site",
			sites: "http://example.test:9080 {\n" + chat + "}\nhttp://:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://example.test:9080/a":               {{addr, "example.test", "/a"}, {addr, "Example.TEST", "/a"}, {addr, "example.test:9080", "/a"}, {addr, "example.test:", "/a"}},
				"http://*:9080/example.test./a":            {{addr, "example.test.", "/a"}, {addr, "EXAMPLE.test.:9080", "/a"}},
				"http://*:9080/other.test/a":               {{addr, "other.test", "/a"}, {addr, "Other.Test.", "/a"}, {addr, "other.test.:9080", "/a"}},
				"http://*:9080/other.test/example.test./a": {{addr, "other.test", "/example.test./a"}},
				"http://*:9080/[::1]/a":                    {{addr, "[::1]", "/a"}, {addr, "[::1]:9080", "/a"}, {addr, "[0:0::1]", "/a"}},
				"http://*:9080/127.0.0.1/a":                {{addr, "127.0.0.1", "/a"}, {addr, "127.0.0.1.", "/a"}},
			},
			refused: []visit{
				{addr, "example.test%2F", "/a"},
				{addr, "example.test@", "/a"},
				{addr, "*", "/a"},
				{addr, "a,b", "/a"},
				{addr, "example.test..", "/a"},
				{addr, ".example.test", "/a"},
				{addr, "example..test", "/a"},
				{addr, "[::1%25lo]", "/a"},
				{addr, "bücher.example", "/a"},
				{addr, ":9080", "/a"},
			},
		},
		{
			name:  "a catch-all beside an address",
			sites: "http://[::1]:9080 {\n" + chat + "}\nhttp://:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://[::1]:9080/a":     {{addr, "[::1]", "/a"}, {addr, "[::1]:9080", "/a"}},
				"http://*:9080/[0::1]/a":  {{addr, "[0::1]", "/a"}},
				"http://*:9080/[::2]/a":   {{addr, "[0::2]", "/a"}},
				"http://*:9080/[::2]/a/b": {{addr, "[0::2]", "/a/b"}},
			},
		},
		{
			name:  "a name in another script",
			sites: "http://bücher.test:9080 {\n" + chat + "}\nhttp://:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://xn--bcher-kva.test:9080/a":    {{addr, "xn--bcher-kva.test", "/a"}, {addr, "XN--Bcher-KVA.test:9080", "/a"}},
				"http://*:9080/xn--bcher-kva.test./a": {{addr, "xn--bcher-kva.test.", "/a"}},
			},
			refused: []visit{{addr, "bücher.test", "/a"}, {addr, "b%C3%BCcher.test", "/a"}},
		},
		{
			name:  "wildcards",
			sites: "http://a.example.test:9080 {\n" + chat + "}\nhttp://*.example.test:9080 {\n" + chat + "}\nhttp://:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://a.example.test:9080/a":                {{addr, "A.example.test", "/a"}},
				"http://*.example.test:9080/b.example.test/a": {{addr, "B.example.test", "/a"}, {addr, "b.example.test:9080", "/a"}},
				"http://*:9080/a.example.test./a":             {{addr, "a.example.test.", "/a"}},
				"http://*:9080/b.example.test./a":             {{addr, "b.example.test.", "/a"}},
			},
			refused: []visit{{addr, "*.example.test", "/a"}, {addr, "*.example.test", "/b.example.test/a"}},
		},
		{
			name:  "a host within a wildcard site",
			sites: "http://*.example.test:9080 {\n\t@a host a.example.test\n\thandle @a {\n" + chat + "}\n\thandle {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://a.example.test:9080/a":                {{addr, "a.example.test", "/a"}},
				"http://*.example.test:9080/b.example.test/a": {{addr, "b.example.test", "/a"}},
			},
		},
		{
			name:  "a guard that compares the host in an expression",
			sites: "http://:9080 {\n\t@staff expression `{http.request.host} == \"staff.test\"`\n\thandle @staff {\n" + chat + "}\n\thandle {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://*:9080/staff.test/a":   {{addr, "staff.test", "/a"}},
				"http://*:9080/STAFF.test/a":   {{addr, "STAFF.test", "/a"}},
				"http://*:9080/staff.test./a":  {{addr, "staff.test.", "/a"}},
				"http://*:9080/staff.test:1/a": {{addr, "staff.test:1", "/a"}},
			},
		},
		{
			name:  "guards that compare the header Host, or a variable",
			sites: "http://:9080 {\n\t@staff header Host staff.test\n\thandle @staff {\n" + chat + "}\n\t@ops vars {http.request.host} ops.test\n\thandle @ops {\n" + chat + "}\n\thandle {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://*:9080/staff.test/a":   {{addr, "staff.test", "/a"}},
				"http://*:9080/staff.test:1/a": {{addr, "staff.test:1", "/a"}},
				"http://*:9080/ops.test/a":     {{addr, "ops.test", "/a"}},
				"http://*:9080/OPS.test/a":     {{addr, "OPS.test", "/a"}},
			},
		},
		{
			name:  "an expression that does not look at the host",
			sites: "http://:9080 {\n\t@get expression `{method} == \"GET\"`\n\thandle @get {\n" + chat + "}\n}",
			hubs:  map[string][]visit{"http://*:9080/staff.test/a": {{addr, "staff.test", "/a"}, {addr, "STAFF.test.:9080", "/a"}}},
		},
		{
			name: "two addresses",
			sites: "http://localhost:9080 {\n\tbind 127.0.0.2\n" + chat + "}\nhttp://localhost:9080 {\n\tbind 127.0.0.3\n" + chat + "}\n" +
				"http://:9080 {\n\tbind 127.0.0.3\n" + chat + "}",
			hubs: map[string][]visit{
				"http://localhost@127.0.0.2:9080/a":   {{"127.0.0.2:9080", "localhost", "/a"}},
				"http://localhost@127.0.0.3:9080/a":   {{"127.0.0.3:9080", "localhost", "/a"}},
				"http://*@127.0.0.3:9080/127.0.0.2/a": {{"127.0.0.3:9080", "127.0.0.2", "/a"}},
			},
		},
		{
			name:  "one site on two addresses",
			sites: "http://localhost:9080 {\n\tbind 127.0.0.2 ::1\n" + chat + "}",
			hubs: map[string][]visit{
				"http://localhost@127.0.0.2:9080/a": {{"127.0.0.2:9080", "localhost", "/a"}, {"[::1]:9080", "localhost", "/a"}},
			},
		},
		{
			name:  "prefixes that handle_path strips",
			sites: "http://localhost:9080 {\n\thandle_path /one/* {\n" + chat + "}\n\thandle_path /two/* {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://localhost:9080/one/a": {{addr, "localhost", "/one/a"}, {addr, "localhost", "/one/%61?two"}},
				"http://localhost:9080/two/a": {{addr, "localhost", "/two/a"}},
			},
		},
		{
			name: "a hub value from the request",
			sites: "http://example.test:9080 {\n" + chat + "}\nhttp://:9080 {\n" +
				strings.Replace(chat, "{", "{query.room}{header.X-Room} {", 1) + "}",
			hubs: map[string][]visit{
				"http://example.test:9080/a": {{addr, "example.test", "/a"}},
				"HTTP://example.test:9080/a": {{addr, "localhost", "/?room=HTTP://example.test:9080/a"}},
			},
			refused: []visit{
				{addr, "localhost", "/?room=http://example.test:9080/a"},
				{addr, "localhost", "/?room=https://example.test/a"},
				{addr, "localhost", "/?room=http:/\r\nX-Room: /example.test:9080/a"},
				{addr, "localhost", "/?room=http://"},
			},
		},
		{
			name: "one named route for both",
			sites: "&(chat) {\n" + chat + "}\nhttp://a.test:9080 {\n\tinvoke chat\n}\nhttp://*.test:9080 {\n\tinvoke chat\n}\n" +
				"http://:9081 {\n\tinvoke chat\n}",
			hubs: map[string][]visit{
				"http://a.test:9080/a":        {{addr, "a.test", "/a"}},
				"http://*.test:9080/b.test/a": {{addr, "b.test", "/a"}},
				"http://*:9081/a.test/a":      {{other, "a.test", "/a"}, {other, "a.test.", "/a"}},
			},
		},
		{
			name:  "two names of one site",
			sites: "http://example.test:9080, http://www.example.test:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://example.test:9080/a":     {{addr, "example.test", "/a"}},
				"http://www.example.test:9080/a": {{addr, "www.example.test", "/a"}},
			},
		},
		{
			name:  "a matcher for one host of a catch-all",
			sites: "http://:9080 {\n\t@staff host staff.test\n\troute {\n\t\theader @staff X-Guarded yes\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://*:9080/staff.test/a":  {{addr, "staff.test", "/a"}, {addr, "STAFF.test:80", "/a"}},
				"http://*:9080/staff.test./a": {{addr, "staff.test.", "/a"}},
				"http://*:9080/other.test/a":  {{addr, "other.test", "/a"}, {addr, "other.test.", "/a"}},
			},
		},
		{
			name:  "a matcher for all hosts but one",
			sites: "http://:9080 {\n\t@open not host staff.test\n\thandle @open {\n" + chat + "}\n\thandle {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://*:9080/staff.test/a":  {{addr, "staff.test", "/a"}},
				"http://*:9080/staff.test./a": {{addr, "staff.test.", "/a"}},
			},
		},
		{
			name:  "a route that changes the host",
			sites: "http://a.test:9080 {\n\trequest_header Host b.test\n" + chat + "}\nhttp://b.test:9080 {\n" + chat + "}",
			hubs: map[string][]visit{
				"http://?:9080/b.test/a": {{addr, "a.test", "/a"}},
				"http://b.test:9080/a":   {{addr, "b.test", "/a"}},
			},
		},
		{
			name: "routes for errors",
			sites: "http://a.test:9080 {\n\terror 404\n\thandle_errors {\n" + chat + "}\n}\nhttp://:9080 {\n\troute {\n\t\terror 404\n\t}\n" +
				"\thandle_errors {\n" + chat + "}\n}",
			hubs: map[string][]visit{
				"http://a.test:9080/a":    {{addr, "a.test", "/a"}},
				"http://*:9080/a.test./a": {{addr, "a.test.", "/a"}},
				"http://*:9080/b.test/a":  {{addr, "b.test.", "/a"}},
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			startCaddy(t, tc.sites)
			if strings.Contains(tc.sites, "https://") {
				dialTLS(t).Close() // there is a certificate
			}
			for name, visits := range tc.hubs {
				v := visits[0]
				p := joinOn(t, v.dial(t), v.host, v.path)
				p.text("only in " + name)
				p.wantText("only in " + name)
			}
			for name, visits := range tc.hubs {
				for _, v := range visits {
					p := joinEventsOn(t, v.dial(t), v.host, v.path)
					if p.hello.Hub != ported(name) || p.hello.Replay != 1 {
						t.Errorf("%v: got hub %s with %d messages, want %s with 1", v, p.hello.Hub, p.hello.Replay, name)
					}
					if e := p.event(); e.Data == nil || *e.Data != "only in "+name {
						t.Errorf("%v: got %s", v, e.raw)
					}
				}
			}
			for _, v := range tc.refused {
				_, resp := handshakeOn(t, v.dial(t), handshakeRequest(v.host, v.path, ""))
				if resp.StatusCode != http.StatusBadRequest {
					t.Errorf("%v: got status %s, want 400", v, resp.Status)
				}
			}
		})
	}
}

func TestSite_DefaultHubSurvivesAReloadThatAddsASite(t *testing.T) {
	const chat = "{\n\tchat_broadcast {\n\t\thistory 10\n\t}\n}\n"
	s := startCaddy(t, "http://b.test:9080 "+chat)
	visit := visit{"127.0.0.1:9080", "b.test", "/a"}
	p := joinOn(t, visit.dial(t), visit.host, visit.path)
	for i, sites := range []string{
		"http://b.test:9080 " + chat,
		"http://a.test:9080 " + chat + "http://b.test:9080 " + chat,
		"http://a.test:9081 " + chat + "http://:9080 " + chat + "http://b.test:9080 " + chat,
		"http://b.test:9080, http://c.test:9080 " + chat,
	} {
		s.load(sites)
		p.text(sites)
		p.wantText(sites)
		q := joinEventsOn(t, visit.dial(t), visit.host, visit.path)
		if h := q.hello; h.Hub != ported("http://b.test:9080/a") || h.Head != i+1 || h.Replay != i+1 || h.Clients != 2 {
			t.Errorf("%s: got %s", sites, h.raw)
		}
		q.conn.Close()
		eventually(t, "the second client to be gone", func() bool { return hubMembers(ported("http://b.test:9080/a")) == 1 })
	}
}

// TestDocs_DefaultHubs includes ports that only a privileged process can listen on.
func TestDocs_DefaultHubs(t *testing.T) {
	var names []string
	for _, tc := range []struct {
		listen, pattern, host string
		tls                   *tls.ConnectionState
		want                  string
	}{
		{":443", "example.com", "example.com", new(tls.ConnectionState), "https://example.com/chat/lobby"},
		{":8080", "localhost", "localhost:8080", nil, "http://localhost:8080/chat/lobby"},
		{":8080", "", "localhost:8080", nil, "http://*:8080/localhost/chat/lobby"},
		{":443", "*.example.com", "a.example.com", new(tls.ConnectionState), "https://*.example.com/a.example.com/chat/lobby"},
		{"10.0.0.1:443", "example.com", "example.com", new(tls.ConnectionState), "https://example.com@10.0.0.1/chat/lobby"},
		// These are not in docs/caddyfile.md.
		{":80", "example.com", "example.com", nil, "http://example.com/chat/lobby"},
		{":80", "example.com", "example.com", new(tls.ConnectionState), "https://example.com:80/chat/lobby"},
		{"[::1]:443", "example.com", "example.com", nil, "http://example.com@[::1]:443/chat/lobby"},
		{"unix//run/caddy.sock", "", "[::1]", nil, "http://*@unix%2F%2Frun%2Fcaddy.sock/[::1]/chat/lobby"},
		{"unix//run/caddy.sock|0660", "", "[::1]", nil, "http://*@unix%2F%2Frun%2Fcaddy.sock/[::1]/chat/lobby"},
	} {
		names = append(names, tc.want)
		h := new(Handler)
		route := caddyhttp.Route{Handlers: []caddyhttp.MiddlewareHandler{h}}
		if tc.pattern != "" {
			route.MatcherSets = caddyhttp.MatcherSets{{&caddyhttp.MatchHost{tc.pattern}}}
		}
		server := &caddyhttp.Server{Listen: []string{tc.listen}, Routes: caddyhttp.RouteList{route}}
		r := httptest.NewRequest(http.MethodGet, "/chat/lobby", nil)
		r.Host, r.TLS = tc.host, tc.tls
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, server)
		if got, err := newPlacement(h, server).hubName(r); got != tc.want || err != nil {
			t.Errorf("%s on %s: got %s, error %v, want %s", tc.pattern, tc.listen, got, err, tc.want)
		}
	}
	for _, row := range tableRows(t, "docs/caddyfile.md", "| site | request | hub |") {
		if !slices.ContainsFunc(names, func(name string) bool { return strings.HasSuffix(row, "`"+name+"` |") }) {
			t.Errorf("no case has the name in %s", row)
		}
	}
}

func TestSite_HandlesErrors(t *testing.T) {
	startCaddy(t, `http://a.test:9080 {
	chat_broadcast
	handle_errors {
		respond "sorry"
	}
}
http://b.test:9080 {
	chat_broadcast
}`)
	app, err := caddy.ActiveContext().App("http")
	if err != nil {
		t.Fatal(err)
	}
	var server *caddyhttp.Server
	for _, server = range app.(*caddyhttp.App).Servers {
		break
	}
	for i, want := range map[int]bool{0: true, 1: false} {
		host := fmt.Sprintf("%c.test", 'a'+i)
		subroute := server.Routes[i].Handlers[0].(*caddyhttp.Subroute)
		h := subroute.Routes[0].Handlers[0].(*Handler)
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+host, nil)
		if err != nil {
			t.Fatal(err)
		}
		r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, server)
		if got := h.placement().site(r).errorRoutes; got != want {
			t.Errorf("%s: got %v, want %v", host, got, want)
		}
	}
}
