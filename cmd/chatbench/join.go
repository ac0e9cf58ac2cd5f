package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"
)

// A joinResult has the figures of one burst of joining clients.
type joinResult struct {
	URL     string  `json:"url"`
	Clients int     `json:"clients"` // that joined in the burst
	History int     `json:"history"` // messages that each must receive
	Size    int     `json:"size_bytes"`
	Burst   float64 `json:"burst_ms"` // from the first dial until the last client had its history
	Joined  struct {
		P50 float64 `json:"p50"`
		P99 float64 `json:"p99"`
		Max float64 `json:"max"`
	} `json:"joined_ms"` // from a client's dial until it had its history
	Faults faults         `json:"faults"`
	Closes map[string]int `json:"closes"`
	Server *joinUsage     `json:"server,omitempty"`
	// How much of one core this tool took during the burst, without spinning.
	GeneratorCPU float64 `json:"generator_cpu"`
}

// joinUsage has the costs of the burst to the server.
type joinUsage struct {
	CPUPerClient float64 `json:"cpu_us_per_client"`
	Before       int64   `json:"rss_before"` // bytes, before clients connected
	Peak         int64   `json:"rss_peak"`   // since the server started
	PerClient    float64 `json:"kib_per_client"`
}

// measureJoin fills the history of a hub, lets o.clients join it at once, and checks that each receives exactly the last
// history messages, and then a live one.
func measureJoin(ctx context.Context, o options, history int) (r joinResult, err error) {
	if err := raiseFileLimit(o.clients + 100); err != nil {
		return r, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l, err := newLoad(o)
	if err != nil {
		return r, err
	}
	defer l.engine.close()
	canceled := func() bool { return ctx.Err() != nil }
	arrived := func() bool { return canceled() || !l.underWay() }

	var before, from, to, self0, self1 usage
	if o.pid > 0 {
		if before, err = readUsage(o.pid); err != nil {
			return r, fmt.Errorf("-pid: %w", err)
		}
	}
	place := func(int) (hub int, events bool) { return 0, false }
	if err := l.connect(ctx, 0, 1, place); err != nil {
		return r, err
	}
	l.chooseSenders()
	filler := l.byNumber[0]
	for range history {
		l.publish(filler, l.now())
		l.engine.flush(filler.client)
		l.runFor(o.drain, "filling the history", arrived)
	}
	switch {
	case l.others > 0:
		return r, errors.New("the hub had messages already: give another -url, or start the server again")
	case l.underWay() || filler.client.gone:
		return r, fmt.Errorf("the server did not return all %d messages to their sender", history)
	}

	l.latency.Reset()
	joined, last := 0, l.now()
	l.delivered = func(c *client, now time.Duration) {
		if c.wants[0] == uint64(history) {
			joined, last = joined+1, now
			l.record(now - c.dialed)
		}
	}
	if o.pid > 0 {
		from, err = readUsage(o.pid)
	}
	self0, _ = readUsage(os.Getpid())
	start, spun := l.now(), l.spun
	if err := l.connect(ctx, 1, 1+o.clients, place); err != nil {
		return r, err
	}
	l.runFor(o.drain, "joining", func() bool { return canceled() || joined == o.clients })
	if o.pid > 0 {
		var readErr error
		to, readErr = readUsage(o.pid)
		err = errors.Join(err, readErr)
	}
	self1, _ = readUsage(os.Getpid())
	passed := l.now() - start
	l.delivered = nil
	r.Burst = (last - start).Seconds() * 1000
	ms := func(percent float64) float64 { return float64(l.latency.ValueAtQuantile(percent)) / 1000 }
	r.Joined.P50, r.Joined.P99, r.Joined.Max = ms(50), ms(99), ms(100)

	// A live message shows, without a wait, that nothing came after the history.
	l.publish(filler, l.now())
	l.engine.flush(filler.client)
	l.runFor(o.drain, "draining", arrived)
	l.finish(l.hubs)

	r.URL, r.Clients, r.History, r.Size = o.url, o.clients, history, o.size
	r.Faults, r.Closes = l.faults, l.closes
	r.GeneratorCPU = max(0, self1.cpu-self0.cpu-(l.spun-spun)).Seconds() / passed.Seconds()
	if o.pid > 0 {
		r.Server = &joinUsage{
			CPUPerClient: float64((to.cpu - from.cpu).Microseconds()) / float64(o.clients),
			Before:       before.resident, Peak: to.peak,
			PerClient: float64(to.peak-before.resident) / 1024 / float64(o.clients),
		}
	}
	return r, errors.Join(err, ctx.Err())
}

// rows returns r as names and values for people.
func (r *joinResult) rows() [][2]string {
	rows := [][2]string{
		{"clients", fmt.Sprintf("%d, which receive %d messages of %d bytes each", r.Clients, r.History, r.Size)},
		{"burst", fmt.Sprintf("%.2f ms until the last client had its history", r.Burst)},
		{"a client", fmt.Sprintf("p50 %.2f ms, p99 %.2f ms, max %.2f ms from its dial", r.Joined.P50, r.Joined.P99, r.Joined.Max)},
		{"faults", fmt.Sprintf("%d lost, %d doubled, %d reordered, %d disconnected",
			r.Faults.Lost, r.Faults.Doubled, r.Faults.Reordered, r.Faults.Disconnected)},
	}
	for why, n := range r.Closes {
		rows = append(rows, [2]string{"closed", fmt.Sprintf("%d with %s", n, why)})
	}
	if s := r.Server; s != nil {
		rows = append(rows,
			[2]string{"server's CPU", fmt.Sprintf("%.2f µs a client", s.CPUPerClient)},
			[2]string{"server's memory", fmt.Sprintf("%.1f MiB before, %.1f MiB at its peak (%.1f KiB a client)", mib(s.Before), mib(s.Peak), s.PerClient)})
	}
	return append(rows, [2]string{"this tool's CPU", fmt.Sprintf("%.2f cores", r.GeneratorCPU)})
}

func joinCommand(name string, args []string) error {
	o := options{hubs: 1, senders: 1, size: 128, window: 1, drain: 10 * time.Second, progress: os.Stderr}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	targetFlags(f, &o)
	f.IntVar(&o.clients, "clients", 1000, "clients that join at once")
	f.IntVar(&o.size, "size", o.size, fmt.Sprintf("bytes of a message, at least %d", idSize))
	history := f.Int("history", 100, "`messages` that the server sends to a client that joins; it must keep exactly as many, or more")
	if err := parse(f, args, &o); err != nil {
		return err
	}
	if *history < 1 {
		return errors.New("-history: at least one message")
	}
	debug.SetGCPercent(400)
	r, err := measureJoin(context.Background(), o, *history)
	if err != nil {
		return err
	}
	return report(o.asJSON, r, r.rows(), r.Faults)
}
