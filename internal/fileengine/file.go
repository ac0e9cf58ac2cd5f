package fileengine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	fileName = "chat_broadcast.db"

	// lockTimeout is how long to wait for the process that has the file, which may be about to exit.
	lockTimeout = time.Second

	// pageSize is that of a new file, whatever the system's is: a message changes a few pages, and a commit writes each
	// of them.
	pageSize = 4 << 10

	// growStep is by how much the file grows at once. bbolt's own step of 16 MiB is more than most chats ever need.
	growStep = 1 << 20
)

var (
	// errInDoubt means that it is unknown whether a transaction is in the file.
	errInDoubt = errors.New("it is unknown whether the file has what was written last")

	// errUnchanged is what a transaction returns that has changed nothing, so that nothing is committed.
	errUnchanged = errors.New("nothing has changed")
)

// A file is an open file of messages. Its methods are for one goroutine at a time.
type file struct {
	path   string
	db     *bbolt.DB
	handle *os.File // that db uses

	// doubtful is the id of the transaction whose meta page may be only in the memory of the system, or 0. See update.
	doubtful int

	// broken is why nothing can be read or written any more, or nil. If bbolt has panicked, its locks may be held for ever.
	broken   error
	panicked bool

	commit func(*bbolt.DB, func(*bbolt.Tx) error) error // (*bbolt.DB).Update, except in tests
}

// openFile opens the file in a folder, and creates both if necessary. It never changes a file that it does not know.
func openFile(folder string) (*file, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("creating the folder for messages: %w; create it, and let the user of this process write there", err)
	}
	f := &file{path: filepath.Join(folder, fileName), commit: (*bbolt.DB).Update}
	if err := f.check(); err != nil {
		return nil, f.explain(err)
	}
	if err := f.open(); err != nil {
		return nil, f.explain(err)
	}
	syncFolder(folder)
	syncFolder(filepath.Dir(folder))
	return f, nil
}

// explain names the file and what to do about an error of opening it.
func (f *file) explain(err error) error {
	var newer *newerFormatError
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("%s is in use by another process: stop that process, or configure another folder", f.path)
	case errors.As(err, &newer):
		return fmt.Errorf("%s %w: install a newer version of the plugin, or configure another folder", f.path, newer)
	case errors.Is(err, errDamaged), errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), errors.Is(err, berrors.ErrVersionMismatch):
		return fmt.Errorf("%s is damaged or not a file of messages (%w): move it away to begin without messages", f.path, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: let the user of this process read and write that file and its folder", err)
	default:
		return fmt.Errorf("opening the file of messages %s: %w", f.path, err)
	}
}

// A newerFormatError is the format of a file that this version does not know.
type newerFormatError struct{ format uint32 }

func (e *newerFormatError) Error() string {
	return fmt.Sprintf("has format %d, and this version knows none above %d", e.format, formatVersion)
}

