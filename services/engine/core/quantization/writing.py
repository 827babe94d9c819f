"""A quantised model on disk, as `compressed-tensors` lays it out, written whole or not at all.

https://github.com/vllm-project/compressed-tensors, its format "pack-quantized".
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS
from services.engine.core.quantization.grid import Rounded

# Of a file: what is held in memory before it is written.
_SHARD_BYTES = 1 << 30


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield a directory beside `target` that becomes it at the end, or is gone if that fails.

    Raises FileExistsError where there is something already.
    """
    target = target.absolute()
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def packed_parts(module: str, rounded: Rounded, rows: slice) -> dict[str, Tensor]:
    """The tensors of a projection `module`, which is some rows of a rounded matrix."""
    levels, grid = rounded.levels[rows], rounded.grid
    parts = {
        "weight_packed": pack_columns(levels, grid.bits),
        "weight_scale": grid.scales[rows].to(torch.bfloat16),
        "weight_shape": torch.tensor(levels.shape, dtype=torch.int64),
    }
    return {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}


def pack_columns(levels: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns], below 2**bits -> int32 [rows, columns * bits / 32], the first in the
    lowest bits."""
    if bits == 4:
        pairs = levels.view(len(levels), -1, 2)
        levels = pairs[..., 0] | (pairs[..., 1] << 4)
    return levels.contiguous().view(torch.int32)


def quantization_config(modules: Mapping[str, int], unrounded: list[str]) -> dict[str, Any]:
    """What config.json says; modules: bits of the rounded ones, by their names."""
    widths = sorted(set(modules.values()))
    groups = {
        f"group_{index}": {
            "targets": ["Linear"]
            if len(widths) == 1
            else sorted(name for name, each in modules.items() if each == bits),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP_INPUTS,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for index, bits in enumerate(widths)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(unrounded),
        "kv_cache_scheme": None,
    }


class ShardWriter:
    """Writes tensors as they come into files of at most a gigabyte, and their index at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take some tensors."""
        for name, tensor in tensors.items():
            if self._pending_bytes and self._pending_bytes + tensor.nbytes > _SHARD_BYTES:
                self._flush()
            self._pending[name] = tensor
            self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and name all files by their number."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            os.rename(self._path(0), self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            os.rename(self._path(index), self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        document = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        path = self._directory / "model.safetensors.index.json"
        path.write_text(json.dumps(document, indent=2))

    def _path(self, index: int) -> Path:
        return self._directory / f"shard-{index}.partial"

    def _flush(self) -> None:
        save_file(self._pending, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
