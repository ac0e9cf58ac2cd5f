package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// prepare parses the flags of a scenario and prepares to start its servers. The caller must call closeIt.
func prepare(f *flag.FlagSet, args []string, o *options) (ctx context.Context, l *launcher, closeIt func(), err error) {
	program := launcherFlags(f)
	loadFlags(f, o)
	if err := parse(f, args, o); err != nil {
		return nil, nil, nil, err
	}
	return newLauncher(*program)
}

// startForScenario starts Caddy with an admin endpoint for a run of o, and sets the URL and pid in o.
func (l *launcher) startForScenario(ctx context.Context, o *options) (server *exec.Cmd, admin, config string, err error) {
	address, err := freeAddress()
	if err != nil {
		return nil, "", "", err
	}
	if admin, err = freeAddress(); err != nil {
		return nil, "", "", err
	}
	config = caddyfile(admin, "", "http", address, "header X-Config 0", "")
	if server, err = l.startCaddy(ctx, address, config); err != nil {
		return nil, "", "", err
	}
	o.url, o.pid = "ws://"+address+"/{hub}", server.Process.Pid
	if _, err := readUsage(o.pid); err != nil {
		o.pid = 0 // not on this system
	}
	return server, admin, config, nil
}

// reloadCommand loads a different configuration into Caddy again and again, under load.
func reloadCommand(name string, args []string) error {
	o := options{clients: 50, hubs: 5, size: 128, rateLow: 100, rateHigh: 100, progress: os.Stderr}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	reloads := f.Int("reloads", 20, "how many reloads")
	every := f.Duration("every", 200*time.Millisecond, "time between two reloads")
	ctx, l, closeIt, err := prepare(f, args, &o)
	if err != nil {
		return err
	}
	defer closeIt()
	server, admin, config, err := l.startForScenario(ctx, &o)
	if err != nil {
		return err
	}
	defer stop(server)

	o.duration = time.Duration(*reloads) * (*every + 10*time.Second) // closing stop ends the run
	o.stop = make(chan struct{})
	var reloadErr error // owned by the goroutine until it closes stop
	o.started = func() {
		go func() { // ends with the last reload and then closes stop
			defer close(o.stop)
			for i := range *reloads {
				pause(ctx, *every)
				next := strings.Replace(config, "X-Config 0", "X-Config "+strconv.Itoa(i+1), 1)
				if reloadErr = postConfig(ctx, admin, next); reloadErr != nil {
					return
				}
			}
			pause(ctx, *every)
		}()
	}
	r, err := measure(ctx, o)
	if err != nil {
		return err
	}
	<-o.stop
	if reloadErr != nil {
		return reloadErr
	}
	return report(o.asJSON, r, append([][2]string{{"reloads", strconv.Itoa(*reloads)}}, r.rows()...), r.Faults)
}

// postConfig loads a Caddyfile through Caddy's admin endpoint.
func postConfig(ctx context.Context, admin, config string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+admin+"/load", strings.NewReader(config))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "text/caddyfile")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		why, err := io.ReadAll(response.Body)
		return errors.Join(fmt.Errorf("loading a configuration: %s: %s", response.Status, why), err)
	}
	return nil
}

// slowCommand makes the same run twice, without and with slow clients. By default a run is long enough for Caddy to close
// clients that do not read (write_timeout), and for these to reconnect.
func slowCommand(name string, args []string) error {
	o := options{clients: 100, hubs: 1, size: 4096, rateLow: 100, rateHigh: 100, slow: 5, duration: 30 * time.Second, progress: os.Stderr}
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	ctx, l, closeIt, err := prepare(f, args, &o)
	if err != nil {
		return err
	}
	defer closeIt()
	var results [2]result
	for i, slow := range []float64{0, o.slow} {
		o.slow = slow
		server, _, _, err := l.startForScenario(ctx, &o)
		if err != nil {
			return err
		}
		results[i], err = measure(ctx, o)
		stop(server)
		if err != nil {
			return err
		}
	}
	without, with := results[0], results[1]
	all := without.Faults
	if with.Faults.any() {
		all = with.Faults
	}
	rows := append([][2]string{{"WITHOUT SLOW CLIENTS"}}, without.rows()...)
	rows = append(append(rows, [2]string{"WITH SLOW CLIENTS"}), with.rows()...)
	rows = append(rows, [2]string{"p99, with / without", fmt.Sprintf("%.2f", with.Latency.P99/max(0.001, without.Latency.P99))})
	return report(o.asJSON, map[string]result{"without": without, "with": with}, rows, all)
}
