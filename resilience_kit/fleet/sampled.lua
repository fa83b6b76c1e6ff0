-- Who puts samples into the store.
-- KEYS[1]: the processes, each with the time at which it counts as dead (milliseconds of the server's clock)
-- ARGV: how many processes to tell at most
-- Returns their ids.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
return redis.call('ZRANGEBYSCORE', KEYS[1], string.format('%.0f', now), '+inf', 'LIMIT', 0, tonumber(ARGV[1]))
