"""Steps of a model as CUDA graphs: captured at start-up, replayed in one call.

Of a step that decodes, a GPU computes hundreds of kernels of a few microseconds each; launched one
by one they keep the host busy for longer than the device. A graph launches all of them at once. It
reads its input where it lay when it was captured, and computes a step of the shape that it was
captured with: smaller ones are padded. Of steps that prefill, layers are captured in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.graph_pieces import BreakMemory, ComputePieces, LayerPieces, Replay
from services.engine.core.kernels.sampling import SamplingForm

Compute: TypeAlias = Callable[[], Tensor]


class Recorder(Protocol):
    """Captures what a device is told to compute."""

    def record(self, compute: Compute) -> Compute:
        """Return what computes the same anew, on the same memory, into the same tensor.

        Raises RuntimeError for what cannot be captured.
        """

    def record_pieces(self, compute: ComputePieces) -> tuple[list[Replay], Tensor]:
        """As PieceRecorder."""

    def num_bytes(self) -> int:
        """Memory of the device that recordings hold."""


class CudaRecorder:
    """Captures CUDA graphs, which share one pool of memory: they never run side by side."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    def record(self, compute: Compute) -> Compute:
        """As Recorder. What is done once, compiling kernels above all, is done before the capture,
        in which it would fail."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile, to read an adapter for one.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = compute()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def record_pieces(self, compute: ComputePieces) -> tuple[list[Replay], Tensor]:
        """As PieceRecorder."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute(lambda: None)
        torch.cuda.synchronize(self._device)
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

        def cut() -> None:
            graphs[-1].capture_end()
            begin()

        with torch.cuda.stream(self._stream):
            begin()
            try:
                output = compute(cut)
            finally:
                graphs[-1].capture_end()
        return [graph.replay for graph in graphs], output

    def num_bytes(self) -> int:
        """As Recorder."""
        torch.cuda.synchronize(self._device)
        return max(0, self._free_bytes - torch.cuda.mem_get_info(self._device)[0])


@runtime_checkable
class CapturingModel(Protocol):
    """A model that can capture steps; those that are, it computes by their graphs."""

    def __call__(self, batch: ForwardBatch, kv_cache: Any, /) -> Tensor:
        """As `runner.Model`. The logits of a captured step are overwritten by the next."""
        ...

    def capture(self, batch: ForwardBatch, kv_cache: Any) -> None:
        """Capture the step of a batch, whose input will lie where it lies now.

        Raises RuntimeError for a step that cannot be captured.
        """

    def num_bytes(self) -> int:
        """Memory that graphs hold of a device."""


@dataclass(frozen=True, slots=True)
class CapturedChoice:
    """What a graph does beside computing logits, so that a step is nothing but its replay.

    Attributes:
        form: in which tokens are chosen.
        take_in: brings the step's input up to date, first of all.
        choose: chooses the tokens of logits, last.
    """

    form: SamplingForm
    take_in: Callable[[], None]
    choose: Callable[[Tensor, SamplingForm], None]


@dataclass(frozen=True, slots=True)
class _Captured:
    logits: Callable[[ForwardBatch, Any], Tensor]
    addresses: tuple[int, ...]  # where its input lies


class GraphedModel:
    """A model that computes steps of captured shapes by their graphs, and all others as it is."""

    def __init__(
        self,
        model: Any,
        recorder: Recorder,
        shapes: Sequence[CapturedShape],
        *,
        device: torch.device,
    ) -> None:
        """model: a Model of `models`; its further methods are had from this as well. shapes: those
        that may be captured."""
        self._model = model
        self._recorder = recorder
        self._captured: dict[tuple[CapturedShape, SamplingForm | None], _Captured] = {}
        wholes = [each.num_tokens for each in shapes if each.max_query_length is not None]
        if wholes:
            # One memory for the logits of all graphs, whose own would add up: they are read before
            # the next step's are computed.
            rows = max(wholes)
            model.logits_memory = torch.empty(rows, model.config.vocab_size, device=device)
        self._breaks = BreakMemory(max((each.num_tokens for each in shapes), default=0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self, batch: ForwardBatch, kv_cache: Any, form: SamplingForm | None = None
    ) -> Tensor:
        """As CapturingModel.

        form: in which tokens are chosen by the same graph, that was captured so.
        """
        if batch.captured is None:
            return self._model(batch, kv_cache)  # type: ignore[no-any-return]
        captured = self._captured[batch.captured, form]
        assert captured.addresses == _addresses(batch), "the input of a graph has moved"
        return captured.logits(batch, kv_cache)

    def capture(
        self,
        batch: ForwardBatch,
        kv_cache: Any,
        choice: CapturedChoice | None = None,
    ) -> None:
        """As CapturingModel.

        choice: what else the graph does; None: logits are all.
        """
        assert batch.captured is not None
        logits: Callable[[ForwardBatch, Any], Tensor]
        with torch.inference_mode():
            if batch.captured.max_query_length is None:
                pieces = LayerPieces(self._model, self._recorder, self._breaks, batch, kv_cache)
                logits = pieces.logits
            else:

                def compute() -> Tensor:
                    if choice is not None:
                        choice.take_in()
                    computed: Tensor = self._model(batch, kv_cache)
                    if choice is not None:
                        choice.choose(computed, choice.form)
                    return computed

                logits = _ignoring(self._recorder.record(compute))
        form = None if choice is None else choice.form
        self._captured[batch.captured, form] = _Captured(logits, _addresses(batch))

    def forget(self, shape: CapturedShape) -> None:
        """Forget the graph of a shape that chooses nothing, if there is one."""
        self._captured.pop((shape, None), None)

    def num_bytes(self) -> int:
        """As CapturingModel."""
        return self._recorder.num_bytes()


def _ignoring(replay: Compute) -> Callable[[ForwardBatch, Any], Tensor]:
    return lambda batch, kv_cache: replay()


def _addresses(batch: ForwardBatch) -> tuple[int, ...]:
    """Where a step's input lies that graphs read."""
    tensors = [batch.token_ids, batch.positions, batch.slots]
    if batch.token_adapters is not None:
        tensors.append(batch.token_adapters)
    if batch.are_bounds:
        assert batch.lengths is not None
        tensors += [batch.block_tables, batch.logits_rows]
        tensors += [batch.lengths.query_starts, batch.lengths.contexts]
    return tuple(tensor.data_ptr() for tensor in tensors)
