package chatbroadcast

import (
	"errors"
	"os"
	"runtime"
	"time"
)

// maxPending bounds the control frames that wait for the writer, in bytes: 16 of the largest. When they
// exceed it only the newest is kept, which RFC 6455 §5.5.3 allows for pongs.
const maxPending = 16 * 127

// write is the client's only writer while it runs.
func (c *client) write(rest []byte, n int) {
	switch c.flush(rest, n) {
	case progressIdle:
	case progressOrphaned:
		c.finish()
	default:
		c.endWriting()
	}
}

// endWriting ends a writer whose connection takes nothing more.
func (c *client) endWriting() {
	c.hub.drop(c)
	c.mu.Lock()
	if c.written != nil {
		close(c.written)
		c.written = nil
	}
	c.releaseReaderLocked()
	c.broken = true // a reader that has yet to look must not wait
	c.mu.Unlock()
	if !c.state.CompareAndSwap(stateWriting, stateIdle) {
		c.finish()
	}
}

// flush writes rest and then the hub's frames, those of control before them, until there are none left or, for a
// client that has left, until the close frame is out. It returns progressFlushed also when the connection failed.
func (c *client) flush(rest []byte, n int) (last progress) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.cut(causeInternal) // in the middle of a frame, for all we know
			last = progressFlushed
		}
	}()
	if len(rest) > 0 {
		if !c.sendMessages(rest, n) {
			return progressFlushed
		}
	}
	for {
		frames, n, p := c.hub.next(c)
		switch p {
		case progressFrames:
			if !c.sendPending() || !c.sendMessages(frames, n) {
				return progressFlushed
			}
		case progressLagged:
			c.close(causeLagged)
			runtime.Gosched() // somebody else may be closing it, between deciding and leaving
		case progressFlushed:
			if c.sendPending() {
				c.sayGoodbye()
			}
			return p
		case progressIdle:
			// A control frame that came while a writer ran has started none.
			if !c.due.Load() || !c.state.CompareAndSwap(stateIdle, stateWriting) {
				return p
			}
			if !c.sendPending() {
				return progressFlushed
			}
		case progressOrphaned, progressWriter: // the latter is for flushers only
			return p
		}
	}
}

// sendMessages sends frames, which end n messages.
func (c *client) sendMessages(frames []byte, n int) bool {
	if !c.send(frames) {
		return false
	}
	c.messagesOut.Add(uint64(n))
	c.hub.metrics.written.wrote(n, 0)
	return true
}

// sendPending sends the control frames and answers that are due. After hub.next it puts every pong before what was published
// after its ping had come: were it before, a pong and a message could come between the two.
func (c *client) sendPending() bool {
	return !c.due.Load() || c.send(c.takePending())
}

func (c *client) takePending() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := append(c.pending, c.answers...)
	c.pending, c.answers = nil, nil
	c.due.Store(false)
	c.releaseReaderLocked()
	return p
}

// releaseReaderLocked lets a reader go on that waits for its client to take the answers.
func (c *client) releaseReaderLocked() {
	if c.answered != nil {
		close(c.answered)
		c.answered = nil
	}
}

// attempt writes as much of frames, which end n messages, as the connection takes without waiting, and returns the
// rest. t counts it.
func (c *client) attempt(a *attempt, t *tally, frames []byte, n int) (rest []byte) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.cut(causeInternal)
			rest = frames
		}
	}()
	sent := a.write(c.wire.raw, frames)
	c.bytesOut.Add(uint64(sent))
	if sent < len(frames) {
		n = 0
	}
	c.messagesOut.Add(uint64(n))
	t.wrote(n, sent)
	return frames[sent:]
}

// send writes p. It returns false when the connection takes nothing more: it has failed, or has made no progress
// for the write timeout and is cut, because what followed a broken frame would be garbage to the peer.
func (c *client) send(p []byte) bool {
	for len(p) > 0 {
		c.setWriteDeadline(time.Now().Add(c.settings.writeTimeout))
		n, err := c.wire.conn.Write(p[:min(len(p), c.wire.maxWrite)])
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.sent(n)
			c.writeFailed()
			return false
		}
		slow := err != nil && c.wire.resumable && !c.isEnding()
		if slow && n == 0 {
			// A blocked write goes on only when a third of the socket's buffer is free. What is free by now?
			c.setWriteDeadline(time.Time{})
			a := attempts.Get().(*attempt)
			n = a.write(c.wire.raw, p)
			attempts.Put(a)
		}
		c.sent(n)
		p = p[n:]
		if err != nil && (!slow || n == 0) {
			c.cut(causeWriteTimeout)
			return false
		}
	}
	if c.wire.raw != nil {
		c.setWriteDeadline(time.Time{}) // an attempt fails once there is one that has passed
	}
	return true
}

// sent counts bytes that the connection took.
func (c *client) sent(n int) {
	c.bytesOut.Add(uint64(n))
	c.hub.metrics.written.wrote(0, n)
}

// writeFailed leaves the rest to the reader: a peer that closes the connection at once after its close frame makes
// writing fail before that frame is read.
func (c *client) writeFailed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.broken = true
		_ = c.wire.conn.SetReadDeadline(time.Now().Add(closeTimeout))
	}
}

// setWriteDeadline gives the next write its deadline.
func (c *client) setWriteDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing { // else the deadline is the close's
		_ = c.wire.conn.SetWriteDeadline(t)
	}
}

// sayGoodbye sends the close frame and ends our half of the connection.
func (c *client) sayGoodbye() {
	c.mu.Lock()
	frame := c.cause.frame()
	done := !c.closing || c.saidGoodbye || frame == nil
	c.mu.Unlock()
	if done || !c.send(frame) {
		return
	}
	halfClosed := c.wire.closeWrite()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.saidGoodbye = true
	c.setDeadlineLocked(time.Now().Add(closeTimeout))
	if c.gotGoodbye && !halfClosed {
		// Both sides are done, and the peer waits for the server to close (RFC 6455 §7.1.1).
		_ = c.wire.conn.Close()
	}
}

// push hands a control frame to the writer, unless the client is ending.
func (c *client) push(opcode int, payload []byte) {
	c.mu.Lock()
	if !c.closing && !c.broken {
		if len(c.pending)+frameSize(len(payload)) > maxPending {
			c.pending = c.pending[:0]
		}
		c.pending = appendFrame(c.pending, opcode, payload)
		c.due.Store(true)
	}
	c.mu.Unlock()
	c.wake()
}
