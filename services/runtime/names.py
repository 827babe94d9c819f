"""The addresses of names, looked up again and again: gRPC itself looks a name up only when a
connection breaks, and so never finds a replica that is added."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from services.runtime.settings.targets import Name, Target, socket_address

log = logging.getLogger(__name__)

LOOK_UP_INTERVAL_S = 1.0
LOOK_UP_TIMEOUT_S = 5.0
# What a resolver answers for a name that has no address, in contrast to no answer.
NO_ADDRESS = (socket.EAI_NONAME, socket.EAI_NODATA)

Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""From a name to its IPv4 and IPv6 addresses. Raises OSError where there is no answer."""


async def resolve(host: str) -> Sequence[str]:
    """What the system says: DNS, /etc/hosts and whatever else it is told to ask."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in NO_ADDRESS:
            return []
        raise
    return [str(address[0]) for *_, address in found]


class NameWatch:
    """Tells `on_addresses` all addresses of a target: at once, and when they have changed.

    Each address comes with the `NAME:PORT` it was found by, None for one that the target itself
    has. A look-up without an answer changes nothing.
    """

    def __init__(
        self,
        target: Target,
        on_addresses: Callable[[Mapping[str, str | None]], None],
        resolve: Resolve = resolve,
    ) -> None:
        self._target = target
        self._on_addresses = on_addresses
        self._resolve = resolve
        self._found: dict[Name, Sequence[str]] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins. Needs a running event loop."""
        if self._target.addresses:
            self._tell()
        if self._target.names:
            # Not in the context of a request that happens to be under way.
            self._task = asyncio.create_task(self._watch(), context=contextvars.Context())

    def close(self) -> None:
        """Looks no further."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            before = dict(self._found)
            await asyncio.gather(*(self._look_up(name) for name in self._target.names))
            if self._found != before:
                self._tell()
            await asyncio.sleep(LOOK_UP_INTERVAL_S)

    async def _look_up(self, name: Name) -> None:
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                hosts = await self._resolve(name.host)
        except (OSError, TimeoutError) as error:
            if name not in self._found:
                log.warning("%s cannot be looked up: %s", name, error or "no answer")
            self._found.setdefault(name, ())
        else:
            self._found[name] = sorted({socket_address(host, name.port) for host in hosts})

    def _tell(self) -> None:
        addresses: dict[str, str | None] = dict.fromkeys(self._target.addresses)
        for name, found in self._found.items():
            addresses |= dict.fromkeys(found, str(name))
        self._on_addresses(addresses)
