package chatbroadcast

import (
	"errors"
	"math/bits"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/gorilla/websocket"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics count what happens in a registry's hubs. They live as long as the registry: each configuration registers them
// anew with Caddy, so that a reload sets none back. All labels come from closed sets: what a client sends is never one.
type metrics struct {
	collectors []prometheus.Collector

	joins             prometheus.Counter
	closes            *prometheus.CounterVec
	refusals          *prometheus.CounterVec
	receivedTexts     prometheus.Counter
	receivedBinaries  prometheus.Counter
	bytesReceived     prometheus.Counter
	droppedByRate     prometheus.Counter
	droppedByLag      prometheus.Counter
	publishedByClient prometheus.Counter
	publishedByHTTP   prometheus.Counter
	publishedByAdmin  prometheus.Counter
	delivery          prometheus.Histogram
	written           written
}

const (
	metricsNamespace = "caddy"
	metricsSubsystem = "chat_broadcast"
)

// otherLabel stands for what is in no closed set: the codes that clients make up.
const otherLabel = "other"

func newMetrics(r *registry) *metrics {
	m := new(metrics)
	gauge := func(name, help string, value func() float64) {
		m.collectors = append(m.collectors, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help,
		}, value))
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help,
		}, labels)
		m.collectors = append(m.collectors, v)
		return v
	}

	gauge("clients", "Clients that are members of a hub.", func() float64 {
		clients, _ := r.count()
		return float64(clients)
	})
	gauge("hubs", "Hubs that are open.", func() float64 {
		_, hubs := r.count()
		return float64(hubs)
	})
	m.joins = counter("joins_total", "Clients that have joined a hub.").WithLabelValues()
	m.closes = counter("closes_total", "Connections that have ended, by what was said at the end.", "code", "reason")
	for _, c := range causes {
		m.closes.WithLabelValues(strconv.Itoa(c.code), c.reason)
	}
	m.refusals = counter("refusals_total", "Handshakes and POSTs that were refused.", "reason")
	for _, reason := range refusalReasons {
		m.refusals.WithLabelValues(reason)
	}
	received := counter("messages_received_total", "Messages that clients have sent.", "type")
	m.receivedTexts, m.receivedBinaries = received.WithLabelValues("text"), received.WithLabelValues("binary")
	m.bytesReceived = counter("bytes_received_total",
		"Bytes received from clients after the handshake, frames and all, before TLS.").WithLabelValues()
	dropped := counter("messages_dropped_total",
		"Messages over their sender's rate, and messages that a client under on_lag skip has missed.", "reason")
	m.droppedByRate, m.droppedByLag = dropped.WithLabelValues("rate"), dropped.WithLabelValues("lag")
	published := counter("publishes_total", "Messages published in hubs.", "via")
	m.publishedByClient = published.WithLabelValues("client")
	m.publishedByHTTP = published.WithLabelValues("http")
	m.publishedByAdmin = published.WithLabelValues("admin")
	m.delivery = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: "delivery_duration_seconds",
		Help: "Time from the receipt of a message to its last write to a client, of one message a hub at a time. " +
			"What takes longer than a second counts as that.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
	})
	m.collectors = append(m.collectors, m.delivery, &m.written)
	return m
}

// register registers the metrics with the configuration that is being provisioned. Another handler of it may have done
// so.
func (m *metrics) register(ctx caddy.Context) error {
	err := ctx.GetMetricsRegistry().Register(m)
	if errors.As(err, new(prometheus.AlreadyRegisteredError)) {
		return nil
	}
	return err
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range m.collectors {
		c.Collect(ch)
	}
}

// received counts a message that a client has sent.
func (m *metrics) received(opcode int) {
	if opcode == websocket.BinaryMessage {
		m.receivedBinaries.Inc()
	} else {
		m.receivedTexts.Inc()
	}
}

// closed counts the end of a connection.
func (m *metrics) closed(why cause) {
	if slices.Contains(causes, why) {
		m.closes.WithLabelValues(strconv.Itoa(why.code), why.reason).Inc()
	} else {
		m.closes.WithLabelValues(otherLabel, otherLabel).Inc()
	}
}

// delivered observes how long the last write of a message has taken.
func (m *metrics) delivered(took time.Duration) { m.delivery.Observe(took.Seconds()) }

// A tally is what one goroutine has written since it last added that to the metrics: what it shares with others
// costs, done for each write, as much as everything else that is counted.
type tally struct {
	writes   [perWriteBuckets + 1]uint64 // by how many messages they carried
	messages uint64
	bytes    uint64
	pending  int
}

// perWriteBuckets is the number of buckets of messages_per_write: 1, 2, 4, 8 and so on to 512; another one counts what
// is more.
const perWriteBuckets = 10

// tallySize is how many writes a tally collects at most: a fraction of a second of them.
const tallySize = 256

// wrote counts a write that has completed n messages, of which there is at least one, or just bytes of some.
func (t *tally) wrote(n, bytes int) {
	t.bytes += uint64(bytes)
	t.pending++
	if n > 0 {
		t.messages += uint64(n)
		t.writes[min(bits.Len(uint(n-1)), perWriteBuckets)]++
	}
}

// written collects all tallies.
type written struct {
	mu    sync.Mutex
	total tally
}

var (
	messagesSentDesc = prometheus.NewDesc(
		prometheus.BuildFQName(metricsNamespace, metricsSubsystem, "messages_sent_total"),
		"Messages written to clients: each published message counts once for every client that it was sent to.", nil, nil)
	bytesSentDesc = prometheus.NewDesc(
		prometheus.BuildFQName(metricsNamespace, metricsSubsystem, "bytes_sent_total"),
		"Bytes written to clients after the handshake, frames and all, before TLS.", nil, nil)
	perWriteDesc = prometheus.NewDesc(
		prometheus.BuildFQName(metricsNamespace, metricsSubsystem, "messages_per_write"),
		"How many messages were written to a client at once.", nil, nil)
)

// add adds t and empties it.
func (w *written) add(t *tally) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, n := range t.writes {
		w.total.writes[i] += n
	}
	w.total.messages += t.messages
	w.total.bytes += t.bytes
	*t = tally{}
}

// wrote counts a single write.
func (w *written) wrote(n, bytes int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total.wrote(n, bytes)
}

// Describe implements prometheus.Collector.
func (w *written) Describe(ch chan<- *prometheus.Desc) {
	ch <- messagesSentDesc
	ch <- bytesSentDesc
	ch <- perWriteDesc
}

// Collect implements prometheus.Collector.
func (w *written) Collect(ch chan<- prometheus.Metric) {
	w.mu.Lock()
	t := w.total
	w.mu.Unlock()
	buckets := map[float64]uint64{}
	count := uint64(0)
	for i, n := range t.writes {
		count += n
		if i < perWriteBuckets {
			buckets[float64(uint(1)<<i)] = count
		}
	}
	ch <- prometheus.MustNewConstMetric(messagesSentDesc, prometheus.CounterValue, float64(t.messages))
	ch <- prometheus.MustNewConstMetric(bytesSentDesc, prometheus.CounterValue, float64(t.bytes))
	ch <- prometheus.MustNewConstHistogram(perWriteDesc, count, float64(t.messages), buckets)
}

// Interface guards
var (
	_ prometheus.Collector = (*metrics)(nil)
	_ prometheus.Collector = (*written)(nil)
)
