-- Begins the end of a node that closes: its lease expires now. Keys: server, nodes, statuses. Arguments: node.

redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[2], now, ARGV[1])
