-- One rate limit of a fleet: what its processes were granted, on the server's clock, and who holds its slots.
--
-- An entry stands for calls that may be sent until its end. It counts for every later one whose start is before that
-- end and a window's length, and no entry starts before the last one did. So of all that may be sent in one window
-- the entry that starts last was granted with the others counted, and no window ever holds more than its limit.
--
-- The state is one string: a header of numbers, then the closed entries, oldest first, each with its end and with how
-- many requests and tokens there were until then. What lies between two entries is a difference, so what has to leave
-- before something fits is found by halving, and a search begins where the last one ended: in most cases it is there.
-- All times are whole microseconds: they and the sums stay below 2^53, where doubles are exact.
--
-- KEYS: quota, slots, slot leases, waiting.
-- ARGV: operation; now, or -1 for the server's clock; channel and news for those who wait; process; packed numbers.

local QUOTA, SLOTS, LEASES, WAITING = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local operation, now, channel, news, process = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local numbers = { struct.unpack('<' .. string.rep('d', #ARGV[6] / 8), ARGV[6]) }

local FORMAT = '<ddddddddddddddddddddd'
local FIELDS, VERSION, MOST_NUMBER = #FORMAT - 1, 1, 9007199254740991
local EPOCH, PERIOD, EXPIRES_AT, LAST_START, PAUSED_UNTIL, SHARES_UNTIL = 2, 3, 4, 5, 6, 7
-- entries FIRST to HEAD are there: the head in the header, and of those before the first what they add up to
local FIRST, HEAD, HEAD_START = 8, 9, 10
-- of the head and of what is before the first: END, REQUESTS or TOKENS later
local OF_HEAD, OF_BASE = 10, 13
local END, REQUESTS, TOKENS = 1, 2, 3
-- where the searches ended last time: for what is used now, and for each window
local HINTS = 17
local HEADER, ENTRY, MOST_ENTRIES, BLOCK = 8 * FIELDS, 24, 4000, 8
-- Entries are dropped in lots of so many, and are kept for more than a period, since processes differ in their margins.
local LOT, KEPT_PERIODS = 64, 1.25
-- Nobody is told to wait for more periods: who would have to asks again.
local LONGEST_WAIT = 4
-- Those who kept to their shares tell of the last that they sent when the shares end, and until then nothing starts.
local SETTLING = 1 / 240
local GRANTED, NO_SLOT, ASK_AGAIN, SHARES = 0, 1, 2, 3

if now < 0 then
    local clock = redis.call('TIME')
    now = clock[1] * 1000000 + clock[2]
end

-- What is under our keys may be somebody else's: that is an error that names the key, and nothing more.
local function content_error(key)
    error({ err = 'RESILIENCE_CONTENT ' .. key }, 0)
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

local function text(number)
    return string.format('%.0f', number)
end

local function checked(number, key)
    if not number or not (number >= 0 and number <= MOST_NUMBER) or number % 1 ~= 0 then
        content_error(key)
    end
    return number
end

-- The quota

local state, blocks

local function begin_state(period)
    state = { VERSION, now, period, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1 }
end

-- The past is not known: until it has left the window, all keep to their shares.
local function share()
    if state[EPOCH] + state[PERIOD] > now then
        state[SHARES_UNTIL] = math.max(state[SHARES_UNTIL], state[EPOCH] + state[PERIOD])
    end
end

local function load_state(period)
    local header = call('GETRANGE', QUOTA, 0, HEADER - 1)
    blocks = {}
    if header == '' then
        begin_state(period)
        return
    end
    if #header ~= HEADER then
        content_error(QUOTA)
    end
    state = { struct.unpack(FORMAT, header) }
    for index = 1, FIELDS do
        checked(state[index], QUOTA)
    end
    local closed = state[HEAD] - state[FIRST]
    if state[1] ~= VERSION or state[FIRST] < 1 or closed < -1 or closed > MOST_ENTRIES then
        content_error(QUOTA)
    end
    state[PERIOD] = math.max(state[PERIOD], period)
    if state[LAST_START] > now + (LONGEST_WAIT + 1) * state[PERIOD] then
        -- the server's clock was set back, by so much that nothing is known
        call('DEL', QUOTA)
        begin_state(period)
        share()
    end
end

local function save_state()
    local needed_until = math.max(now, state[LAST_START], state[PAUSED_UNTIL], state[SHARES_UNTIL]) + 2 * state[PERIOD]
    local is_due = state[EXPIRES_AT] < needed_until
    if is_due then
        state[EXPIRES_AT] = needed_until + state[PERIOD]
    end
    call('SETRANGE', QUOTA, 0, struct.pack(FORMAT, unpack(state, 1, FIELDS)))
    if is_due then
        call('PEXPIRE', QUOTA, text(math.ceil((state[EXPIRES_AT] - now) / 1000)))
    end
end

local function offset(index)
    return HEADER + ENTRY * (index - state[FIRST])
end

-- an entry's END, or the REQUESTS or TOKENS until then, itself included
local function of_entry(index, which)
    if index == state[HEAD] then
        return state[OF_HEAD + which]
    elseif index < state[FIRST] then
        return state[OF_BASE + which]
    end
    local place = index - state[FIRST]
    local number = math.floor(place / BLOCK)
    local block = blocks[number]
    if not block then
        local at = HEADER + ENTRY * BLOCK * number
        block = call('GETRANGE', QUOTA, at, at + ENTRY * BLOCK - 1)
        blocks[number] = block
    end
    local at = ENTRY * (place - BLOCK * number) + 8 * which - 7
    if at + 7 > #block then
        content_error(QUOTA)
    end
    return checked(struct.unpack('<d', block, at), QUOTA)
end

-- the first entry with at least so much; the head has it
local function search(which, least, hint)
    local low, high = state[FIRST] - 1, state[HEAD]
    local index, step = math.max(low + 1, math.min(hint, high)), 1
    if of_entry(index, which) >= least then
        high = index
        while high - step > low and of_entry(high - step, which) >= least do
            high, step = high - step, 2 * step
        end
        low = math.max(low, high - step)
    else
        low = index
        while low + step < high and of_entry(low + step, which) < least do
            low, step = low + step, 2 * step
        end
        high = math.min(high, low + step)
    end
    while high - low > 1 do
        local middle = math.floor((low + high) / 2)
        if of_entry(middle, which) >= least then
            high = middle
        else
            low = middle
        end
    end
    return high
end

local function drop_old()
    local least = now - KEPT_PERIODS * state[PERIOD]
    if state[OF_HEAD + END] < least then
        return
    end
    local first = search(END, least, state[FIRST])
    if first > state[FIRST] then
        local kept, last = '', first - 1
        local requests, tokens = of_entry(last, REQUESTS), of_entry(last, TOKENS)
        if first < state[HEAD] then
            kept = call('GETRANGE', QUOTA, offset(first), offset(state[HEAD]) - 1)
        end
        call('SET', QUOTA, string.rep('\0', HEADER) .. kept)
        state[OF_BASE + REQUESTS], state[OF_BASE + TOKENS] = requests, tokens
        -- SET has taken the time to live away
        state[FIRST], state[EXPIRES_AT], blocks = first, 0, {}
    end
end

local function add(starts, ends, requests, tokens, resolution)
    local closed = state[HEAD] - state[FIRST]
    if closed < 0 or (starts - state[HEAD_START] >= resolution and closed < MOST_ENTRIES) then
        if closed >= 0 then
            local closing = struct.pack('<ddd', state[OF_HEAD + END], state[OF_HEAD + REQUESTS], state[OF_HEAD + TOKENS])
            call('SETRANGE', QUOTA, offset(state[HEAD]), closing)
            blocks = {}
        end
        state[HEAD], state[HEAD_START] = state[HEAD] + 1, starts
        if (closed + 1) % LOT == 0 then
            drop_old()
        end
    end
    state[OF_HEAD + END] = math.max(state[OF_HEAD + END], ends)
    state[OF_HEAD + REQUESTS] = state[OF_HEAD + REQUESTS] + requests
    state[OF_HEAD + TOKENS] = state[OF_HEAD + TOKENS] + tokens
end

-- change what an entry holds, and so the sums until each later one
local function adjust(index, requests, tokens)
    if index < state[HEAD] then
        local at = offset(index)
        local closed, changed = call('GETRANGE', QUOTA, at, offset(state[HEAD]) - 1), {}
        for start = 1, #closed, ENTRY do
            local ends, requests_then, tokens_then = struct.unpack('<ddd', closed, start)
            changed[#changed + 1] = struct.pack('<ddd', ends, requests_then + requests, tokens_then + tokens)
        end
        call('SETRANGE', QUOTA, at, table.concat(changed))
        blocks = {}
    end
    state[OF_HEAD + REQUESTS] = state[OF_HEAD + REQUESTS] + requests
    state[OF_HEAD + TOKENS] = state[OF_HEAD + TOKENS] + tokens
end

-- Slots: a process says how many it wants in all, and holds them until its lease ends.

local function slots_of(name)
    local found = call('HMGET', SLOTS, name, 'all', 'waiting')
    local held, sequence, leased_until = 0, 0, 0
    if found[1] then
        held, sequence, leased_until = string.match(found[1], '^(%d+) (%d+) (%d+)$')
        held, sequence, leased_until = tonumber(held), tonumber(sequence), tonumber(leased_until)
    end
    local all, waiting = tonumber(found[2] or 0), tonumber(found[3] or 0)
    for _, number in ipairs({ held or -1, sequence, leased_until, all or -1, waiting or -1 }) do
        checked(number, SLOTS)
    end
    return held, sequence, leased_until, all, waiting
end

local function forget_process(name)
    local held = slots_of(name)
    call('ZREM', LEASES, name)
    call('ZREM', WAITING, name)
    call('HDEL', SLOTS, name)
    call('HINCRBY', SLOTS, 'all', text(-held))
    return held
end

local function tell_waiting(freed)
    if freed > 0 and call('ZCARD', WAITING) > 0 then
        redis.call('PUBLISH', channel, news)
    end
end

local function forget_dead()
    local freed = 0
    for _, name in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', text(now), 'LIMIT', 0, 16)) do
        freed = freed + forget_process(name)
    end
    tell_waiting(freed)
end

-- Those who have waited for longer come first. Returns the slots, whether they are enough, and how many wait.
local function take_slots(sequence, needed, wanted, most, lease)
    local held, last_sequence, leased_until, all, waiting = slots_of(process)
    if sequence <= last_sequence then
        -- it was overtaken on its way
        return held, held >= needed, waiting
    end
    local granted = wanted
    local is_short = wanted > held and wanted - held > most - all
    if is_short or waiting > 0 then
        forget_dead()
        held, last_sequence, leased_until, all = slots_of(process)
        waiting = call('ZCARD', WAITING)
        if wanted > held then
            local ahead = call('ZRANK', WAITING, process) or waiting
            granted = held + math.max(0, math.min(wanted - held, most - all - ahead))
        end
        if granted >= needed then
            waiting = waiting - call('ZREM', WAITING, process)
        else
            waiting = waiting + call('ZADD', WAITING, 'NX', text(now), process)
            call('PEXPIRE', WAITING, text(math.ceil(2 * lease / 1000)))
        end
    end
    if leased_until < now + lease / 2 then
        leased_until = now + lease
        call('ZADD', LEASES, text(leased_until), process)
    end
    local kept = text(granted) .. ' ' .. text(sequence) .. ' ' .. text(leased_until)
    call('HSET', SLOTS, process, kept, 'all', text(all + granted - held), 'waiting', text(waiting))
    if leased_until == now + lease then
        call('PEXPIRE', SLOTS, text(math.ceil(2 * lease / 1000)))
        call('PEXPIRE', LEASES, text(math.ceil(2 * lease / 1000)))
    end
    if granted < held and waiting > 0 then
        redis.call('PUBLISH', channel, news)
    end
    return granted, granted >= needed, waiting
end

-- Operations

local function shares_left()
    return math.max(0, state[SHARES_UNTIL] - now)
end

-- what lies in the period's window that ends then
local function used_at(moment, period)
    local least = moment - period + 1
    if state[OF_HEAD + END] < least then
        return 0, 0
    end
    state[HINTS] = search(END, least, state[HINTS])
    local before = state[HINTS] - 1
    return state[OF_HEAD + REQUESTS] - of_entry(before, REQUESTS), state[OF_HEAD + TOKENS] - of_entry(before, TOKENS)
end

local function reserve()
    local sequence, known_epoch, period, validity, resolution, min_interval, requests, tokens, extra_requests,
        extra_tokens, slots_needed, slots_wanted, most_slots, slot_lease, windows, given_back = unpack(numbers, 1, 16)
    local WINDOWS = 17
    local GIVEN_BACK = WINDOWS + 3 * windows

    -- when so much fits into all windows, and not before the given time
    local function fits_at(earliest, requests_needed, tokens_needed)
        local starts = earliest
        for window = 1, windows do
            local at = WINDOWS + 3 * (window - 1)
            local which, limit, need = REQUESTS, numbers[at + 2], requests_needed
            if numbers[at + 1] == 1 then
                which, need = TOKENS, tokens_needed
            end
            -- what is above a limit that was lowered fits into an empty window
            local must_leave = state[OF_HEAD + which] + math.min(need, limit) - limit
            if need > 0 and must_leave > state[OF_BASE + which] then
                local last = search(which, must_leave, state[HINTS + window])
                state[HINTS + window] = last
                starts = math.max(starts, of_entry(last, END) + numbers[at])
            end
        end
        return starts
    end

    local function give_back(index, unsent_requests, unsent_tokens)
        if index < state[FIRST] or index > state[HEAD] then
            return
        end
        unsent_requests = math.min(unsent_requests, of_entry(index, REQUESTS) - of_entry(index - 1, REQUESTS))
        unsent_tokens = math.min(unsent_tokens, of_entry(index, TOKENS) - of_entry(index - 1, TOKENS))
        if unsent_requests < 0 or unsent_tokens < 0 then
            content_error(QUOTA)
        end
        adjust(index, -unsent_requests, -unsent_tokens)
        -- nobody has to start after one that waited for long and then was not sent
        while state[HEAD] >= state[FIRST]
            and state[OF_HEAD + REQUESTS] == of_entry(state[HEAD] - 1, REQUESTS)
            and state[OF_HEAD + TOKENS] == of_entry(state[HEAD] - 1, TOKENS) do
            local ends = of_entry(state[HEAD] - 1, END)
            state[HEAD], state[HEAD_START], state[OF_HEAD + END], state[LAST_START] = state[HEAD] - 1, 0, ends, ends
        end
    end

    load_state(period)
    if known_epoch > 0 and known_epoch ~= state[EPOCH] then
        share()
    end
    local slots, has_slot, waiting = 0, true, 0
    if most_slots > 0 then
        slots, has_slot, waiting = take_slots(sequence, slots_needed, slots_wanted, most_slots, slot_lease)
    end
    for at = GIVEN_BACK, GIVEN_BACK + 4 * given_back - 1, 4 do
        if numbers[at] == state[EPOCH] then
            give_back(numbers[at + 1], numbers[at + 2], numbers[at + 3])
        end
    end

    local outcome, starts = GRANTED, now
    local is_asked = requests + tokens > 0
    if state[SHARES_UNTIL] > now then
        outcome = SHARES
    elseif not has_slot then
        outcome = NO_SLOT
    elseif is_asked then
        local earliest = math.max(now, state[PAUSED_UNTIL])
        if state[SHARES_UNTIL] > 0 then
            earliest = math.max(earliest, state[SHARES_UNTIL] + math.ceil(SETTLING * period))
        end
        if state[LAST_START] > 0 then
            earliest = math.max(earliest, state[LAST_START] + min_interval)
        end
        if extra_requests + extra_tokens > 0 and earliest <= now
            and fits_at(now, requests + extra_requests, tokens + extra_tokens) <= now then
            requests, tokens = requests + extra_requests, tokens + extra_tokens
        else
            starts = fits_at(earliest, requests, tokens)
        end
        if starts > now + LONGEST_WAIT * period then
            outcome, starts = ASK_AGAIN, math.max(now + resolution, starts - LONGEST_WAIT * period)
        end
    end
    local used_requests, used_tokens = used_at(starts, period)
    if outcome == GRANTED and is_asked then
        used_requests, used_tokens = used_requests + requests, used_tokens + tokens
        add(starts, starts + validity, requests, tokens, resolution)
        state[LAST_START] = starts
    else
        requests, tokens = 0, 0
    end
    save_state()
    return {
        outcome, state[HEAD], starts - now, requests, tokens, used_requests, used_tokens, slots, waiting,
        shares_left(), state[EPOCH],
    }
end

local function record()
    local period, resolution = numbers[1], numbers[2]
    load_state(period)
    -- struct.unpack says last where it stopped
    for at = 3, #numbers - 1, 3 do
        local sent_at, requests, tokens = now - numbers[at], numbers[at + 1], numbers[at + 2]
        if numbers[at] < KEPT_PERIODS * state[PERIOD] then
            if state[HEAD] < state[FIRST] or sent_at > state[OF_HEAD + END] then
                add(sent_at, sent_at, requests, tokens, resolution)
            else
                adjust(search(END, sent_at, state[HEAD]), requests, tokens)
            end
        end
    end
    save_state()
    return { shares_left(), state[EPOCH] }
end

local function pause()
    load_state(numbers[1])
    state[PAUSED_UNTIL] = math.max(state[PAUSED_UNTIL], now + numbers[2])
    save_state()
    return { shares_left(), state[EPOCH] }
end

local function begin_shares()
    load_state(numbers[1])
    if shares_left() == 0 then
        state[SHARES_UNTIL] = now + numbers[2]
    end
    save_state()
    return { shares_left(), state[EPOCH] }
end

local function usage()
    load_state(numbers[1])
    forget_dead()
    local requests, tokens = used_at(now, numbers[1])
    local _, _, _, slots = slots_of('')
    return { requests, tokens, slots, call('ZCARD', WAITING), shares_left(), state[EPOCH] }
end

local function leave()
    tell_waiting(forget_process(process))
    return {}
end

local operations = {
    reserve = reserve, record = record, pause = pause, begin_shares = begin_shares, usage = usage, leave = leave,
}
local is_well, result = pcall(operations[operation])
if is_well or type(result) == 'table' then
    return result
end
return redis.error_reply('ERR ' .. tostring(result))
