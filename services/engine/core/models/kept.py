"""A model for torch whose matrices keep few bits on its device: read and placed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from services.engine.core.heap import trim_heap
from services.engine.core.kernels import GroupedMatrix, Matrix, ScaledMatrix
from services.engine.core.kernels.cpu.packing import (
    GROUP_INPUTS,
    GroupedWeight,
    quantize_4,
    quantize_8,
)
from services.engine.core.layers import Embedding, ExpertMatrices, Experts, Linear, MergedLinear
from services.engine.core.layers.linear import keep
from services.engine.core.models.base import Model
from services.engine.core.models.precision import MatrixReader, WeightChoice
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import weight_slots
from services.engine.core.weights.stored_linear import rounded_outline

# Beside what a CPU has: activations of eight bits as well, in floats ("fp8") and integers ("w8a8").
KeptWeights: TypeAlias = WeightChoice | Literal["fp8", "w8a8"]
KEPT_WEIGHTS: tuple[KeptWeights, ...] = (*get_args(WeightChoice), "fp8", "w8a8")
_SCALED = {"fp8": torch.float8_e4m3fn, "w8a8": torch.int8}
_NAMES = {dtype: name for name, dtype in _SCALED.items()}
# Rounded at a time: in float32, some times over, it takes many times what is kept of it.
_CHUNK_ELEMENTS = 1 << 21


class KeptMatrices(MatrixReader):
    """Reads matrices as a device is to keep them.

    On the meta device nothing is rounded: matrices get the shapes and the formats that they would
    have.
    """

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        weights: KeptWeights,
        device: torch.device,
        *,
        multiplies_fp8: bool,
    ) -> None:
        # What is not multiplied by eight bits is kept in eight.
        choice: WeightChoice = "int8" if weights == "fp8" or weights == "w8a8" else weights
        super().__init__(model, checkpoint, choice)
        self._device = device
        self._scaled = _SCALED.get(weights)
        self._keeps_floats = weights == "fp8" or (weights == "auto" and multiplies_fp8)

    def matrix(self, module: Linear | MergedLinear | Embedding) -> Matrix:
        """Return a module's matrix; floats are in the precision of the checkpoint."""
        inputs = module.weight.shape[-1]
        if inputs % GROUP_INPUTS:
            return self._floats(self._names(module))
        if not (self.is_router(module) or self.is_head(module)):
            names = self._names(module)
            if self._keeps_floats and (stored := self._stored_floats(names)) is not None:
                return stored
            if self._scaled is not None:
                return self._by_output(names, self._scaled)
        chosen = self.choose(module)
        return chosen if isinstance(chosen, Tensor) else self._grouped_matrix(chosen)

    def stack(self, matrices: ExpertMatrices) -> Tensor | GroupedMatrix:
        """Return the matrices of all experts, [experts, outputs, inputs]."""
        found = [
            each if isinstance(each, Tensor) else self._grouped_matrix(each)
            for each in self.choose_each(matrices)
        ]
        grouped = [each for each in found if isinstance(each, GroupedMatrix)]
        stacked = GroupedMatrix.stack(grouped) if len(grouped) == len(found) else None
        if stacked is not None:
            return stacked
        floats = [each if isinstance(each, Tensor) else each.dequantize() for each in found]
        return torch.stack(floats)

    def read_floats(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self._device)

    def round(self, floats: Tensor) -> GroupedWeight:
        if floats.is_meta:
            return rounded_outline((floats.shape[0], floats.shape[1]))
        return _join([quantize_8(rows) for rows in _chunks(floats)], is_rounded=True)

    def round_to_4(self, floats: Tensor) -> GroupedWeight:
        return _join([quantize_4(rows) for rows in _chunks(floats)], is_rounded=False)

    def _stored_floats(self, names: list[str]) -> ScaledMatrix | None:
        parts: list[ScaledMatrix] = []
        for name in names:
            part = self._checkpoint.read_scaled(f"{name}.weight", self._device)
            if part is None:
                return None
            parts.append(part)
        return _cat(parts)

    def _by_output(self, names: list[str], dtype: torch.dtype) -> ScaledMatrix:
        if dtype == torch.int8:
            parts = [self._checkpoint.read_grouped(f"{name}.weight") for name in names]
            own = [ScaledMatrix.of(each) for each in parts if each is not None]
            exact = [each for each in own if each is not None]
            if len(exact) == len(names):
                whole = _cat(exact)
                return ScaledMatrix(whole.elements.to(self._device), whole.scales.to(self._device))
        return ScaledMatrix.rounded(self._floats(names), dtype)

    def _grouped_matrix(self, weight: GroupedWeight) -> GroupedMatrix:
        if self._device.type != "meta":  # where the levels are already, and scales tell more
            weight = weight.map(lambda part: part.to(self._device))
        return GroupedMatrix.of(weight)


