-- Publishes a batch of messages. Keys: server, hub.
-- Arguments: node, number of the batch in 20 digits, candidate, known epoch and number, bounds, channel, 1 if messages have
-- keys; then for each message its data, and with keys before that its attempt (0 first, 1 again, 2 lookup) with its key, or ''.
-- Answer: time, number of the first message, length of the epoch in one byte, epoch, and unless all messages were published,
-- a word for each of them: + published, ? unknown, or the epoch:number:time of when it was published before.
-- OLD: the caller has given the batch up.

local node, number = '#' .. ARGV[1], ARGV[2]
local f = redis.call('HMGET', KEYS[2], 'state', node)
local answered = f[2]
if answered then
	local last = string.sub(answered, 1, 20)
	if number == last then
		return string.sub(answered, 21)
	end
	if number < last and number ~= NO_NUMBER then
		return redis.error_reply('OLD a later batch was published')
	end
end

local h = load(2, f[1], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6])
touch(h)

local first, before = h.seq + 1, h.bytes
local push, entries = { h.log }, { notice('E', h, first) }
local n = 1

local function publish(data)
	n = n + 1
	h.seq = h.seq + 1
	h.bytes = h.bytes + #data
	local value = struct.pack(ENTRY, now, h.seq, h.bytes) .. data
	push[n] = value
	entries[n] = struct.pack('>I4', #value) .. value
end

local words = ''
if ARGV[8] == '0' then
	for i = 9, #ARGV do
		publish(ARGV[i])
	end
else
	words = publish_keyed(h, publish)
end

if n > 1 then
	local length = redis.call('RPUSH', unpack(push))
	if length ~= h.seq - h.base then -- what was there before is lost
		redis.call('LTRIM', h.log, 1 - n, -1)
		h.base, h.base_bytes = first - 1, before
	end
	if h.base == first - 1 then
		h.oldest = now
		redis.call('PEXPIREAT', h.log, h.expires)
	end
	h.published = now
	expire(h, SLACK)
	trim(h)
	redis.call('PUBLISH', ARGV[7], table.concat(entries))
end

local answer = struct.pack('>dd', now, first) .. string.char(#h.epoch) .. h.epoch .. words
if number == NO_NUMBER then
	store(h)
else
	if not answered then
		forget_answers(h)
	end
	store(h, node, number .. answer)
end
return answer
