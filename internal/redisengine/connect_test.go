//go:build unix

package redisengine

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

func TestConnect_WaitsForAServerThatComesLater(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	redis.kill()
	n := begin(t, redis.url())
	n.awaitDown("connection refused")
	if n.Number() != 0 {
		t.Errorf("before the session is connected its number is %d, want 0", n.Number())
	}
	_, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Messages: messages("a")})
	if !errors.Is(err, engine.ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("Publish returned %v, want ErrUnavailable with the reason", err)
	}
	redis.start()
	poll(t, n.wantUp)
	if n.Number() != 1 {
		t.Errorf("the number of the first node is %d, want 1", n.Number())
	}
	n.publish("hub", "a")
}

func TestConnect_ErrorSaysWhatToChange(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	locked := startRedis(t, "--requirepass", "secret")
	cluster := startRedis(t, "--cluster-enabled", "yes")
	website := httptest.NewServer(http.NotFoundHandler())
	defer website.Close()
	replica := startRedis(t, "--replicaof", "127.0.0.1 "+strconv.Itoa(redis.port))
	old := startFake(t, "redis_version:6.2.1\r\nrun_id:run%d\r\nredis_mode:standalone\r\nrole:master\r\n")
	several := startFake(t, "redis_version:7.2.0\r\nrun_id:run%d\r\nredis_mode:standalone\r\nrole:master\r\n")
	for url, want := range map[string]string{
		"redis://:wrong@" + locked.address():                    "wrong user or password",
		locked.url():                                            "a password is needed",
		"redis://ann:secret@" + redis.address():                 "wrong user or password",
		"redis://" + strings.TrimPrefix(website.URL, "http://"): "does not speak the protocol of Redis",
		"rediss://" + redis.address():                           "use redis:// instead of rediss://",
		redis.url() + "/99":                                     "does not have the database",
		replica.url():                                           "it is a replica",
		cluster.url():                                           "Redis Cluster",
		"redis://" + old:                                        "its version is 6.2.1, but the engine needs 7.0 or newer",
		"redis://" + several:                                    "different servers answer on one connection",
		"unix:///nowhere/redis.sock":                            "no such file",
	} {
		t.Run(want, func(t *testing.T) {
			n := begin(t, url)
			n.awaitDown(want)
			n.mu.Lock()
			defer n.mu.Unlock()
			got := n.state.Error()
			if address := n.currentOptions().String(); !strings.Contains(got, address) || strings.Contains(got, "secret") {
				t.Errorf("the state is %q, want the address %s and no password", got, address)
			}
			if n.ups > 0 {
				t.Error("the session was connected")
			}
		})
	}
}

// startFake starts a server that answers the commands of a session that connects. In the text that it answers to INFO, %d
// is another number each time. It returns its address.
func startFake(t *testing.T, info string) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() { // ends when the listener is closed
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go serveFake(c, info) // ends when the session closes its connection
		}
	}()
	return listener.Addr().String()
}

func serveFake(c net.Conn, info string) {
	defer c.Close()
	r := bufio.NewReader(c)
	for n := 0; ; n++ {
		command, err := readAnswer(r)
		if err != nil {
			return
		}
		answer := "-ERR unknown command\r\n"
		switch text := string(command); {
		case strings.Contains(text, "HELLO"):
			answer = "%1\r\n$5\r\nproto\r\n:3\r\n"
		case strings.Contains(text, "INFO"):
			text := fmt.Sprintf(info, n)
			answer = fmt.Sprintf("$%d\r\n%s\r\n", len(text), text)
		case strings.Contains(text, "SCRIPT"):
			answer = "+0123456789abcdef\r\n"
		case strings.Contains(text, "EVALSHA"):
			answer = "*3\r\n+fence\r\n+generation\r\n:0\r\n"
		case strings.Contains(text, "PING"):
			answer = "+PONG\r\n"
		}
		if _, err := io.WriteString(c, answer); err != nil {
			return
		}
	}
}

func TestConnect_RefusesDataOfAnotherVersion(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	redis.do("HSET", "chat_broadcast:server", "format", "3")
	begin(t, redis.url()).awaitDown("format 3 instead of 2")
}

func TestConnect_ReportsASilentServer(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and nothing more
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	n := begin(t, "redis://"+listener.Addr().String())
	n.awaitDown("no answer in time")
	began := time.Now()
	n.Close()
	if took := time.Since(began); took > closeTimeout+time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestConnect_TellsAReasonOnce(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	n := begin(t, "redis://"+listener.Addr().String())
	for range 4 {
		c, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	n.awaitDown("it has closed the connection")
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.states) != 1 {
		t.Errorf("after 4 attempts the states are %q, want one", n.states)
	}
}

func TestConnect_ByUnixSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "redis.sock")
	startRedis(t, "--unixsocket", socket)
	n := connect(t, "unix://"+socket+"?db=3")
	r := n.open("hub")
	n.publish("hub", "a")
	r.wantTexts("a")
}

func TestConnect_ByTLS(t *testing.T) {
	t.Parallel()
	port := strconv.Itoa(freePort())
	startRedis(t, "--tls-port", port, "--tls-cert-file", certificate.cert, "--tls-key-file", certificate.key,
		"--tls-auth-clients", "no")
	n := connect(t, "rediss://localhost:"+port)
	r := n.open("hub")
	n.publish("hub", "a")
	r.wantTexts("a")

	begin(t, "rediss://127.0.0.1:"+port).awaitDown("the TLS handshake failed")
	begin(t, "redis://localhost:"+port).awaitDown("If it expects TLS, use rediss://")
}

