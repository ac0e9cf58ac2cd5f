-- Decides whether the data of this server continue those that were written before, see fence.go. Before it stands RUN,
-- which is fixed in the text. Keys: server.
-- Arguments: format of the data, candidate for the generation, generation that the caller knows or '', promotion of the
-- server, 1 if the server loses nothing in a restart.
-- Answer: fence, generation, when data were lost (ms, 0 for never).

local format, candidate, known, promotion, durable = unpack(ARGV)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local f = redis.call('HMGET', KEYS[1], 'format', 'run', 'promotion', 'generation', 'durable', 'lost')
local generation, lost = f[4], f[6]
if f[1] and f[1] ~= format then
	return redis.error_reply('FORMAT ' .. f[1])
end
if not generation then
	generation, lost = candidate, 0
elseif f[2] == RUN and f[3] == promotion then
	if f[5] == '0' then
		durable = '0' -- what was written since the run began need not have been stored
	end
elseif not (f[2] ~= RUN and f[5] == '1' and durable == '1') then
	generation, lost = candidate, now
end
if known ~= '' and known ~= generation and tonumber(lost) == 0 then
	lost = now -- this server does not know what the caller has written
end
local fence = RUN .. ':' .. generation .. ':' .. lost
redis.call('HSET', KEYS[1], 'format', format, 'run', RUN, 'promotion', promotion, 'generation', generation,
	'durable', durable, 'lost', lost, 'fence', fence)
return { fence, generation, tonumber(lost) }
