package enginetest

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A mutant is a session of the reference engine that breaks a promise. A function that is nil breaks none.
type mutant struct {
	*Session
	entries  func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry)
	users    func(to engine.Receiver, version uint64, node engine.NodeID, users []engine.UserCount)
	open     func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error)
	leave    func(hub string, from engine.Receiver)
	publish  func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error)
	forget   func(ctx context.Context, hub string) error
	close    func() error
	id       func() engine.NodeID
	number   func() uint64
	read     func(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error)
	announce func(ctx context.Context, hub string, users []engine.UserCount) error
	renew    func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error)
	nodes    func(ctx context.Context) ([]engine.Node, error)

	mu        sync.Mutex
	receivers map[engine.Receiver]engine.Receiver
}

// A mutantReceiver passes calls on as its mutant says.
type mutantReceiver struct {
	*mutant
	to engine.Receiver
}

func (r *mutantReceiver) Entries(epoch string, first uint64, entries []engine.Entry) {
	if r.entries != nil {
		r.entries(r.to, epoch, first, entries)
		return
	}
	r.to.Entries(epoch, first, entries)
}

func (r *mutantReceiver) Users(version uint64, node engine.NodeID, users []engine.UserCount) {
	if r.users != nil {
		r.users(r.to, version, node, users)
		return
	}
	r.to.Users(version, node, users)
}

// receiver returns what the reference calls instead of a receiver.
func (m *mutant) receiver(to engine.Receiver) engine.Receiver {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.receivers[to] == nil {
		m.receivers[to] = &mutantReceiver{m, to}
	}
	return m.receivers[to]
}

func (m *mutant) Open(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
	if m.open != nil {
		return m.open(ctx, hub, bounds, to)
	}
	return m.Session.Open(ctx, hub, bounds, m.receiver(to))
}

func (m *mutant) Leave(hub string, from engine.Receiver) {
	if m.leave != nil {
		m.leave(hub, from)
		return
	}
	m.Session.Leave(hub, m.receiver(from))
}

func (m *mutant) Publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	if m.publish != nil {
		return m.publish(ctx, hub, batch)
	}
	return m.Session.Publish(ctx, hub, batch)
}

func (m *mutant) Forget(ctx context.Context, hub string) error {
	if m.forget != nil {
		return m.forget(ctx, hub)
	}
	return m.Session.Forget(ctx, hub)
}

func (m *mutant) Close() error {
	if m.close != nil {
		return m.close()
	}
	return m.Session.Close()
}

func (m *mutant) ID() engine.NodeID {
	if m.id != nil {
		return m.id()
	}
	return m.Session.ID()
}

func (m *mutant) Number() uint64 {
	if m.number != nil {
		return m.number()
	}
	return m.Session.Number()
}

func (m *mutant) Read(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
	if m.read != nil {
		return m.read(ctx, hub, after)
	}
	return m.Session.Read(ctx, hub, after)
}

func (m *mutant) Announce(ctx context.Context, hub string, users []engine.UserCount) error {
	if m.announce != nil {
		return m.announce(ctx, hub, users)
	}
	return m.Session.Announce(ctx, hub, users)
}

func (m *mutant) Renew(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
	if m.renew != nil {
		return m.renew(ctx, status, known)
	}
	return m.Session.Renew(ctx, status, known)
}

func (m *mutant) Nodes(ctx context.Context) ([]engine.Node, error) {
	if m.nodes != nil {
		return m.nodes(ctx)
	}
	return m.Session.Nodes(ctx)
}

// eachMessage makes a mutant that changes each message before it is published.
func eachMessage(change func(*engine.Message)) func(*mutant) {
	return func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			batch.Messages = slices.Clone(batch.Messages)
			for i := range batch.Messages {
				change(&batch.Messages[i])
			}
			return m.Session.Publish(ctx, hub, batch)
		}
	}
}

// eachBatch makes a mutant that changes each batch before it is published.
func eachBatch(change func(*engine.Batch)) func(*mutant) {
	return func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			change(&batch)
			return m.Session.Publish(ctx, hub, batch)
		}
	}
}

// eachReceipt makes a mutant that changes each receipt.
func eachReceipt(change func(*engine.Receipt)) func(*mutant) {
	return func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			receipts, err := m.Session.Publish(ctx, hub, batch)
			for i := range receipts {
				change(&receipts[i])
			}
			return receipts, err
		}
	}
}

// eachName makes a mutant that changes the names of hubs.
func eachName(change func(string) string) func(*mutant) {
	return func(m *mutant) {
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			return m.Session.Open(ctx, change(hub), bounds, m.receiver(to))
		}
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			return m.Session.Publish(ctx, change(hub), batch)
		}
	}
}

// eachSnapshot makes a mutant that changes what Open and Read return.
func eachSnapshot(change func(*engine.Snapshot)) func(*mutant) {
	return func(m *mutant) {
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			snapshot, err := m.Session.Open(ctx, hub, bounds, m.receiver(to))
			change(&snapshot)
			return snapshot, err
		}
		m.read = func(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
			snapshot, err := m.Session.Read(ctx, hub, after)
			change(&snapshot)
			return snapshot, err
		}
	}
}

// eachRenewal makes a mutant that changes what Renew returns.
func eachRenewal(change func(*engine.Renewal)) func(*mutant) {
	return func(m *mutant) {
		m.renew = func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
			renewal, err := m.Session.Renew(ctx, status, known)
			change(&renewal)
			return renewal, err
		}
	}
}

