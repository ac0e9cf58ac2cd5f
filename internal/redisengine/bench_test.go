//go:build unix

package redisengine

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// BenchmarkPublish publishes in 100 hubs, which 3 sessions have open. Each session has one batch in flight in each hub.
// An operation is a message of 100 bytes, which arrives three times before the clock stops.
func BenchmarkPublish(b *testing.B) {
	for _, size := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) { benchmarkPublish(b, size) })
	}
}

func benchmarkPublish(b *testing.B, size int) {
	const sessions, hubs = 3, 100
	redis := startRedis(b)
	var arrived counter
	var nodes []*node
	for range sessions {
		n := connect(b, redis.url())
		for hub := range hubs {
			if _, err := n.Open(b.Context(), fmt.Sprint("hub ", hub), bounds, &arrived); err != nil {
				b.Fatal(err)
			}
		}
		nodes = append(nodes, n)
	}
	batch := engine.Batch{Bounds: engine.Bounds{Messages: 100, Bytes: 1 << 20, Age: time.Hour}}
	for range size {
		batch.Messages = append(batch.Messages, engine.Message{Data: []byte(strings.Repeat("x", 100))})
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	cpu := redis.cpu()
	b.ResetTimer()
	var wg sync.WaitGroup
	published := atomic.Int64{}
	for _, n := range nodes {
		for hub := range hubs {
			name := fmt.Sprint("hub ", hub)
			wg.Go(func() {
				batch := batch
				for left.Add(-int64(size)) > -int64(size) {
					batch.Number++
					if _, err := n.Publish(b.Context(), name, batch); err != nil {
						b.Error(err)
						return
					}
					published.Add(int64(size))
				}
			})
		}
	}
	wg.Wait()
	poll(b, func() error {
		if got, want := arrived.Load(), sessions*published.Load(); got != want {
			return fmt.Errorf("%d entries arrived, want %d", got, want)
		}
		return nil
	})
	b.StopTimer()
	b.ReportMetric(float64(published.Load())/b.Elapsed().Seconds(), "messages/s")
	b.ReportMetric(float64((redis.cpu()-cpu).Microseconds())/float64(published.Load()), "redis-µs/message")
}

// A counter counts the entries that it gets.
type counter struct{ atomic.Int64 }

func (c *counter) Entries(_ string, _ uint64, entries []engine.Entry) { c.Add(int64(len(entries))) }

func (*counter) Users(uint64, engine.NodeID, []engine.UserCount) {}

// BenchmarkLatency publishes one message at a time. It reports how long Publish takes, and how long a message takes to
// another session.
func BenchmarkLatency(b *testing.B) {
	redis := startRedis(b)
	one, two := connect(b, redis.url()), connect(b, redis.url())
	arrived := make(arrivals, 1)
	if _, err := two.Open(b.Context(), "hub", bounds, arrived); err != nil {
		b.Fatal(err)
	}
	batch := engine.Batch{Bounds: bounds, Messages: messages(strings.Repeat("x", 100))}
	var calls, deliveries []time.Duration
	for b.Loop() {
		batch.Number++
		began := time.Now()
		if _, err := one.Publish(b.Context(), "hub", batch); err != nil {
			b.Fatal(err)
		}
		calls = append(calls, time.Since(began))
		deliveries = append(deliveries, (<-arrived).Sub(began))
		time.Sleep(time.Millisecond)
	}
	slices.Sort(calls)
	slices.Sort(deliveries)
	b.ReportMetric(float64(calls[len(calls)/2].Microseconds()), "p50-publish-µs")
	b.ReportMetric(float64(calls[len(calls)*99/100].Microseconds()), "p99-publish-µs")
	b.ReportMetric(float64(deliveries[len(deliveries)/2].Microseconds()), "p50-delivery-µs")
}

// arrivals gets the time of each arrival.
type arrivals chan time.Time

func (a arrivals) Entries(string, uint64, []engine.Entry) { a <- time.Now() }

func (arrivals) Users(uint64, engine.NodeID, []engine.UserCount) {}

// BenchmarkRenew renews a node with many open hubs.
func BenchmarkRenew(b *testing.B) {
	const hubs = 5000
	redis := startRedis(b)
	n := connect(b, redis.url())
	var known []engine.Known
	for hub := range hubs {
		known = append(known, n.open(fmt.Sprint("hub ", hub)).known(fmt.Sprint("hub ", hub)))
	}
	cpu := redis.cpu()
	for b.Loop() {
		n.renew(known...)
	}
	b.ReportMetric(float64((redis.cpu()-cpu).Microseconds())/float64(b.N)/hubs, "redis-µs/hub")
}

// BenchmarkOpen opens a hub with 100 entries, and leaves it.
func BenchmarkOpen(b *testing.B) {
	redis := startRedis(b)
	n := connect(b, redis.url())
	for range 100 {
		n.publish("hub", strings.Repeat("x", 100))
	}
	cpu := redis.cpu()
	for b.Loop() {
		r := n.open("hub")
		n.Leave("hub", r)
	}
	b.ReportMetric(float64((redis.cpu()-cpu).Microseconds())/float64(b.N), "redis-µs/op")
}
