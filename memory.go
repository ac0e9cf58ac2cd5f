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

// limitMemory gives memory back if histories or buffers exceed their bounds. It runs after every message, without a
// lock.
func (r *registry) limitMemory() {
	r.shed()
	r.relieve()
}

// budgetPause is the pause after a search that did not find enough. Then hubs need the rest for clients that do read.
const budgetPause = time.Second

// maxFruitless is how many searches in a row may find nothing, before the next ones also cut clients that do take
// something, but not enough.
const maxFruitless = 100

// minCutPause is the shortest pause between two searches for clients to cut. Each search looks at every hub.
const minCutPause = 10 * time.Millisecond

// compareHolders orders clients that are behind. The last is cut first: stuck clients come after those that go on, and
// among these the client that holds back the most comes last.
func compareHolders(a, b hub.Holder) int {
	switch {
	case a.Stuck == b.Stuck:
		return a.Bytes - b.Bytes
	case a.Stuck:
		return 1
	}
	return -1
}

// shed forgets histories when all of them together take too much. Again and again it takes something from the address
// whose hubs take the most; a hub counts for the address that opened it. First it closes the hubs of that address
// without clients, the longest empty one first. Then its other hubs forget their messages, starting with the hub whose
// last message is the oldest. At last they forget their receipts.
func (r *registry) shed() {
	budget := &r.process.Memory.Histories
	if !budget.Exceeded() {
		return
	}
	r.lock()
	n := 0
	if budget.Exceeded() { // no other search has made room meanwhile
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

// A sheddable is a part of a hub's history that shed can give up.
type sheddable struct {
	hub   *namedHub
	part  int       // shedHub, shedMessages or shedReceipts
	since time.Time // of shedHub: when the hub lost its last client; else when its last message was published
}

// The values of sheddable.part, in the order in which shed gives them up.
const (
	shedHub = iota
	shedMessages
	shedReceipts
)

// compare orders sheddables by how soon shed gives them up.
func (a sheddable) compare(b sheddable) int {
	return cmp.Or(a.part-b.part, a.since.Compare(b.since))
}

// shedLocked gives up histories until the rest is within the budget's goal, or nothing is left to give up. It returns
// how many parts it has given up.
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
		switch s := all[0]; s.part {
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

// largest returns the address with the largest number. There must be at least one.
func largest(numbers map[netip.Prefix]int) (address netip.Prefix) {
	most := math.MinInt
	for a, n := range numbers {
		if n > most {
			address, most = a, n
		}
	}
	return address
}

// relieve starts a search for memory to give back when all hubs together keep too much for clients that are behind. It
// does nothing while a search runs.
func (r *registry) relieve() {
	if r.process.Memory.Buffers.Exceeded() && r.relieving.CompareAndSwap(false, true) {
		go r.cutUntilRelieved() // ends when the hubs keep less; nobody waits for it
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
	r.relieve() // while this search ran, no other could start
}

// hubsInMemory returns the open hubs, and the closed ones that still have unfinished clients.
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

// cutHolders makes hubs forget messages that no client needs. If that is not enough, it cuts clients of the address for
// which hubs keep the most, starting with those that hold back the most. It cuts no client of another address, and
// leaves the rest to the next search, which sees the effect.
//
// It does not cut clients whose sockets have room, nor, while onlyStuck, clients that have taken something since the
// last search. It returns how many clients it has cut, and how many bytes the clients that were cut before are about to
// give back.
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

// warningInterval is the shortest time between two warnings of the same kind.
const warningInterval = time.Minute

// An occasionalWarning counts events and logs them as one warning, once in warningInterval at most.
type occasionalWarning struct {
	mu    sync.Mutex
	count int
	last  time.Time
}

// warn counts n more events. It calls log with the whole count, unless the last call was less than warningInterval ago.
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
