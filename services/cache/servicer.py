"""The RPCs of the cache: what callers ask, in terms of entries, leases and generations."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from meshserve.v1 import cache_pb2, cache_pb2_grpc
from services.cache import codec, embeddings
from services.cache.backend import MAX_LEASE_S, Backend, Invalidation, NoLease, Reading
from services.cache.keys import EntryKey
from services.cache.leases import LeaseToken
from services.cache.validation import (
    check_answer,
    checked_duration_ms,
    checked_key,
    checked_lease_token,
)
from services.cache.waiting import AnswerWatches
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.settings import CacheSettings
from services.runtime.telemetry import Metrics
from services.runtime.valkey import ValkeyError, ValkeyUnavailableError

log = logging.getLogger(__name__)

MAX_WAIT_S = 3600
# A PENDING that reaches the caller after its deadline is worth nothing.
_ANSWER_MARGIN_S = 0.05
# Smaller than this, the hop to a thread costs more than the compression.
_THREAD_OVER_BYTES = 128 * 1024
_RETRY_REFUSED_AFTER_S = 1.0

LookUpResponse = cache_pb2.LookUpResponse


@dataclass
class Counts:
    """What happened since the service started."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    rejected_stores: int = 0
    coalesced: int = 0
    backend_errors: int = 0


