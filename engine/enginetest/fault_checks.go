package enginetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// restartChecks are what an engine has to pass whose hubs outlive the last session.
func restartChecks() []check {
	return []check{
		{"Restart_KeepsHubs", checkRestart},
		{"Restart_KeepsReceipts", checkRestartKeepsReceipts},
	}
}

// killChecks are what an engine has to pass whose process can be killed.
func killChecks(a abilities) []check {
	var checks []check
	if a.persistent {
		checks = append(checks, check{"Kill_KeepsWhatWasAcknowledged", checkKill})
	}
	if a.cluster {
		checks = append(checks, check{"Kill_OfOneNodeLeavesTheOthersAlone", checkKillOfNode})
	}
	return checks
}

// interruptChecks are what an engine has to pass that can become unreachable.
func interruptChecks() []check {
	return []check{
		{"Interrupt_IsReported", checkInterruptIsReported},
		{"Interrupt_CallsReturnWhenTheirContextIsDone", checkContextWhileInterrupted},
		{"Interrupt_ConnectReturnsAtOnce", checkConnectWhileInterrupted},
		{"Interrupt_LosesAndDoublesNothing", checkInterrupt},
	}
}

// wipeChecks are what an engine has to pass that can lose its data.
func wipeChecks(a abilities) []check {
	checks := []check{{"Wipe_BeginsNewEpochs", checkWipe}}
	if a.cluster {
		checks = append(checks, check{"Wipe_NodesLearnOfIt", checkWipeOnNodes})
	}
	return checks
}

func checkRestart(s *suite) {
	c := s.connect()
	var ledger ledger
	published := map[string][]engine.Message{}
	for _, hub := range []string{"one", "two"} {
		for n := 1; n <= 5; n++ {
			messages := s.messages(n)
			if err := ledger.noteReceipts(messages, c.publish(hub, messages...)); err != nil {
				s.Error(err)
			}
			published[hub] = append(published[hub], messages...)
		}
	}
	c.open("one", roomy)
	for range 3 {
		c.close()
		c = s.connect()
		for hub, messages := range published {
			f := c.open(hub, roomy)
			var want []string
			for _, m := range messages {
				want = append(want, string(m.Data))
			}
			s.wantTexts(f, want...)
			next := s.messages(1)
			r := c.publish(hub, next...)
			if r[0].Epoch != f.snapshot.Epoch || r[0].Seq != f.snapshot.Seq+1 {
				s.Errorf("after a restart a message is at %v, want the number after %v", r[0].Position, f.snapshot.Position)
			}
			s.awaitReceipts(f, r)
			published[hub] = append(published[hub], next...)
			if err := errors.Join(ledger.noteReceipts(next, r), ledger.noteEntries(f.log())); err != nil {
				s.Error(err)
			}
		}
	}
}

func checkRestartKeepsReceipts(s *suite) {
	c := s.connect()
	messages := s.keyed(1)
	want := c.publish("hub", messages...)[0]
	want.Repeated = true
	c.close()
	c = s.connect()
	for _, attempt := range []engine.Attempt{engine.First, engine.Again, engine.Lookup} {
		messages[0].Attempt = attempt
		if got := c.publish("hub", messages...)[0]; !sameReceipt(got, want) {
			s.Errorf("the receipt of a message, repeated after a restart, is %+v, want %+v", got, want)
		}
	}
	// A new session numbers its batches from the beginning.
	batch := engine.Batch{Bounds: roomy, Messages: s.messages(1), Number: 1}
	c.publishBatch("other", batch)
	c.close()
	c = s.connect()
	batch.Messages = s.messages(1)
	if r := c.publishBatch("other", batch)[0]; r.Seq != 2 {
		s.Errorf("batch 1 of a new session has number %d, want 2", r.Seq)
	}
}

// checkKill kills sessions while they publish.
func checkKill(s *suite) {
	var ledger ledger
	var acknowledged []passedEntry
	for range 10 {
		c := s.connect()
		published := make(chan []passedEntry, 1)
		go func() { published <- s.publishUntilError(c) }() // ends with the session, and is waited for below
		for range rand.IntN(20) {
			s.pause()
		}
		c.kill()
		s.returns("Publish in a session that was killed", patience, func() { acknowledged = append(acknowledged, <-published...) })

		c = s.connect()
		log := c.open("hub", roomy).log()
		if err := errors.Join(ledger.noteEntries(log), wantAll(log, acknowledged)); err != nil {
			s.Error(err)
		}
		c.close()
	}
}

// publishUntilError publishes until the session fails. It returns what was published without an error.
func (s *suite) publishUntilError(c *caller) (published []passedEntry) {
	for {
		messages := s.messages(1 + rand.IntN(3))
		receipts, err := c.tryPublish("hub", engine.Batch{Bounds: roomy, Messages: messages})
		if err != nil {
			return published
		}
		for i, r := range receipts {
			published = append(published, passedEntry{r.Position, engine.Entry{At: r.At, Data: messages[i].Data}})
		}
		s.pause()
	}
}

