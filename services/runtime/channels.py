"""Channels to other services: names, balancing, health, retry in one place.

`connect` returns a channel that generated stubs take. It has a connection to each replica of the
service; each call goes to the one with the least under way. What happens around a call is in
client_calls.py and response_streams.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Self, cast

import grpc

from meshserve.v1 import calls_pb2_grpc
from services.runtime import names
from services.runtime.attempts import Attempts
from services.runtime.carrier import Carrier
from services.runtime.client_calls import Instruments, MakeAttempts, Method, single_response
from services.runtime.connections import Connection, channel_options
from services.runtime.replicas import Eligible, Replica, ReplicaSet
from services.runtime.response_streams import ResponseStream, response_stream, standing
from services.runtime.settings.targets import grpc_target, parse_target
from services.runtime.telemetry import Metrics
from services.runtime.telemetry.metrics import Reading
from services.runtime.tls import ClientCredentials


def connect(
    target: str,
    *,
    peer: str,
    health_service: str,
    metrics: Metrics,
    max_message_bytes: int = 64 * 2**20,
    credentials: grpc.ChannelCredentials | ClientCredentials | None = None,
    carries_calls: bool = False,
    may_be_away: bool = False,
) -> MeshChannel:
    """A channel to the service named `peer`, whose replicas are at a target (see parse_target).

    Names are looked up every second: what is new is used at once, what is gone finishes what it
    has. A replica is used while it says that `health_service`, the full name of a gRPC service, is
    SERVING. With `carries_calls` short unary calls travel together on one stream for each replica;
    they must do no harm if they are answered twice, since a call that was under way when its stream
    was lost is made again. With `may_be_away` it is nothing unusual that no replica serves, and
    then none are counted. Needs a running event loop.
    """
    return MeshChannel(
        target,
        peer,
        health_service,
        metrics,
        max_message_bytes,
        credentials,
        carries_calls=carries_calls,
        may_be_away=may_be_away,
    )


class Stubs:
    """Stands in for grpc.aio.Channel in generated stubs."""

    def __init__(
        self, make_attempts: MakeAttempts, instruments: Instruments, carrier: Carrier | None = None
    ) -> None:
        self.instruments = instruments
        self._make_attempts = make_attempts
        self._carrier = carrier

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, "unary_unary", *codec, **options)
        return single_response(rpc, self._make_attempts, self.instruments, self._carrier)

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, "stream_unary", *codec, **options)
        return single_response(rpc, self._make_attempts, self.instruments)

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, "unary_stream", *codec, **options)
        return response_stream(rpc, self._make_attempts, self.instruments)

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """Called by generated stubs."""
        rpc = Method(method, "stream_stream", *codec, **options)
        return response_stream(rpc, self._make_attempts, self.instruments)


class MeshChannel(Stubs):
    """A channel to all replicas of a service. Close it with `async with` or `close`."""

    def __init__(
        self,
        target: str,
        peer: str,
        health_service: str,
        metrics: Metrics,
        max_message_bytes: int,
        credentials: grpc.ChannelCredentials | ClientCredentials | None,
        *,
        carries_calls: bool,
        may_be_away: bool,
    ) -> None:
        self.target = target
        # A service that looks at its own replicas calls none of them.
        self._is_counted = peer != metrics.service
        self._may_be_away = may_be_away
        self._connections: list[Connection] = []

        def connection(replica: Replica) -> Connection:
            made = Connection(
                grpc_target(replica.address),
                channel_options(replica.name, max_message_bytes),
                credentials.current if isinstance(credentials, ClientCredentials) else credentials,
                health_service,
                replica.became,
                replica.is_instance,
            )
            self._connections = [each for each in self._connections if not each.has_ended]
            self._connections.append(made)
            return made

        self.replicas = ReplicaSet(connection)
        self._stop_renewing = (
            credentials.when_renewed(self.replicas.renew)
            if isinstance(credentials, ClientCredentials)
            else None
        )
        self._names = names.NameWatch(parse_target(target), self.replicas.update, names.resolve)
        self._names.start()
        self._uncount = metrics.read("meshserve_rpc_client_replicas", self._counts)
        instruments = Instruments(peer, metrics)
        super().__init__(
            functools.partial(Attempts, self.replicas, peer),
            instruments,
            self._carrier_of(instruments) if carries_calls else None,
        )

    @property
    def stubs(self) -> grpc.aio.Channel:
        """The channel by the type that generated stubs are written for."""
        return cast(grpc.aio.Channel, self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight and closes the connections."""
        self._uncount()
        if self._stop_renewing is not None:
            self._stop_renewing()
        self._names.close()
        self.replicas.close()
        for connection in self._connections:
            await connection.ended()

    def at(self, replica: Replica) -> grpc.aio.Channel:
        """A channel for stubs whose calls go to one replica, whatever it says of its health, and
        are not tried again."""
        peer = self.instruments.peer
        attempts = functools.partial(Attempts, self.replicas, peer, only=replica)
        return cast(grpc.aio.Channel, Stubs(attempts, self.instruments))

    def among(self, eligible: Eligible) -> grpc.aio.Channel:
        """A channel for stubs whose calls go to those replicas alone that are eligible then."""
        attempts = functools.partial(
            Attempts, self.replicas, self.instruments.peer, eligible=eligible
        )
        return cast(grpc.aio.Channel, Stubs(attempts, self.instruments))

    def _counts(self) -> Iterable[Reading]:
        counts = self.replicas.counts()
        if not self._is_counted or (self._may_be_away and not counts["serving"]):
            return
        for state, number in counts.items():
            yield (self.instruments.peer, self.target, state), number

    def _carrier_of(self, instruments: Instruments) -> Carrier:
        def open_stream(replica: Replica) -> ResponseStream:
            stub = calls_pb2_grpc.CallServiceStub(self.at(replica))
            return standing(stub.CarryCalls)

        return Carrier(instruments.peer, self.replicas, open_stream)
