"""What can be told of pickled weights without unpickling anything: their archives' own lists."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.weights.loading import weight_slots
from services.engine.core.weights.shards import has_safetensors, pickled_names

# torch.save writes the numbers of each tensor beside its pickle, as they are.
_NUMBERS = re.compile(r"(^|/)data/[^/]+$")


@dataclass(frozen=True, slots=True)
class PickledOutline:
    """The pickled files of a directory that has no others.

    `tensors` and `tensor_bytes` are those that the archives list, None where a file is none.
    """

    files: tuple[Path, ...]
    tensors: int | None
    tensor_bytes: int | None

    @property
    def size_bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self.files)


def outline_pickled(directory: Path) -> PickledOutline | None:
    """Return what a directory's pickled files say of themselves, None where it has others.

    Raises ModelFileError for an index that is damaged.
    """
    if not directory.is_dir() or has_safetensors(directory):
        return None
    files = tuple(directory / name for name in pickled_names(directory))
    if not files:
        return None
    try:
        sizes = [size for file in files for size in _sizes(file)]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return PickledOutline(files, None, None)
    return PickledOutline(files, len(sizes), sum(sizes))


def _sizes(file: Path) -> Iterable[int]:
    with zipfile.ZipFile(file) as archive:
        return [each.file_size for each in archive.infolist() if _NUMBERS.search(each.filename)]


class UnreadCheckpoint:
    """The tensors that a model's shape wants, as if a file had them; see `checkpoint.Checkpoint`.

    For the size of what loading would take: there is nothing to read.
    """

    is_quantised = False
    num_bytes = 0

    def __init__(self, path: Path, skeleton: nn.Module) -> None:
        self.path = path
        self.shapes = {name: tuple(slot.shape) for name, slot in weight_slots(skeleton).items()}
        self.unknown: list[str] = []

    def read(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")

    def read_grouped(self, name: str) -> GroupedWeight | None:
        return None

    outline = read_grouped

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        return None

    def stored_as(self, name: str) -> str:
        return "pickled"

    def stored_bytes(self, name: str) -> int:
        return 0

    def source_name(self, name: str) -> str:
        return name

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass
