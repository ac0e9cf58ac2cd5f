package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"time"
)

// An idleResult is the cost of idle clients.
type idleResult struct {
	URL       string  `json:"url"`
	Clients   int     `json:"clients"`
	Hubs      int     `json:"hubs"`
	Before    int64   `json:"rss_before"` // bytes, without clients
	PerClient float64 `json:"kib_per_client"`
	PerHub    float64 `json:"kib_per_hub"` // the cost of a hub beyond its client, with -hubs
	Faults    faults  `json:"faults"`
}

// idleCommand connects clients to one hub and measures. Then it connects one client to each further hub and measures
// again.
func idleCommand(name string, args []string) error {
	o := options{hubs: 1, senders: 1, size: idSize, window: 1, progress: os.Stderr}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	targetFlags(f, &o)
	f.IntVar(&o.clients, "clients", 10000, "clients in the first hub")
	hubs := f.Int("hubs", 0, "further hubs with one client each")
	settle := f.Duration("settle", 5*time.Second, "how long to wait before reading the memory")
	if err := parse(f, args, &o); err != nil {
		return err
	}
	o.hubs = 1 + *hubs
	if err := raiseFileLimit(o.clients + *hubs + 100); err != nil {
		return err
	}
	l, err := newLoad(o)
	if err != nil {
		return err
	}
	defer l.engine.close()
	memory := func() (bytes int64, err error) {
		if o.pid > 0 {
			u, err := readUsage(o.pid)
			return u.resident, err
		}
		return 0, nil
	}
	settled := func(first, n int) (bytes int64, err error) {
		if err := l.connect(context.Background(), first, n, func(i int) (int, bool) { return max(0, i-o.clients+1), false }); err != nil {
			return 0, err
		}
		l.runFor(*settle, "idle", func() bool { return false })
		return memory()
	}

	r := idleResult{URL: o.url, Clients: o.clients, Hubs: *hubs}
	if r.Before, err = memory(); err != nil {
		return err
	}
	withClients, err := settled(0, o.clients)
	if err != nil {
		return err
	}
	r.PerClient = float64(withClients-r.Before) / 1024 / float64(o.clients)
	if *hubs > 0 {
		withHubs, err := settled(o.clients, o.clients+*hubs)
		if err != nil {
			return err
		}
		r.PerHub = float64(withHubs-withClients)/1024/float64(*hubs) - r.PerClient
	}
	r.Faults = l.faults

	rows := [][2]string{{"clients", fmt.Sprintf("%d in one hub, %d in hubs of their own", r.Clients, r.Hubs)}}
	if o.pid > 0 {
		rows = append(rows,
			[2]string{"server's memory before", fmt.Sprintf("%.1f MiB", mib(r.Before))},
			[2]string{"a client", fmt.Sprintf("%.2f KiB", r.PerClient)})
		if *hubs > 0 {
			rows = append(rows, [2]string{"a hub, beyond its client", fmt.Sprintf("%.2f KiB", r.PerHub)})
		}
	}
	for why, n := range l.closes {
		rows = append(rows, [2]string{"closed", fmt.Sprintf("%d with %s", n, why)})
	}
	return report(o.asJSON, r, rows, r.Faults)
}
