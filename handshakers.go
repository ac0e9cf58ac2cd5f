package chatbroadcast

import (
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// handshakerPatience is how long an idle handshaker waits for the next handshake. A burst of them has no pause of that length.
const handshakerPatience = 100 * time.Millisecond

// handshakers are goroutines that make handshakes, one after the other, for the goroutines of requests. A request's goroutine has
// 6 KiB of stack in use when it reaches the handler, and net/http needs 3 KiB more to write a header. All of it would be copied to
// a larger stack for each handshake. A handshaker has grown its stack once. docs/decisions/handshake.md has the figures.
type handshakers struct {
	tasks   chan *handshakeTask // without a buffer: only an idle handshaker takes a task
	running atomic.Int64
}

// A handshakeTask is one handshake.
type handshakeTask struct {
	handshake func() error
	done      chan struct{} // closed when the following are set
	err       error
	panicked  error // what the handshake has panicked with, or nil
}

func newHandshakers() handshakers { return handshakers{tasks: make(chan *handshakeTask)} }

// run returns what handshake returns, and panics if handshake does. If there are as many handshakers as processors, and none is
// idle, the caller makes the handshake itself: some may wait for a hub that opens.
func (hs *handshakers) run(handshake func() error) error {
	task := &handshakeTask{handshake: handshake, done: make(chan struct{})}
	select {
	case hs.tasks <- task:
	default:
		if hs.running.Add(1) > int64(runtime.GOMAXPROCS(0)) {
			hs.running.Add(-1)
			return handshake()
		}
		go hs.work(task)
	}
	<-task.done
	if task.panicked != nil {
		panic(task.panicked)
	}
	return task.err
}

// work is a handshaker. It begins with task, and ends when it is idle for handshakerPatience.
func (hs *handshakers) work(task *handshakeTask) {
	defer hs.running.Add(-1)
	patience := time.NewTimer(handshakerPatience)
	defer patience.Stop()
	for {
		task.make()
		patience.Reset(handshakerPatience)
		select {
		case task = <-hs.tasks:
		case <-patience.C:
			return
		}
	}
}

// make makes the handshake, and keeps a panic for the request's goroutine, above which net/http recovers it.
func (t *handshakeTask) make() {
	defer close(t.done)
	defer func() {
		v := recover()
		if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) { // which net/http does not log
			t.panicked = http.ErrAbortHandler
		} else if v != nil {
			t.panicked = fmt.Errorf("%v\n\n%s", v, debug.Stack())
		}
	}()
	t.err = t.handshake()
}