class CacheServicer(cache_pb2_grpc.CacheServiceServicer):
    """Answers for one replica; all state but the counts is in the Redis-protocol server."""

    def __init__(self, settings: CacheSettings, backend: Backend, metrics: Metrics) -> None:
        self._settings = settings
        self._backend = backend
        self._watches = AnswerWatches(backend.read)
        self._counts = Counts()
        self._lookups = metrics.counter("meshserve_cache_lookups")
        self._stores = metrics.counter("meshserve_cache_stores")
        self._reclaims: set[asyncio.Task[None]] = set()

    async def drain(self) -> None:
        """Lets waiting callers go: what they wait for may outlive this replica."""
        self._watches.close()

    async def stop(self) -> None:
        """Ends what runs in the background."""
        for task in self._reclaims:
            task.cancel()
        await asyncio.gather(*self._reclaims, return_exceptions=True)

    async def LookUp(  # noqa: N802
        self,
        request: cache_pb2.LookUpRequest,
        context: grpc.aio.ServicerContext[cache_pb2.LookUpRequest, LookUpResponse],
    ) -> LookUpResponse:
        """The answer, or the right to compute it, or neither while another computes it."""
        key = checked_key(request.key)
        lease_ttl_ms = None
        if request.HasField("lease_ttl"):
            lease_ttl_ms = checked_duration_ms(
                request.lease_ttl, "lease_ttl", at_least_ms=1, at_most_s=MAX_LEASE_S
            )
        wait_ms = checked_duration_ms(request.wait, "wait", at_least_ms=0, at_most_s=MAX_WAIT_S)
        with self._backend_errors():
            try:
                response, waited = await self._look_up(key, lease_ttl_ms, wait_ms / 1000)
            except ValkeyError:
                self._lookups.labels("error").inc()
                raise
        self._count_look_up(response.outcome, waited)
        return response

    async def Store(  # noqa: N802
        self,
        request: cache_pb2.StoreRequest,
        context: grpc.aio.ServicerContext[cache_pb2.StoreRequest, cache_pb2.StoreResponse],
    ) -> cache_pb2.StoreResponse:
        """Keeps an answer, unless it is too large or was forgotten while it was computed."""
        key = checked_key(request.key)
        check_answer(request.answer)
        ttl_ms = self._ttl_ms(request)
        token = checked_lease_token(request.lease_token) if request.lease_token else None
        with self._backend_errors():
            try:
                outcome = await self._store(key, request.answer, ttl_ms, token)
            except ValkeyError:
                self._stores.labels("error").inc()
                raise
        self._watches.nudge(key)
        self._stores.labels(outcome).inc()
        self._counts.stores += outcome == "stored"
        self._counts.rejected_stores += outcome == "rejected"
        return cache_pb2.StoreResponse(stored=outcome == "stored")

    async def ReleaseLease(  # noqa: N802
        self,
        request: cache_pb2.ReleaseLeaseRequest,
        context: grpc.aio.ServicerContext[
            cache_pb2.ReleaseLeaseRequest, cache_pb2.ReleaseLeaseResponse
        ],
    ) -> cache_pb2.ReleaseLeaseResponse:
        """Ends a lease without an answer; one of the waiting callers computes next."""
        key = checked_key(request.key)
        if not request.lease_token:
            raise invalid_field("lease_token", "is required")
        token = checked_lease_token(request.lease_token)
        with self._backend_errors():
            released = await self._backend.release_lease(key, token)
        self._watches.nudge(key)
        return cache_pb2.ReleaseLeaseResponse(released=released)

    async def LookUpEmbeddings(  # noqa: N802
        self,
        request: cache_pb2.LookUpEmbeddingsRequest,
        context: grpc.aio.ServicerContext[
            cache_pb2.LookUpEmbeddingsRequest, cache_pb2.LookUpEmbeddingsResponse
        ],
    ) -> cache_pb2.LookUpEmbeddingsResponse:
        """The vectors that are kept of many texts."""
        keys = embeddings.checked_keys(request)
        with self._backend_errors():
            try:
                found = await embeddings.look_up(self._backend, keys)
            except ValkeyError:
                self._lookups.labels("error").inc()
                raise
        hits = sum(each.HasField("embedding") for each in found)
        self._counts.hits += hits
        self._counts.misses += len(found) - hits
        self._lookups.labels("hit").inc(hits)
        self._lookups.labels("miss").inc(len(found) - hits)
        return cache_pb2.LookUpEmbeddingsResponse(embeddings=found)

    async def StoreEmbeddings(  # noqa: N802
        self,
        request: cache_pb2.StoreEmbeddingsRequest,
        context: grpc.aio.ServicerContext[
            cache_pb2.StoreEmbeddingsRequest, cache_pb2.StoreEmbeddingsResponse
        ],
    ) -> cache_pb2.StoreEmbeddingsResponse:
        """Keeps the vectors of many texts."""
        keys = embeddings.checked_keys(request)
        if len(request.embeddings) != len(keys):
            raise invalid_field("embeddings", "one per request")
        ttl_ms = self._ttl_ms(request)
        with self._backend_errors():
            try:
                await embeddings.store(self._backend, keys, request.embeddings, ttl_ms)
            except ValkeyError:
                self._stores.labels("error").inc()
                raise
        self._stores.labels("stored").inc(len(keys))
        self._counts.stores += len(keys)
        return cache_pb2.StoreEmbeddingsResponse(stored=len(keys))

    async def Invalidate(  # noqa: N802
        self,
        request: cache_pb2.InvalidateRequest,
        context: grpc.aio.ServicerContext[
            cache_pb2.InvalidateRequest, cache_pb2.InvalidateResponse
        ],
    ) -> cache_pb2.InvalidateResponse:
        """Forgets answers at once; their memory comes back in the background."""
        target = request.WhichOneof("target")
        if target is None:
            raise invalid_field("target", "one of key, scope, model and all is required")
        if target == "all" and not request.all:
            raise invalid_field("all", "must be true where it is given")
        if target == "model" and not request.model:
            raise invalid_field("model", "must not be empty")
        with self._backend_errors():
            if target == "key":
                key = checked_key(request.key)
                existed = await self._backend.invalidate_answer(key)
                self._watches.nudge(key)
                return cache_pb2.InvalidateResponse(invalidated=int(existed))
            if target == "scope":
                invalidation = await self._backend.invalidate_scope(request.scope)
            elif target == "model":
                invalidation = await self._backend.invalidate_model(request.model)
            else:
                invalidation = await self._backend.invalidate_all()
        if invalidation.garbage:
            task = asyncio.create_task(self._reclaim(invalidation))
            self._reclaims.add(task)
            task.add_done_callback(self._reclaims.discard)
        return cache_pb2.InvalidateResponse(invalidated=invalidation.count)

    async def GetStats(  # noqa: N802
        self,
        request: cache_pb2.GetStatsRequest,
        context: grpc.aio.ServicerContext[cache_pb2.GetStatsRequest, cache_pb2.GetStatsResponse],
    ) -> cache_pb2.GetStatsResponse:
        """Counts of this replica, and the number of answers that all replicas share."""
        with self._backend_errors():
            entries = await self._backend.count()
        counts = self._counts
        return cache_pb2.GetStatsResponse(
            hits=counts.hits,
            misses=counts.misses,
            stores=counts.stores,
            rejected_stores=counts.rejected_stores,
            entries=entries,
            coalesced=counts.coalesced,
            backend_errors=counts.backend_errors,
        )

    async def _look_up(
        self, key: EntryKey, lease_ttl_ms: int | None, wait_s: float
    ) -> tuple[LookUpResponse, bool]:
        """The response, and whether it was waited for."""
        remaining_s = deadline.remaining_s()
        if remaining_s is not None:
            wait_s = min(wait_s, remaining_s - _ANSWER_MARGIN_S)
        give_up_at = time.monotonic() + wait_s
        waited = False
        reading: Reading | None = await self._backend.read(key)
        while reading is not None:
            if reading.value is not None:
                answer = await self._decode(key, reading.value)
                if answer is not None:
                    response = LookUpResponse(outcome=LookUpResponse.OUTCOME_HIT, answer=answer)
                    return response, waited
            if not reading.leased:
                if lease_ttl_ms is None:
                    return LookUpResponse(outcome=LookUpResponse.OUTCOME_MISS), waited
                lease = await self._backend.acquire_lease(key, reading.stamp, lease_ttl_ms)
                if isinstance(lease, LeaseToken):
                    return _leased(lease, lease_ttl_ms), waited
                if lease is NoLease.ANSWERED:
                    reading = await self._backend.read(key)
                    continue
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                break
            waited = True
            reading = await self._watches.until_settled(key, left_s)
        return LookUpResponse(outcome=LookUpResponse.OUTCOME_PENDING), waited

    async def _decode(self, key: EntryKey, value: bytes) -> cache_pb2.CachedAnswer | None:
        """The stored answer; None when it is unusable, and deleted."""
        try:
            if len(value) > _THREAD_OVER_BYTES:
                return await asyncio.to_thread(codec.decode, value, entry_digest=key.digest)
            return codec.decode(value, entry_digest=key.digest)
        except codec.CorruptAnswerError as error:
            log.warning("an unusable answer was deleted", extra={"cause": str(error)})
            await self._backend.discard(key, value)
            return None

    async def _store(
        self,
        key: EntryKey,
        answer: cache_pb2.CachedAnswer,
        ttl_ms: int,
        token: LeaseToken | None,
    ) -> str:
        if not answer.HasField("create_time"):
            answer.create_time.GetCurrentTime()
        message = answer.SerializeToString()
        outcome = "stored"
        if len(message) > self._settings.max_answer_bytes:
            outcome = "rejected"
        else:
            stamp = await self._backend.current_stamp(key)
            if token is not None and token.stamp != stamp:
                outcome = "outdated"
        if outcome != "stored":
            # The callers that wait need not wait for the lease to run out.
            if token is not None:
                await self._backend.release_lease(key, token)
            return outcome

        def encode() -> bytes:
            return codec.encode(
                message,
                stamp=stamp,
                entry_digest=key.digest,
                compress_over_bytes=self._settings.compress_over_bytes,
            )

        large = len(message) > _THREAD_OVER_BYTES
        value = await asyncio.to_thread(encode) if large else encode()
        kept = await self._backend.store(key, value, ttl_ms, token)
        return "stored" if kept else "outdated"

    def _ttl_ms(self, request: cache_pb2.StoreRequest | cache_pb2.StoreEmbeddingsRequest) -> int:
        if not request.HasField("ttl"):
            return self._settings.default_ttl_s * 1000
        return checked_duration_ms(
            request.ttl, "ttl", at_least_ms=1, at_most_s=self._settings.max_ttl_s
        )

    async def _reclaim(self, invalidation: Invalidation) -> None:
        try:
            reclaimed = await self._backend.reclaim(invalidation)
        except ValkeyError as error:
            # They are out of use all the same, and their TTL ends them.
            log.warning(
                "the memory of forgotten answers was not freed", extra={"cause": str(error)}
            )
            return
        log.info("freed the memory of forgotten answers", extra={"answers": reclaimed})

    def _count_look_up(self, outcome: LookUpResponse.Outcome.ValueType, waited: bool) -> None:
        if outcome == LookUpResponse.OUTCOME_HIT:
            self._counts.hits += 1
            self._counts.coalesced += waited
            self._lookups.labels("coalesced" if waited else "hit").inc()
            return
        self._counts.misses += 1
        self._lookups.labels(
            "pending" if outcome == LookUpResponse.OUTCOME_PENDING else "miss"
        ).inc()

    @contextmanager
    def _backend_errors(self) -> Iterator[None]:
        try:
            yield
        except ValkeyError as error:
            self._counts.backend_errors += 1
            log.debug("a command failed: %s", error)
            retry_after_s = (
                error.retry_after_s
                if isinstance(error, ValkeyUnavailableError)
                else _RETRY_REFUSED_AFTER_S
            )
            raise ServiceError(
                Reason.CACHE_BACKEND_UNAVAILABLE,
                "the Redis-protocol server of the cache is unavailable",
                retry_after_s=retry_after_s,
            ) from error


def _leased(token: LeaseToken, ttl_ms: int) -> LookUpResponse:
    response = LookUpResponse(outcome=LookUpResponse.OUTCOME_MISS)
    response.lease.token = str(token)
    response.lease.expire_time.FromMilliseconds(token.issued_us // 1000 + ttl_ms)
    return response
