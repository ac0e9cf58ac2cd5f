package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A connection is an engine's part of a client.
type connection struct {
	conn net.Conn // used by connEngine

	// Used by epollEngine. tls and pipe are nil for a plain connection.
	fd   int
	tls  *tls.Conn
	pipe *pipe
}

// newEngine returns the fastest engine.
func newEngine(l *load) (engine, error) {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err == nil {
		err = unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, timer, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(timer)})
	}
	return &epollEngine{
		load:    l,
		poller:  poll,
		timer:   timer,
		clients: map[int32]*client{},
		buf:     make([]byte, 256<<10), // fits in a core's cache
		plain:   make([]byte, 16<<10),
		events:  make([]unix.EpollEvent, 512),
	}, err
}

// largeMessage is the size from which it pays to let the kernel discard a payload, which takes three calls a message.
const largeMessage = 32 << 10

// An epollEngine reads all connections from one thread, into one buffer.
type epollEngine struct {
	load    *load
	poller  int // epoll
	timer   int // timerfd, because epoll waits for whole milliseconds, which is too coarse to send in time
	armed   time.Duration
	clients map[int32]*client
	buf     []byte
	plain   []byte // what a TLS client has decrypted: at most one record
	events  []unix.EpollEvent
}

func (e *epollEngine) add(c *client, conn net.Conn, rest []byte) error {
	if secure, ok := conn.(*tls.Conn); ok {
		c.conn.tls, c.conn.pipe = secure, secure.NetConn().(*pipe)
		conn = c.conn.pipe.Conn // closing the TLS connection would tell the server
	}
	defer conn.Close()
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return err
	}
	// Duplicate the descriptor, so that the runtime's poller ignores it. It stays non-blocking.
	var dupErr error
	err = raw.Control(func(fd uintptr) {
		c.conn.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, dupErr); err != nil {
		return err
	}
	e.clients[int32(c.conn.fd)] = c
	if err := unix.EpollCtl(e.poller, unix.EPOLL_CTL_ADD, c.conn.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(c.conn.fd)}); err != nil {
		return err
	}
	err = e.load.received(c, rest, e.load.now())
	if c.conn.tls != nil && err == nil {
		c.conn.pipe.detached = true
		err = e.decrypt(c) // TLS may have read more records than the handshake took
	}
	if err != nil {
		e.drop(c, err)
	}
	return nil
}

func (e *epollEngine) flush(c *client) {
	for !c.gone {
		out := &c.out
		if p := c.conn.pipe; p != nil {
			out = &p.out
			if len(p.out) == 0 && len(c.out) > 0 {
				_, _ = c.conn.tls.Write(c.out) // it fails only after an error of a read, which ended the client
				c.out = c.out[:0]
			}
		}
		if len(*out) == 0 {
			break
		}
		n, err := unix.Write(c.conn.fd, *out)
		if n > 0 {
			*out = append((*out)[:0], (*out)[n:]...)
		}
		switch {
		case errors.Is(err, unix.EAGAIN):
			e.wait(c, true)
			return
		case err != nil && !errors.Is(err, unix.EINTR):
			e.drop(c, err)
			return
		}
	}
	e.wait(c, false)
}

// wait tells epoll whether to report that c can be written to.
func (e *epollEngine) wait(c *client, writable bool) {
	if c.writing == writable || c.gone {
		return
	}
	c.writing = writable
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(c.conn.fd)}
	if writable {
		event.Events |= unix.EPOLLOUT
	}
	if err := unix.EpollCtl(e.poller, unix.EPOLL_CTL_MOD, c.conn.fd, &event); err != nil {
		e.drop(c, err)
	}
}

func (e *epollEngine) drop(c *client, err error) {
	if !c.gone {
		e.load.ended(c, err)
		delete(e.clients, int32(c.conn.fd))
		unix.Close(c.conn.fd)
	}
}

func (e *epollEngine) poll(until time.Duration, spin bool) {
	if spin {
		e.spin(until)
		return
	}
	if until != e.armed {
		e.armed = until
		// A zero would disarm the timer.
		wait := unix.NsecToTimespec(max(1, int64(until-e.load.now())))
		// The call can fail only on a bad argument.
		_ = unix.TimerfdSettime(e.timer, 0, &unix.ItimerSpec{Value: wait}, nil)
	}
	n, err := unix.EpollWait(e.poller, e.events, 1000)
	if err != nil {
		return // interrupted
	}
	e.handle(n)
}

