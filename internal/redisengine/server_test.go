//go:build unix

package redisengine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A redisServer is a Redis of a test: a process of its own on a free port, with its files in a temporary folder.
type redisServer struct {
	t       testing.TB
	dir     string
	port    int
	args    []string
	process *exec.Cmd
}

// startRedis starts a Redis without persistence, unless args say otherwise. They are those of redis-server.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("redis-server is not installed")
	}
	r := &redisServer{t: t, dir: t.TempDir(), port: freePort(), args: args}
	t.Cleanup(r.kill)
	r.start()
	return r
}

// freePort returns a TCP port on which nobody listens, and does not return it again. It is below those that the system gives
// to outgoing connections and to listeners that name no port: they could take it before the server does, or while the server
// starts anew.
func freePort() int {
	for {
		port := 10_000 + rand.IntN(20_000)
		if _, taken := takenPorts.LoadOrStore(port, true); taken {
			continue
		}
		if listener, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			listener.Close()
			return port
		}
	}
}

var takenPorts sync.Map // by number

func (r *redisServer) address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.port)) }

func (r *redisServer) url() string { return "redis://" + r.address() }

// start starts the process, and waits until it answers. It has the files of the process before.
func (r *redisServer) start() {
	r.t.Helper()
	r.launch()
	poll(r.t, func() error {
		_, err := r.try("PING")
		if err != nil && strings.Contains(err.Error(), "NOAUTH") {
			return nil
		}
		return err
	})
}

// launch starts the process and does not wait.
func (r *redisServer) launch() {
	r.t.Helper()
	log := filepath.Join(r.dir, "log")
	args := append([]string{
		"--port", strconv.Itoa(r.port), "--bind", "127.0.0.1", "--dir", r.dir, "--logfile", log, "--save", "",
		"--repl-diskless-sync-delay", "0",
	}, r.args...)
	r.process = exec.Command("redis-server", args...)
	if err := r.process.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// kill ends the process at once, as a crash does.
func (r *redisServer) kill() {
	if r.process == nil {
		return
	}
	r.signal(syscall.SIGKILL)
	r.signal(syscall.SIGCONT)
	r.process.Wait()
	r.process = nil
}

// restart kills the process and starts another one.
func (r *redisServer) restart() {
	r.t.Helper()
	r.kill()
	r.start()
}

// signal sends a signal to the process: SIGSTOP makes it hang until SIGCONT.
func (r *redisServer) signal(s syscall.Signal) { r.process.Process.Signal(s) }

// do runs a command and returns its answer.
func (r *redisServer) do(args ...string) string {
	r.t.Helper()
	answer, err := r.try(args...)
	if err != nil {
		r.t.Fatalf("Redis answers %v to %q", err, args)
	}
	return answer
}

// try runs a command with redis-cli, so that it does not depend on what is tested.
func (r *redisServer) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cli := exec.CommandContext(ctx, "redis-cli", append([]string{"-p", strconv.Itoa(r.port), "-e"}, args...)...)
	var stderr bytes.Buffer
	cli.Stderr = &stderr
	out, err := cli.Output()
	if err != nil {
		return "", errors.Join(err, errors.New(stderr.String()+string(out)))
	}
	return strings.TrimRight(string(out), "\n"), nil
}

// info returns a field of INFO.
func (r *redisServer) info(field string) string {
	r.t.Helper()
	for line := range strings.Lines(r.do("INFO", "everything")) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), ":"); name == field {
			return value
		}
	}
	r.t.Fatalf("INFO has no %s", field)
	return ""
}

// cpu returns how much time of a processor the process has used.
func (r *redisServer) cpu() time.Duration {
	r.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.process.Process.Pid))
	if err != nil {
		r.t.Skip(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond // in hundredths of a second, see proc(5)
}

// patience is how long a test waits for what must happen.
const patience = 15 * time.Second

// poll waits until the condition returns nil.
func poll(t testing.TB, condition func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(2 * time.Millisecond) {
		err := condition()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", patience, err)
		}
	}
}
