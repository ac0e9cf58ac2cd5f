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

// sessionSite is the configuration that the session in docs/protocol.md describes. The test puts a client's name into the
// query.
const sessionSite = `http://example.com:9080, http://localhost:9080 {
	chat_broadcast /chat/* {
		user {http.request.uri.query.name}
		history 10
		presence
	}
}`

// A sessionStep is one line of the session: a client, its action, and what the action is about, such as a frame.
type sessionStep struct{ client, action, object string }

// documentedSession returns the session in docs/protocol.md.
func documentedSession(t *testing.T) (steps []sessionStep) {
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
	for line := range strings.Lines(string(block[1])) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" {
			continue
		}
		parts := step.FindStringSubmatch(line)
		if parts == nil {
			t.Fatalf("this line of the session is not a step: %s", line)
		}
		steps = append(steps, sessionStep{parts[1], parts[2], parts[3]})
	}
	return steps
}

// A sessionPeer is one connection of the session. bob's are raw, all others speak events.
type sessionPeer struct {
	*peer
	events *eventsPeer // nil if raw
	ahead  []incoming  // events that arrived before the session shows them
}

func joinSession(t *testing.T, name, target string) *sessionPeer {
	path, query, _ := strings.Cut(target, "?")
	path += "?name=" + name + "&" + query
	conn := (&peer{t: t}).dial()
	if name == "bob" {
		p, _ := handshakeOn(t, conn, handshakeRequest("example.com", path, ""))
		return &sessionPeer{peer: p}
	}
	p := joinEventsOn(t, conn, "example.com", path)
	return &sessionPeer{peer: p.peer, events: p, ahead: []incoming{p.hello}}
}

// receive returns the next event of that type. The protocol does not order answers and messages, so receive keeps events
// of other types for later.
func (p *sessionPeer) receive(kind string) incoming {
	for i, e := range p.ahead {
		if e.Type == kind {
			p.ahead = slices.Delete(p.ahead, i, i+1)
			return e
		}
	}
	for {
		e := p.events.event()
		if e.Type == kind {
			return e
		}
		p.ahead = append(p.ahead, e)
	}
}

// actual replaces the documented tokens and epochs in text with those of this run.
func (s *documentCheck) actual(text string) string {
	var known []field
	for documented := range s.stands {
		if documented.name == "token" || documented.name == "epoch" {
			known = append(known, documented)
		}
	}
	slices.SortFunc(known, func(a, b field) int { // tokens first, because a token begins with its epoch
		return cmp.Compare(len(b.value.(string)), len(a.value.(string)))
	})
	var pairs []string
	for _, documented := range known {
		pairs = append(pairs, documented.value.(string), s.stands[documented])
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

// TestProtocol_SessionGoesAsTheDocumentShows plays both sides of the session in docs/protocol.md. It sends each frame that
// a client sends there, and expects each frame that a client receives there, and no other. Ids, the epoch, tokens and
// times differ in each run, so a value of this run must stand for the same documented value throughout.
func TestProtocol_SessionGoesAsTheDocumentShows(t *testing.T) {
	server := startCaddy(t, sessionSite)
	s := newDocumentCheck(t, httpAddr)
	peers := map[string]*sessionPeer{}
	valid := func(definition, frame string) {
		t.Helper()
		if err := validate(protocolSchema(t, definition), frame); err != nil {
			t.Error(err)
		}
	}
	leave := func(name string) {
		t.Helper()
		for _, e := range peers[name].ahead {
			t.Errorf("%s received an event that the session does not show: %s", name, e.raw)
		}
		peers[name].conn.Close()
		delete(peers, name)
		eventually(t, "the server to know that "+name+" has left", func() bool {
			var page hubsPage
			server.ask(http.MethodGet, "/hubs", "", "", &page)
			return len(page.Hubs) == 1 && page.Hubs[0].Clients == len(peers)
		})
	}
	for _, step := range documentedSession(t) {
		p := peers[step.client]
		if (p == nil) != (step.action == "connects to") {
			t.Fatalf("%s %s: %s must connect first, and once", step.client, step.action, step.client)
		}
		switch step.action {
		case "connects to":
			peers[step.client] = joinSession(t, step.client, s.actual(step.object))
		case ">":
			if p.events != nil {
				valid("/$defs/strictFromClient", step.object)
			}
			p.text(s.actual(step.object))
		case "<":
			if p.events == nil {
				p.wantText(step.object)
				continue
			}
			valid("/$defs/strictFromServer", step.object)
			kind := fieldsOf(t, step.object)[0].value.(string) // type is the first field
			s.examples[step.object] = []string{step.object}
			s.want(step.object, p.receive(kind))
		case "loses the connection":
			leave(step.client)
		case "closes with":
			closeFrame := frame{websocket.CloseMessage, "\x03\xe8"}
			if step.object != "1000" {
				t.Errorf("the test closes with 1000 only, not with %s", step.object)
			}
			p.send(closeFrame.opcode, closeFrame.payload)
			if got := p.next(); got != closeFrame {
				t.Errorf("%s closes with 1000: got frame %v, want %v", step.client, got, closeFrame)
			}
			p.wantEOF()
			leave(step.client)
		}
	}
}
