//go:build unix

package fileengine

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

func addSystemRoles(roles map[string]func(folder string) error) {
	roles["limit"] = publishUntilFull
}

// fileLimit is the size at which the disk of publishUntilFull is full.
const fileLimit = 300_000

// publishUntilFull publishes until the file cannot grow any more, and then until it can again. It prints what was
// acknowledged.
func publishUntilFull(folder string) error {
	signal.Ignore(syscall.SIGXFSZ)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	full := limit
	full.Cur = fileLimit
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		return err
	}
	f, err := openFile(folder)
	if err != nil {
		return err
	}
	m := &monitor{}
	s := start(f, m, time.Now)
	refused := 0
	for n := 0; refused < 3; n++ {
		err := publishNumber(s, n)
		switch {
		case err == nil && refused == 0:
			fmt.Println("published", n)
		case errors.Is(err, engine.ErrUnavailable):
			refused++
		default:
			return fmt.Errorf("message %d: %w", n, err)
		}
		if n > 1000 {
			return errors.New("the file can always grow")
		}
	}
	if states := m.reported(); len(states) != 2 || !errors.Is(states[1], syscall.EFBIG) && !strings.Contains(states[1].Error(), "too large") {
		return fmt.Errorf("the monitor got %v", states)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	for deadline := time.Now().Add(patience); len(m.reported()) < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("the session does not find out that it can write again")
		}
	}
	if err := publishNumber(s, 5000); err != nil {
		return err
	}
	fmt.Println("published", 5000)
	if err := s.Close(); err != nil {
		return err
	}
	fmt.Println("done")
	return nil
}

func publishNumber(s *Session, n int) error {
	m := engine.Message{Data: fmt.Appendf(nil, "%05000d", n)}
	_, err := s.Publish(context.Background(), "hub", engine.Batch{Bounds: testBounds, Messages: []engine.Message{m}})
	return err
}

func TestPublish_WhenTheDiskIsFull(t *testing.T) {
	folder := t.TempDir()
	publisher := startChild(t, "limit", folder)
	var want []string
	for publisher.lines.Scan() {
		line := publisher.lines.Text()
		n := 0
		if _, err := fmt.Sscanf(line, "published %d", &n); err == nil {
			want = append(want, fmt.Sprintf("%05000d", n))
		} else if line != "done" {
			t.Fatalf("the process says %q", line)
		}
	}
	if len(want) < 10 {
		t.Fatalf("only %d messages were published", len(want))
	}
	s := open(t, folder)
	if got := dataOf(look(t, s, "hub")); !slices.Equal(got, want) {
		t.Errorf("the file has %d messages, want the %d that were acknowledged", len(got), len(want))
	}
	checkSums(t, s)
}
