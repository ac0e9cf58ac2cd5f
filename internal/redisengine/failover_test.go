//go:build unix

package redisengine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// startReplica starts a replica, and waits until it has everything.
func startReplica(t testing.TB, of *redisServer, args ...string) *redisServer {
	t.Helper()
	r := startRedis(t, args...)
	r.replicate(of)
	return r
}

// replicate makes r a replica.
func (r *redisServer) replicate(of *redisServer) {
	r.t.Helper()
	r.do("REPLICAOF", "127.0.0.1", strconv.Itoa(of.port))
	r.awaitReplication(of)
}

// awaitReplication waits until a replica has everything that its primary has.
func (r *redisServer) awaitReplication(of *redisServer) {
	r.t.Helper()
	poll(r.t, func() error {
		if link, has, all := r.info("master_link_status"), r.info("slave_repl_offset"), of.info("master_repl_offset"); link != "up" ||
			has != all {
			return fmt.Errorf("the link of the replica is %s, and it has %s of %s", link, has, all)
		}
		return nil
	})
}

func TestFailover_ReplicaThatLacksMessagesBeginsANewEpoch(t *testing.T) {
	t.Parallel()
	primary := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	replica := startReplica(t, primary, "--appendonly", "yes", "--appendfsync", "always")
	p := startProxy(t, primary.address())
	one, two := connect(t, p.url()), connect(t, p.url())
	r := two.open("hub")
	before := one.publish("hub", "a", "b")[1].Position
	r.await(before)
	replica.awaitReplication(primary)
	replica.do("REPLICAOF", "NO", "ONE")
	lost := one.publish("hub", "c")[0].Position
	r.await(lost)

	ups, otherUps := one.countUps(), two.countUps()
	p.redirect(replica.address())
	one.awaitUps(ups)
	two.awaitUps(otherUps)
	after := one.publish("hub", "d")[0].Position
	if after.Epoch == before.Epoch || after.Seq != before.Seq+1 {
		t.Errorf("after the failover a message is at %v, want number %d of another epoch than %v", after, before.Seq+1, before)
	}
	r.await(after)
	again := two.open("hub")
	again.wantTexts("a", "b", "d")
	if again.snapshot.Before != before {
		t.Errorf("the new epoch goes on from %v, want %v", again.snapshot.Before, before)
	}
}

// TestFailover_ThereAndBack lets a process be a primary twice, and lose a message in between. It still has the scripts of
// its first time.
func TestFailover_ThereAndBackBeginsANewEpoch(t *testing.T) {
	t.Parallel()
	for _, visits := range []bool{true, false} {
		t.Run(fmt.Sprintf("nodes visit the other primary: %t", visits), func(t *testing.T) {
			t.Parallel()
			first := startRedis(t)
			second := startReplica(t, first)
			p := startProxy(t, first.address())
			n := connect(t, p.url())
			before := n.publish("hub", "a", "b")[1].Position
			second.awaitReplication(first)
			second.do("REPLICAOF", "NO", "ONE")
			lost := n.publish("hub", "c")[0].Position

			p.interrupt()
			if visits {
				ups := n.countUps()
				p.redirect(second.address())
				n.awaitUps(ups)
				n.publish("another hub", "x")
				p.interrupt()
			}
			first.replicate(second)
			first.do("REPLICAOF", "NO", "ONE")
			p.redirect(first.address())
			poll(t, n.wantUp)
			var receipts []engine.Receipt
			poll(t, func() (err error) {
				receipts, err = n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Messages: messages("d")})
				return err
			})
			if receipts[0].Epoch == before.Epoch {
				t.Errorf("%v and %v name messages of one epoch", lost, receipts[0].Position)
			}
		})
	}
}

func TestFailover_PrimaryThatBecomesAReplicaIsLeft(t *testing.T) {
	t.Parallel()
	primary, other := startRedis(t), startRedis(t)
	n := connect(t, primary.url())
	before := n.publish("hub", "a")[0].Position
	primary.do("REPLICAOF", "127.0.0.1", strconv.Itoa(other.port))
	_, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Messages: messages("b")})
	if !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("Publish on a replica returned %v, want ErrUnavailable", err)
	}
	n.awaitDown("it is a replica")
	ups := n.countUps()
	primary.do("REPLICAOF", "NO", "ONE")
	n.awaitUps(ups)
	if after := n.publish("hub", "c")[0].Position; after.Epoch == before.Epoch {
		t.Errorf("after a promotion a message is at %v, want another epoch", after)
	}
}

func TestFailover_IdlePrimaryThatBecomesAReplicaIsLeft(t *testing.T) {
	t.Parallel()
	primary, other := startRedis(t), startRedis(t)
	n := connect(t, primary.url())
	primary.do("REPLICAOF", "127.0.0.1", strconv.Itoa(other.port))
	n.awaitDown("it is a replica") // nobody uses the session
}

// startSentinel starts a Sentinel that watches a primary under the name main. It returns its address.
func startSentinel(t testing.TB, primary *redisServer) string {
	t.Helper()
	s := &redisServer{t: t, dir: t.TempDir(), port: freePort()}
	config := filepath.Join(s.dir, "sentinel.conf")
	text := fmt.Sprintf("port %d\nbind 127.0.0.1\ndir %s\nlogfile %s/log\nsentinel monitor main 127.0.0.1 %d 1\n"+
		"sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n", s.port, s.dir, s.dir, primary.port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s.process = exec.Command("redis-server", config, "--sentinel")
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.kill)
	poll(t, func() error {
		if s.process == nil {
			return errors.New("no process")
		}
		replicas, err := s.try("SENTINEL", "REPLICAS", "main")
		if err == nil && replicas == "" {
			err = errors.New("the Sentinel does not know the replica yet")
		}
		return err
	})
	return s.address()
}

func TestFailover_BySentinel(t *testing.T) {
	t.Parallel()
	primary := startRedis(t)
	replica := startReplica(t, primary)
	sentinel := startSentinel(t, primary)
	c := startCluster(t, repeatString("redis+sentinel://"+sentinel+"/main", 2)...)
	for _, n := range c.nodes {
		if l := n.link.Load(); l.primary != primary.address() {
			t.Errorf("the session uses %s, want %s", l.primary, primary.address())
		}
	}
	c.during(func() {
		primary.kill()
		poll(t, func() error {
			for _, n := range c.nodes {
				if l := n.link.Load(); l == nil || l.primary != replica.address() {
					return errors.New("a session does not use the replica")
				}
			}
			return nil
		})
	})
	c.settle(false)
	if got := c.ledger.epochs("hub 0"); got < 2 {
		t.Errorf("after a failover a hub had %d epochs, want 2", got)
	}
}

func TestFailover_SentinelErrorsSayWhatToChange(t *testing.T) {
	t.Parallel()
	primary := startRedis(t)
	startReplica(t, primary)
	sentinel := startSentinel(t, primary)
	begin(t, "redis+sentinel://"+sentinel+"/other").awaitDown("do not know the master")
	begin(t, "redis+sentinel://"+primary.address()+"/main").awaitDown("it is not a Sentinel")
	begin(t, "redis://"+sentinel).awaitDown("it is a Sentinel")
}