// eachNode makes a mutant that changes what Nodes returns.
func eachNode(change func([]engine.Node) []engine.Node) func(*mutant) {
	return func(m *mutant) {
		m.nodes = func(ctx context.Context) ([]engine.Node, error) {
			nodes, err := m.Session.Nodes(ctx)
			return change(nodes), err
		}
	}
}

// mutants are what the suite must find. Each breaks one promise. The given checks must all fail.
var mutants = []struct {
	name   string
	mutate func(*mutant)
	caught []string
}{
	// What Publish promises.
	{"acknowledges without publishing", func(m *mutant) {
		var last atomic.Uint64
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			if n := last.Add(1); n%5 != 0 || batch.Messages[0].Key != (engine.Key{}) {
				return m.Session.Publish(ctx, hub, batch)
			}
			snapshot, err := m.Session.Read(ctx, hub, engine.Position{})
			receipts := make([]engine.Receipt, len(batch.Messages))
			for i := range receipts {
				snapshot.Seq++
				receipts[i] = engine.Receipt{Position: snapshot.Position, At: time.Now().Truncate(time.Millisecond)}
			}
			return receipts, err
		}
	}, []string{"Open_PassesWhatIsPublishedLater", "Publish_NumbersMessagesFrom1", "Publish_AllReceiversSeeTheSame"}},
	{"acknowledges before publishing", func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			receipts, err := m.Session.Publish(ctx, hub, batch)
			if err != nil && ctx.Err() == nil {
				receipts, err = make([]engine.Receipt, len(batch.Messages)), nil
				for i := range receipts {
					receipts[i] = engine.Receipt{Position: engine.Position{Epoch: "a", Seq: 1}, At: time.Now().Truncate(time.Millisecond)}
				}
			}
			return receipts, err
		}
	}, []string{"Interrupt_IsReported", "Interrupt_LosesAndDoublesNothing"}},
	{"publishes and says that it has not", func(m *mutant) {
		var calls atomic.Uint64
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			receipts, err := m.Session.Publish(ctx, hub, batch)
			if calls.Add(1)%10 == 0 && batch.Number != 0 {
				return nil, engine.ErrUnavailable
			}
			return receipts, err
		}
	}, []string{"Interrupt_LosesAndDoublesNothing", "Publish_RepeatedAfterADeadlinePublishesOnce"}},
	{"splits batches", func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) (receipts []engine.Receipt, err error) {
			if batch.Number != 0 {
				return m.Session.Publish(ctx, hub, batch)
			}
			for _, message := range batch.Messages {
				r, err := m.Session.Publish(ctx, hub, engine.Batch{Bounds: batch.Bounds, Messages: []engine.Message{message}})
				if err != nil {
					return nil, err
				}
				receipts = append(receipts, r...)
				time.Sleep(time.Microsecond)
			}
			return receipts, nil
		}
	}, []string{"Publish_ConcurrentBatchesStayTogether"}},
	{"publishes a batch backward", func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			batch.Messages = slices.Clone(batch.Messages)
			slices.Reverse(batch.Messages)
			return m.Session.Publish(ctx, hub, batch)
		}
	}, []string{"Open_ReturnsWhatWasPublished", "Open_PassesWhatIsPublishedLater"}},
	{"numbers from 0", eachReceipt(func(r *engine.Receipt) { r.Seq-- }), []string{"Publish_NumbersMessagesFrom1"}},
	{"numbers receipts wrong", eachReceipt(func(r *engine.Receipt) { r.Seq++ }), []string{"Open_ReturnsWhatWasPublished"}},
	{"gives receipts another epoch", eachReceipt(func(r *engine.Receipt) { r.Epoch = "x" }), []string{"Open_ReturnsWhatWasPublished"}},
	{
		"has epochs of capital letters", eachReceipt(func(r *engine.Receipt) { r.Epoch = strings.ToUpper(r.Epoch + "x") }),
		[]string{"Publish_NumbersMessagesFrom1"},
	},
	{
		"gives receipts another time", eachReceipt(func(r *engine.Receipt) { r.At = r.At.Add(time.Millisecond) }),
		[]string{"Open_ReturnsWhatWasPublished", "Open_PassesWhatIsPublishedLater"},
	},
	{
		"has times with microseconds", eachReceipt(func(r *engine.Receipt) { r.At = r.At.Add(time.Microsecond) }),
		[]string{"Publish_NumbersMessagesFrom1"},
	},
	{"loses receipts of a batch", func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			receipts, err := m.Session.Publish(ctx, hub, batch)
			return receipts[:min(len(receipts), 10)], err
		}
	}, []string{"Publish_NumbersMessagesFrom1"}},
	{"cuts data at a zero byte", eachMessage(func(message *engine.Message) {
		before, _, _ := strings.Cut(string(message.Data), "\x00")
		message.Data = []byte(before)
	}), []string{"Publish_KeepsDataAsItIs"}},
	{"drops messages without data", eachBatch(func(b *engine.Batch) {
		b.Messages = slices.DeleteFunc(slices.Clone(b.Messages), func(message engine.Message) bool { return len(message.Data) == 0 })
	}), []string{"Publish_KeepsDataAsItIs"}},
	{"changes the caller's data", eachMessage(func(message *engine.Message) {
		if len(message.Data) > 0 {
			message.Data[0]++
		}
	}), []string{"Publish_KeepsDataAsItIs"}},
	{"ignores the case of names", eachName(strings.ToLower), []string{"Publish_TakesEveryNameOfAHub"}},
	{"trims names", eachName(func(name string) string { return strings.TrimSpace(name) + "x" }), []string{"Publish_TakesEveryNameOfAHub"}},
	{"cuts names", eachName(func(name string) string { return name[:min(len(name), 254)] }), []string{"Publish_TakesEveryNameOfAHub"}},
	{
		"has one hub", eachName(func(string) string { return "hub" }),
		[]string{"Open_NewHubHasAnEpochOfItsOwn", "Publish_NumbersEachHubByItself", "Publish_TakesEveryNameOfAHub"},
	},

	// What repetitions promise.
	{
		"ignores the numbers of batches", eachBatch(func(b *engine.Batch) { b.Number = 0 }),
		[]string{"Publish_RepeatedNumberReturnsTheSameReceipts", "Forget_KeepsReceipts", "Cluster_NumbersOfBatchesAreOfTheSession"},
	},
	{"takes the number of a batch for that of another hub", func(m *mutant) {
		var mu sync.Mutex
		receipts := map[uint64][]engine.Receipt{}
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			mu.Lock()
			defer mu.Unlock()
			if r := receipts[batch.Number]; r != nil {
				return r, nil
			}
			r, err := m.Session.Publish(ctx, hub, batch)
			if batch.Number != 0 {
				receipts[batch.Number] = r
			}
			return r, err
		}
	}, []string{"Publish_RepeatedNumberReturnsTheSameReceipts"}},
	{"forgets the number of a batch after one without", func(m *mutant) {
		var last atomic.Uint64
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			if last.Swap(batch.Number) == 0 {
				batch.Number = 0
			}
			return m.Session.Publish(ctx, hub, batch)
		}
	}, []string{"Publish_RepeatedNumberReturnsTheSameReceipts"}},
	{"takes a lower number", func(m *mutant) {
		var highest atomic.Uint64
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			if batch.Number < highest.Load() {
				batch.Number = 0
			} else {
				highest.Store(batch.Number)
			}
			return m.Session.Publish(ctx, hub, batch)
		}
	}, []string{"Publish_RepeatedNumberReturnsTheSameReceipts"}},
	{
		"ignores keys", eachMessage(func(message *engine.Message) { message.Key = engine.Key{} }),
		[]string{
			"Publish_KeyIsPublishedOnce", "Publish_KeyIsPublishedOnceByConcurrentSenders", "Publish_AgainPublishesWhatIsNew",
			"Bounds_Receipts", "Bounds_AgeOfReceipts", "Forget_KeepsReceipts", "Restart_KeepsReceipts", "Cluster_KeysAreOfTheHub",
			"Publish_AllReceiversSeeTheSame",
		},
	},
	{
		"looks at one byte of keys", eachMessage(func(message *engine.Message) { clear(message.Key[1:]) }),
		[]string{"Publish_KeyIsPublishedOnce", "Publish_AgainPublishesWhatIsNew", "Publish_AllReceiversSeeTheSame"},
	},
	{"has keys of nodes", func(m *mutant) {
		id := m.Session.ID()
		eachMessage(func(message *engine.Message) {
			for i := range message.Key {
				if message.Key != (engine.Key{}) {
					message.Key[i] ^= id[i%len(id)]
				}
			}
		})(m)
	}, []string{"Cluster_KeysAreOfTheHub", "Restart_KeepsReceipts", "Publish_KeyIsPublishedOnceByConcurrentSenders"}},
	{
		"does not say that a message is repeated", eachReceipt(func(r *engine.Receipt) { r.Repeated = false }),
		[]string{"Publish_KeyIsPublishedOnce", "Publish_AgainPublishesWhatIsNew"},
	},
	{"says the present time of a repeated message", eachReceipt(func(r *engine.Receipt) {
		if r.Repeated {
			r.At = r.At.Add(time.Second)
		}
	}), []string{"Publish_KeyIsPublishedOnce", "Restart_KeepsReceipts", "Publish_AllReceiversSeeTheSame"}},
	{"publishes a second attempt as a first", eachMessage(func(message *engine.Message) {
		if message.Attempt == engine.Again {
			message.Attempt = engine.First
		}
	}), []string{"Bounds_Receipts", "Bounds_AgainIsPublishedWhenTheAgeIsOver"}},
	{"never publishes a second attempt", eachMessage(func(message *engine.Message) {
		if message.Attempt == engine.Again {
			message.Attempt = engine.Lookup
		}
	}), []string{"Publish_AgainPublishesWhatIsNew", "Bounds_AgainIsPublishedWhenTheAgeIsOver"}},
	{
		"publishes a look-up", eachMessage(func(message *engine.Message) { message.Attempt = engine.First }),
		[]string{"Publish_LookupPublishesNothing", "Bounds_Receipts"},
	},

	// What receivers are promised.
	{"skips an entry", func(m *mutant) {
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			if first%4 != 0 {
				to.Entries(epoch, first, entries)
			}
		}
	}, []string{"Open_PassesWhatIsPublishedLater", "Publish_AllReceiversSeeTheSame", "Publish_ConcurrentBatchesStayTogether"}},
	{"passes an entry twice", func(m *mutant) {
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			to.Entries(epoch, first, entries)
			if first%4 == 0 {
				to.Entries(epoch, first, entries)
			}
		}
	}, []string{"Open_PassesWhatIsPublishedLater", "Publish_AllReceiversSeeTheSame", "Publish_ConcurrentBatchesStayTogether"}},
	{"passes entries out of order", func(m *mutant) {
		type passed struct {
			epoch   string
			first   uint64
			entries []engine.Entry
		}
		var mu sync.Mutex
		later := map[engine.Receiver]passed{}
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			mu.Lock()
			p, waits := later[to]
			delete(later, to)
			if !waits && first%4 == 0 {
				later[to] = passed{epoch, first, entries}
				mu.Unlock()
				return
			}
			mu.Unlock()
			to.Entries(epoch, first, entries)
			if waits {
				to.Entries(p.epoch, p.first, p.entries)
			}
		}
	}, []string{"Publish_AllReceiversSeeTheSame", "Publish_ConcurrentBatchesStayTogether"}},
	{"swaps the entries of a call", func(m *mutant) {
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			entries = slices.Clone(entries)
			slices.Reverse(entries)
			to.Entries(epoch, first, entries)
		}
	}, []string{"Open_PassesWhatIsPublishedLater", "Publish_AllReceiversSeeTheSame"}},
	{"loses what comes first in an epoch", func(m *mutant) {
		var mu sync.Mutex
		last := map[engine.Receiver]string{}
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			mu.Lock()
			before := last[to]
			last[to] = epoch
			mu.Unlock()
			if before == "" || before == epoch {
				to.Entries(epoch, first, entries)
			}
		}
	}, []string{"Forget_WhilePublishing"}},
	{"numbers calls wrong", func(m *mutant) {
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			to.Entries(epoch, first+1, entries)
		}
	}, []string{"Open_PassesWhatIsPublishedLater"}},
	{"calls a receiver twice at the same time", func(m *mutant) {
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			var wg sync.WaitGroup
			for i := range entries { // each ends with its call, and is waited for
				wg.Go(func() { to.Entries(epoch, first+uint64(i), entries[i:i+1]) })
			}
			wg.Wait()
		}
	}, []string{"Publish_ConcurrentBatchesStayTogether"}},
	{"loses entries between snapshot and first call", func(m *mutant) {
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			snapshot, err := m.Session.Read(ctx, hub, engine.Position{})
			if err != nil {
				return snapshot, err
			}
			runtime.Gosched()
			time.Sleep(100 * time.Microsecond)
			_, err = m.Session.Open(ctx, hub, bounds, m.receiver(to))
			return snapshot, err
		}
	}, []string{"Open_WhilePublishingPassesEachEntryOnce"}},
	{"returns a snapshot of before", func(m *mutant) {
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			snapshot, err := m.Session.Open(ctx, hub, bounds, m.receiver(to))
			if n := len(snapshot.Entries); n > 0 {
				snapshot.Entries, snapshot.Seq = snapshot.Entries[:n-1], snapshot.Seq-1
			}
			return snapshot, err
		}
	}, []string{"Open_ReturnsWhatWasPublished", "Open_WhilePublishingPassesEachEntryOnce"}},
	{"counts a snapshot wrong", eachSnapshot(func(s *engine.Snapshot) { s.Base++ }), []string{"Open_NewHubHasAnEpochOfItsOwn"}},
	{
		"passes entries after Leave", func(m *mutant) { m.leave = func(string, engine.Receiver) {} },
		[]string{"Leave_EndsDelivery", "Announce_LeaveTakesItBack"},
	},
	{"calls replaced receivers", func(m *mutant) {
		var mu sync.Mutex
		all := map[string][]engine.Receiver{}
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			mu.Lock()
			defer mu.Unlock()
			before := all[hub]
			all[hub] = append(all[hub], to)
			snapshot, err := m.Session.Open(ctx, hub, bounds, m.receiver(to))
			m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
				for _, receiver := range before {
					receiver.Entries(epoch, first, entries)
				}
				to.Entries(epoch, first, entries)
			}
			return snapshot, err
		}
	}, []string{"Open_AgainReplacesTheReceiver"}},
	{"leaves whatever receiver there is", func(m *mutant) {
		var mu sync.Mutex
		current := map[string]engine.Receiver{}
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			mu.Lock()
			current[hub] = to
			mu.Unlock()
			return m.Session.Open(ctx, hub, bounds, m.receiver(to))
		}
		m.leave = func(hub string, _ engine.Receiver) {
			mu.Lock()
			defer mu.Unlock()
			m.Session.Leave(hub, m.receiver(current[hub]))
		}
	}, []string{"Leave_OfAReplacedReceiverDoesNothing"}},
	{"leaves in advance", func(m *mutant) {
		var mu sync.Mutex
		early := map[string]bool{}
		m.leave = func(hub string, from engine.Receiver) {
			mu.Lock()
			defer mu.Unlock()
			m.server.mu.Lock()
			early[hub] = m.Session.open[hub] == nil
			m.server.mu.Unlock()
			m.Session.Leave(hub, m.receiver(from))
		}
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			mu.Lock()
			defer mu.Unlock()
			snapshot, err := m.Session.Open(ctx, hub, bounds, m.receiver(to))
			if early[hub] {
				m.Session.Leave(hub, m.receiver(to))
			}
			return snapshot, err
		}
	}, []string{"Leave_OfAHubThatIsNotOpenDoesNothing"}},
	{"calls a receiver after Close", func(m *mutant) {
		m.close = func() error {
			m.mu.Lock()
			defer m.mu.Unlock()
			for to := range m.receivers {
				time.AfterFunc(time.Millisecond, func() { to.Entries("late", 1, make([]engine.Entry, 1)) })
			}
			return m.Session.Close()
		}
	}, []string{"Close_EndsAllCalls"}},
	{"calls the monitor after Close", func(m *mutant) {
		m.close = func() error {
			time.AfterFunc(time.Millisecond, func() { m.monitor.State(nil) })
			return m.Session.Close()
		}
	}, []string{"Close_EndsAllCalls"}},
	{"does not close", func(m *mutant) {
		m.close = func() error {
			time.AfterFunc(time.Minute, func() { m.Session.Close() })
			return nil
		}
	}, []string{"Close_EndsAllCalls"}},
	{"does not return when the context is done", func(m *mutant) {
		m.forget = func(ctx context.Context, hub string) error {
			<-ctx.Done()
			time.Sleep(time.Minute)
			return ctx.Err()
		}
	}, []string{"Context_CallsReturnWhenItIsDone", "Interrupt_CallsReturnWhenTheirContextIsDone"}},

	// What engines must keep, and forget.
	{"has the bounds of the node that publishes", func(m *mutant) {
		eachBatch(func(b *engine.Batch) {
			m.server.mu.Lock()
			defer m.server.mu.Unlock()
			for _, session := range m.server.sessions {
				session.nameLocked("hub", b.Bounds)
			}
		})(m)
	}, []string{"Cluster_LargerBoundsHold"}},
	{"keeps too few messages", eachBatch(func(b *engine.Batch) { b.Bounds.Messages-- }), []string{"Bounds_Messages"}},
	{"keeps too many messages", func(m *mutant) {
		eachBatch(func(b *engine.Batch) { b.Bounds.Messages = 3 * b.Bounds.Messages })(m)
		m.open = func(ctx context.Context, hub string, _ engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			return m.Session.Open(ctx, hub, roomy, m.receiver(to))
		}
	}, []string{"Bounds_Messages"}},
	{"keeps a message too many", func(m *mutant) {
		eachBatch(func(b *engine.Batch) { b.Bounds.Messages = max(b.Bounds.Messages, 1) })(m)
		m.open = func(ctx context.Context, hub string, _ engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			return m.Session.Open(ctx, hub, roomy, m.receiver(to))
		}
	}, []string{"Bounds_NoMessages"}},
	{"keeps too few bytes", eachBatch(func(b *engine.Batch) { b.Bounds.Bytes-- }), []string{"Bounds_Bytes"}},
	{"keeps too many bytes", func(m *mutant) {
		eachBatch(func(b *engine.Batch) { b.Bounds.Bytes *= 3 })(m)
		m.open = func(ctx context.Context, hub string, _ engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			return m.Session.Open(ctx, hub, roomy, m.receiver(to))
		}
	}, []string{"Bounds_Bytes"}},
	{"forgets a newest entry that is large", eachBatch(func(b *engine.Batch) {
		if len(b.Messages[len(b.Messages)-1].Data) > b.Bounds.Bytes {
			b.Bounds.Messages = 0
		}
	}), []string{"Bounds_NewestEntryIsKept"}},
	{
		"forgets too early", eachBatch(func(b *engine.Batch) { b.Bounds.Age /= 2 }),
		[]string{"Bounds_AgeOfReceipts", "Bounds_AgainIsPublishedWhenTheAgeIsOver"},
	},
	{"forgets too late", func(m *mutant) {
		eachBatch(func(b *engine.Batch) { b.Bounds.Age *= 3 })(m)
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			bounds.Age *= 3
			return m.Session.Open(ctx, hub, bounds, m.receiver(to))
		}
	}, []string{"Bounds_Age", "Bounds_AgeOfReceipts", "Bounds_AgainIsPublishedWhenTheAgeIsOver", "Bounds_OldHubHasNothing"}},
	{"forgets hubs that are open", func(m *mutant) {
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			m.server.mu.Lock()
			if h := m.server.hubs[hub]; h != nil && !h.modified.IsZero() && !h.isKept(h.modified, time.Now()) {
				delete(m.server.hubs, hub)
			}
			m.server.mu.Unlock()
			return m.Session.Publish(ctx, hub, batch)
		}
	}, []string{"Bounds_OpenHubIsNotForgotten"}},
	{"keeps too few receipts", eachBatch(func(b *engine.Batch) { b.Bounds.Receipts-- }), []string{"Bounds_Receipts"}},
	{"keeps too many receipts", eachBatch(func(b *engine.Batch) { b.Bounds.Receipts *= 3 }), []string{"Bounds_Receipts"}},
	{
		"forgets nothing in Forget", func(m *mutant) { m.forget = func(context.Context, string) error { return nil } },
		[]string{"Forget_BeginsANewEpoch", "Cluster_ForgetReachesAllNodes"},
	},
	{"keeps entries in Forget", func(m *mutant) {
		m.forget = func(_ context.Context, hub string) error {
			m.server.NewEpoch(hub)
			return nil
		}
	}, []string{"Forget_BeginsANewEpoch", "Forget_KeepsReceipts", "Cluster_ForgetReachesAllNodes"}},
	{"forgets receipts in Forget", func(m *mutant) {
		m.forget = func(ctx context.Context, hub string) error {
			m.server.ForgetReceipts(hub)
			return m.Session.Forget(ctx, hub)
		}
	}, []string{"Forget_KeepsReceipts"}},
	{"forgets users in Forget", func(m *mutant) {
		m.forget = func(ctx context.Context, hub string) error {
			m.server.mu.Lock()
			clear(m.server.hubs[hub].users)
			m.server.mu.Unlock()
			return m.Session.Forget(ctx, hub)
		}
	}, []string{"Announce_OutlivesForget"}},

	// What a cluster promises.
	{"passes entries on its own node only", func(m *mutant) {
		var mu sync.Mutex
		own := map[string]bool{}
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			mu.Lock()
			defer mu.Unlock()
			for _, message := range batch.Messages {
				own[string(message.Data)] = true
			}
			return m.Session.Publish(ctx, hub, batch)
		}
		m.entries = func(to engine.Receiver, epoch string, first uint64, entries []engine.Entry) {
			mu.Lock()
			isOwn := own[string(entries[0].Data)]
			mu.Unlock()
			if isOwn {
				to.Entries(epoch, first, entries)
			}
		}
	}, []string{"Cluster_AllNodesGetEverything", "Publish_AllReceiversSeeTheSame", "Kill_OfOneNodeLeavesTheOthersAlone"}},
	{
		"gives all nodes one id", func(m *mutant) { m.id = func() engine.NodeID { return "node" } },
		[]string{"Cluster_NodesHaveIDsAndNumbersOfTheirOwn"},
	},
	{
		"gives all nodes one number", func(m *mutant) { m.number = func() uint64 { return 1 } },
		[]string{"Cluster_NodesHaveIDsAndNumbersOfTheirOwn", "Wipe_NodesLearnOfIt"},
	},
	{"gives a new number for each call", func(m *mutant) {
		var n atomic.Uint64
		m.number = func() uint64 { return m.Session.Number()<<32 + n.Add(1) }
	}, []string{"Cluster_NodesHaveIDsAndNumbersOfTheirOwn"}},
	{"reads everything", func(m *mutant) {
		m.read = func(ctx context.Context, hub string, _ engine.Position) (engine.Snapshot, error) {
			return m.Session.Read(ctx, hub, engine.Position{})
		}
	}, []string{"Read_ReturnsWhatIsAfterAPosition"}},
	{"reads after a number in any epoch", func(m *mutant) {
		m.read = func(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
			now, err := m.Session.Read(ctx, hub, engine.Position{})
			if err != nil {
				return now, err
			}
			return m.Session.Read(ctx, hub, engine.Position{Epoch: now.Epoch, Seq: after.Seq})
		}
	}, []string{"Read_BeginsWithTheOldestEntryOtherwise"}},
	{"reads nothing after a position that it does not have", func(m *mutant) {
		m.read = func(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
			s, err := m.Session.Read(ctx, hub, after)
			if s.Base != after.Seq || s.Epoch != after.Epoch {
				s.Base, s.Entries = s.Seq, nil
			}
			return s, err
		}
	}, []string{"Read_BeginsWithTheOldestEntryOtherwise"}},
	{"does not announce to itself", func(m *mutant) {
		m.users = func(to engine.Receiver, version uint64, node engine.NodeID, users []engine.UserCount) {
			if node != m.Session.ID() {
				to.Users(version, node, users)
			}
		}
	}, []string{"Announce_ReachesAllNodes"}},
	{"announces to itself only", func(m *mutant) {
		m.users = func(to engine.Receiver, version uint64, node engine.NodeID, users []engine.UserCount) {
			if node == m.Session.ID() {
				to.Users(version, node, users)
			}
		}
	}, []string{"Announce_ReachesAllNodes", "Lease_UsersOfADeadNodeLeave"}},
	{"announces twice", func(m *mutant) {
		m.users = func(to engine.Receiver, version uint64, node engine.NodeID, users []engine.UserCount) {
			to.Users(version, node, users)
			to.Users(version, node, users)
		}
	}, []string{"Announce_ReachesAllNodes", "Announce_WhileOpeningLosesNothing"}},
	{"does not announce that users left", func(m *mutant) {
		m.users = func(to engine.Receiver, version uint64, node engine.NodeID, users []engine.UserCount) {
			users = slices.DeleteFunc(slices.Clone(users), func(u engine.UserCount) bool { return u.Clients == 0 })
			to.Users(version, node, users)
		}
	}, []string{"Announce_ReachesAllNodes", "Announce_LeaveTakesItBack", "Lease_UsersOfADeadNodeLeave"}},
	{"announces a hundred users at most", func(m *mutant) {
		m.announce = func(ctx context.Context, hub string, users []engine.UserCount) error {
			return m.Session.Announce(ctx, hub, users[:min(len(users), 100)])
		}
	}, []string{"Announce_TakesAllUsers"}},
	{"cuts users at a line's end", func(m *mutant) {
		m.announce = func(ctx context.Context, hub string, users []engine.UserCount) error {
			users = slices.Clone(users)
			for i := range users {
				users[i].User, _, _ = strings.Cut(users[i].User, "\n")
			}
			return m.Session.Announce(ctx, hub, users)
		}
	}, []string{"Announce_TakesAllUsers"}},
	{
		"has no users in snapshots", eachSnapshot(func(s *engine.Snapshot) { s.Users = nil }),
		[]string{"Announce_ReachesAllNodes", "Announce_WhileOpeningLosesNothing", "Announce_OutlivesForget"},
	},
	{"has users without clients in snapshots", eachSnapshot(func(s *engine.Snapshot) {
		for node := range s.Users {
			s.Users[node] = append(s.Users[node], engine.UserCount{User: "gone"})
		}
	}), []string{"Announce_ReachesAllNodes"}},
	{
		"has no version in snapshots", eachSnapshot(func(s *engine.Snapshot) { s.Version = 0 }),
		[]string{"Announce_ReachesAllNodes", "Announce_WhileOpeningLosesNothing"},
	},
	{"does not take announcements back in Open", func(m *mutant) {
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			before, err := m.Session.Read(ctx, hub, engine.Position{})
			if err != nil {
				return before, err
			}
			snapshot, err := m.Session.Open(ctx, hub, bounds, m.receiver(to))
			if users := before.Users[m.Session.ID()]; len(users) > 0 {
				snapshot.Users[m.Session.ID()] = users
			}
			return snapshot, err
		}
	}, []string{"Announce_OpenTakesItBack"}},
	{"takes announcements back late", func(m *mutant) {
		m.leave = func(hub string, from engine.Receiver) {
			m.Session.Leave(hub, m.receiver(from))
			time.AfterFunc(time.Millisecond, func() {
				m.server.mu.Lock()
				defer m.server.mu.Unlock()
				m.server.takeBackLocked(hub, m.Session.ID())
			})
		}
	}, []string{"Announce_AfterLeaveAndOpenStays"}},
	{
		"never finds changes", eachRenewal(func(r *engine.Renewal) { r.Changed = nil }),
		[]string{"Renew_ReturnsWhatHasChanged", "Cluster_ForgetReachesAllNodes", "Wipe_NodesLearnOfIt"},
	},
	{"finds changes of numbers only", func(m *mutant) {
		m.renew = func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
			renewal, err := m.Session.Renew(ctx, status, known)
			renewal.Changed = slices.DeleteFunc(renewal.Changed, func(changed engine.Known) bool {
				return slices.ContainsFunc(known, func(k engine.Known) bool {
					return k.Hub == changed.Hub && k.Seq == changed.Seq
				})
			})
			return renewal, err
		}
	}, []string{"Renew_ReturnsWhatHasChanged"}},
	{"finds changes everywhere", func(m *mutant) {
		m.renew = func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
			renewal, err := m.Session.Renew(ctx, status, known)
			renewal.Changed = known
			return renewal, err
		}
	}, []string{"Renew_ReturnsWhatHasChanged"}},
	{
		"has always forgotten the node", eachRenewal(func(r *engine.Renewal) { r.Forgotten = true }),
		[]string{"Renew_ReturnsWhatHasChanged", "Lease_UsersOfADeadNodeLeave"},
	},
	{
		"has never forgotten the node", eachRenewal(func(r *engine.Renewal) { r.Forgotten = false }),
		[]string{"Lease_UsersOfADeadNodeLeave", "Wipe_NodesLearnOfIt"},
	},
	{"has no leases", func(m *mutant) {
		m.renew = func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
			m.server.mu.Lock()
			for _, node := range m.server.nodes {
				node.expires = time.Now().Add(engine.Lease)
			}
			m.server.mu.Unlock()
			return m.Session.Renew(ctx, status, known)
		}
	}, []string{"Lease_UsersOfADeadNodeLeave"}},
	{"has short leases", func(m *mutant) {
		m.renew = func(ctx context.Context, status engine.Status, known []engine.Known) (engine.Renewal, error) {
			m.server.mu.Lock()
			for _, node := range m.server.nodes {
				node.expires = node.expires.Add(-engine.RenewInterval)
			}
			m.server.mu.Unlock()
			return m.Session.Renew(ctx, status, known)
		}
	}, []string{"Lease_UsersOfADeadNodeLeave"}},
	{"omits the own node", eachNode(func(nodes []engine.Node) []engine.Node {
		return slices.DeleteFunc(nodes, func(n engine.Node) bool { return n.Self })
	}), []string{"Nodes_ReturnsTheLivingNodes", "Lease_UsersOfADeadNodeLeave"}},
	{"sorts nodes backward", eachNode(func(nodes []engine.Node) []engine.Node {
		slices.Reverse(nodes)
		return nodes
	}), []string{"Nodes_ReturnsTheLivingNodes"}},
	{"loses what nodes say of themselves", eachNode(func(nodes []engine.Node) []engine.Node {
		for i := range nodes {
			nodes[i].Behind = uint64(uint32(nodes[i].Behind))
		}
		return nodes
	}), []string{"Nodes_ReturnsTheLivingNodes"}},

	// What holds whatever fails.
	{"returns to old epochs", func(m *mutant) {
		// The first epoch of each hub, for ever.
		epochs := map[string]string{}
		old := func(hub, epoch string) string {
			m.mu.Lock()
			defer m.mu.Unlock()
			if epochs[hub] == "" {
				epochs[hub] = epoch
			}
			return epochs[hub]
		}
		m.open = func(ctx context.Context, hub string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
			snapshot, err := m.Session.Open(ctx, hub, bounds, &renamed{m.receiver(to), func(epoch string) string { return old(hub, epoch) }})
			snapshot.Epoch = old(hub, snapshot.Epoch)
			return snapshot, err
		}
		m.publish = func(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
			receipts, err := m.Session.Publish(ctx, hub, batch)
			for i := range receipts {
				receipts[i].Epoch = old(hub, receipts[i].Epoch)
			}
			return receipts, err
		}
	}, []string{"Wipe_BeginsNewEpochs", "Forget_BeginsANewEpoch", "Forget_WhilePublishing"}},
	{"waits for the server in Connect", func(m *mutant) {
		for range 60 {
			m.server.mu.Lock()
			down := m.server.down
			m.server.mu.Unlock()
			if down == nil {
				return
			}
			time.Sleep(time.Second)
		}
	}, []string{"Interrupt_ConnectReturnsAtOnce"}},
	{"loses the newest message in a restart", func(m *mutant) {
		m.server.mu.Lock()
		defer m.server.mu.Unlock()
		if len(m.server.sessions) > 0 {
			return
		}
		for _, h := range m.server.hubs {
			h.begin(max(h.seq, 1) - 1)
		}
	}, []string{"Restart_KeepsHubs", "Kill_KeepsWhatWasAcknowledged"}},
	{"uses numbers again after a restart", func(m *mutant) {
		m.server.mu.Lock()
		defer m.server.mu.Unlock()
		if len(m.server.sessions) > 0 {
			return
		}
		for _, h := range m.server.hubs {
			epoch := h.epoch
			h.begin(max(h.seq, 1) - 1)
			h.epoch = epoch
		}
	}, []string{"Restart_KeepsHubs", "Kill_KeepsWhatWasAcknowledged"}},
	{"does not report that it is down", func(m *mutant) { m.monitor = &optimist{m.monitor} }, []string{"Interrupt_IsReported"}},
}

