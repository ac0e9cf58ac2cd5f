//go:build unix

package redisengine

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "")
	if err == nil {
		err = certificate.create(dir)
	}
	if err != nil {
		panic(err)
	}
	flag.Set("test.parallel", "8")               // tests mostly wait, for servers and for deadlines
	os.Setenv("SSL_CERT_FILE", certificate.cert) // the roots that the tests trust
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// certificate is that of the servers of the tests, for localhost.
var certificate certificateFiles

// certificateFiles are the names of files.
type certificateFiles struct{ cert, key string }

func (c *certificateFiles) create(dir string) error {
	c.cert, c.key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(c.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o600),
		os.WriteFile(c.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
	)
}

// bounds are those of most tests.
var bounds = engine.Bounds{Messages: 1000, Bytes: 1 << 20, Age: time.Hour, Receipts: 1000}

// A node is a session of a test, with its monitor.
type node struct {
	*Session
	t testing.TB

	mu       sync.Mutex
	told     bool
	state    error
	ups      int
	states   []string
	warnings []string
}

// connect starts a session and waits until it is connected. The test closes it.
func connect(t testing.TB, url string) *node {
	t.Helper()
	n := begin(t, url)
	poll(t, n.wantUp)
	return n
}

// begin starts a session. The test closes it.
func begin(t testing.TB, url string) *node {
	t.Helper()
	options, err := ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t}
	n.Session = Connect(options, DefaultPrefix, "machine", n)
	t.Cleanup(func() { n.Close() })
	return n
}

func (n *node) State(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.told, n.state = true, err
	n.states = append(n.states, fmt.Sprint(err))
	if err == nil {
		n.ups++
	}
}

func (n *node) Warn(text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.warnings = append(n.warnings, text)
}

func (n *node) wantUp() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.told || n.state != nil {
		return fmt.Errorf("the session is not connected: %w", n.state)
	}
	return nil
}

// awaitDown waits until the session is down for a reason that contains the text.
func (n *node) awaitDown(text string) {
	n.t.Helper()
	poll(n.t, func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.state == nil || !strings.Contains(n.state.Error(), text) {
			return fmt.Errorf("the states of the session are %q, want one with %q", n.states, text)
		}
		return nil
	})
}

// awaitUps waits until the session was connected more often than before.
func (n *node) awaitUps(before int) {
	n.t.Helper()
	poll(n.t, func() error {
		if n.countUps() <= before {
			return errors.New("the session has not connected again")
		}
		return n.wantUp()
	})
}

// countUps returns how often the session was connected.
func (n *node) countUps() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ups
}

func (n *node) wantWarning(text string) {
	n.t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !slices.ContainsFunc(n.warnings, func(w string) bool { return strings.Contains(w, text) }) {
		n.t.Errorf("the warnings are %q, want one with %q", n.warnings, text)
	}
}

func (n *node) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// deadline returns a context that ends soon.
func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// ignore returns the error of a call.
func ignore[T any](_ T, err error) error { return err }

// open opens a hub.
func (n *node) open(hub string) *receiver {
	n.t.Helper()
	return n.openWith(hub, bounds)
}

func (n *node) openWith(hub string, b engine.Bounds) *receiver {
	n.t.Helper()
	r := &receiver{t: n.t}
	ctx, cancel := n.context()
	defer cancel()
	snapshot, err := n.Open(ctx, hub, b, r)
	if err != nil {
		n.t.Fatalf("Open returned %v", err)
	}
	r.begin(snapshot)
	return r
}

// publish publishes texts as one batch.
func (n *node) publish(hub string, texts ...string) []engine.Receipt {
	n.t.Helper()
	return n.publishBatch(hub, engine.Batch{Bounds: bounds, Messages: messages(texts...)})
}

func (n *node) publishBatch(hub string, batch engine.Batch) []engine.Receipt {
	n.t.Helper()
	ctx, cancel := n.context()
	defer cancel()
	receipts, err := n.Publish(ctx, hub, batch)
	if err != nil {
		n.t.Fatalf("Publish returned %v", err)
	}
	return receipts
}

func messages(texts ...string) []engine.Message {
	all := make([]engine.Message, len(texts))
	for i, text := range texts {
		all[i].Data = []byte(text)
	}
	return all
}

// keyed returns a message with a key.
func keyed(text, key string, attempt engine.Attempt) engine.Message {
	m := engine.Message{Data: []byte(text), Attempt: attempt}
	copy(m.Key[:], key)
	return m
}

func (n *node) read(hub string, after engine.Position) engine.Snapshot {
	n.t.Helper()
	ctx, cancel := n.context()
	defer cancel()
	snapshot, err := n.Read(ctx, hub, after)
	if err != nil {
		n.t.Fatalf("Read returned %v", err)
	}
	return snapshot
}

func (n *node) announce(hub string, users ...engine.UserCount) {
	n.t.Helper()
	ctx, cancel := n.context()
	defer cancel()
	if err := n.Announce(ctx, hub, users); err != nil {
		n.t.Fatalf("Announce returned %v", err)
	}
}

func (n *node) renew(known ...engine.Known) engine.Renewal {
	n.t.Helper()
	ctx, cancel := n.context()
	defer cancel()
	renewal, err := n.Renew(ctx, engine.Status{Name: "machine"}, known)
	if err != nil {
		n.t.Fatalf("Renew returned %v", err)
	}
	return renewal
}

