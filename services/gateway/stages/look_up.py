"""The response cache: equal deterministic requests are computed once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from google.protobuf.duration_pb2 import Duration
from opentelemetry import trace

from meshserve.v1 import cache_pb2, cache_pb2_grpc, types_pb2
from services.gateway.cache_key import cache_key, is_deterministic
from services.gateway.context import RequestContext
from services.gateway.pipeline import Stage
from services.gateway.policy import PolicyWatch
from services.gateway.replay import to_keep
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import CacheSettings

log = logging.getLogger(__name__)

# A cache that is slow is worse than none.
BACKEND_TIMEOUT_S = 2.0
# Others' answers are waited for no longer than this share of what remains until the deadline.
WAIT_SHARE = 0.5

# Why a cache that can be reached keeps an answer out.
_REFUSALS = frozenset({Reason.INVALID_FIELD, Reason.MESSAGE_TOO_LARGE, Reason.INTERNAL})

_KEPT_REASONS = frozenset(
    {
        types_pb2.FINISH_REASON_STOP,
        types_pb2.FINISH_REASON_LENGTH,
        types_pb2.FINISH_REASON_TOOL_CALLS,
    }
)


class LookUp(Stage):
    """Finds an answer on the way in; keeps the answer on the way out. Never fails a request."""

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

    async def before(self, context: RequestContext) -> None:
        """Sets `cached_answer` on a hit, and a lease on a miss."""
        outcome = await self._look_up(context)
        span = trace.get_current_span()
        span.set_attribute("meshserve.cache.outcome", outcome)
        if context.cached_answer is not None:
            span.set_attribute("meshserve.cache.kind", "exact")

    async def _look_up(self, context: RequestContext) -> str:
        """What came of it, as the table of spans says."""
        request = context.request
        if (
            not self._settings.enabled
            or request.cache_control.no_cache
            or not is_deterministic(request)
            # What was drawn beside the answers counts, and is not kept with them.
            or context.drawn > context.choices
        ):
            return "bypassed"
        context.policy_revision = await self._policy.revision()
        if context.policy_revision is None:
            # Without the policy in force nobody can say that a kept answer may be served.
            return "bypassed"
        context.cache_key = cache_key(
            request,
            tenant=context.tenant.name,
            model_revision=context.served.revision,
            policy_revision=context.policy_revision,
        )
        query = cache_pb2.LookUpRequest(key=context.cache_key)
        if not request.cache_control.no_store:
            query.lease_ttl.CopyFrom(_duration(self._settings.lease_s))
        try:
            found, waited = await self._find(context, query)
        except ServiceError as error:
            log.warning("the cache is passed over: %s", error.message)
            context.cache_key = None
            return "unavailable"
        if found.outcome == cache_pb2.LookUpResponse.OUTCOME_HIT:
            context.cached_answer = found.answer
            context.prompt_safety = (
                found.answer.prompt_safety if found.answer.HasField("prompt_safety") else None
            )
            return "coalesced" if waited else "hit"
        if found.outcome == cache_pb2.LookUpResponse.OUTCOME_PENDING:
            return "pending"
        if found.HasField("lease"):
            context.lease_token = found.lease.token
        return "miss"

    def after(self, context: RequestContext, error: ServiceError | None) -> Awaitable[None] | None:
        """Keeps a complete answer, else gives the lease up."""
        if context.cache_key is None or context.cached_answer is not None:
            return None
        return self._keep_or_release(context, error)

    async def _keep_or_release(self, context: RequestContext, error: ServiceError | None) -> None:
        # The caller's deadline may have passed; what is computed is worth keeping all the same.
        deadline.set_remaining(None)
        try:
            if error is None and await self._keep(context):
                return
        except ServiceError as failure:
            log.warning("an answer was not kept: %s", failure.message)
            if failure.reason not in _REFUSALS:
                return
        try:
            token = context.lease_token or await self._unclaimed_lease(context)
            if token:
                await self._cache.ReleaseLease(
                    cache_pb2.ReleaseLeaseRequest(key=context.cache_key, lease_token=token),
                    timeout=BACKEND_TIMEOUT_S,
                )
        except ServiceError as failure:
            log.warning("a lease was not given up: %s", failure.message)

    async def _find(
        self, context: RequestContext, query: cache_pb2.LookUpRequest
    ) -> tuple[cache_pb2.LookUpResponse, bool]:
        """Asks at once, and then waits if another caller is computing the answer. Returns what was
        found, and whether it was waited for.

        Two questions, so that a cache that does not answer at all costs little time.
        """
        context.look_up = asyncio.create_task(self._ask(query))
        found = await asyncio.shield(context.look_up)
        if found.outcome != cache_pb2.LookUpResponse.OUTCOME_PENDING:
            return found, False
        trace.get_current_span().add_event("coalescing")
        wait_s = self._settings.lease_s
        remaining_s = deadline.remaining_s()
        if remaining_s is not None:
            wait_s = min(wait_s, WAIT_SHARE * remaining_s)
        query.wait.CopyFrom(_duration(wait_s))
        return await self._cache.LookUp(query, timeout=wait_s + BACKEND_TIMEOUT_S), True

    async def _ask(self, query: cache_pb2.LookUpRequest) -> cache_pb2.LookUpResponse:
        # Under a deadline of its own: an answer cut off by the caller's may have brought a lease,
        # and equal requests would wait for it in vain.
        deadline.set_remaining(None)
        return await self._cache.LookUp(query, timeout=BACKEND_TIMEOUT_S)

    async def _unclaimed_lease(self, context: RequestContext) -> str:
        """The lease that came when the caller had left."""
        if context.look_up is None:
            return ""
        found = await context.look_up
        return found.lease.token

    async def _keep(self, context: RequestContext) -> bool:
        control = context.request.cache_control
        answer = to_keep(context.events, context.arrived_unix_ns)
        if control.no_store or context.unchecked or not _is_whole(answer, context.choices):
            return False
        if context.policy_revision != await self._policy.revision():
            # It was checked under two policies, or under another than its key says.
            return False
        if context.prompt_safety is not None:
            answer.prompt_safety.CopyFrom(context.prompt_safety)
        if context.prompt_logprobs is not None:
            answer.prompt_logprobs.CopyFrom(context.prompt_logprobs)
        store = cache_pb2.StoreRequest(
            key=context.cache_key, answer=answer, lease_token=context.lease_token
        )
        if control.HasField("ttl_s"):
            store.ttl.CopyFrom(_duration(min(control.ttl_s, self._settings.max_ttl_s)))
        await self._cache.Store(store, timeout=BACKEND_TIMEOUT_S)
        return True


def _is_whole(answer: cache_pb2.CachedAnswer, choices: int) -> bool:
    """Whether every choice ended, and none was aborted or filtered."""
    return len(answer.ends) == choices and all(
        end.finish_reason in _KEPT_REASONS for end in answer.ends
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
