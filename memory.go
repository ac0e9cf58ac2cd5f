package chatbroadcast

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"go.uber.org/zap"
)

// limitMemory gives memory back if histories or buffers exceed their bounds. It runs after every message, without a lock.
func (r *registry) limitMemory() {
	r.shed()
	r.relieve()
}

// budgetPause is for how long nobody searches after a search that did not find enough: the rest belongs to hubs that are
// busy with clients that do read.
const budgetPause = time.Second

// maxFruitless is after how many searches in vain clients are cut that do take something, but not enough.
const maxFruitless = 100

// minCutPause is how soon the next search for clients to cut follows. Each looks at every hub.
const minCutPause = 10 * time.Millisecond

// compareHolders orders clients that are behind by how late they are cut: first those that go on, then those that hold back
// the least.
func compareHolders(a, b hub.Holder) int {
	switch {
	case a.Stuck == b.Stuck:
		return a.Bytes - b.Bytes
	case a.Stuck:
		return 1
	}
	return -1
}

// shed forgets histories when all of them together take too much. It goes by the address that opened a hub: again and
// again the address whose hubs take the most gives something up. Its hubs without clients close first, the longest empty one
// first. Then its other hubs forget their messages, the one in which nothing was published for the longest time first, and
// at last their receipts.
func (r *registry) shed() {
	budget := &r.process.Memory.Histories
	if !budget.Exceeded() {
		return
	}
	r.lock()
	n := 0
	if budget.Exceeded() { // nobody else has made room meanwhile
		n = r.shedLocked()
		if budget.Used() > budget.Goal() {
			budget.Rest(budgetPause)
		}
	}
	r.mu.Unlock()
	r.shedWarning.warn(n, func(n int) {
		processLogger().Warn("histories forgotten: all of them together took too much memory",
			zap.Int("hubs", n), zap.Int64("max_bytes", budget.Bound()))
	})
}

// A sheddable is something that can be given up of a hub's history.
type sheddable struct {
	hub   *namedHub
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
	for _, n := range r.named {
		if !n.isOpen() {
			continue
		}
		bytes, published := n.hub.Remembered()
		if bytes == 0 {
			continue
		}
		total[n.owner] += bytes
		if n.keeper != nil {
			byOwner[n.owner] = append(byOwner[n.owner], sheddable{n, shedHub, n.keptSince})
		} else {
			byOwner[n.owner] = append(byOwner[n.owner], sheddable{n, shedMessages, published}, sheddable{n, shedReceipts, published})
		}
	}
	for _, all := range byOwner {
		slices.SortFunc(all, sheddable.compare)
	}
	for budget := &r.process.Memory.Histories; budget.Used() > budget.Goal() && len(total) > 0; {
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
			freed, _ = s.hub.hub.Remembered()
			r.closeKeptLocked(s.hub)
		case shedMessages:
			freed = s.hub.hub.Forget()
		case shedReceipts:
			freed = s.hub.hub.ForgetReceipts()
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
	if r.process.Memory.Buffers.Exceeded() && r.relieving.CompareAndSwap(false, true) {
		go r.cutUntilRelieved() // ends when there is memory again; nobody waits for it
	}
}

// cutUntilRelieved gives memory back until the hubs keep no more than they may for clients that are behind.
func (r *registry) cutUntilRelieved() {
	for fruitless, pause := 0, minCutPause; r.process.Memory.Buffers.Exceeded(); {
		cut, ending := r.cutHolders(fruitless < maxFruitless)
		fruitless++
		if cut > 0 || ending > 0 {
			fruitless, pause = 0, minCutPause
		} else if fruitless > maxFruitless {
			pause = min(2*pause, budgetPause)
		}
		r.cutWarning.warn(cut, func(n int) {
			processLogger().Warn("clients cut: all hubs together kept too much for clients that do not read",
				zap.Int("clients", n), zap.Int64("max_bytes", r.process.Memory.Buffers.Bound()))
		})
		time.Sleep(pause)
	}
	r.relieving.Store(false)
	r.relieve() // whoever exceeded it meanwhile has started no search
}

// hubsInMemory returns the hubs that there are now, and those that have closed and whose clients are not finished.
func (r *registry) hubsInMemory() map[*hub.Hub]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make(map[*hub.Hub]bool, len(r.named))
	for _, n := range r.named {
		if n.isOpen() {
			all[n.hub] = true
		}
	}
	for _, s := range r.scopes {
		for _, m := range s.members[s.present:] {
			all[m.client.Hub()] = true
		}
	}
	return all
}

// cutHolders forgets messages that no client needs. If that is not enough it cuts clients of the address for which hubs keep
// the most, those first that hold back the most: nobody else shall go instead, and the next search sees what has become
// of it. Clients whose sockets have room are not cut, nor, while onlyStuck, those that have taken something since the last
// search. It returns how many it has cut, and how many bytes clients that were cut before are about to give back.
func (r *registry) cutHolders(onlyStuck bool) (cut, ending int) {
	byAddress := map[netip.Prefix][]hub.Holder{}
	total := map[netip.Prefix]int{}
	for b := range r.hubsInMemory() {
		for _, h := range b.Trim() {
			address := h.Client.Address()
			total[address] += h.Bytes
			switch {
			case h.Client.IsMute():
				ending += h.Bytes
			case (h.Stuck || !onlyStuck) && h.Client.IsConnected() && !h.Client.Writable():
				byAddress[address] = append(byAddress[address], h)
			}
		}
	}
	excess := r.process.Memory.Buffers.Used() - r.process.Memory.Buffers.Goal() - int64(ending)
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
	slices.SortFunc(worst, compareHolders)
	for _, h := range slices.Backward(worst) {
		if excess <= 0 {
			break
		}
		h.Client.Cut(hub.CloseLagged)
		excess -= int64(h.Bytes)
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
