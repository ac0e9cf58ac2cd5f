package chatbroadcast

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// A frontedCluster is that of docs/cluster.md: two nodes that share a Redis, and a front that spreads clients over them.
type frontedCluster struct {
	t     *testing.T
	dir   string            // has the files of the document
	ports *strings.Replacer // replaces the ports of the document with free ones
	redis *process
	nodes []*process
	front *process
}

// startFrontedCluster starts what the document starts.
func startFrontedCluster(t *testing.T) *frontedCluster {
	t.Helper()
	skipShort(t)
	findProgram(t, "redis-server")
	c := &frontedCluster{t: t, dir: t.TempDir()}
	free := func() string { return fmt.Sprint(freePort()) }
	root, err := filepath.Abs("example")
	if err != nil {
		t.Fatal(err)
	}
	c.ports = strings.NewReplacer("6379", free(), "2019", free(), "2020", free(), "2021", free(),
		"8080", free(), "8081", free(), "8082", free(), "root * example", "root * "+root)
	for _, name := range []string{"redis.conf", "node.Caddyfile", "front.Caddyfile"} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(c.ports.Replace(docBlock(t, "cluster: "+name))), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(testBinary(t), filepath.Join(c.dir, "caddy")); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(docBlock(t, "cluster: start")), "\n")
	if len(lines) != 4 {
		t.Fatalf("the document starts %q, want Redis, two nodes and a front", lines)
	}
	c.redis = c.startCommand(lines[0], "", "6379")
	c.nodes = []*process{c.startCommand(lines[1], "2019", "8081"), c.startCommand(lines[2], "2020", "8082")}
	// The front looks at the nodes when it starts, and again after two seconds.
	for _, node := range c.nodes {
		eventually(t, "the node to reach Redis", func() bool { return value(scrapeAt(t, node.admin)["engine_up"]) == 1 })
	}
	c.front = c.startCommand(lines[3], "2021", "8080")
	return c
}

func testBinary(t *testing.T) string {
	t.Helper()
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// command returns a command of the document.
func (c *frontedCluster) command(line string) *exec.Cmd {
	cmd := caddyCommand(c.t)
	cmd.Path, cmd.Args = "/bin/sh", []string{"sh", "-c", "exec env " + c.ports.Replace(line)}
	cmd.Dir = c.dir
	cmd.Env = append(cmd.Env, "PATH="+c.dir+":"+os.Getenv("PATH"), "CADDY_ADMIN="+c.ports.Replace("localhost:2019"))
	return cmd
}

// startCommand starts a server of the document, with its ports there.
func (c *frontedCluster) startCommand(line, admin, http string) *process {
	c.t.Helper()
	p := &process{
		place: place{t: c.t, admin: c.ports.Replace("localhost:" + admin), http: c.ports.Replace("localhost:" + http)},
		cmd:   c.command(line), dir: c.dir, exited: make(chan struct{}),
	}
	p.https, p.url = p.http, "http://"+p.http+"/"
	p.launch()
	return p
}

// startNode starts a node that shares the hubs of a Redis.
func startNode(t *testing.T, redis *redisServer) *process {
	t.Helper()
	return startProcess(t, withEngine(redis.engine()), exampleSite(t))
}

// kill ends the process at once.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // fails if it is gone
	<-p.exited
}

// clients returns how many clients the process has itself.
func (p *process) clients() int {
	p.t.Helper()
	return int(value(scrapeAt(p.t, p.admin)["clients"]))
}

// waitTexts waits until the tab shows exactly these messages, and all of them were published.
func (p *tab) waitTexts(want []string) {
	p.t.Helper()
	p.waitFor(fmt.Sprintf(`inside().querySelectorAll(".message:not(.pending, .gone)").length >= %d && !inside().querySelector(".pending")`, len(want)))
	if got := p.texts(); !slices.Equal(got, want) {
		p.t.Errorf("the page shows %q, want %q", got, want)
	}
}

func (p *tab) texts() []string {
	p.t.Helper()
	return evaluate[[]string](p, `[...inside().querySelectorAll(".message .text")].map((m) => m.textContent)`)
}

