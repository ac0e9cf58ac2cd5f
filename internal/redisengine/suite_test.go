//go:build unix

package redisengine

import (
	"sync"
	"testing"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"github.com/chat-broadcast/caddy-chat-broadcast/engine/enginetest"
)

// TestSession_KeepsThePromisesOfEngines runs the suite over nodes that reach a Redis through a proxy each.
func TestSession_KeepsThePromisesOfEngines(t *testing.T) {
	enginetest.Run(t, func(t testing.TB) enginetest.Harness {
		redis := startRedis(t)
		var mu sync.Mutex
		interrupted := false
		proxies := map[engine.Session]*proxy{}
		interrupt := func(is bool) {
			mu.Lock()
			defer mu.Unlock()
			interrupted = is
			for _, p := range proxies {
				p.setInterrupted(is)
			}
		}
		return enginetest.Harness{
			Persistent: true,
			Connect: func(m engine.Monitor) (engine.Session, error) {
				p := startProxy(t, redis.address())
				options, err := ParseURL(p.url())
				if err != nil {
					return nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				p.setInterrupted(interrupted)
				s := Connect(options, DefaultPrefix, "machine", m)
				proxies[s] = p
				return s, nil
			},
			Kill: func(s engine.Session) {
				mu.Lock()
				proxies[s].interrupt() // the server learns nothing of what follows
				delete(proxies, s)
				mu.Unlock()
				s.Close()
			},
			Interrupt: func() (restore func()) {
				interrupt(true)
				return func() { interrupt(false) }
			},
			Wipe: func() { redis.do("FLUSHALL") },
		}
	})
}
