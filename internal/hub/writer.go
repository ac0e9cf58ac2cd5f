package hub

import (
	"errors"
	"os"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/conn"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// maxPending bounds the control frames that wait for the writer, in bytes: 16 of the largest. Beyond it the client
// keeps only the newest, which RFC 6455 §5.5.3 allows for pongs.
const maxPending = 16 * 127

// write is the client's only writer while it runs. It begins with rest, which ends n messages.
func (c *Client) write(rest []byte, n int) {
	switch c.flush(rest, n) {
	case writerStops:
	case writerFinishes:
		c.finish()
	case writerFails:
		c.endWriting()
	}
}

// endWriting ends the last writer of a client: the connection takes nothing more, or the close frame is sent.
func (c *Client) endWriting() {
	c.hub.drop(c)
	c.hub.mute(c)
	c.mu.Lock()
	if c.flushed != nil {
		close(c.flushed)
		c.flushed = nil
	}
	c.releaseReaderLocked()
	c.mu.Unlock()
	if !c.stopWriting() {
		c.finish()
	}
}

// A writerEnd says how a writer ends.
type writerEnd int

const (
	writerStops    writerEnd = iota // nothing is left to write; another writer may start
	writerFinishes                  // the reader has ended, too
	writerFails                     // nothing can be written any more
)

// flush writes rest, then the hub's frames, with control frames before them, until nothing is left. For a client that
// has left it then sends the close frame.
func (c *Client) flush(rest []byte, n int) (end writerEnd) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.Cut(CloseInternal) // the panic may have come in the middle of a frame
			end = writerFails
		}
	}()
	release := c.release // once the right to write is given up it is another's
	c.release = nil
	defer func() {
		if release != nil {
			release() // nothing was left to write, or nothing more could be written
		}
	}()
	if len(rest) > 0 && !c.sendMessages(rest, n) {
		return writerFails
	}
	for {
		frames, n, p := c.hub.next(c)
		switch p {
		case progressFrames:
			if !c.sendPending() || !c.sendMessages(frames, n) {
				return writerFails
			}
		case progressReplay:
			if !c.sendPending() || !c.sendBundle(frames, n) {
				return writerFails
			}
		case progressLagged:
			c.departed()
			c.sayGoodbye()
			return writerFails
		case progressFlushed:
			c.sayGoodbye()
			return writerFails
		case progressAlone:
			return writerFinishes
		case progressIdle:
			// A control frame that came while a writer ran has started none.
			if !c.due.Load() || !c.startWriting() {
				return writerStops
			}
			if !c.sendPending() {
				return writerFails
			}
		}
		if release != nil {
			release()
			release = nil
		}
	}
}

// sendMessages sends frames, which end n messages.
func (c *Client) sendMessages(frames []byte, n int) bool {
	if !c.send(frames) {
		return false
	}
	c.messagesOut.Add(uint64(n))
	c.process.Counters.written.wrote(n, 0)
	return true
}

// sendPending sends the waiting control frames and answers. The writer calls it after Hub.next, so every pong goes
// before the messages that were published after its ping came. If it ran before Hub.next, a pong and a message could
// come between the two.
func (c *Client) sendPending() bool {
	return !c.due.Load() || c.send(c.takePending())
}

func (c *Client) takePending() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := append(c.pending, c.answers...)
	c.pending, c.answers = nil, nil
	c.due.Store(false)
	c.releaseReaderLocked()
	return p
}

// releaseReaderLocked wakes a reader that waits for its client to take the answers.
func (c *Client) releaseReaderLocked() {
	if c.answered != nil {
		close(c.answered)
		c.answered = nil
	}
}

// attempt writes as much of frames, which end n messages, as the connection takes without waiting, and returns the
// rest. It counts the write in t.
func (c *Client) attempt(t *Tally, frames []byte, n int) (rest []byte) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked(v)
			c.Cut(CloseInternal)
			rest = frames
		}
	}()
	sent := c.tryWriter.TryWrite(frames)
	c.bytesOut.Add(uint64(sent))
	if sent < len(frames) {
		n = 0
	}
	c.messagesOut.Add(uint64(n))
	t.wrote(n, sent)
	return frames[sent:]
}

