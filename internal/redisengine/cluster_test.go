//go:build unix

package redisengine

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// expireLease lets the lease of a node be over, as after 15 seconds without Renew.
func (r *redisServer) expireLease(node engine.NodeID) {
	r.t.Helper()
	r.do("ZADD", "chat_broadcast:nodes", "1", string(node))
}

// wantNoTrace waits until nothing is left of a node.
func (r *redisServer) wantNoTrace(node engine.NodeID) {
	r.t.Helper()
	poll(r.t, func() error {
		for _, command := range [][]string{
			{"ZSCORE", "chat_broadcast:nodes", string(node)},
			{"HGET", "chat_broadcast:statuses", string(node)},
			{"HGET", "chat_broadcast:claims", string(node)},
			{"SMEMBERS", "chat_broadcast:node:" + string(node)},
		} {
			if got := r.do(command...); got != "" {
				return fmt.Errorf("%q answers %q, want nothing", command, got)
			}
		}
		return nil
	})
}

// manyUsers are more than one call removes.
func manyUsers() ([]engine.UserCount, map[string]int) {
	var list []engine.UserCount
	counts := map[string]int{}
	for i := range 1000 {
		name := fmt.Sprint("user ", i)
		list = append(list, engine.UserCount{User: name, Clients: i + 1})
		counts[name] = i + 1
	}
	return list, counts
}

func TestLease_UsersOfAKilledNodeLeaveAllHubs(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	p := startProxy(t, redis.address())
	killed := connect(t, p.url())
	others := []*node{connect(t, redis.url()), connect(t, redis.url())}
	list, counts := manyUsers()
	var receivers []*receiver
	for hub := range hubsTogether + 3 {
		name := fmt.Sprint("hub ", hub)
		for _, n := range append(others, killed) {
			n.renew() // this takes a while
		}
		killed.open(name)
		users, want := []engine.UserCount{{User: "ann", Clients: 1}}, map[string]int{"ann": 1}
		if hub == 0 {
			users, want = list, counts
		}
		for _, n := range others {
			receivers = append(receivers, n.open(name))
		}
		killed.announce(name, users...)
		for _, r := range receivers[2*hub:] {
			r.awaitUsers(killed.ID(), want)
		}
	}
	others[0].announce("hub 0", engine.UserCount{User: "ann", Clients: 1})
	p.interrupt()
	redis.expireLease(killed.ID())
	for _, r := range receivers {
		r.awaitUsers(killed.ID(), nil)
	}
	receivers[0].awaitUsers(others[0].ID(), map[string]int{"ann": 1})
	redis.wantNoTrace(killed.ID())

	// The node lives after all.
	p.restore()
	poll(t, func() error {
		renewal, err := killed.Renew(deadline(t), engine.Status{}, nil)
		if err == nil && !renewal.Forgotten {
			err = errors.New("Renew did not tell that the node was forgotten")
		}
		return err
	})
	killed.announce("hub 0", engine.UserCount{User: "ann", Clients: 2})
	receivers[0].awaitUsers(killed.ID(), map[string]int{"ann": 2})
}

func TestLease_RemovalGoesOnWhereAnotherNodeHasStopped(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	p := startProxy(t, redis.address())
	killed, n := connect(t, p.url()), connect(t, redis.url())
	killed.open("hub")
	r := n.open("hub")
	killed.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	p.interrupt()
	// Another node has claimed it for a second, and then ended.
	seconds, _, _ := strings.Cut(redis.do("TIME"), "\n")
	now, _ := strconv.Atoi(seconds)
	redis.do("HSET", "chat_broadcast:claims", string(killed.ID()), fmt.Sprintf("other %d", 1000*(now+2)))
	redis.do("HDEL", "chat_broadcast:statuses", string(killed.ID()))
	began := time.Now()
	redis.expireLease(killed.ID())
	r.awaitUsers(killed.ID(), nil)
	if took := time.Since(began); took < 500*time.Millisecond {
		t.Errorf("the claim of the other node held for %v only", took)
	}
	redis.wantNoTrace(killed.ID())
}

func TestClose_RemovesUsersAtOnce(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	list, counts := manyUsers()
	one.open("hub")
	r := two.open("hub")
	one.announce("hub", list...)
	r.awaitUsers(one.ID(), counts)
	one.Close()
	redis.wantNoTrace(one.ID())
	r.awaitUsers(one.ID(), nil)
}

func TestLeave_RemovesUsersButNotThoseAfterTheNextOpen(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	watching := two.open("hub")
	var last *receiver
	for i := range 50 {
		r := one.open("hub")
		if users := r.snapshot.Users[one.ID()]; len(users) != 0 {
			t.Fatalf("after Leave the hub has the users %v of this node", users)
		}
		one.announce("hub", engine.UserCount{User: fmt.Sprint("user ", i), Clients: 1})
		if i%2 == 0 {
			one.Leave("hub", r) // otherwise the next Open replaces the receiver
		}
		last = r
	}
	watching.awaitUsers(one.ID(), map[string]int{"user 49": 1})
	one.Leave("hub", last)
	watching.awaitUsers(one.ID(), nil)
}

