"""The cache's atomic scripts. Each touches the keys of one slot alone and bears being run twice."""

from __future__ import annotations

from services.cache.codec import STAMP_FIRST, STAMP_LAST
from services.cache.keys import GARBAGE_PREFIX, INDEX_PREFIX
from services.cache.leases import NONCE_BYTES
from services.runtime.valkey import Script

# Generations live at least this long beyond the last answer stored in them. One that is lost, to
# eviction or a restart, gets a new value: its answers are then forgotten, never confused.
GENERATION_SLACK_MS = 86_400_000
GARBAGE_TTL_MS = 86_400_000

_NOW = """
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
"""

# KEYS: generations. Returns their values, missing ones made anew.
READ_GENERATIONS = Script(
    _NOW
    + f"""
local values = {{}}
for i, key in ipairs(KEYS) do
  local value = redis.call('GET', key)
  if not value then
    value = string.format('%.0f', now_us)
    redis.call('SET', key, value, 'PX', {GENERATION_SLACK_MS})
  end
  values[i] = value
end
return values
"""
)

# KEYS: answer, lease. ARGV: nonce, stamp, TTL in ms.
# Returns the time in microseconds when the lease is given, 0 when another's stands, -1 when there
# is an answer. A lease of other generations is void: its answer would not be served.
ACQUIRE_LEASE = Script(
    _NOW
    + f"""
if redis.call('GETRANGE', KEYS[1], {STAMP_FIRST}, {STAMP_LAST}) == ARGV[2] then return -1 end
local lease = redis.call('GET', KEYS[2])
if lease and string.sub(lease, {NONCE_BYTES} + 1) == ARGV[2]
    and string.sub(lease, 1, {NONCE_BYTES}) ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[2], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
return now_us
"""
)

# KEYS: lease. ARGV: nonce. Returns whether the lease was still held.
RELEASE_LEASE = Script(
    f"""
local lease = redis.call('GET', KEYS[1])
if lease and string.sub(lease, 1, {NONCE_BYTES}) == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
"""
)

# KEYS: answer, lease, barrier. ARGV: value, TTL in ms, nonce or '', time of the lease or 0.
# Returns whether the answer was kept; one whose lease is older than the barrier is not.
STORE_ANSWER = Script(
    f"""
local kept = 1
if ARGV[3] ~= '' then
  local barrier = redis.call('GET', KEYS[3])
  if barrier and tonumber(ARGV[4]) <= tonumber(barrier) then kept = 0 end
end
if kept == 1 then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
if ARGV[3] ~= '' then
  local lease = redis.call('GET', KEYS[2])
  if lease and string.sub(lease, 1, {NONCE_BYTES}) == ARGV[3] then redis.call('DEL', KEYS[2]) end
end
return kept
"""
)

# KEYS: pairs, index, generations... ARGV: pair, TTL in ms, entry digests...
# Enters answers under their scope and model, and drops what has run out.
INDEX_ANSWERS = Script(
    _NOW
    + f"""
local now_ms = math.floor(now_us / 1000)
local ttl_ms = tonumber(ARGV[2])
local function extend(key, ttl)
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, string.format('%.0f', ttl)) end
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now_ms)
for i = 3, #ARGV do redis.call('ZADD', KEYS[2], now_ms + ttl_ms, ARGV[i]) end
extend(KEYS[2], ttl_ms)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
local pair_end = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0')
redis.call('ZADD', KEYS[1], math.max(pair_end, now_ms + ttl_ms), ARGV[1])
extend(KEYS[1], ttl_ms)
for i = 3, #KEYS do extend(KEYS[i], ttl_ms + {GENERATION_SLACK_MS}) end
return 1
"""
)

# Indexes are found through the list of pairs and so are not among KEYS; their names carry the same
# hash tag, which puts them on the same node of a cluster.
_EACH_PAIR = f"""
local now_ms = math.floor(now_us / 1000)
local function each_pair(pairs_key, visit)
  redis.call('ZREMRANGEBYSCORE', pairs_key, '-inf', now_ms)
  for _, pair in ipairs(redis.call('ZRANGE', pairs_key, 0, -1)) do
    local index = '{INDEX_PREFIX}' .. pair
    visit(pair, index, redis.call('ZCOUNT', index, '(' .. string.format('%.0f', now_ms), '+inf'))
  end
end
"""

# KEYS: pairs. Returns the number of answers.
COUNT_ANSWERS = Script(
    _NOW
    + _EACH_PAIR
    + """
local total = 0
each_pair(KEYS[1], function(pair, index, count) total = total + count end)
return total
"""
)

# KEYS: pairs, generation. ARGV: first and last character of a pair to compare, what they must be.
# Begins a new generation, which forgets every answer of the old one at once, and sets the indexes
# aside for the answers' memory to be given back. Returns the new generation, the number of answers,
# and the names of the indexes set aside.
INVALIDATE = Script(
    _NOW
    + _EACH_PAIR
    + f"""
local old = tonumber(redis.call('GET', KEYS[2]) or '0')
local generation = string.format('%.0f', math.max(old + 1, now_us))
local ttl_ms = math.max(redis.call('PTTL', KEYS[2]), {GENERATION_SLACK_MS})
redis.call('SET', KEYS[2], generation, 'PX', string.format('%.0f', ttl_ms))
local total = 0
local garbage = {{}}
each_pair(KEYS[1], function(pair, index, count)
  if string.sub(pair, tonumber(ARGV[1]), tonumber(ARGV[2])) == ARGV[3] then
    total = total + count
    redis.call('ZREM', KEYS[1], pair)
    if redis.call('EXISTS', index) == 1 then
      local aside = '{GARBAGE_PREFIX}' .. generation .. ':' .. pair
      redis.call('RENAME', index, aside)
      redis.call('PEXPIRE', aside, {GARBAGE_TTL_MS})
      garbage[#garbage + 1] = aside
    end
  end
end)
return {{generation, total, garbage}}
"""
)

# KEYS: answer, lease, barrier. ARGV: stamp, TTL of the barrier in ms.
# Forgets one answer, and any that is being computed. Returns whether there was one.
INVALIDATE_ANSWER = Script(
    _NOW
    + f"""
local stamp = redis.call('GETRANGE', KEYS[1], {STAMP_FIRST}, {STAMP_LAST})
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('SET', KEYS[3], string.format('%.0f', now_us), 'PX', ARGV[2])
return stamp == ARGV[1] and 1 or 0
"""
)

# KEYS: pairs, index. ARGV: entry digest.
UNINDEX_ANSWER = Script("return redis.call('ZREM', KEYS[2], ARGV[1])")

# KEYS: answer. ARGV: value. Deletes exactly the value that was found to be unusable.
DISCARD = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('UNLINK', KEYS[1]) end
return 0
"""
)

# KEYS: index set aside. ARGV: how many. Takes entry digests out of it; none when it is empty.
TAKE_GARBAGE = Script(
    """
local digests = {}
local popped = redis.call('ZPOPMIN', KEYS[1], ARGV[1])
for i = 1, #popped, 2 do digests[#digests + 1] = popped[i] end
return digests
"""
)

# KEYS: answer. ARGV: first and last byte of a generation in the value, what it must not be.
# Gives the memory of a forgotten answer back, and leaves one that was stored since.
RECLAIM = Script(
    """
local generation = redis.call('GETRANGE', KEYS[1], ARGV[1], ARGV[2])
if generation ~= '' and generation ~= ARGV[3] then return redis.call('UNLINK', KEYS[1]) end
return 0
"""
)
