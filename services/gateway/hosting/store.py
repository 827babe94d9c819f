"""Where the document of what is desired is kept, and who may act on it now.

It lives in the Redis-protocol server, and a copy in each gateway. A server that has forgotten it
gets it back from the gateways, the newest version from whoever has it. Where there is no server at
all (none is named, and the embedded one does not run) there is this one gateway, and its copy is
the document.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.gateway.hosting.desired import DamagedDocumentError, Desired
from services.runtime.errors import Reason, ServiceError
from services.runtime.valkey import ValkeyClient, ValkeyError
from services.runtime.valkey.script import Script

log = logging.getLogger(__name__)

DOCUMENT_KEY = "meshserve:hosting:desired"
LEASE_PREFIX = "meshserve:hosting:lease:"
# A gateway that ends while it acts is waited for this long.
LEASE_S = 10.0
LEASE_RETRY_S = 0.25
RETRY_AFTER_S = 2.0

# KEYS: document. ARGV: the newest version that may be replaced, the version of a document, the
# document. Returns the document that is kept then.
OFFER = Script("""
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if version <= tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[1], 'version', ARGV[2], 'document', ARGV[3])
end
return redis.call('HGET', KEYS[1], 'document')
""")

# KEYS: lease. ARGV: token, milliseconds. Returns whether the token holds it.
TAKE_LEASE = Script("""
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

# KEYS: lease. ARGV: token.
GIVE_LEASE_UP = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
end
return 1
""")


class DesiredStore:
    """The document, and a lease for each model.

    Args:
        client: of the server.
        shared: whether other gateways may be there, so that nothing goes without the server.

    Attributes:
        current: the document as this gateway knows it.
    """

    def __init__(self, client: ValkeyClient, *, shared: bool) -> None:
        self.current = Desired()
        self._client = client
        self._shared = shared
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def refresh(self) -> None:
        """Reads the document, or gives it back to a server that has forgotten it. Nothing happens
        while the server is away."""
        try:
            kept = await self._client.execute("HGET", DOCUMENT_KEY, "document")
            stored = Desired() if kept is None else Desired.from_json(kept)
            if stored.version < self.current.version:
                stored = await self._offer(self.current, over=self.current.version - 1)
        except ValkeyError as error:
            log.debug("what is to be loaded cannot be read: %s", error)
        except DamagedDocumentError as error:
            log.warning("%s is passed over: %s", DOCUMENT_KEY, error)
        else:
            self.current = stored

    async def change(self, edit: Callable[[Desired], Desired]) -> None:
        """Replaces the document by what `edit` makes of the newest one, of which it may be asked
        more than once. Raises ServiceError (HOSTING_UNAVAILABLE), and what `edit` raises."""
        base = self.current
        while True:
            wanted = edit(base)
            try:
                stored = await self._offer(wanted, over=base.version)
            except ValkeyError as error:
                self._go_on_alone(error)
                stored = wanted
            self.current = stored
            if stored == wanted:
                return
            base = stored

    @asynccontextmanager
    async def lease(self, model: str, *, wait: bool = True) -> AsyncIterator[bool]:
        """A block in which no other gateway, and nobody else of this one, acts on a model; whether
        it is one: without `wait` somebody else may be at it. Raises ServiceError
        (HOSTING_UNAVAILABLE)."""
        lock = self._locks[model]
        if lock.locked() and not wait:
            yield False
            return
        async with lock:
            token = secrets.token_hex(8)
            key = LEASE_PREFIX + model
            if not await self._take(key, token, wait=wait):
                yield False
                return
            # What it renews outlives no deadline of whoever asked.
            renewal = asyncio.create_task(self._renew(key, token), context=contextvars.Context())
            try:
                yield True
            finally:
                renewal.cancel()
                await self._give_up(key, token)

    async def _offer(self, document: Desired, *, over: int) -> Desired:
        """Raises ValkeyError."""
        kept = await self._client.run_script(
            OFFER, [DOCUMENT_KEY], [over, document.version, document.to_json()]
        )
        try:
            return Desired.from_json(kept)
        except DamagedDocumentError as error:
            raise ServiceError(Reason.INTERNAL, f"{DOCUMENT_KEY}: {error}") from error

    async def _take(self, key: str, token: str, *, wait: bool) -> bool:
        while True:
            try:
                if await self._client.run_script(TAKE_LEASE, [key], [token, round(LEASE_S * 1000)]):
                    return True
            except ValkeyError as error:
                self._go_on_alone(error)
                return True
            if not wait:
                return False
            await asyncio.sleep(LEASE_RETRY_S)

    async def _renew(self, key: str, token: str) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                await self._client.run_script(TAKE_LEASE, [key], [token, round(LEASE_S * 1000)])
            except ValkeyError as error:
                log.info("a lease is not renewed: %s", error)

    async def _give_up(self, key: str, token: str) -> None:
        try:
            await self._client.run_script(GIVE_LEASE_UP, [key], [token])
        except ValkeyError as error:
            log.info("a lease is left to run out: %s", error)

    def _go_on_alone(self, error: ValkeyError) -> None:
        """Returns where this gateway is the only one. Raises ServiceError."""
        if self._shared:
            raise ServiceError(
                Reason.HOSTING_UNAVAILABLE,
                "what operators have asked to be loaded cannot be read or kept",
                retry_after_s=RETRY_AFTER_S,
            ) from error
