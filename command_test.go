package chatbroadcast

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/gorilla/websocket"
	"github.com/spf13/cobra"
)

// command returns the command caddy, with the given arguments. Its admin endpoint is, without further ado, that of the
// Caddy under test.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	cmd := caddyCommand(t, args...)
	cmd.Env = append(cmd.Env, "CADDY_ADMIN="+adminAddr)
	return cmd
}

// chat runs `caddy chat`, which must succeed, and returns its output.
func chat(t testing.TB, stdin string, args ...string) string {
	t.Helper()
	cmd := command(t, append([]string{"chat"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Fatalf("caddy chat %q: %v\n%s", args, err, stderr.String())
	}
	return string(out)
}

// columns returns the words of the lines of a table.
func columns(table string) (rows [][]string) {
	for line := range strings.Lines(table) {
		rows = append(rows, strings.Fields(line))
	}
	return rows
}

func TestCommand_ListsHubsAndClients(t *testing.T) {
	startCaddy(t, anyHub)
	const hub = "example.com/chat/räume & mehr"
	joinAs(t, hub, "ada")
	joinAs(t, hub, "evil\u202egpj")
	joinAs(t, "lobby", "")

	want := fmt.Sprintf("HUB%sCLIENTS  MESSAGES  RETAINED  SINCE\n%s  2        0         0         ", strings.Repeat(" ", 28), hub)
	if got := chat(t, "", "hubs"); !strings.HasPrefix(got, want) || len(columns(got)) != 3 {
		t.Errorf("got\n%s, want it to begin with\n%s", got, want)
	}
	if got := columns(chat(t, "", "hubs", "--prefix", "lob")); len(got) != 2 || got[1][0] != "lobby" {
		t.Errorf("got %q, want the lobby alone", got)
	}
	var info hubInfo
	if err := json.Unmarshal([]byte(chat(t, "", "hubs", "--prefix=ex", "--json")), &info); err != nil || info.Name != hub || info.Clients != 2 {
		t.Errorf("got %+v, %v", info, err)
	}

	rows := columns(chat(t, "", "clients", hub))
	if len(rows) != 3 || rows[0][0] != "CLIENT" || rows[1][1] != "ada" || rows[1][2] != "127.0.0.1" || rows[2][1] != `evil\u202egpj` {
		t.Errorf("got %q", rows)
	}
	lines := strings.Split(strings.TrimSpace(chat(t, "", "clients", "--json", hub)), "\n")
	if len(lines) != 2 {
		t.Fatalf("got %q", lines)
	}
	for i, want := range []string{"ada", "evil\u202egpj"} {
		var info clientInfo
		if err := json.Unmarshal([]byte(lines[i]), &info); err != nil || info.User != want || info.ID != rows[i+1][0] {
			t.Errorf("got %+v, %v", info, err)
		}
	}
}

func TestCommand_ListsMoreThanOnePage(t *testing.T) {
	startCaddy(t, anyHub)
	const clients = maxPage + 5
	for i := range clients {
		joinAs(t, "lobby", fmt.Sprint(i))
	}
	rows := columns(chat(t, "", "clients", "lobby"))
	if len(rows) != clients+1 {
		t.Fatalf("got %d lines, want %d", len(rows), clients+1)
	}
	for i, row := range rows[1:] {
		if row[1] != fmt.Sprint(i) {
			t.Fatalf("line %d: got client %s", i, row[1])
		}
	}
}

func TestCommand_Send(t *testing.T) {
	startCaddy(t, anyHub)
	p := joinAs(t, "a/b", "")
	for i, tc := range []struct {
		stdin string
		args  []string
		want  frame
	}{
		{"", []string{"a/b", "hello, world"}, frame{websocket.TextMessage, "hello, world"}},
		{"from a pipe\n", []string{"a/b"}, frame{websocket.TextMessage, "from a pipe\n"}},
		{"from a pipe", []string{"a/b", "-"}, frame{websocket.TextMessage, "from a pipe"}},
		{"", []string{"a/b", "", "--allow-empty"}, frame{websocket.TextMessage, ""}},
		{"\x00\xff", []string{"--binary", "a/b"}, frame{websocket.BinaryMessage, "\x00\xff"}},
	} {
		want := fmt.Sprintf("published message %d for 1 client\n", i+1)
		if got := chat(t, tc.stdin, append([]string{"send"}, tc.args...)...); got != want {
			t.Errorf("%q: got %q, want %q", tc.args, got, want)
		}
		if got := p.next(); got != tc.want {
			t.Errorf("%q: got %v, want %v", tc.args, got, tc.want)
		}
	}
	if got, want := chat(t, "", "send", "--json", "a/b", "x"), "{\"clients\":1,\"seq\":6}\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCommand_Kick(t *testing.T) {
	startCaddy(t, anyHub)
	ada, bob, eve, eve2 := joinAs(t, "../x", "ada"), joinAs(t, "../x", "bob/1"), joinAs(t, "../x", "eve"), joinAs(t, "../x", "eve")
	id := columns(chat(t, "", "clients", "../x"))[1][0]
	for _, tc := range []struct {
		args   []string
		want   string
		kicked []*peer
	}{
		{[]string{"--client", id}, "kicked 1 client\n", []*peer{ada}},
		{[]string{"--user", "bob/1"}, "kicked 1 client\n", []*peer{bob}},
		{[]string{"--hub", "../x", "--json"}, "{\"kicked\":2}\n", []*peer{eve, eve2}},
	} {
		if got := chat(t, "", append([]string{"kick"}, tc.args...)...); got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.args, got, tc.want)
		}
		for _, p := range tc.kicked {
			p.wantClose(1008, "kicked")
			p.conn.Close()
		}
	}
}

