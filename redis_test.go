package chatbroadcast

import (
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// A redisServer is a Redis of a test, in a process of its own.
type redisServer struct {
	t    testing.TB
	port int
	dir  string
	args []string
	cmd  *exec.Cmd

	before []string // arguments that must be the first
}

// startRedis starts a Redis that keeps nothing on the disk, unless the arguments say otherwise. The test is skipped if the program
// is missing.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	findProgram(t, "redis-server")
	r := &redisServer{t: t, port: freePort(), dir: t.TempDir(), args: append([]string{"--save", ""}, args...)}
	r.start()
	t.Cleanup(r.kill)
	return r
}

// start starts it, also again after kill.
func (r *redisServer) start() {
	r.t.Helper()
	args := append(slices.Clone(r.before), "--port", fmt.Sprint(r.port), "--bind", "127.0.0.1", "--dir", r.dir, "--logfile", filepath.Join(r.dir, "log"))
	args = append(args, r.args...)
	r.cmd = exec.Command("redis-server", args...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "Redis", func() bool {
		conn, err := net.Dial("tcp", r.address())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

func (r *redisServer) address() string { return fmt.Sprint("127.0.0.1:", r.port) }

// kill ends it at once.
func (r *redisServer) kill() { r.signal(syscall.SIGKILL); _ = r.cmd.Wait() }

func (r *redisServer) signal(s syscall.Signal) { _ = r.cmd.Process.Signal(s) } // fails if it is gone

// engine returns the line of a Caddyfile with this engine.
func (r *redisServer) engine() string { return "redis redis://" + r.address() }
