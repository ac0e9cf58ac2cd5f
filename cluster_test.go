package chatbroadcast

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// faultRounds is how often each fault of TestCluster_ClientsSurvive happens. A long run is "-faults 20".
var faultRounds = flag.Int("faults", 3, "how often each fault of a cluster happens; with 4 and more also those that take long")

// A cluster is some Caddys that share the hubs of one Redis.
type cluster struct {
	t       testing.TB
	redis   *redisServer
	engines []string // the option of each node
	nodes   []*process
	loads   int
}

// startCluster starts a node for each of some engines.
func startCluster(t testing.TB, redis *redisServer, engines ...string) *cluster {
	t.Helper()
	c := &cluster{t: t, redis: redis, engines: engines, nodes: make([]*process, len(engines))}
	for i, engine := range engines {
		c.nodes[i] = startProcess(t, clusterOptions(engine), clusterSites)
	}
	return c
}

// clusterOptions are the global options of a node. No history is forgotten for want of memory.
func clusterOptions(engine string) string {
	return fmt.Sprintf("chat_broadcast {\n\t\tengine %s\n\t\tmax_history 1GiB\n\t\tmax_buffers 1GiB\n\t}", engine)
}

// places returns where the nodes are.
func (c *cluster) places(t testing.TB) []place {
	places := make([]place, len(c.nodes))
	for i, node := range c.nodes {
		places[i] = node.in(t)
	}
	return places
}

// any returns a random node.
func (c *cluster) any() int { return rand.IntN(len(c.nodes)) }

// What becomes of the epochs of hubs in a fault.
const (
	sameEpoch = iota // nothing that was answered may be lost
	newEpoch         // clients learn that messages may be lost
	anyEpoch         // depends on what was lost
)

// A fault happens while clients send and receive.
type fault struct {
	name   string
	epochs int
	slow   bool // it takes some seconds, so it happens once in a short run
	long   bool // it takes so long that it happens only in a long run, with -faults 4 and more
	happen func(t *testing.T, c *cluster)
}

// run has a fault happen to a cluster, as often as the flag says, and checks what all clients have seen.
func (c *cluster) run(t *testing.T, faults ...fault) {
	for _, f := range faults {
		rounds := *faultRounds
		if rounds <= 3 && f.long {
			continue
		}
		if rounds <= 3 && f.slow {
			rounds = 1
		}
		t.Run(f.name, func(t *testing.T) {
			var slowest time.Duration
			var answered, refused int
			outcomes := map[string]int{}
			done := 0
			for range rounds {
				took, r := c.round(t, &f)
				done++
				slowest = max(slowest, took)
				a, b := r.counts()
				answered, refused = answered+a, refused+b
				for how, n := range r.outcomes {
					outcomes[how] += n
				}
				if t.Failed() {
					break
				}
			}
			t.Logf("%s: %d rounds, %d answered, %d refused, settled within %v; %v", f.name, done, answered, refused, slowest.Round(time.Millisecond), outcomes)
		})
	}
}

// round has a fault happen once. It returns how long the clients took afterwards until all had everything.
func (c *cluster) round(t *testing.T, f *fault) (time.Duration, *record) {
	c.loads++
	l := startLoad(t, c.places(t), fmt.Sprint(c.loads))
	defer l.end()
	eventually(t, "answers in all hubs", func() bool { return l.record.hasAnswers(len(l.hubs)) })
	l.pause(500 * time.Millisecond)
	f.happen(t, c)
	took, err := l.settle(patience)
	if err != nil {
		t.Errorf("a minute after the fault: %v", err)
		l.end()
		c.report(t, l.record.check(nil, false))
		return took, l.record
	}
	logs, err := l.final()
	if err != nil {
		t.Error(err)
	}
	l.end()
	c.report(t, l.record.check(logs, f.epochs == sameEpoch))
	fewest, most := l.record.epochCounts()
	switch {
	case f.epochs == sameEpoch && most > 1:
		t.Errorf("got up to %d epochs of a hub, want 1: nothing is lost", most)
	case f.epochs == newEpoch && fewest < 2:
		t.Errorf("got a hub with %d epochs, want a new one: messages may be lost", fewest)
	case f.epochs == sameEpoch && l.record.outcomes["hub_reset"] > 0:
		t.Errorf("%d clients were closed with hub_reset, want none", l.record.outcomes["hub_reset"])
	}
	return took, l.record
}

// report shows contradictions.
func (c *cluster) report(t *testing.T, contradictions []string) {
	for i, text := range contradictions {
		if i == maxContradictions {
			t.Errorf("and %d more", len(contradictions)-i)
			break
		}
		t.Error(text)
	}
}

