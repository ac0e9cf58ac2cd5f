package fair

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

// A Pool bounds memory that only its holders can give back. An address may have at most as much of it as is left for the
// others: the first gets at most half, the next half of the rest. So some is always left for an address that has none.
// A Pool is safe for concurrent use.
type Pool struct {
	mu    sync.Mutex
	most  int64
	used  int64
	taken map[netip.Prefix]int64
}

// NewPool returns a pool of most bytes.
func NewPool(most int64) *Pool {
	return &Pool{most: most, taken: map[netip.Prefix]int64{}}
}

// Raise makes the pool large enough for four messages of the given size, in bytes. It never makes the pool smaller.
func (p *Pool) Raise(size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most = max(p.most, 4*int64(size))
}

// SetMost changes the size of the pool to most bytes and returns the size before. Addresses keep what they have.
func (p *Pool) SetMost(most int64) (before int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before, p.most = p.most, most
	return before
}

// Used returns how many bytes all addresses have together.
func (p *Pool) Used() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}

// Take takes n bytes for an address and returns true, or takes nothing and returns false if the address may not have so
// many. It never waits.
func (p *Pool) Take(address netip.Prefix, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	used, taken := p.used+int64(n), p.taken[address]+int64(n)
	if taken > p.most-used {
		return false
	}
	p.used, p.taken[address] = used, taken
	return true
}

// Await waits for half to one and a half times poolPatience, and tries every poolPause. Its callers may hold memory
// that others wait for, so none waits for longer. The random part keeps them from giving up all at once.
const (
	poolPatience = 2 * time.Second
	poolPause    = 20 * time.Millisecond
)

// Await takes n bytes for an address as soon as the address may have so many, and returns true. It takes nothing and returns
// false if that takes longer than one to three seconds, or once ended returns true, which it calls every 20 ms.
func (p *Pool) Await(address netip.Prefix, n int, ended func() bool) bool {
	for patience := poolPatience/2 + rand.N(poolPatience); !p.Take(address, n); patience -= poolPause {
		if patience <= 0 || ended() {
			return false
		}
		time.Sleep(poolPause)
	}
	return true
}

// Give gives back n bytes that an address has taken.
func (p *Pool) Give(address netip.Prefix, n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used -= int64(n)
	p.taken[address] -= int64(n)
	if p.taken[address] == 0 {
		delete(p.taken, address)
	}
}
