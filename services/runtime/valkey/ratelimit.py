"""A request-rate limit that holds over all replicas, as one atomic script.

The generic cell rate algorithm (GCRA) of ITU-T I.371 Annex A, in its virtual-scheduling form: one
number per key, the theoretical arrival time (TAT) at which a perfectly even sender would send next.
A request conforms when it does not come earlier than TAT minus the tolerance that the burst gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.runtime.valkey.client import ValkeyClient
from services.runtime.valkey.script import Script

KEY_PREFIX = "meshserve:rate:"
_MINUTE_US = 60_000_000

# Times are in microseconds of the server's own clock, so replicas need not agree on the time.
# A stored TAT is never trusted beyond what a full burst could have made it: the clock may have gone
# back after a failover, and the limit may have been raised since.
GCRA = Script("""
local interval_us = tonumber(ARGV[1])
local burst = tonumber(ARGV[2])
local cost = tonumber(ARGV[3])
local time = redis.call('TIME')
local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
local tolerance_us = interval_us * burst

local function keep(tat_us)
  local ttl_ms = math.max(1, math.ceil((tat_us - now_us) / 1000))
  redis.call('SET', KEYS[1], string.format('%.17g', tat_us), 'PX', string.format('%.0f', ttl_ms))
end

local tat_us = math.max(tonumber(redis.call('GET', KEYS[1]) or '') or now_us, now_us)
if tat_us > now_us + tolerance_us then
  tat_us = now_us + tolerance_us
  keep(tat_us)
end

local next_tat_us = tat_us + interval_us * cost
local early_us = next_tat_us - tolerance_us - now_us
local allowed = 0
-- Half a microsecond forgives what binary fractions lose in a sum of intervals.
if early_us <= 0.5 then
  allowed = 1
  early_us = 0
  tat_us = next_tat_us
  if cost > 0 then
    keep(tat_us)
  end
end
local remaining = math.floor((now_us + tolerance_us - tat_us + 0.5) / interval_us)
return {
  allowed,
  string.format('%.17g', early_us),
  string.format('%.0f', math.max(0, remaining)),
  string.format('%.17g', tat_us - now_us),
  string.format('%.0f', now_us),
}
""")


@dataclass(frozen=True)
class Decision:
    """What the limiter says of one request."""

    allowed: bool
    # When a request of the same cost would be allowed; 0 if this one was.
    retry_after_s: float
    # Requests of cost 1 that may come at once, now.
    remaining: int
    # When the whole burst is there again.
    reset_after_s: float
    # The server's clock at the decision, in microseconds since the epoch.
    server_time_us: int


class RateLimiter:
    """Limits by key. What happens while the server is away is the caller's choice."""

    def __init__(self, client: ValkeyClient) -> None:
        self._client = client

    async def acquire(
        self, key: str, *, limit_per_minute: float, burst: int, cost: int = 1
    ) -> Decision:
        """Takes `cost` requests from the allowance of `key`, all or none.

        `key` shows up in the server's memory, so it must not be a secret.

        Raises ValkeyUnavailableError or ValkeyRefusedError when there is no decision, ValueError
        when the numbers make no sense (a cost above the burst could never be allowed).
        """
        if not 1 <= cost <= burst:
            raise ValueError(f"cost must lie in [1, burst], not {cost} with a burst of {burst}")
        return await self._decide(key, limit_per_minute, burst, cost)

    async def look(self, key: str, *, limit_per_minute: float, burst: int) -> Decision:
        """What is left of the allowance of `key`, of which nothing is taken. Raises as `acquire`
        does."""
        return await self._decide(key, limit_per_minute, burst, 0)

    async def _decide(self, key: str, limit_per_minute: float, burst: int, cost: int) -> Decision:
        if not (math.isfinite(limit_per_minute) and limit_per_minute > 0):
            raise ValueError(f"limit_per_minute must be positive, not {limit_per_minute}")
        allowed, retry_after_us, remaining, reset_us, now_us = await self._client.run_script(
            GCRA, [KEY_PREFIX + key], [repr(_MINUTE_US / limit_per_minute), burst, cost]
        )
        return Decision(
            allowed=bool(allowed),
            retry_after_s=float(retry_after_us) / 1e6,
            remaining=int(remaining),
            reset_after_s=float(reset_us) / 1e6,
            server_time_us=int(now_us),
        )
