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
-- It runs from top to bottom, and functions that are seldom needed are made where they are: each costs as much as a
-- command, and all callers of the fleet wait while it runs.
--
-- KEYS: quota, slots, slot leases, waiting.
-- ARGV: now, or -1 for the server's clock; channel and news for those who wait; process; packed numbers.

local QUOTA, SLOTS, LEASES, WAITING = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now, process = tonumber(ARGV[1]), ARGV[4]
local numbers = { struct.unpack('<' .. string.rep('d', #ARGV[5] / 8), ARGV[5]) }
local sequence, known_epoch, period, validity, resolution, min_interval, requests, tokens, extra_requests, extra_tokens,
    slots_needed, slots_wanted, most_slots, slot_lease, pause, begin_shares, windows, given_back, recorded =
    unpack(numbers, 1, 19)
local windows_at = 20
local given_back_at = windows_at + 3 * windows
local recorded_at = given_back_at + 4 * given_back

local VERSION, FORMAT, MOST_NUMBER = 1, '<ddddddddddddddddddddd', 9007199254740991
local HEADER, ENTRY, MOST_ENTRIES, BLOCK = 8 * (#FORMAT - 1), 24, 4000, 8
-- Entries are dropped in lots of so many, and are kept for more than a period, since processes differ in their margins.
local LOT, KEPT_PERIODS = 64, 1.25
-- Nobody is told to wait for more periods: who would have to asks again.
local LONGEST_WAIT = 4
-- Those who kept to their shares tell of the last that they sent when the shares end, and until then nothing starts.
local SETTLING = 1 / 240
local GRANTED, NO_SLOT, ASK_AGAIN, SHARES = 0, 1, 2, 3
-- what an entry has
local END, REQUESTS, TOKENS = 1, 2, 3
local max, min, floor, ceil = math.max, math.min, math.floor, math.ceil

if now < 0 then
    local clock = redis.call('TIME')
    now = clock[1] * 1000000 + clock[2]
end

local function unpacked(format, packed, key)
    if not packed or #packed ~= 8 * (#format - 1) then
        content_error(key)
    end
    local values = { struct.unpack(format, packed) }
    for index = 1, #format - 1 do
        local value = values[index]
        -- a comparison with what is not a number is false
        if not (value >= 0 and value <= MOST_NUMBER and value % 1 == 0) then
            content_error(key)
        end
    end
    return values
end

-- 1. The state: entries `first` to `head` are there, the head in the header. `base` is what all before them add up to.

local epoch, expires_at, last_start, paused_until, shares_until = now, 0, 0, 0, 0
local first, head, head_start, at_head, base, hints = 1, 0, 0, { 0, 0, 0 }, { 0, 0, 0 }, { 1, 1, 1, 1, 1 }
local kept_period = period

local header = call('GETRANGE', QUOTA, 0, HEADER - 1)
if header ~= '' then
    local values = unpacked(FORMAT, header, QUOTA)
    local closed, stored = values[9] - values[8], (call('STRLEN', QUOTA) - HEADER) / ENTRY
    if values[1] ~= VERSION or values[8] < 1 or closed < -1 or stored < closed or stored > MOST_ENTRIES then
        content_error(QUOTA)
    end
    kept_period = max(period, values[3])
    if values[5] <= now + (LONGEST_WAIT + 1) * kept_period then
        epoch, expires_at, last_start, paused_until, shares_until = values[2], unpack(values, 4, 7)
        first, head, head_start = unpack(values, 8, 10)
        at_head, base, hints = { unpack(values, 11, 13) }, { unpack(values, 14, 16) }, { unpack(values, 17, 21) }
    else
        -- The server's clock was set back, by so much that nothing is known.
        call('DEL', QUOTA)
        known_epoch = values[2]
    end
end
if known_epoch > 0 and known_epoch ~= epoch then
    -- What was sent before is not known: until it has left the window, all keep to their shares.
    shares_until = max(shares_until, epoch + kept_period)
end

local blocks = {}

-- the END of an entry, or the REQUESTS or TOKENS until then, its own included
local function of_entry(index, which)
    if index == head then
        return at_head[which]
    elseif index < first then
        return base[which]
    end
    local place = index - first
    local number = floor(place / BLOCK)
    local block = blocks[number]
    if not block then
        local at = HEADER + ENTRY * BLOCK * number
        block = call('GETRANGE', QUOTA, at, at + ENTRY * BLOCK - 1)
        blocks[number] = block
    end
    local at = ENTRY * (place - BLOCK * number) + 8 * which - 7
    local value = at + 7 <= #block and struct.unpack('<d', block, at)
    if not value or not (value >= 0 and value <= MOST_NUMBER) then
        content_error(QUOTA)
    end
    return value
end

-- the first entry with at least so much; the head must have it
local function search(which, least, hint)
    local low, high, step = first - 1, head, 1
    local index = max(first, min(hint, head))
    if of_entry(index, which) >= least then
        high = index
        while high - step > low and of_entry(high - step, which) >= least do
            high, step = high - step, 2 * step
        end
        low = max(low, high - step)
    else
        low = index
        while low + step < high and of_entry(low + step, which) < least do
            low, step = low + step, 2 * step
        end
        high = min(high, low + step)
    end
    while high - low > 1 do
        local middle = floor((low + high) / 2)
        if of_entry(middle, which) >= least then
            high = middle
        else
            low = middle
        end
    end
    return high
end

local function add(starts, ends, more_requests, more_tokens)
    local closed = head - first
    if closed < 0 or (starts - head_start >= resolution and closed < MOST_ENTRIES) then
        if closed >= 0 then
            call('SETRANGE', QUOTA, HEADER + ENTRY * closed, struct.pack('<ddd', unpack(at_head)))
            blocks = {}
        end
        head, head_start = head + 1, starts
        local oldest = now - KEPT_PERIODS * kept_period
        if (closed + 1) % LOT == 0 and at_head[END] >= oldest then
            local kept_from, kept = search(END, oldest, first), ''
            local dropped = kept_from - first
            local dropped_requests, dropped_tokens = of_entry(kept_from - 1, REQUESTS), of_entry(kept_from - 1, TOKENS)
            if kept_from < head then
                kept = call('GETRANGE', QUOTA, HEADER + ENTRY * dropped, HEADER + ENTRY * (closed + 1) - 1)
            end
            call('SET', QUOTA, string.rep('\0', HEADER) .. kept)
            base[REQUESTS], base[TOKENS] = dropped_requests, dropped_tokens
            -- with SET the key lost its time to live
            first, blocks, expires_at = kept_from, {}, 0
        end
    end
    at_head[END] = max(at_head[END], ends)
    at_head[REQUESTS], at_head[TOKENS] = at_head[REQUESTS] + more_requests, at_head[TOKENS] + more_tokens
end

-- 2. Slots: a process says how many it wants in all, and holds them until its lease ends.

local slots, has_slot, all_slots, waiting = 0, true, 0, 0

if most_slots > 0 then
    local held, last_sequence, leased_until

    local function load_slots()
        local found = call('HMGET', SLOTS, process, 'all')
        held, last_sequence, leased_until, all_slots, waiting = 0, 0, 0, 0, 0
        if found[1] then
            held, last_sequence, leased_until = unpack(unpacked('<ddd', found[1], SLOTS), 1, 3)
        end
        if found[2] then
            all_slots, waiting = unpack(unpacked('<dd', found[2], SLOTS), 1, 2)
        end
    end

    load_slots()
    slots, has_slot = held, held >= slots_needed
    if sequence > last_sequence then
        local is_due = leased_until < now + slot_lease / 2
        local is_short = slots_wanted > held and slots_wanted - held > most_slots - all_slots
        local freed = 0
        slots = slots_wanted
        if is_due or is_short or waiting > 0 then
            for _, dead in ipairs(call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, 16)) do
                local found = call('HGET', SLOTS, dead)
                freed = freed + (found and unpacked('<ddd', found, SLOTS)[1] or 0)
                if dead == process then
                    held = 0
                end
                call('HDEL', SLOTS, dead)
                call('ZREM', LEASES, dead)
                call('ZREM', WAITING, dead)
            end
            all_slots = max(0, all_slots - freed)
            waiting = call('ZCARD', WAITING)
            -- Those who have waited for longer come first: what this process has to spare is theirs.
            local ahead, kept = waiting > 0 and call('ZRANK', WAITING, process) or waiting, held
            if ahead > 0 then
                kept = min(held, slots_needed - min(1, requests))
            end
            if slots_wanted > kept then
                slots = kept + max(0, min(slots_wanted - kept, most_slots - all_slots + held - kept - ahead))
            end
        end
        has_slot = slots >= slots_needed
        local new_waiters = 0
        if not has_slot then
            new_waiters = call('ZADD', WAITING, 'NX', now, process)
            waiting = waiting + new_waiters
            call('PEXPIRE', WAITING, ceil(slot_lease / 500))
        elseif waiting > 0 then
            waiting = waiting - call('ZREM', WAITING, process)
        end
        freed = freed + max(0, held - slots)
        all_slots = all_slots + slots - held
        if is_due then
            leased_until = now + slot_lease
            call('ZADD', LEASES, leased_until, process)
            call('PEXPIRE', LEASES, ceil(slot_lease / 500))
        end
        call('HSET', SLOTS, process, struct.pack('<ddd', slots, sequence, leased_until),
            'all', struct.pack('<dd', all_slots, waiting))
        if is_due then
            call('PEXPIRE', SLOTS, ceil(slot_lease / 500))
        end
        -- those who wait hear that one is free, and those who have one to spare that somebody waits
        if (freed > 0 and waiting > 0) or new_waiters > 0 then
            redis.call('PUBLISH', ARGV[2], ARGV[3])
        end
    end
end

-- 3. What was granted and not sent, and what was sent and not granted.

if given_back + recorded > 0 then
    -- change what an entry holds, and so the sums until each later one
    local function adjust(index, more_requests, more_tokens)
        if index < head then
            local at = HEADER + ENTRY * (index - first)
            local closed, changed = call('GETRANGE', QUOTA, at, HEADER + ENTRY * (head - first) - 1), {}
            for start = 1, #closed, ENTRY do
                local ends, requests_then, tokens_then = struct.unpack('<ddd', closed, start)
                changed[#changed + 1] = struct.pack('<ddd', ends, requests_then + more_requests, tokens_then + more_tokens)
            end
            call('SETRANGE', QUOTA, at, table.concat(changed))
            blocks = {}
        end
        at_head[REQUESTS], at_head[TOKENS] = at_head[REQUESTS] + more_requests, at_head[TOKENS] + more_tokens
    end

    for at = given_back_at, recorded_at - 1, 4 do
        local index = numbers[at + 1]
        if numbers[at] == epoch and index >= first and index <= head then
            local unsent_requests = of_entry(index, REQUESTS) - of_entry(index - 1, REQUESTS)
            local unsent_tokens = of_entry(index, TOKENS) - of_entry(index - 1, TOKENS)
            if unsent_requests < 0 or unsent_tokens < 0 then
                content_error(QUOTA)
            end
            adjust(index, -min(numbers[at + 2], unsent_requests), -min(numbers[at + 3], unsent_tokens))
            -- Nobody has to start after one that waited for long and then was not sent. What was closed and is the
            -- head again is left in the string, to be written over.
            while head >= first and at_head[REQUESTS] == of_entry(head - 1, REQUESTS)
                and at_head[TOKENS] == of_entry(head - 1, TOKENS) do
                at_head[END] = of_entry(head - 1, END)
                head, head_start, last_start = head - 1, 0, at_head[END]
            end
        end
    end

    for at = recorded_at, recorded_at + 3 * recorded - 1, 3 do
        local sent_at = now - numbers[at]
        if head < first or sent_at > at_head[END] then
            add(sent_at, sent_at, numbers[at + 1], numbers[at + 2])
        elseif sent_at + KEPT_PERIODS * kept_period > now then
            adjust(search(END, sent_at, head), numbers[at + 1], numbers[at + 2])
        end
    end
end

-- 4. When it starts.

if pause > 0 then
    paused_until = max(paused_until, now + pause)
end
if begin_shares > 0 and shares_until <= now then
    shares_until = now + begin_shares
end

-- When so much fits into all windows, and not before the given time. What is needed and is above a limit that was
-- lowered fits into an empty window.
local function fits_at(earliest, more_requests, more_tokens, has_extra)
    local starts = earliest
    for window = 1, windows do
        local at = windows_at + 3 * (window - 1)
        local which, limit, need = REQUESTS, numbers[at + 2], more_requests
        if numbers[at + 1] == 1 then
            which, need = TOKENS, more_tokens
        end
        if has_extra and need > limit then
            return math.huge
        end
        local must_leave = at_head[which] + min(need, limit) - limit
        if need > 0 and must_leave > base[which] then
            local last = search(which, must_leave, hints[window + 1])
            hints[window + 1] = last
            starts = max(starts, of_entry(last, END) + numbers[at])
        end
    end
    return starts
end

local outcome, starts = GRANTED, now
local is_asked = requests + tokens > 0
if shares_until > now then
    outcome = SHARES
elseif not has_slot then
    outcome = NO_SLOT
elseif is_asked then
    local earliest = max(now, paused_until)
    if shares_until > 0 then
        earliest = max(earliest, shares_until + ceil(SETTLING * kept_period))
    end
    if last_start > 0 then
        earliest = max(earliest, last_start + min_interval)
    end
    if extra_requests + extra_tokens > 0 and earliest <= now
        and fits_at(now, requests + extra_requests, tokens + extra_tokens, true) <= now then
        requests, tokens = requests + extra_requests, tokens + extra_tokens
    else
        starts = fits_at(earliest, requests, tokens)
    end
    if starts > now + LONGEST_WAIT * period then
        outcome, starts = ASK_AGAIN, max(now + resolution, starts - LONGEST_WAIT * period)
    end
end

-- what lies in the period's window that ends at the start
local used_requests, used_tokens, least = 0, 0, starts - period + 1
if at_head[END] >= least then
    hints[1] = search(END, least, hints[1])
    used_requests = at_head[REQUESTS] - of_entry(hints[1] - 1, REQUESTS)
    used_tokens = at_head[TOKENS] - of_entry(hints[1] - 1, TOKENS)
end

if outcome == GRANTED and is_asked then
    used_requests, used_tokens = used_requests + requests, used_tokens + tokens
    add(starts, starts + validity, requests, tokens)
    last_start = starts
else
    requests, tokens = 0, 0
end

-- 5. The state again, for as long as anything in it matters.

local needed_until = max(now, at_head[END], last_start, paused_until, shares_until) + 2 * kept_period
local is_due = expires_at < needed_until
if is_due then
    expires_at = needed_until + kept_period
end
redis.call('SETRANGE', QUOTA, 0, struct.pack(FORMAT, VERSION, epoch, kept_period, expires_at, last_start, paused_until,
    shares_until, first, head, head_start, at_head[1], at_head[2], at_head[3], base[1], base[2], base[3],
    hints[1], hints[2], hints[3], hints[4], hints[5]))
if is_due then
    call('PEXPIRE', QUOTA, ceil((expires_at - now) / 1000))
end
-- packed, as the wish is, and whole
return struct.pack('<i8i8i8i8i8i8i8i8i8i8i8i8', outcome, head, starts - now, requests, tokens, used_requests, used_tokens,
    slots, all_slots, waiting, max(0, shares_until - now), epoch)
