package fileengine

import (
	"bufio"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

var kills = flag.Int("kills", 20, "how often TestSession_SurvivesKills kills a process")

// childRoles are what a child process of the tests can do. Its folder is the current one.
func childRoles() map[string]func(folder string) error {
	roles := map[string]func(folder string) error{
		"hold":    holdFile,
		"publish": publishUntilKilled,
	}
	addSystemRoles(roles)
	return roles
}

// runChild is the main function of a child process.
func runChild(role string) {
	if err := childRoles()[role]("."); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// A child is a child process. Its lines are what it prints.
type child struct {
	*exec.Cmd
	lines *bufio.Scanner
}

// startChild starts a child process, which the test kills when it ends.
func startChild(t *testing.T, role, folder string) *child {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "FILEENGINE_CHILD="+role)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &child{cmd, bufio.NewScanner(out)}
	t.Cleanup(c.kill)
	return c
}

// kill kills the process, which cannot do anything before it ends, and waits for its end.
func (c *child) kill() {
	_ = c.Process.Kill()
	for c.lines.Scan() { // or Wait would not know that nobody reads any more
	}
	_ = c.Wait()
}

// await waits for a line.
func (c *child) await(t *testing.T, line string) {
	t.Helper()
	for c.lines.Scan() {
		if c.lines.Text() == line {
			return
		}
		if strings.HasPrefix(c.lines.Text(), "error") {
			t.Fatalf("the child process says %q", c.lines.Text())
		}
	}
	t.Fatalf("the child process has ended without %q", line)
}

// holdFile opens the file and waits for the end.
func holdFile(folder string) error {
	if _, err := Open(folder, &monitor{}); err != nil {
		return err
	}
	fmt.Println("open")
	select {}
}

func TestOpenFile_WhenAnotherProcessUsesIt(t *testing.T) {
	folder := t.TempDir()
	holder := startChild(t, "hold", folder)
	holder.await(t, "open")
	began := time.Now()
	mustNotOpen(t, folder, "in use by another process")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the error took %v, want about a second", took)
	}
	holder.kill()
	publish(t, open(t, folder), "hub", "a")
}

// What the process that is killed publishes: 500 messages a second, from lanes that wait for the answer to each.
const (
	killHubs  = 5
	killLanes = 10 // a hub
	killPause = killHubs * killLanes * time.Second / 500
)

// killBounds keep everything in the hubs, except for the last one, where old messages must go.
func killBounds(hub int) engine.Bounds {
	if hub == killHubs-1 {
		return engine.Bounds{Messages: 100, Bytes: 1 << 20, Age: time.Hour, Receipts: 100}
	}
	return engine.Bounds{Messages: 1 << 20, Bytes: 1 << 30, Age: time.Hour, Receipts: 1 << 20}
}

// publishUntilKilled publishes, and prints what was acknowledged. Each lane goes on with the first message that was not
// acknowledged, which may have been published, and then has the same key.
func publishUntilKilled(folder string) error {
	s, err := Open(folder, &monitor{})
	if err != nil {
		return err
	}
	var mu sync.Mutex // of the output
	var lanes sync.WaitGroup
	for hub := range killHubs {
		for lane := range killLanes {
			lanes.Go(func() {
				next := 0
				if _, err := fmt.Sscan(os.Getenv(laneVariable(hub, lane)), &next); err != nil {
					fmt.Println("error:", err)
					return
				}
				time.Sleep(rand.N(killPause))
				for ; ; next++ {
					m := engine.Message{Data: []byte(laneData(lane, next)), Key: laneKey(lane, next), Attempt: engine.Again}
					receipts, err := s.Publish(context.Background(), killHub(hub), engine.Batch{Bounds: killBounds(hub), Messages: []engine.Message{m}})
					mu.Lock()
					if err != nil {
						fmt.Println("error:", err)
					} else {
						fmt.Println("ack", hub, lane, next, receipts[0].Seq, receipts[0].Epoch, receipts[0].Unknown)
					}
					mu.Unlock()
					time.Sleep(killPause)
				}
			})
		}
	}
	lanes.Wait()
	return nil
}

func killHub(hub int) string { return fmt.Sprint("hub ", hub) }

func laneVariable(hub, lane int) string { return fmt.Sprintf("FILEENGINE_LANE_%d_%d", hub, lane) }

func laneData(lane, n int) string { return fmt.Sprintf("%d/%d %0100d", lane, n, n) }

