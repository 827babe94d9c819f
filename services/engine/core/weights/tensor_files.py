"""The tensors of a HF directory, by the names that its files give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from services.engine.core.weights.mapped_tensors import as_tensor
from services.engine.core.weights.shards import check_index, safetensors_files
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.safetensors_file import SafetensorsFile

# What a tensor may be stored as; other types are known to the format, and read by nobody here.
TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor that has not been read: `dtype` as safetensors spells it; `offset` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None = None

    def error(self, source: str, problem: str) -> ModelFileError:
        """What to raise where this tensor, `source`, is at fault."""
        return ModelFileError(self.file, problem, what=f"tensor {source!r}", offset=self.offset)


class TensorFiles(Protocol):
    """All files of a directory that hold tensors; each name is there once."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """All tensors by name."""

    def read(self, source: str) -> Tensor:
        """Return a tensor as it is stored, in the file's memory; raises ModelFileError."""

    def release(self) -> None:
        """Give back the memory through which tensors were read so far."""

    def close(self) -> None:
        """Give back all memory of the files, once no tensor that was read is held any more."""


class SafetensorsFiles:
    """One model.safetensors, or shards and their index."""

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._owners: dict[str, SafetensorsFile] = {}
        self._files: list[SafetensorsFile] = []
        try:
            for path in safetensors_files(directory):
                self._add(SafetensorsFile(path))
            check_index(directory, self._entries)
        except ModelFileError:
            self.close()
            raise

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def _add(self, file: SafetensorsFile) -> None:
        self._files.append(file)
        for source, stored in file.tensors.items():
            entry = TensorEntry(file.path, stored.dtype, stored.shape, stored.nbytes, stored.offset)
            if source in self._entries:
                raise entry.error(source, f"is in {self._entries[source].file.name} as well")
            self._entries[source] = entry
            self._owners[source] = file

    def read(self, source: str) -> Tensor:
        entry = self._entries[source]
        raw = self._owners[source].tensor_bytes(source)
        return as_tensor(raw).view(TORCH_TYPES[entry.dtype]).view(entry.shape)

    def release(self) -> None:
        for file in self._files:
            file.release()

    def close(self) -> None:
        for file in self._files:
            file.close()


def check_part(
    parts: Mapping[str, TensorEntry],
    kind: str,
    dtypes: tuple[str, ...],
    shape: tuple[int | None, ...],
) -> tuple[int, ...]:
    """Return the shape of one of a projection's tensors; None in `shape` stands for any extent.

    Raises ValueError where it is missing, or of another type or shape.
    """
    if kind not in parts:
        raise ValueError(f"has no {kind}")
    entry = parts[kind]
    if entry.dtype not in dtypes:
        raise ValueError(f"{kind} is stored as {entry.dtype}, not {' or '.join(dtypes)}")
    fits = len(entry.shape) == len(shape) and all(
        found > 0 and wanted in (None, found)
        for found, wanted in zip(entry.shape, shape, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if each is None else str(each) for each in shape) + "]"
        raise ValueError(f"{kind} has shape {list(entry.shape)}, not {wanted}")
    return entry.shape