// wantAll returns an error unless the log has the messages, each once, and those of its epoch with the same position.
func wantAll(log, messages []passedEntry) error {
	byData := map[string]passedEntry{}
	for _, e := range log {
		if _, twice := byData[string(e.Data)]; twice {
			return fmt.Errorf("%s is in the hub twice", quote(e.Data))
		}
		byData[string(e.Data)] = e
	}
	for _, m := range messages {
		e, found := byData[string(m.Data)]
		if !found {
			return fmt.Errorf("%s was published at %v, and the hub does not have it", quote(m.Data), m.Position)
		}
		if e.Epoch == m.Epoch && e.Seq != m.Seq {
			return fmt.Errorf("%s was published at %v, and is at %v", quote(m.Data), m.Position, e.Position)
		}
	}
	return nil
}

func checkKillOfNode(s *suite) {
	killed, living := s.connect(), s.connect()
	killed.open("hub", roomy)
	f := living.open("hub", roomy)
	s.awaitReceipts(f, killed.publish("hub", texts("a")...))
	killed.kill()
	s.awaitReceipts(f, living.publish("hub", texts("b")...))
	another := s.connect()
	s.awaitReceipts(f, another.publish("hub", texts("c")...))
	s.wantTexts(f, "a", "b", "c")
}

func checkInterruptIsReported(s *suite) {
	c := s.connect()
	f := c.open("hub", roomy)
	f.allowGaps()
	s.awaitReceipts(f, c.publish("hub", texts("a")...))
	for range 2 {
		downs := c.monitor.countDowns()
		restore := s.Interrupt()
		s.poll(func() error {
			ctx, cancel := context.WithTimeout(s.Context(), 100*time.Millisecond)
			defer cancel()
			// Nothing is published whatever happens, because the engine does not know the key.
			lookup := engine.Batch{Bounds: roomy, Messages: []engine.Message{{Key: engine.Key{1}, Attempt: engine.Lookup}}}
			if _, err := c.Publish(ctx, "hub", lookup); err == nil {
				s.Fatal("Publish returned no error while the engine cannot be reached")
			}
			return c.monitor.wantDown(downs)
		})
		restore()
		s.poll(c.monitor.wantUp)
		s.awaitReceipts(f, s.publishSoon(c, "hub", texts("b")))
	}
}

func checkContextWhileInterrupted(s *suite) {
	c := s.connect()
	calls, downs := c.calls(), c.monitor.countDowns()
	restore := s.Interrupt()
	for name, call := range calls {
		ctx, cancel := context.WithTimeout(s.Context(), 100*time.Millisecond)
		s.returns(name+" without an engine and with a deadline in 100ms", promptly, func() {
			if err := call(ctx); err == nil {
				s.Errorf("%s returned no error while the engine cannot be reached", name)
			}
		})
		cancel()
	}
	s.poll(func() error { return c.monitor.wantDown(downs) })
	restore()
	s.poll(c.monitor.wantUp)
	f := c.open("opened", roomy)
	s.awaitReceipts(f, s.publishSoon(c, "opened", texts("a")))
}

func checkConnectWhileInterrupted(s *suite) {
	restore := s.Interrupt()
	var c *caller
	connecting := during(func() { c = s.begin() })
	if took := connecting.ended.Sub(connecting.began); took > promptly {
		s.Errorf("Connect waited %v while the engine cannot be reached, want it to return at once", took)
	}
	s.poll(func() error { return c.monitor.wantDown(0) })
	if cluster, ok := c.Session.(engine.Cluster); ok && cluster.Number() != 0 {
		s.Errorf("a session that was never connected has the number %d", cluster.Number())
	}
	restore()
	s.poll(c.monitor.wantUp)
	if cluster, ok := c.Session.(engine.Cluster); ok && cluster.Number() == 0 {
		s.Error("a session that is connected has the number 0")
	}
	s.awaitReceipts(c.open("hub", roomy), c.publish("hub", texts("a")...))
}

// checkInterrupt lets senders repeat batches as the contract says, while the engine comes and goes.
func checkInterrupt(s *suite) {
	callers := s.connectAll(2)
	followers := make([]*follower, len(callers))
	for i, c := range callers {
		followers[i] = c.open("hub", roomy)
		if len(callers) > 1 {
			followers[i].allowGaps()
		}
	}
	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	var mu sync.Mutex
	var published []passedEntry
	var refused []string

	send := func(c *caller) func() error {
		return func() error {
			for number := uint64(1); ctx.Err() == nil; number++ {
				batch := engine.Batch{Bounds: roomy, Messages: s.messages(1 + rand.IntN(3)), Number: number}
				receipts, err := c.publishPersistently("hub", batch, func() time.Duration { return time.Second })
				if err != nil {
					return err
				}
				mu.Lock()
				for i, m := range batch.Messages {
					if receipts == nil {
						refused = append(refused, string(m.Data))
						continue
					}
					published = append(published, passedEntry{receipts[i].Position, engine.Entry{At: receipts[i].At, Data: m.Data}})
				}
				mu.Unlock()
				s.pause()
			}
			return nil
		}
	}
	senders := make([]func() error, 0, len(callers)+1)
	for _, c := range callers {
		senders = append(senders, send(c))
	}
	s.parallel(append(senders, func() error {
		defer stop()
		for range 5 {
			for range 20 {
				s.pause()
			}
			restore := s.Interrupt()
			for range rand.IntN(40) {
				s.pause()
			}
			restore()
		}
		return nil
	})...)

	for i, c := range callers {
		s.poll(c.monitor.wantUp)
		s.wantRepaired(c, followers[i], published, refused)
	}
}

