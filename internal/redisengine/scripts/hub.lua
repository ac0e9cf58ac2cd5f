-- What all scripts do with a hub. Its five keys are KEYS[k] to KEYS[k + 4]:
--
--   a hash: state, see STATE; and #<node>, the number of the node's last batch in 20 digits, and the answer to it
--   a list of entries, the newest last, see ENTRY
--   two hashes of receipts: key of a message, epoch:number:time (ms)
--   a hash of users: <node><user>, clients
--
-- Times are in milliseconds. Numbers are packed as doubles, as all numbers are in Lua, with the highest byte first.

-- An entry: time, number, bytes of the data of all messages up to this one. The data follow.
local ENTRY = '>ddd'

-- The state:
--   seq         number of the newest message
--   base        number before the oldest entry
--   bytes       of the data of all messages ever
--   base_bytes  of those up to base
--   oldest      no entry is older
--   published   when the newest message was published
--   held        until then some node has the hub open
--   version     of the users, in this epoch
--   expires     when the keys expire
--   messages, size, age, receipts  the bounds: the largest that a node has named lately, of entries (size in bytes), of
--                                  the age of entries and receipts, and of receipts
--   messages_til, size_til, age_til, receipts_til  until then no smaller ones count
--   lost        when the newest receipt was made that is lost
--   new         which hash gets new receipts, 0 or 1
--   count0, count1  how many receipts the hashes have
--   since       when new was changed
--   went_on     number with which the epoch before ended, if this one goes on from there
--   generation, epoch
--   before      the epoch before, or ''
local STATE = '>dddddddddddddddddddddddsss'

-- The bounds that a node names, in the order of the state.
local BOUNDS = '>dddd'

local SHORTEST_TTL, HOLD = 60000, 60000

-- To save calls, bounds are enforced only when they are exceeded by this part.
local SLACK = 1 / 4

-- begin begins a new epoch, which goes on from the one before.
local function begin(h, epoch)
	h.before, h.went_on, h.epoch = h.epoch, h.seq, epoch
	h.version, h.changed = 0, true
end

-- widen notes a bound that a node names. A smaller one counts only when no node has named the larger one for a while. So a
-- node that keeps less of a hub takes nothing from the others.
local function widen(h, name, til, bound)
	if h[name] ~= bound and (h[name] < bound or h[til] < now) then
		h[name], h.changed = bound, true
	end
	if h[name] == bound and h[til] < now + HOLD * (1 - SLACK) then
		h[til], h.changed = now + HOLD, true
	end
end

-- load returns the hub whose keys begin at k, from its state or false. The caller may know an epoch and a number of it;
-- otherwise the epoch is ''. The bounds may be '', which leaves them as they are. The hub gets the candidate as its new epoch
--
--   - if it does not exist, or is forgotten: it has nothing younger than its age, and no node has it open,
--   - if its data may be those of another run of the server, see fence.go; entries that it still has stay,
--   - if the caller knows a newer number than it has, because its numbers have then run back.
local function load(k, state, candidate, epoch, seq, bounds)
	local h
	if state then
		local s, base, bytes, base_bytes, oldest, published, held, version, expires, messages, size, age, receipts, messages_til,
			size_til, age_til, receipts_til, lost, new, count0, count1, since, went_on, generation, e, before =
			struct.unpack(STATE, state)
		h = { -- a constructor is much faster than one assignment after the other
			k = k, meta = KEYS[k], log = KEYS[k + 1], changed = false, touched = false,
			seq = s, base = base, bytes = bytes, base_bytes = base_bytes, oldest = oldest, published = published, held = held,
			version = version, expires = expires, messages = messages, size = size, age = age, receipts = receipts,
			messages_til = messages_til, size_til = size_til, age_til = age_til, receipts_til = receipts_til, lost = lost, new = new,
			count0 = count0, count1 = count1, since = since, went_on = went_on, generation = generation, epoch = e, before = before,
		}
	else
		h = {
			k = k, meta = KEYS[k], log = KEYS[k + 1], epoch = '', held = 0, expires = 0, lost = 0, messages = 0, size = 0, age = 0,
			receipts = 0, messages_til = 0, size_til = 0, age_til = 0, receipts_til = 0,
		}
	end
	if bounds ~= '' then
		local messages, size, age, receipts = struct.unpack(BOUNDS, bounds)
		widen(h, 'messages', 'messages_til', messages)
		widen(h, 'size', 'size_til', size)
		widen(h, 'age', 'age_til', age)
		widen(h, 'receipts', 'receipts_til', receipts)
	end
	local forgotten = state and now >= h.held and now >= h.published + h.age and h.epoch ~= epoch
	if forgotten or not state then
		redis.call('DEL', h.log)
		if forgotten then
			redis.call('DEL', KEYS[k + 2], KEYS[k + 3])
		end
		h.epoch, h.seq, h.base, h.bytes, h.base_bytes, h.oldest, h.published = '', 0, 0, 0, 0, 0, now
		h.new, h.since = 0, 0
		h.count0, h.count1 = redis.call('HLEN', KEYS[k + 2]), redis.call('HLEN', KEYS[k + 3])
		h.lost = math.max(h.lost, LOST)
		if epoch ~= '' and not forgotten then
			h.lost = now
		end
	elseif h.generation ~= GENERATION then
		h.lost = math.max(h.lost, LOST)
	elseif epoch == h.epoch and seq > h.seq then
		h.lost = now
	else
		return h
	end
	begin(h, candidate)
	return h
