package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// A model is what must hold of one hub, however many senders and receivers it has.
type model struct {
	name   string
	ledger ledger

	mu    sync.Mutex
	first map[engine.Key]engine.Receipt // the receipt that is not a repetition
	later map[engine.Key][]engine.Receipt
}

// note notes the receipts of a batch.
func (m *model) note(messages []engine.Message, receipts []engine.Receipt) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := uint64(0)
	for i, r := range receipts {
		key := messages[i].Key
		if r.Repeated {
			m.later[key] = append(m.later[key], r)
			continue
		}
		if next != 0 && r.Seq != next {
			return fmt.Errorf("hub %q: a batch has number %d where %d is next", m.name, r.Seq, next)
		}
		next = r.Seq + 1
		if before, published := m.first[key]; published {
			return fmt.Errorf("hub %q: a key was published at %v and %v", m.name, before.Position, r.Position)
		}
		if key != (engine.Key{}) {
			m.first[key] = r
		}
	}
	return m.ledger.noteReceipts(messages, receipts)
}

// verify returns an error unless the receipts of repeated messages are those of the first ones.
func (m *model) verify() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, receipts := range m.later {
		for _, r := range receipts {
			if first := m.first[key]; r.Position != first.Position || !r.At.Equal(first.At) {
				return fmt.Errorf("hub %q: a message at %v of %v is repeated with %v of %v",
					m.name, first.Position, first.At, r.Position, r.At)
			}
		}
	}
	return nil
}

// checkEverything lets random senders publish in some hubs, while receivers come and go on all sessions. Then it
// compares everything that anybody got.
func checkEverything(s *suite) {
	callers := s.connectAll(3)
	models := make([]*model, 3)
	for i := range models {
		models[i] = &model{
			name:  fmt.Sprint("hub ", i),
			first: map[engine.Key]engine.Receipt{},
			later: map[engine.Key][]engine.Receipt{},
		}
	}
	stayed := map[*model][]*follower{} // followers from beginning to end
	for _, m := range models {
		for _, c := range callers[:len(callers)/2+1] {
			stayed[m] = append(stayed[m], c.open(m.name, roomy))
		}
	}

	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	var senders, visitors []func() error
	for i := range 6 {
		isFirst := i < len(callers) // of its session; the numbers of batches are those of one sender
		c := i % len(callers)
		known := func(m *model) engine.Position {
			if c >= len(stayed[m]) {
				return engine.Position{} // the hub may not be open
			}
			return stayed[m][c].position()
		}
		senders = append(senders, func() error { return s.sendAtRandom(callers[c], models, isFirst, known) })
	}
	for _, c := range callers[len(callers)/2+1:] {
		visitors = append(visitors, func() error { return s.visit(ctx, c, models) })
	}
	visitors = append(visitors, func() error {
		defer stop()
		return runAll(senders)
	})
	s.parallel(visitors...)

	for _, m := range models {
		last := callers[0].publish(m.name, texts("last")...)[0]
		err := errors.Join(m.verify(), m.ledger.wantDense(last.Epoch, last.Seq-1))
		for _, f := range stayed[m] {
			s.await(f, last.Position)
			err = errors.Join(err, f.verify(), m.ledger.noteEntries(f.log()))
		}
		log := callers[len(callers)-1].open(m.name, roomy).log()
		err = errors.Join(err, m.ledger.noteEntries(log))
		if uint64(len(log)) != last.Seq {
			err = errors.Join(err, fmt.Errorf("hub %q has %d entries and is at number %d", m.name, len(log), last.Seq))
		}
		if err != nil {
			s.Error(err)
		}
	}
}

// sendAtRandom publishes batches in random hubs. Some messages have keys, which other senders use, too.
func (s *suite) sendAtRandom(c *caller, models []*model, numberBatches bool, known func(*model) engine.Position) error {
	numbers := map[*model]uint64{}
	for range 40 {
		m := models[rand.IntN(len(models))]
		batch := engine.Batch{Bounds: roomy, Known: known(m), Messages: s.messages(1 + rand.IntN(8))}
		for i := range batch.Messages {
			message := &batch.Messages[i]
			switch rand.IntN(4) {
			case 0: // the data depend on nothing but the key
				n := rand.IntN(200)
				message.Key = engine.Key{1, byte(n)}
				message.Data = fmt.Append(nil, "key ", n)
			case 1:
				message.Data = append(message.Data, bytes.Repeat([]byte{0}, rand.IntN(2000))...)
			}
		}
		if numberBatches {
			numbers[m]++
			batch.Number = numbers[m]
		}
		receipts, err := c.tryPublish(m.name, batch)
		if err == nil {
			err = m.note(batch.Messages, receipts)
		}
		if err != nil {
			return err
		}
		s.pause()
	}
	return nil
}

// visit opens random hubs for a short time, until the context is done.
func (s *suite) visit(ctx context.Context, c *caller, models []*model) error {
	for ctx.Err() == nil {
		m := models[rand.IntN(len(models))]
		f, err := c.tryOpen(m.name, roomy)
		if err != nil {
			return err
		}
		for range rand.IntN(5) {
			s.pause()
		}
		if rand.IntN(2) == 0 {
			c.Leave(m.name, f)
		}
		if err := errors.Join(f.verify(), m.ledger.noteEntries(f.log())); err != nil {
			return err
		}
	}
	return nil
}
