-- Decides whether the data of this server continue those that were written before, see fence.go. Before it stands RUN,
-- which is fixed in the text. Keys: server.
-- Arguments: format of the data, candidate for the generation, generation that the caller knows or '', promotion of the
-- server, 1 if a restart loses nothing, 1 if the server rewrites its append-only file, so that it may just have begun one.
-- Answer: fence, generation, when data were lost (ms, 0 for never).

local format, candidate, known, promotion, keeps, rewrites = unpack(ARGV)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local f = redis.call('HMGET', KEYS[1], 'format', 'run', 'promotion', 'generation', 'kept', 'lost')
local run, generation, kept, lost = f[2], f[4], f[5], tonumber(f[6] or 0)
if f[1] and f[1] ~= format then
	return redis.error_reply('FORMAT ' .. f[1])
end
if run == RUN and f[3] == promotion then
	keeps = kept == '1' and keeps or '0' -- it must have been so from the beginning
else
	if rewrites == '1' then
		keeps = '0'
	end
	if not generation then
		generation = candidate
	elseif run == RUN or kept == '0' or keeps == '0' then
		generation, lost = candidate, now
	end
end
if known ~= '' and known ~= generation and lost == 0 then
	lost = now -- this server does not know what the caller has written
end
local fence = RUN .. ':' .. generation .. ':' .. lost
redis.call('HSET', KEYS[1], 'format', format, 'run', RUN, 'promotion', promotion, 'generation', generation, 'kept', keeps,
	'lost', lost, 'fence', fence)
return { fence, generation, lost }
