package enginetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// clusterChecks are what every cluster has to pass.
func clusterChecks() []check {
	return []check{
		{"Cluster_NodesHaveIDsAndNumbersOfTheirOwn", checkIdentities},
		{"Cluster_AllNodesGetEverything", checkAllNodes},
		{"Cluster_KeysAreOfTheHub", checkKeysOfAllNodes},
		{"Cluster_NumbersOfBatchesAreOfTheSession", checkNumbersOfSessions},
		{"Cluster_LargerBoundsHold", checkLargerBounds},
		{"Cluster_ForgetReachesAllNodes", checkForgetOnAllNodes},
		{"Read_ReturnsWhatIsAfterAPosition", checkRead},
		{"Read_BeginsWithTheOldestEntryOtherwise", checkReadOldest},
		{"Announce_ReachesAllNodes", checkAnnounce},
		{"Announce_WhileOpeningLosesNothing", checkAnnounceWhileOpening},
		{"Announce_TakesAllUsers", checkAnnounceUsers},
		{"Announce_OutlivesForget", checkAnnounceOutlivesForget},
		{"Announce_LeaveTakesItBack", checkLeaveTakesBack},
		{"Announce_OpenTakesItBack", checkOpenTakesBack},
		{"Announce_AfterLeaveAndOpenStays", checkAnnounceAfterReopening},
		{"Renew_ReturnsWhatHasChanged", checkRenew},
		{"Nodes_ReturnsTheLivingNodes", checkNodes},
		{"Lease_UsersOfADeadNodeLeave", checkLease},
	}
}

func checkIdentities(s *suite) {
	ids, numbers := map[engine.NodeID]bool{}, map[uint64]bool{}
	for range 4 {
		c := s.connect()
		id, number := c.cluster().ID(), c.cluster().Number()
		if id == "" || ids[id] {
			s.Errorf("a node has the id %q, want one that no other node has", id)
		}
		if number == 0 || numbers[number] {
			s.Errorf("a node has the number %d, want one from 1 that no other node has", number)
		}
		ids[id], numbers[number] = true, true
		c.renew(engine.Status{})
		if c.cluster().ID() != id || c.cluster().Number() != number {
			s.Errorf("node %s with number %d became node %s with number %d", id, number, c.cluster().ID(), c.cluster().Number())
		}
	}
	// The id of a node that has ended is not used again.
	ended := s.connect()
	ids[ended.cluster().ID()] = true
	ended.close()
	if id := s.connect().cluster().ID(); ids[id] {
		s.Errorf("a new node has the id %q of another node", id)
	}
}

func checkAllNodes(s *suite) {
	publisher, one, two := s.connect(), s.connect(), s.connect()
	first, second := one.open("hub", roomy), two.open("hub", roomy)
	var want []string
	for range 10 {
		batch := s.messages(1 + rand.IntN(3))
		receipts := publisher.publish("hub", batch...)
		for _, m := range batch {
			want = append(want, string(m.Data))
		}
		s.awaitReceipts(first, receipts)
		s.awaitReceipts(second, receipts)
	}
	s.wantTexts(first, want...)
	s.wantTexts(second, want...)
	s.wantTexts(publisher.open("hub", roomy), want...)
	// A node that leaves a hub takes it from no other.
	one.Leave("hub", first)
	receipts := publisher.publish("hub", texts("last")...)
	s.awaitReceipts(second, receipts)
	s.wantTexts(first, want...)
}

func checkKeysOfAllNodes(s *suite) {
	one, two := s.connect(), s.connect()
	messages := s.keyed(1)
	want := one.publish("hub", messages...)[0]
	want.Repeated = true
	if got := two.publish("hub", messages...)[0]; !sameReceipt(got, want) {
		s.Errorf("the receipt of a message, repeated on another node, is %+v, want %+v", got, want)
	}
}

