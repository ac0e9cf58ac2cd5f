-- Renews the lease of a node. Keys: server, nodes, statuses, counter of nodes, hubs of the node.
-- Arguments: node, lease (ms), number that the node has or 0, status.
-- Answer: number of the node, 1 if the node was not known or what it has announced may be lost.

local node = ARGV[1]
local number, kept, forgotten = tonumber(ARGV[3]), false, 1
local stored = redis.call('HGET', KEYS[3], node)
if stored then
	local generation, n = string.match(stored, '^(%S+) (%d+)')
	if generation == GENERATION then
		forgotten = 0
	end
	if forgotten == 0 or tonumber(n) == number then
		number, kept = tonumber(n), true
	end
end
if not kept then
	-- The node keeps its number if no other node can have got it since the counter was lost.
	if number > tonumber(redis.call('GET', KEYS[4]) or 0) then
		redis.call('SET', KEYS[4], number)
	else
		number = redis.call('INCR', KEYS[4])
	end
end
redis.call('HSET', KEYS[3], node, GENERATION .. ' ' .. number .. ' ' .. now .. ' ' .. ARGV[4])
redis.call('ZADD', KEYS[2], now + ARGV[2], node)
redis.call('PEXPIRE', KEYS[5], 86400000) -- without a lease nobody would look for it
return { number, forgotten }
