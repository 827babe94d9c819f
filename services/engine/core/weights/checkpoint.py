"""A checkpoint opened for reading: tensors by the model's names, whatever holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight
from services.engine.core.weights.names import Names, Treatment
from services.engine.core.weights.pickled_files import PickledFiles
from services.engine.core.weights.progress import ReadingProgress
from services.engine.core.weights.schemes import read_scheme
from services.engine.core.weights.stored_floats import StoredFloats
from services.engine.core.weights.stored_linear import StoredLinear
from services.engine.core.weights.tensor_files import (
    FLOAT_TYPES,
    TORCH_TYPES,
    SafetensorsFiles,
    TensorFiles,
)


class Checkpoint(Protocol):
    """Tensors by the model's names; `unknown` lists those that the name table does not have.

    Once closed, which may be done twice, nothing is read any more.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    unknown: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are stored in fewer than 16 bits."""

    def read(self, name: str) -> Tensor:
        """Return a tensor of floating-point type on the CPU; raises ModelFileError."""

    def read_grouped(self, name: str) -> GroupedWeight | None:
        """Return a quantised matrix in groups of 32, None for one that is not quantised or whose
        inputs are no whole groups.

        Its levels are its own where groups of 32 hold them, else it is rounded to 8 bits. Raises
        ModelFileError.
        """

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        """Return a matrix of eight-bit floats as it is stored, on `device`, where it has a scale
        for each output and activations are to be rounded as well; None for any other.

        On the meta device it is for its shape, and only scales are read. Raises ModelFileError.
        """

    def stored_as(self, name: str) -> str:
        """Return what a tensor's type is called, for people."""

    def outline(self, name: str) -> GroupedWeight | None:
        """Return what `read_grouped` would, with levels on the meta device and, of a GGUF file,
        made-up scales: for its shape and format, without reading the matrix."""

    def stored_bytes(self, name: str) -> int:
        """Bytes that a tensor takes as it is stored."""

    def source_name(self, name: str) -> str:
        """Return what the checkpoint itself calls the model's tensor `name`."""

    def release(self) -> None:
        """Give back the memory through which tensors were read so far, while none is in use."""

    def close(self) -> None:
        """Give back the memory through which files were read."""


class DirectoryCheckpoint:
    """A HF directory; its projections may be quantised as its config.json says."""

    def __init__(self, directory: Path, files: TensorFiles, names: Names) -> None:
        self.path = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unknown: list[str] = []
        self._names = names
        self._files = files
        self._scheme = read_scheme(directory)
        self._sources: dict[str, str] = {}  # of tensors that are stored whole
        self._parts: dict[str, dict[str, str]] = {}  # of quantised ones, by kind
        for source in files.entries:
            self._add(source)
        for name, parts in self._parts.items():
            self.shapes[name] = self._quantised_shape(name, parts)
        self._progress = ReadingProgress(self.num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(self.stored_bytes(name) for name in self.shapes)

    def _add(self, source: str) -> None:
        entry = self._files.entries[source]
        module, _, kind = source.rpartition(".")
        is_part = self._scheme is not None and self._scheme.owns(kind, entry)
        name = self._names.of(f"{module}.weight" if is_part else source)
        if name is None:
            if not self._names.is_needless(source):
                self.unknown.append(source)
            return
        if is_part:
            self._parts.setdefault(name, {})[kind] = source
            return
        if name in self.shapes:
            raise entry.error(source, "is there twice")
        if entry.dtype not in FLOAT_TYPES:
            problem = f"is stored as {entry.dtype}, only {', '.join(FLOAT_TYPES)} can be read"
            raise entry.error(source, problem)
        is_transposed = self._names.treatment(name) == "transposed"
        self.shapes[name] = entry.shape[::-1] if is_transposed else entry.shape
        self._sources[name] = source

    def _quantised_shape(self, name: str, parts: dict[str, str]) -> tuple[int, int]:
        assert self._scheme is not None
        source = self.source_name(name)
        entry = self._files.entries[source]
        if name in self._sources:
            raise entry.error(source, f"and {self._sources[name]} are the same weights")
        for part in parts.values():
            if (dtype := self._files.entries[part].dtype) not in TORCH_TYPES:
                raise self._files.entries[part].error(part, f"{dtype} cannot be read")
        try:
            return self._scheme.shape(
                {kind: self._files.entries[part] for kind, part in parts.items()}
            )
        except ValueError as error:
            raise entry.error(source, str(error)) from None

    def source_name(self, name: str) -> str:
        if name in self._parts:
            # Its levels.
            return max(
                self._parts[name].values(), key=lambda part: self._files.entries[part].nbytes
            )
        return self._sources[name]

    @property
    def is_quantised(self) -> bool:
        return bool(self._parts)

    def stored_as(self, name: str) -> str:
        if name in self._parts:
            return str(self._scheme)
        return self._files.entries[self._sources[name]].dtype

    def stored_bytes(self, name: str) -> int:
        sources = self._parts[name].values() if name in self._parts else [self._sources[name]]
        return sum(self._files.entries[source].nbytes for source in sources)

    def read(self, name: str) -> Tensor:
        self._progress.add(self.stored_bytes(name))
        if name in self._parts:
            return self._read_stored(name).dequantize()
        return _treated(self._files.read(self._sources[name]), self._names.treatment(name))

    def read_grouped(self, name: str) -> GroupedWeight | None:
        if name not in self._parts or self.shapes[name][1] % GROUP_INPUTS:
            return None
        self._progress.add(self.stored_bytes(name))
        return self._read_stored(name).grouped()

    def outline(self, name: str) -> GroupedWeight | None:
        if name not in self._parts:
            return None
        return self._read_stored(name, without_levels=True).outline()

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        if name not in self._parts:
            return None
        stored = self._read_stored(name, without_levels=device.type == "meta")
        if not isinstance(stored, StoredFloats) or (found := stored.scaled()) is None:
            return None
        self._progress.add(self.stored_bytes(name))
        return ScaledMatrix(found.elements.to(device), found.scales.to(device))

    def _read_stored(
        self, name: str, *, without_levels: bool = False
    ) -> StoredLinear | StoredFloats:
        assert self._scheme is not None
        parts = self._parts[name]
        levels = self.source_name(name) if without_levels else None
        try:
            stored = self._scheme.read(
                {
                    kind: self._files.read(source).to("meta" if source == levels else "cpu")
                    for kind, source in parts.items()
                }
            )
            stored.check()
        except ValueError as error:
            source = self.source_name(name)
            raise self._files.entries[source].error(source, str(error)) from None
        return stored

    def release(self) -> None:
        self._files.release()
        self._progress.report()

    def close(self) -> None:
        self._files.close()


class PickledCheckpoint(DirectoryCheckpoint):
    """A HF directory with one pytorch_model.bin, or shards and their index."""

    def __init__(self, directory: Path, names: Names) -> None:
        super().__init__(directory, PickledFiles(directory), names)


class SafetensorsCheckpoint(DirectoryCheckpoint):
    """A HF directory with one model.safetensors, or shards and their index."""

    def __init__(self, directory: Path, names: Names) -> None:
        super().__init__(directory, SafetensorsFiles(directory), names)


def _treated(tensor: Tensor, treatment: Treatment) -> Tensor:
    if treatment == "transposed":
        return tensor.mT
    return tensor.float() + 1 if treatment == "plus one" else tensor
