-- Reads a hub from the entry after a position, or from its oldest entry. Keys: server, hub.
-- Arguments: candidate, epoch and number of the position, bounds or '', 1 to read the users, too, 1 if the node opens it.
-- Answer: epoch, number before the first entry, newest number, version, the epoch before and the number with which it ended,
-- entries as in the list, users. If the entries are many, these are only the first of them: the newest number is then beyond
-- the last entry.

local MOST_ENTRIES, MOST_BYTES = 500, 1048576

local h = load_alone(ARGV[1], ARGV[2], 0, ARGV[4])
if ARGV[6] == '1' then
	hold(h)
end
touch(h)
repair(h)
expire(h, 0)
store_if_changed(h)

local after = h.base
local seq = tonumber(ARGV[3])
if ARGV[2] == h.epoch and seq > after and seq <= h.seq then
	after = seq
end
local entries, users = {}, {}
if after < h.seq then
	local average = (h.bytes - h.base_bytes) / (h.seq - h.base)
	local count = math.max(1, math.min(MOST_ENTRIES, math.floor(MOST_BYTES / (average + 1))))
	entries = redis.call('LRANGE', h.log, after - h.base, after - h.base + count - 1)
end
if ARGV[5] == '1' then
	users = redis.call('HGETALL', KEYS[6])
end
return { h.epoch, after, h.seq, h.version, h.before, h.went_on, entries, users }
