package chatbroadcast

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
)

// TestBounds_OneAddressFillsThem has one address make the server keep as much as it can, one kind of thing after the other.
// What the server keeps is the heap in use after garbage collection: the attackers are another process.
func TestBounds_OneAddressFillsThem(t *testing.T) {
	const (
		perClient = 16 << 10 // a client that talks, with its reader and its buffer
		perHub    = 4 << 10  // one that holds no messages
		inProcess = 64 << 20 // for each kind of thing that is bounded for the process
		noise     = 1 << 20  // by which the heap of an idle Caddy varies
	)
	for _, tc := range []struct {
		name      string
		directive string
		kind      string
		clients   int
		received  int64 // how many bytes the attackers must have sent before memory is looked at
		bound     int64
	}{
		{"clients", "", "crowd", 1000, 0, 1000 * perClient},
		{"hubs", "", "rooms", 1000, 0, 1000 * (perClient + perHub)},
		{"timers", "max_age 1h\nhistory 10\npresence join_leave", "rooms", 1000, 0, 1000 * (perClient + perHub)},
		{"roster", "user {header.X-User}\npresence join_leave", "crowd", 1000, 0, 1000 * (perClient + 2<<10)},
		{"control frames", "", "pings", 10, 10 * 256 << 10, 10 * (perClient + 2<<10)},
		{"answers", "", "deaf", 20, 20 * 140_000, 20 * (perClient + 64<<10)},
		{"messages for clients that do not read", "", "stuck", 400, 400 * 26 * 65_000 / 2, inProcess + 400*perClient},
		{"events for clients that do not read", "", "stuck events", 60, 60 * 26 * 60_000 / 2, inProcess + 60*perClient},
		{"unfinished messages", "", "slow half", 2000, inProcess / 3, inProcess/2 + 2000*perClient}, // the address gets half of it
		{"histories", "history 1000", "publish", 50, 150 << 20, inProcess + 50*perClient},
		{"receipts", "history 10000\nuser {header.X-User}", "receipts", 10, 10 * maxReceipts * 90, inProcess + 10*perClient},
	} {
		t.Run(tc.name, func(t *testing.T) {
			freshRegistry(t) // a larger message or buffer of another test has raised the bounds
			startCaddy(t, fmt.Sprintf("http://localhost:9080 {\nchat_broadcast /chat/* {\nhttp_publish\n%s\n}\n}", tc.directive))
			o := newObservers(t, httpAddr, "/chat/honest", 3, 0)
			before := settledHeap()
			received := value(scrape(t)["bytes_received_total"])
			attack{Server: httpAddr, From: attackerAddr, Room: "/chat/", Kinds: map[string]int{tc.kind: tc.clients}, Pause: time.Second}.start(t)
			eventually(t, "what the attackers send", func() bool {
				o.say()
				return int64(value(scrape(t)["bytes_received_total"])-received) >= tc.received
			})
			grown := settledHeap() - before
			t.Logf("%d clients take %.1f MiB, the bound is %.1f MiB", tc.clients, mib(grown), mib(tc.bound))
			if grown > tc.bound*13/10+noise {
				t.Errorf("got %.1f MiB, want at most %.1f MiB, the bound", mib(grown), mib(tc.bound))
			}
			o.during(0)
		})
	}
}

// TestBounds_UnfinishedPosts is TestBounds_OneAddressFillsThem for requests, which net/http and Caddy keep, too.
func TestBounds_UnfinishedPosts(t *testing.T) {
	const requests, body, perRequest, bound = 2000, 65_000, 32 << 10, 64 << 20
	freshRegistry(t) // a larger message of another test has raised the bound
	startCaddy(t, "http://localhost:9080 {\nchat_broadcast /chat/* {\nhttp_publish\n}\n}")
	o := newObservers(t, httpAddr, "/chat/honest", 3, 0)
	before := settledHeap()
	attack{Server: httpAddr, From: attackerAddr, Room: "/chat/", Kinds: map[string]int{"half posts": requests}, Pause: time.Second}.start(t)
	last := int64(0)
	eventually(t, "the bodies to arrive", func() bool {
		grown := settledHeap() - before
		defer func() { last = grown }()
		return grown > bound/2 && grown < last+last/50
	})
	t.Logf("%d bodies of %d bytes take %.1f MiB, the bound is %.1f MiB", requests, body, mib(last), mib(bound+requests*perRequest))
	if last > (bound+requests*perRequest)*13/10 {
		t.Errorf("got %.1f MiB, want at most %.1f MiB", mib(last), mib(bound+requests*perRequest))
	}
	o.during(0)
}

// TestBounds_BucketsOfManyAddresses takes from the buckets of more addresses than are remembered.
func TestBounds_BucketsOfManyAddresses(t *testing.T) {
	const addresses, bound = 10 * maxBuckets, 3 << 20
	var b buckets
	before := settledHeap()
	for i := range uint32(addresses) {
		addr := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, i)))
		b.take(time.Now(), netip.PrefixFrom(addr, 32), hub.Rate{Messages: 10, Window: time.Hour})
	}
	if grown := settledHeap() - before; grown > bound*13/10 {
		t.Errorf("got %.1f MiB, want at most %.1f MiB", mib(grown), mib(bound))
	}
	runtime.KeepAlive(&b)
}

// settledHeap is heap without what pools keep until the second garbage collection.
func settledHeap() int64 {
	runtime.GC()
	return int64(heap())
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
