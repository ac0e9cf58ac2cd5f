-- Keeps hubs alive and compares them with what a node knows. Keys: server, then those of each hub.
-- Arguments for each hub: candidate, known epoch, number and version, bounds.
-- Answer for each hub that differs: which one (from 0), epoch, number, version.

local answer = {}
for i = 0, #ARGV / 5 - 1 do
	local k, a = 5 * i + 2, 5 * i + 1
	local epoch, seq, version = ARGV[a + 1], tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
	local h = load(k, redis.call('HGET', KEYS[k], 'state'), ARGV[a], epoch, seq, ARGV[a + 4])
	hold(h)
	touch(h)
	expire(h, SLACK)
	store_if_changed(h)
	if h.epoch ~= epoch or h.seq ~= seq or h.version ~= version then
		answer[#answer + 1] = { i, h.epoch, h.seq, h.version }
	end
end
return answer
