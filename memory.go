package chatbroadcast

import (
	"cmp"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// The default bounds of what all hubs and clients of the process keep together, in bytes. Go collects garbage late, so the
// process may become larger by twice as much.
const (
	defaultMaxHistory = 64 << 20 // with 100 messages of 200 bytes, some 2000 hubs
	defaultMaxBuffers = 64 << 20 // 64 hubs whose clients have all stopped reading
	maxIncoming       = 64 << 20 // 1000 messages of 64 KiB that are being received
)

// A memory is what the hubs of a process keep, each kind within a bound of its own, so that none pushes another out.
type memory struct {
	histories budget // for clients that join
	buffers   budget // for clients that are behind
	incoming  pool   // messages that are being received
}

func newMemory() *memory {
	m := new(memory)
	m.histories.most.Store(defaultMaxHistory)
	m.buffers.most.Store(defaultMaxBuffers)
	m.incoming.most = maxIncoming
	m.incoming.taken = map[netip.Prefix]int64{}
	return m
}

// A budget bounds memory that can be given back: whoever exceeds it has the registry look for some.
type budget struct {
	used   atomic.Int64
	most   atomic.Int64 // as configured
	raised atomic.Int64 // four times the largest buffer: one hub must not use all of it
	pause  atomic.Int64 // until when a search would find nothing more, in Unix nanoseconds
}

// bound returns the most that may be used, in bytes.
func (b *budget) bound() int64 { return max(b.most.Load(), b.raised.Load()) }

// goal returns how much may be left after a search, in bytes: less than bound, so that the next search is not due at once.
func (b *budget) goal() int64 { return b.bound() / 8 * 7 }

// left returns how much may be used besides what is, in bytes, until nothing more may be: a quarter more than bound. Between the
// two a search takes memory from those who hold the most; only if it comes too late does everybody notice.
func (b *budget) left() int { return int(min(max(b.bound()/4*5-b.used.Load(), 0), math.MaxInt32)) }

// raise makes room for a hub of the given buffer.
func (b *budget) raise(bufferBytes int) {
	want := 4 * int64(bufferBytes)
	for {
		raised := b.raised.Load()
		if raised >= want || b.raised.CompareAndSwap(raised, want) {
			return
		}
	}
}

// exceeded reports whether memory must be given back, and can be.
func (b *budget) exceeded() bool {
	return b.used.Load() > b.bound() && time.Now().UnixNano() > b.pause.Load()
}

// rest keeps exceeded false for d.
func (b *budget) rest(d time.Duration) { b.pause.Store(time.Now().Add(d).UnixNano()) }

// budgetPause is for how long nobody searches after a search that did not find enough: the rest belongs to hubs that are
// busy with clients that do read.
const budgetPause = time.Second

// maxFruitless is after how many searches in vain clients are cut that do take something, but not enough.
const maxFruitless = 100

// minCutPause is how soon the next search for clients to cut follows. Each looks at every hub.
const minCutPause = 10 * time.Millisecond

// chargeLocked tells the budgets what the hub keeps. When all its clients have everything, all of that is history. Else
// history is the messages that have a record, as far as the history's part of the logs goes, and the rest is kept for the
// clients that are behind: a history that is forgotten counts no more, whoever still has to be sent its messages.
func (b *hub) chargeLocked() {
	if b.memory == nil {
		return
	}
	buffered, remembered := b.log.memory(), 0
	if b.events != nil {
		buffered += b.events.memory()
	}
	if b.messages > 0 && !b.closed {
		logs := buffered
		if b.idle < len(b.clients) {
			logs = b.rememberedFramesLocked()
		}
		buffered -= logs
		remembered = logs + len(b.records)*recordSize + b.users + b.receipts.size()
	}
	if d := remembered - b.remembered; d != 0 {
		b.memory.histories.used.Add(int64(d))
		b.remembered = remembered
	}
	if d := buffered - b.buffered; d != 0 {
		b.memory.buffers.used.Add(int64(d))
		b.buffered = buffered
	}
}

// rememberedFramesLocked returns about how many bytes of the logs are history while clients are behind.
func (b *hub) rememberedFramesLocked() int {
	if len(b.records) == 0 {
		return 0
	}
	share := b.historyBytesLocked()
	n := min(b.log.capacity, b.log.bytesFrom(max(b.firstRecord, b.log.tail)), share)
	if b.events != nil {
		n += min(b.events.capacity, share)
	}
	return n
}

// trim gives back what no client and no history needs any more. It returns the clients that hold back the rest.
func (b *hub) trim() (holders []holder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.buffered == 0 {
		return nil
	}
	floor, eventFloor := b.floorLocked(time.Now()), uint64(0)
	if b.events != nil {
		eventFloor = b.events.position(max(floor, b.events.seq(b.events.tail)))
	}
	for _, c := range b.clients[b.idle:] {
		if c.speaksEvents {
			eventFloor = min(eventFloor, c.cursor)
		} else {
			floor = min(floor, c.cursor)
		}
	}
	b.log.trim(floor)
	if b.messages > 0 {
		b.forgetRecordsLocked()
	}
	if b.events != nil {
		b.events.trim(eventFloor)
		b.events.forgetBetween()
	}
	b.chargeLocked()
	for _, c := range b.clients[b.idle:] {
		n := c.log.bytesFrom(c.cursor)
		if c.pinned != nil {
			n += cap(c.pinned.buf)
		}
		if c.turn != turnQueued && n >= minHolding { // else it only waits for its turn, or holds next to nothing
			holders = append(holders, holder{c, n, c.searched == c.cursor+1})
			c.searched = c.cursor + 1
		}
	}
	return holders
}

// A holder is a client that is behind.
type holder struct {
	client *client
	bytes  int  // that the hub keeps for it
	stuck  bool // it has not gone on since the last search
}

// compare orders holders by how late they are cut: first those that go on, then those that hold back the least.
func (h holder) compare(other holder) int {
	switch {
	case h.stuck == other.stuck:
		return h.bytes - other.bytes
	case h.stuck:
		return 1
	}
	return -1
}

// minHolding is how much a client must hold back, in bytes, to be cut for it.
const minHolding = 4 << 10

// shed forgets histories when all of them together take too much. It goes by the address that opened a hub: again and
// again the address whose hubs take the most gives something up. Its hubs without clients close first, the longest empty one
// first. Then its other hubs forget their messages, the one in which nothing was published for the longest time first, and
// at last their receipts.
func (r *registry) shed() {
	budget := &r.memory.histories
	if !budget.exceeded() {
		return
	}
	r.mu.Lock()
	n := 0
	if budget.exceeded() { // nobody else has made room meanwhile
		n = r.shedLocked()
		if budget.used.Load() > budget.goal() {
			budget.rest(budgetPause)
		}
	}
	r.mu.Unlock()
	r.shedWarning.warn(n, func(n int) {
		processLogger().Warn("histories forgotten: all of them together took too much memory",
			zap.Int("hubs", n), zap.Int64("max_bytes", budget.bound()))
	})
}

// A sheddable is something that can be given up of a hub's history.
type sheddable struct {
	hub   *hub
	what  int       // shedHub, shedMessages or shedReceipts
	since time.Time // when the hub lost its last client, or when something was published last
}

// The values of sheddable.what, in the order in which they go.
const (
	shedHub = iota
	shedMessages
	shedReceipts
)

// compare orders what can be given up by how soon it goes.
func (a sheddable) compare(b sheddable) int {
	return cmp.Or(a.what-b.what, a.since.Compare(b.since))
}

// shedLocked gives up histories until they take no more than they may, or nothing is left to give up. It returns of how
// many hubs it has given up something.
func (r *registry) shedLocked() (n int) {
	byOwner := map[netip.Prefix][]sheddable{}
	total := map[netip.Prefix]int{}
	for _, b := range r.hubs {
		bytes, published := b.rememberedSince()
		if bytes == 0 {
			continue
		}
		total[b.owner] += bytes
		if b.keeper != nil {
			byOwner[b.owner] = append(byOwner[b.owner], sheddable{b, shedHub, b.keptSince})
		} else {
			byOwner[b.owner] = append(byOwner[b.owner], sheddable{b, shedMessages, published}, sheddable{b, shedReceipts, published})
		}
	}
	for _, all := range byOwner {
		slices.SortFunc(all, sheddable.compare)
	}
	for budget := &r.memory.histories; budget.used.Load() > budget.goal() && len(total) > 0; {
		owner := largest(total)
		all := byOwner[owner]
		if len(all) == 0 {
			delete(total, owner)
			continue
		}
		byOwner[owner] = all[1:]
		freed := 0
		switch s := all[0]; s.what {
		case shedHub:
			freed, _ = s.hub.rememberedSince()
			r.closeKeptLocked(s.hub)
		case shedMessages:
			freed = s.hub.forget()
		case shedReceipts:
			freed = s.hub.forgetReceipts()
		}
		total[owner] -= freed
		if freed > 0 {
			n++
		}
	}
	return n
}

// largest returns the address with the largest number, of at least one.
func largest(numbers map[netip.Prefix]int) (address netip.Prefix) {
	most := math.MinInt
	for a, n := range numbers {
		if n > most {
			address, most = a, n
		}
	}
	return address
}

// relieve starts a search for memory to give back when all hubs together keep too much for clients that are behind.
func (r *registry) relieve() {
	if r.memory.buffers.exceeded() && r.relieving.CompareAndSwap(false, true) {
		go r.cutUntilRelieved() // ends when there is memory again; nobody waits for it
	}
}

// cutUntilRelieved gives memory back until the hubs keep no more than they may for clients that are behind.
func (r *registry) cutUntilRelieved() {
	for fruitless, pause := 0, minCutPause; r.memory.buffers.exceeded(); {
		cut, ending := r.cutHolders(fruitless < maxFruitless)
		fruitless++
		if cut > 0 || ending > 0 {
			fruitless, pause = 0, minCutPause
		} else if fruitless > maxFruitless {
			pause = min(2*pause, budgetPause)
		}
		r.cutWarning.warn(cut, func(n int) {
			processLogger().Warn("clients cut: all hubs together kept too much for clients that do not read",
				zap.Int("clients", n), zap.Int64("max_bytes", r.memory.buffers.bound()))
		})
		time.Sleep(pause)
	}
	r.relieving.Store(false)
	r.relieve() // whoever exceeded it meanwhile has started no search
}

// hubsInMemory returns the hubs that there are now, and those that have closed and whose clients are not finished.
func (r *registry) hubsInMemory() map[*hub]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make(map[*hub]bool, len(r.hubs))
	for _, b := range r.hubs {
		all[b] = true
	}
	for _, s := range r.scopes {
		for _, c := range s.clients[s.members:] {
			all[c.hub] = true
		}
	}
	return all
}

