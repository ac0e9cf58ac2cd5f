//go:build unix

package redisengine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// loops returns how often a fault is repeated: more often with CHAT_BROADCAST_LOOPS.
func loops(usual int) int {
	if n, err := strconv.Atoi(os.Getenv("CHAT_BROADCAST_LOOPS")); err == nil {
		return n
	}
	return usual
}

// repeat repeats s.
func repeatString(s string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = s
	}
	return all
}

func TestFault_RestartWithAlwaysLosesNothing(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	c := startCluster(t, repeatString(redis.url(), 3)...)
	for range loops(3) {
		c.during(redis.restart)
	}
	c.settle(true)
}

func TestFault_RestartBeginsNewEpochs(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"without persistence": nil,
		"everysec":            {"--appendonly", "yes"},
		"snapshots":           {"--save", "1 1"},
		"always, CONFIG refused": {
			"--appendonly", "yes", "--appendfsync", "always", "--rename-command", "CONFIG", "",
		},
		"always, not while rewriting": {
			"--appendonly", "yes", "--appendfsync", "always", "--no-appendfsync-on-rewrite", "yes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := startRedis(t, args...)
			c := startCluster(t, repeatString(redis.url(), 2)...)
			for range loops(2) {
				c.during(redis.restart)
				c.settle(false)
			}
			if got, want := c.ledger.epochs("hub 0"), loops(2)+1; got < want {
				t.Errorf("after %d restarts a hub had %d epochs, want at least %d", loops(2), got, want)
			}
		})
	}
}

// TestFault_RestartWithoutTheFile lets a server that was safe come back with an older snapshot.
func TestFault_RestartWithoutTheFileBeginsNewEpochs(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	n := connect(t, redis.url())
	before := n.publish("hub", "a")[0].Position
	redis.do("SAVE")
	n.publish("hub", "b")
	ups := n.countUps()
	redis.args = nil
	redis.restart()
	n.awaitUps(ups)
	after := n.publish("hub", "c")[0].Position
	if after.Epoch == before.Epoch || after.Seq != 2 {
		t.Errorf("with an old snapshot a message is at %v, want number 2 of another epoch than %s", after, before.Epoch)
	}
}

// TestFault_RestartAfterRewriteLosesNothing lets the server rewrite its append-only file, which must change nothing.
func TestFault_RestartAfterRewriteLosesNothing(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	c := startCluster(t, repeatString(redis.url(), 2)...)
	c.during(func() {
		redis.do("BGREWRITEAOF")
		for _, n := range c.nodes {
			n.link.Load().examineAgain(t.Context())
		}
		redis.restart()
	})
	c.settle(true)
}

// TestFault_RestartAfterWeakSettings lets the server be as safe as can be when it stops and when it comes back, but not
// always before.
func TestFault_RestartAfterWeakSettingsBeginsNewEpochs(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	n := connect(t, redis.url())
	before := n.publish("hub", "a")[0].Position
	for _, value := range []string{"everysec", "always"} {
		redis.do("CONFIG", "SET", "appendfsync", value)
		n.link.Load().examineAgain(t.Context())
	}
	ups := n.countUps()
	redis.restart()
	n.awaitUps(ups)
	if after := n.publish("hub", "b")[0].Position; after.Epoch == before.Epoch {
		t.Errorf("after a restart a message is at %v, want another epoch", after)
	}
}

// TestFault_OldSnapshot lets the server come back with what it had at an earlier moment.
func TestFault_OldSnapshot(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	c := startCluster(t, repeatString(redis.url(), 2)...)
	c.during(func() {})
	redis.do("SAVE")
	c.during(func() {})
	before, _, _ := c.cores[0][0].state()
	c.during(redis.restart)
	c.settle(false)
	after, _, log := c.cores[0][0].state()
	if after.Epoch == before.Epoch {
		t.Errorf("with an old snapshot the epoch is still %s", after.Epoch)
	}
	if len(log) == 0 || log[0] == "" {
		t.Error("what the snapshot had is lost")
	}
}