func laneKey(lane, n int) (key engine.Key) {
	binary.BigEndian.PutUint32(key[:], uint32(lane+1))
	binary.BigEndian.PutUint32(key[4:], uint32(n))
	return key
}

// A killedHub is what the test knows of a hub of the killed processes.
type killedHub struct {
	epoch        string
	acknowledged map[uint64]string // data by number
	next         [killLanes]int    // that has not been acknowledged
	newest       uint64            // number
}

// TestSession_SurvivesKills kills a process that publishes, again and again, at random moments.
func TestSession_SurvivesKills(t *testing.T) {
	folder := t.TempDir()
	hubs := make([]*killedHub, killHubs)
	for i := range hubs {
		hubs[i] = &killedHub{acknowledged: map[uint64]string{}}
	}
	total := 0
	for round := range *kills {
		for h, hub := range hubs {
			for lane, next := range hub.next {
				t.Setenv(laneVariable(h, lane), fmt.Sprint(next))
			}
		}
		publisher := startChild(t, "publish", folder)
		kill := sync.OnceFunc(func() {
			time.AfterFunc(rand.N(400*time.Millisecond), func() { _ = publisher.Process.Kill() })
		})
		if round%5 == 4 {
			kill() // maybe while it opens the file
		}
		for publisher.lines.Scan() {
			total += readAcknowledgement(t, hubs, publisher.lines.Text())
			kill()
		}
		_ = publisher.Wait()
		checkAfterKill(t, folder, hubs)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d kills, %d messages acknowledged", *kills, total)
	if total == 0 {
		t.Error("nothing was published")
	}
}

// readAcknowledgement notes what a line of the killed process says. It returns 1, unless the line is incomplete.
func readAcknowledgement(t *testing.T, hubs []*killedHub, line string) int {
	t.Helper()
	if strings.HasPrefix(line, "error") {
		t.Errorf("the process says %q", line)
	}
	var hub, lane, n int
	var seq uint64
	var epoch string
	var unknown bool
	if _, err := fmt.Sscanf(line, "ack %d %d %d %d %s %t", &hub, &lane, &n, &seq, &epoch, &unknown); err != nil {
		return 0 // the process was killed while it wrote the line
	}
	h := hubs[hub]
	h.next[lane] = n + 1
	if unknown {
		if hub != killHubs-1 {
			t.Errorf("the process does not know whether %s was published in hub %d", laneData(lane, n), hub)
		}
		return 0
	}
	h.acknowledged[seq] = laneData(lane, n)
	h.newest = max(h.newest, seq)
	if h.epoch == "" {
		h.epoch = epoch
	}
	if epoch != h.epoch {
		t.Errorf("hub %d has epoch %s, and had %s", hub, epoch, h.epoch)
	}
	return 1
}

// checkAfterKill checks that the file has everything that was acknowledged, and nothing twice.
func checkAfterKill(t *testing.T, folder string, hubs []*killedHub) {
	t.Helper()
	s := open(t, folder)
	for i, hub := range hubs {
		snapshot := lookWith(t, s, killHub(i), killBounds(i))
		if hub.epoch != "" && snapshot.Epoch != hub.epoch {
			t.Errorf("hub %d has epoch %s, and had %s", i, snapshot.Epoch, hub.epoch)
		}
		if snapshot.Seq < hub.newest {
			t.Errorf("hub %d has number %d, and %d was acknowledged", i, snapshot.Seq, hub.newest)
		}
		if got := snapshot.Seq - snapshot.Base; got != uint64(len(snapshot.Entries)) {
			t.Errorf("hub %d has %d entries, and numbers for %d", i, len(snapshot.Entries), got)
		}
		if i < killHubs-1 && snapshot.Base != 0 {
			t.Errorf("hub %d has lost its first %d entries", i, snapshot.Base)
		}
		seen := map[string]uint64{}
		for n, data := range dataOf(snapshot) {
			seq := snapshot.Base + 1 + uint64(n)
			if before, twice := seen[data]; twice {
				t.Errorf("hub %d has %q as number %d and %d", i, data, before, seq)
			}
			seen[data] = seq
			if want, known := hub.acknowledged[seq]; known && data != want {
				t.Errorf("hub %d has %q as number %d, and acknowledged %q", i, data, seq, want)
			}
		}
		for seq, data := range hub.acknowledged {
			if seq > snapshot.Base && seen[data] != seq {
				t.Errorf("hub %d has lost %q, number %d, which was acknowledged", i, data, seq)
			}
		}
	}
	checkSums(t, s)
	closeSession(t, s)
}
