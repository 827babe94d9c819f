"""Penalties, biases and bars change exactly the logits they name."""

from __future__ import annotations

from array import array
from collections import Counter

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor

from services.engine.core.logit_edits import LogitEdits
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.sequence import Sequence
from services.engine.core.token_counts import TokenCounts

PROMPT, OUTPUT = [1, 1, 4], [2, 2, 4]


def edited(logits: Tensor, *rows: tuple[int, Sampling], stopping: Stopping | None = None) -> Tensor:
    edits = LogitEdits()
    for row, sampling in rows:
        request = SequenceRequest(row, PROMPT, sampling, stopping or Stopping())
        sequence = Sequence(request, arrival=row, eos_token_ids=(3,), max_tokens=10, queued_ns=0)
        sequence.token_ids.extend(OUTPUT)
        edits.add(row, sequence)
    result = logits.clone()
    edits.apply(result)
    return result


LOGITS = torch.tensor([[0.5, 1.0, -2.0, 3.0, 4.0, -1.0]])


def test_presence_counts_once_and_frequency_per_occurrence_in_the_output() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    change = edited(LOGITS, (0, sampling)) - LOGITS
    assert torch.allclose(change, torch.tensor([[0.0, 0.0, -1.0, 0.0, -0.75, 0.0]]))


def test_repetition_lowers_what_prompt_or_output_hold_whatever_its_sign() -> None:
    result = edited(LOGITS, (0, Sampling(repetition_penalty=2.0)))
    assert torch.allclose(result, torch.tensor([[0.5, 0.5, -4.0, 3.0, 2.0, -1.0]]))


def test_biases_are_added() -> None:
    change = edited(LOGITS, (0, Sampling(logit_bias={0: 5.0, 5: -7.5}))) - LOGITS
    assert torch.allclose(change, torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0, -7.5]]))


def test_only_allowed_tokens_are_left_and_banned_ones_are_not() -> None:
    sampling = Sampling(allowed_token_ids=(0, 3, 4), banned_token_ids=(3,), logit_bias={1: 50.0})
    kept = edited(LOGITS, (0, sampling)).isfinite().nonzero()[:, 1]
    assert kept.tolist() == [0, 4]


def test_ends_are_barred_before_min_tokens() -> None:
    stopping = Stopping(min_tokens=4, stop_token_ids=(5,))
    kept = edited(LOGITS, (0, Sampling()), stopping=stopping).isfinite().nonzero()[:, 1]
    assert kept.tolist() == [0, 1, 2, 4]
    enough = Stopping(min_tokens=3, stop_token_ids=(5,))
    assert torch.equal(edited(LOGITS, (0, Sampling()), stopping=enough), LOGITS)


def test_rows_are_edited_together_and_others_are_left_alone() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    first = Sampling(presence_penalty=1.0, logit_bias={0: 1.0})
    second = Sampling(frequency_penalty=-1.0, allowed_token_ids=(2, 4))
    together = edited(logits, (0, first), (3, second))
    assert torch.equal(together[1:3], logits[1:3])
    for row, sampling in ((0, first), (3, second)):
        alone = edited(logits[row : row + 1], (0, sampling))
        assert torch.equal(together[row], alone[0])


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=100),
    output=st.lists(st.integers(0, 120), max_size=200),
    draft=st.lists(st.integers(0, 120), max_size=6),
    steps=st.integers(1, 5),
)
def test_tokens_counted_from_step_to_step_are_counted_right_and_a_draft_leaves_no_trace(
    prompt: list[int], output: list[int], draft: list[int], steps: int
) -> None:
    counts = TokenCounts()
    for step in range(1, steps + 1):
        said = output[: len(output) * step // steps]
        counts.advance(array("q", prompt + said), len(prompt))
        for extra in (draft, []):
            ids, in_output = counts.after(tuple(extra))
            expected = dict.fromkeys(prompt, 0) | Counter(said + extra)
            assert dict(zip(ids.tolist(), in_output.tolist(), strict=True)) == expected
            assert len(ids) == len(expected)


def test_a_draft_is_penalised_as_if_it_had_been_said() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    said = LogitEdits()
    drafted = LogitEdits()
    for edits, output, draft in ((said, [2, 2, 5], ()), (drafted, [2], (2, 5))):
        request = SequenceRequest(0, PROMPT, sampling)
        sequence = Sequence(request, arrival=0, eos_token_ids=(3,), max_tokens=10, queued_ns=0)
        sequence.token_ids.extend(output)
        edits.add(0, sequence, draft=draft)
    first, second = LOGITS.clone(), LOGITS.clone()
    said.apply(first)
    drafted.apply(second)
    assert torch.equal(first, second)
