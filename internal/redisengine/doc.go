// Package redisengine is an engine.Cluster on Redis or Valkey, from version 7. Nodes with the same address, database and
// prefix share their hubs.
//
// # Data
//
// All writes are Lua scripts, in the folder scripts. Redis runs one script at a time, so each is atomic, and what it
// publishes on the channel of a hub arrives in the order of the scripts. hub.lua describes the keys of a hub. All nodes
// share, below the prefix: server, a hash that fence.go describes; nodes, a sorted set of nodes by the end of their leases;
// statuses, a hash of what Nodes returns; number, a counter; claims, a hash of ended nodes that somebody is removing; and
// node:<id>, the set of hubs in which a node has users.
//
// # Connections
//
// A session has one link at a time: connections to one server process, see link.go. Any of them that breaks, except that
// for subscriptions, ends the link. A link never reconnects, so that nothing reaches a server that the session has not
// examined.
//
// Redis may lose what it publishes for a subscriber. The core of the plugin finds the gap, or Renew does.
//
// # Rights
//
// An ACL for the user of the plugin is, with the default prefix:
//
//	~chat_broadcast:* &chat_broadcast:* -@all +@connection +@hash +@set +@sortedset +@stream +@string +@keyspace
//	+@scripting +@pubsub +info +time +config|get -@dangerous
//
// The example is a sketch of the groups that the scripts need; TestConnect_WithLittleRights has the exact one.
package redisengine
