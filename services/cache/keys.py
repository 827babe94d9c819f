"""Where an answer and what belongs to it lie in the server: key names and slots.

Two kinds of slot, so that a cluster spreads answers over its nodes and scripts still find all their
keys on one of them:
- `{<entry digest>}` holds one answer, its lease, and the barrier that a forgotten key leaves.
- `{meta}` holds the generations, which say what has been forgotten, and the index, which counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from meshserve.v1 import cache_pb2

PREFIX = "meshserve:cache:"
_META = PREFIX + "{meta}:"
PAIRS = _META + "pairs"
INDEX_PREFIX = _META + "index:"
GARBAGE_PREFIX = _META + "garbage:"
GENERATION_ALL = _META + "generation:all"

_ENTRY_DIGEST_BYTES = 20
_NAME_DIGEST_BYTES = 16


@dataclass(frozen=True)
class EntryKey:
    """Names one answer. Nothing a caller sent appears in it, only digests."""

    digest: str
    scope: str
    model: str

    @classmethod
    def of(cls, key: cache_pb2.CacheKey) -> EntryKey:
        """Equal for equal cache keys; different scopes, models or requests never meet."""
        return cls.of_each(key.scope, key.model, (key.request,))[0]

    @classmethod
    def of_each(cls, scope: str, model: str, requests: Iterable[bytes]) -> list[EntryKey]:
        """The same for several requests of one scope and model."""
        common = hashlib.blake2b(digest_size=_ENTRY_DIGEST_BYTES, person=b"mesh.cache.entry")
        for name in (scope.encode(), model.encode()):
            _add_part(common, name)
        scope_digest, model_digest = name_digest(scope), name_digest(model)
        keys = []
        for request in requests:
            digest = common.copy()
            _add_part(digest, request)
            keys.append(cls(digest.hexdigest(), scope_digest, model_digest))
        return keys

    @property
    def answer(self) -> str:
        """Key of the stored answer."""
        return answer_key(self.digest)

    @property
    def lease(self) -> str:
        """Key of the lease."""
        return f"{PREFIX}{{{self.digest}}}:lease"

    @property
    def barrier(self) -> str:
        """Key of the time before which computed answers are not kept."""
        return f"{PREFIX}{{{self.digest}}}:barrier"

    @property
    def pair(self) -> str:
        """Scope and model together, by which answers are indexed."""
        return f"{self.scope}:{self.model}"

    @property
    def index(self) -> str:
        """Key of the index of all answers of the same scope and model."""
        return INDEX_PREFIX + self.pair

    @property
    def generations(self) -> tuple[str, str, str]:
        """Keys of the generations that the answer belongs to: of all, its scope, its model."""
        return GENERATION_ALL, scope_generation(self.scope), model_generation(self.model)


def _add_part(digest: hashlib.blake2b, part: bytes) -> None:
    # Lengths keep the boundaries, so that no two keys run into the same bytes.
    digest.update(len(part).to_bytes(8, "big"))
    digest.update(part)


def name_digest(name: str) -> str:
    """Digest of the name of a scope or model."""
    return hashlib.blake2b(
        name.encode(), digest_size=_NAME_DIGEST_BYTES, person=b"mesh.cache.name"
    ).hexdigest()


def answer_key(digest: str) -> str:
    """Key of the stored answer of an entry digest."""
    return f"{PREFIX}{{{digest}}}:answer"


def scope_generation(scope_digest: str) -> str:
    """Key of the generation of a scope."""
    return f"{_META}generation:scope:{scope_digest}"


def model_generation(model_digest: str) -> str:
    """Key of the generation of a model."""
    return f"{_META}generation:model:{model_digest}"
