-- Forgets the entries of a hub and begins a new epoch. Keys: server, hub. Arguments: candidate.

local h = load(2, ARGV[1], '', 0, '')
h.epoch, h.renewed = ARGV[1], true
touch(h)
drop(h, h.seq)
save(h)
