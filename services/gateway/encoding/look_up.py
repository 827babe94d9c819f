"""The response cache of vectors: a text that is embedded again is not computed again."""

from __future__ import annotations

import asyncio
import hashlib
import logging

from google.protobuf.duration_pb2 import Duration
from opentelemetry import trace

from meshserve.v1 import cache_pb2, cache_pb2_grpc, gateway_pb2
from services.gateway.encoding.context import EncodingContext
from services.gateway.pipeline import Step
from services.gateway.policy import PolicyWatch
from services.runtime import deadline
from services.runtime.errors import ServiceError
from services.runtime.settings import CacheSettings

log = logging.getLogger(__name__)

# Raised when the meaning of a key changes, so that old vectors are not found any more.
KEY_VERSION = 1
_KEY_BYTES = 32
# A cache that is slow is worse than none.
_TIMEOUT_S = 2.0
# Vectors in one message.
_SLICE = 1024


class LookUpVectors(Step[EncodingContext]):
    """Finds vectors on the way in; keeps what was computed, once it has been answered. Never fails
    a request."""

    name = "look_up"

    def __init__(
        self,
        settings: CacheSettings,
        cache: cache_pb2_grpc.CacheServiceAsyncStub,
        policy: PolicyWatch,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._policy = policy
        # Vectors on their way to the cache; held so that they are not collected.
        self._keeping: set[asyncio.Task[None]] = set()

    async def before(self, context: EncodingContext) -> None:
        """Sets the answers that are found."""
        outcome = await self._look_up(context)
        span = trace.get_current_span()
        span.set_attribute("meshserve.cache.outcome", outcome)
        if outcome != "bypassed":
            span.set_attribute("meshserve.inputs", len(context.texts))
            span.set_attribute(
                "meshserve.cached_inputs", len(context.texts) - len(context.uncached)
            )

    def after(self, context: EncodingContext, error: ServiceError | None) -> None:
        """Begins to keep what was computed."""
        if error is None and context.cache_keys and context.uncached and not context.unchecked:
            task = asyncio.create_task(self._keep(context))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    async def drain(self) -> None:
        """Waits for what is being kept."""
        while self._keeping:
            await asyncio.wait(self._keeping)

    async def _look_up(self, context: EncodingContext) -> str:
        """What came of it, as the table of spans says."""
        request = context.request
        if (
            not self._settings.enabled
            or not isinstance(request, gateway_pb2.EmbedRequest)
            or request.cache_control.no_cache
        ):
            return "bypassed"
        context.policy_revision = await self._policy.revision()
        if context.policy_revision is None:
            # Without the policy in force nobody can say that a kept vector may be served.
            return "bypassed"
        keys = vector_keys(request, context.served.revision, context.policy_revision)
        try:
            found = await self._find(context, keys)
        except ServiceError as error:
            log.warning("the cache is passed over: %s", error.message)
            return "unavailable"
        if not request.cache_control.no_store:
            context.cache_keys = keys
        context.uncached = []
        for index, each in enumerate(found):
            if each.HasField("embedding"):
                context.answers[index] = each.embedding
                context.tokens[index] = each.prompt_tokens
            else:
                context.uncached.append(index)
        if not context.uncached:
            return "hit"
        return "miss" if len(context.uncached) == len(found) else "partial"

    async def _find(
        self, context: EncodingContext, keys: list[bytes]
    ) -> list[cache_pb2.CachedEmbedding]:
        found: list[cache_pb2.CachedEmbedding] = []
        for start in range(0, len(keys), _SLICE):
            query = cache_pb2.LookUpEmbeddingsRequest(
                scope=context.tenant.name,
                model=context.served.name,
                requests=keys[start : start + _SLICE],
            )
            response = await self._cache.LookUpEmbeddings(query, timeout=_TIMEOUT_S)
            found += response.embeddings
        return found

    async def _keep(self, context: EncodingContext) -> None:
        # The answer is on its way; its caller's deadline is none of this.
        deadline.set_remaining(None)
        if context.policy_revision != await self._policy.revision():
            # It was checked under another policy than its key says.
            return
        request = context.request
        assert isinstance(request, gateway_pb2.EmbedRequest)
        control = request.cache_control
        try:
            for start in range(0, len(context.uncached), _SLICE):
                some = context.uncached[start : start + _SLICE]
                store = cache_pb2.StoreEmbeddingsRequest(
                    scope=context.tenant.name,
                    model=context.served.name,
                    requests=[context.cache_keys[index] for index in some],
                    embeddings=[
                        cache_pb2.CachedEmbedding(
                            embedding=context.answers[index], prompt_tokens=context.tokens[index]
                        )
                        for index in some
                    ],
                )
                if control.HasField("ttl_s"):
                    ttl_s = min(control.ttl_s, self._settings.max_ttl_s)
                    store.ttl.CopyFrom(Duration(seconds=ttl_s))
                await self._cache.StoreEmbeddings(store, timeout=_TIMEOUT_S)
        except ServiceError as failure:
            log.warning("vectors were not kept: %s", failure.message)


def vector_keys(
    request: gateway_pb2.EmbedRequest, model_revision: str, policy_revision: str
) -> list[bytes]:
    """What names the vector of each text. Vectors of one text differ by the options alone, never
    by the texts beside it."""
    options = gateway_pb2.EmbedRequest(pooling=request.pooling, truncation=request.truncation)
    for field in ("normalize", "dimensions"):
        if request.HasField(field):
            setattr(options, field, getattr(request, field))
    common = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"mesh.vector")
    for part in (
        str(KEY_VERSION).encode(),
        model_revision.encode(),
        policy_revision.encode(),
        options.SerializeToString(deterministic=True),
    ):
        # Lengths keep the boundaries, so that no two keys run into the same bytes.
        common.update(len(part).to_bytes(8, "big"))
        common.update(part)
    keys: list[bytes] = []
    for text in request.texts:
        digest = common.copy()
        digest.update(text.encode())
        keys.append(digest.digest())
    return keys
