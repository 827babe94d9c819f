"""What a way of keeping weights costs in perplexity, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.loader import OpenedModel
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.engine.core.processors import default_threads

BLOCK_SIZE = 16
_PROMPTS = 3
_MOST_DECODED_TOKENS = 32

Step = Callable[[ForwardBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one sequence alone, by the fastest window and step: what others do on the machine slows
    the rest."""

    prompt_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one way of keeping weights: bytes in memory by format, and what it computes how fast."""

    weight_bytes: dict[str, int]
    perplexity: float
    speed: Speed

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.weight_bytes.values())


def measure(
    opened: OpenedModel, weights: WeightChoice, windows: Sequence[Sequence[int]]
) -> Measured:
    """Load a model as an engine on this CPU does and measure it on windows of tokens.

    Its checkpoint is closed. Raises UnsupportedModelError where the native kernels do not serve the
    model and plain torch would have to expand what is asked for.
    """
    step, sizes = _loaded(opened, weights, len(windows[0]))
    return Measured(sizes, perplexity(step, windows), _speed(step, windows[0]))


def measure_speed(opened: OpenedModel, weights: WeightChoice, window: Sequence[int]) -> Speed:
    """The speed alone, as `measure` has it; the checkpoint is closed."""
    step, _ = _loaded(opened, weights, len(window))
    return _speed(step, window)


def measure_perplexity(
    opened: OpenedModel, windows: Sequence[Sequence[int]], weights: WeightChoice = "auto"
) -> float:
    """The perplexity alone, as `measure` has it; the checkpoint is closed."""
    step, _ = _loaded(opened, weights, len(windows[0]))
    return perplexity(step, windows)


def _loaded(opened: OpenedModel, weights: WeightChoice, window: int) -> tuple[Step, dict[str, int]]:
    """What computes windows, and its weights' bytes by format."""
    library = cpu.active()
    with closing(opened.checkpoint):
        try:
            if library is None:
                raise UnsupportedModelError(str(cpu.why_not()))
            team = Team(library, default_threads())
            native = NativeModel(opened.skeleton, opened.checkpoint, team, weights)
            return native_step(native, KvFormat.BF16, window), native.weight_bytes
        except UnsupportedModelError:
            if weights in ("int8", "int4"):
                raise
            step = torch_step(opened, window)
            elements = sum(each.numel() for each in opened.skeleton.parameters())
            return step, {"float32": 4 * elements}


def torch_step(opened: OpenedModel, window: int) -> Step:
    """Return what computes the logits of a window in float32, with the weights as stored."""
    config = opened.config
    model = opened.load(torch.float32, "cpu")
    shape = (config.num_layers, window // BLOCK_SIZE, BLOCK_SIZE, config.kv_heads, config.head_dim)
    cache = KVCache(*shape, torch.float32, "cpu")
    return lambda batch: model(batch, cache)


def native_step(model: NativeModel, kv_format: KvFormat, window: int) -> Step:
    """Return what computes the logits of a window on the native kernels."""
    config = model.config
    shape = (config.num_layers, window // BLOCK_SIZE, BLOCK_SIZE, config.kv_heads, config.head_dim)
    cache = PackedKVCache(*shape, kv_format)
    model.bind(cache, max_batch_tokens=window)
    return lambda batch: model(batch, cache)


def perplexity(step: Step, windows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of windows of tokens, each computed from an empty context."""
    losses = []
    for window in windows:
        ids = torch.tensor(window)
        logits = step(_batch(ids, start=0))
        losses.append(functional.cross_entropy(logits[:-1], ids[1:]).item())
    # Infinite where that is too much for a number.
    return float(torch.tensor(sum(losses) / len(losses), dtype=torch.float64).exp())


def _speed(step: Step, window: Sequence[int]) -> Speed:
    whole = _Timed(step)
    for _ in range(_PROMPTS):
        whole(_batch(torch.tensor(window), start=0))
    first = len(window) - min(_MOST_DECODED_TOKENS, len(window) // 2)
    step(_batch(torch.tensor(window[:first]), start=0))
    single = _Timed(step)
    for at in range(first, len(window)):
        single(_batch(torch.tensor(window[at : at + 1]), start=at))
    return Speed(len(window) / min(whole.times_s), 1 / min(single.times_s))


class _Timed:
    """Calls a step and notes how long each took."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.times_s: list[float] = []

    def __call__(self, batch: ForwardBatch) -> Tensor:
        started_s = time.perf_counter()
        logits = self._step(batch)
        self.times_s.append(time.perf_counter() - started_s)
        return logits


def _batch(ids: Tensor, *, start: int) -> ForwardBatch:
    """One sequence's tokens from position `start` on, in the first blocks of a cache."""
    places = torch.arange(start, start + len(ids))
    blocks = -(-(start + len(ids)) // BLOCK_SIZE)
    return ForwardBatch(
        token_ids=ids,
        positions=places,
        slots=places,
        block_tables=torch.arange(blocks, dtype=torch.int32).view(1, -1),
        query_lengths=(len(ids),),
        context_lengths=(start + len(ids),),
        logits_rows=torch.arange(len(ids)),
    )
