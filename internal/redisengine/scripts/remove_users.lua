-- Removes users of a node from a hub, some hundred at a time. Keys: server, hub, nodes, hubs of the node, claims.
-- Arguments: node, hub, channel, cursor, candidate, 1 if only when the lease of the node has expired, the calling node,
-- how long its claim holds (ms).
-- Answer: the next cursor; 0 when none are left, and nothing if the lease has been renewed.

local node = ARGV[1]
if ARGV[6] == '1' then
	local til = redis.call('ZSCORE', KEYS[7], node)
	if til and tonumber(til) > now then
		return false
	end
	redis.call('HSET', KEYS[9], node, ARGV[7] .. ' ' .. (now + ARGV[8]))
end
local found = redis.call('HSCAN', KEYS[6], ARGV[4], 'MATCH', node .. '*', 'COUNT', 200)
local delete, gone = { KEYS[6] }, {}
for i = 1, #found[2], 2 do
	local user = string.sub(found[2][i], #node + 1)
	delete[#delete + 1] = found[2][i]
	gone[#gone + 1] = struct.pack('>I4I4', 0, #user)
	gone[#gone + 1] = user
end
if #gone > 0 then
	redis.call('HDEL', unpack(delete))
	local state = redis.call('HGET', KEYS[2], 'state')
	if state then
		local h = load(2, state, ARGV[5], '', 0, '')
		touch(h)
		h.version = h.version + 1
		store(h)
		redis.call('PUBLISH', ARGV[3], notice('U', h, h.version) .. string.char(#node) .. node .. table.concat(gone))
	end
end
if found[1] == '0' then
	redis.call('SREM', KEYS[8], ARGV[2])
end
return found[1]