func TestCommand_FailsWithAReason(t *testing.T) {
	s := startCaddy(t, anyHub)
	joinAs(t, "lobby", "")
	cases := []struct {
		args []string
		want string
	}{
		{[]string{"rooms"}, `unknown command "rooms" for "caddy chat"`},
		{[]string{"hubs", "lobby"}, `unknown command "lobby"`},
		{[]string{"clients"}, "name the hub: caddy chat hubs lists them"},
		{[]string{"clients", "lobby", "lobby"}, "accepts at most 1 arg(s), received 2"},
		{[]string{"clients", "nowhere"}, "hub nowhere is not open; caddy chat hubs lists those that are. Unless the " +
			"configuration names a hub, its name begins with the site"},
		{[]string{"kick", "--hub", "nowhere"}, "hub nowhere is not open; caddy chat hubs lists"},
		{[]string{"send", "nowhere", "hello"}, "hub nowhere is not open; caddy chat hubs lists"},
		{[]string{"send"}, "name the hub"},
		{[]string{"send", "lobby", "hello,", "world"}, "quote the message: it is one argument, and there are 2 after the hub"},
		{[]string{"send", "lobby", ""}, "the message is empty: publish it with --allow-empty"},
		{[]string{"send", "lobby"}, "the message is empty"},
		{[]string{"clients", ".."}, `hub: the hub's name must not be ".."`},
		{[]string{"clients", `a\u202`}, `hub: a backslash must begin \\, \u and four hexadecimal digits`},
		{[]string{"kick", "--user", `CORP\bob`}, `--user: a backslash must begin \\`},
		{[]string{"hubs", "--prefix", `a\`}, `--prefix: a backslash must begin`},
		{[]string{"send", "lobby", "bad \xff"}, "the message is not valid UTF-8: publish it with --binary"},
		{[]string{"kick"}, "say whom to kick, with one of --client, --user and --hub"},
		{[]string{"kick", "--user", "a", "--hub", "b"}, "say whom to kick"},
		{[]string{"kick", "--user", "", "--hub", "b"}, "--user must not be empty"},
		{[]string{"kick", "--client", "A!"}, "id: \"A!\" is not the id of a client"},
		{[]string{"kick", "--user", "nobody"}, "user nobody has no clients"},
		{[]string{"tail", ""}, "hub: the hub's name is empty"},
		{[]string{"tail", "a\tb"}, "control character"},
		{[]string{"hubs", "--address", "localhost:1"}, "admin endpoint at localhost:1 (--address or --config choose another)"},
		{[]string{"hubs", "--config", s.logFile + ".json"}, "finding Caddy's admin endpoint in --config"},
	}
	var commands []*exec.Cmd
	for _, tc := range cases {
		commands = append(commands, command(t, append([]string{"chat"}, tc.args...)...))
	}
	outputs := make([][]byte, len(cases))
	each(t, len(cases), func(i int) error {
		outputs[i], _ = commands[i].CombinedOutput() // the standard input is empty; the status is in ProcessState
		return nil
	})
	for i, tc := range cases {
		if state := commands[i].ProcessState; state == nil || state.ExitCode() != 1 {
			t.Errorf("%q: got %v, want exit status 1", tc.args, state)
		}
		if !strings.Contains(string(outputs[i]), tc.want) {
			t.Errorf("%q: got %s, want %s", tc.args, outputs[i], tc.want)
		}
	}
}

func TestCommand_TakesNamesAsItShowsThem(t *testing.T) {
	startCaddy(t, anyHub)
	const hub, user = "a\\b\u202ec\U000e0001", "\\\u0085 DOMAIN\\bob\u2066"
	p := joinAs(t, hub, user)
	shown := columns(chat(t, "", "hubs"))[1][0]
	if want := `a\\b\u202ec\U000e0001`; shown != want {
		t.Fatalf("got hub %s, want %s", shown, want)
	}
	if got := columns(chat(t, "", "hubs", "--prefix", shown)); len(got) != 2 {
		t.Errorf("got %q, want the hub", got)
	}
	tail := startTail(t, shown)
	chat(t, "", "send", shown, `as it is: \u202e`)
	p.wantText(`as it is: \u202e`)
	eventually(t, "the message to be shown", func() bool { return strings.Contains(tail.String(), "1\t-\tas it is") })
	row := chat(t, "", "clients", shown)
	shownUser := `\\\u0085 DOMAIN\\bob\u2066`
	if !strings.Contains(row, "  "+shownUser+"  ") {
		t.Fatalf("got %s, want user %s", row, shownUser)
	}
	chat(t, "", "kick", "--user", shownUser)
	p.wantClose(1008, "kicked")
	p.conn.Close()
	p = joinAs(t, hub, user)
	chat(t, "", "kick", "--hub", shown)
	p.wantClose(1008, "kicked")
}

func TestEscapedName_IsReversible(t *testing.T) {
	for _, name := range []string{"", "lobby", `\`, `\\`, `\u202e`, "\u202e", "\x00\t\x7f\u0085", "\U000e0001", "🙂\u200d", `a\`, "\ufffd"} {
		shown := escapedName(name)
		if got, err := unescapedName(shown); err != nil || got != name || strings.ContainsFunc(shown, unprintable) {
			t.Errorf("%q: shown as %q, which is %q, %v", name, shown, got, err)
		}
	}
	for _, bad := range []string{`\`, `a\n`, `\x41`, `\u12`, `\ud83d`, `\U00110000`, `\'`} {
		if got, err := unescapedName(bad); err == nil {
			t.Errorf("%q: got %q, want an error", bad, got)
		}
	}
}

func TestCommand_OutputIsPrintable(t *testing.T) {
	startCaddy(t, anyHub)
	const odd = "\u009b2J\u202e\x1b[2J"
	joinAs(t, "lobby\u202e", "\u0085")
	tail := startTail(t, "--json", `lobby\u202e`)
	chat(t, "", "send", `lobby\u202e`, odd)
	eventually(t, "the message to be shown", func() bool { return strings.Contains(tail.String(), "\n") })
	outputs := []string{tail.String(), chat(t, "", "hubs", "--json"), chat(t, "", "clients", "--json", `lobby\u202e`)}
	failing := [][]string{
		{odd},
		{"hubs", odd},
		{"hubs", "--address", "localhost:1" + odd},
		{"hubs", "--config", odd},
		{"hubs", "--" + odd},
		{"hubs", "--json=" + odd},
		{"clients", odd},
		{"clients", "nowhere\u202e"},
		{"send", "lobby", "a", odd},
		{"kick", "--user", odd},
		{"kick", "--client", odd},
		{"kick", "--hub", odd},
		{"tail", odd},
	}
	var commands []*exec.Cmd
	for _, args := range failing {
		commands = append(commands, command(t, append([]string{"chat"}, args...)...))
	}
	failures := make([]string, len(failing))
	each(t, len(failing), func(i int) error {
		out, err := commands[i].CombinedOutput()
		if err == nil {
			return fmt.Errorf("%q: want it to fail", failing[i])
		}
		failures[i] = string(out)
		return nil
	})
	outputs = append(outputs, failures...)
	for _, out := range outputs {
		if bad := strings.IndexFunc(out, func(r rune) bool { return r != '\n' && unprintable(r) }); bad >= 0 {
			t.Errorf("got %q, which is not all printable", out)
		}
	}
	var line tailLine
	if err := json.Unmarshal([]byte(tail.String()), &line); err != nil || *line.Data != odd {
		t.Errorf("got %q, %v, want %q", *line.Data, err, odd)
	}
}

func TestCommand_ListsNoHubsWithoutTheDirective(t *testing.T) {
	startCaddy(t, "http://localhost:9080 {\n}")
	if got := columns(chat(t, "", "hubs")); len(got) != 1 || got[0][0] != "HUB" {
		t.Errorf("got %q, want the header alone", got)
	}
}

func TestCommand_TailEndsWithCaddy(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "", "http://localhost {\n\tchat_broadcast lobby\n}")
	cmd := command(t, "chat", "tail", "--address", p.admin, "lobby")
	var stderr output
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // fails if it is gone
	eventually(t, "the tail to begin", func() bool { return strings.Contains(stderr.String(), "waiting for messages") })
	p.terminate()
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(stderr.String(), "asking Caddy's admin endpoint") {
		t.Errorf("got %v, %s, want exit status 1 and the reason", err, stderr.String())
	}
}

func TestCommand_FindsTheEndpointInAConfiguration(t *testing.T) {
	s := startCaddy(t, anyHub)
	joinAs(t, "lobby", "")
	config := s.logFile + ".Caddyfile"
	if err := os.WriteFile(config, []byte(s.caddyfile("", anyHub)), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "chat", "hubs", "--config", config, "--adapter", "caddyfile")
	cmd.Env = append(cmd.Env, "CADDY_ADMIN=localhost:1")
	if out, err := cmd.Output(); err != nil || !strings.Contains(string(out), "lobby") {
		t.Errorf("got %s, %v", out, err)
	}
}

// output collects what a running command prints.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// startTail runs `caddy chat tail` until the end of the test and returns its output, once it follows the hub.
func startTail(t *testing.T, args ...string) *output {
	t.Helper()
	cmd := command(t, append([]string{"chat", "tail"}, args...)...)
	var out, stderr output
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	eventually(t, "the tail to begin", func() bool { return strings.Contains(stderr.String(), "waiting for messages") })
	return &out
}

func TestCommand_Tail(t *testing.T) {
	s := startCaddy(t, anyHub)
	people, programs := startTail(t, "a/b"), startTail(t, "a/b", "--json")
	p := joinAs(t, "a/b", "")
	id := columns(chat(t, "", "clients", "a/b"))[1][0]
	p.text("one\ttwo\x1b[2J 🙂")
	p.send(websocket.BinaryMessage, "\x00\xff")
	p.next()
	p.next()
	chat(t, "", "send", "a/b", `a "quote"`)
	wantPeople := "1\t" + id + `	one\ttwo\x1b[2J 🙂
2	` + id + `	binary, 2 bytes
3	-	a "quote"
`
	wantPrograms := `{"seq":1,"client":"` + id + `","type":"text","data":"one\ttwo\u001b[2J 🙂"}
{"seq":2,"client":"` + id + `","type":"binary","data64":"AP8="}
{"seq":3,"type":"text","data":"a \"quote\""}
`
	eventually(t, "all messages to be shown", func() bool {
		return strings.Count(people.String(), "\n") >= 3 && strings.Count(programs.String(), "\n") >= 3
	})
	if got := people.String(); got != wantPeople {
		t.Errorf("got\n%s\nwant\n%s", got, wantPeople)
	}
	if got := programs.String(); got != wantPrograms {
		t.Errorf("got\n%s\nwant\n%s", got, wantPrograms)
	}

	// A reload ends what the endpoint answers; the command asks again.
	before := tapsOn("a/b")
	s.load(anyHub + "\nhttp://localhost:9081 {\n}")
	eventually(t, "the tails to go on", func() bool {
		now := tapsOn("a/b")
		return len(now) == 2 && !slices.ContainsFunc(now, func(tap *hub.Tap) bool { return slices.Contains(before, tap) })
	})
	p.text("again")
	wantPeople += "4\t" + id + "\tagain\n"
	wantPrograms += `{"seq":4,"client":"` + id + `","type":"text","data":"again"}` + "\n"
	eventually(t, "the message after the reload to be shown", func() bool {
		return people.String() == wantPeople && programs.String() == wantPrograms
	})
}

func TestCommand_TailReportsGaps(t *testing.T) {
	for _, tc := range []struct {
		name  string
		last  uint64
		lines string
		want  string
		ends  uint64
	}{
		{"the first time", 0, `{"seq":7,"type":"text","data":"x"}`, "7\t-\tx\n", 7},
		{"nothing missed", 6, `{"seq":7,"type":"text","data":"x"}`, "7\t-\tx\n", 7},
		{"missed", 4, `{"seq":7,"type":"text","data":"x"}`, "lagged: 2 messages are left out here\n7\t-\tx\n", 7},
		{"a hub opened anew", 9, `{"seq":7,"type":"text","data":"x"}`, "7\t-\tx\n", 7},
		{"lagged", 4, `{"seq":5,"type":"binary","data64":""}{"lagged":3}`, "5\t-\tbinary, 0 bytes\nlagged: 3 messages are left out here\n", 8},
		{"cut off", 4, `{"seq":5,"type":"te`, "", 4},
		{"of a later version", 4, `{"joined":"ada"}`, "", 4},
	} {
		var out bytes.Buffer
		cmd := new(cobra.Command)
		chatCommands(cmd)
		cmd.SetOut(&out)
		ends, err := showTail(cmd, strings.NewReader(tc.lines), tc.last)
		if err != nil || out.String() != tc.want || ends != tc.ends {
			t.Errorf("%s: got %q, %d, %v, want %q, %d", tc.name, out.String(), ends, err, tc.want, tc.ends)
		}
	}
}

func TestCommand_Nodes(t *testing.T) {
	startCaddy(t, anyHub)
	joinAs(t, "lobby", "ada")
	out := chat(t, "", "nodes")
	rows := columns(out)
	if len(rows) != 4 || rows[2][0] != "NODE" || rows[3][0] != "1" || !strings.HasPrefix(out, "The engine memory is up\n\n") {
		t.Errorf("got\n%s", out)
	}
	var all nodesAnswer
	if err := json.Unmarshal([]byte(chat(t, "", "nodes", "--json")), &all); err != nil || len(all.Nodes) != 1 || all.Nodes[0].Clients != 1 {
		t.Errorf("got %+v, %v", all, err)
	}
	if header := columns(chat(t, "", "clients", "lobby"))[0]; slices.Contains(header, "NODE") {
		t.Errorf("got the columns %q, want none for the only node", header)
	}
}

// TestCommand_CoversAllNodes has the Caddy under test and another node share hubs.
func TestCommand_CoversAllNodes(t *testing.T) {
	s := startCaddy(t, "")
	s.loadWith(withEngine("test "+t.Name()), anyHub)
	joinAs(t, "lobby", "ada")
	other := newClusterNode(t, testServer(t.Name()))
	bob := other.enter("lobby", "bob", defaults())
	other.enter("attic", "eve", defaults())
	eventually(t, "the other node to answer", func() bool {
		var page hubsPage
		s.ask("GET", "/hubs", "", "", &page)
		return len(page.Hubs) == 2
	})

	first, second := fmt.Sprint(hubs.current.Load().cluster.Number()), fmt.Sprint(other.number())
	rows := columns(chat(t, "", "nodes"))
	if len(rows) != 5 || strings.Join(rows[0], " ") != "The engine test is up" || rows[3][2] != "(asked)" || rows[4][0] != second {
		t.Errorf("got %q, want two nodes", rows)
	}
	rows = columns(chat(t, "", "clients", "lobby"))
	if len(rows) != 3 || rows[0][len(rows[0])-1] != "NODE" || rows[1][len(rows[1])-1] != first || rows[2][1] != "bob" ||
		rows[2][len(rows[2])-1] != second {
		t.Errorf("got %q, want the clients of both nodes", rows)
	}
	if got := chat(t, "", "kick", "--user", "bob"); got != "kicked 1 client\n" {
		t.Errorf("got %q", got)
	}
	wantCause(t, bob, hub.CloseKicked)
	if got := chat(t, "", "send", "attic", "hello"); !strings.HasSuffix(got, " for 1 client\n") {
		t.Errorf("got %q", got)
	}

	release := other.session.HoldPushes()
	defer release()
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"hubs"}, "lobby"},
		{[]string{"clients", "lobby"}, "ada"},
		{[]string{"kick", "--user", "ada"}, "kicked 1 client"},
	} {
		cmd := command(t, append([]string{"chat"}, tc.args...)...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil || !strings.Contains(string(out), tc.want) {
			t.Errorf("%q: got %s, %v, want %s", tc.args, out, err, tc.want)
		}
		if want := fmt.Sprintf("these nodes did not answer: %s\n", other.name()); stderr.String() != want {
			t.Errorf("%q: got %q on the standard error, want %q", tc.args, stderr.String(), want)
		}
	}
}
