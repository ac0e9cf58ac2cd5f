package chatbroadcast

import (
	"errors"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are a registry's metrics for Prometheus. They live as long as the registry. Each configuration registers them
// with Caddy anew, so a reload resets none. All labels come from closed sets, never from a client.
type metrics struct {
	collectors []prometheus.Collector

	joins    prometheus.Counter
	closes   *prometheus.CounterVec
	known    []ws.Close // the values of the labels of closes
	refusals *prometheus.CounterVec
	delivery prometheus.Histogram
	engine   *prometheus.HistogramVec
}

// The outcomes of publishing with an engine.
const (
	outcomePublished = "published"
	outcomeFailed    = "failed"
)

const (
	metricsNamespace = "caddy"
	metricsSubsystem = "chat_broadcast"
)

// otherLabel stands for values that are in no closed set: the codes that clients make up.
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
	m.known = hub.Closes()
	for _, c := range m.known {
		m.closes.WithLabelValues(strconv.Itoa(c.Code), c.Reason)
	}
	m.refusals = counter("refusals_total", "Handshakes and POSTs that were refused.", "reason")
	for _, reason := range refusalReasons {
		m.refusals.WithLabelValues(reason)
	}
	counted := &r.process.Counters
	total := func(name, help, label, value string, count *atomic.Uint64) {
		opts := prometheus.CounterOpts{Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: name, Help: help}
		if label != "" {
			opts.ConstLabels = prometheus.Labels{label: value}
		}
		m.collectors = append(m.collectors, prometheus.NewCounterFunc(opts, func() float64 { return float64(count.Load()) }))
	}
	const received = "Messages that clients have sent."
	total("messages_received_total", received, "type", "text", &counted.ReceivedTexts)
	total("messages_received_total", received, "type", "binary", &counted.ReceivedBinaries)
	total("bytes_received_total", "Bytes received from clients after the handshake, frames and all, before TLS.", "", "", &counted.BytesReceived)
	const dropped = "Messages over their sender's rate, and messages that a client under on_lag skip has missed."
	total("messages_dropped_total", dropped, "reason", "rate", &counted.DroppedByRate)
	total("messages_dropped_total", dropped, "reason", "lag", &counted.DroppedByLag)
	const published = "Messages published in hubs."
	total("publishes_total", published, "via", "client", &counted.Published[hub.FromClient])
	total("publishes_total", published, "via", "http", &counted.Published[hub.FromHTTP])
	total("publishes_total", published, "via", "admin", &counted.Published[hub.FromAdmin])
	m.delivery = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: "delivery_duration_seconds",
		Help: "Time from the receipt of a message to its last write to a client, of one message a hub at a time. " +
			"What takes longer than a second counts as that.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
	})
	m.engine = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: metricsNamespace, Subsystem: metricsSubsystem, Name: "engine_publish_duration_seconds",
		Help:    "Time that the engine took for a batch of messages.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 10},
	}, []string{"outcome"})
	m.engine.WithLabelValues(outcomePublished)
	m.engine.WithLabelValues(outcomeFailed)
	gauge("engine_up", "Whether the engine can be reached. With the engine memory always 1.", r.engineUp)
	gauge("engine_queue_messages", "Messages that wait for the engine.", r.engineQueue)
	gauge("engine_behind_messages", "Messages that the engine has and this node lacked, at the last renewal.", r.engineBehind)
	total("engine_repaired_total", "Messages that were fetched from the engine because they had not arrived.", "", "", &counted.Repaired)
	total("engine_resets_total", "Hubs that have begun again because the engine had lost messages or was told to forget them.", "", "", &counted.Epochs)
	m.collectors = append(m.collectors, m.delivery, m.engine, (*written)(counted))
	return m
}

// register registers the metrics with the configuration that Caddy is provisioning. Another handler of it may have done
// so already.
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

// closed counts the end of a connection.
func (m *metrics) closed(why ws.Close) {
	if slices.Contains(m.known, why) {
		m.closes.WithLabelValues(strconv.Itoa(why.Code), why.Reason).Inc()
	} else {
		m.closes.WithLabelValues(otherLabel, otherLabel).Inc()
	}
}

// enginePublished observes how long an engine took for a batch of messages.
func (m *metrics) enginePublished(took time.Duration, err error) {
	outcome := outcomePublished
	if err != nil {
		outcome = outcomeFailed
	}
	m.engine.WithLabelValues(outcome).Observe(took.Seconds())
}

// delivered observes how long a message took to its last write.
func (m *metrics) delivered(took time.Duration) { m.delivery.Observe(took.Seconds()) }

// written collects the counters of writes to clients. The three metrics of one scrape agree with each other.
type written hub.Counters

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

// Describe implements prometheus.Collector.
func (w *written) Describe(ch chan<- *prometheus.Desc) {
	ch <- messagesSentDesc
	ch <- bytesSentDesc
	ch <- perWriteDesc
}

// Collect implements prometheus.Collector.
func (w *written) Collect(ch chan<- prometheus.Metric) {
	t := (*hub.Counters)(w).Written()
	buckets := map[float64]uint64{}
	count := uint64(0)
	for i, n := range t.Writes {
		count += n
		if i < len(t.Writes)-1 {
			buckets[float64(uint(1)<<i)] = count
		}
	}
	ch <- prometheus.MustNewConstMetric(messagesSentDesc, prometheus.CounterValue, float64(t.Messages))
	ch <- prometheus.MustNewConstMetric(bytesSentDesc, prometheus.CounterValue, float64(t.Bytes))
	ch <- prometheus.MustNewConstHistogram(perWriteDesc, count, float64(t.Messages), buckets)
}

// Interface guards
var (
	_ prometheus.Collector = (*metrics)(nil)
	_ prometheus.Collector = (*written)(nil)
)
