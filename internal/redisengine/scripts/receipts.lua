-- What publish.lua does with messages that have keys, and with answers.
--
-- The receipts are in two hashes. When the one for new receipts is full or old enough, the other is emptied and takes
-- over, so there are always at least as many as the bounds say.

local NO_NUMBER = '00000000000000000000'

-- publish_keyed passes the data of the messages that are to be published to the function publish. It returns the words of the
-- answer.
local function publish_keyed(h, publish)
	local COUNT = { [0] = 'count0', [1] = 'count1' }

	-- is_complete reports whether there are receipts of all messages that were published within the age.
	local function is_complete()
		local count0, count1 = redis.call('HLEN', KEYS[4]), redis.call('HLEN', KEYS[5])
		if count0 ~= h.count0 or count1 ~= h.count1 then -- evicted
			h.lost, h.count0, h.count1 = now, count0, count1
		end
		return now - h.lost >= h.age
	end

	-- find returns the word for a message.
	local function find(key, attempt)
		local receipt = redis.call('HGET', KEYS[4 + h.new], key) or redis.call('HGET', KEYS[5 - h.new], key)
		if receipt and tonumber(string.match(receipt, '%d+$')) > now - h.age then
			return receipt
		end
		if attempt == '2' or attempt == '1' and not is_complete() then
			return '?'
		end
		return '+'
	end

	local function remember(key)
		if h[COUNT[h.new]] >= h.receipts or now - h.since > h.age then
			local other = 1 - h.new
			if h[COUNT[other]] > 0 then
				h.lost = math.max(h.lost, h.since) -- the newest one in there is not younger
			end
			redis.call('UNLINK', KEYS[4 + other])
			h.new, h.since = other, now
			h[COUNT[other]] = 0
		end
		if h.receipts == 0 then
			h.lost = now
			return
		end
		local added = redis.call('HSET', KEYS[4 + h.new], key, h.epoch .. ':' .. h.seq .. ':' .. now)
		local count = COUNT[h.new]
		if h[count] == 0 then
			redis.call('PEXPIREAT', KEYS[4 + h.new], h.expires)
		end
		h[count] = h[count] + added
	end

	local words, plain = {}, true
	for i = 9, #ARGV, 2 do
		local id, data = ARGV[i], ARGV[i + 1]
		local key, word = string.sub(id, 2), '+'
		if id ~= '' then
			word = find(key, string.sub(id, 1, 1))
		end
		if word == '+' then
			publish(data)
			if id ~= '' then
				remember(key)
			end
		else
			plain = false
		end
		words[#words + 1] = word
	end
	return plain and '' or table.concat(words, ' ')
end

-- forget_answers forgets the answers to batches that nobody repeats any more: those of nodes that have ended.
local function forget_answers(h)
	for _, field in ipairs(redis.call('HKEYS', h.meta)) do
		if string.sub(field, 1, 1) == '#' then
			local at = struct.unpack('>d', string.sub(redis.call('HGET', h.meta, field), 21))
			if at < now - math.max(h.age, 600000) then
				redis.call('HDEL', h.meta, field)
			end
		end
	end
end
