"""The other services as the gateway sees them: stubs over balanced channels, and shared streams."""

from __future__ import annotations

from dataclasses import dataclass

from meshserve.v1 import (
    cache_pb2_grpc,
    engine_pb2_grpc,
    safety_pb2,
    safety_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from services.gateway.engine_calls import EngineCalls
from services.gateway.engine_loads import EngineLoads
from services.runtime.channels import MeshChannel, connect
from services.runtime.exchanges import SessionPool
from services.runtime.file_watch import FilesRefusedError
from services.runtime.response_streams import standing
from services.runtime.server import StartupError
from services.runtime.settings import Settings, TlsSettings
from services.runtime.settings.schema import SERVICE_NAMES
from services.runtime.telemetry import Metrics
from services.runtime.tls import ClientCredentials

DecodePool = SessionPool[tokenizer_pb2.DecodeInput, tokenizer_pb2.DecodeOutput]
CheckPool = SessionPool[safety_pb2.CompletionInput, safety_pb2.CompletionOutput]


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines at one target: generations go on shared streams, all else through the stub."""

    channel: MeshChannel
    stub: engine_pb2_grpc.EngineServiceAsyncStub
    calls: EngineCalls
    loads: EngineLoads


class Peers:
    """Owns the channels; `close` ends them.

    `channels` leads to every replica of every peer: each has `replicas`, and `at` makes a channel
    to one of them for stubs, whatever its state.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self.channels: list[MeshChannel] = []
        self._engines: dict[str, Engines] = {}
        self._credentials: dict[TlsSettings, ClientCredentials] = {}
        tokenizer = self._connect("tokenizer", "meshserve.v1.TokenizerService", carries_calls=True)
        cache = self._connect(
            "cache", "meshserve.v1.CacheService", may_be_away=not settings.cache.enabled
        )
        safety = self._connect(
            "safety",
            "meshserve.v1.SafetyService",
            carries_calls=True,
            may_be_away=not settings.safety.enabled,
        )
        self.tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub = (
            tokenizer_pb2_grpc.TokenizerServiceStub(tokenizer.stubs)
        )
        self.cache: cache_pb2_grpc.CacheServiceAsyncStub = cache_pb2_grpc.CacheServiceStub(
            cache.stubs
        )
        self.safety: safety_pb2_grpc.SafetyServiceAsyncStub = safety_pb2_grpc.SafetyServiceStub(
            safety.stubs
        )
        self.decode_sessions: DecodePool = SessionPool(
            "tokenizer",
            tokenizer.replicas,
            open_stream=lambda replica: standing(
                tokenizer_pb2_grpc.TokenizerServiceStub(tokenizer.at(replica)).StreamDecode
            ),
            make_request=lambda inputs: tokenizer_pb2.StreamDecodeRequest(inputs=inputs),
            outputs_of=lambda response: response.outputs,
        )
        self.check_sessions: CheckPool = SessionPool(
            "safety",
            safety.replicas,
            open_stream=lambda replica: standing(
                safety_pb2_grpc.SafetyServiceStub(safety.at(replica)).CheckCompletion
            ),
            make_request=lambda inputs: safety_pb2.CheckCompletionRequest(inputs=inputs),
            outputs_of=lambda response: response.outputs,
        )

    def engines(self, target: str) -> Engines:
        """The engines at a target; one channel per target."""
        if target not in self._engines:
            models = self._settings.models_at(target).values()
            channel = self._connect(
                "engine",
                "meshserve.v1.EngineService",
                target,
                may_be_away=all(each.activation_timeout_s is not None for each in models),
            )
            calls = EngineCalls(
                channel.replicas,
                lambda replica: standing(
                    engine_pb2_grpc.EngineServiceStub(channel.at(replica)).GenerateMany
                ),
                channel.instruments,
                self._settings.engine.max_message_bytes,
            )
            stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(
                channel.stubs
            )
            self._engines[target] = Engines(channel, stub, calls, EngineLoads(channel))
        return self._engines[target]

    async def close(self) -> None:
        """Ends the shared streams and closes all channels."""
        self.decode_sessions.close()
        self.check_sessions.close()
        for engines in self._engines.values():
            engines.calls.close()
            engines.loads.close()
        for channel in self.channels:
            await channel.close()
        for credentials in self._credentials.values():
            await credentials.close()

    def _connect(
        self,
        peer: str,
        grpc_service: str,
        target: str | None = None,
        *,
        carries_calls: bool = False,
        may_be_away: bool = False,
    ) -> MeshChannel:
        section = self._settings.server(peer)
        channel = connect(
            target or section.effective_target,
            peer=peer,
            health_service=grpc_service,
            metrics=self._metrics,
            max_message_bytes=section.max_message_bytes,
            credentials=self.credentials(section.tls),
            carries_calls=carries_calls,
            may_be_away=may_be_away,
        )
        self.channels.append(channel)
        return channel

    def credentials(self, peer: TlsSettings | None) -> ClientCredentials | None:
        """How a peer with TLS is trusted; where it asks for a certificate, ours is the edge's."""
        if peer is None:
            return None
        known = self._credentials.get(peer)
        if known is None:
            service = next(
                each for each in SERVICE_NAMES if self._settings.server(each).tls == peer
            )
            try:
                known = ClientCredentials(
                    f"trust_{service}", peer, self._settings.gateway.tls, self._metrics
                )
            except FilesRefusedError as error:
                raise StartupError(
                    f"a TLS file cannot be used: {error}", "check the tls sections"
                ) from error
            self._credentials[peer] = known
        return known