// hasAnswers reports whether messages were answered in n hubs.
func (r *record) hasAnswers(n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.hubs {
		if len(h.answered) > 5 {
			n--
		}
	}
	return n <= 0
}

// TestCluster_ClientsSurvive has clients of both kinds on all nodes of a cluster while something fails. Whatever they see must
// agree; see record.
func TestCluster_ClientsSurvive(t *testing.T) {
	skipShort(t)
	tests := map[string]func(*testing.T){
		"a restart without persistence": testVolatileRestarts,
		"a restart with always":         testLosslessRestarts,
		"a restart with everysec":       testDurableRestarts,
		"a backup":                      testBackups,
		"a failover":                    testFailover,
		"a failover by Sentinel":        testSentinel,
		"a bad network":                 testBadNetwork,
		"a stopped Redis":               testStoppedRedis,
		"a stopped node":                testStoppedNode,
		"no memory":                     testNoMemory,
		"nodes that end":                testNodes,
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

// testVolatileRestarts has a Redis that keeps nothing lose everything.
func testVolatileRestarts(t *testing.T) {
	r := startRedis(t)
	startCluster(t, r, r.engine(), r.engine(), r.engine()).run(t,
		fault{name: "kill", epochs: newEpoch, happen: func(t *testing.T, c *cluster) { c.redis.kill(); c.redis.start() }},
		fault{name: "FLUSHALL", epochs: newEpoch, happen: func(t *testing.T, c *cluster) { c.redis.command(t, "FLUSHALL") }},
		fault{name: "SCRIPT FLUSH", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) { c.redis.command(t, "SCRIPT FLUSH") }},
	)
}

// testLosslessRestarts kills a Redis that has on the disk what it has answered.
func testLosslessRestarts(t *testing.T) {
	r := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	startCluster(t, r, r.engine(), r.engine()).run(t,
		fault{name: "kill", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) { c.redis.kill(); c.redis.start() }},
	)
}

// testDurableRestarts kills a Redis that may lose the last second.
func testDurableRestarts(t *testing.T) {
	r := startRedis(t, "--appendonly", "yes", "--appendfsync", "everysec")
	startCluster(t, r, r.engine(), r.engine()).run(t,
		fault{name: "kill", epochs: newEpoch, happen: func(t *testing.T, c *cluster) { c.redis.kill(); c.redis.start() }},
		fault{name: "the tail of the file cut", epochs: newEpoch, happen: func(t *testing.T, c *cluster) {
			c.redis.kill()
			c.redis.cutAppendOnlyFile(2 << 10)
			c.redis.start()
		}},
	)
}

// testBackups restores an old snapshot of the data.
func testBackups(t *testing.T) {
	r := startRedis(t)
	startCluster(t, r, r.engine(), r.engine()).run(t, fault{name: "an old snapshot", epochs: newEpoch, happen: func(t *testing.T, c *cluster) {
		c.redis.command(t, "SAVE")
		time.Sleep(500 * time.Millisecond) // messages after the snapshot
		c.redis.kill()
		c.redis.start()
	}})
}

// testFailover has a replica take the place of the primary, which lacks the newest messages. Both are behind one address.
func testFailover(t *testing.T) {
	primary, replica := startRedis(t), startRedis(t)
	proxy := startProxy(t, primary.address())
	engine := "redis redis://" + proxy.address()
	startCluster(t, primary, engine, engine).run(t, fault{name: "a replica", epochs: newEpoch, happen: func(t *testing.T, c *cluster) {
		replica.follow(t, primary)
		time.Sleep(200 * time.Millisecond) // messages that the replica has
		replica.command(t, "REPLICAOF NO ONE")
		time.Sleep(200 * time.Millisecond) // messages that it does not have
		proxy.set(func() { proxy.target = replica.address() })
		proxy.cut()
		primary, replica = replica, primary
	}})
}

