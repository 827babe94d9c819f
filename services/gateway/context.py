"""The one object that a request carries through its stages."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from opentelemetry.trace import Span

from meshserve.v1 import cache_pb2, engine_pb2, gateway_pb2, types_pb2
from services.gateway.events import Event
from services.gateway.models import ServedModel
from services.gateway.validation import validate
from services.runtime.errors import invalid_field
from services.runtime.telemetry.distributions import Distribution

ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls. `models` empty means every model; a limit of None means none. An operator may see
    what the whole mesh does."""

    name: str
    models: frozenset[str] = frozenset()
    requests_per_minute: int | None = None
    operator: bool = False


Operation = Literal["chat", "text_completion", "embeddings", "classify", "score"]


@dataclass(slots=True, kw_only=True)
class CallContext(ABC):
    """What inference requests of every kind have. Each field below the first group is set by the
    stage it is named for and may be read by those after it."""

    operation: Operation
    streaming: bool
    metadata: Mapping[str, str]
    request_id: str
    span: Span
    arrived_unix_ns: int = field(default_factory=time.time_ns)
    arrived_at: float = field(default_factory=time.perf_counter)

    # authenticate
    tenant: Tenant = field(default_factory=lambda: Tenant(ANONYMOUS))
    # admit
    admitted: bool = False
    # route
    model: ServedModel | None = None
    # route: the name that requests use; the request then has the one that engines know
    adapter: str = ""
    # look_up
    policy_revision: str | None = None
    cached_answer: cache_pb2.CachedAnswer | None = None
    # screen
    prompt_safety: types_pb2.SafetyVerdict | None = None
    # Counts the redactions of the request, which outdate what was made of it before.
    input_version: int = 0
    # Set by screen and moderate: the filter was away and text has passed it by.
    unchecked: bool = False
    # tokenize
    tokenized_version: int = 0
    # generate: tokens of each choice so far, whether or not their text could be sent
    usages: dict[int, types_pb2.Usage] = field(default_factory=dict)
    # generate: what the engine has told of each choice, with its first token and with its end
    engine_timings: dict[int, engine_pb2.EngineTimings] = field(default_factory=dict)
    # what was answered, in order
    events: list[Event] = field(default_factory=list)
    first_text_at: float | None = None
    # the work of each stage so far: its name, begin and end, as `arrived_at` counts
    stage_times: list[tuple[str, float, float]] = field(default_factory=list)
    # settle: the times between texts of a choice, of all streams of the model. None for what is no
    # stream, or is replayed.
    text_intervals: Distribution | None = None
    # when the latest text of each choice was passed on
    text_at: dict[int, float] = field(default_factory=dict)

    @property
    def served(self) -> ServedModel:
        """The model, once the request is routed."""
        assert self.model is not None
        return self.model

    @property
    def choices(self) -> int:
        """Number of completions asked for."""
        return 0

    @property
    def cached(self) -> bool:
        """Whether the whole answer came from the response cache."""
        return self.cached_answer is not None

    @abstractmethod
    def validate(self, max_prompt_bytes: int) -> None:
        """Raises ServiceError with every field of the request that is wrong."""


@dataclass(slots=True, kw_only=True)
class RequestContext(CallContext):
    """A request for completions."""

    request: gateway_pb2.GenerateRequest
    # look_up
    cache_key: cache_pb2.CacheKey | None = None
    # The first question to the cache; it outlives a caller who leaves, for it may bring a lease.
    look_up: asyncio.Task[cache_pb2.LookUpResponse] | None = None
    lease_token: str = ""
    # tokenize
    prompt_token_ids: list[int] = field(default_factory=list)
    stop_sequences: list[list[int]] = field(default_factory=list)
    max_tokens: int = 0
    # generate
    prompt_logprobs: types_pb2.Logprobs | None = None

    @property
    def choices(self) -> int:
        """Number of completions asked for."""
        sampling = self.request.sampling
        return sampling.n if sampling.HasField("n") else 1

    @property
    def drawn(self) -> int:
        """Number of completions that are generated, of which the likeliest are returned."""
        return max(self.choices, self.request.sampling.best_of)

    def validate(self, max_prompt_bytes: int) -> None:
        """Raises ServiceError with every field of the request that is wrong."""
        validate(self.request, max_prompt_bytes)
        if self.streaming and self.drawn > self.choices:
            raise invalid_field(
                "sampling.best_of", "the likeliest are known only at the end: ask without a stream"
            )
