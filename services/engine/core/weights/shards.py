"""Which files of a HF directory hold its tensors, and what their index says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import read_json

SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
_PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class _Entry(Protocol):
    @property
    def file(self) -> Path: ...


def safetensors_files(directory: Path) -> list[Path]:
    """Return the files that hold a directory's tensors.

    Raises ModelFileError where there are none, or pickled ones alone.
    """
    found = _files(directory, SAFETENSORS)
    if found:
        return found
    if pickled := pickled_names(directory):
        problem = (
            f"holds only pickled weights ({pickled[0]}), which can run code when loaded and are "
            "refused; convert the model to safetensors, or set allow_pickled for it where you "
            "trust its origin"
        )
        raise ModelFileError(directory, problem)
    raise ModelFileError(directory, f"has neither {SAFETENSORS} nor {SAFETENSORS}.index.json")


def pickled_names(directory: Path) -> list[str]:
    """The files of a directory that look pickled, whatever they are."""
    return sorted(file.name for pattern in _PICKLED_PATTERNS for file in directory.glob(pattern))


def pickled_files(directory: Path) -> list[Path]:
    """Return the pickled files of a directory; raises ModelFileError where there are none."""
    found = _files(directory, PICKLED)
    if not found:
        raise ModelFileError(directory, f"has neither {PICKLED} nor {PICKLED}.index.json")
    return found


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has weights that are not pickled."""
    return bool(_files(directory, SAFETENSORS))


def _files(directory: Path, single: str) -> list[Path]:
    if (index := _index_path(directory, single)).exists():
        return [directory / name for name in sorted(set(_read_index(index).values()))]
    return [directory / single] if (directory / single).exists() else []


def check_index(directory: Path, entries: Mapping[str, _Entry], single: str = SAFETENSORS) -> None:
    """Raise ModelFileError unless each tensor of the index is in the file that it names."""
    index = _index_path(directory, single)
    if not index.exists():
        return
    for source, name in _read_index(index).items():
        if source not in entries or entries[source].file.name != name:
            problem = f"is not in {name}, where {index.name} has it"
            raise ModelFileError(directory, problem, what=f"tensor {source!r}")


def _index_path(directory: Path, single: str) -> Path:
    return directory / f"{single}.index.json"


def _read_index(path: Path) -> dict[str, Any]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(path, "is not an index of shards", what="weight_map")
    for tensor, file in weight_map.items():
        # A shard lies beside its index; anything else could point anywhere on the machine.
        suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix):
            raise ModelFileError(path, f"{file!r} is no shard's name", what=f"tensor {tensor!r}")
    return weight_map
