-- Lists the nodes. Keys: server, nodes, statuses. Answer: node and status by turns, see lease.lua.

local answer = {}
for _, node in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf')) do
	local status = redis.call('HGET', KEYS[3], node)
	if status then
		answer[#answer + 1] = node
		answer[#answer + 1] = status
	end
end
return answer
