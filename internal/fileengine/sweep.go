package fileengine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// sweepInterval is how often the committer looks for hubs that have outlived their age.
	sweepInterval = time.Minute

	// sweepPause is how long the committer serves others between two steps of a sweep.
	sweepPause = 10 * time.Millisecond

	// sweepHubs and sweepItems are how many hubs one step of a sweep looks at, and about how many of their entries and
	// receipts it removes: a few milliseconds of work.
	sweepHubs  = 256
	sweepItems = 4096

	// idleTime is how long the committer remembers a hub that is not open: longer than anybody repeats a batch.
	idleTime = time.Minute
)

// sweep removes hubs that have outlived their age, in steps. It returns when to take the next one.
func (s *Session) sweep() time.Duration {
	s.forgetIdle()
	if s.file.doubtful != 0 {
		return sweepInterval
	}
	step := &sweepStep{open: func(name string) bool { return s.receiver(name) != nil }, items: sweepItems}
	err := s.file.update(func(tx *bbolt.Tx) error {
		return step.run(tablesOf(tx, s.now()))
	})
	for _, name := range step.removed {
		if h := s.hubs[name]; h != nil {
			h.receipts = nil
		}
	}
	if errors.Is(err, errDamaged) && s.file.broken == nil {
		s.monitor.Warn(fmt.Sprintf("%s is damaged, so that hubs stay there after their age: %v", s.file.path, err))
		return sweepInterval
	}
	s.report(err)
	if err != nil {
		return sweepInterval
	}
	return sweepPause
}

// forgetIdle forgets hubs that are not open and that nobody has used lately.
func (s *Session) forgetIdle() {
	for name, h := range s.hubs {
		if h.damaged == nil && s.now().Sub(h.used) > idleTime && s.receiver(name) == nil {
			delete(s.hubs, name)
		}
	}
}

// A sweepStep is one transaction of a sweep.
type sweepStep struct {
	open    func(name string) bool
	items   int // that it may still remove
	removed []string
}

// A dueHub is a hub that the sweep has to look at.
type dueHub struct {
	key  []byte // in expiry
	name string
}

// run looks at hubs that are due.
func (s *sweepStep) run(t *tables) error {
	due, err := t.due(sweepHubs)
	if err != nil {
		return err
	}
	if len(due) == 0 {
		return errUnchanged
	}
	for _, d := range due {
		if s.items <= 0 {
			return nil
		}
		err := s.visit(t, d)
		if errors.Is(err, errDamaged) {
			err = t.expiry.Delete(d.key) // or no sweep would get beyond this hub
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// visit removes a hub if it has outlived its age, and otherwise notes when to look again.
func (s *sweepStep) visit(t *tables, d dueHub) error {
	r, err := t.record(d.name)
	if err != nil {
		return err
	}
	if r == nil {
		return t.expiry.Delete(d.key)
	}
	if !r.expired(t.now) {
		return s.postpone(t, d.name, r, r.expires())
	}
	if s.open(d.name) {
		return s.postpone(t, d.name, r, saturatingAdd(t.now, max(r.age, uint64(sweepInterval.Milliseconds()))))
	}
	return s.remove(t, d, r)
}

func (s *sweepStep) postpone(t *tables, name string, r *hubRecord, due uint64) error {
	if err := t.schedule(name, r, due); err != nil {
		return err
	}
	return t.put(name, r)
}

// remove removes a hub, or the part of it that the step has room for.
func (s *sweepStep) remove(t *tables, d dueHub, r *hubRecord) error {
	before := r.entries.count() + r.receipts.count()
	if err := t.trimEntries(r, nothing(), s.items); err != nil {
		return err
	}
	if r.entries.count() == 0 {
		if err := t.trimReceipts(r, nothing(), s.items, func(uint64, storedReceipt) {}); err != nil {
			return err
		}
	}
	s.removed = append(s.removed, d.name)
	left := r.entries.count() + r.receipts.count()
	s.items -= int(before - left)
	if left > 0 {
		s.items = 0
		return t.put(d.name, r)
	}
	if err := t.hubs.Delete([]byte(d.name)); err != nil {
		return err
	}
	return t.expiry.Delete(d.key)
}

// due returns hubs that the sweep has to look at, at most a number of them.
func (t *tables) due(atMost int) ([]dueHub, error) {
	var due []dueHub
	cursor := t.expiry.Cursor()
	for key, value := cursor.First(); key != nil && len(due) < atMost; key, value = cursor.Next() {
		name, err := unseal(key, value)
		if err != nil {
			return nil, err
		}
		if len(key) != 16 || binary.BigEndian.Uint64(key) >= t.now {
			break
		}
		due = append(due, dueHub{append([]byte(nil), key...), string(name)})
	}
	return due, nil
}