// cutHolders forgets messages that no client needs. If that is not enough it cuts clients of the address for which hubs keep
// the most, those first that hold back the most: nobody else shall go instead, and the next search sees what has become
// of it. Clients whose sockets have room are not cut, nor, while onlyStuck, those that have taken something since the last
// search. It returns how many it has cut, and how many bytes clients that were cut before are about to give back.
func (r *registry) cutHolders(onlyStuck bool) (cut, ending int) {
	byAddress := map[netip.Prefix][]holder{}
	total := map[netip.Prefix]int{}
	for b := range r.hubsInMemory() {
		for _, h := range b.trim() {
			total[h.client.prefix] += h.bytes
			conn := h.client.connection()
			switch {
			case h.client.isBroken():
				ending += h.bytes
			case conn != nil && !writable(conn) && (h.stuck || !onlyStuck):
				byAddress[h.client.prefix] = append(byAddress[h.client.prefix], h)
			}
		}
	}
	excess := r.memory.buffers.used.Load() - r.memory.buffers.goal() - int64(ending)
	if !onlyStuck {
		for address := range total {
			if len(byAddress[address]) == 0 {
				delete(total, address)
			}
		}
	}
	if excess <= 0 || len(total) == 0 {
		return 0, ending
	}
	worst := byAddress[largest(total)]
	slices.SortFunc(worst, holder.compare)
	for _, h := range slices.Backward(worst) {
		if excess <= 0 {
			break
		}
		h.client.cut(causeLagged)
		excess -= int64(h.bytes)
		cut++
	}
	return cut, ending
}

