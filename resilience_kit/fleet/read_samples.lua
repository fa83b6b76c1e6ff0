-- What some processes have put into the store.
-- KEYS: the samples and the sum of each process, in turn
-- ARGV: how many samples of each to tell at most, the newest
-- Returns a list for each process: its sum, then its samples, the oldest first; an empty one for what is not of the
-- kit's, and none for a process that is gone.
local told = {}
for number = 1, #KEYS, 2 do
    local of_process = {}
    local samples = redis.call('TYPE', KEYS[number]).ok
    local sum = redis.call('TYPE', KEYS[number + 1]).ok
    if samples == 'none' or sum == 'none' then
        of_process = false
    elseif samples == 'list' and sum == 'string' then
        of_process = redis.call('LRANGE', KEYS[number], -tonumber(ARGV[1]), -1)
        table.insert(of_process, 1, redis.call('GET', KEYS[number + 1]))
    end
    told[#told + 1] = of_process
end
return told
