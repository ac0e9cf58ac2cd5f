package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A contender is a server to measure, with its configuration.
type contender struct {
	name         string
	command, url string   // of a server of the user's
	serve        []string // a subcommand of this program; without it and a command, Caddy
	tls          bool
	has          string // what it can do beyond sending messages to all: keep a history, speak events
	log          bool   // with log and metrics
}

// contenders are the servers that compare starts. The floors come first, because ratios are against them.
var contenders = []contender{
	{name: "floor", serve: []string{"serve-floor"}, has: "history"},
	{name: "floor-batched", serve: []string{"serve-floor", "-batched"}, has: "history"},
	{name: "gorilla", serve: []string{"serve-gorilla"}},
	{name: "caddy", has: "history events"},
	{name: "caddy-log", log: true, has: "history events"},
	{name: "floor-tls", serve: []string{"serve-floor"}, tls: true, has: "history"},
	{name: "floor-batched-tls", serve: []string{"serve-floor", "-batched"}, tls: true, has: "history"},
	{name: "caddy-tls", tls: true, has: "history events"},
}

// A scenario is one load on a server.
type scenario struct {
	name    string
	summary string
	command string   // of chatbench; run if empty
	args    []string // of the command
	floor   string   // the contender to which ratios compare
	against string   // or the scenarios of the same server to whose mean ratios compare
	tls     bool     // also with TLS
	needs   string   // what a contender must have
	without string   // contenders that cannot run it for another reason
}

// runs reports whether c can run s.
func (s *scenario) runs(c contender) bool {
	return (!c.tls || s.tls) && (s.needs == "" || slices.Contains(words(c.has), s.needs)) && !slices.Contains(words(s.without), c.name)
}

// joinHistory is how many messages the servers of join-burst keep.
const joinHistory = "100"

var scenarios = []scenario{
	{name: "saturation-10", summary: "32 messages of 128 bytes under way to 10 clients", args: words("-clients 10 -rate 0"), floor: "floor-batched", tls: true},
	{name: "saturation-1000", summary: "the same, 1000 clients", args: words("-clients 1000 -rate 0"), floor: "floor-batched", tls: true},
	{name: "saturation-both", summary: "the same, every other client speaks events; ratios against the mean of saturation-1000 and -events", args: words("-clients 1000 -rate 0 -events 50"), against: "saturation-1000 saturation-events", needs: "events"},
	{name: "saturation-events", summary: "the same, all but the sender speak events", args: words("-clients 1000 -rate 0 -events 100"), against: "saturation-1000", needs: "events"},
	{name: "saturation-5000", summary: "the same, raw, 5000 clients", args: words("-clients 5000 -rate 0"), floor: "floor-batched"},
	{name: "rate-1000", summary: "20 messages/s to 1000 clients", args: words("-clients 1000 -rate 20"), floor: "floor", tls: true},
	{name: "rate-1000-233", summary: "the same, messages of 233 bytes, as long as the events of rate-1000-events", args: words("-clients 1000 -rate 20 -size 233"), floor: "floor"},
	{name: "rate-1000-events", summary: "rate-1000, all but the sender speak events; ratios against rate-1000-233", args: words("-clients 1000 -rate 20 -events 100"), against: "rate-1000-233", needs: "events"},
	{name: "rate-both", summary: "rate-1000, every other client speaks events; ratios against the mean of rate-1000 and rate-1000-events", args: words("-clients 1000 -rate 20 -events 50"), against: "rate-1000 rate-1000-events", needs: "events"},
	{name: "hubs", summary: "200 hubs of 10 clients, 5 messages/s each", args: words("-clients 2000 -hubs 200 -rate 5"), floor: "floor", tls: true},
	{name: "growth-100", summary: "200 messages/s to 100 clients: as many deliveries as rate-1000", args: words("-clients 100 -rate 200"), floor: "floor"},
	{name: "growth-10000", summary: "2 messages/s to 10,000 clients: as many deliveries as rate-1000", args: words("-clients 10000 -rate 2"), floor: "floor"},
	{name: "large", summary: "4 messages of 64 KiB under way to 1000 clients", args: words("-clients 1000 -rate 0 -window 4 -size 65536"), floor: "floor"},
	{name: "mixed", summary: "100 hubs of 10 clients, 5 to 50 messages/s of 4 KiB each", args: words("-clients 1000 -hubs 100 -rate 5-50 -size 4096"), floor: "floor"},
	{
		name: "mixed-slow", summary: "mixed, and 5 % more clients that do not read; ratios against mixed", against: "mixed", without: "floor floor-batched",
		args: words("-clients 1000 -hubs 100 -rate 5-50 -size 4096 -slow 5 -warmup 5s"),
	},
	{
		name: "join-burst", summary: "1000 clients join at once and receive 100 messages of 128 bytes each",
		command: "join", args: words("-clients 1000 -history " + joinHistory), floor: "floor", tls: true, needs: "history",
	},
	{name: "idle", summary: "10,000 idle clients in one hub, then 5000 in a hub of their own each", command: "idle", args: words("-clients 10000 -hubs 5000"), floor: "floor", tls: true},
}

