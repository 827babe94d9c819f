"""The adapters that a native model has loaded, by the numbers that batches name them by."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from services.engine.core.kernels.cpu.adapters import (
    AdaptedLinear,
    AdapterLinearStruct,
    NativeAdapter,
    StepAdapters,
)
from services.engine.core.kernels.low_rank import AdapterParts


class AdapterSlots:
    """What steps find adapters by. Not to be changed while one runs."""

    def __init__(self, layers: Sequence[AdaptedLinear], count: int) -> None:
        self._layers = layers
        self._places = {layer.path: index for index, layer in enumerate(layers)}
        self._kept: list[NativeAdapter | None] = [None] * count
        self._loaded = (ctypes.POINTER(AdapterLinearStruct) * max(count, 1))()
        self._of_sequence = np.empty(0, np.int32)
        self._step = StepAdapters(loaded=self._loaded)

    def pack(self, parts: AdapterParts) -> NativeAdapter:
        """Pack an adapter by the paths of the layers that it changes."""
        return NativeAdapter(self._layers, {self._places[path]: own for path, own in parts.items()})

    def set(self, slot: int, adapter: NativeAdapter | None) -> None:
        """Keep an adapter under a number, or forget the one there."""
        self._kept[slot] = adapter
        self._loaded[slot] = (
            ctypes.POINTER(AdapterLinearStruct)()
            if adapter is None
            else ctypes.cast(adapter.layers, ctypes.POINTER(AdapterLinearStruct))
        )

    def of(self, slots: tuple[int, ...]) -> ctypes._Pointer[StepAdapters]:
        """What a step is told whose sequences have these adapters, -1 for none."""
        # Read by the one step that follows.
        self._of_sequence = np.array(slots, np.int32)
        self._step.of_sequence = self._of_sequence.ctypes.data
        return ctypes.pointer(self._step)
