package chatbroadcast

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// The files for operators that run Prometheus and Grafana.
const (
	alertsFile     = "ops/alerts.yml"
	alertTestsFile = "ops/alerts_test.yml"
	dashboardFile  = "ops/dashboard.json"
)

// scrapeInterval is that of the Prometheus under test. A scrape that takes longer has failed for Prometheus.
const scrapeInterval = "250ms"

// A prometheusServer is a Prometheus that runs until the test ends.
type prometheusServer struct {
	t       *testing.T
	url     string
	logFile string
}

// startPrometheus starts a Prometheus on a free port of the loopback interface. It scrapes for the first time 5 s later.
func startPrometheus(t *testing.T, path, config string) *prometheusServer {
	t.Helper()
	dir := t.TempDir()
	configFile := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(configFile, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &prometheusServer{t: t, logFile: filepath.Join(dir, "log")}
	log, err := os.Create(p.logFile)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path,
		"--config.file="+configFile,
		"--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:0",
		"--log.level=debug", // which says what is wrong with a scrape
	)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // at the test's end, before the cleanup
	cmd.WaitDelay = patience
	if err := cmd.Start(); err != nil {
		log.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := cmd.Wait()
		log.Close()
		if !errors.Is(err, context.Canceled) { // which stands for an exit status of 0 after the signal
			t.Errorf("stopping Prometheus: %v", err)
		}
		if t.Failed() {
			t.Logf("the log of Prometheus:\n%s", p.log())
		}
	})
	listening := regexp.MustCompile(`msg="Listening on".* address=(\S+)`)
	eventually(t, "Prometheus to listen", func() bool {
		match := listening.FindSubmatch(p.log())
		if match != nil {
			p.url = "http://" + string(match[1])
		}
		return match != nil
	})
	eventually(t, "Prometheus to be ready", func() bool {
		resp, err := http.Get(p.url + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return p
}

func (p *prometheusServer) log() []byte {
	log, _ := os.ReadFile(p.logFile)
	return log
}

// get asks the HTTP API, decodes the data of its answer into data, and returns what is wrong with the question.
func (p *prometheusServer) get(path string, query url.Values, data any) error {
	p.t.Helper()
	resp, err := http.Get(p.url + "/api/v1/" + path + "?" + query.Encode())
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer := struct {
		Data     any
		Error    string
		Warnings []string
	}{Data: data}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		p.t.Fatalf("%s: %s: %v", path, resp.Status, err)
	}
	if answer.Error != "" || len(answer.Warnings) > 0 {
		return fmt.Errorf("%s %v", answer.Error, answer.Warnings)
	}
	return nil
}

// A promSeries is a series with its value now.
type promSeries struct {
	Metric map[string]string
	Value  []any // the time, and the value as a string
}

func (s promSeries) value() float64 {
	v, _ := strconv.ParseFloat(s.Value[1].(string), 64)
	return v
}

// query evaluates an expression now.
func (p *prometheusServer) query(expr string) ([]promSeries, error) {
	p.t.Helper()
	var vector struct{ Result []promSeries }
	err := p.get("query", url.Values{"query": {expr}}, &vector)
	return vector.Result, err
}

// waitFor waits until all of an expression's series, of which there must be some, have the given value.
func (p *prometheusServer) waitFor(expr string, want float64) {
	p.t.Helper()
	var got []promSeries
	eventually(p.t, fmt.Sprintf("%s to be %v", expr, want), func() bool {
		var err error
		got, err = p.query(expr)
		if err != nil {
			p.t.Fatal(err)
		}
		return len(got) > 0 && !slices.ContainsFunc(got, func(s promSeries) bool { return s.value() != want })
	})
}

var (
	promGroupings = regexp.MustCompile(`\b(by|on|group_left)\s*\([^)]*\)`)
	promNames     = regexp.MustCompile(`\b([a-zA-Z_:]\w*)(\{[^}]*\})?(\s*\()?`)
	promOperators = []string{"offset", "unless"}
)

// checkSelectors fails the test for each selector in an expression that matches no series: there is no such metric, or
// none with such labels.
func (p *prometheusServer) checkSelectors(t *testing.T, expr string) {
	t.Helper()
	found := false
	for _, match := range promNames.FindAllStringSubmatch(promGroupings.ReplaceAllString(expr, ""), -1) {
		if match[3] != "" || slices.Contains(promOperators, match[1]) {
			continue // a function, or an operator
		}
		found = true
		var series []map[string]string
		if err := p.get("series", url.Values{"match[]": {match[1] + match[2]}}, &series); err != nil || len(series) == 0 {
			t.Errorf("%s: got %d series for %s%s, error %v", expr, len(series), match[1], match[2], err)
		}
	}
	if !found {
		t.Errorf("%s: there is no metric in it", expr)
	}
}

// A dashboard has the fields of a Grafana dashboard that the tests check.
type dashboard struct {
	Title, UID    string
	SchemaVersion int
	Templating    struct {
		List []struct {
			Name, Type string
			Datasource struct{ Type, UID string }
			Query      json.RawMessage
		}
	}
	Panels []dashboardPanel
}

type dashboardPanel struct {
	ID                       int
	Type, Title, Description string
	Datasource               struct{ Type, UID string }
	GridPos                  struct{ X, Y, W, H int }
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct {
		RefID, Expr, LegendFormat, Format string
		Datasource                        struct{ Type, UID string }
	}
}

func readDashboard(t *testing.T) dashboard {
	t.Helper()
	data, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDashboard checks what Grafana would not complain of, but show wrongly.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	if d.Title == "" || d.UID == "" || d.SchemaVersion < 39 {
		t.Errorf("got title %q, uid %q and schemaVersion %d", d.Title, d.UID, d.SchemaVersion)
	}
	for _, v := range d.Templating.List {
		if v.Type == "query" && v.Datasource.UID != "${datasource}" {
			t.Errorf("variable %s: got data source %q, want the one that is chosen", v.Name, v.Datasource.UID)
		}
	}
	ids, cells := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("panel %q: got id %d, want one of its own", p.Title, p.ID)
		}
		ids[p.ID] = true
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q: got %+v, which is not on the grid of 24 columns", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other, taken := cells[[2]int{x, y}]; taken {
					t.Fatalf("panels %q and %q overlap", other, p.Title)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
		if p.Title == "" {
			t.Errorf("panel %d has no title", p.ID)
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || len(p.Targets) == 0 {
			t.Errorf("panel %q has no description or no query", p.Title)
		}
		if p.FieldConfig.Defaults.Unit == "" && p.Type != "heatmap" {
			t.Errorf("panel %q has no unit", p.Title)
		}
		refs := map[string]bool{}
		for _, target := range p.Targets {
			if target.RefID == "" || refs[target.RefID] {
				t.Errorf("panel %q: got refId %q, want one of its own", p.Title, target.RefID)
			}
			refs[target.RefID] = true
			if target.Datasource.UID != "${datasource}" || p.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q: got data source %q, want the one that is chosen", p.Title, target.Datasource.UID)
			}
		}
	}
}

