"""Every family of encoders answers through the engine core what `transformers` computes, in any
company and from any kind of file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.core.encoding.core import EncoderCore
from services.engine.core.kernels.cpu import library
from services.engine.core.messages import EncodeRequest, EncodeTask
from services.engine.core.settings import BatcherSettings, CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.decoder_directories import save_pickled, save_sharded
from tests.fakes.paged_step import libraries
from tests.fakes.small_encoders import (
    SECOND_TEXTS,
    SavedEncoders,
    class_logits,
    sequences,
    token_vectors,
)
from tests.support.proofs import ENCODERS, HAS_NONE

FAMILIES = list(ENCODERS)
NATIVE = [family for family in FAMILIES if (family, "native kernels") not in HAS_NONE]
needs_kernels = pytest.mark.skipif(not libraries(), reason="no native kernels on this machine")
TASKS = {"embeddings": "", "classification": " that classifies", "scores": " that scores"}
KINDS: dict[str, Any] = {"embeddings": "embed", "classification": "classify", "scores": "score"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    library.activate("off")


def answers(path: Path, task: str, **fields: Any) -> list[Tensor]:
    """What an engine answers to all sequences at once."""
    settings = {"dtype": "float32", "cpu_kernels": "off", **fields}
    core, facts = build_engine(
        CoreSettings(model_path=str(path), device="cpu", threads=1, **settings)
    )
    assert isinstance(core, EncoderCore)
    assert (facts.kernels["encoder"] == "torch") == (settings["cpu_kernels"] == "off")
    requests = [
        EncodeRequest(number, token_ids, EncodeTask(KINDS[task]), second)
        for number, (token_ids, second) in enumerate(zip(sequences(), SECOND_TEXTS, strict=True))
    ]
    random.Random(1).shuffle(requests)
    core.add(requests)
    found: dict[int, Tensor] = {}
    while core.due_in_s is not None:
        for answer in core.step().answers:
            assert not answer.error
            values = np.frombuffer(answer.values, "<f4").copy()
            found[answer.sequence_id] = torch.from_numpy(values)
        core.check_integrity()
    return [found[number] for number in range(len(requests))]


def expected_answers(reference: Any, task: str) -> list[Tensor]:
    """What transformers makes of them."""
    made = []
    for token_ids, second in zip(sequences(), SECOND_TEXTS, strict=True):
        if task == "embeddings":
            made.append(token_vectors(reference, token_ids, second).mean(0))
        else:
            logits = class_logits(reference, token_ids, second)
            made.append(logits.softmax(-1) if task == "classification" else logits.sigmoid())
    return made


@pytest.mark.proves("{family}", "{task}", "plain torch", "safetensors")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(saved: SavedEncoders, family: str, task: str) -> None:
    reference, path = saved.save(family + TASKS[task])
    for found, expected in zip(answers(path, task), expected_answers(reference, task), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.proves("{family}", "{task}", "native kernels")
@needs_kernels
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", NATIVE)
def test_answers_of_the_kernels_are_near(saved: SavedEncoders, family: str, task: str) -> None:
    reference, path = saved.save(family + TASKS[task])
    natively = answers(path, task, dtype="bfloat16", cpu_kernels="auto")
    for found, expected in zip(natively, expected_answers(reference, task), strict=True):
        if task == "embeddings":
            assert torch.cosine_similarity(found, expected, dim=0) > 0.9999
        else:
            torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@pytest.mark.proves("{family}", "{weights} weights")
@needs_kernels
@pytest.mark.parametrize(("weights", "cosine"), [("int8", 0.999), ("int4", 0.9)])
@pytest.mark.parametrize("family", NATIVE)
def test_rounded_weights_stay_near(
    saved: SavedEncoders, family: str, weights: str, cosine: float
) -> None:
    reference, path = saved.save(family)
    natively = answers(path, "embeddings", dtype="auto", cpu_kernels="auto", weights=weights)
    for found, expected in zip(natively, expected_answers(reference, "embeddings"), strict=True):
        assert torch.cosine_similarity(found, expected, dim=0) > cosine


@pytest.mark.proves("{family}", "mixed batches")
@pytest.mark.parametrize("family", FAMILIES)
def test_company_changes_no_answer(saved: SavedEncoders, family: str) -> None:
    _, path = saved.save(family)
    alone = answers(path, "embeddings", batcher=BatcherSettings(max_sequences=1))
    by_tokens = answers(path, "embeddings", batcher=BatcherSettings(max_tokens=80))
    torch.testing.assert_close(alone, answers(path, "embeddings"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, by_tokens, atol=1e-5, rtol=1e-5)


FORMS: dict[str, Callable[[Path, Path], None]] = {"sharded": save_sharded, "pickled": save_pickled}


@pytest.mark.proves("{family}", "{form}")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_every_kind_hold_the_same(
    saved: SavedEncoders, family: str, form: str, tmp_path: Path
) -> None:
    _, path = saved.save(family)
    FORMS[form](path, tmp_path / "model")
    found = answers(tmp_path / "model", "embeddings", allow_pickled=True)
    assert all(map(torch.equal, found, answers(path, "embeddings")))
