-- Removes the lease of a node that has no users any more. Keys: server, nodes, claims, hubs of the node.
-- Arguments: node.

local til = redis.call('ZSCORE', KEYS[2], ARGV[1])
if til and tonumber(til) <= now and redis.call('EXISTS', KEYS[4]) == 0 then
	redis.call('ZREM', KEYS[2], ARGV[1])
	redis.call('HDEL', KEYS[3], ARGV[1])
end
