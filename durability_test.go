package chatbroadcast

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// kills is how often TestFile_AnsweredMessagesSurviveAKill kills Caddy.
var kills = flag.Int("kills", 10, "how often tests kill Caddy")

// durableSite has a hub that keeps everything that the tests send.
const durableSite = `http://localhost {
	chat_broadcast /chat/* {
		history 1000000 1h
		buffer 1000000 256MiB
		http_publish
	}
}`

// A ledger has the messages that a server has answered, by their payloads, with the numbers that it has given them.
type ledger struct {
	mu  sync.Mutex
	seq map[string]int
}

func (l *ledger) add(payload string, seq int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seq[payload] = seq
}

func (l *ledger) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.seq)
}

// send sends messages until the server is gone, and adds those that were answered. Half of the senders use WebSocket and half
// POST.
func (l *ledger) send(t *testing.T, p *process, name string, post bool, pace time.Duration) {
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	if post {
		for i := 0; ; i++ {
			<-ticker.C
			payload := fmt.Sprintf("%s %d", name, i)
			resp, err := http.Post(p.url+"chat/lobby", "text/plain", strings.NewReader(payload))
			if err != nil {
				return
			}
			var published publication
			err = json.NewDecoder(resp.Body).Decode(&published)
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusAccepted {
				return
			}
			l.add(payload, int(published.Seq))
		}
	}
	conn, err := net.Dial("tcp", p.http)
	if err != nil {
		return
	}
	defer conn.Close()
	peer, err := handshakeEvents(t, conn, p.http, "/chat/lobby")
	if err != nil {
		return
	}
	gone := make(chan struct{})
	defer close(gone)
	go func() { // ends with gone
		for i := 0; ; i++ {
			select {
			case <-gone:
				return
			case <-ticker.C:
			}
			frame := fmt.Sprintf(`{"type":"send","id":"%d","data":"%s %d"}`, i, name, i)
			if _, err := conn.Write(clientFrame(finBit|opText, []byte(frame))); err != nil {
				return
			}
		}
	}()
	for {
		e, err := peer.read()
		if err != nil {
			return
		}
		if e.Type == "sent" {
			l.add(fmt.Sprintf("%s %s", name, *e.ID), e.Seq)
		}
	}
}

// TestFile_AnsweredMessagesSurviveAKill kills Caddy at random moments while ten senders send 500 messages a second. Each time,
// it starts Caddy again on the same file, and a client must get every message that was answered under its number.
func TestFile_AnsweredMessagesSurviveAKill(t *testing.T) {
	skipShort(t)
	options := withEngine("file " + t.TempDir())
	p := startProcess(t, options, durableSite)
	l := &ledger{seq: map[string]int{}}
	epoch, head := "", 0
	for round := range *kills {
		var senders sync.WaitGroup
		for i := range 10 {
			senders.Go(func() { l.send(t, p, fmt.Sprintf("%d/%d", round, i), i%2 == 0, 20*time.Millisecond) })
		}
		before := l.size()
		eventually(t, "answers", func() bool { return l.size() > before })
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond) // a random moment
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-p.exited
		senders.Wait()
		p = p.startAgain(options, durableSite)
		epoch, head = wantReplay(t, p, l, epoch, head)
	}
	t.Logf("%d answered messages survived %d kills", l.size(), *kills)
}

// wantReplay joins a client that knows the messages up to head of an epoch, and one that knows nothing. Both must get every
// message that they lack, in order, and together all of the ledger. It returns where the hub is.
func wantReplay(t *testing.T, p *process, l *ledger, epoch string, head int) (string, int) {
	t.Helper()
	conn, err := net.Dial("tcp", p.http)
	if err != nil {
		t.Fatal(err)
	}
	all := joinEventsOn(t, conn, p.http, "/chat/lobby")
	defer conn.Close()
	if epoch != "" && all.hello.Epoch != epoch {
		t.Fatalf("got epoch %s, want %s as before", all.hello.Epoch, epoch)
	}
	if all.hello.Replay != all.hello.Head {
		t.Fatalf("got %d of %d messages to come, want all", all.hello.Replay, all.hello.Head)
	}
	got := make(map[string]int, all.hello.Replay)
	for seq := 1; seq <= all.hello.Replay; seq++ {
		e := all.want("message")
		if e.Seq != seq {
			t.Fatalf("got message %d, want %d", e.Seq, seq)
		}
		if first, twice := got[e.text()]; twice {
			t.Fatalf("got %q as messages %d and %d", e.text(), first, seq)
		}
		got[e.text()] = seq
	}
	for payload, seq := range l.seq {
		if got[payload] != seq {
			t.Errorf("%q was answered as message %d, and is message %d now (0: it is lost)", payload, seq, got[payload])
		}
	}
	if epoch == "" {
		return all.hello.Epoch, all.hello.Head
	}
	conn, err = net.Dial("tcp", p.http)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resumed := joinEventsOn(t, conn, p.http, "/chat/lobby?"+sinceQuery(epoch, head))
	if h := resumed.hello; !*h.Resumed || h.Replay != h.Head-head {
		t.Fatalf("got %s, want to resume after message %d", h.raw, head)
	}
	for seq := head + 1; seq <= resumed.hello.Head; seq++ {
		if e := resumed.want("message"); e.Seq != seq || got[e.text()] != seq {
			t.Fatalf("got %s, want message %d", e.raw, seq)
		}
	}
	return all.hello.Epoch, all.hello.Head
}

// TestFile_OnlyARunningCaddyHasTheFile validates a configuration while Caddy runs with it, and starts a second Caddy.
func TestFile_OnlyARunningCaddyHasTheFile(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "messages")
	options := "chat_broadcast {\n\t\tengine file " + folder + "\n\t}"
	site := "http://localhost {\n\tchat_broadcast /chat/* {\n\t\thistory 10\n\t}\n}"
	empty := "http://localhost {\n\trespond nothing\n}"
	validate := func(p *process) {
		t.Helper()
		if out, err := caddyCommand(t, "validate", "--config", p.write(options, site)).CombinedOutput(); err != nil {
			t.Errorf("caddy validate: %v\n%s", err, out)
		}
	}
	p := startProcess(t, "", empty)
	validate(p)
	if _, err := os.Stat(folder); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after caddy validate the folder gets %v, want that it does not exist", err)
	}
	if err := p.reload(options, site); err != nil {
		t.Fatal(err)
	}
	validate(p)
	second := startProcess(t, "", empty)
	if err := second.reload(options, site); err == nil || !strings.Contains(err.Error(), "is in use by another process") {
		t.Errorf("the second Caddy got %v, want that the file is in use", err)
	}
	p.terminate()
	if err := second.reload(options, site); err != nil {
		t.Errorf("once the file is free: %v", err)
	}
}
