package main

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// The network may deliver a record in pieces.
func TestPipe_ReadsRecordsThatArriveInPieces(t *testing.T) {
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.StartTLS()
	defer server.Close()

	near, far := net.Pipe()
	p := &pipe{Conn: near}
	client := tls.Client(p, &tls.Config{InsecureSkipVerify: true})
	peer := tls.Server(far, server.TLS)
	failed := make(chan error, 1)
	go func() { failed <- peer.Handshake() }() // ends with the handshake
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	// The session tickets, which a server sends after its handshake, wait in the net.Pipe.
	sent := strings.Repeat("message ", 100)
	go func() { // ends when all is written
		if err := <-failed; err == nil {
			_, err = io.WriteString(peer, sent)
			failed <- errors.Join(err, far.Close())
		} else {
			failed <- err
		}
	}()
	wire, err := io.ReadAll(near)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}

	p.detached = true
	var got []byte
	buf := make([]byte, 1<<10)
	for i := range wire {
		p.in = wire[i : i+1]
		n, err := client.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil && !errors.Is(err, errDrained) {
			t.Fatalf("after %d of %d bytes: %v", i+1, len(wire), err)
		}
	}
	if string(got) != sent {
		t.Errorf("read %d bytes, want %d", len(got), len(sent))
	}

	if _, err := io.WriteString(client, "answer"); err != nil || len(p.out) == 0 {
		t.Errorf("an answer left %d bytes to send, %v", len(p.out), err)
	}
}
