package conn

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"
)

// patience is how long a test waits for what must happen, before it fails.
const patience = 10 * time.Second

// dialed returns both ends of a connection of the given network.
func dialed(t testing.TB, network, address string) (server, client net.Conn) {
	t.Helper()
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err = net.Dial(network, listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return ready(t, server, client)
}

// ready ends a test that waits too long, and closes what it leaves open.
func ready(t testing.TB, server, client net.Conn) (net.Conn, net.Conn) {
	t.Helper()
	t.Cleanup(func() { server.Close(); client.Close() })
	for _, nc := range []net.Conn{server, client} {
		if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
	}
	return server, client
}

func tcp(t testing.TB) (server, client net.Conn) { return dialed(t, "tcp", "127.0.0.1:0") }

func unixSocket(t testing.TB) (server, client net.Conn) {
	return dialed(t, "unix", filepath.Join(t.TempDir(), "socket"))
}

func pipe(t testing.TB) (server, client net.Conn) {
	server, client = net.Pipe()
	return ready(t, server, client)
}

// overTLS returns both ends of TLS above the given connection, after the handshake.
func overTLS(t testing.TB, server, client net.Conn) (*tls.Conn, *tls.Conn) {
	t.Helper()
	s := tls.Server(server, &tls.Config{
		Certificates:           []tls.Certificate{certificate()},
		SessionTicketsDisabled: true, // a pipe would wait until somebody reads them
	})
	c := tls.Client(client, &tls.Config{InsecureSkipVerify: true})
	var handshakes sync.WaitGroup
	for _, end := range []*tls.Conn{s, c} {
		handshakes.Go(func() {
			if err := end.Handshake(); err != nil {
				t.Error(err)
			}
		})
	}
	handshakes.Wait()
	return s, c
}

func secured(t testing.TB) (server, client net.Conn) {
	t.Helper()
	server, client = tcp(t)
	return overTLS(t, server, client)
}

func securedPipe(t testing.TB) (server, client net.Conn) {
	t.Helper()
	server, client = pipe(t)
	s, c := overTLS(t, server, client)
	return s, c
}

var certificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

// A hidden is a connection in a wrapper that shows it with NetConn.
type hidden struct{ net.Conn }

func (h hidden) NetConn() net.Conn { return h.Conn }

// A raw is a connection in a wrapper that shows it with Raw, as Caddy's proxy_protocol does.
type raw struct{ net.Conn }

func (r raw) Raw() net.Conn { return r.Conn }

// An opaque is a connection in a wrapper that hides it.
type opaque struct{ net.Conn }

// wrappedBy returns a kind of connection in a wrapper.
func wrappedBy(wrapper func(net.Conn) net.Conn, kind func(testing.TB) (net.Conn, net.Conn)) func(testing.TB) (net.Conn, net.Conn) {
	return func(t testing.TB) (net.Conn, net.Conn) {
		t.Helper()
		server, client := kind(t)
		return wrapper(server), client
	}
}

func asHidden(nc net.Conn) net.Conn { return hidden{nc} }
func asRaw(nc net.Conn) net.Conn    { return raw{nc} }
func asOpaque(nc net.Conn) net.Conn { return opaque{nc} }

// The kinds of connections, and what they can do on Unix.
var kinds = []struct {
	name                      string
	connect                   func(testing.TB) (server, client net.Conn)
	tries, waits, readsAhead  bool
	closesWrite, showsSockets bool
}{
	{"TCP", tcp, true, true, false, true, true},
	{"Unix", unixSocket, true, true, false, true, true},
	{"TLS", secured, runtime.GOOS == "linux", true, true, true, true},
	{"TLS on a pipe", securedPipe, false, false, false, true, false},
	{"pipe", pipe, false, false, false, false, false},
	{"TCP with NetConn", wrappedBy(asHidden, tcp), false, false, false, false, true},
	{"TCP with Raw", wrappedBy(asRaw, tcp), false, false, false, true, true},
	{"pipe with Raw", wrappedBy(asRaw, pipe), false, false, false, false, false},
	{"TCP in a wrapper", wrappedBy(asOpaque, tcp), false, false, false, false, false},
}

// received reads n bytes.
func received(t testing.TB, r io.Reader, n int) string {
	t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		t.Error(err)
	}
	return string(p)
}

// send writes without waiting for the reader.
func send(t testing.TB, w io.Writer, text string) {
	t.Helper()
	var writer sync.WaitGroup
	t.Cleanup(writer.Wait)
	writer.Go(func() {
		if _, err := io.WriteString(w, text); err != nil {
			t.Error(err)
		}
	})
}

func TestConn_ReadsWhatTheServerHadReadFirst(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, []byte("early"))
			send(t, client, " and late")
			if got := received(t, c, 3); got != "ear" {
				t.Errorf("got %q", got)
			}
			p := make([]byte, 100)
			if n, err := c.Read(p); err != nil || string(p[:n]) != "ly" {
				t.Errorf("got %q, %v, want the rest of what was read early", p[:n], err)
			}
			if got := received(t, c, len(" and late")); got != " and late" {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestConn_Writes(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, []byte{})
			send(t, c, "hello")
			if got := received(t, client, 5); got != "hello" {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestConn_DeadlinesEndReadsAndWrites(t *testing.T) {
	past := time.Unix(1, 0)
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, _ := kind.connect(t)
			c := Wrap(server, nil)
			if err := c.SetReadDeadline(past); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("reading: got %d bytes, %v", n, err)
			}
			if err := c.SetWriteDeadline(past); err != nil {
				t.Fatal(err)
			}
			if n, err := c.Write(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("writing: got %d bytes, %v", n, err)
			}
		})
	}
}

func TestConn_CloseWriteEndsOneHalf(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, nil)
			var peer sync.WaitGroup
			defer peer.Wait()
			if kind.closesWrite {
				peer.Go(func() {
					if n, err := client.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
						t.Errorf("the peer got %d bytes, %v, want the end", n, err)
					}
				})
			}
			if got := c.CloseWrite(); got != kind.closesWrite {
				t.Fatalf("got %v, want %v", got, kind.closesWrite)
			}
			peer.Wait()
			send(t, client, "still")
			if got := received(t, c, 5); got != "still" {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestConn_CloseWriteOfAClosedConnectionFails(t *testing.T) {
	server, _ := tcp(t)
	c := Wrap(server, nil)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if c.CloseWrite() {
		t.Error("got true")
	}
}

func TestConn_AbortEndsReadsAndWritesAtOnce(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			server, client := kind.connect(t)
			c := Wrap(server, nil)
			var reader sync.WaitGroup
			reader.Go(func() {
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("reading goes on")
				}
			})
			c.Abort()
			c.Abort() // twice is once
			reader.Wait()
			if _, err := c.Write([]byte("x")); err == nil {
				t.Error("writing goes on")
			}
			if _, err := client.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the peer got %v, want the end", err)
			}
		})
	}
}
