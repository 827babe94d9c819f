"""Native sampling: the choice that the definition makes, on every instruction set."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from services.engine.core.kernels import select
from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.sampling import sample_natively, sample_with
from services.engine.core.logit_edits import LogitEdits, TokenMasks
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, sample
from services.engine.core.sequence import Sequence

# Around the sizes of a register, of a block, and of several.
VOCABULARIES = (1, 2, 15, 16, 17, 31, 255, 256, 257, 512, 700, 5000)


@functools.cache
def all_kernels() -> list[Library]:
    path = library.find_or_build()
    return [library.load(path, name) for name in library.isa_names(path)]


def batch_of(
    rows: int,
    *,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    uniforms: float | np.ndarray = 0.5,
    logprobs: int | list[int] = -1,
    edits: LogitEdits | None = None,
    masks: TokenMasks | None = None,
) -> SamplingBatch:
    def column(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), (rows,)).copy()

    return SamplingBatch(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int64),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        uniforms=column(uniforms, np.float64),
        logprobs=column(logprobs, np.int64),
        edits=edits,
        masks=masks,
    )


def masks_of(vocab: int, allowed: dict[int, list[int]]) -> TokenMasks:
    bits = np.zeros((len(allowed), -(-vocab // 32) * 32), np.uint8)
    for index, token_ids in enumerate(allowed.values()):
        bits[index, token_ids] = 1
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    return TokenMasks(np.array(list(allowed)), words)


def edits_of(*rows: tuple[int, Sampling], min_tokens: int = 0) -> LogitEdits:
    edits = LogitEdits()
    for row, sampling in rows:
        stopping = Stopping(min_tokens=min_tokens)
        request = SequenceRequest(row, [1, 1, 4], sampling, stopping)
        sequence = Sequence(request, arrival=row, eos_token_ids=(3,), max_tokens=10, queued_ns=0)
        sequence.token_ids.extend([2, 2, 4])
        edits.add(row, sequence)
    return edits


def on_every_set(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """The tokens that the kernels choose; all instruction sets agree on them."""
    answers = [sample_with(kernels, logits.clone(), batch) for kernels in all_kernels()]
    for answer in answers[1:]:
        assert answer.token_ids == answers[0].token_ids
        assert [str(each) for each in answer.errors] == [str(each) for each in answers[0].errors]
    return answers[0]


def row_of(seed: int, vocab: int, shape: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator)
    if shape == "peaked":
        logits *= 6
    elif shape == "ties":
        logits = (logits * 2).round()
    elif shape == "equal":
        logits = torch.full((vocab,), 1.5)
    elif shape == "holes":
        logits[torch.rand(vocab, generator=generator) < 0.7] = -math.inf
        logits[seed % vocab] = 0.25
    elif shape == "far apart":
        logits *= 60
    return logits


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from(VOCABULARIES),
    shape=st.sampled_from(["flat", "peaked", "ties", "equal", "holes", "far apart"]),
    temperature=st.sampled_from([0.0, 0.05, 0.5, 0.7, 1.0, 2.0, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 20, 40, 600, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_the_choice_is_that_of_the_reference(
    seed: int,
    vocab: int,
    shape: str,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    draws = 16
    uniforms = np.random.default_rng(seed).random(draws)
    logits = row_of(seed, vocab, shape).repeat(draws, 1)
    options = {"temperature": temperature, "top_k": top_k, "min_p": min_p}
    chosen = on_every_set(logits, batch_of(draws, top_p=top_p, uniforms=uniforms, **options))
    assert chosen.errors == [None] * draws
    expected = sample.reference(
        logits.clone(), batch_of(draws, top_p=top_p, uniforms=uniforms, **options)
    )
    different = [row for row in range(draws) if chosen.token_ids[row] != expected.token_ids[row]]
    if not different:
        return
    # Where weights are rounded, a draw may fall beyond the edge between two tokens, or the last
    # token that top-p keeps: either way the reference agrees if it is moved by that much.
    nearby = [
        sample.reference(
            logits.clone(),
            batch_of(draws, top_p=np.float32(top_p * p), uniforms=uniforms + u, **options),
        ).token_ids
        for p in (1.0, 1 - 1e-5, min(1 + 1e-5, 1 / top_p))
        for u in (0.0, 1e-5, -1e-5)
    ]
    for row in different:
        assert chosen.token_ids[row] in [tokens[row] for tokens in nearby]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([5, 16, 17, 300, 1000]),
    penalties=st.tuples(
        st.sampled_from([1.0, 1.3, 0.5]), st.floats(-2, 2), st.sampled_from([0.0, -1.0, 0.7])
    ),
    biases=st.dictionaries(st.integers(0, 4), st.floats(-5, 5)),
    allowed=st.sampled_from([(), (0,), (0, 2, 3), (1, 1, 4)]),
    banned=st.sampled_from([(), (1,), (1, 4)]),
    min_tokens=st.sampled_from([0, 10]),
    masked=st.sampled_from([None, 0.1, 0.9]),
    temperature=st.sampled_from([0.0, 1.0]),
    logprobs=st.sampled_from([-1, 0, 2, 2000]),
)
def test_edits_and_log_probabilities_are_those_of_the_reference(
    seed: int,
    vocab: int,
    penalties: tuple[float, float, float],
    biases: dict[int, float],
    allowed: tuple[int, ...],
    banned: tuple[int, ...],
    min_tokens: int,
    masked: float | None,
    temperature: float,
    logprobs: int,
) -> None:
    sampling = Sampling(
        repetition_penalty=penalties[0],
        presence_penalty=penalties[1],
        frequency_penalty=penalties[2],
        logit_bias=biases,
        allowed_token_ids=allowed,
        banned_token_ids=banned,
    )
    logits = torch.stack([row_of(seed + row, vocab, "flat") for row in range(3)])
    edits = edits_of((0, sampling), (2, sampling), min_tokens=min_tokens)
    random = np.random.default_rng(seed)
    uniforms = random.random(3)
    masks = None
    if masked is not None:
        # The first and the last token, and of those between some.
        allowed = {
            row: [0, *np.flatnonzero(random.random(vocab) < masked).tolist(), vocab - 1]
            for row in (2, 0)
        }
        masks = masks_of(vocab, allowed)
    batch = batch_of(
        3,
        temperature=temperature,
        uniforms=uniforms,
        logprobs=[logprobs, -1, 1],
        edits=edits,
        masks=masks,
    )
    expected = sample.reference(logits.clone(), batch)
    for kernels in all_kernels():
        edited = logits.clone()
        chosen = sample_with(kernels, edited, batch)
        assert [str(each) for each in chosen.errors] == [str(each) for each in expected.errors]
        fine = [row for row in range(3) if chosen.errors[row] is None]
        assert 1 in fine
        reference = logits.clone()
        if masks is not None:
            masks.apply(reference)
        left = reference.log_softmax(dim=-1)
        edits.apply(reference)
        assert torch.equal(edited, reference)
        for row in fine:
            assert chosen.token_ids[row] == expected.token_ids[row]
            ours, theirs = chosen.logprobs[row], expected.logprobs[row]
            if ours is None or theirs is None:
                assert ours is theirs
                continue
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)
            # Rounding makes ties, whose order is nobody's promise.
            assert len(set(ours.top_token_ids)) == len(theirs.top_token_ids)
            own = left[row][ours.top_token_ids]
            assert own.tolist() == pytest.approx(ours.top_logprobs, abs=1e-5)


def test_the_first_of_the_likeliest_is_taken_wherever_it_stands() -> None:
    for vocab in VOCABULARIES:
        for peak in {0, vocab // 2, vocab - 1}:
            logits = torch.full((1, vocab), -1.0)
            logits[0, peak:] = 2.0
            assert on_every_set(logits, batch_of(1, temperature=0.0)).token_ids == [peak]


def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 2.0, 0.0]])
    draws = 200
    uniforms = (np.arange(draws) + 0.5) / draws
    for options, kept in (
        ({"top_k": 2}, {0, 2, 4}),
        ({"top_k": 4}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {0, 2, 4}),
        ({"top_p": 0.2}, {0}),
        ({"min_p": math.exp(-1.01)}, {0, 2, 4}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
    ):
        chosen = on_every_set(
            logits.repeat(draws, 1), batch_of(draws, uniforms=uniforms, **options)
        )
        assert set(chosen.token_ids) == kept, options


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing left"])
def test_a_row_that_cannot_be_sampled_fails_alone(bad: float | str, temperature: float) -> None:
    for vocab, at in ((1, 0), (40, 39), (1000, 0), (1000, 517), (1000, 999)):
        logits = torch.stack([row_of(row, vocab, "flat") for row in range(3)])
        whole = on_every_set(logits[[0, 2]], batch_of(2, temperature=temperature))
        if isinstance(bad, str):
            logits[1] = -math.inf
        else:
            logits[1, at] = bad
        options = {"temperature": temperature, "top_k": 5, "top_p": 0.9, "logprobs": 2}
        for more in ({}, options):
            chosen = on_every_set(logits, batch_of(3, **{"temperature": temperature} | more))
            assert isinstance(chosen.errors[1], LogitsError)
            assert chosen.errors[0] is None
            assert chosen.errors[2] is None
            assert chosen.logprobs[1] is None
            if not more:
                assert [chosen.token_ids[0], chosen.token_ids[2]] == whole.token_ids


def test_an_edit_of_an_unknown_token_fails_its_row_alone() -> None:
    logits = torch.stack([row_of(row, 20, "flat") for row in range(2)])
    for sampling in (
        Sampling(logit_bias={20: 1.0}),
        Sampling(logit_bias={-1: 1.0}),
        Sampling(allowed_token_ids=(3, 1 << 40)),
        Sampling(banned_token_ids=(20,)),
    ):
        chosen = on_every_set(logits, batch_of(2, edits=edits_of((1, sampling)), logprobs=1))
        assert chosen.errors[0] is None
        assert "does not have" in str(chosen.errors[1])


def test_one_token_left_is_the_one_chosen() -> None:
    logits = row_of(3, 600, "flat").repeat(5, 1)
    edits = edits_of(*((row, Sampling(allowed_token_ids=(577,))) for row in range(5)))
    uniforms = np.array([0.0, 0.1, 0.5, 0.999, 1 - 2.0**-52])
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"temperature": 0.0}):
        chosen = on_every_set(logits, batch_of(5, uniforms=uniforms, edits=edits, **options))
        assert chosen.token_ids == [577] * 5


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_masked_token_does_not_exist_for_its_row(vocab: int) -> None:
    kept = sorted({0, vocab // 2, vocab - 1})
    logits = row_of(5, vocab, "flat").repeat(3, 1)
    batch = batch_of(3, masks=masks_of(vocab, {1: kept}), logprobs=20, uniforms=0.7)
    expected = sample.reference(logits[1:2, kept].clone(), batch_of(1, logprobs=20, uniforms=0.7))
    for kernels in all_kernels():
        chosen = sample_with(kernels, logits.clone(), batch)
        assert chosen.token_ids[1] == kept[expected.token_ids[0]]
        ours, theirs = chosen.logprobs[1], expected.logprobs[0]
        assert ours is not None
        assert theirs is not None
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert ours.top_token_ids == [kept[index] for index in theirs.top_token_ids]
        free = sample_with(kernels, logits.clone(), batch_of(3, logprobs=20, uniforms=0.7))
        assert chosen.logprobs[0] == chosen.logprobs[2] == free.logprobs[0]


def test_a_mask_that_leaves_nothing_fails_its_row_alone() -> None:
    logits = row_of(5, 40, "flat").repeat(2, 1)
    for temperature in (0.0, 1.0):
        batch = batch_of(2, temperature=temperature, masks=masks_of(40, {0: []}))
        chosen = on_every_set(logits, batch)
        assert isinstance(chosen.errors[0], LogitsError)
        assert chosen.errors[1] is None
        assert isinstance(sample.reference(logits.clone(), batch).errors[0], LogitsError)


def test_a_given_token_is_reported_and_not_chosen() -> None:
    logits = torch.stack([row_of(row, 300, "peaked") for row in range(4)])
    columns = {"temperature": [0.0, 0.0, 1.0, 0.0], "logprobs": [2, -1, 1, 0]}
    known = replace(batch_of(4, **columns), given=np.array([299, -1, -1, 7]))
    chosen = on_every_set(logits, known)
    free = on_every_set(logits, batch_of(4, **columns))
    expected = sample.reference(logits.clone(), known)
    assert chosen.token_ids == [299, *free.token_ids[1:3], 7] == expected.token_ids
    own = logits.log_softmax(dim=-1)
    for answer in (chosen, expected):
        for row in (0, 3):
            entry, freely = answer.logprobs[row], free.logprobs[row]
            assert entry is not None
            assert freely is not None
            assert entry.logprob == pytest.approx(float(own[row, chosen.token_ids[row]]), abs=1e-5)
            assert entry.top_token_ids == freely.top_token_ids
    beyond = replace(known, given=np.array([300, -1, -1, -1]))
    assert "does not have" in str(on_every_set(logits, beyond).errors[0])


def test_extreme_temperatures_stay_in_their_limits() -> None:
    logits = torch.tensor([[1.0, 1.5, -3.0, 1.25, -math.inf]]).repeat(400, 1)
    uniforms = (np.arange(400) + 0.5) / 400
    cold = on_every_set(logits, batch_of(400, temperature=1e-42, uniforms=uniforms))
    assert set(cold.token_ids) == {1}
    hot = on_every_set(logits, batch_of(400, temperature=3e38, uniforms=uniforms, top_p=0.99))
    assert np.bincount(hot.token_ids).tolist() == [100] * 4


def test_draws_at_the_ends_choose_what_can_be_chosen() -> None:
    logits = torch.full((2, 600), -math.inf)
    logits[:, [40, 300, 599]] = torch.tensor([0.0, 1.0, -90.0])
    uniforms = np.array([0.0, 1 - 2.0**-52])
    chosen = on_every_set(logits, batch_of(2, uniforms=uniforms, min_p=1e-6))
    assert chosen.token_ids == [40, 300]


def test_a_row_does_not_depend_on_the_others() -> None:
    rows = 9
    logits = torch.stack([row_of(row, 3000, "peaked") for row in range(rows)])
    columns = {
        "temperature": [0.0, 0.7, 1.0] * 3,
        "top_k": [0, 0, 30, 0, 500, 0, 5, 0, 0],
        "top_p": [1.0, 0.9, 0.8, 0.95, 1.0, 1.0, 0.5, 0.9, 0.3],
        "logprobs": [-1, 3, -1, 0, 5, -1, -1, 2, -1],
    }
    uniforms = np.random.default_rng(1).random(rows)
    for kernels in all_kernels():
        whole = sample_with(kernels, logits.clone(), batch_of(rows, uniforms=uniforms, **columns))
        for row in range(rows):
            own = {name: values[row] for name, values in columns.items()}
            batch = batch_of(1, uniforms=uniforms[row], **own)
            alone = sample_with(kernels, logits[row : row + 1].clone(), batch)
            assert alone.token_ids == [whole.token_ids[row]]
            assert alone.logprobs == [whole.logprobs[row]]


def test_rows_may_lie_apart_in_memory() -> None:
    wide = torch.randn(4, 900, generator=torch.Generator().manual_seed(1))
    rows = wide[::2, 100:800]
    batch = batch_of(2, top_k=7, logprobs=3)
    assert on_every_set(rows, batch) == on_every_set(rows.contiguous(), batch)
    for kernels in all_kernels():
        before = wide.clone()
        sample_with(kernels, wide[::2, 100:800], batch_of(2, edits=edits_of((1, Sampling()))))
        assert torch.equal(wide, before)


def test_no_rows_are_no_tokens() -> None:
    assert on_every_set(torch.empty(0, 10), batch_of(0)) == SampledTokens([], [], [])


def test_an_engine_samples_natively_once_kernels_are_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_active", None)
    monkeypatch.setattr(library, "_reason", "switched off")
    chosen = {selection.op: selection for selection in select("cpu")}
    assert str(chosen["sample"]) == "sample: reference; native: switched off"
    library.activate()
    try:
        chosen = {selection.op: selection for selection in select("cpu")}
        assert chosen["sample"].implementation == "native"
        logits = row_of(1, 100, "flat").repeat(2, 1)
        batch = batch_of(2, top_p=0.9, uniforms=np.array([0.2, 0.8]))
        expected = sample.reference(logits.clone(), batch)
        assert sample(logits, batch) == expected
        # What the kernel does not read is the reference's.
        assert sample_natively(logits.double(), batch).token_ids == expected.token_ids
    finally:
        monkeypatch.undo()
        select("cpu")
