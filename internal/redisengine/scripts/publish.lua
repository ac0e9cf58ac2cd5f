-- Publishes a batch of messages. Keys: server, hub.
-- Arguments: node, number of the batch, candidate, known epoch and number, bounds (messages, bytes, age, receipts),
-- channel; then for each message its attempt (0 first, 1 again, 2 lookup) with its key, or '', and its data.
-- Answer: <epoch> <number of the first> <time>, and unless all were published, a word for each message: + published,
-- ? unknown, or the epoch:number:time of when it was published before. OLD: the caller has given the batch up.

local field = '#' .. ARGV[1]
local answered = ARGV[2] ~= '0' and redis.call('HGET', KEYS[2], field)
if answered then
	local number, answer = string.match(answered, '^(%d+) (.*)$')
	if number == ARGV[2] then
		return answer
	end
	if tonumber(number) > tonumber(ARGV[2]) then
		return redis.error_reply('OLD a later batch was published')
	end
end

local h = load(2, ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[8])
local messages, bytes, limit = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[9])
touch(h)
repair(h)

-- The receipts are in two hashes. When the one for new receipts is full or old enough, the other is emptied and takes
-- over, so there are always at least as many as the bounds say.
local r

local function load_receipts()
	local f = redis.call('HMGET', h.meta, 'k', 'c0', 'c1', 't')
	r = {
		k = tonumber(f[1] or 0),
		count = { [0] = tonumber(f[2] or 0), [1] = tonumber(f[3] or 0) },
		since = tonumber(f[4] or 0),
	}
end

-- complete reports whether there are receipts of all messages that were published within the age.
local function complete()
	if redis.call('HLEN', KEYS[4]) ~= r.count[0] or redis.call('HLEN', KEYS[5]) ~= r.count[1] then
		h.lost, h.renewed = now, true -- evicted
		r.count[0], r.count[1] = redis.call('HLEN', KEYS[4]), redis.call('HLEN', KEYS[5])
	end
	return now - h.lost >= h.age
end

local function find(key, attempt)
	if not r then
		load_receipts()
	end
	local receipt = redis.call('HGET', KEYS[4 + r.k], key) or redis.call('HGET', KEYS[5 - r.k], key)
	if receipt and tonumber(string.match(receipt, '%d+$')) > now - h.age then
		return receipt
	end
	if attempt == '2' or attempt == '1' and not complete() then
		return '?'
	end
	return '+'
end

local function remember(key, receipt)
	if r.count[r.k] >= limit or now - r.since > h.age then
		local other = 1 - r.k
		if r.count[other] > 0 and r.since > h.lost then
			h.lost, h.renewed = r.since, true -- when the newest one in there was made, at the latest
		end
		redis.call('DEL', KEYS[4 + other])
		r.k, r.count[other], r.since = other, 0, now
	end
	if limit == 0 then
		h.lost, h.renewed = now, true
		return
	end
	local added = redis.call('HSET', KEYS[4 + r.k], key, receipt)
	if r.count[r.k] == 0 then
		redis.call('PEXPIREAT', KEYS[4 + r.k], h.expires)
	end
	r.count[r.k] = r.count[r.k] + added
end

local first = h.seq + 1
local created = h.base == h.seq
local words, plain = {}, true
local entries = { notice('E', h, first) }
for i = 11, #ARGV, 2 do
	local id, data = ARGV[i], ARGV[i + 1]
	local word = '+'
	if id ~= '' then
		word = find(string.sub(id, 2), string.sub(id, 1, 1))
	end
	if word == '+' then
		h.seq = h.seq + 1
		h.bytes = h.bytes + #data
		redis.call('XADD', h.log, h.seq .. '-0', 'c', h.bytes, 't', now, 'd', data)
		entries[#entries + 1] = u64(now) .. struct.pack('>I4', #data)
		entries[#entries + 1] = data
		if id ~= '' then
			remember(string.sub(id, 2), h.epoch .. ':' .. h.seq .. ':' .. now)
		end
	else
		plain = false
	end
	words[#words + 1] = word
end

local answer = h.epoch .. ' ' .. first .. ' ' .. now
if not plain then
	answer = answer .. ' ' .. table.concat(words, ' ')
end
if created then
	h.oldest, h.trimmed = now, true
	redis.call('PEXPIREAT', h.log, h.expires)
end
trim(h, messages, bytes)
if r then
	redis.call('HSET', h.meta, 'k', r.k, 'c0', r.count[0], 'c1', r.count[1], 't', r.since)
end
if h.seq >= first then
	h.published = now
end
if ARGV[2] == '0' then
	save(h, 's', h.seq, 'n', h.bytes, 'p', h.published)
else
	if not answered then
		-- Another node may have come instead of one that has ended. Nobody repeats a batch after ten minutes.
		for _, other in ipairs(redis.call('HKEYS', h.meta)) do
			if string.sub(other, 1, 1) == '#' then
				local at = string.match(redis.call('HGET', h.meta, other), '^%d+ %S+ %d+ (%d+)')
				if tonumber(at) < now - math.max(h.age, 600000) then
					redis.call('HDEL', h.meta, other)
				end
			end
		end
	end
	save(h, 's', h.seq, 'n', h.bytes, 'p', h.published, field, ARGV[2] .. ' ' .. answer)
end
if h.seq >= first then
	redis.call('PUBLISH', ARGV[10], table.concat(entries))
end
return answer
