-- One message of a process about one budget: what it has used and gives back, and what it wants to hold.
--
-- KEYS: 1 the budget's state, a hash; 2 its leases, a sorted set of processes by when theirs expire.
-- Times are microseconds of the server's clock, money is in billionths of a dollar.
--
-- Any message may be lost, come late or come twice, and nothing is counted twice for it:
-- - what was used comes in batches with numbers that rise, and so do resets;
-- - what is held is given in changes to `base`, which is all that the process held before this message. A process
--   that does not know what became of a message starts a new generation: the first message of one replaces what was
--   held by `base`, and later ones of an older generation change nothing;
-- - what the process knew the fleet to have used is no more than the state says, or the state was lost: then the
--   most that any process knew of counts, and for a while each keeps to its share, until all have told theirs.

local LONGEST_DIGITS, LONGEST_EPOCH = 18, 40
-- A process whose lease is over and that tells a batch again within this time does not have it counted twice.
local MEMORY = 600e6
-- Kept after the end, for who does not know yet of it; a budget without an end is kept from its last use.
local AFTER_THE_END, WITHOUT_END = 3600e6, 30 * 86400e6
-- Processes that died at once are not all buried by one call.
local MOST_BURIED = 100

local state, leases = KEYS[1], KEYS[2]
local kind, holder, known_epoch = ARGV[1], ARGV[2], ARGV[3]
local names = {
    "per", "lease", "serial", "left", "elapsed", "resets", "shares", "known_tokens", "known_nanos", "generation",
    "base_tokens", "base_nanos", "released_tokens", "released_nanos", "batch", "used_tokens", "used_nanos",
    "need_tokens", "need_nanos", "limit_tokens", "limit_nanos",
}
local asked = {}
for i, name in ipairs(names) do
    asked[name] = tonumber(ARGV[i + 3])
end

local function number(text)
    if not text or #text > LONGEST_DIGITS or not (text == "-1" or string.match(text, "^%d+$")) then
        content_error(state)
    end
    return tonumber(text)
end

local function text(value)
    return string.format("%.0f", value)
end

local time = redis.call("TIME")
local now = tonumber(time[1]) * 1e6 + tonumber(time[2])

-- The state: `ends` is 0 before the first call of a period, -1 where it has no end.
local fields = {
    "serial", "per", "ends", "used_tokens", "used_nanos", "held_tokens", "held_nanos", "restored_tokens",
    "restored_nanos", "shares_until",
}
local found = call("HMGET", state, "@" .. holder, "epoch", unpack(fields))
local epoch, it = found[2], {}
if epoch then
    if #epoch > LONGEST_EPOCH or not string.match(epoch, "^%d+-%x+$") then
        content_error(state)
    end
    for i, field in ipairs(fields) do
        it[field] = number(found[i + 2])
    end
elseif call("EXISTS", state) == 1 then
    content_error(state)
else
    epoch = text(now) .. "-" .. holder
    for _, field in ipairs(fields) do
        it[field] = 0
    end
    it.serial, it.per = 1, asked.per
end

-- What a process holds, by the last generation of its messages; -1 if it holds nothing of this period yet.
local function holding(field)
    if not field then
        return { serial = it.serial, generation = -1, batch = 0, resets = 0, tokens = 0, nanos = 0 }
    end
    local serial, generation, batch, resets, tokens, nanos =
        string.match(field, "^(%d+) (%-?%d+) (%d+) (%d+) (%d+) (%d+)$")
    if not serial then
        content_error(state)
    end
    return {
        serial = number(serial), generation = number(generation), batch = number(batch), resets = number(resets),
        tokens = number(tokens), nanos = number(nanos),
    }
end

local function of_this_period(its)
    if its.serial ~= it.serial then
        its.serial, its.generation, its.tokens, its.nanos = it.serial, -1, 0, 0
    end
    return its
end

local own = holding(found[1])

local function turn()
    it.serial, it.ends = it.serial + 1, 0
    it.used_tokens, it.used_nanos, it.held_tokens, it.held_nanos = 0, 0, 0, 0
    it.restored_tokens, it.restored_nanos = 0, 0
end

if asked.resets > own.resets then
    turn()
    own.resets, it.per, it.shares_until = asked.resets, asked.per, 0
elseif it.ends > 0 and now >= it.ends then
    turn()
end
if it.per ~= asked.per then
    if it.ends ~= 0 then
        return { "per", it.per }
    end
    it.per = asked.per
end

