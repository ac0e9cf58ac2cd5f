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
		proxies := map[engine.Session]*proxy{}
		all := func(f func(*proxy)) {
			mu.Lock()
			defer mu.Unlock()
			for _, p := range proxies {
				f(p)
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
				s := Connect(options, DefaultPrefix, "machine", m)
				mu.Lock()
				defer mu.Unlock()
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
				all((*proxy).interrupt)
				return func() { all((*proxy).restore) }
			},
			Wipe: func() { redis.do("FLUSHALL") },
		}
	})
}
