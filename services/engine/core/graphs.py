"""Steps of a model as CUDA graphs: captured at start-up, replayed in one call.

Of a step that decodes, a GPU computes hundreds of kernels of a few microseconds each; launched one
by one they keep the host busy for longer than the device. A graph launches all of them at once. It
reads its input where it lay when it was captured, and computes a step of the shape that it was
captured with: smaller ones are padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.device_inputs import CapturedShape

Compute: TypeAlias = Callable[[], Tensor]


class Recorder(Protocol):
    """Captures what a device is told to compute."""

    def record(self, compute: Compute) -> Compute:
        """Return what computes the same anew, on the same memory, into the same tensor.

        Raises RuntimeError for what cannot be captured.
        """

    def num_bytes(self) -> int:
        """Memory of the device that recordings hold."""


class CudaRecorder:
    """Captures CUDA graphs, which share one pool of memory: they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    def record(self, compute: Compute) -> Compute:
        """As Recorder. What is done once, compiling kernels above all, is done before the capture,
        in which it would fail."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        # Other threads of this process may use the device meanwhile, to read an adapter for one.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = compute()

        def replay() -> Tensor:
            graph.replay()  # type: ignore[no-untyped-call]
            return output

        return replay

    def num_bytes(self) -> int:
        """As Recorder."""
        torch.cuda.synchronize(self._device)
        return max(0, self._free_bytes - torch.cuda.mem_get_info(self._device)[0])


@dataclass(frozen=True, slots=True)
class _Captured:
    replay: Compute
    addresses: tuple[int, ...]  # where its input lies


class GraphedModel:
    """A model that computes steps of captured shapes by their graphs, and all others as it is."""

    def __init__(
        self, model: Any, recorder: Recorder, *, max_rows: int, device: torch.device
    ) -> None:
        """model: a Model of `models`; its further methods are had from this as well. max_rows: of
        logits of a captured step."""
        self._model = model
        # One memory for the logits of all graphs, whose own would add up: they are read before the
        # next step's are computed.
        model.logits_memory = torch.empty(max_rows, model.config.vocab_size, device=device)
        self._recorder = recorder
        self._captured: dict[CapturedShape, _Captured] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, batch: ForwardBatch, kv_cache: Any) -> Tensor:
        """As Model. The logits of a captured step are overwritten by the next."""
        if not batch.are_bounds:
            return self._model(batch, kv_cache)  # type: ignore[no-any-return]
        captured = self._captured[_shape_of(batch)]
        assert captured.addresses == _addresses(batch), "the input of a graph has moved"
        return captured.replay()

    def capture(self, batch: ForwardBatch, kv_cache: Any) -> None:
        """Capture the step of a batch, whose input will lie where it lies now.

        Raises RuntimeError for a step that cannot be captured.
        """
        with torch.inference_mode():
            replay = self._recorder.record(lambda: self._model(batch, kv_cache))
        self._captured[_shape_of(batch)] = _Captured(replay, _addresses(batch))

    def num_bytes(self) -> int:
        """Memory that the graphs hold."""
        return self._recorder.num_bytes()


def _shape_of(batch: ForwardBatch) -> CapturedShape:
    return CapturedShape(len(batch.token_ids), batch.query_lengths[0])


def _addresses(batch: ForwardBatch) -> tuple[int, ...]:
    assert batch.lengths is not None
    tensors = (
        batch.token_ids,
        batch.positions,
        batch.slots,
        batch.block_tables,
        batch.logits_rows,
        batch.lengths.query_starts,
        batch.lengths.contexts,
    )
    return tuple(tensor.data_ptr() for tensor in tensors)
