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
// (workPart); clients of an address that uses more are read in turn, and its requests answered in turn. An address
// that is alone may use everything, and so may all while the processors are not busy.
type workloads struct {
	active     atomic.Int32 // how many addresses have clients or requests
	began      time.Time    // when the clock of work was 0
	processors processors

	mu        sync.Mutex
	byAddress map[netip.Prefix]*workload
	idle      []*workload // that are still to be paid off, oldest first, and some that are in use again
}

// A workload is what the clients and requests of one address make the server do.
type workload struct {
	all     *workloads
	address netip.Prefix
	users   int  // clients and requests; guarded by all.mu
	idle    bool // is in all.idle; guarded by all.mu
	limiter *rate.Limiter
	turn    chan struct{} // has an element while somebody pays
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

	// requestWork is what a request costs besides what the handler does: the HTTP server's and Caddy's part of it.
	requestWork = time.Millisecond

	// maxWorkPause bounds for how long an address pays for one piece of work.
	maxWorkPause = time.Second

	// turnLook is how often somebody who waits for a turn looks whether it is still worth it.
	turnLook = time.Second
)

// enter returns the workload of an address, until leave.
func (w *workloads) enter(address netip.Prefix) *workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forgetPaidLocked()
	load := w.byAddress[address]
	if load == nil {
		perSecond := workPart * float64(runtime.GOMAXPROCS(0)) * float64(time.Second/time.Microsecond)
		load = &workload{
			all:     w,
			address: address,
			limiter: rate.NewLimiter(rate.Limit(perSecond), int(workBurst/time.Microsecond)),
			turn:    make(chan struct{}, 1),
		}
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
	if load.users > 0 {
		return
	}
	w.active.Add(-1)
	if !load.idle {
		load.idle = true
		w.idle = append(w.idle, load)
	}
	w.forgetPaidLocked()
}

// forgetPaidLocked forgets workloads that say nothing any more: nobody uses them, and their buckets are full. That takes each
// a second or two at most, so that none holds up those behind it for long.
func (w *workloads) forgetPaidLocked() {
	for len(w.idle) > 0 {
		load := w.idle[0]
		if load.users == 0 && load.limiter.Tokens() < float64(load.limiter.Burst()) {
			return // a moment later
		}
		w.idle[0] = nil
		w.idle = w.idle[1:]
		load.idle = false
		if load.users == 0 {
			delete(w.byAddress, load.address)
		}
	}
}

// pay charges work to the address, and returns when its next work may begin. That is at once while the address uses less than
// its part. Else whoever pays waits for a turn, and then for as long as the work takes in that part: so however many clients
// and requests of the address wait, they make the server work no more than one of them would. pay gives up when ended
// returns true, which it looks at from time to time.
func (load *workload) pay(work time.Duration, ended func() bool) {
	if load.all.active.Load() < 2 || !load.all.processors.busy(time.Now()) || load.reserve(work, 0) {
		return
	}
	for look := time.NewTimer(turnLook); ; look.Reset(turnLook) {
		select {
		case load.turn <- struct{}{}:
			look.Stop()
			load.reserve(work, maxWorkPause)
			<-load.turn
			return
		case <-look.C:
			if ended() {
				return
			}
		}
	}
}

// reserve takes work from what the address may do, and waits until it may, if that is within patience. Otherwise it returns
// false, and takes and waits for nothing.
func (load *workload) reserve(work, patience time.Duration) bool {
	for now := time.Now(); work > 0; work -= workBurst {
		r := load.limiter.ReserveN(now, int(min(work, workBurst)/time.Microsecond))
		pause := r.DelayFrom(now)
		if pause > patience {
			r.CancelAt(now)
			return false
		}
		if pause > 0 && work <= workBurst {
			time.Sleep(pause)
		}
	}
	return true
}

// beginWork notes that the client's reader has something to do.
func (c *client) beginWork() {
	if c.load != nil && c.load.all.active.Load() > 1 {
		c.working = time.Since(c.load.all.began)
	}
}

// endWork notes that the reader waits or pauses, or has nothing more to do.
func (c *client) endWork() {
	if c.working != 0 {
		c.worked += time.Since(c.load.all.began) - c.working
		c.working = 0
	}
}

// workDelivered notes that the client's message goes to so many clients.
func (c *client) workDelivered(clients int) {
	if c.load != nil && c.load.all.active.Load() > 1 {
		c.worked += time.Duration(clients) * deliveryWork
	}
}

// payRequest charges a request to its address, and returns when it may be answered: at once, unless the address makes the
// server work more than its part.
func (w *workloads) payRequest(ctx context.Context, address netip.Prefix, work time.Duration) {
	load := w.enter(address)
	defer load.leave()
	load.pay(work, func() bool { return ctx.Err() != nil })
}

// payWork lets a client pause whose address makes the server work more than its part.
func (c *client) payWork() {
	c.endWork()
	if c.worked < workUnit {
		return
	}
	work := c.worked
	c.worked = 0
	if !c.isEnding() {
		c.load.pay(work, c.isEnding)
	}
}

// processors tell whether the process keeps its processors so busy that others wait for one. That is looked at while somebody
// asks, every busyLook; once it was so it counts for busyHold, because it is not so while those pause who made it so.
type processors struct {
	mu    sync.Mutex
	until time.Time     // busy until then
	last  time.Time     // of the last look
	used  time.Duration // by then
	state atomic.Int64  // until, in Unix nanoseconds, for who does not look
}

const (
	// busyPart is the part of the processors from which on they count as busy.
	busyPart = 0.5

	busyLook = 20 * time.Millisecond
	busyHold = 10 * time.Second
)

// busy reports whether the processors are busy.
func (p *processors) busy(now time.Time) bool {
	if !p.mu.TryLock() {
		return now.UnixNano() < p.state.Load()
	}
	defer p.mu.Unlock()
	since := now.Sub(p.last)
	if since >= busyLook || since < 0 {
		used, known := processorTime()
		if !known || since < 10*busyLook && used-p.used > time.Duration(busyPart*float64(since)*float64(runtime.GOMAXPROCS(0))) {
			p.until = now.Add(busyHold)
			p.state.Store(p.until.UnixNano())
		}
		p.last, p.used = now, used
	}
	return now.Before(p.until)
}
