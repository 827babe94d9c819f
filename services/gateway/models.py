"""The models that the mesh serves: their names, what their engines say of them, who is ready."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshserve.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2, tokenizer_pb2, types_pb2
from services.gateway.activation import Activation
from services.gateway.engine_calls import EngineCalls
from services.gateway.hosting.hosting import Hosting
from services.gateway.hosting.names import Named, Names
from services.gateway.hosting.watch import UNKNOWN
from services.gateway.peers import Peers
from services.runtime.errors import Reason, ServiceError
from services.runtime.replicas import Eligible
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 5.0
# Until every model has been described once, which is what start-up waits for.
FIRST_REFRESH_INTERVAL_S = 0.2
DESCRIBE_TIMEOUT_S = 2.0
# In which an engine cannot say what a model is, unless it has had it in memory before.
_OUT_OF_MEMORY = frozenset(
    {
        engine_pb2.MODEL_STATE_SLEEPING,
        engine_pb2.MODEL_STATE_UNLOADED,
        engine_pb2.MODEL_STATE_FAILED,
    }
)
_READY = (UNKNOWN, engine_pb2.MODEL_STATE_READY, engine_pb2.MODEL_STATE_SLEEPING)
_WAKING = (engine_pb2.MODEL_STATE_SLEEPING, engine_pb2.MODEL_STATE_LOADING)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be routed to, as its engine and tokenizer describe it."""

    name: str
    engine_calls: EngineCalls
    stub: Callable[[], Any]
    info: engine_pb2.GetModelInfoResponse
    tokenizer: tokenizer_pb2.GetTokenizerInfoResponse

    @property
    def engine(self) -> engine_pb2_grpc.EngineServiceAsyncStub:
        """Calls engines that take requests for it now."""
        stub: engine_pb2_grpc.EngineServiceAsyncStub = self.stub()
        return stub

    @property
    def revision(self) -> str:
        """Changes with whatever may make its answers others: weights, precision, tokenizer."""
        info = self.info
        return "/".join(
            (
                info.architecture,
                str(info.parameters),
                info.dtype,
                str(info.context_tokens),
                self.tokenizer.revision,
            )
        )

    @property
    def context_tokens(self) -> int:
        """Largest number of prompt and completion tokens together."""
        return self.info.context_tokens

    def can(self, capability: types_pb2.ModelCapability.ValueType) -> bool:
        """Whether the engine has the capability; chat also takes a template."""
        if capability == types_pb2.MODEL_CAPABILITY_CHAT:
            return self.tokenizer.has_chat_template and self.can(
                types_pb2.MODEL_CAPABILITY_GENERATE
            )
        return capability in self.info.capabilities

    def check_can(self, capability: types_pb2.ModelCapability.ValueType) -> None:
        """Raises ServiceError (CAPABILITY_MISSING)."""
        if not self.can(capability):
            label = types_pb2.ModelCapability.Name(capability)
            verb = label.removeprefix("MODEL_CAPABILITY_").lower()
            able = [
                types_pb2.ModelCapability.Name(each).removeprefix("MODEL_CAPABILITY_").lower()
                for each in self.info.capabilities
            ]
            raise ServiceError(
                Reason.CAPABILITY_MISSING,
                f"the model {self.name!r} cannot {verb}; it can {', '.join(able)}",
                metadata={"capability": label},
            )