func TestConnect_DatabasesAreSeparate(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	zero, one := connect(t, redis.url()), connect(t, redis.url()+"/1")
	first, second := zero.open("hub"), one.open("hub")
	zero.publish("hub", "in 0")
	one.publish("hub", "in 1")
	first.wantTexts("in 0")
	second.wantTexts("in 1")
}

func TestSetCredentials_ConnectsWithThem(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--requirepass", "old")
	url := func(password string) string { return "redis://:" + password + "@" + redis.address() }
	n := connect(t, url("old"))
	r := n.open("hub")
	redis.do("-a", "old", "--no-auth-warning", "CONFIG", "SET", "requirepass", "new")
	redis.do("-a", "new", "--no-auth-warning", "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
	redis.do("-a", "new", "--no-auth-warning", "CLIENT", "KILL", "TYPE", "pubsub")
	n.awaitDown("wrong user or password")
	options, err := ParseURL(url("new"))
	if err != nil {
		t.Fatal(err)
	}
	n.SetCredentials(options)
	poll(t, n.wantUp)
	n.publish("hub", "a")
	r.wantTexts("a")
}

// rights returns those that the user of the engine needs, as the documentation of the package has them.
func rights(t *testing.T) []string {
	t.Helper()
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(string(doc)) {
		if right, found := strings.CutPrefix(line, "//\t"); found {
			all = append(all, strings.Fields(right)...)
		}
	}
	return all
}

func TestConnect_WithLittleRights(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes")
	redis.do(append([]string{"ACL", "SETUSER", "chat", "on", ">secret"}, rights(t)...)...)
	url := "redis://chat:secret@" + redis.address()
	one, two := connect(t, url), connect(t, url)
	one.wantWarning("CONFIG GET")
	useEverything(t, one, two)
	_, refused, _ := strings.Cut("\n"+redis.do("ACL", "LOG"), "\nobject\n")
	for refusal := range strings.SplitSeq(refused, "\nobject\n") {
		if object, _, _ := strings.Cut(refusal, "\n"); object != "config|get" {
			t.Errorf("Redis has refused %s", object)
		}
	}
}

// useEverything calls each method of two sessions.
func useEverything(t *testing.T, one, two *node) {
	t.Helper()
	r := two.open("hub")
	one.open("hub")
	for i := range 30 {
		b := bounds
		b.Messages, b.Receipts = 10, 5
		one.publishBatch("hub", engine.Batch{Bounds: b, Number: uint64(i + 1), Messages: []engine.Message{
			keyed("a", strconv.Itoa(i), engine.First), keyed("b", strconv.Itoa(i), engine.Again),
		}})
	}
	one.read("hub", engine.Position{})
	one.announce("hub", engine.UserCount{User: "ann", Clients: 1}, engine.UserCount{User: "ben", Clients: 1})
	one.announce("hub", engine.UserCount{User: "ann", Clients: 0})
	r.awaitUsers(one.ID(), map[string]int{"ben": 1})
	one.renew(r.known("hub"))
	if err := one.Forget(t.Context(), "hub"); err != nil {
		t.Error(err)
	}
	if nodes, err := one.Nodes(t.Context()); err != nil || len(nodes) != 2 {
		t.Errorf("Nodes returned %v, %v; want two", nodes, err)
	}
	one.Close()
	r.awaitUsers(one.ID(), nil)
	two.removeEnded(two.link.Load())
}

func TestConnect_WarnsOfSettingsThatEndangerMessages(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args, want []string
	}{
		{nil, []string{"appendonly yes and appendfsync always"}},
		{[]string{"--maxmemory-policy", "allkeys-lru"}, []string{"maxmemory-policy is allkeys-lru", "set maxmemory-policy noeviction"}},
		{[]string{"--maxmemory-policy", "volatile-ttl"}, []string{"maxmemory-policy is volatile-ttl"}},
		{[]string{"--appendonly", "yes"}, []string{"appendfsync everysec", "set appendfsync always"}},
		{[]string{"--appendonly", "yes", "--appendfsync", "always"}, nil},
		{
			[]string{"--appendonly", "yes", "--appendfsync", "always", "--no-appendfsync-on-rewrite", "yes"},
			[]string{"set no-appendfsync-on-rewrite no"},
		},
		{
			[]string{"--appendonly", "yes", "--appendfsync", "always", "--rename-command", "CONFIG", ""},
			[]string{"allow CONFIG GET"},
		},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			t.Parallel()
			redis := startRedis(t, test.args...)
			n := connect(t, redis.url())
			for _, want := range test.want {
				n.wantWarning(want)
			}
			if len(test.want) == 0 && len(n.warnings) > 0 {
				t.Errorf("the warnings are %q, want none", n.warnings)
			}
			before := len(n.warnings)
			ups := n.countUps()
			redis.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
			n.awaitUps(ups)
			n.publish("hub", "a")
			if after := len(n.warnings); after != before {
				t.Errorf("after a new connection to the same server there are %d warnings, want %d", after, before)
			}
		})
	}
}
