package hub

import (
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/feed"
	"github.com/chat-broadcast/caddy-chat-broadcast/internal/ws"
)

// A protocol says how one kind of client speaks: which encoding it reads, and what its messages mean. Protocols have no
// state and are compared with ==.
type protocol interface {
	// encoder returns a new encoder of the hub's messages for such clients.
	encoder() feed.Encoder

	// joined runs when c has become a member. lagged runs when c goes on after it has missed messages; next is the
	// number of the next message. Both run under the hub's lock.
	joined(c *Client, w welcome)
	lagged(c *Client, missed, next uint64)

	// mayBegin reports whether c may send a message at all. If not, the server closes c before it reads the message.
	mayBegin(c *Client) bool

	// received handles a message of c. It returns false when c is closing.
	received(c *Client, opcode int, payload []byte) bool

	// answered tells c what has become of a message that it sent to an engine: the receipt, or ErrUnavailable or
	// ErrUnknown. The key has an id if the message had one.
	answered(c *Client, key Key, r Receipt, err error)

	// knowsPresence reports whether such clients can ask for the roster.
	knowsPresence() bool

	// goodbye returns the last frame that c receives before the server closes the connection, or nil.
	goodbye(why ws.Close) []byte
}

// A rawProtocol is the protocol of clients that send and receive bare payloads.
type rawProtocol struct{}

func (rawProtocol) encoder() feed.Encoder { return feed.NewRaw() }

func (rawProtocol) joined(*Client, welcome) {}

func (rawProtocol) lagged(*Client, uint64, uint64) {}

func (rawProtocol) mayBegin(c *Client) bool { return !c.settings.ReadOnly }

func (rawProtocol) knowsPresence() bool { return false }

// goodbye returns a close frame.
func (rawProtocol) goodbye(why ws.Close) []byte { return why.Frame() }

// received publishes the message if it is within the client's rate.
func (rawProtocol) received(c *Client, opcode int, payload []byte) bool {
	if !c.allowMessage(opcode) {
		return !c.hasLeft()
	}
	m := c.message(opcode, payload)
	if c.hub.session != nil {
		return c.submit(&m)
	}
	_, ok := c.publish(&m)
	return ok
}

// answered closes c if its message is lost, or may be: there is no other way to tell it.
func (rawProtocol) answered(c *Client, _ Key, _ Receipt, err error) {
	if err != nil {
		c.Close(CloseUnavailable)
	}
}
