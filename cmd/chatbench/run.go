package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// A result has the figures of one run.
type result struct {
	URL        string  `json:"url"`
	Clients    int     `json:"clients"`
	Hubs       int     `json:"hubs"`
	Size       int     `json:"size_bytes"`
	Seconds    float64 `json:"seconds"`
	Messages   int64   `json:"messages"`
	Deliveries int64   `json:"deliveries"`
	PerSecond  float64 `json:"deliveries_per_second"`
	Latency    struct {
		P50  float64 `json:"p50"`
		P90  float64 `json:"p90"`
		P99  float64 `json:"p99"`
		P999 float64 `json:"p999"`
		Max  float64 `json:"max"`
	} `json:"latency_ms"`
	Faults  faults         `json:"faults"`
	Closes  map[string]int `json:"closes"`
	Unsent  int64          `json:"unsent"`  // messages that were due but not sent, because the server did not read
	Others  int64          `json:"others"`  // messages of other programs
	Rejoins int64          `json:"rejoins"` // reconnections of slow clients
	Server  *serverUsage   `json:"server,omitempty"`
	// How much of one core this tool took, without spinning. Near 1 the run measures the tool.
	GeneratorCPU float64 `json:"generator_cpu"`
}

// serverUsage is the server's CPU time during the measurement, and its resident memory.
type serverUsage struct {
	CPU         float64 `json:"cpu"` // cores
	PerDelivery float64 `json:"cpu_us_per_delivery"`
	Before      int64   `json:"rss_before"`     // bytes, before clients connected
	Ramped      int64   `json:"rss_after_ramp"` // when all had connected
	Peak        int64   `json:"rss_peak"`       // since the server started
	PerClient   float64 `json:"kib_per_client"` // of the peak above before
}

// measure makes one run.
func measure(ctx context.Context, o options) (r result, err error) {
	if err := raiseFileLimit(o.clients + o.slowClients() + 100); err != nil {
		return r, err
	}
	// The tool is one thread that allocates almost nothing.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l, err := newLoad(o)
	if err != nil {
		return r, err
	}
	defer l.engine.close()
	canceled := func() bool { return ctx.Err() != nil }

	var before, ramped, from, to, self0, self1 usage
	if o.pid > 0 {
		if before, err = readUsage(o.pid); err != nil {
			return r, fmt.Errorf("-pid: %w", err)
		}
	}
	if err := l.connect(ctx, 0, o.clients, o.place); err != nil {
		return r, err
	}
	slow := startSlow(l.options)
	defer slow.close()
	if o.pid > 0 {
		ramped, err = readUsage(o.pid)
	}
	l.chooseSenders()
	l.sending = true
	l.runFor(o.warmup, "warming up", canceled)

	l.latency.Reset()
	l.messages, l.unsent = 0, 0
	start, deliveries, spun := l.now(), l.deliveries, l.spun
	if o.pid > 0 {
		from, err = readUsage(o.pid)
	}
	self0, _ = readUsage(os.Getpid())
	if o.started != nil {
		o.started()
	}
	l.runFor(o.duration, "measuring", func() bool {
		select {
		case <-o.stop:
			return true
		default:
			return canceled()
		}
	})
	r.Seconds = (l.now() - start).Seconds()
	r.Deliveries, spun = l.deliveries-deliveries, l.spun-spun
	if o.pid > 0 {
		to, err = readUsage(o.pid)
	}
	self1, _ = readUsage(os.Getpid())
	r.Messages = l.messages

	l.sending = false
	l.runFor(o.drain, "draining", func() bool { return !l.underWay() })
	l.finish(l.hubs)

	r.URL, r.Clients, r.Hubs, r.Size = o.url, o.clients, o.hubs, o.size
	r.PerSecond = float64(r.Deliveries) / r.Seconds
	ms := func(percent float64) float64 { return float64(l.latency.ValueAtQuantile(percent)) / 1000 }
	r.Latency.P50, r.Latency.P90, r.Latency.P99, r.Latency.P999, r.Latency.Max = ms(50), ms(90), ms(99), ms(99.9), ms(100)
	r.Faults, r.Closes, r.Unsent, r.Others, r.Rejoins = l.faults, l.closes, l.unsent, l.others, slow.rejoins.Load()
	r.GeneratorCPU = max(0, self1.cpu-self0.cpu-spun).Seconds() / r.Seconds
	if o.pid > 0 {
		cpu := (to.cpu - from.cpu).Seconds()
		r.Server = &serverUsage{
			CPU: cpu / r.Seconds, PerDelivery: cpu * 1e6 / max(1, float64(r.Deliveries)),
			Before: before.resident, Ramped: ramped.resident, Peak: to.peak,
			PerClient: float64(to.peak-before.resident) / 1024 / float64(o.clients),
		}
	}
	return r, errors.Join(err, ctx.Err())
}

