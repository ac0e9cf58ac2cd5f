-- Sets how many clients users have in a hub on a node. Keys: server, hub, nodes, hubs of the node.
-- Arguments: node, candidate, known epoch and number, bounds, hub, channel; then pairs of user and clients.

local MOST_ARGUMENTS = 2000 -- unpack takes about 8000

local node = ARGV[1]
local h = load_alone(ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5])
touch(h)
h.version = h.version + 1
store(h)

local change = { notice('U', h, h.version), string.char(#node), node }
local set, delete = { KEYS[6] }, { KEYS[6] }
local function flush(command, args, most)
	if #args > most then
		redis.call(command, unpack(args))
		return { KEYS[6] }
	end
	return args
end
for i = 8, #ARGV, 2 do
	local user, clients = ARGV[i], ARGV[i + 1]
	if clients == '0' then
		delete[#delete + 1] = node .. user
	else
		set[#set + 1] = node .. user
		set[#set + 1] = clients
	end
	change[#change + 1] = struct.pack('>I4I4', tonumber(clients), #user)
	change[#change + 1] = user
	set, delete = flush('HSET', set, MOST_ARGUMENTS), flush('HDEL', delete, MOST_ARGUMENTS)
end
flush('HSET', set, 1)
flush('HDEL', delete, 1)
redis.call('PEXPIREAT', KEYS[6], h.expires)

-- If the node has ended meanwhile, another node finds its lease and removes these users.
redis.call('SADD', KEYS[8], ARGV[6])
redis.call('ZADD', KEYS[7], 'NX', now, node)
redis.call('PUBLISH', ARGV[7], table.concat(change))
