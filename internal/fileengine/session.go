// Package fileengine is an engine for one process whose hubs survive a restart. It keeps messages in a bbolt database, and
// a message is published when it is on the disk.
//
// Nobody must replace the file by an older copy: numbers that clients know would then name other messages.
package fileengine

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.etcd.io/bbolt"
)

// A Session is an engine.Session whose messages are in a file. One goroutine, the committer, does all the work that changes
// the file. It does the work of many callers in one transaction, because the disk needs about as long for all of
// them as for one. Meanwhile others wait for the next transaction.
type Session struct {
	// Set once.
	monitor engine.Monitor
	now     func() time.Time // the clock of messages and their age
	end     func() error     // close, once
	writes  chan *write
	calls   chan func()
	closing chan struct{}
	done    chan struct{} // the committer has ended

	// Guarded by mu.
	mu        sync.Mutex
	receivers map[string]engine.Receiver // of the open hubs

	// Owned by the committer.
	file      *file
	hubs      map[string]*hub // that are open, or that somebody used lately
	doubt     []*write        // in the last transaction, if it is unknown whether the file has it
	failing   bool            // the last transaction failed
	retry     <-chan time.Time
	attempted int // bytes in the last transaction
}

// maxNameSize is the size of the longest name of a hub.
const maxNameSize = 255

// errClosed is the error of calls after Close.
var errClosed = fmt.Errorf("%w: the session has ended", engine.ErrUnavailable)

// Open starts a session on the file chat_broadcast.db in a folder, and creates both if necessary. It returns an error that
// says what to do if it cannot write there, if another process uses the file, or if it does not know what is in the
// file; such a file stays as it is.
func Open(folder string, monitor engine.Monitor) (*Session, error) {
	f, err := openFile(folder)
	if err != nil {
		return nil, err
	}
	return start(f, monitor, time.Now), nil
}

// start starts a session on an open file.
func start(f *file, monitor engine.Monitor, now func() time.Time) *Session {
	s := &Session{
		monitor:   monitor,
		now:       now,
		writes:    make(chan *write),
		calls:     make(chan func()),
		closing:   make(chan struct{}),
		done:      make(chan struct{}),
		receivers: map[string]engine.Receiver{},
		file:      f,
		hubs:      map[string]*hub{},
	}
	s.end = sync.OnceValue(s.close)
	monitor.State(nil)
	go s.run() // ends when closing is closed; close waits for it
	return s
}

// Open implements engine.Session. If it returns an error the hub is not open. The hub's epoch is kept with its first
// message: a hub without messages begins another epoch when it is opened again.
func (s *Session) Open(ctx context.Context, name string, bounds engine.Bounds, to engine.Receiver) (engine.Snapshot, error) {
	if err := checkName(name); err != nil {
		return engine.Snapshot{}, err
	}
	var o opening
	var err error
	called := s.call(ctx, func() { o, err = s.beginOpening(name, to) })
	if called != nil {
		return engine.Snapshot{}, called
	}
	if err != nil {
		return engine.Snapshot{}, err
	}
	snapshot, err := o.read(name, bounds, s.now())
	if err != nil {
		s.Leave(name, to)
		return engine.Snapshot{}, fmt.Errorf("reading hub %q from %s: %w", name, s.file.path, err)
	}
	return snapshot, nil
}

// An opening is a hub that is being opened: the file as it was when the receiver began to get what is new.
type opening struct {
	tx    *bbolt.Tx
	epoch string // that the hub has if it is not in the file
}

// beginOpening gives the receiver everything that is committed from now on. It runs in the committer. Between
// transactions bbolt reads only what is on the disk: a snapshot must not have messages that a crash can undo.
func (s *Session) beginOpening(name string, to engine.Receiver) (opening, error) {
	if s.file.doubtful != 0 {
		return opening{}, fmt.Errorf("%w: %w", engine.ErrUnavailable, errInDoubt)
	}
	tx, err := s.file.begin()
	if err != nil {
		return opening{}, fmt.Errorf("%w: reading %s: %w", engine.ErrUnavailable, s.file.path, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.receivers[name] = to
	return opening{tx, s.hub(name).epoch}, nil
}

// read returns the snapshot of the hub.
func (o opening) read(name string, bounds engine.Bounds, now time.Time) (engine.Snapshot, error) {
	defer func() { _ = o.tx.Rollback() }() // it has only read
	snapshot := engine.Snapshot{Position: engine.Position{Epoch: o.epoch}}
	err := guard(func() error {
		t := tablesOf(o.tx, now)
		r, err := t.record(name)
		if err != nil || r == nil {
			return err
		}
		snapshot.Position = engine.Position{Epoch: r.epoch, Seq: r.entries.head}
		snapshot.Entries, err = t.newest(r, entryLimits(&bounds, t.now).keep)
		return err
	})
	snapshot.Base = snapshot.Seq - uint64(len(snapshot.Entries))
	return snapshot, err
}

// Leave implements engine.Session.
func (s *Session) Leave(name string, from engine.Receiver) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.receivers[name] == from {
		delete(s.receivers, name)
	}
}

// receiver returns the receiver of a hub, or nil if the hub is not open.
func (s *Session) receiver(name string) engine.Receiver {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.receivers[name]
}

// Publish implements engine.Session. The messages are on the disk when it returns without an error.
func (s *Session) Publish(ctx context.Context, name string, batch engine.Batch) ([]engine.Receipt, error) {
	return s.write(ctx, &write{name: name, batch: &batch})
}

// Forget implements engine.Session. The numbers of the new epoch begin with 1.
func (s *Session) Forget(ctx context.Context, name string) error {
	_, err := s.write(ctx, &write{name: name})
	return err
}

// write hands a write to the committer and waits for it. Nothing queues between the two: until the committer takes the
// write, it is the caller's alone.
func (s *Session) write(ctx context.Context, w *write) ([]engine.Receipt, error) {
	if err := checkName(w.name); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", engine.ErrUnavailable, context.Cause(ctx))
	}
	w.done = make(chan error, 1)
	select {
	case s.writes <- w:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: the disk is too slow: %w", engine.ErrUnavailable, context.Cause(ctx))
	case <-s.closing:
		return nil, errClosed
	}
	select {
	case err := <-w.done:
		if err != nil {
			return nil, err
		}
		return w.receipts, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("the disk is too slow, and may or may not have what was to be written: %w", context.Cause(ctx))
	}
}

// call runs fn in the committer.
func (s *Session) call(ctx context.Context, fn func()) error {
	done := make(chan struct{})
	select {
	case s.calls <- func() { fn(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: the disk is too slow: %w", engine.ErrUnavailable, context.Cause(ctx))
	case <-s.closing:
		return errClosed
	}
}

// Close implements engine.Session. It waits for the disk.
func (s *Session) Close() error { return s.end() }

func (s *Session) close() error {
	close(s.closing)
	<-s.done
	return s.file.close()
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameSize {
		return fmt.Errorf("%w: the name of the hub %.20q has %d bytes; a name has 1 to %d", engine.ErrUnavailable, name, len(name), maxNameSize)
	}
	return nil
}

// Interface guards
var _ engine.Session = (*Session)(nil)
