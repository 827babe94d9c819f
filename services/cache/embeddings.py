"""Vectors of texts: many small entries, looked up and kept in one go."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from meshserve.v1 import cache_pb2
from services.cache import codec
from services.cache.backend import Backend
from services.cache.keys import EntryKey
from services.runtime.errors import invalid_field

log = logging.getLogger(__name__)

MAX_EMBEDDINGS = 16384
# Handled at once, so that other calls get their turn in between.
_SLICE = 256
# Keeps the entry apart from an answer's, whatever a caller names.
_KIND = b"embedding\0"
# Components of vectors look random: they do not shrink.
_NEVER = 2**63


def checked_keys(
    request: cache_pb2.LookUpEmbeddingsRequest | cache_pb2.StoreEmbeddingsRequest,
) -> list[EntryKey]:
    """The entries that a request names. Raises ServiceError."""
    if not request.model:
        raise invalid_field("model", "is required")
    if not 1 <= len(request.requests) <= MAX_EMBEDDINGS:
        raise invalid_field("requests", f"between 1 and {MAX_EMBEDDINGS} of them")
    for index, each in enumerate(request.requests):
        if not each:
            raise invalid_field(f"requests[{index}]", "must not be empty")
    return EntryKey.of_each(
        request.scope, request.model, (_KIND + each for each in request.requests)
    )


async def look_up(backend: Backend, keys: Sequence[EntryKey]) -> list[cache_pb2.CachedEmbedding]:
    """The vectors that are kept, empty messages for the others. Raises ValkeyError."""
    found: list[cache_pb2.CachedEmbedding] = []
    for start in range(0, len(keys), _SLICE):
        some = keys[start : start + _SLICE]
        values = await backend.read_many(some)
        found += [_decoded(key, value) for key, value in zip(some, values, strict=True)]
    return found


async def store(
    backend: Backend,
    keys: Sequence[EntryKey],
    embeddings: Sequence[cache_pb2.CachedEmbedding],
    ttl_ms: int,
) -> None:
    """Keeps vectors. Raises ValkeyError."""
    stamp = await backend.current_stamp(keys[0])
    for start in range(0, len(keys), _SLICE):
        some = slice(start, start + _SLICE)
        await backend.store_many(
            [
                (
                    key,
                    codec.encode(
                        embedding.SerializeToString(),
                        stamp=stamp,
                        entry_digest=key.digest,
                        compress_over_bytes=_NEVER,
                    ),
                )
                for key, embedding in zip(keys[some], embeddings[some], strict=True)
            ],
            ttl_ms,
        )


def _decoded(key: EntryKey, value: bytes | None) -> cache_pb2.CachedEmbedding:
    if value is not None:
        try:
            return cache_pb2.CachedEmbedding.FromString(
                codec.message_of(value, entry_digest=key.digest)
            )
        except (codec.CorruptAnswerError, DecodeError) as error:
            # The next one that is stored replaces it.
            log.warning("an unusable vector was passed over", extra={"cause": str(error)})
    return cache_pb2.CachedEmbedding()
