"""A checkpoint opened for reading: tensors by the model's names, from safetensors or GGUF."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.weights.dequantize import DEQUANTIZERS, dequantize
from services.engine.core.weights.grouped import GROUPED, read_grouped
from services.engine.core.weights.names import FROM_GGUF, FROM_HF, is_derived, model_name
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf import GGUFFile, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint(Protocol):
    """Tensors by the model's names; `unknown` lists those that the name table does not have.

    Once closed, which may be done twice, nothing is read any more.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    unknown: list[str]

    def read(self, name: str) -> Tensor:
        """Return a tensor of floating-point type on the CPU; raises ModelFileError."""

    def read_grouped(self, name: str) -> GroupedWeight | None:
        """Return a matrix in the precision it is stored in, None if that is no quantised one."""

    def source_name(self, name: str) -> str:
        """Return what the checkpoint itself calls the model's tensor `name`."""

    def close(self) -> None:
        """Give back the memory through which a file was read."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a model calls the tensors of a HF checkpoint."""

    of: Callable[[str], str | None]  # None: the model has none of this name
    is_needless: Callable[[str], bool]  # of those: whether nothing is missed without it


DECODER_NAMES = Names(lambda source: model_name(source, FROM_HF), is_derived)


class SafetensorsCheckpoint:
    """A HF directory with one model.safetensors or shards and their index."""

    def __init__(self, directory: Path, names: Names = DECODER_NAMES) -> None:
        self.path = directory
        self._names = names
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unknown: list[str] = []
        self._where: dict[str, tuple[Path, str]] = {}
        for file in _safetensors_files(directory):
            self._add_file(file)
        found = {source: file.name for file, source in self._where.values()}
        _check_index(directory, found, names)

    def _add_file(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for source in opened.keys():  # noqa: SIM118 - not a mapping
                    view = opened.get_slice(source)
                    self._add(file, source, tuple(view.get_shape()), view.get_dtype())
        except ModelFileError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ModelFileError(file, f"is not a readable safetensors file: {error}") from None

    def _add(self, file: Path, source: str, shape: tuple[int, ...], dtype: str) -> None:
        name = self._names.of(source)
        if name is None:
            if not self._names.is_needless(source):
                self.unknown.append(source)
            return
        if name in self._where:
            raise ModelFileError(file, "is there twice", what=f"tensor {source!r}")
        if dtype not in _FLOAT_TYPES:
            problem = f"is stored as {dtype}, only {', '.join(_FLOAT_TYPES)} can be read"
            raise ModelFileError(file, problem, what=f"tensor {source!r}")
        self.shapes[name] = shape
        self._where[name] = (file, source)

    def source_name(self, name: str) -> str:
        return self._where[name][1]

    def read(self, name: str) -> Tensor:
        file, source = self._where[name]
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(source)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelFileError(
                file, f"cannot be read: {error}", what=f"tensor {source!r}"
            ) from None
        return tensor

    def read_grouped(self, name: str) -> GroupedWeight | None:
        return None

    def close(self) -> None:
        """Nothing stays open between two tensors."""


class GGUFCheckpoint:
    """A GGUF file, its tensors dequantised as they are read."""

    def __init__(self, file: GGUFFile, heads: int, kv_heads: int) -> None:
        self.path = file.path
        self.unknown: list[str] = []
        self._file = file
        self._heads = {"q": heads, "k": kv_heads}
        self._infos: dict[str, TensorInfo] = {}
        for source, info in file.tensors.items():
            name = model_name(source, FROM_GGUF)
            if name is not None:
                self._infos[name] = info
            elif not is_derived(source):
                self.unknown.append(source)
        self.shapes = {name: info.shape for name, info in self._infos.items()}

    def source_name(self, name: str) -> str:
        return self._infos[name].name

    def read(self, name: str) -> Tensor:
        info = self._infos[name]
        if info.type.name not in DEQUANTIZERS:
            problem = f"is stored as {info.type.name}, only {', '.join(DEQUANTIZERS)} can be read"
            raise ModelFileError(self.path, problem, what=f"tensor {info.name!r}")
        tensor = dequantize(self._file.tensor_bytes(info.name), info.type, info.shape)
        order = self._row_order(name, info)
        return tensor if order is None else tensor[order]

    def read_grouped(self, name: str) -> GroupedWeight | None:
        info = self._infos[name]
        if info.type.name not in GROUPED or len(info.shape) != 2:
            return None
        weight = read_grouped(self._file.tensor_bytes(info.name), info.type, info.shape)
        order = self._row_order(name, info)
        return weight if order is None else weight.map(lambda rows: rows[order])

    def close(self) -> None:
        self._file.close()

    def _row_order(self, name: str, info: TensorInfo) -> Tensor | None:
        parts = name.split(".")
        if len(parts) > 2 and parts[-3] == "attention" and parts[-2] in self._heads:
            return _halves_from_pairs(info.shape[0], self._heads[parts[-2]])
        return None


def _halves_from_pairs(num_rows: int, heads: int) -> Tensor:
    """The order that undoes GGUF's, for the rows of Llama's query and key projections.

    GGUF rotates neighbouring rows of a head against each other, this model (as HF) a head's two
    halves: row 2i of a head becomes row i, row 2i + 1 becomes row i + head_dim / 2.
    """
    return torch.arange(num_rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def open_checkpoint(path: Path, heads: int, kv_heads: int) -> Checkpoint:
    """Open a HF directory or a .gguf file; the head counts undo GGUF's order of rows.

    Raises ModelFileError for what is damaged, missing or stored as pickled Python objects, which
    are never loaded because they can run code.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(GGUFFile(path), heads, kv_heads)


def _safetensors_files(directory: Path) -> list[Path]:
    if (directory / INDEX_NAME).exists():
        weight_map = _read_index(directory)
        return [directory / name for name in sorted(set(weight_map.values()))]
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        problem = (
            f"holds only pickled weights ({pickled[0]}), which can run code when loaded and are "
            "refused; convert the model to safetensors"
        )
        raise ModelFileError(directory, problem)
    raise ModelFileError(directory, f"has neither model.safetensors nor {INDEX_NAME}")


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(path, f"is not an index of shards: {error}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(path, "is not an index of shards", what="weight_map")
    for tensor, file in weight_map.items():
        # A shard lies beside its index; anything else could point anywhere on the machine.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ModelFileError(path, f"{file!r} is no shard's name", what=f"tensor {tensor!r}")
    return weight_map


def _check_index(directory: Path, found: dict[str, str], names: Names) -> None:
    if not (directory / INDEX_NAME).exists():
        return
    for source, file in _read_index(directory).items():
        if names.of(source) is not None and found.get(source) != file:
            problem = f"is not in {file}, where {INDEX_NAME} has it"
            raise ModelFileError(directory, problem, what=f"tensor {source!r}")
