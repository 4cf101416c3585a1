"""What the Redis bus does in one step: scripts that the server runs (Lua 5.1).

A value is "<worker> <number> <name>", as `redis_bus` draws it; the worker of a stream that has been
is "gone", and a place has the instant of its end in the place of a name. Instants are milliseconds
of the server's clock.
"""

from __future__ import annotations

_STATE = """
-- What stands in the way of `mine`: 'free' for nothing (or a stream that has been, or one that the
-- caller knows to be over, or an older one of the same worker), 'newer' for a newer one of the same
-- worker, 'other' for another worker's.
local function parse(value)
  local worker, number, name = string.match(value, '^(%S+) (%d+) (.*)$')
  return worker, tonumber(number), name
end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function early(key, name)
  local expires = redis.call('ZSCORE', key, name)
  return expires and tonumber(expires) > now() and 1 or 0
end
-- Has a session keep its place, where the owner's are counted.
local function keep(key, session, value, ttl)
  if not key then return end
  local worker, number = parse(value)
  redis.call('HSET', key, session, worker .. ' ' .. number .. ' ' .. (now() + ttl))
  redis.call('PEXPIRE', key, ttl)
end
local function state(value, mine, over)
  if not value or value == over then return 'free' end
  local worker, number = parse(value)
  if worker == 'gone' then return 'free' end
  local my_worker, my_number = parse(mine)
  if worker ~= my_worker then return 'other' end
  return number > my_number and 'newer' or 'free'
end
"""

CLAIM = (
    _STATE
    + """
-- KEYS session stream early, places if they are counted
-- ARGV session-value stream-value ttl name reject session-over stream-over, and then, if they are:
--   place limit, and of places "<place> <worker> <number>" those whose streams have ended
local function others()
  local over, live, found = {}, {}, redis.call('HGETALL', KEYS[4])
  for at = 10, #ARGV do over[ARGV[at]] = true end
  for at = 1, #found, 2 do
    local holder, expires = string.match(found[at + 1], '^(%S+ %d+) (%d+)$')
    local whole = found[at] .. ' ' .. holder
    if tonumber(expires) <= now() or over[whole] then
      redis.call('HDEL', KEYS[4], found[at])
    elseif found[at] ~= ARGV[8] then
      live[#live + 1] = whole
    end
  end
  return live
end
local session, stream = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
local of_session = state(session, ARGV[1], ARGV[6])
if state(stream, ARGV[2], ARGV[7]) == 'other' then return {'stream', stream} end
if of_session == 'other' and ARGV[5] == '1' then return {'session', session} end
if KEYS[4] then
  local live = others()
  if #live >= tonumber(ARGV[9]) then return {'places', live} end
end
if of_session ~= 'newer' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
  keep(KEYS[4], ARGV[8], ARGV[1], ARGV[3])
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {'claimed', of_session == 'other' and session or '', early(KEYS[3], ARGV[4])}
"""
)

REFRESH = (
    _STATE
    + """
-- KEYS session stream early, places if they are counted
-- ARGV session-value stream-value ttl name session-over, place if they are
-- Returns whether a cancel came early, and what else stands for the session.
local session = redis.call('GET', KEYS[1])
local of_session = state(session, ARGV[1], ARGV[5])
if of_session == 'free' then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
  keep(KEYS[4], ARGV[6], ARGV[1], ARGV[3])
end
if state(redis.call('GET', KEYS[2]), ARGV[2], '') == 'free' then
  redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
end
return {early(KEYS[3], ARGV[4]), of_session == 'other' and session or ''}
"""
)

PUT_BACK = (
    _STATE
    + """
-- KEYS session, places if they are counted
-- ARGV session-value value-before ttl, place if they are
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
keep(KEYS[2], ARGV[4], ARGV[2], ARGV[3])
return 1
"""
)

RELEASE = """
-- KEYS session stream early, places if they are counted
-- ARGV session-value stream-value remember name gone-value, place if they are
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
if redis.call('GET', KEYS[2]) == ARGV[2] then redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[3]) end
redis.call('ZREM', KEYS[3], ARGV[4])
local place = KEYS[4] and redis.call('HGET', KEYS[4], ARGV[6])
if place then
  local mine = string.match(ARGV[1], '^%S+ %d+ ')
  if string.sub(place, 1, #mine) == mine then redis.call('HDEL', KEYS[4], ARGV[6]) end
end
"""

FIND = (
    _STATE
    + """
-- KEYS session-or-stream since early
-- ARGV settled name remember most session; no name and no session for a cancel that names no stream
-- Returns what is there, or 'unsure' or 'absent'.
local value = redis.call('GET', KEYS[1])
if value then
  local _, _, session = parse(value)
  if ARGV[5] == '' or session == ARGV[5] then return value end
end
if ARGV[2] ~= '' then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now())
  redis.call('ZADD', KEYS[3], now() + ARGV[3], ARGV[2])
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - ARGV[4])
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
local since = tonumber(redis.call('GET', KEYS[2]) or 'nan')
return since and now() - since >= tonumber(ARGV[1]) and 'absent' or 'unsure'
"""
)

SINCE = (
    _STATE
    + """
-- KEYS since
redis.call('SET', KEYS[1], now(), 'NX')
return redis.call('GET', KEYS[1])
"""
)