// wantNothingMissed fails the test if the page says that messages are lost.
func (p *tab) wantNothingMissed() {
	p.t.Helper()
	if got := evaluate[[]string](p, `[...inside().querySelectorAll(".missed, .gone")].map((m) => m.innerText)`); len(got) > 0 {
		p.t.Errorf("the page says %q, want that nothing is lost", got)
	}
}

// waitOnly waits until the page lists exactly these people, each with one window.
func (p *tab) waitOnly(names ...string) {
	p.t.Helper()
	slices.Sort(names)
	p.waitFor(fmt.Sprintf(`JSON.stringify([...inside().querySelectorAll("#people .name")].map((n) => n.textContent).sort()) === %s
		&& ![...inside().querySelectorAll("#people .windows")].some((w) => w.textContent.includes("windows"))`, jsString(jsString(names))))
}

// talk has people send messages by turns, from the given number on, without waiting for the messages before.
func talk(tabs []*tab, names []string, from, to int) {
	for i := from; i < to; i++ {
		tabs[i%len(tabs)].send(fmt.Sprint(names[i%len(tabs)], " ", i))
	}
}

// wantOneConversation waits until all tabs show the same messages: each of them once, and those of each person in order.
func wantOneConversation(t *testing.T, tabs []*tab, names []string, count int) {
	t.Helper()
	for _, p := range tabs {
		p.waitFor(fmt.Sprintf(`inside().querySelectorAll(".message:not(.pending)").length >= %d && !inside().querySelector(".pending")`, count))
	}
	first := tabs[0].texts()
	for _, p := range tabs[1:] {
		if got := p.texts(); !slices.Equal(got, first) {
			t.Errorf("two pages differ: %q and %q", got, first)
		}
	}
	for n, name := range names {
		var got, want []string
		for _, text := range first {
			if strings.HasPrefix(text, name) {
				got = append(got, text)
			}
		}
		for i := n; i < count; i += len(names) {
			want = append(want, fmt.Sprint(name, " ", i))
		}
		if !slices.Equal(got, want) {
			t.Errorf("the pages show of %s %q, want %q", name, got, want)
		}
	}
}

// TestDocs_Cluster runs what docs/cluster.md says.
func TestDocs_Cluster(t *testing.T) {
	t.Parallel()
	c := startFrontedCluster(t)
	peers := []*peer{c.nodes[0].join("/chat/lobby?name=Ada"), c.nodes[1].join("/chat/lobby?name=Grace"), c.front.join("/chat/lobby?name=Eve")}
	for i, p := range peers {
		p.text(fmt.Sprint(i))
		for _, other := range peers {
			other.wantText(fmt.Sprint(i))
		}
	}
	eventually(t, "the nodes to know each other", func() bool {
		out, _ := c.command("caddy chat nodes").Output()
		return bytes.Count(out, []byte("\n")) == 5 // a sentence, an empty line, a header and two nodes
	})
	for line := range strings.Lines(docBlock(t, "cluster: check")) {
		out, err := c.command(strings.TrimSpace(line)).CombinedOutput()
		if err != nil {
			t.Errorf("%s%s%v", line, out, err)
		}
		switch {
		case strings.Contains(line, " nodes") && !bytes.Contains(out, []byte("engine redis is up")),
			strings.Contains(line, " clients") && (!bytes.Contains(out, []byte("Ada")) || !bytes.Contains(out, []byte("Grace"))):
			t.Errorf("%sshows\n%s", line, out)
		}
	}
	for _, p := range peers {
		p.wantText("from the other node")
	}
	// A reload of the front closes nobody.
	if out, err := c.command("caddy reload --config front.Caddyfile --force").CombinedOutput(); err != nil {
		t.Fatalf("reloading the front: %v\n%s", err, out)
	}
	peers[0].text("after the reload")
	for _, p := range peers {
		p.wantText("after the reload")
	}

	// Without Redis there are no new clients, and the others stay.
	peers = []*peer{c.nodes[0].join("/chat/garden"), c.nodes[1].join("/chat/garden")} // which have no ping to answer yet
	c.redis.kill()
	for _, node := range c.nodes {
		eventually(t, "the node to notice", func() bool { return value(scrapeAt(t, node.admin)["engine_up"]) == 0 })
	}
	eventually(t, "503 from the front", func() bool { return c.front.publish("/chat/lobby", "").status == http.StatusServiceUnavailable })
	c.front.refused(http.StatusServiceUnavailable, "/chat/lobby")
	c.redis = c.startCommand("redis-server redis.conf", "", "6379")
	eventually(t, "the front to ask nodes again", func() bool { return c.front.publish("/chat/lobby", "").status != http.StatusServiceUnavailable })
	peers[0].text("after Redis") // it keeps everything on disk, so the hub goes on
	for f := peers[1].next(); f.payload != "after Redis"; f = peers[1].next() {
		if f.opcode != websocket.PingMessage {
			t.Fatalf("got %v, want the message", f)
		}
	}
}