func words(s string) []string { return strings.Fields(s) }

// A measurement is the result of one scenario with one contender: of one round, or the median of the rounds or of their ratios.
type measurement struct {
	PerSecond   float64 `json:"deliveries_per_second,omitempty"`
	PerDelivery float64 `json:"cpu_us_per_delivery,omitempty"`
	P50         float64 `json:"p50_ms,omitempty"`
	P99         float64 `json:"p99_ms,omitempty"`
	PerClient   float64 `json:"kib_per_client"`
	PerHub      float64 `json:"kib_per_hub,omitempty"`
	Burst       float64 `json:"burst_ms,omitempty"`
	CPUPerJoin  float64 `json:"cpu_us_per_client,omitempty"`
	Generator   float64 `json:"generator_cpu,omitempty"`
	Faults      float64 `json:"rounds_with_faults"`
}

// fields returns pointers to the figures of m, for arithmetic.
func (m *measurement) fields() []*float64 {
	return []*float64{&m.PerSecond, &m.PerDelivery, &m.P50, &m.P99, &m.PerClient, &m.PerHub, &m.Burst, &m.CPUPerJoin, &m.Generator, &m.Faults}
}

// median returns the median of each field separately.
func median(ms []measurement) (m measurement) {
	for i, field := range m.fields() {
		values := make([]float64, 0, len(ms))
		for _, m := range ms {
			values = append(values, *m.fields()[i])
		}
		slices.Sort(values)
		if n := len(values); n > 0 {
			*field = (values[n/2] + values[(n-1)/2]) / 2
		}
	}
	return m
}

// mean returns the expected result of a load that consists in equal parts of the loads behind ms. For deliveries a
// second that is the harmonic mean, because times add up.
func mean(ms []measurement) (m measurement) {
	for i, field := range m.fields() {
		for _, m := range ms {
			*field += *m.fields()[i] / float64(len(ms))
		}
	}
	var seconds float64 // for one delivery
	for _, m := range ms {
		seconds += 1 / m.PerSecond / float64(len(ms))
	}
	m.PerSecond = 1 / seconds
	return m
}

// ratio divides a by b, field by field. It leaves out fields that are 0 in b.
func ratio(a, b measurement) (m measurement) {
	for i, field := range m.fields() {
		if divisor := *b.fields()[i]; divisor != 0 {
			*field = *a.fields()[i] / divisor
		}
	}
	return m
}

// A comparison is one row of the table.
type comparison struct {
	Scenario string        `json:"scenario"`
	Server   string        `json:"server"`
	Median   measurement   `json:"median"`
	Ratio    measurement   `json:"ratio"` // the median of the rounds' ratios
	Rounds   []measurement `json:"rounds"`
	command  string
}

// A plan says which servers to compare, under which loads.
type plan struct {
	contenders []contender
	scenarios  []scenario
	rounds     int
	duration   time.Duration
	cores      []int // of the load
	spin       bool
}

func compareCommand(name string, args []string) error {
	var p plan
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	program := launcherFlags(f)
	f.IntVar(&p.rounds, "rounds", 3, "how often to measure each")
	f.DurationVar(&p.duration, "duration", 5*time.Second, "duration of each measurement")
	only := f.String("only", "", "comma-separated `scenarios`: "+names(scenarios, func(s scenario) string { return s.name + " (" + s.summary + ")" }))
	servers := f.String("servers", "", "comma-separated `servers`: "+names(contenders, func(c contender) string { return c.name }))
	serverCores := f.String("server-cores", "0", "cores of the server; empty for any")
	toolCores := f.String("tool-cores", "1", "cores of the load")
	f.BoolVar(&p.spin, "spin", false, "the load polls instead of sleeping, as chatbench run -spin does")
	custom := customFlags(f)
	asJSON := f.Bool("json", false, "print JSON")
	if err := f.Parse(args); err != nil {
		return err
	}
	for _, s := range scenarios {
		if listed(*only, s.name) {
			p.scenarios = append(p.scenarios, s)
		}
	}
	for _, c := range contenders {
		if listed(*servers, c.name) {
			p.contenders = append(p.contenders, c)
		}
	}
	added, err := custom()
	if err != nil {
		return err
	}
	p.contenders = append(p.contenders, added...)
	ctx, l, closeIt, err := newLauncher(*program)
	if err != nil {
		return err
	}
	defer closeIt()
	if l.cores, err = coreList(*serverCores); err != nil {
		return err
	}
	if p.cores, err = coreList(*toolCores); err != nil {
		return err
	}
	rows, err := l.compare(ctx, p)
	if err != nil {
		return err
	}
	if !*asJSON {
		printComparison(rows)
		return nil
	}
	return report(true, rows, nil, faults{})
}

