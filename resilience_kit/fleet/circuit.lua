-- A process says how it stands with a circuit, and learns how the fleet does.
-- KEYS[1]: the last move over the fleet: its version, the state, until when it is open (microseconds of the server's
--   clock), the failures and the error that opened it, and how many trials have succeeded since
-- KEYS[2]: the permits for trials, each with the time at which it ends without a sign of life
-- KEYS[3]: the processes that wait for a permit, each with the time at which it last asked
-- ARGV: 1 channel, 2 news that the circuit moved, 3 news that a permit is free, 4 the process,
--   5 the version of the last move that it knows, 6 what it has done ('', 'open', 'recovered', 'reset'),
--   7 for how many microseconds its circuit is open, 8 after how many failures, 9 of which type,
--   10 how many permits it wants to hold, 11 how many there are, 12 microseconds that one lasts,
--   13 trials that succeeded, 14 how many must, 15 seconds that the move is kept for
-- Returns version, whether it moved (0 no, 1 as told, 2 because enough trials succeeded), state, microseconds left,
--   failures, error, permits held, how many others wait for one
local MOST = 2 ^ 53

for index, kind in ipairs({'hash', 'zset', 'zset'}) do
    local found = redis.call('TYPE', KEYS[index])
    found = type(found) == 'table' and found.ok or found
    if found ~= 'none' and found ~= kind then
        return redis.error_reply('RESILIENCE_CONTENT ' .. KEYS[index])
    end
end

local function whole(text)
    local number = text and #text <= 16 and string.match(text, '^%d+$') and tonumber(text)
    return number and number < MOST and number
end

local function text_of(number)
    return string.format('%.0f', number)
end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local version, state, open_until, failures, error_name, successes = 0, '', 0, 0, '', 0
if redis.call('EXISTS', KEYS[1]) == 1 then
    local stored = redis.call('HMGET', KEYS[1], 'version', 'state', 'until', 'failures', 'error', 'successes')
    version, state, open_until = whole(stored[1]), stored[2], whole(stored[3])
    failures, error_name, successes = whole(stored[4]), stored[5], whole(stored[6])
    local is_state = state == 'open' or state == 'recovered' or state == 'reset'
    if not (version and is_state and open_until and failures and error_name and #error_name <= 100 and successes) then
        return redis.error_reply('RESILIENCE_CONTENT ' .. KEYS[1])
    end
end

local channel, process, known, move = ARGV[1], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local moved = 0
if move ~= '' and (move == 'reset' or version <= known) then
    moved = 1
elseif tonumber(ARGV[13]) > 0 and state == 'open' and version == known then
    successes = successes + tonumber(ARGV[13])
    redis.call('HSET', KEYS[1], 'successes', text_of(successes))
    if successes >= tonumber(ARGV[14]) then
        moved, move = 2, 'recovered'
    end
end
if moved > 0 then
    -- later than any that a process may know, also if what was here was lost
    version, state = math.max(now, version + 1, known + 1), move
    open_until, failures, error_name = 0, 0, ''
    if move == 'open' then
        open_until, failures, error_name = now + tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9]
    end
    redis.call('HSET', KEYS[1], 'version', text_of(version), 'state', state, 'until', text_of(open_until),
        'failures', text_of(failures), 'error', error_name, 'successes', '0')
    redis.call('EXPIRE', KEYS[1], ARGV[15])
    redis.call('DEL', KEYS[2])
    if move ~= 'open' then
        redis.call('DEL', KEYS[3])
    end
    redis.call('PUBLISH', channel, ARGV[2])
    known = version
end

local wanted, most, lease = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local held, others = 0, 0
if version <= known then
    -- those in the far future are not the kit's, or the server's clock was set back
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text_of(now))
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '(' .. text_of(now + lease), '+inf')
    redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', text_of(now - lease))
    redis.call('ZREMRANGEBYSCORE', KEYS[3], '(' .. text_of(now), '+inf')
    for number = 1, wanted do
        local permit = process .. ':' .. number
        if not redis.call('ZSCORE', KEYS[2], permit) and redis.call('ZCARD', KEYS[2]) >= most then
            break
        end
        redis.call('ZADD', KEYS[2], text_of(now + lease), permit)
        held = number
    end
    local freed, number = 0, held + 1
    while redis.call('ZREM', KEYS[2], process .. ':' .. number) == 1 do
        freed, number = freed + 1, number + 1
    end
    if wanted > held then
        redis.call('ZADD', KEYS[3], text_of(now), process)
    else
        redis.call('ZREM', KEYS[3], process)
    end
    others = redis.call('ZCARD', KEYS[3]) - (wanted > held and 1 or 0)
    redis.call('PEXPIRE', KEYS[2], text_of(lease / 500))
    redis.call('PEXPIRE', KEYS[3], text_of(lease / 500))
    if freed > 0 and others > 0 then
        redis.call('PUBLISH', channel, ARGV[3])
    end
end
return {version, moved, state, math.max(0, open_until - now), failures, error_name, held, others}