// redisDo sends a command to a Redis and returns the first line of its answer.
func redisDo(t *testing.T, address, line string) string {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, line+"\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// TestDocs_RedisUser has nodes use Redis as the user of the document, who may do little else.
func TestDocs_RedisUser(t *testing.T) {
	t.Parallel()
	skipShort(t)
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	if got := redisDo(t, redis.address(), strings.TrimSpace(docBlock(t, "cluster: acl"))); got != "+OK" {
		t.Fatalf("got %q for the ACL", got)
	}
	options := withEngine("redis redis://chat:secret@" + redis.address())
	site := strings.ReplaceAll(durableSite, "chat_broadcast /chat/* {", "chat_broadcast /chat/* {\nhub {http.request.uri.path}\npresence")
	one, two := startProcess(t, options, site), startProcess(t, options, site)
	a, b := one.joinEvents("/chat/lobby"), two.joinEvents("/chat/lobby")
	for i := range 100 {
		a.sendText(fmt.Sprint(i), fmt.Sprint(i))
		b.want("message")
	}
	eventually(t, "both clients on both nodes", func() bool { return b.ask(map[string]any{}).Clients == 2 })
	two.terminate()
	eventually(t, "the other to be gone", func() bool { return a.ask(map[string]any{}).Clients == 1 })
	if got := redisDo(t, redis.address(), "ACL LOG"); got != "*0" {
		t.Errorf("got %s refused commands, want none", got)
	}
	one.terminate()
	if log := one.stderr.String(); strings.Contains(log, "endanger") {
		t.Errorf("Caddy's log has a warning: %s", log)
	}
}

// TestFailover_NodeIsKilled has two people talk by way of two nodes. One node dies, and the other goes on with both.
func TestFailover_NodeIsKilled(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	c := startFrontedCluster(t)
	nodes := c.nodes
	names := []string{"Ada", "Grace"}
	var tabs []*tab
	for _, name := range names {
		p := openTabs(t, browser, c.front, "")[0]
		p.setName(name)
		tabs = append(tabs, p)
	}
	// The front spreads requests of all kinds, so both may have come to one node.
	eventually(t, "a client on each node", func() bool {
		a, b := nodes[0].clients(), nodes[1].clients()
		if a+b == 2 && a != 1 {
			evaluate[bool](tabs[0], `(document.querySelector("chat-room").close(), document.querySelector("chat-room").connect(), true)`)
			tabs[0].waitState("open")
		}
		return a == 1 && b == 1
	})
	eve := nodes[0].join("/chat/lobby?name=Eve") // who does not come back
	for _, p := range tabs {
		p.waitOnly("Ada", "Eve", "Grace")
	}

	talk(tabs, names, 0, 10)
	nodes[0].kill()
	killed := time.Now()
	talk(tabs, names, 10, 20)
	wantOneConversation(t, tabs, names, 20)
	for _, p := range tabs {
		p.waitState("open")
		p.wantNothingMissed()
		p.waitOnly(names...)
	}
	if took := time.Since(killed); took > 24*time.Second {
		t.Errorf("the people of the dead node were gone after %v, want at most 24 s", took)
	}
	eve.conn.Close()
}

// TestDocs_File runs the recipe with the engine file. TestFailover_RestartWithEngineFile has the restart.
func TestDocs_File(t *testing.T) {
	folder := t.TempDir()
	startRecipe(t, "file", "engine file", "engine file "+folder)
	p := join(t, "/chat/lobby")
	p.text("kept")
	p.wantText("kept")
	if _, err := os.Stat(filepath.Join(folder, "chat_broadcast.db")); err != nil {
		t.Errorf("got %v, want the file of the document", err)
	}
}

// TestFailover_RestartWithEngineFile restarts the only node in the middle of a conversation. Nobody notices.
func TestFailover_RestartWithEngineFile(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	for _, tc := range []struct {
		name string
		end  func(*process)
	}{
		{"stopped", func(p *process) { p.terminate() }},
		{"killed", (*process).kill},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			options, site := withEngine("file "+t.TempDir()), exampleSite(t)
			p := startProcess(t, options, site)
			names := []string{"Ada", "Grace"}
			tabs := openTabs(t, browser, p, "", "")
			for i, name := range names {
				tabs[i].setName(name)
			}
			talk(tabs, names, 0, 10)
			tc.end(p)
			talk(tabs, names, 10, 14)
			p.startAgain(options, site)
			talk(tabs, names, 14, 20)
			wantOneConversation(t, tabs, names, 20)
			for _, p := range tabs {
				p.waitState("open")
				p.wantNothingMissed()
				p.waitOnly(names...)
			}
		})
	}
}

