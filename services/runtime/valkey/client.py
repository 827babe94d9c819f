"""An asyncio client of a Redis-protocol server that fails in bounded time and mends itself.

While the server is away a circuit is open: commands fail at once instead of each waiting for a
timeout, and one background task asks until the server answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio.cluster import RedisCluster

from services.runtime.valkey.backends import (
    CONNECT_TIMEOUT_S,
    MAX_CONCURRENT_CALLS,
    Backend,
    close,
    make_backend,
    ping,
)
from services.runtime.valkey.errors import (
    ValkeyRefusedError,
    ValkeyUnavailableError,
    redacted,
)
from services.runtime.valkey.script import Script

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 1.0
RECOVERY_INTERVAL_S = 0.25
# A command that takes this share of its time makes us ask the server, for that share of the time at
# most: when the command's own time is up, it is known whether others should still be sent.
_SUSPECT_AFTER_SHARE = 0.4
_ASK_FOR_SHARE = 0.5

# Server answers that pass by themselves: a replica being promoted, data being loaded, slots moving.
_PASSING_ERRORS = (
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
    redis_errors.RedisClusterException,
    redis_errors.MovedError,
    redis_errors.AskError,
    OSError,
    TimeoutError,
)

T = TypeVar("T")
Argument = bytes | str | int | float


class Renewal(Protocol):
    """Tells a client which URL to use, as file_watch.FileWatch does."""

    def start(self) -> None:
        """Looks for another from time to time."""
        ...

    async def stop(self) -> None:
        """Looks no more."""
        ...

    async def look(self, *, twice: bool = True) -> object:
        """Looks now."""
        ...


class ValkeyClient:
    """Commands and scripts on one server or cluster. Answers are bytes, never decoded.

    Every call raises ValkeyUnavailableError within `command_timeout_s` of its turn when the server
    is away (at once when that is known already), and ValkeyRefusedError when the server answers
    with an error. A command whose connection broke is sent once more, so it must bear being run
    twice.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        name: str,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        self._backend: Any = backend
        self._name = name
        self._command_timeout_s = command_timeout_s
        self._turn = asyncio.Semaphore(MAX_CONCURRENT_CALLS)
        self._outage: str | None = None
        self._recovery: asyncio.Task[None] | None = None
        self._replaced: set[asyncio.Task[None]] = set()
        self._closed = False
        # Where another URL may come from.
        self.renewal: Renewal | None = None

    def start(self) -> None:
        """Looks for another URL from now on, where one may come."""
        if self.renewal is not None:
            self.renewal.start()

    @property
    def name(self) -> str:
        """The URL without its credentials, for logs."""
        return self._name

    @property
    def is_cluster(self) -> bool:
        """Whether keys are spread over nodes, so that only keys of one slot go together."""
        return isinstance(self._backend, RedisCluster)

    async def execute(self, *command: Argument) -> Any:
        """The answer to one command, for example `execute("GET", key)`, in redis-py's form."""
        return await self._guarded(lambda: self._backend.execute_command(*command))

    async def execute_many(self, *commands: Sequence[Argument]) -> list[Any]:
        """The answers to commands sent together, in order; not atomic.

        On one server they take one round trip and run in order; on a cluster they run side by side.
        """
        if self.is_cluster:
            return await self._guarded(
                lambda: asyncio.gather(
                    *(self._backend.execute_command(*command) for command in commands)
                )
            )

        async def pipelined() -> list[Any]:
            pipeline = self._backend.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute()
            return answers

        return await self._guarded(pipelined)

    async def run_script(
        self, script: Script, keys: Sequence[Argument], arguments: Sequence[Argument] = ()
    ) -> Any:
        """What an atomic script returns."""

        async def run() -> Any:
            operands = (len(keys), *keys, *arguments)
            try:
                return await self._backend.execute_command("EVALSHA", script.sha1, *operands)
            except redis_errors.NoScriptError:
                # The server forgot its scripts, or this node of a cluster never saw this one.
                return await self._backend.execute_command("EVAL", script.source, *operands)

        return await self._guarded(run)

    async def ping(self) -> None:
        """Returns if the server answers."""
        await self._guarded(lambda: ping(self._backend))

    async def use(self, url: str) -> None:
        """Goes on with another URL; what is under way ends where it is.

        Raises ValkeyUrlError or ValkeyRefusedError where it cannot be used now, and has changed
        nothing then.
        """
        backend, name = make_backend(url, self._command_timeout_s), redacted(url)
        try:
            async with asyncio.timeout(self._command_timeout_s):
                await ping(backend)
        except BaseException as error:
            await close(backend, name)
            if not isinstance(error, (*_PASSING_ERRORS, redis_errors.RedisError)):
                raise
            raise ValkeyRefusedError(f"{name}: {_describe(error)}") from error
        task = asyncio.create_task(self._close_replaced(self._backend, self._name))
        self._replaced.add(task)
        task.add_done_callback(self._replaced.discard)
        self._backend, self._name = backend, name

    async def close(self) -> None:
        """Closes all connections; later calls raise ValkeyUnavailableError."""
        self._closed = True
        if self.renewal is not None:
            await self.renewal.stop()
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
            self._recovery = None
        for task in self._replaced:
            task.cancel()
        await asyncio.gather(*self._replaced, return_exceptions=True)
        await close(self._backend, self._name)

    async def __aenter__(self) -> ValkeyClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _guarded(self, call: Callable[[], Awaitable[T]]) -> T:
        async with self._turn:
            # Only now: the outage may have begun while this call waited for its turn.
            if self._closed:
                raise ValkeyUnavailableError(
                    "the client is closed", retry_after_s=RECOVERY_INTERVAL_S
                )
            if self._outage is not None:
                raise self._unavailable(self._outage)
            return await self._bounded(call)

    async def _bounded(self, call: Callable[[], Awaitable[T]]) -> T:
        suspicion = asyncio.get_running_loop().call_later(
            _SUSPECT_AFTER_SHARE * self._command_timeout_s, self._ask
        )
        try:
            async with asyncio.timeout(self._command_timeout_s):
                backend = self._backend
                try:
                    return await call()
                except (redis_errors.ConnectionError, redis_errors.RedisClusterException) as error:
                    if not (_is_denial(error) and await self._has_another(backend)):
                        raise
                    return await call()
        except _PASSING_ERRORS as error:
            reason = _describe(error)
            # One slow command is its own caller's bad luck: whether the server is away, the
            # suspicion finds out meanwhile. A broken or refused connection leaves no doubt.
            if type(error) is not TimeoutError:
                self._open_circuit(reason)
            raise self._unavailable(reason) from error
        except redis_errors.RedisError as error:
            raise ValkeyRefusedError(f"{self._name} refused: {error}") from error
        finally:
            suspicion.cancel()

    async def _has_another(self, denied: Any) -> bool:
        """Whether another backend is there than one that has denied us."""
        if self._backend is denied and self.renewal is not None:
            await self.renewal.look(twice=False)
        return self._backend is not denied

    async def _close_replaced(self, backend: Any, name: str) -> None:
        """Closes a backend once nothing can be under way on it any more."""
        try:
            await asyncio.sleep(2 * self._command_timeout_s)
        finally:
            await close(backend, name)

    def _unavailable(self, reason: str) -> ValkeyUnavailableError:
        return ValkeyUnavailableError(
            f"{self._name} is unavailable: {reason}", retry_after_s=2 * RECOVERY_INTERVAL_S
        )

    def _open_circuit(self, reason: str) -> None:
        if self._outage is None and not self._closed:
            self._outage = reason
            logger.warning("%s is unavailable: %s", self._name, reason)
        self._ask()

    def _ask(self) -> None:
        """Sees to it that someone asks until the server answers."""
        if not self._closed and (self._recovery is None or self._recovery.done()):
            self._recovery = asyncio.create_task(self._recover(), name="valkey-recovery")

    async def _recover(self) -> None:
        timeout_s = min(CONNECT_TIMEOUT_S, _ASK_FOR_SHARE * self._command_timeout_s)
        while True:
            try:
                backend = self._backend
                async with asyncio.timeout(timeout_s):
                    await ping(self._backend)
            except (*_PASSING_ERRORS, redis_errors.RedisError) as error:
                self._open_circuit(_describe(error))
                if _is_denial(error) and await self._has_another(backend):
                    continue
                await asyncio.sleep(RECOVERY_INTERVAL_S)
                continue
            if self._outage is not None:
                self._outage = None
                logger.info("%s is available again", self._name)
            return


def connect(url: str, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> ValkeyClient:
    """A client of the server at `url`. Connects when first used.

    `redis://[user:password@]host[:port][/db]`, `rediss://` (TLS), `unix:///path/to.sock`, and for
    a cluster `redis+cluster://host:port[,host:port...]` or `rediss+cluster://...`. Options of
    redis-py may follow as a query, for example `?ssl_ca_certs=/etc/ca.pem`.

    Raises ValkeyUrlError when the URL cannot be used.
    """
    backend = make_backend(url, command_timeout_s)
    return ValkeyClient(backend, name=redacted(url), command_timeout_s=command_timeout_s)


def _is_denial(error: BaseException | None) -> bool:
    """Whether the server does not know our password. A cluster's client tells of it as a cause."""
    while error is not None:
        if isinstance(error, redis_errors.AuthenticationError):
            return True
        error = error.__cause__
    return False


def _describe(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return text or "no answer in time"
    return text or type(error).__name__
