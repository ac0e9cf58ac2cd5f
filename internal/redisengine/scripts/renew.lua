-- Keeps hubs alive and compares them with what a node knows. Keys: server, then those of each hub.
-- Arguments for each hub: candidate, known epoch, number and version, age.
-- Answer for each hub that differs: which one (from 0), epoch, number, version.

local answer = {}
for i = 0, #ARGV / 5 - 1 do
	local epoch, seq, version = ARGV[5 * i + 2], tonumber(ARGV[5 * i + 3]), tonumber(ARGV[5 * i + 4])
	local h = load(5 * i + 2, ARGV[5 * i + 1], epoch, seq, ARGV[5 * i + 5])
	hold(h)
	touch(h)
	expire(h)
	save(h)
	if h.epoch ~= epoch or h.seq ~= seq or h.version ~= version then
		answer[#answer + 1] = { i, h.epoch, h.seq, h.version }
	end
end
return answer
