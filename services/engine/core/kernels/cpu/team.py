"""The threads that run native operations together."""

from __future__ import annotations

from services.engine.core.kernels.cpu.library import Library


class Team:
    """The threads that compute a step, `class Team` of src/team.h; the caller is one of them."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self.threads = threads
        self.handle = library.table.make_team(threads)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.table.free_team(self.handle)
