-- Merges records into a list. All of it is decided here, so that every machine
-- sees the same order.
--
-- KEYS: the hash, the log, the rest
-- ARGV: the machine, an epoch for an empty list, the log's length, the time when
--       this was sent, and for each record the field, + or -, SINCE, UNTIL (of a
--       removal, when the element would have expired), TIMEOUT and COMMENT; times in
--       milliseconds, by this clock
--
-- Returns the list's sequence; for each field y if the record was accepted, else n,
-- with the record that it has now; and the list's epoch.
--
-- A record is "+ SINCE UNTIL TIMEOUT REMOVED COMMENT" or "- SINCE UNTIL 0 WHOLE COMMENT".
-- UNTIL and TIMEOUT are 0 for a permanent element.
-- REMOVED is when the address was removed last before it was added again: what is
-- older than that stays removed. The comment of a removal names the part of a ban that
-- was removed, "" for all; WHOLE is when all was removed last before. If REMOVED was
-- of a part, a tab and "WHOLE COMMENT" of that removal follow.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local month = 30 * 24 * 3600 * 1000

-- What waits in a network that is cut off must not seem newer than what came before
-- it here. The sender learns what this clock says, and sends it again.
local late = now - tonumber(ARGV[4])
if late < -1000 or late > 10000 then return redis.error_reply('LATE it was sent ' .. late .. ' ms ago') end

local function number(n) return string.format('%.0f', n) end

local function removed(since, ends, whole, part)
	return '- ' .. number(since) .. ' ' .. number(ends) .. ' 0 ' .. number(whole) .. ' ' .. part
end

local function added(since, ends, timeout, comment, removal, whole, part)
	local value = table.concat({'+', number(since), number(ends), number(timeout), number(removal), comment}, ' ')
	if part == '' then return value end
	return value .. '\t' .. number(whole) .. ' ' .. part
end

-- What counts of a record whose element does not count any more: the removal before it.
local function outdated(old)
	if old.removed or old.removal == 0 then return nil end
	old.removed, old.since, old.ends = true, old.removal, old.removal + month
	old.value = removed(old.since, old.ends, old.whole, old.part)
	return old
end

local function get(field)
	local value = redis.call('HGET', KEYS[1], field)
	if not value then return nil end
	local sign, since, ends, timeout, last, rest = string.match(value, '^([+-]) (%d+) (%d+) (%d+) (%d+) (.*)$')
	if not sign then return nil end
	local old = {removed = sign == '-', since = tonumber(since), ends = tonumber(ends), timeout = tonumber(timeout), removal = tonumber(last), whole = 0, value = value}
	old.comment, rest = string.match(rest, '^([^\t]*)\t?(.*)$')
	if old.removed then
		old.removal, old.whole, old.part = old.since, old.removal, old.comment
	else
		last, old.part = string.match(rest, '^(%d+) (.*)$')
		old.whole, old.part = tonumber(last or 0), old.part or ''
	end
	-- Other records repeat these, and must not be refused for it (parseRecord).
	local most = 8796093022208
	if old.since > most or old.ends > most or old.removal > most or old.whole > old.removal then return nil end
	old.part = string.sub(string.gsub(old.part, '[^ !#-~]', '?'), 1, 128)
	if old.removal > now + 60000 or old.removal + month < now then old.removal, old.whole, old.part = 0, 0, '' end
	-- One of the future is from before the clock was set back.
	if old.since > now + 60000 or old.ends ~= 0 and old.ends <= now then return outdated(old) end
	return old
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
	-- What was added 1 ms after a removal stays newer.
	since = math.max(0, math.min(sign == '+' and now + 1 or now, since))
	local old, value, stays = get(field), nil, nil
	-- The removal of an address on every port counts on each.
	local every = string.match(field, '^(%S+) ')
	every = every and get(every)
	local gone = every and (every.removed and every.since or every.removal) or 0
	if old and not old.removed and old.since <= gone then old = outdated(old) end
	local none = not old
	old = old or {since = -1, ends = 0, removal = 0, whole = 0, part = ''}
	if sign == '+' then
		local gain = math.min(timeout / 24, 3600000)
		if since <= cleared and cleared + month > now then
			stays = removed(cleared, cleared + month, 0, '')
		elseif gone > 0 and since <= gone then
			stays = every.removed and every.value or removed(gone, gone + month, every.whole, every.part)
		elseif old.removed and since <= old.since or old.removal > 0 and since <= old.removal then
			stays = old.value
		elseif not none and not old.removed and (old.ends == 0 or ends ~= 0 and ends <= old.ends + gain) then
			stays = old.value
		else
			value = added(since, ends, timeout, comment, old.removal, old.whole, old.part)
		end
	else
		-- Another machine can have what lasts longer, and come back later.
		ends = math.max(ends, now + month, old.ends)
		local whole = old.part == '' and old.removal or old.whole
		if since > old.removal then
			if comment == '' then whole = 0 end
		elseif comment == '' and old.part ~= '' and since > old.whole then
			-- All was removed before a part was.
			since, whole, comment = old.removal, since, old.part
		else
			stays = old.value
		end
		if not stays and not old.removed and old.since > since then
			-- What was added since stays, and what is older than the removal does not
			-- come back when that expires.
			value = added(old.since, old.ends, old.timeout, old.comment, since, whole, comment)
		elseif not stays then
			value = removed(since, ends, whole, comment)
		end
	end
	if value then
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
