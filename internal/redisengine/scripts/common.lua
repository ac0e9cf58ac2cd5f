-- The beginning of every script. Before it stand FENCE, GENERATION and LOST, which are fixed in the text: see fence.go.

if redis.call('HGET', KEYS[1], 'fence') ~= FENCE then
	return redis.error_reply('STALE these data have another fence')
end

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
