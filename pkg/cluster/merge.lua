-- Merges records into a list. All of it is decided here, so that every machine
-- sees the same order.
--
-- KEYS: the hash, the log, the rest
-- ARGV: the machine, an epoch for an empty list, the log's length, the time when
--       this was sent, and for each record the field, + or -, SINCE, UNTIL, TIMEOUT
--       and COMMENT; times in milliseconds, by this clock
--
-- Returns the list's sequence; for each field y if the record was accepted, else n,
-- with the record that it has now; and the list's epoch.
--
-- A record is "+ SINCE UNTIL TIMEOUT REMOVED COMMENT" or "- SINCE UNTIL 0 0 COMMENT".
-- UNTIL and TIMEOUT are 0 for a permanent element.
-- REMOVED is when the address was removed last before it was added again: what is
-- older than that stays removed. If only a part of a ban was removed, a tab and that
-- removal's comment follow.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local month = 30 * 24 * 3600 * 1000

-- What waits in a network that is cut off must not seem newer than what came before
-- it here. The sender learns what this clock says, and sends it again.
local late = now - tonumber(ARGV[4])
if late < -1000 or late > 10000 then return redis.error_reply('LATE it was sent ' .. late .. ' ms ago') end

local function whole(n) return string.format('%.0f', n) end

local function removal_of(since, ends, comment) return '- ' .. whole(since) .. ' ' .. whole(ends) .. ' 0 0 ' .. comment end

local function get(field)
	local value = redis.call('HGET', KEYS[1], field)
	if not value then return nil end
	local sign, since, ends, timeout, removal, rest = string.match(value, '^([+-]) (%d+) (%d+) (%d+) (%d+) (.*)$')
	if not sign then return nil end
	since, ends, timeout, removal = tonumber(since), tonumber(ends), tonumber(timeout), tonumber(removal)
	local comment, part = string.match(rest, '^([^\t]*)\t?(.*)$')
	if sign == '-' then removal, part = since, comment end
	if removal > now + 60000 or removal + month < now then removal, part = 0, '' end
	if sign == '+' and ends ~= 0 and ends <= now and removal > 0 then
		-- What was added again has expired; the removal still counts.
		sign, since, ends = '-', removal, removal + month
		value = removal_of(since, ends, part)
	end
	-- One of the future is from before the clock was set back.
	if ends ~= 0 and ends <= now or since > now + 60000 then return nil end
	return {removed = sign == '-', since = since, ends = ends, timeout = timeout, comment = comment, removal = removal, part = part, value = value}
end

local epoch = redis.call('HGET', KEYS[3], 'epoch')
if not epoch then
	epoch = ARGV[2]
	redis.call('HSET', KEYS[3], 'epoch', epoch, 'format', '1')
end
local cleared = tonumber(redis.call('HGET', KEYS[3], 'cleared') or '0')
if cleared > now + 60000 then cleared = 0 end

local replies, accepted = {}, {}
for i = 5, #ARGV, 6 do
	local field, sign, comment = ARGV[i], ARGV[i + 1], ARGV[i + 5]
	local since, ends, timeout = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
	since = math.max(0, math.min(now, since))
	local old, stays = get(field), nil
	local removal, part = 0, ''
	-- The removal of an address on every port counts on each.
	local every = string.match(field, '^(%S+) ')
	every = every and get(every)
	if every and every.removed and old and not old.removed and old.since <= every.since then old = nil end
	if sign == '+' then
		if since <= cleared and cleared + month > now then
			stays = removal_of(cleared, cleared + month, '')
		elseif every and every.removed and since <= every.since then
			stays = every.value
		elseif old and old.removal > 0 and since <= old.removal then
			stays = old.value
		elseif old and not old.removed then
			local gain = math.min(timeout / 24, 3600000)
			if old.ends == 0 or ends ~= 0 and ends <= old.ends + gain then stays = old.value end
		end
		if old then removal, part = old.removal, old.part end
	else
		-- Another machine can have what lasts longer, and come back later.
		timeout = 0
		ends = math.max(ends, now + month)
		if old and not old.removed and old.since > since and since > old.removal then
			-- What was added since stays, and what is older than the removal does not
			-- come back when that expires.
			removal, part = since, comment
			sign, since, ends, timeout, comment = '+', old.since, old.ends, old.timeout, old.comment
		elseif old and (old.since > since or old.removed and old.since == since) then
			stays = old.value
		elseif old then
			ends = math.max(ends, old.ends)
		end
	end
	if not stays then
		local value = table.concat({sign, whole(since), whole(ends), whole(timeout), whole(removal), comment}, ' ')
		if part ~= '' then value = value .. '\t' .. part end
		redis.call('HSET', KEYS[1], field, value)
		accepted[#accepted + 1] = field
		accepted[#accepted + 1] = value
		replies[#replies + 1] = 'y' .. value
	else
		replies[#replies + 1] = 'n' .. stays
	end
end

local sequence = redis.call('HGET', KEYS[3], 'sequence') or '0'
if #accepted > 0 then
	sequence = redis.call('HINCRBY', KEYS[3], 'sequence', 1)
	redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'epoch', epoch, 'sequence', sequence, 'node', ARGV[1], unpack(accepted))
end
return {tostring(sequence), replies, epoch}
