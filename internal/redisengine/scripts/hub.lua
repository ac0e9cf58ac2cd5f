-- What all scripts do with a hub. Its five keys are KEYS[k] to KEYS[k + 4]:
--
--   a hash  g generation, e epoch, s newest number, b number before the oldest entry,
--           n bytes of all messages ever, m bytes of those up to number b, o no entry is older than this (ms),
--           p when the newest message was published (ms), w until when some node has the hub open (ms),
--           v version of the users, x when the keys expire (ms), y age of entries and receipts (ms),
--           k hash for new receipts (0 or 1), c0 c1 receipts in each, t since when k is used (ms),
--           l when the newest receipt was made that is lost (ms),
--           #<node> number and answer of the last batch of a node
--   a stream of entries: <number>-0, c bytes of all messages up to this one, t time (ms), d data
--   two hashes of receipts: key of a message, epoch:number:time (ms)
--   a hash of users: <node><user>, clients

local SHORTEST_TTL, HOLD = 60000, 60000

-- load returns the hub whose keys begin at k. The caller may know an epoch and a number of it; otherwise the epoch is ''.
-- age may be '', which leaves it as it is. The hub gets the candidate as its new epoch
--
--   - if it does not exist, or is forgotten: it has nothing younger than its age, and no node has it open,
--   - if its data may be those of another run of the server, see fence.go; entries that it still has stay,
--   - if the caller knows a newer number than it has, because its numbers have then run back.
local function load(k, candidate, epoch, seq, age)
	local f = redis.call('HMGET', KEYS[k], 'g', 'e', 's', 'b', 'n', 'm', 'o', 'p', 'w', 'v', 'x', 'y', 'l')
	local h = {
		k = k,
		meta = KEYS[k],
		log = KEYS[k + 1],
		epoch = f[2],
		seq = tonumber(f[3] or 0),
		base = tonumber(f[4] or 0),
		bytes = tonumber(f[5] or 0),
		base_bytes = tonumber(f[6] or 0),
		oldest = tonumber(f[7] or 0),
		published = tonumber(f[8] or 0),
		held = tonumber(f[9] or 0),
		version = tonumber(f[10] or 0),
		expires = tonumber(f[11] or 0),
		age = tonumber(f[12] or 0),
		lost = tonumber(f[13] or 0),
		renewed = false, -- everything has changed
		trimmed = false, -- base, base_bytes and oldest have changed
	}
	if age ~= '' and tonumber(age) ~= h.age then
		h.age = tonumber(age)
		h.renewed = true
	end
	local forgotten = h.epoch and h.epoch ~= epoch and now >= math.max(h.held, h.published + h.age)
	if forgotten or not h.epoch then
		redis.call('DEL', h.log)
		if forgotten then
			redis.call('DEL', KEYS[k + 2], KEYS[k + 3])
		end
		redis.call('HSET', h.meta, 'k', 0, 't', 0, 'c0', redis.call('HLEN', KEYS[k + 2]), 'c1', redis.call('HLEN', KEYS[k + 3]))
		h.seq, h.base, h.bytes, h.base_bytes, h.version, h.published = 0, 0, 0, 0, 0, now
		h.lost = math.max(h.lost, LOST)
		if epoch ~= '' and not forgotten then
			h.lost = now
		end
	elseif f[1] ~= GENERATION then
		h.lost = math.max(h.lost, LOST)
	elseif epoch == h.epoch and seq > h.seq then
		h.lost = now
	else
		return h
	end
	h.epoch = candidate
	h.renewed = true
	return h
end

-- hold keeps the hub from being forgotten for a minute, because a node has it open.
local function hold(h)
	if h.held < now + HOLD * 3 / 4 then
		h.held, h.renewed = now + HOLD, true
	end
end

-- repair makes up for a stream that the server has evicted, or whose end it has lost.
local function repair(h)
	if redis.call('XLEN', h.log) ~= h.seq - h.base then
		redis.call('DEL', h.log)
		h.base, h.base_bytes, h.trimmed = h.seq, h.bytes, true
	end
end

-- touch lets the keys of the hub live for its age, and at least for a minute. To save calls it lets them live a quarter
-- longer, and does nothing before that quarter is over.
local function touch(h)
	local ttl = math.max(h.age, SHORTEST_TTL)
	if h.expires >= now + ttl then
		return
	end
	h.expires = now + ttl + math.floor(ttl / 4)
	h.renewed = true
	for i = h.k, h.k + 4 do
		redis.call('PEXPIREAT', KEYS[i], h.expires)
	end
end

-- save stores what has changed, and the given fields and values.
local function save(h, ...)
	local args = { h.meta, ... }
	local function add(field, value)
		args[#args + 1] = field
		args[#args + 1] = value
	end
	if h.trimmed or h.renewed then
		add('b', h.base)
		add('m', h.base_bytes)
		add('o', h.oldest)
	end
	if h.renewed then
		add('g', GENERATION)
		add('e', h.epoch)
		add('s', h.seq)
		add('n', h.bytes)
		add('p', h.published)
		add('w', h.held)
		add('v', h.version)
		add('x', h.expires)
		add('y', h.age)
		add('l', h.lost)
	end
	if #args == 1 then
		return
	end
	redis.call('HSET', unpack(args))
end

-- entry returns the bytes of all messages up to an entry, and its time.
local function entry(h, seq)
	local id = seq .. '-0'
	local fields = redis.call('XRANGE', h.log, id, id)[1][2]
	return tonumber(fields[2]), tonumber(fields[4])
end

-- drop forgets the entries up to number base.
local function drop(h, base)
	if base <= h.base then
		return
	end
	h.trimmed = true
	if base == h.seq then
		h.base_bytes = h.bytes
		redis.call('DEL', h.log)
	else
		h.base_bytes = entry(h, base)
		redis.call('XTRIM', h.log, 'MINID', (base + 1) .. '-0')
	end
	h.base = base
end

-- expire forgets the entries that are too old.
local function expire(h)
	local limit = now - h.age
	if h.base == h.seq or h.oldest >= limit then
		return
	end
	repair(h)
	local low, high = h.base, h.seq -- the last that is too old is one of these
	while low < high do
		local middle = math.floor((low + high) / 2)
		local _, at = entry(h, middle + 1)
		if at < limit then
			low = middle + 1
		else
			high = middle
		end
	end
	local oldest = now
	if low < h.seq then
		local _, at = entry(h, low + 1)
		oldest = at
	end
	h.oldest, h.trimmed = oldest, true
	drop(h, low)
end

-- trim forgets the oldest entries until no more are left than the given messages and bytes.
local function trim(h, messages, bytes)
	expire(h)
	drop(h, h.seq - messages)
	if h.bytes - h.base_bytes <= bytes then
		return
	end
	local low, high = h.base, h.seq - 1 -- the newest one stays
	while low < high do
		local middle = math.floor((low + high) / 2)
		local before = h.base_bytes
		if middle > h.base then
			before = entry(h, middle)
		end
		if h.bytes - before > bytes then
			low = middle + 1
		else
			high = middle
		end
	end
	drop(h, low)
end

-- u64 returns a number in 8 bytes, the highest first. Integers of 32-bit builds have only 4.
local function u64(n)
	return struct.pack('>I4I4', math.floor(n / 4294967296), n % 4294967296)
end

-- notice returns the beginning of what is published on the channel of a hub, see encoding.go.
local function notice(kind, h, n)
	return kind .. string.char(#h.epoch) .. h.epoch .. u64(n)
end