// TestFault_DataRunBackInOneProcess lets the process stay the same, so that only a node can know.
func TestFault_DataRunBackInOneProcess(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--enable-debug-command", "yes")
	one, two := connect(t, redis.url()), connect(t, redis.url())
	before := one.publish("hub", "a", "b")[1].Position
	redis.do("SAVE")
	lost := one.publish("hub", "c")[0].Position
	redis.do("DEBUG", "RELOAD", "NOSAVE")

	batch := engine.Batch{Bounds: bounds, Known: lost, Messages: messages("d")}
	after := two.publishBatch("hub", batch)[0].Position
	if after.Epoch == before.Epoch {
		t.Errorf("%v names two messages", after)
	}
	r := two.open("hub")
	r.wantTexts("a", "b", "d")
	known := engine.Known{Hub: "hub", Position: engine.Position{Epoch: after.Epoch, Seq: after.Seq + 1}, Bounds: bounds}
	if changed := one.renew(known).Changed; len(changed) != 1 || changed[0].Epoch == after.Epoch {
		t.Errorf("Renew beyond the newest number returned %v, want a new epoch", changed)
	}
}

func TestFault_FlushAll(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	c := startCluster(t, repeatString(redis.url(), 3)...)
	for range loops(3) {
		c.during(func() { redis.do("FLUSHALL") })
	}
	c.settle(false)
	numbers := map[uint64]bool{}
	for _, n := range c.nodes {
		n.renew()
		numbers[n.Number()] = true
	}
	if len(numbers) != 3 {
		t.Errorf("the numbers of three nodes are %v", numbers)
	}
}

func TestFault_ScriptFlush(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	c := startCluster(t, repeatString(redis.url(), 3)...)
	for range loops(5) {
		c.during(func() { redis.do("SCRIPT", "FLUSH") })
	}
	c.settle(true)
}

func TestFault_EvictedEntriesKeepTheirNumbers(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	r := n.open("hub")
	first := n.publish("hub", "a", "b")
	redis.do("DEL", "chat_broadcast:log:{hub}")
	if s := n.read("hub", engine.Position{}); s.Position != first[1].Position || len(s.Entries) != 0 || s.Base != 2 {
		t.Errorf("without its entries the hub is %+v, want it at %v", s, first[1].Position)
	}
	redis.do("DEL", "chat_broadcast:log:{hub}")
	third := n.publish("hub", "c")
	redis.do("DEL", "chat_broadcast:log:{hub}")
	fourth := n.publish("hub", "d")
	if third[0].Seq != 3 || fourth[0].Position != (engine.Position{Epoch: first[0].Epoch, Seq: 4}) {
		t.Errorf("the next messages are at %v and %v, want 3 and 4 in epoch %s", third[0], fourth[0], first[0].Epoch)
	}
	r.wantTexts("a", "b", "c", "d")
	n.open("hub").wantTexts("d")
	if ttl := redis.do("TTL", "chat_broadcast:log:{hub}"); ttl == "-1" {
		t.Error("the new list lives for ever")
	}
}

func TestFault_EvictedHubHasANewEpoch(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	r := n.open("hub")
	first := n.publish("hub", "a")[0]
	redis.do("DEL", "chat_broadcast:hub:{hub}")
	second := n.publish("hub", "b")[0]
	if second.Epoch == first.Epoch {
		t.Errorf("two messages are at %v and %v, want another epoch", first.Position, second.Position)
	}
	r.wantTexts("a", "b")
	n.open("hub").wantTexts("b")
}

