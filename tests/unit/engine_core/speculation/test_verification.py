"""A draft stands as far as it is what was sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from services.engine.core.messages import TokenLogprobs
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.plan import SequenceOutput
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, sample
from services.engine.core.speculation.verification import verify


def sampled(*token_ids: int, broken: int | None = None) -> SampledTokens:
    """Rows 1 onwards are the sequence's; row 0 is another's, and broken."""
    errors: list[LogitsError | None] = [LogitsError("other")] + [None] * len(token_ids)
    if broken is not None:
        errors[broken + 1] = LogitsError("broken")
    logprobs = [TokenLogprobs(-float(token)) for token in (0, *token_ids)]
    return SampledTokens([0, *token_ids], list(logprobs), errors)


def test_tokens_up_to_the_first_that_differs_are_taken_and_the_sampled_one_in_its_place() -> None:
    output = verify((4, 5, 6), sampled(4, 5, 9, 7), 1)
    assert output.token_ids == (4, 5, 9)
    assert output.num_accepted == 2
    assert [entry.logprob for entry in output.logprobs] == [-4.0, -5.0, -9.0]


def test_a_draft_that_is_right_throughout_brings_one_token_more() -> None:
    output = verify((4, 5), sampled(4, 5, 6), 1)
    assert (output.token_ids, output.num_accepted) == ((4, 5, 6), 2)


def test_a_draft_that_is_wrong_at_once_costs_nothing_but_its_computation() -> None:
    output = verify((4, 5), sampled(1, 5, 6), 1)
    assert (output.token_ids, output.num_accepted) == ((1,), 0)


def test_broken_logits_fail_the_sequence_only_once_they_come_first() -> None:
    late = verify((4, 5), sampled(4, 5, 6, broken=1), 1)
    assert (late.token_ids, late.error) == ((4,), None)
    first = verify((4, 5), sampled(4, 5, 6, broken=0), 1)
    assert isinstance(first, SequenceOutput)
    assert isinstance(first.error, LogitsError)
    beyond = verify((4, 5), sampled(4, 9, 6, broken=2), 1)
    assert (beyond.token_ids, beyond.error) == ((4, 9), None)


VOCAB, SEEDS = 12, 20_000
TEMPERATURE, TOP_P = 0.8, 0.9


def filtered(logits: np.ndarray) -> np.ndarray:
    """The distribution after temperature and top-p, by its definition."""
    weights = np.exp(logits.astype(np.float64) / TEMPERATURE)
    weights /= weights.sum()
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= TOP_P]] = 0
    return np.asarray(weights / weights.sum())


def assert_drawn_from(token_ids: list[int], probabilities: np.ndarray) -> None:
    counts = np.bincount(token_ids, minlength=VOCAB)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    wanted = probabilities[possible] * len(token_ids)
    assert wanted.min() > 10
    statistic = float(((counts[possible] - wanted) ** 2 / wanted).sum())
    # The 1 - 1e-6 quantile of the chi-square distribution (Wilson and Hilferty, 1931).
    degrees = int(possible.sum()) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 4.7534 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


@pytest.mark.parametrize("rank", [0, 2, VOCAB - 1])
def test_what_is_emitted_has_the_target_s_distribution_whatever_is_drafted(rank: int) -> None:
    rng = np.random.default_rng(3)
    # After the known tokens, and after each token that may come first.
    first = rng.standard_normal(VOCAB).astype(np.float32)
    after = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    drafted = int(np.argsort(-first)[rank])
    emitted: list[tuple[int, ...]] = []
    for seed in range(0, SEEDS, 1000):
        keys = np.array([stream_key(each, 0) for each in range(seed, seed + 1000)], np.uint64)
        rows = np.stack((first, after[drafted]))[None].repeat(1000, 0).reshape(-1, VOCAB)
        tokens = sample(
            torch.from_numpy(rows),
            SamplingBatch(
                temperature=np.full(2000, TEMPERATURE, np.float32),
                top_k=np.zeros(2000, np.int64),
                top_p=np.full(2000, TOP_P, np.float32),
                min_p=np.zeros(2000, np.float32),
                uniforms=uniforms(keys.repeat(2), np.tile(np.arange(2), 1000)),
                logprobs=np.full(2000, -1, np.int64),
            ),
        )
        emitted += [verify((drafted,), tokens, 2 * each).token_ids for each in range(1000)]
    assert_drawn_from([token_ids[0] for token_ids in emitted], filtered(first))
    accepted = [token_ids[1] for token_ids in emitted if token_ids[0] == drafted]
    assert all(len(token_ids) == 1 + (token_ids[0] == drafted) for token_ids in emitted)
    # The probability of acceptance is what the target gives the draft.
    assert len(accepted) / SEEDS == pytest.approx(filtered(first)[drafted], abs=0.015)
    if accepted:
        assert_drawn_from(accepted, filtered(after[drafted]))