// startTalk opens a page of a node, on which some messages were sent.
func startTalk(t *testing.T, browser context.Context, node *process) (*tab, []string) {
	t.Helper()
	p := openTabs(t, browser, node, "")[0]
	p.setName("Ada")
	talk([]*tab{p}, []string{"Ada"}, 0, 5)
	want := []string{"Ada 0", "Ada 1", "Ada 2", "Ada 3", "Ada 4"}
	p.waitTexts(want)
	return p, want
}

// TestFailover_RedisRestarts kills a Redis that may have lost messages. It begins a new epoch and keeps the history, which the
// page must not show again.
func TestFailover_RedisRestarts(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "everysec")
	node := startNode(t, redis)
	p, want := startTalk(t, browser, node)
	redis.kill()
	redis.start()
	p.waitFor(`inside().querySelector(".missed")`)
	p.waitState("open")
	p.send("after")
	p.waitMessage("You", "after")
	p.waitTexts(append(want, "after"))
}

// TestFailover_RedisIsFrozen stops Redis in the middle of a message, for longer than a node waits. Nobody can know whether Redis
// has the message, so the page sends it again, and it appears once.
func TestFailover_RedisIsFrozen(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	redis := startRedis(t)
	p, want := startTalk(t, browser, startNode(t, redis))
	redis.signal(syscall.SIGSTOP)
	p.send("meanwhile")
	p.waitState("waiting", "connecting")
	redis.signal(syscall.SIGCONT)
	p.waitState("open")
	p.waitTexts(append(want, "meanwhile"))
	p.wantNothingMissed()
}

// TestFailover_RedisIsGone kills Redis. The page says that a message was not sent, and its author can send it again.
func TestFailover_RedisIsGone(t *testing.T) {
	t.Parallel()
	browser := startBrowser(t)
	redis := startRedis(t)
	p, want := startTalk(t, browser, startNode(t, redis))
	redis.kill()
	p.send("meanwhile")
	p.waitFor(`inside().querySelector(".gone .failed span")?.textContent.includes("cannot take messages now")`)
	redis.start()
	p.waitFor(`inside().querySelector(".missed")`) // Redis has forgotten everything
	p.waitState("open")
	evaluate[bool](p, `(inside().querySelector(".gone button").click(), true)`)
	p.waitTexts(append(want, "meanwhile"))
}