// An optimist is a monitor that learns nothing bad.
type optimist struct{ engine.Monitor }

func (o *optimist) State(err error) {
	if err == nil {
		o.Monitor.State(nil)
	}
}

// renamed is a receiver of epochs with other names.
type renamed struct {
	engine.Receiver
	epoch func(string) string
}

func (r *renamed) Entries(epoch string, first uint64, entries []engine.Entry) {
	r.Receiver.Entries(r.epoch(epoch), first, entries)
}

func TestMutants_SuiteFindsThem(t *testing.T) {
	t.Parallel()
	checks := map[string]check{}
	all := checksOf(abilities{cluster: true, persistent: true, kill: true, interrupt: true, wipe: true})
	for _, c := range all {
		checks[c.name] = c
	}
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			for _, name := range m.caught {
				c, ok := checks[name]
				if !ok {
					t.Fatalf("there is no check %s", name)
				}
				if failures := runMutant(t, c, m.mutate); len(failures) == 0 {
					t.Errorf("%s passes", name)
				} else {
					t.Logf("%s: %.300s", name, failures[0])
				}
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		t.Parallel()
		for _, c := range all {
			if failures := runMutant(t, c, func(*mutant) {}); len(failures) > 0 {
				t.Errorf("%s fails over a session that breaks no promise: %q", c.name, failures)
			}
		}
	})
}

