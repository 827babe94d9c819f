"""An adapter that an engine has loaded, as the sequences that go through it know it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One of them.

    Attributes:
        name: what requests call it.
        path: where it was read from.
        slot: where the model keeps it.
        generation: of no other that this process has loaded, under whatever name: what sequences
            have computed through it is told by that from what others have.
        num_bytes: memory that it takes.
        leaving: whether it is unloaded as soon as nobody uses it.
    """

    name: str
    path: Path
    slot: int
    generation: int
    num_bytes: int
    leaving: bool = False