// compare makes all measurements of a plan.
func (l *launcher) compare(ctx context.Context, p plan) (rows []*comparison, err error) {
	find := func(s scenario, server string) *comparison {
		for _, row := range rows {
			if row.Scenario == s.name && row.Server == server {
				return row
			}
		}
		rows = append(rows, &comparison{Scenario: s.name, Server: server, command: s.command})
		return rows[len(rows)-1]
	}
	for round := range p.rounds {
		for _, s := range p.scenarios {
			for _, c := range p.contenders {
				if !s.runs(c) {
					continue
				}
				m, err := measureOne(ctx, l, p, s, c)
				if err != nil {
					return nil, fmt.Errorf("%s with %s: %w", s.name, c.name, err)
				}
				row := find(s, c.name)
				row.Rounds = append(row.Rounds, m)
				fmt.Fprintf(os.Stderr, "round %d of %d: %s, %s: %.0f deliveries/s, %.2f µs each, p99 %.2f ms, %.1f KiB a client, burst %.0f ms\n",
					round+1, p.rounds, s.name, c.name, m.PerSecond, m.PerDelivery, m.P99, m.PerClient, m.Burst)
			}
		}
	}
	for _, row := range rows {
		row.Median = median(row.Rounds)
		bases, server := basesOf(row)
		var ratios []measurement
		for i, m := range row.Rounds {
			var base []measurement
			for _, b := range rows {
				if b.Server == server && slices.Contains(bases, b.Scenario) {
					base = append(base, b.Rounds[i])
				}
			}
			if len(base) == len(bases) {
				ratios = append(ratios, ratio(m, mean(base)))
			}
		}
		row.Ratio = median(ratios)
	}
	return rows, nil
}

// basesOf returns the scenarios, and their server, to whose mean the ratios of row compare.
func basesOf(row *comparison) (names []string, server string) {
	for _, s := range scenarios {
		switch {
		case s.name != row.Scenario:
		case s.against != "":
			return words(s.against), row.Server
		case strings.HasSuffix(row.Server, "-tls"):
			return []string{s.name}, s.floor + "-tls"
		default:
			return []string{s.name}, s.floor
		}
	}
	return []string{row.Scenario}, row.Server
}

// measureOne starts a contender, loads it from a separate process, and stops it.
func measureOne(ctx context.Context, l *launcher, p plan, s scenario, c contender) (m measurement, err error) {
	server, url, err := l.startContender(ctx, c, s)
	if err != nil {
		return m, err
	}
	defer stop(server)
	args := []string{s.command}
	if s.command == "" {
		args = words("run -duration " + p.duration.String())
	}
	args = append(args, "-json", "-insecure", "-spin="+strconv.FormatBool(p.spin), "-url", url, "-pid", strconv.Itoa(server.Process.Pid))
	load := exec.CommandContext(ctx, l.self, append(args, s.args...)...)
	var out, progress bytes.Buffer
	load.Stdout, load.Stderr = &out, &progress
	if err := startOn(load, p.cores); err != nil {
		return m, err
	}
	// Faults also make the exit status 1.
	if failed := load.Wait(); out.Len() == 0 {
		return m, fmt.Errorf("%w\n%s", failed, progress.Bytes())
	}
	m, found, err := readMeasurement(s.command, out.Bytes())
	if found.any() {
		m.Faults = 1
		fmt.Fprintf(os.Stderr, "%s, %s: %+v\n", s.name, c.name, found)
	}
	return m, err
}