// TestChecks_EachFindsAMutant fails for a check that may check nothing.
func TestChecks_EachFindsAMutant(t *testing.T) {
	for _, c := range checksOf(abilities{cluster: true, persistent: true, kill: true, interrupt: true, wipe: true}) {
		found := false
		for _, m := range mutants {
			found = found || slices.Contains(m.caught, c.name)
		}
		if !found {
			t.Errorf("there is no mutant that %s has to find", c.name)
		}
	}
}

// runMutant runs a check over mutants, in a bubble, and returns its failures.
func runMutant(t *testing.T, c check, mutate func(*mutant)) (failures []string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := NewServer()
		r := &recorder{TB: t}
		r.run(func() { c.test(r, func(testing.TB) Harness { return mutantHarness(server, mutate) }) })
		failures = r.failures
		// What the mutant has left behind must end with the bubble.
		time.Sleep(time.Hour)
		server.mu.Lock()
		left := slices.Clone(server.sessions)
		server.mu.Unlock()
		for _, session := range left {
			session.Kill()
		}
	})
	return failures
}

// mutantHarness returns the reference with mutants as its sessions.
func mutantHarness(server *Server, mutate func(*mutant)) Harness {
	h := harness(server)
	h.Connect = func(monitor engine.Monitor) (engine.Session, error) {
		session := newSession(server, monitor)
		m := &mutant{Session: session, receivers: map[engine.Receiver]engine.Receiver{}}
		mutate(m)
		server.run(session)
		return m, nil
	}
	h.Kill = func(s engine.Session) { s.(*mutant).Kill() }
	return h
}

