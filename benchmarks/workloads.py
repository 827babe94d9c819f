"""The six workloads: what is asked, how much of it and how many requests at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.prompts import PromptSource


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy completion of exactly `output_tokens` tokens, the end of sequence ignored."""

    prompt_token_ids: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests sent in order, `concurrency` of them open at any time (a closed loop)."""

    name: str
    concurrency: int
    requests: tuple[Request, ...]

    @property
    def output_tokens(self) -> int:
        """Tokens that all requests together must give."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that all prompts together have."""
        return sum(len(request.prompt_token_ids) for request in self.requests)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a workload looks like before it has text. Ranges include both ends."""

    name: str
    title: str
    num_requests: int
    concurrency: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    shared_prefix_tokens: int = 0


SHAPES = (
    Shape("W1", "one at a time: prompt 128, output 128", 4, 1, (128, 128), (128, 128)),
    Shape("W2", "concurrency 8: prompts 64–256, outputs 64–128", 32, 8, (64, 256), (64, 128)),
    Shape("W3", "concurrency 32: prompts 64–256, outputs 64–128", 96, 32, (64, 256), (64, 128)),
    Shape(
        "W4",
        "shared prefix, concurrency 16: 1,024 common + 32 own tokens, output 32",
        64,
        16,
        (32, 32),
        (32, 32),
        shared_prefix_tokens=1024,
    ),
    Shape("W5", "one long prompt: 4,096 tokens, output 16", 1, 1, (4096, 4096), (16, 16)),
    Shape("W6", "64 at once: prompt 32, output 16", 64, 64, (32, 32), (16, 16)),
)


def make_workload(shape: Shape, source: PromptSource, seed: int) -> Workload:
    """Gives a shape its text. The same source state and seed give the same workload."""
    # Lengths only: nobody can gain anything by guessing them.
    lengths = random.Random(f"{shape.name} {seed}")
    prefix = source.take(shape.shared_prefix_tokens) if shape.shared_prefix_tokens else ()
    requests = tuple(
        Request(
            prefix + source.take(lengths.randint(*shape.prompt_tokens)),
            lengths.randint(*shape.output_tokens),
        )
        for _ in range(shape.num_requests)
    )
    return Workload(shape.name, shape.concurrency, requests)


def make_rounds(
    shapes: Sequence[Shape], source: PromptSource, rounds: int, seed: int
) -> list[list[Workload]]:
    """The workloads of each round, every prompt of the whole run different.

    A round repeats the lengths of the one before and none of its text, so that a server that keeps
    what it has computed gains from W4's prefix and from nothing else.
    """
    return [[make_workload(shape, source, seed) for shape in shapes] for _ in range(rounds)]
