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
	for _, name := range step.emptied {
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
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, h := range s.hubs {
		if h.damaged == nil && s.now().Sub(h.used) > idleTime && s.receivers[name] == nil {
			delete(s.hubs, name)
		}
	}
}

// A sweepStep is one transaction of a sweep.
type sweepStep struct {
	open    func(name string) bool
	items   int      // that it may still remove
	emptied []string // hubs
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
		if err := s.visit(t, d); err != nil && !errors.Is(err, errDamaged) { // a damaged hub stays, and is due no more
			return err
		}
	}
	return nil
}

// visit removes what a hub has if the hub has outlived its age, and the hub as well unless it is open. It notes when to
// look again at a hub that stays.
func (s *sweepStep) visit(t *tables, d dueHub) error {
	if err := t.expiry.Delete(d.key); err != nil {
		return err
	}
	r, err := t.record(d.name)
	if err != nil || r == nil {
		return err
	}
	if !r.expired(t.now) {
		return s.postpone(t, d.name, r, r.expires())
	}
	if err := s.empty(t, d.name, r); err != nil {
		return err
	}
	switch {
	case r.entries.count()+r.receipts.count() > 0: // and the step has no room for these
		return s.postpone(t, d.name, r, r.due)
	case s.open(d.name):
		return s.postpone(t, d.name, r, saturatingAdd(t.now, max(r.age, uint64(sweepInterval.Milliseconds()))))
	}
	return t.hubs.Delete([]byte(d.name))
}

func (s *sweepStep) postpone(t *tables, name string, r *hubRecord, due uint64) error {
	if err := t.schedule(name, r, due); err != nil {
		return err
	}
	return t.put(name, r)
}

// empty removes the entries and receipts of a hub, or as many of them as the step has room for.
func (s *sweepStep) empty(t *tables, name string, r *hubRecord) error {
	s.emptied = append(s.emptied, name)
	before := r.entries.count()
	if err := t.trimEntries(r, nothing(), s.items); err != nil {
		return err
	}
	s.items -= int(before - r.entries.count())
	before = r.receipts.count()
	if err := t.trimReceipts(r, nothing(), s.items, func(uint64, storedReceipt) {}); err != nil {
		return err
	}
	s.items -= int(before - r.receipts.count())
	return nil
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