// TestAlerts_AreTested wants each alert to fire in some test of the rules. Whether it does, and that no other does,
// promtool knows.
func TestAlerts_AreTested(t *testing.T) {
	rules, err := os.ReadFile(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile(alertTestsFile)
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`(?m)^ *- alert: (\w+)$`).FindAllSubmatch(rules, -1)
	if len(alerts) == 0 {
		t.Error("there are no alerts")
	}
	for _, alert := range alerts {
		if !bytes.Contains(tests, fmt.Appendf(nil, `alertname="%s"`, alert[1])) {
			t.Errorf("%s fires in no test of %s", alert[1], alertTestsFile)
		}
	}
}

// TestPrometheus has a Prometheus with the documented configuration scrape the server, over both ways, before and after
// reloads, while clients do a bit of everything. Then it asks it everything that the alerts and the dashboard would.
func TestPrometheus(t *testing.T) {
	prometheus, promtool := findProgram(t, "prometheus"), findProgram(t, "promtool")
	t.Parallel()
	const site = `http://localhost {
		metrics /metrics
		chat_broadcast /chat/* {
			rate 3 1h
		}
		chat_broadcast /kept/* {
			history 10
		}
		respond /x "%s"
	}`
	options := withEngine("file " + t.TempDir())
	s := startProcess(t, options, fmt.Sprintf(site, "first"))
	alerts, err := filepath.Abs(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	recipe := strings.NewReplacer("alerts.yml", strconv.Quote(alerts), "localhost:2019", s.admin).
		Replace(docBlock(t, "recipe: prometheus"))
	p := startPrometheus(t, prometheus, fmt.Sprintf(`global:
  scrape_interval: %[1]s
  evaluation_interval: %[1]s
%[2]s
  - job_name: site
    static_configs:
      - targets: ["%[3]s"]
`, scrapeInterval, recipe, s.http))

	// scraped waits until both targets have been scraped anew.
	scraped := func() {
		t.Helper()
		now := float64(time.Now().UnixMilli()) / 1000
		p.waitFor(fmt.Sprintf(`count(timestamp(caddy_chat_broadcast_clients) > %.3f)`, now), 2)
	}
	scraped() // a counter's rate is its growth since the first time
	talks, stay, left := 0, 0.0, value(scrapeAt(t, s.admin)["closes_total"], "1000", "")
	talk := func() {
		t.Helper()
		leaver := s.join("/chat/a")
		talks++
		kept := s.join(fmt.Sprint("/kept/", talks)) // in a hub of the engine
		kept.text("kept")
		kept.wantText("kept")
		peers := []*peer{s.join("/chat/a"), s.join("/chat/a"), s.join("/chat/b"), kept}
		stay += float64(len(peers))
		peers[0].text("one")
		peers[0].send(websocket.BinaryMessage, "two")
		peers[0].text("three")
		peers[0].text("over the rate")
		for _, to := range []*peer{leaver, peers[0], peers[1]} {
			for range 3 {
				to.next()
			}
		}
		leaver.send(websocket.CloseMessage, "\x03\xe8")
		leaver.wantEOF()
		leaver.conn.Close()
		s.refused(http.StatusForbidden, "/chat/b", "Origin: http://evil.example\r\n")
		left++
		p.waitFor(`caddy_chat_broadcast_closes_total{code="1000"}`, left)
		p.waitFor(`caddy_chat_broadcast_clients`, stay)
	}
	talk()
	for n := range 2 {
		if err := s.post(options, fmt.Sprintf(site, fmt.Sprint(n))); err != nil {
			t.Fatal(err)
		}
		scraped()
	}
	talk()

	t.Run("scrapes", func(t *testing.T) {
		p.waitFor(`up`, 1)
		p.waitFor(`count(up)`, 2)
		for _, counter := range []string{"joins_total", "closes_total", "messages_sent_total", "delivery_duration_seconds_count"} {
			p.waitFor(`resets(caddy_chat_broadcast_`+counter+`[5m])`, 0)
		}
		// A scrape may come while a reload replaces the admin endpoint, or take long on a busy machine.
		excused := regexp.MustCompile(`(context deadline exceeded|EOF|connection refused|connection reset by peer)"`)
		for line := range bytes.Lines(p.log()) {
			failed := bytes.Contains(line, []byte(`msg="Scrape failed"`)) && !excused.Match(line)
			if failed || bytes.Contains(line, []byte("level=warn")) || bytes.Contains(line, []byte("level=error")) {
				t.Errorf("Prometheus logs %s", line)
			}
		}
	})

	t.Run("metrics are as they should be", func(t *testing.T) {
		var ours []byte
		for line := range strings.Lines(request(t, http.MethodGet, "http://"+s.admin+"/metrics", nil).body) {
			if strings.Contains(line, "caddy_chat_broadcast_") { // Caddy's own have their faults
				ours = append(ours, line...)
			}
		}
		cmd := exec.Command(promtool, "check", "metrics")
		cmd.Stdin = bytes.NewReader(ours)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
	})

	t.Run("alerts", func(t *testing.T) {
		for _, args := range [][]string{{"check", "rules", alertsFile}, {"test", "rules", alertTestsFile}} {
			if out, err := exec.Command(promtool, args...).CombinedOutput(); err != nil {
				t.Errorf("promtool %v: %v\n%s", args, err, out)
			}
		}
		var rules struct {
			Groups []struct {
				Rules []struct{ Name, Query, Health, LastError string }
			}
		}
		if err := p.get("rules", nil, &rules); err != nil || len(rules.Groups) != 1 {
			t.Fatalf("got %d groups of rules and error %v, want one", len(rules.Groups), err)
		}
		for _, rule := range rules.Groups[0].Rules {
			if rule.Health != "ok" {
				t.Errorf("%s is %s: %s", rule.Name, rule.Health, rule.LastError)
			}
			if _, err := p.query(rule.Query); err != nil {
				t.Errorf("%s: %v", rule.Name, err)
			}
			p.checkSelectors(t, rule.Query)
		}
	})

	t.Run("dashboard", func(t *testing.T) {
		d := readDashboard(t)
		labelValues := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)
		legend := regexp.MustCompile(`{{(\w+)}}`)
		replace := []string{"$__rate_interval", "1m"}
		for _, v := range d.Templating.List {
			if v.Type != "query" {
				continue
			}
			var q struct{ Query string }
			if err := json.Unmarshal(v.Query, &q); err != nil {
				t.Fatalf("variable %s: %v", v.Name, err)
			}
			match := labelValues.FindStringSubmatch(strings.NewReplacer(replace...).Replace(q.Query))
			if match == nil {
				t.Fatalf("variable %s: got query %q, want label_values", v.Name, q.Query)
			}
			var values []string
			err := p.get("label/"+match[2]+"/values", url.Values{"match[]": {match[1]}}, &values)
			if err != nil || len(values) != 2 {
				t.Errorf("variable %s: got values %v and error %v, want both targets'", v.Name, values, err)
			}
			replace = append(replace, "$"+v.Name, strings.Join(values, "|"))
		}
		// These are 0 where all is well.
		troubles := regexp.MustCompile(`_engine_(queue_messages|behind_messages|repaired_total|resets_total)`)
		for _, panel := range d.Panels {
			for _, target := range panel.Targets {
				expr := strings.NewReplacer(replace...).Replace(target.Expr)
				if strings.Contains(expr, "$") {
					t.Errorf("%s: got a variable that is not known in %s", panel.Title, expr)
				}
				p.checkSelectors(t, expr)
				got, err := p.query(expr)
				if err != nil {
					t.Errorf("%s: %s: %v", panel.Title, expr, err)
				}
				if !slices.ContainsFunc(got, func(s promSeries) bool { return s.value() > 0 || troubles.MatchString(expr) }) {
					t.Errorf("%s: got %v for %s, want something above zero", panel.Title, got, expr)
				}
				for _, label := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
					if !slices.ContainsFunc(got, func(s promSeries) bool { return s.Metric[label[1]] != "" }) {
						t.Errorf("%s: got no label %s, which the legend has, for %s", panel.Title, label[1], expr)
					}
				}
			}
		}
	})
}
