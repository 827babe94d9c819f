"""Reader of the safetensors container: the directory of tensors over one memory map.

Format: https://github.com/huggingface/safetensors#format. A header of JSON names each tensor's
type, shape and bytes, which follow it one after the other without gaps; all of that is checked
before a tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.runtime.modelfiles.errors import ModelFileError
from services.runtime.modelfiles.mapped import MappedFile

# As the format's own library has it.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 8

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: `dtype` in the format's own spelling, `offset` from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """An open file: `tensors` by name, their bytes on demand.

    Raises ModelFileError for a file that cannot be read or does not hold what it claims.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = MappedFile(path)
        try:
            self.tensors = _read_directory(path, self._mapped)
        except ModelFileError:
            self.close()
            raise

    def tensor_bytes(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor, uint8 [nbytes], not copied.

        The array keeps the file mapped for as long as it lives. Raises KeyError for a name that
        is not in `tensors`.
        """
        entry = self.tensors[name]
        return self._mapped.array(entry.offset, entry.nbytes)

    def release(self) -> None:
        """Give back the memory through which tensors were read so far."""
        self._mapped.release()

    def close(self) -> None:
        """Unmap the file; arrays that a caller still holds keep it mapped until they go."""
        self._mapped.close()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors that a file holds; raises ModelFileError as SafetensorsFile does."""
    file = SafetensorsFile(path)
    file.close()
    return file.tensors


def _read_directory(path: Path, mapped: MappedFile) -> dict[str, StoredTensor]:
    length = int.from_bytes(mapped.buffer[:8], "little")
    if len(mapped) < 8 or length > min(len(mapped) - 8, _MAX_HEADER_BYTES):
        problem = f"a header of {length} bytes does not fit; is the file truncated?"
        raise ModelFileError(path, problem, what="header", offset=0)
    try:
        header = json.loads(mapped.buffer[8 : 8 + length], object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is not JSON: {error}", what="header", offset=8) from None
    if not isinstance(header, dict):
        raise ModelFileError(path, "is not a JSON object", what="header", offset=8)
    data_start = 8 + length
    tensors = {
        name: _entry(path, name, entry, data_start, len(mapped))
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_gaps(path, tensors, data_start, len(mapped))
    return tensors


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, entry: Any, data_start: int, size_bytes: int) -> StoredTensor:
    what = f"tensor {name!r}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelFileError(path, "is not described as a tensor", what=what, offset=8) from None
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(each) is int and each >= 0 for each in numbers):
        raise ModelFileError(path, "is not described as a tensor", what=what, offset=8)
    if dtype not in ITEM_BYTES:
        raise ModelFileError(path, f"type {dtype!r} is not known", what=what, offset=8)
    if len(shape) > _MAX_DIMENSIONS:
        problem = f"has {len(shape)} dimensions, not 0 to {_MAX_DIMENSIONS}"
        raise ModelFileError(path, problem, what=what, offset=8)
    offset, nbytes = data_start + start, end - start
    if not (start <= end and data_start + end <= size_bytes):
        problem = f"bytes {start} to {end} lie beyond the file's end; is the file truncated?"
        raise ModelFileError(path, problem, what=what, offset=offset)
    if math.prod(shape) * ITEM_BYTES[dtype] != nbytes:
        problem = f"{nbytes} bytes are not {shape} of {dtype}"
        raise ModelFileError(path, problem, what=what, offset=offset)
    return StoredTensor(dtype, tuple(shape), offset, nbytes)


def _check_gaps(
    path: Path, tensors: dict[str, StoredTensor], data_start: int, size_bytes: int
) -> None:
    """Every byte belongs to one tensor: two that share some would be one another's data."""
    end = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "follows a gap"
            raise ModelFileError(path, kind, what=f"tensor {name!r}", offset=entry.offset)
        end += entry.nbytes
    if end != size_bytes:
        problem = f"{size_bytes - end} bytes belong to no tensor"
        raise ModelFileError(path, problem, offset=end)
