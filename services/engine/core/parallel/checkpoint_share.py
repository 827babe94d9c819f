"""A rank's part of a checkpoint, as one of its own: so loaders need not know of ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight
from services.engine.core.parallel.partition import Cut, Partition
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.gguf_checkpoint import GGUFCheckpoint


class CheckpointShare:
    """What a rank has of every tensor; see `checkpoint.Checkpoint`.

    Of a tensor that is not quantised, no more is read from the file than the rank has of it; of a
    GGUF file, of any. Tensors have the rank's shapes; rows beyond the vocabulary are zeros.
    """

    def __init__(self, checkpoint: Checkpoint, partition: Partition) -> None:
        self.path, self.unknown = checkpoint.path, checkpoint.unknown
        self._checkpoint, self._partition = checkpoint, partition
        self.shapes = {name: self._shape(name) for name in checkpoint.shapes}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, cut = list(self._checkpoint.shapes[name]), self._partition.cut(name)
        if cut is not None:
            shape[cut.dim] = cut.size
        return tuple(shape)

    @property
    def num_bytes(self) -> int:
        return self._checkpoint.num_bytes

    @property
    def is_quantised(self) -> bool:
        return self._checkpoint.is_quantised

    def read(self, name: str) -> Tensor:
        cut, checkpoint = self._partition.cut(name), self._checkpoint
        if cut is None:
            return checkpoint.read(name)
        if isinstance(checkpoint, GGUFCheckpoint):
            return cut.joined(checkpoint.read_ranges(name, cut.dim, cut.ranges))
        # Where it is not quantised, this is the file's own memory, of which only pages that are
        # copied from are read.
        stored = checkpoint.read(name)
        return cut.joined([stored.narrow(cut.dim, each.start, len(each)) for each in cut.ranges])

    def read_grouped(self, name: str) -> GroupedWeight | None:
        return self._share(name, self._checkpoint.read_grouped(name))

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        cut = self._partition.cut(name)
        if cut is None:
            return self._checkpoint.read_scaled(name, device)
        whole = self._checkpoint.read_scaled(name, torch.device("cpu"))
        if whole is None:
            return None
        parts = [whole.elements.narrow(cut.dim, each.start, len(each)) for each in cut.ranges]
        scales = whole.scales.unsqueeze(-1)
        if cut.dim == -2:
            scales = cut.joined([scales.narrow(-2, each.start, len(each)) for each in cut.ranges])
        return ScaledMatrix(cut.joined(parts).to(device), scales.squeeze(-1).to(device))

    def outline(self, name: str) -> GroupedWeight | None:
        return self._share(name, self._checkpoint.outline(name))

    def _share(self, name: str, whole: GroupedWeight | None) -> GroupedWeight | None:
        cut = self._partition.cut(name)
        if whole is None or cut is None:
            return whole
        shape = self._checkpoint.shapes[name]
        groups = Cut(cut.dim, cut.ranges, cut.size)
        if cut.dim == -1:
            if any(each.start % GROUP_INPUTS or each.stop % GROUP_INPUTS for each in cut.ranges):
                return None  # no whole groups: it is read as floats
            groups = Cut(
                -1,
                tuple(
                    range(each.start // GROUP_INPUTS, each.stop // GROUP_INPUTS)
                    for each in cut.ranges
                ),
                cut.size // GROUP_INPUTS,
            )

        def share(values: Tensor, own: Cut) -> Tensor:
            stack = values.view(*shape[:-1], values.shape[-1])
            parts = [stack.narrow(own.dim, each.start, len(each)) for each in own.ranges]
            joined = own.joined(parts)
            return joined.reshape(-1, joined.shape[-1])

        return replace(
            whole,
            levels=share(whole.levels, cut),
            scales=share(whole.scales, groups),
            minima=None if whole.minima is None else share(whole.minima, groups),
        )

    def stored_as(self, name: str) -> str:
        return self._checkpoint.stored_as(name)

    def stored_bytes(self, name: str) -> int:
        return self._checkpoint.stored_bytes(name)

    def source_name(self, name: str) -> str:
        return self._checkpoint.source_name(name)

    def release(self) -> None:
        self._checkpoint.release()

    def close(self) -> None:
        self._checkpoint.close()
