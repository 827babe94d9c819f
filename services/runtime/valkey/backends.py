"""redis-py's own clients of a server or a cluster, set up as ours needs them."""

from __future__ import annotations

import logging
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio as redis
from redis import exceptions as redis_errors
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import BlockingConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff, NoBackoff

from services.runtime.valkey.errors import ValkeyUrlError, redacted

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 0.5
IDLE_CHECK_S = 15
# Calls beyond this many queue in our client, where waiting is not taken for a silent server.
MAX_CONCURRENT_CALLS = 64
# A call on a cluster can need two connections of one node; one more is for asking after an outage.
_MAX_CONNECTIONS = 2 * MAX_CONCURRENT_CALLS + 1
DEFAULT_PORT = 6379

_PLAIN_SCHEMES = ("redis", "rediss", "unix")
_CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
# A command is sent again at most once, and only when the connection broke: a connection that went
# stale while it lay in the pool must not cost a request. All our scripts bear being run twice.
_RETRIES = 1

Backend: TypeAlias = redis.Redis | RedisCluster


def make_backend(url: str, command_timeout_s: float) -> Backend:
    """The library's own client for `connect`. Raises ValkeyUrlError."""
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
        if scheme in _PLAIN_SCHEMES:
            return _connect_plain(url, options, command_timeout_s)
        if scheme in _CLUSTER_SCHEMES:
            return _connect_cluster(url, options)
        schemes = ", ".join(f"{known}://" for known in (*_PLAIN_SCHEMES, *_CLUSTER_SCHEMES))
        raise ValkeyUrlError(f"the URL of the Redis-protocol server must begin with {schemes}")
    except ValkeyUrlError:
        raise
    except (TypeError, ValueError, redis_errors.RedisError, OSError) as error:
        raise ValkeyUrlError(f"{redacted(url)}: not a usable URL: {error}") from error


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


async def ping(backend: Any) -> None:
    """Returns if the server answers, or one node of a cluster."""
    if isinstance(backend, RedisCluster):
        await backend.execute_command("PING", target_nodes=RedisCluster.RANDOM)
    else:
        await backend.execute_command("PING")


async def close(backend: Any, name: str) -> None:
    """Closes all its connections."""
    try:
        await backend.aclose()
    except (redis_errors.RedisError, OSError) as error:
        logger.debug("closing the connections to %s failed: %s", name, error)
