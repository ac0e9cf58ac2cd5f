package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// refusals returns the log's lines about refusals, once they tell of at least n.
func (s *server) refusals(n int) []map[string]any {
	s.t.Helper()
	var lines []map[string]any
	eventually(s.t, fmt.Sprintf("the log to tell of %d refusals", n), func() bool {
		lines = nil
		told := 0
		for _, entry := range s.logged(moduleID, 0) {
			if entry["msg"] == "request refused" {
				lines = append(lines, entry)
				told += 1 + int(entry["omitted"].(float64))
			}
		}
		return told >= n
	})
	return lines
}

func TestRefusal_AnswerSaysWhy(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
	chat_broadcast /chat/* {
		max_message_size 5
		max_clients_per_hub 1
		http_publish
	}
	chat_broadcast /hub {
		hub {query.hub}
		user {query.user}
		http_publish
	}
	chat_broadcast /limited limited {
		max_clients_per_ip 1
		rate 1 1h
		http_publish
	}
}`)
	join(t, "/chat/full")
	join(t, "/limited")
	publish(t, "/limited", "x")
	handshake := handshakeRequest(httpAddr, "/chat/a", "")
	post := func(path, header, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n%s\r\n%s", path, httpAddr, len(body), header, body)
	}
	for _, tc := range []struct {
		name, request string
		status        int
		want          string
	}{
		{"another version of the protocol", strings.Replace(handshake, "13", "8", 1), 426, "the only supported Sec-WebSocket-Version is 13"},
		{"another method", strings.Replace(handshake, "GET", "PUT", 1), 405, "a WebSocket handshake is a GET request, not PUT"},
		{"a short key", strings.Replace(handshake, "dGhl", "", 1), 400, "Sec-WebSocket-Key"},
		{"another site's page", handshakeRequest(httpAddr, "/chat/a", "Origin: https://evil.example\r\n"), 403, `origin "https://evil.example" is not`},
		{"a long origin", handshakeRequest(httpAddr, "/chat/a", "Origin: https://"+strings.Repeat("x", 4000)+"\r\n"), 403, "xxx"},
		{"a sandboxed page", handshakeRequest(httpAddr, "/chat/a", "Origin: null\r\n"), 403, "origin null"},
		{"no hub", handshakeRequest(httpAddr, "/hub", ""), 400, "the hub's name is empty"},
		{"a user too long", handshakeRequest(httpAddr, "/hub?hub=a&user="+strings.Repeat("x", 1025), ""), 400, "user is longer than 1024 bytes"},
		{"a full hub", handshakeRequest(httpAddr, "/chat/full", ""), 503, "max_clients_per_hub"},
		{"too many from an address", handshakeRequest(httpAddr, "/limited", ""), 429, "max_clients_per_ip"},
		{"a POST that is too large", post("/chat/a", "", "123456"), 413, "the message is longer than 5 bytes"},
		{"a POST of another site's page", post("/chat/a", "Origin: https://evil.example\r\n", "x"), 403, "evil.example"},
		{"a POST that is not UTF-8", post("/chat/a", "", "\xff"), 400, "not valid UTF-8"},
		{"a compressed POST", post("/chat/a", "Content-Encoding: gzip\r\n", "x"), 415, "Content-Encoding"},
		{"a POST over the rate", post("/limited", "", "x"), 429, "rate"},
		{"a POST for no hub", post("/hub", "", "x"), 400, "the hub's name is empty"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, resp := handshakeOn(t, (&peer{t: t}).dial(), tc.request)
			body := make([]byte, max(0, resp.ContentLength))
			if _, err := p.r.Read(body); err != nil {
				t.Fatal(err)
			}
			got := string(body)
			if resp.StatusCode != tc.status || !strings.Contains(got, tc.want) {
				t.Errorf("got %s %q, want %d with %q", resp.Status, got, tc.status, tc.want)
			}
			if strings.Index(got, "\n") != len(got)-1 || len(got) > maxRefusalText+1 {
				t.Errorf("got %q, want one short line", got)
			}
			if got, want := resp.Header.Get("Content-Type"), "text/plain; charset=utf-8"; got != want {
				t.Errorf("Content-Type: got %q, want %q", got, want)
			}
		})
	}
}

func TestRefusal_IsLoggedAndCounted(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
	log_append refused {http.chat_broadcast.refused}
	log
	chat_broadcast {
		hub {path}
		user {header.X-User}
		max_clients_per_ip 1
		rate 1 1h
		max_message_size 1
		http_publish
	}
}`)
	before := scrape(t)
	join(t, "/a")
	refused(t, http.StatusTooManyRequests, "/a", "X-User: ada\r\n")
	refused(t, http.StatusForbidden, "/a", "Origin: https://evil.example\r\n")
	for _, want := range []int{http.StatusRequestEntityTooLarge, http.StatusTooManyRequests} {
		if got := publish(t, "/a", "too long", "X-User", "ada"); got.status != want {
			t.Fatalf("got %d, want %d", got.status, want)
		}
	}
	want := []map[string]any{
		{"reason": "max_clients_per_ip", "level": "warn", "status": 429.0, "hub": "/a", "user": "ada"},
		{"reason": "origin", "level": "info", "status": 403.0, "hub": "", "user": ""},
		{"reason": "message", "level": "info", "status": 413.0, "hub": "/a", "user": "ada"},
		{"reason": "rate", "level": "warn", "status": 429.0, "hub": "/a", "user": "ada"},
	}
	lines, accesses, after := s.refusals(len(want)), s.logged("http.log.access", 5), scrape(t)
	for i, want := range want {
		for field, value := range want {
			if got := lines[i][field]; got != value {
				t.Errorf("line %d, %s: got %v, want %v", i, field, got, value)
			}
		}
		if text, _ := lines[i]["error"].(string); text == "" || lines[i]["omitted"] != 0.0 || lines[i]["client_ip"] != "127.0.0.1" {
			t.Errorf("got %v", lines[i])
		}
		// The client has its answer before Caddy writes the line, so the lines come in any order.
		if !slices.ContainsFunc(accesses, func(line map[string]any) bool {
			return line["refused"] == want["reason"] && line["status"] == want["status"]
		}) {
			t.Errorf("access log: want a line with refused %v and status %v, got %v", want["reason"], want["status"], accesses)
		}
		reason := want["reason"].(string)
		if got := value(after["refusals_total"], reason) - value(before["refusals_total"], reason); got != 1 {
			t.Errorf("refusals_total of %s grew by %v, want 1", reason, got)
		}
	}
}

func TestRefusal_FloodTakesFewLogLines(t *testing.T) {
	s := startCaddy(t, `http://localhost:9080 {
	chat_broadcast {
		max_clients 1
	}
}`)
	join(t, "/")
	start := time.Now()
	const flood = 200
	for range flood {
		refused(t, http.StatusServiceUnavailable, "/")
	}
	refused(t, http.StatusForbidden, "/", "Origin: https://evil.example\r\n") // another reason
	lines := s.refusals(flood + 1)
	told := 0
	for _, line := range lines {
		if line["reason"] == "max_clients" {
			told += 1 + int(line["omitted"].(float64))
		}
	}
	// One at once, and one for each second or part of it.
	if most := 3 + int(time.Since(start)/refusalPause); told != flood || len(lines) > most {
		t.Errorf("got %d lines that count %d refusals by max_clients, want at most %d that count %d", len(lines), told, most, flood)
	}
}

func TestRefusalLog_CountsEveryRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, seen := observer.New(zapcore.InfoLevel)
		s := new(scope)
		s.current.Store(&lease{logger: zap.New(core)})
		l := refusalLog{pauses: map[refusalKind]*refusalBatch{}}
		add := func(reason string, n int) {
			for range n {
				l.add(refusalLine{refusalKind: refusalKind{reason: reason}, scope: s, error: errors.New("no").Error()})
			}
		}
		want := func(omitted ...int64) {
			t.Helper()
			synctest.Wait()
			var got []int64
			for _, entry := range seen.TakeAll() {
				got = append(got, entry.ContextMap()["omitted"].(int64))
			}
			if fmt.Sprint(got) != fmt.Sprint(omitted) {
				t.Errorf("got lines that leave out %v, want %v", got, omitted)
			}
		}
		add(refusedOrigin, 1)
		add(refusedMaxHubs, 1)
		want(0, 0)
		add(refusedOrigin, 5)
		want()
		time.Sleep(refusalPause)
		want(4)
		add(refusedOrigin, 1) // in the pause after that line
		want()
		time.Sleep(refusalPause)
		want(0)
		time.Sleep(refusalPause)
		want()
		add(refusedOrigin, 3)
		want(0)
		l.flush()
		want(1)
		time.Sleep(refusalPause)
		want()
		if len(l.pauses) > 0 {
			t.Errorf("got %d pauses after the last, want none", len(l.pauses))
		}
	})
}
