package chatbroadcast

import (
	"io"
	"net"
	"time"

	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/hub"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// What tests know of the packages below, which keep it to themselves.
const (
	finBit       = 0x80 // RFC 6455 §5.2
	maskBit      = 0x80
	maxFrame     = 64<<10 + 10 // the most that one write carries, in bytes
	maxReceipts  = 4096        // the ids that a hub remembers
	maxSeq       = 1<<53 - 1   // the largest number in JSON
	closeTimeout = 5 * time.Second

	maxTapBytes   = 1 << 20
	maxNamesSize  = 16 << 10
	overheadPause = 32 * time.Millisecond
	readBuffer    = 4 << 10
)

// defaults returns the settings of a directive without a block.
func defaults() *hub.Settings {
	return &hub.Settings{
		Echo:           true,
		MaxMessageSize: defaultMaxMessageSize,
		BufferMessages: defaultBufferMessages,
		BufferBytes:    defaultBufferSize,
		PingInterval:   time.Duration(defaultPingInterval),
		PingTimeout:    time.Duration(defaultPingTimeout),
		WriteTimeout:   time.Duration(defaultWriteTimeout),
	}
}

// message returns a text that no client has sent.
func message(payload []byte) hub.Message {
	return hub.Message{Message: feed.Message{Opcode: ws.TextMessage, Payload: payload}}
}

// drain reads and discards what the peer is sent, until its connection ends.
func (p *peer) drain() {
	_ = p.conn.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, p.r)
}

// abort closes a connection with a reset.
func abort(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.Close()
}
