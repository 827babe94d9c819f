"""Weights that torch.save has pickled, loaded only where the settings ask for it.

A pickle can name any function to be called. torch's `weights_only` unpickler calls none but those
that make tensors; what comes of it is checked here before any of it is used.
"""

from __future__ import annotations

import ctypes
import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.core.weights.shards import PICKLED, check_index, pickled_files
from services.engine.core.weights.tensor_files import TORCH_TYPES, TensorEntry
from services.runtime.modelfiles import ModelFileError

_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
# Names of tied weights share a tensor; nothing else in a checkpoint does.
_MOST_SHARED = 2
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PickledFiles:
    """One pytorch_model.bin, or shards and their index; see `tensor_files.TensorFiles`."""

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._tensors: dict[str, Tensor] = {}
        self._used: list[Tensor] = []
        for path in pickled_files(directory):
            self._add(path, _unpickle(path))
        check_index(directory, self._entries, PICKLED)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def _add(self, path: Path, tensors: dict[str, Tensor]) -> None:
        size_bytes, claimed_bytes = path.stat().st_size, 0
        for source, tensor in tensors.items():
            entry = TensorEntry(path, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
            claimed_bytes += tensor.nbytes
            if source in self._entries:
                raise entry.error(source, f"is in {self._entries[source].file.name} as well")
            if claimed_bytes > _MOST_SHARED * size_bytes:
                raise entry.error(source, f"and those before it claim {claimed_bytes} bytes")
            self._entries[source] = entry
            self._tensors[source] = tensor

    def read(self, source: str) -> Tensor:
        tensor = self._tensors[source]
        self._used.append(tensor)
        return tensor

    def release(self) -> None:
        for tensor in self._used:
            storage = tensor.untyped_storage()
            start = storage.data_ptr() - storage.data_ptr() % mmap.PAGESIZE
            # Pages that nobody has written come from the file again.
            _madvise(start, storage.data_ptr() + storage.nbytes() - start, mmap.MADV_DONTNEED)
        self._used.clear()

    def close(self) -> None:
        self._tensors.clear()
        self._used.clear()


def _unpickle(path: Path) -> dict[str, Tensor]:
    _check_archive(path)
    try:
        # Storages stay in the file.
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle makes of its own program
        problem = f"cannot be loaded as weights alone: {str(error).strip().partition(chr(10))[0]}"
        raise ModelFileError(path, problem) from None
    if not isinstance(found, dict):
        raise ModelFileError(path, "is not a table of tensors")
    for name, tensor in found.items():
        what = f"tensor {name!r}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelFileError(path, "is no tensor with a name", what=what)
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.dtype not in _NAMES:
            raise ModelFileError(path, f"{tensor.dtype} cannot be read", what=what)
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ModelFileError(path, "is larger than what is stored of it", what=what)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_archive(path: Path) -> None:
    """What is compressed could be of any size; older files are no archives and cannot be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelFileError(path, f"is no archive of torch.save: {error}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
            raise ModelFileError(path, "is compressed", what=f"member {member.filename!r}")