// wantRepaired fails the test unless a follower has all messages that were published, and none that was refused. In a
// cluster it reads those that it has not got.
func (s *suite) wantRepaired(c *caller, f *follower, published []passedEntry, refused []string) {
	s.Helper()
	var ledger ledger
	var last engine.Receipt
	s.poll(func() error { // the session may need a moment to notice that it is connected, or that it was not
		last = s.publishSoon(c, "hub", s.messages(1))[0]
		time.Sleep(10 * time.Millisecond)
		if got := f.position(); got != last.Position {
			return fmt.Errorf("after the engine has come back, the receiver is at %v, want %v", got, last.Position)
		}
		return nil
	})
	log := f.log()
	if _, cluster := c.Session.(engine.Cluster); cluster {
		if err := ledger.noteEntries(log); err != nil {
			s.Error(err)
		}
		log = numbered(c.read("hub", engine.Position{Epoch: last.Epoch}))
	}
	if err := errors.Join(ledger.noteEntries(log), wantAll(log, published), ledger.wantDense(last.Epoch, last.Seq)); err != nil {
		s.Error(err)
	}
	for _, e := range log {
		if slices.Contains(refused, string(e.Data)) {
			s.Errorf("%s was published, though Publish returned ErrUnavailable", quote(e.Data))
		}
	}
}

func checkWipe(s *suite) {
	c := s.connect()
	var ledger ledger
	hubs := []string{"one", "two"}
	followers := map[string]*follower{}
	for _, hub := range hubs {
		followers[hub] = c.open(hub, roomy)
		messages := s.messages(5)
		receipts := c.publish(hub, messages...)
		s.awaitReceipts(followers[hub], receipts)
		if err := ledger.noteReceipts(messages, receipts); err != nil {
			s.Error(err)
		}
	}
	s.Wipe()
	for _, hub := range hubs {
		messages := s.messages(1)
		receipts := s.publishSoon(c, hub, messages)
		s.awaitReceipts(followers[hub], receipts)
		if receipts[0].Epoch == followers[hub].snapshot.Epoch {
			s.Errorf("after the loss of all data hub %q is still in epoch %s", hub, receipts[0].Epoch)
		}
		log := c.open(hub, roomy).log()
		if err := errors.Join(ledger.noteReceipts(messages, receipts), ledger.noteEntries(log)); err != nil {
			s.Error(err)
		}
		if len(log) != 1 {
			s.Errorf("after the loss of all data and one message hub %q has %d entries", hub, len(log))
		}
	}
}

// publishSoon publishes messages with a key that nobody has, as soon as the engine takes them.
func (s *suite) publishSoon(c *caller, hub string, messages []engine.Message) (receipts []engine.Receipt) {
	s.Helper()
	for i := range messages {
		messages[i].Key = s.key()
	}
	s.poll(func() (err error) {
		receipts, err = c.tryPublish(hub, engine.Batch{Bounds: roomy, Messages: messages})
		return err
	})
	return receipts
}

func checkWipeOnNodes(s *suite) {
	one, two := s.connect(), s.connect()
	one.open("hub", roomy)
	f := two.open("hub", roomy)
	old := one.publish("hub", texts("a")...)[0]
	s.await(f, old.Position)
	two.announce("hub", engine.UserCount{User: "ann", Clients: 1})
	s.awaitVersion(f, 1)
	s.Wipe()
	s.publishSoon(one, "other", texts("b"))
	s.publishSoon(two, "other", texts("c"))

	var renewal engine.Renewal
	s.poll(func() (err error) {
		ctx, cancel := two.context()
		defer cancel()
		renewal, err = two.cluster().Renew(ctx, engine.Status{}, []engine.Known{known("hub", old.Position, 1)})
		return err
	})
	if !renewal.Forgotten || len(renewal.Changed) != 1 || renewal.Changed[0].Epoch == old.Epoch {
		s.Errorf("after the loss of all data Renew returned %+v, want Forgotten and another epoch than %s", renewal, old.Epoch)
	}
	one.renew(engine.Status{})
	if one.cluster().Number() == two.cluster().Number() {
		s.Errorf("after the loss of all data both nodes have number %d", one.cluster().Number())
	}
	if nodes := one.nodes(); len(nodes) != 2 {
		s.Errorf("after the loss of all data and Renew there are %d nodes, want 2", len(nodes))
	}
}