func checkNumbersOfSessions(s *suite) {
	callers := []*caller{s.connect(), s.connect()}
	for i, c := range callers {
		batch := engine.Batch{Bounds: roomy, Messages: s.messages(1), Number: 1}
		for range 2 {
			if r := c.publishBatch("hub", batch)[0]; r.Seq != uint64(i)+1 {
				s.Errorf("batch 1 of session %d has number %d, want %d", i+1, r.Seq, i+1)
			}
		}
	}
	// A batch of another session does not change which batch was the last of this one.
	batch := engine.Batch{Bounds: roomy, Messages: s.messages(1), Number: 2}
	first := callers[0].publishBatch("hub", batch)
	callers[1].publishBatch("hub", engine.Batch{Bounds: roomy, Messages: s.messages(1), Number: 3})
	if got := callers[0].publishBatch("hub", batch); !slices.EqualFunc(got, first, sameReceipt) {
		s.Errorf("a batch, repeated after that of another session, has receipts %+v, want %+v", got, first)
	}
}

// checkLargerBounds has a node that keeps nothing of a hub that another one keeps.
func checkLargerBounds(s *suite) {
	one, two := s.connect(), s.connect()
	all := one.open("hub", roomy).snapshot.Position
	nothing := engine.Bounds{Bytes: 1, Age: time.Millisecond}
	f := two.open("hub", nothing)
	keyed := s.keyed(40)
	var last engine.Position
	for _, m := range keyed {
		last = two.publishBatch("hub", engine.Batch{Bounds: nothing, Messages: []engine.Message{m}})[0].Position
		s.await(f, last)
	}
	two.renew(engine.Status{}, engine.Known{Hub: "hub", Position: last, Bounds: nothing})
	two.open("hub", nothing)
	if got := one.read("hub", all); got.Base != all.Seq || len(got.Entries) != len(keyed) {
		s.Errorf("Read returned %d entries after number %d, want all %d after %d: a node that has the hub open keeps them",
			len(got.Entries), got.Base, len(keyed), all.Seq)
	}
	if r := two.publishBatch("hub", engine.Batch{Bounds: nothing, Messages: keyed[:1]})[0]; !r.Repeated {
		s.Errorf("a repeated message got %+v, want that it is repeated: a node that has the hub open keeps its receipt", r)
	}
}

func checkForgetOnAllNodes(s *suite) {
	one, two := s.connect(), s.connect()
	f := two.open("hub", roomy)
	before := one.publish("hub", texts("a")...)[0]
	s.await(f, before.Position)
	one.forget("hub")
	renewal := two.renew(engine.Status{}, known("hub", before.Position, 0))
	if len(renewal.Changed) != 1 || renewal.Changed[0].Epoch == before.Epoch {
		s.Errorf("after Forget on another node Renew returned %+v, want a position in another epoch than %v", renewal, before.Position)
	}
	snapshot := two.read("hub", before.Position)
	if snapshot.Epoch == before.Epoch || len(snapshot.Entries) != 0 {
		s.Errorf("after Forget on another node Read returned %+v, want no entries of another epoch than %v", snapshot, before.Position)
	}
	after := one.publish("hub", texts("b")...)[0]
	s.await(f, after.Position)
	s.wantTexts(f, "a", "b")
	if after.Epoch == before.Epoch || after.Epoch != snapshot.Epoch {
		s.Errorf("a message after Forget is at %v, want it in epoch %s", after.Position, snapshot.Epoch)
	}
}

func known(hub string, position engine.Position, version uint64) engine.Known {
	return engine.Known{Hub: hub, Position: position, Version: version, Bounds: roomy}
}

