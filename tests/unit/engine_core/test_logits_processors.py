"""Logits processors do what they say to the requests that name them, and nothing to others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.engine.core import logits_processors
from services.engine.core.kernels.cpu.sampling import sample_with
from services.engine.core.logit_edits import LogitEdits, TokenMasks
from services.engine.core.messages import FinishReason, Sampling, SequenceRequest, Stopping
from services.engine.core.sampler import SamplingBatch, sample
from services.engine.core.sequence import Sequence
from tests.fakes import logits_plugins
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.paged_step import libraries

COUNT_DOWN = (("count-down", '{"start": 20}'),)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logits_plugins.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    logits_processors.processor_names.cache_clear()
    logits_processors._processor.cache_clear()
    yield
    logits_processors.processor_names.cache_clear()
    logits_processors._processor.cache_clear()


def request(sequence_id: int, *processors: tuple[str, str], **sampling: Any) -> SequenceRequest:
    return SequenceRequest(
        sequence_id,
        [4, 5, 6],
        Sampling(logits_processors=processors, seed=sequence_id, **sampling),
        Stopping(max_tokens=8, ignore_eos=True),
    )


def run(engine: Any, requests: list[SequenceRequest]) -> dict[int, tuple[list[int], Any]]:
    engine.add(requests)
    tokens: dict[int, list[int]] = {each.sequence_id: [] for each in requests}
    finishes = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            tokens[delta.sequence_id] += delta.token_ids
            if delta.finish is not None:
                finishes[delta.sequence_id] = delta.finish
        engine.check_integrity()
    return {each: (tokens[each], finishes[each]) for each in tokens}


def test_what_is_installed_is_known_by_name() -> None:
    assert logits_processors.processor_names() >= {"count-down", "raises", "misshapes"}


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_it_sees_prompt_and_output_of_its_own_sequence(plans_ahead: bool) -> None:
    engine = make_engine(plans_ahead=plans_ahead)
    plain = request(1)
    answers = run(engine, [request(0, *COUNT_DOWN), plain, request(2, *COUNT_DOWN, temperature=0)])
    for counted in (0, 2):
        assert answers[counted][0] == [24, 23, 22, 21, 20, 19, 18, 17]
    assert answers[1][0] == reference_output(plain, 64)


def test_one_that_fails_fails_its_sequence_alone() -> None:
    engine = make_engine()
    plain = request(3)
    answers = run(
        engine,
        [
            request(0, ("raises", '{"after": 2}')),
            request(1, ("misshapes", "{}")),
            request(2, ("count-down", "{}")),
            plain,
        ],
    )
    assert [len(answers[each][0]) for each in (0, 1, 2)] == [2, 0, 0]
    for failed, reason in ((0, "no logits today"), (1, "of shape"), (2, "KeyError")):
        finish = answers[failed][1]
        assert finish.reason is FinishReason.ERROR
        assert finish.error_kind == "LogitsProcessorError"
        assert reason in finish.error
    assert answers[3][0] == reference_output(plain, 64)


def edits(*rows: int, draft: tuple[int, ...] = (), **sampling: Any) -> LogitEdits:
    gathered = LogitEdits()
    for row in rows:
        sequence = Sequence(
            request(row, *COUNT_DOWN, **sampling),
            arrival=row,
            eos_token_ids=(),
            max_tokens=9,
            queued_ns=0,
        )
        gathered.add(row, sequence, draft=draft)
    return gathered


def batch(rows: int, gathered: LogitEdits | None, masks: TokenMasks | None) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.zeros(rows, np.float32),
        top_k=np.zeros(rows, np.int64),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        uniforms=np.zeros(rows),
        logprobs=np.full(rows, 2, np.int64),
        edits=gathered,
        masks=masks,
    )


def mask_of(row: int, vocab: int, allowed: list[int]) -> TokenMasks:
    bits = np.zeros((1, -(-vocab // 32) * 32), np.uint8)
    bits[0, allowed] = 1
    return TokenMasks(
        np.array([row]), np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    )


@pytest.mark.parametrize("way", ["reference", *(kernels.isa for kernels in libraries())])
def test_bars_hold_and_log_probabilities_stay_the_model_s(way: str) -> None:
    vocab = 100
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
    gathered = edits(0, 2, banned_token_ids=(24,))
    for row in (3,):
        sequence = Sequence(
            request(row, *COUNT_DOWN), arrival=9, eos_token_ids=(), max_tokens=9, queued_ns=0
        )
        gathered.add(row, sequence, draft=(7, 7))
    masks = mask_of(2, vocab, [1, 50, 60])

    def choose(asked: SamplingBatch) -> Any:
        if way == "reference":
            return sample.reference(logits.clone(), asked)
        kernels = next(each for each in libraries() if each.isa == way)
        return sample_with(kernels, logits.clone(), asked)

    chosen = choose(batch(4, gathered, masks))
    plain = choose(batch(4, None, masks))

    assert chosen.errors == [None] * 4
    assert chosen.token_ids[0] == int(logits[0].index_fill(0, torch.tensor([24]), -9e9).argmax())
    assert chosen.token_ids[1:3] == plain.token_ids[1:3]  # 24 is masked in the latter
    assert chosen.token_ids[3] == 22
    own = logits.log_softmax(dim=-1)
    for row in (0, 1, 3):
        entry = chosen.logprobs[row]
        assert entry.logprob == pytest.approx(float(own[row, chosen.token_ids[row]]), abs=1e-5)
        assert entry.top_token_ids == plain.logprobs[row].top_token_ids
