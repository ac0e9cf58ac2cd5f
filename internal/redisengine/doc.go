// Package redisengine is an engine.Cluster on Redis or Valkey, from version 7. Nodes with the same address, database and
// prefix share their hubs.
//
// # Data
//
// All writes are Lua scripts, in the folder scripts. Redis runs one script at a time, so each is atomic, and what it
// publishes on the channel of a hub arrives in the order of the scripts. hub.lua describes the keys of a hub. All hubs share,
// below the prefix: server, a hash that belongs to fence.lua; nodes, a sorted set of nodes by the end of their leases;
// statuses, a hash of what Nodes returns; number, a counter; claims, a hash of ended nodes that somebody removes; and
// node:<id>, the set of hubs in which a node has users.
//
// # Connections
//
// A session has one link at a time: connections to one server process, see link.go. When one of them breaks the link is
// over, except for the one for subscriptions, which is replaced. A link never connects again by itself, so that nothing
// reaches a server that the session has not examined.
//
// Redis may lose what it publishes for a subscriber. The hub that uses the session finds the gap, or Renew does.
//
// # Rights
//
// With the default prefix, the user of the engine needs these rights, as ACL SETUSER takes them:
//
//	resetchannels &chat_broadcast:* ~chat_broadcast:* -@all +hello +ping +info +select +client|setname
//	+script|load +evalsha +publish +subscribe +unsubscribe +time +get +set +incr +exists +del +unlink
//	+pexpire +pexpireat +hget +hset +hmget +hdel +hlen +hkeys +hgetall +hscan +rpush +lindex +lrange
//	+ltrim +llen +sadd +srem +srandmember +zadd +zrem +zscore +zrangebyscore
//
// With +config|get in addition, the engine can know whether a restart of Redis loses messages.
package redisengine