func checkRead(s *suite) {
	c, other := s.connect(), s.connect()
	receipts := c.publish("hub", s.messages(5)...)
	all := c.open("hub", roomy).log()
	for base := range receipts {
		for _, reader := range []*caller{c, other} { // the hub need not be open
			got := reader.read("hub", engine.Position{Epoch: receipts[0].Epoch, Seq: uint64(base)})
			if got.Position != receipts[4].Position || got.Base != uint64(base) {
				s.Errorf("Read after number %d returned what is after %d up to %v", base, got.Base, got.Position)
			}
			if !slices.EqualFunc(numbered(got), all[base:], sameEntry) {
				s.Errorf("Read after number %d returned %v, want %v", base, numbered(got), all[base:])
			}
		}
	}
	if got := c.read("hub", receipts[4].Position); got.Base != 5 || len(got.Entries) != 0 {
		s.Errorf("Read after the newest number returned %d entries after %d, want none after 5", len(got.Entries), got.Base)
	}
	if got := c.read("new hub", engine.Position{}); got.Seq != 0 || len(got.Entries) != 0 {
		s.Errorf("Read of a new hub returned %d entries up to %v, want none", len(got.Entries), got.Position)
	}
}

func sameEntry(a, b passedEntry) bool {
	return a.Position == b.Position && a.At.Equal(b.At) && string(a.Data) == string(b.Data)
}

func checkReadOldest(s *suite) {
	c := s.connect()
	bounds := roomy
	bounds.Messages = 3
	var last engine.Receipt
	for range 20 {
		last = c.publishBatch("hub", engine.Batch{Bounds: bounds, Messages: s.messages(1)})[0]
	}
	old := c.open("hub", bounds).snapshot
	positions := map[string]engine.Position{
		"no position":            {},
		"a forgotten entry":      {Epoch: last.Epoch, Seq: 2},
		"another epoch":          {Epoch: engine.NewEpoch(), Seq: last.Seq},
		"the future":             {Epoch: last.Epoch, Seq: last.Seq + 100},
		"just before the oldest": {Epoch: last.Epoch, Seq: old.Base},
	}
	for what, after := range positions {
		got := c.read("hub", after)
		if got.Position != last.Position || got.Base != old.Base || len(got.Entries) != len(old.Entries) {
			s.Errorf("Read after %s returned %d entries after %d up to %v, want %d after %d up to %v",
				what, len(got.Entries), got.Base, got.Position, len(old.Entries), old.Base, last.Position)
		}
	}
}

func checkAnnounce(s *suite) {
	callers := []*caller{s.connect(), s.connect(), s.connect()}
	followers := []*follower{callers[0].open("hub", roomy), callers[1].open("hub", roomy)}
	other := callers[0].open("other", roomy)
	version := uint64(0)
	announce := func(by int, users ...engine.UserCount) {
		s.Helper()
		version++
		callers[by].announce("hub", users...)
		for i, f := range followers {
			s.awaitVersion(f, version)
			got := f.announcements()[version-1]
			if got.version != version || got.node != callers[by].cluster().ID() || !sameUsers(got.users, users) {
				s.Errorf("node %d announced %v as version %d, and node %d got %+v", by, users, version, i, got)
			}
		}
	}
	announce(0, engine.UserCount{User: "ann", Clients: 2}, engine.UserCount{User: "", Clients: 7})
	announce(1, engine.UserCount{User: "ann", Clients: 1}, engine.UserCount{User: "ben", Clients: 1})
	announce(0, engine.UserCount{User: "ann", Clients: 1}, engine.UserCount{User: "eve", Clients: 3})
	announce(0, engine.UserCount{User: "", Clients: 0})
	announce(1, engine.UserCount{User: "ben", Clients: 0})
	announce(1, engine.UserCount{User: "nobody", Clients: 0})

	want := map[engine.NodeID][]engine.UserCount{
		callers[0].cluster().ID(): {{User: "ann", Clients: 1}, {User: "eve", Clients: 3}},
		callers[1].cluster().ID(): {{User: "ann", Clients: 1}},
	}
	s.wantUsers("Open", callers[2].open("hub", roomy).snapshot, version, want)
	s.wantUsers("Read", callers[0].read("hub", engine.Position{}), version, want)
	announce(1, engine.UserCount{User: "ann", Clients: 0})
	delete(want, callers[1].cluster().ID())
	s.wantUsers("Read", callers[0].read("hub", engine.Position{}), version, want)
	if got := other.announcements(); len(got) != 0 {
		s.Errorf("a receiver of another hub got %+v", got)
	}
}

