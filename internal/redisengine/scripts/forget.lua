-- Forgets the entries of a hub and begins a new epoch. Keys: server, hub. Arguments: candidate.

local h = load_alone(ARGV[1], '', 0, '')
if h.epoch ~= ARGV[1] then
	begin(h, ARGV[1])
end
touch(h)
forget_log(h)
store(h)