class ModelDirectory:
    """Resolves names, and asks engines and tokenizers again and again what they serve.

    Attributes:
        names: of models and adapters.
        hosting: which of them are in memory, and where.
    """

    def __init__(
        self, settings: Settings, peers: Peers, hosting: Hosting, metrics: Metrics
    ) -> None:
        self.hosting = hosting
        self.names = Names(settings, hosting)
        self._settings = settings
        self._denials = metrics.counter("meshserve_gateway_denials")
        self._peers = peers
        self._activation = Activation(settings, metrics)
        self._served: dict[str, ServedModel] = {}
        self._ready: dict[str, bool] = {}
        self._waking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to ask."""
        self._task = asyncio.create_task(self._refresh_forever())

    def stop(self) -> None:
        """Asks no more."""
        if self._task is not None:
            self._task.cancel()

    @property
    def complete(self) -> bool:
        """Whether every model has been described that is in memory, and whose engines run all the
        time."""
        return all(
            name in self._served
            or self._activation.covers(name)
            or self.hosting.state(name) in _OUT_OF_MEMORY
            for name in self._settings.models
        )

    def is_allowed(self, named: Named, allowed: frozenset[str]) -> bool:
        """Whether a key that lists `allowed` may use a model or an adapter."""
        return self.names.is_allowed(named, allowed)

    def find_allowed(
        self,
        name: str,
        adapter: str,
        allowed: frozenset[str],
        capability: types_pb2.ModelCapability.ValueType | None = None,
    ) -> Named:
        """What `model` and `adapter` of a request mean, as `Names.find`; where neither is given,
        the first model that is not known to lack the capability, before those that nobody knows
        yet because they have never been in memory. Raises ServiceError (MODEL_NOT_ALLOWED) too."""
        named = self.names.find(name, adapter)
        if not name and not adapter and capability is not None:
            named = Named(self._first_able(capability, named.model))
        if not self.names.is_allowed(named, allowed):
            self._denials.labels(Reason.MODEL_NOT_ALLOWED.value).inc()
            kind, refused = ("adapter", named.adapter) if named.adapter else ("model", named.model)
            raise ServiceError(
                Reason.MODEL_NOT_ALLOWED, f"the API key may not use the {kind} {refused!r}"
            )
        return named

    def _first_able(self, capability: types_pb2.ModelCapability.ValueType, default: str) -> str:
        able = [
            name
            for name in self._settings.models
            if (served := self._served.get(name)) is None or served.can(capability)
        ]
        known = (
            name
            for name in able
            if name in self._served or self.hosting.state(name) not in _OUT_OF_MEMORY
        )
        return next(known, able[0] if able else default)

    async def resolve(self, name: str) -> ServedModel:
        """A model by its configured name. Raises ServiceError, also where it is not loaded."""
        self.hosting.check_takes_requests(name)
        served = self._served.get(name)
        return served if served is not None else await self.with_engine(name)

    def eligible(self, name: str, adapter: str = "") -> Eligible | None:
        """The engines that can take a request for a model, or for an adapter by the name that
        engines know; None: all of them."""
        return self.hosting.placement(name).eligible(adapter)

    async def with_engine(self, name: str) -> ServedModel:
        """A model by its configured name; where its engines run only while they are asked for, once
        one of them answers. Raises ServiceError."""
        if self._activation.covers(name):
            await self._activation.wait(name, lambda: self._describe(name))
        if name not in self._served and self.hosting.placement(name).state in _WAKING:
            await self._wake(name)
        return self._served.get(name) or await self._describe(name)

    def describe_all(self, allowed: frozenset[str]) -> list[gateway_pb2.Model]:
        """The models that a key may use that lists `allowed`, or of which it may use an adapter; by
        name, also those that no engine has described yet."""
        models = (self.describe(name, allowed) for name in sorted(self._settings.models))
        return [
            model
            for model in models
            if model.adapters or self.is_allowed(Named(model.name), allowed)
        ]

    def describe(self, name: str, allowed: frozenset[str] = frozenset()) -> gateway_pb2.Model:
        """One configured model as callers see it whose key lists `allowed`."""
        state = self.hosting.state(name)
        is_up = self._ready.get(name, False) or state == engine_pb2.MODEL_STATE_SLEEPING
        model = gateway_pb2.Model(
            name=name,
            aliases=self._settings.models[name].aliases,
            ready=is_up and state in _READY,
            is_default=name == self._settings.default_model,
            state=state,
            adapters=[
                adapter
                for adapter in self.hosting.adapters_of(name)
                if self.is_allowed(Named(name, adapter), allowed)
            ],
        )
        served = self._served.get(name)
        if served is not None:
            info = served.info
            model.architecture = info.architecture
            model.context_tokens = info.context_tokens
            model.vocabulary_size = info.vocabulary_size
            model.parameters = info.parameters
            model.dtype = info.dtype
            model.embedding_size = info.embedding_size
            model.labels.extend(info.labels)
            model.capabilities.extend(info.capabilities)
            if (
                served.can(types_pb2.MODEL_CAPABILITY_CHAT)
                and types_pb2.MODEL_CAPABILITY_CHAT not in info.capabilities
            ):
                model.capabilities.append(types_pb2.MODEL_CAPABILITY_CHAT)
        return model

    async def _describe(self, name: str) -> ServedModel:
        """Asks engine and tokenizer side by side, and remembers the answer."""
        engines = self.hosting.watch(name).engines
        engine = self._stub(name, self.hosting.placement(name).able_to_describe())
        engine_query = engine_pb2.GetModelInfoRequest(model=name)
        tokenizer_query = tokenizer_pb2.GetTokenizerInfoRequest(model=name)
        try:
            info, tokenizer = await asyncio.gather(
                engine.GetModelInfo(engine_query, timeout=DESCRIBE_TIMEOUT_S),
                self._peers.tokenizer.GetTokenizerInfo(tokenizer_query, timeout=DESCRIBE_TIMEOUT_S),
            )
        except ServiceError:
            self._ready[name] = False
            raise
        served = ServedModel(
            name,
            engines.calls,
            lambda: self._stub(name, self.eligible(name)),
            info,
            tokenizer,
        )
        self._served[name] = served
        self._ready[name] = True
        self._activation.answered(name)
        return served

    async def _wake(self, name: str) -> None:
        """Brings a model into memory that has never been there, for the first request: before that
        nobody can say what it is."""
        async with self._waking[name]:
            if name not in self._served:
                stub = self._stub(name, self.eligible(name))
                await stub.WakeModel(engine_pb2.WakeModelRequest(model=name))
                await self.hosting.look(name)
                await self._describe(name)

    def _stub(self, name: str, eligible: Eligible | None) -> Any:
        """Calls the engines of a model; those that are eligible where not all are."""
        engines = self.hosting.watch(name).engines
        if eligible is None:
            return engines.stub
        return engine_pb2_grpc.EngineServiceStub(engines.channel.among(eligible))

    async def _refresh_forever(self) -> None:
        while True:
            for name in self._settings.models:
                try:
                    await self._describe(name)
                except ServiceError as error:
                    log.debug("model not described", extra={"model": name, "why": str(error)})
                except Exception:
                    log.exception("model not described", extra={"model": name})
            await asyncio.sleep(REFRESH_INTERVAL_S if self.complete else FIRST_REFRESH_INTERVAL_S)