// TestFault_LostAnswers breaks connections after scripts have run and before their answers arrive.
func TestFault_LostAnswersDoubleNothing(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	proxies := []*proxy{startProxy(t, redis.address()), startProxy(t, redis.address())}
	c := startCluster(t, proxies[0].url(), proxies[1].url())
	for range loops(5) {
		c.during(func() {
			for _, p := range proxies {
				p.loseAnswers.Store(1)
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	for _, p := range proxies {
		p.loseAnswers.Store(0)
	}
	c.settle(true)
}

func TestFault_LostPushesAreFoundByRenew(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	p := startProxy(t, redis.address())
	one, two := connect(t, redis.url()), connect(t, p.url())
	r := two.open("hub")
	a := one.publish("hub", "a")[0].Position
	r.await(a)
	p.losePushes.Store(true)
	b := one.publish("hub", "b")[0].Position
	one.open("hub")
	one.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	p.losePushes.Store(false)
	changed := two.renew(r.known("hub")).Changed
	if len(changed) != 1 || changed[0].Position != b || changed[0].Version != 1 {
		t.Errorf("Renew returned %v, want the hub at %v with version 1", changed, b)
	}
	if s := two.read("hub", a); len(s.Entries) != 1 || s.Base != 1 || string(s.Entries[0].Data) != "b" {
		t.Errorf("Read returned %+v, want b", s)
	}
	c := one.publish("hub", "c")[0].Position
	r.await(c)
	r.wantTexts("a", "c") // the gap is the business of the hub
}

func TestFault_KilledSubscriptionsAreReplaced(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	c := startCluster(t, repeatString(redis.url(), 2)...)
	for range mostShortLived {
		ups := c.nodes[0].countUps()
		c.during(func() {
			redis.do("CLIENT", "KILL", "TYPE", "pubsub")
			c.nodes[0].awaitUps(ups)
		})
	}
	c.settle(true)
	for _, s := range c.nodes[0].states {
		if s != fmt.Sprint(error(nil)) {
			t.Errorf("without the connection for subscriptions the state was %s", s)
		}
	}
}

// TestFault_SilentSubscriptionIsReplaced loses all messages on a connection that answers otherwise.
func TestFault_SilentSubscriptionIsReplaced(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	p := startProxy(t, redis.address())
	n := connect(t, p.url())
	r := n.open("hub")
	ups := n.countUps()
	p.losePushes.Store(true)
	began := time.Now()
	n.awaitUps(ups)
	if took := time.Since(began); took < probeTimeout || took > probeTimeout+2*probeInterval+2*time.Second {
		t.Errorf("it took %v until a dead subscription was replaced", took)
	}
	p.losePushes.Store(false)
	n.publish("hub", "a")
	r.wantTexts("a")
}

func TestFault_InterruptedConnectionsLoseNothing(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	proxies := []*proxy{startProxy(t, redis.address()), startProxy(t, redis.address())}
	c := startCluster(t, proxies[0].url(), proxies[1].url())
	for i := range loops(4) {
		p := proxies[i%2]
		c.during(func() {
			p.interrupt()
			time.Sleep(50 * time.Millisecond)
			p.restore()
		})
	}
	c.settle(true)
}

func TestFault_HangingServerLosesNothing(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	c := startCluster(t, repeatString(redis.url(), 2)...)
	c.during(func() {
		redis.signal(syscall.SIGSTOP)
		time.Sleep(3 * time.Second)
		redis.signal(syscall.SIGCONT)
	})
	c.settle(true)
	for _, n := range c.nodes {
		if len(n.states) != 1 {
			t.Errorf("the states of a node were %q, want no change", n.states)
		}
	}
}

func TestFault_CallsEndWithTheirContextWhileTheServerHangs(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	n.open("hub")
	redis.signal(syscall.SIGSTOP)
	defer redis.signal(syscall.SIGCONT)
	calls := map[string]func() error{
		"Publish": func() error {
			return ignore(n.Publish(deadline(t), "hub", engine.Batch{Bounds: bounds, Messages: messages("a")}))
		},
		"Open":     func() error { return ignore(n.Open(deadline(t), "other", bounds, &receiver{})) },
		"Read":     func() error { return ignore(n.Read(deadline(t), "hub", engine.Position{})) },
		"Forget":   func() error { return n.Forget(deadline(t), "hub") },
		"Announce": func() error { return n.Announce(deadline(t), "hub", []engine.UserCount{{User: "ann"}}) },
		"Renew":    func() error { return ignore(n.Renew(deadline(t), engine.Status{}, nil)) },
		"Nodes":    func() error { return ignore(n.Nodes(deadline(t))) },
	}
	for name, call := range calls {
		began := time.Now()
		err := call()
		if took := time.Since(began); err == nil || took > time.Second {
			t.Errorf("%s returned %v after %v, want an error after 100ms", name, err, took)
		}
	}
	// More calls than a connection takes at a time.
	done := make(chan error)
	for range 2 * mostInFlight {
		go func() { // ends with its deadline, and is waited for below
			_, err := n.Publish(deadline(t), "hub", engine.Batch{Bounds: bounds, Messages: messages("a")})
			done <- err
		}()
	}
	unavailable := 0
	for range 2 * mostInFlight {
		select {
		case err := <-done:
			if errors.Is(err, engine.ErrUnavailable) {
				unavailable++
			}
		case <-time.After(patience):
			t.Fatal("a call outlives its context")
		}
	}
	if unavailable < mostInFlight {
		t.Errorf("of %d calls %d say that they were not sent, want at least %d", 2*mostInFlight, unavailable, mostInFlight)
	}
	began := time.Now()
	n.Close()
	if took := time.Since(began); took > closeTimeout+2*time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestFault_NoMemoryRefusesMessages(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	r := n.open("hub")
	n.publish("hub", "a")
	redis.do("CONFIG", "SET", "maxmemory", "1mb")
	_, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Number: 2, Messages: messages("b")})
	if !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("Publish without memory returned %v, want ErrUnavailable", err)
	}
	// What there is can be used, and the node stays alive.
	n.open("hub").wantTexts("a")
	n.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	if renewal := n.renew(r.known("hub")); renewal.Forgotten {
		t.Error("without memory the node was forgotten")
	}
	redis.do("CONFIG", "SET", "maxmemory", "0")
	n.publishBatch("hub", engine.Batch{Bounds: bounds, Number: 2, Messages: messages("b")})
	n.open("hub").wantTexts("a", "b")
}

func TestFault_TooFewReplicasRefuseMessages(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	redis.do("CONFIG", "SET", "min-replicas-to-write", "1")
	_, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Messages: messages("a")})
	if !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("Publish without enough replicas returned %v, want ErrUnavailable", err)
	}
	redis.do("CONFIG", "SET", "min-replicas-to-write", "0")
	if r := n.publish("hub", "b")[0]; r.Seq != 1 {
		t.Errorf("the first message has number %d, want 1", r.Seq)
	}
}

// TestFault_TruncatedFile cuts acknowledged messages off the end of an append-only file.
func TestFault_TruncatedFile(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes")
	c := startCluster(t, repeatString(redis.url(), 2)...)
	c.during(func() {})
	c.during(func() {
		redis.kill()
		name := redis.appendOnlyFile()
		file, err := os.Stat(name)
		if err == nil {
			err = os.Truncate(name, file.Size()*9/10)
		}
		if err != nil {
			t.Fatal(err)
		}
		redis.start()
	})
	c.settle(false)
}

// TestFault_IncompleteFile leaves half a command at the end of an append-only file, as a crash does.
func TestFault_IncompleteFile(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	c := startCluster(t, repeatString(redis.url(), 2)...)
	c.during(func() {
		redis.kill()
		file, err := os.OpenFile(redis.appendOnlyFile(), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		file.WriteString("*3\r\n$5\r\nRPUSH\r\n$30\r\nchat")
		file.Close()
		redis.start()
	})
	c.settle(true)
}

// appendOnlyFile returns the name of the file to which commands are appended.
func (r *redisServer) appendOnlyFile() string {
	return filepath.Join(r.dir, "appendonlydir", "appendonly.aof.1.incr.aof")
}
