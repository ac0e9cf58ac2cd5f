package main

import "net"

// A pipe lies between a TLS client and its TCP connection. Until an engine detaches it, it passes all bytes on. From then
// on the engine reads and writes the TCP connection, and the pipe only hands it the bytes.
type pipe struct {
	net.Conn
	detached bool
	in       []byte // what the engine has received and TLS has not read yet
	out      []byte // what TLS has written and the engine has not sent yet
}

// errDrained ends a read of a detached pipe when all bytes are read. It is temporary, so that crypto/tls keeps the
// beginning of a record, and reads on the next time.
var errDrained net.Error = drained{}

type drained struct{}

func (drained) Error() string   { return "no more bytes yet" }
func (drained) Timeout() bool   { return false }
func (drained) Temporary() bool { return true }

// Read returns errDrained, never 0 bytes, when a detached pipe has no bytes.
func (p *pipe) Read(b []byte) (int, error) {
	switch {
	case !p.detached:
		return p.Conn.Read(b)
	case len(p.in) == 0:
		return 0, errDrained
	}
	n := copy(b, p.in)
	p.in = p.in[n:]
	return n, nil
}

// Write takes all of b when the pipe is detached.
func (p *pipe) Write(b []byte) (int, error) {
	if !p.detached {
		return p.Conn.Write(b)
	}
	p.out = append(p.out, b...)
	return len(b), nil
}
