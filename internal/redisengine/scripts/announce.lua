-- Sets how many clients users have in a hub on a node. Keys: server, hub, nodes, hubs of the node.
-- Arguments: node, candidate, known epoch and number, age, hub, channel; then pairs of user and clients.

local node = ARGV[1]
local h = load(2, ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5])
touch(h)

h.version = h.version + 1
local change = { notice('U', h, h.version), string.char(#node), node }
for i = 8, #ARGV, 2 do
	local user, clients = ARGV[i], ARGV[i + 1]
	if clients == '0' then
		redis.call('HDEL', KEYS[6], node .. user)
	else
		redis.call('HSET', KEYS[6], node .. user, clients)
	end
	change[#change + 1] = struct.pack('>I4I4', tonumber(clients), #user)
	change[#change + 1] = user
end
redis.call('PEXPIREAT', KEYS[6], h.expires)
save(h, 'v', h.version)

-- If the node has ended meanwhile, whoever finds its lease removes these users.
redis.call('SADD', KEYS[8], ARGV[6])
redis.call('ZADD', KEYS[7], 'NX', now, node)
redis.call('PUBLISH', ARGV[7], table.concat(change))
