"""What can be wrong with a model on disk, and with getting one there."""

from __future__ import annotations

from pathlib import Path


class ModelFileError(ValueError):
    """A model file is missing a part, damaged, or of a kind that cannot be read.

    The message names the file, the key or tensor at fault and, where there is one, the byte
    offset, so that it can be shown to a user as it stands.
    """

    def __init__(
        self, path: Path | str, problem: str, *, what: str | None = None, offset: int | None = None
    ) -> None:
        self.path = Path(path)
        self.problem = problem
        self.what = what
        self.offset = offset
        at = f" (at byte {offset})" if offset is not None else ""
        subject = f"{what}: " if what else ""
        super().__init__(f"{path}: {subject}{problem}{at}")


class ModelStoreError(RuntimeError):
    """A model could not be fetched into, or found in, the cache directory.

    `problem` says what happened and `way_out` what the user can do about it.
    """

    def __init__(self, problem: str, *, way_out: str) -> None:
        self.problem = problem
        self.way_out = way_out
        super().__init__(f"{problem}\n{way_out}")