// check looks at the file without changing it, if there is one. It reads a few pages only. bbolt itself would trust a file
// that has lost its end, and fault when it reads there.
func (f *file) check() error {
	info, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() < 2*pageSize {
		return fmt.Errorf("%w: it has only %d bytes", errDamaged, info.Size())
	}
	return guard(func() error {
		db, err := bbolt.Open(f.path, 0, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
		if err != nil {
			return err
		}
		defer func() { _ = db.Close() }() // it has only been read
		return db.View(func(tx *bbolt.Tx) error {
			if tx.Size() > info.Size() {
				return fmt.Errorf("%w: it has %d bytes and lacks %d", errDamaged, info.Size(), tx.Size()-info.Size())
			}
			return checkBuckets(tx)
		})
	})
}

// checkBuckets checks that the file has the buckets of the format. A file without any bucket is a new one.
func checkBuckets(tx *bbolt.Tx) error {
	meta := tx.Bucket([]byte(metaBucket))
	if meta == nil {
		if name, _ := tx.Cursor().First(); name != nil {
			return fmt.Errorf("%w: it belongs to another program", errDamaged)
		}
		return nil
	}
	format := meta.Get([]byte(formatKey))
	if len(format) != 4 {
		return fmt.Errorf("%w: it has no format", errDamaged)
	}
	if n := binary.BigEndian.Uint32(format); n > formatVersion {
		return &newerFormatError{n}
	}
	for _, name := range dataBuckets() {
		b := tx.Bucket([]byte(name))
		if b == nil {
			return fmt.Errorf("%w: it has no bucket %q", errDamaged, name)
		}
		b.Cursor().First()
		b.Cursor().Last()
	}
	return nil
}

// open opens the file for writing, and makes the buckets of a new one.
func (f *file) open() error {
	err := guard(func() (err error) {
		f.db, err = bbolt.Open(f.path, 0o600, &bbolt.Options{
			Timeout:      lockTimeout,
			PageSize:     pageSize,
			NoStatistics: true,
			OpenFile: func(name string, flag int, mode fs.FileMode) (handle *os.File, err error) {
				handle, err = os.OpenFile(filepath.Clean(name), flag, mode)
				f.handle = handle
				return handle, err
			},
		})
		return err
	})
	if err != nil {
		if f.handle != nil {
			_ = f.handle.Close() // bbolt has closed it, unless it panicked
		}
		return err
	}
	f.db.AllocSize = growStep
	if err := f.update(createBuckets); err != nil && !errors.Is(err, errUnchanged) {
		_ = f.close()
		return err
	}
	return nil
}

func createBuckets(tx *bbolt.Tx) error {
	if tx.Bucket([]byte(metaBucket)) != nil {
		return errUnchanged
	}
	meta, err := tx.CreateBucket([]byte(metaBucket))
	if err != nil {
		return err
	}
	for _, name := range dataBuckets() {
		if _, err := tx.CreateBucket([]byte(name)); err != nil {
			return err
		}
	}
	return meta.Put([]byte(formatKey), binary.BigEndian.AppendUint32(nil, formatVersion))
}

// syncFolder makes sure that what was created in a folder is there after a crash of the system. Not all systems and file
// systems can do that. Nothing has been published yet, and a disk that cannot write anything fails later, too.
func syncFolder(name string) {
	folder, err := os.Open(filepath.Clean(name))
	if err != nil {
		return
	}
	_ = folder.Sync()
	_ = folder.Close()
}

// update runs fn in a transaction and commits it. Without an error the file has it for good. After an error the file
// certainly has nothing of it, unless the error wraps errInDoubt.
//
// bbolt writes and syncs the pages of a transaction, and then writes and syncs a meta page that makes them valid. If the last
// sync fails, the meta page is in the memory of the system, where bbolt reads it from, and maybe on the disk.
// Another transaction would then overwrite pages that the meta page on the disk may need. So there must be no other before
// settle.
//
// A panic of fn changes nothing and breaks nothing.
func (f *file) update(fn func(*bbolt.Tx) error) error {
	id := 0
	err := f.use(func() error {
		return f.commit(f.db, func(tx *bbolt.Tx) error {
			id = tx.ID()
			return guard(func() error { return fn(tx) })
		})
	})
	if err == nil || id == 0 || id != f.newest() {
		return err
	}
	f.doubtful = id
	return f.settle()
}

// settle ends the doubt about a transaction. It writes the meta pages again, because a system that could not write a page
// need not try again by itself. What it returns is what update should have returned.
func (f *file) settle() error {
	if err := f.rewriteMeta(); err != nil {
		return fmt.Errorf("%w: %w", errInDoubt, err)
	}
	id := f.doubtful
	f.doubtful = 0
	if f.newest() != id {
		// What bbolt remembers of the free pages is not what the file says now.
		f.broken = errors.New("the disk has lost what was written last, so the process must restart before it writes again")
	}
	return f.broken
}

// rewriteMeta writes the meta pages as they are, and syncs them.
func (f *file) rewriteMeta() error {
	meta := make([]byte, 2*f.db.Info().PageSize)
	if _, err := f.handle.ReadAt(meta, 0); err != nil {
		return err
	}
	if _, err := f.handle.WriteAt(meta, 0); err != nil {
		return err
	}
	return f.handle.Sync()
}

// newest returns the id of the newest transaction that bbolt sees in the file. It is 0 if bbolt sees nothing, because it
// could not map the file into memory again when it grew, which it does before it writes.
func (f *file) newest() int {
	tx, err := f.begin()
	if err != nil {
		return 0
	}
	defer func() { _ = tx.Rollback() }()
	return tx.ID()
}

// begin begins a transaction that reads what the file has now. It must end soon, because the file grows meanwhile.
func (f *file) begin() (tx *bbolt.Tx, err error) {
	err = f.use(func() (err error) {
		tx, err = f.db.Begin(false)
		return err
	})
	return tx, err
}

// use runs fn, which calls bbolt, unless the file is broken.
func (f *file) use(fn func() error) (err error) {
	if f.broken != nil {
		return f.broken
	}
	f.broken = guard(func() error {
		err = fn()
		return nil
	})
	if f.broken != nil {
		f.panicked = true
		return f.broken
	}
	return err
}

// writing names the file in an error of writing it, if there is one.
func (f *file) writing(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("writing %s: %w", f.path, err)
}

// close closes the file. It waits for transactions that read.
func (f *file) close() error {
	if f.panicked {
		return f.handle.Close()
	}
	return f.db.Close()
}

// guard runs fn, and returns a panic or a fault as an error: that is how bbolt finds out that a page is damaged, or that
// somebody has cut the file off.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return fn()
}
