"""The threads that run native operations together."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from services.engine.core.kernels.cpu.library import Library


class Team:
    """The threads that compute a step, `class Team` of src/team.h; the caller is one of them."""

    def __init__(
        self, library: Library, threads: int, processors: Sequence[int] | None = None
    ) -> None:
        """Start `threads` - 1 threads. Where `processors` are given, one for each thread, those
        that are started stay on theirs, and the first is left to the caller."""
        self.library = library
        self.threads = threads
        places = None if processors is None else (ctypes.c_int32 * threads)(*processors)
        others = (
            None if places is None else ctypes.addressof(places) + ctypes.sizeof(ctypes.c_int32)
        )
        self.handle = library.table.make_team(threads, others)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.table.free_team(self.handle)
