package chatbroadcast

import (
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// wantSameInBundles joins a hub as a client that takes bundles and as one that does not. Both must get the same, and the first
// in few frames. query is empty, or that of a client that comes back.
func wantSameInBundles(t *testing.T, dial func() net.Conn, host, path, query string) {
	t.Helper()
	whole := joinEventsOn(t, dial(), host, path+"?"+query)
	apart := joinEventsOn(t, dial(), host, path+"?"+query+"&"+bundles)
	want, got := whole.hello, apart.hello
	if got.Head != want.Head || got.Replay != want.Replay || got.Missed != want.Missed {
		t.Fatalf("got %s, want it like %s", got.raw, want.raw)
	}
	frames := 0
	for range want.Replay {
		if len(apart.bundle) == 0 {
			frames++
		}
		if got, want := apart.event(), whole.event(); got.raw != want.raw {
			t.Fatalf("got %.200s, want %.200s", got.raw, want.raw)
		}
	}
	if most := want.Replay/20 + 4; frames > most {
		t.Errorf("got %d messages in %d frames, want at most %d", want.Replay, frames, most)
	}
	whole.leave()
	apart.leave()
}

// fill publishes 300 messages, of which one is large.
func fill(p *eventsPeer) {
	for i := range 300 {
		text := floodText(i)
		if i == 150 {
			text = strings.Repeat("\n", 20_000)
		}
		p.sendText("m", text)
	}
}

func TestReplay_SameInBundles(t *testing.T) {
	const directive = "chat_broadcast /chat/* {\n\thistory 250\n\tpresence join_leave\n}\n"
	startCaddy(t, "http://localhost:9080, https://localhost:9443 {\n"+directive+"}")
	for name, site := range map[string]struct {
		address string
		dial    func() net.Conn
	}{
		"TCP": {httpAddr, func() net.Conn { return (&peer{t: t}).dial() }},
		"TLS": {httpsAddr, func() net.Conn { return dialTLS(t) }},
	} {
		t.Run(name, func(t *testing.T) {
			sender := joinEventsOn(t, site.dial(), site.address, "/chat/a")
			fill(sender)
			for _, query := range []string{
				"", sinceQuery(sender.hello.Epoch, 20), sinceQuery(sender.hello.Epoch, 100), sinceQuery(sender.hello.Epoch, 299),
				sinceQuery(sender.hello.Epoch, 300), sinceQuery("another", 1),
			} {
				wantSameInBundles(t, site.dial, site.address, "/chat/a", query)
			}
			sender.leave()
		})
	}
}

func TestReplay_FromAFile(t *testing.T) {
	options := withEngine("file " + filepath.Join(t.TempDir(), "messages"))
	const site = "http://localhost {\n\tchat_broadcast /chat/* {\n\t\thistory 250\n\t}\n}"
	before := startProcess(t, options, site)
	fill(before.joinEvents("/chat/a"))
	before.terminate()
	s := before.startAgain(options, site)
	wantSameInBundles(t, s.dial, s.http, "/chat/a", "")
}

func TestReplay_OnlyIfTheClientAsks(t *testing.T) {
	startCaddy(t, historyOf("history 10"))
	sender := joinEvents(t, "/chat/a")
	sender.sendText("m1", "one")
	sender.sendText("m2", "two")
	joinEvents(t, "/chat/a").wantMessages(1, "one", "two")
	if got, err := joinEvents(t, "/chat/a?"+bundles).readWhole(); err != nil || len(got.Messages) != 2 {
		t.Errorf("got %s, %v, want both messages in one frame", got.raw, err)
	}
	for _, value := range []string{"", "Bundles", "frames", "bundles&" + bundles} {
		path := "/chat/a?chat_broadcast_replay=" + value
		refused(t, http.StatusBadRequest, path, eventsHeader)
		raw := join(t, path)
		raw.wantText("one")
		raw.wantText("two")
	}
}

// TestReplay_GoesOnLive has a client that takes bundles join and come back while others send.
func TestReplay_GoesOnLive(t *testing.T) {
	startCaddy(t, resumeSite(100_000, 0))
	control := startRecorder(t, "/chat/a")
	defer control.close()
	halt := startSenders(t, "/chat/a", 400)
	if err := control.await(400); err != nil {
		t.Fatal(err)
	}
	first := joinEvents(t, "/chat/a?"+bundles)
	w := &returner{path: "/chat/a?" + bundles, epoch: first.hello.Epoch, last: first.hello.Head - first.hello.Replay}
	start := w.last
	for range first.hello.Replay + 100 {
		if err := w.take(first.event()); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if err := control.await(w.last + 50); err != nil {
			t.Fatal(err)
		}
		if err := w.catchUp(t, w.last+50); err != nil {
			t.Fatal(err)
		}
	}
	halt()
	if err := control.await(w.last); err != nil {
		t.Fatal(err)
	}
	control.mu.Lock()
	defer control.mu.Unlock()
	if !slices.Equal(w.texts, control.texts[start:w.last]) {
		t.Error("got other messages than the client that stayed")
	}
}
