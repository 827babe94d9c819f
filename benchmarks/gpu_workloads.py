"""Runs an engine core in this process: what sequences it is given, and what they took."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_synthetic import opener, tiny, write_config
from services.engine.core.engine import EngineCore
from services.engine.core.messages import (
    FinishReason,
    ModelFacts,
    Sampling,
    SequenceRequest,
    Step,
    Stopping,
)
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine


@dataclass(slots=True)
class Loaded:
    """An engine that is ready, and what its model takes. It is gone once it is closed, whoever
    still holds this."""

    engine: EngineCore | None
    facts: ModelFacts
    weight_bytes: int
    kv_bytes_per_token: float
    vocab_size: int

    @property
    def core(self) -> EngineCore:
        """The engine, while it is there."""
        assert self.engine is not None
        return self.engine

    def close(self) -> None:
        """Free what the engine holds: the next one needs the card's memory."""
        self.engine = None

    def decode_bytes(self, sequences: int, context: float) -> float:
        """What a step must read that decodes so many sequences: weights once, and their cache."""
        return self.weight_bytes + sequences * context * self.kv_bytes_per_token


@contextmanager
def engine(
    bench: Bench, config: dict[str, Any], *, unread_bytes: int = 0, **settings: Any
) -> Iterator[Loaded]:
    """An engine of a synthetic model, gone again afterwards.

    unread_bytes: of the weights that no decode reads, such as the rows of an embedding.
    """
    directory = write_config(tiny(config) if bench.tiny else config, bench.into / "model")
    chosen = {
        "device": str(bench.device),
        "dtype": "bfloat16",
        "cpu_kernels": "off",
        "prefix_cache": False,
        "speculation": "off",
        "max_adapters": 0,
        "max_waiting_tokens": 1 << 24,
        "step_latency_target_ms": 1e6,
    }
    if bench.device.type == "cpu":
        chosen["kv_cache_memory_bytes"] = 8 << 20
    # Converted, so that a format which there is not is refused and not passed over.
    asked = {"model_path": str(directory)} | chosen | settings
    core_settings = msgspec.convert(asked, CoreSettings)
    _release(bench.device)  # where the one before failed, its error has held what it was at
    before = _allocated(bench.device)
    built, facts = build_engine(core_settings, open_model=opener(bench.device))
    assert isinstance(built, EngineCore)
    held = _allocated(bench.device) - before - facts.kv_cache_memory_bytes
    weights = facts.memory.get("weights", held) or 2 * facts.num_parameters
    kv = facts.kv_cache_memory_bytes / (facts.num_blocks * facts.block_size)
    unread = 0 if bench.tiny else unread_bytes
    loaded = Loaded(built, facts, max(0, weights - unread), kv, facts.vocab_size)
    try:
        yield loaded
    finally:
        loaded.close()
        del built
        _release(bench.device)


def _release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass(slots=True)
class Timeline:
    """What an engine did, step by step.

    Attributes:
        steps: (seconds since the start when it ended, tokens that it brought, sequences in it).
        tokens: by sequence, when each of its tokens was there.
        joined_s: when those that came later were sent.
    """

    started: float
    joined_s: float = 0.0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    tokens: dict[int, list[float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the first sequence to the last token."""
        return self.steps[-1][0]

    @property
    def num_tokens(self) -> int:
        """Generated, over all sequences."""
        return sum(count for _, count, _ in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Generated, from the first sequence to the last token."""
        return self.num_tokens / self.seconds

    def step_s(self, sequences: int, skip: int = 4) -> float:
        """The median time of steps that brought one token to each of so many sequences."""
        times = [
            end - before
            for (before, _, _), (end, count, _) in zip(self.steps, self.steps[1:], strict=False)
            if count == sequences
        ]
        return statistics.median(times[skip:] or times or [float("nan")])

    def first_token_s(self, sequence_id: int) -> float:
        """How long a sequence waited for its first token."""
        return self.tokens[sequence_id][0]

    def longest_gap_s(self, sequence_ids: Sequence[int]) -> float:
        """The longest time between two tokens of a sequence, over some."""
        gaps = [
            after - before
            for sequence_id in sequence_ids
            for before, after in zip(
                self.tokens[sequence_id], self.tokens[sequence_id][1:], strict=False
            )
        ]
        return max(gaps, default=0.0)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Tokens without a pattern."""
    numbers = random.Random(seed)
    return [numbers.randrange(3, vocab_size) for _ in range(length)]


def request(sequence_id: int, tokens: list[int], output: int, **sampling: Any) -> SequenceRequest:
    """A sequence that generates exactly so many tokens."""
    chosen = {"temperature": 0.0} | sampling
    stopping = Stopping(max_tokens=output, ignore_eos=True)
    return SequenceRequest(sequence_id, tokens, Sampling(**chosen), stopping)


def run(
    bench: Bench,
    core: EngineCore,
    requests: Sequence[SequenceRequest],
    later: Sequence[SequenceRequest] = (),
    *,
    after_steps: int = 0,
) -> Timeline:
    """Run sequences to their ends; `later` ones join after so many steps of decodes.

    Raises RuntimeError for a sequence that fails, and when the part is out of time.
    """
    core.add(list(requests))
    timeline = Timeline(time.perf_counter())
    waiting = list(later)
    decodes = 0
    while core.has_work:
        step = core.step()
        now = time.perf_counter() - timeline.started
        count = 0
        for delta in step.deltas:
            count += len(delta.token_ids)
            timeline.tokens.setdefault(delta.sequence_id, []).extend([now] * len(delta.token_ids))
            finish = delta.finish
            if finish is not None and finish.reason is FinishReason.ERROR:
                raise RuntimeError(f"sequence {delta.sequence_id} failed: {finish.error}")
        timeline.steps.append((now, count, step.batch_size if isinstance(step, Step) else 0))
        decodes += count >= len(requests)
        if waiting and decodes >= after_steps:
            timeline.joined_s = now
            core.add(waiting)
            waiting = []
        if bench.left_s < -30:
            core.abort([each.sequence_id for each in (*requests, *later)])
            raise RuntimeError("the part is out of time")
    return timeline