// testSentinel has Sentinel promote a replica. At the end it may name the old primary for a moment, so for a moment two nodes may
// use two servers. A message that one of them loses then is in an epoch that its clients see end.
func testSentinel(t *testing.T) {
	primary, replica := startRedis(t, "--repl-diskless-sync-delay", "0"), startRedis(t, "--repl-diskless-sync-delay", "0")
	replica.follow(t, primary)
	sentinel := startSentinel(t, primary)
	engine := fmt.Sprintf("redis redis+sentinel://%s/main", sentinel.address())
	startCluster(t, primary, engine, engine).run(t, fault{name: "killed", epochs: newEpoch, slow: true, happen: func(t *testing.T, c *cluster) {
		eventually(t, "Sentinel to know a replica that is there", func() bool {
			if strings.Contains(sentinel.command(t, "SENTINEL get-master-addr-by-name main"), fmt.Sprint(replica.port)) {
				primary, replica = replica, primary // it has changed its mind since the round before
			}
			return strings.Contains(sentinel.command(t, "SENTINEL CKQUORUM main"), "OK") &&
				strings.Contains(sentinel.command(t, "INFO sentinel"), "status=ok") &&
				strings.Contains(sentinel.command(t, "INFO sentinel"), "slaves=1") &&
				strings.Contains(replica.command(t, "INFO replication"), "master_link_status:up")
		})
		primary.kill()
		// An old primary that comes back before the Sentinel has named the new one may become the primary again.
		eventually(t, "the replica to be promoted", func() bool {
			return strings.Contains(replica.command(t, "INFO replication"), "role:master") &&
				strings.Contains(sentinel.command(t, "SENTINEL get-master-addr-by-name main"), fmt.Sprint(replica.port))
		})
		primary.start()
		primary, replica = replica, primary
	}})
}

// testBadNetwork has one of two nodes behind a proxy that loses something.
func testBadNetwork(t *testing.T) {
	r := startRedis(t)
	p := startProxy(t, r.address())
	lose := func(what *bool, long time.Duration) func(*testing.T, *cluster) {
		return func(*testing.T, *cluster) {
			p.set(func() { *what = true })
			time.Sleep(long)
			p.set(func() { *what = false })
		}
	}
	startCluster(t, r, "redis redis://"+p.address(), r.engine()).run(t,
		fault{name: "replies lost", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) {
			lose(&p.loseReplies, rand.N(2*time.Second))(t, c)
			if rand.IntN(2) == 0 {
				p.cut()
			}
		}},
		fault{name: "pushes lost", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) {
			lose(&p.losePushes, rand.N(4*time.Second))(t, c)
			if rand.IntN(2) == 0 {
				p.cut()
			}
		}},
		fault{name: "frozen", epochs: sameEpoch, happen: lose(&p.frozen, 2*time.Second)},
		fault{name: "connections cut", epochs: sameEpoch, happen: func(*testing.T, *cluster) { p.cut() }},
		fault{name: "frozen for long", epochs: sameEpoch, slow: true, happen: lose(&p.frozen, 12*time.Second)},
	)
}

// testStoppedRedis stops Redis for a while.
func testStoppedRedis(t *testing.T) {
	stop := func(long time.Duration) func(*testing.T, *cluster) {
		return func(t *testing.T, c *cluster) {
			c.redis.signal(syscall.SIGSTOP)
			time.Sleep(long)
			c.redis.signal(syscall.SIGCONT)
		}
	}
	r := startRedis(t)
	startCluster(t, r, r.engine(), r.engine()).run(t,
		fault{name: "1 s", epochs: sameEpoch, happen: stop(time.Second)},
		fault{name: "8 s", epochs: sameEpoch, slow: true, happen: stop(8 * time.Second)},
		fault{name: "20 s", epochs: sameEpoch, long: true, happen: stop(20 * time.Second)},
	)
}

// testStoppedNode stops a node for a while. Its clients stay, or go to the other one.
func testStoppedNode(t *testing.T) {
	stop := func(long time.Duration) func(*testing.T, *cluster) {
		return func(t *testing.T, c *cluster) {
			node := c.nodes[c.any()].cmd.Process
			_ = node.Signal(syscall.SIGSTOP)
			time.Sleep(long)
			_ = node.Signal(syscall.SIGCONT)
		}
	}
	r := startRedis(t)
	startCluster(t, r, r.engine(), r.engine()).run(t,
		fault{name: "1 s", epochs: sameEpoch, happen: stop(time.Second)},
		fault{name: "8 s", epochs: sameEpoch, slow: true, happen: stop(8 * time.Second)},
		fault{name: "20 s", epochs: sameEpoch, long: true, happen: stop(20 * time.Second)},
	)
}

// testNoMemory leaves Redis too little memory.
func testNoMemory(t *testing.T) {
	r := startRedis(t)
	limit := func(policy string, long time.Duration) func(*testing.T, *cluster) {
		return func(t *testing.T, c *cluster) {
			c.redis.command(t, "CONFIG SET maxmemory-policy "+policy)
			c.redis.command(t, "CONFIG SET maxmemory 100000")
			time.Sleep(long)
			c.redis.command(t, "CONFIG SET maxmemory 0")
		}
	}
	startCluster(t, r, r.engine(), r.engine()).run(t,
		fault{name: "noeviction", epochs: sameEpoch, happen: limit("noeviction", 2*time.Second)},
		fault{name: "noeviction for long", epochs: sameEpoch, long: true, happen: limit("noeviction", 12*time.Second)},
		fault{name: "allkeys-random", epochs: anyEpoch, happen: limit("allkeys-random", time.Second)},
		fault{name: "some evicted", epochs: anyEpoch, happen: func(t *testing.T, c *cluster) {
			c.redis.command(t, "CONFIG SET maxmemory-policy allkeys-random")
			used := 0
			for line := range strings.Lines(c.redis.command(t, "INFO memory")) {
				_, _ = fmt.Sscanf(line, "used_memory:%d", &used)
			}
			c.redis.command(t, fmt.Sprint("CONFIG SET maxmemory ", used-10_000))
			time.Sleep(500 * time.Millisecond)
			c.redis.command(t, "CONFIG SET maxmemory 0")
		}},
	)
}

