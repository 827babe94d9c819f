"""Sampling: exact distributions, repeatable seeds, and no row that disturbs another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from services.engine.core import sampler
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.kernels import registry, triton
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch

DRAWS = 40_000
Sample: TypeAlias = Callable[[Tensor, SamplingBatch], SampledTokens]


def sample_on(device: torch.device) -> Sample:
    """Sample as steps on a GPU do."""

    def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        there = DeviceSampler(device, *logits.shape, at_once=False)
        return there.launch(logits.to(device), batch).result()

    return sample


@pytest.fixture(
    scope="module", params=["cpu", "staged", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def sample(request: pytest.FixtureRequest) -> Sample:
    """sampler.sample, and what gives the same step by step: by the references of its ops on a CPU,
    by kernels on a GPU."""
    if request.param == "cpu":
        return sampler.sample
    if request.param == "gpu":
        triton.activate()
        registry.select("cuda")
        return sample_on(torch.device("cuda"))
    return sample_on(torch.device("cpu"))


def batch_of(
    rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    noise: np.ndarray | None = None,
    logprobs: int | list[int] = -1,
) -> SamplingBatch:
    def column(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (rows,)).copy()

    return SamplingBatch(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int64),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        uniforms=np.zeros(rows) if noise is None else noise,
        logprobs=column(logprobs, np.int64),
    )


def reference_probabilities(
    logits: np.ndarray, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """The distribution by its textbook definition, in float64, one filter after the other."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if top_k:
        probabilities[order[top_k:]] = 0
        probabilities /= probabilities.sum()
    if top_p < 1:
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += probabilities[token]
            if mass >= top_p:
                break
        mask = np.zeros(len(logits), bool)
        mask[kept] = True
        probabilities[~mask] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def chi_square_limit(degrees: int) -> float:
    """The 1 - 1e-6 quantile of the chi-square distribution (Wilson and Hilferty, 1931)."""
    z = 4.7534
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1e-6, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 1000, "top_p": 0.95, "min_p": 0.0},
    ],
    ids=str,
)
def test_samples_follow_the_exact_distribution(
    sample: Sample, parameters: dict[str, float]
) -> None:
    logits = np.random.default_rng(5).standard_normal(40).astype(np.float32) * 2
    expected = reference_probabilities(logits, **parameters)  # type: ignore[arg-type]
    noise = uniforms(np.full(DRAWS, stream_key(11, 0), np.uint64), np.arange(DRAWS, dtype=np.int64))
    drawn = sample(
        torch.from_numpy(logits).repeat(DRAWS, 1),
        batch_of(DRAWS, noise=noise, **parameters),  # type: ignore[arg-type]
    )
    counts = np.bincount(drawn.token_ids, minlength=40)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    if possible.sum() == 1:
        assert counts[possible].sum() == DRAWS
        return
    # Cells expected to be all but empty would make the statistic unreliable: count them as one.
    rare = possible & (expected * DRAWS < 10)
    usual = possible & ~rare
    observed = np.append(counts[usual], counts[rare].sum())
    wanted = np.append(expected[usual], expected[rare].sum()) * DRAWS
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert statistic < chi_square_limit(max(1, len(wanted) - 1))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([3, 600, 2000]),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    temperature=st.floats(0.1, 3),
    top_k=st.sampled_from([0, 1, 3, 550, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_only_tokens_of_the_filtered_set_are_drawn_and_all_of_them_can_be(
    sample: Sample,
    seed: int,
    vocab: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = np.random.default_rng(seed).standard_normal(vocab).astype(np.float32) * spread
    expected = reference_probabilities(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    draws = 64
    noise = (np.arange(draws) + 0.5) / draws
    drawn = sample(
        torch.from_numpy(logits).repeat(draws, 1),
        batch_of(
            draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, noise=noise
        ),
    ).token_ids
    # The inverse of the cumulative distribution, in the order of token ids. Float32 probabilities
    # may move a draw over a nearby edge, and a filter's edge by a token.
    cumulative = expected.cumsum()
    exact = np.searchsorted(cumulative, noise * cumulative[-1], side="right")
    neighbours = np.flatnonzero(expected > 0)
    near = np.searchsorted(neighbours, drawn) - np.searchsorted(neighbours, exact)
    assert np.abs(near).max() <= 1
    assert np.mean(np.asarray(drawn) == exact) > 0.9


def test_a_sample_does_not_depend_on_the_batch_around_it(sample: Sample) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((32, 1500)).astype(np.float32) * 3)
    temperature = rng.choice([0.0, 0.7, 1.4], 32)
    top_k = rng.choice([0, 4, 600], 32)
    top_p = rng.choice([1.0, 0.9, 0.99999], 32)
    min_p = rng.choice([0.0, 0.05], 32)
    noise = rng.random(32)
    together = sample(
        logits.clone(),
        batch_of(
            32,
            temperature=temperature.tolist(),
            top_k=top_k.tolist(),
            top_p=top_p.tolist(),
            min_p=min_p.tolist(),
            noise=noise,
        ),
    )
    for row in range(32):
        alone = sample(
            logits[row : row + 1].clone(),
            batch_of(
                1,
                temperature=float(temperature[row]),
                top_k=int(top_k[row]),
                top_p=float(top_p[row]),
                min_p=float(min_p[row]),
                noise=noise[row : row + 1],
            ),
        )
        assert alone.token_ids == [together.token_ids[row]]


def test_temperature_zero_is_the_likeliest_token_whatever_else_is_set(sample: Sample) -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    drawn = sample(
        logits.clone(), batch_of(6, temperature=0.0, top_k=3, top_p=0.5, noise=np.full(6, 0.99))
    )
    assert drawn.token_ids == logits.argmax(dim=-1).tolist()


def test_rows_that_are_not_finite_fail_alone(sample: Sample) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    clean = sample(logits.clone(), batch_of(6, temperature=[0, 1, 0, 1, 0, 1], top_p=0.9))
    broken = logits.clone()
    broken[1, 7] = torch.nan
    broken[2, 0] = torch.inf
    broken[3] = -torch.inf
    drawn: SampledTokens = sample(broken, batch_of(6, temperature=[0, 1, 0, 1, 0, 1], top_p=0.9))
    assert [isinstance(error, LogitsError) for error in drawn.errors] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    for row in (0, 4, 5):
        assert drawn.token_ids[row] == clean.token_ids[row]


def test_minus_infinity_is_a_token_that_is_never_drawn(sample: Sample) -> None:
    logits = torch.zeros(1000, 4)
    logits[:, 2] = -torch.inf
    noise = (np.arange(1000) + 0.5) / 1000
    assert set(sample(logits, batch_of(1000, noise=noise)).token_ids) == {0, 1, 3}


def test_log_probabilities_are_those_of_the_model_before_any_filter(sample: Sample) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    expected = logits.double().log_softmax(dim=-1)
    drawn = sample(
        logits.clone(),
        batch_of(3, temperature=0.3, top_k=2, noise=np.full(3, 0.9), logprobs=[-1, 0, 5]),
    )
    assert drawn.logprobs[0] is None
    for row, count in ((1, 0), (2, 5)):
        entry = drawn.logprobs[row]
        assert entry is not None
        assert entry.logprob == pytest.approx(float(expected[row, drawn.token_ids[row]]), abs=1e-5)
        top = expected[row].topk(count)
        assert entry.top_token_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 127), position=st.integers(0, 2**31))
def test_noise_is_a_function_of_seed_choice_and_position(
    seed: int, index: int, position: int
) -> None:
    key = stream_key(seed, index)
    assert 0 <= key < 2**64
    together = uniforms(np.full(3, key, np.uint64), np.arange(position, position + 3))
    alone = uniforms(np.array([key], np.uint64), np.array([position + 1]))
    assert together[1] == alone[0]
    assert (together >= 0).all()
    assert (together < 1).all()
    assert len(set(together.tolist())) == 3


def test_noise_is_uniform_across_positions_seeds_and_choices() -> None:
    streams = {
        "positions": uniforms(np.full(DRAWS, stream_key(0, 0), np.uint64), np.arange(DRAWS)),
        "seeds": uniforms(
            np.array([stream_key(seed, 0) for seed in range(DRAWS // 10)], np.uint64),
            np.zeros(DRAWS // 10, np.int64),
        ),
        "choices": uniforms(
            np.array([stream_key(1, index) for index in range(DRAWS // 10)], np.uint64),
            np.zeros(DRAWS // 10, np.int64),
        ),
    }
    for name, values in streams.items():
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        wanted = len(values) / 50
        assert ((counts - wanted) ** 2 / wanted).sum() < chi_square_limit(49), name