// spin polls until it has received something, or until the given moment, and counts the processor time that this took. A thread that sleeps has to be woken, and the kernel charges that to the server that sends.
func (e *epollEngine) spin(until time.Duration) {
	var last time.Duration
	for {
		if n, err := unix.EpollWait(e.poller, e.events, 0); n > 0 && err == nil {
			e.handle(n)
			return
		}
		now := threadTime()
		if last > 0 {
			e.load.spun += now - last
		}
		if last = now; e.load.now() >= until {
			return
		}
	}
}

// threadTime returns the processor time of this thread. It leaves out what other programs take on the same core.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // it can fail only on a bad argument
	return time.Duration(t.Nano())
}

// handle handles the first n events.
func (e *epollEngine) handle(n int) {
	for _, event := range e.events[:n] {
		c := e.clients[event.Fd]
		switch {
		case event.Fd == int32(e.timer):
			// The number of expirations does not matter, but an unread timer would wake epoll again.
			_, _ = unix.Read(e.timer, make([]byte, 8))
			e.armed = 0
		case c == nil || c.gone:
		default:
			if event.Events&unix.EPOLLOUT != 0 {
				e.flush(c)
			}
			if event.Events&^unix.EPOLLOUT != 0 && !c.gone {
				e.read(c)
			}
		}
	}
}

func (e *epollEngine) read(c *client) {
	var n int
	var err error
	large := e.load.size >= largeMessage && c.conn.tls == nil
	if large && c.inPayload && c.idN == idSize && c.left > largeMessage/2 {
		// With MSG_TRUNC, TCP discards the bytes instead of copying them (tcp(7)). The last byte stays, so that the parser
		// sees the end of the frame.
		if n, _, err = unix.Recvfrom(c.conn.fd, e.buf[:min(c.left-1, uint64(len(e.buf)))], unix.MSG_TRUNC); n > 0 {
			c.left -= uint64(n)
			return
		}
	} else if large {
		n, err = unix.Read(c.conn.fd, e.buf[:largeMessage/8])
	} else {
		n, err = unix.Read(c.conn.fd, e.buf)
	}
	switch {
	case n > 0 && c.conn.tls != nil:
		c.conn.pipe.in = e.buf[:n]
		err = e.decrypt(c)
	case n > 0:
		err = e.load.received(c, e.buf[:n], e.load.now())
	case err == nil:
		err = io.EOF
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		err = nil
	}
	if err != nil {
		e.drop(c, err)
	}
}

// decrypt handles all whole records that a TLS client has. TLS keeps the beginning of the next one.
func (e *epollEngine) decrypt(c *client) error {
	for {
		n, err := c.conn.tls.Read(e.plain)
		if n > 0 {
			if err := e.load.received(c, e.plain[:n], e.load.now()); err != nil {
				return err
			}
		}
		if errors.Is(err, errDrained) {
			e.flush(c) // TLS may have answered
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (e *epollEngine) close() {
	for fd := range e.clients {
		unix.Close(int(fd))
	}
	unix.Close(e.timer)
	unix.Close(e.poller)
}

// processTime returns the processor time of a process since its start, in nanoseconds and with that of threads that have
// ended. /proc/PID/stat has it only in ticks of 10 ms.
func processTime(pid int) (time.Duration, error) {
	// clock_getcpuclockid(3) makes the clock's number of the process, in this way.
	const processClock = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|processClock), &t); err != nil {
		return 0, fmt.Errorf("the clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// pin restricts this thread, and processes that it starts, to these cores. undo lifts the restriction.
func pin(cores []int) (undo func(), err error) {
	var old, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		return nil, err
	}
	for _, core := range cores {
		set.Set(core)
	}
	return func() { _ = unix.SchedSetaffinity(0, &old) }, unix.SchedSetaffinity(0, &set)
}

// raiseFileLimit raises the limit of open files to n if it is lower.
func raiseFileLimit(n int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur >= uint64(n) {
		return err
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(n), Max: max(limit.Max, uint64(n))}); err != nil {
		return fmt.Errorf("%d open files are needed, see ulimit -n: %w", n, err)
	}
	return nil
}

// likeEthernet makes a loopback socket resemble one across an Ethernet: segments of 1400 bytes, and the smallest receive
// buffer. With such segments the server's kernel buffers are as small as for an Ethernet; loopback's are 2.5 MiB.
func likeEthernet(fd uintptr) {
	_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG, 1400)
	_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096)
}