// awaitVersion waits until the follower has an announcement.
func (s *suite) awaitVersion(f *follower, version uint64) {
	s.Helper()
	s.poll(func() error {
		if err := f.verify(); err != nil {
			s.Fatal(err)
		}
		users := f.announcements()
		if len(users) == 0 || users[len(users)-1].version < version {
			return fmt.Errorf("a receiver of hub %q got %d announcements, want version %d", f.hub, len(users), version)
		}
		return nil
	})
}

func (s *suite) wantUsers(from string, got engine.Snapshot, version uint64, want map[engine.NodeID][]engine.UserCount) {
	s.Helper()
	users := maps.Clone(got.Users)
	maps.DeleteFunc(users, func(_ engine.NodeID, u []engine.UserCount) bool { return len(u) == 0 })
	if !maps.EqualFunc(users, want, sameUsers) || got.Version != version {
		s.Errorf("%s returned the users %v of version %d, want %v of version %d", from, got.Users, got.Version, want, version)
	}
}

// sameUsers reports whether a and b are the same, in any order.
func sameUsers(a, b []engine.UserCount) bool {
	return slices.Equal(sortedUsers(a), sortedUsers(b))
}

func sortedUsers(users []engine.UserCount) []engine.UserCount {
	return slices.SortedFunc(slices.Values(users), func(a, b engine.UserCount) int { return cmp.Compare(a.User, b.User) })
}

// checkAnnounceWhileOpening applies what receivers get to the users of their snapshots, and compares the results.
func checkAnnounceWhileOpening(s *suite) {
	callers := []*caller{s.connect(), s.connect(), s.connect()}
	last := callers[0].open("hub", roomy)
	callers[1].open("hub", roomy)
	var opened []*follower
	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	announcer := func(c *caller) func() error {
		return func() error {
			for ctx.Err() == nil {
				users := []engine.UserCount{{User: strconv.Itoa(rand.IntN(5)), Clients: rand.IntN(3)}}
				timeout, cancel := c.context()
				err := c.cluster().Announce(timeout, "hub", users)
				cancel()
				if err != nil {
					return fmt.Errorf("Announce returned %w", err)
				}
				s.pause()
			}
			return nil
		}
	}
	opener := func() error {
		defer stop()
		for range 50 {
			f, err := callers[2].tryOpen("hub", roomy)
			if err != nil {
				return err
			}
			opened = append(opened, f)
			for range rand.IntN(4) {
				s.pause()
			}
			if err := f.verify(); err != nil {
				return err
			}
		}
		return nil
	}
	s.parallel(announcer(callers[0]), announcer(callers[1]), opener)

	callers[0].announce("hub", engine.UserCount{User: "last", Clients: 1})
	final := callers[0].read("hub", engine.Position{})
	newest := opened[len(opened)-1]
	for _, f := range []*follower{last, newest} {
		s.awaitVersion(f, final.Version)
		s.wantUsers("Read", final, final.Version, f.applied())
	}
}

// applied returns the users of the snapshot, changed by the announcements after it.
func (f *follower) applied() map[engine.NodeID][]engine.UserCount {
	f.mu.Lock()
	defer f.mu.Unlock()
	counts := map[engine.NodeID]map[string]int{}
	apply := func(node engine.NodeID, users []engine.UserCount) {
		if counts[node] == nil {
			counts[node] = map[string]int{}
		}
		for _, u := range users {
			counts[node][u.User] = u.Clients
		}
	}
	for node, users := range f.snapshot.Users {
		apply(node, users)
	}
	for _, a := range f.users {
		if a.version > f.snapshot.Version {
			apply(a.node, a.users)
		}
	}
	result := map[engine.NodeID][]engine.UserCount{}
	for node, users := range counts {
		for user, clients := range users {
			if clients > 0 {
				result[node] = append(result[node], engine.UserCount{User: user, Clients: clients})
			}
		}
	}
	return result
}

