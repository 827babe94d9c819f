"""All text of a measurement, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.prompts import PromptSource, english_token_ids
from benchmarks.workloads import Request, Shape, Workload, make_rounds

WARM_UP_REQUESTS = 9  # one to start with, then eight at once
WARM_UP_PROMPT_TOKENS = 48
WARM_UP_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    `rounds` holds the workloads of each round. `warm_ups` holds, for each round, requests with text
    of their own: the first is the one whose first token tells that a system has started, the others
    are sent all at once before anything counts.
    """

    rounds: Sequence[Sequence[Workload]]
    warm_ups: Sequence[Sequence[Request]]


def make_plan(model: str, shapes: Sequence[Shape], rounds: int, seed: int) -> Plan:
    """Draws everything from one source, so that nothing occurs twice."""
    source = PromptSource(english_token_ids(model), seed)
    workloads = make_rounds(shapes, source, rounds, seed)
    warm_ups = [
        [
            Request(source.take(WARM_UP_PROMPT_TOKENS), WARM_UP_OUTPUT_TOKENS)
            for _ in range(WARM_UP_REQUESTS)
        ]
        for _ in range(rounds)
    ]
    return Plan(workloads, warm_ups)
