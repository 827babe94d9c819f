"""Kernels choose the tokens that `sampler.sample` chooses, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core import device_sampling
from services.engine.core.device_counts import DeviceCounts
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.kernels import sampling as ops
from services.engine.core.kernels.sampling import (
    DeviceEdits,
    cap_logits,
    choose_tokens,
    edit_logits,
    mask_logits,
    penalize,
    report_logprobs,
)
from services.engine.core.kernels.triton import sampling_filters, sampling_logprobs, sampling_row
from services.engine.core.logit_edits import CountedRow, LogitEdits, TokenMasks
from services.engine.core.messages import Sampling, SequenceRequest
from services.engine.core.sampler import LogitsError, SampledTokens, SamplingBatch, sample
from services.engine.core.sequence import Sequence
from services.engine.core.token_counts import TokenCounts

CPU = torch.device("cpu")
OPS = (cap_logits, choose_tokens, report_logprobs, mask_logits, edit_logits, penalize)
CASES = settings(max_examples=6, deadline=None)
FEW_CASES = settings(max_examples=3, deadline=None)
# Blocks have 128 logits, tiles 2048.
VOCABULARIES = st.sampled_from([1, 3, 127, 128, 129, 1000, 2047, 2049, 5003])
# Interpreted, both sides of a `where` are computed.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def interpreted_ops() -> Iterator[None]:
    for op in OPS:
        assert op.select("cuda", tensors_on="cpu").implementation == "triton"
    yield
    for op in OPS:
        assert op.select("cpu").implementation == "reference"


@CASES
@given(
    seed=st.integers(0, 2**32),
    vocab=VOCABULARIES,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([0.001, 3.0, 90.0]),
)
def test_logits_are_bent_while_they_are_widened(
    seed: int, vocab: int, dtype: torch.dtype, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    projected = (torch.randn(3, vocab, generator=generator) * spread).to(dtype)
    projected[1, 0] = torch.nan
    projected[2, 0] = torch.inf
    # Of a step beside which another has more rows.
    found = torch.zeros(5, vocab)[:3]
    expected = torch.zeros(3, vocab)
    cap_logits(projected, 30.0, found)
    cap_logits.reference(projected, 30.0, expected)
    torch.testing.assert_close(found, expected, rtol=5e-7, atol=0, equal_nan=True)
    if dtype == torch.float32:
        cap_logits(projected, 30.0, projected)
        assert torch.equal(projected.nan_to_num(), found.nan_to_num())


def random_batch(rows: int, seed: int, **columns: Any) -> SamplingBatch:
    rng = np.random.default_rng(seed)
    batch = SamplingBatch(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.7], rows).astype(np.float32),
        top_k=rng.choice([0, 0, 1, 3, 40, 5000], rows),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 1e-6], rows).astype(np.float32),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.5, 1.0], rows).astype(np.float32),
        uniforms=rng.random(rows),
        logprobs=np.full(rows, -1),
    )
    given = {name: np.broadcast_to(value, rows).copy() for name, value in columns.items()}
    return replace(batch, **given)


def launch(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    sampler = DeviceSampler(CPU, *logits.shape, at_once=False)
    return sampler.launch(logits.clone(), batch).result()


def assert_same(found: SampledTokens, expected: SampledTokens) -> None:
    """Rows that fail have no tokens to speak of."""
    assert [type(each) for each in found.errors] == [type(each) for each in expected.errors]
    for row, error in enumerate(expected.errors):
        if error is not None:
            continue
        assert found.token_ids[row] == expected.token_ids[row], row
        mine, wanted = found.logprobs[row], expected.logprobs[row]
        assert (mine is None) == (wanted is None)
        if mine is not None and wanted is not None:
            assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-5)
            assert mine.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-5)
            # Those that tie come in any order, and the last may tie with what is not reported.
            if len(set(wanted.top_logprobs)) == len(wanted.top_logprobs):
                assert mine.top_token_ids[:-1] == wanted.top_token_ids[:-1]


@CASES
@given(
    seed=st.integers(0, 2**32),
    vocab=VOCABULARIES,
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    flaw=st.sampled_from(["", "", "ties", "barred", "nan", "infinite", "nothing"]),
)
def test_tokens_are_those_of_the_sampler(seed: int, vocab: int, spread: float, flaw: str) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((4, vocab)).astype(np.float32)) * spread
    if flaw == "ties":
        logits = (logits * 2).round() / 2
    elif flaw == "barred":
        logits[:, 1:][torch.from_numpy(rng.random((4, vocab - 1)) < 0.9)] = -torch.inf
    elif flaw:
        value = {"nan": torch.nan, "infinite": torch.inf, "nothing": -torch.inf}[flaw]
        logits[1, :: 1 if flaw == "nothing" else 7] = value
    batch = random_batch(4, seed)
    assert_same(launch(logits, batch), sample.reference(logits.clone(), batch))


@FEW_CASES
@given(seed=st.integers(0, 2**32), top_k=st.sampled_from([0, 70]), top_p=st.sampled_from([1, 0.9]))
def test_a_row_too_flat_to_be_gathered_is_searched_itself(
    seed: int, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((2, 1500)).astype(np.float32)) / 50
    batch = random_batch(2, seed, temperature=1.0, top_k=top_k, top_p=top_p, logprobs=[2, -1])
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampling_filters, sampling_logprobs):
            patch.setattr(module, "CANDIDATES", 64)
        assert_same(launch(logits, batch), sample.reference(logits.clone(), batch))


@CASES
@given(seed=st.integers(0, 2**32), vocab=VOCABULARIES, edited=st.booleans())
def test_log_probabilities_are_those_of_the_model(seed: int, vocab: int, edited: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((4, vocab)).astype(np.float32)) * 3
    batch = random_batch(
        4,
        seed,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        logprobs=rng.choice([-1, 0, 1, 5, 20], 4),
        given=rng.choice([-1, vocab - 1], 4),
    )
    if edited:
        batch = replace(batch, edits=edits_of(rng, 4, vocab), given=None)
    assert_same(launch(logits, batch), sample.reference(logits.clone(), batch))


def edits_of(rng: np.random.Generator, rows: int, vocab: int) -> LogitEdits:
    edits = LogitEdits()
    some = [int(each) for each in rng.choice(vocab, min(vocab, 5), replace=False)]
    kinds = [
        Sampling(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.25),
        Sampling(logit_bias={some[0]: 2.5, some[-1]: -1.0}, banned_token_ids=(some[0],)),
        Sampling(allowed_token_ids=tuple(some), repetition_penalty=0.7),
        Sampling(),
    ]
    for row in range(rows):
        request = SequenceRequest(row, some, kinds[rng.integers(len(kinds))])
        sequence = Sequence(request, arrival=row, eos_token_ids=(), max_tokens=99, queued_ns=0)
        sequence.row = row
        sequence.token_ids.extend(int(each) for each in rng.choice(vocab, 30))
        edits.add(row, sequence)
    return edits


@CASES
@given(seed=st.integers(0, 2**32), vocab=VOCABULARIES, masked=st.booleans())
def test_masks_and_edits_change_what_they_change_on_a_cpu(
    seed: int, vocab: int, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((6, vocab)).astype(np.float32)) * 3
    words = rng.integers(0, 2**32, (2, -(-vocab // 32)), np.uint32)
    masks = TokenMasks(np.array([4, 1]), words) if masked else None
    batch = replace(SamplingBatch.greedy(6), masks=masks, edits=edits_of(rng, 6, vocab))
    found, expected = logits.clone(), logits.clone()
    sampler = DeviceSampler(CPU, 6, vocab, at_once=False)
    tokens = sampler.launch(found, replace(batch, is_greedy=False)).result()
    assert_same(tokens, sample.reference(expected, replace(batch, is_greedy=False)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@CASES
@given(seed=st.integers(0, 2**32))
def test_what_sequences_say_is_counted_on_the_device_from_step_to_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sampler = DeviceSampler(CPU, 4, 700, at_once=False)
    running: dict[int, tuple[Sequence, TokenCounts]] = {}
    for step in range(5):
        edits = LogitEdits()
        for row, slot in enumerate(rng.permutation(12)[:4].tolist()):
            if slot not in running or rng.random() < 0.2:  # another sequence has its row now
                sampling = Sampling(
                    repetition_penalty=float(rng.choice([1.0, 1.5])),
                    presence_penalty=0.5,
                    frequency_penalty=float(rng.choice([0.0, 0.1])),
                )
                prompt = rng.integers(0, 700, int(rng.integers(1, 400))).tolist()
                request = SequenceRequest(slot, prompt, sampling)
                sequence = Sequence(
                    request, arrival=step, eos_token_ids=(), max_tokens=999, queued_ns=0
                )
                sequence.row = slot
                running[slot] = sequence, TokenCounts()
            sequence, counts = running[slot]
            sequence.token_ids.extend(rng.integers(0, 700, int(rng.integers(1, 4))).tolist())
            counts.advance(sequence.token_ids, sequence.num_prompt_tokens)
            draft = (5, 9) if row == 3 else ()
            edits.add(row, sequence, counts, draft)
        logits = torch.randn(4, 700) * 3
        expected = logits.clone()
        edits.apply(expected)
        batch = replace(SamplingBatch.greedy(4), edits=edits, is_greedy=False)
        assert sampler.launch(logits, batch).result().token_ids == expected.argmax(-1).tolist()
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


def test_what_changes_of_counts_is_all_that_is_sent() -> None:
    counts = DeviceCounts(CPU)
    request = SequenceRequest(0, list(range(900)), Sampling(repetition_penalty=1.1))
    sequence = Sequence(request, arrival=0, eos_token_ids=(), max_tokens=9, queued_ns=0)
    sequence.row = 3
    known = TokenCounts()
    sizes = []
    for token in (5, 5, 2000):
        sequence.token_ids.append(token)
        known.advance(sequence.token_ids, 900)
        sizes.append(counts.pack([CountedRow(0, sequence, known)])[0].nbytes)
        counts.note_sent()
    assert sizes[0] > 3 * 4 * 900
    assert sizes[1:] == [60, 60]


def test_what_did_not_reach_the_device_is_sent_again() -> None:
    counts = DeviceCounts(CPU)
    sequence, known = said([1, 2], [7, 8])
    row = CountedRow(0, sequence, known)
    packed = counts.pack([row])[0]
    assert (counts.pack([row])[0] == packed).all()
    counts.note_sent()
    assert counts.pack([row])[0].nbytes < packed.nbytes


def said(prompt: list[int], output: list[int]) -> tuple[Sequence, TokenCounts]:
    penalties = Sampling(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.25)
    request = SequenceRequest(0, prompt, penalties)
    sequence = Sequence(request, arrival=0, eos_token_ids=(), max_tokens=99, queued_ns=0)
    sequence.row = 0
    sequence.token_ids.extend(output)
    counts = TokenCounts()
    counts.advance(sequence.token_ids, len(prompt))
    return sequence, counts


@CASES
@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 9), min_size=2, max_size=8),
)
def test_the_token_that_a_device_has_just_chosen_is_counted(
    prompt: list[int], output: list[int]
) -> None:
    """Once, whether it is told of it in the next step or that step is forgotten."""
    sampler = DeviceSampler(CPU, 2, 10, at_once=False)
    for length in range(len(output)):
        sequence, _ = said(prompt, output[: length + 1])
        logits = torch.randn(2, 10)
        expected = logits.clone()
        whole = LogitEdits()
        whole.add(1, sequence)
        whole.apply(expected)
        # The host has not been told the last of them.
        latest = torch.tensor([3, 4, sequence.token_ids.pop()])
        if length == 0:
            kept, counts = sequence, TokenCounts()
        else:
            kept.token_ids.append(output[length - 1])
        counts.advance(kept.token_ids, len(prompt))
        edits = LogitEdits(latest)
        edits.add(1, kept, counts, said=2)
        batch = replace(SamplingBatch.greedy(2), edits=edits, is_greedy=False)
        for _ in range(2):
            found = logits.clone()
            sampler.launch(found, batch)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        at_once = logits.clone()
        edits.apply(at_once)
        torch.testing.assert_close(at_once, expected, rtol=1e-6, atol=0)


def test_sequences_of_very_many_tokens_are_counted_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_sampling, "MOST_DISTINCT", 3)
    rng = np.random.default_rng(0)
    logits = torch.randn(6, 100)
    expected = logits.clone()
    edits = edits_of(rng, 6, 100)
    edits.apply(expected)
    sampler = DeviceSampler(CPU, 6, 100, at_once=False)
    sampler.launch(logits, replace(SamplingBatch.greedy(6), edits=edits, is_greedy=False))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)


def test_an_edit_of_a_token_that_does_not_exist_fails_its_row_alone() -> None:
    edits = LogitEdits()
    for row, token in enumerate((0, 70)):
        request = SequenceRequest(row, [1], Sampling(logit_bias={token: 50.0}))
        sequence = Sequence(request, arrival=row, eos_token_ids=(), max_tokens=9, queued_ns=0)
        sequence.row = row
        edits.add(row, sequence)
    batch = replace(SamplingBatch.greedy(2), edits=edits, is_greedy=False)
    found = launch(torch.zeros(2, 70), batch)
    assert found.token_ids[0] == 0
    assert [type(error) for error in found.errors] == [type(None), LogitsError]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (0, 0.9), (20, 1.0)])
def test_the_bound_of_what_is_gathered_is_no_higher_than_what_is_kept(
    top_k: int, top_p: float
) -> None:
    """One logit to a block is where it is as high as it may be."""
    logits = torch.full((4, 40 * 128), -torch.inf)
    logits[:, ::128] = torch.randn(4, 40)
    uniforms = np.array([0.0, 0.3, 0.6, 0.999])
    batch = random_batch(
        4, 0, temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0, uniforms=uniforms
    )
    assert_same(launch(logits, batch), sample.reference(logits.clone(), batch))


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_how_it_is_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((5, 7001)).astype(np.float32)) * 2
    columns = {
        "temperature": np.array([1.0, 1.0, 0.8, 1.3, 0.0]),
        "top_k": np.array([0, 0, 50, 0, 0]),
        "top_p": np.array([1.0, 0.9, 0.8, 1.0, 1.0]),
        "min_p": np.array([0.0, 0.0, 0.0, 0.01, 0.0]),
        "logprobs": np.array([3, -1, 0, -1, 2]),
    }
    together = random_batch(5, 0, **columns)
    monkeypatch.setattr(sampling_row, "_PROGRAMS", 10)  # two tiles each
    found = launch(logits, together)
    monkeypatch.setattr(sampling_row, "_PROGRAMS", 4)  # all four
    for row in range(5):
        alone = {name: values[row : row + 1] for name, values in columns.items()}
        batch = random_batch(1, 0, **alone, uniforms=together.uniforms[row])
        one = launch(logits[row : row + 1], batch)
        assert one.token_ids == [found.token_ids[row]]
        assert one.logprobs == [found.logprobs[row]]


def test_steps_are_launched_before_those_in_front_of_them_are_read() -> None:
    sampler = DeviceSampler(CPU, 3, 300, at_once=False)
    logits = [torch.randn(rows, 300) for rows in (3, 2, 3, 1)]
    batches = [random_batch(len(each), 0, logprobs=1) for each in logits]
    pending = [
        sampler.launch(each.clone(), batch) for each, batch in zip(logits, batches, strict=True)
    ]
    for each, batch, tokens in zip(logits, batches, pending, strict=True):
        assert_same(tokens.result(), sample.reference(each.clone(), batch))
        assert tokens.result() is tokens.result()
    assert pending[-1].token_ids.tolist() == pending[-1].result().token_ids


def test_more_rows_than_there_is_room_for_are_sampled_in_lots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(7, 300)
    batch = random_batch(7, 2, logprobs=[0, -1, 2, 3, -1, -1, 1])
    monkeypatch.setattr(ops, "ROWS_AT_ONCE", 3)
    assert_same(launch(logits, batch), sample.reference(logits.clone(), batch))


def test_what_kernels_count_in_is_left_as_it_was_found() -> None:
    """Else a batch would not sample twice alike."""
    sampler = DeviceSampler(CPU, 3, 900, at_once=False)
    logits = torch.randn(3, 900)
    logits[1, 5] = torch.nan
    batch = random_batch(3, 1, temperature=1.0, top_p=0.9, logprobs=4)
    first = sampler.launch(logits.clone(), batch).result()
    again = sampler.launch(logits.clone(), batch).result()
    assert_same(again, first)


def test_the_form_of_a_step_says_which_kernels_run() -> None:
    sampler = DeviceSampler(CPU, 4, 9, at_once=False)
    assert sampler.stage(SamplingBatch.greedy(2)).is_greedy
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    drawn = sampler.stage(random_batch(4, 0, temperature=1.0, **off))
    assert (drawn.draws, drawn.filters, drawn.most_logprobs) == (True, False, -1)
    assert drawn == sampler.stage(random_batch(4, 1, temperature=0.5, **off))
    assert sampler.stage(random_batch(4, 0, temperature=1.0, min_p=0.1)).filters
    # What filters a row that is not drawn does not matter.
    assert not sampler.stage(random_batch(4, 0, temperature=0.0, top_k=4)).filters
    assert sampler.stage(random_batch(4, 0, temperature=0.0, logprobs=20)).most_logprobs == 9


def test_edits_reach_a_device_by_kind_and_row() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    edits = DeviceEdits(
        rows=torch.tensor([0, 1], dtype=torch.int32),
        offsets=torch.tensor(
            [[0, 2, 2], [2, 2, 2], [2, 3, 4], [4, 6, 6], [6, 6, 7]], dtype=torch.int32
        ),
        token_ids=torch.tensor([0, 1, 1, 2, 1, 2, 3], dtype=torch.int32),
        numbers=torch.tensor([2.0, 2.0, 5.0, -1.0, 0.0, 0.0, 0.0]),
    )
    expected = torch.tensor([[-torch.inf, 3.0, 2.0, -torch.inf], [1.0, 1.0, 0.0, -torch.inf]])
    for apply in (edit_logits, edit_logits.reference):
        found = logits.clone()
        apply(found, replace(edits, numbers=edits.numbers.clone()))
        assert torch.equal(found, expected)
