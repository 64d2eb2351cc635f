"""What is done in Redis in one step each: Lua, atomic, on keys that begin with the one prefix that they are given.

Each compares the store's identity first: a Redis that was wiped is another store, and gets nothing written. Answers
are lists: a word, and what belongs to it. ``ok``, ``held`` (by whom), ``stale`` (the epoch there is), ``other`` (the
row that is there with other contents), ``wiped`` (the identity there is).

Nothing is written before everything has been compared: Redis does not take back what a script did before it failed.
"""

from __future__ import annotations

__all__ = ["SCRIPTS"]

_IDENTITY = """
local meta, lease = KEYS[1] .. 'meta', KEYS[1] .. 'lease'
local there = redis.call('HGET', meta, 'store_id')
if there ~= ARGV[1] then return {'wiped', there or ''} end
"""

_OPEN = """
local meta = KEYS[1] .. 'meta'
if redis.call('HSETNX', meta, 'store_id', ARGV[1]) == 1 then
  redis.call('HSET', meta, 'federation', ARGV[2], 'schema', ARGV[3], 'leader_epoch', '0', 'written', '0')
end
return redis.call('HMGET', meta, 'store_id', 'federation', 'schema')
"""

_LEASE = (
    _IDENTITY
    + """
local holder, lease_ms = ARGV[2], ARGV[3]
local epoch, held = redis.call('HGET', meta, 'leader_epoch'), redis.call('GET', lease)
local is_ours = not held or string.sub(held, 1, 32) == string.sub(holder, 1, 32)
"""
)
"""A holder is 32 characters of its own, a space, and its name."""

_LEAD = (
    _LEASE
    + """
local at_least, under = tonumber(ARGV[4]), ARGV[5]
if under ~= '' and epoch ~= under then return {'stale', epoch} end
if not is_ours then return {'held', string.sub(held, 34)} end
epoch = string.format('%d', math.max(tonumber(epoch), at_least) + 1)
redis.call('SET', lease, holder, 'PX', lease_ms)
redis.call('HSET', meta, 'leader_epoch', epoch, 'written', '0')
return {'ok', epoch}
"""
)
"""Take the lead, where nobody else holds it: a new epoch, and the lease."""

_RENEW = (
    _LEASE
    + """
if epoch ~= ARGV[4] or not is_ours then return {'stale', epoch} end
redis.call('SET', lease, holder, 'PX', lease_ms)
return {'ok', epoch}
"""
)
"""Hold the lead on. A lease that ran out while nobody took it is taken up again: the epoch is still this leader's."""

_RELEASE = (
    _LEASE
    + """
if epoch == ARGV[4] and is_ours then redis.call('DEL', lease) end
return {'ok', epoch}
"""
)

_VOLUME = (
    _IDENTITY
    + """
redis.call('HSETNX', meta, 'volume', ARGV[2])
return {'ok', redis.call('HGET', meta, 'volume')}
"""
)

_WRITE = (
    _IDENTITY
    + """
local epoch = redis.call('HGET', meta, 'leader_epoch')
if epoch ~= ARGV[2] then return {'stale', epoch} end
local number, written = tonumber(ARGV[3]), tonumber(redis.call('HGET', meta, 'written'))
if number == written then return {'ok', epoch} end
if number < written then return {'stale', epoch} end
for at = 4, #ARGV, 4 do
  if ARGV[at + 1] ~= '' then
    local found = redis.call('HGET', KEYS[1] .. 'rows:' .. ARGV[at], ARGV[at + 2])
    if found and found ~= ARGV[at + 3] then return {'other', ARGV[at] .. ' ' .. ARGV[at + 2]} end
  end
end
redis.call('HSET', meta, 'written', ARGV[3])
for at = 4, #ARGV, 4 do
  redis.call('HSET', KEYS[1] .. 'rows:' .. ARGV[at], ARGV[at + 2], ARGV[at + 3])
  redis.call('ZADD', KEYS[1] .. 'keys:' .. ARGV[at], 0, ARGV[at + 2])
end
return {'ok', epoch}
"""
)
"""All rows or none, each as (table, whether it is written once, key, document), under epoch and number."""

_ROWS = (
    _IDENTITY
    + """
local order, rows = KEYS[1] .. 'keys:' .. ARGV[2], KEYS[1] .. 'rows:' .. ARGV[2]
local keys = redis.call('ZRANGEBYLEX', order, '[' .. ARGV[3], '[' .. ARGV[3] .. string.char(255))
local found = {}
for _, key in ipairs(keys) do found[#found + 1] = redis.call('HGET', rows, key) end
return found
"""
)
"""Documents whose keys begin so, in the order of their keys."""

SCRIPTS = {
    "open": _OPEN,
    "lead": _LEAD,
    "renew": _RENEW,
    "release": _RELEASE,
    "volume": _VOLUME,
    "write": _WRITE,
    "rows": _ROWS,
}
"""By name. ``KEYS``: the prefix. ``ARGV``: the store's identity (``open``: a new one), then what each reads first."""