// testNodes kills nodes and reloads their configuration.
func testNodes(t *testing.T) {
	r := startRedis(t)
	var reloads atomic.Int64
	startCluster(t, r, r.engine(), r.engine(), r.engine()).run(t,
		fault{name: "killed", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) {
			i := c.any()
			_ = c.nodes[i].cmd.Process.Kill()
			<-c.nodes[i].exited
			time.Sleep(rand.N(time.Second))
			c.nodes[i] = c.nodes[i].startAgain(clusterOptions(c.engines[i]), clusterSites)
		}},
		fault{name: "stopped in order", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) {
			i := c.any()
			c.nodes[i].terminate()
			c.nodes[i] = c.nodes[i].startAgain(clusterOptions(c.engines[i]), clusterSites)
		}},
		fault{name: "reloads", epochs: sameEpoch, happen: func(t *testing.T, c *cluster) {
			for i, node := range c.nodes {
				site := strings.Replace(clusterSites, "{", fmt.Sprintf("{\n\theader X-Reload %d", reloads.Add(1)), 1)
				if err := node.post(clusterOptions(c.engines[i]), site); err != nil {
					t.Error(err)
				}
			}
		}},
	)
}

// ---- Redis ----

// command sends a command, whose arguments have no spaces, and returns the answer: its parts, one a line.
func (r *redisServer) command(t testing.TB, command string) string {
	t.Helper()
	conn, err := net.DialTimeout("tcp", r.address(), patience)
	if err != nil {
		return "" // it is not there
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintf(conn, "%s\r\n", command); err != nil {
		t.Fatal(err)
	}
	var answer strings.Builder
	if err := readAnswer(bufio.NewReader(conn), &answer); err != nil {
		return "" // it has ended meanwhile
	}
	return answer.String()
}

// readAnswer adds an answer of Redis to b. An error that Redis answers is an answer, too.
func readAnswer(r *bufio.Reader, b *strings.Builder) error {
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	kind, line := line[0], strings.TrimSpace(line[1:])
	n, _ := strconv.Atoi(line) // used only where it is a number
	switch kind {
	case '$':
		data := make([]byte, max(n, 0)+len("\r\n"))
		if n < 0 {
			return nil
		}
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		fmt.Fprintf(b, "%s\n", data[:n])
	case '*':
		for range n {
			if err := readAnswer(r, b); err != nil {
				return err
			}
		}
	default:
		fmt.Fprintf(b, "%s\n", line)
	}
	return nil
}

// cutAppendOnlyFile takes the last bytes from the append-only file, as a crash of the machine may do.
func (r *redisServer) cutAppendOnlyFile(n int64) {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(r.dir, "appendonlydir", "*.incr.aof"))
	if err != nil || len(files) == 0 {
		r.t.Fatalf("no append-only file in %s: %v", r.dir, err)
	}
	file := files[len(files)-1]
	info, err := os.Stat(file)
	if err == nil {
		err = os.Truncate(file, max(info.Size()-n, 0))
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// follow makes r a replica, and waits until it has all data.
func (r *redisServer) follow(t testing.TB, primary *redisServer) {
	t.Helper()
	r.command(t, fmt.Sprintf("REPLICAOF 127.0.0.1 %d", primary.port))
	eventually(t, "the replica to have all data", func() bool {
		return strings.Contains(r.command(t, "INFO replication"), "master_link_status:up")
	})
}

// startSentinel starts a Sentinel that watches a primary under the name main.
func startSentinel(t testing.TB, primary *redisServer) *redisServer {
	t.Helper()
	s := &redisServer{t: t, port: freePort(), dir: t.TempDir()}
	name := filepath.Join(s.dir, "sentinel.conf")
	config := fmt.Sprintf("sentinel monitor main 127.0.0.1 %d 1\nsentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 3000\n", primary.port)
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s.before = []string{name, "--sentinel"}
	s.start()
	t.Cleanup(s.kill)
	return s
}
