"""What a way of keeping weights costs in perplexity, and how fast it is."""

from __future__ import annotations

import math
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
from services.engine.core.models.native import NativeModel, WeightChoice
from services.engine.core.processors import default_threads

BLOCK_SIZE = 16
_MOST_DECODED_TOKENS = 32

Step = Callable[[ForwardBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one way of keeping weights: bytes in memory by format, and what it computes how fast.

    Speeds are those of the fastest window and step: what others do on the machine slows the rest.
    """

    weight_bytes: dict[str, int]
    perplexity: float
    prompt_tokens_per_s: float
    decode_tokens_per_s: float  # of one sequence

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
    window = len(windows[0])
    step, sizes = _loaded(opened, weights, window)
    timed = _Timed(step)
    found = perplexity(timed, windows)
    return Measured(
        sizes,
        found,
        window / min(timed.times_s),
        1 / _decode_step_s(step, list(windows[0])),
    )


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
    return math.exp(sum(losses) / len(losses))


def _decode_step_s(step: Step, window: list[int]) -> float:
    """Seconds that a token takes which follows others."""
    first = len(window) - min(_MOST_DECODED_TOKENS, len(window) // 2)
    step(_batch(torch.tensor(window[:first]), start=0))
    timed = _Timed(step)
    for at in range(first, len(window)):
        timed(_batch(torch.tensor(window[at : at + 1]), start=at))
    return min(timed.times_s)


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
