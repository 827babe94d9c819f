"""A GGUF model, its tensors dequantised as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight
from services.engine.core.weights.dequantize import DEQUANTIZERS, FLOATS, dequantize
from services.engine.core.weights.grouped import GROUPED, read_grouped
from services.engine.core.weights.names import Names
from services.engine.core.weights.progress import ReadingProgress
from services.engine.core.weights.stored_linear import no_scales, rounded, rounded_outline
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf import TensorInfo
from services.runtime.modelfiles.gguf_model import GGUFModel

# Halves of two such bytes are about 1.
_PROBE = 0x3C


class GGUFCheckpoint:
    """The tensors of a GGUF model by the model's names; see `checkpoint.Checkpoint`."""

    def __init__(
        self, file: GGUFModel, names: Names, paired_heads: Mapping[str, int] | None = None
    ) -> None:
        """paired_heads: the heads of the projections `q` and `k` where the file has the rows of
        each head in pairs."""
        self.path = file.path
        self.unknown: list[str] = []
        self._file = file
        self._paired_heads = paired_heads or {}
        self._infos: dict[str, TensorInfo] = {}
        for source, info in file.tensors.items():
            name = names.of(source)
            if name is None:
                if not names.is_needless(source):
                    self.unknown.append(source)
                continue
            if info.type.name not in DEQUANTIZERS:
                known = ", ".join(DEQUANTIZERS)
                raise self._error(info, f"is stored as {info.type.name}, only {known} can be read")
            self._infos[name] = info
        self.shapes = {name: info.shape for name, info in self._infos.items()}
        self._progress = ReadingProgress(self.num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(info.nbytes for info in self._infos.values())

    @property
    def is_quantised(self) -> bool:
        return any(info.type.name not in FLOATS for info in self._infos.values())

    def stored_as(self, name: str) -> str:
        return self._infos[name].type.name

    def stored_bytes(self, name: str) -> int:
        return self._infos[name].nbytes

    def source_name(self, name: str) -> str:
        return self._infos[name].name

    def read(self, name: str) -> Tensor:
        info = self._infos[name]
        self._progress.add(info.nbytes)
        tensor = dequantize(self._file.tensor_bytes(info.name), info.type, info.shape)
        order = self._row_order(name, info)
        return tensor if order is None else tensor[order]

    def read_ranges(self, name: str, dim: int, ranges: Sequence[range]) -> list[Tensor]:
        """Return what `read` does of some ranges along the outputs (the last dimension but one; of
        a vector the last) or the inputs (the last), reading no more of the file where these ranges
        are whole blocks of the type. Of projections whose rows are paired, ranges are whole heads.
        """
        info = self._infos[name]
        self._progress.add(info.nbytes)
        blocks_of_row = info.shape[-1] // info.type.block_elements
        raw = self._file.tensor_bytes(info.name).reshape(
            *info.shape[:-1], blocks_of_row, info.type.block_bytes
        )
        return [self._range(raw, name, dim, own) for own in ranges]

    def _range(self, raw: np.ndarray, name: str, dim: int, own: range) -> Tensor:
        info = self._infos[name]
        whole, size = info.shape[dim], info.type.block_elements
        if dim == -1 and (own.start % size or own.stop % size):
            every = dequantize(raw.reshape(-1), info.type, info.shape)
            return every.narrow(dim, own.start, len(own))
        first, last = (own.start, own.stop) if dim == -2 else (own.start // size, own.stop // size)
        part = np.ascontiguousarray(raw[(..., slice(first, last)) + (slice(None),) * -dim])
        shape = list(info.shape)
        shape[dim] = len(own)
        tensor = dequantize(part.reshape(-1), info.type, tuple(shape))
        heads = self._heads_in_pairs(name)
        if heads is None or dim != -len(shape):
            return tensor
        return tensor[_halves_from_pairs(len(own), heads * len(own) // whole)]

    def read_grouped(self, name: str) -> GroupedWeight | None:
        info = self._infos[name]
        if info.type.name in FLOATS or len(info.shape) < 2 or info.shape[-1] % GROUP_INPUTS:
            return None
        self._progress.add(info.nbytes)
        shape = _rows_and_inputs(info)
        if info.type.name in GROUPED:
            raw = self._file.tensor_bytes(info.name)
            weight = read_grouped(raw, info.type, shape)
        else:
            weight = rounded(lambda rows: self._rows(info, rows), shape)
        for part in (weight.scales, weight.minima):
            if part is not None and not part.isfinite().all():
                raise self._error(info, "has scales that are no finite numbers")
        order = self._row_order(name, info)
        return weight if order is None else weight.map(lambda rows: rows[order])

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        return None

    def outline(self, name: str) -> GroupedWeight | None:
        info = self._infos[name]
        if info.type.name in FLOATS or len(info.shape) < 2:
            return None
        shape = _rows_and_inputs(info)
        if info.type.name not in GROUPED:
            return rounded_outline(shape)
        # A block of any content tells the bits of the type, whether it has minima, and whether
        # these follow from the scales.
        block = torch.full((1, info.type.block_bytes), _PROBE, dtype=torch.uint8)
        _, scales, minima, bits = GROUPED[info.type.name](block)

        def outlined(values: Tensor) -> Tensor:
            return (values.flatten()[0] * no_scales((1, shape[1]))).expand(shape[0], -1)

        return GroupedWeight(
            torch.empty(shape, dtype=torch.uint8, device="meta"),
            outlined(scales),
            None if minima is None else outlined(minima),
            bits,
        )

    def _rows(self, info: TensorInfo, rows: slice) -> Tensor:
        count, inputs = _rows_and_inputs(info)
        raw = self._file.tensor_bytes(info.name).reshape(count, -1)[rows]
        return dequantize(raw.reshape(-1), info.type, (len(raw), inputs))

    def release(self) -> None:
        self._file.release()
        self._progress.report()

    def close(self) -> None:
        self._file.close()

    def _error(self, info: TensorInfo, problem: str) -> ModelFileError:
        path = self._file.file_of(info.name)
        return ModelFileError(path, problem, what=f"tensor {info.name!r}", offset=info.offset)

    def _row_order(self, name: str, info: TensorInfo) -> Tensor | None:
        heads = self._heads_in_pairs(name)
        return None if heads is None else _halves_from_pairs(info.shape[0], heads)

    def _heads_in_pairs(self, name: str) -> int | None:
        """The heads of a projection that has the rows of each in pairs."""
        parts = name.split(".")
        if len(parts) > 2 and parts[-3] == "attention":
            return self._paired_heads.get(parts[-2])
        return None


def _rows_and_inputs(info: TensorInfo) -> tuple[int, int]:
    """The size of a matrix; those of a stack lie one after the other."""
    return math.prod(info.shape[:-1]), info.shape[-1]


def _halves_from_pairs(num_rows: int, heads: int) -> Tensor:
    """The order that undoes GGUF's, for the rows of Llama's query and key projections.

    GGUF rotates neighbouring rows of a head against each other, this model (as HF) a head's two
    halves: row 2i of a head becomes row i, row 2i + 1 becomes row i + head_dim / 2.
    """
    return torch.arange(num_rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
