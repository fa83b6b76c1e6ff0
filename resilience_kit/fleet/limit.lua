-- One rate limit of a fleet: what its processes were granted, on the server's clock, and who holds its slots.
--
-- An entry stands for calls that may be sent until its end. It counts for every later one whose start is before that
-- end and a window's length, and no entry starts before the last one did. So of all that may be sent in one window
-- the entry that starts last was granted with the others counted, and no window ever holds more than its limit.
--
-- The state is one string: a header of numbers, then the closed entries, oldest first, each with its end and with
-- how many requests and tokens there were until then. Sums are differences, so what fits is found by halving.
-- All times are whole microseconds: they and the sums stay below 2^53, where doubles are exact.
--
-- KEYS: quota, slots, slot leases, waiting. ARGV: operation, now (-1: the server's), then what the operation takes.

local QUOTA, SLOTS, LEASES, WAITING = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local VERSION, MOST_NUMBER = 1, 9007199254740991
local FIELDS = {
    'version', 'epoch', 'period',
    -- the entries that are kept are first..head; the head is in the header, and those before first left sums behind
    'first', 'head', 'base_requests', 'base_tokens',
    'head_start', 'head_end', 'requests', 'tokens',
    'last_start', 'paused_until', 'shares_until',
    -- where the search ended last time: for what is used now, and for each window
    'hint1', 'hint2', 'hint3', 'hint4', 'hint5',
}
local HEADER, ENTRY, MOST_ENTRIES = 8 * #FIELDS, 24, 4000
local HEADER_FORMAT = '<' .. string.rep('d', #FIELDS)
-- Entries are dropped in lots of so many, and kept for this much longer than their period, since margins differ.
local LOT, KEPT_LONGER = 64, 1.25
-- Nobody is told to wait longer than so many periods: who would be asks again.
local LONGEST_WAIT = 4
-- Processes that kept to their share tell the last of what they sent so long after the shares end, in periods.
local SETTLING = 1 / 240
local GRANTED, NO_SLOT, ASK_AGAIN, SHARES = 0, 1, 2, 3

local position = 1
local function argument()
    position = position + 1
    return ARGV[position]
end
local function number()
    return tonumber(argument())
end

local operation, now = ARGV[1], number()
if now < 0 then
    local clock = redis.call('TIME')
    now = clock[1] * 1000000 + clock[2]
end

-- What is under our keys may be somebody else's: it is an error that names the key, and nothing more.
local function content_error(key)
    error({ resilience_content = key }, 0)
end

local function call(command, key, ...)
    local reply = redis.pcall(command, key, ...)
    if type(reply) == 'table' and reply.err then
        if string.find(reply.err, 'WRONGTYPE', 1, true) then
            content_error(key)
        end
        error(reply, 0)
    end
    return reply
end

local function is_count(value)
    return value and value >= 0 and value <= MOST_NUMBER and value % 1 == 0
end

local function count(text, key)
    local value = tonumber(text)
    if not is_count(value) then
        content_error(key)
    end
    return value
end

-- The quota

local function new_state()
    local state = {}
    for _, field in ipairs(FIELDS) do
        state[field] = 0
    end
    state.version, state.epoch, state.first = VERSION, now, 1
    return state
end

-- a state that keeps nothing of the past: for a period all keep to their share of the limit
local function share(state, period)
    local until_ = state.epoch + period
    if until_ > state.shares_until and until_ > now then
        state.shares_until = until_
    end
end

local function load_state()
    local header = call('GETRANGE', QUOTA, 0, HEADER - 1)
    if header == '' then
        return new_state(), true
    end
    if #header ~= HEADER then
        content_error(QUOTA)
    end
    local values, state = { struct.unpack(HEADER_FORMAT, header) }, {}
    for index, field in ipairs(FIELDS) do
        if not is_count(values[index]) then
            content_error(QUOTA)
        end
        state[field] = values[index]
    end
    -- what was closed and became the head again is left behind the others, and written over
    local closed, entries = state.head - state.first, (call('STRLEN', QUOTA) - HEADER) / ENTRY
    if state.version ~= VERSION or closed < -1 or entries < closed or entries > MOST_ENTRIES then
        content_error(QUOTA)
    end
    if state.last_start > now + (LONGEST_WAIT + 1) * state.period then
        -- the server's clock was set back, by so much that nothing here can be believed
        local period = state.period
        state = new_state()
        call('DEL', QUOTA)
        state.period = period
        share(state, period)
    end
    return state, false
end

local function offset(state, index)
    return HEADER + ENTRY * (index - state.first)
end

-- the end of an entry, and the requests and tokens until then, itself included
local function entry(state, index)
    if index == state.head then
        return state.head_end, state.requests, state.tokens
    elseif index < state.first then
        return 0, state.base_requests, state.base_tokens
    end
    local at = offset(state, index)
    local text = call('GETRANGE', QUOTA, at, at + ENTRY - 1)
    if #text ~= ENTRY then
        content_error(QUOTA)
    end
    local ends, requests, tokens = struct.unpack('<ddd', text)
    if not (is_count(ends) and is_count(requests) and is_count(tokens)) then
        content_error(QUOTA)
    end
    return ends, requests, tokens
end

-- The first entry for which something is true, as it is for all after it and for the head; from a hint on.
local function search(state, is_true, hint)
    local low, high = state.first - 1, state.head
    local index, step = math.max(state.first, math.min(hint, high)), 1
    if is_true(index) then
        high = index
        while high - step > low and is_true(high - step) do
            high, step = high - step, 2 * step
        end
        low = math.max(low, high - step)
    else
        low = index
        while low + step < high and not is_true(low + step) do
            low, step = low + step, 2 * step
        end
        high = math.min(high, low + step)
    end
    while high - low > 1 do
        local middle = math.floor((low + high) / 2)
        if is_true(middle) then
            high = middle
        else
            low = middle
        end
    end
    return high
end

local function save(state)
    -- keys live as long as anything in them matters
    local matters_until = math.max(now, state.last_start, state.paused_until, state.shares_until)
    local header = {}
    for index, field in ipairs(FIELDS) do
        header[index] = state[field]
    end
    call('SETRANGE', QUOTA, 0, struct.pack(HEADER_FORMAT, unpack(header)))
    call('PEXPIRE', QUOTA, string.format('%.0f', (matters_until - now + 2 * state.period) / 1000 + 1000))
end

-- forget the entries that have left every window
local function drop_old(state)
    local function counts(index)
        return entry(state, index) + KEPT_LONGER * state.period > now
    end
    local first = counts(state.head) and search(state, counts, state.first) or state.first
    if first > state.first then
        local _, requests, tokens = entry(state, first - 1)
        local kept = ''
        if first < state.head then
            kept = call('GETRANGE', QUOTA, offset(state, first), offset(state, state.head) - 1)
        end
        call('SET', QUOTA, string.rep('\0', HEADER) .. kept)
        state.base_requests, state.base_tokens, state.first = requests, tokens, first
    end
end

-- close the head, and begin another
local function append(state, starts, ends)
    if state.head >= state.first then
        local text = struct.pack('<ddd', state.head_end, state.requests, state.tokens)
        call('SETRANGE', QUOTA, offset(state, state.head), text)
    end
    state.head, state.head_start, state.head_end = state.head + 1, starts, math.max(state.head_end, ends)
    if (state.head - state.first) % LOT == 0 then
        drop_old(state)
    end
end

local function add(state, starts, ends, requests, tokens, resolution)
    local is_full = state.head - state.first >= MOST_ENTRIES
    if state.head < state.first or (starts - state.head_start >= resolution and not is_full) then
        append(state, starts, ends)
    end
    state.head_end = math.max(state.head_end, ends)
    state.requests, state.tokens = state.requests + requests, state.tokens + tokens
end

-- change an entry, and so the sums until each later one
local function adjust(state, index, requests, tokens)
    if index < state.head then
        local at = offset(state, index)
        local text = call('GETRANGE', QUOTA, at, offset(state, state.head) - 1)
        local changed = {}
        for start = 1, #text, ENTRY do
            local ends, requests_then, tokens_then = struct.unpack('<ddd', text, start)
            changed[#changed + 1] = struct.pack('<ddd', ends, requests_then + requests, tokens_then + tokens)
        end
        call('SETRANGE', QUOTA, at, table.concat(changed))
    end
    state.requests, state.tokens = state.requests + requests, state.tokens + tokens
end

local function give_back(state, index, requests, tokens)
    if index < state.first or index > state.head then
        return
    end
    local _, requests_then, tokens_then = entry(state, index)
    local _, requests_before, tokens_before = entry(state, index - 1)
    requests = math.min(requests, requests_then - requests_before)
    tokens = math.min(tokens, tokens_then - tokens_before)
    if requests < 0 or tokens < 0 then
        content_error(QUOTA)
    end
    adjust(state, index, -requests, -tokens)
    -- Nobody has to start after one that waited for long and then was not sent.
    while state.head >= state.first do
        local ends, requests_left, tokens_left = entry(state, state.head - 1)
        if requests_left ~= state.requests or tokens_left ~= state.tokens then
            break
        end
        state.head, state.head_start, state.head_end = state.head - 1, 0, ends
        state.last_start = ends
    end
end

-- When so much fits into all windows, and not before the given time.
local function fits_at(state, windows, requests, tokens, earliest)
    local starts = earliest
    for index, window in ipairs(windows) do
        local need = math.min(window.counts_tokens and tokens or requests, window.limit)
        local sum = window.counts_tokens and state.tokens or state.requests
        local base = window.counts_tokens and state.base_tokens or state.base_requests
        local must_leave = sum + need - window.limit
        if need > 0 and must_leave > base then
            local hint = 'hint' .. index + 1
            state[hint] = search(state, function(entry_index)
                local _, requests_then, tokens_then = entry(state, entry_index)
                return (window.counts_tokens and tokens_then or requests_then) >= must_leave
            end, state[hint])
            starts = math.max(starts, entry(state, state[hint]) + window.length)
        end
    end
    return starts
end

-- what lies in a period's window that ends then
local function used_at(state, moment, period)
    if state.head_end + period <= moment then
        return 0, 0
    end
    state.hint1 = search(state, function(index)
        return entry(state, index) + period > moment
    end, state.hint1)
    local _, requests, tokens = entry(state, state.hint1 - 1)
    return state.requests - requests, state.tokens - tokens
end

local function shares_left(state)
    return math.max(0, state.shares_until - now)
end

-- Slots: a process says how many it wants in all, and holds them until its lease ends.

local function slots_of(process)
    local found = call('HMGET', SLOTS, process, 'all')
    local all = count(found[2] or '0', SLOTS)
    if not found[1] then
        return 0, 0, all
    end
    local held, sequence = string.match(found[1], '^(%d+) (%d+)$')
    return count(held, SLOTS), count(sequence, SLOTS), all
end

local function tell_waiting(channel, news)
    if call('ZCARD', WAITING) > 0 then
        redis.call('PUBLISH', channel, news)
    end
end

local function forget_process(process)
    local held = slots_of(process)
    call('HDEL', SLOTS, process)
    call('HINCRBY', SLOTS, 'all', -held)
    call('ZREM', LEASES, process)
    call('ZREM', WAITING, process)
    return held
end

local function forget_dead(channel, news)
    local dead = call('ZRANGEBYSCORE', LEASES, '-inf', string.format('%.0f', now), 'LIMIT', 0, 16)
    local freed = 0
    for _, process in ipairs(dead) do
        freed = freed + forget_process(process)
    end
    if freed > 0 then
        tell_waiting(channel, news)
    end
end

local function take_slots(process, sequence, needed, wanted, most, lease, channel, news)
    forget_dead(channel, news)
    local held, last_sequence, all = slots_of(process)
    if sequence <= last_sequence then
        -- it was overtaken on its way
        return held, held >= needed, call('ZCARD', WAITING)
    end
    local waiting = call('ZCARD', WAITING)
    local ahead = waiting > 0 and call('ZRANK', WAITING, process) or waiting
    local granted = wanted
    if wanted > held then
        granted = held + math.max(0, math.min(wanted - held, most - all - ahead))
    end
    local has_slot = granted >= needed
    if not has_slot then
        waiting = waiting + call('ZADD', WAITING, 'NX', string.format('%.0f', now), process)
    elseif waiting > 0 then
        waiting = waiting - call('ZREM', WAITING, process)
    end
    call('HSET', SLOTS, process, string.format('%.0f %.0f', granted, sequence), 'all',
        string.format('%.0f', all + granted - held))
    call('ZADD', LEASES, string.format('%.0f', now + lease), process)
    for _, key in ipairs({ SLOTS, LEASES, WAITING }) do
        call('PEXPIRE', key, string.format('%.0f', 2 * lease / 1000 + 1000))
    end
    if granted < held and waiting > 0 then
        redis.call('PUBLISH', channel, news)
    end
    return granted, has_slot, waiting
end

-- Operations

local operations = {}

function operations.reserve()
    local channel, news, process, sequence, known_epoch = argument(), argument(), argument(), number(), number()
    local period, validity, resolution, min_interval = number(), number(), number(), number()
    local requests, tokens, extra_requests, extra_tokens = number(), number(), number(), number()
    local slots_needed, slots_wanted, most_slots, slot_lease = number(), number(), number(), number()
    local windows = {}
    for index = 1, number() do
        windows[index] = { length = number(), counts_tokens = number() == 1, limit = number() }
    end

    local state = load_state()
    state.period = math.max(state.period, period)
    if known_epoch > 0 and known_epoch ~= state.epoch then
        share(state, period)
    end
    local slots, has_slot, waiting = 0, true, 0
    if most_slots > 0 then
        slots, has_slot, waiting =
            take_slots(process, sequence, slots_needed, slots_wanted, most_slots, slot_lease, channel, news)
    end
    for _ = 1, number() do
        local epoch, index, unsent_requests, unsent_tokens = number(), number(), number(), number()
        if epoch == state.epoch then
            give_back(state, index, unsent_requests, unsent_tokens)
        end
    end

    local outcome, starts = GRANTED, now
    if shares_left(state) > 0 then
        outcome = SHARES
    elseif not has_slot then
        outcome = NO_SLOT
    elseif requests + tokens > 0 then
        local earliest = math.max(now, state.paused_until)
        if state.shares_until > 0 then
            earliest = math.max(earliest, state.shares_until + math.ceil(SETTLING * period))
        end
        if state.last_start > 0 then
            earliest = math.max(earliest, state.last_start + min_interval)
        end
        local with_extra = extra_requests + extra_tokens > 0 and earliest <= now
            and fits_at(state, windows, requests + extra_requests, tokens + extra_tokens, earliest) <= now
        if with_extra then
            requests, tokens = requests + extra_requests, tokens + extra_tokens
        else
            starts = fits_at(state, windows, requests, tokens, earliest)
        end
        if starts > now + LONGEST_WAIT * period then
            outcome, starts = ASK_AGAIN, math.max(now + resolution, starts - LONGEST_WAIT * period)
        end
    end
    local used_requests, used_tokens = used_at(state, starts, period)
    if outcome == GRANTED and requests + tokens > 0 then
        add(state, starts, starts + validity, requests, tokens, resolution)
        state.last_start = starts
        used_requests, used_tokens = used_requests + requests, used_tokens + tokens
    else
        requests, tokens = 0, 0
    end
    save(state)
    return {
        outcome, state.head, starts - now, requests, tokens, used_requests, used_tokens,
        slots, waiting, shares_left(state), state.epoch,
    }
end

function operations.record()
    local period, resolution = number(), number()
    local state = load_state()
    state.period = math.max(state.period, period)
    for _ = 1, number() do
        local sent_at, requests, tokens = now - number(), number(), number()
        if sent_at + state.period * KEPT_LONGER > now then
            if state.head < state.first or sent_at > state.head_end then
                add(state, sent_at, sent_at, requests, tokens, resolution)
            else
                local index = search(state, function(index)
                    return entry(state, index) >= sent_at
                end, state.head)
                adjust(state, index, requests, tokens)
            end
        end
    end
    save(state)
    return { shares_left(state), state.epoch }
end

function operations.pause()
    local period, until_ = number(), now + number()
    local state = load_state()
    state.period = math.max(state.period, period)
    state.paused_until = math.max(state.paused_until, until_)
    save(state)
    return { shares_left(state), state.epoch }
end

function operations.begin_shares()
    local period, seconds = number(), number()
    local state = load_state()
    state.period = math.max(state.period, period)
    if shares_left(state) == 0 then
        state.shares_until = now + seconds
    end
    save(state)
    return { shares_left(state), state.epoch }
end

function operations.usage()
    local period = number()
    local state, is_new = load_state()
    local requests, tokens = used_at(state, now, period)
    local _, _, slots = slots_of('')
    return { requests, tokens, slots, call('ZCARD', WAITING), shares_left(state), is_new and 0 or state.epoch }
end

function operations.leave()
    local channel, news, process = argument(), argument(), argument()
    if forget_process(process) > 0 then
        tell_waiting(channel, news)
    end
    return {}
end

local is_well, result = pcall(operations[operation])
if is_well then
    return result
elseif type(result) == 'table' and result.resilience_content then
    return redis.error_reply('RESILIENCE_CONTENT ' .. result.resilience_content)
end
return type(result) == 'table' and result or redis.error_reply('ERR ' .. tostring(result))
