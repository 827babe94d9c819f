"""Reader of the GGUF container, versions 2 and 3: metadata and tensor directory over one mmap.

Layout per the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
header, key-value metadata, tensor directory, padding, tensor data. Every count and length in the
file is held against the bytes that are really there before anything is allocated for it, so a
header that lies costs an error and no memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

import numpy as np

from services.runtime.modelfiles.errors import ModelFileError
from services.runtime.modelfiles.ggml_types import GGML_TYPES, GGMLType
from services.runtime.modelfiles.mapped import MappedFile

T = TypeVar("T")

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT_BYTES = 32

_LENGTH = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MAX_NAME_BYTES = 65_535
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 4
_MAX_ALIGNMENT_BYTES = 1 << 20
# The least that one metadata entry (key length, type, one-byte value) and one tensor entry (name
# length, dimension count, type, offset) can take: bounds the two counts of the header.
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

GGUFValue = str | int | float | bool | list["GGUFValue"] | np.ndarray
"""Scalars as Python's own types; arrays of numbers as numpy arrays, of strings as lists."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor directory.

    `shape` is row-major as in numpy and torch (the file stores it the other way round);
    `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class GGUFMetadata(Mapping[str, GGUFValue]):
    """The metadata of a file. Values are bounds-checked when it is opened, decoded when read.

    Reading a value raises ModelFileError where a string in it is not UTF-8.
    """

    def __init__(self, cursor: _Cursor, entries: dict[str, tuple[int, int]]) -> None:
        self._cursor = cursor
        self._entries = entries
        self._decoded: dict[str, GGUFValue] = {}

    def __getitem__(self, key: str) -> GGUFValue:
        if key not in self._decoded:
            value_type, offset = self._entries[key]
            self._decoded[key] = self._cursor.at(offset, f"key {key!r}").value(value_type)
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def string(self, key: str, default: str | None = None) -> str:
        """Return a string value; raises ModelFileError if it is absent or of another type."""
        return self._typed(key, str, "a string", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer value; raises ModelFileError if it is absent or of another type."""
        return self._typed(key, int, "an integer", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number as float; raises ModelFileError if it is absent or of another type."""
        return float(self._typed(key, (int, float), "a number", default))

    def _typed(
        self, key: str, kind: type | tuple[type, ...], kind_name: str, default: T | None
    ) -> T:
        if key not in self._entries:
            if default is not None:
                return default
            raise ModelFileError(self._cursor.path, "is missing", what=f"key {key!r}")
        value = self[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = type(value).__name__
            raise ModelFileError(
                self._cursor.path, f"is {found}, not {kind_name}", what=f"key {key!r}"
            )
        return cast("T", value)


class GGUFFile:
    """An open GGUF file: `version`, `metadata` and `tensors` by name; tensor bytes on demand.

    Raises:
        ModelFileError: the file cannot be read, is not GGUF, or does not hold what it claims.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._mapped = MappedFile(self.path)
        cursor = _Cursor(self.path, self._mapped.buffer)
        if cursor.take(4, "magic") != MAGIC:
            raise ModelFileError(self.path, "not a GGUF file", what="magic", offset=0)
        self.version = cursor.unsigned(4, "version")
        if self.version not in SUPPORTED_VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            problem = (
                "the file is big-endian, which is not supported"
                if swapped in SUPPORTED_VERSIONS
                else f"GGUF version {self.version} is not supported, only 2 and 3 are"
            )
            raise ModelFileError(self.path, problem, what="version", offset=4)
        num_tensors = cursor.count("tensor count", _MIN_TENSOR_BYTES)
        num_entries = cursor.count("metadata count", _MIN_ENTRY_BYTES)
        self.metadata = GGUFMetadata(cursor, _read_metadata(cursor, num_entries))
        self.alignment_bytes = self.metadata.integer("general.alignment", DEFAULT_ALIGNMENT_BYTES)
        if not 1 <= self.alignment_bytes <= _MAX_ALIGNMENT_BYTES:
            raise ModelFileError(
                self.path,
                f"{self.alignment_bytes} bytes is not a possible alignment",
                what="key 'general.alignment'",
            )
        self.tensors = _read_tensor_directory(cursor, num_tensors, self.alignment_bytes)

    def tensor_bytes(self, name: str) -> np.ndarray:
        """Return the stored bytes of a tensor, uint8 [nbytes], not copied.

        The array keeps the file mapped for as long as it lives. Raises KeyError for a name that
        is not in `tensors`.
        """
        info = self.tensors[name]
        return self._mapped.array(info.offset, info.nbytes)

    def release(self) -> None:
        """Give back the memory through which tensors were read so far."""
        self._mapped.release()

    def close(self) -> None:
        """Unmap the file; arrays still held by a caller keep it mapped until they go."""
        self._mapped.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Cursor:
    """A position in the mapped file; every read is bounds-checked and says what it was for."""

    def __init__(self, path: Path, buffer: mmap.mmap, position: int = 0, what: str = "") -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = position
        self.what = what

    def at(self, position: int, what: str) -> _Cursor:
        return _Cursor(self.path, self.buffer, position, what)

    def fail(self, problem: str, what: str | None = None) -> ModelFileError:
        return ModelFileError(self.path, problem, what=what or self.what, offset=self.position)

    def require(self, nbytes: int, what: str | None = None) -> None:
        left = self.size - self.position
        if nbytes > left:
            raise self.fail(f"needs {nbytes} bytes but the file has only {left} more", what)

    def take(self, nbytes: int, what: str | None = None) -> bytes:
        self.require(nbytes, what)
        start = self.position
        self.position += nbytes
        return self.buffer[start : self.position]

    def unsigned(self, nbytes: int, what: str | None = None) -> int:
        return int.from_bytes(self.take(nbytes, what), "little")

    def count(self, what: str, min_bytes_each: int) -> int:
        count = self.unsigned(8, what)
        if count * min_bytes_each > self.size - self.position:
            raise self.fail(f"{count} entries do not fit into the file", what)
        return count

    def name(self, what: str) -> str:
        length = self.unsigned(8, what)
        if length > _MAX_NAME_BYTES:
            raise self.fail(f"a name of {length} bytes is too long", what)
        return self._text(self.take(length, what), what)

    def skip_value(self, value_type: int, depth: int = 0) -> None:
        """Step over a value, checking that all of it is there."""
        if value_type in _SCALARS:
            self._skip(_SCALARS[value_type].itemsize)
        elif value_type == _STRING:
            self._skip(self.unsigned(8))
        elif value_type == _ARRAY:
            element_type, length = self._array_header(depth)
            if element_type in _SCALARS:
                self._skip(length * _SCALARS[element_type].itemsize)
            elif element_type == _STRING:
                self._skip_strings(length)
            else:
                for _ in range(length):
                    self.skip_value(element_type, depth + 1)
        else:
            raise self.fail(f"value type {value_type} is not one of GGUF's")

    def value(self, value_type: int, depth: int = 0) -> GGUFValue:
        if value_type in _SCALARS:
            return cast("GGUFValue", self._scalars(_SCALARS[value_type], 1)[0].item())
        if value_type == _STRING:
            return self._text(self.take(self.unsigned(8)))
        if value_type != _ARRAY:
            raise self.fail(f"value type {value_type} is not one of GGUF's")
        element_type, length = self._array_header(depth)
        if element_type in _SCALARS:
            return self._scalars(_SCALARS[element_type], length)
        return [self.value(element_type, depth + 1) for _ in range(length)]

    def _array_header(self, depth: int) -> tuple[int, int]:
        if depth >= _MAX_ARRAY_DEPTH:
            raise self.fail(f"arrays are nested more than {_MAX_ARRAY_DEPTH} deep")
        element_type = self.unsigned(4)
        length = self.unsigned(8)
        if element_type in _SCALARS:
            self.require(length * _SCALARS[element_type].itemsize)
        else:
            self.require(length * 8)  # each string and each array begins with eight bytes at least
        return element_type, length

    def _scalars(self, dtype: np.dtype[np.generic], count: int) -> np.ndarray:
        # Copied, so that what a caller keeps does not keep the whole file mapped.
        raw = self.take(count * dtype.itemsize)
        if dtype == np.bool_:
            return np.asarray(np.frombuffer(raw, np.uint8) != 0)
        numbers: np.ndarray = np.frombuffer(raw, dtype)
        return numbers

    def _skip(self, nbytes: int) -> None:
        self.require(nbytes)
        self.position += nbytes

    def _skip_strings(self, count: int) -> None:
        # Vocabularies have hundreds of thousands of them: the one loop here worth keeping short.
        buffer, position, last = self.buffer, self.position, self.size - 8
        for _ in range(count):
            if position > last:
                self.position = position
                self.require(8)
            position += 8 + _LENGTH.unpack_from(buffer, position)[0]
        self.position = min(position, self.size)
        self.require(position - self.position)

    def _text(self, raw: bytes, what: str | None = None) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"is not UTF-8: {error.reason}", what) from None


def _read_metadata(cursor: _Cursor, num_entries: int) -> dict[str, tuple[int, int]]:
    entries: dict[str, tuple[int, int]] = {}
    for index in range(num_entries):
        key = cursor.name(f"metadata key {index}")
        cursor.what = f"key {key!r}"
        if key in entries:
            raise cursor.fail("is there twice")
        value_type = cursor.unsigned(4)
        entries[key] = (value_type, cursor.position)
        cursor.skip_value(value_type)
    return entries


def _read_tensor_directory(
    cursor: _Cursor, num_tensors: int, alignment_bytes: int
) -> dict[str, TensorInfo]:
    directory = [_read_tensor_entry(cursor, index) for index in range(num_tensors)]
    data_start = -(-cursor.position // alignment_bytes) * alignment_bytes
    tensors: dict[str, TensorInfo] = {}
    for name, shape, ggml_type, relative_offset in directory:
        what = f"tensor {name!r}"
        if name in tensors:
            raise ModelFileError(cursor.path, "is there twice", what=what)
        offset = data_start + relative_offset
        if shape[-1] % ggml_type.block_elements:
            problem = f"rows of {shape[-1]} are not whole blocks of {ggml_type.name}"
            raise ModelFileError(cursor.path, problem, what=what)
        if relative_offset % alignment_bytes:
            raise ModelFileError(cursor.path, "is not aligned", what=what, offset=offset)
        info = TensorInfo(name, shape, ggml_type, offset, 0)
        nbytes = info.num_elements // ggml_type.block_elements * ggml_type.block_bytes
        if offset + nbytes > cursor.size:
            problem = f"{nbytes} bytes of {list(shape)} {ggml_type.name} lie beyond the file's end"
            problem += f" ({cursor.size} bytes); is the file truncated?"
            raise ModelFileError(cursor.path, problem, what=what, offset=offset)
        tensors[name] = replace(info, nbytes=nbytes)
    _check_overlaps(cursor.path, tensors)
    return tensors


def _check_overlaps(path: Path, tensors: dict[str, TensorInfo]) -> None:
    """Tensors that share bytes could together be far larger than the file."""
    end = 0
    for info in sorted(tensors.values(), key=lambda each: each.offset):
        if info.offset < end:
            problem = "overlaps the tensor before it"
            raise ModelFileError(path, problem, what=f"tensor {info.name!r}", offset=info.offset)
        end = info.offset + info.nbytes


def _read_tensor_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], GGMLType, int]:
    name = cursor.name(f"tensor {index}")
    cursor.what = f"tensor {name!r}"
    num_dimensions = cursor.unsigned(4)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(f"has {num_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.unsigned(8) for _ in range(num_dimensions))[::-1]
    if 0 in shape:
        raise cursor.fail(f"shape {list(shape)} has no elements")
    type_id = cursor.unsigned(4)
    if type_id not in GGML_TYPES:
        raise cursor.fail(f"ggml type {type_id} is not known")
    return name, shape, GGML_TYPES[type_id], cursor.unsigned(8)
