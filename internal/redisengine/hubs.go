package redisengine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// Publish implements engine.Session.
func (s *Session) Publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	receipts, err := s.publish(ctx, hub, batch)
	if err != nil {
		return nil, fmt.Errorf("publishing: %w", err)
	}
	return receipts, nil
}

func (s *Session) publish(ctx context.Context, hub string, batch engine.Batch) ([]engine.Receipt, error) {
	if n := len(batch.Messages); n < 1 || n > mostInBatch {
		return nil, unavailable(errBatchSize)
	}
	l, err := s.connectedFor(hub)
	if err != nil {
		return nil, err
	}
	hasKeys := slices.ContainsFunc(batch.Messages, func(m engine.Message) bool { return m.Key != engine.Key{} })
	args := make([]string, 0, 8+2*len(batch.Messages))
	args = append(args,
		string(s.node),
		fmt.Sprintf("%020d", batch.Number),
		engine.NewEpoch(),
		batch.Known.Epoch,
		strconv.FormatUint(batch.Known.Seq, 10),
		encodeBounds(batch.Bounds),
		s.keys.hubChannel(hub),
		bit(hasKeys),
	)
	for _, m := range batch.Messages {
		if hasKeys {
			args = append(args, keyOf(m))
		}
		args = append(args, string(m.Data))
	}
	answer, err := l.run(ctx, scriptPublish, s.hubKeys(hub), args...).ToString()
	if err != nil {
		return nil, err
	}
	return parseReceipts(answer, len(batch.Messages))
}

// keyOf returns the key of a message as publish.lua expects it.
func keyOf(m engine.Message) string {
	if m.Key == (engine.Key{}) {
		return ""
	}
	return strconv.Itoa(int(m.Attempt)) + string(m.Key[:])
}

// Read implements engine.Cluster.
func (s *Session) Read(ctx context.Context, hub string, after engine.Position) (engine.Snapshot, error) {
	bounds := boundsAsBefore
	if sub := s.lookup(hub); sub != nil {
		bounds = encodeBounds(sub.bounds)
	}
	l, err := s.connectedFor(hub)
	if err != nil {
		return engine.Snapshot{}, fmt.Errorf("reading the hub: %w", err)
	}
	snapshot, err := s.read(ctx, l, hub, reading{after: after, bounds: bounds})
	if err != nil {
		return engine.Snapshot{}, fmt.Errorf("reading the hub: %w", err)
	}
	return snapshot, nil
}

// errRestless means that entries vanish while they are read.
var errRestless = errors.New("the hub forgets its entries faster than they can be read")

// A reading says what to read of a hub.
type reading struct {
	after  engine.Position
	bounds string // encoded
	open   bool   // the node opens the hub
}

// read reads a hub page by page. It begins again when entries are forgotten meanwhile.
func (s *Session) read(ctx context.Context, l *link, hub string, r reading) (engine.Snapshot, error) {
	for range 5 {
		first, err := s.readPage(ctx, l, hub, r, true)
		if err != nil {
			return engine.Snapshot{}, err
		}
		snapshot, head := first.Snapshot, first.head
		for snapshot.Seq < head {
			r := r
			r.after = snapshot.Position
			p, err := s.readPage(ctx, l, hub, r, false)
			if err != nil {
				return engine.Snapshot{}, err
			}
			if p.Epoch != snapshot.Epoch || p.Base != snapshot.Seq {
				break
			}
			snapshot.Entries = append(snapshot.Entries, p.Entries...)
			snapshot.Seq, head = p.Seq, p.head
		}
		if snapshot.Seq == head {
			return snapshot, nil
		}
	}
	return engine.Snapshot{}, errRestless
}

func (s *Session) readPage(ctx context.Context, l *link, hub string, r reading, users bool) (page, error) {
	answer, err := l.run(ctx, scriptRead, s.hubKeys(hub), engine.NewEpoch(), r.after.Epoch,
		strconv.FormatUint(r.after.Seq, 10), r.bounds, bit(users), bit(r.open)).ToArray()
	if err != nil {
		return page{}, err
	}
	return parsePage(answer)
}

// Forget implements engine.Session. Other nodes learn of it by the next message or renewal.
func (s *Session) Forget(ctx context.Context, hub string) error {
	l, err := s.connectedFor(hub)
	if err == nil {
		err = notNil(l.run(ctx, scriptForget, s.hubKeys(hub), engine.NewEpoch()).Error())
	}
	if err != nil {
		return fmt.Errorf("forgetting the entries of the hub: %w", err)
	}
	return nil
}

// hubKeys returns the keys of scripts that work with one hub.
func (s *Session) hubKeys(hub string) []string {
	return s.keys.hub(append(make([]string, 0, 4+keysPerHub), s.keys.server), hub)
}

func bit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}
