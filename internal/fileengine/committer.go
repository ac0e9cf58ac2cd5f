package fileengine

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.etcd.io/bbolt"
)

// What one transaction may take, so that nobody waits long for the memory and the disk that it needs.
const (
	maxGroup      = 1024
	maxGroupBytes = 8 << 20
)

const (
	// retryInterval is how often the committer tries whether the file can be written again.
	retryInterval = time.Second

	// probeSize is how much more the committer then writes than it could not write before.
	probeSize = 64 << 10
)

// run is the committer.
func (s *Session) run() {
	defer close(s.done)
	sweep := time.NewTimer(sweepInterval)
	defer sweep.Stop()
	for {
		select {
		case w := <-s.writes:
			s.commit(s.collect(w))
		case call := <-s.calls:
			call()
		case <-sweep.C:
			sweep.Reset(s.sweep())
		case <-s.retry:
			s.probe()
		case <-s.closing:
			return
		}
	}
}

// collect returns the first write of a transaction and all others that wait. Callers that have just been answered get
// the chance to come back first: a transaction without them would make all of them wait for the one after.
func (s *Session) collect(first *write) []*write {
	runtime.Gosched()
	group, bytes := []*write{first}, first.size()
	for len(group) < maxGroup && bytes < maxGroupBytes {
		select {
		case w := <-s.writes:
			group, bytes = append(group, w), bytes+w.size()
		default:
			return group
		}
	}
	return group
}

// commit writes a group to the file in one transaction, passes entries to receivers, and answers the callers.
func (s *Session) commit(group []*write) {
	if s.file.doubtful != 0 && !s.settle() {
		for _, w := range group {
			w.answer(s.file.writing(errInDoubt))
		}
		return
	}
	group, err := s.update(group)
	if len(group) == 0 {
		return
	}
	s.report(err)
	switch {
	case err == nil, errors.Is(err, errUnchanged):
		s.succeed(group)
	case errors.Is(err, errInDoubt):
		s.doubt = group
		for _, w := range group {
			w.answer(s.file.writing(err))
		}
	default:
		s.fail(group, err)
	}
}

// update writes a group to the file in one transaction. It returns those writes that the transaction was for, and has
// answered the others.
func (s *Session) update(group []*write) ([]*write, error) {
	for {
		group = s.admit(group)
		if len(group) == 0 {
			return nil, nil
		}
		damaged, err := s.apply(group)
		if damaged == nil {
			return group, err
		}
		// Without the damaged hub the others need not fail.
		damaged.damaged = fmt.Errorf("%w: what %s has of hub %q cannot be read: %w", engine.ErrUnavailable, s.file.path, damaged.name, err)
		s.monitor.Warn(fmt.Sprintf("%s is damaged: what it has of hub %q cannot be read (%v), so nothing is published there", s.file.path, damaged.name, err))
		for _, w := range group {
			w.rollback()
		}
	}
}

// admit answers the writes that need no transaction, and returns the others.
func (s *Session) admit(group []*write) []*write {
	var admitted []*write
	for _, w := range group {
		w.hub = s.hub(w.name)
		if answered, err := w.admit(); answered {
			w.answer(err)
			continue
		}
		admitted = append(admitted, w)
	}
	return admitted
}

// apply writes a group to the file in one transaction. It returns the hub whose part of the file cannot be read, if that
// is the reason of the error.
func (s *Session) apply(group []*write) (damaged *hub, err error) {
	s.attempted = 0
	err = s.file.update(func(tx *bbolt.Tx) error {
		t := tablesOf(tx, s.now())
		changed := false
		for _, w := range group {
			s.attempted += w.size()
			damaged = w.hub
			if err := w.apply(t); err != nil {
				return err
			}
			changed = changed || w.changed
		}
		damaged = nil
		if !changed {
			return errUnchanged
		}
		return nil
	})
	return damaged, err
}

// succeed ends the writes of a transaction that the file has.
func (s *Session) succeed(group []*write) {
	for _, w := range group {
		w.commit()
		if to := s.receiver(w.name); to != nil && len(w.entries) > 0 {
			to.Entries(w.epoch, w.first, w.entries)
		}
		w.answer(nil)
	}
}

// fail ends the writes of a transaction that the file does not have.
func (s *Session) fail(group []*write, err error) {
	for _, w := range group {
		w.rollback()
		w.answer(fmt.Errorf("%w: %w", engine.ErrUnavailable, s.file.writing(err)))
	}
}

// settle tries to find out whether the file has the last transaction, and ends its writes if so.
func (s *Session) settle() bool {
	err := s.file.settle()
	s.report(err)
	if errors.Is(err, errInDoubt) {
		return false
	}
	group := s.doubt
	s.doubt = nil
	if err == nil {
		s.succeed(group)
	} else {
		s.fail(group, err)
	}
	return true
}

// report tells the monitor when transactions begin to fail, and when they succeed again.
func (s *Session) report(err error) {
	if errors.Is(err, errUnchanged) {
		return
	}
	if failing := err != nil; failing != s.failing {
		s.failing = failing
		s.monitor.State(s.file.writing(err))
	}
	s.retry = nil
	if s.failing {
		s.retry = time.After(retryInterval)
	}
}

// probe finds out whether the file can be written again, because nobody may publish while the engine is down. It writes
// more than the transaction that failed: when the disk is full, what the file has already may still have room for less.
func (s *Session) probe() {
	if s.file.doubtful != 0 {
		s.settle()
		return
	}
	err := s.file.update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(metaBucket)).Put([]byte(probeKey), make([]byte, s.attempted+probeSize))
	})
	if err == nil {
		err = s.file.update(func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte(metaBucket)).Delete([]byte(probeKey))
		})
	}
	s.report(err)
}