// A recorder is a test that notes failures instead of failing.
type recorder struct {
	testing.TB
	mu       sync.Mutex
	failures []string
	cleanups []func()
}

// run runs a test, and then what it has registered with Cleanup.
func (r *recorder) run(test func()) {
	inGoroutine(test)
	for len(r.cleanups) > 0 {
		last := r.cleanups[len(r.cleanups)-1]
		r.cleanups = r.cleanups[:len(r.cleanups)-1]
		inGoroutine(last)
	}
}

// inGoroutine runs a function that may call FailNow.
func inGoroutine(f func()) {
	done := make(chan struct{})
	go func() { // ends with f, for which this function waits
		defer close(done)
		f()
	}()
	<-done
}

func (r *recorder) fail(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, text)
}

func (r *recorder) Helper()                           {}
func (r *recorder) Log(...any)                        {}
func (r *recorder) Logf(string, ...any)               {}
func (r *recorder) Cleanup(f func())                  { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Error(args ...any)                 { r.fail(fmt.Sprint(args...)) }
func (r *recorder) Errorf(format string, args ...any) { r.fail(fmt.Sprintf(format, args...)) }
func (r *recorder) FailNow()                          { runtime.Goexit() }

func (r *recorder) Fatal(args ...any) {
	r.Error(args...)
	r.FailNow()
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	r.FailNow()
}

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.failures) > 0
}
