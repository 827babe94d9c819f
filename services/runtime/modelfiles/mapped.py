"""A file mapped into memory: read where it lies, and let go of as soon as it has been used."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from services.runtime.modelfiles.errors import ModelFileError


class MappedFile:
    """The bytes of a file, which the system reads as they are looked at.

    What was looked at counts as memory of the process until `release`. Raises ModelFileError for a
    file that cannot be read or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelFileError(path, "no such file") from None
        except ValueError:
            raise ModelFileError(path, "the file is empty") from None
        except OSError as error:
            raise ModelFileError(path, f"cannot be read: {error.strerror}") from None
        self._used: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.buffer)

    def array(self, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes of the file, uint8 [nbytes], not copied; they keep it mapped."""
        self._used.append((offset, offset + nbytes))
        return np.frombuffer(self.buffer, np.uint8, nbytes, offset)

    def release(self) -> None:
        """Give back the memory of all arrays so far; they are read again where they are used."""
        for start, end in self._used:
            start -= start % mmap.PAGESIZE
            if end > start:
                self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._used.clear()

    def close(self) -> None:
        """Unmap the file; arrays that a caller still holds keep it mapped until they go."""
        try:
            self.buffer.close()
        except BufferError:
            return