// A receiver notes what it gets.
type receiver struct {
	t testing.TB

	mu       sync.Mutex
	snapshot engine.Snapshot
	entries  []received // of the snapshot, and those that came
	version  uint64
	users    map[engine.NodeID]map[string]int
}

// A received entry.
type received struct {
	engine.Position
	text string
}

func (r *receiver) begin(s engine.Snapshot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.snapshot = s
	var all []received
	for i, e := range s.Entries {
		all = append(all, received{engine.Position{Epoch: s.Epoch, Seq: s.Base + uint64(i) + 1}, string(e.Data)})
	}
	r.entries = append(all, r.entries...)
	for node, users := range s.Users {
		r.setUsersLocked(node, users)
	}
	r.version = max(r.version, s.Version)
}

func (r *receiver) Entries(epoch string, first uint64, entries []engine.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, e := range entries {
		r.entries = append(r.entries, received{engine.Position{Epoch: epoch, Seq: first + uint64(i)}, string(e.Data)})
	}
}

func (r *receiver) Users(version uint64, node engine.NodeID, users []engine.UserCount) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.setUsersLocked(node, users)
	r.version = version
}

func (r *receiver) setUsersLocked(node engine.NodeID, users []engine.UserCount) {
	if r.users == nil {
		r.users = map[engine.NodeID]map[string]int{}
	}
	if r.users[node] == nil {
		r.users[node] = map[string]int{}
	}
	for _, u := range users {
		r.users[node][u.User] = u.Clients
		if u.Clients == 0 {
			delete(r.users[node], u.User)
		}
	}
	if len(r.users[node]) == 0 {
		delete(r.users, node)
	}
}

func (r *receiver) log() []received {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.entries)
}

// position returns the position of the newest entry.
func (r *receiver) position() engine.Position {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.entries) == 0 {
		return r.snapshot.Position
	}
	return r.entries[len(r.entries)-1].Position
}

// known returns what a node with this receiver knows.
func (r *receiver) known(hub string) engine.Known {
	position := r.position()
	r.mu.Lock()
	defer r.mu.Unlock()
	return engine.Known{Hub: hub, Position: position, Version: r.version, Bounds: bounds}
}

// await waits until the receiver has an entry.
func (r *receiver) await(position engine.Position) {
	r.t.Helper()
	poll(r.t, func() error {
		if got := r.position(); got != position {
			return fmt.Errorf("the receiver is at %v, want %v", got, position)
		}
		return nil
	})
}

// wantTexts waits until the receiver has exactly these texts.
func (r *receiver) wantTexts(want ...string) {
	r.t.Helper()
	poll(r.t, func() error {
		var got []string
		for _, e := range r.log() {
			got = append(got, e.text)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("the receiver has %q, want %q", got, want)
		}
		return nil
	})
}

// awaitUsers waits until the receiver knows these users of a node.
func (r *receiver) awaitUsers(node engine.NodeID, want map[string]int) {
	r.t.Helper()
	poll(r.t, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if got := r.users[node]; !maps.Equal(got, want) {
			return fmt.Errorf("the users of node %s are %v, want %v", node, got, want)
		}
		return nil
	})
}

func TestOpen_ReturnsWhatWasPublished(t *testing.T) {
	redis := startRedis(t)
	one, two := connect(t, redis.url()), connect(t, redis.url())
	first := one.publish("hub", "a", "b")
	one.publish("hub", "c")

	r := two.open("hub")
	r.wantTexts("a", "b", "c")
	if got, want := r.position(), (engine.Position{Epoch: first[0].Epoch, Seq: 3}); got != want {
		t.Errorf("the snapshot ends at %v, want %v", got, want)
	}
	if age := time.Since(r.snapshot.Entries[0].At); age < 0 || age > time.Minute {
		t.Errorf("an entry that was just published is %v old", age)
	}
}

func TestPublish_ReachesAllNodesInOneOrder(t *testing.T) {
	redis := startRedis(t)
	nodes := []*node{connect(t, redis.url()), connect(t, redis.url()), connect(t, redis.url())}
	var receivers []*receiver
	for _, n := range nodes {
		receivers = append(receivers, n.open("hub"))
	}
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			for j := range 100 {
				n.publish("hub", fmt.Sprintf("%d-%d", i, j))
			}
		})
	}
	wg.Wait()
	last := nodes[0].publish("hub", "last")[0].Position
	for _, r := range receivers {
		r.await(last)
		if got, want := r.log(), receivers[0].log(); !slices.Equal(got, want) || len(got) != 301 {
			t.Errorf("two receivers differ: %v and %v", got, want)
		}
	}
}

func TestClose_EndsEverything(t *testing.T) {
	redis := startRedis(t)
	n := connect(t, redis.url())
	n.open("hub")
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if _, err := n.Publish(t.Context(), "hub", engine.Batch{Bounds: bounds, Messages: messages("a")}); !errors.Is(err, engine.ErrUnavailable) {
		t.Errorf("Publish after Close returned %v, want ErrUnavailable", err)
	}
	if got := redis.do("ZCARD", "chat_broadcast:nodes"); got != "0" {
		t.Errorf("after Close there are %s leases, want 0", got)
	}
}
