package hub

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A keyUpdater is a TLS 1.3 client that updates its keys, for which crypto/tls has no method. It writes records by hand, and
// reads with crypto/tls.
type keyUpdater struct {
	*tls.Conn
	below  net.Conn
	secret []byte // from which its keys are made (RFC 8446 §7.1)
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

// joinKeyUpdater joins a client whose peer updates its keys. below returns the connection below the server's TLS.
func joinKeyUpdater(t *testing.T, b *Hub, s *Settings, below func(net.Conn) net.Conn) (*Client, *keyUpdater) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	nc, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	_ = nc.(*net.TCPConn).SetReadBuffer(4 << 10) // so that it is full soon
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var keys bytes.Buffer
	server := tls.Server(below(accepted), &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}})
	k := &keyUpdater{Conn: tls.Client(nc, &tls.Config{InsecureSkipVerify: true, KeyLogWriter: &keys}), below: nc}
	shaken := make(chan error)
	go func() { shaken <- server.Handshake() }()
	if err := k.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	if suite := k.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Fatalf("got %s, want the cipher suite of this test", tls.CipherSuiteName(suite))
	}
	for line := range strings.Lines(keys.String()) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "CLIENT_TRAFFIC_SECRET_0" {
			k.secret, err = hex.DecodeString(f[2])
		}
	}
	if err != nil || k.secret == nil {
		t.Fatalf("no traffic secret in %q: %v", keys.String(), err)
	}
	k.makeKeys(t)

	c := joiner{address: testAddress(1)}.member(t, b, s)
	c.Attach(conn.Wrap(server, nil))
	c.Start()
	t.Cleanup(func() {
		nc.Close()
		eventually(t, "the client to finish", func() bool { return c.State() == Finished })
	})
	return c, k
}

// expand is HKDF-Expand-Label without a context (RFC 8446 §7.1).
func (k *keyUpdater) expand(t *testing.T, label string, size int) []byte {
	t.Helper()
	label = "tls13 " + label
	info := binary.BigEndian.AppendUint16(nil, uint16(size))
	info = append(info, byte(len(label)))
	info = append(append(info, label...), 0)
	out, err := hkdf.Expand(sha256.New, k.secret, string(info), size)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (k *keyUpdater) makeKeys(t *testing.T) {
	t.Helper()
	block, err := aes.NewCipher(k.expand(t, "key", 16))
	if err != nil {
		t.Fatal(err)
	}
	if k.aead, err = cipher.NewGCM(block); err != nil {
		t.Fatal(err)
	}
	k.iv, k.seq = k.expand(t, "iv", 12), 0
}

// appendRecord appends a record with content of the given type (RFC 8446 §5.2).
func (k *keyUpdater) appendRecord(dst []byte, contentType byte, content []byte) []byte {
	header := []byte{23, 3, 3, 0, 0}
	binary.BigEndian.PutUint16(header[3:], uint16(len(content)+1+k.aead.Overhead()))
	nonce := binary.BigEndian.AppendUint64(bytes.Clone(k.iv[:4]), k.seq^binary.BigEndian.Uint64(k.iv[4:]))
	k.seq++
	return k.aead.Seal(append(dst, header...), nonce, append(bytes.Clone(content), contentType), header)
}

// appendKeyUpdate appends a key update that asks for one in return (RFC 8446 §4.6.3).
func (k *keyUpdater) appendKeyUpdate(t *testing.T, dst []byte) []byte {
	t.Helper()
	dst = k.appendRecord(dst, 22, []byte{24, 0, 0, 1, 1})
	k.secret = k.expand(t, "traffic upd", 32)
	k.makeKeys(t)
	return dst
}

// TestKeyUpdates_ClientThatReadsNoAnswerIsCut has TLS fill the socket with answers to key updates, which it writes while it reads.
// Pongs between them keep crypto/tls from giving up.
func TestKeyUpdates_ClientThatReadsNoAnswerIsCut(t *testing.T) {
	b := newHub(t)
	s := defaults()
	s.PingInterval, s.PingTimeout, s.WriteTimeout = time.Second, time.Second/2, time.Second/2
	c, k := joinKeyUpdater(t, b, s, func(nc net.Conn) net.Conn { return nc })
	for c.State() == Open {
		var p []byte
		for range 50 {
			for range 14 {
				p = k.appendKeyUpdate(t, p)
			}
			p = k.appendRecord(p, 23, clientFrame(finBit|ws.PongMessage, nil))
		}
		_ = k.below.SetWriteDeadline(time.Now().Add(patience))
		if _, err := k.below.Write(p); err != nil {
			break // the server reads no more
		}
	}
	eventually(t, "the client to leave", func() bool { return c.hasLeft() })
}

// TestKeyUpdates_AreAnsweredAfterAPause has a client update its keys when the deadline of the last write to it has long passed.
func TestKeyUpdates_AreAnsweredAfterAPause(t *testing.T) {
	for name, below := range map[string]func(net.Conn) net.Conn{
		"a socket that is seen": func(nc net.Conn) net.Conn { return nc },
		"a hidden socket":       func(nc net.Conn) net.Conn { return struct{ net.Conn }{nc} },
	} {
		t.Run(name, func(t *testing.T) {
			b := newHub(t)
			s := defaults()
			s.WriteTimeout = 50 * time.Millisecond
			c, k := joinKeyUpdater(t, b, s, below)
			_ = k.SetDeadline(time.Now().Add(patience))
			r := bufio.NewReader(k)
			for i := range 3 {
				text := fmt.Sprint("message ", i)
				publishIn(b, textMessage(text))
				if f, err := readFrame(r); err != nil || f.payload != text {
					t.Fatalf("got %q, error %v, want %q; the client has left with %v", f.payload, err, text, c.Cause())
				}
				passed := time.Now().Add(2 * s.WriteTimeout)
				eventually(t, "the deadline to pass", func() bool { return time.Now().After(passed) })
				if _, err := k.below.Write(k.appendKeyUpdate(t, nil)); err != nil {
					t.Fatal(err)
				}
			}
			if c.hasLeft() {
				t.Errorf("got the client closed with %v, want it there", c.Cause())
			}
		})
	}
}