func checkAnnounceUsers(s *suite) {
	one, two := s.connect(), s.connect()
	one.open("hub", roomy)
	f := two.open("hub", roomy)
	users := []engine.UserCount{
		{User: "", Clients: 1},
		{User: "a b", Clients: 2},
		{User: "a:b", Clients: 3},
		{User: "a\nb", Clients: 4},
		{User: "a\x00b", Clients: 5},
		{User: "日本語", Clients: 6},
		{User: "{a}", Clients: 7},
		{User: `"`, Clients: 1 << 20},
	}
	for i := range 1000 {
		users = append(users, engine.UserCount{User: fmt.Sprint("user ", i), Clients: i + 1})
	}
	one.announce("hub", users...)
	s.awaitVersion(f, 1)
	if got := f.announcements()[0].users; !sameUsers(got, users) {
		s.Errorf("%d users were announced, and other %d reached the other node", len(users), len(got))
	}
	s.wantUsers("Read", two.read("hub", engine.Position{}), 1, map[engine.NodeID][]engine.UserCount{one.cluster().ID(): users})
}

func checkAnnounceOutlivesForget(s *suite) {
	one, two := s.connect(), s.connect()
	one.open("hub", roomy)
	f := two.open("hub", roomy)
	one.publish("hub", s.messages(1)...)
	users := []engine.UserCount{{User: "ann", Clients: 1}}
	one.announce("hub", users...)
	s.awaitVersion(f, 1)
	one.forget("hub")
	got := two.read("hub", engine.Position{})
	s.wantUsers("Read after Forget", got, got.Version, map[engine.NodeID][]engine.UserCount{one.cluster().ID(): users})
	one.announce("hub", engine.UserCount{User: "ann", Clients: 0})
	s.wantUsers("Read after Forget", two.read("hub", engine.Position{}), got.Version+1, nil)
}

func checkLeaveTakesBack(s *suite) {
	one, two := s.connect(), s.connect()
	first, other := one.open("hub", roomy), one.open("other", roomy)
	f := two.open("hub", roomy)
	one.announce("hub", engine.UserCount{User: "ann", Clients: 2}, engine.UserCount{User: "ben", Clients: 1})
	one.announce("other", engine.UserCount{User: "ann", Clients: 1})
	two.announce("hub", engine.UserCount{User: "ann", Clients: 3})
	s.awaitVersion(f, 2)
	one.Leave("hub", first)

	want := map[engine.NodeID][]engine.UserCount{two.cluster().ID(): {{User: "ann", Clients: 3}}}
	s.awaitUsers(f, want)
	got := two.read("hub", engine.Position{})
	s.wantUsers("Read after Leave", got, got.Version, want)
	others := map[engine.NodeID][]engine.UserCount{one.cluster().ID(): {{User: "ann", Clients: 1}}}
	s.awaitVersion(other, 1)
	s.wantUsers("Read of another hub", two.read("other", engine.Position{}), 1, others)
}

func checkOpenTakesBack(s *suite) {
	one, two := s.connect(), s.connect()
	one.open("hub", roomy)
	f := two.open("hub", roomy)
	one.announce("hub", engine.UserCount{User: "ann", Clients: 2})
	s.awaitVersion(f, 1)
	snapshot := one.open("hub", roomy).snapshot
	s.wantUsers("Open, once more,", snapshot, snapshot.Version, nil)
	s.awaitUsers(f, nil)
}

// checkAnnounceAfterReopening announces while Leave may still be at work.
func checkAnnounceAfterReopening(s *suite) {
	one, two := s.connect(), s.connect()
	f := two.open("hub", roomy)
	opened := one.open("hub", roomy)
	for i := range 50 {
		one.announce("hub", engine.UserCount{User: fmt.Sprint("old ", i), Clients: 1})
		one.Leave("hub", opened)
		opened = one.open("hub", roomy)
		one.announce("hub", engine.UserCount{User: "ann", Clients: i + 1})
	}
	want := map[engine.NodeID][]engine.UserCount{one.cluster().ID(): {{User: "ann", Clients: 50}}}
	s.awaitUsers(f, want)
	time.Sleep(10 * time.Millisecond)
	s.awaitUsers(f, want)
	got := two.read("hub", engine.Position{})
	s.wantUsers("Read after Leave, Open and Announce", got, got.Version, want)
}

