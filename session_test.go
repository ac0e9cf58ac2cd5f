package chatbroadcast

import (
	"cmp"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

// A sessionPeer is one of the two clients of the documented session.
type sessionPeer struct {
	*eventsPeer            // nil for a raw client
	raw         *peer      // of either kind
	ahead       []incoming // received, but not yet reached in the document
}

// receive returns the next event of that type. The protocol does not order answers and messages, so that others may come
// before it; they are kept.
func (p *sessionPeer) receive(kind string) incoming {
	for i, e := range p.ahead {
		if e.Type == kind {
			p.ahead = slices.Delete(p.ahead, i, i+1)
			return e
		}
	}
	for {
		e := p.event()
		if e.Type == kind {
			return e
		}
		p.ahead = append(p.ahead, e)
	}
}

// documentedSession returns the lines of the session in docs/protocol.md: who, what it does, and with what.
func documentedSession(t *testing.T) [][]string {
	t.Helper()
	document, err := os.ReadFile("docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)<!-- session -->\n```text\n(.*?)```").FindSubmatch(document)
	if block == nil {
		t.Fatal("docs/protocol.md has no session")
	}
	step := regexp.MustCompile(`^(\w+) (connects to|<|>|loses the connection|closes with) ?(.*)$`)
	var steps [][]string
	for line := range strings.Lines(string(block[1])) {
		if line = strings.TrimSuffix(line, "\n"); line == "" {
			continue
		}
		parts := step.FindStringSubmatch(line)
		if parts == nil {
			t.Fatalf("the session has a line that is no step: %s", line)
		}
		steps = append(steps, parts[1:])
	}
	return steps
}

// sessionSite is the configuration that the session in docs/protocol.md describes. The query has the names of its clients.
const sessionSite = `http://example.com:9080, http://localhost:9080 {
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
		history 10
		presence
	}
}`

// TestProtocol_SessionGoesAsTheDocumentShows plays both sides of the session at the beginning of docs/protocol.md: each
// documented frame is sent or must arrive, and no other frame may arrive. Ids, the epoch, tokens and times differ in each
// run; they must stand for the documented ones throughout.
func TestProtocol_SessionGoesAsTheDocumentShows(t *testing.T) {
	server := startCaddy(t, sessionSite)
	s := newScreenplay(t)
	// actual replaces documented tokens and epochs with those of this run.
	actual := func(documented string) string {
		var known []field
		for documented := range s.stands {
			if documented.name == "token" || documented.name == "epoch" {
				known = append(known, documented)
			}
		}
		slices.SortFunc(known, func(a, b field) int { // a token begins with its epoch
			return cmp.Compare(len(b.value.(string)), len(a.value.(string)))
		})
		var pairs []string
		for _, documented := range known {
			pairs = append(pairs, documented.value.(string), s.stands[documented])
		}
		return strings.NewReplacer(pairs...).Replace(documented)
	}
	peers := map[string]*sessionPeer{}
	connected := 0
	for _, step := range documentedSession(t) {
		name, verb, what := step[0], step[1], step[2]
		p := peers[name]
		switch {
		case verb == "connects to":
			path, query, _ := strings.Cut(actual(what), "?")
			path += "?name=" + name + "&" + query
			p = &sessionPeer{}
			if name == "bob" {
				p.raw, _ = handshakeOn(t, (&peer{t: t}).dial(), handshakeRequest("example.com", path, ""))
			} else {
				p.eventsPeer = joinEventsOn(t, (&peer{t: t}).dial(), "example.com", path)
				p.raw, p.ahead = p.peer, []incoming{p.hello}
			}
			peers[name] = p
			connected++
		case verb == ">":
			if p.eventsPeer != nil {
				if err := validate(protocolSchema(t, "/$defs/strictFromClient"), what); err != nil {
					t.Error(err)
				}
			}
			p.raw.text(actual(what))
		case verb == "<" && p.eventsPeer == nil:
			p.raw.wantText(what)
		case verb == "<":
			if err := validate(protocolSchema(t, "/$defs/strictFromServer"), what); err != nil {
				t.Error(err)
			}
			want := fieldsOf(t, what)
			s.examples[what] = []string{what}
			s.plays(what, p.receive(want[0].value.(string)))
		case verb == "loses the connection":
			p.raw.conn.Close()
			connected--
			eventually(t, "the server to know that "+name+" has gone", func() bool {
				var page hubsPage
				server.ask(http.MethodGet, "/hubs", "", "", &page)
				return len(page.Hubs) == 1 && page.Hubs[0].Clients == connected
			})
		case verb == "closes with":
			p.raw.send(websocket.CloseMessage, "\x03\xe8")
			if got, want := p.raw.next(), (frame{websocket.CloseMessage, "\x03\xe8"}); what != "1000" || got != want {
				t.Errorf("%s closes with %s: got frame %v, want %v", name, what, got, want)
			}
			p.raw.wantEOF()
		}
		if verb == "loses the connection" || verb == "closes with" {
			for _, e := range p.ahead {
				t.Errorf("%s received a frame that the document does not show: %s", name, e.raw)
			}
		}
	}
}
