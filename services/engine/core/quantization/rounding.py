"""All layers of a model rounded to 4 bits, each on what the rounded layers before it give."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS
from services.engine.core.quantization.gptq import round_with_compensation
from services.engine.core.quantization.grid import Grid, Rounded, round_to_nearest
from services.engine.core.quantization.layers import (
    InputProducts,
    LayeredModel,
    Unit,
    weights_of,
)
from services.engine.core.quantization.sensitivity import Progress, Sensitivity
from services.engine.core.weights.packed_integers import pack_columns, unpack_columns

# An expert that calibration sent fewer tokens is rounded without: so few say nothing.
LEAST_TOKENS = GROUP_INPUTS


class RoundedOnDisk:
    """Units rounded to 4 bits, in files of a directory of their own until they are wanted."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory

    def add(self, unit: Unit, matrices: list[Rounded]) -> None:
        """Keep a unit's matrices."""
        tensors = {}
        for index, each in enumerate(matrices):
            tensors[f"{index}.levels"] = pack_columns(each.levels, 4)
            tensors[f"{index}.scales"] = each.grid.scales.to(torch.bfloat16)
        save_file(tensors, self._path(unit))

    def read(self, unit: Unit) -> list[Rounded]:
        """Return them again."""
        tensors = load_file(self._path(unit))
        return [
            Rounded(
                unpack_columns(tensors[f"{index}.levels"], 4),
                Grid(tensors[f"{index}.scales"].float(), 4),
            )
            for index in range(len(unit.matrices))
        ]

    def _path(self, unit: Unit) -> Path:
        return self._directory / f"{unit.path}.safetensors"


def round_layers(
    model: LayeredModel,
    kept: RoundedOnDisk,
    progress: Progress,
    *,
    compensate: bool = True,
    sensitivity: Sensitivity | None = None,
) -> dict[str, list[int]]:
    """Round all units to 4 bits; return the experts, by their unit, that too few tokens reached.

    sensitivity: is shown each layer before it is rounded.
    """
    rounded_blindly: dict[str, list[int]] = {}
    hidden = model.embed() if compensate else torch.empty(0)
    for index in range(model.num_layers):
        progress("rounding layers", index, model.num_layers)
        layer, units = model.layer(index), model.units(index)
        seen = _products(model, layer, units, hidden) if compensate else {}
        rounded: dict[str, list[Rounded]] = {}
        for unit in units:
            rounded[unit.path] = []
            for place, weight in enumerate(weights_of(layer, unit)):
                products, tokens = seen[unit.path][place] if compensate else (None, 0)
                if products is not None and tokens >= LEAST_TOKENS:
                    rounded[unit.path].append(round_with_compensation(weight, 4, products))
                    continue
                rounded[unit.path].append(round_to_nearest(weight, 4))
                if compensate:
                    rounded_blindly.setdefault(unit.path, []).append(place)
            kept.add(unit, rounded[unit.path])
        if sensitivity is not None:
            sensitivity.see(layer, rounded, units)
        if compensate:
            _put(layer, units, rounded)
            hidden = model.run(layer, hidden)
    progress("rounding layers", model.num_layers, model.num_layers)
    return rounded_blindly


def _products(
    model: LayeredModel, layer: nn.Module, units: list[Unit], hidden: Tensor
) -> dict[str, list[tuple[Tensor, int]]]:
    with InputProducts(layer, units) as inputs:
        model.run(layer, hidden)
    return {unit.path: inputs.of(unit) for unit in units}


def _put(layer: nn.Module, units: list[Unit], rounded: dict[str, list[Rounded]]) -> None:
    for unit in units:
        for weight, each in zip(weights_of(layer, unit), rounded[unit.path], strict=True):
            weight.copy_(each.dequantize())