// send writes p. It returns false when the connection takes nothing more. Then writing has failed, or it has made no
// progress for the write timeout and send has cut the client, because a client cannot read on after a broken frame.
func (c *Client) send(p []byte) bool {
	chunk := conn.MaxTLSRecord // so that each record has the full timeout
	if c.exact {
		chunk = feed.MaxWrite
	}
	for len(p) > 0 {
		c.setWriteDeadline(time.Now().Add(c.settings.WriteTimeout))
		n, err := c.conn.Write(p[:min(len(p), chunk)])
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.sent(n)
			c.hub.mute(c) // the reader finds the reason
			return false
		}
		slow := err != nil && c.exact && !c.isEnding()
		if slow && n == 0 {
			// A blocked write goes on only when a third of the socket's buffer is free. An attempt takes what is free
			// by now.
			n = c.tryWriter.TryWrite(p)
		}
		c.sent(n)
		p = p[n:]
		if err != nil && (!slow || n == 0) {
			c.Cut(CloseWriteTimeout)
			return false
		}
	}
	if !c.exact {
		c.restoreWriteDeadline() // whatever is written after this one would break the connection
	}
	return true
}

// sent counts bytes that the connection took.
func (c *Client) sent(n int) {
	c.bytesOut.Add(uint64(n))
	c.process.Counters.written.wrote(0, n)
}

// setWriteDeadline sets the deadline of the next write, unless the client has left.
func (c *Client) setWriteDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.hasLeft() { // otherwise the deadline of the close holds
		c.timed = true
		_ = c.conn.SetWriteDeadline(t)
	}
}

// restoreWriteDeadline sets the deadline that holds between two writes of a connection that is not exact. It bounds what TLS
// writes by itself when it reads, for instance the answer to a key update. It comes after the read deadline, which the reader
// meets by setting both anew (armRead). Without pings nothing bounds it.
func (c *Client) restoreWriteDeadline() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.hasLeft() {
		c.timed = false
		_ = c.conn.SetWriteDeadline(c.betweenWritesLocked())
	}
}

// betweenWritesLocked returns the deadline of restoreWriteDeadline.
func (c *Client) betweenWritesLocked() time.Time {
	if c.readDeadline.IsZero() {
		return time.Time{}
	}
	return c.readDeadline.Add(c.settings.WriteTimeout)
}

// sayGoodbye sends the waiting control frames and answers, then the last frame of the client's protocol, and closes the
// server's half of the connection.
func (c *Client) sayGoodbye() {
	if !c.sendPending() || c.State() != Closing {
		return
	}
	if c.send(c.protocol.goodbye(c.Cause())) && c.hub.farewell(c, c.conn.CloseWrite()) {
		_ = c.conn.Close() // without a lock: above TLS it may wait for the client
	}
}

// push hands a control frame to the writer, unless the client is ending.
func (c *Client) push(opcode int, payload []byte) {
	c.mu.Lock()
	if !c.isEnding() {
		if len(c.pending)+ws.FrameSize(len(payload)) > maxPending {
			c.pending = c.pending[:0]
		}
		c.pending = ws.AppendFrame(c.pending, opcode, payload)
		c.due.Store(true)
	}
	c.mu.Unlock()
	c.wake()
}

// tell queues a WebSocket frame for c alone. The writer sends it before the frames that it takes from the hub next. tell may be
// called under the hub's lock, and so starts no writer: awaitAnswers or the hub does.
func (c *Client) tell(opcode int, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.isEnding() {
		c.answers = ws.AppendFrame(c.answers, opcode, payload)
		c.due.Store(true)
	}
}

// maxAnswers is how many bytes of answers may wait for a client before the server stops reading from it: a page of a
// roster.
const maxAnswers = 16 << 10

// awaitAnswers starts the writer and waits while too many answers wait. It ends with the connection at the latest,
// because every write has a deadline.
func (c *Client) awaitAnswers() {
	c.wake()
	for {
		c.mu.Lock()
		if c.IsMute() || len(c.answers) <= maxAnswers {
			c.mu.Unlock()
			return
		}
		if c.answered == nil {
			c.answered = make(chan struct{})
		}
		answered := c.answered
		c.mu.Unlock()
		c.meter.End()
		<-answered
	}
}
