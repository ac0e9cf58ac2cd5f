-- Finds a node whose lease has expired, and claims it, so that not all nodes do the work. Keys: server, nodes, statuses,
-- claims. Arguments: the calling node, how long its claim holds (ms). Answer: the node, or nothing.
-- A node without a status must announce its users again if it lives after all.

for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
	local claim = redis.call('HGET', KEYS[4], node)
	local owner, til = '', 0
	if claim then
		owner, til = string.match(claim, '^(%S+) (%d+)$')
	end
	if node ~= ARGV[1] and (owner == ARGV[1] or tonumber(til) < now) then
		redis.call('HSET', KEYS[4], node, ARGV[1] .. ' ' .. (now + ARGV[2]))
		redis.call('HDEL', KEYS[3], node)
		return node
	end
end
return false