local function start(elapsed)
    if it.ends == 0 then
        it.ends = it.per == 0 and -1 or math.floor(now - elapsed + it.per)
    end
end

-- Whose period the message is about: this one, an earlier one, or one that the process had on its own.
local is_current = known_epoch == epoch and asked.serial == it.serial
if is_current then
    it.used_tokens = math.max(it.used_tokens, asked.known_tokens)
    it.used_nanos = math.max(it.used_nanos, asked.known_nanos)
elseif known_epoch == "" then
    is_current = it.per == 0 or it.ends ~= 0 or asked.elapsed < it.per
elseif known_epoch ~= epoch and asked.left ~= 0 then
    is_current = true
    for _, unit in ipairs({ "tokens", "nanos" }) do
        local more = math.max(0, asked["known_" .. unit] - it["restored_" .. unit])
        it["used_" .. unit] = it["used_" .. unit] + more
        it["restored_" .. unit] = it["restored_" .. unit] + more
    end
    if asked.left > 0 and (it.ends == 0 or it.ends > now + asked.left) then
        it.ends = now + asked.left
    end
    start(0)
    it.shares_until = math.max(it.shares_until, now + asked.shares)
end

local function hold(its, tokens, nanos)
    it.held_tokens = math.max(0, it.held_tokens + tokens - its.tokens)
    it.held_nanos = math.max(0, it.held_nanos + nanos - its.nanos)
    its.tokens, its.nanos = tokens, nanos
end

local function written(its)
    return string.format(
        "%.0f %.0f %.0f %.0f %.0f %.0f", its.serial, its.generation, its.batch, its.resets, its.tokens, its.nanos
    )
end

of_this_period(own)
for _, process in ipairs(call("ZRANGEBYSCORE", leases, "-inf", text(now), "LIMIT", 0, MOST_BURIED)) do
    local its = process == holder and own or of_this_period(holding(call("HGET", state, "@" .. process)))
    if its == own then
        hold(own, 0, 0)
        own.generation = -1
    elseif its.generation < 0 then
        call("HDEL", state, "@" .. process)
        call("ZREM", leases, process)
    else
        hold(its, 0, 0)
        its.generation = -1
        call("HSET", state, "@" .. process, written(its))
        call("ZADD", leases, text(now + MEMORY), process)
    end
end

local is_stale = asked.generation < own.generation
if asked.generation > own.generation then
    own.generation = asked.generation
    hold(own, is_current and asked.base_tokens or 0, is_current and asked.base_nanos or 0)
end
if is_current and not is_stale then
    hold(own, math.max(0, own.tokens - asked.released_tokens), math.max(0, own.nanos - asked.released_nanos))
end
if is_current and asked.batch > own.batch then
    own.batch = asked.batch
    it.used_tokens = it.used_tokens + asked.used_tokens
    it.used_nanos = it.used_nanos + asked.used_nanos
end
if is_current and (own.tokens + own.nanos > 0 or asked.used_tokens + asked.used_nanos > 0) then
    start(asked.elapsed)
end
if kind == "rejoin" then
    it.shares_until = math.max(it.shares_until, now + asked.shares)
end

local function fits(unit)
    local limit = asked["limit_" .. unit]
    return limit < 0 or it["used_" .. unit] + it["held_" .. unit] + asked["need_" .. unit] <= limit
end

local answer = "told"
if kind == "reserve" then
    if is_stale then
        answer = "stale"
    elseif it.shares_until > now then
        answer = "shares"
    elseif not (fits("tokens") and fits("nanos")) then
        answer = "refused"
    else
        answer = "granted"
        start(0)
        hold(own, own.tokens + asked.need_tokens, own.nanos + asked.need_nanos)
    end
end

local values = { "epoch", epoch, "@" .. holder, written(own) }
for _, field in ipairs(fields) do
    values[#values + 1] = field
    values[#values + 1] = text(it[field])
end
call("HSET", state, unpack(values))
call("ZADD", leases, text(now + asked.lease), holder)
local kept = it.ends > 0 and it.ends - now + AFTER_THE_END or it.per > 0 and it.per + AFTER_THE_END or WITHOUT_END
call("PEXPIRE", state, text(kept / 1000))
call("PEXPIRE", leases, text(kept / 1000))

local left = it.ends > 0 and it.ends - now or it.ends - 1
return {
    answer, epoch, it.serial, left, it.used_tokens, it.used_nanos, it.held_tokens, it.held_nanos, own.tokens,
    own.nanos, math.max(0, it.shares_until - now),
}
