-- A process puts its newest samples beside those of the others.
-- KEYS[1]: the processes that do so, each with the time at which it counts as dead (milliseconds of the server's clock)
-- KEYS[2]: this process's samples, the oldest first; KEYS[3]: all that it ever counted, as one sample
-- ARGV: the process, for how many milliseconds it now counts as alive, how many samples are kept, the sum of all, and
-- the new samples
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local lease = tonumber(ARGV[2])

redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
for number = 5, #ARGV do
    redis.call('RPUSH', KEYS[2], ARGV[number])
end
redis.call('LTRIM', KEYS[2], -tonumber(ARGV[3]), -1)
redis.call('PEXPIRE', KEYS[2], lease)
redis.call('SET', KEYS[3], ARGV[4], 'PX', lease)
redis.call('ZADD', KEYS[1], string.format('%.0f', now + lease), ARGV[1])
redis.call('PEXPIRE', KEYS[1], 2 * lease)
return 1
