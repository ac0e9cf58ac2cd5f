package hub

import "github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"

// A protocol is how one kind of client speaks: the encoding that it reads, and what its messages mean. Protocols have no
// state and are compared with ==.
type protocol interface {
	// encoder returns what encodes the hub's messages for such clients.
	encoder() feed.Encoder

	// joined runs when c has become a member, and lagged when c goes on after it has missed messages, the next one being
	// next. Both run under the hub's lock.
	joined(c *Client, w welcome)
	lagged(c *Client, missed, next uint64)

	// mayBegin reports whether c may send a message at all. A client that must not is closed before the message is read.
	mayBegin(c *Client) bool

	// received does what a message of c asks for. It returns false when c is closing.
	received(c *Client, opcode int, payload []byte) bool

	// knowsPresence reports whether such clients can ask who is in the hub.
	knowsPresence() bool
}

// A rawProtocol is that of clients that send and receive payloads as they are.
type rawProtocol struct{}

func (rawProtocol) encoder() feed.Encoder { return feed.NewRaw() }

func (rawProtocol) joined(*Client, welcome) {}

func (rawProtocol) lagged(*Client, uint64, uint64) {}

func (rawProtocol) mayBegin(c *Client) bool { return !c.settings.ReadOnly }

func (rawProtocol) knowsPresence() bool { return false }

// received publishes a message that is within the client's rate.
func (rawProtocol) received(c *Client, opcode int, payload []byte) bool {
	if !c.allowMessage(opcode) {
		return !c.hasLeft()
	}
	m := c.message(opcode, payload)
	_, ok := c.publish(&m)
	return ok
}
