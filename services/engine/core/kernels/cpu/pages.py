"""Memory in large pages: what a step reads all over is found faster there."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt


def zero_pages(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return zeros that take no memory before they are written, at the start of a page.

    Raises MemoryError where the system has no room for them.
    """
    try:
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes} bytes of memory are not to be had: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8, num_bytes)
