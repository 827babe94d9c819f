"""The header of a safetensors file: names, types and shapes, without its library or its tensors.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.runtime.modelfiles.errors import ModelFileError

_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor: `dtype` in the format's own spelling (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Return the tensors that a file says it holds.

    Raises ModelFileError for a file that cannot be read or whose header is damaged.
    """
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size_bytes < 8 or length > min(size_bytes - 8, _MAX_HEADER_BYTES):
                problem = f"a header of {length} bytes does not fit; is the file truncated?"
                raise ModelFileError(path, problem, what="header", offset=0)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(path, f"is not JSON: {error}", what="header", offset=8) from None
    if not isinstance(header, dict):
        raise ModelFileError(path, "is not a JSON object", what="header", offset=8)
    return {
        name: _entry(path, name, entry, size_bytes - 8 - length)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _entry(path: Path, name: str, entry: Any, data_bytes: int) -> HeaderEntry:
    what = f"tensor {name!r}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelFileError(path, "is not described as a tensor", what=what) from None
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(each) is int and each >= 0 for each in numbers):
        raise ModelFileError(path, "is not described as a tensor", what=what)
    if not start <= end <= data_bytes:
        problem = f"bytes {start} to {end} lie beyond the file's end; is the file truncated?"
        raise ModelFileError(path, problem, what=what)
    return HeaderEntry(dtype, tuple(shape))
