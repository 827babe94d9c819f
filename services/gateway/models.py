"""The models that the mesh serves: their names, what their engines say of them, who is ready."""

from __future__ import annotations

import asyncio
import difflib
import logging
from dataclasses import dataclass

from meshserve.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2, tokenizer_pb2, types_pb2
from services.gateway.activation import Activation
from services.gateway.engine_calls import EngineCalls
from services.gateway.peers import Peers
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import ModelSettings, Settings
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 5.0
# Until every model has been described once, which is what start-up waits for.
FIRST_REFRESH_INTERVAL_S = 0.2
DESCRIBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that can be routed to, as its engine and tokenizer describe it."""

    name: str
    engine: engine_pb2_grpc.EngineServiceAsyncStub
    engine_calls: EngineCalls
    info: engine_pb2.GetModelInfoResponse
    tokenizer: tokenizer_pb2.GetTokenizerInfoResponse

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
    """Resolves names, and asks engines and tokenizers again and again what they serve."""

    def __init__(self, settings: Settings, peers: Peers, metrics: Metrics) -> None:
        self._settings = settings
        self._denials = metrics.counter("meshserve_gateway_denials")
        self._peers = peers
        self._activation = Activation(settings, metrics)
        self._served: dict[str, ServedModel] = {}
        self._ready: dict[str, bool] = {}
        self._names = {
            alias: name
            for name, model in settings.models.items()
            for alias in (name, *model.aliases)
        }
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
        """Whether every model has been described whose engines run all the time."""
        return all(
            name in self._served or self._activation.covers(name) for name in self._settings.models
        )

    def canonical_name(self, name: str) -> str:
        """The configured name behind a name or alias; the default model's for "".

        Raises ServiceError (MODEL_NOT_FOUND) with the nearest name.
        """
        if not name:
            return self._settings.default_model
        canonical = self._names.get(name)
        if canonical is None:
            near = difflib.get_close_matches(name[:128], self._names, n=1, cutoff=0.4)
            suggestion = near[0] if near else self._settings.default_model
            raise ServiceError(
                Reason.MODEL_NOT_FOUND,
                f"no model is called {name[:128]!r}; did you mean {suggestion!r}?",
                field_violations=[("model", "unknown model")],
                metadata={"nearest": suggestion},
            )
        return canonical

    def is_allowed(self, name: str, allowed: frozenset[str]) -> bool:
        """Whether a key that lists `allowed`, names or aliases, may use a model; an empty list
        allows every model."""
        return not allowed or any(self._names.get(each) == name for each in allowed)

    def allowed_name(
        self,
        name: str,
        allowed: frozenset[str],
        capability: types_pb2.ModelCapability.ValueType | None = None,
    ) -> str:
        """The configured name, as `canonical_name`; where none is given, that of the first model
        that is not known to lack the capability. Raises ServiceError (MODEL_NOT_ALLOWED) too."""
        canonical = self.canonical_name(name)
        if not name and capability is not None:
            canonical = next(
                (
                    each
                    for each in self._settings.models
                    if (served := self._served.get(each)) is None or served.can(capability)
                ),
                canonical,
            )
        if not self.is_allowed(canonical, allowed):
            self._denials.labels(Reason.MODEL_NOT_ALLOWED.value).inc()
            raise ServiceError(
                Reason.MODEL_NOT_ALLOWED, f"the API key may not use the model {canonical!r}"
            )
        return canonical

    async def resolve(self, name: str) -> ServedModel:
        """The model behind a name or alias. Raises ServiceError."""
        canonical = self.canonical_name(name)
        served = self._served.get(canonical)
        return served if served is not None else await self.with_engine(canonical)

    async def with_engine(self, name: str) -> ServedModel:
        """A model by its configured name; where its engines run only while they are asked for, once
        one of them answers. Raises ServiceError."""
        if self._activation.covers(name):
            await self._activation.wait(name, lambda: self._describe(name))
        return self._served.get(name) or await self._describe(name)

    def describe_all(self) -> list[gateway_pb2.Model]:
        """Every configured model, by name, also those that no engine has described yet."""
        return [self.describe(name) for name in sorted(self._settings.models)]

    def describe(self, name: str) -> gateway_pb2.Model:
        """One configured model as callers see it."""
        model = gateway_pb2.Model(
            name=name,
            aliases=self._settings.models[name].aliases,
            ready=self._ready.get(name, False),
            is_default=name == self._settings.default_model,
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
        engines = self._peers.engines(self._engine_target(self._settings.models[name]))
        engine_query = engine_pb2.GetModelInfoRequest(model=name)
        tokenizer_query = tokenizer_pb2.GetTokenizerInfoRequest(model=name)
        try:
            info, tokenizer = await asyncio.gather(
                engines.stub.GetModelInfo(engine_query, timeout=DESCRIBE_TIMEOUT_S),
                self._peers.tokenizer.GetTokenizerInfo(tokenizer_query, timeout=DESCRIBE_TIMEOUT_S),
            )
        except ServiceError:
            self._ready[name] = False
            raise
        served = ServedModel(name, engines.stub, engines.calls, info, tokenizer)
        self._served[name] = served
        self._ready[name] = True
        self._activation.answered(name)
        return served

    def _engine_target(self, model: ModelSettings) -> str:
        return model.engine_target or self._settings.engine.effective_target

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
