-- A process says that it lives, and learns how many do.
-- KEYS[1]: the processes, each with the time at which it counts as dead (milliseconds of the server's clock)
-- ARGV: the process, and for how many milliseconds it now counts as alive; 0 if it leaves
-- Returns the number of processes that live.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local lease = tonumber(ARGV[2])

redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
if lease > 0 then
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + lease), ARGV[1])
    redis.call('PEXPIRE', KEYS[1], string.format('%.0f', 2 * lease))
else
    redis.call('ZREM', KEYS[1], ARGV[1])
end
return redis.call('ZCARD', KEYS[1])
