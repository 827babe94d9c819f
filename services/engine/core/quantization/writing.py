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
from services.engine.core.quantization.grid import Rounded, round_to_nearest
from services.engine.core.quantization.layers import LayeredModel, weights_of
from services.engine.core.quantization.rounding import RoundedOnDisk
from services.engine.core.quantization.sources import Source
from services.engine.core.weights.packed_integers import pack_columns

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


def write_model(
    model: LayeredModel,
    source: Source,
    kept: RoundedOnDisk,
    bits: Mapping[str, int],
    directory: Path,
) -> None:
    """Write weights and config.json of a model whose units have these bits.

    kept: the units that get 4. Those that get 8 are rounded now, those with 16 stay as they were.
    """
    writer = ShardWriter(directory)
    modules: dict[str, int] = {}
    rounded_names = []
    for index in range(model.num_layers):
        units = [unit for unit in model.units(index) if bits[unit.path] < 16]
        layer = model.layer(index) if any(bits[unit.path] == 8 for unit in units) else None
        for unit in units:
            if bits[unit.path] == 4:
                matrices = kept.read(unit)
            else:
                assert layer is not None
                matrices = [round_to_nearest(weight, 8) for weight in weights_of(layer, unit)]
            for rounded, parts in zip(matrices, unit.matrices, strict=True):
                start = 0
                for name, rows in parts:
                    module = source.name_of(name).removesuffix(".weight")
                    writer.add(packed_parts(module, rounded, slice(start, start + rows)))
                    modules[module] = bits[unit.path]
                    rounded_names.append(name)
                    start += rows
    left = ["lm_head"]
    for name, tensor in source.others(rounded_names):
        writer.add({name: tensor.contiguous()})
        if tensor.dim() == 2 and name.endswith(".weight"):
            left.append(name.removesuffix(".weight"))
    writer.finish()
    config = dict(source.config)
    if modules:
        config["quantization_config"] = quantization_config(modules, sorted(set(left)))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