// warningInterval is how often the log has the same warning, at most.
const warningInterval = time.Minute

// An occasionalWarning counts what it is about and warns of it once an interval at most.
type occasionalWarning struct {
	mu    sync.Mutex
	count int
	last  time.Time
}

// warn counts n more, and calls log with the whole count unless the last call was too recent.
func (w *occasionalWarning) warn(n int, log func(count int)) {
	w.mu.Lock()
	w.count += n
	if w.count == 0 || time.Since(w.last) < warningInterval {
		w.mu.Unlock()
		return
	}
	n, w.count, w.last = w.count, 0, time.Now()
	w.mu.Unlock()
	log(n)
}

// A pool bounds memory that only its holders can give back. An address (IPv6: a /64) may have at most as much of it as is
// left for the others: so one alone gets half, and whatever some hold there is something left for another.
type pool struct {
	mu    sync.Mutex
	most  int64
	used  int64
	taken map[netip.Prefix]int64
}

// raise makes room for messages of the given size: four of them.
func (p *pool) raise(size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most = max(p.most, 4*int64(size))
}

// take takes n bytes for an address, if it may have so much.
func (p *pool) take(address netip.Prefix, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	used, taken := p.used+int64(n), p.taken[address]+int64(n)
	if taken > p.most-used {
		return false
	}
	p.used, p.taken[address] = used, taken
	return true
}

// incomingPatience is for how long about await waits, and incomingPause how soon it looks again. Nobody waits for longer,
// because whoever waits may hold what others wait for. It is spread, so that they do not all give up at once.
const (
	incomingPatience = 2 * time.Second
	incomingPause    = 20 * time.Millisecond
)

// await takes n bytes for an address as soon as it may have so much. It returns false when that takes too long, or when ended
// returns true.
func (p *pool) await(address netip.Prefix, n int, ended func() bool) bool {
	for patience := incomingPatience/2 + rand.N(incomingPatience); !p.take(address, n); patience -= incomingPause {
		if patience <= 0 || ended() {
			return false
		}
		time.Sleep(incomingPause)
	}
	return true
}

// give gives n bytes back.
func (p *pool) give(address netip.Prefix, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used -= int64(n)
	p.taken[address] -= int64(n)
	if p.taken[address] == 0 {
		delete(p.taken, address)
	}
}