// readMeasurement reads the JSON that a command of chatbench has printed.
func readMeasurement(command string, printed []byte) (m measurement, found faults, err error) {
	switch command {
	case "idle":
		var r idleResult
		err = json.Unmarshal(printed, &r)
		return measurement{PerClient: r.PerClient, PerHub: r.PerHub}, r.Faults, err
	case "join":
		var r joinResult
		err = json.Unmarshal(printed, &r)
		m = measurement{Burst: r.Burst, P50: r.Joined.P50, P99: r.Joined.P99, Generator: r.GeneratorCPU}
		if r.Server != nil {
			m.CPUPerJoin, m.PerClient = r.Server.CPUPerClient, r.Server.PerClient
		}
		return m, r.Faults, err
	default:
		var r result
		err = json.Unmarshal(printed, &r)
		m = measurement{PerSecond: r.PerSecond, P50: r.Latency.P50, P99: r.Latency.P99, Generator: r.GeneratorCPU}
		if r.Server != nil {
			m.PerDelivery, m.PerClient = r.Server.PerDelivery, r.Server.PerClient
		}
		return m, r.Faults, err
	}
}

// startContender starts c as s needs it, and returns its URL.
func (l *launcher) startContender(ctx context.Context, c contender, s scenario) (server *exec.Cmd, url string, err error) {
	if c.command != "" {
		server, err = l.startCustom(ctx, c)
		return server, c.url, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, "", err
	}
	url = "ws://" + address + "/{hub}"
	if c.tls {
		url = "wss://" + address + "/{hub}"
	}
	if c.serve == nil {
		globals, site, chat, http := "", "", "", "http"
		if s.needs == "history" {
			chat = "history " + joinHistory
		}
		if c.log {
			globals, site = "metrics", "log"
		}
		if c.tls {
			site, http = fmt.Sprintf("tls %s %s", l.cert(), l.key()), "https"
		}
		server, err = l.startCaddy(ctx, address, caddyfile("off", globals, http, address, site, chat))
		return server, url, err
	}
	args := append(slices.Clone(c.serve), "-listen", address)
	if s.needs == "history" {
		args = append(args, "-history", joinHistory)
	}
	if c.tls {
		args = append(args, "-cert", l.cert(), "-key", l.key())
	}
	server = exec.CommandContext(ctx, l.self, args...)
	return server, url, l.start(ctx, server, address)
}

// printComparison prints the table as Markdown.
func printComparison(rows []*comparison) {
	fmt.Print("| scenario | server | deliveries/s | × | CPU µs a delivery | × | p50 ms | p99 ms | × | peak KiB a client | × | tool's CPU |\n" +
		"|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, row := range rows {
		m, r := row.Median, row.Ratio
		if row.command == "" {
			fmt.Printf("| %s | %s | %.0f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.1f | %.2f | %.2f |\n", row.Scenario, row.Server,
				m.PerSecond, r.PerSecond, m.PerDelivery, r.PerDelivery, m.P50, m.P99, r.P99, m.PerClient, r.PerClient, m.Generator)
		}
	}
	fmt.Print("\n| scenario | server | burst ms | × | CPU µs a client | × | p50 ms | p99 ms | × | peak KiB a client | × | tool's CPU |\n" +
		"|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, row := range rows {
		m, r := row.Median, row.Ratio
		if row.command == "join" {
			fmt.Printf("| %s | %s | %.1f | %.2f | %.1f | %.2f | %.2f | %.2f | %.2f | %.1f | %.2f | %.2f |\n", row.Scenario, row.Server,
				m.Burst, r.Burst, m.CPUPerJoin, r.CPUPerJoin, m.P50, m.P99, r.P99, m.PerClient, r.PerClient, m.Generator)
		}
	}
	fmt.Print("\n| scenario | server | KiB a client | × | KiB a hub beyond its client |\n|---|---|---:|---:|---:|\n")
	for _, row := range rows {
		if row.command == "idle" {
			fmt.Printf("| %s | %s | %.2f | %.2f | %.2f |\n", row.Scenario, row.Server, row.Median.PerClient, row.Ratio.PerClient, row.Median.PerHub)
		}
	}
	for _, row := range rows {
		if row.Median.Faults > 0 {
			fmt.Printf("\n%s with %s: messages were lost, doubled or out of order, or clients disconnected.\n", row.Scenario, row.Server)
		}
	}
}

// listed reports whether a comma-separated list is empty or has the name.
func listed(list, name string) bool {
	return list == "" || slices.Contains(strings.Split(list, ","), name)
}

func coreList(s string) (cores []int, err error) {
	for _, word := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' }) {
		core, err := strconv.Atoi(word)
		if err != nil {
			return nil, err
		}
		cores = append(cores, core)
	}
	return cores, nil
}

func names[T any](list []T, name func(T) string) string {
	all := make([]string, 0, len(list))
	for _, item := range list {
		all = append(all, name(item))
	}
	return strings.Join(all, ", ")
}
