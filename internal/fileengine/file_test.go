package fileengine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.etcd.io/bbolt"
)

func TestOpenFile_CreatesFolderAndFileForItsUserOnly(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("permissions are others there")
	}
	folder := filepath.Join(t.TempDir(), "a", "b")
	open(t, folder)
	for path, want := range map[string]os.FileMode{folder: 0o700, dbPath(folder): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has permissions %o, want %o", path, got, want)
		}
	}
}

func TestOpenFile_SyncsWhatItWrites(t *testing.T) {
	f := openTestFile(t, t.TempDir())
	defer f.close()
	if f.db.NoSync || f.db.NoGrowSync || f.db.NoFreelistSync {
		t.Error("bbolt does not sync everything")
	}
}

func TestFile_UpdateSurvivesAPanic(t *testing.T) {
	f := openTestFile(t, t.TempDir())
	defer f.close()
	err := f.update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket([]byte(hubsBucket)).Put([]byte("hub"), []byte("x")); err != nil {
			t.Error(err)
		}
		panic("a page is damaged")
	})
	if !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "a page is damaged") {
		t.Errorf("got error %v, want the panic", err)
	}
	err = f.update(func(tx *bbolt.Tx) error {
		if tx.Bucket([]byte(hubsBucket)).Get([]byte("hub")) != nil {
			t.Error("the file has what the transaction wrote that panicked")
		}
		return nil
	})
	if err != nil {
		t.Errorf("got error %v in the next transaction", err)
	}
}

// mustNotOpen checks that a file cannot be opened, that the error has all of some words, and that the file stays as it is.
func mustNotOpen(t *testing.T, folder string, words ...string) {
	t.Helper()
	before, _ := os.ReadFile(dbPath(folder))
	s, err := Open(folder, &monitor{})
	if err == nil {
		_ = s.Close()
		t.Fatal("the file could be opened")
	}
	for _, word := range append(words, folder) {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("got error %q, want one with %q", err, word)
		}
	}
	if after, _ := os.ReadFile(dbPath(folder)); !bytes.Equal(before, after) {
		t.Error("the file has changed")
	}
}

func TestOpenFile_WhenTheFolderCannotBeCreated(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "file", "folder")
	if err := os.WriteFile(filepath.Dir(folder), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(folder, &monitor{})
	if err == nil || !strings.Contains(err.Error(), filepath.Dir(folder)) || !strings.Contains(err.Error(), "let the user") {
		t.Errorf("got error %v, want one that names the folder and what to do", err)
	}
}

func TestOpenFile_WhenItIsNoFile(t *testing.T) {
	folder := t.TempDir()
	if err := os.MkdirAll(dbPath(folder), 0o700); err != nil {
		t.Fatal(err)
	}
	mustNotOpen(t, folder)
}

func TestOpenFile_WhenItIsInUse(t *testing.T) {
	folder := t.TempDir()
	s := open(t, folder)
	publish(t, s, "hub", "a")
	began := time.Now()
	mustNotOpen(t, folder, "in use by another process", "configure another folder")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the error took %v, want about a second", took)
	}
	publish(t, s, "hub", "b")
}

func TestOpenFile_WhenItIsNotOurs(t *testing.T) {
	write := func(content []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	change := func(fn func(*bbolt.Tx) error) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if err := db.Update(fn); err != nil {
				t.Fatal(err)
			}
		}
	}
	ours := func(then func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			s := open(t, filepath.Dir(path))
			publish(t, s, "hub", "a")
			closeSession(t, s)
			then(t, path)
		}
	}
	setFormat := func(value []byte) func(*bbolt.Tx) error {
		return func(tx *bbolt.Tx) error { return tx.Bucket([]byte(metaBucket)).Put([]byte(formatKey), value) }
	}
	tests := []struct {
		name  string
		make  func(t *testing.T, path string)
		words []string
	}{
		{"text", write([]byte("hello\n")), []string{"damaged", "move it away"}},
		{"long text", write(bytes.Repeat([]byte("hello\n"), 10_000)), []string{"damaged", "move it away"}},
		{"zeros", write(make([]byte, 1<<20)), []string{"damaged", "move it away"}},
		{"another database", change(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("users"))
			return err
		}), []string{"another program", "move it away"}},
		{"newer format", ours(change(setFormat(binary.BigEndian.AppendUint32(nil, formatVersion+1)))), []string{"format 2", "install a newer version"}},
		{"no format", ours(change(setFormat(nil))), []string{"no format", "move it away"}},
		{"no bucket", ours(change(func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(entriesBucket)) })), []string{"entries", "move it away"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			folder := t.TempDir()
			test.make(t, dbPath(folder))
			mustNotOpen(t, folder, test.words...)
		})
	}
}

