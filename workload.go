package chatbroadcast

import (
	"context"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// workloads share the processors between addresses, so that one that floods the server does not keep others waiting. What
// the clients and requests of an address make the server do is charged to it, as time. It has a part of all processors
// (workPart); a client of an address that uses more is read more slowly, and a request is refused more slowly. An address
// that is alone may use everything.
type workloads struct {
	active atomic.Int32 // how many addresses have clients or requests

	mu        sync.Mutex
	byAddress map[netip.Prefix]*workload
	idle      []*workload // that are still to be paid off, oldest first, and some that are in use again
}

// A workload is what the clients and requests of one address make the server do.
type workload struct {
	all     *workloads
	address netip.Prefix
	users   int // clients and requests; guarded by all.mu
	limiter *rate.Limiter
}

const (
	// workPart is the part of the processors that one address may keep busy.
	workPart = 0.25

	// workBurst is how much work an address may cause at once.
	workBurst = 50 * time.Millisecond

	// workUnit is how much a reader collects before it charges it: what that costs, too, is little then.
	workUnit = 100 * time.Microsecond

	// deliveryWork is what a message costs for each client that gets it: a wake-up and its part of a write.
	deliveryWork = time.Microsecond

	// requestWork is what a request costs besides what the handler does: the HTTP server's part of it.
	requestWork = 200 * time.Microsecond

	// maxWorkPause bounds a single pause: a client that is closed meanwhile notices it only then.
	maxWorkPause = time.Second
)

// enter returns the workload of an address, until leave.
func (w *workloads) enter(address netip.Prefix) *workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forgetPaidLocked()
	load := w.byAddress[address]
	if load == nil {
		perSecond := workPart * float64(runtime.GOMAXPROCS(0)) * float64(time.Second/time.Microsecond)
		load = &workload{all: w, address: address, limiter: rate.NewLimiter(rate.Limit(perSecond), int(workBurst/time.Microsecond))}
		if w.byAddress == nil {
			w.byAddress = map[netip.Prefix]*workload{}
		}
		w.byAddress[address] = load
	}
	load.users++
	if load.users == 1 {
		w.active.Add(1)
	}
	return load
}

// leave ends what enter began.
func (load *workload) leave() {
	w := load.all
	w.mu.Lock()
	defer w.mu.Unlock()
	load.users--
	if load.users == 0 {
		w.active.Add(-1)
		w.idle = append(w.idle, load)
		w.forgetPaidLocked()
	}
}

// forgetPaidLocked forgets workloads that say nothing any more: nobody uses them, and their buckets are full.
func (w *workloads) forgetPaidLocked() {
	for len(w.idle) > 0 {
		load := w.idle[0]
		if load.users == 0 && load.limiter.Tokens() < float64(load.limiter.Burst()) {
			return // a moment later
		}
		w.idle[0] = nil
		w.idle = w.idle[1:]
		if load.users == 0 && w.byAddress[load.address] == load {
			delete(w.byAddress, load.address)
		}
	}
}

// charge notes that the address has caused so much work, and returns how long whoever did should pause.
func (load *workload) charge(work time.Duration) (pause time.Duration) {
	if load.all.active.Load() < 2 {
		return 0
	}
	now := time.Now()
	for work > 0 {
		part := min(work, workBurst)
		work -= part
		pause = load.limiter.ReserveN(now, int(part/time.Microsecond)).DelayFrom(now)
	}
	return min(pause, maxWorkPause)
}

// beginWork notes that the client's reader has something to do.
func (c *client) beginWork() {
	if c.load != nil && c.load.all.active.Load() > 1 {
		c.working = time.Now()
	}
}

// endWork notes that the reader waits or pauses, or has nothing more to do.
func (c *client) endWork() {
	if !c.working.IsZero() {
		c.worked += time.Since(c.working)
		c.working = time.Time{}
	}
}

// workDelivered notes that the client's message goes to so many clients.
func (c *client) workDelivered(clients int) {
	if c.load != nil && c.load.all.active.Load() > 1 {
		c.worked += time.Duration(clients) * deliveryWork
	}
}

// payRequest charges a request to its address, and returns when the request may be refused: at once, unless the address makes
// the server work more than its part.
func (w *workloads) payRequest(ctx context.Context, address netip.Prefix) {
	load := w.enter(address)
	defer load.leave()
	if pause := load.charge(requestWork); pause > 0 {
		timer := time.NewTimer(pause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
}

// payWork lets a client pause whose address makes the server work more than its part.
func (c *client) payWork() {
	c.endWork()
	if c.worked < workUnit {
		return
	}
	pause := c.load.charge(c.worked)
	c.worked = 0
	if pause > 0 && !c.isEnding() {
		time.Sleep(pause)
	}
}
