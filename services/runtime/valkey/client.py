"""An asyncio client of a Redis-protocol server that fails in bounded time and mends itself.

While the server is away a circuit is open: commands fail at once instead of each waiting for a
timeout, and one background task asks until the server answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import BlockingConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff

from services.runtime.valkey.errors import (
    ValkeyRefusedError,
    ValkeyUnavailableError,
    ValkeyUrlError,
    redacted,
)
from services.runtime.valkey.script import Script

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 1.0
CONNECT_TIMEOUT_S = 0.5
RECOVERY_INTERVAL_S = 0.25
IDLE_CHECK_S = 15
# Calls beyond this many queue here, where waiting is not taken for a server that does not answer.
MAX_CONCURRENT_CALLS = 64
# A command that takes this share of its time makes us ask the server, for that share of the time at
# most: when the command's own time is up, it is known whether others should still be sent.
_SUSPECT_AFTER_SHARE = 0.4
_ASK_FOR_SHARE = 0.5
# A call on a cluster can need two connections of one node; one more is for asking after an outage.
_MAX_CONNECTIONS = 2 * MAX_CONCURRENT_CALLS + 1
DEFAULT_PORT = 6379

_PLAIN_SCHEMES = ("redis", "rediss", "unix")
_CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
# A command is sent again at most once, and only when the connection broke: a connection that went
# stale while it lay in the pool must not cost a request. All our scripts bear being run twice.
_RETRIES = 1

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


class ValkeyClient:
    """Commands and scripts on one server or cluster. Answers are bytes, never decoded.

    Every call raises ValkeyUnavailableError within `command_timeout_s` of its turn when the server
    is away (at once when that is known already), and ValkeyRefusedError when the server answers
    with an error. A command whose connection broke is sent once more, so it must bear being run
    twice.
    """

    def __init__(
        self,
        backend: redis.Redis | RedisCluster,
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
        self._closed = False

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
        await self._guarded(self._ping)

    async def close(self) -> None:
        """Closes all connections; later calls raise ValkeyUnavailableError."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
            self._recovery = None
        try:
            await self._backend.aclose()
        except (redis_errors.RedisError, OSError) as error:
            logger.debug("closing the connections to %s failed: %s", self._name, error)

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
                async with asyncio.timeout(timeout_s):
                    await self._ping()
            except (*_PASSING_ERRORS, redis_errors.RedisError) as error:
                self._open_circuit(_describe(error))
                await asyncio.sleep(RECOVERY_INTERVAL_S)
                continue
            if self._outage is not None:
                self._outage = None
                logger.info("%s is available again", self._name)
            return

    async def _ping(self) -> None:
        if self.is_cluster:
            await self._backend.execute_command("PING", target_nodes=RedisCluster.RANDOM)
        else:
            await self._backend.execute_command("PING")


def connect(url: str, *, command_timeout_s: float = COMMAND_TIMEOUT_S) -> ValkeyClient:
    """A client of the server at `url`. Connects when first used.

    `redis://[user:password@]host[:port][/db]`, `rediss://` (TLS), `unix:///path/to.sock`, and for
    a cluster `redis+cluster://host:port[,host:port...]` or `rediss+cluster://...`. Options of
    redis-py may follow as a query, for example `?ssl_ca_certs=/etc/ca.pem`.

    Raises ValkeyUrlError when the URL cannot be used.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_connect_timeout": min(CONNECT_TIMEOUT_S, command_timeout_s),
        # Commands are timed here; of redis-py's own timeouts only that of connecting is left.
        "socket_timeout": None,
        "health_check_interval": IDLE_CHECK_S,
        "driver_info": None,
    }
    scheme = url.partition("://")[0]
    try:
        backend: redis.Redis | RedisCluster
        if scheme in _PLAIN_SCHEMES:
            backend = _connect_plain(url, options, command_timeout_s)
        elif scheme in _CLUSTER_SCHEMES:
            backend = _connect_cluster(url, options)
        else:
            schemes = ", ".join(f"{known}://" for known in (*_PLAIN_SCHEMES, *_CLUSTER_SCHEMES))
            raise ValkeyUrlError(f"the URL of the Redis-protocol server must begin with {schemes}")
    except ValkeyUrlError:
        raise
    except (TypeError, ValueError, redis_errors.RedisError, OSError) as error:
        raise ValkeyUrlError(f"{redacted(url)}: not a usable URL: {error}") from error
    return ValkeyClient(backend, name=redacted(url), command_timeout_s=command_timeout_s)


def _connect_plain(url: str, options: dict[str, Any], timeout_s: float) -> redis.Redis:
    parts = urlsplit(url)
    if parts.scheme == "unix" and not parts.path:
        raise ValkeyUrlError("a unix:// URL needs the path of a socket, unix:///path/to.sock")
    if parts.scheme != "unix":
        if not parts.hostname:
            raise ValkeyUrlError(f"{redacted(url)}: a host is missing")
        if parts.path not in ("", "/") and not parts.path[1:].isdigit():
            raise ValkeyUrlError(f"{redacted(url)}: {parts.path[1:]!r} is not a database number")
    retry = Retry(NoBackoff(), _RETRIES, supported_errors=(redis_errors.ConnectionError,))
    pool = BlockingConnectionPool.from_url(
        url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, retry=retry, **options
    )
    # Options that no connection takes show only when one is made; better now than on a request.
    pool.make_connection()  # type: ignore[no-untyped-call]
    return redis.Redis.from_pool(pool)


def _connect_cluster(url: str, options: dict[str, Any]) -> RedisCluster:
    parts = urlsplit(url)
    if parts.path not in ("", "/", "/0"):
        raise ValkeyUrlError(f"{redacted(url)}: a cluster has database 0 alone")
    credentials, _, hosts = parts.netloc.rpartition("@")
    first = hosts.split(",")[0]
    netloc = f"{credentials}@{first}" if credentials else first
    scheme = parts.scheme.removesuffix("+cluster")
    from_url: dict[str, Any] = dict(parse_url(urlunsplit((scheme, netloc, "", parts.query, ""))))
    for given_by_node in ("host", "port", "connection_class"):
        from_url.pop(given_by_node, None)
    # Cluster members name each other by address, so a failed node is asked for a new map of slots.
    retry = Retry(ConstantBackoff(0.05), _RETRIES + 1)
    return RedisCluster(
        startup_nodes=[_cluster_node(address, url) for address in hosts.split(",")],
        ssl=scheme == "rediss",
        retry=retry,
        max_connections=_MAX_CONNECTIONS,
        **{**options, **from_url},
    )


def _cluster_node(address: str, url: str) -> ClusterNode:
    parts = urlsplit(f"//{address}")
    if not parts.hostname:
        raise ValkeyUrlError(f"{redacted(url)}: a host is missing")
    # redis-py looks `localhost` up itself when it makes the node, and only for IPv4.
    return ClusterNode(parts.hostname, parts.port or DEFAULT_PORT)


def _describe(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return text or "no answer in time"
    return text or type(error).__name__
