"""Where steps are launched ahead, drafts give that up: they are made where they bring more."""

from __future__ import annotations

import random

import pytest

from services.engine.core.sequence import Sequence
from services.engine.core.speculation.speculator import NgramSpeculator, Speculator
from tests.fakes.emulated_device import tokens_per_second

VOCAB_SIZE = 64  # of the engine's limits, which bound prompts
SEGMENT = 40


class AlwaysAwaiting(NgramSpeculator):
    """Drafts whenever there is something to follow, whatever the device idles for that."""

    def awaits(self, sequences: list[Sequence]) -> bool:
        return True


def prompt_and_text(
    rng: random.Random, quoted: float, right: float, num_tokens: int
) -> tuple[list[int], list[int]]:
    """A prompt of no pattern, and what is said: of segments that quote it, for this share of them,
    a token being as in the prompt with that probability; and of tokens seen nowhere before."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(100)]
    fresh = iter(range(1000, 1000 + 2 * num_tokens))
    text: list[int] = []
    while len(text) < num_tokens:
        begin = rng.randrange(len(prompt) - SEGMENT)
        share = right if rng.random() < quoted else 0.0
        text += [
            token if rng.random() < share else next(fresh)
            for token in prompt[begin : begin + SEGMENT]
        ]
    return prompt, text[:num_tokens]


def rates(
    batch_size: int, quoted: float, right: float, *, host_ms: float = 0.5
) -> tuple[float, float, float]:
    """Tokens per second without drafts, with all of them, and with those that pay, on a device
    whose steps take 1 ms up to 64 tokens."""
    rng = random.Random(1)
    pairs = [prompt_and_text(rng, quoted, right, 400) for _ in range(batch_size)]
    prompts, texts = [prompt for prompt, _ in pairs], [text for _, text in pairs]

    def rate(speculator: Speculator | None) -> float:
        return tokens_per_second(
            prompts,
            texts,
            speculator,
            step_ms=lambda num_tokens: max(1.0, 0.5 + num_tokens / 128),
            host_ms=host_ms,
        )

    return rate(None), rate(AlwaysAwaiting()), rate(NgramSpeculator())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_where_nothing_repeats_steps_are_launched_ahead_as_if_nothing_could_be_drafted(
    batch_size: int,
) -> None:
    without, always, paying = rates(batch_size, quoted=0.0, right=1.0)
    assert paying > 0.98 * without > 1.3 * always


@pytest.mark.parametrize("batch_size", [1, 8])
def test_where_all_is_quoted_each_step_awaits_the_one_before_it(batch_size: int) -> None:
    without, always, paying = rates(batch_size, quoted=1.0, right=1.0)
    assert paying > 0.97 * always > 4 * without


def test_a_text_that_quotes_now_and_then_has_the_better_of_both() -> None:
    without, always, paying = rates(1, quoted=0.3, right=0.95)
    assert paying > 1.1 * max(without, always)


@pytest.mark.parametrize("right", [0.5, 0.8])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_drafts_that_are_often_wrong_cost_little(batch_size: int, right: float) -> None:
    without, always, paying = rates(batch_size, quoted=1.0, right=right)
    assert paying > 0.94 * max(without, always)


def test_a_host_that_takes_no_time_is_no_reason_against_drafts() -> None:
    without, always, paying = rates(1, quoted=0.5, right=0.9, host_ms=0.01)
    assert paying > 0.98 * always > without