end

-- load_alone loads the hub of a script that has no other one.
local function load_alone(candidate, epoch, seq, bounds)
	return load(2, redis.call('HGET', KEYS[2], 'state'), candidate, epoch, seq, bounds)
end

-- hold keeps the hub from being forgotten for a minute, because a node has it open.
local function hold(h)
	if h.held < now + HOLD * (1 - SLACK) then
		h.held, h.changed = now + HOLD, true
	end
end

-- touch lets the keys of the hub live for its age, and at least for a minute. store does it.
local function touch(h)
	local ttl = math.max(h.age, SHORTEST_TTL)
	if h.expires < now + ttl then
		h.expires = now + ttl + math.floor(ttl * SLACK)
		h.touched, h.changed = true, true
	end
end

-- store stores the state, and the given field and value.
local function store(h, ...)
	local state = struct.pack(STATE, h.seq, h.base, h.bytes, h.base_bytes, h.oldest, h.published, h.held, h.version, h.expires,
		h.messages, h.size, h.age, h.receipts, h.messages_til, h.size_til, h.age_til, h.receipts_til, h.lost, h.new, h.count0,
		h.count1, h.since, h.went_on, GENERATION, h.epoch, h.before)
	redis.call('HSET', h.meta, 'state', state, ...)
	if h.touched then
		for i = h.k, h.k + 4 do
			redis.call('PEXPIREAT', KEYS[i], h.expires)
		end
	end
end

-- store_if_changed stores the state if it has changed.
local function store_if_changed(h)
	if h.changed then
		store(h)
	end
end

-- entry returns an entry that the hub has: its time, and the bytes of all messages up to it.
local function entry(h, seq)
	local at, _, bytes = struct.unpack(ENTRY, redis.call('LINDEX', h.log, seq - h.base - 1))
	return at, bytes
end

-- forget_log forgets all entries.
local function forget_log(h)
	redis.call('DEL', h.log)
	h.base, h.base_bytes, h.changed = h.seq, h.bytes, true
end

-- repair makes up for a list that the server has evicted.
local function repair(h)
	local length = redis.call('LLEN', h.log)
	if length ~= h.seq - h.base then
		return forget_log(h)
	end
	if length > 0 then
		local _, seq = struct.unpack(ENTRY, redis.call('LINDEX', h.log, 0))
		if seq ~= h.base + 1 then
			forget_log(h)
		end
	end
end

-- drop forgets the entries up to number base.
local function drop(h, base)
	if base <= h.base then
		return
	end
	if base >= h.seq then
		return forget_log(h)
	end
	local _, bytes = entry(h, base)
	redis.call('LTRIM', h.log, base - h.base, -1)
	h.base, h.base_bytes, h.changed = base, bytes, true
end

-- expire forgets the entries that are too old, if there are any that are older by the given slack.
local function expire(h, slack)
	local limit = now - h.age
	if h.base == h.seq or h.oldest >= limit - h.age * slack then
		return
	end
	repair(h)
	local low, high = h.base, h.seq -- the last that is too old is one of these
	while low < high do
		local middle = math.floor((low + high) / 2)
		if entry(h, middle + 1) < limit then
			low = middle + 1
		else
			high = middle
		end
	end
	h.oldest, h.changed = now, true
	if low < h.seq then
		h.oldest = entry(h, low + 1)
	end
	drop(h, low)
end

-- trim forgets the oldest entries if there are too many messages or bytes.
local function trim(h)
	if h.seq - h.base > h.messages * (1 + SLACK) then
		repair(h)
		drop(h, h.seq - h.messages)
	end
	if h.bytes - h.base_bytes <= h.size * (1 + SLACK) or h.seq - h.base < 2 then
		return
	end
	repair(h)
	local low, high = h.base + 1, h.seq - 1 -- the newest one stays
	while low < high do
		local middle = math.floor((low + high) / 2)
		local _, before = entry(h, middle)
		if h.bytes - before > h.size then
			low = middle + 1
		else
			high = middle
		end
	end
	drop(h, low)
end

-- notice returns the beginning of what is published on the channel of a hub, see encoding.go.
local function notice(kind, h, n)
	return kind .. string.char(#h.epoch) .. h.epoch .. struct.pack('>d', n)
end