// rows returns r as names and values for people.
func (r *result) rows() [][2]string {
	rows := [][2]string{
		{"clients", fmt.Sprintf("%d in %d hubs", r.Clients, r.Hubs)},
		{"messages", fmt.Sprintf("%d of %d bytes in %.1f s, %.1f a second", r.Messages, r.Size, r.Seconds, float64(r.Messages)/r.Seconds)},
		{"deliveries", fmt.Sprintf("%d, %.0f a second, %.1f MB a second", r.Deliveries, r.PerSecond, r.PerSecond*float64(r.Size)/1e6)},
		{"latency", fmt.Sprintf("p50 %.2f ms, p90 %.2f ms, p99 %.2f ms, p99.9 %.2f ms, max %.2f ms",
			r.Latency.P50, r.Latency.P90, r.Latency.P99, r.Latency.P999, r.Latency.Max)},
		{"faults", fmt.Sprintf("%d lost, %d doubled, %d reordered, %d in a foreign hub, %d clients saw another order, %d disconnected",
			r.Faults.Lost, r.Faults.Doubled, r.Faults.Reordered, r.Faults.Foreign, r.Faults.Misordered, r.Faults.Disconnected)},
	}
	for why, n := range r.Closes {
		rows = append(rows, [2]string{"closed", fmt.Sprintf("%d with %s", n, why)})
	}
	for what, n := range map[string]int64{
		"unsent: the server did not read": r.Unsent, "messages of others": r.Others, "rejoins of slow clients": r.Rejoins,
	} {
		if n > 0 {
			rows = append(rows, [2]string{what, strconv.FormatInt(n, 10)})
		}
	}
	if s := r.Server; s != nil {
		rows = append(rows,
			[2]string{"server's CPU", fmt.Sprintf("%.2f cores, %.2f µs a delivery", s.CPU, s.PerDelivery)},
			[2]string{"server's memory", fmt.Sprintf("%.1f MiB before, %.1f MiB with all clients, %.1f MiB at its peak (%.1f KiB a client)",
				mib(s.Before), mib(s.Ramped), mib(s.Peak), s.PerClient)})
	}
	rows = append(rows, [2]string{"this tool's CPU", fmt.Sprintf("%.2f cores", r.GeneratorCPU)})
	if r.GeneratorCPU > 0.95 {
		rows = append(rows, [2]string{"", "that may be what limits the figures above"})
	}
	return rows
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// targetFlags defines the flags of the target.
func targetFlags(f *flag.FlagSet, o *options) {
	f.StringVar(&o.url, "url", "ws://localhost:8080/chat/{hub}", "where to connect; {hub} stands for the hub's number; wss:// takes more of the tool's CPU")
	f.BoolVar(&o.spin, "spin", false, "poll instead of sleeping once all clients are connected, so that the server never has to wake this tool; takes a whole core (Linux)")
	f.BoolVar(&o.insecure, "insecure", false, "accept any certificate")
	f.Float64Var(&o.ramp, "ramp", 0, "`clients` to connect a second; 0 for as many as possible")
	f.IntVar(&o.pid, "pid", 0, "`process` whose CPU and memory to report (Linux)")
	o.header = http.Header{}
	f.Func("header", "`name: value` for the handshake; may be repeated", func(s string) error {
		name, value, ok := strings.Cut(s, ":")
		if !ok {
			return errors.New("no colon")
		}
		o.header.Add(name, strings.TrimSpace(value))
		return nil
	})
}

// loadFlags defines the flags of the load. The values in o are their defaults.
func loadFlags(f *flag.FlagSet, o *options) {
	f.IntVar(&o.clients, "clients", o.clients, "clients in all")
	f.IntVar(&o.hubs, "hubs", o.hubs, "hubs; the clients are spread evenly over them")
	f.IntVar(&o.senders, "senders", 1, "clients of a hub that send; they also receive")
	f.IntVar(&o.size, "size", o.size, fmt.Sprintf("bytes of a message, at least %d", idSize))
	f.Func("rate", "`messages` a second and hub, evenly; 1-9 gives each hub a rate from 1 to 9; 0 sends when -window allows it (default "+fmt.Sprint(o.rateLow)+")", func(s string) (err error) {
		low, high, isRange := strings.Cut(s, "-")
		if !isRange {
			high = low
		}
		if o.rateLow, err = strconv.ParseFloat(low, 64); err == nil {
			o.rateHigh, err = strconv.ParseFloat(high, 64)
		}
		return err
	})
	f.IntVar(&o.window, "window", 32, "with -rate 0: messages a hub that are under way until all its clients have them")
	f.DurationVar(&o.warmup, "warmup", time.Second, "time before the measurement")
	f.DurationVar(&o.duration, "duration", o.duration, "duration of the measurement")
	f.DurationVar(&o.drain, "drain", 10*time.Second, "how long messages under way at the end may take before they count as lost")
	f.Float64Var(&o.events, "events", 0, "`percent` of the clients that do not send which speak "+eventsProtocol+"; the server must send them the raw clients' messages as events, in JSON without spaces")
	f.Float64Var(&o.slow, "slow", o.slow, "slow clients in addition, in `percent` of -clients; they count nowhere and reconnect when they are closed")
	f.IntVar(&o.slowRate, "slow-rate", 0, "`bytes` a second that a slow client reads")
}

// check returns an error if the options do not fit together.
func (o *options) check() error {
	switch {
	case o.clients < 1 || o.hubs < 1 || o.senders < 1 || o.window < 1 || o.clients < o.hubs*o.senders:
		return errors.New("there must be a client for each sender of each hub")
	case o.size < idSize || o.size > 1<<28:
		return fmt.Errorf("-size: from %d bytes to 256 MiB", idSize)
	case o.rateLow < 0 || o.rateHigh < o.rateLow || o.rateHigh > 0 && o.rateLow == 0:
		return errors.New("-rate: not a range of positive numbers")
	case o.events < 0 || o.events > 100:
		return errors.New("-events: from 0 to 100 percent")
	case o.senders*o.hubs >= 1<<senderBits:
		return errors.New("-senders: too many")
	}
	return nil
}

// parse parses and checks the flags of a load.
func parse(f *flag.FlagSet, args []string, o *options) error {
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	return o.check()
}

func runCommand(name string, args []string) error {
	o := options{clients: 1000, hubs: 1, size: 128, rateLow: 1, rateHigh: 1, duration: 5 * time.Second, progress: os.Stderr}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	targetFlags(f, &o)
	loadFlags(f, &o)
	if err := parse(f, args, &o); err != nil {
		return err
	}
	debug.SetGCPercent(400)
	r, err := measure(context.Background(), o)
	if err != nil {
		return err
	}
	return report(o.asJSON, r, r.rows(), r.Faults)
}
