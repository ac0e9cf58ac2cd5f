package chatbroadcast

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// withLog adds a log file to global options.
func withLog(options, file string) string {
	return fmt.Sprintf("%s\n\tlog {\n\t\toutput file %s\n\t\tformat json\n\t}", options, file)
}

// TestCluster_StartsWithoutRedis starts Caddy before Redis is there. Whatever needs no hub is served, and hubs are there as soon as
// Redis is.
func TestCluster_StartsWithoutRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	r.kill()
	p := startProcess(t, withEngine(r.engine()), clusterSites)
	if got := request(t, http.MethodGet, p.url+"static", nil); got.status != http.StatusOK || got.body != "static" {
		t.Errorf("got %v, want the page", got)
	}
	_, resp := handshakeOn(t, p.dial(), handshakeRequest(p.http, "/big/late", ""))
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("got status %s and Retry-After %q for a handshake, want 503 with one", resp.Status, resp.Header.Get("Retry-After"))
	}
	if got := p.publish("/big/late", "early"); got.status != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
		t.Errorf("got status %d and Retry-After %q for a POST, want 503 with one", got.status, got.header.Get("Retry-After"))
	}
	r.start()
	eventually(t, "a POST to be published", func() bool { return p.publish("/big/late", "late").status == http.StatusAccepted })
	peer := p.joinEvents("/big/late")
	peer.wantMessages(1, "late")
}

// TestCluster_LogSaysWhatToChange starts Caddy with a Redis that it cannot use, or should not.
func TestCluster_LogSaysWhatToChange(t *testing.T) {
	t.Parallel()
	locked := startRedis(t, "--requirepass", "right")
	evicting := startRedis(t, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
	replica := startRedis(t, "--replicaof", "127.0.0.1 1")
	for _, tc := range []struct {
		name, url string
		wants     []string
	}{
		{"no password", "redis://" + locked.address(), []string{"a password is needed", "redis://:password@host"}},
		{"wrong password", "redis://:wrong@" + locked.address(), []string{"wrong user or password", "URL"}},
		{"an old version", "redis://" + startOldRedis(t), []string{"6.2.14", "7.0 or newer"}},
		{"an evicting policy", "redis://" + evicting.address(), []string{"maxmemory-policy", "noeviction"}},
		{"a replica", "redis://" + replica.address(), []string{"replica", "primary"}},
		{"something else", "redis://" + startHTTP(t), []string{"does not speak the protocol of Redis"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "log")
			p := startProcess(t, withLog(withEngine("redis "+tc.url), file), clusterSites)
			var log string
			defer func() {
				if t.Failed() {
					t.Logf("the log is:\n%s", log)
				}
			}()
			eventually(t, fmt.Sprintf("%q in the log", tc.wants), func() bool {
				b, err := os.ReadFile(file)
				log = string(b)
				return err == nil && containsAll(log, tc.wants)
			})
			if strings.Contains(log, ":wrong@") {
				t.Error("the password is in the log")
			}
			if got := request(t, http.MethodGet, p.url+"static", nil); got.status != http.StatusOK {
				t.Errorf("got status %d for a page, want 200", got.status)
			}
			p.terminate()
		})
	}
}

// containsAll reports whether one line of a text contains all words.
func containsAll(text string, words []string) bool {
	for line := range strings.Lines(text) {
		all := true
		for _, word := range words {
			all = all && strings.Contains(line, word)
		}
		if all {
			return true
		}
	}
	return false
}

// startHTTP starts a server that is no Redis, and returns its address.
func startHTTP(t *testing.T) string {
	return startServer(t, func(conn net.Conn) {
		_, _ = bufio.NewReader(conn).ReadString('\n') // whatever comes, the answer is the same
		_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
	})
}

// startOldRedis starts a server that says that it is Redis 6.2, and returns its address.
func startOldRedis(t *testing.T) string {
	const info = "redis_version:6.2.14\r\nredis_mode:standalone\r\nrun_id:0123456789012345678901234567890123456789\r\nrole:master\r\n" +
		"master_replid:0123456789012345678901234567890123456789\r\naof_enabled:0\r\nmaxmemory_policy:noeviction\r\n"
	return startServer(t, func(conn net.Conn) {
		r := bufio.NewReader(conn)
		for {
			command, err := readCommand(r)
			if err != nil {
				return
			}
			answer := "+OK\r\n"
			switch strings.ToUpper(command[0]) {
			case "HELLO":
				answer = "%3\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n$5\r\nproto\r\n:3\r\n"
			case "INFO":
				answer = fmt.Sprintf("$%d\r\n%s\r\n", len(info), info)
			case "CONFIG":
				answer = "%0\r\n"
			case "PING":
				answer = "+PONG\r\n"
			}
			if _, err := io.WriteString(conn, answer); err != nil {
				return
			}
		}
	})
}

// readCommand reads a command of a client of Redis.
func readCommand(r *bufio.Reader) ([]string, error) {
	number := func(kind string) (int, error) {
		line, err := r.ReadString('\n')
		if err == nil && !strings.HasPrefix(line, kind) {
			err = errors.New("malformed command")
		}
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := number("*")
	if err != nil || n < 1 {
		return nil, errors.Join(err, io.ErrUnexpectedEOF)
	}
	words := make([]string, n)
	for i := range words {
		size, err := number("$")
		if err != nil {
			return nil, err
		}
		word := make([]byte, size+len("\r\n"))
		if _, err := io.ReadFull(r, word); err != nil {
			return nil, err
		}
		words[i] = string(word[:size])
	}
	return words, nil
}

// startServer serves connections until the test ends, and returns the address.
func startServer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var serving sync.WaitGroup
	conns := map[net.Conn]bool{}
	serving.Go(func() { // ends when the listener is closed
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[conn] = true
			mu.Unlock()
			serving.Go(func() { // ends with the connection
				serve(conn)
				conn.Close()
				mu.Lock()
				delete(conns, conn)
				mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		mu.Lock()
		for conn := range conns {
			conn.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return listener.Addr().String()
}

// TestCluster_UsersOfAKilledNodeLeave kills a node. Its clients have left for those of the others within 24 s: the lease of 15 s, and
// a renewal each to find that out.
func TestCluster_UsersOfAKilledNodeLeave(t *testing.T) {
	t.Parallel()
	const site = `http://localhost {
	chat_broadcast /users/* {
		hub {http.request.uri.path}
		presence
	}
}`
	r := startRedis(t)
	p, q := startProcess(t, withEngine(r.engine()), site), startProcess(t, withEngine(r.engine()), site)
	ada, bob := p.joinEvents("/users/x"), q.joinEvents("/users/x")
	defer ada.conn.Close()
	defer bob.conn.Close()
	count := func() int { return ada.ask(map[string]any{}).Clients }
	eventually(t, "both clients to be there", func() bool { return count() == 2 })
	_ = q.cmd.Process.Kill()
	<-q.exited
	began := time.Now()
	if got := count(); got != 2 {
		t.Errorf("got %d clients right after the kill, want 2: the node may come back", got)
	}
	eventually(t, "the client of the killed node to have left", func() bool { return count() == 1 })
	if took := time.Since(began); took > 24*time.Second {
		t.Errorf("the client of the killed node left after %v, want at most 24 s", took)
	}
}
