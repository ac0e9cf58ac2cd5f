package chatbroadcast

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// speedSites has a hub without history for each path.
const speedSites = `http://localhost {
	chat_broadcast /speed/* {
		hub {http.request.uri.path}
	}
}`

// BenchmarkCluster_Speed prints what a cluster costs, against the engine memory. It wants the machine for itself.
func BenchmarkCluster_Speed(b *testing.B) {
	b.Run("throughput", func(b *testing.B) { measureThroughput(b) })
	for _, engine := range []string{"memory", "redis"} {
		b.Run("latency/"+engine, func(b *testing.B) { measureLatency(b, startEngine(b, engine)) })
		b.Run("deliveries/"+engine, func(b *testing.B) { measureDeliveries(b, startEngine(b, engine)) })
	}
}

// startEngine starts a node with an engine.
func startEngine(t testing.TB, engine string) *process {
	if engine == "redis" {
		engine = startRedis(t).engine()
	}
	return startProcess(t, withEngine(engine), speedSites)
}

// measureThroughput sends messages into 100 hubs, each of which has a client on each of three nodes.
func measureThroughput(t testing.TB) {
	const (
		hubCount = 100
		perTick  = 12 // messages a hub and tick
		tick     = 100 * time.Millisecond
		long     = 10 * time.Second
	)
	r := startRedis(t)
	var nodes []*process
	for range 3 {
		nodes = append(nodes, startProcess(t, withEngine(r.engine()), speedSites))
	}
	var received atomic.Int64
	var running sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer func() { stop(); running.Wait() }()
	var senders []net.Conn
	for i := range hubCount {
		hub := fmt.Sprint("/speed/", i)
		for j, node := range nodes {
			p := node.join(hub)
			running.Go(func() { countFrames(p, &received) }) // ends with the connection
			context.AfterFunc(ctx, func() { p.conn.Close() })
			if j == i%len(nodes) {
				senders = append(senders, p.conn)
			}
		}
	}
	payload := clientFrame(finBit|opText, []byte(strings.Repeat("x", 100)))
	burst := []byte(strings.Repeat(string(payload), perTick))
	before, cpu := received.Load(), readTimes(t, r, nodes)
	began := time.Now()
	sent := 0
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for time.Since(began) < long {
		<-ticker.C
		for _, conn := range senders {
			if _, err := conn.Write(burst); err != nil {
				t.Fatal(err)
			}
			sent += perTick
		}
	}
	eventually(t, "all messages to arrive everywhere", func() bool { return received.Load()-before == int64(sent*len(nodes)) })
	took := time.Since(began)
	used := readTimes(t, r, nodes).minus(cpu)
	rate := func(n int) float64 { return float64(n) / took.Seconds() }
	t.Logf("%.0f messages/s into %d hubs, %.0f deliveries/s on %d nodes, for %v", rate(sent), hubCount, rate(sent*len(nodes)), len(nodes), took.Round(time.Millisecond))
	t.Logf("CPU a message: Redis %v, the nodes together %v, the load %v (%.0f%%, %.0f%%, %.0f%% of a core)",
		used.redis/time.Duration(sent), used.nodes/time.Duration(sent), used.load/time.Duration(sent),
		percent(used.redis, took), percent(used.nodes, took), percent(used.load, took))
}

func percent(part, whole time.Duration) float64 { return 100 * float64(part) / float64(whole) }

// countFrames counts the messages that a peer gets, until its connection ends.
func countFrames(p *peer, n *atomic.Int64) {
	for {
		f, err := p.readFrame()
		if err != nil {
			return
		}
		if f.opcode == opText {
			n.Add(1)
		}
	}
}

// measureLatency measures the time from a client's message to its arrival at the same client, at a low rate.
func measureLatency(t testing.TB, node *process) {
	const rounds = 1000
	p := node.join("/speed/latency")
	defer p.conn.Close()
	all := make([]time.Duration, 0, rounds)
	for i := range rounds {
		time.Sleep(2 * time.Millisecond) // a low rate
		began := time.Now()
		p.text(strconv.Itoa(i))
		p.wantText(strconv.Itoa(i))
		all = append(all, time.Since(began))
	}
	slices.Sort(all)
	t.Logf("p50 %v, p90 %v, p99 %v", all[rounds/2], all[rounds*9/10], all[rounds*99/100])
}

// measureDeliveries measures the CPU time of a node for each delivery in a hub with 1000 clients.
func measureDeliveries(t testing.TB, node *process) {
	const (
		clients  = 1000
		messages = 500
	)
	var received atomic.Int64
	var running sync.WaitGroup
	defer running.Wait()
	var sender *peer
	for range clients {
		p := node.join("/speed/deliveries")
		defer p.conn.Close()
		running.Go(func() { countFrames(p, &received) }) // ends with the connection
		sender = p
	}
	before := processTime(t, node.cmd.Process.Pid)
	payload := strings.Repeat("x", 100)
	for i := range messages {
		sender.text(payload)
		eventually(t, "a message to arrive", func() bool { return received.Load() >= int64(i-10)*clients })
	}
	eventually(t, "all messages to arrive", func() bool { return received.Load() == clients*messages })
	used := processTime(t, node.cmd.Process.Pid) - before
	t.Logf("%v of CPU a delivery, %v a message to %d clients", used/(clients*messages), used/messages, clients)
}

// times are what processes have used of the processors.
type times struct{ redis, nodes, load time.Duration }

func (a times) minus(b times) times {
	return times{a.redis - b.redis, a.nodes - b.nodes, a.load - b.load}
}

func readTimes(t testing.TB, r *redisServer, nodes []*process) (u times) {
	t.Helper()
	u.redis = processTime(t, r.cmd.Process.Pid)
	for _, node := range nodes {
		u.nodes += processTime(t, node.cmd.Process.Pid)
	}
	u.load = processTime(t, os.Getpid())
	return u
}

// processTime returns what a process has used of the processors, see proc_pid_stat(5).
func processTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	stat, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		t.Fatalf("got %q", stat)
	}
	return time.Duration(user+system) * 10 * time.Millisecond // the unit is a hundredth of a second
}
