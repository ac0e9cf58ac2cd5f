package chatbroadcast

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// scrape returns the families of our metrics that Caddy's admin endpoint has, by name without the prefix.
func scrape(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	return scrapeAt(t, adminAddr)
}

func scrapeAt(t testing.TB, admin string) map[string]*dto.MetricFamily {
	t.Helper()
	var resp *http.Response
	eventually(t, "the metrics", func() (ok bool) { // the endpoint may just be being replaced
		var err error
		resp, err = http.Get("http://" + admin + "/metrics")
		return err == nil
	})
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	all, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	ours := map[string]*dto.MetricFamily{}
	for name, family := range all {
		if rest, ok := strings.CutPrefix(name, metricsNamespace+"_"+metricsSubsystem+"_"); ok {
			ours[rest] = family
		}
	}
	return ours
}

// value returns one metric of a family, by the values of its labels in the order of their names; of a histogram the
// count.
func value(family *dto.MetricFamily, labels ...string) float64 {
	for _, m := range family.GetMetric() {
		got := []string{}
		for _, l := range m.GetLabel() {
			got = append(got, l.GetValue())
		}
		if fmt.Sprint(got) == fmt.Sprint(labels) {
			return m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return -1
}

func TestMetrics_CountAndSurviveReloads(t *testing.T) {
	const site = `http://localhost:9080 {
		chat_broadcast /chat/* {
			rate 3 1h
			max_clients_per_hub 3
			origins example.com
		}
		%s
	}`
	s := startCaddy(t, fmt.Sprintf(site, ""))
	before := scrape(t)
	var peers []*peer
	for range 3 {
		peers = append(peers, join(t, "/chat/a"))
	}
	other := join(t, "/chat/b")
	refused(t, http.StatusServiceUnavailable, "/chat/a")
	refused(t, http.StatusForbidden, "/chat/b", "Origin: http://evil.example\r\n")
	refused(t, http.StatusBadRequest, "/chat/%00")
	_, resp := handshakeOn(t, peers[0].dial(), strings.Replace(handshakeRequest(httpAddr, "/chat/b", ""), ": 13", ": 7", 1))
	if resp.StatusCode != http.StatusUpgradeRequired {
		t.Fatalf("got %s, want 426", resp.Status)
	}
	peers[0].text("one")
	peers[0].send(websocket.BinaryMessage, "two")
	peers[0].text("three")
	peers[0].text("over the rate")
	for _, p := range peers {
		for range 3 {
			p.next()
		}
	}
	other.send(websocket.CloseMessage, "\x03\xe8")
	other.wantEOF()

	type sample struct {
		family string
		labels []string
		want   float64
	}
	check := func(when string, samples []sample) {
		t.Helper()
		for _, want := range samples {
			var got float64
			eventually(t, fmt.Sprintf("%s: %s%v to grow by %v, last %v", when, want.family, want.labels, want.want, &got), func() bool {
				now := scrape(t)
				got = value(now[want.family], want.labels...)
				if now[want.family].GetType() != dto.MetricType_GAUGE {
					got -= value(before[want.family], want.labels...)
				}
				return got == want.want
			})
		}
	}
	all := []sample{
		{"clients", nil, 3},
		{"hubs", nil, 1},
		{"joins_total", nil, 4},
		{"closes_total", []string{"1000", ""}, 1},
		{"refusals_total", []string{"max_clients_per_hub"}, 1},
		{"refusals_total", []string{"origin"}, 1},
		{"refusals_total", []string{"hub_name"}, 1},
		{"refusals_total", []string{"handshake"}, 1},
		{"messages_received_total", []string{"text"}, 3},
		{"messages_received_total", []string{"binary"}, 1},
		{"messages_dropped_total", []string{"rate"}, 1},
		{"messages_dropped_total", []string{"lag"}, 0},
		{"publishes_total", []string{"client"}, 3},
		{"messages_sent_total", nil, 9},
		{"bytes_received_total", nil, 6 + 3 + 6 + 3 + 6 + 5 + 6 + 13 + 6 + 2},
		{"bytes_sent_total", nil, 3*(2+3+2+3+2+5) + 2 + 2},
	}
	check("before a reload", all)
	for range 3 {
		s.load(fmt.Sprintf(site, `respond /x "another configuration"`))
		s.load(fmt.Sprintf(site, ""))
	}
	check("after reloads", all)
	now := scrape(t)
	for name, family := range now {
		if family.GetHelp() == "" {
			t.Errorf("%s has no help text", name)
		}
	}
	if got := now["delivery_duration_seconds"].GetMetric()[0].GetHistogram().GetSampleCount(); got == 0 {
		t.Error("got no delivery observed")
	}
	if h := now["messages_per_write"].GetMetric()[0].GetHistogram(); h.GetSampleSum() != value(now["messages_sent_total"]) {
		t.Errorf("got %v messages in writes, want as many as were sent", h.GetSampleSum())
	}
}

// TestMetrics_ClientsCannotChooseLabels has a client choose all it can, and compares the labels that there are before and
// after.
func TestMetrics_ClientsCannotChooseLabels(t *testing.T) {
	startCaddy(t, `http://localhost:9080 {
		chat_broadcast /chat/* {
			user {http.request.header.X-User}
		}
	}`)
	labels := func() map[string]bool {
		all := map[string]bool{}
		for name, family := range scrape(t) {
			for _, m := range family.GetMetric() {
				all[name+fmt.Sprint(m.GetLabel())] = true
			}
		}
		return all
	}
	before := labels()
	for _, code := range []uint16{1000, 1001, 1003, 1007, 1008, 3000, 3999, 4000, 4999} {
		p := join(t, "/chat/chosen", "X-User: chosen\r\n", "Origin: http://"+httpAddr+"\r\n", "User-Agent: chosen\r\n")
		p.text("chosen")
		p.send(websocket.CloseMessage, string(websocket.FormatCloseMessage(int(code), "chosen")))
		p.wantEOF()
	}
	bare := join(t, "/chat/chosen")
	bare.send(websocket.CloseMessage, "")
	bare.wantEOF()
	refused(t, http.StatusForbidden, "/chat/b", "Origin: http://chosen.example\r\n")
	for l := range labels() {
		if !before[l] && !strings.Contains(l, otherLabel) {
			t.Errorf("got a new series %s", l)
		}
		if strings.Contains(l, "chosen") {
			t.Errorf("got %s, which a client chose", l)
		}
	}
}
