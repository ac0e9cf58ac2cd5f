package fair

import (
	"context"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Processors share the processors between addresses, so that an address that floods the server does not keep the others
// waiting. They charge an address, as time, the work that its clients and requests cause. An address may use workPart of
// all processors. If it uses more, the server reads its clients one after the other and answers its requests one after the
// other. An address that is alone may use everything, and so may all while the processors are not busy. Processors are
// safe for concurrent use.
type Processors struct {
	// Used returns how much processor time the process has used; while known is false the processors count as busy.
	// NewProcessors sets it to ProcessorTime. It must not change once an address has entered.
	Used func() (used time.Duration, known bool)

	active atomic.Int32 // how many addresses have clients or requests
	began  time.Time

	// Whether the processors are busy; all times are of Now.
	busyUntil atomic.Int64 // in nanoseconds
	looking   sync.Mutex
	looked    time.Duration // guarded by looking: when somebody looked last
	usedThen  time.Duration // guarded by looking: the processor time that the process had used by then

	mu        sync.Mutex
	byAddress map[netip.Prefix]*Load
	idle      []*Load // loads that are still to be paid off, oldest first, and some that are in use again
}

// A Load is the work that the clients and requests of one address cause.
type Load struct {
	all     *Processors
	address netip.Prefix
	users   int  // clients and requests; guarded by all.mu
	idle    bool // is in all.idle; guarded by all.mu
	limiter *rate.Limiter
	turn    chan struct{} // has an element while somebody pays
}

// The cost of work that measured time would not show.
const (
	// RequestWork is the work of a request besides its handler: the work of the HTTP server and of Caddy.
	RequestWork = time.Millisecond

	// DeliveryWork is the work of a message for each client that gets it: a wake-up and a part of a write.
	DeliveryWork = time.Microsecond

	// WorkUnit is how much work a Meter collects before it charges the address. Charging costs little beside so much
	// work.
	WorkUnit = 100 * time.Microsecond
)

const (
	// workPart is the part of the processors that one address may keep busy.
	workPart = 0.25

	// workBurst is how much work an address may cause at once.
	workBurst = 50 * time.Millisecond

	// maxWorkPause bounds for how long an address pays for one piece of work.
	maxWorkPause = time.Second

	// turnLook is how often Pay calls ended while it waits for its turn.
	turnLook = time.Second

	// busyPart is the part of the processors from which on they count as busy. Processors measure it every busyLook,
	// while somebody asks. Busy processors count as busy for busyHold, because they are idle while the addresses pause
	// that made them busy. Two measurements more than busyGap apart say nothing about the time between them.
	busyPart = 0.5
	busyLook = 20 * time.Millisecond
	busyGap  = 10 * busyLook
	busyHold = 10 * time.Second
)

// NewProcessors returns the processors of this process, which no address uses yet.
func NewProcessors() *Processors {
	return &Processors{Used: ProcessorTime, began: time.Now(), looked: -busyGap, byAddress: map[netip.Prefix]*Load{}}
}

// Shared reports whether more than one address has clients or requests. While it does not, no work needs to be measured.
func (p *Processors) Shared() bool { return p.active.Load() > 1 }

// Now returns the time since NewProcessors. It is never 0, so that 0 can stand for no time.
func (p *Processors) Now() time.Duration { return time.Since(p.began) + 1 }

// Enter counts a client or request of an address and returns the load of the address. The caller must call Leave on it.
func (p *Processors) Enter(address netip.Prefix) *Load {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forgetPaidLocked()
	l := p.byAddress[address]
	if l == nil {
		perSecond := workPart * float64(runtime.GOMAXPROCS(0)) * float64(time.Second/time.Microsecond)
		l = &Load{
			all:     p,
			address: address,
			limiter: rate.NewLimiter(rate.Limit(perSecond), int(workBurst/time.Microsecond)),
			turn:    make(chan struct{}, 1),
		}
		p.byAddress[address] = l
	}
	l.users++
	if l.users == 1 {
		p.active.Add(1)
	}
	return l
}

// Leave ends what Enter began. It does not wait, and work that the address has not paid for stays charged to it.
func (l *Load) Leave() {
	p := l.all
	p.mu.Lock()
	defer p.mu.Unlock()
	l.users--
	if l.users > 0 {
		return
	}
	p.active.Add(-1)
	if !l.idle {
		l.idle = true
		p.idle = append(p.idle, l)
	}
	p.forgetPaidLocked()
}

// forgetPaidLocked forgets loads that say nothing any more: nobody uses them, and their buckets are full. A bucket is full
// after a second or two at most, so no load holds up those behind it for long.
func (p *Processors) forgetPaidLocked() {
	for len(p.idle) > 0 {
		l := p.idle[0]
		if l.users == 0 && l.limiter.Tokens() < float64(l.limiter.Burst()) {
			return // a later call forgets it
		}
		p.idle[0] = nil
		p.idle = p.idle[1:]
		l.idle = false
		if l.users == 0 {
			delete(p.byAddress, l.address)
		}
	}
}

// PayRequest charges work to an address and returns when its request may be answered: at once, unless the address causes
// more work than its part (Load.Pay). It returns within two seconds after ctx ends.
func (p *Processors) PayRequest(ctx context.Context, address netip.Prefix, work time.Duration) {
	l := p.Enter(address)
	defer l.Leave()
	l.Pay(work, func() bool { return ctx.Err() != nil })
}

// Pay charges work to the address and returns when its next work may begin. That is at once while the address is alone,
// while the processors are not busy, or while the address uses less than its part. Otherwise Pay waits for its turn and
// then for as long as the work takes in that part, a second at most. So the clients and requests of an address together
// cause no more work than one of them would, however many wait. While Pay waits for its turn it calls ended every second,
// and gives up once that returns true.
func (l *Load) Pay(work time.Duration, ended func() bool) {
	if !l.all.Shared() || !l.all.busy() || l.reserve(work, 0) {
		return
	}
	for look := time.NewTimer(turnLook); ; look.Reset(turnLook) {
		select {
		case l.turn <- struct{}{}:
			look.Stop()
			l.reserve(work, maxWorkPause)
			<-l.turn
			return
		case <-look.C:
			if ended() {
				return
			}
		}
	}
}

// reserve takes work from the bucket of the address, waits until the bucket is no longer in debt, and returns true. If that
// would take longer than patience, it returns false at once. Work beyond workBurst is taken piece by piece, so a part of it
// may then be taken.
func (l *Load) reserve(work, patience time.Duration) bool {
	for now := time.Now(); work > 0; work -= workBurst {
		r := l.limiter.ReserveN(now, int(min(work, workBurst)/time.Microsecond))
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

// busy reports whether the process keeps its processors so busy that others wait for one.
func (p *Processors) busy() bool {
	now := p.Now()
	if p.looking.TryLock() {
		p.lookLocked(now)
		p.looking.Unlock()
	}
	return int64(now) < p.busyUntil.Load()
}

// lookLocked finds out whether the processors are busy, unless it did so less than busyLook ago. It needs looking.
func (p *Processors) lookLocked(now time.Duration) {
	since := now - p.looked
	if since < busyLook {
		return
	}
	used, known := p.Used()
	busy := time.Duration(busyPart * float64(since) * float64(runtime.GOMAXPROCS(0)))
	if !known || since < busyGap && used-p.usedThen > busy {
		p.busyUntil.Store(int64(now + busyHold))
	}
	p.looked, p.usedThen = now, used
}
