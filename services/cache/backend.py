"""The cache's state in the Redis-protocol server: generations, answers, leases, index.

An answer carries the stamp of the three generations it was computed in: of everything, of its scope
and of its model. It is served only while all three are current, so forgetting any number of answers
is one write. Generations are read with every answer and never remembered here: what one replica
forgets, no replica serves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from prometheus_client import Histogram

from services.cache import keys, scripts
from services.cache.codec import STAMP_FIRST, stamp_of
from services.cache.keys import EntryKey
from services.cache.leases import LeaseToken
from services.runtime.valkey import Script, ValkeyClient

# No lease is longer, so that a barrier may end some time after every lease before it.
MAX_LEASE_S = 3600
_BARRIER_TTL_MS = 2 * MAX_LEASE_S * 1000
_GENERATION_BYTES = 8
_RECLAIM_BATCH = 128
_PAIR_SCOPE = (1, 32)
_PAIR_MODEL = (34, 65)


@dataclass(frozen=True)
class Reading:
    """What is known of an entry at one moment."""

    stamp: bytes
    # The stored answer, if there is one of the current generations.
    value: bytes | None
    # Whether someone is computing it.
    leased: bool


class NoLease(Enum):
    """Why a lease was not given."""

    HELD = auto()
    ANSWERED = auto()


@dataclass(frozen=True)
class Invalidation:
    """What was forgotten, and what is left to do to get its memory back."""

    count: int
    garbage: tuple[str, ...]
    # Where the generation lies in the stamp, and what it is now.
    generation_offset: int
    generation: bytes


class Backend:
    """All methods raise ValkeyUnavailableError or ValkeyRefusedError."""

    def __init__(self, client: ValkeyClient, durations: Histogram) -> None:
        self._client = client
        self._durations = durations

    async def ping(self) -> None:
        """Returns if the server answers."""
        await self._client.ping()

    async def read(self, key: EntryKey) -> Reading:
        """The entry as it is now."""
        with self._timed("read"):
            generations, (value, lease) = await self._client.execute_many(
                ("MGET", *key.generations), ("MGET", key.answer, key.lease)
            )
        if None in generations:
            generations = await self._run("read", scripts.READ_GENERATIONS, key.generations)
        stamp = _stamp(generations)
        return Reading(
            stamp=stamp,
            value=value if value is not None and _may_serve(value, stamp) else None,
            leased=lease is not None and lease.endswith(stamp),
        )

    async def current_stamp(self, key: EntryKey) -> bytes:
        """The generations that an answer computed from now on belongs to."""
        return _stamp(await self._run("read", scripts.READ_GENERATIONS, key.generations))

    async def acquire_lease(self, key: EntryKey, stamp: bytes, ttl_ms: int) -> LeaseToken | NoLease:
        """The right to compute the answer, unless another has it or there is an answer."""
        nonce = LeaseToken.new_nonce()
        issued_us = await self._run(
            "lease", scripts.ACQUIRE_LEASE, (key.answer, key.lease), (nonce, stamp, ttl_ms)
        )
        if issued_us == 0:
            return NoLease.HELD
        if issued_us == -1:
            return NoLease.ANSWERED
        return LeaseToken(nonce, issued_us, stamp)

    async def release_lease(self, key: EntryKey, token: LeaseToken) -> bool:
        """Whether the lease was still held; it is not afterwards."""
        released = await self._run("release", scripts.RELEASE_LEASE, (key.lease,), (token.nonce,))
        return bool(released)

    async def store(
        self, key: EntryKey, value: bytes, ttl_ms: int, token: LeaseToken | None
    ) -> bool:
        """Keeps an encoded answer and ends its lease.

        Returns whether it was kept: one that was computed before it was forgotten is not.
        """
        lease = (b"", 0) if token is None else (token.nonce, token.issued_us)
        kept = await self._run(
            "store",
            scripts.STORE_ANSWER,
            (key.answer, key.lease, key.barrier),
            (value, ttl_ms, *lease),
        )
        if not kept:
            return False
        await self._index([key], ttl_ms)
        return True

    async def read_many(self, keys_of_one_pair: Sequence[EntryKey]) -> list[bytes | None]:
        """The stored answers of entries of one scope and model, None where there is none of the
        current generations; one round trip, whatever their number."""
        generation_keys = keys_of_one_pair[0].generations
        names = [key.answer for key in keys_of_one_pair]
        with self._timed("read"):
            commands: list[tuple[str, ...]] = [("MGET", *names)]
            if self._client.is_cluster:
                commands = [("GET", name) for name in names]
            generations, *found = await self._client.execute_many(
                ("MGET", *generation_keys), *commands
            )
        values: list[bytes | None] = found if self._client.is_cluster else found[0]
        if None in generations:
            # One is gone, and with it the answers that it stood for.
            return [None] * len(values)
        stamp = _stamp(generations)
        return [
            value if value is not None and _may_serve(value, stamp) else None for value in values
        ]

    async def store_many(self, entries: Sequence[tuple[EntryKey, bytes]], ttl_ms: int) -> None:
        """Keeps encoded answers of one scope and model that were computed without leases."""
        with self._timed("store"):
            await self._client.execute_many(
                *(("SET", key.answer, value, "PX", ttl_ms) for key, value in entries)
            )
        await self._index([key for key, _ in entries], ttl_ms)

    async def _index(self, keys_of_one_pair: Sequence[EntryKey], ttl_ms: int) -> None:
        first = keys_of_one_pair[0]
        await self._run(
            "index",
            scripts.INDEX_ANSWERS,
            (keys.PAIRS, first.index, *first.generations),
            (first.pair, ttl_ms, *(key.digest for key in keys_of_one_pair)),
        )

    async def discard(self, key: EntryKey, value: bytes) -> None:
        """Deletes a value that cannot be used, unless it has been replaced already."""
        if await self._run("discard", scripts.DISCARD, (key.answer,), (value,)):
            await self._run("index", scripts.UNINDEX_ANSWER, (keys.PAIRS, key.index), (key.digest,))

    async def count(self) -> int:
        """Number of answers; those that the server evicted count until their TTL."""
        return int(await self._run("count", scripts.COUNT_ANSWERS, (keys.PAIRS,)))

    async def invalidate_answer(self, key: EntryKey) -> bool:
        """Forgets one answer, also one that is being computed. Returns whether there was one."""
        stamp = await self.current_stamp(key)
        existed = await self._run(
            "invalidate",
            scripts.INVALIDATE_ANSWER,
            (key.answer, key.lease, key.barrier),
            (stamp, _BARRIER_TTL_MS),
        )
        await self._run("index", scripts.UNINDEX_ANSWER, (keys.PAIRS, key.index), (key.digest,))
        return bool(existed)

    async def invalidate_all(self) -> Invalidation:
        """Forgets every answer."""
        return await self._invalidate(keys.GENERATION_ALL, 0, (1, 0), "")

    async def invalidate_scope(self, scope: str) -> Invalidation:
        """Forgets the answers of a scope."""
        digest = keys.name_digest(scope)
        return await self._invalidate(keys.scope_generation(digest), 1, _PAIR_SCOPE, digest)

    async def invalidate_model(self, model: str) -> Invalidation:
        """Forgets the answers of a model in every scope."""
        digest = keys.name_digest(model)
        return await self._invalidate(keys.model_generation(digest), 2, _PAIR_MODEL, digest)

    async def reclaim(self, invalidation: Invalidation) -> int:
        """Gives the memory of forgotten answers back, some at a time. Returns how many."""
        first = invalidation.generation_offset
        arguments = (first, first + _GENERATION_BYTES - 1, invalidation.generation)
        reclaimed = 0
        for garbage in invalidation.garbage:
            while digests := await self._run(
                "reclaim", scripts.TAKE_GARBAGE, (garbage,), (_RECLAIM_BATCH,)
            ):
                for digest in digests:
                    reclaimed += await self._run(
                        "reclaim", scripts.RECLAIM, (keys.answer_key(digest.decode()),), arguments
                    )
        return reclaimed

    async def _invalidate(
        self, generation_key: str, position: int, columns: tuple[int, int], digest: str
    ) -> Invalidation:
        generation, count, garbage = await self._run(
            "invalidate", scripts.INVALIDATE, (keys.PAIRS, generation_key), (*columns, digest)
        )
        return Invalidation(
            count=count,
            garbage=tuple(name.decode() for name in garbage),
            generation_offset=STAMP_FIRST + position * _GENERATION_BYTES,
            generation=_generation(generation),
        )

    async def _run(
        self,
        command: str,
        script: Script,
        script_keys: Sequence[str],
        arguments: Sequence[bytes | str | int] = (),
    ) -> Any:
        with self._timed(command):
            return await self._client.run_script(script, script_keys, arguments)

    @contextmanager
    def _timed(self, command: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._durations.labels(command).observe(time.perf_counter() - started)


def _generation(value: bytes) -> bytes:
    try:
        return int(value).to_bytes(_GENERATION_BYTES, "big")
    except (ValueError, OverflowError):
        # Someone else wrote there. Any bytes that stay the same will do as a generation.
        return value[:_GENERATION_BYTES].ljust(_GENERATION_BYTES, b"\0")


def _stamp(generations: Sequence[bytes]) -> bytes:
    return b"".join(map(_generation, generations))


def _may_serve(value: bytes, stamp: bytes) -> bool:
    # What is not even an answer is passed on, for the reader to discard.
    found = stamp_of(value)
    return found is None or found == stamp