func TestOpenFile_NewFileOfACrashedProcess(t *testing.T) {
	t.Run("empty", func(t *testing.T) {
		folder := t.TempDir()
		if err := os.WriteFile(dbPath(folder), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		publish(t, open(t, folder), "hub", "a")
	})
	t.Run("without buckets", func(t *testing.T) {
		folder := t.TempDir()
		db, err := bbolt.Open(dbPath(folder), 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		publish(t, open(t, folder), "hub", "a")
	})
}

// writeDB writes the file in a folder.
func writeDB(t *testing.T, folder string, content []byte) {
	t.Helper()
	root, err := os.OpenRoot(folder)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := root.WriteFile(fileName, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A sample is a file with messages, and what they are.
type sample struct {
	content []byte
	hubs    map[string][]string
}

// makeSample makes a file of some hundred pages.
func makeSample(t *testing.T) *sample {
	t.Helper()
	folder := t.TempDir()
	s := open(t, folder)
	made := &sample{hubs: map[string][]string{}}
	for h := range 10 {
		name := fmt.Sprint("hub ", h)
		for b := range 10 {
			batch := engine.Batch{Bounds: testBounds}
			for m := range 20 {
				data := fmt.Sprintf("%s, batch %d, message %d: %s", name, b, m, strings.Repeat("x", 20*m))
				batch.Messages = append(batch.Messages, engine.Message{Data: []byte(data), Key: engine.Key{1, byte(b), byte(m)}})
				made.hubs[name] = append(made.hubs[name], data)
			}
			publishBatch(t, s, name, batch)
		}
	}
	publish(t, s, "other", "x") // so that bbolt's list of free pages need not be at the end of the file
	publish(t, s, "other", "y")
	closeSession(t, s)
	content, err := os.ReadFile(dbPath(folder))
	if err != nil {
		t.Fatal(err)
	}
	made.content = content
	return made
}

// TestOpenFile_Truncated cuts a file off at many pages, the last one included.
func TestOpenFile_Truncated(t *testing.T) {
	sample := makeSample(t)
	folder := t.TempDir()
	writeDB(t, folder, sample.content)
	s := open(t, folder)
	used := 0
	inCommitter(t, s, func() {
		tx, err := s.file.begin()
		if err != nil {
			t.Error(err)
			return
		}
		used = int(tx.Size())
		_ = tx.Rollback()
	})
	closeSession(t, s)
	for size := used - pageSize; size >= pageSize; size -= 7 * pageSize {
		writeDB(t, folder, sample.content[:size])
		mustNotOpen(t, folder, "damaged", "move it away")
	}
}

// TestSession_WithADamagedFile writes random bytes into files. Whatever is there, nobody gets anything that was not
// published, and the process survives.
func TestSession_WithADamagedFile(t *testing.T) {
	sample := makeSample(t)
	refused, intact, unreadable := 0, 0, 0
	for seed := range 60 {
		random := rand.New(rand.NewPCG(uint64(seed), 0))
		content := slices.Clone(sample.content)
		damage(random, content)
		folder := t.TempDir()
		writeDB(t, folder, content)
		f, err := openFile(folder)
		if err != nil {
			if !strings.Contains(err.Error(), dbPath(folder)) {
				t.Errorf("seed %d: the error does not name the file: %v", seed, err)
			}
			refused++
			continue
		}
		s := start(f, &monitor{}, time.Now)
		for name, want := range sample.hubs {
			to := &receiver{}
			snapshot, err := s.Open(t.Context(), name, testBounds, to)
			switch {
			case err != nil:
				unreadable++
			case snapshot.Seq == 0: // the name is damaged, so that it is another hub's
				unreadable++
			case !slices.Equal(dataOf(snapshot), want):
				t.Errorf("seed %d: %s has entries that nobody published", seed, name)
			default:
				intact++
			}
			s.Leave(name, to)
			m := engine.Message{Data: []byte("new"), Key: engine.Key{2}}
			if _, err := s.Publish(t.Context(), name, engine.Batch{Bounds: testBounds, Messages: []engine.Message{m}}); err != nil {
				mustBeUnavailable(t, err)
			}
		}
		_ = s.Close()
	}
	t.Logf("%d files refused; hubs: %d intact, %d unreadable", refused, intact, unreadable)
	if refused == 0 || intact == 0 || unreadable == 0 {
		t.Error("the damage does not vary")
	}
}

// damage overwrites a part of a file with random bytes.
func damage(random *rand.Rand, content []byte) {
	size := 1 << random.IntN(14)
	offset := random.IntN(len(content) - size)
	if random.IntN(2) == 0 {
		offset = random.IntN(8 * pageSize) // where there is the most to be damaged
	}
	for i := range size {
		content[offset+i] = byte(random.Uint32())
	}
}

// TestSession_WhenOneHubIsDamaged checks that the others go on.
func TestSession_WhenOneHubIsDamaged(t *testing.T) {
	folder := t.TempDir()
	f, m := openTestFile(t, folder), &monitor{}
	s := startOn(t, f, m, time.Now)
	publish(t, s, "good", "a")
	publish(t, s, "bad", "a")
	inCommitter(t, s, func() {
		err := f.db.Update(func(tx *bbolt.Tx) error {
			value := slices.Clone(tx.Bucket([]byte(hubsBucket)).Get([]byte("bad")))
			value[0] ^= 1
			return tx.Bucket([]byte(hubsBucket)).Put([]byte("bad"), value)
		})
		if err != nil {
			t.Error(err)
		}
	})
	if _, err := s.Open(t.Context(), "bad", testBounds, &receiver{}); err == nil || !strings.Contains(err.Error(), dbPath(folder)) {
		t.Errorf("got error %v, want one that names the file", err)
	}
	var group []*write
	for _, name := range []string{"good", "bad", "other"} {
		group = append(group, newWrite(name, &engine.Batch{Bounds: testBounds, Messages: messages("b"), Number: 1}))
	}
	inCommitter(t, s, func() { s.commit(group) })
	if err := <-group[0].done; err != nil {
		t.Error(err)
	}
	mustBeUnavailable(t, <-group[1].done)
	if err := <-group[2].done; err != nil {
		t.Error(err)
	}
	_, err := s.Publish(t.Context(), "bad", engine.Batch{Bounds: testBounds, Messages: messages("c")})
	mustBeUnavailable(t, err)
	if got, want := dataOf(look(t, s, "good")), []string{"a", "b"}; !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
	if got := m.warnings(); len(got) != 1 || !strings.Contains(got[0], "bad") {
		t.Errorf("the monitor got warnings %q, want one about the hub", got)
	}
	if got := m.reported(); len(got) != 1 {
		t.Errorf("the monitor got %v, want that the session works", got)
	}
}

// TestSession_WhenTheFileIsCutOff cuts the file off while it is in use.
func TestSession_WhenTheFileIsCutOff(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a file that is mapped cannot be cut off there")
	}
	folder := t.TempDir()
	s := start(openTestFile(t, folder), &monitor{}, time.Now)
	publish(t, s, "hub", "a")
	if err := os.Truncate(dbPath(folder), 0); err != nil {
		t.Fatal(err)
	}
	_, err := s.Publish(t.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: messages("b")})
	mustBeUnavailable(t, err)
	if _, err := s.Open(t.Context(), "hub", testBounds, &receiver{}); err == nil {
		t.Error("the hub could be opened")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
