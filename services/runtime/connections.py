"""The connection to one replica: a gRPC channel to one address, and its health."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.health import INSTANCE_HEADER
from services.runtime.replicas import ReplicaState

KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 2_000
FIRST_RECONNECT_DELAY_MS = 100
LONGEST_RECONNECT_DELAY_MS = 1_000


def channel_options(authority: str | None, max_message_bytes: int) -> list[tuple[str, Any]]:
    """gRPC channel arguments for one replica. Its certificate must be for `authority`, the
    `NAME:PORT` that it was found by; None means its address."""
    options: list[tuple[str, Any]] = [
        # Which replica a call goes to and whether it is tried again is decided above. With gRPC's
        # own retries a call whose connection breaks may wait on beyond its deadline.
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A killed replica is back within a second or two; the defaults would wait for minutes.
        ("grpc.initial_reconnect_backoff_ms", FIRST_RECONNECT_DELAY_MS),
        # How long one attempt may take, not how long to wait before the next.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", LONGEST_RECONNECT_DELAY_MS),
        # Replicas are told apart by their channels; a shared pool would tie services together.
        ("grpc.use_local_subchannel_pool", 1),
        # The exceptions to a proxy are written for names, not for the addresses they have.
        ("grpc.enable_http_proxy", 0),
    ]
    if authority is not None:
        options.append(("grpc.default_authority", authority))
    return options


class Connection:
    """Connects at once, and again when the connection is lost.

    Args:
        target: gRPC target of one address, for example `ipv4:10.0.0.3:50053`.
        options: see `channel_options`.
        credentials: None for a connection without TLS.
        health_service: full name of the gRPC service whose health is asked for.
        on_state: called when the replica's state may have changed.
        on_instance: called with what tells the replica's process from others, once it has answered.
    """

    def __init__(
        self,
        target: str,
        options: Sequence[tuple[str, Any]],
        credentials: grpc.ChannelCredentials | None,
        health_service: str,
        on_state: Callable[[ReplicaState], None],
        on_instance: Callable[[str], None],
    ) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )
        self._health_service = health_service
        self._on_state = on_state
        self._on_instance = on_instance
        self._rpcs: dict[str, Callable[..., Any]] = {}
        # Not in the context of a request that happens to be under way.
        self._task = asyncio.create_task(self._watch(), context=contextvars.Context())
        self._closing: asyncio.Task[None] | None = None

    def rpc(self, path: str, shape: str) -> Callable[..., Any]:
        """What begins a call of a method, in bytes."""
        rpc = self._rpcs.get(path)
        if rpc is None:
            rpc = self._rpcs[path] = getattr(self._channel, shape)(path)
        return rpc

    def close(self) -> None:
        """Ends the connection, and what is under way on it."""
        self._task.cancel()
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._channel.close(None), context=contextvars.Context()
            )

    @property
    def has_ended(self) -> bool:
        """Whether a connection that was closed has ended."""
        return self._closing is not None and self._closing.done()

    async def ended(self) -> None:
        """Returns once a connection that was closed has ended."""
        if self._closing is not None:
            await self._closing

    async def _watch(self) -> None:
        """A health watch stands as long as the connection does, so that its end tells of both."""
        watch = cast(Any, health_pb2_grpc.HealthStub(self._channel)).Watch
        request = health_pb2.HealthCheckRequest(service=self._health_service)
        delay_ms = FIRST_RECONNECT_DELAY_MS
        while True:
            try:
                call = watch(request)
                await self._tell_instance(call)
                async for response in call:
                    delay_ms = FIRST_RECONNECT_DELAY_MS
                    is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
                    self._on_state(ReplicaState.SERVING if is_serving else ReplicaState.NOT_SERVING)
                # A server that shuts down sends its watchers away with its last word.
                self._on_state(ReplicaState.NOT_SERVING)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self._on_state(ReplicaState.SERVING)
                    await self._channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
                self._on_state(ReplicaState.UNREACHABLE)
            await asyncio.sleep(delay_ms / 1000)
            delay_ms = min(2 * delay_ms, LONGEST_RECONNECT_DELAY_MS)

    async def _tell_instance(self, call: Any) -> None:
        for key, value in await call.initial_metadata() or ():
            if key == INSTANCE_HEADER:
                self._on_instance(str(value))
