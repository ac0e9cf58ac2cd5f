//go:build unix

package redisengine

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// BenchmarkMemory reports how much memory Redis takes for a hub: "-bench Memory -benchtime 1x".
func BenchmarkMemory(b *testing.B) {
	for _, row := range []struct {
		name                        string
		hubs, messages, size, users int
		ids                         bool
	}{
		{name: "message", hubs: 1000, messages: 1, size: 128},
		{name: "history", hubs: 1000, messages: 100, size: 128},
		{name: "long history", hubs: 1000, messages: 100, size: 1024},
		{name: "history with ids", hubs: 1000, messages: 100, size: 128, ids: true},
		{name: "4096 ids", hubs: 20, messages: 4096, size: 128, ids: true},
		{name: "ten users", hubs: 1000, messages: 1, size: 128, users: 10},
	} {
		b.Run(row.name, func(b *testing.B) {
			redis := startRedis(b)
			n := connect(b, redis.url())
			bounds := engine.Bounds{Messages: 100, Bytes: 1 << 20, Age: time.Hour, Receipts: 4096}
			data := strings.Repeat("x", row.size)
			for b.Loop() {
				before := redis.usedMemory()
				for i := range row.hubs {
					hub := fmt.Sprintf("https://example.com/chat/%06d", i)
					n.openWith(hub, bounds)
					for sent := 0; sent < row.messages; {
						batch := engine.Batch{Bounds: bounds, Number: uint64(sent + 1)}
						for ; len(batch.Messages) < 50 && sent < row.messages; sent++ {
							m := engine.Message{Data: []byte(data)}
							if row.ids {
								m = keyed(data, fmt.Sprintf("%08d%08d", i, sent), engine.First)
							}
							batch.Messages = append(batch.Messages, m)
						}
						n.publishBatch(hub, batch)
					}
					var users []engine.UserCount
					for u := range row.users {
						users = append(users, engine.UserCount{User: fmt.Sprintf("user%06d", u), Clients: 1})
					}
					if users != nil {
						n.announce(hub, users...)
					}
				}
				b.ReportMetric(float64(redis.usedMemory()-before)/float64(row.hubs), "B/hub")
			}
		})
	}
}

// usedMemory returns how many bytes Redis has allocated.
func (r *redisServer) usedMemory() int {
	r.t.Helper()
	_, text, _ := strings.Cut(r.do("INFO", "memory"), "used_memory:")
	text, _, _ = strings.Cut(text, "\r\n")
	used, err := strconv.Atoi(text)
	if err != nil {
		r.t.Fatal(err)
	}
	return used
}