@torch.no_grad()
def load_kept(
    model: Model,
    checkpoint: Checkpoint,
    weights: KeptWeights,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    multiplies_fp8: bool = True,
) -> Mapping[str, int]:
    """Give a model, on the meta device, its weights: matrices in few bits, all else in `dtype`.

    multiplies_fp8: whether what computes with them multiplies eight-bit floats.

    Returns how many matrices were rounded to 8 bits that `auto` would rather have kept, by what
    they are stored as. Raises ModelFileError for a tensor that cannot be read and
    torch.OutOfMemoryError where the device has not the room.
    """
    device = torch.device(device)
    reader = KeptMatrices(model, checkpoint, weights, device, multiplies_fp8=multiplies_fp8)
    for path, module in model.named_modules():
        if isinstance(module, Linear | MergedLinear) or (
            isinstance(module, Embedding) and path == "embedding"
        ):
            _place(module, "weight", reader.matrix(module), dtype)
        elif isinstance(module, Experts):
            gate_up, down = module.matrices()
            _place(module, "gate_up", reader.stack(gate_up), dtype)
            _place(module, "down", reader.stack(down), dtype)
        else:
            continue
        # What reading took, before the next module takes as much again.
        checkpoint.release()
        trim_heap()
    # The rest: norms, biases, positions.
    names = [name for name, slot in weight_slots(model, checkpoint.shapes).items() if slot.is_meta]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    slots = weight_slots(model, checkpoint.shapes)
    for name in names:
        slots[name].copy_(checkpoint.read(name))
    checkpoint.release()
    model.eval().requires_grad_(False)
    return reader.rounded


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the matrix units of a device take eight-bit floats; a CPU computes as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def bytes_by_precision(model: nn.Module) -> dict[str, int]:
    """What a model's weights take on its device, by what they are kept in, largest first."""
    sizes: Counter[str] = Counter()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
        for matrix in vars(module).values():
            if isinstance(matrix, GroupedMatrix):
                sizes[f"int{matrix.bits}"] += matrix.nbytes
            elif isinstance(matrix, ScaledMatrix):
                sizes[_NAMES[matrix.elements.dtype]] += matrix.nbytes
    return dict(sizes.most_common())


def _place(module: nn.Module, name: str, matrix: Matrix, dtype: torch.dtype) -> None:
    if isinstance(matrix, Tensor):
        setattr(module, name, nn.Parameter(matrix.to(dtype), requires_grad=False))
        return
    keep(module, name, matrix)
    if isinstance(module, Embedding):
        module.dtype = dtype


def _cat(parts: list[ScaledMatrix]) -> ScaledMatrix:
    return ScaledMatrix(
        torch.cat([each.elements for each in parts]), torch.cat([each.scales for each in parts])
    )


def _chunks(floats: Tensor) -> tuple[Tensor, ...]:
    return torch.split(floats, max(_CHUNK_ELEMENTS // floats.shape[1], 1))


def _join(parts: list[GroupedWeight], *, is_rounded: bool) -> GroupedWeight:
    minima = [part.minima for part in parts if part.minima is not None]
    return GroupedWeight(
        torch.cat([part.levels for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minima) if minima else None,
        parts[0].bits,
        is_rounded,
    )
