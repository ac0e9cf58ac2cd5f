package redisengine

import (
	"strconv"
	"strings"

	"github.com/chat-broadcast/caddy-chat-broadcast/engine"
)

// keys are the names that a session uses in Redis.
type keys struct {
	prefix string

	server   string // see fence.lua
	nodes    string // node: end of its lease
	statuses string // node: see lease.lua
	number   string // of the newest node
	claims   string // ended node: who removes it, until when

	channels string // the beginning of all channels; they do not belong to a database as keys do
}

func newKeys(prefix string, db int) keys {
	return keys{
		prefix:   prefix,
		server:   prefix + "server",
		nodes:    prefix + "nodes",
		statuses: prefix + "statuses",
		number:   prefix + "number",
		claims:   prefix + "claims",
		channels: prefix + strconv.Itoa(db) + ":",
	}
}

// keysPerHub is how many keys a hub has.
const keysPerHub = 5

// hub appends the keys of a hub, in the order that hub.lua expects. All have the hub's name in braces.
func (k *keys) hub(to []string, hub string) []string {
	name := "{" + hub + "}"
	return append(to,
		k.prefix+"hub:"+name,
		k.prefix+"log:"+name,
		k.prefix+"receipts0:"+name,
		k.prefix+"receipts1:"+name,
		k.prefix+"users:"+name,
	)
}

// hubs returns the key of the set of hubs in which a node has users.
func (k *keys) hubs(node engine.NodeID) string { return k.prefix + "node:" + string(node) }

// hubChannel returns the channel of a hub, and nodeChannel one on which a node hears itself.
func (k *keys) hubChannel(hub string) string { return k.channels + "hub:{" + hub + "}" }

func (k *keys) nodeChannel(node engine.NodeID) string { return k.channels + "node:" + string(node) }

// hubOf returns the hub of a channel.
func (k *keys) hubOf(channel string) (string, bool) {
	name, ok := strings.CutPrefix(channel, k.channels+"hub:{")
	if !ok {
		return "", false
	}
	return strings.CutSuffix(name, "}")
}