func TestRenew_TellsAfterALossThatUsersAreGone(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	one.open("hub")
	r := two.open("hub")
	one.announce("hub", engine.UserCount{User: "ann", Clients: 1}, engine.UserCount{User: "ben", Clients: 1})
	redis.do("SAVE")
	one.announce("hub", engine.UserCount{User: "ben", Clients: 0}, engine.UserCount{User: "eve", Clients: 1})
	numbers := []uint64{one.Number(), two.Number()}
	ups := []int{one.countUps(), two.countUps()}
	redis.restart() // Redis knows again of ben, and nothing of eve
	for i, n := range []*node{one, two} {
		n.awaitUps(ups[i])
		if renewal := n.renew(r.known("hub")); !renewal.Forgotten || len(renewal.Changed) != 1 {
			t.Errorf("Renew after a loss returned %+v, want Forgotten and a changed hub", renewal)
		}
		if n.Number() != numbers[i] {
			t.Errorf("after a loss a node has number %d, want %d still", n.Number(), numbers[i])
		}
	}
	one.announce("hub", engine.UserCount{User: "ann", Clients: 1}, engine.UserCount{User: "eve", Clients: 1})
	users := two.read("hub", engine.Position{}).Users[one.ID()]
	if len(users) != 2 || users[0].User == "ben" || users[1].User == "ben" {
		t.Errorf("the users of the node are %v, want ann and eve", users)
	}
}

func TestRenew_ComparesManyHubs(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	var known []engine.Known
	for hub := range 2*hubsPerCall*callsTogether + 10 {
		known = append(known, engine.Known{Hub: fmt.Sprint("hub ", hub), Bounds: bounds})
	}
	known = one.renew(known...).Changed // all are new
	if changed := one.renew(known...).Changed; len(changed) != 0 {
		t.Fatalf("of unchanged hubs Renew returned %v", changed)
	}
	want := map[string]engine.Position{}
	for _, hub := range []int{0, hubsPerCall - 1, hubsPerCall, hubsPerCall * callsTogether, len(known) - 1} {
		want[known[hub].Hub] = two.publish(known[hub].Hub, "a")[0].Position
	}
	changed := one.renew(known...).Changed
	for _, k := range changed {
		if want[k.Hub] != k.Position {
			t.Errorf("Renew returned %v of %s, want %v", k.Position, k.Hub, want[k.Hub])
		}
	}
	if len(changed) != len(want) {
		t.Errorf("Renew returned %d hubs, want %d", len(changed), len(want))
	}
}

func TestRead_PagesThroughManyAndLargeEntries(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	roomy := engine.Bounds{Messages: 10_000, Bytes: 64 << 20, Age: time.Hour}
	for hub, size := range map[string]int{"many": 10, "large": 100_000} {
		var want []string
		for i := range 20 {
			var texts []string
			for j := range 60 {
				texts = append(texts, fmt.Sprintf("%d %s", 60*i+j, strings.Repeat("x", size)))
			}
			if size > 1000 {
				texts = texts[:2]
			}
			n.publishBatch(hub, engine.Batch{Bounds: roomy, Messages: messages(texts...)})
			want = append(want, texts...)
		}
		r := n.openWith(hub, roomy)
		r.wantTexts(want...)
		if s := n.read(hub, engine.Position{Epoch: r.position().Epoch, Seq: 20}); s.Base != 20 || len(s.Entries) != len(want)-20 {
			t.Errorf("Read after 20 returned %d entries after %d, want %d after 20", len(s.Entries), s.Base, len(want)-20)
		}
	}
}

func TestPublish_TellsLargeNumbersOfBatchesApart(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	for i := range uint64(3) {
		batch := engine.Batch{Bounds: bounds, Number: 1<<63 + i, Messages: messages("a")}
		for range 2 {
			if r := n.publishBatch("hub", batch)[0]; r.Seq != i+1 {
				t.Errorf("batch %d has number %d, want %d", batch.Number, r.Seq, i+1)
			}
		}
	}
	_, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Number: 1 << 63, Messages: messages("a")})
	if !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("an old batch returned %v, want ErrUnavailable", err)
	}
}

