"""Channels to other services: names, balancing, health, keepalive and retry in one place.

`connect` returns a channel that generated stubs take. What happens around each of its calls is in
client_calls.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self, cast

import grpc

from meshserve.v1 import calls_pb2
from services.runtime.carrier import CARRY_METHOD, Carrier
from services.runtime.client_calls import (
    Instruments,
    Method,
    response_stream,
    single_response,
)
from services.runtime.telemetry import Metrics

KEEPALIVE_TIME_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 2_000


def channel_options(grpc_services: Sequence[str], max_message_bytes: int) -> list[tuple[str, Any]]:
    """gRPC channel arguments for a target that stands for any number of replicas.

    Calls are balanced over all addresses of the name, those that say NOT_SERVING are passed over,
    and UNAVAILABLE (no other code: nothing else is known to be without effect) is tried again
    before the first message of an answer.
    """
    service_config: dict[str, Any] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{"service": service} for service in grpc_services],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
    if grpc_services:
        service_config["healthCheckConfig"] = {"serviceName": grpc_services[0]}
    return [
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.enable_retries", 1),
        # A request that is not kept cannot be tried again; prompts are larger than the default.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A killed replica is back within a second or two; the defaults would wait for minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # How long one attempt may take, not how long to wait before the next.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        # Replicas are told apart by their channels; a shared pool would tie services together.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def connect(
    target: str,
    *,
    peer: str,
    grpc_services: Sequence[str],
    metrics: Metrics,
    max_message_bytes: int = 64 * 2**20,
    credentials: grpc.ChannelCredentials | None = None,
    carries_calls: bool = False,
) -> grpc.aio.Channel:
    """A channel to the service named `peer` at a gRPC target such as `dns:///tokenizer:50052`.

    `grpc_services` are the full names of what is called; the health of the first one decides
    whether a replica is used. With `carries_calls` short unary calls travel together on one stream;
    they must do no harm if they are answered twice, since a call that was under way when its stream
    was lost is made again.
    """
    options = channel_options(grpc_services, max_message_bytes)
    channel = (
        grpc.aio.insecure_channel(target, options=options)
        if credentials is None
        else grpc.aio.secure_channel(target, credentials, options=options)
    )
    return cast(grpc.aio.Channel, MeshChannel(channel, peer, target, metrics, carries_calls))


class MeshChannel:
    """Stands in for grpc.aio.Channel in generated stubs. Close it with `async with` or `close`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        peer: str,
        target: str,
        metrics: Metrics,
        carries_calls: bool = False,
    ) -> None:
        self._channel = channel
        self.instruments = Instruments(peer, target, metrics)
        self._carrier: Carrier | None = None
        if carries_calls:
            open_stream = self.stream_stream(
                CARRY_METHOD,
                request_serializer=calls_pb2.CarryCallsRequest.SerializeToString,
                response_deserializer=calls_pb2.CarryCallsResponse.FromString,
            )
            self._carrier = Carrier(peer, open_stream)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        if self._carrier is not None:
            self._carrier.close()
        await self._channel.close(None)

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, self._channel.unary_unary, False, *codec, **options)
        return single_response(rpc, self.instruments, self._carrier)

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, self._channel.stream_unary, True, *codec, **options)
        return single_response(rpc, self.instruments)

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, self._channel.unary_stream, False, *codec, **options)
        return response_stream(rpc, self.instruments)

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, self._channel.stream_stream, True, *codec, **options)
        return response_stream(rpc, self.instruments)
