"""A Lua script that the server runs atomically and knows by its digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Script:
    """Lua source. All its keys must hash to one slot when the server is a cluster."""

    source: str
    sha1: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is how the protocol names scripts; nothing here depends on its strength.
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha1", digest)