func TestPublish_ForgetsAnswersToNodesThatHaveEnded(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one := connect(t, redis.url())
	one.publishBatch("hub", engine.Batch{Bounds: bounds, Number: 1, Messages: messages("a")})
	redis.do("EVAL", `redis.call('HSET', KEYS[1], '#ended', '00000000000000000007' .. struct.pack('>d', 1))`, "1",
		"chat_broadcast:hub:{hub}")
	connect(t, redis.url()).publishBatch("hub", engine.Batch{Bounds: bounds, Number: 1, Messages: messages("b")})
	if fields := redis.do("HKEYS", "chat_broadcast:hub:{hub}"); strings.Contains(fields, "#ended") ||
		strings.Count(fields, "#") != 2 {
		t.Errorf("the hub has the fields %q, want answers to two nodes", fields)
	}
}

func TestPublish_AgainAfterALossIsUnknown(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		lose func(*redisServer)
		args []string
		want engine.Receipt
	}{
		"restart":      {lose: (*redisServer).restart, want: engine.Receipt{Unknown: true}},
		"FLUSHALL":     {lose: func(r *redisServer) { r.do("FLUSHALL") }, want: engine.Receipt{Unknown: true}},
		"lost receipt": {lose: func(r *redisServer) { r.do("DEL", "chat_broadcast:receipts1:{hub}") }, want: engine.Receipt{Unknown: true}},
		"safe restart": {
			lose: (*redisServer).restart, args: []string{"--appendonly", "yes", "--appendfsync", "always"},
			want: engine.Receipt{Repeated: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			redis := startRedis(t, test.args...)
			one, two := connect(t, redis.url()), connect(t, redis.url())
			one.open("hub")
			first := one.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: []engine.Message{keyed("a", "a", engine.First)}})[0]
			test.lose(redis)
			batch := engine.Batch{Bounds: bounds, Messages: []engine.Message{keyed("a", "a", engine.Again)}}
			var got []engine.Receipt
			poll(t, func() (err error) {
				got, err = two.Publish(t.Context(), "hub", batch)
				return err
			})
			if got[0].Unknown != test.want.Unknown || got[0].Repeated != test.want.Repeated ||
				got[0].Repeated && got[0].Position != first.Position {
				t.Errorf("the message that was sent again has the receipt %+v, want %+v", got[0], test.want)
			}
		})
	}
}

func TestHub_KeysExpire(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	n := connect(t, redis.url())
	n.open("hub")
	n.publishBatch("hub", engine.Batch{Bounds: bounds, Number: 1, Messages: []engine.Message{keyed("a", "a", engine.First)}})
	n.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	for _, key := range []string{"hub", "log", "receipts1", "users"} {
		ttl, err := strconv.Atoi(redis.do("TTL", "chat_broadcast:"+key+":{hub}"))
		if err != nil || ttl < 3600-5 || ttl > 3600*5/4 {
			t.Errorf("%s lives for %d s, want an hour to a quarter longer", key, ttl)
		}
	}
	for key := range strings.FieldsSeq(redis.do("KEYS", "*")) {
		if !strings.HasPrefix(key, DefaultPrefix) {
			t.Errorf("the key %s does not begin with the prefix", key)
		}
	}
}

// TestScripts_AreThoseOfOneProcess looks whether a new process ever has a script of the one before.
func TestScripts_AreThoseOfOneProcess(t *testing.T) {
	t.Parallel()
	redis := startRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	n := connect(t, redis.url())
	n.publish("hub", "a")
	before := n.link.Load().scripts.Load().sha
	ups := n.countUps()
	redis.restart()
	n.awaitUps(ups)
	n.publish("hub", "b")
	after := n.link.Load().scripts.Load().sha
	if got := redis.do(append([]string{"SCRIPT", "EXISTS"}, before[:]...)...); strings.Contains(got, "1") {
		t.Errorf("the new process has scripts of the old one: %q", got)
	}
	if got := redis.do(append([]string{"SCRIPT", "EXISTS"}, after[:]...)...); strings.Contains(got, "0") {
		t.Errorf("the new process does not have its scripts: %q", got)
	}
	if commands := redis.do("INFO", "commandstats"); strings.Contains(commands, "cmdstat_eval:") {
		t.Error("a script ran by EVAL")
	}
}

// TestFence_NodesAgreeOnTheGeneration lets the server lose the fence, and one node examine it again.
func TestFence_NodesAgreeOnTheGeneration(t *testing.T) {
	t.Parallel()
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	before := one.publish("hub", "a")[0].Position
	redis.do("DEL", "chat_broadcast:server")
	ups := one.countUps()
	one.link.Load().end(errors.New("the test ends it"))
	one.awaitUps(ups)
	var epochs []string
	for range 5 {
		for _, n := range []*node{one, two} {
			epochs = append(epochs, n.publish("hub", "b")[0].Epoch)
		}
	}
	slices.Sort(epochs)
	if epochs = slices.Compact(epochs); len(epochs) != 1 || epochs[0] == before.Epoch {
		t.Errorf("after the loss of the fence the epochs are %q, want one other than %s", epochs, before.Epoch)
	}
}
