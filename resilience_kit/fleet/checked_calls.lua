-- What scripts put first that read what may be somebody else's: commands that fail with the name of the key.

-- What is under our keys may be somebody else's: that is an error that names the key, and nothing more.
-- Redis 6 fails on a table, and says of it nothing but that.
local function fail(message)
    error(redis.REDIS_VERSION_NUM and { err = message } or message, 0)
end

local function content_error(key)
    fail('RESILIENCE_CONTENT ' .. key)
end

local function call(command, key, ...)
    local reply = redis.pcall(command, key, ...)
    if type(reply) == 'table' and reply.err then
        if string.find(reply.err, 'WRONGTYPE', 1, true) then
            content_error(key)
        end
        fail(reply.err)
    end
    return reply
end
