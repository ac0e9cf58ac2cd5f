package fileengine

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// reportSync reports how long the disk takes for 4 KiB, so that other disks can be compared.
func reportSync(b *testing.B) {
	f, err := os.Create(filepath.Join(b.TempDir(), "sync"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4<<10)
	var times []time.Duration
	for range 200 {
		began := time.Now()
		if _, err := f.WriteAt(page, 0); err != nil {
			b.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(began))
	}
	b.ReportMetric(milli(quantile(times, 0.5)), "fsync-p50-ms")
	b.ReportMetric(milli(quantile(times, 0.99)), "fsync-p99-ms")
}

func quantile(times []time.Duration, q float64) time.Duration {
	slices.Sort(times)
	return times[int(q*float64(len(times)-1))]
}

func milli(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// BenchmarkPublish measures senders that wait for the answer to a message before they send the next one.
func BenchmarkPublish(b *testing.B) {
	for _, hubs := range []int{1, 100} {
		for _, keyed := range []bool{false, true} {
			b.Run(fmt.Sprintf("senders=100/hubs=%d/keyed=%v", hubs, keyed), func(b *testing.B) {
				benchmarkPublish(b, 100, hubs, keyed)
			})
		}
	}
}

func benchmarkPublish(b *testing.B, senders, hubs int, keyed bool) {
	s := open(b, b.TempDir())
	data := make([]byte, 128)
	bounds := engine.Bounds{Messages: 1000, Bytes: 1 << 20, Age: time.Hour, Receipts: 4096}
	var mu sync.Mutex
	var times []time.Duration
	var wg sync.WaitGroup
	b.ResetTimer()
	for i := range senders {
		wg.Go(func() {
			var own []time.Duration
			for n := i; n < b.N; n += senders {
				m := engine.Message{Data: data}
				if keyed {
					m.Key = engine.Key{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24), 1}
				}
				began := time.Now()
				if _, err := s.Publish(b.Context(), fmt.Sprintf("hub %d", i%hubs), engine.Batch{Bounds: bounds, Messages: []engine.Message{m}}); err != nil {
					b.Error(err)
					return
				}
				own = append(own, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			times = append(times, own...)
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "messages/s")
	b.ReportMetric(milli(quantile(times, 0.5)), "p50-ms")
	b.ReportMetric(milli(quantile(times, 0.99)), "p99-ms")
	reportSync(b)
}

// BenchmarkPublish_Steady measures messages that come at a rate.
func BenchmarkPublish_Steady(b *testing.B) {
	const rate = 100
	s := open(b, b.TempDir())
	data := make([]byte, 128)
	times := make([]time.Duration, b.N)
	ticks := time.NewTicker(time.Second / rate)
	defer ticks.Stop()
	var wg sync.WaitGroup
	b.ResetTimer()
	for n := range b.N {
		<-ticks.C
		wg.Go(func() {
			began := time.Now()
			if _, err := s.Publish(b.Context(), "hub", engine.Batch{Bounds: testBounds, Messages: []engine.Message{{Data: data}}}); err != nil {
				b.Error(err)
			}
			times[n] = time.Since(began)
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(milli(quantile(times, 0.5)), "p50-ms")
	b.ReportMetric(milli(quantile(times, 0.99)), "p99-ms")
	reportSync(b)
}

// BenchmarkOpen measures how long it takes to open a file with many hubs.
func BenchmarkOpen(b *testing.B) {
	const hubs = 10_000
	folder := b.TempDir()
	s := open(b, folder)
	fill(b, s, hubs, 10, 128)
	closeSession(b, s)
	for b.Loop() {
		s, err := Open(folder, &monitor{})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		closeSession(b, s)
		b.StartTimer()
	}
}

// fill publishes a number of messages in each of many hubs, in batches.
func fill(tb testing.TB, s *Session, hubs, each, size int) {
	tb.Helper()
	var wg sync.WaitGroup
	const workers = 500
	for w := range workers {
		wg.Go(func() {
			for i := w; i < hubs; i += workers {
				batch := engine.Batch{Bounds: testBounds}
				for range each {
					batch.Messages = append(batch.Messages, engine.Message{Data: make([]byte, size)})
				}
				if _, err := s.Publish(tb.Context(), fmt.Sprintf("hub %d", i), batch); err != nil {
					tb.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkMillion measures the file after a million messages.
func BenchmarkMillion(b *testing.B) {
	const hubs, total = 20, 1_000_000
	for b.Loop() {
		folder := b.TempDir()
		s := open(b, folder)
		var wg sync.WaitGroup
		for h := range hubs {
			wg.Go(func() {
				for n := 0; n < total/hubs; {
					batch := engine.Batch{Bounds: testBounds}
					for range 1 + n%7 {
						batch.Messages = append(batch.Messages, engine.Message{Data: make([]byte, 128)})
					}
					n += len(batch.Messages)
					if _, err := s.Publish(b.Context(), fmt.Sprintf("hub %d", h), batch); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		info, err := os.Stat(dbPath(folder))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(info.Size())/(hubs*1000*128), "file/retained")
		closeSession(b, s)
	}
}