// awaitUsers waits until the follower has these users.
func (s *suite) awaitUsers(f *follower, want map[engine.NodeID][]engine.UserCount) {
	s.Helper()
	s.poll(func() error {
		if got := f.applied(); !maps.EqualFunc(got, want, sameUsers) {
			return fmt.Errorf("a receiver of hub %q got the users %v, want %v", f.hub, got, want)
		}
		return nil
	})
}

func checkRenew(s *suite) {
	one, two := s.connect(), s.connect()
	if renewal := one.renew(engine.Status{}); renewal.Forgotten || len(renewal.Changed) != 0 {
		s.Errorf("the first Renew of a node returned %+v, want nothing", renewal)
	}
	var all []engine.Known
	for i := range 3 {
		hub := fmt.Sprint("hub ", i)
		one.open(hub, roomy)
		two.open(hub, roomy)
		receipt := one.publish(hub, s.messages(i+1)...)[i]
		all = append(all, known(hub, receipt.Position, 0))
	}
	wantChanged := func(what string, known []engine.Known, want ...engine.Known) {
		s.Helper()
		renewal := one.renew(engine.Status{}, known...)
		same := func(a, b engine.Known) bool {
			return a.Hub == b.Hub && a.Position == b.Position && a.Version == b.Version
		}
		if renewal.Forgotten || !slices.EqualFunc(sortedKnown(renewal.Changed), want, same) {
			s.Errorf("Renew with %s returned %+v, want %+v", what, renewal, want)
		}
	}
	wantChanged("everything", all)
	wantChanged("nothing", nil)

	stale := slices.Clone(all)
	stale[0].Seq--
	stale[1].Epoch = engine.NewEpoch()
	stale[2].Version = 5
	wantChanged("an old position, another epoch and another version", stale, all...)

	two.announce("hub 1", engine.UserCount{User: "ann", Clients: 1})
	all[1].Version = 1
	wantChanged("an old version", []engine.Known{all[0], known("hub 1", all[1].Position, 0)}, all[1])

	all[2].Position = two.publish("hub 2", s.messages(1)...)[0].Position
	wantChanged("an old number", []engine.Known{all[1], known("hub 2", engine.Position{Epoch: all[2].Epoch, Seq: 3}, 0)}, all[2])
	wantChanged("everything", all)
}

func sortedKnown(known []engine.Known) []engine.Known {
	return slices.SortedFunc(slices.Values(known), func(a, b engine.Known) int { return cmp.Compare(a.Hub, b.Hub) })
}

func checkNodes(s *suite) {
	callers := []*caller{s.connect(), s.connect(), s.connect()}
	since := time.Now().Truncate(time.Millisecond)
	for i, name := range []string{"c", "a", "a"} {
		callers[i].renew(engine.Status{Name: name, Since: since, Hubs: i, Clients: 10 * i, Behind: uint64(i) << 40})
	}
	for i, c := range callers {
		nodes := c.nodes()
		if len(nodes) != len(callers) {
			s.Fatalf("Nodes returned %d nodes, want %d: %+v", len(nodes), len(callers), nodes)
		}
		sorted := slices.IsSortedFunc(nodes, func(a, b engine.Node) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Number, b.Number))
		})
		if !sorted {
			s.Errorf("Nodes returned %+v, want them in the order of names and numbers", nodes)
		}
		for j, other := range callers {
			err := checkNode(nodes, engine.Node{
				ID:     other.cluster().ID(),
				Number: other.cluster().Number(),
				Self:   i == j,
				Status: engine.Status{Name: []string{"c", "a", "a"}[j], Since: since, Hubs: j, Clients: 10 * j, Behind: uint64(j) << 40},
			})
			if err != nil {
				s.Error(err)
			}
		}
	}
}

func checkNode(nodes []engine.Node, want engine.Node) error {
	i := slices.IndexFunc(nodes, func(n engine.Node) bool { return n.ID == want.ID })
	if i < 0 {
		return fmt.Errorf("Nodes returned %+v, want node %s among them", nodes, want.ID)
	}
	got := nodes[i]
	sameSince := got.Since.Equal(want.Since)
	got.Since, got.Renewed = want.Since, want.Renewed
	if got != want || !sameSince {
		return fmt.Errorf("Nodes returned %+v, want %+v", nodes[i], want)
	}
	if age := time.Since(nodes[i].Renewed); age.Abs() > time.Minute {
		return fmt.Errorf("Nodes returned %+v, whose last Renew was just now", nodes[i])
	}
	return nil
}

// checkLease lets one node live without Renew.
func checkLease(s *suite) {
	dying, living := s.connect(), s.connect()
	dying.open("hub", roomy)
	f := living.open("hub", roomy)
	dying.renew(engine.Status{Name: "dying"})
	renewed := time.Now()
	dying.announce("hub", engine.UserCount{User: "ann", Clients: 2}, engine.UserCount{User: "ben", Clients: 1})
	living.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	s.awaitVersion(f, 2)

	last := s.renewUntilAnnounced(living, f, 3, renewed.Add(engine.Lease+2*engine.RenewInterval))
	if age := time.Since(renewed); age < engine.Lease-time.Second {
		s.Errorf("the users of a node left %v after its last Renew, want them to stay for %v", age, engine.Lease)
	}
	for _, u := range last.users {
		if last.node != dying.cluster().ID() || u.Clients != 0 {
			s.Errorf("after the end of the lease a receiver got %+v, want users of node %s, without clients", last, dying.cluster().ID())
		}
	}
	users := map[engine.NodeID][]engine.UserCount{living.cluster().ID(): {{User: "ann", Clients: 1}}}
	if got := f.applied(); !maps.EqualFunc(got, users, sameUsers) {
		s.Errorf("after the end of the lease the receiver has the users %v, want %v", got, users)
	}
	final := living.read("hub", engine.Position{})
	s.wantUsers("Read after the end of the lease", final, final.Version, users)
	if nodes := living.nodes(); len(nodes) != 1 || nodes[0].ID != living.cluster().ID() {
		s.Errorf("after the end of the lease Nodes returned %+v, want one", nodes)
	}

	// The node was not dead. It learns that it has to announce its users again.
	if renewal := dying.renew(engine.Status{}); !renewal.Forgotten {
		s.Errorf("Renew after the end of the lease returned %+v, want Forgotten", renewal)
	}
	if renewal := dying.renew(engine.Status{}); renewal.Forgotten {
		s.Errorf("the Renew after that returned %+v, want Forgotten no more", renewal)
	}
	dying.announce("hub", engine.UserCount{User: "ann", Clients: 2})
	s.awaitVersion(f, final.Version+1)
	if nodes := living.nodes(); len(nodes) != 2 {
		s.Errorf("with the node back Nodes returned %+v, want two", nodes)
	}
}

// renewUntilAnnounced calls Renew as a node must, until the follower has the announcement of a version or the time is
// over.
func (s *suite) renewUntilAnnounced(c *caller, f *follower, version uint64, end time.Time) announcement {
	s.Helper()
	next := time.Now()
	for {
		if users := f.announcements(); len(users) > 0 && users[len(users)-1].version >= version {
			return users[len(users)-1]
		}
		if now := time.Now(); now.After(end) {
			s.Fatal(errors.New("no receiver learned that the lease of a node is over"))
		} else if !now.Before(next) {
			next = now.Add(engine.RenewInterval)
			if renewal := c.renew(engine.Status{Name: "living"}); renewal.Forgotten {
				s.Errorf("Renew of a node that renews returned %+v", renewal)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}
